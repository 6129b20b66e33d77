"""Chooses the ViT of each chunk and the LLM group of each request. Pure.

Its own memory is the directory: preprocess is the only router.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence

from pipeline.wire.messages import MmItem, pack_int32

MAX_REMEMBERED = 100_000
PREFIX_TOKENS = 64  # prefixes are remembered in steps of so many tokens
# what the output of an open request counts as: else a common prefix would draw everyone to one group
OUTPUT_TOKENS = 512


class Choice:
    """Where a chunk goes, and whether that ViT was asked for its hash before."""

    __slots__ = ("is_known", "vit")

    def __init__(self, vit: int, is_known: bool) -> None:
        self.vit, self.is_known = vit, is_known


class Router:
    def __init__(self, num_vits: int) -> None:
        self.outstanding = [0] * num_vits  # patches that each ViT has been sent and not finished
        self.available = set(range(num_vits))  # who serves; who does not will later
        self._places: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, mm_hash: bytes, num_patches: int) -> Choice:
        """Where the hash was sent before, else the ViT with the fewest outstanding patches.

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
        return Choice(vit, is_known)

    def finished(self, vit: int, num_patches: int) -> None:
        self.outstanding[vit] -= num_patches

    def forget(self, vit: int) -> None:
        """It has died, and knows nothing any more."""
        for mm_hash in [mm_hash for mm_hash, place in self._places.items() if place == vit]:
            del self._places[mm_hash]


class GroupRouter:
    """Groups are named by the ranks that lead them."""

    def __init__(self, leads: Sequence[int]) -> None:
        self.outstanding = dict.fromkeys(leads, 0)  # tokens that each group has to compute
        self.available = set(leads)  # who serves; who does not will later
        self._prefixes: dict[int, OrderedDict[bytes, None]] = {lead: OrderedDict() for lead in leads}

    def candidates(self, among: Collection[int] = ()) -> list[int]:
        """The groups that a request may go to.

        Of those `among` (none: of all) the living, or all where none lives.
        """
        wanted = [lead for lead in self.outstanding if lead in among] or list(self.outstanding)
        return [lead for lead in wanted if lead in self.available] or wanted

    def choose(
        self, prefixes: Sequence[bytes], num_tokens: int, among: Collection[int] = (),
    ) -> tuple[int, int]:  # fmt: skip
        """The group that has the least to compute before and for this request, and the tokens for it there.

        What a group has seen of `prefixes` (see `prefix_hashes`) it need not compute. `among`: see
        `candidates`.
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
        """It has died, and knows nothing any more."""
        self._prefixes[lead].clear()


def prefix_hashes(token_ids: Sequence[int], items: Sequence[MmItem], salt: bytes) -> list[bytes]:
    """One digest for each whole `PREFIX_TOKENS` of a prompt, of all up to there: tokens, and the pictures
    that begin in it."""
    digest = hashlib.sha256(salt)
    hashes: list[bytes] = []
    for start in range(0, len(token_ids) - PREFIX_TOKENS + 1, PREFIX_TOKENS):
        digest.update(pack_int32(token_ids[start : start + PREFIX_TOKENS]))
        for item in items:
            if start <= item.spans[0].offset < start + PREFIX_TOKENS:
                digest.update(item.kv_hash)
        hashes.append(digest.digest())
    return hashes
