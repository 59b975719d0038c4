"""`tritium cache`: the engines that were built on first use."""

import datetime
import time
from typing import Any

from tritium.cli.report import print_json, say
from tritium.engine.cache import CachedEngine, cached_engines, engines_dir, remove


def run(*, action: str, is_json: bool, days: int = 0) -> None:
    """List the cache, or remove what was not used for `days`."""
    found = cached_engines()
    if action == "prune":
        found = [entry for entry in found if time.time() - entry.last_used >= days * 86_400]
        for entry in found:
            remove(entry.path)
    total = sum(entry.num_bytes for entry in found)
    name = "removed" if action == "prune" else "engines"
    if is_json:
        print_json({"cache": str(engines_dir()), name: [_record(entry) for entry in found], "bytes": total})
        return
    say(f"cache  {engines_dir()}")
    for entry in found:
        used = datetime.datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        print(f"{entry.num_bytes / 1e6:>10.1f} MB  {used}  {entry.path.name}")
    say(f"{len(found)} engine{'s' * (len(found) != 1)} {'removed, ' if action == 'prune' else ''}{total / 1e6:.1f} MB")


def _record(entry: CachedEngine) -> dict[str, Any]:
    return {"path": str(entry.path), "bytes": entry.num_bytes, "last_used": entry.last_used}
