"""An optional pass left out at one part of a model: it rewrites everything else, and the numbers stay."""

import pytest
import torch

from tritium.errors import ConfigError
from tritium.graph.capture import capture
from tritium.passes import pipeline
from tritium.passes.sites import _Hidden
from tritium.testing.packed import Chunk, PackedRunner, reference_logits
from tritium.testing.tiny_models import make_checkpoint, our_model

IDS = [3, 5, 7, 11, 13, 17, 19]
SITES = {  # pass: (family, site, its matches there)
    "merge_qkv": ("llama", "layers.1.attention", 1),
    "merge_gate_up": ("llama", "layers.1.mlp", 1),
    "fuse_linear_activation": ("llama", "layers.1.mlp", 1),
    "fuse_add_norm": ("llama", "layers.1.mlp_norm", 1),
    "fuse_rope_kv": ("llama", "layers.1", 1),
    "merge_parallel": ("gptj", "layers.1", 1),
    "merge_outputs": ("gptj", "layers.1", 1),
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    models = {}

    def get(name):
        if name not in models:
            models[name] = our_model(make_checkpoint(tmp_path_factory.mktemp("model"), name))
        return models[name]

    return get


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_a_pass_left_out_at_a_site_matches_everywhere_else(model_of, name):
    family, site, there = SITES[name]
    module = model_of(family)
    everywhere = pipeline.optimise(capture(module).graph)
    without = pipeline.optimise(capture(module).graph, disabled=(f"{name}@{site}",))
    assert without.matches[name] == everywhere.matches[name] - there
    assert without.matches[name] > 0
    assert not any(isinstance(node.target, _Hidden) for node in without.graph.nodes)
    weights = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    logits = PackedRunner(without.graph, without.kv_groups, weights).step([Chunk(IDS, 0)])[0]
    expected = reference_logits(module, IDS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_left_out_at_every_site_a_pass_does_what_it_does_when_it_is_off(model_of):
    module = model_of("llama")
    off = pipeline.optimise(capture(module).graph, disabled=("fuse_add_norm",))
    sites = ("fuse_add_norm@layers", "fuse_add_norm@norm")
    nowhere = pipeline.optimise(capture(module).graph, disabled=sites)
    assert nowhere.matches["fuse_add_norm"] == 0
    assert pipeline.to_plan(nowhere) == pipeline.to_plan(off)


def test_a_site_that_the_model_does_not_have_is_refused_with_those_it_has(model_of):
    graph = capture(model_of("llama")).graph
    message = (
        r"disabled_passes: 'merge_qkv@layer\.0' names no part of this model that computes anything; its parts: .*"
        r"layers\.0\.attention.* and \d+ more"
    )
    with pytest.raises(ConfigError, match=message):
        pipeline.optimise(graph, disabled=("merge_qkv@layer.0",))


def test_a_required_pass_cannot_be_left_out_at_a_site_either(model_of):
    with pytest.raises(ConfigError, match="'canonicalise' is not an optional pass"):
        pipeline.optimise(capture(model_of("llama")).graph, disabled=("canonicalise@layers.0",))
