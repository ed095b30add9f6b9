"""Fitting the transformer that predicts scores (models/regression.py): squared error on standardised scores,
AdamW, a warm-up and a cosine, a number of epochs over the sample."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import OptimizerConfig
from ..data.batches import IGNORE_INDEX, Batch, pack, split_by_tokens
from ..models.regression import ScoreRegressor, body_cost
from ..runtime.errors import UserError
from .step import learning_rate

WARMUP_SHARE = 0.05  # of the steps
WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.01, (0.9, 0.98), 1.0


class TransformerProxy(NamedTuple):
    """A fitted model. mean, scale: of the scores; batch_tokens: of a forward pass."""

    model: ScoreRegressor
    mean: float
    scale: float
    eos_token_id: int
    document_mask: bool
    dtype: torch.dtype
    batch_tokens: int

    @torch.inference_mode()
    def predict(self, chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(the numbers of scored positions int64 [R], the predicted scores float64 [R], NaN where there are
        none) of chunks, int [n] each."""
        counts, scores = [], []
        for part in split_by_tokens([len(chunk) for chunk in chunks], self.batch_tokens):
            found, count = self.forward(pack(chunks[part], self.eos_token_id, self.document_mask))
            scores.append(self.mean + self.scale * found.double().cpu().numpy())
            counts.append(count.long().cpu().numpy())
        return np.concatenate(counts), np.concatenate(scores)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(standardised predictions, how many positions are scored) of the R rows of a batch."""
        batch = batch.to(self.model.weight.device)
        with torch.autocast(batch.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            try:
                return self.model(
                    batch.input_ids,
                    batch.cu_seqlens,
                    batch.max_seqlen,
                    batch.targets != IGNORE_INDEX,
                    batch.row_cu_seqlens,
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of GPU memory: lower batch_tokens (now {self.batch_tokens:,}) for a new output "
                    f"folder"
                ) from error

    def flops(self, positions: int, squares: int) -> int:
        """Of the predictions for chunks with so many positions and squared lengths in all."""
        return body_cost(self.model.body).of(positions, squares)


def steps_of(num_tokens: np.ndarray, batch_tokens: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Which of the chunks with these lengths (int [R]) make up each step: a new order in every epoch."""
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(num_tokens))
        steps += [order[part] for part in split_by_tokens(num_tokens[order], batch_tokens)]
    return steps


class Regression:
    """A fit on its way. steps: which chunks of the sample (int [n]) make up each; done: how many are."""

    def __init__(self, proxy: TransformerProxy, lr: float, steps: list[np.ndarray]):
        self.proxy, self.steps, self.done = proxy, steps, 0
        warmup = max(1, round(WARMUP_SHARE * len(steps)))
        self.schedule = OptimizerConfig(lr=lr, warmup_steps=warmup)
        self.optimizer = torch.optim.AdamW(
            proxy.model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )

    def train(self, chunks: Sequence[np.ndarray], scores: np.ndarray) -> float:
        """One step on chunks (int [n] each) with their scores (float64 [R]); the loss before it."""
        proxy, self.done = self.proxy, self.done + 1
        found, _ = proxy.forward(pack(chunks, proxy.eos_token_id, proxy.document_mask))
        wanted = torch.from_numpy((scores - proxy.mean) / proxy.scale).to(found)
        loss = (found - wanted).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(proxy.model.parameters(), MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, len(self.steps), self.schedule)
        self.optimizer.step()
        return loss.item()

    def tensors(self) -> dict[str, np.ndarray]:
        """The state for a file, exactly."""
        found = {f"model.{name}": value for name, value in self.proxy.model.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        return {name: value.cpu().numpy() for name, value in found.items()} | {"done": np.array(self.done)}

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Go on from the tensors of a file."""
        model: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, values in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                model[rest] = torch.from_numpy(values)
            elif kind == "optimizer":
                number, _, what = rest.partition(".")
                moments.setdefault(int(number), {})[what] = torch.from_numpy(values)
        self.proxy.model.load_state_dict(model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.done = int(tensors["done"])
