"""Options of the vision encoders."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.base import at_least, option


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    vit: int | None = option(None, "number of ViT processes (default: as many as LLM ranks)", metavar="N")
    vit_cores: int | None = option(
        None, "CPU cores of all ViTs together (default: a quarter; more are shared with the LLM)", metavar="N"
    )
    vit_engine: str = option(
        "auto",
        "what computes the ViT; tensorrt, onnxruntime: from an ONNX file exported at the first start; auto: "
        "these on GPUs where they load",
        choices=("auto", "torch", "onnxruntime", "tensorrt"),
    )
    vit_quantization: str | None = option(
        None,
        "the ViT's weights in 8 or 4 bits, as --quantization has the decoder's; with engine torch only "
        "(default: as --quantization)",
        choices=("none", "int8", "int4", "fp8"),
    )
    vit_max_batch_patches: int | None = option(
        None,
        "most patches in one forward of a ViT (default: 4096 on GPUs, 1024 on the CPU, which gains nothing "
        "by more)",
        metavar="PATCHES",
    )
    vit_slice_ms: float | None = option(
        None,
        "longest turn of a ViT on its device, in milliseconds: batches are made so small; 0: as they come "
        "(default: 10 on GPUs)",
        metavar="MS",
    )
    embedding_transport: str = option(
        "auto",
        "how embeddings reach the LLM; cuda_ipc: in place; host: through host memory; auto: cuda_ipc where "
        "ViT and driver can",
        choices=("auto", "cuda_ipc", "host"),
    )
    embedding_pool_mib: int = option(
        256, "memory of each ViT for embeddings, in use or cached, in MiB", metavar="MIB"
    )

    def __post_init__(self) -> None:
        at_least(self, vit=1, vit_cores=1, vit_max_batch_patches=4, vit_slice_ms=0, embedding_pool_mib=0)
