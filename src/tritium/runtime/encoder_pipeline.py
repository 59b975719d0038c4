"""Batches through an encoder's runner, as many on their way as it allows: on a GPU one more than is waited for."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner

if TYPE_CHECKING:
    from tritium.runtime.gpu.encoder_runner import GpuEncoderRunner

logger = logging.getLogger("tritium")

T = TypeVar("T")


class EncoderPipeline(Generic[T]):
    """`T`: what travels with a request. All calls belong on the thread that made the runner."""

    def __init__(self, runner: "EncoderRunner | GpuEncoderRunner") -> None:
        self._runner: Any = runner  # launch gives what collect takes, of either
        self._flying: deque[tuple[list[T], Any]] = deque()

    def __len__(self) -> int:
        """Requests on their way."""
        return sum(len(tags) for tags, _ in self._flying)

    def step(self, batch: Sequence[tuple[EncoderRequest, T]]) -> list[tuple[T, torch.Tensor | Exception]]:
        """Launch a batch, if there is anything in it, and wait for the oldest one unless there is room for another.

        Returns what is over, with the answers or the error that ended its batch. Raises nothing that a batch can cause.
        """
        if batch:
            requests = [request for request, _ in batch]
            self._flying.append(([tag for _, tag in batch], _attempt(self._runner.launch, requests)))
        if not self._flying or (batch and len(self._flying) < self._runner.num_in_flight):
            return []
        tags, launched = self._flying.popleft()
        found = launched if isinstance(launched, Exception) else _attempt(self._runner.collect, launched)
        return [(tag, found if isinstance(found, Exception) else found[i]) for i, tag in enumerate(tags)]


def _attempt(call: Callable[[Any], Any], argument: Any) -> Any:
    """What it gives, or the exception: one batch must end neither a thread nor a process."""
    try:
        return call(argument)
    except Exception as error:
        logger.exception("a batch of the encoder failed")
        return error
