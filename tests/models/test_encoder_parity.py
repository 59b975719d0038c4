"""Encoders against transformers: hidden states, pooler, both heads; packed without padding, every tensor mattering."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tritium import build, models
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import ConfigError
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.testing.tiny_encoders import ENCODERS, VOCAB_SIZE, make_encoder, reference
from tritium.testing.tiny_models import fill, relative_error
from tritium.weights.source import DictSource

LENGTHS = (5, 66, 1, 33, 64, 17)
FULL = pytest.mark.full
PERTURBED = (
    "RobertaForSequenceClassification",
    pytest.param("BertModel", marks=FULL),
    pytest.param("BertForTokenClassification", marks=FULL),
)
ALONE = (
    ("BertModel", "float32"),
    ("BertForSequenceClassification", "bfloat16"),
    pytest.param("BertModel", "bfloat16", marks=FULL),
    pytest.param("RobertaModel", "float32", marks=FULL),
    pytest.param("RobertaForSequenceClassification", "float16", marks=FULL),
)
TASKS = {"Model": "token_embed", "MaskedLM": "token_embed", "SequenceClass": "classify", "TokenClass": "token_classify"}


def requests_for(architecture: str, num_types: int) -> list[EncoderRequest]:
    """Sequences of `LENGTHS`, the second part of each of another type."""
    task: Any = next(task for part, task in TASKS.items() if part in architecture)
    requests = []
    for length in LENGTHS:
        ids = torch.randint(5, VOCAB_SIZE, (length,)).tolist()
        types = [(i > length // 2) * (num_types - 1) for i in range(length)]
        requests.append(EncoderRequest(token_ids=ids, token_types=types, task=task, is_normalized=False))
    return requests


def open_runner(path: Path, **options: Any) -> tuple[Engine, EncoderRunner]:
    engine = build(path, output_dir=path.parent / f"{path.name}-engine-{len(options)}", **options)
    return engine, EncoderRunner(engine, RuntimeConfig(num_threads=1))


@pytest.mark.parametrize("architecture", ENCODERS)
def test_a_packed_batch_equals_transformers_sequence_by_sequence(tmp_path: Path, architecture: str) -> None:
    path, model = make_encoder(tmp_path / "model", architecture)
    _, runner = open_runner(path)
    requests = requests_for(architecture, runner.info.num_token_types)
    for request, found in zip(requests, runner.compute(requests), strict=True):
        expected, _ = reference(model, request.token_ids, request.token_types)
        assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("scheme", ["w8a8", pytest.param("w4a8_g32", marks=FULL)])
def test_quantised_linears_stay_near_transformers_and_a_text_is_its_own(tmp_path: Path, scheme: str) -> None:
    path, model = make_encoder(tmp_path / "model", "BertModel")
    engine, runner = open_runner(path, scheme=scheme)
    ops = {step.op for step in engine.plan.steps}
    assert "quantized_linear_activation" in ops and not ops & {"linear", "linear_activation"}
    requests = requests_for("BertModel", runner.info.num_token_types)
    for request, found in zip(requests, runner.compute(requests), strict=True):
        expected, _ = reference(model, request.token_ids, request.token_types)
        assert 1e-4 < relative_error(found, expected) <= 0.2
        assert torch.equal(runner.compute([request])[0], found)


def test_the_table_of_tokens_alone_may_be_in_8_bits_and_a_text_is_its_own(tmp_path: Path) -> None:
    path, model = make_encoder(tmp_path / "model", "BertModel")
    engine, runner = open_runner(path, quantize_embedding=True)
    tables = {step.op: step.args for step in engine.plan.steps if "ids_T" in step.args}
    assert tables["quantized_embedding"]["qweight_VD"].value == "embed_tokens.weight.int8"
    assert "embed_tokens" not in tables["embedding"]["weight_VD"].value
    requests = requests_for("BertModel", runner.info.num_token_types)
    for request, found in zip(requests, runner.compute(requests), strict=True):
        expected, _ = reference(model, request.token_ids, request.token_types)
        assert 1e-4 < relative_error(found, expected) <= 0.05
        assert torch.equal(runner.compute([request])[0], found)


def test_an_encoder_has_no_cache_to_keep_in_int8(tmp_path: Path) -> None:
    path, _ = make_encoder(tmp_path / "model", "BertModel")
    with pytest.raises(ConfigError, match="kv_dtype='int8': an encoder has no KV cache; leave it out"):
        build(path, output_dir=tmp_path / "engine", kv_dtype="int8")


@pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel"])
def test_the_pooler_equals_transformers(tmp_path: Path, architecture: str) -> None:
    path, model = make_encoder(tmp_path / "model", architecture)
    _, runner = open_runner(path)
    for request in requests_for(architecture, runner.info.num_token_types):
        pooled = EncoderRequest(
            token_ids=request.token_ids,
            token_types=request.token_types,
            task="embed",
            pooling="pooler",
            is_normalized=False,
        )
        _, expected = reference(model, request.token_ids, request.token_types)
        assert expected is not None
        assert relative_error(runner.compute([request, pooled])[1], expected) <= 1e-4


@pytest.mark.parametrize(("architecture", "dtype"), ALONE)
def test_a_sequences_bits_do_not_depend_on_what_it_is_packed_with(
    tmp_path: Path, architecture: str, dtype: str
) -> None:
    path, _ = make_encoder(tmp_path / "model", architecture)
    _, runner = open_runner(path, dtype=dtype)
    requests = requests_for(architecture, runner.info.num_token_types)
    together = runner.compute(requests)
    backwards = runner.compute(requests[::-1])[::-1]
    for i, request in enumerate(requests):
        (alone,) = runner.compute([request])
        assert torch.equal(alone, together[i]) and torch.equal(backwards[i], together[i]), LENGTHS[i]


@pytest.mark.parametrize("architecture", ["BertModel", pytest.param("RobertaForSequenceClassification", marks=FULL)])
def test_bfloat16_is_at_most_twice_as_far_from_fp32_as_transformers_is(tmp_path: Path, architecture: str) -> None:
    path, model = make_encoder(tmp_path / "model", architecture, dtype="bfloat16")
    _, runner = open_runner(path)
    requests = requests_for(architecture, runner.info.num_token_types)
    ours = runner.compute(requests)
    exact = [reference(model, r.token_ids, r.token_types)[0] for r in requests]
    model.bfloat16()
    theirs = [reference(model, r.token_ids, r.token_types)[0] for r in requests]

    def error(found: list[Tensor]) -> float:
        return float(torch.cat([(a - b).flatten() for a, b in zip(found, exact, strict=True)]).square().mean().sqrt())

    assert error(ours) <= 2 * error(theirs)


@pytest.mark.parametrize(
    "architecture", ["BertModel", "BertForTokenClassification", "RobertaForSequenceClassification"]
)
def test_perturbing_any_tensor_changes_our_outputs_as_it_changes_theirs(tmp_path: Path, architecture: str) -> None:
    path, model = make_encoder(tmp_path / "model", architecture)
    tensors = load_file(path / "model.safetensors")
    config = models.read_encoder_config(path, source=DictSource(tensors))
    assert config is not None
    ours, state = models.create_encoder(config), dict(model.state_dict())
    request = requests_for(architecture, config.num_token_types)[3]
    before = outputs(model, request)
    for name, tensor in tensors.items():
        changed = tensor + 0.3 * tensor.square().mean().sqrt() * torch.randn(tensor.shape)
        state[name].copy_(changed)
        after = outputs(model, request)
        fill(ours, DictSource({**tensors, name: changed}))
        found = our_outputs(ours, request)
        # a bias of the keys adds the same to all scores of a query, which softmax does not see
        assert "key.bias" in name or relative_error(after, before) > 1e-3, f"{name} does not matter"
        assert relative_error(found, after) <= 1e-4, name
        state[name].copy_(tensor)


def outputs(model: nn.Module, request: EncoderRequest) -> Tensor:
    """All that transformers puts out, in one row."""
    first, pooled = reference(model, request.token_ids, request.token_types)
    return torch.cat([first.flatten(), *([] if pooled is None else [pooled])])


def our_outputs(module: nn.Module, request: EncoderRequest) -> Tensor:
    """The same of our module, run by torch."""
    ids, types = torch.tensor(request.token_ids), torch.tensor(request.token_types)
    found = module(ids, torch.arange(len(ids)), types)
    by_row = {name: value[0] if name in module.row_outputs else value for name, value in found.items()}  # type: ignore[operator]
    return torch.cat([value.flatten() for value in by_row.values()])
