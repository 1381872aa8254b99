"""Text to token ids and back, and chat messages to the text that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from elastic_moe.errors import CheckpointError, ElasticMoEError, RequestError
from elastic_moe.model.checkpoints.folder import CONFIG, file_in, read_json_if_there, read_text
from elastic_moe.model.text.chat_template import read_chat_template
from elastic_moe.model.text.token_bytes import TokenBytes
from elastic_moe.routing import shorten

MAX_TOKENIZER_BYTES = 128 << 20  # the largest seen are under 40 MiB


class Tokenizer:
    """The tokenizer of a checkpoint folder, with the special ids that its neighbours name.

    Attributes:
        bos_id, pad_id: as generation_config.json says, else config.json.
        eos_ids: ids that end a text, from the same files.
        prefix: the ids that `encode` puts before every text, such as BOS; often none.
    """

    def __init__(self, folder: Path) -> None:
        text = read_text(folder, "tokenizer.json", MAX_TOKENIZER_BYTES)
        path = file_in(folder, "tokenizer.json")
        with _typed(CheckpointError, f"{path} cannot be read"):
            self.fast = FastTokenizer.from_str(text)
            # A prompt is neither cut nor filled up, whatever the file was saved with.
            self.fast.no_truncation()
            self.fast.no_padding()
            self.prefix = _prefix(self.fast)
        ids = read_json_if_there(folder, CONFIG)
        where = f"{folder / CONFIG} and generation_config.json"
        generation = read_json_if_there(folder, "generation_config.json")
        ids |= {key: value for key, value in generation.items() if value is not None}
        self.bos_id = _one(ids.get("bos_token_id"), "bos_token_id", where)
        self.pad_id = _one(ids.get("pad_token_id"), "pad_token_id", where)
        self.eos_ids = _ids(ids.get("eos_token_id"), "eos_token_id", where)
        self.chat_template = read_chat_template(folder)
        self._bytes = TokenBytes(self.fast)
        self._showing: dict[frozenset[int], Tokenizer] = {}

    @property
    def vocab_size(self) -> int:
        return self.fast.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, behind BOS where there is one. Markers such as <|im_end|> are parsed.

        Raises:
            RequestError: the text has a lone surrogate, which UTF-8 cannot say, or the tokenizer
                fails on it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is no valid Unicode: character {error.start} is the lone surrogate "
                f"{text[error.start]!a}. Decode its bytes as what they are, UTF-8 as a rule."
            ) from None
        with _typed(RequestError, "the tokenizer cannot encode this prompt"):
            ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        with _typed(RequestError, "the tokenizer cannot decode these tokens"):
            return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out as a rule."""
        added = self.fast.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def showing(self, ids: Collection[int]) -> Tokenizer:
        """The same, but these special tokens are in its texts as all others are."""
        wanted = self.special_ids.intersection(ids)
        if not wanted:
            return self
        shown = self._showing.get(wanted)
        if shown is None:
            state = json.loads(self.fast.to_str())
            for token in state["added_tokens"]:
                token["special"] &= token["id"] not in wanted
            shown = copy(self)
            shown.fast = FastTokenizer.from_str(json.dumps(state))
            shown.__dict__.pop("special_ids", None)  # found anew
            shown._showing = {}
            self._showing[wanted] = shown
        return shown

    def token_bytes(self, token_id: int) -> bytes:
        """What a single token stands for; it may be half a character."""
        with _typed(RequestError, f"the tokenizer cannot decode token {token_id}"):
            return self._bytes.of(token_id)

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A decoder that is fed token by token."""
        return TextStream(self.fast, prompt)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, by the checkpoint's chat template in a sandbox.

        Args:
            variables: what else the template may look at, such as tools or enable_thinking.

        Raises:
            RequestError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise RequestError("this checkpoint has no chat template. Send a plain prompt.")
        return self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Ids of a conversation. BOS comes once, whether the template or the tokenizer writes it.

        Raises:
            RequestError: as `render_chat`.
        """
        text = self.render_chat(messages, **variables)
        ids = self.encode(text, add_special_tokens=False)
        has_bos = tuple(ids[: len(self.prefix)]) == self.prefix
        return ids if has_bos else [*self.prefix, *ids]


class TextStream:
    """Turns ids into text as they come, holding back bytes until they are whole characters."""

    def __init__(self, fast: FastTokenizer, prompt: Sequence[int]) -> None:
        self._fast = fast
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """The text that this token completes; '' while a character is incomplete."""
        try:
            return self._stream.step(self._fast, token_id) or ""
        except BaseException as error:
            # Not a `with`, which costs more than the decoding: this runs for every token.
            with _typed(CheckpointError, f"the tokenizer cannot decode token {token_id}"):
                raise error


@contextmanager
def _typed(kind: type[ElasticMoEError], problem: str) -> Iterator[None]:
    """What the library raises as `kind`: bare Exception, or a panic of its native code."""
    try:
        yield
    except Exception as error:
        raise kind(f"{problem}: {error}.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{problem}: {error}.") from None


def _prefix(fast: FastTokenizer) -> tuple[int, ...]:
    encoding = fast.encode("a")
    marks = [*encoding.special_tokens_mask, 0]
    return tuple(encoding.ids[: marks.index(0)])


def _ids(value: Any, key: str, where: str) -> frozenset[int]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in values):
        raise CheckpointError(f"{where}: {key} must be token ids, got {shorten(value)}.")
    return frozenset(values)


def _one(value: Any, key: str, where: str) -> int | None:
    """The first of the ids; None where there is none."""
    _ids(value, key, where)
    if isinstance(value, list):
        return value[0] if value else None
    return None if value is None else int(value)
