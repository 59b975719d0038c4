"""Everything run.py needs, in one folder: models, environments of other engines, weights in every engine's formats.

    python benchmarks/cpu/prepare.py --folder DIR [--shape llama-1b] [--engines ours llama.cpp openvino ctranslate2]

What is there already is left alone. Needs PyPI, and for llama.cpp a C++ compiler; about 12 GB of disk. Each engine's
own converter and quantiser is used; OpenVINO's with symmetric groups of 128 in all layers.
"""

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

from peers import PEERS, python_of
from shapes import SHAPES, VOCAB_SIZE, write_model

from tritium import build
from tritium.config import SCHEMES
from tritium.testing.gguf_files import write_gguf

OPENVINO_FLAGS = {
    "fp16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--sym", "--ratio", "1.0", "--group-size", "128"],
}
WORDS = [f"w{i}" for i in range(VOCAB_SIZE)]


def ours(model: Path, form: str, out: Path, folder: Path) -> None:
    name, _, more = form.partition("+")
    scheme = next((scheme for scheme in SCHEMES if scheme == name), None)  # none: bfloat16
    build(model, output_dir=out, dtype="bfloat16", scheme=scheme, quantize_embedding=more == "embedding")


def llama(model: Path, form: str, out: Path, folder: Path) -> None:
    source = model.parent / "llama-BF16.gguf"
    if not source.exists():
        config = json.loads((model / "config.json").read_text())
        fields = {"tokenizer.ggml.model": "llama", "llama.rope.dimension_count": config["head_dim"]}
        write_gguf(source, model, "BF16", fields=fields, tokens=WORDS)  # its server does not do without a vocabulary
    if form == "BF16":
        return
    code = (
        "import llama_cpp as c; p = c.llama_model_quantize_default_params(); "
        f"p.ftype, p.nthread = c.LLAMA_FTYPE_MOSTLY_{form}, 2; "
        f"raise SystemExit(c.llama_model_quantize({str(source)!r}.encode(), {str(out)!r}.encode(), p))"
    )
    call(python_of("llama.cpp", folder), "-c", code)


def openvino(model: Path, form: str, out: Path, folder: Path) -> None:
    command = Path(python_of("openvino-export", folder)).parent / "optimum-cli"
    flags = [*OPENVINO_FLAGS[form], "--task", "text-generation-with-past"]
    call(command, "export", "openvino", "--model", tokenized(model), *flags, out)


def ctranslate2(model: Path, form: str, out: Path, folder: Path) -> None:
    code = (
        "import sys; from ctranslate2.converters import TransformersConverter as T; "
        f"T({str(tokenized(model))!r}).convert({str(out)!r}, quantization={form!r})"
    )
    call(python_of("ctranslate2-export", folder), "-c", code)


def tokenized(model: Path) -> Path:
    """The same model with a vocabulary, w0 w1 ..., which some converters want; no engine is given text."""
    place = model.parent / "tokenized"
    place.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        if not (place / name).exists():
            (place / name).symlink_to(model / name)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    special = [
        {"id": i, "content": f"w{i}", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in range(2)
    ]
    bpe = {"type": "BPE", "vocab": vocabulary, "merges": [], "dropout": None, "unk_token": None}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None}
    tokenizer |= {"pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": bpe}
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w1"}
    (place / "tokenizer_config.json").write_text(json.dumps(names))
    return place


def call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})


CONVERTERS = {"ours": ours, "llama.cpp": llama, "openvino": openvino, "ctranslate2": ctranslate2}
OUTPUTS = {
    "ours": "tritium-{}",
    "llama.cpp": "llama-{}.gguf",
    "openvino": "openvino-{}",
    "ctranslate2": "ctranslate2-{}",
}


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--engines", choices=CONVERTERS, nargs="+", default=list(CONVERTERS))
    args = parser.parse_args()
    for shape in args.shape:
        model = write_model(shape, args.folder / shape / "model")
        for engine in args.engines:
            python_of(engine, args.folder)
            for form in PEERS[engine].formats:
                out = model.parent / OUTPUTS[engine].format(form)
                if not out.exists():
                    print(f"{shape}: {out.name}", flush=True)
                    try:
                        CONVERTERS[engine](model, form, out, args.folder)
                    except BaseException:  # also when interrupted: half of it would be taken for all of it
                        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
                        raise


if __name__ == "__main__":
    main()
