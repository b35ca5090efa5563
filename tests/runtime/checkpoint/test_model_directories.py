"""Incomplete, damaged and mixed model directories: read if nothing needed is missing, else refused with what to do."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.checkpoint.file_kinds import describe_file
from shoal.runtime.models.families import read_config
from shoal.runtime.random_checkpoint import make_checkpoint, tensor_shapes
from shoal.runtime.tokenization.tokenizer import Tokenizer

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 5234139343\n"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of three shards with an index."""
    make_checkpoint(tmp_path / "model", num_shards=3)
    return tmp_path / "model"


def shapes(model: Path) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(read_config(model))


def load(model: Path) -> list[str]:
    """Check and read every tensor of the model, as an engine does; returns the notices."""
    expected = shapes(model)
    with Checkpoint(model) as checkpoint:
        checkpoint.check_names(expected)
        for name, shape in expected.items():
            assert checkpoint.read(name).shape == shape
        return checkpoint.notices


def start(model: Path) -> None:
    Tokenizer.from_pretrained(model)
    load(model)


def refusal(model: Path) -> str:
    """The message with which an engine refuses a model directory."""
    with pytest.raises(ValueError, match=re.escape(str(model))) as error:
        start(model)
    return str(error.value)


def edit_index(model: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((model / INDEX).read_text())
    change(index["weight_map"])
    (model / INDEX).write_text(json.dumps(index))


# -- files that are something else -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "is a Git LFS pointer to a file of 5234139343 bytes: run `git lfs pull` in "),
        (b"\xef\xbb\xbf" + LFS_POINTER.replace(b"\n", b"\r\n"), "is a Git LFS pointer to a file of 5234139343 bytes"),
        (b"", "is empty: its download did not finish; download it again"),
        (bytes(5000), "begins with zeros: its download did not finish; download it again"),
        (b"/annex/objects/SHA256E-s52--4d7a.safetensors\n", "is a git-annex pointer: run `git annex get`"),
        (b"\n<!DOCTYPE html><html>Log in</html>", "is a web page that a server sent instead of the file"),
        (b"Entry not found", "holds only the text 'Entry not found'; download it again"),
        (b"PK\x03\x04" + bytes(range(200)), "is a zip archive, as pickled PyTorch weights are; convert"),
        (b"GGUF\x03\x00\x00\x00" + bytes(50), "is a GGUF file of llama.cpp; use the model's safetensors files"),
        (b"\x1f\x8b\x08\x00" + bytes(range(99)), "is compressed with gzip; decompress it"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, "model.safetensors"])
def test_a_file_that_is_something_else_is_named_as_that(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} {message}" in refusal(tmp_path)


def test_a_file_as_it_should_be_is_not_described(model: Path) -> None:
    assert [describe_file(path) for path in model.iterdir()] == [None] * 7


def test_a_byte_order_mark_is_skipped(model: Path) -> None:
    for name in ("config.json", INDEX):
        (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())
    assert load(model) == []


def test_a_link_that_leads_nowhere_is_named(model: Path) -> None:
    (model / SHARDS[1]).unlink()
    (model / SHARDS[1]).symlink_to(Path("..") / "blobs" / "4d7a")
    expected = f"{SHARDS[1]} is a link to {Path('..') / 'blobs' / '4d7a'}, which does not exist; download it again"
    assert expected in refusal(model)


# -- shards and their index --------------------------------------------------------------------------------------------


def test_an_index_and_its_shards_need_no_notice(model: Path) -> None:
    assert load(model) == []


@pytest.mark.parametrize(
    "names",
    [
        SHARDS,
        ["model-1-of-3.safetensors", "model-2-of-3.safetensors", "model-3-of-3.safetensors"],
        ["model-00001-of-000003.safetensors", "model-00002-of-000003.safetensors", "model-00003-of-000003.safetensors"],
        ["MODEL-00001-OF-00003.SAFETENSORS", "model-00002-of-00003.safetensors", "Model-00003-of-00003.safetensors"],
        ["layers-0.safetensors", "layers-1.safetensors", "rest.safetensors"],
    ],
)
def test_shards_without_an_index_are_read(model: Path, names: list[str]) -> None:
    (model / INDEX).unlink()
    for old, new in zip(SHARDS, names, strict=True):
        (model / old).rename(model / new)
    (notice,) = load(model)
    assert f"{INDEX} is missing: " in notice
    assert all(name in notice for name in names)


def test_names_in_another_case_are_found(model: Path) -> None:
    for path in list(model.iterdir()):
        path.rename(model / path.name.upper())
    (model / "TOKENIZER.JSON").rename(model / "tokenizer.json")
    assert load(model) == []
    with Checkpoint(model) as checkpoint:
        assert len(checkpoint.compute_fingerprint()) == 64


def test_a_single_file_with_another_name_is_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bf16.safetensors")
    assert load(tmp_path) == []


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_named(model: Path, has_index: bool) -> None:
    if not has_index:
        (model / INDEX).unlink()
    (model / SHARDS[1]).unlink()
    message = refusal(model)
    assert re.search(rf"lacks \d+ of \d+ tensors of the model: .*{SHARDS[1]} does not exist", message)
    assert "download it" in message
    (model / f"{SHARDS[1]}.incomplete").touch()
    assert f"does not exist (the download of {SHARDS[1]}.incomplete did not finish)" in refusal(model)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_shard_that_the_model_does_not_need_may_be_missing(model: Path, has_index: bool) -> None:
    """As when the layer for multi-token prediction is left out, or a tower for images."""
    (model / SHARDS[0]).rename(model / "model-00001-of-00004.safetensors")
    (model / SHARDS[1]).rename(model / "model-00002-of-00004.safetensors")
    (model / SHARDS[2]).rename(model / "model-00003-of-00004.safetensors")

    def change(places: dict[str, str]) -> None:
        places |= {name: file.replace("00003.s", "00004.s") for name, file in places.items()}
        places["vision.weight"] = "model-00004-of-00004.safetensors"

    edit_index(model, change)
    if not has_index:
        (model / INDEX).unlink()
    notices = load(model)
    assert "model-00004-of-00004.safetensors does not exist" in notices[0]


def test_a_damaged_shard_is_refused_only_if_it_is_needed(model: Path) -> None:
    save_file({"vision.weight": torch.zeros(2)}, model / "vision.safetensors")
    edit_index(model, lambda places: places.update({"vision.weight": "vision.safetensors"}))
    assert load(model) == []
    (model / "vision.safetensors").write_bytes(LFS_POINTER)
    (notice,) = load(model)
    assert "vision.safetensors is a Git LFS pointer" in notice
    content = (model / SHARDS[0]).read_bytes()
    (model / SHARDS[0]).write_bytes(content[:-1])
    assert f"{SHARDS[0]} is cut short: " in refusal(model)


def test_shards_of_two_checkpoints_are_refused(model: Path) -> None:
    (model / SHARDS[0]).write_bytes((model / SHARDS[1]).read_bytes())
    message = refusal(model)
    assert re.search(
        rf"{SHARDS[0]} does not hold model.embed_tokens.weight, as {INDEX} says; are files of two", message
    )
    (model / INDEX).unlink()
    assert f" in {SHARDS[0]} and in {SHARDS[1]}: remove those that do not belong there" in refusal(model)


def test_an_index_with_too_few_entries_does_not_matter(model: Path) -> None:
    def change(places: dict[str, str]) -> None:
        for name in [name for name, file in places.items() if file == SHARDS[1]]:
            del places[name]
        for name in [name for name, file in places.items() if file == SHARDS[0]][3:]:
            del places[name]

    edit_index(model, change)
    assert load(model) == []


def test_an_index_that_names_other_files_than_hold_the_tensors_is_corrected(model: Path) -> None:
    turned = dict(zip(SHARDS, [*SHARDS[1:], SHARDS[0]], strict=True))
    edit_index(model, lambda places: places.update({name: turned[file] for name, file in places.items()}))
    (notice,) = load(model)
    assert re.search(rf"\d+ tensors are not in the files that {INDEX} says, such as ", notice)


def test_an_index_of_other_files_is_not_used(model: Path) -> None:
    edit_index(model, lambda places: places.update({n: f.replace("00003", "00163") for n, f in places.items()}))
    (notice,) = load(model)
    assert f"{INDEX} lists model-00001-of-00163.safetensors, " in notice
    (model / SHARDS[2]).unlink()
    message = refusal(model)
    assert f"{SHARDS[2]} does not exist" in message
    assert "00163" in message


def test_an_index_without_any_of_its_files_is_refused(model: Path) -> None:
    for shard in SHARDS:
        (model / shard).unlink()
    assert f"{SHARDS[0]} does not exist; {INDEX} says it holds model.embed_tokens.weight: download it" in refusal(model)


def test_a_single_file_beside_an_index(model: Path) -> None:
    """The index decides as long as any of its files are there, else the single file is read."""
    make_checkpoint(model.parent / "single")
    (model.parent / "single" / "model.safetensors").rename(model / "model.safetensors")
    (notice,) = load(model)
    assert notice == f"not read beside {SHARDS[0]}: model.safetensors"
    (model / SHARDS[0]).unlink()
    assert "not read beside" in refusal(model)
    for shard in SHARDS[1:]:
        (model / shard).unlink()
    (notice,) = load(model)
    assert f"{INDEX} lists {', '.join(SHARDS)}, not there, and is not used" in notice


def test_weights_twice_in_two_forms(model: Path) -> None:
    """Consolidated files and adapters beside shards are not read; between two complete sets the user decides."""
    save_file({"tok_embeddings.weight": torch.zeros(2)}, model / "consolidated.safetensors")
    save_file({"lora_A.weight": torch.zeros(2)}, model / "adapter_model.safetensors")
    (notice,) = load(model)
    assert "not read" in notice
    (model / INDEX).unlink()
    assert any("adapter_model.safetensors, consolidated.safetensors" in notice for notice in load(model))
    save_file({"model.norm.weight": torch.zeros(96)}, model / "model-00001-of-00002.safetensors")
    assert load(model)  # of that set one is missing
    save_file({"lm_head.weight": torch.zeros(2)}, model / "model-00002-of-00002.safetensors")
    assert "several sets of shards, model-00001-of-00002.safetensors, model-00001-of-00003" in refusal(model)


def test_a_number_of_shards_that_no_model_has_is_a_name_like_others(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1-of-999999999999.safetensors")
    assert load(tmp_path) == []


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", "c:x", "a\\b", "a\0", 3, None]
)
def test_index_names_files_of_its_directory_only(tmp_path: Path, file: object) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ValueError, match="plain names in the same directory"):
        Checkpoint(model_dir)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_broken_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index.json (is not valid JSON|has no weight_map)"):
        Checkpoint(tmp_path)


# -- directories that are something else -------------------------------------------------------------------------------


def test_what_was_given_instead_of_a_model_directory(model: Path) -> None:
    message = "give the directory that holds config.json and the *.safetensors files"
    cache = model.parent / "models--deepseek-ai--DeepSeek-V3"
    (cache / "snapshots").mkdir(parents=True)
    snapshot = model.rename(cache / "snapshots" / "4d7a")
    assert refusal(cache).endswith(f"{message}; {cache} is a folder of the Hugging Face cache: give {snapshot}")
    file = snapshot / "config.json"
    assert refusal(file).endswith(f"; {file} is a file: give the directory that holds it")
    assert refusal(snapshot.parent).endswith(f"; did you mean {snapshot}?")
    assert refusal(cache / "absent").endswith(f"; {cache / 'absent'} does not exist")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors.incomplete", "the download of model.safetensors.incomplete did not finish"),
        (".cache/huggingface/download/x.4d7a.incomplete", "the download of x.4d7a.incomplete did not finish"),
        ("model-00001-of-00002.safetensors.aria2", "did not finish: download the model again"),
        ("pytorch_model.bin", "pytorch_model.bin can hold code and is not read: convert the weights to safetensors"),
        ("model-Q4_K_M.gguf", "model-Q4_K_M.gguf is for llama.cpp: use the safetensors files"),
        ("README.md", "is it a model directory?"),
    ],
)
def test_a_directory_without_weights(tmp_path: Path, name: str, message: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x" * 100)
    assert message in refusal(tmp_path)


def test_shards_of_the_demonstration_code_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "model0-mp8.safetensors")
    assert "which DeepSeek's convert.py wrote for its own code" in refusal(tmp_path)


def test_tensors_with_other_names_are_shown(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"language_model.{name}": t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    assert "it has others that the model has not: language_model.lm_head.weight, " in refusal(tmp_path)


# -- quantisations -----------------------------------------------------------------------------------------------------

ADVICE = "use the model's original checkpoint, in bfloat16 or in FP8 with scales per block of 128 x 128"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "with GPTQ (quantization_config: 'gptq')"),
        ({"quantization_config": {"quant_method": "awq"}}, "with AWQ (quantization_config: 'awq')"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "with bitsandbytes ("),
        ({"quantization_config": {"producer": {"name": "modelopt"}, "quant_algo": "NVFP4"}}, "with NVIDIA ModelOpt ("),
        ({"quantization_config": {"quant_method": "new"}}, "quantised (quantization_config: 'new')"),
        ({"compression_config": {"format": "int-quantized"}}, "(compression_config: 'compressed-tensors')"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "(quantization: 'MLX, 4 bits')"),
    ],
)
def test_a_quantisation_that_config_json_names(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    refused = refusal(tmp_path)
    assert message in refused
    assert ADVICE in refused


PROJECTION = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        ({".qweight": torch.zeros(8, 8).int(), ".qzeros": torch.zeros(1).int()}, "quantised as GPTQ or AWQ"),
        (
            {".weight": torch.zeros(4, 4).to(torch.uint8), ".weight_scale_2": torch.ones(1)},
            f"{PROJECTION}.weight_scale_2 belongs to weights quantised as NVIDIA ModelOpt NVFP4",
        ),
        ({".weight": torch.zeros(160 * 48, 1).to(torch.uint8), ".weight.absmax": torch.zeros(1)}, "as bitsandbytes"),
        ({".weight": torch.zeros(160, 12).to(torch.uint32), ".scales": torch.ones(1), ".biases": torch.ones(1)}, "MLX"),
        (
            {".weight": torch.zeros(160, 96).to(torch.float8_e4m3fn), ".weight_scale": torch.ones(160, 1)},
            "quantised as compressed-tensors, ModelOpt or FBGEMM",
        ),
        ({".weight": torch.zeros(160, 96).to(torch.int8), ".SCB": torch.ones(160)}, "quantised as bitsandbytes"),
    ],
)
def test_a_quantisation_that_only_the_tensors_show(
    tmp_path: Path, replacement: dict[str, torch.Tensor], message: str
) -> None:
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{PROJECTION}.weight"]
    tensors |= {PROJECTION + suffix: tensor for suffix, tensor in replacement.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    refused = refusal(tmp_path)
    assert message in refused
    assert ADVICE in refused


def test_tensors_in_dtypes_of_less_than_a_byte_matter_only_if_they_are_needed(tmp_path: Path) -> None:
    raw = json.dumps(
        {
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "packed": {"dtype": "F4", "shape": [2, 4], "data_offsets": [4, 8]},
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.check_names({"w": (1,)}) == []
    assert checkpoint.notices == ["1 tensors have dtypes that are not supported, such as packed (F4)"]
    with pytest.raises(
        ValueError, match=r"lacks 1 of 1 tensors of the model: packed; .* not supported, such as packed .F4.$"
    ):
        checkpoint.check_names({"packed": (2, 4)})
