"""The markers that models write around tool calls, as their chat templates show."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.model.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Markers:
    """Texts around calls.

    Attributes:
        start: before a call, or a list of calls, in JSON: {"name": ..., "arguments": {...}}.
        end: after it; may be empty.
    """

    start: str
    end: str


HERMES = Markers("<tool_call>", "</tool_call>")  # also Qwen, ERNIE and the bundled model
MISTRAL = Markers("[TOOL_CALLS]", "")


def find_markers(tokenizer: Tokenizer) -> Markers | None:
    """The markers in a model's chat template; None if it has none."""
    source = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
    return next((markers for markers in (MISTRAL, HERMES) if markers.start in source), None)


def marker_token_ids(tokenizer: Tokenizer, markers: Markers | None) -> tuple[int, ...]:
    """Special tokens that are markers: generated text must keep these."""
    texts = () if markers is None else (markers.start, markers.end)
    ids = (tokenizer.fast.token_to_id(text) for text in texts if text)
    return tuple(token for token in ids if token in tokenizer.special_ids)
