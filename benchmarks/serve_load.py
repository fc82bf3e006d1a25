"""Behaviour of the server under many simultaneous queries: responses, rejections and memory.

    python -m benchmarks.serve_load [--clients 200] [--photos FOLDER] [--count 1000] [--rounds 5]
    python -m benchmarks.serve_load --steady [--beside CHECKOUT] [--rounds 5]

All clients connect and send one query at the same moment. A rejected client retries after the time
in Retry-After, until it has its hits.

With `--steady`, 1, 4 and 8 clients send queries one after the other for some seconds, interleaved
with the engine alone. `--beside` also measures the server of another checkout, interleaved.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.commands import ROOT, resident_bytes
from benchmarks.result import Result, percentiles, print_result
from benchmarks.serving import Server, make_parser, serve_checkouts, serve_gallery
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import Engine, EngineOptions, Images
from sbtk_runtime.generated_inputs import generate_sketches

_GIVEN_UP_S = 120.0


@dataclass
class Round:
    """Results of the clients of one round; times are in seconds.

    Attributes:
        answers: number of responses by status; 0 is a failed connection.
        first: times of clients that succeeded at the first try.
        refused: times until a response of 503.
        until_answered: times from the start of the round until each client has its hits.
    """

    answers: Counter[int] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    until_answered: list[float] = field(default_factory=list)


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steady", action="store_true", help="measure queries per second")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="compare with its server")
    options = parser.parse_args()
    if options.steady:
        checkouts = [*([options.beside] if options.beside else []), ROOT]
        with serve_checkouts(options, checkouts) as (servers, note):
            names = ["before", "now"] if options.beside else ["sbtk serve"]
            found = measure_steady(
                dict(zip(names, servers, strict=True)), options.model, options.rounds, note
            )
        print_result(found, "benchmarks.serve_load", as_json=options.json)
        return
    with serve_gallery(options) as (server, note):
        result = measure(server, options.clients, options.rounds, note)
    print_result(result, "benchmarks.serve_load", as_json=options.json)


def measure(server: Server, clients: int, rounds: int, note: str) -> Result:
    """Run all rounds, after one for warm-up, and return their results."""
    sketches = generate_sketches(32)
    asyncio.run(_round(server.port, sketches, min(clients, 8)))
    idle = resident_bytes(server.pid)
    found = [asyncio.run(_round(server.port, sketches, clients)) for _ in range(rounds)]
    answers = sum((each.answers for each in found), Counter[int]())
    other = {status: count for status, count in answers.items() if status not in (200, 503)}
    times = {
        "hits at the first try": [time for each in found for time in each.first],
        "until 503": [time for each in found for time in each.refused],
        "until hits, with retries": [time for each in found for time in each.until_answered],
    }
    peak, after = resident_bytes(server.pid, "VmHWM"), resident_bytes(server.pid)
    return Result(
        title=f"`sbtk serve` under {clients} queries at once",
        columns=["what", "how many", "p50", "p95", "longest"],
        rows=[[name, f"{len(each):,}", *_row(each)] for name, each in times.items()],
        figures={
            "clients": clients,
            "rounds": rounds,
            "answers": {str(status): count for status, count in sorted(answers.items())},
            "seconds": {name: percentiles(each) for name, each in times.items() if each},
            "idle_bytes": idle,
            "peak_bytes": peak,
            "after_bytes": after,
        },
        notes=[
            f"{rounds} rounds of {clients} clients; {answers[200]:,} responses with hits, "
            f"{answers[503]:,} with 503, others: {other or 'none'}",
            f"resident memory {idle / 1e6:.0f} MB idle, {peak / 1e6:.0f} MB at its peak, "
            f"{after / 1e6:.0f} MB after; 1 MB is 1,000,000 bytes",
            f"gallery of {note}; 24 hits each; the clients run on the same cores",
        ],
    )


_STEADY_CLIENTS = (1, 4, 8)
_TURN_S = 4.0


def measure_steady(servers: dict[str, Server], model: str | None, rounds: int, note: str) -> Result:
    """Measure the queries per second of servers and of the engine alone, interleaved."""
    sketches = generate_sketches(32)
    per_s: dict[str, list[float]] = {}
    core_ms: dict[str, list[float]] = {}
    client_ms: list[float] = []
    info = servers[next(iter(servers))].health()["engine"]
    chosen = EngineOptions(info["name"], info["precision"])
    with Embedder(model, chosen) as embedder, Embedder(model, chosen, lazy=True) as with_lanes:
        prepared = [embedder.bundle.preprocessing.prepare(each, "sketch") for each in sketches]
        pixels = [each.pixels[None] for each in prepared]
        for number in range(rounds + 1):  # the first round is for warm-up
            turns = [
                ("the engine alone", _engine_turn(embedder.engine, pixels)),
                ("the engine alone, a lane per thread", _engine_turn(with_lanes.engine, pixels)),
            ]
            for name, server in servers.items():
                for clients in _STEADY_CLIENTS:
                    cpu_begun = time.process_time()
                    turn = _server_turn(server, sketches, clients)
                    client_ms.append((time.process_time() - cpu_begun) / turn[0] * 1e3)
                    turns.append((f"{name}, {clients} client{'s' * (clients > 1)}", turn))
            for name, (queries, seconds, cpu_s) in turns if number else ():
                per_s.setdefault(name, []).append(queries / seconds)
                core_ms.setdefault(name, []).append(cpu_s / queries * 1e3)
    alone = per_s["the engine alone"]
    shares = {
        name: statistics.median(one / of for one, of in zip(each, alone, strict=True))
        for name, each in per_s.items()
    }
    return Result(
        title="Queries per second of `sbtk serve`",
        columns=["what", "queries/s", "share of the engine alone", "core-ms per query"],
        rows=[
            [
                name,
                f"{statistics.median(each):.1f}",
                f"{shares[name]:.0%}",
                f"{statistics.median(core_ms[name]):.1f}",
            ]
            for name, each in per_s.items()
        ],
        figures={"queries_per_s": per_s, "core_ms": core_ms, "shares": shares},
        notes=[
            f"medians of {rounds} interleaved rounds of {_TURN_S:g} s each; shares are medians of "
            "the ratios within a round",
            f"{info['name']} {info['version']}, {info['precision']}, {info['threads']} threads; "
            "the engine alone embeds prepared sketches, one in each lane",
            f"gallery of {note}; 24 hits each; the clients run on the same cores, where they take "
            f"{statistics.median(client_ms):.2f} core-ms per query",
        ],
    )


def _engine_turn(engine: Engine, pixels: list[Images]) -> tuple[int, float, float]:
    """Run all lanes of the engine for a turn; return queries, seconds and CPU seconds."""
    begun, cpu_begun = time.perf_counter(), time.process_time()

    def run(first: int) -> int:
        queries = first
        while time.perf_counter() - begun < _TURN_S:
            engine.run(pixels[queries % len(pixels)], "sketch")
            queries += 1
        return queries - first

    with ThreadPoolExecutor() as pool:
        queries = sum(pool.map(run, range(engine.info.lanes)))
    return queries, time.perf_counter() - begun, time.process_time() - cpu_begun


def _server_turn(server: Server, sketches: list[bytes], clients: int) -> tuple[int, float, float]:
    """Run clients for a turn; return queries, seconds and the server's CPU seconds."""
    begun, cpu_begun = time.perf_counter(), server.cpu_s()
    queries = asyncio.run(_steady_clients(server.port, sketches, clients))
    return queries, time.perf_counter() - begun, server.cpu_s() - cpu_begun


async def _steady_clients(port: int, sketches: list[bytes], clients: int) -> int:
    end = time.perf_counter() + _TURN_S

    async def ask(first: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        asked = 0
        while time.perf_counter() < end:
            sketch = sketches[(first + asked) % len(sketches)]
            writer.write(_head(port, sketch).encode() + sketch)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b" 200 " not in head[:15]:
                sys.exit(f"a query failed: {head.decode()}")
            await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r")[0]))
            asked += 1
        writer.close()
        return asked

    return sum(await asyncio.gather(*map(ask, range(clients))))


def _head(port: int, sketch: bytes, connection: str = "keep-alive") -> str:
    return (
        f"POST /v1/query?k=24 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(sketch)}\r\nConnection: {connection}\r\n\r\n"
    )


async def _round(port: int, sketches: list[bytes], clients: int) -> Round:
    found = Round()
    begin = asyncio.Event()
    tasks = [
        asyncio.create_task(_client(port, sketches[index % len(sketches)], begin, found))
        for index in range(clients)
    ]
    begin.set()
    await asyncio.gather(*tasks)
    return found


async def _client(port: int, sketch: bytes, begin: asyncio.Event, found: Round) -> None:
    await begin.wait()
    begun = time.perf_counter()
    tries = 0
    while time.perf_counter() - begun < _GIVEN_UP_S:
        asked = time.perf_counter()
        status, retry_after_s = await _asked_once(port, sketch)
        taken = time.perf_counter() - asked
        found.answers[status] += 1
        tries += 1
        if status == 503:
            found.refused.append(taken)
            # Spread the retries of clients that were rejected together.
            await asyncio.sleep(retry_after_s * random.uniform(1, 2))
            continue
        if status == 200:
            found.until_answered.append(time.perf_counter() - begun)
            if tries == 1:
                found.first.append(taken)
        return


async def _asked_once(port: int, sketch: bytes) -> tuple[int, float]:
    """Send a query on a new connection; return the status and Retry-After."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_head(port, sketch, "close").encode() + sketch)
            answer = await reader.read()
        finally:
            writer.close()
        lines = answer.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
        named = dict(line.split(b": ", 1) for line in lines[1:])
        return int(lines[0].split(b" ")[1]), float(named.get(b"retry-after", b"0"))
    except (OSError, IndexError, ValueError):
        return 0, 0.0


def _row(times: list[float]) -> list[str]:
    if not times:
        return ["", "", ""]
    found = percentiles(times)
    return [f"{found[name] * 1e3:,.0f} ms" for name in ("p50", "p95", "max")]


if __name__ == "__main__":
    main()
