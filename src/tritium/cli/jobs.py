"""The lines of `tritium run --input`: reading them, and which are done already in an earlier output file."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritium.errors import ConfigError, RequestError
from tritium.sampling_params import SamplingParams

Prompt = str | list[int]


@dataclass(frozen=True)
class Job:
    """One line: what to complete, and how. Either `prompt` or `messages` is set."""

    job_id: str
    prompt: Prompt | None
    messages: list[dict[str, Any]] | None
    params: SamplingParams


@dataclass(frozen=True)
class BadLine:
    """A line that is no job, and why."""

    job_id: str
    line_number: int
    error: RequestError


def read_jobs(path: Path, defaults: Mapping[str, Any]) -> Iterator[Job | BadLine]:
    """Each line of `path` in turn; empty ones are passed over. A line without an `id` has its number as one."""
    seen: set[str] = set()
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            job_id = str(number)
            try:
                fields = _fields(raw)
                job_id = _job_id(fields.pop("id", number))
                if job_id in seen:
                    raise RequestError(f"the id {job_id!r} was used on an earlier line")
                yield _job(job_id, fields, defaults)
            except RequestError as error:
                yield BadLine(job_id, number, error)
            seen.add(job_id)


def read_done(path: Path) -> set[str]:
    """The ids that an output file has answers for.

    Records of errors are removed from the file, so that those lines are tried again, and so is a last line cut off by a
    crash. The file is replaced in one step: killed at any time, every answer is still in it.
    """
    if not path.exists():
        return set()
    done = set()
    end, has_errors = 0, False
    try:
        with path.open("rb") as file:
            for raw in file:
                if raw.endswith(b"\n"):
                    entry = json.loads(raw)
                    job_id = entry["id"]
                    if "error" in entry:
                        has_errors = True
                    else:
                        done.add(job_id)
                    end += len(raw)
        os.truncate(path, end)
        if has_errors:
            _remove_errors(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not an output of `tritium run`; name a new file: {error!r}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read and written: {error}") from error
    return done


def _remove_errors(path: Path) -> None:
    """Replace the file by one without its records of errors."""
    path = path.resolve()
    descriptor, kept = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with path.open("rb") as old, open(descriptor, "wb") as new:
            new.writelines(raw for raw in old if "error" not in json.loads(raw))
            new.flush()
            os.fsync(new.fileno())
        shutil.copymode(path, kept)
        os.replace(kept, path)
    except BaseException:  # an interrupt too leaves no file beside the output
        os.unlink(kept)
        raise


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _fields(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the line must be a JSON object, not {type(fields).__name__}")
    return fields


def _job_id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RequestError(f"id must be text or an integer, not {value!r:.80}")
    return str(value)


def _job(job_id: str, fields: dict[str, Any], defaults: Mapping[str, Any]) -> Job:
    prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    if (prompt is None) == (messages is None):
        raise RequestError("a line needs either prompt or messages")
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise RequestError(f"prompt must be text or a list of token ids, not {prompt!r:.80}")
    return Job(job_id, prompt, messages, SamplingParams(**{**defaults, **fields}))
