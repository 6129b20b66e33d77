"""The head of Qwen3.5 that predicts a further token (MTP, as in DeepSeek-V3): one layer of the decoder's own
kind, attending to all tokens, which reads what the decoder has computed for a token, and the token behind it.

    x = fc [norm(embedding of the next token); norm(hidden state)] → layer → norm → the decoder's logits
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.llm.attention.base import AttentionStep
from workers.llm.models.stream import ResidualStream
from workers.nn.layers import RMSNorm
from workers.nn.weights.base import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3_5MtpHead:
    of_embedding: RMSNorm
    of_hidden: RMSNorm
    fc: Linear  # whole on every rank
    make_stream: Callable[[Tensor], ResidualStream]
    layer: Callable[[ResidualStream, Tensor, AttentionStep], None]  # adds its output, of these positions
    norm: RMSNorm

    @torch.inference_mode()
    def __call__(self, x: Tensor, hidden: Tensor, positions: Tensor, attention: AttentionStep) -> Tensor:
        """As `MtpHead`."""
        joined = torch.cat((self.of_embedding(x), self.of_hidden(hidden)), dim=1)
        stream = self.make_stream(self.fc(joined))
        self.layer(stream, positions, attention)
        return stream.normed(self.norm)
