"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.base import at_least, option

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: str = option(
        "",
        "folder or hub name of a Qwen-VL checkpoint (safetensors); without it the embedded model runs",
        metavar="MODEL",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "names of the model in the API: all are taken in requests, the first is shown in answers (default: "
        "as given to --model)",
        metavar="NAME",
    )
    lora: tuple[str, ...] = option(
        (),
        "LoRA adapters that PEFT has saved: a request chooses one by its name, as its model",
        metavar="NAME=FOLDER",
        aliases=("--lora-modules",),
    )
    download_from: str = option(
        "huggingface", "where a hub name is looked up", choices=("huggingface", "modelscope")
    )
    dtype: str = option(
        "auto",
        "type of weights and activations; auto: bfloat16 where native, else float16 on GPUs, float32",
        choices=DTYPES,
    )
    device: str = option(
        "auto", "auto: CUDA if there is a GPU, else the CPU", choices=("auto", "cpu", "cuda")
    )
    max_model_len: int | None = option(
        None, "longest prompt plus output, in tokens (default: what the model was made for)", metavar="TOKENS"
    )

    def __post_init__(self) -> None:
        at_least(self, max_model_len=16)
        if "" in self.served_model_name:
            raise ValueError("served_model_name must not be empty")
        names = [self._adapter_name(adapter) for adapter in self.lora]
        for name in names:
            if names.count(name) > 1 or name in self.served_model_name:
                other = "another adapter" if names.count(name) > 1 else "the model"
                raise ValueError(f"lora names an adapter {name!r}, which is also the name of {other}")

    @staticmethod
    def _adapter_name(adapter: str) -> str:
        name, _, folder = adapter.partition("=")
        if not name or not folder:
            raise ValueError(f"lora takes NAME=FOLDER, not {adapter!r}")
        return name

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """In the order in which they are given."""
        return tuple(map(self._adapter_name, self.lora))

    @property
    def model_name(self) -> str:
        """The name that answers show; of a started pipeline only."""
        return self.served_model_name[0]
