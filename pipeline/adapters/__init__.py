"""LoRA adapters as PEFT saves them: what a folder holds, and whether it fits a checkpoint. No torch."""

from pipeline.adapters.files import Adapter, read_adapter
from pipeline.adapters.served import named_folders, read_adapters

__all__ = ["Adapter", "named_folders", "read_adapter", "read_adapters"]
