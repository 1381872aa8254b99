"""One MoE layer after the other: moe_layer.py WHO THREADS SIZES [KERNEL]. Under WHO's own Python.

WHO is "ours" (.venv), "zentorch" (build/peers-zentorch), or some of transformers' expert
implementations with commas between (build/peers); SIZES is JSON. The layers' weights together are
larger than the caches and a cycle runs each once: they are cold. All contestants make the same
weights and inputs from the same seeds.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from benchmarks.peers.contestants.worker import layer_handlers, serve


class Layers:
    """Weights of each layer, gate_up (E, 2F, D) and down (E, D, F) bfloat16; inputs for all."""

    def __init__(self, layers: int, experts: int, top_k: int, hidden: int, channels: int) -> None:
        self.experts, self.top_k = experts, top_k
        self.hidden, self.channels, self.count = hidden, channels, layers
        self.x = torch.empty(0)
        self.ids: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def matrices(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(layer)
        E, D, F = self.experts, self.hidden, self.channels
        gate_up = torch.empty(E, 2 * F, D, dtype=torch.bfloat16)
        down = torch.empty(E, D, F, dtype=torch.bfloat16)
        for matrix in (gate_up, down):
            for part in matrix:
                part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
        return gate_up, down

    def prepare(self, rows: int) -> int:
        generator = torch.Generator().manual_seed(rows)
        self.x = torch.randn(rows, self.hidden, generator=generator).bfloat16()
        self.ids, self.weights = [], []
        for _ in range(self.count):
            scores = torch.randn(rows, self.experts, generator=generator).softmax(-1)
            weights, ids = torch.topk(scores, self.top_k)
            self.ids.append(ids.to(torch.int32))
            self.weights.append(weights)
        return self.count


class Ours:
    """The packed experts; `twice` runs the kernel again each time, to see that the bars notice."""

    def __init__(self, layers: Layers, twice: bool) -> None:
        from elastic_moe.lab.bench.layer import LayerWeights, NativeExperts

        self.layers, self.times = layers, 2 if twice else 1
        self.native, F = [], layers.channels
        for i in range(layers.count):
            gate_up, down = layers.matrices(i)
            parts = LayerWeights(gate_up[:, :F].contiguous(), gate_up[:, F:].contiguous(), down)
            self.native.append(NativeExperts(parts, threads=torch.get_num_threads()))
        self.out = torch.empty(0)
        self.inputs: list[Any] = []

    def prepare(self, rows: int, _: str = "") -> int:
        from elastic_moe.lab.bench.layer import LayerInputs, pad_rows

        layers = self.layers
        layers.prepare(rows)
        channels = torch.full((rows,), layers.channels, dtype=torch.int32)
        x = pad_rows(layers.x)
        self.inputs = [
            LayerInputs(x, ids, weights, channels)
            for ids, weights in zip(layers.ids, layers.weights, strict=True)
        ]
        self.out = torch.zeros(rows, layers.hidden)
        return layers.count

    def run(self, layer: int) -> torch.Tensor:
        for _ in range(self.times):
            self.native[layer](self.inputs[layer], self.out)
        return self.out

    def result(self, layer: int) -> np.ndarray:
        self.out.zero_()
        return self.native[layer](self.inputs[layer], self.out).numpy()

    def work(self, rows: int) -> dict[str, Any]:
        """Bytes and FLOPs per layer, on average, as our kernel counts them."""
        self.prepare(rows)
        touched = flops = 0
        for i, native in enumerate(self.native):
            self.result(i)
            touched += native.weight_bytes
            flops += native.flops
        count = self.layers.count
        return {"touched_bytes": touched / count, "flops": flops / count}

    def exact(self, rows: int, path: str) -> None:
        """Save (layers, T, D): the same weights and inputs in float32 arithmetic."""
        self.layers.prepare(rows)
        F, outputs = self.layers.channels, []
        for i in range(self.layers.count):
            gate_up, down = self.layers.matrices(i)
            x, out = self.layers.x.float(), torch.zeros(rows, self.layers.hidden)
            for e in range(self.layers.experts):
                row, slot = (self.layers.ids[i] == e).nonzero(as_tuple=True)
                gate, up = (x[row] @ gate_up[e].float().T).tensor_split([F], dim=1)
                y = (torch.nn.functional.silu(gate) * up) @ down[e].float().T
                out.index_add_(0, row, y * self.layers.weights[i][row, slot, None])
            outputs.append(out.numpy())
        np.save(path, np.stack(outputs))


class Zentorch:
    """zentorch's fused MoE op on the same weights."""

    def __init__(self, layers: Layers) -> None:
        import zentorch  # noqa: F401  (registers the op)

        self.layers = layers
        self.matrices = [layers.matrices(i) for i in range(layers.count)]
        self.out = torch.empty(0)

    def prepare(self, rows: int, _: str) -> int:
        self.layers.prepare(rows)
        self.out = torch.empty_like(self.layers.x)
        return self.layers.count

    def run(self, layer: int) -> torch.Tensor:
        gate_up, down = self.matrices[layer]
        weights, ids = self.layers.weights[layer], self.layers.ids[layer]
        torch.ops.zentorch.zentorch_fused_moe(
            self.out, self.layers.x, gate_up, down, None, None, weights, ids, False, "silu"
        )
        return self.out

    def result(self, layer: int) -> np.ndarray:
        return self.run(layer).float().numpy()


class Transformers:
    """`OlmoeExperts` under transformers' implementations."""

    def __init__(self, layers: Layers) -> None:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        self.layers = layers
        self.config = OlmoeConfig(
            hidden_size=layers.hidden,
            intermediate_size=layers.channels,
            num_experts=layers.experts,
            num_experts_per_tok=layers.top_k,
        )
        self.modules = []
        for i in range(layers.count):
            with torch.device("meta"):
                module = OlmoeExperts(self.config)
            gate_up, down = layers.matrices(i)
            module.load_state_dict({"gate_up_proj": gate_up, "down_proj": down}, assign=True)
            self.modules.append(module.requires_grad_(False).eval())
        self.ids: list[torch.Tensor] = []

    def prepare(self, rows: int, who: str) -> int:
        self.config._experts_implementation = who.removeprefix("transformers ")
        self.layers.prepare(rows)
        self.ids = [ids.long() for ids in self.layers.ids]
        return self.layers.count

    def run(self, layer: int) -> torch.Tensor:
        with torch.inference_mode():
            out: torch.Tensor = self.modules[layer](
                self.layers.x, self.ids[layer], self.layers.weights[layer]
            )
            return out

    def result(self, layer: int) -> np.ndarray:
        return self.run(layer).float().numpy()


def identify() -> dict[str, Any]:
    """Backend, level, machine and commit of our side."""
    from elastic_moe_kernels import native

    from elastic_moe.lab.provenance import describe_commit, describe_machine

    return {
        "backend": "cpu",
        "level": native.level(),
        "machine": describe_machine(torch.get_num_threads()),
        "commit": describe_commit(),
    }


def main() -> None:
    who, threads, sizes = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    layers = Layers(**json.loads(sizes))
    if who == "ours":
        ours = Ours(layers, twice=sys.argv[4:] == ["experts"])
        handlers = layer_handlers(ours)
        handlers |= {"work": ours.work, "exact": ours.exact, "identify": identify}
        serve(handlers, {"torch": torch.__version__})
    elif who == "zentorch":
        serve(layer_handlers(Zentorch(layers)), {"zentorch": version("zentorch")})
    else:
        serve(layer_handlers(Transformers(layers)), {"transformers": version("transformers")})


main()
