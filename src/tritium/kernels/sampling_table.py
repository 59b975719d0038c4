"""What the sampling kernels read and write: parameters by row, results by row, all in arrays made once."""

from typing import NamedTuple

import numpy as np

from tritium.kernels.logit_edits import LogitEdits

NO_LOGPROBS = -1
NOT_FORCED = -1


class Sampled(NamedTuple):
    """What came out, R rows. Views of the kernel's own arrays, valid until its next run.

    token_ids: int64 [R]; -1: the row has a NaN or +inf, or nothing that may be chosen.
    logprobs: float32 [R], of the model's own logits; NaN where none was asked for or there is no token.
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
    forced: the token to take whatever the logits say, for its logprob; -1: choose one.
    edits, edits_at: what the row's request changes about its logits, and the same as an address; write them by `edit`.
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
        self.forced = np.full(max_rows, NOT_FORCED, np.int32)
        self.edits: list[LogitEdits | None] = [None] * max_rows
        self.edits_at = np.zeros(max_rows, np.uint64)

    def edit(self, row: int, edits: LogitEdits | None) -> None:
        """Apply these edits in `row`, from now on; None: none."""
        self.edits[row] = edits
        self.edits_at[row] = 0 if edits is None else edits.address
