from pathlib import Path

import pytest
import yaml

from miniplm import config
from miniplm.config.fields import Schema

CONFIGS = Path(__file__).parents[2] / "configs"


def parse(settings, *arguments):
    return config.from_arguments(settings, list(arguments), prog="test")


def test_flags_in_both_spellings_lists_booleans_and_negative_numbers():
    select = parse(
        config.SelectConfig,
        "--data",
        "d",
        "--output=o",
        "--scores",
        "a",
        "--scores",
        "b",
        "--per-domain",
        "--token_budget",
        "7",
    )
    assert (
        select.scores == ["a", "b"]
        and select.per_domain
        and select.token_budget == 7
        and select.ratio is None
    )
    assert parse(config.SelectConfig, "--data", "d", "--output", "o", "--scores", "a", "b").scores == [
        "a",
        "b",
    ]
    assert (
        parse(
            config.SelectConfig, "--data", "d", "--output", "o", "--scores", "a", "--threshold", "-0.5"
        ).threshold
        == -0.5
    )
    assert parse(config.SelectConfig, "--data", "d", "--output", "o", "--scores", "a").ratio == 0.5
    assert parse(
        config.PrepareConfig, "--data", "d", "--tokenizer", "t", "--output", "o", "--take", "0", "0.05"
    ).take == (0.0, 0.05)
    assert parse(config.GenerateConfig, "--model", "m", "--prompt", "").prompt == ""
    assert parse(config.GenerateConfig, "--model", "m", "--prompt", "2 + 2 =").prompt == "2 + 2 ="


def test_yaml_and_flags_together(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("data: d\nmodel: {hidden_size: 64, num_attention_heads: 4}\noptimizer: {lr: 1.0e-3}\n")
    train = parse(config.TrainConfig, "--config", str(file), "--output", "o", "--optimizer.warmup-steps", "3")
    assert (train.data, train.model.hidden_size, train.optimizer.lr, train.optimizer.warmup_steps) == (
        "d",
        64,
        1e-3,
        3,
    )


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (
            config.SelectConfig,
            ["--data", "d", "--output", "o", "--scores", "a", "--ratio", "0"],
            "ratio must be above 0",
        ),
        (
            config.SelectConfig,
            ["--data", "d", "--output", "o", "--scores", "a", "--ratio", "2"],
            "ratio must be above 0",
        ),
        (
            config.SelectConfig,
            ["--data", "d", "--output", "o", "--scores", "a", "--ratio", ".nan"],
            "ratio must be above 0",
        ),
        (
            config.SelectConfig,
            ["--data", "d", "--output", "o", "--scores", "a", "--ratio", "0.5", "--threshold", "0"],
            "one of ratio",
        ),
        (config.SelectConfig, ["--data", "d", "--output", "o", "--scores", "a", "--raito", "0.5"], "raito"),
        (
            config.SelectConfig,
            ["--data", "d", "--output", "o", "--scores", "a", "--ratio", "half"],
            "ratio: expected a number, got 'half'",
        ),
        (config.SelectConfig, ["--data", "d"], "required"),
        (config.ScoreConfig, ["--data", "d", "--output", "o"], "--teacher, --reference, or both"),
        (
            config.PrepareConfig,
            ["--data", "d", "--tokenizer", "t", "--output", "o", "--take", "0.5", "0.5"],
            "take",
        ),
        (
            config.PrepareConfig,
            ["--data", "d", "--tokenizer", "t", "--output", "o", "--max-length", "0"],
            "max_length",
        ),
        (config.TrainConfig, ["--data", "d", "--output", "o", "--model.hidden_size", "65"], "not a multiple"),
        (config.TrainConfig, ["--data", "d", "--output", "o", "--model.depth", "2"], "depth"),
        (
            config.TrainConfig,
            ["--data", "d", "--output", "o", "--init-from", "m", "--model.hidden_size", "96"],
            "no say beside",
        ),
        (config.TrainConfig, ["--data", "d", "--output", "o", "--seed", "-1"], "seed must not be negative"),
        (config.TrainConfig, ["--data", "d", "--output", "o", "--config", "/nowhere.yaml"], "does not exist"),
    ],
)
def test_mistakes_are_named_in_one_line(settings, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(settings, *arguments)
    assert "\n" not in str(caught.value)


def test_from_dict_refuses_unknown_keys_and_wrong_types():
    with pytest.raises(ValueError, match="flavour"):
        config.from_dict(config.ScoreConfig, {"data": "d", "output": "o", "teacher": "t", "flavour": 1})
    with pytest.raises(ValueError, match="batch_tokens"):
        config.from_dict(
            config.ScoreConfig, {"data": "d", "output": "o", "teacher": "t", "batch_tokens": "many"}
        )


@pytest.mark.parametrize(
    "settings", [value for name, value in vars(config).items() if name.endswith("Config")]
)
def test_every_setting_has_a_doc_string(settings):
    schema = Schema(settings)
    assert [name for name in [*schema.kinds, *schema.groups] if not schema.docs.get(name)] == []
    assert settings.__doc__.strip()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("qwen_104m_reference", 104),
        ("qwen_200m", 203),
        ("qwen_500m", 464),
        ("qwen_1.2b", 1161),
        ("llama3_212m", 212),
    ],
)
def test_published_configs_have_the_published_size(name, millions):
    import torch

    from miniplm.models.decoder import Decoder, student_config

    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    train = config.from_dict(config.TrainConfig, {"data": "d", "output": "o", **values})
    with torch.device("meta"):
        model = Decoder(student_config(train.model, train.model.vocab_size, 0))
    assert round(model.num_parameters() / 1e6) == millions
