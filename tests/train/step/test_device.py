"""A step on another device keeps everything there, and waits for it once per layer.

The device is 'meta', which computes shapes alone: what is on the wrong device fails or is seen, and
so is each value that the host asks for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_moe.train.experts.gpu import attend_repeated
from elastic_moe.train.experts.mixed import attend_bfloat16
from elastic_moe.train.experts.padded import run_experts_padded
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.trainer import Trainer
from tests.train.tiny import CONFIG, PLAN, stream

COPIES = {"aten._to_copy.default", "aten.copy_.default"}


class Watch(TorchDispatchMode):
    """Counts copies to the device, and collects operations that mix it with the host."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.mixed: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        # A number may come from the host.
        if len({t.device for t in tensors if t.ndim}) > 1:
            self.copies += str(func) in COPIES
            if str(func) not in COPIES:
                self.mixed.append(str(func))
        return out


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each method asked a meta tensor for its values; it gets some that might be."""
    counts: Counter = Counter()
    answers = {
        "tolist": [200, 7, 16, 16],  # the longest expert, the last, the narrowest and widest
        "item": 1.0,
        "__float__": 1.0,
        "__int__": 1,
        "__bool__": True,
    }

    def answer(name: str, value: Any) -> Any:
        real = getattr(Tensor, name)

        def method(self: Tensor, *args: Any) -> Any:
            if self.device.type != "meta":
                return real(self, *args)
            counts[name] += 1
            return value

        return method

    for name, value in answers.items():
        monkeypatch.setattr(Tensor, name, answer(name, value))
    adam = torch.optim.AdamW  # has no fused kernel for this device
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, fused, **kw: adam(*args, foreach=fused, **kw)
    )
    return counts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"distill": 0.5},
        {"sandwich": True},
        {"split": 0.5},
        {"bias_rate": 0.1},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_step_stays_on_its_device_and_waits_once_per_layer(options: dict, waits: Counter) -> None:
    sampling = SamplingPlan(depth=0, top_k=1, width=0, pool=0, threshold=0, per_layer=1.0)
    stages = parse_stages("6x4x2x128")
    plan: TrainingPlan = replace(PLAN, stages=stages, sampling=sampling, **options)
    config = replace(CONFIG, selection_bias="bias_rate" in options)
    it = Trainer(config, plan, stream(), device="meta")
    for layer in it.model.layers:
        assert layer.mlp.run_experts is run_experts_padded
        in_low = options.get("dtype") == "bfloat16"
        assert layer.self_attn.attend is (attend_bfloat16 if in_low else attend_repeated)
    waits.clear()
    with Watch() as watch:
        it.train_step()
    assert watch.mixed == []
    passes = {"distill": 2, "sandwich": 3, "split": 2}.get(next(iter(options), ""), 1)
    assert waits["tolist"] == 6 * passes
    assert waits.total() - waits["tolist"] <= 5 + 2 * passes  # is the loss finite? what to log
    assert watch.copies <= 2 + 9 * passes  # the batch, and the tables of what runs


def test_heads_that_queries_share_may_be_repeated() -> None:
    generator = torch.Generator().manual_seed(0)
    results = []
    for attend in (F.scaled_dot_product_attention, attend_repeated):
        generator.manual_seed(0)
        q, k, v = (
            torch.randn(2, heads, 9, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)
        )
        out = attend(q, k, v, is_causal=True, enable_gqa=True)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
