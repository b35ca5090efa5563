"""`shoal doctor`: devices and optional libraries of this machine, which of them Shoal uses, and why not the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal, TextIO

import torch

from shoal.kernels.build import build_library, find_compiler
from shoal.kernels.ops import choose_backend
from shoal.kernels.registry import check_vendors
from shoal.kernels.vendor import LIBRARIES, Library
from shoal.parallel.deep_ep import INTERFACES

from ..environment import environment
from ..exit_codes import ExitCode
from ..report import prepare_report, write_report

Verdict = Literal["used", "available", "not used", "missing", "broken"]
"""available: it works here and is opt-in by a setting."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one device, tool or library."""

    name: str
    found: str
    """Version and distribution, or "" if it is missing."""
    verdict: Verdict
    why: str


@dataclass(frozen=True, slots=True)
class Module:
    """An optional package."""

    name: str
    """Name of the module to import."""
    purpose: str
    generation: Callable[[ModuleType], str] = lambda _: ""
    """Interface of the installed version, or what it lacks; "" where there is only one."""
    setting: str = ""
    """Setting that opts in, and then needs a GPU; "" for a package that is used wherever it is installed."""
    check: Callable[[torch.device], None] | None = None
    """ValueError if it does not work on a device."""


def _has(*names: str) -> Callable[[ModuleType], str]:
    """The first of these names that the module has."""
    return lambda module: next((f"has {name}" for name in names if hasattr(module, name)), "of an unknown interface")


def _vendor_module(library: Library) -> Module:
    """A vendor library, tried on a device with its adaptor."""
    why = library.not_invariant

    def lacks(module: ModuleType) -> str:
        missing = library.missing_functions(module)
        return f"lacks {', '.join(missing)}" if missing else ""

    return Module(
        library.module,
        library.purpose,
        lacks,
        f"vendor_kernels {library.module}" + (f" and invariance relaxed, because {why}" if why else ""),
        lambda device: check_vendors([library.module], device),
    )


MODULES = (
    Module("triton", "kernels on GPUs"),
    Module("ray", "more than one worker"),
    Module("nixl_cu13", "KV cache from one replica to another on a node"),
    Module("deep_ep", "exchange of tokens between GPUs", _has(*INTERFACES), "all2all_backend deepep"),
    *(_vendor_module(library) for library in LIBRARIES.values()),
)


def doctor(*, output: Path | None, stdout: TextIO) -> int:
    """Print a table of findings and write it to `output`; 1 if something that would be used is broken."""
    prepare_report(output)
    device = torch.device("cuda") if torch.cuda.is_available() else None
    findings = [_compiler(), *_devices(), *(look_at(module, device) for module in MODULES)]
    _print_table(findings, stdout)
    write_report(output, {"environment": environment(), "findings": [asdict(finding) for finding in findings]})
    return ExitCode.DIFFERENT if any(finding.verdict == "broken" for finding in findings) else ExitCode.OK


def look_at(module: Module, device: torch.device | None) -> Finding:
    """Import a package if it is installed, find its distribution, and try it on `device`, a GPU or None."""
    wanted_by = f", with {module.setting}" if module.setting else ""
    if find_spec(module.name) is None:
        return Finding(module.name, "", "missing", f"not installed; it is for {module.purpose}{wanted_by}")
    owner = distribution_of(module.name)
    try:
        generation = module.generation(importlib.import_module(module.name))
    except Exception as error:  # an import runs arbitrary code of the package; its error is the finding
        return Finding(module.name, owner, "not used" if module.setting else "broken", f"cannot be imported: {error}")
    found = f"{owner}, {generation}" if generation else owner
    if not module.setting:
        return Finding(module.name, found, "used", f"for {module.purpose}")
    try:
        if device is None:
            raise ValueError("there is no GPU here")
        if module.check is not None:
            module.check(device)
    except ValueError as error:
        return Finding(module.name, found, "not used", f"{error}; it would be for {module.purpose}{wanted_by}")
    return Finding(module.name, found, "available", f"for {module.purpose}{wanted_by}")


def distribution_of(module: str) -> str:
    """The distributions that own a module, with their versions; two that own the same one overwrite each other."""
    owners: Sequence[str] = sorted(set(metadata.packages_distributions().get(module, ())))
    versions = [f"{owner} {metadata.version(owner)}" for owner in owners]
    return " and ".join(versions) or "in no distribution"


def _compiler() -> Finding:
    try:
        compiler = find_compiler()
        build_library()
    except (ValueError, RuntimeError) as error:
        return Finding("C++ compiler", "", "broken", str(error))
    return Finding("C++ compiler", " ".join(compiler), "used", "compiles the kernels of device cpu")


def _devices() -> list[Finding]:
    """Findings for the CPU and every GPU, with the kernels that would run there."""
    capability = torch.backends.cpu.get_cpu_capability()
    findings = [Finding("device cpu", f"torch {torch.__version__}, {capability}", "used", "kernels cpu")]
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        return [*findings, Finding("device cuda", "", "missing", why)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"
        backend = choose_backend("auto", torch.device("cuda"))
        fp8 = "FP8 in tensor cores" if (properties.major, properties.minor) >= (8, 9) else "FP8 decoded in registers"
        if properties.major < 8:
            findings.append(Finding(f"device cuda:{index}", found, "not used", "the kernels need sm_80 or newer"))
        else:
            findings.append(Finding(f"device cuda:{index}", found, "used", f"kernels {backend}, {fp8}, CUDA graphs"))
    return findings


def _print_table(findings: Sequence[Finding], stdout: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"used": "green", "available": "cyan", "not used": "yellow", "missing": "dim", "broken": "red"}
    table = Table()
    for column in ("", "found", "verdict", "why"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        verdict = Text(finding.verdict, style=colours[finding.verdict])
        table.add_row(Text(finding.name), Text(finding.found), verdict, Text(finding.why))
    Console(file=stdout, width=None if stdout.isatty() else 140).print(table)
