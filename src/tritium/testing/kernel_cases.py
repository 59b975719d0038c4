"""Arguments for every kernel's tests: odd sizes, views of wider tensors; and what each op is in double precision.

Sizes: T tokens, N heads, K kv heads, H head size, D width, P rotated pairs, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tritium.kernels.kernel import Kernel, Tactic, TensorSpec, Thunk, resolve

Args = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to call one op.

    make(T, dtype): arguments, drawn from torch's generator. rows: which of them have a row for each token.
    exact(**args): the result in float64 from float64 arguments.
    """

    name: str
    op: str
    make: Callable[[int, torch.dtype], Args]
    rows: tuple[str, ...]
    exact: Callable[..., torch.Tensor]


def first_rows(case: Case, args: Args, start: int, end: int) -> Args:
    """The arguments for tokens start:end alone: views, so strides and addresses differ from a batch of their own."""
    return {name: value[start:end] if name in case.rows else value for name, value in args.items()}


def specs_of(args: Mapping[str, Any]) -> Args:
    """The arguments as they are known when a kernel and its tactic are chosen."""
    return {
        name: TensorSpec(dtype=value.dtype, shape=tuple(value.shape)) if isinstance(value, torch.Tensor) else value
        for name, value in args.items()
    }


def bind(kernel: Kernel, args: Mapping[str, Any], out: torch.Tensor, tactic: Tactic | None = None) -> Thunk:
    """The kernel's thunk, with its weights packed. tactic: None is the default."""
    packed = {name: resolve(target)(args[name]) for name, target in kernel.pack.items()}
    return resolve(kernel.target)({**args, **packed}, [out], **(tactic or {}))


def run(
    kernel: Kernel,
    args: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tactic: Tactic | None = None,
) -> torch.Tensor:
    """The kernel's result: from a poisoned output whose surroundings stay untouched, equal when it is called again."""
    size, guard = torch.Size(shape).numel(), 64
    device = next(value.device for value in args.values() if isinstance(value, torch.Tensor))
    storage = torch.full((size + 2 * guard,), float("nan"), dtype=dtype, device=device)
    out = storage[guard : guard + size].view(shape)
    thunk = bind(kernel, args, out, tactic)
    thunk()
    first = out.clone()
    out.fill_(float("nan"))
    thunk()
    assert torch.equal(first.nan_to_num(7.0), out.nan_to_num(7.0)), f"{kernel.name}: a second call gave other bits"
    assert storage[:guard].isnan().all() and storage[guard + size :].isnan().all(), f"{kernel.name} wrote outside"
    return first


def in_double(args: Args) -> Args:
    """The same arguments with floating-point tensors in float64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in args.items()
    }


def _view(num_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, width] inside a wider tensor full of NaN, as a part of a fused projection is."""
    whole = torch.full((num_tokens, 2 * width + 11), float("nan"), dtype=dtype)
    whole[:, 5 : 5 + width] = torch.randn(num_tokens, width) * 2
    return whole[:, 5 : 5 + width]


def _heads(num_tokens: int, num_heads: int, head_size: int, dtype: torch.dtype) -> torch.Tensor:
    return _view(num_tokens, num_heads * head_size, dtype).unflatten(1, (num_heads, head_size))


def exact_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0, cast_before_weight: bool = True
) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight + weight_offset)


def exact_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def exact_cos_sin(positions_T: torch.Tensor, inv_freq_P: torch.Tensor, attention_scaling: float) -> torch.Tensor:
    angles = (positions_T[:, None].float() * inv_freq_P.float()).double()  # the product is defined in fp32
    return torch.cat((angles.cos(), angles.sin()), -1) * attention_scaling


def exact_rope(x_TNH: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    pairs = cos_sin.shape[-1] // 2
    turn = torch.complex(cos_sin[:, None, :pairs], cos_sin[:, None, pairs:])
    part, rest = x_TNH[..., : 2 * pairs], x_TNH[..., 2 * pairs :]
    if interleaved:
        out = torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (pairs, 2)).contiguous()) * turn).flatten(-2)
    else:
        turned = torch.complex(part[..., :pairs].contiguous(), part[..., pairs:].contiguous()) * turn
        out = torch.cat((turned.real, turned.imag), -1)
    return torch.cat((out, rest), -1)


def exact_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": torch.relu,
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    }
    return functions[kind](x)


def exact_gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return exact_activation(gate, kind) * up


def norm_case(name: str, op: str, width: int, exact: Callable[..., torch.Tensor], **literals: Any) -> Case:
    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        args: Args = {"x": _view(num_tokens, width, dtype), "weight": torch.randn(width).to(dtype)}
        if op == "layer_norm":
            args["bias"] = torch.randn(width).to(dtype) if literals.get("bias", True) else None
        return {**args, **{key: value for key, value in literals.items() if key != "bias"}}

    return Case(name=name, op=op, make=make, rows=("x",), exact=exact)


def rope_case(name: str, num_heads: int, head_size: int, num_pairs: int, *, interleaved: bool) -> Case:
    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        angles = torch.rand(num_tokens, num_pairs) * 100
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        x_TNH = _heads(num_tokens, num_heads, head_size, dtype)
        return {"x_TNH": x_TNH, "cos_sin": cos_sin, "interleaved": interleaved}

    return Case(name=name, op="rope", make=make, rows=("x_TNH", "cos_sin"), exact=exact_rope)


def activation_case(kind: str, width: int) -> Case:
    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        return {"x": _view(num_tokens, width, dtype), "kind": kind}

    return Case(name=f"activation-{kind}-{width}", op="activation", make=make, rows=("x",), exact=exact_activation)


def gated_case(kind: str, width: int) -> Case:
    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        return {"gate": _view(num_tokens, width, dtype), "up": _view(num_tokens, width, dtype), "kind": kind}

    name = f"gated_activation-{kind}-{width}"
    return Case(name=name, op="gated_activation", make=make, rows=("gate", "up"), exact=exact_gated)


def linear_case(num_out: int, num_in: int, *, has_bias: bool) -> Case:
    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        bias = torch.randn(num_out).to(dtype) if has_bias else None
        weight = torch.randn(num_out, num_in).to(dtype)
        return {"x": _view(num_tokens, num_in, dtype), "weight_NK": weight, "bias": bias}

    def exact(x: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight_NK, bias)

    return Case(name=f"linear-{num_out}-{num_in}-{has_bias}", op="linear", make=make, rows=("x",), exact=exact)


def linear_add_case(num_out: int, num_in: int) -> Case:
    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        weight, bias = torch.randn(num_out, num_in).to(dtype), torch.randn(num_out).to(dtype)
        x, residual = (_view(num_tokens, size, dtype) for size in (num_in, num_out))
        return {"x": x, "weight_NK": weight, "bias": bias, "residual": residual}

    def exact(
        x: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        return F.linear(x, weight_NK, bias) + residual

    return Case(name=f"linear_add-{num_out}-{num_in}", op="linear_add", make=make, rows=("x", "residual"), exact=exact)


def linear_pair_case(num_out: int, num_in: int, num_more: int) -> Case:
    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        weight, bias = torch.randn(num_out, num_in + num_more).to(dtype), torch.randn(num_out).to(dtype)
        x, y = (_view(num_tokens, size, dtype) for size in (num_in, num_more))
        return {"x": x, "y": y, "weight_NK": weight, "bias": bias}

    def exact(x: torch.Tensor, y: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(torch.cat((x, y), -1), weight_NK, bias)

    name = f"linear_pair-{num_out}-{num_in}-{num_more}"
    return Case(name=name, op="linear_pair", make=make, rows=("x", "y"), exact=exact)


def moe_case(num_experts: int, width: int, hidden: int, top_k: int, kind: str, *, is_normed: bool) -> Case:
    """Unequal loads: the first expert is wanted most."""

    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        router = _view(num_tokens, num_experts, dtype)
        router[:, 0] += 2
        return {
            "x_TD": _view(num_tokens, width, dtype),
            "router_TE": router,
            "gate_up_EGD": (torch.randn(num_experts, 2 * hidden, width) / width**0.5).to(dtype),
            "down_EDF": (torch.randn(num_experts, width, hidden) / hidden**0.5).to(dtype),
            "top_k": top_k,
            "is_normed": is_normed,
            "kind": kind,
        }

    name = f"moe-{num_experts}-{width}-{hidden}-{top_k}-{is_normed}"
    return Case(name=name, op="moe", make=make, rows=("x_TD", "router_TE"), exact=exact_moe)


def experts_case(num_experts: int, width: int, hidden: int, num_chosen: int, kind: str, *, is_wide: bool) -> Case:
    """Weights in fp32 or in the type of x; the first expert is wanted most, and one may be chosen twice."""

    def make(num_tokens: int, dtype: torch.dtype) -> Args:
        chosen = torch.randint(-2, num_experts, (num_tokens, 2 * num_chosen)).clamp(min=0)[:, ::2]
        return {
            "x_TD": _view(num_tokens, width, dtype),
            "chosen_TJ": chosen,
            "weights_TJ": torch.rand(num_tokens, num_chosen).to(torch.float32 if is_wide else dtype),
            "gate_up_EGD": (torch.randn(num_experts, 2 * hidden, width) / width**0.5).to(dtype),
            "down_EDF": (torch.randn(num_experts, width, hidden) / hidden**0.5).to(dtype),
            "kind": kind,
        }

    name = f"experts-{num_experts}-{width}-{hidden}-{num_chosen}-{is_wide}"
    return Case(name=name, op="experts", make=make, rows=("x_TD", "chosen_TJ", "weights_TJ"), exact=exact_experts)


def exact_experts(
    x_TD: torch.Tensor,
    chosen_TJ: torch.Tensor,
    weights_TJ: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """Every expert on every token, then each by the weight that it was chosen with."""
    gate, up = torch.einsum("td,egd->teg", x_TD, gate_up_EGD).chunk(2, dim=-1)
    y_TED = torch.einsum("tef,edf->ted", exact_gated(gate, up, kind), down_EDF)
    weights_TE = torch.zeros(len(x_TD), len(down_EDF), dtype=torch.float64).scatter_add(1, chosen_TJ, weights_TJ)
    return torch.einsum("te,ted->td", weights_TE, y_TED)


def exact_moe(
    x_TD: torch.Tensor,
    router_TE: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    top_k: int,
    is_normed: bool,
    kind: str,
) -> torch.Tensor:
    """Every expert on every token, then only the chosen ones count."""
    gate, up = torch.einsum("td,egd->teg", x_TD, gate_up_EGD).chunk(2, dim=-1)
    y_TED = torch.einsum("tef,edf->ted", exact_gated(gate, up, kind), down_EDF)
    chosen = router_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    is_chosen = torch.zeros_like(router_TE, dtype=torch.bool).scatter(1, chosen, True)
    weights = router_TE.masked_fill(~is_chosen, -torch.inf).softmax(-1) if is_normed else router_TE.softmax(-1)
    return torch.einsum("te,ted->td", weights * is_chosen, y_TED)


def _make_qk_norm(num_tokens: int, dtype: torch.dtype) -> Args:
    return {"x": _heads(num_tokens, 5, 24, dtype), "weight": torch.randn(24).to(dtype), "eps": 1e-6}


def _make_cos_sin(num_tokens: int, dtype: torch.dtype) -> Args:
    positions, inv_freq = torch.randint(0, 1 << 17, (num_tokens,)), 1.0 / 500000.0 ** (torch.arange(37) / 37)
    return {"positions_T": positions, "inv_freq_P": inv_freq, "attention_scaling": 1.25}


def _make_embedding(num_tokens: int, dtype: torch.dtype) -> Args:
    return {"ids_T": torch.randint(0, 97, (num_tokens,)), "weight_VD": torch.randn(97, 37).to(dtype)}


def _make_quantized_embedding(num_tokens: int, dtype: torch.dtype) -> Args:
    qweight = torch.randint(-127, 128, (97, 37)).to(torch.int8)
    ids, scales = torch.randint(0, 97, (num_tokens,)), torch.rand(97, 1)
    return {"ids_T": ids, "qweight_VD": qweight, "scales_V1": scales, "dtype": str(dtype)[6:]}


def _make_gather(num_tokens: int, dtype: torch.dtype) -> Args:
    return {"x_TD": _view(13, 37, dtype), "rows_R": torch.randint(0, 13, (num_tokens,))}


def _lookup(ids_T: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    return weight_VD[ids_T]


def _quantized_lookup(
    ids_T: torch.Tensor, qweight_VD: torch.Tensor, scales_V1: torch.Tensor, dtype: str
) -> torch.Tensor:
    return qweight_VD[ids_T].double() * scales_V1[ids_T]


def _gathered(x_TD: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    return x_TD[rows_R]


_GEMMA = {"weight_offset": 1.0, "cast_before_weight": False}
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu")

CASES: tuple[Case, ...] = (
    norm_case("rms_norm-1000", "rms_norm", 1000, exact_rms_norm, eps=1e-5),
    norm_case("rms_norm-37-offset", "rms_norm", 37, exact_rms_norm, eps=1e-3, weight_offset=1.0),
    norm_case("rms_norm-64-gemma", "rms_norm", 64, exact_rms_norm, eps=1e-5, **_GEMMA),
    Case(name="rms_norm-heads", op="rms_norm", make=_make_qk_norm, rows=("x",), exact=exact_rms_norm),
    norm_case("layer_norm-1000", "layer_norm", 1000, exact_layer_norm, eps=1e-5),
    norm_case("layer_norm-37-no-bias", "layer_norm", 37, exact_layer_norm, eps=1e-5, bias=False),
    Case(name="rope_cos_sin", op="rope_cos_sin", make=_make_cos_sin, rows=("positions_T",), exact=exact_cos_sin),
    rope_case("rope-64", 9, 64, 32, interleaved=False),
    rope_case("rope-partial", 3, 50, 11, interleaved=False),
    rope_case("rope-interleaved-64", 9, 64, 32, interleaved=True),
    rope_case("rope-interleaved-partial", 3, 50, 11, interleaved=True),
    *(activation_case(kind, width) for kind in KINDS for width in (37, 1000)),
    *(gated_case(kind, width) for kind in KINDS for width in (37, 1000)),
    Case(name="embedding", op="embedding", make=_make_embedding, rows=("ids_T",), exact=_lookup),
    Case(
        name="quantized_embedding",
        op="quantized_embedding",
        make=_make_quantized_embedding,
        rows=("ids_T",),
        exact=_quantized_lookup,
    ),
    Case(name="gather_rows", op="gather_rows", make=_make_gather, rows=("rows_R",), exact=_gathered),
    moe_case(5, 37, 45, 2, "silu", is_normed=True),
    moe_case(9, 64, 32, 3, "gelu_tanh", is_normed=False),
    experts_case(5, 37, 45, 2, "silu", is_wide=True),
    experts_case(9, 64, 32, 3, "gelu_tanh", is_wide=False),
    linear_case(100, 37, has_bias=True),
    linear_case(96, 256, has_bias=False),
    linear_add_case(70, 37),
    linear_pair_case(70, 96, 45),
)
