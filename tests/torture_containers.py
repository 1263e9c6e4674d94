"""Two containers that use one cache at the same time."""

import contextlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

from release_server import ReleaseServer
from support import IMAGE, QEMU, TOOLS, Qvm, end_processes, tar_of
from support_torture import (
  GUEST,
  PULL,
  REFRESH,
  REPOS,
  RUN,
  Asset,
  Forks,
  Violation,
  check_complete,
  check_locks,
  check_published,
  check_tidy,
  check_words,
  demand,
  make_image,
  make_tools,
  ours,
  played,
  publish,
  qemus,
  why_not,
)

NAMESPACES = ("--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--ipc", "--uts")
INIT = 'hostname "$0" && ip link set lo up && exec "$@"'
NAMES = ("blue", "green")
# It says when something is wrong with its disk, and ends of its own accord unless that is "d" or
# "held". It waits without a child, which would have its disk and the lock of its machine.
QEMU_SCRIPT = b"""#!/bin/bash
for word; do
  case $word in if=none,file=*) disk=${word#if=none,file=}; disk=${disk%%,id=*} ;; esac
done
wrong() { echo "$1: $disk" >>"$HOME/wrong"; }
exec 2>/dev/null 8<> <(:) 9<"$disk"
me=$(readlink -f "$0") base=${disk%/*/*}/base/IMAGE
flock -n 9 || wrong "opened twice"
trap exit TERM
case $disk in */d.qcow2|*/held.qcow2) left=6000 ;; *) left=3 ;; esac
while [ $left -gt 0 ]; do
  read -r -t 0.1 -u 8
  for each in "$disk" "$base" "$me"; do [ -e "$each" ] || wrong "$each is gone"; done
  left=$((left - 1))
done
exit 0
"""
DETACHED = ("run", "-d", "--boot-timeout", "0.2", "--name")
OPERATIONS = (
  *[RUN] * 5,
  *[PULL] * 2,
  *[REFRESH] * 2,
  *[("clean", "--all")] * 2,
  ("clean",),
  *[("run", "--name", "a", *GUEST)] * 3,
  *[(*DETACHED, "d", *GUEST)] * 2,
  ("stop", "--force", "d"),
  ("rm", "--force", "d"),
  ("ssh", "--boot-timeout", "0.2", "d", "--", "true"),
  ("logs", "d"),
  ("rm", "a"),
  ("clone", "a", "b"),
  ("rm", "b"),
  *[("list",)] * 2,
)
ELSEWHERE = r"the instance \w+ runs in another container or on another host \((blue|green)\)"
# What a command may say when it fails because of what the others do.
HONEST = (
  r"there is no instance [abd]; nothing was \w+",
  r"there is already an instance b",
  r"the instance [abd] is already running \(.*\)(; nothing was \w+)?",
  r"the instance d is not running.*",
  r"the instance d cannot be stopped .*",
  r"/\S*\.qcow2 cannot be (refreshed|replaced by another image): these instances depend on it: .*",
  r"/\S* loses files as soon as they are there",
  r"cannot log in to d as .*",
  r"there is no file /\S*/d\.console\.log",
  r"the machine d ended before ssh answered .*",  # another qvm has stopped it
  r"something other than qvm killed QEMU \(signal (9|15)\)",
  ELSEWHERE,
)


def container(name):
  """The words that start a program in a container of its own."""
  return ("unshare", *NAMESPACES, "sh", "-c", INIT, name)


def problem():
  """Why there can be no containers here; empty if there can."""
  return why_not((*container("blue"), "flock", "--version"))


class Containers:
  """Two containers with one home, which take all that they need from a mirror in a folder."""

  def __init__(self, folder, forks, seed):
    self.folder, self.forks, self.counts = Path(folder), forks, Counter()
    self.rng, self.round = random.Random(f"{seed}:containers"), 0
    script = QEMU_SCRIPT.replace(b"IMAGE", IMAGE.encode())
    archive = tar_of({"bin/qemu": script, "share/qemu/uefi.fd": b""})
    tree = {"qemu/x86_64/bin/qemu-system-x86_64": script, "qemu/x86_64/share/qemu/uefi.fd": b""}
    assets = {IMAGE: make_image(self.rng), QEMU: Asset(archive, tree), TOOLS: make_tools(self.rng)}
    self.versions = {name: [asset] for name, asset in assets.items()}
    self.server = ReleaseServer()
    publish(self.server, assets)
    self.source = Qvm(self.folder / "source", forks.program, self.server)
    self.qvm = Qvm(self.folder / "home", forks.program)
    for each in (self.source, self.qvm):
      each.home.mkdir()
    mirror = f"file://{self.folder}/mirror"
    self.qvm.env.update(QVM_RELEASES_URL=mirror, QVM_API_URL="", QVM_TIMEOUT="30")
    self.fill()
    self.all = {name: self.container(name) for name in NAMES}

  def container(self, name):
    """What starts qvm in a new container."""
    folder = self.folder / name
    folder.mkdir()
    return Forks(folder, self.forks.program.parent, container(name))

  def fill(self):
    """Bring what is newest into the mirror."""
    words = ("pull", "--mirror", str(self.folder / "mirror"), *GUEST)
    check_words(self.forks.run(self.source, *words), (0,))

  def close(self):
    """End the containers with all that runs there."""
    for each in self.all.values():
      each.close()
    end_processes(f"HOME={self.qvm.home}", environment=True)
    self.server.close()

  def one(self, seed):
    """A round: everything at once, then what one container sees of the other."""
    rng, said = random.Random(seed), [f"seed {seed}"]
    if self.round and rng.random() < 0.5:
      self.versions[IMAGE].append(make_image(rng))
      content = {IMAGE: self.versions[IMAGE][-1].content}
      stamp = f"2026-09-01T00:{self.round % 60:02}:00Z"
      self.server.add_release(REPOS[IMAGE][0], f"v9.{self.round}", content, published=stamp)
      self.fill()
    self.round += 1
    try:
      self.crowd(rng, said)
      self.checks(said)
      self.seen(rng, said)
      self.checks(said)
      check_tidy(self.qvm, self.counts, rng.choice(list(self.all.values())))
    except Violation as violation:
      raise Violation("\n".join([*said, str(violation)]))

  def crowd(self, rng, said):
    """Everything at once, in both."""
    children, killed, patience = [], set(), rng.choice([(0, 0.02), (0, 0.1), (0.05, 0.3)])
    for words in rng.choices(OPERATIONS, k=18):
      name = rng.choice(NAMES)
      children.append((name, self.all[name].start(self.qvm, *words)))
      time.sleep(rng.uniform(*patience))
      if rng.random() < 0.15:
        killed.add(self.kill(rng, children))
    for name, child in children:
      result = child.wait()
      said.append(f"{name}: {' '.join(result.words)}: {result.code}\n{result.stderr}")
      self.counts[f"{result.words[0]}: {'0' if result.code == 0 else 'an honest error'}"] += 1
      if child in killed and result.code == -signal.SIGKILL:
        self.counts["qvm killed"] += 1
        continue
      check_words(result, (0, 1, 125, 137, 143))
      errors = [line[len("qvm: ") :] for line in result.stderr.splitlines()[-2:]]
      honest = any(re.fullmatch(text, line) for text in HONEST for line in errors)
      demand(result.code == 0 or honest, "not an honest error:", *result)

  def kill(self, rng, children):
    """kill -9 of a qvm or of a QEMU; returns the child that was killed, if any."""
    machines = qemus(self.qvm)
    if machines and rng.random() < 0.4:
      with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(machines), signal.SIGKILL)
      self.counts["QEMU killed"] += 1
      return None
    child = rng.choice(children)[1]
    child.kill()
    return child

  def rows(self, name):
    """What `list` shows in a container, by name."""
    listed = self.all[name].run(self.qvm, "list", "--json")
    check_words(listed, (0,))
    return {row["name"]: row for row in json.loads(listed.stdout)}

  def end(self, machine, said):
    """End a machine in the one container in which that can be done."""
    codes = []
    for name in NAMES:
      result = self.all[name].run(self.qvm, "stop", "--force", machine)
      check_words(result)
      codes.append(result.code)
      said.append(f"{name}: {' '.join(result.words)}: {result.code}\n{result.stderr}")
    demand(0 in codes, f"{machine} cannot be stopped")

  def checks(self, said):
    """What must be true when nothing goes on any more; then nothing is left running."""
    for machine, row in self.rows(NAMES[0]).items():
      if row["state"] == "running":
        self.end(machine, said)
    for each in self.all.values():
      each.settled()
    until = time.monotonic() + 60
    while ours(self.qvm):
      demand(time.monotonic() < until, "processes are left", ours(self.qvm))
      time.sleep(0.01)
    wrong = self.qvm.home / "wrong"
    demand(not wrong.exists(), wrong.exists() and wrong.read_text())
    check_published(self.qvm, self.versions)
    for name in NAMES:
      check_words(self.all[name].run(self.qvm, *RUN), (0,))
    check_complete(self.qvm, self.versions)
    check_locks(self.qvm)
    names = set(self.rows(NAMES[1]))
    demand(names <= {"a", "b", "d"}, f"instances are left: {names}")
    if names:
      check_words(self.all[NAMES[1]].run(self.qvm, "rm", *sorted(names)), (0,))

  def seen(self, rng, said):
    """A machine that runs in one container: the other one sees it, and can do it no harm."""
    mine, other = rng.sample(NAMES, 2)
    started = self.all[mine].run(self.qvm, *DETACHED, "held", *GUEST)
    said.append(f"{mine}: {' '.join(started.words)}: {started.code}\n{started.stderr}")
    check_words(started, (0,))
    row = self.rows(other).get("held", {})
    demand((row.get("state"), row.get("ssh")) == ("running", ""), f"{other} sees {row}")
    row = self.rows(mine)["held"]
    demand(row["state"] == "running" and row["ssh"], f"{mine} sees {row}")
    refused = r"the instance held is already running \(.*\)(; nothing was \w+)?"
    attempts = [
      (("stop", "held"), ELSEWHERE),
      (("stop", "--force", "held"), ELSEWHERE),
      (("rm", "held"), refused),
      (("rm", "--force", "held"), ELSEWHERE),
      (("restart", "held"), ELSEWHERE),
      (("ssh", "--boot-timeout", "1", "held", "--", "true"), ELSEWHERE),
      (("run", "--name", "held", *GUEST), refused),
      (("clone", "held", "b"), refused),
    ]
    for words, text in rng.sample(attempts, len(attempts)):
      result = self.all[other].run(self.qvm, *words)
      said.append(f"{other}: {' '.join(words)}: {result.code}\n{result.stderr}")
      check_words(result, (1, 125))
      lines = [line[len("qvm: ") :] for line in result.stderr.splitlines()]
      demand(any(re.fullmatch(text, line) for line in lines), "it does not say so", *lines)
    before = set(self.qvm.files())
    for words in (("clean",), ("clean", "--all"), ("list",)):
      check_words(self.all[other].run(self.qvm, *words), (0,))
    gone = {name for name in before - set(self.qvm.files()) if not name.startswith("downloads/")}
    demand(not gone, f"clean deletes what the other container uses: {gone}")
    demand(len(ours(self.qvm)) > 0, "the machine has ended")
    for words in (("stop", "--force", "held"), ("rm", "held")):
      check_words(self.all[mine].run(self.qvm, *words), (0,))
    self.counts["machines that the other container left alone"] += 1


def containers(folder, forks, seed, numbers):
  """Rounds of two containers in one cache; returns what was counted."""
  if problem():
    print(f"  left out, as there can be no containers here: {problem()}")
    return Counter()
  with contextlib.closing(Containers(folder, forks, seed)) as part:
    return played(part, seed, numbers, "rounds")
