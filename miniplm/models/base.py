"""LanguageModel: what every stage works with."""

from torch import nn


class LanguageModel(nn.Module):
    """A causal language model on packed tokens: what every stage works with.

    Calling it: input_ids [T] int64, cu_seqlens [B+1] int32 (document b is tokens
    cu_seqlens[b]:cu_seqlens[b+1], empty ones allowed) and optionally max_seqlen, the length of the longest
    document or more. It returns the hidden states [T, d] after the final norm. Each document starts at
    position 0 and attends to itself only.
    `head_weight` [V, d]: hidden @ head_weight.T are the logits. `config`: transformers' config.
    """

    def num_parameters(self) -> int:
        """How many parameters there are; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
