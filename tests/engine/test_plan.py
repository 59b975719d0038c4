"""The plan's own small language: sizes, and lookups by name."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.engine.plan import Extent, Plan, Ref, Sizes, Step, Value
from tritium.errors import EngineError

COUNT = st.integers(0, 10**6)
EXTENTS = st.builds(Extent, tokens=COUNT, sequences=COUNT, rows=COUNT, constant=COUNT)


@given(EXTENTS)
def test_a_size_reads_back_as_it_was_written(extent):
    assert Extent.parse(str(extent)) == extent


@given(EXTENTS, st.builds(Sizes, tokens=COUNT, sequences=COUNT, rows=COUNT))
def test_a_size_is_linear_in_the_batch(extent, sizes):
    batch = extent.tokens * sizes.tokens + extent.sequences * sizes.sequences + extent.rows * sizes.rows
    assert extent.at(sizes) == batch + extent.constant
    assert extent.is_static == (extent.tokens == extent.sequences == extent.rows == 0)


@pytest.mark.parametrize("text", ["", "T*T", "Q", "2*", "T-1", "1e3", "T+", True, None, "9" * 13])
def test_what_is_no_size_is_refused_with_its_text(text):
    with pytest.raises(EngineError, match="is not a size in a plan"):
        Extent.parse(text)


def test_a_plan_survives_json():
    value = Value(name="x", kind="view", dtype="float32", shape=("T", 4), base="y", op="aten.view", args=(("T", 4),))
    step = Step(op="aten.cat.default", args={"tensors": [Ref("x"), Ref("x")], "dim": -1}, outputs=("z",), phase="rows")
    plan = Plan(values=(value,), steps=(step,), kv_groups=(), output="z", vocab_size=7)
    again = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    assert again.steps[0] == step
    assert again.value("x").shape == ("T", 4)
    assert [list(a) for a in again.value("x").args] == [["T", 4]]


def test_an_unknown_value_is_named():
    plan = Plan(values=(), steps=(), kv_groups=(), output="z", vocab_size=7)
    with pytest.raises(EngineError, match="no value named 'z'"):
        plan.value("z")
