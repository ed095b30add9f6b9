"""export data: a corpus → a folder of Parquet files with a dataset card, as the Hugging Face Hub shows it.

`datasets.load_dataset` opens the folder as it is; the Hub's viewer shows the text. The tokenizer comes with
it, and a manifest that holds a hash of every other file.
"""

import shutil
from functools import partial
from pathlib import Path

from ..analysis.dataset_card import dataset_card
from ..analysis.hub_folders import CARD, is_complete, upload, write_manifest
from ..config import ExportDataConfig
from ..data.corpus import TOKENIZER, Corpus
from ..data.parquet_files import write_parquet
from ..data.tokenizer import load_tokenizer
from ..runtime.files import atomic_folder
from ..runtime.progress import Progress
from ..runtime.text import printable

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
            decode = partial(tokenizer.batch_decode, clean_up_tokenization_spaces=False)
            with Progress("export data", len(corpus), unit="chunks") as progress:
                write_parquet(corpus, decode, folder / FOLDER, progress.update)
            shutil.copytree(corpus.tokenizer, folder / TOKENIZER)
            (folder / CARD).write_text(text, encoding="utf-8")
            write_manifest(folder, "export data", identity)
        print(printable(f"exported {len(corpus):,} chunks of {config.data} to {output}"))
    if config.push_to_hub:
        upload(config.push_to_hub, config.private, output, card, "dataset")
