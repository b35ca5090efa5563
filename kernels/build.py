"""Compilation of kernels/cpu/*.cpp into one shared library at first use."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent / "cpu"
# No -ffast-math and no contraction: bits depend on the source, not on the optimiser.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
COMPILE_TIMEOUT_S = 300.0


def find_compiler() -> list[str]:
    """The C++ compiler as the beginning of a command: $CXX with its arguments, else g++, c++ or clang++.

    ValueError when its program is not installed.
    """
    chosen = os.environ.get("CXX", "").strip()
    for command in [shlex.split(chosen)] if chosen else [["g++"], ["c++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise ValueError(
        f"no C++ compiler found ({f'CXX={chosen}' if chosen else 'tried g++, c++, clang++'}): the CPU kernels are "
        'compiled at first use. Install g++, set CXX, or choose the "reference" kernels (not invariant)'
    )


def cache_dir() -> Path:
    """Folder of compiled libraries: $SHOAL_CACHE_DIR, else $XDG_CACHE_HOME/shoal, else ~/.cache/shoal."""
    if chosen := os.environ.get("SHOAL_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoal"


def cpu_flags() -> str:
    """Instruction sets of this machine, which -march=native compiles for."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    return platform.processor()


def link_flags() -> list[str]:
    """Flags that link torch's OpenMP runtime, so that the process has only one."""
    lib = Path(torch.__file__).parent / "lib"
    found = sorted(lib.glob("libgomp*.so*"))
    return ["-Wl,--as-needed", str(found[0]), f"-Wl,-rpath,{lib}"] if found else []


def build_library(sources: Path = SOURCE_DIR, *, timeout_s: float = COMPILE_TIMEOUT_S) -> Path:
    """Compile every .cpp file of `sources` unless the cache already holds the result; returns the library's path.

    The name is a hash of the sources, flags, compiler version and CPU, and the file appears by an atomic rename, so any
    number of processes may call this at once. A library that cannot be loaded (empty, truncated, built for another
    system) is compiled again, and a cache that cannot be written is replaced by a folder under the system's temporary
    directory; both are reported on stderr. RuntimeError with the compiler's output when it fails or is too slow.
    """
    compiler = find_compiler()
    files = sorted([*sources.glob("*.cpp"), *sources.glob("*.h")])
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    digest = hashlib.sha256()
    for part in (
        *compiler,
        version,
        cpu_flags(),
        *FLAGS,
        *link_flags(),
        *(f.name + "\0" + f.read_text() for f in files),
    ):
        digest.update(part.encode() + b"\0")
    name = f"kernels-{digest.hexdigest()[:32]}.so"
    units = [file for file in files if file.suffix == ".cpp"]
    try:
        return _build_in(cache_dir(), name, compiler, units, timeout_s)
    except OSError as error:
        if "SHOAL_CACHE_DIR" in os.environ:
            raise RuntimeError(
                f"cannot write compiled kernels to {cache_dir()}: {error}. Set SHOAL_CACHE_DIR to a folder that can be "
                f"written"
            ) from error
        fallback = Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}"
        _say(f"cannot write compiled kernels to {cache_dir()} ({error}); using {fallback}. Set SHOAL_CACHE_DIR")
        return _build_in(_private(fallback), name, compiler, units, timeout_s)


def _build_in(folder: Path, name: str, compiler: list[str], units: Sequence[Path], timeout_s: float) -> Path:
    """The library `name` in `folder`; OSError when the folder cannot be written."""
    library = folder / name
    damage = library_error(library)
    if damage is None:
        return library
    folder.mkdir(0o700, parents=True, exist_ok=True)  # what lies here is run
    with _one_at_a_time(folder / "build.lock", timeout_s):
        damage = library_error(library)
        if damage is not None:
            if library.exists():
                _say(f"{library} cannot be used ({damage}); compiling it again")
            _compile(compiler, units, library, timeout_s)
    return library


def library_error(library: Path) -> str | None:
    """Why a compiled library cannot be used; None for one that can. Its SHA-256 stands in a file beside it.

    The digest is compared first, because the loader may crash on a library whose end is missing.
    """
    if not library.exists():
        return "it does not exist"
    digest = library.with_suffix(".sha256")
    if not digest.exists() or digest.read_text() != _sha256(library):
        return "its bytes are not those that were compiled"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _private(folder: Path) -> Path:
    """`folder`, made if need be; RuntimeError unless it belongs to this user alone, because what lies in it is run."""
    folder.mkdir(0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise RuntimeError(f"{folder} belongs to another user or can be written by others: set SHOAL_CACHE_DIR")
    return folder


def _say(message: str) -> None:
    print(f"shoal: {message}", file=sys.stderr, flush=True)


@contextmanager
def _one_at_a_time(lock: Path, timeout_s: float) -> Iterator[None]:
    """Hold `lock`, so that one process compiles and the others wait; after `timeout_s`, continue without it."""
    deadline = time.monotonic() + timeout_s
    with lock.open("w") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield


def _compile(compiler: list[str], units: Sequence[Path], library: Path, timeout_s: float) -> None:
    """Compile the translation units, as many at a time as this process has cores, and link them into `library`."""
    deadline = time.monotonic() + timeout_s
    descriptor, temporary = tempfile.mkstemp(dir=library.parent, prefix="building-", suffix=".so")
    os.close(descriptor)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="shoal-build-") as objects,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        ):
            outputs = [Path(objects) / f"{unit.stem}.o" for unit in units]
            commands = [
                [*compiler, *FLAGS, "-c", str(unit), "-o", str(output)]
                for unit, output in zip(units, outputs, strict=True)
            ]
            list(pool.map(lambda command: _run(command, deadline, timeout_s), commands))
            link = [*compiler, *FLAGS, *map(str, outputs), *link_flags(), "-o", temporary]
            _run(link, deadline, timeout_s)
        library.with_suffix(".sha256").write_text(_sha256(Path(temporary)))
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str], deadline: float, timeout_s: float) -> None:
    """RuntimeError with the output of a compiler that fails, or is not done by `deadline`."""
    try:
        left = max(0.0, deadline - time.monotonic())
        result = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"compiling the CPU kernels took more than {timeout_s:g} s: {' '.join(command)}") from error
    if result.returncode != 0:
        raise RuntimeError(f"compiling the CPU kernels failed: {' '.join(command)}\n{result.stdout}{result.stderr}")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled CPU kernels, built on first use."""
    return ctypes.CDLL(str(build_library()))
