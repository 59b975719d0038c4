"""Small tokenizers of the kinds published models have, trained in a moment and written as a model directory is."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "system user assistant tool: hello world! What is the weather in Paris, 12 or 21 degrees?",
    "日本語のテキストと絵文字 🙂🚀 и немного русского текста",
] * 4


def byte_level_bpe(vocab_size: int = 400, special: tuple[str, ...] = ("<|end|>",)) -> Tokenizer:
    """GPT-2, Llama-3 and Qwen style: every byte has a token, no unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama3_style() -> Tokenizer:
    """Byte-level BPE behind a regex split, with a bos that the post-processor puts first."""
    tokenizer = byte_level_bpe(special=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{N}]+|\s+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _bos("<|begin_of_text|>", 0)]
    )
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """Llama-2 and Mistral style: word marks by a normalizer, bytes for what has no token, a stripped first space."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁", *sorted({c for line in CORPUS[:4] for c in line if c.isascii()} - {" "}), "▁the", "▁d", "og", "th"]
    merges = [("t", "h"), ("o", "g"), ("▁", "d")]
    vocab = {piece: index for index, piece in enumerate([*special, *bytes_, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.post_processor = _bos("<s>", 1)
    return tokenizer


def unigram() -> Tokenizer:
    """T5 style: a unigram model over words marked by Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=180, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


KINDS = {
    "byte-level BPE": byte_level_bpe,
    "Llama-3 style": llama3_style,
    "SentencePiece BPE with byte fallback": sentencepiece_bpe,
    "unigram": unigram,
}
NAMED_TOKENS = {
    "byte-level BPE": {"eos_token": "<|end|>", "bos_token": "<|end|>"},
    "Llama-3 style": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "SentencePiece BPE with byte fallback": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "unigram": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}


def write_directory(directory: Path, tokenizer: Tokenizer, config: dict[str, Any], **files: Any) -> Path:
    """Write tokenizer.json, tokenizer_config.json and further files: `generation_config={...}` is a JSON file."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, content in {"tokenizer_config": config, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def _bos(token: str, token_id: int) -> Any:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )
