"""Learned positions beside torch's interpolation, corner on corner."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.wire.base import GridTHW
from tests.workers.vit.tiny_towers import MERGE
from workers.vit.models.patches import patch_places
from workers.vit.models.qwen3_vl import position_taps

SIDES = [(4, 6), (2, 50), (14, 32), (48, 48), (64, 10), (96, 96)]


@pytest.mark.parametrize(("height", "width"), SIDES)
def test_taps_interpolate_the_table_as_torch_does(height: int, width: int) -> None:
    table = torch.randn(48, 48, 5, generator=torch.Generator().manual_seed(1))
    images = F.interpolate(table.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=True)
    rows, columns = patch_places(GridTHW(1, height, width), MERGE)
    taps = position_taps(height, width, MERGE, 48)
    found = (table.flatten(0, 1)[taps.rows] * taps.weights[..., None]).sum(1)
    torch.testing.assert_close(found, images[0, :, rows, columns].T, rtol=1e-4, atol=1e-4)
    assert taps.rows.amin() >= 0
    assert taps.rows.amax() < 48 * 48


def test_a_side_of_one_patch_is_at_the_first_row() -> None:
    taps = position_taps(1, 5, 1, 5)
    assert taps.weights.tolist() == [[1, 0, 0, 0]] * 5
    assert taps.rows[:, 0].tolist() == [0, 1, 2, 3, 4]
