"""Hits as a contact sheet: one HTML file that needs nothing else and runs nothing.

Thumbnails are data URIs, so the sheet can be mailed; names are escaped, and a content security
policy forbids scripts and the network, so a hostile file name stays text.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sbtk_runtime.errors import BadImage
from sbtk_runtime.files import write_atomically
from sbtk_runtime.images import decode, on_white, read_image_bytes
from sbtk_runtime.names import printable_name
from sbtk_runtime.preprocess import Kind, prepare

if TYPE_CHECKING:
    from sbtk_runtime.gallery import Hit

THUMBNAIL_PX = 360
_JPEG_QUALITY = 80


def write_contact_sheet(
    path: Path,
    query: bytes,
    hits: Sequence[Hit],
    *,
    name: str,
    kind: Kind = "sketch",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes `contact_sheet` to `path`, atomically, as UTF-8."""
    page = contact_sheet(query, hits, name=name, kind=kind, facts=facts)
    write_atomically(path, page.encode("utf-8"))


def contact_sheet(
    query: bytes,
    hits: Sequence[Hit],
    *,
    name: str,
    kind: Kind = "sketch",
    facts: Mapping[str, str] | None = None,
) -> str:
    """Returns an HTML page with the query on the left and its hits, best first, on the right.

    Args:
        query: the bytes of the sketch's (or photo's) image file.
        hits: what `Gallery.search` returned; a photo that can no longer be read keeps its card.
        name: what the query is called in the heading.
        kind: what the query is; a sketch that had to be inverted is shown as the model saw it.
        facts: pairs to list below the query, such as the gallery and the model.

    Raises:
        BadImage: `query` is no image.
    """
    picture, notices = _query_picture(query, kind)
    cards = "\n".join(_card(hit) for hit in hits)
    rows = "".join(
        f"<dt>{_escaped(term)}</dt><dd>{_escaped(value)}</dd>"
        for term, value in (facts or {}).items()
    )
    remarks = "".join(f'<p class="remark">{_escaped(notice)}</p>' for notice in notices)
    return _PAGE.format(
        style=_STYLE,
        title=_escaped(f"Photos for {name}"),
        name=_escaped(name),
        kind=kind,
        source=_data_uri(picture, "PNG" if kind == "sketch" else "JPEG"),
        remarks=remarks,
        facts=f"<dl>{rows}</dl>" if rows else "",
        cards=cards or '<li class="nothing">The gallery has no photos.</li>',
    )


def thumbnail(path: Path, size_px: int = THUMBNAIL_PX) -> Image.Image:
    """Returns the photo, upright, RGB, no side longer than `size_px`.

    Raises:
        BadImage: the file cannot be read, or is no image.
    """
    image = on_white(decode(read_image_bytes(path), at_least_px=size_px))
    image.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    return image


def _query_picture(data: bytes, kind: Kind) -> tuple[Image.Image, tuple[str, ...]]:
    prepared = prepare(data, kind)
    if prepared.notices:
        return Image.fromarray(prepared.pixels), prepared.notices
    picture = on_white(decode(data, at_least_px=2 * THUMBNAIL_PX))
    picture.thumbnail((2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return picture, ()


def _card(hit: Hit) -> str:
    path = Path(hit.path)
    name, folder = _escaped(path.name), _escaped(str(path.parent))
    try:
        uri = _data_uri(thumbnail(path), "JPEG")
        picture = f'<img src="{uri}" alt="{name}" loading="lazy">'
    except BadImage as problem:
        picture = f'<span class="gone">{_escaped(problem.found)}</span>'
    # A cosine below zero has an empty bar.
    share = max(0.0, min(1.0, hit.score))
    return (
        f'<li><a href="{html.escape(path.absolute().as_uri())}">{picture}</a>'
        f'<p class="line"><b>{hit.rank}</b><span class="name" title="{folder}/{name}">{name}</span>'
        f'<span class="score">{hit.score:.3f}</span></p>'
        f'<p class="bar"><i style="width:{share:.1%}"></i></p></li>'
    )


def _data_uri(image: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    if form == "JPEG":
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    else:
        image.save(buffer, form, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{form.lower()};base64,{text}"


def _escaped(text: str) -> str:
    return html.escape(printable_name(text))


_STYLE = """
:root { color-scheme: light dark; --paper: #f6f5f2; --card: #fff; --ink: #1d1c1a; --soft: #6d6a64;
  --line: #e3e0da; --mark: #c2571a; --shade: 0 1px 2px #0001, 0 4px 14px #0000000d; }
@media (prefers-color-scheme: dark) { :root { --paper: #171615; --card: #22211f; --ink: #efece6;
  --soft: #a09b92; --line: #35332f; --mark: #ef8a4b; --shade: none; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { display: grid; grid-template-columns: minmax(200px, 280px) 1fr; gap: 2rem;
  max-width: 1500px; margin: 0 auto; padding: 2rem; align-items: start; }
aside { position: sticky; top: 2rem; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 1rem 0 .75rem; overflow-wrap: anywhere; }
h1 small { display: block; font-size: .75rem; font-weight: 500; color: var(--mark);
  text-transform: uppercase; letter-spacing: .08em; }
aside img { display: block; width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: 12px; }
.remark { color: var(--soft); font-size: .85rem; margin-bottom: .75rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .3rem .9rem; font-size: .85rem;
  border-top: 1px solid var(--line); padding-top: .75rem; }
dt { color: var(--soft); }
dd { overflow-wrap: anywhere; }
ol { list-style: none; padding: 0; display: grid; gap: 1.1rem;
  grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
li { background: var(--card); border-radius: 12px; overflow: hidden; box-shadow: var(--shade);
  border: 1px solid var(--line); }
li a { display: grid; place-items: center; position: relative; aspect-ratio: 1;
  background: var(--line); color: var(--soft); text-decoration: none; }
li a:focus-visible { outline: 3px solid var(--mark); outline-offset: -3px; }
li img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.gone { padding: 1rem; font-size: .85rem; text-align: center; }
.line { display: flex; gap: .6rem; align-items: baseline; padding: .6rem .8rem .45rem; }
.line b { color: var(--mark); font-variant-numeric: tabular-nums; }
.name { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.score { color: var(--soft); font-variant-numeric: tabular-nums; }
.bar { height: 3px; background: var(--line); }
.bar i { display: block; height: 100%; background: var(--mark); }
.nothing { grid-column: 1 / -1; padding: 2rem; text-align: center; color: var(--soft); }
@media (max-width: 720px) { main { grid-template-columns: 1fr; padding: 1rem; gap: 1.25rem; }
  aside { position: static; } aside img { max-width: 220px; } }
@media print { aside { position: static; } li { break-inside: avoid; box-shadow: none; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="generator" content="sbtk">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<aside>
<img src="{source}" alt="the {kind}">
<h1><small>{kind}</small>{name}</h1>
{remarks}{facts}
</aside>
<ol>
{cards}
</ol>
</main>
</body>
</html>
"""
