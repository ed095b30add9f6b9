"""Headers of .safetensors and .gguf files that lie: one line that names the file, nothing allocated by a
number in them, no hang."""

import json
import random
import struct
import tracemalloc

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from random_models import DECODED, SIZES, random_model, saved
from transformers import LlamaConfig

from miniplm.models.gguf_file import write_gguf
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError
from miniplm.runtime.gguf_header import read_gguf_header

bounded = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def refusal(make) -> str | None:
    try:
        make()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and "allocate" not in text and len(text) < 1_000
        return text
    return None


# ---- safetensors ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(random_model(DECODED["qwen2 mha tied"]), tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def weights(folder):
    """(the file, its header, its data); it is restored."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    yield path, json.loads(whole[8 : 8 + length]), whole[8 + length :]
    path.write_bytes(whole)


def write(path, header, data, length=None) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)


NORM = "model.norm.weight"  # [32], 128 bytes
LIES = {
    "ends beyond the file": {NORM: {"data_offsets": [0, 10**12]}},
    "ends before it starts": {NORM: {"data_offsets": [128, 0]}},
    "lies over another": {NORM: {"data_offsets": [0, 128]}},
    "another dtype": {NORM: {"dtype": "F64"}},
    "an unknown dtype": {NORM: {"dtype": "F7"}},
    "whole numbers": {NORM: {"dtype": "I32"}},
    "another shape": {NORM: {"shape": [33]}},
    "a shape of the same size": {NORM: {"shape": [4, 8]}},
    "a huge shape": {NORM: {"shape": [2**60, 2**60]}},
    "a negative shape": {NORM: {"shape": [-32]}},
    "no shape": {NORM: {"shape": None}},
    "text for numbers": {NORM: {"data_offsets": ["0", "128"]}},
    "NaN": {NORM: {"shape": [float("nan")]}},
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_headers_that_lie(folder, weights, lie):
    path, header, data = weights
    for name, changes in LIES[lie].items():
        header = {**header, name: {**header[name], **changes}}
    write(path, header, data)
    said = refusal(lambda: load_model(folder))
    assert said and (str(path) in said or (str(folder) in said and NORM in said))


def test_safetensors_files_that_are_none(folder, weights):
    path, header, data = weights
    text = json.dumps(header).encode()
    twice = (
        text[:-1] + b", " + json.dumps({NORM: header["model.layers.0.input_layernorm.weight"]}).encode()[1:]
    )
    write(path, twice, data)
    assert str(path) in refusal(lambda: load_model(folder))
    for content in (b"[" * 10**6, b"\xff" + text, b"", b"[]", b"{}", b"null", b'{"a": ' + b"9" * 5000 + b"}"):
        write(path, content, data)
        assert str(folder) in refusal(lambda: load_model(folder))
    for length in (2**60, 2**64 - 1, len(text) + len(data) + 1, 0, 5):
        write(path, header, data, length)
        assert str(path) in refusal(lambda: load_model(folder))


def test_safetensors_fuzz(folder, weights):
    path, header, data = weights
    values = st.sampled_from(
        [None, True, 0, -1, 1, 32, 128, 2**40, 2**64, 0.5, "", "F32", "F16", [], [32], [0, 128]]
    )
    kinds = st.sampled_from(["dtype", "shape", "data_offsets", "other"])

    @bounded
    @given(st.sampled_from([*header, "new"]), kinds, values | st.lists(values, max_size=3))
    def check(name, key, value):
        write(path, {**header, name: {**header.get(name, {}), key: value}}, data)
        said = refusal(lambda: load_model(folder))
        assert said is None or str(folder) in said

    check()


# ---- GGUF ----


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory, tiny_tokenizer):
    pytest.importorskip("gguf")
    from transformers import PreTrainedTokenizerFast

    sizes = {**SIZES, "vocab_size": 500, "hidden_size": 32}
    folder = saved(
        random_model(LlamaConfig(**sizes, num_key_value_heads=2)), tmp_path_factory.mktemp("llama")
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    write_gguf(load_model(folder), tokenizer, folder / "model.gguf", "f16", "tiny")
    return (folder / "model.gguf").read_bytes()


def after(content: bytes, key: bytes) -> int:
    """The place of the type of a setting."""
    return content.index(key) + len(key)


def test_gguf_headers_that_lie(gguf_bytes, tmp_path):
    path = tmp_path / "model.gguf"

    def said(place, code, *values):
        content = bytearray(gguf_bytes)
        struct.pack_into(f"<{len(values)}{code}", content, place, *values)
        path.write_bytes(content)
        return refusal(lambda: read_gguf_header(path))

    path.write_bytes(gguf_bytes)
    header = read_gguf_header(path)
    assert header.settings["llama.block_count"] == SIZES["num_hidden_layers"] and header.elements > 500 * 32
    assert "begin with GGUF" in said(0, "I", 7)
    assert "version is 99" in said(4, "I", 99)
    for place in (8, 16):  # numbers of tensors and of settings
        assert f"{path} is not a whole GGUF file" in said(place, "Q", 2**60)
    assert "bytes long" in said(24, "Q", 2**40)
    tokens = after(gguf_bytes, b"tokenizer.ggml.tokens")
    assert "a list of 1,152,921,504,606,846,976 texts" in said(tokens + 8, "Q", 2**60)
    assert "goes past its end" in said(tokens + 8, "Q", 2**20)
    types = after(gguf_bytes, b"tokenizer.ggml.token_type")
    assert "goes past its end" in said(types + 8, "Q", 2**60)
    assert "goes past its end" in said(tokens + 16, "Q", 2**63)
    assert "a list of a type that there is not, 77" in said(tokens + 4, "I", 77)
    assert "a type that there is not, 77" in said(tokens, "I", 77)
    norm = after(gguf_bytes, b"output_norm.weight")
    assert "dimensions" in said(norm, "I", 10**9)
    assert "goes past its end" in said(norm + 4, "Q", 2**60)
    assert "a type that there is not, 999" in said(norm + 12, "I", 999)
    assert "goes past its end" in said(norm + 16, "Q", 2**50)
    assert "lies over another" in said(norm + 16, "Q", 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 0), ("block_count", 2**31), ("attention.head_count", 0), ("rope.freq_base", None)],
)
def test_gguf_settings_that_cannot_be(gguf_bytes, tmp_path, key, value):
    pytest.importorskip("accelerate")
    path, content = tmp_path / "model.gguf", bytearray(gguf_bytes)
    place = after(gguf_bytes, f"llama.{key}".encode())
    struct.pack_into(
        "<f" if value is None else "<I", content, place + 4, float("nan") if value is None else value
    )
    path.write_bytes(content)
    assert f"{path} describes no model" in refusal(lambda: load_model(path))


def test_gguf_fuzz(gguf_bytes, tmp_path):
    """Damage in the header: refused or read, in little memory."""
    path, rng = tmp_path / "model.gguf", random.Random(0)
    end = gguf_bytes.index(b"output_norm.weight") + 60
    tracemalloc.start()
    for _ in range(200):
        content = bytearray(gguf_bytes)
        for _ in range(rng.choice([1, 1, 3])):
            place = rng.randrange(end)
            size = rng.choice([1, 1, 8])
            content[place : place + size] = rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size)])
        path.write_bytes(content[: rng.choice([len(content), len(content), rng.randrange(len(content))])])
        said = refusal(lambda: read_gguf_header(path))
        assert said is None or str(path) in said
    assert tracemalloc.get_traced_memory()[1] < 30 * len(gguf_bytes)
    tracemalloc.stop()
