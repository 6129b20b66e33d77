from __future__ import annotations

import pytest

from workers.api.server_sent_events import EventForm, event


@pytest.mark.parametrize("value", ["plain", 'quote " and \\ and \x00 and \u2028', {"content": "x"}, None, 5])
def test_a_form_writes_what_encoding_all_of_it_would(value: object) -> None:
    form = EventForm(
        {"id": "a", "choices": [{"index": 0, "delta": None, "more": [1]}]}, ("choices", 0, "delta")
    )
    assert form.event(value) == event({"id": "a", "choices": [{"index": 0, "delta": value, "more": [1]}]})
