"""Checkpoints of transformers give the same logits here, and ours the same logits there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from elastic_moe.errors import CheckpointError, ExtractError
from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.model.checkpoints.extract import extract
from elastic_moe.model.checkpoints.saving import save_checkpoint
from elastic_moe.model.checkpoints.weights import INDEX, WEIGHTS
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families import FAMILIES, write_config
from elastic_moe.model.families.config_keys import ConfigKeys
from elastic_moe.model.families.family import parameter_shapes
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.reference.moe import MoE
from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.routing import Subnet, parse_name
from tests.model.kv_cache import KVCache
from tests.model.random_models import tiny_model, tokens
from tests.model.transformers_models import (
    ARCHITECTURES,
    VOCAB,
    assert_logits_agree,
    their_greedy,
    their_logits,
    their_model,
)

IDS = tokens(2, 80, vocab_size=VOCAB)


@dataclass(frozen=True)
class Saved:
    """A model of transformers, the folder it was saved to, and its logits of `IDS`."""

    model: Any
    folder: Path
    logits: Tensor


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Each architecture, as tests/model/transformers_models.py makes it."""
    return save(their_model(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def ernie(tmp_path: Path) -> Saved:
    return save(their_model("ernie4_5_moe"), tmp_path)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def save(model: Any, folder: Path, **options: Any) -> Saved:
    model.save_pretrained(folder, **options)
    return Saved(model, folder, their_logits(model, IDS))


def our_logits(model: ElasticTransformer, trace: Trace | None = None) -> Tensor:
    return model(IDS, Subnet.full(model.shape), trace=trace)


def assert_same_logits(saved: Saved) -> ElasticTransformer:
    """Load the folder and compare; returns our model."""
    ours = load_model(saved.folder, dtype="float32")
    assert_logits_agree(our_logits(ours), saved.logits)
    return ours


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


# Every architecture


def test_checkpoint_of_transformers_gives_its_logits(saved: Saved) -> None:
    ours = assert_same_logits(saved)
    assert ours.config.model_type == saved.model.config.model_type
    assert (ours.lm_head is None) is saved.model.config.tie_word_embeddings


def test_checkpoint_of_transformers_gives_its_greedy_tokens(saved: Saved) -> None:
    ours = load_model(saved.folder, dtype="float32")
    seen: set[int] = set()
    for prompt in (IDS[:1, :64], IDS[1:, :64]):
        want = their_greedy(saved.model, prompt, 32)
        assert greedy(ours, prompt, 32) == want
        seen.update(want)
    assert len(seen) > 4, "texts that repeat one token would compare little"


def greedy(model: ElasticTransformer, prompt: Tensor, count: int) -> list[int]:
    """`count` greedy tokens after prompt (1, T), through the KV cache."""
    subnet = Subnet.full(model.shape)
    cache = KVCache(model.shape.num_layers, capacity=prompt.shape[1] + count)
    ids, piece = [], prompt
    for _ in range(count):
        ids.append(int(model(piece, subnet, cache=cache)[0, -1].argmax()))
        piece = torch.tensor([ids[-1:]])
    return ids


def test_ernies_bias_changes_the_selection_of_many_tokens(ernie: Saved) -> None:
    model = load_model(ernie.folder, dtype="float32")
    biased, unbiased = Trace(), Trace()
    our_logits(model, biased)
    # From the biased router logits: with the bias gone, later layers would see other inputs too.
    rows = changed = 0
    for layer in biased.layers:
        best = layer.router_logits.topk(layer.topk_ids.shape[1]).indices
        same = best.sort(-1).values == layer.topk_ids.sort(-1).values
        rows += len(same)
        changed += int((~same.all(-1)).sum())
    assert rows == 3 * IDS.numel()
    assert changed >= 0.2 * rows

    for moe in model.modules():
        if isinstance(moe, MoE) and moe.correction_bias is not None:
            moe.correction_bias.zero_()
    our_logits(model, unbiased)
    for layer in unbiased.layers:
        best = layer.router_logits.topk(layer.topk_ids.shape[1]).indices
        assert torch.equal(best.sort(-1).values, layer.topk_ids.long().sort(-1).values)


# What their configurations can say


# A line for each optional key of an architecture.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_moe": {
        "tied": {"tie_word_embeddings": True},
        "not-renormalised": {"norm_topk_prob": False},
        "prime-number-of-experts": {"num_experts": 7},
        "one-expert": {"num_experts": 1, "num_experts_per_tok": 1},
        "no-dense-layer": {"mlp_only_layers": []},
        "every-second-layer-routes": {"mlp_only_layers": [], "decoder_sparse_step": 2},
        "both-kinds-of-dense-layers": {"mlp_only_layers": [3], "decoder_sparse_step": 2},
        "one-head-of-keys-for-each-query": {"num_key_value_heads": 6},
    },
    "olmoe": {
        "tied": {"tie_word_embeddings": True},
        "renormalised": {"norm_topk_prob": True},
    },
    "mixtral": {
        "tied": {"tie_word_embeddings": True},
        "head-size-by-default": {"head_dim": None},
        "window-that-never-shuts": {"sliding_window": 256},
    },
    "ernie4_5_moe": {
        "untied": {"tie_word_embeddings": False},
        "no-shared-experts": {"moe_num_shared_experts": 0},
        "one-shared-expert": {"moe_num_shared_experts": 1},
        "every-layer-routes": {"moe_layer_start_index": 0},
        "last-layers-dense": {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
        "every-second-layer-routes": {"moe_layer_start_index": 0, "moe_layer_interval": 2},
        "guard-of-the-division": {"moe_norm_min": 0.9},
    },
}
VARIANTS = {
    f"{architecture}-{name}": (architecture, changes)
    for architecture, variants in CHANGES.items()
    for name, changes in variants.items()
}


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_variant_gives_its_logits(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert_same_logits(save(their_model(architecture, **changes), tmp_path))


@pytest.mark.parametrize(
    ("variant", "dense"),
    [
        ("qwen3_moe-no-dense-layer", []),
        ("qwen3_moe-every-second-layer-routes", [0, 2]),
        ("qwen3_moe-both-kinds-of-dense-layers", [0, 2, 3]),
        ("ernie4_5_moe-every-layer-routes", []),
        ("ernie4_5_moe-last-layers-dense", [2, 3]),
        ("ernie4_5_moe-every-second-layer-routes", [0, 2]),
    ],
)
def test_dense_layers_lie_where_the_configuration_says(
    variant: str, dense: list[int], tmp_path: Path
) -> None:
    architecture, changes = VARIANTS[variant]
    their_model(architecture, **changes).save_pretrained(tmp_path)
    assert load_model(tmp_path).config.dense_layers == set(dense)


def test_every_architecture_has_variants() -> None:
    assert CHANGES.keys() == FAMILIES.keys(), "a line per optional key belongs into CHANGES"


# What their files can look like


def test_shards_give_the_same_logits(saved: Saved, tmp_path: Path) -> None:
    saved.model.save_pretrained(tmp_path, max_shard_size="400KB")
    assert not (tmp_path / WEIGHTS).exists()
    shards = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    assert len(set(shards)) > 2
    assert_same_logits(Saved(saved.model, tmp_path, saved.logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rounded_files_give_the_logits_of_the_rounded_weights(
    dtype: torch.dtype, saved: Saved, tmp_path: Path
) -> None:
    rounded = their_model(saved.model.config.model_type)
    for weight in rounded.parameters():
        weight.copy_(weight.to(dtype))
    want = their_logits(rounded, IDS)  # in float32: to(dtype) rounds more than the parameters
    rounded.to(dtype).save_pretrained(tmp_path)
    embeddings = f"{FAMILIES[saved.model.config.model_type].prefix('embed_tokens.')}weight"
    assert load_file(tmp_path / WEIGHTS)[embeddings].dtype == dtype
    ours = assert_same_logits(Saved(rounded, tmp_path, want))
    assert ours.embed_tokens.weight.dtype == dtype, "weights are held as the file has them"


def test_fused_layout_of_memory_gives_the_same_logits(saved: Saved, tmp_path: Path) -> None:
    saved.model.config.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in saved.model.state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in weights
    save_file(weights, tmp_path / WEIGHTS)
    assert_same_logits(Saved(saved.model, tmp_path, saved.logits))


@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": None}], ids=["absent", "null"])
def test_rope_theta_is_read_from_the_old_key_too(
    scaling: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    theta = 321.0
    changed = their_model(
        saved.model.config.model_type,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    after = save(changed, tmp_path)
    change_config(tmp_path, lambda data: (data.pop("rope_parameters"), data.update(scaling)))
    assert (after.logits - saved.logits).abs().amax() > 0.1, "this theta is not the default one"
    with pytest.raises(AssertionError):  # the family's default theta is another
        assert_same_logits(after)
    change_config(tmp_path, lambda data: data.update(rope_theta=theta))
    assert_same_logits(after)


def test_heads_that_predict_several_tokens_are_ignored(ernie: Saved) -> None:
    extra = ("model.mtp_block.0.mlp.gate_proj.weight", "model.mtp_linear_proj.0.weight")
    change_weights(ernie.folder, lambda weights: weights.update({n: torch.ones(2) for n in extra}))
    change_config(ernie.folder, lambda data: data.update(num_nextn_predict_layers=1))
    assert_same_logits(ernie)


@pytest.mark.parametrize("shape", [(8,), (1, 8)], ids=["(E,)", "(1, E)"])
@pytest.mark.parametrize("place", ["mlp.moe_statics", "mlp.gate.moe_statics"])
def test_bias_may_lie_in_either_place_and_shape(
    place: str, shape: tuple[int, ...], ernie: Saved
) -> None:
    def move(weights: dict[str, Tensor]) -> None:
        found = [name for name in weights if name.endswith("e_score_correction_bias")]
        assert len(found) == 3
        for name in found:
            layer = name.partition(".mlp.")[0]
            weights[f"{layer}.{place}.e_score_correction_bias"] = weights.pop(name).view(shape)

    change_weights(ernie.folder, move)
    assert_same_logits(ernie)


def test_keys_and_tensors_may_have_other_names(
    ernie: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that names everything otherwise loads, and its sub-networks are written and load."""
    keys = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "context",
        "rms_norm_eps": "norm_epsilon",
        "tie_word_embeddings": "tied",
        "moe_num_experts": "n_experts",
        "moe_intermediate_size": "d_expert",
        "moe_num_shared_experts": "n_shared",
    }
    tensors = {
        "mlp.gate.": "moe.router.",
        "mlp.shared_experts.": "moe.shared.",
        "mlp.experts.": "moe.experts.",
        "self_attn.q_proj.": "attention.query.",
        "input_layernorm.": "norm_1.",
    }
    family = FAMILIES["ernie4_5_moe"]
    renamed = {field: (keys.get(names[-1], names[-1]),) for field, names in family.all_keys.items()}
    monkeypatch.setitem(FAMILIES, "ernie4_5_moe", replace(family, keys=renamed, names=tensors))

    def rename_tensors(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            for ours, theirs in tensors.items():
                if f".{ours}" in name and "moe_statics" not in name:
                    weights[name.replace(f".{ours}", f".{theirs}")] = weights.pop(name)

    change_config(
        ernie.folder, lambda data: data.update({keys[key]: data.pop(key) for key in keys})
    )
    change_weights(ernie.folder, rename_tensors)
    ours = assert_same_logits(ernie)
    child = extract(ernie.folder, "L3-k2-w4", tmp_path / "child")
    said = json.loads((child / "config.json").read_text(encoding="utf-8"))
    assert (said["n_blocks"], said["d_expert"], said["n_shared"]) == (3, 20, 4)
    assert not keys.keys() & said.keys()
    assert_logits_agree(
        our_logits(load_model(child, dtype="float32")),
        ours(IDS, parse_name(ours.shape, "L3-k2-w4")),
    )
    change_config(ernie.folder, lambda data: data.update(n_kv_heads=5))
    with pytest.raises(CheckpointError, match="n_kv_heads 5 must divide n_heads 6"):
        load_model(ernie.folder)


def test_a_size_whose_key_the_family_does_not_name_is_not_extracted(
    ernie: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["ernie4_5_moe"]
    keys = {field: names for field, names in family.keys.items() if field != "shared_experts"}

    def read(config: ConfigKeys) -> ModelConfig:
        names = {**config.names, "shared_experts": ("moe_num_shared_experts",)}
        return family.read(replace(config, names=names))

    monkeypatch.setitem(FAMILIES, "ernie4_5_moe", replace(family, read=read, keys=keys))
    with pytest.raises(ExtractError, match=r"shared_experts 2 instead of 4.*keys of ernie4_5_moe"):
        extract(ernie.folder, "w4", tmp_path / "child")


# Our own files


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "as-they-are"])
def test_our_checkpoint_gives_our_logits_in_transformers(
    tied: bool, renormalize: bool, tmp_path: Path
) -> None:
    ours = tiny_model(
        dtype=torch.float32, tied_embeddings=tied, renormalize=renormalize, rope_theta=2000.0
    )
    config = write_config(ours.config, bos_id=0, eos_ids=[1, 4], pad_id=2)
    save_checkpoint(tmp_path, dict(ours.named_parameters()), config, dtype=torch.float32)
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs) is Qwen3MoeForCausalLM
    assert not any(loading.values()), loading  # nothing missing, unexpected or misshaped
    ids = tokens(2, 70)
    assert_logits_agree(ours(ids, Subnet.full(ours.shape)), their_logits(theirs, ids))


def test_files_may_name_what_stands_before_a_layer_otherwise(saved: Saved) -> None:
    config = saved.model.config
    family = FAMILIES[config.model_type]
    ours = load_config(saved.folder)
    other = replace(family, prefixes={"layers.": "transformer.h.", "embed_tokens.": "wte."})
    for name, shape in parameter_shapes(ours):
        theirs = [s.tensor for way in other.sources(ours, name, shape) for s in way]
        usual = [s.tensor for way in family.sources(ours, name, shape) for s in way]
        renamed = [
            tensor.replace("model.layers.", "transformer.h.").replace("model.embed_tokens.", "wte.")
            for tensor in usual
        ]
        assert theirs == renamed
