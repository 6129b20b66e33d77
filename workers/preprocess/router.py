"""Chooses the ViT of each chunk and the LLM group of each request. Pure.

It remembers its own choices as the directory of caches: preprocess is the only router.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pipeline.wire.generation import MmItem
from pipeline.wire.packing import pack_int32

MAX_REMEMBERED = 100_000
# What the way of embeddings to another node counts as: about a picture of 2,000 x 2,000 pixels.
FAR_PATCHES = 1 << 14
PREFIX_TOKENS = 64  # prefixes are remembered in steps of so many tokens
# What an open request counts as, in tokens to compute, when its prompt is computed: steps take longer by it.
OUTPUT_TOKENS = 128
# What a token of a cached prefix counts as. A prefix that one request has had is a chat's own: a group that
# lacks it computes it again, which delays others, too. One that several have had is worth having in every
# group, and must not draw all requests to one.
OWN, COMMON = 4.0, 0.25
# What bringing the embedding of a token from another node costs, in tokens to compute: a few kilobytes.
FAR_TOKEN = 1 / 16


class VitRoute:
    """The ViT of a chunk, and whether its hash was sent there before."""

    __slots__ = ("is_known", "vit")

    def __init__(self, vit: int, is_known: bool) -> None:
        self.vit, self.is_known = vit, is_known


class Router:
    def __init__(self, num_vits: int) -> None:
        """Of all nodes."""
        self.outstanding = [0] * num_vits  # unfinished patches of each ViT
        self.available = set(range(num_vits))  # the serving ViTs
        self._places: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, mm_hash: bytes, num_patches: int, near: Collection[int] = ()) -> VitRoute:
        """The ViT to which the hash was sent before, else the one with the fewest outstanding patches.

        Counts the patches as outstanding. `near`: the ViTs on the node of the request's group (empty: all).
        Others have to send their embeddings over the network, and are chosen where the near ones have much
        more to do.
        """
        vit = self._places.pop(mm_hash, None)
        is_known = vit is not None
        if vit is None:
            vit = min(
                self.available or range(len(self.outstanding)),
                key=lambda index: (self.outstanding[index] + self._distance(index, near), index),
            )
        self._places[mm_hash] = vit
        if len(self._places) > MAX_REMEMBERED:
            self._places.popitem(last=False)
        self.outstanding[vit] += num_patches
        return VitRoute(vit, is_known)

    def place_of(self, mm_hash: bytes) -> int | None:
        """The ViT to which the hash was sent before."""
        return self._places.get(mm_hash)

    @staticmethod
    def _distance(vit: int, near: Collection[int]) -> int:
        return 0 if not near or vit in near else FAR_PATCHES

    def finished(self, vit: int, num_patches: int) -> None:
        self.outstanding[vit] -= num_patches

    def forget(self, vit: int) -> None:
        """The ViT has died: its cache is gone."""
        for mm_hash in [mm_hash for mm_hash, place in self._places.items() if place == vit]:
            del self._places[mm_hash]


class Encoded(NamedTuple):
    """A chunk of a prompt whose embeddings a ViT has."""

    stop: int  # the first token of the prompt after its item
    num_tokens: int
    near: Collection[int]  # the groups on that ViT's node


class GroupRouter:
    """Groups are named by the number of their rank 0."""

    def __init__(self, leads: Sequence[int]) -> None:
        self.outstanding = dict.fromkeys(leads, 0)  # tokens that each group still has to compute
        self.available = set(leads)  # the serving groups
        # By group: how many requests with a prefix were sent there.
        self._prefixes: dict[int, OrderedDict[bytes, int]] = {lead: OrderedDict() for lead in leads}

    def candidates(self, among: Collection[int] = ()) -> list[int]:
        """The serving groups of those in `among` (empty: of all groups); if none serves, all of these."""
        wanted = [lead for lead in self.outstanding if lead in among] or list(self.outstanding)
        return [lead for lead in wanted if lead in self.available] or wanted

    def choose(
        self, prefixes: Sequence[bytes], num_tokens: int, among: Collection[int] = (),
        encoded: Sequence[Encoded] = (),
    ) -> tuple[int, int]:  # fmt: skip
        """The group with the fewest tokens to compute, and the tokens that the request has to compute there.

        Those of `prefixes` (see `prefix_hashes`) that were sent to a group before count as cached there.
        What is `encoded` on another node, and is behind the cached prefix, counts as far. `among`: see
        `candidates`.
        """
        known = {lead: self._num_known(lead, prefixes) * PREFIX_TOKENS for lead in self.outstanding}

        def cost(lead: int) -> float:
            far = sum(one.num_tokens for one in encoded if one.stop > known[lead] and lead not in one.near)
            return self.outstanding[lead] - self._worth(lead, prefixes, known[lead]) + FAR_TOKEN * far

        lead = min(sorted(self.candidates(among)), key=cost)
        seen = self._prefixes[lead]
        for digest in prefixes:
            seen[digest] = seen.pop(digest, 0) + 1
        while len(seen) > MAX_REMEMBERED:
            seen.popitem(last=False)
        num_new = num_tokens - known[lead] + OUTPUT_TOKENS
        self.outstanding[lead] += num_new
        return lead, num_new

    def _worth(self, lead: int, prefixes: Sequence[bytes], num_known: int) -> float:
        """Of the cached prefix, in tokens to compute."""
        if not num_known:
            return 0.0
        num_requests = self._prefixes[lead][prefixes[num_known // PREFIX_TOKENS - 1]]
        return num_known * (OWN if num_requests == 1 else COMMON)

    def _num_known(self, lead: int, prefixes: Sequence[bytes]) -> int:
        seen = self._prefixes[lead]
        return next((index for index, digest in enumerate(prefixes) if digest not in seen), len(prefixes))

    def computed(self, lead: int, num_tokens: int) -> int:
        """A request that counts as `num_tokens` has its prompt. Returns what it counts as from now on."""
        self.outstanding[lead] += OUTPUT_TOKENS - num_tokens
        return OUTPUT_TOKENS

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
