"""A model in training: its steps, of one sub-network or several, and its state.

Everything random in a step depends on (seed, step) alone, so a run that is killed and resumed on a
CPU goes through the same states as one that was not, given as many threads: what else it takes to
do without those is `Trainer.any_threads`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.errors import TrainingError
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.routing import Subnet
from elastic_moe.train.experts import native
from elastic_moe.train.experts.gpu import use_gpu
from elastic_moe.train.experts.grouped import use_grouped
from elastic_moe.train.experts.mixed import use_bfloat16
from elastic_moe.train.step.balance import Loads, expert_loads, move_biases
from elastic_moe.train.step.loss import HeadLoss, balance_loss, head_loss
from elastic_moe.train.step.optim import Muon
from elastic_moe.train.step.plan import TrainingPlan, completed
from elastic_moe.train.step.state import (
    check_parent,
    check_same_run,
    load_state,
    machine_change,
    model_to_json,
    save_state,
)
from elastic_moe.train.text.tokens import TokenStream

_LOWER = "Lower the rates: start again in another folder with a smaller --lr-scale."


@dataclass(frozen=True, slots=True, eq=False)
class PassResult:
    """Of one sub-network's forward and backward pass; `distilled`: it had a teacher."""

    subnet: Subnet
    weight: float
    loss: HeadLoss
    balance: Tensor
    loads: Loads
    distilled: bool


class Trainer:
    """A model, its optimisers and its place in the plan.

    Attributes:
        device: where all tensors live; a run may resume on another.
        backend: "cpu" where steps run on the C++ kernels, "reference" for PyTorch; "auto" takes the
            former where it can. Their results differ in the last bits.
        parent: a name of the weights that the run started with, as given to `adopt`;
            None for random ones.

    Raises:
        TrainingError: the model cannot follow the plan.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: TrainingPlan,
        stream: TokenStream,
        device: str | torch.device = "cpu",
        backend: str = "auto",
    ) -> None:
        plan.check_model(config)
        self.config, self.plan, self.stream = config, plan, stream
        self.device = torch.device(device)
        self.backend = native.choose_backend(backend, config, self.device, plan.dtype)
        self.model = ElasticTransformer(config)
        initialize(self.model, plan.seed)
        self.model.to(self.device)
        if self.device.type == "cpu":
            use_grouped(self.model)
        else:
            use_gpu(self.model)
        self.head_dtype: torch.dtype | None = None
        if plan.dtype == "bfloat16":
            self.head_dtype = torch.bfloat16
            use_bfloat16(self.model)
        muon: list[nn.Parameter] = []
        adam: list[nn.Parameter] = []
        for name, p in self.model.named_parameters():
            if name.endswith("correction_bias"):
                continue  # has no gradient: `move_biases` trains it, if the plan says so
            hidden = p.ndim >= 2 and not name.endswith(("embed_tokens.weight", "mlp.gate.weight"))
            (muon if hidden else adam).append(p)
        self._by_muon = {id(p) for p in muon}
        self.muon = Muon(
            muon,
            lr=plan.muon_lr,
            weight_decay=plan.weight_decay,
            native=self.backend == "cpu" and native.can_step(muon),
        )
        self.adam = torch.optim.AdamW(
            adam, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.step = 0
        self.piece = 0
        self.tokens = 0
        self.parent: str | None = None

    def adopt(self, weights: Mapping[str, Tensor], parent: str) -> None:
        """Begin with given weights, and optimisers that know nothing of how they came about.

        Args:
            weights: every parameter, named and shaped as in `self.model`, in any dtype.
            parent: says which weights they are, such as their sha256. Every state says it, and a
                run that is resumed must adopt the same.

        Raises:
            TrainingError: a step is done already, or a weight is missing, unknown or misshapen.
        """
        if self.step:
            raise TrainingError(
                f"weights must be adopted before the first step, got step {self.step}. "
                f"Begin another run."
            )
        own = dict(self.model.named_parameters())
        for name in [*own, *weights]:
            if name not in weights or name not in own:
                what = "is missing from" if name in own else "is unknown, but among"
                raise TrainingError(f"parameter {name!r} {what} the weights of {parent!r}.")
            if weights[name].shape != own[name].shape:
                raise TrainingError(
                    f"parameter {name!r} must have shape {tuple(own[name].shape)}, got "
                    f"{tuple(weights[name].shape)} in the weights of {parent!r}. "
                    f"Train with the configuration that they belong to."
                )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(weights[name])
        self.parent = parent

    def forward(self, inputs: Tensor, subnet: Subnet) -> tuple[Tensor, Tensor, Loads]:
        """Run one sub-network on inputs (B, T).

        Returns:
            states (B*T, D) after the final norm, the balance loss (a scalar, summed over layers),
            and what each expert had to do.
        """
        if self.backend == "cpu":
            x, balance, trace = native.last_state(self.model, inputs, subnet)
            return self.model.norm(x).flatten(0, 1), balance, expert_loads(trace)
        trace = Trace()
        states = self.model.norm(self.model.last_state(inputs, subnet, trace=trace)).flatten(0, 1)
        loads = expert_loads(trace)
        return states, balance_loss(trace, subnet, loads), loads

    def train_step(self) -> dict[str, Any]:
        """Run one step; returns what to log."""
        plan, stage, scale = self.plan, self.plan.stage(self.step), self.plan.lr_scale(self.step)
        arrays = self.stream.batch(self.piece, stage.pieces, stage.length)
        inputs, targets = (torch.from_numpy(array).to(self.device) for array in arrays)
        results = self._gradients(inputs, targets)
        norm = float(nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], plan.clip))
        if not math.isfinite(norm):
            raise TrainingError(f"step {self.step}: the norm of the gradient is {norm}. {_LOWER}")
        self.muon.param_groups[0]["lr"] = plan.muon_lr * scale
        self.adam.param_groups[0]["lr"] = plan.adam_lr * scale
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if plan.bias_rate:
            for one in results:
                move_biases(self.model, one.loads, one.subnet, plan.bias_rate * one.weight)
        self.step += 1
        self.piece += stage.pieces
        self.tokens += targets.numel()
        first, *others = results
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": round(first.loss.cross_entropy.item(), 4),
            "balance": round(first.balance.item() / max(1, len(first.loads.layers)), 3),
            "grad_norm": round(norm, 3),
            "lr_scale": round(scale, 4),
            "layers": stage.layers,
            "subnet": first.subnet.name,
            "mean_experts": round(first.loads.mean_experts(), 3),
        }
        distances = [one.loss.distance.item() for one in results if one.distilled]
        if distances:
            record["distilled"] = round(sum(distances) / len(distances), 4)
        if others:
            kind = "sandwich" if plan.sandwich else "split"
            record[kind] = [one.subnet.name for one in others]
            losses = [one.loss.cross_entropy.item() for one in others]
            record[f"{kind}_loss"] = [round(loss, 4) for loss in losses]
        if self.parent is not None and self.step == 1:
            record["parent"] = self.parent  # the optimisers started anew here
        return record

    def _gradients(self, inputs: Tensor, targets: Tensor) -> list[PassResult]:
        """Add up the gradients of every sub-network of the step, by the weights of their losses."""
        plan, shape = self.plan, self.config.shape
        whole = plan.whole(shape, self.step)
        taught: tuple[slice, Tensor] | None = None  # the full network's states on these rows
        results = []
        for one in plan.passes(shape, self.step):
            distilled = plan.distill > 0 and one.subnet != whole
            if distilled and (taught is None or taught[0] != one.rows):
                with torch.no_grad():
                    taught = one.rows, self.forward(inputs[one.rows], whole)[0]
            states, balance, loads = self.forward(inputs[one.rows], one.subnet)
            loss = head_loss(
                states,
                self.model.embed_tokens.weight,
                targets[one.rows].flatten(),
                teacher=taught[1] if distilled and taught is not None else None,
                share=plan.distill,
                dtype=self.head_dtype,
                native=self.backend == "cpu",
            )
            if not torch.isfinite(loss.total):
                raise TrainingError(f"step {self.step}: the loss is {loss.total.item()}. {_LOWER}")
            torch.autograd.backward((loss.total + plan.balance * balance) * one.weight)
            if one.subnet == whole:
                taught = one.rows, states.detach()
            results.append(
                PassResult(one.subnet, one.weight, loss, balance.detach(), loads, distilled)
            )
        return results

    def save(self, path: Path) -> None:
        """Write the whole state; a kill at any moment leaves the old file or the new one.

        Raises:
            TrainingError: a weight is not finite, or the file cannot be written; the old one stays.
        """
        self._check_finite(path)
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for key, value in self._optimizer(p).state.get(p, {}).items():
                tensors[f"optim.{key}.{name}"] = value
        counts = {"step": self.step, "piece": self.piece, "tokens": self.tokens}
        session = {"parent": self.parent, **self._machine()}
        save_state(path, tensors, {**counts, **session, **self.identity()})

    def _check_finite(self, path: Path) -> None:
        named = list(self.model.named_parameters())
        largest = torch._foreach_norm([p.detach() for _, p in named], math.inf)
        if bool(torch.stack(largest).isfinite().all()):
            return
        first = next(n for (n, _), x in zip(named, largest, strict=True) if not x.isfinite())
        raise TrainingError(
            f"step {self.step}: {first} has numbers that are not finite, so {path} is left as it "
            f"was. {_LOWER}"
        )

    def identity(self) -> dict[str, Any]:
        """What decides the states that a run goes through, as JSON gives it back."""
        stream = self.stream
        data = {"source": stream.source, "bos": stream.bos, "order": stream.seed}
        plan = json.loads(json.dumps(self.plan.to_json()))
        return {"plan": plan, "model": model_to_json(self.config), "data": data}

    @property
    def any_threads(self) -> bool:
        """Whether steps have the same bits on any number of threads.

        Those of the C++ kernels do; a teacher's head and the modules of PyTorch do not.
        """
        return self.backend == "cpu" and not self.plan.distill

    def load(self, path: Path) -> str | None:
        """Continue from a state that `save` wrote with the same plan, model, data and parent.

        Returns:
            A line on backend, device or threads, if they changed in a way that may change the last
            bits of steps.
        """
        tensors, progress = load_state(path)
        progress["plan"] = completed(progress["plan"], str(path))
        check_same_run(path, progress, self.identity())
        check_parent(path, progress, self.parent)
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optim":
                field, _, name = rest.partition(".")
                states.setdefault(name, {})[field] = tensor.to(self.device)
        for name, p in self.model.named_parameters():
            with torch.no_grad():
                p.copy_(tensors[f"model.{name}"])
            if name in states:
                self._optimizer(p).state[p] = states[name]
        self.step, self.piece = progress["step"], progress["piece"]
        self.tokens = progress["tokens"]
        any_threads = self.any_threads or self.device.type != "cpu"
        return machine_change(progress, self._machine(), any_threads=any_threads)

    def _machine(self) -> dict[str, Any]:
        """What steps run on, which may change their last bits and nothing else."""
        threads = torch.get_num_threads()
        return {"backend": self.backend, "device": self.device.type, "threads": threads}

    def _optimizer(self, p: nn.Parameter) -> torch.optim.Optimizer:
        """The one that a parameter belongs to, if any does."""
        return self.muon if id(p) in self._by_muon else self.adam


def initialize(model: ElasticTransformer, seed: int) -> None:
    """Random weights; every output projection is zero, so a layer starts as the identity. So is
    every correction bias: no expert is preferred.

    The embeddings are large enough to be heard in the residual stream; the small gain of the final
    norm makes up for it where they serve as the head.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight", "correction_bias")):
            nn.init.zeros_(p)
        elif p.ndim == 1:
            nn.init.constant_(p, 0.2 if name == "norm.weight" else 1.0)
        elif name.endswith("mlp.gate.weight"):
            nn.init.normal_(p, std=0.02, generator=generator)
        elif name.endswith("embed_tokens.weight"):
            nn.init.normal_(p, std=0.1, generator=generator)
        else:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
