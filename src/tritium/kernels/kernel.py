"""What a kernel row says: which op it implements, where its code is, and what it promises about its numbers.

A row holds strings, not functions: `resolve` loads the code only where it is used. Behind a row stand up to four:

    bind(args, outputs, **tactic)    once per bucket of batch sizes, with the real tensors (views on the arena, whose
                                     addresses never change); calling the thunk runs the step and allocates nothing
                                     (a row with `takes_context` is bound with a third argument, a `LaunchContext`)
    supports(args) -> str | None     why the kernel cannot run these `TensorSpec`s and literals; None: it can
    supports_tactic(args, tactic) -> str | None
                                     the same of one of the row's tactics; the first is never asked about
    pack(tensor) -> object           once per weight and engine load; bind then gets the packed object instead
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch

from tritium.kernels.communicator import Communicator

Backend = Literal["cpu", "eager", "gpu"]
Scalar = bool | int | float | str
Thunk = Callable[[], object]
Bind = Callable[[Mapping[str, Any], Sequence[torch.Tensor]], Thunk]
Supports = Callable[[Mapping[str, Any]], str | None]
Tactic = dict[str, Scalar]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What is known of an argument when kernels are chosen: its dtype and sizes; None is a size of the batch."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(kw_only=True)
class LaunchContext:
    """What a launch depends on that is not in a tensor on the device: the shape of the step that is about to run.

    Whoever launches writes it before each step; thunks read it when they are called. num_decodes: sequences of one
    token, which come first in the batch (while a graph is captured: as many as it may ever have). num_prefills,
    num_prefill_tokens, num_prefill_keys, longest_prefill: the other sequences, how many tokens they have in this step,
    how many their contexts have together, this step's included, and the longest of these. communicator: connects the
    ranks that share the model; None when there is one. scratch: memory that steps share, each for itself while it runs.
    """

    num_decodes: int = 0
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    num_prefill_keys: int = 0
    longest_prefill: int = 0
    communicator: Communicator | None = None
    scratch: dict[object, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation of one op.

    name: as plans and messages write it, e.g. "cpu.rms_norm". target: "module:attribute" of its bind function.
    row_multiple: a row's bits do not depend on its neighbours as long as the number of rows is a multiple of this; the
        executor pads up to it.
    tactics: sets of keyword arguments that its bind function takes, the default first; empty: it takes none. All of
        them that `supports_tactic` does not refuse give the same bits, if `is_invariant`.
    takes_context: its bind function wants the `LaunchContext`.
    is_invariant: a row's bits do not depend on its neighbours (but for `row_multiple`).
    min_capability: the compute capability that a GPU must have.
    scratch: "module:attribute" of what says, from `TensorSpec`s, literals and the largest batch, which pieces of memory
        its launches share; see kernels/gpu/scratch.py.
    numerics: what is summed in what type and order; kernels with equal strings give equal bits.
    """

    name: str
    op: str
    backend: Backend
    target: str
    supports: str | None = None
    row_multiple: int = 1
    pack: Mapping[str, str] = field(default_factory=dict)
    tactics: tuple[Mapping[str, Scalar], ...] = ()
    supports_tactic: str | None = None
    takes_context: bool = False
    scratch: str | None = None
    numerics: str = "fp32"
    min_capability: tuple[int, int] = (0, 0)
    is_invariant: bool = True


def resolve(target: str) -> Any:
    """The object that a "module:attribute" string names."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
