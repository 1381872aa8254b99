"""Structured output: grammars of JSON that a schema allows, token by token, through llguidance."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.errors import EngineError, RequestError
from elastic_moe.model.text.tokenizer import Tokenizer

# As json.dumps writes it: small models lose themselves in white space that is free.
_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class StructuredOutput:
    """Compiles grammars for one tokenizer.

    Args:
        vocab_size: of the model; the tokenizer may know fewer tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._llguidance_tokenizer: Any = None

    def grammars(self, params: SamplingParams) -> list[JsonGrammar | None]:
        """A grammar for each choice; None where the output is free.

        Raises:
            RequestError: the schema cannot be followed.
            EngineError: the model has no end token.
        """
        if params.json_schema is None and not params.json_object:
            return [None] * params.n
        schema = str(params.json_schema or json.dumps({"type": "object"}))  # a text: it was read
        import llguidance  # deferred: only JSON needs it

        if self._llguidance_tokenizer is None:
            self._llguidance_tokenizer = self._read_tokenizer(llguidance)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
        except ValueError as error:
            raise RequestError(f"json_schema cannot be followed: {error}") from error
        matcher = llguidance.LLMatcher(self._llguidance_tokenizer, grammar, log_level=0)
        if matcher.is_error():
            first = matcher.get_error().strip().splitlines()[0]
            raise RequestError(f"json_schema cannot be followed: {first}")
        return [JsonGrammar(matcher.deep_copy(), self._vocab_size) for _ in range(params.n)]

    def _read_tokenizer(self, llguidance: Any) -> Any:
        ends = sorted(self._tokenizer.eos_ids)
        if not ends:
            raise EngineError("JSON mode needs a model with an end token; this one names none.")
        return llguidance.LLTokenizer(
            self._tokenizer.fast.to_str(), n_vocab=self._vocab_size, eos_token=ends
        )


class JsonGrammar:
    """One choice's state in its grammar: a `sampler.Grammar`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> NDArray[np.uint32]:
        """(ceil(V / 32),) a bit for each token that may come; see `sampler.Grammar`."""
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        self._check()
        return np.pad(words, (0, max(0, -(-self._vocab_size // 32) - len(words))))

    def accept(self, token: int) -> None:
        """Advance by a token that was sampled."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"json_schema cannot be followed: {self._matcher.get_error():.200}")
