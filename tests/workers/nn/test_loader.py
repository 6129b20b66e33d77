from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.nn import loader
from workers.nn.loader import Checkpoint

CPU = torch.device("cpu")
TENSORS = {
    "model.language_model.embed_tokens.weight": torch.arange(24, dtype=torch.float32).view(6, 4).bfloat16(),
    "model.visual.patch.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "odd": torch.arange(3, dtype=torch.float16),
}


@pytest.fixture(params=["one file", "two files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "one file":
        save_file(TENSORS, tmp_path / "model.safetensors")
        return tmp_path
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        file = f"model-{number % 2}.safetensors"
        weight_map[name] = file
        others = {other: TENSORS[other] for other, place in weight_map.items() if place == file}
        save_file({**others, name: tensor}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_tensors_come_by_their_usual_names_in_parts_and_in_the_wanted_type(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint(folder, torch.float32, CPU, lambda done, total: seen.append((done, total)))
    assert checkpoint.has_module("model.embed_tokens")
    assert not checkpoint.has_module("model.embed")
    part = checkpoint.load("model.embed_tokens.weight", slice(1, 3), slice(2, 4))
    assert part.tolist() == [[6, 7], [10, 11]]
    assert (part.dtype, part.is_contiguous()) == (torch.float32, True)
    assert checkpoint.load("visual.patch.weight").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert seen == [(48, 78), (72, 78)], "bytes"
    with pytest.raises(ValueError, match=r"no tensor 'model\.missing'"):
        checkpoint.load("model.missing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_from_the_file_when_they_are_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"before": torch.ones(3), "x": matrix}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, torch.float32, CPU)
    rows = checkpoint.rows("x")
    checkpoint.close()
    numbers = torch.tensor([49, 0, 7, 7])
    assert rows[numbers].dtype == dtype
    assert torch.equal(rows[numbers], matrix[numbers])
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "it takes no memory of ours"
    with pytest.raises(ValueError, match="row 1000000"):
        rows[torch.tensor([1_000_000])]


def test_what_is_loaded_does_not_hold_the_file(folder: Path) -> None:
    checkpoint = Checkpoint(folder, torch.float32, CPU)
    kept = [checkpoint.load("visual.patch.weight"), checkpoint.load("odd")]
    assert Path("/proc/self/maps").read_text().count(str(folder)) > 0
    checkpoint.close()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert len(kept) == 2


def test_pages_of_what_was_read_are_given_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MAPPED_BYTES", 1)
    checkpoint = Checkpoint(folder, torch.float32, CPU)
    opened: list[object] = []
    for _ in range(3):
        kept = checkpoint.read("visual.patch.weight")
        opened.append(checkpoint._opened)
        assert torch.equal(kept.float(), checkpoint.load("visual.patch.weight"))
    assert len(set(map(id, opened))) == 3


def test_the_disk_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"layer.{number}": torch.zeros(100) for number in range(8)}, tmp_path / "model.safetensors")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(loader, "AHEAD_BYTES", 1000)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, size)))
    checkpoint = Checkpoint(tmp_path, torch.float32, CPU)
    names = [f"layer.{number}" for number in range(8)]
    first = checkpoint._header(tmp_path / "model.safetensors")[0]
    for name in names[:4]:
        checkpoint.read(name)
        checkpoint.read(name, slice(0, 1))
    assert asked == [(first, 1400), (first + 1400, 800)], "one piece after the other, and not for each tensor"
    for name in (names[7], names[0], names[0]):
        checkpoint.read(name)
    assert asked[2:] == [(first + 2800, 1400), (first, 1400)], "elsewhere it begins anew"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors files"):
        Checkpoint(tmp_path, torch.float32, CPU)
