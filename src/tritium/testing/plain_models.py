"""Small decoders in plain torch, as people write them: no op, no block of ours. T tokens, N heads, H head size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Llama's norm, as transformers writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * h.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), of the two halves of each head."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class PlainBlock(nn.Module):
    """A Llama block with heads in front of tokens and torch's own attention."""

    def __init__(self, size: int, num_heads: int, num_kv_heads: int, head_size: int, intermediate: int) -> None:
        super().__init__()
        self.head_size = head_size
        q_size, kv_size = num_heads * head_size, num_kv_heads * head_size
        self.q, self.k, self.v = (nn.Linear(size, out, bias=False) for out in (q_size, kv_size, kv_size))
        self.o = nn.Linear(q_size, size, bias=False)
        self.gate, self.up = nn.Linear(size, intermediate, bias=False), nn.Linear(size, intermediate, bias=False)
        self.down = nn.Linear(intermediate, size, bias=False)
        self.norm_1, self.norm_2 = RMSNorm(size), RMSNorm(size)

    def forward(self, x_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        h = self.norm_1(x_TD)
        q, k, v = (p(h).view(x_TD.shape[0], -1, self.head_size).transpose(0, 1)[None] for p in (self.q, self.k, self.v))
        q, k = (a * cos_TH + rotate_half(a) * sin_TH for a in (q, k))
        k, v = (a.repeat_interleave(q.shape[1] // a.shape[1], dim=1) for a in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_TD = x_TD + self.o(a[0].transpose(0, 1).reshape(x_TD.shape[0], -1))
        h = self.norm_2(x_TD)
        return x_TD + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainLlama(nn.Module):
    """A Llama without a line of Tritium in it."""

    def __init__(
        self,
        *,
        vocab_size: int = 199,
        size: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_size: int = 16,
        intermediate: int = 96,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, size)
        self.layers = nn.ModuleList(
            PlainBlock(size, num_heads, num_kv_heads, head_size, intermediate) for _ in range(num_layers)
        )
        self.norm, self.head = RMSNorm(size), nn.Linear(size, vocab_size, bias=False)
        steps = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu")
        self.register_buffer("inv_freq", 10000.0 ** (-steps / head_size), persistent=False)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """logits [T, V]."""
        x_TD = self.embed(input_ids_T)
        angles = positions_T[:, None].float() * self.inv_freq[None, :]  # type: ignore[index]
        angles_TH = torch.cat((angles, angles), dim=-1)
        cos_TH, sin_TH = angles_TH.cos().to(x_TD.dtype), angles_TH.sin().to(x_TD.dtype)
        for layer in self.layers:
            x_TD = layer(x_TD, cos_TH, sin_TH)
        return self.head(self.norm(x_TD))
