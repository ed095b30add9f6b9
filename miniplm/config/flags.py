"""Command-line flags → dotted names and values; what text means is left to `arguments`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import yaml_files
from .fields import Schema, is_list, shown, twice


@dataclass
class Given:
    """What a command line says."""

    values: dict[str, Any] = field(default_factory=dict)
    """Present dotted name → text, a list of texts, a boolean, or what a YAML file holds."""
    help: bool = False
    """--help is there."""
    print_config: str | None = None
    """What --print_config is given ("" for nothing), if it is there."""


def read_flags(schema: Schema, arguments: Sequence[str]) -> Given:
    """Take a command line apart; the later of two values wins, lists grow.

    Raises:
        ValueError: an unknown flag, too few or too many values, an old and its present name together.
    """
    given = Given()
    spelled: dict[str, str] = {}  # present name → the flag that was used
    for flag, values in _flags(schema, arguments):
        if flag == "help":
            given.help = True
        elif flag == "config" and "config" not in schema.kinds:
            given.values.update(schema.flatten(yaml_files.read_mapping(_one(flag, values))))
        elif flag == "print_config" and "config" not in schema.kinds:
            given.print_config = _one(flag, values or [""])
        else:
            _set(schema, flag, values, given.values, spelled)
    return given


def _flags(schema: Schema, arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(flag, with underscores and without the dashes before it; the values after it) in their order. Values
    before all flags are those of the setting that a class names as POSITIONAL, if it does."""
    found: list[tuple[str, list[str]]] = []
    positional = getattr(schema.config_class, "POSITIONAL", None)
    takes_more = False
    if positional and arguments and not arguments[0].startswith("-"):
        found, takes_more = [(positional, [])], True
    short = getattr(schema.config_class, "SHORT", {})
    for argument in (short.get(argument, argument) for argument in arguments):
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            found.append((flag.replace("-", "_"), [value] if equals else []))
            takes_more = not equals
        elif takes_more:
            found[-1][1].append(argument)
        elif argument == "-h":
            found.append(("help", []))
        else:
            raise ValueError(f"unexpected {shown(argument)}: settings are given as --name value")
    return found


def _set(schema: Schema, flag: str, values: list[str], result: dict, spelled: dict) -> None:
    name, negated = schema.aliases.get(flag, flag), False
    if name not in schema.kinds and name not in schema.groups and flag.startswith("no_"):
        positive = flag.removeprefix("no_")
        if schema.kinds.get(schema.aliases.get(positive, positive)) is bool:
            flag, name, negated = positive, schema.aliases.get(positive, positive), True
    if name in schema.groups:
        inner = schema.group_values(name, _group_text(_one(flag, values)))
        result.update(schema.flatten({name: inner}))
        return
    if name not in schema.kinds:
        raise ValueError(schema.unknown(flag))
    again = name in spelled
    if spelled.setdefault(name, flag) != flag:
        raise ValueError(twice(name, spelled[name], flag))
    kind = schema.kinds[name]
    if negated:
        if values:
            raise ValueError(f"--no-{flag} stands alone, got {shown(values[0])}")
        result[name] = False
    elif is_list(kind) and values and not values[0].startswith("["):
        result[name] = (result[name] if again and isinstance(result[name], list) else []) + values
    elif not values and name in (alone := getattr(schema.config_class, "STANDS_ALONE", {})):
        result[name] = alone[name]
    elif kind is bool and not values:
        result[name] = True
    else:
        result[name] = _one(flag, values)


def _group_text(text: str) -> Any:
    """A group on the command line: {name: value, …}, or the path of a YAML file."""
    return yaml_files.load(text) if text.lstrip().startswith("{") else text


def _one(flag: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"{flag} takes one value, got {len(values) or 'none'}")
    return values[0]
