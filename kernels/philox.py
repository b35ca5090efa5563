"""Counter-based random numbers: Philox4x32-10.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)
_NUM_ROUNDS = 10


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Counters [n, 4] uint32 and keys [n, 2] uint32 -> random numbers [n, 4] uint32; row i depends on row i only."""
    assert counter.shape[1:] == (4,)
    assert key.shape == (len(counter), 2)
    assert counter.dtype == key.dtype == np.uint32
    c0, c1, c2, c3 = counter.T
    k0, k1 = key.T
    for _ in range(_NUM_ROUNDS):
        product0 = c0.astype(np.uint64) * _MULTIPLIERS[0]
        product1 = c2.astype(np.uint64) * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(product1) ^ c1 ^ k0, _low(product1), _high(product0) ^ c3 ^ k1, _low(product0)
        k0, k1 = k0 + _KEY_INCREMENTS[0], k1 + _KEY_INCREMENTS[1]
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(seeds: Sequence[int], positions: Sequence[int], sample_indices: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per (seed, position, sample index): [n] float64.

    Key = the seed's low 64 bits; counter = (position, position >> 32, sample index, 0), low words first.
    """
    counter = np.array(
        [(p & 0xFFFFFFFF, p >> 32, s, 0) for p, s in zip(positions, sample_indices, strict=True)], dtype=np.uint32
    ).reshape(-1, 4)
    key = np.array([(s & 0xFFFFFFFF, (s >> 32) & 0xFFFFFFFF) for s in seeds], dtype=np.uint32).reshape(-1, 2)
    words = philox4x32(counter, key).astype(np.uint64)
    bits = (words[:, 0] >> np.uint64(5)) << np.uint64(26) | words[:, 1] >> np.uint64(6)
    return bits.astype(np.float64) * 2.0**-53


def uniform(seed: int, position: int, sample_index: int) -> float:
    """`uniforms` for one row: a pure function, so that a resumed or moved row draws the same number."""
    return float(uniforms([seed], [position], [sample_index])[0])


def _high(product: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return (product >> np.uint64(32)).astype(np.uint32)


def _low(product: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return product.astype(np.uint32)
