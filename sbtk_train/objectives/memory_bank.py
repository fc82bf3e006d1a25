"""DSN's category memory: features of a few sketches of each class, which photos should be near to.

Wang et al. 2021; haowang1992/DSN `src/tool.py`. The released code detaches both sides of the loss,
so that it shows in the log and teaches nothing (issues #1 and #2 there); what the paper describes
has a gradient for the photos' features. Both are here. The released code also writes a replaced
entry over all entries of another class; here it replaces the one entry that it was compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sbtk_runtime.errors import BadConfig, BadData


class MemoryBank:
    """Up to `size` sketch features for each class, forgotten when an epoch starts.

    Args:
        classes: number of training classes.
        size: entries for each class; 10 in DSN.
        features: length of a feature; 2048.
        device: where the features are.
    """

    def __init__(
        self, classes: int, size: int, features: int, device: torch.device | str = "cpu"
    ) -> None:
        self._entries = torch.zeros(classes, size, features, device=device)
        self._counts = [0] * classes

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of entries of each class."""
        return tuple(self._counts)

    def entries(self, label: int) -> Tensor:
        """Returns the `(counts[label], F) float32` features that are kept of a class."""
        return self._entries[label, : self._counts[label]]

    @torch.no_grad()
    def add(
        self, sketches: Tensor, sketch_labels: Tensor, photos: Tensor, photo_labels: Tensor
    ) -> None:
        """Keeps a batch's sketch features, in their order.

        While a class has room a sketch is simply added. Then it takes the place of the entry that
        is farthest, by cosine, from the mean of the class's photo features in the batch, if it is
        nearer to that mean itself. Without a photo of the class in the batch nothing is replaced.

        Args:
            sketches: `(S, F)` features; their gradient is not kept.
            sketch_labels: `(S,) int64`.
            photos: `(P, F)` features.
            photo_labels: `(P,) int64`.

        Raises:
            BadData: a label is of no class that the bank was made for.
        """
        labels = self._checked(sketch_labels)
        self._checked(photo_labels)
        present = set(photo_labels.tolist())
        for sketch, label in zip(sketches.float(), labels, strict=True):
            count = self._counts[label]
            if count < self._entries.shape[1]:
                self._entries[label, count] = sketch
                self._counts[label] = count + 1
            elif label in present:
                middle = photos[photo_labels == label].float().mean(0)
                self._replace_farthest(label, sketch, middle)

    def loss(self, photos: Tensor, labels: Tensor, *, with_gradient: bool = True) -> Tensor:
        """Returns 1 minus the mean cosine of photos to the mean entry of their class.

        Photos of a class without an entry are left out; it is 0 if all are.

        Args:
            photos: `(P, F)` features.
            labels: `(P,) int64`.
            with_gradient: False as released by the authors: the loss is only to be looked at.

        Raises:
            BadData: a label is of no class that the bank was made for.
        """
        rows = [row for row, label in enumerate(self._checked(labels)) if self._counts[label]]
        photos = photos.float() if with_gradient else photos.detach().float()
        if not rows:
            return photos.sum() * 0.0
        # Places without an entry hold zeros, and a cosine does not ask how long the sum is.
        prototypes = self._entries[labels[rows]].sum(1)
        return 1.0 - functional.cosine_similarity(photos[rows], prototypes).mean()

    def forget(self) -> None:
        """Empties the bank."""
        self._entries.zero_()
        self._counts = [0] * len(self._counts)

    def state(self) -> dict[str, Tensor]:
        """Returns a copy of what the bank holds."""
        return {"entries": self._entries.cpu().clone(), "counts": torch.tensor(self._counts)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state` returned.

        Raises:
            BadConfig: it is of a bank for other classes, another size or other features.
        """
        found = tensors["entries"].shape if "entries" in tensors else None
        if found != self._entries.shape or len(tensors["counts"]) != len(self._counts):
            raise BadConfig(
                f"the saved memory bank has shape {None if found is None else tuple(found)}",
                f"{tuple(self._entries.shape)}: classes, entries, length of a feature",
                "resume with the same classes and --memory-size, or start a new run",
            )
        self._entries.copy_(tensors["entries"])
        self._counts = [int(count) for count in tensors["counts"]]

    def _replace_farthest(self, label: int, sketch: Tensor, middle: Tensor) -> None:
        slots = self._entries[label]
        nearness = functional.cosine_similarity(slots, middle[None])
        farthest = nearness.argmin()[None]
        is_nearer = functional.cosine_similarity(sketch, middle, dim=0) > nearness[farthest]
        # Without a branch, so that a GPU need not be waited for.
        slots[farthest] = torch.where(is_nearer[:, None], sketch[None], slots[farthest])

    def _checked(self, labels: Tensor) -> list[int]:
        values: list[int] = labels.tolist()
        for label in values:
            if not 0 <= label < len(self._counts):
                raise BadData(
                    f"class number {label} in a memory bank of {len(self._counts)} classes",
                    f"0 to {len(self._counts) - 1}, the training classes",
                    "train on the classes that the run was started with",
                )
        return values
