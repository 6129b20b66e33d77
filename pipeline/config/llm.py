"""Options of the language model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.base import at_least, option

# By `speculative`: for a request in one step, without the option. An n-gram's guess costs nothing and is
# mostly right or wrong as a whole. Each of a head's takes a pass of its own, and is less sure than the last.
GUESSES = {"none": 0, "ngram": 15, "mtp": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmConfig:
    tp: int = option(
        1,
        "tensor parallel: LLM ranks, each on a GPU of its own",
        metavar="N",
        aliases=("--tensor-parallel-size",),
    )
    dp: int = option(
        1,
        "data parallel: groups of --tp ranks; each request runs in one of them",
        metavar="N",
        aliases=("--data-parallel-size",),
    )
    expert_parallel: bool = option(
        False, "with --tp: each rank has some of the experts whole, instead of a part of each expert"
    )
    max_num_seqs: int = option(64, "requests computed at once", metavar="N")
    max_num_batched_tokens: int = option(2048, "tokens computed in one step", metavar="TOKENS")
    block_size: int = option(16, "tokens of one KV cache block", metavar="TOKENS")
    kv_cache_gib: float | None = option(
        None,
        "memory for the KV cache and layers' states of each rank, in GiB (default: 1 on the CPU, and room "
        "for 32 states of models that have any; on a GPU what --gpu-memory-utilization leaves)",
        metavar="GIB",
    )
    kv_cache_dtype: str = option(
        "auto",
        "keys and values in the KV cache; auto: in the model's type; int8 or fp8 (e4m3): in 8 bits, with a "
        "scale for each head of each token, so that two to four times as many tokens fit; "
        "docs/quantization.md has the loss",
        choices=("auto", "int8", "fp8", "fp8_e4m3"),
    )
    gpu_memory_utilization: float = option(
        0.9, "share of a GPU's memory for all that runs there: ViT, weights, KV cache", metavar="SHARE"
    )
    llm_cores: int | None = option(
        None,
        "CPU cores of all LLM ranks together (default: all but a quarter, which the ViTs have; more are "
        "shared with them)",
        metavar="N",
    )
    quantization: str = option(
        "none",
        "int8: weights in 8 bits, activations too, token by token; int4: weights in 4 bits, activations in "
        "8; fp8: weights in 8 bits of floating point; on a GPU activations keep their type; of the decoder "
        "and, without --vit-quantization, of the ViT; for checkpoints that are not quantised",
        choices=("none", "int8", "int4", "fp8"),
    )
    activation_quantization: str = option(
        "auto",
        "what weights in 4 or 8 bits are multiplied by; auto: those of a checkpoint on the CPU in bfloat16 "
        "by activations in 8 bits, token by token, in float32 by exact ones, on a GPU by its scaled product "
        "where it has one; those of --quantization as it says; int8: by 8 bits, which is faster, on the CPU "
        "only; none: by exact ones",
        choices=("auto", "int8", "none"),
    )
    prefix_caching: bool = option(
        True, "keep computed prompts, text and pictures, for requests that begin alike"
    )
    max_itl_stretch: float = option(
        1.25,
        "prompts may make the steps of running streams so many times longer; 0: as they like; where LLM and "
        "ViTs take turns on cores, 4 while more requests with pictures wait for a first token than streams "
        "run",
        metavar="RATIO",
    )
    attention: str = option(
        "auto",
        "what computes attention; auto: triton on GPUs, on the CPU native, the compiled kernels, or torch "
        "where there are none; flash3: FlashAttention-3, where it is installed",
        choices=("auto", "torch", "native", "triton", "flash3"),
    )
    linear_attention: str = option(
        "auto",
        "what computes layers with linear attention (Gated DeltaNet); auto: on GPUs fla "
        "(flash-linear-attention 0.6 or later) where it is installed, else triton; torch on the CPU",
        choices=("auto", "torch", "triton", "fla"),
    )
    all_reduce: str = option(
        "nccl",
        "how ranks add up; symmetric: small sums through memory that all GPUs have mapped (NVLink)",
        choices=("nccl", "symmetric"),
    )
    cuda_graphs: bool = option(True, "run decode steps as CUDA graphs, where attention is not torch's")
    overlap: str = option(
        "auto",
        "prepare the next step while one runs; auto: on GPUs, without --speculative",
        choices=("auto", "on", "off"),
    )
    speculative: str = option(
        "none",
        "guess the next tokens and compute several in one step; ngram: as the text went on before "
        "(prompt lookup); mtp: by the head that some checkpoints have for it",
        choices=("none", "ngram", "mtp"),
    )
    speculative_tokens: int | None = option(
        None, "guesses for a request in one step; default 15 with ngram, 3 with mtp", metavar="N"
    )

    @property
    def max_guesses(self) -> int:
        """For a request in one step."""
        return self.speculative_tokens or GUESSES[self.speculative]

    def __post_init__(self) -> None:
        at_least(self, tp=1, dp=1, llm_cores=1, max_num_seqs=1, max_num_batched_tokens=1, block_size=1)
        at_least(self, speculative_tokens=1)
        if self.speculative != "none" and self.overlap == "on":
            raise ValueError(
                f"overlap is 'on' and speculative {self.speculative!r}: a guess needs the tokens before it"
            )
        if self.kv_cache_dtype != "auto" and self.attention == "flash3":
            raise ValueError(
                f"kv_cache_dtype {self.kv_cache_dtype!r} goes with attention 'triton', 'native' or 'torch': "
                "'flash3' reads no keys that have a scale for each token"
            )
        if self.expert_parallel and self.tp == 1:
            raise ValueError("expert_parallel needs several ranks, but tp is 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            raise ValueError(f"kv_cache_gib must be above 0 and finite, got {self.kv_cache_gib}")
        if self.max_itl_stretch and not 1 < self.max_itl_stretch < math.inf:
            raise ValueError(f"max_itl_stretch must be above 1 and finite, or 0, got {self.max_itl_stretch}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs, got {self.max_num_batched_tokens} "
                f"and {self.max_num_seqs}"
            )
