"""All ops, and their registration with torch: after torch.export each is one node, `torch.ops.tritium.<name>.default`.

Sizes in parameter names: T tokens, S sequences, R sampled rows, B blocks in a table row, N query heads, K kv heads,
H head size, D model, V vocabulary, P rotated pairs, E experts, F an expert's intermediate size, G = 2 F; `linear`'s
weight is [N out, K in].
"""

import torch

from tritium.ops.activations import ACTIVATION, GATED_ACTIVATION
from tritium.ops.attention import ATTENTION, KV_STORE, PAGED_ATTENTION
from tritium.ops.collectives import ALL_GATHER, ALL_REDUCE, EMBEDDING_PART
from tritium.ops.experts import EXPERTS
from tritium.ops.fp8 import FP8_OPS
from tritium.ops.fused import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    LINEAR_ACTIVATION,
    LINEAR_ADD,
    LINEAR_GATED,
    LINEAR_PAIR,
    ROPE_KV_STORE,
)
from tritium.ops.int8 import INT8_OPS
from tritium.ops.linears import EMBEDDING, GATHER_ROWS, LINEAR
from tritium.ops.moe import MOE
from tritium.ops.norms import LAYER_NORM, RMS_NORM
from tritium.ops.op import Op
from tritium.ops.quantized import QUANTIZED_EMBEDDING, QUANTIZED_OPS
from tritium.ops.quantized_norms import QUANTIZED_NORMS
from tritium.ops.rope import ROPE, ROPE_COS_SIN
from tritium.ops.varlen import VARLEN_ATTENTION

NAMESPACE = "tritium"

OPS: tuple[Op, ...] = (
    EMBEDDING,
    LINEAR,
    *QUANTIZED_OPS,
    QUANTIZED_EMBEDDING,
    RMS_NORM,
    LAYER_NORM,
    ROPE_COS_SIN,
    ROPE,
    ACTIVATION,
    GATED_ACTIVATION,
    MOE,
    ATTENTION,
    GATHER_ROWS,
    KV_STORE,
    PAGED_ATTENTION,
    VARLEN_ATTENTION,
    ADD_RMS_NORM,
    ADD_LAYER_NORM,
    ROPE_KV_STORE,
    LINEAR_ACTIVATION,
    LINEAR_GATED,
    LINEAR_ADD,
    LINEAR_PAIR,
    *QUANTIZED_NORMS,
    EXPERTS,
    ALL_REDUCE,
    ALL_GATHER,
    EMBEDDING_PART,
    *FP8_OPS,
    *INT8_OPS,
)


def _register(ops: tuple[Op, ...]) -> torch.library.Library:
    """Define each op in torch; the registration lives as long as the returned object."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for op in ops:
        library.define(op.schema)
        library.impl(op.name, op.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=library)
    return library


LIBRARY = _register(OPS)


def op_named(name: str) -> Op:
    """The op of that name. Raises `KeyError` with the known names."""
    for op in OPS:
        if op.name == name:
            return op
    raise KeyError(f"no op is named {name!r}; known: {', '.join(op.name for op in OPS)}")


def target(name: str) -> torch._ops.OpOverload:
    """The callable that stands in captured graphs: `torch.ops.tritium.<name>.default`."""
    return getattr(torch.ops.tritium, op_named(name).name).default
