"""The fixtures that several test modules share."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import hypothesis
import pytest
import real_qemu
from guests import boot_sector, to_qcow2
from release_server import ReleaseServer
from support import (
  FREEBSD,
  PULL,
  PYTHON,
  ROOT,
  STEPS,
  Qvm,
  default_signals,
  end_processes,
  fill,
  heard,
  kill_if_mine,
  small_tools_tar,
  works,
)
from support_machines import Guests, make_real_cache, ssh_guest_as_qemu
from support_network import Proxy, served
from support_pythons import VERSION
from support_terminal import Terminal
from support_zygote import Zygote

default_signals()

# The same cases in every run of the same qvm.py: what fails here fails everywhere. Others come with
# `pytest --hypothesis-profile=random`. Hypothesis keeps nothing, and must not leave a folder in the
# project.
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("random", database=None, deadline=None)
hypothesis.settings.load_profile("same")
hypothesis.configuration.set_hypothesis_home_dir("/dev/null/none")


# Fixtures that bring the whole program, or real QEMU, into a test; a test without them is pure.
WHOLE = {"image", "offline", "pyz", "tools_tar"}
REAL = {"archives", "real_cache"}
# Modules whose tests start programs without such a fixture.
MODULES = {"test_torture": "program", "test_zipapp": "program", "test_release": "program",
           "test_ssh_guest": "program", "test_real_qemu": "real", "test_demo": "real"}  # fmt: skip


def layer_of(item):
  """The layer that a test belongs to: pure, program or real."""
  used = set(item.fixturenames)
  if used & REAL:
    return "real"
  return MODULES.get(item.path.stem, "program" if used & WHOLE else "pure")


def rank(item):
  """The place of a test: real QEMU, then torture, the whole program, and pure ones."""
  layer = "torture" if item.path.stem == "test_torture" else layer_of(item)
  return ("real", "torture", "program", "pure").index(layer)


def pytest_collection_modifyitems(items):
  """Mark each test with its layer, so that `-m pure` and the like choose.

  The slowest come first, so that no worker is left alone with them in the end.
  """
  for item in items:
    item.add_marker(layer_of(item))
  items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
  """Let the tests run a qvm.py that need not be compiled, and loaded by a new Python, each time."""
  path = tmp_path_factory.mktemp("compiled") / "qvm.pyc"
  code = "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)"
  subprocess.run([PYTHON, "-c", code, str(ROOT / "qvm.py"), str(path)], check=True)
  Qvm.compiled = path
  with contextlib.ExitStack() as stack:
    if sys.platform == "linux":
      Qvm.zygote = stack.enter_context(contextlib.closing(Zygote(PYTHON, path)))
    yield


@pytest.fixture(scope="session")
def image(tmp_path_factory):
  """A small sound qcow2 image."""
  path = tmp_path_factory.mktemp("image") / "image.qcow2"
  to_qcow2(boot_sector("hello"), path)
  return path.read_bytes()


@pytest.fixture(scope="session")
def tools_tar():
  """The resources archive; the real qemu-img comes with real QEMU only."""
  return small_tools_tar()


@pytest.fixture(scope="session")
def pyz(tmp_path_factory):
  """The zipapp, built from the working tree."""
  path = tmp_path_factory.mktemp("pyz") / "qvm.pyz"
  subprocess.run([sys.executable, str(ROOT / "build_zipapp.py"), str(path)], check=True)
  return path


@pytest.fixture
def server(image, tools_tar):
  """A release server that has everything."""
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    yield server


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
    works(Qvm(home, ROOT / "qvm.py", server)(*PULL))
  return home


@pytest.fixture
def full(qvm, filled):
  """qvm with everything in its cache."""
  shutil.copytree(filled, qvm.home, dirs_exist_ok=True, symlinks=True)
  return qvm


@pytest.fixture
def no_image(full):
  """qvm with a release server, and QEMU and qemu-img in its cache, but no image."""
  shutil.rmtree(full.cache / "base")
  return full


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, image, tools_tar):
  """A home in which the instance has run once; not to be changed."""
  home = tmp_path_factory.mktemp("prepared")
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    works(Qvm(home, ROOT / "qvm.py", server)("run", "freebsd", "15.1"))
  return home


@pytest.fixture
def used(offline, prepared):
  """qvm in a copy of that home, with no server to reach."""
  shutil.copytree(prepared, offline.home, dirs_exist_ok=True, symlinks=True)
  return offline


@pytest.fixture
def stepped():
  """Start qvm so that it is killed, or waits, at a step; see STEPS."""
  if VERSION < (3, 8):
    pytest.skip("no audit hooks")
  started = []

  def start(qvm, pattern, number, action, *words):
    command = [PYTHON, "-c", STEPS, str(qvm.cache), pattern, str(number), action]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command += qvm.command(*words)[1:]
    started.append(subprocess.Popen(command, env=qvm.env, text=True, **pipes))
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.fixture
def kill_at(stepped):
  """Run qvm, which kills itself just before it does what the pattern says; see STEPS."""

  def kill(qvm, pattern, *words):
    process = stepped(qvm, pattern, 1, "kill", *words)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors

  return kill


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory):
  """A cache with real QEMU and the guests: FreeBSD 15.1 echoes, 15.0 hangs, 14.4 floods."""
  return make_real_cache(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
  """The installed QEMU, packed as qvm downloads it; RuntimeError says what to install."""
  real_qemu.find_qemu()
  folder = tmp_path_factory.mktemp("archives")
  for cpu in ("x86_64", "aarch64"):
    real_qemu.pack_qemu(cpu, folder / f"qemu-system-{cpu}-linux.tar")
  real_qemu.pack_resources(folder / "resources-linux.tar")
  yield {path.name: path for path in folder.iterdir()}
  shutil.rmtree(folder)


@pytest.fixture(scope="module")
def real_home(tmp_path_factory):
  """One home for a module, so that QEMU is unpacked once for each CPU."""
  home = tmp_path_factory.mktemp("home") / "a space, and a comma"
  home.mkdir()
  yield home
  shutil.rmtree(home)


@pytest.fixture
def guests(full, tmp_path):
  """qvm with a stand-in for QEMU that starts a real sshd."""
  for suffix in (".qcow2", ".json"):
    base = full.cache / "base"
    shutil.copy(base / (FREEBSD + suffix), base / ("openbsd-7.9-x86-64" + suffix))
  ssh_guest_as_qemu(full.cache)
  (tmp_path / "tmp").mkdir()
  full.env["TMPDIR"] = str(tmp_path / "tmp")
  yield Guests(full, tmp_path / "guest")
  end_processes(full.cache)


@pytest.fixture
def proxy():
  """A proxy that notes what it is asked for."""
  with served(Proxy()) as server:
    yield server


@pytest.fixture
def errors_shown():
  """Starts qvm with its stderr on a terminal of so many columns, and nothing else there."""
  with contextlib.ExitStack() as stack:

    def start(qvm, *words, columns=80):
      others = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
      terminal = Terminal(qvm.command(*words), qvm.env, columns=columns, **others)
      stack.callback(terminal.close)
      return terminal

    yield start
