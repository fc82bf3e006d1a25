"""Bundles are opened by folder or name, and every file is checked before use."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sbtk_runtime.bundle import (
    Bundle,
    bundle_folders,
    is_run_folder,
    list_bundles,
    onnx_name,
    pretrained_folder,
)
from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.manifest import FileRecord, read_bundle_manifest
from sbtk_runtime.onnx_file import check_onnx
from tests.tiny import tiny_bundle, tiny_model, write_tiny_manifest
from tests.tiny_gallery import tiny_code_bundle, tiny_itq


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "tiny")


def test_a_bundle_can_be_opened_by_path_or_text(folder: Path) -> None:
    for where in (folder, str(folder), os.path.relpath(folder)):
        bundle = Bundle.open(where)
        assert bundle.manifest == read_bundle_manifest(folder)
        assert bundle.precisions == ("fp32", "int8")
        assert bundle.verify_onnx("int8").samefile(folder / "model.int8.onnx")
        bundle.verify()


def test_listed_bundles_can_be_opened_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bundle(tmp_path / "bundles" / "mine", seed=1)
    tiny_bundle(tmp_path / "mine", seed=2)
    (tmp_path / "bundles" / "broken").mkdir()
    (tmp_path / "bundles" / "broken" / "manifest.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert Bundle.open("mine").folder == Path("bundles/mine")
    assert Bundle.open("./mine").folder == Path("mine")
    assert [path.name for path in bundle_folders()][-2:] == ["broken", "mine"]
    own = [bundle for bundle in list_bundles() if bundle.folder.parent != pretrained_folder()]
    assert [bundle.folder for bundle in own] == [tmp_path / "bundles" / "mine"]


def test_the_default_is_a_pretrained_bundle() -> None:
    pretrained = [path for path in bundle_folders() if path.parent == pretrained_folder()]
    if pretrained:
        assert Bundle.open().folder in pretrained
        assert Bundle.open(pretrained[0].name).folder == pretrained[0]
    else:
        with pytest.raises(BadModel, match="includes no model"):
            Bundle.open()


def test_folders_without_a_bundle_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"model\.int8\.onnx is a file"):
        Bundle.open(folder / "model.int8.onnx")
    with pytest.raises(BadModel, match="there is no bundle 'nowhere'"):
        Bundle.open("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadModel, match=r"empty/manifest\.json cannot be read"):
        Bundle.open(tmp_path / "empty")


def test_the_error_for_a_missing_precision_names_the_available_ones(folder: Path) -> None:
    with pytest.raises(BadModel, match="no fp16 model") as caught:
        Bundle.open(folder).onnx_path("fp16")
    assert "fp32 or int8" in caught.value.expected


def test_other_preprocessing_is_refused(folder: Path) -> None:
    dataclasses.replace(read_bundle_manifest(folder), preprocessing="sbtk-0").write(folder)
    with pytest.raises(BadModel, match="sbtk-0") as caught:
        Bundle.open(folder)
    assert "sbtk-1" in caught.value.expected


def test_a_bundle_without_a_model_is_refused(folder: Path) -> None:
    dataclasses.replace(read_bundle_manifest(folder), files={}).write(folder)
    with pytest.raises(BadModel, match="has no model"):
        Bundle.open(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove", "fifo", "folder"])
def test_damage_is_detected_and_named(folder: Path, damage: str) -> None:
    path = folder / "model.int8.onnx"
    content = path.read_bytes()
    path.unlink()
    if damage == "flip":
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "grow":
        path.write_bytes(content + b"\0")
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    bundle = Bundle.open(folder)
    for check in (bundle.verify, lambda: bundle.verify_onnx("int8")):
        with pytest.raises(BadModel, match=r"model\.int8\.onnx"):
            check()
    bundle.verify_onnx("fp32")


def test_verify_refuses_loadable_files_without_a_recorded_hash(folder: Path) -> None:
    (folder / "MODEL_CARD.md").write_text("# Tiny\n")
    Bundle.open(folder).verify()
    (folder / "model.fp16.onnx").write_bytes(b"x")
    with pytest.raises(BadModel, match=r"model\.fp16\.onnx is not in the bundle's manifest"):
        Bundle.open(folder).verify()


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "weights.data"])
@pytest.mark.parametrize("hidden_in", ["initializer", "constant", "branch", "sparse", "function"])
def test_external_data_is_refused_everywhere_in_a_model(
    folder: Path, location: str, hidden_in: str
) -> None:
    model = _with_external_tensor(hidden_in, location)
    (folder / "model.int8.onnx").write_bytes(model.SerializeToString())
    write_tiny_manifest(folder)
    bundle = Bundle.open(folder)
    for check in (bundle.verify, lambda: bundle.verify_onnx("int8")):
        with pytest.raises(BadModel, match=r"model\.int8\.onnx has weights in another file"):
            check()


def test_external_data_written_by_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(tiny_model(), path, save_as_external_data=True, size_threshold=0)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(BadModel, match="has weights in another file"):
        check_onnx(path.read_bytes(), "model.onnx")


def test_intact_models_pass() -> None:
    check_onnx(tiny_model().SerializeToString(), "model.onnx")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\x08\x08", "has no graph"),
        (b"PK\x03\x04 and so on", "truncated or not an ONNX model"),
        (b"\x00\x00", "field without a number"),
        (b"\x3a\xff\xff\xff\xff\x0f", "truncated or not an ONNX model"),
        (b"\xff" * 11, "more than 10 bytes"),
        (b"\x3b", "wire type 3"),
    ],
)
def test_files_that_are_not_onnx_models_are_refused(content: bytes, complaint: str) -> None:
    with pytest.raises(BadModel, match=complaint):
        check_onnx(content, "model.onnx")


def test_endlessly_nested_graphs_are_refused() -> None:
    message = b""
    for level in range(400):
        # From outside: graph.node, node.attribute, attribute.g, and again.
        message = bytes([(1, 6, 5)[level % 3] << 3 | 2]) + _varint(len(message)) + message
    with pytest.raises(BadModel, match="levels"):
        check_onnx(b"\x3a" + _varint(len(message)) + message, "model.onnx")


def test_truncated_models_never_pass(folder: Path) -> None:
    content = (folder / "model.fp32.onnx").read_bytes()
    complaints = 0
    for sixteenth in range(16):
        try:
            check_onnx(content[: len(content) * sixteenth // 16], "model.onnx")
        except BadModel:
            complaints += 1
    assert complaints == 16


@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused(content: bytes) -> None:
    try:
        check_onnx(content, "model.onnx")
    except BadModel as problem:
        assert "model.onnx" in problem.found


def test_flipped_bytes_pass_or_are_refused() -> None:
    content = tiny_model().SerializeToString()
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(400)] = chance.randrange(256)
        try:
            check_onnx(bytes(damaged), "model.onnx")
        except BadModel as problem:
            assert "model.onnx" in problem.found


def test_the_name_of_an_onnx_file_has_its_precision() -> None:
    assert onnx_name("fp16") == "model.fp16.onnx"


def test_model_ids_distinguish_models(tmp_path: Path) -> None:
    ids = {
        Bundle.open(tiny_bundle(tmp_path / str(seed), seed=seed)).manifest.model_id
        for seed in range(3)
    }
    assert len(ids) == 3
    again = Bundle.open(tiny_bundle(tmp_path / "again", seed=0)).manifest
    assert again.model_id in ids
    record = again.files["model.int8.onnx"]
    content = (tmp_path / "again" / "model.int8.onnx").read_bytes()
    assert record.sha256 == hashlib.sha256(content).hexdigest()


def _with_external_tensor(hidden_in: str, location: str) -> onnx.ModelProto:
    """Return the tiny model with one more tensor, which is said to be in another file."""
    tensor = numpy_helper.from_array(np.zeros(4, dtype=np.float32), "elsewhere")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model = tiny_model()
    if hidden_in == "initializer":
        model.graph.initializer.append(tensor)
    elif hidden_in == "constant":
        model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))
    elif hidden_in == "branch":
        inner = helper.make_graph([], "inner", [], [], [tensor])
        model.graph.node.append(
            helper.make_node("If", ["condition"], ["unused"], then_branch=inner, else_branch=inner)
        )
    elif hidden_in == "sparse":
        sparse = model.graph.sparse_initializer.add()
        sparse.values.CopyFrom(tensor)
    else:
        node = helper.make_node("Constant", [], ["unused"], value=tensor)
        function = helper.make_function(
            "local", "Hidden", [], ["unused"], [node], [helper.make_opsetid("", 18)]
        )
        model.functions.append(function)
    return model


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files by which a finished run is known, in `runs/horses` of the current folder."""
    folder = tmp_path / "runs" / "horses"
    folder.mkdir(parents=True)
    for name in ("config.resolved.toml", "last.safetensors", "student.safetensors"):
        (folder / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    "where", ["runs/horses", "./runs/horses", "runs", "horses", "runs/horses/student.safetensors"]
)
def test_the_error_for_a_training_run_says_to_export_it(run: Path, where: str) -> None:
    with pytest.raises(BadModel) as caught:
        Bundle.open(where)
    assert "sbtk export runs/horses" in caught.value.next_step
    assert is_run_folder(run)


def test_the_error_for_an_unfinished_run_says_to_finish_it(run: Path) -> None:
    (run / "student.safetensors").unlink()
    with pytest.raises(BadModel) as caught:
        Bundle.open(run)
    assert f"sbtk train --resume {run} && sbtk export {run}" in caught.value.next_step


def test_a_bundle_with_a_students_weights_is_not_mistaken_for_a_run(folder: Path) -> None:
    (folder / "student.safetensors").write_bytes(b"")
    (folder / "last.safetensors").write_bytes(b"")
    Bundle.open(folder)
    assert not is_run_folder(folder)


def test_galleries_and_files_are_not_mistaken_for_bundles(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel) as caught:
        Bundle.open(folder / "model.int8.onnx")
    assert caught.value.next_step == f"name its folder: {folder}"
    (tmp_path / "gallery.sbtk").mkdir()
    for name in ("manifest.json", "catalogue.sqlite"):
        (tmp_path / "gallery.sbtk" / name).write_bytes(b"{}")
    with pytest.raises(BadModel, match=r"gallery\.sbtk is a gallery, not a model bundle"):
        Bundle.open(tmp_path / "gallery.sbtk")


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    return tiny_code_bundle(tmp_path / "coded", 16, 8)


def put(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a bundle that its manifest vouches for."""
    path = folder / name
    path.write_bytes(content)
    manifest = read_bundle_manifest(folder)
    record = FileRecord(sha256_of_file(path), path.stat().st_size)
    replace(manifest, files=manifest.files | {name: record}).write(folder)


def test_code_lengths_are_sorted_and_their_files_read(coded: Path) -> None:
    bundle = Bundle.open(coded)
    bundle.verify()
    assert bundle.bits == (8, 16)
    assert bundle.itq(16).to_bytes() == (coded / "itq16.npz").read_bytes()


def test_a_changed_file_is_refused(coded: Path) -> None:
    data = bytearray((coded / "itq16.npz").read_bytes())
    data[200] ^= 1
    (coded / "itq16.npz").write_bytes(data)
    for ask in (Bundle.open(coded).verify, lambda: Bundle.open(coded).itq(16)):
        with pytest.raises(BadModel, match=r"itq16\.npz is damaged or was changed"):
            ask()
    assert Bundle.open(coded).itq(8).bits == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiny_itq(16, 8).to_bytes(), "makes 8 bits of 16 dimensions"),
        (tiny_itq(32, 16).to_bytes(), "makes 16 bits of 32 dimensions"),
        (b"no zip", "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_refused(coded: Path, content: bytes, message: str) -> None:
    put(coded, "itq16.npz", content)
    with pytest.raises(BadModel, match=message):
        Bundle.open(coded).itq(16)
    with pytest.raises(BadModel, match=message):
        Bundle.open(coded).verify()


def test_a_file_without_a_recorded_hash_makes_no_codes(coded: Path) -> None:
    (coded / "itq24.npz").write_bytes(tiny_itq(16, 8).to_bytes())
    bundle = Bundle.open(coded)
    assert bundle.bits == (8, 16)
    with pytest.raises(BadModel, match=r"itq24\.npz is not in the bundle's manifest"):
        bundle.verify()


@pytest.mark.parametrize("name", ["itq.npz", "itq08.npz", "itq8.NPZ", "xitq8.npz", "itq8.npz.bak"])
def test_other_file_names_are_not_code_lengths(tmp_path: Path, name: str) -> None:
    folder = tiny_code_bundle(tmp_path / "coded", 16)
    put(folder, name, b"something")
    assert Bundle.open(folder).bits == (16,)
