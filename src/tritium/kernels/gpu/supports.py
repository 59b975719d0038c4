"""What the GPU kernels ask of their arguments. Needs no triton: engines for a GPU can be built where there is none."""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from tritium.ops.quantized import SCALE_BYTES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
LARGEST_ROW = 65536  # elements that one program keeps in registers


def embedding(args: Mapping[str, Any]) -> str | None:
    """Whole ids, a floating table."""
    if args["ids_T"].dtype not in (torch.int32, torch.int64):
        return f"ids_T is {args['ids_T'].dtype}, not an integer"
    return _floats(weight_VD=args["weight_VD"])


def gather_rows(args: Mapping[str, Any]) -> str | None:
    """A list of int64 row numbers, floating rows."""
    return _rows("rows_R", args["rows_R"]) or _floats(x_TD=args["x_TD"])


def all_reduce(args: Mapping[str, Any]) -> str | None:
    """Floating numbers."""
    return _floats(x=args["x"])


def norm(args: Mapping[str, Any]) -> str | None:
    """Rows that fit in one program, of two or three dimensions."""
    x = args["x"]
    if len(x.shape) not in (2, 3) or not x.shape[-1] or x.shape[-1] > LARGEST_ROW:
        return f"x has sizes {list(x.shape)}; rows of up to {LARGEST_ROW} elements in 2 or 3 dimensions are known"
    return _floats(**{name: args.get(name) for name in ("x", "weight", "bias")})


def add_norm(args: Mapping[str, Any]) -> str | None:
    """Two matrices of one shape."""
    x, residual = args["x"], args["residual"]
    if len(x.shape) != 2 or tuple(x.shape) != tuple(residual.shape) or x.dtype != residual.dtype:
        return (
            f"x is {x.dtype} {list(x.shape)}, residual {residual.dtype} {list(residual.shape)}; equal matrices needed"
        )
    return norm(args)


def rope_kv_store(args: Mapping[str, Any]) -> str | None:
    """What rope and kv_store ask."""
    q, k = args["q_TNH"], args["k_TKH"]
    if q.dtype != k.dtype:
        return f"q is {q.dtype}, k {k.dtype}"
    return rope({"x_TNH": q, "cos_sin": args["cos_sin"]}) or kv_store(args)


def rope_cos_sin(args: Mapping[str, Any]) -> str | None:
    """Whole positions, frequencies in fp32."""
    if args["positions_T"].dtype not in (torch.int32, torch.int64):
        return f"positions_T is {args['positions_T'].dtype}, not an integer"
    return None if args["inv_freq_P"].dtype == torch.float32 else f"inv_freq_P is {args['inv_freq_P'].dtype}"


def rope(args: Mapping[str, Any]) -> str | None:
    """Floating heads, angles in fp32."""
    if args["cos_sin"].dtype != torch.float32:
        return f"cos_sin is {args['cos_sin'].dtype}, not float32"
    return _floats(x_TNH=args["x_TNH"])


def activation(args: Mapping[str, Any]) -> str | None:
    """Two dimensions."""
    if len(args["x"].shape) != 2:
        return f"x has {len(args['x'].shape)} dimensions, not 2"
    return _floats(x=args["x"])


def gated_activation(args: Mapping[str, Any]) -> str | None:
    """Two dimensions each."""
    if len(args["gate"].shape) != 2:
        return f"gate has {len(args['gate'].shape)} dimensions, not 2"
    return _floats(gate=args["gate"], up=args["up"])


def linear(args: Mapping[str, Any]) -> str | None:
    """A matrix by a matrix, one dtype."""
    x, weight, bias = args["x"], args["weight_NK"], args.get("bias")
    if len(x.shape) != 2:
        return f"x has {len(x.shape)} dimensions, not 2"
    if len({t.dtype for t in (x, weight, bias) if t is not None}) > 1:
        return f"the dtypes differ: x {x.dtype}, weight {weight.dtype}, bias {getattr(bias, 'dtype', None)}"
    return _floats(x=x)


def kv_store(args: Mapping[str, Any]) -> str | None:
    """Keys and values of one floating dtype; the cache in it, or in fp8."""
    k, v, cache = args["k_TKH"], args["v_TKH"], args["cache_layer"]
    if cache.dtype not in (k.dtype, FP8) or k.dtype != v.dtype:
        return f"the dtypes do not fit: k {k.dtype}, v {v.dtype}, cache {cache.dtype}"
    return _rows("slot_mapping_T", args["slot_mapping_T"]) or _floats(k_TKH=k)


def kv_store_int8(args: Mapping[str, Any]) -> str | None:
    """Keys and values of one floating dtype, heads in multiples of 4, for the scales' sake; the cache in int8."""
    k, v, cache = args["k_TKH"], args["v_TKH"], args["cache_layer"]
    if cache.dtype != torch.int8 or k.dtype != v.dtype or (k.shape[2] or 1) % 4:
        return f"k is {k.dtype} with heads of {k.shape[2]}, v {v.dtype}, the cache {cache.dtype}"
    return _rows("slot_mapping_T", args["slot_mapping_T"]) or _floats(k_TKH=k)


def rope_kv_store_int8(args: Mapping[str, Any]) -> str | None:
    """What rope and kv_store ask, of a cache in int8."""
    q, k = args["q_TNH"], args["k_TKH"]
    if q.dtype != k.dtype:
        return f"q is {q.dtype}, k {k.dtype}"
    return rope({"x_TNH": q, "cos_sin": args["cos_sin"]}) or kv_store_int8(args)


def paged_attention(args: Mapping[str, Any]) -> str | None:
    """Head sizes up to 256; the cache in q's dtype, in fp8, or in int8 with heads in multiples of 4."""
    q, cache = args["q_TNH"], args["cache_layer"]
    (num_heads, head_size), (num_kv_heads, cache_head_size) = q.shape[1:], cache.shape[2::2]
    if cache.dtype == torch.int8:
        if head_size % 4:
            return f"heads of {head_size}, no multiple of 4, in a cache of int8"
        cache_head_size -= SCALE_BYTES
    if head_size != cache_head_size or not 0 < head_size <= 256:
        return f"q has heads of {head_size}, the cache of {cache_head_size}; equal ones of up to 256 are known"
    if num_heads % num_kv_heads or num_heads // num_kv_heads > 128:
        return f"{num_heads} query heads cannot share {num_kv_heads} kv heads"
    if cache.dtype not in (q.dtype, FP8, torch.int8):
        return f"q is {q.dtype}, the cache {cache.dtype}"
    return _floats(q_TNH=q)


def varlen_attention(args: Mapping[str, Any]) -> str | None:
    """16 bits, heads in multiples of 8, no window, cap or slopes; the cache as `paged_attention` has it."""
    q = args["q_TNH"]
    if args["window"] or args["softcap"] or args.get("alibi_slopes_N") is not None:
        return "it knows no window, cap or slopes"
    if q.dtype == torch.float32 or q.shape[2] % 8:
        return f"q is {q.dtype} with heads of {q.shape[2]}"
    return paged_attention(args)


def packed_attention(args: Mapping[str, Any]) -> str | None:
    """q, k and v of one floating dtype, heads of up to 256."""
    q, k, v = args["q_TNH"], args["k_TKH"], args["v_TKH"]
    (num_heads, head_size), (num_kv_heads, kv_head_size) = q.shape[1:], k.shape[1:]
    if k.shape[1:] != v.shape[1:] or head_size != kv_head_size or not 0 < head_size <= 256:
        return f"heads of q, k and v are {head_size}, {kv_head_size} and {v.shape[2]} long; equal ones of up to 256 fit"
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads cannot share {num_kv_heads} kv heads"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"the dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}"
    return _floats(q_TNH=q)


def packed_flash(args: Mapping[str, Any]) -> str | None:
    """The same in 16 bits, heads in multiples of 8, no cap."""
    q = args["q_TNH"]
    if args["softcap"] or q.dtype == torch.float32 or q.shape[2] % 8:
        return f"q is {q.dtype} with heads of {q.shape[2]}, the cap {args['softcap']}; 16 bits and no cap are known"
    return packed_attention(args)


def flashinfer_attention(args: Mapping[str, Any]) -> str | None:
    """Where FlashInfer is installed: 16 bits, the cache in q's dtype, up to 16 heads of 64, 128 or 256 a kv head.

    Not over an fp8 cache: there XQA rounds queries and probabilities to e4m3 too, and is wrong by 3.7 %. Nor with a
    window: it multiplies what lies before it in the same tile of keys by 0, which keeps a stale NaN.
    """
    q, cache_layer = args["q_TNH"], args["cache_layer"]
    num_heads, head_size = q.shape[1:]
    if not has_flashinfer():
        return "FlashInfer is not installed: pip install flashinfer-python"
    if args["window"] or args["softcap"] or args.get("alibi_slopes_N") is not None:
        return "it knows no window, cap or slopes"
    if q.dtype not in (torch.bfloat16, torch.float16) or cache_layer.dtype != q.dtype:
        return f"q is {q.dtype}, the cache {cache_layer.dtype}; equal ones of 16 bits are known"
    if head_size not in (64, 128, 256) or num_heads // cache_layer.shape[2] > 16:
        heads = f"{num_heads} heads of {head_size} over {cache_layer.shape[2]} kv heads"
        return f"{heads}; up to 16 of 64, 128 or 256 are known"
    return paged_attention(args)


@cache
def has_flashinfer() -> bool:
    """The package is installed; whether it can be loaded and compiled is known when a row of it is bound."""
    return find_spec("flashinfer") is not None


def rows(args: Mapping[str, Any]) -> str | None:
    """A matrix whose rows fit in one program."""
    if len(args["x"].shape) != 2:
        return f"x has {len(args['x'].shape)} dimensions, not 2"
    return norm(args)


def gated_rows(args: Mapping[str, Any]) -> str | None:
    """Matrices whose rows fit in one program."""
    if args["gate"].shape[-1] > LARGEST_ROW:
        return f"rows of {args['gate'].shape[-1]} elements do not fit"
    return gated_activation(args)


def pair_rows(args: Mapping[str, Any]) -> str | None:
    """Two matrices whose rows fit in one program side by side."""
    x, y = args["x"], args["y"]
    if len(x.shape) != 2 or len(y.shape) != 2 or x.dtype != y.dtype:
        return f"x has {len(x.shape)} dimensions, y {len(y.shape)}, their dtypes are {x.dtype} and {y.dtype}"
    width = (x.shape[1] or 0) + (y.shape[1] or 0)
    return f"rows of {width} elements do not fit" if width > LARGEST_ROW else _floats(x=x)


def fp8_linear(args: Mapping[str, Any]) -> str | None:
    """Sizes in multiples of 16, a result in bf16."""
    if any(size % 16 for size in args["weight_NK"].shape) or args["dtype"] != "bfloat16":
        return f"weight_NK has sizes {list(args['weight_NK'].shape)}, the result is {args['dtype']}"
    return None


def moe(args: Mapping[str, Any]) -> str | None:
    """Up to 1,024 experts, of which a token chooses up to 64."""
    num_experts = args["down_EDF"].shape[0]
    if num_experts is None or num_experts > 1024:
        return f"there are {num_experts} experts, more than 1024"
    if not 0 < args["top_k"] <= min(64, num_experts):
        return f"a token cannot choose {args['top_k']} of {num_experts} experts"
    return _experts_dtypes(args) or _floats(router_TE=args["router_TE"])


def experts(args: Mapping[str, Any]) -> str | None:
    """As `moe`; the choices in int64 or int32."""
    if args["chosen_TJ"].dtype not in (torch.int64, torch.int32):
        return f"chosen_TJ is {args['chosen_TJ'].dtype}, not int64"
    if (args["chosen_TJ"].shape[1] or 65) > 64 or (args["down_EDF"].shape[0] or 1025) > 1024:
        return f"{args['chosen_TJ'].shape[1]} of {args['down_EDF'].shape[0]} experts are too many"
    return _experts_dtypes(args) or _floats(weights_TJ=args["weights_TJ"])


def _experts_dtypes(args: Mapping[str, Any]) -> str | None:
    x, gate_up, down = args["x_TD"], args["gate_up_EGD"], args["down_EDF"]
    if len({x.dtype, gate_up.dtype, down.dtype}) > 1:
        return f"the dtypes differ: x {x.dtype}, gate_up {gate_up.dtype}, down {down.dtype}"
    return _floats(x_TD=x)


def int8_linear(args: Mapping[str, Any]) -> str | None:
    """int8 by int8."""
    x, weight = args["x"], args["weight_NK"]
    if x.dtype != torch.int8 or weight.dtype != torch.int8:
        return f"x is {x.dtype}, weight_NK {weight.dtype}, not int8"
    return None


def quantized_linear(args: Mapping[str, Any]) -> str | None:
    """Activations as they are; a scale an output, or groups of 32, 64, 128 or 256 inputs."""
    x, qweight, scales = args["x"], args["qweight"], args["scales_NG"]
    if args["int8_activations"]:
        return "it takes activations as they are, not int8"
    if len(x.shape) != 2:
        return f"x has {len(x.shape)} dimensions, not 2"
    num_in = (qweight.shape[1] or 0) * (1 if qweight.dtype == torch.int8 else 2)
    group = num_in // (scales.shape[1] or 1)
    if scales.shape[1] == 1 and qweight.dtype == torch.int8:
        return _floats(x=x)
    if group not in (32, 64, 128, 256):
        return f"groups of {group} inputs; 32, 64, 128 and 256 are known"
    return _floats(x=x)


def _rows(name: str, rows: Any) -> str | None:
    if rows.dtype != torch.int64 or len(rows.shape) != 1:
        return f"{name} is {rows.dtype} with {len(rows.shape)} dimensions, not a list of int64"
    return None


def _floats(**tensors: Any) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {str(tensor.dtype)[6:]}, which it has no code for"
    return None
