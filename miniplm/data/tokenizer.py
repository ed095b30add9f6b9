"""Tokenizers: where they come from, and when two of them agree."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import Named, UserError, reason, system_error
from ..runtime.files import fingerprint
from ..runtime.gguf_header import read_gguf_header
from ..runtime.guarded import call_within, held_stderr

REMEDY = "give a Hugging Face id, a folder with tokenizer.json, or a .gguf file"
NO_FILES_REMEDY = "put tokenizer.json and tokenizer_config.json of the model it was made from beside it"
# The names under which tokenizers come: transformers' own, sentencepiece's, tiktoken's, Mistral's.
VOCABULARY_FILE = re.compile(
    r"tokenizer(?!_config\.json)|vocab|merges|tekken\.json|bpe\.codes|dict\.txt|.*\.(model|spm|tiktoken)$"
)

SECONDS = 120  # for a text that is no corpus: far more than a tokenizer takes


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer `name` as a transformers PreTrainedTokenizerFast.

    Args:
        name: Hugging Face id, local folder, or .gguf file.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        UserError: there is none, it cannot be read, it is not backed by the `tokenizers` library, or it is an
            empty one.
    """
    import transformers

    path = Path(name).expanduser()
    if not path.exists() and (
        path.suffix == ".gguf"
        or path.is_absolute()
        or str(name).startswith((".", "~"))
        or len(path.parts) > 2
    ):
        raise UserError(f"tokenizer {name} does not exist: {REMEDY}")
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"tokenizer {name} is neither a folder nor a .gguf file: {REMEDY}")
    header = read_gguf_header(path) if path.is_file() else None
    source = {"pretrained_model_name_or_path": str(path) if path.exists() else str(name)}
    if header:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with panics_as_errors():
            if (path / "tokenizer.json").exists():
                # It says it all. AutoTokenizer goes by the model's type instead: to a qwen2 model it gives
                # Qwen2's way of cutting text into words.
                tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    **source, trust_remote_code=trust_remote_code
                )
    except Exception as error:  # transformers raises many kinds, some over many lines
        _refuse_without_files(path, name)
        raise UserError(f"tokenizer {name} cannot be loaded ({reason(error)}): {REMEDY}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {name} is a slow one ({type(tokenizer).__name__}): convert it to a tokenizer.json "
            f"first"
        )
    # transformers makes up an empty one, by the model's type, where there are no files: special tokens, and
    # at most one more (sentencepiece's space).
    if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) <= 1:
        _refuse_without_files(path, name)
        raise UserError(
            f"the tokenizer of {name} knows special tokens only, as where a model comes without tokenizer "
            f"files: {NO_FILES_REMEDY}, or {REMEDY}"
        )
    if header and (eos := header.settings.get("tokenizer.ggml.eos_token_id")) is not None:
        tokens = {number: token for token, number in tokenizer.get_vocab().items()}
        tokenizer.eos_token = tokens.get(eos)  # for which transformers 5.8 takes BOS
    return tokenizer


def _refuse_without_files(path: Path, name: str) -> None:
    if path.is_dir() and not any(map(VOCABULARY_FILE.match, os.listdir(path))):
        raise UserError(f"folder {name} holds no tokenizer files: {NO_FILES_REMEDY}, or {REMEDY}")


def set_eos(tokenizer: Any, name: str, token: str | None) -> None:
    """Make `token` the one that ends a document (None: the tokenizer's own); UserError where it has none.

    Args:
        name: of the tokenizer, in messages.
    """
    if token is not None:
        if token not in tokenizer.get_vocab():
            raise UserError(f"tokenizer {name} has no token {token!r}: give --eos-token one that it has")
        tokenizer.eos_token = token
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name} names no token that ends a document: give one with --eos-token")


def bos_of(tokenizer: Any, name: str, wanted: bool | None) -> int | None:
    """The id that is to begin a document: BOS, where it is wanted, or where the tokenizer begins any text
    with it (wanted is None); else None.

    Args:
        name: of the tokenizer, in messages.
    """
    bos: int | None = tokenizer.bos_token_id
    if wanted is None:
        wanted = bos is not None and encode(tokenizer, "a", name)[:1] == [bos]
    if wanted and bos is None:
        raise UserError(f"tokenizer {name} has no token that begins a document: leave --add-bos out")
    return bos if wanted else None


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write the tokenizer's files into `folder`. A disk that is full is an OSError here too; the tokenizers
    library has its own kind."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise system_error(error, folder) or error from None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A fingerprint of what the ids mean: the text of every id, and which one is EOS."""
    return vocabulary_fingerprint(tokenizer.get_vocab(), tokenizer.eos_token_id)


def vocabulary_fingerprint(vocabulary: Mapping[str, int], eos_token_id: int | None) -> str:
    """tokenizer_fingerprint from the ids of the tokens."""
    return fingerprint({"vocabulary": vocabulary, "eos_token_id": eos_token_id})


def content_fingerprint(text: str, eos_token_id: int | None) -> str:
    """A fingerprint of all that a tokenizer does to a text.

    Args:
        text: its tokenizer.json without white space between the parts, as `tokenizers` gives it by to_str().
    """
    return fingerprint([text, eos_token_id])


def read_vocabulary(text: str) -> dict[str, int]:
    """The ids of all tokens of a tokenizer.json, added ones too; ValueError when it is none."""
    from tokenizers import Tokenizer

    try:
        with panics_as_errors():
            return Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise Named(reason(error)) from error


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of the tokenizers library, whose own kind is no Exception, as a ValueError, and keep its
    report from the terminal."""
    with held_stderr() as drop:
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            drop()
            raise Named("the tokenizers library panicked") from error


@contextlib.contextmanager
def tokenizer_errors(name: str) -> Iterator[None]:
    """Raise what the tokenizer of the model `name` raises in the block, a panic too, as a UserError."""
    try:
        with panics_as_errors():
            yield
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(
            f"the tokenizer of {name} cannot encode a text ({reason(error)}): put "
            f"another tokenizer.json beside the model, or give another model"
        ) from error


def encode(tokenizer: Any, text: str, name: str) -> list[int]:
    """The ids of a text with the special tokens that the tokenizer adds; UserError where the tokenizer of the
    model `name` fails, or takes too long: a regular expression in it may take for ever."""
    with tokenizer_errors(name):
        return call_within(SECONDS, lambda: tokenizer.encode(text))


def check_same_tokens(corpus_tokenizer: Any, tokenizer: Any, name: str) -> None:
    """Raise UserError, naming the first token that differs, unless every token of the corpus's tokenizer has
    the same id in `tokenizer`, which is called `name`. Further tokens in the latter are fine: the corpus does
    not hold them."""
    vocabulary = tokenizer.get_vocab()
    differing = [
        (index, token)
        for token, index in corpus_tokenizer.get_vocab().items()
        if vocabulary.get(token) != index
    ]
    if differing:
        index, token = min(differing)
        found = f"id {vocabulary[token]}" if token in vocabulary else "missing"
        raise UserError(
            f"the tokenizer of {name} is not the corpus's: token {token!r} has id {index} in the corpus, is "
            f"{found} there "
            f"({len(differing):,} differ): use a model with the corpus's tokenizer, or prepare the corpus "
            f"with this one"
        )
