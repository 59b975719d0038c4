"""varlen_attention: attention of a packed batch in which every token of a sequence sees every other one. Reference."""

import torch

from tritium.ops.op import Op, like_first


def varlen_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    batch_counts: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention without a cache and without a mask, in fp32, cast once: [T, N, H].

    Sequence s owns rows cu_seqlens_q[s]:cu_seqlens_q[s + 1] of q, k and v, and each of its rows sees all of them.
    Query head n reads kv head n // (N / K). batch_counts: num_sequences, num_tokens, 0, 0. Rows behind num_tokens are
    zero here and unspecified in a kernel. Each row is computed by itself: its bits do not depend on the batch.
    """
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    starts = cu_seqlens_q.tolist()
    for sequence in range(int(batch_counts[0])):
        start, end = starts[sequence], starts[sequence + 1]
        k_KSH, v_KSH = (x[start:end].to(torch.float32).transpose(0, 1).contiguous() for x in (k_TKH, v_TKH))
        for row in range(start, end):
            q_KGH = q_TNH[row].to(torch.float32).unflatten(0, (k_TKH.shape[1], -1))
            scores_KGS = torch.matmul(q_KGH, k_KSH.transpose(1, 2)) * scale
            if softcap:
                scores_KGS = softcap * torch.tanh(scores_KGS / softcap)
            out_TNH[row] = torch.matmul(torch.softmax(scores_KGS, dim=-1), v_KSH).flatten(0, 1)
    return out_TNH


VARLEN_ATTENTION = Op(
    name="varlen_attention",
    schema="varlen_attention(Tensor q_TNH, Tensor k_TKH, Tensor v_TKH, Tensor cu_seqlens_q, Tensor batch_counts, "
    "float scale, float softcap) -> Tensor",
    reference=varlen_attention,
    fake=like_first,
)
