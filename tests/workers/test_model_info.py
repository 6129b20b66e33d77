"""All workers read the model with the server's limits."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.config import Config, PreprocessConfig
from tests.checkpoints import EMBEDDED
from workers.model_info import model_info_of

WORKERS = sorted((Path(__file__).parent.parent.parent / "workers").glob("*/worker.py"))


def context_of(folder: Path, **limits: int) -> Any:
    return cast(
        Any, SimpleNamespace(model_folder=folder, config=Config(preprocess=PreprocessConfig(**limits)))
    )


def test_an_option_stands_in_for_what_the_checkpoint_does_not_say(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED / "model", tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    del settings["max_pixels"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="max_pixels"):
        model_info_of(context_of(tmp_path / "model"))
    info = model_info_of(context_of(tmp_path / "model", min_pixels=784, max_pixels=100352))
    assert (info.vision.min_pixels, info.vision.max_pixels) == (784, 100352)


@pytest.mark.parametrize("path", WORKERS, ids=lambda path: path.parent.name)
def test_no_worker_reads_it_by_itself(path: Path) -> None:
    """The endpoint and the LLM did, without the limits, and ended where a picture's workers started."""
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert "read_model_info" not in names
