"""Public functions that take arrays say of which shape; ruff checks that docstrings exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sbtk_runtime", "sbtk_train", "sbtk_export", "cli/sbtk_cli")
#: Such as `rows (N, D) float32`.
SHAPE = re.compile(r"\([\w. /*+()-]+,[^()]*\)|\(\.\.\.\)")
_ARRAY = r"NDArray|ndarray|Tensor"
#: State dictionaries hold tensors of every shape, under names.
_STATE = re.compile(r"\b(dict|Mapping)\[str, ")


def undescribed(source: str, arrays: str) -> list[str]:
    """Return the public functions whose array parameters no docstring gives a shape."""
    pattern = re.compile(rf"\b({arrays})\b")
    return [
        name
        for name, function in _functions(ast.parse(source).body)
        if any(pattern.search(text) and not _STATE.search(text) for text in _annotations(function))
        and not SHAPE.search(ast.get_docstring(function) or "")
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_of_functions_with_arrays_give_their_shapes(package: str) -> None:
    sources = {path: path.read_text() for path in sorted((ROOT / package).rglob("*.py"))}
    arrays = "|".join({_ARRAY, *(name for text in sources.values() for name in _aliases(text))})
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, text in sources.items()
        for name in undescribed(text, arrays)
    }
    assert not found


def test_a_missing_shape_is_found() -> None:
    assert _aliases("Rows = NDArray[np.int64]") == ["Rows"]
    documented = 'def f(rows: Rows) -> int:\n    """Returns the sum of `rows (N,) int64`."""\n'
    silent = documented.replace(" (N,) int64", "")
    assert undescribed(documented, "Rows") == []
    assert undescribed(silent, "Rows") == ["f"]
    assert undescribed(f"class A:\n    {silent.replace(chr(10), chr(10) + '    ')}", "Rows") == [
        "A.f"
    ]
    assert undescribed(silent.replace("def f", "def _f"), "Rows") == []


def _functions(
    body: list[ast.stmt], prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _functions(node.body, f"{node.name}.")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
            yield prefix + node.name, node


def _annotations(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    given = function.args
    for one in (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs):
        if one is not None and one.annotation is not None:
            yield ast.unparse(one.annotation)


def _aliases(source: str) -> list[str]:
    return re.findall(rf"^(\w+)(?:: TypeAlias)? = (?:\w+\.)?(?:{_ARRAY})\b", source, re.MULTILINE)
