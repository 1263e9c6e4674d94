"""Life with ssh: servers that punish and refuse, signals, host keys, other containers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from support import DEADLINE, ended, fails, finished, processes_of, rows, works

import qvm as qvm_source

NO_SECONDS = "qvm.TERM_GRACE_SECONDS = 1.0"
MINUTES = "qvm.TERM_GRACE_SECONDS = 240.0"  # a busy machine may take more than ten seconds


def address(qvm, name="vm"):
  host, _, port = rows(qvm)[name]["ssh"].partition(":")
  return host, int(port)


def punished(guests):
  """What the punishing server has counted."""
  path = guests.folder / "punished.log"
  return path.read_text().split("\n")[:-1] if path.exists() else []


def left_in_the_guest(guests):
  """The files that name commands' process groups."""
  return [name for name in os.listdir(guests.folder / "home" / "runner") if ".qvm-" in name]


def gone_in_the_guest(guests):
  """Wait until no command runs there: what was killed takes a moment."""
  deadline = time.monotonic() + DEADLINE
  while left_in_the_guest(guests):
    assert time.monotonic() < deadline, left_in_the_guest(guests)
    time.sleep(0.01)


def test_a_process_that_stops_while_it_waits_for_ssh(monkeypatch):
  """As with kill -STOP: the time is over between two looks at the clock."""
  seconds = iter((0.0, 1.0, 1000.0, 1001.0))
  monkeypatch.setattr(qvm_source.time, "monotonic", lambda: next(seconds))
  nowhere = qvm_source.Address("127.0.0.1", 9)
  assert qvm_source.wait_for_ssh(nowhere, 10.0, lambda pause: False) is False


# --- A server that punishes -------------------------------------------------------------------

SERVERS = {"Debian's": {"daemon": True}, "punishing": {"punish": True}}


@pytest.mark.parametrize("server_kind", SERVERS)
def test_calls_in_a_row(guests, server_kind):
  """Each without a probe: the one at the boot is the only connection that does not log in."""
  guests.play(**SERVERS[server_kind])
  guests.up()
  for n in range(20):
    result = guests.qvm("ssh", "vm", "--", "echo", str(n))
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{n}\n", "")
  works(guests.qvm("stop", "vm"))
  assert [line for line in punished(guests) if line != "noauth"] == []
  assert len(punished(guests)) <= 1


@pytest.mark.parametrize("server_kind", SERVERS)
def test_thirty_calls_at_once(guests, server_kind):
  guests.play(**SERVERS[server_kind])
  guests.up()
  calls = [guests.qvm.start("ssh", "vm", "--", "echo", str(n)) for n in range(30)]
  results = [finished(call) for call in calls]
  assert [(it.returncode, it.stdout) for it in results] == [(0, f"{n}\n") for n in range(30)]
  assert all(it.stderr.count("\n") <= 1 for it in results)
  works(guests.qvm("stop", "vm"))


def penalise(guests, qvm):
  """Have the server refuse us for a while, as after many failed logins."""
  (guests.folder / "penalise").touch()
  with socket.create_connection(address(qvm)) as link:
    assert link.recv(100) == b"Not allowed at this time\r\n"


@pytest.mark.parametrize("words", [("ssh", "vm", "--", "true"), ("stop", "vm")], ids="-".join)
def test_a_penalty_is_waited_for(guests, words):
  guests.play(punish=0.5)
  guests.up()
  penalise(guests, guests.qvm)
  result = works(guests.qvm(*words))
  assert result.stderr.count("lets nobody log in yet") == 1
  assert "SIGTERM" not in result.stderr
  if words[0] == "ssh":
    works(guests.qvm("stop", "vm"))
  else:
    assert "has powered off" in result.stderr


def test_patience_has_its_end(guests):
  guests.play(punish=100)
  guests.up()
  penalise(guests, guests.qvm)
  result = guests.qvm("ssh", "--boot-timeout", "0.1", "vm", "--", "true")
  fails(result, "cannot log in to vm as runner at", code=125)
  result = works(guests.qvm("stop", "--boot-timeout", "0.1", "vm"))
  assert "cannot ask vm to power off" in result.stderr and "SIGTERM" in result.stderr


def test_a_machine_that_ends_is_not_waited_for(guests):
  guests.play(punish=100)
  guests.up()
  penalise(guests, guests.qvm)
  call = guests.qvm.start("ssh", "vm", "--", "true")
  count = len(punished(guests))
  while len(punished(guests)) == count:
    assert call.poll() is None
  works(guests.qvm("stop", "--force", "vm"))
  fails(finished(call), "vm has ended before a login", code=125)


# --- Signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handed_on(guests, number):
  guests.up()
  name = signal.Signals(number).name[3:]
  script = f"trap 'echo got {name}; exit 7' {name}; echo up; while :; do sleep 0.1; done"
  call = guests.qvm.start("ssh", "vm", "--", script, code=MINUTES)
  assert call.stdout.readline() == "up\n"
  call.send_signal(number)
  result = finished(call)
  assert (result.returncode, result.stdout) == (7, f"got {name}\n")
  assert "qvm:" not in result.stderr
  gone_in_the_guest(guests)
  works(guests.qvm("stop", "vm"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_does_not_handle_it_ends_by_it(guests, number):
  guests.up()
  call = guests.qvm.start("ssh", "vm", "--", "echo $$; exec sleep 600")
  pid = int(call.stdout.readline())
  call.send_signal(number)
  assert finished(call).returncode == 128 + number
  gone_in_the_guest(guests)
  assert not os.path.exists(f"/proc/{pid}")
  works(guests.qvm("stop", "vm"))


def patient(guests, *words):
  return guests.qvm.start(*words, code=NO_SECONDS)


def test_what_ignores_sigterm_is_killed(guests):
  guests.up()
  call = patient(guests, "ssh", "vm", "--", "trap '' TERM; echo $$; while :; do sleep 0.1; done")
  pid = int(call.stdout.readline())
  call.terminate()
  assert finished(call).returncode == 128 + signal.SIGTERM
  gone_in_the_guest(guests)
  assert not os.path.exists(f"/proc/{pid}")
  works(guests.qvm("stop", "vm"))


def test_what_ignores_sighup_goes_on(guests):
  """As nohup wants it; qvm itself ends."""
  guests.up()
  call = patient(guests, "ssh", "vm", "--", "trap '' HUP; echo $$; exec sleep 600")
  pid = int(call.stdout.readline())
  call.send_signal(signal.SIGHUP)
  assert finished(call).returncode == 128 + signal.SIGHUP
  assert os.path.exists(f"/proc/{pid}")
  works(guests.qvm("stop", "vm"))


def test_a_signal_and_a_folder(guests, tmp_path):
  """What the command has made until then comes back."""
  (tmp_path / "project").mkdir()
  script = "echo half >result; echo up; exec sleep 600"
  call = guests.start(script, options=("--sync", str(tmp_path / "project")))
  assert call.stdout.readline() == "up\n"
  call.terminate()
  assert finished(call).returncode == 128 + signal.SIGTERM
  assert (tmp_path / "project" / "result").read_text() == "half\n"
  assert guests.nothing_left()


# --- Exit code 255 ------------------------------------------------------------------------------


def test_255_is_the_commands(guests):
  guests.up()
  for command in ("exit 255", "echo 'Connection to x closed by remote host.' >&2; exit 255"):
    result = guests.qvm("ssh", "vm", "--", command)
    assert result.returncode == 255 and "qvm:" not in result.stderr
  result = guests.qvm("ssh", "vm", input="exit 255\n")
  assert (result.returncode, result.stderr) == (255, "")
  works(guests.qvm("stop", "vm"))


def test_a_connection_that_is_cut_is_no_exit_code(guests):
  guests.up()
  # The parent of the shell is the sshd of this connection.
  result = guests.qvm("ssh", "vm", "--", "sleep 600 & kill -9 $(ps -o ppid= -p $PPID); wait")
  assert (result.returncode, result.stdout) == (125, "")
  assert "qvm: the connection to vm was lost" in result.stderr
  gone_in_the_guest(guests)  # and the command with it
  works(guests.qvm("stop", "vm"))


# --- Host keys ----------------------------------------------------------------------------------


def new_host_key(guests):
  for path in guests.folder.glob("host_key*"):
    path.unlink()
  command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(guests.folder / "host_key")]
  subprocess.run(command, check=True)


@pytest.mark.parametrize("command, state", [("stop", "stopped"), ("restart", "running")])
def test_one_that_fails_does_not_hold_up_the_others(guests, tmp_path, command, state):
  guests.up("one")
  assert guests.qvm("ssh", "one", "--", "exit 3").returncode == 3
  new_host_key(guests)
  guests.play(folder=str(tmp_path / "second"))
  guests.up("two")
  run = guests.qvm(command, "one", "two")
  assert (run.returncode, run.stdout) == (1, "two\n"), run.stderr
  assert "qvm: one has another host key" in run.stderr
  found = {name: row["state"] for name, row in rows(guests.qvm).items()}
  assert found == {"one": "running", "two": state}


def test_another_host_key_is_refused(guests):
  guests.up()
  assert guests.qvm("ssh", "vm", "--", "exit 255").returncode == 255
  new_host_key(guests)
  result = guests.qvm("ssh", "vm", "--", "echo in")
  fails(result, "vm has another host key than at the last login", code=125)
  assert result.stdout == ""
  stopped = guests.qvm("stop", "vm")
  assert (stopped.returncode, stopped.stdout) == (1, "")
  assert "has another host key" in stopped.stderr  # ssh answers, so nobody pulls the plug
  assert rows(guests.qvm)["vm"]["state"] == "running"
  fix = re.search(r"rm (/\S+)", stopped.stderr).group(1)
  os.unlink(fix)
  assert guests.qvm("ssh", "vm", "--", "exit 255").returncode == 255
  works(guests.qvm("stop", "vm"))


def test_the_host_key_is_the_instances_whatever_its_port(guests):
  guests.up()
  works(guests.qvm("ssh", "vm", "--", "true"))
  works(guests.qvm("stop", "vm"))
  guests.up()  # at another port
  works(guests.qvm("ssh", "vm", "--", "true"))
  new_host_key(guests)
  assert guests.qvm("ssh", "vm", "--", "true").returncode == 125
  works(guests.qvm("stop", "--force", "vm"))
  works(guests.qvm("rm", "vm"))
  guests.up()  # a new instance has new keys
  works(guests.qvm("ssh", "vm", "--", "true"))
  works(guests.qvm("stop", "vm"))
  assert guests.qvm("rm", "vm").returncode == 0 and guests.instances() == []


# --- Other containers -----------------------------------------------------------------------------


def rewrite_note(guests, line, text):
  path = guests.qvm.cache / "instances" / "vm.lock"
  lines = path.read_text().split("\n")
  lines[line] = text
  path.write_text("\n".join(lines))  # the lock is on this very file
  return lines


ELSEWHERE = [("ssh", "vm", "--", "true"), ("stop", "vm"), ("stop", "--force", "vm")]
ELSEWHERE += [("rm", "--force", "vm")]


def test_a_machine_of_another_host(guests):
  guests.up()
  (pid, *_) = processes_of(guests.qvm.cache)
  there = rewrite_note(guests, 2, "another boot pid:[1] net:[2]")
  rewrite_note(guests, 3, "blue")
  for words in ELSEWHERE:
    result = guests.qvm(*words)
    code = 125 if words[0] == "ssh" else 1
    fails(result, "vm runs in another container or on another host (blue)", code=code)
  row = rows(guests.qvm)["vm"]
  assert (row["state"], row["ssh"]) == ("running", "")
  assert pid in processes_of(guests.qvm.cache)
  assert there[0].startswith("QEMU process ")
  rewrite_note(guests, 2, "")  # of a qvm that noted none
  works(guests.qvm("stop", "vm"))


IN_ANOTHER = ["unshare", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]


@pytest.mark.skipif(
  not shutil.which("unshare") or subprocess.run([*IN_ANOTHER, "true"]).returncode != 0,
  reason="no namespaces",
)
def test_from_within_another_container(guests):
  """There its process id is another process, and its address another machine, or nobody."""
  guests.up()
  before = set(processes_of(guests.qvm.cache))
  for words in ELSEWHERE:
    command = [*IN_ANOTHER, *guests.qvm.command(*words)]
    result = subprocess.run(command, env=guests.qvm.env, capture_output=True, text=True)
    assert result.returncode in (1, 125)
    assert "vm runs in another container or on another host" in result.stderr
  assert before <= set(processes_of(guests.qvm.cache))
  works(guests.qvm("stop", "vm"))


def test_a_process_id_that_is_another_process_by_now(guests):
  guests.up()
  with ended(subprocess.Popen(["sleep", "600"])) as other:
    machine = guests.machine()
    rewrite_note(guests, 0, f"QEMU process {other.pid}")
    result = guests.qvm("stop", "--force", "vm")
    fails(result, "the instance vm cannot be stopped")
    assert other.poll() is None
  rewrite_note(guests, 0, f"QEMU process {machine}")
  works(guests.qvm("stop", "vm"))


# --- Results that nobody can take -----------------------------------------------------------------


@pytest.mark.parametrize("way", ["full", "broken", "closed"])
def test_a_machine_in_the_background_whose_name_cannot_be_told(guests, way):
  """It runs as asked, so the code is 0, as docker's; stderr says what runs."""
  reading, writing = os.pipe()
  os.close(reading)
  words = ("run", "-d", "--name", "vm", *guests.words()[-2:])
  with open("/dev/full", "w") as full:
    more = {"full": {"stdout": full}, "broken": {"stdout": writing}}.get(way, {})
    more = more or {"stdout": None, "preexec_fn": lambda: os.close(1)}
    result = guests.qvm(*words, **more)
  os.close(writing)
  assert result.returncode == 0, result.stderr
  assert rows(guests.qvm)["vm"]["state"] == "running"
  if way != "closed":
    assert "vm runs in the background (ssh -p " in result.stderr
  works(guests.qvm("stop", "vm"))


def test_python_warns_of_nothing(guests, tmp_path):
  """Under python -X dev: of no process, file or thread that was left over."""
  guests.qvm.env["PYTHONDEVMODE"] = "1"
  (tmp_path / "p").mkdir()
  said = works(guests.run("true", options=("--sync", str(tmp_path / "p")))).stderr
  words = guests.words("--name", "vm", rm=False)
  said += works(guests.qvm(words[0], "-d", *words[1:])).stderr
  for words in (("ssh", "vm", "--", "true"), ("logs", "vm"), ("list",), ("stop", "vm")):
    said += works(guests.qvm(*words)).stderr
  assert "Warning" not in said, said


def test_the_note_of_a_machine(guests):
  guests.up()
  lines = (guests.qvm.cache / "instances" / "vm.lock").read_text().split("\n")
  pid = guests.machine()
  stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net")]
  host = os.uname().nodename
  assert lines == [f"QEMU process {pid}", stat[19], " ".join([boot, *spaces]), host, ""]
  assert json.loads(guests.qvm("list", "--json").stdout)[0]["ssh"]
  works(guests.qvm("stop", "vm"))
