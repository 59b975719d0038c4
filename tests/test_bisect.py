"""Bisecting an engine: a pass that is wrong at one layer, one that is slow at one, and passes that are neither."""

import dataclasses
import json
import re

import pytest
import torch
from typer.testing import CliRunner

from tritium import bisect as bisection
from tritium.bisect import bisect
from tritium.cli.main import app
from tritium.compiler import build
from tritium.errors import ConfigError, EngineError
from tritium.graph.edit import arguments
from tritium.inspection.changes import captured_modules, changed_sites
from tritium.passes import encoder_pipeline, pipeline
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_encoders import make_encoder
from tritium.testing.tiny_models import make_checkpoint

GATED = torch.ops.tritium.linear_gated.default
ACTIVATED = torch.ops.tritium.linear_activation.default


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", LLAMA)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    return build(model, output_dir=tmp_path_factory.mktemp("engines") / "plain")


def tritium(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def replaced(monkeypatch, name, run):
    """The pipeline with another rewrite in the place of one pass; `run` is given the graph and the true rewrite."""
    rows = [
        dataclasses.replace(row, run=lambda graph, true=row.run: run(graph, true)) if row.name == name else row
        for row in pipeline.FUSE
    ]
    for users in (pipeline, encoder_pipeline):
        monkeypatch.setattr(users, "FUSE", tuple(rows))


def wrong_in(*modules, target=GATED):
    """fuse_linear_activation with another activation in some of the blocks."""

    def run(graph, true):
        result = true(graph)
        for node in graph.nodes:
            if node.target is target and node.meta["source"].module in modules:
                kind = list(arguments(node)).index("kind")
                node.args = (*node.args[:kind], "relu", *node.args[kind + 1 :])
        return result

    return run


def known_times(monkeypatch, slow_module):
    """Every step takes 1 ms, and a linear_gated of one block 5."""

    class Timer(bisection.StepTimer):
        def prefill_batch(self, num_tokens):
            modules, steps = captured_modules(self._engine), self._engine.plan.steps
            slow = [s.op == "linear_gated" and modules[s.sources[-1]].startswith(slow_module) for s in steps]
            return [0.005 if is_slow else 0.001 for is_slow in slow]

        def decode_batch(self, num_sequences, context_len):
            return self.prefill_batch(1)

    monkeypatch.setattr(bisection, "StepTimer", Timer)
    monkeypatch.setattr(bisection, "rounds_in_turn", lambda batches, repeats: [[one] * repeats for one in batches])


@pytest.mark.full
def test_each_match_of_a_pass_is_a_site_named_after_its_part_of_the_model(engine, model, tmp_path):
    expected = {
        "merge_qkv": [f"layers.{i}.attention" for i in range(3)],
        "merge_gate_up": [f"layers.{i}.mlp" for i in range(3)],
        "fuse_linear_activation": [f"layers.{i}.mlp" for i in range(3)],
        "fuse_rope_kv": [f"layers.{i}.attention" for i in range(3)],
        "fuse_add_norm": [
            "layers.0.mlp_norm", "layers.1.attention_norm", "layers.1.mlp_norm", "layers.2.attention_norm",
            "layers.2.mlp_norm", "norm",
        ],
    }  # fmt: skip
    for name, modules in expected.items():
        sites = changed_sites(engine, build(model, output_dir=tmp_path / "e", disabled_passes=(name,)))
        assert [site.module for site in sites] == modules
    assert sites[0].ops == "linear + add_rms_norm in place of linear_add + rms_norm"
    one = build(model, output_dir=tmp_path / "e", disabled_passes=("fuse_add_norm@layers.1.mlp_norm",))
    assert [site.module for site in changed_sites(engine, one)] == ["layers.1.mlp_norm"]
    assert changed_sites(engine, engine) == []


def test_the_layer_where_a_pass_is_wrong_is_found(model, tmp_path, monkeypatch):
    replaced(monkeypatch, "fuse_linear_activation", wrong_in("layers.1.mlp"))
    engine = build(model, output_dir=tmp_path / "wrong")
    [fused] = bisect(engine, model, max_ratio=1000, num_tokens=8, passes=["fuse_linear_activation"])
    beyond = [site for site in fused.sites if site.is_beyond]
    assert [site.modules for site in beyond] == [("layers.1.mlp",)]
    assert beyond[0].divergence == fused.divergence > 1e-3


@pytest.mark.full
def test_a_pass_that_only_makes_way_for_the_wrong_one_is_beyond_the_bound_too(model, tmp_path, monkeypatch):
    """Without merged gates there is nothing for fuse_linear_activation to get wrong."""
    replaced(monkeypatch, "fuse_linear_activation", wrong_in("layers.1.mlp"))
    engine = build(model, output_dir=tmp_path / "wrong")
    findings = {one.name: one for one in bisect(engine, model, max_ratio=1000, num_tokens=8)}
    assert [name for name, one in findings.items() if one.is_beyond] == ["merge_gate_up", "fuse_linear_activation"]
    for name in ("merge_gate_up", "fuse_linear_activation"):
        assert [site.modules for site in findings[name].sites if site.is_beyond] == [("layers.1.mlp",)]


def test_only_passes_that_changed_something_can_be_looked_at(engine, model):
    with pytest.raises(ConfigError, match=r"passes: 'merge_parallel' changed nothing in .*those that did: merge_qkv, "):
        bisect(engine, model, passes=["merge_parallel"])


@pytest.mark.full
def test_the_command_names_the_site_and_how_to_leave_the_pass_out_there(model, tmp_path, monkeypatch):
    replaced(monkeypatch, "fuse_linear_activation", wrong_in("layers.0.mlp", "layers.2.mlp"))
    engine = build(model, output_dir=tmp_path / "wrong")
    done = tritium("bisect", engine.path, "--max-ratio", "1000", "--num-tokens", "8")
    assert done.exit_code == 1
    assert re.search(
        r"^fuse_linear_activation +3 +3 .*<- beyond a bound\n    layers\.0\.mlp: diverges by ", done.stdout, re.M
    )
    assert "    layers.2.mlp: diverges by " in done.stdout and "layers.1.mlp" not in done.stdout
    assert "--disable-pass fuse_linear_activation@layers.0.mlp" in done.stdout
    left_out = ("fuse_linear_activation@layers.0.mlp", "fuse_linear_activation@layers.2.mlp")
    mended = build(model, output_dir=tmp_path / "mended", disabled_passes=left_out)
    assert mended.manifest.matches["fuse_linear_activation"] == 1
    assert not any(one.is_beyond for one in bisect(mended, model, max_ratio=1000, num_tokens=8))


def test_the_layer_where_a_pass_is_slow_is_found(engine, model, monkeypatch):
    known_times(monkeypatch, "layers.2")
    merged, fused = bisect(engine, model, max_ratio=1.5, num_tokens=8, passes=["fuse_linear_activation", "merge_qkv"])
    assert [site.modules for site in fused.sites if site.is_beyond] == [("layers.2.mlp",)]
    assert (fused.sites[0].times.prefill, fused.sites[1].times.prefill) == (2.5, 0.5)  # one step in place of two
    assert merged.name == "merge_qkv" and merged.times.decode < 1 and not merged.is_beyond


def test_passes_that_are_right_are_within_the_bounds_and_their_gain_is_told(engine):
    options = ("--pass", "merge_qkv", "--max-ratio", "1000", "--num-tokens", "24", "--json")
    done = tritium("bisect", engine.path, *options)
    assert done.exit_code == 0
    [merged] = json.loads(done.stdout)["passes"]
    assert merged["num_places"] == 3 and merged["num_steps"] == 6
    assert merged["divergence"] <= 1e-6 and not merged["is_beyond"]
    assert [site["modules"] for site in merged["sites"]] == [[f"layers.{i}.attention"] for i in range(3)]
    assert all(site["times"]["decode"] > 0 and site["divergence"] is None for site in merged["sites"])


def test_a_source_that_gives_another_plan_is_refused(engine, tmp_path):
    other = make_checkpoint(tmp_path / "other", LLAMA | {"num_hidden_layers": 1})
    done = tritium("bisect", engine.path, "--model", other, "--json")
    assert "does not give the plan of" in json.loads(done.stdout)["error"]["message"]


def test_of_an_encoder_the_layer_where_a_pass_is_wrong_is_found(tmp_path, monkeypatch):
    path, _ = make_encoder(tmp_path / "model", "BertForSequenceClassification")
    right = build(path, output_dir=tmp_path / "right")
    [fused] = bisect(right, path, max_ratio=1000, num_tokens=8, passes=["fuse_linear_activation"])
    assert fused.divergence < 1e-9 and not fused.is_beyond
    assert fused.times.prefill > 0 and fused.times.decode is None
    replaced(monkeypatch, "fuse_linear_activation", wrong_in("layers.1", target=ACTIVATED))
    wrong = build(path, output_dir=tmp_path / "wrong")
    done = tritium("bisect", wrong.path, "--max-ratio", "1000", "--num-tokens", "8", "--pass", "fuse_linear_activation")
    assert done.exit_code == 1 and re.search(r"^    layers\.1: diverges by ", done.stdout, re.M)
    assert done.stdout.count(": diverges by ") == 1


def test_a_stateless_module_is_refused_by_its_name(tmp_path):
    module = build(torch.nn.Linear(4, 4).eval(), output_dir=tmp_path / "one", example_inputs=(torch.ones(2, 4),))
    with pytest.raises(
        EngineError, match=r"one \(kind 'module', backend 'cpu'\): bisect compares decoders and encoders"
    ):
        bisect(module, torch.nn.Linear(4, 4))
