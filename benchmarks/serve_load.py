"""What a served gallery does when many clients ask at once: answers, refusals and memory.

    python -m benchmarks.serve_load [--clients 200] [--photos FOLDER] [--count 1000] [--rounds 5]

Each client opens a connection and sends one query, all at the same moment. Told to come back, it
does so after as long as it was told, until it has its answer.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.result import Result, print_result
from benchmarks.serving import Server, gallery_served, serving_parser
from sbtk_runtime.generated_inputs import generated_sketches

_GIVEN_UP_S = 120.0


@dataclass
class Round:
    """What the clients of one round met; times are in seconds.

    Attributes:
        answers: how often each status came; 0 stands for a connection that failed.
        first: the times of those that were answered at their first try.
        refused: how long the server took to say 503.
        until_answered: from the round's begin to each client's answer, however often it asked.
    """

    answers: Counter[int] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    until_answered: list[float] = field(default_factory=list)


def main() -> None:
    """Measures and prints."""
    parser = serving_parser(__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with gallery_served(options) as (server, note):
        result = measure(server, options.clients, options.rounds, note)
    print_result(result, "benchmarks.serve_load", as_json=options.json)


def measure(server: Server, clients: int, rounds: int, note: str) -> Result:
    """Returns what all rounds found together; one before them warms up."""
    sketches = generated_sketches(32)
    asyncio.run(_round(server.port, sketches, min(clients, 8)))
    idle = server.resident_bytes()
    found = [asyncio.run(_round(server.port, sketches, clients)) for _ in range(rounds)]
    answers = sum((each.answers for each in found), Counter[int]())
    other = {status: count for status, count in answers.items() if status not in (200, 503)}
    times = {
        "answered at the first try": [time for each in found for time in each.first],
        "told 503": [time for each in found for time in each.refused],
        "until answered, with coming back": [
            time for each in found for time in each.until_answered
        ],
    }
    peak, after = server.resident_bytes("VmHWM"), server.resident_bytes()
    return Result(
        title=f"`sbtk serve` under {clients} queries at once",
        columns=["what", "how many", "p50", "p95", "longest"],
        rows=[[name, f"{len(each):,}", *_row(each)] for name, each in times.items()],
        figures={
            "clients": clients,
            "rounds": rounds,
            "answers": {str(status): count for status, count in sorted(answers.items())},
            "seconds": {name: _percentiles(each) for name, each in times.items() if each},
            "idle_bytes": idle,
            "peak_bytes": peak,
            "after_bytes": after,
        },
        notes=[
            f"{rounds} rounds of {clients} clients; {answers[200]:,} answers, "
            f"{answers[503]:,} times 503, anything else: {other or 'never'}",
            f"resident memory {idle / 1e6:.0f} MB idle, {peak / 1e6:.0f} MB at its peak, "
            f"{after / 1e6:.0f} MB after; 1 MB is 1,000,000 bytes",
            f"a gallery of {note}; 24 hits each; the clients run on the same cores",
        ],
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
            # Clients that were refused together must not all come back together.
            await asyncio.sleep(retry_after_s * random.uniform(1, 2))
            continue
        if status == 200:
            found.until_answered.append(time.perf_counter() - begun)
            if tries == 1:
                found.first.append(taken)
        return


async def _asked_once(port: int, sketch: bytes) -> tuple[int, float]:
    """Returns status and Retry-After of one query on a connection of its own."""
    head = (
        f"POST /v1/query?k=24 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(sketch)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + sketch)
            answer = await reader.read()
        finally:
            writer.close()
        lines = answer.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
        named = dict(line.split(b": ", 1) for line in lines[1:])
        return int(lines[0].split(b" ")[1]), float(named.get(b"retry-after", b"0"))
    except (OSError, IndexError, ValueError):
        return 0, 0.0


def _row(times: list[float]) -> list[str]:
    found = _percentiles(times)
    return [f"{found[name] * 1e3:,.0f} ms" if times else "" for name in ("p50", "p95", "max")]


def _percentiles(times: list[float]) -> dict[str, float]:
    if len(times) < 2:
        return dict.fromkeys(("p50", "p95", "max"), times[0] if times else 0.0)
    cuts = statistics.quantiles(times, n=20, method="inclusive")
    return {"p50": statistics.median(times), "p95": cuts[-1], "max": max(times)}


if __name__ == "__main__":
    main()
