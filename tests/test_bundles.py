"""Bundles made by GNU tar and zstd: their disks with holes, every unpacker, and bad ones."""

import contextlib
import importlib.util
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from support import DEADLINE, PYTHON, fails, replace_qemu_img, works

STEM = "netbsd-11.0-x86-64"
REPO = "netbsd-builder"
PULL = ("pull", "--platform", "x86-64", "netbsd", "11.0")
KERNEL = b"kernel\n" + bytes(70000) + b"end"
MB = 1 << 20
QEMU_IMG = shutil.which("qemu-img")

# qemu-img that notes what the folder of the disk takes before and after a conversion.
METER = f"""#!{sys.executable} -IS
import json, os, subprocess, sys
def blocks(folder):
  return {{file.name: file.stat().st_blocks * 512 for file in os.scandir(folder)}}
if sys.argv[1] != "convert":
  os.execv({QEMU_IMG!r}, sys.argv)
folder = os.path.dirname(sys.argv[-1])
notes = [blocks(folder)]
code = subprocess.call([{QEMU_IMG!r}] + sys.argv[1:])
notes.append(blocks(folder))
with open(os.environ["METER"], "w") as file:
  json.dump(notes, file)
sys.exit(code)
"""

# A program that does part of the work of the real one, says so through the FIFO and then waits.
WAITER = """#!{python}
import os, signal, subprocess, sys
if {when!r} not in sys.argv:
  os.execv({real!r}, sys.argv)
process = subprocess.Popen([{real!r}] + sys.argv[1:], stdout=subprocess.PIPE)
sys.stdout.buffer.write(process.stdout.read({size}))
sys.stdout.buffer.flush()
process.kill()
with open({fifo!r}, "w") as file:
  file.write(str(os.getpid()))
while True:
  signal.pause()
"""

# Python 3.14's compression.zstd for a Python that has it not: a backport, or the zstd program.
BACKPORT = """
from backports.zstd import *
from backports.zstd import ZstdError, open
"""
STAND_IN_ZSTD = f"""
import io, subprocess
class ZstdError(Exception): pass
class Stream(io.RawIOBase):
  def __init__(self, path):
    with io.open(path, "rb") as packed:
      command = [{shutil.which("zstd")!r}, "-dcq"]
      self.process = subprocess.Popen(
        command, stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  def readable(self): return True
  def readinto(self, buffer):
    size = self.process.stdout.readinto(buffer)
    if not size and self.process.wait():
      raise ZstdError("the data are damaged")
    return size
  def close(self):
    if not self.closed:
      self.process.stdout.close()
      self.process.kill()
      self.process.wait()
    super().close()
def open(path): return io.BufferedReader(Stream(path))
"""


# --- Disks and bundles -----------------------------------------------------------------------


def write_disk(path, size, pieces):
  """A sparse file of that size with random bytes at the pieces (offset, length)."""
  dice = random.Random(size)
  with open(path, "wb") as file:
    for offset, length in pieces:
      file.seek(offset)
      file.write(dice.randbytes(length))
    file.truncate(size)
  return path


def squeeze(tar, *options):
  """The bytes of a tar file packed by zstd."""
  command = ["zstd", "-q", "-c", "-1", "--long=27", *options]
  return subprocess.run(command, input=tar, stdout=subprocess.PIPE, check=True).stdout


def gnu_bundle(folder, *words):
  """What GNU tar with these words, and zstd, make of files in the folder."""
  tar = subprocess.Popen(["tar", "-C", folder, "-c", *words], stdout=subprocess.PIPE)
  command = ["zstd", "-q", "-c", "-1", "--long=27"]
  packed = subprocess.run(command, stdin=tar.stdout, stdout=subprocess.PIPE, check=True).stdout
  tar.stdout.close()
  assert tar.wait() == 0
  return packed


def same_disk(disk, base):
  """Whether the qcow2 has the disk's content."""
  compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(disk), str(base)]
  return subprocess.run(compare, stdout=subprocess.DEVNULL).returncode == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """A folder with a small disk.img with holes and a kernel."""
  folder = tmp_path_factory.mktemp("small")
  pieces = [(0, 512), (3 * MB + 512, 100000), (20 * MB - 4096, 4096)]
  write_disk(folder / "disk.img", 20 * MB, pieces)
  (folder / "kernel").write_bytes(KERNEL)
  return folder


@pytest.fixture(scope="module")
def sound(small):
  """A good bundle."""
  return gnu_bundle(small, "-S", "--format=oldgnu", "disk.img", "kernel")


# --- qvm with QEMU in its cache, and bundles on the server -----------------------------------


def serve(server, bundle, older=None):
  """The newest release has just a bundle, as NetBSD's today; the one before a qcow2 or nothing."""
  server.repos[REPO] = {}
  if older:
    assets = {f"{STEM}.qcow2": older}
    server.add_release(REPO, "v0.7.0", assets, published="2026-08-09T00:00:00Z")
  assets = {f"{STEM}.tar.zst": bundle}
  server.add_release(REPO, "v1.0.0", assets, published="2026-08-17T00:00:00Z")


@pytest.fixture(autouse=True)
def programs_unpack(qvm, tmp_path_factory):
  """Python's own zstd, from 3.14 on, is hidden; use() shows it."""
  folder = tmp_path_factory.mktemp("site")
  (folder / "sitecustomize.py").write_text("import sys\nsys.modules['compression.zstd'] = None\n")
  qvm.env["PYTHONPATH"] = str(folder)


def only(qvm, folder, *programs):
  """Leave nothing but these programs on PATH."""
  folder = Path(folder)
  folder.mkdir()
  for name in programs:
    (folder / name).symlink_to(shutil.which(name))
  qvm.env["PATH"] = str(folder)


def image_files(qvm):
  """What there is of images, finished or not."""
  return [name for name in qvm.files() if name.startswith(("base/", "downloads/"))]


# What stays of a bundle that a program cannot unpack: it may be the program that is at fault.
KEPT = [f"downloads/{STEM}.qcow2/{name}" for name in ("map", "note.json", "part")]
DONE = [f"base/{STEM}.json", f"base/{STEM}.qcow2"]


# --- Formats and holes -----------------------------------------------------------------------

FORMATS = {
  "old GNU, sparse": ("-S", "--format=oldgnu"),
  "GNU, sparse": ("-S", "--format=gnu"),
  "POSIX, sparse 0.0": ("-S", "--format=posix", "--sparse-version=0.0"),
  "POSIX, sparse 0.1": ("-S", "--format=posix", "--sparse-version=0.1"),
  "POSIX, sparse 1.0": ("-S", "--format=posix", "--sparse-version=1.0"),
  "GNU": ("--format=gnu",),
  "POSIX": ("--format=posix",),
  "ustar": ("--format=ustar",),
}
MEMBERS = {
  "plain": ("disk.img", "kernel"),
  "kernel first": ("kernel", "disk.img"),
  "dots": ("./disk.img", "./kernel"),
  "folder": (".",),
  "no kernel": ("./disk.img",),
}


@pytest.mark.parametrize(
  "form, members",
  [(form, "plain") for form in FORMATS]
  + [("old GNU, sparse", members) for members in MEMBERS if members != "plain"],
)
def test_formats(no_image, server, small, form, members):
  bundle = gnu_bundle(small, *FORMATS[form], *MEMBERS[members])
  serve(server, bundle)
  run = works(no_image(*PULL))
  assert image_files(no_image) == DONE
  base = no_image.cache / "base" / f"{STEM}.qcow2"
  assert same_disk(small / "disk.img", base)
  assert base.stat().st_mode & 0o777 == 0o444
  assert "no digest" not in run.stderr
  record = json.loads((no_image.cache / "base" / f"{STEM}.json").read_text())
  assert record["url"].endswith(f"/v1.0.0/{STEM}.tar.zst")
  assert record["size"] == len(bundle)


def test_bundle_is_verified_and_runs(no_image, server, sound):
  serve(server, sound)
  works(no_image(*PULL))
  verify = works(no_image(*PULL, "--verify"))
  assert verify.stdout.startswith(f"{STEM}.qcow2: ok, matches v1.0.0\n")
  server.clear_log()
  works(no_image("run", *PULL[1:]))
  assert server.started == 0
  server.replace_asset(REPO, "v1.0.0", f"{STEM}.tar.zst", sound + b"x")
  assert no_image(*PULL, "--verify").returncode == 1
  base = no_image.cache / "base" / f"{STEM}.qcow2"
  base.chmod(0o644)
  base.write_bytes(base.read_bytes() + b"x")
  assert no_image(*PULL, "--verify").returncode == 1


@pytest.mark.parametrize(
  "size, pieces, form",
  [
    (3 << 30, [(n * 100 * MB + 4096, 2 * MB) for n in range(10)], "old GNU, sparse"),
    (3 << 30, [(n * 100 * MB + 4096, 2 * MB) for n in range(10)], "POSIX, sparse 1.0"),
    (80 * MB, [(n * 20 * MB, 2 * MB) for n in range(4)], "GNU"),
    (200 * MB, [(n * MB // 2, 4096) for n in range(400)], "old GNU, sparse"),
    (1 << 30, [], "old GNU, sparse"),
    (1 << 30, [((1 << 30) - 512, 512)], "old GNU, sparse"),
  ],
  ids=["20 MB", "20 MB, POSIX", "not sparse", "crumbs", "empty", "last sector"],
)
def test_holes_stay_holes(no_image, server, tmp_path, size, pieces, form):
  """At no moment the disk takes more than its data, nor does the base image afterwards."""
  disk = write_disk(tmp_path / "disk.img", size, pieces)
  data = sum(-(-length // 4096) * 4096 for _, length in pieces)
  slack = MB
  assert disk.stat().st_blocks * 512 <= data + slack
  serve(server, gnu_bundle(tmp_path, *FORMATS[form], "disk.img"))
  replace_qemu_img(no_image, METER)
  works(no_image(*PULL, env={"METER": str(tmp_path / "meter")}))
  before, after = json.loads((tmp_path / "meter").read_text())
  assert before == {"disk.img": before["disk.img"]}
  assert before["disk.img"] <= data + slack
  assert after["disk.qcow2"] <= 16 * data + slack if len(pieces) == 400 else data + slack
  assert sum(after.values()) <= before["disk.img"] + after["disk.qcow2"]
  base = no_image.cache / "base" / f"{STEM}.qcow2"
  assert base.stat().st_blocks * 512 <= after["disk.qcow2"] + slack
  assert same_disk(disk, base)
  info = subprocess.run([QEMU_IMG, "info", "--output=json", base], capture_output=True, check=True)
  assert json.loads(info.stdout)["virtual-size"] == size


# --- Unpackers -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def zstd_package(tmp_path_factory):
  """A folder with a package `compression` that has what Python 3.14's has of zstd, if it lacks."""
  folder = tmp_path_factory.mktemp("site")
  if sys.version_info >= (3, 14):
    return folder
  (folder / "compression").mkdir()
  (folder / "compression" / "__init__.py").touch()
  module = BACKPORT
  if not (importlib.util.find_spec("backports") and importlib.util.find_spec("backports.zstd")):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    pip += ["--no-cache-dir", "--retries=0", "--timeout=5", "--only-binary=:all:"]
    pip += ["--target", str(folder), "backports.zstd"]
    if subprocess.run(pip, capture_output=True).returncode:
      module = STAND_IN_ZSTD
  (folder / "compression" / "zstd.py").write_text(module)
  return folder


def use(qvm, unpacker, tmp_path, zstd_package):
  """Leave only one way to unpack zstd."""
  if unpacker == "python":
    if sys.executable != PYTHON:
      pytest.skip("the package is for the Python of the tests")
    only(qvm, tmp_path / "bin")
    qvm.env["PYTHONPATH"] = str(zstd_package)
  else:
    only(qvm, tmp_path / "bin", unpacker)


UNPACKERS = ("zstd", "unzstd", "zstdcat", "bsdtar", "python")


@pytest.mark.parametrize("form", ["old GNU, sparse", "POSIX"])
@pytest.mark.parametrize("unpacker", UNPACKERS)
def test_each_unpacker(no_image, server, small, tmp_path, zstd_package, image, unpacker, form):
  serve(server, gnu_bundle(small, *FORMATS[form], "disk.img", "kernel"), image)
  use(no_image, unpacker, tmp_path, zstd_package)
  works(no_image(*PULL))
  assert image_files(no_image) == DONE
  assert same_disk(small / "disk.img", no_image.cache / "base" / f"{STEM}.qcow2")


@pytest.mark.parametrize("unpacker", UNPACKERS)
def test_holes_with_each_unpacker(no_image, server, tmp_path, zstd_package, unpacker):
  disk = write_disk(tmp_path / "disk.img", 400 * MB, [(200 * MB, MB)])
  serve(server, gnu_bundle(tmp_path, "-S", "--format=oldgnu", "disk.img"))
  use(no_image, unpacker, tmp_path, zstd_package)
  replace_qemu_img(no_image, METER)
  works(no_image(*PULL, env={"METER": str(tmp_path / "meter")}))
  for note in json.loads((tmp_path / "meter").read_text()):
    assert max(note.values()) <= 2 * MB
  assert same_disk(disk, no_image.cache / "base" / f"{STEM}.qcow2")


@pytest.mark.parametrize("api", ["up", "out of quota", "gone"])
def test_without_an_unpacker_an_older_qcow2_is_taken(no_image, server, sound, tmp_path, image, api):
  serve(server, sound, image)
  only(no_image, tmp_path / "bin")
  if api == "gone":
    no_image.env["QVM_API_URL"] = "http://127.0.0.1:9/nowhere"
  server.api_quota = 0 if api == "out of quota" else None
  run = works(no_image(*PULL))
  assert (no_image.cache / "base" / f"{STEM}.qcow2").read_bytes() == image
  assert "v0.7.0" in run.stderr and "v1.0.0" in run.stderr and "zstd" in run.stderr
  assert not server.requests("tar.zst", "cdn")
  assert image_files(no_image) == DONE


def test_without_an_unpacker_and_without_a_qcow2(no_image, server, sound, tmp_path):
  serve(server, sound)
  only(no_image, tmp_path / "bin")
  fails(no_image(*PULL), "zstd", "install")
  assert not server.requests("tar.zst", "cdn")
  assert image_files(no_image) == []
  no_image.env["PATH"] = os.environ["PATH"]
  works(no_image(*PULL))


@pytest.mark.parametrize("programs", [(), ("zstd",)])
def test_python_built_without_zstd(no_image, server, sound, small, tmp_path, image, programs):
  """Python 3.14 has compression.zstd even when it was built without the library behind it."""
  serve(server, sound, image)
  only(no_image, tmp_path / "bin", *programs)
  package = tmp_path / "site" / "compression"
  package.mkdir(parents=True)
  (package / "__init__.py").touch()
  (package / "zstd.py").write_text("import _zstd_that_was_not_built\n")
  no_image.env["PYTHONPATH"] = str(package.parent)
  works(no_image(*PULL))
  base = no_image.cache / "base" / f"{STEM}.qcow2"
  assert same_disk(small / "disk.img", base) if programs else base.read_bytes() == image


# --- Damaged ---------------------------------------------------------------------------------


def flipped(data, share):
  """The data with one bit changed at that share of their length."""
  place = int(len(data) * share)
  return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


def cut_tar(folder, size):
  """A bundle whose tar ends after that many bytes, though its zstd is sound."""
  tar = subprocess.run(["tar", "-C", folder, "-c", "disk.img"], stdout=subprocess.PIPE).stdout
  return squeeze(tar[:size])


DAMAGED = {
  "half": lambda good, folder: good[: len(good) // 2],
  "without its last byte": lambda good, folder: good[:-1],
  "10 bytes": lambda good, folder: good[:10],
  "nothing": lambda good, folder: b"",
  "bit at 30%": lambda good, folder: flipped(good, 0.3),
  "bit at 60%": lambda good, folder: flipped(good, 0.6),
  "bit in the checksum": lambda good, folder: good[:-2] + bytes([good[-2] ^ 1]) + good[-1:],
  "garbage": lambda good, folder: random.Random(1).randbytes(5000),
  "garbage behind": lambda good, folder: good + random.Random(2).randbytes(5000),
  "zstd of garbage": lambda good, folder: squeeze(random.Random(3).randbytes(5000)),
  "zstd of nothing": lambda good, folder: squeeze(b""),
  "zstd of zeros": lambda good, folder: squeeze(bytes(MB)),
  "zstd of text": lambda good, folder: squeeze(b"hello\n" * 1000),
  "zstd of a cut tar": lambda good, folder: cut_tar(folder, 10 * MB),
  "tar cut in a header": lambda good, folder: cut_tar(folder, 100),
}


@pytest.mark.parametrize(
  "unpacker, case",
  [("zstd", case) for case in DAMAGED]
  + [(unpacker, case) for unpacker in ("bsdtar", "python") for case in list(DAMAGED)[::2]],
)
def test_damaged(no_image, server, sound, small, tmp_path, zstd_package, image, unpacker, case):
  bad = DAMAGED[case](sound, small)
  serve(server, bad, image)
  use(no_image, unpacker, tmp_path, zstd_package)
  run = no_image(*PULL)
  fails(run, f"{STEM}.tar.zst")
  blamed = unpacker != "python" and f"/{unpacker} cannot unpack" in run.stderr
  assert image_files(no_image) == (KEPT if blamed else [])
  if unpacker != "zstd":
    return  # the next pull is the same for all
  assert blamed == (not case.startswith(("zstd of", "tar cut")))
  server.replace_asset(REPO, "v1.0.0", f"{STEM}.tar.zst", sound)
  works(no_image(*PULL))
  assert same_disk(small / "disk.img", no_image.cache / "base" / f"{STEM}.qcow2")


@pytest.mark.parametrize("case", ["half", "garbage", "10 bytes"])
def test_without_a_digest_a_bundle_that_cannot_be_unpacked_is_thrown_away(
  no_image, server, sound, small, case
):
  """Nothing says that the program is at fault, and the next pull would fail for ever."""
  server.repos[REPO] = {}
  assets = {f"{STEM}.tar.zst": DAMAGED[case](sound, small)}
  server.add_release(REPO, "v1.0.0", assets, digests=False)
  run = no_image(*PULL)
  assert run.returncode == 1 and "no digest says that the download is sound" in run.stderr
  assert image_files(no_image) == []
  server.replace_asset(REPO, "v1.0.0", f"{STEM}.tar.zst", sound)
  works(no_image(*PULL))


@pytest.mark.parametrize("case", ["half", "without its last byte", "bit at 30%", "bit at 60%"])
@pytest.mark.parametrize("unpacker", ["zstd", "bsdtar", "python"])
def test_damaged_behind_the_end(
  no_image, server, small, tmp_path, zstd_package, unpacker, case
):  # fmt: skip
  """The end of the tar is no reason not to read the end of the zstd, where its checksum is."""
  bundle = gnu_bundle(small, "-b", "512", "-S", "--format=oldgnu", "disk.img")
  serve(server, DAMAGED[case](bundle, small))
  use(no_image, unpacker, tmp_path, zstd_package)
  fails(no_image(*PULL), f"{STEM}.tar.zst")
  assert image_files(no_image) == ([] if unpacker == "python" else KEPT)


def test_a_program_that_fails_is_no_damaged_bundle(no_image, server, small, sound, tmp_path):
  """Its words are shown, and the download need not be repeated."""
  serve(server, sound)
  only(no_image, tmp_path / "bin")
  program = tmp_path / "bin" / "zstd"
  program.write_text("#!/bin/sh\necho 'Frame requires too much memory' >&2; exit 3\n")
  program.chmod(0o755)
  fails(
    no_image(*PULL), f"{program} cannot unpack {STEM}.tar.zst", "exit code 3", "too much memory"
  )
  assert image_files(no_image) == KEPT
  program.unlink()
  program.symlink_to(shutil.which("zstd"))
  server.clear_log()
  works(no_image(*PULL))
  assert same_disk(small / "disk.img", no_image.cache / "base" / f"{STEM}.qcow2")
  assert not server.requests("tar.zst", "cdn")


def test_a_bsdtar_without_zstd(no_image, server, small, sound, tmp_path, image):
  """As every Mac has: it is no unpacker, and an older qcow2 is taken."""
  serve(server, sound, image)
  only(no_image, tmp_path / "bin")
  program = tmp_path / "bin" / "bsdtar"
  program.write_text("#!/bin/sh\necho 'bsdtar 3.5.3 - libarchive 3.7.4 zlib/1.2.12 bz2lib/1.0.8'\n")
  program.chmod(0o755)
  run = works(no_image(*PULL))
  assert (no_image.cache / "base" / f"{STEM}.qcow2").read_bytes() == image
  assert "v0.7.0" in run.stderr and "zstd" in run.stderr


# --- Hostile ---------------------------------------------------------------------------------


def member(name="disk.img", content=b"disk" * 1000, **fields):
  """A member of a tar, as its header and its content in blocks."""
  info = tarfile.TarInfo(name)
  info.size = len(content)
  for field, value in fields.items():
    setattr(info, field, value)
  return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse_member(pieces, real_size, stored, name="disk.img"):
  """An old-GNU sparse member with at most four pieces (offset, length); all numbers in base 256."""
  number = tarfile.itn
  header = bytearray(member(name, b"")[:512])
  header[124:136] = number(stored, 12, tarfile.GNU_FORMAT)
  header[156:157] = b"S"
  for at, piece in enumerate(pieces):
    for part in (0, 1):
      start = 386 + 24 * at + 12 * part
      header[start : start + 12] = number(piece[part], 12, tarfile.GNU_FORMAT)
  header[483:495] = number(real_size, 12, tarfile.GNU_FORMAT)
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  return bytes(header) + b"x" * stored + bytes(-stored % 512)


def pax_member(headers, content=b"disk" * 1000):
  """A member of which extended headers say more."""
  info = tarfile.TarInfo("disk.img")
  info.size = len(content)
  info.pax_headers = headers
  return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


END = bytes(1024)
GOOD = member()
LINK = {"content": b"", "linkname": "/etc/passwd"}
HUGE = 1 << 60
HOSTILE = {
  "a third member": GOOD + member("kernel") + member("README"),
  "a member first": member("README") + GOOD,
  "a folder first": member("sub", b"", type=tarfile.DIRTYPE) + GOOD,
  "in a folder": member("netbsd/disk.img"),
  "parent": GOOD + member("../evil"),
  "parent first": member("../evil") + GOOD,
  "parent in between": member("x/../../disk.img"),
  "parent that comes back": member("x/../disk.img"),
  "absolute": GOOD + member("/tmp/evil-of-qvm"),
  "absolute disk": member("/disk.img"),
  "symbolic link": member(type=tarfile.SYMTYPE, **LINK),
  "link, then disk": member(type=tarfile.SYMTYPE, **LINK) + GOOD,
  "link as kernel": GOOD + member("kernel", type=tarfile.SYMTYPE, **LINK),
  "hard link": member(type=tarfile.LNKTYPE, **LINK),
  "kernel linked to the disk": GOOD + member("kernel", b"", type=tarfile.LNKTYPE,
                                             linkname="disk.img"),
  "device": member(content=b"", type=tarfile.BLKTYPE, devmajor=8, devminor=0),
  "character device": member(content=b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
  "FIFO": member(content=b"", type=tarfile.FIFOTYPE),
  "folder as disk": member("disk.img/", b"", type=tarfile.DIRTYPE),
  "folder as kernel": GOOD + member("kernel", b"", type=tarfile.DIRTYPE),
  "two disks": GOOD + GOOD,
  "two disks, one with a dot": GOOD + member("./disk.img"),
  "two kernels": GOOD + member("kernel") + member("kernel"),
  "no disk": member("kernel"),
  "other case": member("DISK.IMG"),
  "empty disk": member(content=b""),
  "unknown type": member(type=b"?"),
  "absurd size": member(content=b"", size=HUGE),
  "absurd size of the kernel": GOOD + member("kernel", b"", size=HUGE),
  "negative size": member(content=b"", size=-512),
  "absurd sparse size": sparse_member([(0, 512)], HUGE, 512),
  "negative sparse size": sparse_member([(0, 512)], -512, 512),
  "piece beyond the end": sparse_member([(0, 512), (8192, 512)], 4096, 1024),
  "piece across the end": sparse_member([(4000, 512)], 4096, 512),
  "piece at an absurd place": sparse_member([(1 << 62, 512)], MB, 512),
  "piece at an impossible place": sparse_member([(1 << 70, 512)], MB, 512),
  "piece at a negative place": sparse_member([(-512, 512)], MB, 512),
  "piece of a negative length": sparse_member([(0, -512)], MB, 512),
  "pieces longer than what is stored": sparse_member([(0, 4096)], MB, 512),
  "pax path": pax_member({"path": "../../evil"}),
  "pax size": pax_member({"size": str(HUGE)}),
  "pax sparse size": pax_member({"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                 "GNU.sparse.realsize": str(HUGE)}, b"1\n0\n512\n".ljust(1024)),
  "pax sparse map": pax_member({"GNU.sparse.map": f"{HUGE},512", "GNU.sparse.size": "512"}),
  "pax sparse words": pax_member({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, b"x\n" * 512),
  "pax sparse map of words": pax_member({"GNU.sparse.map": "a,b", "GNU.sparse.size": "c"}),
  "pax sparse name": pax_member({"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                 "GNU.sparse.name": "../evil", "GNU.sparse.realsize": "512"},
                                b"1\n0\n512\n".ljust(1024)),
}  # fmt: skip


def below(folder, but):
  """All paths below a folder, except what lies in one of its own."""
  return sorted(path for path in folder.rglob("*") if but not in path.parents and path != but)


def hostile(qvm, server, tmp_path, tar):
  """The tar is refused, by its name, and nothing of it stays."""
  serve(server, squeeze(tar + END))
  before = below(tmp_path, qvm.cache)
  run = qvm(*PULL)
  fails(run, STEM)
  assert image_files(qvm) == (KEPT if "bsdtar cannot unpack" in run.stderr else [])
  assert below(tmp_path, qvm.cache) == before
  assert not os.path.exists("/tmp/evil-of-qvm")


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(no_image, server, tmp_path, case):
  hostile(no_image, server, tmp_path, HOSTILE[case])


def test_what_follows_a_bundle_has_an_end(no_image, server):
  """The checksum comes behind it, so it is read."""
  serve(server, squeeze(GOOD + END + bytes(MB)))
  fails(no_image(*PULL, code="qvm.MAX_REST_BYTES = qvm.CHUNK_BYTES"), STEM, "it does not end")
  works(no_image(*PULL))


@pytest.mark.parametrize(
  "case", ["parent", "absolute", "symbolic link", "two disks", "absurd size"]
)
@pytest.mark.parametrize("unpacker", ["bsdtar", "python"])
def test_hostile_with_other_unpackers(
  no_image, server, tmp_path, zstd_package, unpacker, case
):  # fmt: skip
  use(no_image, unpacker, tmp_path, zstd_package)
  hostile(no_image, server, tmp_path, HOSTILE[case])


def test_the_good_member_is_good(no_image, server):
  """What the hostile ones are made of is not refused by itself."""
  sparse = sparse_member([(0, 512), (8192, 512)], MB, 1024)
  for tar in (
    GOOD,
    GOOD + member("kernel"),
    sparse,
    member("./", b"", type=tarfile.DIRTYPE) + GOOD,
  ):
    serve(server, squeeze(tar + END))
    works(no_image(*PULL))
    shutil.rmtree(no_image.cache / "base")


# --- Killed, and out of luck -----------------------------------------------------------------


def waiting(fifo, process):
  """The process id that a WAITER writes once it waits; an error, no hang, when it never does."""
  with open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
    patience = time.monotonic() + DEADLINE
    while not select.select([file], [], [], 0.1)[0]:
      assert process.poll() is None, process.communicate()
      assert time.monotonic() < patience, "the program was not started"
    os.set_blocking(file.fileno(), True)
    return int(file.read())


@pytest.fixture
def stopped(no_image, server, sound, tmp_path):
  """Start a pull of a bundle that stops in zstd or in qemu-img; returns qvm's process."""
  fifo = tmp_path / "fifo"
  os.mkfifo(fifo)
  started = []

  def start(where):
    serve(server, sound)
    real, when = shutil.which(where), "-dcq" if where == "zstd" else "convert"
    program = tmp_path / "waiter" / where
    program.parent.mkdir()
    text = WAITER.format(python=sys.executable, real=real, when=when, size=5 * MB, fifo=str(fifo))
    program.write_text(text)
    program.chmod(0o755)
    content = (no_image.cache / "bin" / "qemu-img").read_bytes()
    if where == "qemu-img":
      replace_qemu_img(no_image, text)
    env = {"PATH": f"{program.parent}:{no_image.env['PATH']}"}
    process = no_image.start(*PULL, env=env if where == "zstd" else {})
    started.append([process])
    started[-1].append(waiting(fifo, process))
    replace_qemu_img(no_image, content)
    return process

  yield start
  for process, *pids in started:
    process.kill()
    process.communicate()
    for pid in pids:
      with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if os.fsencode(where_it_waits(pid)).startswith(os.fsencode(tmp_path)):
          os.kill(pid, signal.SIGKILL)


def where_it_waits(pid):
  """The script that a process runs."""
  return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1])


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["zstd", "qemu-img"])
def test_killed_while_unpacking(no_image, server, small, stopped, where, signum):
  process = stopped(where)
  assert not list((no_image.cache / "base").glob("*"))
  process.send_signal(signum)
  process.communicate()
  assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
  assert not list((no_image.cache / "base").glob("*.qcow2"))
  server.clear_log()
  works(no_image(*PULL))
  assert image_files(no_image) == DONE
  assert same_disk(small / "disk.img", no_image.cache / "base" / f"{STEM}.qcow2")
  assert not server.requests("tar.zst", "cdn"), "the bundle was complete"


@pytest.mark.parametrize("where", ["zstd", "qemu-img"])
def test_another_qvm_waits_for_the_unpacking(no_image, server, small, stopped, where):
  stopped(where)
  other = no_image.start(*PULL)
  line = other.stderr.readline()
  while "waiting" not in line:
    assert line, other.communicate()
    line = other.stderr.readline()
  other.terminate()
  other.communicate()
  assert other.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("where", ["zstd", "qemu-img"])
def test_clean_leaves_what_is_being_unpacked(no_image, stopped, where):
  stopped(where)
  before = image_files(no_image)
  assert len(before) > 2
  run = works(no_image("clean", "--all"))
  assert [name for name in before if name not in image_files(no_image)] == []
  assert STEM not in run.stdout


def test_failing_qemu_img_leaves_no_disk(no_image, server, sound, small):
  script = f"#!{sys.executable} -IS\nraise SystemExit('qemu-img: no space left')\n"
  content = replace_qemu_img(no_image, script)
  serve(server, sound)
  fails(no_image(*PULL), "qemu-img", "no space left")
  assert [name for name in image_files(no_image) if "unpacked" in name] == []
  replace_qemu_img(no_image, content)
  works(no_image(*PULL))
  assert same_disk(small / "disk.img", no_image.cache / "base" / f"{STEM}.qcow2")


def test_no_space_for_the_disk(no_image, server, sound, small):
  """A limit on the size of files, as a stand-in for a full disk: the error names what is full."""
  serve(server, sound)
  limit = (10 * MB, 10 * MB)
  run = no_image(*PULL, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
  fails(run, STEM)
  assert [name for name in image_files(no_image) if "unpacked" in name] == []
  works(no_image(*PULL))
  assert same_disk(small / "disk.img", no_image.cache / "base" / f"{STEM}.qcow2")


# --- With all else ---------------------------------------------------------------------------


def test_digest_of_a_bundle(no_image, server, sound, small):
  """It is that of what comes, not that of the disk within."""
  serve(server, sound)
  server.fault(f"{STEM}.tar.zst", flip=50000, times=None)
  fails(no_image(*PULL), f"{STEM}.tar.zst", "sha256")
  assert image_files(no_image) == []
  server.clear_faults()
  server.fault(f"{STEM}.tar.zst", flip=50000)
  works(no_image(*PULL))
  assert same_disk(small / "disk.img", no_image.cache / "base" / f"{STEM}.qcow2")


def test_bundle_while_qemu_img_comes(qvm, server, small, sound):
  """With nothing cached, the bundle waits for the qemu-img that is fetched meanwhile."""
  serve(server, sound)
  works(qvm("run", *PULL[1:]))
  assert same_disk(small / "disk.img", qvm.cache / "base" / f"{STEM}.qcow2")
  assert len(server.requests("resources-linux.tar", "cdn")) == 1


def test_bundle_when_qemu_img_does_not_come(qvm, server, sound):
  serve(server, sound)
  server.fault("resources-linux.tar", times=None, status=403)
  qvm.env["QVM_RETRY_DELAY"] = "0"
  fails(qvm(*PULL), "resources-linux.tar")
  assert not [name for name in image_files(qvm) if name.startswith("base/")]
  server.clear_faults()
  works(qvm(*PULL))


def test_refresh_from_and_to_a_bundle(no_image, server, sound, small, image):
  """The base image is always that of the newest release."""
  server.repos[REPO] = {}
  base = no_image.cache / "base" / f"{STEM}.qcow2"
  steps = (("v1", ".qcow2", image), ("v2", ".tar.zst", sound), ("v3", ".qcow2", image + b"3"))
  for day, (tag, suffix, content) in enumerate(steps):
    published = f"2026-01-0{day + 1}T00:00:00Z"
    server.add_release(REPO, tag, {STEM + suffix: content}, published=published)
    works(no_image(*PULL, "--refresh"))
    assert same_disk(small / "disk.img", base) if tag == "v2" else base.read_bytes() == content
    assert image_files(no_image) == DONE
    server.clear_log()
    works(no_image(*PULL, "--refresh"))
    assert not [r for r in server.requests(STEM, "cdn") if r.status == 200], "it is the newest"


def test_bundle_with_a_kernel_and_an_empty_disk(no_image, server):
  """A refused bundle leaves nothing."""
  serve(server, squeeze(member("kernel") + member(content=b"") + END))
  fails(no_image(*PULL), STEM)
  assert image_files(no_image) == []
