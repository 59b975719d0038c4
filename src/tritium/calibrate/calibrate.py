"""Calibration: what a quantisation method learns of a model from a text, layer by layer.

The model runs in fp32, each weight read when it is needed (`stream.py`). The results are tensors by name, leaves of the
engine's recipes:

    <norm's weight>:smoothing   fp32 [K]   smoothquant, awq: by what the norm's channels are divided (passes/smooth.py)
    <weight>:importance         fp32 [K]   awq: mean square of each input, for the choice of scales
    <weight>:numbers, :scales              gptq: the weight itself
    <weight>:input_scale        fp32 [1]   static: what its linear reads is divided by it (passes/quantize_rows.py)

With gptq the layers behind a weight see it as it is kept; the other methods look at the model as it is.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from tritium.calibrate.gptq import gptq
from tritium.calibrate.smoothing import smoothing_vector
from tritium.calibrate.stream import ReadWeight, Stream, Values
from tritium.calibrate.work_dir import WorkDir
from tritium.errors import CheckpointError
from tritium.graph.capture import capture
from tritium.graph.derived import is_weight
from tritium.graph.edit import arguments
from tritium.ops.fp8 import LARGEST, SMALLEST_ROW
from tritium.ops.quantized import dequantize_weight
from tritium.passes.merging import LINEAR
from tritium.passes.pipeline import NORMALISE
from tritium.passes.quantize import IMPORTANCE, INPUT_SCALE, NUMBERS, SCALES, format_of, is_left_out, logits_linear
from tritium.passes.smooth import Group, smoothing_groups
from tritium.quant.schemes import FP8, QuantScheme, WeightFormat
from tritium.weights.recipes import Checkpoint

Method = Literal["smoothquant", "awq", "gptq", "static"]
SMOOTHED: tuple[Method, ...] = ("smoothquant", "awq")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What to learn: the method, the scheme it is for, patterns of tensors that stay as they are, and token ids."""

    method: Method
    scheme: QuantScheme
    left_out: Sequence[str]
    windows: Sequence[Sequence[int]]


def calibrate(
    module: nn.Module,
    read: ReadWeight,
    calibration: Calibration,
    work: WorkDir,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The calibration tensors of `module`, whose weights `read` gives by their names in it.

    Layers that `work` has are not computed again. progress(linears done, in all). Raises `CaptureError`.
    """
    captured = capture(module, dtype=torch.float32)
    for row in NORMALISE:
        row.run(captured.graph)
    return _Run(captured.graph, captured.constants, read, calibration, work, progress).results()


def calibration_key(calibration: Calibration, model: object) -> str:
    """A hash of what the results depend on. model: anything whose repr differs when the model or its weights do."""
    known = (calibration.method, calibration.scheme, tuple(calibration.left_out), list(map(list, calibration.windows)))
    return hashlib.sha256(repr((known, model)).encode()).hexdigest()


class _Run:
    def __init__(
        self,
        graph: fx.Graph,
        constants: Mapping[str, Tensor],
        read: ReadWeight,
        calibration: Calibration,
        work: WorkDir,
        progress: Progress | None,
    ) -> None:
        self._graph, self._wanted, self._work, self._progress = graph, calibration, work, progress
        self._stream = Stream(graph, constants, read)
        head, scheme = logits_linear(graph), calibration.scheme
        linears = [node for node in graph.nodes if node.target is LINEAR and is_weight(arguments(node)["weight_NK"])]
        kept = [node for node in linears if not is_left_out(Checkpoint(_name(node)), calibration.left_out)]
        kept = [node for node in kept if node is not head or scheme.head is not None]
        self._formats = {node: format_of(node, scheme, is_head=node is head) for node in kept}
        self._groups: dict[fx.Node, Group] = {}
        for group in smoothing_groups(graph) if calibration.method in SMOOTHED else ():
            if all(node in self._formats for node in group.linears):
                self._groups |= dict.fromkeys(group.linears, group)
        self._moments: dict[fx.Node, Tensor] = {}  # of the value that linears read, for those that read it next
        self._new: dict[str, Tensor] = {}
        self._ends = _layer_ends(list(graph.nodes))
        self._num_done = 0

    def results(self) -> dict[str, Tensor]:
        place, values = self._work.resume(self._graph)
        nodes = list(self._graph.nodes)
        self._num_done = sum(node in self._formats for node in nodes[:place])
        self._stream.run(self._wanted.windows, self._visit, start=place, values=values, after=self._after)
        return self._work.results | self._new

    def _visit(self, node: fx.Node, values: Values) -> Mapping[fx.Node, Tensor]:
        kept = self._formats.get(node)
        if kept is None:
            return {}
        a = arguments(node)
        weight, name = values[a["weight_NK"]], _name(node)
        rows = [x.reshape(-1, x.shape[-1]) for x in values[a["x"]]]
        changed = {}
        if self._wanted.method == "static":
            self._new[name + INPUT_SCALE] = _input_scale(name, rows, self._wanted.scheme)
        elif self._wanted.method == "gptq":
            changed = {a["weight_NK"]: self._gptq(name, weight, a["x"], rows, kept)}
        elif (group := self._groups.get(node)) is not None and not self._has(group.name):
            self._new[group.name] = self._smoothing(group, rows)
        if self._wanted.method == "awq" and not self._has(name + IMPORTANCE):
            squares = sum(x.square().sum(0) for x in rows) / sum(map(len, rows))
            group = self._groups.get(node)
            self._new[name + IMPORTANCE] = squares if group is None else squares / self._known(group.name).square()
        self._num_done += 1
        if self._progress is not None:
            self._progress(self._num_done, len(self._formats))
        return changed

    def _smoothing(self, group: Group, rows: list[Tensor]) -> Tensor:
        weights = [(self._stream.weight(_name(linear)), self._formats[linear]) for linear in group.linears]
        method = self._wanted.method
        assert method == "smoothquant" or method == "awq"
        return smoothing_vector(torch.cat(rows), weights, method, int8_activations=self._wanted.scheme.int8_activations)

    def _gptq(self, name: str, weight: Tensor, x: fx.Node, rows: list[Tensor], kept: WeightFormat) -> Tensor:
        if not self._has(name + NUMBERS):
            if x not in self._moments:
                self._moments = {x: torch.stack([part.t() @ part for part in rows]).sum(0)}
            self._new[name + NUMBERS], self._new[name + SCALES] = gptq(weight, self._moments[x], kept)
        return dequantize_weight(self._known(name + NUMBERS), self._known(name + SCALES))

    def _after(self, index: int, values: Values) -> None:
        if index in self._ends:
            self._work.add(self._new, index, values)
            self._new = {}

    def _has(self, name: str) -> bool:
        return name in self._new or name in self._work.results

    def _known(self, name: str) -> Tensor:
        return self._new[name] if name in self._new else self._work.results[name]


def _input_scale(name: str, rows: Sequence[Tensor], scheme: QuantScheme) -> Tensor:
    """By which the largest element of the text's becomes the format's largest number."""
    largest = float(torch.stack([x.abs().amax() for x in rows]).amax())  # Python's max would pass over a NaN
    if not math.isfinite(largest):
        raise CheckpointError(
            f"{name}: the calibration text gives it inputs as large as {largest}, of which no scale can be made. Check "
            "that the checkpoint computes finite numbers, or take another method"
        )
    return torch.tensor([max(largest, SMALLEST_ROW) / (LARGEST if scheme.weight == FP8 else 127.0)])


def _name(linear: fx.Node) -> str:
    return arguments(linear)["weight_NK"].meta["name"]


def _layer_ends(nodes: list[fx.Node]) -> set[int]:
    """The places before which a layer's weights are read and behind which another's are."""
    ends, last = set(), None
    for index, node in enumerate(nodes):
        if node.op != "call_function":
            continue
        for source in filter(is_weight, node.all_input_nodes):
            parts = source.meta["name"].split(".")
            layer = next((part for part in parts if part.isdigit()), None)
            if last is not None and layer != last:
                ends.add(index - 1)
            last = layer
    return ends
