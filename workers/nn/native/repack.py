"""Numbers of 4 bits out of the words of quantised checkpoints, into the blocks of
`workers/nn/weights/grouped.py`, at the memory's rate. `workers/nn/weights/packed.py` has the same with
torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.native import operators


def takes_words(words: Tensor, out: Tensor) -> bool:
    """Whether there is a kernel for these words, and for blocks there."""
    tensors = (words, torch.int32), (out, torch.uint8)
    return operators.kernels is not None and all(
        x.device.type == "cpu" and x.dtype is dtype and x.ndim == 2 for x, dtype in tensors
    )


def repack_outputs(words: Tensor, skipped: int, out: Tensor) -> None:
    """Fills out [n, in / 2] with the blocks of AWQ's words [in, m] int32, each with eight outputs of an
    input.

    `skipped`: outputs of the first word that are left out, up to 7. in: a multiple of 32; in a row of `out`
    and of `words` numbers lie side by side.
    """
    assert words.stride(1) == 1 or words.shape[1] == 1, "words of an input lie side by side"
    assert out.stride(1) == 1
    assert len(words) == 2 * out.shape[1]
    assert 0 <= skipped < 8
    assert skipped + len(out) <= 8 * words.shape[1]
    operators.kernels.repack(
        out.data_ptr(),
        words.data_ptr(),
        0,
        out.stride(0),
        len(out),
        len(words),
        words.stride(0),
        1,
        skipped,
        1,
    )


def repack_inputs(words: Tensor, order: Tensor | None, out: Tensor) -> None:
    """Fills out [n, m / 2] with blocks, of words [n, k] int32 in any strides, each with eight inputs of an
    output, the lowest bits first.

    order: [m] int64, which input stands there; None: as they are. m: a multiple of 32.
    """
    assert len(words) == len(out)
    assert out.stride(1) == 1
    num_inputs = 2 * out.shape[1]
    if order is None:
        assert num_inputs <= 8 * words.shape[1]
    else:
        assert order.dtype is torch.int64
        assert order.is_contiguous()
        assert len(order) == num_inputs
        assert 0 <= int(order.min()) <= int(order.max()) < 8 * words.shape[1]
    operators.kernels.repack(
        out.data_ptr(), words.data_ptr(), 0 if order is None else order.data_ptr(), out.stride(0), len(out),
        num_inputs, words.stride(1), words.stride(0), 0, 0,
    )  # fmt: skip
