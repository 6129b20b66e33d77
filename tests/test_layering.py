"""Imports point one way, and only where they may; walked in the syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for folder in ("pipeline", "workers", "launcher") for path in (ROOT / folder).rglob("*.py")
)
WORKERS = ("api", "gateway", "preprocess", "vit", "llm", "carrier")
PURE_FILES = (
    "scheduler.py",
    "step_budget.py",
    "batcher.py",
    "leased_slots.py",
    "router.py",
    "slots.py",
    "placement.py",
    "answer.py",
    "groups.py",
    "aborts.py",
    "request.py",
    "choices.py",
    "chunk.py",
)
PURE_CACHE_FILES = [
    ROOT / "workers" / "llm" / "cache" / name for name in ("blocks.py", "states.py", "manager.py")
]
HOUSES = {  # the folders of pipeline/, and which others each may import
    "wire": (),
    "adapters": (),
    "config": ("wire",),
    "families": ("wire",),
    "parsers": ("wire", "families"),
    "transport": ("wire",),
    "process": ("wire", "config", "transport"),
    "client": ("wire", "config", "transport", "process", "families", "parsers"),
}
ZMQ_FILES = [
    ROOT / "pipeline" / "transport" / name
    for name in ("ends.py", "poller.py", "sockets.py", "keys.py", "tcp.py", "cluster.py", "joining.py")
]
TENSOR_FILES = ("tensors.py", "memory.py")  # torch only where a tensor is asked for
# The family that the embedded model is of, in whichever spelling, and the files that may name it.
A_FAMILY = re.compile(r"qwen[\s_.-]*\d", re.IGNORECASE)
FAMILY_HOUSES = ("pipeline/families/", "pipeline/parsers/", "workers/vit/models/", "workers/llm/models/")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found


def role_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "workers" else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    role, names = role_of(path), imports(path)
    if role == "pipeline":
        assert not [name for name in names if name.startswith(("workers", "launcher"))]
    if role in (*WORKERS, "nn"):
        assert not [name for name in names if name.startswith("launcher")]
        others = [f"workers.{other}" for other in WORKERS if other != role]
        assert not [name for name in names if name.startswith(tuple(others))], "no worker imports another"
    if role == "launcher":
        assert not [name for name in names if name.startswith("workers")], (
            "the launcher starts workers by name"
        )


def test_the_houses_of_the_pipeline_import_one_way() -> None:
    folder = ROOT / "pipeline"
    assert {path.name for path in folder.iterdir() if path.name != "__pycache__"} == {*HOUSES, "__init__.py"}
    for house, others in HOUSES.items():
        for path in (folder / house).rglob("*.py"):
            houses = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}
            assert houses <= {house, *others}, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_who_may_know_what(path: Path) -> None:
    role, names = role_of(path), imports(path)
    roots = {name.split(".")[0] for name in names}
    if path not in ZMQ_FILES:
        assert "zmq" not in roots
    if role in ("pipeline", "api", "gateway", "preprocess", "launcher") and path.name not in TENSOR_FILES:
        assert "torch" not in roots
    if path.name in TENSOR_FILES:
        assert "torch" not in {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert not roots & {"pickle", "dill", "cloudpickle", "multiprocessing", "shelve"}
    if path.name in PURE_FILES or path in PURE_CACHE_FILES or path.parent.name == "parsers":
        assert not roots & {"torch", "zmq", "time", "asyncio", "socket"}, "decisions are pure"


def declares(path: Path, name: str) -> bool:
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    return any(
        isinstance(target, ast.Name) and target.id == name for node in nodes for target in node.targets
    )


def test_what_is_found_is_never_imported() -> None:
    """Families, towers, decoders, routes, parsers: only another one, which shares its code, may name one."""
    houses = {
        "FAMILIES": ROOT / "pipeline" / "families",
        "TOWER": ROOT / "workers" / "vit" / "models",
        "DECODER": ROOT / "workers" / "llm" / "models",
        "ROUTES": ROOT / "workers" / "api" / "endpoints",
        "FORM": ROOT / "pipeline" / "parsers",
    }
    members = {path for name, house in houses.items() for path in house.glob("*.py") if declares(path, name)}
    assert {path.parent for path in members} == set(houses.values())
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in members}
    for path in set(FILES) - members:
        assert not imports(path) & modules, path


def test_a_family_is_one_among_others() -> None:
    """Outside the houses of families, towers and decoders nothing names one: no code, no comment, no help
    text, no file's name."""
    for folder in ("pipeline", "workers", "launcher"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            is_ours = "__pycache__" not in name and not name.startswith("launcher/embedded/")
            if path.is_file() and is_ours and not name.startswith(FAMILY_HOUSES):
                found = A_FAMILY.search(f"{name}\n{path.read_bytes().decode(errors='replace')}")
                assert found is None, f"{name} says {found and found.group()!r}"


def test_only_the_command_line_reads_the_environment() -> None:
    for path in FILES:
        if path != ROOT / "launcher" / "cli.py":
            source = path.read_text()
            assert "os.getenv" not in source, path
            assert "os.environ.get" not in source, path
            assert "os.environ[" not in source, path


def test_decoders_and_formats_are_found_by_their_name() -> None:
    """So that another one is one more file: nobody else imports a decoder, and the formats one place only."""
    models, weights = "workers.llm.models", "workers.nn.weights"
    decoders = {
        path.stem for path in (ROOT / "workers/llm/models").glob("*.py") if "DECODER" in path.read_text()
    }
    decoders -= {"base", "registry"}
    assert decoders
    for path in FILES:
        names, folder = imports(path), path.parent
        assert not names & {f"{models}.{decoder}" for decoder in decoders}, path
        if folder == ROOT / "workers/llm/attention":
            assert not [name for name in names if name.startswith(models)], "attention knows no model"
        if folder == ROOT / "workers/nn/weights":
            assert not [name for name in names if name.startswith("workers.llm")], path
        if folder != ROOT / "workers/nn/weights":
            assert f"{weights}.int8" not in names, path


PURE_TESTS = (
    "pipeline/transport/test_slots.py",
    "pipeline/client/test_detokenizer.py",
    "workers/llm/test_scheduler.py",
    "workers/vit/test_batcher.py",
    "workers/preprocess/test_router.py",
)


def test_pure_parts_are_tested_without_torch_and_zmq() -> None:
    """Their tests run, and pass, where neither can be imported."""
    block = "sys.modules['torch'] = sys.modules['zmq'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    paths = [str(ROOT / "tests" / name) for name in PURE_TESTS]
    out = subprocess.run(
        [sys.executable, "-c", f"import sys, pytest; {block}", "-p", "no:cacheprovider", *paths],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert "passed" in out.stdout
