"""Checkpoint folders: what is written is what is read, and what is wrong is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from torch import Tensor

from elastic_moe.errors import CheckpointError, RequestError
from elastic_moe.files import replacing, write_bytes, write_text
from elastic_moe.model.checkpoints.checkpoint import is_small, load_config
from elastic_moe.model.checkpoints.folder import find_checkpoint
from elastic_moe.model.checkpoints.saving import Item, save_checkpoint, write_tensors
from elastic_moe.model.checkpoints.weights import WEIGHTS, file_sha256
from elastic_moe.model.config import ElasticBlock, ModelConfig
from elastic_moe.model.families import read_config, write_config
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.routing import Subnet
from elastic_moe.routing.axes import find, was_trained
from tests.model.random_models import TINY, tiny_model, tokens


def config_json(config: ModelConfig = TINY, **changes: Any) -> dict[str, Any]:
    return {**write_config(config, bos_id=0, eos_ids=[1, 4], pad_id=2), **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint in bf16."""
    folder = tmp_path / "checkpoint"
    weights = dict(tiny_model(dtype=torch.float32).named_parameters())
    save_checkpoint(folder, weights, config_json())
    return folder


# Round trips


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": False}, {"num_experts": 1, "max_top_k": 1}, {"elastic": None}],
    ids=["tied", "untied", "one-expert", "not-elastic"],
)
def test_bf16_weights_survive_saving_and_loading_bit_for_bit(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(dtype=torch.float32, **changes)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    save_checkpoint(tmp_path, dict(model.named_parameters()), config_json(model.config))
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert loaded.input_dtype == torch.bfloat16
    want = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        assert weight.dtype == (torch.float32 if is_small(name, weight.shape) else torch.bfloat16)
        assert torch.equal(weight.float(), want.pop(name))
    assert not want

    save_checkpoint(tmp_path / "again", dict(loaded.named_parameters()), config_json(model.config))
    assert file_sha256(tmp_path / "again" / WEIGHTS) == file_sha256(tmp_path / WEIGHTS)


def test_weights_are_rounded_to_the_nearest_bf16(folder: Path) -> None:
    loaded = dict(load_model(folder).named_parameters())
    for name, weight in tiny_model(dtype=torch.float32).named_parameters():
        assert torch.equal(loaded[name].float(), weight.bfloat16().float())


@pytest.mark.parametrize(
    ("stored", "asked", "inputs"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", None),
        (torch.float16, "auto", None),
        (torch.bfloat16, "float32", None),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_dtype_decides_what_inputs_are_rounded_to(
    stored: torch.dtype, asked: Any, inputs: torch.dtype | None, tmp_path: Path
) -> None:
    weights = dict(tiny_model(dtype=torch.float32).named_parameters())
    save_checkpoint(tmp_path, weights, config_json(), dtype=stored)
    model = load_model(tmp_path, dtype=asked)
    assert model.input_dtype is inputs
    assert model.layers[0].self_attn.q_proj.input_dtype is inputs
    assert model.layers[0].mlp.input_dtype is inputs
    assert model(tokens(1, 3), Subnet.full(model.shape)).dtype == torch.float32


def test_loaded_model_needs_no_gradients(folder: Path) -> None:
    model = load_model(folder)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_experts_are_stored_one_by_one_under_the_names_of_transformers(folder: Path) -> None:
    names = set(load_file(folder / WEIGHTS))
    assert "model.layers.4.mlp.experts.5.down_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" in names
    assert "model.layers.0.self_attn.q_norm.weight" in names
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == 5 * (4 + 2 + 2 + 1 + 3 * 6) + 2


def test_head_that_repeats_tied_embeddings_is_left_out(folder: Path) -> None:
    def repeat(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(folder, repeat)
    assert load_model(folder).lm_head is None


def test_elastic_block_survives_config_json(tmp_path: Path) -> None:
    elastic = ElasticBlock(
        width_granules=4,
        trained={"depth": (2, 5), "threshold": (0.0, 0.3, 0.7)},
        tokens=12345,
        corpus_sha256="ab" * 32,
        parent="cd" * 32,
        subnet="L3-k2",
    )
    config = replace(TINY, elastic=elastic)
    weights = dict(tiny_model(dtype=torch.float32).named_parameters())
    save_checkpoint(tmp_path, weights, config_json(config))
    read = load_config(tmp_path)
    assert read == config
    assert read.shape == config.shape
    assert read.shape.width_granules == 4


@pytest.mark.parametrize(
    ("axis", "value", "trained"),
    [
        ("depth", 2, True),
        ("depth", 3, False),
        ("width", 4, False),
        ("threshold", 0.0, True),
        ("threshold", 0.2, False),
        ("threshold", 0.5, True),
        ("threshold", 0.7, True),
        ("threshold", 0.8, False),
    ],
)
def test_was_trained(axis: str, value: float, trained: bool) -> None:
    block = ElasticBlock(trained={"depth": (2, 5), "threshold": (0.0, 0.3, 0.7)})
    assert was_trained(find(axis), value, None, block.trained.get(axis)) is trained


# Weights that are wrong


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
NORM = "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize("name", [EXPERT, NORM, "model.embed_tokens.weight", "model.norm.weight"])
def test_missing_tensor_is_named(name: str, folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(name))
    check_message(folder, name, "is missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.5.input_layernorm.weight",
        "model.layers.0.mlp.experts.6.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_extra_tensor_is_named(name: str, folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({name: torch.ones(2)}))
    check_message(folder, name, "no place for")


@pytest.mark.parametrize("name", [EXPERT, NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize("wrong", ["shorter", "transposed"])
def test_misshaped_tensor_is_named_with_both_shapes(wrong: str, name: str, folder: Path) -> None:
    good = load_file(folder / WEIGHTS)[name]
    bad = good[1:].clone() if wrong == "shorter" else good.unsqueeze(0).mT.contiguous()
    change_weights(folder, lambda weights: weights.update({name: bad}))
    check_message(folder, name, str(tuple(bad.shape)), str(tuple(good.shape)))


def test_experts_that_are_all_misshaped_are_named(folder: Path) -> None:
    config = config_json(moe_intermediate_size=28)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    check_message(folder, "model.layers.0.mlp.experts.0.gate_proj.weight", "(24, 32)", "(28, 32)")


@pytest.mark.parametrize("name", [EXPERT, NORM, "model.layers.4.mlp.gate.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(value: float, name: str, folder: Path) -> None:
    change_weights(folder, lambda weights: weights[name].view(-1)[-1].fill_(value))
    check_message(folder, name, "NaN or infinite")


def check_message(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    for part in (str(folder / WEIGHTS), *parts):
        assert part in str(caught.value)


# Files that are wrong


def test_folder_without_a_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere.*config\.json"):
        find_checkpoint(tmp_path / "nowhere")


def test_folder_of_a_checkpoint_is_found(folder: Path) -> None:
    assert find_checkpoint(str(folder)) == folder


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    check_message(folder, "cannot be read")


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '"text"', "\udcff"])
def test_broken_config_is_named(text: str | None, folder: Path) -> None:
    path = folder / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(path) in str(caught.value)


# Configurations that are wrong


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"model_type": "llama"}, r"model_type is 'llama'.*Supported: .*qwen3_moe"),
    "no-architecture": ({"model_type": None}, "model_type is None"),
    "rope-type": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_type 'yarn' is not supported",
    ),
    "rope-type-in-the-old-key": ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear'"),
    "rope-type-in-the-newer-old-key": ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3'"),
    "rope-type-beside-the-default": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}},
        "rope_type 'linear'",
    ),
    "rope-per-kind-of-layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
        r"rope_parameters with \['full_attention'\] is not supported; supported are .*rope_theta",
    ),
    "rope-key-of-another-type": (
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        r"rope_scaling with \['mrope_section'\]",
    ),
    "attention-bias": ({"attention_bias": True}, "attention_bias = True is not supported"),
    "sliding-window": ({"use_sliding_window": True}, "use_sliding_window = True"),
    "dense-layers-beyond-the-last": (
        {"mlp_only_layers": [0, 5]},
        r"mlp_only_layers must list layers in \[0, 4\], got \[0, 5\]",
    ),
    "sparse-step": ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer"),
    "clipping": ({"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config = .*not supported"),
    "part-of-the-head-rotates": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "layer-types": ({"layer_types": ["sliding_attention"] * 5}, "layer_types = "),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "newer-format": (
        {"elastic_moe": {"format": 2, "width_granules": 4}},
        r"elastic_moe\.format is 2, this version reads 1\. Update elastic-moe",
    ),
    "no-format": ({"elastic_moe": {"width_granules": 4}}, r"elastic_moe\.format is None"),
    "block-that-is-no-object": ({"elastic_moe": 4}, r"elastic_moe\.format is None"),
    "granules-that-do-not-divide": (
        {"elastic_moe": {"format": 1, "width_granules": 5}},
        r"width_granules 5 must divide moe_intermediate_size 24",
    ),
    "more-experts-per-token-than-experts": (
        {"num_experts_per_tok": 7},
        "num_experts_per_tok 7 must be at most num_experts 6",
    ),
    "heads-that-do-not-divide": (
        {"num_key_value_heads": 3},
        "num_key_value_heads 3 must divide num_attention_heads 4",
    ),
    "odd-head": ({"head_dim": 7}, "head_dim 7 must be even"),
}


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_would_change_the_mathematics_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^some/config.json: .*{message}"):
        read_config(config_json(**changes), "some/config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": None, "rope_theta": 5.0},
        {"rope_parameters": {"rope_theta": 77.0, "partial_rotary_factor": 1.0, "factor": None}},
        {"rope_scaling": None, "rope_theta": 77.0},
        {"rope_scaling": {"type": "default"}, "rope_theta": 77.0},
    ],
    ids=["block", "block-beats-key", "nulls", "key", "old-block"],
)
def test_the_ways_to_say_the_base_of_the_rotary_angles(changes: dict[str, Any]) -> None:
    assert read_config(config_json(**changes), "some/config.json").rope_theta == 77.0


REQUIRED = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "max_position_embeddings",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_size_is_named(key: str) -> None:
    data = config_json()
    del data[key]
    named = "num_local_experts" if key == "num_experts" else key
    with pytest.raises(CheckpointError, match=f"^some/config.json: {named} must be.*got None"):
        read_config(data, "some/config.json")


ILL_TYPED: list[tuple[str, Any]] = [
    *((key, value) for key in REQUIRED for value in ("32", 0, -1, 32.0, True)),
    ("head_dim", "8"),
    ("rope_theta", "10000"),
    ("rope_theta", 0),
    ("rope_theta", float("nan")),
    ("rms_norm_eps", -1e-6),
    ("tie_word_embeddings", "true"),
    ("norm_topk_prob", 1),
    ("norm_topk_prob", None),
]


@pytest.mark.parametrize(("key", "value"), ILL_TYPED, ids=lambda value: repr(value))
def test_ill_typed_key_is_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"^some/config.json: {key} must be"):
        read_config(config_json(**{key: value}), "some/config.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_parameters", "default", "rope_parameters must be an object, got 'default'"),
        ("rope_parameters", {"rope_theta": "x"}, "rope_theta must be a positive number, got 'x'"),
        ("elastic_moe", {"format": 1, "width_granules": "4"}, "width_granules must be"),
        ("elastic_moe", {"format": 1, "trained": [1]}, "elastic_moe.trained must hold a list"),
        ("elastic_moe", {"format": 1, "trained": {"depth": 3}}, "trained must hold a list"),
    ],
)
def test_ill_typed_block_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^some/config.json: .*{message}"):
        read_config(config_json(**{key: value}), "some/config.json")


def test_keys_that_have_defaults_may_be_absent() -> None:
    data = config_json()
    for key in (
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "norm_topk_prob",
        "head_dim",
        "mlp_only_layers",
        "attention_bias",
        "elastic_moe",
    ):
        del data[key]
    want = replace(TINY, rms_norm_eps=1e-6, tied_embeddings=False, renormalize=False, elastic=None)
    assert read_config(data, "some/config.json") == want


def test_invalid_config_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        save_checkpoint(tmp_path / "new", {}, config_json(attention_bias=True))
    assert not (tmp_path / "new").exists()


# The tokenizer's files


@pytest.fixture
def tokenizer_folder(folder: Path) -> Path:
    FastTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(folder / "tokenizer.json")
    )
    return folder


def test_special_ids_come_from_config_json(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(tokenizer_folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, {1, 4}, 2)
    (tokenizer_folder / "config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    tokenizer = Tokenizer(tokenizer_folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (None, {7}, None)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_broken_file_of_the_tokenizer_is_named(
    name: str, text: str, tokenizer_folder: Path
) -> None:
    (tokenizer_folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(tokenizer_folder)
    assert str(tokenizer_folder / name) in str(caught.value)


def test_missing_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(folder)


def test_without_a_chat_template_chat_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(tokenizer_folder).render_chat([{"role": "user", "content": "hello"}])


def test_chat_template_may_be_a_file_of_its_own(tokenizer_folder: Path) -> None:
    (tokenizer_folder / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert Tokenizer(tokenizer_folder).render_chat([]) == "old"
    (tokenizer_folder / "chat_template.jinja").write_text("new", encoding="utf-8")
    assert Tokenizer(tokenizer_folder).render_chat([]) == "new"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] + 1 }}", "{{ nothing.at_all }}", "{{ unclosed", "{% raise %}"],
)
def test_template_that_fails_is_a_request_error(template: str, tokenizer_folder: Path) -> None:
    (tokenizer_folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(RequestError, match="chat template refused"):
        Tokenizer(tokenizer_folder).render_chat([{"role": "user", "content": "hello"}])


# Atomic writing


@pytest.mark.parametrize("before", ["old", None], ids=["over-a-file", "new-file"])
def test_failure_in_the_middle_leaves_the_old_file_and_no_part(
    before: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)

    def fail_halfway() -> None:
        with replacing(path) as beside:
            beside.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert_only(path, before)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_system_call_leaves_the_old_file_and_no_part(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "new")
    assert_only(path, "old")


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert beside.parent == path.parent
    assert_only(path, "new")


def test_writers_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "zwölf\n")
    assert_only(path, "zwölf\n")
    write_bytes(path, b"dreizehn")
    assert_only(path, "dreizehn")


def test_new_files_get_the_permissions_that_new_files_get(tmp_path: Path, folder: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert (folder / WEIGHTS).stat().st_mode == plain.stat().st_mode


def test_checkpoint_that_fails_to_save_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    other = dict(tiny_model(seed=5, dtype=torch.float32).named_parameters())
    last = Item("z", (2,), "float32", lambda: np.zeros(3, np.float32))  # not what it promised
    monkeypatch.setattr(
        "elastic_moe.model.checkpoints.saving.write_tensors",
        lambda folder, items, most: write_tensors(folder, [*items, last], most),
    )
    with pytest.raises(CheckpointError, match="tensor 'z' should be"):
        save_checkpoint(folder, other, config_json())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def assert_only(path: Path, text: str | None) -> None:
    """`path` holds `text`, and nothing else lies beside it."""
    assert [other.name for other in path.parent.iterdir()] == ([] if text is None else [path.name])
    assert text is None or path.read_text(encoding="utf-8") == text
