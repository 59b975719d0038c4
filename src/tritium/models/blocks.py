"""The parts that decoders are made of: plain modules over packed tokens, written in `tritium.ops`.

No cache, no batch axis, no masks: attention is the stateless op over one sequence, and the compiler adds the rest.
Take a part, subclass it, or write your own in plain PyTorch.

T tokens, D model, N heads, K kv heads, H head size, F intermediate, P rotary pairs, V vocabulary.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tritium import ops
from tritium.models.config import ModelConfig


class Linear(nn.Linear):
    """x · weightᵀ + bias; weight is [out, in]."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Rows of weight_VD by id."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.embedding(input, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x), cast back to x's dtype, times weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """x / rms(x) times (1 + weight), cast once (Gemma)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, 1.0, False)


class LayerNorm(nn.Module):
    """(x - mean) / std · weight + bias."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention: grouped kv heads, rotary positions if any, a sliding window if the layer has one."""

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
        self.has_qk_norm = config.has_qk_norm
        if self.has_qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps)

    def forward(self, x_TD: Tensor, cos_sin: Tensor | None) -> Tensor:
        q_TNH, k_TKH, v_TKH = self.project(x_TD)
        if cos_sin is not None:
            q_TNH = ops.rope(q_TNH, cos_sin, self.is_interleaved)
            k_TKH = ops.rope(k_TKH, cos_sin, self.is_interleaved)
        out_TNH = ops.attention(q_TNH, k_TKH, v_TKH, self.scale, window=self.window, softcap=self.softcap)
        return self.o_proj(out_TNH.view(-1, self.num_heads * self.head_size))

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_TNH, k_TKH, v_TKH before rotation, normed by head if config says; a subclass may change them here."""
        q_TNH = self.q_proj(x_TD).view(-1, self.num_heads, self.head_size)
        k_TKH = self.k_proj(x_TD).view(-1, self.num_kv_heads, self.head_size)
        v_TKH = self.v_proj(x_TD).view(-1, self.num_kv_heads, self.head_size)
        if self.has_qk_norm:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        return q_TNH, k_TKH, v_TKH


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.has_mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.has_mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.has_mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(ops.gated_activation(self.gate_proj(x_TD), self.up_proj(x_TD), self.activation))


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.has_mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.has_mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(ops.activation(self.up_proj(x_TD), self.activation))


class Head(nn.Module):
    """Logits, perhaps soft-capped. With tied embeddings it has no weight of its own and takes the embedding's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.weight = None if config.tie_word_embeddings else nn.Parameter(torch.randn(shape) * shape[1] ** -0.5)
        self.bias = nn.Parameter(torch.zeros(shape[0])) if config.has_lm_head_bias else None
        self.softcap = config.logit_softcap

    def forward(self, x_TD: Tensor, embedding_VD: Tensor) -> Tensor:
        logits_TV = ops.linear(x_TD, embedding_VD if self.weight is None else self.weight, self.bias)
        return torch.tanh(logits_TV / self.softcap) * self.softcap if self.softcap else logits_TV


NORMS: dict[str, type[nn.Module]] = {
    "rms_norm": RMSNorm,
    "offset_rms_norm": OffsetRMSNorm,
    "layer_norm": LayerNorm,
}


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that `config.norm` names."""
    return NORMS[config.norm](config.hidden_size, config.norm_eps)


def make_mlp(config: ModelConfig, mlp_class: type[nn.Module] | None = None) -> nn.Module:
    """`mlp_class`, or else the MLP that `config.is_gated` names."""
    return (mlp_class or (GatedMLP if config.is_gated else MLP))(config)


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). A subclass changes a part by naming its class."""

    attention_class: ClassVar[type[nn.Module]] = Attention
    mlp_class: ClassVar[type[nn.Module] | None] = None  # None: GatedMLP or MLP, as config says

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = self.attention_class(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config, self.mlp_class)

    def forward(self, x_TD: Tensor, cos_sin: Tensor | None) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), cos_sin)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class SandwichDecoderBlock(DecoderBlock):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): a norm before and after each part (Gemma 2)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_post_norm, self.mlp_post_norm = make_norm(config), make_norm(config)

    def forward(self, x_TD: Tensor, cos_sin: Tensor | None) -> Tensor:
        x_TD = x_TD + self.attention_post_norm(self.attention(self.attention_norm(x_TD), cos_sin))
        return x_TD + self.mlp_post_norm(self.mlp(self.mlp_norm(x_TD)))


class ParallelDecoderBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), one norm for both (GPT-J)."""

    attention_class: ClassVar[type[nn.Module]] = Attention
    mlp_class: ClassVar[type[nn.Module] | None] = None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.attention = self.attention_class(config, layer)
        self.mlp = make_mlp(config, self.mlp_class)

    def forward(self, x_TD: Tensor, cos_sin: Tensor | None) -> Tensor:
        h_TD = self.norm(x_TD)
        return self.attention(h_TD, cos_sin) + self.mlp(h_TD) + x_TD


def block_for(config: ModelConfig) -> type[nn.Module]:
    """The layer that `config` names."""
    if config.is_parallel:
        return ParallelDecoderBlock
    return SandwichDecoderBlock if config.has_post_norms else DecoderBlock
