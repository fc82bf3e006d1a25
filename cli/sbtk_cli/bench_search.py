"""`sbtk bench search`: recall and latency of searching, over real or synthetic vectors."""

from __future__ import annotations

from pathlib import Path

import click

from sbtk_cli import bench_options, options


@click.command("search")
@bench_options.shared
@bench_options.gallery
@click.option(
    "--synthetic",
    type=click.IntRange(min=1),
    metavar="N",
    help="Search N synthetic vectors.  [default without a gallery: 20000]",
)
@click.option(
    "--embeddings",
    type=options.PATH,
    metavar="FILE",
    help="Search the embeddings of a .npz file that 'sbtk embed' wrote.",
)
@click.option(
    "--queries",
    "query_file",
    type=options.PATH,
    metavar="FILE",
    help="Ask the embeddings of a .npz file.  [default: vectors like those that are searched]",
)
@click.option("--dim", type=click.IntRange(2, 65536), default=512, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--ef",
    "efs",
    type=click.IntRange(1, 100_000),
    multiple=True,
    help="Search width of the graph; may be repeated.  [default: 16, 32, 64, 128, 256]",
)
@click.option(
    "--peer", type=click.Choice(["faiss"]), help="Measure another library beside, if installed."
)
def command(
    gallery: Path | None,
    synthetic: int | None,
    embeddings: Path | None,
    query_file: Path | None,
    dim: int,
    seed: int,
    k: int,
    efs: tuple[int, ...],
    peer: str | None,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure recall@k against exact search, latency and queries per second.

    Over a gallery, over embeddings of your own, or over synthetic vectors. Recall is judged by
    score, so that ties cost nothing. --threads build the graph; one thread searches it.
    """
    from sbtk_cli.bench_runs import hand_over
    from sbtk_cli.bench_searches import run_search
    from sbtk_runtime.machine import this_machine

    bench_options.check_plot(plot)
    machine = this_machine()
    report = run_search(
        gallery=gallery,
        synthetic=synthetic,
        embeddings=embeddings,
        query_file=query_file,
        dim=dim,
        seed=seed,
        k=k,
        efs=efs,
        peer=peer,
        threads=threads,
        quiet=quiet,
    )
    return hand_over(machine, search=report, plot=plot, as_json=as_json)
