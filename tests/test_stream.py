"""`qvm run --stream` with a stand-in for QEMU that reads its disk through the real qemu-img."""

import collections
import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from release_server import ReleaseServer
from support import (
  DEADLINE,
  FREEBSD,
  IMAGE,
  PULL,
  PYTHON,
  ROOT,
  SHORT_TIMEOUT,
  Qvm,
  end_processes,
  fill,
  finished,
  heard,
  obey_modes,
  processes_of,
  read_until,
  sha256,
  tar_of,
  wait_for,
  with_another,
  works,
)
from support_machines import disk_was_full, small_cache
from support_network import certificate, hangs
from support_pythons import MODERN

import qvm as qvm_source

GUEST = ("--platform", "x86-64", "freebsd", "15.1")
STREAM = ("run", "--stream", "--name", "vm", *GUEST)
RUN = ("run", "--name", "vm", *GUEST)
BLOCK = qvm_source.BLOCK_BYTES
MB = 1_000_000
SIZE = 6_000_000  # of the disk

# It does what $PLAY says: first it tells that it runs, then it reads, writes, waits and ends.
READER = f"""#!{sys.executable} -IS
import json, os, subprocess, sys
play = json.loads(os.environ["PLAY"])
drive = next(word for word in sys.argv if word.startswith("if=none,file="))
disk = drive[len("if=none,file="):].rpartition(",id=")[0].replace(",,", ",")
for step in play.get("steps", []):
  if step[0] == "tell":
    with open(step[1], "w") as file:
      code = json.dump({{"pid": os.getpid(), "argv": sys.argv}}, file)
  elif step[0] == "convert":
    code = subprocess.call(["qemu-img", "convert", "-O", "raw", disk, step[1]])
  elif step[0] == "print":
    code = print(step[1], end="", flush=True)
  elif step[0] == "wait":
    code = not open(step[1]).read()
  else:
    code = subprocess.call(["qemu-io", "-f", "qcow2", "-c", " ".join(step), disk], stdout=2)
  if code:
    sys.exit(77)
sys.exit(play.get("exit", 0))
"""


@pytest.fixture(scope="session")
def disk():
  """What the guest sees."""
  return random.Random(5).randbytes(SIZE)


@pytest.fixture(scope="session")
def packed(disk, tmp_path_factory):
  """The image with that disk."""
  folder = tmp_path_factory.mktemp("packed")
  (folder / "raw").write_bytes(disk)
  command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "image.qcow2"]
  subprocess.run(command, cwd=folder, check=True)
  return (folder / "image.qcow2").read_bytes()


@pytest.fixture
def server(packed, tools_tar):
  with ReleaseServer() as server:
    fill(server, packed, tools_tar)
    qemu = {"bin/qemu": READER.encode(), "share/qemu/uefi.fd": b"", "share/qemu/bios-256k.bin": b""}
    server.replace_asset("resources", "v2.0.0", "qemu-system-x86_64-linux.tar", tar_of(qemu))
    server.replace_asset("resources", "v2.0.0", "qemu-system-x86_64-macos.tar", tar_of(qemu))
    yield server


@pytest.fixture
def streamer(tmp_path, server):
  """qvm with QEMU and qemu-img in its cache, but no image; whatever is left over is ended."""
  home = tmp_path / "home"
  home.mkdir(exist_ok=True)
  qvm = Qvm(home, ROOT / "qvm.py", server)
  qvm.env.update(PLAY=json.dumps({}), QVM_TIMEOUT="600")  # what hangs does so however slow it is
  works(qvm("pull", "--platform", "x86-64", "freebsd", "15.1"))
  shutil.rmtree(str(qvm.cache / "base"))
  server.clear_log()
  yield qvm
  end_processes(f"HOME={home}", environment=True)


def play(qvm, *steps, **more):
  qvm.env["PLAY"] = json.dumps({"steps": steps, **more})


def sent(server):
  assert server.wait_idle()
  return sum(each.sent for each in server.requests(IMAGE, "cdn"))


def base_is(qvm, packed):
  assert (qvm.cache / "base" / IMAGE).read_bytes() == packed
  record = json.loads((qvm.cache / "base" / f"{FREEBSD}.json").read_text())
  assert (record["sha256"], record["bytes"]) == (sha256(packed), len(packed))
  assert (qvm.cache / "base" / IMAGE).stat().st_mode & 0o777 == 0o444
  assert not [name for name in qvm.files() if name.startswith("downloads/")]


def backing(qvm):
  return qvm_source.backing_file(str(qvm.cache / "instances" / "vm.qcow2"))


def instance(qvm):
  return json.loads((qvm.cache / "instances" / "vm.json").read_text())


def is_ordinary(qvm, packed):
  """The persistent instance is as if it had never been streamed."""
  base_is(qvm, packed)
  assert backing(qvm) == f"../base/{IMAGE}"
  assert instance(qvm)["base_sha256"] == sha256(packed)
  assert (instance(qvm)["release"], instance(qvm)["validator"]) == ("v0.16.0", "")


def ours(qvm):
  """The processes whose home is that of qvm: {pid: command line}."""
  return processes_of(f"HOME={qvm.home}", environment=True)


def serving(qvm):
  """The processes that serve an image."""
  return [pid for pid, words in ours(qvm).items() if qvm_source.SERVE in words]


def settled(qvm):
  """Wait until nothing runs any more."""
  wait_for(lambda: not ours(qvm))


# --- All is well -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [None, 4e6])
def test_a_guest_reads_what_has_not_come_yet(streamer, server, tmp_path, disk, packed, rate):
  server.rate = rate
  play(streamer, ["convert", str(tmp_path / "seen")])
  result = works(streamer("run", "--stream", "--rm", *GUEST))
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk
  assert len(packed) <= sent(server) < len(packed) + 16 * BLOCK  # nothing comes twice
  assert "digest is checked when all of it is there" in result.stderr
  assert not [name for name in streamer.files() if name.startswith("instances/")]
  settled(streamer)
  if "is there, and has the digest" in result.stderr:
    base_is(streamer, packed)
  works(streamer(*PULL))
  base_is(streamer, packed)


def test_an_image_that_another_qvm_has_brought_meanwhile(streamer, server, tmp_path, packed):
  play(streamer, ["print", "it boots\n"])
  pull = streamer.command(*PULL)
  run = with_another(streamer, ("run", "--stream", "--rm", *GUEST), "own_program", pull, tmp_path)
  assert works(run).stdout == "it boots\n" and "digest is checked" not in run.stderr
  assert len(server.requests("/download/")) == 1
  base_is(streamer, packed)


def test_no_checkpoint_is_made_before_the_image_is_there(streamer):
  play(streamer, ["print", "it boots\n"])
  words = ("run", "--rm", "--warm", "--stream", *GUEST)
  first = works(streamer(*words))
  assert first.stdout == "it boots\n" and "no warm start while the image is" in first.stderr
  assert not list((streamer.cache / "layers").iterdir())


def test_the_guest_runs_before_the_image_is_whole(streamer, server, tmp_path, disk, packed):
  """The first connection hangs; what the guest reads comes all the same."""
  go = threading.Event()
  fault = server.fault(IMAGE, pause=go, pause_at=1_000_000)
  play(streamer, ["read", "5M", "512k"], ["wait", make_fifo(tmp_path)])
  process = streamer.start(*STREAM)
  hangs(process, fault)
  with gate_of(tmp_path) as gate:
    [row] = json.loads(works(streamer("list", "--json")).stdout)
    assert row["state"] == "running" and 0 < row["base"] < 100
    assert re.search(r"running \(base [0-9]+%\)", works(streamer("list")).stdout)
    assert not (streamer.cache / "base" / IMAGE).exists()
    go.set()
    wait_for(lambda: (streamer.cache / "base" / IMAGE).exists())
    gate.write("go")
  assert finished(process).returncode == 0
  is_ordinary(streamer, packed)
  assert json.loads(works(streamer("list", "--json")).stdout)[0]["base"] == 100


def make_fifo(folder, name="go"):
  os.mkfifo(str(folder / name))
  return str(folder / name)


@contextlib.contextmanager
def gate_of(folder):
  """The guest's FIFO, open for writing once the guest waits there; a guest that has gone fails."""
  fds = []

  def reached():
    with contextlib.suppress(OSError):  # ENXIO: nobody reads it yet
      fds.append(os.open(str(folder / "go"), os.O_WRONLY | os.O_NONBLOCK))
    return fds

  wait_for(reached)
  with open(fds[0], "w") as gate:
    yield gate


def test_what_the_guest_writes_meanwhile_stays(streamer, server, tmp_path, disk, packed):
  server.rate = 4e6
  play(streamer, ["write", "-P", "7", "3M", "256k"], ["convert", str(tmp_path / "first")], exit=5)
  assert streamer(*STREAM).returncode == 5
  changed = disk[: 3 << 20] + b"\7" * (256 << 10) + disk[(3 << 20) + (256 << 10) :]
  assert (tmp_path / "first").read_bytes()[:SIZE] == changed
  play(streamer, ["convert", str(tmp_path / "second")])
  works(streamer(*RUN))
  is_ordinary(streamer, packed)
  assert (tmp_path / "second").read_bytes()[:SIZE] == changed


def test_a_cached_image_is_not_streamed(streamer, server):
  works(streamer(*PULL))
  server.close()
  result = works(streamer(*STREAM))
  assert "comes" not in result.stderr and backing(streamer) == f"../base/{IMAGE}"


def test_the_command_line_is_the_same(streamer, server):
  plain = works(streamer("run", "--dry-run", *GUEST)).stdout
  assert works(streamer("run", "--dry-run", "--stream", *GUEST)).stdout == plain
  assert server.started == 0


def test_a_qemu_of_ones_own(streamer, server, tmp_path, disk, packed):
  own = tmp_path / "qemu-system-x86_64"
  own.write_text(READER)
  own.chmod(0o755)
  shutil.rmtree(str(streamer.cache / "qemu" / "x86_64" / "bin"))
  server.rate = 4e6
  play(streamer, ["convert", str(tmp_path / "seen")], exit=5)
  result = streamer(*STREAM, "--qemu", str(own))
  assert result.returncode == 5, result.stderr
  assert "runs while its image comes" in result.stderr
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk
  settled(streamer)
  play(streamer)
  works(streamer(*RUN, "--qemu", str(own)))
  is_ordinary(streamer, packed)


def test_from_nothing(tmp_path, server, disk, packed):
  """QEMU and qemu-img come first."""
  home = tmp_path / "a home, with a comma"
  home.mkdir()
  qvm = Qvm(home, ROOT / "qvm.py", server)
  play(qvm, ["convert", str(tmp_path / "seen")])
  works(qvm(*STREAM))
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk
  settled(qvm)


def test_the_zipapp(streamer, pyz, tmp_path, disk, packed):
  streamer.program = pyz
  for _ in range(2):  # the second time with its compiled code from the cache
    play(streamer, ["convert", str(tmp_path / "seen")])
    works(streamer("run", "--stream", "--rm", *GUEST, cwd=str(tmp_path)))
    assert (tmp_path / "seen").read_bytes()[:SIZE] == disk
    settled(streamer)
    shutil.rmtree(str(streamer.cache / "base"))
    (streamer.cache / "base").mkdir()


def test_pull_in_another_terminal_joins(streamer, server, tmp_path, packed):
  go = threading.Event()
  fault = server.fault(IMAGE, pause=go, pause_at=1_000_000)
  play(streamer, ["wait", make_fifo(tmp_path)])
  first = streamer.start(*STREAM)
  hangs(first, fault)
  with gate_of(tmp_path) as gate:
    second = streamer.start(*PULL)
    for line in second.stderr:
      if "waiting for another qvm that downloads" in line:
        break
    go.set()
    assert finished(second).returncode == 0  # while the first still runs
    gate.write("go")
  assert finished(first).returncode == 0
  is_ordinary(streamer, packed)
  assert sent(server) < len(packed) + 16 * BLOCK


# --- Ends before it is whole --------------------------------------------------------------------


def begun(qvm, server, tmp_path, *words, steps=()):
  """A run that is still streaming, its first connection hanging; returns its process and QEMU's."""
  fault = server.fault(IMAGE, pause=threading.Event(), pause_at=1_000_000)
  fifo = tmp_path / f"record{len(list(tmp_path.iterdir()))}"
  os.mkfifo(str(fifo))
  gate = tmp_path / "go"
  if not gate.exists():
    make_fifo(tmp_path)
  play(qvm, *steps, ["tell", str(fifo)], ["wait", str(gate)])
  process = qvm.start(*words)
  pid = heard(fifo, process)["pid"]
  hangs(process, fault)
  server.clear_faults()
  return process, pid


def end(process, pid):
  os.kill(pid, signal.SIGTERM)
  return finished(process)


def test_a_pull_that_waits_goes_on_when_the_run_ends(streamer, server, tmp_path, packed):
  process, pid = begun(streamer, server, tmp_path, *STREAM)
  pull = streamer.start(*PULL)
  read_until(pull.stderr, f"waiting for another qvm that downloads {IMAGE}")
  end(process, pid)
  assert finished(pull).returncode == 0
  base_is(streamer, packed)
  assert sent(server) < len(packed) + 16 * BLOCK
  play(streamer)
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


@pytest.mark.parametrize("stream", [True, False])
def test_a_pull_that_waits_shows_how_far_the_other_is(
  streamer, server, errors_shown, packed, stream, tmp_path
):
  go = threading.Event()
  fault = server.fault(IMAGE, pause=go, pause_at=3_200_000)
  play(streamer, ["wait", make_fifo(tmp_path)])
  first = streamer.start(*(STREAM if stream else PULL), env={"QVM_TIMEOUT": "600"})
  hangs(first, fault)
  terminal = errors_shown(streamer, *PULL, "--progress")
  terminal.until_match(f"waiting for another qvm that downloads {IMAGE}")
  terminal.until_match(rf"{IMAGE} (4|5)\d% 3\.\d MB")
  go.set()
  assert terminal.end() == 0
  if stream:
    (tmp_path / "go").write_text("go")
  assert finished(first).returncode == 0
  base_is(streamer, packed)


@pytest.mark.parametrize("digests", [True, False])
def test_an_early_end_keeps_what_has_come(streamer, server, tmp_path, disk, packed, digests):
  server.find("freebsd-builder", "v0.16.0").digests = digests
  write = ["write", "-P", "7", "3M", "256k"]
  process, pid = begun(streamer, server, tmp_path, *STREAM, steps=[write])
  result = end(process, pid)
  assert result.returncode == 128 + signal.SIGTERM
  assert "the next run fetches the rest" in result.stderr
  assert backing(streamer).startswith("nbd+unix:") and instance(streamer)["release"] == "v0.16.0"
  first = sent(server)
  server.clear_log()
  clean = works(streamer("clean", "--all"))
  assert "downloads/" not in clean.stdout
  works(streamer("pull", "--platform", "x86-64", "freebsd", "15.0"))  # QEMU again
  server.clear_log()
  play(streamer, ["convert", str(tmp_path / "seen")])
  works(streamer(*RUN))
  is_ordinary(streamer, packed)
  assert sent(server) < len(packed) - first + 24 * BLOCK
  seen = (tmp_path / "seen").read_bytes()[:SIZE]
  assert seen[3 << 20 : (3 << 20) + (256 << 10)] == b"\7" * (256 << 10)
  assert seen[: 3 << 20] == disk[: 3 << 20]


def test_it_streams_on(streamer, server, tmp_path, disk, packed):
  end(*begun(streamer, server, tmp_path, *STREAM, steps=[["write", "-P", "7", "0", "64k"]]))
  before = backing(streamer)
  process, pid = begun(streamer, server, tmp_path, *STREAM)
  assert backing(streamer).startswith("nbd+unix:") and backing(streamer) != before
  end(process, pid)
  play(streamer, ["convert", str(tmp_path / "seen")])
  works(streamer(*STREAM))
  settled(streamer)
  works(streamer(*RUN))
  is_ordinary(streamer, packed)
  assert (tmp_path / "seen").read_bytes()[:SIZE] == b"\7" * (64 << 10) + disk[64 << 10 :]


def test_an_early_end_with_rm_leaves_what_has_come(streamer, server, tmp_path, packed):
  end(*begun(streamer, server, tmp_path, "run", "--stream", "--rm", *GUEST))
  assert not [name for name in streamer.files() if name.startswith("instances/")]
  left = [name for name in streamer.files() if name.startswith("downloads/")]
  assert left == [f"downloads/{IMAGE}/{name}" for name in ("map", "note.json", "part")]
  first = sent(server)
  server.clear_log()
  works(streamer(*PULL))
  base_is(streamer, packed)
  assert sent(server) < len(packed) - first + 24 * BLOCK


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals(streamer, server, tmp_path, number):
  process, _ = begun(streamer, server, tmp_path, *STREAM)
  process.send_signal(number)
  assert finished(process).returncode == 128 + number
  assert ours(streamer) == {}
  assert streamer("list").returncode == 0


@pytest.mark.parametrize("who", ["qvm", "server", "qvm and server", "all"])
def test_kill_9(streamer, server, tmp_path, packed, who):
  process, pid = begun(
    streamer, server, tmp_path, *STREAM, steps=[["write", "-P", "7", "0", "64k"]]
  )
  backing = qvm_source.backing_file(str(streamer.cache / "instances" / "vm.qcow2"))
  socket = Path(backing.partition("socket=")[2])
  assert socket.exists()
  (server_pid,) = serving(streamer)
  if "server" in who or who == "all":
    os.kill(server_pid, signal.SIGKILL)
  if who != "server":
    process.kill()
    process.wait()
  if who == "qvm":  # the guest goes on, and so does its disk
    assert json.loads(works(streamer("list", "--json")).stdout)[0]["state"] == "running"
    assert streamer(*RUN).returncode == 1
    os.kill(pid, signal.SIGTERM)
  else:
    os.kill(pid, signal.SIGKILL if who == "all" else signal.SIGTERM)
  finished(process)
  settled(streamer)
  assert socket.exists() == (who in ("qvm and server", "all")), "nobody was left to remove it"
  play(streamer, ["read", "-P", "7", "0", "64k"])
  works(streamer(*RUN))
  is_ordinary(streamer, packed)
  assert not socket.parent.exists()


def test_a_client_that_leaves_at_once_is_not_the_last(tmp_path, monkeypatch):
  """As another qvm does that looks for dead sockets: macOS then lets no option be set (EINVAL)."""
  real, refused = socket.socket.setsockopt, []

  def setsockopt(link, *words):
    if not refused:
      refused.append(link)
      raise OSError(errno.EINVAL, "Invalid argument")
    return real(link, *words)

  monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)
  monkeypatch.setattr(qvm_source, "temporary_folder", lambda cache: str(tmp_path))
  server = SimpleNamespace(plan=SimpleNamespace(cache=None), size=0)
  with contextlib.ExitStack() as stack:
    path = qvm_source.Server.listen(server, stack)
    for greeting in (b"", b"NBDMAGIC"):
      with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(path)
        assert client.recv(8) == greeting
  assert refused


def test_sockets_that_nobody_serves_any_more(streamer, tmp_path):
  """Those of servers that were killed early go; any that is in use, or another's, stays."""
  folder = Path(tempfile.mkdtemp(prefix="qvm-test-"))
  names = ("qvm-dead0000", "qvm-young000", "qvm-alive000", "qvm-other", "qvm-nosocket")
  try:
    with contextlib.ExitStack() as stack:
      for name in names:
        (folder / name).mkdir()
        if name == "qvm-nosocket":
          (folder / name / "nbd").write_text("")
          continue
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / name / "nbd"))
        if name == "qvm-alive000":
          listener.listen(9)
        else:
          listener.close()
        if name != "qvm-young000":
          os.utime(str(folder / name / "nbd"), (1, 1))
      works(streamer(*STREAM, env={"TMPDIR": str(folder)}))
      settled(streamer)
      assert sorted(os.listdir(folder)) == sorted(names[1:])
  finally:
    shutil.rmtree(str(folder))


def test_another_release_meanwhile(streamer, server, tmp_path, packed):
  """The rest comes from the release that was begun."""
  end(*begun(streamer, server, tmp_path, *STREAM))
  other = packed[:BLOCK] + packed[BLOCK:][::-1]
  server.add_release("freebsd-builder", "v1.0.0", {IMAGE: other}, published="2026-09-01T00:00:00Z")
  play(streamer)
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


def test_the_release_is_gone(streamer, server, tmp_path):
  end(*begun(streamer, server, tmp_path, *STREAM))
  server.remove_asset("freebsd-builder", "v0.16.0", IMAGE)
  for words in (RUN, STREAM, PULL):
    result = streamer(*words)
    assert result.returncode == 1
    assert re.search("of v0.16.0, on which these instances were created.*: vm\n", result.stderr)
  works(streamer("rm", "vm"))
  assert "FreeBSD 15.1" in streamer(*PULL).stderr


def test_another_object_under_the_same_name(streamer, server, tmp_path, packed):
  """No overlay ever gets another base."""
  end(*begun(streamer, server, tmp_path, *STREAM))
  other = packed[:BLOCK] + packed[BLOCK:][::-1]
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, other)
  for words in (STREAM, RUN):
    result = streamer(*words)
    words = "was created on a different base image|replaced by another image: .* depend on it: vm"
    assert result.returncode == 1 and re.search(words, result.stderr)
    assert backing(streamer).startswith("nbd+unix:")
    settled(streamer)


def test_clean_and_rm_know_of_it(streamer, server, tmp_path):
  process, pid = begun(streamer, server, tmp_path, *STREAM)
  assert "a download is in progress" in works(streamer("clean", "--all")).stderr
  assert streamer("rm", "vm").returncode == 1
  works(streamer("rm", "--force", "vm"))
  finished(process)
  assert ours(streamer) == {}
  assert "downloads/" in works(streamer("clean")).stdout
  assert not [name for name in streamer.files() if name.startswith(("downloads/", "instances/"))]


def test_detached(streamer, server, tmp_path, packed):
  """What serves lives as long as QEMU, and then puts the overlay on the base image."""
  words = ("run", "--stream", "-d", "--boot-timeout", "0", "--name", "vm", *GUEST)
  go = threading.Event()
  server.fault(IMAGE, pause=go, pause_at=1_000_000)
  play(streamer, ["read", "5M", "64k"], ["wait", make_fifo(tmp_path)])
  works(streamer(*words))
  with gate_of(tmp_path) as gate:
    assert json.loads(works(streamer("list", "--json")).stdout)[0]["state"] == "running"
    assert len(serving(streamer)) == 1
    go.set()
    wait_for(lambda: (streamer.cache / "base" / IMAGE).exists())
    assert backing(streamer).startswith("nbd+unix:")
    new = {"published": "2026-09-01T00:00:00Z"}
    server.add_release("freebsd-builder", "v1", {IMAGE: packed + b"x"}, **new)
    assert "cannot be refreshed" in streamer("pull", "--refresh", *GUEST).stderr
    gate.write("go")
  settled(streamer)
  is_ordinary(streamer, packed)


def test_detached_and_stopped(streamer, server, tmp_path, packed):
  words = ("run", "--stream", "-d", "--boot-timeout", "0", "--name", "vm", *GUEST)
  server.fault(IMAGE, pause=threading.Event(), pause_at=1_000_000)
  play(streamer, ["wait", make_fifo(tmp_path)])
  works(streamer(*words))
  works(streamer("stop", "--force", "vm"))
  assert ours(streamer) == {}
  assert json.loads(works(streamer("list", "--json")).stdout)[0]["base"] < 100
  play(streamer)
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


def detached(qvm, server, *options, **fault):
  """A machine left running, whose image stops coming until the event is set that is returned."""
  go = threading.Event()
  server.fault(IMAGE, pause=go, pause_at=1_000_000, **fault)
  result = works(qvm(*STREAM, "-d", "--boot-timeout", "0", *options))
  assert "runs while its image comes" in result.stderr
  return go


@pytest.mark.parametrize("options", [(), ("--rm",), ("--console-log", "LOG")], ids=" ".join)
def test_a_wrong_digest_once_qvm_has_left(streamer, server, tmp_path, options):
  """The machine is ended and discarded; its console log tells why, and so does whoever looks."""
  own = "--console-log" in options
  options = [str(tmp_path / "LOG") if word == "LOG" else word for word in options]
  play(streamer, ["print", "guest# "], ["wait", make_fifo(tmp_path)])
  go = detached(streamer, server, *options, times=None, flip=3_000_000)
  pids = ours(streamer)
  go.set()
  settled(streamer)
  assert len(pids) == 3  # QEMU, the server, and the keeper of the log
  left = [n for n in streamer.files() if n.startswith(("base/", "downloads/", "instances/vm."))]
  left.remove("instances/vm.lock")  # nobody was there to remove it
  assert left == ([] if own else ["instances/vm.console.log"])
  log = tmp_path / "LOG" if own else streamer.cache / "instances" / "vm.console.log"
  words = "has not the digest that the release names"
  assert re.search(f"^qvm: .*{words}.*the machine is ended$", log.read_text(), re.MULTILINE)
  if not own:
    for command in ("ssh", "stop", "rm"):
      result = streamer(command, "vm")
      assert "no instance vm" in result.stderr and words in result.stderr, command
    assert "instances/vm.console.log\n" in works(streamer("clean")).stdout
    assert "see qvm list" in streamer("ssh", "vm").stderr


def test_a_line_that_is_down_once_qvm_has_left(streamer, server, tmp_path, packed):
  play(streamer, ["wait", make_fifo(tmp_path)], ["read", "5M", "64k"], exit=3)
  go = detached(streamer, server, cut=1_500_000)
  server.fault(IMAGE, times=None, cut="connect")
  server.fault(IMAGE, origin="github", times=None, cut="connect")
  go.set()
  with gate_of(tmp_path) as gate:
    gate.write("go")
  settled(streamer)
  text = (streamer.cache / "instances" / "vm.console.log").read_text()
  assert text.count("the guest gets an I/O error") == 1
  assert re.search(r"qvm: \d+% of the image of vm are there; the next run fetches the rest", text)
  server.clear_faults()
  play(streamer)
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


# --- Faults ----------------------------------------------------------------------------------

FAULTS = {
  "cuts": [{"cut": 300_000}, {"cut": 0}, {"cut": 100_000, "reset": True}, {"cut": "headers"}],
  "503": [{"cut": 300_000}, {"status": 503}, {"status": 502}],
  "stall": [{"stall": 300_000}, {"stall": "headers"}],
  "403": [{"cut": 300_000}, {"status": 403}],
  "another part": [{"cut": 300_000}, {"content_range": "bytes 0-9/10"}],
  "range ignored": [{"cut": 300_000}, {"ignore_range": True}],
  "captive portal": [{"cut": 300_000}, {"html": True}],
  "a failure first": [{"status": 503}, {"cut": "connect"}],
  "nothing behind the headers": [{"cut": 0}, {"cut": 0}, {"cut": 1}],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=list(FAULTS))
def test_faults_of_the_line(streamer, server, tmp_path, disk, packed, faults):
  for fault in faults:
    server.fault(IMAGE, **fault)
  play(streamer, ["convert", str(tmp_path / "seen")])
  works(streamer(*STREAM, env=SHORT_TIMEOUT))
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk
  settled(streamer)
  play(streamer)
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


def test_https(streamer, packed, tools_tar, tmp_path, disk):
  tls, cert = certificate(tmp_path, "DNS:localhost,IP:127.0.0.1")
  with ReleaseServer(tls) as server:
    fill(server, packed, tools_tar)
    streamer.env.update(QVM_RELEASES_URL=server.url, QVM_API_URL=server.api_url, SSL_CERT_FILE=cert)
    requests, connections = scattered(streamer, server)
    assert requests > 5 and connections < requests
    play(streamer, ["convert", str(tmp_path / "seen")])
    works(streamer(*STREAM))
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk


def test_a_proxy(streamer, server, tmp_path, disk, proxy):
  """All of it goes through the proxy, also what is read beside the first connection."""
  streamer.env["http_proxy"] = f"http://127.0.0.1:{proxy.port}"
  scattered(streamer, server)
  play(streamer, ["convert", str(tmp_path / "seen")])
  works(streamer(*STREAM))
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk
  paths = [f"{path.partition('://')[2].partition('/')[2]}" for path, _ in proxy.seen]
  logged = [each.target.lstrip("/") + "?" * bool(each.query) + each.query for each in server.log]
  assert len(logged) > 5 and not collections.Counter(logged) - collections.Counter(paths)


SCATTERED = [["read", f"{place}k", "4k"] for place in (5000, 3000, 4000, 2200, 5400, 3500, 4600)]


def scattered(qvm, server, python=PYTHON, **fault):
  """Read here and there while the first connection hangs; returns the counts of what that took."""
  server.fault(IMAGE, times=1, pause=threading.Event(), pause_at=200_000)
  server.fault(IMAGE, times=None, **fault)
  play(qvm, *SCATTERED)
  before = server.accepted
  result = works(qvm(*STREAM, env={"QVM_TIMEOUT": "60"}, python=python))
  assert "trying again" not in result.stderr
  return len(server.requests(IMAGE, "cdn")), server.accepted - before


PYTHONS = sorted(MODERN, key=lambda version: int(version[2:]))


@pytest.mark.parametrize("version", [PYTHONS[0], PYTHONS[-1]])
def test_connections_are_used_again(streamer, server, packed, version):
  requests, connections = scattered(streamer, server, MODERN[version])
  assert requests > 5
  assert connections < requests
  play(streamer)
  works(streamer(*RUN, python=MODERN[version]))
  is_ordinary(streamer, packed)


@pytest.mark.parametrize("how", ["silently", "with a word"])
def test_a_server_that_serves_one_range_a_connection(streamer, server, tmp_path, disk, how):
  """An idle connection that has been closed is no failure."""
  server.hang_up = how == "silently"
  fault = {"headers": {"Connection": "close"}} if how == "with a word" else {}
  requests, connections = scattered(streamer, server, **fault)
  assert connections >= requests > 5
  play(streamer, ["convert", str(tmp_path / "seen")])
  works(streamer(*STREAM))
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk


@pytest.mark.parametrize("more", [{"surplus": b"HTTP/1.1 206 Partial Content\r\n\r\n"}], ids=str)
def test_bytes_behind_an_answer_are_no_other_answer(streamer, server, tmp_path, disk, more):
  server.rate = 4e6
  server.fault(IMAGE, times=None, **more)
  play(streamer, ["convert", str(tmp_path / "seen")])
  works(streamer(*STREAM))
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk


def test_each_signed_address_serves_once(streamer, server, tmp_path, disk):
  server.signed_uses, server.rate = 1, 4e6
  play(streamer, ["convert", str(tmp_path / "seen")])
  works(streamer(*STREAM))
  assert (tmp_path / "seen").read_bytes()[:SIZE] == disk


def test_redirects_are_spared(streamer, server):
  requests, _ = scattered(streamer, server)
  assert len(server.requests(IMAGE, "github")) == 1 < requests


def test_a_line_that_is_down(streamer, server, tmp_path, packed):
  """The guest gets an I/O error, said once; the next run goes on."""
  server.fault(IMAGE, times=1, cut=300_000)
  server.fault(IMAGE, times=None, cut="connect")
  server.fault(IMAGE, origin="github", after=1, times=None, cut="connect")
  play(streamer, ["read", "3M", "64k"], exit=3)
  result = streamer(*STREAM)
  assert result.returncode == 77
  assert result.stderr.count("the guest gets an I/O error") == 1
  server.clear_faults()
  settled(streamer)
  assert streamer(*RUN).returncode == 3
  is_ordinary(streamer, packed)


@pytest.fixture
def small(tmp_path, server):
  """The cache on a disk of its own."""
  with small_cache(tmp_path / "home", 40 * MB) as disk:
    yield disk


def test_an_image_that_has_no_room_is_refused_before(small, streamer, server, packed):
  small.fill(leave=4 * MB)
  result = streamer(*STREAM)
  assert disk_was_full(result) and len(result.stderr.splitlines()) == 2, result.stderr
  left = [n for n in streamer.files() if n.startswith(("base/", "downloads/", "instances/"))]
  assert left == []
  assert ours(streamer) == {}
  small.empty()
  works(streamer(*STREAM))
  settled(streamer)
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


@pytest.mark.parametrize("freed", ["meanwhile", "afterwards"])
def test_a_disk_that_gets_full_meanwhile(small, streamer, server, tmp_path, packed, freed):
  """The guest gets an I/O error, which is said once; with room again the image goes on coming."""
  go = threading.Event()
  server.fault(IMAGE, pause=go, pause_at=1_000_000)
  play(streamer, ["wait", make_fifo(tmp_path)], ["read", "5M", "64k"])
  process = streamer.start(*STREAM)
  with gate_of(tmp_path) as gate:
    small.fill()
    go.set()
    text = read_until(process.stderr, "the guest gets an I/O error")
    if freed == "meanwhile":
      small.empty()
      wait_for(lambda: (streamer.cache / "base" / IMAGE).exists())
    gate.write("go")
  result = finished(process)
  text += result.stderr
  assert text.count("the guest gets an I/O error") == text.count("disk is full: ") == 1, text
  if freed == "meanwhile":
    assert result.returncode == 0
  else:
    assert result.returncode == 77
    small.empty()
    play(streamer)
    works(streamer(*RUN))
  settled(streamer)
  is_ordinary(streamer, packed)


def test_a_wrong_digest_ends_the_machine(streamer, server, tmp_path):
  server.fault(IMAGE, times=None, flip=3_000_000)
  play(streamer, ["wait", make_fifo(tmp_path)])
  result = streamer(*STREAM)
  assert result.returncode == 1
  assert re.search("has not the digest that the release names.*the machine is ended", result.stderr)
  assert not [n for n in streamer.files() if n.startswith(("base/", "downloads/", "instances/"))]
  assert ours(streamer) == {}


def test_a_wrong_digest_leaves_an_older_overlay(streamer, server, tmp_path, packed):
  end(*begun(streamer, server, tmp_path, *STREAM, steps=[["write", "-P", "7", "0", "64k"]]))
  server.fault(IMAGE, times=None, flip=5_000_000)
  result = streamer(*STREAM)
  assert result.returncode == 1 and "has not the digest" in result.stderr
  is_condemned(streamer, server, result, packed)


def is_condemned(qvm, server, result, packed):
  """The instance is kept, never started, and named; the image comes as ever for others."""
  assert re.search(r"have run on it; they are kept, but not started any more: vm\n", result.stderr)
  server.clear_faults()
  settled(qvm)
  disk = (qvm.cache / "instances" / "vm.qcow2").read_bytes()
  for words in (RUN, STREAM):
    again = qvm(*words)
    assert again.returncode == 1 and "the instance vm is not started: " in again.stderr
    assert "has not the digest" in again.stderr and "qvm rm vm deletes it" in again.stderr
  works(qvm(*PULL))
  base_is(qvm, packed)
  assert qvm(*RUN).returncode == 1
  assert (qvm.cache / "instances" / "vm.qcow2").read_bytes() == disk
  play(qvm)
  works(qvm("run", "--rm", *GUEST))
  works(qvm("run", "--name", "other", *GUEST))
  works(qvm("rm", "vm"))
  works(qvm(*RUN))


def test_a_wrong_digest_that_a_pull_finds_condemns_the_overlay(streamer, server, tmp_path, packed):
  """The guest has run on the bytes that turn out wrong."""
  server.fault(IMAGE, times=1, flip=100_000, pause=threading.Event(), pause_at=1_000_000)
  play(streamer, ["read", "4M", "64k"], exit=3)
  assert streamer(*STREAM).returncode == 3
  server.clear_faults()
  settled(streamer)
  is_condemned(streamer, server, works(streamer(*PULL)), packed)


def test_an_object_that_changes_throws_nothing_away(streamer, server, tmp_path, packed):
  go = threading.Event()
  fault = server.fault(IMAGE, pause=go, pause_at=300_000, cut=300_000)
  play(streamer, ["wait", make_fifo(tmp_path)], ["write", "-P", "7", "0", "64k"], exit=3)
  process = streamer.start(*STREAM)
  hangs(process, fault)
  before = read_until(process.stderr, "the guest runs while")  # its digest is known
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, packed[:BLOCK] + packed[BLOCK:][::-1])
  go.set()
  before += read_until(process.stderr, "the server has another file now.*an I/O error")
  with gate_of(tmp_path) as gate:
    gate.write("go")
  assert finished(process, before).returncode == 3
  play(streamer, ["read", "-P", "7", "0", "64k"])
  result = streamer(*RUN)
  words = "was created on a different base image|replaced by another image: .* depend on it: vm"
  assert result.returncode == 1 and re.search(words, result.stderr)
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, packed)
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


LATER = {
  "gone": {"status": 404},
  "forbidden": {"status": 403},
  "another ETag for the same bytes": {"etag": '"another node"'},
  "no ranges any more": {"ignore_range": True},
  "a web page": {"html": True},
  "no length": {"no_length": True, "ignore_range": True},
  "a redirect nowhere": {"redirect": "ftp://127.0.0.1/x"},
}


@pytest.mark.parametrize("fault", LATER.values(), ids=LATER)
def test_what_fails_later_throws_nothing_away(streamer, server, tmp_path, packed, fault):
  """Four times after a cut, and for as long as the guest runs."""
  go = threading.Event()
  server.fault(IMAGE, times=1, pause=go, pause_at=300_000, cut=300_000)
  server.fault(IMAGE, times=None, **fault)
  play(streamer, ["write", "-P", "7", "0", "64k"], ["read", "4M", "64k"], exit=3)
  process = streamer.start(*STREAM)
  before = read_until(process.stderr, "the guest runs while")  # until then any failure is the end
  go.set()
  assert finished(process, before).returncode == 77
  server.clear_faults()
  settled(streamer)
  play(streamer, ["read", "-P", "7", "0", "64k"])
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


@pytest.mark.parametrize("folder", ["base", "downloads"])
def test_a_base_that_cannot_be_published_throws_nothing_away(
  streamer, server, tmp_path, packed, folder
):
  """All of the image is there, but neither it nor its record can have its place."""
  told = make_fifo(tmp_path, "told")
  write = ["write", "-P", "7", "0", "64k"]
  play(streamer, ["tell", told], ["wait", make_fifo(tmp_path)], write, exit=3)
  go = threading.Event()
  fault = server.fault(IMAGE, pause=go, pause_at=1_000_000)
  process = streamer.start(*STREAM, preexec_fn=obey_modes)
  hangs(process, fault)
  heard(told, process)  # the guest runs: its overlay was made in downloads/, too
  (streamer.cache / folder).chmod(0o500)
  go.set()
  before = read_until(process.stderr, f"Permission denied; {IMAGE} is kept as it is")
  with gate_of(tmp_path) as gate:
    gate.write("go")
  assert finished(process, before).returncode in (1, 3)
  (streamer.cache / folder).chmod(0o700)
  settled(streamer)
  play(streamer, ["read", "-P", "7", "0", "64k"])
  works(streamer(*RUN))
  is_ordinary(streamer, packed)


class NoServer(qvm_source.Server):
  """A server of an image that is complete, and whose publishing fails as it is told."""

  def __init__(self, errors):
    self.errors, self.ended, self.gone = errors, [], threading.Event()
    self.gone.set()
    self.filler = threading.Thread(target=list)
    self.filler.start()
    file = SimpleNamespace(complete=lambda: True)
    self.download = SimpleNamespace(file=file, error=None, abort=lambda error: None)
    self.plan = SimpleNamespace(image_asset="image")

  def publish(self):
    raise self.errors.pop()

  def end_machine(self, error):
    self.ended.append(error)


def subclasses(kind):
  return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_only_one_type_of_error_throws_an_overlay_away(capfd):
  """All others of qvm's and of the system leave it; the one is raised in one place."""
  bad = qvm_source.BadImageError
  errors = [kind("x") for kind in subclasses(qvm_source.QvmError) if kind is not bad]
  errors += [OSError(code, "x") for code in (1, 2, 5, 13, 28, 30, 104, 110)]
  assert len(errors) > 12
  for error in errors:
    server = NoServer([error])
    assert server.wait_until_complete() and server.ended == [], repr(error)
    assert "kept as it is" in capfd.readouterr().err
  server = NoServer([bad("x")])
  assert not server.wait_until_complete() and len(server.ended) == 1
  text = Path(qvm_source.__file__).read_text()
  assert len(re.findall(r"raise BadImageError", text)) == 1
  assert len(re.findall(r"(?<!def )\bcondemn\(|partial\(condemn,", text)) == 2


HOSTILE = {
  "backing": (8, struct.pack(">QI", 512, 11), "backing file"),
  "data file": (72, struct.pack(">Q", 4), "data file"),
  "tables": (40, struct.pack(">Q", 1 << 40), "tables make no sense"),
  "HTML": (0, b"<!DOCTYPE html>", "HTML page"),
  "no qcow2": (0, b"MZ", "not a qcow2"),
}


@pytest.mark.parametrize("place, data, words", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_header(streamer, server, tmp_path, packed, place, data, words):
  hostile = packed[:place] + data + packed[place + len(data) :]
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, hostile)
  play(streamer, ["tell", str(tmp_path / "started")])
  result = streamer(*STREAM)
  assert result.returncode == 1 and words in result.stderr
  assert not (tmp_path / "started").exists()
  assert not [n for n in streamer.files() if n.startswith(("base/", "downloads/", "instances/"))]


@pytest.mark.parametrize("fault, words", [
  ({"no_ranges": True}, "gives no ranges"),
  ({"weak_etag": True}, "gives no ranges"),
  ({"no_validator": True}, "gives no ranges"),
  ({"chunked": True}, "gives no ranges"),
])  # fmt: skip
def test_what_cannot_be_streamed_is_downloaded_first(streamer, server, packed, fault, words):
  server.fault(IMAGE, times=None, **fault)
  result = works(streamer(*STREAM))
  assert f"{words} of {IMAGE}: it is downloaded first" in result.stderr
  is_ordinary(streamer, packed)


# A server that takes a while to end once it has answered, as on a busy machine.
SLOW_TO_END = """
import time
send_answer = qvm.send_answer
def slow(answer):
  send_answer(answer)
  time.sleep(1)
qvm.send_answer = slow
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_server_that_is_slow_to_end_was_not_ended_from_outside(streamer, server, packed, there):
  """It has nothing to serve: another qvm has brought the image, or it cannot be streamed."""
  code = f"qvm.own_program = lambda: {streamer.command(code=SLOW_TO_END)!r}\n"
  if there:
    code += f"""
streamed_base = qvm.streamed_base
def after_another(*words):
  import subprocess
  subprocess.run({streamer.command(*PULL)!r}, check=True)
  return streamed_base(*words)
qvm.streamed_base = after_another
"""
  else:
    server.fault(IMAGE, times=None, no_ranges=True)
  assert "from outside" not in works(streamer(*STREAM, code=code)).stderr
  is_ordinary(streamer, packed)


def test_a_bundle_is_downloaded_first(streamer, server):
  server.remove_asset("freebsd-builder", "v0.16.0", IMAGE)
  server.add_release(
    "freebsd-builder", "v1", {f"{FREEBSD}.tar.zst": b"x"}, published="2026-09-01T00:00:00Z"
  )
  result = streamer(*STREAM)
  assert f"{FREEBSD}.tar.zst of v1 is a bundle: it is downloaded first" in result.stderr


def test_no_such_version(streamer, server):
  result = streamer("run", "--stream", "--platform", "x86-64", "freebsd", "9.9")
  assert result.returncode == 1 and "there is no FreeBSD 9.9 for x86-64" in result.stderr


# --- NBD -------------------------------------------------------------------------------------


class Whole:
  """A server of which everything is there."""

  def __init__(self, content):
    self.content, self.size = content, len(content)

  def has(self, start, count):
    return True

  def read(self, start, count):
    return self.content[start : start + count]


class Broken(Whole):
  """A server whose disk cannot be read, of an image of which nothing is there yet."""

  def has(self, start, count):
    return False

  def read(self, start, count):
    raise OSError(5, "Input/output error")


@pytest.fixture
def link(request):
  """A client's connection to an export of 1000 bytes."""
  ours, theirs = socket.socketpair()
  kind = getattr(request, "param", Whole)
  export = qvm_source.Export(kind(bytes(range(250)) * 4), theirs)
  thread = threading.Thread(target=export.run)
  thread.start()
  ours.settimeout(10)
  assert ours.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\0\3"
  yield ours
  ours.close()
  thread.join(DEADLINE)
  assert not thread.is_alive()


def option(number, data=b""):
  return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def replies(link):
  """The kinds of the replies up to the one that ends an option."""
  found = []
  while not found or found[-1] in (2, 3):
    magic, _, kind, length = struct.unpack(">QIII", link.recv(20, socket.MSG_WAITALL))
    assert magic == 0x3E889045565A9
    link.recv(length, socket.MSG_WAITALL) if length else None
    found.append(kind)
  return found


def ask(link, kind, start, count, magic=0x25609513):
  link.sendall(struct.pack(">IHHQQI", magic, 0, kind, 77, start, count))
  head = link.recv(16, socket.MSG_WAITALL)
  return struct.unpack(">IIQ", head) if head else None


def test_options_and_requests(link):
  link.sendall(struct.pack(">I", 3))
  for number, data, expected in (
    (3, b"", [2, 1]),
    (8, b"", [0x80000001]),
    (5, b"", [0x80000001]),
    (6, b"\0\0\0\1x\0\0", [3, 3, 1]),
    (6, b"\0", [0x80000003]),
    (7, b"\0\0\xff\0\0\0", [0x80000003]),
    (7, b"\0\0\0\0\0\1\0\3", [3, 3, 1]),
  ):
    link.sendall(option(number, data))
    assert replies(link) == expected
  assert ask(link, 0, 10, 20) == (0x67446698, 0, 77)
  assert link.recv(20, socket.MSG_WAITALL) == bytes(range(10, 30))
  for kind, start, count, error in ((3, 0, 0, 0), (0, 990, 11, 22), (0, 1 << 63, 1, 22),
                                    (0, 0, 1 << 31, 22), (4, 0, 1, 22), (9, 0, 0, 22)):  # fmt: skip
    assert ask(link, kind, start, count) == (0x67446698, error, 77)
  assert ask(link, 2, 0, 0) is None


@pytest.mark.parametrize("flags, padding", [(3, 0), (1, 124)])
def test_export_name(link, flags, padding):
  link.sendall(struct.pack(">I", flags) + option(1, b"any"))
  answer = link.recv(10 + padding, socket.MSG_WAITALL)
  assert answer == struct.pack(">QH", 1000, 0x107) + bytes(padding)
  assert ask(link, 1, 0, 4) is None  # a write


@pytest.mark.parametrize("link", [Broken], indirect=True)
def test_a_disk_that_cannot_be_read_is_an_answer(link):
  """The guest gets an I/O error; without an answer it would wait for ever."""
  link.sendall(struct.pack(">I", 3) + option(7, bytes(6)))
  assert replies(link) == [3, 3, 1]
  assert [ask(link, 0, start, 20) for start in (0, 500)] == [(0x67446698, 5, 77)] * 2


def test_abort(link):
  link.sendall(struct.pack(">I", 3) + option(2))
  assert replies(link) == [1] and link.recv(1) == b""


GARBAGE = (b"", b"\0", b"\0\0\0\3GARBAGE!" + bytes(8), b"\0\0\0\3" + option(3)[:-4] + b"\xff" * 4)


@pytest.mark.parametrize("data", GARBAGE)
def test_what_no_client_says(link, data):
  link.sendall(data)
  link.shutdown(socket.SHUT_WR)
  assert link.recv(1) == b""
