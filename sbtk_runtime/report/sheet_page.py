"""The page around a contact sheet's cards: one file, with the look of the page that sbtk serves.

Nothing in it runs, and a content security policy keeps it so whatever a file is called.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from sbtk_runtime.names import printable_name

_LOOK = ("web", "static", "look.css")


@dataclass(frozen=True)
class Query:
    """What was asked: its name, what it is, its picture as an `img`'s source, and remarks."""

    name: str
    kind: str
    source: str
    remarks: Sequence[str] = ()


def sheet_page(
    query: Query, cards: Sequence[str], facts: Mapping[str, str], *, has_links: bool
) -> str:
    """Returns the whole HTML page.

    Args:
        query: shown on the left.
        cards: HTML of what was found, best first, each an `<li class="card">`.
        facts: pairs to list below the query.
        has_links: some pictures are read from their files, which the page must then allow.
    """
    rows = "".join(
        f"<dt>{escaped(term)}</dt><dd>{escaped(value)}</dd>" for term, value in facts.items()
    )
    remarks = "".join(f'<p class="remark">{escaped(remark)}</p>' for remark in query.remarks)
    return _PAGE.format(
        style=_look() + _STYLE,
        pictures="data: file:" if has_links else "data:",
        title=escaped(f"Photos for {query.name}"),
        name=escaped(query.name),
        kind=query.kind,
        source=query.source,
        remarks=remarks,
        facts=f"<dl>{rows}</dl>" if rows else "",
        cards="\n".join(cards) or '<li class="nothing">The gallery has no photos.</li>',
    )


def escaped(text: str) -> str:
    """Returns text as it may stand in HTML, also within quotes, control characters made visible."""
    return html.escape(printable_name(text))


def _look() -> str:
    # By its place and not as a module, so that a sheet needs nothing of what the server needs.
    look = resources.files("sbtk_runtime").joinpath(*_LOOK).read_text(encoding="utf-8")
    return f"\n{look}"


_STYLE = """
main { display: grid; grid-template-columns: minmax(200px, 280px) 1fr; gap: 32px;
  max-width: 1600px; margin: 0 auto; padding: 32px; align-items: start; }
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
.card { content-visibility: auto; contain-intrinsic-size: auto 216px; }
.nothing { grid-column: 1 / -1; padding: 32px; text-align: center; color: var(--soft); }
@media (max-width: 720px) { main { grid-template-columns: 1fr; padding: 16px; gap: 20px; }
  aside { position: static; display: grid; gap: 16px; grid-template-columns: 2fr 3fr; }
  h1 { margin-top: 0; } }
@media print { aside { position: static; } .card { content-visibility: visible; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src {pictures}; style-src 'unsafe-inline'">
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
