"""A version's share of the text in one small folder, which all of its runs read; and weights in parts.

    python experiments/pack.py text --data DIR --version gpu --output PACK
    python experiments/pack.py weights --file MODEL.gguf --output PARTS
    python experiments/pack.py join --parts PARTS --output MODEL.gguf

`text` takes random documents of what fetch.py wrote, so many bytes of each domain as versions.py says, and
of each held-out set: PACK/text.jsonl.zst (text, domain), PACK/held-out.jsonl.zst (text, domain: a name of
each document's own, set, cluster) and PACK/pack.json. Equal data give equal bytes. `weights` cuts a file
into parts of at most 60 MiB, and `join` puts them together again: for machines that take 64 MiB at a time.
"""

import argparse
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import zstandard
from versions import VERSIONS, Version

from miniplm.runtime.errors import UserError
from miniplm.runtime.files import atomic_folder, atomic_write, hash_files, read_json, write_json

LARGEST = 60 * 2**20  # bytes of a part, and of a pack's text
LEVEL = 19  # of zstd
SEED = 0
Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_packed(path: Path) -> list[Row]:
    """The rows of a .jsonl.zst file."""
    with open(path, "rb") as file:
        content = zstandard.ZstdDecompressor().stream_reader(file).read().decode("utf-8")
    return [json.loads(line) for line in content.split("\n") if line]


def size(row: Row) -> int:
    """Bytes of the text."""
    return len(row["text"].encode("utf-8"))


def drawn(rows: Sequence[Row], budget: int) -> list[Row]:
    """Rows in a random order, equal for equal rows, as long as their texts fit into the budget of bytes."""
    taken, used = [], 0
    for row in random.Random(SEED).sample(rows, len(rows)):
        if (used := used + size(row)) > budget:
            break
        taken.append(row)
    return taken


def pool_rows(data: Path, version: Version) -> list[Row]:
    """The documents of the pack's text in random order."""
    by_domain: dict[str, list[Row]] = defaultdict(list)
    for path in sorted((data / "pool").glob("*.jsonl")):
        for row in read_rows(path):
            by_domain[row["domain"]].append({"text": row["text"], "domain": row["domain"]})
    rows = []
    for domain, budget in version.bytes_by_domain.items():
        if not by_domain[domain]:
            raise UserError(f"{data / 'pool'} has no text of the domain {domain!r}: run fetch.py for it")
        rows += drawn(by_domain[domain], budget)
    return random.Random(SEED).sample(rows, len(rows))


def held_out_rows(data: Path, version: Version) -> list[Row]:
    """The held-out documents, each a domain of its own; `document` stays the same in every version."""
    rows = []
    for path in sorted((data / "held-out").glob("*.jsonl")):
        named = [
            {
                "text": row["text"],
                "domain": f"{path.stem}/{number}",
                "set": path.stem,
                "cluster": row["cluster"],
            }
            for number, row in enumerate(read_rows(path))
        ]
        rows += drawn(named, version.held_out_bytes)
    if not rows:
        raise UserError(f"{data / 'held-out'} has no held-out text: run fetch.py")
    return rows


def write_packed(path: Path, rows: Iterable[Row]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(zstandard.ZstdCompressor(level=LEVEL).compress(lines.encode("utf-8")))


def pack_text(data: Path, version: str, output: Path) -> None:
    """Write the pack; one that stands is left as it is."""
    if output.exists():
        raise UserError(f"{output} exists already: delete it to pack anew")
    text, held_out = pool_rows(data, VERSIONS[version]), held_out_rows(data, VERSIONS[version])
    by_domain: dict[str, int] = defaultdict(int)
    for row in [*text, *({**row, "domain": row["set"]} for row in held_out)]:
        by_domain[row["domain"]] += size(row)
    with atomic_folder(output) as temporary:
        files = {"text.jsonl.zst": text, "held-out.jsonl.zst": held_out}
        for name, rows in files.items():
            write_packed(temporary / name, rows)
        packed = sum((temporary / name).stat().st_size for name in files)
        if packed > LARGEST:
            raise UserError(f"the pack would have {packed / 2**20:.1f} MiB, of at most 60: lower versions.py")
        hashes = {name: hash_files([temporary / name]) for name in files}
        write_json(temporary / "pack.json", {"version": version, "bytes": by_domain, "files": hashes})
    print(f"{output}: {packed / 2**20:.1f} MiB for {sum(map(size, text)) / 1e6:.1f} MB of text")


def pack_weights(file: Path, output: Path, largest: int = LARGEST) -> None:
    """Cut the file into OUTPUT/0/part, OUTPUT/1/part …, each in a folder of its own, with a parts.json."""
    content = file.read_bytes()
    parts = [content[start : start + largest] for start in range(0, len(content), largest)]
    for number, part in enumerate(parts):
        folder = output / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "part").write_bytes(part)
        facts = {"part": number, "parts": len(parts), "sha256": hashlib.sha256(content).hexdigest()}
        write_json(folder / "parts.json", facts)
    print(f"{output}: {len(parts)} parts of {file.name}")


def join_weights(parts: Path, output: Path) -> None:
    """Put the parts together; UserError where one is missing or damaged."""
    found = {int(path.name): path for path in parts.iterdir() if path.name.isdecimal()}
    facts = [read_json(found[number] / "parts.json") for number in sorted(found)]
    if not facts or sorted(found) != list(range(facts[0]["parts"])):
        raise UserError(f"{parts} has the parts {sorted(found)}: bring the others")
    content = b"".join((found[number] / "part").read_bytes() for number in sorted(found))
    if {hashlib.sha256(content).hexdigest()} != {fact["sha256"] for fact in facts}:
        raise UserError(f"the parts in {parts} are not those of one file: bring them again")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as temporary:
        temporary.write_bytes(content)
    print(f"{output}: {len(content):,} bytes")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text")
    text.add_argument("--data", required=True, type=Path, help="what fetch.py wrote")
    text.add_argument("--version", required=True, choices=VERSIONS)
    weights = commands.add_parser("weights")
    weights.add_argument("--file", required=True, type=Path)
    join = commands.add_parser("join")
    join.add_argument("--parts", required=True, type=Path)
    for command in (text, weights, join):
        command.add_argument("--output", required=True, type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "text":
            pack_text(options.data, options.version, options.output)
        elif options.command == "weights":
            pack_weights(options.file, options.output)
        else:
            join_weights(options.parts, options.output)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
