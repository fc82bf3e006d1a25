"""Generated inputs match their names, and are reproducible by seed."""

from __future__ import annotations

import numpy as np

from sbtk_runtime import generated_inputs, images, preprocess


def test_generated_images_decode_to_their_size_and_repeat_by_seed() -> None:
    photos = generated_inputs.generate_photos(2, seed=3)
    assert photos == generated_inputs.generate_photos(2, seed=3)
    assert photos[0] != photos[1]
    assert images.decode(photos[0]).size == generated_inputs.PHOTO_SIZE_PX
    sketches = generated_inputs.generate_sketches(2, seed=3)
    assert sketches[0] != sketches[1]
    prepared = preprocess.prepare(sketches[0], "sketch")
    assert prepared.pixels.shape == (224, 224, 3)
    assert prepared.notices == ()


def test_generated_photos_have_the_file_sizes_of_photos() -> None:
    assert 100_000 < len(generated_inputs.generate_photos(1)[0]) < 400_000


def test_clustered_vectors_are_unit_rows_and_repeat_by_seed() -> None:
    vectors = generated_inputs.clustered_vectors(500, 32, seed=1)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(vectors, generated_inputs.clustered_vectors(500, 32, seed=1))
    assert not np.array_equal(vectors, generated_inputs.clustered_vectors(500, 32, seed=2))


def test_generated_queries_share_the_centres_but_are_other_rows() -> None:
    vectors = generated_inputs.clustered_vectors(2000, 64)
    queries = generated_inputs.clustered_vectors(50, 64, of=2000)
    best = (queries @ vectors.T).max(axis=1)
    strangers = (generated_inputs.clustered_vectors(50, 64, seed=9, of=2000) @ vectors.T).max(
        axis=1
    )
    assert best.max() < 0.999
    assert best.mean() > strangers.mean() + 0.1


def test_clustered_vectors_do_not_depend_on_the_chunk_size() -> None:
    assert len(np.unique(generated_inputs.clustered_vectors(9000, 4), axis=0)) == 9000


def test_the_generator_and_the_seed_are_named() -> None:
    named = generated_inputs.clustered_named(200_000, 512, 7)
    assert "200,000 x 512" in named
    assert "seed 7" in named
    assert "PCG64" in named
