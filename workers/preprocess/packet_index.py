"""A video's frames and the entries at which decoding may start, from its packets alone, if they are
certain."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

from workers.preprocess.bitstream import Kind, Look


class Entry(NamedTuple):
    packet: int  # number in the file's order
    frame: int  # number of the picture in presentation order


class PacketIndex(NamedTuple):
    times: list[int]  # of all frames, sorted, in units of the stream's time base
    entries: list[Entry]  # the first is the beginning of the file

    def entry_of(self, frame: int) -> Entry:
        """The last entry from which decoding reaches a frame."""
        return self.entries[bisect_right(self.entries, frame, key=lambda entry: entry.frame) - 1]


def index_packets(packets: Iterable[Any], look: Look) -> PacketIndex | None:
    """None where the packets are ambiguous: then the file must be decoded to count its frames."""
    times: list[int] = []
    keys: list[int] = []
    for packet in packets:
        kind = look(memoryview(packet))
        if kind is Kind.DOUBTFUL or packet.pts is None or packet.is_corrupt or packet.is_discard:
            return None
        if _has_new_parameters(packet):
            return None
        if kind is Kind.ENTRY and packet.is_keyframe:
            keys.append(len(times))
        times.append(packet.pts)
    ordered = sorted(times)
    if not keys or keys[0] != 0 or len(set(times)) < len(times) or ordered[0] != times[0]:
        return None
    return PacketIndex(ordered, _entries(times, keys, ordered))


def _entries(times: list[int], keys: list[int], ordered: list[int]) -> list[Entry]:
    """The keys after which, in time, no picture follows that precedes them in the file."""
    entries, latest, at = [], times[0] - 1, 0
    for key in keys:
        latest = max(latest, *times[at:key]) if key > at else latest
        at = key
        if times[key] > latest:
            entries.append(Entry(key, bisect_left(ordered, times[key])))
    return entries


def _has_new_parameters(packet: Any) -> bool:
    """Whether the decoder's parameters change here (several sample descriptions in mp4)."""
    return hasattr(packet, "has_sidedata") and packet.has_sidedata("new_extradata")
