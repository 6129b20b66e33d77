"""One stay of a node in the pipeline, and how long it may last without a word from the head. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pipeline.transport.ends import Receiver, Sender
from pipeline.wire.control import StatusMessage
from pipeline.wire.nodes import (
    JoinRefused,
    JoinRequest,
    NodeOrders,
    NodeReport,
    OrdersMessage,
    ReportMessage,
    StatusPassedOn,
    WorkerReport,
)


class NodeEnded(Exception):
    """The node is to end, for a reason, or in order (without one)."""


class Membership:
    """One stay in the pipeline, under one id: its two edges, and what the head has heard."""

    def __init__(
        self,
        request: JoinRequest,
        timeout_s: float,
        reports: Sender[ReportMessage],
        orders: Receiver[OrdersMessage],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout_s`: how long the node may run workers without a word from the head."""
        self._request, self._timeout_s, self._clock = request, timeout_s, clock
        self._reports, self.orders = reports, orders
        self._sent: dict[int, float] = {}  # when each report that is not acknowledged was sent, by number
        self._number = 0
        self.fenced_at = math.inf  # when this node's time is over
        self.is_taken_in = self.may_leave = False

    def join(self) -> None:
        self._reports.try_send(self._request)

    def report(
        self, workers: tuple[WorkerReport, ...], is_leaving: bool = False, is_done: bool = False
    ) -> None:
        self._number += 1
        self._sent[self._number] = self._clock()
        self._reports.try_send(
            NodeReport(
                node_id=self._request.node_id, number=self._number, workers=workers,
                is_leaving=is_leaving, is_done=is_done,
            )
        )  # fmt: skip

    def pass_on(self, status: StatusMessage) -> None:
        self._reports.try_send(StatusPassedOn(node_id=self._request.node_id, status=status))

    def read_orders(self) -> NodeOrders | None:
        """The latest, if there are new ones. Raises NodeEnded where the head refuses this node."""
        latest: NodeOrders | None = None
        while (received := self.orders.receive()) is not None:
            if isinstance(received.message, JoinRefused):
                raise NodeEnded(f"the head refuses this node: {received.message.reason}")
            latest = received.message
        if latest is not None:
            if not self.is_taken_in:
                self.is_taken_in, self.fenced_at = True, self._clock() + self._timeout_s
            if (sent := self._sent.get(latest.heard)) is not None:
                self.fenced_at = sent + self._timeout_s
                self._sent = {number: at for number, at in self._sent.items() if number >= latest.heard}
            self.may_leave = latest.may_leave
        return latest
