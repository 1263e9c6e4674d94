"""One command in several guests at once, `qvm each`: stand-ins for QEMU start a real sshd each."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import ssh_guest
from support import (
  FREEBSD,
  end_processes,
  ended,
  fails,
  forget_sizes,
  processes_of,
  wait_for,
)

import qvm as qvm_source

# Before the stand-in: its guest is the one that the instance is named after, and does as
# $EACH_GUESTS says of that.
WHICH = """
import json, os, re, sys
if sys.argv[1:2] != ["--keep"]:
  plays = json.loads(os.environ["EACH_GUESTS"])
  name = re.search(r"([^/]+)-each-[0-9a-f]{6}[.]qcow2", " ".join(sys.argv)).group(1)
  play = {"folder": os.path.join(plays["folder"], name), **plays.get(name, {})}
  os.environ["SSH_GUEST"] = json.dumps(play)
"""


class Each:
  """qvm with stand-ins for several guests."""

  def __init__(self, qvm, folder):
    self.qvm, self.folder = qvm, folder
    self.play({})

  def play(self, plays):
    """How the guests behave, by name."""
    self.qvm.env["EACH_GUESTS"] = json.dumps({"folder": str(self.folder), **plays})

  def have(self, *stems):
    """Put images into the cache."""
    for stem in stems:
      for suffix in (".qcow2", ".json"):
        base = self.qvm.cache / "base"
        if not (base / (stem + suffix)).exists():
          shutil.copy(base / (FREEBSD + suffix), base / (stem + suffix))

  def words(self, *words):
    return ["each", *words]

  def __call__(self, *words, **more):
    return self.qvm("each", "-j", "30", *words, **more)

  def start(self, *words, **more):
    return self.qvm.start("each", "-j", "30", *words, **more)

  def logs(self):
    """The logs of the newest run, by guest."""
    run = sorted((self.qvm.cache / "each").iterdir())[-1]
    return {path.stem: path.read_bytes() for path in run.iterdir()}

  def nothing_left(self):
    """No process, no overlay, no lock, no temporary file."""
    assert processes_of(self.qvm.cache) == {}
    assert list((self.qvm.cache / "instances").iterdir()) == []
    assert os.listdir(self.qvm.env["TMPDIR"]) == []
    return True


@pytest.fixture
def each(full, tmp_path):
  program = full.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  text = Path(ssh_guest.__file__).read_text()
  program.write_text(f"#!{sys.executable}\n{WHICH}\n{text}")
  forget_sizes(full.cache)
  (tmp_path / "tmp").mkdir()
  full.env["TMPDIR"] = str(tmp_path / "tmp")
  found = Each(full, tmp_path / "guests")
  found.have("freebsd-15.0-x86-64", "openbsd-7.9-x86-64", "netbsd-10.1-x86-64")
  yield found
  end_processes(full.cache)


THREE = ("freebsd-15.1", "freebsd-15.0", "netbsd-10.1")


def table(text):
  """The rows of the table at the end: {guest: result}."""
  rows = text.rpartition("GUEST ")[2].splitlines()[1:]
  return {row.split()[0]: re.split("  +", row)[1] for row in rows}


# --- results --------------------------------------------------------------------------------------


def test_all_run_and_are_well(each):
  result = each(*THREE, "--", "echo", "in the guest")
  assert result.returncode == 0, result.stderr
  assert table(result.stdout) == dict.fromkeys(THREE, "ok")
  lines = result.stdout.partition("GUEST ")[0].splitlines()
  for guest in THREE:
    assert lines.count(f"{guest}: in the guest") == 1
    assert b"\nin the guest\n" in each.logs()[guest]
  assert each.nothing_left()
