"""What the tests share: the program as a subprocess, its cache, a stand-in QEMU, and processes.

Fixtures are in conftest.py; terminals, the network and machines have support modules of their own.
"""

import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from support_zygote import Forked

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
  sys.path.append(str(ROOT))  # where bench.py and torture.py find qvm.py, too
# The Python that runs qvm; `QVM_TEST_PYTHON=python3.6 make test` tries another one.
PYTHON = shutil.which(os.environ.get("QVM_TEST_PYTHON", "")) or sys.executable
HOST = "macos" if sys.platform == "darwin" else "linux"
FREEBSD = "freebsd-15.1-x86-64"
# The three files that a first run downloads, and where they come to lie.
IMAGE = FREEBSD + ".qcow2"
QEMU = f"qemu-system-x86_64-{HOST}.tar"
TOOLS = f"resources-{HOST}.tar"
BASE = f"base/{IMAGE}"
PULL = ("pull", "--platform", "x86-64", "freebsd", "15.1")
DEAD = "http://127.0.0.1:9/nowhere"
DEADLINE = 240  # seconds until a test gives up; a busy machine may be slow
SHORT_TIMEOUT = {"QVM_TIMEOUT": "1"}  # until a server is silent; a busy one may take 0.3 s


def default_signals():
  """Under nohup and in some CI, SIGHUP or SIGINT is ignored; qvm would rightly keep to that."""
  for number, handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
  ):
    if signal.getsignal(number) == signal.SIG_IGN:
      signal.signal(number, handler)


# --- What there is to download --------------------------------------------------------------------

# It does as $STAND_IN says: records how it was started (into a file, or a FIFO that a test reads
# to know that it runs), prints, and then ends, waits or ignores SIGTERM.
STAND_IN = f"""#!{sys.executable} -IS
import os, sys
play = {{}}
if os.environ.get("STAND_IN"):
  import json, signal # which take longer than all the rest
  play = json.loads(os.environ["STAND_IN"])
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


def small_tools_tar():
  """The resources archive with a script as qemu-img, which is quicker to copy and to hash."""
  script = f'#!/bin/sh\nexec {shutil.which("qemu-img")} "$@"\n'
  return tar_of({"qemu-img": script.encode()})


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
    ("dragonflybsd", "v0.0.1", ("6.4.2",)),
    ("midnightbsd", "v0.0.1", ("4.0.4",)),
  ):
    arches = ("x86-64", "arm64") if os_name in ("freebsd", "openbsd", "netbsd") else ("x86-64",)
    names = [f"{os_name}-{version}-{arch}.qcow2" for version in versions for arch in arches]
    server.add_release(os_name + "-builder", tag, dict.fromkeys(names, image))


# --- What qvm says --------------------------------------------------------------------------------


def bad_words(text):
  """What no user should ever read in an error, or None: other lines than qvm's, a bug, a secret."""
  if not re.fullmatch("(qvm: .+\n)*", text):
    return "a line that is not qvm's"
  found = re.search(r"Traceback|\bbug\b|sig=|jwt=", text)
  return found and found.group()


def works(run):
  assert run.returncode == 0, run.stderr
  return run


# Lines that tell how a command goes on; an error may come after any of them.
EVENT_RE = re.compile(
  "qvm: (downloading .*|downloaded .*|unpacking .*|.* is the newest|"
  ".*; (trying again in .* s|fetching it once more|looking for an older qcow2|"
  "reading the release pages instead))"
)


def fails(run, *fragments, code=1):
  """An error of one or two lines that hold the fragments, and nothing else but events before it."""
  assert (run.returncode, run.stdout) == (code, ""), (run.stdout, run.stderr)
  assert not bad_words(run.stderr), run.stderr
  error = [line for line in run.stderr.splitlines() if not EVENT_RE.fullmatch(line)]
  assert 1 <= len(error) <= 2, run.stderr
  for fragment in fragments:
    assert fragment in "\n".join(error), run.stderr


def check_failed(run, pattern="."):
  """It failed as a user should see it: with the error in the last one or two lines."""
  lines = run.stderr.splitlines()
  assert (run.returncode, run.stdout) == (1, ""), run.stderr
  assert lines and not bad_words(run.stderr), run.stderr
  assert re.search(pattern, "\n".join(lines[-2:])), run.stderr


def lines(text):
  return [line[len("qvm: ") :] for line in text.splitlines() if line.startswith("qvm: ")]


# --- Files ----------------------------------------------------------------------------------------


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def digest(path):
  return sha256(path.read_bytes())


def tree(folder):
  """All below a folder: {path: (kind, mode, content or target)}."""
  found = {}
  for above, folders, names in os.walk(folder):
    for name in folders + names:
      path = os.path.join(above, name)
      mode = os.lstat(path).st_mode
      content = None
      if stat.S_ISREG(mode):
        with open(path, "rb") as file:
          content = file.read()
      if stat.S_ISLNK(mode):
        content = os.readlink(path)
      kind = 0 if stat.S_ISLNK(mode) else stat.S_IMODE(mode)
      found[os.path.relpath(path, folder)] = (stat.S_IFMT(mode), kind, content)
  return found


def contents(folder):
  """All below a folder: {path: bytes of a file, target of a link, None}."""
  return {path: content for path, (_, _, content) in tree(folder).items()}


def state(folder):
  """All that is below a folder: digests, targets of links, folders."""
  found = {}
  for path in sorted(folder.rglob("*")):
    if path.is_symlink():
      found[str(path)] = os.readlink(path)
    else:
      found[str(path)] = sha256(path.read_bytes()) if path.is_file() else ""
  return found


def snapshot(folder):
  """All paths below a folder with what would show that one was touched."""
  found = [folder, *folder.rglob("*")]
  stats = [(str(path), path.lstat()) for path in found if os.path.lexists(path)]
  return sorted((path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_mode) for path, s in stats)


def rewrite(path, text):
  """Put a new file with this text, or these bytes, in the place of one that may be read-only."""
  path.unlink(missing_ok=True)
  path.write_bytes(text.encode() if isinstance(text, str) else text)


def obey_modes():
  """For preexec_fn: take from root the right to read and write whatever the modes say."""
  libc = ctypes.CDLL(None)
  for capability in (1, 2, 3):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; EPERM for others than root


def wait_for(condition):
  """Wait for something that nothing but its files tell of."""
  until = time.monotonic() + DEADLINE
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.01)


# --- Processes ------------------------------------------------------------------------------------


PF_EXITING = 0x4  # proc(5) has the flags in a process's stat, Linux's sched.h what they mean
kernel_threads = set()  # which have no words, and need not be looked at again


def processes_of(path, environment=False):
  """The processes with a path on their command line, or in their environment: {pid: words}.

  One that ends has no words any more while it still has its locks: that is waited for.
  """
  found = {}
  for folder in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      words = (folder / "cmdline").read_bytes()
      told = (folder / "environ").read_bytes() if environment else b""
      if os.fsencode(path) in words + told:
        found[int(folder.name)] = words.decode("utf-8", "replace")
      if not words and folder.name not in kernel_threads:
        wait_for(lambda folder=folder: not ends(folder))
  return found


def ends(folder):
  """Whether a process, of which this is the folder in /proc, is about to end, but has not yet."""
  with contextlib.suppress(FileNotFoundError, ProcessLookupError):
    state, parent, *_, flags = (folder / "stat").read_text().rpartition(")")[2].split()[:7]
    if parent == "2":
      kernel_threads.add(folder.name)
    elif state in "ZX":
      return len(list((folder / "task").iterdir())) > 1
    return bool(int(flags) & PF_EXITING)
  return False


def end_processes(path, environment=False):
  """Kill them, and what they have started meanwhile, and wait until they are gone."""
  found = processes_of(path, environment)
  for pid in found:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
  if found:
    wait_for(lambda: all(map(gone, found)))
    end_processes(path, environment)


def gone(pid):
  """Whether a process has ended, and with it its locks."""
  folder = Path(f"/proc/{pid}")
  return not alive(pid) and not ends(folder)


def alive(pid):
  """Whether a process runs; a zombie, or one that is about to be, does not."""
  with contextlib.suppress(OSError):
    return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
  return False


def parent_of(pid):
  """The process that has started this one; None if it has ended."""
  with contextlib.suppress(FileNotFoundError, ProcessLookupError):
    return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


def written(fifo, process):
  """The descriptor of a FIFO once it has been written; an error, no hang, when there is none."""
  fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
  patience = time.monotonic() + DEADLINE
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
  with contextlib.suppress(FileNotFoundError, PermissionError, ProcessLookupError):
    if os.fsencode(mark) in Path(f"/proc/{pid}/environ").read_bytes():
      os.kill(pid, signal.SIGKILL)


# Below what Linux and macOS give to outgoing connections: those take a port at any moment. Each
# process goes on from a place of its own, so that two do not choose the same at a time.
PORTS = range(15000, 32768)
numbers = itertools.count(random.SystemRandom().randrange(len(PORTS)))


def free_port():
  """A TCP and UDP port that nobody uses."""
  for number in numbers:
    port = PORTS[number % len(PORTS)]
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
      for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        stack.enter_context(socket.socket(type=kind)).bind(("", port))
      return port


def finished(process, before="", input=None, timeout=DEADLINE):
  """The result of a started process; before is what has been read of its stderr."""
  output, errors = process.communicate(input, timeout=timeout)
  errors = before + errors if before else errors  # None if it is no pipe
  return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def read_until(stream, pattern):
  """The text of a pipe up to where the pattern is seen."""
  text, until = "", time.monotonic() + DEADLINE
  while not re.search(pattern, text):
    assert select.select([stream], [], [], max(0, until - time.monotonic()))[0], text
    data = os.read(stream.fileno(), 65536).decode(errors="replace")
    assert data, text
    text += data
  return text


def lines_until(stream, text):
  """Read lines up to one that contains the text."""
  lines = []
  for line in stream:
    lines.append(line)
    if text in line:
      return lines
  raise AssertionError(f"no {text} in {lines}")


# --- qvm and its cache ----------------------------------------------------------------------------


# qvm that kills itself, or waits, just before the Nth of the steps that match a pattern. A step is
# a change to the cache, as "EVENT PATH", with two paths when a file is renamed.
STEPS = """
import os, re, runpy, signal, sys, threading
folder, pattern, number, action = sys.argv[1:5]
events = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.chmod")
lock, count = threading.RLock(), 0
def hook(event, words):
  global count
  if event not in events:
    return
  if event == "open" and not words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
    return
  paths = [word[len(folder) + 1 :] for word in words if str(word).startswith(folder + "/")]
  if paths and ".tmp/" not in paths[-1] and re.search(pattern, " ".join([event, *paths])):
    with lock:
      count += 1
      if count == int(number):
        stop(" ".join([event, *paths]))
def stop(step):
  if action == "kill":
    os.write(1, step.encode())
    os.kill(os.getpid(), signal.SIGKILL)
  for name in ("reached", "go"):
    open(action + name, "w").close()
sys.addaudithook(hook)
sys.argv = sys.argv[5:]
sys.dont_write_bytecode = True
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Qvm:
  """Runs the program in a home of its own, against a release server."""

  # To compile qvm.py, and to start a Python, takes longer than all that most runs do; conftest has
  # both done once for all.
  compiled = zygote = None

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

  def loaded(self, python):
    """Whether it is the program that this Python need not compile."""
    return self.compiled and python == PYTHON and self.program == ROOT / "qvm.py"

  def command(self, *words, python=PYTHON, code=None):
    """The words that start qvm: for this Python qvm.py as it has compiled it before.

    code, if given, changes it first: it is run once qvm is loaded, but not begun.
    """
    program = self.compiled if self.loaded(python) else self.program
    if code is None:
      return [python, str(program), *words]
    code = f"import os, sys\nsys.path.insert(0, {str(program.parent)!r})\nimport qvm\n{code}"
    return [python, "-c", code + "\nqvm.main()", *words]

  def play(self, **play):
    """Say what the stand-in for QEMU does in the next runs."""
    self.env["STAND_IN"] = json.dumps(play)

  def __call__(self, *words, timeout=DEADLINE, input=None, **more):
    """Run to the end; stdout and stderr are text."""
    if input is not None:
      more["stdin"] = subprocess.PIPE
    with self.start(*words, **more) as process:
      try:
        return finished(process, input=input, timeout=timeout)
      except BaseException:
        process.kill()
        raise

  def start(self, *words, env=None, python=PYTHON, code=None, **more):
    """Start it and go on."""
    command = self.command(*words, python=python, code=code)
    more = {
      "stdin": subprocess.DEVNULL,
      "stdout": subprocess.PIPE,
      "stderr": subprocess.PIPE,
      "env": {**self.env, **(env or {})},
      "text": True,
      **more,
    }
    if self.zygote and self.loaded(python):
      return Forked(self.zygote, command, **more)
    return subprocess.Popen(command, **more)

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


# Something happens just when a function of qvm's has returned what is found.
AFTER = """
real = qvm.{name}
def patched(*words, **named):
  found = real(*words, **named)
  {action}
  return found
qvm.{name} = patched
"""
# Another qvm runs to its end, once.
ANOTHER = """if {test} and not os.path.exists({done!r}):
    import subprocess
    open({done!r}, "w").close()
    subprocess.run({command!r}, check=True, stdout=2, env={{**os.environ, **{env!r}}})"""


def with_another(qvm, words, name, command, tmp_path, env=None, test="True"):
  """Run qvm, and a command once the named function has returned; test: of its words and found."""
  done = str(tmp_path / "done")
  action = ANOTHER.format(test=test, done=done, command=command, env=env or {})
  run = qvm(*words, code=AFTER.format(name=name, action=action))
  assert os.path.exists(done), run.stderr
  return run


# qvm on a disk that is full once a record in this folder is to be written that is so.
FULL = """
import errno
write = qvm.write_record
def full(cache, path, record, *more, **named):
  if path.startswith(cache.path({folder!r})) and {test}:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
  write(cache, path, record, *more, **named)
qvm.write_record = full
"""


def on_full_disk(qvm, words, folder, test="True"):
  """Run qvm where a folder of the cache takes no record of which the test is true."""
  return qvm(*words, code=FULL.format(folder=folder, test=test))


def furnish(cache, program, image):
  """Fill a cache as `pull freebsd 15.1` would, with a script of the test's as QEMU."""
  tree = cache / "qemu" / "x86_64"
  for folder in (tree / "bin", tree / "share" / "qemu", cache / "base", cache / "bin"):
    folder.mkdir(parents=True)
  (tree / "share" / "qemu" / "bios-256k.bin").write_bytes(b"bios")
  qemu = tree / "bin" / "qemu-system-x86_64"
  qemu.write_text(program)
  qemu.chmod(0o755)
  tool = cache / "bin" / "qemu-img"
  tool.write_text(f'#!/bin/sh\nexec {shutil.which("qemu-img")} "$@"\n')
  tool.chmod(0o755)
  (cache / "base" / f"{FREEBSD}.qcow2").write_bytes(image)


def qemu_pid(qvm, name):
  """The process that an instance's lock names, once it is QEMU's."""
  path = qvm.cache / "instances" / f"{name}.lock"
  deadline = time.monotonic() + DEADLINE
  while time.monotonic() < deadline:
    with contextlib.suppress(FileNotFoundError):
      match = re.match(r"QEMU process (\d+)", path.read_text())
      if match:
        return int(match.group(1))
    time.sleep(0.01)
  raise AssertionError(f"no QEMU in {path}")


def rows(qvm):
  """The rows of `list --json` by name."""
  run = qvm("list", "--json")
  assert (run.returncode, run.stderr) == (0, "")
  return {row["name"]: row for row in json.loads(run.stdout)}


def instance_names(qvm):
  return sorted(path.name for path in (qvm.cache / "instances").iterdir())


def disk_of(argv):
  """The disk that a QEMU was started with."""
  return re.search(r"if=none,file=(.*),id=drive0", " ".join(argv)).group(1)


def replace_qemu_img(qvm, content):
  """Put another program in the place of the cached qemu-img, and note its size; returns the old."""
  path, note = qvm.cache / "bin" / "qemu-img", qvm.cache / "bin" / "qemu-img.json"
  old, record = path.read_bytes(), json.loads(note.read_text())
  content = content.encode() if isinstance(content, str) else content
  rewrite(path, content)
  path.chmod(0o755)
  rewrite(note, json.dumps({**record, "bytes": len(content)}))
  return old


def forget_sizes(cache):
  """Let qvm take the cached programs for undamaged whatever their size: they are stand-ins."""
  for note in [*cache.glob("qemu/*/release.json"), *cache.glob("bin/qemu-img.json")]:
    record = json.loads(note.read_text())
    rewrite(note, json.dumps({**record, "bytes": 0}))
