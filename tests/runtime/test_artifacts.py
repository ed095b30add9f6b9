import errno
import json
import multiprocessing
import subprocess
import sys
from collections import Counter

import pytest

from miniplm.runtime.artifacts import complete_output, exclusive, open_output, read_manifest, reopen_output
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import atomic_folder, atomic_write, fingerprint, hash_files, write_json
from miniplm.runtime.schema import Count, Record


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


def test_a_failed_folder_leaves_no_trace_and_an_old_temporary_is_cleared(tmp_path):
    folder = tmp_path / "new" / "step-1"
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert list(folder.parent.iterdir()) == []
    (folder.parent / ".step-1.tmp").mkdir()
    (folder.parent / ".step-1.tmp" / "stale").touch()
    with atomic_folder(folder) as temporary:
        (temporary / "whole").touch()
    assert [found.name for found in folder.iterdir()] == ["whole"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "weights").touch(mode=0o600)
        (temporary / "other").touch()
    assert (tmp_path / "folder" / "weights").stat().st_mode == (tmp_path / "folder" / "other").stat().st_mode


def test_open_output_starts_continues_finishes_and_refuses(tmp_path):
    folder = tmp_path / "out"
    assert open_output(folder, "score", {"teacher": "a", "n": [1, 2]}) is False
    assert open_output(folder, "score", {"teacher": "a", "n": (1, 2)}) is False  # a tuple is a list in JSON
    with pytest.raises(UserError, match=r"teacher was \"a\", is now \"b\""):
        open_output(folder, "score", {"teacher": "b", "n": [1, 2]})
    with pytest.raises(UserError, match="holds a 'score' run, not a 'train' run"):
        open_output(folder, "train", {})
    with pytest.raises(UserError, match="not complete"):
        read_manifest(folder, "score")
    complete_output(folder, {"rows": 3})
    assert open_output(folder, "score", {"teacher": "a", "n": [1, 2]}) is True
    assert read_manifest(folder, "score")["rows"] == 3
    with pytest.raises(UserError, match="expected that of 'prepare' or 'select'"):
        read_manifest(folder, "prepare", "select")


def test_somebodys_folder_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        open_output(tmp_path, "score", {})
    with pytest.raises(UserError, match="is a file"):
        open_output(tmp_path / "thesis.tex", "score", {})
    assert [found.name for found in tmp_path.iterdir()] == ["thesis.tex"]


def test_broken_manifest_is_a_users_error(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_output(tmp_path, "score", {})
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "nothing")


HOLDER = """
import sys
from miniplm.runtime.artifacts import exclusive
with exclusive(sys.argv[1]):
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """(an output folder, a process that is writing to it)."""
    folder = tmp_path / "out"
    open_output(folder, "score", {})
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield folder, process
    process.kill()
    process.communicate()


def test_one_process_writes_to_a_folder(holder):
    folder, process = holder
    with pytest.raises(UserError, match=r"another process is writing to .*out: wait"), exclusive(folder):
        pytest.fail("two at once")
    process.communicate("\n")
    assert process.returncode == 0
    assert [found.name for found in folder.iterdir()] == ["manifest.json"]
    with exclusive(folder):
        pass
    assert [found.name for found in folder.iterdir()] == ["manifest.json"]


def test_a_killed_process_keeps_nobody_out_and_what_it_leaves_counts_as_nothing(holder):
    folder, process = holder
    process.kill()
    process.wait()
    (folder / "manifest.json").unlink()
    assert len(list(folder.iterdir())) == 1  # the lock's file
    assert open_output(folder, "train", {}) is False
    with exclusive(folder):
        pass
    assert [found.name for found in folder.iterdir()] == ["manifest.json"]


def test_a_file_system_without_locks_keeps_others_out_too(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    open_output(tmp_path, "score", {})
    with (
        exclusive(tmp_path),
        pytest.raises(UserError, match="another process is writing"),
        exclusive(tmp_path),
    ):
        pytest.fail("two at once")
    with exclusive(tmp_path):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["manifest.json"]


CORPUS = {
    "stage": "prepare",
    "complete": True,
    "identity": {"data": "d"},
    "fingerprint": "f",
    "rows": 3,
}


class CorpusLike(Record):
    fingerprint: str
    rows: Count


def test_a_manifest_is_read_with_what_else_is_in_it(tmp_path):
    write_json(tmp_path / "manifest.json", {**CORPUS, "new": {"a": [1, None]}})
    found = read_manifest(tmp_path, "prepare", schema=CorpusLike)
    assert found == {**CORPUS, "new": {"a": [1, None]}}


NO_MANIFESTS = {
    "list": "[]",
    "null": "null",
    "text": '"manifest"',
    "number": "5",
    "nothing in it": "{}",
    "no stage": json.dumps({**CORPUS, "stage": None}),
    "a list for a stage": json.dumps({**CORPUS, "stage": ["prepare"]}),
    "complete in words": json.dumps({**CORPUS, "complete": "yes"}),
    "complete as a number": json.dumps({**CORPUS, "complete": 1}),
    "identity as a list": json.dumps({**CORPUS, "identity": []}),
    "a number of 5,000 digits": json.dumps(CORPUS).replace("3}", "9" * 5000 + "}"),
    "deep": "[" * 100_000,
    "deep and closed": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "not UTF-8": "\xff",
    "cut": json.dumps(CORPUS)[:-5],
}
NO_CORPUS = {
    "a key lacks": json.dumps({key: value for key, value in CORPUS.items() if key != "rows"}),
    "rows as text": json.dumps({**CORPUS, "rows": "3"}),
    "rows below 0": json.dumps({**CORPUS, "rows": -1}),
    "rows with a fraction": json.dumps({**CORPUS, "rows": 3.5}),
    "rows past int64": json.dumps({**CORPUS, "rows": 2**63}),
}


@pytest.mark.parametrize("content", NO_MANIFESTS.values(), ids=NO_MANIFESTS)
def test_what_is_no_manifest_is_one_line(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    for reader in (
        lambda: read_manifest(tmp_path),
        lambda: open_output(tmp_path, "prepare", {}),
        lambda: complete_output(tmp_path, {}),
        lambda: reopen_output(tmp_path),
    ):
        with pytest.raises(UserError, match=r"manifest\.json is (not a manifest|not valid JSON)") as caught:
            reader()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("content", NO_CORPUS.values(), ids=NO_CORPUS)
def test_a_manifest_that_lacks_what_is_relied_on_is_one_line(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    assert read_manifest(tmp_path, "prepare")["fingerprint"] == "f"
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest of miniplm \(rows: ") as caught:
        read_manifest(tmp_path, "prepare", schema=CorpusLike)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_an_identity_that_is_as_deep_as_json_can_be(tmp_path):
    deep = '{"a":' * 900 + "1" + "}" * 900
    (tmp_path / "manifest.json").write_text(json.dumps({**CORPUS, "identity": {}}).replace("{}", deep))
    with pytest.raises(UserError, match="holds another prepare run"):
        open_output(tmp_path, "prepare", {"a": 1})


def test_hashes_follow_content_and_order(tmp_path):
    for name, text in ("a", "x"), ("b", "y"), ("c", "x"):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert hash_files([a, b]) == hash_files([c, b]) != hash_files([b, a])
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})


def claim(folders, barrier, answers):
    for folder in folders:
        barrier.wait()
        try:
            open_output(folder, "prepare", {})
            with exclusive(folder):
                answers.put("written")
                barrier.wait()
        except UserError as error:
            answers.put("another process is writing" in str(error))
            barrier.wait()


@pytest.mark.slow
def test_of_runs_that_begin_at_the_same_moment_one_writes(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(3, timeout=30), context.Queue()
    folders = [tmp_path / str(number) for number in range(30)]
    processes = [
        context.Process(target=claim, args=(folders, barrier, answers), daemon=True) for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = Counter(answers.get(timeout=60) for _ in range(3 * len(folders)))
    for process in processes:
        process.join()
    assert found == {"written": len(folders), True: 2 * len(folders)}
    assert {path.name for folder in folders for path in folder.iterdir()} == {"manifest.json"}
