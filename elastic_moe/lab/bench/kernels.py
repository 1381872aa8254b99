"""A user's own expert kernel beside ours and the reference, on a layer of a checkpoint."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from elastic_moe_kernels import native
from torch import Tensor
from torch.nn import functional

from elastic_moe.errors import BenchmarkError, RequestError
from elastic_moe.lab.bench.layer import LayerInputs, LayerWeights, NativeExperts, pad_rows
from elastic_moe.lab.bench.limits import LimitsProbe
from elastic_moe.lab.bench.speed import Spread
from elastic_moe.lab.load import LoadMonitor
from elastic_moe.model.reference.moe import MoE, run_experts
from elastic_moe.model.reference.transformer import DecoderLayer, ElasticTransformer

# (x, topk_ids, topk_weights, gate, up, down) -> out, see `load_kernel`.
ExpertKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
ROWS, QUICK_ROWS = (1, 16, 64, 512), (1, 16)
ROUNDS, QUICK_ROUNDS, CALLS = 5, 2, 2
ERROR_FLOOR = 1e-3


def load_kernel(name: str) -> ExpertKernel:
    """The function that `module:function` names.

    It is called with x (T, D) and gate, up (E, F, D), down (E, D, F) in the checkpoint's dtype,
    topk_ids (T, K) int32 in [0, E) and topk_weights (T, K) float32, all on the CPU and contiguous,
    and returns (T, D), in any floating dtype: for every token, the sum over its experts of
    weight x down(silu(gate x) * (up x)).

    Raises:
        RequestError: there is no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise RequestError(f"--kernel must be MODULE:FUNCTION, such as mine:experts, got {name!r}.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RequestError(
            f"--kernel {name}: {error}. The module is looked for in the current folder and in this "
            f"Python's packages."
        ) from error
    kernel: object = getattr(module, function_name, None)
    if not callable(kernel):
        raise RequestError(f"--kernel {name}: {module.__file__} has no function {function_name!r}.")
    found: ExpertKernel = kernel
    return found


def plain_experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """As a user would write it in PyTorch, every product in the inputs' dtype."""
    out = torch.zeros_like(x)
    for expert in sorted(set(topk_ids.flatten().tolist())):
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        h = functional.silu(x[rows] @ gate[expert].T) * (x[rows] @ up[expert].T)
        y = (h @ down[expert].T) * topk_weights[rows, slots, None].to(x.dtype)
        out.index_add_(0, rows, y)
    return out


def bench_kernel(
    model: ElasticTransformer,
    kernel: ExpertKernel,
    *,
    quick: bool = False,
    threads: int | None = None,
    load: LoadMonitor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time a kernel on the experts of the model's first layer that routes.

    Everybody computes the same routing of the same random inputs, in turns.

    Args:
        threads: of ours; those of PyTorch are the caller's to set.
        load: read before each measurement.
        progress: called with (numbers of rows done, all).

    Returns:
        A record for each number of rows: milliseconds of `yours`, `ours` (None where the C++
        kernels are missing) and `reference`, in the median, fastest and slowest round; bytes of the
        experts that ran; errors against float64.

    Raises:
        BenchmarkError: the kernel raises, or its result is wrong.
    """
    weights = first_experts(model)
    contestants: dict[str, Callable[[LayerInputs], Tensor]] = {
        "yours": lambda i: _call(kernel, i, weights),
        "reference": lambda i: run_experts(
            i.x.float(), i.topk_ids, i.topk_weights, i.channels, _stacked(model), model.input_dtype
        ),
    }
    if not native.missing():
        ours = NativeExperts(weights, threads=threads)
        contestants["ours"] = lambda i: ours(i, torch.zeros(i.x.shape))
    dtype = str(weights.gate.dtype).removeprefix("torch.")
    probe = LimitsProbe(dtype, read_bytes=1 << 27, threads=threads)
    rows_to_do = QUICK_ROWS if quick else ROWS
    records = []
    for done, rows in enumerate(rows_to_do):
        inputs = _inputs(model, rows, weights.gate.dtype)
        errors = _check(contestants, inputs, weights, model)
        used = len(set(inputs.topk_ids.flatten().tolist()))
        each = sum(part[0].nbytes for part in (weights.gate, weights.up, weights.down))
        limits = probe.measure()
        seconds = _time(contestants, inputs, QUICK_ROUNDS if quick else ROUNDS, load)
        records.append(
            {
                "rows": rows,
                "experts_used": used,
                "weight_bytes": used * each,
                **{
                    f"milliseconds{end}": {
                        name: 1e3 * getattr(seconds[name], figure) if name in seconds else None
                        for name in ("yours", "ours", "reference")
                    }
                    for end, figure in (("", "median"), ("_min", "min"), ("_max", "max"))
                },
                "errors": errors,
                "limits": limits.to_json(),
            }
        )
        if progress is not None:
            progress(done + 1, len(rows_to_do))
    return records


def first_experts(model: ElasticTransformer) -> LayerWeights:
    """The experts of the first layer that routes, in the dtype of matrix inputs."""
    experts = _stacked(model)
    dtype = model.input_dtype or torch.float32
    return LayerWeights(
        *(
            part.detach().to(dtype).contiguous()
            for part in (experts.gate_proj, experts.up_proj, experts.down_proj)
        )
    )


def _stacked(model: ElasticTransformer) -> Any:
    for layer in model.layers:
        if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MoE):
            return layer.mlp.experts
    raise BenchmarkError("the model has no layer with experts, so there is nothing to time.")


def _inputs(model: ElasticTransformer, rows: int, dtype: torch.dtype) -> LayerInputs:
    """Random rows, each with experts drawn evenly."""
    config = model.config
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(rows, config.num_experts, generator=generator).softmax(-1)
    weights, ids = scores.topk(config.max_top_k)
    return LayerInputs(
        pad_rows(torch.randn(rows, config.hidden_size, generator=generator).to(dtype)),
        ids.to(torch.int32),
        weights.contiguous(),
        torch.full((rows,), config.expert_hidden, dtype=torch.int32),
    )


def _call(kernel: ExpertKernel, inputs: LayerInputs, weights: LayerWeights) -> Tensor:
    x = inputs.x.contiguous()
    return kernel(x, inputs.topk_ids, inputs.topk_weights, weights.gate, weights.up, weights.down)


def _check(
    contestants: dict[str, Callable[[LayerInputs], Tensor]],
    inputs: LayerInputs,
    weights: LayerWeights,
    model: ElasticTransformer,
) -> dict[str, float]:
    """Errors against float64, which may be twice that of plain PyTorch in the same dtype."""
    exact = run_experts(
        inputs.x.double(), inputs.topk_ids, inputs.topk_weights, inputs.channels, _stacked(model)
    )

    def error(got: Tensor) -> float:
        return float((got - exact).square().mean().div(exact.square().mean()).sqrt())

    allowed = ERROR_FLOOR + 2 * error(_call(plain_experts, inputs, weights).double())
    errors = {}
    for name, call in contestants.items():
        try:
            out = call(inputs)
        except Exception as problem:
            if name != "yours":
                raise
            raise BenchmarkError(
                f"the kernel raised {type(problem).__name__} for {len(inputs.x)} rows: {problem}"
            ) from problem
        if not isinstance(out, Tensor) or out.shape != exact.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise BenchmarkError(f"{name}: the result must be {tuple(exact.shape)}, got {got}.")
        errors[name] = error(out.double())
        if not errors[name] <= allowed:
            raise BenchmarkError(
                f"{name}: wrong for {len(inputs.x)} rows: the error against float64 is "
                f"{errors[name]:.3g} of the result's size, at most {allowed:.3g} is allowed (twice "
                f"that of plain PyTorch in {inputs.x.dtype}). Nothing was timed."
            )
    return errors


def _time(
    contestants: dict[str, Callable[[LayerInputs], Tensor]],
    inputs: LayerInputs,
    rounds: int,
    load: LoadMonitor | None,
) -> dict[str, Spread]:
    """Seconds of the faster of two calls, over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            if load is not None:
                load.read()
            seconds[name].append(min(_seconds(call, inputs) for _ in range(CALLS)))
    return {name: Spread.of(kept) for name, kept in seconds.items()}


def _seconds(call: Callable[[LayerInputs], Tensor], inputs: LayerInputs) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        call(inputs)
        return time.perf_counter() - start
