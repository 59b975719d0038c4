"""/v1/embeddings: the real `openai` package gets what `LLM.encode` gives; wrong requests, leaving and a death."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tritium import LLM
from tritium.testing.tiny_encoders import encoder_directory

MODEL = "tiny_bert"
TEXTS = ["w1 w2 w3", "w4", " ".join(f"w{i}" for i in range(30)), "w9 unknown w9"]


def expected(embedder: LLM, inputs: Any, **options: Any) -> list[list[float]]:
    return [output.outputs.embedding for output in embedder.embed(inputs, use_progress=False, **options)]


def test_embeddings_are_those_of_llm_encode_bit_for_bit_in_either_format(embedding_server: Any, embedder: LLM) -> None:
    client, wanted = embedding_server.client(), expected(embedder, TEXTS)
    for encoding in ({}, {"encoding_format": "float"}):  # openai asks for base64 by itself
        answer = client.embeddings.create(model=MODEL, input=TEXTS, **encoding)
        assert [item.index for item in answer.data] == [0, 1, 2, 3]
        assert [item.embedding for item in answer.data] == wanted
        num_tokens = sum(len(output.prompt_token_ids) for output in embedder.encode(TEXTS))
        assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == (MODEL, num_tokens, num_tokens)


def test_one_text_token_ids_and_lists_of_token_ids_are_inputs(embedding_server: Any, embedder: LLM) -> None:
    client = embedding_server.client()
    for given, same in [("w1 w2", ["w1 w2"]), ([2, 5, 6, 3], ["w1 w2"]), ([[2, 5, 6, 3], [2, 8, 3]], ["w1 w2", "w4"])]:
        answer = client.embeddings.create(model=MODEL, input=given)
        assert [item.embedding for item in answer.data] == expected(embedder, same)


def test_long_texts_are_cut_only_when_asked(embedding_server: Any, embedder: LLM) -> None:
    client, long = embedding_server.client(), " ".join(f"w{i}" for i in range(50))
    for limit in (-1, 7):
        for text in (long, embedder.tokenizer.encode(long)):
            answer = client.embeddings.create(model=MODEL, input=text, extra_body={"truncate_prompt_tokens": limit})
            assert [item.embedding for item in answer.data] == expected(embedder, text, truncate_prompt_tokens=limit)
            assert answer.usage.prompt_tokens == (40 if limit == -1 else 7)
    with pytest.raises(openai.BadRequestError, match=r"input has 52 tokens, the model takes 40.*truncate") as caught:
        client.embeddings.create(model=MODEL, input=long)
    assert caught.value.code == "context_length_exceeded"


def test_64_requests_at_once_are_each_what_encode_gives(embedding_server: Any, embedder: LLM) -> None:
    inputs = [[f"w{i} w{j}" for j in range(1 + i % 3)] for i in range(60)] + [f"w{i}" for i in range(4)]

    async def all_at_once() -> list[list[list[float]]]:
        url = f"{embedding_server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=20) as client:
            asked = (client.embeddings.create(model=MODEL, input=one) for one in inputs)
            return [[item.embedding for item in answer.data] for answer in await asyncio.gather(*asked)]

    assert asyncio.run(all_at_once()) == [expected(embedder, one) for one in inputs]
    assert embedding_server.health()["num_waiting"] == 0


CASES: list[tuple[str, Any, str]] = [
    ("input", [], "input is empty"),
    ("input", [[]], "input is empty: it needs at least one token"),
    ("input", ["w1", 5], "input mixes text and token ids"),
    ("input", {"text": "x"}, "`input`"),
    ("input", [2, -5], "token id -5 in input is not in 0..119"),
    ("input", [[2], [1 << 70]], "token id 1180591620717411303424 in input[1]"),
    ("input", [[2], [5] * 41], "input[1] has 41 tokens, the model takes 40"),
    ("input", ["w1"] * 101, "input has 101 texts; at most 100 may be sent at once"),
    ("input", "w " * 200, "input has 400 characters; this model's context of 40 tokens holds at most 200: send"),
    ("dimensions", 16, "dimensions must be 48, not 16"),
    ("dimensions", "48", "`dimensions`"),
    ("encoding_format", "int8", "encoding_format"),
    ("truncate_prompt_tokens", 41, "truncate_prompt_tokens must be -1 or from 1 to 40, not 41"),
    ("truncate_prompt_tokens", 2, "a prompt cannot be cut to 2 tokens: 2 are the tokenizer's own"),
    ("temperature", 1, "unknown field 'temperature'"),
]


@pytest.mark.parametrize(("field", "value", "message"), CASES)
def test_a_wrong_field_is_a_400_that_names_it(embedding_server: Any, field: str, value: Any, message: str) -> None:
    status, body = embedding_server.post("/v1/embeddings", {"model": MODEL, "input": "w1", field: value})
    assert status == 400, body
    assert message in body["error"]["message"] and len(body["error"]["message"]) < 1000
    assert body["error"]["param"] in (field, "input")


def test_what_asks_for_what_happens_anyway_is_taken(embedding_server: Any, embedder: LLM) -> None:
    client = embedding_server.client()
    answer = client.embeddings.create(model=MODEL, input="", dimensions=48, user="me")
    assert [item.embedding for item in answer.data] == expected(embedder, "")


def test_each_kind_of_model_says_what_it_is_and_refuses_what_it_is_not(
    server: Any, embedding_server: Any, client: openai.OpenAI
) -> None:
    assert client.models.list().data[0].kind == "decoder"
    [model] = embedding_server.client().models.list().data
    assert (model.id, model.kind, model.max_model_len) == (MODEL, "encoder", 40)
    with pytest.raises(openai.BadRequestError, match="/v1/embeddings: the model 'demo_model' generates text") as caught:
        client.embeddings.create(model="demo_model", input="x")
    assert caught.value.code == "unsupported"
    for path, more in [("completions", {"prompt": "x"}), ("chat/completions", {"messages": [{"role": "user"}]})]:
        status, body = embedding_server.post(f"/v1/{path}", {"model": MODEL, **more})
        assert status == 400
        assert f"/v1/{path}: the model 'tiny_bert' is an encoder" in body["error"]["message"]
        assert "use /v1/embeddings" in body["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="'ada' does not exist here; this server has 'tiny_bert'"):
        embedding_server.client().embeddings.create(model="ada", input="x")


def test_a_client_that_leaves_takes_its_texts_with_it_and_a_killed_engine_is_replaced(
    embedding_server: Any, embedder: LLM
) -> None:
    server = embedding_server
    pid = server.engine_pid()
    os.kill(pid, signal.SIGSTOP)  # so that the texts wait
    aborted = server.metric('tritium_requests_total{finish_reason="abort"}')
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    body = json.dumps({"model": MODEL, "input": ["w1"] * 90})
    connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
    many = {"model": MODEL, "input": ["w2"] * 20}
    server.wait_until(lambda: server.post("/v1/embeddings", many)[0] == 429)
    connection.close()
    server.wait_until(lambda: server.metric('tritium_requests_total{finish_reason="abort"}') == aborted + 90)
    os.kill(pid, signal.SIGKILL)
    server.wait_until(lambda: server.health()["code"] == 503)
    status, answer = server.post("/v1/embeddings", many)
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    server.wait_until(lambda: server.health()["code"] == 200)
    assert server.engine_pid() != pid
    answer = server.client().embeddings.create(model=MODEL, input=TEXTS)
    assert [item.embedding for item in answer.data] == expected(embedder, TEXTS)


@pytest.mark.full
def test_serving_an_encoder_without_embeddings_fails_at_once_with_what_to_use_instead(tmp_path: Path) -> None:
    path, _ = encoder_directory(tmp_path / "judge", "BertForSequenceClassification", num_labels=1, problem_type=None)
    command = [sys.executable, "-m", "tritium", "serve", str(path), "--port", "0", "--num-threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "(BertForSequenceClassification) scores texts and has no embeddings" in done.stderr
    assert "use LLM.classify or LLM.score" in done.stderr
