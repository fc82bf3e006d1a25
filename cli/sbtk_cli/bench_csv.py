"""Speeds as a CSV file: a row for each engine, precision and batch, a column for each figure."""

from __future__ import annotations

import csv
import io
from dataclasses import fields
from pathlib import Path

from sbtk_runtime.bench.latency import LatencyReport
from sbtk_runtime.bench.speed import Speed
from sbtk_runtime.files import atomic_path
from sbtk_runtime.machine import Machine

_BEFORE = ("date", "cpu", "model_id", "threads")
_AFTER = ("photo_decode_ms", "photo_preprocess_ms", "int8_floor_ms", "fp32_floor_ms")
_QUALITY = ("map_reference", "map_protocol")


def csv_text(report: LatencyReport, machine: Machine) -> str:
    """Returns the file's content; what was not measured is an empty cell.

    The columns are those of `Speed`, between what is the same in all rows: date, processor, model
    and threads before; after them the medians of decoding and preprocessing a photo, which are
    every engine's, the floors for one picture, and how mAP was measured.
    """
    floors = {floor.kind: floor.ms for floor in report.floors}
    quality = report.quality
    names = [field.name for field in fields(Speed)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_BEFORE, *names, *_AFTER, *_QUALITY])
    for point in report.throughput:
        writer.writerow(
            [
                *(machine.date, machine.cpu, report.model_id, report.threads),
                *(getattr(point, name) for name in names),
                *(report.stage_ms("photo", "decode"), report.stage_ms("photo", "preprocess")),
                *(floors.get("int8"), floors.get("fp32")),
                *((quality.reference, quality.protocol) if quality else ("", "")),
            ]
        )
    return file.getvalue()


def write_csv(file: Path, report: LatencyReport, machine: Machine) -> None:
    """Writes `csv_text` to a file, atomically."""
    with atomic_path(file) as temporary:
        temporary.write_text(csv_text(report, machine), encoding="utf-8")
