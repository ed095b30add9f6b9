"""What Difference Sampling keeps of the pool: the share of each domain, and chunks to be read."""

from pathlib import Path
from typing import Any

import numpy as np

from miniplm.config import SelectConfig
from miniplm.data.corpus import Corpus
from miniplm.data.scores import read_scores
from miniplm.data.selection import best_first, choose
from miniplm.data.tokenizer import load_tokenizer
from miniplm.runtime.files import read_json, write_json

SHOWN = 10  # chunks at each end of what is kept, and of what is dropped
LETTERS = 400  # of a chunk


def write_kept(runs: Path, path: Path, ratio: float = 0.5) -> None:
    """Write what kept() says of the pool and the scores in `runs`."""
    corpus, folder = Corpus(runs / "pool"), runs / "scores"
    names = ["teacher_log_prob", "reference_log_prob", "score"]
    columns = read_scores(folder, len(corpus), names, read_json(folder / "manifest.json")["files"])
    write_json(path, kept(corpus, columns, ratio))


def kept(corpus: Corpus, columns: dict[str, np.ndarray], ratio: float) -> dict[str, Any]:
    """{"domains": {name: chunks, tokens, kept share of the chunks, mean log-probabilities and score},
    "chunks": {"kept, best": [{score, domain, text}, …], "kept, worst", "dropped, best", "dropped, worst"}}.

    Args:
        columns: as read_scores returns them, float32 [chunks].
    """
    config = SelectConfig(data="pool", scores=["scores"], output="kept", ratio=ratio)
    score, (codes, names) = columns["score"], corpus.domains
    keep = choose(config, score, corpus.num_tokens, np.zeros(len(corpus), np.int32))
    domains = {}
    for code, name in enumerate(names):
        of = codes == code
        domains[name] = {
            "chunks": int(of.sum()),
            "tokens": int(corpus.num_tokens[of].sum()),
            "kept": float(keep[of].mean()),
            **{column: float(np.nanmean(values[of])) for column, values in columns.items() if values.ndim},
        }
        del domains[name]["num_tokens"]
    tokenizer = load_tokenizer(str(corpus.folder / "tokenizer"))

    def shown(chunks: np.ndarray) -> list[dict[str, Any]]:
        rows = zip(chunks, corpus.rows(chunks), strict=True)
        texts = [(chunk, tokenizer.decode(row)[:LETTERS]) for chunk, row in rows]
        return [
            {"score": float(score[chunk]), "domain": names[codes[chunk]], "text": text}
            for chunk, text in texts
        ]

    chunks = {}
    for what, of in (("kept", keep), ("dropped", ~keep)):
        ranked = best_first(np.where(of, score, np.float32(np.nan))).astype(np.int64)
        chunks |= {f"{what}, best": shown(ranked[:SHOWN]), f"{what}, worst": shown(ranked[::-1][:SHOWN])}
    return {"ratio": ratio, "domains": dict(sorted(domains.items())), "chunks": chunks}
