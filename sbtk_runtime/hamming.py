"""Hamming distances of packed binary codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData

#: Binary codes, `(N, W) uint8`: eight bits a byte, the first bit in a byte's highest place.
Codes = NDArray[np.uint8]
Distances = NDArray[np.uint16]

_WORD_BYTES = 8
_CHUNK_DISTANCES = 4_000_000


def hamming_distances(queries: Codes, gallery: Codes) -> Distances:
    """Returns in how many bits each query differs from each photo, `(Q, N) uint16`.

    Args:
        queries: `(Q, W) uint8` packed codes.
        gallery: `(N, W) uint8` packed codes of the same width.

    Beside the answer, at most some 80 MB are used, whatever Q is.

    Raises:
        BadData: the codes are not packed bytes, or of different widths.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise BadData(f"binary codes of shapes {queries.shape} and {gallery.shape}", "equal widths")
    if queries.dtype != np.uint8 or gallery.dtype != np.uint8:
        raise BadData(f"codes of type {queries.dtype} and {gallery.dtype}", "packed bits, uint8")
    query_words, photo_words = _words(queries), _words(gallery)
    distances = np.zeros((len(queries), len(gallery)), dtype=np.uint16)
    step = max(1, _CHUNK_DISTANCES // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        rows = distances[start : start + step]
        for query_word, photo_word in zip(query_words, photo_words, strict=True):
            rows += np.bitwise_count(query_word[start : start + step, None] ^ photo_word)
    return distances


def _words(codes: Codes) -> NDArray[np.uint64]:
    """Returns the codes as words, `(ceil(W / 8), N) uint64`, filled up with zeros."""
    width = -(-codes.shape[1] // _WORD_BYTES) * _WORD_BYTES
    padded = np.zeros((len(codes), width), dtype=np.uint8)
    padded[:, : codes.shape[1]] = codes
    return np.ascontiguousarray(padded.view(np.uint64).T)
