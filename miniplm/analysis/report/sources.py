"""What a report is of: the outputs that are named, and what is behind them, found by its content in the
folders beside them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.corpus import WRITERS as CORPUS_WRITERS
from ...data.scores import WRITERS as SCORE_WRITERS
from ...runtime.artifacts import MANIFEST, read_manifest
from ...runtime.errors import UserError
from ...runtime.files import fingerprint, read_json
from ..evaluation import read_evaluation, with_checksum
from ..ledger import Folders, complete_outputs, last_hash

MAX_EVALUATION_BYTES = 16 * 2**20  # a larger .json file beside the runs is not looked into

Content = tuple[
    str, Any
]  # ("corpus", fingerprint), ("scores", of their identity), ("model" or "proxy", hash)


@dataclass
class Sources:
    """What was found.

    outputs: what the report is of; pool: these and what else is beside them; evaluations: what evaluate
    wrote of the models among them; hashes: of the models that were trained; left_out: why something is not
    told, a line each.
    """

    pool: Folders
    outputs: Folders = field(default_factory=dict)
    evaluations: dict[Path, dict[str, Any]] = field(default_factory=dict)
    hashes: dict[Path, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def of(self, *stages: str) -> Folders:
        """The outputs that these stages wrote."""
        return {path: each for path, each in self.outputs.items() if each["stage"] in stages}

    def corpus(self, content: object) -> Path | None:
        """The folder of the corpus with this fingerprint."""
        found = (
            path for path, each in self.of(*CORPUS_WRITERS).items() if each.get("fingerprint") == content
        )
        return next(found, None)

    def scores(self, identity: Mapping[str, Any]) -> Path | None:
        """The folder of the scores with this identity."""
        found = (path for path, each in self.of(*SCORE_WRITERS).items() if each["identity"] == identity)
        return next(found, None)

    def role(self, training: Path) -> str:
        """What a trained model is for: "teacher" or "reference" of the scores, else "student"."""
        identities = [each["identity"] for each in self.of(*SCORE_WRITERS).values()]
        for role in ("teacher", "reference"):
            if self.hashes.get(training) in [identity.get(role) for identity in identities]:
                return role
        return "student"


def gather(runs: Sequence[str]) -> Sources:
    """What these runs are made of: folders of a stage, folders of such folders, and files of evaluate.

    Raises:
        UserError: one of them does not exist, or is none of these.
    """
    seeds: list[Path] = []
    places: list[Path] = []
    files: dict[Path, dict[str, Any]] = {}
    for run in map(Path, runs):
        if not run.exists():
            raise UserError(f"run {run} does not exist")
        if run.is_file():
            files[run.resolve()] = _read_evaluation(run)
            places.append(run.resolve().parent)
        elif (run / MANIFEST).exists():
            read_manifest(run, what="run")
            seeds.append(run.resolve())
            places += [run.resolve(), run.resolve().parent]
        else:
            found, evaluations = complete_outputs([run.resolve()]), _evaluations(run.resolve())
            if not found and not evaluations:
                raise UserError(f"run {run} holds no complete output of miniplm: name a folder that it wrote")
            seeds += found
            files |= evaluations
            places.append(run.resolve())
    sources = Sources(complete_outputs(places))
    for path, manifest in sources.pool.items():
        if manifest["stage"] == "train" and (found_hash := last_hash(path)):
            sources.hashes[path] = found_hash
    seeds += [path for path, each in sources.hashes.items() if each in _weights(files)]
    _add(sources, seeds)
    beside = {path: found for place in places for path, found in _evaluations(place).items()}
    known = {sources.hashes.get(path) for path in sources.outputs}
    sources.evaluations = files | {path: each for path, each in beside.items() if each["weights"] in known}
    return sources


def _weights(evaluations: Mapping[Path, Mapping[str, Any]]) -> set[str]:
    return {each["weights"] for each in evaluations.values()}


def _add(sources: Sources, seeds: Sequence[Path]) -> None:
    """The seeds, and all that is behind them; of scores also what was selected by them."""
    gives = {content: path for path in reversed(sources.pool) for content in _contents(sources, path)}
    todo = [path for path in seeds if path in sources.pool]
    scores = {each for path in todo for each in _contents(sources, path) if each[0] == "scores"}
    todo += [
        path
        for path, manifest in sources.pool.items()
        if manifest["stage"] == "select" and scores.intersection(_needs(manifest))
    ]
    while todo:
        path = todo.pop(0)
        if path not in sources.outputs:
            sources.outputs[path] = sources.pool[path]
            todo += [gives[need] for need in _needs(sources.pool[path]) if need in gives]


def _contents(sources: Sources, path: Path) -> Iterator[Content]:
    """What an output can be found by."""
    manifest = sources.pool[path]
    if manifest["stage"] in CORPUS_WRITERS:
        yield "corpus", manifest.get("fingerprint")
    elif manifest["stage"] in SCORE_WRITERS:
        yield "scores", fingerprint(manifest["identity"])
    elif manifest["stage"] == "proxy fit":
        yield "proxy", manifest.get("checksum")
    elif path in sources.hashes:
        yield "model", sources.hashes[path]


def _needs(manifest: Mapping[str, Any]) -> Iterator[Content]:
    """All that an output was made from, as far as it may be an output too."""
    identity = manifest["identity"]
    named = [
        *(("corpus", identity.get(key)) for key in ("corpus", "eval_corpus")),
        ("corpus", manifest.get("parent")),
        *(("model", identity.get(key)) for key in ("teacher", "reference", "init_from")),
        ("proxy", identity.get("proxy")),
    ]
    yield from ((kind, each) for kind, each in named if isinstance(each, str))
    scores, tokens = identity.get("scores"), identity.get("tokens")
    each_scores = [scores] if manifest["stage"] == "proxy fit" else (scores or {}).values()
    yield from (("scores", fingerprint(each)) for each in each_scores)
    if isinstance(tokens, dict):  # of train; score has a flag of this name
        yield "scores", fingerprint(tokens["scores"])


# ---- evaluations ----


def _evaluations(place: Path) -> dict[Path, dict[str, Any]]:
    """The files of evaluate in a folder; what is something else, or damaged, is none."""
    found = {}
    for path in sorted(place.glob("*.json")) if place.is_dir() else []:
        if path.is_file() and path.stat().st_size <= MAX_EVALUATION_BYTES:
            with contextlib.suppress(UserError):
                found[path] = _read_evaluation(path)
    return found


def _read_evaluation(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if isinstance(content, dict) and "corpus" not in content and isinstance(content.get("tasks"), dict):
        if content == with_checksum({key: each for key, each in content.items() if key != "checksum"}):
            return content
    read_evaluation(path)
    assert isinstance(content, dict)
    return content
