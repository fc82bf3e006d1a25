"""Torch, eager and compiled, as a contender that does the whole job of an engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sbtk_train.batches.augment import normalise
from sbtk_train.models.eager import (
    TorchSettings,
    make_compiled_run,
    make_eager_run,
    make_product_run,
    make_random_student,
)
from sbtk_train.models.student import DsnStudent
from tests.tiny_student import tiny_dsn_student, tiny_student

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _torch_put_back() -> Iterator[None]:
    torch.compiler.reset()  # forgets what other tests have compiled
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)


def test_pixels_become_unit_rows_in_either_layout(pixels: NDArray[np.uint8]) -> None:
    student = make_random_student("sbtknet", "resnet50-v1", 16)
    rows = []
    for is_channels_last in (False, True):
        run = make_eager_run(student, TorchSettings(1, is_channels_last=is_channels_last))
        assert torch.get_num_threads() == 1
        rows.append(run(pixels))
    assert rows[0].shape == (2, 16)
    assert rows[0].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows[0], axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-3)


def test_a_student_with_a_domain_input_embeds_photos(pixels: NDArray[np.uint8]) -> None:
    assert isinstance(make_random_student("dsn", "resnet18", 64), DsnStudent)
    student = tiny_dsn_student()
    images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.inference_mode():
        wanted = student.embed(images, torch.ones(2)).numpy()
    np.testing.assert_allclose(make_eager_run(student, TorchSettings(1))(pixels), wanted, atol=1e-5)
    half = make_eager_run(student, TorchSettings(1, precision="fp16"))(pixels)
    np.testing.assert_allclose(half, wanted, atol=1e-2)


def test_only_the_trunk_runs_in_half_precision(pixels: NDArray[np.uint8]) -> None:
    student = tiny_student()
    rows = make_eager_run(student, TorchSettings(1))(pixels)
    half = make_eager_run(student, TorchSettings(1, precision="fp16"))(pixels)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - rows).max() < 1e-2
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1.0, atol=1e-5)
    # The student itself stays as it was.
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_a_compiled_model_gives_the_same_rows(pixels: NDArray[np.uint8]) -> None:
    from torch._inductor import config as inductor

    student = tiny_student()
    eager = make_eager_run(student, TorchSettings(1))
    messages: list[str] = []
    run = make_compiled_run(student, TorchSettings(1, is_channels_last=True), messages.append)
    assert messages == []
    # Without vectors: torch would compile half a minute only to learn what this CPU has.
    with inductor.patch({"cpp.vec_isa_ok": False}):
        for batch in (1, 2, 1, 2):
            np.testing.assert_allclose(run(pixels[:batch]), eager(pixels[:batch]), atol=1e-5)
    assert [sentence.partition(":")[0] for sentence in messages] == [
        "torch compiles its network for batches of 1",
        "torch compiles its network for batches of 2",
    ]


def test_a_compiler_that_is_missing_is_a_runtime_error(pixels: NDArray[np.uint8]) -> None:
    from torch._inductor import config as inductor

    run = make_compiled_run(tiny_student(), TorchSettings(1))
    settings = {
        "cpp.cxx": ("no-such-compiler",),
        "cpp.vec_isa_ok": False,
        "force_disable_caches": True,
    }
    with inductor.patch(settings), pytest.raises(RuntimeError, match="compiler"):
        run(pixels)


def test_matrix_products_are_right() -> None:
    for size in (16, 64):
        result = make_product_run("int8", size, 1)()
        assert isinstance(result, torch.Tensor)
        assert (result.dtype, tuple(result.shape)) == (torch.int32, (size, size))
        assert result.float().std() > 1000
    result = make_product_run("fp32", 64, 1)()
    assert isinstance(result, torch.Tensor)
    assert 6 < result.std() < 10
