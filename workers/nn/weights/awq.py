"""AWQ: weights in 4 bits, as AutoAWQ packs them for its kernel `gemm`.

qweight  int32 [in, out / 8]            8 outputs of one input in a word
qzeros   int32 [in / group, out / 8]    the same
scales   float16 [in / group, out]      weight = (number - zero) · scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from workers.nn.loader import Checkpoint
from workers.nn.native.repack import repack_outputs, takes_words
from workers.nn.weights.exceptions import Names
from workers.nn.weights.grouped import BLOCK, NumberKind
from workers.nn.weights.matrices import StoredMatrix, expect_type
from workers.nn.weights.packed import paired, without_common, words_of
from workers.nn.weights.stored import StoredFormat

# Which of a word's outputs its numbers are, lowest bits first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS, PER_WORD = 4, 8


class AwqMatrix(StoredMatrix):
    def __init__(self, checkpoint: Checkpoint, module: str) -> None:
        name = f"{module}.qweight"
        for tensor in ("qweight", "qzeros"):
            expect_type(checkpoint, f"{module}.{tensor}", "I32")
        self._checkpoint, self._module = checkpoint, module
        packed, scales, zeros = (
            checkpoint.shape(f"{module}.{one}") for one in ("qweight", "scales", "qzeros")
        )
        num_groups, out_features = scales
        in_features = packed[0]
        has_words = packed[1] * PER_WORD == out_features and zeros == (num_groups, packed[1])
        if not has_words or in_features % num_groups:
            raise ValueError(
                f"{module} is not packed as AWQ packs 4 bits: qweight has the shape {packed}, qzeros "
                f"{zeros}, scales {scales}"
            )
        groups = torch.arange(in_features) // (in_features // num_groups)
        super().__init__(name, NumberKind.INT4, (out_features, in_features), groups)

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        return self._outputs("qweight", rows, columns)

    def put_blocks(self, rows: slice, columns: slice, order: Tensor | None, out: Tensor) -> bool:
        if order is not None:
            return False
        words, within = words_of(rows, BITS)
        found = self._checkpoint.read(self.name, columns, words).to(self._checkpoint.device)
        if takes_words(found, out):
            repack_outputs(found, within.start, out)
        else:
            out.copy_(blocks_of_outputs(found)[within])
        return True

    def scales(self, rows: slice) -> Tensor:
        found = self._checkpoint.read(f"{self._module}.scales", columns=rows)
        return found.to(self._checkpoint.device).float().t()

    def zeros(self, rows: slice) -> Tensor | None:
        return without_common(self._outputs("qzeros", rows, slice(None)), self.kind)

    def _outputs(self, name: str, rows: slice, columns: slice) -> Tensor:
        """[n, m] of words that have m inputs, or groups, one below the other."""
        words, within = words_of(rows, BITS)
        found = self._checkpoint.read(f"{self._module}.{name}", columns, words).to(self._checkpoint.device)
        count = found.shape[1]
        # A row of words for each eight outputs, whose numbers are then taken apart.
        octets = found.t().flatten().view(torch.uint8).view(count, len(found), 4)
        outputs = octets.new_empty(count, PER_WORD, octets.shape[1])
        for place in range(4):
            octet = octets[:, :, place]
            outputs[:, ORDER[2 * place]] = octet & 15
            outputs[:, ORDER[2 * place + 1]] = octet >> 4
        return outputs.flatten(0, 1)[within]


def blocks_of_outputs(words: Tensor) -> Tensor:
    """The layout's blocks [8 · n, in / 2] of words [in, n] int32. in: a multiple of 32."""
    size, count = words.shape
    halves = words.view(-1, 2, BLOCK // 2, count)
    outputs = torch.empty(count, PER_WORD, size // 2, dtype=torch.uint8, device=words.device)
    for start, words_of_both in enumerate(paired(halves[:, 0], halves[:, 1])):
        # A row of words for each eight outputs, whose numbers are then taken apart.
        octets = words_of_both.flatten(0, 1).t().contiguous().view(torch.uint8).view(count, -1, 4)
        for place in range(4):
            outputs[:, ORDER[2 * place + start]] = octets[:, :, place]
    return outputs.flatten(0, 1)


class Awq(StoredFormat):
    name: ClassVar[str] = "awq"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._exceptions = Names([*(settings.get("modules_to_not_convert") or ()), "lm_head"])

    def matrix(self, checkpoint: Checkpoint, module: str) -> StoredMatrix:
        return AwqMatrix(checkpoint, module)

    def says(self, module: str) -> bool | None:
        return not self._exceptions.match(module)
