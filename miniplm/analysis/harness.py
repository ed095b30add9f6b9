"""A LanguageModel as lm-eval's model: packed batches, no padding, no cache.

Imported only where tasks are run: it needs the package lm-eval (pip install miniplm[eval]). Text becomes
tokens as in the harness's own model for transformers, so the same requests give the same answers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from ..data.batches import split_by_tokens
from ..data.tokenizer import tokenizer_errors
from ..models.base import LanguageModel
from ..runtime.errors import UserError
from ..runtime.progress import Progress

ROLLING_WINDOW = 1_024  # tokens that a prediction in a long text can look back on at most, as in training
MAX_LOGITS_BYTES = 64 << 20  # float32 logits in memory at a time


class PackedLM(TemplateLM):
    """Log-probabilities of continuations, for lm-eval.

    Args:
        model: in evaluation mode.
        tokenizer: transformers' PreTrainedTokenizerFast of the model.
        batch_tokens: of a packed batch.
    """

    def __init__(self, model: LanguageModel, tokenizer: Any, device: torch.device, batch_tokens: int):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens = batch_tokens
        self._device = device
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2_048

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokenizer's ids; with a BOS where the tokenizer adds one and the text has none yet."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        with tokenizer_errors(self.tokenizer.name_or_path):
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the base class has it, whose own bar only shows the tokenizer."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each token once, in windows of ROLLING_WINDOW tokens."""
        windows, lengths = [], []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=min(ROLLING_WINDOW, self.max_length),
                context_len=1,
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in rolling]
            windows += pairs
            lengths.append(len(pairs))
        scores = torch.tensor(
            [score for score, _ in self._loglikelihood_tokens(windows)], dtype=torch.float64
        )
        return [float(part.sum()) for part in scores.split(lengths)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("tasks that generate text are refused before they run")

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request (texts, context ids, continuation ids): log p of the continuation, and whether
        each of its tokens is the likeliest."""
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"an answer of {longest:,} tokens does not fit into the model's context of "
                f"{self.max_length:,}"
            )
        ids = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        # Alike lengths side by side: models that pad have little to pad.
        order = sorted(range(len(requests)), key=lambda index: -len(ids[index]))
        answers: dict[int, tuple[float, bool]] = {}
        lengths = [len(ids[index]) for index in order]
        with Progress("tasks", sum(lengths)) as progress:
            for group in split_by_tokens(lengths, self.batch_tokens):
                batch = order[group]
                answers |= zip(batch, self._answers(batch, ids, requests), strict=True)
                progress.update(sum(lengths[group]))
        return [answers[index] for index in range(len(requests))]

    def _answers(
        self, batch: list[int], ids: list[list[int]], requests: Sequence[Any]
    ) -> list[tuple[float, bool]]:
        """(log p, greedy) of the requests of one packed batch."""
        inputs = [ids[index][:-1] for index in batch]
        asked = [len(requests[index][2]) for index in batch]  # the last so many of each
        packed = torch.tensor([token for text in inputs for token in text], device=self._device)
        bounds = torch.tensor([0, *map(len, inputs)], device=self._device).cumsum(0, dtype=torch.int32)
        hidden = self.model(packed, bounds, max(map(len, inputs)))
        ends = bounds[1:].tolist()
        rows = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, asked, strict=True)])
        targets = torch.tensor(
            [token for index, count in zip(batch, asked, strict=True) for token in ids[index][-count:]]
        )
        log_prob, greedy = self._log_prob(hidden[rows.to(hidden.device)], targets.to(hidden.device))
        return [
            (float(scores.sum()), bool(likeliest.all()))
            for scores, likeliest in zip(log_prob.split(asked), greedy.split(asked), strict=True)
        ]

    def _log_prob(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(log p [T] float64, whether the target is the likeliest [T]) on the CPU, for hidden [T, d]."""
        head, parts = self.model.head_weight, []
        step = max(1, MAX_LOGITS_BYTES // (4 * len(head)))
        for some, wanted in zip(hidden.split(step), targets.split(step), strict=True):
            logits = (some @ head.T).float()
            log_prob = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
            parts.append((log_prob.double().cpu(), (logits.argmax(1) == wanted).cpu()))
        log_probs, greedy = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(greedy)
