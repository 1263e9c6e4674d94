"""The release workflow's own steps, run here with a tag as GitHub would."""

import hashlib
import os
import re
import shutil
import subprocess

import pytest
import yaml
from support import ROOT

import qvm as qvm_source

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())


def step(job, word):
  """The only step of a job whose command has that word."""
  (found,) = [s["run"] for s in WORKFLOW["jobs"][job]["steps"] if word in s.get("run", "")]
  return found


@pytest.fixture
def checkout(tmp_path):
  """What the steps need of the repository, and a record of what gh is called with."""
  folder = tmp_path / "checkout"
  folder.mkdir()
  for name in ("qvm.py", "build_zipapp.py", "CHANGELOG.md"):
    shutil.copy(ROOT / name, folder)
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin/gh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/gh\n')
  (tmp_path / "bin/gh").chmod(0o755)
  return folder


def run(folder, script, tag):
  env = {**os.environ, "GITHUB_REF_NAME": tag, "PYTHONDONTWRITEBYTECODE": "1"}
  env["PATH"] = f"{folder.parent / 'bin'}:{env['PATH']}"
  command = ["bash", "-e", "-o", "pipefail", "-c", script]
  return subprocess.run(command, cwd=str(folder), env=env, capture_output=True).returncode


def test_a_release(checkout):
  """Two builds are compared, their digest is published, and the notes are those of the version."""
  version = qvm_source.__version__
  text = (checkout / "CHANGELOG.md").read_text()
  assert re.search(rf"(?m)^## \[{re.escape(version)}\] - 20\d\d-\d\d-\d\d$", text)
  (checkout / "CHANGELOG.md").write_text(text + "\n## [0.0.1] - 2026-01-01\n\n- Older.\n")
  for system in WORKFLOW["jobs"]["build"]["strategy"]["matrix"]["os"]:
    assert run(checkout, step("build", "build_zipapp"), f"v{version}") == 0
    assert run(checkout, step("build", "--version"), f"v{version}") == 0
    assert run(checkout, step("build", "--version"), "v99.0") != 0
    (checkout / "built" / system).mkdir(parents=True)
    (checkout / "qvm.pyz").rename(checkout / "built" / system / "qvm.pyz")
  for word in ("cmp ", "sha256sum", "CHANGELOG", "test -s", "gh release"):
    assert run(checkout, step("publish", word), f"v{version}") == 0, word
  digest = hashlib.sha256((checkout / "qvm.pyz").read_bytes()).hexdigest()
  assert (checkout / "qvm.pyz.sha256").read_text() == f"{digest}  qvm.pyz\n"
  notes = (checkout / "notes.md").read_text()
  assert "### Added" in notes and "Older" not in notes and "## [" not in notes
  words = (checkout.parent / "gh").read_text().splitlines()
  assert words == ["release", "create", f"v{version}", "--notes-file", "notes.md", "qvm.pyz",
                   "qvm.pyz.sha256"]  # fmt: skip


def test_builds_that_differ_are_not_published(checkout):
  for system, content in (("ubuntu-latest", "a"), ("macos-latest", "b")):
    (checkout / "built" / system).mkdir(parents=True)
    (checkout / "built" / system / "qvm.pyz").write_text(content)
  assert run(checkout, step("publish", "cmp "), "v1.0") != 0


def test_a_version_without_notes_is_not_published(checkout):
  assert run(checkout, step("publish", "CHANGELOG"), "v99.0") == 0
  assert run(checkout, step("publish", "test -s"), "v99.0") != 0


def test_the_version_has_one_place():
  found = [
    path.name
    for path in (ROOT / "qvm.py", ROOT / "build_zipapp.py", ROOT / "README.md")
    if re.search(rf"(?<![\w.]){re.escape(qvm_source.__version__)}(?![\w.])", path.read_text())
  ]
  assert found == ["qvm.py"]
