"""Compilation of kernels/cpu/*.cpp into one shared library at first use."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent / "cpu"
# No -ffast-math and no contraction: bits depend on the source, not on the optimiser.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
COMPILE_TIMEOUT_S = 300.0


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, else g++, c++ or clang++; ValueError when there is none."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("g++", "c++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return path
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
    number of processes may call this at once. RuntimeError with the compiler's output when it fails or is too slow.
    """
    compiler = find_compiler()
    files = sorted([*sources.glob("*.cpp"), *sources.glob("*.h")])
    units = [str(f) for f in files if f.suffix == ".cpp"]
    flags = [*FLAGS, *units, *link_flags()]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    digest = hashlib.sha256()
    for part in (compiler, version, cpu_flags(), *flags, *(f.name + "\0" + f.read_text() for f in files)):
        digest.update(part.encode() + b"\0")
    folder = cache_dir()
    library = folder / f"kernels-{digest.hexdigest()[:32]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)  # others must not be able to replace code that is loaded
        with _one_at_a_time(folder / "build.lock", timeout_s):
            if not library.exists():
                _compile([compiler, *flags], library, timeout_s)
    except OSError as error:
        raise RuntimeError(f"cannot write compiled kernels to {folder}: {error}. Set SHOAL_CACHE_DIR") from error
    return library


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


def _compile(command: list[str], library: Path, timeout_s: float) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=library.parent, prefix="building-", suffix=".so")
    os.close(descriptor)
    try:
        result = subprocess.run([*command, "-o", temporary], capture_output=True, text=True, timeout=timeout_s)
        if result.returncode != 0:
            raise RuntimeError(f"compiling the CPU kernels failed: {' '.join(command)}\n{result.stdout}{result.stderr}")
        os.replace(temporary, library)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"compiling the CPU kernels took more than {timeout_s:g} s: {' '.join(command)}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled CPU kernels, built on first use."""
    return ctypes.CDLL(str(build_library()))
