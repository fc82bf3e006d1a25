"""Published results with their rules and sources, for comparison with measured ones.

Metrics are in `published.json`, in percent: the SBTKNet paper's Tables 2 to 5, and later work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from sbtk_runtime.evaluation.protocol import Divisor, Mean, Setting

ApRule = Literal["plain", "voc"]


@dataclass(frozen=True)
class PublishedRules:
    """Rules of published results; `None` if no source states them.

    Attributes:
        ap: plain AP, or AP with VOC's precision envelope.
        divisor: divisor of AP@k.
        mean: whether mAP is the mean over queries or over classes.
        generalised: the generalised setting, as `Protocol.setting`.
        remark: further remarks.
    """

    ap: ApRule | None
    divisor: Divisor | None
    mean: Mean | None
    generalised: Setting | None
    remark: str


@dataclass(frozen=True)
class PublishedRow:
    """Metrics of one method on one test set.

    Attributes:
        method: name used by its authors.
        year: year of publication; `None` if unknown.
        dim: length of the embedding, in bits if `binary`; `None` if unknown.
        binary: whether the embedding is a binary code.
        setting: `zero-shot`, or `generalised`: with seen classes in the gallery.
        split: the column in the paper's tables.
        class_list: the unseen classes actually used; empty if unknown.
        metrics: percent by name; unusual rules are named as in `sbtk bench map`.
        rules: name of its `PublishedRules`.
        source: source of the metrics.
        tag: `P` the SBTKNet paper, `V` the authors' own paper or files, `S` a secondary source.
        later: whether the work is later than the SBTKNet paper.
        note: remarks on the row.
    """

    method: str
    year: int | None
    dim: int | None
    binary: bool
    setting: Literal["zero-shot", "generalised"]
    split: str
    class_list: str
    metrics: dict[str, float]
    rules: str
    source: str
    tag: Literal["P", "V", "S"]
    later: bool
    note: str


@dataclass(frozen=True)
class PublishedGallery:
    """Size of a published test set.

    Attributes:
        class_list: the unseen classes.
        queries, photos: numbers of queries and photos.
        has_duplicates: whether photos occur twice; `None` if unknown.
        of: source of the file lists.
    """

    class_list: str
    queries: int
    photos: int
    has_duplicates: bool | None
    of: str


@dataclass(frozen=True)
class PublishedAblation:
    """One row of the SBTKNet paper's Table 5.

    Attributes:
        name: name of the row, as in `sbtk train --ablation`.
        label: the objectives added to the triplet loss.
        metrics: percent by split and metric.
    """

    name: str
    label: str
    metrics: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Published:
    """All published results."""

    rules: dict[str, PublishedRules]
    galleries: tuple[PublishedGallery, ...]
    rows: tuple[PublishedRow, ...]
    ablation: tuple[PublishedAblation, ...]

    def rules_of(self, row: PublishedRow) -> PublishedRules:
        """Return the rules of a row."""
        return self.rules[row.rules]

    def galleries_of(self, class_list: str) -> list[PublishedGallery]:
        """Return the test sets with a class list."""
        return [gallery for gallery in self.galleries if gallery.class_list == class_list]


@cache
def load_published() -> Published:
    """Return the content of `published.json`."""
    file = resources.files("sbtk_runtime.evaluation.report").joinpath("published.json")
    content = json.loads(file.read_text("utf-8"))
    return Published(
        rules={name: PublishedRules(**entry) for name, entry in content["rules"].items()},
        galleries=tuple(PublishedGallery(**entry) for entry in content["galleries"]),
        rows=tuple(PublishedRow(**entry) for entry in content["rows"]),
        ablation=tuple(PublishedAblation(**entry) for entry in content["ablation"]["rows"]),
    )
