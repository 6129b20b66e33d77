from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers import Server

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this kernel gives no huge pages"
)
def test_weights_lie_in_huge_pages(server: Server) -> None:
    rollup = Path(f"/proc/{server.children['llm.0']}/smaps_rollup").read_text()
    assert int(rollup.split("AnonHugePages:")[1].split()[0]) >= 8 << 10  # KiB; of some 20 MB of weights
