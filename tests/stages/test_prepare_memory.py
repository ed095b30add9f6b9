"""The memory of prepare is bounded, however long a line, a value or a whole file is."""

import gzip
import json
import re
import subprocess
import sys

import pytest
import zstandard

from miniplm.config import PrepareConfig
from miniplm.data import readers, records
from miniplm.runtime.errors import UserError
from miniplm.stages.prepare import prepare

LIMIT = 1 << 16  # of a text, in place of 16 MiB
SIZE = 1 << 26  # of the hostile inputs: beyond what prepare may take for them
ALLOWED_MIB = 40
GOOD = b'{"text": "Some words."}\n'

# Runs prepare on each input, with the limits set down, and prints how far it has raised the process's peak.
PROBE = f"""
import sys
from miniplm.config import PrepareConfig
from miniplm.data import readers, records
from miniplm.runtime.errors import UserError
from miniplm.stages.prepare import prepare

records.MAX_TEXT_BYTES = readers.MAX_TEXT_BYTES = {LIMIT}
readers.MAX_LINE_BYTES, readers.BATCH_BYTES = {2 * LIMIT}, 1 << 18

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line) / 1024

tokenizer, output, warm_up, data = sys.argv[1:]
prepare(PrepareConfig(data=warm_up, tokenizer=tokenizer, output=output + "-0", workers=1))
before = peak()
try:
    prepare(PrepareConfig(data=data, tokenizer=tokenizer, output=output, workers=1))
except UserError as error:
    print(error)
print(f"MiB {{peak() - before:.1f}}")
"""


def one_line(path):
    path.write_bytes(GOOD + b'{"text": "' + b"a" * SIZE + b'"}\n' + GOOD)


def gzip_bomb(path):
    with gzip.open(path, "wb", 1) as file:
        file.write(GOOD + b'{"text": "' + b"a" * SIZE + b'"}\n' + GOOD)


def zstd_bomb(path):
    path.write_bytes(zstandard.compress(GOOD + b'{"text": "' + b"a" * SIZE + b'"}\n' + GOOD))


def one_json_document(path):
    path.write_bytes(b"\n" + json.dumps([{"text": "a" * 1000}] * (SIZE // 1000)).encode())


def one_text(path):
    path.write_bytes(b"a" * SIZE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "write", "refusal"),
    [
        ("a.jsonl", one_line, r":2: a line of 67,108,8\d\d bytes, more than 131,072"),
        ("a.jsonl.gz", gzip_bomb, r":2: a line of 67,108,8\d\d bytes"),
        ("a.jsonl.zst", zstd_bomb, r":2: a line of 67,108,8\d\d bytes"),
        ("a.jsonl", one_json_document, r":2: a line of 68,\d\d\d,\d\d\d bytes"),
        ("a.txt", one_text, ":1: column 'text' holds a text of 67,108,864 bytes, more than 65,536"),
    ],
)
def test_what_is_too_long_is_refused_by_its_place_in_bounded_memory(
    tiny_tokenizer, tmp_path, name, write, refusal
):
    data = tmp_path / name
    write(data)
    (tmp_path / "warm-up.jsonl").write_bytes(GOOD * 100 + b'{"text": "' + b"a" * LIMIT + b'"}\n')
    arguments = [tiny_tokenizer, str(tmp_path / "out"), str(tmp_path / "warm-up.jsonl"), str(data)]
    found = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert re.search(f"^{re.escape(str(data))}{refusal}", found.stdout, re.MULTILINE)
    assert "cut it into several documents" in found.stdout and not (tmp_path / "out").exists()
    assert float(re.search(r"^MiB (\S+)$", found.stdout, re.MULTILINE)[1]) < ALLOWED_MIB


@pytest.mark.parametrize("too_long", [False, True])
def test_the_limit_is_of_the_text_in_utf_8(tiny_tokenizer, tmp_path, monkeypatch, too_long):
    for module in (records, readers):
        monkeypatch.setattr(module, "MAX_TEXT_BYTES", 10)
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "\\u00e9\\u00e9\\u00e9\\u00e9\\u00e9' + b"a" * too_long + b'"}\n'
    )
    settings = dict(data=str(tmp_path / "a.jsonl"), tokenizer=tiny_tokenizer, output=str(tmp_path / "out"))
    if too_long:
        with pytest.raises(UserError, match=r":1: column 'text' holds a text of 11 bytes, more than 10"):
            prepare(PrepareConfig(**settings, workers=1))
    else:
        prepare(PrepareConfig(**settings, workers=1))
