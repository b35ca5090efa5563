"""Sampling defaults of a model's generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tokenization.tokenizer import read_json
from .types import SamplingParams

# Name in generation_config.json -> field of SamplingParams. The same names as vLLM takes; `do_sample` is none of them.
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_sampling_defaults(model_dir: str | Path) -> dict[str, Any]:
    """Fields of SamplingParams that generation_config.json sets; empty without such a file. ValueError names the file.

    As in vLLM they stand in for what a request leaves out; a `SamplingParams` given from Python is complete.
    """
    path = Path(model_dir) / "generation_config.json"
    values = read_json(path) or {}
    given = {_FIELDS[name]: values[name] for name in _FIELDS if values.get(name) is not None}
    try:
        params = SamplingParams(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct it, or set generation_config to none") from error
    return {name: getattr(params, name) for name in given}


def sampling_notice(defaults: dict[str, Any]) -> str:
    """One sentence that says which defaults are used and how to turn them off."""
    values = ", ".join(f"{name} {value}" for name, value in defaults.items())
    return (
        f"generation_config.json of the model gives the sampling defaults {values}; "
        f"set generation_config to none to turn them off"
    )
