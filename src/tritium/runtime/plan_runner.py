"""Runs a plan that keeps nothing between batches: a stateless module's.

Weights, arena and inputs are laid out once; the calls of a batch's steps are made when its size first comes, and kept.
All of it belongs on one thread.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch

from tritium.config import available_memory, available_threads
from tritium.engine.arena import plan_arena
from tritium.engine.engine import Engine
from tritium.engine.plan import Phase, Sizes
from tritium.engine.tactics import Tactics
from tritium.errors import EngineError, OutOfMemory, TritiumError
from tritium.kernels.kernel import Thunk
from tritium.runtime.binding import Binder, bind_tuned
from tritium.runtime.kernel_choice import choose_kernels
from tritium.runtime.loaded_weights import LoadedWeights, bytes_in_use
from tritium.runtime.memory import megabytes

KEPT_SIZES = 128  # sizes of a batch whose calls are kept; the least recently used go


class PlanRunner:
    """Owns weights, arena and inputs of one engine. `kernels`: the kernel of each step."""

    def __init__(
        self,
        engine: Engine,
        largest: Sizes,
        inputs: Mapping[str, torch.Tensor],
        num_threads: int | None = None,
        tactics: Tactics | None = None,
    ) -> None:
        """largest: what memory is planned for. inputs: by name, of the largest sizes; they are written in place.
        tactics: None leaves every kernel at its default.

        Sets torch's thread count. Raises `EngineError`, `KernelError` or `OutOfMemory`.
        """
        torch.set_num_threads(num_threads or available_threads())
        self._plan = engine.plan
        self._tactics = tactics
        self.kernels = choose_kernels(engine.plan, tuned=tactics.kernels if tactics else None)
        offsets, arena_bytes = plan_arena(engine.plan, largest)
        weights, available = bytes_in_use(engine.plan, self.kernels), available_memory()
        if weights + arena_bytes > available:
            raise OutOfMemory(
                f"the engine does not fit: memory available {megabytes(available)}, weights {megabytes(weights)}, "
                f"arena {megabytes(arena_bytes)}; build it for smaller batches"
            )
        self._binder = Binder(
            engine.plan, offsets=offsets, arena_bytes=arena_bytes, inputs=inputs, weights=LoadedWeights(engine)
        )
        self._bound: OrderedDict[tuple[Phase, Sizes], list[tuple[str, Thunk]]] = OrderedDict()

    def close(self) -> None:
        """Give back all memory: nothing may be called after it."""
        self._bound.clear()
        del self._binder

    def run(self, phase: Phase, sizes: Sizes) -> None:
        """Call the steps of a phase on what the inputs hold.

        Raises `EngineError`, naming the step, for what torch refuses in it: an index that a table has no row for, say.
        """
        for op, thunk in self.bound(phase, sizes):
            try:
                thunk()
            except TritiumError:
                raise
            except (RuntimeError, IndexError, ValueError) as error:
                raise EngineError(f"step {op} failed: {str(error).partition(chr(10))[0]}") from error

    def bound(self, phase: Phase, sizes: Sizes) -> list[tuple[str, Thunk]]:
        """The steps of a phase for these sizes: op and call."""
        key = (phase, sizes)
        if key not in self._bound:
            steps = [(index, step) for index, step in enumerate(self._plan.steps) if step.phase == phase]
            self._bound[key] = [(step.op, self._bind(index, sizes)) for index, step in steps]
            while len(self._bound) > KEPT_SIZES:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        return self._bound[key]

    def _bind(self, index: int, sizes: Sizes) -> Thunk:
        return bind_tuned(self._plan, self.kernels, self._tactics, self._binder, index, sizes)

    def output(self, name: str, sizes: Sizes) -> torch.Tensor:
        """One of the plan's outputs, where the steps have left it; valid until they run again."""
        return self._binder.tensor(self._plan.outputs[name], sizes)
