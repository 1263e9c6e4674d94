"""Which images are refused: they could make QEMU read other files, or they are damaged."""

import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import IMAGE, check_failed

import qvm as qvm_source

WORDS = ("--platform", "x86-64", "freebsd", "15.1")
PULL, RUN, RUN_RM = ("pull", *WORDS), ("run", *WORDS), ("run", "--rm", *WORDS)
a_few = settings(deadline=None, database=None, max_examples=100)


def qemu_img(*words, folder=None):
  """Run qemu-img; whether it succeeded, and what it wrote."""
  result = subprocess.run(
    ["qemu-img", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )
  return result.returncode == 0, result.stdout.decode()


def made(folder, *words, size="8M"):
  """An image that qemu-img makes in the folder with those options."""
  name = os.path.join(str(folder), "made.qcow2")
  works, output = qemu_img("create", "-q", "-f", "qcow2", *words, name, size, folder=str(folder))
  assert works, output
  return name


def patched(content, offset, value, size):
  """The content with a big-endian number at the offset."""
  return content[:offset] + value.to_bytes(size, "big") + content[offset + size :]


def refused(path, content=None):
  """The words of the refusal, or none."""
  if content is not None:
    with open(str(path), "wb") as file:
      file.write(content)
  try:
    qvm_source.check_image(str(path))
  except qvm_source.QvmError as error:
    assert str(error).startswith(f"the image {path} is refused: ")
    return str(error).rpartition("refused: ")[2]
  return ""


# --- The check as a function -------------------------------------------------------------------

SECRET = ("--object", "secret,id=s,data=abc", "-o")
GOOD = {
  "version 3": (),
  "version 2": ("-o", "compat=0.10"),
  "lazy refcounts": ("-o", "lazy_refcounts=on"),
  "small clusters": ("-o", "cluster_size=512"),
  "large clusters": ("-o", "cluster_size=2M"),
  "extended L2": ("-o", "extended_l2=on"),
  "narrow refcounts": ("-o", "refcount_bits=1"),
  "wide refcounts": ("-o", "refcount_bits=64"),
  "preallocated": ("-o", "preallocation=metadata"),
}


@pytest.mark.parametrize("words", GOOD.values(), ids=list(GOOD))
@pytest.mark.parametrize("size", ["512", "8M"])
def test_good_image(tmp_path, words, size):
  assert refused(made(tmp_path, *words, size=size)) == ""


def test_large_disk(tmp_path):
  assert refused(made(tmp_path, size="2T")) == ""


def test_image_with_a_snapshot(tmp_path):
  path = made(tmp_path)
  assert qemu_img("snapshot", "-c", "one", path) == (True, "")
  assert refused(path) == ""


def test_compressed_image(tmp_path, image):
  assert refused(tmp_path / "x", image) == ""


def test_dirty_image(tmp_path, image):
  """The dirty bit tells of refcounts that QEMU mends by itself."""
  assert refused(tmp_path / "x", patched(image, 72, 1, 8)) == ""


BAD = {
  "backing file": (("-b", "/etc/passwd", "-F", "raw", "-u"), "backing file"),
  "backing file, version 2": (
    ("-o", "compat=0.10", "-b", "/etc/passwd", "-F", "raw", "-u"),
    "backing file",
  ),
  "backing file by URL": (("-b", "nbd://127.0.0.1:9", "-F", "raw", "-u"), "backing file"),
  "backing file as JSON": (
    ("-b", 'json:{"driver":"file","filename":"/etc/passwd"}', "-F", "raw", "-u"),
    "backing file",
  ),
  "data file": (("-o", "data_file=other.raw"), "data file"),
  "raw data file": (("-o", "data_file=other.raw,data_file_raw=on"), "data file"),
  "AES": ((*SECRET, "encrypt.format=aes,encrypt.key-secret=s"), "encrypted"),
}


@pytest.mark.parametrize("words, problem", BAD.values(), ids=list(BAD))
def test_bad_image(tmp_path, words, problem):
  assert problem in refused(made(tmp_path, *words))


# Numbers of the header put to another value: (offset, value, size) and the problem.
PATCHES = {
  "magic": (0, 0x514649FA, 4, "not a qcow2"),
  "version 0": (4, 0, 4, "version"),
  "version 1": (4, 1, 4, "version"),
  "version 4": (4, 4, 4, "version"),
  "version of all bits": (4, 0xFFFFFFFF, 4, "version"),
  "backing file's place alone": (8, 512, 8, "backing file"),
  "backing file's place far away": (8, 1 << 63, 8, "backing file"),
  "backing file's length alone": (16, 8, 4, "backing file"),
  "clusters of 1 byte": (20, 0, 4, "sizes"),
  "clusters of 256 bytes": (20, 8, 4, "sizes"),
  "clusters of 4 MiB": (20, 22, 4, "sizes"),
  "clusters without end": (20, 0xFFFFFFFF, 4, "sizes"),
  "no size": (24, 0, 8, "sizes"),
  "a size of 2^63": (24, 1 << 63, 8, "sizes"),
  "a size of 2^64": (24, (1 << 64) - 1, 8, "sizes"),
  "a size of 1 PiB": (24, 1 << 50, 8, "sizes"),
  "AES": (32, 1, 4, "encrypted"),
  "LUKS": (32, 2, 4, "encrypted"),
  "another cipher": (32, 3, 4, "encrypted"),
  "corrupt": (72, 2, 8, "corrupt"),
  "dirty and corrupt": (72, 3, 8, "corrupt"),
  "data file": (72, 4, 8, "data file"),
  "data file and dirty": (72, 5, 8, "data file"),
  "unknown feature 5": (72, 1 << 5, 8, "features"),
  "unknown feature 63": (72, 1 << 63, 8, "features"),
}


@pytest.mark.parametrize("offset, value, size, problem", PATCHES.values(), ids=list(PATCHES))
def test_patched_header(tmp_path, image, offset, value, size, problem):
  assert problem in refused(tmp_path / "x", patched(image, offset, value, size))


def test_version_2_has_no_feature_bits(tmp_path):
  """What stands in their place belongs to a header extension."""
  with open(made(tmp_path, "-o", "compat=0.10"), "rb") as file:
    content = file.read()
  assert refused(tmp_path / "x", patched(content, 72, 0xE2792ACA, 8)) == ""


def test_unknown_features_that_do_not_matter(tmp_path, image):
  """Compatible features and those that clear themselves may be ignored, says the format."""
  for offset in (80, 88):
    assert refused(tmp_path / "x", patched(image, offset, 1 << 40, 8)) == ""


# Header fields with which QEMU does not open the image at all.
ABSURD = {
  "L1 table too large": (36, 0xFFFFFFFF, 4),
  "L1 table too small": (36, 0, 4),
  "L1 table nowhere": (40, 1 << 40, 8),
  "L1 table not aligned": (40, 0x30001, 8),
  "refcount table nowhere": (48, 1 << 40, 8),
  "refcount table not aligned": (48, 0x10001, 8),
  "refcount table too large": (56, 0xFFFFFFFF, 4),
  "no refcount table": (56, 0, 4),
  "too many snapshots": (60, 0xFFFFFFFF, 4),
  "refcounts of 128 bits": (96, 7, 4),
  "header too short": (100, 8, 4),
  "header too long": (100, 0xFFFFFFFF, 4),
}


@pytest.mark.parametrize("offset, value, size", ABSURD.values(), ids=list(ABSURD))
def test_what_qemu_does_not_open(tmp_path, image, offset, value, size):
  path = tmp_path / "x"
  problem = refused(path, patched(image, offset, value, size))
  opens, words = qemu_img("info", str(path))
  sound, more = qemu_img("check", "-q", str(path))
  assert not opens or not sound, "a bad example: QEMU is content with it"
  assert problem, words + more


@pytest.mark.parametrize("version", [2, 3])
def test_header_of_any_length(tmp_path, image, version):
  words = ("-o", "compat=0.10") if version == 2 else ()
  with open(made(tmp_path, *words), "rb") as file:
    content = file.read()
  for size in range(72 if version == 2 else 112):
    assert refused(tmp_path / "x", content[:size]), size


@pytest.mark.parametrize("size", [112, 512, 65_536, 65_537, 131_072, 196_608, 196_615])
def test_image_without_its_tables(tmp_path, image, size):
  assert refused(tmp_path / "x", image[:size])


@pytest.mark.parametrize(
  "content", [b"", b"\0", b"QFI\xfb", b"\0" * 4096, b"<!DOCTYPE html>", b"KDMV" + b"\0" * 512]
)
def test_no_image(tmp_path, content):
  assert refused(tmp_path / "x", content)


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: b"QFI\xfb" + rest))
@a_few
def test_any_bytes(content):
  with tempfile.TemporaryDirectory() as folder:
    refused(os.path.join(folder, "x"), content)


@given(st.data())
@a_few
def test_what_passes_names_no_other_file(image, data):
  """Any numbers in the header: if it passes and QEMU opens it, there is nothing else to read."""
  content = image
  for _ in range(data.draw(st.integers(1, 3))):
    offset, size = data.draw(
      st.sampled_from([(4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (72, 8), (80, 8)])
    )
    value = data.draw(st.integers(0, 8) | st.integers(0, (1 << 8 * size) - 1))
    content = patched(content, offset, value, size)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "x")
    if refused(path, content):
      return
    opens, output = qemu_img("info", "--output=json", path)
    if opens:
      info = json.loads(output)
      specific = info["format-specific"]["data"]
      assert "backing-filename" not in info and "encrypted" not in info
      assert "data-file" not in specific and not specific.get("corrupt")


# --- The whole program ---------------------------------------------------------------------------


@pytest.fixture
def full(full):
  """The same with a stand-in for QEMU that says when it is started."""
  full.play(record=str(full.home / "record"))
  return full


def bad_images(image):
  """Contents of images that are refused, by the problem."""
  return {
    "backing file": patched(patched(image, 8, 0x200, 8), 16, 11, 4)[:0x200]
    + b"/etc/passwd"
    + image[0x20B:],
    "data file": patched(image, 72, 4, 8),
    "corrupt": patched(image, 72, 2, 8),
    "features": patched(image, 72, 1 << 40, 8),
    "encrypted": patched(image, 32, 2, 4),
    "sizes": patched(image, 24, 1 << 60, 8),
    "version": patched(image, 4, 9, 4),
    "cut short": image[:80],
    "not a qcow2 image": b"\x55\xaa" * 5000,
  }


PROBLEMS = list(bad_images(bytes(600)))


def check_refused(qvm, result, *patterns):
  """Refused with a clear error, and QEMU has not started."""
  for pattern in patterns:
    check_failed(result, pattern)
  assert not (qvm.home / "record").exists()


@pytest.mark.parametrize(
  "problem, words",
  [(problem, PULL) for problem in PROBLEMS]
  + [(problem, words) for problem in PROBLEMS[:3] for words in (RUN, RUN_RM)],
)
def test_a_bad_release_is_refused(no_image, server, image, problem, words):
  before = no_image.files()
  bad = bad_images(image)[problem]
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, bad)
  check_refused(no_image, no_image(*words), IMAGE, problem)
  assert no_image.files() == before
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, image)
  assert no_image(*words).returncode == 0
  assert (no_image.cache / "base" / IMAGE).read_bytes() == image


@pytest.mark.parametrize("words", [PULL, RUN, RUN_RM], ids=["pull", "run", "run --rm"])
@pytest.mark.parametrize("problem", ["backing file", "data file", "cut short"])
def test_a_bad_base_in_the_cache_is_refused(full, server, image, problem, words):
  base = full.cache / "base" / IMAGE
  base.unlink()
  base.write_bytes(bad_images(image)[problem])
  before, result = full.files(), full(*words)
  if words == PULL:  # repairs it
    assert result.returncode == 0 and f"{base} is " in result.stderr, result.stderr
    assert base.read_bytes() == image
    return
  check_refused(full, result, re.escape(str(base)), problem + "|is damaged: its digest is not")
  assert full.files() == before
  assert server.started == 0


def test_a_bad_base_leaves_the_instance_alone(full, image):
  assert full(*RUN).returncode == 0
  (full.home / "record").unlink()
  disk = full.cache / "instances" / IMAGE
  before, files = disk.read_bytes(), full.files()
  base = full.cache / "base" / IMAGE
  base.unlink()
  base.write_bytes(bad_images(image)["data file"])
  check_refused(full, full(*RUN), re.escape(str(base)), "is damaged: its digest is not")
  assert disk.read_bytes() == before and full.files() == files
  base.write_bytes(image)
  assert full(*RUN).returncode == 0


def test_a_base_that_is_a_dangling_link(full, image, tmp_path):
  base = full.cache / "base" / IMAGE
  base.unlink()
  base.symlink_to(tmp_path / "elsewhere")  # on a disk that is not mounted, for all qvm knows
  check_refused(full, full(*RUN), "is its disk mounted")
  assert base.is_symlink() and not (tmp_path / "elsewhere").exists()
  base.unlink()
  assert full(*RUN).returncode == 0
  assert base.read_bytes() == image


def test_a_base_that_is_a_folder(full):
  base = full.cache / "base" / IMAGE
  base.unlink()
  base.mkdir()
  check_refused(full, full(*RUN), re.escape(str(base)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_base_that_may_not_be_read(full):
  base = full.cache / "base" / IMAGE
  base.chmod(0)
  check_refused(full, full(*RUN), re.escape(str(base)), "Permission denied")


def test_the_overlay_names_its_base_only(full):
  """And by a relative path and with its format, so that nothing is guessed from its bytes."""
  assert full(*RUN).returncode == 0
  disk = full.cache / "instances" / IMAGE
  info = json.loads(qemu_img("info", "--output=json", str(disk))[1])
  assert info["backing-filename"] == f"../base/{IMAGE}"
  assert info["backing-filename-format"] == "qcow2"
  assert sys.maxsize > info["virtual-size"] == 4 << 20
