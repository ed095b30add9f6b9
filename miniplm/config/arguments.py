"""Flags, YAML and plain values → settings, with one-line errors.

All three become one table, dotted name → value (see `fields.Schema`); jsonargparse turns text into what a
setting's type says, and shows the help.
"""

import json
import numbers
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_type_hints

from . import yaml_files
from .fields import Schema, expected, settings_of, shown, takes_none, takes_text
from .flags import read_flags

Config = TypeVar("Config")
LARGEST = 2**64  # no setting is a larger whole number than a seed


def from_dict(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build settings from plain values as YAML holds them.

    Groups are mappings inside, their settings class, or dotted names; old names (ALIASES) work.

    Raises:
        ValueError: an unknown name, a missing value, one of a wrong type or out of range.
    """
    return _build(config_class, Schema(config_class).flatten(values))


def from_arguments(config_class: type[Config], arguments: Sequence[str], prog: str) -> Config:
    """Build settings from command-line flags and YAML files.

    A setting is `--some-name value` or `--some_name=value`, in a group `--group.some-name value`. A list is
    several values, or the flag several times; a boolean stands alone, or with true or false, and `--no-name`
    is false. `--config FILE` takes settings from a YAML file; flags after it win. Exits after --help and
    --print_config.

    Raises:
        ValueError: as `from_dict`; an unknown flag.
    """
    schema = Schema(config_class)
    given = read_flags(schema, arguments)
    if given.help:
        _help_parser(schema, prog).print_help()
        sys.exit(0)
    if given.print_config is not None:
        # The one parser call that takes values without checking that none is missing.
        values = json.dumps({name: _plain(value) for name, value in given.values.items()})
        _help_parser(schema, prog).parse_args([f"--config={values}", f"--print_config={given.print_config}"])
    return _build(config_class, given.values)


def _parser(schema: Schema, names: Iterable[str], **options: Any) -> Any:
    """A parser of these settings, none of them required."""
    from jsonargparse import ArgumentParser, set_loader

    set_loader("miniplm", yaml_files.load, exceptions=(ValueError,))
    parser = ArgumentParser(exit_on_error=False, parser_mode="miniplm", **options)
    for name in names:
        parser.add_argument(f"--{name}", type=schema.kinds[name])
    return parser


def _help_parser(schema: Schema, prog: str) -> Any:
    """The parser of the help and of --print_config, which shows the defaults too."""
    description = schema.config_class.__doc__
    parser = _parser(schema, (), prog=prog, description=description, epilog=_epilog(schema))
    if "config" not in schema.kinds:
        parser.add_argument(
            "--config", action="config", help="A YAML file with any of these settings; flags after it win."
        )
    parts = {"": parser.add_argument_group("settings")}
    for group in schema.groups:
        text = f"{schema.docs[group]} (--{group} FILE takes them from a YAML file.)"
        parts[group] = parser.add_argument_group(group, text)
    for name, kind in schema.kinds.items():
        default = {"default": schema.defaults[name]} if name in schema.defaults else {"required": True}
        parts[name.rpartition(".")[0]].add_argument(f"--{name}", type=kind, help=schema.docs[name], **default)
    return parser


def _epilog(schema: Schema) -> str:
    text = ""
    if bool in schema.kinds.values():
        text += "A flag of true or false may stand alone (true) or as --no-NAME (false). "
    if schema.aliases:
        old = ", ".join(f"--{old} (now --{new})" for old, new in schema.aliases.items())
        text += f"Old names that still work: {old}."
    return text.strip()


def _build(config_class: type[Config], given: dict[str, Any]) -> Config:
    schema = Schema(config_class)
    required = [name for name in schema.kinds if name not in schema.defaults]
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required")
    return _construct(config_class, _typed(schema, given), "")


def _typed(schema: Schema, given: dict[str, Any]) -> dict[str, Any]:
    """The values as their types want them; text is read as YAML where the type is not text."""
    from jsonargparse import ArgumentError

    parser = _parser(schema, given)
    typed = {}
    for name, value in given.items():
        kind, value = schema.kinds[name], _plain(value)
        wrong = ValueError(f"{name}: expected {expected(kind)}, got {shown(value)}")
        if (value is None and not takes_none(kind)) or _is_long_number(kind, value):
            raise wrong
        try:
            typed[name] = parser.parse_object({name: value})[name]
        except (ArgumentError, TypeError, ValueError, ArithmeticError, RecursionError):
            raise wrong from None
        if isinstance(typed[name], int) and abs(typed[name]) >= LARGEST:
            raise ValueError(f"{name} is out of range: {shown(typed[name])}")
    return typed


def _is_long_number(kind: Any, value: Any) -> bool:
    """Whether text is longer than any number or boolean, where one is wanted: jsonargparse would read it as
    YAML of any kind."""
    if isinstance(value, list):
        return any(_is_long_number(kind, inner) for inner in value)
    return isinstance(value, str) and not takes_text(kind) and len(value) > yaml_files.MAX_NUMBER_LENGTH


def _plain(value: Any) -> Any:
    """A value as YAML could hold it: paths as text, numpy's numbers as Python's, tuples as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value


def _construct(config_class: type[Config], values: Mapping[str, Any], prefix: str) -> Config:
    """The settings class, with its groups, from dotted names that begin with `prefix`."""
    hints, own = get_type_hints(config_class), {}
    for field in settings_of(config_class):
        name = prefix + field.name
        if is_dataclass(hints[field.name]):
            own[field.name] = _construct(hints[field.name], values, f"{name}.")
        elif name in values:
            own[field.name] = values[name]
    return config_class(**own)
