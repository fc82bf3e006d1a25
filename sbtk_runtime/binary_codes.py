"""Iterative quantisation (ITQ): embeddings to binary codes by PCA and a learned rotation.

Gong and Lazebnik, "Iterative Quantization: A Procrustean Approach to Learning Binary Codes",
CVPR 2011. With `V (N, B)` the centred rows on their B principal axes, ITQ looks for the rotation
`R` that loses least by taking signs, `min ||sign(V R) - V R||`: it alternates `S = sign(V R)` with
the Procrustes solution for `S`, `R = W U'` where `S' V = U diag(s) W'`.

The code that SEM-PCYC and DSN released takes `W'` for `W` (numpy's `svd` returns the transpose),
so that its `R` is orthogonal but fits nothing. `rotation="released"` does the same.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, BadData, BadModel

Embeddings = NDArray[np.float32]
Rotation = Literal["procrustes", "released"]

_CHUNK_ROWS = 8192
_SEED = 50


@dataclass(frozen=True)
class Itq:
    """Turns embeddings into binary codes: bit `b` is `(row - mean) @ projection[:, b] > 0`.

    Attributes:
        mean: `(D,) float32`, subtracted from each row.
        projection: `(D, B) float32`, principal axes times rotation; B is a multiple of 8.
    """

    mean: Embeddings
    projection: Embeddings

    def __post_init__(self) -> None:
        shapes = f"a mean of shape {self.mean.shape}, a projection of {self.projection.shape}"
        if self.projection.ndim != 2 or self.mean.shape != self.projection.shape[:1]:
            raise BadModel(f"binary codes by {shapes}", "shapes (D,) and (D, bits)")
        if self.mean.dtype != np.float32 or self.projection.dtype != np.float32:
            raise BadModel(f"binary codes by {self.mean.dtype}, {self.projection.dtype}", "float32")
        if self.bits == 0 or self.bits % 8:
            raise BadModel(f"binary codes of {self.bits} bits", "a multiple of 8")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.projection).all()):
            raise BadModel("binary codes by numbers that are not finite")

    @property
    def bits(self) -> int:
        """Length of a code."""
        return int(self.projection.shape[1])

    @property
    def dim(self) -> int:
        """Width of the embeddings that it takes."""
        return int(self.projection.shape[0])

    def codes(self, rows: Embeddings) -> Codes:
        """Return the packed codes of `rows (N, D) float32`, `(N, bits / 8) uint8`.

        Raises:
            BadData: rows of another width.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise BadData(f"embeddings of shape {rows.shape}", f"(N, {self.dim})")
        packed = np.empty((len(rows), self.bits // 8), dtype=np.uint8)
        for start in range(0, len(rows), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            packed[part] = np.packbits((rows[part] - self.mean) @ self.projection > 0, axis=1)
        return packed

    def centred_on(self, rows: Embeddings) -> Itq:
        """Return the same axes about the mean of `rows (N, D) float32`, as DSN does."""
        return replace(self, mean=_mean(rows).astype(np.float32))

    def to_bytes(self) -> bytes:
        """Return the content of an .npz file, the same bytes for the same numbers."""
        file = io.BytesIO()
        np.savez(file, mean=self.mean, projection=self.projection)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "itq.npz") -> Itq:
        """Return what `to_bytes` wrote; never unpickles.

        Raises:
            BadModel: the content, called `name`, is damaged or something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return cls(mean=arrays["mean"], projection=arrays["projection"])
        except (
            # RuntimeError: the bit that marks an encrypted file.
            *(AttributeError, EOFError, KeyError, MemoryError, OSError, RuntimeError),
            *(TypeError, ValueError, zipfile.BadZipFile, zlib.error),
        ) as error:
            raise BadModel(
                f"{name} cannot be read: {error}", "arrays `mean` and `projection` of an .npz file"
            ) from None


def fit_itq(
    rows: Embeddings,
    bits: int,
    *,
    iterations: int = 50,
    rotation: Rotation = "procrustes",
) -> Itq:
    """Return an ITQ for codes of `bits` bits, fitted on `rows (N, D) float32`.

    Args:
        rows: the embeddings to fit on; more rows than bits.
        bits: length of a code, a multiple of 8, at most D.
        iterations: number of updates of the rotation.
        rotation: "procrustes" as in the paper, or "released" as in the code of SEM-PCYC and DSN.

    Raises:
        BadConfig: D dimensions cannot give so many bits.
        BadData: too few rows, or numbers that are not finite.
    """
    if rows.ndim != 2:
        raise BadData(f"embeddings of shape {rows.shape}", "rows, (N, D)")
    check_bits(bits, rows.shape[1])
    if len(rows) <= bits:
        wanted = f"more than {bits} embeddings to fit {bits} bits"
        raise BadData(f"{len(rows)} embeddings for binary codes", wanted)
    mean = _mean(rows)
    if not np.isfinite(mean).all():
        raise BadData("embeddings with numbers that are not finite")
    axes = _principal_axes(rows, mean, bits)
    values = np.concatenate([chunk @ axes for chunk in _centre_chunks(rows, mean)])
    projection = axes @ _rotation(values, iterations, rotation)
    return Itq(mean=mean.astype(np.float32), projection=projection.astype(np.float32))


def check_bits(bits: int, dim: int) -> None:
    """Check that embeddings of `dim` numbers can have codes of `bits` bits.

    Raises:
        BadConfig: they cannot.
    """
    if bits <= 0 or bits % 8 or bits > dim:
        wanted = f"a multiple of 8 between 8 and the embedding's width, {dim}"
        raise BadConfig(f"binary codes of {bits} bits", wanted)


def _rotation(
    values: NDArray[np.float64], iterations: int, rotation: Rotation
) -> NDArray[np.float64]:
    """Return ITQ's `(B, B)` rotation for centred `values (N, B)` on their principal axes."""
    bits = values.shape[1]
    # NumPy's legacy generator, as in the published code.
    turn = np.linalg.svd(np.random.RandomState(_SEED).randn(bits, bits))[0]
    for _ in range(iterations):
        signs = np.where(values @ turn >= 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(signs.T @ values)
        turn = (right.T if rotation == "procrustes" else right) @ left.T
    return np.asarray(turn, dtype=np.float64)


def _principal_axes(rows: Embeddings, mean: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the `count` directions of largest variance as columns, largest first.

    The largest component of each is positive, so the library's choice of sign does not matter.
    """
    covariance = np.zeros((rows.shape[1], rows.shape[1]))
    for chunk in _centre_chunks(rows, mean):
        covariance += chunk.T @ chunk
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :count]
    largest = np.abs(axes).argmax(axis=0)
    return np.asarray(axes * np.where(axes[largest, np.arange(count)] < 0, -1.0, 1.0))


def _mean(rows: Embeddings) -> NDArray[np.float64]:
    return np.asarray(rows.mean(axis=0, dtype=np.float64))


def _centre_chunks(rows: Embeddings, mean: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield `rows - mean` in chunks, so that a large gallery is never held in float64."""
    for start in range(0, len(rows), _CHUNK_ROWS):
        yield rows[start : start + _CHUNK_ROWS] - mean


#: Binary codes, `(N, W) uint8`: eight bits a byte, the first bit in a byte's highest place.
Codes = NDArray[np.uint8]
Distances = NDArray[np.uint16]
#: Codes by their words, `(words, N) uint64`, in which distances are counted fastest.
Words = NDArray[np.uint64]

_WORD_BYTES = 8
_CHUNK_DISTANCES = 4_000_000
_BLOCK = 8192


def hamming_distances(queries: Codes, gallery: Codes) -> Distances:
    """Return in how many bits each query differs from each photo, `(Q, N) uint16`.

    Besides the result, this takes some 80 MB at most.

    Args:
        queries: `(Q, W) uint8` packed codes.
        gallery: `(N, W) uint8` packed codes of the same width.

    Raises:
        BadData: the codes are not packed bytes, or of different widths.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise BadData(f"binary codes of shapes {queries.shape} and {gallery.shape}", "equal widths")
    if queries.dtype != np.uint8 or gallery.dtype != np.uint8:
        raise BadData(f"codes of type {queries.dtype} and {gallery.dtype}", "packed bits, uint8")
    query_words, photo_words = code_words(queries), code_words(gallery)
    distances = np.zeros((len(queries), len(gallery)), dtype=np.uint16)
    step = max(1, _CHUNK_DISTANCES // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        rows = distances[start : start + step]
        for query_word, photo_word in zip(query_words, photo_words, strict=True):
            rows += np.bitwise_count(query_word[start : start + step, None] ^ photo_word)
    return distances


def code_words(codes: Codes) -> Words:
    """Return codes `(N, W) uint8` as words, `(ceil(W / 8), N) uint64`, padded with zeros."""
    width = -(-codes.shape[1] // _WORD_BYTES) * _WORD_BYTES
    padded = np.zeros((len(codes), width), dtype=np.uint8)
    padded[:, : codes.shape[1]] = codes
    return np.ascontiguousarray(padded.view(np.uint64).T)


def word_distances(query: Words, words: Words) -> Distances:
    """Return in how many bits a query differs from each photo, `(N,) uint16`.

    Blocks of words stay in the processor's cache: some 1 ms for 100,000 codes of 512 bits.

    Args:
        query: `(V, 1) uint64`, see `code_words`.
        words: `(V, N) uint64`.
    """
    distances = np.zeros(words.shape[1], dtype=np.uint16)
    for start in range(0, len(distances), _BLOCK):
        block = distances[start : start + _BLOCK]
        for word, photo_words in zip(query[:, 0], words[:, start : start + _BLOCK], strict=True):
            block += np.bitwise_count(photo_words ^ word)
    return distances
