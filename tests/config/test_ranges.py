"""Every setting has a range, and says so in one line."""

import math

import pytest

from miniplm import config

SCORE = dict(data="d", output="o", teacher="t")
PREPARE = dict(data="d", output="o", tokenizer="t")
TRAIN = dict(data="d", output="o")
SELECT = dict(data="d", output="o", scores=["s"])
GENERATE = dict(model="m", prompt="p")
EVALUATE = dict(data="d", model="m")
EXPORT = dict(checkpoint="c", output="o")

WRONG = [
    (config.PrepareConfig, PREPARE, "max_length", [0, -1, 2**20 + 1]),
    (config.PrepareConfig, PREPARE, "take", [(0.5, 0.5), (0, 1.5), (-1, 1), (math.nan, 1), (0, math.nan)]),
    (config.PrepareConfig, PREPARE, "max_bad_fraction", [-0.1, 1.1, math.nan, math.inf]),
    (config.PrepareConfig, PREPARE, "workers", [0, -1, 10**6]),
    (config.PrepareConfig, PREPARE, "shard_tokens", [0, 2**31]),
    (config.PrepareConfig, PREPARE, "text_column", ["", "a\0b"]),
    (config.ScoreConfig, SCORE, "batch_tokens", [0, 10**13]),
    (config.ScoreConfig, SCORE, "shard_chunks", [0, 10**13]),
    (config.ScoreConfig, SCORE, "vocab_size", [0, 10**13]),
    (config.ScoreConfig, SCORE, "device", ["meta", "cuda:x", "cuda:-1", "cpu\n", "CPU", "", "gpu"]),
    (config.ScoreConfig, SCORE, "profile", ["trace", "", "/dev/null"]),
    (config.ScoreConfig, SCORE, "teacher", ["", "a\0b", "\ud800"]),
    (config.SelectConfig, SELECT, "ratio", [0, 2, math.nan, -1]),
    (config.SelectConfig, SELECT, "token_budget", [0, 2**63]),
    (config.SelectConfig, SELECT, "threshold", [math.nan, math.inf]),
    (config.SelectConfig, SELECT, "random_seed", [-1, 2**64 - 1 + 1]),
    (config.SelectConfig, SELECT, "scores", [[], ["a", "b", "c"], [""], ["a", "b\0"]]),
    (config.EvaluateConfig, EVALUATE, "batch_tokens", [0, 10**13]),
    (config.EvaluateConfig, EVALUATE, "output", ["", "/dev/null", "a\0", "/", ".."]),
    (config.RunConfig, dict(config="c"), "output", ["", ".", "..", "/", "/dev/null", "a\0"]),
    (config.GenerateConfig, GENERATE, "max_new_tokens", [0, 10**13]),
    (config.GenerateConfig, GENERATE, "temperature", [-1, math.inf, math.nan]),
    (config.GenerateConfig, GENERATE, "top_p", [0, 1.1, math.nan]),
    (config.GenerateConfig, GENERATE, "seed", [-1, 2**70]),
    (config.ExportConfig, EXPORT, "language", [("en", "")]),
    (config.ExportConfig, EXPORT, "name", ["", "a\0"]),
    (config.TrainConfig, TRAIN, "steps", [0, 2**31]),
    (config.TrainConfig, TRAIN, "batch_tokens", [0, 10**13]),
    (config.TrainConfig, TRAIN, "micro_batch_tokens", [0, 10**13]),
    (config.TrainConfig, TRAIN, "seed", [-1, 2**70]),
    (config.TrainConfig, TRAIN, "log_interval", [0, 10**13]),
    (config.TrainConfig, TRAIN, "max_skipped_steps", [0]),
    (config.TrainConfig, TRAIN, "device", ["meta"]),
    (config.TrainConfig, TRAIN, "peak_tflops", [0, -1, math.inf, math.nan]),
    (config.StudentConfig, {}, "hidden_size", [0, -12, 10**12]),
    (config.StudentConfig, {}, "intermediate_size", [0, 10**12]),
    (config.StudentConfig, {}, "num_hidden_layers", [0, -1, 10**12]),
    (config.StudentConfig, {}, "num_attention_heads", [0, -1, 10**12]),
    (config.StudentConfig, {}, "num_key_value_heads", [0, -1, 5, 10**12]),
    (config.StudentConfig, {}, "head_dim", [0, -2, 1, 15, 258, 10**12]),
    (config.StudentConfig, {}, "vocab_size", [0, 10**12]),
    (config.StudentConfig, {}, "max_position_embeddings", [0, 10**12]),
    (config.StudentConfig, {}, "rope_theta", [0.0, -1.0, math.inf, math.nan]),
    (config.StudentConfig, {}, "rms_norm_eps", [0.0, -1.0, math.inf, math.nan]),
    (config.StudentConfig, {}, "initializer_range", [-1.0, math.inf, math.nan]),
    (config.OptimizerConfig, {}, "lr", [0.0, -1.0, math.inf, math.nan]),
    (config.OptimizerConfig, {}, "eps", [0.0, -1.0, math.inf, math.nan]),
    (config.OptimizerConfig, {}, "weight_decay", [-1.0, math.inf, math.nan]),
    (config.OptimizerConfig, {}, "betas", [(2.0, 3.0), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9)]),
    (config.OptimizerConfig, {}, "min_lr_ratio", [-0.1, 1.1, math.nan]),
    (config.OptimizerConfig, {}, "warmup_steps", [-1, 10**12]),
    (config.OptimizerConfig, {}, "max_grad_norm", [0.0, -1.0, math.nan]),
    (config.DistillConfig, {"teacher": "t"}, "alpha", [-0.1, 1.1, math.nan]),
    (config.DistillConfig, {"teacher": "t"}, "temperature", [0.0, -1.0, math.inf, math.nan]),
    (config.DistillConfig, {}, "teacher", ["", "a\0"]),
    (config.CheckpointConfig, {}, "interval", [0, 10**12]),
    (config.CheckpointConfig, {}, "keep", [0]),
    (config.EvalConfig, {}, "interval", [0, 10**12]),
    (config.EvalConfig, {}, "chunks", [0]),
    (config.EvalConfig, {}, "data", [""]),
]
CASES = [
    pytest.param(settings, others, name, value, id=f"{name}={value!r:.40}")
    for settings, others, name, values in WRONG
    for value in values
]


@pytest.mark.parametrize(("settings", "others", "name", "value"), CASES)
def test_out_of_range(settings, others, name, value):
    with pytest.raises(ValueError) as caught:
        settings(**{**others, name: value})
    assert name in str(caught.value) and str(caught.value).isprintable()


EDGES = [
    (config.PrepareConfig, PREPARE, dict(max_length=1, take=(0.0, 1.0), max_bad_fraction=1.0, workers=1)),
    (config.ScoreConfig, SCORE, dict(batch_tokens=1, shard_chunks=1, device="cuda:1", profile="x.json.gz")),
    (config.SelectConfig, SELECT, dict(ratio=1.0, random_seed=2**64 - 1)),
    (config.SelectConfig, SELECT, dict(threshold=-1e9)),
    (config.GenerateConfig, GENERATE, dict(temperature=0.0, top_p=1.0, seed=2**64 - 1, prompt="")),
    (config.GenerateConfig, GENERATE, dict(prompt="\U0001f600 é")),
    (config.StudentConfig, {}, dict(head_dim=2, num_key_value_heads=1, initializer_range=0.0)),
    (config.OptimizerConfig, {}, dict(betas=(0.0, 0.999), max_grad_norm=math.inf, weight_decay=0.0)),
    (config.TrainConfig, TRAIN, dict(seed=2**64 - 1, batch_tokens=1, steps=2**31 - 1)),
]


@pytest.mark.parametrize(("settings", "others", "values"), EDGES)
def test_the_ends_of_the_ranges_belong_to_them(settings, others, values):
    found = settings(**{**others, **values})
    assert {name: getattr(found, name) for name in values} == values


OUTPUTS = [
    (config.PrepareConfig, PREPARE),
    (config.ScoreConfig, SCORE),
    (config.SelectConfig, SELECT),
    (config.TrainConfig, TRAIN),
    (config.EvaluateConfig, EVALUATE),
    (config.ExportConfig, EXPORT),
]


@pytest.mark.parametrize(("settings", "others"), OUTPUTS)
@pytest.mark.parametrize("output", ["", ".", "./", "..", "a/..", "/", "a\0b", "/dev/null", "\ud800"])
def test_outputs_that_are_none(settings, others, output):
    with pytest.raises(ValueError, match=r"^output ") as caught:
        settings(**{**others, "output": output})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (config.SelectConfig, {**SELECT, "ratio": 0.5, "threshold": 0.0}, "one of ratio"),
        (config.SelectConfig, {**SELECT, "threshold": 0.0, "per_domain": True}, "per_domain changes nothing"),
        (config.SelectConfig, {**SELECT, "threshold": 0.0, "random_seed": 1}, "random_seed needs"),
        (config.ScoreConfig, {"data": "d", "output": "o"}, "give --teacher, --reference, or both"),
        (config.StudentConfig, {"hidden_size": 65}, "not a multiple"),
        (config.StudentConfig, {"hidden_size": 24, "num_attention_heads": 8}, "head_dim must be even"),
        (
            config.TrainConfig,
            {**TRAIN, "init_from": "m", "model": config.StudentConfig(hidden_size=96)},
            "model.* has no say",
        ),
        (config.TrainConfig, {**TRAIN, "init_from": "m", "model_config": "c"}, "not both"),
        (config.TrainConfig, {**TRAIN, "dtype": "float16"}, "float16 needs loss scaling"),
        (config.DistillConfig, {"alpha": 0.3}, "no say without distill.teacher"),
    ],
)
def test_settings_that_do_not_fit_together(settings, values, message):
    with pytest.raises(ValueError) as caught:
        settings(**values)
    assert message in str(caught.value)
