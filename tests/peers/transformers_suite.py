"""transformers' own tests of models with its "sdpa" replaced by our attention (make peers).

    python tests/peers/transformers_suite.py                   its common tests, from its source distribution
    python tests/peers/transformers_suite.py --source DIR      all tests of the models, from a checkout

The tests run twice, as they are and with the attention replaced; a line for each that ends in another way.
Ends with 1 if there is one that no refusal by name explains, or if the op never ran.

The source distribution of the installed version, as pip finds it, has the common tests alone; they run on the
tiny models of common_tests.py. A checkout must be of that version too: git clone --branch vVERSION.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import transformers

HERE = Path(__file__).parent
TYPES = ("qwen2", "llama", "qwen3", "gpt2", "gemma", "mistral", "phi", "olmo")
REFUSAL = 'attn_implementation="miniplm" does not support'
STUBS = {  # what the common tests import, of tests that the source distribution lacks
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def source_distribution(folder: Path) -> Path:
    """The unpacked source distribution of the installed version."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
    command += ["--dest", str(folder), f"transformers=={transformers.__version__}"]
    if subprocess.run(command).returncode:
        sys.exit(
            f"pip has no source distribution of transformers {transformers.__version__}: give --source DIR, "
            f"a checkout of it"
        )
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"transformers-{transformers.__version__}"


def common_tests(source: Path) -> list[str]:
    """Lay out the common tests with our tiny models; the files to run."""
    for name, mixin in STUBS.items():
        path = source / "tests" / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(f"class {mixin}:\n    pass\n", encoding="utf-8")
    (source / "tests/__init__.py").touch()
    shutil.copy(HERE / "common_tests.py", source / "tests/test_tiny_models.py")
    return ["tests/test_tiny_models.py"]


def run(source: Path, files: list[str], results: Path, options: list[str]) -> dict[str, str]:
    """{test: passed, skipped or the first line of its failure}."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    command += [f"--junitxml={results}", "-o", "addopts=", *options, *files]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ, PYTHONPATH=path, HF_HUB_OFFLINE="1", RUN_SLOW="0")
    environment["MINIPLM_COUNTS"] = str(results.with_suffix(".calls"))
    subprocess.run(command, cwd=source, env=environment, stdout=subprocess.DEVNULL)
    if not results.exists():
        sys.exit(f"pytest did not run in {source}: {' '.join(command)}")
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        inner = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        word = "passed" if inner is None else inner.tag
        text = (
            "" if word in ("passed", "skipped") else ": " + (inner.get("message") or "").split("\n")[0][:200]
        )
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = word + text
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, help="a checkout of transformers")
    parser.add_argument("-k", help="pytest's: the tests to run", default="")
    options = parser.parse_args()
    chosen = ["-k", options.k] if options.k else []
    with tempfile.TemporaryDirectory() as folder:
        if options.source:
            source = options.source.resolve()
            files = [f"tests/models/{name}/test_modeling_{name}.py" for name in TYPES]
            if missing := [name for name in files if not (source / name).exists()]:
                sys.exit(f"{source} has no {missing[0]}: it is not a checkout of transformers")
        else:
            source = source_distribution(Path(folder))
            files = common_tests(source)
            print("without --source: the common tests on tiny models; each model's own tests need a checkout")
        plain = run(source, files, Path(folder) / "plain.xml", chosen)
        replaced_results = Path(folder) / "replaced.xml"
        replaced = run(source, files, replaced_results, ["-p", "replaced_attention", *chosen])
        calls = int(replaced_results.with_suffix(".calls").read_text(encoding="utf-8"))
    different = [name for name in {**plain, **replaced} if plain.get(name) != replaced.get(name)]
    unexplained = [name for name in different if REFUSAL not in replaced.get(name, "")]
    for name in different:
        print(f"{name}\n    sdpa: {plain.get(name)}\n    ours: {replaced.get(name)}")
    for title, outcomes in (("sdpa", plain), ("ours", replaced)):
        counts = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
        print(f"{title}: {', '.join(f'{count} {word}' for word, count in counts.most_common())}")
    print(
        f"transformers {transformers.__version__}: {len(unexplained)} differ, "
        f"{len(different) - len(unexplained)} are refused by name; the op ran {calls:,} times"
    )
    return int(bool(unexplained) or not calls)


if __name__ == "__main__":
    sys.exit(main())
