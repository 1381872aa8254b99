"""The bundled checkpoint: transformers loads it unchanged, and its tokenizer loses no text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.model.checkpoints.folder import find_checkpoint
from elastic_moe.model.checkpoints.weights import WEIGHTS
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.routing import Subnet

# Names that users and templates rely on.
SPECIAL = [
    "<|bos|>",
    "<|endoftext|>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    *(f"<|reserved_{i}|>" for i in range(16)),
]
TEXTS = [
    "",
    "The function returns a new list, sorted.\n",
    "def f(x):\n\treturn x  # 42\r\n\r\n    pass",
    " leading and trailing spaces   ",
    "naïve Zürich 東京 Ελλάδα עברית हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0010ffff \ue000",
    "\x00\x01\x1b[0m\x7f\x85\u2028\u200b\ufeff",
    "1234567890.123e-45",
    "it's we'll I'VE don't",
    "<|im_start|>user\nhello<|im_end|>\n",
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What does len do?"}],
    [
        {"role": "system", "content": "Be short.\n"},
        {"role": "user", "content": "  spaces, <|im_end|> and {{ braces }}  "},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "ärger 🎉"},
    ],
]


@cache
def folder() -> Path:
    return find_checkpoint("elastic-mini")


@cache
def ours() -> Tokenizer:
    return Tokenizer(folder())


@cache
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(folder())


# Model


def test_is_a_qwen3_moe_of_the_documented_size() -> None:
    config = load_config(folder())
    assert config.model_type == "qwen3_moe"
    assert (config.num_layers, config.hidden_size) == (48, 128)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 32)
    assert (config.num_experts, config.max_top_k, config.expert_hidden) == (16, 4, 64)
    assert (config.vocab_size, config.max_positions) == (4096, 4096)
    assert config.tied_embeddings
    assert config.elastic is not None
    assert config.elastic.width_granules == 8


def test_files_are_readable_by_everyone_who_may_read_the_package() -> None:
    modes = {path.name: path.stat().st_mode & 0o444 for path in folder().iterdir()}
    assert modes == dict.fromkeys(modes, modes["config.json"])


def test_transformers_loads_it_unchanged_and_agrees() -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder(), dtype=torch.float32, output_loading_info=True
    )
    assert type(model) is Qwen3MoeForCausalLM
    assert not any(loading.values()), loading  # nothing missing, unexpected or misshaped
    mine = load_model(folder(), dtype="float32")
    text = "Return the number of items in a container.\n\n" * 8
    ids = torch.tensor([ours().encode(text)[:80], ours().encode("x = 1\n" * 40)[:80]])
    assert ids.shape == (2, 80)
    with torch.no_grad():
        want = model(ids).logits
    got = mine(ids, Subnet.full(mine.shape))
    assert (got - want).abs().amax() <= 1e-4 * want.abs().amax()
    assert want.std() > 1


def test_weights_are_bf16() -> None:
    assert load_model(folder()).input_dtype == torch.bfloat16
    assert (folder() / WEIGHTS).stat().st_size < 50e6


# Tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text: str) -> None:
    check_round_trip(text)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=100))
def test_any_text_round_trips(text: str) -> None:
    check_round_trip(text)


def check_round_trip(text: str) -> None:
    ids = ours().encode(text)
    assert ids[0] == ours().bos_id
    assert ours().encode(text, add_special_tokens=False) == ids[1:]
    assert ours().decode(ids[1:], skip_special_tokens=False) == text


# A U+FFFD at the end looks like half a character: the stream waits for the rest.
@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=60))
@example(text="a<tool_response>b")
def test_streamed_text_is_the_text(text: str) -> None:
    ids = ours().encode(text, add_special_tokens=False)
    stream = ours().stream(ours().encode("before"))
    # Special tokens, which a text may spell, are left out of both.
    assert "".join(stream.step(i) for i in ids) == ours().decode(ids)


def test_every_byte_has_a_token() -> None:
    vocabulary = ours().fast.get_vocab()
    assert len(ByteLevel.alphabet()) == 256
    assert set(ByteLevel.alphabet()) <= set(vocabulary)
    assert sorted(vocabulary.values()) == list(range(4096))
    assert ours().vocab_size == load_config(folder()).vocab_size


def test_bytes_that_are_no_text_decode_to_replacement_characters() -> None:
    opens_a_character = ours().fast.token_to_id("Ã")  # the symbol of byte 0xC3
    assert ours().decode([opens_a_character]) == "\ufffd"


def test_special_tokens_have_ids_of_their_own() -> None:
    ids = [ours().fast.token_to_id(token) for token in SPECIAL]
    assert None not in ids
    assert len(set(ids)) == len(SPECIAL)
    for token, i in zip(SPECIAL, ids, strict=True):
        assert ours().encode(f"a{token}b", add_special_tokens=False).count(i) == 1
        assert ours().decode([i]) == ""
        assert ours().decode([i], skip_special_tokens=False) == token


def test_special_ids_of_config_json_are_those_of_the_tokenizer() -> None:
    bos, end, pad, _, im_end = (ours().fast.token_to_id(token) for token in SPECIAL[:5])
    assert ours().bos_id == bos
    assert ours().eos_ids == {end, im_end}
    assert ours().pad_id == pad
    generation = json.loads((folder() / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["bos_token_id"] == bos
    assert set(generation["eos_token_id"]) == {end, im_end}
    assert generation["pad_token_id"] == pad
    assert (theirs().bos_token_id, theirs().eos_token_id, theirs().pad_token_id) == (bos, end, pad)


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_gives_the_same_ids_and_text(text: str) -> None:
    ids = ours().encode(text)
    assert theirs()(text)["input_ids"] == ids
    assert theirs()(text, add_special_tokens=False)["input_ids"] == ids[1:]
    for skip in (True, False):
        assert theirs().decode(ids, skip_special_tokens=skip) == ours().decode(
            ids, skip_special_tokens=skip
        )


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=100))
def test_transformers_gives_the_same_ids_for_any_text(text: str) -> None:
    assert theirs()(text)["input_ids"] == ours().encode(text)


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "finished"])
@pytest.mark.parametrize("messages", CHATS, ids=len)
def test_transformers_renders_the_same_chat(messages: list[dict[str, str]], prompt: bool) -> None:
    want = theirs().apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ours().render_chat(messages, add_generation_prompt=prompt) == want


def test_tools_calls_and_their_results_are_told_as_transformers_tells_them() -> None:
    def tool(name: str, **function: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, **function}}

    parameters = {"type": "object", "properties": {"city": {}, "unit": {}}}
    tools = [tool("look", description="See.", parameters=parameters), tool("now", description="")]
    calls = [tool("look", arguments={"city": "Zürich"}), tool("now", arguments={})]
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "content": "18 degrees"},
        {"role": "assistant", "content": "", "tool_calls": calls[1:]},
    ]
    system = {"role": "system", "content": "Be brief."}
    for messages in (talk, [system, *talk]):
        for passed in (tools, None):
            want = theirs().apply_chat_template(
                messages, tools=passed, tokenize=False, add_generation_prompt=True
            )
            assert ours().render_chat(messages, tools=passed) == want
    assert ours().render_chat([system, *talk], tools=tools) == (
        "<|im_start|>system\nBe brief.\n\n"
        "Functions:\n- look(city, unit): See.\n- now(): \n"
        'A call: <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nWell.\n"
        '<tool_call>\n{"name": "look", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n18 degrees<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_chat_ends_where_the_answer_begins() -> None:
    text = ours().render_chat([{"role": "user", "content": "Hello"}])
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
