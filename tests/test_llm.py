"""`LLM` on a tiny model: transformers' greedy tokens, streaming, aborts, refusals, the cache of engines."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from tritium import LLM, SamplingParams
from tritium.build_child import build_in_child
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.engine import cache, obtain
from tritium.errors import CheckpointError, ConfigError, EngineError, RequestError, RequestTooLarge
from tritium.testing.tiny_models import make_llama_with_tokenizer, random_prompt, reference_model

VOCAB_SIZE = 400
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_threads": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    return make_llama_with_tokenizer(folder, vocab_size=VOCAB_SIZE, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def engine_dir(model_dir):
    return build(model_dir, output_dir=model_dir.parent / "engine").path


@pytest.fixture(scope="module")
def llm(engine_dir):
    with LLM(engine_dir, **LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(model_dir):
    return reference_model(model_dir)


def greedy(reference, ids, count=12):
    out = reference.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(ids) :].tolist()


def assert_pool_is_full(llm):
    assert llm.stats.num_running == llm.stats.num_waiting == llm.stats.num_blocks_used == 0


def test_many_prompts_in_flight_give_the_greedy_tokens_of_transformers(llm, reference):
    prompts = [random_prompt(length, VOCAB_SIZE, seed=length) for length in (1, 2, 5, 16, 17, 33, 40, 70, 3, 64)]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == prompts
    for output in outputs:
        assert output.outputs[0].token_ids == greedy(reference, output.prompt_token_ids)
        assert output.finished
        assert output.outputs[0].finish_reason == "length"
    assert_pool_is_full(llm)


def test_a_prompt_of_text_comes_back_with_its_ids_and_the_text_of_its_tokens(llm):
    [output] = llm.generate("def main(", GREEDY)
    assert output.prompt == "def main("
    assert output.prompt_token_ids == llm.tokenizer.encode("def main(")
    assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)


def test_one_list_of_ids_is_one_prompt_and_each_prompt_may_have_its_own_params(llm):
    ids = [5, 6, 7]
    assert len(llm.generate(ids, GREEDY)) == 1
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 4)]
    outputs = llm.generate([ids, "x"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 4]
    with pytest.raises(RequestError, match="2 prompts need one SamplingParams, or 2, not 1"):
        llm.generate([ids, ids], params[:1])
    assert llm.generate([], GREEDY) == []


def test_max_tokens_unset_means_sixteen_for_completions_and_the_whole_context_for_chats(engine_dir):
    with LLM(engine_dir, max_model_len=64, **LIMITS) as llm:
        params = SamplingParams(temperature=0, ignore_eos=True)
        assert len(llm.generate("a", params)[0].outputs[0].token_ids) == 16
        [output] = llm.chat([{"role": "user", "content": "hi"}], params)
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 64
        assert output.outputs[0].finish_reason == "length"


def test_chat_answers_conversations_rendered_by_the_template(llm):
    one = [{"role": "user", "content": "hello"}]
    outputs = llm.chat([one, [*one, {"role": "assistant", "content": "yes"}]], GREEDY)
    assert outputs[0].prompt == "user: hello\nassistant:"
    assert outputs[1].prompt == "user: hello\nassistant: yes\nassistant:"
    assert llm.chat(one, GREEDY)[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    with pytest.raises(RequestError, match="messages is empty"):
        llm.chat([])


def test_repeated_prefixes_are_reused_and_change_nothing(llm):
    ids = random_prompt(50, VOCAB_SIZE, seed=77)
    [first] = llm.generate(ids, GREEDY)
    [second] = llm.generate(ids, GREEDY)
    assert second.num_cached_tokens >= 32
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_seed_repeats_a_sample_whoever_else_runs(llm):
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=12, ignore_eos=True)
    alone = llm.generate("abc", params)[0].outputs[0].token_ids
    crowd = llm.generate(["abc", "x", "yy", "abc"], [params, GREEDY, SamplingParams(max_tokens=20), params])
    assert crowd[0].outputs[0].token_ids == crowd[3].outputs[0].token_ids == alone
    other = llm.generate("abc", SamplingParams(temperature=1.5, seed=4, max_tokens=12, ignore_eos=True))
    assert other[0].outputs[0].token_ids != alone


def test_the_engine_seed_repeats_unseeded_samples(engine_dir):
    texts = []
    for _ in range(2):
        with LLM(engine_dir, seed=11, **LIMITS) as llm:
            texts.append([o.outputs[0].text for o in llm.generate(["a", "a"], SamplingParams(temperature=1.5))])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_logprobs_are_those_of_transformers(llm, reference):
    ids = random_prompt(20, VOCAB_SIZE, seed=5)
    [output] = llm.generate(ids, SamplingParams(temperature=0, max_tokens=1, logprobs=5))
    expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1], -1).topk(5)
    [token] = output.outputs[0].logprobs
    assert [i for i, _ in token.top_logprobs] == expected.indices.tolist()
    assert [p for _, p in token.top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert token.logprob == token.top_logprobs[0][1]
    assert llm.generate(ids, GREEDY)[0].outputs[0].logprobs is None


def test_a_stop_string_ends_the_text_before_it(llm):
    [free] = llm.generate("abc", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    [output] = llm.generate("abc", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop))
    assert output.outputs[0].text == text[: text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert len(output.outputs[0].token_ids) < 40
    assert_pool_is_full(llm)


def test_eos_ends_an_output_unless_it_is_ignored(llm):
    [free] = llm.generate("abc", GREEDY)
    third = free.outputs[0].token_ids[2]
    [output] = llm.generate("abc", SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(third,)))
    assert output.outputs[0].token_ids == free.outputs[0].token_ids[: free.outputs[0].token_ids.index(third) + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", third)


def test_streamed_pieces_join_to_the_whole(llm):
    async def collect(prompt):
        return [out async for out in llm.generate_async(prompt, GREEDY)]

    async def both():
        return await asyncio.gather(collect("def main("), collect([9, 8, 7]))

    for pieces, prompt in zip(asyncio.run(both()), ["def main(", [9, 8, 7]], strict=True):
        [whole] = llm.generate([prompt], GREEDY)
        assert "".join(out.outputs[0].text for out in pieces) == whole.outputs[0].text
        assert [t for out in pieces for t in out.outputs[0].token_ids] == whole.outputs[0].token_ids
        assert [out.finished for out in pieces] == [False] * (len(pieces) - 1) + [True]
        assert len(pieces) == 12


def test_leaving_a_stream_early_aborts_its_request(llm):
    async def first_piece():
        stream = llm.generate_async("abc", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(first_piece())
    llm.generate("x", GREEDY)  # messages are served in order: the abort came before
    assert_pool_is_full(llm)


def test_abort_ends_a_stream_with_that_reason(llm):
    async def run():
        outputs = []
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        async for out in llm.generate_async("abc", params, request_id="mine"):
            outputs.append(out)
            llm.abort("mine")
        return outputs

    outputs = asyncio.run(run())
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert outputs[-1].request_id == "mine"


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], RequestError, "empty"),
        ("", RequestError, "empty"),
        ([1, -2], RequestError, "-2"),
        ([1, 2.5], RequestError, "2.5|integer|float"),
        ([1, VOCAB_SIZE], RequestError, "400"),
        (list(range(3, 131)), RequestTooLarge, "128"),
        ("half a pair \ud800", RequestError, "Unicode"),
    ],
)
def test_a_bad_prompt_is_refused_and_its_neighbours_are_not_disturbed(llm, reference, prompt, error, words):
    neighbour = {}
    ids = random_prompt(9, VOCAB_SIZE, seed=1)
    thread = threading.Thread(target=lambda: neighbour.update(out=llm.generate(ids, GREEDY)))
    thread.start()
    with pytest.raises(error, match=words):
        llm.generate(["good", prompt] if prompt != [] else [[3], prompt], GREEDY)
    thread.join()
    assert neighbour["out"][0].outputs[0].token_ids == greedy(reference, ids)
    llm.generate("x", GREEDY)
    assert_pool_is_full(llm)


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        (5, GREEDY, "prompts must be text.* not 5"),
        (b"x", GREEDY, "not b'x'"),
        ({"text": "x"}, GREEDY, r"not \{'text': 'x'\}"),
        (["x", None], GREEDY, r"prompts\[1\] must be text or a list of token ids, not None"),
        (["x", 2.5], GREEDY, r"prompts\[1\] .* not 2.5"),
        ("x", {"temperature": 0}, r"one SamplingParams or a list of them, not \{'temperature': 0\}"),
        (["x"], [{"top_k": 1}], r"not \{'top_k': 1\}"),
    ],
)
def test_what_is_no_prompt_or_no_params_is_refused_with_its_value(llm, prompts, params, words):
    before = llm.stats.num_steps
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts, params)
    assert llm.stats.num_steps == before
    assert_pool_is_full(llm)


def test_an_array_of_ids_is_the_list_it_holds(llm):
    ids = torch.tensor([5, 6, 7])
    expected = [5, 6, 7]
    for prompts in (ids, ids.numpy(), [ids], [ids.numpy()]):
        assert [output.prompt_token_ids for output in llm.generate(prompts, GREEDY)] == [expected]


def test_a_refused_stream_raises_where_it_is_read(llm):
    async def read():
        async for _ in llm.generate_async(list(range(3, 131)), GREEDY):
            pass

    with pytest.raises(RequestTooLarge, match="128"):
        asyncio.run(read())


def test_a_prompt_that_fills_the_context_but_one_gives_one_token(llm, reference):
    ids = random_prompt(127, VOCAB_SIZE, seed=2)
    [output] = llm.generate(ids, GREEDY)
    assert output.outputs[0].token_ids == greedy(reference, ids, 1)
    assert output.outputs[0].finish_reason == "length"


def test_a_closed_llm_says_so(engine_dir):
    llm = LLM(engine_dir, **LIMITS)
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("x")


def test_a_closed_llm_gives_its_memory_back_while_somebody_still_has_it(engine_dir):
    llm = LLM(engine_dir, **LIMITS)
    llm.generate("x", GREEDY)
    binder = llm._thread.running_loop.executor.steps.binder
    parts = [weakref.ref(part) for part in (binder, binder._weights, binder._kv_cache, binder._arena)]
    del binder
    llm.close()
    assert [part() for part in parts] == [None] * 4
    assert_pool_is_full(llm)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_length": 5}, "did you mean 'max_model_len'"),
        ({"quantisation": 5}, "unknown option 'quantisation'"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": 1}, "max_model_len must be an integer from 2 .* not 1"),
        ({"dtype": "int3"}, "dtype"),
        ({"dtype": "bfloat16"}, "computes in float32"),
        ({"max_model_len": 4096}, "was built for 128"),
        ({"scheme": "w4"}, "scheme"),
    ],
)
def test_a_wrong_option_is_refused_by_name(engine_dir, options, words):
    with pytest.raises(ConfigError, match=words):
        LLM(engine_dir, **options)


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist: expected a model directory"):
        LLM(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no model"):
        LLM(tmp_path)


def test_a_model_is_built_once_and_found_again_by_content(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "engines_dir", lambda: tmp_path)
    builds = []

    def counting(model, config, path):
        builds.append(path)
        build_in_child(model, config, path)

    first = obtain.obtain_engine(model_dir, BuildConfig(), counting)
    assert obtain.obtain_engine(str(model_dir), BuildConfig(max_model_len=64), counting) == first
    copy = tmp_path / "elsewhere" / model_dir.name
    copy.mkdir(parents=True)
    for file in model_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert obtain.obtain_engine(copy, BuildConfig(), counting) == first
    assert builds == [first]
    assert [entry.path for entry in cache.cached_engines()] == [first]
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert cache.engine_path(copy, BuildConfig()) != first
    assert cache.engine_path(model_dir, BuildConfig(dtype="bfloat16")) != first
    cache.remove(first)
    assert cache.cached_engines() == []
    with pytest.raises(EngineError, match="not an engine"):
        cache.remove(model_dir)


def test_an_error_of_the_build_is_raised_as_itself_and_caches_nothing(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "engines_dir", lambda: tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(CheckpointError, match="safetensors"):
        LLM(broken)
    assert cache.cached_engines() == []


def test_running_an_engine_imports_neither_the_compiler_nor_what_nobody_asked_for(engine_dir):
    script = """
import gc
import sys
from tritium import LLM, SamplingParams
with LLM(sys.argv[1], num_threads=1) as llm:
    [out] = llm.generate("def", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
assert len(out.outputs[0].token_ids) == 3
assert gc.isenabled()  # it is off only while modules load
parts = ("tritium.compiler", "tritium.resolve", "tritium.graph", "tritium.passes", "tritium.models", "transformers",
         "jinja2", "rich", "huggingface_hub", "httpx", "sympy", "torch._dynamo")
print([name for name in sys.modules if name.startswith(parts)])
"""
    done = subprocess.run([sys.executable, "-c", script, str(engine_dir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_an_llm_that_is_forgotten_ends_its_thread(engine_dir):
    llm = LLM(engine_dir, **LIMITS)
    thread = llm._thread
    del llm
    gc.collect()
    thread._thread.join(timeout=20)
    assert not thread.is_alive


def test_a_program_that_ends_in_the_middle_of_a_generation_ends_cleanly(engine_dir):
    script = """
import sys, threading, time
from tritium import LLM, SamplingParams
llm = LLM(sys.argv[1], num_threads=1)
params = SamplingParams(max_tokens=100, ignore_eos=True)
threading.Thread(target=lambda: llm.generate(["a"] * 64, params), daemon=True).start()
time.sleep(0.2)
"""
    done = subprocess.run([sys.executable, "-c", script, str(engine_dir)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
