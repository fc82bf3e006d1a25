"""Recall of sign codes, by transform, number of candidates and drift of the centre.

    sbtk embed --from-file photos.txt --as photo -o photos.npz
    sbtk embed --from-file sketches.txt --as sketch -o sketches.npz
    python -m benchmarks.sign_code_recall photos.npz sketches.npz

Every sixth sketch, at most 520, is searched among all photos. Recall@10 counts the candidates that
score at least as high as the tenth hit of exact search, since exact scoring finds all of these.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Itq, code_words, word_distances

Embeddings = NDArray[np.float32]

_K = 10
_TOLERANCE = 1e-6


def recalls(
    photos: Embeddings, queries: Embeddings, transform: Itq, sizes: list[tuple[int, int]]
) -> list[float]:
    """Return recall@10 for each of `sizes`: nearest by Hamming distance, and best estimates.

    Args:
        photos: `(N, D) float32` unit rows.
        queries: `(Q, D) float32` unit rows.
        transform: makes the codes.
        sizes: codes by Hamming distance, and how many of these are kept by their estimates.
    """
    codes = transform.codes(photos)
    words = code_words(codes)
    query_words = code_words(transform.codes(queries))
    found = np.zeros((len(queries), len(sizes)))
    for number, query in enumerate(queries):
        scores = photos @ query
        least = np.partition(scores, -_K)[-_K] - _TOLERANCE
        order = np.argsort(word_distances(query_words[:, number, None], words), kind="stable")
        for column, (near, kept) in enumerate(sizes):
            chosen = order[:near]
            signs = np.unpackbits(codes[chosen], axis=1).astype(np.float32)
            chosen = chosen[np.argsort(-(signs @ (query @ transform.projection)))[:kept]]
            found[number, column] = (scores[chosen] >= least).sum() / _K
    return [float(value) for value in np.minimum(found, 1.0).mean(axis=0)]


def main() -> None:
    """Print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="an .npz of 'sbtk embed --as photo'")
    parser.add_argument("queries", type=Path, help="an .npz of 'sbtk embed --as sketch'")
    options = parser.parse_args()
    with np.load(options.photos) as file:
        photos, paths = file["embeddings"], file["paths"]
    with np.load(options.queries) as file:
        queries = file["embeddings"][::6][:520]
    dim = photos.shape[1]
    normal = np.random.default_rng(20_241).standard_normal((dim, dim))
    turn = np.linalg.qr(normal)[0].astype(np.float32)
    none, mean = np.zeros(dim, dtype=np.float32), photos.mean(axis=0)
    sizes = [(100, 100), (200, 200), (500, 500), (500, 200), (1000, 200), (2000, 200)]
    print(f"{len(photos):,} photos, {len(queries)} sketches, {dim} bits\n")
    print("| codes | " + " | ".join(f"{near} -> {kept}" for near, kept in sizes) + " |")
    print("| --- " * (len(sizes) + 1) + "|")
    for name, transform in (
        ("signs of the embedding", Itq(none, np.eye(dim, dtype=np.float32))),
        ("turned", Itq(none, turn)),
        ("centred and turned", Itq(mean, turn)),
    ):
        values = recalls(photos, queries, transform, sizes)
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    print("\n| centre | drift | 200 -> 200 | 1000 -> 200 |\n| --- | --- | --- | --- |")
    spread = float(np.sqrt(1.0 - mean @ mean))
    folders = np.array([Path(path).parent.name for path in paths.tolist()])
    names, counts = np.unique(folders, return_counts=True)
    one = photos[folders == names[np.argsort(-counts)[3]]].mean(axis=0)
    for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
        centre = mean + share * (one - mean)
        drift = float(np.linalg.norm(centre - mean)) / spread
        values = recalls(photos, queries, Itq(centre, turn), [(200, 200), (1000, 200)])
        print(f"| {share:.0%} of the way to one class's | {drift:.2f} ", end="")
        print("| " + " | ".join(f"{value:.4f}" for value in values) + " |")


if __name__ == "__main__":
    main()
