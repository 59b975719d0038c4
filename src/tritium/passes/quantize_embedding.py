"""Keep the table that tokens are looked up in in 8 bits.

Matches: `tritium.embedding(input_ids, w)` whose w is a weight of the graph, unless `left_out` names a tensor it is made
    of. Tables of positions and of token types are not: their ids are other inputs.
Replaces with: `tritium.quantized_embedding(input_ids, qweight, scales, dtype)`, by the recipes `quantized(w)` and
    `scales(w)` in int8 with a scale for each token. A head that is tied to the table and kept so has the same recipes:
    its two weights are then taken, so that the engine holds them once. Runs after quantize. Bits change.
"""

from collections.abc import Sequence

import torch
from torch import fx

from tritium.errors import CaptureError
from tritium.graph.derived import insert_weight, is_weight, recipe_of
from tritium.graph.edit import insert, replace
from tritium.graph.spec import Spec, args_of, spec_of
from tritium.passes.quantize import is_left_out, numbers_of, scales_of_part
from tritium.passes.result import PassResult
from tritium.passes.views import is_view
from tritium.quant.schemes import INT8
from tritium.quant.weights import DTYPES, SCALE_DTYPES
from tritium.weights.recipes import Recipe
from tritium.weights.source import dtype_name

EMBEDDING = torch.ops.tritium.embedding.default
QUANTIZED = torch.ops.tritium.quantized_embedding.default
TOKENS = "input_ids"


def quantize_embedding(graph: fx.Graph, *, left_out: Sequence[str] = ()) -> PassResult:
    """See the module's docstring. left_out: names of checkpoint or module tensors, `*` and `?` as in file names.

    Raises `CaptureError` when there is no such table.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target is not EMBEDDING or not _is_of_tokens(node):
            continue
        ids, weight = args_of(node)
        name, recipe = weight.meta["name"], recipe_of(weight)
        if is_left_out(recipe, left_out):
            continue
        num_rows, size = spec_of(weight).shape
        numbers = _weight(graph, f"{name}.int8", numbers_of(recipe, INT8, ()), Spec(DTYPES["int8"], (num_rows, size)))
        scales = _weight(
            graph, f"{name}.scales", scales_of_part(recipe, INT8, ()), Spec(SCALE_DTYPES["int8"], (num_rows, 1))
        )
        with graph.inserting_before(node):
            args = (ids, numbers, scales, dtype_name(spec_of(node).dtype))
            replace(node, insert(graph, QUANTIZED, args, spec_of(node), like=node, covers=[node]))
        count += 1
    if not count:
        raise CaptureError(
            "quantize_embedding=True: the model looks its tokens up in no table of its weights, beside those that "
            f"unquantized={tuple(left_out)!r} leaves out; build without it"
        )
    return PassResult(count)


def _is_of_tokens(lookup: fx.Node) -> bool:
    """True when the ids are the tokens, seen in whatever shape, and the table is a weight."""
    ids, weight = args_of(lookup)
    while is_view(ids):
        ids = args_of(ids)[0]
    return is_weight(weight) and ids.op == "placeholder" and ids.meta["name"] == TOKENS


def _weight(graph: fx.Graph, name: str, recipe: Recipe, spec: Spec) -> fx.Node:
    """The weight of that recipe which the graph has already, or a new one."""
    known = (node for node in graph.nodes if is_weight(node) and node.meta.get("recipe") == recipe)
    return next(known, None) or insert_weight(graph, name, recipe, spec)
