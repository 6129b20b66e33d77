"""The gateway process: relays between clients on other machines (encrypted tcp sockets, "outside") and the
sockets in the run directory ("inside").

A process of its own, so that the LLM's loop handles neither encryption nor untrusted bytes. After its death
clients resubmit, as after the death of any other worker.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from pipeline.config import MIB
from pipeline.process.process import ShutdownRequested, WorkerContext, limit_memory
from pipeline.transport.ends import Publisher, Received, Receiver, Relayed
from pipeline.transport.keys import ServerKeys
from pipeline.transport.poller import Poller
from pipeline.transport.sockets import Sockets
from pipeline.transport.tcp import ClientListener
from pipeline.wire.clients import IngestMessage, OutputsMessage
from pipeline.wire.control import ControlMessage, PipelineState
from pipeline.wire.topology import CONTROL, INGEST, OUTPUTS
from workers.gateway.gateway import Gateway
from workers.gateway.metrics import declare

# messages to preprocess; further ones wait in the queues of their clients
INSIDE_HIGH_WATER_MARK = 4
CLIENT_HIGH_WATER_MARK = 2  # unread messages of one client
BASE_MIB = 1024
# requests of the largest size in memory: a flood from a client ends this process only
MAX_HELD_REQUESTS = 16
OUTPUTS_HIGH_WATER_MARK = 2048  # messages: a client that lags behind so far is cut off
RETRY_S = 0.005  # while the queue to preprocess is full
MAX_RELAYED = 64  # messages of clients in one turn of the loop, dropped ones included
GREETING_INTERVAL_S = 0.1
HEARTBEAT_S = 2.0  # the launcher's is a second; if the launcher hangs, the last state is repeated
LIFE_INTERVAL_S = 0.5
STATS_INTERVAL_S = 0.5
LINGER_MS = 500  # for the last messages of a pipeline that ends


def main(context: WorkerContext) -> None:
    config = context.config
    port = config.direct.direct_port
    assert port is not None, "placement starts no gateway without a port"
    door = ClientListener(config.direct.direct_host, port, ServerKeys.read(Path(config.direct.direct_keys)))
    limit_memory(BASE_MIB + MAX_HELD_REQUESTS * config.api.max_request_mib)
    outside = Sockets(door, {})
    relay = _Relay(context, door, outside)
    context.ready()
    try:
        while True:
            relay.turn()
    except ShutdownRequested:
        relay.relay_outputs()
        raise
    finally:
        outside.close(LINGER_MS)


class _Relay:
    def __init__(self, context: WorkerContext, door: ClientListener, outside: Sockets) -> None:
        self._context, self._door = context, door
        config = context.config
        self._ups: list[Relayed[OutputsMessage]] = [
            context.sockets.relayed(OUTPUTS, lead) for lead in config.leads
        ]
        self._to_preprocess = context.sockets.sender(INGEST, high_water_mark=INSIDE_HIGH_WATER_MARK)
        self._control = context.control()
        keys = ServerKeys.read(Path(config.direct.direct_keys))
        self._gateway = Gateway(
            self._ups,
            lambda data, topic: self._outputs.publish_raw(data, topic),
            lambda user: keys.client_name(user.encode()),
        )
        self._outputs: Publisher[OutputsMessage] = outside.publisher(
            OUTPUTS, self._gateway.accepts, OUTPUTS_HIGH_WATER_MARK
        )
        self._states: Publisher[ControlMessage] = outside.publisher(CONTROL)
        self._ingest: Receiver[IngestMessage] = outside.receiver(
            INGEST,
            max_message_bytes=(config.api.max_request_mib + 1) * MIB,
            high_water_mark=CLIENT_HIGH_WATER_MARK,
        )
        self._state: PipelineState | None = None
        self._waiting: Received[IngestMessage] | None = None  # until the queue to preprocess has room
        self._poller = Poller(self._control, self._states, self._outputs, *self._ups)
        self._is_reading = self._has_new = False
        self._stats_due = self._greeted_at = 0.0
        declare(context.metrics, self._gateway, self._refused)

    def _refused(self) -> dict[str, int]:
        return {
            "refused_messages": self._ingest.num_refused,
            "refused_connections": self._door.num_refused,
            "refused_subscriptions": self._outputs.num_refused + self._states.num_refused,
        }

    def turn(self) -> None:
        """One turn of the loop: drains all sockets, then sleeps until one is readable."""
        self._context.recorder.move()
        self._read_control()
        self._greet()
        for _ in range(MAX_RELAYED):  # one by one: `accepts` counts the clients before each
            self._gateway.on_subscriptions(self._outputs.subscriptions(max_events=1))
        self._relay_ingest()
        self.relay_outputs()
        if (now := time.monotonic()) >= self._stats_due:
            self._stats_due = now + STATS_INTERVAL_S
            self._context.stats(num_open_requests=0)
        if self._is_reading != (self._waiting is None):
            self._is_reading = not self._is_reading
            (self._poller.add if self._is_reading else self._poller.remove)(self._ingest)
        self._poller.wait(
            RETRY_S
            if self._waiting is not None
            else GREETING_INTERVAL_S
            if self._has_new
            else LIFE_INTERVAL_S
        )

    def _greet(self) -> None:
        """Publishes the state for new subscribers. Rate-limited, since all subscribers get it."""
        self._has_new |= any(event.is_new for event in self._states.subscriptions())
        # Also without a heartbeat for long: the launcher hangs; if it were dead, this process would be, too.
        due = self._greeted_at + (GREETING_INTERVAL_S if self._has_new else HEARTBEAT_S)
        if self._state is not None and time.monotonic() >= due:
            self._has_new = False
            self._publish_state(self._state)

    def _publish_state(self, state: PipelineState) -> None:
        """Without where and by which keys nodes reach each other."""
        self._greeted_at = time.monotonic()
        if state.nodes:
            workers = tuple(msgspec.structs.replace(one, urls={}) for one in state.workers)
            state = msgspec.structs.replace(state, nodes=(), workers=workers)
        self._states.publish(state)

    def _read_control(self) -> None:
        while (received := self._control.receive()) is not None:
            self._state = received.message
            self._publish_state(self._state)  # also that the pipeline ends
            self._context.follow(self._state)

    def _relay_ingest(self) -> None:
        for _ in range(MAX_RELAYED):
            if self._waiting is None:
                received = self._ingest.receive()
                if received is None:
                    return
                if not self._gateway.is_in_time(received.user, time.monotonic()):
                    continue
                if not self._gateway.is_relayed(received.message, received.user):
                    continue
                message = self._gateway.stamped(received.message, received.user)
                self._waiting = received._replace(message=message)
                self._gateway.num_bytes += sum(frame.nbytes for frame in received.frames)
            if not self._to_preprocess.try_send(self._waiting.message, self._waiting.frames):
                return
            self._waiting = None

    def relay_outputs(self) -> None:
        for upstream in self._ups:
            while (raw := upstream.receive_raw()) is not None:
                self._gateway.on_output(*raw)
