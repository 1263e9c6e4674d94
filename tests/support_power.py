"""Cuts the power of a host somewhere in what qvm does, and looks at what is there afterwards."""

import contextlib
import functools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from power_cut import Host, lines_of
from release_server import ReleaseServer
from support import FREEBSD, IMAGE, PULL, Qvm, end_processes, fill, tar_of, works

GUEST = ("--platform", "x86-64", "freebsd", "15.1")
RUN, STREAM = ("run", "--name", "vm", *GUEST), ("run", "--stream", "--name", "vm", *GUEST)
# QEMU: it does the steps of $PLAY on its disk with qemu-io.
WRITER = f"""#!{sys.executable} -IS
import json, os, subprocess, sys
drive = next(word for word in sys.argv if word.startswith("if=none,file="))
disk = drive[len("if=none,file="):].rpartition(",id=")[0].replace(",,", ",")
for step in json.loads(os.environ.get("PLAY", "[]")):
  command = ["qemu-io", "-f", "qcow2", "-c", step, disk]
  out = subprocess.run(command, stdout=-1, stderr=-2, text=True)
  if out.returncode or "failed" in out.stdout:
    sys.exit(77)
"""
FIRST, SECOND = "write -P 7 0 64k", "write -P 9 128k 64k"
ACTIONS = ("first run", "kept run", "refresh", "stream")


class Cuts:
  """Cuts the power somewhere in an action, and looks at what is left."""

  def __init__(self, folder, tools, seed=0):
    self.folder, self.tools, self.seed = Path(folder), tools, seed
    self.lengths = {}
    raw, image = self.folder / "raw", self.folder / "image"
    raw.write_bytes(random.Random(1).randbytes(2 << 20))
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)]
    subprocess.run(command, check=True)
    self.image = image.read_bytes()

  @contextlib.contextmanager
  def host(self, name, action):
    """A host as it is before an action, with a release server of its own."""
    home = self.folder / f"{action} {name}"
    home.mkdir()
    with ReleaseServer() as server:
      fill(server, self.image, self.tools)
      qemu = {"bin/qemu": WRITER.encode(), "share/qemu/uefi.fd": b""}
      qemu["share/qemu/bios-256k.bin"] = b""
      server.replace_asset("resources", "v2.0.0", "qemu-system-x86_64-linux.tar", tar_of(qemu))
      host = Host(Qvm(home, "", server), self.folder / f"journal of {action} {name}")
      if action == "kept run":
        works(host.run(*RUN, PLAY=json.dumps([FIRST])))
      if action == "refresh":
        works(host.run(*PULL))
        newer = {IMAGE: self.image + bytes(512)}
        server.add_release("freebsd-builder", "v99.0.0", newer, published="2026-09-01T00:00:00Z")
      yield host
    end_processes(f"HOME={home}", environment=True)
    shutil.rmtree(home)
    shutil.rmtree(host.folder)

  def length(self, action):
    """How many lines the journal of the whole action has."""
    if action not in self.lengths:
      with self.host("measured", action) as host:
        works(self.act(host, action, 1 << 30))
        self.lengths[action] = len(lines_of(host.folder))
    return self.lengths[action]

  def act(self, host, action, last):
    """The action up to a line of the journal; None if it did not come to its end."""
    words = {"refresh": ("pull", "--refresh", *PULL[1:]), "stream": STREAM}.get(action, RUN)
    play = {"PLAY": json.dumps([SECOND, "read 1M 64k"])}
    mark = f"HOME={host.qvm.home}"
    kill = functools.partial(end_processes, mark, environment=True)
    result = host.run_until(last, *words, env=play, kill=kill)
    kill()
    return result

  def one(self, number, action):
    """One power cut; what is there afterwards starts, and nothing is lost that was kept."""
    rng = random.Random(f"{self.seed}:{action}:{number}")
    last = rng.randint(0, self.length(action) + 5)
    with self.host(number, action) as host:
      result = self.act(host, action, last)
      lost = host.lose(rng)
      self.check(host, action, (number, last, lost), result)
    return lost

  def check(self, host, action, facts, result):
    """What is there starts, if need be after what it says; what was kept is there."""
    facts = (action, *facts)
    if result:
      assert result.returncode == 0, (facts, result)
    steps = ["read -P 7 0 64k"] if action == "kept run" else []
    steps += ["read -P 9 128k 64k"] if result and action != "refresh" else []
    run = host.run(*RUN, PLAY=json.dumps(steps))
    if run.returncode == 1:  # it says what to do
      assert "qvm pull" in run.stderr, (facts, run.stderr)
      pull = host.run("pull", "--verify", *PULL[1:])
      assert pull.returncode == 0, (facts, run.stderr, pull)
      run = host.run(*RUN, PLAY=json.dumps(steps))
    assert run.returncode == 0, (facts, steps, run.stderr, result)
    base = (host.qvm.cache / "base" / IMAGE).read_bytes()
    assert base in (self.image, self.image + bytes(512)), facts
    pull = host.run("pull", "--verify", *PULL[1:])
    assert pull.returncode == 0, (facts, pull)
    assert f"{FREEBSD}.qcow2: ok" in pull.stdout, (facts, pull)
