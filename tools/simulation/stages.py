"""How long each stage takes: measured, or estimated by a roofline. As JSON: a `StageTimes`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pipeline.families import ModelInfo

SHARINGS = ("own", "turns")


class StepCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds of a step of the LLM, a sum over what is in it."""

    fixed_s: float = 0.0
    decode_s: float = 0.0  # for each sequence that decodes
    context_s: float = 0.0  # for each token of their contexts
    prefill_s: float = 0.0  # for each token of a prompt
    pair_s: float = 0.0  # for each such token and each token before it

    def seconds(self, num_decodes: int, num_context: int, num_prefill: int, num_pairs: int) -> float:
        return (
            self.fixed_s
            + self.decode_s * num_decodes
            + self.context_s * num_context
            + self.prefill_s * num_prefill
            + self.pair_s * num_pairs
        )


class EncodeCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds of a batch of a ViT."""

    fixed_s: float = 0.0
    patch_s: float = 0.0
    pair_s: float = 0.0  # for each pair of patches of one picture

    def seconds(self, num_patches: int, num_pairs: int) -> float:
        return self.fixed_s + self.patch_s * num_patches + self.pair_s * num_pairs


class StageTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of a step and of a batch, the largest of the given costs counts: a roofline has one of memory and
    one of arithmetic, a fit has one."""

    step: tuple[StepCost, ...]
    encode: tuple[EncodeCost, ...]
    # Preprocessing: one process prepares requests one after the other, and further processes decode pictures.
    prepare_s: float = 0.0  # for each request
    prepare_token_s: float = 0.0  # for each token of its prompt
    prepare_megapixel_s: float = 0.0  # of its pictures, as they come
    decode_picture_s: float = 0.0
    decode_megapixel_s: float = 0.0
    hand_off_s: float = 0.0  # from a ViT to the LLM
    front_s: float = 0.0  # from the client to preprocessing, and the first token's way back
    between_s: float = 0.0  # from the end of a step to the start of the next
    # own: each process computes on a device or on cores of its own; turns: LLM and ViT take turns on the same
    # cores (docs/cores.md).
    sharing: str = "own"
    kv_blocks: int = 1 << 16
    block_size: int = 16
    model: str = ""  # for which it holds, in words
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.step or not self.encode:
            raise ValueError("a step and an encode need at least one cost each")
        if self.sharing not in SHARINGS:
            raise ValueError(f"sharing must be one of {', '.join(SHARINGS)}, got {self.sharing!r}")

    def step_seconds(self, num_decodes: int, num_context: int, num_prefill: int, num_pairs: int) -> float:
        return max(cost.seconds(num_decodes, num_context, num_prefill, num_pairs) for cost in self.step)

    def encode_seconds(self, pictures: list[int]) -> float:
        """Of a batch of pictures with so many patches each."""
        num_patches, num_pairs = sum(pictures), sum(count * count for count in pictures)
        return max(cost.seconds(num_patches, num_pairs) for cost in self.encode)


def read_stages(path: Path) -> StageTimes:
    """Raises ValueError for a file that is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=StageTimes)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} has no stage times: {error}") from None


def write_stages(path: Path, stages: StageTimes) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(stages), indent=2) + b"\n")


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one process of a stage has: a GPU, or some cores."""

    flops: float  # floating-point operations a second
    bytes_per_s: float  # of its memory
    efficiency: float = 0.6  # which part of both is reached
    weight_bytes: float = 2.0  # of a weight
    kv_bytes: float = 2.0  # of a number in the KV cache
    kv_gib: float = 32.0
    step_overhead_s: float = 0.0003


def roofline(
    info: ModelInfo, num_weights: int, num_paged_layers: int, machine: Machine, tp: int = 1
) -> StageTimes:
    """`num_weights`: that one token is multiplied by. `num_paged_layers`: that keep keys and values. `tp`:
    ranks of a group, each with a machine.

    A step reads these weights and the keys and values of its contexts, and computes two operations for each
    weight and token. A ViT does so for each patch, and its attention for each pair of patches of a picture.
    Sums between ranks are not counted, nor experts that only other tokens of a step choose.
    """
    text, vision = info.text, info.vision
    flops, rate = machine.flops * machine.efficiency * tp, machine.bytes_per_s * machine.efficiency * tp
    kv_token = 2 * num_paged_layers * text.num_kv_heads * text.head_dim * machine.kv_bytes
    pair_flops = 4 * num_paged_layers * text.num_heads * text.head_dim
    token_s = 2 * num_weights / flops
    layer = 4 * vision.embed_dim**2 + 2 * vision.embed_dim * vision.intermediate_size
    tower = vision.depth * layer
    vit_flops, vit_rate = flops / tp, rate / tp
    blocks = int(machine.kv_gib * 2**30 * tp / (kv_token * 16))
    return StageTimes(
        step=(
            StepCost(
                fixed_s=num_weights * machine.weight_bytes / rate + machine.step_overhead_s,
                context_s=kv_token / rate,
            ),
            StepCost(
                fixed_s=machine.step_overhead_s,
                decode_s=token_s,
                context_s=pair_flops / flops,
                prefill_s=token_s,
                pair_s=pair_flops / flops,
            ),
        ),
        encode=(
            EncodeCost(fixed_s=tower * machine.weight_bytes / vit_rate + machine.step_overhead_s),
            EncodeCost(
                fixed_s=machine.step_overhead_s,
                patch_s=2 * tower / vit_flops,
                pair_s=4 * vision.depth * vision.embed_dim / vit_flops,
            ),
        ),
        prepare_s=0.002,
        prepare_token_s=2e-6,
        decode_picture_s=0.002,
        decode_megapixel_s=0.02,
        hand_off_s=0.0005,
        front_s=0.003,
        kv_blocks=max(64, blocks),
        model=info.folder.name,
        origin=f"roofline of {machine.flops:g} FLOP/s and {machine.bytes_per_s:g} bytes/s, reached by "
        f"{machine.efficiency:g}; times of preprocessing are typical ones of a core, not of this machine",
    )
