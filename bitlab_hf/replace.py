"""`quantized_layers` and `replace_linear` under the path that they had before there were rooms."""

from bitlab_hf.api import quantized_layers, replace_linear

__all__ = ["quantized_layers", "replace_linear"]
