"""moe, experts: mixtures of gated MLPs as two grouped GEMMs, without the host knowing who chose whom.

    route     a program a token: its experts, the likeliest first, and their weights
    count     a program an expert: how many choices are its own
    order     a program an expert: its choices' places behind those of lower experts, and its tiles of BLOCK_M choices
    first     act(gate(x)) * up(x) of each choice, a program a tile and BLOCK_N outputs; products rounded as `linear`'s
    second    down(...) of each choice, at the choice's own place
    join      a program a token: the weighted sum of its choices, in fp32, in their order

There are choices / BLOCK_M + experts tiles at most; programs behind the last leave at once. An output's sum walks K
alone and the tactic is the same for every number of tokens, so bits do not depend on the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu import scratch
from tritium.kernels.gpu.activations import act
from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.kernel import LaunchContext, Thunk

_NOBODY = tl.constexpr(1 << 30)  # the expert of a row without numbers
_CHOICES = 1024  # that one step of counting looks at


@dataclass(frozen=True, kw_only=True)
class MoeTactic:
    """Choices, outputs and inputs of a tile."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Scratch(NamedTuple):
    """What the launches of one size leave for each other: by choice, by expert, by tile."""

    chosen: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor
    counts: torch.Tensor
    tiles: torch.Tensor
    hidden: torch.Tensor
    parts: torch.Tensor


@triton.jit
def _route_kernel(
    router_ptr, chosen_ptr, weights_ptr, num_experts, stride, TOP_K: tl.constexpr, IS_NORMED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_TOP: tl.constexpr,
):  # fmt: skip
    token, e = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits = tl.load(router_ptr + token * stride + e, mask=e < num_experts, other=-float("inf")).to(tl.float32)
    most = tl.max(logits, 0)
    left, j = logits, tl.arange(0, BLOCK_TOP)
    experts = tl.full([BLOCK_TOP], _NOBODY, tl.int32)
    values = tl.full([BLOCK_TOP], -float("inf"), tl.float32)
    for place in tl.static_range(TOP_K):
        value = tl.max(left, 0)
        expert = tl.min(tl.where(left == value, e, _NOBODY), 0)  # of equal ones the lowest
        experts = tl.where(j == place, expert, experts)
        values = tl.where(j == place, value, values)
        left = tl.where(e == expert, -float("inf"), left)
    shares = tl.exp(values - most)
    total = tl.sum(tl.where(j < TOP_K, shares, 0.0), 0) if IS_NORMED else tl.sum(tl.exp(logits - most), 0)
    is_number = tl.sum(tl.where(e < num_experts, logits * 0.0, 0.0), 0) == 0.0
    tl.store(chosen_ptr + token * TOP_K + j, tl.where(is_number, experts, _NOBODY), mask=j < TOP_K)
    tl.store(weights_ptr + token * TOP_K + j, shares / total, mask=j < TOP_K)


@triton.jit
def _count_kernel(chosen_ptr, counts_ptr, num_choices, BLOCK: tl.constexpr):
    expert, i = tl.program_id(0), tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_choices, BLOCK):
        chosen = tl.load(chosen_ptr + start + i, mask=start + i < num_choices, other=-1)
        count += (chosen == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, 0))


@triton.jit
def _order_kernel(
    chosen_ptr, counts_ptr, order_ptr, tiles_ptr, num_choices, num_experts, most_tiles, BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tiles: of each its expert (-1: there is none), its first place in `order` and the place behind its last."""
    expert, e, i = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + e, mask=e < num_experts, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(e < expert, counts, 0), 0)
    tile = tl.sum(tl.where(e < expert, tiles, 0), 0)
    count = tl.sum(tl.where(e == expert, counts, 0), 0)
    place = first
    for start in range(0, num_choices, BLOCK):
        chosen = tl.load(chosen_ptr + start + i, mask=start + i < num_choices, other=-1)
        is_mine = (chosen == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(is_mine, 0) - 1, start + i, mask=is_mine > 0)
        place += tl.sum(is_mine, 0)
    for done in range(0, count, BLOCK_M):
        tl.store(tiles_ptr + 3 * tile, expert)
        tl.store(tiles_ptr + 3 * tile + 1, first + done)
        tl.store(tiles_ptr + 3 * tile + 2, first + count)
        tile += 1
    if expert == num_experts - 1:
        for rest in range(tile, most_tiles):
            tl.store(tiles_ptr + 3 * rest, -1)


@triton.jit
def _product_kernel(
    x_ptr, weight_ptr, out_ptr, order_ptr, tiles_ptr, num_out, num_in, stride_x, stride_out, ROW_DIVISOR: tl.constexpr,
    IS_GATED: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile's rows of x times its expert's weight. IS_GATED: the weight has a gate's num_out rows, then those of what
    it gates. Row c of x is choice c's, or, ROW_DIVISOR > 1, choices share the rows of their token."""
    tile, n_tile = tl.program_id(1), tl.program_id(0)
    expert = tl.load(tiles_ptr + 3 * tile)
    if expert < 0:
        return
    place = tl.load(tiles_ptr + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    is_m = place < tl.load(tiles_ptr + 3 * tile + 2)
    choice = tl.load(order_ptr + place, mask=is_m, other=0).to(tl.int64)
    n, k = n_tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_n = n < num_out
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x_place = x_ptr + (choice // ROW_DIVISOR)[:, None] * stride_x + k[None, :]
    num_rows = num_out * 2 if IS_GATED else num_out
    weight_place = weight_ptr + (expert.to(tl.int64) * num_rows + n)[None, :] * num_in + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_in, BLOCK_K):
        is_k = start + k < num_in
        x = tl.load(x_place + start, mask=is_m[:, None] & is_k[None, :], other=0.0)
        is_weight = is_n[None, :] & is_k[:, None]
        acc = tl.dot(x, tl.load(weight_place + start, mask=is_weight, other=0.0), acc, input_precision=PRECISION)
        if IS_GATED:
            weight = tl.load(weight_place + start + num_out.to(tl.int64) * num_in, mask=is_weight, other=0.0)
            up = tl.dot(x, weight, up, input_precision=PRECISION)
    if IS_GATED:
        gate = act(acc.to(dtype).to(tl.float32), KIND).to(dtype).to(tl.float32)
        acc = gate * up.to(dtype).to(tl.float32)
    out_place = out_ptr + choice[:, None] * stride_out + n[None, :]
    tl.store(out_place, acc.to(dtype), mask=is_m[:, None] & is_n[None, :])


@triton.jit
def _join_kernel(
    parts_ptr, chosen_ptr, weights_ptr, out_ptr, width, num_experts, stride_out, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        choice = token * TOP_K + j
        expert = tl.load(chosen_ptr + choice)
        part = tl.load(parts_ptr + choice * width + d, mask=d < width, other=0.0).to(tl.float32)
        part = tl.where((expert >= 0) & (expert < num_experts), part, float("nan"))  # nobody has computed it
        total += part * tl.load(weights_ptr + choice).to(tl.float32)
    tl.store(out_ptr + token * stride_out + d, total.to(out_ptr.dtype.element_ty), mask=d < width)


def tactic_for(dtype: torch.dtype) -> MoeTactic:
    """One for every number of tokens."""
    if dtype == torch.float32:
        return MoeTactic(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2)
    return MoeTactic(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4)


def bind_moe(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext | None = None) -> Thunk:
    """ops.moe into outputs[0]; a row whose router logits are not numbers becomes NaN."""
    x, router, top_k = args["x_TD"], args["router_TE"], args["top_k"]
    need_dense(router_TE=router[0])
    num_tokens, num_experts = router.shape
    kept = _scratch(context, x, args["gate_up_EGD"], top_k)
    route = partial(
        _route_kernel[(num_tokens,)],
        *(router, kept.chosen, kept.weights, num_experts, router.stride(0)),
        TOP_K=top_k,
        IS_NORMED=args["is_normed"],
        BLOCK=triton.next_power_of_2(num_experts),
        BLOCK_TOP=triton.next_power_of_2(top_k),
        num_warps=1,
    )
    mix = _bind_mix(args, outputs[0], kept.chosen, kept.weights, top_k, kept)
    return lambda: (route(), mix())


def bind_experts(
    args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext | None = None
) -> Thunk:
    """ops.experts into outputs[0]; an expert that there is not gives a row of NaN."""
    chosen, weights = args["chosen_TJ"], args["weights_TJ"]
    top_k = chosen.shape[1]
    kept = _scratch(context, args["x_TD"], args["gate_up_EGD"], top_k)
    own_chosen, own_weights = (b[: chosen.numel()].view(chosen.shape) for b in (kept.chosen, kept.weights))
    mix = _bind_mix(args, outputs[0], own_chosen, own_weights, top_k, kept)
    return lambda: (own_chosen.copy_(chosen), own_weights.copy_(weights), mix())  # whatever their layout and type


def _bind_mix(
    args: Mapping[str, Any],
    out: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    top_k: int,
    kept: Scratch,
) -> Thunk:
    """Everything behind the routing."""
    x, gate_up, down = args["x_TD"], args["gate_up_EGD"], args["down_EDF"]
    need_dense(x_TD=x[0], gate_up_EGD=gate_up, down_EDF=down, out=out[0])
    num_tokens, (num_experts, width, hidden) = x.shape[0], down.shape
    num_choices, tactic = num_tokens * top_k, tactic_for(x.dtype)
    most_tiles = min(num_choices, triton.cdiv(num_choices, tactic.BLOCK_M) + num_experts)
    block = min(_CHOICES, triton.next_power_of_2(num_choices))
    count = partial(_count_kernel[(num_experts,)], chosen, kept.counts, num_choices, BLOCK=block, num_warps=4)
    order = partial(
        _order_kernel[(num_experts,)],
        *(chosen, kept.counts, kept.order, kept.tiles, num_choices, num_experts, most_tiles),
        BLOCK_M=tactic.BLOCK_M,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK=block,
        num_warps=4,
    )
    flags = {"PRECISION": "ieee" if x.dtype == torch.float32 else "tf32", **asdict(tactic)}
    queue = (kept.order, kept.tiles)
    first = partial(
        _product_kernel[(triton.cdiv(hidden, tactic.BLOCK_N), most_tiles)],
        *(x, gate_up, kept.hidden, *queue, hidden, width, x.stride(0), hidden),
        ROW_DIVISOR=top_k,
        IS_GATED=True,
        KIND=args["kind"],
        **flags,
    )
    second = partial(
        _product_kernel[(triton.cdiv(width, tactic.BLOCK_N), most_tiles)],
        *(kept.hidden, down, kept.parts, *queue, width, hidden, hidden, width),
        ROW_DIVISOR=1,
        IS_GATED=False,
        KIND="relu",
        **flags,
    )
    wide = min(1024, triton.next_power_of_2(width))
    join = partial(
        _join_kernel[(num_tokens, triton.cdiv(width, wide))],
        *(kept.parts, chosen, weights, out, width, num_experts, out.stride(0)),
        TOP_K=top_k,
        BLOCK=wide,
    )
    return lambda: (count(), order(), first(), second(), join())


def _scratch(context: LaunchContext | None, x: torch.Tensor, gate_up: torch.Tensor, top_k: int) -> Scratch:
    """Shared by all layers, which run one after the other, and by batches of about one size."""
    num_experts, both, width = gate_up.shape
    num_choices, hidden = triton.next_power_of_2(x.shape[0]) * top_k, both // 2
    pieces = scratch.experts(num_choices, num_experts, hidden, width, x.dtype)
    return Scratch(**{name: scratch.take(context, piece, x.device) for name, piece in pieces.items()})
