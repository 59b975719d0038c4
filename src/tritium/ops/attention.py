"""attention, and what it becomes over a paged KV cache: kv_store and paged_attention. References and spellings."""

import math

import torch
import torch.nn.functional as F

from tritium.ops.kv_int8 import parts_of
from tritium.ops.op import Op, Spelling, like_first
from tritium.ops.quantized import quantize_rows

FP8 = torch.float8_e4m3fn


def attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of one sequence, in fp32, cast once: [T, N, H]. Query head n reads kv head n // (N / K).

    window: keys a query sees at most, itself included; 0: all.
    softcap: scores become `softcap * tanh(score / softcap)`; 0: they do not.
    alibi_slopes_N: fp32; to a score, capped or not, head n adds slope * (key's position - query's). Press et al. 2022
        (ALiBi, arXiv:2108.12409).
    """
    num_heads, num_kv_heads = q_TNH.shape[1], k_TKH.shape[1]
    q_KGTH = q_TNH.to(torch.float32).transpose(0, 1).unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
    k_K1SH = k_TKH.to(torch.float32).transpose(0, 1).unsqueeze(1)
    v_K1SH = v_TKH.to(torch.float32).transpose(0, 1).unsqueeze(1)
    scores_KGTS = torch.matmul(q_KGTH, k_K1SH.transpose(-1, -2)) * scale
    if softcap:
        scores_KGTS = softcap * torch.tanh(scores_KGTS / softcap)
    positions = torch.arange(q_TNH.shape[0], device=q_TNH.device)
    distance_TS = positions[:, None] - positions[None, :]
    if alibi_slopes_N is not None:
        slopes_KG11 = alibi_slopes_N.view(num_kv_heads, -1, 1, 1)
        scores_KGTS = scores_KGTS - slopes_KG11 * distance_TS.to(torch.float32)
    if causal:
        scores_KGTS = scores_KGTS.masked_fill(distance_TS < 0, -math.inf)
    if window:
        scores_KGTS = scores_KGTS.masked_fill(distance_TS >= window, -math.inf)
    out_KGTH = torch.matmul(torch.softmax(scores_KGTS, dim=-1), v_K1SH)
    return out_KGTH.flatten(0, 1).transpose(0, 1).to(q_TNH.dtype).contiguous()


def kv_store(k_TKH: torch.Tensor, v_TKH: torch.Tensor, cache_layer: torch.Tensor, slot_mapping_T: torch.Tensor) -> None:
    """Writes keys and values into the cache; token t into slot `block * block_size + offset`, none when it is negative.

    cache_layer: [num_blocks, 2 (keys, values), K, block_size, H]; may be strided in its first dimension; in fp8 (e4m3)
    it takes what lies beyond ±448 as ±448. In int8 it is [..., H + SCALE_BYTES], laid out as ops/kv_int8.py
    says, heads by `quantize_rows`. slots: int64.
    """
    block_size = cache_layer.shape[3]
    tokens = (slot_mapping_T >= 0).nonzero().squeeze(1)
    slots = slot_mapping_T[tokens]
    blocks, offsets, dtype = slots // block_size, slots % block_size, cache_layer.dtype
    for part, x_TKH in enumerate((k_TKH[tokens], v_TKH[tokens])):
        if dtype == torch.int8:
            kept_integers, kept_scales = parts_of(cache_layer)
            integers, scales = quantize_rows(x_TKH)
            kept_integers[blocks, part, :, offsets] = integers
            kept_scales[blocks, part, :, offsets] = scales.clone(memory_format=torch.contiguous_format).view(torch.int8)
        else:
            x_TKH = x_TKH.to(torch.float32).clamp(-448, 448) if dtype == FP8 else x_TKH
            cache_layer[blocks, part, :, offsets] = x_TKH.to(dtype)


def _read(cache_layer: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Keys and values [token, 2, K, H] of these slots, in fp32."""
    if cache_layer.dtype != torch.int8:
        return cache_layer[blocks, :, :, offsets].to(torch.float32)
    integers, scales = (part[blocks, :, :, offsets] for part in parts_of(cache_layer))
    return integers * scales.contiguous().view(torch.float32)


def paged_attention(
    q_TNH: torch.Tensor,
    cache_layer: torch.Tensor,
    block_table_SB: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens_S: torch.Tensor,
    batch_counts: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a packed batch over a cache that has this step's keys already: [T, N, H]. fp32, cast once.

    Sequence s owns rows cu_seqlens_q[s]:cu_seqlens_q[s + 1] of q, the last of its context_lens_S[s] tokens.
    batch_counts: num_sequences, num_tokens, num_rows, sequences of one token before the first longer one. Tables are
    valid for num_sequences, rows of q for num_tokens; the rows behind are zero here and unspecified in a kernel. Never
    reads a slot that no query sees. Each row is computed by itself, so its bits do not depend on the rest of the batch.
    """
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    num_kv_heads, block_size = cache_layer.shape[2:4]
    starts = cu_seqlens_q.tolist()
    context_lens = context_lens_S.tolist()
    for sequence in range(int(batch_counts[0])):
        first_row, end_row = starts[sequence], starts[sequence + 1]
        for row in range(first_row, end_row):
            num_keys = context_lens[sequence] - (end_row - 1 - row)
            first_key = max(0, num_keys - window) if window else 0
            keys = torch.arange(first_key, num_keys, device=q_TNH.device)
            blocks = block_table_SB[sequence].to(torch.int64)[keys // block_size]
            kv = _read(cache_layer, blocks, keys % block_size)
            k_KSH, v_KSH = kv[:, 0].transpose(0, 1).contiguous(), kv[:, 1].transpose(0, 1).contiguous()
            q_KGH = q_TNH[row].to(torch.float32).unflatten(0, (num_kv_heads, -1))
            scores_KGS = torch.matmul(q_KGH, k_KSH.transpose(1, 2)) * scale
            if softcap:
                scores_KGS = softcap * torch.tanh(scores_KGS / softcap)
            if alibi_slopes_N is not None:
                distance_S = (keys - (num_keys - 1)).to(torch.float32)
                scores_KGS = scores_KGS + alibi_slopes_N.view(num_kv_heads, -1, 1) * distance_S
            out_TNH[row] = torch.matmul(torch.softmax(scores_KGS, dim=-1), v_KSH).flatten(0, 1)
    return out_TNH


def _no_result(*_: object) -> None:
    return None


def _q_k_v(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(8, 6, 16, dtype=dtype) for _ in range(3))


def _grouped_q_k_v(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(8, 6, 16, dtype=dtype), *(torch.randn(8, 3, 16, dtype=dtype) for _ in range(2))


def _sdpa(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, *, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).squeeze(0).transpose(0, 1)


def _sdpa_3d(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, *, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q_TNH, k_TKH, v_TKH))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1)


def _sdpa_gqa(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, *, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


_SCALE = {"scale": 0.12345}

ATTENTION = Op(
    name="attention",
    schema="attention(Tensor q_TNH, Tensor k_TKH, Tensor v_TKH, float scale, bool causal=True, int window=0, "
    "float softcap=0.0, Tensor? alibi_slopes_N=None) -> Tensor",
    reference=attention,
    fake=like_first,
    spellings=(
        Spelling(name="sdpa", fn=_sdpa, example=_q_k_v, attributes=_SCALE, bound=2.0),
        Spelling(name="sdpa_3d", fn=_sdpa_3d, example=_q_k_v, attributes=_SCALE, bound=2.0),
        Spelling(name="sdpa_gqa", fn=_sdpa_gqa, example=_grouped_q_k_v, attributes=_SCALE, bound=2.0),
    ),
)
KV_STORE = Op(
    name="kv_store",
    schema="kv_store(Tensor k_TKH, Tensor v_TKH, Tensor(a!) cache_layer, Tensor slot_mapping_T) -> ()",
    reference=kv_store,
    fake=_no_result,
)
PAGED_ATTENTION = Op(
    name="paged_attention",
    schema="paged_attention(Tensor q_TNH, Tensor cache_layer, Tensor block_table_SB, Tensor cu_seqlens_q, "
    "Tensor context_lens_S, Tensor batch_counts, float scale, int window, float softcap, "
    "Tensor? alibi_slopes_N=None) -> Tensor",
    reference=paged_attention,
    fake=like_first,
)
