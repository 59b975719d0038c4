"""The whole pipeline: built-in and plain models become equal plans, and one captured sequence serves a packed batch."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from tritium import models
from tritium.errors import CaptureError, ConfigError
from tritium.graph import dump
from tritium.graph.capture import capture
from tritium.graph.grammar import verify_captured
from tritium.models.config import ModelConfig, RopeConfig
from tritium.passes import pipeline
from tritium.testing.packed import Chunk, PackedRunner, reference_logits
from tritium.testing.plain_models import PlainLlama

GOLDEN = Path(__file__).parent / "golden_llama.txt"
TINY = ModelConfig(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    max_position_embeddings=128,
    norm_eps=1e-5,
    rope=RopeConfig(dim=16),
)
PARALLEL = ModelConfig(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_size=16,
    max_position_embeddings=128,
    norm="layer_norm",
    activation="gelu_tanh",
    is_gated=False,
    block="parallel",
    has_mlp_bias=True,
    has_lm_head_bias=True,
    rope=RopeConfig(dim=8, is_interleaved=True),
    windows=(5, 0),
)
LEARNED = ModelConfig(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_size=16,
    max_position_embeddings=128,
    norm="layer_norm",
    activation="gelu_tanh",
    is_gated=False,
    has_qkv_bias=True,
    has_output_bias=True,
    has_mlp_bias=True,
    tie_word_embeddings=True,
)


def drawn(module: nn.Module) -> nn.Module:
    """The module with real weights in which every tensor matters."""
    torch.manual_seed(0)
    module = module.to_empty(device="cpu") if any(p.is_meta for p in module.parameters()) else module
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            scale = 0.3 if parameter.dim() == 1 else 2 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + is_norm)
    return module


def built_in(config: ModelConfig) -> nn.Module:
    module = models.create(config)
    constants = models.constants(module)
    module = drawn(module)
    for name, value in constants.items():
        module.get_buffer(name).copy_(value)
    return module


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())


MODELS = {
    "llama": lambda: built_in(TINY),
    "parallel with windows": lambda: built_in(PARALLEL),
    "learned positions, tied": lambda: built_in(LEARNED),
    "plain torch": lambda: drawn(PlainLlama()),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_captured_sequence_stands_for_a_packed_batch(name):
    module = MODELS[name]()
    optimised = pipeline.optimise(capture(module).graph, after=checked)
    runner = PackedRunner(optimised.graph, optimised.kv_groups, weights_of(module))
    ids = torch.randint(0, 199, (3, 20)).tolist()
    schedule = [
        [Chunk(ids[0][:7], 0), Chunk(ids[1][:2], 0), Chunk(ids[2][:11], 0)],  # prefills of several lengths
        [Chunk(ids[0][:8], 7), Chunk(ids[1][:9], 2), Chunk(ids[2][:12], 11)],  # decodes beside a chunk
        [Chunk(ids[0][:9], 8), Chunk(ids[1][:10], 9), Chunk(ids[2][:13], 12)],  # decodes
    ]
    for chunks in schedule:
        logits = runner.step(chunks)
        for row, chunk in enumerate(chunks):
            expected = reference_logits(module, chunk.token_ids)
            assert expected.std() > 0.5
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def checked(graph):
    verify_captured(graph)


def ops_of(module: nn.Module) -> Counter:
    plan = pipeline.to_plan(pipeline.optimise(capture(module).graph))
    return Counter(step.op for step in plan.steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_in_plain_torch_has_the_same_steps_as_the_built_in_one(dtype):
    with torch.device("meta"):
        plain = PlainLlama()
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    assert ops_of(plain) == ops_of(models.create(TINY))


def test_the_dump_of_a_small_llama_is_as_recorded():
    text = dump.to_text(pipeline.optimise(capture(models.create(TINY)).graph).graph)
    assert "# decoder.py:" in text and "# blocks.py:" in text
    text = re.sub(r" +# [a-z_]+\.py:\d+$", "", text, flags=re.M)
    assert text == GOLDEN.read_text(), "if the change is meant: python tests/passes/test_pipeline.py"


def test_equal_models_give_equal_dumps():
    graphs = [pipeline.optimise(capture(models.create(TINY)).graph).graph for _ in range(2)]
    assert dump.to_text(graphs[0]) == dump.to_text(graphs[1])
    assert dump.to_json(graphs[0]) == dump.to_json(graphs[1])


def test_a_second_run_of_the_normalising_passes_changes_nothing():
    graph = capture(models.create(TINY)).graph
    for row in pipeline.NORMALISE:
        row.run(graph)
    assert [row.run(graph).num_matches for row in pipeline.NORMALISE] == [0] * len(pipeline.NORMALISE)


def test_an_optional_pass_can_be_left_out():
    with torch.device("meta"):
        module = PlainLlama()
    groups = pipeline.optimise(capture(module).graph, disabled=("read_shared_heads",)).kv_groups
    assert [group.num_kv_heads for group in groups] == [4]
    assert [group.num_kv_heads for group in pipeline.optimise(capture(module).graph).kv_groups] == [2]


def test_only_optional_passes_can_be_disabled():
    graph = capture(models.create(TINY)).graph
    with pytest.raises(ConfigError, match="'canonicalise' is not an optional pass"):
        pipeline.optimise(graph, disabled=("canonicalise",))


def test_an_op_without_a_kernel_is_refused_with_its_place():
    class Strange(PlainLlama):
        def forward(self, input_ids_T, positions_T):
            return super().forward(input_ids_T, positions_T).sign()

    with torch.device("meta"):
        module = Strange()
    with pytest.raises(CaptureError, match=r"aten.sign.default\(.*is an op that no kernel runs.*test_pipeline.py:"):
        pipeline.optimise(capture(module).graph)


def test_sizes_that_are_not_linear_in_the_tokens_are_refused_with_their_place():
    class Paired(PlainLlama):
        def forward(self, input_ids_T, positions_T):
            pairs = self.embed(input_ids_T).view(input_ids_T.shape[0] // 2, -1)
            return super().forward(input_ids_T, positions_T) + pairs.sum()

    with torch.device("meta"):
        module = Paired()
    message = r"view.* has a size that is not a multiple of the number of tokens.*test_pipeline.py:"
    with pytest.raises(CaptureError, match=message):
        pipeline.optimise(capture(module).graph)


if __name__ == "__main__":
    recorded = dump.to_text(pipeline.optimise(capture(models.create(TINY)).graph).graph)
    GOLDEN.write_text(re.sub(r" +# [a-z_]+\.py:\d+$", "", recorded, flags=re.M))
