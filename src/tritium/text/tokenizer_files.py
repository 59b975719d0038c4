"""Reads the tokenizer files of a Hugging Face directory; every fault is a `CheckpointError` that names the file.

`tokenizer.json` alone decides how text is split and which special tokens are put around it (its post-processor), as in
transformers. `tokenizer_config.json` names the special tokens, may add tokens, and may hold the chat template.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from tritium.errors import CheckpointError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What an engine keeps of a model directory, so that it can turn text into ids and back without the checkpoint.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
ADD_TOKENIZER = "put the one that the model was published with beside its weights (a .gguf file too), and build again"
_SLOW_FILES = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model", "vocab.txt")
_ADDED_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} when there is no such file. `CheckpointError` when it is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_library_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """`tokenizer.json` as the tokenizers library reads it, without truncation and padding."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(_no_tokenizer_message(directory))
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer the tokenizers library can read: {error}") from error
    library.no_truncation()
    library.no_padding()
    return library


def _no_tokenizer_message(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory; expected a model directory with tokenizer.json"
    slow = [name for name in _SLOW_FILES if (directory / name).is_file()]
    if not slow:
        return f"{directory} has no tokenizer.json; prompts can then only be given as token ids"
    convert = f"from transformers import AutoTokenizer as T; T.from_pretrained({str(directory)!r})"
    return (
        f"{directory} has {slow[0]} but no tokenizer.json. Convert it once with:\n"
        "  pip install transformers sentencepiece protobuf tiktoken\n"
        f'  python -c "{convert}.save_pretrained({str(directory)!r})"'
    )


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json; older directories keep the special tokens in special_tokens_map.json beside it."""
    config = read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config.update(read_json(directory / "special_tokens_map.json"))
        added = read_json(directory / "added_tokens.json")
        special = set(named_tokens(config, directory).values())
        config["added_tokens_decoder"] = {
            str(index): {"content": text, "special": text in special, "normalized": text not in special}
            for text, index in added.items()
        }
    return config


def named_tokens(config: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """The special tokens that have a name (`bos_token`, ..., and a model's own `*_token`), as text."""
    named = {}
    extra = config.get("extra_special_tokens")
    for key, value in {**config, **(extra if isinstance(extra, dict) else {})}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and (key in NAMED_TOKENS or key.endswith("_token")):
            named[key] = text
        elif key in NAMED_TOKENS and value is not None:
            raise CheckpointError(f"{directory / 'tokenizer_config.json'}: {key} must be text, not {value!r}")
    return named


def add_special_tokens(library: tokenizers.Tokenizer, config: Mapping[str, Any], directory: Path) -> None:
    """Give `library` the tokens that tokenizer_config.json adds; the named ones become special.

    Raises `CheckpointError` when a token would get another id than the one stated.
    """
    where = directory / "tokenizer_config.json"
    stated = _stated_tokens(config.get("added_tokens_decoder"), where)
    known = {index: repr(token) for index, token in library.get_added_tokens_decoder().items()}
    library.add_tokens([token for index, token in sorted(stated.items()) if known.get(index) != repr(token)])
    for index, token in stated.items():
        if (found := library.token_to_id(token.content)) != index:
            raise CheckpointError(
                f"{where}: added token {token.content!r} should have id {index}, but tokenizer.json leads to id {found}"
            )
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra_texts = [t.get("content") if isinstance(t, dict) else t for t in extra] if isinstance(extra, list) else []
    texts = [*named_tokens(config, directory).values(), *(t for t in extra_texts if isinstance(t, str))]
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    library.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in texts if text not in special]
    )


def _stated_tokens(table: object, where: Path) -> dict[int, tokenizers.AddedToken]:
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: added_tokens_decoder must be an object, not {type(table).__name__}")
    stated = {}
    for key, entry in table.items():
        if not str(key).isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{where}: added_tokens_decoder[{key!r}] is not a token: {entry!r}")
        fields = {name: entry[name] for name in _ADDED_TOKEN_FIELDS if name in entry}
        if not all(isinstance(value, bool) for name, value in fields.items() if name != "content"):
            raise CheckpointError(f"{where}: added_tokens_decoder[{key!r}] has a flag that is no boolean: {entry!r}")
        stated[int(key)] = tokenizers.AddedToken(**fields)
    return stated


def read_eos_token_ids(directory: Path) -> frozenset[int]:
    """The ids that end an output: eos_token_id of generation_config.json and config.json, each a number or a list."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(directory / name).get("eos_token_id")
        for token_id in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise CheckpointError(
                    f"{directory / name}: eos_token_id must be a token id or a list of them, not {value!r}"
                )
            ids.add(token_id)
    return frozenset(ids)


def read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name ("default" when there is one): chat_template.jinja, else tokenizer_config.json's."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}") from error
    where, value = directory / "tokenizer_config.json", config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [value]
    templates = {}
    for entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise CheckpointError(
                f"{where}: chat_template must be text or a list of {{name, template}}, not {entry!r:.99}"
            )
        templates[entry["name"]] = entry["template"]
    return templates
