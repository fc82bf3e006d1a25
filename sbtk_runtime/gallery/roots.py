"""Which indexed folders a photo lies in, and its path relative to the outermost of them."""

from __future__ import annotations

from collections.abc import Collection


def roots_above(path: bytes, roots: Collection[bytes]) -> list[bytes]:
    """Return those of the absolute `roots` that `path` is or lies below, innermost first."""
    found = []
    while True:
        if path in roots:
            found.append(path)
        parent = path.rpartition(b"/")[0] or b"/"
        if parent == path:
            return found
        path = parent


def relative_path(path: bytes, root: bytes) -> bytes:
    """Return an absolute path relative to a root above it; a root that is a file has its name."""
    if path == root:
        return path.rpartition(b"/")[2]
    return path[len(root.rstrip(b"/")) + 1 :]
