"""What processors without VNNI make of 8-bit products, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_INT16 = np.iinfo(np.int16)


def saturating_product(left: NDArray[np.uint8], weights: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return `left (M, K) @ weights (K, N)` as kernels for AVX2 compute it.

    `vpmaddubsw` multiplies unsigned by signed bytes and adds each two neighbours along K in 16
    bits, with saturation; only these sums are added in 32 bits.
    """
    if left.shape[1] % 2:
        left, weights = np.pad(left, ((0, 0), (0, 1))), np.pad(weights, ((0, 1), (0, 0)))
    exact = left[:, :, None].astype(np.int64) * weights[None].astype(np.int64)
    pairs = exact[:, 0::2] + exact[:, 1::2]
    product: NDArray[np.int64] = np.clip(pairs, _INT16.min, _INT16.max).sum(axis=1)
    return product


def can_saturate(weights: NDArray[np.int8], most_input: int = 255) -> bool:
    """Whether a pair of weights along the first axis can reach beyond 16 bits, however paired.

    Inputs are from 0 to `most_input`. Kernels choose themselves which channels are neighbours, so
    the two largest weights of one sign in a column decide.
    """
    wide = np.sort(weights.reshape(len(weights), -1).astype(np.int64), axis=0)
    highest = np.clip(wide[-2:], 0, None).sum(axis=0) * most_input
    lowest = np.clip(wide[:2], None, 0).sum(axis=0) * most_input
    return bool((highest > _INT16.max).any() or (lowest < _INT16.min).any())
