"""Train the demo model: a small Llama on the Python standard library's own source, on one GPU or, slowly, on CPUs.

    python examples/demo_model/corpus.py                            # once, seconds
    python examples/demo_model/train.py --out DIR                   # minutes on a GPU
    python examples/demo_model/train.py --out DIR --recipe smoke    # seconds on a CPU: does it still run?

The corpus is small (2.3 M tokens), so the work is in not learning it by heart: every epoch is shuffled and tokenised
anew (BPE-dropout), weights decay fast, residual branches are dropped out, and the model learns from the predictions of
a larger teacher, trained the same way, as much as from the text. README.md has what each of these was worth.

Shapes: B windows, T tokens, V vocabulary.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import bits_per_byte, xz_bits_per_byte
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BOS_ID, EOS_ID = 0, 1
CONTEXT = 2048
HEAD_DIM = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

WARMUP = 0.03  # the fraction of a training in which the learning rate climbs; it falls to zero over the rest
EMBEDDING_DECAY = 0.1
TEACHER_SHARE = 0.5  # of the loss; the rest is the text's own next token
LOG_EVERY = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model's shape and how it is trained. `smoke` shows the least that runs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    epochs: int
    batch: int = 16  # windows of CONTEXT tokens a step
    learning_rate: float = 4e-3  # Muon's updates are scaled to AdamW's size, so one rate serves both
    weight_decay: float = 1.0
    dropout: float = 0.1
    bpe_dropout: float = 0.1


STUDENT = Recipe(hidden=384, layers=6, heads=12, kv_heads=4, intermediate=768, epochs=32)
TEACHER = Recipe(hidden=768, layers=6, heads=24, kv_heads=8, intermediate=2048, epochs=14, dropout=0.2)
SMOKE = Recipe(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, epochs=1, batch=2)
RECIPES = {"demo": (STUDENT, TEACHER), "smoke": (SMOKE, SMOKE)}  # name: (student, teacher)


def new_model(recipe: Recipe, vocab_size: int) -> LlamaForCausalLM:
    """A Llama with random weights, and dropout after the embedding and after both branches of a block."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config).to(DEVICE)

    def drop(module: torch.nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, recipe.dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
        if DEVICE == "cuda":
            layer.compile()
    return model


def epoch_windows(texts: list[str], tokenizer: Tokenizer, bpe_dropout: float) -> torch.Tensor:
    """[windows, CONTEXT + 1] token ids: all documents in a new order and tokenisation, each BOS, text, EOS."""
    tokenizer.model.dropout = bpe_dropout
    shuffled = [texts[i] for i in torch.randperm(len(texts)).tolist()]
    encodings = tokenizer.encode_batch_fast(shuffled, add_special_tokens=False)
    ids_T = torch.tensor([token for encoding in encodings for token in (BOS_ID, *encoding.ids, EOS_ID)])
    windows = ids_T[int(torch.randint(CONTEXT, ())) :].unfold(0, CONTEXT + 1, CONTEXT)
    return windows[torch.randperm(len(windows))]


def batches(texts: list[str], tokenizer: Tokenizer, recipe: Recipe) -> Iterator[tuple[float, torch.Tensor]]:
    """(fraction of the training done, [batch, CONTEXT + 1] token ids), until the recipe's epochs are over."""
    with ThreadPoolExecutor(1) as ahead:  # tokenising an epoch takes seconds: do it while earlier ones are trained on
        epochs = ahead.map(lambda _: epoch_windows(texts, tokenizer, recipe.bpe_dropout), range(recipe.epochs))
        for epoch, windows in enumerate(epochs):
            steps = len(windows) // recipe.batch
            for step in range(steps):
                batch = windows[step * recipe.batch : (step + 1) * recipe.batch].to(DEVICE)
                yield (epoch + step / steps) / recipe.epochs, batch


def optimizers_for(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    adamw_groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": EMBEDDING_DECAY},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(adamw_groups, lr=recipe.learning_rate, betas=(0.9, 0.95)),
    ]


def logits_of(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return model(ids_BT, use_cache=False).logits.float()


def loss_of(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None, window: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the next token and, where there is a teacher, with what it expects; nats per token."""
    inputs_BT, next_BT = window[:, :-1], window[:, 1:]
    logits_BTV = logits_of(model, inputs_BT)
    text_loss = F.cross_entropy(logits_BTV.flatten(0, 1), next_BT.flatten())
    if teacher is None:
        return text_loss
    with torch.no_grad():
        expected_BTV = logits_of(teacher, inputs_BT).softmax(-1)
    teacher_loss = F.cross_entropy(logits_BTV.flatten(0, 1), expected_BTV.flatten(0, 1))
    return TEACHER_SHARE * teacher_loss + (1 - TEACHER_SHARE) * text_loss


def train(
    recipe: Recipe, texts: list[str], validation: str, teacher: LlamaForCausalLM | None = None
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """A model in evaluation mode and what its training took; prints its progress."""
    hf_tokenizer = AutoTokenizer.from_pretrained(HERE)
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))  # another, whose BPE-dropout is on
    model = new_model(recipe, tokenizer.get_vocab_size())
    optimizers = optimizers_for(model, recipe)

    def validation_bits() -> float:
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # another mode and other shapes: not worth compiling for
            bits = bits_per_byte(model, hf_tokenizer, validation)
        model.train()
        return bits

    started, tokens = time.time(), 0
    for step, (done, window) in enumerate(batches(texts, tokenizer, recipe), 1):
        rate = recipe.learning_rate * min(done / WARMUP, (1 - done) / (1 - WARMUP))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = loss_of(model, teacher, window)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += window[:, 1:].numel()
        if step % LOG_EVERY == 0:
            print(
                f"{done:4.0%} step {step} loss {loss.item():.3f} validation {validation_bits():.4f} bits/byte "
                f"{tokens / (time.time() - started) / 1e6:.2f} M tokens/s",
                flush=True,
            )
    took = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens": tokens,
        "minutes": round((time.time() - started) / 60, 2),
        "validation_bits_per_byte": round(validation_bits(), 4),
    }
    print(took, flush=True)
    return model.eval(), took


def save(model: LlamaForCausalLM, out: Path) -> None:
    """An ordinary Hugging Face directory, weights in bf16."""
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    model.to(torch.bfloat16).save_pretrained(out)
    if out.resolve() != HERE:
        for name in TOKENIZER_FILES:
            shutil.copyfile(HERE / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the directory to write the checkpoint to")
    parser.add_argument("--recipe", choices=RECIPES, default="demo")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    texts = json.loads((CORPUS / "train.json").read_text())
    validation = "\n\n".join(json.loads((CORPUS / "validation.json").read_text()))
    student_recipe, teacher_recipe = RECIPES[arguments.recipe]
    teacher, teacher_took = train(teacher_recipe, texts, validation)
    model, took = train(student_recipe, texts, validation, teacher)
    save(model, arguments.out)

    stored = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).to(DEVICE).eval()
    heldout = (HERE / "heldout.txt").read_text(encoding="utf-8")
    numbers = {
        "heldout_bits_per_byte": round(bits_per_byte(stored, AutoTokenizer.from_pretrained(HERE), heldout), 4),
        "xz_bits_per_byte": round(xz_bits_per_byte(heldout), 4),
        "heldout_bytes": len(heldout.encode()),
        **took,
        "recipe": dataclasses.asdict(student_recipe),
        "teacher": {**teacher_took, "recipe": dataclasses.asdict(teacher_recipe)},
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "files": json.loads((CORPUS / "split.json").read_text()),
    }
    (arguments.out / "training.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print({key: value for key, value in numbers.items() if key != "files"})


if __name__ == "__main__":
    main()
