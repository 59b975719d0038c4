"""Refit on disk: equal to a build from the new weights, all or nothing, without the compiler."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritium.compiler import build
from tritium.engine import serialise
from tritium.engine.engine import Engine
from tritium.engine.refit import refit_directory
from tritium.errors import CheckpointError, ConfigError, EngineError
from tritium.testing.plain_models import PlainLlama
from tritium.testing.tiny_configs import GPT2, LLAMA
from tritium.testing.tiny_models import make_checkpoint
from tritium.weights.recipe_json import to_json
from tritium.weights.recipes import Checkpoint, Concat, Constant

FAMILIES = {"llama": LLAMA, "llama-tied": LLAMA | {"tie_word_embeddings": True}, "gpt2": GPT2}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(directory):
    return {path.name: digest(path) for path in directory.iterdir()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints with different weights of each family."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: [make_checkpoint(root / f"{name}-{seed}", config, seed=seed) for seed in (1, 2)]
        for name, config in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def built(models, tmp_path_factory):
    """Per family an engine of each checkpoint."""
    root = tmp_path_factory.mktemp("engines")
    return {
        name: [build(path, output_dir=root / path.name).path for path in checkpoints]
        for name, checkpoints in models.items()
    }


def copy_of(engine_dir, tmp_path):
    return Engine.load(shutil.copytree(engine_dir, tmp_path / "engine"))


@pytest.fixture
def engine(built, tmp_path):
    """A llama of the first checkpoint, to be changed."""
    return copy_of(built["llama"][0], tmp_path)


def state_dict(model_dir):
    return load_file(model_dir / "model.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_refit_engine_is_bit_for_bit_one_built_from_the_new_weights(models, built, tmp_path, name):
    refit = copy_of(built[name][0], tmp_path).refit(models[name][1])
    fresh = Engine.load(built[name][1])
    assert digest(fresh.weights_path) != digest(built[name][0] / "weights.safetensors")
    for file in ("plan.json", "recipes.json", "weights.safetensors", "graph.txt"):
        assert digest(refit.path / file) == digest(fresh.path / file), file
    assert refit.identity == fresh.identity
    assert Engine.load(refit.path, verify=True).manifest.weights_generation == 1
    assert refit.manifest.weights_source == str(models[name][1])


def test_a_state_dict_serves_as_well_as_a_directory_and_may_be_of_another_dtype(models, built, engine):
    new = {name: tensor.double() for name, tensor in state_dict(models["llama"][1]).items()}
    assert digest(engine.refit(new).weights_path) == digest(built["llama"][1] / "weights.safetensors")


def test_a_head_that_is_the_embedding_once_more_is_no_tensor_too_many(models, built, tmp_path):
    engine = copy_of(built["llama-tied"][0], tmp_path)
    new = state_dict(models["llama-tied"][1])
    engine.refit(new | {"lm_head.weight": new["model.embed_tokens.weight"]})
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is read by no weight"):
        engine.refit(new | {"lm_head.weight": new["model.embed_tokens.weight"] + 1})


def test_tensors_that_the_first_build_ignored_are_ignored_again(tmp_path):
    module = PlainLlama()
    weights = dict(module.state_dict()) | {"step": torch.ones(1)}
    engine = build(module, weights=weights, output_dir=tmp_path / "engine", max_model_len=16)
    assert engine.manifest.ignored_tensors == ("step",)
    engine.refit(weights)
    with pytest.raises(CheckpointError, match="'epoch' is read by no weight"):
        engine.refit(weights | {"epoch": torch.ones(1)})


def test_an_engine_of_random_weights_takes_real_ones(models, built, tmp_path):
    engine = build(models["llama"][0], weights="dummy", output_dir=tmp_path / "engine").refit(models["llama"][1])
    assert engine.manifest.dummy_seed is None
    assert digest(engine.weights_path) == digest(built["llama"][1] / "weights.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda d: d.update(extra=torch.ones(3)), "'extra' is read by no weight"),
        (lambda d: d.update({"model.norm.weight": torch.ones(63)}), r"'model.norm.weight' is \[63\], expected \[64\]"),
        (
            lambda d: d.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
            "'model.norm.weight' has dtype int64, which no weight is made of",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(models, engine, change, words):
    before = contents(engine.path)
    new = state_dict(models["llama"][1])
    change(new)
    with pytest.raises(CheckpointError, match=rf"does not fit this engine: {words}\. Nothing was changed\. Give"):
        engine.refit(new)
    assert contents(engine.path) == before


def test_every_problem_is_named_up_to_a_limit(models, engine):
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' is missing; .* and \d+ more"):
        engine.refit({"a": torch.ones(1)})
    with pytest.raises(ConfigError, match="must be a state dict, a checkpoint directory or a hub id, not int: 3"):
        engine.refit(3)


def test_another_models_checkpoint_is_refused(models, engine):
    with pytest.raises(CheckpointError, match=r"gpt2-1 does not fit this engine"):
        engine.refit(models["gpt2"][0])


def test_an_engine_without_recipes_says_so(engine, models):
    (engine.path / "recipes.json").write_text("[]")
    with pytest.raises(EngineError, match=r"recipes.json is damaged \(a list"):
        engine.refit(models["llama"][1])
    (engine.path / "recipes.json").unlink()
    with pytest.raises(EngineError, match=r"recipes.json is missing: this engine cannot be refit"):
        engine.refit(models["llama"][1])


def test_a_disk_that_fills_up_leaves_the_old_engine_and_nothing_else(models, engine, monkeypatch):
    before = contents(engine.path)

    def full(*arguments, **more):
        raise EngineError("disk full")

    monkeypatch.setattr("tritium.engine.refit.bind", full)
    with pytest.raises(EngineError, match="disk full"):
        engine.refit(models["llama"][1])
    assert contents(engine.path) == before
    assert [path.name for path in engine.path.parent.iterdir()] == ["engine"]


@pytest.mark.parametrize("moment", ["bind", "replace_weights", "published"])
def test_a_process_killed_in_the_middle_leaves_an_engine_that_is_whole(models, engine, moment):
    script = f"""
import os, signal, sys
import tritium.engine.refit as refit
from tritium.engine import serialise
from tritium.engine.engine import Engine
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if {moment!r} == "bind":
    def half(recipes, specs, source, path, **more):
        path.write_bytes(b"half a file")
        die()
    refit.bind = half
elif {moment!r} == "replace_weights":
    serialise._publish = die  # all is written, nothing is in place
else:
    real = serialise._exchange
    def exchange(*paths):  # both engines are there, each in the other's place
        assert real(*paths)
        die()
    serialise._exchange = exchange
Engine.load(sys.argv[1]).refit(sys.argv[2])
"""
    before = digest(engine.weights_path)
    done = subprocess.run([sys.executable, "-c", script, str(engine.path), str(models["llama"][1])])
    assert done.returncode == -signal.SIGKILL
    found = Engine.load(engine.path, verify=True)
    assert (digest(found.weights_path) == before) is (moment != "published")
    assert found.manifest.weights_generation == (1 if moment == "published" else 0)
    found.refit(models["llama"][1])


def test_where_directories_cannot_be_exchanged_the_old_one_steps_aside(models, engine, monkeypatch):
    monkeypatch.setattr(serialise, "_exchange", lambda *_: False)
    engine.refit(models["llama"][1])
    assert Engine.load(engine.path, verify=True).manifest.weights_generation == 1
    assert [path.name for path in engine.path.parent.iterdir()] == ["engine"]


def test_other_files_of_the_engine_are_kept_and_those_that_spoke_of_the_old_weights_go(models, engine):
    (engine.path / "notes.txt").write_text("mine")
    (engine.path / "certificate.json").write_text("{}")
    engine.refit(models["llama"][1])
    assert (engine.path / "notes.txt").read_text() == "mine"
    assert not (engine.path / "certificate.json").exists()


def test_a_constant_that_is_only_a_part_of_a_weight_is_kept_for_the_next_refit(models, engine):
    """As a pass leaves it that merges a weight with numbers of the model's own."""
    path, name = engine.path / "recipes.json", "norm.weight"
    recipe = Concat((Checkpoint("half", (32,)), Constant("other half")), 0)
    trees = json.loads(path.read_text()) | {name: to_json(recipe), "other half": to_json(Constant("other half"))}
    path.write_text(json.dumps(trees))
    save_file(load_file(engine.weights_path) | {"other half": torch.full((32,), 7.0)}, engine.weights_path)
    new = state_dict(models["llama"][1])
    del new["model.norm.weight"]
    for value in (1.0, 2.0):
        refit_directory(engine.path, engine.manifest, engine.plan, new | {"half": torch.full((32,), value)})
        assert load_file(engine.weights_path)[name].tolist() == [value] * 32 + [7.0] * 32


def test_the_compiler_is_not_needed(models, engine):
    script = (
        "import sys\nfrom tritium import Engine\nEngine.load(sys.argv[1]).refit(sys.argv[2])\n"
        "loaded = [m for m in sys.modules if m.startswith(('tritium.compiler', 'tritium.passes', 'tritium.models', "
        "'tritium.graph', 'torch._dynamo', 'transformers'))]\nassert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(engine.path), str(models["llama"][1])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Engine.load(engine.path).manifest.weights_generation == 1
