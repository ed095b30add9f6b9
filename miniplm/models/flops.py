"""FLOPs of a model's matrix products and attention."""

from typing import NamedTuple

from .base import LanguageModel


class ForwardFlops(NamedTuple):
    """What a model's forward pass costs: per_token for each token, and per_square · n² for each document of n
    tokens. Of per_token, `head` is that of the head."""

    per_token: int
    per_square: int
    head: int = 0

    def of(self, tokens: int, squares: int) -> int:
        """FLOPs of documents with so many tokens, whose squared lengths add up to `squares`."""
        return self.per_token * tokens + self.per_square * squares


def forward_flops(weights: int, context: int, num_layers: int = 0, attention_width: int = 0) -> int:
    """FLOPs per token of a forward pass over documents of `context` tokens.

    2 · weights + num_layers · 4 · attention_width · (context + 1) / 2: each weight of a matrix is multiplied
    and added once; a query meets (context + 1) / 2 keys on average, and q·k and p·v take 2 · attention_width
    each. Norms, rotary embeddings and the like do not count.

    Args:
        weights: of all matrices that a token is multiplied with; an embedding counts only as the head.
        attention_width: query heads · width of a head.
    """
    return 2 * weights + 2 * num_layers * attention_width * (context + 1)


def forward_cost(model: LanguageModel) -> ForwardFlops:
    """What the model's forward pass costs on documents of any length: flops_per_token is a straight line."""
    per_token = model.flops_per_token(0)
    return ForwardFlops(per_token, model.flops_per_token(1) - per_token, 2 * model.head_weight.numel())


def training_flops(model: LanguageModel, context: int, teacher: LanguageModel | None = None) -> int:
    """FLOPs per token of a training step on documents of `context` tokens: forward, backward (twice as many),
    and the teacher's forward."""
    flops = 3 * model.flops_per_token(context)
    if teacher is not None:
        flops += teacher.flops_per_token(context)
    return flops
