"""What the objects of one fake TensorRT share: its GPUs, its names and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.gpu import FakeGpus
from tests.fakes.tensorrt_surface import Refusing, Surface

PLAN_MAGIC = b"fake plan "


@dataclass
class TensorRtFaults:
    """What goes wrong; a text is the log line that comes with it, empty is nothing.

    Attributes:
        build: `build_serialized_network` gives None.
        deserialise: `deserialize_cuda_engine` gives None.
        context: `create_execution_context` gives None.
        execute: `execute_async_v3` gives False, outside of captures.
        execute_from_batch: `execute` is only for batches from here on.
        capture: `execute_async_v3` gives False in captures.
        output_dim: that `get_tensor_shape` tells; 0 for the right one.
    """

    build: str = ""
    deserialise: str = ""
    context: str = ""
    execute: str = ""
    execute_from_batch: int = 0
    capture: str = ""
    output_dim: int = 0


@dataclass
class TensorRtWorld:
    """What the objects of one fake module share.

    Attributes:
        gpus: where they run.
        surface: which names they have.
        faults: what goes wrong.
        scratch_per_image: bytes of context memory that an image needs.
        context_bytes: that TensorRT itself takes from the GPU for each context.
        alive: its objects that exist, by class.
        made: its objects that ever existed, by class.
        runs: of the network, by batch: those outside of captures.
        module: the module itself.
    """

    gpus: FakeGpus
    surface: Surface
    faults: TensorRtFaults = field(default_factory=TensorRtFaults)
    compute_capability: str = "9.0"
    scratch_per_image: int = 1024
    context_bytes: int = 4096
    alive: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    runs: Counter[int] = field(default_factory=Counter)
    module: Any = None

    def log(self, logger: Any, text: str, severity: str = "ERROR") -> None:
        logger.log(getattr(self.module.ILogger.Severity, severity), text)

    def count(self, thing: Any, name: str, reserved: tuple[int, int] = (0, 0)) -> None:
        """Count an object as long as it lives; `reserved` is GPU and bytes that it holds."""
        self.alive[name] += 1
        self.made[name] += 1

        def end() -> None:
            self.alive[name] -= 1
            self.gpus.unreserve(*reserved)

        # Without atexit, since nothing then needs to be counted.
        weakref.finalize(thing, end).atexit = False

    def plan(self, onnx: bytes, profile: Mapping[str, Sequence[tuple[int, ...]]]) -> bytes:
        head = {
            "module": self.surface.module,
            "version": self.surface.version,
            "compute_capability": self.compute_capability,
            "profile": profile,
            "sha256": hashlib.sha256(onnx).hexdigest(),
        }
        return PLAN_MAGIC + json.dumps(head).encode() + b"\n" + onnx


class Fake(Refusing):
    """An object of one world."""

    _world: TensorRtWorld


class Dims:
    """Sizes of a tensor; a sequence, but no tuple."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> int:
        return self._sizes[index]


def initialised(thing: Any) -> Any:
    """Return a logger or monitor after a look at whether its base's `__init__` was called."""
    assert getattr(thing, "_is_initialised", False), "the base's __init__ was not called"
    return thing
