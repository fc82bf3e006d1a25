"""`sbtk bench`: latency, retrieval quality and search, as tables, JSON and pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from sbtk_cli import bench_latency, bench_map, bench_options, bench_search, options


@click.group("bench", invoke_without_command=True)
@bench_options.of_all_engines
@click.option(
    "--data",
    type=options.PATH,
    envvar="SBTK_DATA",
    show_envvar=True,
    metavar="DATA",
    help="Folder of sketch/<class>/* and photo/<class>/*: measures mAP, too.",
)
@bench_options.torch
@bench_options.quick
@click.pass_context
def command(
    context: click.Context,
    model: str | None,
    engine: str,
    device: str | None,
    threads: int | None,
    data: Path | None,
    with_torch: bool,
    quick: bool,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int | None:
    """Measure latency, retrieval quality or search.

    Without a subcommand: latency of the default model, and mAP on unseen classes when there are
    data to measure it on.
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced_options(context)
        return None
    from sbtk_cli.bench_runs import Extent, hand_over, run_latency, run_map
    from sbtk_runtime.bench.engines import ALL
    from sbtk_runtime.engines.engine import AUTO
    from sbtk_runtime.machine import this_machine

    bench_options.check_plot(plot)
    machine = this_machine()
    chosen = bench_options.chosen(model, engine, device, threads, quiet)
    # mAP stands in a table of its own.
    extent = Extent(with_torch, with_map=False, is_quick=quick)
    latency = run_latency(chosen, extent=extent)
    # One engine is enough for mAP on unseen classes, which are measured as rarely as can be.
    first = replace(chosen, engine=AUTO) if chosen.engine == ALL else chosen
    maps = [] if data is None else run_map(first, data)
    return hand_over(machine, latency=latency, maps=maps, plot=plot, as_json=as_json)


command.add_command(bench_latency.command)
command.add_command(bench_map.command)
command.add_command(bench_search.command)


def _refuse_misplaced_options(context: click.Context) -> None:
    for name in context.params:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            context.fail(
                f"Options come after the subcommand: sbtk bench {context.invoked_subcommand} ..."
            )
