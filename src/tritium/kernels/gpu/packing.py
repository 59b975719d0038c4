"""How weights lie for the GPU kernels. Loads no Triton."""

from typing import NamedTuple

import torch

from tritium.ops.quantized import steps_of

HALF = 16  # inputs of a run: in every 32 a byte holds k and k + 16


def pack_weight(qweight: torch.Tensor) -> torch.Tensor:
    """Of 4 bits: in every 32 inputs a byte holds k and k + 16, not k and k + 1: x is read in runs. Of 8: as it is."""
    if qweight.dtype == torch.int8:
        return qweight
    nibbles = torch.stack((qweight & 15, qweight >> 4), -1).flatten(1).unflatten(1, (-1, 2, HALF))
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).flatten(1)


class PackedScales(NamedTuple):
    """by_group [N, G]: fp32, or steps in int16, which count times units [N] (`ops.quantized.steps_of`)."""

    by_group: torch.Tensor
    units: torch.Tensor | None = None


def pack_scales(scales_NG: torch.Tensor) -> PackedScales:
    """Scales of 4 bits as steps. Those of 8 bits are in fp32, and stay."""
    if scales_NG.dtype == torch.float32:
        return PackedScales(scales_NG)
    units_N1, steps_NG = steps_of(scales_NG)
    return PackedScales(steps_NG.to(torch.int16), units_N1.flatten())
