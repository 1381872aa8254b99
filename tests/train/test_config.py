"""`run(TrainConfig(...))` is the command: the same checkpoint, the same refusals, one help."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from elastic_moe.errors import OptionError
from elastic_moe.train import TrainConfig, run
from elastic_moe.train.__main__ import make_parser
from elastic_moe.train.config import flag, options
from elastic_moe.train.options import to_config
from elastic_moe.train.runs.progress import Event, StepDone
from elastic_moe.train.step.sampling import AXES
from tests.train.commands import TINY, train

SIZES = {
    "layers": 6,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "experts": 8,
    "top_k": 3,
    "expert_hidden": 16,
    "granules": 4,
    "vocab_size": 400,
}


def test_a_configuration_gives_the_checkpoint_of_the_command_bit_for_bit(root: Path) -> None:
    length = ("--tokens", 2048, "--batch-tokens", 512, "--length", 128)
    options = ("--corpus", root / "novels", "--reduce-depth", 0.5, "--seed", 3)
    assert train(root, *options, length=length) == 0
    (root / "run").rename(root / "command")
    events: list[Event] = []
    config = TrainConfig(
        out=root / "run",
        corpus=root / "novels",
        tokens=2048,
        batch_tokens=512,
        length=128,
        reduce={"depth": 0.5},
        seed=3,
        **SIZES,
    )
    result = run(config, report=events.append)
    assert (result.steps, result.complete, result.ended_by) == (4, True, "plan")
    assert result.checkpoint == root / "run" / "checkpoint"
    names = sorted(path.name for path in result.checkpoint.iterdir())
    assert "model.safetensors" in names
    for name in names:
        expected = (root / "command" / "checkpoint" / name).read_bytes()
        assert (result.checkpoint / name).read_bytes() == expected, name
    assert (root / "run" / "options.json").read_bytes() == (
        root / "command" / "options.json"
    ).read_bytes()
    steps = [event.step for event in events if isinstance(event, StepDone)]
    assert steps == [1, 4]
    assert run(config).steps == 4  # resumed: there is nothing left to do


def test_the_command_line_with_nothing_given_is_the_default_configuration() -> None:
    assert to_config(make_parser().parse_args([])) == TrainConfig()


def test_options_reach_the_fields_that_they_are_named_after() -> None:
    arguments = ["--from", "x", "--include", "*.md", "--include", "a/*", "--corpus", "texts"]
    arguments += ["--reduce-top-k", "0.5", "--max-shard-size", "15MiB", "--sandwich"]
    found = to_config(make_parser().parse_args(arguments))
    assert found == TrainConfig(
        from_checkpoint="x",
        include=("*.md", "a/*"),
        corpus=Path("texts"),
        reduce={"top_k": 0.5},
        max_shard_bytes=15 << 20,
        sandwich=True,
    )


def test_every_field_has_an_option_with_a_help() -> None:
    parser = make_parser()
    declared = {flag: action for action in parser._actions for flag in action.option_strings}
    names = [field.name for field in fields(TrainConfig)]
    assert list(options()) == names
    for name in names:
        if name != "reduce":
            assert declared[flag(name)].help, name
    for axis in AXES:
        assert declared[f"--reduce-{axis.replace('_', '-')}"].help
    assert isinstance(declared["--json"], argparse._StoreTrueAction)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scale": 0}, "--lr-scale must be above 0 and at most 1000, got 0."),
        ({"tokens": 10.5}, "--tokens must be at least 1, got 10.5."),
        ({"tokens": "many"}, "--tokens must be at least 1, got many."),
        ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16, got 'int8'."),
        ({"reduce": {"depth": 2}}, "--reduce-depth must be in [0, 1], got 2."),
        ({"reduce": {"deep": 0.5}}, "reduce must name axes of depth, "),
        ({"fixed": "L2", "reduce": {"pool": 0}}, "leave out --reduce-pool where --fixed is given"),
        ({"sandwich": True, "split": 0.5}, "leave out --split where --sandwich is given"),
        ({"with_library": True}, "--with-library is about a folder of texts, which is not read."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_configuration_is_refused_when_it_is_made(given: dict, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        TrainConfig(**given)
    assert str(caught.value).startswith(message)


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys\nfrom elastic_moe.train import TrainConfig\n"
        "TrainConfig()\nprint([n for n in ('torch', 'numpy', 'tokenizers') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_sizes_here_are_those_of_the_command() -> None:
    assert {flag(name): str(size) for name, size in SIZES.items()} == dict(
        zip(TINY[::2], TINY[1::2], strict=True)
    )
