"""Runs the engine of a stateless module: named tensors in, named tensors out."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from tritium.config import OptimizationProfile
from tritium.engine.engine import Engine
from tritium.engine.plan import Extent, Sizes, Value
from tritium.errors import EngineError, RequestError
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tritium-module")
        self._thread.submit(self._open, engine, num_threads).result()

    def run(self, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Each input, a torch tensor or a numpy array [batch, ...]; each output, a torch tensor of its own.

        Raises `RequestError` for a name, dtype or shape that is not the module's, a batch outside the profile, or
        batches that differ; `EngineError` when a step fails on the values.
        """
        given = {name: _tensor(name, value) for name, value in tensors.items()}
        batch = self._check(given)
        return self._thread.submit(self._compute, given, batch).result()

    def _open(self, engine: Engine, num_threads: int | None) -> None:
        largest = _sizes(self.profile.max)
        self._buffers = {
            name: torch.zeros([Extent.parse(dim).at(largest) for dim in value.shape], dtype=getattr(torch, value.dtype))
            for name, value in self._inputs.items()
        }
        self._runner = PlanRunner(engine, largest, self._buffers, num_threads)
        self._runner.bound("tokens", _sizes(self.profile.opt))

    def _compute(self, given: Mapping[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
        for name, tensor in given.items():
            self._buffers[name][:batch].copy_(tensor)
        self._runner.run("tokens", _sizes(batch))
        return {name: self._runner.output(name, _sizes(batch)).clone() for name in self._outputs}

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
