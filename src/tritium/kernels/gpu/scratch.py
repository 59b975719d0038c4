"""What GPU kernels leave for each other between the launches of one step: how much that is, and whose.

A piece belongs to the launch context, and so to one executor, whose steps run one after the other: all layers share it,
two engines never do, and it goes when the executor is closed. A piece never moves, nor is one given back before that,
for graphs hold the addresses. `Kernel.scratch` names the function below that says, from the plan alone, which pieces a
row's kernels take; they take no others. Needs no triton.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from tritium.kernels.gpu.tactics import has_hopper_prompts
from tritium.kernels.kernel import LaunchContext

HOPPER_BYTES = 256 << 20  # of keys and values of a step's prompts, in the order that the tensor cores read
TURNS_BYTES = 16  # behind them: how many blocks have been taken
SPLITS = 16  # parts of a context
SPLIT_BELOW = 264  # programs: two an SM of an H100; fewer leave the context to be read by a part of the machine
FEW_ROWS = 64  # of a quantised linear whose inputs several programs may share
PROGRAMS = 264  # that share them: two an SM of an H100
# A CTA's part of a context leaves up to 16 heads of 256 numbers of 16 bits and two statistics each: 9 KB a CTA, and
# contexts are only read in parts while there are fewer CTAs than SMs.
FLASHINFER_BYTES = 4 << 20
FLASHINFER_SEMAPHORES = 1024  # more than a GPU has SMs
_HOPPER = (9, 0)


class Piece(NamedTuple):
    """Memory for `length` numbers. Kernels that ask for equal pieces share one."""

    name: str
    length: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.length * self.dtype.itemsize


class Batch(NamedTuple):
    """The largest that a plan is laid out for, and the GPU's compute capability; None: not known, any."""

    tokens: int
    sequences: int
    capability: tuple[int, int] | None = None


def take(context: LaunchContext | None, piece: Piece, device: torch.device) -> torch.Tensor:
    """The piece of this context, [length], zeros when it is first taken. None: one of the caller's own."""
    kept = context.scratch if context is not None else {}
    if piece not in kept:
        kept[piece] = torch.zeros(piece.length, dtype=piece.dtype, device=device)
    return kept[piece]


def hopper() -> Piece:
    """What gather_keys.cu leaves for prefill.cu."""
    return Piece("prompts' keys", HOPPER_BYTES + TURNS_BYTES, torch.uint8)


def most_split(num_sequences: int, num_kv_heads: int, split_below: int = SPLIT_BELOW) -> int:
    """Sequences of one token up to which contexts are read in parts."""
    return min(num_sequences, split_below // num_kv_heads)


def partials(num_sequences: int, num_heads: int, head_size: int) -> Piece:
    """What `SPLITS` parts of so many contexts leave: a sum, padded to a power of 2, and two statistics each."""
    head_block = max(16, 1 << (head_size - 1).bit_length())
    return Piece("contexts' parts", num_sequences * num_heads * SPLITS * (head_block + 2), torch.float32)


def sums() -> Piece:
    """What the programs that share a quantised linear's inputs leave."""
    return Piece("shared inputs' sums", FEW_ROWS * 2 * PROGRAMS * 64, torch.float32)


def flashinfer() -> tuple[Piece, Piece]:
    """XQA's workspace, and the semaphores that it counts up and down to zero again."""
    return (
        Piece("XQA's workspace", FLASHINFER_BYTES, torch.uint8),
        Piece("XQA's semaphores", FLASHINFER_SEMAPHORES, torch.int32),
    )


def experts(num_choices: int, num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> dict[str, Piece]:
    """By the names of moe.py's `Scratch`: by choice, by expert, by tile."""
    counts = {
        "chosen": (num_choices, torch.int32),
        "weights": (num_choices, torch.float32),
        "order": (num_choices, torch.int32),
        "counts": (num_experts, torch.int32),
        "tiles": (3 * (num_choices + num_experts), torch.int32),
        "hidden": (num_choices * hidden, dtype),
        "parts": (num_choices * width, dtype),
    }
    return {name: Piece(f"experts' {name}", count, dtype) for name, (count, dtype) in counts.items()}


def of_attention(args: Mapping[str, Any], batch: Batch) -> set[Piece]:
    """Of attention.py, untuned."""
    pieces = of_own_singles(args, batch)
    if batch.capability in (None, _HOPPER) and has_hopper_prompts(args):
        pieces.add(hopper())
    return pieces


def of_own_singles(args: Mapping[str, Any], batch: Batch) -> set[Piece]:
    """Of attention.py where another kernel computes prompts."""
    num_heads, head_size = args["q_TNH"].shape[1:]
    return {partials(most_split(batch.sequences, args["cache_layer"].shape[2]), num_heads, head_size)}


def of_flashinfer(args: Mapping[str, Any], batch: Batch) -> set[Piece]:
    """Of attention_flashinfer.py."""
    return {*of_attention(args, batch), *flashinfer()}


def of_quantized(args: Mapping[str, Any], batch: Batch) -> set[Piece]:
    """Of quantized.py where inputs may be shared."""
    return {sums()}


def of_experts(args: Mapping[str, Any], batch: Batch) -> set[Piece]:
    """Of moe.py, for batches of every power of two of tokens: together less than twice the largest's."""
    top_k = args["top_k"] if "top_k" in args else args["chosen_TJ"].shape[1]
    num_experts, width, hidden = args["down_EDF"].shape
    sizes = (top_k << exponent for exponent in range((batch.tokens - 1).bit_length() + 1))
    each = (experts(size, num_experts, hidden, width, args["x_TD"].dtype) for size in sizes)
    return {piece for pieces in each for piece in pieces.values()}
