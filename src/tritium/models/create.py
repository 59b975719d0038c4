"""ModelConfig -> module on the meta device."""

import torch
from torch import nn

from tritium.models.config import ModelConfig
from tritium.models.decoder import Decoder


def create(config: ModelConfig, module_class: type[Decoder] = Decoder) -> nn.Module:
    """The model that `config` describes, in `config.dtype`, on the meta device: it takes no memory, whatever its size.

    Constant buffers (rotary frequencies) hold real float32 numbers. module_class: a subclass of Decoder to use instead.
    """
    with torch.device("meta"):
        module = module_class(config)
    dtype = getattr(torch, config.dtype)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.eval().requires_grad_(False)
