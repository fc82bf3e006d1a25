from __future__ import annotations

import pytest

from sbtk_train.data.splits import open_split
from sbtk_train.recipes import Method, default_recipe


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
def test_the_recipe_is_that_of_the_splits_data(method: Method, split: str, name: str) -> None:
    assert open_split(split).name.casefold() == split.casefold()
    assert default_recipe(method, split) == name
