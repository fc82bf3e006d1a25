"""Time and memory to open a saved index in a new process and ask it one query.

    python -m benchmarks.cold_open [--count 1000000] [--folder /tmp]

Indexes of hnswlib, faiss and usearch over the vectors of `sbtk bench search --synthetic`. Graphs
are built with a small `ef_construction`, which changes neither their size nor the time to open
them. Libraries that are not installed are left out. For the sign codes of a gallery, see
`benchmarks.large_gallery`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commands import resident_bytes, run
from benchmarks.result import Result, print_result
from sbtk_runtime.evaluation.bench.search import Embeddings
from sbtk_runtime.generated_inputs import clustered_vectors
from sbtk_runtime.machine import cpu_threads

_DIM, _M, _EF_CONSTRUCTION, _EF, _K = 512, 16, 10, 128, 10
_REPEATS = 3
#: Asks an opened index for the best rows of a query.
Ask = Callable[[Embeddings], Any]


def save_hnswlib(vectors: Embeddings, file: str) -> None:
    """Build a graph, and save it."""
    import hnswlib

    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), ef_construction=_EF_CONSTRUCTION, M=_M)
    index.add_items(vectors, num_threads=cpu_threads())
    index.save_index(file)


def open_hnswlib(file: str) -> Ask:
    """Read a graph into memory."""
    import hnswlib

    index = hnswlib.Index("ip", _DIM)
    index.load_index(file)
    index.set_ef(_EF)
    return lambda query: index.knn_query(query, k=_K, num_threads=1)


def save_faiss_hnsw(vectors: Embeddings, file: str) -> None:
    """Build a graph, and save it."""
    import faiss

    index = faiss.IndexHNSWFlat(vectors.shape[1], _M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _EF_CONSTRUCTION
    index.add(vectors)
    faiss.write_index(index, file)


def save_faiss_ivf(vectors: Embeddings, file: str) -> None:
    """Build inverted lists of product codes, and save them, with float16 vectors to score hits."""
    import faiss

    lists = max(1, min(len(vectors) // 40, int(4 * len(vectors) ** 0.5)))
    kind = f"IVF{lists},PQ{_DIM // 4}x4fs,Refine(SQfp16)"
    index = faiss.index_factory(_DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // (8 * lists))])
    index.add(vectors)
    faiss.write_index(index, file)


def open_faiss(file: str) -> Ask:
    """Read an index into memory."""
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.read_index(file)
    return lambda query: index.search(query[None], _K)


def save_usearch(vectors: Embeddings, file: str) -> None:
    """Build a graph of float16 vectors, and save it."""
    from usearch.index import Index

    index = Index(
        ndim=vectors.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=_M,
        expansion_add=_EF_CONSTRUCTION,
    )
    index.add(np.arange(len(vectors)), vectors, threads=cpu_threads())
    index.save(file)


def open_usearch(file: str, *, view: bool = False) -> Ask:
    """Read a graph into memory, or map its file."""
    from usearch.index import Index

    index = Index.restore(file, view=view)
    assert index is not None
    return lambda query: index.search(query, _K, threads=1)


def view_usearch(file: str) -> Ask:
    """Map the file of a graph into memory."""
    return open_usearch(file, view=True)


#: The library, how an index is saved, and the ways to open it, by their names.
_WAYS: dict[str, tuple[str, Callable[[Embeddings, str], None], dict[str, Callable[[str], Ask]]]] = {
    "hnswlib": ("hnswlib", save_hnswlib, {"hnswlib": open_hnswlib}),
    "faiss HNSW": ("faiss", save_faiss_hnsw, {"faiss HNSW": open_faiss}),
    "faiss IVF-PQ": ("faiss", save_faiss_ivf, {"faiss IVF-PQ": open_faiss}),
    "usearch": (
        "usearch",
        save_usearch,
        {"usearch": open_usearch, "usearch, mapped": view_usearch},
    ),
}


def measure(count: int, folder: Path) -> Result:
    """Save each index once, and open it in new processes."""
    vectors = clustered_vectors(count, _DIM)
    query = folder / "query.npy"
    np.save(query, clustered_vectors(1, _DIM, of=count)[0])
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    for library, save, openers in _WAYS.values():
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed, and not measured", file=sys.stderr)
            continue
        file = folder / "index"
        save(vectors, str(file))
        for name in openers:
            command = [sys.executable, "-m", "benchmarks.cold_open", "--open", name]
            opened = [json.loads(run([*command, str(file), str(query)])) for _ in range(_REPEATS)]
            found = {key: statistics.median(one[key] for one in opened) for key in opened[0]}
            figures[name] = found | {"file_bytes": file.stat().st_size}
            rows.append(
                [
                    name,
                    f"{file.stat().st_size / 1e6:,.0f} MB",
                    f"{found['open_s']:.2f} s",
                    f"{found['query_s'] * 1e3:.1f} ms",
                    f"{found['memory_bytes'] / 1e6:,.0f} MB",
                ]
            )
        file.unlink()
    return Result(
        title=f"Opening an index of {count:,} x {_DIM}",
        columns=["index", "file", "open", "first query", "memory"],
        rows=rows,
        figures=figures,
        notes=[
            f"medians of {_REPEATS} processes; files in the page cache, the library is imported "
            "before",
            "memory is the growth of the process, mapped pages included",
        ],
    )


def open_once(name: str, file: str, query_file: str) -> dict[str, float]:
    """Return seconds to open the index and to ask it once, and the growth of this process."""
    library, _, openers = next(way for way in _WAYS.values() if name in way[2])
    importlib.import_module(library)
    query = np.load(query_file)
    before = resident_bytes(os.getpid())
    started = time.perf_counter()
    ask = openers[name](file)
    opened = time.perf_counter()
    ask(query)
    ended = time.perf_counter()
    return {
        "open_s": opened - started,
        "query_s": ended - opened,
        "memory_bytes": resident_bytes(os.getpid()) - before,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="for the saved indexes; needs 2.3 kB a vector")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--open", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_once(*options.open)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options.count, Path(folder))
    print_result(result, "benchmarks.cold_open", as_json=options.json)


if __name__ == "__main__":
    main()
