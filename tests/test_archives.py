"""The archives of QEMU and qemu-img: what is unpacked, and what is refused whole."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import random
import re
import resource
import shutil
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
  DEADLINE,
  HOST,
  PULL,
  PYTHON,
  QEMU,
  ROOT,
  STAND_IN,
  TOOLS,
  Qvm,
  check_failed,
  contents,
  tar_of,
)
from support_pythons import every_python

import qvm as qvm_source

RUN = ("run", "--platform", "x86-64", "--rm", "freebsd", "15.1")


# --- Making archives -------------------------------------------------------------------------


def entry(name, content=b"", kind=tarfile.REGTYPE, link="", mode=0o644):
  """One member of an archive."""
  info = tarfile.TarInfo(name)
  info.size, info.type, info.linkname, info.mode = len(content), kind, link, mode
  return info, content


def file(name, content=b"x", mode=0o644):
  return entry(name, content, mode=mode)


def folder(name, mode=0o755):
  return entry(name, kind=tarfile.DIRTYPE, mode=mode)


def link(name, target):
  return entry(name, kind=tarfile.SYMTYPE, link=target)


def hard(name, target):
  return entry(name, kind=tarfile.LNKTYPE, link=target)


def pack(*members, form=tarfile.GNU_FORMAT):
  """A tar of the members."""
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w", format=form) as archive:
    for info, content in members:
      archive.addfile(info, io.BytesIO(content))
  return packed.getvalue()


# What a good QEMU archive has; a hostile one has it too, so that nothing else is wrong with it.
SOUND = (
  folder("./"),
  file("./bin/qemu", STAND_IN.encode(), 0o755),
  file("./share/qemu/bios-256k.bin", b"bios"),
  file("./share/qemu/uefi.fd", b"uefi"),
)


def under(top, *members):
  """The members below a top folder."""
  moved = []
  for info, content in members:
    info = tarfile.TarInfo.frombuf(info.tobuf(tarfile.PAX_FORMAT), "utf-8", "surrogateescape")
    info.name = f"{top}/{info.name}".replace("/./", "/")
    if info.islnk():
      info.linkname = f"{top}/{info.linkname}"
    moved.append((info, content))
  return moved


def header(info, **fields):
  """A raw header with some fields (offset_length: bytes) changed, and its checksum put right."""
  raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
  for place, value in fields.items():
    offset, length = map(int, place[1:].split("_"))
    raw[offset : offset + length] = value.ljust(length, b"\0")
  raw[148:156] = b" " * 8
  raw[148:156] = b"%06o\0 " % sum(raw)
  return bytes(raw)


def sparse(name, size):
  """A GNU sparse member of one byte of data that unpacks to that many."""
  info, _ = entry(name, b"x" * 512, tarfile.GNUTYPE_SPARSE)
  holes = b"%011o\0%011o\0" % (size - 1, 1)
  return header(info, _386_24=holes, _483_12=b"%011o\0" % size) + b"x".ljust(512, b"\0")


def folders(numbers):
  """The headers of folders with these numbers as names: tarfile takes a second for many."""
  raw = folder("./00000")[0].tobuf(tarfile.GNU_FORMAT)
  rest = sum(raw[:2] + raw[7:148] + b" " * 8 + raw[156:])  # of the checksum
  return b"".join(
    raw[:2] + name + raw[7:148] + b"%06o\0 " % (rest + sum(name)) + raw[156:]
    for name in (b"%05d" % number for number in numbers)
  )


def with_raw(raw):
  """A sound archive with raw headers and data put before its end."""
  whole = pack(*SOUND)
  end = sum(512 + -(-len(content) // 512) * 512 for _, content in SOUND)
  return whole[:end] + raw + bytes(10240)


# --- Unpacking, as functions -------------------------------------------------------------------


class Unpacker:
  """Unpacks bytes as qvm does with a download."""

  def __init__(self, place):
    self.part, self.folder = place / "some.tar" / "part", place / "some.tmp"
    self.part.parent.mkdir()
    (place / "other").mkdir()
    (place / "other" / "secret").write_text("secret")
    self.place = place

  def __call__(self, content, *names):
    self.part.write_bytes(content)
    return qvm_source.unpack_aside(str(self.part), str(self.folder), names or ("bin/qemu",))

  def is_as_before(self):
    """Nothing is left of a refused archive, and nothing else is changed."""
    return contents(self.place) == {"other": None, "other/secret": b"secret", "some.tar": None}


@pytest.fixture
def unpacker(tmp_path):
  (tmp_path / "place").mkdir()
  return Unpacker(tmp_path / "place")


UNPACKED = {
  "bin": None,
  "bin/qemu": STAND_IN.encode(),
  "share": None,
  "share/qemu": None,
  "share/qemu/bios-256k.bin": b"bios",
  "share/qemu/uefi.fd": b"uefi",
}
PLAIN = [(tarfile.TarInfo.frombuf(i.tobuf(), "utf-8", "strict"), c) for i, c in SOUND[1:]]
for member, _ in PLAIN:
  member.name = member.name[2:]
GOOD = {
  "./ as the organisation's": (pack(*SOUND), ""),
  "without ./": (pack(*PLAIN), ""),
  "with folders": (pack(folder("./bin"), folder("./share/"), *SOUND), ""),
  "folders after files": (pack(*SOUND, folder("./bin"), folder("./share/qemu")), ""),
  "folders that may not be entered": (pack(folder("./bin", 0), *SOUND, folder("bin", 0)), ""),
  "top folder": (pack(*under("qemu-10.2", *SOUND)), "qemu-10.2"),
  "top folder with ./": (pack(*under("./qemu", *SOUND)), "qemu"),
  "double slashes": (pack(file(".//bin///qemu", STAND_IN.encode(), 0o755), *SOUND[2:]), ""),
  "pax": (pack(*SOUND, form=tarfile.PAX_FORMAT), ""),
  "ustar": (pack(*SOUND, form=tarfile.USTAR_FORMAT), ""),
  "gz": (gzip.compress(pack(*SOUND)), ""),
  "xz": (lzma.compress(pack(*SOUND)), ""),
  "bz2": (bz2.compress(pack(*SOUND)), ""),
}


@pytest.mark.parametrize("content, top", GOOD.values(), ids=list(GOOD))
def test_good_archive(unpacker, content, top):
  found = unpacker(content)
  root = unpacker.folder / top
  assert found == str(root / "bin" / "qemu")
  assert contents(root) == UNPACKED
  for path in root.rglob("*"):
    mode = stat.S_IMODE(path.stat().st_mode)
    assert mode == (
      0o755 if path.is_dir() or (path.name == "qemu" and "./bin" not in top) else 0o644
    )


def test_holes(unpacker):
  unpacker(with_raw(sparse("./share/qemu/holes", 5000)))
  assert contents(unpacker.folder) == {**UNPACKED, "share/qemu/holes": bytes(4999) + b"x"}


def test_a_real_tar(unpacker, tmp_path):
  """An archive made by tar(1) in the way the organisation does, read-only files and all."""
  inside = tmp_path / "inside"
  for name, text in (("bin/qemu", "q"), ("share/qemu/uefi.fd", "u"), ("share/qemu/é ü", "x")):
    (inside / name).parent.mkdir(parents=True, exist_ok=True)
    (inside / name).write_text(text)
    (inside / name).chmod(0o555 if name == "bin/qemu" else 0o444)
  (inside / "share" / "qemu" / "link").symlink_to("../qemu/uefi.fd")
  os.link(str(inside / "share/qemu/uefi.fd"), str(inside / "share/qemu/uefi2.fd"))
  subprocess.run(["tar", "-C", str(inside), "-c", "-f", str(tmp_path / "x.tar"), "."], check=True)
  unpacker((tmp_path / "x.tar").read_bytes())
  assert contents(unpacker.folder) == contents(inside)
  assert (unpacker.folder / "share/qemu/link").read_text() == "u"


# Links that stay inside, and what reading them gives.
INSIDE = {
  "beside": ([link("./share/qemu/a", "uefi.fd")], "share/qemu/a", b"uefi"),
  "./": ([link("./share/qemu/a", "./uefi.fd")], "share/qemu/a", b"uefi"),
  "up and down": ([link("./bin/a", "../share/qemu/uefi.fd")], "bin/a", b"uefi"),
  "to a folder": ([link("./data", "share/qemu")], "data/uefi.fd", b"uefi"),
  "to the root": ([link("./share/up", "..")], "share/up/bin/qemu", STAND_IN.encode()),
  "to a link": ([link("./b", "a"), link("./a", "bin/qemu")], "b", STAND_IN.encode()),
  "before its target": ([link("./z", "zz"), file("./zz", b"z")], "z", b"z"),
  "hard": ([hard("./a", "./share/qemu/uefi.fd")], "a", b"uefi"),
  "hard, spelt otherwise": ([hard("./a", "share//qemu/./uefi.fd")], "a", b"uefi"),
}


@pytest.mark.parametrize("members, name, content", INSIDE.values(), ids=list(INSIDE))
@pytest.mark.parametrize("top", ["", "top"])
def test_links_inside_work(unpacker, members, name, content, top):
  members = under(top, *SOUND, *members) if top else [*SOUND, *members]
  unpacker(pack(*members))
  assert (unpacker.folder / top / name).read_bytes() == content


# --- Hostile archives --------------------------------------------------------------------------

DEVICE = entry("./dev", kind=tarfile.CHRTYPE)
DEVICE[0].devmajor, DEVICE[0].devminor = 1, 3
FIFO = entry("./fifo", kind=tarfile.FIFOTYPE)
DEEP = "./" + "d/" * 3000 + "x"
WHOLE = pack(*SOUND)
random_bytes = random.Random(2).randbytes
LARGE = pack(*SOUND[:2], file("./share/qemu/rom", random_bytes(300_000)), *SOUND[2:])


def hostile(*members):
  """A sound archive with the members put before the rest of it."""
  return pack(*members, *SOUND)


HOSTILE = {
  "absolute": hostile(file("/tmp/x")),
  "absolute, many slashes": hostile(file("//tmp/x")),
  "..": hostile(file("../other/secret")),
  ".. in the middle": hostile(file("./bin/../../other/secret")),
  ".. at the end": hostile(folder("./bin/..")),
  ".. alone": hostile(folder("..")),
  "folder outside": hostile(folder("../outside")),
  "link, absolute": hostile(link("./a", "/etc/passwd")),
  "link, ..": hostile(link("./a", "../other/secret")),
  "link, .. from a folder": hostile(link("./bin/a", "../../other/secret")),
  "link, .. after a name": hostile(link("./bin/a", "../share/../../other/secret")),
  "link, .. after a name that is nowhere": hostile(link("./a", "x/../../other/secret")),
  "link, .. after ./": hostile(link("./a", "./../other/secret")),
  "link, .. after //": hostile(link("./bin/a", "..//../other/secret")),
  "link, through a link": hostile(link("./a/b/c", "../.."), link("./d", "a/b/c/../other/secret")),
  "link, through a link to the root": hostile(
    link("./share/up", ".."), link("./a", "share/up/../other/secret")
  ),
  "link, .. to another one's parent": hostile(
    folder("./a/b"), link("./c", "a/b"), link("./d", "c/../../../other")
  ),
  "file through a link out": hostile(link("./a", ".."), file("./a/other/secret", b"bad")),
  "file through a link inside": hostile(link("./a", "share"), file("./a/qemu/x", b"bad")),
  "file through a link that comes later": hostile(file("./a/x", b"bad"), link("./a", "share")),
  "file through two links": hostile(
    link("./a", "b"), link("./b", ".."), file("./a/other/secret", b"bad")
  ),
  "folder through a link": hostile(link("./a", "share"), folder("./a/x")),
  "link through a link": hostile(link("./a", "share"), link("./a/x", "..")),
  "file over a link": hostile(link("./a", "share/x"), file("./a", b"bad")),
  "folder over a link": hostile(link("./a", "share"), folder("./a")),
  "link over a folder": hostile(folder("./a"), link("./a", "share")),
  "link over a file": hostile(file("./a"), link("./a", "share")),
  "link over the root": hostile(link(".", "share")),
  "hard link, absolute": hostile(hard("./a", "/etc/passwd")),
  "hard link, ..": hostile(hard("./a", "../other/secret")),
  "hard link to nowhere": hostile(hard("./a", "b")),
  "hard link to what comes later": pack(hard("./a", "./bin/qemu"), *SOUND),
  "hard link to itself": hostile(hard("./a", "./a")),
  "hard link to a folder": pack(*SOUND, hard("./a", "./bin"), folder("./bin")),
  "hard link to a link out": hostile(link("./a", "../other/secret"), hard("./c", "./a")),
  "device": hostile(DEVICE),
  "block device": hostile(entry("./dev", kind=tarfile.BLKTYPE)),
  "fifo": hostile(FIFO),
  "unknown kind": hostile(entry("./a", kind=b"Q")),
  "set-uid": hostile(file("./a", mode=0o4755)),
  "set-gid": hostile(file("./a", mode=0o2755)),
  "sparse bomb": with_raw(sparse("./bomb", 1 << 40)),
  "large": with_raw(header(entry("./large")[0], _124_12=b"%011o" % (3 << 30))),
  "negative size": with_raw(header(entry("./a")[0], _124_12=b"\xff" * 11 + b"\0")),
  "size of letters": with_raw(header(entry("./a")[0], _124_12=b"abc")),
  "too many": with_raw(folders(range(20_001))),
  "too many of one name": with_raw(folders([1] * 20_001)),
  "name over 255 bytes": hostile(file("./" + "x" * 256)),
  "name over 255 bytes, not letters": hostile(file("./" + "é" * 128)),
  "path over 4096 bytes": hostile(file(DEEP)),
  "target over 4096 bytes": hostile(link("./a", "b/" * 3000)),
  "empty name": hostile(file("")),
  "name of the root": hostile(file("./")),
  "file that is a folder": hostile(file("./a"), file("./a/b")),
  "folder that is a file": hostile(file("./a/b"), file("./a")),
  "cut in a header": WHOLE[: 512 * 4 + 100],
  "cut in a file": WHOLE[: 512 * 2 + 100],
  "garbage": random_bytes(20_000),
  "text": b"Moved permanently. " * 100,
  "empty": b"",
  "one byte": b"x",
  "no members": bytes(10240),
  "gz cut": gzip.compress(WHOLE)[:-200],
  "gz broken": gzip.compress(LARGE)[:50_000] + bytes(50_000),
  "gz of garbage": gzip.compress(random_bytes(20_000)),
  "gz of nothing": gzip.compress(bytes(1 << 20)),
  "xz cut": lzma.compress(WHOLE)[:-200],
  "xz broken": lzma.compress(LARGE)[:50_000] + bytes(50_000),
  "bz2 cut": bz2.compress(WHOLE)[:-200],
  "bz2 broken": bz2.compress(LARGE, 1)[:150_000] + bytes(50_000),
  "another program": pack(file("./bin/qemu-system-x86_64", b"x", 0o755), *SOUND[2:]),
  "the program is a folder": pack(folder("./bin/qemu"), *SOUND[2:]),
  "the program dangles": pack(link("./bin/qemu", "qemu-10"), *SOUND[2:]),
  "the program is a loop": pack(link("./bin/qemu", "qemu"), *SOUND[2:]),
  "two top folders": pack(*under("a", *SOUND), *under("b", *SOUND)),
}


# Refused, or unpacked with nothing leading out; either is right.
ODD = {
  "file twice": hostile(file("./a", b"1"), file("./a", b"2")),
  "folder twice": hostile(folder("./a"), folder("./a/")),
  "link twice": hostile(link("./a", "share"), link("./a", "bin")),
  "hard link twice": pack(*SOUND, hard("./a", "./bin/qemu"), hard("./a", "./bin/qemu")),
  "hard link of a file to itself": pack(*SOUND, hard("./bin/qemu", "./bin/qemu")),
  "hard link to a link": pack(*SOUND, link("./a", "bin/qemu"), hard("./c", "./a")),
  "hard link to a link to what comes later": hostile(link("./a", "bin/qemu"), hard("./c", "./a")),
  "hard link to a dangling link": hostile(link("./a", "b"), hard("./c", "./a")),
  "hard link to a link to a folder": pack(*SOUND, link("./a", "share"), hard("./c", "./a")),
  "hard link to a loop": hostile(link("./a", "a"), hard("./c", "./a")),
  "link without a target": hostile(link("./a", "")),
  "links in a circle": hostile(link("./a", "b"), link("./b", "a")),
  "link with a long target": hostile(link("./a", "b/" * 499)),
}


@pytest.mark.parametrize("content", ODD.values(), ids=list(ODD))
def test_odd_archive(unpacker, content):
  try:
    unpacker(content)
  except qvm_source.QvmError:
    assert unpacker.is_as_before()
  else:
    check_inside(str(unpacker.folder))
    assert contents(unpacker.folder).items() >= UNPACKED.items()


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_archive_leaves_nothing(unpacker, content):
  with pytest.raises(qvm_source.QvmError, match="some.tar is refused: .") as caught:
    unpacker(content)
  assert unpacker.is_as_before()
  message = str(caught.value)
  assert len(message) < 400 and "\n" not in message and "Error(" not in message


TAKEN = """
import os, sys
sys.path.insert(0, sys.argv[1])
import qvm
for path in [os.path.join(sys.argv[2], name) for name in os.listdir(sys.argv[2])]:
  try:
    qvm.unpack_aside(path + "/part", path + "/unpacked", ("bin/qemu",))
    print(os.path.basename(path))
  except qvm.RefusedError:
    pass
"""


@every_python
def test_every_python_takes_the_same(tmp_path, python):
  """tarfile differs between versions, and is no judge of archives."""
  archives = {f"good {number}": content for number, (content, _) in enumerate(GOOD.values())}
  small = [content for content in HOSTILE.values() if len(content) < 1 << 20]
  archives.update((f"hostile {number}", content) for number, content in enumerate(small))
  ends = [end - more for end in ENDS if end <= len(WHOLE) - 10240 for more in (0, 256)]
  archives.update((f"cut {end}", WHOLE[:end]) for end in ends)
  for name, content in archives.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "part").write_bytes(content)
  command = [python, "-B", "-c", TAKEN, str(ROOT), str(tmp_path)]
  run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  assert sorted(run.stdout.splitlines()) == sorted(n for n in archives if n.startswith("good"))


NOT_TO_BE_MISSED = ("negative size", "size of letters", "cut in a header")


@pytest.mark.parametrize("name", NOT_TO_BE_MISSED)
def test_a_tarfile_that_asks_no_subclass(unpacker, monkeypatch, name):
  """As that of Python 3.14.10, which reads each header by a method of its own."""
  read = tarfile.TarInfo.__dict__["frombuf"].__func__

  def fromtarfile(cls, archive):
    found = read(cls, archive.fileobj.read(512), archive.encoding, archive.errors)
    found.offset = archive.fileobj.tell() - 512
    return found._proc_member(archive)

  monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(fromtarfile))
  with pytest.raises(qvm_source.QvmError, match="some.tar is refused: ."):
    unpacker(HOSTILE[name])
  assert unpacker.is_as_before()


def test_the_tricks_work_with_a_plain_extraction(tmp_path):
  """The hostile archives are what they are made for: tarfile trusting them would write outside."""
  for name in ("..", "file through a link out", "file through two links"):
    (tmp_path / "other").mkdir()
    (tmp_path / "inner").mkdir()
    with tarfile.open(fileobj=io.BytesIO(HOSTILE[name])) as archive:
      more = {"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}
      archive.extractall(str(tmp_path / "inner"), **more)
    assert (tmp_path / "other" / "secret").exists(), name
    shutil.rmtree(str(tmp_path / "other"))
    shutil.rmtree(str(tmp_path / "inner"))


ENDS = [512 * number for number in range(1, len(WHOLE) // 512 + 1)]


@pytest.mark.parametrize("kind", [bytes, gzip.compress, lzma.compress], ids=["tar", "gz", "xz"])
def test_cut_at_each_block(unpacker, kind):
  """A part of an archive is never taken for the whole, wherever it ends."""
  for end in (*ENDS, *(end - 256 for end in ENDS)):
    try:
      unpacker(kind(WHOLE[:end]))
    except qvm_source.QvmError:
      assert unpacker.is_as_before()
    else:
      assert contents(unpacker.folder) == UNPACKED, end
      assert end > len(WHOLE) - 10240


@pytest.mark.parametrize("number", range(len(SOUND)))
def test_each_header_is_needed(unpacker, number):
  """A damaged header is no end of the archive."""
  start = sum(512 + -(-len(content) // 512) * 512 for _, content in SOUND[:number])
  broken = bytearray(WHOLE)
  broken[start + 20] ^= 1
  with pytest.raises(qvm_source.RefusedError, match="it is no tar stream, or damaged"):
    unpacker(bytes(broken))
  assert unpacker.is_as_before()


@pytest.mark.parametrize("top", ["", "top"])
def test_links_stay_in_the_folder_that_is_kept(unpacker, top):
  """With one top folder, that folder alone is kept: a link beside it leads out."""
  out = link("./out", "../other")
  with pytest.raises(qvm_source.QvmError):
    unpacker(pack(*(under(top, *SOUND, out) if top else [*SOUND, out])))
  assert unpacker.is_as_before()


NAMES = [b"./share/\xff\xfe", b"./share/a\x1b[31mb", b"./share/a\nb", b"./share/ ", b"./share/\\"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("sound", [True, False])
def test_odd_names(unpacker, name, sound):
  """Names that are no text are unpacked as they are, or refused with a readable message."""
  odd = header(entry("./odd", mode=0o644 if sound else 0o4755)[0], _0_100=name)
  try:
    unpacker(with_raw(odd))
  except qvm_source.QvmError as error:
    assert qvm_source.printable(str(error)).encode()
    assert unpacker.is_as_before()
  else:
    assert sound
    assert os.fsencode(os.path.basename(os.fsdecode(name))) in os.listdir(
      os.fsencode(str(unpacker.folder / "share"))
    )


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
import qvm
try:
  qvm.unpack_aside({part!r}, {folder!r}, ("bin/qemu",))
except qvm.QvmError as error:
  print("refused")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["name", "target", "gz bomb"])
def test_memory(tmp_path, what):
  """An archive of some kilobytes does not take a gigabyte of memory."""
  content = {
    "name": hostile(file("./" + "d/" * 40_000 + "x")),
    "target": hostile(link("./a", "b/" * 1_000_000)),
    "gz bomb": gzip.compress(with_raw(header(entry("./a")[0], _124_12=b"%011o" % (900 << 20)))
                             + bytes(100 << 20), 1),
  }[what]  # fmt: skip
  (tmp_path / "x.tar").mkdir()
  (tmp_path / "x.tar" / "part").write_bytes(content)
  paths = {"part": str(tmp_path / "x.tar" / "part"), "folder": str(tmp_path / "x.tmp")}
  script = LIMITED.format(root=str(Qvm.compiled.parent), **paths)
  result = subprocess.run([PYTHON, "-c", script], capture_output=True, timeout=DEADLINE)
  assert (result.returncode, result.stdout) == (0, b"refused\n"), result.stderr
  assert list(tmp_path.rglob("*")) == [tmp_path / "x.tar"]


def test_zeros_behind_a_header(unpacker):
  """tarfile takes them for its end."""
  unpacker(hostile(entry("x", b"9 path=a\n" + bytes(9), tarfile.XHDTYPE), file("./b")))
  assert (unpacker.folder / "a").read_bytes() == b"x"


DIGITS = b"comment=" + b"1" * 1_000_000 + b"\n"
HEADERS = {
  "a value of digits": b"1000017 " + DIGITS,
  "records that overlap": b"2 " * 500_000 + b"=",
  "a place of digits": b"22 GNU.sparse.size=1\n1000017 " + DIGITS,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_long_headers_take_no_long_time(unpacker, kind):
  """A pax header of 1 MB; tarfile's patterns would not come to its end."""
  body = HEADERS[kind]
  with pytest.raises(qvm_source.RefusedError, match="header"):
    unpacker(hostile(entry("x", body, tarfile.XHDTYPE), file("./a")))
  assert unpacker.is_as_before()


def test_a_map_of_holes_without_end(unpacker):
  """tarfile would read it to its end, and keep it all."""
  first = header(entry("./holes", kind=tarfile.GNUTYPE_SPARSE)[0], _482_1=b"\1")
  with pytest.raises(qvm_source.RefusedError, match="headers without end"):
    unpacker(with_raw(first + (bytes(504) + b"\1" + bytes(7)) * 3000))
  assert unpacker.is_as_before()


# --- Any archive -------------------------------------------------------------------------------

part_names = st.sampled_from(["a", "b", "c", "..", ".", "", "a b"])
any_path = st.lists(part_names, min_size=1, max_size=6).map("/".join)
any_member = st.one_of(
  st.builds(file, any_path),
  st.builds(folder, any_path),
  st.builds(link, any_path, any_path),
  st.builds(link, any_path, any_path),
  st.builds(hard, any_path, any_path),
)
a_few = settings(deadline=None, database=None, max_examples=100)


def check_inside(folder):
  """Whatever is in the folder lies within it, and so does whatever its links lead to."""
  real = os.path.realpath(folder)
  for path, folders, files in os.walk(folder):
    for name in (*folders, *files):
      try:
        os.stat(os.path.join(path, name))
      except OSError as error:
        if error.errno == errno.ELOOP:  # leads nowhere; realpath gives nonsense for a//a
          continue
      found = os.path.realpath(os.path.join(path, name))
      assert found.startswith(real + os.sep) or found == real, (path, name)


@pytest.mark.slow
@given(st.lists(any_member, max_size=8))
@a_few
def test_whatever_is_unpacked_stays_inside(members):
  with tempfile.TemporaryDirectory() as place:
    unpacker = Unpacker(Path(place))
    try:
      found = unpacker(pack(*members, *SOUND))
    except qvm_source.QvmError:
      assert unpacker.is_as_before()
      return
    root = os.path.dirname(os.path.dirname(found))
    check_inside(root)
    assert (Path(place) / "other" / "secret").read_text() == "secret"
    assert sorted(os.listdir(place)) == ["other", "some.tar", "some.tmp"]


@given(st.lists(any_member, max_size=6))
@a_few
def test_whatever_is_unpacked_below_a_top_folder_stays_in_it(members):
  with tempfile.TemporaryDirectory() as place:
    unpacker = Unpacker(Path(place))
    try:
      found = unpacker(pack(*under("top", *members, *SOUND)))
    except qvm_source.QvmError:
      assert unpacker.is_as_before()
      return
    check_inside(os.path.dirname(os.path.dirname(found)))


@given(any_path)
@a_few
def test_a_safe_name_stays_inside(name):
  try:
    path = qvm_source.safe_path(name)
  except ValueError:
    assert ".." in name.split("/") or name.startswith("/")
    return
  assert os.path.normpath("/root/" + name) == os.path.normpath("/root/" + path)
  assert not path or not any(part in ("", ".", "..") for part in path.split("/"))


@pytest.mark.slow
@given(st.text(max_size=40))
@a_few
def test_any_name(name):
  try:
    path = qvm_source.safe_path(name)
  except ValueError:
    return
  assert path == os.path.normpath("./" + name) or (not path and "." not in name[1:])


@pytest.mark.slow
@given(any_path, any_path, st.lists(st.tuples(any_path, any_path), max_size=3))
@a_few
def test_a_link_that_passes_stays_inside(name, target, others):
  """With other links in the contents that passed before it."""
  with tempfile.TemporaryDirectory() as place:
    root = os.path.join(place, "x", "root")
    for path in ("a/b/c", "b/c/a", "c/a/b"):
      os.makedirs(os.path.join(root, path))
    made = {}
    for path, aim in (*others, (name, target)):
      try:
        inside = qvm_source.safe_path(path)
        qvm_source.check_link(inside, aim)
      except ValueError:
        continue
      path = os.path.join(root, inside)
      if (
        not os.path.lexists(path)
        and aim
        and os.path.dirname(os.path.realpath(path)) == (os.path.realpath(os.path.dirname(path)))
      ):
        # Nothing is ever made below a link: only real folders lie on the way.
        ways = [os.path.join(root, way) for way in qvm_source.folders_above(inside)]
        if all(os.path.isdir(way) and not os.path.islink(way) for way in ways):
          os.symlink(aim, path)
          made[path] = aim
    check_inside(root)


@given(st.data())
@a_few
def test_any_damage_is_an_error_or_harmless(data):
  """Bytes changed, cut or doubled anywhere in an archive of every kind of member."""
  form = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
  long = file("./share/" + "n" * 150)
  whole = pack(*SOUND, link("./l", "bin/qemu"), hard("./h", "./bin/qemu"), long, form=form)
  whole = whole.rstrip(b"\0")
  whole += bytes(-len(whole) % 512) + sparse("./sparse", 4096) + bytes(1024)
  pack_up = data.draw(st.sampled_from([bytes, bytes, bytes, gzip.compress, lzma.compress]))
  content = bytearray(pack_up(bytes(whole)))
  for _ in range(data.draw(st.integers(1, 4))):
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=12))
  with tempfile.TemporaryDirectory() as place:
    unpacker = Unpacker(Path(place))
    try:
      unpacker(bytes(content))
    except qvm_source.QvmError:
      assert unpacker.is_as_before()
    else:
      check_inside(str(unpacker.folder))


# --- The whole program ---------------------------------------------------------------------------


@pytest.fixture
def no_qemu(full):
  """qvm that has the image and qemu-img, but no QEMU."""
  link = full.cache / "qemu" / "x86_64"
  shutil.rmtree(link.resolve())
  link.unlink()
  return full


def check_refused(qvm, server, name, content, words=PULL):
  """The archive is refused whole; with a good one in its place, the next run works."""
  before = contents(qvm.home)
  good = server.find("resources", "v2.0.0").assets[name].blob.content
  server.replace_asset("resources", "v2.0.0", name, content)
  result = qvm(*words)
  check_failed(result, rf"{name}.* (is refused|HTML)")
  assert "Error(" not in result.stderr
  assert all(len(line) < 400 for line in result.stderr.splitlines())
  assert contents(qvm.home) == before
  server.replace_asset("resources", "v2.0.0", name, good)
  result = qvm(*RUN)
  assert result.returncode == 0, result.stderr


SOME = [
  "absolute",
  "..",
  "link, absolute",
  "link, through a link",
  "file through a link out",
  "hard link, ..",
  "device",
  "sparse bomb",
  "path over 4096 bytes",
  "file that is a folder",
  "cut in a header",
  "garbage",
  "empty",
  "gz cut",
  "xz broken",
  "bz2 broken",
  "the program is a folder",
]


@pytest.mark.parametrize("name", SOME)
def test_hostile_qemu(no_qemu, server, name):
  check_refused(no_qemu, server, QEMU, HOSTILE[name], RUN if name == ".." else PULL)


# Archives that unpack well and cannot be put in place.
UNFIT = {
  "no share/qemu": pack(*SOUND[:2]),
  "share/qemu is a file": pack(*SOUND[:2], file("./share/qemu")),
  "a folder of the program's new name": pack(*SOUND, folder("./bin/qemu-system-x86_64")),
  "a folder of the record's name": pack(*SOUND, folder("./release.json/x")),
  "non-UTF-8 and set-uid": with_raw(header(entry("./a", mode=0o4755)[0], _0_100=b"./\xff\x1b[3m")),
}


@pytest.mark.parametrize("content", UNFIT.values(), ids=list(UNFIT))
def test_unfit_qemu(no_qemu, server, content):
  check_refused(no_qemu, server, QEMU, content)


@pytest.mark.parametrize(
  "content",
  [HOSTILE["link, .."], HOSTILE["empty"], HOSTILE["gz broken"], pack(file("./README"))],
  ids=["link", "empty", "gz", "no qemu-img"],
)
def test_unfit_tools(full, server, content):
  for name in os.listdir(str(full.cache / "bin")):
    (full.cache / "bin" / name).unlink()
  check_refused(full, server, TOOLS, content)


# The folder qemu of the cache is a link to another disk, which gets full.
ANOTHER_DISK = """
import errno, shutil
plain = os.rename
def rename(source, target):
  if os.path.isdir(source):
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
  plain(source, target)
def full(source, target, **more):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
os.rename, shutil.copyfile = rename, full
"""


def test_a_qemu_that_has_no_room_where_it_is_to_be(no_qemu):
  before = contents(no_qemu.cache / "qemu")
  result = no_qemu(*PULL, code=ANOTHER_DISK)
  check_failed(result, "/qemu/x86_64 cannot be copied there: .*No space left.*\n.*QVM_CACHE_DIR")
  assert contents(no_qemu.cache / "qemu") == before, "half a copy would take the room of the next"


def installed(qvm, server, content, name=QEMU):
  """Let qvm fetch that archive and run; returns what the stand-in for QEMU recorded."""
  server.replace_asset("resources", "v2.0.0", name, content)
  record = qvm.home / "record"
  qvm.play(record=str(record))
  result = qvm(*RUN)
  assert result.returncode == 0, result.stderr
  assert os.listdir(str(qvm.cache / "downloads")) == []
  assert not [path for path in qvm.files() if ".tmp" in path]
  return qvm.record(record)


@pytest.mark.parametrize("name", ["without ./", "top folder", "top folder with ./", "gz", "xz"])
def test_qemu_is_put_in_place(no_qemu, server, name):
  play = installed(no_qemu, server, GOOD[name][0])
  root = no_qemu.cache / "qemu" / "x86_64"
  program = root / "bin" / "qemu-system-x86_64"
  assert play["argv"][0] == str(program)
  assert program.stat().st_mode & 0o777 == 0o755
  assert play["argv"][play["argv"].index("-bios") + 1] == str(root / "share/qemu/bios-256k.bin")
  wanted = {"bin", "bin/qemu-system-x86_64", "share", "share/qemu", "release.json"}
  wanted |= {"share/qemu/bios-256k.bin", "share/qemu/uefi.fd"}
  assert set(contents(root)) == wanted
  record = json.loads((root / "release.json").read_text())
  assert record["release"] == "v2.0.0" and record["url"].endswith(QEMU)
  assert [n for n in os.listdir(str(no_qemu.cache / "qemu")) if n[0] != "."] == ["x86_64"]


def test_a_program_that_may_not_be_executed(no_qemu, server):
  members = [file("./bin/qemu", STAND_IN.encode(), 0o600), *SOUND[2:]]
  installed(no_qemu, server, pack(*members))


QEMU_LINKS = {
  "to libexec": [
    file("./libexec/qemu", STAND_IN.encode(), 0o755),
    link("./bin/qemu", "../libexec/qemu"),
  ],
  "to its full name": [
    file("./bin/qemu-system-x86_64", STAND_IN.encode(), 0o755),
    link("./bin/qemu", "qemu-system-x86_64"),
  ],
  "from its full name": [*SOUND[:2], link("./bin/qemu-system-x86_64", "qemu")],
  "hard, of its full name": [*SOUND[:2], hard("./bin/qemu-system-x86_64", "./bin/qemu")],
}


@pytest.mark.parametrize("members", QEMU_LINKS.values(), ids=list(QEMU_LINKS))
@pytest.mark.parametrize("top", ["", "top"])
def test_qemu_by_way_of_a_link(no_qemu, server, members, top):
  members = [*members, *SOUND[2:]]
  installed(no_qemu, server, pack(*(under(top, *members) if top else members)))


def test_two_cpus_keep_their_firmware(qvm, server):
  for cpu in ("x86_64", "aarch64"):
    members = {"bin/qemu": cpu.encode(), "share/qemu/uefi.fd": b"uefi of " + cpu.encode()}
    server.replace_asset("resources", "v2.0.0", f"qemu-system-{cpu}-{HOST}.tar", tar_of(members))
  for arch in ("x86-64", "arm64"):
    assert qvm("pull", "--platform", arch, "freebsd", "15.1").returncode == 0
  for cpu in ("x86_64", "aarch64"):
    root = qvm.cache / "qemu" / cpu
    assert (root / "bin" / f"qemu-system-{cpu}").read_text() == cpu
    assert (root / "share" / "qemu" / "uefi.fd").read_text() == "uefi of " + cpu


# Where qemu-img may lie in its archive.
PLACES = {
  "root": lambda tool: [file("./qemu-img", tool, 0o755)],
  "root, not executable": lambda tool: [file("./qemu-img", tool, 0o600)],
  "bin": lambda tool: [file("./bin/qemu-img", tool, 0o755)],
  "bin, beside other files": lambda tool: [file("./README"), file("./bin/qemu-img", tool)],
  "top folder": lambda tool: [file("resources/qemu-img", tool, 0o755)],
  "bin of a top folder": lambda tool: [file("./resources/bin/qemu-img", tool, 0o755)],
  "a link": lambda tool: [file("./bin/qemu-img", tool, 0o755), link("./qemu-img", "bin/qemu-img")],
  "a hard link": lambda tool: [file("./a", tool, 0o755), hard("./qemu-img", "./a")],
  "a folder of its name": lambda tool: [folder("./qemu-img"), file("./bin/qemu-img", tool)],
}


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_qemu_img_is_put_in_place(qvm, server, place):
  tool = Path(shutil.which("qemu-img")).read_bytes()
  installed(qvm, server, pack(*place(tool)), TOOLS)
  path = qvm.cache / "bin" / "qemu-img"
  assert path.read_bytes() == tool and path.stat().st_mode & 0o777 == 0o755
  assert not path.is_symlink()
  assert sorted(os.listdir(str(qvm.cache / "bin"))) == ["qemu-img", "qemu-img.json"]
  server.clear_log()
  assert qvm(*RUN).returncode == 0 and server.started == 0


def test_a_damaged_tree_is_replaced(no_qemu, server):
  root = no_qemu.cache / "qemu" / "x86_64"
  (root / "share" / "qemu").mkdir(parents=True)
  (root / "share" / "qemu" / "stale").write_text("")
  (no_qemu.cache / "qemu" / "x86_64.tmp" / "bin").mkdir(parents=True)  # of a run that was killed
  installed(no_qemu, server, pack(*SOUND))
  assert not (root / "share" / "qemu" / "stale").exists()


def test_disk_full(no_qemu, server):
  """No space while unpacking is no fault of the archive: it is kept, and the next run goes on."""
  server.replace_asset(
    "resources",
    "v2.0.0",
    QEMU,
    gzip.compress(pack(*SOUND, file("./share/qemu/big", bytes(1 << 20)))),
  )
  result = no_qemu(
    *PULL, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
  )
  assert result.returncode == 1
  assert "refused" not in result.stderr and "Traceback" not in result.stderr
  assert re.search(r"/qemu-system-x86_64.*too large", result.stderr.splitlines()[-1]), result.stderr
  assert [path for path in no_qemu.files() if path.startswith("qemu/")] == []
  assert no_qemu(*RUN).returncode == 0
  assert len(server.requests(QEMU, "cdn")) == 1
