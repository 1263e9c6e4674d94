"""qvm as a forked child of a process that has loaded it, which takes half the work of a new Python.

The child has words, an environment, a folder, streams and descriptors of its own, and whoever
starts it is its parent and has subprocess's usual handle. Only /proc shows the words and the
environment of the process that it was forked from; what it starts shows its own. Where a child
would differ from a new Python's process, a new Python it is.
"""

import array
import ctypes
import inspect
import json
import os
import socket
import subprocess
import threading

# It reads orders, one JSON object with the child's descriptors in a packet; answers with the number
# of the child, and once more when that is no longer a child of this process's.
LOADED = """
import array, fcntl, gc, io, json, os, random, signal, socket, sys
sys.path[0] = sys.argv[1]
import calendar, difflib, email.utils, fnmatch, gzip, hashlib, http.client, ipaddress, lzma
import platform, pwd, queue, resource, select, shlex, shutil, ssl, subprocess, tarfile, tempfile
import termios, tty, urllib.request
import qvm

def next_order(control):
  while True:
    packet, extra = control.recvmsg(1 << 20, socket.CMSG_SPACE(64 * 4))[:2]
    if not packet:
      os._exit(0)
    fds = array.array("i")
    for level, kind, data in extra:
      fds.frombytes(data)
    between = os.fork()
    if not between:
      between, pid = os.getpid(), os.fork()
      if not pid:
        while os.getppid() == between:
          os.sched_yield()
        control.close()
        return json.loads(packet.decode()), fds
      control.send(str(pid).encode())
      os._exit(0)
    for fd in fds:
      os.close(fd)
    os.waitpid(between, 0)
    control.send(b"its parent has ended")

signal.signal(signal.SIGINT, signal.SIG_DFL)
if hasattr(gc, "freeze"):
  gc.freeze() # from 3.7 on: a child that collects garbage does not touch, and so copy, all this
order, fds = next_order(socket.socket(fileno=int(sys.argv[2])))
aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
for fd in fds:
  os.close(fd)
for fd, number in zip(aside, order["fds"]):
  os.dup2(fd, number)
  os.close(fd)
for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
  old = getattr(sys, name)
  more = {"encoding": old.encoding, "errors": old.errors, "newline": "\\n", "closefd": False}
  lines = 1 if name == "stderr" and sys.version_info >= (3, 9) else -1
  setattr(sys, name, io.open(old.fileno(), mode, lines, **more))
if order["session"]:
  os.setsid()
os.chdir(order["folder"])
os.environ.clear()
os.environ.update(order["env"])
random.seed()
sys.argv = order["argv"]
if sys.argv[0] != "-c":
  qvm.main()
code = sys.argv.pop(1)
sys.path[0] = ""
signal.signal(signal.SIGINT, signal.default_int_handler)
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""
PR_SET_CHILD_SUBREAPER = 36
# What Python or one of its libraries reads when it is loaded, by how the name begins.
EARLY = ("PYTHON", "LANG", "LC_", "LD_", "GLIBC", "MALLOC_", "OPENSSL_", "TZ")


class Zygote:
  """Starts qvm as children of this process; Linux only.

  python: the program that runs qvm; program: the compiled qvm.
  """

  def __init__(self, python, program):
    self.env = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    self.env.update(HOME=str(program.parent), PYTHONDONTWRITEBYTECODE="1")
    self.lock, self.libc = threading.Lock(), ctypes.CDLL(None)
    self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
      command = [python, "-c", LOADED, str(program.parent), str(theirs.fileno())]
      more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
      self.process = subprocess.Popen(command, env=self.env, pass_fds=[theirs.fileno()], **more)

  def suit(self, env):
    """Whether a new Python would start with this environment as the process here has."""
    mine, theirs = (
      {name: value for name, value in each.items() if name.startswith(EARLY)}
      for each in (self.env, env)
    )
    return mine == theirs

  def fork(self, fds, **order):
    """Start a child with descriptors, {number there: descriptor here}; returns its number.

    It becomes this process's as an orphan does: its parent there ends, and for that moment this
    process is the one that gets orphans.
    """
    packet = json.dumps({**order, "fds": list(fds)}).encode()
    extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds.values()))]
    with self.lock:
      self.libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
      try:
        self.control.sendmsg([packet], extra)
        pid, _ = int(self.control.recv(100)), self.control.recv(100)
      except (ConnectionError, ValueError) as error:
        raise RuntimeError("qvm cannot be loaded: see its traceback above") from error
      finally:
        self.libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    return pid

  def close(self):
    self.control.close()
    self.process.wait()


class Forked(subprocess.Popen):
  """A program of Qvm.command's that is forked, not executed."""

  def __init__(self, zygote, command, **more):
    self.zygote = zygote
    super().__init__(command, **more)

  def _execute_child(self, *given):
    asked = inspect.signature(super()._execute_child).bind(*given).arguments
    if asked["preexec_fn"] or not self.zygote.suit(asked["env"]):
      return super()._execute_child(*given)
    ends = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    fds = [number if end == -1 else end for number, end in enumerate(ends)]
    self.pid = self.zygote.fork(
      {**dict(enumerate(fds)), **{fd: fd for fd in asked["pass_fds"]}},
      argv=[os.fsdecode(word) for word in asked["args"][1:]],
      env={os.fsdecode(name): os.fsdecode(value) for name, value in asked["env"].items()},
      folder=os.fspath(asked["cwd"] or os.getcwd()),
      session=asked["start_new_session"],
    )
    self._child_created = True
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    self._close_pipe_fds(*(asked[name] for name in pipes))
    return None
