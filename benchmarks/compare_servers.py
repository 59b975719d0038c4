"""Tritium and other engines through the same client: each one's own OpenAI server, in an environment of its own.

    python benchmarks/compare_servers.py --engine vllm --bin ~/vllm/bin --model DIR --out FILE
    python benchmarks/compare_servers.py --engine llama.cpp --bin ~/llama.cpp/build/bin --model GGUF --out FILE
    python benchmarks/compare_servers.py --engine tritium --bin .venv/bin --model DIR --out FILE

--bin: where the engine's command lies; --server-args: more of its flags, e.g. what its documentation tunes for the
workload. The client sends prompts of distinct random token ids, all at once, asks for exactly --output-len tokens each
(`ignore_eos`), greedily, and counts from the first request sent to the last answer received. The server is started
--starts times; each start answers the workload once for warmth and once for the result, for each of --num-requests.
What a server answered is asserted: the number of tokens, of every request. Starts are added to those that FILE has:
comparing is alternating these runs and taking the ratio of starts of one number. build_llama_server.py in cpu/ makes
llama.cpp's program.
"""

import argparse
import asyncio
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 900
COMMANDS = {
    "tritium": ("tritium", "serve", "{model}", "--port", "{port}"),
    "vllm": ("vllm", "serve", "{model}", "--port", "{port}", "--no-enable-prefix-caching"),
    "tensorrt-llm": ("trtllm-serve", "serve", "{model}", "--port", "{port}"),
    "llama.cpp": ("llama-server", "--model", "{model}", "--port", "{port}", "--offline"),
}


def command(engine: str, bin_dir: Path, model: str, port: int, extra: Sequence[str]) -> list[str]:
    """How the engine's server is started."""
    program, *rest = (part.format(model=model, port=port) for part in COMMANDS[engine])
    return [str(bin_dir / program), *rest, *extra]


async def post(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request on a connection of its own. Raises `RuntimeError` with the answer unless it is 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
    data = json.dumps(body).encode() if body is not None else b""
    head = f"{'POST' if body is not None else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    header, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in header.lower():
        rest = _dechunked(rest)
    status = header.partition(b"\r\n")[0].decode()
    if " 200 " not in status:
        raise RuntimeError(f"{path}: {status}: {rest[:500].decode(errors='replace')}")
    return dict(json.loads(rest))


def _dechunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        if not count:
            break
        parts.append(body[:count])
        body = body[count + 2 :]
    return b"".join(parts)


async def run_all(port: int, model: str, prompts: list[list[int]], output_len: int, limit: int) -> tuple[float, int]:
    """Seconds from the first request to the last answer, and output tokens. limit: connections open at once."""
    gate = asyncio.Semaphore(limit)

    async def one(prompt: list[int]) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": output_len, "temperature": 0.0, "ignore_eos": True}
        async with gate:
            answer = await post(port, "/v1/completions", body)
        return int(answer["usage"]["completion_tokens"])

    start = time.perf_counter()
    counts = await asyncio.gather(*(one(prompt) for prompt in prompts))
    elapsed = time.perf_counter() - start
    assert set(counts) == {output_len}, f"asked for {output_len} tokens each, got {sorted(set(counts))}"
    return elapsed, sum(counts)


async def ready(port: int, server: subprocess.Popen[bytes]) -> str:
    """Wait for the server; the name that it gives the model."""
    for _ in range(START_SECONDS):
        if server.poll() is not None:
            sys.exit(f"the server ended with code {server.returncode} before it answered: see its log")
        try:
            return str((await post(port, "/v1/models"))["data"][0]["id"])
        except (OSError, RuntimeError, ValueError, LookupError):
            await asyncio.sleep(1)
    sys.exit(f"the server did not answer within {START_SECONDS} s")


def draw_prompt(draw: random.Random, args: argparse.Namespace) -> list[int]:
    """Random tokens, but for the first two ids, which are often those of a text's begin and end."""
    return [draw.randrange(2, args.vocab_size) for _ in range(args.input_len)]


async def measure(args: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """One start of the server: a result for each number of requests."""
    line = command(args.engine, args.bin, args.model, args.port, shlex.split(args.server_args))
    draw, results = random.Random(number), []
    log_path = args.out.with_suffix(f".{args.engine}.{number}.log")
    with log_path.open("wb") as log, subprocess.Popen(line, stdout=log, stderr=log) as server:
        try:
            name = await ready(args.port, server)
            for count in args.num_requests:
                for _ in range(2):
                    prompts = [draw_prompt(draw, args) for _ in range(count)]
                    seconds, tokens = await run_all(args.port, name, prompts, args.output_len, args.connections)
                rate = {"seconds": seconds, "output_tokens_per_second": tokens / seconds}
                results.append({"num_requests": count} | rate)
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
    kept = {name: getattr(args, name) for name in ("engine", "model", "input_len", "output_len")}
    return [kept | {"start": number, "command": line} | result for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=list(COMMANDS))
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--model", required=True, help="what the server is given: a directory, a file or a hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--server-args", default="", help="one string, split as a shell does")
    parser.add_argument("--num-requests", type=int, nargs="+", default=[2048])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=128_000, help="token ids are drawn below it")
    parser.add_argument("--connections", type=int, default=4096)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else []
    first = max((result["start"] + 1 for result in found if result["engine"] == args.engine), default=0)
    for number in range(first, first + args.starts):
        for result in asyncio.run(measure(args, number)):
            found.append(result)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(
                "{engine}, {num_requests} requests: {output_tokens_per_second:,.1f} output tokens/s".format(**result),
                flush=True,
            )


if __name__ == "__main__":
    main()
