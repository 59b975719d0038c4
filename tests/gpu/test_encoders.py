"""Encoders on a GPU against transformers: no further from fp32 than twice transformers itself in the same 16 bits.

Where there is no GPU, one is made up, for small texts.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tritium import LLM, build
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import OutOfMemory
from tritium.runtime import kernel_choice, plan_runner
from tritium.runtime.assemble import make_encoder_runner
from tritium.runtime.encoder_request import POOLINGS, EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.runtime.engine_process import load_worker
from tritium.runtime.loaded_weights import LoadedWeights
from tritium.testing.fake_cuda import pretend_to_have_a_gpu
from tritium.testing.tiny_encoders import VOCAB_SIZE, make_encoder, reference
from tritium.tuner import tune as tuner
from tritium.tuner.timing_cache import TimingCache
from tritium.wire import Encode, Text

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
SIZES: dict[str, Any] = {
    "hidden_size": 128 if HAS_GPU else 32,
    "num_attention_heads": 2,
    "intermediate_size": 256 if HAS_GPU else 48,
    "num_hidden_layers": 3 if HAS_GPU else 1,
    "max_position_embeddings": 330,
}
LENGTHS = (5, 300, 1, 33, 64, 17, 128, 65) if HAS_GPU else (5, 33, 1, 17, 8, 9, 2, 3)
SMALL = RuntimeConfig(max_num_seqs=16, max_num_batched_tokens=1024)
LARGE = RuntimeConfig(max_num_seqs=16, max_num_batched_tokens=8192)  # whose inputs are copied part by part
DTYPES = ("float32", "float16", "bfloat16") if HAS_GPU else ("float32",)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        pretend_to_have_a_gpu(monkeypatch.setattr)


def requests_for(task: Any, num_types: int = 2, **options: Any) -> list[EncoderRequest]:
    """Texts of `LENGTHS`, the second part of each of another type."""
    requests = []
    for length in LENGTHS:
        ids = torch.randint(5, VOCAB_SIZE, (length,)).tolist()
        types = [(i > length // 2) * (num_types - 1) for i in range(length)]
        requests.append(EncoderRequest(token_ids=ids, token_types=types, task=task, is_normalized=False, **options))
    return requests


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root of the mean square error over the root of the mean square."""
    differences = torch.cat([(a.cpu().double() - b.double()).flatten() for a, b in zip(found, expected, strict=True)])
    return float(differences.norm() / torch.cat([b.double().flatten() for b in expected]).norm())


def answers(model: Any, requests: Sequence[EncoderRequest]) -> list[Tensor]:
    device = next(model.parameters()).device
    with torch.no_grad(), device:
        return [reference(model, r.token_ids, r.token_types)[0].cpu() for r in requests]


@pytest.mark.parametrize(
    ("architecture", "task"), [("BertModel", "token_embed"), ("RobertaForSequenceClassification", "classify")]
)
@pytest.mark.parametrize("invariance", ["fast", "bitwise"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_batch_is_as_near_to_fp32_as_transformers_is(
    architecture: str, task: str, dtype: str, invariance: Any, tmp_path: Path, device: torch.device
) -> None:
    path, model = make_encoder(tmp_path / "model", architecture, **SIZES)
    engine = build(path, output_dir=tmp_path / "engine", device="cuda", dtype=dtype, invariance=invariance)  # type: ignore[arg-type]
    runner = make_encoder_runner(engine, LARGE)
    requests = requests_for(task, runner.info.num_token_types)
    exact = answers(model, requests)
    low = 1e-5 if dtype == "float32" else error(answers(model.to(device, getattr(torch, dtype)), requests), exact)
    first = runner.compute(requests)
    for _ in range(3):  # launched one by one, captured, replayed
        assert error(runner.compute(requests), exact) <= 2 * low
    assert error(first, exact) <= 2 * low
    if invariance == "bitwise":
        assert all(torch.equal(runner.compute([r])[0], found) for r, found in zip(requests, first, strict=True))
    runner.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return make_encoder(tmp_path_factory.mktemp("bert") / "model", "BertModel", **SIZES)


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("bert") / "engine"
    return build(model[0], output_dir=path, device="cuda", dtype="float16" if HAS_GPU else "float32")


def test_each_pooling_is_made_of_the_texts_own_rows_and_kinds_share_a_batch(engine: Engine) -> None:
    runner = make_encoder_runner(engine, SMALL)
    tokens = requests_for("token_embed")
    hidden = runner.compute(tokens)
    rows: dict[str, Any] = {"cls": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}
    mixed = [
        EncoderRequest(token_ids=r.token_ids, token_types=r.token_types, task="embed", pooling=p, is_normalized=n)
        for r, p, n in zip(tokens, POOLINGS * 2, [False] * 4 + [True] * 4, strict=True)
    ]
    found = runner.compute([*mixed, tokens[0]])
    for request, value, whole in zip(mixed, found, hidden, strict=False):
        if request.pooling != "pooler":
            expected = rows[request.pooling](whole)
            expected = expected / expected.norm() if request.is_normalized else expected
            assert (value - expected).norm() <= 2e-3 * expected.norm(), request.pooling
    pooled = torch.stack([v for r, v in zip(mixed, found, strict=False) if r.pooling == "pooler"])
    assert pooled[0].abs().max() <= 1.0 and abs(pooled[1].norm() - 1) <= 1e-5
    assert found[-1].shape == hidden[0].shape and (found[-1] - hidden[0]).norm() <= 1e-2 * hidden[0].norm()
    runner.close()


@NEEDS_GPU
def test_llm_answers_many_texts_as_it_answers_each(model: tuple[Path, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    prompts = [torch.randint(5, VOCAB_SIZE, (1 + 7 * i % 90,)).tolist() for i in range(150)]
    options: Any = {"dtype": "float16", "max_num_seqs": 16, "max_num_batched_tokens": 512}
    with LLM(model[0], device="cuda", **options) as llm, LLM(model[0], dtype="float32") as exact:
        together = [out.outputs.data for out in llm.encode(prompts, use_progress=False)]
        alone = [llm.encode(prompt, use_progress=False)[0].outputs.data for prompt in prompts[:40]]
        expected = [out.outputs.data for out in exact.encode(prompts, use_progress=False)]
        assert len(llm.embed(prompts[3])[0].outputs.embedding) == 128
    assert error(together, expected) <= 1e-2 and error(alone, expected[:40]) <= 1e-2


SCHEMES = [("fp8", "bfloat16"), ("w8a8", "float16"), ("w8a16", "float16"), ("w4a16_g128", "bfloat16")]


@pytest.mark.parametrize(("scheme", "dtype"), SCHEMES if HAS_GPU else [("w8a8", "float32"), ("w8a16", "float32")])
def test_quantised_linears_are_as_near_to_fp32_as_their_references_are(
    scheme: Any, dtype: Any, model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(model[0], output_dir=tmp_path / "engine", device="cuda", dtype=dtype, scheme=scheme)
    runner = make_encoder_runner(built, SMALL)
    requests = requests_for("token_embed")
    exact, found = answers(model[1], requests), runner.compute(requests)
    runner.close()
    monkeypatch.setattr(kernel_choice, "available_backends", lambda device="cpu": frozenset({"eager"}))
    wanted = EncoderRunner(built, SMALL).compute(requests)  # the same plan, each step by its op's reference
    assert error(found, exact) <= 1.2 * error(wanted, exact)
    assert error(found, exact) > 1e-3


def test_a_server_s_worker_gives_every_text_its_embedding(engine: Engine) -> None:
    worker = load_worker(engine, RuntimeConfig(max_num_seqs=3, max_num_batched_tokens=400))
    for name in "abc":
        worker.apply(Encode(name, [Text(list(range(5, 5 + n)), [0] * n) for n in (4, 40, 100 if HAS_GPU else 20, 9)]))
    while worker.has_work:
        worker.step()
    outputs = worker.take_outputs()
    assert sorted((o.request_id, o.sample_index) for o in outputs) == [(n, i) for n in "abc" for i in range(4)]
    assert {o.finish_reason for o in outputs} == {"stop"}
    assert {len(o.embedding) for o in outputs} == {4 * SIZES["hidden_size"]}


def test_a_batch_that_finds_no_room_is_one_error_and_the_next_one_is_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = make_encoder_runner(engine, SMALL)
    call = runner._runner.call

    def full(bound: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(runner._runner, "call", full)
    with pytest.raises(OutOfMemory, match=r"running a batch ran out of memory on .*less max_num_batched_tokens"):
        runner.compute(requests_for("embed"))
    monkeypatch.setattr(runner._runner, "call", call)
    assert len(runner.compute(requests_for("embed"))) == len(LENGTHS)
    runner.close()


def test_weights_that_find_no_room_are_one_error_with_the_numbers_when_it_is_opened(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(LoadedWeights, "get", full)
    with pytest.raises(
        OutOfMemory, match=r"loading the model ran out of memory on .*; the engine takes weights .*MB, act"
    ):
        make_encoder_runner(engine, SMALL)
    monkeypatch.setattr(plan_runner, "free_memory", lambda device: 1 << 30)  # all of which is kept for libraries
    with pytest.raises(
        OutOfMemory, match=r"the engine does not fit: memory available 0\.0 MB, weights .*, arena .*; give less max_num"
    ):
        make_encoder_runner(engine, SMALL)


def test_an_engine_has_read_its_weights_when_it_is_open(model: tuple[Path, Any], tmp_path: Path) -> None:
    dtype: Any = "float16" if HAS_GPU else "float32"
    built = build(model[0], output_dir=tmp_path / "engine", device="cuda", dtype=dtype)
    runner = make_encoder_runner(built, SMALL)
    shutil.rmtree(built.path)
    assert len(runner.compute(requests_for("embed"))) == len(LENGTHS)
    runner.close()


def test_an_engine_tuned_on_this_gpu_stays_near(model: tuple[Path, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tuner, "GPU_COUNTS", {"quick": (1, 700 if HAS_GPU else 20)})
    dtype: Any = "float16" if HAS_GPU else "float32"
    built = build(model[0], output_dir=tmp_path / "engine", device="cuda", dtype=dtype)
    cache = TimingCache(tuner.environment_of(built), tmp_path / "times.json")
    tuned = tuner.tune_engine(built, "quick", cache)
    assert tuned.tactics is not None and tuned.tactics.num_measured >= 4
    kernels = {choice.kernel.removesuffix("_flash").removesuffix("_fixed") for choice in tuned.tactics.choices}
    assert kernels == ({"gpu.linear", "gpu.varlen_attention"} if HAS_GPU else {"gpu.linear"})
    runner = make_encoder_runner(tuned, SMALL)
    requests = requests_for("token_embed")
    assert error(runner.compute(requests), answers(model[1], requests)) <= 1e-2
    runner.close()
