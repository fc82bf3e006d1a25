"""The API of a real server, compared with the Python API."""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from sbtk_runtime.errors import BadGallery
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.images import MAX_DECODE_BYTES
from sbtk_runtime.web.errors import refusal_of
from tests.serve_client import all_received, ask, connected, png, query, sketch_png
from tests.serve_process import ServeProcess
from tests.tiny import tiny_sketch
from tests.web.conftest import ODD_NAMES, Workplace

ROUTES = {
    "/v1/query": {"post"},
    "/v1/photos": {"get"},
    "/v1/photos/{photo_id}": {"get"},
    "/v1/photos/{photo_id}/details": {"get"},
    "/v1/photos/{photo_id}/thumbnail": {"get"},
    "/v1/photos/{photo_id}/file": {"get"},
    "/v1/photos/{photo_id}/similar": {"get"},
    "/v1/photos/{photo_id}/folder": {"post"},
    "/v1/folders": {"get", "delete"},
    "/v1/failures": {"get"},
    "/v1/indexing": {"get", "post"},
    "/v1/indexing/events": {"get"},
    "/v1/similar": {"get"},
    "/v1/queries": {"post"},
    "/v1/gallery": {"get"},
    "/healthz": {"get"},
    "/metrics": {"get"},
}
# What Python takes for numbers and other programs do not.
ODD_NUMBERS = ("%2B1", "%201", "1%20", "1_0", "%D9%A1", "%EF%BC%91", "1.0", "1e1", "9" * 20)


def id_of(place: Workplace, name: str) -> int:
    with Gallery.open(place.gallery) as gallery:
        path = str(place.photos / name)
        return next(photo.id for photo in gallery._view.photos() if photo.path == path)


def test_a_query_returns_the_hits_of_the_python_api(
    server: ServeProcess, shared: Workplace
) -> None:
    sketch = sketch_png(3)
    answer = query(server.port, sketch)
    assert answer.status == 200
    content = answer.json()
    assert list(content) == ["hits", "kind", "generation", "engine", "took_ms", "notices"]
    assert content["hits"] == [hit.to_json() for hit in shared.hits(sketch)]
    assert len(content["hits"]) == 24
    assert (content["generation"], content["engine"]) == (1, "onnxruntime")
    assert 0 < content["took_ms"] < 10_000
    assert content["notices"] == []


@pytest.mark.parametrize(("name", "form"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_images_of_all_three_formats_are_accepted(
    server: ServeProcess, shared: Workplace, name: str, form: str
) -> None:
    buffer = io.BytesIO()
    tiny_sketch(4).save(buffer, form)
    answer = query(server.port, buffer.getvalue(), "?k=5", f"image/{name}; charset=binary")
    assert answer.json()["hits"] == [h.to_json() for h in shared.hits(buffer.getvalue(), k=5)]


def test_a_photo_finds_itself_with_as_photo(server: ServeProcess, shared: Workplace) -> None:
    photo = shared.photos / "photo-0003.png"
    (hit,) = query(server.port, photo.read_bytes(), "?k=1&as=photo").json()["hits"]
    assert hit["path"] == str(photo)
    assert hit["score"] == pytest.approx(1.0, abs=1e-3)


def test_a_photo_is_detected_unless_the_request_says_sketch(
    server: ServeProcess, shared: Workplace
) -> None:
    photo = (shared.photos / "photo-0003.png").read_bytes()
    detected = query(server.port, photo, "?k=3").json()
    assert detected["kind"] == "photo"
    assert detected["hits"] == query(server.port, photo, "?k=3&as=photo").json()["hits"]
    assert detected["notices"] == [
        "The image looks like a photo and was searched as one; to search it as a sketch: as=sketch"
    ]
    overruled = query(server.port, photo, "?k=3&as=sketch").json()
    assert (overruled["kind"], overruled["notices"]) == ("sketch", [])
    assert overruled["hits"] == [hit.to_json() for hit in shared.hits(photo, "sketch", 3)]
    assert query(server.port, sketch_png(), "?k=1").json()["kind"] == "sketch"


def _form(*images: bytes, field: str = "image") -> bytes:
    head = f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="a.png"\r\n'
    head += "Content-Type: image/png\r\n\r\n"
    return b"".join(head.encode() + image + b"\r\n" for image in images) + b"--edge--\r\n"


IN_FORM = {"content-type": "multipart/form-data; boundary=edge"}


def test_a_form_with_the_field_image_is_accepted(server: ServeProcess) -> None:
    sketch = sketch_png(3)
    form = query(server.port, _form(sketch), "?k=5", "multipart/form-data; boundary=edge")
    assert form.status == 200
    assert form.json()["hits"] == query(server.port, sketch, "?k=5").json()["hits"]


@pytest.mark.parametrize(
    ("body", "boundary"),
    [
        (_form(b"x"), ""),
        (_form(b"x"), "; boundary=" + "b" * 71),
        (_form(b"x"), "; boundary=other"),
        (_form(b"x", field="file"), "; boundary=edge"),
        (_form(b"x")[:-11], "; boundary=edge"),
        (_form(b"x")[:-4] + _form(b"y")[6:], "; boundary=edge"),
        (b"--edge\r\nno headers\r\n--edge--", "; boundary=edge"),
        (b"--edge\r\n" + b"a" * 5_000 + b"\r\n\r\nx\r\n--edge--", "; boundary=edge"),
        (b"", "; boundary=edge"),
    ],
)
def test_a_form_of_another_kind_is_refused(
    server: ServeProcess, body: bytes, boundary: str
) -> None:
    answer = query(server.port, body, "", f"multipart/form-data{boundary}")
    assert (answer.status, answer.code) == (400, "bad_form")
    assert "one file in the field 'image'" in answer.json()["error"]["message"]


def test_hits_are_ordered_by_the_parameter_rerank(server: ServeProcess, shared: Workplace) -> None:
    sketch = sketch_png(3)
    with Gallery.open(shared.gallery) as gallery, shared.embedder() as embedder:
        for rerank in ("none", "expand", "diffusion"):
            found = gallery.query(sketch, embedder, 5, rerank=rerank)
            answer = query(server.port, sketch, f"?k=5&rerank={rerank}").json()
            assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in found]
    photo_id = id_of(shared, "photo-0000.jpg")
    similar = ask(server.port, f"/v1/photos/{photo_id}/similar?rerank=diffusion")
    assert similar.status == 200
    wrong = query(server.port, sketch, "?rerank=magic")
    assert (wrong.status, wrong.code) == (422, "bad_parameter")


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("photos.sbtk has no neighbours", "photos.sbtk has no neighbours."),
        ("--rerank expand of a collection", "--rerank expand of a collection."),
        ("the gallery is empty", "The gallery is empty."),
        ("empty", "Empty."),
    ],
)
def test_messages_begin_with_a_capital_except_for_names(found: str, shown: str) -> None:
    assert json.loads(refusal_of(BadGallery(found)).body())["error"]["message"] == shown


def test_a_small_gallery_returns_all_its_photos(server: ServeProcess) -> None:
    content = query(server.port, sketch_png(), "?k=200").json()
    assert [hit["rank"] for hit in content["hits"]] == list(range(1, 35))
    assert content["notices"] == ["only 34 photos are searchable, so there are fewer hits"]


def test_notices_say_how_a_sketch_was_changed(server: ServeProcess) -> None:
    light_on_dark = png(tiny_sketch(0).point(lambda value: 255 - value))
    (notice,) = query(server.port, light_on_dark).json()["notices"]
    assert "inverted" in notice


def test_a_folder_limits_the_hits(server: ServeProcess, shared: Workplace) -> None:
    under = quote(str(shared.photos / "album"))
    hits = query(server.port, sketch_png(), f"?under={under}").json()["hits"]
    assert len(hits) == 6
    assert {Path(hit["path"]).parent.name for hit in hits} == {"album"}
    nothing = query(server.port, sketch_png(), "?under=/nowhere/at/all").json()
    assert (nothing["hits"], len(nothing["notices"])) == ([], 1)


def test_every_route_can_be_limited_to_a_period(server: ServeProcess) -> None:
    def count(days: str) -> set[int]:
        body = _form(sketch_png())
        answers = [
            query(server.port, sketch_png(), f"?k=99&{days}").json()["hits"],
            ask(server.port, f"/v1/queries?limit=99&{days}", "POST", body, IN_FORM).json()[
                "results"
            ][0]["hits"],
            ask(server.port, f"/v1/photos?limit=99&{days}").json()["photos"],
            [{}, *ask(server.port, f"/v1/photos/1/similar?k=99&{days}").json()["hits"]],
            ask(server.port, f"/v1/similar?like=1&k=99&{days}").json()["hits"],
        ]
        return {*map(len, answers)}

    today = datetime.date.today()
    before, after = (today + datetime.timedelta(days=days) for days in (-2, 2))
    assert count("") == count(f"taken_from={before}&taken_to={after}") == {34}
    for nothing in (f"taken_from={after}", f"taken_to={before}"):
        assert count(nothing) <= {0, 1}
    said = query(server.port, sketch_png(), f"?taken_from={before}").json()["notices"]
    assert any("34 photos from " in notice for notice in said)


@pytest.mark.parametrize(
    "days",
    ["taken_from=2024-13-01", "taken_to=yesterday", "taken_from=2024-06-01&taken_to=2024-05-31"],
)
def test_invalid_days_are_refused(server: ServeProcess, days: str) -> None:
    refused = query(server.port, sketch_png(), f"?{days}")
    assert (refused.status, refused.code) == (422, "bad_parameter")
    assert "taken_" in refused.json()["error"]["message"]


def test_folder_names_may_contain_any_bytes(workplace: Workplace) -> None:
    folder = workplace.photos / os.fsdecode(b"caf\xe9 + 100%&more")
    folder.mkdir()
    (workplace.photos / "photo-0001.png").rename(folder / "photo-0001.png")
    workplace.index()
    with workplace.serving() as process:
        process.wait_until_ready()
        under = quote(os.fsencode(folder))
        answer = query(process.port, sketch_png(), f"?k=5&under={under}").json()
        assert answer["notices"][0].startswith("only 1 photo is searchable below ")
        (hit,) = answer["hits"]
        assert base64.b64decode(hit["path_bytes"]) == os.fsencode(folder / "photo-0001.png")
        folders = ask(process.port, "/v1/gallery").json()["folders"]
        assert [set(entry) for entry in folders] == [
            {"path", "name", "count"},
            {"path_bytes", "name", "count"},
        ]
        assert base64.b64decode(folders[1]["path_bytes"]) == os.fsencode(folder)


@pytest.mark.parametrize(
    "parameters",
    [
        "?k=0",
        "?k=-1",
        "?k=201",
        f"?k={10**9}",
        f"?k={10**40}",
        "?k=1.5",
        "?k=many",
        "?k=",
        "?as=painting",
        "?as=",
        "?under=photos",
        "?under=",
        "?under=/photos%00/x",
        "?fold=1",
        "?limit=0",
        "?limit=201",
        "?offset=-1",
    ],
)
def test_parameters_out_of_range_are_named(server: ServeProcess, parameters: str) -> None:
    answer = query(server.port, sketch_png(), parameters)
    assert (answer.status, answer.code) == (422, "bad_parameter")
    named = parameters[1:].partition("=")[0]
    assert f"The parameter {named} is wrong" in answer.json()["error"]["message"]


def test_what_is_wrong_with_a_parameter_is_said_in_plain_words(server: ServeProcess) -> None:
    for path, what in (
        ("/v1/photos?limit=-1", "limit is wrong: numbers consist of 1 to 19 digits, 0 to 9."),
        ("/v1/photos?offset=" + "9" * 20, "numbers consist of 1 to 19 digits"),
        ("/v1/similar?like=a", "like is wrong: it is not written like the examples in /docs."),
    ):
        assert what in ask(server.port, path).json()["error"]["message"]


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_numbers_must_be_plain_digits(server: ServeProcess, number: str) -> None:
    for path, name in (
        (f"/v1/photos/1/similar?k={number}", "k"),
        (f"/v1/photos?limit={number}", "limit"),
        (f"/v1/photos?offset={number}", "offset"),
        (f"/v1/photos/1/thumbnail?size={number}", "size"),
    ):
        answer = ask(server.port, path)
        assert (answer.status, answer.code) == (422, "bad_parameter")
        assert f"The parameter {name} is wrong" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "given", ["?x=1", "?K=5", "?token=abcdefgh", "?x", "?%00=1", "?=1", "?a&b"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_unknown_parameters_are_refused_everywhere(
    server: ServeProcess, method: str, given: str
) -> None:
    paths = [path.replace("{photo_id}", "1") for path in ROUTES if "get" in ROUTES[path]]
    for path in (*paths, "/openapi.json"):
        answer = ask(server.port, path + given, method)
        assert answer.status == 422, path
        if method == "GET":
            assert answer.code == "bad_parameter"
            assert "Unknown parameter" in answer.json()["error"]["message"]
    assert query(server.port, sketch_png(), given).code == "bad_parameter"


@pytest.mark.parametrize(
    "given", ["?k=3&k=3", "?as=sketch&as=photo", "?under=/a&under=/b", "?k=3&%6b=4", "?k&k=3"]
)
def test_a_repeated_parameter_is_refused(server: ServeProcess, given: str) -> None:
    answer = query(server.port, sketch_png(), given)
    assert (answer.status, answer.code) == (422, "bad_parameter")
    assert "given 2 times" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/docs", "/static/theme.css"])
def test_pages_ignore_parameters_that_links_add(server: ServeProcess, path: str) -> None:
    assert ask(server.port, path + "?utm_source=x&utm_source=y").status == 200


def test_an_empty_sketch_and_a_bad_image_have_different_codes(server: ServeProcess) -> None:
    empty = query(server.port, png(Image.new("L", (200, 200), 255)))
    assert (empty.status, empty.code) == (400, "empty_sketch")
    cut = query(server.port, sketch_png()[: len(sketch_png()) // 2])
    assert (cut.status, cut.code) == (400, "bad_image")
    gif = io.BytesIO()
    tiny_sketch(0).save(gif, "GIF")
    other = query(server.port, gif.getvalue())
    assert (other.status, other.code) == (400, "bad_image")
    assert "PNG, JPEG or WebP" in other.json()["error"]["message"]
    svg = query(server.port, b"<svg/>", media_type="image/svg+xml")
    assert (svg.status, svg.code) == (415, "unsupported_type")


def test_an_image_that_takes_too_much_memory_is_refused_by_its_header(
    server: ServeProcess,
) -> None:
    answer = query(server.port, png(Image.new("1", (9_000, 9_000))), "?as=photo")
    assert (answer.status, answer.code) == (400, "bad_image")
    assert f"{MAX_DECODE_BYTES >> 20} MiB" in answer.json()["error"]["message"]


def test_a_photo_is_described(server: ServeProcess, shared: Workplace) -> None:
    photo = shared.photos / "album" / "photo-0002.jpg"
    photo_id = id_of(shared, "album/photo-0002.jpg")
    content = ask(server.port, f"/v1/photos/{photo_id}").json()
    modified = content.pop("modified")
    assert content == {
        "id": photo_id,
        "path": str(photo),
        "name": "photo-0002.jpg",
        "folder": str(shared.photos / "album"),
        "size_bytes": photo.stat().st_size,
        "sha256": sha256_of_file(photo),
    }
    assert modified.endswith("Z")
    assert modified[:2] == "20"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_unusual_names_are_exact_for_programs_and_escaped_for_display(
    server: ServeProcess, shared: Workplace, name: bytes
) -> None:
    photo_id = id_of(shared, os.fsdecode(name))
    content = ask(server.port, f"/v1/photos/{photo_id}").json()
    path = os.fsencode(shared.photos) + b"/" + name
    if b"\xff" in name:
        assert base64.b64decode(content["path_bytes"]) == path
        assert "path" not in content
        assert content["name"] == "not \\xff utf-8.png"
    else:
        assert content["path"] == path.decode()
        assert content["name"] == name.decode()
    file = ask(server.port, f"/v1/photos/{photo_id}/file")
    assert file.headers["content-disposition"] == f"inline; filename*=UTF-8''{quote(name)}"
    assert file.body == Path(os.fsdecode(path)).read_bytes()


@pytest.mark.parametrize("size_px", [180, 360, 720, 1600])
def test_thumbnails_are_small_jpegs_that_are_not_enlarged(
    server: ServeProcess, shared: Workplace, size_px: int
) -> None:
    photo_id = id_of(shared, "large.webp")
    answer = ask(server.port, f"/v1/photos/{photo_id}/thumbnail?size={size_px}")
    assert answer.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(answer.body)) as image:
        assert image.format == "JPEG"
        assert max(image.size) == min(size_px, 900)
        assert image.width / image.height == pytest.approx(1.5, abs=0.02)


def test_thumbnails_are_upright_and_have_no_metadata(
    server: ServeProcess, shared: Workplace
) -> None:
    photo_id = id_of(shared, "turned.jpg")
    answer = ask(server.port, f"/v1/photos/{photo_id}/thumbnail")
    with Image.open(io.BytesIO(answer.body)) as image:
        assert image.size == (180, 360)
        assert not image.getexif()
    assert b"who took this" not in answer.body
    assert b"who took this" in ask(server.port, f"/v1/photos/{photo_id}/file").body


@pytest.mark.parametrize("what", ["thumbnail", "thumbnail?size=180", "file"])
def test_a_current_copy_gets_a_304(server: ServeProcess, shared: Workplace, what: str) -> None:
    path = f"/v1/photos/{id_of(shared, 'photo-0000.jpg')}/{what}"
    first = ask(server.port, path)
    assert first.headers["cache-control"] == "private, no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = ask(server.port, path, headers={"if-none-match": known})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert ask(server.port, path, headers={"if-none-match": '"other"'}).body == first.body


def test_etags_differ_between_sizes_and_photos(server: ServeProcess, shared: Workplace) -> None:
    ids = [id_of(shared, name) for name in ("photo-0000.jpg", "photo-0002.jpg")]
    whats = ("thumbnail?size=180", "thumbnail?size=360", "file")
    tags = {
        ask(server.port, f"/v1/photos/{photo_id}/{what}").headers["etag"]
        for photo_id in ids
        for what in whats
    }
    assert len(tags) == 6


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("photo-0000.jpg", "image/jpeg"),
        ("photo-0001.png", "image/png"),
        ("large.webp", "image/webp"),
    ],
)
def test_a_file_is_sent_unchanged(
    server: ServeProcess, shared: Workplace, name: str, media_type: str
) -> None:
    answer = ask(server.port, f"/v1/photos/{id_of(shared, name)}/file")
    assert answer.headers["content-type"] == media_type
    assert answer.body == (shared.photos / name).read_bytes()


def test_similar_photos_do_not_include_the_photo_itself(
    server: ServeProcess, shared: Workplace
) -> None:
    photo_id = id_of(shared, "photo-0004.jpg")
    content = ask(server.port, f"/v1/photos/{photo_id}/similar?k=6").json()
    with Gallery.open(shared.gallery) as gallery:
        assert content["hits"] == [hit.to_json() for hit in gallery.similar(photo_id, 6).hits]
    assert list(content) == ["hits", "generation", "engine", "took_ms", "notices"]
    under = quote(str(shared.photos / "album"))
    inside = ask(server.port, f"/v1/photos/{photo_id}/similar?under={under}").json()["hits"]
    assert len(inside) == 6


def test_pages_of_hits_are_parts_of_one_list(server: ServeProcess) -> None:
    whole = query(server.port, sketch_png(), "?k=200").json()["hits"]
    assert len(whole) == 34
    alike = ask(server.port, "/v1/photos/1/similar?k=33").json()["hits"]
    for pages, hits in (
        ([query(server.port, sketch_png(), f"?limit=15&offset={at}") for at in (0, 15, 30)], whole),
        (
            [ask(server.port, f"/v1/photos/1/similar?limit=15&offset={at}") for at in (0, 15, 30)],
            alike,
        ),
    ):
        assert [hit for page in pages for hit in page.json()["hits"]] == hits
    after = query(server.port, sketch_png(), f"?offset={10**17}")
    assert (after.status, after.json()["hits"]) == (200, [])


def test_photos_are_listed_newest_first(workplace: Workplace) -> None:
    paths = sorted(path for path in workplace.photos.rglob("*") if path.is_file())
    for minute, path in enumerate(paths):
        os.utime(path, (60 * minute, 60 * minute))
    copy = workplace.photos / "album" / "copy.png"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(paths[0], copy)
    os.utime(copy, (1e9, 1e9))
    workplace.index()
    with workplace.serving() as process:
        process.wait_until_ready()
        content = ask(process.port, "/v1/photos?limit=200").json()
        newest, *others = content["photos"]
        assert (newest["path"], newest["modified"]) == (str(copy), "2001-09-09T01:46:40Z")
        assert [each["path"] for each in newest["copies"]] == [str(paths[0])]
        assert [photo["path"] for photo in others] == [str(path) for path in paths[:0:-1]]
        pages = [ask(process.port, f"/v1/photos?limit=3&offset={at}") for at in (0, 3)]
        listed = [photo for page in pages for photo in page.json()["photos"]]
        assert listed == content["photos"][:6]
        inside = ask(process.port, f"/v1/photos?under={quote(str(copy.parent))}").json()
        assert inside["photos"][0]["id"] == newest["id"]
        assert "copies" not in inside["photos"][0]


def test_copies_are_one_hit_or_separate_hits(workplace: Workplace) -> None:
    for number in range(3):
        shutil.copy(workplace.photos / "photo-0001.png", workplace.photos / f"copy {number}.png")
    workplace.index()
    with workplace.serving() as process:
        process.wait_until_ready()
        folded = query(process.port, sketch_png(), "?k=11&fold=true").json()["hits"]
        assert query(process.port, sketch_png(), "?k=11").json()["hits"] == folded
        assert sorted(len(hit.get("copies", [])) for hit in folded) == [0] * 7 + [3]
        single = query(process.port, sketch_png(), "?k=11&fold=false").json()["hits"]
        assert len({hit["id"] for hit in single}) == len(single) == 11
        assert not any("copies" in hit for hit in single)
        (hit,) = (hit for hit in folded if "copies" in hit)
        similar = f"/v1/photos/{hit['copies'][0]['id']}/similar?k=9"
        assert len(ask(process.port, similar).json()["hits"]) == 7
        others = ask(process.port, f"{similar}&fold=false").json()["hits"]
        assert {copy["id"] for copy in hit["copies"][1:]} | {hit["id"]} <= {
            other["id"] for other in others
        }


@pytest.mark.parametrize("what", ["", "/thumbnail", "/file", "/similar"])
def test_unknown_ids_are_not_found(server: ServeProcess, what: str) -> None:
    for photo_id in (*("0", "999", "-1", "1.5", "one", str(10**40)), *ODD_NUMBERS):
        answer = ask(server.port, f"/v1/photos/{photo_id}{what}")
        assert (answer.status, answer.code) == (404, "no_photo")


def test_people_get_a_page_if_a_photo_cannot_be_opened(server: ServeProcess) -> None:
    browser = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    for photo_id in ("999", "one"):
        page = ask(server.port, f"/v1/photos/{photo_id}/file", headers=browser)
        assert (page.status, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
        assert "There is no " in page.body.decode()
        assert '<a href="../../../">Open the start page</a>' in page.body.decode()
        # Programs, and what is not a page, get JSON.
        assert ask(server.port, f"/v1/photos/{photo_id}/file").code == "no_photo"
        assert ask(server.port, f"/v1/photos/{photo_id}", headers=browser).code == "no_photo"


def test_the_gallery_is_described(server: ServeProcess, shared: Workplace) -> None:
    content = ask(server.port, "/v1/gallery").json()
    assert content["folders"] == [
        {"path": str(shared.photos), "name": "photos", "count": 28},
        {"path": str(shared.photos / "album"), "name": "album", "count": 6},
    ]
    with Gallery.open(shared.gallery) as gallery:
        assert content["model_id"] == gallery.manifest.model_id
        assert content["precision"] == gallery.manifest.precision
    assert (content["name"], content["count"], content["generation"], content["bits"]) == (
        *("gallery.sbtk", 34),
        *(1, None),
    )


def test_health_names_the_engine_in_use(server: ServeProcess) -> None:
    import onnxruntime

    status, health = server.health()
    assert status == 200
    assert health == {
        "status": "ok",
        "stuck_s": None,
        "engine": {
            "name": "onnxruntime",
            "version": onnxruntime.__version__,
            "device": "cpu",
            "precision": "int8",
            "threads": 1,
        },
        "generation": 1,
        "photos": 34,
        "is_indexing": False,
        "problem": None,
    }


def test_metrics_count_requests(server: ServeProcess) -> None:
    def figures() -> dict[tuple[str, str], float]:
        answer = ask(server.port, "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(answer.body.decode())
        return {
            (sample.name, " ".join(str(sample.labels[key]) for key in sorted(sample.labels))): (
                sample.value
            )
            for family in families
            for sample in family.samples
        }

    before = figures()
    query(server.port, sketch_png())
    query(server.port, b"")
    ask(server.port, "/v1/photos/1/thumbnail?size=720")
    ask(server.port, "/no/such/path/5")
    after = figures()

    def added(name: str, labels: str = "") -> float:
        return after[name, labels] - before.get((name, labels), 0.0)

    assert added("sbtk_query_seconds_count") == 1
    assert added("sbtk_requests_total", "POST /v1/query 200") == 1
    assert added("sbtk_requests_total", "POST /v1/query 400") == 1
    assert added("sbtk_requests_total", "GET /v1/photos/{photo_id}/thumbnail 200") == 1
    assert added("sbtk_requests_total", "GET other 404") == 1
    # Tests before this one may have asked for that thumbnail.
    assert after["sbtk_thumbnail_bytes", ""] > 0
    assert (after["sbtk_photos", ""], after["sbtk_ready", ""]) == (34, 1)
    assert after["sbtk_gallery_generation", ""] == 1
    assert after["process_resident_memory_bytes", ""] > 10e6


def test_the_openapi_description_has_every_route_and_error(server: ServeProcess) -> None:
    described: dict[str, Any] = ask(server.port, "/openapi.json").json()
    assert {path: set(entry) for path, entry in described["paths"].items()} == ROUTES
    asked = described["paths"]["/v1/query"]["post"]
    formats = {"image/png", "image/jpeg", "image/webp", "multipart/form-data"}
    assert set(asked["requestBody"]["content"]) == formats
    tags = {
        path: operation["tags"]
        for path, entry in described["paths"].items()
        for operation in entry.values()
    }
    assert tags["/v1/photos/{photo_id}/similar"] == tags["/v1/query"] == ["Search"]
    assert tags["/v1/photos"] == ["Photos"]
    assert tags["/healthz"] == ["Server"]
    assert [tag["name"] for tag in described["tags"]] == [
        "Search",
        "Photos",
        "Collection",
        "Server",
    ]
    assert {"200", "400", "408", "413", "415", "422", "503", "504"} <= set(asked["responses"])
    error = {"$ref": "#/components/schemas/ErrorAnswer"}
    assert asked["responses"]["415"]["content"]["application/json"]["schema"] == error


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/static/theme.css",
        "/docs",
        "/docs/swagger-ui.css",
        "/openapi.json",
        "/healthz",
        "/v1/gallery",
        "/v1/photos/1",
        "/v1/photos/1/thumbnail?size=180",
        "/v1/photos/1/file",
        "/v1/photos/999/file",
        "/v1/photos/1/thumbnail?size=1",
        "/v1/query",
        "/nothing",
    ],
)
def test_head_is_answered_like_get_without_a_body(server: ServeProcess, path: str) -> None:
    get, head = ask(server.port, path), ask(server.port, path, "HEAD")
    assert get.body
    assert head.body == b""
    assert head.status == get.status
    for headers in (get.headers, head.headers):
        del headers["date"]
    assert head.headers == get.headers
    assert int(head.headers["content-length"]) == len(get.body)


def test_head_leaves_no_body_before_the_next_response(server: ServeProcess) -> None:
    asked = f"HEAD /v1/photos/1/file HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
    with connected(server.port) as client:
        client.sendall(f"{asked}\r\n{asked}\r\n{asked}Connection: close\r\n\r\n".encode())
        received = all_received(client)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert received.count(b"\r\n\r\n") == 3
    assert received.endswith(b"\r\n\r\n")


def test_head_returns_304_for_current_copies(server: ServeProcess) -> None:
    tag = ask(server.port, "/v1/photos/1/file").headers["etag"]
    for what in ("file", "similar?k=3"):
        assert ask(server.port, f"/v1/photos/1/{what}", "HEAD").status == 200
    again = ask(server.port, "/v1/photos/1/file", "HEAD", headers={"if-none-match": tag})
    assert (again.status, again.headers["etag"]) == (304, tag)


def test_wrong_addresses_and_methods_give_errors_of_the_same_form(server: ServeProcess) -> None:
    for path in ("/nothing", "/v1/photos/1/thumbnail/", "/v1/photos/", "/static/none.js"):
        answer = ask(server.port, path)
        assert (answer.status, answer.code) == (404, "not_found"), path
    answer = ask(server.port, "/v1/query")
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    for path in ("/v1/gallery", "/healthz", "/", "/docs"):
        answer = ask(server.port, path, "POST")
        assert (answer.status, answer.code) == (405, "method_not_allowed"), path
        assert answer.headers["allow"] == "GET, HEAD"


def test_the_page_and_its_files_are_served(server: ServeProcess) -> None:
    page = ask(server.port, "/")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    style = ask(server.port, "/static/theme.css")
    assert style.headers["content-type"].startswith("text/css")


def test_feedback_moves_the_hits(server: ServeProcess, shared: Workplace) -> None:
    with Gallery.open(shared.gallery) as gallery:
        liked, disliked = id_of(shared, "photo-0000.jpg"), id_of(shared, "photo-0001.png")
        expected = gallery.answer(gallery.refined(None, [liked], [disliked]), 34).hits
    answer = ask(server.port, f"/v1/similar?like={liked}&unlike={disliked}&k=34").json()
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected]
    ranks = {hit["id"]: hit["rank"] for hit in answer["hits"]}
    assert ranks[liked] == 1
    plain = query(server.port, sketch_png(3), "?as=sketch&k=34").json()
    last = plain["hits"][-1]["id"]
    moved = query(server.port, sketch_png(3), f"?as=sketch&k=34&like={last}").json()
    assert {hit["id"]: hit["rank"] for hit in moved["hits"]}[last] < 34


@pytest.mark.parametrize("given", ["", "x", "1,", ",1", "1,,2", "-1", "1;2", "1," * 40 + "1"])
def test_malformed_feedback_is_refused(server: ServeProcess, given: str) -> None:
    assert ask(server.port, f"/v1/similar?like={given}").code == "bad_parameter"
    assert query(server.port, sketch_png(), f"?unlike={given}").code == "bad_parameter"


def test_feedback_on_unknown_photos_is_refused(server: ServeProcess) -> None:
    assert ask(server.port, "/v1/similar?like=99999").code == "no_photo"
    assert query(server.port, sketch_png(), "?like=99999").code == "no_photo"
    assert ask(server.port, "/v1/similar?unlike=1").code == "bad_parameter"


def test_the_details_of_a_photo_come_from_its_file(server: ServeProcess, shared: Workplace) -> None:
    turned = ask(server.port, f"/v1/photos/{id_of(shared, 'turned.jpg')}/details")
    assert turned.json() == {"width_px": 200, "height_px": 400, "is_changed": False}
    large = ask(server.port, f"/v1/photos/{id_of(shared, 'large.webp')}/details").json()
    assert large == {"width_px": 900, "height_px": 600, "is_changed": False}
    assert ask(server.port, "/v1/photos/99999/details").code == "no_photo"


def test_a_batch_has_a_result_for_each_image(server: ServeProcess) -> None:
    images = [sketch_png(3), b"not an image", sketch_png(4)]
    answer = ask(server.port, "/v1/queries?as=sketch&limit=5", "POST", _form(*images), IN_FORM)
    assert answer.status == 200
    first, failed, last = answer.json()["results"]
    for one, image in ((first, images[0]), (last, images[2])):
        alone = query(server.port, image, "?as=sketch&limit=5").json()
        assert one["hits"] == alone["hits"]
    assert failed["error"]["code"] == "bad_image"


@pytest.mark.parametrize("count", [0, 33])
def test_a_batch_has_a_limit(server: ServeProcess, count: int) -> None:
    answer = ask(server.port, "/v1/queries", "POST", _form(*[sketch_png()] * count), IN_FORM)
    assert (answer.status, answer.code) == (400, "bad_form")


def test_a_batch_is_a_form_of_images_only(server: ServeProcess) -> None:
    body = _form(sketch_png(), field="other")
    assert ask(server.port, "/v1/queries", "POST", body, IN_FORM).code == "bad_form"
    raw = ask(server.port, "/v1/queries", "POST", sketch_png(), {"content-type": "image/png"})
    assert (raw.status, raw.code) == (415, "unsupported_type")
