"""Asks sbtk from a program: by its Python library, and over the REST API of `sbtk serve`.

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

from sbtk_runtime import Embedder, Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.thumbnail import thumbnail

PHOTOS = Path(".demo/photos")
SKETCH = Path("demo/sketches/cat.png")
GALLERY = Path("example.sbtk")
HITS = 8


# %% [markdown]
# ## Index
#
# What `sbtk index` does. A second time, only what is new or changed is embedded.

# %%
embedder = Embedder()  # the model that comes with sbtk, on the fastest engine that works here
report = update_gallery(GALLERY, [PHOTOS], embedder)
print(f"{report.live} photos, {report.new} of them new, in {report.seconds:.1f} s")


# %% [markdown]
# ## Query from Python
#
# An open gallery is one state of it; open it again to see what was indexed since. A hit has a rank,


# %%
def draw(query: Path, found: Sequence[tuple[str, Image.Image]], file: str) -> None:
    """Draws a query and what was found for it, best first, and keeps the picture in `file`."""
    shown = [(query.name, thumbnail(query)), *found]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(1.8 * len(shown), 2.2))
    for axis, (title, picture) in zip(axes, shown, strict=True):
        axis.imshow(ImageOps.pad(picture, (360, 360), color="white"))
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
# Any language can do this; the server's page `/docs` is the API's reference. The server is a
# process of its own. It prints its address, and answers 503 with the header Retry-After until its
# model is loaded, or when it is too busy.

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
    """Returns what the server answers; sends `image`, if any, and waits while it is busy."""
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
    """Returns a title and a small picture for each hit of an answer."""
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
# The best hit becomes the question: its embedding is in the gallery, so no model has to run.

# %%
best = answer["hits"][0]
similar = json.loads(ask(f"/v1/photos/{best['id']}/similar?k={HITS}"))
draw(Path(best["path"]), with_thumbnails(similar), "hits-similar.png")


# %% [markdown]
# ## The end
#
# The server goes on until it is stopped, as by Ctrl-C.

# %%
server.terminate()
server.wait()
