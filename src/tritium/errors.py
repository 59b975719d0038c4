"""Every exception Tritium raises on purpose.

    TritiumError
    ├── ConfigError            a configuration value is unknown, out of range or contradicts another
    ├── CheckpointError        a model directory is incomplete, damaged or of the wrong shape
    │   └── UnsupportedModel   the architecture, or a feature of it, has no row in the model table
    ├── CaptureError           a model could not become a graph; names the node
    ├── EngineError            an engine directory is missing, damaged, foreign or of another version
    │   └── EngineUnavailable  the process that runs the engine has ended and is started again
    ├── KernelError            no kernel can run a step, or the compiled library could not be built
    ├── OutOfMemory            weights, arena or KV cache do not fit; carries the numbers
    └── RequestError           one request is invalid; nobody else is affected
        └── RequestTooLarge    the request could never fit; carries the numbers

A message names the offending thing, shows its value and says what to do.
"""


class TritiumError(Exception):
    """Base of every error Tritium raises on purpose."""


class ConfigError(TritiumError, ValueError):
    """A configuration value is unknown, out of range or contradicts another."""


class CheckpointError(TritiumError):
    """A model directory is incomplete, damaged, or its tensors have the wrong shape."""


class UnsupportedModel(CheckpointError):
    """The architecture, or a feature it asks for, has no row in the model table."""


class CaptureError(TritiumError):
    """A model could not be turned into a graph; the message names the node."""


class EngineError(TritiumError):
    """An engine directory is missing, damaged, foreign or of another version."""


class EngineUnavailable(EngineError):
    """The process that runs an engine has ended and is started again: what it was computing is lost."""


class KernelError(TritiumError):
    """No kernel can run a step, or the compiled kernel library could not be built."""


class OutOfMemory(TritiumError, MemoryError):
    """Weights, arena or KV cache do not fit in the memory that was allowed."""


class RequestError(TritiumError, ValueError):
    """One request is invalid; the engine and its neighbours are not affected."""


class RequestTooLarge(RequestError):
    """The request could never be scheduled, however long it waited."""
