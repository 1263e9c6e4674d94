"""--sync: a folder to the guest and back, and what a hostile guest might send."""

import contextlib
import errno
import io
import os
import shutil
import stat
import subprocess
import tarfile
import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import AFTER, DEADLINE, contents, fails, lines, obey_modes, tree, works
from support_pythons import MODERN, every_python

import qvm as qvm_source

LONG = "x" * 200


@pytest.fixture
def project(tmp_path):
  """A folder with all that is hard to carry."""
  folder = tmp_path / "my proj'ect"
  for path in ("src/deep", "empty", ".git", "na me", f"{LONG}/{LONG}"):
    (folder / path).mkdir(parents=True)
  (folder / "src/main.c").write_text("main\n")
  (folder / "src/main.c").chmod(0o640)
  (folder / "src/tool").write_bytes(bytes(range(256)) * 3000)
  (folder / "src/tool").chmod(0o755)
  (folder / "src/all").write_text("may all\n")
  (folder / "src/all").chmod(0o777)
  (folder / "src/deep/old").write_text("old\n")
  os.utime(folder / "src/deep/old", (1577836800, 1577836800))
  (folder / "empty").chmod(0o750)
  (folder / ".git/config").write_text("secret\n")
  (folder / "na me/new\nline").write_text("x")
  (folder / LONG / LONG / "file").write_text("long\n")
  (folder / "é ü").write_text("umlauts\n")
  (folder / "-dash").write_text("dash\n")
  (folder / "empty file").write_text("")
  with open(os.fsencode(folder) + b"/\xff\xfe", "wb") as file:
    file.write(b"no text")
  (folder / "link").symlink_to("src/main.c")
  (folder / "up").symlink_to("../elsewhere")
  (folder / "absolute").symlink_to("/etc/passwd")
  return folder


def there(guests, project):
  return guests.folder / "home" / "runner" / "work" / project.name


# --- there and back --------------------------------------------------------------------------


def test_a_folder_arrives_whole(guests, project):
  os.mkfifo(project / "pipe")
  result = guests.run("pwd", options=("--sync", str(project)))
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"{there(guests, project)}\n"
  assert f"{project}/pipe is no file, folder or link: it stays here" in lines(result.stderr)
  expected = {k: v for k, v in tree(project).items() if not k.startswith((".git", "pipe"))}
  assert tree(there(guests, project)) == expected
  assert (there(guests, project) / "src/deep/old").stat().st_mtime == 1577836800


def test_what_the_command_changes_comes_back(guests, project):
  before = tree(project)
  times = {path: os.lstat(project / path).st_mtime_ns for path in before}
  script = """
    echo changed >>src/main.c; chmod 700 src/all; rm src/tool; mkdir -p d1/d2 d3; chmod 700 d3
    echo new >'d1/d2/n
e w'; ln -s ../src/main.c d1/l; ln -sf src/all link; ln src/main.c hard; : >none; rm -r empty
    printf x >"$(printf '\\377')"; mkdir .git; echo theirs >.git/config; mkfifo fifo
  """
  result = guests.run(script + "exit 9", options=("--sync", str(project)))
  assert result.returncode == 9, result.stderr
  folder, file, link = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK
  new = {
    "src/main.c": (file, 0o640, b"main\nchanged\n"),
    "src/all": (file, 0o700, b"may all\n"),
    "d1": (folder, 0o755, None),
    "d1/d2": (folder, 0o755, None),
    "d1/d2/n\ne w": (file, 0o644, b"new\n"),
    "d1/l": (link, 0, "../src/main.c"),
    "d3": (folder, 0o700, None),
    "link": (link, 0, "src/all"),
    "hard": (file, 0o640, b"main\nchanged\n"),
    "none": (file, 0o644, b""),
    "\udcff": (file, 0o644, b"x"),
  }
  assert tree(project) == {**before, **new}
  for path in set(before) - set(new) - {"", "src", "empty", ".git"}:
    if before[path][0] == file:
      assert os.lstat(project / path).st_mtime_ns == times[path], path


def test_what_is_deleted_there_only_goes_if_asked(guests, project):
  guests.up()
  words = ("ssh", "vm", "--sync", str(project), "--", "rm -rf ./*; mkdir keep")
  before = tree(project)
  works(guests.qvm(*words))
  assert set(tree(project)) == set(before) | {"keep"}
  works(guests.qvm(*words[:2], "--sync-delete", *words[2:]))
  assert set(tree(project)) == {".git", ".git/config", "keep"}


def test_half_files_of_a_killed_qvm_stay_here(guests, project):
  """They have names that nothing else has; other names that begin like them are the user's."""
  half, others = "src/.qvm-0123456789ab", (".qvm-notes", ".qvm-0123456789abcdef")
  for name in (half, *others):
    (project / name).write_text("x" * 9)
  works(guests.run("echo y >.qvm-notes", options=("--sync", str(project))))
  assert not (there(guests, project) / half).exists() and (project / half).read_text() == "x" * 9
  assert [(project / name).read_text() for name in others] == ["y\n", "x" * 9]


@pytest.mark.parametrize("way, here, in_guest", [("in", False, True), ("out", True, False)])
def test_one_way(guests, project, way, here, in_guest):
  guests.up()
  options = ("--sync", str(project), "--sync-direction", way)
  line = "mkdir -p ~/work; cd ~/work && ls */src | wc -l; echo made >made"
  if way == "out":
    works(guests.qvm("ssh", "vm", "--", f'mkdir -p ~/work/"{project.name}"'))
  result = works(guests.qvm("ssh", *options, "vm", "--", "ls | wc -l; echo made >made"))
  assert (int(result.stdout) > 5) == in_guest, line
  assert (project / "made").exists() == here


def test_out_brings_what_an_earlier_command_has_made(guests, tmp_path):
  guests.up()
  (tmp_path / "p").mkdir()
  works(guests.qvm("ssh", "vm", "--", "mkdir -p work/p/d; echo a >work/p/d/a; ln -s d work/p/l"))
  works(guests.qvm("ssh", "vm", "--sync", str(tmp_path / "p"), "--sync-direction", "out"))
  assert (tmp_path / "p/d/a").read_text() == "a\n" and os.readlink(tmp_path / "p/l") == "d"


def test_a_folder_that_may_only_be_listed(offline, tmp_path):
  (tmp_path / "p/closed").mkdir(parents=True)
  (tmp_path / "p/closed/file").write_text("x")
  (tmp_path / "p/closed").chmod(0o400)
  words = ("run", "--rm", "--sync", str(tmp_path / "p"), "freebsd", "15.1", "--", "true")
  result = offline(*words, preexec_fn=obey_modes)
  fails(result, str(tmp_path / "p/closed"), "--sync-exclude /closed", code=125)


def test_patterns(guests, tmp_path):
  folder = tmp_path / "p"
  for path in ("a/node_modules/x", "a/b/c", "build/x", "a/build/x", "k.o", "a/k.o", "sub/.git/x"):
    (folder / path).mkdir(parents=True)
    (folder / path / "file").write_text("mine\n")
  options = ["--sync", str(folder)]
  for pattern in ("node_modules/", "/build", "*.o", "a/b/c"):
    options += ["--sync-exclude", pattern]
  line = "find . -name file; mkdir build; for d in $(find . -type d); do echo new >$d/new; done"
  result = works(guests.run(line, options=options))
  assert sorted(result.stdout.split()) == ["./a/build/x/file"]
  assert {path for path in tree(folder) if path.endswith("new")} == {
    "new", "a/new", "a/b/new", "a/build/new", "a/build/x/new", "sub/new",
  }  # fmt: skip


def test_very_many_that_stay_here_are_not_all_named(guests, tmp_path):
  (tmp_path / "p").mkdir()
  for n in range(57):
    os.mkfifo(tmp_path / f"p/{n:02}")
  result = works(guests.run("ls | wc -l", options=("--sync", str(tmp_path / "p"))))
  assert result.stdout.strip() == "0"
  named = [line for line in result.stderr.splitlines() if "is no file, folder or link" in line]
  assert len(named) == 51 and named[-1].startswith("qvm: and 7 more")


def test_a_folder_that_vanishes_while_it_is_looked_at(guests, tmp_path):
  for name in ("d", "e"):
    (tmp_path / f"p/{name}").mkdir(parents=True)
    (tmp_path / f"p/{name}/x").write_text("x")
  action = f"import shutil; shutil.rmtree({str(tmp_path / 'p/d')!r}, True)"
  code = AFTER.format(name="entries_of", action="found = list(found); " + action)
  guests.up()
  words = ("ssh", "vm", "--sync", str(tmp_path / "p"), "--", "find . -type f; echo new >new")
  assert works(guests.qvm(*words, code=code)).stdout == "./e/x\n"
  assert (tmp_path / "p/new").read_text() == "new\n"


def test_a_file_that_may_not_be_read_any_more(guests, tmp_path):
  (tmp_path / "p").mkdir()
  (tmp_path / "p/a").write_text("x")
  code = AFTER.format(name="Sync.sendable", action=f"os.chmod({str(tmp_path / 'p/a')!r}, 0)")
  guests.up()
  words = ("ssh", "vm", "--sync", str(tmp_path / "p"), "--", "echo ran")
  result = guests.qvm(*words, code=code, preexec_fn=obey_modes)
  fails(result, str(tmp_path / "p/a"), "Permission denied", "--sync-exclude /a", code=125)
  assert result.stdout == ""


def test_what_may_not_be_deleted_here_stays_and_is_named(guests, tmp_path):
  """It is another user's folder, in which this one may do nothing but read."""
  if os.geteuid() != 0:
    pytest.skip("only root has folders of others")
  (tmp_path / "p/d").mkdir(parents=True)
  (tmp_path / "p/d/x").write_text("x")
  (tmp_path / "p/y").write_text("y")
  os.chown(tmp_path / "p/d", 12345, 12345)
  guests.up()
  words = ("ssh", "vm", "--sync", str(tmp_path / "p"), "--sync-delete", "--", "rm d/x y")
  result = works(guests.qvm(*words, preexec_fn=obey_modes))
  assert f"{tmp_path / 'p/d/x'} stays here: Permission denied" in result.stderr
  assert contents(tmp_path / "p") == {"d": None, "d/x": b"x"}


def test_changed_here_meanwhile(guests, tmp_path):
  """What was changed on both sides stays as it is here, and that is said; then nothing goes."""
  folder = tmp_path / "p"
  folder.mkdir()
  for name in ("both", "here", "there", "gone", "moved"):
    (folder / name).write_text("old\n")
  script = "echo up; read x; for f in both there new; do echo theirs >$f; done; rm gone moved"
  options = ("--sync", str(folder), "--sync-delete")
  process = guests.start("sh", "-c", script, options=options, stdin=subprocess.PIPE)
  assert process.stdout.readline() == "up\n"
  for name in ("both", "here", "new", "gone"):
    (folder / name).write_text("my own\n")
  out, err = process.communicate("\n", timeout=DEADLINE)
  assert process.returncode == 0, err
  said = [line for line in lines(err) if "stays as it is" in line]
  assert sorted(os.path.basename(line.split()[0]) for line in said) == ["both", "new"]
  assert "nothing is deleted here, as not all has come" in lines(err)
  assert {name: (folder / name).read_text() for name in os.listdir(folder)} == {
    "both": "my own\n", "here": "my own\n", "there": "theirs\n", "new": "my own\n",
    "gone": "my own\n", "moved": "old\n",
  }  # fmt: skip


def test_a_file_that_becomes_a_folder_and_back(guests, tmp_path):
  folder = tmp_path / "p"
  (folder / "d").mkdir(parents=True)
  (folder / "f").write_text("file\n")
  (folder / "l").symlink_to("f")
  script = "rm -r f d l; mkdir f l; echo in >f/in; echo in >l/in; echo file >d"
  works(guests.run(script, options=("--sync", str(folder))))
  assert contents(folder) == {
    "f": None, "f/in": b"in\n", "l": None, "l/in": b"in\n", "d": b"file\n",
  }  # fmt: skip


def test_a_folder_that_stays_because_something_is_in_it(guests, tmp_path):
  folder = tmp_path / "p"
  (folder / "d").mkdir(parents=True)
  (folder / "d/kept").write_text("mine\n")
  options = ("--sync", str(folder), "--sync-direction", "out")
  line = "rm -rf ~/work/p/*; echo file >d"
  guests.up()
  works(guests.qvm("ssh", "vm", "--sync", str(folder), "--sync-direction", "in"))
  result = works(guests.qvm("ssh", "vm", *options, "--", line))
  assert "d is a folder here" in result.stderr
  assert (folder / "d/kept").read_text() == "mine\n"


def test_what_is_made_between_two_syncs_of_nothing(guests, tmp_path):
  """Once a folder has been synchronised, what is new in the guest comes, even if it was empty."""
  (tmp_path / "p").mkdir()
  guests.up()
  words = ("ssh", "vm", "--sync", str(tmp_path / "p"), "--", "true")
  works(guests.qvm(*words))
  works(guests.qvm("ssh", "vm", "--", "echo x >work/p/made"))
  works(guests.qvm(*words))
  assert (tmp_path / "p/made").read_text() == "x\n"


def test_a_command_that_changes_at_once(guests, tmp_path):
  """The mark and the change may not fall into the same tick of the guest's clock."""
  (tmp_path / "p").mkdir()
  (tmp_path / "p/f").write_text("0")
  guests.up()
  for n in range(1, 6):
    works(guests.qvm("ssh", "vm", "--sync", str(tmp_path / "p"), "--", f"printf {n} >f"))
    assert (tmp_path / "p/f").read_text() == str(n)


def test_an_interactive_shell_in_the_folder(guests, project):
  guests.up()
  words = ("ssh", "vm", "--sync", str(project))
  result = works(guests.qvm(*words, input="pwd; echo x >typed\n"))
  assert result.stdout == f"{there(guests, project)}\n"
  assert (project / "typed").read_text() == "x\n"


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("shell, file", [("/bin/zsh", ".zshenv"), ("/bin/csh", ".cshrc")])
def test_a_shell_that_greets(guests, project, shell, file):
  """What the user's shell prints at its start is no part of the streams."""
  guests.play(shell=shell)
  guests.up()
  (guests.folder / "home/runner" / file).write_text("echo good morning\necho ready\n")
  words = ("ssh", "vm", "--sync", str(project), "--sync-delete", "--", "rm src/all; echo x >made")
  works(guests.qvm(*words))
  assert (project / "made").read_text() == "x\n" and not (project / "src/all").exists()


def test_a_guest_without_tar(guests, project):
  guests.up()
  guests.put_tool("tar", "echo no tar today >&2; exit 127")
  before = tree(project)
  result = guests.qvm("ssh", "vm", "--sync", str(project), "--", "echo ran")
  fails(result, "cannot be copied to vm", "no tar today", code=125)
  assert tree(project) == before


def test_a_list_that_is_cut_short_is_none():
  """Else what it lacks would be gone in the guest."""
  whole = b"//d 755 0 1/2/3 .\n//- 644 7 4/5.5/6.5 ./a b\n//- 644 7 4/5.5/6.5 ./c\n//end 0\n"
  listing = qvm_source.read_list(io.BytesIO(whole))
  assert listing.complete and list(listing.entries) == ["a b", "c"]
  for end in range(whole.index(b"//end")):
    assert qvm_source.read_list(io.BytesIO(whole[:end])) is None
  for last in (b"//end 1\n", b"//end 0\n".replace(b"0", b"")):
    assert not qvm_source.read_list(io.BytesIO(whole.replace(b"//end 0\n", last))).complete


def test_a_tar_that_writes_nothing(guests, tmp_path):
  guests.up()
  guests.put_tool("tar", "cat >/dev/null")
  (tmp_path / "p").mkdir()
  for n in range(12):
    (tmp_path / f"p/{n:02}").write_text("x")
  result = guests.qvm("ssh", "vm", "--sync", str(tmp_path / "p"), "--", "echo ran")
  fails(result, "12 of 12 are not there: 00, 01, 02, 03, 04, 05, 06, 07, 08, 09, ...", code=125)
  assert result.stdout == ""


def test_a_tar_that_writes_half_a_file(guests, tmp_path):
  """And says that all is well, as on a disk that is full."""
  guests.up()
  guests.put_tool("tar", '/bin/tar "$@"\ncase $1 in -x*) truncate -s 4 b ;; esac')
  (tmp_path / "p").mkdir()
  for name in ("a", "b"):
    (tmp_path / "p" / name).write_text("whole file")
  result = guests.qvm("ssh", "vm", "--sync", str(tmp_path / "p"), "--", "echo ran")
  fails(result, "1 of 2 are not there: b", code=125)
  assert result.stdout == ""


def busybox(guests):  # noqa: F811
  """A guest whose find and stat tell nothing but names and kinds."""
  guests.put_tool("find", 'case "$*" in *printf\\ *%y*) exit 1;; esac\nexec /usr/bin/find "$@"')


def test_a_guest_that_tells_no_times(guests, project):  # noqa: F811
  """Then all goes and comes, and what is the same is left alone."""
  guests.up()
  busybox(guests)
  before = {path: os.lstat(project / path).st_mtime_ns for path in tree(project)}
  words = ("ssh", "vm", "--sync", str(project), "--sync-delete", "--")
  result = works(guests.qvm(*words, "echo x >made; rm src/all; chmod 500 empty; mkdir -p d/e"))
  assert result.stderr == "" and (project / "d/e").is_dir()
  assert (project / "made").read_text() == "x\n" and not (project / "src/all").exists()
  files = [p for p in before if p != "src/all" and not os.path.isdir(project / p)]
  assert {path: os.lstat(project / path).st_mtime_ns for path in files} == {
    path: before[path] for path in files
  }
  (project / "made").unlink()
  works(guests.qvm(*words, "echo y >made"))
  assert (project / "made").read_text() == "y\n"


def test_a_file_that_may_not_be_read(guests, tmp_path):

  folder = tmp_path / "p"
  folder.mkdir()
  (folder / "closed").write_text("x")
  (folder / "closed").chmod(0)
  guests.up()
  result = guests.qvm("ssh", "vm", "--sync", str(folder), "--", "true", preexec_fn=obey_modes)
  fails(result, str(folder / "closed"), "Permission denied", code=125)


def test_a_folder_that_may_not_be_written(guests, tmp_path):

  folder = tmp_path / "p"
  folder.mkdir()
  guests.up()
  folder.chmod(0o555)
  words = ("ssh", "vm", "--sync", str(folder), "--", "echo x >made")
  result = guests.qvm(*words, preexec_fn=obey_modes)
  assert result.returncode == 125
  assert f"{folder / 'made'}: Permission denied" in result.stderr  # said by name, then the error
  assert "ended with exit code 0" in result.stderr
  folder.chmod(0o755)


def test_a_machine_that_dies_while_files_go_there(guests, tmp_path):
  folder = tmp_path / "p"
  folder.mkdir()
  with open(folder / "big", "wb") as file:
    file.truncate(1 << 34)  # 16 GB: it is not through before the machine is dead
  (guests.folder / "bin").mkdir(parents=True)
  process = guests.start("true", options=("--sync", str(folder)))
  arrived = there(guests, folder) / "big"
  while not arrived.exists():
    assert process.poll() is None, process.communicate()
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(0.1)
  os.kill(guests.machine(), 9)
  out, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 125 and "has ended (signal 9)" in err
  assert guests.nothing_left()


# --- a hostile guest -------------------------------------------------------------------------


def member(name, content=b"theirs\n", **more):
  info = tarfile.TarInfo(name)
  info.size, info.mode, info.mtime = len(content), 0o644, 1600000000
  for key, value in more.items():
    setattr(info, key, value)
  return info, content


def folder_member(name, mode=0o755):
  return member(name, b"", type=tarfile.DIRTYPE, mode=mode)


def link_member(name, target, kind=tarfile.SYMTYPE):
  return member(name, b"", type=kind, linkname=target)


def stream(*members, end=bytes(1024)):
  data = b""
  for info, content in members:
    data += info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    data += content + bytes(-len(content) % 512)
  return data + end


def test_a_tar_that_never_stops_sending(guests, project):
  """What it says after the end of the archive, or of qvm's patience with it, went on for ever."""
  guests.put_tool("tar", 'case $1 in -cf) exec yes ;; *) exec /bin/tar "$@" ;; esac')
  result = guests.run("echo more >>src/main.c", options=("--sync", str(project)))
  assert result.returncode == 125, result.stderr
  assert "what the guest sends is refused: it is no tar stream" in result.stderr
  assert (project / "src/main.c").read_text() == "main\n"


def test_a_shell_that_greets_for_ever(guests, project):
  guests.put_tool("greeter", "exec yes")
  guests.play(shell=str(guests.folder / "bin" / "greeter"))
  result = guests.run("true", options=("--sync", str(project)))
  assert result.returncode == 125 and "does not stop sending" in result.stderr, result.stderr


@pytest.mark.parametrize(
  "size", ["9" * 5000, "", "-1", "1e3"], ids=["long", "none", "negative", "1e3"]
)
def test_a_line_of_the_list_that_is_none(guests, tmp_path, size):
  """One with too many digits was a bug in qvm; what another one is about was deleted."""
  (tmp_path / "p").mkdir()
  (tmp_path / "p/f").write_text("a\n")
  guests.up()
  words = ("ssh", "--sync", str(tmp_path / "p"), "--sync-delete", "vm", "--")
  works(guests.qvm(*words, "true"))
  seen = f"sed 's,^//f 644 [0-9]* ,//f 644 {size} ,'"
  guests.put_tool("find", f'/usr/bin/find "$@" | {seen}')
  result = works(guests.qvm(*words[:4], "--sync-direction", "out", *words[4:], "true"))
  assert "not all could be looked at in the guest" in result.stderr
  assert contents(tmp_path / "p") == {"f": b"a\n"}


@pytest.mark.parametrize("other", ["echo longer >x/f", "ln -s f1 x/f"])
def test_another_file_than_the_list_says_is_not_taken_for_the_same(guests, tmp_path, other):
  """Each later run failed: what the record took for the same was never sent again."""
  (tmp_path / "p").mkdir()
  (tmp_path / "p/f").write_text("a\n")
  guests.up()
  words = ("ssh", "--sync", str(tmp_path / "p"), "vm", "--")
  lies = f'case $1 in -cf) mkdir x; {other}; cd x ;; esac\nexec /bin/tar "$@"\n'
  guests.put_tool("tar", lies)
  works(guests.qvm(*words, "echo b >f"))
  guests.put_tool("tar", 'exec /bin/tar "$@"')
  works(guests.qvm(*words, "true"))
  assert contents(guests.folder / "home/runner/work/p")["f"] == contents(tmp_path / "p")["f"]


class Anything(dict):
  """As if every path had been asked for, except .git."""

  def __contains__(self, path):
    return ".git" not in path.split("/")


def receive(folder, data, known=None, present=None):
  """What a Receiver makes of a stream that comes through a pipe; returns it."""
  reading, writing = os.pipe()

  def feed():
    with contextlib.suppress(OSError), os.fdopen(writing, "wb") as file:
      file.write(data)

  feeder = threading.Thread(target=feed)
  feeder.start()
  try:
    with os.fdopen(reading, "rb") as file, contextlib.closing(
      qvm_source.Folder(str(folder))
    ) as opened:
      excludes = qvm_source.Excludes(())
      receiver = qvm_source.Receiver(opened, excludes, dict(known or {}), known is None)
      receiver.expect(qvm_source.Listing(present or {}, True), True)
      if present is None:
        receiver.asked = Anything()
      receiver.take(file)
      receiver.finish()
      return receiver
  finally:
    feeder.join()


@pytest.fixture
def here(tmp_path):
  """A folder, and outside of it what must stay as it is."""
  (tmp_path / "outside").mkdir()
  (tmp_path / "outside/file").write_text("mine\n")
  (tmp_path / "here").mkdir()
  (tmp_path / "here/out").symlink_to("../outside")
  (tmp_path / "here/real").mkdir()
  os.mkfifo(tmp_path / "here/fifo here")  # which nobody reads: to open it would wait for ever
  yield tmp_path / "here"
  assert tree(tmp_path / "outside") == {"file": (stat.S_IFREG, 0o644, b"mine\n")}
  assert sorted(os.listdir(tmp_path)) == ["here", "outside"]


REFUSED = [
  stream(member("../outside/file")),
  stream(member("/etc/passwd")),
  stream(member("a/../../outside/file")),
  stream(member("real/../x")),
  stream(link_member("../l", "x")),
  stream(folder_member("../outside/d")),
  stream(member("x" * 300)),
  stream(member("x", b"whole"), end=b"")[:515],
  stream(member("big", b"", size=1 << 50)),
  stream(member("x", b"", type=tarfile.XHDTYPE, size=1 << 40)),
  stream(member("x", b"", type=tarfile.GNUTYPE_LONGNAME, size=1 << 40)),
  stream(member("x", b"", type=tarfile.GNUTYPE_LONGLINK, size=1 << 33)),
  b"<html>this is no tar at all</html>".ljust(10240, b"x"),
]


@pytest.mark.parametrize("data", REFUSED, ids=range(len(REFUSED)))
def test_a_stream_that_no_honest_tar_makes(here, data):
  before = tree(here)
  receiver = receive(here, data)
  assert tree(here) == before and not receiver.landed


STAYS = [
  member("out/file"),
  member("out/new"),
  folder_member("out/d"),
  member("out/d/e"),
  link_member("evil", "/etc/passwd"),
  link_member("evil", "../outside/file"),
  link_member("real/evil", "../../outside"),
  link_member("real/evil", "x/../../../outside"),
  link_member("evil", ""),
  link_member("hard", "out/file", tarfile.LNKTYPE),
  link_member("hard", "../outside/file", tarfile.LNKTYPE),
  link_member("hard", "/etc/passwd", tarfile.LNKTYPE),
  link_member("hard", "real", tarfile.LNKTYPE),
  link_member("hard", "fifo here", tarfile.LNKTYPE),
  link_member("hard", "nothing", tarfile.LNKTYPE),
  link_member("hard", ".git/x", tarfile.LNKTYPE),
  member("device", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
  member("fifo", b"", type=tarfile.FIFOTYPE),
  member(".git/hooks/pre-commit"),
  member("real/.git/config"),
  folder_member("."),
  folder_member("d"),
]


@pytest.mark.parametrize("bad", STAYS, ids=range(len(STAYS)))
@pytest.mark.parametrize("known", [None, {}], ids=["all", "checked"])
def test_a_member_that_stays_out(here, bad, known):
  """The others come; nothing is written through a link, and nothing leads out."""
  before = tree(here)
  receive(here, stream(bad, member("good")), known)
  after = tree(here)
  assert after.pop("good") == (stat.S_IFREG, 0o644, b"theirs\n")
  if known is None:  # all may be replaced, but only by what is inside
    assert all(v[0] != stat.S_IFLNK or k == "out" for k, v in after.items())
    after.pop("out", None), before.pop("out")
    after = {k: v for k, v in after.items() if not k.startswith("out/")}
  assert after == before


def folder_entry(mode):
  return qvm_source.Entry("d", mode, 0, f"d{mode:o}")


def test_set_user_id_bits_do_not_come(here):
  receive(here, stream(member("suid", mode=0o6755)))
  assert tree(here)["suid"][1] == 0o755


def test_a_closed_folder_that_is_filled(here):
  file = qvm_source.Entry("f", 0o644, 7, "1")
  changed = {"d/e/y": file, "d/e": folder_entry(0o500), "d": folder_entry(0o555), "d/x": file}
  receive(here, stream(member("d/x"), member("d/e/y")), present=changed)
  assert {p: e[1] for p, e in tree(here / "d").items()} == {"x": 0o644, "e": 0o500, "e/y": 0o644}
  assert tree(here)["d"][1] == 0o555
  os.chmod(here / "d", 0o755)
  os.chmod(here / "d/e", 0o755)


def test_a_folder_that_is_closed_there_is_not_made(here):
  receiver = receive(here, stream(member("d/x")), present={"d": folder_entry(0o300)})
  assert receiver.held == {"d"} and "d" not in tree(here)


def test_a_file_that_comes_twice_for_a_folder(here):
  """Neither takes its place, and neither is left beside it."""
  (here / "real/kept").write_text("mine\n")
  before = tree(here)
  receive(here, stream(member("real"), member("real")))
  assert tree(here) == before


def test_only_what_was_asked_for_comes(here):
  file = qvm_source.Entry("f", 0o644, 7, "1")
  receiver = receive(here, stream(member("a"), member("b"), member("./c")),
                     present={"b": file, "c": file})  # fmt: skip
  assert {"b", "c"} < set(tree(here)) and "a" not in tree(here)
  assert receiver.done == {"b", "c"}


def test_several_archives_one_after_the_other(here):
  receive(
    here,
    stream(member("a")) + bytes(9216) + stream(member("b"), link_member("c", "b", tarfile.LNKTYPE)),
  )
  assert {"a", "b", "c"} < set(tree(here))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_members(here):
  """A stream of very many members; only the last shows."""
  import resource

  one = stream(folder_member("d"), end=b"")
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  receive(here, b"".join([*[one] * 100_000, bytes(1024)]))
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 70 << 10  # with the stream


NAMES = st.lists(st.sampled_from(["a", "b", "..", ".", "", "out", "real", ".git", "é"]), min_size=1,
                 max_size=4).map("/".join)  # fmt: skip
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.tuples(NAMES, KINDS, NAMES), max_size=8), st.booleans())
def test_no_stream_gets_out(members, checked):
  import tempfile
  from pathlib import Path

  with tempfile.TemporaryDirectory() as top:
    outside, folder = Path(top, "outside"), Path(top, "here")
    outside.mkdir()
    (outside / "file").write_text("mine\n")
    (folder / "real").mkdir(parents=True)
    (folder / "out").symlink_to("../outside")
    made = [
      member(name, b"theirs\n" if kind == tarfile.REGTYPE else b"", type=kind, linkname=target)
      for name, kind, target in members
    ]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(qvm_source.QvmError):
      receive(folder, stream(*made), {} if checked else None)
    assert tree(outside) == {"file": (stat.S_IFREG, 0o644, b"mine\n")}
    assert sorted(os.listdir(top)) == ["here", "outside"]
    for above, folders, names in os.walk(folder):
      for name in folders + names:
        path = os.path.join(above, name)
        if os.path.islink(path) and os.path.relpath(path, folder) != "out":
          real = os.path.realpath(os.path.dirname(path))
          target = os.path.normpath(os.path.join(real, os.readlink(path)))
          assert (target + "/").startswith(str(folder) + "/"), (path, target)


@every_python
def test_with_every_python(guests, project, pyz, python):
  """The packed program, as it is copied onto CI runners."""
  guests.qvm.program = pyz
  words = guests.words(
    "--sync", str(project), "--sync-delete", command=["echo x >made; rm src/all"]
  )
  result = guests.qvm(*words, python=python)
  assert result.returncode == 0, result.stderr
  assert (project / "made").read_text() == "x\n"
  assert not (project / "src/all").exists()
  assert tree(project)["src/tool"][1] == 0o755
  assert guests.nothing_left()


@pytest.mark.parametrize("path", ["a/./b", "a/b/.", "../b", "/tmp/b", "a/../../b"])
def test_a_folder_of_the_list_that_is_no_plain_path(here, capfd, path):
  before = tree(here.parent)
  receive(here, stream(), present={path: qvm_source.Entry("d", 0o755, 0, "d755")})
  assert tree(here.parent) == before and "stays in the guest" in capfd.readouterr().err


def test_what_comes_has_to_fit(here, monkeypatch):
  """And something is left for all else that writes here."""
  monkeypatch.setattr(qvm_source, "free_space", lambda folder: qvm_source.RESERVE_BYTES)
  with pytest.raises(qvm_source.QvmError, match="disk is full: .*/x needs 7 B more"):
    receive(here, stream(member("x"), member("y")))
  assert not {"x", "y"} & set(tree(here))


def test_a_disk_that_is_full_all_the_same(here, monkeypatch):
  """Of inodes, or by what another writes; what fits no more is no name that cannot be here."""

  def rename(folder, path, new):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(qvm_source.Folder, "rename", rename)
  before = tree(here)
  with pytest.raises(qvm_source.QvmError, match="/x: the disk is full"):
    receive(here, stream(member("x"), member("y")))
  assert tree(here) == before


# --- what has gone wrong once ----------------------------------------------------------------


@pytest.mark.parametrize("pattern", [".*", "*", "?", "[.]*", "[[:digit:]]*", "\\foo", "foo/"])
def test_patterns_never_delete(guests, tmp_path, pattern):
  """What find(1) there and fnmatch here make of a pattern may differ."""
  folder = tmp_path / "p"
  (folder / "src").mkdir(parents=True)
  for name in ("1a", "b", "foo", ".hidden", "src/c"):
    (folder / name).write_text("mine\n")
  before = tree(folder)
  options = ("--sync", str(folder), "--sync-delete", "--sync-exclude", pattern)
  works(guests.run("echo new >new-one", options=options))
  after = tree(folder)
  if pattern != "*":
    assert after.pop("new-one")
  assert after == before


def test_a_folder_that_is_renamed(guests, tmp_path):
  """The files in it are as old as before."""
  folder = tmp_path / "p"
  (folder / "src/in n").mkdir(parents=True)
  (folder / "src/in n/a\nb").write_text("deep\n")
  (folder / "src/file").write_text("file\n")
  (folder / "srcs").mkdir()
  before = tree(folder)
  options = ("--sync", str(folder), "--sync-delete")
  works(guests.run("mv src ne\\ w", options=options))
  assert tree(folder) == {
    path.replace("src", "ne w", path[3:4] != "s"): e for path, e in before.items()
  }


@pytest.mark.parametrize("delete", [(), ("--sync-delete",)])
def test_names_in_a_poor_locale(guests, tmp_path, delete):
  """Python 3.6 takes the file system for ASCII there."""
  python = MODERN.get("3.6")
  if not python:
    pytest.skip("there is no Python 3.6")
  folder = tmp_path / "p"
  folder.mkdir()
  (folder / "grün").write_text("mine\n")
  (folder / "zwölf").write_text("mine\n")
  (folder / "lïnk").symlink_to("zwölf")
  words = guests.words("--sync", str(folder), *delete, command=["echo theirs >zwölf; echo x >ñew"])
  works(guests.qvm(*words, python=python, env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}))
  assert {name: (folder / name).read_text() for name in os.listdir(folder)} == {
    "grün": "mine\n", "zwölf": "theirs\n", "lïnk": "theirs\n", "ñew": "x\n",
  }  # fmt: skip


def test_a_list_of_names_without_end(guests, project, monkeypatch):  # noqa: F811
  line = b"//f 644 1 1/1.5/1.5 ./x\n"
  monkeypatch.setattr(qvm_source, "MAX_LIST_BYTES", 1000)
  with pytest.raises(qvm_source.RefusedError, match="longer than any"):
    qvm_source.read_list(io.BytesIO(line * 100))
  with pytest.raises(qvm_source.RefusedError, match="longer than any"):
    qvm_source.read_list(io.BytesIO(b"\n" * 100))


@pytest.mark.parametrize("name", ["/tmp/qvm-evil", "//tmp/qvm-evil", "../evil", "a/../../evil"])
def test_a_list_with_names_that_lead_out(guests, project, name):  # noqa: F811
  """With an absolute one qvm went round in circles for ever."""
  line = f"//f 644 3 1/1.5/1.5 ./{name}"
  guests.put_tool(
    "find", f"/usr/bin/find \"$@\" | sed 's,^//d [^ ]* [^ ]* [^ ]* .$,&\\\n{line},'\n"
  )
  guests.up()
  works(guests.qvm("ssh", "vm", "--", f'mkdir -p ~/work/"{project.name}"'))
  words = ("ssh", "--sync", str(project), "--sync-direction", "out", "vm", "--", "true")
  result = guests.qvm(*words)
  assert (
    result.returncode == 0 and f"{name} stays in the guest: its tar has not" in result.stderr
  ), result.stderr


def test_a_list_of_too_many_names(monkeypatch):
  lines = [b"//d 755 0 1/1.5/1.5 .\n", *(b"//f 644 1 1/1.5/1.5 ./%d\n" % n for n in range(99))]
  listed = b"".join([*lines, b"//end 0\n"])
  monkeypatch.setattr(qvm_source, "MAX_NAMES", 100)
  assert len(qvm_source.read_list(io.BytesIO(listed)).entries) == 99
  monkeypatch.setattr(qvm_source, "MAX_NAMES", 99)
  with pytest.raises(qvm_source.RefusedError, match="more than 99 names"):
    qvm_source.read_list(io.BytesIO(listed))


def test_a_list_is_not_held_several_times():
  """128 MB of it, which a guest may send, took 1.7 GB of memory."""
  line = b"//f 644 1234 %d/1795687226.745457/1795687226.745457 ./a/name/like/many/others/%d\n"
  listed = b"//d 755 0 1/1.5/1.5 .\n" + b"".join(line % (n, n) for n in range(5000)) + b"//end 0\n"
  qvm_source.read_list(io.BytesIO(listed))  # what is made once only
  tracemalloc.start()
  try:
    assert qvm_source.read_list(io.BytesIO(listed))
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 5.3 * len(listed), peak / len(listed)


@pytest.mark.parametrize("end", ["", "echo //end 0; ", "echo '//d 755 0 1/1.5/1.5 .'; "])
def test_a_list_of_no_names_deletes_nothing(guests, project, end):  # noqa: F811
  guests.up()
  works(guests.qvm("ssh", "vm", "--sync", str(project), "--", "true"))
  program = guests.folder / "bin" / "find"
  armed = guests.folder / "armed"
  text = f'#!/bin/sh\n[ ! -e {armed} ] || {{ {end}exit 1; }}\nexec /usr/bin/find "$@"\n'
  program.write_text(text)
  program.chmod(0o755)
  before = tree(project)
  words = ("ssh", "vm", "--sync", str(project), "--sync-delete", "--", f": >{armed}")
  result = guests.qvm(*words)
  assert result.returncode == 125 or "not all" in result.stderr
  assert tree(project) == before


def test_names_with_backslashes(guests, tmp_path):
  folder = tmp_path / "p"
  folder.mkdir()
  for name in ("\\back", "a\\nb", "\\"):
    (folder / name).write_text("old\n")
  works(guests.run('for f in *; do echo new >"$f"; done', options=("--sync", str(folder))))
  assert {entry[2] for entry in tree(folder).values()} == {b"new\n"}


def test_a_folder_with_a_name_as_long_as_can_be(guests, tmp_path):
  folder = tmp_path / ("p" * 255)
  folder.mkdir()
  works(guests.run("echo x >made", options=("--sync", str(folder))))
  assert (folder / "made").read_text() == "x\n"


def test_no_such_folder_there(guests, tmp_path):
  (tmp_path / "p").mkdir()
  guests.up()
  options = ("--sync", str(tmp_path / "p"), "--sync-direction", "out")
  result = guests.qvm("ssh", "vm", *options, "--", "echo ran")
  assert result.returncode not in (0, None) and result.stdout == ""
  assert not list((guests.folder / "home/runner").glob(".qvm-*"))


def test_a_time_that_is_none(here, capfd):
  info = member("x")[0]
  info.pax_headers = {"mtime": "nan"}
  data = info.tobuf(tarfile.PAX_FORMAT) + b"theirs\n".ljust(512, b"\0")
  receiver = receive(here, data + stream(member("y")))
  assert receiver.held == {"x"} and "impossible time" in capfd.readouterr().err
  assert "x" not in tree(here) and "y" in tree(here)
  assert not [n for n in os.listdir(here) if ".qvm" in n]


def test_noise_is_no_empty_stream(here):
  assert "no tar stream" in receive(here, bytes(range(1, 256)) * 100).cut


def test_a_file_that_is_replaced_is_never_missing(here, monkeypatch):
  """It is renamed to its name, so that a kill in between loses nothing."""
  (here / "x").write_text("mine\n")
  monkeypatch.setattr(os, "rename", lambda *args, **more: pytest.fail("killed here"))
  with pytest.raises(pytest.fail.Exception):
    receive(here, stream(member("x")))
  assert (here / "x").read_text() == "mine\n"


# --- names that the host's disk takes for one ------------------------------------------------


class Folding:
  """The calls of `os` as on APFS: a name is found in any spelling, and keeps its first one."""

  NAMED = ("open", "stat", "mkdir", "unlink", "rmdir", "symlink", "readlink")

  def __init__(self, monkeypatch):
    self.real = {name: getattr(os, name) for name in (*self.NAMED, "rename")}
    for name in self.NAMED:
      monkeypatch.setattr(os, name, self.wrapped(name))
    monkeypatch.setattr(os, "rename", self.rename)

  def spelled(self, name, fd):
    """The name as it is on the disk."""
    if fd is None or name in ("", ".") or "/" in str(name):
      return name
    if any(ord(c) in range(0xDC80, 0xDD00) for c in name):
      raise OSError(errno.EILSEQ, "Illegal byte sequence")
    return next((n for n in os.listdir(fd) if qvm_source.fold(n) == qvm_source.fold(name)), name)

  def wrapped(self, name):
    def call(*words, dir_fd=None, **more):
      words = list(words)
      at = 1 if name == "symlink" else 0
      words[at] = self.spelled(words[at], dir_fd)
      return self.real[name](*words, dir_fd=dir_fd, **more)

    return call

  def rename(self, old, new, src_dir_fd=None, dst_dir_fd=None):
    old, there = self.spelled(old, src_dir_fd), self.spelled(new, dst_dir_fd)
    target = new if old == there else there  # a change of spelling, or what is there keeps its own
    self.real["rename"](old, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


@pytest.fixture
def folding(tmp_path, monkeypatch):
  """fold(before, after, delete=True): what a folder with the first files becomes when the guest,
  which had them too, has the second; {name: content} each."""

  def go(before, after, delete=True):
    folder = tmp_path / "disk"
    for path, content in before.items():
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      (folder / path).write_text(content)
    known, present = {}, {}
    for above, folders, names in os.walk(folder):
      for name in folders + names:
        path = os.path.relpath(os.path.join(above, name), folder)
        known[path] = qvm_source.Known(f"old {path}", qvm_source.stamp_of(os.lstat(folder / path)))
    for path, content in after.items():
      same = before.get(path) == content
      present[path] = qvm_source.Entry(
        "f", 0o644, len(content), f"{'old' if same else 'new'} {path}"
      )
      for parent in list(qvm_source.folders_above(path)):
        present[parent] = qvm_source.Entry("d", 0o755, 0, f"old {parent}")
    changed = {p: e for p, e in present.items() if p not in known or known[p].there != e.stamp}
    with monkeypatch.context() as patch:
      Folding(patch)
      data = [member(path, content.encode()) for path, content in after.items() if path in changed]
      receiver = receive(folder, stream(*data), known, present=present)
      with contextlib.closing(qvm_source.Folder(str(folder))) as opened:
        receiver.folder = opened
        if delete:
          receiver.delete()
    return {p: e[2].decode() for p, e in tree(folder).items() if e[2] is not None}, receiver

  return go


def test_a_change_of_spelling_is_a_rename(folding):
  before = {"Foo": "foo", "Dir/a": "a", "Dir/Sub/b": "b"}
  for after in (
    {"foo": "foo", "dir/a": "a", "dir/Sub/b": "b"},
    {"FOO": "new", "DIR/a": "new", "DIR/SUB/b": "b"},
  ):
    found, receiver = folding(before, after)
    assert found == after and receiver.held == set()
    before = after


def test_the_second_spelling_stays_in_the_guest(folding, capfd):
  before = {"Makefile": "mine", "d/é": "nfc"}
  after = {"Makefile": "mine", "makefile": "theirs", "d/é": "nfc", "d/e\u0301": "theirs"}
  found, receiver = folding(before, after)
  assert found == before and receiver.held == {"d/e\u0301", "makefile"}
  assert "makefile stays in the guest: it is the same file as Makefile" in capfd.readouterr().err


def test_an_edit_beside_a_rename_of_the_spelling(folding):
  found, receiver = folding({"Foo": "old", "b": "old"}, {"foo": "new", "b": "new"})
  assert found == {"foo": "new", "b": "new"}


def test_a_name_that_the_disk_refuses_stays(folding, capfd):
  found, receiver = folding({"a": "old"}, {"a": "new", "\udcff": "x", "b": "new"}, delete=False)
  assert found == {"a": "new", "b": "new"} and receiver.held == {"\udcff"}
  assert "stays in the guest: Illegal byte sequence" in capfd.readouterr().err


def test_qvms_cache_is_out_of_reach_by_any_path(here, monkeypatch, capfd):
  """A folder is known by its inode; a link or another spelling leads to the same."""
  (here / "real/cache").mkdir()
  monkeypatch.setenv("QVM_CACHE_DIR", str(here / "real/cache"))
  before = tree(here)
  receiver = receive(here, stream(member("real/cache/bin/qemu-img")))
  assert tree(here) == before and receiver.held == {"real/cache/bin/qemu-img"}
  with contextlib.closing(qvm_source.Folder(str(here))) as opened:
    assert "real/cache" not in qvm_source.walk_folder(opened, qvm_source.Excludes(()))


@pytest.mark.parametrize("spelling", [".GIT", ".gi\u200ct"])
def test_git_stays_here_in_any_spelling(guests, tmp_path, spelling):
  """To a Mac each of them is the repository."""
  for folder in (spelling, f"sub/{spelling}"):
    (tmp_path / "p" / folder).mkdir(parents=True)
    (tmp_path / "p" / folder / "config").write_text("secret")
  (tmp_path / "p/.gitignore").write_text("x")
  result = works(guests.run("find .", options=("--sync", str(tmp_path / "p"))))
  assert sorted(result.stdout.split()) == [".", "./.gitignore", "./sub"]


@pytest.mark.parametrize("spelling", [".git", ".GIT", ".Git", ".g\u200cit", ".gi\ufefft"])
def test_git_is_git_in_any_spelling(spelling):
  assert qvm_source.is_git(f"a/{spelling}/hooks") and not qvm_source.is_git("a/.gitignore")


def test_a_python_without_dir_fd(monkeypatch, tmp_path):
  monkeypatch.setattr(os, "supports_dir_fd", set())
  with pytest.raises(qvm_source.QvmError, match="relative to a folder"):
    qvm_source.opened_folder(str(tmp_path))


# --- lists and records -----------------------------------------------------------------------


@pytest.mark.parametrize("second, told", [(b"5.000", False), (b"5.001", True)])
def test_a_list_that_tells_whole_seconds_tells_nothing(second, told):
  lines = [b"//drwxr-xr-x 755 0 1/5.5/5.5 .", b"//-rw-r--r-- 644 3 2/5.000/%s ./a\nb" % second,
           b"//lrwxr-xr-x 755 3 3/5.0/5.0 ./l", b"//end 0\n"]  # fmt: skip
  listing = qvm_source.read_list(io.BytesIO(b"\n".join(lines)))
  assert {path: entry[:3] for path, entry in listing.entries.items()} == {
    "a\nb": ("f", 0o644, 3), "l": ("l", 0o755, 3),
  }  # fmt: skip
  assert listing.complete
  assert all(bool(entry.stamp) == told for entry in listing.entries.values())


@pytest.mark.parametrize("end", [b"", b"//end 0\n", b"//x\n//end 0\n"])
def test_a_list_without_the_folder_itself_is_none(end):
  assert qvm_source.read_list(io.BytesIO(b"//f 644 1 1/1.5/1.5 ./x\n" + end)) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '[1,"f","n",[]]',
                                  '[1,"f","n",{"a":["s",1]}]', '[1,"f","n",{"a":[]}]',
                                  '[1,"f","n",{"a":["s","x","y","z",1,2]}]',
                                  '[1,"f","n",{"a":["s",Infinity,1,1,1,1]}]',
                                  pytest.param("[" * 100000, id="deep")])  # fmt: skip
def test_a_damaged_record_is_none(tmp_path, text):
  (tmp_path / "r").write_text(text)
  assert qvm_source.read_sync_record(str(tmp_path / "r")) is None


def test_the_record_goes_with_the_instance(guests, tmp_path):  # noqa: F811
  (tmp_path / "p").mkdir()
  guests.up()
  works(guests.qvm("ssh", "vm", "--sync", str(tmp_path / "p"), "--", "echo x >made"))
  records = [name for name in guests.instances() if ".sync-" in name]
  assert len(records) == 1 and records[0].startswith("instances/vm.sync-")
  works(guests.qvm("stop", "vm"))
  works(guests.qvm("rm", "vm"))
  assert guests.instances() == []


# --- A record that does not fit --------------------------------------------------------------


@pytest.fixture
def precious(guests, tmp_path):
  """A guest to which a folder has gone, and the folder."""
  (tmp_path / "work").mkdir()
  (tmp_path / "work/a").write_text("one\n")
  works(guests.run("true", options=("--name", "vm", "--sync", str(tmp_path / "work")), rm=False))
  return tmp_path / "work"


def out_of(guests, folder, command, *options):
  options = ("--name", "vm", "--sync", str(folder), "--sync-direction", "out", *options)
  return works(guests.run(command, options=options, rm=False))


def test_a_record_of_another_disk_deletes_nothing(guests, precious):
  (guests.qvm.cache / "instances/vm.qcow2").unlink()
  shutil.rmtree(guests.folder)
  works(guests.run("mkdir -p work/work", options=("--name", "vm"), rm=False))
  out_of(guests, precious, "true", "--sync-delete")
  assert (precious / "a").exists()


def test_a_damaged_record_costs_no_edit(guests, precious):
  (precious / "a").write_text("two hours of work\n")
  (record,) = (guests.qvm.cache / "instances").glob("vm.sync-*")
  record.write_text("")
  run = out_of(guests, precious, "echo of the guest >a")
  assert (precious / "a").read_text() == "two hours of work\n"
  assert "a has changed here and in the guest: it stays as it is" in run.stderr


def test_a_record_of_a_newer_qvm_is_refused(guests, precious):
  (record,) = (guests.qvm.cache / "instances").glob("vm.sync-*")
  record.write_text('[2, "/work", "work", {}]')
  options = ("--name", "vm", "--sync", str(precious))
  run = guests.run("true", options=options, rm=False)
  assert run.returncode == 125 and "has format 2, which this qvm does not know" in run.stderr
