"""retokenize: the text stays, letter by letter, and so do domains, scores and cuts."""

import math
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from corpora import chunks_of, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outputs import contents
from texts import make_text, write_jsonl
from training_runs import make_config
from transformers import AutoModelForCausalLM, MambaConfig

from miniplm.config import (
    EvalConfig,
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    RetokenizeConfig,
    StudentConfig,
)
from miniplm.data.corpus import Corpus
from miniplm.data.scores import SCORE_COLUMNS
from miniplm.data.tokenizer import load_tokenizer
from miniplm.runtime.artifacts import read_manifest
from miniplm.runtime.errors import UserError
from miniplm.stages import retokenize as stage
from miniplm.stages.evaluate import evaluate
from miniplm.stages.export import export
from miniplm.stages.prepare import prepare
from miniplm.stages.retokenize import retokenize
from miniplm.stages.train import train

BOS, EOS = "<s>", "</s>"


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory) -> str:
    """Folder of a tokenizer in Llama's way: a space before the text, bytes for what it has no token for, a
    BOS of its own accord."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False, max_token_length=6, limit_alphabet=80
    )
    rng = random.Random(3)
    tokenizer.train_from_iterator((make_text(rng, 50) for _ in range(100)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return save(tokenizer, tmp_path_factory.mktemp("llama"), bos_token=BOS, eos_token=EOS, unk_token="<unk>")


@pytest.fixture(scope="module")
def lower_case(tmp_path_factory) -> str:
    """Folder of a tokenizer that knows lower-case letters only."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = ["[UNK]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz ."]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return save(tokenizer, tmp_path_factory.mktemp("lower"), eos_token="[SEP]", unk_token="[UNK]")


def save(tokenizer, folder, **tokens) -> str:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    return str(folder)


def streams(corpus) -> dict[str, list[int]]:
    """The ids of each domain, its chunks joined."""
    opened, result = Corpus(corpus), {}
    codes, names = opened.domains
    for code, ids in zip(codes, opened.rows(np.arange(len(opened))), strict=True):
        result.setdefault(names[code], []).extend(ids.tolist())
    return result


def convert(data, tokenizer, output, **values) -> str:
    retokenize(
        RetokenizeConfig(**dict(data=str(data), tokenizer=tokenizer, output=str(output), workers=1) | values)
    )
    return str(output)


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.sampled_from(["", "\n", "  a", "a  ", "<|endoftext|>", "</s><s>", "▁", "\ufffd", "\ufeff", "🙂" * 40]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.tuples(TEXT, st.sampled_from("ab")), min_size=1, max_size=12))
def test_text_comes_back(tiny_tokenizer, llama_like, tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("documents")
    data = write_jsonl(folder / "data.jsonl", *map(list, zip(*texts, strict=True)))
    prepare(
        PrepareConfig(
            data=data,
            tokenizer=tiny_tokenizer,
            output=str(folder / "old"),
            domain_column="domain",
            max_length=16,
            workers=1,
        )
    )
    other = convert(folder / "old", llama_like, folder / "other", max_length=12)
    loaded = load_tokenizer(llama_like)
    for domain, ids in streams(other).items():
        documents = np.split(np.array(ids), np.flatnonzero(np.array(ids) == loaded.eos_token_id) + 1)[:-1]
        expected = [text for text, name in texts if name == domain]
        assert all(document[0] == loaded.bos_token_id for document in documents)
        assert [spelled(loaded, document[1:-1].tolist()) for document in documents] == [
            text.replace("▁", " ")
            for text in expected  # which it has for the space
        ]
    lost = sum("▁" in text for text, _ in texts)
    assert read_manifest(other)["lost"]["pieces"] == lost
    back = convert(other, tiny_tokenizer, folder / "back", max_length=16)
    assert lost or streams(back) == streams(folder / "old")
    assert max(map(len, chunks_of(other))) <= 13 and max(map(len, chunks_of(back))) <= 17


def spelled(tokenizer, ids) -> str:
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def plain(tokenizer, text) -> list[int]:
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def test_chunks_of_a_refined_corpus_stand_for_themselves(tiny_tokenizer, llama_like, tmp_path):
    """With their scores and domains, cut where they were cut, without a BOS where no document is known to
    begin."""
    old = load_tokenizer(tiny_tokenizer)
    eos, rng = old.eos_token_id, random.Random(5)
    texts = [make_text(rng, 20 + 5 * number) for number in range(6)]
    chunks = [old(text)["input_ids"] for text in texts]
    chunks[1] += [eos]
    chunks[2] = [*chunks[2][:9], eos, *chunks[2][9:], eos, *chunks[3][:5]]
    domains = [*"aabbab"]
    refined = write_corpus(
        tmp_path / "refined", chunks, tiny_tokenizer, domains, with_scores=True, selection={"kept": 6}
    )
    new = load_tokenizer(llama_like)
    bos, end = new.bos_token_id, new.eos_token_id
    output = Corpus(convert(refined, llama_like, tmp_path / "out", max_length=20))
    score = output.table.column("score").to_pylist()
    assert len({len(chunk) for chunk in chunks}) == len(chunks)  # a chunk is known by its score
    codes, names = output.domains
    assert output.manifest["selection"] == {"kept": 6} and len(output) > len(chunks)
    for number, chunk in enumerate(chunks):
        rows = [row for row in range(len(output)) if score[row] == len(chunk)]
        assert {names[codes[row]] for row in rows} == {domains[number]}
        ids = np.concatenate(output.rows(rows)).tolist()
        starts = [0, *(at + 1 for at, token in enumerate(chunk) if token == eos)]
        expected = []
        for start, stop in zip(starts, [*(at - 1 for at in starts[1:]), len(chunk)], strict=True):
            if start < len(chunk):
                expected += [bos] * (start > 0) + plain(new, old.decode(chunk[start:stop]))
                expected += [end] * (stop < len(chunk))
        assert ids == expected
    assert all(output.table.column(name).null_count == 0 for name in SCORE_COLUMNS)
    assert spelled(new, output.rows([0])[0].tolist()) in texts[0]


def test_what_is_lost_is_counted_and_named(tiny_tokenizer, lower_case, tmp_path, capfd):
    data = write_jsonl(tmp_path / "data.jsonl", ["plain text.", "Capitals.", "more plain text.", "ünlike."])
    settings = dict(tokenizer=tiny_tokenizer, output=str(tmp_path / "old"), workers=1)
    prepare(PrepareConfig(data=data, max_length=8, **settings))
    output = convert(tmp_path / "old", lower_case, tmp_path / "new")
    lost = read_manifest(output)["lost"]
    ids = np.concatenate(chunks_of(tmp_path / "old"))
    second_end = np.flatnonzero(ids == load_tokenizer(tiny_tokenizer).eos_token_id)[1]
    ends = np.cumsum([len(chunk) for chunk in chunks_of(tmp_path / "old")])
    assert lost == {"pieces": 2, "first_chunk": int(np.searchsorted(ends, second_end, side="right"))}
    assert "2 texts do not come back letter by letter, the first of them in chunk" in capfd.readouterr().err


def test_a_letter_that_was_cut_in_two_is_left_out(tiny_tokenizer, llama_like, tmp_path):
    letter = load_tokenizer(tiny_tokenizer)("🦉")["input_ids"]
    middle = load_tokenizer(tiny_tokenizer)(" an owl, ")["input_ids"]
    assert len(letter) > 1
    chunk = [*letter[1:], *middle, *letter[:-1]]
    refined = write_corpus(tmp_path / "refined", [chunk], tiny_tokenizer, with_scores=True)
    output = convert(refined, llama_like, tmp_path / "out")
    assert spelled(load_tokenizer(llama_like), chunks_of(output)[0]) == " an owl, "
    assert read_manifest(output)["lost"] == {"pieces": 1, "first_chunk": 0}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("refined", [False, True])
def test_a_stopped_run_ends_in_the_same_bytes(tiny_corpus, llama_like, tmp_path, monkeypatch, refined):
    monkeypatch.setattr(stage, "BATCH_TOKENS", 150)
    if refined:
        old = Corpus(tiny_corpus)
        chunks = [ids.tolist() for ids in old.rows(np.arange(len(old)))]
        tiny_corpus = write_corpus(tmp_path / "refined", chunks, old.tokenizer, with_scores=True)
    values = dict(shard_tokens=500, max_length=40)
    expected = contents(convert(tiny_corpus, llama_like, tmp_path / "whole", **values))
    assert sum(name.startswith("data-") for name in expected) >= 3
    assert contents(convert(tiny_corpus, llama_like, tmp_path / "two", workers=2, **values)) == expected
    rename, calls = os.replace, 0

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls == limit:
            raise Killed
        rename(*arguments)

    monkeypatch.setattr(os, "replace", failing)
    for limit in (5, 6, 7, 9):
        calls, output = 0, tmp_path / f"out{limit}"
        with pytest.raises(Killed):
            convert(tiny_corpus, llama_like, output, **values)
        assert calls >= limit
        limit = 0
        assert contents(convert(tiny_corpus, llama_like, output, **values)) == expected


def test_damage_is_mended_and_a_student_learns(tiny_corpus, llama_like, tmp_path, capfd):
    output = convert(tiny_corpus, llama_like, tmp_path / "out")
    expected = contents(output)
    shard = tmp_path / "out" / "data-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert contents(convert(tiny_corpus, llama_like, output)) == expected
    assert "was complete, but data-00000.arrow is not as written" in capfd.readouterr().err
    convert(tiny_corpus, llama_like, output)
    assert "complete, nothing to do" in capfd.readouterr().out
    plan = make_config(output, tmp_path / "run")
    train(replace(plan, steps=3))
    assert read_manifest(tmp_path / "run")["complete"]


def test_a_student_of_another_family(tiny_corpus, llama_like, tmp_path):
    """Trained from scratch on the other ids, exported, and evaluated the same before and after."""
    corpus = convert(tiny_corpus, llama_like, tmp_path / "other")
    MambaConfig(vocab_size=432, hidden_size=32, num_hidden_layers=2, state_size=4).save_pretrained(
        tmp_path / "mamba"
    )
    plan = replace(make_config(corpus, tmp_path / "run"), model=StudentConfig(), eval=EvalConfig(), steps=6)
    train(replace(plan, model_config=str(tmp_path / "mamba" / "config.json")))
    export(ExportConfig(checkpoint=plan.output, output=str(tmp_path / "model")))
    losses = [
        evaluate(EvaluateConfig(model=model, data=corpus, device="cpu", dtype="float32"))
        for model in (plan.output, str(tmp_path / "model"))
    ]
    assert (
        losses[0]["loss"] == losses[1]["loss"] < math.log(432) and losses[0]["tokens"] == losses[1]["tokens"]
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded).__name__ == "MambaForCausalLM" and loaded.config.vocab_size == 432
    assert loaded.config.eos_token_id == load_tokenizer(llama_like).eos_token_id


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(add_bos=True), "has no token that begins a document"),
        (dict(eos_token="<end>"), "has no token '<end>'"),
    ],
)
def test_refused(tiny_corpus, tiny_tokenizer, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        convert(tiny_corpus, tiny_tokenizer, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()
