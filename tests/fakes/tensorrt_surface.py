"""Which names a version of TensorRT has, and objects that refuse every other name."""

from __future__ import annotations

import ast
import enum
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# The real one: later the name may stand for the fake.
import tensorrt_rtx as _REAL_RTX

_LISTS = Path(__file__).parents[1] / "runtime"


@dataclass(frozen=True)
class Surface:
    """The names that one version of one module has.

    The lists of TensorRT have the classes that the versions differ in. The rest, such as the
    logger and the network, are held to the real TensorRT-RTX, which this machine has.
    """

    module: str
    version: str

    @property
    def names(self) -> frozenset[str]:
        """Return the names in the module itself."""
        if self.module == "tensorrt_rtx":
            return _public(_REAL_RTX)
        return frozenset(_listed(self.version)[""])

    def members(self, class_name: str) -> tuple[str, ...]:
        """Return the names of a class, those of an enumeration in its order."""
        listed = {} if self.module == "tensorrt_rtx" else _listed(self.version)
        if class_name in listed:
            return listed[class_name]
        real = getattr(_REAL_RTX, class_name)
        return tuple(getattr(real, "__members__", None) or sorted(_public(real)))

    def enumeration(self, class_name: str) -> type[enum.Enum]:
        """Return an enumeration like those of the bindings: no number, but made into one."""
        members = {name: number for number, name in enumerate(self.members(class_name))}
        kind: Any = _Numbered
        return kind(class_name, members)  # type: ignore[no-any-return]


class _Numbered(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)


class Refusing:
    """An object of TensorRT: a public name that its class does not list is an `AttributeError`.

    A class attribute that is no function is a property that may be set; a listed name that the
    class does not define is one that the fake lacks, an `AssertionError`.
    """

    _surface: Surface
    _class_name = ""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            self._require(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._require(name)
            assert not callable(getattr(type(self), name)), f"{name} is a method"
        super().__setattr__(name, value)

    @classmethod
    def _require(cls, name: str) -> None:
        class_name = cls._class_name or cls.__name__
        if name not in cls._surface.members(class_name):
            raise AttributeError(
                f"{class_name} of {cls._surface.module} {cls._surface.version} has no {name!r}"
            )
        assert hasattr(cls, name), f"the fake's {class_name} has no {name}"


@cache
def _listed(version: str) -> dict[str, tuple[str, ...]]:
    """Return the names by class, in their order; the module's own are those of ''."""
    listed: dict[str, tuple[str, ...]] = {}
    for line in (_LISTS / f"tensorrt_api_{version}.txt").read_text().splitlines():
        name, _, names = line.partition("[")
        if names:
            listed[name.strip()] = tuple(ast.literal_eval("[" + names))
    assert len(listed) > 20
    return listed


def _public(thing: Any) -> frozenset[str]:
    return frozenset(name for name in dir(thing) if not name.startswith("_"))
