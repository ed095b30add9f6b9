"""Damage the files between the stages, and see that no command is misled: `make attacks`.

    python tests/attacks/attack.py --seed 1 --attacks 300 --only train --verbose

A small pipeline is run once, every stage of it complete, and four of them stopped halfway too. An attack
damages one file and runs one command that reads it, in a forked process. It is held when the command ends
with exit code 2 and one line that names the file or its folder, or with the result of the undamaged run;
`told` counts commands on their own complete output that left it as it was and said what is damaged.
Anything else, a traceback, another exit code, a signal, a hang, another result, is printed and counted.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
SECONDS = 120  # of a command


def run(command: str, tree: Path, log: Path, stop: tuple[str, str, int] | None = None) -> int:
    """The exit code of a command in a process of its own; negative for a signal."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        code = 99
        try:
            if stop:
                end_at_call(*stop)
            code = main(command.format(t=tree).split())
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_at_call(module: str, function: str, number: int) -> None:
    import importlib

    found, calls = importlib.import_module(f"miniplm.{module}"), []
    original = getattr(found, function)

    def ending(*arguments):
        calls.append(1)
        if len(calls) == number:
            os._exit(0)
        return original(*arguments)

    setattr(found, function, ending)


def figures(path: Path) -> bytes:
    """A file's bytes; of JSON its value, of metrics.jsonl without what depends on the clock."""
    if path.suffix == ".json":
        return repr(json.loads(path.read_bytes())).encode()
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    clock = ("tokens_per_second", "mfu", "checksum")
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return repr([{key: value for key, value in line.items() if key not in clock} for line in lines]).encode()


def digest(path: Path | None, log: Path) -> str:
    """Of what a command wrote; without a path, of what it printed."""
    if path is None:
        return log.read_text(errors="replace")
    total = sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        timed = "tensorboard" in file.parts or file.name == "wall_time.json"
        if file.is_file() and not timed and not file.name.endswith(".tmp"):
            total.update(str(file.relative_to(path)).encode() + b"\0" + figures(file))
    return total.hexdigest()


# ---- damage ----

TEXTS = [b"[]", b"null", b"{}", b'"x"', b"[" * 100_000, b'{"a": ' + b"9" * 5_000 + b"}", b"\xff\xfe{}", b"{"]
VALUES = [None, True, False, -1, 0, 1, 10**12, 2**70, 0.5, float("nan"), "x", "", [], {}, [[]], {"a": None}]


def change_json(path: Path, rng: random.Random) -> None:
    """A value somewhere in it replaced, or a key or an item gone."""
    value = json.loads(path.read_bytes())
    places: list = []

    def walk(inner):
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            places.append((inner, key))
            walk(inner[key])

    walk(value)
    shallow = places if rng.random() < 0.3 else [place for place in places if place[0] is value] or places
    container, key = rng.choice(shallow)
    if rng.random() < 0.25:
        del container[key]
    else:
        container[key] = rng.choice(VALUES)
    path.write_text(json.dumps(value, indent=2))


def change_text(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice(TEXTS))


def change_lines(path: Path, rng: random.Random) -> None:
    """A line gone, doubled, or in another's place."""
    lines = path.read_bytes().splitlines(keepends=True)
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    if rng.random() < 0.5:
        del lines[first]
    else:
        lines[first] = lines[second]
    path.write_bytes(b"".join(lines))


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def make_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def damage(path: Path, rng: random.Random) -> str:
    import damages

    kinds = [*damages.DAMAGES, empty, make_folder, change_text]
    kinds += {".json": [change_json] * 6, ".jsonl": [change_lines] * 4}.get(path.suffix, [])
    kind = rng.choice(kinds)
    kind(path, rng)
    return kind.__name__


def verdict(code: int, said: str, rel: Path, same: bool, again: bool) -> str:
    lines = [line for line in said.splitlines() if line.startswith("miniplm ")]
    named = any(name in said for name in (rel.name, rel.parent.name) if name)
    if "Traceback" in said or code not in (0, 2):
        return "failed"
    if code == 2:
        return "refused" if len(lines) == 1 and named else "unnamed"
    return "same" if same else "told" if again and named else "other result"


def main_loop(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    good, bad, log = folder / "good", folder / "bad", folder / "log"
    if folder.exists() and not good.exists():
        sys.exit(f"{folder} is there and not of earlier attacks: give another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build(good, lambda command, tree, stop=None: run(command, tree, log, stop))
    names = [name for name in COMMANDS if options.only in name]
    expected = {}
    for name in names:
        command, output, _ = COMMANDS[name]
        shutil.copytree(good, bad)
        assert run(command, bad, log) == 0, (name, log.read_text())
        expected[name] = digest(bad / output if output else None, log)
        shutil.rmtree(bad)
    rng, counts = random.Random(options.seed), {name: Counter() for name in names}
    for number in range(options.attacks):
        name = names[number % len(names)]
        command, output, attacked = COMMANDS[name]
        root = good / rng.choice(attacked.split())
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size]
        file = rng.choice([path for path in files if "tensorboard" not in path.parts] or [root])
        shutil.copytree(good, bad)
        rel = file.relative_to(good)
        kind = damage(bad / rel, rng)
        changed = not (bad / rel).is_file() or (bad / rel).read_bytes() != file.read_bytes()
        if changed:
            code = run(command, bad, log)
            said = log.read_text(errors="replace")
            try:
                same = code == 0 and digest(bad / output if output else None, log) == expected[name]
            except (OSError, ValueError):
                same = False
            result = verdict(code, said, rel, same, output is not None and output in attacked.split())
            counts[name][result] += 1
            if options.verbose or result not in ("refused", "same", "told"):
                last = " / ".join(said.strip().splitlines()[-2:])[-400:]
                print(f"{result}: #{number} {name}, {kind} {rel}: exit {code}: {last}", flush=True)
        shutil.rmtree(bad)
    total = sum(counts.values(), Counter())
    for name, found in [*counts.items(), ("all", total)]:
        print(f"{name:18} {sum(found.values()):5} attacks: {dict(found)}")
    failures = sum(total.values()) - total["refused"] - total["same"] - total["told"]
    print(f"seed {options.seed}: {sum(total.values())} attacks, {failures} not held")
    return min(failures, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attacks", type=int, default=210)
    parser.add_argument("--only", default="", help="commands whose name holds this")
    parser.add_argument("--folder", default="/tmp/miniplm-attacks")
    parser.add_argument("--verbose", action="store_true")
    chosen = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                      MINIPLM_CACHE=f"{chosen.folder}/cache")  # fmt: skip
    import datasets  # noqa: F401  what the commands import is imported once, before they are forked
    import pyarrow.parquet  # noqa: F401
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    from commands import COMMANDS, build

    from miniplm.cli import main
    from miniplm.data import readers
    from miniplm.stages import evaluate, export, generate, prepare, score, select, train  # noqa: F401

    torch.set_num_threads(1)
    readers.BLOCK_BYTES = 8_192  # so that prepare writes several files
    sys.exit(main_loop(chosen))
