"""Contact sheets: hits as one self-contained HTML file without scripts.

Thumbnails are data URIs, so a sheet can be mailed. Beyond a size limit, later hits link to their
files instead, which browsers load lazily. Names are escaped, so a hostile file name stays text.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sbtk_runtime.errors import BadImage
from sbtk_runtime.files import printable_name
from sbtk_runtime.preprocess import CROPPED, Kind, Preprocessing
from sbtk_runtime.thumbnail import THUMBNAIL_PX, data_uri, jpeg_bytes, png_bytes, thumbnail

if TYPE_CHECKING:
    from sbtk_runtime.gallery.gallery import Hit

# A card's width for a height of 1: its name must fit, and a panorama may not take a row.
_NARROWEST, _WIDEST = 0.6, 3.0
#: Limit for the thumbnails within a sheet: about 400, small enough for a mail.
INLINE_BYTES = 10_000_000


def contact_sheet(
    query: bytes,
    hits: Sequence[Hit],
    *,
    name: str,
    kind: Kind = "sketch",
    preprocessing: Preprocessing = CROPPED,
    facts: Mapping[str, str] | None = None,
    inline_bytes: int = INLINE_BYTES,
) -> str:
    """Return an HTML page with the query on the left and its hits, best first, on the right.

    Args:
        query: the bytes of the query's image file.
        hits: hits of `Gallery.search`; unreadable photos keep their cards.
        name: name of the query, shown in the heading.
        kind: kind of the query; an inverted sketch is shown as the model sees it.
        preprocessing: of the model.
        facts: pairs to list below the query, such as the gallery and the model.
        inline_bytes: limit for thumbnails in the page; later hits link to their files, which
            requires access to the photos, and show no frames of regions.

    Raises:
        BadImage: `query` is not an image.
    """
    image, remarks = _query_image(query, kind, preprocessing)
    cards, links = _cards(hits, inline_bytes)
    if links:
        remarks += (
            f"The images of the last {links:,} hits are loaded from their files and need access "
            "to the photos.",
        )
    source = data_uri(png_bytes(image), "image/png") if kind == "sketch" else _jpeg_uri(image)
    return render_sheet(Query(name, kind, source, remarks), cards, facts or {}, has_links=links > 0)


def _query_image(
    data: bytes, kind: Kind, preprocessing: Preprocessing
) -> tuple[Image.Image, tuple[str, ...]]:
    prepared = preprocessing.prepare(data, kind)
    if prepared.notices:
        return Image.fromarray(prepared.pixels), prepared.notices
    return thumbnail(data, 2 * THUMBNAIL_PX), ()


def _cards(hits: Sequence[Hit], inline_bytes: int) -> tuple[list[str], int]:
    """Return the cards, and how many of the last ones link to their file."""
    cards = []
    links = 0
    for hit in hits:
        path = Path(hit.path)
        frame, shape = "", 1.0
        try:
            if links:
                source = _file_uri(path)
            else:
                small = thumbnail(path)
                source, frame = _jpeg_uri(small), _frame(hit, small.size)
                shape = _shape(small.size)
        except BadImage as problem:
            cards.append(
                _card(hit, f'<span class="card-missing">{escape_text(problem.found)}</span>')
            )
            continue
        inline_bytes -= len(source)
        if inline_bytes < 0:
            source, frame = _file_uri(path), ""
            links += 1
        image = f'<img src="{html.escape(source)}" alt="{escape_text(path.name)}" loading="lazy">'
        cards.append(_card(hit, image + frame, shape))
    return cards, links


def _frame(hit: Hit, size_px: tuple[int, int]) -> str:
    """Return the frame of the hit's region, on an image that fills its card one way."""
    if hit.region is None:
        return ""
    ratio = size_px[0] / size_px[1]
    # A card of another shape than its photo has margins.
    width, height = min(1, ratio / _shape(size_px)), min(1, _shape(size_px) / ratio)
    x, y, breadth, depth = hit.region
    parts = {
        "left": (1 - width) / 2 + x * width,
        "top": (1 - height) / 2 + y * height,
        "width": breadth * width,
        "height": depth * height,
    }
    style = ";".join(f"{name}:{part:.2%}" for name, part in parts.items())
    return f'<i class="region-frame" style="{style}"></i>'


def _shape(size_px: tuple[int, int]) -> float:
    """Return a card's width for a height of 1: the photo's, unless that is very wide or narrow."""
    return min(max(size_px[0] / size_px[1], _NARROWEST), _WIDEST)


def _card(hit: Hit, image: str, shape: float = 1.0) -> str:
    path = Path(hit.path)
    name, whole = escape_text(path.name), escape_text(hit.path)
    if hit.copies:
        image += f'<span class="card-copies">+{len(hit.copies):,} identical</span>'
    return (
        f'<li class="card" style="--shape:{shape:.3f}">'
        f'<a class="card-image" href="{html.escape(path.absolute().as_uri())}">{image}</a>'
        f'<p class="card-line"><b class="card-rank">{hit.rank}</b>'
        f'<span class="card-name" title="{whole}">{name}</span>'
        f'<span class="card-score">{hit.score:.3f}</span></p></li>'
    )


def _file_uri(path: Path) -> str:
    """Return a photo's file URI, for a browser on the same machine.

    Raises:
        BadImage: the file does not exist.
    """
    if not os.path.isfile(path):  # noqa: PTH113 -- also false if the folder is not accessible
        raise BadImage("file not found")
    return path.absolute().as_uri()


def _jpeg_uri(image: Image.Image) -> str:
    return data_uri(jpeg_bytes(image), "image/jpeg")


_STYLE_FILE = ("web", "static", "theme.css")


@dataclass(frozen=True)
class Query:
    """The query: its name, its kind, its image as the `src` of an `img`, and remarks."""

    name: str
    kind: str
    source: str
    remarks: Sequence[str] = ()


def render_sheet(
    query: Query, cards: Sequence[str], facts: Mapping[str, str], *, has_links: bool
) -> str:
    """Return the whole HTML page.

    Args:
        query: the query, shown on the left.
        cards: HTML of the hits, best first, each an `<li class="card">`.
        facts: pairs to list below the query.
        has_links: whether some images are loaded from files, which the page must allow.
    """
    rows = "".join(
        f"<dt>{escape_text(term)}</dt><dd>{escape_text(value)}</dd>"
        for term, value in facts.items()
    )
    remarks = "".join(f'<p class="remark">{escape_text(remark)}</p>' for remark in query.remarks)
    return _PAGE.format(
        style=_read_style() + _STYLE,
        images="data: file:" if has_links else "data:",
        title=escape_text(f"Photos for {query.name}"),
        name=escape_text(query.name),
        kind=query.kind,
        source=query.source,
        remarks=remarks,
        facts=f"<dl>{rows}</dl>" if rows else "",
        cards="\n".join(cards) or '<li class="nothing">The gallery has no photos.</li>',
    )


def escape_text(text: str) -> str:
    """Return text escaped for HTML, also within quotes, with control characters made visible."""
    return html.escape(printable_name(text))


def _read_style() -> str:
    # Read by path, so that a sheet does not need the server's dependencies.
    style = resources.files("sbtk_runtime").joinpath(*_STYLE_FILE).read_text(encoding="utf-8")
    return f"\n{style}"


_STYLE = """
main { display: grid; grid-template-columns: minmax(200px, 280px) 1fr; gap: 32px;
  padding: 32px; align-items: start; }
aside { position: sticky; top: 32px; }
.query { display: block; width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: var(--radius); }
h1 { font-size: 17px; font-weight: 600; margin: 16px 0 12px; overflow-wrap: anywhere; }
h1 small { display: block; font-size: 12px; font-weight: 500; color: var(--mark);
  text-transform: uppercase; letter-spacing: .08em; }
.remark { color: var(--soft); font-size: 14px; margin-bottom: 12px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 5px 14px; font-size: 14px;
  border-top: 1px solid var(--line); padding-top: 12px; }
dt { color: var(--soft); }
dd { overflow-wrap: anywhere; }
.cards { --row-px: 180px; display: flex; flex-wrap: wrap; gap: 12px; list-style: none; padding: 0; }
/* Takes what is left of the last row. Others fill it: factors whose sum is below 1 would not. */
.cards::after { content: ""; flex: 10000 0 0; }
.card { position: relative; min-width: 0; max-width: 100%; overflow: hidden;
  background: var(--card); flex: calc(10 * var(--shape)) 0 calc(var(--shape) * var(--row-px));
  border: 1px solid var(--line); border-radius: 10px; content-visibility: auto;
  contain-intrinsic-size: auto 216px; }
.card-image { position: relative; display: grid; place-items: center; aspect-ratio: var(--shape);
  background: var(--well); color: var(--soft); text-decoration: none; }
.card-image:focus-visible { outline-offset: -3px; }
.card-image img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.card-copies { position: absolute; left: 6px; bottom: 6px; padding: 1px 7px; border-radius: 9px;
  background: var(--card); font-size: 12px; }
.card-missing { padding: 1rem; font-size: 13px; text-align: center; overflow-wrap: anywhere; }
.card-line { display: flex; gap: 8px; align-items: baseline; padding: 6px 9px; font-size: 12px; }
.card-rank { color: var(--mark); font-variant-numeric: tabular-nums; }
.card-name { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.card-score { color: var(--soft); font-variant-numeric: tabular-nums; }
.nothing { flex: 1 0 100%; padding: 32px; text-align: center; color: var(--soft); }
@media (max-width: 720px) { main { grid-template-columns: 1fr; padding: 16px; gap: 20px; }
  aside { position: static; display: grid; gap: 16px; grid-template-columns: 2fr 3fr; }
  h1 { margin-top: 0; } .cards { --row-px: 110px; gap: 8px; } }
@media print { main { display: block; padding: 0; }
  aside { position: static; display: grid; grid-template-columns: 32mm 1fr; gap: 6mm;
    margin-bottom: 6mm; } h1 { margin-top: 0; }
  .cards { --row-px: 34mm; gap: 3mm; } .card { content-visibility: visible; break-inside: avoid; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src {images}; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="sbtk">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<aside>
<img class="query" src="{source}" alt="the {kind}">
<div>
<h1><small>{kind}</small>{name}</h1>
{remarks}{facts}
</div>
</aside>
<ol class="cards">
{cards}
</ol>
</main>
</body>
</html>
"""
