"""Synthesize: corpus + teacher → a corpus of the teacher's text (SeqKD, Kim & Rush, EMNLP 2016, as arXiv
2410.17215 has it for pre-training).

The first `prompt_tokens` ids of each chunk are kept, and the teacher continues them to the chunk's length. A
student trains on the whole chunk, as on any other: the loss counts the prompt too. An end of text that the
teacher writes is a token like others, what comes after it is the next document. Chunks that are no longer
than a prompt stay as they are.

Chunks are continued in batches of `batch_chunks`, and written in files of `shard_chunks`; batches lie within
a file. So a file depends on nothing but its own chunks: a killed run continues at the first file that is not
there, and ends in the same bytes.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import BATCH_CHUNKS, SHARD_CHUNKS, SynthesizeConfig
from ..data.chunking import Chunk
from ..data.corpus import Corpus, file_hashes, shard_name, write_chunks, write_dataset_files
from ..data.derived import CARRIED, copy_tokenizer, count_predictions, what_is_lost
from ..data.tokenizer import check_same_tokens, load_tokenizer
from ..models.flops import ForwardFlops
from ..models.generation import Sampling, TransformersEngine, VllmEngine
from ..models.loading import forward_cost_of_model, model_config, model_hash
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
from ..runtime.files import hash_files
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..runtime.wall_time import timed
from ..training.checkpoints import latest_checkpoint

SAMPLING = ("prompt_tokens", "temperature", "top_p", "seed", "engine")  # settings, as manifests hold them


@dataclass(frozen=True)
class _Plan:
    """What is to be continued, by whom, and into which files.

    folder: where the teacher is; cost: of its forward pass; batches: the chunks of each batch, by the file
    that they go into; shards: the chunks of each file; identity: of the output.
    """

    config: SynthesizeConfig
    corpus: Corpus
    folder: str
    device: torch.device
    dtype: torch.dtype
    sampling: Sampling
    cost: ForwardFlops
    shards: list[range]
    batches: list[list[np.ndarray]]
    identity: dict[str, Any]

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    def new_tokens(self, chunks: np.ndarray) -> np.ndarray:
        """int64: how many tokens the teacher adds to each of these chunks."""
        return self.corpus.num_tokens[chunks] - self.config.prompt_tokens


def synthesize(config: SynthesizeConfig) -> None:
    """Write the corpus of the teacher's continuations, and print what was written.

    Raises:
        UserError: the corpus or the teacher is missing, damaged or does not go with the other; no chunk is
            longer than a prompt; the output folder holds another run.
    """
    plan = _plan(config)
    complete = (plan.output / MANIFEST).exists() and open_output(plan.output, "synthesize", plan.identity)
    if complete:
        lost = what_is_lost(plan.output, plan.corpus)
        if not lost:
            print(printable(f"The corpus {plan.output} is complete, nothing to do."))
            return
        note(f"the corpus {plan.output} was complete, but {lost}: what is lost is written anew")
    engine = _load_engine(plan)
    open_output(plan.output, "synthesize", plan.identity)  # claimed only now: a bad model leaves no folder
    with exclusive(plan.output), timed(plan.output):
        hashes = _whole_shards(plan)
        reopen_output(plan.output, {"files": hashes})
        _write_shards(plan, engine, hashes)
        copy_tokenizer(plan.corpus, plan.output)
        _finish(plan, [hashes[shard_name(number)] for number in range(len(plan.shards))])


def _plan(config: SynthesizeConfig) -> _Plan:
    """Read and check all that the run is made of, but for the teacher's weights."""
    corpus, folder = Corpus(config.data), latest_checkpoint(config.teacher)
    tokenizer = load_tokenizer(corpus.tokenizer)
    check_same_tokens(tokenizer, load_tokenizer(folder, config.trust_remote_code), config.teacher)
    long = np.flatnonzero(corpus.num_tokens > config.prompt_tokens)
    if not len(long):
        raise UserError(
            f"no chunk of corpus {config.data} is longer than a prompt of {config.prompt_tokens} tokens: "
            f"lower prompt_tokens"
        )
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    shard_chunks = config.shard_chunks or SHARD_CHUNKS.on(device.type)
    # vLLM makes batches itself, of a whole file.
    batch_chunks = config.batch_chunks or BATCH_CHUNKS.on(device.type)
    batch_chunks = shard_chunks if config.engine == "vllm" else batch_chunks
    sampling = Sampling(
        config.temperature, config.top_p, config.seed, max(tokenizer.get_vocab().values()) + 1
    )
    starts = range(0, len(corpus), shard_chunks)
    shards = [range(start, min(start + shard_chunks, len(corpus))) for start in starts]
    bounds = np.searchsorted(long, [*starts, len(corpus)])
    batches = [
        [long[first : min(first + batch_chunks, stop)] for first in range(start, stop, batch_chunks)]
        for start, stop in pairwise(bounds.tolist())
    ]
    identity = {
        "corpus": corpus.fingerprint,
        "teacher": model_hash(folder),
        **{name: getattr(config, name) for name in SAMPLING},
        "dtype": str(dtype).removeprefix("torch."),
        "batch_chunks": batch_chunks,
        "shard_chunks": shard_chunks,
        "device": device.type,
    }
    cost = forward_cost_of_model(folder, config.trust_remote_code)
    return _Plan(config, corpus, folder, device, dtype, sampling, cost, shards, batches, identity)


def _load_engine(plan: _Plan) -> TransformersEngine | VllmEngine:
    """The teacher; UserError unless it knows the corpus's ids and reads its longest chunk."""
    config = plan.config
    if config.engine == "vllm":
        if plan.folder.endswith(".gguf"):
            raise UserError(f"engine vllm takes no .gguf file ({config.teacher}): leave the engine out")
        engine: TransformersEngine | VllmEngine = VllmEngine(
            plan.folder, plan.corpus.tokenizer, plan.dtype, config.trust_remote_code, plan.sampling
        )
        text = model_config(plan.folder, config.trust_remote_code).get_text_config()
    else:
        engine = TransformersEngine(
            plan.folder, plan.dtype, plan.device, config.trust_remote_code, plan.sampling
        )
        text = engine.model.config.get_text_config()
    if plan.corpus.highest_id >= text.vocab_size:
        raise UserError(
            f"teacher {config.teacher} knows {text.vocab_size} ids, corpus {config.data} has ids up to "
            f"{plan.corpus.highest_id}: give a teacher that was made for its tokenizer"
        )
    longest, context = int(plan.corpus.num_tokens.max()), getattr(text, "max_position_embeddings", None)
    if context and longest > context:
        raise UserError(
            f"teacher {config.teacher} reads at most {context} tokens, the longest chunk of corpus "
            f"{config.data} has {longest}: prepare it with a smaller max_length, or give another teacher"
        )
    return engine


# ---- the files ----


def _whole_shards(plan: _Plan) -> dict[str, str]:
    """The hashes of the Arrow files that are there and undamaged, by name."""
    files = recorded(plan.output).get("files")
    names = [shard_name(number) for number in range(len(plan.shards))]
    known = {name: files[name] for name in names if name in files} if isinstance(files, dict) else {}
    return {
        name: digest
        for name, digest in known.items()
        if (plan.output / name).is_file() and hash_files([plan.output / name]) == digest
    }


def _write_shards(plan: _Plan, engine: TransformersEngine | VllmEngine, hashes: dict[str, str]) -> None:
    """Write the files that are not whole, and enter their hashes as they come."""
    todo = [number for number in range(len(plan.shards)) if shard_name(number) not in hashes]
    new = [sum(int(plan.new_tokens(batch).sum()) for batch in batches) for batches in plan.batches]
    codes, names = plan.corpus.domains
    with Progress("synthesize", sum(new), done=sum(new) - sum(new[number] for number in todo)) as progress:
        for number in todo:
            shard = plan.shards[number]
            rows = dict(zip(shard, plan.corpus.rows(shard), strict=True))
            for batch in plan.batches[number]:
                prompts = [rows[chunk][: plan.config.prompt_tokens] for chunk in batch]
                new_tokens = plan.new_tokens(batch).tolist()
                completions = _complete(plan, engine, prompts, new_tokens, batch.tolist())
                for chunk, prompt, completion in zip(batch, prompts, completions, strict=True):
                    rows[chunk] = np.concatenate([prompt, completion])
                progress.update(sum(new_tokens))
            chunks: list[Chunk] = [(names[codes[chunk]], rows[chunk]) for chunk in shard]
            hashes[shard_name(number)] = write_chunks(plan.output, number, chunks)
            record_output(plan.output, {"files": dict(sorted(hashes.items()))})


def _complete(
    plan: _Plan,
    engine: TransformersEngine | VllmEngine,
    prompts: list[np.ndarray],
    new_tokens: list[int],
    chunks: list[int],
) -> list[np.ndarray]:
    try:
        return engine.complete(prompts, new_tokens, chunks)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory: lower batch_chunks (now {plan.identity['batch_chunks']:,}) for a new output "
            f"folder"
        ) from error


# ---- the end ----


def _flops(plan: _Plan) -> int:
    """What the teacher has computed: each position of a batch but the last once, up to its longest chunk,
    with attention to those before; the head for the positions that a token was drawn at."""
    cost, prompt, total = plan.cost, plan.config.prompt_tokens, 0
    for batch in (batch for batches in plan.batches for batch in batches):
        lengths = plan.corpus.num_tokens[batch]
        if plan.config.engine != "vllm":
            lengths = np.full(len(batch), lengths.max())
        positions = lengths - 1
        total += cost.of(int(positions.sum()), int((positions**2).sum()))
        total -= cost.head * len(batch) * (prompt - 1)
    return total


def _finish(plan: _Plan, hashes: list[str]) -> None:
    """Mark the output complete, and print what came out."""
    corpus, config = plan.corpus, plan.config
    long = corpus.num_tokens[corpus.num_tokens > config.prompt_tokens]
    teacher = Path(config.teacher).resolve().name if Path(config.teacher).exists() else config.teacher
    synthesis = {
        "teacher": teacher,
        **{name: getattr(config, name) for name in SAMPLING},
        "new_tokens": int((long - config.prompt_tokens).sum()),
        "unchanged": len(corpus) - len(long),  # chunks
    }
    results = {
        "fingerprint": write_dataset_files(plan.output, hashes, with_scores=False),
        "rows": len(corpus),
        "tokens": int(corpus.num_tokens.sum()),
        "predictions": count_predictions(plan.output, len(hashes), corpus.eos_token_id),
        "domains": {
            name: {key: counts[key] for key in ("rows", "tokens")}
            for name, counts in corpus.manifest["domains"].items()
        },
        **{key: corpus.manifest[key] for key in CARRIED},
        "parent": corpus.fingerprint,
        "synthesis": synthesis,
        "flops": {"teacher": _flops(plan)},
        "files": file_hashes(plan.output, hashes),
    }
    complete_output(plan.output, results)
    print(
        printable(
            f"{len(long):,} chunks continued by {teacher}, {synthesis['new_tokens']:,} new tokens; "
            f"{synthesis['unchanged']:,} no longer than a prompt, unchanged; corpus {plan.output}"
        )
    )
