"""`tritium chat`: a conversation at the terminal, or line by line from a pipe."""

import asyncio
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tritium.cli.opening import describe, resolved_config
from tritium.cli.report import error_record, print_json, say, say_config
from tritium.cli.run_command import until_stop
from tritium.errors import RequestError
from tritium.llm import LLM
from tritium.sampling_params import SamplingParams

Conversation = list[dict[str, Any]]


def run(
    *, model: str, system: str | None, sampling: Mapping[str, Any], config: Mapping[str, Any], is_json: bool
) -> None:
    """Answer each line until the input ends or /exit. With JSON: one object a line, the configuration first."""
    params = until_stop(SamplingParams(**sampling))
    with asyncio.Runner() as runner, LLM(model, **config) as llm:  # the event loop outlives the engine's last word
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise RequestError(f"{model} has no chat template; use `tritium run` with a prompt")
        resolved = resolved_config(llm)
        say_config(describe(resolved), is_json=is_json)
        if is_json:
            print_json({"config": resolved})
        opening: Conversation = [{"role": "system", "content": system}] if system else []
        conversation = list(opening)
        for line in _lines():
            if line == "/exit":
                break
            if line == "/reset":
                conversation = list(opening)
                continue
            conversation.append({"role": "user", "content": line})
            try:
                answer, finish_reason = runner.run(_answer(llm, conversation, params, is_shown=not is_json))
            except KeyboardInterrupt:  # ends the answer, not the conversation
                conversation.pop()
                say("\nstopped; the message is forgotten")
                continue
            except RequestError as error:  # too long, or refused by the template: the conversation stays as it was
                conversation.pop()
                say(f"error: {error}")
                if is_json:
                    print_json({"error": error_record(error)})
                continue
            conversation.append({"role": "assistant", "content": answer})
            if is_json:
                print_json({"role": "assistant", "content": answer, "finish_reason": finish_reason})


def _lines() -> Iterator[str]:
    """What the user types; empty lines are passed over."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


async def _answer(
    llm: LLM, conversation: Conversation, params: SamplingParams, *, is_shown: bool
) -> tuple[str, str | None]:
    """The assistant's next message and why it ended, printed as it comes."""
    assert llm.tokenizer is not None
    text, finish_reason = "", None
    async for delta in llm.generate_async(llm.tokenizer.encode_chat(conversation), params):
        text += delta.outputs[0].text
        finish_reason = delta.outputs[0].finish_reason
        if is_shown:
            sys.stdout.write(delta.outputs[0].text)
            sys.stdout.flush()
        if delta.error is not None:
            raise RequestError(delta.error)
    if is_shown:
        print(flush=True)
    return text, finish_reason
