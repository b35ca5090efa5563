"""Names of the quantisations that are not supported, so that an error can say which one a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .compressed_tensors import METHOD

_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "FBGEMM FP8",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "NVIDIA ModelOpt",
    "modelopt_fp4": "NVIDIA ModelOpt NVFP4",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "torchao": "torchao",
}
_READ_METHODS = ("fp8", METHOD)
"""Methods some forms of which are supported; their fields are checked where they are read."""
_FIELDS = ("quantization_config", "compression_config", "quantization")
"""Fields of config.json: of transformers, of older compressed-tensors, of MLX."""
_SUFFIXES = {
    ".weight_scale_2": "NVIDIA ModelOpt NVFP4",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qscale_weight": "Mistral's FP8 with one scale per tensor",
    ".biases": "MLX",
    ".trellis": "ExLlamaV3",
    ".q_scale": "ExLlamaV2",
    "_blocks": "MXFP4",
    ".weight_scale": "compressed-tensors, ModelOpt or FBGEMM",
}
"""Suffixes of tensor names that tell a quantisation, the most specific first."""
_ADVICE = (
    "use the model's original checkpoint, in bfloat16 or in FP8 with scales per block of 128 x 128 "
    "(quant_method fp8, weight_block_size [128, 128]), or in int4 of compressed-tensors (format pack-quantized)"
)


def check_quantization(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that names another quantisation than fp8 and compressed-tensors.

    ValueError with its name and what to do.
    """
    for field in _FIELDS:
        values = config.get(field)
        if not isinstance(values, Mapping) or values.get("quant_method") in _READ_METHODS:
            continue
        method = _method(field, values)
        known = f"with {_METHODS[method]} " if method in _METHODS else ""
        raise ValueError(f"the weights are quantised {known}({field}: {method!r}), which is not supported: {_ADVICE}")


def find_quantization(names: Iterable[str]) -> str:
    """Describe the quantisation that tensor names show, as a last clause of an error; empty if they show none."""
    names = list(names)
    for suffix, kind in _SUFFIXES.items():
        if example := next((name for name in names if name.endswith(suffix)), None):
            return f"; {example} belongs to weights quantised as {kind}, which is not supported: {_ADVICE}"
    return ""


def _method(field: str, values: Mapping[str, Any]) -> object:
    if field == "quantization" and "bits" in values:
        return f"MLX, {values['bits']} bits"
    producer = values.get("producer")
    named_by = producer.get("name") if isinstance(producer, Mapping) else None
    default = "compressed-tensors" if field == "compression_config" else named_by
    return values.get("quant_method", default)
