"""Latency of the server for one client, in the server and at the client.

    python -m benchmarks.serve_latency [--photos FOLDER] [--count 1000] [--queries 300]

The server is `sbtk serve` with default options and the pretrained model; the client keeps its
connection and requests 24 hits.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import time

from benchmarks.result import Result, percentiles, print_result
from benchmarks.serving import Server, make_parser, serve_gallery
from sbtk_runtime.generated_inputs import generate_sketches

_WARM_UP = 20


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--queries", type=int, default=300)
    options = parser.parse_args()
    with serve_gallery(options) as (server, note):
        result = measure(server, options.queries, note)
    print_result(result, "benchmarks.serve_latency", as_json=options.json)


def measure(server: Server, queries: int, note: str) -> Result:
    """Measure sequential queries of one client."""
    in_server, at_client = _times_ms(server, generate_sketches(32), queries)
    engine = server.health()["engine"]
    named = {
        "in the server, body received to JSON": in_server,
        "at the client, request to answer": at_client,
    }
    figures = {name: percentiles(times) for name, times in named.items()}
    return Result(
        title="Latency of `sbtk serve` for one client",
        columns=["where", "p50", "p95", "fastest"],
        rows=[
            [name, *(f"{figure:.1f} ms" for figure in (found["p50"], found["p95"], found["min"]))]
            for name, found in figures.items()
        ],
        figures={"ms": figures, "ready_s": server.ready_s, "engine": engine},
        notes=[
            f"{queries} queries after {_WARM_UP} for warm-up, with 32 generated sketches "
            "(PNG); 24 hits each",
            f"a gallery of {note}",
            f"{engine['name']} {engine['version']}, {engine['precision']}, "
            f"{engine['threads']} threads; ready {server.ready_s:.2f} s after its start",
        ],
    )


def _times_ms(
    server: Server, sketches: list[bytes], queries: int
) -> tuple[list[float], list[float]]:
    """Return the times measured by the server and by the client."""
    in_server, at_client = [], []
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        for index in range(-_WARM_UP, queries):
            sketch = sketches[index % len(sketches)]
            started = time.perf_counter()
            connection.request("POST", "/v1/query?k=24", sketch, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            content = answer.read()
            taken_ms = (time.perf_counter() - started) * 1e3
            if answer.status != 200:
                sys.exit(f"the server answered {answer.status}: {content.decode()}")
            if index >= 0:
                in_server.append(float(json.loads(content)["took_ms"]))
                at_client.append(taken_ms)
    return in_server, at_client


if __name__ == "__main__":
    main()
