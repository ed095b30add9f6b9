"""prepare ends in the same bytes after a fault at any rename, kill -9 at any moment, and Ctrl-C; no process
outlives it."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from outputs import contents
from texts import make_text, write_jsonl

from miniplm.config import PrepareConfig
from miniplm.data import readers
from miniplm.stages.prepare import prepare


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_at_every_rename_leaves_the_same_bytes(tiny_tokenizer, tmp_path, monkeypatch, when):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1_000)
    rng = random.Random(2)
    data = write_jsonl(
        tmp_path / "data.jsonl",
        [make_text(rng, 40) for _ in range(40)],
        [rng.choice("ab") for _ in range(40)],
    )

    def config(name):
        return PrepareConfig(
            data=data,
            tokenizer=tiny_tokenizer,
            output=str(tmp_path / name),
            workers=1,
            domain_column="domain",
            max_length=30,
            shard_tokens=700,
        )

    prepare(config("whole"))
    expected = contents(tmp_path / "whole")
    assert sum(name.startswith("data-") for name in expected) >= 4
    rename, calls, limit = {name: getattr(os, name) for name in ("replace", "rename")}, [0], [0]

    def failing(name):
        def call(*arguments):
            calls[0] += 1
            if calls[0] == limit[0] and when == "before":
                raise Killed
            rename[name](*arguments)
            if calls[0] == limit[0] and when == "after":
                raise Killed

        return call

    for name in rename:
        monkeypatch.setattr(os, name, failing(name))
    faults = 0
    while True:
        output, calls[0], limit[0] = f"out{faults}", 0, faults + 1
        try:
            prepare(config(output))
        except Killed:
            faults += 1
        else:
            break
        limit[0] = 0
        prepare(config(output))
        assert contents(tmp_path / output) == expected, f"fault at rename {faults}"
    assert (
        faults >= 2 * 4 + 4
    )  # manifest twice, tokenizer, dataset_info, state, and file and progress of each shard


def _prepare_in_small_blocks(arguments):
    readers.BLOCK_BYTES = 2_000
    os.setpgid(0, 0)
    prepare(PrepareConfig(**arguments))


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_random_moments_leaves_the_same_bytes(tiny_tokenizer, tmp_path, workers):
    rng = random.Random(workers)
    data = write_jsonl(
        tmp_path / "data.jsonl",
        [make_text(rng, 60) for _ in range(3_000)],
        [rng.choice("abc") for _ in range(3_000)],
    )
    arguments = dict(
        data=data,
        tokenizer=tiny_tokenizer,
        domain_column="domain",
        max_length=100,
        shard_tokens=5_000,
        workers=workers,
    )
    context = multiprocessing.get_context("forkserver")  # so that each child has the libraries loaded already
    context.set_forkserver_preload(
        ["miniplm.stages.prepare", "transformers.models.auto.tokenization_auto", "datasets"]
    )

    def start(output):
        process = context.Process(
            target=_prepare_in_small_blocks, args=(arguments | {"output": str(tmp_path / output)},)
        )
        process.start()
        return process

    def shards():
        progress = tmp_path / "out" / "progress.json"
        return len(json.loads(progress.read_text())["hashes"]) if progress.exists() else 0

    process = start("whole")
    process.join()
    assert process.exitcode == 0
    for _ in range(6):
        process, goal = start("out"), shards() + rng.randrange(4)
        until(lambda: shards() >= goal or process.exitcode is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.02 if goal else 0.2))
        assert process.exitcode is None, "too little work for six kills"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        until(lambda: not alive(process.pid))  # noqa: B023  its workers end with it
    assert shards() >= 3
    first = (tmp_path / "out" / "data-00000.arrow").stat()
    process = start("out")
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (
        tmp_path / "out" / "data-00000.arrow"
    ).stat().st_mtime_ns == first.st_mtime_ns  # it continued, it did not start again


def alive(group: int) -> bool:
    """Whether any process of a process group lives (a zombie does not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False


def until(holds, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_ctrl_c_ends_all_processes_and_the_same_command_continues(tiny_tokenizer, tmp_path):
    rng = random.Random(9)
    data = write_jsonl(tmp_path / "data.jsonl", [make_text(rng, 400) for _ in range(100)] * 20)
    command = [
        sys.executable,
        "-m",
        "miniplm.cli",
        "prepare",
        "--data",
        data,
        "--tokenizer",
        tiny_tokenizer,
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "2",
        "--shard_tokens",
        "1000",
    ]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until(lambda: (tmp_path / "out" / "progress.json").exists() or process.poll() is not None, 120)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and errors.splitlines()[-1] == "miniplm prepare: stopped; the same command continues"
    )
    assert "Traceback" not in errors and len(errors.splitlines()) == 1
    until(lambda: not alive(process.pid))
    subprocess.run(command, check=True, capture_output=True)
    prepare(
        PrepareConfig(
            data=data, tokenizer=tiny_tokenizer, output=str(tmp_path / "whole"), workers=1, shard_tokens=1_000
        )
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_import_neither_torch_nor_transformers():
    code = (
        "import sys; import miniplm.data.encoding, tokenizers, miniplm.runtime.workers\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
