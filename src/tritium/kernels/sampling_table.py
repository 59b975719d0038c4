"""What the sampling kernels read and write: parameters by row, results by row, all in arrays made once."""

from typing import NamedTuple

import numpy as np

NO_LOGPROBS = -1


class Sampled(NamedTuple):
    """What came out, R rows. Views of the kernel's own arrays, valid until its next run.

    token_ids: int64 [R]; -1: the row has a NaN or +inf, or nothing that may be chosen.
    logprobs: float32 [R], of raw logits; NaN where none was asked for or there is no token.
    top_ids, top_logprobs: [R, num_top], likeliest first; -1 and -inf where the row wants fewer.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class SamplingTable:
    """Parameters by row, in arrays that are made once; whoever runs the sampler fills the first R entries.

    temperature: 0 takes the likeliest. top_k: 0 keeps all; top_p: 1 keeps all; min_p: 0 keeps all.
    seed, counter: choose the draw; the counter is the token's place in its request.
    num_logprobs: how many likeliest tokens are reported; 0: the chosen token's logprob alone; -1: not even that, which
        saves a pass over the row.
    num_top: width of the results for the likeliest tokens, at least max(num_logprobs) of the rows.
    """

    def __init__(self, max_rows: int) -> None:
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.min_p = np.zeros(max_rows, np.float32)
        self.seed = np.zeros(max_rows, np.uint64)
        self.counter = np.zeros(max_rows, np.uint64)
        self.num_logprobs = np.full(max_rows, NO_LOGPROBS, np.int32)
        self.num_top = 0
        self.banned_begin = np.zeros(max_rows, np.int32)
        self.banned_count = np.zeros(max_rows, np.int32)
        self.banned_ids = np.zeros(64, np.int32)
        self._num_banned = 0

    def ban(self, row: int, token_ids: np.ndarray | list[int]) -> None:
        """These tokens cannot be chosen in `row` until `clear_bans`; ids outside the vocabulary are ignored."""
        begin, end = self._num_banned, self._num_banned + len(token_ids)
        if end > len(self.banned_ids):
            self.banned_ids = np.concatenate([self.banned_ids, np.zeros(end, np.int32)])
        self.banned_ids[begin:end] = token_ids
        self.banned_begin[row], self.banned_count[row], self._num_banned = begin, len(token_ids), end

    def clear_bans(self) -> None:
        """No token is banned in any row."""
        if self._num_banned:
            self.banned_count[:] = 0
            self._num_banned = 0
