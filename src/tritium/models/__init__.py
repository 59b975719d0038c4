"""Model definitions: plain modules over packed tokens, and the table of families they serve."""

from tritium.models.attention import Attention
from tritium.models.blocks import (
    DecoderBlock,
    ParallelDecoderBlock,
    PostNormDecoderBlock,
    SandwichDecoderBlock,
    TwoNormParallelDecoderBlock,
)
from tritium.models.checkpoint import Naming, constants, weight_recipes
from tritium.models.config import ExpertsConfig, ModelConfig
from tritium.models.create import create, create_encoder
from tritium.models.decoder import Decoder
from tritium.models.encoder import Encoder
from tritium.models.encoder_config import EncoderConfig
from tritium.models.encoder_presets import ENCODER_PRESETS, encoder_preset
from tritium.models.gguf_config import gguf_special_tokens, read_gguf_config
from tritium.models.hf_config import parse_config, read_config, read_encoder_config
from tritium.models.parts import (
    MLP,
    Embedding,
    GatedMLP,
    Head,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    OffsetRMSNorm,
    RMSNorm,
)
from tritium.models.presets import PRESETS, preset
from tritium.models.rope_config import RopeConfig

__all__ = [
    "ENCODER_PRESETS",
    "MLP",
    "PRESETS",
    "Attention",
    "Decoder",
    "DecoderBlock",
    "Embedding",
    "Encoder",
    "EncoderConfig",
    "ExpertsConfig",
    "GatedMLP",
    "Head",
    "LayerNorm",
    "Linear",
    "MixtureOfExperts",
    "ModelConfig",
    "Naming",
    "OffsetRMSNorm",
    "ParallelDecoderBlock",
    "PostNormDecoderBlock",
    "RMSNorm",
    "RopeConfig",
    "SandwichDecoderBlock",
    "TwoNormParallelDecoderBlock",
    "constants",
    "create",
    "create_encoder",
    "encoder_preset",
    "gguf_special_tokens",
    "parse_config",
    "preset",
    "read_config",
    "read_encoder_config",
    "read_gguf_config",
    "weight_recipes",
]
