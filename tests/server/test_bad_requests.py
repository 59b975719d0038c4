"""Requests that are wrong: each is refused by itself, names what is wrong, and the next one is answered."""

import json
import socket
from typing import Any

import pytest

OK = {"model": "demo_model", "prompt": "x", "max_tokens": 2}
CHAT = {"model": "demo_model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}

# field, what is sent, part of the message
COMPLETION_CASES: list[tuple[str, Any, str]] = [
    ("max_tokens", -1, "max_tokens must be an integer from 1 to"),
    ("max_tokens", 0, "not 0"),
    ("max_tokens", 1 << 63, "9223372036854775808"),
    ("max_tokens", "16", "not '16'"),
    ("max_tokens", True, "not True"),
    ("temperature", -0.5, "not -0.5"),
    ("temperature", 1e300, "1e+300"),
    ("temperature", [], "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.5, "not 1.5"),
    ("top_k", -2, "not -2"),
    ("min_p", -1, "min_p"),
    ("seed", -1, "seed"),
    ("seed", 1 << 64, "seed"),
    ("logprobs", 10**6, "not 1000000"),
    ("logprobs", -2, "not -2"),
    ("n", 0, "n must be an integer from 1 to 128, not 0"),
    ("n", 10**6, "not 1000000"),
    ("best_of", 4, "best_of is not supported"),
    ("prompt_logprobs", 1, "prompt_logprobs is not supported"),
    ("logits_processors", ["os.system"], "logits_processors is not supported"),
    ("truncate_prompt_tokens", 1, "truncate_prompt_tokens is not supported"),
    ("logit_bias", {"5": 1000}, "logit_bias of token 5"),
    ("n", 2, "n=2"),
    ("n", "2", "Expected `int`, got `str` - at `n`"),
    ("stop", [""], "each string of stop needs 1 to 1024"),
    ("stop", ["x"] * 10_000, "64"),
    ("stop", [1], "stop must be"),
    ("stop_token_ids", [-1], "stop_token_ids"),
    ("allowed_token_ids", list(range(1 << 20)), "allowed_token_ids may hold at most 4096 entries"),
    ("allowed_token_ids", [5, 4096], "allowed_token_ids has token id 4096"),
    ("allowed_token_ids", [5, True], "allowed_token_ids must be one int"),
    ("min_tokens", 5, "min_tokens must be an integer from 0 to 2, not 5"),
    ("priority", 1 << 40, "priority must be an integer within"),
    ("cache_salt", "x" * 1025, "at most 1024 characters, not 1025: send a hash"),
    ("priority", 1 << 70, "not 1180591620717411303424"),
    ("stream", "yes", "`stream`"),
    ("stream_options", {"foo": 1}, "foo"),
    ("prompt", [], "prompt is empty"),
    ("prompt", [[]], "prompt is empty"),
    ("prompt", ["a", 1], "prompt mixes text and token ids"),
    ("prompt", [1, -5], "token id -5 in prompt is not in 0..4095"),
    ("prompt", [4096], "token id 4096"),
    ("prompt", [1 << 70], "token id 1180591620717411303424"),
    ("prompt", {"text": "x"}, "`prompt`"),
    ("prompt", ["x"] * 129, "129 prompts with n=1 are more than 128 answers"),
    ("prompt", "word " * 600, "context of 512 tokens"),
    ("prompt", ["x", "word " * (1 << 20)], "prompt has 5242880 characters"),
    ("prompt", [5] * 512, "prompt has 512 tokens"),
    ("suffix", "y", "suffix is not supported"),
    ("temprature", 1, "unknown field 'temprature'"),
]
CHAT_CASES: list[tuple[str, Any, str]] = [
    ("messages", [], "messages is empty"),
    ("messages", [{"content": "x"}], "needs a role"),
    ("messages", ["x"], "messages"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "text only"),
    ("messages", [{"role": "user", "content": "word " * 600}], "context of 512 tokens"),
    ("messages", [{"role": "user", "content": "word " * (1 << 17)}], "characters; this model's context of 512 tokens"),
    ("tools", [{"type": "function"}], "tools is not supported"),
    ("response_format", {"type": "json_object"}, "response_format is not supported"),
    ("chat_template_kwargs", {"tools": []}, "'tools' is not for chat_template_kwargs"),
    ("chat_template_kwargs", {"template": "x"}, "'template'"),
    ("top_logprobs", 2, "top_logprobs needs logprobs"),
    ("max_completion_tokens", 3, "max_tokens and max_completion_tokens differ"),
]


@pytest.mark.parametrize(
    ("path", "good", "field", "value", "message"),
    [("/v1/completions", OK, *case) for case in COMPLETION_CASES]
    + [("/v1/chat/completions", CHAT, *case) for case in CHAT_CASES],
)
def test_a_wrong_field_is_a_400_that_names_it(
    server: Any, path: str, good: dict[str, Any], field: str, value: Any, message: str
) -> None:
    status, body = server.post(path, {**good, "temperature": 0, field: value})
    assert status == 400, body
    error = body["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in (field, None)
    assert message in error["message"] and field in error["message"]
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named(server: Any, missing: str) -> None:
    status, body = server.post("/v1/completions", {name: value for name, value in OK.items() if name != missing})
    assert (status, body["error"]["param"]) == (400, missing)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b'{"model": "demo_model", "prompt": "x", "temperature": NaN}', 400, "not valid JSON"),
        (b'{"model": "demo_model", "prompt": "x", "temperature": 1e999}', 400, "not valid JSON"),
        (b'{"model": "demo_model", "prompt": "\xff"}', 400, "not valid JSON"),
        (b'{"model": "demo_model", "prompt": "\\ud800"}', 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'"' + b"x" * (9 << 20) + b'"', 413, "larger than 8,388,608 bytes"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server: Any, body: bytes, status: int, message: str) -> None:
    code, data = server.send("POST", "/v1/completions", body)
    assert code == status
    assert message in json.loads(data)["error"]["message"]


def test_a_body_that_grows_past_the_limit_without_saying_so_is_refused(server: Any) -> None:
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        piece = b"x" * (1 << 20)
        for _ in range(9):
            connection.sendall(b"100000\r\n" + piece + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_other_kinds_of_body_paths_and_methods_are_refused_in_the_same_shape(server: Any) -> None:
    for method, path, headers, status in [
        ("POST", "/v1/completions", {"content-type": "text/plain"}, 415),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/nothing", {}, 404),
    ]:
        code, data = server.send(method, path, b"{}", headers)
        assert code == status
        assert json.loads(data)["error"].keys() == {"message", "type", "param", "code"}


def test_after_all_that_a_good_request_is_answered_and_no_block_is_held(server: Any) -> None:
    status, body = server.post("/v1/completions", OK)
    assert (status, body["usage"]["completion_tokens"]) == (200, 2)
    assert server.health()["num_blocks_used"] == 0
