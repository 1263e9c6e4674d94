"""The cache's folder in somebody else's hands, and on file systems that cannot do everything."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import types

import pytest
from support import BASE, DEADLINE, FREEBSD, IMAGE, ROOT, Qvm, fails, obey_modes, works

import qvm as qvm_source

RUN = ("run", "--rm", "freebsd", "15.1")
PULL = ("pull", "freebsd", "15.1")
OTHER = 12345  # a user whom nobody is
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
SYSTEMS_PYTHON = "/usr/bin/python3"
IN_NAMESPACE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]


def can(*command):
  """Whether a program can do that here."""
  return shutil.which(command[0]) and not subprocess.run(command, capture_output=True).returncode


namespaces = pytest.mark.skipif(not can(*IN_NAMESPACE, "true"), reason="no namespaces of mounts")
tracing = pytest.mark.skipif(not can("strace", "-o", "/dev/null", "true"), reason="no strace")


def below(qvm, before, *words, **more):
  """Run qvm below another program."""
  command = [*before, *qvm.command(*words)]
  return subprocess.run(
    command, env=qvm.env, capture_output=True, text=True, timeout=DEADLINE, **more
  )


def injected(fault):
  """The words that make the system's calls fail for all below them."""
  return ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={fault}"]


# --- Whose it is -----------------------------------------------------------------------------


@pytest.mark.parametrize("folder, mode", [
  *[(".", mode) for mode in (0o720, 0o702, 0o770, 0o1777)],
  *[(folder, 0o777) for folder in (".", "bin", "qemu", "base", "instances", "code")],
])  # fmt: skip
def test_a_folder_that_others_can_write_is_refused(full, server, tmp_path, folder, mode):
  path = os.path.normpath(full.cache / folder)
  full.cache.chmod(0o711)
  os.chmod(path, mode)
  full.play(record=str(tmp_path / "record"))
  for words in (RUN, PULL):
    result = full(*words)
    fails(result, f"{path} is writable by other users", f"chmod go-w {path};")
  assert not (tmp_path / "record").exists() and server.started == 0
  words = re.search(r"(chmod \S+ \S+);", result.stderr).group(1).split()
  subprocess.run(words, check=True)
  works(full(*RUN))


COMMANDS = (
  *(RUN, PULL, ("list",), ("clean",), ("stop", "vm"), ("rm", "vm"), ("search",)),
  ("ssh", "vm", "--", "true"),
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_command_uses_what_others_can_change(full, words):
  """Records name addresses and processes, so that even reading them is trust."""
  works(full("run", "--name", "vm", "freebsd", "15.1"))
  full.cache.chmod(0o777)
  before = full.files()
  result = full(*words)
  fails(result, "is writable by other users", code=125 if words[0] == "ssh" else 1)
  assert full.files() == before
  works(full("config", "print-path"))


def test_doctor_runs_nothing_of_what_it_calls_a_fault(full, tmp_path):
  full.cache.chmod(0o777)
  full.play(record=str(tmp_path / "record"))
  program = full.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  program.write_text(f"#!/bin/sh\n: >{tmp_path}/ran\n")
  result = full("doctor", "--offline")
  assert result.returncode == 1
  assert re.search(r"fault +cache: .* is writable by other users", result.stdout)
  assert f"→ chmod go-w {full.cache}" in result.stdout
  assert not (tmp_path / "ran").exists() and "instances" not in result.stdout
  full.cache.chmod(0o700)
  full("doctor", "--offline")
  assert (tmp_path / "ran").exists()


# --- What lies above it ----------------------------------------------------------------------


@pytest.mark.xdist_group("entered")  # they change the folders above, which all workers share
@pytest.mark.parametrize("mode, refused", [
  (0o755, False), (0o700, False), (0o1777, False), (0o777, True), (0o757, True), (0o702, True),
])  # fmt: skip
def test_a_folder_above_that_others_can_write(full, tmp_path, mode, refused):
  """Who may rename the cache away can put another in its place; not so with the sticky bit."""
  with entered(tmp_path):
    full.home.chmod(mode)
    (full.home / ".cache").chmod(0o755)
    result = full(*RUN)
    if refused:
      fails(
        result, f"{full.home} is writable by other users, who could", f"chmod go-w {full.home};"
      )
      subprocess.run(["chmod", "go-w", str(full.home)], check=True)
    works(full(*RUN))


@contextlib.contextmanager
def entered(path):
  """Others can enter what pytest has closed for them."""
  before = {each: each.stat().st_mode for each in (path, *path.parents)}
  before = {each: mode for each, mode in before.items() if mode & 0o011 != 0o011}
  for each, mode in before.items():
    each.chmod(mode | 0o011)
  try:
    yield
  finally:
    for each, mode in before.items():
      each.chmod(mode)


def test_what_nobody_else_can_enter_is_not_looked_at(full, tmp_path):
  full.home.chmod(0o777)
  tmp_path.chmod(0o700)
  works(full(*RUN))


@pytest.mark.xdist_group("entered")
def test_the_folders_above_where_a_link_leads(full, tmp_path):
  other = tmp_path / "open"
  other.mkdir()
  full.cache.rename(other / "cache")
  full.cache.symlink_to(other / "cache")
  with entered(tmp_path):
    full.home.chmod(0o755)
    other.chmod(0o777)
    fails(full(*RUN), f"{other} is writable by other users, who could")
    other.chmod(0o1777)
    works(full(*RUN))


@as_root
@pytest.mark.xdist_group("entered")
def test_a_folder_in_tmp_that_another_has_made(full, tmp_path):
  """The sticky bit protects what is there, not a name that is free."""
  with entered(tmp_path):
    full.home.chmod(0o1777)
    (full.home / ".cache").chmod(0o755)
    os.chown(full.home / ".cache", OTHER, OTHER)
    fails(full(*RUN), f"{full.home}/.cache belongs to another user (uid {OTHER})")


@as_root
@pytest.mark.xdist_group("entered")
@pytest.mark.parametrize("group, refused", [(0, False), (OTHER, True)])
def test_a_folder_above_that_a_group_can_write(full, tmp_path, group, refused):
  with entered(tmp_path):
    os.chown(full.home, 0, group)
    full.home.chmod(0o775)
    (full.home / ".cache").chmod(0o755)
    (fails if refused else works)(full(*RUN))


@pytest.mark.parametrize("name, gid, members, others", [
  ("me", 1000, [], False),
  ("me", 1000, ["me"], False),
  ("me", 1000, ["me", "you"], True),
  ("staff", 20, [], True),
  (None, 1000, [], True),
])  # fmt: skip
def test_a_group_of_ones_own(monkeypatch, name, gid, members, others):
  """The umask 002 of many systems lets it write, and nobody else is in it."""

  def group(number):
    if name is None:
      raise KeyError(number)
    return types.SimpleNamespace(gr_name=name, gr_mem=members)

  monkeypatch.setattr(qvm_source, "grp", types.SimpleNamespace(getgrgid=group))
  user = types.SimpleNamespace(pw_name="me")
  monkeypatch.setattr(qvm_source, "pwd", types.SimpleNamespace(getpwuid=lambda number: user))
  folder = types.SimpleNamespace(st_mode=0o40775, st_gid=gid)
  assert qvm_source.others_can_write(folder) is others


@as_root
def test_a_folder_of_another_user_is_refused(full, tmp_path):
  path = str(full.cache)
  full.cache.chmod(0o755)
  os.chown(full.cache / "bin", OTHER, OTHER)  # as tar leaves it when root restores a copy
  works(full(*RUN))
  os.chown(path, OTHER, OTHER)
  full.play(record=str(tmp_path / "record"))
  for words in (RUN, PULL):
    fails(full(*words), f"{path} belongs to another user (uid {OTHER})", "QVM_CACHE_DIR")
  assert not (tmp_path / "record").exists()


def test_what_lies_where_nobody_gets_in_is_not_looked_at(full):
  (full.cache / "bin").chmod(0o777)
  works(full(*RUN))


@as_root
@pytest.mark.skipif(not os.access(SYSTEMS_PYTHON, os.X_OK), reason="no Python for all users")
def test_a_folder_of_roots_will_do(full):
  """Root can change everything anyway; a folder in an image of a container may be its own."""
  with tempfile.TemporaryDirectory() as home:  # pytest's own folders let nobody else in
    shutil.copytree(full.home, home, dirs_exist_ok=True, symlinks=True)
    theirs = Qvm(home, shutil.copy(ROOT / "qvm.py", home))  # ROOT may be a folder of root's, too
    (theirs.cache / "qemu/x86_64/bin/qemu-system-x86_64").write_text("#!/bin/sh\n")
    for folder, folders, names in os.walk(home):
      for path in (os.path.join(folder, name) for name in (".", *folders, *names)):
        os.chown(path, OTHER, OTHER, follow_symlinks=False)
    os.chown(theirs.cache, 0, OTHER)
    theirs.cache.chmod(0o755)

    def become_other():
      os.setgroups([])
      os.setgid(OTHER)
      os.setuid(OTHER)

    works(theirs(*RUN, python=SYSTEMS_PYTHON, preexec_fn=become_other))


@pytest.mark.parametrize("mask", [0o002, 0o000])
def test_a_generous_umask_opens_nothing(qvm, mask):
  for _ in range(2):
    works(qvm(*RUN, preexec_fn=lambda: os.umask(mask)))
  for path in (
    qvm.cache.parent,
    qvm.cache,
    *(each for each in qvm.cache.iterdir() if each.is_dir()),
  ):
    assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


# --- Where it is -----------------------------------------------------------------------------


def test_a_link_to_a_folder_of_ones_own(full, tmp_path):
  full.cache.rename(tmp_path / "elsewhere")
  full.cache.symlink_to(tmp_path / "elsewhere")
  works(full(*RUN))
  (tmp_path / "elsewhere").chmod(0o777)
  fails(full(*RUN), f"{full.cache} is writable by other users")


def test_a_link_that_leads_nowhere(full, tmp_path):
  full.cache.rename(tmp_path / "elsewhere")
  full.cache.symlink_to(tmp_path / "nowhere")
  fails(full(*RUN), f"{full.cache} is a link to {tmp_path / 'nowhere'}, which is not there")
  assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("folder, words", [
  ("downloads", "clean"), ("downloads", "pull freebsd 15.1"), ("instances", "list"),
  ("instances", "run freebsd 15.1"), ("layers", "list"), ("base", "clean --all"),
  ("instances", "clean"), ("base", "search freebsd"), ("instances", "rm vm"),
  ("instances", "stop vm"), ("instances", "logs vm"), ("qemu", "clean"), (".", "list"),
])  # fmt: skip
def test_a_folder_on_a_disk_that_is_not_mounted(full, tmp_path, folder, words):
  """What lies there is not nothing, and nobody waits for it."""
  works(full(*RUN))
  path = full.cache / folder
  path.rename(tmp_path / "elsewhere")
  path.symlink_to(tmp_path / "nowhere")
  before = full.files()
  fails(full(*words.split()), f"{path} is a link to", "is its disk mounted?")
  assert full.files() == before


def test_a_download_on_a_disk_that_is_not_mounted(full, tmp_path):
  (full.cache / BASE).unlink()
  path = full.cache / "downloads" / IMAGE
  path.symlink_to(tmp_path / "nowhere")
  fails(full(*PULL), f"{path} is a link to", "is its disk mounted?")


@pytest.mark.parametrize("folder", [".", "instances", "base", "downloads"])
@pytest.mark.parametrize("words", ["list", "clean", "search freebsd", "run freebsd 15.1"])
def test_a_file_in_the_place_of_a_folder(full, folder, words):
  path = full.cache / folder
  shutil.rmtree(path)
  path.write_text("mine")
  fails(full(*words.split()), f"{path} exists but is not a folder", "QVM_CACHE_DIR")
  assert path.read_text() == "mine"


# Another qvm makes the cache just when this one has looked for it.
MADE_MEANWHILE = """
look = os.path.isdir
def isdir(path):
  found = look(path)
  if not found and path == {cache!r}:
    os.makedirs(path)
  return found
os.path.isdir = isdir
"""


@pytest.mark.parametrize("words", ["list", "pull freebsd 15.1"])
def test_a_cache_that_another_qvm_makes_meanwhile(qvm, words):
  works(qvm(*words.split(), code=MADE_MEANWHILE.format(cache=str(qvm.cache))))


def test_doctor_shows_a_disk_that_is_not_mounted_among_the_rest(full, tmp_path):
  (full.cache / "instances").rename(tmp_path / "elsewhere")
  (full.cache / "instances").symlink_to(tmp_path / "nowhere")
  result = full("doctor", "--offline")
  assert result.returncode == 1
  assert f"cache: {full.cache / 'instances'} is a link to" in re.sub(" +", " ", result.stdout)
  assert "is its disk mounted?" in result.stdout and "network:" in result.stdout


def test_a_home_that_is_not_there_is_made(qvm):
  qvm.home.rmdir()
  works(qvm(*RUN))
  assert stat.S_IMODE(qvm.cache.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_made(qvm, server):
  qvm.home.chmod(0o500)
  for words in (RUN, PULL):
    result = qvm(*words, preexec_fn=obey_modes)
    fails(result, f"cannot create {qvm.home}/.cache: Permission denied", "QVM_CACHE_DIR")
  assert server.started == 0


def test_the_path_of_what_cannot_be_deleted_is_told(full):
  path = full.cache / "downloads" / IMAGE
  (path / "inside").mkdir(parents=True)
  (path / "inside" / "file").touch()
  (path / "inside").chmod(0o500)
  fails(full("clean", preexec_fn=obey_modes), f"{path}: Permission denied")


# --- What it lies on -------------------------------------------------------------------------


def test_locks_that_let_everybody_in_are_told(full):
  run = works(full(*RUN, code="qvm.fcntl.flock = lambda fd, how: None"))
  assert f"{full.cache}: locks do not work on its file system: run one qvm at a time" in run.stderr


@tracing
@pytest.mark.parametrize("problem", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EBADF"])
def test_a_file_system_without_locks(full, problem):
  works(full("run", "--name", "vm", "freebsd", "15.1"))
  before = full.files()
  for words in (RUN, (*PULL, "--refresh"), ("list",), ("clean",), ("rm", "vm"), ("stop", "vm")):
    result = below(full, injected(f"flock:error={problem}"), *words)
    fails(result, "cannot lock ", "QVM_CACHE_DIR", "local disk")
  assert [name for name in full.files() if not name.endswith(".lock")] == before
  works(full(*RUN))


@tracing
def test_a_file_system_without_symbolic_links(qvm):
  result = below(qvm, injected("symlink,symlinkat:error=EPERM"), *RUN)
  fails(result, f"{qvm.cache}/qemu/x86_64 cannot be made, a symbolic link: ", "QVM_CACHE_DIR")
  assert not [path for path in (qvm.cache / "qemu").iterdir() if path.suffix != ".tmp"]
  works(qvm(*RUN))


@tracing
def test_a_file_system_without_hard_links(qvm):
  works(below(qvm, injected("link,linkat:error=EPERM"), *RUN))


@namespaces
def test_a_cache_that_is_read_only(full):
  works(full("run", "--name", "vm", "freebsd", "15.1"))
  read_only = f'mount --bind "{full.cache}" "{full.cache}"; mount -o remount,bind,ro "{full.cache}"'
  before = [*IN_NAMESPACE, "sh", "-ec", f'{read_only}; exec "$@"', "sh"]
  files = full.files()
  for words in (RUN, (*PULL, "--refresh"), ("rm", "vm"), ("clean", "--all")):
    result = below(full, before, *words)
    assert result.returncode == 1
    words = rf"(?s).*qvm: {full.cache}\S*: Read-only file system\nqvm: .*QVM_CACHE_DIR.*\n"
    assert re.fullmatch(words, result.stderr), result.stderr
  works(below(full, before, *PULL))
  for words in (("list",), ("--dry-run", *RUN), ("clean", "--dry-run"), ("config", "print-path")):
    works(below(full, before, *words))
  assert full.files() == files and f"base/{FREEBSD}.qcow2" in files
