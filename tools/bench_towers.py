"""Vision towers of the published shapes beside transformers': the same weights, type and threads.

    python -m tools.bench_towers                                  # a third of the layers, all shapes
    python -m tools.bench_towers --parts qwen3_vl_8b --rounds 7 --sides 448

Needs transformers (`pip install -e '.[test]'`). Weights are random, and numbers of bfloat16, as published
ones are. Rounds are interleaved and medians are told, since shared machines drift.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from pipeline.families import VisionInfo
from pipeline.families.qwen2_5_vl import WindowedVisionInfo
from pipeline.families.qwen3_vl import Qwen3VisionInfo
from pipeline.families.vision import CLIP_MEAN, CLIP_STD
from pipeline.wire.base import GridTHW
from tools.bench_engine import Row, measure
from workers.nn.loader import choose_dtype
from workers.nn.weights.registry import open_weights
from workers.vit.engines.torch import TorchEngine
from workers.vit.models import qwen2_5_vl, qwen3_vl
from workers.vit.models.base import EncodeJob, Tower
from workers.vit.models.patches import patchify

PARTS = ("qwen2_5_vl", "qwen3_vl_8b", "qwen3_vl_4b")
CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "merge_size": 2, "temporal_patch_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    "min_pixels": 1, "max_pixels": 1 << 24,
}  # fmt: skip


class Bench:
    """`share`: of the layers, and of those whose output is merged."""

    def __init__(
        self, rounds: int, share: float, sides: Sequence[int], dtype: torch.dtype, device: torch.device = CPU
    ) -> None:  # fmt: skip
        self.rounds, self.share, self.sides, self.dtype, self.device = rounds, share, sides, dtype, device

    def qwen2_5_vl(self) -> list[Row]:
        depth = round(32 * self.share)
        full = tuple(range(7, depth, 8))
        info = WindowedVisionInfo(
            **COMMON, depth=depth, embed_dim=1280, num_heads=16, intermediate_size=3420, embedding_width=3584,
            patch_size=14, window_size=4, full_attention_layers=full,
        )  # fmt: skip
        config = Qwen2_5_VLVisionConfig(
            depth=depth, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=3584,
            patch_size=14, window_size=112, fullatt_block_indexes=list(full),
        )  # fmt: skip
        tower = Qwen2_5_VisionTransformerPretrainedModel(config)
        return self._rows("Qwen2.5-VL", info, qwen2_5_vl.TOWER, tower)

    def qwen3_vl_8b(self) -> list[Row]:
        return self._qwen3_vl("Qwen3-VL-8B", 27, 1152, 4304, 4096)

    def qwen3_vl_4b(self) -> list[Row]:
        return self._qwen3_vl("Qwen3-VL-4B", 24, 1024, 4096, 2560)

    def _qwen3_vl(
        self, name: str, depth: int, embed_dim: int, intermediate_size: int, width: int
    ) -> list[Row]:  # fmt: skip
        depth, num_merged = round(depth * self.share), round(3 * self.share)
        layers = tuple(range(num_merged))
        info = Qwen3VisionInfo(
            **COMMON, depth=depth, embed_dim=embed_dim, num_heads=16, intermediate_size=intermediate_size,
            embedding_width=width * (1 + num_merged), patch_size=16, position_side=48,
            deepstack_layers=layers,
        )  # fmt: skip
        config = Qwen3VLVisionConfig(
            depth=depth, hidden_size=embed_dim, num_heads=16, intermediate_size=intermediate_size,
            out_hidden_size=width, patch_size=16, num_position_embeddings=48 * 48,
            deepstack_visual_indexes=list(layers),
        )  # fmt: skip
        return self._rows(name, info, qwen3_vl.TOWER, Qwen3VLVisionModel(config))

    def _rows(self, name: str, info: VisionInfo, tower: Tower, reference: nn.Module) -> list[Row]:
        reference.to(torch.bfloat16).to(self.device, self.dtype).eval()
        with tempfile.TemporaryDirectory() as folder:
            tensors = {f"visual.{key}": value.cpu() for key, value in reference.state_dict().items()}
            save_file(tensors, Path(folder) / "model.safetensors")
            encoder = tower.encoder(info, open_weights(Path(folder), self.dtype, self.device))
        engine = TorchEngine(encoder, after_work=lambda: None)  # in blocks, as a worker computes
        return [self._row(name, info, engine, reference, side) for side in self.sides]

    def _row(
        self, name: str, info: VisionInfo, engine: TorchEngine, reference: nn.Module, side: int
    ) -> Row:  # fmt: skip
        side = round(side / info.factor) * info.factor
        pixels = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, device=self.device)
        grid = GridTHW(1, side // info.patch_size, side // info.patch_size)
        shape = info.num_tokens(grid), info.embedding_width
        output = torch.empty(shape, dtype=self.dtype, device=self.device)
        job = EncodeJob(pixels, grid, output)
        patches, grids = patchify(pixels, info), torch.tensor([list(grid)], device=self.device)

        def theirs() -> Tensor:
            with torch.inference_mode():
                found: Tensor = reference(patches, grid_thw=grids).pooler_output
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return found

        rounds = range(self.rounds + 1)  # the first warms up
        times = [(_seconds(lambda: engine.encode([job])), _seconds(theirs)) for _ in rounds]
        expected = theirs()
        error = (output[:, : expected.shape[1]] - expected).norm() / expected.norm()
        assert error < (1e-3 if self.dtype == torch.float32 else 5e-2), f"another result, by {error:.2e}"
        ours, against = (statistics.median(each) for each in zip(*times[1:], strict=True))
        count = grid.num_patches
        what = f"{name}, {side}x{side}, {info.depth} layers"
        return Row(what, count / ours, "transformers", count / against, "patches/s")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1 / 3, help="of the layers")
    parser.add_argument("--sides", type=int, nargs="+", default=(448, 1008), help="of the picture, in pixels")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    dtype = choose_dtype(args.dtype, CPU)
    torch.set_num_threads(os.cpu_count() or 1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {dtype}; "
        f"median of {args.rounds} rounds\n",
        flush=True,
    )
    measure(Bench(args.rounds, args.share, args.sides, dtype), args.parts, args.json)


if __name__ == "__main__":
    main()
