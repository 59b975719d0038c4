"""The peer llama.cpp, by the C functions that its Python package exports: batches over sequences, greedy.

Its own batch sizes (2,048 and 512) and defaults: weights mapped, repacked where it has a kernel for it, f16 KV cache.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import side

BATCH, MICRO_BATCH, MAX_SEQUENCES = 2048, 512, 32


class Llama:
    """A format is a GGUF file's."""

    def __init__(self, model: Path, form: str, threads: int) -> None:
        import llama_cpp as c  # noqa: PLC0415 - a part of loading

        self._c, self._path = c, model.parent / f"llama-{form}.gguf"
        c.llama_backend_init()
        self._log = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        self._model = c.llama_model_load_from_file(str(self._path).encode(), c.llama_model_default_params())
        options = c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = side.CONTEXT, BATCH, MICRO_BATCH
        options.n_seq_max, options.n_threads, options.n_threads_batch = MAX_SEQUENCES, threads, threads
        options.kv_unified = True
        self._context = c.llama_init_from_model(self._model, options)
        self._batch = c.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting = [(t, p, s, p == len(ids) - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)]
        for start in range(0, len(waiting), BATCH):
            self._step(waiting[start : start + BATCH], outputs)
        for i in range(1, length):
            last = [(outputs[s][-1], len(ids) + i - 1, s, True) for s, ids in enumerate(prompts)]
            self._step(last, outputs)
        return outputs

    def logits(self, tokens: list[int]) -> Any:
        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        self._decode([(token, position, 0, True) for position, token in enumerate(tokens)])
        return np.stack([self._row(i) for i in range(len(tokens))])

    def describe(self) -> dict[str, Any]:
        size = self._path.stat().st_size
        system = self._c.llama_print_system_info().decode()
        return {"version": self._c.__version__, "weight_file_bytes": size, "system": system}

    def _step(self, rows: list[tuple[int, int, int, bool]], outputs: list[list[int]]) -> None:
        """rows: token, position, sequence, whether the next token is wanted."""
        self._decode(rows)
        for i, (_, _, sequence, is_wanted) in enumerate(rows):
            if is_wanted:
                outputs[sequence].append(int(self._row(i).argmax()))

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, is_wanted
        failed = self._c.llama_decode(self._context, batch)
        assert failed == 0, f"llama_decode returned {failed}"

    def _row(self, index: int) -> Any:
        logits = self._c.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(logits, (side.VOCAB_SIZE,))


if __name__ == "__main__":
    side.run(Llama)
