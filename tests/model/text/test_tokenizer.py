"""The tokenizer takes no orders from its files, and fails only with errors of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from elastic_moe.errors import CheckpointError, RequestError
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.model.text.tokenizer import Tokenizer

TEXT = "def f(x):\n    return x\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled tokenizer, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / "elastic-mini" / name, tmp_path / name)
    return tmp_path


def change(folder: Path, **parts: Any) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, **parts}), encoding="utf-8")


def padding(length: int) -> dict[str, Any]:
    return {
        "strategy": {"Fixed": length},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }


def truncation(length: int, stride: int = 0) -> dict[str, Any]:
    return {
        "direction": "Right",
        "max_length": length,
        "strategy": "LongestFirst",
        "stride": stride,
    }


@pytest.mark.parametrize("length", [40, 1 << 40], ids=["some", "as-much-as-no-memory-holds"])
def test_prompt_is_never_filled_up(length: int, folder: Path) -> None:
    want = Tokenizer(folder).encode(TEXT)
    change(folder, padding=padding(length))
    assert Tokenizer(folder).encode(TEXT) == want


@pytest.mark.parametrize(("length", "stride"), [(3, 0), (0, 0), (1, 255)])
def test_prompt_is_never_cut(length: int, stride: int, folder: Path) -> None:
    want = Tokenizer(folder).encode(TEXT)
    assert len(want) > 5
    change(folder, truncation=truncation(length, stride))
    assert Tokenizer(folder).encode(TEXT) == want


def test_prompt_that_the_tokenizer_cannot_encode_is_refused(tmp_path: Path) -> None:
    words = FastTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a b a") == [0, 1, 0]
    with pytest.raises(RequestError, match=r"cannot encode this prompt: .*Missing \[UNK\]"):
        tokenizer.encode("a c")


@pytest.mark.parametrize("text", ["\ud800", "a\udcff"])
def test_prompt_that_is_no_unicode_is_refused(text: str, folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no valid Unicode: character \d is the lone surrogate"):
        Tokenizer(folder).encode(text)


@pytest.mark.parametrize("token", [-1, 1 << 32, 1 << 70])
def test_token_that_cannot_be_is_refused(token: int, folder: Path) -> None:
    with pytest.raises(RequestError, match="the tokenizer cannot decode these tokens"):
        Tokenizer(folder).decode([token])
    with pytest.raises(CheckpointError, match=f"the tokenizer cannot decode token {token}"):
        Tokenizer(folder).stream().step(token)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) | length }}",
        "{{ '%d' % 'x' }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_template_that_fails_in_any_way_is_a_request_error(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(RequestError, match="the chat template refused these messages"):
        Tokenizer(folder).render_chat([{"role": "user", "content": "hello"}])


# Chat templates of published checkpoints


def with_template(folder: Path, template: str, **settings: object) -> Tokenizer:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Tokenizer(folder)


MESSAGES = [{"role": "user", "content": "a<b"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<|bos|>a<b<|endoftext|>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "a<b"}]'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% if tools %}tools{% else %}none{% endif %}", "none"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
    ],
)
def test_templates_find_the_names_that_transformers_gives_them(
    template: str, text: str, folder: Path
) -> None:
    special = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|endoftext|>"}
    assert with_template(folder, template, **special).render_chat(MESSAGES) == text


def test_a_template_may_refuse_in_its_own_words(folder: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="refused these messages: roles must alternate"):
        with_template(folder, template).render_chat(MESSAGES)


def test_a_template_may_ask_for_the_date(folder: Path) -> None:
    text = with_template(folder, "{{ strftime_now('%Y') }}").render_chat(MESSAGES)
    assert text.isdigit()


def test_variables_reach_the_template(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ enable_thinking }}")
    assert tokenizer.render_chat(MESSAGES, enable_thinking=False) == "False"


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_a_chat_has_bos_once_whoever_writes_it(start: str, folder: Path) -> None:
    tokenizer = with_template(folder, start + "{{ messages[0].content }}", bos_token="<|bos|>")
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids == tokenizer.encode("a<b")
    assert ids.count(tokenizer.prefix[0]) == 1
