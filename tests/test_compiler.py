"""`build`: from what people have to an engine directory, or to one clear error and nothing left behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritium import LLM, SamplingParams, compiled, models
from tritium.compiled import compile_module
from tritium.compiler import STAGES, build
from tritium.config import BuildConfig
from tritium.engine.engine import Engine
from tritium.errors import CaptureError, CheckpointError, ConfigError, UnsupportedModel
from tritium.graph.stamp import choose
from tritium.models.config import ModelConfig, RopeConfig
from tritium.testing.plain_models import PlainLlama
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_models import make_checkpoint, random_prompt
from tritium.weights.recipe_json import from_json
from tritium.weights.safetensors import SafetensorsSource

ALWAYS = [stage for stage in STAGES if stage not in ("certify", "tune")]  # those two where they are asked for
TINY = ModelConfig(
    vocab_size=199,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_position_embeddings=64,
    rope=RopeConfig(dim=8),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", LLAMA)


@pytest.fixture(scope="module")
def engine(model_dir):
    return build(model_dir, output_dir=model_dir.parent / "engine")


def small(body) -> nn.Module:
    """A meta model whose only mixing of tokens is `body`."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 12), nn.Linear(12, 50)

        def forward(self, input_ids, positions):
            return self.head(body(self.embed(input_ids)))

    with torch.device("meta"):
        return Small()


def causal(x):
    return F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0]


def test_a_hugging_face_directory_becomes_an_engine(model_dir, engine):
    manifest = engine.manifest
    assert manifest.model == {"name": "tiny", "architecture": "llama", "source": str(model_dir)}
    assert (manifest.dtype, manifest.max_model_len, manifest.vocab_size) == ("float32", 128, 199)
    assert (manifest.bos_token_id, manifest.eos_token_ids, manifest.dummy_seed) == (None, (2,), None)
    assert set(manifest.files) == {"plan.json", "graph.txt", "graph.json", "recipes.json", "weights.safetensors",
                                   "config.json", "generation_config.json"}  # fmt: skip
    assert set(manifest.timings) == set(ALWAYS) and all(s >= 0 for s in manifest.timings.values())
    assert manifest.matches["insert_kv"] == 3 and manifest.build["dtype"] == "auto"
    assert all(step.kernel for step in engine.plan.steps)


def test_weights_are_the_checkpoints_by_the_models_own_names(model_dir, engine):
    source, bound = SafetensorsSource(model_dir), SafetensorsSource(engine.weights_path)
    wanted = {v.name for v in engine.plan.values if v.kind == "weight"}
    assert set(bound.names) == wanted
    torch.testing.assert_close(
        bound.get("layers.1.mlp.down_proj.weight"), source.get("model.layers.1.mlp.down_proj.weight"), rtol=0, atol=0
    )
    gate, up = (source.get(f"model.layers.1.mlp.{name}_proj.weight") for name in ("gate", "up"))
    torch.testing.assert_close(
        bound.get("layers.1.mlp.gate_proj+up_proj.weight"), torch.cat([gate, up]), rtol=0, atol=0
    )
    recipes = json.loads((engine.path / "recipes.json").read_text())
    assert {from_json(recipe) for recipe in recipes.values()} and set(recipes) == wanted


def test_the_graph_is_readable_and_names_the_model(engine):
    text = (engine.path / "graph.txt").read_text()
    assert "[layers.0.attention]" in text and "paged_attention(" in text and "# blocks.py:" in text
    assert json.loads((engine.path / "graph.json").read_text())["nodes"]


def test_stages_are_reported_in_order_and_weights_in_bytes(model_dir, tmp_path):
    seen = []
    engine = build(model_dir, output_dir=tmp_path / "e", progress=lambda *event: seen.append(event))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ALWAYS
    written = [(done, total) for stage, done, total in seen if stage == "write" and total > 1]
    assert [done for done, _ in written] == sorted(done for done, _ in written)
    assert written[-1][0] == written[-1][1] < engine.weights_path.stat().st_size


def test_a_user_written_model_in_plain_torch_generates_its_own_greedy_tokens(tmp_path):
    torch.manual_seed(3)
    module = PlainLlama()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = 6.0 if ".o." in name or ".down." in name else 2.0
            parameter.copy_(torch.randn_like(parameter) * (gain * parameter.shape[-1] ** -0.5) + ("norm" in name))
    build(module, output_dir=tmp_path / "engine", max_model_len=64)
    prompts = [random_prompt(n, seed=n) for n in (3, 9, 17)]
    with LLM(tmp_path / "engine", num_threads=1, max_num_batched_tokens=16, max_num_seqs=4) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = list(prompt)
        for _ in range(16):
            with torch.no_grad():
                ids.append(int(module(torch.tensor(ids), torch.arange(len(ids)))[-1].argmax()))
        assert output.outputs[0].token_ids == ids[len(prompt) :]
        assert len(set(ids[len(prompt) :])) > 4


def test_a_type_is_asked_for_and_weights_are_cast(tmp_path):
    module = PlainLlama()
    engine = build(module, output_dir=tmp_path / "e", max_model_len=32, dtype="bfloat16")
    assert engine.manifest.dtype == "bfloat16"
    bound = SafetensorsSource(engine.weights_path)
    assert bound.spec("head.weight").dtype == "bfloat16" and bound.spec("inv_freq").dtype == "float32"
    torch.testing.assert_close(bound.get("head.weight"), module.head.weight.detach().bfloat16(), rtol=0, atol=0)
    assert module.head.weight.dtype == torch.float32


def test_a_state_dict_replaces_the_models_weights(tmp_path):
    module, other = models.create(TINY), {n: torch.rand(p.shape) for n, p in models.create(TINY).named_parameters()}
    engine = build(module, output_dir=tmp_path / "own", weights=other)
    bound = SafetensorsSource(engine.weights_path)
    torch.testing.assert_close(bound.get("lm_head.weight"), other["lm_head.weight"])


def test_dummy_weights_write_constants_only(tmp_path):
    engine = build(TINY, output_dir=tmp_path / "e", weights="dummy", dtype="bfloat16")
    assert engine.manifest.dummy_seed == 0
    assert set(SafetensorsSource(engine.weights_path).names) == {"inv_freq"}
    assert {v.dtype for v in engine.plan.values if v.kind == "weight"} == {"bfloat16", "float32"}


def test_tensors_made_in_the_models_code_are_kept_as_constants(tmp_path):
    class Scaled(PlainLlama):
        def forward(self, input_ids_T, positions_T):
            return super().forward(input_ids_T, positions_T) * self.scale

    module = Scaled()
    module.register_buffer("scale", torch.tensor(0.5))
    engine = build(module, output_dir=tmp_path / "e", max_model_len=32)
    torch.testing.assert_close(SafetensorsSource(engine.weights_path).get("scale"), torch.tensor(0.5))


def test_max_model_len_is_the_builds_then_the_models(tmp_path):
    assert build(TINY, output_dir=tmp_path / "a", weights="dummy").manifest.max_model_len == 64
    assert build(TINY, output_dir=tmp_path / "b", weights="dummy", max_model_len=16).manifest.max_model_len == 16


def test_equal_builds_give_equal_plans_and_graphs(engine, model_dir, tmp_path):
    again = build(model_dir, output_dir=tmp_path / "e")
    for name in ("plan.json", "graph.txt", "graph.json", "recipes.json", "weights.safetensors"):
        assert again.manifest.files[name] == engine.manifest.files[name], name


def without_rope() -> ModelConfig:
    return dataclasses.replace(TINY, rope=None)


def with_dynamic_rope() -> ModelConfig:
    rope = RopeConfig(dim=8, type="dynamic", factor=2.0, max_position_embeddings=64)
    return dataclasses.replace(TINY, rope=rope)


MIXING = small(lambda x: causal(x) - x.mean(0))
BRANCHING = small(lambda x: causal(x) * (2.0 if x.shape[0] > 5 else 1.0))
DUMMY = {"weights": "dummy", "max_model_len": 8}
# What is given to `build`, the error, and what it says.
REFUSED = {
    "an unknown option": (TINY, {"max_modl_len": 3}, ConfigError, "did you mean 'max_model_len'"),
    "an unknown type": (TINY, {"dtype": "int3"}, ConfigError, "dtype must be one of .* not 'int3'"),
    "a config of another kind": (TINY, {"config": {"dtype": "auto"}}, ConfigError, "a BuildConfig, not dict"),
    "a shape without weights": (TINY, {}, ConfigError, 'weights="dummy"'),
    "weights of another kind": (TINY, {"weights": "real"}, ConfigError, "not str"),
    "a number as model": (7, {}, ConfigError, "not int: 7"),
    "a path that is not there": ("/nowhere/model", {}, CheckpointError, "/nowhere/model"),
    "a module of unknown length": (small(causal), {}, ConfigError, "max_model_len must be given"),
    "a module without values": (small(causal), {"max_model_len": 8}, CheckpointError, "on the meta device and has no"),
    "a model without attention": (small(torch.tanh), DUMMY, CaptureError, "Small has no causal attention"),
    "a model that mixes tokens": (MIXING, DUMMY, CaptureError, "mean = aten.mean.dim.* works along the tokens"),
    "a model for some lengths only": (BRANCHING, DUMMY, CaptureError, "must work for every length"),
    "positions it does not have": (without_rope(), DUMMY | {"max_model_len": 65}, ConfigError, "must be at most 64"),
    "a module made for another length": (
        models.create(with_dynamic_rope()),
        DUMMY,
        ConfigError,
        "max_model_len is 8, but the module was created for 128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_clear_error_and_leaves_nothing(name, tmp_path):
    model, arguments, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        build(model, output_dir=tmp_path / "engine", **arguments)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    weights = {n: torch.rand(p.shape) for n, p in models.create(TINY).named_parameters()}
    weights["layers.0.attention.k_proj.weight"] = torch.rand(16, 31)
    with pytest.raises(
        CheckpointError, match=r"'layers.0.attention.k_proj.weight' .*is \[16, 31\], expected \[16, 32\]"
    ):
        build(models.create(TINY), output_dir=tmp_path / "e", weights=weights)
    assert not list(tmp_path.iterdir())


def test_an_unknown_architecture_lists_the_known_ones(tmp_path, model_dir):
    other = make_checkpoint(tmp_path / "m", LLAMA)
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["XForCausalLM"], "model_type": "x"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"XForCausalLM.*LlamaForCausalLM"):
        build(other, output_dir=tmp_path / "e")


def test_a_failed_build_leaves_the_engine_that_was_there(engine, model_dir, tmp_path):
    path = build(model_dir, output_dir=tmp_path / "e").path
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError):
        build(small(causal), output_dir=path, max_model_len=8)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


CHILD = """
    import os, resource, signal, sys
    from tritium.compiler import build

    def progress(stage, done, total):
        if stage == "write" and done > 1000:
            {action}

    {setup}
    build(sys.argv[1], output_dir=sys.argv[2], progress=progress)
"""


def run_child(model_dir, output_dir, *, action: str = "pass", setup: str = "pass") -> subprocess.CompletedProcess:
    script = textwrap.dedent(CHILD).format(action=action, setup=setup)
    command = [sys.executable, "-c", script, str(model_dir), str(output_dir)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_a_build_killed_while_it_writes_leaves_no_half_engine(model_dir, tmp_path):
    result = run_child(model_dir, tmp_path / "e", action="os.kill(os.getpid(), signal.SIGKILL)")
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "e").exists()
    assert Engine.load(build(model_dir, output_dir=tmp_path / "e").path, verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["e"], "the next build cleans up"


def test_a_full_disk_leaves_no_half_engine(model_dir, tmp_path):
    """A limit on file sizes fails the write of the weights in the middle, as a full disk does."""
    result = run_child(model_dir, tmp_path / "e", setup="resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))")
    assert result.returncode == 1 and "File too large" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_plan_of_a_large_model_is_made_without_its_weights():
    found = compile_module(models.create(models.preset("llama-3.2-1b")), BuildConfig())
    assert found.plan.vocab_size == 128_256 and len(found.plan.kv_groups[0].layers) == 16


def test_a_build_that_captured_equal_blocks_once_has_the_plan_of_an_unrolled_one(monkeypatch):
    module = models.create(dataclasses.replace(TINY, num_layers=6, windows=(0, 8) * 3))
    assert len(choose(module, "layers").captured) == 5
    stamped = compile_module(module, BuildConfig())
    monkeypatch.setattr(compiled, "_blocks", lambda module: None)
    assert stamped == compile_module(module, BuildConfig())
