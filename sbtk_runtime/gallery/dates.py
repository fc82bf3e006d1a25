"""When the photos of a gallery were taken, as their files say.

The catalogue keeps a date with the row of each embedding, since photos with the same bytes share
both. Galleries of older versions get the dates at the next update, without embedding anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sbtk_runtime.exif import read_taken
from sbtk_runtime.files import open_regular
from sbtk_runtime.gallery.schema import blob, catalogue_errors, integer
from sbtk_runtime.gallery.writer import Catalogue

_PAGE = 1000
_THREADS = 4
# Of photos with the same bytes one is enough. Those that are missing get no date.
_UNDATED = """SELECT row, path, size_bytes, mtime_ns FROM photos
    WHERE removed_in IS NULL AND missing_in IS NULL AND row > ?
    AND NOT EXISTS (SELECT 1 FROM dates WHERE dates.row = photos.row)
    GROUP BY row ORDER BY row LIMIT ?"""


def add_dates(catalogue: Catalogue, progress: Callable[[int], None]) -> None:
    """Read the dates of photos whose dates are not known, and commit them in batches.

    Photos that have changed since they were embedded are left out; the next update has their dates.

    Args:
        catalogue: the gallery's.
        progress: called with the number of photos after each full batch; what it raises ends the
            work.
    """
    last = -1
    count = 0
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="sbtk-dates") as threads:
        while True:
            with catalogue_errors(catalogue.path):
                found = catalogue.connection.execute(_UNDATED, (last, _PAGE)).fetchall()
            if not found:
                return
            last = integer(found[-1][0])
            dates = [date for date in threads.map(_read_date, found) if date is not None]
            catalogue.store_dates(dates)
            count += len(found)
            if len(found) < _PAGE:
                return
            progress(count)


def _read_date(found: tuple[object, ...]) -> tuple[int, str | None] | None:
    """Return row and date of a photo; `None` if its file is not the one that was embedded."""
    row, path, size_bytes, mtime_ns = found
    try:
        with os.fdopen(open_regular(Path(os.fsdecode(blob(path)))), "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (size_bytes, mtime_ns):
                return None
            taken = read_taken(file)
    except OSError:
        return None
    return integer(row), None if taken is None else taken.isoformat()
