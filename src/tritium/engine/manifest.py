"""`manifest.json`: what an engine directory is, what it was built from, and the hash of each of its files.

It is the first file read and the last one written. Reading it never trusts it: a wrong type, a newer version, a file
that is missing or changed is an `EngineError` that names the file and says what to do.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from tritium.engine.plan import PlanKind
from tritium.errors import EngineError

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
TACTICS_NAME = "tactics.json"
FORMAT = "tritium-engine"
HASH_ALWAYS_BELOW = 32 << 20  # bytes; larger files are hashed only on request: 16 GB of weights would take 10 s


CalibrationKind = Literal["vectors", "numbers"]


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the engine: its size in bytes and its sha256 in hex."""

    size: int
    sha256: str


class EncoderInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an encoder's outputs mean.

    pooling, is_normalized: how token embeddings become one embedding, unless a caller says otherwise.
    labels: what scores stand for; none for embeddings. score_activation: what makes scores probabilities.
    num_token_types: token types are below it.
    """

    pooling: Literal["cls", "mean", "last", "pooler"] = "cls"
    is_normalized: bool = True
    labels: tuple[str, ...] = ()
    score_activation: Literal["softmax", "sigmoid", "identity"] = "softmax"
    num_token_types: int = 1


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a person, or a runtime, has to know of an engine before it opens anything else.

    backend: the kernels it was lowered for. model: name, architecture and source, for people.
    calibration: what the weights owe to a text beside the checkpoint: "vectors" by which they are scaled and rounded,
        or "numbers", the weights themselves, which new weights cannot be put through.
    kind: "decoder" generates text; "encoder" embeds or classifies it; "module" is stateless.
    max_model_len: longest prompt plus output in tokens.
    profile: a module's smallest, usual and largest batch. eos_token_ids: ids that end an output.
    dummy_seed: weights without a file are generated from it; None: every weight is in `weights.safetensors`.
    weights_generation: how often the weights were replaced since the build; weights_source: by what, for people.
    ignored_tensors: of the checkpoint it was built from, those that no weight reads.
    plugins: by name, the version of each plugin that the plan needs.
    build: the resolved BuildConfig. timings: seconds by stage of the build. matches: places changed, by pass.
    mapping: the ranks that share the model and which of them this engine is for; empty: it is whole.
    versions: of tritium, torch. files: every other file of the directory.
    """

    format: str = FORMAT
    version: int = MANIFEST_VERSION
    backend: str
    model: dict[str, str]
    dtype: str
    scheme: str | None = None
    calibration: CalibrationKind | None = None
    invariance: str = "bitwise"
    kind: PlanKind = "decoder"
    profile: dict[str, int] | None = None
    encoder: EncoderInfo | None = None
    max_model_len: int = 0
    vocab_size: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dummy_seed: int | None = None
    weights_generation: int = 0
    weights_source: str = ""
    ignored_tensors: tuple[str, ...] = ()
    plugins: dict[str, str] = {}
    mapping: dict[str, int] = {}
    build: dict[str, Any] = {}
    timings: dict[str, float] = {}
    matches: dict[str, int] = {}
    versions: dict[str, str] = {}
    files: dict[str, FileRecord] = {}

    @property
    def is_calibration_stale(self) -> bool:
        """True when the weights are others than those that the calibration looked at."""
        return self.calibration is not None and self.weights_generation > 0


def record(path: Path) -> FileRecord:
    """Size and sha256 of the file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return FileRecord(size=size, sha256=digest.hexdigest())


def encode(manifest: Manifest) -> bytes:
    """The manifest as people read it: indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def rank_directory(path: str | Path, rank: int = 0) -> Path:
    """Where a rank's engine is in the directory of all ranks; `path` itself when it is no such directory."""
    own = Path(path) / f"rank-{rank}"
    return own if _is_one(own) else Path(path)


def rank_directories(path: Path, manifest: "Manifest") -> list[Path]:
    """Where the engines of all ranks are that share this one's model: beside it, or only itself, built alone."""
    num_ranks, rank = manifest.mapping.get("tensor_parallel", 1), manifest.mapping.get("rank", 0)
    found = [path.absolute().parent / f"rank-{other}" for other in range(num_ranks)]
    return found if found[rank] == path.absolute() and all(map(_is_one, found)) else [path.absolute()]


def is_engine(path: str | Path) -> bool:
    """True for the directory of an engine, or of all ranks of one, be it damaged; not for what else has a
    `manifest.json`, as web pages do."""
    return _is_one(rank_directory(path))


def _is_one(path: str | Path) -> bool:
    manifest = Path(path) / MANIFEST_NAME
    if not manifest.is_file():
        return False
    return manifest.with_name(PLAN_NAME).is_file() or FORMAT.encode() in manifest.read_bytes()


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`. Raises `EngineError`; looks at no other file."""
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise EngineError(f"{directory} is not a directory: expected an engine made by `tritium build`")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise EngineError(f"{path} is missing: {directory} is not an engine; make one with `tritium build`") from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error}") from error
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} is damaged ({error}): build the engine again") from None
    _check_identity(path, raw)
    try:
        return msgspec.convert(raw, Manifest, strict=True)
    except msgspec.ValidationError as error:
        raise EngineError(f"{path} is damaged ({error}): build the engine again") from None


def _check_identity(path: Path, raw: object) -> None:
    """Format and version first: a newer manifest may have other fields, and should say so rather than 'damaged'."""
    if not isinstance(raw, Mapping) or raw.get("format") != FORMAT:
        raise EngineError(f"{path} is not the manifest of a Tritium engine (its format is not {FORMAT!r})")
    version = raw.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise EngineError(f"{path} is damaged (version is {version!r}): build the engine again")
    if version > MANIFEST_VERSION:
        raise EngineError(
            f"{path} has engine version {version}; this Tritium reads up to {MANIFEST_VERSION}: "
            "update Tritium, or build the engine again with this one"
        )


def check_files(directory: Path, manifest: Manifest, *, verify: bool) -> None:
    """Check that each recorded file is there, whole, and (small ones always, all with `verify`) has its hash.

    Raises `EngineError` that names the file and what is wrong with it.
    """
    for name, expected in manifest.files.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise EngineError(f"{directory / MANIFEST_NAME} names a file outside the engine: {name!r}; do not use it")
        path = directory / name
        if not path.is_file():
            raise EngineError(f"{path} is missing: the engine is incomplete; build or copy it again")
        size = path.stat().st_size
        if size != expected.size:
            kind = "truncated" if size < expected.size else "damaged"
            raise EngineError(
                f"{path} is {kind}: {size} bytes, the manifest says {expected.size}; build or copy the engine again"
            )
        if (verify or size < HASH_ALWAYS_BELOW) and record(path).sha256 != expected.sha256:
            raise EngineError(f"{path} is damaged: its sha256 is not the manifest's; build or copy the engine again")
