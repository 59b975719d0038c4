"""What a step must do at least: bytes it moves and floating-point operations, from the sizes in the plan alone."""

from typing import NamedTuple

from tritium.engine.arena import ITEM_SIZES
from tritium.engine.plan import Extent, Plan, Ref, Sizes, Step, Value
from tritium.ops.quantized import SCALE_BYTES


class Batch(NamedTuple):
    """A batch: its sizes, and the keys that each of its tokens sees on average."""

    sizes: Sizes
    context: int


class Cost(NamedTuple):
    """num_bytes: every value read or written counted once. flops: multiply-adds count as two."""

    num_bytes: int
    flops: int


def step_cost(plan: Plan, step: Step, batch: Batch) -> Cost:
    """The least that the step costs for this batch."""
    items = [item for arg in step.args.values() for item in (arg if isinstance(arg, list) else [arg])]
    read = dict.fromkeys(item.value for item in items if isinstance(item, Ref))
    values = [plan.value(name) for name in (*read, *step.outputs)]
    share = _share_read(plan, step, batch)
    num_bytes = sum(
        int(_bytes(value, batch) * (share if len(value.shape) == 3 and value.kind == "weight" else 1))
        for value in values
        if value.kind != "kv" or step.op == "paged_attention"
    )
    if step.op in ("kv_store", "rope_kv_store"):  # it writes the new keys and values
        num_bytes += sum(_bytes(v, batch) for v in (_value(plan, step, "k_TKH"), _value(plan, step, "v_TKH")) if v)
    if step.op in ("embedding", "gather_rows"):  # of a table it reads the rows it needs
        num_bytes = 2 * sum(_bytes(plan.value(name), batch) for name in step.outputs)
    if step.op == "quantized_embedding":  # of that table too: a byte an element, and a scale a row
        out = plan.value(step.outputs[0])
        num_bytes = _bytes(out, batch) + _elements(out, batch.sizes) + SCALE_BYTES * batch.sizes.tokens
    return Cost(num_bytes, _flops(plan, step, batch))


def _flops(plan: Plan, step: Step, batch: Batch) -> int:
    outputs = [_elements(plan.value(name), batch.sizes) for name in step.outputs]
    if (weight := _value(plan, step, "weight_NK") or _value(plan, step, "qweight")) and outputs:
        num_out, num_in = (Extent.parse(dim).constant for dim in weight.shape)
        num_in *= 2 if weight.dtype == "uint8" else 1  # two 4-bit integers a byte
        rows = outputs[0] // max(1, num_out)
        return 2 * max(rows, _rows(step, batch)) * num_out * num_in
    if gate_up := _value(plan, step, "gate_up_EGD"):
        _, gate, width = (Extent.parse(dim).constant for dim in gate_up.shape)
        return 2 * _rows(step, batch) * _num_active(plan, step) * (gate + gate // 2) * width
    query = _value(plan, step, "q_TNH")
    if query and step.op in ("paged_attention", "varlen_attention"):
        return 4 * _elements(query, batch.sizes) * batch.context
    return sum(outputs)


def _value(plan: Plan, step: Step, name: str) -> Value | None:
    arg = step.args.get(name)
    return plan.value(arg.value) if isinstance(arg, Ref) else None


def _num_active(plan: Plan, step: Step) -> int:
    """Experts that a token is sent to."""
    chosen = _value(plan, step, "chosen_TJ")
    return Extent.parse(chosen.shape[1]).constant if chosen else int(step.args["top_k"])  # type: ignore[arg-type]


def _share_read(plan: Plan, step: Step, batch: Batch) -> float:
    """Of the experts' weights, at most: each token has a few."""
    gate_up = _value(plan, step, "gate_up_EGD")
    if gate_up is None:
        return 1.0
    return min(1.0, _rows(step, batch) * _num_active(plan, step) / Extent.parse(gate_up.shape[0]).constant)


def _rows(step: Step, batch: Batch) -> int:
    return batch.sizes.rows if step.phase == "rows" else batch.sizes.tokens


def _bytes(value: Value, batch: Batch) -> int:
    if value.kind == "kv":  # [blocks, 2, K, block, H]: what the sequences of this batch have stored
        per_token = 2 * int(value.shape[2]) * int(value.shape[4])
        return per_token * batch.sizes.sequences * batch.context * ITEM_SIZES[value.dtype]
    return _elements(value, batch.sizes) * ITEM_SIZES[value.dtype]


def _elements(value: Value, sizes: Sizes) -> int:
    count = 1
    for dim in value.shape:
        extent = Extent.parse(dim)
        count *= max(extent.at(sizes), 1) if extent.constant >= 0 else 1  # -1: the runtime's choice, e.g. table columns
    return count
