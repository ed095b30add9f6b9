"""The demo at toy size, from its text to its report; killed runs continue by the rules of the stages."""

import random
import re

import pytest
from texts import make_text

from miniplm.config import DemoConfig
from miniplm.demo import command, estimate, noise, text
from miniplm.runtime.errors import UserError


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Two domains of random text, and the demo's stages with small models and two steps each."""
    stages = command.PIPELINE.read_text()
    rng = random.Random(0)
    domains = {name: [make_text(rng, 150) for _ in range(40)] for name in ("docs", "code")}
    monkeypatch.setattr(text, "_collect", lambda: domains)
    for module, name, value in (
        (noise, "PER_KIND", 4),
        (noise, "MIN_LETTERS", 100),
        (text, "VOCABULARY", 400),
        (command, "VOCABULARY", 400),
        (estimate, "TIMED_SECONDS", 0.01),
        (command, "PIPELINE", tmp_path / "demo.yaml"),
    ):
        monkeypatch.setattr(module, name, value)
    for pattern, value in (
        (r"steps: \d+\n", "steps: 2\n"),
        (r"hidden_size: \d+", "hidden_size: 24"),
        (r"intermediate_size: \d+", "intermediate_size: 16"),
        (r"num_attention_heads: \d", "num_attention_heads: 2"),
        (r"batch_tokens: \d+", "batch_tokens: 512"),
        (r"max_length: \d+", "max_length: 64\n  workers: 1"),
        (r"max_new_tokens: \d+", "max_new_tokens: 3"),
    ):
        stages = re.sub(pattern, value, stages)
    (tmp_path / "demo.yaml").write_text(stages)


@pytest.mark.slow
def test_text_to_report(toy, tmp_path, capsys):
    settings = DemoConfig(output=str(tmp_path / "out"), seed=3)
    command.demo(settings)
    said = capsys.readouterr().out
    assert re.search(r"\nThis will take about \d+ (seconds|minutes)", said)
    for kind in (*noise.IN_DEMO, "all noise", "clean: docs", "clean: code"):
        assert re.search(rf"│ {kind} +│ +[\d,]+ │ +\d+% │ +\d+% │ +\d+% │", said), kind
    for domain in ("docs", "code", "all"):
        assert re.search(rf"\n{domain}: .+ \d\.\d{{4}}", said), domain
    assert "What these figures do not show" in said and (tmp_path / "out" / "report.html").is_file()
    command.demo(settings)
    again = capsys.readouterr().out
    assert again.count("nothing to do") == 18  # every stage but generate
    assert said[said.index("Dropped of the pool") :] == again[again.index("Dropped of the pool") :]
    with pytest.raises(UserError, match="holds another text run"):
        command.demo(DemoConfig(output=str(tmp_path / "out"), seed=4))
