from __future__ import annotations

import pytest

from sbtk_train.config import DsnRecipe, Method, default_recipe, make_recipe
from sbtk_train.data.splits import open_split


@pytest.mark.parametrize(
    ("method", "split", "name"),
    [
        ("dsn", "SK-YE", "dsn-sketchy"),
        ("dsn", "TUB-SH", "dsn-tuberlin"),
        ("sake", "TUB-SH-sempcyc", "sake-tuberlin"),
        # However a split's name is written, it is opened; so its recipe is found too.
        ("dsn", "tub-sh", "dsn-tuberlin"),
        ("sbtknet", "TUB-SH", "sbtk"),
    ],
)
def test_the_recipe_is_that_of_the_splits_data_set(method: Method, split: str, name: str) -> None:
    assert open_split(split).name.casefold() == split.casefold()
    assert default_recipe(method, split) == name


@pytest.mark.parametrize(
    ("method", "name", "epochs", "batch", "drop_last", "selection"),
    [
        ("dsn", "dsn-sketchy", 20, (32, 64), True, "held-out-bits"),
        ("dsn", "dsn-tuberlin", 16, (9, 81), False, "last"),
        ("sake", "sake-sketchy", 20, (13, 26), False, "held-out-accuracy"),
        ("sake", "sake-tuberlin", 20, (4, 36), False, "held-out-accuracy"),
    ],
)
def test_recipes_have_the_numbers_of_the_released_training_scripts(
    method: Method,
    name: str,
    epochs: int,
    batch: tuple[int, int],
    drop_last: bool,
    selection: str,
) -> None:
    """haowang1992/DSN and qliu24/SAKE, `src/train_cse_resnet_*_ext.py`."""
    found = make_recipe(name, method)
    assert isinstance(found, DsnRecipe)
    assert (found.epochs, found.drop_last, found.selection) == (epochs, drop_last, selection)
    assert (found.batch_sketches, found.batch_photos) == batch
    assert (found.optimizer, found.learning_rate, found.weight_decay) == ("adam", 1e-4, 5e-4)
    assert (found.schedule, found.head_rate_factor, found.warmup_steps) == ("exponential", 1.0, 0)
    assert (found.kd, found.kdneg, found.kd_weight) == (1.0, 0.3, 1.0)
    of_dsn = (found.contrastive_weight, found.temperature, found.memory_size, found.memory_weight)
    if method == "dsn":
        assert of_dsn == (0.1, 0.07, 10, 1.0)
    else:
        assert (found.contrastive_weight, found.memory) == (0.0, "none")
