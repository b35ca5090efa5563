"""The programs of benchmarks/, which is no package: they are run from their own folder."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shoal.cluster.bench.roofline
from shoal.cluster.bench.roofline import Peaks
from shoal.runtime.random_checkpoint import make_checkpoint

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("plots", "peers", "scaling")
PNG = b"\x89PNG\r\n\x1a\n"
ALONE = "shoal 1 process x 2 threads"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(FOLDER)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_comparison(programs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    make_checkpoint(model)
    output, picture = tmp_path / "results" / "peers.json", tmp_path / "results" / "peers.png"
    output.parent.mkdir()
    output.write_text(json.dumps({"benchmark": "peers", "workloads": {"W9": None}}))
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, sys\n"
        "print('noise')\n"
        "print(json.dumps({'seconds': 100.0, 'peak_rss_mib': 7, 'args': sys.argv[1:]}))\n"
    )
    peer = f"fake={sys.executable} {fake} {{model}} --workloads {{workload}}"
    broken = f"broken={sys.executable} -c 'raise ValueError(\"/no/such/place\")'"
    command = ["peers.py", "compare", "--model", str(model), "--workloads", "TINY", "--rounds", "1"]
    command += ["--layouts", ALONE, "--peer", peer, "--peer", broken, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(shoal.cluster.bench.roofline, "measure_peaks", lambda: Peaks(1e9, 1e9))
    monkeypatch.setattr(programs.peers, "table", lambda report: "")
    programs.peers.main()
    report = json.loads(output.read_text())
    assert set(report["workloads"]) == {"W9", "TINY"}  # what the file had is kept
    result = report["workloads"]["TINY"]
    ours, theirs = result["contenders"][ALONE], result["contenders"]["fake"]
    assert theirs["seconds"] == {"median": 100.0, "min": 100.0, "max": 100.0, "all": [100.0]}
    assert (theirs["peak_rss_mib"], theirs["startup_s"]) == (7, None)
    assert 0 < ours["seconds"]["median"] < 100
    assert ours["peak_rss_mib"] > 50
    assert 0 < ours["startup_s"]["median"] < 100
    assert ours["engine"]["invariance"] == "strict"
    assert result["contenders"]["broken"] == {"error": "ValueError: place"}
    assert result["best_peer"] == "fake"
    over = result["time_over"][ALONE]["fake"]
    assert over["of_medians"] == over["min"] == over["max"] == pytest.approx(ours["seconds"]["median"] / 100, abs=5e-5)
    assert ours["fraction_of_limit"] == pytest.approx(result["limit_s"] / ours["seconds"]["median"], rel=0.01)
    assert "fake.py {model} --workloads {workload}" in result["command"]
    assert str(tmp_path) not in output.read_text()
    assert str(Path(sys.executable).parent) not in output.read_text()
    del report["workloads"]["W9"]
    programs.peers.plot(report, picture)
    assert picture.read_bytes().startswith(PNG)
    monkeypatch.undo()
    lines = programs.peers.table(report).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["TINY", "shoal", "fake", "broken"]
    assert f"{over['of_medians']:.2f}" in lines[2]


def test_contenders_take_turns_and_a_failure_is_final(programs: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def contender(name: str, then: str) -> list[str]:
        return python(f"open({str(log)!r}, 'a').write({name!r}); {then}")

    contenders = {
        "a": contender("a", """print('{"seconds": 1}')"""),
        "b": contender("b", """print('{"seconds": 2, "peak_rss_mib": 5}')"""),
        "c": contender("c", "raise SystemExit('no room')"),
    }
    runs = programs.peers.run_rounds(contenders, 3, 60)
    assert log.read_text() == "abc" + "ba" + "ab"
    assert [run["seconds"] for run in runs["a"]] == [1, 1, 1]
    assert runs["b"][0]["peak_rss_mib"] == 5
    assert runs["c"] == [{"error": "no room"}]


def test_a_contender_that_hangs_is_ended(programs: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no answer within 0\.3 s"):
        programs.peers.measure(python("import time; time.sleep(60)"), 0.3)


def test_memory_of_children_counts(programs: Any) -> None:
    hold = "import time; x = bytearray(200 << 20); time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}]); print('{{\"seconds\": 1}}')"
    assert 200 < programs.peers.measure(python(parent))["peak_rss_mib"] < 300


def test_token_ids_are_those_of_other_programs(programs: Any) -> None:
    """The first ids of a workload for a vocabulary of 32000, as the peers' scripts draw them."""
    first, second = programs.peers.prompts("TINY", 32000)
    assert (first[:3], len(first), len(second)) == ([28285, 17309, 13735], 16, 16)
    assert programs.peers.prompts("TINY", 32000, 1)[0] != first


def test_paths_are_taken_out(programs: Any) -> None:
    text = shlex.join(
        ["python", "benchmarks/peers.py", "--model", "/a/b/m_v3", "--peer", "x=/opt/e/bin/python /s/r.py"]
    )
    assert programs.peers.without_paths(text) == "python benchmarks/peers.py --model m_v3 --peer 'x=python r.py'"


def test_scaling_measures_what_is_missing(programs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = programs.scaling
    sizes = {"vocab_size": 320}
    models = {"dense": ("deepseek_v3", sizes), "sparse": ("deepseek_v32", sizes)}
    for name, value in (("MODELS", models), ("SIZES", sizes), ("CHUNK", 32), ("MIN_SECONDS", 0.0)):
        monkeypatch.setattr(scaling, name, value)
    output = tmp_path / "scaling.json"
    report: dict[str, Any] = {"curves": {"context": {"dense 64": {"decode_seconds_per_token": 7.0}}}}
    scaling.measure_curve("context", scaling.context_points(tmp_path, [64, 128]), report, output)
    curve = json.loads(output.read_text())["curves"]["context"]
    assert set(curve) == {"dense 64", "dense 128", "sparse 64", "sparse 128"}
    assert curve["dense 64"] == {"decode_seconds_per_token": 7.0}
    assert min(curve["sparse 128"].values()) > 0
    scaling.measure_curve("batch", scaling.batch_points(tmp_path, [1, 2]), report, output)
    scaling.plot("batch", report["curves"]["batch"], tmp_path / "batch.png")
    assert (tmp_path / "batch.png").read_bytes().startswith(PNG)
    ranks = {f"{kind} {layout}": {"output_tokens_per_s": {"median": 1.0}} for kind in models for layout in ("a", "b")}
    scaling.plot("ranks", ranks, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(PNG)
