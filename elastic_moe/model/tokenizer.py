"""Text to token ids and back, and chat messages to the text that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from elastic_moe.errors import CheckpointError, RequestError


class Tokenizer:
    """The tokenizer of a checkpoint folder, with the special ids that its neighbours name."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        config = _read_json(folder / "config.json")
        self.bos_id: int | None = config.get("bos_token_id")
        self.eos_ids: frozenset[int] = _ids(config.get("eos_token_id"))
        self.pad_id: int | None = config.get("pad_token_id")
        self.chat_template = _chat_template(folder)

    @property
    def vocab_size(self) -> int:
        return self.fast.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, behind BOS where there is one. Markers such as <|im_end|> are parsed."""
        ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A decoder that is fed token by token."""
        return TextStream(self.fast, prompt)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of a conversation, by the checkpoint's chat template in a sandbox."""
        if self.chat_template is None:
            raise RequestError("this checkpoint has no chat template. Send a plain prompt.")
        from jinja2 import TemplateError  # deferred: most uses need no template
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:  # TypeError: a message's content is no text
            raise RequestError(f"the chat template refused these messages: {error}.") from error


class TextStream:
    """Turns ids into text as they come, holding back bytes until they are whole characters."""

    def __init__(self, fast: FastTokenizer, prompt: Sequence[int]) -> None:
        self._fast = fast
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """The text that this token completes; '' while a character is incomplete."""
        return self._stream.step(self._fast, token_id) or ""


def _chat_template(folder: Path) -> str | None:
    """From a file of its own, as transformers 5 saves it, or from tokenizer_config.json."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    template: str | None = _read_json(folder / "tokenizer_config.json").get("chat_template")
    return template


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}.")
    return data
