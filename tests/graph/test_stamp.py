"""Stamping: a graph of which equal blocks were captured once is the graph of a full capture."""

import pytest
import torch
from torch import nn

from tritium import models
from tritium.errors import CaptureError
from tritium.graph import dump
from tritium.graph.capture import TOKEN_INPUTS, InputSpec, capture
from tritium.graph.stamp import choose
from tritium.testing.tiny_configs import TINY_MODELS

ENCODER_INPUTS = {**TOKEN_INPUTS, "token_types": InputSpec(torch.int64)}


def decoder(name: str, num_layers: int) -> nn.Module:
    data = dict(TINY_MODELS[name])
    (key,) = {"num_hidden_layers", "n_layer"} & data.keys()
    return models.create(models.parse_config(data | {key: num_layers}, name))


def everything(captured) -> tuple:
    """All that a graph says, and its placeholders with their values."""
    graph = captured.graph
    placeholders = [(node.name, {**node.meta, "value": id(node.meta.get("value"))})
                    for node in graph.nodes if node.op == "placeholder"]  # fmt: skip
    return dump.to_text(graph), dump.to_json(graph), placeholders, captured.outputs, captured.constants.keys()


# Windows on some layers, experts on some, a buffer in each.
@pytest.mark.parametrize(
    ("name", "num_layers", "blocks"),
    [("gemma2", 7, (0, 1, 2, 3, 4)), ("qwen3_moe-not-normed", 7, (0, 1, 2, 3, 4)), ("bloom", 5, (0, 1, 2))],
)
def test_a_stamped_decoder_has_the_graph_of_a_full_capture(name, num_layers, blocks):
    module = decoder(name, num_layers)
    assert choose(module, "layers").captured == blocks
    assert everything(capture(module, blocks="layers")) == everything(capture(module))


@pytest.mark.full
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_family_has_the_graph_of_a_full_capture(name):
    module = decoder(name, 8)
    assert everything(capture(module, blocks="layers")) == everything(capture(module))


def test_a_stamped_encoder_has_the_graph_of_a_full_capture():
    config = models.EncoderConfig(
        architecture="BertModel", vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=5, num_heads=2,
        num_positions=40, num_token_types=2, has_pooler=True,
    )  # fmt: skip
    module = models.create_encoder(config)
    stamped = capture(module, inputs=ENCODER_INPUTS, blocks="layers")
    assert everything(stamped) == everything(capture(module, inputs=ENCODER_INPUTS))


def test_layers_that_all_differ_are_all_captured():
    assert choose(decoder("gpt2-scaled-by-layer", 3), "layers") is None


class Block(nn.Module):
    """`how` says what the block does."""

    def __init__(self, how) -> None:
        super().__init__()
        self.up, self.how = nn.Linear(12, 12), how

    def forward(self, x):
        return self.how(self.up(x))


class Stack(nn.Module):
    """An embedding, six blocks that look alike, and `head` of what each of them gave."""

    def __init__(self, how=torch.tanh, head=lambda results: results[-1]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 12), head
        self.blocks = nn.ModuleList(Block(how) for _ in range(6))

    def forward(self, input_ids, positions):
        TURN.clear()
        results = [self.embed(input_ids)]
        for block in self.blocks:
            results.append(block(results[-1]))
        return self.head(results)


TURN: list[int] = []  # what no block shows that all of them read


def in_turns(x):
    """Another function in every other block."""
    TURN.append(1)
    return torch.tanh(x) if len(TURN) % 2 else torch.relu(x)


def test_any_module_with_equal_blocks_can_be_stamped():
    module = Stack()
    assert choose(module, "blocks").captured == (0, 1, 2)
    assert everything(capture(module, blocks="blocks")) == everything(capture(module))


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(Stack(in_turns), id="blocks of one kind that turn out as other calls"),
        pytest.param(
            Stack(head=lambda results: results[-1] + results[2]), id="a result that is read behind the blocks"
        ),
    ],
)
def test_what_cannot_be_stamped_is_captured_whole(module):
    assert choose(module, "blocks") is not None
    assert everything(capture(module, blocks="blocks")) == everything(capture(module))


def test_the_blocks_are_there_again_after_a_capture_and_after_an_error():
    module = Stack()
    blocks = list(module.blocks)
    capture(module, blocks="blocks")
    assert list(module.blocks) == blocks
    module.head = lambda results: results[-1].numpy()
    with pytest.raises(CaptureError, match="Stack could not be captured"):
        capture(module, blocks="blocks")
    assert list(module.blocks) == blocks
