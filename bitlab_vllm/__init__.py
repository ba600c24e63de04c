"""Serves BitLab's deployed checkpoints with vLLM, as a plugin that vLLM finds by itself.

It needs bitcore and vLLM only: neither transformers in a version of BitLab's, nor `bitlab_hf`.
"""

from __future__ import annotations


def register() -> None:
    """Tells vLLM of ``quant_method: bitlab``; each of its processes calls this, some repeatedly."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    import bitcore  # noqa: F401  (registers the ops)
    from bitlab_vllm.scheme import METHOD

    if METHOD not in QUANTIZATION_METHODS:
        from bitlab_vllm.config import BitLabVllmConfig

        register_quantization_config(METHOD)(BitLabVllmConfig)
