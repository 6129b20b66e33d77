"""Compiles every Triton kernel for GPUs that need not be there, and tells what each takes of them.

    python -m tools.compile_kernels            # sm_80, sm_90, sm_100
    python -m tools.compile_kernels --json

By Triton's ahead-of-time compiler, in the variants that Qwen2-VL's 2B, 7B and 72B take. Registers are of one thread; a spilled
register lies in memory, so none should be; shared memory is of one program. Fails when a kernel takes more than there is, or spills.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from workers.llm import sampling_kernel
from workers.llm.attention import triton as attention
from workers.nn import kernels

SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of one program, by compute capability
MAX_REGISTERS = 255
# By the names of arguments: kernels are compiled for what the decoder hands them. The rest are int32 numbers, or constants.
POINTERS = {
    "q": "*bf16", "qkv": "*bf16", "bias": "*bf16", "cache": "*bf16", "gate_up": "*bf16", "x": "*bf16", "delta": "*bf16", "weight": "*bf16",
    "cos": "*fp32", "sin": "*fp32", "parts": "*fp32", "sums": "*fp32", "logits": "*fp32", "params": "*fp32",
    "tables": "*i32", "lengths": "*i32", "new_slots": "*i32", "starts": "*i32", "tile_sequences": "*i32", "tile_offsets": "*i32",
}  # fmt: skip
FLOATS = ("scale", "eps")
VOCAB = 151_936


class Variant(NamedTuple):
    name: str
    kernel: Any
    constants: Mapping[str, object]
    out: str = "*bf16"  # type of the argument `out`
    num_warps: int = 4


class Usage(NamedTuple):
    kernel: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def is_fine(self) -> bool:
        return self.registers <= MAX_REGISTERS and not self.spilled_bytes and self.shared_bytes <= SHARED_LIMITS[self.capability]


def variants(capability: int) -> Iterator[Variant]:
    head = {"DIM": 128, "DIM_PADDED": 128}
    for heads, kv_heads in ((12, 2), (28, 4), (64, 8)):
        group, name = heads // kv_heads, f"{heads}/{kv_heads} heads"
        attended = {"NUM_KV_HEADS": kv_heads, "GROUP": group, **head, "BLOCK_SIZE": 16, "PRECISION": "tf32"}
        for splits in (1, 16):
            tile = {"ROWS": 16, "TILE": attention.DECODE_TILE, "NUM_SPLITS": splits}
            yield Variant(f"decode, {name}, {splits} splits", attention.decode_kernel, attended | tile, "*fp32" if splits > 1 else "*bf16")
        rows, keys, num_warps = attention.choose_prefill_tile(capability)
        yield Variant(f"prefill, {name}", attention.prefill_kernel, attended | {"ROWS": rows, "TILE": keys}, num_warps=num_warps)
        padded = {"HEADS_PADDED": triton.next_power_of_2(heads + 2 * kv_heads), "HALF": 64, "HALF_PADDED": 64, "HAS_BIAS": True}
        yield Variant(f"rotate and write, {name}", attention.rotate_and_write_kernel, {"NUM_HEADS": heads, "NUM_KV_HEADS": kv_heads, **padded})
    splits = attention.MAX_SPLITS
    yield Variant("merge", attention.merge_kernel, {"NUM_HEADS": 28, "NUM_SPLITS": splits, "SPLITS_PADDED": splits, **head})
    for size in (1536, 3584, 8192):
        padded = {"SIZE": size, "SIZE_PADDED": triton.next_power_of_2(size), "HAS_DELTA": True}
        yield Variant(f"add and norm, {size}", kernels.add_rms_norm_kernel, padded)
    yield Variant("silu and mul", kernels.silu_mul_kernel, {"SIZE": 18_944, "BLOCK": 1024})
    tile = {"VOCAB": VOCAB, "TILE": sampling_kernel.TILE, "SMALL_TILE": sampling_kernel.TILE // 4}
    yield Variant("sample", sampling_kernel.sample_kernel, tile, "*i64", sampling_kernel.NUM_WARPS)


def compile_variant(variant: Variant, capability: int) -> Usage:
    names = variant.kernel.arg_names
    types = {name: "fp32" if name in FLOATS else POINTERS.get(name, "i32") for name in names} | {"out": variant.out}
    signature = {name: "constexpr" if name in variant.constants else types[name] for name in names}
    # As the just-in-time compiler sees it: torch's memory is aligned, and strides are multiples of 16.
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name].startswith("*") or name.endswith("stride")}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": variant.num_warps})
    registers, spilled = _resources(compiled.asm["cubin"])
    return Usage(variant.name, capability, registers, spilled, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump tells nothing of registers: {text}")
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args().json
    usages = [compile_variant(variant, capability) for capability in SHARED_LIMITS for variant in variants(capability)]
    if as_json:
        print(json.dumps([usage._asdict() for usage in usages]))
    else:
        print("| kernel | for | registers | spilled bytes | shared bytes |\n| --- | --- | --- | --- | --- |")
        for usage in usages:
            print(f"| {usage.kernel} | sm_{usage.capability} | {usage.registers} | {usage.spilled_bytes} | {usage.shared_bytes} |")
    return int(not all(usage.is_fine for usage in usages))


if __name__ == "__main__":
    raise SystemExit(main())
