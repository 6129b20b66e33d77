"""Computes a step plan on one rank: embeds, gathers pictures' embeddings in place, runs the decoder, samples.

    launch(plan) → choose(masks) → launch(plan) → …

Forward and choice of token are two phases. `launch` starts the forward, and chooses the tokens of all rows
without a matcher. Rows whose tokens a matcher restricts wait for `choose`, which brings the masks: the
forward runs while the matcher works on the host. A step without such rows has no `choose`.

A sequence's state is kept by slot from its start on (`sequences.py`); a step brings only what is new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.adapters import Adapter, read_adapters
from pipeline.adapters.files import TOWER
from pipeline.config import Config
from pipeline.families import ModelInfo
from pipeline.transport.tensors import PoolMap
from pipeline.wire.steps import SequenceStart, SequenceStep, StepPlan
from workers.llm.attention.base import AttentionBackend, SequencePart
from workers.llm.backends import Backend, choose_backend
from workers.llm.cache.kv_formats import FORMATS
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import paged_of, states_of
from workers.llm.cache.state_tensors import StateTensors
from workers.llm.decode_graphs import DecodeBuffers, DecodeGraphs, GraphInputs, Outputs, graph_sizes
from workers.llm.embedding_pools import EmbeddingPools
from workers.llm.item_embeddings import PlacedSlice, place_embeddings
from workers.llm.models.base import Decoder
from workers.llm.models.registry import decoder_of
from workers.llm.mtp_runner import KeptStep, MtpRunner
from workers.llm.parallel import TensorParallel
from workers.llm.sampling.base import Setup
from workers.llm.sampling.prompt_logprobs import (
    MAX_ROWS,
    PromptRange,
    PromptTable,
    PromptTensors,
    scores_of,
)
from workers.llm.sampling.sampler import Sampled, Sampler, make_processors
from workers.llm.sequences import NO_ADAPTER, Int64Array, SequenceTable, StepRows
from workers.llm.step_inputs import positions_of, spans_of, token_ids_of
from workers.llm.step_result import LaunchedStep
from workers.llm.unchosen import Unchosen, logit_rows
from workers.nn.loader import Progress, choose_dtype, to_device
from workers.nn.weights.adapters import AdapterSet
from workers.nn.weights.registry import open_weights

MTP_MODULE = "mtp.fc"  # in all checkpoints with such a head
INT32_BYTES = 4
LARGEST_GRAPH = 512  # requests; in a larger batch launches cost little beside the step


class ModelRunner:
    """Complete after `open_cache`, which is called once the free memory is known."""

    attention: AttentionBackend
    sequences: SequenceTable
    states: StateTensors

    def __init__(
        self,
        info: ModelInfo,
        config: Config,
        decoder: Decoder,
        backend: Backend,
        device: torch.device,
        parallel: TensorParallel,
        adapters: AdapterSet | None = None,
    ) -> None:
        self.device, self._info, self._config = device, info, config
        self.decoder, self._backend = decoder, backend
        self.pools = EmbeddingPools(PoolMap(device.index if device.type == "cuda" else None), parallel)
        self._dtype = choose_dtype(config.model.dtype, device)
        self._num_slots = config.llm.max_num_seqs
        setup = Setup(self._num_slots, info.text.vocab_size, info.eos_token_ids, device)
        self.sampler = Sampler(setup, make_processors(setup), backend.sample)
        self._prompts = PromptTable(self._num_slots)
        # By slot; the last slot is for padding rows of a batch.
        self._last_tokens = torch.zeros(self._num_slots + 1, dtype=torch.int64, device=device)
        self._slot_adapters = torch.full_like(self._last_tokens, NO_ADAPTER)
        self._adapters = adapters
        self._graphs: DecodeGraphs | None = None
        self._adapted_graphs: DecodeGraphs | None = None  # for steps in which any row has an adapter
        self._mtp: MtpRunner | None = None
        # The rows of the step launched last that wait for `choose`.
        self._open: tuple[LaunchedStep, Unchosen] | None = None

    @classmethod
    def load(
        cls,
        info: ModelInfo,
        config: Config,
        folder: Path,
        device: torch.device,
        parallel: TensorParallel,
        progress: Progress,
    ) -> ModelRunner:
        """Loads a checkpoint's weights, and the adapters. Raises ValueError where the width of the tower's
        embeddings does not match the decoder, and for an adapter of a layer that takes none."""
        dtype = choose_dtype(config.model.dtype, device)
        backend = choose_backend(config.llm.attention, device, config.llm.linear_attention)
        adapters = None
        if config.model.lora:
            served = read_adapters(config.model.lora)
            adapters = AdapterSet(served, lambda module: not module.startswith(TOWER), dtype, device)
        weights = open_weights(
            folder, dtype, device, config.llm.quantization, progress, adapters=adapters,
            activations=config.llm.activation_quantization,
        )  # fmt: skip
        kind, has_mtp = decoder_of(info), config.llm.speculative == "mtp"
        if has_mtp and not weights.has_module(MTP_MODULE):
            raise ValueError(
                f"speculative 'mtp' needs the head that the checkpoint lacks: it has no {MTP_MODULE}"
            )
        weights.expect(kind.prefix)
        decoder = kind(info.text, weights, parallel, backend.kernels)
        if has_mtp:
            decoder.load_mtp(weights)
        weights.close()
        if adapters is not None:
            adapters.check_all_loaded()
        width, wanted = info.vision.embedding_width, (1 + decoder.num_features) * info.text.hidden_size
        if width != wanted:
            raise ValueError(f"the tower's embeddings are {width} wide, the decoder takes {wanted}")
        if config.llm.all_reduce == "symmetric":
            parallel.use_symmetric_memory(LARGEST_GRAPH * info.text.hidden_size, dtype)
        return cls(info, config, decoder, backend, device, parallel, adapters)

    def open_cache(
        self,
        num_blocks: int,
        max_model_len: int,
        num_slots: int | None = None,
        num_snapshots: int = 0,
        num_drafts: int = 0,
    ) -> None:
        """Allocates KV cache and layer states, and captures decode graphs where the backend allows it.

        `num_slots`: sequences at once; None: as many as `max_num_seqs`. `num_drafts`: of a step, at most,
        where layers keep a state.
        """
        spec, size = self.decoder.cache_spec(), self._config.llm.block_size
        if num_slots is not None:
            self._num_slots = num_slots
        kv_format = FORMATS.get(self._config.llm.kv_cache_dtype)
        cache = PagedTensors(paged_of(spec), num_blocks, size, self._dtype, self.device, kv_format)
        self.attention = self._backend.attention(cache)
        self.sequences = SequenceTable(self._num_slots, -(-max_model_len // size))
        states = states_of(spec)
        self.states = StateTensors(
            states, self._num_slots, self._dtype, self.device, num_snapshots, num_drafts
        )
        if self.decoder.mtp is not None:
            self._mtp = MtpRunner(self.decoder, self.sequences, self.attention)
        if self._backend.sample is None:
            return
        with torch.inference_mode():
            self.attention.warm_up(self.decoder.attention_layers)
            self._warm_up_states(cache.spare_slot // size)
        if not self._config.llm.cuda_graphs:
            return
        sizes = graph_sizes(min(self._num_slots, LARGEST_GRAPH))
        # One buffer serves all graphs. As graph outputs, the logits would take memory once for each size.
        vocab_size = self._info.text.vocab_size
        self._logits = torch.empty(sizes[-1], vocab_size, dtype=torch.float32, device=self.device)
        shape = sizes[-1], self._info.text.hidden_size
        self._hidden = torch.empty(shape, dtype=self._dtype, device=self.device)
        buffers = DecodeBuffers(sizes[-1], self.sequences, size, cache.spare_slot, self.device)
        self._tables = buffers.device_tables

        def compute(inputs: GraphInputs) -> Outputs:
            return self._decode(inputs, max_model_len)

        def compute_adapted(inputs: GraphInputs) -> Outputs:
            assert self._adapters is not None
            with self._adapters.of_masked(self._slot_adapters[inputs.slots.long()]):
                return self._decode(inputs, max_model_len)

        with torch.inference_mode():
            self._graphs = DecodeGraphs(sizes, buffers, compute, self.device)
            if self._adapters:
                self._adapted_graphs = DecodeGraphs(sizes, buffers, compute_adapted, self.device)

    def _warm_up_states(self, spare_block: int) -> None:
        """Compiles the kernels of layers with a state, where there are any, by a decode and a prefill of two
        tokens. Writes only to the spare slot and the spare block."""
        slots = torch.full((2,), self._num_slots, device=self.device)
        states = self.states.of_step(slots, [1, 2], [0, 0])
        if states is not None:
            spans = [SequencePart(count, 0, 2 * [spare_block]) for count in (1, 2)]
            zeros = torch.zeros(4, 3, dtype=torch.int64, device=self.device)
            x = self.decoder.embed(zeros[0])
            self.decoder(x, zeros[1:], self.attention.plan(spans), states=states)

    def _decode(self, inputs: GraphInputs, longest: int) -> Outputs:
        """One decode step. It reads and writes fixed addresses on the device, so a CUDA graph can capture
        it."""
        assert self._backend.sample is not None
        slots = inputs.slots.long()
        tables = self._tables.tables[slots]
        attention = self.attention.plan_decode(inputs.new_slots, tables, inputs.lengths, longest)
        x = self.decoder.embed(self._last_tokens[slots])
        states = self.states.of_step(slots, None, None)
        hidden = self.decoder(x, inputs.positions.expand(3, -1), attention, states=states)
        logits = self.decoder.logits(hidden, self._logits[: len(hidden)])
        chosen = self._backend.sample(logits, inputs.params)
        self._last_tokens[slots] = chosen
        kept = self._hidden[: len(hidden)]
        return Outputs(chosen, logits, kept if self._mtp is None else kept.copy_(hidden))

    def close(self) -> None:
        """Drops the graphs: NCCL cannot shut down while a graph holds its communicator."""
        self._graphs = self._adapted_graphs = None

    @property
    def adapters(self) -> Sequence[Adapter]:
        """By number."""
        return () if self._adapters is None else self._adapters.adapters

    @torch.inference_mode()
    def finish(self) -> None:
        """Waits until no step is under way."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Starts the forward of a step, and chooses the tokens of the rows that need no mask.

        `choose` follows if some rows need one. On the CPU the step has run when this returns.

        Raises StaleHandleError when an embedding of the plan is no longer there.
        """
        assert self._open is None, "tokens of the step before have not been chosen"
        for start in plan.started:
            self._start(start)
        if not plan.sequences:
            return LaunchedStep(self.device)
        rows = self.sequences.rows(plan.sequences)
        self.sequences.advance(rows)
        graphs = self._graphs if not self._has_adapters(rows) else self._adapted_graphs
        if graphs is not None and graphs.can_run(rows) and not self._has_waiting_pairs(rows):
            outputs = graphs.run(rows, self.sampler.draw_params(rows.slots, rows.stops))
            self._save_states(plan.sequences)
            self._keep(rows, plan.sequences, np.arange(1, len(rows.slots) + 1), None, outputs.hidden)
            launched = self._choose_ready(Unchosen.of(rows, outputs.logits), outputs.token_ids)
        else:
            launched = self._launch_any(rows, plan.sequences)
        if self._open is None and self._mtp is not None:
            self._mtp.guess(launched, self._last_tokens)
        return launched

    @torch.inference_mode()
    def choose(self, masks: Sequence[bytes]) -> None:
        """Chooses the tokens that the last launched step left open: one mask for each, see `TokenMasks`.

        Does not block. The `LaunchedStep` that `launch` returned includes these tokens from here on.
        """
        assert self._open is not None, "no token is left open"
        launched, unchosen = self._open
        self._open = None
        self._choose(launched, unchosen, masks)
        if self._mtp is not None:
            self._mtp.guess(launched, self._last_tokens)

    def _has_adapters(self, rows: StepRows) -> bool:
        """Whether adapters of this worker's layers take part in the step."""
        return bool(self._adapters) and bool((self.sequences.adapters[rows.slots] != NO_ADAPTER).any())

    def _has_waiting_pairs(self, rows: StepRows) -> bool:
        return self._mtp is not None and self._mtp.has_waiting(rows.slots)

    def _keep(
        self,
        rows: StepRows,
        steps: Sequence[SequenceStep],
        ends: Int64Array,
        x: Tensor | None,
        hidden: Tensor,
    ) -> None:
        """For guesses, once the tokens are chosen. Arguments as in `KeptStep`."""
        if self._mtp is not None:
            self._mtp.keep(KeptStep(rows, ends, [step.num_guesses for step in steps], x, hidden))

    def _choose_ready(self, unchosen: Unchosen, of_graph: Tensor | None = None) -> LaunchedStep:
        """Chooses the tokens of rows that need no mask. `of_graph`: the tokens that a graph sampled, valid if
        all these rows are plain."""
        launched = LaunchedStep(self.device, len(unchosen.slots))
        waits = self.sampler.waits_for_masks(unchosen.slots)
        if waits.any():
            waiting, ready = np.flatnonzero(waits), np.flatnonzero(~waits)
            self._open = launched, unchosen.at(waiting)
            if not len(ready):
                return launched
            unchosen = unchosen.at(ready)
            of_graph = None if of_graph is None else of_graph[self._tensor(ready)]
        if of_graph is not None and self.sampler.is_plain(unchosen.slots):
            num_logprobs = self.sampler.num_logprobs(unchosen.slots)
            launched.add(unchosen.places, Sampled(of_graph, None, None), num_logprobs)
        else:
            self._choose(launched, unchosen)
        return launched

    def _choose(self, launched: LaunchedStep, unchosen: Unchosen, masks: Sequence[bytes] = ()) -> None:
        """`masks`: none, or one for each row of logits."""
        num_accepted: Counter[int] = Counter()  # drafts, by slot
        while unchosen:
            slots, of_rows = unchosen.slots, [masks[row] for row in unchosen.rows.tolist()] if masks else ()
            sampled = self.sampler.sample(unchosen.next_logits, slots, unchosen.num_tokens, of_rows)
            self._last_tokens[self._tensor(slots)] = sampled.token_ids
            launched.add(unchosen.places, sampled, self.sampler.num_logprobs(slots))
            if not unchosen.drafts:
                break
            unchosen = unchosen.behind(sampled.token_ids.cpu().numpy())
            self.sequences.accept(unchosen.slots)
            num_accepted.update(unchosen.slots.tolist())
        for slot, count in num_accepted.items():
            self.states.accept(slot, count)

    def _save_states(self, steps: Sequence[SequenceStep]) -> None:
        """Those behind the sequences' parts, before any draft is accepted."""
        for step in steps:
            for save in step.saves:
                if (num_drafts := save.num_tokens - _num_given(step)) >= 0:
                    self.states.save(step.slot, save.snapshot, num_drafts)

    def _start(self, start: SequenceStart) -> None:
        """Overwrites all state of the slot's previous sequence."""
        self.sequences.start(start)
        if self._adapters:
            self._slot_adapters[start.slot] = start.adapter
        self.sampler.start(start)
        if self._mtp is not None:
            self._mtp.start(start.slot)
        self._prompts.start(start.slot, start.sampling.prompt_logprobs, start.num_prompt_tokens)
        if start.snapshot >= 0:
            self.states.restore(start.slot, start.snapshot)
        else:
            self.states.start(start.slot)
        if start.token_ids:
            self._last_tokens[start.slot] = int.from_bytes(start.token_ids[-4:], "little", signed=True)
        if self._graphs is not None:
            self._tables.restart(start.slot)

    def _launch_any(self, rows: StepRows, steps: Sequence[SequenceStep]) -> LaunchedStep:
        hidden, ends = self._compute(rows, steps)
        self._save_states(steps)
        # All ranks must agree on the calls of `logits`, as it is a collective: they do, by their equal plans.
        if rows.are_sampled.any():
            logits = self.decoder.logits(hidden[self._tensor(logit_rows(rows, ends))])
            launched = self._choose_ready(Unchosen.of(rows, logits))
        else:
            launched = LaunchedStep(self.device)
        for part in self._prompts.ranges(rows.slots, rows.starts, rows.stops):
            stop = int(ends[part.sequence] - rows.stops[part.sequence]) + part.stop - 1
            scores = self._score_prompt(hidden[stop - (part.stop - part.start) : stop], part)
            launched.add_prompt(part.sequence, scores)
        return launched

    def _score_prompt(self, hidden: Tensor, part: PromptRange) -> PromptTensors:
        """hidden: [n, hidden], at the rows before the tokens of `part`."""
        token_ids = self._tensor(self.sequences.token_ids(part.slot, part.start, part.stop))
        pieces = [
            scores_of(self.decoder.logits(some), of_some, part.num_best)
            for some, of_some in zip(hidden.split(MAX_ROWS), token_ids.split(MAX_ROWS), strict=True)
        ]
        return PromptTensors(part.start, *(torch.cat(tensors) for tensors in zip(*pieces, strict=True)))

    def _compute(self, rows: StepRows, steps: Sequence[SequenceStep]) -> tuple[Tensor, Int64Array]:
        """Hidden states [num_tokens, hidden] of all sequences side by side, and the end of each sequence."""
        ends = np.cumsum(rows.counts)
        token_ids = token_ids_of(rows, ends, self.sequences, self._last_tokens)
        x = self.decoder.embed(token_ids)  # [num_tokens, hidden]
        slices = [
            PlacedSlice(end - step.num_tokens + part.offset, part)
            for step, end in zip(steps, ends.tolist(), strict=True)
            for part in step.embeddings
        ]
        features = place_embeddings(x, slices, self.pools.gather, self.decoder.num_features)
        drafts = None
        if rows.drafts:
            num_drafts = [len(rows.drafts.get(row, ())) for row in range(len(rows.slots))]
            drafts = self.states.place_drafts(rows.slots.tolist(), num_drafts)
        saves = [
            [(save.num_tokens, save.snapshot) for save in step.saves if save.num_tokens < _num_given(step)]
            for step in steps
        ]
        states = self.states.of_step(
            self._tensor(rows.slots), rows.counts.tolist(), rows.starts.tolist(), drafts, saves
        )
        kept = x if self._mtp is None else x.clone()  # the decoder may overwrite it
        positions = positions_of(rows, ends, self.sequences, self.device)
        planned = self.attention.plan(spans_of(rows, self.sequences))
        with self._adapted(rows):
            hidden = self.decoder(x, positions, planned, features, states)
        self._keep(rows, steps, ends, kept, hidden)
        return hidden, ends

    def _adapted(self, rows: StepRows) -> AbstractContextManager[None]:
        if self._adapters is None or not self._has_adapters(rows):
            return nullcontext()
        return self._adapters.of_rows(self.sequences.adapters_of(rows))

    def _tensor(self, values: npt.NDArray[np.integer]) -> Tensor:
        return to_device(values.astype(np.int64, copy=False), self.device)


def _num_given(step: SequenceStep) -> int:
    """Tokens of its part that are no drafts."""
    return step.num_tokens - len(step.drafts) // INT32_BYTES
