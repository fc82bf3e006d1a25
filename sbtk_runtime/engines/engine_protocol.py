"""What every engine can do: prepared pixels in, embeddings out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.engine_info import EngineInfo
from sbtk_runtime.preprocess import Kind

Images = NDArray[np.uint8]
Embeddings = NDArray[np.float32]


class Engine(Protocol):
    """Something that runs the model of one bundle in one precision.

    `run` may be called from several threads at once; more than `info.lanes` only wait.

    Attributes:
        info: what it is and where it runs.
    """

    info: EngineInfo

    def run(self, images: Images, kind: Kind) -> Embeddings:
        """Returns the embeddings of a batch.

        Args:
            images: `(N, 224, 224, 3) uint8` RGB, any N from 1.
            kind: what all of them are. Only a model with a domain input makes a difference of it,
                but the caller never knows which model that is.

        Returns:
            `(N, D) float32` rows of length 1, except where the model failed: see `checked_rows`.

        Raises:
            EngineUnavailable: the engine failed as a whole.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds; it cannot run afterwards."""
        ...
