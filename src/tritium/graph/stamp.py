"""Stamping: of equal blocks some are captured, and the others copied from them, under the names a full capture gives.

Export takes most of a cold build, and a time for each block. Captured are the first block and two of each kind. Two of
a kind must have come out as the same calls of the same things; so do, then, all of that kind: a captured block depends
on its module, on what the block before it gave, and on what was made before all blocks.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from tritium.graph.source import Source

IGNORED = {"_parameters", "_buffers", "_modules", "training"}  # compared by themselves, or set by capture
Role = tuple[Any, ...]


class Unequal(Exception):
    """Blocks that looked equal are not, or have not the form that can be copied: everything is to be captured."""


@dataclass(frozen=True)
class Stamping:
    """Which of a module's blocks stand for which.

    path: the ModuleList. kinds: each block's kind, as a number. captured: indices of the blocks that are exported.
    """

    path: str
    kinds: tuple[int, ...]
    captured: tuple[int, ...]

    def block_of(self, name: str) -> int | None:
        """The index of the block that a dotted name is in."""
        match = re.match(rf"{re.escape(self.path)}\.(\d+)(\.|$)", name)
        return int(match[1]) if match else None

    def rename(self, name: str, block: int) -> str:
        """The name of the same thing in another block."""
        return re.sub(rf"^{re.escape(self.path)}\.\d+", f"{self.path}.{block}", name)


def choose(module: nn.Module, path: str) -> Stamping | None:
    """What to capture of the blocks in `module`'s list `path`; None when nothing is saved."""
    blocks: Any = module.get_submodule(path)
    examples: list[nn.Module] = []
    kinds: list[int] = []
    for block in blocks:
        kind = next((i for i, example in enumerate(examples) if _alike(example, block)), len(examples))
        if kind == len(examples):
            examples.append(block)
        kinds.append(kind)
    seen = dict.fromkeys(kinds, 0)
    captured = [0]
    for index, kind in enumerate(kinds[1:], 1):
        if seen[kind] < 2:
            captured.append(index)
        seen[kind] += 1
    return Stamping(path, tuple(kinds), tuple(captured)) if len(captured) < len(kinds) else None


@contextlib.contextmanager
def only_captured(module: nn.Module, stamping: Stamping | None) -> Iterator[None]:
    """Inside, the module's list has only the blocks that are to be captured, under their own names."""
    if stamping is None:
        yield
        return
    blocks = module.get_submodule(stamping.path)
    every = blocks._modules
    blocks._modules = {str(index): every[str(index)] for index in stamping.captured}
    try:
        yield
    finally:
        blocks._modules = every


def stamp(graph: fx.Graph, stamping: Stamping) -> fx.Graph:
    """The graph of all blocks, from an annotated one of those captured. Raises `Unequal`."""
    parts = _split(graph, stamping)
    if len({len(part.results) for part in parts.values()}) != 1:
        raise Unequal("blocks give different numbers of results")
    samples = {kind: _sample(parts, stamping, kind) for kind in set(stamping.kinds)}
    again = _Copy(graph, stamping, parts, samples).graph(stamping.captured)
    if [node.name for node in again.nodes] != [node.name for node in graph.nodes]:
        raise Unequal("names have gaps")  # nodes were dropped after they had got theirs
    return _Copy(graph, stamping, parts, samples).graph(range(len(stamping.kinds)))


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """True for modules of one structure: classes, attributes, dtypes and sizes of tensors, not their values."""
    if type(a) is not type(b) or a._modules.keys() != b._modules.keys():
        return False
    for tensors, others in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        if {n: _form(t) for n, t in tensors.items()} != {n: _form(t) for n, t in others.items()}:
            return False
    ours, theirs = ({k: v for k, v in vars(m).items() if k not in IGNORED} for m in (a, b))
    if ours.keys() != theirs.keys() or not all(_equal(ours[key], theirs[key]) for key in ours):
        return False
    return all(_both_none_or_alike(a._modules[name], b._modules[name]) for name in a._modules)


def _both_none_or_alike(a: nn.Module | None, b: nn.Module | None) -> bool:
    return a is b if a is None or b is None else _alike(a, b)


def _form(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.is_meta)


def _equal(a: Any, b: Any) -> bool:
    """Equal attributes; of a type whose == does not say so, only the same object."""
    return a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and (a == b) is True)


class _Part(NamedTuple):
    """The calls of one captured block; results: those that are read outside it, in order."""

    calls: list[fx.Node]
    results: list[fx.Node]


def _split(graph: fx.Graph, stamping: Stamping) -> dict[int, _Part]:
    """The calls of each captured block. They must lie together, block after block."""
    calls: dict[int, list[fx.Node]] = {}
    last: int | None = None
    for node in graph.nodes:
        if node.op == "call_function":
            block = stamping.block_of(node.meta["source"].module)
            if block != last and (block in calls or (block is None and len(calls) != len(stamping.captured))):
                raise Unequal("blocks are not run one after another")
            if block is not None:
                calls.setdefault(block, []).append(node)
            last = block if calls else None
    if tuple(calls) != stamping.captured:
        raise Unequal("blocks are not run in their order")
    parts = {}
    for block, nodes in calls.items():
        inside = set(nodes)
        parts[block] = _Part(nodes, [node for node in nodes if any(user not in inside for user in node.users)])
    return parts


class _Roles:
    """What the arguments of a block's calls are to the block."""

    def __init__(self, block: int, before: int | None, parts: Mapping[int, _Part], stamping: Stamping) -> None:
        self.block, self.stamping = block, stamping
        self.own = {node: i for i, node in enumerate(parts[block].calls)} if block in parts else {}
        self.given = {node: i for i, node in enumerate(parts[before].results)} if before is not None else {}

    def of(self, node: fx.Node) -> Role:
        """own call, result of the block before, weight of the block, or something made outside all blocks."""
        if node in self.own:
            return ("own", self.own[node])
        if node in self.given:
            return ("given", self.given[node])
        place = self.stamping.block_of(node.meta["name"] if node.op == "placeholder" else node.meta["source"].module)
        if place is None:
            return ("outer", node)
        if place == self.block and node.op == "placeholder":
            return ("weight", self.stamping.rename(node.meta["name"], 0))
        raise Unequal(f"{node.name} is read by a later block than the next")


def _sample(parts: Mapping[int, _Part], stamping: Stamping, kind: int) -> int:
    """The captured block that those of `kind` are copied from, after it was held against the other one."""
    blocks = [block for block in stamping.captured[1:] if stamping.kinds[block] == kind]
    described = [_describe(block, parts, stamping) for block in blocks]
    if any(other != described[0] for other in described[1:]):
        raise Unequal(f"blocks {blocks} are not the same calls")
    return blocks[0] if blocks else 0  # a kind of its own is only copied to itself


def _describe(block: int, parts: Mapping[int, _Part], stamping: Stamping) -> list[Any]:
    """The calls of a block, so that equal descriptions are equal blocks."""
    before = stamping.captured[stamping.captured.index(block) - 1] if block else None
    roles = _Roles(block, before, parts, stamping)
    results = set(parts[block].results)
    return [
        (
            _base(node.name),
            node.target,
            fx.node.map_arg((node.args, node.kwargs), roles.of),
            node.meta["spec"],
            _moved(node.meta["source"], stamping, 0),
            node in results,
        )
        for node in parts[block].calls
    ]


def _moved(source: Source, stamping: Stamping, block: int) -> Source:
    return source._replace(module=stamping.rename(source.module, block))


def _base(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


class _Copy:
    """One copy of a captured graph with any sequence of blocks."""

    def __init__(
        self, graph: fx.Graph, stamping: Stamping, parts: Mapping[int, _Part], samples: Mapping[int, int]
    ) -> None:
        self.old, self.stamping, self.parts, self.samples = graph, stamping, parts, samples
        self.new = fx.Graph()
        self.outer: dict[fx.Node, fx.Node] = {}  # what is outside all blocks
        self.weights: dict[str, fx.Node] = {}  # of blocks, by name

    def graph(self, blocks: Sequence[int]) -> fx.Graph:
        """The copy; a block is taken as it was captured, or from the sample of its kind."""
        self._placeholders(blocks)
        given: list[fx.Node] = []
        inside = {node for part in self.parts.values() for node in part.calls}
        for node in self.old.nodes:
            if node is self.parts[0].calls[0]:
                for block in blocks:
                    given = self._block(block, given)
                self.outer |= zip(self.parts[self.stamping.captured[-1]].results, given, strict=True)
            if node.op != "placeholder" and node not in inside:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._outside)
                self.outer[node] = self._add(node, args, kwargs, node.meta["source"])
        return self.new

    def _outside(self, node: fx.Node) -> fx.Node:
        """The copy of what a call before or behind the blocks reads."""
        if node not in self.outer:
            raise Unequal(f"{node.name} is read behind the blocks, and is not of the last one")
        return self.outer[node]

    def _placeholders(self, blocks: Sequence[int]) -> None:
        """In the order of a full capture: all weights of a block together, in the place of the first."""
        run: dict[int, list[fx.Node]] = {}
        for node in self.old.nodes:
            block = self.stamping.block_of(node.meta["name"]) if node.op == "placeholder" else None
            if block is not None:
                run.setdefault(block, []).append(node)
                continue
            self._weights(run, blocks)
            run = {}
            if node.op == "placeholder":
                self.outer[node] = self._placeholder(node, node.name, node.meta["name"])

    def _weights(self, run: Mapping[int, list[fx.Node]], blocks: Sequence[int]) -> None:
        for block in blocks if run else ():
            sample = block if block in self.stamping.captured else self.samples[self.stamping.kinds[block]]
            for node in run.get(sample, ()):
                name = self.stamping.rename(node.meta["name"], block)
                place = self.stamping.path.replace(".", "_")
                spelled = node.name.replace(f"{place}_{sample}_", f"{place}_{block}_", 1)
                self.weights[name] = self._placeholder(node, spelled, name)

    def _placeholder(self, node: fx.Node, spelled: str, name: str) -> fx.Node:
        new = self.new.placeholder(spelled)
        new.meta = node.meta | {"name": name}
        return new

    def _block(self, block: int, given: Sequence[fx.Node]) -> list[fx.Node]:
        """Copy a block; `given` are the results of the one before it."""
        captured = self.stamping.captured
        sample = block if block in captured else self.samples[self.stamping.kinds[block]]
        before = captured[captured.index(sample) - 1] if sample else None
        roles = _Roles(sample, before, self.parts, self.stamping)
        made: list[fx.Node] = []

        def find(node: fx.Node) -> fx.Node:
            role, key = roles.of(node)
            if role == "weight":
                return self.weights[self.stamping.rename(key, block)]
            return self.outer[node] if role == "outer" else (made if role == "own" else given)[key]

        for node in self.parts[sample].calls:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), find)
            made.append(self._add(node, args, kwargs, _moved(node.meta["source"], self.stamping, block)))
        results = set(self.parts[sample].results)
        return [new for old, new in zip(self.parts[sample].calls, made, strict=True) if old in results]

    def _add(self, node: fx.Node, args: Any, kwargs: Any, source: Source) -> fx.Node:
        new = self.new.create_node(node.op, node.target, args, kwargs, name=_base(node.name))
        new.meta = {"spec": node.meta["spec"], "source": source, "covers": ()}
        if node.op == "call_function":
            new.meta["covers"] = (new.name,)
        return new
