"""llama.cpp: llama_cpp_model.py FILE.gguf THREADS. Runs under build/peers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import llama_cpp as llama
import numpy as np

from benchmarks.peers.contestants.worker import Ids, model_handlers, serve


class LlamaCpp:
    """Logits of the last row of each sequence."""

    def __init__(self, path: str, threads: int) -> None:
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(path.encode(), model_params)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 4096, 2048, 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = 16
        params.kv_unified = True
        self.context = llama.llama_init_from_model(self.model, params)
        self.memory = llama.llama_get_memory(self.context)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(2048, 0, 1)
        self.length = 0

    def start(self, contexts: Ids, keep: bool) -> np.ndarray:  # noqa: ARG002  (always keeps)
        llama.llama_memory_clear(self.memory, True)
        self.length = 0
        return self._run(contexts)

    def decode(self, ids: Sequence[int]) -> np.ndarray:
        return self._run([[token] for token in ids])

    def _run(self, ids: Ids) -> np.ndarray:
        batch, i = self.batch, 0
        for sequence, tokens in enumerate(ids):
            for offset, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, self.length + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = offset == len(tokens) - 1
                i += 1
        batch.n_tokens = i
        self.length += len(ids[0])
        status = llama.llama_decode(self.context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode failed with status {status}")
        logits = llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (len(ids), self.vocab))


def main() -> None:
    contestant = LlamaCpp(sys.argv[1], int(sys.argv[2]))
    serve(model_handlers(contestant), {"llama_cpp_python": llama.__version__})


main()
