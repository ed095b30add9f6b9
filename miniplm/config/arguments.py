"""Flags, YAML and plain values → settings, with one-line errors."""

import json
import re
from dataclasses import fields
from typing import get_args, get_origin, get_type_hints


def _parser(config_class, **options):
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, description=config_class.__doc__, **options)
    if "config" not in {field.name for field in fields(config_class)}:
        parser.add_argument(
            "--config", action="config", help="A YAML file with any of these settings; flags after it win."
        )
    parser.add_class_arguments(config_class)
    return parser


def _build(parser, config_class, namespace):
    values = {
        name: value
        for name, value in vars(parser.instantiate(namespace)).items()
        if name in {field.name for field in fields(config_class)}
    }
    return config_class(**values)


def from_dict(config_class, values: dict):
    """Build a config from plain values as YAML holds them, nested ones too. ValueError on an unknown key or a
    wrong type."""
    from jsonargparse import ArgumentError

    parser = _parser(config_class)
    try:
        return _build(parser, config_class, parser.parse_object(values))
    except (ArgumentError, TypeError) as error:
        raise ValueError(_one_line(error)) from None


def from_arguments(config_class, arguments: list, prog: str):
    """Build a config from command-line flags (--some-name or --some_name, lists by repetition or as "a b")
    and --config YAML. ValueError on an unknown flag or a wrong value; exits after --help and
    --print_config."""
    from jsonargparse import ArgumentError

    parser = _parser(config_class, prog=prog)
    try:
        return _build(parser, config_class, parser.parse_args(_normalize(config_class, arguments)))
    except (ArgumentError, TypeError) as error:
        raise ValueError(_one_line(error)) from None


def _normalize(config_class, arguments: list) -> list:
    """Spell the flags as jsonargparse wants them: underscores, booleans with a value, lists as one JSON
    value."""
    kinds, result, lists = get_type_hints(config_class), [], {}
    position = 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        position += 1
        if not flag.startswith("--"):
            result.append(arguments[position - 1])
            continue
        flag = flag.replace("-", "_").replace("__", "--", 1)
        kind = kinds.get(flag[2:].split(".")[0])
        values = [value] if equals else []
        while not equals and position < len(arguments) and not arguments[position].startswith("--"):
            values.append(arguments[position])
            position += 1
        if get_origin(kind) in (list, tuple) and values and not values[0].startswith("["):
            lists.setdefault(flag, []).extend(values)
        elif kind is bool and not values:
            result.append(f"{flag}=true")
        elif len(values) == 1:
            result.append(f"{flag}={values[0]}")
        else:
            result.extend([flag, *values])
    for flag, values in lists.items():
        kind = get_args(kinds[flag[2:]])[0]
        result.append(
            f"{flag}={json.dumps([value if kind is str else json.loads(value) for value in values])}"
        )
    return result


def _one_line(error) -> str:
    """jsonargparse's message without its structure of several lines."""
    text = " ".join(str(error).split())
    key, value = re.search(r'Parser key "([^"]*)"', text), re.search(r"Given value: (.*)$", text)
    kinds = [
        kind
        for kind in dict.fromkeys(re.findall(r"<class '(\w+)'>", text.partition("Given value type")[0]))
        if kind != "NoneType"
    ]
    if key and value and kinds:
        return f"{key[1]}: expected {' or '.join(kinds)}, got {value[1]!r}"
    return text
