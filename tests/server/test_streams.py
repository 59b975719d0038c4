"""Many clients at once, and clients that leave: the engine answers each as if it were alone, and wastes no block."""

import asyncio
import http.client
import json
from typing import Any

import openai
import pytest

from tritium import LLM, SamplingParams

LONG = {"model": "demo_model", "prompt": "def f(", "temperature": 0, "max_tokens": 480, "ignore_eos": True}


def test_64_streams_at_once_are_each_what_generate_gives(server: Any, llm: LLM) -> None:
    prompts = [f"def function_{i}(" for i in range(64)]
    expected = [out.outputs[0] for out in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20))]

    async def stream(client: openai.AsyncOpenAI, prompt: str) -> tuple[str, str | None]:
        text, reason = "", None
        wanted = {"model": "demo_model", "prompt": prompt, "temperature": 0, "max_tokens": 20}
        async for event in await client.completions.create(stream=True, **wanted):
            text += event.choices[0].text
            reason = event.choices[0].finish_reason
        return text, reason

    async def all_at_once() -> list[tuple[str, str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

    assert asyncio.run(all_at_once()) == [(one.text, one.finish_reason) for one in expected]
    server.wait_until(lambda: server.health()["num_blocks_used"] == 0)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: Any, is_streaming: bool) -> None:
    aborted = server.metric('tritium_requests_total{finish_reason="abort"}')
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    body = json.dumps({**LONG, "temperature": 1, "stream": is_streaming, "n": 16})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    if is_streaming:
        assert connection.getresponse().readline().startswith(b"data: {")
    server.wait_until(lambda: server.health()["num_blocks_used"] > 0)
    connection.sock.close() if connection.sock else None
    connection.close()
    server.wait_until(lambda: server.health()["num_running"] == server.health()["num_blocks_used"] == 0)
    assert server.metric('tritium_requests_total{finish_reason="abort"}') == aborted + 16
    assert server.metric("tritium_kv_blocks_used") == 0


def test_counts_are_those_of_the_requests(server: Any) -> None:
    names = ["tritium_prompt_tokens_total", "tritium_output_tokens_total", "tritium_request_seconds_count"]
    names.append('tritium_requests_total{finish_reason="length"}')
    before = [server.metric(name) for name in names]
    usage = server.client().completions.create(model="demo_model", prompt="import os", max_tokens=5, n=2).usage
    after = [server.metric(name) for name in names]
    gained = [b - a for a, b in zip(before, after, strict=True)]
    assert gained == [2 * usage.prompt_tokens, usage.completion_tokens, 2, 2]
    assert server.metric("tritium_engine_up") == 1
    assert server.metric("tritium_kv_blocks") == server.health()["num_blocks_total"] > 0
