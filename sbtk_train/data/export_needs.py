"""How many images `sbtk export` needs, so that training can say so before an epoch is spent."""

from __future__ import annotations

#: Of each kind, to compare with torch, where there are so many.
PARITY_PER_KIND = 100
#: Of each kind; an export without so many is refused.
MIN_PARITY_PER_KIND = 16
#: Of each kind, to calibrate INT8 on, where there are so many.
CALIBRATION_PER_KIND = 150
#: Of each kind; an export to INT8 without so many is refused.
MIN_CALIBRATION_PER_KIND = 16


def parity_share(per_kind: int, *, is_calibrating: bool = True) -> int:
    """How many images of each kind are compared with torch; the others calibrate INT8.

    Args:
        per_kind: images of training classes, of the kind that has fewer.
        is_calibrating: whether some have to be left for calibration.

    Returns:
        `PARITY_PER_KIND` at most; fewer than `MIN_PARITY_PER_KIND` where there are not enough.
    """
    reserved = MIN_CALIBRATION_PER_KIND if is_calibrating else 0
    return min(PARITY_PER_KIND, max(per_kind - reserved, min(per_kind, MIN_PARITY_PER_KIND)))


def export_problem(sketches: int, photos: int, *, is_calibrating: bool = True) -> str:
    """What `sbtk export` will refuse, in a sentence; empty where it will not.

    Args:
        sketches: of training classes, with those that are held out from training.
        photos: of training classes.
        is_calibrating: whether INT8 is made, as it is by default.
    """
    needed = MIN_PARITY_PER_KIND + (MIN_CALIBRATION_PER_KIND if is_calibrating else 0)
    if min(sketches, photos) >= needed:
        return ""
    way_out = "add images, or export with those of other data: sbtk export RUN --images DATA"
    if is_calibrating and min(sketches, photos) >= MIN_PARITY_PER_KIND:
        way_out = f"export without INT8: sbtk export RUN --fp16; or {way_out}"
    return (
        f"sbtk export will refuse a model of these data: their training classes have {sketches:,} "
        f"sketches and {photos:,} photos, of which it needs {needed} each "
        f"({MIN_PARITY_PER_KIND} to compare with torch"
        + (f", {MIN_CALIBRATION_PER_KIND} to calibrate INT8 on" if is_calibrating else "")
        + f"); {way_out}"
    )
