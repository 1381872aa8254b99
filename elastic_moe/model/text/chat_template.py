"""Chat templates: messages to the text that a model was trained on, in jinja2's sandbox.

Templates of published checkpoints count on the names that transformers gives them: special tokens,
`raise_exception`, `strftime_now`, `tojson`, and loop controls; `tools` and `documents` are None if
there are none.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from elastic_moe.errors import CheckpointError, RequestError
from elastic_moe.model.checkpoints.folder import read_json_if_there, read_text
from elastic_moe.routing import shorten

SETTINGS = "tokenizer_config.json"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A checkpoint's chat template.

    Attributes:
        source: the jinja2 text.
        special: text of special tokens by name, such as bos_token, where the checkpoint has them.
    """

    source: str
    special: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt text of a conversation.

        Args:
            variables: what else the template may look at, such as add_generation_prompt or tools.

        Raises:
            RequestError: the template refuses the messages, or fails on them.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # deferred: few uses need it

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            template = environment.from_string(self.source)
            names = {"tools": None, "documents": None, **self.special, **variables}
            return template.render(messages=list(messages), **names)
        except Exception as error:  # a template may fail in any way that an expression can
            raise RequestError(f"the chat template refused these messages: {error}.") from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """From a file of its own, as transformers 5 saves it, or from tokenizer_config.json.

    Raises:
        CheckpointError: a file cannot be read, or holds no text where it should.
    """
    settings = read_json_if_there(folder, SETTINGS)
    if (folder / "chat_template.jinja").exists():
        source: Any = read_text(folder, "chat_template.jinja")
    else:
        source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(
            f"{folder / SETTINGS}: chat_template must be text, or a list of named templates, "
            f"got {shorten(source)}."
        )
    return ChatTemplate(source, special_tokens(settings))


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Text of the special tokens that tokenizer_config.json names."""
    found = {}
    for name in _SPECIAL:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Unlike jinja2's own, it escapes no HTML: a prompt is no page."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
