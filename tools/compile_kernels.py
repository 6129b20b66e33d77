"""Compiles every Triton kernel for GPUs that need not be there, and tells what each takes of them.

    python -m tools.compile_kernels            # all variants for sm_80, sm_90, sm_100: five minutes of a core
    python -m tools.compile_kernels --quick    # what CI compiles: half a minute
    python -m tools.compile_kernels --json

By Triton's ahead-of-time compiler, in the variants that Qwen2-VL's 2B, 7B and 72B and Qwen3.5's 27B and 0.8B
take, and the experts of Qwen3-VL's 30B-A3B; of quantised weights with groups of 128 inputs. Registers are of
one thread; a spilled register lies in memory, so none should be; shared memory is of one program. Fails when
a kernel takes more than there is, or spills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from workers.llm.attention import triton as attention
from workers.llm.attention import triton_kernels
from workers.llm.sampling import kernel as sampling_kernel
from workers.nn import expert_kernels, grouped_kernels, kernels
from workers.nn.delta import triton as delta
from workers.nn.delta import triton_kernels as delta_kernels
from workers.nn.delta.plan import CHUNK
from workers.nn.weight_tiles import DENSE as DENSE_KIND
from workers.nn.weights.grouped import NumberKind

SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of one program, by compute capability
# By a name's first word.
MAX_REGISTERS = {
    "decode": 160, "prefill": 255, "rotate": 128, "norm": 128, "merge": 96, "add": 160, "silu": 64,
    "sample": 160, "choose": 64, "plan": 64, "gate": 255, "down": 168, "sum": 64, "delta": 255,
    "grouped": 255,
}  # fmt: skip
# By the names of arguments: kernels are compiled for what the decoder hands them. The rest are int32 numbers,
# or constants.
POINTERS = {
    "q": "*bf16", "qkv": "*bf16", "bias": "*bf16", "q_norm": "*bf16", "k_norm": "*bf16", "cache": "*bf16",
    "gate_up": "*bf16", "x": "*bf16", "delta": "*bf16", "weight": "*bf16",
    "cos": "*fp32", "sin": "*fp32", "parts": "*fp32", "sums": "*fp32", "logits": "*fp32", "params": "*fp32",
    "tables": "*i32", "lengths": "*i32", "new_slots": "*i32", "starts": "*i32", "tile_sequences": "*i32",
    "tile_offsets": "*i32",
    "chosen": "*i64", "order": "*i32", "blocks": "*i32", "inner": "*bf16", "outputs": "*bf16",
    "scores": "*bf16", "shares": "*bf16",
    "scales": "*bf16", "zeros": "*bf16",  # of a dense weight: the weight, and never read
    "residual": "*bf16", "splits": "*fp32",
    "z": "*bf16", "a": "*bf16", "b": "*bf16", "inputs": "*bf16", "mixed": "*bf16", "writes": "*bf16",
    "asks": "*bf16", "solvers": "*bf16", "memory": "*fp32", "taps": "*fp32", "decay": "*fp32",
    "fade_bias": "*fp32",
    "gain": "*fp32", "totals": "*fp32", "answers": "*fp32", "slots": "*i64", "span_starts": "*i64",
    "shifts": "*i64", "sequences": "*i64", "numbers": "*i64",
}  # fmt: skip
# Tables of a step, and numbers of which only a part is handed on: aligned or not, from step to step.
UNALIGNED = ("tables", "lengths", "table_stride", "params_stride", *delta_kernels.UNALIGNED)
# Numbers of a layer, multiples of 16 in the decoders here, which the just-in-time compiler sees.
ALIGNED = ("stride", "num_inputs", "num_outputs", "inputs_of_split")
FLOATS = ("scale", "eps", "length_eps")
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
VOCAB = 151_936


class Variant(NamedTuple):
    name: str
    kernel: Any
    constants: Mapping[str, object]
    out: str = "*bf16"  # type of the argument `out`
    num_warps: int = 4
    dtype: str = "*bf16"  # of whatever is in the model's type
    num_stages: int = 3
    types: Mapping[str, str] = MappingProxyType({})  # of arguments that are none of these


class Usage(NamedTuple):
    kernel: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def is_fine(self) -> bool:
        most = MAX_REGISTERS[self.kernel.split()[0].rstrip(",")]
        return (
            self.registers <= most
            and not self.spilled_bytes
            and self.shared_bytes <= SHARED_LIMITS[self.capability]
        )


class Heads(NamedTuple):
    """Of a decoder's layers with attention."""

    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    dim: int = 128
    num_turned: int = 64  # pairs of a head's numbers
    has_wide_norm: bool = False  # its weights are in float32


class StoredKind(NamedTuple):
    """A weight as it is stored."""

    kind: str
    has_zeros: bool
    group_size: int
    types: Mapping[str, str]

    @property
    def suffix(self) -> str:
        zeros = ", zeros" if self.has_zeros else ""
        return "" if self.kind == DENSE_KIND else f", {self.kind}, groups of {self.group_size}{zeros}"

    @property
    def constants(self) -> Mapping[str, object]:
        return {"GROUP": self.group_size, "KIND": self.kind, "HAS_ZEROS": self.has_zeros}

    def layout(self, num_inputs: int) -> Mapping[str, int]:
        num_groups = 1 if self.kind == DENSE_KIND else num_inputs // self.group_size
        stride = num_inputs // 2 if self.kind == NumberKind.INT4 else num_inputs
        return {"INPUTS": num_inputs, "STRIDE": stride, "NUM_GROUPS": num_groups}


DENSE = StoredKind(DENSE_KIND, False, 128, MappingProxyType({}))
GROUPED = tuple(
    StoredKind(kind.value, has_zeros, 128, {"weight": pointer, "zeros": pointer, "scales": "*fp32"})
    for kind, has_zeros, pointer in (
        (NumberKind.INT4, False, "*u8"),
        (NumberKind.INT4, True, "*u8"),
        (NumberKind.INT8, False, "*i8"),
        (NumberKind.FP8, False, "*u8"),
    )
)

HEADS = (
    Heads(12, 2, torch.bfloat16),
    Heads(28, 4, torch.bfloat16),
    Heads(64, 8, torch.bfloat16),
    Heads(28, 4, torch.float16),
    Heads(28, 4, torch.float32),
    Heads(24, 4, torch.bfloat16, 256, 32, has_wide_norm=True),
    Heads(8, 2, torch.float32, 256, 32, has_wide_norm=True),
)


def variants(capability: int) -> Iterator[Variant]:
    for heads in HEADS:
        yield from _of_attention(heads, capability)
    splits = attention.MAX_SPLITS
    for dim in (128, 256):
        parts = {"NUM_HEADS": 28, "NUM_SPLITS": splits, "SPLITS_PADDED": splits}
        merged, num_warps = {**parts, "DIM": dim, "DIM_PADDED": dim}, attention.choose_num_warps(dim)
        yield Variant(f"merge, {dim}", triton_kernels.merge_kernel, merged, num_warps=num_warps)
    for size in (1536, 3584, 8192):
        padded = {"SIZE": size, "SIZE_PADDED": triton.next_power_of_2(size), "HAS_DELTA": True}
        yield Variant(f"add and norm, {size}", kernels.add_rms_norm_kernel, padded)
    yield Variant("silu and mul", kernels.silu_mul_kernel, {"SIZE": 18_944, "BLOCK": 1024})
    yield from _of_experts()
    yield from _of_grouped()
    yield from _of_delta(capability)
    tile = {"VOCAB": VOCAB, "TILE": sampling_kernel.TILE, "SMALL_TILE": sampling_kernel.TILE // 4}
    yield Variant("sample", sampling_kernel.sample_kernel, tile, "*i64", sampling_kernel.NUM_WARPS)


def _of_attention(heads: Heads, capability: int) -> Iterator[Variant]:
    num_heads, num_kv_heads, dtype, dim = heads[:4]
    name, pointer = f"{num_heads}/{num_kv_heads} heads, {str(dtype).removeprefix('torch.')}", TYPES[dtype]
    attended: dict[str, int | str] = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "DIM": dim,
        "DIM_PADDED": dim,
        "BLOCK_SIZE": 16,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    keys, num_warps = attention.choose_decode_tile(dtype, dim)
    for splits in (1, attention.MAX_SPLITS // 4):
        tile: dict[str, int | str] = {"ROWS": 16, "TILE": keys, "NUM_SPLITS": splits}
        out = "*fp32" if splits > 1 else pointer
        what, kernel = f"decode, {name}, {splits} splits", triton_kernels.decode_kernel
        yield Variant(what, kernel, attended | tile, out, num_warps, pointer)
    rows, keys, num_warps = attention.choose_prefill_tile(capability, dtype, dim)
    tile, kernel = {"ROWS": rows, "TILE": keys}, triton_kernels.prefill_kernel
    yield Variant(f"prefill, {name}", kernel, attended | tile, pointer, num_warps, pointer)
    turned = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEADS_PADDED": triton.next_power_of_2(num_heads + 2 * num_kv_heads),
        "HALF": dim // 2,
        "HALF_PADDED": dim // 2,
        "TURNED": heads.num_turned,
    }
    wide = {"q_norm": "*fp32", "k_norm": "*fp32"} if heads.has_wide_norm else {}
    for what, has_bias, has_norm in (("rotate", True, False), ("norm, rotate", False, True)):
        constants = {**turned, "HAS_BIAS": has_bias, "HAS_NORM": has_norm}
        kernel = triton_kernels.norm_rotate_and_write_kernel
        num_warps = attention.choose_num_warps(dim)
        what = f"{what} and write, {name}"
        yield Variant(what, kernel, constants, num_warps=num_warps, dtype=pointer, types=wide)


def _of_experts() -> Iterator[Variant]:
    num_experts, num_chosen, hidden, size = 128, 8, 2048, 768
    constants: Mapping[str, object] = {
        "NUM_EXPERTS": num_experts,
        "EXPERTS_PADDED": num_experts,
        "NUM_CHOSEN": num_chosen,
        "CHOSEN_PADDED": num_chosen,
    }
    yield Variant("choose experts", expert_kernels.choose_experts_kernel, constants)
    for is_sparse in (False, True):
        constants = {"ROWS": 16, "TILE": expert_kernels.PLAN_TILE, "IS_SPARSE": is_sparse}
        name = f"plan of experts, {'few' if is_sparse else 'many'} choices"
        yield Variant(name, expert_kernels.plan_experts_kernel, constants)
    for dtype, rows_per_expert in ((torch.bfloat16, 1), (torch.bfloat16, 1000), (torch.float32, 1)):
        for weight in (DENSE, *(GROUPED if dtype == torch.bfloat16 else ())):
            tile = expert_kernels.choose_expert_tile(dtype, rows_per_expert, weight is DENSE)
            name, pointer = f"{tile.rows} rows, {str(dtype).removeprefix('torch.')}", TYPES[dtype]
            shape = {
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "DEPTH": tile.depth,
                "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            }
            for what, kernel, num_inputs, constants in (
                (
                    "gate and up",
                    expert_kernels.gate_up_kernel,
                    hidden,
                    {"NUM_CHOSEN": num_chosen, "SIZE": size},
                ),
                ("down", expert_kernels.down_kernel, size, {"HIDDEN": hidden}),
            ):
                yield Variant(
                    f"{what} of experts, {name}{weight.suffix}", kernel,
                    {**constants, **weight.constants, **weight.layout(num_inputs), **shape},
                    pointer, tile.num_warps, pointer, types=weight.types,
                )  # fmt: skip
    constants = {"NUM_CHOSEN": num_chosen, "HIDDEN": hidden, "COLUMNS": expert_kernels.SUM_COLUMNS}
    yield Variant("sum of experts", expert_kernels.sum_experts_kernel, constants)


def _of_grouped() -> Iterator[Variant]:
    """Linear layers of quantised weights: one row, the most of few rows, and many."""
    many = grouped_kernels.FEW_ROWS + 1
    for dtype, num_rows in (*((torch.bfloat16, count) for count in (1, 32, 64, many)), (torch.float32, 1)):
        tile = grouped_kernels.choose_grouped_tile(dtype, num_rows)
        name, pointer = f"{tile.rows} rows, {str(dtype).removeprefix('torch.')}", TYPES[dtype]
        for weight in GROUPED:
            constants = {
                **weight.constants,
                "HAS_BIAS": True,
                "HAS_RESIDUAL": num_rows == many,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "DEPTH": tile.depth,
                "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            }
            yield Variant(
                f"grouped linear, {name}{weight.suffix}", grouped_kernels.grouped_linear_kernel, constants,
                pointer, tile.num_warps, pointer, types=weight.types,
            )  # fmt: skip
    constants = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "BLOCK": grouped_kernels.SUM_BLOCK}
    yield Variant("sum of splits", grouped_kernels.sum_splits_kernel, constants)


def _of_delta(capability: int) -> Iterator[Variant]:
    """Of layers with linear attention: in bfloat16 of Qwen3.5's 27B, in float32 of its 0.8B. The recurrence,
    which takes most registers, with any number of value heads for a key head."""
    for group, dtype in ((3, torch.bfloat16), (1, torch.float32)):
        name, pointer = f"16/{16 * group} heads, {str(dtype).removeprefix('torch.')}", TYPES[dtype]
        heads: Mapping[str, object] = {"KEY_HEADS": 16, "GROUP": group, "KEY_DIM": 128, "VALUE_DIM": 128}
        keys, chunk = {**heads, "KEY_PADDED": 128}, {"SIZE": CHUNK}
        whole = {**keys, "VALUE_PADDED": 128}
        convolved = {**heads, **chunk, "DIM_PADDED": 128, "NUM_TAPS": 4, "ROWS": delta.CONVOLVED_ROWS}
        kept = {"NUM_CHANNELS": 128 * 16 * (2 + group), "NUM_KEPT": 3, "BLOCK": delta.KEEP_BLOCK}
        step = {"num_warps": delta.STEP_WARPS}
        for what, kernel, constants, options in (
            ("step", delta_kernels.delta_decode_kernel, {**whole, "NUM_TAPS": 4}, step),
            ("convolution", delta_kernels.delta_convolve_kernel, convolved, {}),
            ("kept inputs", delta_kernels.delta_keep_kernel, kept, {}),
            *(_of_chunks(keys, whole, chunk, capability) if dtype not in delta.WALKED else ()),
            *((("walk", delta_kernels.delta_walk_kernel, whole, step),) if dtype in delta.WALKED else ()),
        ):
            yield Variant(f"delta {what}, {name}", kernel, constants, pointer, dtype=pointer, **options)


def _of_chunks(
    keys: Mapping[str, object], whole: Mapping[str, object], chunk: Mapping[str, object], capability: int
) -> Iterator[tuple[str, Any, Mapping[str, object], Mapping[str, int]]]:
    yield "system", delta_kernels.delta_solve_kernel, {**keys, **chunk}, {}
    yield "writes", delta_kernels.delta_write_kernel, {**whole, **chunk}, {}
    num_warps = delta.choose_recur_warps((capability // 10, capability % 10))
    options = {"num_stages": delta.RECUR_STAGES, "num_warps": num_warps}
    for group in (1, 2, 3, 4):
        recurrence = {**keys, **chunk, "GROUP": group, "BLOCK": delta.VALUE_BLOCK}
        yield f"recurrence in groups of {group}", delta_kernels.delta_recur_kernel, recurrence, options
    yield "outputs", delta_kernels.delta_output_kernel, {**whole, **chunk}, {}


def compile_variant(variant: Variant, capability: int) -> Usage:
    names = variant.kernel.arg_names
    types = {name: "fp32" if name in FLOATS else POINTERS.get(name, "i32") for name in names} | {
        "out": variant.out
    }
    types = {
        name: variant.dtype if kind == "*bf16" and name != "out" else kind for name, kind in types.items()
    }
    types |= variant.types
    signature = {name: "constexpr" if name in variant.constants else types[name] for name in names}
    # As the just-in-time compiler sees it: torch's memory is aligned, and strides are multiples of 16, but
    # for those of the step.
    is_aligned = [
        name not in UNALIGNED and (signature[name].startswith("*") or name.endswith(ALIGNED))
        for name in names
    ]
    aligned = {(index,): [["tt.divisibility", 16]] for index, is_one in enumerate(is_aligned) if is_one}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    registers, spilled = _resources(compiled.asm["cubin"])
    return Usage(variant.name, capability, registers, spilled, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump tells nothing of registers: {text}")
    return int(found[1]), int(found[2]) + int(found[3])


def numbers() -> list[tuple[int, int]]:
    """Of all variants: the capability, and which of its variants."""
    return [
        (capability, number) for capability in SHARED_LIMITS for number, _ in enumerate(variants(capability))
    ]


def quick_numbers() -> list[tuple[int, int]]:
    """As `numbers`, of each kernel, and each kind of weight that it takes, only the last variant in bfloat16,
    which is the largest; a kernel that has none in another type. For one capability after the other."""
    of_all, of_bfloat16 = {}, {}
    for number, variant in enumerate(variants(min(SHARED_LIMITS))):
        key = variant.kernel, variant.constants.get("KIND")
        of_all[key] = number
        if variant.dtype == TYPES[torch.bfloat16]:
            of_bfloat16[key] = number
    return list(zip(itertools.cycle(SHARED_LIMITS), (of_all | of_bfloat16).values(), strict=False))


def compile_number(capability: int, number: int) -> Usage:
    return compile_variant(next(itertools.islice(variants(capability), number, None)), capability)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="each kernel once, as in CI")
    args = parser.parse_args()
    chosen = quick_numbers() if args.quick else numbers()
    with ProcessPoolExecutor() as pool:
        usages = list(pool.map(compile_number, *zip(*chosen, strict=True)))
    if args.json:
        print(json.dumps([usage._asdict() for usage in usages]))
    else:
        print("| kernel | for | registers | spilled bytes | shared bytes |\n| --- | --- | --- | --- | --- |")
        for usage in usages:
            print(
                f"| {usage.kernel} | sm_{usage.capability} | {usage.registers} | {usage.spilled_bytes} | "
                f"{usage.shared_bytes} |"
            )
    return int(not all(usage.is_fine for usage in usages))


if __name__ == "__main__":
    raise SystemExit(main())
