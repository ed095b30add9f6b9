"""MiniPLM's ops inside transformers models: the public module for users of transformers.

    patch(model)     RMSNorm, SwiGLU, rotary embedding, attention and the loss of a Qwen2, Llama or Qwen3
                     model run on the ops
    unpatch(model)   and as before again

Importing this module also makes attn_implementation="miniplm" and "miniplm_or_sdpa" known to transformers:
attention within documents on MiniPLM's kernel for any model that leaves its attention to transformers. The
first refuses by name what it does not do; the second leaves that to "sdpa".
"""

from .models.patching import patch, unpatch

__all__ = ["patch", "unpatch"]
