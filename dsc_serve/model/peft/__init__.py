"""Adapters in the form of PEFT: a folder of `adapter_config.json` and `adapter_model.safetensors`."""

from dsc_serve.model.peft.reader import read_adapter as read_adapter
from dsc_serve.model.peft.writer import write_adapter as write_adapter
