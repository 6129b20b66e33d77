"""Two carriers with real sockets and memory: what one node's workers say reaches the other's."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pipeline.transport.tensors import PoolMap
from pipeline.wire.base import ChunkKey, GridTHW, Order, PoolOpened
from pipeline.wire.encoding import EncodeRequest, LeaseReleased, PixelsCopied, PixelsReleased
from pipeline.wire.generation import EmbeddingReady, LeaseRefused
from pipeline.wire.topology import CARRY, ENCODE, FEEDBACK, LLM
from tools.two_nodes import CARRIERS, LEADS, PREPROCESS, VITS, two_nodes, wait_for

NEEDS_NIXL = pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="NIXL is not installed")
KEY = ChunkKey("r", 1, 0, 0, lead=1)
GRID = GridTHW(1, 4, 4)
SHAPE = (1, 1000, 1003, 3)  # 3 MB, in pieces of which the last is short


KINDS = ["zeromq", pytest.param("nixl", marks=NEEDS_NIXL)]


@pytest.mark.parametrize("carrier", KINDS)
def test_pixels_arrive_intact_at_a_vit_of_another_node(
    tmp_path: Path, carrier: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with two_nodes(tmp_path, carrier) as nodes:
        preprocess, vit = nodes.sockets(PREPROCESS), nodes.sockets(VITS[1])
        feedback, inbox = preprocess.receiver(FEEDBACK), vit.receiver(ENCODE, 1)
        nodes.start_carriers()
        to_vit, from_vit = preprocess.sender(ENCODE, 1), vit.sender(CARRY, 1)
        origin = {"sender": PREPROCESS, "epoch": 1}
        pool, allocator = nodes.pool(PREPROCESS)
        announced = PoolOpened(pool=pool.info, receiver_epoch=1, **origin)  # type: ignore[arg-type]
        to_vit.send(announced)
        preprocess.sender(CARRY, 0).send(announced)
        if carrier == "nixl":
            wait_for(lambda: "tensors of node 0 come by nixl" in caplog.text or None)
        slot = allocator.allocate(int(np.prod(SHAPE)))
        assert slot is not None
        pixels = pool.lend(slot, SHAPE, "uint8")
        data = os.urandom(pixels.nbytes)
        pool.write(pixels, 0, data)
        for sent in (None, pixels):
            to_vit.send(
                EncodeRequest(
                    key=KEY,
                    arrival=1,
                    position=0,
                    mm_hash=b"h",
                    grid_thw=GRID,
                    pixels=sent,
                    **origin,  # type: ignore[arg-type]
                )
            )
        opened = nodes.receive(inbox, PoolOpened)
        assert opened.sender == CARRIERS[1]
        assert nodes.receive(inbox, EncodeRequest).pixels is None
        copied = nodes.receive(inbox, EncodeRequest).pixels
        assert copied is not None
        pools = PoolMap()
        pools.open(opened.pool)
        assert pools.read(copied, 0, copied.nbytes) == data
        assert nodes.receive(feedback, PixelsCopied).key == KEY
        from_vit.send(PixelsReleased(sender=VITS[1], epoch=1, key=KEY))
        assert nodes.receive(feedback, PixelsReleased).sender == CARRIERS[1]
        pools.close(str(CARRIERS[1]))
        assert nodes.copies(1) == {carrier: 1}


@pytest.mark.parametrize("carrier", KINDS)
def test_embeddings_arrive_intact_and_a_stale_handle_is_refused(
    tmp_path: Path, carrier: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with two_nodes(tmp_path, carrier) as nodes:
        vit, lead = nodes.sockets(VITS[1]), nodes.sockets(LEADS[0])
        inbox, leases = lead.receiver(LLM, 0), vit.receiver(ENCODE, 1)
        nodes.start_carriers()
        to_lead, to_carrier = vit.sender(LLM, 0), vit.sender(CARRY, 1)
        pool, allocator = nodes.pool(VITS[1])
        announced = PoolOpened(pool=pool.info, receiver_epoch=1, sender=VITS[1], epoch=1)
        to_lead.send(announced)
        to_carrier.send(announced)
        if carrier == "nixl":
            wait_for(lambda: "tensors of node 1 come by nixl" in caplog.text or None)
        slot = allocator.allocate(7 << 20)
        assert slot is not None
        embeddings = pool.lend(slot, (1024, 1792), "float32")
        data = os.urandom(embeddings.nbytes)
        pool.write(embeddings, 0, data)

        def send(item: int, lease_id: int) -> ChunkKey:
            key = ChunkKey("r", 1, item, 0)
            to_lead.send(
                EmbeddingReady(
                    sender=VITS[1], epoch=1, key=key, lease_id=lease_id, embeddings=embeddings,
                    was_encoded=True, order=Order(1, item),
                )
            )  # fmt: skip
            return key

        key = send(0, 8)
        opened = nodes.receive(inbox, PoolOpened)
        ready = nodes.receive(inbox, EmbeddingReady)
        assert (ready.key, ready.sender, ready.embeddings.shape) == (key, CARRIERS[0], (1024, 1792))
        pools = PoolMap()
        pools.open(opened.pool)
        assert pools.read(ready.embeddings, 0, embeddings.nbytes) == data
        released = nodes.receive(leases, LeaseReleased)
        assert (released.lease_ids, released.sender) == ((8,), CARRIERS[0])
        # The slot has another content now: its old handle is stale at the source.
        allocator.free(slot)
        again = allocator.allocate(7 << 20)
        assert again is not None
        pool.lend(again, (1024, 1792), "float32")
        embeddings = msgspec.structs.replace(embeddings, shape=(1, 1))  # not that of the copy
        key = send(1, 9)
        assert nodes.receive(inbox, LeaseRefused).key == key
        assert nodes.copies(0) == {carrier: 1}
        pools.close(str(CARRIERS[0]))
