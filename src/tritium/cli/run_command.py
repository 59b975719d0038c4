"""`tritium run`: complete prompts from the command line, streaming, or from a file of JSON lines."""

import asyncio
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

from tritium.cli.jobs import BadLine, Job, read_done, read_jobs
from tritium.cli.opening import describe, resolved_config
from tritium.cli.report import error_record, print_json, say, say_config
from tritium.errors import ConfigError, EngineError, TritiumError
from tritium.llm import LLM, CompletionOutput, RequestOutput
from tritium.sampling_params import MAX_TOKENS_LIMIT, SamplingParams


def run(
    *,
    model: str,
    prompts: list[str],
    input: Path | None,
    output: Path | None,
    sampling: Mapping[str, Any],
    config: Mapping[str, Any],
    is_json: bool,
) -> None:
    """Open the model and complete what was asked for."""
    if bool(prompts) == (input is not None):
        raise ConfigError(
            "give prompts with --prompt, or a file with --input, not both" if prompts else "give --prompt or --input"
        )
    if (input is None) != (output is None):
        raise ConfigError("--input and --output belong together")
    params = SamplingParams(**sampling)  # refuse wrong values before the model is loaded
    with asyncio.Runner() as runner, LLM(model, **config) as llm:  # the event loop outlives the engine's last word
        resolved = resolved_config(llm)
        say_config(describe(resolved), is_json=is_json)
        if input is not None and output is not None:
            _run_file(runner, llm, input, output, sampling, resolved, is_json=is_json)
        elif is_json:
            outputs = llm.generate(prompts, params, use_progress=False)
            print_json({"config": resolved, "outputs": [record(str(i), out) for i, out in enumerate(outputs)]})
        else:
            runner.run(_stream(llm, prompts, params))


def record(job_id: str, out: RequestOutput) -> dict[str, Any]:
    """A finished request as JSON."""
    entry: dict[str, Any] = {
        "id": job_id,
        **_completion(out.outputs[0]),
        "num_prompt_tokens": len(out.prompt_token_ids),
        "num_cached_tokens": out.num_cached_tokens,
        "timings": dataclasses.asdict(out.timings),
    }
    if out.prompt_logprobs is not None:
        entry["prompt_logprobs"] = [None if token is None else token._asdict() for token in out.prompt_logprobs]
    if len(out.outputs) > 1:
        entry["outputs"] = [_completion(completion) for completion in out.outputs]
    if out.error is not None:
        entry["error"] = {"type": "EngineError", "message": out.error}
    return entry


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        entry["logprobs"] = [token._asdict() for token in completion.logprobs]
    if completion.cumulative_logprob is not None:
        entry["cumulative_logprob"] = completion.cumulative_logprob
    return entry


async def collect(llm: LLM, prompt: str | list[int], params: SamplingParams) -> RequestOutput:
    """Complete one prompt; the whole output."""
    last: RequestOutput | None = None
    pieces: dict[int, list[CompletionOutput]] = defaultdict(list)
    error, prompt_logprobs = None, None
    async for last in llm.generate_async(prompt, params):
        error, prompt_logprobs = error or last.error, prompt_logprobs or last.prompt_logprobs
        for piece in last.outputs:
            pieces[piece.index].append(piece)
    assert last is not None
    outputs = [_joined(pieces[index]) for index in sorted(pieces)]
    return dataclasses.replace(last, outputs=outputs, error=error, prompt_logprobs=prompt_logprobs)


def _joined(pieces: list[CompletionOutput]) -> CompletionOutput:
    """The last piece with what all of them hold."""
    has_logprobs = pieces[-1].logprobs is not None
    return dataclasses.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=list(chain.from_iterable(piece.token_ids for piece in pieces)),
        logprobs=list(chain.from_iterable(piece.logprobs or [] for piece in pieces)) if has_logprobs else None,
    )


async def _stream(llm: LLM, prompts: list[str], params: SamplingParams) -> None:
    """Print every completion in order; the first unfinished one as it is computed. The first error is raised last."""
    queues: list[asyncio.Queue[str | TritiumError | None]] = [asyncio.Queue() for _ in prompts]

    async def feed(prompt: str, queue: asyncio.Queue[str | TritiumError | None]) -> None:
        try:
            async for delta in llm.generate_async(prompt, params):
                queue.put_nowait(delta.outputs[0].text)
                if delta.error is not None:
                    raise EngineError(delta.error)
        except TritiumError as error:
            queue.put_nowait(error)
        queue.put_nowait(None)

    errors = []
    tasks = [asyncio.create_task(feed(prompt, queue)) for prompt, queue in zip(prompts, queues, strict=True)]
    try:
        for prompt, queue in zip(prompts, queues, strict=True):
            if len(prompts) > 1:
                print(f"--- {prompt}")
            while (item := await queue.get()) is not None:
                if isinstance(item, TritiumError):
                    errors.append(item)
                    continue
                sys.stdout.write(item)
                sys.stdout.flush()
            print(flush=True)
    finally:
        for task in tasks:
            task.cancel()
    if errors:
        raise errors[0]


def _run_file(
    runner: asyncio.Runner,
    llm: LLM,
    source: Path,
    target: Path,
    defaults: Mapping[str, Any],
    resolved: Mapping[str, Any],
    *,
    is_json: bool,
) -> None:
    done = read_done(target)
    counts = {"completed": 0, "failed": 0, "skipped": 0}
    start = time.perf_counter()
    try:
        with target.open("a", encoding="utf-8") as file:
            num_tokens = runner.run(_complete_all(llm, source, defaults, done, file, counts))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}") from error
    seconds = time.perf_counter() - start
    if is_json:
        print_json(
            {"config": resolved, "output": str(target), **counts, "output_tokens": num_tokens, "seconds": seconds}
        )
    say(
        f"{counts['completed']} completed, {counts['failed']} failed, {counts['skipped']} done before; "
        f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / seconds:.0f} tokens/s); written to {target}"
    )
    if counts["failed"]:
        sys.exit(1)


async def _complete_all(
    llm: LLM, source: Path, defaults: Mapping[str, Any], done: set[str], file: IO[str], counts: dict[str, int]
) -> int:
    """Keep the engine full, read no further ahead than that, write each record when it is ready. Counts tokens."""
    room = asyncio.Semaphore(2 * llm.config.max_num_seqs)
    num_tokens = 0

    def write(entry: Mapping[str, Any]) -> None:
        counts["failed" if "error" in entry else "completed"] += 1
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        file.flush()

    async def complete(job: Job) -> None:
        nonlocal num_tokens
        try:
            out = await collect(llm, *_as_prompt(llm, job))
            num_tokens += len(out.outputs[0].token_ids)
            write(record(job.job_id, out))
        except TritiumError as error:
            write({"id": job.job_id, "error": error_record(error)})
        finally:
            room.release()

    try:
        async with asyncio.TaskGroup() as tasks:
            for job in read_jobs(source, defaults):
                if isinstance(job, BadLine):
                    write({"id": job.job_id, "line": job.line_number, "error": error_record(job.error)})
                elif job.job_id in done:
                    counts["skipped"] += 1
                else:
                    await room.acquire()
                    tasks.create_task(complete(job))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return num_tokens


def _as_prompt(llm: LLM, job: Job) -> tuple[str | list[int], SamplingParams]:
    """What to hand to the engine; a conversation goes on until it stops."""
    if job.prompt is not None:
        return job.prompt, job.params
    if llm.tokenizer is None:
        raise ConfigError(f"messages need a tokenizer, and the engine {llm.engine.path} has none")
    return llm.tokenizer.encode_chat(job.messages or []), until_stop(job.params)


def until_stop(params: SamplingParams) -> SamplingParams:
    """Without `max_tokens`, an answer goes on until a stop or the end of the context."""
    return params if params.max_tokens is not None else dataclasses.replace(params, max_tokens=MAX_TOKENS_LIMIT)
