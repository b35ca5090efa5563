"""What `shoal doctor` says about packages that are there, absent, broken or installed twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from shoal.cluster.commands.cli import main
from shoal.cluster.commands.doctor import MODULES, Module, distribution_of, look_at
from shoal.kernels.vendor import LIBRARIES


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, which are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("fake_ep", "deep_ep"):
        sys.modules.pop(name, None)


def install(site: Path, module: str, code: str, *owners: tuple[str, str]) -> None:
    (site / f"{module}.py").write_text(code)
    for name, version in owners:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "top_level.txt").write_text(module + "\n")


def fake(setting: str = "", check: Callable[[torch.device], None] | None = None) -> Module:
    deep_ep = next(module for module in MODULES if module.name == "deep_ep")
    return Module("fake_ep", "exchange of tokens", deep_ep.generation, setting, check)


@pytest.mark.parametrize(
    ("code", "generation"),
    [
        ("class Buffer: pass", "has Buffer"),
        ("class Buffer: pass\nclass ElasticBuffer: pass", "has ElasticBuffer"),
        ("class EPBuffer: pass\nclass Buffer: pass", "has EPBuffer"),
        ("", "of an unknown interface"),
    ],
)
def test_the_generation_of_an_interface(site: Path, code: str, generation: str) -> None:
    install(site, "fake_ep", code, ("fake-ep-cu13", "1.2.1"))
    found = look_at(fake(), None)
    assert (found.found, found.verdict) == (f"fake-ep-cu13 1.2.1, {generation}", "used")


def test_a_module_that_a_setting_asks_for(site: Path) -> None:
    def fails(device: torch.device) -> None:
        raise ValueError(f"no kernel for {device}")

    install(site, "fake_ep", "class Buffer: pass", ("fake-ep", "1.0"))
    gpu = torch.device("cuda")
    for check in (None, lambda _: None):
        found = look_at(fake("all2all_backend fake", check), gpu)
        assert (found.verdict, found.why) == ("available", "for exchange of tokens, with all2all_backend fake")
    declined = look_at(fake("all2all_backend fake", fails), gpu)
    assert declined.verdict == "not used"
    assert declined.why == "no kernel for cuda; it would be for exchange of tokens, with all2all_backend fake"
    without = look_at(fake("all2all_backend fake"), None)
    assert (without.verdict, without.why.split(";")[0]) == ("not used", "there is no GPU here")


def test_a_module_that_is_missing_or_broken(site: Path) -> None:
    assert look_at(fake(), None).verdict == "missing"
    assert look_at(fake("a setting"), None).why == "not installed; it is for exchange of tokens, with a setting"
    install(site, "fake_ep", "raise OSError('libnvshmem.so.3: cannot open shared object file')", ("fake-ep", "1.0"))
    broken = look_at(fake(), None)
    assert broken.verdict == "broken"
    assert broken.why == "cannot be imported: libnvshmem.so.3: cannot open shared object file"
    assert look_at(fake("a setting"), None).verdict == "not used"


def test_two_distributions_that_own_one_module(site: Path) -> None:
    install(site, "fake_ep", "", ("fake-ep", "1.0"), ("fake-ep-fork", "2.0"))
    assert distribution_of("fake_ep") == "fake-ep 1.0 and fake-ep-fork 2.0"
    assert distribution_of("no_such_module_at_all") == "in no distribution"


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "new" / "doctor.json"
    result = CliRunner().invoke(main, ["doctor", "--output", str(path)])
    assert result.exit_code == 0, result.output
    findings = {row["name"]: row for row in json.loads(path.read_text())["findings"]}
    assert findings["C++ compiler"]["verdict"] == findings["device cpu"]["verdict"] == "used"
    assert findings["ray"]["found"].startswith("ray 2.")
    assert {module.name for module in MODULES} < set(findings)
    for name in findings:
        assert name in result.stdout


def test_nothing_is_imported_before_somebody_asks(tmp_path: Path) -> None:
    for name in ("deep_ep", *LIBRARIES):
        install(tmp_path, name, "print('imported', __name__)")
    modules = "shoal.cluster.commands.cli, shoal.cluster.llm, shoal.runtime.engine.engine"
    code = f"import sys, {modules}; print(*sorted(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True, env=environment
    )
    assert not set(run.stdout.split()) & ({module.name for module in MODULES} | {"imported"}) - {"nixl_cu13"}


def test_the_functions_of_a_vendor_are_those_that_its_adaptor_calls() -> None:
    module = next(module for module in MODULES if module.name == "deep_gemm")
    found = ModuleType("deep_gemm")
    for name in ("m_grouped_fp8_gemm_nt_contiguous", "fp8_gemm_nt", "get_num_sms"):
        setattr(found, name, None)
    assert module.generation(found) == (
        "lacks get_mk_alignment_for_contiguous_layout, fp8_paged_mqa_logits, get_paged_mqa_logits_metadata"
    )
