"""Prepared machines: a stand-in for QEMU that starts a real sshd, and whose disk is a real qcow2."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import FREEBSD, fails, heard, lines, processes_of, rows, works

import qvm as qvm_source


@pytest.fixture
def prepare(guests, tmp_path):
  """Guests, and a way to write scripts; what they do is noted in a file of the host's."""
  guests.log = tmp_path / "ran"
  guests.scripts = tmp_path / "scripts"
  guests.scripts.mkdir()
  yield guests
  assert processes_of(guests.qvm.cache) == {}


def script(prepare, text="", name="setup.sh"):
  path = prepare.scripts / name
  path.write_text(text or f"echo {name} >>{prepare.log}\n")
  return str(path)


def with_scripts(*paths):
  return [word for path in paths for word in ("--prepare", path)]


def ran(prepare):
  """What the scripts have noted since the last question."""
  found = prepare.log.read_text().split() if prepare.log.exists() else []
  prepare.log.unlink() if found else None
  return found


def layer_names(prepare):
  names = os.listdir(prepare.qvm.cache / "layers")
  return sorted({name.rpartition(".")[0] for name in names})


def test_the_first_run_sets_up_and_the_next_starts_from_there(prepare):
  one = script(prepare, f"echo out; echo err >&2; echo ran >>{prepare.log}\n")
  first = works(prepare.run("echo command", options=with_scripts(one)))
  assert first.stdout == "command\n"
  assert "\nout\nerr\n" in first.stderr
  assert ran(prepare) == ["ran"]
  (name,) = layer_names(prepare)
  assert re.fullmatch(FREEBSD + "-prepared-[0-9a-f]{10}", name) and prepare.nothing_left()
  second = works(prepare.run("echo again", options=with_scripts(one)))
  assert second.stdout == "again\n" and len(lines(second.stderr)) == 1, second.stderr
  assert ran(prepare) == [] and prepare.nothing_left()
