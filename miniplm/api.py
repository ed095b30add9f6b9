"""The commands as Python functions: what `miniplm.score`, `miniplm.train` and so on are."""

import importlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from . import config
from .cli import COMMANDS
from .config.fields import Schema


def command(name: str) -> Callable[..., Any]:
    """The function of a command.

    It takes the command's settings as keywords, or its settings class alone, and gives what the command's
    function gives. Its signature and its doc string list the settings.
    """
    settings_class, module = COMMANDS[name]

    def run(settings: Any = None, /, **values: Any) -> Any:
        if settings is None:
            settings = config.from_dict(settings_class, values)
        elif not isinstance(settings, settings_class) or values:
            raise ValueError(
                f"miniplm.{name} takes its settings as keywords, or one config.{settings_class.__name__} "
                f"alone, got {config.shown(settings)}{' and keywords' if values else ''}"
            )
        return getattr(importlib.import_module(f".{module}", __package__), name)(settings)

    schema = Schema(settings_class)
    run.__name__ = run.__qualname__ = name
    run.__module__ = __package__
    run.__doc__ = _doc(settings_class, schema)
    # Names, types and defaults for help() and editors; only keywords, as settings have no order.
    run.__signature__ = _signature(settings_class)  # type: ignore[attr-defined]
    return run


def _signature(settings_class: type) -> inspect.Signature:
    """The settings as keywords; those without a default first, as a settings class has them."""
    parameters = inspect.signature(settings_class).parameters.values()
    return inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters])


def _doc(settings_class: type, schema: Schema) -> str:
    """What the command does, and each setting with what its class says of it."""
    head = "Settings (group.name: group={'name': …}):" if schema.groups else "Settings:"
    lines = [settings_class.__doc__ or "", "", head]
    for setting in schema.kinds:
        text = f"{setting}: {schema.docs[setting]}"
        lines.append(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="        "))
    if schema.aliases:
        old = ", ".join(f"{old} (now {new})" for old, new in schema.aliases.items())
        lines += ["", textwrap.fill(f"Old names that still work: {old}.", 100)]
    lines += ["", "Raises:", "    ValueError: a setting is unknown, missing or wrong, or what it names is."]
    return "\n".join(lines)
