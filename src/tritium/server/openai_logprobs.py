"""Log-probabilities in OpenAI's two shapes."""

from collections.abc import Sequence
from typing import Any

from tritium.text.tokenizer import Tokenizer
from tritium.wire import TokenLogprob

LOWEST = -9999.0  # JSON has no infinity


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content = [
        {**_chat_token(tokenizer, token.token_id, token.logprob), "top_logprobs": _chat_top(tokenizer, token)}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer | None, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. offset: characters of the text before the first token."""
    names = [token_text(tokenizer, token.token_id) for token in tokens]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    top = [{token_text(tokenizer, i): max(value, LOWEST) for i, value in token.top} for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [max(token.logprob, LOWEST) for token in tokens],
        "top_logprobs": top if any(top) else None,
        "text_offset": offsets,
    }


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """The token as text; `bytes:\\xe2\\x82` for a part of a character, `token_id:7` without a tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": token_text(tokenizer, token_id), "logprob": max(logprob, LOWEST), "bytes": list(data)}


def _chat_top(tokenizer: Tokenizer, token: TokenLogprob) -> list[dict[str, Any]]:
    return [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in token.top]
