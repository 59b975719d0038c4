"""Chooses tokens on the GPU for requests that ask only for what its kernels do: temperature, top_k, top_p, min_p, seed.

Parameters are kept per slot and gathered in row order into the host twins of the kernel's arrays, which travel with the
plan's inputs. `is_plain` says whether a request can be served so; a batch with another one goes through the host's
sampler, which knows everything, and waits for it.
"""

from dataclasses import fields

import numpy as np
import torch

from tritium.kernels.gpu.sampling import Sampling, resolve_ids
from tritium.runtime.batch import BatchLayout
from tritium.runtime.request import Request
from tritium.sampling_params import SamplingParams

_FREE = frozenset({  # what needs nothing of the sampler, or what its kernels do
    "temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "stop", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "detokenize", "truncate_prompt_tokens",
})  # fmt: skip
_DEFAULTS = SamplingParams()
_OTHERS = tuple(f.name for f in fields(SamplingParams) if f.name not in _FREE)
_DTYPES = {
    "temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32,
    "seed": torch.int64, "position": torch.int64, "slot": torch.int64,
}  # fmt: skip


def is_plain(params: SamplingParams) -> bool:
    """Nothing is asked of the sampler but temperature, top_k, top_p, min_p and seed."""
    return all(getattr(params, name) == getattr(_DEFAULTS, name) for name in _OTHERS)


class GpuSampler:
    """Owns the parameters of every slot, and each slot's last token on the device."""

    def __init__(self, vocab_size: int, max_rows: int, max_slots: int) -> None:
        """max_rows: rows of a padded step; rows behind a batch's own write into a slot of their own, `max_slots`."""
        self.host = {f"sample.{name}": torch.zeros(max_rows, dtype=dtype) for name, dtype in _DTYPES.items()}
        self._rows = {name: self.host[f"sample.{name}"].numpy() for name in _DTYPES}
        self._slots = {name: np.zeros(max_slots + 1, rows.dtype) for name, rows in self._rows.items()}
        self._is_plain = np.zeros(max_slots + 1, bool)
        self._vocab_size, self._max_slots = vocab_size, max_slots
        self._sampling: Sampling | None = None

    def attach(self, tensors: dict[str, torch.Tensor]) -> None:
        """tensors: the device twins of `host`, among others."""
        parameters = {name: tensors[f"sample.{name}"] for name in _DTYPES}
        device, num_rows = parameters["slot"].device, len(parameters["slot"])
        self.last_tokens = torch.zeros(self._max_slots + 1, dtype=torch.int64, device=device)
        self._sampling = Sampling(self._vocab_size, num_rows, parameters)

    def close(self) -> None:
        """Give the device's memory back: nothing may be sampled after it."""
        self._sampling = None
        del self.last_tokens

    def admit(self, slot: int, request: Request) -> None:
        """A request received this slot: note how it wants its tokens chosen."""
        params, slots = request.params, self._slots
        slots["temperature"][slot] = 0.0 if params.is_greedy else params.temperature
        slots["top_k"][slot] = params.top_k if params.top_k < self._vocab_size else 0
        slots["top_p"][slot], slots["min_p"][slot] = params.top_p, params.min_p
        slots["seed"][slot] = np.uint64(params.seed or 0).astype(np.int64)
        self._is_plain[slot] = is_plain(params)

    def gather(self, layout: BatchLayout) -> None:
        """Write the rows' parameters into `host`."""
        num_rows = layout.num_rows
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            self._rows[name][:num_rows] = self._slots[name][layout.row_slots]
        self._rows["position"][:num_rows] = layout.row_positions
        self._rows["slot"][:num_rows] = layout.row_slots

    def can_sample(self, layout: BatchLayout) -> bool:
        """Every sampled row is plain."""
        return bool(self.plain_rows(layout).all())

    def plain_rows(self, layout: BatchLayout) -> np.ndarray:
        """By sampled row: it is plain."""
        return self._is_plain[layout.row_slots]

    def sample(self, logits_RV: torch.Tensor, layout: BatchLayout, tokens: torch.Tensor) -> None:
        """Launch the kernels for the batch's rows; token ids into `tokens`, -1 where the logits are not numbers.

        tokens: int64, one a row; pinned host memory, which the kernel writes itself: no copy waits its turn behind it.
        """
        assert self._sampling is not None
        rows, num_rows = self._rows, layout.num_rows
        is_limited = (rows["top_k"][:num_rows] > 0) | (rows["top_p"][:num_rows] < 1) | (rows["min_p"][:num_rows] > 0)
        self._sampling.run(logits_RV[:num_rows], tokens, self.last_tokens, has_limits=bool(is_limited.any()))

    def resolve(self, ids_T: torch.Tensor) -> None:
        """Launch: ids -1 - slot become the slot's last token."""
        resolve_ids(ids_T, self.last_tokens)
