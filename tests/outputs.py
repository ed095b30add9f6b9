"""What is in an output folder, and whether a run that is killed and run again ends in the same."""

import json
import os
import subprocess
import sys
from pathlib import Path


def contents(folder) -> dict[str, bytes]:
    """The bytes of every file under a folder, by its name in it; not how long it took."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "wall_time.json"
    }


KILLER = """
import json, os, pathlib, random, signal, sys, time, traceback
setup, call, output, pattern, targets = json.loads(sys.argv[1])
rng, struck = random.Random(0), 0
exec(setup)  # the imports, once: processes are forked before torch computes anything
for target in [*targets, None]:
    child = os.fork()
    if child == 0:
        try:
            exec(call)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if target is None:
        status = os.waitpid(child, 0)[1]
        if status:
            sys.exit(f"the last process failed, status {status}")
        print(struck)
        break
    while len(list(pathlib.Path(output).glob(pattern))) < target:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    struck += os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""


def kill_and_restart(setup: str, call: str, output, pattern: str, targets) -> int:
    """Run the Python code `call` in processes that die by SIGKILL shortly after `output` holds 1, 2, …
    (`targets`) files like `pattern`, each process continuing after the last; then once to its end. Returns
    how many were killed before it."""
    arguments = json.dumps([setup, call, str(output), pattern, list(targets)])
    run = subprocess.run(
        [sys.executable, "-c", KILLER, arguments],
        capture_output=True,
        text=True,
        cwd=output.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])
