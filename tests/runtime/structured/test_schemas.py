"""A sample of the JSON-Schema-Test-Suite: a schema is refused with a reason, or its answers are valid.

schemas.jsonl has 200 schemas of draft 2020-12, drawn with a fixed seed from the copy of the suite in the source of
jsonschema 4.26 (`json/`, see schemas.LICENSE). A model with random weights writes eight answers for each.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from shoal.runtime.structured.constraint import GrammarConstraint
from shoal.runtime.structured.structured_outputs import StructuredOutputs
from shoal.runtime.structured.token_mask import to_bools
from shoal.runtime.tokenization.tokenizer import Tokenizer
from tests.support.structured import EOS, VOCAB, byte_tokenizer, constraints

SAMPLE = Path(__file__).with_name("schemas.jsonl")
FORMATS = jsonschema.FormatChecker(formats=["date", "ipv4", "ipv6", "uuid"])
"""Those that jsonschema checks by itself."""
MAX_TOKENS = 150
NUM_ANSWERS = 8

REASONS = {
    "keywords": r"Unimplemented keys: \[",
    "format": r"Unknown format: ",
    "remote $ref": r"Resource '.*' is not present",
    "no value": r"Unsatisfiable schema: ",
    "oneOf": r"oneOf is supported only where no value fits two",
    "2.0 for 2": r"Expected positive integer for '",
    "patternProperties that overlap": r"patternProperty regexes .* are not disjoint",
    "range of numbers": r"Failed to generate regex for float range",
    "ECMAScript's expressions": r"regex parse error",
    "multipleOf": r"the values of multipleOf, without powers of 10, have the product",
}
REFUSED = {
    "keywords": 74,
    "remote $ref": 11,
    "format": 5,
    "no value": 4,
    "oneOf": 3,
    "2.0 for 2": 3,
    "patternProperties that overlap": 2,
    "range of numbers": 1,
    "ECMAScript's expressions": 1,
    "multipleOf": 1,
}
"""Number of schemas per reason, with llguidance 1.9."""


def schemas() -> list[dict[str, Any]]:
    return [json.loads(line)["schema"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def write(one: GrammarConstraint, rng: np.random.Generator) -> list[int] | None:
    """The tokens of an answer, without the end; None if it takes too many."""
    output: list[int] = []
    while len(output) < MAX_TOKENS:
        logits = rng.normal(size=VOCAB)
        logits[EOS] += 2.0
        logits[~to_bools(one.mask(output), VOCAB)] = -np.inf
        token = int(logits.argmax())
        if token == EOS:
            return output
        output.append(token)
    return None


def reason_of(message: str) -> str:
    assert message.startswith("structured_outputs.json: ")
    found = [name for name, reason in REASONS.items() if re.search(reason, message)]
    assert len(found) == 1, message
    return found[0]


def is_checkable(schema: dict[str, Any]) -> bool:
    """Whether Python has all its regular expressions."""
    return r"\p{" not in json.dumps(schema).replace("\\\\", "\\")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_schema_is_refused_by_name_or_kept(tokenizer: Tokenizer) -> None:
    structured = StructuredOutputs(tokenizer, VOCAB)
    refused: Counter[str] = Counter()
    finished: Counter[bool] = Counter()
    for number, schema in enumerate(schemas()):
        try:
            samples = constraints(structured, {"json": schema}, n=NUM_ANSWERS)
        except ValueError as error:
            refused[reason_of(str(error))] += 1
            continue
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        for i, one in enumerate(samples):
            output = write(one, np.random.default_rng([number, i]))
            finished[output is not None] += 1
            if output is not None:
                value = json.loads(tokenizer.decode(output))
                if is_checkable(schema):
                    validator.validate(value)
    assert dict(refused) == REFUSED
    assert finished[True] + finished[False] == NUM_ANSWERS * (200 - sum(REFUSED.values()))
    assert finished[True] > 650, "few are too long"
