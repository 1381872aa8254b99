"""The C++ step computes what the model is: every architecture, dtype and instruction-set level.

The oracle is the PyTorch model in float64. An error may be twice that of the PyTorch model in the
kernel's own dtype, and a little rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from elastic_moe_kernels import native
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.step import CpuModel, StepResult
from torch import Tensor

from elastic_moe.model.pack import load_packed, pack_model
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.reference.transformer import ElasticTransformer
from elastic_moe.model.rotary import rotary_angles
from elastic_moe.routing import Subnet, resolve
from tests.kernels.compare import assert_same_bits
from tests.kernels.step.steps import as_tensors, table_of
from tests.model.random_models import TINY, tiny_model, tokens
from tests.model.transformers_models import ARCHITECTURES, VOCAB, their_model

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed")

IDS = tokens(1, 70, vocab_size=VOCAB)[0]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of transformers, as tests/model/transformers_models.py makes it."""
    path = tmp_path_factory.mktemp(request.param)
    their_model(request.param).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def run(
    model: CpuModel, config: object, ids: Tensor, subnet: Subnet, **options: object
) -> StepResult:
    """All logits of one sequence in one step."""
    model.set_angles(*rotary_angles(len(ids), config.head_dim, config.rope_theta))
    T, L = len(ids), config.num_layers
    per_layer = -(-T // 16)
    i32 = np.int32
    result = model.step(
        ids.numpy().astype(i32),
        np.arange(T, dtype=i32),
        np.zeros(T, dtype=i32),
        np.zeros(T, dtype=i32),
        table_of([subnet]),
        model.new_blocks(L * per_layer),
        np.arange(L * per_layer, dtype=i32).reshape(1, L, per_layer),
        np.arange(T, dtype=i32),
        **options,
    )
    return as_tensors(result)


def subnets_of(config: object) -> list[Subnet]:
    shape = config.shape
    return [
        Subnet.full(shape),
        resolve(shape, depth=2, top_k=1),
        resolve(shape, expert_width=[1, 2, 1, 2], sparsity_threshold=0.6),
        resolve(shape, active_layers=[0, 2, 3], expert_pool=[0, 2, 5, 7], top_k=2),
    ]


@pytest.mark.parametrize("level", native.levels())
def test_float32_logits_are_within_twice_the_error_of_pytorch(folder: Path, level: str) -> None:
    model = load_model(folder, dtype="float32")
    native = load_packed(folder, dtype="float32", level=level)
    exact = load_model(folder, dtype="float32").double()
    for subnet in subnets_of(model.config):
        want = exact(IDS.unsqueeze(0), subnet)[0]
        theirs = (model(IDS.unsqueeze(0), subnet)[0] - want).abs()
        ours = (run(native, model.config, IDS, subnet).logits - want).abs()
        assert want.std() > 1
        assert ours.max() <= 2 * theirs.max() + 1e-6 * want.abs().max(), subnet


@pytest.mark.parametrize("level", native.levels())
def test_bfloat16_logits_are_within_twice_the_error_of_pytorch(folder: Path, level: str) -> None:
    """The exact model has the rounded weights; both others round their inputs on top of that.

    Rounding turns the choice of an expert here and there, each in its own way, so rows are
    compared by the size that half of the errors have, not by the largest.
    """
    model = load_model(folder, dtype="bfloat16")
    native = load_packed(folder, dtype="bfloat16", level=level)
    exact = load_model(folder, dtype="bfloat16").double()
    exact.set_input_dtype(None)
    for subnet in subnets_of(model.config):
        want = exact(IDS.unsqueeze(0), subnet)[0]
        theirs = (model(IDS.unsqueeze(0), subnet)[0] - want).abs()
        ours = (run(native, model.config, IDS, subnet).logits - want).abs()
        assert 0 < ours.median() <= 2 * theirs.median(), subnet
        assert ours.mean() <= 2 * theirs.mean(), subnet


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_packed_from_memory_is_what_was_packed_from_the_file(
    folder: Path, dtype: str, level: str
) -> None:
    model = load_model(folder, dtype=dtype)
    subnet = Subnet.full(model.shape)
    stored = run(load_packed(folder, dtype=dtype, level=level), model.config, IDS, subnet)
    loaded = run(pack_model(model, level), model.config, IDS, subnet)
    assert torch.equal(stored.logits, loaded.logits)
    assert stored.counters == loaded.counters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_after_every_layer_are_those_of_the_model(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=torch.float32)
    model.set_input_dtype(torch.bfloat16 if dtype == torch.bfloat16 else None)
    subnet = resolve(TINY.shape, active_layers=[0, 2, 3])
    ids = tokens(1, 40)[0]
    result = run(pack_model(model), TINY, ids, subnet, states_after=range(6))
    want = {layers: x[0] for layers, x in model.states(ids.unsqueeze(0), subnet)}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for layers, x in want.items():
        assert (result.states[layers] - x).abs().max() <= tolerance * x.abs().max()
    # An idle layer is the identity, to the bit.
    assert torch.equal(result.states[2], result.states[1])
    assert torch.equal(result.states[5], result.states[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_head_of_a_stream_gives_the_bits_of_the_step(dtype: torch.dtype, rows: int) -> None:
    model = tiny_model(dtype=torch.float32, hidden_size=35, num_heads=2)
    model.set_input_dtype(torch.bfloat16 if dtype == torch.bfloat16 else None)
    native = pack_model(model)
    config = model.config
    result = run(native, config, tokens(1, rows)[0], Subnet.full(model.shape), states_after=[5])
    assert_same_bits(native.logits(result.states[0]), result.logits)


def test_experts_that_ran_are_those_that_the_model_chose() -> None:
    from elastic_moe.model.reference.transformer import Trace

    model, trace = tiny_model(dtype=torch.float32), Trace()
    subnet = resolve(TINY.shape, sparsity_threshold=0.5, active_layers=[0, 2, 3])
    ids = tokens(1, 40)[0]
    model.states(ids.unsqueeze(0), subnet)
    model(ids.unsqueeze(0), subnet, trace=trace)
    result = run(pack_model(model), TINY, ids, subnet, trace=True)
    for layer in trace.layers:
        assert torch.equal(result.topk_ids[layer.layer], layer.topk_ids)
    assert (result.topk_ids[1] == -1).all()
    assert result.counters.mean_experts == pytest.approx(trace.mean_experts())


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 37, "expert_hidden": 29, "elastic": None, "num_experts": 7},
        {"num_experts": 1, "max_top_k": 1},
        {"num_heads": 6, "num_kv_heads": 1},
        {"num_heads": 3, "num_kv_heads": 3, "head_dim": 2},
        {"head_dim": 40, "qk_norm": "all"},
        {"head_dim": 18, "qk_norm": "none", "rope": "interleaved"},
        {"dense_layers": frozenset({0, 3}), "dense_hidden": 45, "shared_hidden": 19},
        {"vocab_size": 16, "renormalize": False, "tied_embeddings": False},
        {"selection_bias": True, "expert_hidden": 520, "elastic": None},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.parametrize("level", native.levels())
def test_odd_shapes(changes: dict[str, object], level: str) -> None:
    model: ElasticTransformer = tiny_model(dtype=torch.float32, **changes)
    exact = tiny_model(dtype=torch.float64, **changes)
    config = model.config
    ids = tokens(1, 33, vocab_size=config.vocab_size)[0]
    subnet = Subnet.full(model.shape)
    want = exact(ids.unsqueeze(0), subnet)[0]
    theirs = (model(ids.unsqueeze(0), subnet)[0] - want).abs().max()
    ours = (run(pack_model(model, level), config, ids, subnet).logits - want).abs().max()
    assert ours <= 2 * theirs + 1e-6 * want.abs().max()


def test_sizes_that_the_kernels_do_not_take_are_refused() -> None:
    with pytest.raises(KernelError, match=r"head_dim must be even and in \[2, 512\], got 514"):
        pack_model(tiny_model(dtype=torch.float32, head_dim=514))
    with pytest.raises(KernelError, match="num_heads must be 1 to 64 times num_kv_heads"):
        pack_model(tiny_model(dtype=torch.float32, num_heads=65, num_kv_heads=1, head_dim=2))
