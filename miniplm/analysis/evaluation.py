"""What evaluate finds out about a model, and the JSON file that holds it.

{"model", "weights", "corpus", "source", "document_mask", "dtype",  what was evaluated on what
 "rows", "non_finite_rows", "tokens", "loss", "perplexity",         the figures of the whole
 "flops": {"forward": what they cost},
 "domains": {name: the same five figures},
 "checksum": fingerprint of all that}

Files from before there was a checksum have none; of theirs only what cannot be is noticed.
"""

from pathlib import Path

from pydantic import ConfigDict

from ..runtime.errors import UserError
from ..runtime.files import fingerprint, read_json
from ..runtime.schema import Count, Figure, Record, read_record

REMEDY = "evaluate again, or give another file"


class Losses(Record):
    """The figures of some chunks. A loss that is not finite or of no token is None; so is a perplexity past
    the largest float."""

    model_config = ConfigDict(extra="allow")  # what else is there counts for the checksum

    rows: Count  # chunks
    non_finite_rows: Count  # those with a loss that is not finite
    tokens: Count  # predicted positions
    loss: Figure | None  # nats per token
    perplexity: Figure | None


class Evaluation(Losses):
    """The figures of a model on a corpus."""

    model: str  # name; of a path its last part
    weights: str  # hash
    corpus: str  # fingerprint
    source: str  # the corpus's
    document_mask: bool
    dtype: str
    domains: dict[str, Losses]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.model_dump())


def with_checksum(content: dict) -> dict:
    """What is written of an evaluation with this content."""
    return {**content, "checksum": fingerprint(content)}


def read_evaluation(path: str | Path) -> Evaluation:
    """The evaluation in a file that evaluate wrote.

    Raises:
        UserError: there is no such file, or it is not as evaluate wrote it.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a regular file: give the JSON file that evaluate wrote")
    content = read_json(path)
    checksum = content.pop("checksum", None) if isinstance(content, dict) else None
    what = f"{path} is not an evaluation as evaluate writes it"
    evaluation = read_record(Evaluation, content, what, REMEDY)
    if checksum is None and evaluation.model_extra:  # without a checksum only what it had then
        raise UserError(f"{what} (it has no checksum): {REMEDY}")
    if checksum not in (None, evaluation.fingerprint):
        raise UserError(f"{what} (its checksum is that of another content): {REMEDY}")
    return evaluation
