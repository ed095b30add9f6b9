"""Corpora that are made from another one, by select and synthesize: they share its tokenizer."""

import filecmp
import shutil
from pathlib import Path

import numpy as np

from ..runtime.files import atomic_folder
from .corpus import TOKENIZER, Corpus, shard_name
from .verify import Damaged

# What the manifest of such a corpus has as that of the other has it.
CARRIED = ("bad_records", "eos_token_id", "vocab_size", "tokenizer_fingerprint", "max_length", "source")


def what_is_lost(output: Path, corpus: Corpus) -> str | None:
    """What is lost or changed of the complete corpus `output` that was made from `corpus`; None where all is
    as it was written."""
    try:
        Corpus(output)
    except Damaged as error:
        return error.reason
    return (
        None if _same_tokenizer(corpus, output) else f"the files in {TOKENIZER} are not those of the corpus"
    )


def _same_tokenizer(corpus: Corpus, output: Path) -> bool:
    names = sorted(path.name for path in Path(corpus.tokenizer).iterdir())
    _, different, unreadable = filecmp.cmpfiles(corpus.tokenizer, output / TOKENIZER, names, shallow=False)
    return not different and not unreadable


def copy_tokenizer(corpus: Corpus, output: Path) -> None:
    """Give `output` the tokenizer of `corpus`, byte for byte."""
    if not _same_tokenizer(corpus, output):
        shutil.rmtree(output / TOKENIZER, ignore_errors=True)
        with atomic_folder(output / TOKENIZER) as folder:
            shutil.copytree(corpus.tokenizer, folder, dirs_exist_ok=True)


def count_predictions(folder: Path, shards: int, eos_token_id: int) -> int:
    """The positions in the first `shards` Arrow files of a corpus whose input is no end of text."""
    import pyarrow as pa

    total = 0
    for number in range(shards):
        with pa.OSFile(str(folder / shard_name(number))) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                ids = batch["input_ids"]
                inputs = np.ones(len(ids.values), bool)
                inputs[ids.offsets.to_numpy()[1:] - 1] = False  # the last of a chunk
                total += int((inputs & (ids.values.to_numpy() != eos_token_id)).sum())
    return total
