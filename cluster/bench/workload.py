"""The requests of `shoal bench throughput`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated

from shoal.parallel.settings import Setting, check_settings

FIRST_TOKEN_ID = 3
"""Lowest token id of a prompt; those below are sentence marks in most vocabularies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Random prompts of one length, each answered with exactly `output_len` tokens, `runs` times."""

    num_prompts: Annotated[int, Setting("Requests of a run.", ge=1)] = 64
    input_len: Annotated[int, Setting("Tokens of a prompt.", ge=1)] = 256
    output_len: Annotated[int, Setting("Tokens of an answer.", ge=1)] = 64
    runs: Annotated[int, Setting("Measured runs after the warm-up.", ge=1)] = 3
    seed: Annotated[int, Setting("Seed of the prompts, and of the engine.")] = 0

    def __post_init__(self) -> None:
        check_settings(self)

    def prompts(self, vocab_size: int, name: str) -> list[list[int]]:
        """Other token ids for every run, so that no prefix cache can help between them; the same for equal seeds."""
        draw = random.Random(f"{self.seed}/{name}")
        ids = range(FIRST_TOKEN_ID, vocab_size)
        return [draw.choices(ids, k=self.input_len) for _ in range(self.num_prompts)]
