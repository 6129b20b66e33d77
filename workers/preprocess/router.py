"""Chooses the ViT of each chunk and the LLM group of each request. Pure.

It remembers its own choices as the directory of caches: preprocess is the only router.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence

from pipeline.wire.generation import MmItem
from pipeline.wire.packing import pack_int32

MAX_REMEMBERED = 100_000
PREFIX_TOKENS = 64  # prefixes are remembered in steps of so many tokens
# tokens for the output of an open request: without them a common prefix would draw all requests to one group
OUTPUT_TOKENS = 512


class VitRoute:
    """The ViT of a chunk, and whether its hash was sent there before."""

    __slots__ = ("is_known", "vit")

    def __init__(self, vit: int, is_known: bool) -> None:
        self.vit, self.is_known = vit, is_known


class Router:
    def __init__(self, num_vits: int) -> None:
        self.outstanding = [0] * num_vits  # unfinished patches of each ViT
        self.available = set(range(num_vits))  # the serving ViTs
        self._places: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, mm_hash: bytes, num_patches: int) -> VitRoute:
        """The ViT to which the hash was sent before, else the one with the fewest outstanding patches.

        Counts the patches as outstanding.
        """
        vit = self._places.pop(mm_hash, None)
        is_known = vit is not None
        if vit is None:
            vit = min(
                self.available or range(len(self.outstanding)),
                key=lambda index: (self.outstanding[index], index),
            )
        self._places[mm_hash] = vit
        if len(self._places) > MAX_REMEMBERED:
            self._places.popitem(last=False)
        self.outstanding[vit] += num_patches
        return VitRoute(vit, is_known)

    def finished(self, vit: int, num_patches: int) -> None:
        self.outstanding[vit] -= num_patches

    def forget(self, vit: int) -> None:
        """The ViT has died: its cache is gone."""
        for mm_hash in [mm_hash for mm_hash, place in self._places.items() if place == vit]:
            del self._places[mm_hash]


class GroupRouter:
    """Groups are named by the number of their rank 0."""

    def __init__(self, leads: Sequence[int]) -> None:
        self.outstanding = dict.fromkeys(leads, 0)  # tokens that each group still has to compute
        self.available = set(leads)  # the serving groups
        self._prefixes: dict[int, OrderedDict[bytes, None]] = {lead: OrderedDict() for lead in leads}

    def candidates(self, among: Collection[int] = ()) -> list[int]:
        """The serving groups of those in `among` (empty: of all groups); if none serves, all of these."""
        wanted = [lead for lead in self.outstanding if lead in among] or list(self.outstanding)
        return [lead for lead in wanted if lead in self.available] or wanted

    def choose(
        self, prefixes: Sequence[bytes], num_tokens: int, among: Collection[int] = (),
    ) -> tuple[int, int]:  # fmt: skip
        """The group with the fewest tokens to compute, this request included, and the request's tokens there.

        Those of `prefixes` (see `prefix_hashes`) that were sent to a group before count as cached there.
        `among`: see `candidates`.
        """
        known = {lead: self._num_known(lead, prefixes) * PREFIX_TOKENS for lead in self.outstanding}
        lead = min(sorted(self.candidates(among)), key=lambda lead: self.outstanding[lead] - known[lead])
        seen = self._prefixes[lead]
        for digest in prefixes:
            seen.pop(digest, None)
            seen[digest] = None
        while len(seen) > MAX_REMEMBERED:
            seen.popitem(last=False)
        num_new = num_tokens - known[lead] + OUTPUT_TOKENS
        self.outstanding[lead] += num_new
        return lead, num_new

    def _num_known(self, lead: int, prefixes: Sequence[bytes]) -> int:
        seen = self._prefixes[lead]
        return next((index for index, digest in enumerate(prefixes) if digest not in seen), len(prefixes))

    def finished(self, lead: int, num_tokens: int) -> None:
        self.outstanding[lead] -= num_tokens

    def forget(self, lead: int) -> None:
        """The group has died: its cache is gone."""
        self._prefixes[lead].clear()


def prefix_hashes(token_ids: Sequence[int], items: Sequence[MmItem], salt: bytes) -> list[bytes]:
    """A digest at each multiple of `PREFIX_TOKENS`, of all earlier tokens and the items that begin there."""
    digest = hashlib.sha256(salt)
    hashes: list[bytes] = []
    for start in range(0, len(token_ids) - PREFIX_TOKENS + 1, PREFIX_TOKENS):
        digest.update(pack_int32(token_ids[start : start + PREFIX_TOKENS]))
        for item in items:
            if start <= item.spans[0].offset < start + PREFIX_TOKENS:
                digest.update(item.kv_hash)
        hashes.append(digest.digest())
    return hashes
