"""Power cuts: what is on the disk after one, as far as it was flushed.

As a program it is qvm, `power_cut.py WORDS...`, which notes in $POWER_CUT/journal each change of a
name below $POWER_CUT_CACHE and each flush, keeps what a replay needs, and stops all at the line
$POWER_CUT_AT. As a module it makes of the cache what a disk may show afterwards: names as after a
random prefix of what was not flushed (a file system's journal keeps their order), contents as they
were flushed, with a random part of what came after that.
"""

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

BLOCK = 4096


# --- In qvm's processes ----------------------------------------------------------------------


class Journal:
  """What was done to names and flushed, by all processes, in its order."""

  def __init__(self, folder, cache, last):
    self.folder, self.cache, self.last = folder, cache + "/", last

  def mine(self, *paths):
    return all(isinstance(p, (str, bytes)) and os.fsdecode(p).startswith(self.cache) for p in paths)

  def note(self, operation, *facts):
    """Append a line, or stop at the last one; the caller then does what it has noted."""
    with open(self.folder + "/journal", "a+b") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      file.seek(0)
      if file.read().count(b"\n") >= self.last:
        open(self.folder + "/cut", "w").close()
        fcntl.flock(file, fcntl.LOCK_UN)
        while True:
          signal.pause()
      file.write(json.dumps([operation, *facts]).encode() + b"\n")
      file.flush()

  def stash(self, path):
    """Keep a file that is about to lose its name; returns where, or None."""
    place = f"{self.folder}/stash/{os.urandom(8).hex()}"
    try:
      if os.path.islink(path):
        os.symlink(os.readlink(path), place)
      else:
        os.link(path, place)
    except OSError:
      return None
    return place

  def keep_flushed(self, fd):
    """Keep what a file had when it was flushed."""
    path, info = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
    if not self.mine(path):
      return
    if stat.S_ISDIR(info.st_mode):
      self.note("folder", path)
      return
    self.note("file", info.st_ino)
    place = f"{self.folder}/flushed/{info.st_ino}"
    with open(f"/proc/self/fd/{fd}", "rb") as source, open(place + ".new", "wb") as target:
      shutil.copyfileobj(source, target)
    os.replace(place + ".new", place)


def install(journal):
  """Have os tell the journal."""
  real = {name: getattr(os, name) for name in
          ("replace", "rename", "unlink", "mkdir", "symlink", "fsync", "open")}  # fmt: skip

  def renamed(call):
    def replacement(source, target, **more):
      if journal.mine(source, target) and not more:
        journal.note("rename", source, target, journal.stash(target))
      return call(source, target, **more)

    return replacement

  def unlink(path, **more):
    if journal.mine(path) and not more and os.path.lexists(path):
      journal.note("unlink", path, journal.stash(path))
    return real["unlink"](path, **more)

  def mkdir(path, *args, **more):
    if journal.mine(path) and not more and not os.path.lexists(path):
      journal.note("create", path)
    return real["mkdir"](path, *args, **more)

  def symlink(target, path, **more):
    if journal.mine(path) and not os.path.lexists(path):
      journal.note("create", path)
    return real["symlink"](target, path, **more)

  def opened(path, flags, *args, **more):
    if flags & os.O_CREAT and journal.mine(path) and not os.path.lexists(path):
      journal.note("create", path)
    return real["open"](path, flags, *args, **more)

  def fsync(fd):
    journal.keep_flushed(fd)
    return real["fsync"](fd)

  def audit(event, args):  # what open() creates
    creates = event == "open" and isinstance(args[0], str) and args[1] and args[2] & os.O_CREAT
    if creates and journal.mine(args[0]) and not os.path.lexists(args[0]):
      journal.note("create", args[0])

  os.replace, os.rename = renamed(real["replace"]), renamed(real["rename"])
  os.unlink = os.remove = unlink
  os.mkdir, os.symlink, os.open, os.fsync = mkdir, symlink, opened, fsync
  os.supports_dir_fd.add(opened)
  sys.addaudithook(audit)


def main():
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
  import qvm

  qvm.__file__ = os.path.abspath(__file__)  # what it starts to serve an image
  qvm.boot_id = lambda: os.environ["POWER_CUT_BOOT"]
  folder = os.environ.get("POWER_CUT")
  if folder:
    install(Journal(folder, os.environ["POWER_CUT_CACHE"], int(os.environ["POWER_CUT_AT"])))
  qvm.main()


# --- After the cut ---------------------------------------------------------------------------


def lines_of(folder):
  """The journal's lines."""
  path = Path(folder) / "journal"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def undo(line):
  """Take back one change of a name."""
  operation, *facts = line
  if operation == "create":
    path = facts[0]
    if os.path.isdir(path) and not os.path.islink(path):
      shutil.rmtree(path)
    elif os.path.lexists(path):
      os.unlink(path)
  elif operation == "unlink" and facts[1] and os.path.isdir(os.path.dirname(facts[0])):
    os.replace(facts[1], facts[0])
  elif operation == "rename":
    source, target, stashed = facts
    if os.path.lexists(target) and os.path.isdir(os.path.dirname(source)):
      os.rename(target, source)
    if stashed and os.path.lexists(stashed):
      os.rename(stashed, target)


def lose_names(folder, rng):
  """Undo a random number of the last changes of names that no flush of their folder has kept.

  One that was flushed keeps all before it, as in a journal. rmtree() is never undone.
  """
  lines = lines_of(folder)
  kept = 0
  for number, (operation, *facts) in enumerate(lines):
    if operation == "folder":
      named = [
        n
        for n, line in enumerate(lines[:number])
        if line[0] in ("create", "unlink", "rename")
        and os.path.dirname(line[2] if line[0] == "rename" else line[1]) == facts[0]
      ]
      kept = max([kept, *(n + 1 for n in named)])
  keep = rng.randint(kept, len(lines))
  for line in reversed(lines[keep:]):
    undo(line)
  return len(lines) - keep


def lose_contents(folder, cache, rng):
  """Let files have what was flushed of them, and of what came later a random part."""
  lost = 0
  for path in sorted(Path(cache).rglob("*")):
    if path.is_symlink() or not path.is_file():
      continue
    now, kept = path.read_bytes(), Path(folder, "flushed", str(path.stat().st_ino))
    before = kept.read_bytes() if kept.exists() else b""
    if before == now:
      continue
    how = rng.choice(["all", "none", "cut", "zeros", "mixed"])
    size = max(len(now), len(before))
    pieces = [
      (now if rng.random() < 0.5 else before)[at : at + BLOCK] for at in range(0, size, BLOCK)
    ]
    after = {
      "all": now,
      "none": before,
      "cut": before or now[: rng.randrange(len(now) + 1)],
      "zeros": before or bytes(len(now)),
      "mixed": b"".join(piece.ljust(BLOCK, b"\0") for piece in pieces)[:size],
    }[how]
    lost += after != now
    mode = path.stat().st_mode
    path.chmod(0o600)
    with open(path, "r+b") as file:  # the same inode
      file.truncate(0)
      file.write(after)
    path.chmod(mode)
  return lost


class Host:
  """Runs qvm on a host whose power can be cut."""

  def __init__(self, qvm, folder):
    self.qvm, self.folder, self.boots = qvm, Path(folder), 0
    self.qvm.program = Path(__file__).resolve()

  def environment(self, last):
    """The variables for a run that ends at a line of the journal."""
    shutil.rmtree(self.folder, ignore_errors=True)
    for name in ("", "stash", "flushed"):
      (self.folder / name).mkdir()
    return {
      "POWER_CUT": str(self.folder),
      "POWER_CUT_CACHE": str(self.qvm.cache),
      "POWER_CUT_AT": str(last),
      "POWER_CUT_BOOT": f"boot{self.boots}",
    }

  def flush_all(self):
    """Take all that there is for flushed, as some time after a run."""
    for path in self.qvm.cache.rglob("*"):
      if path.is_file() and not path.is_symlink():
        shutil.copyfile(path, self.folder / "flushed" / str(path.stat().st_ino))

  def run_until(self, last, *words, env=None, kill=None):
    """Run qvm until line `last` of the journal; returns its result, or None if it was cut."""
    settings = self.environment(last)
    self.flush_all()
    process = self.qvm.start(*words, env={**settings, **(env or {})}, start_new_session=True)
    cut = self.folder / "cut"
    until = time.monotonic() + 60
    while process.poll() is None and not cut.exists():
      if time.monotonic() > until:
        kill()
        raise AssertionError(f"{words} hangs: {process.communicate()}")
      time.sleep(0.01)
    if cut.exists():
      kill()
      process.communicate()
      return None
    return subprocess.CompletedProcess(words, process.returncode, *process.communicate())

  def lose(self, rng):
    """The power fails; returns how many names and contents have been lost."""
    names = lose_names(self.folder, rng)
    contents = lose_contents(self.folder, self.qvm.cache, rng)
    self.boots += 1
    return names, contents

  def run(self, *words, **env):
    """Run qvm on the host as it came up again."""
    return self.qvm(*words, env={"POWER_CUT_BOOT": f"boot{self.boots}", **env})


if __name__ == "__main__":
  main()
