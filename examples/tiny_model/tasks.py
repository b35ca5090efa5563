"""The tasks of shoal-tiny: questions with one right answer, a trace that leads to it, and a held-out set of each.

A question belongs to the held-out side when the hash of what is asked (not of how it is worded) falls in one of 32
classes out of 1024, so training and evaluation are disjoint by construction, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HELD_OUT_CLASSES, CLASSES = 32, 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One question. `key` says what is asked; `thinking` is the trace that precedes the answer when thinking."""

    task: str
    key: str
    question: str
    thinking: str
    answer: str


def is_held_out(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % CLASSES < HELD_OUT_CLASSES


def addition(rng: random.Random, level: float = 1.0) -> Row:
    """2 to 8 digits; the trace adds the digits from the right: digit + digit + carry = sum."""
    a, b = (_number(rng, 2, _up_to(2, 8, level)) for _ in range(2))
    steps, carry = [], 0
    for x, y in _digits_from_the_right(a, b):
        steps.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    question = rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}.", f"Compute {a} + {b}."])
    return Row("addition", f"{a}+{b}", question, " ".join(steps), str(a + b))


def subtraction(rng: random.Random, level: float = 1.0) -> Row:
    """2 to 6 digits, never below zero; the trace subtracts from the right: digit - digit - borrow = digit [- 10]."""
    a, b = sorted((_number(rng, 2, _up_to(2, 6, level)) for _ in range(2)), reverse=True)
    steps, borrow = [], 0
    for x, y in _digits_from_the_right(a, b):
        difference = x - y - borrow
        steps.append(f"{x}-{y}-{borrow}={difference % 10}{'-10' if difference < 0 else ''}")
        borrow = int(difference < 0)
    question = rng.choice([f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"Compute {a} - {b}."])
    return Row("subtraction", f"{a}-{b}", question, " ".join(steps), str(a - b))


def sorting(rng: random.Random, level: float = 1.0) -> Row:
    """3 to 12 digits; the trace is a first draft."""
    digits = [rng.choice(string.digits) for _ in range(rng.randint(3, _up_to(3, 12, level)))]
    question = rng.choice([f"Sort these digits: {' '.join(digits)}", f"Put in order: {' '.join(digits)}"])
    return Row("sorting", "sort" + "".join(digits), question, "".join(sorted(digits)), " ".join(sorted(digits)))


def copying(rng: random.Random, level: float = 1.0) -> Row:
    """4 to 40 letters and digits; the trace is a first draft."""
    text = _word(rng, 4, _up_to(4, 40, level))
    question = rng.choice([f"Copy this: {text}", f"Repeat: {text}"])
    return Row("copying", f"copy{text}", question, text, text)


def reversing(rng: random.Random, level: float = 1.0) -> Row:
    """4 to 40 letters and digits; the trace is a first draft."""
    text = _word(rng, 4, _up_to(4, 40, level))
    question = rng.choice([f"Reverse this: {text}", f"Write backwards: {text}"])
    return Row("reversing", f"reverse{text}", question, text[::-1], text[::-1])


def running_sum(rng: random.Random, level: float = 1.0) -> Row:
    """The sum of 2 to 10 digits; the trace adds one after the other."""
    digits = [rng.randint(0, 9) for _ in range(rng.randint(2, _up_to(2, 10, level)))]
    steps, total = [], 0
    for digit in digits:
        steps.append(f"{total}+{digit}={total + digit}")
        total += digit
    listed = " ".join(map(str, digits))
    question = rng.choice([f"What is the sum of {listed}?", f"Add up {listed}."])
    return Row("running_sum", f"sum{listed}", question, " ".join(steps), str(total))


@dataclass(frozen=True, slots=True)
class Document:
    """Entries of a two-letter key and a two-digit value, such as kd57, and some of the keys to ask for."""

    text: str
    asked: list[tuple[str, str]]

    @property
    def key(self) -> str:
        return f"{self.text}?{self.asked[0][0]}"


def document(rng: random.Random, num_entries: int, num_asked: int = 1) -> Document:
    keys = rng.sample(_KEYS, num_entries)
    values = [f"{rng.randint(0, 99):02d}" for _ in keys]
    entries = list(zip(keys, values, strict=True))
    return Document(" ".join(k + v for k, v in entries), rng.sample(entries, min(num_asked, num_entries)))


def lookup_question(name: str) -> str:
    return f"What is {name}?"


def lookup(rng: random.Random, level: float = 1.0) -> Row:
    """One value of a document of 128 to 1024 characters; the trace repeats the entry."""
    num_entries = rng.randint(26, _up_to(26, 204, level))
    doc = document(rng, num_entries)
    name, value = doc.asked[0]
    return Row("lookup", doc.key, f"{doc.text}\n{lookup_question(name)}", name + value, value)


_KEYS = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
TASKS: dict[str, Callable[[random.Random, float], Row]] = {
    task.__name__: task for task in (addition, subtraction, sorting, copying, reversing, running_sum, lookup)
}


def training_rows(task: str, rng: random.Random, level: Callable[[], float] = lambda: 1.0) -> Iterator[Row]:
    """Endless; `level` (0 to 1, asked for each row) bounds the size of a question."""
    while True:
        row = TASKS[task](rng, level())
        if not is_held_out(row.key):
            yield row


def held_out_rows(task: str, count: int, seed: int = 20260101) -> list[Row]:
    """The first `count` different held-out questions of the full range."""
    rng = random.Random(f"{seed}/{task}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = TASKS[task](rng, 1.0)
        if is_held_out(row.key):
            rows.setdefault(row.key, row)
    return list(rows.values())


def _up_to(low: int, high: int, level: float) -> int:
    return low + round((high - low) * level)


def _number(rng: random.Random, low: int, high: int) -> int:
    """A number of `low` to `high` digits, every length equally likely."""
    length = rng.randint(low, high)
    return rng.randrange(10 ** (length - 1), 10**length)


def _word(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice(string.ascii_lowercase + string.digits) for _ in range(rng.randint(low, high)))


def _digits_from_the_right(a: int, b: int) -> list[tuple[int, int]]:
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1], strict=True)]
