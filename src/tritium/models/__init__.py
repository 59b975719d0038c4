"""Model definitions: plain modules over packed tokens, and the table of families they serve."""

from tritium.models.blocks import (
    MLP,
    Attention,
    DecoderBlock,
    Embedding,
    GatedMLP,
    Head,
    LayerNorm,
    Linear,
    OffsetRMSNorm,
    ParallelDecoderBlock,
    RMSNorm,
    SandwichDecoderBlock,
)
from tritium.models.checkpoint import Naming, constants, weight_recipes
from tritium.models.config import ModelConfig, RopeConfig
from tritium.models.create import create
from tritium.models.decoder import Decoder
from tritium.models.hf_config import parse_config, read_config
from tritium.models.presets import PRESETS, preset

__all__ = [
    "MLP",
    "PRESETS",
    "Attention",
    "Decoder",
    "DecoderBlock",
    "Embedding",
    "GatedMLP",
    "Head",
    "LayerNorm",
    "Linear",
    "ModelConfig",
    "Naming",
    "OffsetRMSNorm",
    "ParallelDecoderBlock",
    "RMSNorm",
    "RopeConfig",
    "SandwichDecoderBlock",
    "constants",
    "create",
    "parse_config",
    "preset",
    "read_config",
    "weight_recipes",
]
