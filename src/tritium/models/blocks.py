"""Decoder layers: how attention, MLP, norms and residual sums lie. T tokens, D model."""

from typing import ClassVar

from torch import Tensor, nn

from tritium.models.attention import Attention
from tritium.models.config import ModelConfig
from tritium.models.parts import make_mlp, make_norm


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). A subclass changes a part by naming its class."""

    attention_class: ClassVar[type[nn.Module]] = Attention
    mlp_class: ClassVar[type[nn.Module] | None] = None  # None: what config says

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = self.attention_class(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config, layer, self.mlp_class)

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


class PostNormDecoderBlock(DecoderBlock):
    """norm(x + attention(x)), then norm(x + mlp(x)) (OPT-350m)."""

    def forward(self, x_TD: Tensor, cos_sin: Tensor | None) -> Tensor:
        x_TD = self.attention_norm(x_TD + self.attention(x_TD, cos_sin))
        return self.mlp_norm(x_TD + self.mlp(x_TD))


class TwoNormParallelDecoderBlock(DecoderBlock):
    """x + attention(norm(x)) + mlp(norm(x)), a norm for each (GPT-NeoX, Falcon 40B)."""

    def forward(self, x_TD: Tensor, cos_sin: Tensor | None) -> Tensor:
        return self.attention(self.attention_norm(x_TD), cos_sin) + self.mlp(self.mlp_norm(x_TD)) + x_TD


class ParallelDecoderBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), one norm for both (GPT-J)."""

    attention_class: ClassVar[type[nn.Module]] = Attention
    mlp_class: ClassVar[type[nn.Module] | None] = None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.attention = self.attention_class(config, layer)
        self.mlp = make_mlp(config, layer, self.mlp_class)

    def forward(self, x_TD: Tensor, cos_sin: Tensor | None) -> Tensor:
        h_TD = self.norm(x_TD)
        return self.attention(h_TD, cos_sin) + self.mlp(h_TD) + x_TD


BLOCK_CLASSES: dict[str, type[nn.Module]] = {
    "pre_norm": DecoderBlock,
    "post_norm": PostNormDecoderBlock,
    "sandwich": SandwichDecoderBlock,
    "parallel": ParallelDecoderBlock,
    "parallel_two_norms": TwoNormParallelDecoderBlock,
}
