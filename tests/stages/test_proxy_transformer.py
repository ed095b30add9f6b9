"""proxy fit --kind transformer: what it computes, resuming, and what is refused."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from corpora import chunks_of, read_score_files
from outputs import contents
from proxy_runs import EOS, Stopped, fit, load_proxy, predict, stop_at_call

from miniplm.config import ProxyFitConfig, TransformerConfig
from miniplm.models.loading import load_model
from miniplm.models.regression import ScoreRegressor, body_cost
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages import proxy_fit as fit_stage
from miniplm.training.regression import Regression, TransformerProxy, steps_of

pytestmark = pytest.mark.slow


def settings(reference, **changes) -> dict:
    own = dict(init_from=str(reference), epochs=6, lr=3e-3, batch_tokens=400)
    return dict(kind="transformer", transformer=TransformerConfig(**own | changes), device="cpu")


@pytest.fixture(scope="module")
def proxy(proxy_corpus, sample, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "proxy"
    fit(proxy_corpus, sample, folder, **settings(reference))
    return folder


def test_it_learns_and_its_predictions_are_those_of_plain_code(proxy_corpus, proxy, reference, tmp_path):
    manifest = read_json(proxy / "manifest.json")
    assert manifest["held_out"]["spearman"] > 0.7
    predict(proxy_corpus, proxy, tmp_path / "s", batch_tokens=90, device="cpu")
    found = read_score_files(tmp_path / "s")
    loaded, body = load_proxy(proxy), load_model(proxy / "model")
    for chunk, ids in list(enumerate(chunks_of(proxy_corpus)))[:12]:
        inputs = torch.tensor(ids[:-1])
        kept = inputs != EOS
        assert found["num_tokens"][chunk] == kept.sum()
        if not kept.any():
            assert np.isnan(found["score"][chunk])
            continue
        with torch.no_grad():
            hidden = body(inputs, torch.tensor([0, len(inputs)], dtype=torch.int32))[kept]
            number = (hidden @ loaded.model.weight).mean() + loaded.model.bias
        expected = loaded.mean + loaded.scale * number.item()
        assert found["score"][chunk] == pytest.approx(expected, abs=1e-4)
    assert np.isnan(found["teacher_log_prob"]).all()
    identity = read_json(tmp_path / "s" / "manifest.json")["identity"]
    assert (identity["batch_tokens"], identity["predicted_in"]) == (90, "float32")
    # The head does not count: nothing of it is computed.
    cost = body_cost(load_model(reference))
    positions = sum(len(ids) - 1 for ids in chunks_of(proxy_corpus))
    squares = sum((len(ids) - 1) ** 2 for ids in chunks_of(proxy_corpus))
    flops = read_json(tmp_path / "s" / "manifest.json")["flops"]["proxy"]
    assert flops == cost.per_token * positions + cost.per_square * squares
    assert cost.per_token == load_model(reference).flops_per_token(0) - 2 * 500 * 16


def test_a_stopped_fit_ends_in_the_same_bytes(proxy_corpus, sample, proxy, reference, tmp_path, monkeypatch):
    folder = tmp_path / "proxy"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(fit_stage, "SAVE_SECONDS", 0.0)
        stop_at_call(patch, Regression, "train", 20)
        fit(proxy_corpus, sample, folder, **settings(reference))
    taken = []
    train = Regression.train
    monkeypatch.setattr(Regression, "train", lambda *arguments: taken.append(1) or train(*arguments))
    fit(proxy_corpus, sample, folder, **settings(reference))
    assert contents(folder) == contents(proxy)
    resumed = len(taken)
    fit(proxy_corpus, sample, tmp_path / "whole", **settings(reference))
    assert resumed == len(taken) - resumed - 19


def test_damage_and_what_does_not_go_together(proxy_corpus, sample, proxy, reference, tmp_path):
    folder = shutil.copytree(proxy, tmp_path / "proxy")
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    with pytest.raises(UserError, match=r"is damaged: model/model\.safetensors is not as it was written"):
        predict(proxy_corpus, folder, tmp_path / "s")
    fit(proxy_corpus, sample, folder, **settings(reference))
    assert contents(folder) == contents(proxy)
    other = shutil.copytree(reference, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end|>"))
    config = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(config.replace("<|endoftext|>", "<|end|>"))
    with pytest.raises(UserError, match=r"the tokenizer of .*other is not the corpus's"):
        fit(proxy_corpus, sample, tmp_path / "new", **settings(other))
    with pytest.raises(UserError, match="does not exist"):
        fit(proxy_corpus, sample, tmp_path / "new", **settings(tmp_path / "nowhere"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"kind transformer goes with transformer\.init_from"):
        ProxyFitConfig("d", "s", "o", kind="transformer")


def test_each_epoch_takes_every_chunk_once():
    lengths = np.random.default_rng(0).integers(2, 60, 100)
    steps = steps_of(lengths, 200, 3, 5)
    assert all((lengths[step] - 1).sum() <= 200 for step in steps)
    places = np.concatenate(steps)
    epochs = [places[start : start + 100].tolist() for start in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs) and epochs[0] != epochs[1]
    bounds = np.cumsum([0, *map(len, steps)])
    assert {0, 100, 200, 300} <= set(bounds.tolist()) and all(
        stop > start for start, stop in pairwise(bounds)
    )


def test_a_step_goes_downhill(reference):
    """The gradient reaches the body as well as the vector."""
    rng = np.random.default_rng(0)
    chunks = [rng.integers(1, 500, 30) for _ in range(8)]
    scores = rng.normal(size=8)
    model = ScoreRegressor(load_model(reference))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = Regression(
        TransformerProxy(model, 0.0, 1.0, EOS, False, torch.float32, 400), 1e-2, [np.arange(8)] * 30
    )
    losses = [run.train(chunks, scores) for _ in range(30)]
    assert losses[0] == pytest.approx(np.mean(scores**2), rel=1e-5) and losses[-1] < losses[0] / 4
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before)
