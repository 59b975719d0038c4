"""`quantize`: calibrate a checkpoint on a text by one of the methods, then build an engine with what was learned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from tritium import __version__
from tritium.calibrate.calibrate import Calibration, calibrate, calibration_key
from tritium.calibrate.work_dir import WorkDir
from tritium.compiler import build
from tritium.config import BuildConfig, check_choice, check_int
from tritium.engine.cache import file_hashes
from tritium.engine.engine import Engine
from tritium.errors import ConfigError
from tritium.quant.schemes import FP8, scheme_named
from tritium.resolve import ResolvedModel, resolve_model
from tritium.runtime.gpu.device import check_tuning
from tritium.text.tokenizer import Tokenizer
from tritium.text.tokenizer_files import ADD_TOKENIZER
from tritium.weights.hub import model_directory
from tritium.weights.recipes import evaluate

Method = Literal["rtn", "smoothquant", "awq", "gptq", "static"]
METHODS = ("rtn", "smoothquant", "awq", "gptq", "static")
WINDOW_LEN = 512  # tokens
DEFAULT_TOKENS = 16_384
MAX_TEXT_BYTES = 64 << 20
CALIBRATION_NAME = "calibration.safetensors"
Progress = Callable[[str, int, int], None]


def quantize(
    model: str | Path,
    *,
    output_dir: str | Path,
    scheme: str,
    method: Method = "rtn",
    calibration_text: str | Path | None = None,
    num_tokens: int = DEFAULT_TOKENS,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> Engine:
    """An engine of `model` whose linears are kept by `scheme`, as `method` makes them.

    method: "rtn" rounds to the nearest number with the best clipping and needs no text. "smoothquant" and "awq" move
        the sizes of channels between norms and linears; awq also weighs errors by their inputs. "gptq" rounds one input
        after the other. "static", for a GPU's scheme "fp8" or "w8a8": activations get one scale for all tokens, by the
        largest element of the text's, in place of a scale for each token; what is larger is cut off.
    calibration_text: a file of any text; its first `num_tokens` tokens are used, in windows of 512.
    work_dir: finished layers are kept there, with what was learned in calibration.safetensors at last; a start after an
        interruption goes on behind them. None: nothing is kept.
    overrides: fields of `BuildConfig`. progress(stage, done, total): as `build` calls it; stage "calibrate" before.

    Raises `ConfigError` for what does not go together, and whatever `build` raises.
    """
    config = BuildConfig(scheme=scheme, **overrides)  # type: ignore[arg-type]  # it refuses what is no scheme
    check_tuning(config.device, config.tune)
    check_choice("method", method, METHODS)
    check_int("num_tokens", num_tokens, 2, 1 << 24)
    if (calibration_text is None) != (method == "rtn"):
        need = "needs no text" if method == "rtn" else "learns from a text: give calibration_text (--calibration FILE)"
        raise ConfigError(f"method={method!r} {need}")
    if config.tensor_parallel > 1 and method != "rtn":
        raise ConfigError(
            f"method={method!r} learns of whole weights, and ranks have parts of them: leave tensor_parallel="
            f"{config.tensor_parallel} out, or say method='rtn'"
        )
    learned: dict[str, Tensor] = {}
    if calibration_text is not None:
        learned = _learn(model, config, method, Path(calibration_text), num_tokens, work_dir, progress)
    return build(model, config, output_dir=output_dir, calibration=learned, progress=progress)


def _learn(
    model: str | Path,
    config: BuildConfig,
    method: Method,
    text: Path,
    num_tokens: int,
    work_dir: str | Path | None,
    progress: Progress | None,
) -> dict[str, Tensor]:
    assert config.scheme is not None
    scheme = scheme_named(config.scheme)
    has_rows = scheme.weight == FP8 or (config.device == "cuda" and scheme.int8_activations)
    if method == "static" and not has_rows:
        raise ConfigError(
            f"method='static' is for scheme='fp8' or 'w8a8' with device='cuda', not for {config.scheme!r} with "
            f"device={config.device!r}"
        )
    if method != "static" and scheme.weight == FP8:
        raise ConfigError(f"method={method!r} is not for scheme={config.scheme!r}: say 'rtn' or 'static'")
    path = model_directory(model)
    resolved = resolve_model(path, config, None)
    if resolved.encoder is not None or resolved.source is None:
        raise ConfigError(f"{model} is an encoder: schemes are for decoders")
    windows = _windows(resolved, text, num_tokens)
    wanted = Calibration(method=method, scheme=scheme, left_out=config.unquantized, windows=windows)  # type: ignore[arg-type]
    source, recipes = resolved.source, resolved.recipes
    work = WorkDir(None, "")
    if work_dir is not None:  # the key's hash of every file costs a pass over the weights
        known = (__version__, config.dtype, resolved.max_model_len, file_hashes(path))
        work = WorkDir(Path(work_dir), calibration_key(wanted, known))

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("calibrate", done, total)

    learned = calibrate(resolved.module, lambda name: evaluate(recipes[name], source), wanted, work, report)
    if work_dir is not None:
        save_file({name: tensor.contiguous() for name, tensor in learned.items()}, Path(work_dir) / CALIBRATION_NAME)
    return learned


def _windows(resolved: ResolvedModel, text: Path, num_tokens: int) -> list[list[int]]:
    """The text's first tokens, cut into windows."""
    try:
        size = text.stat().st_size
        data = text.read_bytes() if size <= MAX_TEXT_BYTES else b""
    except OSError as error:
        raise ConfigError(f"calibration text {text} cannot be read ({error})") from error
    if not data:
        raise ConfigError(f"calibration text {text} has {size} bytes: expected 1 to {MAX_TEXT_BYTES}")
    if resolved.model_dir is None or not (resolved.model_dir / "tokenizer.json").is_file():
        raise ConfigError(
            f"{resolved.origin} has no tokenizer.json, without which a text is no tokens: {ADD_TOKENIZER}"
        )
    vocab_size = resolved.module.get_parameter("embed_tokens.weight").shape[0]
    tokenizer = Tokenizer.from_directory(resolved.model_dir, model_vocab_size=vocab_size)
    ids = tokenizer.encode(data.decode("utf-8", errors="replace"))[:num_tokens]
    length = min(WINDOW_LEN, resolved.max_model_len - 1)
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ConfigError(f"calibration text {text} has {len(ids)} tokens, too few to learn from")
    return windows
