"""An executor of one of several ranks: what it raises is no single step's matter, for the other ranks went on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from tritium.runtime.request import RowError, SampledToken, ScheduledBatch

T = TypeVar("T")


class Watch(Protocol):
    """Who is told what the executor does."""

    def working(self) -> AbstractContextManager[None]:
        """Held while the executor is called, which the other ranks can keep from returning. What is raised inside
        comes out as an error that ends all ranks."""
        ...

    def chose(self, token_ids: Sequence[int]) -> None:
        """A step's tokens, in their order, -1 for a row without one."""
        ...


class RankExecutor:
    """Passes the loop's calls on to an executor, under a watch. What is not a step is the executor's own."""

    def __init__(self, executor: Any, watch: Watch) -> None:
        self._executor = executor
        self._watch = watch

    def execute(self, batch: ScheduledBatch) -> list[SampledToken | RowError]:
        """As the executor's."""
        return self._chosen(lambda: self._executor.execute(batch))

    def launch(self, batch: ScheduledBatch) -> Any:
        """As the executor's."""
        with self._watch.working():
            return self._executor.launch(batch)

    def collect(self, step: Any) -> list[SampledToken | RowError]:
        """As the executor's."""
        return self._chosen(lambda: self._executor.collect(step))

    def close(self) -> None:
        """As the executor's."""
        self._executor.close()

    def _chosen(self, compute: Callable[[], list[SampledToken | RowError]]) -> list[SampledToken | RowError]:
        with self._watch.working():
            tokens = compute()
        self._watch.chose([token.token_id if isinstance(token, SampledToken) else -1 for token in tokens])
        return tokens


class Tokens:
    """A hash of all tokens that a rank has chosen, step by step."""

    def __init__(self) -> None:
        self.num_steps, self.digest = 0, 0

    def add(self, token_ids: Sequence[int]) -> None:
        """One step's."""
        self.num_steps += 1
        self.digest = hash((self.digest, *token_ids))
