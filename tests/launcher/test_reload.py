from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.checkpoints import EMBEDDED
from launcher.reload import Reload
from launcher.units import Phase, Unit
from pipeline.adapters.files import WEIGHTS
from pipeline.wire.topology import Role, WorkerId
from tools.random_checkpoint.lora import write_adapter

NOW = 5.0


def serving(role: Role) -> Unit:
    return Unit((WorkerId(role),), phase=Phase.SERVING)


UNITS = [serving(Role.LLM), serving(Role.VIT), serving(Role.API)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"old")
    return tmp_path


def put_new_weights(folder: Path) -> None:
    (folder / "new").write_bytes(b"new")
    (folder / "new").rename(folder / "model.safetensors")


def test_unchanged_files_replace_one_unit_at_a_time(folder: Path) -> None:
    reload = Reload(folder)
    reload.begin(UNITS, is_possible=True, now=NOW)
    assert [reload.next(UNITS) for _ in UNITS] == UNITS
    assert reload.state.is_running
    assert reload.next(UNITS) is None
    assert not reload.state.is_running
    assert (reload.state.generation, reload.waits_since) == (0, None)


def test_the_next_waits_until_all_serve(folder: Path) -> None:
    reload = Reload(folder)
    reload.begin(UNITS, is_possible=True, now=NOW)
    assert reload.next([*UNITS, Unit((WorkerId(Role.VIT, 1),))]) is None
    assert reload.state.is_running


def test_a_unit_whose_node_has_left_is_not_replaced(folder: Path) -> None:
    reload, units = Reload(folder), [serving(Role.LLM), serving(Role.VIT)]
    reload.begin(units, is_possible=True, now=NOW)
    units[0].is_absent = True
    assert reload.next(units[1:]) is units[1]
    assert reload.next(units[1:]) is None
    assert not reload.state.is_running


def test_new_weights_are_a_generation_once_they_are_taken(folder: Path) -> None:
    reload = Reload(folder)
    put_new_weights(folder)
    assert reload.has_new_weights()
    reload.begin(UNITS, is_possible=True, now=NOW)
    assert reload.waits_since == NOW
    assert reload.next(UNITS) is None, "old workers serve until open requests have ended"
    assert (reload.state.is_running, reload.state.generation) == (True, 0)
    reload.take_new_weights()
    assert not reload.has_new_weights()
    assert (reload.waits_since, reload.state.generation) == (None, 1)
    assert reload.next(UNITS) is None
    assert (reload.state.is_running, reload.state.generation) == (False, 1)


def test_the_same_content_in_a_new_file_is_new(folder: Path) -> None:
    reload = Reload(folder)
    shutil.copy2(folder / "model.safetensors", folder / "copy")
    (folder / "copy").rename(folder / "model.safetensors")
    assert reload.has_new_weights()


@pytest.mark.parametrize("change", ["changed", "added", "gone"])
def test_other_files_must_be_as_they_were(change: str, folder: Path) -> None:
    reload = Reload(folder)
    put_new_weights(folder)
    match change:
        case "changed":
            (folder / "config.json").write_text("{ }")
        case "added":
            (folder / "tokenizer.json").write_text("{}")
        case _:
            shutil.rmtree(folder)
    reload.begin(UNITS, is_possible=True, now=NOW)
    assert "other files than the weights have changed" in reload.state.refusal
    assert (reload.state.number, reload.state.is_running) == (1, False)


def test_a_reload_under_way_refuses_another(folder: Path) -> None:
    reload = Reload(folder)
    reload.begin(UNITS, is_possible=True, now=NOW)
    reload.begin(UNITS, is_possible=True, now=NOW)
    assert (reload.state.number, reload.state.refusal) == (2, "a reload is under way")
    assert reload.state.is_running


def test_a_server_that_starts_or_stops_refuses(folder: Path) -> None:
    reload = Reload(folder)
    reload.begin(UNITS, is_possible=False, now=NOW)
    assert reload.state.refusal == "the server is starting or stopping"


def test_weights_that_are_gone_for_a_while_are_not_new(folder: Path) -> None:
    reload = Reload(folder)
    away = (folder / "model.safetensors").rename(folder / "model.away")
    assert not reload.has_new_weights()
    away.rename(folder / "model.safetensors")
    assert not reload.has_new_weights()


def test_half_of_the_files_are_no_new_weights(folder: Path) -> None:
    reload = Reload(folder)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model-1.safetensors").write_bytes(b"new")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not reload.has_new_weights()
    (folder / "model-2.safetensors").write_bytes(b"new")
    assert reload.has_new_weights()


def test_new_weights_of_an_adapter_are_new_weights(folder: Path, short_path: Path) -> None:
    base = EMBEDDED / "model"
    adapter = write_adapter(base, short_path / "adapter", 2)
    reload = Reload(folder, (adapter,))
    assert not reload.has_new_weights()
    write_adapter(base, short_path / "newer", 2, spread=0.3)
    shutil.copy(short_path / "newer" / WEIGHTS, adapter / "part")
    (adapter / "part").replace(adapter / WEIGHTS)
    assert reload.has_new_weights()
    reload.begin(UNITS, is_possible=True, now=NOW)
    assert reload.state.is_running
    reload.take_new_weights()
    assert not reload.has_new_weights()


def test_other_layers_of_an_adapter_need_a_start(folder: Path, short_path: Path) -> None:
    """Preprocess knows which adapters change the tower."""
    adapter = write_adapter(EMBEDDED / "model", short_path / "adapter", 2)
    reload = Reload(folder, (adapter,))
    write_adapter(EMBEDDED / "model", adapter, 2, is_target=lambda name: name.startswith("model."))
    reload.begin(UNITS, is_possible=True, now=NOW)
    assert not reload.state.is_running
    assert reload.state.refusal.startswith("other files than the weights have changed")
    assert str(adapter) in reload.state.refusal
    (adapter / WEIGHTS).write_bytes(b"torn")
    assert not reload.has_new_weights()
