"""Torch eager as a contender does an engine's whole job."""

from __future__ import annotations

import numpy as np
import torch

from sbtk_train.eager import eager_run


def test_pixels_to_unit_rows_in_either_layout() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    threads_before = torch.get_num_threads()
    rows = []
    try:
        for is_channels_last in (False, True):
            torch.manual_seed(0)  # the same random weights for both
            run = eager_run("resnet50-v1", 16, threads=1, is_channels_last=is_channels_last)
            assert torch.get_num_threads() == 1
            rows.append(run(pixels))
    finally:
        torch.set_num_threads(threads_before)
    assert rows[0].shape == (2, 16)
    assert rows[0].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows[0], axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-3)
