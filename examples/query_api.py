"""Queries sbtk from a program: in Python, and over the REST API of `sbtk serve`.

Runs as a script, `python examples/query_api.py`, and cell by cell in Jupyter (with jupytext),
VS Code, Spyder or PyCharm. Start it from the folder above `examples/`. It needs the demo's
photos (`make demo`), or a folder of your own in `PHOTOS`, and `pip install ".[cpu,serve,plot]"`.
"""

# %%
from __future__ import annotations

import atexit
import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from matplotlib import pyplot
from PIL import Image, ImageOps

from sbtk_runtime import Embedder, Gallery, index
from sbtk_runtime.thumbnail import thumbnail

PHOTOS = Path(".demo/photos")
SKETCH = Path("demo/sketches/cat.png")
GALLERY = Path("example.sbtk")
HITS = 8


# %% [markdown]
# ## Index
#
# What `sbtk index` does. Later runs embed only new and changed photos.

# %%
embedder = Embedder()  # the model that comes with sbtk, on the fastest engine that works here
report = index(PHOTOS, GALLERY, embedder)
print(f"{report.live} photos, {report.new} of them new, in {report.seconds:.1f} s")


# %% [markdown]
# ## Query from Python
#
# An open gallery is a snapshot; open it again to see what was indexed since. A hit has a rank, a
# score and a path. The sketch may also be bytes, a file object, a Pillow image or a NumPy array.


# %%
def draw(query: Path, found: Sequence[tuple[str, Image.Image]], file: str) -> None:
    """Draw a query and its hits, best first, and save the figure as `file`."""
    shown = [(query.name, thumbnail(query)), *found]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(1.8 * len(shown), 2.2))
    for axis, (title, image) in zip(axes, shown, strict=True):
        axis.imshow(ImageOps.pad(image, (360, 360), color="white"))
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(file)
    print(f"{file}: {len(found)} photos for {query.name}")


with Gallery.open(GALLERY) as gallery:
    hits = gallery.query(SKETCH, embedder, k=HITS)
for hit in hits:
    print(f"{hit.rank}  {hit.score:.3f}  {hit.path}")
found = [(f"{hit.rank}: {hit.score:.2f}", thumbnail(hit.path)) for hit in hits]
draw(SKETCH, found, "hits-python.png")


# %% [markdown]
# ## Query over the REST API
#
# Any language can do this; the server's page `/docs` is the API's reference. The server prints its
# address, and responds with 503 and the header Retry-After while the model is loading, or when it
# is overloaded.

# %%
server = subprocess.Popen(  # noqa: S603 -- sbtk itself
    [sys.executable, "-m", "sbtk_cli", "serve", "--gallery", GALLERY, "--port", "0", "--quiet"],
    stdout=subprocess.PIPE,
    text=True,
)
atexit.register(server.terminate)
assert server.stdout is not None
ADDRESS = server.stdout.readline().strip().rstrip("/")


def ask(path: str, image: bytes | None = None) -> bytes:
    """Return the response to a request, with `image` as its body; wait for a busy server."""
    headers = {"Content-Type": "image/png"} if image else {}
    request = Request(ADDRESS + path, image, headers)  # noqa: S310 -- the address is our server's
    while True:
        try:
            with urlopen(request, timeout=30) as answer:  # noqa: S310
                return bytes(answer.read())
        except HTTPError as problem:
            if "Retry-After" in problem.headers:
                time.sleep(int(problem.headers["Retry-After"]))
                continue
            raise RuntimeError(json.load(problem)["error"]) from problem


def with_thumbnails(answer: dict[str, Any]) -> list[tuple[str, Image.Image]]:
    """Return a title and a thumbnail for each hit."""
    return [
        (
            f"{hit['rank']}: {hit['score']:.2f}",
            Image.open(io.BytesIO(ask(f"/v1/photos/{hit['id']}/thumbnail"))),
        )
        for hit in answer["hits"]
    ]


answer = json.loads(ask(f"/v1/query?k={HITS}&as=sketch", SKETCH.read_bytes()))
print(f"{len(answer['hits'])} hits by {answer['engine']} in {answer['took_ms']:.0f} ms")
for one in answer["hits"]:
    print(f"{one['rank']}  {one['score']:.3f}  {one['path']}")
draw(SKETCH, with_thumbnails(answer), "hits-rest.png")


# %% [markdown]
# ## More like this
#
# The best hit becomes the query. Its embedding is in the gallery, so no model runs.

# %%
best = answer["hits"][0]
similar = json.loads(ask(f"/v1/photos/{best['id']}/similar?k={HITS}"))
draw(Path(best["path"]), with_thumbnails(similar), "hits-similar.png")


# %% [markdown]
# ## Stop the server
#
# It runs until it is terminated, as by Ctrl-C.

# %%
server.terminate()
server.wait()
