"""The dataset card of a published corpus: YAML front matter, then where its chunks are from, and its columns.

The text is in dataset_card.md.jinja. What comes from data is escaped here: the template gets Markdown only.
"""

from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from ..config import ExportDataConfig
from ..data.corpus import Corpus
from ..runtime.artifacts import MANIFEST
from ..runtime.schema import read_record
from .markdown import escape
from .model_card import MAX_DOMAINS, corpus_rows
from .provenance import TrainingCorpus

TEMPLATE = Path(__file__).with_name("dataset_card.md.jinja")
# The Hub's classes of sizes: rows below each.
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)


class _FrontMatter(DatasetCardData):
    """The library's own keeps letters beyond ASCII as they are, those that are not seen too."""

    def to_yaml(self, line_break: str | None = None, original_order: list[str] | None = None) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, line_break=line_break).strip()


class _Card(DatasetCard):
    card_data_class = _FrontMatter


def dataset_card(settings: ExportDataConfig, corpus: Corpus, eos: str, name: str, location: str) -> str:
    """The README.md.

    Args:
        eos: the text of the token that ends a document.
        location: what load_dataset loads it from.
    Raises:
        UserError: the corpus's manifest is not as its stage wrote it.
    """
    path = corpus.folder / MANIFEST
    remedy = "restore it, or make the corpus again"
    facts = read_record(TrainingCorpus, corpus.manifest, f"{path} is not as it was written", remedy)
    distilled = facts.by_score
    front_matter = _FrontMatter(
        license=settings.license,
        language=list(settings.language),
        task_categories=["text-generation"],
        size_categories=[next((size for below, size in SIZES if len(corpus) < below), "n>1B")],
        tags=["pretraining", *(["miniplm", "data-selection"] if distilled else [])],
        configs=[
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
        ],
    )
    card = _Card.from_template(
        front_matter,
        template_path=str(TEMPLATE),
        name=escape(name),
        location=repr(location),
        distilled=distilled,
        rows=corpus_rows(facts),
        licence=settings.license,
        domains=_domain_rows(corpus),
        eos=f"the token {escape(eos)}",
        scored=corpus.has_scores,
    )
    return str(card)


def _domain_rows(corpus: Corpus) -> list[list[str]]:
    codes, names = corpus.domains
    chunks = np.bincount(codes, minlength=len(names))
    tokens = np.bincount(codes, corpus.num_tokens, len(names)).astype(np.int64)
    order = np.argsort(-tokens, kind="stable").tolist()
    rows = [[escape(names[i]), f"{chunks[i]:,}", f"{tokens[i]:,}"] for i in order[:MAX_DOMAINS]]
    if rest := order[MAX_DOMAINS:]:
        rows.append([f"{len(rest):,} smaller domains", f"{chunks[rest].sum():,}", f"{tokens[rest].sum():,}"])
    return rows
