#!/usr/bin/env python3
"""Everything that only a GPU can show, on the one that is here: `make gpu-check`.

    PYTHONPATH=.src python benchmarks/gpu_check.py

Needs torch, Triton, pytest, hypothesis, numpy, safetensors, tokenizers and msgspec, and nothing of Shoal installed; a
picture also matplotlib. Tests first: parity of
every kernel, and an engine whose answers depend on nothing. Then the kernels against the peaks of this device, and
an engine with V3.2's shapes. Results go to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(os.path.relpath(Path(__file__).parent))
TESTS = ("tests/gpu", "tests/kernels/triton", "tests/parallel/test_deep_ep.py")
COMPILE_ONLY = "tests/kernels/triton/test_compile.py"
"""It needs no GPU, and runs wherever the other tests do."""


def device_name() -> str:
    """The device as a folder: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def run_tests() -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *TESTS]
    command.append(f"--ignore={COMPILE_ONLY}")
    if find_spec("xdist") is not None:  # kernels are compiled by one core each
        command += ["-n", str(min(14, len(os.sched_getaffinity(0)))), "-p", "no:benchmark"]
    return subprocess.run(command, check=False).returncode


def measure_kernels(output: Path) -> int:
    """`shoal bench kernels --shapes v3 --device cuda --refcheck`, without the packages that draw its table."""
    from shoal.cluster.bench.cases import Case
    from shoal.cluster.bench.kernels import measure_kernels as measure

    def on_case(case: Case, row: dict[str, Any] | None) -> None:
        if row is not None:
            checked = "" if row.get("within_tolerance", True) else f"  DIFFERS by {row['difference']:.1e}"
            rates = f"{1e6 * row['seconds']:9.1f} us  {row['fraction_of_peak']:6.1%} {row['bound']:7}"
            print(f"{case.op + ' ' + case.sizes:52} {rates}{checked}", flush=True)

    report = measure(shapes="v3", names=None, threads=None, device=torch.device("cuda"), refcheck=True, on_case=on_case)
    report["command"] = "make gpu-check"
    output.write_text(json.dumps(report, indent=1) + "\n")
    return sum(row.get("within_tolerance") is False for row in report["kernels"])


def plot(folder: Path) -> int:
    """All kernels' fractions of what this device could do; without matplotlib, no picture."""
    if find_spec("matplotlib") is None:
        print("no matplotlib: no picture")
        return 0
    from plots import save_fractions

    def rows(name: str) -> Any:
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    kernels = rows("kernels").get("kernels", [])
    fractions = {f"{row['op']} {row['sizes']}": row["fraction_of_peak"] for row in kernels}
    fractions |= {row["name"]: row["fraction"] for row in rows("attention").get("kernels", [])}
    fractions |= {name: row["of_floor"] for name, row in rows("gemm").get("cases", {}).items()}
    save_fractions(folder / "kernels.png", fractions, xlabel=f"fraction of the binding peak, {folder.name}")
    return 0


def script(name: str, output: Path, *flags: str) -> int:
    command = [sys.executable, str(HERE / name), *flags, "--output", str(output)]
    return subprocess.run(command, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results", help="where the device's folder goes")
    parser.add_argument("--parts", default="tests,kernels,attention,gemm,engine,plot", help="some of them")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here")
    folder = args.output / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "tests": run_tests,
        "kernels": lambda: measure_kernels(folder / "kernels.json"),
        "attention": lambda: script("gpu_attention.py", folder / "attention.json"),
        "gemm": lambda: script("gpu_gemm.py", folder / "gemm.json"),
        "engine": lambda: script("gpu_engine.py", folder / "engine.json"),
        "plot": lambda: plot(folder),
    }
    failed = []
    for name in args.parts.split(","):
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        if parts[name]():
            failed.append(name)
        print(f"== {name} took {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print("all passed")


if __name__ == "__main__":
    main()
