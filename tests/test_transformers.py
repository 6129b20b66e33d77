"""The server runs without `transformers`, which only tools and tests compare with."""

from __future__ import annotations

import ast
import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.client.blocking import BlockingClient
from pipeline.wire.prompts import ChatMessage
from pipeline.wire.sampling import Grammar, GrammarKind, SamplingParams
from tests.pictures import data_url, scene
from tests.servers import Server
from tests.test_layering import FILES, ROOT
from tests.videos import counting_frames, encode_video

# Python imports `sitecustomize` when it starts; workers are forks, and have the hook from their server.
HOOK = """
import os, sys, traceback

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            with open(f"{os.environ['HOOK_FOLDER']}/imports", "a") as file:
                print(name, file=file)
                traceback.print_stack(file=file)
            raise ImportError(f"{name} is not for the server")

sys.meta_path.insert(0, Refusal())
open(f"{os.environ['HOOK_FOLDER']}/{os.getpid()}", "w").close()
"""
# They name a package of the machine that they are for.
ONLY_ON_GPUS = {"workers.llm.attention.flash3", "workers.nn.delta.fla"}
IMPORT_ALL = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every Python process that starts leaves a file here, and in `imports` who wanted transformers."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("HOOK_FOLDER", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    return folder


def importers(hook: Path) -> str:
    file = hook / "imports"
    return file.read_text() if file.exists() else ""


def test_the_hook_sees_an_import(hook: Path) -> None:
    code = "try:\n import transformers.models\nexcept ImportError: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importers(hook).startswith("transformers\n")


def test_every_module_is_imported_without_transformers(hook: Path) -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith(".__main__")]
    chosen = [name for name in names if name not in ONLY_ON_GPUS]
    assert len(chosen) == len(names) - len(ONLY_ON_GPUS)
    subprocess.run([sys.executable, "-c", IMPORT_ALL, *chosen], check=True, cwd=ROOT)
    assert importers(hook) == ""


def test_a_server_answers_about_pictures_and_videos_and_in_a_grammar_without_transformers(hook: Path) -> None:
    film = "data:video/mp4;base64," + base64.b64encode(encode_video(counting_frames(4))).decode()
    content = [
        {"type": "image_url", "image_url": {"url": data_url(scene(1))}},
        {"type": "video_url", "video_url": {"url": film}},
        {"type": "text", "text": "What is it?"},
    ]
    with Server("--max-model-len", "1024", "--kv-cache-gib", "0.25") as server:
        assert (hook / str(server.process.pid)).exists()
        assert (hook / str(server.children["server"])).exists()
        with server.client() as client:
            answer = client.chat.completions.create(
                model="embedded-shapes", max_tokens=4, messages=[{"role": "user", "content": content}]
            )
            with BlockingClient(server.run_dir) as blocking:
                grammar = Grammar(GrammarKind.REGEX, "[a-c]{3}")
                pieces = blocking.generate([ChatMessage("user", "Hello")], SamplingParams(grammar=grammar))
                assert re.fullmatch("[a-c]{3}", "".join(piece.text for piece in pieces))
        assert answer.usage.completion_tokens >= 1
    assert importers(hook) == ""


def test_no_file_of_the_server_names_it() -> None:
    """In an import, however late, or in a name that could be imported. It is also the value of one of
    DashInfer's options."""
    for path in FILES:
        has_value = path.name == "dashinfer.py"
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                names += [] if has_value else [node.value]
            assert "transformers" not in {name.partition(".")[0] for name in names}, path
