"""The experiment of docs/experiments/plan.md, as one command that continues where it was stopped.

    python experiments/run.py --version cpu --pack PACK --teacher MODEL --output DIR [--minutes 9]

PACK is what pack.py wrote for the version. DIR/pipelines has a file for `miniplm run` for each student of
each arm and seed (those of pipelines/, filled in with versions.py), DIR/runs what they wrote, DIR/logs what
they printed. The order is that of the plan: scores, then for each student its learning rate on arm C, and
the queue of its runs. --minutes ends this call; the version's own minutes, over all calls, end the
experiment: what does not stand by then is left out. --results copies what tables.py reads: all but weights,
corpora and scores.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml
from kept import write_kept
from versions import VERSIONS, Version

from miniplm.analysis.evaluation import read_evaluation
from miniplm.data.corpus import Corpus
from miniplm.data.tokenizer import load_tokenizer, save_tokenizer
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import atomic_folder, fingerprint, read_json, write_json

PIPELINES = Path(__file__).resolve().parent / "pipelines"
GRACE = 120  # seconds that a stopped run has for its checkpoint
RESULTS = {"manifest.json", "metrics.jsonl", "wall_time.json"}  # of a stage's folder


class OutOfTime(Exception):
    """The time is over; what was running has written its checkpoint."""


class Job(NamedTuple):
    """A student of an arm and a seed."""

    student: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.student}-{self.seed}"


class Experiment:
    """A version with its places; raises OutOfTime once its time, or this call's, is over."""

    def __init__(self, version: Version, pack: Path, teacher: Path, output: Path, minutes: float):
        self.version, self.output = version, output
        self.tokenizer = output / "tokenizer" if version.vocabulary else teacher
        self.values = {
            **version.settings,
            "text": str(pack / "text.jsonl.zst"),
            "held_out": str(pack / "held-out.jsonl.zst"),
            "teacher": str(teacher),
            "tokenizer": str(self.tokenizer),
            "longest": 2 * version.settings["length"],
        }
        self.call_ends = time.monotonic() + 60 * minutes
        self.tasks: list[str] = []  # .yaml files of tasks, asked of each student

    # ---- time ----

    @property
    def spent(self) -> float:
        """Seconds of the version's time that are over."""
        path = self.output / "progress.json"
        return read_json(path)["seconds"] if path.exists() else 0.0

    def seconds_left(self) -> float:
        left = min(60 * self.version.minutes - self.spent, self.call_ends - time.monotonic())
        if left <= 0:
            raise OutOfTime
        return left

    # ---- pipelines ----

    def stages(self, arm: str | None = None, **values: Any) -> dict[str, Any]:
        """The shared stages, and those of an arm, filled in."""
        folder = PIPELINES / self.version.pipelines
        found = {}
        for name in ("shared", arm) if arm else ("shared",):
            content = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
            found.update(filled(content, {**self.values, **values}))
        return found

    def run(self, name: str, stages: dict[str, Any]) -> None:
        """`miniplm run` of these stages, unless it has ended well before.

        Raises:
            OutOfTime; UserError: it failed.
        """
        done = self.output / "done" / f"{name}.json"
        if done.exists() and read_json(done) == fingerprint(stages):
            return
        left, start = self.seconds_left(), time.monotonic()
        for folder in ("pipelines", "logs", "done"):
            (self.output / folder).mkdir(parents=True, exist_ok=True)
        config = self.output / "pipelines" / f"{name}.yaml"
        config.write_text(yaml.safe_dump(stages, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "miniplm", "run", "--config", str(config)]
        command += ["--output", str(self.output / "runs")]
        log = self.output / "logs" / f"{name}.log"
        before = self.spent
        try:
            code = waited(command, log, left)
        finally:
            write_json(
                self.output / "progress.json", {"seconds": round(before + time.monotonic() - start, 1)}
            )
        if code is None:
            raise OutOfTime
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]
            raise UserError(f"{name} failed, exit code {code}: {last} (all of it in {log})")
        write_json(done, fingerprint(stages))
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)

    # ---- the parts of the plan ----

    def share(self) -> None:
        """Corpora, reference model, scores, and the students' tokenizer where they have their own."""
        stages = self.stages()
        if self.version.vocabulary:
            self.run("split", {"reference-split": stages["reference-split"]})
            write_tokenizer(self.output / "runs" / "reference-split", self.tokenizer, self.version.vocabulary)
        self.run("shared", stages)

    def rate(self, student: str) -> float:
        """The learning rate with the lowest in-pool loss of arm C; the lower one of equals."""
        losses = {}
        for number, rate in enumerate(sorted(self.version.rates)):
            run, steps = f"tune-{student}-{number}", self.version.tuning_steps
            values = {**self.of_steps(steps), "rate": rate, "seed": self.version.tuning_seed, "run": run}
            stages = self.stages("C", **self.version.students[student], **values)
            del stages[f"{run}-clean"]  # nothing is tuned on it
            try:
                self.run(run, stages)
            except UserError as error:  # a rate at which it does not converge is none
                print(f"{error}; left out", flush=True)
                continue
            loss = read_evaluation(self.output / "runs" / f"{run}-pool.json").loss
            if loss is not None:
                losses[rate] = loss
        if not losses:
            raise UserError(f"no learning rate of {self.version.rates} gives student {student} a finite loss")
        best = min(losses, key=lambda rate: losses[rate])
        losses_by_rate = {f"{rate:g}": loss for rate, loss in losses.items()}
        write_json(self.output / f"rate-{student}.json", {"rate": best, "in_pool_loss": losses_by_rate})
        return best

    def of_steps(self, steps: int) -> dict[str, int]:
        return {"steps": steps, "warmup": max(steps // 10, 1)}

    def train(self, job: Job, rate: float) -> None:
        steps = round(self.version.steps * self.version.steps_of.get(job.arm, 1))
        run_of_c = self.output / "runs" / job._replace(arm="C").name
        values = {**self.of_steps(steps), "rate": rate, "seed": job.seed, "run": job.name}
        student = self.version.students[job.student]
        self.run(job.name, self.stages(job.arm, **student, **values, run_of_C=str(run_of_c)))
        if self.tasks:
            model = str(self.output / "runs" / job.name)
            asked = {"stage": "evaluate", "model": model, "tasks": self.tasks}
            self.run(f"{job.name}-tasks", {f"{job.name}-tasks": asked})


def queue(version: Version, student: str) -> list[Job]:
    """The runs of a student in the plan's order: those arms that have the most seeds seed by seed, then the
    others arm by arm."""
    most = max(map(len, version.seeds.values()))
    first = [arm for arm, seeds in version.seeds.items() if len(seeds) == most]
    jobs = [Job(student, arm, seed) for seed in version.seeds[first[0]] for arm in first]
    others = [(arm, seeds) for arm, seeds in version.seeds.items() if arm not in first]
    return jobs + [Job(student, arm, seed) for arm, seeds in others for seed in seeds]


def filled(value: Any, values: dict[str, Any]) -> Any:
    """<name> in the keys and texts of a nested value replaced; a text that is nothing else becomes the value
    itself."""
    if isinstance(value, dict):
        return {filled(key, values): filled(inner, values) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, values) for inner in value]
    if isinstance(value, str):
        for name, given in values.items():
            if value == f"<{name}>":
                return given
            value = value.replace(f"<{name}>", str(given))
    return value


def waited(command: list[str], log: Path, seconds: float) -> int | None:
    """The command's exit code; None where it was stopped because the time was over. It does not outlive this
    process's own end by a signal."""
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def write_tokenizer(corpus: Path, folder: Path, vocabulary: int) -> None:
    """A byte-level BPE of so many ids, trained on a corpus's text, unless the folder is there."""
    if folder.exists():
        return
    from transformers import Qwen2Tokenizer

    opened, own = Corpus(corpus), load_tokenizer(str(corpus / "tokenizer"))
    texts: Iterator[str] = (
        own.decode(row, skip_special_tokens=True) for row in opened.rows(range(len(opened)))
    )
    trained = Qwen2Tokenizer().train_new_from_iterator(texts, vocabulary, show_progress=False)
    with atomic_folder(folder) as temporary:
        save_tokenizer(trained, temporary)


def copy_results(output: Path, folder: Path) -> None:
    """Copy what tables.py reads and what tells how it came about."""
    for path in sorted(output.rglob("*")):
        inner = path.relative_to(output)
        wanted = inner.parts[0] != "runs" or path.name in RESULTS or (len(inner.parts) == 2 and path.suffix)
        left_out = {"tokenizer", "checkpoints"} & set(inner.parts) or folder in path.parents
        if path.is_file() and wanted and not left_out:
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inner)


def carry_out(experiment: Experiment) -> list[str]:
    """All of the plan; the names of the runs that failed."""
    failed = []
    experiment.share()
    for student in experiment.version.students:
        rate = experiment.rate(student)
        for job in queue(experiment.version, student):
            try:
                experiment.train(job, rate)
            except UserError as error:
                print(f"{error}; left out, the same command tries it again", flush=True)
                failed.append(job.name)
    return failed


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", choices=VERSIONS, default="cpu")
    parser.add_argument("--pack", required=True, type=Path, help="what pack.py wrote for the version")
    parser.add_argument("--teacher", required=True, type=Path, help="a model with its tokenizer")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this call")
    parser.add_argument(
        "--tasks", nargs="+", type=Path, default=[], help="files of benchmarks/fetch_tasks.py"
    )
    parser.add_argument("--results", type=Path, help="a folder for a copy of the results")
    options = parser.parse_args(arguments)
    failed: list[str] = []
    try:
        packed = read_json(options.pack / "pack.json")["version"]
        if packed != options.version:
            raise UserError(f"{options.pack} is a pack of version {packed}: make one of {options.version}")
        places = [path.resolve() for path in (options.pack, options.teacher, options.output)]
        experiment = Experiment(VERSIONS[options.version], *places, options.minutes)
        experiment.tasks = [str(path.resolve()) for path in options.tasks]
        try:
            failed = carry_out(experiment)
            print(f"all runs stand, after {experiment.spent / 60:.0f} minutes" if not failed else "")
        except OutOfTime:
            over = experiment.spent >= 60 * experiment.version.minutes
            print("the version's time is over: what stands counts" if over else "not all done: run it again")
        if (places[2] / "done" / "shared.json").exists():
            write_kept(places[2] / "runs", places[2] / "kept.json")
        if options.results:
            copy_results(places[2], options.results)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if failed:
        parser.exit(1, f"{parser.prog}: failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # of a process of its own only: main leaves a caller's as they are
    main()
