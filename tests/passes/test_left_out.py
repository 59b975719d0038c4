"""Without any one optional pass, and without all of them, an engine still answers as transformers does."""

import pytest
import torch

from tritium.compiler import build
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.testing import tiny_encoders
from tritium.testing import tiny_models as tiny
from tritium.testing.pass_choices import ALL_ON, LEFT_OUT
from tritium.testing.recorder import Recorder, greedy_request

pytestmark = pytest.mark.full
FAMILIES = ("llama", "gptj", "gemma2", "mixtral")
DTYPES = ("float32", "bfloat16")
LENGTHS = (3, 24, 40)  # beyond the window of Gemma 2, which is 12
NUM_TOKENS = 12
CONFIG = RuntimeConfig(
    max_num_seqs=4, max_num_batched_tokens=24, kv_cache_memory=1 << 24, max_model_len=64, num_threads=1
)


def answers(engine: Engine) -> list[tuple[list[int], int, torch.Tensor]]:
    """Greedy answers to prompts in flight together: tokens, length of the prompt, logits [NUM_TOKENS, V]."""
    requests = [greedy_request(f"{n}", tiny.random_prompt(n, seed=n), NUM_TOKENS) for n in LENGTHS]
    logits = Recorder(engine, CONFIG).run(requests)
    found = []
    for request in requests:
        rows = [row for _, row in sorted(logits[request.request_id].items())]
        tokens = [*request.prompt_token_ids, *(int(row.argmax()) for row in rows)]
        found.append((tokens, len(request.prompt_token_ids), torch.stack(rows)))
    return found


def at_answers(logits_TV: torch.Tensor, num_prompt: int) -> torch.Tensor:
    return logits_TV[num_prompt - 1 :]


@pytest.mark.parametrize("choice", LEFT_OUT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoders_logits_and_tokens_are_those_of_transformers(tmp_path, family, dtype, choice):
    path = tiny.make_checkpoint(tmp_path / "model", family, seed=1, dtype=dtype)
    engine = build(path, output_dir=tmp_path / "engine", max_model_len=64, disabled_passes=LEFT_OUT[choice])
    exact, theirs = tiny.reference_model(path), tiny.reference_model(path, dtype)
    errors, allowed = [], []
    for tokens, num_prompt, found in answers(engine):
        expected = at_answers(tiny.reference_logits(exact, tokens[:-1]), num_prompt)
        if dtype == "float32":
            assert tiny.relative_error(found, expected) <= 1e-4
            assert expected.argmax(-1).tolist() == tokens[num_prompt:]
        errors.append(found - expected)
        allowed.append(at_answers(tiny.reference_logits(theirs, tokens[:-1]), num_prompt) - expected)
    if dtype == "bfloat16":
        ours, of_theirs = (torch.cat(rows).square().mean().sqrt() for rows in (errors, allowed))
        assert ours <= 2 * of_theirs


@pytest.mark.parametrize("choice", LEFT_OUT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["BertModel", "RobertaForSequenceClassification"])
def test_an_encoders_outputs_are_those_of_transformers_in_any_company(tmp_path, architecture, dtype, choice):
    path, model = tiny_encoders.make_encoder(tmp_path / "model", architecture, dtype=dtype)
    engine = build(path, output_dir=tmp_path / "engine", disabled_passes=LEFT_OUT[choice])
    runner = EncoderRunner(engine, RuntimeConfig(num_threads=1))
    task = "token_embed" if architecture == "BertModel" else "classify"
    requests = []
    for length in (5, 66, 1, 33):
        ids = torch.randint(5, tiny_encoders.VOCAB_SIZE, (length,)).tolist()
        types = [(i > length // 2) * (runner.info.num_token_types - 1) for i in range(length)]
        requests.append(EncoderRequest(token_ids=ids, token_types=types, task=task, is_normalized=False))
    together = runner.compute(requests)
    for request, found in zip(requests, together, strict=True):
        assert torch.equal(runner.compute([request])[0], found)
    exact = [tiny_encoders.reference(model, r.token_ids, r.token_types)[0] for r in requests]
    if dtype == "float32":
        assert all(tiny.relative_error(a, b) <= 1e-4 for a, b in zip(together, exact, strict=True))
        return
    model.bfloat16()
    theirs = [tiny_encoders.reference(model, r.token_ids, r.token_types)[0] for r in requests]

    def error(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([(a - b).flatten() for a, b in zip(rows, exact, strict=True)]).square().mean().sqrt()

    assert error(together) <= 2 * error(theirs)


@pytest.mark.parametrize("family", [*FAMILIES, "BertModel"])
def test_leaving_out_a_pass_that_matched_changes_the_plan_and_any_other_does_not(tmp_path, family):
    """So each of the choices above is an engine of its own, or the very plan that was compared already."""
    if family == "BertModel":
        path, _ = tiny_encoders.make_encoder(tmp_path / "model", family)
    else:
        path = tiny.make_checkpoint(tmp_path / "model", family)
    plans = {}
    for name, disabled in LEFT_OUT.items():
        engine = build(path, output_dir=tmp_path / name, disabled_passes=disabled)
        plans[name] = engine.plan
        if name == ALL_ON:
            matched = {one for one, count in engine.manifest.matches.items() if count}
    for name, disabled in LEFT_OUT.items():
        assert (plans[name] != plans[ALL_ON]) == bool(matched & set(disabled)), name
