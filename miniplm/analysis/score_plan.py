"""What score is to do: which chunks, with which models, into which files, and which of those are there."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import BATCH_TOKENS, SHARD_CHUNKS, ScoreConfig
from ..data.corpus import Corpus
from ..data.sampling import sampled_chunks
from ..data.scores import ROLES, columns_of, known_hashes, shard_path, whole_hash
from ..data.token_scores import token_path, whole_token_hash
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..models.loading import model_hash
from ..runtime.artifacts import recorded
from ..runtime.devices import choose_dtype, cpu_multiplies_bf16
from ..runtime.distributed import Place
from ..runtime.launchers import device_among_shards
from ..runtime.profiling import check_trace
from ..training.checkpoints import latest_checkpoint


@dataclass(frozen=True)
class ScorePlan:
    """What is to be scored, with what, and into which files.

    tokenizer: the corpus's; names: of the models, by role; folders: where they are, likewise; reason: why
    auto is float32; shards: the chunks of each file; identity: of the output;
    place: of this process among those that share the files.
    """

    config: ScoreConfig
    corpus: Corpus
    tokenizer: Any
    names: dict[str, str]
    folders: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    reason: str | None
    batch_tokens: int
    shards: list[np.ndarray]
    identity: dict[str, Any]
    place: Place

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def columns(self) -> list[str]:
        return columns_of(self.names)

    @property
    def own(self) -> range:
        """The numbers of the files that are this process's."""
        return range(self.place.rank, len(self.shards), self.place.world)

    @property
    def chunks(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *self.shards])


def make_plan(config: ScoreConfig, place: Place, device: torch.device | None = None) -> ScorePlan:
    """Read and check all that the run is made of, but for the models' weights.

    Args:
        device: of another machine that is to score; that of this one if it is not given.
    """
    check_trace(config.profile)
    corpus = Corpus(config.data)
    names = {role: name for role in ROLES if (name := getattr(config, role))}
    folders = {role: latest_checkpoint(name) for role, name in names.items()}
    tokenizer = load_tokenizer(corpus.tokenizer)
    for role, name in names.items():
        check_same_tokens(tokenizer, load_tokenizer(folders[role], config.trust_remote_code), name)
    device = device or device_among_shards(config.device, place)
    dtype, reason = _choose_dtype(config, device)
    batch_tokens = config.batch_tokens or BATCH_TOKENS.on(device.type)
    shard_chunks = config.shard_chunks or SHARD_CHUNKS.on(device.type)
    identity: dict[str, Any] = {
        "corpus": corpus.fingerprint,
        **{role: model_hash(folders[role]) if role in names else None for role in ROLES},
        "dtype": str(dtype).removeprefix("torch."),
        "document_mask": config.document_mask,
        "vocab_size": config.vocab_size,
        "batch_tokens": batch_tokens,
        "shard_rows": shard_chunks,
        "device": device.type,
    }
    if config.precision:
        identity["precision"] = config.precision
    if config.tokens:
        identity["tokens"] = True
    chunks = np.arange(len(corpus))
    if config.sample is not None:
        identity |= {"sample": config.sample, "seed": config.seed}
        chunks = sampled_chunks(corpus, config.sample, config.seed)
    shards = [chunks[start : start + shard_chunks] for start in range(0, len(chunks), shard_chunks)]
    return ScorePlan(
        config,
        corpus,
        tokenizer,
        names,
        folders,
        device,
        dtype,
        reason,
        batch_tokens,
        shards,
        identity,
        place,
    )


def _choose_dtype(config: ScoreConfig, device: torch.device) -> tuple[torch.dtype, str | None]:
    """(the dtype, why auto is float32). What auto has begun goes on in its dtype, on another CPU too."""
    dtype = choose_dtype(config.dtype, device)
    if config.dtype != "auto" or device.type != "cpu" or config.precision:
        return dtype, None
    begun = recorded(config.output).get("identity", {}).get("dtype")
    if begun in ("float32", "bfloat16"):
        return getattr(torch, begun), None
    if not cpu_multiplies_bf16():
        return dtype, "torch sees no instructions for bfloat16 in this CPU"
    if not (config.teacher and config.reference):
        return dtype, "whether bfloat16 selects alike shows only with both models at once"
    return torch.bfloat16, None


def whole_shards(plan: ScorePlan, numbers: Iterable[int]) -> tuple[dict[int, list[str]], list[Path]]:
    """(by their numbers, of these shards the hashes of the score file and, with tokens, of that of the
    tokens, where both are there and undamaged; the files that are not)."""
    begun, whole, lost = recorded(plan.output), {}, []
    for number in numbers:
        files, token_files = known_hashes(plan.output, begun, number)
        chunks = plan.shards[number]
        hashes = {
            shard_path(plan.output, number): whole_hash(plan.output, number, chunks, plan.columns, files)
        }
        if plan.config.tokens:
            hashes[token_path(plan.output, number)] = whole_token_hash(plan.output, number, token_files)
        if missing := [path for path, digest in hashes.items() if digest is None]:
            lost += missing
        else:
            whole[number] = [digest for digest in hashes.values() if digest is not None]
    return whole, lost


def hashes_by_file(plan: ScorePlan, whole: dict[int, list[str]]) -> dict[str, dict[str, str]]:
    """The hashes of the files of whole shards, as the manifest holds them."""
    paths = {"files": shard_path} | ({"token_files": token_path} if plan.config.tokens else {})
    return {
        key: {path(plan.output, number).name: whole[number][place] for number in sorted(whole)}
        for place, (key, path) in enumerate(paths.items())
    }
