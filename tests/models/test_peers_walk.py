"""The walk over transformers' models (make peers) tells what is equal, refused, different and silent."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from miniplm.models import transformers_attention


@pytest.fixture
def peers(monkeypatch, request):
    """tests/peers on the path, as it is for its scripts."""
    monkeypatch.syspath_prepend(request.config.rootpath / "tests" / "peers")


def lines(capsys, *model_types):
    """(what the walk ends with, its lines without their times)."""
    import walk

    code = walk.main(list(model_types))
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    return code, [(words[0], words[1]) for words in found[: len(model_types)]]


def test_equal_and_refused(peers, capsys):
    assert lines(capsys, "llama", "mamba") == (0, [("equal", "llama"), ("refused", "mamba")])


def test_a_wrong_attention_is_told(peers, capsys, monkeypatch):
    attend = transformers_attention._attend
    monkeypatch.setattr(
        transformers_attention, "_attend", lambda q, k, v, *others: attend(q, k, v.roll(1, 2), *others)
    )
    assert lines(capsys, "gpt2") == (1, [("DIFFERS", "gpt2")])


def test_an_error_that_is_not_ours_is_told(peers, capsys, monkeypatch):
    def broken(*_):
        raise TypeError("broken")

    monkeypatch.setattr(transformers_attention, "_attend", broken)
    assert lines(capsys, "gpt2") == (1, [("RAW", "gpt2")])


def test_an_op_that_never_runs_is_told(peers, capsys, monkeypatch):
    monkeypatch.setattr(transformers_attention, "_refuse_model", lambda model: None)
    assert lines(capsys, "mamba") == (1, [("SILENT", "mamba")])


@pytest.mark.parametrize("model_type", transformers_attention.OWN_CODE)
def test_listed_by_type(model_type, peers):
    """What the code of a model does not tell is listed by its type: all are types that there are."""
    from tiny_configs import tiny_config

    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    with torch.device("meta"), pytest.raises(ValueError, match=r"in code of its own"):
        AutoModelForCausalLM.from_config(
            tiny_config(CONFIG_MAPPING[model_type]), attn_implementation="miniplm"
        )
