"""Interfaces by their addresses."""

from __future__ import annotations

import pytest

from pipeline.transport.interfaces import interface_of


@pytest.mark.parametrize(
    ("address", "name"), [("127.0.0.1", "lo"), ("192.0.2.1", ""), ("2001:db8::1", ""), ("", "")]
)
def test_an_interface_is_found_by_its_address(address: str, name: str) -> None:
    assert interface_of(address) == name
