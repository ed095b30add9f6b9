"""score on several processes: any number writes the same bytes, and continues what another has begun."""

import errno
import fcntl
import os
import signal
import time

import pytest
from outputs import contents
from ranks import exit_codes, forked, started, wait_until
from scoring_runs import SMALL

from miniplm.cli import main
from miniplm.config import ScoreConfig
from miniplm.data.corpus import Corpus
from miniplm.data.token_scores import TokenScores
from miniplm.runtime.artifacts import exclusive
from miniplm.runtime.errors import UserError
from miniplm.runtime.wall_time import wall_time
from miniplm.stages.score import score


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return forked(tmp_path_factory.mktemp("elsewhere"))


def score_as_rank(rank, options, slow=0.0):
    """In a process of its own; with `slow` every file takes so many seconds more."""
    if slow:
        from miniplm.analysis import score_shards

        write = score_shards.write_shard
        score_shards.write_shard = lambda *given: (time.sleep(slow), write(*given))[1]
    score(ScoreConfig(**options))


@pytest.fixture
def options(tiny_corpus, teacher, reference, tmp_path):
    models = dict(teacher=str(teacher), reference=str(reference))
    return dict(data=tiny_corpus, output=str(tmp_path / "s"), **models, **SMALL)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_one_after_the_other(options, scores, tmp_path, world, capsys):
    """In any order, and the last completes the folder; 7: one has no file."""
    for rank in (*range(1, world), 0):
        assert not (tmp_path / "s" / "manifest.json").exists() or not contents(tmp_path / "s") == contents(
            scores
        )
        score(ScoreConfig(**options, rank=rank, world=world))
        said = capsys.readouterr().out
        assert ("whoever" in said or "who is last" in said) == (rank != 0)
    assert "Scored 40 chunks" in said
    assert contents(tmp_path / "s") == contents(scores)
    for rank in (0, 1):
        score(ScoreConfig(**options, rank=rank, world=world))
        assert "nothing to do" in capsys.readouterr().out
    score(ScoreConfig(**options))
    assert "nothing to do" in capsys.readouterr().out
    assert contents(tmp_path / "s") == contents(scores)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_side_by_side(context, options, scores, tmp_path, world):
    """torchrun's variables; they begin at the same moment and none refuses another."""
    with started(context, tmp_path / "logs", world, score_as_rank, options) as ranks:
        assert exit_codes(ranks) == [0] * world, [rank.said() for rank in ranks]
    assert contents(tmp_path / "s") == contents(scores)
    said = [rank.said() for rank in ranks]
    assert sum("Scored 40 chunks" in text for text in said) == 1, said
    assert wall_time(tmp_path / "s") > 0


def test_killed_on_three_and_finished_on_another_number(context, options, scores, tmp_path):
    folder = tmp_path / "s"
    with started(context, tmp_path / "logs", 3, score_as_rank, options, 1.5) as ranks:
        wait_until(lambda: len(list(folder.glob("scores-*.parquet"))) >= 3, ranks)
        for rank in ranks:
            os.kill(rank.process.pid, signal.SIGKILL)
        exit_codes(ranks)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("scores-*.parquet")}
    assert 3 <= len(done) < 6
    score(ScoreConfig(**options, rank=1, world=2))
    assert contents(folder) != contents(scores)
    score(ScoreConfig(**options))
    assert contents(folder) == contents(scores)
    kept = [path for path, written in done.items() if path.stat().st_mtime_ns == written]
    assert len(kept) >= len(done) - 3  # but for those whose hash a kill kept from being written


def test_the_same_rank_twice_is_refused_and_another_world_is_not(context, options, scores, tmp_path):
    folder = tmp_path / "s"
    with started(context, tmp_path / "logs", 2, score_as_rank, options, 1.0) as ranks:
        wait_until(lambda: list(folder.glob(".rank-1-of-2*")), ranks)
        with pytest.raises(UserError, match=r"process 1 of 2 is writing to .*s already: wait"):
            score(ScoreConfig(**options, rank=1, world=2))
        score(ScoreConfig(**options, rank=0, world=3))  # overlaps with both
        assert exit_codes(ranks) == [0, 0], [rank.said() for rank in ranks]
    assert contents(folder) == contents(scores)


def test_two_processes_alone_are_refused_as_ever(options, tmp_path):
    (tmp_path / "s").mkdir()
    with exclusive(tmp_path / "s"), pytest.raises(UserError, match="another process is writing to"):
        score(ScoreConfig(**options))


def test_a_rank_waits_for_who_claims_the_folder(options, tmp_path):
    """A process alone is refused there; one of several is not."""
    child = os.fork()
    if child == 0:
        (tmp_path / "s").mkdir()
        with exclusive(tmp_path / "s"):
            (tmp_path / "held").touch()
            time.sleep(2)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    score(ScoreConfig(**options, rank=0, world=2))
    assert os.waitpid(child, 0)[1] == 0
    assert len(list((tmp_path / "s").glob("scores-*.parquet"))) == 3


def test_damage_is_found_by_the_rank_whose_file_it_is(options, scores, tmp_path, capsys):
    folder = tmp_path / "s"
    for rank in (0, 1):
        score(ScoreConfig(**options, rank=rank, world=3))
    for number in (0, 1):  # flipped before the folder is complete
        path = folder / f"scores-{number:05d}.parquet"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"scores-00000\.parquet is not as written: run score again"):
        score(ScoreConfig(**options, rank=2, world=3))
    capsys.readouterr()
    score(ScoreConfig(**options))
    assert "is damaged" in capsys.readouterr().err
    assert contents(folder) == contents(scores)
    (folder / "scores-00004.parquet").unlink()  # after
    score(ScoreConfig(**options, rank=0, world=2))
    assert "is missing" in capsys.readouterr().err
    assert contents(folder) == contents(scores)


def test_ranks_with_tokens(options, tmp_path):
    for name, places in (("one", [(None, None)]), ("two", [(0, 2), (1, 2)])):
        for rank, world in places:
            score(
                ScoreConfig(
                    **{**options, "output": str(tmp_path / name)}, tokens=True, rank=rank, world=world
                )
            )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("tokens-*.arrow"))) == 6


@pytest.mark.parametrize("sample", [None, 0.5])
def test_who_reads_an_incomplete_folder_is_told_what_is_missing(options, tmp_path, sample, capsys):
    score(ScoreConfig(**options, rank=1, world=3, tokens=not sample, sample=sample))
    folder = tmp_path / "s"
    (folder / "scores-00000.parquet").write_bytes(b"begun")  # and a kill kept its hash from being written
    command = "proxy fit" if sample else "select"
    given = [f"--data={options['data']}", f"--scores={folder}", f"--output={tmp_path / 'r'}"]
    capsys.readouterr()
    assert main([*command.split(), *given]) == 2
    error = capsys.readouterr().err
    assert f"{folder} is not complete: run its 'score' command again" in error and error.count("\n") == 1
    whole = (
        "4 of 6 score files are missing (scores-00000.parquet, scores-00002.parquet, scores-00003.parquet, …)"
    )
    sampled = "2 of 3 score files are missing (scores-00000.parquet, scores-00002.parquet)"
    assert (sampled if sample else whole) in error, error
    if not sample:
        with pytest.raises(UserError, match=r"is not complete: .* 4 of 6 score files are missing"):
            TokenScores(folder, Corpus(options["data"]), "difference")
    score(ScoreConfig(**options, rank=0, world=1, tokens=not sample, sample=sample))
    capsys.readouterr()
    main([*command.split(), *given])
    assert "not complete" not in capsys.readouterr().err


def test_without_locks_in_the_file_system(options, scores, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "s").mkdir()
    with exclusive(tmp_path / "s"), pytest.raises(UserError, match="another process is writing to"):
        score(ScoreConfig(**options))
    score(ScoreConfig(**options, rank=1, world=2))
    score(ScoreConfig(**options, rank=0, world=2))
    assert contents(tmp_path / "s") == contents(scores)


NONSENSE = [
    (["--rank", "0"], "rank and world go together"),
    (["--world", "2"], "rank and world go together"),
    (["--rank", "2", "--world", "2"], "rank must be below world, 2, got 2"),
    (["--rank", "0", "--world", "0"], "world must be at least 1, got 0"),
    (["--rank=-1", "--world", "2"], "rank must be at least 0, got -1"),
]


@pytest.mark.parametrize(("flags", "words"), NONSENSE)
def test_nonsense(options, capsys, flags, words, tmp_path):
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main(["score", *given, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()
