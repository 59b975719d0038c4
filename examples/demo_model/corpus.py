"""Prepare the demo model's corpus: the source of this interpreter's standard library, cleaned, split and tokenised.

    python examples/demo_model/corpus.py

Writes beside itself
    heldout.txt, LICENSE.PSF.txt     committed: the held-out text and the licence it is under
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    corpus/                          ignored by git, all that `train.py` reads: train.json, validation.json, split.json

The split is by hash of a file's path, in twentieths: one is held out, one is for validation (every choice of recipe is
made on it, so that the held-out number is measured once), the rest is trained on. The corpus depends on the
interpreter: the committed checkpoint comes from Python 3.11.7's, carried to the machine that trained it.
"""

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
VOCAB_SIZE = 4096
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"  # ids 0 and 1; every training document is BOS, text, EOS

HELDOUT_BUCKET, VALIDATION_BUCKET, NUM_BUCKETS = 0, 1, 20
SKIPPED_DIRECTORIES = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
# Tables and text that programs wrote, and copies: they compress to almost nothing and teach or measure no Python.
SKIPPED_PREFIXES = (
    "encodings/",  # 119 generated code pages
    "pydoc_data/",  # the language reference as one literal, 740 KB
    "lib2to3/",  # an older tokenize.py, and 52 fixers made from one pattern
    "config-",
    "_sysconfigdata",  # this machine's build configuration
    "html/entities.py",
    "re/_casefix.py",
    "stringprep.py",
    "locale.py",  # half of it an alias table
    "_compat_pickle.py",
    "__phello__/",
)
MIN_CHARS = 200
# A line this long rarely repeats by chance. A held-out file that shares more than this fraction of its own with one
# other file is left out of both sides: chunk.py with wave.py (0.6), importlib/metadata/_itertools.py with resources/.
LONG_LINE = 24
MAX_SHARED_LINES = 0.2

# Llama 3's pattern without its English contractions: newlines end a token, so a prompt may end with one.
PRE_TOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The model only continues Python, so a conversation is rendered as a module: what the system or the user says is a
# docstring, what the assistant said is code. The generation prompt is the blank line after a docstring; the model ends
# a module, and so its turn, with EOS.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\\n' + message['content'] | trim + '\\n\\n' }}"
    "{% else %}{{ '\"\"\"' + message['content'] | trim + '\"\"\"\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


def source_files(root: Path) -> dict[str, str]:
    """Text by path relative to `root`, in the order of the paths: every module but tests, tables and copies."""
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_DIRECTORIES.isdisjoint(path.relative_to(root).parts) and not name.startswith(SKIPPED_PREFIXES):
            text = path.read_text(encoding="utf-8")
            if len(text) >= MIN_CHARS:
                texts[name] = text
    return texts


def bucket(name: str) -> int:
    """Which twentieth a file falls into, for ever: a function of its path alone."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % NUM_BUCKETS


def long_lines(text: str) -> set[str]:
    return {stripped for line in text.splitlines() if len(stripped := line.strip()) >= LONG_LINE}


def near_duplicates(candidates: dict[str, str], others: dict[str, str]) -> set[str]:
    """The candidates that share more than MAX_SHARED_LINES of their distinct long lines with any one of the others."""
    lines_of_others = [long_lines(text) for text in others.values()]
    duplicates = set()
    for name, text in candidates.items():
        lines = long_lines(text)
        if any(len(lines & other) > MAX_SHARED_LINES * len(lines) for other in lines_of_others):
            duplicates.add(name)
    return duplicates


def split(texts: dict[str, str]) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """(train, validation, heldout); near duplicates of another part are in none of them."""

    def without(part: dict[str, str], others: dict[str, str]) -> dict[str, str]:
        duplicates = near_duplicates(part, others)
        return {name: text for name, text in part.items() if name not in duplicates}

    apart = (HELDOUT_BUCKET, VALIDATION_BUCKET)
    train = {name: text for name, text in texts.items() if bucket(name) not in apart}
    validation = without({n: t for n, t in texts.items() if bucket(n) == VALIDATION_BUCKET}, train)
    heldout = without({n: t for n, t in texts.items() if bucket(n) == HELDOUT_BUCKET}, train | validation)
    return train, validation, heldout


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that loses nothing, puts BOS before a text and carries the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )


def main() -> None:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    train, validation, heldout = split(source_files(stdlib))
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / "train.json").write_text(json.dumps(list(train.values())))
    (CORPUS / "validation.json").write_text(json.dumps(list(validation.values())))
    names = {"train": list(train), "validation": list(validation), "heldout": list(heldout)}
    (CORPUS / "split.json").write_text(json.dumps(names, indent=1))
    (HERE / "heldout.txt").write_text("\n\n".join(heldout.values()), encoding="utf-8")
    shutil.copyfile(stdlib / "LICENSE.txt", HERE / "LICENSE.PSF.txt")
    train_tokenizer(list(train.values())).save_pretrained(HERE)
    for part, texts in (("train", train), ("validation", validation), ("heldout", heldout)):
        print(f"{part:10s} {len(texts):4d} files {sum(len(text.encode()) for text in texts.values()):9,d} bytes")


if __name__ == "__main__":
    main()
