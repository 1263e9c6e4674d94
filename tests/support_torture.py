"""What the parts of `make torture` share: processes, what there is to download, and the checks."""

import contextlib
import fcntl
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from guests import boot_sector, to_qcow2
from release_server import ReleaseServer
from support import (
  FREEBSD,
  IMAGE,
  QEMU,
  ROOT,
  TOOLS,
  Qvm,
  bad_words,
  parent_of,
  processes_of,
  tar_of,
)
from support_machines import ssh_guest_as_qemu

BUNDLE = FREEBSD + ".tar.zst"
REPOS = {
  BUNDLE: ("freebsd-builder", "v0.16.0"),
  IMAGE: ("freebsd-builder", "v0.16.0"),
  QEMU: ("resources", "v2.0.0"),
  TOOLS: ("resources", "v2.0.0"),
}
GUEST = ("--platform", "x86-64", "freebsd", "15.1")
PULL, RUN, REFRESH = ("pull", *GUEST), ("run", "--rm", *GUEST), ("pull", "--refresh", *GUEST)
PATIENCE = 60  # seconds after which a qvm hangs


class Violation(Exception):
  """qvm did what it must never do."""


@contextlib.contextmanager
def violations(what):
  """Makes a Violation of an assertion of the tests' own helpers."""
  try:
    yield
  except AssertionError as error:
    raise Violation(f"{what}: {error}")


def demand(condition, *facts):
  """The harness's assert, which -O does not remove."""
  if not condition:
    raise Violation("\n".join(map(str, facts)))


# --- Processes -------------------------------------------------------------------------------

# It reads orders, one JSON object a line: {"words"} or {"exec"} starts a child, {"poll": PID}
# tells how it ended, {"peak": PID} the most kilobytes of memory that it had, and {"kill": PID,
# "number"} sends a signal and tells whether there was anybody. Numbers of processes are those of
# where it runs itself. Orphans become its children, so that none is left as a zombie.
FORKER = """
import ctypes, json, os, signal, sys, traceback
sys.path.insert(0, sys.argv[1])
import email.utils, hashlib, http.client, lzma, queue, random, shutil, ssl, subprocess, tarfile
import urllib.request
import qvm
if sys.platform == "linux":
  ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

def child(order):
  os.setsid()
  os.environ.clear()
  os.environ.update(order["env"])
  for fd, path in enumerate((os.devnull, order["out"] + ".out", order["out"] + ".err")):
    new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(new, fd)
    os.close(new)
  if "exec" in order:
    os.execv(order["exec"][0], order["exec"])
  return qvm.main(order["words"])

ended, peaks = {}, {}
stdin, stdout = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
for line in stdin:
  order = json.loads(line)
  if "poll" in order:
    try:
      while True:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if not pid:
          break
        peaks[pid] = used.ru_maxrss
        ended[pid] = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    except ChildProcessError:
      pass
    answer = ended.get(order["poll"])
  elif "peak" in order:
    answer = peaks[order["peak"]]
  elif "kill" in order:
    try:
      os.kill(order["kill"], order["number"])
      answer = True
    except ProcessLookupError:
      answer = False
  else:
    answer = os.fork()
    if not answer:
      code = 99
      try:
        code = child(order)
        sys.stdout.flush()
      except BaseException:
        os.write(2, traceback.format_exc().encode())
      os._exit(code)
    ended.pop(answer, None)  # of an earlier process with this number
  stdout.write(json.dumps(answer) + "\\n")
  stdout.flush()
"""


def processes():
  """What runs, for people."""
  command = ["ps", "-eo", "pid,ppid,pgid,stat,wchan:20,args"]
  return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


class Result(NamedTuple):
  """How a qvm ended, and what it wrote."""

  words: tuple
  code: int
  stdout: str
  stderr: str


class Child:
  """A qvm that runs in a session of its own."""

  def __init__(self, forks, pid, words, out):
    self.forks, self.pid, self.words, self.out, self.code = forks, pid, words, out, None

  def poll(self):
    """The exit code, or None while it runs."""
    if self.code is None:
      self.code = self.forks.ask(poll=self.pid)
    return self.code

  def wait(self):
    """The result; a qvm that does not end is a violation."""
    until = time.monotonic() + PATIENCE
    while self.poll() is None:
      if time.monotonic() > until:
        self.kill()
        raise Violation(f"{self.words} hangs\n{Path(self.out + '.err').read_text()}")
      time.sleep(0.002)
    texts = [os.fsdecode(Path(self.out + end).read_bytes()) for end in (".out", ".err")]
    for end in (".out", ".err"):
      os.unlink(self.out + end)
    return Result(self.words, self.code, *texts)

  def kill(self):
    """kill -9 of qvm alone."""
    if self.poll() is None:
      self.forks.ask(kill=self.pid, number=signal.SIGKILL)

  def peak(self):
    """The most bytes of memory that it had, once it has ended."""
    return self.forks.ask(peak=self.pid) << 10

  def alone(self):
    """Whether none of the processes that it started is left."""
    self.forks.ask(poll=self.pid)
    return not self.forks.ask(kill=-self.pid, number=0)


class Forks:
  """Starts qvm as children of one process that has imported it.

  before: words of a program that starts that process, such as unshare.
  """

  def __init__(self, folder, root=ROOT, before=()):
    self.folder, self.numbers, self.children = Path(folder), itertools.count(), []
    self.program = Path(root) / "qvm.py"
    self.process = subprocess.Popen(
      [*before, sys.executable, "-c", FORKER, str(root)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, **order):
    """Give an order and return the answer."""
    self.process.stdin.write(json.dumps(order) + "\n")
    self.process.stdin.flush()
    return json.loads(self.process.stdout.readline())

  def start(self, qvm, *words, fresh=False, before=(), env=None):
    """Start qvm; before = words of a program, such as strace, that starts it."""
    out = str(self.folder / f"out{next(self.numbers)}")
    order = {"env": {**qvm.env, **(env or {})}, "out": out, "words": words}
    for end in (".out", ".err"):  # they are wanted of one that is killed at once, too
      Path(out + end).touch()
    if fresh or before:
      order["exec"] = [*before, *qvm.command(*words)]
    self.children.append(Child(self, self.ask(**order), words, out))
    return self.children[-1]

  def run(self, qvm, *words, **more):
    """Run qvm to its end."""
    return self.start(qvm, *words, **more).wait()

  def settled(self):
    """Wait until nothing that was started is left."""
    until = time.monotonic() + PATIENCE
    while self.children:
      self.children = [child for child in self.children if not child.alone()]
      left = [(child.pid, child.words) for child in self.children]
      demand(time.monotonic() < until, "processes are left", left, processes())
      if self.children:
        time.sleep(0.002)

  def close(self):
    """End what is still there."""
    for child in self.children:
      if not child.alone():
        self.ask(kill=-child.pid, number=signal.SIGKILL)
    self.process.stdin.close()
    self.process.wait()
    self.process.stdout.close()


def children_of(pid, name):
  """The processes of that name that a process has started."""
  for path in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      number, _, rest = path.read_text().partition(" (")
      found, _, rest = rest.rpartition(") ")
      if found == name and int(rest.split()[1]) == pid:
        yield int(number)


def ours(qvm):
  """The processes whose home is that of qvm: {pid: command line}."""
  return processes_of(f"HOME={qvm.home}", environment=True)


def qemus(qvm):
  """The numbers of the QEMUs among them; a program that one has started may have the same words."""
  found = [pid for pid, words in ours(qvm).items() if "bin/qemu-system" in words]
  return [pid for pid in found if parent_of(pid) not in (None, *found)]


# --- What there is to download ---------------------------------------------------------------


class Asset(NamedTuple):
  """The bytes of an asset, and the files that they become in the cache."""

  content: bytes
  files: dict


@functools.lru_cache(maxsize=None)
def small_image():
  """The smallest sound qcow2."""
  with tempfile.TemporaryDirectory() as folder:
    to_qcow2(boot_sector("hello")[:512], Path(folder) / "image")
    subprocess.run(
      ["qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=512", "image", "small"],
      cwd=folder,
      check=True,
    )
    return (Path(folder) / "small").read_bytes()


def make_image(rng):
  """A sound image of which no two parts are the same."""
  content = small_image() + rng.randbytes(rng.randrange(10_000, 150_000))
  return Asset(content, {f"base/{IMAGE}": content})


def make_qemu(rng, pause="0"):
  """The archive of a QEMU that ends of its own accord."""
  program = b"#!/bin/sh\n# %x\nexec sleep %s\n" % (rng.getrandbits(64), pause.encode())
  files = {"bin/qemu": program, "share/qemu/uefi.fd": rng.randbytes(rng.randrange(10_000, 90_000))}
  named = {**files, "bin/qemu-system-x86_64": program}
  del named["bin/qemu"]
  return Asset(tar_of(files), {f"qemu/x86_64/{name}": data for name, data in named.items()})


def make_tools(rng):
  """The archive of a qemu-img, which is that of this host."""
  program = b'#!/bin/sh\n# %x\nexec qemu-img "$@"\n' % rng.getrandbits(64)
  files = {"qemu-img": program, "other": rng.randbytes(rng.randrange(10_000, 90_000))}
  return Asset(tar_of(files), {"bin/qemu-img": program})


@functools.lru_cache(maxsize=None)
def bundle_of(number):
  """One of some bundles, and what qemu-img makes of its disk."""
  rng = random.Random(number)
  with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "disk.img").write_bytes(rng.randbytes(1 << 16) + bytes(1 << 20))
    for command in (
      "qemu-img convert -f raw -O qcow2 disk.img disk.qcow2",
      "tar --sparse -cf bundle.tar disk.img",
      "zstd -q --check bundle.tar",
    ):
      subprocess.run(command.split(), cwd=folder, check=True)
    content, image = (Path(folder, name).read_bytes() for name in ("bundle.tar.zst", "disk.qcow2"))
  return Asset(content, {f"base/{IMAGE}": image})


def make_bundle(rng):
  """An image that has to be unpacked and converted; there are but a few, for they take long."""
  return bundle_of(rng.randrange(8))


MAKERS = {IMAGE: make_image, QEMU: make_qemu, TOOLS: make_tools}
BUNDLED = {BUNDLE: make_bundle, QEMU: make_qemu, TOOLS: make_tools}


def publish(server, assets, tag="", **more):
  """Put {name: Asset} on the server, under the usual tags if not told another."""
  for repo, usual in sorted(set(REPOS.values())):
    names = [name for name in assets if REPOS[name] == (repo, usual)]
    contents = {name: assets[name].content for name in names}
    server.add_release(repo, tag or usual, contents, **more)


def guest_home(folder, forks, assets):
  """qvm in a home of its own with all assets {name: Asset} in its cache, but another QEMU: the
  stand-in with a real sshd."""
  with ReleaseServer() as server:
    publish(server, assets)
    qvm = Qvm(Path(folder) / "home", forks.program, server)
    (qvm.home / "tmp").mkdir(parents=True)
    qvm.env["TMPDIR"] = str(qvm.home / "tmp")  # where a killed qvm leaves the log of its ssh
    check_words(forks.run(qvm, *PULL), (0,))
  ssh_guest_as_qemu(qvm.cache)
  return qvm


# --- What a cache must be like ---------------------------------------------------------------

PUBLISHED = r"base/[^/]*\.qcow2|bin/qemu-img|qemu/(x86_64|aarch64)/(?!release\.json).*"
RECORDS = r"base/[^/]*\.json|bin/qemu-img\.json|qemu/(x86_64|aarch64)/release\.json"
RESUMABLE = r"downloads/[^/]*/(part|note\.json|map)"


def published(qvm):
  """The files that whoever looks takes for whole, by name."""
  names = [name for name in qvm.files() if re.fullmatch(PUBLISHED, name)]
  return {name: (qvm.cache / name).read_bytes() for name in names}


def everything(qvm):
  """All files, those of QEMU's trees only below the trees' names."""
  found = [name for name in qvm.files() if not re.match(r"qemu/\.", name)]
  folder = qvm.cache / "qemu"
  links = [path.resolve() for path in folder.iterdir() if path.is_symlink()] if qvm.files() else []
  hidden = [path for path in folder.glob(".*") if path.resolve() not in links]
  return found + [f"qemu/{path.name}" for path in hidden]


def check_published(qvm, versions, loose=()):
  """Each published file is one of its asset's versions, and a QEMU is there as a whole."""
  there = published(qvm)
  for name, asset_versions in versions.items():
    if name in loose:
      continue
    known = [asset.files for asset in asset_versions]
    mine = {path: data for path, data in there.items() if path.startswith(root_of(known[0]))}
    demand(not mine or mine in known, f"wrong bytes: {sorted(mine)}")
  unknown = [path for path in there if not any(path.startswith(root) for root in ROOTS)]
  demand(not unknown, f"unknown files: {unknown}")


ROOTS = ("base/" + IMAGE, "bin/qemu-img", "qemu/x86_64/")


def root_of(files):
  """Which of the roots the files of an asset lie in."""
  return next(root for root in ROOTS if next(iter(files)).startswith(root))


def check_complete(qvm, versions, loose=()):
  """Everything is there, and is right."""
  check_published(qvm, versions, loose)
  there = published(qvm)
  for name, asset_versions in versions.items():
    missing = set(asset_versions[0].files) - set(there)
    demand(name in loose or not missing, f"missing: {missing}")


def check_locks(qvm):
  """No lock is held; returns the names of the lock files."""
  names = [name for name in qvm.files() if name.endswith(".lock")]
  folders = [str(path.relative_to(qvm.cache)) for path in qvm.cache.glob("downloads/*")]
  for name in names + folders:
    with contextlib.suppress(FileNotFoundError):
      fd = os.open(qvm.cache / name, os.O_RDONLY)
      try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise Violation(f"{name} is still locked")
      finally:
        os.close(fd)
  return names


def check_words(result, codes=(0, 1)):
  """It ended as a user should see it: nothing but lines of its own, no bug, no secret."""
  facts = (f"exit code {result.code}", result.stdout, result.stderr)
  demand(result.code in codes, *facts)
  bad = bad_words(result.stderr)
  demand(not bad, f"'{bad}' is said", *facts)
  demand(result.code == 0 or result.stderr, "it fails without a word", *facts)


def check_tidy(qvm, counts, forks):
  """A run and `clean` leave nothing but what was downloaded, its records and instances."""
  kept = rf"{PUBLISHED}|{RECORDS}|instances/a\.(qcow2|json)"
  for name in everything(qvm):
    if not re.fullmatch(kept, name):
      counts[f"left for clean: {kind_of(name)}"] += 1
  result = forks.run(qvm, "clean")
  check_words(result, (0,))
  left = [name for name in everything(qvm) if not re.fullmatch(kept, name)]
  demand(not left, f"clean leaves {left}", result.stdout)


def kind_of(name):
  """A file's name without what is random in it."""
  return re.sub(r"[0-9a-f]{6,}", "*", name)


# --- Namespaces ------------------------------------------------------------------------------


def why_not(command):
  """Why a command that makes namespaces does not work here; empty if it does."""
  if not shutil.which(command[0]):
    return f"there is no {command[0]}"
  result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return (result.stdout.strip() or f"{command[0]} fails") if result.returncode else ""


# --- Playing ------------------------------------------------------------------------------------


def played(part, seed, numbers, what):
  """Play the rounds of a part; returns what was counted."""
  for number in numbers:
    part.one(f"{seed}:{number}")
    part.counts[what] += 1
    progress(number)
  return part.counts


def progress(number):
  """A sign of life on a terminal."""
  if sys.stderr.isatty():
    sys.stderr.write(f"\r{number + 1} ")
