"""Archives are unpacked whole and inside their folder, or not at all."""

import gzip
import io
import os
import random
import stat
import tarfile
import zipfile
from functools import partial

import pytest

from ffvt.data import archives
from ffvt.data.archives import extract_archive


def tar_of(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zip_of(path, [(info, "/etc/passwd")])


def encrypted(path):
    content = bytearray(zip_of(path, [("a.txt", "hello")]).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    return path


def lying_zip(path):
    """A member of a million bytes that declares ten."""
    content = bytearray(zip_of(path, [("a.txt", b"\0" * 10**6)]).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = content.index(signature) + offset
        content[place : place + 4] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    return path


def cut_off(path):
    path.write_bytes(tar_of(path, [("a/b.txt", os.urandom(5000))]).read_bytes()[:2000])
    return path


def flipped(make):
    """An archive with bytes changed in the middle of a member that does not compress."""

    def damage(path):
        content = bytearray(make(path, [("a", random.Random(0).randbytes(1500))]).read_bytes())
        content[700:720] = bytes(byte ^ 0xFF for byte in content[700:720])
        path.write_bytes(content)
        return path

    return damage


def sparse(path):
    """A member that declares ten bytes and whose map takes a million out of the archive."""
    info = tarfile.TarInfo("s")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1000000"}
    info.pax_headers |= {"GNU.sparse.size": "10", "GNU.sparse.name": "s"}
    return tar_of(path, [(info, b"z" * 10**6)])


def negative(path):
    info = tarfile.TarInfo("n")
    info.pax_headers = {"size": "-1024"}
    with tarfile.open(path, "w") as tar:
        tar.addfile(info)
    return path


def padded(path):
    """Zeros without end, almost, after the last member."""
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    path.write_bytes(gzip.compress(path.with_suffix(".tar").read_bytes() + bytes(5000)))
    path.with_suffix(".tar").unlink()
    return path


def device(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.CHRTYPE
    return info


HOSTILE = {
    "tar, parent": (lambda p: tar_of(p, [("ok.txt", b"1"), ("../escaped.txt", b"2")]), "outside"),
    "tar, absolute": (lambda p: tar_of(p, [("/../../escaped.txt", b"2")]), "outside"),
    "tar, link": (lambda p: tar_of(p, [(link("d", ".."), b""), ("d/escaped.txt", b"2")]), "'d': is a link"),
    "tar, hard link": (lambda p: tar_of(p, [(link("h", "../x", tarfile.LNKTYPE), b"")]), "'h': is a link"),
    "tar, device": (lambda p: tar_of(p, [(device("null"), b"")]), "null"),
    "tar, bytes": (lambda p: tar_of(p, [("a", b"\0" * 3000)]), "more than 2000 bytes"),
    "tar, members": (lambda p: tar_of(p, [(f"{i}", b"") for i in range(7)]), "more than 5 members"),
    "tar, cut off": (cut_off, "refused"),
    "tar, sparse": (sparse, "'s': has no plain size"),
    "tar, negative": (negative, "'n': has no plain size"),
    "tar, padding": (padded, "more than 12000 bytes follow the last member"),
    "tar, file and folder": (lambda p: tar_of(p, [("a", b"1"), ("a/b", b"2")]), "member 'a/b': .*a"),
    "tgz, flipped": (flipped(tar_of), "cut off or damaged after this member|CRC check failed"),
    "tbz, flipped": (flipped(partial(tar_of, mode="w:bz2")), "Invalid data stream"),
    "txz, flipped": (flipped(partial(tar_of, mode="w:xz")), "refused: .*(Corrupt|damaged)"),
    "zip, flipped": (flipped(zip_of), "member 'a': Bad CRC-32"),
    "zip, twice": (lambda p: zip_of(p, [("a", "1"), ("b", "2"), ("b", "3")]), "member 'b': .*File exists"),
    "zip, parent": (
        lambda p: zip_of(p, [("ok.txt", "1"), ("../escaped.txt", "2")]),
        "'../escaped.txt': leads outside",
    ),
    "zip, absolute": (lambda p: zip_of(p, [("/escaped.txt", "2")]), "'/escaped.txt': leads outside"),
    "zip, backslash": (lambda p: zip_of(p, [("..\\escaped.txt", "2")]), "leads outside"),
    "zip, link": (zip_link, "'link': is a link or a device"),
    "zip, bytes": (lambda p: zip_of(p, [("a", b"\0" * 3000)]), "more than 2000 bytes"),
    "zip, lie": (lying_zip, "refused"),
    "zip, members": (lambda p: zip_of(p, [(f"{i}", "") for i in range(7)]), "more than 5 members"),
    "zip, encrypted": (encrypted, "'a.txt': is encrypted"),
    "neither": (lambda p: p.write_text("text") and p, "neither a tar .* nor a zip"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_not_to_be_trusted_is_refused_and_leaves_nothing(name, tmp_path, monkeypatch):
    make, message = HOSTILE[name]
    monkeypatch.setattr(archives, "MAX_PADDING", 12000)
    target = tmp_path / "inner" / "data"
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("mine")
    archive = make(tmp_path / "archive")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as refused:
        extract_archive(archive, target, max_bytes=2000, max_members=5)
    assert str(archive) in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match=message):
        extract_archive(archive, tmp_path / "new" / "deep", max_bytes=2000, max_members=5)
    assert sorted(tmp_path.rglob("*")) == before  # no folder is made either


@pytest.mark.parametrize("make", [tar_of, zip_of], ids=["tar", "zip"])
def test_a_good_archive_appears_whole_and_replaces_nothing(make, tmp_path):
    archive = make(
        tmp_path / "archive", [("set/images/a b.jpg", b"pixels"), ("set/images.txt", b"1 a b.jpg"), ("x", b"")]
    )
    target = tmp_path / "data"
    assert extract_archive(archive, target) == [target / "set", target / "x"]
    assert (target / "set/images/a b.jpg").read_bytes() == b"pixels"
    assert sorted(path.name for path in target.iterdir()) == ["set", "x"]
    (target / "set/images.txt").write_text("changed")
    with pytest.raises(FileExistsError, match="got 'set'"):
        extract_archive(archive, target)
    assert (target / "set/images.txt").read_text() == "changed"
    assert sorted(path.name for path in target.iterdir()) == ["set", "x"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        extract_archive(tmp_path / "nowhere", target)
    assert extract_archive(archive, tmp_path / "new" / "deep")[0] == tmp_path / "new" / "deep" / "set"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_every_compression_is_read_up_to_the_caps(mode, tmp_path):
    archive = tar_of(tmp_path / "archive", [("a", b"1" * 1500), ("b/c", b"2" * 500)], mode)
    extract_archive(archive, tmp_path / "data", max_bytes=2000, max_members=2)
    assert (tmp_path / "data/b/c").read_bytes() == b"2" * 500
    with pytest.raises(ValueError, match="member 'b/c': the archive makes more than 1999 bytes"):
        extract_archive(archive, tmp_path / "other", max_bytes=1999)


def test_entries_go_back_when_one_cannot_be_moved(tmp_path, monkeypatch):
    archive = zip_of(tmp_path / "archive", [("a", "1"), ("b", "2")])
    rename = os.rename

    def fail(source, target):
        if target == tmp_path / "data" / "b":
            raise PermissionError("no")
        rename(source, target)

    (tmp_path / "data").mkdir()
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(PermissionError):
        extract_archive(archive, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
