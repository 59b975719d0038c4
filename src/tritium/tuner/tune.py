"""The tuner: measure what has not been measured on this machine, and choose per site.

A measurement runs the engine itself, a batch of the wanted size through all steps in order, and times each step: inputs
are as warm as in real use, weights as cold, and whatever the steps do to each other is in it. All sites are measured at
once, each with one of its candidates, in as many rounds as the site with most candidates needs; a time is the median
over the site's layers and the repetitions, after warm-up.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import msgspec

from tritium.config import EFFORTS, Effort, check_choice
from tritium.engine.engine import Engine
from tritium.engine.serialise import replace_text
from tritium.engine.tactics import TACTICS_NAME, Choice, Tactic, Tactics
from tritium.errors import EngineError
from tritium.runtime.step_times import StepTimer
from tritium.tuner.sites import Candidate, Site, sites, time_key
from tritium.tuner.timing_cache import TimingCache

COUNTS: Mapping[str, tuple[int, ...]] = {"quick": (1, 16, 256), "full": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)}
REPEATS: Mapping[str, int] = {"quick": 3, "full": 9}
LARGEST_DECODE = 64  # a batch of more tokens than this is one prompt, of fewer as many decoding sequences
Progress = Callable[[int, int, float], None]


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

    effort: "none" measures nothing and chooses among what is in the cache. denied: names of kernels, or of tactics as
        `kernel:name=value`, beside those that the cache denies. progress(done, all, estimated seconds left).

    Raises `EngineError` for an engine that was built for a GPU.
    """
    check_choice("effort", effort, EFFORTS)
    if engine.manifest.backend == "cuda":
        raise EngineError(
            f"{engine.path} was built for an NVIDIA GPU, and the tuner measures a CPU's kernels: a GPU's are chosen "
            "without it; run the engine as it is, or tune one that was built with --device cpu"
        )
    wanted = sites(engine.plan, engine.plugins, denied={*denied, *cache.denied}, is_thorough=effort == "full")
    counts = _counts(engine, effort)
    is_encoder = engine.manifest.kind == "encoder"
    measured = {count: [s for s in wanted if _is_measured(s, count, is_encoder=is_encoder)] for count in counts}
    missing = {
        count: {s: [c for c in s.candidates if cache.get(time_key(s, count, c)) is None] for s in of_count}
        for count, of_count in measured.items()
    }
    num_missing = sum(len(left) for of_count in missing.values() for left in of_count.values())
    num_all = sum(len(s.candidates) for of_count in measured.values() for s in of_count)
    if effort != "none" and num_missing:
        _measure(engine, missing, cache, REPEATS[effort], num_threads, progress)
        cache.save()
    choices = [_choose(site, [c for c in counts if site in measured[c]], cache) for site in wanted]
    return Tactics(
        environment=cache.environment,
        effort=effort,
        choices=tuple(choice for choice in choices if choice is not None),
        num_measured=num_missing if effort != "none" else 0,
        num_cached=num_all - num_missing,
    )


def _counts(engine: Engine, effort: Effort) -> list[int]:
    """Sizes of batches that this engine can be given."""
    longest = engine.manifest.max_model_len
    if engine.manifest.kind != "encoder":
        longest = max(LARGEST_DECODE, longest - 2)
    return [count for count in COUNTS.get(effort, COUNTS["full"]) if count <= longest]


def _is_measured(site: Site, count: int, *, is_encoder: bool) -> bool:
    """Steps over sampled rows are measured by decodes: a prompt has one row, and so has an encoder's text."""
    return site.phase == "tokens" or count <= (1 if is_encoder else LARGEST_DECODE)


def _measure(
    engine: Engine,
    missing: Mapping[int, Mapping[Site, list[Candidate]]],
    cache: TimingCache,
    repeats: int,
    num_threads: int | None,
    progress: Progress | None,
) -> None:
    rounds = [
        (count, {site: left[i] for site, left in of_count.items() if i < len(left)})
        for count, of_count in missing.items()
        for i in range(max((len(left) for left in of_count.values()), default=0))
    ]
    work = [count + 16 for count, _ in rounds]  # a pass costs something whatever its size
    start, done = time.perf_counter(), 0
    for number, (count, chosen) in enumerate(rounds):
        if progress is not None:
            left = (time.perf_counter() - start) / done * (sum(work) - done) if done else math.nan
            progress(number, len(rounds), left)
        timer = StepTimer(engine, num_threads=num_threads, tactics=_forced(chosen, cache.environment))
        is_decode = count <= LARGEST_DECODE and engine.manifest.kind != "encoder"
        samples = timer.decode(count, _context(engine), repeats) if is_decode else timer.prefill(count, repeats)
        for site, candidate in chosen.items():
            seconds = statistics.median(samples[step] for step in site.steps)
            cache.put(time_key(site, count, candidate), seconds)
        done += work[number]
    if progress is not None:
        progress(len(rounds), len(rounds), 0.0)


def _context(engine: Engine) -> int:
    """Tokens that each decoding sequence has behind it."""
    return min(128, engine.manifest.max_model_len - 2)


def _forced(chosen: Mapping[Site, Candidate], environment: dict[str, str]) -> Tactics:
    always = 1 << 30
    choices = [
        Choice(site=site.key, steps=site.steps, kernel=one.kernel.name, tactics=((always, one.tactic),))
        for site, one in chosen.items()
    ]
    return Tactics(environment=environment, effort="measuring", choices=tuple(choices))


def _choose(site: Site, counts: list[int], cache: TimingCache) -> Choice | None:
    """The kernel with the least product of times over all sizes, each with its best tactic; None: nothing is known."""
    by_kernel: dict[str, dict[int, tuple[float, Tactic]]] = defaultdict(dict)
    for candidate in site.candidates:
        for count in counts:
            seconds = cache.get(time_key(site, count, candidate))
            best = by_kernel[candidate.kernel.name]
            if seconds is not None and (count not in best or seconds < best[count][0]):
                best[count] = (seconds, candidate.tactic)
    most = max(map(len, by_kernel.values()), default=0)
    known = {kernel: best for kernel, best in by_kernel.items() if best and len(best) == most}
    if not known:
        return None
    kernel = min(known, key=lambda name: sum(math.log(max(seconds, 1e-9)) for seconds, _ in known[name].values()))
    chosen = sorted(
        ((count, seconds, tactic) for count, (seconds, tactic) in known[kernel].items()), key=lambda row: row[0]
    )
    has_tactics = any(tactic for *_, tactic in chosen)
    return Choice(
        site=site.key,
        steps=site.steps,
        kernel=kernel,
        tactics=tuple((count, tactic) for count, _, tactic in chosen) if has_tactics else (),
        seconds={str(count): seconds for count, seconds, _ in chosen},
    )
