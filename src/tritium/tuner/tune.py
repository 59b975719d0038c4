"""The tuner: measure what has not been measured on this machine, or on its GPU, and choose per site.

A measurement runs the engine itself, a batch of the wanted size through all steps in order, and times each step: inputs
are as warm as in real use, weights as cold, and whatever the steps do to each other is in it. All sites are measured at
once, each with one of its candidates, in as many rounds as the site with most candidates needs; a time is the median
over the site's layers and the repetitions, after warm-up. `choose.py` has the rule by which times become a choice.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from tritium.config import EFFORTS, Effort, RuntimeConfig, check_choice
from tritium.engine.engine import Engine
from tritium.engine.environment import block_size_of, environment, gpu_environment, over_blocks
from tritium.engine.manifest import TACTICS_NAME
from tritium.engine.serialise import replace_text
from tritium.engine.tactics import Tactics
from tritium.errors import ConfigError
from tritium.kernels.kernel import resolve
from tritium.runtime.gpu.device import capability_for, gpu_for
from tritium.runtime.step_times import StepTimer
from tritium.tuner.choose import choose
from tritium.tuner.measure import Progress, TimeBatch, measure
from tritium.tuner.sites import Site, sites, time_key
from tritium.tuner.timing_cache import TimingCache

COUNTS: Mapping[str, tuple[int, ...]] = {"quick": (1, 16, 256), "full": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)}
REPEATS: Mapping[str, int] = {"quick": 3, "full": 9}
GPU_COUNTS: Mapping[str, tuple[int, ...]] = {
    "quick": (1, 16, 64, 256, 2048),
    "full": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
}
LARGEST_DECODE = 64  # a batch of more tokens than this is one prompt, of fewer as many decoding sequences
GPU_LARGEST_DECODE = 256
GPU_MARGIN = 1.03  # two measurements of the same differ by a few per cent there


def tune_engine(
    engine: Engine,
    effort: Effort,
    cache: TimingCache,
    *,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """`tune`, write the result into the engine as `tactics.json`, and open it again."""
    tactics = tune(engine, effort, cache, num_threads=num_threads, progress=progress)
    text = msgspec.json.format(msgspec.json.encode(tactics), indent=1).decode() + "\n"
    replace_text(engine.path, engine.manifest, TACTICS_NAME, text)
    return Engine.load(engine.path, plugins=engine.plugins)


def tune(
    engine: Engine,
    effort: Effort,
    cache: TimingCache,
    *,
    denied: Collection[str] = (),
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> Tactics:
    """The fastest kernel of each site and its fastest tactic for each size of batch; new times are saved in `cache`.

    effort: "none" measures nothing and chooses among what is in the cache. Times, and what this machine or GPU refuses,
        are saved size by size: who is interrupted goes on from there. denied: names of kernels, or of tactics as
        `kernel:name=value`, beside those that the cache denies. progress(done, all, estimated seconds left).

    Raises `EngineError` for an engine that was built for a GPU where there is none, and as `measure` does.
    """
    check_choice("effort", effort, EFFORTS)
    is_gpu = engine.manifest.backend == "cuda"
    wanted = sites(
        engine.plan,
        engine.plugins,
        engine.manifest.backend,
        denied={*denied, *cache.denied},
        is_thorough=effort == "full",
        is_bitwise=engine.manifest.invariance == "bitwise",
        capability=capability_for(engine) if is_gpu else None,
    )
    counts = _counts(engine, effort)
    most_rows = 1 if engine.manifest.kind == "encoder" else _largest_decode(engine)
    measured = {count: [s for s in wanted if _is_measured(s, count, most_rows)] for count in counts}
    missing = {
        count: {s: [c for c in s.candidates if cache.get(time_key(s, count, c)) is None] for s in of_count}
        for count, of_count in measured.items()
    }
    num_missing = sum(len(left) for of_count in missing.values() for left in of_count.values())
    num_all = sum(len(s.candidates) for of_count in measured.values() for s in of_count)
    if effort != "none" and num_missing:
        block_size = int(block_size_of(cache.environment))
        with _timing(engine, list(missing), num_threads, block_size) as times:
            measure(times, missing, cache, REPEATS[effort], progress)
    margin = GPU_MARGIN if is_gpu else 1.0
    choices = [choose(site, [c for c in counts if site in measured[c]], cache, margin=margin) for site in wanted]
    return Tactics(
        environment=cache.environment,
        effort=effort,
        choices=tuple(choice for choice in choices if choice is not None),
        num_measured=num_missing if effort != "none" else 0,
        num_cached=num_all - num_missing,
    )


def environment_of(engine: Engine, num_threads: int | None = None, block_size: int | None = None) -> dict[str, str]:
    """Where times for this engine are taken, and over KV blocks of which size when `block_size` is given.

    Raises `EngineError` for an engine that was built for a GPU, without one, `ConfigError` for a size that no block
    has, or for any where the engine is not a decoder for a GPU: only there is it known to matter.
    """
    if block_size is not None and (engine.manifest.backend != "cuda" or engine.manifest.kind == "encoder"):
        raise ConfigError(
            f"block_size={block_size} is for decoders on a GPU, and {engine.path} is an engine of kind "
            f"{engine.manifest.kind!r} for {engine.manifest.backend!r}: leave it out"
        )
    if engine.manifest.backend != "cuda":
        return environment(num_threads)
    gpu_for(engine)
    here = gpu_environment()
    return here if block_size is None else over_blocks(here, RuntimeConfig(block_size=block_size).block_size)


def _largest_decode(engine: Engine) -> int:
    return GPU_LARGEST_DECODE if engine.manifest.backend == "cuda" else LARGEST_DECODE


def _counts(engine: Engine, effort: Effort) -> list[int]:
    """Sizes of batches that this engine can be given."""
    is_gpu = engine.manifest.backend == "cuda"
    counts = (GPU_COUNTS if is_gpu else COUNTS)["full" if effort == "none" else effort]
    if engine.manifest.kind != "encoder":
        longest = max(_largest_decode(engine), engine.manifest.max_model_len - 2)
    else:
        longest = max(counts) if is_gpu else engine.manifest.max_model_len  # there of several texts
    return [count for count in counts if count <= longest]


def _is_measured(site: Site, count: int, most_rows: int) -> bool:
    """Steps over sampled rows are measured by decodes: a prompt has one row, and so has an encoder's text."""
    return site.phase == "tokens" or count <= most_rows


@contextmanager
def _timing(engine: Engine, counts: list[int], num_threads: int | None, block_size: int) -> Iterator[TimeBatch]:
    """What times batches of these numbers of tokens; block_size: of a decoder's KV cache on a GPU."""
    if engine.manifest.backend == "cuda":  # loaded only here: where there is no GPU there may be no Triton
        is_encoder = engine.manifest.kind == "encoder"
        kind = "GpuEncoderStepTimer" if is_encoder else "GpuStepTimer"
        sized = {} if is_encoder else {"block_size": block_size}
        timer = resolve(f"tritium.runtime.gpu.step_times:{kind}")(
            engine, counts, largest_decode=GPU_LARGEST_DECODE, **sized
        )
        try:
            yield timer.times
        finally:
            timer.close()
        return

    def times_on_cpu(count: int, tactics: Tactics, repeats: int) -> list[float]:
        timer = StepTimer(engine, num_threads=num_threads, tactics=tactics)
        is_decode = count <= LARGEST_DECODE and engine.manifest.kind != "encoder"
        return timer.decode(count, _context(engine), repeats) if is_decode else timer.prefill(count, repeats)

    yield times_on_cpu


def _context(engine: Engine) -> int:
    """Tokens that each decoding sequence has behind it."""
    return min(128, engine.manifest.max_model_len - 2)
