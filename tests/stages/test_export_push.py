"""Uploads of an exported model, to a Hub that keeps what it is asked."""

from pathlib import Path

import pytest
from export_runs import card, publish

from miniplm.runtime.errors import UserError


class Hub:
    """HfApi as far as export uses it; keeps what it is asked."""

    endpoint = "https://huggingface.co"

    def __init__(self, failure=None):
        self.calls, self.failure = [], failure

    def __call__(self):
        return self

    def create_repo(self, repo_id, **settings):
        from huggingface_hub import RepoUrl

        self.calls.append(("create", repo_id, settings))
        if self.failure:
            raise self.failure
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(
            ("upload", repo_id, list(filter_repo_objects(names, ignore_patterns=ignore_patterns)))
        )
        self.readme = (Path(folder_path) / "README.md").read_text()


def test_push_to_hub(work, tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    folder = publish(work / "refined-student", tmp_path / "model")
    assert hub.calls == [] and "from_pretrained('model')" in card(folder).text
    publish(
        work / "refined-student", tmp_path / "model", push_to_hub="tiny", private=True
    )  # a complete folder is uploaded too
    files = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert hub.calls == [
        ("create", "tiny", {"private": True, "exist_ok": True}),
        ("upload", "me/tiny", files),
    ]
    assert "from_pretrained('me/tiny')" in hub.readme
    assert "me/tiny" in capsys.readouterr().out
    publish(work / "refined-student", tmp_path / "model")
    assert "is complete, nothing to do" in capsys.readouterr().out
    publish(work / "refined-student", tmp_path / "new", push_to_hub="org/tiny")
    assert hub.calls[2:] == [
        ("create", "org/tiny", {"private": False, "exist_ok": True}),
        ("upload", "org/tiny", files),
    ]


def test_a_card_that_was_edited_is_not_overwritten(work, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", hub := Hub())
    folder = publish(work / "refined-student", tmp_path / "model")
    (folder / "README.md").write_text("# Mine")
    with pytest.raises(UserError, match=r"README\.md is not as it was written"):
        publish(work / "refined-student", tmp_path / "model", push_to_hub="me/tiny")
    assert (folder / "README.md").read_text() == "# Mine" and not hub.calls


@pytest.mark.parametrize(
    "message", ["Token is required", "401 Client Error\n\nInvalid username or password."]
)
def test_push_that_fails(work, tmp_path, monkeypatch, message):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(OSError(message)))
    with pytest.raises(UserError, match="log in with `hf auth login`") as caught:
        publish(work / "refined-student", tmp_path / "model", push_to_hub="me/tiny")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.HfApi", hub := Hub())
    publish(
        work / "refined-student", tmp_path / "model", push_to_hub="me/tiny"
    )  # the folder stands, and the next run goes on from there
    assert hub.calls[-1][0] == "upload"


@pytest.mark.parametrize("name", ["me/tiny", "a/b/c", "--bad name"])
def test_push_with_the_real_client_offline(work, tmp_path, monkeypatch, name):
    """The Hub's own client, without a network (HF_HUB_OFFLINE is set for all tests): one line, whatever it
    raises."""
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with pytest.raises(UserError, match="could not be uploaded") as caught:
        publish(work / "refined-student", tmp_path / "model", push_to_hub=name)
    assert "\n" not in str(caught.value)


def test_push_without_a_connection(work, tmp_path, monkeypatch):
    """The Hub's own client against a port where nobody listens."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token=False))
    with pytest.raises(UserError, match=r"could not be uploaded.*refused"):
        publish(work / "refined-student", tmp_path / "model", push_to_hub="me/tiny")
