"""Self-attention as decoders have it.

No cache, no batch axis, no masks: `ops.attention` is stateless over one sequence, and the compiler adds the rest.
T tokens, D model, N heads, K kv heads, H head size.
"""

import torch
from torch import Tensor, nn

from tritium import ops
from tritium.models.config import ModelConfig
from tritium.models.parts import Linear, make_head_norm


class Attention(nn.Module):
    """Causal self-attention: grouped kv heads, rotary positions or ALiBi if any, a sliding window if the layer has one.

    `alibi_slopes`, where there are any, is a buffer with real numbers even when the module is made on the meta device.
    """

    alibi_slopes: Tensor | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = config.num_heads, config.num_kv_heads, config.head_size
        self.scale, self.window = config.attention_scale(layer), config.windows[layer]
        self.softcap = config.attention_softcap
        self.is_interleaved = config.rope is not None and config.rope.is_interleaved
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.has_qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.has_qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.has_qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.has_output_bias)
        slopes = config.alibi_slopes
        slopes_N = None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device="cpu")
        self.register_buffer("alibi_slopes", slopes_N, persistent=False)
        self.has_qk_norm = config.has_qk_norm
        if self.has_qk_norm:
            self.q_norm = make_head_norm(config, config.num_heads)
            self.k_norm = make_head_norm(config, config.num_kv_heads)

    def forward(self, x_TD: Tensor, cos_sin: Tensor | None) -> Tensor:
        q_TNH, k_TKH, v_TKH = self.project(x_TD)
        if cos_sin is not None:
            q_TNH = ops.rope(q_TNH, cos_sin, self.is_interleaved)
            k_TKH = ops.rope(k_TKH, cos_sin, self.is_interleaved)
        out_TNH = ops.attention(q_TNH, k_TKH, v_TKH, self.scale, True, self.window, self.softcap, self.alibi_slopes)
        return self.o_proj(out_TNH.view(-1, self.num_heads * self.head_size))

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_TNH, k_TKH, v_TKH before rotation, normed by head if config says; a subclass may change them here."""
        q_TNH = self.q_proj(x_TD).view(-1, self.num_heads, self.head_size)
        k_TKH = self.k_proj(x_TD).view(-1, self.num_kv_heads, self.head_size)
        v_TKH = self.v_proj(x_TD).view(-1, self.num_kv_heads, self.head_size)
        if self.has_qk_norm:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        return q_TNH, k_TKH, v_TKH
