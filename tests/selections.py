"""What the tests of select share: a small corpus with scores of every kind, and a run."""

from corpora import chunks_of, write_corpus

from miniplm.config import SelectConfig
from miniplm.stages.select import select

NAN, INF = float("nan"), float("inf")
LENGTHS = [3, 1, 5, 2, 8, 1, 4, 6, 2, 7, 1]
DOMAINS = ["code", "books", "code", "[bold]x[/]", "books", "null", "code", "books", "null", "code", "books"]
TEACHER = [-1.0, -2.0, -3.0, -1.5, NAN, NAN, -2.0, -1.0, -INF, -0.5, -4.0]
REFERENCE = [-2.0, -2.0, -2.5, -2.5, -1.0, NAN, -3.0, -0.5, -1.0, -3.0, -4.5]
SCORES = [1.0, 0.0, -0.5, 1.0, None, None, 1.0, -0.5, None, 2.5, 0.5]


def make_corpus(folder, tokenizer, lengths=LENGTHS, domains=DOMAINS) -> str:
    """A corpus with chunks of these lengths: chunk r holds the ids r, r + 1, … (modulo 500). Two Arrow files,
    the second one shorter."""
    chunks = [[(row + i) % 500 for i in range(length)] for row, length in enumerate(lengths)]
    half = len(chunks) // 2 + 1
    files = [half, len(chunks) - half]
    return write_corpus(folder, chunks, tokenizer, list(domains), files, bad_records=3, source="books")


def kept_chunks(folder) -> list[int]:
    """The chunks of such a corpus that a refined one has kept."""
    return [ids[0] for ids in chunks_of(folder)]


def run_select(data, scores, output, **rule) -> None:
    """Select by the scores of one folder, or of a list of two."""
    folders = [str(folder) for folder in scores] if isinstance(scores, list) else [str(scores)]
    select(SelectConfig(data=str(data), scores=folders, output=str(output), **rule))
