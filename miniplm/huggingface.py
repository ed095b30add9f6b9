"""MiniPLM's ops inside transformers models: the public face of models/patching.py.

    patch(model)
    RMSNorm, SwiGLU, rotary embedding, attention and the loss of a Qwen2, Llama or Qwen3 model run on the ops
    unpatch(model)   and as before again

Importing this module also makes attn_implementation="miniplm" known to transformers.
"""

from .models.patching import patch, unpatch

__all__ = ["patch", "unpatch"]
