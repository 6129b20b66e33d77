"""The decoder of Qwen2: attention with biases, a gated MLP, M-RoPE with contiguous sections."""

from __future__ import annotations

from workers.llm.models.layered import LayeredDecoder


class Qwen2Decoder(LayeredDecoder):
    has_bias = True


DECODER = Qwen2Decoder
