"""Puts the vision tower of one checkpoint before the decoder of another: `python -m tools.tiny_model.stitch`.

A decoder understands only the tower that it learned with. Two towers that learned the same labels know much
the same, though, each in a basis of its own: a linear map takes one to the other (model stitching: Lenc and
Vedaldi 2015, Bansal, Nakkiran and Barak 2021). It goes into the last matrix of the merger, fitted by ridge
regression to what the decoder's former tower says of the same pictures.
Needs transformers (`pip install -e '.[test]'`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from tools.tiny_model.batches import LessonBatches
from tools.tiny_model.tower import grids, make_fast, to_patches
from tools.tiny_model.train import export

# of the features' mean square: a tenth or ten times of it explains as much, but less makes large weights
RIDGE = 0.01
TEST_EVERY = 10


@torch.inference_mode()
def stitch(
    tower: Qwen2VisionTransformerPretrainedModel,
    former: Qwen2VisionTransformerPretrainedModel,
    pictures: Iterable[Tensor],
) -> float:
    """Refits the last matrix of `tower`'s merger, in place, to give what `former` gives. Both have been made
    fast (tower.py).

    `pictures` are batches of pixels, [N, 2, height, width, 3] uint8, at least `TEST_EVERY` of them: one in so
    many is not fitted to. Returns the share of the variance that is explained in these (R²).
    """
    last = tower.merger.mlp[-1]
    assert isinstance(last, nn.Linear)
    features: list[Tensor] = []
    hook = last.register_forward_hook(
        lambda _module, inputs, _output: features.append(inputs[0].flatten(0, -2))
    )
    size = last.in_features + 1
    gram, moments = (
        torch.zeros(size, size, dtype=torch.float64),
        torch.zeros(size, last.out_features, dtype=torch.float64),
    )
    tests: list[tuple[Tensor, Tensor]] = []
    for number, pixels in enumerate(pictures, start=1):
        features.clear()
        patches, grid = to_patches(pixels), grids(pixels)
        tower(patches, grid_thw=grid)
        x = nn.functional.pad(features[0].double(), (0, 1), value=1.0)
        y = former(patches, grid_thw=grid).pooler_output.double().flatten(0, -2)
        if number % TEST_EVERY:
            gram += x.T @ x
            moments += x.T @ y
        else:
            tests.append((x, y))
    hook.remove()
    fitted = torch.linalg.solve(
        gram + RIDGE * gram.diag().mean() * torch.eye(size, dtype=gram.dtype), moments
    )
    last.weight.copy_(fitted[:-1].T)
    last.bias.copy_(fitted[-1])
    x, y = (torch.cat(part) for part in zip(*tests, strict=True))
    return float(1 - (x @ fitted - y).square().sum() / (y - y.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", type=Path, required=True, help="checkpoint whose vision tower is taken")
    parser.add_argument(
        "--decoder", type=Path, required=True, help="checkpoint of which everything else is taken"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the checkpoint: train --start-from goes on with it",
    )
    parser.add_argument(
        "--batches", type=int, default=150, help=f"of the second stage's pictures, {TEST_EVERY} or more"
    )
    args = parser.parse_args()
    if args.batches < TEST_EVERY:
        parser.error(f"--batches {args.batches}: one in {TEST_EVERY} is to test the fit with")
    new, model = (
        Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        for path in (args.tower, args.decoder)
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.decoder)
    make_fast(new.model.visual)
    make_fast(model.model.visual)
    pictures = (batch.pixels for _, batch in LessonBatches(tokenizer, 5600, seed=0) if len(batch.pixels))
    explained = stitch(new.model.visual, model.model.visual, islice(pictures, args.batches))
    print(f"R² over pictures that were not fitted to: {explained:.3f}", flush=True)
    model.model.visual.load_state_dict(new.model.visual.state_dict())
    export(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
