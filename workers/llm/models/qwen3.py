"""The decoder of Qwen3-VL, dense or with experts: heads are normed, the rows of positions take turns at the
frequencies, and the first layers add features of items to the stream (deepstack)."""

from __future__ import annotations

from pipeline.families import TextInfo
from pipeline.families.qwen3_vl import ExpertsInfo, Qwen3TextInfo
from workers.llm.models.experts import ExpertsMlp
from workers.llm.models.layered import LayeredDecoder, LayerMlp
from workers.llm.parallel import TensorParallel, share_experts
from workers.nn.fused import Kernels
from workers.nn.weights.shard import ExpertsShard
from workers.nn.weights.weights import Weights


class Qwen3Decoder(LayeredDecoder):
    has_head_norm = True
    has_interleaved_axes = True

    def __init__(
        self,
        info: TextInfo,
        weights: Weights,
        parallel: TensorParallel,
        kernels: Kernels | None = None,
    ) -> None:
        assert isinstance(info, Qwen3TextInfo)
        self.num_features, self._experts = info.num_features, info.experts
        super().__init__(info, weights, parallel, kernels)

    @classmethod
    def check_experts(cls, info: TextInfo, tp_size: int, has_whole_experts: bool) -> None:
        assert isinstance(info, Qwen3TextInfo)
        if info.experts is None:
            super().check_experts(info, tp_size, has_whole_experts)
        else:
            _share(info.experts, info, TensorParallel(0, tp_size, has_whole_experts=has_whole_experts))

    def make_mlp(self, weights: Weights, number: int) -> LayerMlp:
        experts = self._experts
        if experts is None or number not in experts.layers:
            return super().make_mlp(weights, number)
        shard = _share(experts, self.info, self.parallel)
        return ExpertsMlp(weights, shard, experts.num_chosen, self.kernels)


def _share(experts: ExpertsInfo, info: TextInfo, parallel: TensorParallel) -> ExpertsShard:
    return share_experts(experts.num_experts, info.hidden_size, experts.intermediate_size, parallel)


DECODER = Qwen3Decoder
