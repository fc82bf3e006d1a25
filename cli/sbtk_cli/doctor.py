"""`sbtk doctor`: checks what this machine can run."""

from __future__ import annotations

from pathlib import Path

import click

from sbtk_cli import options, output

_MARK = {"ok": "ok", "note": "--", "problem": "!!"}


@click.command()
@options.gallery
@options.model
@options.json
def command(gallery: Path, model: str | None, as_json: bool) -> int:
    """Check what this machine can run, and what is missing.

    Checks the processor, the engines, the model and the gallery, and names the commands that fix
    problems. Exit code 0: at least one engine works.
    """
    from sbtk_runtime.doctor import examine

    examination = examine(gallery, model)
    if as_json:
        output.answer_json(examination.to_json())
    else:
        topic_width = max(len(finding.topic) for finding in examination.findings)
        for finding in examination.findings:
            output.answer(f"{_MARK[finding.level]}  {finding.topic:{topic_width}}  {finding.text}")
            if finding.next_step:
                output.answer(f"{'':{topic_width + 6}}next: {finding.next_step}")
    return 0 if examination.engine else 1
