"""Which photos of a gallery a query may find: those in a folder, of some days."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import printable_name

#: First and last day, in the photos' local time. `None` leaves an end open.
Period = tuple[datetime.date | None, datetime.date | None]

#: All days.
EVER: Period = (None, None)
# What every engine reads as a number of 64 bits.
_LEAST_NS, _MOST_NS = -((1 << 63) - 1), (1 << 63) - 1
# Nanoseconds do not fit 64 bits on these days and beyond, in any time zone.
_FIRST_DAY, _LAST_DAY = datetime.date(1677, 9, 20), datetime.date(2262, 4, 14)
# The date of a photo: when it was taken or, if its file does not say so, modified.
_IN_PERIOD = """ AND CASE
    WHEN (SELECT taken FROM dates WHERE dates.row = photos.row) IS NULL
    THEN mtime_ns >= :first_ns AND mtime_ns <= :last_ns
    ELSE (SELECT taken FROM dates WHERE dates.row = photos.row) >= :first
        AND (SELECT taken FROM dates WHERE dates.row = photos.row) < :end
END"""


@dataclass(frozen=True)
class PhotoFilter:
    """The photos in a folder and of a period; by default all.

    Attributes:
        folder: absolute, with its links; `None` for all.
        period: days on which photos were taken, or their files modified if these do not say when
            they were taken.
    """

    folder: bytes | None = None
    period: Period = EVER

    @classmethod
    def of(cls, under: Path | str | None, taken: Period | None) -> PhotoFilter:
        """Return the filter of the arguments of a query.

        Raises:
            BadConfig: the period is not of days, or ends before it begins.
        """
        period = taken or EVER
        if len(period) != 2 or not all(map(_is_day, period)):
            raise BadConfig(f"a period of {period!r}", "a first and a last datetime.date, or None")
        first, last = period
        if first is not None and last is not None and first > last:
            raise BadConfig(
                f"photos from {first} to {last}", "a first day that is not after the last one"
            )
        # Links are kept, as in the catalogue.
        folder = None if under is None else os.fsencode(os.path.abspath(under))  # noqa: PTH100
        return cls(folder, period)

    def __bool__(self) -> bool:
        """Return whether it leaves out any photos."""
        return self.folder is not None or self.has_period

    @property
    def has_period(self) -> bool:
        """Whether it leaves out photos of some days."""
        return self.period != EVER

    @property
    def text(self) -> str:
        """What it accepts, to follow the word "photos"; empty for all."""
        first, last = self.period
        parts = [
            "" if self.folder is None else f" below {printable_name(os.fsdecode(self.folder))}",
            "" if first is None else f" from {first}",
            "" if last is None else f" {'until' if first is None else 'to'} {last}",
        ]
        return "".join(parts)

    def condition(self) -> tuple[str, dict[str, object]]:
        """Return a condition on `photos`, empty or starting with `AND`, and its values."""
        condition = ""
        values: dict[str, object] = {}
        if self.folder is not None:
            condition += " AND path >= :low AND path < :high"
            values["low"], values["high"] = below(self.folder)
        if self.has_period:
            condition += _IN_PERIOD
            values |= PeriodBounds.of(self.period)._asdict()
        return condition, values


#: Accepts every photo.
ALL_PHOTOS = PhotoFilter()


def below(path: bytes) -> tuple[bytes, bytes]:
    """Return the interval of paths (end excluded) that lie in the folder `path`."""
    folder = path.rstrip(b"/")
    return folder + b"/", folder + b"0"  # "0" is the character after "/"


class PeriodBounds(NamedTuple):
    """The first moment of a period, the last one, and in dates the one after it.

    `first` and `end` compare with dates in ISO 8601, `first_ns` and `last_ns` with nanoseconds
    since 1970. File times that do not fit 64 bits are stored as the least or largest number.
    """

    first: str
    end: str
    first_ns: int
    last_ns: int

    @classmethod
    def of(cls, period: Period) -> PeriodBounds:
        """Return the bounds of a period."""
        first, last = period
        end = None if last in (None, datetime.date.max) else last + datetime.timedelta(days=1)
        return cls(
            first="" if first is None else first.isoformat(),
            end=":" if end is None else end.isoformat(),  # ":" is the character after "9"
            first_ns=_LEAST_NS if first is None else _storable(_midnight_ns(first)),
            last_ns=_MOST_NS if end is None else _storable(_midnight_ns(end) - 1),
        )


def _is_day(day: object) -> bool:
    is_date = isinstance(day, datetime.date) and not isinstance(day, datetime.datetime)
    return day is None or is_date


def _midnight_ns(day: datetime.date) -> int:
    """Return when a day begins here, in nanoseconds since 1970; beyond 64 bits, only about when."""
    day = min(max(day, _FIRST_DAY), _LAST_DAY)
    return int(datetime.datetime.combine(day, datetime.time()).timestamp()) * 1_000_000_000


def _storable(time_ns: int) -> int:
    return min(max(time_ns, _LEAST_NS), _MOST_NS)
