"""Libraries that Shoal can do without: imported when a setting asks for one, never before."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def import_optional(name: str, *, setting: str, install: str) -> ModuleType:
    """The top-level module `name`, which `setting` asks for.

    ValueError when it is not there, which says how to get it (`install`), or cannot be imported, which says why.
    """
    if find_spec(name) is None:
        raise ValueError(f"{setting} needs the module {name}, which is not installed: {install}, or change the setting")
    try:
        return import_module(name)
    except Exception as error:  # whatever a foreign package does when it is imported
        raise ValueError(
            f"{setting} needs the module {name}, which is installed but cannot be imported: {error}"
        ) from error
