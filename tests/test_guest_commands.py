"""Commands in the guest, run … -- COMMAND and ssh: a stand-in for QEMU starts a real sshd."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from darwin_host import put_program
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
  DEADLINE,
  FREEBSD,
  fails,
  free_port,
  lines,
  obey_modes,
  processes_of,
  rewrite,
  works,
)
from support_machines import FREEBSD_GUEST, OPENBSD_GUEST
from support_terminal import Terminal

import qvm as qvm_source

AWKWARD = ["", "a b", "it's", '"q"', "$HOME", "`id`", "*", "new\nline\n", "\\0101 \\n", "!!", "%s",
           "é ü", "~", "-n", "#x", "a=b", ";&|<>()", "\t", "end\\", "\x01\x7f"]  # fmt: skip


# --- what gets through -----------------------------------------------------------------------


def test_a_command_and_its_exit_code(guests):
  result = guests.run("sh", "-c", "echo out; echo err >&2; exit 7")
  assert (result.returncode, result.stdout) == (7, "out\n")
  assert re.fullmatch(
    r"qvm: freebsd-15.1-x86-64-rm-\w+ is booting; .+\.console\.log\nerr\n", result.stderr
  )
  assert guests.nothing_left()


@pytest.mark.parametrize("code", [0, 1, 2, 125, 126, 127, 128, 130, 254, 255])
def test_every_exit_code_is_the_commands(guests, code):
  assert guests.run(f"exit {code}").returncode == code


@pytest.mark.parametrize("command", [("kill -9 $$",), ("sh", "-c", "kill -9 $$")])
def test_a_command_that_a_signal_ends(guests, command):
  assert guests.run(*command).returncode == 137


def test_no_such_command(guests):
  result = guests.run("no-such-command", "x")
  assert result.returncode == 127
  assert "no-such-command" in result.stderr


def test_all_bytes_pass_both_ways(guests, tmp_path):
  data = bytes(range(256)) * 8192
  (tmp_path / "in").write_bytes(data)
  with open(tmp_path / "in", "rb") as file, open(tmp_path / "out", "wb") as out:
    result = guests.run("sh", "-c", "cat; printf '\\377\\0' >&2", stdin=file, stdout=out,
                        stderr=subprocess.DEVNULL)  # fmt: skip
  assert result.returncode == 0
  assert (tmp_path / "out").read_bytes() == data


def test_a_stdin_of_which_somebody_else_reads(monkeypatch):
  """It is non-blocking, and what select has seen there may be gone: that is not its end."""
  (source, feed), (taken, target), stop = os.pipe(), os.pipe(), os.pipe()
  reads = iter((BlockingIOError(), b"data", b""))

  def read(fd, size):
    found = next(reads)
    if isinstance(found, Exception):
      raise found
    return found

  os.write(feed, b"data")
  with monkeypatch.context() as patch, os.fdopen(stop[0], "rb") as end:
    patch.setattr(qvm_source.os, "read", read)
    qvm_source.pass_on(source, target, os.fdopen(target, "wb"), end)
  assert os.read(taken, 100) == b"data"
  for fd in (source, feed, taken, stop[1]):
    os.close(fd)


@pytest.mark.parametrize("sync", [False, True])
def test_output_that_finds_no_room(guests, tmp_path, sync):
  """As `make >log` on a full disk: what was lost must not look like success."""
  (tmp_path / "p").mkdir()
  options = ("--sync", str(tmp_path / "p")) if sync else ()
  with open("/dev/full", "w") as full:
    result = guests.run("echo out; : >made || :", options=options, stdout=full)
  assert result.returncode == 125, result.stderr
  assert "stdout: the disk is full" in result.stderr
  assert (tmp_path / "p" / "made").exists() == sync
  assert guests.nothing_left()


def test_the_end_of_stdin_is_seen(guests):
  assert guests.run("cat; echo end", input="text\n").stdout == "text\nend\n"


SHELLS = ("/bin/sh", "/bin/bash", "/bin/csh", "/usr/bin/fish", "/bin/zsh")


@pytest.mark.parametrize("shell", SHELLS)
def test_arguments_arrive_exactly_in_every_shell(guests, shell):
  guests.play(shell=shell)
  code = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
  result = guests.run(sys.executable, "-c", code, *AWKWARD, options=("-e", "A=x'\n$y"))
  assert result.returncode == 0, result.stderr
  assert result.stdout.split("\0") == AWKWARD


@pytest.mark.parametrize("shell, words", [("/bin/sh", "echo $0"), ("/bin/csh", "echo $shell:t"),
                                          ("/usr/bin/fish", "set -l a fish; echo $a")])  # fmt: skip
def test_one_word_is_a_line_for_the_users_shell(guests, shell, words):
  guests.play(shell=shell)
  result = guests.run(words)
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip().endswith({"/bin/csh": "csh"}.get(shell, os.path.basename(shell)))


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.binary(max_size=30).filter(lambda b: b"\0" not in b), min_size=2, max_size=6))
def test_any_arguments_pass_the_line(arguments):
  """As sshd does: the line is one argument for the login shell."""
  words = [os.fsdecode(argument) for argument in arguments]
  code = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
  command = [sys.executable, "-S", "-E", "-c", code, *words]
  line = qvm_source.shell_line(qvm_source.command_script(command, {}, "", ""))
  plain = r"[A-Za-z0-9 _./:=@+,\\-]"
  assert re.fullmatch(rf"""exec /bin/sh -c '[^'!\\]+' sh( '{plain}*')+""", line)
  out = subprocess.run(["/bin/sh", "-c", line], stdout=subprocess.PIPE, check=True).stdout
  assert out == b"\0".join(arguments)


def test_a_long_line(guests):
  word = "x'y" * 1500
  guests.play(shell="/bin/csh")
  assert guests.run("printf", "%s", word).stdout == word


def test_variables(guests):
  env = {"CI": "true", "HANDED": "h h", "EMPTY": ""}
  line = 'echo "$CI|$HANDED|${EMPTY-unset}|${NONE-unset}|$GIVEN|$OTHER"'
  options = ("-e", "HANDED", "-e", "EMPTY", "-e", "NONE", "-e", "GIVEN=a=b 'c'\n$d")
  result = guests.run(line, options=options, env={**env, "OTHER": "stays here"})
  assert result.stdout == "true|h h||unset|a=b 'c'\n$d|\n"
  assert guests.run("echo ${CI-unset}").stdout == "unset\n"
  assert guests.run("echo $CI", options=("-e", "CI=mine"), env=env).stdout == "mine\n"


def test_nothing_of_the_users_ssh_is_used_or_changed(guests, tmp_path):
  own = guests.qvm.home / ".ssh"
  own.mkdir()
  (own / "config").write_text("Host *\n  ProxyCommand false\n  User nobody\n")
  (own / "known_hosts").write_text("[127.0.0.1]:2847 ssh-ed25519 AAAA\n")
  before = {path: path.read_bytes() for path in own.iterdir()}
  assert guests.run("echo", "in", env={"SSH_AUTH_SOCK": "/no/such"}).stdout == "in\n"
  assert {path: path.read_bytes() for path in own.iterdir()} == before


def test_awkward_paths(guests, tmp_path):
  """OpenSSH has rules of its own for quotes, spaces and % in its options."""
  odd = tmp_path / 'it\'s "a" 50% %h ~ é,=#'
  guests.qvm.cache.rename(odd)
  guests.play(login="key")
  env = {"QVM_CACHE_DIR": str(odd), "TMPDIR": str(odd / "downloads")}
  result = guests.run("echo", "in", guest=OPENBSD_GUEST, env=env)
  assert (result.returncode, result.stdout) == (0, "in\n"), result.stderr
  assert os.listdir(odd / "instances") == os.listdir(odd / "downloads") == []


def test_a_name_as_long_as_allowed(guests):
  result = guests.run("echo", "in", options=("--name", "n" * 100))
  assert (result.returncode, result.stdout) == (0, "in\n"), result.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(guests, closed):
  command = shlex.join(guests.qvm.command(*guests.words(command=["cat; exit 4"])))
  run = subprocess.run(f"{command} {closed}", shell=True, env=guests.qvm.env, capture_output=True,
                       stdin=subprocess.DEVNULL, timeout=DEADLINE)  # fmt: skip
  assert run.returncode == 4, run.stderr
  assert guests.nothing_left()


def test_nobody_reads_on(guests):
  command = shlex.join(guests.qvm.command(*guests.words(command=["yes"])))
  script = f"set -o pipefail; {command} | head -n 1"
  run = subprocess.run(["bash", "-c", script], env=guests.qvm.env, capture_output=True,
                       stdin=subprocess.DEVNULL, timeout=DEADLINE)  # fmt: skip
  assert (run.returncode, run.stdout) == (141, b"y\n"), run.stderr
  assert guests.nothing_left()


def test_a_shell_of_the_caller_that_runs_nothing(guests):
  assert guests.run("echo", "in", env={"SHELL": "/bin/false"}).stdout == "in\n"


# --- terminals -------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal_of(guests, *words):
  terminal = Terminal(guests.qvm.command(*words), guests.qvm.env)
  try:
    yield terminal
    assert terminal.state() == terminal.before
  finally:
    terminal.close()


def test_a_terminal_here_is_a_terminal_there(guests):
  script = "test -t 0 -a -t 1 -a -t 2 && tty; read x; echo got=$x"
  with terminal_of(guests, *guests.words(command=["sh", "-c", script])) as terminal:
    terminal.until(b"/dev/pts/")
    terminal.type(b"text\r")
    terminal.until(b"got=text")
    assert terminal.end() == 0
  assert guests.nothing_left()


def test_ctrl_c_at_a_terminal_goes_to_the_command(guests):
  script = "trap 'echo interrupted; exit 9' INT; echo up$((1 + 1)); while :; do sleep 0.1; done"
  with terminal_of(guests, *guests.words(command=["sh", "-c", script])) as terminal:
    terminal.until(b"up2")
    terminal.type(b"\x03")
    terminal.until(b"interrupted")
    assert terminal.end() == 9


def test_a_machine_that_dies_leaves_the_terminal_as_it_was(guests):
  with terminal_of(guests, *guests.words(command=["echo up$((1 + 1)); sleep 600"])) as terminal:
    terminal.until(b"up2")
    os.kill(guests.machine(), signal.SIGKILL)
    assert terminal.end() == 125


def test_no_terminal_there_when_stdout_is_a_pipe(guests):
  assert guests.run("test -t 1 || echo none").stdout == "none\n"


# --- signals ---------------------------------------------------------------------------------


def test_the_first_ctrl_c_goes_to_the_command(guests):
  script = "trap 'echo got; exit 9' INT; echo up; while :; do sleep 0.1; done"
  process = guests.start("sh", "-c", script)
  assert process.stdout.readline() == "up\n"
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out) == (9, "got\n"), err
  assert guests.nothing_left()


def test_a_command_that_ctrl_c_ends(guests):
  process = guests.start("echo up; sleep 600; echo no")
  assert process.stdout.readline() == "up\n"
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out) == (130, ""), err


# OpenSSH 9.6 and 9.7 do so while they are connected.
UNBLOCKING_SSH = f"""#!{sys.executable} -IS
import os, signal, sys
signal.pthread_sigmask(signal.SIG_UNBLOCK, {{signal.SIGINT}})
os.execv({shutil.which("ssh")!r}, sys.argv)
"""


def use_ssh(guests, folder, text):
  """Make this script qvm's ssh."""
  put_program(folder / "bin" / "ssh", text)
  guests.qvm.env["PATH"] = f"{folder / 'bin'}:{guests.qvm.env['PATH']}"


@pytest.mark.parametrize("unblocks", [False, True])
def test_ctrl_c_of_a_terminal_with_a_pipe_behind(guests, tmp_path, unblocks):
  """The whole process group gets the signal: ssh and QEMU may not take it to heart."""
  if unblocks:
    use_ssh(guests, tmp_path, UNBLOCKING_SSH)
  script = "trap 'echo got; exit 9' INT; echo up; while :; do sleep 0.1; done"
  process = guests.start("sh", "-c", script, start_new_session=True)
  assert process.stdout.readline() == "up\n"
  os.killpg(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out) == (9, "got\n"), err


def test_ctrl_c_at_a_terminal_during_the_login(guests, tmp_path, fifo):
  """ssh has the terminal by then, but does not read its keys yet."""
  use_ssh(guests, tmp_path, f"#!/bin/sh\necho >{fifo}\nexec sleep 600\n")
  with terminal_of(guests, *guests.words(command=["true"])) as terminal:
    fifo.read_text()
    terminal.type(b"\x03")
    assert terminal.end() == 130
    assert terminal.text.splitlines()[1:] == ["^C"]
  assert guests.nothing_left()


# What LocalCommand runs may outlive ssh, and qvm.
LATE_SSH = f"""#!{sys.executable} -IS
import os, sys, time
log = sys.argv[sys.argv.index("-E") + 1]
(command,) = [word for word in sys.argv if word.startswith("LocalCommand=")]
if os.fork():
  sys.exit(7)
os.closerange(0, 3)
while os.path.exists(log):
  time.sleep(0.01)
os.system(command.partition("=")[2])
open(os.environ["HOME"] + "/fifo", "w").close()
"""


def test_a_login_that_comes_too_late_leaves_no_file(guests, tmp_path):
  use_ssh(guests, tmp_path, LATE_SSH)
  os.mkfifo(guests.qvm.home / "fifo")
  assert guests.run("true").returncode == 7
  (guests.qvm.home / "fifo").read_text()
  assert guests.nothing_left()


def test_the_second_ctrl_c_ends_the_machine(guests):
  process = guests.start("sh", "-c", "trap 'echo got' INT; echo up; while :; do sleep 0.1; done")
  assert process.stdout.readline() == "up\n"
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == "got\n"
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out) == (130, ""), err
  assert guests.nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_the_machine(guests, number):
  process = guests.start("echo up; sleep 600")
  assert process.stdout.readline() == "up\n"
  process.send_signal(number)
  process.communicate(timeout=DEADLINE)
  assert process.returncode == 128 + number
  assert guests.nothing_left()


def test_ctrl_c_while_it_boots(guests, fifo):
  guests.play(banner=False, record=str(fifo))
  process = guests.start("true")
  fifo.read_text()
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=DEADLINE)
  assert process.returncode == 130
  assert guests.nothing_left()


# --- failures of our own ---------------------------------------------------------------------


def test_boot_timeout(guests):
  guests.play(banner=False, console="".join(f"line {n}\n" for n in range(30)))
  result = guests.run("true", options=("--boot-timeout", "0.5"))
  assert (result.returncode, result.stdout) == (125, "")
  said = lines(result.stderr)
  assert [line for line in said if line.startswith("| ")] == [f"| line {n}" for n in range(10, 30)]
  assert "ssh has not answered within 0.5 s" in said[-2] and "--boot-timeout" in said[-1]
  assert guests.nothing_left()


def test_a_machine_that_dies(guests):
  guests.play(die={"after": "start", "exit": 3}, console="panic\n")
  result = guests.run("true")
  assert result.returncode == 125
  assert lines(result.stderr)[-2:] == ["| panic", lines(result.stderr)[-1]]
  assert "ended before ssh answered (exit code 3)" in result.stderr
  assert guests.nothing_left()


def test_a_machine_that_dies_under_the_command(guests):
  process = guests.start("echo up; sleep 600")
  assert process.stdout.readline() == "up\n"
  os.kill(guests.machine(), signal.SIGKILL)
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out) == (125, ""), err
  assert "has ended (signal 9)" in err and "| ssh guest boots" in err
  assert guests.nothing_left()


def test_a_guest_that_powers_itself_off(guests):
  result = guests.run("sudo", "shutdown", "-p", "now")
  assert result.returncode == 125
  assert "has ended (exit code 0)" in result.stderr and "| guest powers off" in result.stderr


def test_login_refused(guests):
  guests.play(login="refuse")
  result = guests.run("true")
  assert (result.returncode, result.stdout) == (125, "")
  said = lines(result.stderr)
  assert "| ssh guest boots" in said
  assert "cannot log in to" in said[-2] and "Permission denied" in said[-2]
  assert guests.nothing_left()


def test_no_ssh_client(guests, tmp_path):
  (tmp_path / "empty").mkdir()
  result = guests.run("true", env={"PATH": str(tmp_path / "empty")})
  fails(result, "no ssh found on PATH", "openssh-client", code=125)
  assert guests.nothing_left()


def test_a_download_that_fails(offline):
  fails(offline("run", "--rm", *FREEBSD_GUEST, "--", "true"), "127.0.0.1:9", code=125)


def test_bad_input_is_2_all_the_same(offline):
  assert offline("run", "--name", "/", *FREEBSD_GUEST, "--", "true").returncode == 2
  assert offline("run", *FREEBSD_GUEST, "--bogus", "--", "true").returncode == 2


# --- the key disk ----------------------------------------------------------------------------


def test_a_guest_that_wants_a_key(guests):
  guests.play(login="key")
  assert guests.run("whoami", guest=OPENBSD_GUEST).stdout == "runner\n"
  key = guests.qvm.cache / "ssh" / "id_ed25519"
  first = key.read_bytes()
  assert key.stat().st_mode & 0o777 == 0o600
  key.chmod(0o644)  # as in a cache that was copied
  assert guests.run("whoami", guest=OPENBSD_GUEST).stdout == "runner\n"
  assert (key.read_bytes(), key.stat().st_mode & 0o777) == (first, 0o600)
  assert guests.nothing_left()


def test_linked_instances_and_a_key(guests, tmp_path):
  """The key is found although ssh would not find it from where the link leads."""
  guests.play(login="key")
  guests.run("true", guest=OPENBSD_GUEST)  # makes the folders
  instances, elsewhere = guests.qvm.cache / "instances", tmp_path / "elsewhere"
  instances.rename(elsewhere)
  instances.symlink_to(elsewhere)
  assert guests.run("whoami", guest=OPENBSD_GUEST).stdout == "runner\n"


@pytest.mark.parametrize("killed_at", ["", "id_ed25519", "id_ed25519.pub"])
@pytest.mark.parametrize("emptied", ["id_ed25519", "id_ed25519.pub"])
def test_the_two_halves_of_the_key_always_fit(tmp_path, monkeypatch, emptied, killed_at):
  """After a power failure, and when the qvm that makes another key is killed."""
  cache, replace, flush = qvm_source.Cache(str(tmp_path / "cache")), os.replace, qvm_source.flush
  flushed = []
  monkeypatch.setattr(qvm_source, "flush", lambda path: flushed.append(path) or flush(path))
  qvm_source.make_folders(cache)
  qvm_source.make_key(cache)
  assert len(set(flushed)) == 3, "two files and their folder"
  (tmp_path / "cache/ssh" / emptied).write_bytes(b"")

  def killed(source, target):
    if os.path.basename(target) == killed_at:
      raise KeyboardInterrupt
    replace(source, target)

  with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
    patch.setattr(os, "replace", killed)
    qvm_source.make_key(cache)
  qvm_source.make_key(cache)
  public = subprocess.check_output(["ssh-keygen", "-y", "-f", cache.ssh_key])
  assert public.split()[:2] == qvm_source.public_key(cache).split()[:2]


def test_an_older_image_that_wants_a_key(guests):
  """FreeBSD's, before v0.14.0, in the first partition of an MBR; what is newer gets no key."""
  guests.play(login="key-mbr")
  assert "Permission denied" in guests.run("whoami").stderr
  record = guests.qvm.cache / "base" / (FREEBSD + ".json")
  rewrite(record, record.read_text().replace("v0.16.0", "v0.13.0"))
  assert guests.run("whoami").stdout == "runner\n"


@pytest.mark.parametrize(
  "os_name, arch, device, release, wanted",
  [
    ("freebsd", "x86-64", "virtio-blk-pci", "v0.13.2", True),
    ("freebsd", "arm64", "virtio-blk-pci", "v0.9.0", True),
    ("freebsd", "x86-64", "", "v0.14.0", False),
    ("openbsd", "x86-64", "scsi-hd", "v0.14.0", True),
    ("openbsd", "arm64", "scsi-hd", "v9.0.0", True),
    ("netbsd", "x86-64", "scsi-hd", "v0.7.0", True),
    ("netbsd", "arm64", "", "v1.0.0", False),
    ("haiku", "x86-64", "", "v0.0.1", False),
    ("omnios", "x86-64", "", "v0.0.1", False),
  ],
)
def test_the_second_drive(full, os_name, arch, device, release, wanted):
  base = full.cache / "base" / f"{os_name}-1-{arch}.json"
  base.write_text(json.dumps({"release": release}))
  base.with_suffix(".qcow2").write_bytes(b"")
  words = ("--dry-run", "--platform", arch, "--name", "a,b".replace(",", "."), os_name, "1")
  plain = works(full("run", *words)).stdout.split()
  more = works(full("run", *words, "--", "true")).stdout.split()[len(plain) :]
  keys = full.cache / "instances" / "a.b.keys"
  drive = f"if=none,file={keys},id=drive1,cache=unsafe,discard=ignore,format=raw"
  expected = ["-device", f"{device},drive=drive1,bootindex=1", "-drive", drive]
  assert more == (expected if wanted else [])
  assert works(full("run", "-d", *words)).stdout.split() == plain + more
  assert not keys.exists()


def mtools(program, *words):
  return subprocess.run([program, *words], stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("start", [0, 1 << 20])
@pytest.mark.parametrize("size", [1, 80, 4096])
def test_the_key_disk_as_others_read_it(tmp_path, start, size):
  public, disk = (b"ssh-ed25519 AAAA qvm\n" * 300)[:size], tmp_path / "disk"
  disk.write_bytes(qvm_source.key_disk(public, start))
  os.truncate(disk, start + qvm_source.FAT_SECTORS * qvm_source.SECTOR)
  image = f"{disk}@@{start}"
  assert mtools("mtype", "-i", image, "::KEYS") == public
  assert re.search(rf"KEYS +{size} 1980-01-01", mtools("mdir", "-i", image, "::").decode())
  system = tmp_path / "system"
  system.write_bytes(disk.read_bytes()[start:])
  checked = subprocess.run(["/usr/sbin/fsck.vfat", "-n", "-v", str(system)], stdout=subprocess.PIPE)
  assert checked.returncode == 0, checked.stdout.decode()
  if start:
    table = mtools("/usr/sbin/sfdisk", "--dump", str(disk)).decode()
    assert re.search(r"start= +2048, size= +8192, type=1\b", table), table


# --- instances that stay ---------------------------------------------------------------------


def test_a_persistent_instance_is_powered_off(guests):
  result = guests.run("echo", "in", rm=False)
  assert (result.returncode, result.stdout) == (0, "in\n")
  assert "asking " in result.stderr
  assert processes_of(guests.qvm.cache) == {}
  log = guests.qvm.cache / "instances" / (FREEBSD + ".console.log")
  assert log.read_text() == "ssh guest boots\nguest powers off\n"
  known = guests.qvm.cache / "instances" / (FREEBSD + ".known_hosts")
  assert known.read_text().startswith("qvm ")
  assert guests.run("exit 4", rm=False).returncode == 4
  works(guests.qvm("rm", FREEBSD))
  assert guests.nothing_left()


def test_a_persistent_instance_whose_results_cannot_come_is_powered_off(guests, tmp_path):
  """They are in its memory, perhaps not yet on its disk, and will be wanted."""
  project = tmp_path / "p"
  project.mkdir(mode=0o555)
  options = ("--sync", str(project))
  result = guests.run("echo x >new", options=options, rm=False, preexec_fn=obey_modes)
  assert result.returncode == 125 and "Permission denied" in result.stderr
  log = guests.qvm.cache / "instances" / (FREEBSD + ".console.log")
  assert log.read_text() == "ssh guest boots\nguest powers off\n"


def test_a_guest_that_does_not_power_off_is_ended(guests):
  guests.play(ignore_shutdown=True)
  words = guests.words(command=["exit 5"], rm=False)
  result = guests.qvm(*words, code="qvm.POWER_OFF_SECONDS = 0.3")
  assert result.returncode == 5
  assert "has not powered off within 0.3 s" in result.stderr
  assert processes_of(guests.qvm.cache) == {}


def test_a_console_log_of_ones_own(guests, tmp_path):
  log = tmp_path / "log"
  assert guests.run("true", options=("--console-log", str(log))).returncode == 0
  assert log.read_text() == "ssh guest boots\n"


def test_killed_qvm_leaves_what_stop_ends(guests):
  process = guests.start("echo up; sleep 600", options=("--name", "vm"))
  assert process.stdout.readline() == "up\n"
  process.kill()
  process.wait()
  assert json.loads(guests.qvm("list", "--json").stdout)[0]["state"] == "running"
  works(guests.qvm("stop", "vm"))
  process.communicate()
  assert guests.instances() == [] and processes_of(guests.qvm.cache) == {}


# --- ssh -------------------------------------------------------------------------------------


def test_ssh_into_a_running_instance(guests):
  guests.up()
  result = guests.qvm("ssh", "vm", "--", "sh", "-c", 'echo "$1"; exit 6', "x", "a  b")
  assert (result.returncode, result.stdout, result.stderr) == (6, "a  b\n", "")
  result = guests.qvm("ssh", "-e", "A=b", "vm", "--", "echo $A")
  assert (result.returncode, result.stdout) == (0, "b\n")
  result = guests.qvm("ssh", "vm", input="echo typed; exit 3\n")
  assert (result.returncode, result.stdout) == (3, "typed\n")
  result = guests.qvm("ssh", "-e", "A=b", "vm", input="echo $A; exit 3\n")
  assert (result.returncode, result.stdout) == (3, "b\n")
  works(guests.qvm("stop", "vm"))


def test_an_interactive_shell(guests):
  guests.up()
  with terminal_of(guests, "ssh", "vm") as terminal:
    terminal.type(b"echo up$((20 + 2)); tty\r")
    terminal.until(b"up22")
    terminal.until(b"/dev/pts/")
    terminal.type(b"exit 5\r")
    assert terminal.end() == 5


def test_ssh_to_what_does_not_run(guests):
  fails(guests.qvm("ssh", "vm", "--", "ls"), "no instance vm", code=125)
  guests.run("true", rm=False)
  fails(guests.qvm("ssh", FREEBSD, "--", "ls"), "is not running", "run --detach", code=125)


def test_ssh_waits_for_a_machine_that_boots(guests, fifo):
  guests.play(delay=0.5)
  port = str(free_port())
  words = ("run", "--name", "vm", "--ssh-port", port, "--console-log", str(fifo), *FREEBSD_GUEST)
  process = guests.qvm.start(*words)
  with open(fifo) as console:
    assert console.readline() == "ssh guest boots\n"
    result = guests.qvm("ssh", "vm", "--", "echo in")
    assert (result.returncode, result.stdout) == (0, "in\n"), result.stderr
    works(guests.qvm("stop", "vm"))
    process.communicate(timeout=DEADLINE)


def test_stop_uses_the_key(guests):
  guests.play(login="key")
  guests.up("vm", guest=OPENBSD_GUEST)
  result = works(guests.qvm("stop", "vm"))
  assert "has powered off" in result.stderr and "SIGTERM" not in result.stderr


def test_several_at_once(guests, tmp_path):
  processes = []
  for n in range(4):
    guests.play()
    env = {"SSH_GUEST": json.dumps({"folder": str(tmp_path / f"guest{n}")})}
    words = ["run", "--rm", *FREEBSD_GUEST, "--", "sh", "-c", f"echo {n}; cat"]
    processes.append(guests.qvm.start(*words, env=env, stdin=subprocess.PIPE))
  assert [process.stdout.readline() for process in processes] == [f"{n}\n" for n in range(4)]
  for n, process in enumerate(processes):
    assert process.communicate(f"text {n}", timeout=DEADLINE)[0] == f"text {n}"
    assert process.returncode == 0
  assert guests.nothing_left()
