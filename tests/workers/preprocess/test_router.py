from __future__ import annotations

from pipeline.wire.generation import MmItem, Span
from workers.preprocess.router import (
    MAX_REMEMBERED,
    OUTPUT_TOKENS,
    PREFIX_TOKENS,
    Encoded,
    GroupRouter,
    Router,
    prefix_hashes,
)


def test_a_known_hash_goes_where_it_went_before() -> None:
    router = Router(3)
    first = router.choose(b"a", 100)
    assert not first.is_known
    router.choose(b"b", 1)
    again = router.choose(b"a", 100)
    assert again.is_known
    assert again.vit == first.vit


def test_new_hashes_go_to_the_least_loaded() -> None:
    router = Router(3)
    assert [router.choose(bytes([n]), patches).vit for n, patches in enumerate((100, 50, 10, 10, 10))] == [
        0,
        1,
        2,
        2,
        2,
    ]
    router.finished(0, 100)
    assert router.choose(b"next", 1).vit == 0
    assert router.outstanding == [1, 50, 30]


def test_many_pictures_spread_over_all() -> None:
    router = Router(4)
    chosen = [router.choose(n.to_bytes(2, "big"), 256).vit for n in range(64)]
    assert [chosen.count(vit) for vit in range(4)] == [16] * 4


def test_memory_is_bounded() -> None:
    router = Router(1)
    for number in range(MAX_REMEMBERED + 10):
        router.choose(number.to_bytes(4, "big"), 1)
    assert not router.choose((0).to_bytes(4, "big"), 1).is_known
    assert router.choose((MAX_REMEMBERED).to_bytes(4, "big"), 1).is_known


def test_a_known_prefix_goes_where_it_is_and_new_ones_where_there_is_least_to_do() -> None:
    router = GroupRouter([0, 4])
    first, second = prefix_hashes([1] * 640, [], b""), prefix_hashes([2] * 640, [], b"")
    chosen = [
        router.choose(*request) for request in ((first, 640), (second, 640), (first, 650), (second, 650))
    ]
    assert [(lead, num_tokens - OUTPUT_TOKENS) for lead, num_tokens in chosen] == [
        (0, 640),
        (4, 640),
        (0, 10),
        (4, 10),
    ]
    for lead, num_tokens in chosen:
        router.finished(lead, num_tokens)
    assert router.outstanding == {0: 0, 4: 0}


def test_a_group_that_is_busy_is_not_waited_for() -> None:
    router = GroupRouter([0, 1])
    prefix = prefix_hashes([1] * PREFIX_TOKENS, [], b"")
    assert router.choose(prefix, PREFIX_TOKENS)[0] == 0
    router.outstanding[0] += 10 * PREFIX_TOKENS
    assert router.choose(prefix, PREFIX_TOKENS)[0] == 1


def test_a_common_prefix_does_not_draw_everyone_to_one_group() -> None:
    router = GroupRouter([0, 1])
    prefix = prefix_hashes([1] * 2048, [], b"")
    chosen = [router.choose(prefix, 2060)[0] for _ in range(60)]
    assert 20 <= chosen.count(0) <= 40


def test_prefix_hashes_tell_texts_pictures_and_tenants_apart() -> None:
    def item(mm_hash: bytes) -> MmItem:
        return MmItem((Span(70, 4),), mm_hash, mm_hash, ())

    tokens = [1] * (3 * PREFIX_TOKENS - 1)
    plain = prefix_hashes(tokens, [item(b"a")], b"")
    assert len(plain) == 2
    assert plain == prefix_hashes([*tokens, 9], [item(b"a")], b"")[:2]
    other = prefix_hashes(tokens, [item(b"b")], b"")
    assert (plain[0] == other[0], plain[1] == other[1]) == (True, False)
    assert not set(plain) & set(prefix_hashes(tokens, [item(b"a")], b"x"))


def test_the_memory_of_a_group_is_bounded() -> None:
    router = GroupRouter([0])
    for number in range(MAX_REMEMBERED + 10):
        router.choose([number.to_bytes(4, "big")], PREFIX_TOKENS)
    assert router.choose([(0).to_bytes(4, "big")], PREFIX_TOKENS)[1] == PREFIX_TOKENS + OUTPUT_TOKENS
    assert router.choose([(MAX_REMEMBERED).to_bytes(4, "big")], PREFIX_TOKENS)[1] == OUTPUT_TOKENS


def test_only_living_groups_that_the_client_knows_are_chosen() -> None:
    router = GroupRouter([0, 1, 2])
    router.available = {0, 2}
    assert {router.choose([], 1000)[0] for _ in range(10)} == {0, 2}
    assert {router.choose([], 1000, (2, 1))[0] for _ in range(10)} == {2}
    assert router.candidates((1,)) == [1], "it will be back"
    assert router.candidates((7,)) == [0, 2], "of a pipeline that has other groups"
    router.available = set()
    assert router.candidates(()) == [0, 1, 2]


def test_a_group_near_the_embeddings_is_chosen_unless_it_has_more_to_do() -> None:
    router = GroupRouter([0, 1])
    picture = Encoded(stop=700, num_tokens=640, near=[1])
    assert router.choose([], 704, encoded=[picture])[0] == 1
    router.finished(1, 704 + OUTPUT_TOKENS)
    assert router.choose([], 704)[0] == 0
    assert router.choose([], 704, encoded=[Encoded(stop=700, num_tokens=640, near=[0])])[0] == 1


def test_embeddings_within_the_cached_prefix_are_not_brought() -> None:
    router = GroupRouter([0, 1])
    prefixes = prefix_hashes([1] * 704, [], b"")
    assert router.choose(prefixes, 704)[0] == 0
    router.finished(0, 704 + OUTPUT_TOKENS)
    far = Encoded(stop=600, num_tokens=64 * 1000, near=[1])
    assert router.choose(prefixes, 704, encoded=[far])[0] == 0
    assert router.choose(prefixes, 704, encoded=[far._replace(stop=705)])[0] == 1


def test_a_chat_stays_where_its_prefix_is_though_other_groups_have_less_to_do() -> None:
    router = GroupRouter([0, 1])
    turns = [prefix_hashes([7] * length, [], b"") for length in (640, 1280)]
    lead, num_tokens = router.choose(turns[0], 640)
    router.finished(lead, num_tokens)
    for _ in range(10):
        num_tokens = router.choose([], 64, among=[lead])[1]
        router.computed(lead, num_tokens)
    assert router.outstanding == {lead: 10 * OUTPUT_TOKENS, 1 - lead: 0}
    assert router.choose(turns[1], 1280) == (lead, 640 + OUTPUT_TOKENS)


def test_a_prefix_of_many_chats_is_soon_in_every_group() -> None:
    router = GroupRouter([0, 1])
    system = [7] * 640
    chats = [prefix_hashes([*system, *[number] * 64], [], b"") for number in range(12)]
    chosen = []
    for chat in chats:
        lead, num_tokens = router.choose(chat, 704)
        router.computed(lead, num_tokens)
        chosen.append(lead)
    assert chosen.count(0) == chosen.count(1) == 6


def test_a_computed_prompt_counts_no_more() -> None:
    router = GroupRouter([0])
    lead, num_tokens = router.choose([], 5000)
    assert router.outstanding == {0: 5000 + OUTPUT_TOKENS}
    num_tokens = router.computed(lead, num_tokens)
    assert router.outstanding == {0: OUTPUT_TOKENS}
    router.finished(lead, num_tokens)
    assert router.outstanding == {0: 0}
