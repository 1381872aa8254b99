"""transformers: transformers_model.py FOLDER. Runs under build/peers."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.peers.contestants.worker import Ids, model_handlers, serve


class Transformers:
    """Only the last row's logits; keys and values are kept only where tokens follow."""

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.eval()
        self.cache: Any = None

    def start(self, contexts: Ids, keep: bool) -> np.ndarray:
        with torch.inference_mode():
            out = self.model(torch.tensor(contexts), use_cache=keep, logits_to_keep=1)
        self.cache = out.past_key_values
        return last_logits(out.logits)

    def decode(self, ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            out = self.model(
                torch.tensor(ids).unsqueeze(1),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return last_logits(out.logits)

    def choose(self, experts: str) -> None:
        self.model.set_experts_implementation(experts)
        got = self.model.config._experts_implementation
        if got != experts:
            raise SystemExit(f"transformers runs {got!r} experts, not {experts!r}")


def last_logits(logits: torch.Tensor) -> np.ndarray:
    """(S, V) of (S, T, V)."""
    return logits[:, -1].float().numpy()


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    contestant = Transformers(sys.argv[1], torch.bfloat16)
    handlers = model_handlers(contestant)

    def with_experts(handler: Callable[..., Any]) -> Callable[..., Any]:
        def call(experts: str, **request: Any) -> Any:
            contestant.choose(experts)
            return handler(**request)

        return call

    def float32_logits(**request: Any) -> None:
        """As `logits`, of the same weights without rounding: what all contestants approximate."""
        exact = Transformers(sys.argv[1], torch.float32)
        exact.choose("eager")
        model_handlers(exact)["logits"](**request)
        del exact
        gc.collect()

    serve(
        {name: with_experts(handler) for name, handler in handlers.items()}
        | {"float32_logits": float32_logits},
        {"torch": torch.__version__, "transformers": transformers.__version__},
    )


main()
