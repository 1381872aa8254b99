"""A checkpoint folder: which stored tensors make up which of our parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from elastic_moe_kernels.arrays import BITS, to_dtype
from numpy.typing import NDArray

from elastic_moe.errors import CheckpointError
from elastic_moe.model.checkpoints.folder import CONFIG, read_json
from elastic_moe.model.checkpoints.weights import TensorFiles
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families import EXPERT_PARTS, FAMILIES, Source, parameter_shapes, read_config

DTypeName = Literal["auto", "float32", "bfloat16"]
Progress = Callable[[int, int], None] | None


def load_config(folder: Path) -> ModelConfig:
    """Read config.json of a checkpoint folder. Raises: CheckpointError: it is not supported."""
    return read_config(read_json(folder, CONFIG), str(folder / CONFIG))


class Checkpoint:
    """A folder's configuration and tensors; nothing of the data is read before it is asked for.

    Attributes:
        raw: config.json as it stands.
        config: what it means.
        files: the stored tensors.
        shapes: our parameters, by name, in the model's order.

    Raises:
        CheckpointError: a file is missing or broken, or a tensor is missing, extra or misshaped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = read_json(folder, CONFIG)
        self.config = read_config(self.raw, str(folder / CONFIG))
        self.files = TensorFiles(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._sources: dict[str, list[Source]] = {}
        used: set[str] = set()
        # One parameter at a time: sizes that the files do not bear out end this early.
        for name, shape in parameter_shapes(self.config):
            self.shapes[name] = shape
            self._sources[name] = self._find(name, shape)
            used.update(source.tensor for source in self._sources[name])
        self._check_rest(used)

    @property
    def dtype(self) -> str:
        """The dtype of the file: that of its matrices."""
        return self.files.dtype(self._sources["embed_tokens.weight"][0].tensor)

    def sources(self, name: str) -> list[Source]:
        """The stored tensors that make up one of our parameters."""
        return self._sources[name]

    def read(self, name: str, dtype: str | None = None) -> NDArray[Any]:
        """One of our parameters, copied out of its files; bfloat16 as its bits.

        Args:
            dtype: name of that to convert the values to; None keeps that of the file.

        Raises:
            CheckpointError: a value is NaN or infinite, or of no supported dtype.
        """
        sources, shape = self.sources(name), self.shapes[name]
        dtype = dtype or self.files.dtype(sources[0].tensor)
        whole = np.empty(shape, BITS[dtype])
        parts = whole if self._is_stacked(name) else [whole]
        for part, source in zip(parts, sources, strict=True):
            with self.files.mapped(source.tensor) as values:
                part[...] = to_dtype(values[source.index], dtype)
        return whole

    def read_expert(self, name: str, expert: int) -> NDArray[Any]:
        """One expert's matrix of a stacked parameter such as `layers.0.mlp.experts.up_proj`.

        Raises:
            CheckpointError: as `read`.
        """
        sources = self.sources(name)
        source = sources[expert] if self._is_stacked(name) else sources[0]
        with self.files.mapped(source.tensor) as values:
            part = values[source.index] if self._is_stacked(name) else values[source.index][expert]
            return np.array(part)

    def _is_stacked(self, name: str) -> bool:
        """Whether every expert is a tensor of its own."""
        return name.endswith(EXPERT_PARTS) and len(self.sources(name)[0].shape) == 2

    def _find(self, name: str, shape: tuple[int, ...]) -> list[Source]:
        """The first way of storing this parameter that the files bear out."""
        stored = self.files.entries
        ways = list(FAMILIES[self.config.model_type].sources(self.config, name, shape))
        for way in ways:
            if not self._misfit(way):
                return way
        nearest = next((way for way in ways if any(s.tensor in stored for s in way)), ways[0])
        raise CheckpointError(self._misfit(nearest))

    def _misfit(self, way: list[Source]) -> str:
        """What of a way of storing a parameter the files do not bear out; "" if they do."""
        for source in way:
            got = self.files.entries.get(source.tensor)
            if got is None:
                return f"{self.files.path}: tensor {source.tensor!r} is missing."
            if got.shape != source.shape:
                return (
                    f"{got.path}: tensor {source.tensor!r} has shape {got.shape}, config.json asks "
                    f"for {source.shape}."
                )
        return ""

    def _check_rest(self, used: set[str]) -> None:
        """Refuse tensors that no parameter uses, unless they repeat one or are known not to run."""
        family = FAMILIES[self.config.model_type]
        ignored = family.ignored
        extra = {name for name in self.files.entries if not name.startswith(ignored or "\0")}
        extra -= used
        head, embeddings = (f"{family.prefix(of)}weight" for of in ("lm_head.", "embed_tokens."))
        if self.config.tied_embeddings and head in extra:
            with self.files.mapped(head) as a, self.files.mapped(embeddings) as b:
                if a.dtype != b.dtype or not np.array_equal(a, b):
                    raise CheckpointError(
                        f"{self.files.entry(head).path}: tensor {head!r} differs from "
                        f"{embeddings!r}, but config.json ties them (tie_word_embeddings)."
                    )
            extra.remove(head)
        if extra:
            name = min(extra)
            raise CheckpointError(
                f"{self.files.entry(name).path}: {len(extra)} tensors that the model has no place "
                f"for, such as {name!r}. The file belongs to another architecture or configuration."
            )


def is_rounded(checkpoint: Checkpoint, dtype: DTypeName) -> bool:
    """Whether a dtype that was asked for means that matrix inputs are rounded to bf16."""
    return checkpoint.dtype == "bfloat16" if dtype == "auto" else dtype == "bfloat16"


def is_small(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is held in float32 whatever the file has: a vector or a router."""
    return len(shape) == 1 or name.endswith("mlp.gate.weight")
