"""What runs a loop needs of one: `EngineLoop` and its kinds, and `RanksLoop` over several processes."""

from typing import Protocol

from tritium.errors import EngineError
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import Request
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.stream import Listener
from tritium.runtime.weight_updates import WeightUpdate


class Loop(Protocol):
    """See `EngineLoop`. All calls belong on one thread."""

    @property
    def is_stalled(self) -> bool:
        """The last step found nothing that could run."""
        ...

    @property
    def scheduler(self) -> Scheduler:
        """Its requests and counts."""
        ...

    @property
    def failure(self) -> EngineError | None:
        """Why it can do nothing any more."""
        ...

    @property
    def has_work(self) -> bool:
        """True while there is a reason to call `step`."""
        ...

    def submit(self, request: Request, listener: Listener, *, is_streaming: bool = False) -> None:
        """Take a request."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request."""
        ...

    def update_weights(self, update: WeightUpdate) -> None:
        """Take new weights."""
        ...

    def step(self) -> list[StepOutput]:
        """Compute one batch."""
        ...

    def fail_all(self, error: BaseException) -> list[StepOutput]:
        """End every request with an error."""
        ...

    def let_go(self) -> None:
        """From any thread, before `close`, when a step does not end: it must not wait for other processes any more."""
        ...

    def close(self) -> None:
        """End every request and give the memory back."""
        ...
