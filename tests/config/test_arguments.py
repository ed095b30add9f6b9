"""Flags, YAML files and Python values → settings; mistakes in one line."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from miniplm import config
from miniplm.config.fields import Schema

CONFIGS = Path(__file__).parents[2] / "configs"
SELECT = ["--data", "d", "--output", "o", "--scores", "a"]
TRAIN = ["--data", "d", "--output", "o"]


def parse(settings, *arguments):
    return config.from_arguments(settings, list(arguments), prog="test")


def select(*arguments):
    return parse(config.SelectConfig, *SELECT, *arguments)


def train(*arguments):
    return parse(config.TrainConfig, *TRAIN, *arguments)


def test_flags_in_both_spellings_and_the_later_wins():
    found = parse(
        config.SelectConfig, "--data", "c", *SELECT[:2], "--output=o", "--scores", "a", "--per-domain"
    )
    assert (found.data, found.output, found.per_domain, found.ratio) == ("d", "o", True, 0.5)
    assert select("--token_budget", "7") == select("--token-budget=7")
    assert select("--threshold", "-0.5").threshold == -0.5
    assert train("--model.hidden-size", "24") == train("--model.hidden_size", "24")
    assert train("--model.hidden-size", "24").model.hidden_size == 24


def test_lists_by_repetition_in_one_go_and_as_yaml():
    assert select("--scores", "b").scores == ["a", "b"]
    flags = ["--data", "d", "--output", "o", "--scores"]
    assert parse(config.SelectConfig, *flags, "a", "3").scores == ["a", "3"]
    assert parse(config.SelectConfig, *flags, "[a, b]").scores == ["a", "b"]
    prepare = parse(config.PrepareConfig, *TRAIN, "--tokenizer", "t", "--take", "0", "0.05")
    assert prepare.take == (0.0, 0.05)
    for betas in (["0.9", "0.95"], ["[0.9, 0.95]"], ["0.9", "--optimizer.betas", "0.95"]):
        assert train("--optimizer.betas", *betas).optimizer.betas == (0.9, 0.95)
    export = parse(config.ExportConfig, "--checkpoint", "c", "--output", "o", "--language", "de", "en")
    assert export.language == ("de", "en") and export.datasets == ()


BOOLEANS = [
    (settings, name)
    for settings in config.STAGES.values()
    for name, kind in Schema(settings).kinds.items()
    if kind is bool
]


@pytest.mark.parametrize(("settings", "name"), BOOLEANS)
def test_every_boolean_stands_alone_or_takes_a_value_or_no(settings, name):
    schema = Schema(settings)
    one_of = {config.ScoreConfig: ["--teacher=x"], config.EvaluateConfig: ["--data=x"]}.get(settings, [])
    required = [f"--{each}=x" for each in schema.kinds if each not in schema.defaults] + one_of

    def value(*flags):
        found = parse(settings, *required, *flags)
        for part in name.split("."):
            found = getattr(found, part)
        return found

    dashes = name.replace("_", "-")
    for flags in ([f"--{name}"], [f"--{dashes}"], [f"--{name}", "true"], [f"--no-{dashes}", f"--{dashes}"]):
        assert value(*flags) is True, flags
    for flags in ([f"--no-{dashes}"], [f"--no_{name}"], [f"--{dashes}=false"], [f"--{name}", f"--no-{name}"]):
        assert value(*flags) is False, flags
    with pytest.raises(ValueError, match="stands alone"):
        value(f"--no-{dashes}", "true")
    with pytest.raises(ValueError, match="expected true or false, got 'x'"):
        value(f"--{dashes}", "x")


def test_text_stays_text():
    for prompt in ("", "2 + 2 =", "5", "null", "a: b", "[1]", "-x", "&a [*a]"):
        assert parse(config.GenerateConfig, "--model", "m", "--prompt", prompt).prompt == prompt
        assert parse(config.GenerateConfig, "--model", "m", f"--prompt={prompt}").prompt == prompt
    assert train("--init-from", "null").init_from is None


def test_yaml_and_flags_together(tmp_path):
    file, group = tmp_path / "train.yaml", tmp_path / "model.yaml"
    file.write_text("data: d\nmodel: {hidden_size: 64, num_attention_heads: 4}\noptimizer: {lr: 1e-3}\n")
    found = parse(config.TrainConfig, "--config", str(file), "--output", "o", "--optimizer.warmup-steps", "3")
    assert (found.data, found.optimizer.lr, found.optimizer.warmup_steps) == ("d", 1e-3, 3)
    assert (found.model.hidden_size, found.model.num_attention_heads) == (64, 4)
    assert found == parse(config.TrainConfig, "--optimizer.lr", "5", "--config", str(file), "--output", "o",
                          "--optimizer.warmup_steps=3")  # fmt: skip
    group.write_text("hidden_size: 48\n")
    for flag in ([f"--model={group}"], ["--model", "{hidden_size: 48}"]):
        assert train(*flag).model == config.StudentConfig(hidden_size=48)
    file.write_text(f"data: d\nmodel: {group}\n")
    assert parse(config.TrainConfig, "--config", str(file), "--output", "o").model.hidden_size == 48


def test_print_config_writes_what_config_reads(capsys, tmp_path):
    flags = [
        "--eval-data",
        "e",
        "--optimizer.betas",
        "0.5",
        "0.75",
        "--no-shuffle",
        "--optimizer.eps",
        "1e-5",
    ]
    for option in ("--print-config", "--print_config=skip_default"):
        with pytest.raises(SystemExit) as ended:
            train(*flags, option)
        assert ended.value.code == 0
        (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
        assert parse(config.TrainConfig, "--config", str(tmp_path / "all.yaml")) == train(*flags)
    assert "hidden_size" not in (tmp_path / "all.yaml").read_text()


MISTAKES = [
    (config.SelectConfig, [*SELECT, "--raito", "0.5"], "there is no setting 'raito': did you mean ratio?"),
    (config.SelectConfig, [*SELECT, "--ratio", "half"], "ratio: expected a number, got 'half'"),
    (config.SelectConfig, [*SELECT, "--ratio", "0.1", "0.2"], "ratio takes one value, got 2"),
    (config.SelectConfig, [*SELECT, "--ratio"], "ratio takes one value, got none"),
    (config.SelectConfig, [*SELECT, "x", "y", "--no-ratio"], "there is no setting 'no_ratio'"),
    (config.SelectConfig, ["x", *SELECT], "unexpected 'x'"),
    (config.SelectConfig, ["--data", "d"], "scores and output are required"),
    (config.ScoreConfig, ["--teacher", "t", "--precision", "fp4"], "precision: expected fp8, got 'fp4'"),
    (config.TrainConfig, [*TRAIN, "--model.depth", "2"], "there is no setting 'model.depth'"),
    (config.TrainConfig, [*TRAIN, "--hidden-size", "2"], "did you mean model.hidden_size?"),
    (config.TrainConfig, [*TRAIN, "--eval-dta", "2"], "did you mean eval.data?"),
    (config.TrainConfig, [*TRAIN, "--steps", "1.5"], "steps: expected a whole number, got '1.5'"),
    (config.TrainConfig, [*TRAIN, "--steps", "9" * 5000], "steps: expected a whole number, got '999"),
    (config.TrainConfig, [*TRAIN, "--optimizer.betas", "0.9"], "betas: expected 2 numbers, got ['0.9']"),
    (config.TrainConfig, [*TRAIN, "--dtype", "int8"], "expected one of auto, float32, bfloat16, float16"),
    (config.TrainConfig, [*TRAIN, "--model.model_type", "t5"], "model.model_type: expected one of qwen2,"),
    (config.TrainConfig, [*TRAIN, "--model", "[1]"], "[1] does not exist"),
    (config.TrainConfig, [*TRAIN, "--model", "{a: {b: [}"], "not valid YAML"),
    (config.TrainConfig, [*TRAIN, "--config", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
    (config.TrainConfig, [*TRAIN, "--config", "/dev/zero"], "/dev/zero is not a file"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "arguments", "message"), MISTAKES)
def test_mistakes_are_named_in_one_line(settings, arguments, message):
    required = ["--data", "d", "--output", "o"] if settings is config.ScoreConfig else []
    with pytest.raises(ValueError) as caught:
        parse(settings, *required, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert not any(word in str(caught.value) for word in ("typing", "<class", "Parser"))


def test_python_values():
    values = {"data": Path("d"), "output": "o", "model": {"hidden_size": np.int64(24)}, "steps": 3}
    expected = train("--model.hidden_size", "24", "--steps", "3")
    assert config.from_dict(config.TrainConfig, values) == expected
    assert config.from_dict(config.TrainConfig, {**values, "model": expected.model}) == expected
    values["optimizer"] = {"betas": (0.5, 0.75), "lr": 1}
    assert config.from_dict(config.TrainConfig, values).optimizer.betas == (0.5, 0.75)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flavour": 1}, "there is no setting 'flavour'"),
        ({1: 2}, "the name of a setting must be text, got 1"),
        ({"steps": "many"}, "steps: expected a whole number, got 'many'"),
        ({"steps": True}, "steps: expected a whole number, got true"),
        ({"steps": 10**5000}, "steps is out of range: a number of hundreds of digits"),
        ({"steps": "[&a [x, x], &b [*a, *a], &c [*b, *b], &d [*c, *c], &e [*d, *d], *e]"}, "steps: expected"),
        ({"steps": "&a [*a]"}, "steps: expected a whole number, got '&a [*a]'"),
        ({"optimizer": {"betas": "&a [*a, *a]"}}, "optimizer.betas: expected 2 numbers, got '&a [*a, *a]'"),
        ({"steps": 2**64}, "steps is out of range"),
        ({"seed": None}, "seed: expected a whole number, got null"),
        ({"dtype": None}, "dtype: expected one of"),
        ({"shuffle": 1}, "shuffle: expected true or false, got 1"),
        ({"data": 3}, "data: expected text, got 3"),
        ({"data": b"d"}, "data: expected text, got b'd'"),
        ({"model": 3}, "model: expected settings of its own (model.…), got 3"),
        ({"model": None}, "model: expected settings of its own (model.…), got null"),
        ({"model": config.OptimizerConfig()}, "model: expected settings of its own (model.…), got Opt"),
        ({"model": {"class_path": "os.system"}}, "there is no setting 'model.class_path'"),
        ({"model": {"hidden_size": 24}, "model.hidden_size": 24}, "model.hidden_size is given twice"),
        ({"optimizer": {"betas": [0.5, [[]]]}}, "optimizer.betas: expected 2 numbers, got [0.5, [[]]]"),
        ({"optimizer": {"lr": 10**400}}, "optimizer.lr: expected a number, got a number of hundreds"),
    ],
)
def test_python_values_that_are_wrong(changed, message):
    with pytest.raises(ValueError) as caught:
        config.from_dict(config.TrainConfig, {"data": "d", "output": "o", **changed})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [value for name, value in vars(config).items() if name.endswith("Config")]
)
def test_every_setting_has_a_doc_string(settings):
    schema = Schema(settings)
    assert [name for name in [*schema.kinds, *schema.groups] if not schema.docs.get(name)] == []
    assert settings.__doc__.strip()


def test_help_tells_defaults_that_depend_on_the_device(capsys):
    with pytest.raises(SystemExit):
        parse(config.ScoreConfig, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Default: {config.SHARD_CHUNKS.cpu:,} on the CPU, {config.SHARD_CHUNKS.gpu:,} on a GPU." in shown


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
    found = config.from_dict(config.TrainConfig, {"data": "d", "output": "o", **values})
    with torch.device("meta"):
        model = Decoder(student_config(found.model, found.model.vocab_size, 0))
    assert round(model.num_parameters() / 1e6) == millions
