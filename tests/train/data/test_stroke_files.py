from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbtk_runtime.errors import BadData
from sbtk_train.data.stroke_files import read_stroke_file
from tests.tiny_data import polygon, write_strokes

LINE = [(0.0, 0.0), (255.0, 255.0)]


def test_drawings_are_read_by_class_with_their_strokes(tmp_path: Path) -> None:
    path = write_strokes(
        tmp_path / "s.npz", [("sun", [polygon(9)]), ("arrow", [LINE, polygon(3)]), ("sun", [LINE])]
    )
    found = read_stroke_file(path)
    assert found.name_of == ("arrow", "sun", "sun")
    assert [len(drawing.strokes) for drawing in found.drawings] == [2, 1, 1]
    assert [drawing.number for drawing in found.drawings] == [1, 0, 2]
    assert found.drawings[0].strokes[0].tolist() == [[0, 0], [255, 255]]


def test_empty_drawings_are_left_out_and_counted(tmp_path: Path) -> None:
    drawings: list[tuple[str, list[Any]]] = [("sun", []), ("sun", [[]]), ("sun", [[], LINE])]
    found = read_stroke_file(write_strokes(tmp_path / "s.npz", drawings))
    assert len(found.drawings) == 1
    assert found.empty == 2


def test_equal_strokes_have_one_identity(tmp_path: Path) -> None:
    first = read_stroke_file(write_strokes(tmp_path / "a.npz", [("sun", [LINE])]))
    drawings = [("arrow", [polygon(3)]), ("sun", [LINE])]
    second = read_stroke_file(write_strokes(tmp_path / "b.npz", drawings))
    assert first.drawings[0].identity == second.drawings[1].identity
    assert second.drawings[0].identity != second.drawings[1].identity


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"points": np.full((2, 2), 300, dtype=np.int32)}, "points outside the drawing"),
        ({"points": np.full((2, 2), np.nan, dtype=np.float32)}, "points outside the drawing"),
        ({"points": np.zeros((2, 3), dtype=np.uint8)}, "points of shape"),
        ({"stroke_offsets": np.array([0, 5])}, "stroke_offsets"),
        ({"stroke_offsets": np.array([1, 2])}, "stroke_offsets"),
        ({"stroke_offsets": np.array([0, 3, 2])}, "stroke_offsets"),
        ({"drawing_offsets": np.array([0, 2])}, "drawing_offsets"),
        ({"labels": np.array([7])}, "labels from 7 to 7"),
        ({"labels": np.array([-1])}, "labels from -1"),
        ({"labels": np.array([0, 0])}, "labels of shape"),
        ({"labels": np.array([0.5])}, "labels of shape"),
        ({"classes": np.array([b"sun"])}, "classes of type"),
        ({"classes": np.array([" "])}, "a class without a name"),
        ({"stroke_offsets": np.array(2)}, "stroke_offsets"),
        ({"drawing_offsets": np.array(2)}, "drawing_offsets"),
        ({"drawing_offsets": np.array([0]), "labels": np.zeros(0, np.int8)}, "drawing_offsets"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write_strokes(tmp_path / "s.npz", [("sun", [LINE])], **changes)
    with pytest.raises(BadData, match=reason):
        read_stroke_file(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text, cut, other = tmp_path / "t.npz", tmp_path / "c.npz", tmp_path / "o.npz"
    text.write_text("no archive")
    cut.write_bytes(write_strokes(tmp_path / "s.npz", [("sun", [LINE])]).read_bytes()[:200])
    np.savez(other, images=np.zeros(3))
    for path in (text, cut, other, tmp_path / "missing.npz"):
        with pytest.raises(BadData, match="is not a stroke file"):
            read_stroke_file(path)


def test_a_file_of_empty_drawings_is_refused(tmp_path: Path) -> None:
    path = write_strokes(tmp_path / "s.npz", [("sun", []), ("sun", [[]])])
    with pytest.raises(BadData, match="2 drawings, none with a point"):
        read_stroke_file(path)


def test_every_error_of_zipfile_and_numpy_is_a_refusal(tmp_path: Path) -> None:
    whole = write_strokes(tmp_path / "s.npz", [("sun", [polygon(40)]) for _ in range(50)])
    packed = tmp_path / "packed.npz"
    with np.load(whole) as arrays:
        np.savez_compressed(packed, **arrays)
        np.save(tmp_path / "array.npy", arrays["points"])
    data = whole.read_bytes()
    header, entry = data.index(b"(2050, 2)"), data.index(b"PK\x01\x02")
    method, magic = entry + 10, data.index(b"NUMPY")
    damaged = {"array": (tmp_path / "array.npy").read_bytes()}
    for name, place, patch in (
        ("header", header, b"((050"),
        ("huge", header, b"(2050000000000, 2), }"),
        ("method", method, b"a"),
        ("bytes", magic, b"other"),
    ):
        damaged[name] = data[:place] + patch + data[place + len(patch) :]
    deflated = packed.read_bytes()
    damaged["deflated"] = deflated[:100] + bytes(300) + deflated[400:]
    for name, content in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(BadData, match="is not a stroke file"):
            read_stroke_file(tmp_path / f"{name}.npz")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = write_strokes(
        tmp_path / "s.npz", [("sun", [LINE])], classes=np.array(["sun", 1], object)
    )
    with pytest.raises(BadData, match="is not a stroke file"):
        read_stroke_file(path)
