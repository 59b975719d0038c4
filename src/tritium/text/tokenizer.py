"""Text to token ids and back, from a Hugging Face directory; ids equal those of transformers' tokenizer."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from tritium.errors import CheckpointError, RequestError
from tritium.text.decoders import Stage, make_stages, token_bytes
from tritium.text.tokenizer_files import (
    add_special_tokens,
    named_tokens,
    read_chat_templates,
    read_config,
    read_eos_token_ids,
    read_library_tokenizer,
)

if TYPE_CHECKING:
    from tritium.text.chat_template import ChatTemplate


class Tokenizer:
    """A loaded tokenizer. May be used from several threads.

    vocab_size: one more than the highest token id. eos_token_ids: every id that ends an output.
    special_token_ids: ids left out of text when special tokens are skipped.
    longest_token: characters of the longest spelling in the vocabulary; no token stands for more of a text.
    bos_token_id, eos_token_id, pad_token_id: None when the tokenizer names no such token.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        named: Mapping[str, str] | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self._library = library
        self._named = dict(named or {})
        vocabulary = library.get_vocab()
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.longest_token: int = max(map(len, vocabulary), default=0)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = eos_token_ids | frozenset(own)
        added = library.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        self._cut: tuple[int, tokenizers.Tokenizer] | None = None
        self._sources = dict(chat_templates or {})

    @classmethod
    def from_directory(cls, directory: str | Path, *, model_vocab_size: int | None = None) -> "Tokenizer":
        """Load the tokenizer of a model or engine directory.

        Raises `CheckpointError` when there is none, a file is damaged, or it has ids the model has no rows for.
        """
        directory = Path(directory)
        library = read_library_tokenizer(directory)
        config = read_config(directory)
        add_special_tokens(library, config, directory)
        tokenizer = cls(
            library,
            named=named_tokens(config, directory),
            eos_token_ids=read_eos_token_ids(directory),
            chat_templates=read_chat_templates(directory, config),
        )
        if model_vocab_size is not None:
            tokenizer.check_model(model_vocab_size, directory)
        return tokenizer

    def check_model(self, model_vocab_size: int, directory: Path) -> None:
        """Raise `CheckpointError` when this tokenizer or its eos ids need more rows than the model's vocabulary has."""
        if self.vocab_size > model_vocab_size:
            token = self._library.id_to_token(self.vocab_size - 1)
            raise CheckpointError(
                f"{directory}: the tokenizer does not match the model: it has token ids up to {self.vocab_size - 1} "
                f"({token!r}), the model's vocab_size is {model_vocab_size}"
            )
        for token_id in sorted(self.eos_token_ids):
            if token_id >= model_vocab_size:
                raise CheckpointError(
                    f"{directory}: eos_token_id {token_id} is not a token: the model's vocab_size is {model_vocab_size}"
                )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with what the tokenizer puts around a prompt (a bos, say) unless told otherwise."""
        try:
            return self._library.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:  # not text, or text with half a surrogate pair
            raise RequestError(f"the prompt is not valid Unicode text: {error}") from error

    def encode_pair(
        self, text: str, other: str | None = None, *, max_len: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids, and for each which text it belongs to (0, 1), of a text or a pair, with the special tokens.

        max_len: what is longer is cut to so many tokens, special ones included; of a pair the longer text first.
        """
        own = self._library.num_special_tokens_to_add(other is not None)
        if max_len is not None and max_len <= own:
            raise RequestError(f"a prompt cannot be cut to {max_len} tokens: {own} are the tokenizer's own; allow more")
        library = self._library if max_len is None or other is None else self._cut_to(max_len)
        try:
            if max_len is None or other is not None:
                found = library.encode(text, other)
            else:
                found = library.encode(text, add_special_tokens=False)
                found.truncate(max_len - own)
                found = library.post_process(found)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"the prompt is not valid Unicode text: {error}") from error
        return found.ids, found.type_ids

    def _cut_to(self, max_len: int) -> tokenizers.Tokenizer:
        """A copy of the library's tokenizer that cuts. Made once for each length that is asked for in a row."""
        cut = self._cut
        if cut is None or cut[0] != max_len:
            library = tokenizers.Tokenizer.from_str(self._library.to_str())
            library.enable_truncation(max_len, strategy="longest_first")
            cut = self._cut = (max_len, library)
        return cut[1]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token give no text."""
        return self._library.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None when no token has this id."""
        return self._library.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes it stands for in the middle of a text, special tokens their name; empty without one."""
        token = self.token(token_id)
        return b"" if token is None else token_bytes(self._library.decoder, token)

    def decoding_stages(self) -> list[Stage]:
        """A fresh streaming decoder for one output (see `tritium.text.decoders`)."""
        return make_stages(self._library.decoder)

    @property
    def has_chat_template(self) -> bool:
        """True when messages can be turned into a prompt."""
        return bool(self._sources)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation. `template` picks one of several by name; `variables` reach the template.

        Raises `RequestError` for messages the template refuses, `CheckpointError` for a broken template.
        """
        chosen = self._choose_template(template, has_tools=tools is not None)
        return chosen.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **{**self._named, **variables}
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation, as transformers' `apply_chat_template`; options as for `render_chat`."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    @cached_property
    def _templates(self) -> "dict[str, ChatTemplate]":
        """By name. Jinja is loaded for the first conversation: completions never need it."""
        template = import_module("tritium.text.chat_template").ChatTemplate
        return {name: template(source, name=name) for name, source in self._sources.items()}

    def _choose_template(self, name: str | None, *, has_tools: bool) -> "ChatTemplate":
        if not self._sources:
            raise RequestError("this model has no chat template; use generate() with a prompt instead of chat()")
        for wanted in (name,) if name else (("tool_use", "default") if has_tools else ("default",)):
            if wanted in self._templates:
                return self._templates[wanted]
        raise RequestError(f"no chat template named {name or 'default'!r}; this model has {', '.join(self._templates)}")

    def _named_id(self, name: str) -> int | None:
        return self._library.token_to_id(self._named[name]) if name in self._named else None
