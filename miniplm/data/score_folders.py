"""Which score folders are those of a corpus, and what is missing of one that is not complete."""

from os import PathLike
from typing import Any

from ..runtime.artifacts import read_manifest, recorded
from ..runtime.errors import UserError
from ..runtime.schema import read_record
from .corpus import Corpus
from .sampling import sampled_chunks
from .scores import WRITERS, ScoreIdentity, ScoreManifest, unfinished_shards

MAX_NAMED = 3  # missing files in a message


def read_score_manifest(folder: str | PathLike[str], corpus: Corpus) -> dict[str, Any]:
    """The manifest of a complete score folder, whole or a sample's; UserError unless it is of this Corpus."""
    check_no_shard_is_missing(folder, corpus)
    manifest = read_manifest(folder, *WRITERS, what="score folder", schema=ScoreManifest)
    if manifest["identity"]["corpus"] != corpus.fingerprint:
        raise UserError(
            f"score folder {folder} holds the scores of another corpus than {corpus.folder}: score this "
            f"one, or give the other"
        )
    return manifest


def check_no_shard_is_missing(folder: str | PathLike[str], corpus: Corpus) -> None:
    """UserError, which names them, where a score folder of this corpus is not complete."""
    manifest = recorded(folder)
    identity = manifest.get("identity", {})
    rows = identity.get("shard_rows")
    ours = manifest.get("stage") in WRITERS and identity.get("corpus") == corpus.fingerprint
    if not ours or manifest["complete"] or not isinstance(rows, int) or rows < 1:
        return
    what = f"the manifest of score folder {folder} is not as score writes it"
    scored = read_record(ScoreIdentity, identity, what, "score the corpus into a new folder")
    sample = None if scored.sample is None else sampled_chunks(corpus, scored.sample, scored.seed)
    chunks = len(corpus if sample is None else sample)
    shards = -(-chunks // rows)
    missing = [path.name for path in unfinished_shards(folder, manifest, shards)]
    names = ", ".join(missing[:MAX_NAMED]) + (", …" if len(missing) > MAX_NAMED else "")
    raise UserError(
        f"score folder {folder} is not complete: run its {manifest['stage']!r} command again, it continues "
        f"where it stopped; {len(missing)} of {shards} score files are missing"
        + (f" ({names})" if names else "")
    )
