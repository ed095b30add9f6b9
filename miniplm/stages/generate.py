"""Prompt → text, through transformers' own model and `generate`: what users of the exported model will
run."""

import sys
from typing import Any

import torch

from ..config import GenerateConfig
from ..data.tokenizer import encode, load_tokenizer
from ..models.generation import MIN_TEMPERATURE, refuse_non_finite
from ..models.loading import load_with_transformers, weight_files
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.errors import UserError
from ..runtime.progress import note
from ..runtime.text import IN_PROSE, printable
from ..training.checkpoints import latest_checkpoint


def generate(config: GenerateConfig) -> str:
    """Print the prompt and, as it comes, its continuation to stdout; return the continuation, without special
    tokens. What a terminal would obey (escape sequences) is written out in what is printed.

    It ends at an end-of-text token, after max_new_tokens, or where the model's context is full. An empty
    prompt starts a new document: from the BOS token, or from EOS, which stands before every document of a
    corpus. Of the model's own generation settings only the end-of-text tokens count. Equal settings give
    equal text on one machine and version.

    Raises:
        UserError: the model cannot be loaded, the prompt does not fit, or the model's output is not finite.
    """
    from transformers import GenerationConfig

    device, folder = choose_device(config.device), latest_checkpoint(config.model)
    weight_files(folder)  # a model that is not there is told as one, not as a missing tokenizer
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    ids = _prompt_ids(config, tokenizer)
    dtype = choose_dtype(config.dtype, device)
    # Any: generate() is declared in a mixin, for a class that transformers keeps to itself.
    model: Any = load_with_transformers(folder, dtype, device, config.trust_remote_code)
    new_tokens = min(config.max_new_tokens, _room(config, model, ids))

    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    # The model's own settings would fill every gap in ours (repetition penalty, top_k, …).
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=None)
    )
    sampling: dict[str, Any] = {"do_sample": config.temperature >= MIN_TEMPERATURE}
    if sampling["do_sample"]:
        sampling |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    torch.manual_seed(config.seed)
    inputs = torch.tensor([ids], device=device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        logits_processor=[refuse_non_finite],
        streamer=_streamer(tokenizer),
        **sampling,
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def _prompt_ids(config: GenerateConfig, tokenizer: Any) -> list[int]:
    """The tokens to continue, at least one."""
    ids = encode(tokenizer, config.prompt, config.model)
    if ids:
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise UserError(
            f"the tokenizer of {config.model} has neither BOS nor EOS to start from: give a --prompt that is "
            f"not empty"
        )
    return [start]


def _room(config: GenerateConfig, model: Any, ids: list[int]) -> int:
    """How many tokens the model can add to these; UserError if none, or if it does not know them."""
    known = model.get_input_embeddings().num_embeddings
    if max(ids) >= known:
        raise UserError(
            f"the tokenizer of {config.model} has more ids than the model ({known}): put the model's own "
            f"tokenizer into its folder"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    room = context - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens, {config.model} reads at most {context} with its "
            f"continuation: shorten the prompt"
        )
    if room < config.max_new_tokens:
        note(f"the model's context leaves room for {room} new tokens")
    return room


def _streamer(tokenizer: Any) -> Any:
    """Prints tokens as they come."""
    from transformers import TextStreamer

    class PrintableStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text, keep=IN_PROSE), stream_end)

    return PrintableStreamer(tokenizer, skip_special_tokens=True)
