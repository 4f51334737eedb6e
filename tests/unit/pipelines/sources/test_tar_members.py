"""The files of tars as tarfile writes them, and of tars whose headers claim what is not so."""

import io
import tarfile

import pytest

from pipelines.sources.tar_members import Member, TarDamage, members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def tar(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read(data: bytes) -> list[Member]:
    return list(members(io.BufferedReader(io.BytesIO(data)), len(data)))


def read_until(data: bytes) -> tuple[list[str], TarDamage]:
    """The names before the damage, and the damage."""
    found = []
    try:
        for member in members(io.BufferedReader(io.BytesIO(data)), len(data)):
            found.append(member.name)
            assert len(found) < 1000
    except TarDamage as damage:
        return found, damage
    raise AssertionError(f"nothing is wrong after {found}")


def with_size(data: bytes, header: int, size: bytes) -> bytes:
    """The tar with another size in one header, and the checksum for it."""
    block = bytearray(data[header : header + 512])
    block[124:136], block[148:156] = size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:header] + bytes(block) + data[header + 512 :]


NEGATIVE, EXABYTE = b"\xff" * 10 + b"\xfe\x00", b"\x80" + (2**60).to_bytes(11, "big")


@pytest.mark.parametrize("form", FORMATS)
def test_what_tarfile_writes(form):
    files = {"a.txt": b"one", "d/" + "n" * 90 + ".txt": b"x" * 1000, "e": b"", "z.txt": b"last"}
    if form != tarfile.USTAR_FORMAT:
        files |= {"d/" + "long" * 100 + "ü.txt": b"two", "ü" * 60 + ".txt": b"three"}
    data = tar(files, form)
    assert {m.name: data[m.offset : m.offset + m.size] for m in read(data)} == files


def test_folders_and_links(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "other.jpg"
            archive.addfile(info)
    found = read((tmp_path / "a.tar").read_bytes())
    assert [(member.name, member.link) for member in found] == [("hard.jpg", "other.jpg"), ("soft.jpg", "other.jpg")]


def test_a_second_tar_behind_the_end_mark_is_read():
    one, two = tar({"a": b"1"}), tar({"b": b"2"}, tarfile.PAX_FORMAT)
    data = one + two + bytes(5000)
    assert {m.name: data[m.offset : m.offset + m.size] for m in read(data)} == {"a": b"1", "b": b"2"}
    found, damage = read_until(one + b"no tar" * 200)
    assert (found, damage.at, damage.cut) == (["a"], len(one), False)
    assert "what follows the end mark is no tar" in str(damage)


@pytest.mark.parametrize("size", [NEGATIVE, EXABYTE, b"\x80" + b"\xff" * 11, b"-0000000001\0", b"99999999999\0"])
@pytest.mark.parametrize("name", ["b", "b" * 150])
def test_a_size_that_cannot_be_ends_the_reading_there(size, name):
    data = tar({"a": b"1", name: b"2", "c": b"3"})
    found, damage = read_until(with_size(data, 1024, size))
    assert (found, damage.at) == (["a"], 1024)


@pytest.mark.parametrize("size", ["-512", "-1", str(2**60), "x", "9" * 30])
def test_a_pax_size_that_cannot_be(size):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in "ab":
            info = tarfile.TarInfo(name)
            info.pax_headers = {"size": size} if name == "b" else {}
            archive.addfile(info)
    found, damage = read_until(buffer.getvalue())
    assert (found, damage.at) == (["a"], 512)


def test_pax_headers_without_end_and_broken_records():
    header = tar({"a": b""}, tarfile.PAX_FORMAT)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a")
        info.pax_headers = {"comment": "x"}
        archive.addfile(info)
    pax = buffer.getvalue()[:1024]
    assert [member.name for member in read(pax * 5000 + header)] == ["a"]
    found, damage = read_until(pax.replace(b"13 comment", b"99 comment") + header)
    assert (found, damage.at) == ([], 0)


def test_every_cut_is_noticed():
    files = {f"{i}.txt": bytes([65 + i]) * (200 + 300 * i) for i in range(4)}
    data = tar(files, tarfile.PAX_FORMAT)
    end = len(data.rstrip(b"\0"))
    for cut in range(0, end, 97):
        found, damage = read_until(data[:cut])
        assert damage.cut
        assert damage.at <= cut
        assert found == [*files][: len(found)]
    assert [member.name for member in read(data)] == [*files]
