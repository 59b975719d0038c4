"""The real `openai` package against a real socket: its answers are `LLM`'s."""

import openai
import pytest

from tritium import LLM, SamplingParams

MODEL = "demo_model"
PROMPT = "def main("
MESSAGES = [{"role": "user", "content": "Read a file and count its lines."}]
GREEDY = {"temperature": 0, "max_tokens": 24}


def test_a_completion_is_the_one_of_llm_generate(client: openai.OpenAI, llm: LLM) -> None:
    [expected] = llm.generate(PROMPT, SamplingParams(**GREEDY))
    answer = client.completions.create(model=MODEL, prompt=PROMPT, **GREEDY)
    [choice] = answer.choices
    assert (answer.object, answer.model, choice.index) == ("text_completion", MODEL, 0)
    assert choice.text == expected.outputs[0].text
    assert choice.finish_reason == expected.outputs[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_a_completion_that_says_nothing_has_sixteen_tokens(client: openai.OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt=PROMPT, temperature=0).usage.completion_tokens == 16


def test_many_prompts_and_prompts_of_token_ids_are_answered_in_order(client: openai.OpenAI, llm: LLM) -> None:
    prompts = ["import os\n", "class A:", PROMPT]
    expected = [output.outputs[0].text for output in llm.generate(prompts, SamplingParams(**GREEDY))]
    as_text = client.completions.create(model=MODEL, prompt=prompts, **GREEDY)
    ids = [llm.tokenizer.encode(prompt) for prompt in prompts]
    as_ids = client.completions.create(model=MODEL, prompt=ids, **GREEDY)
    one = client.completions.create(model=MODEL, prompt=ids[0], **GREEDY)
    for answer in (as_text, as_ids):
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == expected
    assert [choice.text for choice in one.choices] == expected[:1]


def test_echo_puts_the_prompt_before_the_text(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=PROMPT, **GREEDY).choices[0].text
    assert client.completions.create(model=MODEL, prompt=PROMPT, echo=True, **GREEDY).choices[0].text == PROMPT + plain
    events = client.completions.create(model=MODEL, prompt=PROMPT, echo=True, stream=True, **GREEDY)
    assert "".join(event.choices[0].text for event in events) == PROMPT + plain


def test_a_streamed_completion_joins_to_the_whole_one_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, **GREEDY)
    events = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *parts, last = events
    assert len(parts) > 10
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts[-2:]] == [None, "length"]
    assert all(part.usage is None for part in parts)
    assert (last.choices, last.usage.completion_tokens) == ([], 24)
    assert len({event.id for event in events}) == 1


def test_a_chat_is_the_one_of_llm_chat_and_streams_to_the_same(client: openai.OpenAI, llm: LLM) -> None:
    [expected] = llm.chat(MESSAGES, SamplingParams(**GREEDY))
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.outputs[0].text)
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    events = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **GREEDY))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == expected.outputs[0].text
    assert events[-1].choices[0].finish_reason == "length"


def test_parts_of_text_are_one_message(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Read a file"}, {"type": "text", "text": "and count."}]
    joined = [{"role": "user", "content": "Read a file\nand count."}]
    answers = [
        client.chat.completions.create(model=MODEL, messages=messages, **GREEDY)
        for messages in ([{"role": "user", "content": parts}], joined)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_a_chat_without_max_tokens_goes_on_to_a_stop_or_the_end_of_the_context(client: openai.OpenAI, llm: LLM) -> None:
    messages = [{"role": "user", "content": "x = 1\n" * 92}]
    [expected] = llm.chat(messages, SamplingParams(temperature=0))
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids) > 16


def test_logprobs_of_a_completion_are_those_of_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    [expected] = llm.generate(PROMPT, SamplingParams(logprobs=2, **GREEDY))
    answer = client.completions.create(model=MODEL, prompt=PROMPT, logprobs=2, **GREEDY)
    got = answer.choices[0].logprobs
    assert got.token_logprobs == pytest.approx([token.logprob for token in expected.outputs[0].logprobs], abs=1e-6)
    assert "".join(got.tokens) == answer.choices[0].text
    assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(24)]
    for name, top, token in zip(got.tokens, got.top_logprobs, expected.outputs[0].logprobs, strict=True):
        assert len(top) == 2
        assert top[name] == pytest.approx(token.logprob, abs=1e-6)


def test_logprobs_of_a_chat_name_tokens_and_their_bytes_streaming_or_not(client: openai.OpenAI) -> None:
    wanted = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = client.chat.completions.create(**wanted).choices[0]
    content = whole.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == whole.message.content
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob for token in content)
    streamed = [
        token
        for event in client.chat.completions.create(stream=True, **wanted)
        if event.choices[0].logprobs is not None
        for token in event.choices[0].logprobs.content
    ]
    assert streamed == content


def test_stop_strings_end_the_text_and_are_not_part_of_it(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=64, stop=["module"])
    [expected] = llm.generate(PROMPT, params)
    wanted = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 64, "stop": ["module"]}
    answer = client.completions.create(**wanted)
    assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason == "stop"
    assert answer.choices[0].text == expected.outputs[0].text
    assert "".join(event.choices[0].text for event in client.completions.create(stream=True, **wanted)) == (
        expected.outputs[0].text
    )


def test_n_and_a_seed_give_the_answers_of_llm_chat_streaming_or_not(client: openai.OpenAI, llm: LLM) -> None:
    sampling = {"n": 3, "seed": 11, "temperature": 1.0, "max_tokens": 16}
    [expected] = llm.chat(MESSAGES, SamplingParams(**sampling))
    texts = [output.text for output in expected.outputs]
    assert len(set(texts)) == 3
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, **sampling)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == texts
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == sum(len(output.token_ids) for output in expected.outputs)
    streamed = ["", "", ""]
    for event in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **sampling):
        streamed[event.choices[0].index] += event.choices[0].delta.content or ""
    assert streamed == texts


def test_fields_beyond_openais_reach_the_sampler(client: openai.OpenAI, llm: LLM) -> None:
    extra = {"min_tokens": 5, "ignore_eos": True, "top_k": 1}
    [expected] = llm.generate(PROMPT, SamplingParams(max_tokens=12, **extra))
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, extra_body=extra)
    assert answer.choices[0].text == expected.outputs[0].text


def test_the_model_is_listed_with_its_length_and_another_is_not_found(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 512)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match=r"'gpt-4' does not exist here; this server has 'demo_model'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_biases_penalties_and_bad_words_are_those_of_llm_generate(client: openai.OpenAI, llm: LLM) -> None:
    [free] = llm.generate(PROMPT, SamplingParams(**GREEDY))
    banned = free.outputs[0].token_ids[0]
    rules = {"logit_bias": {str(banned): -100.0}, "presence_penalty": 1.5, "frequency_penalty": 0.5}
    more = {"repetition_penalty": 1.2, "bad_words": ["self"]}
    [expected] = llm.generate(PROMPT, SamplingParams(**GREEDY, **rules, **more))
    assert expected.outputs[0].text != free.outputs[0].text
    answer = client.completions.create(model=MODEL, prompt=PROMPT, **GREEDY, **rules, extra_body=more)
    assert answer.choices[0].text == expected.outputs[0].text
