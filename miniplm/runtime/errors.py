"""Errors whose text is one plain line for whoever runs a command."""

import json
import os
import re
from collections.abc import Iterator


class UserError(ValueError):
    """A user's mistake: what is wrong, where, and what to do."""


class RunError(RuntimeError):
    """What failed through no mistake that a user could mend beforehand: what came, where, and what to do."""


class Named(ValueError):
    """A failure of a library that has words of ours."""


# What a failure says by its kind, looked for by name, so that no library need be imported; its base classes
# have their turn after it. One of the first kinds says more than the error that it led to.
CAUSES = {
    "MemoryError": "it takes more memory than there is",
    "OutOfMemoryError": "it takes more memory than there is",
    "ArrowMemoryError": "it takes more memory than there is",
    "RecursionError": "it is nested too deep",
    "HFValidationError": "no id of the Hub looks like this",
    "GatedRepoError": "its owner lets in who has asked: ask on its page, then log in with `hf auth login`",
    "RepositoryNotFoundError": "the Hub has none of this name that you may read",
    "OfflineModeIsEnabled": "it is not in the cache, and HF_HUB_OFFLINE is set",
    "LocalEntryNotFoundError": "it is not in the cache, and the Hub cannot be reached",
    "TimeoutError": "it took too long",
    "TimeoutException": "the network took too long",
    "Timeout": "the network took too long",
    "ConnectionError": "the network cannot be reached",
    "TransportError": "the network cannot be reached",
    "gaierror": "the network cannot be reached",
}
KINDS = {
    "EOFError": "it ends too soon",
    "ArrowInvalid": "it is damaged, or of another kind than its name says",
    "SafetensorError": "it is damaged, or of another kind than its name says",
    "OSError": "a part of it is missing or damaged",
    "ValueError": "a value in it cannot be used",
}


def reason(error: BaseException) -> str:
    """Why a library failed, in words of ours. What it says itself may be anything, over many lines, and quote
    what it has read; it stays whole behind --debug, and in Python as the cause of the error with these words.
    """
    chain = list(_chain(error))
    for said in (_own_words, lambda found: _by_kind(found, CAUSES), lambda found: _by_kind(found, KINDS)):
        for found in chain:
            if words := said(found):
                return words
    return "--debug shows why" if type(error) is Exception else f"{type(error).__name__}, which --debug shows"


def system_error(error: BaseException, path: str | os.PathLike[str]) -> OSError | None:
    """The OSError that a library has met at `path` and tells in a kind of its own; None if it met none."""
    number = _number(error)
    if isinstance(error, OSError) and number:
        return error
    return OSError(number, os.strerror(number), os.fspath(path)) if number else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _own_words(error: BaseException) -> str | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, (UserError, Named)):
        return str(error)
    if number := _number(error):
        return os.strerror(number)
    if "trust_remote_code" in str(error):
        return "it comes with code of its own: set trust_remote_code if you trust it"
    if isinstance(error, ImportError) and error.name:
        return f"it needs the package {error.name}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 from byte {error.start:,} on"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON at line {error.lineno:,}, column {error.colno:,}"
    if status in range(400, 600) and not _by_kind(error, CAUSES):
        return f"the server answers with {status}"
    return None


def _number(error: BaseException) -> int | None:
    """The number that the system gave, which libraries written in Rust tell in their text alone."""
    if isinstance(error, OSError) and error.errno and error.errno > 0:  # those of name servers are below
        return error.errno
    told = re.search(r"\(os error (\d{1,4})\)|\bOs \{ code: (\d{1,4}),", str(error))
    return int(told[1] or told[2]) if told else None


def _by_kind(error: BaseException, kinds: dict[str, str]) -> str | None:
    return next((kinds[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in kinds), None)
