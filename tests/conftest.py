"""What all tests share: a home, a release server, the program as a subprocess, a stand-in QEMU."""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import guests
import hypothesis
import pytest
from release_server import ReleaseServer

ROOT = Path(__file__).resolve().parent.parent
FREEBSD = "freebsd-15.1-x86-64"
sys.path.insert(0, str(ROOT))

# The same cases in every run: what fails here fails everywhere.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

# Under nohup and in some CI, SIGHUP or SIGINT is ignored; qvm would rightly keep to that.
for number, handler in (
  (signal.SIGHUP, signal.SIG_DFL),
  (signal.SIGINT, signal.default_int_handler),
  (signal.SIGTERM, signal.SIG_DFL),
):
  if signal.getsignal(number) == signal.SIG_IGN:
    signal.signal(number, handler)

# It does as $STAND_IN says: records how it was started (into a file, or a FIFO that a test reads
# to know that it runs), prints, and then ends, waits or ignores SIGTERM.
STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys
play = json.loads(os.environ.get("STAND_IN", "{{}}"))
if play.get("ignore_term"):
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
if play.get("record"):
  with open(play["record"], "w") as file:
    fds = [int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) != file.fileno()]
    links = {{fd: os.readlink("/proc/self/fd/%d" % fd) for fd in fds
             if os.path.exists("/proc/self/fd/%d" % fd)}}
    json.dump({{"argv": sys.argv, "pid": os.getpid(), "fds": links}}, file)
sys.stdout.write(play.get("stdout", ""))
sys.stdout.flush()
sys.stderr.write(play.get("stderr", ""))
sys.stderr.flush()
if play.get("cat"):
  os.write(1, os.read(0, 65536))
while play.get("wait"):
  signal.pause()
if play.get("signal"):
  os.kill(os.getpid(), play["signal"])
sys.exit(play.get("exit", 0))
"""


def tar_of(files, prefix="./"):
  """An uncompressed tar with files {name: bytes}, as `tar -C DIR -c .` makes it."""
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(prefix + name)
      info.size = len(content)
      info.mode = 0o755 if "/" not in name or name.startswith("bin/") else 0o644
      archive.addfile(info, io.BytesIO(content))
  return packed.getvalue()


def stand_in_tar(**more):
  """A QEMU archive whose QEMU is the stand-in; more: name=bytes of share/qemu."""
  files = {"bin/qemu": STAND_IN.encode(), "share/qemu/bios-256k.bin": b"bios"}
  files["share/qemu/uefi.fd"] = b"uefi"
  for name, content in more.items():
    files["share/qemu/" + name.replace("_fd", ".fd")] = content
  return tar_of(files)


@pytest.fixture(scope="session")
def image(tmp_path_factory):
  """A small sound qcow2 image."""
  path = tmp_path_factory.mktemp("image") / "image.qcow2"
  guests.to_qcow2(guests.boot_sector("hello"), path)
  return path.read_bytes()


@pytest.fixture(scope="session")
def tools_tar():
  """The resources archive with the real qemu-img."""
  return tar_of({"qemu-img": Path(shutil.which("qemu-img")).read_bytes()})


@pytest.fixture(scope="session")
def pyz(tmp_path_factory):
  """The zipapp, built from the working tree."""
  path = tmp_path_factory.mktemp("pyz") / "qvm.pyz"
  subprocess.run([sys.executable, str(ROOT / "build_zipapp.py"), str(path)], check=True)
  return path


def fill(server, image, tools_tar):
  """The releases of August 2026, with the stand-in for QEMU and one small image for all guests."""
  server.add_release(
    "resources",
    "v2.0.0",
    {
      "qemu-system-x86_64-linux.tar": stand_in_tar(),
      "qemu-system-aarch64-linux.tar": stand_in_tar(),
      "qemu-system-x86_64-macos.tar": stand_in_tar(),
      "qemu-system-aarch64-macos.tar": stand_in_tar(),
      "resources-linux.tar": tools_tar,
      "resources-macos.tar": tools_tar,
    },
  )
  for os_name, tag, versions in (
    ("freebsd", "v0.16.0", ("14.4", "15.0", "15.1")),
    ("openbsd", "v0.14.0", ("7.8", "7.9")),
    ("netbsd", "v0.7.0", ("10.1", "11.0")),
    ("haiku", "v0.2.0", ("r1beta5",)),
    ("omnios", "v0.2.0", ("r151058",)),
  ):
    arches = ("x86-64",) if os_name in ("haiku", "omnios") else ("x86-64", "arm64")
    names = [f"{os_name}-{version}-{arch}.qcow2" for version in versions for arch in arches]
    server.add_release(os_name + "-builder", tag, dict.fromkeys(names, image))


@pytest.fixture
def server(image, tools_tar):
  """A release server that has everything."""
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    yield server


def works(run):
  assert run.returncode == 0, run.stderr
  return run


def fails(run, *fragments, code=1):
  """An error whose lines, after those of what went well, hold the fragments; no traceback."""
  assert (run.returncode, run.stdout) == (code, ""), (run.stdout, run.stderr)
  assert re.fullmatch("(qvm: .+\n)+", run.stderr), run.stderr
  assert "bug" not in run.stderr, run.stderr
  events = ("qvm: downloading ", "qvm: downloaded ", "qvm: unpacking ")
  end = [line for line in run.stderr.splitlines() if not line.startswith(events)]
  end = "\n".join(end[-2:])
  for fragment in fragments:
    assert fragment in end, run.stderr


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def written(fifo, process):
  """The descriptor of a FIFO once it has been written; an error, no hang, when there is none."""
  fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
  patience = time.monotonic() + 30
  while not select.select([fd], [], [], 0.1)[0]:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < patience, "nobody writes"
  os.set_blocking(fd, True)
  return fd


def heard(fifo, process):
  """What a stand-in writes into the FIFO once it runs."""
  with open(written(fifo, process), "rb") as file:
    return json.loads(file.read())


@contextlib.contextmanager
def ended(process):
  """A process that does not outlive its test, nor its QEMU, when that fails."""
  try:
    yield process
  finally:
    try:
      process.terminate()
      process.wait(15)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
      if stream:
        stream.close()


def kill_if_mine(pid, mark):
  """Kill a process that has the mark in its environment."""
  with contextlib.suppress(FileNotFoundError, ProcessLookupError):
    if os.fsencode(mark) in Path(f"/proc/{pid}/environ").read_bytes():
      os.kill(pid, signal.SIGKILL)


def obey_modes():
  """For preexec_fn: take from root the right to read and write whatever the modes say."""
  libc = ctypes.CDLL(None)
  for capability in (1, 2, 3):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; EPERM for others than root


class Qvm:
  """Runs the program in a home of its own, against a release server."""

  def __init__(self, home, program, server=None):
    self.home, self.program = Path(home), Path(program)
    self.cache = self.home / ".cache" / "qvm"
    keep = ("PATH", "LANG", "TERM", "PYENV_ROOT", "PYENV_VERSION")
    self.env = {name: os.environ[name] for name in keep if name in os.environ}
    self.env.update(HOME=str(home), QVM_RETRY_DELAY="0.01", QVM_TIMEOUT="5")
    self.env.update(QVM_RELEASES_URL="http://127.0.0.1:9/nowhere")
    self.env.update(QVM_API_URL="http://127.0.0.1:9/nowhere", PYTHONDONTWRITEBYTECODE="1")
    if server:
      self.env.update(QVM_RELEASES_URL=server.url, QVM_API_URL=server.api_url)

  def command(self, *words, python=sys.executable):
    return [python, str(self.program), *words]

  def play(self, **play):
    """Say what the stand-in for QEMU does in the next runs."""
    self.env["STAND_IN"] = json.dumps(play)

  def __call__(self, *words, env=None, python=sys.executable, timeout=60, **more):
    """Run to the end; stdout and stderr are text."""
    more = {
      "stdin": subprocess.DEVNULL,
      "stdout": subprocess.PIPE,
      "stderr": subprocess.PIPE,
      **more,
    }
    return subprocess.run(
      self.command(*words, python=python),
      env={**self.env, **(env or {})},
      text=True,
      timeout=timeout,
      **more,
    )

  def start(self, *words, env=None, python=sys.executable, **more):
    """Start it and go on."""
    more = {
      "stdin": subprocess.DEVNULL,
      "stdout": subprocess.PIPE,
      "stderr": subprocess.PIPE,
      **more,
    }
    return subprocess.Popen(
      self.command(*words, python=python),
      env={**self.env, **(env or {})},
      text=True,
      **more,
    )

  def files(self):
    """The paths of all files below the cache, relative to it; QEMU's tree under its link only."""
    found = []
    for folder, folders, names in os.walk(self.cache, followlinks=True):
      # The zipapp's compiled code is a matter of its own tests.
      folders[:] = [name for name in folders if not name.startswith(".") and name != "code"]
      found += [os.path.relpath(os.path.join(folder, name), self.cache) for name in names]
    return sorted(found)

  def record(self, path):
    """What the stand-in recorded; blocks until it runs when path is a FIFO."""
    return json.loads(Path(path).read_text())


@pytest.fixture(params=["qvm.py", "qvm.pyz"])
def program(request):
  """Both forms of the program, for the tests in which they must not differ."""
  return ROOT / "qvm.py" if request.param == "qvm.py" else request.getfixturevalue("pyz")


@pytest.fixture
def qvm(tmp_path, server):
  """qvm.py with a release server and an empty home."""
  home = tmp_path / "home"
  home.mkdir()
  return Qvm(home, ROOT / "qvm.py", server)


@pytest.fixture
def offline(tmp_path):
  """qvm.py without any server."""
  home = tmp_path / "home"
  home.mkdir()
  return Qvm(home, ROOT / "qvm.py")


@pytest.fixture
def fifo(tmp_path):
  """A FIFO through which the stand-in says that it runs."""
  path = tmp_path / "fifo"
  os.mkfifo(path)
  return path


def free_port():
  """A port that nobody listens on."""
  import socket

  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@pytest.fixture
def background(tmp_path):
  """Start qvm with a QEMU that waits; returns qvm's process and what the QEMU recorded."""
  started = []

  def start(qvm, *words, play=None, **more):
    fifo = tmp_path / f"fifo{len(started)}"
    os.mkfifo(fifo)
    env = {"STAND_IN": json.dumps({"wait": True, "record": str(fifo), **(play or {})})}
    process = qvm.start(*words, env=env, **more)
    started.append([process])
    record = heard(fifo, process)
    started[-1].append(record["pid"])
    return process, record

  yield start
  for process, *pids in started:
    process.kill()
    for pid in pids:
      kill_if_mine(pid, tmp_path / "fifo")
    process.communicate()


@pytest.fixture(scope="session")
def filled(tmp_path_factory, image, tools_tar):
  """A home in which everything has been downloaded."""
  home = tmp_path_factory.mktemp("filled")
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    works(Qvm(home, ROOT / "qvm.py", server)("pull", "--platform", "x86-64", "freebsd", "15.1"))
  return home


@pytest.fixture
def full(qvm, filled):
  """qvm with everything in its cache."""
  shutil.copytree(str(filled), str(qvm.home), dirs_exist_ok=True)
  return qvm
