"""The memory plan: no two values that are needed at once share a byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.engine.arena import ALIGNMENT, find_lifetimes, plan_arena
from tritium.engine.plan import Plan, Ref, Sizes, Step, Value
from tritium.errors import EngineError

SHAPES = st.sampled_from([("T", 3), ("T", 700), ("R", 40), ("2*T+1",), (5,), ("T", 2, 17), ("R", 1000)])
DTYPES = st.sampled_from(["float32", "bfloat16", "int64", "bool"])
SIZES = st.builds(Sizes, tokens=st.integers(1, 300), sequences=st.integers(1, 9), rows=st.integers(1, 9))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A random plan: each step writes a temporary and reads some values or views of values from before it."""
    values = [Value(name="input_ids", kind="input", dtype="int64", shape=("T",))]
    steps = []
    for index in range(draw(st.integers(1, 25))):
        readable = [v.name for v in values]
        reads = draw(st.lists(st.sampled_from(readable), max_size=4, unique=True))
        args = {f"x{i}": Ref(name) for i, name in enumerate(reads[:2])} | {"rest": [Ref(name) for name in reads[2:]]}
        shape, dtype = draw(SHAPES), draw(DTYPES)
        values.append(Value(name=f"t{index}", kind="temp", dtype=dtype, shape=shape))
        steps.append(Step(op="op", args=args, outputs=(f"t{index}",)))
        for n in range(draw(st.integers(0, 2))):
            base = draw(st.sampled_from([v.name for v in values]))
            values.append(Value(name=f"v{index}.{n}", kind="view", dtype=dtype, shape=shape, base=base, op="aten.view"))
    output = draw(st.sampled_from([v.name for v in values]))
    return Plan(values=tuple(values), steps=tuple(steps), kv_groups=(), output=output, vocab_size=1)


def num_bytes(plan: Plan, name: str, sizes: Sizes) -> int:
    """Bytes of a temporary, worked out in another way than the planner's."""
    numbers = {"T": sizes.tokens, "R": sizes.rows, "S": sizes.sequences}
    value = plan.value(name)
    count = 1
    for dim in value.shape:
        count *= eval(str(dim), {}, numbers)
    return count * {"float32": 4, "bfloat16": 2, "int64": 8, "bool": 1}[value.dtype]


def owner(plan: Plan, name: str) -> str:
    while plan.value(name).kind == "view":
        name = plan.value(name).base
    return name


@given(plans(), SIZES)
def test_a_step_never_overwrites_what_is_still_read(plan, sizes):
    """Simulates the run: bytes belong to who wrote them last; every read must find its own."""
    offsets, total = plan_arena(plan, sizes)
    written_by: dict[str, int] = {}
    span = {name: range(offsets[name], offsets[name] + num_bytes(plan, name, sizes)) for name in offsets}
    for index, step in enumerate(plan.steps):
        reads = [a.value for arg in step.args.values() for a in (arg if isinstance(arg, list) else [arg])]
        for name in [owner(plan, n) for n in reads]:
            if name in span:
                for other, when in written_by.items():
                    overlaps = span[other].start < span[name].stop and span[name].start < span[other].stop
                    assert other == name or not overlaps or when < written_by[name], f"{other} overwrote {name}"
                out = span[step.outputs[0]]
                assert out.stop <= span[name].start or span[name].stop <= out.start, (
                    f"step {index} reads what it writes"
                )
        written_by[step.outputs[0]] = index
    final = owner(plan, plan.output)
    if final in span:
        for other, when in written_by.items():
            overlaps = span[other].start < span[final].stop and span[final].start < span[other].stop
            assert other == final or not overlaps or when < written_by[final]
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    assert all(span[name].stop <= total for name in span)
    assert set(offsets) == {v.name for v in plan.values if v.kind == "temp"}


@given(plans(), SIZES)
def test_the_arena_is_no_larger_than_all_values_side_by_side(plan, sizes):
    offsets, total = plan_arena(plan, sizes)
    apart = sum(-(-num_bytes(plan, name, sizes) // ALIGNMENT) * ALIGNMENT for name in offsets)
    assert total <= apart


def chain(length: int) -> Plan:
    """t0 -> t1 -> ..., each [T, 64] float32."""
    values = [Value(name="input_ids", kind="input", dtype="int64", shape=("T",))]
    values += [Value(name=f"t{i}", kind="temp", dtype="float32", shape=("T", 64)) for i in range(length)]
    steps = [
        Step(op="op", args={"x": Ref(f"t{i - 1}" if i else "input_ids")}, outputs=(f"t{i}",)) for i in range(length)
    ]
    return Plan(values=tuple(values), steps=tuple(steps), kv_groups=(), output=f"t{length - 1}", vocab_size=1)


def test_a_chain_needs_two_buffers_however_long_it_is():
    assert plan_arena(chain(40), Sizes(tokens=10, sequences=1, rows=1)).total == 2 * 10 * 64 * 4


def test_the_output_lives_to_the_end_and_a_view_keeps_its_base():
    plan = chain(3)
    view = Value(name="seen", kind="view", dtype="float32", shape=("T", 8, 8), base="t0", op="aten.view")
    last = Step(op="op", args={"x": Ref("seen")}, outputs=())
    plan = Plan(values=(*plan.values, view), steps=(*plan.steps, last), kv_groups=(), output="t1", vocab_size=1)
    assert find_lifetimes(plan) == {"t0": (0, 3), "t1": (1, 4), "t2": (2, 2)}


def test_reading_before_writing_is_a_damaged_plan():
    plan = chain(2)
    swapped = Plan(values=plan.values, steps=plan.steps[::-1], kv_groups=(), output="t1", vocab_size=1)
    with pytest.raises(EngineError, match=r"step 0 \(op\) reads 't0' before it is written"):
        plan_arena(swapped, Sizes(tokens=1, sequences=1, rows=1))
