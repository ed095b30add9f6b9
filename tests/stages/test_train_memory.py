"""The memory of train: bounded, whatever the size of the corpus, and flat from step to step; handles and
threads go back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import write_corpus

from miniplm.data.corpus import file_hashes, shard_name, write_dataset_files
from miniplm.runtime.artifacts import complete_output, open_output, read_manifest
from miniplm.runtime.files import hash_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BYTES_PER_CHUNK = 120  # of a corpus; its ids, here 260 bytes, are mapped
SOAK_STEPS = int(os.environ.get("SOAK_STEPS", "300"))
SOAK_GROWTH_MIB = 4

COMMON = """
import dataclasses, json, os, sys, threading
from miniplm.config import CheckpointConfig, EvalConfig
from miniplm.stages.train import train
from miniplm.training import loop
from training_runs import make_config

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if name in line) / 1024
"""

# Trains on a small corpus, then on a large one, and prints how far the second run has raised the peak of the
# process's own memory, in MiB. Pages of mapped files are not among it: the system takes them back.
BOUND = """
small, large, output = sys.argv[1:]
peak, ended = 0, threading.Event()

def watch():
    global peak
    while not ended.wait(0.001):
        peak = max(peak, status("RssAnon"))

threading.Thread(target=watch).start()
for number, data in enumerate((small, large)):
    before = peak
    config = make_config(data, f"{output}-{number}")
    train(dataclasses.replace(config, steps=8, eval=dataclasses.replace(config.eval, data=small)))
ended.set()
print(json.dumps(peak - before))
"""

# Trains, and prints memory, handles and threads at ten of its steps; then handles and threads after a run of
# 20 steps and after this one.
SOAK = """
data, output, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
step, taken, samples, ends, writers = loop.train_step, 0, [], [], []

class Remembered(loop.Background):
    def __init__(self, what):
        super().__init__(what)
        writers.append(self)

loop.Background = Remembered

def now():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

def sampled(*arguments):
    global taken
    taken += 1
    if taken % (steps // 10) == steps // 20:  # not where a checkpoint or the end is near
        for writer in writers:  # on a busy machine a checkpoint may still be being written
            writer.wait()
        samples.append((round(status("VmRSS"), 1), *now()))
    return step(*arguments)

config = dataclasses.replace(
    make_config(data, output), log_interval=10, checkpoint=CheckpointConfig(20, 2),
    eval=EvalConfig(data=data, interval=30, chunks=6),
)
train(dataclasses.replace(config, steps=20, output=output + "-first"))
ends.append((*now(), threading.active_count()))
loop.train_step = sampled
train(dataclasses.replace(config, steps=steps))
ends.append((*now(), threading.active_count()))
print(json.dumps({"samples": samples, "ends": ends}))
"""


def printed(script, *arguments):
    """What the last line says that a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def repeated(corpus, times, folder) -> str:
    """A corpus of the Arrow file of another, so many times."""
    manifest, hashes = read_manifest(corpus), [hash_files([Path(corpus, shard_name(0))])] * times
    open_output(folder, "prepare", {"times": times})
    for number in range(times):
        shutil.copy(Path(corpus, shard_name(0)), Path(folder, shard_name(number)))
    shutil.copytree(Path(corpus, "tokenizer"), Path(folder, "tokenizer"))
    results = {key: value for key, value in manifest.items() if key not in ("stage", "identity", "checksum")}
    results |= {key: times * manifest[key] for key in ("rows", "tokens", "predictions")}
    results |= {"fingerprint": write_dataset_files(folder, hashes, with_scores=False)}
    complete_output(folder, results | {"files": file_hashes(folder, hashes)})
    return str(folder)


def test_memory_grows_with_the_chunks_of_a_corpus_not_with_its_ids(tiny_tokenizer, tmp_path):
    chunks = [[*range(1 + row % 7, 65 + row % 7), 0] for row in range(10_000)]
    one = write_corpus(tmp_path / "one", chunks, tiny_tokenizer)
    small, large = (repeated(one, times, tmp_path / str(times)) for times in (4, 24))
    grown = printed(BOUND, small, large, tmp_path / "out")
    assert 0 < grown * 2**20 < BYTES_PER_CHUNK * 200_000


def test_soak(tiny_corpus, tmp_path):
    """20,000 steps: make soak."""
    found = printed(SOAK, tiny_corpus, tmp_path / "out", SOAK_STEPS)
    print(found)
    (first, handles, threads), *_, last = found["samples"][1:]
    assert last[0] - first < SOAK_GROWTH_MIB
    assert {tuple(sample[1:]) for sample in found["samples"][1:]} == {(handles, threads)}
    assert found["ends"][0] == found["ends"][1]
