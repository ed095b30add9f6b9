"""export data: a corpus as the Hugging Face Hub has it."""

import os
import re
from pathlib import Path

import pytest
from corpora import chunks_of, write_corpus, write_scores
from outputs import contents
from rendered import RENDERERS, read
from selections import DOMAINS, REFERENCE, SCORES, TEACHER, kept_chunks, make_corpus, run_select

from miniplm.config import ExportDataConfig
from miniplm.data import parquet_files
from miniplm.data.tokenizer import load_tokenizer
from miniplm.runtime.errors import UserError
from miniplm.stages import export_data as stage
from miniplm.stages.export_data import export_data


@pytest.fixture
def refined(tmp_path, tiny_tokenizer, monkeypatch) -> Path:
    monkeypatch.setattr("miniplm.stages.select.SHARD_BYTES", 30)  # two files, or three
    corpus = make_corpus(tmp_path / "corpus", tiny_tokenizer)
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    run_select(corpus, scores, tmp_path / "refined")
    return tmp_path / "refined"


def publish(corpus, output, **settings) -> Path:
    export_data(ExportDataConfig(data=str(corpus), output=str(output), **settings))
    return Path(output)


def load(folder, cache):
    from datasets import load_dataset

    return load_dataset(str(folder), split="train", cache_dir=str(cache))


def test_datasets_opens_it(refined, tmp_path, monkeypatch, tiny_tokenizer):
    monkeypatch.setattr(parquet_files, "FILE_BYTES", 1)  # a file for each table
    folder = publish(refined, tmp_path / "data set")
    kept = kept_chunks(refined)
    data = load(folder, tmp_path / "cache")
    assert data["input_ids"][:] == chunks_of(refined) and len(kept) == 5
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    assert data["text"][:] == [tokenizer.decode(ids) for ids in chunks_of(refined)]
    assert len({*data["text"]}) == 5
    assert data["domain"][:] == [DOMAINS[row] for row in kept]
    assert data["score"][:] == [SCORES[row] for row in kept]
    assert data["num_tokens"][:] == [len(ids) for ids in chunks_of(refined)]
    names = sorted(path.name for path in (folder / "data").iterdir())
    assert names == [f"train-{n:05d}-of-{len(names):05d}.parquet" for n in range(len(names))]
    assert len(names) > 1


def test_the_card(refined, tmp_path):
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(publish(refined, tmp_path / "out", name="a|b", license="cc-by-4.0") / "README.md")
    assert (card.data.license, card.data.size_categories) == ("cc-by-4.0", ["n<1K"])
    assert {"miniplm", "data-selection"} <= {*card.data.tags}
    assert "# a&#124;b\n" in card.text and "No licence is named" not in card.text
    assert "5 of 11 chunks" in card.text and "`score`" in card.text and "bibtex" in card.text
    assert "load_dataset('out'" in card.text


def test_the_card_of_an_unselected_corpus_without_a_licence(tmp_path, tiny_tokenizer):
    domains = ["<script>alert(1)</script>", "a|b \u202e", *(f"d{number}" for number in range(60))]
    chunks = [[5] * (100 - row) for row in range(62)]
    corpus = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer, domains)
    text = (publish(corpus, tmp_path / "out") / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    assert "license" not in text.split("---\n")[1] and "No licence is named" in body
    assert "bibtex" not in body and "log_prob" not in body and "\u202e" not in body
    assert re.search(r"\| 22 smaller domains \| 22 \| [\d,]+ \|", body)
    total = sum(
        int(cell.replace(",", "")) for cell in re.findall(r"^\| [^|`]+ \| \d+ \| ([\d,]+) \|$", body, re.M)
    )
    assert total == sum(map(len, chunks))
    for name in RENDERERS:
        elements, _ = read(body, name)
        assert not any("script" in element for element in elements)


def test_an_equal_run_does_nothing_and_another_is_refused(refined, tmp_path, capsys):
    folder = publish(refined, tmp_path / "out")
    before = contents(folder)
    publish(refined, folder)
    assert "is complete, nothing to do" in capsys.readouterr().out and contents(folder) == before
    with pytest.raises(UserError, match="license"):
        publish(refined, folder, license="mit")
    with pytest.raises(UserError, match="corpus"):
        publish(tmp_path / "corpus", folder)


@pytest.mark.parametrize(
    "name", ["data/train-00000-of-00001.parquet", "README.md", "tokenizer/tokenizer.json"]
)
def test_damage_is_told(refined, tmp_path, name):
    folder = publish(refined, tmp_path / "out")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{name} is not as it was written")):
        publish(refined, folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=re.escape(f"{name} is missing")):
        publish(refined, folder)


def test_nothing_is_left_of_a_failure(refined, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(stage, "write_manifest", fail)  # the last file of all
    with pytest.raises(OSError, match="No space"):
        publish(refined, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".*")]


def test_push_to_hub(refined, tmp_path, monkeypatch, capsys):
    class Hub:
        endpoint = "https://huggingface.co"

        def __init__(self):
            self.calls = []

        def create_repo(self, name, **settings):
            from huggingface_hub import RepoUrl

            self.calls.append((name, settings))
            return RepoUrl(f"https://huggingface.co/datasets/me/{name}")

        def upload_folder(self, **settings):
            self.calls.append(settings)
            self.readme = (Path(settings["folder_path"]) / "README.md").read_text()

    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    folder = publish(refined, tmp_path / "out", push_to_hub="tiny", private=True)
    created, uploaded = hub.calls
    assert created == ("tiny", {"private": True, "exist_ok": True, "repo_type": "dataset"})
    assert (uploaded["repo_id"], uploaded["repo_type"]) == ("me/tiny", "dataset")
    assert uploaded["ignore_patterns"] == ["manifest.json"]
    assert "load_dataset('me/tiny'" in hub.readme
    assert "https://huggingface.co/datasets/me/tiny" in capsys.readouterr().out
    publish(refined, folder)  # the manifest knows the card that was uploaded
