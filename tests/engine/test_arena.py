"""The memory plan: no two values that are needed at once share a byte."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.engine.arena import ALIGNMENT, IN_PLACE, find_lifetimes, plan_arena
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
        names = draw(st.sampled_from([("x0", "x1"), ("self", "other")]))  # the second pair may be computed in place
        args = {name: Ref(read) for name, read in zip(names, reads, strict=False)}
        args |= {"rest": [Ref(name) for name in reads[2:]]}
        shape, dtype = draw(SHAPES), draw(DTYPES)
        values.append(Value(name=f"t{index}", kind="temp", dtype=dtype, shape=shape))
        op = "aten.add.Tensor" if names[0] == "self" else "op"
        steps.append(Step(op=op, args=args, outputs=(f"t{index}",)))
        for n in range(draw(st.integers(0, 2))):
            base = draw(st.sampled_from([v.name for v in values]))
            values.append(Value(name=f"v{index}.{n}", kind="view", dtype=dtype, shape=shape, base=base, op="aten.view"))
    output = draw(st.sampled_from([v.name for v in values]))
    return Plan(values=tuple(values), steps=tuple(steps), kv_groups=(), output=output, vocab_size=1)


def size_of(dim: int | str, numbers: dict[str, int]) -> int:
    """A size like "2*T+1"."""
    terms = [term.split("*") for term in str(dim).split("+")]
    return sum(math.prod(numbers[factor] if factor in numbers else int(factor) for factor in term) for term in terms)


def num_bytes(plan: Plan, name: str, sizes: Sizes) -> int:
    """Bytes of a temporary, worked out in another way than the planner's."""
    value = plan.value(name)
    count = 1
    for dim in value.shape:
        count *= size_of(dim, {"T": sizes.tokens, "R": sizes.rows, "S": sizes.sequences})
    return count * {"float32": 4, "bfloat16": 2, "int64": 8, "bool": 1}[value.dtype]


def owner(plan: Plan, name: str) -> str:
    while plan.value(name).kind == "view":
        name = plan.value(name).base
    return name


def is_element_wise(plan: Plan, step: Step, name: str) -> bool:
    """True when the step may write where it reads `name`: an addition of that whole value, and of no view of it."""
    reads = [arg.value for arg in step.args.values() if isinstance(arg, Ref)]
    reads += [ref.value for ref in step.args["rest"]]
    return step.op in IN_PLACE and all(read == name for read in reads if owner(plan, read) == name)


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
                if out == span[name] and is_element_wise(plan, step, name):
                    continue
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


def residuals(length: int, *, is_read_again: bool = False) -> Plan:
    """h0 -> h1 = op(h0) + h0 -> h2 = op(h1) + h1 ..., each [T, 64] float32. is_read_again: a last step reads h0."""
    like = {"kind": "temp", "dtype": "float32", "shape": ("T", 64)}
    values = [Value(name="input_ids", kind="input", dtype="int64", shape=("T",)), Value(name="h0", **like)]
    steps = [Step(op="op", args={"x": Ref("input_ids")}, outputs=("h0",))]
    for i in range(length):
        values += [Value(name=f"y{i}", **like), Value(name=f"h{i + 1}", **like)]
        steps.append(Step(op="op", args={"x": Ref(f"h{i}")}, outputs=(f"y{i}",)))
        steps.append(
            Step(op="aten.add.Tensor", args={"self": Ref(f"y{i}"), "other": Ref(f"h{i}")}, outputs=(f"h{i + 1}",))
        )
    steps += [Step(op="op", args={"x": Ref("h0")}, outputs=())] if is_read_again else []
    return Plan(values=tuple(values), steps=tuple(steps), kv_groups=(), output=f"h{length}", vocab_size=1)


def test_a_residual_sum_takes_the_place_of_a_summand():
    arena = plan_arena(residuals(9), Sizes(tokens=10, sequences=1, rows=1))
    assert arena.total == 2 * 10 * 64 * 4
    assert all(arena.offsets[f"h{i + 1}"] in (arena.offsets[f"h{i}"], arena.offsets[f"y{i}"]) for i in range(9))


def test_a_summand_that_is_read_later_keeps_its_place():
    sizes = Sizes(tokens=10, sequences=1, rows=1)
    arena = plan_arena(residuals(3, is_read_again=True), sizes)
    assert arena.offsets["h1"] == arena.offsets["y0"] != arena.offsets["h0"]
    assert arena.total == 3 * 10 * 64 * 4


def test_a_sum_with_a_view_of_its_summand_has_a_place_of_its_own():
    """Its kernel would read elements that it has written."""
    plan = residuals(1)
    turned = Value(name="turned", kind="view", dtype="float32", shape=("T", 64), base="h0", op="aten.slice")
    last = Step(op="aten.add.Tensor", args={"self": Ref("h0"), "other": Ref("turned")}, outputs=("h1",))
    plan = Plan(values=(*plan.values, turned), steps=(*plan.steps[:2], last), output="h1", vocab_size=1)
    arena = plan_arena(plan, Sizes(tokens=10, sequences=1, rows=1))
    assert arena.offsets["h1"] != arena.offsets["h0"]


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
