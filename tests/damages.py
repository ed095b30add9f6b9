"""Damage to files, seeded: what disks, transfers and people do to them."""

import random
import shutil
from pathlib import Path

PAGE = 512


def flip_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero_page(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(content) - PAGE))
    end = min(start + PAGE, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def repeat(path: Path, rng: random.Random) -> None:
    """A part of the file in the place of another, as long."""
    content = bytearray(path.read_bytes())
    length = rng.randrange(1, max(2, len(content) // 2))
    source, target = (rng.randrange(len(content) - length + 1) for _ in range(2))
    content[target : target + length] = content[source : source + length]
    path.write_bytes(content)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, rng: random.Random) -> None:
    """With another file of its kind, if there is one; else it is gone."""
    others = sorted(other for other in path.parent.glob(f"*{path.suffix}") if other != path)
    if not others:
        return remove(path, rng)
    other = rng.choice(others)
    aside = path.with_name("aside")
    shutil.move(path, aside)
    shutil.move(other, path)
    shutil.move(aside, other)


DAMAGES = [flip_bit, flip_bit, flip_bit, zero_page, cut, append, repeat, remove, swap]


def damage_some_file(folder: Path, rng: random.Random, but: tuple[str, ...] = ()) -> str:
    """Damage one of the files below a folder, and say what was done. It may leave the file as it was."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    path, damage = rng.choice(paths), rng.choice(DAMAGES)
    damage(path, rng)
    return f"{damage.__name__} {path.relative_to(folder)}"
