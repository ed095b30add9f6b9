"""A settings class as a flat table: dotted names, types, old names."""

import difflib
import functools
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .yaml_files import read_mapping


class Schema:
    """What may be set in a settings class, and in the settings classes that its fields hold (its groups).

    Attributes:
        kinds: dotted name → type, of every setting, those in groups too.
        groups: dotted name → settings class.
        defaults: dotted name → default, of the settings that have one.
        notes: dotted name → what the help says of a default that depends on the device.
        docs: dotted name → what the class says of a setting or a group.
        aliases: old dotted name → present one; a class lists its own as
            `ALIASES: ClassVar[dict[str, str]]`.
    """

    def __init__(self, config_class: type):
        self.config_class = config_class
        self.kinds: dict[str, Any] = {}
        self.groups: dict[str, type] = {}
        self.defaults: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self._add(config_class, "")

    def _add(self, config_class: type, prefix: str) -> None:
        hints = get_type_hints(config_class)
        for old, new in getattr(config_class, "ALIASES", {}).items():
            self.aliases[prefix + old] = prefix + new
        for field in settings_of(config_class):
            name, kind = prefix + field.name, hints[field.name]
            if isinstance(kind, type) and is_dataclass(kind):
                self.groups[name] = kind
                self._add(kind, f"{name}.")
                continue
            self.kinds[name] = kind
            if field.default is not MISSING:
                self.defaults[name] = field.default
            if "default" in field.metadata:
                self.notes[name] = f"Default: {field.metadata['default']}."

    @functools.cached_property
    def docs(self) -> dict[str, str]:
        import docstring_parser  # only for help: benchmarks on a borrowed machine do without

        docs = {}
        for prefix, config_class in {"": self.config_class, **self.groups}.items():
            for found in docstring_parser.parse_from_object(config_class).params:
                name = f"{prefix}.{found.arg_name}" if prefix else found.arg_name
                text = " ".join((found.description or "").split())
                docs[name] = f"{text} {self.notes[name]}" if name in self.notes else text
        return docs

    def flatten(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Nested settings → present dotted name → value.

        A group is a mapping, its settings class, or the path of a YAML file.

        Raises:
            ValueError: an unknown name, one given twice (under its old and its present name, too), or a group
                that is none of those.
        """
        flat: dict[str, Any] = {}
        spelled: dict[str, str] = {}  # present name → the name that was used
        self._flatten(values, "", flat, spelled)
        return flat

    def _flatten(self, values: Mapping, prefix: str, flat: dict, spelled: dict) -> None:
        for key, value in values.items():
            if not isinstance(key, str):
                raise ValueError(f"the name of a setting must be text, got {shown(key)}")
            used = prefix + key
            name = self.aliases.get(used, used)
            if name in self.groups:
                self._flatten(self.group_values(name, value), f"{name}.", flat, spelled)
                continue
            if name not in self.kinds:
                raise ValueError(self.unknown(used))
            if name in flat:
                raise ValueError(twice(name, spelled[name], used))
            flat[name], spelled[name] = value, used

    def group_values(self, name: str, value: Any) -> Mapping[str, Any]:
        """The settings of a group as given: a mapping, its settings class, or the path of a YAML file."""
        if isinstance(value, Mapping):
            return value
        if isinstance(value, self.groups[name]):
            return {field.name: getattr(value, field.name) for field in settings_of(self.groups[name])}
        if isinstance(value, str):
            return read_mapping(value)
        raise ValueError(f"{name}: expected settings of its own ({name}.…), got {shown(value)}")

    def unknown(self, name: str) -> str:
        """The line about a setting that does not exist."""
        known = [*self.kinds, *self.groups, *self.aliases]
        last = {each.rpartition(".")[2]: each for each in reversed(known)}
        close = difflib.get_close_matches(name, known, 1) or [
            last[match] for match in difflib.get_close_matches(name.rpartition(".")[2], last, 1)
        ]
        hint = f": did you mean {self.aliases.get(close[0], close[0])}?" if close else ""
        return f"there is no setting {name[:80]!r}{hint}"


def settings_of(config_class: type) -> tuple[Field, ...]:
    return fields(config_class)


def twice(name: str, first: str, second: str) -> str:
    """The line about a setting that was given twice."""
    if first == second:
        return f"{name} is given twice"
    old = first if second == name else second
    return f"give {name} or {old}, its old name, not both"


def is_list(kind: Any) -> bool:
    return get_origin(kind) in (list, tuple)


def takes_none(kind: Any) -> bool:
    return get_origin(kind) is Union and type(None) in get_args(kind)


def takes_text(kind: Any) -> bool:
    """Whether a text can be a value as it is, or an element of one."""
    return kind is str or get_origin(kind) is Literal or any(map(takes_text, get_args(kind)))


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def expected(kind: Any) -> str:
    """A type in words."""
    if takes_none(kind):
        return " or ".join(expected(each) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Literal:
        options = [str(option) for option in get_args(kind)]
        return f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    if is_list(kind):
        inner = [each for each in get_args(kind) if each is not Ellipsis]
        plural = {int: "whole numbers", float: "numbers", bool: "times true or false", str: "texts"}[inner[0]]
        return f"a list of {plural}" if len(inner) == 1 else f"{len(inner)} {plural}"
    return NAMES[kind]


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: Any) -> str:
    """A wrong value as a message quotes it: short, in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of hundreds of digits"
    return " ".join(_short.repr(value).split())
