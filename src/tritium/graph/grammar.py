"""What a graph may consist of, checked at entry and exit of the pipeline, after every pass under test.

A violation prints the node, its inputs and the model's line. At entry any torch op is allowed; at exit only ops that
a kernel exists for, with arguments of the ranks and types they need.
"""

import operator
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import fx

from tritium import ops
from tritium.engine.plan import Extent
from tritium.errors import CaptureError
from tritium.graph.edit import Target, arguments, output_node
from tritium.graph.spec import Spec, args_of, has_spec, spec_of, target_of
from tritium.graph.vocabulary import EXACT, FINAL, VIEWS

KINDS = ("input", "weight", "kv")
LITERALS = (bool, int, float, str, type(None), torch.dtype, torch.memory_format, torch.layout, torch.device)


def verify_captured(graph: fx.Graph) -> None:
    """Check a decoder's graph as capture makes it. Raises `CaptureError` with the node."""
    verify_form(graph)
    if len(output_node(graph).all_input_nodes) != 1:
        raise CaptureError("the model must return exactly one tensor, the logits")


def verify_form(graph: fx.Graph) -> None:
    """Check what every graph must be, whatever the model. Raises `CaptureError` with the node."""
    names: set[str] = set()
    for node in graph.nodes:
        if "spec" not in node.meta or "covers" not in node.meta:
            refuse(node, "has no spec or no provenance: insert nodes with tritium.graph.edit.insert")
        if has_spec(node) and any(isinstance(dim, Extent) and dim.tokens < 0 for dim in spec_of(node).shape):
            refuse(node, "has a size that is not a multiple of the number of tokens, plus a number")
        if node.op == "placeholder":
            if node.meta.get("kind") not in KINDS or node.meta["name"] in names:
                refuse(node, f"is no input, weight or kv of its own name ({node.meta.get('name')!r})")
            names.add(node.meta["name"])
        elif node.op not in ("call_function", "output"):
            refuse(node, f"is a {node.op}: only calls of ops can be compiled")
    graph.lint()


def verify(graph: fx.Graph, *, foreign: Collection[Target] = ()) -> None:
    """Check a finished graph. Raises `CaptureError` with the node. foreign: the torch ops of plugins."""
    verify_captured(graph)
    verify_calls(graph, foreign=foreign)


def verify_calls(graph: fx.Graph, *, foreign: Collection[Target] = ()) -> None:
    """Check that each call has a kernel and what that kernel needs. Raises `CaptureError` with the node."""
    stored: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            _check_part(node)
            continue
        if not isinstance(node.target, Target):
            refuse(node, "is no torch op")
        is_ours = target_of(node).namespace == ops.library.NAMESPACE
        if not is_ours and node.target not in FINAL | VIEWS | EXACT and node.target not in foreign:
            refuse(
                node, "is an op that no kernel runs. Write it with the ops in tritium.ops, or with element-wise torch"
            )
        is_several = (is_ours or node.target in EXACT) and len(target_of(node)._schema.returns) > 1
        if not has_spec(node) and target_of(node)._schema.returns and not is_several:
            refuse(node, "must have exactly one tensor as result")
        check_arguments(node)
        if is_ours:
            check_ours(node, stored)


def refuse(node: fx.Node, reason: str) -> NoReturn:
    """Raise `CaptureError` for the node."""
    inputs = ", ".join(f"{n.name}: {n.meta.get('spec')}" for n in node.all_input_nodes)
    call = f"{node.name} = {node.target}({inputs})" if node.op == "call_function" else f"{node.name} ({node.op})"
    raise CaptureError(f"{call} {reason}. At {node.meta.get('source') or 'an unknown place'}")


def _check_part(node: fx.Node) -> None:
    """One result of a call that has several."""
    call, index = args_of(node)
    specs = call.meta["spec"] if isinstance(call, fx.Node) and call.op == "call_function" else None
    if type(specs) is not tuple or index not in range(len(specs)) or spec_of(node) != specs[index]:
        refuse(node, "is none of the results of the call that it reads")


def check_arguments(node: fx.Node) -> None:
    """Each argument is a tensor or a literal that a plan can hold."""
    for name, value in arguments(node).items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, fx.Node):
                if not has_spec(item):
                    refuse(node, f"reads {item.name}, which is no tensor, as {name}")
            elif not isinstance(item, LITERALS):
                refuse(node, f"has {name}={item!r}, which cannot be written into a plan")


def check_ours(node: fx.Node, stored: set[fx.Node]) -> None:
    """Ranks and sizes that the kernels of our ops rely on. stored: layers of the KV cache that hold something."""
    a = arguments(node)
    name = target_of(node)._schema.name.partition("::")[2]
    if name == "attention":
        refuse(node, "is still stateless: insert_kv must replace it")
    if name in ("kv_store", "rope_kv_store"):
        stored.add(a["cache_layer"])
    if name == "paged_attention" and a["cache_layer"] not in stored:
        refuse(node, f"reads {a['cache_layer'].name} before anything is stored in it")
    for parameter, rank in RANKS.get(name, {}).items():
        if a[parameter] is not None and spec_of(a[parameter]).rank != rank:
            refuse(node, f"needs {parameter} of rank {rank}")
    if name in LINEARS and _last(a["x"]) != _last(a["weight_NK"]):
        refuse(node, "needs x and weight_NK of equal last size")
    if name == "linear_pair" and _last(a["x"]) + _last(a["y"]) != _last(a["weight_NK"]):
        refuse(node, "needs as many inputs in x and y together as in weight_NK")
    if name in NORMS and _last(a["x"]) != _last(a["weight"]):
        refuse(node, "needs x and weight of equal last size")
    if name in NORMS + LINEARS and isinstance(_last(a["x"]), Extent):
        refuse(node, "works along the batch")
    if name == "moe":
        _check_moe(node, a)
    if name in ("rope", "rope_kv_store") and spec_of(a["cos_sin"]).dtype != torch.float32:
        refuse(node, "needs cos_sin in float32")
    _check_result(node, a, name)


def _check_moe(node: fx.Node, a: dict[str, Any]) -> None:
    experts, hidden = spec_of(a["router_TE"]).shape[1], spec_of(a["down_EDF"]).shape[2]
    if isinstance(hidden, Extent) or spec_of(a["gate_up_EGD"]).shape != (experts, 2 * hidden, _last(a["x_TD"])):
        refuse(node, "needs gate_up_EGD [E, 2 F, D] for down_EDF [E, D, F], x_TD and router_TE")
    if spec_of(a["down_EDF"]).shape[:2] != (experts, _last(a["x_TD"])):
        refuse(node, "needs down_EDF [E, D, F] for x_TD and router_TE")
    if isinstance(experts, Extent) or not 1 <= a["top_k"] <= experts:
        refuse(node, f"cannot choose {a['top_k']} of {experts} experts")


def _check_result(node: fx.Node, a: dict[str, Any], name: str) -> None:
    like = {"rms_norm": "x", "layer_norm": "x", "rope": "x_TNH", "activation": "x", "gated_activation": "gate",
            "moe": "x_TD", "paged_attention": "q_TNH", "varlen_attention": "q_TNH", "rope_kv_store": "q_TNH",
            "add_rms_norm": "x", "add_layer_norm": "x", "linear_add": "residual"}.get(name)  # fmt: skip
    for spec in [node.meta["spec"]] if has_spec(node) else node.meta["spec"] or ():
        if like is not None and spec_of(a[like]) != spec:
            refuse(node, f"must have a result like {like}, not {spec}")
    if name in ("add_rms_norm", "add_layer_norm") and spec_of(a["x"]) != spec_of(a["residual"]):
        refuse(node, "needs x and residual of one shape and type")


def _last(node: fx.Node) -> Any:
    spec: Spec = spec_of(node)
    return spec.shape[-1]


NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
LINEARS = ("linear", "linear_activation", "linear_gated", "linear_add")
RANKS: dict[str, dict[str, int]] = {
    "embedding": {"ids_T": 1, "weight_VD": 2},
    "quantized_embedding": {"ids_T": 1, "qweight_VD": 2, "scales_V1": 2},
    "linear": {"weight_NK": 2, "bias": 1},
    "linear_activation": {"weight_NK": 2, "bias": 1},
    "linear_gated": {"weight_NK": 2, "bias": 1},
    "linear_add": {"weight_NK": 2, "bias": 1},
    "linear_pair": {"weight_NK": 2, "bias": 1},
    "rms_norm": {"weight": 1},
    "layer_norm": {"weight": 1, "bias": 1},
    "add_rms_norm": {"weight": 1},
    "add_layer_norm": {"weight": 1, "bias": 1},
    "moe": {"x_TD": 2, "router_TE": 2, "gate_up_EGD": 3, "down_EDF": 3},
    "rope_cos_sin": {"positions_T": 1, "inv_freq_P": 1},
    "rope": {"x_TNH": 3, "cos_sin": 2},
    "kv_store": {"k_TKH": 3, "v_TKH": 3, "slot_mapping_T": 1},
    "rope_kv_store": {"q_TNH": 3, "k_TKH": 3, "v_TKH": 3, "cos_sin": 2, "slot_mapping_T": 1},
    "paged_attention": {"q_TNH": 3, "block_table_SB": 2},
    "varlen_attention": {"q_TNH": 3, "k_TKH": 3, "v_TKH": 3},
    "gather_rows": {"rows_R": 1},
}
