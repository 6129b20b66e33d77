"""What the gateway passes on, without sockets."""

from __future__ import annotations

from pipeline.transport.ends import Subscription
from pipeline.transport.keys import owner_of
from pipeline.wire.clients import MAX_SALT_BYTES, AbortRequest, Hello, IngestMessage, SubmitRequest
from pipeline.wire.prompts import Chat
from pipeline.wire.sampling import SamplingParams
from workers.gateway.gateway import MAX_BURST, MAX_CLIENTS_PER_KEY, MESSAGES_PER_S, Gateway

ALICE, BOB = "alice's public key", "bob's public key"


def client_of(user: str, number: int = 0) -> bytes:
    return owner_of(user) + number.to_bytes(8, "big")


def hello(client_id: bytes) -> Hello:
    return Hello(client_id=client_id, protocol=1)


class Upstream:
    def __init__(self) -> None:
        self.topics: list[bytes] = []

    def subscribe(self, topic: bytes) -> None:
        self.topics.append(topic)

    def unsubscribe(self, topic: bytes) -> None:
        self.topics.remove(topic)


class Rig:
    def __init__(self) -> None:
        self.ups = [Upstream(), Upstream()]
        self.published: list[tuple[bytes, bytes]] = []
        self.is_full = False
        self.names = {ALICE: "alice", BOB: "bob"}
        self.gateway = Gateway(self.ups, self.publish, self.names.get)

    def publish(self, data: bytes, topic: bytes) -> bool:
        if not self.is_full:
            self.published.append((topic, data))
        return not self.is_full

    def subscribe(self, client_id: bytes) -> None:
        self.gateway.on_subscriptions([Subscription(client_id, True)])

    def leave(self, client_id: bytes) -> None:
        self.gateway.on_subscriptions([Subscription(client_id, False)])

    @property
    def topics(self) -> list[bytes]:
        assert self.ups[0].topics == self.ups[1].topics
        return self.ups[0].topics


def test_only_the_holder_of_a_key_reads_and_speaks_for_its_clients() -> None:
    gateway = Rig().gateway
    assert gateway.accepts(client_of(ALICE), ALICE)
    assert not gateway.accepts(client_of(ALICE), BOB)
    assert not gateway.accepts(client_of(ALICE)[:15], ALICE)
    assert not gateway.accepts(b"", ALICE)
    assert gateway.is_relayed(hello(client_of(ALICE)), ALICE)
    assert not gateway.is_relayed(hello(client_of(ALICE)), BOB)
    assert not gateway.is_relayed(hello(client_of(ALICE) + b"x"), ALICE)
    assert gateway.counters["refused_client_ids"] == 2


def test_one_key_opens_so_many_clients_and_no_more() -> None:
    rig = Rig()
    for number in range(MAX_CLIENTS_PER_KEY):
        assert rig.gateway.accepts(client_of(ALICE, number), ALICE)
        rig.subscribe(client_of(ALICE, number))
    assert not rig.gateway.accepts(client_of(ALICE, 9999), ALICE)
    assert rig.gateway.accepts(client_of(ALICE, 3), ALICE), "it connects again"
    assert rig.gateway.accepts(client_of(BOB), BOB)
    rig.leave(client_of(ALICE, 3))
    assert rig.gateway.accepts(client_of(ALICE, 9999), ALICE)


def test_a_new_connection_before_the_old_one_is_missed_changes_nothing() -> None:
    rig, client = Rig(), client_of(ALICE)
    rig.subscribe(client)
    rig.subscribe(client)
    assert rig.topics == [client]
    rig.leave(client)
    assert rig.topics == [client]
    rig.leave(client)
    assert rig.topics == []
    assert rig.gateway.num_clients == 0
    rig.leave(client)
    assert rig.gateway.num_clients == 0


def test_who_does_not_read_is_cut_off_until_it_says_hello() -> None:
    rig, slow, other = Rig(), client_of(ALICE), client_of(BOB)
    rig.subscribe(slow)
    rig.subscribe(other)
    rig.is_full = True
    rig.gateway.on_output(slow, b"1")
    rig.is_full = False
    rig.gateway.on_output(slow, b"2")  # was under way already
    rig.gateway.on_output(other, b"3")
    assert rig.published == [(other, b"3")]
    assert rig.topics == [other], "the LLM ends the requests of who is gone"
    assert not rig.gateway.is_relayed(AbortRequest(client_id=slow, request_id="r", attempt=1), ALICE)
    assert rig.gateway.is_relayed(hello(slow), ALICE)
    assert rig.topics == [other, slow]
    rig.gateway.on_output(slow, b"4")
    assert rig.published[-1] == (slow, b"4")
    assert rig.gateway.num_bytes == 2, "of the two outputs that went out"
    assert rig.gateway.counters["clients_cut_off"] == 1


def test_who_was_cut_off_and_leaves_is_forgotten() -> None:
    rig, slow = Rig(), client_of(ALICE)
    rig.subscribe(slow)
    rig.is_full = True
    rig.gateway.on_output(slow, b"1")
    rig.leave(slow)
    assert (rig.topics, rig.gateway.num_clients) == ([], 0)
    rig.subscribe(slow)
    assert rig.topics == [slow]


def test_the_key_says_on_whose_behalf_a_request_is_and_whose_caches_it_shares() -> None:
    rig = Rig()

    def submit(user: str, **fields: object) -> SubmitRequest:
        values: dict[str, object] = {"attempt": 1, "prompt": Chat(()), "sampling": SamplingParams(), **fields}
        message = SubmitRequest(client_id=client_of(user), request_id="r", **values)  # type: ignore[arg-type]
        stamped: IngestMessage = rig.gateway.stamped(message, user)
        assert isinstance(stamped, SubmitRequest)
        return stamped

    first, forged, other = submit(ALICE), submit(ALICE, tenant="curve:bob"), submit(BOB)
    assert (first.tenant, forged.tenant, other.tenant) == ("curve:alice", "curve:alice", "curve:bob")
    assert first.cache_salt == forged.cache_salt != other.cache_salt
    salted = submit(ALICE, cache_salt=b"salt")
    assert salted == submit(ALICE, cache_salt=b"salt"), "an attempt finds what the one before has left"
    assert salted.cache_salt not in (first.cache_salt, b"salt", submit(BOB, cache_salt=b"salt").cache_salt)
    assert submit(BOB, cache_salt=first.cache_salt).cache_salt != first.cache_salt, "no salt leads there"
    too_long = bytes(MAX_SALT_BYTES + 1)
    assert submit(ALICE, cache_salt=too_long).cache_salt == too_long, "it is refused later"
    rig.names[ALICE] = "alicia"
    assert submit(ALICE).tenant == "curve:alicia", "its file was renamed"
    rig.names[ALICE] = "alice"
    submit(ALICE)
    rig.names.clear()
    assert submit(ALICE).tenant == "curve:alice", "its file has gone, its connection has not"
    unknown = submit("a key that nobody has")
    assert unknown.tenant.startswith("curve:")
    assert unknown.tenant not in ("curve:alice", "curve:bob")
    assert rig.gateway.stamped(hello(client_of(ALICE)), ALICE) == hello(client_of(ALICE))


def test_a_key_that_floods_is_held_back_and_no_other() -> None:
    gateway = Rig().gateway
    assert sum(gateway.is_in_time(ALICE, 0.0) for _ in range(10_000)) == MAX_BURST
    assert gateway.is_in_time(BOB, 0.0)
    a_second = [1.0 + number / 10_000 for number in range(10_000)]
    assert sum(gateway.is_in_time(ALICE, now) for now in a_second) <= 2 * MESSAGES_PER_S
    assert sum(gateway.is_in_time(ALICE, 1000.0) for _ in range(10_000)) == MAX_BURST, "no more is saved up"
    assert gateway.counters["dropped_messages"] > 20_000
