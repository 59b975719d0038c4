"""A decoder's plan as thunks: bound for a number of tokens, or of sampled rows, when a batch first has it, and kept."""

from collections.abc import Callable
from functools import partial

import torch

from tritium.engine.plan import Phase, Plan, Sizes
from tritium.kernels.kernel import Thunk
from tritium.runtime.binding import Binder
from tritium.runtime.loaded_weights import LoadedWeights
from tritium.runtime.staged_weights import StagedWeights

BindStep = Callable[[Binder, int, Sizes], Thunk]
PHASES: tuple[Phase, Phase] = ("tokens", "rows")


class BoundSteps:
    """The steps over tokens and those over sampled rows, apart. All calls belong on the engine thread."""

    def __init__(
        self,
        plan: Plan,
        binder: Binder,
        bind: BindStep,
        *,
        largest: Sizes,
        fewest_tokens: int = 1,
        fewest_rows: int = 1,
    ) -> None:
        """bind: how the step of an index is bound. largest: what each phase is bound for but in its own count.

        The smallest batch is bound at once: what cannot be bound fails now, and packing is not the first request's to
        wait for.
        """
        self.binder = binder
        self._plan = plan
        self._bind = bind
        self._largest = largest
        self._fewest = {"tokens": fewest_tokens, "rows": fewest_rows}
        self._tokens: dict[int, list[Thunk]] = {}
        self._rows: dict[int, tuple[list[Thunk], torch.Tensor]] = {}
        self.tokens(fewest_tokens)
        self.rows(fewest_rows)

    def tokens(self, count: int) -> list[Thunk]:
        """The steps over `count` tokens."""
        if count not in self._tokens:
            self._tokens[count] = self._bound("tokens", count)
        return self._tokens[count]

    def rows(self, count: int) -> tuple[list[Thunk], torch.Tensor]:
        """The steps over `count` sampled rows, and where they leave the logits, [count, V]."""
        if count not in self._rows:
            self._rows[count] = (self._bound("rows", count), self._logits(count))
        return self._rows[count]

    @property
    def token_counts(self) -> set[int]:
        """Those that are bound."""
        return set(self._tokens)

    def forget(self) -> None:
        """Bind everything anew when it is next met."""
        self._tokens.clear()
        self._rows.clear()

    def close(self) -> None:
        """Give back all memory: nothing may be called after it."""
        self.forget()
        del self.binder

    def stage(self, weights: LoadedWeights) -> StagedWeights:
        """The steps of the smallest batch with other weights, to be bound one by one beside those in use."""
        binder = self.binder.with_weights(weights)
        sizes = {phase: self._sizes(phase, self._fewest[phase]) for phase in PHASES}
        pieces = [partial(self._bind, binder, index, sizes[step.phase]) for index, step in enumerate(self._plan.steps)]
        return StagedWeights(binder, pieces)

    def swap(self, staged: StagedWeights) -> None:
        """Run with the staged weights from now on; the old ones are freed. Only when all are bound."""
        self.binder = staged.binder
        bound = list(zip(self._plan.steps, staged.thunks, strict=True))
        tokens, rows = ([thunk for step, thunk in bound if step.phase == phase] for phase in PHASES)
        self._tokens = {self._fewest["tokens"]: tokens}
        self._rows = {self._fewest["rows"]: (rows, self._logits(self._fewest["rows"]))}

    def _bound(self, phase: Phase, count: int) -> list[Thunk]:
        sizes = self._sizes(phase, count)
        indices = (index for index, step in enumerate(self._plan.steps) if step.phase == phase)
        return [self._bind(self.binder, index, sizes) for index in indices]

    def _logits(self, count: int) -> torch.Tensor:
        return self.binder.tensor(self._plan.output, self._sizes("rows", count))

    def _sizes(self, phase: Phase, count: int) -> Sizes:
        if phase == "tokens":
            return Sizes(tokens=count, sequences=self._largest.sequences, rows=self._largest.rows)
        return Sizes(tokens=self._largest.tokens, sequences=self._largest.sequences, rows=count)
