"""What has brought down other servers of language models, item by item, and the test that holds this one to it.

The items are those of published advisories and of single requests that crashed vLLM, SGLang and others.
"""

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tritium import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
OK = {"model": "demo_model", "prompt": "x", "max_tokens": 2, "temperature": 0}
CHAT = {"model": "demo_model", "max_tokens": 2, "temperature": 0}

# The file beside this one, its test, the items that it covers.
ITEMS = """
test_known_attacks.py
  unusual_requests_are_answered
    empty and degenerate prompts
    null for every field
    a prompt that leaves room for one token, and min_tokens beyond it
  logprobs_that_would_take_gigabytes_are_refused
    answers whose logprobs take gigabytes
  a_body_that_lies_about_its_length_hurts_nobody
    bodies that lie about their length, and half a connection
  of_equal_keys_the_last_one_counts
    equal keys in one object
  streams_that_are_never_read_delay_no_neighbour
    a client that opens a stream and never reads
  unusual_conversations_are_answered_or_refused
    special tokens in a user's text, ten thousand times
    unknown roles, no messages, content of null, ten thousand of them
  a_models_name_with_a_newline_is_just_unknown
    a model's name with a newline
test_bad_requests.py
  a_wrong_field_is_a_400_that_names_it
    an empty list of prompts, or one of nothing
    fan-out: n, best_of, logprobs, prompts without number
    images and other parts with URLs
    grammars and tools
    a template's options that change what it does
    token ids below 0 or beyond the vocabulary
    allowed_token_ids by the million
    numbers beyond 64 bits, strings for numbers, booleans
  a_body_that_is_no_request_is_refused
    bodies of a gigabyte
    deep JSON, NaN, infinity, lone surrogates
../test_wire.py
  what_is_no_command_is_refused
    pickle on sockets: messages are msgpack, checked
  what_is_too_large_for_a_message_goes_in_several
    a message too large for the socket
../weights/test_safetensors.py
  pickles_are_refused_with_the_command_that_converts_them
    pickled checkpoints
  a_header_that_lies_is_refused_with_the_tensor_it_lies_about
    malformed model files
../test_config.py
  the_server_listens_at_loopback_unless_told_otherwise
    sockets on every interface
../text/test_template_sandbox.py
  a_template_without_end_or_measure_is_stopped
    a template without end
  a_template_cannot_reach_python
    a template that reaches Python
test_http_protocol.py
  a_head_that_is_too_long_is_a_400
    heads without end
  an_answer_that_is_not_read_is_dropped_with_its_connection
    an answer that is never read
  a_head_that_comes_byte_by_byte_has_no_more_time
    ten thousand connections with a byte a second
  one_connection_too_many_is_told_so_and_the_next_one_after_another_ended_is_taken
    more connections than files
test_body.py
  all_bodies_together_are_bounded_and_release_makes_room
    bodies that together fill the memory
test_serve.py
  a_key_a_name_a_short_queue_and_a_request_that_outlives_sigterm
    comparing keys takes a time that tells
    SIGTERM while a stream runs
../runtime/test_engine_process.py
  an_answer_too_large_for_a_message_ends_its_own_request_alone
    an answer too large for any message
  a_step_that_raises_ends_its_requests_and_the_next_one_runs
    a step that raises
../runtime/test_scheduler.py
  a_request_that_could_never_fit_is_refused_with_the_numbers
    a request that could never fit
  a_duplicate_id_is_refused_until_the_first_has_finished
    a duplicate request id
test_arrivals.py
  a_stream_that_nobody_reads_is_bounded_by_what_it_weighs_and_ends_with_an_error
    what such a stream piles up
test_streams.py
  a_client_that_leaves_frees_its_blocks
    leaving at any moment
test_embeddings.py
  a_wrong_field_is_a_400_that_names_it
    embeddings of nothing, of texts mixed with ids
test_engine_death.py
  a_killed_engine_ends_its_requests_with_an_error_and_is_replaced
    SIGKILL of the engine
"""


def test_each_item_has_its_test() -> None:
    file, num_items = "", 0
    for line in ITEMS.strip().splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            file = line
        elif indent == 2:
            assert f"\ndef test_{line.strip()}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), line
        num_items += indent == 4
    assert num_items > 40


UNUSUAL: dict[str, dict[str, Any]] = {
    "white space": {"prompt": " \n\t "},
    "a prompt of one special token": {"prompt": [0]},
    "special tokens": {"prompt": "<|im_start|><image></s>" * 3},
    "many prompts": {"prompt": ["x"] * 128, "max_tokens": 1},
    "one token of room": {"prompt": [5] * 511, "max_tokens": 500},
    "min_tokens beyond the room": {"prompt": [5] * 510, "max_tokens": 500, "min_tokens": 400},
    "null everywhere": dict.fromkeys(("n", "top_p", "top_k", "seed", "stop", "logprobs", "logit_bias", "echo", "user")),
    "minus zero": {"temperature": -0.0, "presence_penalty": -0.0},
    "a hair of temperature": {"temperature": 1e-300},
    "a smile and a half": {"prompt": "\U0001f600\u200d\ufffd\x00"},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_requests_are_answered(server: Any, name: str) -> None:
    status, body = server.post("/v1/completions", {**OK, **UNUSUAL[name]})
    assert status == 200, body
    assert all(choice["finish_reason"] in ("length", "stop") for choice in body["choices"])


def test_of_equal_keys_the_last_one_counts(server: Any) -> None:
    body = b'{"model": "demo_model", "prompt": "x", "max_tokens": 3, "max_tokens": 1, "ignore_eos": true}'
    status, data = server.send("POST", "/v1/completions", body)
    assert (status, json.loads(data)["usage"]["completion_tokens"]) == (200, 1)


@pytest.mark.parametrize(
    ("messages", "statuses"),
    [
        ([{"role": "system", "content": "x"}], {200}),
        ([{"role": "user", "content": None}], {200, 400}),
        ([{"role": "nobody", "content": "x"}], {200, 400}),
        ([{"role": "user", "content": "x"}] * 10_000, {400}),
        ([{"role": "user", "content": "<|im_start|>system<|im_end|><image>" * 10_000}], {400}),
        ([{"role": "user\n", "content": {"x": [1]}}], {200, 400}),
    ],
)
def test_unusual_conversations_are_answered_or_refused(
    server: Any, messages: list[dict[str, Any]], statuses: set[int]
) -> None:
    status, body = server.post("/v1/chat/completions", {**CHAT, "messages": messages})
    assert status in statuses, body
    assert server.post("/v1/completions", OK)[0] == 200


def test_a_models_name_with_a_newline_is_just_unknown(server: Any) -> None:
    status, body = server.post("/v1/completions", {**OK, "model": "demo_model\n"})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert "\n" not in body["error"]["message"]


def test_a_body_that_lies_about_its_length_hurts_nobody(server: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    for length, body in [
        (b"1000", json.dumps(OK).encode()),
        (b"3", json.dumps(OK).encode()),
        (b"-1", b""),
        (b"9" * 40, b""),
    ]:
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(head + length + b"\r\n\r\n" + body)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1 << 16).startswith((b"HTTP/1.1 4", b""))
    assert server.post("/v1/completions", OK)[0] == 200


def test_logprobs_that_would_take_gigabytes_are_refused(server: Any) -> None:
    wanted = {**OK, "temperature": 1, "n": 128, "max_tokens": 500, "logprobs": 256}
    status, body = server.post("/v1/completions", wanted)
    assert (status, body["error"]["param"]) == (400, "logprobs")
    assert "64000 tokens with 256 alternatives each are 16512000 entries; at most 4194304" in body["error"]["message"]
    chat = {**CHAT, "temperature": 1, "messages": [{"role": "user", "content": "x"}], "logprobs": True}
    chat |= {"n": 128, "top_logprobs": 200, "max_tokens": None}
    assert server.post("/v1/chat/completions", chat)[0] == 400


def test_streams_that_are_never_read_delay_no_neighbour(server: Any, llm: LLM) -> None:
    prompts = [f"def function_{i}(" for i in range(8)]
    expected = [out.outputs[0].text for out in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20))]
    body = {**OK, "max_tokens": 400, "temperature": 1, "n": 8, "logprobs": 20, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    silent = [socket.socket() for _ in range(4)]
    for connection in silent:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that little fits on the way
        connection.connect(server.address)
        connection.sendall(head % len(data) + data)
    server.wait_until(lambda: server.health()["num_running"] >= 8)
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = server.client().completions.create(**{**OK, "prompt": prompts[i], "max_tokens": 20}).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[i] for i in range(8)] == expected
    for connection in silent:
        connection.close()
    server.wait_until(lambda: server.health()["num_running"] == server.health()["num_blocks_used"] == 0)
