"""kill -9 while a machine is prepared: no half layer is ever used, and the next run works."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from support import IMAGE, QEMU, TOOLS, end_processes, free_port
from support_torture import (
  GUEST,
  PATIENCE,
  PUBLISHED,
  RECORDS,
  Asset,
  Violation,
  check_locks,
  check_words,
  demand,
  everything,
  guest_home,
  kind_of,
  make_qemu,
  make_tools,
  ours,
  played,
  qemus,
)

# Two scripts, which write to the machine's disk at places of their own, each in two steps.
SCRIPT = """\
echo {name} "$HOME" >>{log}
record=$HOME/../../record
until [ -s "$record" ]; do sleep 0.02; done
disk=$(sed -n 's/.*if=none,file=\\([^"]*\\),id=drive0.*/\\1/p' "$record")
qemu-io -f qcow2 -c 'write -P {number}1 {number}00k 64k' "$disk" >/dev/null
sleep 0.1
qemu-io -f qcow2 -c 'write -P {number}2 {number}000k 64k' "$disk" >/dev/null
"""
LAYER = r"layers/(freebsd-15\.1-x86-64-prepared-[0-9a-f]{10})\.(qcow2|json)"
CALLS = "rename,unlink,unlinkat,mkdir,chmod,ftruncate,flock,fsync,write,clone,clone3,vfork"
OF_SSH = r"Connection to \S+ closed by remote host\.\r?\n"  # it comes with the script's output
VICTIMS = ("qvm", "qvm", "QEMU", "all")


class Preparing:
  """A cache with an image of 4 MB, whose QEMU is a stand-in with a real sshd, and two scripts."""

  def __init__(self, folder, forks, seed):
    self.folder, self.forks, self.counts = Path(folder), forks, Counter()
    rng = random.Random(f"{seed}:preparing")
    (self.folder / "raw").write_bytes(rng.randbytes(1 << 20) + bytes(3 << 20))
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "image"]
    subprocess.run(command, cwd=folder, check=True)
    content = (self.folder / "image").read_bytes()
    assets = {QEMU: make_qemu(rng), TOOLS: make_tools(rng)}
    assets[IMAGE] = Asset(content, {f"base/{IMAGE}": content})
    self.qvm = guest_home(folder, forks, assets)
    self.log, self.scripts = self.folder / "ran", []
    for number, name in enumerate(("one", "two"), 1):
      path = self.folder / name
      path.write_text(SCRIPT.format(name=name, number=number, log=self.log))
      self.scripts.append(str(path))
    began = time.monotonic()
    child = self.start("run", 1)
    check_words(child.wait(), (0,))
    self.seconds = time.monotonic() - began
    demand(self.ran(child) == ["one"] and len(self.layers()) == 1, "there is no layer")
    self.tidy()
    self.calls = self.traced()

  def start(self, command, count, before=()):
    """Start a qvm that wants a guest on which the first `count` scripts have run."""
    guest = tempfile.mkdtemp(dir=self.folder, prefix="guest")
    env = {"SSH_GUEST": json.dumps({"folder": guest, "record": f"{guest}/record"})}
    words = [word for path in self.scripts[:count] for word in ("--prepare", path)]
    if command == "run":
      words = ["--rm", "--ssh-port", str(free_port()), *words, *GUEST, "--", "true"]
    else:
      words += GUEST
    child = self.forks.start(self.qvm, command, *words, env=env, before=before)
    child.guest = guest
    return child

  def traced(self):
    """The calls of qvm itself that change something: {name: how many}; {} without strace."""
    if not shutil.which("strace"):
      return {}
    log = self.folder / "strace"
    before = (shutil.which("strace"), "-o", str(log), "-e", f"trace={CALLS}")
    code = self.start("run", 1, before).wait().code
    self.tidy()
    found = Counter(re.findall(r"^([a-z0-9]+)\(", log.read_text(), re.MULTILINE))
    return {} if code else dict(found)

  def ran(self, child):
    """The scripts that have run in the machine of a qvm."""
    lines = self.log.read_text().splitlines() if self.log.exists() else []
    return [line.split()[0] for line in lines if line.endswith(f" {child.guest}/home/runner")]

  def layers(self):
    """The layers with a record, each of which must be whole."""
    names = [re.fullmatch(LAYER, name) for name in self.qvm.files()]
    every = {match.group(1) for match in names if match}
    found = []
    for name in sorted(every):
      disk, note = (self.qvm.cache / "layers" / (name + end) for end in (".qcow2", ".json"))
      if not note.exists():
        self.counts["layers without a record"] += 1
        continue
      demand(disk.exists(), f"{name} has a record, and no disk")
      record = json.loads(note.read_text())
      demand(record["bytes"] == disk.stat().st_size, f"{name} has another size than its record")
      demand(disk.stat().st_mode & 0o777 == 0o400, f"{name} can be written")
      self.check_disk(disk)
      found.append(name)
    return found

  def check_disk(self, disk):
    """The scripts below a layer have written all that they write."""
    check = subprocess.run(["qemu-img", "check", str(disk)], stdout=subprocess.PIPE)
    demand(check.returncode == 0, f"{disk} is damaged", check.stdout)
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 11 100k 64k"]
    command += ["-c", "read -P 12 1000k 64k"]
    chain = subprocess.check_output(["qemu-img", "info", "--backing-chain", str(disk)])
    if chain.count(b"-prepared-") > 2:  # of two layers, one with its backing's name
      command += ["-c", "read -P 21 200k 64k", "-c", "read -P 22 2000k 64k"]
    read = subprocess.run([*command, str(disk)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    bad = read.returncode or b"failed" in read.stdout
    demand(not bad, f"{disk} is half a layer", read.stdout)

  def settle(self):
    """End the machines that a killed qvm has left, and all else."""
    listed = self.forks.run(self.qvm, "list", "--json")
    check_words(listed, (0,))
    for row in json.loads(listed.stdout):
      if row["state"] != "prepared":
        demand(row["state"] == "running", f"an overlay is left: {row}")
        self.end(row["name"])
    self.forks.settled()
    until = time.monotonic() + PATIENCE
    while ours(self.qvm):
      demand(time.monotonic() < until, "processes are left", ours(self.qvm))
      time.sleep(0.01)
    check_words(self.forks.run(self.qvm, "list"), (0,))
    check_locks(self.qvm)
    for guest in self.folder.glob("guest*"):
      shutil.rmtree(guest, ignore_errors=True)
    for path in (self.qvm.home / "tmp").iterdir():  # the log of a killed qvm's ssh
      path.unlink()
    left = [name for name in self.qvm.files() if re.match(r"instances/.*(?<!\.lock)$", name)]
    demand(not left, f"left: {left}")

  def end(self, name):
    """End a machine with `stop`; one whose QEMU a qvm had not noted yet when it died, by hand."""
    result = self.forks.run(self.qvm, "stop", "--force", name)
    check_words(result)
    if result.code:
      demand("cannot be stopped (qvm process" in result.stderr, result)
      for pid, words in ours(self.qvm).items():
        if f"/{name}.qcow2" in words:
          os.kill(pid, signal.SIGKILL)
    self.counts["machines that " + ("stop cannot end" if result.code else "stop has ended")] += 1

  def tidy(self):
    """`clean` takes away what is left over, and `rm` the layers."""
    self.settle()
    names, kept = self.layers(), rf"{PUBLISHED}|{RECORDS}|{LAYER}"
    for name in everything(self.qvm):
      if not re.fullmatch(kept, name):
        self.counts[f"left for clean: {kind_of(name)}"] += 1
    check_words(self.forks.run(self.qvm, "clean"), (0,))
    demand(self.layers() == names, "clean has taken a layer")
    if names:
      check_words(self.forks.run(self.qvm, "rm", *names), (0,))
    left = [
      name for name in everything(self.qvm) if not re.fullmatch(f"{PUBLISHED}|{RECORDS}", name)
    ]
    demand(not left, f"left: {left}")
    folders = os.listdir(self.qvm.cache / "downloads")
    demand(not folders, f"left in downloads: {folders}")

  def one(self, seed):
    """Kill at one point, and check that the next run makes all of it good."""
    rng, said = random.Random(seed), [f"seed {seed}"]
    count = rng.choice((1, 1, 2))
    try:
      if count == 2 and rng.random() < 0.7:
        first = self.start("pull", 1)
        check_words(first.wait(), (0,))
        demand(self.ran(first) == ["one"], "the first layer is not made")
      before = self.layers()
      self.strike(rng, count, said)
      self.afterwards(rng, count, before, said)
      self.tidy()
    except Violation as violation:
      raise Violation("\n".join([*said, str(violation)]))

  def strike(self, rng, count, said):
    """Start one that prepares, or two, and kill one of what runs, or all."""
    commands = rng.choice((["run"], ["pull"], ["run", "run"], ["run", "pull"]))
    victim = rng.choice(VICTIMS)
    said.append(f"{commands}, {count} scripts, kill {victim}")
    if len(commands) == 1 and self.calls and rng.random() < 0.4:
      call = rng.choice(sorted(self.calls))
      when = rng.randint(1, self.calls[call])
      said.append(f"at the {call} number {when} of qvm")
      inject = f"inject={call}:signal=SIGKILL:when={when}"
      before = (shutil.which("strace"), "-o", os.devnull, "-e", f"trace={CALLS}", "-e", inject)
      code = self.start(commands[0], count, before).wait().code
      self.counts["call: killed" if code == -signal.SIGKILL else "call: not reached"] += 1
      return
    children = [self.start(command, count) for command in commands]
    delay = rng.uniform(0, 1.1) * self.seconds * count
    said.append(f"after {delay:.4f} s")
    time.sleep(delay)
    machines = qemus(self.qvm)
    if victim == "QEMU":
      machines = rng.sample(machines, min(1, len(machines)))
    else:
      for child in children if victim == "all" else [rng.choice(children)]:
        child.kill()
    for pid in machines if victim != "qvm" else ():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    results = [child.wait() for child in children]
    said += [f"{' '.join(result.words[:2])}: {result.code}\n{result.stderr}" for result in results]
    killed = [result for result in results if result.code == -signal.SIGKILL]
    rest = [result for result in results if result not in killed]
    for result in rest:
      stderr = re.sub(OF_SSH, "", result.stderr)
      check_words(result._replace(stderr=stderr), (0, 125) if victim == "QEMU" else (0,))
    failed = [result for result in rest if result.code]
    demand(len(failed) <= 1, "the kill of one QEMU has let both fail")
    ran = Counter(name for child in children for name in self.ran(child))
    times = max(ran.values(), default=0)
    demand(times <= 1 + len(killed + failed), f"each has made the layer: {ran}")
    struck = killed or failed
    self.counts[f"{victim} of {len(commands)}: {'killed' if struck else 'had ended'}"] += 1

  def afterwards(self, rng, count, before, said):
    """What must be true after a kill."""
    if rng.random() < 0.5:
      self.settle()
    else:
      said.append("the next one comes while a machine may still run")
    there = self.layers()
    demand(set(before) <= set(there), "a layer is lost", before, there)
    for attempt in range(2):
      child = self.start(rng.choice(("run", "pull")), count)
      result = child.wait()
      said.append(f"{' '.join(result.words[:2])}: {result.code}\n{result.stderr}")
      check_words(result, (0,))
      again = self.ran(child)
      demand(len(set(again)) == len(again), f"more than once: {again}")
      demand(not (again and attempt), f"a layer is there, and yet they run: {again}")
      demand(not ("one" in again and before), "the first layer is not taken")
      self.counts["runs that went on from a layer"] += not again
    self.settle()
    demand(set(there) <= set(self.layers()), "a layer is lost")

  def close(self):
    """End what a violation has left."""
    end_processes(f"HOME={self.qvm.home}", environment=True)


def preparing(folder, forks, seed, numbers):
  """Kill at many points while a machine is prepared; returns what was counted."""
  with contextlib.closing(Preparing(folder, forks, seed)) as part:
    counts = played(part, seed, numbers, "points")
    print(f"  a run: {part.seconds:.3f} s, {sum(part.calls.values())} calls that change something")
  return counts
