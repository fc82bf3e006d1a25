"""Evaluation of embeddings, or of binary codes made from them, by a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sbtk_runtime.binary_codes import Codes, Itq, fit_itq
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.metrics import (
    AP_CUTS,
    PRECISION_CUTS,
    Embeddings,
    Labels,
    Retrieval,
    evaluate,
)
from sbtk_runtime.evaluation.protocol import CodeRule, Protocol
from sbtk_runtime.files import printable_text

#: Queries per class in photo-to-photo retrieval (SAKE, DSN).
PHOTO_QUERIES_PER_CLASS = 10
#: Largest difference between the embeddings of equal images, in batches of different sizes.
_SAME_WITHIN = 1e-5


@dataclass(frozen=True)
class Labelled:
    """Embeddings `(N, D) float32` and their classes `(N,) int64`."""

    rows: Embeddings
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


def evaluate_by(
    protocol: Protocol,
    queries: Labelled,
    gallery: Labelled,
    *,
    learnt_on: Embeddings | Itq | None = None,
    ap_cuts: Sequence[int] = AP_CUTS,
    precision_cuts: Sequence[int] = PRECISION_CUTS,
) -> tuple[Retrieval, Protocol]:
    """Return the metrics, and the protocol with the number of embeddings ITQ was fitted on.

    >>> from sbtk_runtime import Measure
    >>> rows = np.eye(4, dtype=np.float32)
    >>> photos = Labelled(rows, np.array([0, 0, 1, 1]))
    >>> sketches = Labelled(rows[::2], np.array([0, 1]))
    >>> retrieval, _ = evaluate_by(Protocol(), sketches, photos)
    >>> retrieval.metrics([Measure("AP")])
    {'mAP@all': 0.875}

    Args:
        protocol: distance, ties and codes; the caller selects queries and gallery by it.
        queries: sketches, or photos selected by `photo_queries`.
        gallery: photos.
        learnt_on: embeddings `(N, D) float32` of training images to fit ITQ on, or a fitted ITQ,
            if the protocol needs them.
        ap_cuts: ranks k of AP@k.
        precision_cuts: ranks k of P@k.

    Raises:
        BadConfig: the protocol needs `learnt_on`, and it is missing.
        BadData: as `evaluate` and `fit_itq`; or all queries, or all photos, have the same
            embedding or code.
    """
    query_rows: Embeddings | Codes = queries.rows
    searched: Embeddings | Codes = gallery.rows
    if protocol.codes is not None:
        for_queries, for_gallery, rule = _itq(protocol.codes, queries, gallery, learnt_on)
        query_rows, searched = for_queries.codes(queries.rows), for_gallery.codes(gallery.rows)
        protocol = replace(protocol, codes=rule)
    _require_difference(query_rows, "queries")
    _require_difference(searched, "photos")
    retrieval = evaluate(
        query_rows,
        queries.labels,
        searched,
        gallery.labels,
        distance=protocol.distance,
        ties=protocol.ties,
        rerank=protocol.rerank,
        ap_cuts=ap_cuts,
        precision_cuts=precision_cuts,
    )
    return retrieval, protocol


def _require_difference(rows: Embeddings | Codes, what: str) -> None:
    """Refuse several rows that are all the same, apart from rounding of embeddings."""
    if len(rows) < 2 or float(np.ptp(rows, axis=0).max()) > _SAME_WITHIN:
        return
    kind = "code" if rows.dtype == np.uint8 else "embedding"
    raise BadData(
        f"all {len(rows):,} {what} have the same {kind}: metrics would not be those of a search",
        "images that differ, and a model that tells them apart",
        "compare some of the images; check the model with 'sbtk models'",
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


def _itq(
    rule: CodeRule, queries: Labelled, gallery: Labelled, learnt_on: Embeddings | Itq | None
) -> tuple[Itq, Itq, CodeRule]:
    """Return the ITQ of the queries, that of the gallery, and the rule with `fitted_rows` set."""
    if rule.fitted_on == "bundle":
        if not isinstance(learnt_on, Itq) or learnt_on.bits != rule.bits:
            raise BadConfig(f"{rule.bits}-bit codes of a bundle that has none", "its own ITQ")
        return learnt_on, learnt_on, rule
    if rule.fitted_on == "training":
        if learnt_on is None or isinstance(learnt_on, Itq):
            raise BadConfig("ITQ fitted on training images without any", "their embeddings")
        rows = learnt_on
    else:
        rows = queries.rows if rule.fitted_on == "queries" else gallery.rows
    itq = fit_itq(rows, rule.bits, rotation=rule.rotation)
    rule = replace(rule, fitted_rows=len(rows))
    own = itq.centred_on(gallery.rows) if rule.fitted_on == "queries" else itq
    return itq, own, rule
