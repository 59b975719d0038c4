"""Attention over packed sequences that all see themselves whole: arguments of `varlen_attention`, and what is right."""

from typing import Any

import torch


def draw(lengths: list[int], num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """q, k and v side by side in one tensor, as merged projections leave them; rows of padding behind them."""
    total, width = sum(lengths), (num_heads + 2 * num_kv_heads) * head_size
    merged = torch.randn(total + 5, width).mul(1.5).to(dtype)
    merged[total:] = float("nan")
    q, k, v = merged.split([num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size], dim=1)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), -9], dtype=torch.int32)
    return {
        "q_TNH": q.view(-1, num_heads, head_size),
        "k_TKH": k.view(-1, num_kv_heads, head_size),
        "v_TKH": v.view(-1, num_kv_heads, head_size),
        "cu_seqlens_q": starts,
        "batch_counts": torch.tensor([len(lengths), total, 0, 0], dtype=torch.int32),
        "scale": head_size**-0.5,
        "softcap": 0.0,
    }


def textbook(args: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """All in `dtype`, one sequence after the other."""
    outputs, starts = [], args["cu_seqlens_q"].tolist()
    for i in range(int(args["batch_counts"][0])):
        q, k, v = (args[n][starts[i] : starts[i + 1]].to(dtype).transpose(0, 1) for n in ("q_TNH", "k_TKH", "v_TKH"))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * args["scale"]
        if args["softcap"]:
            scores = args["softcap"] * torch.tanh(scores / args["softcap"])
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def limit(args: dict[str, Any], exact: torch.Tensor) -> torch.Tensor:
    """Twice the root of the mean square error of the textbook in the arguments' own dtype, and an ulp."""
    dtype = args["q_TNH"].dtype
    return (
        2 * (textbook(args, dtype).double() - exact).square().mean().sqrt()
        + torch.finfo(dtype).eps * exact.abs().mean()
    )
