"""A GPU for the executor where there is none: the CPU computes, and Triton's interpreter runs the kernels.

What `runtime/gpu` asks of torch.cuda is answered: one device, whose memory is the host's, whose streams are in order by
being calls, and whose graphs call again what was captured. Triton must have been told to interpret before it is loaded.

It cannot see faults of order: copies are over when they return, and waiting for a stream, an event or the device does
nothing, so that code which forgets to wait passes here. Only a GPU shows it, or a test that watches who waits.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from tritium.runtime.gpu.graphs import Captured, StepGraphs

MEMORY = 4 << 30  # bytes that it says are free, of as many
CAPABILITY = (7, 5)  # of computing: the kernels that need no more


class FakeEvent:
    """A moment of the host's clock: all that was launched before it is over."""

    def __init__(self, **_: object) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        """Note that the GPU came by here."""
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is to be waited for."""

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Milliseconds until the other one."""
        return 1000 * (end._seconds - self._seconds)


class FakeStream:
    """What is launched on it is over at once."""

    def synchronize(self) -> None:
        """Nothing is to be waited for."""

    def wait_stream(self, other: object) -> None:
        """Nothing is to be waited for."""


class _Again:
    def __init__(self, run: Callable[[], object]) -> None:
        self.replay = run


def pretend_to_have_a_gpu(patch: Callable[[str, Any], None]) -> None:
    """patch(name, value): as `monkeypatch.setattr`."""
    answers: dict[str, Any] = {
        "is_available": True,
        "current_device": 0,
        "get_device_name": "a GPU that is not there",
        "get_device_capability": CAPABILITY,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "graph_pool_handle": (0, 0),
    }
    for name, answer in answers.items():
        patch(f"torch.cuda.{name}", lambda *_, answer=answer: answer)
    for name in ("synchronize", "empty_cache", "set_device", "_sleep"):
        patch(f"torch.cuda.{name}", lambda *_: None)  # one each: torch.compile knows them by their identity
    patch("torch.cuda.Event", FakeEvent)
    patch("torch.cuda.current_stream", lambda *_: FakeStream())
    patch("torch.Tensor.pin_memory", lambda tensor: tensor)
    patch("tritium.runtime.gpu.device._find_gpu", lambda *_: torch.device("cpu"))
    patch("tritium.engine.environment._driver", lambda: "none")
    patch("tritium.runtime.gpu.graphs.StepGraphs._capture", _capture)


def _capture(graphs: StepGraphs[Any], size: Any) -> Captured:
    again: Any = _Again(lambda: graphs._run(size))
    return Captured(again, None)
