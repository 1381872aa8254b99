"""Model shapes whose costs are known by hand, and random ones with choices of their axes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from elastic_moe.routing import ModelShape
from elastic_moe.routing.axes import (
    MIN_EXPERTS,
    PER_LAYER,
    POOL,
    THRESHOLD,
    TOP_K,
    WIDTH,
    Axis,
)

# The bundled model: Qwen3-MoE, tied embeddings, a query and key norm per head.
MINI = ModelShape(
    num_layers=48,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=4096,
    num_experts=16,
    max_top_k=4,
    expert_hidden=64,
    moe_layers=frozenset(range(48)),
    width_granules=8,
    qk_norm="head",
    tied_embeddings=True,
)

# The standard case of the benchmarks: OLMoE, whose query and key norms span all heads.
OLMOE = ModelShape(
    num_layers=8,
    hidden_size=1024,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    vocab_size=32000,
    num_experts=64,
    max_top_k=8,
    expert_hidden=512,
    moe_layers=frozenset(range(8)),
    qk_norm="all",
)

# A dense first layer and a shared expert, small enough to count on paper.
MIXED = ModelShape(
    num_layers=3,
    hidden_size=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=10,
    num_experts=4,
    max_top_k=2,
    expert_hidden=6,
    moe_layers=frozenset({1, 2}),
    width_granules=3,
    dense_hidden=5,
    shared_hidden=2,
)


@st.composite
def shapes(draw: st.DrawFn, moe: bool = False) -> ModelShape:
    """Any small model; some have dense layers, and without `moe` even only such."""
    num_layers = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 6))
    granules = draw(st.integers(1, 4))
    some = st.frozensets(st.integers(0, num_layers - 1), min_size=1 if moe else 0)
    return ModelShape(
        num_layers=num_layers,
        hidden_size=draw(st.integers(1, 8)),
        num_heads=draw(st.integers(1, 4)),
        num_kv_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 20)),
        num_experts=num_experts,
        max_top_k=draw(st.integers(1, num_experts)),
        expert_hidden=granules * draw(st.integers(1, 4)),
        moe_layers=draw(some),
        width_granules=granules,
        dense_hidden=draw(st.integers(0, 8)),
        shared_hidden=draw(st.integers(0, 8)),
        qk_norm=draw(st.sampled_from(["none", "head", "all"])),
        tied_embeddings=draw(st.booleans()),
    )


# The axes that the strategies below do not draw one by one.
ADDED = [axis for axis in PER_LAYER if axis not in (TOP_K, MIN_EXPERTS, WIDTH, THRESHOLD, POOL)]


def reduced(axis: Axis, shape: ModelShape) -> Any:
    """A value that is not full, where the model has one; of a set how many members."""
    most = axis.most(shape)
    if axis.kind == "real":
        return most / 4 if most / 4 != axis.full else most / 2
    return max(1, most // 2) if axis.full is None else min(2, most)


def in_layer(axis: Axis, value: Any) -> Any:
    """A value as `LayerSubnet` holds it."""
    return tuple(range(value)) if axis.kind == "set" else value


def full_of_added(shape: ModelShape) -> dict[str, Any]:
    return {axis.name: in_layer(axis, axis.whole(shape)) for axis in ADDED}


def of_axis(axis: Axis, shape: ModelShape) -> st.SearchStrategy[Any]:
    most = axis.most(shape)
    if axis.kind == "real":
        return st.floats(0, most, width=32, exclude_min=axis.above_zero)
    count = st.integers(1, most)
    return count.map(lambda n: list(range(n))) if axis.kind == "set" else count


def of_added(shape: ModelShape) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({axis.name: of_axis(axis, shape) for axis in ADDED})


def thresholds() -> st.SearchStrategy[float]:
    """Thresholds as people write them, and any float32."""
    return st.integers(0, 20).map(lambda n: n / 20) | st.floats(0, 1, width=32)


@st.composite
def choices(draw: st.DrawFn, shape: ModelShape) -> dict[str, Any]:
    """Arguments of `resolve` with one value per axis: what a name can say."""
    pool = draw(st.integers(1, shape.num_experts))
    top_k = draw(st.integers(1, min(pool, shape.max_top_k)))
    choice: dict[str, Any] = {
        "top_k": top_k,
        "min_experts": draw(st.integers(1, top_k)),
        "expert_width": draw(st.integers(1, shape.width_granules)),
        "sparsity_threshold": draw(thresholds()),
        "expert_pool": pool,
        **draw(of_added(shape)),
    }
    if draw(st.booleans()):
        return {"depth": draw(st.integers(1, shape.num_layers)), **choice}
    some = st.sets(st.integers(0, shape.num_layers - 1), min_size=1)
    return {"active_layers": sorted(draw(some)), **choice}


@st.composite
def rows(draw: st.DrawFn, shape: ModelShape) -> dict[str, Any]:
    """The values of one layer; the pool lists ids in any order."""
    pool = draw(st.lists(st.integers(0, shape.num_experts - 1), min_size=1, unique=True))
    top_k = draw(st.integers(1, min(len(pool), shape.max_top_k)))
    return {
        "top_k": top_k,
        "min_experts": draw(st.integers(1, top_k)),
        "expert_width": draw(st.integers(1, shape.width_granules)),
        "sparsity_threshold": draw(st.sampled_from([0.0, 0.5, 0.7])),
        "expert_pool": pool,
        **draw(of_added(shape)),
    }


@st.composite
def tables(
    draw: st.DrawFn, shape: ModelShape, palette: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Arguments of `resolve` with one value per layer; every layer takes a row of the palette."""
    L = shape.num_layers
    palette = palette or draw(st.lists(rows(shape), min_size=1, max_size=3))
    used = [palette[i] for i in draw(_sequences(st.integers(0, len(palette) - 1), L))]
    active = draw(_sequences(st.booleans(), L).filter(any))
    return {
        "active_layers": [i for i in range(L) if active[i]],
        **{axis: [row[axis] for row in used] for axis in palette[0]},
    }


def _sequences(values: st.SearchStrategy[Any], count: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=count, max_size=count)
