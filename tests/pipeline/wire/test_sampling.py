from __future__ import annotations

import hashlib

from pipeline.wire.sampling import SamplingParams, with_seed


def test_without_a_seed_the_id_and_the_index_give_one() -> None:
    digest = hashlib.blake2b(b"r1" + bytes([1, 0, 0, 0]), digest_size=8).digest()
    expected = int.from_bytes(digest, "little") & (2**63 - 1)
    params = SamplingParams(top_p=0.9)
    assert with_seed(params, "r1", 1) == SamplingParams(top_p=0.9, seed=expected)
    seeds = {with_seed(params, name, index).seed for name in ("r1", "r2", "r\u00e9") for index in range(32)}
    assert len(seeds) == 96
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


def test_an_explicit_seed_is_that_of_the_first_choice_and_the_others_follow() -> None:
    params = SamplingParams(seed=2**63 - 2)
    assert with_seed(params, "r1", 0) is params
    assert [with_seed(params, name, 0).seed for name in ("r1", "r2")] == [2**63 - 2] * 2
    assert [with_seed(params, "r1", index).seed for index in (1, 2, 3)] == [2**63 - 1, 0, 1]
