"""Stateless modules become engines with named tensors and a dynamic batch; each equals the module run by torch."""

import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tritium import LLM, Engine, OptimizationProfile, build
from tritium.engine.check import check_plan
from tritium.engine.manifest import PLAN_NAME
from tritium.engine.plan import Step
from tritium.errors import CaptureError, ConfigError, EngineError, RequestError
from tritium.testing.stateless_models import STATELESS, DetectorHead, ImageClassifier, Recommender, inputs_for

PROFILE = OptimizationProfile(min=1, opt=2, max=9)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Engine]]:
    found = {}
    for name, module_class in STATELESS.items():
        torch.manual_seed(0)
        module = module_class().eval()
        path = tmp_path_factory.mktemp("stateless") / "engine"
        found[name] = (module, build(module, example_inputs=inputs_for(module, 3), output_dir=path, profile=PROFILE))
    return found


def torch_outputs(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = module(**inputs)
    return found if isinstance(found, dict) else {"output": found}


@pytest.mark.parametrize("name", STATELESS)
def test_every_batch_of_the_profile_equals_torch(built: dict[str, tuple[nn.Module, Engine]], name: str) -> None:
    module, engine = built[name]
    for batch in (1, 2, 5, 9):
        inputs = inputs_for(module, batch)
        expected, found = torch_outputs(module, inputs), engine.run(**inputs)
        assert found.keys() == expected.keys()
        for output, value in expected.items():
            assert found[output].shape == value.shape
            torch.testing.assert_close(found[output], value, rtol=1e-5, atol=1e-6)


def test_a_module_without_weights_is_an_engine_too(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    engine = build(nn.Softmax(dim=1), example_inputs={"input": x}, output_dir=tmp_path / "e")
    assert engine.weights_path is None
    torch.testing.assert_close(Engine.load(engine.path).run(input=x)["output"], x.softmax(1))


def test_an_answer_is_not_changed_by_the_next_call(built: dict[str, tuple[nn.Module, Engine]]) -> None:
    module, engine = built["image classifier"]
    first = engine.run(**inputs_for(module, 2))["output"]
    kept = first.clone()
    engine.run(**inputs_for(module, 2))
    assert torch.equal(first, kept)


def test_threads_may_call_at_once(built: dict[str, tuple[nn.Module, Engine]]) -> None:
    module, engine = built["recommender"]
    batches = [inputs_for(module, 1 + i % 9) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for inputs, found in zip(batches, pool.map(lambda i: engine.run(**i), batches), strict=True):
            torch.testing.assert_close(found["output"], torch_outputs(module, inputs)["output"], rtol=1e-5, atol=1e-6)


def test_a_closed_engine_has_given_memory_and_thread_back_and_says_how_to_open_it_again(tmp_path: Path) -> None:
    module, inputs = ImageClassifier().eval(), inputs_for(ImageClassifier(), 2)
    path = build(module, example_inputs=inputs, output_dir=tmp_path / "e").path
    with Engine.load(path) as engine:
        answer = engine.run(**inputs)["output"]
        runner = engine._runner
        kept = [weakref.ref(x) for x in (runner._runner._binder._arena, *runner._buffers.values())]
        thread = next(iter(runner._thread._threads))
    assert not thread.is_alive() and [held() for held in kept] == [None] * len(kept)
    torch.testing.assert_close(answer, torch_outputs(module, inputs)["output"], rtol=1e-5, atol=1e-6)
    for closed in (lambda: engine.run(**inputs), lambda: runner.run(inputs)):
        with pytest.raises(EngineError, match=rf"{path} was closed: open it again with Engine.load"):
            closed()
    engine.close()
    never_run = Engine.load(path)
    never_run.close()
    with pytest.raises(EngineError, match="was closed"):
        never_run.run(**inputs)
    assert torch.equal(Engine.load(path).run(**inputs)["output"], answer)


def test_batches_that_were_begun_are_computed_before_an_engine_is_closed(tmp_path: Path) -> None:
    module, inputs = Recommender().eval(), inputs_for(Recommender(), 2)
    engine = build(module, example_inputs=inputs, output_dir=tmp_path / "e")
    expected = engine.run(**inputs)["output"]
    runner, is_holding, may_go_on = engine._runner, threading.Event(), threading.Event()
    runner._thread.submit(lambda: (is_holding.set(), may_go_on.wait()))
    is_holding.wait()
    with ThreadPoolExecutor(2) as pool:
        begun = pool.submit(engine.run, **inputs)
        while not runner._thread._work_queue.qsize():
            time.sleep(0.001)
        closing = pool.submit(engine.close)
        may_go_on.set()
        assert torch.equal(begun.result()["output"], expected) and closing.result() is None


def test_numpy_goes_in_as_well(built: dict[str, tuple[nn.Module, Engine]]) -> None:
    module, engine = built["recommender"]
    inputs = inputs_for(module, 4)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    arrays["dense"].flags.writeable = False
    torch.testing.assert_close(engine.run(**arrays)["output"], engine.run(**inputs)["output"], rtol=0, atol=0)


def test_a_process_that_never_loads_the_compiler_runs_it(built: dict[str, tuple[nn.Module, Engine]]) -> None:
    module, engine = built["detector head"]
    code = """
import sys, torch
from tritium import Engine
engine = Engine.load(sys.argv[1])
torch.manual_seed(3)
print(engine.run(image=torch.randn(2, 3, 32, 32))["scores"].flatten().tolist())
parts = ("tritium.compiler", "tritium.passes", "tritium.models", "tritium.graph", "torch._dynamo")
print([name for name in sys.modules if name.startswith(parts)])
"""
    done = subprocess.run([sys.executable, "-c", code, str(engine.path)], capture_output=True, text=True, check=True)
    scores, modules = done.stdout.splitlines()
    torch.manual_seed(3)
    expected = torch_outputs(module, {"image": torch.randn(2, 3, 32, 32)})["scores"].flatten()
    assert [float(x) for x in scores.strip("[]").split(",")] == pytest.approx(expected.tolist(), rel=1e-5)
    assert modules == "[]"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"picture": torch.zeros(1, 3, 32, 32)}, r"no input 'picture'; it takes image float32 \[batch, 3, 32, 32\]"),
        ({}, r"the input 'image' is missing; the engine takes image float32 \[batch, 3, 32, 32\]"),
        ({"image": torch.zeros(1, 3, 32, 32, dtype=torch.float64)}, "'image' is float64, expected float32: convert"),
        ({"image": torch.zeros(1, 3, 32, 31)}, r"'image' has sizes \[1, 3, 32, 31\], expected \['batch', 3, 32, 32\]"),
        ({"image": torch.zeros(())}, r"'image' has sizes \[\], expected"),
        ({"image": torch.zeros(10, 3, 32, 32)}, "the batch is 10, the engine was built for 1 to 9: split it"),
        ({"image": torch.zeros(0, 3, 32, 32)}, "the batch is 0, the engine was built for 1 to 9"),
        ({"image": [[0.0]]}, "'image' must be a torch tensor or a numpy array, not list"),
        ({"image": np.array([["a"]])}, "'image' is <U1, which is no dtype of a tensor"),
    ],
)
def test_inputs_that_are_not_the_modules_are_refused(
    built: dict[str, tuple[nn.Module, Engine]], inputs: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        built["image classifier"][1].run(**inputs)


def test_inputs_of_different_batches_are_refused(built: dict[str, tuple[nn.Module, Engine]]) -> None:
    module, engine = built["recommender"]
    inputs = inputs_for(module, 2) | {"dense": torch.zeros(3, 4)}
    with pytest.raises(RequestError, match=r"batches of different sizes: \{'dense': 3, 'categories': 2\}"):
        engine.run(**inputs)


def test_batches_below_the_profile_are_refused(tmp_path: Path) -> None:
    module = ImageClassifier()
    profile = OptimizationProfile(min=2, opt=3, max=4)
    engine = build(module, example_inputs=inputs_for(module, 2), output_dir=tmp_path / "e", profile=profile)
    with pytest.raises(RequestError, match="the batch is 1, the engine was built for 2 to 4"):
        engine.run(**inputs_for(module, 1))


def test_inputs_by_place_take_the_names_of_forwards_parameters(tmp_path: Path) -> None:
    module = Recommender().eval()
    engine = build(module, example_inputs=tuple(inputs_for(module, 2).values()), output_dir=tmp_path / "e")
    inputs = inputs_for(module, 64)
    torch.testing.assert_close(engine.run(**inputs)["output"], torch_outputs(module, inputs)["output"])


def test_refitting_changes_what_training_has_filled_too(tmp_path: Path) -> None:
    first, second = ImageClassifier().eval(), ImageClassifier().eval()
    engine = build(first, example_inputs=inputs_for(first, 2), output_dir=tmp_path / "e")
    again = engine.refit(second.state_dict())
    inputs = inputs_for(first, 3)
    torch.testing.assert_close(again.run(**inputs)["output"], torch_outputs(second, inputs)["output"])


class Repeating(nn.Module):
    """Fills, repetitions along the batch, several outputs of one op, an input handed through, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> dict[str, object]:
        batch = x.shape[0]
        x = torch.cat((self.token.expand(batch, -1, -1), x, self.token.repeat(batch, 2, 1)[:, :1]), dim=1)
        filled = torch.cat((x, x.new_full((batch, 1, 6), 0.5), torch.ones(batch, 1, 6, device=x.device)), dim=1)
        values, places = filled.max(dim=1)
        return {"best": {"values": values, "places": places}, "pair": (filled[:, 1], x), "angle": torch.arange(6.0) / 3}


def test_fills_repetitions_and_nested_outputs_follow_the_batch(tmp_path: Path) -> None:
    module = Repeating().eval()
    engine = build(module, example_inputs={"x": torch.zeros(2, 3, 6)}, output_dir=tmp_path / "e")
    for batch in (1, 4):
        x = torch.randn(batch, 3, 6)
        expected, found = module(x), engine.run(x=x)
        assert set(found) == {"best.values", "best.places", "pair.0", "pair.1", "angle"}
        assert torch.equal(found["best.values"], expected["best"]["values"])
        assert torch.equal(found["best.places"], expected["best"]["places"])
        assert torch.equal(found["pair.0"], expected["pair"][0]) and torch.equal(found["pair.1"], expected["pair"][1])
        torch.testing.assert_close(found["angle"], expected["angle"])


class Wrong(nn.Module):
    """Calls what it was given."""

    def __init__(self, call: object) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.cummax(1).values, "aten.cummax.default.*is an op that no kernel runs: ops/torch_ops.py lists"),
        (lambda x: torch.arange(x.shape[0], device=x.device), "arange.*takes the size of the batch as end|number made"),
        (lambda x: x * x.shape[0], "made from the size of the batch; only views and fills may depend on it"),
        (lambda x: x[x > 0], "index.*has a size that is not a multiple"),
        (lambda x: x.expand(5, 8, 4) + 1, r"Wrong could not be captured.*It was called with \(x \[batch, 4\]\)"),
        (lambda x: None, "returns no tensor"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_node(call: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=message):
        build(Wrong(call), example_inputs={"x": torch.zeros(2, 4)}, output_dir=tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"y": torch.zeros(2)}, {}, "'y' is no parameter of ImageClassifier.forward, which takes image"),
        ({"image": 3}, {}, r"'image' must be a tensor \[batch, ...\], not 3"),
        ({"image": torch.zeros(())}, {}, r"'image' must be a tensor \[batch, ...\]"),
        ((torch.zeros(1), torch.zeros(1)), {}, "has 2 tensors, ImageClassifier.forward takes 1"),
        ({}, {}, "example_inputs is empty"),
        (torch.zeros(1), {}, "must be a dict or a tuple of tensors, not Tensor"),
        (
            {"image": torch.zeros(1)},
            {"dtype": "bfloat16"},
            "'bfloat16' has no meaning .* convert the module itself",
        ),
        ({"image": torch.zeros(1)}, {"max_model_len": 9}, "max_model_len=9 has no meaning for a stateless module"),
    ],
)
def test_examples_and_options_that_cannot_be_are_refused(
    example: object, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ImageClassifier(), example_inputs=example, output_dir=tmp_path / "e", **options)  # type: ignore[arg-type]


def test_example_inputs_of_different_batches_are_refused(tmp_path: Path) -> None:
    example = {"dense": torch.zeros(2, 4), "categories": torch.zeros(3, 3, 2, dtype=torch.int64)}
    with pytest.raises(ConfigError, match=r"batches of different sizes \(\{'dense': 2, 'categories': 3\}\)"):
        build(Recommender(), example_inputs=example, output_dir=tmp_path / "e")


def test_a_profile_is_refused_without_example_inputs_and_when_it_contradicts_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile=.*max=9.* is for stateless modules: give example_inputs"):
        build("examples/demo_model", profile=PROFILE, output_dir=tmp_path / "e")
    with pytest.raises(ConfigError, match="profile opt must be an integer from 1 to 4, not 5"):
        OptimizationProfile(opt=5, max=4)


def test_llm_does_not_open_a_stateless_module_nor_run_a_language_model(
    built: dict[str, tuple[nn.Module, Engine]],
) -> None:
    path = built["image classifier"][1].path
    with pytest.raises(ConfigError, match=rf"{path} is a stateless module.*Engine.load"):
        LLM(path)


def damage(engine: Engine, change: object) -> None:
    """Rewrite the plan as `change` has it, with a manifest that agrees, and open it."""

    check_plan(msgspec.structs.replace(engine.plan, **change))  # type: ignore[arg-type]


def with_step(engine: Engine, of: str, /, **fields: object) -> dict[str, object]:
    """The plan's steps with the first step of that op changed."""
    index = next(i for i, step in enumerate(engine.plan.steps) if step.op == of)
    changed: Step = msgspec.structs.replace(engine.plan.steps[index], **fields)
    return {"steps": (*engine.plan.steps[:index], changed, *engine.plan.steps[index + 1 :])}


def test_a_damaged_plan_is_refused_when_it_is_opened(built: dict[str, tuple[nn.Module, Engine]]) -> None:
    engine = built["detector head"][1]
    topk = next(step for step in engine.plan.steps if step.op == "aten.topk.default")
    image = next(value for value in engine.plan.values if value.kind == "input")
    others = tuple(value for value in engine.plan.values if value is not image)
    for change, message in (
        (with_step(engine, topk.op, op="aten.from_file.default"), "cannot run"),
        (with_step(engine, topk.op, args=topk.args | {"q": 1}), "it has no argument q"),
        (with_step(engine, topk.op, outputs=topk.outputs[:1]), "it has 1 outputs, not 2"),
        (with_step(engine, topk.op, args={}), "its argument self is missing"),
        ({"outputs": {"scores": "nothing"}}, "the plan's output 'nothing' is written by no step"),
        ({"outputs": {}}, "has no outputs"),
        ({"values": (msgspec.structs.replace(image, shape=(4, 3, 32, 32)), *others)}, r"not \['T', ...\]"),
    ):
        with pytest.raises(EngineError, match=message):
            damage(engine, change)


def test_a_plan_with_sizes_that_torch_does_not_give_fails_without_writing(tmp_path: Path) -> None:
    module = DetectorHead()
    engine = build(module, example_inputs=inputs_for(module, 2), output_dir=tmp_path / "e")
    topk = next(step for step in engine.plan.steps if step.op == "aten.topk.default")
    wrong = msgspec.structs.replace(engine.plan, **with_step(engine, topk.op, args=topk.args | {"k": 6}))
    broken = Engine(path=engine.path, manifest=engine.manifest, plan=wrong)
    with pytest.raises(EngineError, match=r"aten.topk.default gives sizes .*6.*, the plan says .*5"):
        broken.run(**inputs_for(module, 1))


def test_a_truncated_engine_is_refused(tmp_path: Path) -> None:
    module = ImageClassifier()
    engine = build(module, example_inputs=inputs_for(module, 2), output_dir=tmp_path / "e")
    plan = engine.path / PLAN_NAME
    plan.write_bytes(plan.read_bytes()[:-9])
    with pytest.raises(EngineError, match=f"{plan} is truncated"):
        Engine.load(engine.path)
