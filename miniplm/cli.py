"""The command line: `miniplm COMMAND --flags`.

Exit codes: 0 done; 2 a user's mistake, or what the operating system refused, in one plain line on stderr; 1
anything else that failed; 128 + n stopped by signal n, with what was done kept. Tracebacks only with --debug,
which changes no exit code.
"""

import errno
import importlib
import io
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import __version__, config
from .runtime.errors import RunError, UserError
from .runtime.text import printable

# command → (its settings, the module whose function has the command's name); a module is imported only when
# its command runs
COMMANDS = {
    **{name: (settings, f"stages.{name}") for name, settings in config.STAGES.items()},
    "ledger": (config.LedgerConfig, "analysis.ledger"),
    "report": (config.ReportConfig, "stages.report"),
    "run": (config.RunConfig, "pipeline"),
    "demo": (config.DemoConfig, "demo.command"),
}

PANIC = "PanicException"  # of a library in Rust (tokenizers, safetensors); it is no Exception


def _overview() -> str:
    lines = [f"  {_words(name):11} {settings.__doc__}" for name, (settings, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: miniplm COMMAND [--flags]",
            "",
            "Pre-train a small language model on what a large one finds worth learning (MiniPLM, arXiv "
            "2410.17215).",
            "",
            "commands, in the order of the pipeline:",
            *lines,
            "",
            "miniplm COMMAND --help lists the flags of a command; --debug shows the traceback of a failure.",
        ]
    )


def _words(command: str) -> str:
    """A command's name as it is typed: proxy_fit is `proxy fit`."""
    return command.replace("_", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text from anywhere, on a terminal of any encoding
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments in (["--version"], ["-V"]):
        print(f"miniplm {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if (both := "_".join(arguments[:2])) in COMMANDS:
        arguments[:2] = [both]
    command = _words(arguments[0])
    # Threads of OpenMP that wait for one another spin for long by default: beside another busy process that
    # is ten times slower on two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries end in one line of ours
    try:
        _run(*arguments)
        return 0
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing to say, and nobody to say it to
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"miniplm {command}: stopped; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        if debug:
            traceback.print_exc()
        code, text = _explain(error)
        print(printable(f"miniplm {command}: {' '.join(text.split())}"), file=sys.stderr)
        return code


def _run(command: str, *arguments: str) -> None:
    if command not in COMMANDS:
        raise UserError(f"no such command; choose from {', '.join(map(_words, COMMANDS))}")
    settings, module = COMMANDS[command]
    try:
        parsed: object = config.from_arguments(settings, list(arguments), prog=f"miniplm {_words(command)}")
    except ValueError as error:
        raise UserError(f"{error} (see miniplm {_words(command)} --help)") from None
    getattr(importlib.import_module(f".{module}", __package__), command)(parsed)


REMEDIES = {
    errno.ENOSPC: "make room, then run the same command again",
    errno.EDQUOT: "make room, then run the same command again",
    errno.EROFS: "choose another --output",
    errno.EACCES: "choose another --output, or get the right to write there",
    errno.EPERM: "choose another --output, or get the right to write there",
}


def _explain(error: BaseException) -> tuple[int, str]:
    """(the exit code, what to say) of a failure. Only errors of our own say it in their words: another's may
    say anything."""
    if isinstance(error, UserError):
        return 2, str(error) or "wrong input"
    if isinstance(error, RunError):
        return 1, str(error)
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        # A list of (source, destination, reason). The reason is text, with the number of the error in it.
        source, _, reason = error.args[0][0]
        number = re.match(r"\[Errno (\d+)\]", str(reason))
        error = OSError(int(number[1]), os.strerror(int(number[1])), str(source)) if number else error
    if isinstance(error, OSError) and error.errno is not None:
        named = [repr(str(name)) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([f"[Errno {error.errno}] {os.strerror(error.errno)}", *named])
        return 2, f"{text}: {REMEDIES[error.errno]}" if error.errno in REMEDIES else text
    if isinstance(error, (ConnectionError, TimeoutError)):
        return 2, f"the network failed ({type(error).__name__}): check it, then run the same command again"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parent)]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return 1, f"unexpected {type(error).__name__}{where} (--debug shows the traceback)"


if __name__ == "__main__":
    sys.exit(main())
