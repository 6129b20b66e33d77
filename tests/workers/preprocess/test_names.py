"""What is remembered by name: each tenant has its own share, which nobody else can flush."""

from __future__ import annotations

import random

from workers.preprocess.names import TenantCache


def test_tenants_share_nothing() -> None:
    memory: TenantCache[int] = TenantCache()
    memory.put("a", b"k", 1)
    memory.put("b", b"k", 2)
    assert (memory.get("a", b"k"), memory.get("b", b"k"), memory.get("c", b"k"), memory.get("a", b"x")) == (
        1,
        2,
        None,
        None,
    )
    memory.put("a", b"k", 3)
    assert (memory.get("a", b"k"), memory.get("b", b"k"), len(memory)) == (3, 2, 2)


def test_one_tenant_cannot_flush_anothers_names() -> None:
    memory: TenantCache[int] = TenantCache(max_values=100, max_share=80, max_tenants=10)
    for number in range(10):
        memory.put("quiet", b"%d" % number, number)
    for number in range(10_000):
        memory.put("loud", b"%d" % number, number)
    assert len(memory) <= 100
    assert [memory.get("quiet", b"%d" % number) for number in range(10)] == list(range(10))
    assert memory.get("loud", b"9999") == 9999
    for tenant in ("loud 2", "loud 3"):
        for number in range(200):
            memory.put(tenant, b"%d" % number, number)
    assert len(memory) <= 100
    assert [memory.get("quiet", b"%d" % number) for number in range(10)] == list(range(10)), (
        "the largest give"
    )


def test_what_was_used_last_is_kept() -> None:
    memory: TenantCache[int] = TenantCache(max_share=3)
    for key in (b"a", b"b", b"c"):
        memory.put("t", key, 1)
    memory.get("t", b"a")
    memory.put("t", b"d", 1)
    assert [memory.get("t", key) for key in (b"a", b"b", b"c", b"d")] == [1, None, 1, 1]


def test_tenants_are_bounded_and_the_count_is_right() -> None:
    rng, memory = random.Random(1), TenantCache[int](max_values=50, max_share=20, max_tenants=8)
    for number in range(5000):
        memory.put(str(rng.randrange(20)), b"%d" % rng.randrange(30), number)
        assert len(memory) == sum(len(values) for values in memory._tenants.values()) <= 50
        assert len(memory._tenants) <= 8
        assert all(memory._tenants.values())
