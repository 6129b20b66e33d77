"""The witness of a node: tells the head that the node has ended, when its launcher could not.

The launcher of a node may be killed. Its workers die with it, but the head would learn of that only by the
node's silence. The witness is a process of its own, so it outlives the launcher. Every process of the node
inherits the write end of one pipe: the pipe's end proves that none of them lives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import msgspec

from pipeline.process.titles import set_title
from pipeline.transport.ends import Sender
from pipeline.transport.joining import HeadAddress, LaunchersKeys
from pipeline.transport.sockets import Sockets
from pipeline.wire.nodes import NodeReport, ReportMessage
from pipeline.wire.topology import REPORTS

LAST_NUMBER = 1 << 62  # of a report; none comes after it
TELL_MS = 2000  # for a head that may be dead, too


class Will(msgspec.Struct, frozen=True):
    """Whom to tell of the end of which stay in the pipeline."""

    host: str
    port: int
    token: bytes
    node_id: bytes


class Witness:
    """The launcher's side."""

    def __init__(self) -> None:
        self._read_end, self.pipe = os.pipe()  # `pipe`: for every process of the node to inherit
        self._instructions, self._ours = os.pipe()

    def start(self) -> None:
        subprocess.Popen(
            [sys.executable, "-m", "launcher.witness", str(self._read_end)],
            stdin=self._instructions, stdout=subprocess.DEVNULL, pass_fds=[self._read_end],
            start_new_session=True,
        )  # fmt: skip
        os.close(self._read_end)
        os.close(self._instructions)

    def instruct(self, will: Will | None) -> None:
        """From now on it tells this at the end; None: nothing."""
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it: the head finds the node silent
            os.write(self._ours, msgspec.json.encode(will) + b"\n")  # so short that it is whole, or not there

    def close(self) -> None:
        """Once the workers are reaped. The witness ends by itself."""
        os.close(self._ours)
        os.close(self.pipe)


def tell(will: Will) -> None:
    head = HeadAddress(will.host, will.port, LaunchersKeys(will.token))
    sockets = Sockets(head, {})
    reports: Sender[ReportMessage] = sockets.sender(REPORTS)
    reports.send(NodeReport(node_id=will.node_id, number=LAST_NUMBER, workers=(), is_done=True))
    head.stop_watching()
    sockets.close(linger_ms=TELL_MS)


def main(pipe: int) -> None:
    set_title("witness")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the launcher, whose end it waits for
    line = [b"null", *sys.stdin.buffer.readlines()][-1]
    while os.read(pipe, 1):
        pass
    if (will := msgspec.json.decode(line, type=Will | None)) is not None:
        tell(will)


if __name__ == "__main__":
    main(int(sys.argv[1]))
