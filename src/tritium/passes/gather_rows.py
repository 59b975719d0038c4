"""Compute what follows the last attention for the sampled rows only.

Matches: every node that the logits need and no attention does. It works token by token (the locality proof), so a token
    that is not sampled needs none of it: the last block's output projection and MLP, the final norm, `lm_head`.
Replaces with: the same nodes over R rows: `gather_rows(x, sampled_rows)` on each value that crosses the line (the
    attention's output and the residual). A view moves across the line when its result still has the tokens in front.
Required: the logits of all tokens of an 8,192-token step with a vocabulary of 128 k would be 4.2 GB.
"""

from collections.abc import Collection

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.errors import CaptureError
from tritium.graph.edit import insert, insert_input, output_node
from tritium.graph.spec import NUM_ROWS, NUM_TOKENS, Dim, Spec, has_spec, spec_of
from tritium.passes.result import PassResult
from tritium.passes.views import is_view


def gather_sampled_rows(graph: fx.Graph, whole: Collection[fx.Node] = ()) -> PassResult:
    """See the module's docstring. `whole`: outputs that are wanted for every token, as if an attention needed them.

    Raises `CaptureError` when a crossing value has not the tokens as first dimension.
    """
    late = _after_last_attention(graph, whole)
    crossing = [
        node
        for node in graph.nodes
        if node not in late and has_spec(node) and spec_of(node).batch_dims and any(user in late for user in node.users)
    ]
    if not crossing or any(node.target is torch.ops.tritium.gather_rows.default for node in graph.nodes):
        return PassResult(0)
    rows = insert_input(graph, "input", "sampled_rows", Spec(torch.int64, (NUM_ROWS,)))
    for node in crossing:
        spec = spec_of(node)
        if spec.shape[0] != NUM_TOKENS or len(spec.batch_dims) != 1:
            raise CaptureError(f"{node.name} ({spec}; {node.meta['source']}) must have the tokens as first dimension")
        users = [user for user in node.users if user in late]
        place = node if node.op != "placeholder" else rows
        with graph.inserting_after(place):
            gather = torch.ops.tritium.gather_rows.default
            like = node if node.op != "placeholder" else users[0]  # an input has no line
            new = insert(graph, gather, (node, rows), spec.with_shape((NUM_ROWS, *spec.shape[1:])), like=like)
        for user in users:
            user.replace_input_with(node, new)
    for node in late:
        specs = [spec_of(node)] if has_spec(node) else node.meta["spec"] or ()
        over_rows = tuple(spec.with_shape(tuple(_rows(dim) for dim in spec.shape)) for spec in specs)
        node.meta["spec"] = over_rows[0] if has_spec(node) else over_rows or None
    return PassResult(len(crossing))


def _after_last_attention(graph: fx.Graph, whole: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes that the output needs, that no attention needs, less the views that may as well be taken before."""
    attention = torch.ops.tritium.attention.default
    early: set[fx.Node] = set()
    needed: set[fx.Node] = set(output_node(graph).all_input_nodes)
    for node in reversed(graph.nodes):
        if node.target is attention or node in early or node in whole:
            early.update([node, *node.all_input_nodes])
        if node in needed:
            needed.update(node.all_input_nodes)
    late = {n for n in graph.nodes if n in needed and n not in early and n.op == "call_function"}
    for node in graph.nodes:
        if node in late and is_view(node) and node.args[0] not in late and spec_of(node).shape[0] == NUM_TOKENS:
            late.discard(node)
    return late


def _rows(dim: Dim) -> Dim:
    """The size with R in place of T."""
    return Extent(rows=dim.tokens, constant=dim.constant) if isinstance(dim, Extent) else dim
