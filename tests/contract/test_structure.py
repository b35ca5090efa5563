"""The layers import one way only, and every folder of the package is in the wheel."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.kernels.vendor import LIBRARIES

ROOT = Path(__file__).parents[2]
LAYERS = ["kernels", "parallel", "runtime", "cluster"]
ONLY_IN = {
    "triton": "kernels",
    "deep_ep": "parallel",
    "nixl": "parallel",
    "nixl_cu13": "parallel",
    "safetensors": "runtime",
    "tokenizers": "runtime",
    "xxhash": "runtime",
    "llguidance": "runtime",
    "ray": "cluster",
    "pyarrow": "cluster",
    "yaml": "cluster",
    "click": "cluster",
    "rich": "cluster",
    "starlette": "cluster",
    "uvicorn": "cluster",
} | dict.fromkeys(LIBRARIES, "kernels")
ROOMS = {
    "runtime": [
        "plain_numbers cgroup structured_params",
        "memory types checkpoint",
        "request_limits response tokenization",
        "structured",
        "scheduling sampling generation_config chat",
        "kv_cache",
        "models",
        "engine",
        "memory_estimate",
        "random_checkpoint",
    ],
    "cluster": [
        "exit_codes report bundled environment replica_spec",
        "openai engine_args",
        "prompts workers metrics",
        "routing supervision",
        "jobs",
        "replicas",
        "llm",
        "bench",
        "data server",
        "commands",
    ],
}
"""Folders and files of a layer from the lowest floor to the highest; a floor imports lower ones."""
NEVER = {"pickle", "cloudpickle", "transformers", "dill", "marshal"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import statement, wherever it stands; level counts leading dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from ((node.level, f"{base}.{alias.name}" if base else alias.name) for alias in node.names)


def problems(path: Path) -> list[str]:
    folder = path.relative_to(ROOT).parts[0]
    found = []
    for level, name in imports(path):
        if level > len(path.relative_to(ROOT).parts) - 1:
            found.append(f"{path.name}: relative import leaves {folder}/")
        if level:
            continue
        parts = name.split(".")
        if parts[0] in (*LAYERS, "tests", "benchmarks"):
            found.append(f"{path.name}: bare import of {name}; write shoal.{name}")
        if parts[0] == "shoal":
            allowed = LAYERS if folder == "shoal" else LAYERS[: LAYERS.index(folder) + 1]
            if len(parts) > 1 and parts[1] in LAYERS and parts[1] not in allowed:
                found.append(f"{path.name}: {folder} imports upward from {name}")
            if len(parts) > 1 and parts[1] not in LAYERS and folder != "cluster":
                found.append(f"{path.name}: {folder} imports the front door ({name})")
        if parts[0] in NEVER or (parts[0] in ONLY_IN and ONLY_IN[parts[0]] != folder):
            found.append(f"{path.name}: {parts[0]} may not be imported in {folder}/")
    return found


def sources() -> list[Path]:
    return sorted(p for folder in [*LAYERS, "shoal"] for p in (ROOT / folder).rglob("*.py"))


def test_imports_go_one_way() -> None:
    assert [problem for path in sources() for problem in problems(path)] == []


def room_of(dotted: list[str]) -> str:
    """The folder or file of a layer that a module `shoal.layer.room...` belongs to."""
    return dotted[2]


def room_problems(path: Path) -> list[str]:
    """Imports of a file that stay in its layer and do not go to a lower floor, or leave `ROOMS` incomplete."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    layer = parts[0]
    if layer not in ROOMS or len(parts) < 2 or parts[1] == "__init__":
        return []
    floors = {room: floor for floor, rooms in enumerate(ROOMS[layer]) for room in rooms.split()}
    own = room_of(["shoal", *parts])
    if own not in floors:
        return [f"{layer}/{own} has no floor in ROOMS"]
    found = []
    for level, name in imports(path):
        package = ["shoal", *parts[:-1]]
        target = package[: len(package) - level + 1] + name.split(".") if level else name.split(".")
        if target[:2] != ["shoal", layer] or len(target) < 3 or (room := room_of(target)) == own:
            continue
        if floors.get(room, len(floors)) >= floors[own] and (room in floors or (ROOT / layer / room).exists()):
            found.append(f"{'/'.join(parts)} imports {room}, which is not on a lower floor")
    return found


def test_folders_import_lower_floors_only() -> None:
    assert [problem for path in sources() for problem in room_problems(path)] == []


def test_the_floor_check_catches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    folder = tmp_path / "runtime" / "scheduling"
    folder.mkdir(parents=True)
    for line, wrong in [
        ("from ..engine.engine import Engine", True),
        ("from shoal.runtime.models import families", True),
        ("from ..sampling.sampler import Sampler", True),
        ("from ..types import Request", False),
        ("from .batch import Batch", False),
        ("from shoal.parallel.spans import Spans", False),
    ]:
        (folder / "bad.py").write_text(line)
        assert bool(room_problems(folder / "bad.py")) == wrong, line


@pytest.mark.parametrize(
    ("folder", "line", "complaint"),
    [
        ("kernels", "from shoal.parallel.groups import ParallelGroups", "upward"),
        ("runtime", "import shoal.cluster.commands.cli", "upward"),
        ("runtime", "import kernels.linear", "bare"),
        ("parallel", "def f():\n    import ray", "may not"),
        ("cluster", "import pickle", "may not"),
        ("runtime", "from ...x import y", "leaves"),
    ],
)
def test_the_import_check_catches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, line: str, complaint: str
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "bad.py").write_text(line)
    assert complaint in problems(tmp_path / folder / "bad.py")[0]


MODEL_FILES = ("attention.py", "moe.py", "deepseek.py")
NOT_IN_MODEL_FILES = ("ctypes", "data_ptr", "LocalTokenDispatcher", "AllToAllTokenDispatcher", "current_backend")


def test_model_files_show_the_model() -> None:
    """Addresses and the choice between implementations belong elsewhere: runtime/models/fused.py, model_loading.py."""
    for file in MODEL_FILES:
        tree = ast.parse((ROOT / "runtime" / "models" / file).read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {part for _, name in imports(ROOT / "runtime" / "models" / file) for part in name.split(".")}
        assert names.isdisjoint(NOT_IN_MODEL_FILES), file


def test_every_folder_is_in_the_wheel() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(["shoal", *path.parent.relative_to(ROOT).parts]) if path.parent.name != "shoal" else "shoal"
        for path in sources()
    }
    assert set(setup["packages"]) == folders
    for package in folders - {"shoal"}:
        path = ROOT.joinpath(*package.split(".")[1:])
        assert (path / "__init__.py").exists()
        data = {p.suffix for p in path.iterdir() if p.suffix in (".cpp", ".h", ".json", ".txt", ".yaml")}
        assert data <= {Path(g).suffix for g in setup["package-data"].get(package, [])}, f"{package} leaves files out"


def test_layer_packages_import_nothing() -> None:
    for layer in LAYERS:
        tree = ast.parse((ROOT / layer / "__init__.py").read_text())
        assert len(tree.body) == 1
        assert ast.get_docstring(tree)


def test_source_links_cover_the_package() -> None:
    links = {p.name: p.resolve() for p in (ROOT / ".src" / "shoal").iterdir()}
    assert all(p.exists() for p in links.values())
    assert {*LAYERS, "__init__.py", "__main__.py"} <= set(links)


def test_make_knows_its_targets() -> None:
    """Every phony target, whose commands are expanded and not run."""
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    targets = phony.split()[1:]
    assert {"demo", "test", "check", "gpu-check"} <= set(targets)
    run = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("gpu_check.py") == 1
