from __future__ import annotations

import importlib.util

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
