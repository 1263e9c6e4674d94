"""The stand-in for QEMU that boots a real sshd: what the tests of ssh rely on."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import ssh_guest
import ssh_keeper
from support import DEADLINE, alive, free_port, heard, processes_of, wait_for

SHELLS = ("/bin/sh", "/bin/bash", "/bin/csh", "/usr/bin/fish", "/bin/zsh")
SECTOR, MIB = 512, 1 << 20


def fat_disk(path, keys, offset=0):
  """A disk with a FAT file system that has the file KEYS; in a partition when it has an offset."""
  with open(path, "wb") as disk:
    disk.truncate(offset + 2 * MIB)
    if offset:
      entry = bytes([0, 0, 0, 0, 12, 0, 0, 0])
      entry += (offset // SECTOR).to_bytes(4, "little") + (2 * MIB // SECTOR).to_bytes(4, "little")
      disk.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")
  image = f"{path}@@{offset}"
  sectors = str(2 * MIB // SECTOR)
  subprocess.run(["mformat", "-i", image, "-T", sectors, "-h", "1", "-s", "32", "::"], check=True)
  subprocess.run(["mcopy", "-i", image, str(keys), "::KEYS"], check=True)
  return path


class Guest:
  """A stand-in that runs, and an ssh to it."""

  def __init__(self, folder, **play):
    self.home, self.folder, self.port = folder, folder / "guest", free_port()
    self.play = {"folder": str(self.folder), **play}
    self.program = folder / "qemu"
    self.program.write_text(ssh_guest.program())
    self.program.chmod(0o755)

  def command(self, disk=None):
    netdev = f"user,id=user.0,hostfwd=tcp:127.0.0.1:{self.port}-:22,ipv6=off"
    drive = "if=none,file=%s,id=drive%d,cache=unsafe,discard=ignore,format=%s"
    return [
      *(str(self.program), "-nographic", "-machine", "type=q35,accel=tcg", "-m", "6G"),
      *("-device", "virtio-net,netdev=user.0,addr=0x03", "-netdev", netdev),
      *("-device", "virtio-blk-pci,drive=drive0,bootindex=0"),
      *("-drive", drive % (self.home / "overlay.qcow2", 0, "qcow2")),
      *(("-drive", drive % (str(disk).replace(",", ",,"), 1, "raw")) if disk else ()),
    ]

  def start(self, disk=None, record=True, **more):
    """Start it; blocks until it listens."""
    fifo = self.home / "fifo"
    if record:
      fifo.exists() or os.mkfifo(str(fifo))
      self.play["record"] = str(fifo)
    env = {"PATH": os.environ["PATH"], "SSH_GUEST": json.dumps(self.play), "LEAK": "leak"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    self.process = subprocess.Popen(self.command(disk), env=env, **{**streams, **more})
    if record:
      self.record = heard(fifo, self.process)
    return self

  def ssh(self, *words, options=()):
    """The command line of an ssh to the guest."""
    known = f"UserKnownHostsFile={self.home}/known_hosts"
    check = ("-o", known, "-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes")
    base = ("ssh", "-F", "/dev/null", *check, "-p", str(self.port), *options)
    return [*base, "runner@127.0.0.1", *words]

  def __call__(self, *words, options=(), stdin=b"", timeout=DEADLINE):
    """Run a command in the guest: exit code, stdout, stderr without ssh's own words."""
    run = subprocess.run(
      self.ssh(*words, options=options),
      input=stdin,
      capture_output=True,
      timeout=timeout,
    )
    ours = (b"Warning: Permanently added", b"** ")  # OpenSSH 10 also has words on key exchanges
    said = [line for line in run.stderr.splitlines(True) if not line.startswith(ours)]
    return run.returncode, run.stdout.decode(), b"".join(said).decode()

  def end(self):
    """End it whatever it does; nothing is left."""
    self.process.kill()
    self.process.communicate()
    if (self.folder / "guest.log").exists():
      ssh_guest.wait_until_gone(self.folder)
    assert processes_of(self.folder, environment=True) == {}


@pytest.fixture
def guests(tmp_path):
  """Makes guests; all end with the test."""
  made = []

  def make(**play):
    folder = tmp_path / f"guest{len(made)}"
    folder.mkdir()
    made.append(Guest(folder, **play))
    return made[-1]

  yield make
  for guest in made:
    guest.end()


@pytest.fixture
def key(tmp_path):
  """A user's key."""
  path = tmp_path / "id"
  subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
  return path


def identity(key):
  return ("-i", str(key), "-o", "IdentitiesOnly=yes")


def test_all_that_it_needs_is_there():
  assert ssh_guest.missing() == []


def test_commands(guests):
  guest = guests().start()
  assert guest.record["argv"] == guest.command()
  assert guest.record["pid"] == guest.process.pid
  assert guest("echo out; echo error >&2; exit 7") == (7, "out\n", "error\n")
  assert guest("cat", stdin=b"\0\xc3\xa9") == (0, "\0é", "")
  home = f"{guest.folder}/home/runner"
  assert guest("whoami; pwd; sudo echo a 'b  c'")[1] == f"runner\n{home}\na b  c\n"
  names = guest("env")[1]
  assert "LD_PRELOAD" not in names and "NSS_WRAPPER" not in names and "LEAK" not in names
  assert f"PATH={guest.folder}/bin:" in names


def test_the_other_user(guests):
  guest = guests().start()
  out = guest("whoami; pwd", options=("-l", "user"))
  assert out == (0, f"user\n{guest.folder}/home/user\n", "")
  assert guest("true", options=("-l", "root"))[0] == 255


def test_terminal(guests):
  guest = guests().start()
  code, out, _ = guest("tty; echo end; exit 3", options=("-tt",))
  assert code == 3
  assert out.startswith("/dev/pts/") and out.endswith("end\r\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_shells(guests, shell):
  if not os.path.exists(shell):
    pytest.skip("no " + shell)
  guest = guests(shell=shell).start()
  assert guest("echo $SHELL; sh -c 'exit 4'") == (4, shell + "\n", "")
  assert guest("sudo whoami") == (0, "root\n", "")
  # A login shell, which reads /etc/profile and its like; with a terminal and without.
  code, out, _ = guest(stdin=b"command -v sudo || which sudo\nexit 5\n")
  assert (code, out.splitlines()[-1]) == (5, f"{guest.folder}/bin/sudo")
  code, out, _ = guest(options=("-tt",), stdin=b"sudo echo no''tice\nexit 6\n")
  assert (code, "notice" in out) == (6, True), out


def test_copy(guests, tmp_path):
  guest = guests().start()
  (tmp_path / "file").write_text("text")
  words = [*guest.ssh()[1:-1]]
  words[words.index("-p")] = "-P"
  to = "runner@127.0.0.1:copy"
  subprocess.run(["scp", *words, str(tmp_path / "file"), to], check=True, stderr=subprocess.DEVNULL)
  assert (guest.folder / "home/runner/copy").read_text() == "text"


@pytest.mark.parametrize("login, offset", [("key", 0), ("key-mbr", MIB)])
def test_keys(guests, key, tmp_path, login, offset):
  disk = fat_disk(tmp_path / "a,disk", Path(str(key) + ".pub"), offset)
  guest = guests(login=login).start(disk)
  assert guest("echo in", options=identity(key)) == (0, "in\n", "")
  code, out, error = guest("echo in", options=("-o", "IdentityFile=none"))
  assert (code, out) == (255, "") and "Permission denied (publickey)" in error


@pytest.mark.parametrize("disk", [None, "empty"])
def test_no_keys(guests, key, tmp_path, disk):
  if disk:
    disk = tmp_path / disk
    disk.write_bytes(bytes(MIB))
  guest = guests(login="key").start(disk)
  code, out, error = guest("echo in", options=identity(key))
  assert (code, out) == (255, "") and "Permission denied" in error


def test_refused(guests, key, tmp_path):
  disk = fat_disk(tmp_path / "disk", Path(str(key) + ".pub"))
  guest = guests(login="refuse").start(disk)
  code, out, error = guest("echo in", options=identity(key))
  assert (code, out) == (255, "") and "Permission denied" in error


def test_no_banner(guests):
  guest = guests(banner=False).start()
  with socket.create_connection(("127.0.0.1", guest.port), 10) as link:
    link.settimeout(0.2)
    with pytest.raises(socket.timeout):
      link.recv(1)
  assert guest("true", options=("-o", "ConnectTimeout=1"))[0] == 255


def test_nothing_listens(guests):
  guest = guests(listen=False).start()
  with pytest.raises(ConnectionRefusedError):
    socket.create_connection(("127.0.0.1", guest.port), 10)


def test_a_guest_that_dies_at_once(guests):
  guest = guests(console="boom\n", die={"after": "start", "exit": 3}).start(record=False)
  assert guest.process.communicate(timeout=DEADLINE) == (b"boom\n", b"")
  assert guest.process.returncode == 3


def test_the_port_is_taken(guests):
  guest = guests()
  with socket.socket() as other:
    other.bind(("127.0.0.1", guest.port))
    other.listen(1)
    guest.start(record=False)
    out, error = guest.process.communicate(timeout=DEADLINE)
  assert guest.process.returncode == 1 and b"hostfwd" not in out
  assert b"Could not set up host forwarding rule" in error


@pytest.mark.parametrize("command", ["sudo shutdown -p now", "shutdown -q"])
def test_shutdown(guests, command):
  guest = guests().start()
  assert guest(command)[0] == 255  # cut off by the remote host
  out = guest.process.communicate(timeout=DEADLINE)
  assert (out, guest.process.returncode) == ((b"ssh guest boots\nguest powers off\n", b""), 0)


def test_shutdown_ignored(guests):
  guest = guests(ignore_shutdown=True).start()
  assert guest("sudo shutdown -p now") == (0, "", "")
  assert guest("echo up")[1] == "up\n"


@contextlib.contextmanager
def busy(guest, tmp_path):
  """A session whose processes try to survive; yields its ssh and a pipe that they hold."""
  fifo = tmp_path / "held"
  os.mkfifo(str(fifo))
  up = "sh -c 'echo up >&3; exec sleep 1000'"
  stay = f"exec 3>{fifo}; trap '' HUP TERM; setsid {up} & (setsid {up} &); {up}"
  session = subprocess.Popen(
    guest.ssh(stay, options=("-tt",)),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  with open(str(fifo), "rb") as pipe:
    assert [pipe.readline() for _ in range(3)] == 3 * [b"up\n"]
    try:
      yield session, pipe
    finally:
      session.kill()
      session.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_nothing_outlives_it(guests, tmp_path, number):
  guest = guests().start()
  with busy(guest, tmp_path) as (session, pipe):
    pids = ssh_keeper.descendants(guest.process.pid)
    assert guest.record["keeper"] in pids and len(pids) >= 6
    assert set(pids) >= set(processes_of(guest.folder, environment=True)) - {
      guest.process.pid,
      session.pid,
    }
    guest.process.send_signal(number)
    assert guest.process.communicate(timeout=DEADLINE) == (b"ssh guest boots\n", b"")
    if number == signal.SIGKILL:
      ssh_guest.wait_until_gone(guest.folder)
    assert guest.process.returncode == (-number if number == signal.SIGKILL else 0)
    assert not any(map(alive, pids))
    assert pipe.read() == b""
    assert session.wait(DEADLINE) == 255
  with pytest.raises(ConnectionRefusedError):
    socket.create_connection(("127.0.0.1", guest.port), 10)


def test_sessions_leave_no_process_behind_but_what_they_started(guests):
  guest = guests().start()
  for _ in range(3):
    guest("true")
  guest("setsid sleep 1000 </dev/null >/dev/null 2>&1 &")

  def names():
    found = []
    for pid in ssh_keeper.descendants(guest.process.pid):
      with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        found.append(Path(f"/proc/{pid}/comm").read_text())
    return found

  wait_for(lambda: "sleep\n" in names())  # which the shell's child has yet to become
  assert names().count("sleep\n") == 1


def test_sigterm_ignored(guests):
  guest = guests(ignore_term=True).start()
  guest.process.terminate()
  assert guest("echo up")[1] == "up\n"
  assert guest.process.poll() is None


def test_descriptors_stay_with_the_stand_in(guests, tmp_path):
  """A lock that qvm gave to QEMU is free once QEMU is dead, also when sessions go on for a bit."""
  lock = open(str(tmp_path / "lock"), "w")  # noqa: SIM115
  fcntl.flock(lock, fcntl.LOCK_EX)
  guest = guests().start(pass_fds=(lock.fileno(),))
  assert guest.record["fds"][str(lock.fileno())] == lock.name
  lock.close()
  with busy(guest, tmp_path), open(str(tmp_path / "lock")) as again:
    for pid in ssh_keeper.descendants(guest.process.pid):
      for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
          assert os.readlink(f"/proc/{pid}/fd/{fd}") != again.name
    with pytest.raises(BlockingIOError):
      fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(guest.record["keeper"], signal.SIGSTOP)  # nothing ends the sessions
    guest.process.kill()
    guest.process.wait()
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(guest.record["keeper"], signal.SIGCONT)


def test_boots_again_with_the_same_key(guests):
  guest = guests(delay=0.1).start()
  key = (guest.folder / "host_key.pub").read_text()
  assert guest("sudo shutdown now; true")[0] == 255
  guest.process.communicate(timeout=DEADLINE)
  guest.start()
  assert guest("echo up")[1] == "up\n"
  assert (guest.folder / "host_key.pub").read_text() == key
