"""`tritium eval`: perplexity and bits per byte of an engine on a text.

The text is tokenised once, without special tokens, and cut into windows of `window` tokens, `stride` apart. What the
tokenizer puts before a prompt (a bos) starts every window and counts towards its length. A token is scored once, in the
first window that has it, given what is before it in that window; so a window's first token is not scored where there is
no bos. Bytes are those that the scored tokens stand for.
"""

import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tritium.cli.opening import describe, resolved_config
from tritium.cli.report import print_json, say_config
from tritium.errors import ConfigError, EngineError
from tritium.llm import LLM, RequestOutput
from tritium.progress import progress_bar
from tritium.sampling_params import SamplingParams
from tritium.text.tokenizer import Tokenizer
from tritium.text.tokenizer_files import ADD_TOKENIZER

DEFAULT_WINDOW = 512
MAX_TEXT_BYTES = 16 << 20  # the tokenizer holds the whole text, at over 100 bytes a token
MAX_MEAN_NATS = 700.0  # e to a little more is no float; a uniform guess of any vocabulary is under 20


class Window(NamedTuple):
    """Tokens `[start, end)` of the text, of which `[first_scored, end)` are scored."""

    start: int
    end: int
    first_scored: int


def run(
    *,
    model: str,
    text: Path,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    config: Mapping[str, Any],
    is_json: bool,
) -> None:
    """Open the model, score the text, report."""
    for name, value, least in (("--window", window, 2), ("--stride", stride, 1), ("--max-tokens", max_tokens, 2)):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be {least} or more, not {value}: a token is scored given one before it")
    content = read_text(text)
    with LLM(model, **config) as llm:
        resolved = resolved_config(llm)
        if llm.tokenizer is None:
            raise ConfigError(f"the engine {llm.engine.path} has no tokenizer.json; {ADD_TOKENIZER}")
        prefix, ids = tokenise(llm.tokenizer, content, text, max_tokens)
        size, step = window_sizes(window, stride, len(prefix), llm.limits.max_model_len)
        load = {"text": str(text), "window": size + len(prefix), "stride": step, "max_tokens": max_tokens}
        resolved = {**resolved, **load}
        say_config(describe(resolved), is_json=is_json)
        result = score(llm, llm.tokenizer, prefix, ids, size, step)
    if is_json:
        print_json({**result, "config": resolved})
        return
    print(
        f"perplexity {result['perplexity']:.4f}, {result['bits_per_byte']:.4f} bits per byte; "
        f"{result['tokens_scored']:,} of {result['tokens']:,} tokens scored ({result['bytes_scored']:,} bytes) "
        f"in {result['windows']:,} windows, {result['seconds']:.1f} s",
        flush=True,
    )


def read_text(path: Path) -> str:
    """A file's text; `ConfigError` when it cannot be read, is no UTF-8, empty or too long."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise ConfigError(f"{path} is longer than {MAX_TEXT_BYTES} bytes: name a shorter text")
        if not content:
            raise ConfigError(f"{path} is empty: there is nothing to score; name a file with text")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}; convert it") from error


def tokenise(tokenizer: Tokenizer, text: str, path: Path, max_tokens: int | None) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before every prompt, and the text's own tokens; `ConfigError` when none can be scored."""
    with_special, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    own = (i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
    prefix, ids = with_special[: next(own, 0)], tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
    if not ids or len(ids) + len(prefix) < 2:
        raise ConfigError(f"{path} has {len(ids)} tokens: there is nothing to score; name a longer text")
    return prefix, ids


def window_sizes(window: int | None, stride: int | None, num_prefix: int, max_model_len: int) -> tuple[int, int]:
    """Tokens of the text in a window, and from one window to the next."""
    limit = max_model_len - 1  # a request has one output at least
    if window is not None and window > limit:
        raise ConfigError(f"--window must be {limit} or less, not {window}: max_model_len is {max_model_len}")
    size = (min(DEFAULT_WINDOW, limit) if window is None else window) - num_prefix
    if size < 1:
        raise ConfigError(f"--window must be above {num_prefix}, not {window}: so many tokens start every prompt")
    if stride is not None and stride > size:
        raise ConfigError(f"--stride must be {size} or less, not {stride}: tokens between windows would not be scored")
    return size, stride or size


def windows(num_tokens: int, size: int, stride: int, *, has_prefix: bool) -> Iterator[Window]:
    """The windows in order; together they score every token once, but for those that have nothing before them."""
    done = 0
    for start in range(0, num_tokens, stride):
        end = min(start + size, num_tokens)
        first = max(done, start if has_prefix else start + 1)
        if first < end:
            yield Window(start, end, first)
        done = end
        if end == num_tokens:
            return


def score(
    llm: LLM, tokenizer: Tokenizer, prefix: list[int], ids: list[int], size: int, stride: int
) -> dict[str, float | int]:
    """Score `ids`, as many windows at a time as run together; memory does not grow with the number of windows."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    todo = windows(len(ids), size, stride, has_prefix=bool(prefix))
    num_windows = sum(1 for _ in windows(len(ids), size, stride, has_prefix=bool(prefix)))
    num_scored, num_bytes, nats = 0, 0, 0.0
    begin = time.perf_counter()
    with progress_bar(num_windows, None, "scoring") as bar:
        while some := list(islice(todo, llm.config.max_num_seqs)):
            prompts = [prefix + ids[one.start : one.end] for one in some]
            for one, out in zip(some, llm.generate(prompts, params, use_progress=False), strict=True):
                tokens = ids[one.first_scored : one.end]
                nats -= math.fsum(logprobs(out)[-len(tokens) :])
                num_scored += len(tokens)
                num_bytes += sum(len(tokenizer.token_bytes(token_id)) for token_id in tokens)
                bar.finish_one(len(tokens))
    if not 0 <= nats / num_scored < MAX_MEAN_NATS:
        raise EngineError(f"the mean of -log p is {nats / num_scored} nats: check the engine with `tritium bisect`")
    return {
        "perplexity": math.exp(nats / num_scored),
        "bits_per_byte": nats / math.log(2) / max(1, num_bytes),
        "nats": nats,
        "tokens": len(ids),
        "tokens_scored": num_scored,
        "bytes_scored": num_bytes,
        "windows": num_windows,
        "seconds": time.perf_counter() - begin,
    }


def logprobs(out: RequestOutput) -> list[float]:
    """Of the prompt's tokens from the second on; `EngineError` when the request failed."""
    if out.error is not None or out.prompt_logprobs is None:
        raise EngineError(f"request {out.request_id} failed: {out.error}; nothing was measured")
    return [token.logprob for token in out.prompt_logprobs if token is not None]
