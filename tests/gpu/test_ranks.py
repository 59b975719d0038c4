"""Two ranks with a GPU each, or, where there are not two, with made-up ones: the tokens of one CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tritium import LLM
from tritium.compiler import build
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.runtime.loop import Loop
from tritium.runtime.outputs import StepOutput
from tritium.runtime.ranks.launch import open_loop
from tritium.runtime.request import Request
from tritium.sampling_params import SamplingParams
from tritium.testing.plain_models import PlainLlama

pytestmark = pytest.mark.gpu
HAS_GPUS = torch.cuda.is_available() and torch.cuda.device_count() > 1
PROMPTS = [[3, 5, 7], list(range(20)), [9] * 11, [4]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=1),
]
CONFIG = RuntimeConfig(max_num_seqs=4, max_num_batched_tokens=16, kv_cache_memory=1 << 20)


@pytest.fixture(scope="module")
def model() -> PlainLlama:
    torch.manual_seed(0)
    return PlainLlama(size=64, head_size=16, num_layers=2)


def tokens(loop: Loop) -> list[list[int]]:
    """What each prompt gets, twice over: the second time steps are replayed, and prefixes are cached."""
    heard: dict[str, StepOutput] = {}
    found = []
    for turn in range(2):
        for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
            loop.submit(Request(f"{turn}.{index}", prompt, params), lambda out: heard.update({out.request_id: out}))
        while loop.has_work:
            loop.step()
        found += [list(heard[f"{turn}.{index}"].token_ids) for index in range(len(PROMPTS))]
    loop.close()
    assert found[:4] == found[4:]
    return found[:4]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What starts the other rank."""
    if HAS_GPUS:
        return {}
    from tritium.testing import fake_ranks

    fake_ranks.pretend_to_have_gpus(monkeypatch.setattr)
    return {"command": fake_ranks.COMMAND}


@pytest.mark.parametrize("invariance", ["fast", "bitwise"])
def test_two_ranks_choose_the_tokens_of_one_cpu(
    invariance: Any, model: PlainLlama, command: dict[str, Any], tmp_path: Path
) -> None:
    alone = build(model, output_dir=tmp_path / "alone", max_model_len=64)
    kept: dict[str, Any] = {"device": "cuda", "invariance": invariance, "tensor_parallel": 2}
    shared = build(model, output_dir=tmp_path / "shared", max_model_len=64, **kept)
    kernels = {step.kernel for step in shared.plan.steps}
    assert ("gpu.all_reduce" in kernels) is (invariance == "fast")
    assert tokens(open_loop(Engine.load(shared.path), CONFIG, None, **command)) == tokens(
        open_loop(Engine.load(alone.path), CONFIG, None)
    )


DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
TEXT = "import os\n\n\ndef main(path):\n    with open(path) as f:\n        for line in f:\n            print(line)\n"


def scores(place: Path, **options: Any) -> torch.Tensor:
    """Log-probabilities that the demo model gives a text, by the engine that these options build."""
    engine = build(DEMO, output_dir=place / "-".join(map(str, options.values())), **options)
    with LLM(engine.path, max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory=32 << 20) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (out,) = llm.generate([TEXT], params, use_progress=False)
    return torch.tensor([token.logprob for token in out.prompt_logprobs or () if token is not None])


@pytest.mark.skipif(not HAS_GPUS, reason="needs two GPUs")
@pytest.mark.parametrize("scheme", [None, "fp8"])
def test_ranks_in_low_precision_are_as_near_to_fp32_as_one_gpu_is(scheme: str | None, tmp_path: Path) -> None:
    exact = scores(tmp_path, dtype="float32")
    kept = {"device": "cuda", "dtype": "bfloat16", "scheme": scheme}
    one, two = ((scores(tmp_path, **kept, tensor_parallel=n) - exact).abs().mean() for n in (1, 2))
    assert len(exact) > 20 and 0 < two <= 1.5 * one + 1e-3
