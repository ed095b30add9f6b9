"""What a model is asked for in walk.py, each case as one tensor."""

from typing import Any

import torch
from tiny_configs import VOCABULARY
from torch import Tensor, nn

TOKENS = 12


def token_ids(rows: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0))


def padding_mask(left: bool) -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, : TOKENS // 3] = 0
    return mask if left else mask.flip(1)


def rows(model: nn.Module) -> Tensor:
    return model(input_ids=token_ids(2), use_cache=False).logits


def padded_right(model: nn.Module) -> Tensor:
    mask = padding_mask(left=False)
    return model(input_ids=token_ids(2), attention_mask=mask, use_cache=False).logits[mask.bool()]


def padded_left(model: nn.Module) -> Tensor:
    mask = padding_mask(left=True)
    return model(input_ids=token_ids(2), attention_mask=mask, use_cache=False).logits[mask.bool()]


def packed(model: nn.Module) -> Tensor:
    positions = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)])[None]
    return model(input_ids=token_ids(1), position_ids=positions, use_cache=False).logits


def cached(model: nn.Module) -> Tensor:
    """A prompt, one more token, and then several at once."""
    past, found = None, []
    for part in token_ids(2).split([6, 1, 5], 1):
        output = model(input_ids=part, past_key_values=past, use_cache=True)
        past = output.past_key_values
        found.append(output.logits[:, -1])
    return torch.stack(found)


def packed_and_padded(model: nn.Module) -> Tensor:
    mask = padding_mask(left=False)
    positions = (torch.arange(TOKENS) % 5).expand(2, -1)
    inputs = {"input_ids": token_ids(2), "position_ids": positions, "attention_mask": mask}
    return model(**inputs, use_cache=False).logits[mask.bool()]


def own_mask(model: nn.Module) -> Tensor:
    """Of four dimensions, and not causal within documents."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & ~torch.eye(TOKENS, dtype=torch.bool).roll(3)
    return model(input_ids=token_ids(2), attention_mask=mask.expand(2, 1, -1, -1), use_cache=False).logits


def cached_and_padded(model: nn.Module) -> Tensor:
    """The same under a padding mask on the left, that grows."""
    mask, past, found, seen = padding_mask(left=True), None, [], 0
    for part in token_ids(2).split([6, 1, 5], 1):
        seen += part.shape[1]
        inputs = {"input_ids": part, "attention_mask": mask[:, :seen], "past_key_values": past}
        output = model(**inputs, use_cache=True)
        past = output.past_key_values
        found.append(output.logits[:, -1])
    return torch.stack(found)


def generate_static(model: nn.Module) -> Tensor:
    return generate(model, cache_implementation="static")


def beams(model: nn.Module) -> Tensor:
    return generate(model, num_beams=3)


def generate(model: nn.Module, **options: Any) -> Tensor:
    output = model.generate(
        input_ids=token_ids(2),
        attention_mask=padding_mask(left=True),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits)


def training(model: nn.Module) -> Tensor:
    """All gradients."""
    ids, mask = token_ids(2), padding_mask(left=False)
    labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    model.train()
    try:
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    finally:
        model.eval()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


CASES = [rows, padded_right, padded_left, packed, packed_and_padded, own_mask, cached, cached_and_padded]
CASES += [generate, generate_static, beams, training]
