"""The model runner of an LLM worker in this process, driven as the engine drives it.

Everything is in a step but the scheduler and the sockets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import TextInfo, read_model_info
from pipeline.families.qwen3_5 import Qwen3_5TextInfo
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep, StepPlan
from pipeline.wire.topology import Role, WorkerId
from workers.llm.model_runner import ModelRunner
from workers.llm.parallel import TensorParallel
from workers.llm.sequences import NO_ADAPTER
from workers.nn.loader import Checkpoint

BLOCK = 16
CONTEXT = 1024  # tokens before a step of decoding
ROOM_BLOCKS = 4  # behind the context, for the steps that are timed
LONGEST = 9000  # tokens of a prompt


@contextmanager
def open_runner(
    folder: Path,
    device: torch.device,
    dtype: str,
    num_seqs: int,
    lora: tuple[str, ...] = (),
    **options: Any,
) -> Iterator[ModelRunner]:
    """Has room for `num_seqs` contexts or one prompt of `LONGEST`. `options`: of `LlmConfig`."""
    config = Config(
        model=ModelConfig(dtype=dtype, lora=lora),
        llm=LlmConfig(max_num_seqs=num_seqs, max_num_batched_tokens=max(num_seqs, 2048), **options),
    )
    runner = ModelRunner.load(
        read_model_info(folder), config, folder, device, TensorParallel(), lambda done, total: None
    )
    runner.open_cache(max(num_seqs * (CONTEXT // BLOCK + ROOM_BLOCKS), LONGEST // BLOCK), LONGEST)
    for tensor in runner.attention.cache.tensors:
        tensor.zero_()  # contexts are read that nobody has written
    yield runner
    del runner.attention
    runner._graphs = None
    del runner
    if device.type == "cuda":
        torch.cuda.empty_cache()


def decode_seconds(
    runner: ModelRunner, batch: int, num_steps: int = 40, adapters: Sequence[int] = (), **wishes: Any
) -> float:
    """Median of a step behind a context of `CONTEXT`, launched while the one before it runs. `adapters`: of
    the requests, by number; empty: none has any."""
    blocks = CONTEXT // BLOCK + ROOM_BLOCKS
    sampling = SamplingParams(**{"temperature": 0, "seed": 1, **wishes})
    starts = [
        SequenceStart(
            slot, CONTEXT + 1, sampling, pack_int32([7] * (CONTEXT + 1)), num_computed_tokens=CONTEXT,
            block_table=pack_int32(range(slot * blocks, (slot + 1) * blocks)),
            adapter=adapters[slot] if adapters else NO_ADAPTER,
        )
        for slot in range(batch)
    ]  # fmt: skip
    sequences = [SequenceStep(slot) for slot in range(batch)]
    runner.launch(plan_of(0, sequences, starts)).result()
    times = []
    before = runner.launch(plan_of(1, sequences))
    for step in range(num_steps):
        start = time.perf_counter()
        after = runner.launch(plan_of(step + 2, sequences))
        before.result()
        times.append(time.perf_counter() - start)
        before = after
    before.result()
    return statistics.median(times[num_steps // 4 :])


def prefill_seconds(runner: ModelRunner, length: int) -> float:
    """Of a prompt of `length` tokens in one step."""
    table = pack_int32(range(-(-length // BLOCK)))
    sampling = SamplingParams(temperature=0, seed=1)
    first = SequenceStart(0, length, sampling, pack_int32([7] * length), block_table=table)
    start = time.perf_counter()
    runner.launch(plan_of(0, [SequenceStep(0, length)], [first])).result()
    return time.perf_counter() - start


def plan_of(step: int, sequences: Sequence[SequenceStep], started: Sequence[SequenceStart] = ()) -> StepPlan:
    return StepPlan(
        sender=WorkerId(Role.LLM), epoch=1, step=step, started=tuple(started), sequences=tuple(sequences)
    )


def num_layer_weights(info: TextInfo) -> int:
    """Numbers of the layers that one token is multiplied by: of experts, the chosen ones."""
    is_hybrid, experts = isinstance(info, Qwen3_5TextInfo), getattr(info, "experts", None)
    heads = (2 + is_hybrid) * info.num_heads + 2 * info.num_kv_heads  # a hybrid's have gates
    total = num_paged_layers(info) * heads * info.head_dim
    if isinstance(info, Qwen3_5TextInfo):
        net = info.delta_net
        keys, values = net.num_key_heads * net.key_dim, net.num_value_heads * net.value_dim
        of_states = 2 * keys + 3 * values + 2 * net.num_value_heads
        total += (info.num_layers - num_paged_layers(info)) * of_states
    num_sparse = len(experts.layers) if experts else 0
    if experts:
        total += num_sparse * (3 * experts.num_chosen * experts.intermediate_size + experts.num_experts)
    num_dense = info.num_layers if is_hybrid else info.num_layers - num_sparse  # with one that all share
    return (total + num_dense * 3 * info.intermediate_size) * info.hidden_size


def num_paged_layers(info: TextInfo) -> int:
    return len(info.full_layers) if isinstance(info, Qwen3_5TextInfo) else info.num_layers


def num_weights(info: TextInfo) -> int:
    """Numbers that a decode step of one request reads: the layers' and the output's."""
    return num_layer_weights(info) + info.vocab_size * info.hidden_size


def prefill_flops(info: TextInfo, length: int) -> int:
    """Of the layers; the output layer runs for one token only."""
    attention = (
        2 * length * length * num_paged_layers(info) * info.num_heads * info.head_dim
    )  # half of it is masked
    return 2 * length * num_layer_weights(info) + attention


def kv_bytes(info: TextInfo, size: int = 2) -> int:
    """Of one token, with numbers of `size` bytes."""
    return 2 * size * num_paged_layers(info) * info.num_kv_heads * info.head_dim


def weight_size(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a weight in memory. Weights of 16 bits stay in 16 bits, whatever the arithmetic is done in."""
    stored = Checkpoint(folder, torch.float32, torch.device("cpu")).rows("model.embed_tokens.weight").dtype
    return min(dtype.itemsize, stored.itemsize)
