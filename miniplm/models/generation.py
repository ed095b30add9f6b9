"""Continuing chunks of token ids with a teacher: by transformers' `generate`, or by vLLM.

Every chunk has a seed of its own, so what is drawn for it does not depend on the chunks beside it. What it is
drawn from does, by rounding: matrix products of another batch size may add up in another order. Whoever wants
the same bytes keeps the batches the same.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import UserError
from .loading import load_with_transformers

# Below it the likeliest token is taken, which would be drawn anyway; logits divided by less can be infinite.
MIN_TEMPERATURE = 1e-6


class Sampling(NamedTuple):
    """How tokens are drawn: at a temperature, from the likeliest that hold top_p of the probability, among
    the first num_ids."""

    temperature: float
    top_p: float
    seed: int
    num_ids: int

    def seed_of(self, chunk: int) -> int:
        """The seed of a chunk, by its number in the corpus: below 2^63."""
        return int(np.random.SeedSequence([self.seed, chunk]).generate_state(1, np.uint64)[0] >> 1)


def refuse_non_finite(ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor: −inf stands for a token that is ruled out, nan and +inf for a broken model."""
    if (scores.isnan() | scores.isposinf()).any():
        raise UserError(
            "the model's output is not finite: its training went wrong, or --dtype float16 is too narrow "
            "for it"
        )
    return scores


class TransformersEngine:
    """A model of transformers, with its key-value cache. Arguments as of load_model.

    Equal calls give equal tokens on one machine and version.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, sampling: Sampling
    ):
        from transformers import GenerationConfig

        # Any: generate() is declared in a mixin, for a class that transformers keeps to itself.
        self.model: Any = load_with_transformers(name, dtype, device, trust_remote_code)
        self.sampling, self.device = sampling, device
        # Nothing ends a text but its length; no setting of the model's own comes in (penalties, top_k, …).
        self.model.generation_config = GenerationConfig(pad_token_id=0)

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[np.ndarray], new_tokens: Sequence[int], chunks: Sequence[int]
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt, int32 [new_tokens[i]].

        Args:
            prompts: int [prompt_tokens] each, of equal length.
            chunks: their numbers in the corpus, for the seeds.
        """
        inputs = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(self.device)
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max(new_tokens),
            logits_processor=self._processors(chunks),
            do_sample=False,  # the last processor has drawn
            use_cache=True,
        )
        rows = output[:, inputs.shape[1] :].cpu().numpy().astype(np.int32)
        return [row[:length] for row, length in zip(rows, new_tokens, strict=True)]

    def _processors(self, chunks: Sequence[int]) -> list[Any]:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        sampling = self.sampling

        def known_ids(ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, sampling.num_ids :] = -torch.inf  # the head's further rows stand for no token
            return scores

        processors: list[Any] = [refuse_non_finite, known_ids]
        if sampling.temperature < MIN_TEMPERATURE:
            return processors
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        seeds = [sampling.seed_of(chunk) for chunk in chunks]
        return [*processors, _Draw([torch.Generator(self.device).manual_seed(seed) for seed in seeds])]


class _Draw:
    """A logits processor that draws a token for each row with its own generator, and rules out all others.

    argmax(log p − log e) with e from the exponential distribution is a draw from p.
    """

    def __init__(self, generators: list[torch.Generator]):
        self.generators = generators

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        drawn = (scores.float() - noise.log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class VllmEngine:
    """A model in vLLM, by its public interface: vllm.LLM and vllm.SamplingParams.

    vLLM chooses device and batches itself, so equal calls need not give equal tokens.

    Raises:
        UserError: vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self, name: str, tokenizer: str, dtype: torch.dtype, trust_remote_code: bool, sampling: Sampling
    ):
        try:
            self.vllm = importlib.import_module("vllm")
        except ImportError:
            raise UserError(
                "engine vllm needs the package vllm, which is not installed here: pip install vllm, or leave "
                "the engine out"
            ) from None
        self.sampling = sampling
        try:
            self.llm = self.vllm.LLM(
                model=name,
                tokenizer=tokenizer,
                dtype=str(dtype).removeprefix("torch."),
                trust_remote_code=trust_remote_code,
            )
        except Exception as error:  # vLLM raises anything
            raise UserError(
                f"vLLM cannot load {name} ({type(error).__name__}; --debug shows more): leave the engine out"
            ) from error

    def complete(
        self, prompts: Sequence[np.ndarray], new_tokens: Sequence[int], chunks: Sequence[int]
    ) -> list[np.ndarray]:
        """As TransformersEngine.complete; the prompts may have any lengths."""
        sampling = self.sampling
        greedy = sampling.temperature < MIN_TEMPERATURE
        parameters = [
            self.vllm.SamplingParams(
                temperature=0.0 if greedy else sampling.temperature,
                top_p=1.0 if greedy else sampling.top_p,
                seed=sampling.seed_of(chunk),
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                allowed_token_ids=list(range(sampling.num_ids)),
            )
            for length, chunk in zip(new_tokens, chunks, strict=True)
        ]
        requests = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        found = [np.array(output.outputs[0].token_ids, np.int32) for output in outputs]
        for ids, length in zip(found, new_tokens, strict=True):
            if len(ids) != length:
                raise UserError(
                    f"vLLM ended a text after {len(ids)} of {length} tokens: its context may be too short "
                    f"for the corpus"
                )
        return found
