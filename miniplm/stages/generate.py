"""Prompt → text, through transformers' own model and `generate`: what users of the exported model will
run."""

import sys

import torch

from ..config import GenerateConfig
from ..data.tokenizer import load_tokenizer
from ..models.loading import load_with_transformers, weight_files
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.errors import UserError
from ..training.checkpoints import latest_checkpoint


def generate(config: GenerateConfig) -> str:
    """Print the prompt and, as it comes, its continuation to stdout; return the continuation, without special
    tokens.

    It ends at an end-of-text token, after max_new_tokens, or where the model's context is full. An empty
    prompt starts a new document: from the BOS token, or from EOS, which stands before every document of a
    corpus. Of the model's own generation settings only the end-of-text tokens count. Equal settings give
    equal text on one machine and version.

    Raises:
        UserError: the model cannot be loaded, the prompt does not fit, or the model's output is not finite.
    """
    from transformers import GenerationConfig, TextStreamer

    device, folder = choose_device(config.device), latest_checkpoint(config.model)
    weight_files(folder)  # a model that is not there is told as one, not as a missing tokenizer
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    ids = tokenizer(config.prompt)["input_ids"] or [
        tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ]
    if ids == [None]:
        raise UserError(
            f"the tokenizer of {config.model} has neither BOS nor EOS to start from: give a --prompt that "
            f"is not empty"
        )
    model = load_with_transformers(folder, choose_dtype(config.dtype, device), config.trust_remote_code).to(
        device
    )
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"the tokenizer of {config.model} has more ids than the model "
            f"({model.get_input_embeddings().num_embeddings}): "
            "put the model's own tokenizer into its folder"
        )
    room = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize) - len(
        ids
    )
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens, {config.model} reads at most {len(ids) + room} with its "
            f"continuation: shorten the prompt"
        )
    if room < config.max_new_tokens:
        print(f"the model's context leaves room for {room} new tokens", file=sys.stderr)

    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    # The model's own settings would fill every gap in ours (repetition penalty, top_k, …).
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=None)
    )
    sampling = (
        {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
    )
    torch.manual_seed(config.seed)
    inputs = torch.tensor([ids], device=device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(config.max_new_tokens, room),
        do_sample=config.temperature > 0,
        logits_processor=[_refuse_non_finite],
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def _refuse_non_finite(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor: −inf stands for a token that is ruled out, nan and +inf for a broken model."""
    if (scores.isnan() | scores.isposinf()).any():
        raise UserError(
            "the model's output is not finite: its training went wrong, or --dtype float16 is too narrow "
            "for it"
        )
    return scores
