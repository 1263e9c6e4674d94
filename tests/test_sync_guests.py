"""--sync against guests that have the tools of each system: what issue 15 asks, from outside.

Only what a user can see is looked at: both folders, what was said, the exit code. How qvm finds out
what has changed, and by which of the guest's tools, is its own affair.
"""

import contextlib
import itertools
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import guest_tools
import pytest
from guest_tools import bsd_guest  # noqa: F401 (a fixture)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import AFTER, DEADLINE, ended, free_port, obey_modes, processes_of, wait_for

pytestmark = pytest.mark.skipif(
  guest_tools.missing() != [], reason=f"not there: {guest_tools.missing()}"
)
NUMBERS = itertools.count()
LONG = "n" * 150
# Whose tar cannot write a name of 150 bytes, or a link to so long a name.
SHORT_NAMES = ("openbsd", "omnios")
OF_PAX = ("openbsd", "netbsd", "omnios")
BOTH = ("--sync-delete",)
IN, OUT = ("--sync-direction", "in"), ("--sync-direction", "out")


def on(*names):
  """Parameters of some systems only: for what has little to do with the guest's tools."""
  params = {param.values[0]: param for param in guest_tools.systems()}
  return pytest.mark.parametrize("guest", [params[name] for name in names], indirect=True)


@pytest.fixture(params=[p for p in guest_tools.systems() if p.values[0] != "freebsd-csh"])
def guest(request, bsd_guest):  # noqa: F811
  guest = bsd_guest(request.param)
  yield guest
  guest.clock_as_it_was()


@pytest.fixture
def project(tmp_path):
  """An empty folder whose name no other test's folder has."""
  folder = tmp_path / f"p{next(NUMBERS)}"
  folder.mkdir()
  return folder


def put(folder, **files):
  """Write files: the keys are names in which __ stands for a slash and _ for a dot."""
  for name, content in files.items():
    path = folder / name.replace("__", "/").replace("_", ".")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def tree(folder):
  """All below a folder: {path: (kind, mode, content or target)}; also what its modes forbid."""
  found = {}
  for above, folders, names in os.walk(os.fsencode(str(folder))):
    for name in folders + names:
      path = os.path.join(above, name)
      mode, content = os.lstat(path).st_mode, None
      if stat.S_ISREG(mode):
        with open(path, "rb") as file:
          content = file.read()
      elif stat.S_ISLNK(mode):
        content = os.readlink(path)
      bits = 0 if stat.S_ISLNK(mode) else stat.S_IMODE(mode)
      key = os.fsdecode(os.path.relpath(path, os.fsencode(str(folder))))
      found[key] = (stat.S_IFMT(mode), bits, content)
  return found


def contents(folder):
  """{path: content} of the files alone."""
  return {path: entry[2] for path, entry in tree(folder).items() if entry[0] == stat.S_IFREG}


def is_said(result, name):
  """A line of qvm's names it, perhaps cut."""
  return os.path.basename(name)[:40] in result.stderr


def works(result, code=0):
  assert result.returncode == code, result.stderr
  assert "Traceback" not in result.stderr and "bug in qvm" not in result.stderr, result.stderr
  return result


def fails(result):
  """125 before the command has run."""
  works(result, 125)
  assert result.stdout == "", result.stdout
  return result


def script(text):
  """A command that any login shell takes."""
  return ("sh", "-c", text)


@contextlib.contextmanager
def running(guest, project, text, options=()):
  """A synced command that waits in the guest after it has said "up"; step() lets it go on to its
  end and gives what subprocess.run gives."""
  words = ("ssh", "--sync", str(project), *options, "vm", "--", *script(f"echo up; read x; {text}"))
  process = guest.qvm.start(*words, stdin=subprocess.PIPE)
  with ended(process):
    assert process.stdout.readline() == "up\n", process.communicate()

    def step():
      out, err = process.communicate("\n", timeout=120)
      return subprocess.CompletedProcess(words, process.returncode, out, err)

    yield step


def arrives(result, guest, folder):
  """After an `in`: the guest's tree is the host's."""
  works(result)
  assert tree(guest.there(folder)) == tree(folder)


# --- both ways -------------------------------------------------------------------------------


@on(*guest_tools.SYSTEMS)
def test_there_and_back(guest, project):
  put(project, a="1\n", d__b="2\n", d__e__c="3\n", gone="x")
  (project / "d" / "l").symlink_to("b")
  (project / "empty").mkdir()
  (project / "d/b").chmod(0o755)
  os.utime(project / "a", (1577836800, 1577836800))
  before = tree(project)
  works(guest.sync(project, "true", options=IN))
  assert tree(guest.there(project)) == before
  assert (guest.there(project) / "a").stat().st_mtime == 1577836800
  text = "rm gone; echo 2 >>a; mkdir new; echo n >new/n; ln -s ../a new/l; chmod 600 d/b; exit 7"
  result = guest.sync(project, *script(text), options=BOTH)
  works(result, 7)
  assert tree(project) == tree(guest.there(project))
  assert contents(project) == {"a": b"1\n2\n", "d/b": b"2\n", "d/e/c": b"3\n", "new/n": b"n\n"}
  assert (
    os.readlink(project / "new/l") == "../a" and (project / "d/b").stat().st_mode & 0o777 == 0o600
  )


@on(*guest_tools.SYSTEMS)
def test_in_a_guest_of_its_own(guest, project):
  put(project, a="1\n")
  result = guest.run(free_port(), project, *script("ls; echo n >n; exit 3"))
  works(result, 3)
  assert result.stdout == "a\n" and contents(project) == {"a": b"1\n", "n": b"n\n"}


@on(*guest_tools.SYSTEMS)
def test_a_signal_is_128_and_its_number(guest, project):
  put(project, a="a")
  texts = ["kill -9 $$", "kill -15 $$", "sh -c 'kill -15 $$'; exit $?"]
  if guest.family == "omnios":
    texts.pop()  # this sh's own 256+15 is 15 to whoever is told by exit(2)
  for text in texts:
    code = 137 if "-9" in text else 143
    works(guest.sync(project, *script(text)), code)
    works(guest.ssh(*script(text)), code)


# --- in --------------------------------------------------------------------------------------


def test_what_is_beside_a_file_of_8_gib(guest, project):
  """Everything behind it vanished with exit code 0, and was then deleted here."""
  if guest.family not in OF_PAX:
    pytest.skip("its tar reads such sizes, and 8 GiB would be written")
  put(project, a="a", z_txt="z", sub__y="y")
  with open(project / "m-big", "wb") as file:
    file.truncate((8 << 30) + 4096)
  os.makedirs(guest.there(project))  # what is left there must not matter
  try:
    result = guest.sync(project, *script("find . -type f"), options=BOTH, timeout=300)
    assert set(os.listdir(project)) == {"a", "m-big", "sub", "z.txt"}
    assert (project / "m-big").stat().st_size == (8 << 30) + 4096
    works(result)
    there = guest.there(project)
    assert {"./a", "./z.txt", "./sub/y"} <= set(result.stdout.split())
    big = there / "m-big"
    arrived = big.exists() and big.stat().st_size == (8 << 30) + 4096
    assert arrived or (is_said(result, "m-big") and not big.exists())
  finally:
    shutil.rmtree(guest.there(project))


def test_long_names(guest, project):
  """Python's tar puts the name of a folder of 100 to 155 bytes wholly into the prefix."""
  for length in (99, 100, 101, 120, 155, 156, 255):
    put(project / ("d" * length), f="x")
    (project / ("e" * length)).mkdir()
    (project / ("f" * length)).write_text("x")
  put(project.joinpath(*["d" * 60, "e" * 60, "f" * 20]), f="x")
  put(project.joinpath(*["d" * 90] * 3), f="x")
  put(project, z="z")
  arrives(guest.sync(project, "true", options=IN), guest, project)


def test_long_paths(guest, project):
  put(project.joinpath(*["d" * 90] * 8), f="x")
  put(project, z="z")
  arrives(guest.sync(project, "true", options=IN), guest, project)


def test_long_link_targets(guest, project):
  for length in (99, 100, 101, 150, 255, 256, 300, 1000):
    target = ("t" * 49 + "/") * (length // 50) + "u" * (length % 50)
    (project / f"link{length}").symlink_to(target)
  put(project, z="z")
  arrives(guest.sync(project, "true", options=IN), guest, project)


def test_a_long_name_and_a_long_target_at_once(guest, project):
  (project / LONG).symlink_to("t" * 150)
  (project / ("d" * 120)).mkdir()
  (project / ("d" * 120) / LONG).symlink_to("u" * 101)
  arrives(guest.sync(project, "true", options=IN), guest, project)


def test_closed_folders(guest, project):
  for mode in (0o555, 0o500):
    top = project / oct(mode)
    put(top, f="x", d__g="y", d__e__h="z")
    (top / "l").symlink_to("f")
    for folder in (top / "d/e", top / "d", top):
      folder.chmod(mode)
  put(project, z="z")
  before = tree(project)
  works(guest.sync(project, "true", options=IN))
  assert tree(guest.there(project)) == before
  works(guest.sync(project, "true", options=IN))  # into what is closed there by now
  assert tree(guest.there(project)) == before == tree(project)


def test_a_folder_that_the_guest_cannot_list(guest, project):
  """Nobody can know what has arrived: it is said, or the guest is asked otherwise."""
  put(project, c__f="x", z="z")
  (project / "c").chmod(0o300)
  result = guest.sync(project, "true", options=IN)
  assert is_said(result, "c") if result.returncode else works(result)
  assert result.returncode == 125 or tree(guest.there(project)) == tree(project)


@pytest.mark.skipif(os.geteuid() != 0, reason="others are refused before the boot")
def test_a_folder_of_mode_000(guest, project):
  put(project, z="z")
  (project / "c").mkdir()
  (project / "c").chmod(0)
  result = guest.sync(project, "true", options=IN)
  assert (guest.there(project) / "z").read_text() == "z", result.stderr
  assert is_said(result, "c") or tree(guest.there(project)) == tree(project)
  assert result.returncode in (0, 125)


def test_a_change_in_a_closed_folder(guest, project):
  put(project, c__f="x", c__g="x")
  (project / "c").chmod(0o555)
  works(guest.sync(project, "true", options=IN))
  (project / "c/f").write_text("changed")
  (project / "c").chmod(0o755)
  (project / "c/new").write_text("new")
  (project / "c").chmod(0o555)
  arrives(guest.sync(project, "true", options=IN), guest, project)


def test_a_closed_folder_goes(guest, project):
  """Deleted here, or replaced by a file: in the guest it can neither be emptied nor closed then."""
  put(project, c__f="x", c__d__g="x", e__d__f="x", z="z")
  for path in ("c/d", "c", "e/d", "e"):
    (project / path).chmod(0o555)
  works(guest.sync(project, "true", options=IN))
  open_all(project)
  shutil.rmtree(project / "c")
  shutil.rmtree(project / "e")
  (project / "e").write_text("a file now")
  arrives(guest.sync(project, "true", options=IN), guest, project)


@on("openbsd")
def test_a_file_that_becomes_too_large_for_the_guests_tar(guest, project):
  """A sparse file that has grown since qvm looked."""
  put(project, big="old", z="z")
  action = f"os.truncate({str(project / 'big')!r}, 1 << 33)"
  code = AFTER.format(name="Sync.sendable", action=action)
  result = works(guest.sync(project, *script("ls"), options=IN, code=code))
  assert result.stdout == "z\n" and is_said(result, "big")


@on("freebsd", "haiku")
def test_results_in_a_closed_folder(guest, project):
  put(project, c__f="old", c__d__g="old", c__d__gone="x")
  for path in ("c/d", "c"):
    (project / path).chmod(0o555)
  text = "chmod u+w c c/d; echo new >c/f; echo new >c/d/new; rm c/d/gone; chmod u-w c c/d"
  works(guest.sync(project, *script(text), options=BOTH, preexec_fn=obey_modes))
  assert contents(project) == {"c/f": b"new\n", "c/d/g": b"old", "c/d/new": b"new\n"}
  assert [entry[1] for path, entry in tree(project).items() if path in ("c", "c/d")] == [0o555] * 2


def test_what_is_excluded_stays_closed(guest, project):
  """Opened to be listed, though it is not listed, and never closed again."""
  put(project, z="z")
  works(guest.sync(project, "true", options=IN))
  put(guest.there(project), d__k_o__closed__x="x", shut__x="x", _git__closed__x="x")
  for path in ("d/k.o/closed", ".git/closed", "shut"):
    (guest.there(project) / path).chmod(0)
  works(guest.sync(project, "true", options=(*BOTH, "--sync-exclude", "*.o")))
  found = tree(guest.there(project))
  assert found["d/k.o/closed"][1] == found[".git/closed"][1] == 0
  assert contents(project)["shut/x"] == b"x"


@on("freebsd", "netbsd")
def test_a_guest_that_tells_only_names(guest, project):
  """Its modes are those that it got from here."""
  put(project, c__d__f="x", z="z")
  with guest.tool("stat", "exit 1"):
    for content in ("old", "new"):
      open_all(project)
      (project / "c/d/f").write_text(content)
      for path in ("c/d", "c"):
        (project / path).chmod(0o555)
      arrives(guest.sync(project, "true", options=IN), guest, project)


@pytest.mark.parametrize("case", ["empty", "folder", "excluded"])
def test_next_to_nothing(guest, project, case):
  if case == "folder":
    (project / "d").mkdir()
  if case == "excluded":
    put(project, a_o="x", _git__config="x")
  result = guest.sync(project, *script("ls -A; echo made >made"), options=("--sync-exclude", "*.o"))
  works(result)
  assert result.stdout == ("d\n" if case == "folder" else "")
  assert (project / "made").read_text() == "made\n"


def remove(path):
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  elif os.path.lexists(path):
    path.unlink()


def make(path, kind, outside):
  """Put something of a kind in the place of what is there."""
  remove(path)
  if kind == "file":
    path.write_text("file\n")
  elif kind == "link":
    path.symlink_to("z")
  elif kind == "link out":
    path.symlink_to(f"../../{outside}")
  else:
    path.mkdir()
    if kind == "folder":
      put(path, a="a", d__b="b")


KINDS = ["file", "link", "link out", "folder", "empty folder"]


@pytest.mark.parametrize("old", KINDS)
def test_another_kind_replaces_what_is_there(guest, project, old):
  """Changed here between two syncs to a kept machine. Nothing is written through an old link."""
  outside = guest.home / f"outside-{project.name}"
  outside.mkdir()
  put(outside, kept="kept\n")
  put(project, z="z")
  for new in KINDS:
    make(project / new, old, outside.name)
  works(guest.sync(project, "true", options=IN))
  for new in KINDS:
    make(project / new, new, outside.name)
  result = guest.sync(project, "true", options=IN)
  assert tree(outside) == {"kept": (stat.S_IFREG, 0o644, b"kept\n")}, "written through an old link"
  arrives(result, guest, project)


def test_a_folder_in_the_guest_where_a_file_comes(guest, project):
  """Made there, not here: it goes, or the run says so; never is nothing said."""
  put(project, it="file\n", z="z")
  works(guest.sync(project, "true", options=IN))
  guest.ssh(*script(f"cd work/{project.name}; rm it; mkdir it; echo x >it/theirs"))
  result = guest.sync(project, *script("cat it"), options=IN)
  assert (result.returncode, result.stdout) == (0, "file\n") or (
    result.returncode == 125 and is_said(result, "it")
  ), result
  assert (project / "it").read_text() == "file\n"


# A tar (or pax) of the guest's that does something at the moment when it is to read an archive.
READING = """
case $1 in -r*|*x*) {at} ;; esac
"""


@contextlib.contextmanager
def at_reading(guest, at, rest='exec {real} "$@"'):
  with contextlib.ExitStack() as stack:
    for name in ("tar", "pax"):
      if (guest.folder / "tools" / name).exists():
        stack.enter_context(guest.tool(name, READING.replace("{at}", at) + rest))
    yield


def test_files_that_change_while_they_are_read(guest, project):
  """40 MB do not fit into what lies between qvm and tar: not all has been read by then."""
  names, size = [f"{n:02}" for n in range(40)], 1 << 20
  for name in names:
    (project / name).write_bytes(name.encode() * (size // 2))
  gone, cut, grown = ([str(project / name) for name in names[n::4]] for n in (1, 2, 3))
  at = f"""/bin/rm -f {" ".join(gone)}; /usr/bin/truncate -s 1000 {" ".join(cut)}
  /usr/bin/truncate -s 2000000 {" ".join(grown)}; : >{project.parent}/done"""
  with at_reading(guest, at):
    result = guest.sync(project, *script("echo ran; ls"), options=IN)
  assert (project.parent / "done").exists()
  works(result)
  assert result.stdout.startswith("ran\n")
  there = guest.there(project)
  for number, name in enumerate(names):
    path, content = there / name, name.encode() * (size // 2)
    whole = path.exists() and path.read_bytes()[:size] == content
    assert whole or (number % 4 and re.search(rf"\b{name}\b", result.stderr)), name
    assert whole or number % 4 != 3, f"{name} has grown, and what was there is not sent"


def test_a_tar_that_loses_a_file_without_a_word(guest, project):
  """The guest's own list tells."""
  put(project, a="a", lost="x", z="z")
  lost = guest.there(project) / "lost"
  after = '{real} "$@"; code=$?; /bin/rm -f ' + str(lost) + "; exit $code"
  with at_reading(guest, ":", after):
    result = guest.sync(project, *script("echo ran"), options=BOTH)
  fails(result)
  assert is_said(result, "lost")
  assert contents(project) == {"a": b"a", "lost": b"x", "z": b"z"}


@pytest.mark.parametrize("reads", ["cat >/dev/null", ":"])
def test_a_tar_that_writes_nothing_without_a_word(guest, project, reads):
  """The guest has a file of that name and size, but it is the old one."""
  size = 3 << 20  # more than lies between qvm and tar
  (project / "a").write_bytes(b"1" * size)
  works(guest.sync(project, "true", options=IN))
  (project / "a").write_bytes(b"2" * size)
  with at_reading(guest, f"{reads}; exit 0"):
    result = fails(guest.sync(project, *script("echo ran"), options=BOTH))
  assert is_said(result, "a") and (project / "a").read_bytes() == b"2" * size
  arrives(guest.sync(project, "true", options=IN), guest, project)


def test_a_find_that_fails_on_the_way_in(guest, project):
  put(project, a="a", b="b", c="c")
  with guest.tool("find", "exit 1"):
    result = guest.sync(project, *script("echo ran"), options=BOTH)
  assert result.returncode == 125 or result.stdout == "ran\n"
  assert contents(project) == {"a": b"a", "b": b"b", "c": b"c"}


@on("freebsd", "netbsd")
def test_what_may_not_be_read_here_is_told_before_the_boot(guest, project):
  """A 0700 folder of root's failed after the boot, without a word of --sync-exclude."""
  put(project, a="a", closed__x="x")
  (project / "closed").chmod(0)
  try:
    result = guest.run(free_port(), project, *script("echo ran"), preexec_fn=obey_modes)
  finally:
    (project / "closed").chmod(0o755)
  fails(result)
  assert "is booting" not in result.stderr
  assert "closed" in result.stderr and "--sync-exclude" in result.stderr


# --- out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, options", [(-2, BOTH), (-3600, ()), (3600, BOTH)])
def test_the_guests_clock_is_set(guest, project, seconds, options):
  put(project, a="old", b="old", gone="old", d__c="old")
  with running(guest, project, "echo new >result; echo new >a; chmod 700 b; rm gone; mv d e",
               options) as step:  # fmt: skip
    guest.set_clock(seconds)
    works(step())
  found = contents(project)
  assert (found["result"], found["a"], found["e/c"]) == (b"new\n", b"new\n", b"old")
  assert (project / "b").stat().st_mode & 0o777 == 0o700
  assert ("gone" in found) == (options == ())
  assert ("d/c" in found) == (options == ())


def test_the_clock_goes_forward_and_back_again(guest, project):
  """What is done meanwhile has times that the next mark does not reach."""
  put(project, a="old")
  guest.set_clock(7200)
  works(guest.sync(project, *script("echo 1 >one")))
  with running(guest, project, "echo 2 >two; echo new >a") as step:
    guest.set_clock(0)
    works(step())
  works(guest.sync(project, *script("echo 3 >three")))
  assert contents(project) == {"a": b"new\n", "one": b"1\n", "two": b"2\n", "three": b"3\n"}


TOUCHES = {
  "all": 'chown -R "$(id -u)" "$HOME"; chmod -R u+rwX "$HOME"',
  "what is hidden": """for d in "$HOME" "$HOME/work" . /tmp; do for f in "$d"/.[!.]* "$d"/qvm*; do
    [ ! -O "$f" ] || chown "$(id -u)" "$f"; done; done""",
  "times of what is hidden": """for d in "$HOME" "$HOME/work" .; do for f in "$d"/.[!.]*; do
    [ ! -e "$f" ] || touch -t 203001010000 "$f"; done; done""",
}


@pytest.mark.parametrize("case", list(TOUCHES))
def test_the_status_of_what_is_not_the_users_changes(guest, project, case):
  put(project, a="old")
  text = f"echo new >result; echo new >a; {TOUCHES[case]} 2>/dev/null; :"
  works(guest.sync(project, *script(text)))
  assert contents(project) == {"a": b"new\n", "result": b"new\n"}


def test_files_that_look_old(guest, project):
  put(project, a="old", b="old", d__c="old")
  text = """
    echo new >past; touch -t 200001010000 past
    echo new >a; touch -r b a; mv b renamed; cp -p d/c copy; ln d/c hard
    mv d/c d/x; ln d/x d/c; touch -t 199901010000 d
  """
  works(guest.sync(project, *script(text)))
  found = contents(project)
  assert found == {"past": b"new\n", "a": b"new\n", "b": b"old", "renamed": b"old", "copy": b"old",
                   "hard": b"old", "d/x": b"old", "d/c": b"old"}  # fmt: skip


def test_an_edit_of_the_same_size_and_time(guest, project):
  put(project, a="old1", z="z")
  os.utime(project / "a", (1577836800, 1577836800))
  works(guest.sync(project, *script("echo 'new' >a; touch -t 202001010000 a; TZ=UTC touch -t "
                                    "202001010000 a")))  # fmt: skip
  assert (project / "a").read_text() == "new\n"


RENAMES = {
  # a line, and where the contents are afterwards of x/a, x/s/b, y/a and y/t/c
  "mv x w": {"w/a": b"x", "w/s/b": b"xs", "y/a": b"y", "y/t/c": b"yt"},
  "rm -r y; mv x y": {"y/a": b"x", "y/s/b": b"xs"},
  "rm -r y; mv x/a y": {"x/s/b": b"xs", "y": b"x"},
  "mv x t; mv y x; mv t y": {"y/a": b"x", "y/s/b": b"xs", "x/a": b"y", "x/t/c": b"yt"},
  "mv x y/": {"y/a": b"y", "y/t/c": b"yt", "y/x/a": b"x", "y/x/s/b": b"xs"},
  "mv y/t t; rm -r y; mv t y": {"x/a": b"x", "x/s/b": b"xs", "y/c": b"yt"},
  "mv x/a y/a": {"x/s/b": b"xs", "y/a": b"x", "y/t/c": b"yt"},
  "mv x 'a b\nc'": {"a b\nc/a": b"x", "a b\nc/s/b": b"xs", "y/a": b"y", "y/t/c": b"yt"},
}


def test_renamed(guest, project):
  """Files in a renamed folder are as old as before; with --sync-delete their content was lost."""
  lines, expected = [], {}
  for number, (line, places) in enumerate(RENAMES.items()):
    put(project / str(number), x__a="x", x__s__b="xs", y__a="y", y__t__c="yt")
    lines.append(f"(cd {number}; {line})")
    expected.update({f"{number}/{place}": content for place, content in places.items()})
  for path in contents(project):
    os.utime(project / path, (1577836800, 1577836800))
  works(guest.sync(project, *script("\n".join(lines)), options=BOTH))
  assert contents(project) == expected


def test_renamed_to_what_tar_cannot_write(guest, project):
  """No error, and the old copy was removed: the content was nowhere."""
  put(project, old="x", d__a="a", d__b="b", e__a="c", e__b="d", z="z")
  (project / "link").symlink_to("z")
  text = f"""mv old {LONG}; mv d d{LONG}; mv e/a e/{LONG}; mv e f; rm link; ln -s {"t" * 150} link
             echo new >n; exit 3"""
  moved = {"old": LONG, "d/a": f"d{LONG}/a", "d/b": f"d{LONG}/b", "e/a": f"f/{LONG}", "e/b": "f/b"}
  before = contents(project)
  result = guest.sync(project, *script(text), options=BOTH)
  found = contents(project)
  for old, new in moved.items():
    assert before[old] in (found.get(old), found.get(new)), f"what was in {old} is nowhere"
  works(result, 3)
  assert (found["n"], found["f/b"], found["z"]) == (b"new\n", b"d", b"z")
  missing = [new for new in moved.values() if new not in found]
  if os.readlink(project / "link") == "z":
    missing.append("link")
  assert guest.family in SHORT_NAMES or missing == []
  assert all(is_said_below(result, name) for name in missing), (missing, result.stderr)


def test_what_tar_cannot_write_does_not_take_the_rest_with_it(guest, project):
  put(project, a="old")
  deep = "/".join(["d" * 90] * 3)
  text = f"""
    mkdir -p {deep} m; echo 1 >{deep}/f; echo 2 >{LONG}; ln -s {"t" * 150} l; echo 3 >m/{LONG}
    echo new >a; echo new >m/b; echo new >z; exit 4
  """
  result = works(guest.sync(project, *script(text)), 4)
  found = contents(project)
  assert (found["a"], found["m/b"], found["z"]) == (b"new\n",) * 3
  if guest.family in SHORT_NAMES:
    missing = set(tree(guest.there(project))) - set(tree(project))
    assert all(is_said(result, name) for name in missing), (missing, result.stderr)
  else:
    assert tree(project) == tree(guest.there(project))


@on("openbsd", "netbsd", "omnios")
def test_8_gib_made_in_the_guest(guest, project):
  put(project, a="old")
  text = """dd if=/dev/zero of=m-big bs=1 count=1 seek=8589934592 2>/dev/null
            echo new >a; echo new >z; exit 4"""
  try:
    result = works(guest.sync(project, *script(text), options=BOTH, timeout=300), 4)
    assert (project / "a").read_text() == (project / "z").read_text() == "new\n"
    assert is_said(result, "m-big") or (project / "m-big").stat().st_size == 8589934593
  finally:
    shutil.rmtree(guest.there(project))


def test_excludes_hold_for_new_folders(guest, project):
  put(project, src__a_c="c", src__a_o="mine", build__mine="mine", old__k_o="mine", old__s="s")
  text = """
    mkdir -p new/build new/deep/node_modules/x; for f in new/k.o new/k.c new/build/x new/deep/y.o \
    new/deep/node_modules/x/y new/deep/z; do echo new >$f; done
    mkdir build; echo theirs >build/x; echo theirs >src/b.o
    mv old renamed; echo theirs >renamed/t.o
  """
  excludes = ("--sync-exclude", "*.o", "--sync-exclude", "build", "--sync-exclude", "node_modules")
  works(guest.sync(project, *script(text), options=excludes + BOTH))
  found = contents(project)
  assert found == {
    "src/a.c": b"c", "src/a.o": b"mine", "build/mine": b"mine", "old/k.o": b"mine",
    "new/k.c": b"new\n", "new/deep/z": b"new\n", "renamed/s": b"s",
  }  # fmt: skip


# A tar (or pax) that writes an archive otherwise; where it only is tried, it is as it was.
WRITING = """
case $1 in -r*|-[xt]*|x*|t*) exec {real} "$@" ;; esac
case "$*" in */dev/null*) exec {real} "$@" ;; esac
[ ! /dev/fd/1 -ef /dev/null ] || exec {real} "$@"
"""
# As it should, up to a point, and then it complains.
HALF = """
{real} "$@" 2>/dev/null | /usr/bin/head -c {bytes}
echo "boom: the disk is on fire" >&2
exit 1
"""


@contextlib.contextmanager
def at_writing(guest, rest):
  with contextlib.ExitStack() as stack:
    for name in ("tar", "pax"):
      if (guest.folder / "tools" / name).exists():
        stack.enter_context(guest.tool(name, WRITING + rest))
    yield


def test_a_tar_that_fails_half_way(guest, project):
  put(project, gone="old", a="old")
  text = """rm gone; i=10; while [ $i -lt 40 ]; do
            dd if=/dev/zero bs=4096 count=1 2>/dev/null | tr '\\000' x >f$i; i=$((i + 1)); done"""
  with at_writing(guest, HALF.replace("{bytes}", "40000")):
    result = guest.sync(project, *script(text + "; exit 3"), options=BOTH)
  assert result.returncode in (3, 125), result.stderr
  assert "boom" in result.stderr
  found = contents(project)
  assert found["gone"] == b"old" and found["a"] == b"old", "deleted though not all has come"
  came = {name for name in found if name.startswith("f")}
  assert len(came) > 3, "what did come is not kept"
  assert all(found[name] == b"x" * 4096 for name in came)


def test_a_tar_that_fails_at_once(guest, project):
  put(project, a="old")
  with at_writing(guest, HALF.replace("{bytes}", "0")):
    result = guest.sync(project, *script("echo new >a; exit 3"), options=BOTH)
  works(result, 125)
  assert "boom" in result.stderr and (project / "a").read_text() == "old"


# Its first call sends a part of what is asked for, and then the connection is lost.
LOST = """
[ -e {once} ] && [ "$1" = -cf ] || exec {{real}} "$@"
rm {once}
{{real}} "$@" 2>/dev/null | /usr/bin/head -c 6000
read -r pid name state parent rest </proc/$PPID/stat
kill -9 $parent
"""


@on("freebsd", "haiku")
def test_a_connection_that_is_lost_while_changes_come(guest, project):
  """There is another session then, and what went wrong in the first is no longer an error."""
  put(project, a="old", gone="old")
  works(guest.sync(project, "true"))
  once = project.parent / "once"
  once.write_text("")
  text = "rm gone; for n in 1 2 3 4 5 6; do echo $n >f$n; done; echo new >a; exit 3"
  with at_writing(guest, LOST.format(once=once)):
    works(guest.sync(project, *script(text), options=BOTH), 3)
  assert not once.exists()
  assert contents(project) == {"a": b"new\n", **{f"f{n}": b"%d\n" % n for n in range(1, 7)}}


def test_a_find_that_fails_on_the_way_out(guest, project):
  """A list that is not whole is no reason to delete."""
  put(project, a="a", b="b", c="c", d__e="e")
  (project.parent / "armed").write_text("")
  broken = f"""[ -e {project.parent}/armed ] || {{ {{real}} "$@" | /usr/bin/head -n 2; exit 1; }}
  exec {{real}} "$@"
  """
  names = [name for name in ("find", "gfind") if (guest.folder / "tools" / name).exists()]
  with contextlib.ExitStack() as stack:
    for name in names:
      stack.enter_context(guest.tool(name, broken))
    with running(guest, project, "rm a; echo new >b; exit 3", BOTH) as step:
      (project.parent / "armed").unlink()
      result = step()
  assert result.returncode in (3, 125), result.stderr
  found = contents(project)
  assert (found["c"], found["d/e"]) == (b"c", b"e")
  assert found["b"] == b"new\n" or result.returncode == 125


def test_what_may_not_be_read_there(guest, project):
  """chmod 000 secret; exit 3: the code is the command's, the rest comes, and it is said."""
  put(project, a="old", secret="mine", d__x="mine", gone="old")
  text = """echo new >a; echo new >z; rm gone; echo theirs >secret; chmod 000 secret
            echo theirs >d/x; chmod 000 d; exit 3"""
  try:
    result = works(guest.sync(project, *script(text), options=BOTH), 3)
  finally:
    (guest.there(project) / "d").chmod(0o755)
    (project / "secret").chmod(0o644)
    (project / "d").chmod(0o755)
  found = contents(project)
  assert (found["a"], found["z"]) == (b"new\n", b"new\n")
  if guest.family == "haiku":  # where nothing is closed
    assert found["secret"] == found["d/x"] == b"theirs\n"
  else:
    assert found["secret"] == found["d/x"] == b"mine"
    assert is_said(result, "secret") and re.search(r"\bd\b", result.stderr)


def test_nothing_but_what_may_not_be_read(guest, project):
  """It is said, and the code is the command's: its tar has nothing to send at all."""
  put(project, secret="mine", z="z")
  result = guest.sync(project, *script("echo theirs >secret; chmod 000 secret; exit 3"))
  works(result, 3)
  (project / "secret").chmod(0o644)
  if guest.family == "haiku":  # where nothing is closed
    assert (project / "secret").read_text() == "theirs\n"
  else:
    assert (project / "secret").read_text() == "mine" and is_said(result, "secret")


def test_what_is_roots_there(guest, project):
  """Files and folders of another's that its tar may not read, as sudo leaves them."""
  if guest.family == "haiku" or os.geteuid() != 0:
    pytest.skip("all are root there, or nobody here")
  put(project, a="old")
  text = """mkdir r; echo x >r/x; echo x >f; chmod 600 f; chmod 700 r; echo new >a; echo new >z
            chown 12345 f r/x r; exit 3"""
  result = works(guest.sync(project, *script(text)), 3)
  found = contents(project)
  assert (found["a"], found["z"]) == (b"new\n", b"new\n")
  assert "f" not in found and "r/x" not in found
  assert re.search(r"\bf\b", result.stderr) and re.search(r"\br\b", result.stderr)


# --- --sync-delete ---------------------------------------------------------------------------


def test_deleted_there_is_deleted_here(guest, project):
  put(project, a="a", d__b="b", d__e__c="c", keep__x="x", k_o="o", old__k_o="o", old__s="s")
  text = "rm -r a d old; mkdir made"
  works(guest.sync(project, *script(text), options=(*BOTH, "--sync-exclude", "*.o")))
  assert contents(project) == {"keep/x": b"x", "k.o": b"o", "old/k.o": b"o"}
  assert set(os.listdir(project)) == {"keep", "k.o", "old", "made"}


def test_what_changes_here_meanwhile_stays(guest, project):
  put(project, both="old", d__x="old", late="old")
  with running(guest, project, "echo theirs >both; echo new >n; rm -r d", BOTH) as step:
    put(project, both="mine", d__new="mine", added="mine", n="mine")
    result = works(step())
  found = contents(project)
  assert found == {"both": b"mine", "d/x": b"old", "d/new": b"mine", "added": b"mine",
                   "n": b"mine", "late": b"old"}  # fmt: skip
  assert all(is_said(result, name) for name in ("both", "n"))


def test_what_changes_here_while_it_is_deleted_there_stays(guest, project):
  put(project, here="old", gone="old", d__x="old", late="old")
  with running(guest, project, "rm -r here gone d", BOTH) as step:
    put(project, here="mine", d__new="mine")
    result = works(step())
  assert contents(project) == {"here": b"mine", "d/new": b"mine", "late": b"old"}
  assert is_said(result, "here")


def test_only_what_was_there_is_deleted(guest, project):
  """A file that appears here after the list was made was never in the guest."""
  put(project, a="a", z="z")
  with at_reading(guest, f"echo late >{project}/late"):
    result = guest.sync(project, *script("echo ran"), options=BOTH)
  works(result)
  assert contents(project)["late"] == b"late\n"


def test_a_guest_that_is_emptied_before_the_command(guest, project):
  """Deleted there before the list of what has arrived: it never was seen there."""
  put(project, a="a", z="z")
  there = guest.there(project)
  after = '{real} "$@"; code=$?; /bin/rm -rf ' + str(there) + "; exit $code"
  with at_reading(guest, ":", after):
    result = guest.sync(project, *script("echo ran"), options=BOTH)
  assert result.returncode == 125 and contents(project) == {"a": b"a", "z": b"z"}


def test_the_command_removes_the_folder_itself(guest, project):
  put(project, a="a", z="z")
  text = f'cd; rm -rf "$HOME/work/{project.name}"; exit 3'
  result = guest.sync(project, *script(text), options=BOTH)
  assert result.returncode in (3, 125), result.stderr
  assert result.returncode == 3 or contents(project) == {"a": b"a", "z": b"z"}
  assert "bug" not in result.stderr


# --- a machine that is kept ------------------------------------------------------------------


def test_deleted_here_is_deleted_there(guest, project):
  put(project, a="a", b="b", d__c="c", d__e__f="f")
  works(guest.sync(project, "true"))
  shutil.rmtree(project / "d")
  (project / "b").unlink()
  result = works(guest.sync(project, *script("find . -print")))
  assert sorted(result.stdout.split()) == [".", "./a"]
  assert contents(project) == {"a": b"a"}


def test_deleted_here_and_changed_there(guest, project):
  """It stays there, and it comes back or that is said."""
  put(project, a="a", b="b", d__c="c")
  works(guest.sync(project, "true"))
  works(guest.ssh(*script(f"cd work/{project.name}; echo theirs >b; echo theirs >d/new")))
  (project / "b").unlink()
  shutil.rmtree(project / "d")
  result = works(guest.sync(project, *script("cat b d/new; ls d")))
  assert result.stdout == "theirs\ntheirs\nnew\n"
  assert (project / "b").exists() or is_said(result, "b")


def test_changed_there_between_two_syncs(guest, project):
  """A command without --sync has changed it; here nothing has: `out` and `both` bring it."""
  put(project, a="a", b="b")
  works(guest.sync(project, "true"))
  works(guest.ssh(*script(f"cd work/{project.name}; echo theirs >a; echo new >n; rm b")))
  works(guest.sync(project, "true", options=OUT))
  assert contents(project) == {"a": b"theirs\n", "n": b"new\n", "b": b"b"}


def test_deleted_and_made_again_here(guest, project):
  put(project, a="a", d__b="b")
  works(guest.sync(project, "true"))
  shutil.rmtree(project / "d")
  works(guest.sync(project, "true"))
  put(project, d__b="again", d__c="new")
  result = works(guest.sync(project, *script("cat d/b d/c")))
  assert result.stdout == "againnew"


def test_two_folders_of_the_same_name(guest, project, tmp_path):
  """They were one in the guest: what is the one's came to the other."""
  one, other = tmp_path / "1" / project.name, tmp_path / "2" / project.name
  put(one, a="one", same="one", d__x="one")
  put(other, b="other", same="other")
  works(guest.sync(one, *script("echo made >made")))
  result = guest.sync(other, *script("find . -type f"), options=BOTH)
  if result.returncode == 0:
    assert sorted(result.stdout.split()) == ["./b", "./same"]
  else:  # also right: to refuse it
    assert result.returncode == 125 and project.name in result.stderr
  assert contents(other) == {"b": b"other", "same": b"other"}
  result = guest.sync(one, *script("cat same"), options=BOTH)
  assert contents(one) == {"a": b"one", "same": b"one", "d/x": b"one", "made": b"made\n"}
  assert result.returncode != 0 or result.stdout == "one"


def test_another_guest_of_the_same_name(guest, project):
  """What is remembered is of the copy that is there, not of the instance's name."""
  put(project, a="a", d__b="b")
  works(guest.sync(project, "true"))
  shutil.rmtree(guest.there(project))
  result = works(guest.sync(project, *script("find . -type f"), options=BOTH))
  assert sorted(result.stdout.split()) == ["./a", "./d/b"]
  assert contents(project) == {"a": b"a", "d/b": b"b"}


def test_a_copy_that_is_older_than_what_is_remembered(guest, project):
  """As after a snapshot of the machine was restored, or the folder unpacked from a backup."""
  put(project, a="1", b="1")
  works(guest.sync(project, "true"))
  there = guest.there(project)
  kept = there.parent / (there.name + ".kept")
  works(guest.ssh(*script(f"cd work; cp -Rp {there.name} {kept.name}")))
  put(project, a="2", c="2")
  works(guest.sync(project, "true"))
  works(guest.ssh(*script(f"cd work; rm -r {there.name}; mv {kept.name} {there.name}")))
  result = guest.sync(project, *script("cat a b c"), options=BOTH)
  assert (result.returncode, result.stdout) == (0, "212"), result.stderr
  assert contents(project) == {"a": b"2", "b": b"1", "c": b"2"}


# qvm's own -E comes after any that is given here, so that its log is what tells.
SSH = """#!/bin/bash
for word do [ "$before" != -E ] || log=$word; before=$word; done
[ "$log" ] || set -- -E "${{log:={logs}/log-$$}}" "$@"
/usr/bin/ssh -v "$@"
code=$?
cp "$log" "{logs}/$$"
exit $code
"""


@contextlib.contextmanager
def counted(guest, folder):
  """Counts what goes through ssh; a function that gives (sent, received) of all until then."""
  folder.mkdir()
  programs = folder / "bin"
  programs.mkdir()
  guest_tools.write(str(programs / "ssh"), SSH.format(logs=folder))
  path = guest.qvm.env["PATH"]
  guest.qvm.env["PATH"] = f"{programs}:{path}"

  def total():
    logs = [p.read_text(errors="replace") for p in folder.iterdir() if p.is_file()]
    found = [re.findall(r"Transferred: sent (\d+), received (\d+) bytes", log) for log in logs]
    assert any(found), "ssh has not said what it transferred"
    return sum(int(n) for one in found for pair in one for n in pair)

  try:
    yield total
  finally:
    guest.qvm.env["PATH"] = path


def stamps(folder):
  """What shows that a file was written anew: {path: (inode, status change)}."""
  found = {}
  for above, _, names in os.walk(str(folder)):
    for name in names:
      entry = os.lstat(os.path.join(above, name))
      found[os.path.relpath(os.path.join(above, name), str(folder))] = (
        entry.st_ino,
        entry.st_ctime_ns,
      )
  return found


def test_nothing_changed_costs_nothing(guest, project, tmp_path):
  for n in range(150):
    path = project / f"d{n % 7}" / f"f{n}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(20_000))
  with counted(guest, tmp_path / "log") as total:
    works(guest.sync(project, "true"))
    first = total()
    assert first > 3_000_000
    here, there = stamps(project), stamps(guest.there(project))
    works(guest.sync(project, "true"))
    second = total() - first
    assert (stamps(project), stamps(guest.there(project))) == (here, there)
    assert second < 200_000, second
    (project / "d1/f1").write_bytes(b"x" * 20_000)
    works(guest.sync(project, *script("echo new >n")))
    third = total() - first - second
    assert third < 300_000, third
  assert (guest.there(project) / "d1/f1").read_bytes() == b"x" * 20_000
  assert (project / "n").read_text() == "new\n"


def test_a_change_of_the_same_size_and_time_here(guest, project):
  """What was remembered of it is its status change and inode too, which nobody can set."""
  put(project, a="old", z="z")
  os.utime(project / "a", (1577836800, 1577836800))
  works(guest.sync(project, "true"))
  put(project, a="new")
  os.utime(project / "a", (1577836800, 1577836800))
  result = works(guest.sync(project, "cat a"))
  assert result.stdout == "new"


# Since TICK no time has passed, as far as files and the clock tell.
COARSE = """
import os, time
TICK = int(os.environ["TICK"])
def coarse(real):
  def call(*words, **more):
    found = real(*words, **more)
    times = {name: min(getattr(found, name + "_ns"), TICK * 10**9)
             for name in ("st_atime", "st_mtime", "st_ctime")}
    more = {name: ns / 1e9 for name, ns in times.items()}
    more.update((name + "_ns", ns) for name, ns in times.items())
    seconds = [ns // 10**9 for ns in times.values()]
    return os.stat_result((*found[:7], *seconds), {**more, "st_blocks": found.st_blocks})
  return call
for name in ("stat", "lstat", "fstat"):
  setattr(os, name, coarse(getattr(os, name)))
time.time = lambda: TICK + 1.0
"""


@on("freebsd")
def test_an_edit_within_a_tick_of_the_disk(guest, project, tmp_path):
  """FAT counts in two seconds: an edit of the same size then leaves all that lstat says."""
  (tmp_path / "site").mkdir()
  (tmp_path / "site" / "sitecustomize.py").write_text(COARSE)
  env = {"PYTHONPATH": str(tmp_path / "site"), "TICK": str(int(time.time()))}
  put(project, a="old")
  works(guest.sync(project, "true", env=env))
  put(project, a="new")
  assert works(guest.sync(project, "cat a", env=env)).stdout == "new"
  works(guest.sync(project, "echo out >a", env=env))
  assert (project / "a").read_text() == "out\n"


# --- the host's names ------------------------------------------------------------------------


@on("freebsd", "openbsd")
def test_git_in_any_spelling(guest, project):
  put(project, a="a", _git__config="mine")
  before = tree(project / ".git")
  text = r"""for g in .git .GIT .Git ".gi$(printf '\342\200\214')t"; do
             mkdir -p "$g/hooks" "d/$g"; echo theirs >"$g/hooks/post-checkout"
             echo theirs >"d/$g/config"; done; echo new >n"""
  result = works(guest.sync(project, *script(text), options=BOTH))
  assert tree(project / ".git") == before
  for above, folders, _ in os.walk(project):
    for name in folders:
      plain = name.replace("\u200c", "").casefold()
      assert plain != ".git" or (name == ".git" and above == str(project)), name
  assert (project / "n").read_text() == "new\n" and ".GIT" in result.stderr


@on("freebsd", "openbsd", "omnios", "haiku")
def test_names_of_any_bytes(guest, project):
  with open(os.fsencode(project) + b"/\xff\xfe", "wb") as file:
    file.write(b"mine")
  put(project, a="a")
  text = r"""printf x >"$(printf '\303')"; printf x >"$(printf 'a\nb\303')"; printf y >' '
             printf z >'\'; printf back >"$(printf '\377\376')"; printf d >-d; printf q >"*"
             printf e >\;"""
  works(guest.sync(project, *script(text), options=BOTH))
  assert contents(project) == {"\udcff\udcfe": b"back", "a": b"a", "\udcc3": b"x",
                               "a\nb\udcc3": b"x", " ": b"y", "\\": b"z", "-d": b"d", "*": b"q",
                               ";": b"e"}  # fmt: skip


def test_a_path_of_over_1000_characters(guest, project):
  """The host allows 4,096; what a guest does not is said, and costs nothing else."""
  deep = project.joinpath(*["d" * 200] * 8)
  deep.mkdir(parents=True)
  (deep / "f").write_text("deep")
  put(project, a="a", z="z")
  result = works(guest.sync(project, *script("cat a z; echo new >n"), options=BOTH))
  assert result.stdout == "az"
  assert (deep / "f").read_text() == "deep" and (project / "n").read_text() == "new\n"
  there = guest.there(project).joinpath(*["d" * 200] * 8) / "f"
  assert there.exists() or is_said(result, "d" * 40)


DIG = """
import os
for _ in range({count}):
  os.mkdir("{name}")
  os.chdir("{name}")
open("f", "w").close()
"""


def nested(name, count):
  """A line that makes folders in one another and a file in the last, however long the path."""
  return f"{sys.executable} -IS -c '{DIG.format(name=name, count=count)}'"


def test_a_deep_path_is_made_there(guest, project):
  put(project, a="a")
  text = nested("d" * 150, 8) + "; echo new >z; exit 3"
  result = works(guest.sync(project, *script(text)), 3)
  assert (project / "z").read_text() == "new\n"
  deep = project.joinpath(*["d" * 150] * 8) / "f"
  assert deep.exists() or is_said(result, "d" * 40)


@on("haiku", "freebsd")
def test_a_path_that_the_host_does_not_allow(guest, project):
  """More than 4,096 bytes: it stays in the guest, is said, and costs nothing else."""
  put(project, a="a")
  text = nested("d" * 200, 30) + "; echo new >z; exit 3"
  try:
    result = works(guest.sync(project, *script(text)), 3)
    assert (project / "z").read_text() == "new\n" and is_said(result, "d" * 40)
  finally:
    subprocess.run(["rm", "-rf", str(guest.there(project)), str(project)], check=True)


# --- bounds on the host ----------------------------------------------------------------------


def member(name, content=b"x", kind=tarfile.REGTYPE):
  info = tarfile.TarInfo(name)
  info.size, info.type, info.mode = len(content), kind, 0o644
  return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def pax_global(content):
  info = tarfile.TarInfo("g")
  info.type, info.size = tarfile.XGLTYPE, len(content)
  return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def sparse(size, hole):
  """GNU's sparse file of the old kind: `size` bytes, of which the last 512 are data."""
  info = tarfile.TarInfo("holes")
  info.type, info.size, info.mode = tarfile.GNUTYPE_SPARSE, 512, 0o644
  block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
  block[386:398], block[398:410] = b"%011o\0" % hole, b"%011o\0" % 512
  block[483:495] = b"%011o\0" % size
  block[148:156] = b" " * 8
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block) + b"y" * 512


CHAINS = {
  "globals": lambda: pax_global(b"30 comment=" + b"x" * 18 + b"\n") * 40_000,
  "long names": lambda: member("././@LongLink", b"n" * 100_000 + b"\0", b"L") * 800,
  "headers": lambda: member("x", b"30 comment=" + b"x" * 18 + b"\n", b"x") * 40_000,
}


def limits(memory=None, file=None):
  def apply():
    if memory:
      resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if file:
      resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))

  return apply


@on("freebsd")
@pytest.mark.parametrize("case", list(CHAINS))
def test_headers_that_chain(guest, project, case, tmp_path):
  """770 MiB of memory, or "a bug in qvm"."""
  put(project, a="old")
  (tmp_path / "stream").write_bytes(CHAINS[case]() + member("last") + bytes(1024))
  with at_writing(guest, f"exec cat {tmp_path}/stream"):
    result = guest.sync(
      project, *script("echo new >a; exit 3"), preexec_fn=limits(memory=300 << 20)
    )
  assert result.returncode in (3, 125), result.stderr
  assert "bug" not in result.stderr and "Memory" not in result.stderr, result.stderr


@on("freebsd")
def test_holes_stay_holes(guest, project, tmp_path):
  """1 GiB of written zeros from 10 kB of stream."""
  put(project, a="old")
  (tmp_path / "stream").write_bytes(
    sparse((1 << 30) + 512, 1 << 30) + member("a", b"new\n") + bytes(1024)
  )
  with at_writing(guest, f"exec cat {tmp_path}/stream"):
    result = guest.sync(project, *script("echo new >a; echo x >holes; exit 3"))
  assert result.returncode in (3, 125), result.stderr
  if (project / "holes").exists():
    assert (project / "holes").stat().st_blocks * 512 < 1 << 20
  assert (project / "a").read_text() == "new\n" or result.returncode == 125


@on("freebsd", "netbsd")
def test_what_the_guest_says_does_not_fill_the_disk(guest, project):
  """564 MiB of its stderr lay in the folder for temporary files; a tail is enough."""
  put(project, a="old")
  flood = 'i=0; while [ $i -lt 200 ]; do echo "%s" >&2; i=$((i + 1)); done' % ("noise " * 20_000)
  with at_writing(guest, f'{flood}; echo "the last words" >&2; exec {{real}} "$@"'):
    result = guest.sync(project, *script("echo new >a; exit 3"), preexec_fn=limits(file=4 << 20))
  assert result.returncode in (3, 125), result.stderr[-3000:]
  assert (project / "a").read_text() == "new\n"
  assert len(result.stderr) < 200_000 and "bug" not in result.stderr


@on("freebsd", "haiku")
def test_very_many_folders_in_one_another(guest, project):
  """A RecursionError was "a bug in qvm"."""
  put(project, a="a")
  deep = project.joinpath(*["d"] * 1200)
  try:
    subprocess.run(["mkdir", "-p", str(deep)], check=True)  # makedirs() goes down by recursion
    result = works(guest.sync(project, *script("echo new >z; exit 3"), options=BOTH), 3)
    assert (project / "z").read_text() == "new\n" and deep.is_dir()
    text = nested("e", 1200) + "; exit 3"
    result = works(guest.sync(project, *script(text)), 3)
    assert project.joinpath(*["e"] * 1200).is_dir() or is_said(result, "e/e")
  finally:
    subprocess.run(["rm", "-rf", str(guest.there(project)), str(project)], check=True)


# --- signals ---------------------------------------------------------------------------------


@on(*guest_tools.SYSTEMS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command(guest, project, number):
  put(project, a="old")
  text = """trap 'echo got >>a; exit 9' INT TERM; echo up; while :; do sleep 0.1; done"""
  words = ("ssh", "--sync", str(project), "vm", "--", *script(text))
  process = guest.qvm.start(*words)
  with ended(process):
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 9, err
  assert (project / "a").read_text() == "oldgot\n"


@on("omnios", "freebsd")
def test_a_command_that_sigterm_ends(guest, project):
  process = guest.qvm.start("ssh", "vm", "--", *script("echo up; exec sleep 600"))
  with ended(process):
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 143, err


@on("freebsd", "omnios")
def test_the_session_that_waits_is_lost(guest, project):
  """While the command ran: another one brings what it has made."""
  put(project, a="old")
  works(guest.sync(project, "true"))
  with running(guest, project, "echo new >a; exit 3") as step:
    sessions = processes_of(str(guest.qvm.home.parent))
    [waits] = [pid for pid, words in sessions.items() if "LC_ALL=C" in words and "ssh\0-T" in words]
    os.kill(waits, signal.SIGKILL)
    works(step(), 3)
  assert (project / "a").read_text() == "new\n"


# --- what two do at the same time ------------------------------------------------------------


@on("freebsd", "netbsd")
def test_what_moved_onto_a_file_that_was_changed_here(guest, project):
  """The guest's only copy of it stays there, so that the one here must stay, too."""
  put(project, moved="only copy", onto="old")
  works(guest.sync(project, "true"))
  with running(guest, project, "mv moved onto", options=BOTH) as step:
    (project / "onto").write_text("my own")
    result = works(step())
  assert contents(project) == {"moved": b"only copy", "onto": b"my own"}
  assert "onto has changed here and in the guest" in result.stderr


@on("freebsd", "netbsd")
def test_what_moved_into_a_folder_that_may_not_come(guest, project):
  put(project, moved="only copy", z="z")
  result = works(guest.sync(project, *script("mkdir .GIT && mv moved .GIT/x"), options=BOTH))
  assert contents(project) == {"moved": b"only copy", "z": b"z"}
  assert ".GIT stays in the guest" in result.stderr


@on("freebsd", "openbsd")
def test_a_file_in_the_way_of_a_folder_is_said_once(guest, project):
  put(project, f="old")
  works(guest.sync(project, "true"))
  with running(guest, project, "rm f; mkdir f; for n in 1 2 3 4 5 6; do : >f/$n; done") as step:
    (project / "f").write_text("my own")
    result = works(step())
  assert contents(project) == {"f": b"my own"}
  assert result.stderr.count("has changed here and in the guest") == 1, result.stderr


@on("freebsd", "omnios")
def test_what_another_command_writes_while_the_folder_goes_there(guest, project):
  """Both sides must not be taken for the same because the guest listed it afterwards."""
  put(project, a="1", log="old")
  works(guest.sync(project, "true"))
  (project / "a").write_text("2")
  log = guest.there(project, "log")
  with guest.tool("tar", f'{{real}} "$@" || exit\ncase $1 in -x*) echo new >"{log}" ;; esac\n'):
    works(guest.sync(project, "true"))
  works(guest.sync(project, "true"))
  assert contents(project) == contents(guest.there(project)) == {"a": b"2", "log": b"new\n"}


@on("haiku")
def test_a_file_that_is_sent_twice_in_the_place_of_a_folder(guest, project):
  """The newer one takes its place once the folder is empty."""
  put(project, d__x="old", z="z")
  works(guest.sync(project, "true"))
  twice = 'case $1 in -c*) {real} "$@"; echo newer >d ;; esac\nexec {real} "$@"'
  with guest.tool("tar", twice):
    works(guest.sync(project, *script("rm -r d; echo new >d"), options=BOTH))
  assert contents(project) == {"d": b"newer\n", "z": b"z"}


@on("freebsd", "omnios")
def test_a_file_that_is_deleted_while_the_folder_is_read(guest, project):
  """The guest's older copy does not bring it back."""
  put(project, z="old")
  works(guest.sync(project, "true"))
  put(project, z="newer")
  with open(project / "a", "wb") as file:
    file.truncate(40 << 20)  # does not fit into what lies between qvm and tar
  with at_reading(guest, f"/bin/rm -f {project}/z"):
    result = works(guest.sync(project, "true"))
  assert is_said(result, "z has vanished")
  assert os.listdir(project) == ["a"]


@on("freebsd")
def test_how_to_get_results_that_could_not_come(guest, project):
  """The same command once more would replace them by what is here."""
  put(project, a="old")
  project.chmod(0o555)
  result = guest.sync(project, *script("echo new >a"), preexec_fn=obey_modes)
  assert result.returncode == 125 and "--sync-direction out" in result.stderr, result.stderr
  project.chmod(0o755)
  works(guest.sync(project, "true", options=OUT))
  assert contents(project) == {"a": b"new\n"}


@on("omnios", "haiku")
def test_a_shell_that_does_not_wait_for_long(guest, project):
  """TMOUT, which the environment of all sessions may have, ends a read of bash and of ksh93."""
  put(project, a="1")
  works(guest.sync(project, "true"))
  login, sessions = guest.folder / "real" / "login", guest.qvm.env["TMPDIR"] + "/qvm-ssh-"
  text = login.read_text()
  try:
    login.write_text(text.replace("unset ", "TMOUT=1; export TMOUT\nunset ", 1))
    with running(guest, project, "echo 2 >a; : >made", options=("-e", "TMOUT=0")) as step:
      wait_for(lambda: len(processes_of(sessions)) == 1)  # the command's own
      works(step())
  finally:
    login.write_text(text)
  assert contents(project) == {"a": b"2\n", "made": b""}


# --- anything at all -------------------------------------------------------------------------

# Few names, so that the changes meet.
NAMES = st.sampled_from(["a", "b", "a", "b", "a", "b", "c d", "é", "-e", LONG])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
CHANGES = st.one_of(
  st.tuples(st.just("write"), PATHS, st.sampled_from(["1", "22", ""])),
  st.tuples(st.just("write"), PATHS, st.sampled_from(["1", "22", ""])),
  st.tuples(st.just("mkdir"), PATHS, st.just("")),
  st.tuples(st.just("link"), PATHS, st.sampled_from(["a", "t" * 120])),
  st.tuples(st.just("rm"), PATHS, st.just("")),
  st.tuples(st.just("mv"), PATHS, PATHS),
  st.tuples(st.just("over"), PATHS, PATHS),
  st.tuples(st.just("chmod"), PATHS, st.sampled_from(["755", "700", "555"])),
)
ROUNDS = st.lists(
  st.tuples(st.lists(CHANGES, max_size=8), st.lists(CHANGES, max_size=4), st.booleans()),
  min_size=1,
  max_size=3,
)


def quoted(text):
  return "'" + text.replace("'", "'\\''") + "'"


def as_script(changes):
  """Lines for any sh that make the changes, where they can be made."""
  lines = ["umask 022"]
  for what, path, value in changes:
    p, v = quoted("./" + path), quoted(value)
    above = quoted(os.path.dirname("./" + path))
    lines.append(
      {
        "write": f"mkdir -p {above} && rm -rf {p} && printf %s {v} >{p}",
        "mkdir": f"mkdir -p {p}",
        "link": f"mkdir -p {above} && rm -rf {p} && ln -s {v} {p}",
        "rm": f"rm -rf {p}",
        "over": f"rm -rf {quoted('./' + value)} && mv {p} {quoted('./' + value)}",
        "mv": f"[ ! -e {quoted('./' + value)} ] && mv {p} {quoted('./' + value)}",
        "chmod": f"[ ! -h {p} ] && chmod {value} {p}",
      }[what]
      + " 2>/dev/null"
    )
  return "\n".join(lines) + "\n:"


def locally(folder, changes):
  """The same here, as a user whom modes tell what he may do."""
  subprocess.run(["/bin/sh", "-c", as_script(changes)], cwd=str(folder), check=True,
                 preexec_fn=obey_modes)  # fmt: skip


def open_all(folder):
  for above, _, _ in os.walk(str(folder)):
    os.chmod(above, 0o755)


def as_expected(guest, project, expected, before, result, delete):
  """The five rules: all that the command has made is here or said; nothing else is lost."""
  found = tree(project)
  for path, entry in expected.items():
    assert found.get(path) == entry or is_said_below(result, path), f"{path} has not come: {entry}"
  for path, entry in before.items():
    if path not in expected and not delete and path not in found:
      kept = any(above in expected for above in parents(path))
      assert kept, f"{path} was deleted though nobody asked for it"
    if path not in expected and delete:
      assert path not in found or result.stderr, f"{path} is still here"
    if path in expected and expected[path] == entry:
      assert found.get(path) == entry, f"{path} was lost"
  for path in set(found) - set(expected) - set(before):
    # What once could not come keeps its folders there; deleted here, they come again.
    held = re.search(f"^qvm: {re.escape(path)}/.* stays in the guest", result.stderr, re.MULTILINE)
    assert held, f"{path} came from nowhere"


def parents(path):
  parts = path.split("/")
  return ["/".join(parts[:n]) for n in range(1, len(parts))]


def is_said_below(result, path):
  """It is said, or what it is in."""
  return any(re.search(re.escape(part[:40]), result.stderr) for part in [path, *parents(path)])


# Not shrunk: each example takes seconds.
@settings(
  deadline=None,
  max_examples=6,
  phases=[Phase.generate],
  suppress_health_check=list(HealthCheck),
)
@given(rounds=ROUNDS)
def test_any_changes_on_both_sides(guest, tmp_path_factory, rounds):
  """Rounds of a change here, then a command that changes there, against the same done here."""
  project = tmp_path_factory.mktemp("any") / f"p{next(NUMBERS)}"
  project.mkdir()
  model = Path(str(project) + ".model")
  for here, there, delete in rounds:
    locally(project, here)
    before = tree(project)
    # What a command without --sync-delete has deleted is still here, and goes there again.
    subprocess.run(["cp", "-a", str(project), str(model)], check=True)
    locally(model, there)
    expected = tree(model)
    open_all(model)
    shutil.rmtree(model)
    text = as_script(there) + "\nexit 5"
    result = guest.sync(project, *script(text), options=BOTH if delete else ())
    works(result, 5)
    as_expected(guest, project, expected, before, result, delete)


def test_the_model_sees_a_loss(tmp_path):
  """The check itself: a file that is neither here nor said."""
  entry = (stat.S_IFREG, 0o644, b"x")
  silent = subprocess.CompletedProcess([], 0, "", "")
  with pytest.raises(AssertionError, match="a has not come"):
    as_expected(None, tmp_path, {"a": entry}, {}, silent, False)
  with pytest.raises(AssertionError, match="b was deleted"):
    as_expected(None, tmp_path, {}, {"b": entry}, silent, False)
