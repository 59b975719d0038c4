"""Runs a plan that keeps nothing between batches: an encoder's or a stateless module's, on a CPU or a GPU.

Weights, arena and inputs are laid out once; the calls of a batch's steps are made when its size first comes, and kept.
All of it belongs on one thread.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from tritium.config import available_memory, available_threads
from tritium.engine.arena import plan_arena
from tritium.engine.engine import Engine
from tritium.engine.plan import Phase, Sizes
from tritium.engine.tactics import Tactics
from tritium.errors import EngineError, OutOfMemory, TritiumError
from tritium.kernels.kernel import Kernel, LaunchContext, Thunk
from tritium.runtime.binding import Binder, bind_tuned
from tritium.runtime.gpu.device import check_kernels, free_memory, out_of_memory
from tritium.runtime.kernel_choice import choose_kernels
from tritium.runtime.loaded_weights import LoadedWeights, bytes_in_use
from tritium.runtime.memory import GPU_RESERVE, megabytes

KEPT_SIZES = 128  # sizes of a batch whose calls are kept; the least recently used go
_LESS = {
    "encoder": "less max_num_batched_tokens (activations) or max_num_seqs",
    "module": "a smaller profile when it is built",
}


class PlanRunner:
    """Owns weights, arena and inputs of one engine. `kernels`: the kernel of each step."""

    def __init__(
        self,
        engine: Engine,
        largest: Sizes,
        inputs: Mapping[str, torch.Tensor],
        num_threads: int | None = None,
        tactics: Tactics | None = None,
        *,
        device: torch.device | None = None,
        context: LaunchContext | None = None,
    ) -> None:
        """largest: what memory is planned for. inputs: by name, of the largest sizes; they are written in place.
        tactics: None leaves every kernel at its default. device: the GPU on which inputs lie; None is the CPU. context:
        for kernels that want to know of the batch.

        Sets torch's thread count. Raises `EngineError`, `KernelError` or `OutOfMemory`.
        """
        torch.set_num_threads(num_threads or available_threads())
        self._engine, self._plan, self._device = engine, engine.plan, device
        offsets, arena_bytes = plan_arena(engine.plan, largest)
        self._arena_bytes = arena_bytes
        self._bound: OrderedDict[tuple[Phase, Sizes], list[tuple[str, Thunk]]] = OrderedDict()
        self.use(tactics)
        self._check_memory()
        try:
            self._binder = Binder(
                engine.plan,
                offsets=offsets,
                arena_bytes=arena_bytes,
                inputs=inputs,
                weights=LoadedWeights(engine, device=device),
                device=device,
                context=context,
            )
        except torch.cuda.OutOfMemoryError as error:
            raise self.out_of_memory("loading the model") from error

    def use(self, tactics: Tactics | None) -> None:
        """Run by these tactics and the kernels that they name from now on; all steps are bound anew."""
        self._tactics = tactics
        self.kernels = self._choose_kernels(tactics)
        self._bound.clear()

    def close(self) -> None:
        """Give back all memory: nothing may be called after it."""
        self._bound.clear()
        del self._binder

    def run(self, phase: Phase, sizes: Sizes) -> None:
        """Call the steps of a phase on what the inputs hold. Raises as `call` does."""
        self.call(self.bound(phase, sizes))

    def call(self, bound: Sequence[tuple[str, Thunk]]) -> None:
        """Call these steps.

        Raises `EngineError`, naming the step, for what torch refuses in it: an index that a table has no row for, say.
        `OutOfMemory` when a library finds no room on a GPU.
        """
        for op, thunk in bound:
            try:
                thunk()
            except TritiumError:
                raise
            except torch.cuda.OutOfMemoryError as error:
                raise self.out_of_memory(f"step {op}") from error
            except (RuntimeError, IndexError, ValueError) as error:
                raise EngineError(f"step {op} failed: {str(error).partition(chr(10))[0]}") from error

    def bound(self, phase: Phase, sizes: Sizes) -> list[tuple[str, Thunk]]:
        """The steps of a phase for these sizes: op and call. What is bound first reads the weights.

        Raises `OutOfMemory` when they, or what a kernel keeps, find no room on a GPU.
        """
        key = (phase, sizes)
        if key not in self._bound:
            steps = [(index, step) for index, step in enumerate(self._plan.steps) if step.phase == phase]
            try:
                self._bound[key] = [(step.op, self._bind(index, sizes)) for index, step in steps]
            except torch.cuda.OutOfMemoryError as error:
                raise self.out_of_memory("loading the model") from error
            while len(self._bound) > KEPT_SIZES:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        return self._bound[key]

    def output(self, name: str, sizes: Sizes) -> torch.Tensor:
        """One of the plan's outputs, where the steps have left it; valid until they run again."""
        return self._binder.tensor(self._plan.outputs[name], sizes)

    def out_of_memory(self, doing: str) -> OutOfMemory:
        """What is said when an allocation on the GPU fails."""
        assert self._device is not None
        weights = bytes_in_use(self._plan, self.kernels)
        parts = f"weights {megabytes(weights)}, activations {megabytes(self._arena_bytes)}"
        return out_of_memory(self._device, doing, parts, _LESS[self._engine.manifest.kind])

    def _bind(self, index: int, sizes: Sizes) -> Thunk:
        return bind_tuned(self._plan, self.kernels, self._tactics, self._binder, index, sizes)

    def _choose_kernels(self, tactics: Tactics | None) -> list[Kernel]:
        kernels = choose_kernels(
            self._plan,
            device=self._engine.manifest.backend,
            tuned=tactics.kernels if tactics else None,
            is_bitwise=self._engine.manifest.invariance == "bitwise",
        )
        if self._device is not None:
            check_kernels(kernels)
        return kernels

    def _check_memory(self) -> None:
        weights = bytes_in_use(self._plan, self.kernels)
        available = available_memory() if self._device is None else free_memory(self._device) - GPU_RESERVE
        if weights + self._arena_bytes > available:
            raise OutOfMemory(
                f"the engine does not fit: memory available {megabytes(available)}, weights {megabytes(weights)}, "
                f"arena {megabytes(self._arena_bytes)}; give {_LESS[self._engine.manifest.kind]}"
            )
