"""The small parts that decoders are made of: plain modules over packed tokens, written in `tritium.ops`.

Take a part, subclass it, or write your own in plain PyTorch. D model, F intermediate, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
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


class HeadsLayerNorm(nn.Module):
    """(x - mean) / std of each head of x_TNH, times that head's weight, in fp32, cast once."""

    def __init__(self, num_heads: int, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, size))
        self.eps = eps

    def forward(self, x_TNH: Tensor) -> Tensor:
        normed_TNH = F.layer_norm(x_TNH.to(torch.float32), (x_TNH.shape[-1],), None, None, self.eps)
        return (normed_TNH * self.weight.to(torch.float32)).to(x_TNH.dtype)


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


class MixtureOfExperts(nn.Module):
    """Each token's likeliest experts, gated MLPs, by the weights that a linear, the router, gives them.

    experts_gate_up: [experts, 2 F, D], the gate's rows first; experts_down: [experts, D, F].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.experts
        assert experts is not None  # make_mlp asks for it where config has experts
        self.activation, self.num_active, self.is_normed = config.activation, experts.num_active, experts.is_normed
        hidden, size = config.hidden_size, experts.intermediate_size
        self.router = Linear(hidden, experts.num_experts, bias=False)
        self.experts_gate_up = nn.Parameter(torch.randn(experts.num_experts, 2 * size, hidden) * hidden**-0.5)
        self.experts_down = nn.Parameter(torch.randn(experts.num_experts, hidden, size) * size**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        router_TE = self.router(x_TD)
        weights = (self.experts_gate_up, self.experts_down)
        return ops.moe(x_TD, router_TE, *weights, self.num_active, self.is_normed, self.activation)


class Head(nn.Module):
    """Logits, perhaps soft-capped. With tied embeddings it has no weight of its own and takes the embedding's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.embedding_size or config.hidden_size)
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


def make_head_norm(config: ModelConfig, num_heads: int) -> nn.Module:
    """The norm of queries or keys, of which there are `num_heads`."""
    if config.has_norm_per_head:
        return HeadsLayerNorm(num_heads, config.head_size, config.norm_eps)
    return NORMS[config.norm](config.head_size, config.norm_eps)


def make_mlp(config: ModelConfig, layer: int, mlp_class: type[nn.Module] | None = None) -> nn.Module:
    """`mlp_class`, or else what `config` has in this layer: experts, a gated MLP or a plain one."""
    if mlp_class is None and config.experts is not None and layer in config.experts.layers:
        mlp_class = MixtureOfExperts
    return (mlp_class or (GatedMLP if config.is_gated else MLP))(config)
