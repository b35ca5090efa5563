"""Import of optional libraries, only when a setting asks for them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def import_optional(name: str, *, setting: str, install: str) -> ModuleType:
    """Import the top-level module `name`, which `setting` needs.

    ValueError if it is not installed, with instructions (`install`), or cannot be imported, with the reason.
    """
    if find_spec(name) is None:
        raise ValueError(f"{setting} needs the module {name}, which is not installed: {install}, or change the setting")
    try:
        return import_module(name)
    except Exception as error:  # an import runs arbitrary code of the package
        raise ValueError(
            f"{setting} needs the module {name}, which is installed but cannot be imported: {error}"
        ) from error
