"""Pictures as an ONNX model takes them: pixels, and what they are where it asks for that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sbtk_runtime.onnx_file import DOMAIN_NAME, INPUT_NAME
from sbtk_runtime.preprocess import DOMAINS, Kind, Pixels, domains_of

#: A model's inputs by name.
Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ModelInputs:
    """Pictures that a model is run on.

    Attributes:
        pixels: `(N, 224, 224, 3) uint8` RGB.
        domains: `(N,) float32`, 0 for a sketch and 1 for a photo.
    """

    pixels: Pixels
    domains: NDArray[np.float32]

    @classmethod
    def of_kind(cls, pixels: Pixels, kind: Kind) -> ModelInputs:
        """Returns pictures that are all of one kind."""
        return cls(pixels, domains_of(kind, len(pixels)))

    @classmethod
    def of_kinds(cls, pixels: Pixels, is_sketch: NDArray[np.bool_]) -> ModelInputs:
        """Returns pictures of which it is told, `(N,) bool`, whether each is a sketch."""
        domains = np.where(is_sketch, DOMAINS["sketch"], DOMAINS["photo"])
        return cls(pixels, domains.astype(np.float32))

    def __len__(self) -> int:
        return len(self.domains)

    def mixed(self) -> ModelInputs:
        """Returns the pictures in an order in which any part mixes sketches and photos."""
        order = np.random.default_rng(0).permutation(len(self))
        return ModelInputs(self.pixels[order], self.domains[order])

    def first(self, count: int) -> ModelInputs:
        """Returns the first pictures, or all if there are fewer."""
        return ModelInputs(self.pixels[:count], self.domains[:count])

    def batches(self, model: onnx.ModelProto, size: int) -> Iterator[Feeds]:
        """Yields the model's inputs for `size` pictures at a time."""
        is_told = domain_input_of(model) is not None
        for start in range(0, len(self), size):
            feeds: Feeds = {INPUT_NAME: self.pixels[start : start + size]}
            if is_told:
                feeds[DOMAIN_NAME] = self.domains[start : start + size]
            yield feeds


def domain_input_of(model: onnx.ModelProto) -> str | None:
    """Returns the name of a model's domain input; `None` if it has none."""
    names = [value.name for value in model.graph.input]
    return DOMAIN_NAME if DOMAIN_NAME in names else None
