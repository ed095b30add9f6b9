"""config.json of a model that says what cannot be: one line, before anything is made by it."""

import json
import resource
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_models import ADAPTED, DECODED, random_model, saved

from miniplm.models.architecture import check_memory, read_config
from miniplm.models.loading import load_model, load_with_transformers
from miniplm.runtime.errors import UserError

ROPE = "rope_parameters"
ABSURD = [
    ("num_attention_heads", 0),
    ("num_attention_heads", 3),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("num_hidden_layers", 10**12),
    ("num_hidden_layers", True),
    ("hidden_size", -1),
    ("hidden_size", "x"),
    ("hidden_size", None),
    ("intermediate_size", 10**12),
    ("intermediate_size", float("nan")),
    ("vocab_size", 2**70),
    ("head_dim", 15),
    ("head_dim", 0),
    ("eos_token_id", 10**12),
    ("eos_token_id", [0, -7]),
    ("rms_norm_eps", float("nan")),
    ("initializer_range", -1.0),
    ("hidden_act", "sloth"),
    ("model_type", "sloth"),
    (ROPE, {"rope_type": "sloth", "rope_theta": 1e4}),
    (ROPE, {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
    (ROPE, {"rope_type": "linear", "rope_theta": 1e4}),
    (ROPE, {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
    (ROPE, {"rope_type": "default", "rope_theta": "x"}),
    (ROPE, {"rope_type": "default", "rope_theta": float("inf")}),
    (ROPE, []),
    ("tie_word_embeddings", "yes"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models = {"qwen2": DECODED["qwen2 mha tied"], "gpt2": ADAPTED["gpt2"]}
    return {name: saved(random_model(settings), root / name) for name, settings in models.items()}


@pytest.fixture
def little_memory():
    """A process that can take 3 GB more, and no more."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 3 * 2**30
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused_or_loaded(folder, content) -> list[str | None]:
    """What each way to a model says to a config.json: one line, or None where it makes one."""
    path = folder / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(content))

    def made_from_nothing():
        check_memory(read_config(path), 16, str(path))

    said: list[str | None] = []
    try:
        for make in (lambda: load_model(folder), lambda: load_with_transformers(folder, torch.float32)):
            said.append(refusal(make))
        said.append(refusal(made_from_nothing))
    finally:
        path.write_text(whole)
    return said


def refusal(make) -> str | None:
    try:
        make()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and "allocate" not in text and len(text) < 1_000
        return text
    return None


@pytest.mark.parametrize(("name", "value"), ABSURD)
def test_absurd_settings_are_refused(folders, little_memory, name, value):
    folder = folders["qwen2"]
    content = json.loads((folder / "config.json").read_text())
    if name == "intermediate_size":
        assert refused_or_loaded(folder, content) == [None] * 3  # what is right is taken
    for text in refused_or_loaded(folder, content | {name: value}):
        assert text is not None and str(folder) in text


strange = st.sampled_from(
    [None, True, 0, -1, 3, 15, 10**6, 10**12, 2**70, 0.5, 1e308, float("nan"), float("inf"), "x", "", [], {}]
    + [[1], {"rope_type": "yarn"}, {"a": {"b": 1}}]
)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_any_settings_are_refused_or_taken(folders, little_memory, name):
    folder = folders[name]
    right = json.loads((folder / "config.json").read_text())
    changes = st.dictionaries(
        st.sampled_from([*right, "head_dim", "rope_scaling"]), strange, min_size=1, max_size=3
    )

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(changes | st.sampled_from([{"vocab_size": 10**7, "hidden_size": 10**6}]))
    def check(changed):
        refused_or_loaded(folder, right | changed)

    check()


def test_a_model_larger_than_the_memory(folders, monkeypatch):
    config = read_config(folders["qwen2"])
    parameters = load_model(folders["qwen2"]).num_parameters()
    monkeypatch.setattr("miniplm.models.architecture.machine_bytes", lambda: 16 * parameters)
    check_memory(config, 16, "model.*")
    monkeypatch.setattr("miniplm.models.architecture.machine_bytes", lambda: 16 * parameters - 1)
    with pytest.raises(UserError, match=rf"model\.\* describes a model of {parameters:,} parameters"):
        check_memory(config, 16, "model.*")
    monkeypatch.setattr("miniplm.models.loading.machine_bytes", lambda: 4 * parameters - 1)
    with pytest.raises(UserError, match=r"the weights in .* GB of memory, this machine has"):
        load_model(folders["qwen2"])
    load_model(folders["qwen2"], torch.bfloat16)
