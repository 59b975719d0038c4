"""How weights lie for the GPU kernels. Loads no Triton."""

import torch

HALF = 16  # inputs of a run: in every 32 a byte holds k and k + 16


def pack_weight(qweight: torch.Tensor) -> torch.Tensor:
    """Of 4 bits: in every 32 inputs a byte holds k and k + 16, not k and k + 1: x is read in runs. Of 8: as it is."""
    if qweight.dtype == torch.int8:
        return qweight
    nibbles = torch.stack((qweight & 15, qweight >> 4), -1).flatten(1).unflatten(1, (-1, 2, HALF))
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).flatten(1)
