from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path

import pytest

from shoal.kernels import build

SOURCE = 'extern "C" long answer() { return VALUE; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text('#include "value.h"\n' + SOURCE)
    (folder / "value.h").write_text("#define VALUE 42\n")
    return folder


def test_the_library_is_built_once_and_again_when_a_header_changes(sources: Path) -> None:
    first = build.build_library(sources)
    assert CDLL(str(first)).answer() == 42
    built_at = first.stat().st_mtime_ns
    assert build.build_library(sources) == first
    assert first.stat().st_mtime_ns == built_at
    (sources / "value.h").write_text("#define VALUE 43\n")
    second = build.build_library(sources)
    assert second != first
    assert CDLL(str(second)).answer() == 43
    assert sorted(p.name for p in first.parent.glob("*.so")) == sorted([first.name, second.name])


def test_many_processes_may_build_at_once(sources: Path) -> None:
    program = (
        "import ctypes, sys; from pathlib import Path; from shoal.kernels.build import build_library; "
        "assert ctypes.CDLL(str(build_library(Path(sys.argv[1])))).answer() == 42"
    )
    racing = [subprocess.Popen([sys.executable, "-c", program, str(sources)]) for _ in range(3)]
    try:
        assert [process.wait(timeout=600) for process in racing] == [0, 0, 0]
    finally:
        for process in racing:
            process.kill()
    assert len(list(build.cache_dir().glob("*.so"))) == 1


def test_a_failed_compile_shows_the_compiler_s_output(sources: Path) -> None:
    (sources / "answer.cpp").write_text("int broken = no_such_name;\n")
    with pytest.raises(RuntimeError, match="no_such_name"):
        build.build_library(sources)
    assert [p.name for p in build.cache_dir().iterdir()] == ["build.lock"]


def test_a_slow_compiler_is_stopped(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow-g++"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\nexec sleep 60\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    with pytest.raises(RuntimeError, match=r"took more than 0\.5 s"):
        build.build_library(sources, timeout_s=0.5)


def test_no_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r'Install g\+\+, set CXX, or choose the "reference" kernels'):
        build.find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="CXX=no-such-compiler"):
        build.find_compiler()


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_library_that_is_empty_or_cut_is_compiled_again(
    sources: Path, kept: float, capfd: pytest.CaptureFixture[str]
) -> None:
    library = build.build_library(sources)
    content = library.read_bytes()
    library.write_bytes(content[: int(kept * len(content))])
    assert build.build_library(sources) == library
    assert CDLL(str(library)).answer() == 42
    assert f"{library} cannot be used" in capfd.readouterr().err


def test_a_home_that_cannot_be_written_is_replaced(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SHOAL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(sources / "value.h"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = build.build_library(sources)
    assert library.parent == tmp_path / f"shoal-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert "Set SHOAL_CACHE_DIR" in capfd.readouterr().err
    library.parent.chmod(0o777)
    with pytest.raises(RuntimeError, match="can be written by others"):
        build.build_library(sources)


def test_cxx_is_split_like_a_command_line(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build.find_compiler()
    assert len(plain) == 1
    monkeypatch.setenv("CXX", f"{plain[0]} -m64 '-DGREETING=a b'")
    assert build.find_compiler() == [plain[0], "-m64", "-DGREETING=a b"]
    assert CDLL(str(build.build_library(sources))).answer() == 42


def test_a_cache_that_cannot_be_written_names_the_setting(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE_DIR", str(sources / "value.h"))
    with pytest.raises(RuntimeError, match="Set SHOAL_CACHE_DIR"):
        build.build_library(sources)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE_DIR", "/a")
    assert build.cache_dir() == Path("/a")
    monkeypatch.delenv("SHOAL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert build.cache_dir() == Path("/b/shoal")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_dir() == Path.home() / ".cache" / "shoal"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the loaded libraries from /proc")
def test_the_process_has_one_openmp_runtime_that_follows_torch() -> None:
    program = """
import os, torch
torch.set_num_threads(1)
from shoal.kernels.ops import Ops
ops = Ops("cpu")
weight = ops.pack_weight(torch.ones(256, 256))
ops.linear(torch.ones(64, 256), weight)
print(len(os.listdir("/proc/self/task")))
torch.set_num_threads(2)
ops.linear(torch.ones(64, 256), weight)
print(len(os.listdir("/proc/self/task")))
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True, env=environment
    )
    alone, two, runtimes = (int(word) for word in result.stdout.split())
    assert two == alone + 1
    assert runtimes == 1


def test_a_library_of_another_machine_is_compiled_again(sources: Path) -> None:
    library = build.build_library(sources)
    library.write_bytes(b"\x7fELF of another machine")
    library.with_suffix(".sha256").write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    assert build.build_library(sources) == library
    assert CDLL(str(library)).answer() == 42
