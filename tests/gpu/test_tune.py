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

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = [[3, 5, 7], list(range(60)), [9] * 31, [4]]


def answers(path: Path) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(path, max_num_seqs=4, max_num_batched_tokens=128, kv_cache_memory=256 << 20) as llm:
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_progress=False)]


@pytest.mark.parametrize(("scheme", "dtype"), [("w8a16", "float16"), ("fp8", "bfloat16")])
def test_a_tuned_engine_begins_with_the_same_tokens(
    scheme: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path / "cache"))
    model = PlainLlama(size=256, head_size=64, intermediate=512).to(getattr(torch, dtype))
    path = build(model, output_dir=tmp_path / "e", max_model_len=512, device="cuda", scheme=scheme).path
    plain = answers(path)
    result = CliRunner().invoke(app, ["tune", str(path), "--json"], catch_exceptions=False)
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
    assert all(len(tokens) == 8 for tokens in tuned)
    again = CliRunner().invoke(app, ["tune", str(path), "--json"], catch_exceptions=False)
    assert json.loads(again.stdout)["num_measured"] <= report["num_measured"] // 4  # what this GPU cannot run
