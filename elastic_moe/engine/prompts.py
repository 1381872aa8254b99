"""What a caller may pass as a prompt, told apart and checked: no tensors are made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from elastic_moe.errors import RequestError
from elastic_moe.routing.checks import as_index, shorten

Request = tuple[Any, Any, Any]  # prompt, routing, sampling


def is_batch(prompt: object) -> bool:
    """Whether this is a list of prompts. What begins with a number is one prompt's ids."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes, bytearray)):
        return False
    return not prompt or isinstance(prompt[0], (str, Sequence, np.ndarray, Tensor))


def token_ids(prompt: object, vocab_size: int) -> list[int]:
    """The ids of one prompt: a list, or a 1-D array or tensor of integers.

    Raises:
        RequestError: it is something else, is empty, or has an id that the model does not know.
    """
    values = prompt.tolist() if isinstance(prompt, (np.ndarray, Tensor)) else prompt
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        raise RequestError(
            f"a prompt must be text or a list of token ids, got {type(prompt).__name__} "
            f"{shorten(prompt)}."
        )
    if not values:
        raise RequestError("the prompt has no tokens; at least 1 is needed.")
    ids = []
    for position, value in enumerate(values):
        token = as_index(value)
        if token is None or not 0 <= token < vocab_size:
            raise RequestError(
                f"token {position} of the prompt is {shorten(value)}; "
                f"ids must be integers in [0, {vocab_size})."
            )
        ids.append(token)
    return ids


def pair(prompts: Sequence[Any], routing: Any, sampling: Any) -> list[Request]:
    """A request for each prompt; routing and sampling are for all of them, or lists.

    Raises:
        RequestError: a list is not as long as the prompts'.
    """
    return list(
        zip(
            prompts,
            _per_prompt("routing", routing, len(prompts)),
            _per_prompt("sampling", sampling, len(prompts)),
            strict=True,
        )
    )


def _per_prompt(field: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{field} lists {len(value)} values for {count} prompts.")
    return list(value)
