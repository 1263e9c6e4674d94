"""The keeper of a stand-in guest, which ssh_guest starts: serves connections, ends what it started.

A module of its own, which loads little.
"""

import contextlib
import fcntl
import os
import select
import signal
import socket
import time

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LIBRARY = "libnss_wrapper.so"
MOUNT_SLAVE, MOUNT_BIND, NEW_MOUNTS, SUBREAPER = 0x84000, 0x1000, 0x20000, 36
NORMAL = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGPIPE", "SIGXFSZ", "SIGCHLD", "SIGUSR1")


def find(name):
  """The path of a program, also where only root has it on the PATH."""
  for folder in filter(None, (os.environ.get("PATH", "") + ":" + PATH).split(":")):
    if os.access(os.path.join(folder, name), os.X_OK):
      return os.path.join(folder, name)
  return None


def spawn(command, env, files):
  """Start a program with these descriptors as its 0, 1, 2, ... and no others; returns the pid."""
  pid = os.fork()
  if pid:
    return pid
  try:
    # Out of the way first: one may have the number that another is to get.
    files = [fcntl.fcntl(fd, fcntl.F_DUPFD, len(files)) for fd in files]
    for number, fd in enumerate(files):
      os.dup2(fd, number)
    for fd in map(int, os.listdir("/proc/self/fd")):
      if fd >= len(files):
        with contextlib.suppress(OSError):
          os.close(fd)
    for name in NORMAL:
      signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execve(command[0], command, env)
  except BaseException as error:
    os.write(2, f"{command[0]}: {error}\n".encode())
  finally:
    os._exit(127)


class Punisher:
  """What sshd(8) of OpenSSH 10 does to whoever does not log in, as its sshd_config(5) has it.

  PerSourcePenalties: 1 s for each connection that ends without a login having been tried, 5 s for
  one with failed logins. From 15 s on (min), and until they have passed, the source is refused;
  600 s are the most. MaxStartups 10:30:100: of the connections that have not logged in yet, the
  11th and following are refused with a probability that grows from 30 to 100 per cent.
  What it has done is in punished.log, a line for each.
  """

  NOAUTH, AUTHFAIL, LEAST, MOST = 1.0, 5.0, 15.0, 600.0
  BEGIN, RATE, FULL = 10, 30, 100

  def __init__(self, folder, scale):
    import random

    self.folder, self.scale = folder, scale
    self.until, self.active = 0.0, False
    self.logs = {}  # of connections that have not logged in: the pipe with sshd's messages
    self.rest = {}  # of the others
    self.random = random.Random(1)

  def note(self, text):
    with open(os.path.join(self.folder, "punished.log"), "a") as file:
      file.write(text + "\n")

  def refuses(self):
    """Why a new connection is refused, as sshd says it on the wire; empty: it is not."""
    self.active = self.active and time.monotonic() < self.until
    if self.active:
      return "Not allowed at this time"
    count = len(self.logs)
    share = self.RATE + (100 - self.RATE) * (count - self.BEGIN) / (self.FULL - self.BEGIN)
    if count >= self.FULL or (count >= self.BEGIN and self.random.uniform(0, 100) < share):
      return "Exceeded MaxStartups"
    return ""

  def take(self, folder, link):
    """Answer a connection; with the file `penalise` the one behind it has been too much."""
    with contextlib.suppress(FileNotFoundError):
      os.unlink(os.path.join(self.folder, "penalise"))
      self.punish("authfail", self.LEAST)
    refused = self.refuses()
    if refused:
      self.note(refused)
      link.sendall(refused.encode() + b"\r\n")
      return link.close()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    self.logs[reading] = b""
    serve(folder, link, writing)
    os.close(writing)

  def read(self, fd):
    """Take in what an sshd says; its end is judged."""
    try:
      data = os.read(fd, 65536)
    except BlockingIOError:
      return
    if data and fd in self.logs:
      self.logs[fd] += data
      if b"Accepted " in self.logs[fd]:
        self.rest[fd] = self.logs.pop(fd)
    elif not data:
      os.close(fd)
      self.rest.pop(fd, None)
      text = self.logs.pop(fd, None)
      if text is not None:
        tried = b"authenticating user" in text or b"Failed " in text
        self.punish("authfail" if tried else "noauth", self.AUTHFAIL if tried else self.NOAUTH)

  def punish(self, reason, seconds):
    now = time.monotonic()
    self.until = min(max(self.until, now) + seconds * self.scale, now + self.MOST * self.scale)
    self.active = self.active or self.until - now >= self.LEAST * self.scale
    self.note(reason)


def keep_punishing(folder, server, scale):
  """As keep_serving(), with the manners of OpenSSH 10."""
  punisher = Punisher(folder, scale)
  while True:
    ready = select.select([0, 3, *punisher.logs, *punisher.rest], [], [])[0]
    if 0 in ready:
      return
    for fd in ready:
      if fd != 3:
        punisher.read(fd)
    if 3 in ready:
      with contextlib.suppress(OSError):
        punisher.take(folder, server.accept()[0])


def keep_daemon(folder, server, program):
  """A daemon of sshd's own at the address of the socket."""
  host, port = server.getsockname()
  server.close()
  more = []
  for option, name in (("SshdSessionPath", "sshd-session"), ("SshdAuthPath", "sshd-auth")):
    beside = os.path.join(os.path.dirname(program), name)  # a part of sshd from 9.8 or 10.0 on
    more += ["-o", f"{option}={beside}"] if os.path.isfile(beside) else []
  log = os.path.join(folder, "sshd.log")
  command = [program, "-D", "-f", os.path.join(folder, "sshd_config"), "-E", log, *more]
  spawn([*command, "-o", f"ListenAddress={host}:{port}"], sshd_env(folder), [2, 2, 2])
  select.select([0], [], [])


def keep(folder, answers):
  """Descriptor 0 says when to end; whoever connects to 3 gets an sshd, or silence."""
  os.setsid()
  os.umask(0o22)
  import ctypes  # which the stand-in proper does not need

  libc = ctypes.CDLL(None, use_errno=True)
  libc.prctl(SUBREAPER, 1, 0, 0, 0)
  if os.getuid() == 0:
    own_run(libc, folder)
  signal.signal(signal.SIGCHLD, lambda number, frame: reap())
  server = socket.socket(fileno=3)
  server.setblocking(False)  # who connected may have gone before accept()
  kind, _, detail = answers.partition("=")
  if kind == "punish":
    keep_punishing(folder, server, float(detail))
  elif kind == "daemon":
    keep_daemon(folder, server, detail)
  elif kind == "says":
    keep_saying(folder, server)
  else:
    keep_serving(folder, server, answers == "answer")
  server.close()
  end_descendants()


def keep_serving(folder, server, answers):
  """An sshd, or silence, for each connection, until descriptor 0 says to end."""
  held = []
  while 0 not in select.select([0, 3], [], [])[0]:
    with contextlib.suppress(OSError):
      link = server.accept()[0]
      if answers:
        serve(folder, link)
      else:
        held.append(link)


def keep_saying(folder, server):
  """The text in the file `says`, and the end, for each connection."""
  with open(os.path.join(folder, "says"), "rb") as file:
    text = file.read()
  while 0 not in select.select([0, 3], [], [])[0]:
    with contextlib.suppress(OSError), server.accept()[0] as link:
      link.settimeout(5.0)
      link.sendall(text)


def own_run(libc, folder):
  """As root: the folder that sshd wants in /run, and no entries in the machine's login records."""
  os.makedirs(folder + "/records", exist_ok=True)
  if libc.unshare(NEW_MOUNTS) or libc.mount(None, b"/", None, MOUNT_SLAVE, None):
    os.makedirs("/run/sshd", 0o755, exist_ok=True)  # in a container, which has its own
    return
  in_run = (os.path.realpath(folder) + "/").startswith(os.path.realpath("/run") + "/")
  if not in_run:
    libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, b"mode=755")
  os.makedirs("/run/sshd", 0o755, exist_ok=True)
  for path in ("/run/utmp", "/var/log/wtmp", "/var/log/btmp", "/var/log/lastlog"):
    own = os.path.join(folder, "records", os.path.basename(path))
    if os.path.exists(path):
      open(own, "a").close()
      libc.mount(os.fsencode(own), os.fsencode(path), None, MOUNT_BIND, None)


def sshd_env(folder):
  """The environment of sshd: its users are the guest's."""
  env = {"PATH": PATH, "LD_PRELOAD": LIBRARY}
  for name in ("passwd", "group", "shadow"):
    env["NSS_WRAPPER_" + name.upper()] = os.path.join(folder, name)
  return env


def serve(folder, link, messages=None):
  """Start an sshd for one connection; its messages go to a log, or to a descriptor."""
  log = ["-E", os.path.join(folder, "sshd.log")] if messages is None else ["-e"]
  command = [find("sshd"), "-i", "-f", os.path.join(folder, "sshd_config"), *log]
  with link:
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as QEMU does; 40 ms a login
    spawn(command, sshd_env(folder), [link.fileno(), link.fileno(), messages or 2])


def reap():
  """Take leave of the children that have ended."""
  with contextlib.suppress(ChildProcessError):
    while os.waitpid(-1, os.WNOHANG)[0]:
      pass


def descendants(pid):
  """The pids of all descendants of a process."""
  children = {}
  for child in filter(str.isdigit, os.listdir("/proc")):
    with contextlib.suppress(OSError):  # it has ended
      with open(f"/proc/{child}/stat", errors="replace") as file:
        parent = int(file.read().rpartition(")")[2].split()[1])
      children.setdefault(parent, []).append(int(child))
  found = children.get(pid, [])[:]
  for child in found:  # it grows meanwhile
    found += children.get(child, [])
  return found


def end_descendants():
  """Kill all descendants; this process inherits orphans, so that in the end it has no child."""
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  with contextlib.suppress(ChildProcessError):
    while True:
      for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      os.wait()
