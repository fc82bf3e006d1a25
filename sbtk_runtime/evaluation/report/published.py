"""Published results, to lay measured ones baselines: who reported what, by which rule, read where.

The metrics are in `published.json`, in percent. The SBTKNet paper's Tables 2 to 5 are all there;
so is later work, as far as its metrics could be read.
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
    """How somebody measures; `None` is what no source states.

    Attributes:
        ap: AP by its steps, or with VOC's precision envelope.
        divisor: what AP@k is divided by.
        mean: whether mAP is the mean over queries or over classes.
        generalised: how seen classes join in the generalised setting, as `Protocol.setting`.
        remark: what else there is to know.
    """

    ap: ApRule | None
    divisor: Divisor | None
    mean: Mean | None
    generalised: Setting | None
    remark: str


@dataclass(frozen=True)
class PublishedRow:
    """One method's metrics on one test set.

    Attributes:
        method: as its authors call it.
        year: of publication; `None` where it is not known here.
        dim: length of the embedding, in bits where `binary`; `None` where it is not known.
        binary: whether the embedding is a binary code.
        setting: `zero-shot`, or `generalised`: with seen classes in the gallery.
        split: the column that the paper prints it in.
        class_list: the unseen classes that were really used; empty where they are not named.
        metrics: name to percent; a name in the manner of `sbtk bench map` where the rule is odd.
        rules: the name of its `PublishedRules`.
        source: where the metrics were read.
        tag: `P` printed in the SBTKNet paper, `V` read where its authors or the named file give
            it, `S` a secondary source.
        later: whether the work is later than the SBTKNet paper.
        note: what is particular about the row.
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
    """How many queries and photos somebody's test set has.

    Attributes:
        class_list: the unseen classes.
        queries, photos: their numbers.
        has_duplicates: whether photos occur twice; `None` where nobody has looked.
        of: whose file lists they are.
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
        name: of the row, as `sbtk train --ablation` calls it.
        label: the objectives that it adds to the triplet loss.
        metrics: split to metric to percent.
    """

    name: str
    label: str
    metrics: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Published:
    """All that is known of published results."""

    rules: dict[str, PublishedRules]
    galleries: tuple[PublishedGallery, ...]
    rows: tuple[PublishedRow, ...]
    ablation: tuple[PublishedAblation, ...]
    ablation_rules: str

    def rules_of(self, row: PublishedRow) -> PublishedRules:
        """Return how the row was measured, as far as it is known."""
        return self.rules[row.rules]

    def galleries_of(self, class_list: str) -> list[PublishedGallery]:
        """Return the test sets that have been used with a class list."""
        return [gallery for gallery in self.galleries if gallery.class_list == class_list]


@cache
def published() -> Published:
    """Return the content of `published.json`."""
    text = (
        resources.files("sbtk_runtime.evaluation.report")
        .joinpath("published.json")
        .read_text("utf-8")
    )
    content = json.loads(text)
    ablation = content["ablation"]
    return Published(
        rules={name: PublishedRules(**entry) for name, entry in content["rules"].items()},
        galleries=tuple(PublishedGallery(**entry) for entry in content["galleries"]),
        rows=tuple(PublishedRow(**entry) for entry in content["rows"]),
        ablation=tuple(PublishedAblation(**entry) for entry in ablation["rows"]),
        ablation_rules=ablation["rules"],
    )
