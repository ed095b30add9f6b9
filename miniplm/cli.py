"""The command line: `miniplm COMMAND --flags`.

Exit codes: 0 done; 2 a user's mistake, in one plain line on stderr; 1 anything else that failed; 128 + n
stopped by signal n, with what was done kept. Tracebacks only with --debug.
"""

import importlib
import io
import os
import shutil
import signal
import sys

from . import __version__, config
from .runtime.errors import UserError
from .runtime.text import printable

# command → (its settings, the module whose function has the command's name); a module is imported only when
# its command runs
COMMANDS = {
    **{name: (settings, f"stages.{name}") for name, settings in config.STAGES.items()},
    "run": (config.RunConfig, "pipeline"),
    "demo": (config.DemoConfig, "pipeline"),
}


def _overview() -> str:
    lines = [f"  {name:9} {settings.__doc__}" for name, (settings, _) in COMMANDS.items()]
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


def main(arguments=None) -> int:
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
        print(f"miniplm {arguments[0]}: stopped; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, OSError) as error:
        return _fail(arguments[0], error, debug, 2)
    except Exception as error:
        return _fail(arguments[0], error, debug, 1)


def _run(command: str, *arguments: str):
    if command not in COMMANDS:
        raise UserError(f"no such command; choose from {', '.join(COMMANDS)}")
    settings, module = COMMANDS[command]
    try:
        parsed = config.from_arguments(settings, list(arguments), prog=f"miniplm {command}")
    except ValueError as error:
        raise UserError(f"{error} (see miniplm {command} --help)") from None
    getattr(importlib.import_module(f".{module}", __package__), command)(parsed)


REMEDIES = {
    "No space left": "make room, then run the same command again",
    "Read-only file system": "choose another --output",
    "Permission denied": "choose another --output, or get the right to write there",
}


def _fail(command: str, error: BaseException, debug: bool, code: int) -> int:
    if debug:
        raise error
    if isinstance(error, shutil.Error):  # a list of (source, destination, reason)
        error = OSError(error.args[0][0][-1])
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError):
        text += "".join(f": {remedy}" for reason, remedy in REMEDIES.items() if reason in text)
    if code == 1:
        text = f"{type(error).__name__}: {text} (--debug shows the traceback)"
    print(printable(f"miniplm {command}: {text}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
