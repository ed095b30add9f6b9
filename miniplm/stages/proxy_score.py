"""proxy score: corpus + what proxy fit has learnt → score files of the form of score's, predicted.

Of each chunk the difference score alone is predicted: the columns of the two models are null. The chunks that
the proxy has learnt from are predicted too: predictions are drawn towards the mean, so scores of two kinds
would not compare.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import BATCH_TOKENS, ProxyScoreConfig
from ..data.batches import split_by_tokens
from ..data.corpus import Corpus
from ..data.scores import ROLES, SCORE_COLUMNS, score_figures, shard_path, whole_hash, write_shard
from ..runtime.artifacts import (
    MANIFEST,
    complete_output,
    exclusive,
    open_output,
    record_output,
    recorded,
    reopen_output,
)
from ..runtime.devices import choose_device, choose_dtype
from ..runtime.errors import UserError
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..runtime.wall_time import timed
from ..training.proxies import Proxy, prediction_flops, read_manifest_of, read_proxy

READ_TOKENS = 2**18  # at a time
CARRIED = ("teacher", "reference", "dtype", "document_mask")  # of the scores' identity


@dataclass(frozen=True)
class _Plan:
    """What is predicted for, by what, and into which files.

    manifest: of the proxy; device, dtype, batch_tokens: for a transformer; shards: the chunks of each file;
    identity: of the output.
    """

    corpus: Corpus
    config: ProxyScoreConfig
    manifest: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    batch_tokens: int
    shards: list[np.ndarray]
    identity: dict[str, Any]

    @property
    def output(self) -> Path:
        return Path(self.config.output)


def proxy_score(config: ProxyScoreConfig) -> None:
    """Predict the score of every chunk of a corpus and print a summary.

    Raises:
        UserError: the corpus or the proxy is missing, incomplete or damaged; the corpus has another
            tokenizer; the output folder holds another run.
    """
    plan = _plan(config)
    complete = (plan.output / MANIFEST).exists() and open_output(plan.output, "proxy score", plan.identity)
    whole = _whole_shards(plan)
    todo = [number for number in range(len(plan.shards)) if number not in whole]
    if complete and not todo:
        print(printable(f"The scores in {plan.output} are complete, nothing to do."))
        return
    proxy = read_proxy(plan.config.proxy, plan.manifest, plan.device, plan.dtype, plan.batch_tokens)
    open_output(plan.output, "proxy score", plan.identity)
    with exclusive(plan.output), timed(plan.output):
        if complete:
            note(f"score file {shard_path(plan.output, todo[0])} is missing or damaged: predicted anew")
        reopen_output(plan.output, {"files": _files(plan, whole)})
        _write_shards(plan, proxy, todo, whole)
        _finish(plan, proxy)


def _plan(config: ProxyScoreConfig) -> _Plan:
    corpus = Corpus(config.data)
    manifest = read_manifest_of(config.proxy)
    for key in ("tokenizer_fingerprint", "eos_token_id"):
        if manifest[key] != corpus.manifest[key]:
            raise UserError(
                f"proxy {config.proxy} was fitted to ids of another tokenizer than that of corpus "
                f"{config.data}: fit one to a sample of this corpus"
            )
    learnt = manifest["identity"]
    if learnt["corpus"] != corpus.fingerprint:
        note(
            f"proxy {config.proxy} was fitted to another corpus than {config.data}: how well it agrees "
            f"there is not measured"
        )
    identity = {
        "corpus": corpus.fingerprint,
        **{key: learnt["scores"][key] for key in CARRIED},
        "proxy": manifest["checksum"],
        "shard_rows": config.shard_chunks,
    }
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    batch_tokens = config.batch_tokens or BATCH_TOKENS.on(device.type)
    if learnt["kind"] == "transformer":
        identity |= {"predicted_in": str(dtype).removeprefix("torch."), "batch_tokens": batch_tokens}
        identity["device"] = device.type
    chunks = np.arange(len(corpus))
    shards = [
        chunks[start : start + config.shard_chunks] for start in range(0, len(chunks), config.shard_chunks)
    ]
    return _Plan(corpus, config, manifest, device, dtype, batch_tokens, shards, identity)


def _whole_shards(plan: _Plan) -> dict[int, str]:
    """The hashes of the score files that are there and undamaged, by their number."""
    files = recorded(plan.output).get("files")
    files = files if isinstance(files, dict) else {}
    hashes = {
        number: whole_hash(plan.output, number, chunks, list(SCORE_COLUMNS), files)
        for number, chunks in enumerate(plan.shards)
    }
    return {number: digest for number, digest in hashes.items() if digest is not None}


def _files(plan: _Plan, whole: dict[int, str]) -> dict[str, str]:
    return {shard_path(plan.output, number).name: whole[number] for number in sorted(whole)}


def _write_shards(plan: _Plan, proxy: Proxy, todo: list[int], whole: dict[int, str]) -> None:
    """Write the score files that are not whole, and their hashes into the manifest as they come."""
    corpus = plan.corpus
    positions = corpus.num_tokens - 1
    total, left = int(positions.sum()), sum(int(positions[plan.shards[number]].sum()) for number in todo)
    with Progress("proxy score", total, done=total - left) as progress:
        for number in todo:
            chunks, parts = plan.shards[number], []
            for part in split_by_tokens(corpus.num_tokens[chunks], READ_TOKENS):
                parts.append(proxy.predict(corpus.rows(chunks[part])))
                progress.update(int(positions[chunks[part]].sum()))
            counts, scores = (np.concatenate(values) for values in zip(*parts, strict=True))
            nothing = np.full(len(chunks), np.nan)
            values = {"num_tokens": counts, **dict.fromkeys(SCORE_COLUMNS, nothing), "score": scores}
            whole[number] = write_shard(plan.output, number, chunks, list(SCORE_COLUMNS), values)
            record_output(plan.output, {"files": _files(plan, whole)})


def _finish(plan: _Plan, proxy: Proxy) -> None:
    """Mark the output complete, and print what came out."""
    figures = score_figures(plan.output, len(plan.shards), "score")
    agreement = plan.manifest["held_out"]
    predicted = {"kind": plan.manifest["identity"]["kind"]}
    predicted |= {key: agreement[key] for key in ("spearman", "equal_selections", "ratio")}
    results = {
        **{key: plan.manifest[key] for key in (*ROLES, "vocab_size")},
        **figures,
        "predicted": predicted,
        "flops": {"proxy": prediction_flops(proxy, plan.corpus)},
    }
    complete_output(plan.output, results)
    print(
        printable(
            f"Predicted the scores of {figures['rows']:,} chunks, {figures['tokens']:,} tokens; "
            f"{figures['non_finite']:,} not finite; scores in {plan.output}"
        )
    )
    if figures["mean"] is not None:
        print(f"Mean score: {figures['mean']:.4f} nats per token")
