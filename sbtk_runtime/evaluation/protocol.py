"""Rules of retrieval metrics: how images are selected, ranked, cut and averaged.

Publications differ in all of these rules, so each is stated: a `Protocol` holds the rules that all
metrics of an evaluation share, a `Measure` the rules of one metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Rotation
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import printable_text
from sbtk_runtime.rerank import RERANK_WORDS, Rerank, require_rerank

QueryKind = Literal["sketch", "photo"]
Setting = Literal["zero-shot", "generalised-20", "generalised-all"]
Distance = Literal["cosine", "euclidean", "hamming"]
Ties = Literal["index", "expected"]
FittedOn = Literal["gallery", "training", "queries", "bundle"]
Kind = Literal["AP", "P"]
Divisor = Literal["strict", "lenient", "literal"]
Mean = Literal["query", "class"]
Labels = NDArray[np.int64]

#: Queries per class in photo-to-photo retrieval (SAKE, DSN).
PHOTO_QUERIES_PER_CLASS = 10
DIVISORS: tuple[Divisor, ...] = ("strict", "lenient", "literal")

_DISTANCES = {
    "cosine": "cosine of unit embeddings",
    "euclidean": "Euclidean distance of embeddings",
}
_TIES = {
    "index": "equal scores in gallery order",
    "expected": "expected value over all orders of equal scores",
}
_SETTINGS = {
    "zero-shot": "",
    "generalised-20": "generalised, 20 % more of seen classes on both sides",
    "generalised-all": "generalised, all photos of seen classes in the gallery",
}
_DIVIDED = {
    "strict": "divided by min({k}, R)",
    "lenient": "divided by the hits within it",
    "literal": "divided by R (the SBTKNet paper's Eq. 7)",
}
_MEANS = {"query": "mean over queries", "class": "mean over classes of each class's mean (DSN)"}


@dataclass(frozen=True)
class CodeRule:
    """How embeddings become binary codes.

    Attributes:
        bits: length of a code.
        fitted_on: the embeddings that ITQ is fitted on: those of the gallery, of training images,
            or, as in DSN, of the queries, where each side is centred on its own mean. `bundle` is
            the model's own ITQ, fitted on training images at export.
        rotation: as for `fit_itq`.
        fitted_rows: number of embeddings ITQ was fitted on; `None` before.
    """

    bits: int = 64
    fitted_on: FittedOn = "gallery"
    rotation: Rotation = "procrustes"
    fitted_rows: int | None = None

    @property
    def words(self) -> str:
        """The rule in words."""
        count = "" if self.fitted_rows is None else f"{self.fitted_rows:,} "
        on = {
            "gallery": f"fitted on the {count}photos of the gallery",
            "training": f"fitted on {count}training images",
            "queries": f"fitted on the {count}queries, each side centred on its own mean",
            "bundle": "of the bundle, fitted on training images",
        }[self.fitted_on]
        released = "" if self.rotation == "procrustes" else ", rotation as released"
        return f"{self.bits}-bit codes by ITQ {on}{released}"


@dataclass(frozen=True)
class Protocol:
    """Rules that all metrics of an evaluation share.

    Attributes:
        queries: sketches, or photos (the first ten of each class, as in SAKE).
        setting: `zero-shot`; `generalised-20`, as in SEM-PCYC: seen images, a fifth as many as the
            unseen ones, join both sides; `generalised-all`: unseen queries against all photos.
        distance: distance to rank by; `hamming` for codes.
        ties: rank equal scores in gallery order, or take expected values over all their orders.
        keeps_duplicates: whether photos of the same name and class count more than once.
        codes: how binary codes are made; `None` for real-valued embeddings.
        split: split that defines the unseen classes; empty if unknown.
        classes: classes to evaluate: `unseen`, or seen ones that were held out.
        rerank: re-ranking of the gallery; see `sbtk_runtime.rerank`.
    """

    queries: QueryKind = "sketch"
    setting: Setting = "zero-shot"
    distance: Distance = "cosine"
    ties: Ties = "index"
    keeps_duplicates: bool = False
    codes: CodeRule | None = None
    split: str = ""
    classes: Literal["unseen", "validation"] = "unseen"
    rerank: Rerank = "none"

    def __post_init__(self) -> None:
        if (self.codes is None) == (self.distance == "hamming"):
            bits = "no binary codes" if self.codes is None else f"{self.codes.bits}-bit codes"
            raise BadConfig(
                f"{self.distance} distance of {bits}",
                "Hamming distance for codes, another for embeddings",
            )
        if self.rerank != "none":
            require_cosine(self.rerank, self.distance)
        if self.queries == "photo" and self.setting != "zero-shot":
            raise BadConfig(
                f"photos as queries in the {self.setting} setting", "the zero-shot setting"
            )

    @property
    def ranking(self) -> str:
        """How the gallery is ranked, in words."""
        by = f"Hamming distance of {self.codes.words}" if self.codes else _DISTANCES[self.distance]
        kept = "; duplicate photos kept" if self.keeps_duplicates else ""
        again = "" if self.rerank == "none" else f"; RE-RANKED: {RERANK_WORDS[self.rerank]}"
        return f"{by}{again}; {_TIES[self.ties]}{kept}"

    @property
    def setting_words(self) -> str:
        """The setting in words; empty for zero-shot."""
        return _SETTINGS[self.setting]

    def to_json(self) -> dict[str, Any]:
        """Return the rules as a JSON object; `codes` is null for real-valued embeddings."""
        return asdict(self)


#: The default protocol.
ZERO_SHOT = Protocol()


def require_cosine(rerank: Rerank, distance: Distance) -> None:
    """Check that a re-ranking exists and that the distance is the cosine.

    Raises:
        BadConfig: one of them is not so.
    """
    require_rerank(rerank)
    if distance != "cosine":
        raise BadConfig(f"--rerank {rerank} with {distance} distance", "cosine distance")


@dataclass(frozen=True)
class Measure:
    """The rules of one metric, besides those of the protocol.

    Attributes:
        kind: average precision, or precision.
        cut: rank after which the list is cut; `None` for the whole gallery.
        divisor: divisor of AP@k: `min(k, R)`, the hits within k, or R; `None` without a cut.
        is_voc: whether precisions are replaced by their envelope, as in SAKE and DSN.
        mean: over queries, or over the means of classes.
    """

    kind: Kind
    cut: int | None = None
    divisor: Divisor | None = None
    is_voc: bool = False
    mean: Mean = "query"

    @property
    def name(self) -> str:
        """The metric's name, which states its rules, such as `mAP@200 (strict, VOC)`."""
        rules = [self.divisor or "", "VOC" * self.is_voc, "class mean" * (self.mean == "class")]
        shown = ", ".join(rule for rule in rules if rule)
        base = f"{'mAP' if self.kind == 'AP' else 'P'}@{'all' if self.cut is None else self.cut}"
        return f"{base} ({shown})" if shown else base

    @property
    def of_queries(self) -> Measure:
        """The same measure with the mean over queries."""
        return replace(self, mean="query")

    @property
    def definition(self) -> str:
        """The rule in words."""
        mean = _MEANS[self.mean]
        if self.kind == "P":
            return f"share of relevant photos among the first {self.cut}; {mean}"
        ap = "AP with the precision envelope (SAKE, DSN)" if self.is_voc else "plain AP"
        if self.divisor is None:
            total = "" if self.is_voc else ", sum_i P@i rel_i / R"
            return f"{ap} over the whole gallery{total}; {mean}"
        divided = _DIVIDED[self.divisor].format(k=self.cut)
        return f"{ap}, cut after rank {self.cut}, {divided}; {mean}"

    def to_json(self) -> dict[str, Any]:
        """Return the rule as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Labelled:
    """Embeddings `(N, D) float32` and their classes `(N,) int64`."""

    rows: NDArray[np.float32]
    labels: Labels

    def choose(self, which: Labels) -> Labelled:
        """Return the rows at the indices `which (n,) int64`, in that order."""
        return Labelled(self.rows[which], self.labels[which])


def require_contrast(
    query_labels: Sequence[int] | Labels,
    gallery_labels: Sequence[int] | Labels,
    classes: Sequence[str],
) -> None:
    """Check that metrics depend on the ranking.

    Args:
        query_labels: `(Q,)` indices in `classes`.
        gallery_labels: `(N,)` indices in `classes`.
        classes: names of the classes.

    Raises:
        BadData: no query has a photo of its class, or all photos are of one class.
    """
    present = np.unique(gallery_labels)
    if not np.isin(query_labels, present).any():
        raise BadData(
            "no query has a photo of its class in the gallery",
            "queries and photos of the same classes",
        )
    if len(present) == 1:
        raise BadData(
            f"all {len(gallery_labels):,} photos are of the class "
            f"{printable_text(classes[present[0]])}: mAP is 1 whatever their order",
            "photos of at least two classes",
            "add photos of other classes; sbtk bench map --setting generalised-all searches those "
            "of seen classes, too",
        )


def photo_queries(photos: Labelled) -> tuple[Labelled, Labelled]:
    """Return queries and gallery of photo-to-photo retrieval.

    The first ten photos of each class are queries and not in the gallery, as in SAKE and DSN.

    >>> photos = Labelled(np.eye(11, dtype=np.float32), np.zeros(11, dtype=np.int64))
    >>> queries, gallery = photo_queries(photos)
    >>> len(queries.rows), len(gallery.rows)
    (10, 1)

    Raises:
        BadData: no class has more photos, so the gallery would be empty.
    """
    is_query = np.zeros(len(photos.labels), dtype=np.bool_)
    for label in np.unique(photos.labels):
        is_query[np.flatnonzero(photos.labels == label)[:PHOTO_QUERIES_PER_CLASS]] = True
    if is_query.all():
        most = int(np.unique(photos.labels, return_counts=True)[1].max(initial=0))
        raise BadData(
            f"the gallery is empty: the first {PHOTO_QUERIES_PER_CLASS} photos of each class are "
            f"queries, and no class has more than {most}",
            f"a class of at least {PHOTO_QUERIES_PER_CLASS + 1} photos",
            "add photos, or use sketches as queries",
        )
    return photos.choose(np.flatnonzero(is_query)), photos.choose(np.flatnonzero(~is_query))


Rows = NDArray[np.int64]

_SHARE = 0.2
_SEED = 0
#: Classes that SEM-PCYC's code draws before it draws images: number of classes, number drawn.
_DRAWN_BEFORE = {
    "SK-SH-sempcyc": ((125, 100), (25, 12)),
    "TUB-SH-sempcyc": ((250, 220), (30, 15)),
}


@dataclass(frozen=True)
class SeenDraw:
    """Seen images that join: rows of the given names, in the order of `class/file`."""

    sketches: Rows
    photos: Rows


def draw_seen(
    sketches: Sequence[str],
    photos: Sequence[str],
    *,
    unseen_sketches: int,
    unseen_photos: int,
    split: str = "",
) -> SeenDraw:
    """Draw the seen images that join in SEM-PCYC's generalised setting.

    >>> sketches = [f"cat/{number}.png" for number in range(9)]
    >>> photos = [f"cat/{number}.jpg" for number in range(9)]
    >>> drawn = draw_seen(sketches, photos, unseen_sketches=10, unseen_photos=15)
    >>> len(drawn.sketches), len(drawn.photos)
    (2, 3)

    Args:
        sketches: `class/file` of the training sketches; a name counts once.
        photos: `class/file` of the training photos.
        unseen_sketches: number of unseen sketches.
        unseen_photos: number of unseen photos.
        split: name of the split that defines the unseen classes.

    Raises:
        BadData: there are fewer seen images than a fifth of the unseen ones.
    """
    generator = np.random.RandomState(_SEED)
    for classes, drawn in _DRAWN_BEFORE.get(split, ()):
        generator.choice(classes, drawn, replace=False)
    return SeenDraw(
        _draw(generator, sketches, unseen_sketches, "sketches"),
        _draw(generator, photos, unseen_photos, "photos"),
    )


def _draw(generator: np.random.RandomState, names: Sequence[str], unseen: int, kind: str) -> Rows:
    """Return the drawn rows, in the order of their names."""
    first = np.unique(np.array(names, dtype=np.str_), return_index=True)[1]
    wanted = int(_SHARE * unseen)
    if wanted > len(first):
        raise BadData(
            f"{len(first)} {kind} of seen classes",
            f"at least {wanted}, a fifth of the {unseen} unseen ones",
            "add seen classes, or use another --setting",
        )
    return first[np.sort(generator.choice(len(first), wanted, replace=False))].astype(np.int64)
