"""What ``from bitlab_hf import ...`` gives.

Importing it makes transformers, PEFT and TRL know BitLab.
"""

from bitlab_hf.checkpoint.card import record_facts
from bitlab_hf.checkpoint.facts import Facts
from bitlab_hf.checkpoint.saving import save
from bitlab_hf.config import BitLabConfig
from bitlab_hf.interop.bitnet import export_bitnet, load_bitnet
from bitlab_hf.interop.compressed import export_compressed_tensors
from bitlab_hf.interop.compressed_import import (
    import_compressed_tensors,
    load_compressed_tensors,
)
from bitlab_hf.interop.gguf import export_gguf
from bitlab_hf.interop.gguf_import import import_gguf, load_gguf
from bitlab_hf.interop.hub import HubError, push
from bitlab_hf.interop.ternary import convert_ternary
from bitlab_hf.model.decoding import compile_decoding
from bitlab_hf.model.deploy import deploy
from bitlab_hf.model.groups import pretrained_config
from bitlab_hf.model.replace import replace_linear
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.model.verifying import verify_exactly
from bitlab_hf.peft.guard import install as _guard_peft
from bitlab_hf.peft.merge import MergeResult, merge_and_requantize
from bitlab_hf.peft.trl import install as _guard_trl
from bitlab_hf.quantizer import BitLabHfQuantizer, register

register()
_guard_peft()
_guard_trl()

__all__ = [
    "BitLabConfig",
    "BitLabHfQuantizer",
    "Facts",
    "HubError",
    "MergeResult",
    "compile_decoding",
    "convert_ternary",
    "deploy",
    "export_bitnet",
    "export_compressed_tensors",
    "export_gguf",
    "import_compressed_tensors",
    "import_gguf",
    "load_bitnet",
    "load_compressed_tensors",
    "load_gguf",
    "merge_and_requantize",
    "pretrained_config",
    "push",
    "quantized_layers",
    "record_facts",
    "replace_linear",
    "save",
    "verify_exactly",
]
