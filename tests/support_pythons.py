"""The Pythons of this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import PYTHON

OLDEST = (3, 6)


def interpreters():
  """Every Python on PATH and of pyenv, {"3.6": path}; shims that lead nowhere are left out.

  What xdist's controller has found, its workers need not look for.
  """
  if "QVM_TEST_PYTHONS" in os.environ:
    return json.loads(os.environ["QVM_TEST_PYTHONS"])
  found = {}
  code = "import sys; print('%d.%d' % sys.version_info[:2])"

  def add(path):
    run = subprocess.run([str(path), "-c", code], capture_output=True, text=True)
    if run.returncode == 0:
      found.setdefault(run.stdout.strip(), str(path))

  for path in (PYTHON, sys.executable, *sorted(Path.home().glob(".pyenv/versions/*/bin/python"))):
    add(path)
  for version in ("2.7", *(f"3.{n}" for n in range(6, 20))):
    path = shutil.which(f"python{version}")
    if path and version not in found:
      add(path)
  os.environ["QVM_TEST_PYTHONS"] = json.dumps(found)
  return found


PYTHONS = interpreters()
MODERN = {
  version: path
  for version, path in PYTHONS.items()
  if tuple(map(int, version.split("."))) >= OLDEST
}
OUTDATED = {version: path for version, path in PYTHONS.items() if version not in MODERN}
VERSION = next(tuple(map(int, v.split("."))) for v, path in PYTHONS.items() if path == PYTHON)
own_python = pytest.mark.skipif(sys.executable != PYTHON, reason="for the Python of the tests only")
every_python = pytest.mark.parametrize("python", MODERN.values(), ids=MODERN)


def since(*version):
  """Marks a test of what Python has only from this version on, such as audit hooks (3.8)."""
  return pytest.mark.skipif(version > VERSION, reason=f"qvm runs with Python {VERSION}")
