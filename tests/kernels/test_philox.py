"""Philox4x32-10 against the known answers that Random123 publishes, and the numbers made from it."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.kernels.philox import philox4x32, uniform, uniforms

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    out = philox4x32(np.array([counter], dtype=np.uint32), np.array([key], dtype=np.uint32))
    assert out.dtype == np.uint32
    assert out.tolist() == [expected]


def test_rows_do_not_depend_on_each_other() -> None:
    counters = np.array([c for c, _, _ in KNOWN_ANSWERS], dtype=np.uint32)
    keys = np.array([k for _, k, _ in KNOWN_ANSWERS], dtype=np.uint32)
    assert philox4x32(counters, keys).tolist() == [e for _, _, e in KNOWN_ANSWERS]
    assert philox4x32(counters[:0], keys[:0]).shape == (0, 4)


def test_uniform_is_the_top_53_bits_of_the_first_two_words() -> None:
    assert uniform(0, 0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_uniform_uses_every_argument() -> None:
    triples = [(0, 0, 0), (1, 0, 0), (-1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32, 0), (0, 0, 1), (9, 7, 3)]
    values = [uniform(*t) for t in triples]
    assert len(set(values)) == len(triples)
    assert uniforms(*map(list, zip(*triples, strict=True))).tolist() == values
    assert uniforms([], [], []).shape == (0,)


def test_uniform_is_flat_and_uncorrelated_between_positions() -> None:
    n = 20000
    values = uniforms([12345] * n, range(n), [0] * n)
    assert 0.0 <= values.min() < values.max() < 1.0
    counts = np.bincount((values * 16).astype(int), minlength=16)
    assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 37.7  # chi-square, 15 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / n**0.5
