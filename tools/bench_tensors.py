"""How long embeddings take from a ViT process to the LLM: by handle, against their bytes in the message.

    python -m tools.bench_tensors

A producer writes into its pool and sends; a consumer process, which has mapped the pool once, opens what it
is sent, reads a row and answers. Told is the median of such round trips, the writing not counted. By handle
they must not grow with the size.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import zmq

from pipeline.transport.slots import SlotAllocator, align
from pipeline.transport.tensors import PoolMap, TensorPool
from pipeline.wire.handles import PoolInfo, TensorHandle

HIDDEN = 1536  # Qwen2-VL-2B's
SIZES = (64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
WARM_UP = 5


def consume(url: str) -> None:
    """Answers with the sum of the first row."""
    pools = PoolMap()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.connect(url)
        while (parts := socket.recv_multipart(copy=False))[0].bytes != b"end":
            match parts[0].bytes:
                case b"pool":
                    pools.open(msgspec.msgpack.decode(parts[1].bytes, type=PoolInfo))
                    row = np.zeros(1, dtype=np.float32)
                case b"handle":
                    row = pools.tensor(msgspec.msgpack.decode(parts[1].bytes, type=TensorHandle))[0].numpy()
                case _:
                    row = np.frombuffer(parts[1].buffer, dtype=np.float32, count=HIDDEN)
            socket.send(str(float(row.sum())).encode())


def measure(rounds: int) -> list[tuple[int, float, float]]:
    """For each size the seconds by handle and inline."""
    largest = align(max(SIZES))
    pool, slots = TensorPool.on_host("vit.0", 1, 2 * largest, 8), SlotAllocator(2 * largest, largest, 8)
    found: list[tuple[int, float, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        zmq.Context() as context,
        context.socket(zmq.PAIR) as socket,
    ):
        url = f"ipc://{Path(folder) / 'pair'}"
        socket.bind(url)
        with subprocess.Popen([sys.executable, "-m", "tools.bench_tensors", "--consume", url]):

            def ask(kind: bytes, data: bytes | memoryview) -> float:
                socket.send_multipart([kind, data], copy=False)
                return float(socket.recv())

            ask(b"pool", msgspec.msgpack.encode(pool.info))
            for nbytes in SIZES:
                slot = slots.allocate(nbytes)
                assert slot is not None
                handle = pool.lend(slot, (nbytes // 4 // HIDDEN, HIDDEN), "float32")
                array = pool.array(handle)

                def send_handle(handle: TensorHandle = handle) -> float:
                    return ask(b"handle", msgspec.msgpack.encode(handle))

                def send_inline(array: np.ndarray = array) -> float:
                    return ask(b"inline", array.data)

                times: dict[Callable[[], float], list[float]] = {send_handle: [], send_inline: []}
                for send, taken in times.items():
                    for number in range(rounds + WARM_UP):
                        array[:] = number
                        start = time.perf_counter()
                        answer = send()
                        taken.append(time.perf_counter() - start)
                        assert answer == number * HIDDEN, "the consumer saw something else"
                by_handle, inline = (statistics.median(taken[WARM_UP:]) for taken in times.values())
                found.append((nbytes, by_handle, inline))
                slots.free(slot)
            socket.send(b"end")
    pool.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--consume", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.consume:
        consume(args.consume)
        return
    print("| embeddings, KiB | by handle, us | in the message, us | ratio |\n| --- | --- | --- | --- |")
    for nbytes, by_handle, inline in measure(args.rounds):
        print(f"| {nbytes >> 10} | {by_handle * 1e6:.0f} | {inline * 1e6:.0f} | {inline / by_handle:.1f} |")


if __name__ == "__main__":
    main()
