"""What `auto` means on machines that are not here: GPUs of every age, fewer GPUs than workers."""

from __future__ import annotations

import pytest
import torch

from workers.nn.loader import choose_device, choose_dtype


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Capabilities of the machine's GPUs, to be filled by the test."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return found


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float16),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_auto_is_float16_on_gpus_without_bfloat16(
    capability: tuple[int, int],
    dtype: torch.dtype,
    gpus: list[tuple[int, int]],
) -> None:
    gpus.append(capability)
    assert choose_dtype("auto", torch.device("cuda", 0)) == dtype
    assert choose_dtype("float32", torch.device("cuda", 0)) == torch.float32


def test_auto_is_one_type_on_all_gpus(gpus: list[tuple[int, int]]) -> None:
    gpus += [(9, 0), (7, 5)]
    assert {choose_dtype("auto", torch.device("cuda", ordinal)) for ordinal in range(2)} == {torch.float16}


def test_vits_share_gpus_and_ranks_do_not(gpus: list[tuple[int, int]]) -> None:
    gpus += [(9, 0), (9, 0)]
    shared = [choose_device("auto", ordinal, is_shared=True).index for ordinal in range(5)]
    assert shared == [0, 1, 0, 1, 0]
    assert choose_device("auto", 1).index == 1
    with pytest.raises(ValueError, match="GPU 2 is wanted, but this machine has 2"):
        choose_device("auto", 2)
    gpus.clear()
    with pytest.raises(ValueError, match="this machine has 0"):
        choose_device("cuda", 0, is_shared=True)
    assert choose_device("auto", 3, is_shared=True).type == "cpu"
