"""A captured graph run node by node over several texts at once: each weight is read when it is first needed and dropped
after its last use. Memory: the activations of a layer and the weights that are between first and last use, which in a
decoder is one at a time (and a tied embedding); never the whole model in fp32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tritium.errors import CaptureError
from tritium.graph.edit import output_node
from tritium.graph.spec import target_of

ReadWeight = Callable[[str], Tensor]
Values = dict[fx.Node, Any]
Visit = Callable[[fx.Node, Values], Mapping[fx.Node, Tensor]]


class Stream:
    """graph: as captured, in fp32. constants: the model's own tensors. read: any other weight by its name."""

    def __init__(self, graph: fx.Graph, constants: Mapping[str, Tensor], read: ReadWeight) -> None:
        self._order = list(graph.nodes)
        self._result, self._constants, self._read = output_node(graph), constants, read
        self._last_use = {source: node for node in self._order for source in node.all_input_nodes}
        self.most_weight_bytes = 0  # of fp32 weights that were in memory at once, in the last run

    def weight(self, name: str) -> Tensor:
        """A weight in fp32, if it is of floating type."""
        weight = self._constants[name] if name in self._constants else self._read(name)
        return weight.to(torch.float32) if weight.is_floating_point() else weight

    def run(
        self,
        windows: Sequence[Sequence[int]],
        visit: Visit | None = None,
        *,
        start: int = 0,
        values: Values | None = None,
        after: Callable[[int, Values], None] | None = None,
    ) -> list[Tensor]:
        """fp32 [len, V] of each window of token ids. Each weight is read once, however many windows there are.

        visit(node, values) is called before a node is computed, with its inputs among `values` (a list with one tensor
        a window, or one tensor for all); what it returns takes the place of those inputs for this node.
        after(index, values) is called after the node with that index in the graph's order. start, values: go on
        behind that node, with what `after` got; weights are read again.
        """
        values = dict(values or {})
        weight_bytes: dict[fx.Node, int] = {}
        self.most_weight_bytes = 0
        with torch.no_grad():
            for index, node in enumerate(self._order[start:], start):
                if node.op == "call_function":
                    for source in node.all_input_nodes:
                        if source not in values:
                            values[source] = self._placeholder(source, windows)
                            weight_bytes[source] = _bytes(values[source])
                    self.most_weight_bytes = max(self.most_weight_bytes, sum(weight_bytes.values()))
                    known = values | dict(visit(node, values)) if visit is not None else values
                    values[node] = [_call(node, known, i) for i in range(len(windows))]
                for source in node.all_input_nodes:
                    if self._last_use[source] is node and node.op != "output":
                        values.pop(source, None)
                        weight_bytes.pop(source, None)
                if after is not None and node.op == "call_function":
                    after(index, values)
        results = self._result.all_input_nodes
        if len(results) != 1:
            raise CaptureError(f"the model returns {len(results)} tensors, not logits alone")
        return [logits.to(torch.float32) for logits in values[results[0]]]

    def _placeholder(self, node: fx.Node, windows: Sequence[Sequence[int]]) -> Any:
        """One tensor for all windows, or one for each."""
        if node.op != "placeholder":
            raise CaptureError(f"{node.name} was dropped before its last use")
        if node.meta["kind"] == "input":
            rows = windows if node.meta["name"] == "input_ids" else [range(len(window)) for window in windows]
            return [torch.tensor(list(row), dtype=torch.int64) for row in rows]
        return self.weight(node.meta["name"])


def _call(node: fx.Node, values: Values, index: int) -> Any:
    def value(source: fx.Node) -> Any:
        found = values[source]
        return found[index] if isinstance(found, list) else found

    args = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(dict(node.kwargs), value)
    if str(kwargs.get("device")) == "meta":  # made in the model's code, where capture had no data
        kwargs["device"] = torch.device("cpu")
    return target_of(node)(*args, **kwargs)


def _bytes(value: Any) -> int:
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 0
