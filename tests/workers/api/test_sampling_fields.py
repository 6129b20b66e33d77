from __future__ import annotations

import importlib.util
import re

import msgspec
import pytest

import pipeline.wire.sampling
from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import MAX_STOP_TOKEN_IDS, SamplingParams
from workers.api import sampling_fields
from workers.api.json_bodies import decode_json
from workers.api.sampling_fields import SamplingFields, to_sampling


class Wider(SamplingParams, frozen=True, kw_only=True, forbid_unknown_fields=True):
    toy_sigma: float = 0.0


def test_a_parameter_of_the_wire_is_a_field_of_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.wire.sampling, "SamplingParams", Wider)
    spec = importlib.util.spec_from_file_location("fields_of_wider", sampling_fields.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    request = decode_json(b'{"toy_sigma": 1.5, "top_k": null}', fresh.SamplingFields)
    made = fresh.to_sampling(request, {"top_k": 3}, max_tokens=None, logprobs=None)
    assert made == Wider(toy_sigma=1.5, top_k=3)
    with pytest.raises(RequestError, match="toy_sigma"):
        decode_json(b'{"toy_sigma": "x"}', fresh.SamplingFields)
    with pytest.raises(RequestError, match="toy_sigma"):
        decode_json(b'{"toy_sigma": 1.5}', SamplingFields)


def test_what_is_not_given_is_the_default() -> None:
    empty = decode_json(b"{}", SamplingFields)
    assert to_sampling(empty, {}, max_tokens=None, logprobs=None) == SamplingParams()
    names = set(SamplingParams.__struct_fields__) - set(sampling_fields.NAMED_BY_ENDPOINTS)
    request = decode_json(msgspec.json.encode(dict.fromkeys(sorted(names))), SamplingFields)
    assert to_sampling(request, {}, max_tokens=None, logprobs=None) == SamplingParams()


@pytest.mark.parametrize("count", [MAX_STOP_TOKEN_IDS + 1, 1000])
def test_stop_token_ids_have_one_limit(count: int) -> None:
    request = decode_json(msgspec.json.encode({"stop_token_ids": list(range(count))}), SamplingFields)
    with pytest.raises(RequestError, match=f"at most {MAX_STOP_TOKEN_IDS} ids, got {count} ids"):
        to_sampling(request, {}, max_tokens=None, logprobs=None)


def sampled(fields: dict[str, object], max_tokens: int | None = None) -> SamplingParams:
    request = decode_json(msgspec.json.encode(fields), SamplingFields)
    return to_sampling(request, {"temperature": 0.7}, max_tokens=max_tokens, logprobs=None)


def test_numbers_mean_what_they_mean_at_other_servers() -> None:
    usual = sampled({})
    assert sampled({"top_p": 0}).top_p < 1e-6, "the best token only"
    assert sampled({"seed": -1}) == sampled({"stop": ""}) == sampled({}, max_tokens=-1) == usual
    assert sampled({"seed": -7}).seed == 2**63 - 7
    assert sampled({"top_k": 5.0, "min_tokens": 2.0, "stop_token_ids": [3.0]}) == sampled(
        {"top_k": 5, "min_tokens": 2, "stop_token_ids": [3]}
    )


def test_half_a_token_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        sampled({"top_k": 2.5})
    assert caught.value.info.field == "top_k"


@pytest.mark.parametrize("key", ["abc", "-1", "+1", "1_0", " 1", "١", ""])
def test_a_bias_for_no_token_is_refused_with_its_key(key: str) -> None:
    with pytest.raises(RequestError, match=f"{re.escape(repr(key))} is no id"):
        sampled({"logit_bias": {"1": 2, key: 1}})


def test_all_keys_that_are_no_tokens_are_named() -> None:
    with pytest.raises(RequestError, match="'a', 'b' are no ids"):
        sampled({"logit_bias": {"a": 1, "5": 1, "b": 1}})
