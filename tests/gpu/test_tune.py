"""An engine tuned on a GPU: times are taken, chosen from, and used, and the answers stay. Needs a GPU."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tritium import LLM, SamplingParams
from tritium.cli.main import app
from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.engine.environment import differences, gpu_environment
from tritium.testing.plain_models import PlainLlama
from tritium.tuner import tune as tuner
from tritium.tuner.sites import sites

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = [[3, 5, 7], list(range(60)), [9] * 31, [4]]
TILE = "gpu.quantized_linear:BLOCK_N=64:BLOCK_M=64:SPLITS=1:num_warps=4:num_stages=3"


def answers(path: Path) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(path, max_num_seqs=4, max_num_batched_tokens=128, kv_cache_memory=256 << 20) as llm:
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_progress=False)]


def denied(engine: Engine) -> list[str]:
    """All tiles but one, and the attention of bitwise engines: each is a kernel that takes seconds to compile."""
    every = [site.candidates for site in sites(engine.plan, (), "cuda", is_thorough=False)]
    names = {candidate.name for candidates in every for candidate in candidates} - {TILE}
    return sorted(name for name in names if "BLOCK_N" in name or name == "gpu.paged_attention_fixed")


@pytest.mark.parametrize(("scheme", "dtype"), [("w8a16", "float16"), ("fp8", "bfloat16")])
def test_a_tuned_engine_begins_with_the_same_tokens(
    scheme: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tritium.tuner.timing_cache.cache_dir", lambda: tmp_path)  # times alone: CPU kernels stay
    monkeypatch.setattr(tuner, "GPU_COUNTS", {"quick": (16, 320)})  # decoding sequences, and a prompt
    model = PlainLlama(size=256, head_size=64, intermediate=512, num_layers=1).to(getattr(torch, dtype))
    how: dict[str, Any] = {"max_model_len": 512, "device": "cuda", "scheme": scheme}
    engine = build(model, output_dir=tmp_path / "e", **how)
    path, plain = engine.path, answers(engine.path)
    deny = [word for name in denied(engine) for word in ("--deny", name)]
    result = CliRunner().invoke(app, ["tune", str(path), *deny, "--json"], catch_exceptions=False)
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["num_measured"] > 20 and report["num_cached"] == 0
    assert all(0 < s < 1 for choice in report["choices"] for s in choice["seconds"].values())
    tactics = Engine.load(path, verify=True).tactics
    assert tactics is not None and differences(tactics.environment, gpu_environment()) == ""
    with caplog.at_level(logging.WARNING, logger="tritium"):
        tuned = answers(path)
    assert "defaults are used" not in caplog.text
    # another order of a sum may part two tokens that are about as good as each other, and all that follow
    assert [tokens[0] for tokens in tuned] == [tokens[0] for tokens in plain]
    assert all(len(tokens) == 4 for tokens in tuned)
    again = build(model, output_dir=tmp_path / "again", **how, tune="quick").tactics
    assert again is not None and again.choices == tactics.choices
    assert again.num_measured == 0  # what this GPU refuses is known too
