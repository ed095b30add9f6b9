"""Where a model comes from: what the manifest of a training output says of the run, its corpus, and the
selection and the scores behind that."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..runtime.schema import Count, Figure, Record, Seed, read_record


class Rule(Record):
    """What a selection kept."""

    ratio: Figure | None = None
    token_budget: Count | None = None
    threshold: Figure | None = None
    random_seed: Seed | None = None
    per_domain: bool = False
    score: Literal["difference", "ratio", "normalised", "teacher", "reference"] = "difference"
    temperature: Figure | None = None
    domain_shares: dict[str, Figure] = Field(default_factory=dict)
    min_tokens: Count | None = None
    max_repeats: Count | None = None
    aggregate: Literal["mean", "sum", "quantile"] = "mean"
    quantile: Figure | None = None
    document_scores: bool = False
    order: Literal["corpus", "score", "random"] = "corpus"

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Rule":
        bounds = (self.ratio, self.token_budget, self.threshold)
        if sum(bound is not None for bound in bounds) != 1:
            raise ValueError("it needs one of ratio, token_budget and threshold")
        return self


class Selection(Record):
    """What came of a rule."""

    rule: Rule
    kept: Count  # chunks
    dropped: Count
    kept_tokens: Count
    dropped_tokens: Count


class Predicted(Record):
    """What predicted scores, and how well it ranks held-out chunks."""

    kind: Literal["ngram", "transformer"]
    spearman: Figure


class Scores(Record):
    """The models behind a score folder: names, of a path its last part."""

    teacher: str | None = None
    reference: str | None = None
    predicted: Predicted | None = None


class Synthesis(Record):
    """How a teacher wrote a corpus (SeqKD)."""

    teacher: str  # name
    prompt_tokens: Count
    temperature: Figure
    top_p: Figure


class TrainingCorpus(Record):
    """What a run was trained on."""

    source: str
    fingerprint: str
    parent: str | None = None  # fingerprint of the corpus that was selected from
    rows: Count  # chunks
    tokens: Count
    max_length: Count  # predictions per chunk
    domains: dict[str, object]
    selection: Selection | None = None
    synthesis: Synthesis | None = None
    scores: list[Scores] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_its_models(self) -> "TrainingCorpus":
        if self.by_score and not (self.scored_by("teacher") and self.scored_by("reference")):
            raise ValueError("a selection by score needs a teacher and a reference")
        return self

    @property
    def by_score(self) -> bool:
        """Was it selected by Difference Sampling?"""
        return self.selection is not None and self.selection.rule.random_seed is None

    @property
    def predicted(self) -> Predicted | None:
        """What predicted the scores, where they are not the models' own."""
        return next((scores.predicted for scores in self.scores if scores.predicted), None)

    def scored_by(self, role: str) -> str | None:
        """The name of the "teacher" or the "reference" of the scores."""
        names = [name for scores in self.scores if (name := getattr(scores, role))]
        return names[-1] if names else None


class TokenRule(Record):
    """Which tokens of each global batch count in the loss."""

    rule: Literal["difference", "teacher_loss", "reference_loss"]
    ratio: Figure


class Optimizer(Record):
    lr: Figure
    min_lr_ratio: Figure
    warmup_steps: Count
    betas: Annotated[list[Figure], Field(min_length=2, max_length=2)]
    eps: Figure
    weight_decay: Figure
    max_grad_norm: Figure


class RunIdentity(Record):
    """All that determines what comes of a run, as far as it is told."""

    corpus: str  # fingerprint
    optimizer: Optimizer
    steps: Count  # planned
    batch_tokens: Count
    shuffle: bool
    seed: Seed
    document_mask: bool
    dtype: str
    init_from: str | None = None  # hash of the weights that it started from
    teacher: str | None = None  # hash; of Vanilla KD, as are the next two
    alpha: Figure | None = None
    temperature: Figure | None = None
    tokens: TokenRule | None = None

    @model_validator(mode="after")
    def _has_a_loss(self) -> "RunIdentity":
        if self.teacher is not None and (self.alpha is None or self.temperature is None):
            raise ValueError("a teacher needs alpha and temperature")
        return self


class Provenance(Record):
    """A run: its identity, and once it has ended what came of it."""

    complete: bool
    identity: RunIdentity
    corpus: TrainingCorpus | None = None
    parameters: Count | None = None
    teacher: str | None = None  # name
    token_models: Scores = Scores()  # behind the scores of tokens
    loss: Figure | None = None  # of the last step
    eval_loss: Figure | None = None


def read_provenance(manifest: object, path: str | Path) -> Provenance:
    """What the manifest of a training output, found at `path`, says.

    Raises:
        UserError: it is not as train wrote it.
    """
    what = f"{path} is not as train wrote it"
    return read_record(Provenance, manifest, what, "restore it, or run the train command again")
