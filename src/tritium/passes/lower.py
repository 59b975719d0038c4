"""Lower a finished graph to the plan: placeholders and views become values, every other call one step.

Sizes become texts in T, S and R. A view that needs its elements in another order than they lie in (the heads of a
transposed tensor flattened, say) gets a copy first: contiguity is decided here and nowhere else, by doing on meta
tensors what the runtime will do. Steps over R rows follow all steps over T tokens.
"""

import operator
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import fx

from tritium.engine.plan import Arg, Extent, KVGroup, Plan, PlanKind, Ref, Sizes, Step, Value
from tritium.engine.views import view_of
from tritium.errors import CaptureError
from tritium.graph.edit import arguments, output_node
from tritium.graph.foreign import PREFIX, is_foreign
from tritium.graph.spec import NUM_ROWS, Dim, Spec, args_of, dtype_name, has_spec, spec_of, target_of
from tritium.passes.views import EXPAND, PERMUTE, SLICE, VIEW, is_view

SAMPLE = Sizes(tokens=1009, sequences=11, rows=13)  # numbers no model has, so that no view fits by chance
COPY = "aten.clone.default"
VIEW_NAMES = {VIEW: "aten.view", PERMUTE: "aten.permute", SLICE: "aten.slice", EXPAND: "aten.expand"}


def lower(graph: fx.Graph, kv_groups: Sequence[KVGroup]) -> Plan:
    """See the module's docstring. Raises `CaptureError` when the result is not logits [T, V]."""
    return _Lowering(graph).plan(tuple(kv_groups))


def lower_module(graph: fx.Graph, outputs: Sequence[str]) -> Plan:
    """The plan of a stateless module; `outputs` names what the graph returns, in order."""
    return _Lowering(graph).named_plan("module", outputs)


def lower_encoder(graph: fx.Graph, outputs: Sequence[str], vocab_size: int) -> Plan:
    """The plan of an encoder, the same way. Token ids are below vocab_size."""
    return msgspec.structs.replace(_Lowering(graph).named_plan("encoder", outputs), vocab_size=vocab_size)


class _Lowering:
    """State of one lowering: values so far, steps by phase, the name and the sample tensor of each node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.values: dict[str, Value] = {}
        self.steps: dict[str, list[Step]] = {"tokens": [], "rows": []}
        self.names: dict[fx.Node, str] = {}
        self.samples: dict[str, torch.Tensor] = {}

    def plan(self, kv_groups: tuple[KVGroup, ...]) -> Plan:
        """Lower every node of a decoder."""
        self._lower()
        logits = self._logits()
        return Plan(
            values=tuple(self.values.values()),
            steps=(*self.steps["tokens"], *self.steps["rows"]),
            kv_groups=kv_groups,
            output=self.names[logits],
            vocab_size=int(spec_of(logits).shape[1]),  # type: ignore[arg-type]
        )

    def named_plan(self, kind: PlanKind, outputs: Sequence[str]) -> Plan:
        """Lower every node of a model with named outputs."""
        self._lower()
        named = zip(outputs, args_of(output_node(self.graph))[0], strict=True)
        return Plan(
            kind=kind,
            values=tuple(self.values.values()),
            steps=(*self.steps["tokens"], *self.steps["rows"]),
            outputs={name: self.names[node] for name, node in named if node is not None},
        )

    def _lower(self) -> None:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
        for node in self.graph.nodes:
            if node.op == "call_function":
                if is_view(node):
                    self._view(node)
                elif node.target is operator.getitem:
                    self.names[node] = f"{self.names[args_of(node)[0]]}.{args_of(node)[1]}"
                else:
                    self._step(node)

    def _logits(self) -> fx.Node:
        results = output_node(self.graph).all_input_nodes
        if len(results) != 1 or not has_spec(results[0]):
            raise CaptureError(f"the model must return one tensor, logits [T, V], not {len(results)} values")
        spec = spec_of(results[0])
        if spec.rank != 2 or spec.shape[0] != NUM_ROWS or isinstance(spec.shape[1], Extent):
            raise CaptureError(f"the model must return logits [T, V], not {spec}")
        return results[0]

    def _placeholder(self, node: fx.Node) -> None:
        kind = node.meta["kind"]
        if kind == "weight" and not node.users:
            return
        self._add(node, kind, node.meta["name"])

    def _add(self, node: fx.Node, kind: Any, name: str, **fields: Any) -> str:
        """A new value for the node."""
        self.names[node] = name
        return self._add_value(spec_of(node), kind, name, **fields)

    def _add_value(self, spec: Spec, kind: Any, name: str, **fields: Any) -> str:
        shape = tuple(_text(dim) for dim in spec.shape)
        self.values[name] = Value(name=name, kind=kind, dtype=dtype_name(spec.dtype), shape=shape, **fields)
        if kind != "view":
            self.samples[name] = _sample(spec)
        return name

    def _free_name(self, name: str) -> str:
        while name in self.values:
            name += "_"
        return name

    def _view(self, node: fx.Node) -> None:
        base = self.names[args_of(node)[0]]
        spec = spec_of(node)
        args: tuple[Any, ...]
        if node.target in (VIEW, EXPAND):
            args = (tuple(_text(dim) for dim in spec.shape),)
        elif node.target is PERMUTE:
            args = (tuple(args_of(node)[1]),)
        else:
            args = tuple(args_of(node)[1:5])
        try:
            sample = view_of(self.samples[base], VIEW_NAMES[target_of(node)], args, SAMPLE)
        except RuntimeError:  # torch: the view's elements do not lie in that order
            base = self._copy(args_of(node)[0], base)
            sample = view_of(self.samples[base], VIEW_NAMES[target_of(node)], args, SAMPLE)
        name = self._free_name(node.name)
        self._add(node, "view", name, base=base, op=VIEW_NAMES[target_of(node)], args=args)
        self.samples[name] = sample

    def _copy(self, node: fx.Node, name: str) -> str:
        """A contiguous copy of a value, as a step."""
        copy = self._add_value(spec_of(node), "temp", self._free_name(f"{name}_contiguous"))
        self._emit(COPY, {"self": Ref(name), "memory_format": None}, (copy,), node)
        return copy

    def _step(self, node: fx.Node) -> None:
        args = {name: self._arg(value) for name, value in arguments(node).items()}
        outputs: tuple[str, ...] = ()
        if has_spec(node):
            outputs = (self._add(node, "temp", self._free_name(node.name)),)
        elif node.meta["spec"] is not None:
            base = self.names[node] = self._free_name(node.name)
            outputs = tuple(self._add_value(s, "temp", f"{base}.{i}") for i, s in enumerate(node.meta["spec"]))
        self._emit(op_name(node.target), args, outputs, node)

    def _emit(self, op: str, args: dict[str, Arg], outputs: tuple[str, ...], node: fx.Node) -> None:
        spec = node.meta["spec"]
        specs = [spec] if has_spec(node) else spec or ()
        is_rows = any(isinstance(d, Extent) and d.rows for spec in specs for d in spec.shape)
        step = Step(
            op=op, args=args, outputs=outputs, phase="rows" if is_rows else "tokens", sources=node.meta["covers"]
        )
        self.steps[step.phase].append(step)

    def _arg(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Ref(self.names[value])
        if isinstance(value, (list, tuple)):
            return [self._arg(v) for v in value]
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        return str(value)


def op_name(target: Any) -> str:
    """`rms_norm` for our ops, `aten.add.Tensor` for torch's, `<plugin>.<op>` for a plugin's."""
    namespace, _, name = target._schema.name.partition("::")
    if is_foreign(namespace):
        return f"{namespace.removeprefix(PREFIX)}.{name}"
    return name if namespace == "tritium" else f"{namespace}.{name}.{target._overloadname}"


def _text(dim: Dim) -> str | int:
    return str(dim) if isinstance(dim, Extent) else dim


def _sample(spec: Spec) -> torch.Tensor:
    """A meta tensor of the sample sizes; sizes that the runtime chooses are 7."""
    shape = [dim.at(SAMPLE) if isinstance(dim, Extent) else 7 if dim < 0 else dim for dim in spec.shape]
    return torch.empty(shape, dtype=spec.dtype, device="meta")
