"""ModelConfig -> module on the meta device."""

import torch
from torch import nn

from tritium.models.config import ModelConfig
from tritium.models.decoder import Decoder
from tritium.models.encoder import Encoder
from tritium.models.encoder_config import EncoderConfig


def create(config: ModelConfig, module_class: type[Decoder] = Decoder) -> nn.Module:
    """The model that `config` describes, in `config.dtype`, on the meta device: it takes no memory, whatever its size.

    Constant buffers (rotary frequencies) hold real float32 numbers. module_class: a subclass of Decoder to use instead.
    """
    with torch.device("meta"):
        module = module_class(config)
    _make_ready(module, config.dtype)
    return module


def create_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that `config` describes, in the same way."""
    with torch.device("meta"):
        module = Encoder(config)
    _make_ready(module, config.dtype)
    return module


def _make_ready(module: nn.Module, dtype: str) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    module.eval().requires_grad_(False)
