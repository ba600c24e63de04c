"""BitLab's layers: ternary layers, their registry and their life from training to deployment."""

from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.embedding import TernaryEmbedding
from bitlayers.int8 import Int8Embedding, Int8Linear
from bitlayers.registry import LAYER_REGISTRY, register_layer
from bitlayers.rmsnorm import RMSNormBitLinear
from bitlayers.training import set_quant_strength
from bitlayers.utils import compare_layers, estimate_memory_usage

__all__ = [
    "LAYER_REGISTRY",
    "BitLayerBase",
    "BitLinear",
    "Int8Embedding",
    "Int8Linear",
    "RMSNormBitLinear",
    "TernaryEmbedding",
    "compare_layers",
    "estimate_memory_usage",
    "register_layer",
    "set_quant_strength",
]
