"""Results of a GPU run on disk: a line for each point, and a page of tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.gpu_engines import LARGEST_PART
from benchmarks.gpu_findings import Figures, Finding, Key
from benchmarks.result import table_lines
from sbtk_runtime.files import write_atomically
from sbtk_runtime.machine import this_machine

DRY_RUN = "DRY RUN on a CPU with a small model: this page has no measurements"

_TITLES = {
    "torch": "The student in torch",
    "engines": "sbtk's engines",
    "training": "`sbtk train`",
}
Cell = Callable[[Figures], str]


class Book:
    """Write `gpu.jsonl`, `gpu.md` and `gpu.log` into a folder.

    Args:
        folder: created if missing; results of an earlier run are replaced.
        command: command of the run.
        budget_s: seconds for the run.
        is_dry_run: marks every line and table.
    """

    def __init__(self, folder: Path, command: str, budget_s: float, *, is_dry_run: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._command = command
        self._is_dry_run = is_dry_run
        self._machine = this_machine()
        self._points: dict[Key, Finding] = {}
        (folder / "gpu.log").write_text("")
        (folder / "gpu.jsonl").write_text("")
        self._append(
            "gpu.jsonl",
            json.dumps(
                {
                    "command": command,
                    "budget_s": budget_s,
                    "dry_run": is_dry_run,
                    "machine": self._machine.to_json(),
                }
            )
            + "\n",
        )

    def add(self, finding: Finding) -> None:
        """Add a finding, and save it unless it is planned."""
        if finding.state == "planned":
            self._points.setdefault(finding.key, finding)
            return
        finding = self._with_share(finding)
        self._points[finding.key] = finding
        line = json.dumps({"dry_run": self._is_dry_run, **asdict(finding)})
        self._append("gpu.jsonl", line + "\n")

    def close_stage(self, stage: str, log: Path) -> None:
        """Append the output of a stage to the log, and rewrite the page."""
        text = log.read_text(errors="replace") if log.is_file() else ""
        self._append("gpu.log", f"--- {stage}\n{text}\n")
        write_atomically(self._folder / "gpu.md", self._page().encode())

    def _append(self, name: str, text: str) -> None:
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def _with_share(self, finding: Finding) -> Finding:
        """Return the finding with its share of the measured peak, if any."""
        peak = self._figures("card", "peak", str(finding.figures.get("peak", "")))
        network = self._figures("card", "network")
        macs = {**network, **finding.figures}.get("macs_per_image")
        speed = finding.figures.get("images_per_s")
        if not peak or macs is None or speed is None:
            return finding
        share = speed * 2 * macs / (peak["tflop_per_s"] * 1e12)
        return replace(finding, figures={**finding.figures, "share_of_peak": share})

    def _figures(self, stage: str, subject: str, source: str = "") -> Figures:
        found = self._points.get((stage, subject, source, 0))
        return found.figures if found is not None else {}

    def _of(self, stage: str, *, with_batch: bool = True) -> list[Finding]:
        return [
            p for p in self._points.values() if p.stage == stage and bool(p.batch) == with_batch
        ]

    def _page(self) -> str:
        card = self._figures("card", "card")
        lines = [f"# sbtk on {card.get('name', 'a GPU')}", ""]
        if self._is_dry_run:
            lines += [f"**{DRY_RUN}.**", ""]
        lines += [f"`{self._command}`", "", *_card_lines(card)]
        lines += [f"- {line}" for line in self._machine.lines()[:2]]
        lines += self._section("What the card reaches", self._peaks())
        for stage in ("torch", "engines"):
            points = self._of(stage)
            for source in dict.fromkeys(point.source for point in points):
                some = [point for point in points if point.source == source]
                lines += self._pivots(stage, source, some)
        lines += self._section("Engines as they open", self._openings())
        lines += self._section("Availability of sbtk's engines", self._survey())
        lines += self._section(_TITLES["training"], self._training())
        return "\n".join([*lines, *self._remarks()]) + "\n"

    def _section(self, title: str, table: list[str]) -> list[str]:
        mark = " (dry run)" if self._is_dry_run else ""
        return ["", f"## {title}{mark}", "", *(table or ["Not reached."])]

    def _pivots(self, stage: str, source: str, points: Sequence[Finding]) -> list[str]:
        where = {
            "device": "images on the device",
            "pinned": "images in pinned memory, copied before each run",
            "host": f"NumPy in, NumPy out, by the clock, {LARGEST_PART} at once",
        }[source]
        title = f"{_TITLES[stage]}: {where}"
        lines = self._section(f"{title}, images/s", _pivot(points, _speed))
        lines += self._section(f"{title}, p50 / p95 ms", _pivot(points, _latency))
        return lines + self._section(f"{title}, share of the peak", _pivot(points, _share))

    def _peaks(self) -> list[str]:
        macs = self._figures("card", "network").get("macs_per_image", 0)
        rows = []
        for point in self._of("card", with_batch=False):
            if point.subject == "peak":
                speed = point.figures.get("tflop_per_s")
                allowed = f"{speed * 1e12 / (2 * macs):,.0f}" if speed and macs else ""
                value = f"{speed:,.1f} TFLOP/s" if speed else point.state
                rows.append([f"matrix product, {point.source}", value, allowed])
            elif point.subject == "copy":
                speed = point.figures.get("gbyte_per_s")
                rows.append(
                    [f"copy {point.source}", f"{speed:,.1f} GB/s" if speed else point.state, ""]
                )
        table = table_lines(["what", "measured", "images/s that it allows"], rows)
        return [*table, "", f"The network: {macs / 1e9:.3f} G multiply-accumulates per image."]

    def _survey(self) -> list[str]:
        rows = [
            [
                point.subject,
                "works" if point.state == "measured" else point.state,
                str(point.figures.get("version", "")),
                _one_line(point.reason),
            ]
            for point in self._of("survey", with_batch=False)
        ]
        return table_lines(["engine", "", "version", "why not"], rows) if rows else []

    def _openings(self) -> list[str]:
        rows = [
            [
                point.subject,
                f"{point.figures['open_s']:.1f} s" if "open_s" in point.figures else point.state,
                str(point.figures.get("version", "")),
                f"{point.figures.get('least_cosine_to_fp32', float('nan')):.5f}",
                _one_line("; ".join(point.figures.get("said", ()))),
            ]
            for point in self._of("engines", with_batch=False)
        ]
        columns = ["engine", "opened in", "version", "smallest cosine to torch FP32", "message"]
        return table_lines(columns, rows) if rows else []

    def _training(self) -> list[str]:
        rows = []
        for point in self._of("training", with_batch=False):
            figures = point.figures
            measured = point.state == "measured"
            rows.append(
                [
                    point.subject,
                    f"{figures['images_per_s']:,.0f}" if measured else point.state,
                    f"{figures['ms_per_step']:.1f}" if "ms_per_step" in figures else "",
                    f"{figures['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in figures else "",
                ]
            )
        return table_lines(["what", "images/s", "ms a step", "peak memory"], rows) if rows else []

    def _remarks(self) -> list[str]:
        """Return the reasons of missing results, each once, and messages of engines."""
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for point in self._points.values():
            if point.reason:
                # Points that were not reached are summed up by stage.
                subject = point.subject if point.state == "failed" else ""
                whom = reasons.setdefault((point.stage, subject, point.reason), [])
                whom.append(f"{point.subject} {point.batch or ''} {point.source}".strip())
        lines: list[str] = []
        for (stage, subject, reason), whom in reasons.items():
            named = subject or (whom[0] if len(whom) == 1 else f"{len(whom)} points")
            lines += ["", f"{stage}, {named}:", "", "```text", reason.replace("```", "'''"), "```"]
        return self._section("Missing results, and why", lines[1:]) if lines else []


def _pivot(points: Iterable[Finding], cell: Cell) -> list[str]:
    """Return a table with a row for each subject and a column for each batch size."""
    points = list(points)
    batches = sorted({point.batch for point in points})
    by_place = {(point.subject, point.batch): point for point in points}
    rows = [
        [subject, *(_cell(by_place.get((subject, batch)), cell) for batch in batches)]
        for subject in dict.fromkeys(point.subject for point in points)
    ]
    return table_lines(["batch", *map(str, batches)], rows)


def _cell(point: Finding | None, cell: Cell) -> str:
    if point is None:
        return ""
    return cell(point.figures) if point.state == "measured" else point.state


def _speed(figures: Figures) -> str:
    return f"{figures['images_per_s']:,.0f}"


def _latency(figures: Figures) -> str:
    return f"{figures['p50_ms']:.3f} / {figures['p95_ms']:.3f}"


def _share(figures: Figures) -> str:
    return f"{figures['share_of_peak']:.1%}" if "share_of_peak" in figures else ""


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:200]


def _card_lines(card: Figures) -> list[str]:
    """Return the card's facts as list items, in order."""
    lines = []
    for name, value in card.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {fact}" for key, fact in value.items())
        if value:
            lines.append(f"- {name.replace('_', ' ')}: {value}")
    return lines
