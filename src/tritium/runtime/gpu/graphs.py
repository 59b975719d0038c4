"""Steps of single tokens as CUDA graphs: one for each bucket of sizes, captured when it is met the second time."""

from collections.abc import Callable

import torch


class StepGraphs:
    """Owns the graphs and the pool of memory that they share. They hold the addresses of weights and inputs."""

    def __init__(self, run: Callable[[int], None]) -> None:
        """run: launches every kernel of a step of so many single tokens."""
        self._run = run
        self.forget()

    def run(self, size: int) -> None:
        """Replay a step of `size` single tokens; the first time it is called, which compiles what has to be."""
        if graph := self._graphs.get(size):
            graph.replay()
            return
        self._run(size)  # the second time too: capture runs nothing, and this step has to be computed
        self._graphs[size] = self._capture(size) if size in self._graphs else None

    def forget(self) -> None:
        """Drop all graphs: what they would run is about to change."""
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: met once
        self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run(size)
        return graph
