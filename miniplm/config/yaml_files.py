"""YAML from anywhere: what is ambiguous, or grows when it is read, is refused in one line."""

import functools
import os
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 18  # a file of settings is a few KB
MAX_DEPTH = 32  # settings in groups in stages are 3 deep
MAX_NODES = 20_000  # scalars, lists and mappings, counted anew wherever an alias repeats them
MAX_NUMBER_LENGTH = 64  # characters; more digits than any setting has

PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
STR_TAG, MERGE_TAG, FLOAT_TAG = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge", "float"))
NOT_RESOLVED = (":timestamp", ":value", ":float")  # what looks like a date or "=" is text
# YAML 1.1 takes 1e-3 for text; here it is a number, as everywhere else.
FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
         |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
         |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
         |[-+]?\.(?:inf|Inf|INF)
         |\.(?:nan|NaN|NAN))$""",
    re.X,
)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: the file cannot be read, is not a regular file, too large, not UTF-8, or holds no mapping;
            or as in `load`. The text begins with the path.
    """
    shown = str(path) if str(path).isprintable() else repr(str(path))
    try:
        if not os.path.exists(path):  # never raises
            raise ValueError(f"{shown} does not exist")
        if not os.path.isfile(path):
            raise ValueError(f"{shown} is not a file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{shown} cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{shown} is larger than {MAX_BYTES // 1024} KiB, which no file of settings is")
    try:
        values = load(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{shown} is not UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{shown} must map names to values")
    return values


def load(text: str) -> Any:
    """The plain value that a YAML text stands for.

    Raises:
        ValueError: no YAML; a key that is not text, or stands twice in one mapping; an alias inside of what
            it repeats; more than MAX_DEPTH levels or MAX_NODES values, aliases written out; a tag that is
            not plain data; a number of more than MAX_NUMBER_LENGTH characters.
    """
    import yaml

    loader = None
    try:
        _check_depth(text)
        loader = _loader_class()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Graph().check(node)
        return _construct(loader, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        if "nest" in (error.problem or ""):  # PyYAML 6.0.4 and newer have a limit of their own
            raise ValueError("nested too deeply") from None
        where = f" (line {mark.line + 1:,}, column {mark.column + 1:,})" if mark else ""
        raise ValueError(f"not valid YAML{where}") from None
    except yaml.YAMLError:
        raise ValueError("not valid YAML (it holds characters that YAML does not allow)") from None
    finally:
        if loader is not None:
            loader.dispose()


def _construct(loader: Any, node: Any) -> Any:
    import yaml

    try:
        return loader.construct_document(node)
    except yaml.YAMLError:
        raise
    except Exception:  # PyYAML lets pass what int() and its like raise at a value such as `!!int x`
        raise ValueError("not valid YAML (a value is not what its tag says)") from None


@functools.cache
def _loader_class() -> Any:
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader: Any = type("Loader", (base,), {})
    loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(NOT_RESOLVED)]
        for letter, resolvers in base.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver(FLOAT_TAG, FLOAT, list("-+0123456789."))
    return loader


def _check_depth(text: str) -> None:
    """Before nodes are composed, which takes a call for each level."""
    import yaml

    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1}: nested more than {MAX_DEPTH} deep")


class _Graph:
    """Checks a document's nodes. An alias makes them a graph: each node is looked at once, and counted with
    all that hangs on it wherever it is used."""

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}  # id of a node → values in it, levels in it
        self.open: set[int] = set()  # nodes that are being looked at

    def check(self, node: Any) -> tuple[int, int]:
        line = node.start_mark.line + 1
        if id(node) in self.open:
            raise ValueError(f"line {line}: an alias stands inside of what it repeats")
        if id(node) in self.sizes:
            return self.sizes[id(node)]
        self.open.add(id(node))
        nodes, depth = 1, 0
        for inner in self._children(node, line):
            inner_nodes, inner_depth = self.check(inner)
            nodes, depth = nodes + inner_nodes, max(depth, inner_depth)
        if nodes > MAX_NODES:
            raise ValueError(f"line {line}: more than {MAX_NODES:,} values, with the aliases written out")
        if depth + 1 > MAX_DEPTH:
            raise ValueError(f"line {line}: nested more than {MAX_DEPTH} deep")
        self.open.remove(id(node))
        self.sizes[id(node)] = nodes, depth + 1
        return self.sizes[id(node)]

    def _children(self, node: Any, line: int) -> list[Any]:
        import yaml

        if node.tag not in PLAIN_TAGS:
            raise ValueError(f"line {line}: the tag {node.tag[:60]!r} is not plain data")
        if isinstance(node, yaml.ScalarNode):
            if node.tag != STR_TAG and len(node.value) > MAX_NUMBER_LENGTH:
                raise ValueError(f"line {line}: a number of {len(node.value):,} characters")
            return []
        if isinstance(node, yaml.SequenceNode):
            return node.value
        seen = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (STR_TAG, MERGE_TAG) or not isinstance(key, yaml.ScalarNode):
                shown = repr(key.value[:60]) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise ValueError(f"line {line}: the key {shown} is not text: put it in quotes")
            if key.value in seen:
                raise ValueError(f"line {line}: the key {key.value[:60]!r} stands twice in one mapping")
            seen.add(key.value)
        return [value for _, value in node.value]
