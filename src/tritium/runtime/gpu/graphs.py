"""Steps as CUDA graphs: one for each bucket of sizes, captured when it is met the second time."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

import torch

Size = TypeVar("Size", bound=Hashable)


class Captured(NamedTuple):
    """kept: what `run` gave while the graph was captured; it may own memory whose addresses the graph holds."""

    graph: torch.cuda.CUDAGraph
    kept: object


class StepGraphs(Generic[Size]):
    """Owns the graphs and the pool of memory that they share. They hold the addresses of weights and inputs."""

    def __init__(self, run: Callable[[Size], object], most: int = 1 << 30) -> None:
        """run: launches every kernel of a step of that size. most: sizes that are remembered, the last used ones."""
        self._run, self._most = run, most
        self.forget()

    def run(self, size: Size) -> None:
        """Replay a step of that size; the first time it is called, which compiles what has to be."""
        found = self._graphs.get(size)
        if found is not None:
            found.graph.replay()
        else:
            self._run(size)  # the second time too: capture runs nothing, and this step has to be computed
            self._graphs[size] = self._capture(size) if size in self._graphs else None
        self._graphs.move_to_end(size)
        if len(self._graphs) > self._most:
            torch.cuda.current_stream().synchronize()  # its graph may be running
            self._graphs.popitem(last=False)

    def forget(self) -> None:
        """Drop all graphs: what they would run is about to change."""
        self._graphs: OrderedDict[Size, Captured | None] = OrderedDict()  # None: met once
        self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, size: Size) -> Captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            kept = self._run(size)
        return Captured(graph, kept)
