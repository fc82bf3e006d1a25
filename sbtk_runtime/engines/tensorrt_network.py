"""A TensorRT plan on a GPU: what it takes and gives, and contexts to run it in."""

from __future__ import annotations

import re
from typing import Any

from sbtk_runtime.engines.cuda_device import OutOfDeviceMemory
from sbtk_runtime.engines.tensorrt_library import LogLines, TensorRt, recording_logger, told
from sbtk_runtime.errors import BadModel, EngineUnavailable, SbtkError
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import SIZE_PX

_PICTURE = (SIZE_PX, SIZE_PX, 3)
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|memory ?allocation|bad_alloc", re.IGNORECASE)
#: What helps when a GPU has too little memory.
FREE_MEMORY = "end other programs on the GPU (nvidia-smi), or take another: --device cuda:N"
_BUILD_AGAIN = "sbtk engine clear, then sbtk engine build"

# Name, mode, type and shape.
_Tensor = tuple[str, Any, Any, tuple[int, ...]]


class Network:
    """A plan that was loaded onto the calling thread's GPU.

    The driver must have been asked for its GPUs before: without one, some of TensorRT's libraries
    end the process as soon as a `Runtime` exists.

    Args:
        trt: the TensorRT that built the plan.
        plan: the plan. Loading it runs native code, so it comes from our own cache or build.
        dim: length of an embedding, as the model's manifest tells it.
        domain_input: of the model, as its manifest has it.

    Attributes:
        dim: length of an embedding.
        domain_input: name of the input `(N,) float32` for the kind of pictures, if there is one.
        smallest: batch that the plan takes.
        largest: batch that the plan takes.
        has_own_graphs: TensorRT itself captures CUDA graphs, as TensorRT-RTX does.

    Raises:
        EngineUnavailable: TensorRT refuses the plan, or the GPU has no memory for its weights;
            with the library's own lines.
        BadModel: the plan does not take and give what an engine of sbtk does.
    """

    def __init__(
        self, trt: TensorRt, plan: bytes, dim: int, domain_input: str | None = None
    ) -> None:
        self.dim = dim
        self.domain_input = domain_input
        self._trt = trt
        self._logger = recording_logger(trt)
        self._lines_told = 0
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        try:
            self._engine = self._loaded(plan)
            self._check_tensors()
            shapes = self._engine.get_tensor_profile_shape(INPUT_NAME, 0)
            self.smallest, self.largest = int(shapes[0][0]), int(shapes[2][0])
            self.has_own_graphs = self._configure()
        except BaseException:
            self.close()
            raise

    def context(self, batch: int) -> Any:
        """Returns a new context for batches of that size; the caller gives it memory.

        Raises:
            OutOfDeviceMemory: the GPU's memory does not hold it.
            EngineUnavailable: TensorRT made none, or refuses the size.
            BadModel: its output has another shape than `(batch, dim)`.
        """
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise self.failed("made no execution context")
        self._set_batch(context, batch)
        return context

    def memory_needed(self, batches: tuple[int, ...]) -> int:
        """Returns the bytes of context memory that the hungriest of these batches needs."""
        context = self.context(batches[0])
        needed = []
        for batch in batches:
            self._set_batch(context, batch)
            needed.append(int(context.update_device_memory_size_for_shapes()))
        return max(needed)

    def failed(self, what: str, next_step: str = "sbtk doctor") -> SbtkError:
        """Returns the error for a call that gave `None` or `False`, with TensorRT's new lines."""
        lines = self._logger.lines()
        fresh = LogLines()
        for severity, text in lines[self._lines_told :]:
            fresh.add(severity, text)
        self._lines_told = len(lines)
        problems = fresh.problems()
        found = f"{self._trt.title} {what}:{told(problems)}"
        if any(_OUT_OF_MEMORY.search(line) for line in problems):
            return OutOfDeviceMemory(found, "", "use a smaller --batch")
        return EngineUnavailable(found, "", next_step)

    def close(self) -> None:
        """Frees the plan; contexts must be gone before."""
        self._config = self._engine = self._runtime = None

    def _loaded(self, plan: bytes) -> Any:
        try:
            self._runtime = self._trt.module.Runtime(self._logger)
        # The bindings have no exception of their own for an object that could not be made.
        except Exception as reason:
            raise self.failed(f"could not start ({reason})") from reason
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            problem = self.failed("refuses the plan", _BUILD_AGAIN)
            if not isinstance(problem, OutOfDeviceMemory):
                raise problem
            # A smaller batch would not help.
            raise EngineUnavailable(problem.found, "memory for the weights", FREE_MEMORY)
        return engine

    def _configure(self) -> bool:
        """Prepares what contexts are made with; returns whether TensorRT captures graphs itself."""
        config, module = self._engine.create_runtime_config(), self._trt.module
        if config is None:
            raise self.failed("made no runtime configuration")
        self._config = config
        # All contexts share one piece of memory, which is ours, so that its size is known and
        # running out of it is no surprise in the middle of a run.
        config.set_execution_context_allocation_strategy(
            module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        has_own_graphs = hasattr(config, "cuda_graph_strategy")
        if has_own_graphs:
            # TensorRT-RTX compiles better kernels for a shape while it runs, and alone knows when
            # a capture is worth it.
            config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return has_own_graphs

    def _check_tensors(self) -> None:
        module, engine = self._trt.module, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = [
            (
                name,
                engine.get_tensor_mode(name),
                engine.get_tensor_dtype(name),
                tuple(engine.get_tensor_shape(name)),
            )
            for name in names
        ]
        modes, types = module.TensorIOMode, module.DataType
        wanted: list[_Tensor] = [(INPUT_NAME, modes.INPUT, types.UINT8, (-1, *_PICTURE))]
        if self.domain_input is not None:
            wanted.append((self.domain_input, modes.INPUT, types.FLOAT, (-1,)))
        wanted.append((OUTPUT_NAME, modes.OUTPUT, types.FLOAT, (-1, self.dim)))
        # TensorRT promises no order.
        if sorted(found, key=_name_of) != sorted(wanted, key=_name_of):
            raise BadModel(
                f"the plan has {_told(found)}",
                _told(wanted),
                "export the model with sbtk export, then " + _BUILD_AGAIN,
            )

    def _set_batch(self, context: Any, batch: int) -> None:
        shapes: dict[str, tuple[int, ...]] = {INPUT_NAME: (batch, *_PICTURE)}
        if self.domain_input is not None:
            shapes[self.domain_input] = (batch,)
        for name, sizes in shapes.items():
            if not context.set_input_shape(name, sizes):
                raise self.failed(f"refuses {batch} images at once")
        shape = tuple(context.get_tensor_shape(OUTPUT_NAME))
        if shape != (batch, self.dim):
            raise BadModel(
                f"the plan gives {shape} for {batch} images",
                f"({batch}, {self.dim})",
                "export the model with sbtk export, then " + _BUILD_AGAIN,
            )


def _name_of(tensor: _Tensor) -> str:
    return tensor[0]


def _told(tensors: list[_Tensor]) -> str:
    """Returns names, types and shapes of tensors for people; -1 is a size that may vary."""
    parts = [f"{mode.name} {name}: {dtype.name} {shape}" for name, mode, dtype, shape in tensors]
    return " and ".join(parts) or "nothing"
