"""The choice of a token: the best one, or a draw from those that top_k, top_p and min_p keep (see
noise.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.base import Int64Array
from workers.llm.sampling.cuts import least_probable
from workers.llm.sampling.noise import MAX_ROWS, Noise, UInt64Array, draw_keys
from workers.nn.loader import to_device

# From logits [num_rows, vocab] float32 and `kernel_params` to tokens [num_rows] int64, without a
# synchronisation with the host.
Kernel = Callable[[Tensor, Tensor], Tensor]

NUM_PARAMS = 6  # of a row
LARGEST_SCALE = 1e30  # of logits with a tiny temperature: finite, so that 0 times the scale is 0

_PARAMS = np.dtype([("temperature", "f8"), ("top_p", "f8"), ("top_k", "i8"), ("min_p", "f8"), ("seed", "u8")])
_Params = npt.NDArray[np.void]
Float64Array = npt.NDArray[np.float64]


class TokenChoice:
    """Chooses each row's token from its own logits and parameters, whatever the batch."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, kernel: Kernel | None) -> None:
        """Without a `kernel`, torch's operators choose, some rows at a time."""
        self._vocab_size, self._device, self._kernel = vocab_size, device, kernel
        self._params = np.zeros(num_slots, dtype=_PARAMS)
        self._noise = Noise(vocab_size, device) if kernel is None else None

    def start(self, slot: int, params: SamplingParams) -> None:
        assert params.seed is not None, "rank 0 gives every request a seed"
        row = self._params[slot]
        row["top_k"] = min(params.top_k, self._vocab_size) if params.top_k > 0 else self._vocab_size
        # top_k = 1 is greedy, which is the cheapest way.
        row["temperature"] = 0 if params.top_k == 1 else params.temperature
        row["top_p"], row["min_p"], row["seed"] = params.top_p, params.min_p, params.seed

    def kernel_params(self, slots: Int64Array, numbers: Int64Array) -> npt.NDArray[np.int32]:
        """The kernel's parameters [NUM_PARAMS, num_rows], see `kernel.sample`."""
        params = self._params[slots]
        rows = np.empty((NUM_PARAMS, len(slots)), dtype=np.int32)
        for row, name in enumerate(("temperature", "top_p", "min_p")):
            rows[row] = params[name].astype(np.float32).view(np.int32)
        rows[3] = params["top_k"]
        rows[4:] = draw_keys(params["seed"], numbers.astype(np.uint64)).view(np.int32).reshape(-1, 2).T
        return rows

    def choose(self, logits: Tensor, slots: Int64Array, numbers: Int64Array) -> Tensor:
        """Tokens [num_rows] int64. `numbers`: output tokens of each row's request so far."""
        if self._kernel is not None:
            return self._kernel(logits, to_device(self.kernel_params(slots, numbers), self._device))
        params = self._params[slots]
        is_greedy = params["temperature"] == 0
        if is_greedy.all():
            return logits.argmax(dim=-1)
        is_cut = (params["top_k"] < self._vocab_size) | (params["top_p"] < 1) | (params["min_p"] > 0)
        keys = draw_keys(params["seed"], numbers.astype(np.uint64))
        token_ids = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        if is_greedy.any():
            rows = self._on_device(np.flatnonzero(is_greedy))
            token_ids[rows] = logits[rows].argmax(dim=-1)
        whole = np.flatnonzero(~is_greedy & ~is_cut)
        for start in range(0, len(whole), MAX_ROWS):
            part = whole[start : start + MAX_ROWS]
            rows = self._on_device(part)
            weights = self._weigh(logits[rows], params["temperature"][part])
            token_ids[rows] = self._race(weights, keys[part])
        cut = np.flatnonzero(~is_greedy & is_cut)
        for row, kept in zip(cut.tolist(), self._kept(logits, params, cut), strict=True):
            weights = self._weigh(logits[row, kept][None], params["temperature"][[row]])
            token_ids[row] = kept[self._race(weights, keys[[row]], kept)[0]]
        return token_ids

    def _weigh(self, logits: Tensor, temperature: Float64Array) -> Tensor:
        """Probabilities [num_rows, n] relative to the best token's: float32 in [0, 1]."""
        # The best logit becomes 0 first, so that no temperature, however small, can overflow it.
        weights = logits - logits.amax(dim=-1, keepdim=True)
        if (temperature != 1).any():
            scale = 1 / np.maximum(temperature, 1 / LARGEST_SCALE)
            weights.mul_(self._on_device(scale.astype(np.float32))[:, None])
        return weights.exp_()

    def _race(self, weights: Tensor, keys: UInt64Array, kept: Tensor | None = None) -> Tensor:
        """The column [num_rows] of weights [num_rows, n] that wins the race of noise.py. Columns are the
        `kept` token ids, or the whole vocabulary."""
        assert self._noise is not None
        # Minus the times of the tokens: infinite for a weight of 0.
        return self._noise.log_uniforms(keys, kept).div_(weights).argmax(dim=-1)

    def _kept(self, logits: Tensor, params: _Params, cut: Int64Array) -> list[Tensor]:
        """The kept token ids [n] int64 of each of the rows `cut`."""
        if not len(cut):
            return []
        of = params[cut]
        scaled = logits[self._on_device(cut)].double()
        scaled -= scaled.amax(dim=-1, keepdim=True)
        probs = (scaled / self._column(of["temperature"])).softmax(dim=-1)
        least = least_probable(probs, *(self._column(of[name]) for name in ("top_k", "top_p", "min_p")))
        # In a row of NaN, from broken weights, everything is kept, since some token must be chosen.
        return [is_cut.logical_not().nonzero()[:, 0] for is_cut in probs < least]

    def _column(self, values: npt.NDArray[np.generic]) -> Tensor:
        return self._on_device(values.astype(np.float64))[:, None]

    def _on_device(self, values: npt.NDArray[np.generic]) -> Tensor:
        return to_device(values, self._device)
