"""Weights without a checkpoint: for timing any model shape."""

import hashlib
import math
from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from tritium.errors import CheckpointError
from tritium.quant.schemes import FP8
from tritium.weights.recipes import Checkpoint, Concat, Constant, Quantized, Recipe, Reshape, Scales, leaves
from tritium.weights.source import TensorSpec, missing_tensor

BLOCK_LEN = 131_071  # a prime, so that the rows of a matrix start at different places of the block
FP8_SCALES = ".fp8_scales"
FP8_STD = 64.0  # of e4m3 numbers up to 448: seven standard deviations
SMALLEST = 0.02  # of the standard deviation: keeps zeros and denormals out, in fp16 too


class DummySource:
    """Random tensors of realistic scale, the same for the same (seed, name, shape) in any order and on any run.

    Linears and embeddings have a standard deviation of 1 / sqrt(last dimension), norm weights lie around 1, biases have
    0.02. One block of normal numbers is drawn once; a tensor is that block from an offset of its own, scaled, repeated:
    1.2 billion bf16 numbers take one or two seconds. No element is zero or denormal.
    """

    def __init__(self, specs: dict[str, TensorSpec], seed: int = 0) -> None:
        self._specs, self._seed = specs, seed
        noise = torch.randn(BLOCK_LEN, generator=torch.Generator().manual_seed(seed))
        block = noise + SMALLEST * torch.where(noise < 0, -1.0, 1.0)
        self._twice = torch.cat((block, block))  # a block from any offset is one slice of it

    @classmethod
    def for_recipes(cls, recipes: Iterable[Recipe], dtype: str, seed: int = 0) -> "DummySource":
        """A source with every checkpoint tensor these recipes ask for, in `dtype`."""
        specs = {}
        for recipe in recipes:
            for leaf in leaves(recipe):
                if isinstance(leaf, Checkpoint):
                    if leaf.shape is None:
                        raise CheckpointError(f"dummy weights: the recipe of {leaf.name!r} does not say its shape")
                    specs[leaf.name] = TensorSpec(dtype, leaf.shape)
        return cls(specs, seed)

    @property
    def names(self) -> Collection[str]:
        return self._specs.keys()

    def where(self, name: str) -> str:
        return "dummy weights"

    def spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            raise missing_tensor(name, "dummy weights", self.names)
        return self._specs[name]

    def get(self, name: str, device: torch.device | None = None) -> Tensor:
        """The tensor, with the same numbers on every device; None is the CPU."""
        dtype, shape = self.spec(name)
        if name.endswith(FP8_SCALES):  # with what `.fp8` holds, a weight of the usual standard deviation
            num_in = self._specs[name.removesuffix(FP8_SCALES) + ".fp8"].shape[-1]
            return torch.full(shape, 1 / (FP8_STD * math.sqrt(num_in)), device=device)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        offset = int.from_bytes(digest[:8], "little") % BLOCK_LEN
        mean, std = (0.0, 1 / math.sqrt(shape[-1])) if len(shape) > 1 else (0.0, 0.02) if "bias" in name else (1.0, 0.1)
        if dtype == "float8_e4m3fn":
            std = FP8_STD
        count = math.prod(shape)
        numbers = self._twice[offset : offset + min(count, BLOCK_LEN)].numpy() * np.float32(std) + np.float32(mean)
        block = torch.from_numpy(numbers).to(getattr(torch, dtype))
        return (_repeat(block, count) if device is None else _repeat_on(block.to(device), count)).view(shape)


def is_kept_of_dummies(tree: Recipe) -> bool:
    """True for constants, and for quantised weights, which are computed of generated ones when the engine is built:
    but those in fp8, which a GPU can generate itself."""
    if isinstance(tree, Concat):
        return is_kept_of_dummies(tree.parts[0])
    if isinstance(tree, Reshape):
        return is_kept_of_dummies(tree.of)
    if isinstance(tree, (Scales, Quantized)):
        return tree.format != FP8
    return isinstance(tree, Constant)


def _repeat(block: Tensor, count: int) -> Tensor:
    """`count` elements: the block over and over. Copied as raw bytes by numpy, which needs no thread pool for it."""
    out = torch.empty(count, dtype=block.dtype)
    raw, piece = out.view(torch.uint8).numpy(), block.view(torch.uint8).numpy()
    whole = len(raw) // len(piece) * len(piece)
    raw[:whole].reshape(-1, len(piece))[:] = piece
    raw[whole:] = piece[: len(raw) - whole]
    return out


def _repeat_on(block: Tensor, count: int) -> Tensor:
    """`_repeat` by torch, for a block on a GPU."""
    out = torch.empty(count, dtype=block.dtype, device=block.device)
    whole = count // len(block) * len(block)
    out[:whole].view(-1, len(block))[:] = block
    out[whole:] = block[: count - whole]
    return out
