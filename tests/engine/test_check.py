"""A plan that no compiler has written is refused when it is loaded, with the value or step that gives it away."""

import re

import msgspec
import pytest

from tritium.engine.check import check_plan
from tritium.engine.engine import Engine
from tritium.engine.manifest import PLAN_NAME, Manifest
from tritium.engine.plan import KVGroup, Plan, Ref, Step, Value, kv_layer
from tritium.engine.serialise import write_engine
from tritium.errors import EngineError

ATTENTION = {name: Ref(name) for name in ("cu_seqlens_q", "batch_counts")} | {
    "q_TNH": Ref("heads"), "cache_layer": Ref("kv.0"), "block_table_SB": Ref("block_table.0"),
    "context_lens_S": Ref("context_lens"), "scale": 0.5, "window": 0, "softcap": 0.0,
}  # fmt: skip
PLAN = Plan(
    values=(
        Value(name="table", kind="weight", dtype="float32", shape=(7, 8)),
        Value(name="norm", kind="weight", dtype="float32", shape=(8,)),
        Value(name="input_ids", kind="input", dtype="int64", shape=("T",)),
        Value(name="sampled_rows", kind="input", dtype="int64", shape=("R",)),
        Value(name="slot_mapping.0", kind="input", dtype="int64", shape=("T",)),
        Value(name="block_table.0", kind="input", dtype="int32", shape=("S", -1)),
        Value(name="cu_seqlens_q", kind="input", dtype="int32", shape=("S+1",)),
        Value(name="context_lens", kind="input", dtype="int32", shape=("S",)),
        Value(name="batch_counts", kind="input", dtype="int32", shape=(4,)),
        Value(name="kv.0", kind="kv", dtype="float32", shape=(-1, 2, 2, -1, 4)),
        Value(name="x", kind="temp", dtype="float32", shape=("T", 8)),
        Value(
            name="heads", kind="view", dtype="float32", shape=("T", 2, 4), base="x", op="aten.view", args=(("T", 2, 4),)
        ),
        Value(name="a", kind="temp", dtype="float32", shape=("T", 2, 4)),
        Value(name="flat", kind="view", dtype="float32", shape=("T", 8), base="a", op="aten.view", args=(("T", 8),)),
        Value(name="sum", kind="temp", dtype="float32", shape=("T", 8)),
        Value(name="rows", kind="temp", dtype="float32", shape=("R", 8)),
        Value(name="normed", kind="temp", dtype="float32", shape=("R", 8)),
        Value(name="logits", kind="temp", dtype="float32", shape=("R", 7)),
    ),
    steps=(
        Step(op="embedding", args={"ids_T": Ref("input_ids"), "weight_VD": Ref("table")}, outputs=("x",)),
        Step(
            op="kv_store",
            args={
                "k_TKH": Ref("heads"),
                "v_TKH": Ref("heads"),
                "cache_layer": Ref("kv.0"),
                "slot_mapping_T": Ref("slot_mapping.0"),
            },
            outputs=(),
        ),
        Step(op="paged_attention", args=ATTENTION, outputs=("a",)),
        Step(op="aten.add.Tensor", args={"self": Ref("x"), "other": Ref("flat"), "alpha": 1}, outputs=("sum",)),
        Step(
            op="gather_rows", args={"x_TD": Ref("sum"), "rows_R": Ref("sampled_rows")}, outputs=("rows",), phase="rows"
        ),
        Step(
            op="rms_norm",
            args={"x": Ref("rows"), "weight": Ref("norm"), "eps": 1e-5},
            outputs=("normed",),
            phase="rows",
        ),
        Step(
            op="linear",
            args={"x": Ref("normed"), "weight_NK": Ref("table"), "bias": None},
            outputs=("logits",),
            phase="rows",
        ),
    ),
    kv_groups=(KVGroup(layers=(0,), window=0, num_kv_heads=2, head_size=4, dtype="float32"),),
    output="logits",
    vocab_size=7,
)


def with_value(changed, **changes):
    """The plan with one value changed."""
    values = (msgspec.structs.replace(v, **changes) if v.name == changed else v for v in PLAN.values)
    return msgspec.structs.replace(PLAN, values=tuple(values))


def with_step(index, *, args=None, **changes):
    """The plan with one step changed; `args` replaces some of its arguments."""
    step = PLAN.steps[index]
    step = msgspec.structs.replace(step, args={**step.args, **(args or {})}, **changes)
    return msgspec.structs.replace(PLAN, steps=(*PLAN.steps[:index], step, *PLAN.steps[index + 1 :]))


def test_a_sound_plan_passes():
    check_plan(PLAN)


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (with_value("x", dtype="complex64"), "'x' has dtype 'complex64'"),
        (with_value("x", dtype="load"), "'x' has dtype 'load'"),
        (with_value("x", shape=("T*T", 8)), r"'x': 'T\*T' is not a size"),
        (with_value("norm", shape=(-8,)), "'norm' has sizes"),
        (with_value("a", shape=(10**12, 10**12)), "'a' has sizes"),
        (with_value("norm", shape=("T",)), "weight 'norm' has sizes"),
        (with_value("context_lens", name="cu_seqlens_q"), "values have one name"),
        (with_value("input_ids", dtype="int32"), r"'input_ids' is int32 \['T'\], not int64"),
        (with_value("input_ids", shape=("2*T",)), "'input_ids' is int64"),
        (with_value("slot_mapping.0", name="slot_mapping.1"), "'slot_mapping.1' is none that the runtime provides"),
        (with_value("kv.0", name="kv"), "'kv' does not say its layer"),
        (with_value("kv.0", name="kv.x"), "'kv.x' does not say its layer"),
        (with_value("kv.0", name="kv.1"), "'kv.1' is none that the runtime provides"),
        (with_value("kv.0", shape=(-1, 2, 2, -1, 8)), "'kv.0' is float32"),
        (with_value("heads", base="flat"), "view 'heads' is of 'flat', which is no value before it"),
        (with_value("heads", base="heads"), "view 'heads' is of 'heads'"),
        (with_value("heads", op="aten.as_strided"), "view 'heads' cannot be made of 'x' .*aten.as_strided"),
        (with_value("heads", args=(("T", 3, 4),)), "view 'heads' cannot be made of 'x'"),
        (with_value("heads", args=("T", 2, 4)), "view 'heads' cannot be made of 'x'"),
        (with_value("heads", shape=("T", 4, 2)), "view 'heads' is float32"),
        (with_value("heads", dtype="float16"), "view 'heads' is float16"),
        (with_value("a", shape=("T", 2, 8)), "view 'flat' cannot"),
        (with_value("norm", shape=(4,)), r"step 5 \(rms_norm\) cannot run: .* sizes \[4\], not \[8\]"),
        (with_value("sum", shape=("T", 9)), r"step 3 \(aten.add.Tensor\) gives sizes .*not those of sum"),
        (with_value("logits", dtype="float16"), r"step 6 \(linear\) gives torch.float32, but 'logits'"),
        (with_step(0, op="exec"), r"step 0 \(exec\) cannot run: .*no op is named"),
        (with_step(3, op="aten.set_.source_Tensor"), r"step 3 .*no op is named"),
        (with_step(0, args={"ids_T": Ref("nothing")}), r"step 0 \(embedding\) reads 'nothing', which is no value"),
        (with_step(0, args={"ids_T": Ref("table")}), r"step 0 .* ids_T has 2 dimensions"),
        (with_step(0, args={"weight_VD": 3}), r"step 0 .* argument weight_VD is a int, not Tensor"),
        (with_step(0, args={"scale": 3}), r"step 0 .* no argument scale"),
        (with_step(5, args={"eps": "much"}), r"step 5 .* argument eps is a str, not float"),
        (with_step(1, args={"slot_mapping_T": Ref("context_lens")}), r"step 1 .* slot_mapping_T has T = 11"),
        (with_step(2, args={"q_TNH": Ref("x")}), r"step 2 .* q_TNH has 2 dimensions"),
        (with_step(2, args={"batch_counts": Ref("context_lens")}), r"step 2 .* sizes \[11\], not \[4\]"),
        (with_step(3, args={"self": Ref("sum")}), r"step 3 .* reads 'sum' before it is written"),
        (with_step(3, outputs=("flat",)), r"step 3 .* writes 'flat', which is no temporary of its own"),
        (with_step(3, outputs=("x",)), r"step 3 .* writes 'x', which is no temporary of its own"),
        (with_step(1, outputs=("sum",)), r"step 1 \(kv_store\) gives sizes \[\], not those of sum"),
        (with_step(0, phase="rows"), r"step 1 \(kv_store\) runs over tokens after a step over sampled rows"),
        (msgspec.structs.replace(PLAN, vocab_size=8), r"output 'logits' is not a floating value of sizes \[R, 8\]"),
        (msgspec.structs.replace(PLAN, output="none"), "output 'none' is written by no step"),
        (msgspec.structs.replace(PLAN, kv_groups=PLAN.kv_groups * 2), "attention layer in two KV groups"),
    ],
)  # fmt: skip
def test_what_no_compiler_writes_is_named(plan, named):
    with pytest.raises(EngineError, match=named) as caught:
        check_plan(plan)
    assert "build it again" in str(caught.value)


def test_an_engine_with_such_a_plan_is_not_loaded(tmp_path):
    manifest = Manifest(
        backend="cpu", model={"name": "m"}, dtype="float32", max_model_len=8, vocab_size=7, dummy_seed=0
    )
    written = {"manifest": manifest, "texts": {}, "write_weights": None}
    Engine.load(write_engine(tmp_path / "good", plan=PLAN, **written))
    write_engine(tmp_path / "bad", plan=with_value("norm", shape=(4,)), **written)
    with pytest.raises(EngineError, match=f"{re.escape(str(tmp_path / 'bad' / PLAN_NAME))}: the plan's step 5"):
        Engine.load(tmp_path / "bad")


def test_a_kv_value_says_its_layer():
    assert kv_layer("kv.12") == 12
