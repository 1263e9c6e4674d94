"""What people ask for: issue 20, point by point, with the stand-ins."""

import pytest
from support import works

import qvm as qvm_source

RUN = ("run", "freebsd", "15.1")


# --- The beginning of a version --------------------------------------------------------------


@pytest.mark.parametrize(
  "beginning, newest",
  [
    ("15", "15.10"),
    ("1", ""),
    ("15.1", "15.1"),
    ("150", "150.2"),
    ("16", "16.0"),
    ("16.0-rc", "16.0-rc2"),
    ("r1", "r1beta6"),
    ("r15", ""),
    ("6.4", "6.4.2"),
    ("", "150.2"),
    ("99", ""),
  ],
)
def test_each_part_counts_whole(beginning, newest):
  versions = ["15.1", "15.10", "15.9", "150.2", "16.0", "16.0-rc2", "17.0-rc1", "6.4.2", "6.4.1"]
  if beginning.startswith("r"):
    versions = ["r1beta5", "r1beta6", "r1rc7", "r151058"]
  assert qvm_source.newest_of(versions, beginning) == newest


def bases(qvm):
  return [name for name in qvm.files() if name.startswith("base/") and name.endswith("qcow2")]


def test_a_beginning_is_the_newest_of_the_server(no_image, server, image):
  server.add_release("netbsd-builder", "v0.8.0", {"netbsd-10.2-x86-64.qcow2": image})
  run = works(no_image("pull", "netbsd", "10", "--platform", "x86-64"))
  assert bases(no_image) == ["base/netbsd-10.2-x86-64.qcow2"]
  assert "the newest NetBSD 10 for x86-64 is 10.2" in run.stderr


def test_a_whole_version_asks_no_list(full, server):
  before = server.started
  works(full(*RUN))
  assert server.started == before


def test_a_beginning_from_the_cache_when_the_network_is_away(offline, image):
  (offline.cache / "base").mkdir(parents=True)
  for stem in ("freebsd-14.4-x86-64", "freebsd-15.0-x86-64", "freebsd-15.1-arm64"):
    (offline.cache / "base" / f"{stem}.qcow2").write_bytes(image)
  run = works(offline("run", "--dry-run", "freebsd", "15", "--platform", "x86-64"))
  assert "/freebsd-15.0-x86-64.qcow2" in run.stdout
  run = offline("run", "freebsd", "15", "--platform", "x86-64")
  assert "taking the newest cached version, 15.0" in run.stderr


def test_no_such_beginning(no_image):
  run = no_image("pull", "freebsd", "99", "--platform", "x86-64")
  assert run.returncode == 1
  assert "no FreeBSD 99 for x86-64" in run.stderr and "15.1" in run.stderr.splitlines()[-1]
