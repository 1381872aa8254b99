"""From what a caller passes to checked requests: prompts, sampling parameters, output formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic_moe_kernels.arrays import array, is_array
from elastic_moe_kernels.constants import BLOCK_POSITIONS

from elastic_moe.config import Routing, resolve_routing
from elastic_moe.engine.generation.detokenizer import Detokenizer
from elastic_moe.engine.generation.sampler import Sampler
from elastic_moe.engine.generation.structured_output import StructuredOutput
from elastic_moe.engine.request import OutputQueue, Request
from elastic_moe.engine.running.runner import ModelRunner
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.engine.scheduling.block_manager import pages_for
from elastic_moe.errors import ContextLengthError, RequestError
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.routing import Subnet
from elastic_moe.routing.checks import as_index, shorten


class InputProcessor:
    """Makes the requests of one engine; safe from any thread.

    Args:
        num_blocks: blocks of keys and values that the cache has.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, num_blocks: int) -> None:
        self._config, self._block_bytes = runner.config, runner.block_bytes
        self._tokenizer, self._num_blocks = tokenizer, num_blocks
        self._structured_output = StructuredOutput(tokenizer, runner.config.vocab_size)

    def requests(
        self, prompt: Any, routing: Any, sampling: Any, outputs: OutputQueue, *, batch: bool
    ) -> list[Request]:
        """The requests of one call: of a prompt, or of each prompt of a batch.

        Raises:
            RoutingError: the model has no such sub-network.
            RequestError: a prompt or a value cannot be served, or lists differ in length.
            ContextLengthError: prompt and max_tokens exceed the model's positions.
        """
        inputs = pair(prompt, routing, sampling) if batch else [(prompt, routing, sampling)]
        return [self._request(*item, outputs, index) for index, item in enumerate(inputs)]

    def token_ids(self, prompt: object, new_tokens: int = 0) -> list[int]:
        """The ids of one prompt, text or ids, that `new_tokens` are to follow.

        Raises:
            RequestError: it is no prompt, is empty, or has an id that the model does not know.
            ContextLengthError: they exceed the model's positions.
        """
        limit, vocab_size = self._config.max_positions, self._config.vocab_size
        given = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = check_token_ids(given, vocab_size)
        if len(ids) + new_tokens > limit:
            raise ContextLengthError(len(ids), new_tokens, limit)
        return ids

    def _request(
        self, prompt: Any, routing: Routing, params: Any, outputs: OutputQueue, index: int
    ) -> Request:
        subnet = resolve_routing(self._config.shape, routing)
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling must be a SamplingParams, got {type(params).__name__}.")
        ids = self.token_ids(prompt, params.max_tokens)
        self._check_blocks(len(ids) + params.max_tokens, subnet)
        forced = self._forced(params)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
        self._check_vocabulary("logit_bias", list(params.logit_bias or ()))
        tokenizer = self._tokenizer.showing(params.shown_token_ids)
        end_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= self._tokenizer.eos_ids
        request = Request(ids, subnet, params, outputs, index)
        for choice, grammar in enumerate(self._structured_output.grammars(params)):
            request.add_sequence(
                Sampler(
                    params,
                    ids,
                    choice,
                    end_ids,
                    self._config.vocab_size,
                    grammar=grammar,
                    forced=forced,
                ),
                Detokenizer(tokenizer, params.stop),
                end_ids,
                None if forced is None else len(forced),
            )
        return request

    def _check_blocks(self, tokens: int, subnet: Subnet) -> None:
        """Raise `RequestError` if the cache can never hold so many tokens."""
        needed, available = pages_for(tokens) * subnet.depth, self._num_blocks
        if needed > available:
            raise RequestError(
                f"{tokens} tokens in {subnet.depth} layers take {needed} blocks of keys and "
                f"values, and the cache has {available} ({BLOCK_POSITIONS} tokens of one layer "
                f"each). Ask for fewer tokens or layers, or make the engine with kv_cache_bytes of "
                f"at least {needed * self._block_bytes}."
            )

    def _forced(self, params: SamplingParams) -> list[int] | None:
        text = params.forced_text
        if text is None:
            return None
        if isinstance(text, str):
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if not ids:
                raise RequestError(f"forced_text {shorten(text)} has no tokens.")
            return ids
        self._check_vocabulary("forced_text", text)
        return list(text)

    def _check_vocabulary(self, field: str, ids: Sequence[int]) -> None:
        vocab_size = self._config.vocab_size
        for token in ids:
            if token >= vocab_size:
                raise RequestError(
                    f"{field} has token id {token}, ids must be in [0, {vocab_size})."
                )


def is_batch(prompt: object) -> bool:
    """Whether this is a list of prompts. What begins with a number is one prompt's ids."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes, bytearray)):
        return False
    return not prompt or isinstance(prompt[0], (str, Sequence)) or is_array(prompt[0])


def check_token_ids(prompt: object, vocab_size: int) -> list[int]:
    """The ids of one prompt: a list, or a 1-D array or tensor of integers.

    Raises:
        RequestError: it is something else, is empty, or has an id that the model does not know.
    """
    values = array(prompt).tolist() if is_array(prompt) else prompt
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


def pair(prompts: Sequence[Any], routing: Any, sampling: Any) -> list[tuple[Any, Any, Any]]:
    """(prompt, routing, sampling) for each prompt; the latter are for all prompts, or lists.

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
