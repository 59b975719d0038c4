"""What one request changes about its logits before a token is chosen: sparse, kept as long as the request runs.

Applied to a row in this order (docs/sampling.md gives formulas and sources): `processed` takes the row's place; bias is
added; the penalties change tokens seen before; what is not allowed, then what is banned, becomes -inf. The sums of one
token are made in double and rounded once, so that compiled and torch code agree.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_SPARSE = ("bias", "allowed", "seen", "banned")


class EditsStruct(ctypes.Structure):
    """csrc/logit_edits.h LogitEdits."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (*(f"{n}_ids" for n in _SPARSE), "bias_values", "seen_counts", "processed")
        ),
        *((f"num_{name}", ctypes.c_int64) for name in _SPARSE),
        *((name, ctypes.c_float) for name in ("repetition", "frequency", "presence")),
    ]


class LogitEdits:
    """Costs a step nothing but what changed in it: one `count` a token, `ban` and `process` where they are used.

    repetition, frequency, presence: the penalties; 1, 0, 0 change nothing.
    bias: token id to what is added. allowed_ids: None allows all.
    seen_ids, seen_counts: int32; tokens of prompt and output, each once, and how often the output has it. The first
        `num_seen` entries count; the arrays are replaced when they grow.
    banned_ids: always banned; see `ban`. processed: float32 [V], or None: the row as the model gave it.
    address: of the struct that compiled code reads; constant.
    """

    def __init__(
        self,
        *,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        bias: Mapping[int, float] | None = None,
        allowed_ids: Iterable[int] | None = None,
        banned_ids: Sequence[int] = (),
    ) -> None:
        self.repetition, self.frequency, self.presence = map(np.float32, (repetition, frequency, presence))
        self.bias_ids = np.array(list(bias or ()), np.int32)
        self.bias_values = np.array(list((bias or {}).values()), np.float32)
        self.allowed_ids = None if allowed_ids is None else np.unique(np.array(list(allowed_ids), np.int32))
        self._banned = np.array(banned_ids, np.int32)
        self._num_always = self._num_banned = len(banned_ids)
        self.processed: np.ndarray | None = None
        self._places: dict[int, int] = {}
        self._struct = EditsStruct(repetition=self.repetition, frequency=self.frequency, presence=self.presence)
        self.address = ctypes.addressof(self._struct)
        self._set_seen(np.empty(0, np.int32), np.empty(0, np.int32))
        self._point("banned_ids", self._banned, "num_banned")
        self._point("bias_ids", self.bias_ids, "num_bias")
        self._point("bias_values", self.bias_values)
        if self.allowed_ids is not None:
            self._point("allowed_ids", self.allowed_ids, "num_allowed")

    @property
    def num_seen(self) -> int:
        """Different tokens seen."""
        return len(self._places)

    def see_prompt(self, token_ids: Iterable[int]) -> None:
        """The prompt's tokens, before any output is counted."""
        seen_ids = np.unique(np.fromiter(token_ids, np.int32))
        self._places = {token_id: place for place, token_id in enumerate(seen_ids.tolist())}
        self._set_seen(seen_ids, np.zeros(len(seen_ids), np.int32))

    def count(self, token_id: int) -> None:
        """One more output token."""
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            if place == len(self.seen_ids):
                room = np.zeros(max(32, place), np.int32)
                self._set_seen(np.concatenate([self.seen_ids, room]), np.concatenate([self.seen_counts, room]))
            self._ids_view[place] = token_id
            self._struct.num_seen = place + 1
        self._counts_view[place] += 1

    @property
    def banned_ids(self) -> np.ndarray:
        """int32: those that are always banned, and what `ban` was last given."""
        return self._banned[: self._num_banned]

    def ban(self, token_ids: Sequence[int]) -> None:
        """These cannot be chosen either, until the next call."""
        count = self._num_always + len(token_ids)
        if count == self._num_banned == self._num_always:
            return
        if count > len(self._banned):
            self._banned = np.concatenate([self._banned, np.zeros(count, np.int32)])
            self._point("banned_ids", self._banned)
        self._banned[self._num_always : count] = token_ids
        self._num_banned = self._struct.num_banned = count

    def process(self, row_V: np.ndarray | None) -> None:
        """A dense float32 row in place of the model's own, until the next call; logprobs stay the model's."""
        self.processed = row_V
        self._struct.processed = None if row_V is None else row_V.ctypes.data

    def _set_seen(self, seen_ids: np.ndarray, seen_counts: np.ndarray) -> None:
        self.seen_ids, self.seen_counts = seen_ids, seen_counts
        self._ids_view, self._counts_view = memoryview(seen_ids), memoryview(seen_counts)  # type: ignore[arg-type]
        self._point("seen_ids", seen_ids)
        self._point("seen_counts", seen_counts)
        self._struct.num_seen = len(self._places)

    def _point(self, name: str, array: np.ndarray, size_name: str | None = None) -> None:
        setattr(self._struct, name, array.ctypes.data)
        if size_name is not None:
            setattr(self._struct, size_name, len(array))
