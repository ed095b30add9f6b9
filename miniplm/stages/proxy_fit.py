"""proxy fit: corpus + the scores of a sample → a model that predicts scores.

Scoring with a large teacher can cost more than training a small student. So only a sample is scored, and a
cheap model learns the difference score r(x) from it, to rank the rest (the proxy of arXiv 2410.17215). How
well it does is measured on scored chunks that it does not learn from.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..analysis.agreement import held_out_agreement, print_agreement
from ..config import ProxyFitConfig
from ..data.batches import split_by_tokens
from ..data.corpus import Corpus
from ..data.sampling import sampled_chunks
from ..data.score_folders import read_score_manifest
from ..data.scores import ROLES, read_scores
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..models.loading import load_model, model_hash
from ..models.ngram import Grams, NgramProxy, grams
from ..models.regression import ScoreRegressor
from ..runtime.artifacts import (
    MANIFEST,
    complete_output,
    damaged_file,
    exclusive,
    open_output,
    recorded,
    reopen_output,
)
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.errors import UserError
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..runtime.wall_time import timed
from ..training import ridge
from ..training.checkpoints import latest_checkpoint
from ..training.proxies import (
    Proxy,
    forget_state,
    prediction_flops,
    read_state,
    save_state,
    write_proxy,
)
from ..training.regression import Regression, TransformerProxy, steps_of

BATCH_TOKENS = 2**18
MIN_CHUNKS = 10  # to learn from
SAVE_SECONDS = 60.0  # of work that a kill may lose


@dataclass(frozen=True)
class _Plan:
    """What is learnt from, and the identity of the output.

    manifest: of the scores; device: of a transformer.
    """

    config: ProxyFitConfig
    corpus: Corpus
    manifest: dict[str, Any]
    identity: dict[str, Any]
    device: torch.device

    @property
    def output(self) -> Path:
        return Path(self.config.output)


class _Scored(NamedTuple):
    """Chunks int64 [R] and their scores float64 [R], nats per token."""

    chunks: np.ndarray
    scores: np.ndarray


def proxy_fit(config: ProxyFitConfig) -> None:
    """Fit a proxy to scores, and print how well it agrees with those that were held out.

    The same command continues a killed fit and ends in the same bytes.

    Raises:
        UserError: scores of another corpus, of one model only, incomplete, damaged or too few; an output
            folder of another run.
    """
    plan = _plan(config)
    if (plan.output / MANIFEST).exists() and open_output(plan.output, "proxy fit", plan.identity):
        lost = damaged_file(plan.output, recorded(plan.output)["files"])
        if not lost:
            print(printable(f"The proxy in {plan.output} is complete, nothing to do."))
            return
        note(f"the proxy in {plan.output} was complete, but {lost}: it is fitted anew")
    sample, held_out = _read(plan)
    regression = _regression(plan, sample) if config.kind == "transformer" else None
    open_output(
        plan.output, "proxy fit", plan.identity
    )  # claimed only now: bad input leaves no folder behind
    with exclusive(plan.output), timed(plan.output):
        reopen_output(plan.output)
        proxy: Proxy
        if regression is None:
            proxy, flops = _fit_ngrams(plan, sample)
        else:
            proxy, flops = _fit_transformer(plan, sample, regression)
        files = write_proxy(plan.output, proxy)
        _finish(plan, proxy, flops, files, sample, held_out)


def _plan(config: ProxyFitConfig) -> _Plan:
    """Read and check what the fit is made of, but for the scores themselves."""
    corpus = Corpus(config.data)
    manifest = read_score_manifest(config.scores, corpus)
    scored = manifest["identity"]
    if scored.get("proxy") is not None:
        raise UserError(
            f"score folder {config.scores} holds what a proxy predicted: give the scores of the models"
        )
    if missing := [role for role in ROLES if scored[role] is None]:
        raise UserError(
            f"score folder {config.scores} has no scores of a {missing[0]}: score with both models"
        )
    device = choose_device(config.device)
    names = ("held_out", "ratio", "seed", "kind")
    settings = {name: getattr(config, name) for name in names}
    if config.transformer.init_from is None:
        settings["ngram"] = asdict(config.ngram)
    else:
        folder = latest_checkpoint(config.transformer.init_from)
        check_same_tokens(
            load_tokenizer(corpus.tokenizer), load_tokenizer(folder), config.transformer.init_from
        )
        settings["transformer"] = asdict(config.transformer) | {"init_from": model_hash(folder)}
        settings["dtype"] = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
        settings["device"] = device.type
    identity = {"corpus": corpus.fingerprint, "scores": scored, **settings}
    return _Plan(config, corpus, manifest, identity, device)


def _read(plan: _Plan) -> tuple[_Scored, _Scored]:
    """What is learnt from, and what is held out, of the chunks with a finite score."""
    config, corpus, scored = plan.config, plan.corpus, plan.manifest["identity"]
    sample = None
    if scored.get("sample") is not None:
        sample = sampled_chunks(corpus, scored["sample"], scored["seed"])
    scores = read_scores(config.scores, len(corpus), ["score"], plan.manifest.get("files"), sample)["score"]
    chunks = np.flatnonzero(np.isfinite(scores) & (corpus.num_tokens > 1))
    order = np.random.default_rng(config.seed).permutation(chunks)
    count = round(config.held_out * len(chunks))
    if min(count, len(chunks) - count) < MIN_CHUNKS:
        raise UserError(
            f"score folder {config.scores} has {len(chunks):,} finite scores, {count:,} of them to be held "
            f"out; at least {MIN_CHUNKS} must be, and as many be left: score a larger sample"
        )
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    true = scores.astype(np.float64)
    return _Scored(rest, true[rest]), _Scored(held_out, true[held_out])


# ---- the n-gram model ----


def _grams(plan: _Plan, sample: _Scored) -> Iterator[tuple[Grams, np.ndarray]]:
    """The chunks' n-grams and their scores, a batch at a time."""
    corpus, settings = plan.corpus, plan.config.ngram
    for part in split_by_tokens(corpus.num_tokens[sample.chunks], BATCH_TOKENS):
        rows = corpus.rows(sample.chunks[part])
        yield grams(rows, corpus.eos_token_id, settings.orders, settings.buckets), sample.scores[part]


def _fit_ngrams(plan: _Plan, sample: _Scored) -> tuple[NgramProxy, int]:
    """(the fitted model, its FLOPs), from where a killed fit was."""
    settings, corpus = plan.config.ngram, plan.corpus
    positions = int((corpus.num_tokens[sample.chunks] - 1).sum())

    def batches() -> Iterator[tuple[Grams, np.ndarray]]:
        for found, scores in _grams(plan, sample):
            yield found, scores
            progress.update(len(found.rows))

    with Progress("proxy fit", None) as progress:
        state = ridge.load(read_state(plan.output))
        if state is None:
            state = ridge.begin(batches, settings.buckets)
        saved = time.monotonic()
        while state.passes < settings.passes and not state.done:
            state = ridge.improve(state, batches, settings.ridge)
            progress.note(f"pass {state.passes}, residual {state.error:.1e}")
            if time.monotonic() - saved >= SAVE_SECONDS:
                save_state(plan.output, ridge.tensors(state))
                saved = time.monotonic()
    flops = 4 * settings.orders * positions * (state.passes + 1)
    return NgramProxy(
        state.weights.astype(np.float32), state.mean, settings.orders, corpus.eos_token_id
    ), flops


# ---- the transformer ----


def _regression(plan: _Plan, sample: _Scored) -> Regression:
    """A fit at its beginning; UserError unless the model knows the corpus's ids."""
    config, corpus = plan.config, plan.corpus
    settings, name = config.transformer, str(config.transformer.init_from)
    body = load_model(latest_checkpoint(name), torch.float32, plan.device)
    if corpus.highest_id >= len(body.head_weight):
        raise UserError(
            f"model {name} knows {len(body.head_weight)} ids, corpus {config.data} has ids up to "
            f"{corpus.highest_id}: start from a model that was made for its tokenizer"
        )
    proxy = TransformerProxy(
        ScoreRegressor(body),
        float(sample.scores.mean()),
        float(sample.scores.std()) or 1.0,
        corpus.eos_token_id,
        plan.manifest["identity"]["document_mask"],
        choose_dtype(config.dtype, plan.device),
        settings.batch_tokens,
    )
    lengths = corpus.num_tokens[sample.chunks]
    steps = steps_of(lengths, settings.batch_tokens, settings.epochs, config.seed)
    return Regression(proxy, settings.lr, steps)


def _fit_transformer(plan: _Plan, sample: _Scored, run: Regression) -> tuple[TransformerProxy, int]:
    """(the fitted model, its FLOPs), from where a killed fit was."""
    corpus, settings = plan.corpus, plan.config.transformer
    if (state := read_state(plan.output)) is not None:
        run.load(state)
    positions = [int((corpus.num_tokens[sample.chunks[step]] - 1).sum()) for step in run.steps]
    saved = time.monotonic()
    with Progress("proxy fit", sum(positions), done=sum(positions[: run.done])) as progress:
        while run.done < len(run.steps):
            step = run.steps[run.done]
            loss = run.train(corpus.rows(sample.chunks[step]), sample.scores[step])
            progress.note(f"loss {loss:.4f}")
            progress.update(positions[run.done - 1])
            if time.monotonic() - saved >= SAVE_SECONDS:
                save_state(plan.output, run.tensors())
                saved = time.monotonic()
    # Forward, and twice as much backward.
    return run.proxy, 3 * settings.epochs * prediction_flops(run.proxy, corpus, sample.chunks)


# ---- the end ----


def _finish(
    plan: _Plan, proxy: Proxy, flops: int, files: dict[str, str], sample: _Scored, held_out: _Scored
) -> None:
    """Measure on what was held out, mark the output complete, and print what came out."""
    corpus = plan.corpus
    parts = split_by_tokens(corpus.num_tokens[held_out.chunks], BATCH_TOKENS)
    predicted = [proxy.predict(corpus.rows(held_out.chunks[part]))[1] for part in parts]
    agreement = held_out_agreement(held_out.scores, np.concatenate(predicted), plan.config.ratio)
    results = {
        "chunks": len(sample.chunks),
        "tokens": int((corpus.num_tokens[sample.chunks] - 1).sum()),
        "held_out": agreement,
        **{key: plan.manifest[key] for key in (*ROLES, "vocab_size")},
        **{key: corpus.manifest[key] for key in ("eos_token_id", "tokenizer_fingerprint")},
        "flops": {"proxy": flops + prediction_flops(proxy, corpus, held_out.chunks)},
        "files": files,
    }
    complete_output(plan.output, results)
    forget_state(plan.output)
    print_agreement(agreement)
    print(printable(f"Fitted to {len(sample.chunks):,} chunks; the proxy is in {plan.output}"))
