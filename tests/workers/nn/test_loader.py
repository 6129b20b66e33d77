from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
    assert "model.embed_tokens.weight" in checkpoint
    part = checkpoint.load("model.embed_tokens.weight", slice(1, 3), slice(2, 4))
    assert part.tolist() == [[6, 7], [10, 11]]
    assert (part.dtype, part.is_contiguous()) == (torch.float32, True)
    assert checkpoint.load("visual.patch.weight").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert seen == [(1, 3), (2, 3)]
    with pytest.raises(KeyError, match=r"no tensor 'model\.missing'"):
        checkpoint.load("model.missing")


def test_a_mapped_tensor_is_the_same_and_stays_when_the_checkpoint_is_closed(folder: Path) -> None:
    checkpoint = Checkpoint(folder, torch.float32, CPU)
    mapped = {name: checkpoint.map(usual) for name, usual in zip(TENSORS, ("model.embed_tokens.weight", "visual.patch.weight", "odd"), strict=True)}
    loaded = checkpoint.load("odd")
    checkpoint.close()
    for name, tensor in TENSORS.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)
    assert loaded.tolist() == [0, 1, 2]


def test_a_tensor_that_is_not_aligned_is_loaded_instead(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}})
    header += " " * (1 - (8 + len(header)) % 4 + 4)
    assert (8 + len(header)) % 4
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + values.numpy().tobytes())
    assert Checkpoint(tmp_path, torch.float32, CPU).map("x").tolist() == values.tolist()


def test_what_is_loaded_does_not_hold_the_file(folder: Path) -> None:
    checkpoint = Checkpoint(folder, torch.float32, CPU)
    kept = [checkpoint.load("visual.patch.weight"), checkpoint.load("odd")]
    assert "safetensors" in Path("/proc/self/maps").read_text()
    checkpoint.close()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert len(kept) == 2


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors files"):
        Checkpoint(tmp_path, torch.float32, CPU)
