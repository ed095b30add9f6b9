"""A language model without its head that predicts one number of each chunk: the paper's way of scoring with a
proxy, the reference model fine-tuned (Gu et al., arXiv 2410.17215)."""

import torch
from torch import Tensor, nn

from .base import LanguageModel
from .flops import ForwardFlops, forward_cost


class ScoreRegressor(nn.Module):
    """body, and a vector in place of its head: a chunk's number is the mean over its scored positions of the
    product with the hidden state, plus a bias. Both start at 0."""

    def __init__(self, body: LanguageModel):
        super().__init__()
        self.body = body
        head = body.head_weight
        self.weight = nn.Parameter(torch.zeros(head.shape[1], device=head.device))
        self.bias = nn.Parameter(torch.zeros((), device=head.device))

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scored: Tensor,
        row_cu_seqlens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(the numbers of the R rows, how many of their positions are scored), float32 [R] both; NaN of rows
        without any.

        Args:
            input_ids [T], cu_seqlens, max_seqlen: as a LanguageModel has them.
            scored: bool [T]; row_cu_seqlens: int32 [R + 1], the bounds of the rows.
        """
        hidden = self.body(input_ids, cu_seqlens, max_seqlen)
        values = torch.stack([(hidden.float() @ self.weight) * scored, scored.float()], 1)
        total, count = torch.segment_reduce(values, "sum", offsets=row_cu_seqlens.long(), initial=0).unbind(1)
        return total / count + self.bias, count


def body_cost(body: LanguageModel) -> ForwardFlops:
    """What a forward pass costs without the head."""
    cost = forward_cost(body)
    return cost._replace(per_token=cost.per_token - cost.head, head=0)
