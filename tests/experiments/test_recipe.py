"""The recipe of elastic-mini: the hold-out, and the plan that its manifest has on record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.train.settings import read_settings
from elastic_moe.train.step.plan import completed
from experiments.elastic_mini import recipe
from tests.train.tiny import novels


def test_the_recipe_is_the_first_training_of_the_bundled_model(tmp_path: Path) -> None:
    novels(tmp_path)
    settings = read_settings(recipe.first_training(tmp_path / "novels", tmp_path / "run"))
    assert [f.name for f in settings.texts] == ["Dickens_X_1850.txt"]
    manifest = json.loads((BUNDLED / "elastic-mini" / "manifest.json").read_text())
    while "before" in manifest:
        manifest = manifest["before"]
    assert settings.plan is not None
    expected = completed(manifest["training"]["plan"], "manifest")
    assert json.loads(json.dumps(settings.plan.to_json())) == expected
    mixture = manifest["corpus"]["mixture"]
    assert settings.config.mixture.text_fraction == mixture["text_fraction"]
    assert settings.config.mixture.chat_fraction == mixture["chat_fraction"]
    assert settings.config.reads_library


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--novels", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    assert recipe.main(arguments) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'none'} is not a folder. Name a folder of texts, or leave it out.\n"
    )
