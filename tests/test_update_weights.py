"""`LLM.update_weights`: the running model becomes the one that a fresh build from the new weights gives."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.errors import CheckpointError, ConfigError, EngineError, OutOfMemory
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_models import make_checkpoint, random_prompt

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_threads": 1}
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1)
PROMPTS = [random_prompt(length, 199, seed=length) for length in (3, 17, 40, 9)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_checkpoint(root / f"m{seed}", LLAMA | {"max_position_embeddings": 512}, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def engines(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    return [build(path, output_dir=root / path.name).path for path in checkpoints]


@pytest.fixture
def llm(engines):
    with LLM(engines[0], **LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(engines):
    """What a fresh engine of the second checkpoint answers."""
    with LLM(engines[1], **LIMITS) as llm:
        return answers(llm)


def answers(llm):
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(PROMPTS, LONG)]


def state_dict(path):
    return load_file(path / "model.safetensors")


def test_after_it_every_bit_is_that_of_a_fresh_engine(llm, checkpoints, expected):
    old = answers(llm)
    assert llm.update_weights(checkpoints[1]) == llm.weights_generation == 1
    assert answers(llm) == expected != old
    assert llm.update_weights(state_dict(checkpoints[0])) == 2
    assert answers(llm) == old


def test_a_state_dict_may_be_written_to_afterwards(llm, checkpoints, expected):
    new = state_dict(checkpoints[1])
    llm.update_weights(new)
    for tensor in new.values():
        tensor.fill_(torch.nan)
    assert answers(llm) == expected


@pytest.mark.parametrize("on_inflight", ["recompute", "finish_first", "continue"])
def test_under_traffic_requests_end_and_later_ones_are_those_of_a_fresh_engine(llm, checkpoints, expected, on_inflight):
    outputs = []
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    thread = threading.Thread(target=lambda: outputs.extend(llm.generate(PROMPTS, params)))
    thread.start()
    while llm.stats.num_running < len(PROMPTS):
        pass
    assert llm.update_weights(checkpoints[1], on_inflight=on_inflight) == 1
    thread.join()
    assert [len(o.outputs[0].token_ids) for o in outputs] == [400] * 4
    assert {o.weights_generation for o in outputs} == {0 if on_inflight == "finish_first" else 1}
    assert answers(llm) == expected
    assert llm.stats.num_blocks_used == 0


def test_recomputed_requests_go_on_as_if_the_new_weights_had_read_their_outputs(llm, checkpoints, engines):
    outputs = []
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    thread = threading.Thread(target=lambda: outputs.extend(llm.generate([PROMPTS[1]], params)))
    thread.start()
    while llm.stats.num_steps < 20:
        pass
    llm.update_weights(checkpoints[1], on_inflight="recompute")
    thread.join()
    ids = outputs[0].outputs[0].token_ids
    with LLM(engines[1], **LIMITS) as fresh, LLM(engines[0], **LIMITS) as old:
        before = old.generate([PROMPTS[1]], params)[0].outputs[0].token_ids
        num_old = next(i for i in range(401) if i == 400 or ids[i] != before[i])
        assert 0 < num_old < 400
        rest = SamplingParams(temperature=0, max_tokens=400 - num_old, ignore_eos=True)
        assert fresh.generate([PROMPTS[1] + ids[:num_old]], rest)[0].outputs[0].token_ids == ids[num_old:]


def test_what_does_not_fit_is_refused_and_the_old_weights_stay(llm, checkpoints):
    old = answers(llm)
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' is missing"):
        llm.update_weights({})
    with pytest.raises(ConfigError, match="on_inflight must be"):
        llm.update_weights(checkpoints[1], on_inflight="now")
    assert llm.weights_generation == 0
    assert answers(llm) == old


def test_without_room_for_both_the_numbers_are_told(llm, checkpoints, monkeypatch):
    monkeypatch.setattr("tritium.runtime.executor.available_memory", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"new weights take [\d,]+ bytes beside the old ones .* 1,000 are available"):
        llm.update_weights(checkpoints[1])
    assert llm.weights_generation == 0


def test_a_closed_llm_refuses(engines, checkpoints):
    llm = LLM(engines[0], **LIMITS)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.update_weights(checkpoints[1])
