"""The shards of each folder that galleries hold: each shard must be there exactly once."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import BadGallery
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.folder import outermost, roots_above
from sbtk_runtime.manifest import GalleryManifest, PhotoShard


@dataclass(frozen=True)
class Holding:
    """The part of the photos that a gallery holds.

    Attributes:
        shard: the shard of its manifest; `None` of a gallery that is not a shard.
        divided: the shards that it holds of each folder of which it, or what it was merged from,
            is a shard.
        whole: the other outermost folders, all of whose photos it holds.
    """

    shard: PhotoShard | None
    divided: Mapping[bytes, frozenset[PhotoShard]]
    whole: frozenset[bytes]

    @classmethod
    def of(cls, manifest: GalleryManifest, view: CatalogueView) -> Holding:
        """Return what a generation holds."""
        folders = outermost(view.roots())
        if manifest.shard is not None:
            divided = dict.fromkeys(folders, frozenset({manifest.shard}))
            return cls(manifest.shard, divided, frozenset())
        merged = view.shards()
        whole = frozenset(folder for folder in folders if not roots_above(folder, merged))
        return cls(None, merged, whole)


def united(holdings: Iterable[Holding]) -> Holding:
    """Return what galleries hold together."""
    divided: dict[bytes, frozenset[PhotoShard]] = {}
    whole: set[bytes] = set()
    for holding in holdings:
        whole |= holding.whole
        for folder, shards in holding.divided.items():
            divided[folder] = divided.get(folder, frozenset()) | shards
    covered = {folder for folder in divided if roots_above(folder, whole)}
    return Holding(
        None,
        {folder: divided[folder] for folder in divided if folder not in covered},
        frozenset(whole),
    )


def absent_shards(holding: Holding) -> tuple[str, ...]:
    """Return the shards that are missing, such as "2/4 of /photos"."""
    found = []
    for folder, held in sorted(holding.divided.items()):
        found += [f"{shard} of {printable_name(folder)}" for shard in other_shards(held)]
    return tuple(found)


def other_shards(held: Collection[PhotoShard]) -> list[PhotoShard]:
    """Return the shards of the same divisions that are not there."""
    counts = sorted({shard.count for shard in held})
    every = (PhotoShard(index, count) for count in counts for index in range(1, count + 1))
    return [shard for shard in every if shard not in held]


def require_one_division(sources: Sequence[Path], holdings: Sequence[Holding]) -> None:
    """Check that galleries hold shards of one division, each of them once.

    Raises:
        BadGallery: two do not; names both and what they hold.
    """
    divided = [
        (f"{printable_name(source)} {'is' if holding.shard else 'holds'} shard {shard}", shard)
        for source, holding in zip(sources, holdings, strict=True)
        for shard in sorted({one for held in holding.divided.values() for one in held}, key=str)
    ]
    for text, shard in divided:
        first_text, first = divided[0]
        if shard.count != first.count:
            raise BadGallery(
                f"{first_text}, {text}",
                "shards of one division: photos would be missing, and others be there twice",
                f"index again with --shard I/{first.count}",
            )
    for (source, one), (other, two) in itertools.combinations(
        zip(sources, holdings, strict=True), 2
    ):
        common = sorted(set(one.divided) & set(two.divided))
        if one.shard is not None and one.shard == two.shard and common:
            raise BadGallery(
                f"{printable_name(source)} and {printable_name(other)} are both shard {one.shard} "
                f"of {printable_name(common[0])}",
                "each shard once: photos that only an older copy has would come back",
                "leave the older one out",
            )
