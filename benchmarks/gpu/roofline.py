"""The serial roofline of a row: what its requests take at least when nothing runs beside anything else.

A request's linears, prompts' attention, the keys and values that its decoding reads, and the tensors between kernels,
each at about the highest rate that it reaches by itself on the GPU: the sum of their times, and its inverse in output
tokens/s. Weights are not counted where steps are full, for a step's tokens share them; they are for a single request.
"""

from typing import NamedTuple

from rows import Row

from tritium.engine.plan import Plan, Sizes, Step
from tritium.inspection.costs import Batch, Cost, step_cost

MANY = 4096  # tokens of a step in which a token's share of the weights is nothing


class Rates(NamedTuple):
    """By operations (FLOP/s) and by bytes of memory (B/s)."""

    fp8_linear: float
    linear: float
    prompts: float
    memory: float


RATES = {  # cuBLASLt at 8,192 rows, cuBLAS at 8,192^3, our prompts' attention at its best, a copy of 8 GB
    "NVIDIA H200": Rates(1500e12, 790e12, 600e12, 4.3e12),
    "NVIDIA H100 80GB HBM3": Rates(1500e12, 790e12, 600e12, 3.0e12),
}


def tokens_per_second(plan: Plan, row: Row, rates: Rates) -> float:
    """Output tokens a second; of one request alone where the row has one."""
    context = row.input_len + row.output_len // 2
    if row.max_num_seqs == 1:
        return rates.memory / sum(_cost(plan, step, 1, context).num_bytes for step in plan.steps)
    return row.output_len / sum(_seconds(plan, step, row, context, rates) for step in plan.steps)


def _seconds(plan: Plan, step: Step, row: Row, context: int, rates: Rates) -> float:
    """What a request takes in this step, over all its tokens."""
    if step.op == "paged_attention":
        prompt = _cost(plan, step, row.input_len, (row.input_len + 1) // 2)
        decoding = (row.output_len - 1) * _key_bytes(plan, step, context)
        return prompt.flops / rates.prompts + decoding / rates.memory
    tokens = row.output_len if step.phase == "rows" else row.input_len + row.output_len - 1
    cost = _cost(plan, step, MANY, 0)
    if "linear" in step.op:
        return tokens * cost.flops / MANY / (rates.fp8_linear if step.op.endswith("fp8") else rates.linear)
    return tokens * cost.num_bytes / MANY / rates.memory


def _key_bytes(plan: Plan, step: Step, context: int) -> int:
    """What one token with so many keys before it reads."""
    return _cost(plan, step, 1, context).num_bytes - _cost(plan, step, 1, 0).num_bytes


def _cost(plan: Plan, step: Step, tokens: int, context: int) -> Cost:
    sizes = Sizes(tokens=tokens, sequences=tokens, rows=tokens)
    return step_cost(plan, step, Batch(sizes=sizes, context=context))
