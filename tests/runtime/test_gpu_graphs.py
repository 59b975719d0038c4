"""When a step is called, captured and replayed; torch's graphs are played here, no GPU is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tritium.runtime.gpu.graphs import StepGraphs

Said = list[tuple[Any, ...]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """What happens, in order: ("run", size), ("capture", pool), ("replay",)."""
    said: Said = []
    pools = iter(range(100))

    class Graph:
        def replay(self) -> None:
            said.append(("replay",))

    @contextmanager
    def capturing(graph: Graph, *, pool: int, capture_error_mode: str) -> Iterator[None]:
        said.append(("capture", pool))
        yield

    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", capturing)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: next(pools))
    return said


def test_a_size_is_called_once_then_computed_and_captured_then_replayed(said: Said) -> None:
    graphs = StepGraphs(lambda size: said.append(("run", size)))
    for _ in range(4):
        graphs.run(8)
    assert said == [("run", 8), ("run", 8), ("capture", 0), ("run", 8), ("replay",), ("replay",)]


def test_sizes_have_graphs_of_their_own_in_one_pool(said: Said) -> None:
    graphs = StepGraphs(lambda size: said.append(("run", size)))
    for size in (1, 8, 1, 8):
        graphs.run(size)
    assert said == [
        ("run", 1),
        ("run", 8),
        ("run", 1),
        ("capture", 0),
        ("run", 1),
        ("run", 8),
        ("capture", 0),
        ("run", 8),
    ]


def test_what_is_forgotten_is_captured_anew_in_another_pool(said: Said) -> None:
    graphs = StepGraphs(lambda size: said.append(("run", size)))
    graphs.run(1), graphs.run(1)
    graphs.forget()
    del said[:]
    graphs.run(1), graphs.run(1)
    assert said == [("run", 1), ("run", 1), ("capture", 1), ("run", 1)]


def test_a_step_that_fails_is_not_taken_for_compiled(said: Said) -> None:
    fails = iter([True, False, False])

    def run(size: int) -> None:
        if next(fails):
            raise MemoryError(size)

    graphs = StepGraphs(run)
    with pytest.raises(MemoryError):
        graphs.run(2)
    graphs.run(2)
    assert said == []


def test_only_the_sizes_used_last_are_remembered(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    stream = type("Stream", (), {"synchronize": lambda self: waits.append(self)})()
    monkeypatch.setattr("torch.cuda.current_stream", lambda: stream)
    graphs = StepGraphs(lambda size: said.append(("run", size)), 2)
    for size in (1, 1, 2, 2, 3, 2, 1):
        graphs.run(size)
    runs = [size for what, *size in said if what == "run"]
    assert runs == [[1], [1], [1], [2], [2], [2], [3], [1]] and len(waits) == 2
    assert said.count(("replay",)) == 1
