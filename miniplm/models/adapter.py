"""Any causal language model of transformers behind the interface of LanguageModel."""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.errors import UserError, reason
from .base import LanguageModel
from .flops import forward_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersLM(LanguageModel):
    """Any other causal LM of transformers: packed outside, right-padded inside.

    Args:
        model: the AutoModelForCausalLM. UserError where its logits are not a multiple of hidden @
            head_weight.T.
        name: what the user calls it, for messages.
    """

    def __init__(self, model: "PreTrainedModel", name: str):
        super().__init__()
        self.wrapped, self.config, self.scale = model.eval(), model.config, 1.0
        # Past these lengths position tables end, and some rotary embeddings change with the longest text of a
        # batch.
        rope = getattr(model.config, "rope_parameters", None) or {}
        limits = [getattr(model.config, "max_position_embeddings", None)]
        if rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        self.context = min((limit for limit in limits if limit), default=math.inf)
        try:
            self._check(f"{name} ({model.config.model_type}) cannot be used")
        except UserError:
            raise
        except Exception as error:  # whatever a foreign model's code raises
            raise UserError(
                f"{name} ({model.config.model_type}) cannot be used: it does not compute plain text "
                f"({reason(error)})"
            ) from error

    @property
    def head_weight(self) -> Tensor:
        return self.wrapped.get_output_embeddings().weight

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        bounds = cu_seqlens.tolist()
        documents = sorted(itertools.pairwise(bounds), key=lambda bound: bound[0] - bound[1])  # longest first
        documents = [(start, end) for start, end in documents if end > start]
        longest = documents[0][1] - documents[0][0] if documents else 0
        if longest > self.context:
            raise UserError(
                f"a document of {longest} tokens does not fit into the model's context of {self.context} "
                f"({self.config.model_type}): prepare the corpus with a smaller max_length"
            )
        hidden, places = [], []
        while documents:
            longest = documents[0][1] - documents[0][0]
            # Down to three quarters of the longest: padding is at most a quarter of a batch.
            group = [bound for bound in documents if 4 * (bound[1] - bound[0]) >= 3 * longest]
            documents = documents[len(group) :]
            starts, ends = torch.tensor(group, device=input_ids.device).T[..., None]
            # [documents of the group, longest]
            index = starts + torch.arange(longest, device=input_ids.device)
            # The padding repeats the last token; no token sees it, see _check.
            ids = input_ids[torch.minimum(index, ends - 1)]
            output = self.wrapped.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.append(output[index < ends])
            places.append(index[index < ends])
        if not hidden:
            return self.head_weight.new_zeros(0, self.head_weight.shape[1])
        packed = torch.cat(hidden)[torch.argsort(torch.cat(places))]
        return packed if self.scale == 1 else packed * self.scale

    @torch.no_grad()
    def _check(self, refusal: str) -> None:
        """Find the factor between hidden @ head_weight.T and the model's own logits; refuse a model that has
        none."""
        head = self.wrapped.get_output_embeddings()
        no_product = f"{refusal}: its logits are not hidden × head"
        if not isinstance(getattr(head, "weight", None), Tensor):
            raise UserError(f"{no_product} (it has no head)")
        if getattr(head, "bias", None) is not None:
            raise UserError(f"{no_product} (the head has a bias)")
        # Invisible in the small logits of an untrained model.
        if getattr(self.config, "final_logit_softcapping", None):
            raise UserError(f"{no_product} (they are soft-capped)")
        ids = 1 + torch.arange(9, device=head.weight.device) * ((len(head.weight) - 1) // 9)
        lengths = [9, 5, 0, 1]  # all begin alike
        bounds = torch.tensor([0, *lengths], device=ids.device).cumsum(0, dtype=torch.int32)
        hidden = self(torch.cat([ids[:length] for length in lengths]), bounds)
        logits = self.wrapped(input_ids=ids[None], use_cache=False).logits[0].float()
        product = (hidden[:9] @ head.weight.T).float()
        factor = float((product * logits).sum() / (product * product).sum())
        precise = head.weight.dtype == torch.float32
        tolerance = 1e-4 if precise else 5e-2
        if not _close(factor * product, logits, tolerance):
            raise UserError(f"{no_product} (they differ by more than a factor)")
        if not (_close(hidden[9:14], hidden[:5], tolerance) and _close(hidden[14:], hidden[:1], tolerance)):
            raise UserError(f"{refusal}: its hidden states depend on later tokens or on padding")
        # In half precision the logits' rounding averages out in the factor.
        if abs(factor - 1) > (1e-4 if precise else 1e-2):
            self.scale = factor

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs per token, estimated: 2 per parameter, embeddings only where they are the head, and
        causal attention if any."""
        return estimated_flops(self.wrapped, context)

    def save_pretrained(
        self, folder: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        own = weights and {name.removeprefix("wrapped."): tensor for name, tensor in weights.items()}
        with quiet_transformers():
            self.wrapped.save_pretrained(folder, state_dict=own)


def estimated_flops(model: Any, context: int) -> int:
    """TransformersLM.flops_per_token of a PreTrainedModel, which may be on the meta device."""
    embedding = model.get_input_embeddings().weight
    looked_up = 0 if embedding is model.get_output_embeddings().weight else embedding.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - looked_up
    text = model.config.get_text_config()
    if not hasattr(text, "num_attention_heads"):
        return forward_flops(weights, context)
    return forward_flops(weights, context, text.num_hidden_layers, text.hidden_size)


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and reports: what they would say comes in the one line of an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
