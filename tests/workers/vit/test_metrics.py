"""What a ViT measures of its batches."""

from __future__ import annotations

from typing import Any

from pipeline.process.metrics import Metrics
from pipeline.transport.slots import ALIGNMENT, SlotAllocator
from pipeline.wire.base import GridTHW
from tests.workers.vit.test_batcher import embedding_of
from workers.vit.batcher import Batcher, Pending
from workers.vit.metrics import VitStats


class FakeCore:
    num_encodes, num_stale = 3, 1

    def __init__(self) -> None:
        self.batcher = Batcher(SlotAllocator(8 * ALIGNMENT, ALIGNMENT, 64), embedding_of)
        self.num_bytes = {"host": 70}


class FakeInbox:
    num_refused = 4


def test_batches_and_the_pool_are_measured() -> None:
    metrics = Metrics()
    core: Any = FakeCore()
    inbox: Any = FakeInbox()
    stats = VitStats(metrics, core, inbox)
    waited = [Pending(b"a", GridTHW(1, 4, 4), sent_at=98.5), Pending(b"b", GridTHW(1, 4, 4), sent_at=99.5)]
    stats.on_begun([*waited, Pending(b"c", GridTHW(1, 4, 4))], 100.0)
    stats.on_encoded(0.25)
    core.batcher.allocator.allocate(ALIGNMENT)
    told = {metric.name: metric for metric in metrics.told()}
    histograms = {name: (sum(one.counts), one.total) for name, one in told.items() if one.kind == "histogram"}
    assert histograms == {
        "stage_vit_wait_seconds": (2, 2.0), "stage_vit_seconds": (1, 0.25), "vit_batch_chunks": (1, 3),
    }, "a time that is unknown is not measured"  # fmt: skip
    assert told["transport_bytes"].values == (("host", 70),)
    values = metrics.values()
    assert (values["pool_used_bytes"], values["pool_bytes"]) == (ALIGNMENT, 8 * ALIGNMENT)
    assert (values["encodes"], values["refused_messages"]) == (3, 4)
