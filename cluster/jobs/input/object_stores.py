"""Files by URL, through pyarrow's file systems or fsspec's (extra `data`): s3://, gs://, hf://, file://, .."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote, unquote

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
WILDCARD = re.compile(r"[*?\[]")
_FSSPEC_SCHEMES = ("hf",)
"""Those that pyarrow has no file system for."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A file in an object store."""

    url: str
    num_bytes: int
    modified: str
    """When it was written last."""


def find_objects(url: str, *, is_input: Callable[[str], bool]) -> list[StoredObject]:
    """The file of a URL, or those below a directory or of a pattern, by their paths.

    `is_input` says by its name whether a file in a directory is one. ValueError for what cannot be read.
    """
    pattern, query = _split_query(url)
    wildcard = WILDCARD.search(pattern)
    base = pattern if wildcard is None else pattern[: wildcard.start()].rpartition("/")[0]
    if SCHEME.match(base) is None:
        raise ValueError(f"the input {url} has a pattern where the bucket stands; name the bucket")
    file_system, path = _file_system(base + query)
    from pyarrow.fs import FileSelector, FileType

    try:
        (there,) = file_system.get_file_info([path])
        infos = [there]
        if there.type != FileType.File:
            infos = file_system.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
            infos = [info for info in infos if info.type == FileType.File]
            parts = _decoded(pattern).split("/")
            if wildcard is None:
                infos = [info for info in infos if _is_shown(info.path.removeprefix(path), is_input)]
            else:
                infos = [info for info in infos if _matches(info.path.split("/"), parts)]
    except OSError as error:
        raise ValueError(f"cannot read the input {url}: {error}") from error
    return [
        StoredObject(_encoded(url, info.path) + query, info.size, str(info.mtime))
        for info in sorted(infos, key=lambda info: info.path)
    ]


def open_object(url: str) -> Any:
    """Open a file for reading, as pyarrow's NativeFile. OSError for one that cannot be read."""
    file_system, path = _file_system(url)
    return file_system.open_input_file(path)


def _is_shown(path: str, is_input: Callable[[str], bool]) -> bool:
    *directories, name = path.strip("/").split("/")
    return is_input(name) and not any(one.startswith((".", "_")) for one in directories)


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a path matches a pattern, both by their parts, as `glob` has it: ** is any number of directories."""
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        num_shown = next((i for i, name in enumerate(names) if name.startswith(".")), len(names))
        return any(_matches(names[start:], parts[1:]) for start in range(num_shown + 1))
    is_hidden = names[0].startswith(".") and not parts[0].startswith(".")
    return not is_hidden and fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def _scheme(url: str) -> str:
    match = SCHEME.match(url)
    assert match is not None, url
    return match[1]


def _split_query(url: str) -> tuple[str, str]:
    """A URL, and what follows it: options of the file system such as ?endpoint_override=, not a wildcard."""
    path, mark, query = url.partition("?")
    return (path, mark + query) if "=" in query else (url, "")


def _decoded(url: str) -> str:
    """The path in a file system."""
    path = url.partition("://")[2]
    return path if _scheme(url) in _FSSPEC_SCHEMES else unquote(path)


def _encoded(url: str, path: str) -> str:
    """The URL of another path in the file system of a URL."""
    return f"{_scheme(url)}://{path if _scheme(url) in _FSSPEC_SCHEMES else quote(path)}"


@functools.lru_cache(maxsize=16)
def _file_system(url: str) -> tuple[Any, str]:
    """pyarrow's file system of a URL, and the path in it. ValueError for a scheme that is not known."""
    try:
        from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

        if _scheme(url) in _FSSPEC_SCHEMES:
            import fsspec

            return PyFileSystem(FSSpecHandler(fsspec.filesystem(_scheme(url)))), _decoded(url)
        file_system, path = FileSystem.from_uri(url)
    except ImportError as error:
        missing = "pyarrow" if error.name is None else error.name.partition(".")[0]
        raise ValueError(f"reading {url} needs {missing}: pip install 'shoal[data]' {missing}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read the input {url}: {error}") from error
    return file_system, path
