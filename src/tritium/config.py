"""What can be configured, and the only place that reads the environment.

Each value is checked when the object is made; a wrong one is a `ConfigError` that names it, shows it and says what is
allowed. Every object can be printed as it was resolved (`dataclasses.asdict`).
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tritium.errors import ConfigError
from tritium.keywords import refuse_unknown
from tritium.mapping import Ranks

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = ("auto", "float32", "bfloat16", "float16")
Effort = Literal["none", "quick", "full"]
EFFORTS = ("none", "quick", "full")
Scheme = Literal["w8a8", "w8a16", "w4a16_g128", "w4a8_g32", "w4a8_g128", "fp8"]
SCHEMES = ("w8a8", "w8a16", "w4a16_g128", "w4a8_g32", "w4a8_g128", "fp8")
SCHEMES_OF = {"cpu": SCHEMES[:-1], "cuda": ("fp8", "w8a8", "w8a16", "w4a16_g128")}
KVDtype = Literal["auto", "int8"]
KV_DTYPES = ("auto", "int8")
Invariance = Literal["bitwise", "fast"]
Device = Literal["cpu", "cuda"]
DEVICES = ("cpu", "cuda")
SchedulingPolicy = Literal["max_utilization", "guaranteed_no_evict"]


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise `ConfigError` unless `value` is an int (not a bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, not {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_block_size(name: str, value: int) -> None:
    """Raise `ConfigError` for a number of tokens that no block of a KV cache has."""
    check_int(name, value, 1, 256)
    if value & (value - 1):
        raise ConfigError(f"{name} must be a power of two, not {value}")


def check_batch_limits(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Raise `ConfigError` for numbers that no batch can have."""
    check_int("max_num_seqs", max_num_seqs, 1, 1 << 14)
    check_int("max_num_batched_tokens", max_num_batched_tokens, 1, 1 << 20)
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs "
            f"({max_num_seqs}): each running request decodes one token a step"
        )


@refuse_unknown(ConfigError)
@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How a model is compiled. Everything here changes the engine's identity.

    dtype: what weights and activations are computed in; "auto" takes the checkpoint's own.
    scheme: how the weights of linears are kept, one of the device's `SCHEMES_OF`; None keeps them in `dtype`. "fp8",
        for a GPU with fp8 units: e4m3 linears and KV cache; "w8a8" is for those without.
    kv_dtype: what the KV cache holds. "auto": what keys and values are computed in, or e4m3 with scheme "fp8". "int8":
        integers with a scale a token and head.
    quantize_embedding: on a CPU, keep the table that tokens are looked up in as int8 with a scale for each token; with
        any scheme or none. A tied head that has 8 bits too shares it.
    unquantized: tensors that a scheme leaves in `dtype`, by their names; `*` and `?` as in file names.
    max_model_len: longest prompt plus output, in tokens; None takes the model's own limit.
    device: the backend that the kernels are chosen for: "cpu", or "cuda" for an NVIDIA GPU. Building needs none.
    invariance: "bitwise": a request's numbers never depend on its neighbours (DESIGN "Numerics class"); "fast" does
        not promise it. None: "bitwise" on a CPU, "fast" on a GPU, where "bitwise" is slower (docs/gpu.md).
    tune: how thoroughly kernels are timed, when the engine is built, for this machine or its GPU, which must be there
        ("none": not at all, defaults are used; `tritium tune` can do it later, and elsewhere).
    tune_block_size: the `block_size` that the engine will run with, over whose blocks a GPU's attention is timed; None:
        the default one.
    certificate: how thoroughly the engine is compared with its checkpoint in fp32 ("none": not at all).
    max_mean_kl: a bound on that comparison, in nats, in place of the scheme's own; beyond it a build fails.
    disabled_passes: names of optional passes to leave out; `pass@module` leaves it out in that part of the model alone.
    tensor_parallel: processes that share every layer, each with an engine of its own. rank: which of them this is for;
        None: for all of them, in directories beside each other.
    """

    dtype: DType = "auto"
    scheme: Scheme | None = None
    kv_dtype: KVDtype = "auto"
    quantize_embedding: bool = False
    unquantized: tuple[str, ...] = ()
    max_model_len: int | None = None
    device: Device = "cpu"
    invariance: Invariance | None = None
    tune: Effort = "none"
    tune_block_size: int | None = None
    certificate: Effort = "none"
    max_mean_kl: float | None = None
    disabled_passes: tuple[str, ...] = ()
    tensor_parallel: int = 1
    rank: int | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("device", self.device, DEVICES)
        check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        check_choice("tune", self.tune, EFFORTS)
        check_choice("certificate", self.certificate, EFFORTS)
        if self.tune_block_size is not None:
            check_block_size("tune_block_size", self.tune_block_size)
            if self.tune == "none" or self.device != "cuda":
                raise ConfigError(
                    f"tune_block_size={self.tune_block_size} (--block-size) is for tune with device='cuda', not for "
                    f"tune={self.tune!r} with device={self.device!r}: leave it out"
                )
        if self.max_mean_kl is not None and not (
            isinstance(self.max_mean_kl, (int, float)) and 0 < self.max_mean_kl < math.inf
        ):
            raise ConfigError(f"max_mean_kl must be a number of nats above 0, not {self.max_mean_kl!r}")
        if self.invariance is not None:
            check_choice("invariance", self.invariance, ("bitwise", "fast"))
        if not isinstance(self.quantize_embedding, bool):
            raise ConfigError(f"quantize_embedding must be True or False, not {self.quantize_embedding!r}")
        if self.quantize_embedding and self.device != "cpu":
            raise ConfigError(
                f"quantize_embedding=True is for device='cpu', not for {self.device!r}, which has no kernel for a "
                "table in 8 bits: leave it out"
            )
        if self.scheme is not None:
            check_choice("scheme", self.scheme, SCHEMES)
            if self.scheme not in SCHEMES_OF[self.device]:
                known = ", ".join(SCHEMES_OF[self.device])
                raise ConfigError(f"scheme={self.scheme!r} is not for device={self.device!r}, which has {known}")
        if self.unquantized and self.scheme is None:
            raise ConfigError(f"unquantized={self.unquantized!r} is for a scheme: give scheme with it")
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 2, 1 << 24)
        self._check_ranks()

    def _check_ranks(self) -> None:
        check_int("tensor_parallel", self.tensor_parallel, 1, 1024)
        if self.rank is not None:
            check_int("rank", self.rank, 0, self.tensor_parallel - 1)
        if self.tensor_parallel == 1:
            return
        for name, plain in (
            ("quantize_embedding", False),
            ("tune", "none"),
            ("certificate", "none"),
        ):
            if getattr(self, name) != plain:
                raise ConfigError(
                    f"tensor_parallel={self.tensor_parallel} does not go with {name}={getattr(self, name)!r}: "
                    f"leave {name} out"
                )

    @property
    def ranks(self) -> Ranks:
        """The processes that share the model, and which of them this is for; for all of them: the first."""
        return Ranks(tensor_parallel=self.tensor_parallel, rank=self.rank or 0)

    @property
    def resolved_invariance(self) -> Invariance:
        """What `invariance` comes to on this device."""
        return self.invariance or ("bitwise" if self.device == "cpu" else "fast")


@refuse_unknown(ConfigError)
@dataclass(frozen=True, kw_only=True)
class OptimizationProfile:
    """The batches that a stateless module is built for.

    min: the smallest; a smaller one is refused. opt: the usual one, laid out when the engine is opened; others are when
    they first come. max: the largest; memory is planned for it.
    """

    min: int = 1
    opt: int = 1
    max: int = 64

    def __post_init__(self) -> None:
        check_int("profile max", self.max, 1, 1 << 20)
        check_int("profile min", self.min, 1, self.max)
        check_int("profile opt", self.opt, self.min, self.max)


@refuse_unknown(ConfigError)
@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How an engine is run. Nothing here changes the engine on disk.

    max_model_len: longest prompt plus output, in tokens; None takes the engine's.
    max_num_seqs: requests in flight at most.
    max_num_batched_tokens: tokens computed in one step at most, decodes and prefill chunks together.
    kv_cache_memory: bytes for the KV cache; None takes 60 % of what the memory limit leaves after the weights (on a GPU
        90 % of what its memory leaves).
    block_size: tokens in a KV block.
    enable_prefix_caching: reuse KV blocks of equal prefixes.
    policy: what happens when blocks run out: preempt by recompute, or admit only what surely fits.
    num_threads: compute threads, of each rank; None takes what CPU affinity and the cgroup quota leave.
    num_nodes: machines that the ranks of a model are on, as many on each. rendezvous: where those of other machines
        come to, "host:port", an address of this one.
    seed: makes unseeded sampling repeatable; None draws from the system.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_memory: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    policy: SchedulingPolicy = "max_utilization"
    num_threads: int | None = None
    num_nodes: int = 1
    rendezvous: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 2, 1 << 24)
        check_batch_limits(self.max_num_seqs, self.max_num_batched_tokens)
        if self.kv_cache_memory is not None:
            check_int("kv_cache_memory", self.kv_cache_memory, 1, 1 << 50)
        check_block_size("block_size", self.block_size)
        check_choice("policy", self.policy, ("max_utilization", "guaranteed_no_evict"))
        if self.num_threads is not None:
            check_int("num_threads", self.num_threads, 1, 1024)
        check_int("num_nodes", self.num_nodes, 1, 1024)
        if (self.num_nodes > 1) != (self.rendezvous is not None):
            raise ConfigError(
                f"num_nodes={self.num_nodes} with rendezvous={self.rendezvous!r}: several machines need one, "
                '"host:port", and one needs none'
            )
        if self.rendezvous is not None:
            host_and_port(self.rendezvous)
        if self.seed is not None:
            check_int("seed", self.seed, 0, (1 << 64) - 1)


@refuse_unknown(ConfigError)
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How an engine is served over HTTP.

    host, port: where to listen; port 0 takes a free one. Loopback unless told otherwise.
    api_key: what clients must send as a bearer token; None: nothing.
    served_model_name: what clients call the model; None: the model directory's own name.
    max_queue: requests accepted and unfinished at most; more are told to come back later.
    max_body_bytes: largest body of a request. max_body_bytes_in_all: of those that are being worked at.
    max_connections: open at once; more are told to come back later.
    drain_seconds: how long requests may still run after SIGTERM.
    stall_seconds: an engine with work that computes nothing for so long is unhealthy.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    max_queue: int = 1024
    max_body_bytes: int = 8 << 20
    max_body_bytes_in_all: int = 128 << 20
    max_connections: int = 1024
    drain_seconds: int = 30
    stall_seconds: int = 60

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise ConfigError(f"host must be a name or an address, not {self.host!r}; 0.0.0.0 listens everywhere")
        check_int("port", self.port, 0, (1 << 16) - 1)
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise ConfigError("api_key must be ASCII text that is not blank; its value is not shown here")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ConfigError(f"served_model_name must not be blank, as {self.served_model_name!r} is")
        check_int("max_queue", self.max_queue, 1, 1 << 20)
        check_int("max_body_bytes", self.max_body_bytes, 1 << 10, 1 << 30)
        check_int("max_body_bytes_in_all", self.max_body_bytes_in_all, self.max_body_bytes, 1 << 40)
        check_int("max_connections", self.max_connections, 1, 1 << 20)
        check_int("drain_seconds", self.drain_seconds, 0, 86400)
        check_int("stall_seconds", self.stall_seconds, 1, 86400)


def host_and_port(rendezvous: object) -> tuple[str, int]:
    """Both parts of "host:port". Raises `ConfigError` for anything else."""
    host, _, port = rendezvous.rpartition(":") if isinstance(rendezvous, str) else ("", "", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"rendezvous must be host:port, like 10.0.0.1:29500, not {rendezvous!r}")
    return host.strip("[]"), int(port)


def rendezvous_secret() -> bytes:
    """$TRITIUM_RENDEZVOUS_SECRET, by which ranks of several machines know each other. `ConfigError` without one."""
    secret = os.environ.get("TRITIUM_RENDEZVOUS_SECRET", "")
    if len(secret) < 16:
        raise ConfigError(
            f"$TRITIUM_RENDEZVOUS_SECRET has {len(secret)} characters: ranks of several machines know each other by "
            "it; set the same on all of them, 16 or more, `openssl rand -hex 16` for one"
        )
    return secret.encode()


def default_api_key() -> str | None:
    """$TRITIUM_API_KEY, which, unlike a flag, other users of the machine do not see in the list of processes."""
    return os.environ.get("TRITIUM_API_KEY") or None


def cache_dir() -> Path:
    """The user's cache directory for engines and compiled kernels: $TRITIUM_CACHE, else $XDG_CACHE_HOME/tritium."""
    if own := os.environ.get("TRITIUM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritium"


def compiler_command() -> str:
    """The C++ compiler to use for CPU kernels: $CXX, else g++. An empty $CXX means: use none."""
    return os.environ.get("CXX", "g++")


def cpu_level() -> str | None:
    """$TRITIUM_CPU_LEVEL: the instructions that CPU kernels may use (`kernels/cpu/isa.py`), None for all there are."""
    return os.environ.get("TRITIUM_CPU_LEVEL") or None


def available_threads() -> int:
    """CPUs this process may really use: its affinity, cut by $OMP_NUM_THREADS and its cgroups' CPU quotas."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for path in cgroups("cpu") if (quota := _cpu_quota(path)) is not None]
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # one number a nesting level; ours is the first
    asked = [int(wanted)] if wanted.isdecimal() else []
    return max(1, min([cpus, *map(math.ceil, quotas), *asked]))


def available_memory() -> int:
    """Bytes this process may still allocate: what the machine has free, cut by its cgroups' memory limits.

    Page cache counts as free, in a cgroup as in the machine: weights that were just read or written would otherwise
    make the KV cache small.
    """
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    rooms = [room for path in cgroups("memory") if (room := _memory_room(path)) is not None]
    return max(0, min([int(info["MemAvailable"].split()[0]) * 1024, *rooms]))


def cgroups(controller: str, proc: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """This process's cgroup directory for a controller and all above it: each may have a limit. Empty without any.

    In a container the path in /proc/self/cgroup may lie outside of what is mounted; what is mounted is then the limit.
    """
    try:
        lines = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        return []
    found = []
    for _, controllers, path in lines:
        if controllers == "" or controller in controllers.split(","):
            top = root / (controllers and controller)
            own = top / path.lstrip("/")
            found += [p for p in (own, *own.parents) if p.is_relative_to(top) and p.is_dir()]
    return found


def _cpu_quota(cgroup: Path) -> float | None:
    """CPUs: v2 `cpu.max` holds "quota period", v1 has a file for each; no limit is "max" or -1."""
    parts = _read(cgroup / "cpu.max") or f"{_read(cgroup / 'cpu.cfs_quota_us')} {_read(cgroup / 'cpu.cfs_period_us')}"
    quota, _, period = parts.partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _memory_room(cgroup: Path) -> int | None:
    """Bytes that may still be allocated in a cgroup (v2, else v1); None when it has no limit."""
    limit = _read(cgroup / "memory.max") or _read(cgroup / "memory.limit_in_bytes")
    used = _read(cgroup / "memory.current") or _read(cgroup / "memory.usage_in_bytes")
    if not limit.isdecimal() or not used.isdecimal() or int(limit) >= 1 << 60:
        return None
    stat = dict(line.split(" ", 1) for line in _read(cgroup / "memory.stat").splitlines() if " " in line)
    names = (
        ("total_inactive_file", "total_active_file")
        if "total_inactive_file" in stat
        else ("inactive_file", "active_file")
    )
    cached = sum(int(stat.get(name, "0")) for name in names)
    return int(limit) - max(0, int(used) - cached)


def _read(path: Path) -> str:
    """The file's text; empty when it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
