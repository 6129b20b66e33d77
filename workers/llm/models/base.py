"""The contract of a decoder: the layers behind the embeddings, in which language models differ.

A decoder computes a flat batch of tokens: sequences concatenated, no batch dimension, sharded over ranks. It
knows no vision model: positions and embeddings are inputs. Its module names its class `DECODER`; a family
names the module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from pipeline.families import TextInfo
from workers.llm.attention.base import AttentionLayer, AttentionStep
from workers.llm.cache.spec import CacheSpec
from workers.llm.cache.state_tensors import StepStates
from workers.llm.parallel import TensorParallel
from workers.nn.fused import Kernels
from workers.nn.weights.weights import Weights


class Features(NamedTuple):
    """The part of items' embeddings that later layers add to their tokens (deepstack)."""

    rows: Tensor  # [n] int64, tokens of the step
    values: Tensor  # [n, num_features, hidden], in the model's type


class MtpHead(Protocol):
    """Predicts a further token (multi-token prediction). It has a paged cache of its own, behind those of the
    decoder's layers, with an entry for each pair of a token and the one behind it, at the former's place."""

    def __call__(self, x: Tensor, hidden: Tensor, positions: Tensor, attention: AttentionStep) -> Tensor:
        """Hidden states [num_pairs, hidden], whose logits are of the token behind the pair's second one.

        x: the second tokens, embedded. hidden: the decoder's hidden states of the first tokens, or the head's
        own where they are guesses. Both [num_pairs, hidden]. positions: [3, num_pairs], of the first tokens.
        """


class Decoder(ABC):
    """`kernels`: fused operators; None: torch's own."""

    # Hidden-sized columns of an item's embedding row, after the first. A decoder whose checkpoints differ
    # in this number sets it in its constructor.
    num_features: int = 0
    prefix: ClassVar[str] = "model."  # of its tensors' names in a checkpoint
    # Prefills are cut at multiples of so many tokens, counted from the start of the sequence, where the step
    # has room for that: results of another cut differ by rounding.
    prefill_multiple: ClassVar[int] = 1
    mtp: MtpHead | None = None  # once it is loaded

    def __init__(
        self,
        info: TextInfo,
        weights: Weights,
        parallel: TensorParallel,
        kernels: Kernels | None = None,
    ) -> None:
        self.info, self.parallel, self.dtype, self.kernels = info, parallel, weights.dtype, kernels
        # Called after each layer, except in a CUDA graph.
        self.on_layer: Callable[[], object] = lambda: None

    @classmethod
    @abstractmethod
    def spec_of(cls, info: TextInfo, tp_size: int) -> CacheSpec:
        """The cache entries of one rank, before the decoder is loaded.

        Raises ValueError, with the numbers, for a shape that cannot be sharded over so many ranks.
        """

    @classmethod
    def check_experts(cls, info: TextInfo, tp_size: int, has_whole_experts: bool) -> None:
        """Raises ValueError, with the numbers, for experts that cannot be shared out over so many ranks.

        has_whole_experts: the option `--expert-parallel`.
        """
        if has_whole_experts:
            raise ValueError("expert_parallel is for models with experts, and this model has none")

    @classmethod
    def mtp_spec_of(cls, info: TextInfo, tp_size: int) -> CacheSpec:
        """The cache entries of the head that predicts a further token, as `spec_of`.

        Raises ValueError where the model has none.
        """
        raise ValueError(
            "speculative 'mtp' is not for this model: its family has no head that predicts a further token"
        )

    def load_mtp(self, weights: Weights) -> None:
        """Loads that head. To be called where `mtp_spec_of` returns, and before the cache is allocated."""
        raise AssertionError("this decoder has no such head")

    def cache_spec(self) -> CacheSpec:
        spec = self.spec_of(self.info, self.parallel.size)
        return spec if self.mtp is None else [*spec, *self.mtp_spec_of(self.info, self.parallel.size)]

    @property
    @abstractmethod
    def attention_layers(self) -> Sequence[AttentionLayer]:
        """The layers with a paged cache, in the order of their numbers."""

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """[num_tokens, hidden] in the model's type, on every rank."""

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        attention: AttentionStep,
        features: Features | None = None,
        states: StepStates | None = None,
    ) -> Tensor:
        """Hidden states [num_tokens, hidden] of embedded tokens x, which may be overwritten.

        positions: [3, num_tokens], time, row and column of each token (M-RoPE). features: None if no token of
        the step has any. states: None if no layer has a state; layers update states in place.
        """

    @abstractmethod
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[num_rows, vocab] float32, on every rank; in `out` if given."""
