"""Token masks, packed in bits by the matchers on the host (`matching.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.nn.loader import to_device

BITS = 8  # per byte, the lowest first


def forbid_masked(logits: Tensor, masks: Sequence[bytes]) -> None:
    """Sets the logits of tokens outside each row's mask to -inf, in place; an empty mask allows all tokens.

    logits: [num_rows, vocab] float32.
    """
    vocab_size = logits.shape[-1]
    packed = np.full((len(masks), -(-vocab_size // BITS)), 0xFF, dtype=np.uint8)
    for row, mask in zip(packed, masks, strict=True):
        if mask:
            row[:] = np.frombuffer(mask, dtype=np.uint8)
    logits.masked_fill_(_bits_of(~packed, logits.device)[:, :vocab_size], -torch.inf)


def _bits_of(packed: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """[num_rows, 8 * num_bytes] bool. To a GPU the packed bits are copied."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_))
    shifts = torch.arange(BITS, dtype=torch.uint8, device=device)
    return (to_device(packed, device)[:, :, None] >> shifts & 1).flatten(1).bool()
