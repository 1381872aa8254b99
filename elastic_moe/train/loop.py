"""The training loop: one sub-network a step, a schedule of stages, exact resume.

Everything random in a step depends on (seed, step) alone, so a run that is killed and resumed
goes through the same states as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_moe.errors import TrainingError
from elastic_moe.files import write_text
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.moe import MoE
from elastic_moe.model.transformer import ElasticTransformer, Trace
from elastic_moe.train.checkpoint import check_same_run, load_state, model_to_json, save_state
from elastic_moe.train.grouped import run_experts_grouped
from elastic_moe.train.loss import balance_loss, head_loss
from elastic_moe.train.optim import Muon
from elastic_moe.train.plan import TrainingPlan
from elastic_moe.train.progress import Progress
from elastic_moe.train.tokens import TokenStream


def initialize(model: ElasticTransformer, seed: int) -> None:
    """Random weights; every output projection is zero, so a layer starts as the identity.

    The embeddings are large enough to be heard in the residual stream; the small gain of the final
    norm makes up for it where they serve as the head.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj")):
            nn.init.zeros_(p)
        elif p.ndim == 1:
            nn.init.constant_(p, 0.2 if name == "norm.weight" else 1.0)
        elif name.endswith("mlp.gate.weight"):
            nn.init.normal_(p, std=0.02, generator=generator)
        elif name.endswith("embed_tokens.weight"):
            nn.init.normal_(p, std=0.1, generator=generator)
        else:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)


class Trainer:
    """A model, its optimisers and its place in the plan."""

    def __init__(self, config: ModelConfig, plan: TrainingPlan, stream: TokenStream) -> None:
        plan.check(config.num_layers)
        if not config.tied_embeddings:
            raise TrainingError(
                "tied_embeddings must be True, got False: training uses the embeddings as the "
                "head, and a head of its own would stay random. Tie them in the configuration."
            )
        self.config, self.plan, self.stream = config, plan, stream
        self.model = ElasticTransformer(config)
        initialize(self.model, plan.seed)
        for module in self.model.modules():
            if isinstance(module, MoE):
                module.run_experts = run_experts_grouped
        muon: list[nn.Parameter] = []
        adam: list[nn.Parameter] = []
        for name, p in self.model.named_parameters():
            hidden = p.ndim >= 2 and not name.endswith(("embed_tokens.weight", "mlp.gate.weight"))
            (muon if hidden else adam).append(p)
        self.muon = Muon(muon, lr=plan.muon_lr, weight_decay=plan.weight_decay)
        self.adam = torch.optim.AdamW(
            adam, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.step = 0
        self.piece = 0
        self.tokens = 0

    def train_step(self) -> dict[str, Any]:
        """Run one step; returns what to log."""
        plan, stage = self.plan, self.plan.stage(self.step)
        subnet = plan.subnet(self.config.shape, self.step)
        scale = plan.lr_scale(self.step)
        self.muon.param_groups[0]["lr"] = plan.muon_lr * scale
        self.adam.param_groups[0]["lr"] = plan.adam_lr * scale
        inputs, targets = self.stream.batch(self.piece, stage.pieces, stage.length)
        trace = Trace()
        x = self.model.last_state(torch.from_numpy(inputs), subnet, trace=trace)
        states = self.model.norm(x).flatten(0, 1)
        loss = head_loss(
            states, self.model.embed_tokens.weight, torch.from_numpy(targets).flatten()
        )
        balance = balance_loss(trace, subnet)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.step}: the loss is {loss.item()}. Lower the rates: begin again in "
                f"another folder with a smaller --lr-scale."
            )
        torch.autograd.backward(loss + plan.balance * balance)
        norm = nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], plan.clip)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        self.step += 1
        self.piece += stage.pieces
        self.tokens += targets.size
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": round(loss.item(), 4),
            "balance": round(balance.item() / max(1, len(trace.layers)), 3),
            "grad_norm": round(float(norm), 3),
            "lr_scale": round(scale, 4),
            "layers": stage.layers,
            "subnet": subnet.name,
        }

    def save(self, path: Path) -> None:
        """Write the whole state; a kill at any moment leaves the old file or the new one."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for optimizer in (self.muon, self.adam):
                for key, value in optimizer.state.get(p, {}).items():
                    tensors[f"optim.{key}.{name}"] = value
        counts = {"step": self.step, "piece": self.piece, "tokens": self.tokens}
        save_state(path, tensors, {**counts, **self.identity()})

    def identity(self) -> dict[str, Any]:
        """What decides the states that a run goes through, as JSON gives it back."""
        stream = self.stream
        data = {"source": stream.source, "bos": stream.bos, "order": stream.seed}
        plan = json.loads(json.dumps(self.plan.to_json()))
        return {"plan": plan, "model": model_to_json(self.config), "data": data}

    def load(self, path: Path) -> None:
        """Continue from a state that `save` wrote with the same plan, model and data."""
        tensors, progress = load_state(path)
        check_same_run(path, progress, self.identity())
        for name, p in self.model.named_parameters():
            with torch.no_grad():
                p.copy_(tensors[f"model.{name}"])
            owner = (
                self.muon if any(p is q for q in self.muon.param_groups[0]["params"]) else self.adam
            )
            state = {
                key.split(".", 2)[1]: value
                for key, value in tensors.items()
                if key.startswith("optim.") and key.split(".", 2)[2] == name
            }
            if state:
                owner.state[p] = state
        self.step, self.piece = progress["step"], progress["piece"]
        self.tokens = progress["tokens"]


def run(
    trainer: Trainer,
    folder: Path,
    *,
    max_seconds: float = math.inf,
    report: Callable[[str], None] | None = None,
    report_seconds: float = 10.0,
) -> None:
    """Train to the end of the plan or for `max_seconds`; resumes what is in `folder`.

    `report` gets a line about the progress now and then, and what to do next at the end.
    """
    plan, state = trainer.plan, folder / "state.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    for half in folder.glob(f".{state.name}.*.part"):  # what a kill left of a state
        half.unlink()
    if state.exists():
        trainer.load(state)
    else:
        write_text(folder / "plan.json", json.dumps(plan.to_json(), indent=1) + "\n")
    forget_steps_after(trainer.step, folder / "log.jsonl")
    progress = Progress(plan, trainer.step, report, report_seconds, max_seconds)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.step < plan.total_steps and progress.seconds() < max_seconds:
            began = time.monotonic()
            record = trainer.train_step()
            record["seconds"] = round(time.monotonic() - began, 3)
            log.write(json.dumps(record) + "\n")
            log.flush()
            progress.tell(record)
            if trainer.step % plan.save_every_steps == 0:
                trainer.save(state)
    trainer.save(state)
    if report is not None:
        done = trainer.step == plan.total_steps
        report(f"step {trainer.step} of {plan.total_steps} saved to {state}")
        report(
            f"next: python -m elastic_moe.train.export {folder} FOLDER writes the checkpoint"
            if done
            else "next: the same command goes on from there"
        )


def forget_steps_after(step: int, log: Path) -> None:
    """Drop the lines of steps that a kill undid: they will be run, and written, again."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # the line that the kill cut short
            break
    write_text(log, "".join(kept))
