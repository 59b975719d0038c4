"""A small model on a GPU against transformers on it: in fp32 the same tokens, in bf16 none that fp32 finds worse.

Needs a GPU: Triton's interpreter would take hours.
"""

from pathlib import Path

import pytest
import torch

from tritium import LLM, SamplingParams

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = ["def main(", "import os\n", "class A:\n    def __init__(self", "for i in range(", "x = 1\n" * 40, "return"]


def reference_logits(token_ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    if not hasattr(reference_logits, "model"):
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).cuda().eval()
        reference_logits.model = model  # type: ignore[attr-defined]
    with torch.no_grad():
        return reference_logits.model(torch.tensor([token_ids]).cuda()).logits[0].cpu()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("dtype", "allowed_gap"), [("float32", 1e-3), ("bfloat16", 0.25)])
@pytest.mark.parametrize("max_num_batched_tokens", [512, 24])
def test_greedy_tokens_are_those_of_transformers(
    dtype: str, allowed_gap: float, max_num_batched_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    with LLM(DEMO, device="cuda", dtype=dtype, max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens) as llm:
        outputs = llm.generate(PROMPTS * 2, params, use_progress=False)
    num_different = 0
    for out in outputs:
        prompt, tokens = out.prompt_token_ids, out.outputs[0].token_ids
        assert len(tokens) == 48, out
        logits = reference_logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert (logits.amax(-1) - chosen).max() <= allowed_gap
        num_different += int((logits.argmax(-1) != torch.tensor(tokens)).sum())
    assert num_different <= (0 if dtype == "float32" else 0.05 * 48 * len(outputs))


def test_sampling_and_what_only_the_host_can_do_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    params = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=3, max_tokens=20),
        SamplingParams(temperature=0.0, logprobs=2, max_tokens=20),
        SamplingParams(temperature=1.0, min_p=0.05, seed=5, max_tokens=24),
    ]
    with LLM(DEMO, device="cuda", max_num_seqs=8) as llm:
        together = llm.generate(PROMPTS[:3], params, use_progress=False)
        alone = llm.generate(PROMPTS[1], params[1], use_progress=False)[0]
    assert all(out.outputs[0].finish_reason in ("length", "stop") for out in together)
    assert together[1].outputs[0].logprobs is not None and len(together[1].outputs[0].logprobs[0].top_logprobs) == 2
    assert alone.outputs[0].token_ids == together[1].outputs[0].token_ids
