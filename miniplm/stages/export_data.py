"""export data: a corpus → a folder of Parquet files with a dataset card, as the Hugging Face Hub shows it.

`datasets.load_dataset` opens the folder as it is; the Hub's viewer shows the text. The tokenizer comes with
it, and a manifest that holds a hash of every other file.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..analysis.dataset_card import dataset_card
from ..analysis.hub_folders import CARD, is_complete, upload, write_manifest
from ..config import ExportDataConfig
from ..data.corpus import TOKENIZER, Corpus
from ..data.tokenizer import load_tokenizer
from ..runtime.files import atomic_folder
from ..runtime.progress import Progress
from ..runtime.text import printable

FILE_BYTES = 256 * 2**20  # of a file's columns in memory; it is smaller on disk
FOLDER = "data"


def export_data(config: ExportDataConfig) -> None:
    """Write the folder, whole or not at all, and upload it if asked to.

    An output folder that holds an equal export is left alone (and uploaded if asked to).

    Raises:
        UserError: no whole corpus; another folder in the way, or an equal export that is damaged; a failed
            upload.
    """
    corpus = Corpus(config.data)
    tokenizer = load_tokenizer(corpus.tokenizer)
    output = Path(config.output)
    name = config.name or output.resolve().name
    identity = {
        "corpus": corpus.fingerprint,
        "name": name,
        "license": config.license,
        "language": list(config.language),
    }

    def card(location: str) -> str:
        return dataset_card(
            config, corpus, tokenizer.convert_ids_to_tokens(corpus.eos_token_id), name, location
        )

    if is_complete(output, "export data", identity, (CARD, f"{TOKENIZER}/tokenizer.json")):
        print(printable(f"export {output} is complete, nothing to do"))
    else:
        text = card(output.resolve().name)
        with atomic_folder(output) as folder:
            _write_parquet(corpus, tokenizer, folder / FOLDER)
            shutil.copytree(corpus.tokenizer, folder / TOKENIZER)
            (folder / CARD).write_text(text, encoding="utf-8")
            write_manifest(folder, "export data", identity)
        print(printable(f"exported {len(corpus):,} chunks of {config.data} to {output}"))
    if config.push_to_hub:
        upload(config.push_to_hub, config.private, output, card, "dataset")


def _write_parquet(corpus: Corpus, tokenizer: Any, folder: Path) -> None:
    """train-00000-of-00002.parquet, …: the columns of the corpus, and the text of each chunk first."""
    import pyarrow.parquet as pq

    folder.mkdir()
    paths: list[Path] = []
    writer, size = None, 0
    with Progress("export data", len(corpus), unit="chunks") as progress:
        for table in _tables(corpus, tokenizer):
            if writer is None:
                paths.append(folder / f"{len(paths)}.parquet")
                writer, size = pq.ParquetWriter(paths[-1], table.schema), 0
            writer.write_table(table)  # a row group: some megabytes, which a viewer reads alone
            size += table.nbytes
            progress.update(table.num_rows)
            if size >= FILE_BYTES:
                writer.close()
                writer = None
    if writer:
        writer.close()
    for number, path in enumerate(paths):
        path.rename(folder / f"train-{number:05d}-of-{len(paths):05d}.parquet")


def _tables(corpus: Corpus, tokenizer: Any) -> Iterator[Any]:
    """Arrow tables of about a thousand chunks with their text."""
    import pyarrow as pa

    for batch in corpus.table.to_batches():
        ids = batch.column("input_ids").to_pylist()
        texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        columns = {"text": pa.array(texts, pa.string())}
        columns |= {name: batch.column(name) for name in batch.schema.names}
        yield pa.table(columns)
