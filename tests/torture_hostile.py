"""A guest that attacks: through what --sync reads, through ssh, and through its console."""

import contextlib
import json
import os
import random
import re
import shutil
import stat
import time
from collections import Counter
from pathlib import Path

import guest_hostile
from support import bad_words, end_processes, free_port, snapshot, tree
from support_torture import (
  GUEST,
  MAKERS,
  PATIENCE,
  Violation,
  check_words,
  demand,
  guest_home,
  played,
  why_not,
)

MOST_MEMORY = 400 << 20  # bytes that a qvm may take
HEAD, TAIL = 1 << 20, 10 << 20  # what the console log keeps of its beginning and end, at least
MOST_LOG = HEAD + 2 * TAIL + (1 << 17)
FILES = {
  "f1": "one\n",
  "f2": "two\n" * 3000,
  "f3": "",
  "d/a": "a\n",
  "d/b": "b\n" * 99,
  "busy": "before\n",
  "kept/a": "kept\n",
  "d/b.kept": "kept\n",
  ".git/config": "[core]\n",
}
KEPT = ("kept/a", "d/b.kept", ".git/config")  # what no guest may touch
LINKS = {"up": "../beside", "link": "f1"}  # and one with an absolute target
CHANGE = "echo more >>f2; rm -f f3; mkdir -p new; echo n >new/n; ln -sf ../f1 new/l; "
WAIT = "touch {0}/reached; until [ -e {0}/go ]; do sleep 0.02; done; "
LIST_LINE = rb"(?m)^(//\S\S* (?:[0-7]+ [0-9]+ (\S+)|- - -) \./%s)\n(?=//)"


class Hostile:
  """A machine whose guest attacks, a folder for it, and what lies beside both."""

  def __init__(self, folder, forks, seed):
    self.folder, self.forks, self.counts = Path(folder), forks, Counter()
    rng = random.Random(f"{seed}:hostile")
    self.qvm = guest_home(folder, forks, {name: make(rng) for name, make in MAKERS.items()})
    self.guest, self.project = self.folder / "guest", self.folder / "project"
    self.beside = self.folder / "beside"
    self.guest.mkdir()
    self.shell = self.guest / "hostile_shell"
    program = Path(guest_hostile.__file__).read_text().partition("\n")[2]
    self.shell.write_text(f"#!{shutil.which('python3')} -IS\n{program}")
    self.shell.chmod(0o755)
    (self.beside / "d").mkdir(parents=True)
    (self.beside / "secret").write_text("secret\n")
    (self.beside / "d" / "x").write_text("x\n")
    check_words(self.start("run", "--name", "other", *GUEST, "--", "true"), (0,))
    self.plan()
    check_words(self.start("run", "-d", "--name", "vm", *GUEST, shell=str(self.shell)), (0,))
    with open(self.guest / "sshd_config", "a") as file:
      file.write(f'Banner "{self.guest}/banner"\n')

  def start(self, *words, where="guest", **play):
    """Run qvm whose next guest behaves like that, with a port of its own, to its end."""
    env = {"SSH_GUEST": json.dumps({"folder": str(self.folder / where), **play})}
    return self.forks.run(self.qvm, words[0], "--ssh-port", str(free_port()), *words[1:], env=env)

  def plan(self, attacks=(), code=None, seed="", late=False):
    """Say what the guest does from now on."""
    protected = [str(each) for each in (self.beside, self.qvm.home, self.project)]
    self.refill() if not self.project.exists() else None
    plan = {"seed": seed, "attacks": attacks, "code": code, "late": late}
    plan.update(host=str(self.beside), protect=protected)
    for name in ("reached", "go", "sent", "session.count"):
      with contextlib.suppress(FileNotFoundError):
        (self.guest / name).unlink()
    (self.guest / "banner").write_bytes(noise(random.Random(f"{seed}:banner")) if attacks else b"")
    (self.guest / "plan.json").write_text(json.dumps(plan))

  def one(self, seed):
    """Play one attack."""
    rng = random.Random(seed)
    said = [f"seed {seed}"]
    try:
      if rng.random() < 0.25:
        self.console(rng, said)
      else:
        self.sync(rng, seed, said)
      self.forks.settled()
    except Violation as violation:
      raise Violation("\n".join([*said, str(violation)]))

  # Sync

  def refill(self):
    """Put the folder back to what it was."""
    shutil.rmtree(self.project, ignore_errors=True)
    for name, text in FILES.items():
      (self.project / name).parent.mkdir(parents=True, exist_ok=True)
      (self.project / name).write_text(text)
    for name, target in {**LINKS, "abs": str(self.beside)}.items():
      (self.project / name).symlink_to(target)

  def words(self, *more):
    excludes = ("--sync-exclude", "/kept", "--sync-exclude", "*.kept")
    return ("ssh", "--sync", str(self.project), *excludes, *more, "vm", "--")

  def sync(self, rng, seed, said):
    """One run with attacks, then an honest one."""
    self.refill()
    if rng.random() < 0.5:
      for path in self.qvm.cache.glob("instances/vm.sync-*"):
        path.unlink()
    if rng.random() < 0.5:
      shutil.rmtree(self.guest / "home" / "runner" / "work", ignore_errors=True)
    if rng.random() < 0.5:
      self.honest(said)
      self.refill() if rng.random() < 0.3 else None
    attacks = rng.sample(sorted(guest_hostile.ATTACKS), rng.randint(1, 4))
    attacks += ["codes"] if rng.random() < 0.2 else []
    code = rng.choice([None, None, 0, 1, 126, 137, 255])
    way = rng.choice(["both"] * 7 + ["out"] * 2 + ["in"])
    delete = rng.random() < 0.5
    busy, late = rng.random() < 0.3, rng.random() < 0.6
    said.append(f"{attacks}, code {code}, {way}, delete {delete}, busy {busy}, late {late}")
    self.plan(attacks, code, seed, late)
    before, mine = self.around(), tree(self.project)
    options = ("--sync-direction", way, *(["--sync-delete"] if delete and way != "in" else []))
    command = CHANGE + (WAIT.format(self.guest) if busy else "") + "exit 7"
    child = self.forks.start(self.qvm, *self.words(*options), command)
    changed = busy and self.meanwhile(child)
    result = child.wait()
    said.append(f"{result.code}\n{result.stderr}")
    for name in attacks:
      self.counts[f"attack: {name}"] += 1
    self.counts["the command's code" if result.code != 125 else "125"] += 1
    self.check_process(child, result, {7 if code is None else code, 125})
    demand(result.stdout == "", "something is on stdout", result.stdout)
    self.check_around(before)
    if changed:
      mine.pop("busy")
      text = (self.project / "busy").read_text()
      demand(way == "out" or text == "before\nmeanwhile\n", f"the user's file is {text!r}")
    self.check_folder(mine, delete)
    self.honest(said)

  def honest(self, said):
    """A run in which the guest does no harm: it must work, whatever has been before."""
    self.plan()
    before = self.around()
    result = self.forks.run(self.qvm, *self.words(), "true")
    said.append(f"honest: {result.code}\n{result.stderr}")
    check_words(result, (0,))
    self.check_around(before)
    there = tree(self.guest / "home" / "runner" / "work" / self.project.name)
    for path, entry in tree(self.project).items():
      inside = not re.search(r"(^|/)(\.git|kept|[^/]*\.kept)(/|$)", path)
      if inside and stat.S_ISREG(entry[0]) and f"{path} " not in result.stderr:
        demand(there.get(path, entry)[2] == entry[2], f"{path!r} is another one in the guest")

  def meanwhile(self, child):
    """Change a file while the command runs; whether it did."""
    until = time.monotonic() + PATIENCE
    while child.poll() is None and not (self.guest / "reached").exists():
      demand(time.monotonic() < until, "the command never runs, and qvm does not end")
      time.sleep(0.01)
    if child.poll() is not None:
      return False
    with open(self.project / "busy", "a") as file:
      file.write("meanwhile\n")
    (self.guest / "go").touch()
    return True

  def around(self):
    """All that is not to be touched."""
    mine = rf"{re.escape(str(self.qvm.cache))}(/instances(/vm\..*)?|/downloads|/ssh)?"
    mine += rf"|{re.escape(str(self.qvm.home))}/tmp"
    home = [each for each in snapshot(self.qvm.home) if not re.fullmatch(mine, each[0])]
    return home, snapshot(self.beside), tree(self.beside)

  def check_around(self, before):
    now = self.around()
    for old, new in zip(before, now):
      different = {*map(repr, new if isinstance(new, list) else new.items())}
      different ^= {*map(repr, old if isinstance(old, list) else old.items())}
      demand(not different, f"outside of the folder: {different}")

  def check_process(self, child, result, codes):
    """It has ended as it should, has said nothing that a terminal obeys, and was not greedy."""
    check_said(result, codes)
    peak = child.peak()
    self.counts["most memory, MB"] = max(self.counts["most memory, MB"], peak >> 20)
    demand(peak < MOST_MEMORY, f"it took {peak >> 20} MB of memory")

  def check_folder(self, mine, delete):
    """What the user had is there, unless the guest's own lists say otherwise."""
    now = tree(self.project)
    for name in KEPT:
      demand(now.get(name) == mine[name], f"{name} is {now.get(name)}")
    lists = self.lists()
    for name in mine:
      lines = [self.line(listed, name) for listed in lists]
      listed = lists and None not in lines
      demand(name in now or delete and not listed, f"{name} is lost", *lists[-1:])
      same = len(lists) > 1 and lines[-1] and lines[-2:-1] == lines[-1:]
      if same and re.search(rb"\.0*[1-9][0-9]*(/|$)", lines[-1][1]):
        demand(now.get(name) == mine[name], f"{name}, which is listed as unchanged, is not")
    for path, (kind, mode, content) in now.items():
      demand(kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK), f"{path!r} is {kind:o}")
      demand(not mode & 0o7000, f"{path!r} has mode {mode:o}")
      demand(not re.search(r"(^|/)\.qvm-[0-9a-f]{12}$", path), f"half a file is left: {path!r}")
      if path in mine:
        continue
      git = [part.replace("\u200c", "").casefold() for part in path.split("/")]
      demand(".git" not in git, f"{path!r} has come")
      if kind == stat.S_IFLNK:
        target = os.path.normpath(os.path.join("/r", os.path.dirname(path), content))
        demand(content[:1] != "/" and (target + "/").startswith("/r/"), f"{path!r} -> {content}")
    self.counts["files that came"] += len(now.keys() - mine.keys())

  def lists(self):
    """The lists that the guest has sent in this run."""
    with contextlib.suppress(FileNotFoundError):
      data = (self.guest / "sent").read_bytes()
      return [each + b"//" for each in re.split(rb"(?m)^//end .*\n", data)[:-1]]
    return []

  def line(self, listed, name):
    """The line of a list about a name, and its stamp; None if there is none, or several."""
    found = re.findall(LIST_LINE % re.escape(os.fsencode(name)), listed)
    return found[0] if len(found) == 1 else None

  # Console

  def console(self, rng, said):
    """A machine of its own, with all that a serial console could show."""
    kind = rng.choice(sorted(CONSOLES))
    self.counts[f"console: {kind}"] += 1
    text = os.fsdecode(noise(rng))
    said.append(f"{kind}: {text!r}")
    where = "console"
    before = self.around()
    CONSOLES[kind](self, rng, where, text, said)
    self.check_around(before)
    left = [name for name in self.qvm.files() if not name.startswith("instances/vm.")]
    left = [name for name in left if re.match(r"instances/(?!other\.)|downloads/", name)]
    demand(not left, f"left: {left}")
    shutil.rmtree(self.folder / where, ignore_errors=True)

  def machine(self, said, codes, *words, where, **play):
    """Run a machine to the end of qvm, and look at what was said."""
    env = {"SSH_GUEST": json.dumps({"folder": str(self.folder / where), **play})}
    port = ("--ssh-port", str(free_port()))
    child = self.forks.start(self.qvm, "run", *port, *words, env=env)
    result = child.wait()
    said.append(f"{result.code}\n{result.stderr}")
    self.check_process(child, result, codes)
    return result

  def works(self, rng, where, text, said):
    """A command in a guest that works."""
    self.machine(said, {7}, "--rm", *GUEST, "--", "exit 7", where=where, console=text)

  def silent(self, rng, where, text, said):
    """A guest that ssh never reaches."""
    play = rng.choice([{"listen": False}, {"banner": False}])
    words = ("--rm", "--boot-timeout", "0.5", *GUEST, "--", "true")
    self.machine(said, {125}, *words, where=where, console=text, **play)

  def says(self, rng, where, text, said):
    """One that answers anything but ssh."""
    answers = ("", "SSH-2.0-", "SSH-2.0-OpenSSH_9.9\r\n", "SSH-1.99-x\n", "HTTP/1.1 400 no\r\n\r\n")
    banner = rng.choice(answers) + os.fsdecode(noise(rng)) * rng.choice([0, 1, 100])
    said.append(f"answers {banner[:3000]!r}")
    words = ("--rm", "--boot-timeout", "1", *GUEST, "--", "true")
    self.machine(said, {125}, *words, where=where, console=text, banner=banner)

  def dies(self, rng, where, text, said):
    """One that ends at once: its last lines are shown."""
    words = ("--rm", *GUEST, "--", "true")
    code = rng.choice([0, 1, 255])
    result = self.machine(said, {125}, *words, where=where, console=text, die={"exit": code})
    demand("ended before ssh answered" in result.stderr, "its end is not said")

  def background(self, rng, where, text, said):
    """One in the background, which may write without end: its log keeps both its ends."""
    record, flood = self.folder / "record", rng.choice([0, 0, 0, 24 << 20, 40 << 20])
    play = {"console": text, "flood": flood, "listen": False, "record": str(record)}
    words = ("-d", "--name", "c", "--boot-timeout", "0.5", *GUEST)
    result = self.machine(said, {0}, *words, where=where, **play)
    demand(is_plain(result.stdout), result.stdout)
    for words in (("list",), ("list", "--json")):
      listed = self.forks.run(self.qvm, *words)
      check_said(listed, {0})
      demand(is_plain(listed.stdout) and '"c"' in listed.stdout + '"c"', listed.stdout)
    until = time.monotonic() + PATIENCE
    while not record.exists():
      demand(time.monotonic() < until, "the flood does not end")
      time.sleep(0.01)
    check_said(self.forks.run(self.qvm, "stop", "--force", "c"), {0})
    shown, log = self.forks.run(self.qvm, "logs", "c"), self.qvm.cache / "instances/c.console.log"
    data, once = log.read_bytes(), os.fsencode(text)
    whole = once * (1 + flood // max(1, len(text)))
    check_said(shown, {0})
    demand(os.fsencode(shown.stdout) == data, "logs shows something else than the log")
    demand(len(data) <= MOST_LOG, f"the log has {len(data)} bytes")
    if len(whole) <= HEAD + 2 * TAIL:
      demand(data == whole, "the log is not what the guest wrote")
    demand(data[:HEAD] == whole[:HEAD], "the beginning of the log is lost")
    demand(data[-TAIL:] == whole[-TAIL:] or len(data) < HEAD + TAIL, "the end of the log is lost")
    record.unlink()
    check_said(self.forks.run(self.qvm, "rm", "c"), {0})

  def close(self):
    """End the machine."""
    self.plan()
    self.forks.run(self.qvm, "rm", "--force", "vm", "other")
    end_processes(f"HOME={self.qvm.home}", environment=True)


CONSOLES = {each.__name__: each for each in (Hostile.works, Hostile.silent, Hostile.says,
            Hostile.dies, Hostile.background)}  # fmt: skip


def noise(rng):
  """Some hundred bytes of what terminals obey, of half characters, and of text."""
  pieces = [
    *guest_hostile.escaped(),
    *(b"\x1b[?1049h", b"\x1b[?2004h\x1b[200~rm -rf ~\r\x1b[201~", b"\x1b[21t", b"\x1bc"),
    *(b"\x1b]1337;Copy=:eA==\x07", b"\x1bP+q544e\x1b\\", b"\x1b]8;;http://x/\x07"),
    *(b"\x00", b"\x9d", b"\n", b"\t"),
    *(b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xff", b"\r", b"\n"),
    *(b"login: ", b"100%\r", b"qvm: not mine\n", b"\n\n", b"\x1b[", b"\x1b]", b"x" * 3000),
    rng.randbytes(rng.randrange(60)),
  ]  # fmt: skip
  return b"".join(rng.choices(pieces, k=rng.randint(1, 60)))


def is_plain(text):
  """Whether a terminal would do nothing but show a text."""
  return all(line.isprintable() for line in text.split("\n"))


def check_said(result, codes):
  """It ended with one of the codes, and said nothing but lines of its own, in plain text."""
  facts = (f"exit code {result.code}", result.stderr)
  demand(result.code in codes, *facts)
  demand(is_plain(result.stderr), "something is said that a terminal obeys", repr(result.stderr))
  guests = r"(?m)^(sh|touch|rm|ln|mkdir): .*\n"  # what the command itself has said
  bad = bad_words(re.sub(guests, "", result.stderr))
  demand(not bad, f"'{bad}' is said", *facts)


def problem():
  """Why there can be no such guest here, which is kept from the host's files; empty if it can."""
  return why_not(("unshare", "--mount", "true"))


def hostile(folder, forks, seed, numbers):
  """Let a guest attack; returns what was counted."""
  if problem():
    print(f"  left out, as there can be no namespace of mounts here: {problem()}")
    return Counter()
  with contextlib.closing(Hostile(folder, forks, seed)) as part:
    return played(part, seed, numbers, "points")
