"""Structured outputs over the tokenizer of single bytes: byte b is token 3 + b, token 1 ends an answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoal.runtime.structured.constraint import GrammarConstraint
from shoal.runtime.structured.structured_outputs import StructuredOutputs
from shoal.runtime.structured.token_mask import contains, to_bools
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Request, SamplingParams

VOCAB = 300
"""More than the tokenizer's 272."""
EOS, FIRST_BYTE = 1, 3


def byte_tokenizer(directory: Path) -> Tokenizer:
    write_byte_tokenizer(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(directory)
    assert tokenizer is not None
    return tokenizer


def constraint(
    structured: StructuredOutputs, form: Mapping[str, Any], *, reasoning_end: int | None = None, **params: Any
) -> GrammarConstraint:
    """The constraint of the first sample of a request."""
    return constraints(structured, form, reasoning_end=reasoning_end, **params)[0]


def constraints(
    structured: StructuredOutputs, form: Mapping[str, Any], *, reasoning_end: int | None = None, **params: Any
) -> list[GrammarConstraint]:
    asked = SamplingParams.from_dict({"structured_outputs": form, **params})
    request = Request(request_id="r", prompt_token_ids=(5,), params=asked, reasoning_end_token_id=reasoning_end)
    return structured.constraints(request)


def tokens(text: str) -> list[int]:
    return [FIRST_BYTE + b for b in text.encode()]


def allows(one: GrammarConstraint, output: list[int]) -> set[int]:
    return set(np.flatnonzero(to_bools(one.mask(output), VOCAB)).tolist())


def accepts(structured: StructuredOutputs, form: Mapping[str, Any], text: str) -> bool:
    """Whether a text is an answer of a form: each of its tokens is allowed, and then the end."""
    one = constraint(structured, form)
    output: list[int] = []
    for token in [*tokens(text), EOS]:
        if not contains(one.mask(output), token):
            return False
        output.append(token)
    return True
