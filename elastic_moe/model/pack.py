"""A checkpoint as the C++ step wants it: packed tensor by tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_moe_kernels.arrays import Array, DType
from elastic_moe_kernels.step import CpuModel, LayerTensors, ModelDims, packed_bytes

from elastic_moe.model.checkpoints.checkpoint import (
    Checkpoint,
    DTypeName,
    Progress,
    is_rounded,
    is_small,
)
from elastic_moe.model.config import ModelConfig

if TYPE_CHECKING:
    from elastic_moe.model.reference.transformer import ElasticTransformer


def model_dims(config: ModelConfig) -> ModelDims:
    """What the kernels need of a configuration: its fields of the same names."""
    return ModelDims(**{item.name: getattr(config, item.name) for item in fields(ModelDims)})


class _Weights(ABC):
    """Our parameters by name, from wherever they are."""

    def __init__(self, config: ModelConfig, names: set[str]) -> None:
        self.config, self.names = config, names

    @abstractmethod
    def read(self, name: str) -> Array:
        """One parameter."""

    @abstractmethod
    def read_expert(self, name: str, expert: int) -> Array:
        """One expert's matrix of a stacked parameter."""

    def layer(self, index: int) -> LayerTensors:
        """One layer under the kernels' names; nothing of its experts is read before its turn."""
        prefix = f"layers.{index}."

        def find(name: str) -> Array | None:
            return self.read(prefix + name) if prefix + name in self.names else None

        routes = index in self.config.moe_layers
        everyone = "mlp." if not routes else "mlp.shared_experts."
        has_everyone = prefix + everyone + "gate_proj.weight" in self.names
        return LayerTensors(
            attention_norm=self.read(prefix + "input_layernorm.weight"),
            q=self.read(prefix + "self_attn.q_proj.weight"),
            k=self.read(prefix + "self_attn.k_proj.weight"),
            v=self.read(prefix + "self_attn.v_proj.weight"),
            out=self.read(prefix + "self_attn.o_proj.weight"),
            mlp_norm=self.read(prefix + "post_attention_layernorm.weight"),
            q_norm=find("self_attn.q_norm.weight"),
            k_norm=find("self_attn.k_norm.weight"),
            router=find("mlp.gate.weight"),
            correction_bias=find("mlp.correction_bias"),
            experts=self._experts(prefix + "mlp.experts.") if routes else None,
            everyone=(
                self.read(prefix + everyone + "gate_proj.weight"),
                self.read(prefix + everyone + "up_proj.weight"),
                self.read(prefix + everyone + "down_proj.weight"),
            )
            if has_everyone
            else None,
        )

    def _experts(self, prefix: str) -> Iterator[tuple[Array, Array, Array]]:
        for e in range(self.config.num_experts):
            yield (
                self.read_expert(prefix + "gate_proj", e),
                self.read_expert(prefix + "up_proj", e),
                self.read_expert(prefix + "down_proj", e),
            )


class _Loaded(_Weights):
    def __init__(self, model: ElasticTransformer) -> None:
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        super().__init__(model.config, set(self._parameters))

    def read(self, name: str) -> Array:
        return self._parameters[name]

    def read_expert(self, name: str, expert: int) -> Array:
        return self._parameters[name][expert]


class _Stored(_Weights):
    def __init__(self, checkpoint: Checkpoint, dtype: DType, progress: Progress) -> None:
        super().__init__(checkpoint.config, set(checkpoint.shapes))
        self._checkpoint, self._dtype = checkpoint, dtype
        self._progress, self._done = progress, 0

    def read(self, name: str) -> Array:
        small = is_small(name, self._checkpoint.shapes[name])
        self._report()
        return self._checkpoint.read(name, "float32" if small else self._dtype)

    def read_expert(self, name: str, expert: int) -> Array:
        if expert == 0:
            self._report()
        return self._checkpoint.read_expert(name, expert)

    def _report(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self.names))


def pack_model(model: ElasticTransformer, level: str | None = None) -> CpuModel:
    """Pack a loaded model, which keeps its weights. Rotary angles are the caller's to set."""
    return _pack(_Loaded(model), "float32" if model.input_dtype is None else "bfloat16", level)


def load_packed(
    folder: Path,
    *,
    dtype: DTypeName = "auto",
    level: str | None = None,
    progress: Progress = None,
) -> CpuModel:
    """Load a checkpoint folder for the C++ step, tensor by tensor: memory holds the model once.

    Args:
        dtype: as `load_model`; under 'float32' matrices take four bytes per weight, whatever the
            file has.
        level: instruction-set level; None for the best one.
        progress: called with (parameters read, all) as loading goes on.

    Raises:
        CheckpointError: a file or tensor is missing, extra, misshaped or not finite.
        KernelError: a size that the kernels do not take, or they are missing.
    """
    checkpoint = Checkpoint(folder)
    wanted: DType = "bfloat16" if is_rounded(checkpoint, dtype) else "float32"
    return _pack(_Stored(checkpoint, wanted, progress), wanted, level)


def _pack(weights: _Weights, dtype: DType, level: str | None) -> CpuModel:
    config = weights.config
    dims = model_dims(config)
    packed = CpuModel(dims, dtype, level)
    layers = [
        (True, config.shared_hidden) if i in config.moe_layers else (False, config.dense_hidden)
        for i in range(config.num_layers)
    ]
    packed.reserve(packed_bytes(dims, dtype, layers))
    embeddings = weights.read("embed_tokens.weight")
    head = embeddings if config.tied_embeddings else weights.read("lm_head.weight")
    packed.set_ends(embeddings, weights.read("norm.weight"), head)
    for i in range(config.num_layers):
        packed.set_layer(i, weights.layer(i))
    return packed
