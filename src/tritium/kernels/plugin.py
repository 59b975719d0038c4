"""Plugins: ops, kernels and spellings of a user's own, given to `build` and `LLM` as one value.

Nothing is registered anywhere: a plugin counts where it is passed. An engine that was built with one names it and is
refused without it; it never causes an import.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module

from tritium import ops
from tritium.errors import ConfigError
from tritium.kernels.kernel import Kernel
from tritium.ops.op import Op

RESERVED = ("aten", "cpu", "eager", "gpu", "tritium")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """name: a lower-case identifier, which engines keep; version: what an engine was built with must be given again.

    ops: new ops; their spellings are the patterns by which the compiler finds them in a model. In a plan an op is
        called `<plugin>.<op>`. Each needs a row among `kernels` for every backend that it shall run on.
    kernels: rows like those of `kernels/table.py`, tried before them: `op` is one of the plugin's, or one of Tritium's,
        which then has one more kernel. A kernel's name begins with `<plugin>.`.

    A wrong value is a `ConfigError`.
    """

    name: str
    version: str = "1"
    ops: tuple[Op, ...] = ()
    kernels: tuple[Kernel, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", self.name):
            raise ConfigError(f"a plugin's name must be a lower-case identifier, not {self.name!r}")
        if self.name in RESERVED:
            raise ConfigError(f"a plugin cannot be named {self.name!r}: Tritium's own names begin so")
        own, built_in = [op.name for op in self.ops], {op.name for op in ops.OPS}
        for kernel in self.kernels:
            if not kernel.name.startswith(f"{self.name}."):
                raise ConfigError(f"plugin {self.name}: kernel {kernel.name!r} must be named '{self.name}.<something>'")
            if kernel.op not in {*own, *built_in}:
                raise ConfigError(
                    f"plugin {self.name}: kernel {kernel.name!r} implements {kernel.op!r}, which is neither an op of "
                    f"its own ({', '.join(own) or 'it has none'}) nor one of Tritium's ({', '.join(sorted(built_in))})"
                )
        for op in self.ops:
            if own.count(op.name) > 1 or op.name in built_in:
                raise ConfigError(f"plugin {self.name}: two ops, or one and one of Tritium's, are named {op.name!r}")
            if all(kernel.op != op.name for kernel in self.kernels):
                raise ConfigError(f"plugin {self.name}: op {op.name!r} has no kernel: add a row to its kernels")

    def full_name(self, op: str) -> str:
        """An op as plans name it: `<plugin>.<op>` for the plugin's own."""
        return f"{self.name}.{op}" if any(own.name == op for own in self.ops) else op


def kernel_rows(plugins: Sequence[Plugin]) -> tuple[Kernel, ...]:
    """The kernels of plugins, with the names that plans give to ops."""
    return tuple(replace(kernel, op=plugin.full_name(kernel.op)) for plugin in plugins for kernel in plugin.kernels)


def plugin_ops(plugins: Sequence[Plugin]) -> dict[str, Op]:
    """The ops of plugins, by the names that plans give them."""
    return {plugin.full_name(op.name): op for plugin in plugins for op in plugin.ops}


def load_plugins(given: Sequence[Plugin | str]) -> tuple[Plugin, ...]:
    """The plugins themselves; text is "module:name" and is imported: only what a user has asked for comes here.

    Raises `ConfigError` when there is no such module or name, when it is no plugin, or when two have one name.
    """
    if isinstance(given, (str, Plugin)) or not isinstance(given, Sequence):
        raise ConfigError(f"plugins must be a list of Plugin objects or 'module:name' texts, not {given!r:.100}")
    plugins = tuple(_load(one) for one in given)
    names = [plugin.name for plugin in plugins]
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"plugins: two are named {double[0]!r}")
    return plugins


def _load(given: Plugin | str) -> Plugin:
    if isinstance(given, Plugin):
        return given
    module, colon, name = given.partition(":") if isinstance(given, str) else ("", "", "")
    if not (module and colon and name):
        raise ConfigError(f"plugin {given!r} must be a Plugin or 'module:name', e.g. my_package.kernels:PLUGIN")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"plugin {given!r} cannot be loaded: {error}. Is it installed, or on PYTHONPATH?") from error
    if not isinstance(found, Plugin):
        raise ConfigError(f"plugin {given!r} is a {type(found).__name__}, not a tritium.Plugin")
    return found
