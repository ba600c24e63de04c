"""What processes of `tests.processes` have imported; nothing here computes, for threads of a
computation would not be there after a fork.
"""

from __future__ import annotations

import gc

import transformers.models.bert.modeling_bert
import transformers.models.gemma3.modeling_gemma3
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import bitlab_hf.cli.app
import bitlab_hf.demo.run
import bitlab_hf.train  # noqa: F401
import tests.bitlab_hf.sweep.life  # noqa: F401

# Garbage collected in a fork is what the fork made: not looked for in a million objects of modules.
gc.collect()
gc.freeze()
