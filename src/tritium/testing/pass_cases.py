"""What is tried of every pass: it matches, refuses a near miss, leaves what others read too, and matches in a chain.

One `Row` a pass in `normalising_cases.py` and `optimising_cases.py`. For each of a row's graphs `check` asserts the
rest of what a pass promises: the number of matches, none in a second run, provenance, types, and results.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from tritium.graph.capture import InputSpec, capture
from tritium.graph.foreign import Targets
from tritium.graph.spec import has_spec
from tritium.passes.result import PassResult
from tritium.passes.views import is_view
from tritium.testing.graphs import check_run, graph_of

Run = Callable[[fx.Graph], PassResult]
KINDS = ("match", "near_miss", "several_readers", "chain")


@dataclass(frozen=True)
class Case:
    """One function to capture, arguments for it, and how often the pass matches in it.

    before: passes that run first, on the normal form. is_canonical: False: the graph as it was captured. is_dynamic:
    captured with any number of tokens, which the code then may ask for; else they are 8.
    """

    fn: Callable[..., Any]
    example: Sequence[torch.Tensor]
    matches: int = 1
    before: Sequence[Run] = ()
    is_canonical: bool = True
    is_dynamic: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pass and its four graphs; a text in a graph's place says why there is none.

    weights: names of parameters that are weights of the model. tolerance: of results, absolute; 0: the bits are equal.
    calibrated: tensors that calibration would have found. keeps_all: nothing that was captured is left out of what the
    graph covers. opened: the pass itself, where it needs something around it.
    """

    run: Run | None = None
    opened: Callable[[], AbstractContextManager[Run]] | None = None
    match: Case | str
    near_miss: Case | str
    several_readers: Case | str
    chain: Case | str
    weights: Collection[str] = ()
    tolerance: float = 0.0
    calibrated: Mapping[str, torch.Tensor] = field(default_factory=dict)
    keeps_all: bool = True

    def case(self, kind: str) -> Case | str:
        """The graph of that kind, or why there is none."""
        found: Case | str = getattr(self, kind)
        return found


def check(row: Row, case: Case) -> fx.Graph:
    """Run the pass on the case's graph and assert what `check_run` says, and that provenance is kept; the graph."""
    with (row.opened or partial(_plain, row.run))() as run:
        graph = _graph(case, row.weights)
        for earlier in case.before:
            earlier(graph)
        done = _covered(node for node in graph.nodes if has_spec(node) and not is_view(node))
        values = dict(zip(_names(case), case.example, strict=True))
        values |= {node.meta["name"]: node.meta["value"] for node in graph.nodes if "value" in node.meta}
        check_run(graph, run, values | dict(row.calibrated), matches=case.matches, tolerance=row.tolerance)
        lost = done - _covered(graph.nodes) if row.keeps_all else set()
        assert not lost, f"nothing covers {lost} any more"
        return graph


@contextmanager
def _plain(run: Run | None) -> Iterator[Run]:
    assert run is not None
    yield run


def _covered(nodes: Iterable[fx.Node]) -> set[str]:
    """The captured calls that they stand for."""
    return {name for node in nodes for name in node.meta["covers"]}


class _Held(nn.Module):
    """The function with its weights as parameters; it has one input."""

    def __init__(self, case: Case, weights: Collection[str]) -> None:
        super().__init__()
        self.fn, self.names = case.fn, _names(case)
        for name, tensor in zip(self.names, case.example, strict=True):
            if name in weights:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, tensor: torch.Tensor) -> Any:
        return self.fn(*(self._parameters.get(name, tensor) for name in self.names))


def _graph(case: Case, weights: Collection[str]) -> fx.Graph:
    if not case.is_dynamic:
        return graph_of(case.fn, case.example, is_canonical=case.is_canonical, weights=weights)
    named = dict(zip(_names(case), case.example, strict=True))
    inputs = {n: InputSpec(t.dtype, tuple(t.shape[1:])) for n, t in named.items() if n not in weights}
    return capture(_Held(case, weights), inputs=inputs).graph


def _names(case: Case) -> list[str]:
    return list(inspect.signature(case.fn).parameters)


@contextmanager
def opened_plugin(
    plugin: AbstractContextManager[Targets], run: Callable[[fx.Graph, Targets], PassResult]
) -> Iterator[Run]:
    """The pass with a plugin's ops, which exist as long as this is open."""
    with plugin as targets:
        yield lambda graph: run(graph, targets)
