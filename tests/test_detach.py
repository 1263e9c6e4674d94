"""Machines in the background: --detach, stop, rm --force, and the locks that tell what runs."""

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
from support import (
  DEADLINE,
  FREEBSD,
  PYTHON,
  end_processes,
  free_port,
  furnish,
  gone,
  parent_of,
  processes_of,
  qemu_pid,
  wait_for,
  works,
)

import qvm as qvm_source

# As $MACHINE says: prints, listens where hostfwd says, and lives until it is told to end. SIGUSR1
# is the guest's power button, which `ssh` below presses.
MACHINE = f"""#!{sys.executable} -IS
import json, os, re, signal, socket, sys, time

play = json.loads(os.environ.get("MACHINE", "{{}}"))
signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(play.get("exit", 0)))
if play.get("ignore_term"):
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
  signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
if play.get("record"):
  fds = {{}}
  for fd in os.listdir("/proc/self/fd"):
    try:
      fds[fd] = os.readlink("/proc/self/fd/" + fd)
    except OSError:
      pass
  with open(play["record"], "w") as file:
    json.dump({{"pid": os.getpid(), "session": os.getsid(0), "fds": fds}}, file)
sys.stdout.write(play.get("stdout", ""))
sys.stdout.flush()
sys.stderr.write(play.get("stderr", ""))
sys.stderr.flush()
if play.get("after"):
  open(play["after"]).close()
host, port = re.search(r"hostfwd=tcp:([0-9.]*):([0-9]+)-:22", " ".join(sys.argv)).groups()
answers = play.get("answers", [])
if answers:
  server = socket.socket()
  server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  server.bind((host, int(port)))
  server.listen(50)
kept = []
for answer in answers:
  link = server.accept()[0]
  if answer is None:
    link.close()
    continue
  try:
    for piece in answer:
      link.sendall(piece.encode("latin-1"))
      time.sleep(0.02)
  except OSError:
    pass  # who asked has gone
  kept.append(link)
  if play.get("last") == len(kept):
    break
if play.get("signal"):
  os.kill(os.getpid(), play["signal"])
if "exit" in play and not play.get("stay"):
  sys.exit(play["exit"])
while True:
  signal.pause()
"""
BANNER = ["SSH-2.0-OpenSSH_9.9\r\n"]
UP = {"answers": [BANNER]}

# It does as $SSH says, and writes down how it was called; with words for its log, no login.
SSH = f"""#!{sys.executable} -IS
import json, os, signal, sys, time

play = json.loads(os.environ.get("SSH", "{{}}"))
with open(os.path.dirname(os.path.abspath(__file__)) + "/calls", "a") as file:
  file.write(json.dumps([os.getpid(), os.getcwd(), *sys.argv[1:]]) + "\\n")
if play.get("press"):
  with open(os.path.expanduser("~/.cache/qvm/instances/%s.lock" % play["press"])) as file:
    os.kill(int(file.read().split()[2]), signal.SIGUSR1)
with open(sys.argv[sys.argv.index("-E") + 1], "a") as log:
  log.write(play.get("log", ""))
if "log" not in play:
  os.system([word for word in sys.argv if word.startswith("LocalCommand=")][0].partition("=")[2])
sys.stderr.write(play.get("stderr", ""))
sys.stderr.flush()
if play.get("started"):
  open(play["started"], "w").close()
while play.get("hang"):
  signal.pause()
sys.exit(play.get("exit", 0))
"""


class Machines:
  """qvm with MACHINE as its QEMU and SSH as its ssh; remembers nothing, ends all."""

  def __init__(self, qvm, folder):
    self.qvm, self.folder = qvm, folder
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    qvm.env["PATH"] = f"{folder}:{qvm.env['PATH']}"

  def play(self, **what):
    self.qvm.env["MACHINE"] = json.dumps(what)

  def ssh(self, **what):
    self.qvm.env["SSH"] = json.dumps(what)

  def calls(self):
    """The arguments of each call of ssh."""
    path = self.folder / "calls"
    if not path.exists():
      return []
    return [json.loads(line)[1:] for line in path.read_text().splitlines()]

  def up(self, name="vm", *words, **what):
    """Start a machine in the background that answers; returns its process."""
    self.play(**{**UP, **what})
    result = self.qvm("run", "-d", "--name", name, "--ssh-port", str(free_port()), *words, *GUEST)
    assert result.returncode == 0, result.stderr
    return qemu_pid(self.qvm, name)

  def states(self):
    rows = json.loads(self.qvm("list", "--json").stdout)
    return {row["name"]: row["state"] for row in rows}

  def row(self, name):
    rows = json.loads(self.qvm("list", "--json").stdout)
    (row,) = [row for row in rows if row["name"] == name]
    return row

  def running(self):
    return list(processes_of(self.qvm.cache))

  def patient(self, *words, stop=0.3, end=0.3, timeout=DEADLINE):
    """Run qvm with little patience: the constants are set from outside."""
    code = f"qvm.POWER_OFF_SECONDS, qvm.TERM_GRACE_SECONDS = {stop}, {end}"
    return self.qvm(*words, code=code, timeout=timeout)


GUEST = ("freebsd", "15.1")
RUN = ("run", "--detach", "--name", "vm")


@pytest.fixture
def machines(offline, image, tmp_path):
  folder = tmp_path / "path"
  folder.mkdir()
  furnish(offline.cache, MACHINE, image)
  yield Machines(offline, folder)
  end_processes(offline.cache)


def lines_of(result):
  """What qvm said on stderr, without its name."""
  return [line.partition("qvm: ")[2] for line in result.stderr.splitlines()]


def instances(machines):
  return sorted(os.listdir(machines.qvm.cache / "instances"))


# --- run --detach ----------------------------------------------------------------------------


def test_name_and_ssh_line(machines):
  machines.play(**UP, stdout="booting\n")
  port = free_port()
  result = machines.qvm(*RUN, "--ssh-port", str(port), *GUEST)
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"vm\nssh -p {port} runner@127.0.0.1\n"
  row = machines.row("vm")
  assert (row["state"], row["ssh"]) == ("running", f"127.0.0.1:{port}")
  table = machines.qvm("list").stdout.splitlines()
  assert re.fullmatch(
    rf"vm +freebsd +15\.1 +x86-64 +running +127\.0\.0\.1:{port} +- +\S+ kB", table[1]
  )
  console = machines.qvm.cache / "instances" / "vm.console.log"
  assert console.read_text() == "booting\n"
  assert str(console) in result.stderr


def test_options_in_any_order(machines):
  port = str(free_port())
  machines.play(**UP)
  result = machines.qvm("run", *GUEST, "-d", "--ssh-port", "127.0.0.2:" + port)
  assert result.stdout == f"{FREEBSD}\nssh -p {port} runner@127.0.0.2\n"


def test_every_address_is_reached_by_the_loopback(machines):
  port = str(free_port())
  machines.play(**UP)
  result = machines.qvm(*RUN, "--ssh-port", "0.0.0.0:" + port, *GUEST)
  assert result.stdout == f"vm\nssh -p {port} runner@127.0.0.1\n"


# What the connections see before one sees the banner; None is closed at once.
BEFORE = {
  "the banner at once": [],
  "closed": [None, None, None],
  "garbage": [["HTTP/1.1 400 Bad Request\r\n\r\n"], ["\x00\xff\x00\xff"]],
  "nothing": [[]],
  "not enough": [["SSH"], ["S"]],
}


@pytest.mark.parametrize("before", BEFORE)
def test_waits_for_the_banner(machines, before):
  answers = [*BEFORE[before], BANNER]
  machines.play(answers=answers)
  result = machines.qvm(*RUN, "--ssh-port", str(free_port()), "--boot-timeout", "60", *GUEST)
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith("vm\n")
  assert not any("not answered" in line for line in lines_of(result))


def test_a_banner_in_pieces(machines):
  """TCP may cut it anywhere."""
  machines.play(answers=[["S", "S", "H", "-2.0-dropbear\r\n"]] * 100)
  result = machines.qvm(*RUN, "--ssh-port", str(free_port()), "--boot-timeout", "3", *GUEST)
  assert result.returncode == 0
  assert not any("not answered" in line for line in lines_of(result)), result.stderr


def test_a_port_that_refuses_for_a_while(machines, fifo):
  machines.play(**UP, after=str(fifo))
  process = machines.qvm.start(*RUN, "--ssh-port", str(free_port()), *GUEST)
  assert "background" in process.stderr.readline()
  assert machines.states() == {"vm": "running"}  # while it boots
  fifo.write_text("")
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out.splitlines()[0]) == (0, "vm"), err


@pytest.mark.parametrize(
  "answers",
  [[], [[]] * 100, [["HTTP/1.1 400 Bad Request\r\n"]] * 500, [None] * 500],
  ids=["refuses", "says nothing", "garbage", "closes"],
)
def test_boot_timeout(machines, answers):
  machines.play(answers=answers, stay=True)
  port = free_port()
  result = machines.qvm(*RUN, "--ssh-port", str(port), "--boot-timeout", "0.5", *GUEST)
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"vm\nssh -p {port} runner@127.0.0.1\n"
  assert any("not answered" in line and "0.5" in line for line in lines_of(result))
  assert machines.states() == {"vm": "running"}


DEATHS = {
  "exit code": ({"exit": 3}, "exit code 3"),
  "exit code 0": ({"exit": 0}, "exit code 0"),
  "killed": ({"signal": signal.SIGKILL}, "signal 9"),
  "aborts": ({"signal": signal.SIGABRT}, "signal 6"),
  "while ssh is asked": ({"answers": [[]], "last": 1, "exit": 4}, "exit code 4"),
}


@pytest.mark.parametrize("throw", [False, True], ids=["kept", "--rm"])
@pytest.mark.parametrize("way", DEATHS)
def test_a_machine_that_dies(machines, way, throw):
  what, words = DEATHS[way]
  console = "".join(f"line {number}\r\n" for number in range(1, 31))
  machines.play(**what, stdout=console, stderr="qemu: some words\n")
  more = ["--rm"] if throw else []
  result = machines.qvm(*RUN, *more, "--ssh-port", str(free_port()), *GUEST)
  assert (result.returncode, result.stdout) == (1, "")
  said = lines_of(result)
  shown = [line for line in said if re.search(r"line \d|some words", line)]
  assert len(shown) == 20
  assert shown[0].endswith("line 12") and shown[-2].endswith("line 30")
  assert shown[-1].endswith("qemu: some words")
  assert any("vm" in line and words in line for line in said)
  assert "Traceback" not in result.stderr
  assert machines.running() == []
  if throw:
    assert instances(machines) == []
  else:
    assert machines.states() == {"vm": "stopped"}
    assert "vm.console.log" in instances(machines)


def test_a_machine_that_dies_after_a_silent_start(machines):
  machines.play(exit=1)
  result = machines.qvm(*RUN, "--ssh-port", str(free_port()), *GUEST)
  assert (result.returncode, result.stdout) == (1, "")
  assert any("exit code 1" in line for line in lines_of(result))


def test_the_cause_of_a_death_is_explained(machines):
  words = (
    "Could not set up host forwarding rule 'tcp:127.0.0.1:1-:22'",
    "qemu: could not load PC BIOS 'bios'",
  )
  for text, said in zip(words, ("--ssh-port", "clean --all")):
    machines.play(exit=1, stderr=text + "\n")
    result = machines.qvm(*RUN, "--ssh-port", str(free_port()), *GUEST)
    assert said in result.stderr


def test_the_words_of_an_earlier_run_are_not_shown(machines, tmp_path):
  """--console-log appends; what the last machine said is no news of this one."""
  log = tmp_path / "log"
  log.write_text("old line\ninitialize kvm: Permission denied\nfalling back to tcg\n")
  machines.play(exit=1, stdout="new line\n")
  run = (*RUN, "--console-log", str(log), "--ssh-port", str(free_port()), *GUEST)
  result = machines.qvm(*run)
  assert result.returncode == 1
  assert "new line" in result.stderr
  assert "old line" not in result.stderr
  assert "/dev/kvm" not in result.stderr
  machines.play(**UP)
  result = machines.qvm(*run)
  assert result.returncode == 0
  assert "/dev/kvm" not in result.stderr
  assert log.read_text().startswith("old line\n")


def test_the_default_console_log_is_of_this_run(machines):
  for text in ("first\n", "second\n"):
    machines.play(exit=1, stdout=text)
    machines.qvm(*RUN, "--ssh-port", str(free_port()), *GUEST)
  console = machines.qvm.cache / "instances" / "vm.console.log"
  assert console.read_text() == "second\n"


def test_a_console_log_of_ones_own(machines, tmp_path):
  (tmp_path / "log").write_text("before\n")
  machines.up("vm", "--console-log", str(tmp_path / "log"), stdout="console\n", stderr="words\n")
  assert (tmp_path / "log").read_text() == "before\nconsole\nwords\n"
  assert "vm.console.log" not in instances(machines)


def flushes(path, disk):
  """How often a trace says that a disk was flushed."""
  return len(re.findall(rf"fsync\(\d+<{re.escape(str(disk))}>", path.read_text()))


@pytest.fixture
def traced(tmp_path):
  """A Python that notes each fsync of its own and of what it starts, and the file of that."""
  if not shutil.which("strace"):
    pytest.skip("no strace")
  program, trace = tmp_path / "traced", tmp_path / "trace"
  strace = f"strace -f -y -qq -o {trace} -e trace=fsync {PYTHON}"
  program.write_text(f'#!/bin/sh\nexec {strace} "$@"\n')
  program.chmod(0o755)
  return str(program), trace


@pytest.mark.parametrize("log", [[], ["--console-log", "/dev/null"]], ids=["its log", "a log"])
def test_a_guest_in_the_background_that_powers_itself_off_is_flushed(machines, traced, log):
  python, trace = traced
  machines.play(**UP)
  process = machines.qvm.start(*RUN, *log, "--ssh-port", str(free_port()), *GUEST, python=python)
  assert process.stdout.readline() == "vm\n"
  disk = machines.qvm.cache / "instances" / "vm.qcow2"
  before = flushes(trace, disk)
  os.kill(qemu_pid(machines.qvm, "vm"), signal.SIGUSR1)
  process.communicate(timeout=DEADLINE)  # strace ends with the last process
  assert flushes(trace, disk) == before + 1


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["asked", "forced"])
def test_what_is_stopped_is_flushed(machines, traced, force):
  python, trace = traced
  machines.up()
  machines.ssh(press="vm")
  works(machines.qvm("stop", *force, "vm", python=python))
  assert flushes(trace, machines.qvm.cache / "instances" / "vm.qcow2") == 1


def test_a_second_machine_of_that_name_leaves_the_console_log_alone(machines):
  machines.up(stdout="booting\n")
  result = machines.qvm(*RUN, *GUEST)
  assert result.returncode == 1 and "already running" in result.stderr
  assert (machines.qvm.cache / "instances" / "vm.console.log").read_text() == "booting\n"
  assert machines.states() == {"vm": "running"}


def test_falling_back_is_said(machines):
  words = "failed to initialize kvm: Permission denied\nqemu: falling back to tcg\n"
  machines.play(**UP, stderr=words)
  result = machines.qvm(*RUN, "--ssh-port", str(free_port()), *GUEST)
  assert result.returncode == 0
  assert sum("slower" in line for line in lines_of(result)) == 1
  assert "usermod -aG kvm" in result.stderr


def test_what_qemu_holds(machines, tmp_path):
  port = free_port()
  machines.play(**UP, record=str(tmp_path / "record"))
  reader, writer = os.pipe()
  process = machines.qvm.start(
    *RUN, "--ssh-port", str(port), *GUEST, pass_fds=[reader], start_new_session=True
  )
  process.communicate(timeout=DEADLINE)
  os.close(reader)
  os.close(writer)
  record = json.loads((tmp_path / "record").read_text())
  assert record["session"] == record["pid"]
  folder = machines.qvm.cache / "instances"
  fds = record["fds"]
  assert fds.pop("0") == "/dev/null"
  (pipe,) = {fds.pop("1"), fds.pop("2")}  # to what keeps the log within bounds
  assert pipe.startswith("pipe:[")
  links = sorted(link for link in fds.values() if not link.startswith("/proc"))
  assert links[0] == str(folder / "vm.lock")
  assert re.fullmatch(r"socket:\[\d+\]", links[1])
  assert len(links) == 2


def test_nothing_of_the_caller_is_held_open(machines):
  """A script that reads qvm's output to its end does not wait for the machine."""
  machines.play(**UP)
  line = shlex.join(machines.qvm.command(*RUN, "--ssh-port", str(free_port()), *GUEST))
  result = subprocess.run(
    ["sh", "-c", f'text=$({line} 2>&1) && echo "$text"'],
    env=machines.qvm.env,
    stdout=subprocess.PIPE,
    text=True,
    timeout=DEADLINE,
  )
  assert "\nvm\n" in result.stdout


def test_a_hangup_of_the_terminal_leaves_the_machine(machines):
  pid = machines.up()
  process = machines.qvm.start("list", start_new_session=True)
  process.communicate(timeout=DEADLINE)
  assert os.getsid(pid) == pid  # no signal of a terminal reaches it
  assert machines.states() == {"vm": "running"}


def test_qvm_killed_while_it_waits(machines, tmp_path):
  machines.play(answers=[[]] * 100, record=str(tmp_path / "record"))
  os.mkfifo(tmp_path / "record")
  process = machines.qvm.start(*RUN, "--ssh-port", str(free_port()), *GUEST)
  pid = json.loads((tmp_path / "record").read_text())["pid"]
  assert "background" in process.stderr.readline()
  process.kill()
  process.communicate()
  assert machines.running() == [pid]
  assert machines.states() == {"vm": "running"}
  machines.ssh(press="vm")
  result = machines.qvm("stop", "vm")
  assert result.returncode == 0, result.stderr
  assert machines.running() == []
  assert machines.states() == {"vm": "stopped"}


@pytest.mark.parametrize("throw", [False, True], ids=["kept", "--rm"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_waits(machines, number, throw):
  machines.play(answers=[[]] * 100)
  more = ["--rm"] if throw else []
  process = machines.qvm.start(*RUN, *more, "--ssh-port", str(free_port()), *GUEST)
  assert "background" in process.stderr.readline()
  process.send_signal(number)
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out) == (128 + number, ""), err
  assert "Traceback" not in err
  assert machines.running() == []
  if throw:
    assert instances(machines) == []
  else:
    assert machines.states() == {"vm": "stopped"}


def test_detach_and_rm(machines):
  pid = machines.up("vm", "--rm")
  assert machines.states() == {"vm": "running"}
  names = instances(machines)
  assert "vm.qcow2" in names
  os.kill(pid, signal.SIGUSR1)
  wait_for(lambda: gone(pid))
  machines.qvm("list")
  assert instances(machines) == []


@pytest.mark.parametrize("command", [("stop", "vm"), ("rm", "--force", "vm"), ("list",)])
def test_detach_and_rm_with_the_next_command(machines, command):
  pid = machines.up("vm", "--rm")
  machines.ssh(press="vm")
  if command == ("list",):
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
  result = machines.qvm(*command)
  assert result.returncode == 0, result.stderr
  assert instances(machines) == []
  assert machines.running() == []


def test_a_dry_run_starts_nothing(machines):
  result = machines.qvm("run", "--dry-run", "--detach", "--name", "vm", *GUEST)
  assert result.returncode == 0
  assert len(result.stdout.splitlines()) == 1
  assert machines.running() == []
  assert not (machines.qvm.cache / "instances").exists()


def test_a_download_that_fails_leaves_no_instance(offline):
  result = offline("run", "--detach", "--name", "vm", *GUEST)
  assert result.returncode == 1
  assert json.loads(offline("list", "--json").stdout) == []
  offline("clean")
  assert [name for name in offline.files() if name.startswith("instances/")] == []


# --- stop ------------------------------------------------------------------------------------

POWER_OFF = [
  ("freebsd", "x86-64", "runner", "sudo shutdown -p now"),
  ("openbsd", "x86-64", "runner", "sudo shutdown -p now"),
  ("netbsd", "arm64", "runner", "sudo shutdown -p now"),
  ("haiku", "x86-64", "user", "shutdown -q"),
  ("omnios", "x86-64", "runner", "sudo shutdown -i5 -g0 -y"),
]


@pytest.mark.parametrize("os_name, arch, user, command", POWER_OFF)
def test_each_guest_is_powered_off_in_its_own_way(machines, image, os_name, arch, user, command):
  cache, cpu = machines.qvm.cache, {"arm64": "aarch64"}.get(arch, "x86_64")
  if cpu != "x86_64":
    (cache / "qemu" / "x86_64").rename(cache / "qemu" / cpu)
    program = cache / "qemu" / cpu / "bin" / "qemu-system-x86_64"
    program.rename(program.with_name("qemu-system-" + cpu))
    (cache / "qemu" / cpu / "share" / "qemu" / "uefi.fd").write_bytes(b"uefi")
  (cache / "base" / f"{os_name}-1-{arch}.qcow2").write_bytes(image)
  port = free_port()
  machines.play(**UP)
  words = ["-d", "--name", "a.b~c+1", "--platform", arch, "--ssh-port", f"127.0.0.1:{port}"]
  assert machines.qvm("run", *words, os_name, "1").returncode == 0
  machines.ssh(press="a.b~c+1")
  result = machines.qvm("stop", "a.b~c+1")
  assert (result.returncode, result.stdout) == (0, "a.b~c+1\n"), result.stderr
  (call,) = machines.calls()
  assert call[-2:] == [f"{user}@127.0.0.1", command]
  assert call[2:4] == ["-F", "/dev/null"]
  assert call[call.index("-p") + 1] == str(port)
  options = dict(word.split("=", 1) for word in call[call.index("-o") + 1 : -2 : 2])
  assert options["BatchMode"] == "yes"
  assert options["StrictHostKeyChecking"] in ("no", "accept-new")
  assert options["UserKnownHostsFile"] == "instances/a.b~c+1.known_hosts"
  assert call[0] == str(cache), "it is started where these paths lead"
  assert any("asking " in line for line in lines_of(result))
  assert any("powered off" in line for line in lines_of(result))
  assert machines.running() == []


@pytest.mark.parametrize("log", ["stderr", "log"])
def test_a_connection_that_the_guest_closes_is_no_failure(machines, log):
  closed = f"{qvm_source.LOGGED_IN}\nConnection to 127.0.0.1 closed by remote host.\r\n"
  machines.up()
  machines.ssh(press="vm", exit=255, **{log: closed})
  result = machines.qvm("stop", "vm")
  assert result.returncode == 0, result.stderr
  assert "SIGTERM" not in result.stderr


@pytest.mark.parametrize(
  "ssh",
  [
    {"exit": 255, "log": "Permission denied (publickey,password).\n"},
    {"exit": 255, "log": "ssh: connect to host 127.0.0.1 port 1: Connection refused\n"},
    {"exit": 255, "log": ""},
    {"exit": 1},
  ],
)
def test_a_guest_that_cannot_be_asked(machines, ssh):
  machines.up()
  machines.ssh(**ssh)
  result = machines.qvm("stop", "--boot-timeout", "0", "vm")
  assert (result.returncode, result.stdout) == (0, "vm\n"), result.stderr
  said = lines_of(result)
  assert len(machines.calls()) == 1
  assert any(ssh.get("log", "").strip() in line and "power off" in line for line in said)
  assert sum("SIGTERM" in line for line in said) == 1
  assert not any("SIGKILL" in line for line in said)
  assert machines.running() == []


def test_a_guest_that_takes_the_order_and_goes_on(machines):
  machines.up(ignore_term=True)
  result = machines.patient("stop", "vm")
  assert (result.returncode, result.stdout) == (0, "vm\n"), result.stderr
  steps = [word for line in lines_of(result) for word in re.findall(STEPS, line)]
  assert steps == ["asking", "not powered off", "SIGTERM", "SIGKILL"]
  assert machines.running() == []
  assert machines.states() == {"vm": "stopped"}


STEPS = r"asking|not powered off|SIGTERM|SIGKILL"


@pytest.mark.parametrize("ignore, steps", [(False, ["SIGTERM"]), (True, ["SIGTERM", "SIGKILL"])])
def test_force(machines, ignore, steps):
  machines.up(ignore_term=ignore)
  result = machines.patient("stop", "--force", "vm")
  assert (result.returncode, result.stdout) == (0, "vm\n"), result.stderr
  assert [word for line in lines_of(result) for word in re.findall(STEPS, line)] == steps
  assert machines.calls() == []
  assert machines.running() == []


KILLED = """
start = qvm.Machine.start_qemu
qvm.Machine.start_qemu = lambda *words: (start(*words), os.kill(os.getpid(), 9))
"""


@pytest.mark.parametrize("words", [(), ("--detach",)])
def test_a_qvm_that_is_killed_once_qemu_runs(machines, words):
  machines.play(**UP, stay=True)
  result = machines.qvm("run", *words, "--name", "vm", *GUEST, code=KILLED)
  assert result.returncode == -9
  (pid,) = machines.running()
  assert machines.states() == {"vm": "running"}
  result = machines.qvm("stop", "--force", "vm")
  assert (result.returncode, result.stdout) == (0, "vm\n"), result.stderr
  assert f"QEMU process {pid}" in result.stderr
  assert machines.running() == []


def test_no_ssh_on_the_path(machines, tmp_path):
  machines.up()
  empty = tmp_path / "empty"
  empty.mkdir()
  result = machines.qvm("stop", "vm", env={"PATH": str(empty)})
  assert result.returncode == 0, result.stderr
  assert "no ssh" in result.stderr and "SIGTERM" in result.stderr
  assert machines.running() == []


def test_several(machines):
  for name in ("one", "two", "three"):
    machines.up(name)
  machines.ssh(exit=255, log="Permission denied (publickey).")
  result = machines.qvm("stop", "two", "one", "two")
  assert (result.returncode, result.stdout) == (0, "two\none\n"), result.stderr
  assert machines.states() == {"one": "stopped", "two": "stopped", "three": "running"}


@pytest.mark.parametrize("command", [("stop",), ("stop", "--force")])
def test_an_unknown_name_stops_nothing(machines, command):
  machines.up()
  result = machines.qvm(*command, "vm", "nosuch")
  assert result.returncode == 1
  assert "nosuch" in result.stderr
  assert machines.states() == {"vm": "running"}
  assert machines.calls() == []


def test_a_stopped_one_stops_nothing(machines):
  machines.up("sleeping")
  assert machines.qvm("stop", "--force", "sleeping").returncode == 0
  machines.up("vm")
  result = machines.qvm("stop", "vm", "sleeping")
  assert result.returncode == 1
  assert result.stderr.splitlines()[-2:] == [
    "qvm: the instance sleeping is not running; nothing was stopped",
    "qvm: see qvm list",
  ]
  assert machines.states() == {"sleeping": "stopped", "vm": "running"}


@pytest.mark.parametrize("command, code", [("ssh", 125), ("restart", 1)])
def test_the_line_that_starts_a_stopped_one_does(machines, command, code):
  """As it was started last, but on any port."""
  machines.up("vm", "-m", "512M")
  assert machines.qvm("stop", "--force", "vm").returncode == 0
  result = machines.qvm(command, "vm")
  assert result.returncode == code and "vm is not running" in result.stderr
  hint = result.stderr.splitlines()[-1]
  assert "--memory=512M" in hint and "--ssh-port" not in hint
  result = machines.qvm(*shlex.split(hint.partition("start it: qvm ")[2]))
  assert result.returncode == 0 and machines.states() == {"vm": "running"}, result.stderr


def test_stop_in_an_empty_home(offline):
  result = offline("stop", "vm")
  assert result.returncode == 1 and "no instance vm" in result.stderr
  assert not offline.cache.exists()


def test_ctrl_c_while_ssh_hangs(machines, fifo):
  machines.up()
  machines.ssh(hang=True, started=str(fifo))
  process = machines.qvm.start("stop", "vm", start_new_session=True)
  fifo.read_text()
  pid = json.loads((machines.folder / "calls").read_text().splitlines()[0])[0]
  os.kill(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out) == (130, ""), err
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)
  assert machines.states() == {"vm": "running"}


def test_stop_a_run_in_the_foreground(machines):
  machines.play(**UP, stdout="up\n", stay=True)
  process = machines.qvm.start("run", "--name", "vm", "--ssh-port", str(free_port()), *GUEST)
  assert process.stdout.readline() == "up\n"
  machines.ssh(press="vm")
  result = machines.qvm("stop", "vm")
  assert result.returncode == 0, result.stderr
  out, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0, err
  assert "Traceback" not in err and "QEMU failed: " not in err
  assert instances(machines) == ["vm.json", "vm.qcow2"]


@pytest.mark.parametrize("command", [("stop",), ("stop", "--force"), ("rm", "--force")])
def test_end_a_run_with_rm_in_the_foreground(machines, command):
  machines.play(**UP, stdout="up\n", stay=True)
  port = str(free_port())
  process = machines.qvm.start("run", "--rm", "--name", "vm", "--ssh-port", port, *GUEST)
  assert process.stdout.readline() == "up\n"
  machines.ssh(press="vm")
  result = machines.qvm(*command, "vm")
  assert (result.returncode, result.stdout) == (0, "vm\n"), result.stderr
  process.communicate(timeout=DEADLINE)
  assert process.returncode == 0
  assert instances(machines) == []


def test_a_run_that_still_downloads_is_not_asked_over_ssh(machines, server):
  """Its record tells the address of its last run, where by now another machine may listen."""
  import threading

  machines.up()
  machines.ssh(exit=255, log="Permission denied (publickey).")
  assert machines.qvm("stop", "vm").returncode == 0
  before = len(machines.calls())
  qvm, tree = machines.qvm, machines.qvm.cache / "qemu" / "x86_64"
  tree.rename(tree.with_name("away"))
  qvm.env.update(QVM_RELEASES_URL=server.url, QVM_API_URL=server.api_url)
  stalled = server.fault("qemu-system-x86_64", pause=threading.Event(), pause_at=100)
  process = qvm.start("run", "--name", "vm", *GUEST)
  assert stalled.reached.wait(DEADLINE)
  shown = machines.row("vm")["ssh"]
  result = qvm("stop", "vm")
  assert result.returncode == 0, result.stderr
  assert len(machines.calls()) == before
  assert shown == ""
  process.communicate(timeout=DEADLINE)
  assert process.returncode == 143
  stalled.pause.set()


# --- rm --------------------------------------------------------------------------------------


def test_rm_of_a_running_one(machines):
  machines.up()
  result = machines.qvm("rm", "vm")
  assert result.returncode == 1
  assert "stop" in result.stderr and "--force" in result.stderr
  assert machines.states() == {"vm": "running"}
  result = machines.qvm("rm", "--force", "vm")
  assert (result.returncode, result.stdout) == (0, "vm\n"), result.stderr
  assert machines.running() == []
  assert instances(machines) == []


def test_rm_force_of_several(machines):
  machines.up("one")
  machines.up("two", ignore_term=True)
  machines.qvm("stop", "--force", "one")
  result = machines.patient("rm", "--force", "one", "two")
  assert (result.returncode, result.stdout) == (0, "one\ntwo\n"), result.stderr
  assert machines.running() == []
  assert instances(machines) == []


# --- Locks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text",
  [
    "",
    "\0\xff nonsense\n",
    "QEMU process {me}\n",
    "QEMU process 4194305\n",
  ],
)
def test_a_lock_that_nobody_holds(machines, text):
  """After a reboot: the file is there, and its process may be anybody's by now."""
  pid = machines.up()
  os.kill(pid, signal.SIGKILL)
  wait_for(lambda: gone(pid))
  lock = machines.qvm.cache / "instances" / "vm.lock"
  lock.write_bytes(text.format(me=os.getpid()).encode("latin-1"))
  assert machines.states() == {"vm": "stopped"}
  assert machines.row("vm")["ssh"] == ""
  for command in (("stop", "vm"), ("stop", "--force", "vm")):
    result = machines.qvm(*command)
    assert result.returncode == 1 and "is not running" in result.stderr
  machines.up()
  assert machines.states() == {"vm": "running"}
  assert machines.qvm("rm", "--force", "vm").returncode == 0
  assert instances(machines) == []


@pytest.mark.parametrize("text", ["", "nonsense\n", "QEMU process 0\n", "QEMU process -1\n"])
def test_a_lock_whose_note_is_damaged(machines, text):
  """Running it is; but no process is ended that the note does not name."""
  machines.up()
  lock = machines.qvm.cache / "instances" / "vm.lock"
  note = lock.read_text()
  lock.write_text(text)
  assert machines.states() == {"vm": "running"}
  result = machines.patient("stop", "--force", "vm")
  assert result.returncode == 1
  assert "Traceback" not in result.stderr and "bug in qvm" not in result.stderr
  assert "cannot be stopped" in result.stderr
  lock.write_text(note)
  assert machines.qvm("stop", "--force", "vm").returncode == 0


def test_qvm_killed_in_the_foreground(machines):
  machines.play(**UP, stdout="up\n", stay=True)
  process = machines.qvm.start("run", "--name", "vm", "--ssh-port", str(free_port()), *GUEST)
  assert process.stdout.readline() == "up\n"
  pid = qemu_pid(machines.qvm, "vm")
  assert parent_of(pid) == process.pid
  process.kill()
  process.wait()
  assert machines.states() == {"vm": "running"}
  for command in (("rm", "vm"), ("run", "--name", "vm", *GUEST)):
    result = machines.qvm(*command)
    assert result.returncode == 1 and "already running" in result.stderr, result.stderr
    assert str(pid) in result.stderr
  assert machines.running() == [pid]
  result = machines.qvm("stop", "--force", "vm")
  assert result.returncode == 0, result.stderr
  process.stdout.close()
  process.stderr.close()
  assert machines.running() == []
  assert machines.states() == {"vm": "stopped"}
  assert machines.qvm("rm", "vm").returncode == 0


def test_a_machine_without_its_record(machines):
  """list, stop and rm agree also where the record is damaged."""
  machines.up()
  record = machines.qvm.cache / "instances" / "vm.json"
  record.write_text("{")
  assert machines.states() == {"vm": "running"}
  result = machines.qvm("stop", "vm")
  assert result.returncode == 0, result.stderr
  assert machines.calls() == []
  assert "SIGTERM" in result.stderr
  assert machines.states() == {"vm": "stopped"}
  assert machines.qvm("rm", "vm").returncode == 0


@pytest.mark.parametrize(
  "wrong, problem",
  [
    ({"ssh": ""}, "its record is damaged"),
    ({"ssh": "-oProxyCommand=x:22"}, "its record is damaged"),
    ({"os": "plan9"}, "unknown OS 'plan9'; choose from "),  # a newer qvm may have it
  ],
)
def test_a_record_that_does_not_say_how_to_log_in(machines, wrong, problem):
  machines.up()
  path = machines.qvm.cache / "instances" / "vm.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
  result = machines.qvm("stop", "vm")
  assert result.returncode == 0 and f"cannot ask vm to power off: {problem}" in result.stderr
  assert machines.calls() == []
  assert "--ssh-port" not in result.stderr and "invalid ssh port" not in result.stderr
  assert machines.running() == []


def test_many_at_once(machines):
  """Each gets a port of its own, and is stopped without the others."""
  machines.play(**UP)
  names = [f"vm{number}" for number in range(4)]
  processes = [machines.qvm.start("run", "-d", "--name", name, *GUEST) for name in names]
  lines = [process.communicate(timeout=DEADLINE) for process in processes]
  assert [process.returncode for process in processes] == [0] * 4, lines
  ports = {re.search(r"ssh -p (\d+)", out).group(1) for out, _ in lines}
  assert len(ports) == 4
  assert machines.states() == dict.fromkeys(names, "running")
  stops = [machines.qvm.start("stop", "--force", name) for name in names[:3]]
  for process in stops:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
  assert machines.states() == {**dict.fromkeys(names, "stopped"), "vm3": "running"}
