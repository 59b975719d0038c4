"""Sampling on a GPU without sorting: one token a row of logits.

Greedy rows take the largest logit (the lowest id of equals). Others add Gumbel noise to logit / temperature and take
the largest of that, which draws from the softmax; the noise is Philox4x32 of (seed, position, token), so a draw depends
on its own request only. top_k, top_p and min_p become a threshold, found by bisection over the bits of a float: as on
the CPU the top_k first, then the shortest front part that reaches top_p, then what is at least min_p times as likely as
the first; only that equal logits at the border are all kept.

    pending ids   resolve_ids: a negative input id -1 - slot becomes that slot's last token
    thresholds    one program a row; rows that want no limit leave at once
    choose        CHUNKS programs a row: best value and id of a part; -1 where the row has a NaN or +inf
    join          one program a row: the best part; writes the token and the slot's last token
"""

import torch
import triton
import triton.language as tl

_CHUNK = 8192
_BLOCK = 2048
GREEDY_TEMPERATURE = tl.constexpr(1e-5)


@triton.jit
def _resolve_ids_kernel(ids_ptr, last_tokens_ptr, num_tokens, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < num_tokens, other=0)
    is_pending = (i < num_tokens) & (ids < 0)
    tokens = tl.load(last_tokens_ptr - 1 - ids, mask=is_pending, other=0)
    tl.store(ids_ptr + i, tokens, mask=is_pending)


@triton.jit
def _ordered(x):
    """A float as an unsigned integer of the same order."""
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def _threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, threshold_ptr, vocab_size, stride_row,
    NUM_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The smallest ordered integer that a row keeps. NUM_BITS: how many leading bits of the logits' fp32 differ."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    kept = tl.full([], 0, tl.uint32)
    is_limited = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if is_limited & (temperature >= GREEDY_TEMPERATURE):
        logits_ptr += row * stride_row
        i = tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = tl.load(logits_ptr + start + i, mask=start + i < vocab_size, other=-float("inf")).to(tl.float32)
            largest = tl.maximum(largest, x)
        most = tl.max(largest, 0)
        if top_k > 0:
            for bit in range(NUM_BITS):
                trial = kept | (tl.full([], 0x80000000, tl.uint32) >> bit)
                count = tl.zeros([BLOCK], tl.int32)
                for start in range(0, vocab_size, BLOCK):
                    x = tl.load(logits_ptr + start + i, mask=start + i < vocab_size, other=-float("inf"))
                    count += ((_ordered(x) >= trial) & (start + i < vocab_size)).to(tl.int32)
                kept = tl.where(tl.sum(count, 0) >= top_k, trial, kept)
        if top_p < 1.0:
            mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                x = tl.load(logits_ptr + start + i, mask=start + i < vocab_size, other=-float("inf"))
                weight = tl.exp((x.to(tl.float32) - most) / temperature)
                mass += tl.where(_ordered(x) >= kept, weight, 0.0)
            wanted = tl.sum(mass, 0) * top_p
            limit = tl.full([], 0, tl.uint32)
            for bit in range(NUM_BITS):
                trial = limit | (tl.full([], 0x80000000, tl.uint32) >> bit)
                mass = tl.zeros([BLOCK], tl.float32)
                for start in range(0, vocab_size, BLOCK):
                    x = tl.load(logits_ptr + start + i, mask=start + i < vocab_size, other=-float("inf"))
                    weight = tl.exp((x.to(tl.float32) - most) / temperature)
                    mass += tl.where(_ordered(x) >= tl.maximum(trial, kept), weight, 0.0)
                limit = tl.where(tl.sum(mass, 0) >= wanted, trial, limit)
            kept = tl.maximum(kept, limit)
        if min_p > 0.0:
            kept = tl.maximum(kept, _ordered(most + temperature * tl.log(min_p)))
    tl.store(threshold_ptr + row, kept.to(tl.int64))


@triton.jit
def _choose_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, threshold_ptr, best_ptr, best_id_ptr, vocab_size, stride_row,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    kept = tl.load(threshold_ptr + row).to(tl.uint32)
    logits_ptr += row * stride_row
    is_drawn = temperature >= GREEDY_TEMPERATURE
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    num_bad = tl.zeros([BLOCK], tl.int32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, vocab_size), BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + i, mask=i < vocab_size, other=-float("inf")).to(tl.float32)
        num_bad += ((x != x) | (x == float("inf"))).to(tl.int32)
        value = x
        if is_drawn:
            zero = i * 0
            low, _, _, _ = tl.philox(seed, i, zero + position.to(tl.int32), zero, zero)
            u = (low >> 8).to(tl.float32) * 5.9604645e-08 + 2.9802322e-08
            value = tl.where(_ordered(x) >= kept, x / temperature - tl.log(-tl.log(u)), -float("inf"))
            value = tl.where(x == -float("inf"), x, value)
        is_better = value > best
        best_id = tl.where(is_better, i, best_id)
        best = tl.where(is_better, value, best)
    most = tl.max(best, 0)
    token = tl.min(tl.where(best == most, best_id, 2147483647), 0)
    token = tl.where(most > -float("inf"), token, 2147483647)
    place = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + place, tl.where(tl.sum(num_bad, 0) > 0, float("inf"), most))
    tl.store(best_id_ptr + place, token)


@triton.jit
def _join_kernel(best_ptr, best_id_ptr, slot_ptr, token_ptr, last_tokens_ptr, num_chunks, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * num_chunks + i, mask=i < num_chunks, other=-float("inf"))
    ids = tl.load(best_id_ptr + row * num_chunks + i, mask=i < num_chunks, other=2147483647)
    most = tl.max(best, 0)
    token = tl.min(tl.where(best == most, ids, 2147483647), 0).to(tl.int64)
    token = tl.where((most == float("inf")) | (token == 2147483647), -1, token)
    tl.store(token_ptr + row, token)
    tl.store(last_tokens_ptr + tl.load(slot_ptr + row), tl.maximum(token, 0))


def resolve_ids(ids_T: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """Replace each id -1 - slot by that slot's last token, in place."""
    _resolve_ids_kernel[(triton.cdiv(len(ids_T), 1024),)](ids_T, last_tokens, len(ids_T), BLOCK=1024)


class Sampling:
    """Scratch memory for `max_rows` rows, and the launches. parameters: by name, one entry a row, on the device."""

    def __init__(self, vocab_size: int, max_rows: int, parameters: dict[str, torch.Tensor]) -> None:
        self._vocab_size = vocab_size
        self._num_chunks = triton.cdiv(vocab_size, _CHUNK)
        self._parameters = parameters
        device = parameters["temperature"].device
        self._best = torch.empty(max_rows * self._num_chunks, dtype=torch.float32, device=device)
        self._best_id = torch.empty(max_rows * self._num_chunks, dtype=torch.int32, device=device)
        self._threshold = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._keep_all = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def run(
        self, logits_RV: torch.Tensor, token_R: torch.Tensor, last_tokens: torch.Tensor, *, has_limits: bool
    ) -> None:
        """A token for each row of logits, into token_R and at the row's slot of last_tokens.

        has_limits: some row has a top_k, top_p or min_p. -1 in token_R: the row's logits are not numbers.
        """
        p, num_rows, stride = self._parameters, logits_RV.shape[0], logits_RV.stride(0)
        threshold = self._keep_all
        if has_limits:
            threshold = self._threshold
            _threshold_kernel[(num_rows,)](
                logits_RV, p["temperature"], p["top_k"], p["top_p"], p["min_p"], threshold, self._vocab_size, stride,
                NUM_BITS=16 if logits_RV.dtype == torch.bfloat16 else 32, BLOCK=_BLOCK, num_warps=8,
            )  # fmt: skip
        _choose_kernel[(num_rows, self._num_chunks)](
            logits_RV, p["temperature"], p["seed"], p["position"], threshold, self._best, self._best_id,
            self._vocab_size, stride, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        _join_kernel[(num_rows,)](
            self._best, self._best_id, p["slot"], token_R, last_tokens, self._num_chunks,
            BLOCK=triton.next_power_of_2(self._num_chunks), num_warps=1,
        )  # fmt: skip
