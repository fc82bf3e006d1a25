"""Cost of a collection in PostgreSQL or Milvus: pushing, index, disk, memory, recall and latency.

The photos are synthetic, as in `large_gallery`. Without --at, the database from its package is
started: PostgreSQL without fsync, so that times are CPU times, or Milvus in a network namespace.

    python -m benchmarks.remote --count 20000 --folder /tmp/remote --engine milvus
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psycopg

from benchmarks.large_gallery import make_gallery
from benchmarks.result import Result, print_result
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.gallery.milvus_connection import MilvusConnection
from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.queries import Search
from sbtk_runtime.gallery.remote import open_store
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.generated_inputs import clustered_vectors
from sbtk_runtime.manifest import MANIFEST_NAME
from tests.milvus_server import MilvusServer
from tests.postgres_server import PostgresServer
from tests.tiny_remote import Server

_K = 10
_SOURCE = "made-up"
_ENGINES = {"postgres": PostgresServer, "milvus": MilvusServer}
#: Fetching all embeddings from Milvus takes seconds to minutes.
_EXACT_QUERIES = 3
_PATIENCE_S = 60
_INDEX_S = 3600


def measure(url: str, gallery: Path, queries: int, server: Server | None) -> dict[str, float]:
    """Push a gallery to an empty collection, and search it; times in seconds, sizes in bytes.

    What cannot be measured is NaN: with `--at`, the size of a collection in Milvus, and the memory
    of either database.
    """
    memory_before = math.nan if server is None else _memory(server)
    begun: list[float] = []
    started = time.perf_counter()
    store = open_store(url, patience_s=_PATIENCE_S)
    report = push_gallery(
        gallery, store, _SOURCE, notify=lambda text: begun.append(time.perf_counter())
    )
    ended = time.perf_counter()
    address = Address.parse(url)
    rows_end = ended
    if address.kind == "milvus":
        _wait_for_milvus(address)
        ended = time.perf_counter()
    elif begun:
        rows_end = begun[0]
    figures = {"photos": report.live, "rows_s": rows_end - started, "index_s": ended - rows_end}
    figures["again_s"] = push_gallery(gallery, store, _SOURCE).seconds
    dim = Bundle.open().manifest.dim
    asked = clustered_vectors(queries, dim, seed=0, of=report.live)
    with RemoteGallery.open(url, patience_s=_PATIENCE_S) as there:
        folder = max(there.folders(), key=lambda path: there.folders()[path])
        _, figures["exact_p50_s"], figures["exact_p95_s"] = _search(
            there, asked[:_EXACT_QUERIES], "exact"
        )
        found, figures["auto_p50_s"], figures["auto_p95_s"] = _search(there, asked, "auto")
        _, figures["folder_p50_s"], figures["folder_p95_s"] = _search(there, asked, "auto", folder)
    right = _nearest(clustered_vectors(report.live, dim, seed=0), asked)
    shared = [len(one & other) / _K for one, other in zip(right, found, strict=True)]
    figures["recall"] = float(np.mean(shared))
    sizes = _milvus_sizes(server) if address.kind == "milvus" else _postgres_sizes(address)
    memory = math.nan if server is None else _memory(server)
    return figures | sizes | {"memory_before_bytes": memory_before, "memory_bytes": memory}


def _search(
    there: RemoteGallery, asked: Embeddings, search: Search, under: str | None = None
) -> tuple[list[set[int]], float, float]:
    """Return the numbers of the hits of each query, and median and 95th percentile of seconds."""
    there.answer(asked[0], _K, search, under=under)
    answers, seconds = [], []
    for query in asked:
        started = time.perf_counter()
        answer = there.answer(query, _K, search, under=under)
        seconds.append(time.perf_counter() - started)
        answers.append({int(Path(hit.path).stem.removeprefix("IMG_")) for hit in answer.hits})
    return answers, float(np.median(seconds)), float(np.percentile(seconds, 95))


def _nearest(rows: Embeddings, asked: Embeddings) -> list[set[int]]:
    """Return the numbers of the photos that are nearest to each query."""
    stored = rows.astype(np.float16)
    return [
        set(np.argpartition(-(stored.astype(np.float32) @ query), _K)[:_K].tolist())
        for query in asked
    ]


def _wait_for_milvus(address: Address) -> None:
    """Return when the index has all rows; Milvus builds it of segments that are full or flushed."""
    connection, name = MilvusConnection(address, _PATIENCE_S), address.collection
    connection.run(lambda client: client.flush(name, timeout=_INDEX_S))
    ends = time.monotonic() + _INDEX_S
    while time.monotonic() < ends:
        state = connection.run(lambda client: client.describe_index(name, "embedding"))
        if state["pending_index_rows"] == 0 and state["indexed_rows"] >= state["total_rows"] > 0:
            connection.close()
            return
        time.sleep(0.2)
    raise TimeoutError(f"Milvus has not built its index within {_INDEX_S} s: {state}")


def _postgres_sizes(address: Address) -> dict[str, float]:
    """Return the bytes of the rows, of the index of embeddings, and of everything."""
    statement = """SELECT pg_table_size(%(photos)s::regclass),
        coalesce(pg_relation_size(to_regclass(%(index)s)), 0),
        pg_total_relation_size(%(photos)s::regclass)"""
    names = {"photos": address.collection, "index": f"{address.collection}_by_embedding"}
    with psycopg.connect(address.url) as connection:
        found = connection.execute(statement, names).fetchone()
    assert found is not None
    return dict(zip(("table_bytes", "index_bytes", "bytes"), map(float, found), strict=True))


def _milvus_sizes(server: Server | None) -> dict[str, float]:
    """Return the bytes of the rows, of the index of embeddings, and of both.

    The queue of messages and etcd, which have a size of their own, do not count.
    """
    rows, index = math.nan, math.nan
    if server is not None:
        data = server.place / "data"
        logs = ("insert_log", "delta_log", "stats_log")
        rows = sum(_folder_bytes(data / name) for name in logs)
        index = _folder_bytes(data / "index_files")
    return {"table_bytes": rows, "index_bytes": index, "bytes": rows + index}


def _folder_bytes(folder: Path) -> float:
    return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def _memory(server: Server) -> float:
    """Return the bytes of memory of a server's processes; what they share counts once."""
    total = 0.0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            group = int(status.read_text().rpartition(")")[2].split()[2])
            if group == server.pid:
                lines = (status.parent / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return total * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures as Markdown, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, required=True, help="made if it does not exist")
    parser.add_argument("--engine", choices=list(_ENGINES), default="postgres")
    parser.add_argument("--at", metavar="URL", help="an empty collection, instead of --engine")
    parser.add_argument("--memory", default="1GB", help="PostgreSQL's to build its index with")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    gallery = options.folder / f"{options.count}.sbtk"
    if not (gallery / MANIFEST_NAME).exists():
        photos = options.folder / f"photos-{options.count}"
        make_gallery(gallery, options.count, Bundle.open(), photos)
    if options.at:
        engine = Address.parse(options.at).kind
        figures = measure(options.at, gallery, options.queries, None)
    else:
        engine = options.engine
        server = _ENGINES[engine]()
        try:
            # A large index needs memory to build.
            memory = {"options": f"-c%20maintenance_work_mem%3D{options.memory}"}
            url = server.url(**memory) if engine == "postgres" else server.url()
            figures = measure(url, gallery, options.queries, server)
        finally:
            server.close()
    result = _result(figures, engine, options.queries)
    print_result(result, "benchmarks.remote", as_json=options.json)


def _result(figures: dict[str, float], engine: str, queries: int) -> Result:
    photos = figures["photos"]

    def rate(seconds: float) -> str:
        return f"{seconds:.1f} s ({photos / max(seconds, 1e-9):,.0f} photos/s)"

    def latency(name: str) -> str:
        return f"{1e3 * figures[f'{name}_p50_s']:.1f} ms, {1e3 * figures[f'{name}_p95_s']:.1f} ms"

    def size(name: str) -> str:
        found = figures[f"{name}bytes"]
        return "not measured" if math.isnan(found) else f"{found / photos:,.0f} B a photo"

    megabytes = [figures[f"memory_{when}bytes"] / 1e6 for when in ("before_", "")]
    memory = (
        "not measured" if math.isnan(megabytes[0]) else "{:,.0f} MB, {:,.0f} MB".format(*megabytes)
    )
    rows = [
        ("rows sent", rate(figures["rows_s"])),
        ("index built", rate(figures["index_s"]) if figures["index_s"] > 1 else "none yet"),
        ("pushed again, nothing new", rate(figures["again_s"])),
        ("rows on disk", size("table_")),
        ("index of embeddings", size("index_")),
        ("everything", size("")),
        ("memory of the server, before and after", memory),
        (f"recall@{_K} of auto", f"{figures['recall']:.4f}"),
        ("exact: p50, p95", latency("exact")),
        ("auto: p50, p95", latency("auto")),
        ("auto below one folder: p50, p95", latency("folder")),
    ]
    notes = [
        f"{queries} queries, {_EXACT_QUERIES} exact ones, one at a time, after one that was not "
        "counted"
    ]
    name = {"postgres": "PostgreSQL", "milvus": "Milvus"}[engine]
    return Result(f"{photos:,.0f} photos in {name}", ("what", "measured"), rows, figures, notes)


if __name__ == "__main__":
    main()
