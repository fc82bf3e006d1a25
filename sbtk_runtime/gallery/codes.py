"""Binary codes on disk: shards of packed bits, the truth about a binary gallery.

A code has no redundancy: any bytes are a code, so damage is seen by the hashes of the batches
alone (`sbtk index --verify`), and what never gets in is judged by the embedding it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.gallery.shards import Batch, Rows, Shards
from sbtk_runtime.gallery.vectors import Embeddings, require_unit_rows
from sbtk_runtime.hamming import Codes
from sbtk_runtime.itq import Itq

#: What is read and compared at a time; 131,072 codes of 64 bits.
CHUNK_BYTES = 1 << 20


class CodeShards(Shards):
    """The codes of a gallery, `bits` bits each, packed as `numpy.packbits` does."""

    def __init__(self, folder: Path, bits: int) -> None:
        super().__init__(folder, bits // 8, ".bits")
        self.bits = bits

    def append(self, first_row: int, codes: Codes) -> list[Batch]:
        """Writes codes `(N, bits / 8) uint8` from row `first_row` on, durably.

        Raises:
            BadData: the codes have another length.
            DiskFull: there is no space; what was committed is untouched.
        """
        if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] != self.bits // 8:
            raise BadData(
                f"codes {codes.shape} {codes.dtype}", f"(N, {self.bits // 8}) uint8, packed"
            )
        return self.append_bytes(first_row, codes)

    def read(self, rows: Rows) -> tuple[Codes, NDArray[np.bool_]]:
        """Returns codes `(N, bits / 8) uint8` and which are there, `(N,) bool`; the rest are zeros.

        `rows` is ascending.
        """
        return self.read_bytes(rows)

    def chunks(self, rows: Rows) -> Iterator[tuple[Rows, Codes, NDArray[np.bool_]]]:
        """Reads the codes at `rows (N,) int64` in parts of `CHUNK_BYTES`, in constant memory.

        Yields:
            Row numbers `(n,) int64`, codes `(n, bits / 8) uint8`, and which are there, `(n,) bool`.
        """
        step = CHUNK_BYTES // (self.bits // 8)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            codes, is_held = self.read(part)
            yield part, codes, is_held


def codes_of(embeddings: Embeddings, itq: Itq) -> Codes:
    """Returns the codes `(N, bits / 8) uint8` of unit rows `(N, D) float32`.

    Raises:
        BadData: a row is of another width, not finite or not of length 1. Its code would look
            like any other.
    """
    require_unit_rows(embeddings, itq.dim)
    return itq.codes(embeddings)
