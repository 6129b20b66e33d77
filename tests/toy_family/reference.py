"""The toy in one piece: each text from its beginning, in one function, without cache, chunks or processes.

It shares no code with the toy's family, tower and decoder; both read the same checkpoint.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tests.chats import Clip
from workers.preprocess.video_files import open_video


class Film(NamedTuple):
    """A video as a list of pictures, so many of them a second."""

    frames: tuple[Image.Image, ...]
    fps: float | None


Piece = str | Image.Image | Film | Clip
ChatTurns = Sequence[tuple[str, Sequence[Piece]]]


class Answer(NamedTuple):
    num_prompt_tokens: int
    token_ids: list[int]
    least_gap: float  # between the two best logits of any step


Place = tuple[int, int, int]  # time, row, column


class Reference:
    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.language, self.eye = config["language"], config["eye"]
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.pads = {"image": config["picture_token_id"], "video": config["video_token_id"]}

    @torch.inference_mode()
    def answer(self, chat: ChatTurns, num_tokens: int) -> Answer:
        torch.set_num_threads(1)  # its tensors are tiny, and servers compute beside it
        prompt = _Prompt(self.tokenizer)
        embeddings = [torch.zeros(0, 2 * self.language["width"])]
        for role, pieces in chat:
            prompt.write(f"<|im_start|>{role}\n")
            for piece in pieces:
                if isinstance(piece, str):
                    prompt.write(piece)
                    continue
                kind, pixels, step = _seen(piece)
                prompt.write("<|vision_start|>")
                prompt.show(self.pads[kind], pixels, step)
                prompt.write("<|vision_end|>")
                embeddings.append(self.encode(pixels))
            prompt.write("<|im_end|>\n")
        prompt.write("<|im_start|>assistant\n")
        num_prompt, gaps = len(prompt.tokens), []
        for _ in range(num_tokens):
            best = self.logits(prompt.tokens, prompt.positions, torch.cat(embeddings)).topk(2)
            gaps.append(float(best.values[0] - best.values[1]))
            prompt.add(int(best.indices[0]))
        return Answer(num_prompt, prompt.tokens[num_prompt:], min(gaps))

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Embeddings [num_frames · tokens, 2 · width], frame by frame."""
        mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.3, 0.2, 0.1])
        rows = [self._encode_frame((torch.from_numpy(frame) / 255 - mean) / std) for frame in pixels]
        return torch.cat(rows)

    def _encode_frame(self, frame: Tensor) -> Tensor:
        height, width = frame.shape[0] // 10, frame.shape[1] // 10
        patches, places = [], []
        for row, column in _patch_order(height, width):
            patch = frame[10 * row : 10 * row + 10, 10 * column : 10 * column + 10]
            patches.append(patch.permute(2, 0, 1).flatten())
            places.append([row / height, column / width])
        x = self._linear("eye.look", torch.stack(patches))
        x = x + torch.tensor(places) @ self.weights["eye.place.weight"]
        for number in range(self.eye["depth"]):
            block = f"eye.blocks.{number}"
            qkv = self._linear(f"{block}.qkv", self._norm(f"{block}.norm1", x))
            q, k, v = qkv.view(len(x), 3, self.eye["heads"], -1).permute(1, 2, 0, 3)
            scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + self._linear(f"{block}.proj", (scores @ v).transpose(0, 1).flatten(1))
            hidden = self._linear(f"{block}.up", self._norm(f"{block}.norm2", x)).relu()
            x = x + self._linear(f"{block}.down", hidden)
        return self._linear("eye.out", self._norm("eye.norm", x).reshape(len(x) // 9, -1))

    def logits(self, tokens: Sequence[int], positions: Sequence[Place], embeddings: Tensor) -> Tensor:
        """[vocab] of what comes behind the last token."""
        weights, width = self.weights, self.language["width"]
        x = weights["mind.words.weight"][torch.tensor(tokens)]
        is_pad = torch.tensor([token in self.pads.values() for token in tokens])
        x[is_pad] = embeddings[:, :width]
        for number in range(self.language["depth"]):
            x = self._layer(f"mind.layers.{number}", x, torch.tensor(positions))
            if number == 0:
                x[is_pad] += embeddings[:, width:]
                x = self._remember(x) if self.language["has_memory"] else x
        return weights["mind.mouth.weight"] @ self._norm("mind.norm", x[-1])

    def _layer(self, layer: str, x: Tensor, positions: Tensor) -> Tensor:
        dim, num_tokens = self.language["head_dim"], len(x)
        normed = self._norm(f"{layer}.norm1", x)
        q, k, v = (
            (normed @ self.weights[f"{layer}.{name}_proj.weight"].T).view(num_tokens, -1, dim)
            for name in "qkv"
        )
        q, k = self._norm(f"{layer}.q_norm", q), self._norm(f"{layer}.k_norm", k)
        q, k = _turn(q, positions), _turn(k, positions)
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        is_later = torch.ones(num_tokens, num_tokens).triu(1).bool()
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(is_later, -torch.inf).softmax(-1), v)
        x = x + attended.flatten(1) @ self.weights[f"{layer}.o_proj.weight"].T
        normed = self._norm(f"{layer}.norm2", x)
        gate, up = (normed @ self.weights[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return x + (F.silu(gate) * up) @ self.weights[f"{layer}.mlp.down_proj.weight"].T

    def _remember(self, x: Tensor) -> Tensor:
        normed, weights = self._norm("mind.memory.norm", x), self.weights
        write, gate = (normed @ weights[f"mind.memory.{name}.weight"].T for name in ("write", "gate"))
        state, seen = torch.zeros(x.shape[1]), []
        for row in write:
            state = weights["mind.memory.decay.weight"] * state + row
            seen.append(state)
        return x + (F.silu(gate) * torch.stack(seen)) @ weights["mind.memory.read.weight"].T

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[f"{name}.weight"]


class _Prompt:
    """Tokens, and where each of them is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._next = tokenizer, 0
        self.tokens: list[int] = []
        self.positions: list[Place] = []

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.positions.append((self._next, self._next, self._next))
        self._next += 1

    def write(self, text: str) -> None:
        for token in self._tokenizer.encode(text, add_special_tokens=False).ids:
            self.add(token)

    def show(self, pad: int, pixels: np.ndarray, step: int) -> None:
        """The lines of tokens of all frames in two halves, with text between; `step`: from frame to frame."""
        num_frames, height, width, _ = pixels.shape
        lines = [(frame, row) for frame in range(num_frames) for row in range(height // 30)]
        half = (len(lines) + 1) // 2
        self._run(pad, lines[:half], width // 30, step)
        if half < len(lines):
            self.write("<|vision_end|> and <|vision_start|>")
            self._run(pad, lines[half:], width // 30, step)

    def _run(self, pad: int, lines: Sequence[tuple[int, int]], num_columns: int, step: int) -> None:
        start, first_frame = self._next, lines[0][0]
        for frame, row in lines:
            for column in range(num_columns):
                place = (start + step * (frame - first_frame), start + row, start + column)
                self.tokens.append(pad)
                self.positions.append(place)
                self._next = max(self._next, max(place) + 1)


def _seen(piece: Image.Image | Film | Clip) -> tuple[str, np.ndarray, int]:
    """Image or video, its pixels [num_frames, height, width, 3] uint8, positions from frame to frame."""
    if isinstance(piece, Image.Image):
        return "image", _resized([piece]), 1
    if isinstance(piece, Film):
        return "video", _resized(piece.frames), 1 if piece.fps is None else max(1, round(4 / piece.fps))
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(piece.data)
        video = open_video(file.name, "pyav", 10**7)
        total, rate = video.metadata.num_frames, video.metadata.fps
        count = round(total / rate * piece.fps)
        numbers = [number * total // count for number in range(count)]
        frames = [Image.fromarray(frame) for frame in video.frames(numbers)]
    return "video", _resized(frames), max(1, round(4 * (numbers[1] - numbers[0]) / rate))


def _resized(pictures: Sequence[Image.Image]) -> np.ndarray:
    """All of the size that the first one asks for: sides are multiples of 30."""
    size = [round(side / 30) * 30 for side in pictures[0].size]
    assert size[0] * size[1] <= 180 * 180, "a test's pictures are within the toy's limits"
    return np.stack([np.asarray(picture.convert("RGB").resize(size, Image.BICUBIC)) for picture in pictures])


def _patch_order(height: int, width: int) -> list[tuple[int, int]]:
    """The nine patches of a token side by side; tokens row by row."""
    return [
        (3 * row + inner_row, 3 * column + inner_column)
        for row in range(height // 3)
        for column in range(width // 3)
        for inner_row in range(3)
        for inner_column in range(3)
    ]


def _turn(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions of x [num_tokens, heads, dim]: the i-th pair turns with row i mod 3 of the places."""
    half = x.shape[-1] // 2
    angles = [positions[:, i % 3] * 1000.0 ** (-i / half) for i in range(half)]
    angle = torch.stack(angles, dim=1)[:, None].float()
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
