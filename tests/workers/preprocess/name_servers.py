"""A name server on loopback that knows a few names, and never answers for some."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import cast

A, AAAA, SERVFAIL, NXDOMAIN = 1, 28, 2, 3


class NameServer(asyncio.DatagramProtocol):
    """`names` to addresses; `late`: seconds before an answer. What ends in silent.test gets none."""

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        self.names = names
        self.late: dict[str, float] = {}
        self.asked: list[tuple[str, int]] = []
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.address = "{}:{}".format(*transport.get_extra_info("sockname"))

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += data[at] + 1
        name, (kind,) = ".".join(labels).lower(), struct.unpack("!H", data[at + 1 : at + 3])
        self.asked.append((name, kind))
        if name.endswith("silent.test"):
            return
        question = data[12 : at + 5]
        records = [
            b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 60, len(packed)) + packed
            for packed in (ipaddress.ip_address(address).packed for address in self.names.get(name, ()))
            if len(packed) == {A: 4, AAAA: 16}.get(kind)
        ]
        code = 0 if name in self.names else SERVFAIL if name.endswith("broken.test") else NXDOMAIN
        head = data[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, len(records), 0, 0)
        answer = head + question + b"".join(records)
        asyncio.get_running_loop().call_later(self.late.get(name, 0.0), self._transport.sendto, answer, addr)


@contextlib.asynccontextmanager
async def name_server(names: Mapping[str, Sequence[str]]) -> AsyncIterator[NameServer]:
    server = NameServer(names)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, ("127.0.0.1", 0))
    try:
        yield server
    finally:
        transport.close()
