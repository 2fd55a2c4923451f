"""Archives: damaged, cut, lying about sizes, leading outside, full of links, of headers without end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import resource
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ffvt.data.archives import extract_archive
from tests.hostile.case import Case

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
MEMORY = 300 << 20  # bytes that may be added to what the process has


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "", **more: object) -> bytes:
    """One header block of a tar."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def member(name: str, content: bytes = b"x", **more: object) -> bytes:
    return header(name, len(content), **more) + padded(content)


def pax(text: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with one record after another, as they are given."""
    return header("x", len(text), kind) + padded(text)


def record(key: bytes, value: bytes) -> bytes:
    """A record of an extended header, which begins with its own length."""
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 4
    return bytes(changed)


THREE = [member(f"set/{name}", name.encode() * 700) for name in "abc"]
WHOLE = b"".join(THREE) + END


def big_header(kind: bytes) -> bytes:
    """A header of 400 MB, which compresses to nothing."""
    size = 400 << 20
    return gzip.compress(header("x", size, kind) + b"a" * size + member("a") + END, 1)


def refused(
    name: str, content: bytes | Callable[[], bytes], named: str, suffix: str = "tar", slow: bool = False
) -> Case:
    """An archive that must be refused, in bounded memory, and of which nothing may stay."""

    def attempt(folder: Path) -> None:
        archive = folder / f"set.{suffix}"
        archive.write_bytes(content() if callable(content) else content)
        (folder / "data").mkdir()
        with bounded_memory():
            extract_archive(archive, folder / "data")

    return Case("archives", name, attempt, named, seconds=20, slow=slow)


class bounded_memory:
    """Within it the process may not take more than MEMORY beside what it has."""

    def __enter__(self) -> None:
        self.earlier = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, self.earlier[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.earlier)


def accepted(name: str, content: bytes, files: dict[str, bytes], suffix: str = "tar") -> Case:
    """An archive that must be unpacked whole."""

    def attempt(folder: Path) -> None:
        archive = folder / f"set.{suffix}"
        archive.write_bytes(content)
        extract_archive(archive, folder / "out")
        found = {
            str(path.relative_to(folder / "out")): path.read_bytes()
            for path in folder.rglob("out/**/*")
            if path.is_file()
        }
        assert found == files, sorted(found)

    return Case("archives", name, attempt, None, seconds=20)


def zeros(size: int) -> Callable[[Path], None]:
    """A file that was set aside for a download, and never written."""

    def attempt(folder: Path) -> None:
        with (folder / "set.tar").open("wb") as file:
            file.truncate(size)
        extract_archive(folder / "set.tar", folder / "data")

    return attempt


def no_regular_file(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        make(folder / "set.tar")
        extract_archive(folder / "set.tar", folder / "data")

    return attempt


def zip_of(members: Sequence[tuple[str | zipfile.ZipInfo, bytes]], level: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", level) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return file.getvalue()


def zip_special(kind: int) -> bytes:
    info = zipfile.ZipInfo("special")
    info.external_attr = (kind | 0o777) << 16
    return zip_of([("a.txt", b"x"), (info, b"/etc/passwd")])


def zip_patched(field: int, central: int, value: bytes) -> bytes:
    """A zip file with a field of its member changed, at both places where it stands."""
    content = bytearray(zip_of([("a.txt", bytes(10_000))]))
    for signature, offset in ((b"PK\x03\x04", field), (b"PK\x01\x02", central)):
        place = content.index(signature) + offset
        content[place : place + len(value)] = value
    return bytes(content)


def overlapping_zip() -> bytes:
    """A zip bomb: two hundred members that are one and the same 10 MB."""
    content = zip_of([("0", bytes(10 << 20))])
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entry = bytearray(content[start:end])
    entries = []
    for number in range(200):
        name = b"%03d" % number
        changed = bytearray(entry[:46])
        changed[28:30] = struct.pack("<H", len(name))
        entries.append(bytes(changed) + name)
    directory = b"".join(entries)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 200, 200, len(directory), start, 0)
    return content[:start] + directory + tail


def mutated(make: Callable[[], bytes], suffix: str) -> Callable[[Path], None]:
    """Two hundred changed copies: each is unpacked, or refused in one bounded line with nothing left."""

    def attempt(folder: Path) -> None:
        draw, content = random.Random(suffix), make()
        archive = folder / f"set.{suffix}"
        for number in range(200):
            mutant = bytearray(content)
            for _ in range(draw.randint(1, 6)):
                mutant[draw.randrange(len(mutant))] = draw.randrange(256)
            if draw.random() < 0.3:
                del mutant[draw.randrange(len(mutant)) :]
            archive.write_bytes(mutant)
            message = _refusal(archive, folder / f"out{number}")
            assert len(message) < 900, message
            assert not message or message.isprintable(), message
            assert not message or not (folder / f"out{number}").exists(), message
            assert not list(folder.glob(".extract-*"))

    return attempt


def _refusal(archive: Path, folder: Path) -> str:
    try:
        extract_archive(archive, folder)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def interrupted(folder: Path) -> None:
    """Ctrl-C while it is unpacked leaves nothing."""
    (folder / "set.tar").write_bytes(WHOLE)
    earlier = tarfile.TarFile.extract

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    tarfile.TarFile.extract = interrupt
    try:
        extract_archive(folder / "set.tar", folder / "data")
    except KeyboardInterrupt:
        assert sorted(path.name for path in folder.iterdir()) == ["set.tar"]
        return
    finally:
        tarfile.TarFile.extract = earlier
    raise AssertionError("was not interrupted")


def modes_and_times(folder: Path) -> None:
    """A set-user-id file that nobody may read, of the year 10^9, becomes a plain file."""
    content = pax(record(b"mtime", b"1e300")) + member("a", mode=0o4000) + member("b", mode=0o6777, uid=0) + END
    (folder / "set.tar").write_bytes(content)
    extract_archive(folder / "set.tar", folder / "out")
    for name in "ab":
        mode = (folder / "out" / name).stat().st_mode
        assert not mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH), oct(mode)
        assert mode & stat.S_IRUSR, oct(mode)


def many_members(count: int) -> bytes:
    return b"".join(header(f"{number}") for number in range(count)) + END


def too_many(folder: Path) -> None:
    (folder / "set.tar").write_bytes(many_members(200))
    extract_archive(folder / "set.tar", folder / "data", max_members=100)


CUTS = {
    "before the third header": WHOLE[: len(THREE[0]) * 2],
    "within the third header": WHOLE[: len(THREE[0]) * 2 + 100],
    "within the third member": WHOLE[: len(THREE[0]) * 2 + BLOCK + 100],
    "within the padding of the third member": b"".join(THREE)[:-10],
    "before its end blocks": b"".join(THREE),
    "between its end blocks": b"".join(THREE) + bytes(BLOCK),
    "within its end blocks": b"".join(THREE) + bytes(BLOCK + 100),
}
DAMAGES = {
    "one bit of the third header": flipped(WHOLE, len(THREE[0]) * 2 + 3),
    "one bit of the third header's checksum": flipped(WHOLE, len(THREE[0]) * 2 + 150),
    "a block of zeros before the third header": THREE[0] + THREE[1] + bytes(BLOCK) + THREE[2] + END,
    "two blocks of zeros before the third header": THREE[0] + THREE[1] + END + THREE[2] + END,
    "the third header of zeros": THREE[0] + THREE[1] + bytes(BLOCK) + THREE[2][BLOCK:] + END,
    "the third header of noise": THREE[0] + THREE[1] + random.Random(0).randbytes(BLOCK) + THREE[2][BLOCK:] + END,
    "text after its end": WHOLE + b"<html>connection closed</html>",
    "another archive after its end": WHOLE + WHOLE,
}
COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
LONG = b"a" * 300
MANY = [record(b"key%d" % number, b"v") for number in range(200)]

CASES = [
    *(refused(f"tar, cut {where}", content, "set.tar") for where, content in CUTS.items()),
    *(
        refused(f"tar.gz, cut inside {where}", gzip.compress(content), "set.tar.gz", "tar.gz")
        for where, content in list(CUTS.items())[:2]
    ),
    *(refused(f"tar, {what}", content, "set.tar") for what, content in DAMAGES.items()),
    *(
        refused(f"tar.{kind}, cut", compress(WHOLE)[:-20], "set.tar", f"tar.{kind}")
        for kind, compress in COMPRESSED.items()
    ),
    *(
        refused(f"tar.{kind}, last byte changed", flipped(compress(WHOLE), -5), "set.tar", f"tar.{kind}")
        for kind, compress in COMPRESSED.items()
    ),
    *(
        refused(f"tar.{kind} of nothing", compress(b""), "set.tar", f"tar.{kind}")
        for kind, compress in COMPRESSED.items()
    ),
    refused("tar.gz of zeros", gzip.compress(bytes(1 << 20)), "set.tar.gz", "tar.gz"),
    refused("tar.gz of a web page", gzip.compress(b"<html>" * 1000), "set.tar.gz", "tar.gz"),
    refused("tar.gz in a tar.gz", gzip.compress(gzip.compress(WHOLE)), "set.tar.gz", "tar.gz"),
    refused("tar without members", END, "set.tar"),
    refused("zero bytes", b"", "set.tar"),
    refused("web page", b"<!DOCTYPE html><html>404</html>" * 50, "set.tar"),
    refused("noise", random.Random(2).randbytes(5000), "set.tar"),
    refused("7z", b"7z\xbc\xaf\x27\x1c" + bytes(1000), "set.7z", "7z"),
    refused("rar", b"Rar!\x1a\x07\x01\0" + bytes(1000), "set.rar", "rar"),
    refused("zstd", b"\x28\xb5\x2f\xfd" + bytes(1000), "set.tar.zst", "tar.zst"),
    Case("archives", "file of 50 GB of zeros", zeros(50 << 30), "set.tar", seconds=5),
    Case("archives", "pipe", no_regular_file(os.mkfifo), "set.tar", seconds=5),
    Case("archives", "folder", no_regular_file(Path.mkdir), "set.tar", seconds=5),
    Case(
        "archives", "link to zeros without end", no_regular_file(lambda path: path.symlink_to("/dev/zero")), "set.tar"
    ),
    # headers without end
    *(
        refused(f"tar.gz, {what} of 400 MB", partial(big_header, kind), "has a header of", "tar.gz", True)
        for what, kind in (
            ("long name", tarfile.GNUTYPE_LONGNAME),
            ("long link", tarfile.GNUTYPE_LONGLINK),
            ("extended header", tarfile.XHDTYPE),
            ("global header", tarfile.XGLTYPE),
        )
    ),
    refused("tar, long name of 2 GB declared", header("x", 2 << 30, tarfile.GNUTYPE_LONGNAME) + END, "has a header of"),
    refused(
        "tar, chain of 5,000 long names",
        (header("x", 10, tarfile.GNUTYPE_LONGNAME) + padded(b"a" * 10)) * 5000 + member("a") + END,
        "set.tar",
    ),
    refused("tar, 200 global records", pax(b"".join(MANY), tarfile.XGLTYPE) + member("a") + END, "global headers"),
    refused("tar, extended header of length 0", pax(b"0 path=x\n") + member("a") + END, "set.tar"),
    refused("tar, extended header that is the last", member("a") + pax(record(b"path", b"b")) + END, "set.tar"),
    refused(
        "tar, extended name that leads outside",
        pax(record(b"path", b"../escaped.txt")) + member("a") + END,
        "escaped.txt",
    ),
    refused("tar, extended name with a zero byte", pax(record(b"path", b"a\0b")) + member("a") + END, "a\\x00b"),
    refused("tar, extended size of 10^18", pax(record(b"size", b"9" * 18)) + member("a") + END, "makes more than"),
    refused("tar, name of 300 letters", pax(record(b"path", LONG)) + member("a") + END, "set.tar"),
    refused("tar, name of 200,000 letters", pax(record(b"path", b"b" * 200_000)) + member("a") + END, "set.tar"),
    refused("tar, 3,000 folders deep", pax(record(b"path", b"d/" * 3000 + b"a")) + member("a") + END, "folders"),
    # names
    refused("tar, outside through a folder", member("a/../../escaped.txt") + END, "escaped.txt"),
    refused("tar, to the folder itself", member("..") + END, "set.tar"),
    refused("tar, named .", member(".") + END, "set.tar"),
    refused("tar, empty name", member("") + END, "set.tar"),
    refused("tar, twice the same", member("a", b"1") + member("a", b"2") + END, "is there twice"),
    refused(
        "tar, twice the same in two spellings", member("d/a", b"1") + member("d/./a", b"2") + END, "is there twice"
    ),
    refused(
        "tar, a file and then a folder", member("a") + header("a/", 0, tarfile.DIRTYPE) + member("a/b") + END, "set.tar"
    ),
    refused("tar, control characters in a refused name", header("\x1b[2J", 0, tarfile.SYMTYPE, "x") + END, "\\x1b[2J"),
    # kinds
    *(
        refused(f"tar, {what}", header("odd", 0, kind, "a") + END, "odd")
        for what, kind in (
            ("symbolic link", tarfile.SYMTYPE),
            ("hard link", tarfile.LNKTYPE),
            ("block device", tarfile.BLKTYPE),
            ("pipe", tarfile.FIFOTYPE),
        )
    ),
    refused(
        "tar, a link and a file through it",
        header("d", 0, tarfile.SYMTYPE, "..") + member("d/escaped.txt") + END,
        "is a link",
    ),
    refused(
        "tar, member of 10^15 bytes declared",
        header("a", 8**11 - 1)[:124] + b"\x80" + (10**15).to_bytes(11, "big") + header("a")[136:] + END,
        "set.tar",
    ),
    Case("archives", "tar, more members than allowed", too_many, "more than 100 members"),
    # bombs
    refused(
        "tar.gz, 400 MB of zeros in 400 KB",
        lambda: gzip.compress(member("a", bytes(400 << 20)) + END, 9),
        "makes more than",
        "tar.gz",
        True,
    ),
    refused(
        "tar.bz2, 400 MB of zeros",
        lambda: bz2.compress(member("a", bytes(400 << 20)) + END),
        "makes more than",
        "tar.bz2",
        True,
    ),
    refused(
        "tar.gz, zeros without end behind it",
        lambda: gzip.compress(member("a") + bytes(200 << 20), 1),
        "follow the last member",
        "tar.gz",
        True,
    ),
    refused(
        "zip, 400 MB of zeros in 400 KB", lambda: zip_of([("a", bytes(400 << 20))]), "makes more than", "zip", True
    ),
    refused("zip, members that overlap", overlapping_zip, "set.zip", "zip"),
    # zip files
    refused("zip, cut", zip_of([("a", bytes(1000)), ("b", bytes(1000))])[:-30], "set.zip", "zip"),
    refused("zip, without its directory", zip_of([("a", os.urandom(1000))])[:500], "set.zip", "zip"),
    refused("zip without members", zip_of([]), "set.zip", "zip"),
    refused("zip, symbolic link", zip_special(stat.S_IFLNK), "special", "zip"),
    refused("zip, device", zip_special(stat.S_IFCHR), "special", "zip"),
    refused("zip, pipe", zip_special(stat.S_IFIFO), "special", "zip"),
    refused("zip, encrypted", zip_patched(6, 8, b"\x01\0"), "encrypted", "zip"),
    refused("zip, unknown compression", zip_patched(8, 10, b"\x63\0"), "a.txt", "zip"),
    refused("zip, declares fewer bytes", zip_patched(22, 24, struct.pack("<L", 10)), "a.txt", "zip"),
    refused("zip, declares more bytes", zip_patched(22, 24, struct.pack("<L", 2_000_000)), "a.txt", "zip"),
    refused("zip, wrong checksum", zip_patched(14, 16, b"\0\0\0\0"), "a.txt", "zip"),
    *(
        refused(f"zip, {what}", zip_of([("ok", b"1"), (name, b"2")]), shown, "zip")
        for what, name, shown in (
            ("outside with backslashes", "..\\..\\escaped.txt", "escaped.txt"),
            ("drive letter", "C:\\escaped.txt", "escaped.txt"),
            ("network share", "\\\\host\\escaped.txt", "escaped.txt"),
            ("outside through a folder", "a/b/../../../escaped.txt", "escaped.txt"),
            ("a file as a folder", "ok/b", "ok/b"),
            ("named .", ".", "set.zip"),
            ("300 letters", "n" * 300, "set.zip"),
            ("3,000 folders deep", "d/" * 3000 + "a", "folders"),
            ("twice in two spellings", "./ok", "ok"),
        )
    ),
    # what must work
    accepted("tar with 10 KB of padding", WHOLE + bytes(10240), {f"set/{name}": name.encode() * 700 for name in "abc"}),
    accepted(
        "tar with a global comment, as git makes",
        pax(record(b"comment", b"c" * 40), tarfile.XGLTYPE) + member("a") + END,
        {"a": b"x"},
    ),
    accepted("tar with an absolute name", member("/abs/a") + END, {"abs/a": b"x"}),
    accepted("tar with a folder twice", header("d/", 0, tarfile.DIRTYPE) * 2 + member("d/a") + END, {"d/a": b"x"}),
    accepted("tar with a name in latin-1", header("caf\udce9", 1) + padded(b"x") + END, {"caf\udce9": b"x"}),
    accepted("tar named .zip", WHOLE, {f"set/{name}": name.encode() * 700 for name in "abc"}, "zip"),
    accepted("zip named .tar", zip_of([("a", b"x")]), {"a": b"x"}),
    accepted("zip behind a program", b"#!/bin/sh\nexit\n" + zip_of([("a", b"x")]), {"a": b"x"}, "zip"),
    accepted("zip with names in two scripts", zip_of([("日本/ä", b"x")]), {"日本/ä": b"x"}, "zip"),
    Case("archives", "modes and times of a tar", modes_and_times, None),
    Case("archives", "Ctrl-C while unpacking", interrupted, None),
    *(
        Case("archives", f"two hundred mutants, {suffix}", mutated(make, suffix), None, 120, slow=True)
        for suffix, make in (
            ("tar", lambda: pax(record(b"path", b"long/name")) + WHOLE),
            ("tar.gz", lambda: gzip.compress(WHOLE)),
            ("tar.bz2", lambda: bz2.compress(WHOLE)),
            ("tar.xz", lambda: lzma.compress(WHOLE)),
            ("zip", lambda: zip_of([("set/a", b"a" * 700), ("set/b", zlib.compress(b"b")), ("c", b"c" * 100)])),
        )
    ),
]
