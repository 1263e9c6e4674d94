"""Darwin for the Python that finds this folder on PYTHONPATH: what a Mac has, lacks and refuses.

Python loads it before the program. Linux stays below: the numbers of errno and of the flags are
its own, and a program of another language, or a Python with -S or -I, sees no Darwin.

The environment says which Mac it is (tests/darwin_host.py sets it up):

  DARWIN_MACHINE  silicon    Apple Silicon and a native Python; Rosetta if DARWIN_ROOT has it
                  rosetta    the same, but the Python is Intel's: uname says x86_64
                  vm         a virtual machine on Apple Silicon: no HVF
                  runner     the same, where sysctl does not even know kern.hv_support: GitHub's
                             (actions/runner-images issue 9460)
                  intel      an Intel Mac
                  intel-vm   a virtual machine on an Intel Mac: no HVF
  DARWIN_ROOT     a folder shaped like /: what is in it is found at its path in /, and is what
                  starts where a program of that path is started
  DARWIN_FOLDS    a folder in and below which names are one that differ only in case or in Unicode
                  normalisation, and names that are no UTF-8 are refused with EILSEQ, as on APFS
  DARWIN_CALLS    a file that gets a line of words, with tabs between, for each fsync
  DARWIN_DIR_FD   no: os has no dir_fd, as in python.org's Python 3.6 to 3.8
  DARWIN_FLOCK    no: flock lets everybody in, as on some network file systems
  DARWIN_TMP      no: nothing can be made in the folders for temporary files
  DARWIN_CERTIFICATES  no: Python has no certificates to trust, as python.org's before its
                  "Install Certificates.command" has run; apple: Python has Apple's LibreSSL, which
                  looks only at /etc/ssl/cert.pem, whatever SSL_CERT_FILE says
  DARWIN_PROXIES  the proxies of System Settings, JSON: {"https": "http://host:port"}
  DARWIN_STARTED  is set by the first Python: its soft limit of open files becomes 256

A program file that begins with a Mach-O header (macho() of darwin_host.py) is one of a Mac. It is
Python behind the header, and starts as the machine can start it: Intel's needs Rosetta, Apple's
Apple Silicon.

Works with Python 3.6 to 3.14; on a real Mac it only chooses another kind of Mac. Sources: XNU's
bsd/kern/kern_resource.c (limits of open files) and bsd/sys/un.h (104 bytes of a socket's path),
CPython's configure tests and its sysconfig of macOS builds, Apple's description of APFS ("case-
and normalization-insensitive, but preserving").
"""

import builtins
import errno
import io
import os
import sys

MACHINE = os.environ.get("DARWIN_MACHINE", "silicon")
ROOT = os.environ.get("DARWIN_ROOT", "")
FOLDS = os.path.realpath(os.environ["DARWIN_FOLDS"]) if os.environ.get("DARWIN_FOLDS") else ""
CALLS = os.environ.get("DARWIN_CALLS", "")
DIR_FD = os.environ.get("DARWIN_DIR_FD") != "no"
INTEL = MACHINE in ("intel", "intel-vm")
REAL_MAC = sys.platform == "darwin"
TMP = ("/tmp", "/var/tmp", "/usr/tmp", "/private/tmp", "/")
NO_TMP = os.environ.get("DARWIN_TMP") == "no"

# What Linux has and a Mac has not, at its path or below; or has only if DARWIN_ROOT says so.
LINUX = ("/proc", "/sys", "/dev/kvm", "/dev/shm", "/etc/os-release", "/usr/lib/os-release",
         "/etc/ssl/cert.pem")  # fmt: skip
VERSION = "Darwin Kernel Version 24.6.0: Mon Jul 14 11:30:29 PDT 2025; root:xnu-11417.140.69~1"

# Names of modules that a Mac's Python lacks. A name that ends with _ stands for all that begin so.
LACKS = {
  "os": "posix_fallocate posix_fadvise POSIX_FADV_ memfd_create MFD_ pidfd_open PIDFD_ P_PIDFD "
  "sched_getaffinity sched_setaffinity sched_getparam sched_setparam sched_getscheduler "
  "sched_setscheduler sched_rr_get_interval sched_param SCHED_BATCH SCHED_IDLE SCHED_RESET_ "
  "setxattr getxattr listxattr removexattr XATTR_ pipe2 eventfd eventfd_ EFD_ timerfd_ TFD_ "
  "copy_file_range splice SPLICE_ getrandom GRND_ getresuid getresgid setresuid setresgid "
  "fdatasync O_TMPFILE O_PATH O_DIRECT O_LARGEFILE O_NOATIME O_RSYNC unshare setns CLONE_ "
  "preadv2 pwritev2 RWF_ RTLD_DEEPBIND ST_APPEND ST_MANDLOCK ST_NOATIME ST_NODEV ST_NODIRATIME "
  "ST_NOEXEC ST_RELATIME ST_SYNCHRONOUS ST_WRITE POSIX_SPAWN_CLOSEFROM posix_openpt_",
  "socket": "SOCK_CLOEXEC SOCK_NONBLOCK AF_NETLINK AF_PACKET AF_ALG AF_VSOCK AF_CAN AF_TIPC "
  "AF_BLUETOOTH AF_RDS AF_QIPCRTR PF_PACKET PF_CAN SO_PEERCRED SO_PASSCRED SO_BINDTODEVICE "
  "SO_DOMAIN SO_PROTOCOL SO_MARK SO_PRIORITY SO_INCOMING_ MSG_NOSIGNAL MSG_CMSG_CLOEXEC "
  "MSG_ERRQUEUE MSG_MORE MSG_CONFIRM MSG_FASTOPEN TCP_CORK TCP_DEFER_ACCEPT TCP_INFO "
  "TCP_LINGER2 TCP_QUICKACK TCP_SYNCNT TCP_USER_TIMEOUT TCP_WINDOW_CLAMP TCP_CONGESTION "
  "NETLINK_ PACKET_ ALG_ VMADDR_ CAN_ TIPC_ IOCTL_ sethostname_",
  "select": "epoll EPOLL_ EPOLLERR EPOLLET EPOLLEXCLUSIVE EPOLLHUP EPOLLIN EPOLLMSG EPOLLONESHOT "
  "EPOLLOUT EPOLLPRI EPOLLRDBAND EPOLLRDHUP EPOLLRDNORM EPOLLWRBAND EPOLLWRNORM POLLRDHUP POLLMSG",
  "fcntl": "F_SETPIPE_ F_GETPIPE_ F_ADD_SEALS F_GET_SEALS F_SEAL_ F_OFD_ F_NOTIFY F_SETLEASE "
  "F_GETLEASE F_SETSIG F_GETSIG F_EXLCK F_SHLCK DN_ LOCK_MAND LOCK_READ LOCK_RW LOCK_WRITE I_ "
  "FICLONE FICLONERANGE",
  "resource": "prlimit RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_MSGQUEUE "
  "RLIMIT_OFILE",
  "signal": "sigwaitinfo sigtimedwait pidfd_send_signal SIGRTMIN SIGRTMAX SIGPOLL SIGPWR SIGCLD "
  "SIGSTKFLT",
  "time": "CLOCK_BOOTTIME CLOCK_TAI CLOCK_HIGHRES pthread_getcpuclockid",
}
LACKS["_socket"] = LACKS["socket"]

real_stat, real_lstat, real_listdir = os.stat, os.lstat, os.listdir
real_open, real_readlink, real_access = os.open, os.readlink, os.access
real_realpath, real_getcwd, real_builtin_open = os.path.realpath, os.getcwd, io.open


def lose(name, module):
  """Take the names away that this module has only on Linux."""
  words = LACKS.get(name, "").split()
  families = tuple(word for word in words if word.endswith("_"))
  for entry in list(vars(module)):
    if entry in words or families and entry.startswith(families):
      delattr(module, entry)
      if entry in getattr(module, "__all__", ()):
        module.__all__.remove(entry)


# --- Paths: what is there, where it is, and how it is spelt --------------------------------------


def is_below(path, folder):
  return path == folder or path.startswith(folder.rstrip("/") + "/")


def fold(name):
  """The same for all spellings that APFS takes for one name."""
  if name.isascii() if hasattr(name, "isascii") else all(ord(c) < 128 for c in name):
    return name.lower()
  import unicodedata

  return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def exists(path, dir_fd=None):
  try:
    real_lstat(path, dir_fd=dir_fd)
    return True
  except (OSError, ValueError):
    return False


def refuse(number, path):
  raise OSError(number, os.strerror(number), path)


def spelt(path, base):
  """The path below the folder base with the spellings that are on the disk."""
  done = "/" if path.startswith("/") else ""
  parts = path.split("/")
  for place, name in enumerate(parts):
    if name in ("", ".", ".."):
      done = os.path.join(done, name) if name else done
      continue
    above = os.path.join(base, done)
    step = os.path.join(done, name)
    if not exists(os.path.join(base, step)):
      if not is_below(real_realpath(above), FOLDS):
        return os.path.join(done, *parts[place:])
      try:
        os.fsencode(name).decode("utf-8")
      except UnicodeDecodeError:
        refuse(errno.EILSEQ, path)
      try:
        there = real_listdir(above)
      except OSError:
        return os.path.join(done, *parts[place:])
      wanted = fold(name)
      step = os.path.join(done, next((n for n in there if fold(n) == wanted), name))
    done = step
  return done + "/" if path.endswith("/") and not done.endswith("/") else done


def where(path, dir_fd=None):
  """The real path of what a Mac has at a path; the same object when there is no difference."""
  if isinstance(path, int) or path is None or REAL_MAC and not ROOT:
    return path
  given = os.fspath(path)
  text = os.fsdecode(given)
  if len(os.fsencode(text)) >= 1024 and not REAL_MAC:  # PATH_MAX
    refuse(errno.ENAMETOOLONG, given)
  moved = text
  if text.startswith("/"):
    plain = os.path.normpath(text)
    if ROOT and not is_below(plain, ROOT) and is_a_macs(plain):
      moved = ROOT + plain
    elif not REAL_MAC and any(is_below(plain, one) for one in LINUX):
      refuse(errno.ENOENT, given)
  if FOLDS and not REAL_MAC and not exists(moved, dir_fd if not moved.startswith("/") else None):
    if moved.startswith("/"):
      base = "/"
    elif dir_fd is None:
      base = real_getcwd()
    else:
      base = real_readlink(f"/proc/self/fd/{dir_fd}")
    moved = spelt(moved, base)
  if moved == text:
    return path
  return os.fsencode(moved) if isinstance(given, bytes) else moved


def is_a_macs(path):
  """Whether the Mac's own root has that path; a folder in it hides none of /."""
  try:
    folder = real_lstat(ROOT + path).st_mode & 0o170000 == 0o040000
  except OSError:
    return False
  return not folder or not exists(path)


def check_tmp(path):
  """Refuse what would be made in a folder for temporary files."""
  if NO_TMP and not isinstance(path, int) and path is not None:
    folder = os.path.dirname(os.path.abspath(os.fsdecode(os.fspath(path))))
    if folder in TMP:
      refuse(errno.EROFS, path)


def call(real, path, moved, args, more):
  """Call it with the real path; an error names the path as it was given."""
  try:
    return real(moved, *args, **more)
  except OSError as error:
    if moved is not path and error.filename == moved:
      error.filename = path
    raise


def look_at_dir_fd(more, names):
  for name in names:
    if more.get(name) is None:
      more.pop(name, None)
    elif not DIR_FD:
      raise NotImplementedError(f"{name} unavailable on this platform")


def one_path(name, real):
  """The function with a path for its first argument, as it is on a Mac."""

  def wrapped(*args, **more):
    if not args and "path" not in more:
      return real(**more)
    path = args[0] if args else more.pop("path")
    look_at_dir_fd(more, ("dir_fd",))
    makes = name in ("mkdir", "mkfifo", "mknod")
    makes = makes or name == "open" and len(args) > 1 and args[1] & os.O_CREAT
    if makes and "dir_fd" not in more:
      check_tmp(path)
    try:
      moved = where(path, more.get("dir_fd"))
    except OSError:
      if name == "access":
        return False
      raise
    return call(real, path, moved, args[1:], more)

  return wrapped


def two_paths(name, real):
  """The same with two paths. A file that is renamed to another spelling of its name gets that."""

  def wrapped(src, dst, **more):
    look_at_dir_fd(more, ("src_dir_fd", "dst_dir_fd", "dir_fd"))
    if more.get("dst_dir_fd", more.get("dir_fd")) is None:
      check_tmp(dst)
    target_fd = more.get("dir_fd") if name == "symlink" else more.get("dst_dir_fd")
    target = where(dst, target_fd)
    if name == "symlink":
      return call(lambda path: real(src, path, **more), dst, target, (), {})
    source = where(src, more.get("src_dir_fd"))
    if name in ("rename", "replace") and target is not dst:
      there = real_lstat(target, dir_fd=target_fd)
      if os.path.samestat(real_lstat(source, dir_fd=more.get("src_dir_fd")), there):
        text = os.fsdecode(os.fspath(dst)).rstrip("/")
        moved = os.fsdecode(os.fspath(target)).rstrip("/")
        target = os.path.join(os.path.dirname(moved), os.path.basename(text))
        target = os.fsencode(target) if isinstance(os.fspath(dst), bytes) else target
    return real(source, target, **more)

  return wrapped


def two_paths_safely(name, real):
  wrapped = two_paths(name, real)

  def safely(*args, **more):
    args = list(args)
    src = args.pop(0) if args else more.pop("src")
    dst = args.pop(0) if args else more.pop("dst")
    try:
      return wrapped(src, dst, *args, **more)
    except FileNotFoundError as error:
      error.filename, error.filename2 = src, dst
      raise

  return safely


ONE_PATH = ("open", "stat", "lstat", "mkdir", "unlink", "remove", "rmdir", "readlink", "scandir",
            "listdir", "access", "chmod", "chown", "utime", "truncate", "statvfs", "mkfifo",
            "mknod", "chdir", "lchown", "pathconf", "chroot")  # fmt: skip
TWO_PATHS = ("rename", "replace", "link", "symlink")


class Builtin:
  """A function that no class binds to its instances, as those written in C: pathlib has some."""

  def __init__(self, name, function, like):
    self.function = function
    self.__name__ = self.__qualname__ = name
    self.__doc__ = like.__doc__

  def __call__(self, *args, **more):
    return self.function(*args, **more)


def put(name, wrapped):
  """Set a function of os, also in its lists of what it supports."""
  real = getattr(os, name)
  wrapped = Builtin(name, wrapped, real)
  for supports in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks,
                   os.supports_effective_ids):  # fmt: skip
    if real in supports:
      supports.discard(real)
      supports.add(wrapped)
  setattr(os, name, wrapped)


def change_os():
  for name in ONE_PATH:
    if hasattr(os, name):
      put(name, one_path(name, getattr(os, name)))
  for name in TWO_PATHS:
    put(name, two_paths_safely(name, getattr(os, name)))
  if not DIR_FD:
    os.supports_dir_fd.clear()
    sys.modules.pop("shutil", None)  # a .pth file of the machine may have loaded it before
  lose("os", os)
  put("uname", uname)
  put("fsync", noted_fsync(os.fsync))
  sysconf_names = {"SC_PHYS_PAGES", "SC_AVPHYS_PAGES"}
  for name in sysconf_names & set(os.sysconf_names) if not REAL_MAC else ():
    del os.sysconf_names[name]  # macOS has the first, but Python before 3.13 has not


def uname():
  """What uname(2) says: Rosetta lies about the machine, but not about the kernel's name."""
  machine = "x86_64" if INTEL or MACHINE == "rosetta" else "arm64"
  kernel = "X86_64" if INTEL else "ARM64_T6000"
  kernel = "ARM64_VMAPPLE" if MACHINE in ("vm", "runner") else kernel
  version = VERSION + "/RELEASE_" + kernel
  return os.uname_result(("Darwin", "mac.local", "24.6.0", version, machine))


def note(*words):
  """Add a line to the file of calls."""
  if CALLS:
    fd = real_open(CALLS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
      os.write(fd, ("\t".join(words) + "\n").encode("utf-8", "surrogateescape"))
    finally:
      os.close(fd)


def path_of(fd):
  try:
    return real_readlink(f"/proc/self/fd/{fd}")
  except OSError:
    return "?"


def noted_fsync(real):
  def fsync(fd):
    number = fd if isinstance(fd, int) else fd.fileno()
    real(number)
    note("fsync", path_of(number))

  return fsync


def change_open():
  real = io.open

  def open(file, mode="r", *args, **more):
    if set("wxa") & set(mode):
      check_tmp(file)
    return call(real, file, where(file), (mode, *args), more)

  builtins.open = io.open = Builtin("open", open, real)


# --- Modules that are changed when they are loaded ------------------------------------------------


def change_resource(module):
  """A hard limit of open files that is none, and a soft one of at most 10240 (OPEN_MAX)."""
  lose("resource", module)
  nofile, most, endless = module.RLIMIT_NOFILE, 10240, 2**63 - 1
  get, set_limit = module.getrlimit, module.setrlimit
  module.RLIM_INFINITY = endless if not REAL_MAC else module.RLIM_INFINITY

  def getrlimit(which):
    soft, hard = get(which)
    return (soft, endless) if which == nofile and not REAL_MAC else (soft, hard)

  def setrlimit(which, limits):
    soft, hard = limits
    if which == nofile and not REAL_MAC:
      if not 0 <= soft <= most:
        raise ValueError("current limit exceeds maximum limit")
      hard = get(which)[1]
    set_limit(which, (soft, hard))

  module.getrlimit, module.setrlimit = getrlimit, setrlimit


def change_fcntl(module):
  lose("fcntl", module)
  if REAL_MAC:
    return
  real, flock = module.fcntl, module.flock
  module.F_FULLFSYNC, module.F_NOCACHE, module.F_GETPATH = 51, 48, 50

  def fcntl(fd, command, arg=0):
    number = fd if isinstance(fd, int) else fd.fileno()
    if command == module.F_FULLFSYNC:
      return os.fsync(number) or 0
    if command == module.F_NOCACHE:
      return 0
    if command == module.F_GETPATH:
      return os.fsencode(path_of(number)).ljust(1024, b"\0")
    return real(number, command, arg)

  module.fcntl = fcntl
  if os.environ.get("DARWIN_FLOCK") == "no":
    module.flock = lambda fd, how: flock(fd, module.LOCK_UN)


def change_selectors(module):
  if hasattr(module, "EpollSelector"):
    del module.EpollSelector
    module.DefaultSelector = module.PollSelector


def change_socket(module):
  """Short paths only, none in the abstract name space, and XNU's rule for an address in use."""
  lose("socket", module)
  if REAL_MAC:
    return
  plain = module.socket
  bind, connect, connect_ex = plain.bind, plain.connect, plain.connect_ex

  def address(link, where_to):
    if link.family != module.AF_UNIX:
      return where_to
    text = os.fsencode(where_to)
    if len(text) > 103:
      raise OSError("AF_UNIX path too long")
    if text[:1] in (b"", b"\0"):
      refuse(errno.ENOENT, None)
    return where(where_to)

  def xnu_bind(self, where_to):
    try:
      return bind(self, address(self, where_to))
    except OSError as error:
      if error.errno == errno.EADDRINUSE and is_free_on_a_mac(module, self, where_to):
        return bind(self, (where_to[0], 0))  # who probes asks no more
      raise

  plain.bind = xnu_bind
  plain.connect = lambda self, where_to: connect(self, address(self, where_to))
  plain.connect_ex = lambda self, where_to: connect_ex(self, address(self, where_to))


def is_free_on_a_mac(module, link, where_to):
  """With SO_REUSEADDR one address of a port is free whose others are one listener's (`*`)."""
  if link.family != module.AF_INET or link.type & 15 != module.SOCK_STREAM:
    return False
  if not link.getsockopt(module.SOL_SOCKET, module.SO_REUSEADDR):
    return False
  if where_to[0] in ("", "0.0.0.0"):
    return False
  number = int.from_bytes(module.inet_aton(where_to[0]), sys.byteorder)
  wanted = f"{number:08X}:{where_to[1]:04X}"
  lines = []
  for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    if exists(table):
      with real_builtin_open(table) as file:
        lines += file.read().splitlines()[1:]
  listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
  return wanted not in listening and any(one.endswith(wanted[8:]) for one in listening)


# Starts what is behind a Mach-O header, which is Python.
LOADER = """import sys
del sys.argv[0]
__file__ = sys.argv[0]
with open(__file__, 'rb') as file: exec(compile(file.read()[32:], __file__, 'exec'))
"""


def change_subprocess(module):
  class Popen(module.Popen):
    """Starts the Mac's programs."""

    def __init__(self, args, *more, **named):
      words = [args] if isinstance(args, (str, bytes)) or hasattr(args, "__fspath__") else args
      words = list(words)
      if not named.get("shell"):
        program = os.fsdecode(named.pop("executable", None) or words[0])
        env = named.get("env")
        words[:1] = command_for(program, words[0], os.environ if env is None else env)
        args = words
      super().__init__(args, *more, **named)

  Popen.__qualname__ = "Popen"
  module.Popen = Popen


def command_for(program, name, env):
  """The words that start a program, in place of its name."""
  path = program
  if "/" not in program:
    found = [os.path.join(folder, program) for folder in env.get("PATH", os.defpath).split(":")]
    path = next((p for p in found if os.access(p, os.X_OK) and not os.path.isdir(p)), program)
  path = where(path) if "/" in path else path
  cpu = macho_cpu(path)
  if not cpu:
    return [path if path != program else name]
  rosetta = exists(ROOT + "/Library/Apple/usr/share/rosetta")
  if cpu == "arm64" and INTEL or cpu == "x86_64" and not INTEL and not rosetta:
    raise OSError(86, "Bad CPU type in executable", program)
  if not real_access(path, os.X_OK):
    refuse(errno.EACCES, program)
  python = os.environ.get("DARWIN_PYTHON") or sys.executable
  return [python, "-IS", "-c", LOADER, path]


def macho_cpu(path):
  """arm64 or x86_64 for a program of a Mac, empty for any other file."""
  try:
    fd = real_open(path, os.O_RDONLY | os.O_NONBLOCK)
  except OSError:
    return ""
  try:
    head = os.read(fd, 8)
  except OSError:
    return ""
  finally:
    os.close(fd)
  kinds = {b"\xcf\xfa\xed\xfe\7\0\0\1": "x86_64", b"\xcf\xfa\xed\xfe\x0c\0\0\1": "arm64"}
  return kinds.get(head, "")


def change_ssl(module):
  """Certificates of the Mac's own root are found at their paths; python.org's Python has none."""
  context = module.SSLContext
  load, defaults, paths = (
    context.load_verify_locations, context.set_default_verify_paths, module.get_default_verify_paths
  )  # fmt: skip
  bare = os.environ.get("DARWIN_CERTIFICATES") == "no"
  apple = os.environ.get("DARWIN_CERTIFICATES") == "apple"
  if apple:
    module.OPENSSL_VERSION = "LibreSSL 2.8.3"

  def load_verify_locations(self, cafile=None, capath=None, cadata=None):
    return load(self, where(cafile), where(capath), cadata)

  def set_default_verify_paths(self):
    found = [where_if_any(os.environ.get(name)) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")]
    found = [where_if_any("/etc/ssl/cert.pem"), None] if apple else found
    if any(found):
      load(self, *found)
    elif not bare and not apple:
      defaults(self)

  def get_default_verify_paths():
    found = paths()
    if not bare:
      return found
    at = "/Library/Frameworks/Python.framework/Versions/3.x/etc/openssl/"
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    file, folder = file if where_if_any(file) else None, folder if where_if_any(folder) else None
    return found._replace(
      cafile=file, capath=folder, openssl_cafile=at + "cert.pem", openssl_capath=at + "certs"
    )

  context.load_verify_locations = load_verify_locations
  context.set_default_verify_paths = set_default_verify_paths
  module.get_default_verify_paths = get_default_verify_paths


def where_if_any(path):
  """The real path of a file that is there, else None."""
  return where(path) if path and os.path.exists(path) else None


def change_tempfile(module):
  """When a .pth file has loaded it before."""
  if hasattr(module, "_O_TMPFILE_WORKS"):
    module._O_TMPFILE_WORKS = False


CHANGES = {
  "resource": change_resource,
  "fcntl": change_fcntl,
  "select": lambda module: lose("select", module),
  "selectors": change_selectors,
  "_socket": lambda module: lose("_socket", module),
  "socket": change_socket,
  "subprocess": change_subprocess,
  "ssl": change_ssl,
  "time": lambda module: lose("time", module),
  "signal": lambda module: lose("signal", module),
  "tempfile": change_tempfile,
}


class Loader:
  """Loads a module as its own loader does, then changes it."""

  def __init__(self, loader, change):
    self.loader, self.change = loader, change

  def create_module(self, spec):
    return self.loader.create_module(spec)

  def exec_module(self, module):
    self.loader.exec_module(module)
    self.change(module)

  def __getattr__(self, name):
    return getattr(self.loader, name)


class Finder:
  """Finds the modules that are to be changed."""

  def find_spec(self, name, path=None, target=None):
    if name not in CHANGES:
      return None
    for finder in sys.meta_path:
      spec = finder.find_spec(name, path, target) if finder is not self else None
      if spec:
        spec.loader = Loader(spec.loader, CHANGES[name])
        return spec
    return None


def change_modules():
  sys.meta_path.insert(0, Finder())
  for name, change in CHANGES.items():
    if name in sys.modules:
      change(sys.modules[name])


def change_proxies():
  """The module that asks System Settings for proxies."""
  import json

  module = type(sys)("_scproxy")
  proxies = json.loads(os.environ.get("DARWIN_PROXIES") or "{}")
  module._get_proxies = lambda: proxies
  module._get_proxy_settings = lambda: {"exclude_simple": False, "exceptions": ()}
  sys.modules["_scproxy"] = module


def limit_files():
  """Terminal and launchd give 256 open files; who raises the limit keeps it in what it starts."""
  if "DARWIN_STARTED" not in os.environ:
    os.environ["DARWIN_STARTED"] = "1"
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


sys.platform = "darwin"
change_os()
change_open()
change_modules()
change_proxies()
limit_files()
