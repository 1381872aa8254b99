"""A sub-network that leaves as a checkpoint computes what it computed inside its parent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_moe import ElasticRoutingConfig, Engine
from elastic_moe.errors import CheckpointWarning, ExtractError, RoutingError
from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.model.checkpoints.extract import extract
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.model.checkpoints.weights import INDEX, TensorFiles
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.routing import Subnet, parse_name, resolve
from tests.model.random_models import tokens
from tests.model.transformers_models import ARCHITECTURES, VOCAB, their_logits, their_model

IDS = tokens(2, 70, vocab_size=VOCAB)
SUBNETS = ["full", "L3", "L1", "Lxb", "k2", "k1", "w4", "w3", "p5", "L2-k1-w5-p4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a checkpoint that transformers saved; one for each set of arguments."""

    @cache
    def save(architecture: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        their_model(architecture, **changes).save_pretrained(folder)
        # Any tokenizer will do: an engine wants one.
        shutil.copy(BUNDLED / "elastic-mini" / "tokenizer.json", folder)
        return folder

    return save


def load_theirs(folder: Path) -> Any:
    """transformers' model of a folder, every tensor in its place."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        experts_implementation="eager",  # the grouped one wants channels in multiples of 8
    )
    assert not any(loading.values()), loading
    return model


def assert_same_network(parent: ElasticTransformer, subnet: Subnet, child: Path) -> None:
    """Parent under `subnet`, transformers on the child, and we on the child: one network."""
    want = parent(IDS, subnet)
    assert want.std() > 1
    bound = 1e-4 * want.abs().amax()
    assert (their_logits(load_theirs(child), IDS) - want).abs().amax() <= bound
    with Engine.from_pretrained(child, dtype="float32") as engine:
        for ids, logits in zip(IDS, want, strict=True):
            assert (torch.from_numpy(engine.score(ids.tolist())) - logits).abs().amax() <= bound


@pytest.mark.parametrize("name", SUBNETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_extracted_checkpoint_is_the_sub_network(
    architecture: str, name: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    parent = load_model(saved(architecture), dtype="float32")
    subnet = parse_name(parent.shape, name)
    child = extract(saved(architecture), name, tmp_path / "child")
    assert_same_network(parent, subnet, child)
    config = load_config(child)
    assert config.num_layers == subnet.depth
    assert config.elastic is not None
    assert config.elastic.subnet == name
    assert str(config.elastic.parent).endswith(TensorFiles(saved(architecture)).sha256())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pools_of_one_size_may_differ_from_layer_to_layer(
    architecture: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    parent = load_model(saved(architecture), dtype="float32")
    pools = [[0, 2, 5], [1, 3, 7], [4, 5, 6], [2, 3, 4]]
    subnet = resolve(parent.shape, expert_pool=pools, top_k=2)
    assert_same_network(parent, subnet, extract(saved(architecture), subnet, tmp_path / "child"))


def test_a_configuration_may_name_the_experts(saved: Callable[..., Path], tmp_path: Path) -> None:
    config = ElasticRoutingConfig.full(expert_pool=[1, 4, 6], active_layers=[0, 1, 3])
    parent = load_model(saved("olmoe"), dtype="float32")
    child = extract(saved("olmoe"), config, tmp_path / "child")
    assert_same_network(parent, config.resolve(parent.shape), child)


POOLS = [[0, 1, 2], [1, 3, 7], [4, 5, 6, 0, 1], [2, 3, 4, 7]]


def test_pools_of_any_sizes_leave_as_a_selection_bias_exactly_where_biases_are_equal(
    tmp_path: Path,
) -> None:
    theirs = their_model("ernie4_5_moe")
    for name, parameter in theirs.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data.fill_(0.125)
    theirs.save_pretrained(tmp_path / "parent")
    shutil.copy(BUNDLED / "elastic-mini" / "tokenizer.json", tmp_path / "parent")
    parent = load_model(tmp_path / "parent", dtype="float32")
    subnet = resolve(parent.shape, expert_pool=POOLS)
    child = extract(tmp_path / "parent", subnet, tmp_path / "child", pool_as_bias=True)
    assert load_config(child).num_experts == parent.config.num_experts
    assert_same_network(parent, subnet, child)


def test_a_pool_as_bias_that_is_not_exact_says_so_and_chooses_from_the_pool(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("ernie4_5_moe")
    subnet = resolve(load_config(folder).shape, expert_pool=POOLS)
    with pytest.warns(CheckpointWarning, match=r"not exact in layers \[1, 2, 3\]"):
        child = extract(folder, subnet, tmp_path / "child", pool_as_bias=True)
    small, trace = load_model(child, dtype="float32"), Trace()
    small(IDS, Subnet.full(small.shape), trace=trace)
    for layer in trace.layers:
        assert set(layer.topk_ids.flatten().tolist()) <= set(POOLS[layer.layer])


def test_shared_experts_are_padded_to_whole_experts(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    child = extract(saved("ernie4_5_moe"), "w3", tmp_path / "child")
    config = load_config(child)
    assert (config.expert_hidden, config.shared_experts, config.shared_hidden) == (15, 6, 90)
    assert load_config(saved("ernie4_5_moe")).shared_hidden == 80


def test_dense_layers_keep_their_places(saved: Callable[..., Path], tmp_path: Path) -> None:
    # Layer 2 of 4 is dense.
    child = extract(saved("qwen3_moe"), "Lxd", tmp_path / "child")
    assert load_config(child).dense_layers == {1}
    child = extract(saved("qwen3_moe"), "Lx3", tmp_path / "none-left")
    assert load_config(child).dense_layers == set()


def test_a_list_with_an_entry_per_layer_loses_those_of_the_layers_cut(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    parent = shutil.copytree(saved("mixtral"), tmp_path / "parent")
    data = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    data["layer_types"] = ["full_attention"] * 4
    (parent / "config.json").write_text(json.dumps(data), encoding="utf-8")
    child = extract(parent, "Lx9", tmp_path / "child")
    data = json.loads((child / "config.json").read_text(encoding="utf-8"))
    assert data["layer_types"] == ["full_attention"] * 2
    load_theirs(child)


def test_a_fused_checkpoint_is_extracted_too(saved: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = their_model("mixtral")
    folder = tmp_path / "fused"
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(saved("mixtral") / name, folder / name)
    parent = load_model(folder, dtype="float32")
    subnet = parse_name(parent.shape, "L3-k1-w4-p5")
    assert_same_network(parent, subnet, extract(folder, subnet, tmp_path / "child"))


def test_weights_keep_their_dtype_and_split_into_shards(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    their_model("ernie4_5_moe").to(torch.bfloat16).save_pretrained(parent)
    child = extract(parent, "L3-w4", tmp_path / "child", max_shard_bytes=200_000)
    files = TensorFiles(child)
    assert len(files.shards) > 1
    assert (child / INDEX).is_file()
    assert {entry.dtype for entry in files.entries.values()} == {"BF16"}
    whole = extract(parent, "L3-w4", tmp_path / "whole")
    mine, theirs = load_model(child), load_model(whole)
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_elastic_mini_leaves_with_tokenizer_card_and_what_it_was_trained_for(
    tmp_path: Path,
) -> None:
    parent = BUNDLED / "elastic-mini"
    child = extract("elastic-mini", "L24-k2-w4-p8", tmp_path / "child")
    model, small = load_model(parent, dtype="float32"), load_model(child, dtype="float32")
    ids = tokens(1, 64, vocab_size=4096)
    want = model(ids, parse_name(model.shape, "L24-k2-w4-p8"))
    bound = 1e-4 * want.abs().amax()
    assert (small(ids, Subnet.full(small.shape)) - want).abs().amax() <= bound
    assert (their_logits(load_theirs(child), ids) - want).abs().amax() <= bound
    # A sub-network of the child is one of the parent.
    deeper = small(ids, parse_name(small.shape, "L12-k1-w2-p4"))
    want = model(ids, parse_name(model.shape, "L12-k1-w2-p4"))
    assert (deeper - want).abs().amax() <= 1e-4 * want.abs().amax()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (child / name).read_bytes() == (parent / name).read_bytes()
    assert "L24-k2-w4-p8" in (child / "README.md").read_text(encoding="utf-8")
    elastic = load_config(child).elastic
    assert elastic is not None
    assert elastic.width_granules == 4
    assert elastic.trained["depth"] == (6, 12, 18, 24)
    assert max(elastic.trained["top_k"]) == 2
    assert max(elastic.trained["width"]) == 4
    assert max(elastic.trained["pool"]) == 8
    assert str(elastic.parent).startswith("elastic-mini sha256:")


# What cannot leave


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "threshold": ("olmoe", {"sparsity_threshold": 0.5}, "a sparsity threshold"),
    "top-k-per-layer": ("mixtral", {"top_k": [1, 2, 3, 2]}, "top_k that differs"),
    "width-per-layer": ("qwen3_moe", {"expert_width": [8, 4, 8, 8]}, "expert_width that differs"),
    "pool-sizes": (
        "olmoe",
        {"expert_pool": [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2], [0, 1, 2]]},
        "pools of different sizes.*Use pools of one size",
    ),
    "scattered-dense-layers": (
        "ernie4_5_moe",
        {"active_layers": [1, 0, 2]},
        "active_layers must ascend",
    ),
}


@pytest.mark.parametrize(
    ("architecture", "values", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys()
)
def test_what_a_standard_configuration_cannot_say_is_refused_with_the_reason(
    architecture: str,
    values: dict[str, Any],
    message: str,
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    shape = load_config(saved(architecture)).shape
    with pytest.raises((ExtractError, RoutingError), match=message):
        extract(saved(architecture), resolve(shape, **values), tmp_path / "child")
    assert list(tmp_path.iterdir()) == []


def test_layers_that_no_ernie_configuration_can_place_are_refused(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    # Layers 1, 3 and 5 are dense: without layer 0, layers 2 and 4 become 1 and 3, which interval 2
    # says; without layer 3, experts are in 0, 2, 3, which nothing says.
    folder = saved("ernie4_5_moe", num_hidden_layers=6, moe_layer_start_index=0)
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert data["moe_layer_interval"] == 1
    shape = load_config(folder).shape
    dense_between = resolve(shape, active_layers=[0, 1, 2, 3, 4])
    extract(folder, dense_between, tmp_path / "fine")
    folder = saved("ernie4_5_moe", num_hidden_layers=6, moe_layer_interval=2)
    shape = load_config(folder).shape
    assert shape.moe_layers == {1, 3, 5}
    subnet = resolve(shape, active_layers=[0, 1, 3, 4, 5])
    with pytest.raises(ExtractError, match=r"layers \[1, 2, 4\] of the 5 that remain have experts"):
        extract(folder, subnet, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_a_selection_bias_needs_an_architecture_that_has_one(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ExtractError, match="olmoe has no selection bias"):
        extract(saved("olmoe"), "p4", tmp_path / "child", pool_as_bias=True)


def test_nothing_is_overwritten(saved: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "mine").write_text("precious")
    with pytest.raises(ExtractError, match="child exists and is not empty"):
        extract(saved("olmoe"), "L2", tmp_path / "child")
    assert [path.name for path in (tmp_path / "child").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    extract(saved("olmoe"), "L2", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_extraction_that_fails_leaves_nothing(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("elastic_moe.model.checkpoints.extract.write_config_json", fail)
    with pytest.raises(OSError, match="disk full"):
        extract(saved("olmoe"), "L2", tmp_path / "child")
    assert list(tmp_path.iterdir()) == []
