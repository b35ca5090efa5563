"""Makes a fake importable under the name of the library it stands for."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec

import pytest


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """For the rest of a test, `import name` gives tests.support.fakes.<name>."""
    module = import_module(f"tests.support.fakes.{name}")
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(module, "__spec__", ModuleSpec(name, None))
