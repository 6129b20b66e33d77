"""Chooses the next tokens, for all rows of a step at once. Counter-based: the random number of token k of a request depends on
(seed, k) and nothing else, and neither does anything here depend on which rows stand beside.

So a request draws the same tokens whatever runs beside it, on every rank, and again when it is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.messages import SequenceStart, unpack_int32
from pipeline.sampling import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, SamplingParams
from workers.nn.loader import to_device

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
NUM_CANDIDATES = 1024  # best tokens that are sorted first; all are, where that is not enough for a row's top_p
MAX_EOS = 16
NUM_PARAMS = 5  # numbers of a row that its draw depends on

Slots = npt.NDArray[np.int64]

_PARAMS = np.dtype(
    [
        ("temperature", "f8"), ("top_p", "f8"), ("top_k", "f8"), ("min_p", "f8"), ("presence_penalty", "f8"), ("frequency_penalty", "f8"),
        ("repetition_penalty", "f8"), ("seed", "u8"), ("min_tokens", "i8"), ("num_logprobs", "i8"), ("num_prompt_tokens", "i8"),
        ("is_adjusted", "?"), ("has_penalty", "?"),
    ]
)  # fmt: skip


class Sampled(NamedTuple):
    """`logprobs` [num_rows, 1 + k] float32 and their tokens: the chosen one, then the best ones."""

    token_ids: Tensor  # [num_rows] int64
    logprobs: Tensor | None
    logprob_token_ids: Tensor | None


def uniform(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) from (seed, index), by the mixer of SplitMix64 (Steele, Lea, Flood 2014) applied twice."""
    return (_mix(_mix(seeds) + indices * GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def has_penalty(sampling: SamplingParams) -> bool:
    """Whether the choice depends on tokens that are there already."""
    return bool(sampling.presence_penalty or sampling.frequency_penalty) or sampling.repetition_penalty != 1


class Sampler:
    """Tables with a row for each slot; a request has a slot while it runs."""

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
        kernel: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """`kernel` chooses by logits and `draw_params`, and waits for nothing; without it torch's operators do."""
        self._device, self._num_slots, self._vocab_size, self._kernel = device, num_slots, vocab_size, kernel
        self._eos = list(eos_token_ids)[:MAX_EOS]
        self._params = np.zeros(num_slots, dtype=_PARAMS)
        # Padded with token 0 at weight 0, so that rows of different lengths are one operation.
        self._bias_ids = np.zeros((num_slots, MAX_LOGIT_BIASES), dtype=np.int64)
        self._biases = np.zeros((num_slots, MAX_LOGIT_BIASES), dtype=np.float32)
        self._stop_ids = np.zeros((num_slots, MAX_STOP_TOKEN_IDS + MAX_EOS), dtype=np.int64)
        self._are_stops = np.zeros((num_slots, MAX_STOP_TOKEN_IDS + MAX_EOS), dtype=np.float32)
        self._counts: Tensor | None = None  # [num_slots, vocab] int32: of output tokens; made when a request first needs it
        self._is_in_prompt: Tensor | None = None  # [num_slots, vocab] bool

    def start(self, start: SequenceStart) -> None:
        """Fills a slot for a request that runs from now on."""
        slot, sampling = start.slot, start.sampling
        row = self._params[slot]
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens"):
            row[name] = getattr(sampling, name)
        row["top_k"] = sampling.top_k if sampling.top_k > 0 else self._vocab_size
        row["seed"] = sampling.seed or 0
        row["num_logprobs"] = -1 if sampling.logprobs is None else sampling.logprobs
        row["num_prompt_tokens"] = start.num_prompt_tokens
        row["has_penalty"] = has_penalty(sampling)
        row["is_adjusted"] = bool(row["has_penalty"] or sampling.logit_bias or sampling.min_tokens)
        self._bias_ids[slot], self._biases[slot] = 0, 0.0
        self._bias_ids[slot, : len(sampling.logit_bias)] = list(sampling.logit_bias)
        self._biases[slot, : len(sampling.logit_bias)] = list(sampling.logit_bias.values())
        stops = [token for token in (*self._eos, *sampling.stop_token_ids) if token < self._vocab_size]
        self._stop_ids[slot], self._are_stops[slot] = 0, 0.0
        self._stop_ids[slot, : len(stops)], self._are_stops[slot, : len(stops)] = stops, 1.0
        if row["has_penalty"]:
            self._count(slot, unpack_int32(start.token_ids), start.num_prompt_tokens)

    def _count(self, slot: int, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int) -> None:
        if self._counts is None or self._is_in_prompt is None:
            self._counts = torch.zeros(self._num_slots, self._vocab_size, dtype=torch.int32, device=self._device)
            self._is_in_prompt = torch.zeros(self._num_slots, self._vocab_size, dtype=torch.bool, device=self._device)
        tokens = self._tensor(token_ids.astype(np.int64))
        self._is_in_prompt[slot].zero_().index_fill_(0, tokens[:num_prompt_tokens], True)
        output = tokens[num_prompt_tokens:]
        self._counts[slot].zero_().scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def is_plain(self, slots: Slots) -> bool:
        """Whether these need nothing but a token chosen by their logits as they are."""
        params = self._params[slots]
        return not params["is_adjusted"].any() and int(params["num_logprobs"].max()) < 0

    def draw_params(self, slots: Slots, num_tokens: Slots) -> npt.NDArray[np.int32]:
        """What the kernel needs to know of requests that have `num_tokens` so far: [5, num_rows], see `sampling_kernel.sample`."""
        params = self._params[slots]
        points = uniform(params["seed"], (num_tokens - params["num_prompt_tokens"]).astype(np.uint64))
        temperature = np.where(params["top_k"] == 1, 0, params["temperature"])  # the same, and the cheapest way
        numbers = np.stack([temperature, params["top_p"], params["min_p"], points, np.zeros(len(slots))]).astype(np.float32)
        as_bits = numbers.view(np.int32)
        as_bits[4] = params["top_k"]
        return as_bits

    def sample(self, logits: Tensor, slots: Slots, num_tokens: Slots) -> Sampled:
        """One token for each row of logits [num_rows, vocab] float32, whose requests have `num_tokens` tokens so far."""
        params = self._params[slots]
        numbers = num_tokens - params["num_prompt_tokens"]
        adjusted = self._adjust(logits, slots, params, numbers) if params["is_adjusted"].any() else logits
        if self._kernel is not None:
            token_ids = self._kernel(adjusted, self._tensor(self.draw_params(slots, num_tokens)))
        else:
            token_ids = adjusted.argmax(dim=-1)
            rows = np.flatnonzero(params["temperature"] > 0)
            if len(rows):
                places = self._tensor(rows)
                token_ids[places] = self._draw(adjusted if len(rows) == len(params) else adjusted[places], params[rows], numbers[rows])
        if self._counts is not None and params["has_penalty"].any():
            self._counts.index_put_((self._tensor(slots), token_ids), torch.ones_like(token_ids, dtype=torch.int32), accumulate=True)
        if (num_logprobs := int(params["num_logprobs"].max())) < 0:
            return Sampled(token_ids, None, None)
        logprobs = logits.log_softmax(dim=-1)
        best = logprobs.topk(num_logprobs, dim=-1)
        ids = torch.cat([token_ids[:, None], best.indices], dim=-1)
        return Sampled(token_ids, torch.cat([logprobs.gather(-1, token_ids[:, None]), best.values], dim=-1), ids)

    def num_logprobs(self, slots: Slots) -> list[int]:
        """How many best ones each row asked for; -1: none, not even its own."""
        return [int(count) for count in self._params["num_logprobs"][slots]]

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        return to_device(np.ascontiguousarray(values), self._device)

    def _column(self, values: npt.NDArray[np.generic]) -> Tensor:
        return self._tensor(values.astype(np.float64))[:, None]

    def _adjust(self, logits: Tensor, slots: Slots, params: npt.NDArray[np.void], numbers: Slots) -> Tensor:
        """Bias, penalties and the ban on ending early. Rows that asked for none of it come out as they are."""
        logits = logits.scatter_add(-1, self._tensor(self._bias_ids[slots]), self._tensor(self._biases[slots]))
        if self._counts is not None and self._is_in_prompt is not None and params["has_penalty"].any():
            rows = self._tensor(slots)
            # Rows of requests without a penalty may hold what an earlier request left: their factors make it nothing.
            counts, in_prompt = self._counts[rows], self._is_in_prompt[rows]
            repetition = torch.where(in_prompt | (counts > 0), self._column(params["repetition_penalty"]).float(), 1.0)
            logits = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = logits - self._column(params["frequency_penalty"]).float() * counts
            logits = logits - self._column(params["presence_penalty"]).float() * (counts > 0)
        early = (numbers < params["min_tokens"])[:, None] * self._are_stops[slots]
        if early.any():
            banned = torch.zeros_like(logits).scatter_add(-1, self._tensor(self._stop_ids[slots]), self._tensor(early.astype(np.float32)))
            logits = logits.masked_fill(banned > 0, -torch.inf)
        return logits

    def _draw(self, logits: Tensor, params: npt.NDArray[np.void], numbers: Slots) -> Tensor:
        """By inverting the cumulative distribution, in the order of the vocabulary, of the tokens that top_k, top_p and min_p keep."""
        # The best logit is made 0 first, so that no temperature, however small, can overflow it.
        scaled = (logits.double() - logits.double().amax(dim=-1, keepdim=True)) / self._column(params["temperature"])
        probs = scaled.softmax(dim=-1)
        is_cut = (params["top_k"] < self._vocab_size) | (params["top_p"] < 1) | (params["min_p"] > 0)
        if is_cut.any():
            least = torch.zeros(len(probs), 1, dtype=torch.float64, device=self._device)
            rows = np.flatnonzero(is_cut)
            places = self._tensor(rows)
            least[places] = self._least_probable(probs[places], params[rows])
            probs = probs.masked_fill(probs < least, 0.0)
        cumulative = probs.cumsum(dim=-1)
        point = self._column(uniform(params["seed"], numbers.astype(np.uint64))) * cumulative[:, -1:]
        # The first token whose cumulative probability exceeds the point; rounding must not push it behind the last that is kept.
        chosen = torch.searchsorted(cumulative, point, right=True)
        last = (cumulative < cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        return torch.minimum(chosen, last)[:, 0]

    def _least_probable(self, probs: Tensor, params: npt.NDArray[np.void]) -> Tensor:
        """The smallest probability [num_rows, 1] that a row keeps. Tokens of equal probability are kept or cut together."""
        top_k, top_p = self._column(params["top_k"]), self._column(params["top_p"])
        num_sorted = min(NUM_CANDIDATES, self._vocab_size)
        least, is_enough = _cut(probs.topk(num_sorted, dim=-1).values, top_k, top_p, self._vocab_size)
        if num_sorted < self._vocab_size and not bool(is_enough.all()):
            rows = (~is_enough[:, 0]).nonzero()[:, 0]
            least[rows] = _cut(probs[rows].sort(dim=-1, descending=True).values, top_k[rows], top_p[rows], self._vocab_size)[0]
        return torch.maximum(least, probs.amax(dim=-1, keepdim=True) * self._column(params["min_p"]))


def _cut(best: Tensor, top_k: Tensor, top_p: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The smallest of the `best` probabilities [num_rows, n] that top_k, then top_p, keep, and whether n were enough to tell."""
    rank = torch.arange(best.shape[-1], device=best.device)[None]
    kept = best.masked_fill(rank >= top_k, 0.0)
    cumulative = kept.cumsum(dim=-1)
    # Of all the probability there is: what top_k keeps, or 1.
    total = torch.where(top_k <= best.shape[-1], cumulative[:, -1:], 1.0)
    num_kept = ((cumulative - kept < top_p * total) & (kept > 0)).sum(dim=-1, keepdim=True)
    # With a larger top_k the total is known only when all are sorted.
    is_enough = (top_k <= best.shape[-1]) | ((top_k >= vocab_size) & (num_kept < best.shape[-1]))
    return best.gather(-1, (num_kept - 1).clamp(min=0)), is_enough
