"""What only the host's sampler does, on a GPU: the numbers of the same engine on the CPU. Needs a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tritium import LLM, BeamSearchParams, SamplingParams

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
WEIGHTS = DEMO / "model.safetensors"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = ["def main(", "import os\n" * 20, "class A:\n    def __init__(self", "x = 1\n" * 40]


def answers(device: str, prompts: list[str], params: Any) -> Any:
    with LLM(DEMO, device=device, dtype="float32", max_num_seqs=6, max_num_batched_tokens=48) as llm:
        if isinstance(params, BeamSearchParams):
            return llm.beam_search(prompts, params)
        return llm.generate(prompts, params, use_progress=False)


def test_edited_rows_are_those_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    common: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, **common),
        SamplingParams(temperature=0, bad_words=["os", "sys"], logit_bias={5: 2.0}, **common),
        SamplingParams(temperature=0.9, n=3, seed=5, logprobs=2, **common),
        SamplingParams(temperature=0, **common),
    ]
    on_cpu, on_gpu = answers("cpu", PROMPTS, params), answers("cuda", PROMPTS, params)
    for mine, other in zip(on_gpu, on_cpu, strict=True):
        assert [c.token_ids for c in mine.outputs] == [c.token_ids for c in other.outputs]
    for mine, other in zip(on_gpu[2].outputs, on_cpu[2].outputs, strict=True):
        for token, expected in zip(mine.logprobs, other.logprobs, strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=2e-3)
            assert len(token.top_logprobs) == len(expected.top_logprobs) == 2


def test_scored_prompts_are_those_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    common: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    params = [SamplingParams(prompt_logprobs=2, **common), SamplingParams(**common)] * 2
    for mine, other in zip(answers("cuda", PROMPTS, params), answers("cpu", PROMPTS, params), strict=True):
        assert [c.token_ids for c in mine.outputs] == [c.token_ids for c in other.outputs]
        assert (mine.prompt_logprobs is None) == (other.prompt_logprobs is None)
        for token, expected in zip(mine.prompt_logprobs or (), other.prompt_logprobs or (), strict=True):
            assert (token is None) == (expected is None)
            if token is not None:
                assert token.logprob == pytest.approx(expected.logprob, abs=2e-3)
                assert len(token.top_logprobs) == 2


def test_new_weights_are_in_use_at_once_in_graphs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(DEMO, device="cuda", dtype="float32", max_num_seqs=6, kv_cache_memory=100_000_000) as llm:
        before = [o.outputs[0].token_ids for _ in range(2) for o in llm.generate(PROMPTS, params, use_progress=False)]
        new = {name: tensor.flip(0) if "q_proj" in name else tensor for name, tensor in load_file(WEIGHTS).items()}
        assert llm.update_weights(new) == 1
        changed = [o.outputs[0].token_ids for _ in range(2) for o in llm.generate(PROMPTS, params, use_progress=False)]
        assert llm.update_weights(DEMO) == 2
        after = [o.outputs[0].token_ids for _ in range(2) for o in llm.generate(PROMPTS, params, use_progress=False)]
    assert before == after != changed and changed[:4] == changed[4:]


def test_beam_search_finds_the_sequences_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    params = BeamSearchParams(beam_width=4, max_tokens=16)
    for mine, other in zip(answers("cuda", PROMPTS, params), answers("cpu", PROMPTS, params), strict=True):
        assert [s.token_ids for s in mine.sequences] == [s.token_ids for s in other.sequences]
        assert [s.score for s in mine.sequences] == pytest.approx([s.score for s in other.sequences], abs=1e-3)
