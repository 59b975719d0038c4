"""Keep the weights of linears in 8 or 4 bits.

Matches: `tritium.linear(x, w, bias)` whose w is a weight of the graph, unless `left_out` names a tensor it is made of.
Replaces with: `tritium.quantized_linear(x, qweight, scales, bias)` by the scheme: the recipes `quantized(w)` and
    `scales(w)`, for a concatenation those of its parts. The linear that makes the logits takes the scheme's format for
    the head, and so does one whose inputs are no multiple of the group. Runs after merging. Bits change; by how much,
    the scheme decides.

`keep_stored` matches those linears alone whose weight the checkpoint keeps quantised in a format that kernels take, and
replaces them in the same way by that format, with activations as they are: what the recipes then give is what the
checkpoint has.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx

from tritium.errors import CaptureError
from tritium.graph.derived import insert_weight, is_weight, recipe_of
from tritium.graph.edit import arguments, insert, output_node, replace
from tritium.graph.spec import spec_of
from tritium.passes.merging import LINEAR
from tritium.passes.result import PassResult
from tritium.quant.schemes import FP8, QuantScheme, WeightFormat
from tritium.quant.weights import DTYPES, SCALE_DTYPES
from tritium.weights.recipes import Checkpoint, Concat, Constant, Quantized, Recipe, Scaled, Scales, leaves

# Of calibration tensors, behind a weight's name; the last is of all that the weight's linear reads (quantize_rows.py).
NUMBERS, SCALES, IMPORTANCE, INPUT_SCALE = ":numbers", ":scales", ":importance", ":input_scale"
QUANTIZED = torch.ops.tritium.quantized_linear.default


def quantize(
    graph: fx.Graph, *, scheme: QuantScheme, left_out: Sequence[str] = (), calibrated: Collection[str] = ()
) -> PassResult:
    """See the module's docstring. left_out: names of checkpoint or module tensors, `*` and `?` as in file names.
    calibrated: names of calibration tensors: a weight's numbers and scales, or the importance of its inputs.

    Raises `CaptureError` when that leaves no linear.
    """
    head, count = logits_linear(graph), 0
    for node in list(graph.nodes):
        if node.target is not LINEAR or not is_weight(arguments(node)["weight_NK"]):
            continue
        weight = arguments(node)["weight_NK"]
        if is_left_out(recipe_of(weight), left_out):
            continue
        chosen = format_of(node, scheme, is_head=node is head)
        _replace(node, chosen, has_int8_activations=scheme.int8_activations, calibrated=calibrated)
        count += 1
    if not count:
        raise CaptureError(
            f"scheme={scheme.name!r}: there is no linear to quantise beside those that unquantized={tuple(left_out)!r} "
            "leaves out; build with scheme=None"
        )
    return PassResult(count)


def keep_stored(graph: fx.Graph, *, stored: Mapping[str, WeightFormat]) -> PassResult:
    """See the module's docstring. stored: formats by the names of the module's tensors."""
    count = 0
    for node in list(graph.nodes):
        if node.target is not LINEAR or not is_weight(arguments(node)["weight_NK"]):
            continue
        found = _stored_format(recipe_of(arguments(node)["weight_NK"]), stored)
        if found is not None and found != FP8:
            _replace(node, found, has_int8_activations=False)
            count += 1
    return PassResult(count)


def _stored_format(recipe: Recipe, stored: Mapping[str, WeightFormat]) -> WeightFormat | None:
    """That of all parts, each of which is a whole weight of the module; None when they differ or one is plain."""
    match recipe:
        case Checkpoint(name=name):
            return stored.get(name)
        case Concat(parts=parts, dim=0):
            formats = {_stored_format(part, stored) for part in parts}
            return formats.pop() if len(formats) == 1 else None
        case _:
            return None


def _replace(
    node: fx.Node, weight_format: WeightFormat, *, has_int8_activations: bool, calibrated: Collection[str] = ()
) -> None:
    a, graph = arguments(node), node.graph
    weight, spec = a["weight_NK"], spec_of(a["weight_NK"])
    kind, bits, group = weight_format.kind, weight_format.bits, weight_format.group_size
    num_out, num_in = (int(size) for size in spec.shape)  # type: ignore[arg-type]  # a weight's sizes are numbers
    recipe, name = recipe_of(weight), weight.meta["name"]
    qspec = type(spec)(DTYPES[kind], (num_out, num_in * bits // 8))
    sspec = type(spec)(SCALE_DTYPES[kind], (num_out, num_in // (group or num_in)))
    numbers = each_part(recipe, lambda part: numbers_of(part, weight_format, calibrated))
    by_group = each_part(recipe, lambda part: scales_of_part(part, weight_format, calibrated))
    qweight = insert_weight(graph, f"{name}.{kind}", numbers, qspec)
    scales = insert_weight(graph, f"{name}.scales", by_group, sspec)
    with graph.inserting_before(node):
        args = (a["x"], qweight, scales, a["bias"], has_int8_activations)
        replace(node, insert(graph, QUANTIZED, args, spec_of(node), like=node, covers=[node]))


def numbers_of(part: Recipe, weight_format: WeightFormat, calibrated: Collection[str]) -> Recipe:
    """A weight's numbers: what calibration has found, else by rounding."""
    if (name := base_name(part) + NUMBERS) in calibrated:
        return Constant(name)
    return Quantized(part, weight_format, _importance(part, calibrated))


def scales_of_part(part: Recipe, weight_format: WeightFormat, calibrated: Collection[str]) -> Recipe:
    """A weight's scales, likewise."""
    if (name := base_name(part) + SCALES) in calibrated:
        return Constant(name)
    return Scales(part, weight_format, _importance(part, calibrated))


def _importance(part: Recipe, calibrated: Collection[str]) -> Constant | None:
    name = base_name(part) + IMPORTANCE
    return Constant(name) if name in calibrated else None


def base_name(part: Recipe) -> str:
    """The module's tensor that a part is made of, whole and with its inputs in order; else no name."""
    match part:
        case Checkpoint(name=name):
            return name
        case Scaled(of=of):
            return base_name(of)
        case _:
            return ""


def each_part(recipe: Recipe, change: Callable[[Recipe], Recipe]) -> Recipe:
    """`change` of the tree, or of the parts that it puts one after the other as outputs."""
    if isinstance(recipe, Concat) and recipe.dim == 0:
        return Concat(tuple(each_part(part, change) for part in recipe.parts), 0)
    return change(recipe)


def is_left_out(recipe: Recipe, patterns: Sequence[str]) -> bool:
    names = [leaf.name for leaf in leaves(recipe) if isinstance(leaf, Checkpoint)]
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def format_of(linear: fx.Node, scheme: QuantScheme, *, is_head: bool) -> WeightFormat:
    """How a scheme keeps a linear's weight."""
    num_in = int(spec_of(arguments(linear)["weight_NK"]).shape[1])  # type: ignore[arg-type]
    if num_in % (scheme.weight.group_size or 1) == 0 and not is_head:
        return scheme.weight
    assert scheme.head is not None
    return scheme.head


def logits_linear(graph: fx.Graph) -> fx.Node | None:
    """The linear that the logits come from: the first one met on the way back from the output."""
    node = output_node(graph)
    while node.all_input_nodes and node.target is not LINEAR:
        node = node.all_input_nodes[0]
    return node if node.target is LINEAR else None
