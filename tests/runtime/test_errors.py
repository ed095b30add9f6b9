"""What a library's failure says to whoever runs a command: never its own text."""

import errno
import json
import os
import socket

import pytest

from miniplm.runtime.errors import Named, UserError, reason, system_error

SECRET = "Traceback: \x1b[31m" + "x" * 1_000


def of_kind(*names, base=Exception, text=SECRET, **attributes) -> Exception:
    """An error of the last of these classes, each made from the one before."""
    kind = base
    for name in names:
        kind = type(name, (kind,), {})
    error = kind(text)
    error.__dict__.update(attributes)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raised(function, *arguments) -> Exception:
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


class Response:
    status_code = 503


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("our own words"), "our own words"),
        (Named("our own words"), "our own words"),
        (OSError(errno.EACCES, SECRET, SECRET), os.strerror(errno.EACCES)),
        (of_kind("SafetensorError", text="Io: No space (os error 28)" + SECRET), os.strerror(errno.ENOSPC)),
        (of_kind("SafetensorError", text="IoError(Os { code: 28, kind: X })"), os.strerror(errno.ENOSPC)),
        (of_kind("SafetensorError"), "it is damaged, or of another kind than its name says"),
        (ModuleNotFoundError(SECRET, name="mamba_ssm"), "it needs the package mamba_ssm"),
        (raised(b"good \xff".decode), "it is not UTF-8 from byte 5 on"),
        (raised(json.loads, '{\n "a": ?'), "it is no JSON at line 2, column 7"),
        (raised(json.loads, "[" * 200_000), "it is nested too deep"),
        (MemoryError(SECRET), "it takes more memory than there is"),
        (of_kind("HfHubHTTPError", "Gone", response=Response()), "the server answers with 503"),
        (
            of_kind("HfHubHTTPError", "RepositoryNotFoundError", response=Response()),
            "the Hub has none of this name that you may read",
        ),
        (caused(OSError(SECRET), of_kind("TransportError", "ConnectError")), "the network cannot be reached"),
        (
            caused(ValueError(SECRET), ValueError("set trust_remote_code=True")),
            "it comes with code of its own",
        ),
        (socket.gaierror(-2, SECRET), "the network cannot be reached"),
        (OSError(SECRET), "a part of it is missing or damaged"),
        (ValueError(SECRET), "a value in it cannot be used"),
        (KeyError(SECRET), "KeyError, which --debug shows"),
        (Exception(SECRET), "--debug shows why"),
    ],
)
def test_words_of_ours(error, words):
    assert reason(error).startswith(words) and "x" * 9 not in reason(error) and "\x1b" not in reason(error)


def test_causes_in_a_circle_end():
    first, second = KeyError("a"), TypeError("b")
    first.__cause__, second.__cause__ = second, first
    assert reason(first) == "KeyError, which --debug shows"


def test_an_error_of_the_system_keeps_its_number(tmp_path):
    found = system_error(of_kind("SafetensorError", text="Io: full (os error 28)"), tmp_path)
    assert found is not None and (found.errno, found.filename) == (errno.ENOSPC, str(tmp_path))
    assert system_error(of_kind("SafetensorError"), tmp_path) is None
