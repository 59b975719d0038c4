"""Runs the engine of a stateless module, on a CPU or a GPU: named tensors in, named tensors out."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from tritium.config import OptimizationProfile
from tritium.engine.engine import Engine
from tritium.engine.plan import Extent, Sizes, Value
from tritium.errors import EngineError, RequestError
from tritium.runtime.gpu.device import gpu_for
from tritium.runtime.plan_runner import PlanRunner


class ModuleRunner:
    """`run` may be called from any thread; batches are computed one after another, on a thread of this object's own."""

    def __init__(self, engine: Engine, num_threads: int | None = None) -> None:
        """Load the engine and lay out its usual batch. Raises `EngineError`, `KernelError` or `OutOfMemory`."""
        if engine.manifest.kind != "module":
            raise EngineError(f"{engine.path} holds a {engine.manifest.kind}, not a stateless module: open it with LLM")
        self.profile = OptimizationProfile(**(engine.manifest.profile or {}))
        self._inputs = {value.name: value for value in engine.plan.values if value.kind == "input"}
        self._outputs = tuple(engine.plan.outputs)
        self._path = engine.path
        self._closing, self._is_closed = threading.Lock(), False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tritium-module")
        self._device = gpu_for(engine) if engine.manifest.backend == "cuda" else None
        self._thread.submit(self._open, engine, num_threads).result()

    def run(self, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Each input, a torch tensor or a numpy array [batch, ...]; each output, a torch tensor of its own, on the CPU.

        On a GPU, when every input lies there: on it too, in the order of the caller's current stream, not waited for.

        Raises `RequestError` for a name, dtype or shape that is not the module's, a batch outside the profile, or
        batches that differ; `EngineError` when a step fails on the values, or after `close`.
        """
        given = {name: _tensor(name, value) for name, value in tensors.items()}
        batch = self._check(given)
        if self._device is None:
            return self._submit(self._compute, given, batch)
        stream = torch.cuda.current_stream(self._device)
        found = self._submit(self._compute_on_gpu, given, batch, stream)
        for tensor in found.values():
            if tensor.is_cuda:
                tensor.record_stream(stream)
        return found

    def close(self) -> None:
        """Give all memory back, a GPU's to other programs too, when batches that were begun are over, and end the
        thread. May be called again; `run` raises `EngineError` after it."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            closed = self._thread.submit(self._release)
        try:
            closed.result()
        finally:
            self._thread.shutdown()

    def _release(self) -> None:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        self._runner.close()
        self._buffers.clear()
        self._pinned.clear()
        if self._device is not None:
            torch.cuda.empty_cache()

    def _submit(self, compute: Callable[..., dict[str, torch.Tensor]], *args: Any) -> dict[str, torch.Tensor]:
        with self._closing:
            if self._is_closed:
                raise EngineError(f"{self._path} was closed: open it again with Engine.load")
            found = self._thread.submit(compute, *args)
        return found.result()

    def _open(self, engine: Engine, num_threads: int | None) -> None:
        largest = _sizes(self.profile.max)
        self._buffers = {
            name: torch.zeros([Extent.parse(dim).at(largest) for dim in value.shape], dtype=getattr(torch, value.dtype))
            for name, value in self._inputs.items()
        }
        self._pinned: dict[str, torch.Tensor] = {}
        if self._device is not None:
            torch.cuda.set_device(self._device)
            self._pinned = {name: tensor.pin_memory() for name, tensor in self._buffers.items()}
            self._buffers = {name: tensor.to(self._device) for name, tensor in self._buffers.items()}
        self._runner = PlanRunner(engine, largest, self._buffers, num_threads, device=self._device)
        self._runner.bound("tokens", _sizes(self.profile.opt))

    def _compute(self, given: Mapping[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
        for name, tensor in given.items():
            self._buffers[name][:batch].copy_(tensor)
        self._runner.run("tokens", _sizes(batch))
        return {name: self._runner.output(name, _sizes(batch)).clone() for name in self._outputs}

    def _compute_on_gpu(
        self, given: Mapping[str, torch.Tensor], batch: int, stream: torch.cuda.Stream
    ) -> dict[str, torch.Tensor]:
        """stream: the caller's, on which inputs were made and outputs are read that lie on the GPU."""
        own = torch.cuda.current_stream(self._device)
        own.wait_stream(stream)
        try:
            for name, tensor in given.items():
                if not tensor.is_cuda:
                    tensor = self._pinned[name][:batch].copy_(tensor)
                self._buffers[name][:batch].copy_(tensor, non_blocking=True)
            self._runner.run("tokens", _sizes(batch))
            found = {name: self._runner.output(name, _sizes(batch)) for name in self._outputs}
            if not all(tensor.device == self._device for tensor in given.values()):
                return {name: tensor.cpu() for name, tensor in found.items()}  # waits: the pinned inputs are free again
            found = {name: tensor.clone() for name, tensor in found.items()}
        except BaseException:
            own.synchronize()  # the next batch, or the caller, may write what copies on their way still read
            raise
        stream.wait_stream(own)
        return found

    def _check(self, given: Mapping[str, torch.Tensor]) -> int:
        """The batch, when all is as the module takes it."""
        wanted = ", ".join(_describe(value) for value in self._inputs.values())
        for name in given:
            if name not in self._inputs:
                raise RequestError(f"the engine has no input {name!r}; it takes {wanted}")
        for name, value in self._inputs.items():
            if name not in given:
                raise RequestError(f"the input {name!r} is missing; the engine takes {wanted}")
            dtype, sizes = str(given[name].dtype).removeprefix("torch."), list(given[name].shape)
            if dtype != value.dtype:
                raise RequestError(f"the input {name!r} is {dtype}, expected {value.dtype}: convert it first")
            if sizes[1:] != list(value.shape[1:]) or not sizes:
                raise RequestError(f"the input {name!r} has sizes {sizes}, expected {['batch', *value.shape[1:]]}")
        batches = {name: len(tensor) for name, tensor in given.items()}
        batch = next(iter(batches.values()))
        if set(batches.values()) != {batch}:
            raise RequestError(f"the inputs have batches of different sizes: {batches}")
        if not self.profile.min <= batch <= self.profile.max:
            raise RequestError(
                f"the batch is {batch}, the engine was built for {self.profile.min} to {self.profile.max}: split it, "
                "or build with another OptimizationProfile"
            )
        return batch


def _sizes(batch: int) -> Sizes:
    return Sizes(tokens=batch, sequences=1, rows=1)


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(value).copy() if not value.flags.writeable else value)
        except TypeError as error:
            raise RequestError(f"the input {name!r} is {value.dtype}, which is no dtype of a tensor") from error
    raise RequestError(f"the input {name!r} must be a torch tensor or a numpy array, not {type(value).__name__}")


def _describe(value: Value) -> str:
    return f"{value.name} {value.dtype} {['batch', *value.shape[1:]]}".replace("'", "")
