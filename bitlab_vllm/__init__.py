"""Serves BitLab's deployed checkpoints with vLLM, as a plugin that vLLM finds by itself.

It needs bitcore and vLLM only: neither transformers in a version of BitLab's, nor `bitlab_hf`.
"""

from __future__ import annotations

import logging

# Whose interfaces the plugin is written to; its tests run this one.
VLLM_VERSION = "0.32.0"


def register() -> None:
    """Tells vLLM of ``quant_method: bitlab``; each of its processes calls this, some repeatedly."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    import bitcore  # noqa: F401  (registers the ops)
    from bitlab_vllm.scheme import METHOD

    if METHOD in QUANTIZATION_METHODS:
        return
    try:
        from bitlab_vllm.config import BitLabVllmConfig
    except ImportError:
        # An error here would end vLLM for every model.
        logging.getLogger("bitlab").exception(
            "bitlab: vLLM must have the interfaces of version %s to serve BitLab's checkpoints",
            VLLM_VERSION,
        )
        return
    register_quantization_config(METHOD)(BitLabVllmConfig)
