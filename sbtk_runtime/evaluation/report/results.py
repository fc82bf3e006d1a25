"""Results with their rules: those of `sbtk bench map --json`, and published ones.

Published metrics are in `published.json`, in percent: the SBTKNet paper's Tables 2 to 5, and later
work, each with its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.protocol import Divisor, Mean, Measure, Setting
from sbtk_runtime.files import printable_name, printable_text

MAX_RESULTS_BYTES = 16 << 20
SETTINGS: tuple[Setting, ...] = get_args(Setting)

# The classes in words, followed by the rest of `MapReport.protocol`.
_OF = re.compile(r"(.+?)(?: \(generalised\b[^)]*\))?: [\d,]+ (?:sketches|photos) against ")
_OF_UNSEEN = re.compile(r"(\d+)(?: of (\d+))? unseen classes of (\S+)")
_WANTED = "a file of 'sbtk bench map --json'"
_MAKE_ONE = "sbtk bench map DATA --json > results.json"


@dataclass(frozen=True)
class MeasuredMap:
    """One measurement of `sbtk bench map`.

    Attributes:
        name: the model's id and precision.
        dim: length of the embedding, in bits if `bits` is given; `None` if unknown.
        bits: length of the binary code; `None` for real-valued embeddings.
        split: split that defines the unseen classes; empty if unknown.
        of: the classes in words.
        is_unseen: whether the classes are unseen.
        is_whole: whether they are all of the split's unseen classes.
        setting: as `Protocol.setting`.
        is_sketch_query: whether the queries are sketches, not photos.
        has_duplicates: whether photos may occur twice; `None` if unknown.
        queries, photos: numbers of queries and photos.
        metrics: values in 0..1 by name.
        class_map: mean AP in 0..1 by class.
        protocol: the rules in words.
    """

    name: str
    dim: int | None
    bits: int | None
    split: str
    of: str
    is_unseen: bool
    is_whole: bool
    setting: Setting
    is_sketch_query: bool
    has_duplicates: bool | None
    queries: int
    photos: int
    metrics: dict[str, float]
    class_map: dict[str, float]
    protocol: str

    @property
    def is_generalised(self) -> bool:
        """Whether the gallery holds photos of seen classes."""
        return self.setting != "zero-shot"


def read_measured(path: Path) -> list[MeasuredMap]:
    """Return the measurements in a file of `sbtk bench map --json`, in order.

    Raises:
        BadData: the file cannot be read, or has no measurements.
    """
    shown = printable_name(path)
    content = _json_object(path, shown)
    reports = content.get("map", [content] if "figures" in content else None)
    if not isinstance(reports, list) or not reports:
        raise BadData(f"{shown} has no measurement of mAP", _WANTED, _MAKE_ONE)
    return [_parse_measurement(report, shown) for report in reports]


def _json_object(path: Path, shown: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RESULTS_BYTES + 1)
    except OSError as problem:
        raise BadData(
            f"{shown} cannot be read: {problem.strerror}", _WANTED, _MAKE_ONE
        ) from problem
    if len(data) > MAX_RESULTS_BYTES:
        raise BadData(f"{shown} is larger than {MAX_RESULTS_BYTES:,} bytes", _WANTED, _MAKE_ONE)
    if not data.strip():
        raise BadData(f"{shown} is empty", _WANTED, _MAKE_ONE)
    if not data.lstrip().startswith((b"{", b"[")):
        raise BadData(f"{shown} is not JSON", _WANTED, _MAKE_ONE)
    try:
        content = json.loads(data.decode("utf-8"))
    # ValueError: not UTF-8, cut off, or a number with too many digits.
    except (ValueError, RecursionError) as problem:
        raise BadData(f"{shown} is not valid JSON: {problem}", _WANTED, _MAKE_ONE) from problem
    if not isinstance(content, dict):
        raise BadData(f"{shown} is a JSON {type(content).__name__}", _WANTED, _MAKE_ONE)
    return content


def _parse_measurement(report: object, shown: str) -> MeasuredMap:
    fields = _Fields(report, shown)
    protocol = fields.text("protocol")
    of = match[1] if (match := _OF.match(protocol)) else protocol
    rules = fields.optional_object("rules")
    unseen = _OF_UNSEEN.match(of)
    is_unseen = rules["classes"] == "unseen" if "classes" in rules else unseen is not None
    setting = rules.get("setting", "zero-shot")
    if setting not in SETTINGS:
        raise BadData(f"{shown}: a setting {setting!r}", ", ".join(SETTINGS))
    codes = rules.get("codes")
    bits = codes.get("bits") if isinstance(codes, dict) else None
    return MeasuredMap(
        name=f"{fields.text('model_id')} {fields.text('precision')}",
        dim=fields.optional_count("dim"),
        bits=bits if isinstance(bits, int) else None,
        split=printable_text(str(rules.get("split") or (unseen[3] if unseen else ""))),
        of=of,
        is_unseen=is_unseen,
        is_whole=unseen is not None and unseen[2] is None,
        setting=setting,
        is_sketch_query=rules.get("queries", "sketch") == "sketch",
        has_duplicates=rules.get("keeps_duplicates"),
        queries=fields.count("queries"),
        photos=fields.count("photos"),
        metrics=fields.shares("figures"),
        class_map=fields.shares("class_map", is_required=False),
        protocol=protocol,
    )


class _Fields:
    """The fields of a JSON object, checked on access."""

    def __init__(self, value: object, shown: str) -> None:
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise BadData(f"{shown}: a measurement is a JSON {kind}", "an object", _MAKE_ONE)
        self._value: dict[str, Any] = value
        self._shown = shown

    def text(self, key: str) -> str:
        found = self._value.get(key)
        return printable_text(found) if isinstance(found, str) else self._refuse(key, "a text")

    def count(self, key: str) -> int:
        found = self.optional_count(key)
        return self._refuse(key, "a number") if found is None else found

    def optional_count(self, key: str) -> int | None:
        found = self._value.get(key)
        if found is None:
            return None
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            self._refuse(key, "a number of images or dimensions")
        return found

    def optional_object(self, key: str) -> dict[str, Any]:
        found = self._value.get(key) or {}
        return found if isinstance(found, dict) else self._refuse(key, "an object")

    def shares(self, key: str, *, is_required: bool = True) -> dict[str, float]:
        found = self._value.get(key)
        if found is None and not is_required:
            return {}
        if not isinstance(found, dict) or (is_required and not found):
            return self._refuse(key, "an object of figures")
        for name, value in found.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= 1:
                self._refuse(f"{key}[{name!r}]", "a number from 0 to 1", value)
        return {printable_text(name): float(value) for name, value in found.items()}

    def _refuse(self, key: str, expected: str, value: object = None) -> NoReturn:
        found = self._value.get(key) if value is None else value
        raise BadData(f"{self._shown}: {key} is {found!r}", expected, _MAKE_ONE)


_NAME = re.compile(r"(mAP|P)@(all|\d{1,9})(?: \((.+)\))?")


def parse_measure(name: str) -> Measure | None:
    """Return the measure with this name, or `None` if it is not an mAP or precision."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    words = (match[3] or "").split(", ")
    divisors: tuple[Divisor, ...] = get_args(Divisor)
    measure = Measure(
        "AP" if match[1] == "mAP" else "P",
        None if match[2] == "all" else int(match[2]),
        next((divisor for divisor in divisors if divisor in words), None),
        "VOC" in words,
        "class" if "class mean" in words else "query",
    )
    return measure if measure.name == name else None


def strip_rules(measure: Measure) -> str:
    """Return the name without its rules, as in papers: `mAP@200`."""
    return measure.name.partition(" ")[0]


def find_metric(names: Iterable[str], base: str) -> tuple[str, Measure] | None:
    """Return the metric `base`, such as `mAP@200`, by the rules closest to SAKE's and SBTKNet's.

    These are the mean over queries, the strict divisor and VOC's envelope, in order of importance.
    """
    measures = [(name, measure) for name in names if (measure := parse_measure(name)) is not None]
    found = [pair for pair in measures if strip_rules(pair[1]) == base]
    return min(found, key=lambda pair: _distance(pair[1]), default=None)


def _distance(measure: Measure) -> tuple[bool, bool, bool]:
    return (
        measure.mean != "query",
        measure.divisor not in (None, "strict"),
        measure.kind == "AP" and not measure.is_voc,
    )


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

    ap: Literal["plain", "voc"] | None
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
