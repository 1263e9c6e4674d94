"""A stand-in for QEMU: the guest that it boots is a real sshd on the port that hostfwd names.

$SSH_GUEST, JSON, says how the guest behaves:

  folder    where all its files are: host key, settings, homes, bin/, sshd.log (required)
  shell     the users' login shell (/bin/sh)
  login     open: no password; key, key-mbr: by the file KEYS of drive1, a bare FAT file system or
            one at 1 MiB; refuse: nobody gets in (open)
  banner    false: whoever connects is never answered; a text, as os.fsdecode has it: is told
            that and nothing else (true)
  daemon    true: sshd itself listens, with its MaxStartups and, from 9.8 on, its penalties; a
            path: that sshd does (false)
  punish    true: the keeper does as OpenSSH 10 does by default, see Punisher; a number: with all
            times that many times as long (false)
  listen    false: nothing listens (true)
  delay     seconds until sshd listens (0)
  console   what the serial console shows at the start (ssh guest boots), as os.fsdecode has it
  flood     how many bytes it shows at least, by showing that again and again (0)
  die       {"after": "start", "exit": 1}: ends after the console's text, without sshd
  ignore_shutdown, ignore_term   the command, or the signal, does nothing (false)
  control   how it answers on its control socket, where it saves and restores just a few bytes:
            {"accelerator": "tcg", "fail": ORDER, "die": ORDER, "hang": ORDER, "mute": no banner
            once it was restored, "note": a file that gets a line for each order} ({})
  record    a file or FIFO that gets {"argv", "pid", "fds", "keeper"} as JSON once sshd listens

Two processes: the stand-in proper, and a keeper without any of its descriptors. The keeper takes
the connections, starts an sshd for each, and adopts what they leave; when the stand-in's end of a
pipe closes, however it died, the keeper kills all its descendants. As root it also has a /run and
login records of its own, in a mount namespace.

Needs Linux, and Debian's openssh-server, openssh-client, libnss-wrapper and, for keys, mtools.
"""

import contextlib
import fcntl
import json
import os
import pwd
import re
import signal
import socket
import sys
import time

from ssh_keeper import LIBRARY, PATH, find, spawn

USERS = ("runner", "user")
CONSOLE = "ssh guest boots\n"
# Python compiles a module once for all, a script each time.
IMPORT = f"import sys\nsys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})\n"
MAIN = IMPORT + "import ssh_guest\nsys.exit(ssh_guest.main(sys.argv))\n"
KEEPER = IMPORT + "import os, ssh_keeper\nssh_keeper.keep(os.path.dirname(__file__), sys.argv[1])\n"
ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)

# %(name)s is filled in; only what differs from the defaults. The default key exchange takes 60 ms
# of CPU time more for each login.
SETTINGS = """\
HostKey "%(folder)s/host_key"
KexAlgorithms curve25519-sha256
PidFile none
LogLevel VERBOSE
UsePAM no
UseDNS no
StrictModes no
PrintMotd no
PrintLastLog no
AllowUsers %(users)s
PermitRootLogin yes
KbdInteractiveAuthentication no
PasswordAuthentication %(open)s
PermitEmptyPasswords %(open)s
PubkeyAuthentication %(key)s
AuthorizedKeysFile .ssh/authorized_keys
SetEnv "PATH=%(folder)s/bin:%(path)s"
Subsystem sftp internal-sftp
"""
# A shutdown is not over when the command is: the session is cut off, as ssh's exit 255.
COMMANDS = {
  "sudo": 'USER=root LOGNAME=root\nexport USER LOGNAME\nexec "$@"\n',
  "whoami": 'echo "$USER"\n',
  "date": 'case $1 in -u) echo "$*" >>"%(folder)s/dates" ;; *) exec /bin/date "$@" ;; esac\n',
  "shutdown": """case $* in *-r*)  # the next boot is there when somebody has asked for it
echo "$*" >>"%(folder)s/reboots"; echo 2 >"%(folder)s/asked"; exit ;; esac
kill -USR1 %(pid)d && exec sleep 600
""",
  # Only kern.boot_id; after a reboot the old boot is still there for the first who asks.
  "sysctl": """cd "%(folder)s" || exit
[ "$2" = kern.boot_id ] || exit 1
[ ! -e asked ] || mv asked went
[ ! -e going ] || { mv going boot; }
[ ! -e went ] || mv went going
[ -e boot ] && cat boot || echo 1
""",
}


# --- for tests -------------------------------------------------------------------------------


def program(first=""):
  """The stand-in, as a script; `first` is what it does before."""
  return f"#!{sys.executable} -IS\n{first}\n{MAIN}"


def wait_until_gone(folder):
  """Wait until nothing runs any more of a guest that has been ended or killed."""
  with open(os.path.join(str(folder), "guest.log"), "a") as log:
    fcntl.flock(log, fcntl.LOCK_EX)


def missing():
  """The Debian packages that a guest needs and that are not there."""
  import ctypes  # which a guest does not need

  programs = {"openssh-server": "sshd", "openssh-client": "ssh-keygen", "mtools": "mtype"}
  packages = [package for package, name in programs.items() if not find(name)]
  try:
    ctypes.CDLL(LIBRARY)
  except OSError:
    packages.append("libnss-wrapper")
  return packages


# --- the stand-in ----------------------------------------------------------------------------


def write(path, content, mode=0o644):
  """Write a file anew, whoever reads the old one."""
  with open(path + ".new", "w", encoding="utf-8", errors="surrogateescape") as file:
    os.chmod(path + ".new", mode)
    file.write(content)
  os.replace(path + ".new", path)


def properties(argv, option):
  """The values of a QEMU option, each as {property: value}; a comma in a value is written twice."""
  found = []
  for before, value in zip(argv, argv[1:]):
    if before == option:
      words = [word.replace("\0", ",") for word in value.replace(",,", "\0").split(",")]
      found.append(dict(word.partition("=")[::2] for word in words))
  return found


def ssh_address(argv):
  """Where the guest's port 22 appears on the host, as an address for bind()."""
  for netdev in properties(argv, "-netdev"):
    match = re.match(r"tcp:([0-9.]*):([0-9]+)-[0-9.]*:22$", netdev.get("hostfwd", ""))
    if match:
      return match.group(1) or "0.0.0.0", int(match.group(2))
  raise SystemExit("qemu: no hostfwd for the guest's port 22")


def key_disk(argv):
  """The file of drive1, None without one."""
  for drive in properties(argv, "-drive"):
    if drive.get("id") == "drive1":
      return drive.get("file")
  return None


def run(command, stdout, log):
  """Run a program to its end; its stdout goes to a descriptor."""
  with open(os.devnull) as null:
    files = [null.fileno(), stdout, log]
    env = {"PATH": PATH, "MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": os.devnull}
    os.waitpid(spawn(command, env, files), 0)


def set_up(play, argv, log):
  """Write all that sshd and its sessions need into the guest's folder."""
  folder, login = play["folder"], play.get("login", "open")
  os.makedirs(folder + "/bin", exist_ok=True)
  if not os.path.exists(folder + "/host_key"):
    run([find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder + "/host_key"], log, log)
  words = {"folder": folder, "users": " ".join(USERS), "path": PATH, "pid": os.getpid()}
  words["open"] = "yes" if login == "open" else "no"
  words["key"] = "yes" if login in ("key", "key-mbr") else "no"
  write(folder + "/sshd_config", SETTINGS % words)
  for name, text in COMMANDS.items():
    text = "" if name == "shutdown" and play.get("ignore_shutdown") else text
    text = text % words if name in ("shutdown", "date", "sysctl") else text
    write(folder + "/bin/" + name, "#!/bin/sh\n" + text, 0o755)
  write_accounts(folder, play.get("shell", "/bin/sh"), "" if login == "open" else "*")
  for user in USERS:
    furnish_home(folder, user)
  if login in ("key", "key-mbr"):
    authorize(folder, key_disk(argv), "@@1M" if login == "key-mbr" else "", log)


def write_accounts(folder, shell, password):
  """The users, who are all the current one; the group tty, else sshd changes a terminal's group."""
  uid, gid = os.getuid(), os.getgid()
  accounts = [
    f"{user}:{password}:{uid}:{gid}:{user}:{folder}/home/{user}:{shell}\n" for user in USERS
  ]
  try:
    other = pwd.getpwnam("sshd")
  except KeyError:
    other = pwd.getpwnam("nobody")
  accounts.append(f"sshd:*:{other.pw_uid}:{other.pw_gid}::/run/sshd:/usr/sbin/nologin\n")
  write(folder + "/passwd", "".join(accounts))
  shadow = [f"{user}:{password}:19000:0:99999:7:::\n" for user in USERS]
  write(folder + "/shadow", "".join(shadow), 0o600)
  master, slave = os.openpty()
  tty = os.fstat(slave).st_gid
  os.close(master)
  os.close(slave)
  write(folder + "/group", f"users:x:{gid}:\ntty:x:{tty}:\n")


def furnish_home(folder, user):
  """A home in which /etc/profile does not take bin/ from the PATH, and zsh asks nothing."""
  home = os.path.join(folder, "home", user)
  os.makedirs(home + "/.ssh", 0o700, exist_ok=True)
  with contextlib.suppress(FileNotFoundError):
    os.remove(home + "/.ssh/authorized_keys")
  if not os.path.exists(home + "/.profile"):
    write(home + "/.profile", f'PATH="{folder}/bin:$PATH"\n')
    write(home + "/.zshrc", "")


def authorize(folder, disk, offset, log):
  """Let those in whose keys are in the file KEYS of a FAT file system."""
  if not disk:
    os.write(log, b"no drive1: no keys\n")
    return
  for user in USERS:
    with open(f"{folder}/home/{user}/.ssh/authorized_keys", "w") as file:
      run([find("mtype"), "-i", disk + offset, "::KEYS"], file.fileno(), log)


def open_descriptors():
  """What the descriptors of this process refer to."""
  found = {}
  for fd in os.listdir("/proc/self/fd"):
    with contextlib.suppress(OSError):  # the listing's own
      found[fd] = os.readlink("/proc/self/fd/" + fd)
  return found


def show(text):
  """Print on the serial console, if anybody still looks at it."""
  with contextlib.suppress(OSError):
    data = os.fsencode(text)
    while data:
      data = data[os.write(1, data) :]


def listen(argv):
  """The socket that hostfwd asks for."""
  server = socket.socket()
  server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  host, port = ssh_address(argv)
  try:
    server.bind((host, port))
  except OSError:
    raise SystemExit(f"qemu: Could not set up host forwarding rule 'tcp:{host}:{port}-:22'")
  server.listen(50)
  return server


def start_keeper(play, server, pipe, log):
  """Start the keeper; its command line has the folder, and does not look like QEMU's."""
  write(play["folder"] + "/keeper.py", KEEPER)
  banner = play.get("banner", True)
  answers = "answer" if banner else "hang"
  if isinstance(banner, str):
    answers = "says"
    write(play["folder"] + "/says", banner)
  if play.get("daemon"):
    answers = "daemon=" + (find("sshd") if play["daemon"] is True else play["daemon"])
  if play.get("punish"):
    answers = f"punish={float(play['punish'])}"
  command = [sys.executable, "-I", "-S", play["folder"] + "/keeper.py", answers]
  return spawn(command, {"PATH": PATH}, [pipe, log, log, server.fileno()])


def finish(pipe, text=""):
  """End with all that runs in the guest; does not return."""
  signal.pthread_sigmask(signal.SIG_BLOCK, ENDING + (signal.SIGUSR1,))  # once is enough
  show(text)
  os.close(pipe)
  with contextlib.suppress(ChildProcessError):
    while True:
      os.wait()
  os._exit(0)


def handle_signals(play, pipe):
  """SIGTERM ends QEMU, SIGUSR1 is the guest's command `shutdown`."""
  for number in ENDING:
    signal.signal(number, lambda *_: finish(pipe))
  signal.signal(signal.SIGUSR1, lambda *_: finish(pipe, "guest powers off\n"))
  if play.get("ignore_term"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die(message):
  """End as QEMU does: its words come first, then the end of its sockets."""
  sys.stderr.write(f"qemu: {message}\n")
  sys.stderr.flush()
  os._exit(1)


# --- the control socket: as much of QMP as a checkpoint takes ---------------------------------


class ControlSocket:
  """Answers orders; -incoming defer waits for `cont` before the guest runs."""

  def __init__(self, argv, play):
    self.play = play
    chardevs = properties(argv, "-chardev")
    fds = [int(it["fd"]) for it in chardevs if "socket" in it and "fd" in it]
    self.link = socket.socket(fileno=fds[0]) if fds else None
    self.status = "inmigrate" if "-incoming" in argv else "running"
    self.restored = "-incoming" in argv
    self.passed = None
    for memory in properties(argv, "-object"):
      if memory.get("share") == "on":
        with open(memory["mem-path"], "ab") as file:
          file.truncate(1 << 20)
    if self.link:
      self.say({"QMP": {"version": {}, "capabilities": []}})

  def say(self, value):
    with contextlib.suppress(OSError):
      self.link.sendall(json.dumps(value).encode() + b"\r\n")

  def serve(self, until=""):
    """Answer orders until that one has been given, or nobody is there any more."""
    rest = b""
    while self.link:
      try:
        data, rights = self.link.recvmsg(65536, 64)[:2]
      except OSError:
        data, rights = b"", []
      for _, _, content in rights:
        self.passed = int.from_bytes(content[:4], sys.byteorder)
      if not data:
        self.link = None
        break
      for line in (rest + data).splitlines():
        order = json.loads(line.decode())
        self.obey(order["execute"], order.get("arguments") or {})
        if order["execute"] == until:
          return

  def obey(self, order, arguments):
    if self.play.get("note"):
      with open(self.play["note"], "a") as file:
        file.write(order + "\n")
    if self.play.get("die") == order:
      die("it dies at " + order)
    while self.play.get("hang") == order:
      signal.pause()
    if self.play.get("garble") == order:
      return self.link.sendall(b"no JSON\n")
    if self.play.get("fail") == order:
      return self.say({"error": {"class": "GenericError", "desc": "told to fail at " + order}})
    if self.play.get("flood") == order:
      with contextlib.suppress(OSError):
        return self.link.sendall(b"x" * (1 << 22))
    if self.play.get("shut") == order:
      os.close(self.passed)
      return self.say({"return": {}})
    if self.play.get("broken") == order:
      return self.say({"return": {"status": "failed", "error-desc": "told to break at " + order}})
    if self.play.get("slow") == order:
      self.play["slow"] = None
      return self.say({"return": {"status": "active"}})
    result = {}
    accelerator = self.play.get("accelerator", "tcg")
    if order == "query-kvm":
      result = {"present": True, "enabled": accelerator == "kvm"}
    elif order == "x-query-jit" and accelerator != "tcg":
      return self.say({"error": {"class": "GenericError", "desc": "only with tcg"}})
    elif order in ("query-status", "query-migrate"):
      result = {"status": self.status}
    elif order == "migrate":
      with socket.socket(fileno=self.passed) as out:
        out.sendall(b"state of the devices")
      self.status = "completed"
    elif order == "migrate-incoming":
      self.say({"event": "MIGRATION", "data": {"status": "setup"}})
      self.say({"return": {}})
      with socket.socket(fileno=self.passed) as out:
        content = b"".join(iter(lambda: out.recv(65536), b""))
      if content != b"state of the devices":
        die("load of migration failed: Invalid argument")
      self.status = "paused"
      return None
    elif order == "quit":
      self.say({"return": {}})
      os.kill(os.getpid(), signal.SIGTERM)
    return self.say({"return": result})


def main(argv):
  """Do as $SSH_GUEST says; returns only when the guest dies at the start."""
  record = {"argv": argv, "pid": os.getpid(), "fds": open_descriptors(), "keeper": None}
  play = json.loads(os.environ["SSH_GUEST"])
  play["folder"] = os.path.abspath(play["folder"])
  control = ControlSocket(argv, play.get("control", {}))
  if control.restored:
    control.serve("cont")
    play["banner"] = not control.play.get("mute")
  else:
    text = play.get("console", CONSOLE)
    show(text)
    for _ in range(play.get("flood", 0) // max(1, len(text))):
      show(text)
  if play.get("die"):
    return play["die"].get("exit", play.get("exit", 1))
  reading, pipe = os.pipe()
  handle_signals(play, pipe)
  os.makedirs(play["folder"], exist_ok=True)
  time.sleep(play.get("delay", 0))
  if play.get("listen", True):
    with open(play["folder"] + "/guest.log", "a") as log, listen(argv) as server:
      fcntl.flock(log, fcntl.LOCK_EX)  # the keeper holds it; the folder serves one guest at a time
      set_up(play, argv, log.fileno())
      record["keeper"] = start_keeper(play, server, reading, log.fileno())
  os.close(reading)
  if play.get("record"):
    with open(play["record"], "w") as file:
      json.dump(record, file)
  control.serve()
  while True:
    signal.pause()
