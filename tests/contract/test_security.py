"""Rules of docs/security.md that hold for the whole source, for model directories and for what is written."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import save_file

from shoal.cluster.commands.batch import job_spec
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.jobs.config import JobConfig
from shoal.cluster.jobs.job import run_job
from shoal.cluster.jobs.stop_signal import StopSignal
from shoal.cluster.openai.chat_options import ChatOptions
from shoal.cluster.prompts import ModelPrompts
from shoal.cluster.replicas.inprocess import InProcessEngine
from shoal.cluster.workers.actors import LaunchConfig
from shoal.cluster.workers.spec import WorkerSpec
from shoal.cluster.workers.worker import Worker
from shoal.kernels import build
from shoal.parallel.config import ParallelConfig
from shoal.parallel.groups import create_groups
from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Request, RequestOutput, SamplingParams
from tests.support.stub_job import StubEngines, make_spec

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "security.md"
PRODUCT = ("shoal", "cluster", "runtime", "parallel", "kernels")

NEVER_NAMED = (
    # objects that are code
    "pickle cPickle _pickle cloudpickle dill marshal shelve joblib jsonpickle copyreg "
    "multiprocessing.connection multiprocessing.managers torch.multiprocessing torch.package torch.hub "
    "ray.cloudpickle nixl_cu13._api nixl._api "
    # templates
    "jinja2 mako "
    # other machines
    "urllib.request urllib.error urllib.robotparser urllib3 http requests httpx aiohttp ftplib smtplib xmlrpc "
    "socketserver wsgiref asyncore websockets "
    "huggingface_hub modelscope s3fs gcsfs boto3 botocore smart_open pycurl zmq"
)
"""Modules and what is in them."""
NEVER_USED = (
    "eval exec compile __import__ breakpoint os.system os.popen "
    "torch.load torch.save torch.jit.load torch.export.load torch.ops.load_library torch.classes.load_library "
    "numpy.load numpy.save numpy.savez numpy.memmap ctypes.pythonapi "
    "yaml.unsafe_load yaml.full_load yaml.load_all yaml.Loader yaml.UnsafeLoader yaml.FullLoader"
)
NEVER_CALLED = (
    "recv_pyobj send_pyobj broadcast_object_list all_gather_object scatter_object_list gather_object "
    "send_object_list recv_object_list get_serialized_descs deserialize_descs"
)
"""Methods, whatever they belong to."""
NEVER_PASSED = ("allow_pickle", "weights_only", "trust_remote_code", "shell")
ONLY_IN = {
    "subprocess": [
        "cluster/jobs/check_pool.py",
        "kernels/build.py",
        "parallel/trial_run.py",
    ],  # this Python, and a compiler
    "multiprocessing": ["cluster/commands/demo.py"],  # a child that is killed
    "importlib.import_module": [  # of names that are written there or are ours
        "cluster/commands/doctor.py",
        "cluster/workers/engine_factory.py",
        "kernels/optional.py",
        "kernels/registry.py",
        "shoal/__init__.py",
    ],
    "ctypes.CDLL": [
        "kernels/build.py",  # what was compiled from the package's own source
        "runtime/memory.py",  # the C library that is there already
    ],
    "fsspec": ["cluster/jobs/input/object_stores.py"],  # for inputs that the user names by their URL
    "pyarrow.fs": ["cluster/jobs/input/object_stores.py"],
    "yaml.load": ["cluster/jobs/job_file.py"],  # with a subclass of SafeLoader
}


def sources() -> list[Path]:
    return sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))


def problems(path: Path, source: str) -> Iterator[str]:
    """What a product file must not contain, with the names that an import gave it resolved."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _named(path, node, alias.name, imported=True)
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield from _named(path, node, f"{node.module}.{alias.name}", imported=True)
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield from _named(path, node, _dotted(node, names))
        elif isinstance(node, ast.keyword) and node.arg in NEVER_PASSED:
            yield f"{path}:{node.value.lineno}: {node.arg}="


def _named(path: Path, node: ast.stmt | ast.expr, name: str, *, imported: bool = False) -> Iterator[str]:
    """What is wrong with naming this."""
    parts = name.split(".")
    prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
    only = {name: files for name, files in ONLY_IN.items() if name in prefixes and not (imported and "." in name)}
    if (
        prefixes & set(NEVER_NAMED.split())
        or name in NEVER_USED.split()
        or parts[-1] in NEVER_CALLED.split()
        or any(str(path) not in files for files in only.values())
    ):
        yield f"{path}:{node.lineno}: {name}"


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`t.load` as torch.load after `import torch as t`; "?" is what is neither imported nor built in."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id if hasattr(builtins, node.id) else "?")
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return "?"


def test_no_product_file_unpickles_runs_code_or_fetches() -> None:
    files = sources()
    assert len(files) > 80
    assert [p for file in files for p in problems(file.relative_to(ROOT), file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "import multiprocessing.connection",
        "from multiprocessing import connection",
        "from torch import multiprocessing",
        "import multiprocessing",
        "import shelve",
        "import marshal",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "from torch import load as read\nread('x')",
        "import torch.serialization as s\ns.load('x', weights_only=False)",
        "import torch\nload = torch.load",
        "import numpy as np\nnp.load('x')",
        "from numpy.lib.npyio import load\nload('x', allow_pickle=True)",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "from torch.distributed import broadcast_object_list",
        "socket().recv_pyobj()",
        "agent.nixl.deserialize_descs(b'')",
        "import nixl_cu13._api",
        "from nixl_cu13 import _api",
        "import jinja2",
        "import urllib.request",
        "from http.client import HTTPConnection",
        "from huggingface_hub import snapshot_download",
        "import torch\ntorch.hub.load('a', 'b')",
        "eval('1')",
        "exec('1')",
        "__import__('x')",
        "import os\nos.system('x')",
        "import subprocess",
        "f(shell=True)",
        "import importlib\nimportlib.import_module('x')",
        "from importlib import import_module\nimport_module('x')",
        "import ctypes\nctypes.CDLL('x')",
        "import yaml\nyaml.load('x', Loader=yaml.SafeLoader)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(problems(Path("runtime/x.py"), source))


def leaves(hint: object) -> set[object]:
    """The types that an annotation is made of, without the lists and tuples around them."""
    return {leaf for part in get_args(hint) for leaf in leaves(part)} or {hint}


def test_what_goes_through_ray_while_rows_are_answered_is_bytes_and_numbers() -> None:
    for name in ("send", "poll", "stop"):
        for hint in get_type_hints(getattr(Worker, name)).values():
            assert leaves(hint) <= {bytes, int, float, type(None)}, name
    assert get_type_hints(Worker.send)["messages"] == list[bytes]
    chunk = get_type_hints(Worker.read_chunk)
    assert chunk == {"generation": int, "return": NDArray[np.uint8] | None}


def test_keys_are_not_shown() -> None:
    key = "0123456789abcdef"
    assert key not in repr(LaunchConfig(EngineArgs(model="m"), "", 1, 0, supervisor_key=key))
    required = {
        f.name: None
        for f in dataclasses.fields(WorkerSpec)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    assert key not in repr(WorkerSpec(**required, supervisor_key=key))  # type: ignore[arg-type]
    groups = create_groups(ParallelConfig(tensor_parallel_size=2), 0, secret=key.encode())
    assert key not in repr(groups)


def test_the_run_file_says_nothing_of_the_environment(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    (tmp_path / "in.jsonl").touch()
    engine = EngineArgs(model=str(model))
    spec = job_spec(JobConfig(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"), engine=engine))
    written = json.dumps([spec.identity, spec.facts])
    assert spec.facts["model_name"] in written
    assert os.environ["RAY_AUTH_TOKEN"] not in written


# -- model directories -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "deepseek_v3", seed=4, overrides={"vocab_size": 272})
    write_byte_tokenizer(directory / "tokenizer.json")
    return directory


def answers(model: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_pretrained(model)
    assert tokenizer is not None
    prompts = ModelPrompts(tokenizer, CHAT_FORMATS["deepseek_v31"])
    encoded = [
        prompts.encode_text("a prompt").token_ids,
        prompts.encode_chat(
            [{"role": "user", "content": "{{ 7 * 7 }}{% for x in y %}"}], ChatOptions(thinking=False)
        ).token_ids,
    ]
    engine = InProcessEngine(EngineArgs(model=str(model), num_kv_blocks=16, block_size=16, max_model_len=128))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    engine.submit(
        [Request(request_id=str(i), prompt_token_ids=tuple(ids), params=params) for i, ids in enumerate(encoded)]
    )
    found: dict[str, list[int]] = {}
    while engine.num_in_flight:
        outputs = [o for o in engine.poll(10.0) if isinstance(o, RequestOutput)]
        found |= {o.request_id: [*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs}
    engine.close()
    return [found["0"], found["1"]]


def copy_of(model: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in model.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def test_code_and_templates_of_a_model_directory_are_ignored(tmp_path: Path, model: Path) -> None:
    hostile, trap = copy_of(model, tmp_path / "hostile"), tmp_path / "trap"
    code = f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "setup.py", "__init__.py", "conftest.py"):
        (hostile / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps({**config, "auto_map": auto_map, "trust_remote_code": True}))
    (hostile / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "auto_map": {"AutoTokenizer": ["tokenization_x.Tokenizer", None]},
                "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in y %}x{% endfor %}",
            }
        )
    )
    (hostile / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('true') }}")
    (hostile / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert answers(hostile) == answers(model)
    assert not trap.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.pth", "x.ckpt"]
)
def test_weights_that_can_hold_code_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b"}}')
    with pytest.raises(ValueError, match=f"{name} can hold code and is not read: convert the weights to safetensors"):
        Checkpoint(tmp_path)


def test_links_out_of_the_directory_are_followed_as_in_the_cache_of_hugging_face(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    values = make_checkpoint(copy := tmp_path / "plain", num_shards=2)
    assert values
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(copy.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    with Checkpoint(snapshot) as checkpoint:
        assert checkpoint.read("model.norm.weight").shape == checkpoint.shape("model.norm.weight")


def test_weights_are_held_against_the_configuration_before_any_is_read(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = copy_of(model, tmp_path / "changed")
    with Checkpoint(model) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].repeat(2)
    save_file(tensors, changed / "model.safetensors")

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(ValueError, match=r"do not have the shape that config\.json asks for: model\.norm\.weight"):
        InProcessEngine(EngineArgs(model=str(changed), num_kv_blocks=16, max_model_len=128))


# -- what is written ---------------------------------------------------------------------------------------------------

HOSTILE_IDS = [
    "../../escaped",
    "/tmp/escaped",
    "..",
    "a/b",
    "a\\b",
    "CON",
    "-rf",
    "\n",
    "\r\n{}",
    "x" * 512,
    "$(id)",
    "é\u202e",
]
JOB_FILES = {"run.json", "part-00000.jsonl", "errors.jsonl", "journal.log", "digests.bin", "job.lock"}


class Silent:
    def message(self, text: str) -> None:
        pass

    def update(self, *_: object, **__: object) -> None:
        pass


def test_labels_of_rows_are_no_paths_and_nobody_else_may_write(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "deep" / "out"
    rows = [{"custom_id": label, "prompt": "x", "max_tokens": 2} for label in HOSTILE_IDS]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"custom_id": "../bad", "prompt": ""}]))
    before = os.umask(0)
    try:
        with StopSignal() as stop:
            result = run_job(make_spec(source, output), StubEngines, stop=stop, progress=Silent())  # type: ignore[arg-type]
    finally:
        os.umask(before)
    assert (result.completed, result.failed) == (len(rows), 1)
    assert {path.name for path in output.iterdir()} == JOB_FILES
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == {
        Path("in.jsonl"),
        *(Path("deep", "out", name) for name in JOB_FILES),
    }
    answered = [json.loads(line) for line in (output / "part-00000.jsonl").read_bytes().split(b"\n")[:-1]]
    assert sorted(row["custom_id"] for row in answered) == sorted(HOSTILE_IDS)
    for path in [output, *output.iterdir()]:
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


def test_compiled_kernels_lie_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.cpp").write_text('extern "C" void nothing() {}')
    before = os.umask(0)
    try:
        library = build.build_library(tmp_path / "source")
    finally:
        os.umask(before)
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert not library.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


# -- the document ------------------------------------------------------------------------------------------------------


def test_the_document_names_tests_that_exist() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    assert text.count("::") == len(named), "a test that is not written as `tests/file.py::test_name`"
    for file, name in named:
        functions = {n.name for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"
    rules = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| rule")]
    assert all("`tests/" in rule for rule in rules), "a rule without a test"
