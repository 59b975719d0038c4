"""What a command says, and where: results on standard output, everything else on standard error."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from tritium.errors import TritiumError


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def say_config(config: Mapping[str, Any], *, is_json: bool) -> None:
    """The configuration a command resolved, one aligned line each; in JSON it is part of the result instead."""
    if not is_json:
        width = max(map(len, config))
        for name, value in config.items():
            say(f"{name:<{width}}  {value}")


def print_json(result: Mapping[str, Any]) -> None:
    """The one JSON object of a command with --json."""
    print(json.dumps(result, default=str, ensure_ascii=False), flush=True)


@contextmanager
def reporting(*, is_json: bool) -> Iterator[None]:
    """Run a command: its log goes to standard error; a designed error, or the system's, is one line and exit code 1."""
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("tritium")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if is_json else logging.INFO)
    try:
        yield
    except TritiumError as error:
        fail(error, is_json=is_json)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        sys.exit(141)
    except OSError as error:  # a full disk, a directory that may not be written: the text names the file
        fail(error, is_json=is_json)
    finally:
        logger.removeHandler(handler)


def fail(error: TritiumError | OSError, *, is_json: bool) -> NoReturn:
    """End the process for this error."""
    if is_json:
        print_json({"error": error_record(error)})
    say(f"error: {error}")
    sys.exit(1)


def error_record(error: BaseException) -> dict[str, str]:
    """An error as JSON: its class and its text."""
    return {"type": type(error).__name__, "message": str(error)}
