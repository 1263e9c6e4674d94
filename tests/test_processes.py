"""QEMU as a process: its start, signals, descriptors, ports and terminal, on every kind of host."""

import contextlib
import errno
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tty
from pathlib import Path

import pytest
from support import (
  DEADLINE,
  FREEBSD,
  PYTHON,
  STAND_IN,
  Qvm,
  alive,
  disk_of,
  ended,
  fails,
  free_port,
  heard,
  instance_names,
  kill_if_mine,
  read_until,
  stand_in_tar,
  state,
  tar_of,
  wait_for,
)
from support_pythons import since
from support_terminal import Terminal

import qvm as qvm_source

RUN = ("run", "freebsd", "15.1")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ids = {"ids": lambda value: getattr(value, "name", None)}


# --- Exit codes and streams ------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 7, 125, 130, 255])
def test_exit_codes_are_passed_on(used, code):
  used.play(exit=code)
  assert used(*RUN).returncode == code


@pytest.mark.parametrize("number", [1, 2, 9, 10, 14, 15])
def test_a_qemu_that_a_signal_ends(used, number):
  used.play(signal=number)
  run = used(*RUN)
  assert run.returncode == 128 + number
  assert "bug" not in run.stderr


def test_streams_are_qemus_own(used):
  used.play(cat=True, stdout="to stdout\n", stderr="to stderr\n", exit=3)
  process = used.start(*RUN, stdin=subprocess.PIPE)
  stdout, stderr = process.communicate("typed")
  assert (process.returncode, stdout) == (3, "to stdout\ntyped")
  assert "to stderr\n" in stderr.splitlines(keepends=True)


def test_qemu_inherits_the_locks_and_nothing_else(used, tmp_path):
  used.play(record=str(tmp_path / "record"))
  port = free_port()
  with open(tmp_path / "in", "w+") as stdin, open(tmp_path / "other", "w") as other:
    os.set_inheritable(other.fileno(), True)
    run = used(*RUN, "--ssh-port", str(port), stdin=stdin, pass_fds=[other.fileno()])
  assert run.returncode == 0, run.stderr
  fds = used.record(tmp_path / "record")["fds"]
  assert {fds.pop(fd)[:5] for fd in "012"} == {"pipe:"}
  instance, port_lock = sorted(fds.values())
  assert instance == f"{used.cache}/instances/{FREEBSD}.lock"
  assert re.fullmatch(r"socket:\[\d+\]", port_lock)


def test_both_locks_are_held_by_qemu_alone(used, background):
  port = str(free_port())
  process, record = background(used, *RUN, "--ssh-port", port)
  process.kill()
  process.wait()
  with open(used.cache / f"instances/{FREEBSD}.lock") as file:
    with pytest.raises(BlockingIOError):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fails(used(*RUN, "--rm", "--ssh-port", port), f"port {port}")
    os.kill(record["pid"], signal.SIGKILL)
    fcntl.flock(file, fcntl.LOCK_EX)
  assert used(*RUN, "--ssh-port", port).returncode == 0


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_closed_streams_do_not_mix_with_files(qvm, image, tmp_path, closed):
  """Without care a file that is opened gets the number of a stream, and lines for it."""

  def close():
    for fd in closed:
      os.close(fd)

  qvm.play(record=str(tmp_path / "record"), stdout="console\n", stderr="QEMU's words\n")
  run = qvm(*RUN, preexec_fn=close)
  assert run.returncode == 0, run.stderr
  assert (qvm.cache / f"base/{FREEBSD}.qcow2").read_bytes() == image
  fds = qvm.record(tmp_path / "record")["fds"]
  streams = [fds.get(str(fd), "") for fd in (0, 1, 2)]
  assert not [path for path in streams if str(qvm.cache) in path], fds
  assert instance_names(qvm) == [f"{FREEBSD}.json", f"{FREEBSD}.qcow2"]


def test_the_working_folder_and_environment_are_qemus_too(used, tmp_path):
  script = used.cache / "qemu/x86_64/bin/qemu-system-x86_64"
  script.write_text('#!/bin/sh\npwd\necho "$SECRET"\n')
  run = used(*RUN, cwd=tmp_path, env={"SECRET": "x y"})
  assert run.stdout == f"{tmp_path}\nx y\n"


def test_qemu_is_started_under_its_full_name(used, tmp_path):
  """A build finds its ROMs at ../share/qemu of the folder that it is started from."""
  used.play(record=str(tmp_path / "record"))
  assert used(*RUN, cwd="/").returncode == 0
  program = used.record(tmp_path / "record")["argv"][0]
  assert program == f"{used.cache}/qemu/x86_64/bin/qemu-system-x86_64"
  assert not os.path.islink(program)
  assert os.path.isdir(os.path.join(os.path.dirname(program), "../share/qemu"))


# --- Signals to qvm --------------------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS, **ids)
@pytest.mark.parametrize("more", [(), ("--rm",)], ids=["kept", "rm"])
def test_a_signal_ends_qemu_and_qvm(used, background, number, more):
  before = state(used.cache)
  process, record = background(used, *RUN, *more, "--ssh-port", str(free_port()))
  process.send_signal(number)
  assert process.wait(DEADLINE) == 128 + number
  assert not alive(record["pid"])
  after = state(used.cache)
  if not more:
    for files in (before, after):
      files.pop(f"{used.cache}/instances/{FREEBSD}.json")
  assert after == before
  assert "Traceback" not in process.stderr.read()


def test_a_qemu_that_ignores_sigterm_is_killed(used, background):
  """It has ten seconds; a second signal does not change what the first one began."""
  before = state(used.cache)
  play = {"ignore_term": True}
  process, record = background(used, *RUN, "--rm", "--ssh-port", str(free_port()), play=play)
  process.terminate()
  process.send_signal(signal.SIGHUP)
  code = process.wait(DEADLINE)
  assert code in (143, 129)
  assert not alive(record["pid"])
  assert state(used.cache) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], **ids)
def test_a_signal_that_was_ignored_from_the_start_stays_so(used, background, number):
  """As under nohup, or in the background of a shell without job control."""
  process, record = background(used, *RUN, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
  ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{record['pid']}/status").read_text())
  assert int(ignored.group(1), 16) >> (number - 1) & 1
  os.kill(record["pid"], number)
  process.send_signal(number)
  process.terminate()
  assert process.wait(DEADLINE) == 143


def test_qemu_ignores_no_signal_of_its_own_accord(used, tmp_path):
  script = used.cache / "qemu/x86_64/bin/qemu-system-x86_64"
  script.write_text("#!/bin/sh\nexec grep -E 'SigIgn|SigBlk' /proc/self/status\n")
  here = subprocess.run([script], stdout=subprocess.PIPE, text=True).stdout
  assert used(*RUN).stdout == here, "neither more nor less than without qvm"


def big_tar(size=2 << 20):
  """A QEMU archive that takes a while."""
  return stand_in_tar(rom=os.urandom(size))


@pytest.mark.parametrize("number", STOP_SIGNALS, **ids)
def test_a_signal_ends_a_download_that_stalls(qvm, server, number):
  name = "qemu-system-x86_64-linux.tar"
  content = big_tar()
  server.replace_asset("resources", "v2.0.0", name, content)
  fault = server.fault(name, stall=1 << 20)
  env = {"QVM_TIMEOUT": "3600"}
  with ended(qvm.start(*RUN, "--rm", env=env)) as process:
    assert fault.reached.wait(DEADLINE)
    part = qvm.cache / f"downloads/{name}/part"
    patience = time.monotonic() + DEADLINE
    while not part.exists() or part.stat().st_size < (1 << 20) - (1 << 18):
      assert time.monotonic() < patience
      time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(DEADLINE) == 128 + number
    assert "Traceback" not in process.stderr.read()
  assert content.startswith(part.read_bytes())
  kept = (part.parent / "map").read_bytes().count(1) * qvm_source.BLOCK_BYTES
  assert kept >= (1 << 20) - (1 << 18)
  assert instance_names(qvm) == []
  assert server.wait_idle(10)
  server.clear_log()
  assert qvm(*RUN).returncode == 0
  (request,) = server.requests(name, origin="cdn")
  assert request.headers["range"] == f"bytes={kept}-"
  assert request.sent == len(content) - kept


@pytest.mark.parametrize("number", STOP_SIGNALS, **ids)
@pytest.mark.parametrize("match, origin", [("releases/latest", "github"), ("download/", "github")])
def test_a_signal_ends_the_wait_for_an_answer(qvm, server, match, origin, number):
  fault = server.fault(match, origin=origin, times=None, stall="headers")
  with ended(qvm.start("pull", *RUN[1:], env={"QVM_TIMEOUT": "3600"})) as process:
    assert fault.reached.wait(DEADLINE)
    process.send_signal(number)
    assert process.wait(DEADLINE) == 128 + number
    assert "Traceback" not in process.stderr.read()


def test_a_signal_ends_the_wait_before_a_retry(qvm, server):
  server.fault("releases/latest", origin="github", times=None, status=503)
  with ended(qvm.start("pull", *RUN[1:], env={"QVM_RETRY_DELAY": "3600"})) as process:
    read_until(process.stderr, "trying again")
    process.terminate()
    assert process.wait(DEADLINE) == 143


@contextlib.contextmanager
def held(folder):
  """A folder that somebody works in."""
  fd = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield fd
  finally:
    os.close(fd)


@pytest.mark.parametrize("number", STOP_SIGNALS, **ids)
@pytest.mark.parametrize("name", [f"{FREEBSD}.qcow2", "resources-linux.tar"])
def test_a_signal_ends_the_wait_for_another_qvm(qvm, name, number):
  lock = qvm.cache / f"downloads/{name}"
  lock.mkdir(parents=True)
  with held(lock) as fd:
    with ended(qvm.start(*RUN)) as process:
      read_until(process.stderr, f"waiting for another qvm that downloads {name}")
      process.send_signal(number)
      assert process.wait(DEADLINE) == 128 + number
      assert "Traceback" not in process.stderr.read()
    assert os.path.samestat(os.fstat(fd), lock.stat()), "a lock that it never had"
  assert instance_names(qvm) == []
  assert qvm(*RUN).returncode == 0


def test_a_signal_while_the_overlay_is_made(used, tmp_path):
  """qemu-img is let finish; QEMU does not start any more."""
  fifo = tmp_path / "fifo"
  os.mkfifo(fifo)
  tool = used.cache / "bin/qemu-img"
  tool.rename(tool.with_name("real"))
  tool.write_text(f'#!/bin/sh\n: > {fifo}\n: < {fifo}\nexec {tool.with_name("real")} "$@"\n')
  tool.chmod(0o755)
  used.play(record=str(tmp_path / "record"))
  with ended(used.start(*RUN, "--rm")) as process:
    with open(fifo):
      process.terminate()
    with open(fifo, "w"):
      pass
    assert process.wait(DEADLINE) == 143
  assert not (tmp_path / "record").exists()
  assert instance_names(used) == [f"{FREEBSD}.json", f"{FREEBSD}.qcow2"]


@pytest.mark.parametrize("number", STOP_SIGNALS, **ids)
def test_a_signal_that_comes_when_all_is_done(offline, number):
  code = f"end = os._exit; os._exit = lambda code: (os.kill(os.getpid(), {int(number)}), end(code))"
  run = offline("config", "print-path", code=code)
  assert (run.stdout, run.stderr, run.returncode) == (f"{offline.cache}\n", "", 0)


@pytest.mark.parametrize("ending", ["signal", "error"])
def test_no_thread_is_left_to_the_interpreters_end(qvm, server, ending):
  """Python 3.12 and 3.13 crash now and then when they end while a daemon thread waits."""
  times = None if ending == "signal" else 1
  stalled = server.fault("releases/latest", origin="github", times=times, stall="headers")
  if ending == "error":
    server.fault("releases/latest", origin="github", times=None, status=404)
  at_end = "import atexit; atexit.register(os.write, 2, b'the interpreter ends')"
  with ended(qvm.start(*RUN, code=at_end, env={"QVM_TIMEOUT": "3600"})) as process:
    assert stalled.reached.wait(DEADLINE)
    if ending == "signal":
      process.terminate()
    assert process.wait(DEADLINE) == (143 if ending == "signal" else 1)
    assert "the interpreter ends" not in process.stderr.read()


# --- Ports -----------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(port=0, host="127.0.0.1"):
  """Something else that listens on a port."""
  with socket.socket() as taken:
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind((host, port))
    taken.listen()
    yield taken.getsockname()[1]


def forwarded(record):
  """The address at which QEMU was told to listen."""
  return re.search(r"hostfwd=tcp:([^,]*)-:22", " ".join(record["argv"])).group(1)


@pytest.fixture
def first_port(used, tmp_path):
  """Where qvm begins to look for a port, which is no one else's; other tests have the real one."""
  text = used.program.read_text()
  used.program = tmp_path / "qvm.py"
  with socket.socket() as mine:
    while not mine.getsockname()[1]:
      port = random.SystemRandom().randrange(10000, 15000, 10)  # below support.PORTS
      with contextlib.suppress(OSError):
        mine.bind(("", port + 9))  # for a test beside this one that comes upon the same
    used.program.write_text(text.replace("SSH_PORT = 2847\n", f"SSH_PORT = {port}\n"))
    yield port


def test_the_welcome_line(used, first_port, tmp_path):
  used.play(record=str(tmp_path / "record"))
  run = used(*RUN)
  assert (run.returncode, run.stderr) == (0, f"qvm: ssh -p {first_port} runner@127.0.0.1\n")
  assert forwarded(used.record(tmp_path / "record")) == f"127.0.0.1:{first_port}"


@pytest.mark.parametrize("taken", [1, 3])
def test_the_next_free_port_is_used_and_told(used, first_port, tmp_path, taken):
  used.play(record=str(tmp_path / "record"))
  with contextlib.ExitStack() as stack:
    for port in range(first_port, first_port + taken):
      stack.enter_context(listening(port))
    run = used(*RUN)
  port = first_port + taken
  assert run.returncode == 0
  assert run.stderr.splitlines() == [
    f"qvm: port {first_port} is taken; this machine uses {port}",
    f"qvm: ssh -p {port} runner@127.0.0.1",
  ]
  assert forwarded(used.record(tmp_path / "record")) == f"127.0.0.1:{port}"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("wanted", ["{}", "127.0.0.1:{}", "0.0.0.0:{}"])
def test_a_chosen_port_that_is_taken(qvm, server, tmp_path, host, wanted):
  qvm.play(record=str(tmp_path / "record"))
  with listening(host=host) as port:
    fails(qvm(*RUN, "--ssh-port", wanted.format(port)), f"port {port}", "--ssh-port")
  assert server.started == 0
  assert not (tmp_path / "record").exists()
  assert instance_names(qvm) == []


@pytest.mark.parametrize("kind, name", [(socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")])
def test_which_port_is_taken(used, kind, name):
  with socket.socket(socket.AF_INET, kind) as other:
    other.bind(("127.0.0.1", 0))
    if name == "TCP":
      other.listen(1)
    port = other.getsockname()[1]
    result = used(*RUN, "--ssh-port", str(port))
    fails(result, f"port {port} on 127.0.0.1 is taken", f"its {name} port")
    assert ("TCP" in result.stderr) != ("UDP" in result.stderr)


def test_a_chosen_port_of_another_qvm(used, background, tmp_path):
  """Its QEMU may not listen yet, so only the lock tells."""
  port = free_port()
  background(used, *RUN, "--ssh-port", str(port))
  fails(used(*RUN, "--rm", "--ssh-port", str(port)), f"port {port}", "taken")


def test_a_port_that_only_root_may_have(monkeypatch):
  def bind(self, address):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(socket.socket, "bind", bind)
  address = qvm_source.Address("127.0.0.1", 80)
  with pytest.raises(qvm_source.QvmError, match="port 80 needs root .--publish.; choose one above"):
    qvm_source.bind(socket.SOCK_STREAM, address, "--publish")


def test_two_caches_share_no_port(used, first_port, background, tmp_path):
  """The other QEMU may not listen yet, and its cache is none of ours."""
  _, record = background(used, *RUN)
  assert forwarded(record) == f"127.0.0.1:{first_port}"
  shutil.copytree(used.cache, tmp_path / "other", symlinks=True)
  used.env["QVM_CACHE_DIR"] = str(tmp_path / "other")
  used.play(record=str(tmp_path / "second"))
  run = used(*RUN, "--rm")
  assert run.returncode == 0, run.stderr
  assert forwarded(used.record(tmp_path / "second")) == f"127.0.0.1:{first_port + 1}"


def test_a_port_of_another_address_is_free(used):
  with listening(host="127.0.0.2") as port:
    assert used(*RUN, "--ssh-port", str(port)).returncode == 0


def test_the_same_port_on_another_address(used, background):
  """Two machines may share a port number when each has an address of its own."""
  port = free_port()
  background(used, *RUN, "--ssh-port", str(port))
  run = used(*RUN, "--rm", "--ssh-port", f"127.0.0.2:{port}")
  assert (run.returncode, run.stderr) == (0, f"qvm: ssh -p {port} runner@127.0.0.2\n")


@pytest.mark.parametrize("host", ["203.0.113.7", "8.8.8.8"])
def test_an_address_of_another_machine(qvm, server, host):
  fails(qvm(*RUN, "--ssh-port", f"{host}:2222"), host, "not an address of this machine")
  assert server.started == 0


def test_two_at_once_get_different_ports(used, background):
  first, second = (background(used, *RUN, "--rm") for _ in range(2))
  ports = set()
  for process, record in (first, second):
    host, _, port = forwarded(record).partition(":")
    ports.add(port)
    assert host == "127.0.0.1"
    assert f"qvm: ssh -p {port} runner@127.0.0.1" in read_until(process.stderr, r"qvm: ssh.*\n")
  assert len(ports) == 2


@pytest.mark.parametrize(
  "words, login",
  [
    (RUN, "runner@127.0.0.1"),
    ((*RUN, "--platform", "arm64"), "runner@127.0.0.1"),
    (("run", "openbsd", "7.9"), "runner@127.0.0.1"),
    (("run", "netbsd", "10.1"), "runner@127.0.0.1"),
    (("run", "omnios", "r151058"), "runner@127.0.0.1"),
    (("run", "haiku", "r1beta5"), "user@127.0.0.1"),
  ],
)
def test_who_can_log_in(qvm, words, login):
  port = free_port()
  run = qvm(*words, "--ssh-port", str(port))
  assert run.returncode == 0, run.stderr
  lines = run.stderr.splitlines()
  at = lines.index(f"qvm: ssh -p {port} {login}")
  assert all("download" in line for line in lines[:at])
  if "haiku" in words:
    assert re.fullmatch("qvm: Haiku writes nothing to this terminal; .*ssh.*", lines[at + 1])
  assert len(lines) == at + 1 + ("haiku" in words)


@pytest.mark.parametrize("host, shown", [("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")])
def test_the_welcome_line_of_another_address(used, host, shown):
  port = free_port()
  run = used(*RUN, "--ssh-port", f"{host}:{port}")
  assert (run.returncode, run.stderr) == (0, f"qvm: ssh -p {port} runner@{shown}\n")


# --- Programs that cannot be executed --------------------------------------------------------


def elf(machine):
  """A program of this host that says it is for another CPU."""
  content = bytearray(Path(os.path.realpath(sys.executable)).read_bytes()[:4096])
  content[18:20] = struct.pack("<H", machine)
  return bytes(content)


NOT_FOR_HERE = {
  "text": (b"just words\n", "qvm pull", "another CPU", "--qemu"),
  "empty": (b"", "qvm pull", "another CPU", "--qemu"),
  "another machine": (elf(0xBEEF), "qvm pull", "another CPU", "--qemu"),
  "no interpreter": (b"#!/no/such/interpreter\n", "interpreter is missing"),
  "interpreter a folder": (b"#!/tmp\n", "cannot execute"),
}


@pytest.mark.parametrize("rm", [(), ("--rm",)], ids=["kept", "rm"])
@pytest.mark.parametrize("content, fragments", [(v[0], v[1:]) for v in NOT_FOR_HERE.values()],
                         ids=NOT_FOR_HERE)  # fmt: skip
def test_a_qemu_that_cannot_be_executed(qvm, server, content, fragments, rm):
  files = {"bin/qemu": content, "share/qemu/bios-256k.bin": b"bios"}
  server.replace_asset("resources", "v2.0.0", "qemu-system-x86_64-linux.tar", tar_of(files))
  run = qvm(*RUN, *rm)
  program = f"{qvm.cache}/qemu/x86_64/bin/qemu-system-x86_64"
  explained(run, program, fragments)
  assert instance_names(qvm) == ([] if rm else [f"{FREEBSD}.json", f"{FREEBSD}.qcow2"])


def explained(run, program, fragments):
  """The error, after the lines of the downloads, in at most two lines."""
  lines = [line for line in run.stderr.splitlines() if not line.startswith("qvm: download")]
  assert (run.returncode, run.stdout) == (1, ""), run.stderr
  assert 1 <= len(lines) <= 2 and all(line.startswith("qvm: ") for line in lines), run.stderr
  for fragment in (program, *fragments):
    assert fragment in "\n".join(lines)
  assert "bug" not in run.stderr and "ssh -p" not in run.stderr


@pytest.mark.parametrize("content, fragments", [(v[0], v[1:2]) for v in NOT_FOR_HERE.values()],
                         ids=NOT_FOR_HERE)  # fmt: skip
def test_a_qemu_img_that_cannot_be_executed(qvm, server, content, fragments):
  server.replace_asset("resources", "v2.0.0", "resources-linux.tar", tar_of({"qemu-img": content}))
  explained(qvm(*RUN), f"{qvm.cache}/bin/qemu-img", fragments)
  assert not (qvm.cache / f"instances/{FREEBSD}.qcow2").exists()


def test_a_program_that_may_not_be_executed(used):
  """What a file system mounted noexec answers, a file without the mode answers too."""
  program = used.cache / "qemu/x86_64/bin/qemu-system-x86_64"
  program.chmod(0o644)
  fails(used(*RUN), str(program), "Permission denied", "noexec", "QVM_CACHE_DIR")


@pytest.mark.parametrize(
  "number, fragments",
  [
    (86, ["Bad CPU type in executable", "Rosetta", "softwareupdate --install-rosetta", "--qemu"]),
    (errno.ENOMEM, ["Cannot allocate memory"]),
    (errno.EAGAIN, ["temporarily unavailable"]),
  ],
)
def test_what_the_system_says_of_a_program(used, number, fragments):
  text = "Bad CPU type in executable" if number == 86 else os.strerror(number)
  more = f"""
import subprocess
def start(process, *words, **more):
  raise OSError({number}, {text!r}, words[0][0])
subprocess.Popen.__init__ = start
"""
  program = f"{used.cache}/qemu/x86_64/bin/qemu-system-x86_64"
  fails(on_host(used, "Linux", "x86_64", *RUN, more=more), program, *fragments)


# --- Hosts -----------------------------------------------------------------------------------


def on_host(qvm, system, machine, *words, more=""):
  """Run a qvm to its end for which uname(2) answers as on another machine."""
  code = f"""
os.uname = lambda: os.uname_result(({system!r}, "host", "1", "1", {machine!r}))
exists, rosetta = os.path.exists, "/Library/Apple/usr/share/rosetta"
os.path.exists = lambda path: path == rosetta or exists(path)
{more}
"""
  return qvm(*words, code=code)


@pytest.mark.parametrize(
  "machine, words, cpu, arch",
  [
    ("x86_64", (), "x86_64", "x86-64"),
    ("x86_64", ("--platform", "arm64"), "aarch64", "arm64"),
    ("arm64", (), "aarch64", "arm64"),
    ("arm64", ("--platform", "x86-64"), "x86_64", "x86-64"),
  ],
)
def test_a_mac(qvm, server, tmp_path, machine, words, cpu, arch):
  qvm.play(record=str(tmp_path / "record"), exit=4)
  run = on_host(qvm, "Darwin", machine, *RUN, *words, "--ssh-port", str(free_port()))
  assert run.returncode == 4, run.stderr
  stem = f"freebsd-15.1-{arch}"
  assert sorted(path.rpartition("/")[2] for path in server.paths("/releases/download/")) == [
    f"{stem}.qcow2", f"qemu-system-{cpu}-macos.tar", "resources-macos.tar",
  ]  # fmt: skip
  argv = qvm.record(tmp_path / "record")["argv"]
  assert argv[0] == f"{qvm.cache}/qemu/{cpu}/bin/qemu-system-{cpu}"
  assert disk_of(argv) == f"{qvm.cache}/instances/{stem}.qcow2"
  share = argv[argv.index("-bios") + 1]
  assert share.startswith(f"{qvm.cache}/qemu/{cpu}/share/qemu/") and os.path.exists(share)
  server.clear_log()
  assert on_host(qvm, "Darwin", machine, *RUN, *words).returncode == 4
  assert server.started == 0


def test_a_mac_without_rosetta(qvm):
  more = """
import subprocess
def start(process, *words, **more):
  raise OSError(86, "Bad CPU type in executable", words[0][0])
subprocess.Popen.__init__ = start
"""
  run = on_host(qvm, "Darwin", "arm64", *RUN, "--rm", more=more)
  explained(run, f"{qvm.cache}/bin/qemu-img", ["Rosetta", "softwareupdate", "--qemu", "Homebrew"])
  assert instance_names(qvm) == []


@pytest.mark.parametrize("words", [RUN, ("pull", *RUN[1:]), (*RUN, "--platform", "x86-64")])
@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_linux_on_arm64_is_told_before_the_download(qvm, server, words, machine):
  run = on_host(qvm, "Linux", machine, *words)
  cpu, package = ("x86_64", "x86") if "--platform" in words else ("aarch64", "arm")
  hints = (f"qemu-system-{package} ", "qemu-utils", f"--qemu /usr/bin/qemu-system-{cpu}")
  fails(run, "Linux on arm64", *hints)
  assert (server.started, list(qvm.home.iterdir())) == (0, [])


def test_linux_on_arm64_with_a_qemu_of_its_own(qvm, server, own, tmp_path):
  program = own("qemu-system-aarch64", "qemu-img")
  qvm.play(record=str(tmp_path / "record"), exit=6)
  run = on_host(qvm, "Linux", "aarch64", *RUN, "--qemu", program)
  assert run.returncode == 6, run.stderr
  argv = qvm.record(tmp_path / "record")["argv"]
  assert argv[0] == program
  assert "/instances/freebsd-15.1-arm64.qcow2" in disk_of(argv)
  assert argv[argv.index("-bios") + 1] == f"{qvm.cache}/qemu/aarch64/share/qemu/uefi.fd"
  assert not server.paths("resources-linux")


def test_haiku_on_a_host_with_arm64(qvm, server):
  run = on_host(qvm, "Darwin", "arm64", "run", "haiku", "r1beta5")
  fails(run, "Haiku has no arm64 image", "x86-64", "--platform", code=2)
  assert (server.started, list(qvm.home.iterdir())) == (0, [])


@pytest.mark.parametrize(
  "system, machine",
  [
    ("FreeBSD", "amd64"),
    ("Linux", "i686"),
    ("Linux", "riscv64"),
    ("Linux", "armv7l"),
    ("Linux", ""),
    ("CYGWIN_NT-10.0", "x86_64"),
    ("Darwin", "Power Macintosh"),
  ],
)
def test_hosts_for_which_there_is_nothing(qvm, server, system, machine):
  for words in (RUN, ("pull", *RUN[1:]), ("--dry-run", *RUN), (*RUN, "--platform", "x86-64")):
    fails(on_host(qvm, system, machine, *words), f"{system} on {machine}", "Linux and macOS")
  assert (server.started, list(qvm.home.iterdir())) == (0, [])


# --- --qemu ----------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
  """Make a folder with QEMUs and qemu-imgs of the user's own; returns the path of the first."""

  def make(*names, folder="own, qemu"):
    where = tmp_path / folder
    where.mkdir(exist_ok=True)
    for name in names:
      content = STAND_IN
      if name == "qemu-img":
        content = f'#!/bin/sh\necho "$@" >> "{where}/used"\nexec {shutil.which(name)} "$@"\n'
      (where / name).write_text(content)
      (where / name).chmod(0o755)
    return str(where / names[0])

  return make


@pytest.mark.parametrize("name", ["qemu-system-x86_64", "qemu-kvm", "my qemu", "qemu-system-sh4"])
def test_own_qemu_with_the_qemu_img_beside_it(qvm, server, own, tmp_path, name):
  program = own(name, "qemu-img")
  qvm.play(record=str(tmp_path / "record"), exit=9)
  run = qvm(*RUN, "--qemu", program)
  assert run.returncode == 9, run.stderr
  assert qvm.record(tmp_path / "record")["argv"][0] == program
  assert " -b ../base/" in Path(program).with_name("used").read_text()
  assert not server.paths("resources-linux")
  assert not (qvm.cache / "bin/qemu-img").exists()
  argv = qvm.record(tmp_path / "record")["argv"]
  assert os.path.exists(argv[argv.index("-bios") + 1]), "the firmware is still the downloaded one"


def test_own_qemu_with_the_qemu_img_on_path(qvm, server, own, tmp_path):
  program = own("qemu-system-x86_64")
  tools = Path(own("qemu-img", folder="tools"))
  run = qvm(*RUN, "--qemu", program, env={"PATH": f"/nowhere:{tools.parent}"})
  assert run.returncode == 0, run.stderr
  assert " -b ../base/" in tools.with_name("used").read_text()
  assert not server.paths("resources-linux")


@pytest.mark.parametrize("path", ["", "/nowhere"])
def test_own_qemu_without_any_qemu_img(qvm, server, own, path):
  program = own("qemu-system-x86_64")
  run = qvm(*RUN, "--qemu", program, env={"PATH": path})
  fails(run, f"no qemu-img found next to {program}", "PATH", "qemu-utils")
  assert (server.started, list(qvm.home.iterdir())) == (0, [])


def test_own_qemu_img_that_is_no_program(qvm, server, own):
  program = own("qemu-system-x86_64", "qemu-img")
  Path(program).with_name("qemu-img").chmod(0o644)
  run = qvm(*RUN, "--qemu", program, env={"PATH": "/nowhere"})
  fails(run, f"no qemu-img found next to {program}")


@pytest.mark.parametrize("form", ["absolute", "relative", "dot", "link", "on PATH"])
def test_ways_to_name_the_own_qemu(used, own, tmp_path, form):
  program = own("qemu-system-x86_64", "qemu-img")
  name = {
    "absolute": program,
    "relative": "own, qemu/qemu-system-x86_64",
    "dot": "./own, qemu/../own, qemu/qemu-system-x86_64",
    "link": str(tmp_path / "link"),
    "on PATH": "qemu-system-x86_64",
  }[form]
  (tmp_path / "link").symlink_to(program)
  used.play(record=str(tmp_path / "record"))
  path = os.path.dirname(program) + ":" + os.environ["PATH"]
  run = used(*RUN, "--name", "x", "--qemu", name, cwd=tmp_path, env={"PATH": path})
  assert run.returncode == 0, run.stderr
  argv0 = used.record(tmp_path / "record")["argv"][0]
  assert os.path.isabs(argv0) and os.path.samefile(argv0, program)


@pytest.mark.parametrize(
  "name, words",
  [
    ("qemu-system-aarch64", ("--platform", "x86-64")),
    ("qemu-system-x86_64", ("--platform", "arm64")),
  ],
)
@pytest.mark.parametrize("command", ["run", "pull"])
def test_own_qemu_for_another_cpu(qvm, server, own, command, name, words):
  run = qvm(command, *RUN[1:], *words, "--qemu", own(name, "qemu-img"))
  fails(run, name, f"{words[1]} guests need qemu-system-", code=2)
  assert (server.started, list(qvm.home.iterdir())) == (0, [])


def test_own_qemu_that_cannot_be_executed(used, own):
  program = own("qemu-system-x86_64", "qemu-img")
  Path(program).write_text("words\n")
  fails(used(*RUN, "--qemu", program), program, "another CPU")


# --- The terminal ----------------------------------------------------------------------------


def on(terminal, qvm, *words):
  """Start qvm as the job in the terminal's foreground; stdout and stderr are pipes."""
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return terminal.start(qvm.command(*words), qvm.env, **pipes)


@pytest.fixture
def terminal():
  """A terminal on which nothing runs yet."""
  terminal = Terminal()
  yield terminal
  terminal.close()


@pytest.mark.parametrize("ending", ["killed itself", "exit", "SIGTERM to qvm", "SIGKILL"])
def test_the_terminal_is_given_back_as_it_was(used, terminal, fifo, tmp_path, ending):
  before = terminal.state()
  used.play(record=str(fifo), wait=ending[0] == "S", signal=9 if ending == "killed itself" else 0)
  process = on(terminal, used, *RUN, "--rm")
  try:
    record = heard(fifo, process)
    if ending[0] == "S":
      wait_for(lambda: terminal.state() != before)  # keys go to the guest one by one
    if ending == "SIGKILL":
      os.kill(record["pid"], signal.SIGKILL)
    if ending == "SIGTERM to qvm":
      process.terminate()
    expected = {"killed itself": 137, "exit": 0, "SIGTERM to qvm": 143, "SIGKILL": 137}[ending]
    assert process.wait(DEADLINE) == expected
    assert terminal.state() == before
  finally:
    process.kill()
    kill_if_mine(record["pid"], fifo)
    process.communicate()


def test_ctrl_c_ends_qemu_and_qvm(used, terminal, fifo):
  before, files = terminal.state(), state(used.cache)
  used.play(record=str(fifo), wait=True)
  process = on(terminal, used, *RUN, "--rm")
  try:
    record = heard(fifo, process)
    os.write(terminal.outside, b"\x03")
    assert process.wait(DEADLINE) == 130
    assert not alive(record["pid"])
    assert terminal.state() == before
    assert state(used.cache) == files
  finally:
    process.kill()
    process.communicate()


def test_what_is_typed_reaches_qemu(used, terminal):
  used.play(cat=True)
  tty.setraw(terminal.inside)
  os.write(terminal.outside, b"boot -s")
  process = on(terminal, used, *RUN)
  assert process.communicate(timeout=DEADLINE)[0] == "boot -s"


def test_a_terminal_that_hangs_up(used, terminal, fifo):
  """The signal is SIGHUP; there is no terminal left to give back."""
  files = state(used.cache)
  used.play(record=str(fifo), wait=True)
  process = on(terminal, used, *RUN, "--rm")
  try:
    record = heard(fifo, process)
    terminal.hang_up()
    assert process.wait(DEADLINE) == 129
    assert not alive(record["pid"])
    assert state(used.cache) == files
  finally:
    process.kill()
    process.communicate()


# --- a signal at any moment ------------------------------------------------------------------

# Before each of these programs.
BEGIN = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import qvm
qvm.signals.install()
"""


def done_by(program):
  """What a program that uses qvm as a module has written: on stdout, on stderr."""
  command = [PYTHON, "-c", BEGIN + program, str(Qvm.compiled.parent)]
  result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
  return result.stdout, result.stderr


# SIGTERM comes when Popen has just acquired its lock, and before it could release it.
UNLUCKY = """
class Lock:
  def __init__(self, lock):
    self.lock, self.release = lock, lock.release

  def acquire(self, *how):
    found = self.lock.acquire(*how)
    os.kill(os.getpid(), signal.SIGTERM)
    return found

process = qvm.start(["sleep", "60"], qvm.silent())
process._waitpid_lock = Lock(process._waitpid_lock)
try:
  {wait}
except qvm.Interrupted as stop:
  print(stop.signum)
  qvm.end_process(process)
  print(process.returncode)
"""


@pytest.mark.parametrize(
  "wait", ["process.wait(60)", "process.poll()", "process.communicate(timeout=60)"]
)
def test_a_signal_in_the_middle_of_a_wait(wait):
  """It left Popen's lock behind, and the end of the process was waited for without end."""
  assert done_by(UNLUCKY.format(wait=wait))[0].split() == [
    str(int(signal.SIGTERM)),
    str(-signal.SIGTERM),
  ]


# SIGTERM comes when the system has told how the process has ended, and Popen has not noted it yet.
UNLUCKIER = """
waitpid = os.waitpid

def tell(pid, how):
  found = waitpid(pid, how)
  if found[0]:
    os.kill(os.getpid(), signal.SIGTERM)
  return found

os.waitpid = tell
process = qvm.start(["sh", "-c", "exit 3"], qvm.silent())
try:
  process.wait({seconds})
except qvm.Interrupted:
  print(process.wait(30))
"""


@pytest.mark.parametrize("seconds", ["", "30"])
def test_a_signal_at_the_end_of_a_wait(seconds):
  """The exit code was lost, and 0 in its place."""
  assert done_by(UNLUCKIER.format(seconds=seconds))[0] == "3\n"


# SIGTERM comes where Python cannot raise anything: it reports an exception there, and goes on.
DROPPED = """
import time, weakref

class Thing:
  pass

try:
  thing = Thing()
  watch = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
  del thing
  time.sleep(60)
except qvm.Interrupted as stop:
  print(stop.signum)
"""


# As on a machine with much to do: a thread has done what it is for before the call that starts it
# returns.
SLOW = """
import threading, time
start = threading.Thread.start
def start_slowly(thread):
  start(thread)
  time.sleep(0.5)
threading.Thread.start = start_slowly
"""


@since(3, 8)
@pytest.mark.parametrize("before", ["", SLOW], ids=["", "slow"])
def test_a_signal_where_nothing_can_be_raised(before):
  """It was forgotten, and all that came later were ignored: nothing but SIGKILL ended qvm."""
  assert done_by(before + DROPPED) == (f"{int(signal.SIGTERM)}\n", "")


def test_ctrl_c_while_qvm_is_loaded(offline, program, tmp_path):
  """A traceback of an import is of no use to anybody."""
  (tmp_path / "threading.py").write_text(
    "import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(60)\n"
  )
  command = [PYTHON, str(program), "list"]
  env = {**offline.env, "PYTHONPATH": str(tmp_path)}
  result = subprocess.run(command, env=env, stderr=subprocess.PIPE, timeout=DEADLINE)
  assert (result.returncode, result.stderr) == (-signal.SIGINT, b"")
