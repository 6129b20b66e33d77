"""Token masks, packed in bits by the matchers on the host (`matching.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
    shifts = torch.arange(BITS, dtype=torch.uint8, device=logits.device)
    bits = to_device(packed, logits.device)[:, :, None] >> shifts & 1
    logits.masked_fill_(bits.flatten(1)[:, :vocab_size] == 0, -torch.inf)
