"""Every op's reference as a kernel: valid for every shape and dtype, allocating, slow. What runs without a compiler."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tritium import ops
from tritium.kernels.eager.index_checks import index_check
from tritium.kernels.eager.rows import row_blocks
from tritium.kernels.kernel import Bind, Thunk
from tritium.ops.fused_rows import ROW_BASES, ROW_FORMATS


def _copying(name: str) -> Bind:
    """bind for an op whose reference treats each row alike, however many there are."""
    reference = ops.op_named(name).reference

    def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
        kept, copy = dict(args), outputs[0].copy_
        return lambda: copy(reference(**kept))

    return bind


def _by_rows(name: str, *row_args: str) -> Bind:
    """bind for an op with element-wise functions whose bits depend on the loop's length; see rows.py."""
    reference = ops.op_named(name).reference

    def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
        literals = {key: value for key, value in args.items() if key not in row_args}
        blocks = row_blocks(*(args[key] for key in row_args), outputs[0])

        def thunk() -> None:
            for *inputs, out in blocks:
                out.copy_(reference(*inputs, **literals))

        return thunk

    return bind


def _several(name: str) -> Bind:
    """bind for an op with several results whose reference treats each row alike."""
    reference = ops.op_named(name).reference

    def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
        kept = dict(args)

        def thunk() -> None:
            for out, result in zip(outputs, reference(**kept), strict=True):
                out.copy_(result)

        return thunk

    return bind


def kv_store(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.kv_store: writes into the cache, has no output."""
    kept: dict[str, Any] = dict(args)
    reference: Callable[..., None] = ops.op_named("kv_store").reference
    return lambda: reference(**kept)


def embedding(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.embedding into outputs[0]; on a GPU ids are checked first, see index_checks.py."""
    look_up = _copying("embedding")(args, outputs)
    if outputs[0].device.type == "cpu":
        return look_up
    check = index_check("aten.embedding.default", {"weight": args["weight_VD"], "indices": args["ids_T"]})
    assert check is not None
    return lambda: (check(), look_up())


quantized_embedding = _copying("quantized_embedding")
embedding_part = _copying("embedding_part")
rms_norm = _copying("rms_norm")
layer_norm = _copying("layer_norm")
rope_cos_sin = _copying("rope_cos_sin")
rope = _copying("rope")
attention = _copying("attention")
gather_rows = _copying("gather_rows")
add_rms_norm = _several("add_rms_norm")
add_layer_norm = _several("add_layer_norm")
rope_kv_store = _copying("rope_kv_store")
quantized_rms_norm = _copying("quantized_rms_norm")
quantized_layer_norm = _copying("quantized_layer_norm")
quantized_add_rms_norm = _several("quantized_add_rms_norm")
quantized_add_layer_norm = _several("quantized_add_layer_norm")
paged_attention = _copying("paged_attention")
varlen_attention = _copying("varlen_attention")
activation = _by_rows("activation", "x")
gated_activation = _by_rows("gated_activation", "gate", "up")


def __getattr__(name: str) -> Bind:
    """The ops of quantised rows, `<base>_<format>` (PEP 562)."""
    base, _, kept = name.rpartition("_")
    if kept in ROW_FORMATS and base in ROW_BASES:
        return _several(name)
    if kept in ROW_FORMATS and base == "linear":
        return _copying(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
