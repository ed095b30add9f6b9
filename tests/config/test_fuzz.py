"""Whatever comes from outside, settings, YAML and manifests are read or refused in one line of ours."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from miniplm import config
from miniplm.config.fields import Schema, is_list
from miniplm.config.yaml_files import load
from miniplm.data.corpus import CorpusManifest
from miniplm.data.scores import ScoreManifest
from miniplm.pipeline import plan_stages, read_stages
from miniplm.runtime.artifacts import complete_output, open_output, read_manifest
from miniplm.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
STAGES = [*config.STAGES.values(), config.LedgerConfig, config.RunConfig, config.DemoConfig]
PIPELINES = [path.read_text() for path in (ROOT / "miniplm/demo/demo.yaml", ROOT / "configs/quickstart.yaml")]

# The same examples in every run, a second or two of each.
bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

STRANGE = [
    None, True, 0, -1, 2**63, 2**70, 10**400, 0.5, 1e308, float("inf"), float("nan"),
    "", ".", "/", "/dev/null", "\0", "\ud800", "a\nb", "\x1b[31m", "null", "true", "1", "1e3", ".nan", "meta",
    "cuda:9", "[1, 2]", "[", "{a: 1}", "&a [*a]", "9" * 5000, "x" * 5000, "${a}", "$", "${", b"bytes", [], {},
    [[]], [None], {"a": {"b": []}}, {1: 2}, {None: None},
]  # fmt: skip
scalars = st.sampled_from(STRANGE) | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def one_line(error: Exception) -> None:
    """Our own words: one line, no structure of a library's."""
    text = str(error)
    assert "\n" not in text and 3 < len(text) < 6000
    assert not any(word in text for word in ("typing.", "<class", "Parser key", "Traceback", "Error:"))


def names_of(settings_class):
    schema = Schema(settings_class)
    return st.sampled_from([*schema.kinds, *schema.groups, *schema.aliases]) | st.text(max_size=10)


def right_values(settings_class):
    schema = Schema(settings_class)
    return {name: "x" for name in schema.kinds if name not in schema.defaults}


# A setting of each type, and a group.
OF_EACH_TYPE = {
    str(kind): (settings_class, name)
    for settings_class in STAGES
    for name, kind in {**Schema(settings_class).kinds, **Schema(settings_class).groups}.items()
}


@pytest.mark.slow
@pytest.mark.parametrize(("settings_class", "name"), OF_EACH_TYPE.values(), ids=OF_EACH_TYPE)
def test_every_type_with_every_strange_value(settings_class, name):
    kind = Schema(settings_class).kinds.get(name)
    for value in [*STRANGE, 10**5000]:
        for given_value in [value, [value], [0.5, value]] if is_list(kind) else [value]:
            try:
                config.from_dict(settings_class, {**right_values(settings_class), name: given_value})
            except ValueError as error:
                one_line(error)


@pytest.mark.slow
@pytest.mark.parametrize("settings_class", STAGES)
def test_settings_from_python(settings_class):
    right = right_values(settings_class)

    @bounded
    @given(st.dictionaries(names_of(settings_class), values, max_size=4), st.booleans())
    def check(given_values, complete):
        try:
            config.from_dict(settings_class, {**(right if complete else {}), **given_values})
        except ValueError as error:
            one_line(error)

    check()


@pytest.mark.parametrize("settings_class", STAGES)
def test_flags(settings_class):
    texts = st.sampled_from([value for value in STRANGE if isinstance(value, str)]) | st.text(max_size=10)
    flags = names_of(settings_class).flatmap(lambda name: st.sampled_from([f"--{name}", f"--no-{name}"]))
    separate = st.tuples(flags, texts).map(list)
    joined = st.tuples(flags, texts).map(lambda pair: ["=".join(pair)])

    @bounded
    @given(st.lists(separate | joined | texts.map(lambda text: [text]), max_size=5))
    def check(parts):
        try:
            config.from_arguments(settings_class, [word for part in parts for word in part], "test")
        except ValueError as error:
            one_line(error)
        except SystemExit as ended:  # --help, --print_config
            assert ended.code == 0

    check()


PIECES = ["&a ", "*a", "<<: ", "[", "}", ": ", "\n", "!!set ", "9" * 99]


@st.composite
def damaged(draw, texts):
    """A text with a few pieces cut out, doubled, moved or replaced."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        end = min(end, start + 40)
        piece = draw(st.sampled_from(["", text[start:end] * 2, *PIECES]) | st.text(max_size=5))
        text = text[:start] + piece + text[end:]
    return text


@pytest.mark.slow
@bounded
@given(damaged(PIPELINES) | st.text(max_size=40), st.booleans())
def test_pipeline_files(tmp_path, text, known):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        plan_stages(read_stages(path), "out", {"text": "t", "tokenizer": "t", "seed": "1"} if known else None)
    except UserError as error:
        one_line(error)


stage_names = st.sampled_from(["a", "b-c", "1", "", "a/b", ".."]) | st.text(max_size=5)
stages = st.dictionaries(st.sampled_from(["stage", "data", "output", "model", "scores"]), values)
right_stage = st.just({"stage": "select", "data": "d", "scores": ["${a}"]})


@bounded
@given(st.dictionaries(stage_names, stages | right_stage, max_size=3))
def test_pipelines_from_python(stages):
    try:
        plan_stages(stages, "out")
    except UserError as error:
        one_line(error)


@bounded
@given(st.text(alphabet="ab:-[]{}&*!<,'\"\\ \n\t#|>?%@0.1e~=", max_size=60))
def test_yaml(text):
    try:
        load(text)
    except ValueError as error:
        one_line(error)


MANIFEST = {
    "stage": "prepare",
    "complete": True,
    "identity": {"corpus": "f", "teacher": "t", "reference": None, "dtype": "d", "document_mask": False},
    **dict.fromkeys(CorpusManifest.model_fields, 1),
    "domains": {"d": {"rows": 1}},
    "files": {"data-00000.arrow": "0" * 16},
    **dict.fromkeys(("fingerprint", "tokenizer_fingerprint", "source", "teacher", "reference"), "name"),
}
CHANGES = st.dictionaries(st.sampled_from([*MANIFEST, "new"]), values, min_size=1, max_size=3)


def jsonable(value):
    """Python's values as JSON can hold them; bytes and keys that are no text as text."""
    if isinstance(value, dict):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [jsonable(inner) for inner in value]
    return repr(value) if isinstance(value, bytes) else value


@st.composite
def manifests(draw):
    changed = {**MANIFEST, **jsonable(draw(CHANGES))}
    for name in draw(st.sets(st.sampled_from([*MANIFEST]), max_size=1)):
        del changed[name]
    changed["identity"] = jsonable(draw(values | st.just(MANIFEST["identity"])))
    return json.dumps(changed)


@pytest.mark.slow
@bounded
@given(manifests() | damaged([json.dumps(MANIFEST)]) | values.map(lambda value: json.dumps(jsonable(value))))
def test_manifests(tmp_path, text):
    path = tmp_path / "manifest.json"
    for read in (
        lambda: read_manifest(tmp_path, "prepare", "select", schema=CorpusManifest),
        lambda: read_manifest(tmp_path, schema=ScoreManifest),
        lambda: open_output(tmp_path, "prepare", {"corpus": "f"}),
        lambda: complete_output(tmp_path, {"rows": 1}),
    ):
        path.write_text(text, encoding="utf-8", errors="replace")
        try:
            read()
        except UserError as error:
            one_line(error)


def test_what_is_right_is_read(tmp_path):
    """The fuzzing starts from what is accepted."""
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    for schema in (CorpusManifest, ScoreManifest):
        assert read_manifest(tmp_path, schema=schema) == MANIFEST
