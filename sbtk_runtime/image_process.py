"""Images that are too large to be decoded beside an engine, in a process of their own.

Run as a script it reads an image file on stdin and writes the pixels that it was asked for to
stdout. The system ends it when it takes too long, whatever its decoder is at.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadImage, EmptySketch, LargeImage, SbtkError, SlowImage

#: What an image may take at the peak of its decoding, with its file.
MAX_APART_BYTES = 400 << 20
#: Core-seconds, those of the start with them.
MAX_APART_S = 12
# Whatever was judged: with Python and the libraries it stays below 500 MB.
_MOST_DATA_BYTES = MAX_APART_BYTES + (30 << 20)
_WALL_S = 60

_ERRORS: dict[str, type[BadImage]] = {
    error.__name__: error for error in (BadImage, EmptySketch, SlowImage)
}

# One at a time, since each may take hundreds of megabytes.
_turn = threading.Lock()


def pixels_apart(
    data: bytes, problem: LargeImage, *task: str
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Returns what a task makes of the bytes of an image file, and notices.

    Args:
        data: the bytes of the file.
        problem: how large the image is.
        task: `"prepare", kind, size_px` or `"thumbnail", size_px`.

    Raises:
        LargeImage: it is too large for that, too.
        SlowImage: the system has ended it.
        BadImage: as the task does.
    """
    if problem.needed_bytes > MAX_APART_BYTES:
        raise problem
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Threads only take memory where one core's work is allowed.
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with _turn:
        try:
            done = subprocess.run(  # noqa: S603 -- our own file, by this interpreter
                # With -P no module is taken from the folder of this file.
                [sys.executable, "-P", str(Path(__file__)), *task],
                input=data,
                capture_output=True,
                env=environment,
                timeout=_WALL_S,
                check=False,
            )
        except subprocess.TimeoutExpired as too_long:
            raise _too_slow() from too_long
    head, _, body = done.stdout.partition(b"\n")
    if done.returncode == -signal.SIGXCPU:
        raise _too_slow()
    if done.returncode != 0 or not head:
        raise BadImage(f"damaged image: its decoder has failed (status {done.returncode})")
    told = json.loads(head)
    if "error" in told:
        raise _ERRORS[told["error"]](*told["words"])
    return np.frombuffer(body, np.uint8).reshape(told["shape"]), tuple(told["notices"])


def _too_slow() -> SlowImage:
    return SlowImage(
        "the picture takes too long to decode", f"at most {MAX_APART_S} seconds of a core's work"
    )


def _main(task: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_APART_S, MAX_APART_S + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_DATA_BYTES, _MOST_DATA_BYTES))
    data = sys.stdin.buffer.read()
    try:
        pixels, notices = _done(data, task)
    except SbtkError as problem:
        kind = type(problem).__name__
        words = (problem.found, problem.expected, problem.next_step)
        told = {"error": kind if kind in _ERRORS else "BadImage", "words": words}
        body = b""
    except MemoryError:
        told = {"error": "BadImage", "words": ("not enough memory to decode the picture",)}
        body = b""
    else:
        told = {"shape": pixels.shape, "notices": notices}
        body = pixels.tobytes()
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\n" + body)
    sys.stdout.buffer.flush()


def _done(data: bytes, task: list[str]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    from PIL import AvifImagePlugin

    from sbtk_runtime import preprocess, thumbnail

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if task[0] == "thumbnail":
        made = thumbnail.thumbnail(data, int(task[1]), max_bytes=MAX_APART_BYTES)
        return np.asarray(made, dtype=np.uint8), ()
    kind, size_px = preprocess.kind_from_text(task[1]), int(task[2])
    prepared = preprocess.prepare(data, kind, size_px, max_bytes=MAX_APART_BYTES)
    return prepared.pixels, prepared.notices


if __name__ == "__main__":
    _main(sys.argv[1:])
