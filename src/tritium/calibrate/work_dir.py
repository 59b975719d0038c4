"""What a calibration has done so far, on disk: finished layers are not computed again after an interruption.

WORK/key.json               what the results belong to: another checkpoint, text or method starts anew
WORK/results-<n>.safetensors  the calibration tensors of finished layers, in order
WORK/state.safetensors      the values that were live behind the last of them; the node's place stands in their names
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from tritium.calibrate.stream import Values

KEY, STATE = "key.json", "state.safetensors"


class WorkDir:
    """results: calibration tensors of finished layers, by name. None as the path: nothing is kept."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self.results = path, dict[str, Tensor]()
        self._num_files = 0
        if path is None:
            return
        path.mkdir(parents=True, exist_ok=True)
        if not (path / KEY).is_file() or json.loads((path / KEY).read_text()) != {"key": key}:
            for old in (*path.glob("results-*.safetensors"), path / STATE):
                old.unlink(missing_ok=True)
            (path / KEY).write_text(json.dumps({"key": key}))
        while (file := self._file(self._num_files)).is_file():
            self.results |= load_file(file)
            self._num_files += 1

    def add(self, results: Mapping[str, Tensor], place: int, values: Values) -> None:
        """Keep a finished layer: what it gave, and the values (one tensor a window) behind the node at `place`."""
        self.results |= results
        if self._path is None:
            return
        self._write(self._file(self._num_files), results)
        self._num_files += 1
        state: dict[str, Tensor] = {}
        for node, tensors in values.items():
            if node.op == "call_function":
                if not all(isinstance(tensor, Tensor) for tensor in tensors):
                    return  # the next start computes the layers' values again, with their results as they are
                state |= {f"{place} {node.name} {i}": tensor for i, tensor in enumerate(tensors)}
        self._write(self._path / STATE, state)

    def resume(self, graph: fx.Graph) -> tuple[int, Values]:
        """Where to go on: the place behind the last finished layer, and the values there."""
        if self._path is None or not (self._path / STATE).is_file():
            return 0, {}
        nodes = {node.name: node for node in graph.nodes}
        values: Values = {}
        place = 0
        for name, tensor in sorted(load_file(self._path / STATE).items(), key=lambda item: int(item[0].split()[2])):
            at, node, _ = name.split()
            values.setdefault(nodes[node], []).append(tensor)
            place = int(at) + 1
        return place, values

    def _file(self, number: int) -> Path:
        assert self._path is not None
        return self._path / f"results-{number:04}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        partial = path.with_suffix(".partial")
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, partial
        )
        partial.replace(path)
