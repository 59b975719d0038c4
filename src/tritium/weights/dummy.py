"""Weights without a checkpoint: for timing any model shape."""

import hashlib
import math
from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from tritium.errors import CheckpointError
from tritium.weights.recipes import Checkpoint, Concat, Constant, Quantized, Recipe, Reshape, Scales, leaves
from tritium.weights.source import TensorSpec, missing_tensor

BLOCK_LEN = 131_071  # a prime, so that the rows of a matrix start at different places of the block
SCALE_ENDS = ("_scales", ".scales")  # of the names of what quantised weights are multiplied by
# Of a quantised weight's numbers: e4m3 up to 448 and int8 up to 127, at random like any weight; nibbles, all alike.
NUMBERS_STD = {"fp8": 64.0, "int8": 32.0, "int4": 4.61}
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
        if name.endswith(SCALE_ENDS) and (scale := self._scale(name)) is not None:
            return torch.full(shape, scale, dtype=getattr(torch, dtype), device=device)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        offset = int.from_bytes(digest[:8], "little") % BLOCK_LEN
        mean, std = (0.0, 1 / math.sqrt(shape[-1])) if len(shape) > 1 else (0.0, 0.02) if "bias" in name else (1.0, 0.1)
        if dtype in ("float8_e4m3fn", "int8"):
            std = NUMBERS_STD["fp8" if dtype == "float8_e4m3fn" else dtype]
        count = math.prod(shape)
        numbers = self._twice[offset : offset + min(count, BLOCK_LEN)].numpy() * np.float32(std) + np.float32(mean)
        if dtype == "int8":
            numbers = np.clip(np.rint(numbers), -127, 127)
        if dtype == "uint8":  # two nibbles each
            numbers = np.random.default_rng(offset).integers(0, 256, len(numbers), np.uint8)
        block = torch.from_numpy(numbers).to(getattr(torch, dtype))
        return (_repeat(block, count) if device is None else _repeat_on(block.to(device), count)).view(shape)

    def _scale(self, name: str) -> float | None:
        """What makes a weight of the usual standard deviation of the numbers that this is the scale of."""
        for kind, std in NUMBERS_STD.items():
            end = f".{kind}"
            for numbers in (name.removesuffix("_scales"), name.removesuffix(".scales") + end):
                if numbers.endswith(end) and numbers in self._specs:
                    num_in = self._specs[numbers].shape[-1] * (2 if kind == "int4" else 1)
                    return 1 / (std * math.sqrt(num_in))
        return None


def is_kept_of_dummies(tree: Recipe, device: str = "cpu") -> bool:
    """True for constants, and for quantised weights, which are computed of generated ones when the engine is built; a
    GPU generates those itself."""
    if isinstance(tree, Concat):
        return is_kept_of_dummies(tree.parts[0], device)
    if isinstance(tree, Reshape):
        return is_kept_of_dummies(tree.of, device)
    if isinstance(tree, (Scales, Quantized)):
        return device != "cuda"
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
