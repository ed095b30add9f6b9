"""score --tokens: the log-probabilities per token, beside score files that are as without."""

import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from corpora import chunks_of, read_score_files, write_corpus
from damages import cut, flip_bit, remove, swap
from outputs import contents, kill_and_restart
from scoring_runs import SMALL, run_score

from miniplm.analysis.scoring import score_batch
from miniplm.cli import main
from miniplm.config import SelectConfig
from miniplm.data.batches import IGNORE_INDEX, pack
from miniplm.data.corpus import Corpus
from miniplm.data.token_scores import TokenScores, write_tokens
from miniplm.models.base import LanguageModel
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import hash_files, read_json
from miniplm.stages.select import select

EOS = 0


@pytest.fixture(scope="module")
def with_tokens(tiny_corpus, teacher, reference, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "scores"
    run_score(tiny_corpus, folder, teacher=teacher, reference=reference, tokens=True)
    return folder


def read_tokens(folder) -> pa.Table:
    paths = sorted(Path(folder).glob("tokens-*.arrow"))
    return pa.concat_tables([pa.ipc.open_stream(pa.OSFile(str(path))).read_all() for path in paths])


def flat(table, name) -> np.ndarray:
    """The values of all chunks, float16."""
    return np.concatenate([piece.values.to_numpy() for piece in table[name].chunks])


def true_tokens(name, chunks) -> list[np.ndarray]:
    """The log-probability of every position from transformers' logits; NaN after the end of a text."""
    from transformers import AutoModelForCausalLM

    model, result = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), []
    for chunk in chunks:
        values = np.zeros(0)
        if len(chunk) > 1:
            with torch.no_grad():
                log_prob = model(torch.tensor([chunk[:-1]])).logits[0].double().log_softmax(-1)
            values = log_prob.gather(1, torch.tensor(chunk[1:])[:, None])[:, 0].numpy()
        result.append(np.where(np.array(chunk[:-1]) == EOS, np.nan, values))
    return result


def test_score_files_are_as_without(with_tokens, scores):
    """Byte for byte, and so is the manifest but for what is told of the tokens."""
    found, plain = contents(with_tokens), contents(scores)
    names = [f"tokens-{number:05d}.arrow" for number in range(6)]
    assert sorted(found) == sorted([*plain, *names])
    assert {name: found[name] for name in plain if name != "manifest.json"} == {
        name: content for name, content in plain.items() if name != "manifest.json"
    }
    manifest, before = (read_json(folder / "manifest.json") for folder in (with_tokens, scores))
    assert manifest.pop("token_files") == {name: hash_files([with_tokens / name]) for name in names}
    assert manifest["identity"].pop("tokens") is True
    assert {**manifest, "checksum": ""} == {**before, "checksum": ""}


def test_tokens_equal_transformers_logits(with_tokens, tiny_corpus, teacher, reference):
    chunks, table = chunks_of(tiny_corpus), read_tokens(with_tokens)
    assert table["index"].to_pylist() == list(range(len(chunks)))
    assert [str(field.type) for field in table.schema] == ["int64", *["list<item: halffloat>"] * 2]
    for role, name in (("teacher", teacher), ("reference", reference)):
        column = table[f"{role}_log_prob"].combine_chunks()
        assert column.null_count == 0 and column.values.null_count == 0
        for row, truth in enumerate(true_tokens(name, chunks)):
            values = np.array(column[row].values.to_numpy(), np.float64)
            np.testing.assert_allclose(values, truth, rtol=2**-11, atol=1e-4)
    file_bytes = sum(path.stat().st_size for path in with_tokens.glob("tokens-*"))
    assert file_bytes < 4 * sum(map(len, chunks)) + 6 * 2_000  # 4 bytes a token, and Arrow's headers


def test_means_of_tokens_are_the_scores(with_tokens):
    """To the rounding of float16."""
    found, table = read_score_files(with_tokens), read_tokens(with_tokens)
    for role in ("teacher", "reference"):
        rows = [np.array(row, np.float64) for row in table[f"{role}_log_prob"].to_pylist()]
        means = [np.nanmean(row) if np.isfinite(row).any() else np.nan for row in rows]
        np.testing.assert_allclose(means, found[f"{role}_log_prob"], rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("role", ["teacher", "reference"])
def test_one_model_alone(role, with_tokens, tiny_corpus, teacher, reference, tmp_path):
    name = {"teacher": teacher, "reference": reference}[role]
    run_score(tiny_corpus, tmp_path / "s", **{role: name}, tokens=True)
    alone, both = read_tokens(tmp_path / "s"), read_tokens(with_tokens)
    assert alone.column_names == ["index", f"{role}_log_prob"]
    name = f"{role}_log_prob"
    np.testing.assert_array_equal(flat(alone, name), flat(both, name))


class FixedModel(LanguageModel):
    """A hidden state per position of its own, and a head."""

    def __init__(self, hidden, head):
        super().__init__()
        self.hidden, self.head = hidden, head

    def forward(self, input_ids, cu_seqlens, max_seqlen=None):
        return self.hidden

    @property
    def head_weight(self):
        return self.head


@pytest.mark.parametrize("roles", [("teacher", "reference"), ("teacher",)])
def test_beyond_float16(roles):
    """Below −65504 it is the lowest number; what is not finite is NaN, as is what nothing is predicted at."""
    batch = pack([np.array([2, 1, 1, 1, 3, 1, EOS, 1], np.int32)], EOS)
    hidden = torch.tensor([[1e-9], [1.0], [1e5], [1.0], [float("nan")], [float("inf")], [1.0]])
    model = FixedModel(hidden, torch.tensor([[2.0], [0.0], [0.0], [-float("inf")]]))
    found = score_batch({role: model for role in roles}, batch, 4, tokens=True)
    for role in roles:
        values = found[f"{role}_tokens"]
        assert values.dtype == torch.float16
        first, second, third, *others = values.tolist()
        assert first == pytest.approx(-np.log(3), rel=1e-3) and -3 < second < -2
        assert third == -65504.0 and all(map(np.isnan, others)) and len(others) == 4
    assert not {name for name in score_batch({role: model for role in roles}, batch, 4) if "token_" in name}


def test_batches_and_files_change_no_token(tiny_corpus, teacher, reference, with_tokens, tmp_path):
    settings = dict(shard_chunks=1000, batch_tokens=1, tokens=True)
    run_score(tiny_corpus, tmp_path / "s", teacher=teacher, reference=reference, **settings)
    assert [path.name for path in (tmp_path / "s").glob("*.arrow")] == ["tokens-00000.arrow"]
    found, before = read_tokens(tmp_path / "s"), read_tokens(with_tokens)
    for name in found.column_names[1:]:
        one, two = (flat(table, name).astype(float) for table in (found, before))
        np.testing.assert_allclose(one, two, rtol=2**-10, atol=1e-5)


def test_more_chunks_than_a_record_batch_holds(tiny_tokenizer, tmp_path):
    """The order of the chunks, of chunks without positions too, and any of them by its number."""
    rng = np.random.default_rng(0)
    chunks = [[1] * int(length) for length in rng.integers(1, 5, 2_500)]
    positions = np.array([len(chunk) - 1 for chunk in chunks])
    values = np.arange(positions.sum()).astype(np.float16)
    write_tokens(tmp_path, 0, np.arange(2_500), positions, {"teacher": values})
    table = read_tokens(tmp_path)
    assert table["index"].to_pylist() == list(range(2_500))
    bounds = np.cumsum([0, *positions])
    for row in (0, 999, 1_000, 1_001, 2_499):
        assert table["teacher_log_prob"][row].as_py() == values[bounds[row] : bounds[row + 1]].tolist()
    assert table["teacher_log_prob"].num_chunks == 3


def test_damage_is_repaired(with_tokens, tiny_corpus, teacher, reference, tmp_path, capsys):
    folder = Path(shutil.copytree(with_tokens, tmp_path / "s"))
    options = dict(teacher=teacher, reference=reference, tokens=True)
    run_score(tiny_corpus, folder, **options)
    assert "nothing to do" in capsys.readouterr().out
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    rng = random.Random(0)
    for number, damage in enumerate([flip_bit, cut, remove, swap]):
        damage(folder / f"tokens-{number:05d}.arrow", rng)
        run_score(tiny_corpus, folder, **options)
        said = capsys.readouterr().err
        assert re.search(r"tokens-\d+.arrow is " + ("missing" if damage is remove else "damaged"), said)
        assert contents(folder) == contents(with_tokens)
    assert (folder / "tokens-00005.arrow").stat().st_ino == before["tokens-00005.arrow"]


@pytest.mark.slow
def test_kill_at_random_moments_ends_in_the_same_bytes(tiny_corpus, teacher, reference, tmp_path):
    options = dict(data=tiny_corpus, teacher=teacher, reference=reference, tokens=True)
    options |= {**SMALL, "shard_chunks": 1}
    run_score(
        tiny_corpus, tmp_path / "whole", teacher=teacher, reference=reference, tokens=True, shard_chunks=1
    )
    folder = tmp_path / "killed"
    setup = (
        "import datasets, pyarrow.parquet, safetensors, transformers; from miniplm.config import "
        "ScoreConfig; from miniplm.stages.score import score; "
        "transformers.AutoTokenizer, transformers.LlamaConfig, transformers.Qwen2Config, "
        "transformers.Qwen3Config"
    )  # imported when named
    call = f"score(ScoreConfig(output={str(folder)!r}, **{options!r}))"
    struck = kill_and_restart(setup, call, folder, "*.arrow", [1, 9, 20])
    assert struck >= 1  # on a busy machine a run may end before the blow
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_run_with_tokens_is_another_one(
    scores, with_tokens, tiny_corpus, teacher, reference, tmp_path, capsys
):
    for folder, flags in ((scores, ["--tokens"]), (with_tokens, [])):
        command = f"score --data {tiny_corpus} --teacher {teacher} --reference {reference} --output {folder}"
        command += f" --shard-chunks {SMALL['shard_chunks']} --batch-tokens {SMALL['batch_tokens']}"
        code = main([*command.split(), "--device", "cpu", "--dtype", "float32", *flags])
        assert code == 2 and "holds another score run (tokens was " in capsys.readouterr().err


def test_select_takes_them_as_other_scores(with_tokens, scores, tiny_corpus, tmp_path):
    for name, folder in (("tokens", with_tokens), ("plain", scores)):
        select(SelectConfig(data=tiny_corpus, scores=[str(folder)], output=str(tmp_path / name)))
    found, plain = (contents(tmp_path / name) for name in ("tokens", "plain"))
    assert found.pop("manifest.json") != plain.pop("manifest.json")
    assert found == plain


def test_read_by_their_numbers(with_tokens, tiny_corpus):
    corpus, table = Corpus(tiny_corpus), read_tokens(with_tokens)
    teacher, reference = (table[f"{role}_log_prob"].to_pylist() for role in ("teacher", "reference"))
    chunks = np.array([30, 3, 17, 3])
    for rule, expected in [
        ("difference", lambda row: np.float32(teacher[row]) - np.float32(reference[row])),
        ("teacher_loss", lambda row: -np.float32(teacher[row])),
        ("reference_loss", lambda row: -np.float32(reference[row])),
    ]:
        found = TokenScores(with_tokens, corpus, rule).of(chunks)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.concatenate([expected(row) for row in chunks]))
        batch = pack(corpus.rows(chunks), EOS)
        assert (np.isfinite(found) == (batch.targets != IGNORE_INDEX).numpy()).all()
    assert len(TokenScores(with_tokens, corpus, "difference").of(np.zeros(0, np.int64))) == 0


def test_refusals(with_tokens, scores, tiny_corpus, tiny_tokenizer, teacher, tmp_path):
    other = Corpus(write_corpus(tmp_path / "other", chunks_of(tiny_corpus)[:20], tiny_tokenizer))
    corpus = Corpus(tiny_corpus)
    run_score(tiny_corpus, tmp_path / "teacher", teacher=teacher, tokens=True)
    for folder, scored, rule, said in [
        (with_tokens, other, "difference", f"miniplm score --tokens --data {other.folder}"),
        (scores, corpus, "difference", f"miniplm score --tokens --data {corpus.folder}"),
        (tmp_path / "teacher", corpus, "difference", "score with --reference too"),
        (tmp_path / "teacher", corpus, "reference_loss", "score with --reference too"),
        (tmp_path / "nowhere", corpus, "difference", "does not exist"),
        (tiny_corpus, corpus, "difference", "expected that of 'score'"),
    ]:
        with pytest.raises(UserError, match=said):
            TokenScores(folder, scored, rule)
    TokenScores(tmp_path / "teacher", corpus, "teacher_loss")
