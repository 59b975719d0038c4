"""From a plan to thunks: every value becomes a tensor at a fixed address, every step a call without arguments.

The arena is one uint8 tensor, laid out once for the largest batch; a bucket's buffers are shorter views at the same
offsets. Tensors are made when a bucket is bound, once, never while steps run.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.engine.plan import Arg, Extent, Plan, Ref, Sizes, Step, Value, kv_layer
from tritium.engine.tactics import Tactics
from tritium.engine.views import view_of
from tritium.kernels.kernel import Kernel, LaunchContext, Thunk, resolve
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.loaded_weights import LoadedWeights

_CACHE_LINE = 64


class Binder:
    """Resolves a plan's values for any sizes the arena was laid out for, and binds its steps to them."""

    def __init__(
        self,
        plan: Plan,
        *,
        offsets: Mapping[str, int],
        arena_bytes: int,
        inputs: Mapping[str, torch.Tensor],
        weights: LoadedWeights,
        kv_cache: KVCache | None = None,
        device: torch.device | None = None,
        context: LaunchContext | None = None,
    ) -> None:
        """device: where everything lies; None is the CPU. context: for the kernels that want one; its own if None."""
        self._plan = plan
        self._inputs = inputs
        self._weights = weights
        self._kv_cache = kv_cache
        self._context = context or LaunchContext()
        self._offsets = offsets
        arena = torch.empty(arena_bytes + _CACHE_LINE, dtype=torch.uint8, device=device)
        self._arena = arena[-arena.data_ptr() % _CACHE_LINE :]

    def with_weights(self, weights: LoadedWeights) -> "Binder":
        """A binder to the same arena, inputs and KV cache, but other weights."""
        other = copy.copy(self)
        other._weights = weights
        return other

    def fill_cache(self) -> None:
        """See `KVCache.fill`."""
        if self._kv_cache is not None:
            self._kv_cache.fill()

    def tensor(self, name: str, sizes: Sizes) -> torch.Tensor:
        """The value as a tensor at its address, in these sizes. Raises `EngineError` for a name the plan lacks."""
        value = self._plan.value(name)
        if value.kind == "weight":
            return self._weights.get(name)
        if value.kind == "kv":
            assert self._kv_cache is not None, f"{name} is of a plan that has no KV cache"
            return self._kv_cache.layer(kv_layer(name))
        if value.kind == "input":
            return _cut(self._inputs[name], _shape(value, sizes))
        if value.kind == "view":
            return view_of(self.tensor(value.base, sizes), value.op, value.args, sizes)
        return self._buffer(value, sizes)

    def bind(self, step: Step, kernel: Kernel, sizes: Sizes, tactic: Mapping[str, Any] | None = None) -> Thunk:
        """The step as a call without arguments, run by `kernel` with `tactic`, at these sizes."""
        args = {name: self._argument(arg, kernel.pack.get(name), sizes) for name, arg in step.args.items()}
        outputs = [self.tensor(name, sizes) for name in step.outputs]
        extra = (self._context,) if kernel.takes_context else ()
        return resolve(kernel.target)(args, outputs, *extra, **(tactic or {}))

    def _argument(self, arg: Arg, pack: str | None, sizes: Sizes) -> Any:
        if isinstance(arg, Ref):
            if pack is not None:
                return self._weights.packed(arg.value, pack, lambda: self.tensor(arg.value, sizes))
            return self.tensor(arg.value, sizes)
        if isinstance(arg, list):
            return [self._argument(item, None, sizes) for item in arg]
        return arg

    def _buffer(self, value: Value, sizes: Sizes) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, value.dtype)
        shape = _shape(value, sizes)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        start = self._offsets[value.name]
        return self._arena[start : start + num_bytes].view(dtype).view(shape)


def bind_tuned(
    plan: Plan, kernels: Sequence[Kernel], tactics: Tactics | None, binder: Binder, index: int, sizes: Sizes
) -> Thunk:
    """A step bound by its kernel and the tactic chosen for its number of tokens or rows; tactics None: the default."""
    step, kernel = plan.steps[index], kernels[index]
    count = sizes.tokens if step.phase == "tokens" else sizes.rows
    return binder.bind(step, kernel, sizes, tactics.tactic(index, kernel.name, count) if tactics else None)


def _shape(value: Value, sizes: Sizes) -> tuple[int, ...]:
    """The value's sizes in this batch; -1, a size only the runtime knows, stays."""
    return tuple(-1 if dim == -1 else Extent.parse(dim).at(sizes) for dim in value.shape)


def _cut(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The leading part of an input tensor; dimensions of size -1 are left whole."""
    return tensor[tuple(slice(None) if size == -1 else slice(0, size) for size in shape)]
