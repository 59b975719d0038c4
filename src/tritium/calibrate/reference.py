"""A model in fp32, layer by layer: the captured graph is run node by node, each weight read when it is first needed and
dropped after its last use. Memory: the activations of a layer and the weights that are between first and last use,
which in a decoder is one at a time (and a tied embedding); never the whole model in fp32.

The graph is the one that capture gives, before any pass: no rewrite of ours is in it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tritium.errors import CaptureError
from tritium.graph.capture import capture
from tritium.graph.edit import output_node

ReadWeight = Callable[[str], Tensor]


class StreamedReference:
    """`module` captured in fp32. read_weight: a parameter or buffer by its name in the module, in its own dtype."""

    def __init__(self, module: nn.Module, read_weight: ReadWeight) -> None:
        captured = capture(module, dtype=torch.float32)
        self._graph, self._constants, self._read = captured.graph, captured.constants, read_weight
        self.most_weight_bytes = 0  # of fp32 weights that were in memory at once, in the last run

    def logits(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """fp32 [len, V] of each window of token ids. Each weight is read once, however many windows there are."""
        order = list(self._graph.nodes)
        last_use = {source: node for node in order for source in node.all_input_nodes}
        values: dict[fx.Node, Any] = {}
        weight_bytes: dict[fx.Node, int] = {}
        self.most_weight_bytes = 0
        with torch.no_grad():
            for node in order:
                if node.op == "call_function":
                    for source in node.all_input_nodes:
                        if source not in values:
                            values[source] = self._placeholder(source, windows)
                            weight_bytes[source] = _bytes(values[source])
                    self.most_weight_bytes = max(self.most_weight_bytes, sum(weight_bytes.values()))
                    values[node] = [self._call(node, values, index) for index in range(len(windows))]
                for source in node.all_input_nodes:
                    if last_use[source] is node and node.op != "output":
                        values.pop(source, None)
                        weight_bytes.pop(source, None)
        results = output_node(self._graph).all_input_nodes
        if len(results) != 1:
            raise CaptureError(f"the model returns {len(results)} tensors, not logits alone")
        return [logits.to(torch.float32) for logits in values[results[0]]]

    def _placeholder(self, node: fx.Node, windows: Sequence[Sequence[int]]) -> Any:
        """One tensor for all windows, or one for each."""
        name, kind = node.meta["name"], node.meta["kind"]
        if kind == "input":
            rows = windows if name == "input_ids" else [range(len(window)) for window in windows]
            return [torch.tensor(list(row), dtype=torch.int64) for row in rows]
        weight = self._constants[name] if name in self._constants else self._read(name)
        return weight.to(torch.float32) if weight.is_floating_point() else weight

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], index: int) -> Any:
        def value(source: fx.Node) -> Any:
            found = values[source]
            return found[index] if isinstance(found, list) else found

        args = fx.node.map_arg(node.args, value)
        kwargs = fx.node.map_arg(dict(node.kwargs), value)
        if str(kwargs.get("device")) == "meta":  # made in the model's code, where capture had no data
            kwargs["device"] = torch.device("cpu")
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _bytes(value: Any) -> int:
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 0
