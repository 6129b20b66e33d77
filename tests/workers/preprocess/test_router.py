from __future__ import annotations

from workers.preprocess.router import MAX_REMEMBERED, Router


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
    assert [router.choose(bytes([n]), patches).vit for n, patches in enumerate((100, 50, 10, 10, 10))] == [0, 1, 2, 2, 2]
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
