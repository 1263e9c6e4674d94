"""GitHub's workflows: actions that still run, and the steps of the Macs' boots, run here."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from support import ROOT
from test_mac import (  # noqa: F401 (fixtures)
  mac_of,
  new_mac,
  server,
  stock,
  with_guest,
)

FOLDER = ROOT / ".github/workflows"
# The first majors that run on Node 24: Node 20 left GitHub's runners in September 2026.
NODE_24 = {
  "actions/checkout": 5,
  "actions/setup-python": 6,
  "actions/cache": 5,
  "actions/upload-artifact": 6,
  "actions/download-artifact": 7,
  "actions/attest-build-provenance": 4,  # a wrapper of actions/attest@v4
}


def test_actions_run_on_node_24():
  found = re.findall(
    r"uses: (actions/[\w-]+)@v(\d+)", "".join(map(text_of, FOLDER.parent.rglob("*.yml")))
  )
  assert {name for name, _ in found} == set(NODE_24)
  assert [(name, major) for name, major in found if int(major) < NODE_24[name]] == []


def text_of(path):
  return path.read_text()


def steps(*names):
  """The scripts of these steps of the job that boots guests."""
  job = yaml.safe_load((FOLDER / "test.yml").read_text())["jobs"]["boot"]
  scripts = {step.get("name"): step.get("run") for step in job["steps"]}
  return [scripts[name] for name in names]


BEFORE = ("what this Mac is", "fetch", "boot", "a folder to the guest and back")
NAMES = "names that this Mac's disk takes for one"
AFTER = ("power off", "leave in the cache only what can be fetched")


@with_guest
@pytest.mark.parametrize("machine, platform, names", [
  ("intel", "x86-64", False),
  ("runner", "x86-64", False),
  ("intel", "x86-64", True),
])  # fmt: skip
def test_the_steps_of_the_boot_do_what_they_say(mac_of, tmp_path, machine, platform, names):  # noqa: F811
  mac = mac_of(machine)
  mac.guest_plays()
  folder = mac.home / "checkout"
  folder.mkdir()
  shutil.copy(str(ROOT / "qvm.py"), str(folder))
  os.symlink(sys.executable, str(mac.root / "usr/bin/python3"))
  for name in ("uname", "mkdir", "cp", "mv"):
    os.symlink(shutil.which(name), str(mac.root / "usr/bin" / name))
  env = {**mac.env, "PLATFORM": platform}
  for script in steps(*BEFORE, *([NAMES] if names else []), *AFTER):
    run = subprocess.run(
      [shutil.which("bash"), "-e", "-o", "pipefail", "-c", script],
      cwd=str(folder),
      env=env,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert run.returncode == 0, (script, run.stdout, run.stderr)
  assert mac.processes() == [] and json.loads(mac("list", "--json").stdout) == []
