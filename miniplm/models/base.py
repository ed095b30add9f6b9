"""LanguageModel: what every stage works with."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class LanguageModel(nn.Module):
    """A causal language model on packed tokens: what every stage works with.

    Calling it: input_ids [T] int64, cu_seqlens [B+1] int32 (document b is tokens
    cu_seqlens[b]:cu_seqlens[b+1], empty ones allowed) and optionally max_seqlen, the length of the longest
    document or more. It returns the hidden states [T, d] after the final norm. Each document starts at
    position 0 and attends to itself only.
    """

    config: Any
    """transformers' config."""

    @property
    def head_weight(self) -> Tensor:
        """[V, d]: hidden @ head_weight.T are the logits."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        raise NotImplementedError

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs per token in documents of `context` tokens."""
        raise NotImplementedError

    def save_pretrained(
        self, folder: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write config.json, generation_config.json and the weights for transformers.

        Args:
            weights: instead of the model's own: whole, under the names of its state dict.
        """
        raise NotImplementedError

    def num_parameters(self) -> int:
        """How many parameters there are; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
