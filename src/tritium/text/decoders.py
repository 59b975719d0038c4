"""Streaming forms of the tokenizers library's decoders: the pieces of many pushes join to exactly its `decode`.

A decoder is a chain of stages; each takes the next tokens and returns the text that can no longer change.

    ByteLevel      bytes join across tokens into characters; an incomplete character waits for its last byte
    ByteFallback   a run of `<0xE2>` tokens becomes text only as a whole (one bad byte spoils it)
    Metaspace, Replace, Strip, Fuse    SentencePiece's word marks; the first token of a text is special
    anything else  waits for the end: exact, but does not stream
"""

import codecs
import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

from tokenizers import Regex, decoders


class Stage(Protocol):
    """One step of decoding one output."""

    def push(self, tokens: list[str]) -> list[str]:
        """What is settled once `tokens` follow the earlier ones."""

    def finish(self) -> list[str]:
        """What is left at the end of the output."""


def make_stages(decoder: Any) -> list[Stage]:
    """Fresh stages for a `tokenizers` decoder object; None joins tokens with spaces, as the library does."""
    if decoder is None:
        return [_Joined()]
    state = _decoder_state(bytes(decoder.__getstate__()))
    parts = _flatten(state)
    is_fused = False
    stages: list[Stage] = []
    for part in parts:
        make = _STREAMING.get(part["type"])
        if make is None or (part["type"] == "Strip" and is_fused and part["stop"]):
            return [_Whole(decoder)]
        stages.append(_StripFused(part) if part["type"] == "Strip" and is_fused else make(part))
        is_fused = is_fused or part["type"] in ("Fuse", "ByteLevel")
    return stages


@lru_cache(maxsize=64)
def _decoder_state(state: bytes) -> dict[str, Any]:
    return json.loads(state)


def token_bytes(decoder: Any, token: str) -> bytes:
    """The bytes that one token stands for in the middle of a text, by a `tokenizers` decoder object (or None)."""
    kinds = (
        set() if decoder is None else {part["type"] for part in _flatten(_decoder_state(bytes(decoder.__getstate__())))}
    )
    if "ByteLevel" in kinds:
        return _token_bytes(token)
    if "ByteFallback" in kinds and (match := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode() if kinds & {"Metaspace", "Replace"} else token.encode()


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] == "Sequence":
        return [part for inner in state["decoders"] for part in _flatten(inner)]
    return [state]


class _PerToken:
    """A decoder that looks at each token alone."""

    def __init__(self, convert: Callable[[str], str]) -> None:
        self._convert = convert

    def push(self, tokens: list[str]) -> list[str]:
        return [self._convert(token) for token in tokens]

    def finish(self) -> list[str]:
        return []


class _ByteLevel:
    """GPT-2's alphabet: each character of a token stands for one byte; other characters stand for their UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: list[str]) -> list[str]:
        text = self._utf8.decode(b"".join(map(_token_bytes, tokens)))
        return [text] if text else []

    def finish(self) -> list[str]:
        text = self._utf8.decode(b"", final=True)
        return [text] if text else []


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's `bytes_to_unicode`, inverted: printable Latin-1 stands for itself, the rest for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


@lru_cache(maxsize=1 << 18)
def _token_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


_BYTE_TOKEN = re.compile(r"<0x([+0-9A-Fa-f][0-9A-Fa-f])>")


class _ByteFallback:
    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, tokens: list[str]) -> list[str]:
        pieces = []
        for token in tokens:
            if match := _BYTE_TOKEN.fullmatch(token):
                self._run.append(int(match[1], 16))
                continue
            pieces += self.finish()
            pieces.append(token)
        return pieces

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\N{REPLACEMENT CHARACTER}"] * len(run)


class _Metaspace:
    """The word mark becomes a space; at the start of the text it is dropped, unless the scheme never adds one."""

    def __init__(self, part: dict[str, Any]) -> None:
        self._mark: str = part["replacement"]
        self._drops_first = part.get("prepend_scheme", "always") != "never"

    def push(self, tokens: list[str]) -> list[str]:
        pieces = [token.replace(self._mark, " ") for token in tokens]
        if tokens and self._drops_first:
            pieces[0] = tokens[0].replace(self._mark, "")
            self._drops_first = False
        return pieces

    def finish(self) -> list[str]:
        return []


class _StripFused:
    """Takes up to `start` leading characters off the whole text."""

    def __init__(self, part: dict[str, Any]) -> None:
        self._content: str = part["content"]
        self._left: int = part["start"]

    def push(self, tokens: list[str]) -> list[str]:
        if not self._left:
            return tokens
        text = "".join(tokens)
        while self._left and text:
            if not text.startswith(self._content):
                self._left = 0
                break
            text = text[1:]
            self._left -= 1
        return [text] if text else []

    def finish(self) -> list[str]:
        return []


class _Joined:
    """No decoder: tokens with spaces between them."""

    def __init__(self) -> None:
        self._is_first = True

    def push(self, tokens: list[str]) -> list[str]:
        pieces = [" " + token for token in tokens]
        if tokens and self._is_first:
            pieces[0] = tokens[0]
            self._is_first = False
        return pieces

    def finish(self) -> list[str]:
        return []


class _Whole:
    """A decoder without a streaming form: everything at the end."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._tokens: list[str] = []

    def push(self, tokens: list[str]) -> list[str]:
        self._tokens += tokens
        return []

    def finish(self) -> list[str]:
        tokens, self._tokens = self._tokens, []
        return [self._decoder.decode(tokens)] if tokens else []


def _replace(part: dict[str, Any]) -> Stage:
    pattern = part["pattern"]
    if "String" in pattern:
        old, new = pattern["String"], part["content"]
        return _PerToken(lambda token: token.replace(old, new))
    library = decoders.Replace(Regex(pattern["Regex"]), part["content"])
    return _PerToken(lambda token: library.decode([token]))


def _strip(part: dict[str, Any]) -> Stage:
    library = decoders.Strip(content=part["content"], left=part["start"], right=part["stop"])
    return _PerToken(lambda token: library.decode([token]))


_STREAMING: dict[str, Callable[[dict[str, Any]], Stage]] = {
    "ByteLevel": lambda part: _ByteLevel(),
    "ByteFallback": lambda part: _ByteFallback(),
    "Metaspace": _Metaspace,
    "Replace": _replace,
    "Strip": _strip,
    "Fuse": lambda part: _PerToken(str),
}
