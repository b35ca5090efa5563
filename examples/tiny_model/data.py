"""Rows as token ids with a loss mask, and batches of them. Everything is a function of (seed, step, rank)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from tasks import TASKS, Row, document, is_held_out, lookup_question
from torch import Tensor

# The ids of shoal.runtime.tokenization.byte_tokenizer.write_byte_tokenizer: sentence tokens, bytes, then markup.
BOS, EOS, PAD, FIRST_BYTE = 0, 1, 2, 3
THINK, THINK_END, USER, ASSISTANT = range(FIRST_BYTE + 256, FIRST_BYTE + 260)
SHORT_TASKS = [name for name in TASKS if name != "lookup"]
THINKING_SHARE = 0.6


@dataclass(slots=True)
class Encoded:
    """A row of training. `part` says what each token is to be learnt as: -1 is not learnt, else an index of `names`."""

    tokens: list[int]
    part: list[int]

    def add(self, tokens: Iterable[int], part: int = -1) -> None:
        before = len(self.tokens)
        self.tokens.extend(tokens)
        self.part.extend([part] * (len(self.tokens) - before))


PARTS = [f"{task}/{mode}" for task in TASKS for mode in ("thinking", "direct")] + ["recall"]
Level = Callable[[str], float]
"""Size of a task's questions (0 to 1) by name of the task; also used for the share of a task in training."""


def text_ids(text: str) -> list[int]:
    return [FIRST_BYTE + b for b in text.encode()]


def add_turn(row: Encoded, task: str, question: str, thinking: str | None, answer: str) -> None:
    """One question and its answer in DeepSeek's chat format; `thinking` None: answered at once."""
    mode = "direct" if thinking is None else "thinking"
    row.add([USER, *text_ids(question), ASSISTANT, THINK_END if thinking is None else THINK])
    learnt = [*text_ids(answer), EOS] if thinking is None else [*text_ids(thinking), THINK_END, *text_ids(answer), EOS]
    row.add(learnt, PARTS.index(f"{task}/{mode}"))


def encode(row: Row, *, thinking: bool) -> Encoded:
    encoded = Encoded([BOS], [-1])
    add_turn(encoded, row.task, row.question, row.thinking if thinking else None, row.answer)
    return encoded


def short_row(rng: random.Random, level: Level, need: Level) -> Encoded:
    (task,) = rng.choices(SHORT_TASKS, [need(task) for task in SHORT_TASKS])
    while is_held_out((row := TASKS[task](rng, level(task))).key):
        pass
    return encode(row, thinking=rng.random() < THINKING_SHARE)


def lookup_row(rng: random.Random, num_entries: int, num_questions: int) -> Encoded:
    """A document and several questions about it, one after the other."""
    while is_held_out((doc := document(rng, num_entries, num_questions)).key):
        pass
    encoded = Encoded([BOS], [-1])
    for number, (name, value) in enumerate(doc.asked):
        question = lookup_question(name)
        thinking = name + value if rng.random() < THINKING_SHARE else None
        add_turn(encoded, "lookup", question if number else f"{doc.text}\n{question}", thinking, value)
    return encoded


def recall_row(rng: random.Random, num_entries: int, length: int) -> Encoded:
    """Entries that come back in any order, as plain text: what was seen before is learnt.

    With few entries no letter is in two keys at the same place, so that one letter is enough to find an entry.
    """
    entries = document(rng, num_entries, num_entries).asked
    if few := num_entries <= 20:
        for place in (0, 1):
            entries = list({name[place]: (name, value) for name, value in entries}.values())
    recall = PARTS.index("recall")
    encoded, seen = Encoded([BOS], [-1]), set[str]()
    while len(encoded.tokens) < length:
        name, value = rng.choice(entries)
        encoded.add(text_ids(name[0]))
        encoded.add(text_ids(name[1]), recall if few and name in seen else -1)
        encoded.add(text_ids(value), recall if name in seen else -1)
        encoded.add(text_ids(" "))
        seen.add(name)
    return encoded


def short_batch(rng: random.Random, level: Level, need: Level, num_tokens: int) -> list[Encoded]:
    """Rows of the shorter or the longer half of what is drawn, so that not too much is padding."""
    rows = sorted((short_row(rng, level, need) for _ in range(num_tokens // 20)), key=lambda r: len(r.tokens))
    half = rows[: len(rows) // 2] if rng.random() < 0.5 else rows[len(rows) // 2 :]
    count = max(1, num_tokens // len(half[-1].tokens))
    return rng.sample(half, min(count, len(half)))


def long_batch(rng: random.Random, level: Level, num_tokens: int, length: int, *, recall: bool) -> list[Encoded]:
    """Rows of about `length` tokens: documents with questions, or plain recall."""
    count = max(1, num_tokens // length)
    if recall:
        return [recall_row(rng, max(4, length // rng.choice([12, 24])), length) for _ in range(count)]
    num_entries = min(204, max(8, length // 5))
    return [lookup_row(rng, num_entries, max(1, length // 96)) for _ in range(count)]


def collate(rows: list[Encoded]) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], part [B, T]), padded on the right."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), length), PAD)
    part = torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        part[i, : len(row.part)] = torch.tensor(row.part)
    return tokens, part
