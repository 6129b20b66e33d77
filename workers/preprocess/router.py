"""Chooses the ViT of each chunk. Pure. Its own memory is the directory: preprocess is the only router."""

from __future__ import annotations

from collections import OrderedDict

MAX_REMEMBERED = 100_000


class Choice:
    """Where a chunk goes, and whether that ViT was asked for its hash before."""

    __slots__ = ("is_known", "vit")

    def __init__(self, vit: int, is_known: bool) -> None:
        self.vit, self.is_known = vit, is_known


class Router:
    def __init__(self, num_vits: int) -> None:
        self.outstanding = [0] * num_vits  # patches that each ViT has been sent and not finished
        self._places: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, mm_hash: bytes, num_patches: int) -> Choice:
        """Where the hash was sent before, else the ViT with the fewest outstanding patches. Counts the patches as outstanding."""
        vit = self._places.pop(mm_hash, None)
        is_known = vit is not None
        if vit is None:
            vit = min(range(len(self.outstanding)), key=lambda index: self.outstanding[index])
        self._places[mm_hash] = vit
        if len(self._places) > MAX_REMEMBERED:
            self._places.popitem(last=False)
        self.outstanding[vit] += num_patches
        return Choice(vit, is_known)

    def finished(self, vit: int, num_patches: int) -> None:
        self.outstanding[vit] -= num_patches
