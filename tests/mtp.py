"""The head of Qwen3.5 that predicts a further token: a plain reference, from the layers' definition, which
shares no code with the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class MtpReference:
    """In float32, of one sequence in one piece."""

    def __init__(self, folder: Path) -> None:
        self._text: dict[str, Any] = json.loads((folder / "config.json").read_text())["text_config"]
        self._tensors = {
            name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()
        }

    @torch.inference_mode()
    def hidden(self, embedded: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """[n, hidden]. embedded: [n, hidden], of tokens 1 to n. hidden: [n, hidden], what the decoder has of
        tokens 0 to n - 1 behind its last norm. positions: [3, n], of these."""
        joined = (
            self._norm(embedded, "pre_fc_norm_embedding"),
            self._norm(hidden, "pre_fc_norm_hidden"),
        )
        x = torch.cat(joined, dim=-1) @ self._weight("fc").T
        x = x + self._attention(self._norm(x, "layers.0.input_layernorm"), positions)
        x = x + self._mlp(self._norm(x, "layers.0.post_attention_layernorm"))
        return self._norm(x, "norm")

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self._tensors["lm_head.weight"].T

    def _weight(self, name: str) -> Tensor:
        return self._tensors[f"mtp.{name}.weight"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        spread = (x.square().mean(dim=-1, keepdim=True) + self._text["rms_norm_eps"]).sqrt()
        return x / spread * (1 + self._weight(name))

    def _attention(self, x: Tensor, positions: Tensor) -> Tensor:
        text, of_layer = self._text, "layers.0.self_attn."
        dim, num_heads, num_kv = text["head_dim"], text["num_attention_heads"], text["num_key_value_heads"]
        both = (x @ self._weight(f"{of_layer}q_proj").T).view(len(x), num_heads, 2 * dim)
        q, gate = both[..., :dim], both[..., dim:]
        k, v = ((x @ self._weight(f"{of_layer}{one}_proj").T).view(len(x), num_kv, dim) for one in "kv")
        q = self._turn(self._norm(q, f"{of_layer}q_norm"), positions)
        k = self._turn(self._norm(k, f"{of_layer}k_norm"), positions)
        out = torch.empty_like(q)
        for head in range(num_heads):
            of_kv = head * num_kv // num_heads
            scores = q[:, head] @ k[:, of_kv].T / dim**0.5
            later = torch.ones_like(scores).triu(1).bool()
            out[:, head] = scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v[:, of_kv]
        return (out * torch.sigmoid(gate)).flatten(1) @ self._weight(f"{of_layer}o_proj").T

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """The first quarter of each head, by the row of positions whose turn it is."""
        rope = self._text["rope_parameters"]
        size = int(x.shape[-1] * rope["partial_rotary_factor"])
        half, section = size // 2, rope["mrope_section"]
        turned = x.clone()
        for number in range(half):
            axis = number % 3 if number < 3 * section[number % 3] else 0
            angle = positions[axis].float() * rope["rope_theta"] ** (-2 * number / size)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            first, second = x[..., number], x[..., number + half]
            turned[..., number] = first * cos - second * sin
            turned[..., number + half] = second * cos + first * sin
        return turned

    def _mlp(self, x: Tensor) -> Tensor:
        of_layer = "layers.0.mlp."
        if f"mtp.{of_layer}gate.weight" not in self._tensors:
            return self._swiglu(x, of_layer)
        shares = (x @ self._weight(f"{of_layer}gate").T).softmax(dim=-1)
        best, chosen = shares.topk(self._text["num_experts_per_tok"], dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        out = torch.sigmoid(x @ self._weight(f"{of_layer}shared_expert_gate").T)
        out = out * self._swiglu(x, f"{of_layer}shared_expert.")
        for row in range(len(x)):
            for share, number in zip(best[row], chosen[row].tolist(), strict=True):
                out[row] += share * self._expert(x[row], number)
        return out

    def _swiglu(self, x: Tensor, prefix: str) -> Tensor:
        gate, up = (x @ self._weight(f"{prefix}{name}_proj").T for name in ("gate", "up"))
        return (F.silu(gate) * up) @ self._weight(f"{prefix}down_proj").T

    def _expert(self, x: Tensor, number: int) -> Tensor:
        prefix = "mtp.layers.0.mlp.experts."
        if f"{prefix}gate_up_proj" not in self._tensors:
            return self._swiglu(x[None], f"layers.0.mlp.experts.{number}.")[0]
        gate, up = (self._tensors[f"{prefix}gate_up_proj"][number] @ x).chunk(2)
        return self._tensors[f"{prefix}down_proj"][number] @ (F.silu(gate) * up)
