#!/usr/bin/env python3
"""qvm runs FreeBSD, OpenBSD, NetBSD, Haiku and OmniOS in QEMU, on any macOS or Linux with Python.

It downloads QEMU, qemu-img and a pre-built image, keeps them in one folder, makes a qcow2 overlay
on the untouched image and boots it in the terminal. The file is read from top to bottom: every
section uses only those above it.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
from stat import S_ISDIR, S_ISLNK, S_ISREG, S_ISSOCK
from typing import (
  IO,
  TYPE_CHECKING,
  Any,
  Callable,
  Dict,
  Iterable,
  Iterator,
  List,
  Mapping,
  NamedTuple,
  Optional,
  Sequence,
  Set,
  Tuple,
  Type,
  TypeVar,
  Union,
)

__version__ = "0.1.0"

if TYPE_CHECKING:
  import array
  import difflib
  import email.utils
  import fcntl
  import fnmatch
  import glob
  import hashlib
  import http.client
  import json
  import lzma
  import marshal
  import queue
  import random
  import select
  import shlex
  import shutil
  import socket
  import ssl
  import struct
  import subprocess
  import tarfile
  import tempfile
  import termios
  import tty
  import urllib.error
  import urllib.parse
  import urllib.request
  import zlib
else:

  class Lazy:
    """Modules that are imported when they are first used: a cached start needs few of them."""

    def __init__(self, *names):
      self.__dict__["_names"] = names

    def __getattr__(self, attribute):
      for name in self._names:
        module = __import__(name)  # a.b gives a, which has b from then on
      globals()[module.__name__] = module
      return getattr(module, attribute)

  for _name in (
    *("array", "difflib", "fcntl", "fnmatch", "glob", "hashlib", "json", "lzma", "marshal"),
    *("queue", "random", "select", "shlex", "shutil", "socket", "ssl", "struct", "subprocess"),
    *("tarfile", "tempfile", "termios", "tty", "zlib"),
  ):
    globals()[_name] = Lazy(_name)
  email, http = Lazy("email.utils"), Lazy("http.client")
  urllib = Lazy("urllib.error", "urllib.parse", "urllib.request")


# ---- Errors and output --------------------------------------------------------------------------

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_OWN = 125  # qvm's own failure, where any other code is that of a command in the guest


class QvmError(Exception):
  """A failure that the user is told of: what failed, by name, and what to do about it."""

  def __init__(self, message: str, hint: str = "") -> None:
    super().__init__(message)
    self.hint = hint


class UsageError(QvmError):
  """The command line or the environment asks for something that there is not."""

  def __init__(self, message: str, hint: str = "") -> None:
    super().__init__(re.sub(r"\S{300,}", lambda word: word.group()[:300] + "...", message), hint)


class RefusedError(QvmError):
  """A file is damaged or hostile; to fetch it again may help, to keep it does not."""


class RunningError(QvmError):
  """An instance runs, which must not."""


class Interrupted(BaseException):
  """A signal asks qvm to end; clean-up runs while this passes through."""

  def __init__(self, signum: int) -> None:
    super().__init__(signum)
    self.signum = signum


def describe(error: BaseException) -> str:
  """An exception in words: what the system says, else its text without passwords, else its kind."""
  text = getattr(error, "strerror", None) or str(error) or type(error).__name__
  if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
    text = f"the disk is full: {text}"
  return re.sub(r"\S*@", "", str(text))


def redacted(url: str) -> str:
  """A URL fit for a message: no user, no password, no signed query."""
  return re.sub(r"(//)[^/@]*@", r"\1", url.split("?")[0].split("#")[0])


def ending(code: int) -> str:
  """How a process ended, in words."""
  return f"signal {-code}" if code < 0 else f"exit code {code}"


def megabytes(count: float) -> str:
  """A number of bytes for people, in units of 1000."""
  for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= size:
      return f"{count / size:.{0 if count >= 100 * size else 1}f} {unit}"
  return f"{count:.0f} B"


def printable(text: str) -> str:
  """The text without the control characters that a server or a file name could hold."""
  return "".join(c if c.isprintable() else "?" for c in text)


class Reporter:
  """Lines on stderr: one per event, whole even when several threads and processes write them."""

  def __init__(self) -> None:
    self.progress = False
    self.newline = "\n"  # on a raw terminal a carriage return goes with it
    self.log = -1  # the descriptor of a file for the lines once nobody reads stderr any more
    self.lock = threading.Lock()
    self.drawn = False

  def say(self, text: str) -> None:
    """Write one `qvm: …` line; a closed stderr is no reason to fail."""
    with self.lock:
      self._write(f"qvm: {printable(text)}{self.newline}")
      self.drawn = False

  def draw(self, text: str) -> None:
    """Show the progress in place on a terminal, as a line of its own elsewhere."""
    with self.lock:
      if os.isatty(2):
        self._write(printable(text)[: terminal_width() - 1])
        self.drawn = True
      else:
        self._write(f"qvm: {printable(text)}\n")

  def _write(self, text: str) -> None:
    clear = "\r\033[K" if self.drawn else ""
    data = (clear + text).encode("utf-8", "replace")
    try:
      os.write(2, data)
    except OSError:
      with contextlib.suppress(OSError):
        os.write(self.log, b"\n" + data)  # the guest may be in the middle of a line


def terminal_width() -> int:
  """Columns of the terminal behind stderr, 80 where it does not tell."""
  try:
    return os.get_terminal_size(2).columns or 80
  except OSError:
    return 80


report = Reporter()
say = report.say


def emit(text: str) -> None:
  """Write one line of result to stdout, file names byte for byte."""
  try:
    data = os.fsencode(text)
  except UnicodeEncodeError:  # help in a locale without UTF-8
    data = text.encode("utf-8", "surrogateescape")
  write_all(1, data + b"\n")


def emit_json(value: Any) -> None:
  """Write one JSON value to stdout."""
  emit(json.dumps(value, indent=2))


def show_table(table: Sequence[Sequence[str]]) -> None:
  """Print rows with their columns aligned."""
  widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
  for line in table:
    emit(printable("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()))


def write_all(fd: int, data: bytes) -> None:
  """Write all bytes, also to a descriptor that somebody has made non-blocking."""
  view = memoryview(data)
  while view:
    try:
      view = view[os.write(fd, view) :]
    except BlockingIOError:
      select.select([], [fd], [])


def open_standard_streams() -> None:
  """Where stdin, stdout or stderr is closed, no other file may get its number."""
  for fd in (0, 1, 2):
    try:
      os.fstat(fd)
    except OSError:
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
  """Turns the first signal that asks qvm to end into an Interrupted; later ones are ignored."""

  def __init__(self) -> None:
    self.held = False
    self.caught = 0

  def install(self) -> None:
    """Listen; a signal that was ignored from the start, as under nohup, stays so."""
    for number in STOP_SIGNALS:
      if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, self.handle)

  def handle(self, number: int, frame: Any) -> None:
    if not self.caught:
      self.caught = number
      if not self.held:
        raise Interrupted(number)

  def again(self) -> None:
    """What was caught has been dealt with; the next one counts."""
    self.caught = 0

  def finish(self) -> None:
    """Everything is done: what comes now is too late to matter."""
    self.caught = self.caught or -1

  @contextlib.contextmanager
  def hold(self) -> Iterator[None]:
    """Let a signal wait until what may not be interrupted is done; other threads get none."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    self.held = True
    try:
      yield
    finally:
      self.held = False
    if self.caught:
      raise Interrupted(self.caught)


signals = Signals()


# ---- Guests -------------------------------------------------------------------------------------
# Each table is one whole QEMU command line, given by the user and complete in itself: nothing is
# shared between them. SHARE is the share/qemu folder of that guest CPU's QEMU, DISK the overlay.

FREEBSD_X86_64 = """
qemu-system-x86_64
-nographic
-machine type=q35,accel=hvf:kvm:tcg
-cpu max
-smp 2
-m 6G
-device virtio-net,netdev=user.0,addr=0x03
-netdev user,id=user.0,hostfwd=tcp::2847-:22
-display none
-monitor none
-boot strict=off
-bios SHARE/bios-256k.bin
-device virtio-blk-pci,drive=drive0,bootindex=0
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
FREEBSD_ARM64 = """
qemu-system-aarch64
-nographic
-machine type=virt,accel=hvf:kvm:tcg
-cpu cortex-a57
-smp 2
-m 6G
-device virtio-net,netdev=user.0,addr=0x03
-netdev user,id=user.0,hostfwd=tcp::2847-:22
-display none
-monitor none
-boot strict=off
-bios SHARE/uefi.fd
-device virtio-blk-pci,drive=drive0,bootindex=0
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
OPENBSD_X86_64 = """
qemu-system-x86_64
-nographic
-machine type=q35,accel=hvf:kvm:tcg
-cpu max,-pdpe1gb
-smp 2
-m 6G
-device e1000,netdev=user.0,addr=0x03
-netdev user,id=user.0,hostfwd=tcp::2847-:22
-display none
-monitor none
-boot strict=off
-drive if=pflash,format=raw,unit=0,file=SHARE/uefi.fd,readonly=on
-device virtio-scsi-pci
-device scsi-hd,drive=drive0,bootindex=0
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
OPENBSD_ARM64 = """
qemu-system-aarch64
-nographic
-machine type=virt,accel=hvf:kvm:tcg
-cpu cortex-a57
-smp 2
-m 6G
-device virtio-net,netdev=user.0,addr=0x03
-netdev user,id=user.0,hostfwd=tcp::2847-:22
-display none
-monitor none
-boot strict=off
-bios SHARE/linaro_uefi.fd
-device virtio-scsi-pci
-device scsi-hd,drive=drive0,bootindex=0
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
NETBSD_X86_64 = """
qemu-system-x86_64
-nographic
-machine type=q35,accel=hvf:kvm:tcg
-cpu max
-smp 2
-m 6G
-device virtio-net,netdev=user.0,addr=0x03
-netdev user,id=user.0,hostfwd=tcp::2847-:22,ipv6=off
-display none
-monitor none
-boot strict=off
-bios SHARE/bios-256k.bin
-device virtio-scsi-pci
-device scsi-hd,drive=drive0,bootindex=0
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
NETBSD_ARM64 = """
qemu-system-aarch64
-nographic
-machine type=virt,accel=hvf:kvm:tcg
-cpu cortex-a57
-smp 2
-m 6G
-device virtio-net,netdev=user.0,addr=0x03
-netdev user,id=user.0,hostfwd=tcp::2847-:22,ipv6=off
-display none
-monitor none
-boot strict=off
-bios SHARE/uefi.fd
-device virtio-scsi-pci
-device scsi-hd,drive=drive0,bootindex=0
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
HAIKU_X86_64 = """
qemu-system-x86_64
-nographic
-machine type=q35,accel=hvf:kvm:tcg
-cpu max
-smp 2
-m 6G
-device e1000,netdev=user.0,addr=0x03
-netdev user,id=user.0,hostfwd=tcp::2847-:22,ipv6=off
-display none
-monitor none
-boot strict=off
-bios SHARE/bios-256k.bin
-device virtio-scsi-pci
-device scsi-hd,drive=drive0,bootindex=0
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
OMNIOS_X86_64 = """
qemu-system-x86_64
-nographic
-machine type=q35,accel=hvf:kvm:tcg
-cpu max
-smp 2
-m 6G
-device virtio-net,netdev=user.0,addr=0x03
-netdev user,id=user.0,hostfwd=tcp::2847-:22
-display none
-monitor none
-boot strict=off
-bios SHARE/bios-256k.bin
-device virtio-blk,drive=drive0,bootindex=0,addr=0x02
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
# The second drive of the user's first command lines, in the same bus as drive0. KEYS is the disk.
KEYS_VIRTIO = """
-device virtio-blk-pci,drive=drive1,bootindex=1
-drive if=none,file=KEYS,id=drive1,cache=unsafe,discard=ignore,format=raw
"""
KEYS_SCSI = """
-device scsi-hd,drive=drive1,bootindex=1
-drive if=none,file=KEYS,id=drive1,cache=unsafe,discard=ignore,format=raw
"""


class KeyDisk(NamedTuple):
  """The drive from which an image takes the key that may log in."""

  table: str
  start: int  # byte at which its FAT file system begins; above 0 that is an MBR's first partition
  until: str  # the image release from which on none is wanted; empty: all want it


class Guest(NamedTuple):
  """One OS on one CPU: its command line and what qvm must know of the image."""

  os: str
  arch: str  # as in the images' names: x86-64 or arm64
  title: str
  user: str  # who may log in over ssh
  console: bool  # whether the guest writes to its serial port
  power_off: str  # the command that ends it cleanly, for that user
  set_clock: str  # the command that sets its clock, for that user; in UTC, as strftime(3) fills it
  keys: Optional[KeyDisk]
  table: str


# From the images' release notes; OpenBSD asks for a password otherwise, the others know none.
FREEBSD_KEYS = KeyDisk(KEYS_VIRTIO, 1 << 20, "v0.14.0")
OPENBSD_KEYS = KeyDisk(KEYS_SCSI, 0, "")
NETBSD_KEYS = KeyDisk(KEYS_SCSI, 0, "v1.0.0")
HALT = "sudo shutdown -p now"
HALT_OMNIOS = "sudo shutdown -i5 -g0 -y"
DATE = "sudo date -u %Y%m%d%H%M.%S"  # date(1) of the BSDs
DATE_HAIKU = "date -u -s '%Y-%m-%d %H:%M:%S'"  # GNU's
DATE_OMNIOS = "sudo date -u %m%d%H%M%Y.%S"
GUESTS = (
  Guest("freebsd", "x86-64", "FreeBSD", "runner", True, HALT, DATE, FREEBSD_KEYS, FREEBSD_X86_64),
  Guest("freebsd", "arm64", "FreeBSD", "runner", True, HALT, DATE, FREEBSD_KEYS, FREEBSD_ARM64),
  Guest("openbsd", "x86-64", "OpenBSD", "runner", True, HALT, DATE, OPENBSD_KEYS, OPENBSD_X86_64),
  Guest("openbsd", "arm64", "OpenBSD", "runner", True, HALT, DATE, OPENBSD_KEYS, OPENBSD_ARM64),
  Guest("netbsd", "x86-64", "NetBSD", "runner", True, HALT, DATE, NETBSD_KEYS, NETBSD_X86_64),
  Guest("netbsd", "arm64", "NetBSD", "runner", True, HALT, DATE, NETBSD_KEYS, NETBSD_ARM64),
  Guest("haiku", "x86-64", "Haiku", "user", False, "shutdown -q", DATE_HAIKU, None, HAIKU_X86_64),
  Guest(
    "omnios", "x86-64", "OmniOS", "runner", True, HALT_OMNIOS, DATE_OMNIOS, None, OMNIOS_X86_64
  ),
)
OS_NAMES = tuple(dict.fromkeys(guest.os for guest in GUESTS))
ARCHES = {
  "x86-64": "x86-64",
  "x86_64": "x86-64",
  "amd64": "x86-64",
  "x64": "x86-64",
  "arm64": "arm64",
  "aarch64": "arm64",
}
QEMU_CPUS = {"x86-64": "x86_64", "arm64": "aarch64"}  # as in the names of QEMU's programs


def find_guest(os_name: str, arch: str) -> Guest:
  """The guest of that name on that CPU; UsageError says what there is."""
  mine = [guest for guest in GUESTS if guest.os == os_name]
  if not mine:
    raise UsageError("no such OS: '{}'; there are {}".format(os_name, ", ".join(OS_NAMES)))
  for guest in mine:
    if guest.arch == arch:
      return guest
  arches = ", ".join(guest.arch for guest in mine)
  raise UsageError(f"{mine[0].title} has no {arch} image, only {arches} (--platform)")


# ---- Command line -------------------------------------------------------------------------------

ACCELERATORS = ("hvf", "kvm", "tcg")
DIRECTIONS = ("both", "in", "out")
SSH_PORT = 2847
NAME_RE = r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}\Z"
VERSION_RE = r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,49}\Z"


class Address(NamedTuple):
  """Where the guest's ssh port appears on the host; with chosen=False the port may move up."""

  host: str = "127.0.0.1"
  port: int = SSH_PORT
  chosen: bool = False


class Options(NamedTuple):
  """What the command line says, checked."""

  command: str = ""
  operands: Tuple[str, ...] = ()
  platform: str = ""
  rm: bool = False
  warm: bool = False
  dry_run: bool = False
  name: str = ""
  memory: str = "6G"
  cpus: str = "2"
  ssh: Address = Address()
  accel: str = "hvf:kvm:tcg"
  qemu: str = ""
  qemu_args: Tuple[str, ...] = ()
  detach: bool = False
  stream: bool = False
  boot_timeout: float = 600.0
  console_log: str = ""
  guest_command: Tuple[str, ...] = ()
  env: Tuple[str, ...] = ()
  sync: str = ""
  sync_direction: str = "both"
  sync_exclude: Tuple[str, ...] = ()
  sync_delete: bool = False
  force: bool = False
  offline: bool = False
  progress: bool = False
  json: bool = False
  refresh: bool = False
  verify: bool = False
  mirror: str = ""
  all: bool = False
  help: bool = False
  version: bool = False


def parse_arch(text: str) -> str:
  """A CPU by any of its usual names."""
  arch = ARCHES.get(text.lower())
  if not arch:
    raise UsageError("no such CPU: '{}'; there are {}".format(text, ", ".join(ARCHES)))
  return arch


def parse_name(text: str) -> str:
  """An instance's name, which is also the name of its files."""
  if not re.match(NAME_RE, text):
    raise UsageError(
      f"bad instance name '{text}'; allowed are up to 100 letters, digits and . _ + ~ -, "
      "a letter or digit first"
    )
  return text


def parse_version(text: str) -> str:
  """A version, which becomes part of file names and URLs."""
  if not re.match(VERSION_RE, text):
    raise UsageError(
      f"bad version '{text}'; allowed are up to 50 letters, digits and . _ + ~ -, such as 15.1"
    )
  return text


def parse_memory(text: str) -> str:
  """A size as QEMU's -m takes it: a whole number of MiB, or with the suffix M, G or T."""
  match = re.match(r"([0-9]{1,9})([MGT]?)\Z", text.upper())
  factor = {"": 1, "M": 1, "G": 1024, "T": 1024 * 1024}
  if not match or not 64 <= int(match.group(1)) * factor[match.group(2)] <= 4 * 1024 * 1024:
    raise UsageError(f"bad memory size '{text}'; allowed are 64M to 4T, such as 512M or 6G")
  return match.group(1) + match.group(2)


def parse_cpus(text: str) -> str:
  """A number of virtual CPUs."""
  if not re.match(r"[0-9]{1,3}\Z", text) or not 1 <= int(text) <= 255:
    raise UsageError(f"bad number of CPUs '{text}'; allowed are 1 to 255")
  return str(int(text))


def parse_address(text: str) -> Address:
  """[ADDRESS:]PORT, with an IPv4 address of this host."""
  host, colon, port = text.rpartition(":")
  host = host if colon else Address().host
  numbers = host.split(".")
  good_host = len(numbers) == 4 and all(re.match(r"[0-9]{1,3}\Z", n) for n in numbers)
  good_port = re.match(r"[0-9]{1,5}\Z", port) and 1 <= int(port) <= 65535
  if not good_host or not good_port or any(int(n) > 255 for n in numbers):
    raise UsageError(
      f"bad ssh port '{text}'; allowed are 1 to 65535, with an IPv4 address of this host in front "
      "if it is not to be 127.0.0.1: 2847 or 0.0.0.0:2847"
    )
  return Address(".".join(str(int(n)) for n in numbers), int(port), True)


def parse_accel(text: str) -> str:
  """Accelerators in the order in which QEMU tries them."""
  words = text.lower().split(":")
  if not all(word in ACCELERATORS for word in words) or len(set(words)) < len(words):
    raise UsageError(
      f"bad accelerator '{text}'; allowed are hvf, kvm and tcg, several with ':' between"
    )
  return ":".join(words)


def find_program(name: str, folder: Optional[str] = None) -> str:
  """The absolute path of a program on PATH or in a folder; empty when there is none."""
  path = shutil.which(name, path=folder)
  return os.path.abspath(path) if path else ""


def parse_program(text: str) -> str:
  """A program by its path or by its name on PATH, as an absolute path."""
  path = find_program(text)
  if not path:
    raise UsageError(f"--qemu: there is no program '{text}' that can be executed")
  return path


def parse_seconds(text: str) -> float:
  """A time in seconds, at most a day."""
  if not re.match(r"[0-9]{1,5}(\.[0-9]{1,3})?\Z", text) or float(text) > 86400:
    raise UsageError(f"bad number of seconds '{text}'; allowed are 0 to 86400")
  return float(text)


def parse_variable(text: str) -> str:
  """NAME or NAME=VALUE of an environment variable."""
  if not re.match(r"[A-Za-z_][A-Za-z0-9_]*(=|\Z)", text):
    raise UsageError(f"bad variable '{text}'; it is NAME or NAME=VALUE, a letter or _ first")
  return text


def parse_folder(text: str) -> str:
  """A folder that is there and has a name, as an absolute path."""
  path = os.path.abspath(text)
  if not os.path.isdir(path):
    raise UsageError(f"--sync: there is no folder '{text}'")
  if not os.path.basename(path):
    raise UsageError("--sync: the root folder cannot be synchronised; name one below it")
  return path


def parse_direction(text: str) -> str:
  """Which way files go."""
  if text not in DIRECTIONS:
    raise UsageError(f"bad direction '{text}'; there are {', '.join(DIRECTIONS)}")
  return text


def parse_text(text: str) -> str:
  """Any words."""
  return text


class Option(NamedTuple):
  """One option: its spellings, the field of Options it sets, and how its value is read."""

  flags: Tuple[str, ...]
  field: str
  metavar: str  # empty: the option takes no value
  read: Callable[[str], Any]
  help: str
  many: bool = False


OPTIONS = (
  Option(("--platform",), "platform", "ARCH", parse_arch,
         "CPU of the guest: x86-64 or arm64 (default: the host's)"),
  Option(("--rm",), "rm", "", bool, "throw away what the guest wrote when it ends"),
  Option(("--warm",), "warm", "", bool,
         "start what is thrown away from a checkpoint of a booted guest,\n"
         "which the first such run makes"),
  Option(("--dry-run",), "dry_run", "", bool,
         "only print the QEMU command; download and change nothing"),
  Option(("--name",), "name", "NAME", parse_name,
         "name of the instance (default: OS-VERSION-ARCH)"),
  Option(("-m", "--memory"), "memory", "SIZE", parse_memory, "memory of the guest (default: 6G)"),
  Option(("--cpus",), "cpus", "N", parse_cpus, "number of virtual CPUs (default: 2)"),
  Option(("--ssh-port",), "ssh", "[ADDRESS:]PORT", parse_address,
         "where the guest's ssh port appears (default: 127.0.0.1:2847\nor the next free port)"),
  Option(("--accel",), "accel", "LIST", parse_accel,
         "accelerators to try in turn (default: hvf:kvm:tcg)"),
  Option(("--qemu",), "qemu", "PATH", parse_program,
         "use this qemu-system-… and the qemu-img beside it or on PATH"),
  Option(("--qemu-arg",), "qemu_args", "ARG", parse_text,
         "one more argument for QEMU; may be given several times", True),
  Option(("-d", "--detach"), "detach", "", bool,
         "run in the background, once ssh answers; see qvm list and qvm stop"),
  Option(("--stream",), "stream", "", bool,
         "boot while the image still comes: the guest runs before\nthe image's digest is checked"),
  Option(("--boot-timeout",), "boot_timeout", "SECONDS", parse_seconds,
         "how long to wait for ssh (default: 600)"),
  Option(("--console-log",), "console_log", "FILE", os.path.abspath,
         "append what the guest writes to its console to FILE"),
  Option(("-e", "--env"), "env", "NAME[=VALUE]", parse_variable,
         "hand a variable to the command, without VALUE as it is here;\nCI goes by itself", True),
  Option(("--sync",), "sync", "DIR", parse_folder,
         "copy DIR to ~/work in the guest, run the command there,\nand bring back what it changed"),
  Option(("--sync-direction",), "sync_direction", "WAY", parse_direction,
         "both, in (only to the guest) or out (only from it)"),
  Option(("--sync-exclude",), "sync_exclude", "PATTERN", parse_text,
         "leave out what has this name or, with a /, this path;\nmay be given several times; "
         ".git is always left out", True),
  Option(("--sync-delete",), "sync_delete", "", bool,
         "delete here what the command has deleted there"),
  Option(("--force",), "force", "", bool, "end what runs at once, without waiting for the guest"),
  Option(("--offline",), "offline", "", bool, "leave the network out"),
  Option(("--progress",), "progress", "", bool, "show how far the downloads are"),
  Option(("--refresh",), "refresh", "", bool,
         "replace what is cached by the newest release,\nunless an instance needs the old image"),
  Option(("--verify",), "verify", "", bool,
         "compare what is cached with the digests noted when it came,\nand with the release's"),
  Option(("--mirror",), "mirror", "DIR", os.path.abspath,
         "put the release's files into DIR, laid out as a mirror\nfor QVM_RELEASES_URL"),
  Option(("--all",), "all", "", bool, "also images that no instance needs, and QEMU"),
  Option(("--json",), "json", "", bool, "print JSON instead of a table"),
  Option(("-h", "--help"), "help", "", bool, "show this help"),
  Option(("--version",), "version", "", bool, "show the version of qvm"),
)  # fmt: skip
EVERYWHERE = ("help", "version")
IN_GUEST = ("env", "sync", "sync_direction", "sync_exclude", "sync_delete")


class Command(NamedTuple):
  """One command word: its operands, the options it knows, and its help."""

  operands: str
  least: int
  most: int
  fields: Tuple[str, ...]
  summary: str
  examples: Tuple[str, ...]


COMMANDS = {
  "run": Command(
    "OS [VERSION] [-- COMMAND [ARG...]]", 1, 2,
    ("platform", "rm", "warm", "dry_run", "name", "memory", "cpus", "ssh", "accel", "qemu",
     "qemu_args", "detach", "stream", "boot_timeout", "console_log", *IN_GUEST, "progress"),
    "Boot a guest in this terminal, or for one command; download first what is missing.",
    (
      "qvm run freebsd 15.1",
      "qvm run --rm freebsd 15.1 -- uname -a",
      "qvm run --rm --sync . freebsd 15.1 -- 'make && make test'",
      "qvm run --rm --warm freebsd 15.1 -- make test",
      "qvm run --rm --platform arm64 openbsd 7.9",
      "qvm run --name build -m 2G --cpus 4 --ssh-port 2222 omnios r151058",
      "qvm run --detach --name web freebsd 15.1",
      "qvm run --dry-run netbsd 10.1",
    ),
  ),
  "pull": Command(
    "OS [VERSION]", 1, 2,
    ("platform", "refresh", "verify", "mirror", "qemu", "progress"),
    "Download everything that `run` needs, so that it works offline.",
    (
      "qvm pull freebsd 15.1",
      "qvm pull --platform arm64 openbsd latest",
      "qvm pull --refresh netbsd 10.1",
      "qvm pull --verify freebsd 15.1",
      "qvm pull --mirror /srv/qvm freebsd 15.1",
    ),
  ),
  "search": Command(
    "[OS]", 0, 1, ("json",),
    "Show the versions that can be had, by CPU, with the release each comes from.",
    ("qvm search", "qvm search --json openbsd"),
  ),
  "list": Command(
    "", 0, 0, ("json",),
    "Show the instances: their state, address and size on disk.",
    ("qvm list", "qvm list --json"),
  ),
  "ssh": Command(
    "NAME [-- COMMAND [ARG...]]", 1, 1, ("boot_timeout", *IN_GUEST),
    "Run a command in a running instance, or without one a shell.",
    ("qvm ssh build", "qvm ssh build -- uname -a", "qvm ssh --sync . build -- make"),
  ),
  "stop": Command(
    "NAME...", 1, 1000, ("force",),
    "Power instances off: over ssh, else with SIGTERM, else with SIGKILL.",
    ("qvm stop freebsd-15.1-x86-64", "qvm stop --force build test"),
  ),
  "rm": Command(
    "NAME...", 1, 1000, ("force",),
    "Remove instances, with everything their guests wrote.",
    ("qvm rm freebsd-15.1-x86-64", "qvm rm --force build test"),
  ),
  "clean": Command(
    "", 0, 0, ("all", "dry_run"),
    "Delete what interrupted runs left; never an instance.",
    ("qvm clean", "qvm clean --all --dry-run"),
  ),
  "doctor": Command(
    "", 0, 0, ("offline", "json"),
    "Say what this host can and cannot do, and the fix for each fault.",
    ("qvm doctor", "qvm doctor --offline --json"),
  ),
  "config": Command(
    "print-path", 1, 1, (),
    "Print the folder in which qvm keeps everything.",
    ("qvm config print-path", 'du -sh "$(qvm config print-path)"'),
  ),
  "completion": Command(
    "bash|zsh|fish", 1, 1000, (),
    "Print a script with which the shell completes qvm's words.",
    ('eval "$(qvm completion bash)"', "qvm completion fish | source"),
  ),
}  # fmt: skip


def known_options(command: str) -> List[Option]:
  """The options that a command knows; without a command those that stand alone."""
  fields = EVERYWHERE + (COMMANDS[command].fields if command else ())
  return [option for option in OPTIONS if option.field in fields]


def parse_command_line(words: Sequence[str]) -> Options:
  """Read the arguments, options and operands in any order; UsageError for what is not allowed."""
  operands, given, rest = split_words(words)
  fields = {option.field for option, _ in given}
  form = COMMANDS.get(operands[0]) if operands else None
  for_guest = form and "COMMAND" in form.operands and len(operands) > form.least
  if not for_guest:
    operands += rest[1:]
  elif rest == ["--"]:
    raise UsageError("there is no command after the --")
  command = operands[0] if operands else ""
  if command and command not in COMMANDS:
    raise UsageError("no such command: '{}'; there are {}".format(command, ", ".join(COMMANDS)))
  if not command and not fields & set(EVERYWHERE):
    raise UsageError("no command given; there are {} (see qvm --help)".format(", ".join(COMMANDS)))
  known = known_options(command)
  for option, _ in given:
    if option not in known:
      raise unknown_option(option.flags[-1], command)
  if not fields & set(EVERYWHERE):
    check_operands(command, operands[1:])
  values: Dict[str, Any] = {"guest_command": tuple(rest[1:]) if for_guest else ()}
  for option, text in given:
    value = option.read(text) if option.metavar else True
    values[option.field] = values.get(option.field, ()) + (value,) if option.many else value
  options = Options(command, tuple(operands[1:]), **values)
  check_together(options, fields)
  return options


def check_together(options: Options, fields: Set[str]) -> None:
  """Refuse options that go with a command where there is none, or where it has no place."""
  if options.detach and options.guest_command:
    raise UsageError(
      "--detach and a command do not go together; qvm ssh NAME -- COMMAND runs it later"
    )
  if options.warm and not options.rm:
    raise UsageError("--warm goes with --rm: what starts from a checkpoint is thrown away")
  for option in OPTIONS:
    flag = option.flags[-1]
    if option.field in fields and option.field in IN_GUEST:
      if options.command == "run" and not options.guest_command:
        raise UsageError(f"{flag} goes with a command: qvm run {flag} … OS VERSION -- COMMAND")
      if option.field.startswith("sync_") and not options.sync:
        raise UsageError(f"{flag} goes with --sync DIR")
  if options.sync_delete and options.sync_direction == "in":
    raise UsageError("--sync-delete deletes nothing with --sync-direction in")


def split_words(words: Sequence[str]) -> Tuple[List[str], List[Tuple[Option, str]], List[str]]:
  """Part the operands, the options with their values, and what begins with the first `--`."""
  operands: List[str] = []
  given: List[Tuple[Option, str]] = []
  rest = list(words)
  while rest:
    if rest[0] == "--":
      break
    word = rest.pop(0)
    if not word.startswith("-") or word == "-":
      operands.append(word)
      continue
    flag, equals, value = word.partition("=") if word.startswith("--") else (word[:2], "", word[2:])
    option = next((o for o in OPTIONS if flag in o.flags), None)
    if not option:
      raise unknown_option(flag, next((o for o in operands if o in COMMANDS), ""))
    if not option.metavar and (equals or value):
      raise UsageError(f"{flag} takes no value (in '{word}')")
    if option.metavar and not equals and not value:
      if not rest:
        raise UsageError(f"{flag} needs a value: {flag} {option.metavar}")
      value = rest.pop(0)
    given.append((option, value))
  return operands, given, rest


def unknown_option(flag: str, command: str) -> UsageError:
  """The error for an option that the command does not know, with those that it knows."""
  flags = [f for option in known_options(command) for f in option.flags]
  near = difflib.get_close_matches(flag, flags, 1)
  return UsageError(
    "{} has no option {}{}; there are {}".format(
      "qvm " + command if command else "qvm without a command",
      flag,
      f" (did you mean {near[0]}?)" if near else "",
      " ".join(flags),
    )
  )


def check_operands(command: str, operands: Sequence[str]) -> None:
  """The number and the form of the words after the command word."""
  form = COMMANDS[command]
  usage = f"qvm {command} {form.operands}"
  if len(operands) < form.least:
    names = f" (OS: {', '.join(OS_NAMES)})" if "OS" in form.operands else ""
    raise UsageError(f"too few words; it is: {usage}{names}")
  if len(operands) > form.most:
    raise UsageError(f"'{operands[form.most]}' is one word too many; it is: {usage.strip()}")
  if command in ("run", "pull", "search") and operands:
    find_os(operands[0])
    for version in operands[1:]:
      parse_version(version)
  if command in ("rm", "stop", "ssh"):
    for name in operands:
      parse_name(name)
  if command == "config" and operands[0] != "print-path":
    raise UsageError(f"config knows only print-path, not '{operands[0]}'")
  if command == "completion" and operands[0] not in ("bash", "zsh", "fish", "words"):
    raise UsageError(f"no such shell: '{operands[0]}'; there are bash, zsh, fish")


def find_os(text: str) -> str:
  """The name of an OS, in any case."""
  if text.lower() not in OS_NAMES:
    raise UsageError("no such OS: '{}'; there are {}".format(text, ", ".join(OS_NAMES)))
  return text.lower()


COMMAND_HELP = [
  "",
  "A COMMAND with ARGs reaches the guest exactly, whatever characters they hold; one word alone is",
  "a line for the shell of the guest's user: -- 'cd /tmp && make'. Stdin, stdout, stderr and the",
  "exit code are passed on; 125 is a failure of qvm itself. At a terminal the command gets one,",
  "which Enter ~. leaves; elsewhere the first Ctrl-C goes to the command, a second one ends all.",
]


def help_text(command: str) -> str:
  """What --help prints, for one command or for all."""
  lines: List[str] = []
  if command:
    form = COMMANDS[command]
    lines += [(f"usage: qvm {command} [OPTIONS] {form.operands}").rstrip(), "", form.summary]
    if "OS" in form.operands:
      lines += ["OS is one of {}.".format(", ".join(OS_NAMES))]
    if "VERSION" in form.operands:
      lines += ["Without VERSION, or with `latest`, it is the newest there is for that CPU."]
    if "COMMAND" in form.operands:
      lines += COMMAND_HELP
  else:
    lines += ["usage: qvm COMMAND [OPTIONS] ...", ""]
    lines += ["Run FreeBSD, OpenBSD, NetBSD, Haiku and OmniOS in QEMU.", "", "commands:"]
    lines += [f"  {name:<8} {form.summary}" for name, form in COMMANDS.items()]
  lines += ["", "options:"]
  for option in known_options(command):
    left = "{} {}".format(", ".join(option.flags), option.metavar)
    for text in option.help.split("\n"):
      lines.append(f"  {left:<26} {text}")
      left = ""
  examples = COMMANDS[command].examples if command else (
    "qvm run freebsd 15.1", "qvm run --rm netbsd 10.1", "qvm run --help")  # fmt: skip
  return "\n".join(lines + ["", "examples:"] + ["  " + example for example in examples])


# ---- Plan ---------------------------------------------------------------------------------------

RELEASES_URL = "https://github.com/cross-platform-actions"
API_URL = "https://api.github.com/repos/cross-platform-actions"


class Host(NamedTuple):
  """The machine qvm runs on."""

  system: str  # as in the names of QEMU's archives: linux or macos
  arch: str


class Plan(NamedTuple):
  """Everything a run or a pull uses, by name and path."""

  guest: Guest
  version: str
  name: str
  ephemeral: bool
  cache: str
  qemu: str  # the program to run
  tree: str  # the downloaded QEMU of this guest CPU
  share: str  # its firmware
  qemu_img: str
  base: str
  disk: str
  image_asset: str
  bundle_asset: str
  qemu_asset: str
  tools_asset: str
  own_qemu: bool  # --qemu: qemu-img is the user's too
  refresh: bool  # replace what is cached by what is newest


def host_of(system: str, machine: str) -> Host:
  """The host from what uname(2) says; QvmError where qvm cannot work."""
  systems = {"Linux": "linux", "Darwin": "macos"}
  arch = ARCHES.get(machine.lower())
  if system not in systems or not arch:
    raise QvmError(
      f"this is {system} on {machine}; qvm works on Linux and macOS, on x86-64 and arm64"
    )
  return Host(systems[system], arch)


def check_host(host: Host, guest: Guest, own_qemu: str) -> None:
  """Refuse a host for which there is no QEMU to download, unless the user has one."""
  if own_qemu or host != Host("linux", "arm64"):
    return
  cpu = QEMU_CPUS[guest.arch]
  raise QvmError(
    "there is no QEMU to download for Linux on arm64",
    "install one (Debian: apt-get install qemu-system-{} qemu-utils) and add "
    "--qemu /usr/bin/qemu-system-{}".format({"x86_64": "x86", "aarch64": "arm"}[cpu], cpu),
  )


def check_own_qemu(guest: Guest, own_qemu: str) -> None:
  """Refuse a --qemu whose name says that it emulates another CPU."""
  found = re.match(r"qemu-system-([a-z0-9_]+)\Z", os.path.basename(own_qemu))
  cpu = QEMU_CPUS[guest.arch]
  if found and found.group(1) in QEMU_CPUS.values() and found.group(1) != cpu:
    raise UsageError(f"--qemu {own_qemu}: {guest.arch} guests want a qemu-system-{cpu}")


def image_repo(os_name: str) -> str:
  """The repository whose releases hold the images of an OS."""
  return os_name + "-builder"


def qemu_program(cache: str, cpu: str) -> str:
  """The downloaded QEMU's program for a guest CPU, in QEMU's spelling."""
  return os.path.join(cache, "qemu", cpu, "bin", "qemu-system-" + cpu)


def make_plan(options: Options, host: Host, cache: str, suffix: str) -> Plan:
  """Name everything that a run needs; suffix makes the name of a --rm overlay its own."""
  guest = find_guest(options.operands[0].lower(), options.platform or host.arch)
  version = parse_version(options.operands[1])
  check_host(host, guest, options.qemu)
  check_own_qemu(guest, options.qemu)
  stem = f"{guest.os}-{version}-{guest.arch}"
  name = options.name or (stem + "-rm-" + suffix if options.rm else stem)
  cpu = QEMU_CPUS[guest.arch]
  tree = os.path.join(cache, "qemu", cpu)
  return Plan(
    guest=guest,
    version=version,
    name=name,
    ephemeral=options.rm,
    cache=cache,
    qemu=options.qemu or qemu_program(cache, cpu),
    tree=tree,
    share=os.path.join(tree, "share", "qemu"),
    qemu_img=own_qemu_img(options.qemu) if options.qemu else os.path.join(cache, "bin", "qemu-img"),
    base=os.path.join(cache, "base", stem + ".qcow2"),
    disk=os.path.join(cache, "instances", name + ".qcow2"),
    image_asset=stem + ".qcow2",
    bundle_asset=stem + ".tar.zst",
    qemu_asset=f"qemu-system-{cpu}-{host.system}.tar",
    tools_asset=f"resources-{host.system}.tar",
    own_qemu=bool(options.qemu),
    refresh=options.refresh,
  )


class Files(NamedTuple):
  """The files of one instance, all in one folder and named after it."""

  folder: str
  name: str

  def path(self, suffix: str) -> str:
    return os.path.join(self.folder, self.name + suffix)

  @property
  def disk(self) -> str:
    return self.path(".qcow2")

  @property
  def record(self) -> str:
    return self.path(".json")

  @property
  def lock(self) -> str:
    return self.path(".lock")

  @property
  def console(self) -> str:
    return self.path(".console.log")

  @property
  def known_hosts(self) -> str:
    """The host keys of this guest, kept apart from the user's."""
    return self.path(".known_hosts")

  @property
  def keys(self) -> str:
    """The disk from which some guests take the key that may log in."""
    return self.path(".keys")

  @property
  def mark(self) -> str:
    """An empty file that says: throw the instance away once it does not run."""
    return self.path(".ephemeral")

  @property
  def memory(self) -> str:
    """Of a checkpoint: the guest's memory, as it was."""
    return self.path(".memory")

  @property
  def state(self) -> str:
    """Of a checkpoint: the state of the guest's devices, as QEMU wrote it."""
    return self.path(".state")


def instances_dir(cache: str) -> str:
  """The folder of the instances."""
  return os.path.join(cache, "instances")


def instance_files(cache: str, name: str) -> Files:
  """The files of the instance of that name."""
  return Files(instances_dir(cache), name)


def checkpoint_files(cache: str, name: str) -> Files:
  """The files of the checkpoint of that name."""
  return Files(os.path.join(cache, "warm"), name)


def downloads_dir(plan: Plan) -> str:
  """Where unfinished files lie."""
  return os.path.join(plan.cache, "downloads")


def tree_program(plan: Plan) -> str:
  """The downloaded QEMU's program, whether or not it is the one that runs."""
  return qemu_program(plan.cache, QEMU_CPUS[plan.guest.arch])


def key_path(cache: str) -> str:
  """The private key with which qvm logs in where one is wanted; .pub beside it is the public."""
  return os.path.join(cache, "ssh", "id_ed25519")


# ---- Files, locks, programs ---------------------------------------------------------------------

CHUNK_BYTES = 1 << 18  # bytes that are read or written at a time
TERM_GRACE_SECONDS = 10.0  # seconds that QEMU has to end after SIGTERM
POLL_SECONDS = 0.5  # seconds a thread waits at a time: a signal just before does not wake it
OTHER_CACHE = "QVM_CACHE_DIR can name another folder"


def cache_folder(environ: Mapping[str, str]) -> str:
  """The folder qvm keeps everything in; a relative XDG_CACHE_HOME is ignored, as its spec says."""
  if environ.get("QVM_CACHE_DIR"):
    return os.path.abspath(environ["QVM_CACHE_DIR"])
  xdg = environ.get("XDG_CACHE_HOME", "")
  home = os.path.expanduser("~")
  if not os.path.isabs(xdg) and home == "~":
    raise QvmError("this user has no home folder", "set QVM_CACHE_DIR to a folder for qvm")
  return os.path.abspath(os.path.join(xdg if os.path.isabs(xdg) else home + "/.cache", "qvm"))


def read_json(path: str) -> Dict[str, Any]:
  """The object in a JSON file; empty when there is none, or no sound one."""
  try:
    with open(path, "rb") as file:
      value = json.loads(file.read(1 << 20).decode("utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def write_text(path: str, text: str, mode: int = 0o644) -> None:
  """Write a file so that it is there whole or not at all."""
  remove_file(path + ".tmp")
  with open(path + ".tmp", "w", encoding="utf-8") as file:
    file.write(text)
  os.chmod(path + ".tmp", mode)
  os.replace(path + ".tmp", path)


def write_json(path: str, value: Dict[str, Any], mode: int = 0o644) -> None:
  """Write a JSON file."""
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n", mode)


def new_sha256() -> Any:
  """A fresh SHA-256."""
  return hashlib.sha256()


def file_sha256(path: str) -> str:
  """The SHA-256 of a file, in hexadecimal."""
  digest = new_sha256()
  with open(path, "rb") as file:
    for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
      digest.update(chunk)
  return str(digest.hexdigest())


def tree_sha256(root: str) -> str:
  """One SHA-256 for all files below a folder and their names, but for its release.json."""
  digest = new_sha256()
  for folder, folders, names in os.walk(root):
    folders.sort()
    for path in sorted(os.path.join(folder, name) for name in names if name != "release.json"):
      digest.update(os.fsencode(os.path.relpath(path, root)) + b"\0")
      digest.update(file_sha256(path).encode() if os.path.isfile(path) else b"")
  return str(digest.hexdigest())


def hashed(name: str) -> str:
  """A short name that stands for one of any length."""
  digest = new_sha256()
  digest.update(os.fsencode(name))
  return str(digest.hexdigest()[:16])


def names_in(cache: str, folder: str) -> List[str]:
  """The names in one of the cache's folders, sorted; none when it is not there."""
  try:
    return sorted(os.listdir(os.path.join(cache, folder)))
  except (FileNotFoundError, NotADirectoryError):
    return []


def paths_in(cache: str, folder: str) -> List[str]:
  """The paths in one of the cache's folders."""
  return [os.path.join(cache, folder, name) for name in names_in(cache, folder)]


def instance_names(cache: str, suffix: str) -> List[str]:
  """The names of the instances that have a file with this suffix, in the order of the files."""
  names = [name for name in names_in(cache, "instances") if name.endswith(suffix)]
  return [name[: -len(suffix)] for name in names]


def checkpoints(cache: str) -> List[Files]:
  """The checkpoints there are; what has no record is none."""
  names = [name for name in names_in(cache, "warm") if name.endswith(".json")]
  return [checkpoint_files(cache, name[: -len(".json")]) for name in names]


def tree_size(path: str) -> int:
  """The bytes that a file, or a folder with all in it, takes on the disk."""
  folders = [] if os.path.islink(path) else os.walk(path)
  inside = [os.path.join(folder, name) for folder, _, names in folders for name in names]
  return sum(os.lstat(p).st_blocks * 512 for p in [path, *inside])


def free_space(folder: str) -> int:
  """The bytes that may still be written to a folder's file system."""
  stat = os.statvfs(folder)
  return stat.f_bavail * stat.f_frsize


def write_failure(path: str, wanted: int, error: OSError) -> QvmError:
  """The error for a file or folder that was to take `wanted` bytes and cannot be written."""
  if error.errno not in (errno.ENOSPC, errno.EDQUOT):
    return QvmError(f"{path}: {describe(error)}")
  there = tree_size(path) if os.path.lexists(path) else 0
  return disk_full(path, wanted - there - free_space(os.path.dirname(path)))


def disk_full(path: str, missing: int) -> QvmError:
  """The error for a disk without room, with the bytes that are missing."""
  return QvmError(
    f"the disk is full: {path} takes {megabytes(max(missing, 1))} more than there is",
    "free some space (qvm clean --all --dry-run shows what can go) and try again: "
    "what is there is kept",
  )


def disk_is_full(path: str) -> bool:
  """Whether a write there fails; QEMU then stops the guest without a word (werror=enospc)."""
  with contextlib.suppress(OSError):
    return free_space(path) < 128 << 10  # less than two of qcow2's clusters
  return False


def remove_file(path: str) -> None:
  """Remove a file if it is there."""
  with contextlib.suppress(FileNotFoundError):
    os.unlink(path)


def remove_tree(path: str) -> None:
  """Remove a folder if it is there, read-only parts included."""
  if os.path.islink(path) or os.path.isfile(path):
    return remove_file(path)
  if os.path.isdir(path):
    try:
      shutil.rmtree(path)
    except OSError as error:  # which names the last part of the path alone
      raise OSError(error.errno, error.strerror, path)


def move_into_place(source: str, target: str, mode: int) -> None:
  """Give a complete and checked file its place, on the disk before its name is."""
  with open(source, "rb") as file:
    os.fsync(file.fileno())
  os.chmod(source, mode)
  os.replace(source, target)


FOLDERS = ("", "base", "bin", "qemu", "instances", "downloads", "ssh", "code", "warm")


def make_folders(cache: str) -> None:
  """Make the cache and its folders, for this user only."""
  path = os.path.dirname(cache)
  try:
    os.makedirs(path, exist_ok=True)
    for name in FOLDERS:
      path = os.path.join(cache, name) if name else cache
      with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
      if not os.path.isdir(path):
        raise QvmError(f"{path} is in the way: it is not a folder")
      if path == cache or os.stat(cache).st_mode & 0o011:  # else nobody gets in there
        check_owner(path, cache)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise QvmError(f"{error.filename or path} cannot be made: {describe(error)}", OTHER_CACHE)
  drop_older_downloads(os.path.join(cache, "downloads"))
  keep_code()


OLDER_DOWNLOAD_RE = r"(.+\.(?:qcow2|tar|tar\.zst))\.(?:part|json|map|lock|tmp|json\.tmp)\Z"


def older_downloads(folder: str) -> List[str]:
  """The flat files that an older qvm left in downloads/, but for those that one works on."""
  found = []
  for path in paths_in(folder, ""):
    match = re.match(OLDER_DOWNLOAD_RE, path)
    if match and not is_locked(re.sub(r"\.tar\.zst\Z", ".qcow2", match.group(1)) + ".lock"):
      found.append(path)
  return found


def drop_older_downloads(folder: str) -> None:
  """Remove what an older qvm has downloaded in part: it cannot be gone on with."""
  with contextlib.ExitStack() as stack:
    if older_downloads(folder) and downloads_idle(folder, stack):  # older ones lock it as well
      for path in older_downloads(folder):
        remove_tree(path)
      say(f"what an older qvm left unfinished in {folder} is dropped, and fetched anew")


def check_owner(path: str, cache: str) -> None:
  """Refuse a folder of the cache that others can change, as ssh does: what is in it gets executed.

  Root need not be feared: it can change everything anyway. In a cache of one's own, folders that
  belong to another come from a copy that root has made of it.
  """
  stat = os.stat(path)
  if path == cache and stat.st_uid not in (0, os.getuid()):
    raise QvmError(
      f"{path} belongs to another user (number {stat.st_uid}), and what is in it gets executed",
      f"if you trust it: sudo chown -R $(id -u) {path}; or {OTHER_CACHE}",
    )
  if stat.st_mode & 0o022:
    raise QvmError(
      f"{path} can be written by other users, and what is in it gets executed",
      f"chmod go-w {path}; or {OTHER_CACHE}",
    )


packed_code: Tuple[str, Any] = ("", None)  # set by qvm.pyz: where to keep its compiled code, and it


def keep_code() -> None:
  """Keep the compiled code of qvm.pyz, so that the next start need not compile it again."""
  path, code = packed_code
  if path and not os.path.exists(path):
    with contextlib.suppress(OSError):  # it goes without
      with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(marshal.dumps(code))
      os.replace(file.name, path)


def lock_file(fd: int, path: str, how: int) -> None:
  """Take a lock on an open file or folder; BlockingIOError with LOCK_NB when another has it."""
  try:
    fcntl.flock(fd, how)
  except BlockingIOError:
    raise
  except OSError as error:
    raise QvmError(
      f"{path} cannot be locked: {describe(error)}",
      f"its file system has no locks as qvm needs them; {OTHER_CACHE}, on a local disk",
    )


def try_lock(
  path: str, wait: Callable[[], bool], flags: int = os.O_RDWR | os.O_CREAT
) -> Optional[int]:
  """A descriptor that holds the lock on a file, or None when another process holds it.

  The lock lasts until the last process that inherited the descriptor has ended. wait is asked
  when the lock is held elsewhere: whether to wait for it. A lock file may be unlinked by its
  holder, so what was locked must still be what the path names. With flags that do not create,
  it may be a folder, and FileNotFoundError says that it is gone.
  """
  while True:
    fd = os.open(path, flags, 0o600)
    try:
      try:
        lock_file(fd, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if not wait():
          os.close(fd)
          return None
        lock_file(fd, path, fcntl.LOCK_EX)
      here, there = os.fstat(fd), os.stat(path)
      if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
        return fd
    except FileNotFoundError:
      pass
    except BaseException:
      os.close(fd)
      raise
    os.close(fd)


def drop_lock(fd: int, path: str) -> None:
  """Remove the lock file while the lock is still held, then let go of it."""
  remove_file(path)
  os.close(fd)


def is_locked(path: str) -> bool:
  """Whether a process holds the lock on a file; for an instance's lock within the gate only."""
  try:
    fd = os.open(path, os.O_RDONLY)
  except FileNotFoundError:
    return False
  try:
    lock_file(fd, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return False
  except BlockingIOError:
    return True
  finally:
    os.close(fd)


@contextlib.contextmanager
def instances_lock(folder: str) -> Iterator[None]:
  """Let one process at a time look at or take the locks of instances.

  Whether an instance runs is told by trying its lock; without the gate, two that try at once
  would each believe that the other is a running QEMU. The lock is on the folder itself.
  """
  fd = os.open(folder, os.O_RDONLY)
  try:
    lock_file(fd, folder, fcntl.LOCK_EX)
    yield
  finally:
    os.close(fd)


def downloads_idle(folder: str, stack: contextlib.ExitStack) -> bool:
  """Whether no qvm downloads into a folder; if so, those that want to wait for the stack."""
  fd = os.open(folder, os.O_RDONLY)
  stack.callback(os.close, fd)
  try:
    lock_file(fd, folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def own_qemu_img(own_qemu: str) -> str:
  """The qemu-img beside the user's own QEMU, else the one on PATH."""
  found = find_program("qemu-img", os.path.dirname(own_qemu)) or find_program("qemu-img")
  if not found:
    raise QvmError(
      f"there is no qemu-img beside {own_qemu} or on PATH",
      "install it (Debian: apt-get install qemu-utils) or leave --qemu out",
    )
  return found


def start(command: Sequence[str], keep: Sequence[int] = (), **streams: Any) -> Any:
  """Start a program; the only function that does. QvmError explains why it cannot run."""
  try:
    return subprocess.Popen(list(command), pass_fds=tuple(keep), **streams)
  except OSError as error:
    raise cannot_run(command[0], error)


def cannot_run(program: str, error: OSError) -> QvmError:
  """Why the system does not execute a program."""
  EBADARCH = 86  # macOS: "Bad CPU type in executable"
  message = f"{program} cannot be executed: {describe(error)}"
  if error.errno == EBADARCH or (sys.platform == "darwin" and error.errno == errno.ENOEXEC):
    return QvmError(
      message,
      "the downloaded QEMU is built for Intel: install Rosetta (softwareupdate --install-rosetta) "
      "or add --qemu with a QEMU of your own, such as Homebrew's",
    )
  if error.errno == errno.ENOEXEC:
    return QvmError(
      message, "it is built for another CPU; add --qemu with one made for this machine"
    )
  if error.errno == errno.EACCES:
    return QvmError(
      message,
      "is its file system mounted noexec? QVM_CACHE_DIR can name a folder on another one",
    )
  if error.errno == errno.ENOENT and os.path.exists(program):
    return QvmError(message, "its loader or interpreter is missing on this system")
  return QvmError(message)


def run_program(command: Sequence[str], keep: Sequence[int] = ()) -> None:
  """Run a helper such as qemu-img to its end; QvmError with its words when it fails."""
  with signals.hold():
    process = start(
      command, keep, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = process.communicate()[0].decode("utf-8", "replace").strip()
  if process.returncode:
    raise QvmError(
      "{} failed ({}): {}".format(command[0], ending(process.returncode), " ".join(output.split()))
    )


def end_process(process: Any) -> None:
  """Make sure that a process has ended."""
  if process.poll() is None:
    process.terminate()
    try:
      process.wait(TERM_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def ask_program(command: Sequence[str], text: str = "") -> Tuple[int, str]:
  """The exit code and the words of a program that answers a question within 10 seconds."""
  try:
    pipe = subprocess.PIPE
    process = start(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
  except QvmError as error:
    return 127, f"{error}; {error.hint}"
  try:
    words = process.communicate(text.encode(), timeout=10)[0].decode("utf-8", "replace")
  except subprocess.TimeoutExpired:
    return 124, "no answer in 10 s"
  finally:
    end_process(process)
  return int(process.returncode), " ".join(words.split()) or ending(process.returncode)


def this_host() -> Host:
  """The host qvm runs on."""
  uname = os.uname()
  return host_of(uname.sysname, uname.machine)


def available_memory(meminfo: str) -> Optional[int]:
  """The bytes of memory that programs can still get; all there is where nobody tells."""
  with contextlib.suppress(OSError, ValueError, IndexError):
    with open(meminfo) as file:
      line = next((line for line in file if line.startswith("MemAvailable:")), "")
    return int(line.split()[1]) << 10
  with contextlib.suppress(OSError, ValueError):
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return None


class Future:
  """A call that goes on in a thread of its own; result() waits for it and raises its error."""

  def __init__(
    self, function: Callable[[], Any], then: Callable[[], object] = lambda: None
  ) -> None:
    self.function, self.then = function, then
    self.value: Any = None
    self.error: Optional[BaseException] = None
    self.done = False
    self.thread = threading.Thread(target=self.work, daemon=True)
    self.thread.start()

  def work(self) -> None:
    try:
      self.value = self.function()
    except BaseException as error:  # raised by result(), in the thread that wants it
      self.error = error
    self.done = True
    self.then()

  def result(self) -> Any:
    while self.thread.is_alive():
      self.thread.join(POLL_SECONDS)
    if self.error:
      raise self.error
    return self.value


# ---- HTTP ---------------------------------------------------------------------------------------

ATTEMPTS = 5  # in a row without progress; the pauses add up to 15 s, as long as a router restarts
PROGRESS_BYTES = 1 << 20  # an attempt that brings so many bytes is progress: the count starts anew
MAX_RETRY_AFTER_SECONDS = 60.0  # of a Retry-After: a server that names more may not mean it
MAX_RELEASE_DATA_BYTES = 8 << 20  # 100 releases of the largest repository are 2 MB
FAMILY_SECONDS = 3.0  # for an address while others are left: its first packet may be lost twice
URL_RE = (
  r"(https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[!-~]*)?|file://(/[!-~]*)?)\Z"
)
QUOTA_HINT = "GITHUB_TOKEN raises it from 60 to 5,000 requests an hour"
RETRY_CODES = (408, 425, 429, 500, 502, 503, 504)
NO_SUCH_RANGE = 416
T = TypeVar("T")


class Net(NamedTuple):
  """How to reach the release server."""

  releases: str  # the address above the repositories, without a slash at the end
  api: str  # the same of GitHub's API; empty: there is none, as with a mirror
  token: str  # for the API only
  timeout: float  # seconds for a connection, and for the next bytes to arrive
  retry_delay: float  # seconds before the first retry
  attempts: int  # in a row without progress
  cancelled: threading.Event  # set when nobody wants the result any more


class Transient(Exception):
  """A failure that a retry may fix; wait is what the server asks for, in seconds."""

  def __init__(self, message: str, wait: Optional[float] = None, code: int = 0) -> None:
    super().__init__(message)
    self.wait = wait
    self.code = code  # the HTTP status, if there was one


class Cancelled(Exception):
  """Nobody wants the result any more, or another thread fetches it."""


class NotFound(QvmError):
  """The server says that there is no such thing."""


def net_from(environ: Mapping[str, str]) -> Net:
  """Read the addresses and times from the environment; UsageError for bad ones."""
  releases = (environ.get("QVM_RELEASES_URL") or RELEASES_URL).rstrip("/")
  api = environ.get("QVM_API_URL") or (API_URL if releases == RELEASES_URL else "")
  for name, url in (("QVM_RELEASES_URL", releases), ("QVM_API_URL", api)):
    if url and not re.match(URL_RE, url):
      raise UsageError(
        f"{name}: '{redacted(url)}' is no http://HOST, https://HOST or file:/// address"
      )
  token = (environ.get("GITHUB_TOKEN") or environ.get("GH_TOKEN") or "").strip()
  if not re.match(r"[!-~]*\Z", token):
    raise UsageError("GITHUB_TOKEN or GH_TOKEN: the token has characters that no token has")
  return Net(
    releases,
    api.rstrip("/"),
    token,
    seconds_from(environ, "QVM_TIMEOUT", 30.0, 0.1),
    seconds_from(environ, "QVM_RETRY_DELAY", 1.0, 0.0),
    ATTEMPTS,
    threading.Event(),
  )


def seconds_from(environ: Mapping[str, str], name: str, default: float, least: float) -> float:
  """A time in seconds from the environment, at most an hour."""
  text = environ.get(name) or str(default)
  if not re.match(r"[0-9]{1,4}(\.[0-9]{1,6})?\Z", text) or not least <= float(text) <= 3600:
    raise UsageError(f"{name}: '{text}' is not a number of seconds from {least:g} to 3600")
  return float(text)


def impatient(net: Net) -> Net:
  """For requests that qvm can do without: a short time, few attempts."""
  return net._replace(timeout=min(net.timeout, 10.0), attempts=2)


def redirect_handler(stop: str) -> "urllib.request.HTTPRedirectHandler":
  """A redirect handler for urllib that never leaves https and strips proxy credentials.

  It does not follow a redirect to an address that contains stop: open_url returns that one.
  """

  class Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 10
    max_repeats = 3
    inf_msg = "redirect loop: "

    def redirect_request(
      self,
      req: urllib.request.Request,
      fp: IO[bytes],
      code: int,
      msg: str,
      headers: http.client.HTTPMessage,
      newurl: str,
    ) -> Optional[urllib.request.Request]:
      old, new = (urllib.parse.urlsplit(url).scheme.lower() for url in (req.full_url, newurl))
      if new != old and new != "https":
        raise QvmError(
          f"{redacted(req.full_url)} redirects from {old} to {redacted(newurl)}, which is not safe"
        )
      if stop and stop in newurl:
        return None
      fp.close()  # or else urllib reads the whole body, however long
      return urllib.request.Request(
        newurl,
        headers={k: v for k, v in req.headers.items() if k.lower() != "proxy-authorization"},
        method=req.get_method(),
        origin_req_host=req.origin_req_host,
        unverifiable=True,
      )

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302

  return Redirects()


silent_addresses: Set[Any] = set()  # those that let FAMILY_SECONDS pass: they are tried last


def connect(
  host_port: Tuple[str, int], timeout: float, source: Optional[Tuple[str, int]] = None
) -> "socket.socket":
  """A connection to the first of a host's addresses that answers, IPv6 and IPv4 in turn.

  As in RFC 8305, but one after the other. socket.create_connection gives each address the whole
  time, so that an IPv6 that leads nowhere uses it up before IPv4 gets its turn.
  """
  found = socket.getaddrinfo(*host_port, 0, socket.SOCK_STREAM)
  turns = sorted(
    found,
    key=lambda info: (
      info[4] in silent_addresses,
      [each for each in found if each[0] == info[0]].index(info),
    ),
  )
  error: OSError = socket.timeout("timed out")
  while turns:
    family, kind, protocol, _, address = turns.pop(0)
    with contextlib.ExitStack() as stack:
      try:
        link = stack.enter_context(socket.socket(family, kind, protocol))
        link.settimeout(min(timeout, FAMILY_SECONDS) if turns else timeout)
        link.connect(address)
      except OSError as failure:  # such as no route to any IPv6
        error = failure
        if isinstance(failure, socket.timeout):
          silent_addresses.add(address)
        continue
      link.settimeout(timeout)
      stack.pop_all()
      return link
  raise error


def with_connect(kind: "Type[http.client.HTTPConnection]") -> Callable[..., Any]:
  """What makes connections of a kind that use connect()."""

  def make(*args: Any, **more: Any) -> http.client.HTTPConnection:
    link: Any = kind(*args, **more)
    link._create_connection = connect  # where http.client of Python 3.6 to 3.14 looks for it
    return link  # type: ignore[no-any-return]

  return make


def connection_handlers() -> "List[urllib.request.BaseHandler]":
  """Handlers for urllib whose connections use connect()."""

  def do_open(handler: Any, kind: Any, request: Any, **more: Any) -> Any:
    return urllib.request.AbstractHTTPHandler.do_open(handler, with_connect(kind), request, **more)

  kinds = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
  return [type(kind.__name__, (kind,), {"do_open": do_open})() for kind in kinds]


def open_url(
  net: Net, url: str, headers: Optional[Dict[str, str]] = None, stop: str = ""
) -> "http.client.HTTPResponse":
  """Request a URL and return the open response; only Connections.open_address goes another way.

  Raises Transient for what may pass (no connection, 5xx, 429, …), QvmError for what will not.
  With stop, a redirect to an address that contains it is returned instead of followed.
  """
  request = urllib.request.Request(url, headers=dict(headers or {}))
  request.add_header("User-Agent", "qvm/" + __version__)
  request.add_header("Accept-Encoding", "identity")
  if net.token and net.api and url.startswith(net.api + "/"):
    request.add_unredirected_header("Authorization", "Bearer " + net.token)
  response: Any  # of a file:/// URL it is another class with the same methods
  try:
    opener = urllib.request.build_opener(redirect_handler(stop), *connection_handlers())
    response = opener.open(request, timeout=net.timeout)
  except urllib.error.HTTPError as error:
    if 300 <= error.code < 400 and stop and stop in error.headers.get("Location", ""):
      response = error
      return response  # type: ignore[no-any-return]
    error.close()
    raise http_failure(url, error)
  except QvmError:
    raise
  except Exception as error:
    raise connection_failure(url, error)
  encoding = response.headers.get("Content-Encoding") or "identity"
  if encoding.lower() != "identity":
    response.close()
    raise QvmError(f"{redacted(url)}: the answer comes as {encoding}, which was not asked for")
  return response  # type: ignore[no-any-return]


def http_failure(url: str, error: "urllib.error.HTTPError") -> Exception:
  """What an HTTP status that is no success means."""
  code, final = error.code, error.geturl() or url
  if 300 <= code < 400:
    if "location" not in error.headers:  # the connection may have ended before it came
      return Transient(f"{redacted(url)}: a redirect that leads nowhere")
    return QvmError(f"{redacted(url)}: bad redirect: {error.msg}")
  message = f"{redacted(final)} answers {code} {error.msg}"
  if error.headers.get("x-ratelimit-remaining") == "0":
    return QvmError(f"{message}: the quota of GitHub's API is used up", QUOTA_HINT)
  expired = code == 403 and redacted(final) != redacted(url)  # a signed address: ask for a new one
  if code in RETRY_CODES or expired or code == NO_SUCH_RANGE:
    return Transient(message, retry_after(error.headers.get("Retry-After")), code)
  return NotFound(message) if code in (404, 410) else QvmError(message, proxy_used(url))


def retry_after(text: Optional[str]) -> Optional[float]:
  """The seconds that a Retry-After header asks for (a number or an HTTP date), at most 60."""
  if not text:
    return None
  if re.match(r"[0-9]{1,9}\Z", text.strip()):
    return min(float(text), MAX_RETRY_AFTER_SECONDS)
  try:
    wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
  except (TypeError, ValueError, OverflowError, IndexError):
    return None
  return max(0.0, min(wait, MAX_RETRY_AFTER_SECONDS))


def connection_failure(url: str, error: Exception) -> Exception:
  """What an exception from urllib or http.client means, with the fix where one is known."""
  reason = getattr(error, "reason", None)
  cause = reason if isinstance(reason, Exception) else error
  if isinstance(cause, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(cause):
    return QvmError(
      f"{redacted(url)}: its certificate cannot be verified: {cause}",
      "python.org's Python on macOS: run 'Install Certificates.command' once; behind a company's "
      "proxy: set SSL_CERT_FILE to the file with its certificates",
    )
  if url.startswith("file:") and isinstance(cause, OSError):
    return NotFound(f"{redacted(url)}: {describe(cause)}")
  if isinstance(cause, socket.timeout):
    return Transient(f"{redacted(url)}: no answer in time")
  if isinstance(cause, (OSError, http.client.HTTPException)):
    return Transient(f"{redacted(url)}: {describe(cause)}")
  return QvmError(f"{redacted(url)}: {describe(cause)}")


def proxy_used(url: str) -> str:
  """Names the proxy that a request goes through; empty when there is none."""
  parts = urllib.parse.urlsplit(url)
  proxy = urllib.request.getproxies().get(parts.scheme)
  if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
    return ""
  return f"the request goes through the proxy {proxy_name(proxy)} ({parts.scheme}_proxy)"


def proxy_name(proxy: str) -> str:
  """Host and port of a proxy, never what may be a password."""
  match = re.match(r"(.*@|[a-z0-9]*:?//)?([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(:[0-9]+)?/*\Z", proxy)
  return f"{match.group(2)}{match.group(3) or ''}" if match else "(an address that is not one)"


def with_retries(net: Net, url: str, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
  """Call attempt until it raises no Transient; net.attempts in a row without progress fail.

  progress tells how many bytes there are. The pauses double each time and are spread at random,
  so that a fleet of runners does not come back all at once.
  """
  left, reached = net.attempts, progress()
  while True:
    try:
      return attempt()
    except Transient as error:
      if progress() >= reached + PROGRESS_BYTES:
        left, reached = net.attempts, progress()
      left -= 1
      if not left:
        raise QvmError(
          f"{error} ({net.attempts} attempts)" if net.attempts > 1 else str(error),
          proxy_used(url) or "is the network up? what has been downloaded is kept, try again",
        )
      pause = error.wait
      if pause is None:
        pause = net.retry_delay * 2 ** (net.attempts - 1 - left) * random.uniform(0.75, 1.25)
      say(f"{error}; trying again in {pause:.1f} s")
      if net.cancelled.wait(pause):
        raise Cancelled()


def fetch_bytes(net: Net, url: str, stop: str = "") -> Tuple[bytes, str]:
  """One attempt at a small answer: its body, and its Location where a redirect was asked for."""
  with open_url(net, url, stop=stop) as response:
    location = response.headers.get("Location") or ""
    if stop and stop in location:
      return b"", location
    try:
      body = response.read(MAX_RELEASE_DATA_BYTES + 1)
    except Exception as error:
      raise connection_failure(url, error)
  if len(body) > MAX_RELEASE_DATA_BYTES:
    raise QvmError(f"{redacted(url)}: the answer is larger than any release data")
  return body, ""


def get_page(net: Net, url: str) -> str:
  """The text of a page, with retries."""
  body = with_retries(net, url, lambda: fetch_bytes(net, url)[0], lambda: 0)
  return body.decode("utf-8", "replace")


def check_exists(net: Net, url: str) -> None:
  """NotFound unless a URL can be fetched, asked by fetching its first byte."""
  with_retries(net, url, lambda: open_url(net, url, {"Range": "bytes=0-0"}).close(), lambda: 0)


def looks_like_html(head: bytes) -> bool:
  """Whether the first bytes of a file are those of a web page."""
  start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
  return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--"))


# ---- Download -----------------------------------------------------------------------------------
# A download works in a folder of its own, downloads/NAME/: `part` holds the bytes, `map` a byte
# for each block (1: it is in part), `note.json` the URL, the validator and the length. A body of
# unknown length has no blocks, and starts anew after every failure.
#
# A kill at any moment leaves a state that is right: the note is written before the map, the map
# before the first byte, and a block is marked only after it has been written. A file moves to its
# place before its map and note go. Without a part, a map and a note that fit, all starts anew.
#
# Locks between processes, in the order in which they are taken: downloads/ (shared; `clean --all`
# wants it alone), downloads/NAME (an image's may wait for qemu-img's), then instances/. Locks
# between threads, in order: PartFile.hashing, PartFile.lock, Connections.lock. close() and
# discard() take the first two, so nobody calls them while holding `lock`, and nobody waits for
# the network while holding any.
#
# Threads: the lead runs fetch(); it alone may start the file over, until readers depend on the
# object. Helpers join a lead that is slow. A reader's wait_for() sends a thread of its own for
# what no connection is about to bring. Whatever a thread fetches is a Span that it has claimed.
# Others may cut it, down to nothing, and what still arrives behind its end is dropped; one that is
# not in PartFile.spans any more is dead.

BLOCK_BYTES = 1 << 16  # qcow2's cluster, which is what QEMU reads at a time; 8 kB of map for 500 MB
MISSING, THERE, COMING = 0, 1, 2  # states of a block; COMING is never written to the map
UNKNOWN = 1 << 62  # the end of a file whose length is not known
HELPERS = 3  # beside the lead: 256 MB at 20 MB/s a connection take 0.34 of one connection's time
SLOW_RATE = 50e6  # bytes a second; at that an image takes 8 s, of which helpers would save few
SLOW_AFTER_SECONDS = 1.0  # before that TCP may not have found the rate of the line
PARALLEL_MIN_BYTES = 32 << 20  # less is there before further connections have gathered speed
MIN_SPLIT_BLOCKS = 8  # half of it, 256 KiB, is one read: less is not worth a request
STALL_SECONDS = 5.0  # a connection that is silent for longer loses its span, before the time-out
IDLE_SECONDS = 10.0  # a connection that was idle for longer may be dead, and is not used again
HASH_STEP_BYTES = 8 << 20  # hashed at a time while others wait for their data: some 10 ms
JOIN_BLOCKS = 8  # 512 KiB ahead of a connection: to wait takes no longer than a request would
READAHEAD_BLOCKS = 4  # what a reader's first request brings; each next in a row twice as many
MAX_READAHEAD_BLOCKS = 64  # 4 MiB, a second at 30 Mbit/s: so long may another read wait behind it
MAX_READERS = 3  # connections for what is waited for, beside the lead: as many as helpers
HEAD_BYTES = 512  # enough to tell a web page or a qcow2 image
CHANGED = 412  # as the code of a Transient: the object is another one than before
STRONG_ETAG_RE = r'"[^"]*"\Z'  # an ETag that stands for the very bytes


class DownloadNote(NamedTuple):
  """What a resume needs: where the bytes come from, and of which object they are."""

  url: str
  validator: str  # a strong ETag, else Last-Modified; empty: no resume
  total: Optional[int]  # bytes; None: not known
  block: int = BLOCK_BYTES


def read_note(folder: str) -> Optional[DownloadNote]:
  """The note of an unfinished file; None when there is none, or no sound one of this format."""
  value = read_json(os.path.join(folder, "note.json"))
  url, validator, total, block = map(value.get, DownloadNote._fields)
  sound = isinstance(url, str) and isinstance(validator, str) and block == BLOCK_BYTES
  if not sound or not isinstance(total, int) or total < 0:
    return None
  return DownloadNote(str(url), str(validator), total)


def count_blocks(size: int) -> int:
  """How many blocks a file of that size has."""
  return -(-size // BLOCK_BYTES)


def blocks_of(start: int, count: int) -> Tuple[int, int]:
  """The first and the last block that hold some of these bytes."""
  return start // BLOCK_BYTES, max(start, start + count - 1) // BLOCK_BYTES


def count_leading(states: bytearray, state: int) -> int:
  """How many blocks at the beginning are in that state."""
  return len(states) - len(states.lstrip(bytes([state])))


def write_at(fd: int, data: Union[bytes, bytearray], position: int) -> None:
  """Write all bytes at a place in a file."""
  view = memoryview(data)
  while view:
    count = os.pwrite(fd, view, position)
    view, position = view[count:], position + count


class Span:
  """The bytes that one connection fetches, from position, which moves, to end."""

  def __init__(self, position: int, end: int) -> None:
    self.position, self.end = position, end
    self.urgent_until = 0  # the position up to which a reader waits for it
    self.moved = time.monotonic()

  @property
  def left(self) -> int:
    return self.end - self.position


class PartFile:
  """A file on its way: its bytes on disk, who fetches which of them, and their hash."""

  def __init__(self, folder: str, name: str, url: str) -> None:
    self.folder, self.name = folder, name
    self.part, self.map = os.path.join(folder, "part"), os.path.join(folder, "map")
    self.lock = threading.Condition()  # for everything here but the hash
    self.hashing = threading.Lock()  # for the hash
    self.part_fd = self.map_fd = -1
    self.spans: List[Span] = []
    self.forget()
    self.load(url)

  def forget(self) -> None:
    """Nothing is there."""
    self.note = DownloadNote("", "", None)
    self.blocks = bytearray()  # the state of each
    self.begun: Dict[int, int] = {}  # blocks of which a part is there: the position of its end
    self.done = 0  # bytes that are there
    self.hash, self.hashed = hashlib.sha256(), 0  # of so many bytes at the beginning

  def load(self, url: str) -> None:
    """Go on where an earlier run stopped, if its files are sound and of the same URL."""
    note = read_note(self.folder)
    if not note or note.url != url or not note.validator:
      return
    total = note.total or 0
    try:
      size = os.path.getsize(self.part)
      with open(self.map, "rb") as file:
        states = file.read()
    except OSError:
      return
    end = min(len(states.rstrip(b"\0")) * BLOCK_BYTES, total)
    fits = len(states) == count_blocks(total) and not states.strip(b"\0\1")
    if not fits or not end <= size <= total:
      return
    self.note, self.blocks = note, bytearray(states)
    surplus = -total % BLOCK_BYTES if states.endswith(b"\1") else 0
    self.done = states.count(THERE) * BLOCK_BYTES - surplus
    self.open_files()

  def create(self, note: DownloadNote) -> None:
    """Begin an object; discard() has removed what there was of another."""
    write_json(os.path.join(self.folder, "note.json"), dict(note._asdict()))
    with self.lock:
      self.note, self.blocks = note, bytearray(count_blocks(note.total or 0))
      self.open_files()
      write_at(self.map_fd, self.blocks, 0)

  def open_files(self) -> None:
    """Open the part and the map."""
    self.part_fd = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)
    self.map_fd = os.open(self.map, os.O_RDWR | os.O_CREAT, 0o666)

  def close(self, remove: bool = False, forget: bool = False) -> None:
    """Write no more, whatever still arrives; remove the files, and forget what was in them."""
    with self.hashing, self.lock:
      self.spans = []
      for fd in (self.part_fd, self.map_fd):
        if fd >= 0:
          os.close(fd)
      self.part_fd = self.map_fd = -1
      if remove:
        for path in (self.part, self.map, os.path.join(self.folder, "note.json")):
          remove_file(path)
      if forget:
        self.forget()

  def remove(self) -> None:
    """Remove the files, now that the bytes are elsewhere; what is in memory stays."""
    self.close(remove=True)

  def discard(self) -> None:
    """Give up the bytes there are."""
    self.close(remove=True, forget=True)

  @property
  def total(self) -> Optional[int]:
    """The bytes of the whole file; None while that is not known."""
    return self.note.total

  def complete(self) -> bool:
    return self.done == self.total

  def set_total(self, total: int) -> None:
    """A body of unknown length has come to its end."""
    with self.lock:
      self.note = self.note._replace(total=total)
      self.blocks = bytearray([THERE]) * count_blocks(total)

  # Who fetches what.

  def claim(self) -> Optional[Span]:
    """For the lead: all of an object that is not known yet, else the first gap."""
    with self.lock:
      if self.total is not None:
        return self.claim_gap()
      self.spans.append(Span(0, UNKNOWN))
      return self.spans[-1]

  def claim_gap(self) -> Optional[Span]:
    """The first gap that nobody fills."""
    with self.lock:
      first = self.blocks.find(MISSING)
      return self.claim_blocks(first, len(self.blocks)) if first >= 0 else None

  def claim_blocks(self, first: int, last: int) -> Optional[Span]:
    """The gap that begins with a block, as far as it goes before last; None where there is none."""
    with self.lock:
      count = count_leading(self.blocks[first:last], MISSING)
      if not count:
        return None
      self.blocks[first : first + count] = bytes([COMING]) * count
      start = self.begun.pop(first, first * BLOCK_BYTES)
      self.spans.append(Span(start, min((first + count) * BLOCK_BYTES, self.total or 0)))
      return self.spans[-1]

  def steal(self, split: bool) -> Optional[Span]:
    """What is left of a span whose connection is silent; with split, else half of the largest."""
    with self.lock:
      old = max(self.spans, key=lambda span: span.left, default=None)
      silent = time.monotonic() - STALL_SECONDS
      stalled = [span for span in self.spans if span.left and span.moved < silent]
      if stalled:
        old, start = stalled[0], stalled[0].position
      elif split and old and old.left >= MIN_SPLIT_BLOCKS * BLOCK_BYTES:
        start = (old.position + old.end) // 2 // BLOCK_BYTES * BLOCK_BYTES
      else:
        return None
      self.spans.append(Span(start, old.end))
      self.spans[-1].urgent_until, old.end = old.urgent_until, start
      return self.spans[-1]

  def release(self, span: Span) -> None:
    """A connection fetches no more of its span; what is left of it is a gap."""
    with self.lock:
      if span in self.spans:
        self.spans.remove(span)
        self.cut(span, span.position)
        self.lock.notify_all()

  def cut(self, span: Span, end: int) -> None:
    """Shorten a span; what follows is a gap."""
    if self.blocks and end < span.end:
      first, last = end // BLOCK_BYTES, count_blocks(span.end)
      self.blocks[first:last] = bytes([MISSING]) * (last - first)
      if end % BLOCK_BYTES:
        self.begun[first] = end
      span.end = end

  def yield_to_urgent(self, span: Span) -> None:
    """Let spans that a reader waits for come first; not for long, or the server hangs up."""
    until = time.monotonic() + STALL_SECONDS
    with self.lock:
      while span.position >= span.urgent_until and time.monotonic() < until:
        lively = time.monotonic() - 1  # one that does not move gains nothing by it
        if not any(it.position < it.urgent_until and it.moved > lively for it in self.spans):
          return
        self.lock.wait(POLL_SECONDS)

  def write(self, span: Span, chunk: bytes) -> None:
    """Take in the next bytes of a span."""
    with self.lock:
      if span not in self.spans:
        raise Cancelled()
      before = span.position
      chunk = chunk[: span.end - before]
      write_at(self.part_fd, chunk, before)
      span.position, span.moved = before + len(chunk), time.monotonic()
      self.done += len(chunk)
      first, last = before // BLOCK_BYTES, span.position // BLOCK_BYTES
      if span.position == self.total:
        last = len(self.blocks)
      if first < last and self.blocks:
        self.blocks[first:last] = bytes([THERE]) * (last - first)
        write_at(self.map_fd, self.blocks[first:last], first)
      self.lock.notify_all()
    if self.hashing.acquire(False):  # else whoever has it gets there
      try:
        self.hash_step()
      finally:
        self.hashing.release()

  # What has come.

  def first_missing(self, first: int, last: int) -> int:
    """The first of these blocks that is not there, or -1."""
    states = self.blocks[first : last + 1]
    count = count_leading(states, THERE)
    return -1 if states and count == len(states) else first + count

  def hash_step(self) -> None:
    """Hash what comes next and is there, read back from the file; the caller holds `hashing`."""
    first = self.hashed // BLOCK_BYTES
    end = (first + count_leading(self.blocks[first:], THERE)) * BLOCK_BYTES
    end = self.done if self.total is None else min(end, self.total)
    end = min(end, self.hashed + HASH_STEP_BYTES)
    while self.hashed < end:
      chunk = os.pread(self.part_fd, min(CHUNK_BYTES, end - self.hashed), self.hashed)
      if not chunk:
        raise QvmError(f"{self.part} became shorter while it was read")
      self.hash.update(chunk)
      self.hashed += len(chunk)

  def hash_all(self, cancelled: threading.Event) -> None:
    """Hash all of a file that is complete."""
    while self.hashed < (self.total or 0):
      if cancelled.is_set():
        raise Cancelled()
      with self.hashing:
        self.hash_step()

  def head(self) -> bytes:
    """The first bytes, which tell what kind of file it is."""
    return os.pread(self.part_fd, HEAD_BYTES, 0)


class OtherDownload:
  """A download of another qvm, as far as its files tell; it may begin, end or go meanwhile."""

  def __init__(self, folder: str, name: str) -> None:
    self.folder, self.name = folder, name

  @property
  def total(self) -> Optional[int]:
    note = read_note(self.folder)
    return note.total if note else None

  @property
  def done(self) -> int:
    with contextlib.suppress(OSError), open(os.path.join(self.folder, "map"), "rb") as file:
      return min(file.read().count(THERE) * BLOCK_BYTES, self.total or 0)
    return 0


class Progress:
  """The downloads that this process waits for: its own, and those of other qvms."""

  def __init__(self) -> None:
    self.files: List[Union[PartFile, OtherDownload]] = []
    self.shown = time.monotonic()

  @contextlib.contextmanager
  def including(self, file: Union[PartFile, OtherDownload]) -> Iterator[None]:
    """Count a download among them for a while."""
    self.files.append(file)
    try:
      yield
    finally:
      self.files.remove(file)

  def show(self) -> None:
    """With --progress, now and then: one line with how far each download is."""
    pause = 0.2 if os.isatty(2) else 5.0  # on a terminal it moves, a log it must not fill
    if not report.progress or not self.files or time.monotonic() < self.shown + pause:
      return
    self.shown = time.monotonic()
    texts = []
    for file in list(self.files):
      done, total = file.done, file.total
      share = f" {100 * done // total}%" if total else ""
      texts.append(f"{file.name}{share} {megabytes(done)}")
    report.draw(" | ".join(texts))


progress = Progress()


# An open answer, and its connection if that may be used again, which urllib's may not.
OpenBody = Tuple["http.client.HTTPResponse", "Optional[http.client.HTTPConnection]"]


class Connections:
  """The ways to a file: its URL, the signed address that led to, and idle connections there."""

  def __init__(self, net: Net, url: str) -> None:
    self.net, self.url = net, url
    self.address = ""  # where the last answer came from; good for a while
    self.lock = threading.Lock()
    self.idle: List[Tuple[http.client.HTTPConnection, float]] = []  # and since when

  def open(self, headers: Dict[str, str], count: int) -> OpenBody:
    """Request the file, or the range of so many bytes that the headers ask for."""
    address = self.address  # which other threads change
    if address and "Range" in headers:
      with contextlib.suppress(QvmError):
        if proxy_used(address):
          return open_url(self.net, address, headers), None
        opened = self.open_address(address, headers, count)
        if opened:
          return opened
      self.address = ""  # it has expired
    body = open_url(self.net, self.url, headers)
    self.address = body.geturl()
    return body, None

  def open_address(self, address: str, headers: Dict[str, str], count: int) -> Optional[OpenBody]:
    """Request a range where the last answer came from; None unless the answer is just that long.

    It saves the redirects, and where an earlier connection is idle the round trips of a new one:
    100 scattered reads at 50 Mbit/s, 150 ms to connect and 50 ms an answer took 8.9 s, not 19.6.
    """
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:
      return None
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    while True:
      old = self.take_idle()
      link = old or with_connect(kind)(parts.netloc, timeout=self.net.timeout)
      try:
        link.request("GET", path, headers={**headers, "User-Agent": "qvm/" + __version__})
        body = link.getresponse()
      except Exception as error:
        link.close()
        if not old:
          raise connection_failure(address, error)
        continue  # the server has closed it meanwhile
      length, coding = map(body.getheader, ("Content-Length", "Content-Encoding"))
      if body.status == 206 and length == str(count) and not coding:
        return body, link
      link.close()
      return None

  def take_idle(self) -> "Optional[http.client.HTTPConnection]":
    """A connection that is idle; None when there is none."""
    with self.lock:
      while self.idle:
        link, since = self.idle.pop()
        if time.monotonic() < since + IDLE_SECONDS:
          return link
        link.close()
    return None

  def keep(self, opened: OpenBody, complete: bool) -> None:
    """Keep the connection of a body that has been read completely; close any other."""
    body, link = opened
    body.close()
    with self.lock:
      if link and complete and link.sock:
        self.idle.append((link, time.monotonic()))
      elif link:
        link.close()


class NoStream(QvmError):
  """Why a file must be downloaded before it can be read."""


class Download:
  """One file on its way into a folder of its own, over one to four connections.

  With streamed, others read of it meanwhile: it must stay one object, of which ranges can be had.
  """

  def __init__(self, net: Net, url: str, name: str, folder: str, streamed: bool = False) -> None:
    self.net, self.url, self.name, self.streamed = net, url, name, streamed
    self.file = PartFile(folder, name, url)
    self.connections = Connections(net, url)
    self.resumed, self.started = self.file.done, time.monotonic()
    self.accepted = False  # whether an answer has been: readers depend on its object from then on
    self.helpers: List[threading.Thread] = []
    self.error: Optional[BaseException] = None  # after which no reader gets anything
    self.failures = 0  # how often those who waited have been given up
    self.down = False  # whether that has been said, and nothing has come since
    self.urgent: List[Tuple[int, int]] = []  # blocks that connections for readers fetch
    self.readahead: Dict[int, int] = {}  # where such a connection stopped: the blocks it brought

  def fetch(self) -> None:
    """Fetch what is missing, hash it, and look at its first bytes: the lead's whole work."""
    with progress.including(self.file):
      if not self.file.complete():
        with_retries(self.net, self.url, self.fetch_rest, lambda: self.file.done)
      self.file.hash_all(self.net.cancelled)
      self.check_kind(self.file.head())

  def fetch_rest(self) -> None:
    """One attempt: fetch the gaps in their order, and what others turn out not to fetch."""
    span = self.file.claim()
    while span:
      self.fetch_span(span, lead=True)
      span = self.next_span()

  def next_span(self) -> Optional[Span]:
    """What is left to fetch, if need be once the others are done; None when there is nothing."""
    while True:
      busy = any(span.left for span in self.file.spans)  # asked first: they may leave a gap
      span = self.file.claim_gap() or self.file.steal(split=not self.streamed)
      if span or not busy:
        return span
      with self.file.lock:
        self.file.lock.wait(0.1)
      if self.net.cancelled.is_set():
        raise Cancelled()

  def fetch_span(self, span: Span, lead: bool) -> None:
    """Request a span and write all of it; Transient when less arrives, Cancelled when none should.

    Only the lead may start the file over, and only until readers depend on the object.
    """
    restart = lead and not (self.streamed and self.accepted)
    try:
      start, end = span.position, span.end  # which others may cut meanwhile
      opened = self.connections.open(self.range_headers(start, end), end - start)
      try:
        span = self.accept(opened[0], span, restart)
        self.copy_body(opened[0], span, lead)
      except OSError as error:
        raise write_failure(self.file.part, self.file.total or self.file.done, error)
      finally:
        self.connections.keep(opened, span.position == end)
      if span.left:
        done, total = megabytes(self.file.done), megabytes(self.file.total or 0)
        raise Transient(f"{redacted(self.url)}: the connection ended after {done} of {total}")
      self.down = False
    except Transient as error:
      self.connections.address = ""  # the next attempt asks for a new one
      if restart and error.code in (CHANGED, NO_SUCH_RANGE):
        self.file.discard()
      if self.streamed and self.accepted and error.code == CHANGED:
        raise RefusedError(f"{redacted(self.url)}: the image has changed while it was streamed")
      raise
    finally:
      self.file.release(span)

  def range_headers(self, start: int, end: int) -> Dict[str, str]:
    """What asks for a range, if it can be had of the same object; else for all of it."""
    if not self.file.done or not self.file.note.validator or end == UNKNOWN:
      return {}
    last = "" if end == self.file.total else end - 1
    return {"Range": f"bytes={start}-{last}", "If-Range": self.file.note.validator}

  def accept(self, body: "http.client.HTTPResponse", span: Span, restart: bool) -> Span:
    """Look at an answer's headers; returns the span that its body is."""
    if body.getcode() != 206 and restart:
      span = self.start_over(body.headers)
    else:
      self.check_range(body, span)
      self.check_space(self.file.done, self.file.total or 0)
    if self.streamed and not self.gives_ranges(body.headers):
      raise NoStream(f"the server gives no ranges of {self.name}")
    if not self.accepted:
      self.accepted = True
      size = "unknown size" if self.file.total is None else megabytes(self.file.total)
      if self.file.done:
        size = f"going on at {megabytes(self.file.done)} of {size}"
      say(f"downloading {self.name} ({size}) from {redacted(self.url)}")
      with self.file.lock:
        self.file.lock.notify_all()
    return span

  def start_over(self, headers: "http.client.HTTPMessage") -> Span:
    """A 200 brings the whole object: forget what there was; returns what to fetch."""
    if self.file.done:
      say(f"{self.name} has changed or cannot be resumed; starting from the beginning")
    self.file.discard()
    self.resumed = 0
    length = headers.get("Content-Length") or ""
    chunked = (headers.get("Transfer-Encoding") or "").lower() == "chunked"
    sized = re.match(r"[0-9]{1,15}\Z", length) and not chunked
    if not sized and not chunked:  # the connection may have ended before it did
      raise Transient(f"{redacted(self.url)}: the server does not say how long the file is")
    etag, total = headers.get("ETag") or "", int(length) if sized else None
    strong = re.match(STRONG_ETAG_RE, etag)
    self.check_space(0, total or 0)
    validator = etag if strong else headers.get("Last-Modified") or ""
    self.file.create(DownloadNote(self.url, validator, total))
    return self.file.claim() or Span(0, 0)

  def check_range(self, body: "http.client.HTTPResponse", span: Span) -> None:
    """Transient unless an answer is just the bytes asked for, of the same object."""
    etag, validator = body.headers.get("ETag") or "", self.file.note.validator
    place = re.match(r"bytes ([0-9]+)-[0-9]+/([0-9]+)\Z", body.headers.get("Content-Range") or "")
    fits = place and [int(text) for text in place.groups()] == [span.position, self.file.total]
    same = validator in (etag, body.headers.get("Last-Modified"))
    if body.getcode() != 206 or not fits or not same:
      raise Transient(
        f"{redacted(self.url)}: the server sends another part than asked for",
        code=CHANGED if etag and etag != validator else NO_SUCH_RANGE,
      )

  def gives_ranges(self, headers: "http.client.HTTPMessage") -> bool:
    """Whether the server lets parts of just this object be fetched."""
    ranges = (headers.get("Accept-Ranges") or "").lower() == "bytes" or headers.get("Content-Range")
    return bool(ranges and re.match(STRONG_ETAG_RE, self.file.note.validator) and self.file.total)

  def check_space(self, done: int, total: int) -> None:
    """Refuse a download for which there is no room, counting those that go on beside it."""
    others = [file for file in list(progress.files) if file is not self.file and file.total]
    missing = total - done + sum((file.total or 0) - file.done for file in others)
    free = free_space(self.file.folder)
    if missing > free:
      raise disk_full(self.file.part, missing - free)

  def copy_body(self, body: "http.client.HTTPResponse", span: Span, lead: bool) -> None:
    """Write a body to the part, looking at the file's first bytes on the way."""
    looked = not lead or self.file.hashed >= HEAD_BYTES
    began, start = time.monotonic(), span.position
    while not self.net.cancelled.is_set():
      chunk = self.read_chunk(body, min(CHUNK_BYTES, span.left))
      if not chunk:
        if span.end == UNKNOWN:
          span.end = span.position
          self.file.set_total(span.end)
        return
      self.file.yield_to_urgent(span)
      self.file.write(span, chunk)
      if not looked and self.file.hashed >= HEAD_BYTES:
        looked = True
        self.check_kind(self.file.head())
      seconds = time.monotonic() - began
      if lead and seconds > SLOW_AFTER_SECONDS and span.position - start < SLOW_RATE * seconds:
        self.add_helpers(body.headers)
    raise Cancelled()

  def read_chunk(self, body: "http.client.HTTPResponse", most: int) -> bytes:
    """The next bytes of a body, as many as there are: a time-out loses none of them."""
    try:
      return body.read1(most) if most else b""
    except socket.timeout:
      raise Transient(f"{redacted(self.url)}: no more data for {self.net.timeout:g} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
      raise Transient(f"{redacted(self.url)}: the connection broke: {describe(error)}")

  def check_kind(self, head: bytes) -> None:
    """Refuse what is visibly not the file asked for, before more of it comes."""
    problem = ""
    if looks_like_html(head):
      problem = "is an HTML page instead of the file"
    elif self.name.endswith(".qcow2") and head[:4] != b"QFI\xfb":
      problem = "is not a qcow2 image"
    if problem:
      self.file.discard()
      raise QvmError(
        f"{redacted(self.url)} {problem}",
        "does a proxy or a login page of this network stand in between?",
      )

  # Helpers.

  def add_helpers(self, headers: "http.client.HTTPMessage") -> None:
    """Let more connections fetch the rest, if it is worth it; readers need the line for theirs."""
    missing = (self.file.total or 0) - self.file.done
    if self.helpers or self.streamed or missing < PARALLEL_MIN_BYTES:
      return
    for _ in range(HELPERS if self.gives_ranges(headers) else 0):
      self.helpers.append(threading.Thread(target=self.helper_loop, daemon=True))
      self.helpers[-1].start()

  def helper_loop(self) -> None:
    """Fetch gaps beside the lead until there are none, or the server wants no more."""
    with contextlib.suppress(QvmError, Transient, Cancelled, OSError):
      span = self.file.claim_gap() or self.file.steal(split=True)
      while span:
        start = span.position
        try:
          self.fetch_span(span, lead=False)
        except Transient:
          if span.position == start:
            return
        span = self.file.claim_gap() or self.file.steal(split=True)

  # Readers.

  def wait_for(self, start: int, count: int) -> bool:
    """Wait for bytes that somebody reads; False when they cannot be had."""
    first, last = blocks_of(start, count)
    with self.file.lock:
      failures = self.failures
      while True:
        first = self.file.first_missing(first, last)
        if first < 0:
          return True
        if self.error or self.failures > failures:
          return False
        self.want(first, last)
        self.file.lock.wait(POLL_SECONDS)

  def want(self, first: int, last: int) -> None:
    """See to it that a missing block and those up to last come soon; the caller holds the lock."""
    if len(self.urgent) >= MAX_READERS:
      return  # the next thread that is done wakes those who wait
    if any(low <= first < high for low, high in self.urgent):
      return
    start = first * BLOCK_BYTES
    for span in self.file.spans:
      if span.position // BLOCK_BYTES <= first and start < span.end:
        if time.monotonic() > span.moved + STALL_SECONDS:
          self.file.cut(span, span.position)
        elif start < span.position + JOIN_BLOCKS * BLOCK_BYTES:
          span.urgent_until = max(span.urgent_until, min(start + BLOCK_BYTES, span.end))
          return
        else:
          self.file.cut(span, start)
        break
    count = max(2 * self.readahead.pop(first, READAHEAD_BLOCKS // 2), last - first + 1)
    blocks = (first, first + min(count, MAX_READAHEAD_BLOCKS))
    self.urgent.append(blocks)
    threading.Thread(target=self.fetch_blocks, args=(blocks, last), daemon=True).start()

  def fetch_blocks(self, blocks: Tuple[int, int], last: int) -> None:
    """Fetch blocks with a connection of their own; a reader waits for those up to last."""

    def attempt() -> None:
      with self.file.lock:
        span = self.file.claim_blocks(*blocks)
        if not span:
          return
        span.urgent_until = min((last + 1) * BLOCK_BYTES, span.end)
      self.fetch_span(span, lead=False)

    try:
      with_retries(self.net, self.url, attempt, lambda: self.file.done)
    except RefusedError as error:
      self.abort(error)
    except (QvmError, OSError) as error:
      self.fail(error)
    except Cancelled:
      pass
    finally:
      with self.file.lock:
        self.readahead[blocks[1]] = blocks[1] - blocks[0]
        self.urgent.remove(blocks)
        self.file.lock.notify_all()

  def fail(self, error: BaseException) -> None:
    """Give up those who wait now; said once, until something arrives again."""
    with self.file.lock:
      if not self.down:
        say(f"{describe(error)}: the guest gets an I/O error")
      self.down = True
      self.failures += 1
      self.file.lock.notify_all()

  def abort(self, error: BaseException) -> None:
    """Give up all who wait, now and later."""
    with self.file.lock:
      self.error = self.error or error
      self.file.lock.notify_all()


def download(net: Net, url: str, name: str, folder: str) -> Download:
  """Fetch url into a folder, resuming what is there; returns it complete and looked at."""
  result = Download(net, url, name, folder)
  try:
    result.fetch()
  finally:
    result.file.close()
  fetched, seconds = result.file.done - result.resumed, time.monotonic() - result.started
  rate = megabytes(fetched / max(seconds, 0.001))
  say(f"downloaded {name}: {megabytes(fetched)} in {seconds:.1f} s ({rate}/s)")
  return result


@contextlib.contextmanager
def download_lock(downloads: str, name: str) -> Iterator[str]:
  """Hold downloads/NAME, where one file is made, waiting for a qvm that has it; gives its path.

  The lock on the folder tells whether somebody works there. An empty one goes in the end.
  """
  folder = os.path.join(downloads, name)
  with contextlib.ExitStack() as stack, contextlib.ExitStack() as waiting:
    shared = os.open(downloads, os.O_RDONLY)
    stack.callback(os.close, shared)
    try:
      lock_file(shared, downloads, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      say("waiting for another qvm that cleans up")
      lock_file(shared, downloads, fcntl.LOCK_SH)

    def wait() -> bool:
      say(f"waiting for another qvm that downloads {name}")
      waiting.enter_context(progress.including(OtherDownload(folder, name)))
      return True

    fd = None
    while fd is None:
      with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
      with contextlib.suppress(FileNotFoundError):  # its holder has removed it meanwhile
        fd = try_lock(folder, wait, os.O_RDONLY)
    stack.callback(os.close, fd)
    waiting.close()
    try:
      yield folder
    finally:
      with contextlib.suppress(OSError):
        os.rmdir(folder)


@contextlib.contextmanager
def discard_if_refused(download: Download) -> Iterator[None]:
  """Give up a download that turns out to be damaged or hostile."""
  try:
    yield
  except RefusedError:
    download.file.discard()
    raise


# ---- Releases -----------------------------------------------------------------------------------

MAX_PAGES = 10
TAG_RE = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}\Z"
DIGEST_RE = r"sha256:[0-9a-f]{64}\Z"


class Release(NamedTuple):
  """One release: its tag, and its assets by name with their SHA-256, empty where unknown."""

  tag: str
  assets: Dict[str, str]


def unquoted(text: str) -> str:
  """Text from a URL, without its percent signs."""
  return urllib.parse.unquote(text)


def newest_tag(net: Net, repo: str) -> str:
  """The tag of a repository's newest release, read from the redirect of releases/latest.

  GitHub answers 302 to …/releases/tag/TAG, without an API quota, and skips prereleases. On a
  plain file server releases/latest is a file that holds the tag.
  """
  url, mark = f"{net.releases}/{repo}/releases/latest", "/releases/tag/"
  body, location = with_retries(net, url, lambda: fetch_bytes(net, url, mark), lambda: 0)
  if location:
    tag = unquoted(location.split("?")[0].split("#")[0].rpartition(mark)[2])
  else:
    tag = body[:200].decode("ascii", "replace").strip()
  if not re.match(TAG_RE, tag):
    page = " but is an HTML page" if looks_like_html(body) else ""
    raise QvmError(
      f"{redacted(url)} names no newest release{page}",
      f"does {repo} hold releases, or does a login page of this network stand in between?",
    )
  return tag


def asset_url(net: Net, repo: str, tag: str, name: str) -> str:
  """The address of a release's asset."""
  return (
    f"{net.releases}/{repo}/releases/download/{urllib.parse.quote(tag)}/{urllib.parse.quote(name)}"
  )


def api_release(data: Any) -> Optional[Release]:
  """A release from the API's JSON; None for drafts, prereleases and what is no release."""
  if not isinstance(data, dict) or data.get("draft") or data.get("prerelease"):
    return None
  tag, assets = data.get("tag_name"), data.get("assets")
  if not isinstance(tag, str) or not re.match(TAG_RE, tag) or not isinstance(assets, list):
    return None
  found = {}
  for asset in assets:
    if isinstance(asset, dict) and isinstance(asset.get("name"), str):
      digest = asset.get("digest")
      sound = isinstance(digest, str) and re.match(DIGEST_RE, digest)
      found[asset["name"]] = str(digest)[7:] if sound else ""
  return Release(tag, found)


def api_data(net: Net, path: str) -> Any:
  """One attempt at the API; QvmError says why there is no answer."""
  url = f"{net.api}/{path}"
  try:
    return json.loads(fetch_bytes(net, url)[0].decode("utf-8"))
  except (ValueError, RecursionError, MemoryError):
    raise QvmError(f"{redacted(url)}: the answer is no JSON")
  except Transient as error:
    raise QvmError(str(error))


def api_releases(net: Net, repo: str) -> List[Release]:
  """All releases of a repository from the API, the newest first."""
  releases: List[Release] = []
  for page in range(1, MAX_PAGES + 1):
    data = api_data(net, f"{repo}/releases?per_page=100&page={page}")
    if not isinstance(data, list):
      raise QvmError(f"{redacted(net.api)}/{repo}/releases: the answer is no list of releases")
    releases += [release for release in map(api_release, data) if release]
    if len(data) < 100:
      break
  return releases


def page_release(net: Net, repo: str, tag: str) -> Release:
  """A release from its page fragment, which shows the assets as links and often their digests."""
  text = get_page(net, f"{net.releases}/{repo}/releases/expanded_assets/{urllib.parse.quote(tag)}")
  assets: Dict[str, str] = {}
  pieces = re.split(r'href="[^"]*/releases/download/[^"/]+/([^"/]+)"', text)
  for name, after in zip(pieces[1::2], pieces[2::2]):
    digest = re.search(r"\bsha256:([0-9a-f]{64})\b", after)
    assets[unquoted(name)] = digest.group(1) if digest else assets.get(unquoted(name), "")
  return Release(tag, assets)


def page_releases(net: Net, repo: str) -> List[Release]:
  """The newest releases from the pages, one request for each; a mirror may have just one.

  The feed tells nothing of prereleases: what is newer than the newest release is one, and so
  is what is named like one.
  """
  newest = newest_tag(net, repo)
  tags = [newest]
  with contextlib.suppress(NotFound):
    feed = get_page(net, f"{net.releases}/{repo}/releases.atom")
    listed = [unquoted(tag) for tag in re.findall(r'/releases/tag/([^"<>/\s]+)"', feed)]
    listed = [tag for tag in dict.fromkeys(listed) if re.match(TAG_RE, tag)]
    tags = listed[listed.index(newest) :] if newest in listed else [newest, *listed]
  releases = []
  for tag in tags:
    if tag != newest and re.search(r"[0-9][-._]?(alpha|beta|rc|pre)", tag.lower()):
      continue
    with contextlib.suppress(NotFound):
      releases.append(page_release(net, repo, tag))
  return releases


class Releases:
  """What is known of the releases in this run, each thing asked for once by all threads."""

  def __init__(self, net: Net) -> None:
    self.net = net
    self.lock = threading.Lock()
    self.asked: Dict[Tuple[str, ...], Future] = {}

  def once(self, key: Tuple[str, ...], function: Callable[[], T]) -> T:
    """The result of the first call with that key."""
    with self.lock:
      if key not in self.asked:
        self.asked[key] = Future(function)
      later = self.asked[key]
    return later.result()  # type: ignore[no-any-return]

  def tag(self, repo: str) -> str:
    """The tag of the newest release."""
    return self.once((repo,), lambda: newest_tag(self.net, repo))

  def digest(self, repo: str, tag: str, name: str) -> str:
    """The SHA-256 of an asset, empty where no release data tell it."""
    return self.once((repo, tag), lambda: self.one(repo, tag)).assets.get(name, "")

  def forget(self, repo: str, tag: str) -> None:
    """Ask anew for a release's data the next time."""
    with self.lock:
      self.asked.pop((repo, tag), None)

  def one(self, repo: str, tag: str) -> Release:
    """A release's data from the API, else from its page, else empty: no download waits long."""
    net = impatient(self.net)
    if net.api:
      with contextlib.suppress(QvmError):
        release = api_release(api_data(net, f"{repo}/releases/tags/{tag}"))
        if release:
          return release
    with contextlib.suppress(QvmError):
      return page_release(net, repo, tag)
    return Release(tag, {})

  def all(self, repo: str) -> List[Release]:
    """All releases, the newest first, as far as the API or else the pages tell."""
    return self.once((repo, "", "all"), lambda: self.listed(repo))

  def listed(self, repo: str) -> List[Release]:
    """What all() remembers."""
    if self.net.api:
      try:
        releases = api_releases(self.net, repo)
        if releases:
          return releases
      except QvmError as error:
        say(f"{error}; reading the release pages instead")
    return page_releases(self.net, repo)


class Image(NamedTuple):
  """An image that can be had: the newest release that has it, and the asset's name there."""

  version: str
  arch: str
  release: str
  asset: str


def images_in(os_name: str, releases: Sequence[Release]) -> List[Image]:
  """The images of an OS, the newest version first; the newest release that has one wins."""
  found: Dict[Tuple[str, str], Image] = {}
  pattern = re.compile(os_name + r"-(.+)-(x86-64|arm64)\.(qcow2|tar\.zst)\Z")
  for release in releases:
    for name in sorted(release.assets):  # the qcow2 before the tar.zst
      match = pattern.match(name)
      if match and re.match(VERSION_RE, match.group(1)):
        version, arch = match.group(1), match.group(2)
        found.setdefault((version, arch), Image(version, arch, release.tag, name))
  return sorted(found.values(), key=lambda image: version_key(image.version), reverse=True)


def version_key(version: str) -> List[Tuple[int, int, str]]:
  """Orders versions: 9.4 < 10.0, r1beta4 < r1beta6 < r1, r151056 < r151058, 15.0-rc1 < 15.0."""
  key = []
  for number, word in re.findall(r"([0-9]+)|([a-z]+)", version.lower()):
    early = word in ("alpha", "beta", "rc", "pre")
    key.append((2, int(number), "") if number else (0 if early else 3, 0, word))
  return [*key, (1, 0, "")]


def is_candidate(version: str) -> bool:
  """Whether a version is a release candidate, which `latest` never means."""
  return bool(re.search(r"(^|[^a-z])rc[0-9]*($|[^a-z])", version.lower()))


# ---- Unpack -------------------------------------------------------------------------------------

MAX_MEMBERS = 20000  # of a QEMU archive, which has some hundred
MAX_QEMU_BYTES = 1 << 30
MAX_DISK_BYTES = 1 << 40  # bytes of a bundle's disk, holes included
BAD_NAME_ERRORS = (
  errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
  errno.ENOTDIR,
)  # fmt: skip


def safe_name(name: str) -> List[str]:
  """The parts of an archive member's name; ValueError when it could lead out of the tree."""
  if name.startswith("/") or "\0" in name or len(name) > 1000:
    raise ValueError("is not a plain path")
  parts = [part for part in name.split("/") if part not in ("", ".")]
  if any(len(os.fsencode(part)) > 255 for part in parts):
    raise ValueError("has too long a name")
  if ".." in parts:
    raise ValueError("leads out of its folder")
  return parts


def check_link(parts: List[str], target: str) -> None:
  """A symbolic link may only climb within the tree, and only at the start of its target."""
  if not target or target.startswith("/") or "\0" in target or len(target) > 1000:
    raise ValueError(f"is a link to {target[:100]}")
  words = [word for word in target.split("/") if word not in ("", ".")]
  climbs = 0
  while climbs < len(words) and words[climbs] == "..":
    climbs += 1
  if climbs >= len(parts) or ".." in words[climbs:]:
    raise ValueError(f"is a link out of its folder, to {target[:100]}")


def check_member(member: Any, plain: Set[Tuple[str, ...]]) -> List[str]:
  """The parts of one member's name; ValueError when it is not a plain file, folder or link."""
  parts = safe_name(member.name)
  if member.mode & 0o4000 or (member.mode & 0o2000 and not member.isdir()):
    raise ValueError("has a set-uid or set-gid bit")
  if member.issym():
    check_link(parts, member.linkname)
  elif member.islnk():
    if tuple(safe_name(member.linkname)) not in plain:
      raise ValueError("is a link to what is no file of the archive")
  elif not member.isreg() and not member.isdir():
    raise ValueError("is a device or another special file")
  if not parts and not member.isdir():
    raise ValueError("has no name")
  return parts


def check_members(archive: Any) -> List[Tuple[Any, List[str]]]:
  """The members of a tar archive with the parts of their names; ValueError for a hostile one."""
  members: List[Tuple[Any, List[str]]] = []
  files: Set[Tuple[str, ...]] = set()
  plain: Set[Tuple[str, ...]] = set()
  folders: Set[Tuple[str, ...]] = set()
  size = 0
  for member in archive:
    size += member.size
    if member.size < 0:
      raise ValueError("it is damaged")
    if len(members) >= MAX_MEMBERS or size > MAX_QEMU_BYTES:
      raise ValueError("it holds more than any QEMU")
    try:
      parts = check_member(member, plain)
    except ValueError as error:
      raise ValueError(f"its member '{member.name[:100]}' {error}")
    members.append((member, parts))
    if not member.isdir():
      files.add(tuple(parts))
    if member.isreg() or member.islnk():
      plain.add(tuple(parts))
    folders.update(tuple(parts[:n]) for n in range(len(parts) + member.isdir()))
  archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header for the end
  if archive.fileobj.read(512) != bytes(512):
    raise ValueError("it is cut short or damaged")
  clash = files & folders  # something would be written through a link or over a file
  if clash:
    raise ValueError("'{}' is both a folder and something else".format("/".join(min(clash))))
  return members


def unpack(path: str, folder: str) -> None:
  """Unpack a tar archive into a new folder; a hostile one is refused before anything is written.

  Everything is written by hand, so that owners, times and modes in the archive do not matter,
  whatever the version of tarfile. Links come last: nothing is ever written through one.
  """
  with tarfile.open(path, "r:*") as archive:
    members = check_members(archive)
    os.mkdir(folder, 0o755)
    for member, parts in members:
      target = os.path.join(folder, *parts)
      if member.issym():
        continue
      os.makedirs(target if member.isdir() else os.path.dirname(target), exist_ok=True)
      if not member.isdir():
        source = archive.extractfile(member)
        with open(target, "wb") as file:
          shutil.copyfileobj(source, file, CHUNK_BYTES)  # type: ignore[arg-type]
        os.chmod(target, 0o755 if member.mode & 0o100 else 0o644)
    for member, parts in members:
      if member.issym():
        target = os.path.join(folder, *parts)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(member.linkname, target)


def unpack_aside(path: str, folder: str, names: Sequence[str]) -> str:
  """Unpack a downloaded archive into a new folder and return the file that has one of the names.

  It may lie in that folder or, in an archive with one top folder, in that one. RefusedError
  when the archive is damaged, hostile or without that file; then nothing is left of it.
  """
  remove_tree(folder)
  try:
    unpack(path, folder)
    return find_unpacked(folder, names)
  except (tarfile.TarError, zlib.error, lzma.LZMAError, ValueError, LookupError, EOFError,
          OverflowError, RecursionError, MemoryError) as error:  # fmt: skip
    problem = str(error).split("\n")[0].rstrip(":") or "it is damaged"
  except OSError as error:
    if error.errno is not None and error.errno not in BAD_NAME_ERRORS:
      failure = write_failure(folder, os.path.getsize(path), error)  # a plain tar is no smaller
      remove_tree(folder)
      raise failure
    problem = describe(error)
  remove_tree(folder)
  remove_file(path)
  raise RefusedError(f"{os.path.basename(os.path.dirname(path))} is refused: {problem}")


def find_unpacked(folder: str, names: Sequence[str]) -> str:
  """The file of that name in an unpacked archive or its one top folder; ValueError without."""
  inside = os.listdir(folder)
  for top in ["", *(inside if len(inside) == 1 else [])]:
    for name in names:
      found = os.path.join(folder, top, name)
      if os.path.isfile(found):
        check_links(found[: -len(name)])
        return found
  raise ValueError(f"it holds no {names[0]}")


def check_links(root: str) -> None:
  """The part of an archive that is kept may have no links to what is not."""
  inside = os.path.realpath(root) + "/"
  for folder, folders, names in os.walk(root):
    for path in (os.path.join(folder, name) for name in folders + names):
      if os.path.islink(path) and not (os.path.realpath(path) + "/").startswith(inside):
        raise ValueError(f"its member '{os.path.relpath(path, root)}' is a link out of the archive")


UNZSTD = (("zstd", "-dcq"), ("unzstd", "-cq"), ("zstdcat", "-q"),
          ("bsdtar", "-cf", "-", "--format=pax", "--ignore-zeros", "@-"))  # fmt: skip
ZSTD_HINT = "install zstd (Debian: apt-get install zstd, macOS: brew install zstd)"


def unzstd_command() -> List[str]:
  """A program that unpacks zstd from stdin to stdout; empty where there is none."""
  for name, *words in UNZSTD:
    path = find_program(name)
    if path:
      return [path, *words]
  return []


def can_unzstd() -> bool:
  """Whether bundles can be unpacked here: Python has zstd from 3.14 on."""
  return bool(python_zstd() or unzstd_command())


def python_zstd() -> Any:
  """Python's own module for zstd, None where it has none."""
  try:
    from compression import zstd  # type: ignore[import-not-found,unused-ignore]
  except ImportError:
    return None
  return zstd


@contextlib.contextmanager
def unzstd(path: str) -> Iterator[Any]:
  """The unpacked bytes of a zstd file, as a stream; ValueError when the file is damaged."""
  zstd = python_zstd()
  if zstd:
    try:
      with zstd.open(path) as stream:
        yield stream
        while stream.read(CHUNK_BYTES):  # the end is looked at too
          pass
    except zstd.ZstdError as error:
      raise ValueError(str(error))
    return
  with open(path, "rb") as packed:
    process = start(
      unzstd_command(), stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
  try:
    yield process.stdout
    while process.stdout.read(CHUNK_BYTES):  # so that the program sees and checks the end
      pass
    if process.wait():
      raise ValueError(f"it is damaged, says {unzstd_command()[0]}")
  finally:
    process.stdout.close()
    end_process(process)


def unpack_bundle(stream: Any, folder: str) -> None:
  """Unpack disk.img and kernel, and nothing else, from a tar stream into a new folder."""
  os.mkdir(folder)
  with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK_BYTES) as archive:
    for member in archive:
      name = "/".join(safe_name(member.name))
      if not name and member.isdir():
        continue
      path = os.path.join(folder, name)
      if name not in ("disk.img", "kernel") or not member.isreg() or os.path.lexists(path):
        raise ValueError(f"its member '{member.name[:100]}' is not expected")
      if not 0 <= member.size <= MAX_DISK_BYTES:
        raise ValueError("its disk is larger than any")
      write_sparse(archive, member, path)
  if not os.path.isfile(os.path.join(folder, "disk.img")):
    raise ValueError("it holds no disk.img")


def write_sparse(archive: Any, member: Any, path: str) -> None:
  """Write a member so that its holes, and what is zero throughout, take no space on the disk.

  A sparse member's pieces lie one behind the other in the stream, which is at the first.
  """
  zeros, end = bytes(CHUNK_BYTES), 0
  pieces = member.sparse if member.issparse() else [(0, member.size)]
  pieces = [(offset, size) for offset, size in pieces if size]  # tarfile fills up with (0, 0)
  for offset, size in pieces:
    if size < 0 or offset < end or offset + size > member.size:
      raise ValueError("its disk has pieces out of place")
    end = offset + size
  try:
    with open(path, "wb") as file:
      for offset, size in pieces:
        while size > 0:
          chunk = archive.fileobj.read(min(size, CHUNK_BYTES))
          if not chunk:
            raise ValueError("it is cut short")
          if chunk != zeros[: len(chunk)]:
            file.seek(offset)
            file.write(chunk)
          offset, size = offset + len(chunk), size - len(chunk)
      file.truncate(member.size)
  except OSError as error:
    raise write_failure(path, sum(size for _, size in pieces), error)


# ---- Store --------------------------------------------------------------------------------------


def is_qemu_program(path: str) -> bool:
  """Whether a cached file stands for the whole tree of a QEMU."""
  return os.path.basename(path).startswith("qemu-system-")


def record_path(path: str) -> str:
  """Where release, URL, size and digests of a cached file or QEMU's program are noted."""
  if is_qemu_program(path):
    return os.path.join(os.path.dirname(os.path.dirname(path)), "release.json")
  return (path[: -len(".qcow2")] if path.endswith(".qcow2") else path) + ".json"


def publish_with_record(source: str, target: str, record: Dict[str, Any], mode: int) -> None:
  """Publish a file with its record, so that a kill at any moment leaves them matching.

  Until the file has its place, its record waits beside the old one and tells by the inode
  which of the two files it is meant for; record_of takes the one that fits.
  """
  waiting = record_path(target) + ".new"
  write_json(waiting, {**record, "inode": os.stat(source).st_ino}, 0o444)
  move_into_place(source, target, mode)
  os.replace(waiting, record_path(target))


def record_of(path: str) -> Dict[str, Any]:
  """The record of a cached file; empty when there is none."""
  waiting = record_path(path) + ".new"
  new = read_json(waiting)
  if new and os.path.exists(path) and new.get("inode") == os.stat(path).st_ino:
    with contextlib.suppress(OSError):
      os.replace(waiting, record_path(path))  # what the killed qvm was about to do
    return new
  return read_json(record_path(path))


def cached_images(cache: str, os_name: str) -> List[Image]:
  """The base images of an OS that are cached, the newest version first."""
  return images_in(os_name, [Release("", dict.fromkeys(names_in(cache, "base"), ""))])


def tables_fit(number: Callable[[int, int], int], size: int) -> bool:
  """Whether what a qcow2 header tells of its tables is possible in a file of that size."""
  cluster = 1 << number(20, 4)
  entries, l1, refcounts, clusters = number(36, 4), number(40, 8), number(48, 8), number(56, 4)
  if number(4, 4) == 3 and (number(96, 4) > 6 or not 104 <= number(100, 4) <= min(cluster, size)):
    return False
  needed = -(-number(24, 8) // (cluster * (cluster // 8)))
  return (
    needed <= entries <= 1 << 22
    and 0 < clusters * cluster <= 1 << 23
    and l1 % cluster == refcounts % cluster == 0
    and 0 < l1 <= size - 8 * entries
    and 0 < refcounts <= size - clusters * cluster
    and number(60, 4) <= 65536
  )


def check_image(path: str) -> None:
  """Refuse a qcow2 file that could make QEMU read other files of the host, or that is damaged.

  The header is that of QEMU's docs/interop/qcow2.rst, all numbers big-endian.
  """
  with open(path, "rb") as file:
    head = file.read(104)

  def number(start: int, size: int) -> int:
    return int.from_bytes(head[start : start + size], "big")

  version = number(4, 4)
  features = number(72, 8) if version >= 3 else 0
  problem = ""
  if head[:4] != b"QFI\xfb":
    problem = "it is not a qcow2 image"
  elif version not in (2, 3) or len(head) < (72 if version == 2 else 104):
    problem = "its qcow2 header is cut short or of an unknown version"
  elif number(8, 8) or number(16, 4):
    problem = "it names a backing file, which could be any file of this machine"
  elif features & 4:
    problem = "it names an external data file, which could be any file of this machine"
  elif features & 2:
    problem = "it says of itself that it is corrupt"
  elif features & ~0x1F:
    problem = "it uses features of qcow2 that qvm does not know"
  elif number(32, 4):
    problem = "it is encrypted"
  elif not 9 <= number(20, 4) <= 21 or not 0 < number(24, 8) <= 1 << 46:
    problem = "its sizes make no sense"
  elif not tables_fit(number, os.path.getsize(path)):
    problem = "its tables make no sense: is it cut short?"
  if problem:
    raise RefusedError(f"the image {path} is refused: {problem}")


def backing_file(path: str) -> str:
  """The name of the backing file that an overlay's header tells; empty when there is none."""
  try:
    with open(path, "rb") as file:
      head = file.read(20)
      file.seek(int.from_bytes(head[8:16], "big"))
      return os.fsdecode(file.read(min(int.from_bytes(head[16:20], "big"), 1023)))
  except (OSError, OverflowError, ValueError):
    return ""


STREAMED = "nbd+unix:"  # the backing of an overlay that was begun while its base image came


def is_streamed(disk: str) -> bool:
  """Whether an overlay lies on a base image that had not all come when it was last used."""
  return backing_file(disk).startswith(STREAMED)


def socket_of(disk: str) -> str:
  """The path of the socket at which an overlay's base image was served; empty if it was not."""
  return backing_file(disk).partition("socket=")[2] if is_streamed(disk) else ""


def drop_socket(path: str) -> None:
  """Remove the socket of a server, and its folder, if that was killed and left them."""
  if re.search(r"/qvm-[a-z0-9_]{8}/nbd\Z", path):
    with contextlib.suppress(OSError):
      os.unlink(path)
      os.rmdir(os.path.dirname(path))


def drop_dead_sockets(folder: str) -> None:
  """Remove what servers that were killed before there was an overlay left among temporary files."""
  for path in [os.path.join(path, "nbd") for path in paths_in(folder, "")]:
    with contextlib.suppress(OSError):
      info = os.lstat(path)
      mine = S_ISSOCK(info.st_mode) and info.st_uid == os.getuid()
      if mine and time.time() > info.st_mtime + 60:  # a younger one may not listen yet
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
          probe.settimeout(1)
          if probe.connect_ex(path) == errno.ECONNREFUSED:
            drop_socket(path)


def base_of(disk: str) -> str:
  """The path of the base image of an overlay, relative to its folder."""
  backing = backing_file(disk)
  if not backing.startswith(STREAMED):
    return backing
  record = read_json(disk[: -len("qcow2")] + "json")
  return "../base/{}-{}-{}.qcow2".format(*(record.get(key) for key in ("os", "version", "arch")))


def base_files(cache: str) -> Dict[str, str]:
  """The paths on which the overlays of the instances lie, by the instances' names."""
  folder = instances_dir(cache)
  disks = {name: os.path.join(folder, name + ".qcow2") for name in instance_names(cache, ".qcow2")}
  return {name: os.path.join(folder, base_of(disk)) for name, disk in disks.items()}


def dependants(cache: str, base: str) -> List[str]:
  """The names of the instances that need a base image: they lie on it, or on a checkpoint on it,
  or will lie on it once it has come."""
  needed = os.path.join("..", "base", os.path.basename(base))
  found = []
  for name, path in base_files(cache).items():
    if os.path.basename(os.path.dirname(path)) == "warm":
      path = backing_file(path)
    if path.endswith(needed):
      found.append(name)
  return found


def pinned_release(plan: Plan) -> str:
  """The release from which the rest of the base image must come, as overlays were begun on it."""
  if os.path.isfile(plan.base):
    return ""
  records = [
    read_json(os.path.join(instances_dir(plan.cache), name + ".json"))
    for name in dependants(plan.cache, plan.base)
  ]
  tags = [str(record.get("release")) for record in records if record.get("release")]
  return tags[0] if tags and re.match(TAG_RE, tags[0]) else ""


def check_unused(plan: Plan) -> None:
  """Refuse to replace a base image on which instances depend."""
  names = dependants(plan.cache, plan.base)
  if names:
    raise QvmError(
      f"{plan.base} cannot be refreshed: these instances depend on it: {', '.join(names)}",
      "qvm rm deletes them, with all that their guests wrote",
    )


CHECKPOINT_PARTS = (".qcow2", ".memory", ".state")


def checkpoint_paths(files: Files) -> List[str]:
  """The files that there are of a checkpoint, its record first."""
  paths = [files.record, *map(files.path, CHECKPOINT_PARTS)]
  return [path for path in paths if os.path.exists(path)]


def remove_checkpoint(files: Files) -> None:
  """Delete a checkpoint within the gate, its record first; machines that run from it go on."""
  for suffix in (".json", ".json.tmp", *CHECKPOINT_PARTS):
    remove_file(files.path(suffix))


def drop_checkpoints(plan: Plan, digest: str) -> None:
  """Remove the checkpoints on another base image than the one that is about to take its place."""
  for files in checkpoints(plan.cache):
    mine = backing_file(files.disk).endswith("/" + os.path.basename(plan.base))
    if mine and read_json(files.record).get("base_sha256") != digest:
      remove_checkpoint(files)


def fetch_asset(releases: Releases, repo: str, tag: str, name: str, folder: str) -> Download:
  """Download an asset into a folder and check its digest; one that differs is fetched once more."""
  url = asset_url(releases.net, repo, tag, name)
  for last in (False, True):
    expected = Future(lambda: releases.digest(repo, tag, name))
    result = download(releases.net, url, name, folder)
    try:
      check_digest(result, expected.result())
      break
    except RefusedError as problem:
      if last:
        raise
      say(f"{problem}; fetching it once more")
      releases.forget(repo, tag)
  return result


def check_digest(download: Download, expected: str) -> None:
  """Give up a download that has not the SHA-256 that its release names; empty: it names none."""
  digest = download.file.hash.hexdigest()
  if not expected:
    say(f"no digest is known for {download.name}: only its length could be checked")
  elif digest != expected:
    download.file.discard()
    raise RefusedError(
      f"{redacted(download.url)}: what arrives has not the digest that the release names "
      f"(sha256 {expected}, not {digest})",
      "it has been deleted",
    )


def asset_record(download: Download, tag: str, digest: str = "") -> Dict[str, Any]:
  """The record of a complete asset; digest: of what was made of it, if that is not the asset."""
  asset_digest = download.file.hash.hexdigest()
  return {
    "release": tag,
    "url": download.url,
    "validator": download.file.note.validator,
    "size": download.file.done,
    "asset_sha256": asset_digest,
    "sha256": digest or asset_digest,
    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
  }


UNPACKED = "unpacked"  # the folder in that of a download where an archive is unpacked


def is_there(plan: Plan, releases: Releases, path: str, name: str) -> bool:
  """Whether a part of resources is cached, with --refresh also whether it is the newest."""
  if not os.path.isfile(path) or not plan.refresh:
    return os.path.isfile(path)
  url = asset_url(releases.net, "resources", releases.tag("resources"), name)
  newest = record_of(path).get("url") == url
  if newest:
    say(f"{name} is the newest")
  return newest


def fetch_resource(releases: Releases, name: str, folder: str) -> Download:
  """Download an asset of the newest release of QEMU."""
  return fetch_asset(releases, "resources", releases.tag("resources"), name, folder)


def fetch_qemu(plan: Plan, releases: Releases) -> None:
  """Download QEMU for the guest's CPU and put its tree in place."""
  with download_lock(downloads_dir(plan), plan.qemu_asset) as folder:
    if is_there(plan, releases, tree_program(plan), plan.qemu_asset):
      return
    download = fetch_resource(releases, plan.qemu_asset, folder)
    aside = os.path.join(folder, UNPACKED)
    with discard_if_refused(download):
      program = unpack_aside(download.file.part, aside, ("bin/qemu",))
      root = os.path.dirname(os.path.dirname(program))
      named = os.path.join(root, "bin", os.path.basename(tree_program(plan)))
      taken = [os.path.join(root, "release.json" + end) for end in ("", ".tmp")]
      fit = os.path.isdir(os.path.join(root, "share", "qemu"))
      if not os.path.isfile(named):  # some archives may have it under both names
        taken.append(named)
      if not fit or any(os.path.lexists(path) for path in taken):
        remove_tree(aside)
        raise RefusedError(f"{plan.qemu_asset} is refused: it is not laid out as a QEMU")
    if not os.path.isfile(named):
      os.rename(program, named)
    os.chmod(named, 0o755)
    record = asset_record(download, releases.tag("resources"), tree_sha256(root))
    write_json(os.path.join(root, "release.json"), record)
    with instances_lock(instances_dir(plan.cache)):
      swap_tree(root, plan.tree)
    remove_tree(aside)
    download.file.remove()


def swap_tree(root: str, link: str) -> None:
  """Make link, a symbolic link, lead to a new tree, so that it is replaced in one step.

  The tree before stays until the next one comes, for a QEMU that is just starting from it.
  """
  folder, name = os.path.split(link)
  before = os.readlink(link) if os.path.islink(link) else ""
  now = f".{name}-{os.urandom(4).hex()}"
  os.rename(root, os.path.join(folder, now))
  remove_file(link + ".new")
  try:
    os.symlink(now, link + ".new")
  except OSError as error:
    remove_tree(os.path.join(folder, now))
    raise QvmError(f"{link} cannot be made, a symbolic link: {describe(error)}", OTHER_CACHE)
  if not os.path.islink(link):
    remove_tree(link)  # from a copy of the cache that followed links
  os.replace(link + ".new", link)
  for entry in os.listdir(folder):
    if entry.startswith(f".{name}-") and entry not in (now, before):
      remove_tree(os.path.join(folder, entry))


def fetch_qemu_img(plan: Plan, releases: Releases) -> None:
  """Download qemu-img."""
  with download_lock(downloads_dir(plan), plan.tools_asset) as folder:
    if is_there(plan, releases, plan.qemu_img, plan.tools_asset):
      return
    download = fetch_resource(releases, plan.tools_asset, folder)
    aside = os.path.join(folder, UNPACKED)
    with discard_if_refused(download):
      unpacked = unpack_aside(download.file.part, aside, ("qemu-img", "bin/qemu-img"))
      program = os.path.realpath(unpacked)
    record = asset_record(download, releases.tag("resources"), file_sha256(program))
    with instances_lock(instances_dir(plan.cache)):
      publish_with_record(program, plan.qemu_img, record, 0o755)
    remove_tree(aside)
    download.file.remove()


def convert_bundle(plan: Plan, part: str, aside: str) -> str:
  """Unpack a downloaded bundle and make a qcow2 of its disk; returns the qcow2's path."""
  name = plan.bundle_asset
  remove_tree(aside)
  say(f"unpacking {name}")
  try:
    with unzstd(part) as stream:
      unpack_bundle(stream, aside)
  except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
    raise RefusedError(f"{name} is refused: {error}")
  except OSError as error:
    raise write_failure(aside, os.path.getsize(part), error)
  disk, result = os.path.join(aside, "disk.img"), os.path.join(aside, "disk.qcow2")
  run_program([plan.qemu_img, "convert", "-f", "raw", "-O", "qcow2", disk, result])
  os.unlink(disk)
  return result


def candidates(plan: Plan, releases: Releases) -> Iterator[Tuple[str, str]]:
  """Releases and assets that may be the image, the best first, found out only as needed."""
  repo, qcow2 = image_repo(plan.guest.os), plan.image_asset
  bundle, unpackable = plan.bundle_asset, can_unzstd()
  newest = releases.tag(repo)
  yield newest, qcow2
  if unpackable:
    yield newest, bundle
  for release in releases.all(repo):
    if qcow2 in release.assets:  # the newest too: its first 404 may have been a passing one
      yield release.tag, qcow2
    elif bundle in release.assets and not unpackable:
      say(f"{release.tag} has {bundle}, which takes zstd to unpack; looking for an older qcow2")
    elif bundle in release.assets and release.tag != newest:
      yield release.tag, bundle


def find_image(
  plan: Plan, releases: Releases, pinned: str, use: Callable[[str, str], None]
) -> None:
  """Call use(tag, asset) for what may be the image until it raises no NotFound.

  pinned is the only release that will do, empty where any will.
  """
  for tag, name in [(pinned, plan.image_asset)] if pinned else candidates(plan, releases):
    with contextlib.suppress(NotFound):
      return use(tag, name)
  raise gone_image(plan, pinned) if pinned else no_such_image(plan, releases)


def fetch_image(plan: Plan, releases: Releases, tools: Callable[[], None]) -> None:
  """Make the base image from the newest release that has it; tools waits for qemu-img."""
  repo = image_repo(plan.guest.os)

  def use(tag: str, name: str) -> None:
    url = asset_url(releases.net, repo, tag, name)
    if os.path.isfile(plan.base):
      if record_of(plan.base).get("url") == url:
        return say(f"{name} of {tag} is the newest")
      check_exists(releases.net, url)
      check_unused(plan)  # before the download; install_image looks again
    download = fetch_asset(releases, repo, tag, name, folder)
    if tag not in (pinned, releases.tag(repo)):
      say(f"{name} comes from {tag}; the newest release, {releases.tag(repo)}, has none")
    if name == plan.bundle_asset:
      tools()
    install_image(plan, download, tag)

  with download_lock(downloads_dir(plan), plan.image_asset) as folder:
    if plan.refresh or not os.path.isfile(plan.base):
      pinned = pinned_release(plan)
      find_image(plan, releases, pinned, use)


def gone_image(plan: Plan, tag: str) -> QvmError:
  """The error for overlays that were begun on an image that the server no longer has."""
  names = ", ".join(dependants(plan.cache, plan.base))
  return QvmError(
    f"{plan.image_asset} of {tag}, which these instances were begun on, cannot be had any more: "
    f"{names}",
    "qvm rm gives them up, with all that their guests wrote",
  )


def install_image(plan: Plan, download: Download, tag: str) -> None:
  """Check a complete image, converted if it is a bundle, and make it the base image."""
  source, digest, aside = download.file.part, "", os.path.join(download.file.folder, UNPACKED)
  try:
    with discard_if_refused(download):
      if download.name == plan.bundle_asset:
        source = convert_bundle(plan, source, aside)
        digest = file_sha256(source)
      check_image(source)
    record = {**asset_record(download, tag, digest), "bytes": os.path.getsize(source)}
    with instances_lock(instances_dir(plan.cache)):
      if os.path.exists(plan.base):
        check_unused(plan)
      drop_checkpoints(plan, str(record["sha256"]))
      publish_with_record(source, plan.base, record, 0o444)
  finally:
    remove_tree(aside)
  download.file.remove()


def no_such_image(plan: Plan, releases: Releases) -> QvmError:
  """The error for a version that no release has, with what there is instead."""
  guest = plan.guest
  images = images_in(guest.os, releases.all(image_repo(guest.os)))
  versions = [image.version for image in images if image.arch == guest.arch]
  if plan.version in versions and can_unzstd():
    return QvmError(
      f"a release names {guest.title} {plan.version} for {guest.arch}, but the server has it not",
      f"see {releases.net.releases}/{image_repo(guest.os)}/releases",
    )
  if plan.version in versions:
    return QvmError(
      f"{plan.bundle_asset} takes zstd to unpack, and no release has a qcow2", ZSTD_HINT
    )
  near = difflib.get_close_matches(plan.version, versions, 3, 0.5)
  return QvmError(
    f"there is no {guest.title} {plan.version} for {guest.arch}"
    + (f"; the nearest: {', '.join(near)}" if near else ""),
    f"there are {', '.join(versions)}" if versions else "no release names any version for it",
  )


def in_parallel(net: Net, jobs: Sequence[Callable[[], None]]) -> None:
  """Run the jobs at the same time; the first failure is raised and ends the others.

  The threads are daemons, and the main thread only waits: a signal ends qvm at once, and what
  has been downloaded stays for the next run.
  """
  ended = threading.Event()
  futures = [Future(job, ended.set) for job in jobs]
  left = list(futures)
  try:
    while left:
      ended.wait(0.2)  # so often is the progress drawn
      ended.clear()
      for future in [each for each in left if each.done]:
        left.remove(future)
        future.result()
      progress.show()
  except BaseException as error:
    net.cancelled.set()
    if isinstance(error, Exception):  # no signal: let the others put away what they have in hand
      until = time.monotonic() + 1
      for future in futures:
        future.thread.join(max(0.0, until - time.monotonic()))
    raise


def fetch_missing(plan: Plan, net: Net, image: bool = True) -> None:
  """Download at the same time whatever the plan needs and the cache has not; else ask nothing."""
  releases = Releases(net)
  jobs: List[Callable[[], None]] = []

  def tools() -> None:
    if not plan.own_qemu:
      releases.once(("", "qemu-img"), lambda: fetch_qemu_img(plan, releases))

  if plan.refresh or not os.path.isfile(tree_program(plan)):
    jobs.append(lambda: fetch_qemu(plan, releases))
  if not plan.own_qemu and (plan.refresh or not os.path.isfile(plan.qemu_img)):
    jobs.append(tools)
  if image and (plan.refresh or not os.path.isfile(plan.base)):
    jobs.append(lambda: fetch_image(plan, releases, tools))
  if jobs:
    in_parallel(net, jobs)


def check_base(plan: Plan) -> None:
  """Refuse a base image that is unsafe, or not as long as it was when it came."""
  check_image(plan.base)
  noted, size = record_of(plan.base).get("bytes"), os.path.getsize(plan.base)
  if isinstance(noted, int) and noted != size:
    raise QvmError(
      f"the base image {plan.base} is damaged: it has {size} bytes instead of {noted}",
      "put the right file back, or delete it and pull it again",
    )


# ---- Instances ----------------------------------------------------------------------------------


class Instance(NamedTuple):
  """What NAME.json says of an instance; ssh is where it listens while it runs.

  While its base image has not all come, release and validator say which it is.
  """

  name: str
  os: str
  version: str
  arch: str
  base_sha256: str = ""
  ssh: str = ""
  release: str = ""
  validator: str = ""


def note_holder(fd: int, program: str, pid: int) -> None:
  """Write into a lock file who holds it, for people; the lock itself decides."""
  with contextlib.suppress(OSError):  # a full disk must not keep `rm` from freeing some
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{program} process {pid}\n".encode(), 0)


def holder(files: Files) -> str:
  """Who holds an instance's lock, as noted in it."""
  try:
    with open(files.lock, "rb") as file:
      return printable(file.read(100).decode("ascii", "replace").strip()) or "unknown process"
  except OSError:
    return "unknown process"


def holder_pid(files: Files) -> int:
  """The process that holds an instance's lock, as noted in it; 0 when that cannot be read."""
  match = re.search(r"process ([0-9]+)", holder(files))
  return int(match.group(1)) if match else 0


def take_instance(files: Files) -> int:
  """Take an instance's lock; QvmError names the process that has it."""
  with instances_lock(files.folder):
    fd = try_lock(files.lock, lambda: False)
    if fd is None:
      raise RunningError(
        f"the instance {files.name} is running already ({holder(files)})",
        "use another --name, or --rm, for a second machine",
      )
    note_holder(fd, "qvm", os.getpid())
    return fd


def wait_released(files: Files, seconds: float) -> bool:
  """Wait until nobody holds the instance's lock any more."""
  deadline = time.monotonic() + seconds
  while True:
    with instances_lock(files.folder):
      if not is_locked(files.lock):
        return True
    if time.monotonic() >= deadline:
      return False
    time.sleep(0.1)


def read_instance(files: Files) -> Instance:
  """The record of an instance; QvmError when it is gone or damaged."""
  value = read_json(files.record)
  texts = {key: value.get(key, "") for key in Instance._fields}
  sound = all(isinstance(text, str) for text in texts.values()) and texts["name"] == files.name
  if not sound or not all(texts[key] for key in ("os", "version", "arch")):
    raise QvmError(
      f"the record of the instance {files.name} is missing or damaged: {files.record}",
      f"its disk is untouched; `qvm rm {files.name}` would delete it",
    )
  return Instance(**texts)


def known_instance(files: Files) -> Instance:
  """The record of an instance or checkpoint, with question marks where it is damaged."""
  try:
    return read_instance(files)
  except QvmError:
    return Instance(files.name, "?", "?", "?")


def remove_instance(files: Files, keep_log: bool = False) -> None:
  """Delete the files of an instance whose lock the caller holds; the --rm mark goes last.

  A console log is kept where it is all that tells why the rest is gone.
  """
  with signals.hold():
    drop_socket(socket_of(files.disk))
    for suffix in (
      ".qcow2",
      ".qcow2.tmp",
      ".json",
      ".json.tmp",
      ".console.log",
      ".known_hosts",
      ".known_hosts.old",
      ".keys",
      ".ephemeral",
    ):
      if suffix != ".console.log" or not keep_log:
        remove_file(files.path(suffix))


def unfinished_checkpoints(cache: str) -> List[str]:
  """The parts of checkpoints whose qvm was killed while it made them; to be asked in the gate."""
  found = []
  for path in paths_in(cache, "warm"):
    stem, suffix = os.path.splitext(re.sub(r"\.json\.tmp\Z", ".tmp", path))
    loose = suffix in (".tmp", ".lock") or not os.path.exists(stem + ".json")
    if loose and suffix in (*CHECKPOINT_PARTS, ".tmp", ".lock") and not is_locked(stem + ".lock"):
      found.append(path)
  return found


def sweep(cache: str) -> None:
  """Delete the --rm overlays whose qvm and QEMU were killed."""
  if not os.access(instances_dir(cache), os.W_OK):
    return
  for name in instance_names(cache, ".ephemeral"):
    files = instance_files(cache, name)
    with instances_lock(files.folder):
      fd = try_lock(files.lock, lambda: False)
    if fd is not None:
      if os.path.exists(files.mark):
        remove_instance(files)
      drop_lock(fd, files.lock)
  if names_in(cache, "warm"):  # else there is nothing to take the gate for
    with instances_lock(instances_dir(cache)):
      for path in unfinished_checkpoints(cache):
        remove_file(path)


def check_instance(plan: Plan, files: Files) -> None:
  """Refuse to run an existing instance as something else, or on another base image."""
  if not os.path.lexists(files.disk):
    return
  if plan.ephemeral:
    raise QvmError(
      f"there is an instance {files.name} already, which --rm would throw away",
      "choose another --name, or leave --name out",
    )
  mine = read_instance(files)
  if (mine.os, mine.version, mine.arch) != (plan.guest.os, plan.version, plan.guest.arch):
    raise QvmError(
      f"the instance {files.name} is {mine.os} {mine.version} on {mine.arch}, "
      f"not {plan.guest.os} {plan.version} on {plan.guest.arch}",
      "choose another --name",
    )
  streamed = is_streamed(files.disk)
  if not os.path.isfile(plan.base):
    if streamed:
      return  # it is to be completed
    raise QvmError(
      f"the instance {files.name} needs its base image {plan.base}, which is gone",
      f"put the file back; or give up what the guest wrote: qvm rm {files.name}",
    )
  record = record_of(plan.base)
  digest = record.get("sha256")
  other = mine.base_sha256 and digest and mine.base_sha256 != digest
  if other or (streamed and not mine.base_sha256 and mine.validator != record.get("validator")):
    raise other_base(files, plan.base, f"sha256 {mine.base_sha256}" if other else mine.release)


def other_base(files: Files, base: str, old: str) -> QvmError:
  """The error for an overlay that does not fit its base image."""
  return QvmError(
    f"the instance {files.name} was made on another base image than {base} now is",
    f"put the old file ({old}) back; or give up what the guest wrote: qvm rm {files.name}",
  )


class Source(NamedTuple):
  """A base image that still comes: where it is served, and which it is; digest if that is known."""

  socket: str
  release: str
  validator: str
  digest: str


def record_instance(plan: Plan, files: Files, ssh: str, source: Optional[Source] = None) -> None:
  """Note what the instance is and where it listens in this run."""
  release = validator = ""
  if source:
    digest, release, validator = source.digest, source.release, source.validator
  elif os.path.exists(files.disk) and not is_streamed(files.disk):
    digest = read_instance(files).base_sha256
  else:
    digest = str(record_of(plan.base).get("sha256") or "")
  guest = plan.guest
  instance = Instance(
    files.name, guest.os, plan.version, guest.arch, digest, ssh, release, validator
  )
  write_json(files.record, dict(instance._asdict()))


def backing_name(plan: Plan, path: str) -> str:
  """How an overlay names what it lies on: by a relative path, so that the cache may be moved."""
  return os.path.relpath(path, os.path.dirname(plan.disk))


def make_overlay(plan: Plan, backing: str, locks: Sequence[int]) -> None:
  """Make the instance's disk, an overlay on what backing names, if there is none.

  One that was begun while its base image came is put on what there is now; its data stay.
  """
  if os.path.lexists(plan.disk):
    if is_streamed(plan.disk):
      drop_socket(socket_of(plan.disk))
      rebase = [plan.qemu_img, "rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2"]
      run_program([*rebase, plan.disk], locks)
    return
  aside = plan.disk + ".tmp"
  remove_file(aside)
  create = [plan.qemu_img, "create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", aside]
  run_program(create, locks)  # an orphaned qemu-img still holds the instance
  os.replace(aside, plan.disk)


class Row(NamedTuple):
  """One line of `qvm list`."""

  name: str
  os: str
  version: str
  arch: str
  state: str
  ssh: str
  size: int  # bytes on disk
  ephemeral: bool
  base: int  # per cent of the base image that are there


def list_instances(cache: str) -> List[Row]:
  """All instances that have a disk, by name; then the checkpoints."""
  if not os.path.isdir(instances_dir(cache)):
    return []
  rows = []
  with instances_lock(instances_dir(cache)):
    for name in instance_names(cache, ".qcow2"):
      files = instance_files(cache, name)
      running = is_locked(files.lock)
      it = known_instance(files)
      ssh = it.ssh if running and not holder(files).startswith("qvm") else ""
      state = "running" if running else "stopped"
      try:
        size, ephemeral = tree_size(files.disk), os.path.exists(files.mark)
      except FileNotFoundError:  # a --rm run has just ended
        continue
      base = base_share(cache, files.disk)
      rows.append(Row(files.name, it.os, it.version, it.arch, state, ssh, size, ephemeral, base))
    for files in checkpoints(cache):
      it = known_instance(files)
      size = sum(map(tree_size, checkpoint_paths(files)))
      rows.append(Row(files.name, it.os, it.version, it.arch, "checkpoint", "", size, False, 100))
  return rows


def base_share(cache: str, disk: str) -> int:
  """How many per cent of an overlay's base image are there."""
  name = os.path.basename(base_of(disk))
  if not is_streamed(disk) or os.path.isfile(os.path.join(cache, "base", name)):
    return 100
  other = OtherDownload(os.path.join(cache, "downloads", name), name)
  done, total = other.done, other.total
  return min(100, 100 * done // total) if total else 0


# ---- QEMU command -------------------------------------------------------------------------------

CPU_MASK = "amx-tile=off,amx-int8=off,amx-bf16=off,la57=off"


class HostFacts(NamedTuple):
  """What was found out before the start and decides on adjustments."""

  address: Address
  linaro: bool  # the unpacked QEMU has a real linaro_uefi.fd
  mask_cpu: bool  # KVM would show the guest CPU features that crash it
  keys: str = ""  # the disk with the key that may log in; empty: none is wanted


class Adjustment(NamedTuple):
  """One value of a table's option that is replaced by another."""

  option: str
  old: str
  new: str


def adjustments(options: Options, guest: Guest, facts: HostFacts) -> List[Adjustment]:
  """All the ways in which what runs differs from the table; README.md says why."""
  address = facts.address
  changes = [
    Adjustment("-netdev", "hostfwd=tcp::2847-", f"hostfwd=tcp:{address.host}:{address.port}-"),
    Adjustment("-machine", "accel=hvf:kvm:tcg", "accel=" + options.accel),
    Adjustment("-m", "6G", options.memory),
    Adjustment("-smp", "2", options.cpus),
  ]
  if "linaro_uefi.fd" in guest.table and not facts.linaro:
    changes.append(Adjustment("-bios", "linaro_uefi.fd", "uefi.fd"))
    changes.append(Adjustment("-machine", "type=virt,", "type=virt,acpi=off,"))
  if guest.arch == "x86-64" and facts.mask_cpu:
    changes.append(Adjustment("-cpu", "max", "max," + CPU_MASK))
  return changes


def table_rows(table: str) -> List[List[str]]:
  """A table as rows of an option and its value, the program first."""
  return [line.split() for line in table.strip().splitlines()]


def adjusted(rows: List[List[str]], changes: Iterable[Adjustment]) -> List[List[str]]:
  """The rows with the changes made; each must find just one place."""
  result = [list(row) for row in rows]
  for change in changes:
    places = [row for row in result if row[0] == change.option and change.old in row[-1]]
    assert len(places) == 1, f"{change} stands {len(places)} times"
    places[0][-1] = places[0][-1].replace(change.old, change.new, 1)
  return result


def qemu_command(plan: Plan, options: Options, facts: HostFacts) -> List[str]:
  """The command line that runs the guest.

  In QEMU's option strings a comma within a value is written twice; -bios takes a plain path.
  """
  rows = adjusted(table_rows(plan.guest.table), adjustments(options, plan.guest, facts))
  if facts.keys and plan.guest.keys:
    rows += table_rows(plan.guest.keys.table)
  words = [plan.qemu]
  plain = {"SHARE": plan.share, "DISK": plan.disk, "KEYS": facts.keys}
  doubled = {key: path.replace(",", ",,") for key, path in plain.items()}
  for row in rows[1:]:
    words += [fill(word, plain if row[0] == "-bios" else doubled) for word in row]
  return words + list(options.qemu_args)


def fill(word: str, paths: Dict[str, str]) -> str:
  """A word of a table with the paths in place of SHARE, DISK and KEYS."""
  return re.sub(r"\b(SHARE|DISK|KEYS)\b", lambda match: paths[match.group()], word)


def wants_key(guest: Guest, release: str) -> bool:
  """Whether an image of that release lets nobody in without a key; unknown counts as newest."""
  keys = guest.keys
  return bool(
    keys and (not keys.until or release and version_key(release) < version_key(keys.until))
  )


def has_linaro(share: str) -> bool:
  """Whether there is a Linaro firmware that can be one: v1.1.0 holds an HTML page in its place."""
  path = os.path.join(share, "linaro_uefi.fd")
  try:
    with open(path, "rb") as file:
      return os.path.getsize(path) >= 1 << 19 and not looks_like_html(file.read(512))
  except OSError:
    return False


def needs_cpu_mask(cpuinfo: str, kvm: str) -> bool:
  """Whether KVM on this CPU shows guests AMX or LA57, which older BSD kernels do not survive."""
  try:
    with open(cpuinfo, errors="replace") as file:
      flags = next((line.split() for line in file if line.startswith("flags")), [])
  except OSError:
    return False
  return ("amx_tile" in flags or "la57" in flags) and os.access(kvm, os.R_OK | os.W_OK)


# ---- Console ------------------------------------------------------------------------------------

KEY_HELP = (
  "Ctrl-A x ends the machine at once, like pulling its plug",
  "Ctrl-A h shows these keys",
  "Ctrl-A Ctrl-A sends Ctrl-A; every other key goes to the guest",
)
# Private modes of terminals (xterm's ctlseqs) that guests change and people stumble over.
MODES_ON = (7, 25)  # line wrap, cursor
MODES_OFF = (1, 47, 1000, 1002, 1003, 1004, 1006, 1047, 1049, 2004)  # keys, screens, mouse, paste
TAIL_BYTES = 8192  # bytes of QEMU's last words that are kept
DISK_FULL = "the disk is full: QEMU has stopped the guest; free some space and start it again"


@contextlib.contextmanager
def terminal_kept() -> Iterator[None]:
  """Give the terminal back as it was, also after a QEMU that was killed and left it raw."""
  before, flags = None, 0
  with contextlib.suppress(termios.error, OSError):
    if os.tcgetpgrp(0) == os.getpgrp():  # in the background it is not ours to change
      before, flags = termios.tcgetattr(0), fcntl.fcntl(0, fcntl.F_GETFL)
  try:
    yield
  finally:
    report.newline = "\n"
    if before:
      with contextlib.suppress(termios.error, OSError):
        fcntl.fcntl(0, fcntl.F_SETFL, flags)
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def is_interactive() -> bool:
  """Whether a person sits at a terminal in front of us."""
  try:
    return os.isatty(0) and os.isatty(1) and os.tcgetpgrp(0) == os.getpgrp()
  except OSError:
    return False


class Keyboard:
  """Parts what is typed into what the guest gets and the commands behind Ctrl-A."""

  def __init__(self) -> None:
    self.prefix = False

  def feed(self, typed: bytes) -> Tuple[bytes, str]:
    """The bytes for the guest, and the command letters among them; x ends both."""
    sent, commands = bytearray(), ""
    for byte in typed:
      if not self.prefix:
        self.prefix = byte == 1
        sent += b"" if self.prefix else bytes([byte])
        continue
      self.prefix = False
      if byte == 1:
        sent.append(byte)
      elif byte in b"xX":
        return bytes(sent), commands + "x"
      elif byte in b"hH?":
        commands += "h"
    return bytes(sent), commands


class Modes:
  """Notes which modes of the terminal the guest has changed, so that they can be undone."""

  def __init__(self) -> None:
    self.rest = b""  # the start of a sequence that a read cut in two
    self.changed: Set[int] = set()

  def watch(self, shown: bytes) -> None:
    text = self.rest + shown
    for numbers, switch in re.findall(rb"\x1b\[\?([0-9;]{1,30})([hl])", text):
      for number in (int(n) for n in numbers.split(b";") if n):
        if number in MODES_ON + MODES_OFF:
          usual = (number in MODES_ON) == (switch == b"h")
          (self.changed.discard if usual else self.changed.add)(number)
    start = text.rfind(b"\x1b", max(0, len(text) - 40))
    self.rest = text[start:] if start >= 0 else b""

  def undo(self) -> bytes:
    """What sets the changed modes and the colours back."""
    on = b"".join(
      b"\x1b[?%d%s" % (n, b"h" if n in MODES_ON else b"l") for n in sorted(self.changed)
    )
    return on + b"\x1b[0m"


KVM_DENIED = "/dev/kvm is there but may not be used"
KVM_FIX = "sudo usermod -aG kvm $USER, then log in again; on a CI runner: sudo chmod o+rw /dev/kvm"
TCG_FIX = "add --accel tcg, which is slower"
# What QEMU says, what that means, and what to do about it.
CAUSES = (
  (r"kvm_\w+: Assertion", "KVM is there but broken underneath (a virtual machine in another?)",
   TCG_FIX),
  (r"initialize kvm: Permission denied", KVM_DENIED, KVM_FIX),
  (r"set up host forwarding rule", "the ssh port is taken by another program",
   "choose another with --ssh-port"),
  (r'Failed to get (shared )?"[^"]+" lock', "another QEMU uses this disk",
   "end that one first, or use another --name"),
  (r"cannot set up guest memory|Cannot allocate memory", "there is not enough memory",
   "give the guest less, such as -m 2G"),
  (r"No space left on device|Disk quota exceeded", "the disk is full",
   "free some space (qvm clean shows what can go), then run it again"),
  (r"invalid accelerator|accelerator .* not found|failed to initialize", "no accelerator works",
   "add --accel tcg, which works everywhere"),
  (r"failed to find romfile|could not load PC BIOS|Could not open .*share/qemu",
   "QEMU's firmware is incomplete", "qvm clean --all removes it; the next run fetches it again"),
)  # fmt: skip
FELL_BACK_RE = r"initialize kvm: Permission denied(.|\n)*falling back to tcg"


def explain(words: str) -> List[str]:
  """What is known about QEMU's words of failure: the cause and the fix."""
  words = re.split(r"falling back to \w+", words)[-1]  # what came before is no reason to end
  for pattern, cause, fix in CAUSES:
    if re.search(pattern, words, re.IGNORECASE):
      return [f"QEMU could not go on: {cause}", fix]
  return []


def fell_back(words: str) -> List[str]:
  """What to say when QEMU runs, but without the KVM that there is."""
  if not re.search(FELL_BACK_RE, words):
    return []
  return [f"{KVM_DENIED}: the guest is emulated, which is much slower", KVM_FIX]


class Relay:
  """Passes the bytes between QEMU's pipes and our terminal and files until QEMU ends."""

  def __init__(
    self, process: Any, interactive: bool, log: Optional[IO[bytes]], full: Callable[[], bool]
  ) -> None:
    self.process, self.interactive, self.log, self.full = process, interactive, log, full
    self.keyboard, self.modes = Keyboard(), Modes()
    self.pending = b""  # typed, but not yet taken by QEMU
    self.words = b""  # QEMU's own last words
    self.stdout_lost = False
    self.fell_back: List[str] = []

  def run(self) -> None:
    """Relay until QEMU has ended and all that it wrote is passed on."""
    out, err, keys = self.process.stdout, self.process.stderr, self.process.stdin
    sources = {stream.fileno(): stream for stream in (out, err) if stream}
    typed = {0} if self.interactive else set()
    if keys:
      os.set_blocking(keys.fileno(), False)
    told = False
    while sources:
      ended = self.process.poll() is not None
      writers = [keys.fileno()] if self.pending and keys else []
      ready, free, _ = select.select([*sources, *typed], writers, [], 0 if ended else 1.0)
      if free:
        self.type(b"")
      if 0 in ready and not self.read_keys():
        typed.clear()
      for fd in [fd for fd in ready if fd in sources]:
        chunk = os.read(fd, CHUNK_BYTES)
        if not chunk:
          del sources[fd]
        elif sources[fd] is err:
          self.complain(chunk)
        else:
          self.show(chunk)
      if ended and not ready:
        break  # another process has inherited its pipes
      if not ready and not told and self.full():
        told = True
        say(DISK_FULL)

  def read_keys(self) -> bool:
    """Handle what was typed; False at the end of the input."""
    try:
      data = os.read(0, CHUNK_BYTES)
    except OSError:
      data = b""
    sent, commands = self.keyboard.feed(data)
    self.type(sent)
    for command in commands:
      if command == "x":
        say("ending the machine")
        end_process(self.process)
      else:
        for line in KEY_HELP:
          say(line)
    return bool(data)

  def type(self, data: bytes) -> None:
    """Hand typed bytes to QEMU as far as it takes them; the rest waits."""
    self.pending += data
    try:
      while self.pending:
        self.pending = self.pending[os.write(self.process.stdin.fileno(), self.pending) :]
    except BlockingIOError:
      pass
    except OSError:
      self.pending = b""  # it has ended

  def show(self, chunk: bytes) -> None:
    """Pass on what the guest wrote, to our stdout and the log."""
    if self.log:
      try:
        self.log.write(chunk)
      except OSError as error:
        say(f"{self.log.name}: {describe(error)}; the console is logged no more")
        self.log = None
    if self.interactive:
      self.modes.watch(chunk)
    if not self.stdout_lost:
      try:
        write_all(1, chunk)
      except OSError:
        self.stdout_lost = True  # the machine goes on, as it would without us in between

  def complain(self, chunk: bytes) -> None:
    """Pass on QEMU's own words, and keep the last of them."""
    self.words = (self.words + chunk)[-TAIL_BYTES:]
    if not self.fell_back:
      self.fell_back = fell_back(self.words.decode("utf-8", "replace"))
      for line in self.fell_back:
        say(line)
    with contextlib.suppress(OSError):
      write_all(2, chunk.replace(b"\n", b"\r\n") if report.newline == "\r\n" else chunk)


def go_raw() -> None:
  """Let every key pass through our terminal untouched, Ctrl-C, Ctrl-Z and Ctrl-S included."""
  tty.setraw(0, termios.TCSADRAIN)
  report.newline = "\r\n"


def last_lines(path: str, count: int = 20, start: int = 0) -> List[str]:
  """The last lines of a console log after its first start bytes, without control characters."""
  try:
    with open(path, "rb") as file:
      file.seek(max(start, os.path.getsize(path) - 65536))
      text = file.read().decode("utf-8", "replace")
  except OSError:
    return []
  text = re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|c)", "", text).replace("\r", "")
  return [printable(line) for line in text.split("\n") if line.strip()][-count:]


def show_console(lines: Iterable[str]) -> None:
  """Show the last that a guest wrote to its console."""
  for line in lines:
    say("| " + line)


# ---- Ssh ----------------------------------------------------------------------------------------

POWER_OFF_SECONDS = 120.0  # seconds that a guest has to power itself off
KEY_LOGIN_SECONDS = 60.0  # seconds that a guest has, once ssh answers, to take over the key


class Login(NamedTuple):
  """A running instance, and where it can be logged in to."""

  files: Files
  guest: Guest
  address: Address


class LoginError(QvmError):
  """Nobody is let in; whatever was to be run has not begun."""


def reachable(address: Address) -> str:
  """The host part under which this machine reaches a forwarded port."""
  return "127.0.0.1" if address.host == "0.0.0.0" else address.host


def ssh_line(guest: Guest, address: Address) -> str:
  """The command with which a person gets in."""
  return f"ssh -p {address.port} {guest.user}@{reachable(address)}"


def has_banner(address: Address, timeout: float) -> bool:
  """Whether an ssh server answers; QEMU's forward accepts long before the guest listens."""
  try:
    with socket.create_connection((reachable(address), address.port), timeout) as link:
      link.settimeout(timeout)
      start = chunk = link.recv(4)
      while chunk and len(start) < 4 and b"SSH-".startswith(start):
        chunk = link.recv(4 - len(start))
        start += chunk
      return start == b"SSH-"
  except OSError:
    return False


def wait_for_ssh(address: Address, seconds: float, ended: Callable[[float], bool]) -> bool:
  """Wait for an ssh banner; False when the time is up or ended(pause) says that QEMU is gone."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if has_banner(address, min(3.0, deadline - time.monotonic())):
      return True
    if ended(0.3):
      return False
  return False


def program_for_ssh(name: str) -> str:
  """A program of OpenSSH's client."""
  program = find_program(name)
  if not program:
    raise LoginError(
      f"there is no {name} on PATH",
      "install OpenSSH's client (Debian: apt-get install openssh-client)",
    )
  return program


def make_key(cache: str) -> None:
  """Make the key unless it is there; to be called within the gate."""
  path = key_path(cache)
  if not os.path.isfile(path) or not os.path.isfile(path + ".pub"):
    aside = path + ".tmp"
    for old in (aside, aside + ".pub"):
      remove_file(old)
    program = program_for_ssh("ssh-keygen")
    run_program([program, "-q", "-t", "ed25519", "-N", "", "-C", "qvm", "-f", aside])
    os.replace(aside + ".pub", path + ".pub")
    os.replace(aside, path)
  os.chmod(path, 0o600)  # a copied cache may have lost that; ssh would not take it


SECTOR = 512
FAT_SECTORS = 8192  # 4 MiB: FAT12 with clusters of 8 sectors
FAT_LAYOUT = (  # Microsoft's FAT specification, section 3: what follows the jump and the name
  "<HBHBHHBHHHIIBBBI11s8s",
  SECTOR,
  8,  # sectors of a cluster
  1,  # sectors before the first FAT
  2,  # copies of the FAT
  512,  # entries of the root folder
  FAT_SECTORS,
  0xF8,  # a fixed disk
  4,  # sectors of a FAT
  63,  # sectors of a track
  255,  # heads
)


def key_disk(public: bytes, start: int) -> bytes:
  """A disk with the file KEYS on a FAT file system, up to its last byte that is not 0.

  With start, in bytes, that is the first partition of an MBR; else it fills the bare disk.
  """
  hidden = start // SECTOR
  layout = (*FAT_LAYOUT, hidden, 0, 0x80, 0, 0x29, 0x71766D, b"NO NAME    ", b"FAT12   ")
  boot = b"\xeb\x3c\x90qvm     " + struct.pack(*layout)
  fat = bytes.fromhex("f8ffff ff0f").ljust(4 * SECTOR, b"\0")  # cluster 2 ends its chain
  # A plain file of 1 January 1980, in cluster 2.
  entry = struct.pack("<11sB10xHHHI", b"KEYS       ", 0x20, 0, 0x21, 2, len(public))
  system = sealed(boot + b"\xeb\xfe") + fat + fat + entry.ljust(512 * 32, b"\0") + public
  if not start:
    return system
  # Not active, type 1 (FAT12), both its ends as block numbers only.
  row = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 1, b"\xfe\xff\xff", hidden, FAT_SECTORS)
  return sealed(bytes(446) + row).ljust(start, b"\0") + system


def sealed(sector: bytes) -> bytes:
  """A sector that ends as boot sectors and MBRs do."""
  return sector.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def write_key_disk(cache: str, files: Files, keys: KeyDisk) -> None:
  """Make the disk that hands qvm's public key to a guest; QEMU must not run."""
  make_key(cache)
  with open(key_path(cache) + ".pub", "rb") as file:
    public = file.read(4096)
  with open(files.keys, "wb") as file:
    file.write(key_disk(public, keys.start))
    file.truncate(keys.start + FAT_SECTORS * SECTOR)


def ssh_command(login: Login, log: str) -> List[str]:
  """OpenSSH's client for an instance, without the user's configuration, keys and known hosts.

  Its own words go to the file log, as does a line once it has logged in (see ssh_config(5)). It is
  to be started in the folder of the instances: no path need be quoted for it, as versions differ.
  """
  options = {
    "BatchMode": "yes",  # nobody is asked for a password
    "ConnectTimeout": "30",
    "GlobalKnownHostsFile": "/dev/null",
    "IdentitiesOnly": "yes",  # an agent's many keys would make the server hang up
    "IdentityFile": os.path.join("..", "ssh", "id_ed25519"),
    "LocalCommand": f"echo {LOGGED_IN} >>{shlex.quote(log)}".replace("%", "%%"),
    "LogLevel": "ERROR",
    "PermitLocalCommand": "yes",
    "ServerAliveCountMax": "6",  # a guest that stands still for three minutes is lost
    "ServerAliveInterval": "30",
    "StrictHostKeyChecking": "no",
    "UserKnownHostsFile": os.path.basename(login.files.known_hosts),
  }
  words = [program_for_ssh("ssh"), "-F", "/dev/null", "-E", log, "-p", str(login.address.port)]
  for name, value in options.items():
    words += ["-o", f"{name}={value}"]
  return [*words, f"{login.guest.user}@{reachable(login.address)}"]


KEY_HINT = "if its image wants a key: machines started with --detach or a command get qvm's"
LOGGED_IN = "qvm-has-logged-in"
NO_STREAMS: Dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), -3)  # DEVNULL


def in_guest(
  login: Login,
  line: str,
  use: Callable[[Any], None],
  patience: float = 0.0,
  terminal: bool = False,
  **streams: Any,
) -> int:
  """Run a line in the user's shell in the guest; returns its exit code.

  use(process) does what is to be done until ssh ends. A login that fails is tried again until
  patience seconds have passed: then LoginError. QvmError when the connection is lost.
  """
  deadline = time.monotonic() + patience
  while True:
    code, logged_in, words = ssh_once(login, line, use, terminal, streams)
    if logged_in:
      break
    if time.monotonic() >= deadline:
      who = f"{login.guest.user} at {reachable(login.address)}:{login.address.port}"
      hint = KEY_HINT if login.guest.keys and not os.path.exists(login.files.keys) else ""
      raise LoginError(f"cannot log in to {login.files.name} as {who}: {words}", hint)
    time.sleep(0.5)
  if code < 0 or code == 255 and words:
    raise QvmError(f"the connection to {login.files.name} was lost: {words or ending(code)}")
  return code


def ssh_once(
  login: Login, line: str, use: Callable[[Any], None], terminal: bool, streams: Dict[str, Any]
) -> Tuple[int, bool, str]:
  """Run ssh to its end; returns its exit code, whether it logged in, and its own words."""
  with tempfile.NamedTemporaryFile(prefix="qvm-ssh-", suffix=".log") as log:
    command = ssh_command(login, log.name)
    command[1:1] = ["-t" if terminal else "-T"]
    with contextlib.ExitStack() as stack:
      with signals.hold(), interrupts_blocked():
        env, folder = {**os.environ, "SHELL": "/bin/sh"}, login.files.folder
        process = start([*command, line], env=env, cwd=folder, **streams)
        stack.callback(close_streams, process)
        stack.callback(end_process, process)
      use(process)
      process.wait()
    words = log.read(TAIL_BYTES).decode("utf-8", "replace").split()
  logged_in = LOGGED_IN in words or 0 <= process.returncode < 255  # no space for its line
  return process.returncode, logged_in, printable(" ".join(w for w in words if w != LOGGED_IN))


def wait_for(process: Any) -> None:
  """Wait until ssh ends."""
  process.wait()


def close_streams(process: Any) -> None:
  """Close our ends of a process's pipes; what is still in them, nobody reads."""
  for stream in (process.stdin, process.stdout):
    if stream:
      with contextlib.suppress(OSError):
        stream.close()


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
  """Programs that are started meanwhile never see the terminal's Ctrl-C; we do, afterwards."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shell_line(script: str) -> str:
  """A script for /bin/sh as a line that every login shell, also csh and fish, hands over whole.

  What is not plain goes as the octal numbers that POSIX's `printf %b` knows, so that there is
  nothing to quote; in pieces, as csh's words are short.
  """
  data = os.fsencode(script)
  pieces = []
  for start in range(0, len(data), 180):
    piece = data[start : start + 180]
    plain = re.sub(rb"[^A-Za-z0-9 _./:=@+,-]", lambda match: b"\\0%03o" % match.group()[0], piece)
    pieces.append(f"'{plain.decode('ascii')}'")
  return """exec /bin/sh -c 'eval "$(printf %b "$@")"' sh """ + " ".join(pieces)


def command_script(
  command: Sequence[str], env: Mapping[str, str], folder: str, pid_file: str, first: str = ""
) -> str:
  """The script that runs a command in the guest; it ends as the command does.

  The shell stays, to make 128+N of a signal as ssh cannot, and lives through what interrupts
  the command. pid_file, if named, holds its process group meanwhile. first is a script to run
  before.
  """
  words = " ".join(map(shlex.quote, command))
  lines = ["trap : INT QUIT", *filter(None, [first])]
  if folder:
    lines += [f"cd {folder} || exit"]
  if pid_file:
    lines += [f"{{ echo $$ >{pid_file}; }} 2>/dev/null"]
  for name, value in env.items():
    lines += [f"{name}={shlex.quote(value)}; export {name}"]
  if not command:
    words = '"${SHELL:-/bin/sh}"'
  elif len(command) == 1:
    words = '"${SHELL:-/bin/sh}" -c ' + words
  lines += [words, "qvm_code=$?"]
  if pid_file:
    lines += [f"rm -f {pid_file}"]
  return "\n".join([*lines, "exit $qvm_code"])


def guest_environment(given: Sequence[str], environ: Mapping[str, str]) -> Dict[str, str]:
  """The variables for a command in the guest: those given, and CI when it is set here."""
  variables = {name: environ[name] for name in ("CI",) if name in environ}
  for text in given:
    name, equals, value = text.partition("=")
    if equals:
      variables[name] = value
    elif name in environ:
      variables[name] = environ[name]
  return variables


def noted_address(instance: Instance, files: Files) -> Address:
  """Where a running instance listens; QvmError when it does not, or its record is damaged."""
  if holder(files).startswith("qvm"):
    raise QvmError("its QEMU has not started yet")
  try:
    return parse_address(instance.ssh)
  except UsageError:
    raise QvmError(f"its record is damaged: {files.record}")


def login_of(files: Files) -> Login:
  """How to log in to a running instance; LoginError when its record does not tell."""
  try:
    instance = read_instance(files)
    guest = find_guest(instance.os, instance.arch)
    return Login(files, guest, noted_address(instance, files))
  except QvmError as error:
    raise LoginError(str(error), error.hint)


def power_off(files: Files) -> bool:
  """Ask the guest over ssh to power itself off; whether it took the order."""

  def wait(process: Any) -> None:
    process.wait(60)

  try:
    login = login_of(files)
    say(f"{files.name} is asked to power off")
    code = in_guest(login, login.guest.power_off, wait, **NO_STREAMS)
  except subprocess.TimeoutExpired:
    return True  # ssh hangs, as it may when the guest goes down
  except LoginError as error:
    say(f"{files.name} cannot be asked to power off: {error}")
    return False
  except QvmError:
    return True  # the connection may well end before the command does
  if code not in (0, 255):
    say(f"{files.name} does not power off: {login.guest.power_off} ends with exit code {code}")
  return code in (0, 255)


def stop_instance(files: Files, force: bool) -> None:
  """End a running machine: its own power-off, then SIGTERM, then SIGKILL, each said."""
  if not force and power_off(files):
    if wait_released(files, POWER_OFF_SECONDS):
      return say(f"{files.name} has powered off")
    say(f"{files.name} has not powered off in {POWER_OFF_SECONDS:g} s")
  for number, patience in (
    (signal.SIGTERM, TERM_GRACE_SECONDS + 2),
    (signal.SIGKILL, TERM_GRACE_SECONDS),
  ):
    pid = holder_pid(files)
    if not pid or wait_released(files, 0):
      break
    say(f"{files.name}: sending {number.name} to {holder(files)}")
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, number)
    if wait_released(files, patience):
      return
  if not wait_released(files, 0):
    raise QvmError(f"the instance {files.name} cannot be ended ({holder(files)})")


# ---- Sync ---------------------------------------------------------------------------------------
# A folder goes to ~/work in the guest as a tar stream, and what has changed there comes back as
# another. The guest is not trusted: nothing is written outside of the folder, whatever it sends.

ALWAYS_OUT = (".git", ".qvm-" + "[0-9a-f]" * 12)  # the latter: half files that a killed qvm left
MAX_NAMES_BYTES = 64 << 20  # bytes of the list of names that a guest may send
READY = "qvm-is-ready"  # the line after which a script reads or writes its stream


class FileStamp(NamedTuple):
  """How a file was when it was sent; one that is not so any more has been changed here."""

  mode: int
  size: int
  mtime_ns: int
  inode: int


def stamp_of(stat: os.stat_result) -> FileStamp:
  """What lstat(2) says of a file, as far as it shows changes."""
  folder = S_ISDIR(stat.st_mode)
  return FileStamp(stat.st_mode, 0 if folder else stat.st_size, 0 if folder else stat.st_mtime_ns,
              stat.st_ino)  # fmt: skip


def guest_folder(folder: str) -> str:
  """Where a folder lies in the guest, quoted for sh."""
  return '"$HOME"/work/' + shlex.quote(os.path.basename(folder))


def is_left_out(path: str, patterns: Sequence[str]) -> bool:
  """Whether a path in the folder stays where it is: patterns name it, or a folder above it."""
  parts = path.split("/")
  for pattern in patterns:
    text = pattern.rstrip("/")
    if "/" not in text:
      if any(fnmatch.fnmatchcase(part, text) for part in parts):
        return True
    elif any(
      fnmatch.fnmatchcase("/".join(parts[:n]), text.lstrip("/")) for n in range(1, len(parts) + 1)
    ):
      return True
  return False


def walk_folder(folder: str, patterns: Sequence[str], above: str = "") -> Iterator[Tuple[str, Any]]:
  """The paths below a folder, relative to it, each with what lstat(2) says; folders first."""
  with os.scandir(os.path.join(folder, above)) as entries:
    inside = sorted(entries, key=lambda entry: entry.name)
  for entry in inside:
    path = above + entry.name
    if is_left_out(path, patterns):
      continue
    yield path, entry.stat(follow_symlinks=False)
    if entry.is_dir(follow_symlinks=False):
      yield from walk_folder(folder, patterns, path + "/")


def in_utf8(name: str) -> str:
  """A name of this system as tarfile has it: its bytes read as UTF-8, whatever the locale."""
  return os.fsencode(name).decode("utf-8", "surrogateescape")


def from_utf8(name: str) -> str:
  """The reverse of in_utf8."""
  return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def tar_header(path: str, folder: str, stat: os.stat_result) -> Optional[bytes]:
  """The header of a file in a tar stream; None for what is no file, folder or symbolic link.

  ustar, which every tar reads, and GNU's form only for names and sizes that do not fit.
  """
  member = tarfile.TarInfo(in_utf8(path))
  member.mode, member.mtime = stat.st_mode & 0o777, max(0, int(stat.st_mtime))
  if S_ISREG(stat.st_mode):
    member.size = stat.st_size
  elif S_ISLNK(stat.st_mode):
    target = os.readlink(os.path.join(folder, path))
    member.type, member.linkname = tarfile.SYMTYPE, in_utf8(target)
  elif S_ISDIR(stat.st_mode):
    member.type = tarfile.DIRTYPE
  else:
    return None
  try:
    return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
  except ValueError:
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def write_tree(folder: str, patterns: Sequence[str], out: IO[bytes]) -> Dict[str, FileStamp]:
  """Write a folder as a tar stream; returns what was sent. BrokenPipeError when nobody reads."""
  sent = {}
  for path, stat in walk_folder(folder, patterns):
    header = tar_header(path, folder, stat)
    if header is None:
      say(f"{os.path.join(folder, path)} is no file, folder or link: it stays here")
      continue
    sent[path] = stamp_of(stat)
    out.write(header)
    if S_ISREG(stat.st_mode):
      write_content(os.path.join(folder, path), stat.st_size, out)
  out.write(bytes(1024))
  out.flush()
  return sent


def write_content(path: str, size: int, out: IO[bytes]) -> None:
  """Write as many bytes of a file as its header has announced, padded to whole blocks."""
  left = size
  fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
  with os.fdopen(fd, "rb", 0) as file:
    while left:
      chunk = file.read(min(left, CHUNK_BYTES))
      if not chunk:
        raise QvmError(f"{path} became shorter while it was read")
      out.write(chunk)
      left -= len(chunk)
  out.write(bytes(-size % 512))


# Folders that a command has closed are opened for the new files; tar sets their modes again. What
# is older than the mark was sent: the clock has ticked since, so that no change can be missed.
SYNC_IN = """
mkdir -p {folder} && cd {folder} || exit
find . -type d ! -perm -200 -exec chmod u+w {{}} +
echo {ready}
tar -xpf - || exit
mark=../{mark}
find . -type d -print | sort >"$mark.dirs"
touch "$mark"
n=0
while touch "$mark.tick" && [ -z "$(find "$mark.tick" -newer "$mark")" ] && [ $n -lt 3000 ]; do
  n=$((n + 1))
done
rm -f "$mark.tick"
"""
# A find without -cnewer, or a folder without a mark, gives everything. Each tar or pax goes without
# the folder's content; there may be several, one after the other. The files in a folder that was
# renamed are as old as before: folders that were not there go whole.
SYNC_OUT = """
cd {folder} || exit
mark=../{mark}
set --
! find "$mark" -cnewer "$mark" >/dev/null 2>&1 || set -- -cnewer "$mark"
options=
for each in --no-recursion '--no-unquote --no-recursion'; do
  ! tar $each -cf /dev/null . 2>/dev/null || options=$each
done
echo {ready}
if [ "$options" ]; then
  find . {prune} \\( -type f -o -type l -o -type d \\) "$@" -exec tar $options -cf - {{}} +
else
  find . {prune} \\( -type f -o -type l -o -type d \\) "$@" -exec pax -w -d -x ustar {{}} +
fi || code=$?
if [ $# -gt 0 ]; then
  find . {prune} -type d -print | sort | comm -13 "$mark.dirs" - | while IFS= read -r new; do
    case $new/ in "$last"/*) continue ;; esac
    last=$new
    [ ! -d "$new" ] || tar -cf - "$new"
  done
fi
exit ${{code:-0}}
"""
SYNC_NAMES = "cd {folder} && echo {ready} && find . -print"


def sync_script(template: str, options: Options) -> str:
  """One of the scripts for the folder that is synchronised.

  Only names go to the guest's find of which it says what we say; the rest is left out on landing.
  """
  names = [pattern.rstrip("/") for pattern in left_out(options)]
  names = [name for name in names if not re.search(r"[/\[\\]", name)]
  prune = " -o ".join("-name " + shlex.quote(name) for name in names)
  return template.format(
    folder=guest_folder(options.sync),
    mark=".qvm-" + hashed(os.path.basename(options.sync)),
    ready=READY,
    prune=f"! -name . \\( {prune} \\) -prune -o",
  )


def left_out(options: Options) -> Tuple[str, ...]:
  """The patterns of what is not synchronised: those given, .git, and the cache if it is there."""
  cache = os.path.relpath(
    os.path.realpath(cache_folder(os.environ)), os.path.realpath(options.sync)
  )
  own = () if cache.startswith("../") else ("/" + glob.escape(cache),)
  return ALWAYS_OUT + own + options.sync_exclude


def sync_in(login: Login, options: Options, patience: float) -> Dict[str, FileStamp]:
  """Copy the folder into the guest; returns what was sent."""
  sent: Dict[str, FileStamp] = {}
  begun = False

  def feed(process: Any) -> None:
    nonlocal begun
    begun = is_ready(process.stdout)
    if begun:
      with contextlib.suppress(BrokenPipeError):  # the guest says why
        sent.update(write_tree(options.sync, left_out(options), process.stdin))
    with contextlib.suppress(BrokenPipeError):
      process.stdin.close()

  with tempfile.TemporaryFile() as words:
    line = shell_line(sync_script(SYNC_IN, options))
    pipe = subprocess.PIPE
    code = in_guest(login, line, feed, patience, stdin=pipe, stdout=pipe, stderr=words)
    if code or not begun:
      raise sync_failed(f"{options.sync} cannot be copied to {login.files.name}", words, code)
  return sent


def is_ready(stream: IO[bytes]) -> bool:
  """Read up to where a script begins: what the user's shell prints at its start comes before."""
  for _ in range(1000):
    line = stream.readline(1000)
    if not line or line == READY.encode() + b"\n":
      return bool(line)
  return False


def sync_failed(problem: str, words: IO[bytes], code: int) -> QvmError:
  """The error for a copy that the guest did not make, with what it says."""
  words.seek(0)
  text = " ".join(words.read(TAIL_BYTES).decode("utf-8", "replace").split())
  return QvmError(f"{problem} ({ending(code)}): {text}")


def sync_out(login: Login, options: Options, sent: Optional[Dict[str, FileStamp]]) -> None:
  """Bring what has changed in the guest's copy of the folder."""
  problem = f"what changed in {login.files.name} cannot be brought to {options.sync}"
  pipe = subprocess.PIPE
  with Unpacker(
    options.sync, left_out(options), sent
  ) as landing, tempfile.TemporaryFile() as words:
    begun = False

    def take(process: Any) -> None:
      nonlocal begun
      begun = is_ready(process.stdout)
      if begun:
        landing.take(process.stdout)

    line = shell_line(sync_script(SYNC_OUT, options))
    code = in_guest(login, line, take, stdin=subprocess.DEVNULL, stdout=pipe, stderr=words)
    landing.finish()
    if code or not begun:
      raise sync_failed(problem, words, code)
    if options.sync_delete and sent is not None:
      names = bytearray()

      def read(process: Any) -> None:
        if is_ready(process.stdout):
          names.extend(process.stdout.read(MAX_NAMES_BYTES + 1))
        if len(names) > MAX_NAMES_BYTES:
          raise RefusedError(f"{problem}: the list of names is longer than any")

      line = shell_line(sync_script(SYNC_NAMES, options))
      code = in_guest(login, line, read, stdin=subprocess.DEVNULL, stdout=pipe, stderr=words)
      if code or not names.startswith(b".\n"):
        raise sync_failed(problem, words, code)
      landing.delete_missing(bytes(names))


class Unpacker:
  """A folder into which an untrusted tar stream is unpacked, and never out of it.

  Every step down goes through a descriptor of the folder above and follows no link. A file that
  was changed here since it was sent stays as it is; sent=None takes all that comes.
  """

  def __init__(
    self, folder: str, patterns: Sequence[str], sent: Optional[Dict[str, FileStamp]]
  ) -> None:
    self.folder, self.patterns, self.sent = folder, patterns, sent
    self.root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    self.inner, self.inner_path = os.dup(self.root), ""
    self.modes: Dict[str, int] = {}  # of folders, to be set when all is in them
    self.aside = ".qvm-" + os.urandom(6).hex()

  def __enter__(self) -> "Unpacker":
    return self

  def __exit__(self, *error: Any) -> None:
    os.close(self.inner)
    os.close(self.root)

  def take(self, stream: IO[bytes]) -> None:
    """Unpack all that comes; RefusedError for a stream that no honest tar makes."""

    class Member(tarfile.TarInfo):
      @classmethod
      def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        try:
          member = super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
          raise RefusedError(f"the guest sends what is no tar stream: {error}")
        extended = not member.isreg() and not member.isdev() and not member.isdir()
        if member.size < 0 or member.size > MAX_DISK_BYTES or extended and member.size > 1 << 20:
          raise RefusedError(f"the guest sends a tar header of {member.size} bytes")
        return member

    with contextlib.ExitStack() as stack:
      try:
        archive = stack.enter_context(
          tarfile.open(
            fileobj=stream, mode="r|", bufsize=CHUNK_BYTES, ignore_zeros=True, tarinfo=Member,
            encoding="utf-8", errors="surrogateescape",
          )
        )  # fmt: skip
      except tarfile.ReadError:
        return  # nothing came at all: the guest's own words tell why
      try:
        for member in archive:
          archive.members = []  # type: ignore[attr-defined] # or it grows with each
          self.put(archive, member)
      except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise RefusedError(f"what the guest sends is refused: {error}")

  def put(self, archive: Any, member: Any) -> None:
    """Give one member its place, unless that is out of bounds or taken."""
    member.name, member.linkname = from_utf8(member.name), from_utf8(member.linkname)
    try:
      parts = safe_name(member.name)
    except ValueError as error:
      raise RefusedError(f"the guest sends '{member.name[:200]}', which {error}")
    path = "/".join(parts)
    if not parts or is_left_out(path, self.patterns):
      return
    try:
      if not self.enter(parts[:-1]):
        return
      if member.isdir():
        self.put_folder(path, parts[-1], member.mode & 0o777)
      elif member.issym():
        self.put_link(path, parts, member.linkname)
      elif member.islnk():
        self.put_file(path, parts[-1], member, self.open_again(member.linkname))
      elif member.isreg():
        self.put_file(path, parts[-1], member, archive.extractfile(member))
      else:
        raise ValueError("is no file, folder or link")
    except ValueError as error:
      say(f"{path} stays in the guest: it {error}")
    except OSError as error:
      raise QvmError(f"{os.path.join(self.folder, path)}: {describe(error)}")

  def enter(self, parts: Sequence[str]) -> bool:
    """Open a folder, made if there is none; False when something of ours is in its place."""
    path = "/".join(parts)
    if path == self.inner_path:
      return True
    fd = os.dup(self.root)
    try:
      for n, name in enumerate(parts):
        above = "/".join(parts[: n + 1])
        try:
          if not self.is_folder(fd, name):
            if not self.make_way(fd, above, name):
              return False
            os.mkdir(name, 0o755, dir_fd=fd)
          inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        except OSError as error:
          raise QvmError(f"{os.path.join(self.folder, above)}: {describe(error)}")
        os.close(fd)
        fd = inner
      fd, self.inner, self.inner_path = self.inner, fd, path
      return True
    finally:
      os.close(fd)

  def is_folder(self, fd: int, name: str) -> bool:
    """Whether there is a folder of that name, and no link to one."""
    try:
      return S_ISDIR(os.lstat(name, dir_fd=fd).st_mode)
    except FileNotFoundError:
      return False

  def make_way(self, fd: int, path: str, name: str, for_file: bool = False) -> bool:
    """Remove what is to be replaced; False, said, when that was changed here.

    A file, which is renamed to its name, needs no more than that no folder is there.
    """
    try:
      there = os.lstat(name, dir_fd=fd)
    except FileNotFoundError:
      return True
    folder = S_ISDIR(there.st_mode)
    if self.sent is not None and self.sent.get(path) != stamp_of(there):
      say(f"{os.path.join(self.folder, path)} has changed here and in the guest: it stays as it is")
      return False
    try:
      if folder:
        os.rmdir(name, dir_fd=fd)
      elif not for_file:
        os.unlink(name, dir_fd=fd)
    except OSError as error:
      say(f"{os.path.join(self.folder, path)} is a folder here, but not in the guest: "
          f"it stays ({describe(error)})")  # fmt: skip
      return False
    return True

  def put_folder(self, path: str, name: str, mode: int) -> None:
    if not self.is_folder(self.inner, name):
      if not self.make_way(self.inner, path, name):
        return
      os.mkdir(name, 0o755, dir_fd=self.inner)
    self.modes[path] = mode

  def put_link(self, path: str, parts: List[str], target: str) -> None:
    with contextlib.suppress(OSError):
      if os.readlink(parts[-1], dir_fd=self.inner) == target:
        return
    check_link(parts, target)
    if self.make_way(self.inner, path, parts[-1]):
      os.symlink(target, parts[-1], dir_fd=self.inner)

  def open_again(self, name: str) -> IO[bytes]:
    """What a hard link leads to, which has come before it; ValueError when that is not so."""
    parts = safe_name(name)
    if not parts or is_left_out("/".join(parts), self.patterns):
      raise ValueError(f"is a link to {name[:100]}")
    fd = os.dup(self.root)
    try:
      for n, part in enumerate(parts):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        flags |= os.O_DIRECTORY if n < len(parts) - 1 else 0
        inner = os.open(part, flags, dir_fd=fd)
        os.close(fd)
        fd = inner
      if S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(os.dup(fd), "rb")
      raise ValueError(f"is a link to {name[:100]}, which is no file")
    except OSError:
      raise ValueError(f"is a link to {name[:100]}, which has not come")
    finally:
      os.close(fd)

  def put_file(self, path: str, name: str, member: Any, content: IO[bytes]) -> None:
    """Write a file aside; it takes its place when whole, and only if it brings anything new."""
    aside, mode, free = self.aside, member.mode & 0o777, free_space(self.folder)
    if member.size > free:
      raise disk_full(os.path.join(self.folder, path), member.size - free)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    fd = os.open(aside, flags, 0o600, dir_fd=self.inner)
    try:
      with contextlib.closing(content), os.fdopen(fd, "w+b") as file:
        for chunk in iter(lambda: content.read(CHUNK_BYTES), b""):
          file.write(chunk)
        file.flush()
        if not member.islnk() and file.tell() != member.size:
          raise RefusedError(f"{path} comes cut short from the guest")
        if self.is_same(name, mode, file):
          return
        os.fchmod(fd, mode)
        try:
          os.utime(fd, (member.mtime, member.mtime))
        except (OverflowError, ValueError):
          raise RefusedError(f"{path} comes with an impossible time from the guest")
      if self.make_way(self.inner, path, name, for_file=True):
        os.rename(aside, name, src_dir_fd=self.inner, dst_dir_fd=self.inner)
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(aside, dir_fd=self.inner)

  def is_same(self, name: str, mode: int, new: IO[bytes]) -> bool:
    """Whether a file is here already with that mode and content."""
    try:
      fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.inner)
    except OSError:
      return False
    try:
      there = os.fstat(fd)
      if (
        not S_ISREG(there.st_mode) or there.st_mode & 0o7777 != mode or there.st_size != new.tell()
      ):
        return False
      new.seek(0)
      return all(
        chunk == new.read(len(chunk)) for chunk in iter(lambda: os.read(fd, CHUNK_BYTES), b"")
      )
    finally:
      os.close(fd)

  def finish(self) -> None:
    """Set the modes of the folders, the innermost first."""
    for path in sorted(self.modes, reverse=True):
      if self.enter(path.split("/")):
        os.fchmod(self.inner, self.modes[path])

  def delete_missing(self, names: bytes) -> None:
    """Delete what was sent, has not been changed here, and is not named any more."""
    there = set(os.fsdecode(names).split("\n"))
    for path in sorted(self.sent or {}, reverse=True):
      gone = not all(line in there for line in ("./" + path).split("\n"))
      if gone and self.enter(path.split("/")[:-1]):
        self.make_way(self.inner, path, path.rpartition("/")[2])


def run_command(login: Login, options: Options, patience: float, first: str = "") -> int:
  """Run the command of `run` or `ssh` in the guest, or a shell; returns its exit code.

  The folder of --sync goes there before and comes back afterwards, however the command ends. The
  script first, if any, runs before all.
  """
  sent: Optional[Dict[str, FileStamp]] = None
  if options.sync and options.sync_direction != "out":
    if first:  # the time must be right before files are compared by it
      in_guest(login, shell_line(first), wait_for, patience, **NO_STREAMS)
    sent, patience, first = sync_in(login, options, patience), 0.0, ""
  code = run_line(login, options, patience, first)
  if options.sync and options.sync_direction != "in":
    try:
      sync_out(login, options, sent)
    except QvmError as error:
      raise QvmError(str(error), f"the command itself ended with exit code {code}")
  return code


def run_line(login: Login, options: Options, patience: float, first: str = "") -> int:
  """Run the command, with our stdin, stdout and stderr; a first SIGINT is handed on to it.

  At a terminal Ctrl-C gets there by itself, as any other key does.
  """
  terminal = is_interactive()
  folder = guest_folder(options.sync) if options.sync else ""
  env = guest_environment(options.env, os.environ)
  pid_file = "" if terminal else '"$HOME"/.qvm-' + os.urandom(6).hex()
  line = ""
  if options.guest_command or env or folder:
    line = shell_line(command_script(options.guest_command, env, folder, pid_file, first))

  def wait(process: Any) -> None:
    try:
      process.wait()
    except Interrupted as stop:
      if stop.signum != signal.SIGINT or terminal or not line:
        raise
      signals.again()
      try:
        interrupt = shell_line(INTERRUPT.format(pid_file))
        in_guest(login, interrupt, lambda process: process.wait(30), **NO_STREAMS)
      except LoginError:
        raise stop  # the command has not begun
      except (QvmError, subprocess.TimeoutExpired):
        pass
      process.wait()

  code = in_guest(login, line, wait, patience, terminal)
  if code == 255 and not has_banner(login.address, 10.0):
    raise QvmError(f"the connection to {login.files.name} was lost: no answer any more")
  return code


# OpenSSH's server makes each command the leader of a process group.
INTERRUPT = "read leader <{0} && rm -f {0} && kill -s INT -- -$leader"


# ---- Image server -------------------------------------------------------------------------------
# With --stream QEMU's overlay lies on a server of qvm's own, which hands out the base image while
# that is downloaded: an NBD export over a Download. It is a process of its own, so that it lives as
# long as QEMU does, whatever becomes of qvm: `qvm --serve LOCK,LIFE,LOG run --stream …`, where the
# numbers are descriptors of the instance's lock, of a pipe whose other end qvm and then QEMU hold,
# and of the console log, or -1. What it says goes to qvm as lines, its answers among them as JSON.

SERVE = "--serve"
RETRY_LATER_SECONDS = 10.0  # after the attempts are used up: a network may come back
DIGEST_SECONDS = 2.0  # that a guest's start waits for the release data: an answer takes 0.2 s


class ServerAnswer(NamedTuple):
  """What the server of an image tells qvm once; all empty: the image is there."""

  error: str = ""
  hint: str = ""
  reason: str = ""  # why the image must be downloaded first
  source: Sequence[str] = ()  # a Source


def served_at(source: Optional[Source]) -> str:
  """The backing of an overlay whose base image is served; empty where none is."""
  return f"{STREAMED}///?socket={source.socket}" if source else ""


def check_source(files: Files, source: Optional[Source]) -> None:
  """Refuse to go on with an overlay on an image that is not the one it was begun on."""
  if source and os.path.lexists(files.disk):
    mine = read_instance(files)
    same = mine.base_sha256 and mine.base_sha256 == source.digest
    if not same and mine.validator != source.validator:
      raise other_base(files, "what the server now has", mine.release)


class Stream:
  """A running server of an image, as qvm sees it."""

  def __init__(self, process: "subprocess.Popen[bytes]", life: int) -> None:
    self.process, self.life = process, life
    self.source = Source("", "", "", "")
    self.answers: queue.Queue[ServerAnswer] = queue.Queue()
    self.error_raised = False
    self.reader = threading.Thread(target=self.read_answers, daemon=True)
    self.reader.start()

  def read_answers(self) -> None:
    """Pass on what the server says, and keep its answers."""
    assert self.process.stdout
    for line in self.process.stdout:
      text = line.decode("utf-8", "replace").rstrip("\n")
      if text.startswith("{"):
        self.answers.put(ServerAnswer(**json.loads(text)))
      elif text:
        say(re.sub(r"\Aqvm: ", "", text))

  def next_answer(self) -> ServerAnswer:
    """The next answer; QvmError if it is an error, or if the server has ended."""
    while True:
      ended = not self.reader.is_alive()
      with contextlib.suppress(queue.Empty):
        answer = self.answers.get(timeout=0 if ended else POLL_SECONDS)
        if answer.error:
          self.error_raised = True
          raise QvmError(answer.error, answer.hint)
        return answer
      if ended:
        self.error_raised = True
        raise QvmError("the server of the image has ended")

  def release(self) -> None:
    """From now on the server lives as long as QEMU."""
    if self.life >= 0:
      os.close(self.life)
      self.life = -1

  def finish(self) -> None:
    """Wait for the server to end, which it does once QEMU has."""
    self.release()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(POWER_OFF_SECONDS)  # it may be checking a whole image
    end_process(self.process)
    self.reader.join(TERM_GRACE_SECONDS)
    if self.process.stdout:
      self.process.stdout.close()

  def raise_server_error(self, kind: object, error: Optional[BaseException], trace: object) -> None:
    """Exit callback: if the server failed, raise its error, because it explains QEMU's."""
    self.finish()
    failed = any(answer.error for answer in list(self.answers.queue))
    if failed and (error is None or isinstance(error, QvmError)):
      self.next_answer()
    if self.process.returncode and not failed and not self.error_raised:
      say(f"the server of the image was ended from outside ({ending(self.process.returncode)})")
      drop_socket(self.source.socket)


def start_stream(
  plan: Plan, options: Options, lock: int, log: int, stack: contextlib.ExitStack
) -> Optional[Stream]:
  """Start to serve the image that is missing; None when it cannot be, or is there now."""
  ours, life = os.pipe()
  program = os.path.abspath(sys.argv[0] if packed_code[0] else __file__)
  command = [sys.executable, program, SERVE, f"{lock},{ours},{log}", "run", "--stream"]
  command += ["--platform", plan.guest.arch, "--name", plan.name]
  command += ["--rm"] * plan.ephemeral + ["--progress"] * options.progress
  command += ["--qemu", options.qemu] * bool(options.qemu) + [plan.guest.os, plan.version]
  with signals.hold():
    try:
      process = start(
        command,
        [fd for fd in (lock, ours, log) if fd >= 0],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
    finally:
      os.close(ours)
    stream = Stream(process, life)
    stack.push(stream.raise_server_error)
  answer = stream.next_answer()
  if answer.reason:
    say(f"{answer.reason}: it is downloaded first")
  if not answer.source:
    stream.finish()
    return None
  stream.source = Source(*answer.source)
  return stream


def serve(words: Sequence[str]) -> int:
  """The whole life of an image's server; everything that goes wrong is an answer."""
  lock, life, log = map(int, words[0].split(","))
  options = parse_command_line(words[1:])
  report.progress, report.log = options.progress, log
  server = None
  try:
    plan = make_plan(options, this_host(), cache_folder(os.environ), "")
    server = Server(plan, net_from(os.environ), lock, life)
    server.run()
  except NoStream as reason:
    send_answer(ServerAnswer(reason=str(reason)))
  except (QvmError, OSError, Cancelled) as error:
    report_failure(error, getattr(error, "hint", ""))
    return EXIT_FAILED
  finally:
    if server:
      server.close()
  return 0


def send_answer(answer: ServerAnswer) -> None:
  """Send an answer to qvm."""
  write_all(1, json.dumps(answer._asdict()).encode() + b"\n")


def report_failure(error: BaseException, hint: str) -> None:
  """Tell qvm of a failure; once qvm has left, the console log."""
  try:
    send_answer(ServerAnswer(error=describe(error), hint=hint))
  except OSError:
    say(describe(error))


class Server:
  """Hands out an image that is being downloaded, and makes it the base image in the end."""

  def __init__(self, plan: Plan, net: Net, lock: int, life: int) -> None:
    self.plan, self.net, self.lock, self.life = plan, net, lock, life
    self.files = instance_files(plan.cache, plan.name)
    self.releases = Releases(net)
    self.fresh = not os.path.lexists(self.files.disk)
    self.ready = False  # whether QEMU may have been started
    self.gone = threading.Event()  # set when QEMU and qvm have ended
    self.folder = self.socket_folder = self.tag = ""
    self.fd, self.size = -1, 0  # of the image
    threading.Thread(target=self.watch_pipe, daemon=True).start()

  def watch_pipe(self) -> None:
    """Notice that nobody holds the other end of the pipe any more."""
    os.read(self.life, 1)
    if not self.ready:
      os._exit(EXIT_FAILED)
    self.gone.set()

  def run(self) -> None:
    """Serve until QEMU has ended, then see to its overlay."""
    with contextlib.ExitStack() as stack:
      downloads, name = downloads_dir(self.plan), self.plan.image_asset
      self.folder = stack.enter_context(download_lock(downloads, name))
      if os.path.isfile(self.plan.base):
        return send_answer(ServerAnswer())
      find_image(self.plan, self.releases, pinned_release(self.plan), self.begin)
      stack.callback(self.stop_fetching)
      self.check_header()
      validator = self.download.file.note.validator
      source = Source(self.listen(), self.tag, validator, self.known_digest())
      say("the guest runs while its image comes; the digest is checked when all of it is there")
      self.ready = True
      send_answer(ServerAnswer(source=source))
      if not self.wait_until_complete():
        return
    self.gone.wait()
    self.rebase_overlay()

  def begin(self, tag: str, name: str) -> None:
    """Start to fetch the image, and wait for its beginning; NotFound if it is not there."""
    repo = image_repo(self.plan.guest.os)
    url = asset_url(self.net, repo, tag, name)
    if name != self.plan.image_asset:
      check_exists(self.net, url)
      raise NoStream(f"{name} of {tag} is a bundle")
    self.tag = tag
    self.download = Download(self.net, url, name, self.folder, streamed=True)
    self.filler = threading.Thread(target=self.fill, daemon=True)
    self.filler.start()
    self.digest = Future(lambda: self.releases.digest(repo, tag, name))
    file = self.download.file
    with file.lock:
      while not self.download.error:
        if (self.download.accepted or file.complete()) and file.first_missing(0, 0) < 0:
          break
        file.lock.wait(POLL_SECONDS)
      if self.download.error:
        raise self.download.error
      self.size, self.fd = file.total or 0, os.open(file.part, os.O_RDONLY)

  def fill(self) -> None:
    """Fetch all of the image, for as long as there is a guest."""
    try:
      while not self.gone.is_set():
        try:
          return self.download.fetch()
        except (RefusedError, NotFound):
          raise
        except QvmError as error:
          if not self.ready:
            raise
          self.download.fail(error)
          self.gone.wait(RETRY_LATER_SECONDS)
    except BaseException as error:  # raised by the main thread
      self.download.abort(error)

  def check_header(self) -> None:
    """Refuse an image that is not safe, before QEMU sees it."""
    part = self.download.file.part
    self.download.check_kind(os.pread(self.fd, HEAD_BYTES, 0))
    os.truncate(part, self.size)  # its length is looked at, too
    with discard_if_refused(self.download):
      check_image(part)

  def known_digest(self) -> str:
    """The digest that the release names, if it has told it by now."""
    self.digest.thread.join(DIGEST_SECONDS)
    return str(self.digest.value or "")

  def wait_until_complete(self) -> bool:
    """Make the image the base image once all of it is there; False when it is no good."""
    try:
      while self.filler.is_alive() and not self.gone.is_set() and not self.download.error:
        self.filler.join(POLL_SECONDS)
        progress.show()
      if self.download.file.complete():
        self.filler.join()
      if self.download.error:
        raise self.download.error
      if self.download.file.complete():
        self.publish()
    except Exception as error:
      self.download.abort(error)
      self.end_machine(error)
      return False
    return True

  def publish(self) -> None:
    """Check the image, and make it the base image; its file stays open."""
    self.download.file.hash_all(self.net.cancelled)
    digest = self.digest.result()
    try:
      check_digest(self.download, digest)
    except RefusedError as error:
      raise RefusedError(f"{error}: the machine is ended")
    install_image(self.plan, self.download, self.tag)
    name = self.plan.image_asset
    say(f"{name} is there, and has the digest {digest[:16]}…" if digest else f"{name} is there")

  def stop_fetching(self) -> None:
    """Let no thread write any more, before another qvm may."""
    self.net.cancelled.set()
    self.download.file.close()

  def end_machine(self, error: Exception) -> None:
    """End the machine, and discard what was made in this run of an image that is no good."""
    hint = getattr(error, "hint", "")
    if self.fresh and not hint:
      hint = "what its guest wrote in this run is gone"
    report_failure(error, hint)
    number: int = signal.SIGTERM
    while not self.gone.wait(POLL_SECONDS):
      if holder(self.files).startswith("QEMU"):
        with contextlib.suppress(ProcessLookupError):
          os.kill(holder_pid(self.files), number)
        number = 0 if self.gone.wait(TERM_GRACE_SECONDS) else signal.SIGKILL
    if self.fresh:
      remove_instance(self.files, report.log >= 0)

  def rebase_overlay(self) -> None:
    """QEMU has ended: put a persistent overlay on the base image, if that is there."""
    if self.plan.ephemeral or not is_streamed(self.files.disk):
      return
    if not os.path.isfile(self.plan.base):
      share = base_share(self.plan.cache, self.files.disk)
      say(f"{share}% of the image of {self.files.name} are there; the next run fetches the rest")
      return
    ssh = read_instance(self.files).ssh
    with instances_lock(self.files.folder):
      check_instance(self.plan, self.files)
      make_overlay(self.plan, backing_name(self.plan, self.plan.base), (self.lock,))
      record_instance(self.plan, self.files, ssh)

  def close(self) -> None:
    """Leave no socket."""
    if self.socket_folder:
      remove_tree(self.socket_folder)

  def listen(self) -> str:
    """Open the socket, whose path must be short (104 bytes on macOS) and plain."""
    folder = tempfile.gettempdir()
    folder = folder if re.match(r"[A-Za-z0-9_./-]{1,60}\Z", folder) else "/tmp"
    drop_dead_sockets(folder)
    self.socket_folder = tempfile.mkdtemp(prefix="qvm-", dir=folder)
    path = os.path.join(self.socket_folder, "nbd")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)

    def accept() -> None:
      while True:
        link = listener.accept()[0]
        threading.Thread(target=Export(self, link).run, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return path

  def has(self, start: int, count: int) -> bool:
    """Whether bytes of the image are there."""
    return self.download.file.first_missing(*blocks_of(start, count)) < 0

  def read(self, start: int, count: int) -> Optional[bytes]:
    """Bytes of the image, once they are there; None when they cannot be had."""
    data = os.pread(self.fd, count, start) if self.download.wait_for(start, count) else b""
    return data if len(data) == count else None


# NBD's protocol, as doc/proto.md of NetworkBlockDevice/nbd tells it; all numbers are big-endian.
NBD_OPTIONS = {"name": 1, "abort": 2, "list": 3, "info": 6, "go": 7}
NBD_FLAGS = 0x0107  # has flags, read-only, flush; several connections see the same
NBD_FIXED_NEWSTYLE, NBD_NO_ZEROES = 1, 2
NBD_OPTION_REPLY_MAGIC = 0x3E889045565A9
NBD_REQUEST_MAGIC, NBD_REPLY_MAGIC = 0x25609513, 0x67446698
NBD_ACK, NBD_SERVER, NBD_INFO, NBD_UNSUPPORTED, NBD_INVALID = 1, 2, 3, 0x80000001, 0x80000003
NBD_INFO_EXPORT, NBD_INFO_BLOCK_SIZE = 0, 3
NBD_READ, NBD_WRITE, NBD_END, NBD_FLUSH = 0, 1, 2, 3
MAX_READ_BYTES = 32 << 20  # of one read: the least that a client may count on
MAX_OPTION_BYTES = 4096 + 64  # of an option: a name has at most 4096


class Export:
  """One connection of an NBD client: a read-only export of the image's bytes."""

  def __init__(self, server: Server, link: "socket.socket") -> None:
    self.server, self.link = server, link
    self.stream = link.makefile("rb")
    self.sending = threading.Lock()

  def run(self) -> None:
    """Serve until the client leaves, or says what no client says."""
    try:
      if self.agree():
        while self.answer_request():
          pass
    except (OSError, EOFError):
      pass
    finally:
      self.stream.close()
      self.link.close()

  def read_numbers(self, layout: str) -> Tuple[Any, ...]:
    """Read what struct describes."""
    return struct.unpack(">" + layout, self.read_exact(struct.calcsize(">" + layout)))

  def read_exact(self, count: int) -> bytes:
    """Read just so many bytes."""
    data = self.stream.read(count)
    if len(data) < count:
      raise EOFError
    return data

  def agree(self) -> bool:
    """The handshake; whether the client goes on to read."""
    self.link.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES))
    (client_flags,) = self.read_numbers("I")
    while True:
      magic, option, length = self.read_numbers("8sII")
      if magic != b"IHAVEOPT" or length > MAX_OPTION_BYTES:
        return False
      data = self.read_exact(length)
      if option == NBD_OPTIONS["name"]:
        padding = b"" if client_flags & NBD_NO_ZEROES else bytes(124)
        self.link.sendall(struct.pack(">QH", self.server.size, NBD_FLAGS) + padding)
        return True
      if not self.answer_option(option, data):
        return bool(option == NBD_OPTIONS["go"])

  def answer_option(self, option: int, data: bytes) -> bool:
    """Answer one option; whether others may follow."""
    if option == NBD_OPTIONS["abort"]:
      self.reply(option, NBD_ACK)
      return False
    if option == NBD_OPTIONS["list"]:
      self.reply(option, NBD_SERVER, struct.pack(">I", 0))
      self.reply(option, NBD_ACK)
    elif option not in (NBD_OPTIONS["info"], NBD_OPTIONS["go"]):
      self.reply(option, NBD_UNSUPPORTED)
    elif len(data) < 6 or int.from_bytes(data[:4], "big") > len(data) - 6:
      self.reply(option, NBD_INVALID)
    else:
      size = self.server.size
      self.reply(option, NBD_INFO, struct.pack(">HQH", NBD_INFO_EXPORT, size, NBD_FLAGS))
      sizes = (NBD_INFO_BLOCK_SIZE, 1, BLOCK_BYTES, MAX_READ_BYTES)
      self.reply(option, NBD_INFO, struct.pack(">HIII", *sizes))
      self.reply(option, NBD_ACK)
      return bool(option == NBD_OPTIONS["info"])
    return True

  def reply(self, option: int, kind: int, data: bytes = b"") -> None:
    """Send a reply to an option."""
    head = struct.pack(">QIII", NBD_OPTION_REPLY_MAGIC, option, kind, len(data))
    self.link.sendall(head + data)

  def answer_request(self) -> bool:
    """Answer one request; a read that has to wait holds up no other. False at the end."""
    magic, _, kind, handle, start, count = self.read_numbers("IHH8sQI")
    if magic != NBD_REQUEST_MAGIC or kind in (NBD_END, NBD_WRITE):
      return False  # no client writes to what is read-only, and its data would have to be read
    if kind == NBD_READ and start + count <= self.server.size and count <= MAX_READ_BYTES:
      if self.server.has(start, count):
        self.answer_read(handle, start, count)
      else:
        args = (handle, start, count)
        threading.Thread(target=self.answer_read, args=args, daemon=True).start()
    else:
      self.send(handle, 0 if kind == NBD_FLUSH else errno.EINVAL)
    return True

  def answer_read(self, handle: bytes, start: int, count: int) -> None:
    """Answer a read."""
    data = self.server.read(start, count)
    self.send(handle, errno.EIO if data is None else 0, data or b"")

  def send(self, handle: bytes, error: int, data: bytes = b"") -> None:
    """Send the answer to a request."""
    head = struct.pack(">II8s", NBD_REPLY_MAGIC, error, handle)
    with self.sending, contextlib.suppress(OSError):
      self.link.sendall(head + data)


# ---- Layers -------------------------------------------------------------------------------------
# A checkpoint is what a guest's memory, devices and disk were when it had just booted. QEMU calls
# it VM templating: the memory is a file, shared while the guest boots, private to each machine
# that starts from it afterwards. Nothing is copied; siblings share what none of them has changed.

RESUME_SECONDS = 15.0  # seconds that a machine from a checkpoint has to answer
MAX_ANSWER_BYTES = 1 << 20  # bytes of one answer of QEMU


class Warm(NamedTuple):
  """How a machine is started around a checkpoint, and the control socket's two ends."""

  files: Files  # of the checkpoint
  saving: bool  # it boots to become the checkpoint; else it starts from it
  ours: Any
  theirs: Any


@contextlib.contextmanager
def warm_of(files: Files, saving: bool) -> Iterator[Warm]:
  """A Warm with a fresh control socket, a pair that nobody else can connect to."""
  ours, theirs = socket.socketpair()
  with ours, theirs:
    ours.settimeout(RESUME_SECONDS)
    yield Warm(files, saving, ours, theirs)


def warm_command(command: Sequence[str], warm: Warm) -> List[str]:
  """QEMU's command line with what saving or restoring takes: the memory's file, and control.

  See docs/system/vm-templating.rst of QEMU; -incoming defer waits for the order to load.
  """
  words = list(command)
  words[words.index("-machine") + 1] += ",memory-backend=qvm-memory"
  size, path = words[words.index("-m") + 1], warm.files.memory.replace(",", ",,")
  share = "on" if warm.saving else "off"
  words += [
    "-object",
    f"memory-backend-file,id=qvm-memory,size={size},mem-path={path},share={share}",
  ]
  words += ["-chardev", f"socket,id=qvm-control,fd={warm.theirs.fileno()}"]
  words += ["-mon", "chardev=qvm-control,mode=control"]
  return words if warm.saving else [*words, "-incoming", "defer"]


class Control:
  """QEMU's control socket (QMP); every failure is a QvmError."""

  def __init__(self, link: Any) -> None:
    self.link, self.rest = link, b""
    self.read()  # the greeting
    self("qmp_capabilities")
    ignore = {"capability": "x-ignore-shared", "state": True}  # the memory is in its file already
    self("migrate-set-capabilities", capabilities=[ignore])

  def __call__(self, order: str, fds: Sequence[int] = (), **arguments: Any) -> Any:
    """Give an order and return its result; fds go along."""
    text = json.dumps({"execute": order, "arguments": arguments}).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
      self.link.sendmsg([text], rights)
      answer = self.read()
      while "return" not in answer and "error" not in answer:
        answer = self.read()  # events
    except OSError as error:
      raise QvmError(f"QEMU does not answer: {describe(error)}")
    if "error" in answer:
      raise QvmError(f"QEMU: {order}: {answer['error'].get('desc')}")
    return answer["return"]

  def read(self) -> Dict[str, Any]:
    """The next thing that QEMU says, one line of JSON."""
    while b"\n" not in self.rest:
      try:
        chunk = self.link.recv(CHUNK_BYTES)
      except OSError as error:
        raise QvmError(f"QEMU does not answer: {describe(error)}")
      self.rest += chunk
      if not chunk or len(self.rest) > MAX_ANSWER_BYTES:
        raise QvmError("QEMU has ended" if not chunk else "QEMU says more than can be")
    line, _, self.rest = self.rest.partition(b"\n")
    return dict(json.loads(line.decode("utf-8", "replace")))

  def accelerator(self) -> str:
    """The accelerator that is in use."""
    if self("query-kvm")["enabled"]:
      return "kvm"
    try:
      self("x-query-jit")
    except QvmError:
      return "hvf"
    return "tcg"

  @contextlib.contextmanager
  def stream(self, order: str) -> Iterator[Any]:
    """Our end of a socket over which QEMU is ordered to send, or to take, the devices' state."""
    ours, theirs = socket.socketpair()
    with ours:
      with theirs:
        self("getfd", [theirs.fileno()], fdname="qvm-state")
      ours.settimeout(RESUME_SECONDS)
      self(order, uri="fd:qvm-state")
      yield ours

  def save(self, path: str) -> None:
    """Stop the guest and write the state of its devices to a file."""
    self("stop")
    try:
      with self.stream("migrate") as link, open(path, "wb") as file:
        for chunk in iter(lambda: link.recv(CHUNK_BYTES), b""):
          file.write(chunk)
    except OSError as error:
      raise write_failure(path, 0, error)
    self.settle("query-migrate", ("setup", "active", "device", "pre-switchover"), "completed")

  def load(self, path: str) -> None:
    """Take the state of the devices from a file and let the guest go on."""
    with open(path, "rb") as file:
      content = file.read()
    try:
      with self.stream("migrate-incoming") as link:
        link.sendall(content)
    except OSError as error:
      raise QvmError(f"QEMU does not take the state: {describe(error)}")
    self.settle("query-status", ("inmigrate",), "paused")
    self("cont")

  def settle(self, question: str, passing: Sequence[str], good: str) -> None:
    """Ask until the status is none of the passing ones; QvmError unless it is the good one."""
    deadline = time.monotonic() + RESUME_SECONDS
    answer = self(question)
    while answer.get("status") in passing and time.monotonic() < deadline:
      time.sleep(0.005)
      answer = self(question)
    if answer.get("status") != good:
      why = answer.get("error-desc") or f"its status is {answer.get('status')}"
      raise QvmError(f"QEMU: {question}: {why}")


def checkpoint_key(plan: Plan, options: Options, facts: HostFacts) -> str:
  """What a checkpoint is good for, as a digest: a base image, a command line, a QEMU, this host.

  Paths, address and port may differ. Which accelerator is in use shows only once QEMU runs.
  """
  named = plan._replace(qemu="QEMU", share="SHARE", disk="DISK")
  facts = facts._replace(address=Address(), keys="KEYS" if facts.keys else "")
  tree = record_of(tree_program(plan)).get("sha256")
  own = file_sha256(plan.qemu) if plan.own_qemu or not tree else ""
  public = b""
  if facts.keys:
    with open(key_path(plan.cache) + ".pub", "rb") as file:
      public = file.read(4096)
  digest = new_sha256()
  for text in (
    *qemu_command(named, options, facts),
    *(str(record_of(plan.base).get("sha256")), str(tree), own, os.fsdecode(public)),
    *host_cpu("/proc/cpuinfo"),
  ):
    digest.update(os.fsencode(text) + b"\0")
  return str(digest.hexdigest())


def host_cpu(cpuinfo: str) -> List[str]:
  """What tells this host's CPU and kernel from others."""
  uname = os.uname()
  words = [uname.sysname, uname.release, uname.machine]
  try:
    with open(cpuinfo, errors="replace") as file:
      lines = file.read(1 << 16).split("\n\n")[0].split("\n")
  except OSError:
    return [*words, ask_program(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"])[1]]
  return words + [line for line in lines if re.match(r"model name|flags|Features|CPU p", line)]


def checkpoint_parts(files: Files) -> Dict[str, Any]:
  """Size and time of each part of a checkpoint; one that is not so any more has been changed."""
  stats = {suffix: os.stat(files.path(suffix)) for suffix in CHECKPOINT_PARTS}
  return {suffix: [stat.st_size, int(stat.st_mtime)] for suffix, stat in stats.items()}


def checkpoint_problem(files: Files, key: str) -> str:
  """Why there is no checkpoint to start from; empty when there is a sound one."""
  record = read_json(files.record)
  if record.get("key") != key:
    return "there is none yet"
  if record.get("problem"):
    return str(record["problem"])
  try:
    sound = record.get("parts") == checkpoint_parts(files)
  except OSError as error:
    return f"{error.filename}: {describe(error)}"
  return "" if sound else "its files have been changed"


def record_checkpoint(plan: Plan, files: Files, key: str, **more: Any) -> None:
  """Write a checkpoint's record, with which it is complete."""
  guest, digest = plan.guest, str(record_of(plan.base).get("sha256") or "")
  made = Instance(files.name, guest.os, plan.version, guest.arch, digest)
  write_json(files.record, {**made._asdict(), "key": key, **more}, 0o600)


def keep_checkpoint(plan: Plan, warm: Warm, key: str, process: Any) -> None:
  """Make the checkpoint of a guest that has just booted; its QEMU ends, its disk is frozen."""
  control, files = Control(warm.ours), warm.files
  accelerator = control.accelerator()
  control.save(files.state)
  with contextlib.suppress(QvmError):  # it may be gone before it answers
    control("quit")
  end_process(process)
  with instances_lock(instances_dir(plan.cache)):
    os.rename(plan.disk, files.disk)
    for suffix in CHECKPOINT_PARTS:
      with open(files.path(suffix), "rb") as file:
        os.fsync(file.fileno())
      os.chmod(files.path(suffix), 0o600)
    parts = checkpoint_parts(files)
    record_checkpoint(plan, files, key, accelerator=accelerator, parts=parts)


def resume(warm: Warm, address: Address, process: Any, seconds: float) -> None:
  """Let a machine go on from its checkpoint; QvmError when ssh does not answer in time."""
  control, made = Control(warm.ours), read_json(warm.files.record).get("accelerator")
  if control.accelerator() != made:
    raise QvmError(f"it was made with {made}, and QEMU now uses {control.accelerator()}")
  control.load(warm.files.state)

  def ended(seconds: float) -> bool:
    time.sleep(min(seconds, 0.02))
    return process.poll() is not None

  if not wait_for_ssh(address, seconds, ended):
    raise QvmError(f"ssh does not answer in {seconds:g} s")


def refresh_script(guest: Guest) -> str:
  """What a guest from a checkpoint must be told: the time, and something random of its own."""
  seed = "".join(f"\\0{byte:03o}" for byte in os.urandom(64))
  root = "sudo " if guest.set_clock.startswith("sudo ") else ""
  clock = time.strftime(guest.set_clock, time.gmtime(time.time() + 0.5))
  problem = "qvm: the clock of the guest cannot be set"
  lines = [
    f"printf %b '{seed}' | {root}sh -c 'cat >/dev/random' 2>/dev/null",
    f"{clock} >/dev/null 2>&1 || echo '{problem}' >&2",
  ]
  return "\n".join(lines)


def refresh_guest(login: Login) -> None:
  """Tell a guest from a checkpoint the time; that it cannot be told is said, and no more."""
  try:
    code = in_guest(login, shell_line(refresh_script(login.guest)), wait_for, **NO_STREAMS)
    problem = ending(code) if code else ""
  except QvmError as error:
    problem = str(error)
  if problem:
    say(f"the clock of {login.files.name} stands where its checkpoint was made: {problem}")


# ---- Machine ------------------------------------------------------------------------------------


def plan_from(options: Options, net: Net) -> Plan:
  """The plan for this command on this host with this environment."""
  cache, host = cache_folder(os.environ), this_host()
  guest = find_guest(options.operands[0].lower(), options.platform or host.arch)
  if "".join(options.operands[1:]).lower() in ("", "latest"):
    check_host(host, guest, options.qemu)  # before any request
    version = latest_version(options, net, guest, cache)
    options = options._replace(operands=(guest.os, version))
  return make_plan(options, host, cache, os.urandom(3).hex())


def latest_version(options: Options, net: Net, guest: Guest, cache: str) -> str:
  """The newest version for a CPU; `run` takes the newest cached when no server can be asked."""
  cached = [image.version for image in cached_images(cache, guest.os) if image.arch == guest.arch]
  cached = [version for version in cached if not is_candidate(version)]
  if options.dry_run:
    if not cached:
      raise UsageError("--dry-run asks no server: name the version, as in freebsd 15.1")
    return cached[0]
  fallback = cached if options.command == "run" else []
  try:
    releases = Releases(impatient(net) if fallback else net).all(image_repo(guest.os))
  except QvmError as error:
    if not fallback:
      raise
    say(f"{error}; taking the newest cached version, {fallback[0]}")
    return fallback[0]
  images = [image for image in images_in(guest.os, releases) if image.arch == guest.arch]
  versions = [image.version for image in images if not is_candidate(image.version)]
  if not versions:
    raise QvmError(f"no release of {guest.title} has an image for {guest.arch}")
  say(f"the newest {guest.title} for {guest.arch} is {versions[0]}")
  return versions[0]


def memory_bytes(memory: str) -> int:
  """A guest's memory as -m has it, in bytes; a number alone is megabytes."""
  return int(memory.rstrip("MGT")) << {"M": 20, "G": 30, "T": 40}.get(memory[-1], 20)


def memory_warning(memory: str, available: Optional[int]) -> str:
  """A warning when a guest's memory is more than the host has to spare, both in bytes."""
  wanted = memory_bytes(memory)
  if available is None or wanted <= available:
    return ""
  return (
    f"the guest gets {megabytes(wanted)} of memory, but only {megabytes(available)} are free: "
    "if it is killed or slow, give it less with -m"
  )


def bind(kind: int, address: Address) -> Any:
  """A socket of this kind at an address, or None when another one is there."""
  taken = socket.socket(socket.AF_INET, kind)
  try:
    if kind == socket.SOCK_STREAM:
      taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU's user network does
    taken.bind((address.host, address.port))
  except OSError as error:
    taken.close()
    if error.errno == errno.EADDRNOTAVAIL:
      raise QvmError(f"{address.host} is not an address of this machine (--ssh-port)")
    if error.errno == errno.EACCES:
      raise QvmError(f"port {address.port} needs root; choose one above 1023")
    return None
  return taken


def reserve_port(wanted: Address, stack: contextlib.ExitStack) -> Tuple[Address, int]:
  """A free port, with the descriptor of a lock that keeps every other qvm away from it.

  The lock is the UDP port of the same number, which nothing is ever sent to: the system gives it
  to one process, whatever cache and user that has, and takes it back when QEMU has ended.
  """
  for port in range(wanted.port, wanted.port + 1 if wanted.chosen else 65536):
    address = wanted._replace(port=port)
    lock = bind(socket.SOCK_DGRAM, address)
    probe = lock and bind(socket.SOCK_STREAM, address)
    if probe:
      probe.close()
      stack.callback(lock.close)
      return address, lock.fileno()
    if lock:
      lock.close()
  raise QvmError(
    f"port {wanted.port} of {wanted.host} is taken (--ssh-port)",
    "choose another, or leave --ssh-port out to get a free one",
  )


def host_facts(plan: Plan, options: Options, address: Address, release: str = "") -> HostFacts:
  """Look at what decides on adjustments; release is that of an image that still comes."""
  mask = "kvm" in options.accel.split(":") and needs_cpu_mask("/proc/cpuinfo", "/dev/kvm")
  log_in = options.detach or options.guest_command or options.warm
  release = release or str(record_of(plan.base).get("release") or "")
  keyed = log_in and wants_key(plan.guest, release)
  keys = instance_files(plan.cache, plan.name).keys if keyed else ""
  return HostFacts(address, has_linaro(plan.share), mask, keys)


class Launch(NamedTuple):
  """All that starting a machine takes; the stack ends it."""

  plan: Plan
  options: Options
  address: Address
  locks: Tuple[int, ...]  # QEMU inherits them, so that they last as long as it does
  streams: Dict[str, Any]  # QEMU's stdin, stdout and stderr
  stack: contextlib.ExitStack
  stream: Optional[Stream] = None  # what serves the base image while that comes


def prepare(
  plan: Plan,
  options: Options,
  net: Net,
  stream: Optional[Stream],
  fds: Tuple[int, int],
  stack: contextlib.ExitStack,
) -> Optional[Stream]:
  """Download what is missing, with --stream all but the image if that can come meanwhile."""
  if not stream and (not options.stream or os.path.isfile(plan.base)):
    fetch_missing(plan, net)
    return None
  fetch_missing(plan, net, image=False)
  stream = stream or start_stream(plan, options, *fds, stack)
  if not stream:
    fetch_missing(plan, net)
  return stream


def open_log(options: Options, files: Files, stack: contextlib.ExitStack) -> Optional[IO[bytes]]:
  """The file for the console, if one was asked for; a detached machine has one of its own."""
  if options.console_log:
    return stack.enter_context(open(options.console_log, "ab", buffering=0))
  if options.detach or options.guest_command:
    if not os.path.lexists(files.disk):
      stack.callback(remove_stray_log, files)
    return stack.enter_context(open(files.console, "wb", buffering=0))
  return None


def remove_stray_log(files: Files) -> None:
  """A run that got no disk leaves no console log."""
  if not os.path.lexists(files.disk):
    remove_file(files.console)


def qemu_streams(options: Options, log: Optional[IO[bytes]]) -> Dict[str, Any]:
  """What QEMU's stdin, stdout and stderr are: pipes to us only where we have something to do."""
  if options.detach or options.guest_command:
    return background_streams(log)
  streams = {"stderr": subprocess.PIPE, "bufsize": 0}
  if is_interactive():
    return {**streams, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  return {**streams, "stdout": subprocess.PIPE} if log else streams


def background_streams(log: Optional[IO[bytes]]) -> Dict[str, Any]:
  """The streams of a QEMU that nobody looks at."""
  streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
  return {**streams, "start_new_session": True}


def relay_console(plan: Plan, process: Any, log: Optional[IO[bytes]], nudge: bool) -> int:
  """Relay the console until QEMU ends; returns its exit code, 128+N after signal N.

  nudge types a newline first, so that a prompt shows that is there already.
  """
  folder = os.path.dirname(plan.disk)
  relay = Relay(process, bool(process.stdin), log, lambda: disk_is_full(folder))
  try:
    if relay.interactive:
      go_raw()
      say("Ctrl-A x ends the machine, Ctrl-A h shows the keys; all others go to the guest")
      relay.pending = b"\r" if nudge else b""
    relay.run()
    process.wait()
  finally:
    if relay.interactive:
      with contextlib.suppress(OSError):
        write_all(1, relay.modes.undo())
  causes = explain(relay.words.decode("utf-8", "replace")) if process.returncode else []
  if process.returncode < 0 and not causes:
    causes = [f"QEMU has been ended from outside ({ending(process.returncode)})"]
  for line in causes:
    say(line)
  return int(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def leave_running(launch: Launch, process: Any, log_start: int, warm: bool) -> int:
  """Wait until ssh answers, then leave the machine to itself; QvmError when it dies before."""
  plan, options, address = launch.plan, launch.options, launch.address
  verb = "runs" if warm else "boots"
  say(f"{plan.name} {verb} in the background, its console goes to {console_of(plan, options)}")
  answers = await_ssh(launch, process, log_start)
  launch.stack.pop_all()  # QEMU has the locks, and so has what serves its base image
  if not answers:
    say(f"ssh has not answered in {options.boot_timeout:g} s; the machine goes on")
  emit(plan.name)
  emit(ssh_line(plan.guest, address))
  return 0


def console_of(plan: Plan, options: Options) -> str:
  """The file that gets the console of a machine in the background."""
  return options.console_log or instance_files(plan.cache, plan.name).console


def await_ssh(launch: Launch, process: Any, log_start: int) -> bool:
  """Wait until ssh answers; False when it does not in time, QvmError when the machine ends."""
  plan, options = launch.plan, launch.options

  def ended(seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(seconds)
    return process.returncode is not None

  answers = wait_for_ssh(launch.address, options.boot_timeout, ended)
  lines = last_lines(console_of(plan, options), start=log_start)
  if process.poll() is not None:
    show_console(lines)
    problem = f"the machine {plan.name} ended before ssh answered ({ending(process.returncode)})"
    raise QvmError(problem, ": ".join(explain("\n".join(lines))))
  for line in fell_back("\n".join(lines)):
    say(line)
  return answers


def run_and_end(launch: Launch, process: Any, log_start: int, warm: bool) -> int:
  """Run a command in a machine that has just been started; returns its exit code.

  A persistent instance is powered off then; whatever is left of the machine ends with the stack.
  """
  plan, options, address = launch.plan, launch.options, launch.address
  files = instance_files(plan.cache, plan.name)
  log, start = console_of(plan, options), time.monotonic()
  if not warm:
    say(f"{plan.name} boots, its console goes to {log}")
  answers = await_ssh(launch, process, log_start)
  try:
    if not answers:
      raise QvmError(
        f"ssh has not answered in {options.boot_timeout:g} s; the machine is ended",
        "--boot-timeout gives it longer",
      )
    left = max(0.0, start + options.boot_timeout - time.monotonic())
    patience = min(left, KEY_LOGIN_SECONDS) if os.path.exists(files.keys) else 0.0
    first = refresh_script(plan.guest) if warm else ""
    code = run_command(Login(files, plan.guest, address), options, patience, first)
  except QvmError as error:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(1.0)  # a lost connection may be the first sign of its end
    lines = last_lines(log, start=log_start)
    show_console(lines)
    if process.poll() is None and disk_is_full(files.folder):
      raise QvmError(str(error), DISK_FULL)
    if process.poll() is None:
      raise
    problem = f"the machine {plan.name} has ended ({ending(process.returncode)}): {error}"
    raise QvmError(problem, ": ".join(explain("\n".join(lines))))
  if not plan.ephemeral and process.poll() is None and power_off(files):
    try:
      process.wait(POWER_OFF_SECONDS)
    except subprocess.TimeoutExpired:
      say(f"{plan.name} has not powered off in {POWER_OFF_SECONDS:g} s and is ended")
  return code


def boot(launch: Launch, warm: Optional[Warm] = None) -> Any:
  """Make the overlay and start QEMU, which the stack ends; None when `clean` was faster."""
  plan, options, locks = launch.plan, launch.options, launch.locks
  files, below = instance_files(plan.cache, plan.name), plan.base
  source = launch.stream.source if launch.stream else None
  with instances_lock(files.folder):
    needed = [*([] if source else [plan.base]), plan.qemu, plan.qemu_img]
    if warm and not warm.saving:
      below = warm.files.disk
      needed += [below, warm.files.record]
    if not all(os.path.isfile(path) for path in needed):
      return None
    if not source:
      check_base(plan)
    check_instance(plan, files)
    check_source(files, source)
    record_instance(plan, files, f"{launch.address.host}:{launch.address.port}", source)
    make_overlay(plan, served_at(source) or backing_name(plan, below), locks[:1])
    facts = host_facts(plan, options, launch.address, source.release if source else "")
    if facts.keys and plan.guest.keys:
      write_key_disk(plan.cache, files, plan.guest.keys)
    with signals.hold():
      command = qemu_command(plan, options, facts)
      if warm:
        command, locks = warm_command(command, warm), (*locks, warm.theirs.fileno())
      if launch.stream:
        locks = (*locks, launch.stream.life)
      process = start(command, locks, **launch.streams)
      launch.stack.callback(end_process, process)
      if warm:
        warm.theirs.close()  # or else its end would not be seen
      if launch.stream:
        launch.stream.release()
      note_holder(locks[0], "QEMU", process.pid)
  return process


class BootTimeout(QvmError):
  """A guest that does not answer: to boot it once more would not help."""


def warm_start(launch: Launch, log: Optional[IO[bytes]]) -> Any:
  """A machine that goes on from a checkpoint, which is made first if there is none.

  None when that cannot be, for a reason that has been said: then it boots as always.
  """
  plan = launch.plan
  if launch.stream:
    say("there are no warm starts while the image comes; the next run makes the checkpoint")
    return None
  facts = host_facts(plan, launch.options, launch.address)
  if facts.keys:
    with instances_lock(instances_dir(plan.cache)):
      make_key(plan.cache)
  key = checkpoint_key(plan, launch.options, facts)
  name = f"{plan.guest.os}-{plan.version}-{plan.guest.arch}-warm-{key[:10]}"
  files = checkpoint_files(plan.cache, name)
  problem = checkpoint_problem(files, key)
  if problem and read_json(files.record).get("problem"):
    say(f"there are no warm starts here: {problem} (qvm rm {name} makes the next run try again)")
    return None
  if problem and os.path.exists(files.record):
    say(f"the checkpoint {name} cannot be used: {problem}")
  process = None if problem else from_checkpoint(launch, files, key, False)
  if not process and make_checkpoint(launch, files, key, log):
    process = from_checkpoint(launch, files, key, True)
  return process


def make_checkpoint(launch: Launch, files: Files, key: str, log: Optional[IO[bytes]]) -> bool:
  """Boot a machine in the background and make a checkpoint of it; False, said, when that fails."""
  plan, console = launch.plan, instance_files(launch.plan.cache, launch.plan.name).console
  free, wanted = free_space(files.folder), memory_bytes(launch.options.memory)
  if free < wanted:
    say(f"no checkpoint is made: the disk has {megabytes(free)}, and it may take the guest's "
        f"memory, {megabytes(wanted)} (-m)")  # fmt: skip
    return False
  with contextlib.ExitStack() as stack:
    with instances_lock(instances_dir(plan.cache)):
      lock = try_lock(files.lock, lambda: False)
      if lock is None:
        say(f"another qvm makes the checkpoint {files.name} just now; this run does without")
        return False
      stack.callback(drop_lock, lock, files.lock)
      remove_checkpoint(files)
    stack.callback(remove_unless_complete, files)
    stack.callback(remove_file, plan.disk)
    if not log:
      log = stack.enter_context(open(console, "wb", buffering=0))
    say(f"{plan.name} boots to make the checkpoint {files.name}, its console goes to {log.name}")
    warm = stack.enter_context(warm_of(files, True))
    launch = launch._replace(
      locks=(*launch.locks, lock), streams=background_streams(log), stack=stack
    )
    process = boot(launch, warm)
    if not process:
      return False
    try:
      settle(launch, process, os.fstat(log.fileno()).st_size)
      keep_checkpoint(plan, warm, key, process)
    except BootTimeout:
      raise
    except QvmError as error:
      say(f"no checkpoint is made: {error}")
      return False
  return True


def settle(launch: Launch, process: Any, log_start: int) -> None:
  """Wait until a guest has booted so far that it lets us in."""
  options, guest = launch.options, launch.plan.guest
  if not await_ssh(launch, process, log_start):
    raise BootTimeout(
      f"ssh has not answered in {options.boot_timeout:g} s, so there is no checkpoint",
      "--boot-timeout gives it longer; without --warm nothing waits for ssh",
    )
  files = instance_files(launch.plan.cache, launch.plan.name)
  if find_program("ssh"):
    patience = KEY_LOGIN_SECONDS if os.path.exists(files.keys) else 0.0
    in_guest(Login(files, guest, launch.address), "true", wait_for, patience, **NO_STREAMS)


def remove_unless_complete(files: Files) -> None:
  """Delete the parts of a checkpoint that has not been completed."""
  if not os.path.exists(files.record):
    remove_checkpoint(files)


def from_checkpoint(launch: Launch, files: Files, key: str, fresh: bool) -> Any:
  """Start a machine from a checkpoint; None when that fails, which is said and drops it.

  When even a fresh one fails, that is noted, so that no later run makes one in vain.
  """
  plan, console = launch.plan, console_of(launch.plan, launch.options)
  start = os.path.getsize(console) if os.path.exists(console) else 0
  with contextlib.ExitStack() as stack, warm_of(files, False) as warm:
    process = boot(launch._replace(stack=stack), warm)
    if not process:
      return None
    try:
      patience = min(RESUME_SECONDS, launch.options.boot_timeout)
      resume(warm, launch.address, process, patience)
    except QvmError as error:
      end_process(process)
      words = last_lines(console, 3, start)
      if process.stderr:
        words = [process.stderr.read(TAIL_BYTES).decode("utf-8", "replace")]
      problem = " ".join(" ".join([str(error), *words]).split())
      say(f"the checkpoint {files.name} cannot be used: {problem}")
      remove_file(plan.disk)
      with instances_lock(instances_dir(plan.cache)):
        remove_checkpoint(files)
        if fresh:
          record_checkpoint(plan, files, key, problem=problem)
      return None
    launch.stack.push(stack.pop_all())
  say(f"{plan.name} goes on from the checkpoint {files.name}")
  return process


def welcome(plan: Plan, address: Address) -> None:
  """Say how to get in, once QEMU has started."""
  if address.port != SSH_PORT and not address.chosen:
    say(f"port {SSH_PORT} is taken; this machine gets {address.port}")
  say(ssh_line(plan.guest, address))
  if not plan.guest.console:
    say(f"{plan.guest.title} writes nothing to this terminal; once it is up, ssh gets in")


# ---- Commands -----------------------------------------------------------------------------------


def cmd_run(options: Options) -> int:
  """Boot a guest in this terminal."""
  net = net_from(os.environ)
  plan = plan_from(options, net)
  if options.guest_command:
    program_for_ssh("ssh")  # before anything is downloaded
  if options.dry_run:
    command = qemu_command(plan, options, host_facts(plan, options, options.ssh))
    emit(" ".join(shlex.quote(word) for word in command))
    return 0
  make_folders(plan.cache)
  sweep(plan.cache)
  files = instance_files(plan.cache, plan.name)
  with contextlib.ExitStack() as stack:
    lock = take_instance(files)
    stack.callback(drop_lock, lock, files.lock)
    check_instance(plan, files)
    if plan.ephemeral:
      stack.callback(remove_instance, files)
      open(files.mark, "w").close()
    chosen = options.ssh.chosen and reserve_port(options.ssh, stack)
    log = open_log(options, files, stack)
    log_start = os.fstat(log.fileno()).st_size if log else 0
    warning = memory_warning(options.memory, available_memory("/proc/meminfo"))
    if warning:
      say(warning)
    stack.enter_context(terminal_kept())
    streams = qemu_streams(options, log)
    fds = (lock, log.fileno() if log and options.detach else -1)
    process = warm = stream = None
    for _ in range(ATTEMPTS):  # `clean --all` may take away again what was just fetched
      stream = prepare(plan, options, net, stream, fds, stack)
      address, port_lock = chosen or reserve_port(options.ssh, stack)
      launch = Launch(plan, options, address, (lock, port_lock), streams, stack, stream)
      warm = warm_start(launch, log) if options.warm else None
      process = warm or boot(launch)
      if process:
        break
    if not process:
      raise QvmError(f"{plan.cache} loses files as soon as they are there")
    if options.guest_command:
      return run_and_end(launch, process, log_start, bool(warm))
    if warm and find_program("ssh"):
      refresh_guest(Login(files, plan.guest, address))
    if options.detach:
      return leave_running(launch, process, log_start, bool(warm))
    welcome(plan, address)
    return relay_console(plan, process, log, bool(warm))


def cmd_ssh(options: Options) -> int:
  """Run a command in a running instance, or a shell."""
  cache = cache_folder(os.environ)
  [files] = existing(cache, options.operands, "run")
  if wait_released(files, 0):
    raise QvmError(
      f"the instance {files.name} does not run",
      "qvm run --detach starts one in the background, see qvm list",
    )
  login = login_of(files)
  if not wait_for_ssh(
    login.address, options.boot_timeout, lambda pause: wait_released(files, pause)
  ):
    raise QvmError(
      f"the instance {files.name} does not answer at {ssh_line(login.guest, login.address)}"
    )
  with terminal_kept():
    return run_command(login, options, KEY_LOGIN_SECONDS if os.path.exists(files.keys) else 0.0)


def cmd_pull(options: Options) -> int:
  """Download everything that `run` needs, or fill a mirror, or verify what is there."""
  net = net_from(os.environ)
  plan = plan_from(options, net)
  if options.mirror:
    fill_mirror(plan, Releases(net), options.mirror)
    return 0
  make_folders(plan.cache)
  sweep(plan.cache)
  fetch_missing(plan, net)
  check_image(plan.base)
  say(f"{plan.guest.title} {plan.version} on {plan.guest.arch} is ready")
  return verify(plan, Releases(impatient(net))) if options.verify else 0


def verify(plan: Plan, releases: Releases) -> int:
  """Compare what is cached with its record and its release; prints a line for each, 1 if bad."""
  things = [(plan.base, image_repo(plan.guest.os)), (tree_program(plan), "resources")]
  if not plan.own_qemu:
    things.append((plan.qemu_img, "resources"))
  verdicts = []
  for path, repo in things:
    verdicts.append(verdict(releases, path, repo))
    emit(f"{os.path.basename(path)}: {verdicts[-1]}")
  if all(text.startswith("ok") for text in verdicts):
    return 0
  say(f"delete what is damaged, below {plan.cache}, and pull it again")
  return EXIT_FAILED


def verdict(releases: Releases, path: str, repo: str) -> str:
  """Whether a file, or the tree of a QEMU, is what its record and its release say."""
  record = record_of(path)
  if not isinstance(record.get("sha256"), str):
    return "unknown: no digest was noted when it came"
  tree = os.path.dirname(os.path.dirname(path))
  digest = tree_sha256(tree) if is_qemu_program(path) else file_sha256(path)
  if digest != record["sha256"]:
    return "DAMAGED: it has not the digest that was noted when it came"
  tag, name = str(record.get("release")), unquoted(str(record.get("url")).rpartition("/")[2])
  asset = record.get("asset_sha256")
  if name.endswith(".qcow2") and asset != digest:
    return "DAMAGED: its record contradicts itself"
  named = releases.digest(repo, tag, name) if re.match(TAG_RE, tag) else ""
  if named and named != asset:
    return f"DAMAGED: {tag} names another digest"
  return f"ok, as {tag} says" if named else "ok, as noted when it came; the release cannot be asked"


def fill_mirror(plan: Plan, releases: Releases, folder: str) -> None:
  """Download the release's files into a folder that can be QVM_RELEASES_URL for others."""
  for name in (plan.qemu_asset, plan.tools_asset):
    mirror_asset(releases, folder, "resources", releases.tag("resources"), name)
  repo = image_repo(plan.guest.os)
  find_image(plan, releases, "", lambda tag, name: mirror_asset(releases, folder, repo, tag, name))


def mirror_asset(releases: Releases, folder: str, repo: str, tag: str, name: str) -> None:
  """Put one asset into a mirror, and into the files that stand for its release's pages."""
  top = os.path.join(folder, repo, "releases")
  target = os.path.join(top, "download", tag, name)
  page = os.path.join(top, "expanded_assets", tag)
  for path in (target, page):
    os.makedirs(os.path.dirname(path), exist_ok=True)
  with download_lock(os.path.dirname(target), name + ".download") as place:
    if not os.path.isfile(target):
      download = fetch_asset(releases, repo, tag, name, place)
      line = f'<a href="/{repo}/releases/download/{tag}/{name}">{name}</a>'
      with open(page, "a") as file:
        file.write(f"{line} sha256:{download.file.hash.hexdigest()}\n")
      move_into_place(download.file.part, target, 0o644)
      download.file.remove()
  with download_lock(folder, repo + ".download"):
    tags = sorted(os.listdir(os.path.join(top, "download")), key=version_key, reverse=True)
    feed = "".join(f'<link href="/{repo}/releases/tag/{each}"/>\n' for each in tags)
    for path, text in (("releases.atom", feed), ("releases/latest", releases.tag(repo) + "\n")):
      write_text(os.path.join(folder, repo, path), text)
  emit(target)


def cmd_search(options: Options) -> int:
  """Show the versions that can be had, or without a network those that are cached."""
  cache, net = cache_folder(os.environ), impatient(net_from(os.environ))
  names = [word.lower() for word in options.operands] or list(OS_NAMES)
  releases = Releases(net)
  asked = {name: Future(images_of(releases, name)) for name in names}  # all at the same time
  rows: List[Dict[str, Any]] = []
  errors: Dict[str, QvmError] = {}
  for name in names:
    try:
      images = asked[name].result()
    except QvmError as error:
      errors[name], images = error, []
    rows += search_rows(name, images, cached_images(cache, name))
  for name, problem in errors.items():
    say(f"only what is cached of {name} is shown: {problem}")
  if options.json:
    emit_json(rows)
  else:
    show_search(rows)
  return EXIT_FAILED if errors and not rows else 0


def images_of(releases: Releases, name: str) -> Callable[[], List[Image]]:
  """A call that asks for the images of an OS."""
  return lambda: images_in(name, releases.all(image_repo(name)))


def search_rows(name: str, images: List[Image], cached: List[Image]) -> List[Dict[str, Any]]:
  """The images of an OS as --json shows them, the newest version first."""
  here = {(image.version, image.arch) for image in cached}
  known = {(image.version, image.arch) for image in images}
  every = images + [image for image in cached if (image.version, image.arch) not in known]
  every.sort(key=lambda image: version_key(image.version), reverse=True)
  return [
    {
      "os": name,
      "version": image.version,
      "arch": image.arch,
      "release": image.release or None,
      "asset": image.asset,
      "cached": (image.version, image.arch) in here,
    }
    for image in every
  ]


def show_search(rows: List[Dict[str, Any]]) -> None:
  """Print the versions as a table with a column for each CPU."""
  cells: Dict[Tuple[str, str], Dict[str, str]] = {}
  for row in rows:
    text = " ".join(filter(None, [row["release"], "(cached)" if row["cached"] else ""]))
    cells.setdefault((row["os"], row["version"]), {})[row["arch"]] = text
  table = [("OS", "VERSION", "X86-64", "ARM64")]
  for (name, version), arches in cells.items():
    table.append((name, version, arches.get("x86-64", "-"), arches.get("arm64", "-")))
  show_table(table)


def cmd_list(options: Options) -> int:
  """Show the instances."""
  cache = cache_folder(os.environ)
  sweep(cache)
  rows = list_instances(cache)
  if options.json:
    emit_json([row._asdict() for row in rows])
    return 0
  table = [("NAME", "OS", "VERSION", "ARCH", "STATE", "SSH", "SIZE")]
  for row in rows:
    state = row.state + (" (--rm)" if row.ephemeral else "")
    state += f" (base {row.base}%)" if row.base < 100 else ""
    cells = (row.name, row.os, row.version, row.arch, state, row.ssh or "-", megabytes(row.size))
    table.append(cells)
  show_table(table)
  return 0


def existing(cache: str, names: Sequence[str], what: str) -> List[Files]:
  """The instances of these names, each once; QvmError when one is missing."""
  chosen = [instance_files(cache, name) for name in dict.fromkeys(names)]
  for files in chosen:
    if not os.path.lexists(files.disk):
      words = [line for line in last_lines(files.console) if line.startswith("qvm: ")]
      hint = f"the end of {files.console}: {words[-1]}" if words else "see qvm list"
      raise QvmError(f"there is no instance {files.name}; nothing is {what}", hint)
  return chosen


def cmd_stop(options: Options) -> int:
  """Power running instances off; all names are looked at before any is stopped."""
  cache = cache_folder(os.environ)
  chosen = existing(cache, options.operands, "stopped")
  for files in chosen:
    if wait_released(files, 0):
      raise QvmError(f"the instance {files.name} does not run; nothing is stopped", "see qvm list")
  for files in chosen:
    stop_instance(files, options.force)
    emit(files.name)
  sweep(cache)
  return 0


def cmd_rm(options: Options) -> int:
  """Remove instances; all names are looked at before anything is removed."""
  cache = cache_folder(os.environ)
  sweep(cache)
  frozen = {files.name: files for files in checkpoints(cache)}
  names = [name for name in options.operands if name not in frozen]
  chosen = existing(cache, names, "removed")
  dropped = [frozen[name] for name in dict.fromkeys(options.operands) if name in frozen]
  for files in chosen if options.force else []:
    if not wait_released(files, 0):
      stop_instance(files, True)
  with contextlib.ExitStack() as stack:
    for files in chosen:
      try:
        fd = take_instance(files)
      except RunningError as error:
        raise QvmError(f"{error}; nothing is removed", "qvm stop ends it, qvm rm --force as well")
      stack.callback(drop_lock, fd, files.lock)
    for files in chosen:
      remove_instance(files)
      emit(files.name)
  for files in dropped:
    with instances_lock(instances_dir(cache)):
      remove_checkpoint(files)  # machines that run from it have its files open
    emit(files.name)
  return 0


def cmd_clean(options: Options) -> int:
  """Delete leftovers, with --all also what can be downloaded again; never an instance."""
  cache = cache_folder(os.environ)
  total = clean(cache, options) if os.path.isdir(instances_dir(cache)) else 0
  say(f"{'would free' if options.dry_run else 'freed'} {megabytes(total)}")
  return 0


def clean(cache: str, options: Options) -> int:
  """Delete what `clean` may, or only name it; returns the bytes that it takes."""
  total = 0
  with contextlib.ExitStack() as stack:
    alone = downloads_idle(os.path.join(cache, "downloads"), stack)
    stack.enter_context(instances_lock(instances_dir(cache)))
    orphans = orphan_names(cache)
    paths = unfinished(cache, stack) + instance_leftovers(cache, orphans)
    paths += unfinished_checkpoints(cache) + temporaries(cache)
    if options.all and alone:
      paths += unneeded(cache, orphans)
    elif options.all:
      say("something is being downloaded: images and QEMU stay")
    for path in paths:
      try:
        size = tree_size(path)
      except FileNotFoundError:  # a run has just ended, and with it went its lock
        continue
      total += size
      emit(f"{megabytes(size):>8}  {os.path.relpath(path, cache)}")
      if not options.dry_run:
        remove_tree(path)
  return total


def unfinished(cache: str, stack: contextlib.ExitStack) -> List[str]:
  """The downloads that nobody goes on with, nor needs; until the stack ends nobody can."""
  disks = [path for path in paths_in(cache, "instances") if path.endswith(".qcow2")]
  begun = [os.path.basename(base_of(disk)) for disk in disks if is_streamed(disk)]
  found = older_downloads(os.path.join(cache, "downloads"))
  for path in paths_in(cache, "downloads"):
    named = re.search(r"\.(qcow2|tar)\Z", path) and os.path.isdir(path)
    if named and os.path.basename(path) not in begun:  # overlays lie on what has come
      with contextlib.suppress(FileNotFoundError):  # a download has just ended
        fd = try_lock(path, lambda: False, os.O_RDONLY)
        if fd is not None:
          stack.callback(os.close, fd)
          found.append(path)
  return found


def orphan_names(cache: str) -> List[str]:
  """The --rm instances whose qvm and QEMU were killed; to be asked within the gate."""
  names = instance_names(cache, ".ephemeral")
  return [name for name in names if not is_locked(instance_files(cache, name).lock)]


def instance_leftovers(cache: str, orphans: Sequence[str]) -> List[str]:
  """The files of orphans, half-made disks, logs without one, and locks that nobody holds."""
  found = []
  for path in paths_in(cache, "instances"):
    match = re.match(INSTANCE_FILE, os.path.basename(path))
    if not match or is_locked(instance_files(cache, match.group(1)).lock):
      continue
    stray = path.endswith(".console.log") and not os.path.lexists(path[:-12] + ".qcow2")
    if match.group(1) in orphans or path.endswith((".tmp", ".lock")) or stray:
      found.append(path)
  return found


INSTANCE_FILE = r"(.+?)\.(qcow2|json|lock|console\.log|known_hosts|keys|ephemeral)(\.tmp|\.old)?\Z"


def temporaries(cache: str) -> List[str]:
  """What publishing left when it was killed, records without a file, and what is of former use."""
  found = [path for path in paths_in(cache, "code") if path != packed_code[0]]
  for path in paths_in(cache, "base"):
    base = re.sub(r"\.(json|qcow2)(\.new)?(\.tmp)?\Z", ".qcow2", path)
    odd = r"-(x86-64|arm64)\.kernel\Z|\.json(\.new)?\.tmp\Z"  # kernels are of an older qvm
    if base != path and not os.path.exists(base) or re.search(odd, path):
      found.append(path)
  trees = paths_in(cache, "qemu")
  for path in [*trees, *paths_in(cache, "bin")]:
    name = os.path.basename(path)
    former = re.match(r"\.(x86_64|aarch64)-[0-9a-f]{8}\Z", name) and not any(
      os.path.realpath(link) == os.path.realpath(path) for link in trees if os.path.islink(link)
    )
    if former or re.match(r"((x86_64|aarch64|resources)\.(tmp|new)|qemu-img\.json\.\S+)\Z", name):
      found.append(path)
  return found


def unneeded(cache: str, orphans: Sequence[str]) -> List[str]:
  """Checkpoints and base images that no instance needs, and QEMU when nothing runs.

  All of it can be fetched or made again.
  """
  used = [os.path.basename(path) for n, path in base_files(cache).items() if n not in orphans]
  found = []
  for files in checkpoints(cache):  # the record goes first
    if files.name + ".qcow2" not in used:
      found += checkpoint_paths(files)
  for base in [path for path in paths_in(cache, "base") if path.endswith(".qcow2")]:
    if not set(dependants(cache, base)) - set(orphans):
      beside = (base, record_path(base), record_path(base) + ".new")
      found += [path for path in beside if os.path.exists(path)]
  if any(is_locked(path) for path in paths_in(cache, "instances") if path.endswith(".lock")):
    say("an instance is running: QEMU stays")
    return found
  links = [path for path in paths_in(cache, "qemu") if os.path.basename(path) in QEMU_CPUS.values()]
  trees = [os.path.realpath(path) for path in links if os.path.islink(path)]
  tools = os.path.join(cache, "bin", "qemu-img")
  programs = [*trees, *links, tools, tools + ".json"]
  return found + [path for path in programs if os.path.lexists(path)]


def cmd_config(options: Options) -> int:
  """Print the cache folder."""
  emit(cache_folder(os.environ))
  return 0


# ---- Doctor -------------------------------------------------------------------------------------


class Check(NamedTuple):
  """One line of `qvm doctor`: ok, warning or fault, what was looked at, and the fix."""

  state: str
  name: str
  text: str
  fix: str = ""


FIRST_RUN_BYTES = 2 << 30  # bytes that a first run takes: QEMU, an image, what the guest writes
DOCTOR_SECONDS = 8.0  # seconds for all questions to the network together


def cmd_doctor(options: Options) -> int:
  """Say what this host can and cannot do, and the fix for each fault; downloads nothing."""
  cache = cache_folder(os.environ)
  network = None if options.offline else Future(lambda: check_network(net_from(os.environ)))
  checks = [check_system(), check_python(), check_ssh(), check_cache(cache)]
  checks += [*check_qemu(cache), check_zstd()]
  checks += check_accelerators(sys.platform, "/dev/kvm", native_qemu(cache))
  checks.append(check_instances(cache))
  checks += within(network, DOCTOR_SECONDS) if network else [Check("ok", "network", "left out")]
  if options.json:
    emit_json([check._asdict() for check in checks])
  else:
    for check in checks:
      emit(printable(f"{check.state:<8} {check.name + ':':<13} {check.text}"))
      if check.fix:
        emit(printable(f"{'':<22} → {check.fix}"))
  return EXIT_FAILED if any(check.state == "fault" for check in checks) else 0


def within(later: Future, seconds: float) -> List[Check]:
  """The result of a check that may hang."""
  later.thread.join(seconds)
  if later.thread.is_alive():
    return [
      Check("fault", "network", f"no answer in {seconds:g} s", "is a proxy needed? https_proxy")
    ]
  try:
    return list(later.result())
  except QvmError as error:
    return [Check("fault", "network", str(error), error.hint or "correct it, or unset it")]


def check_system() -> Check:
  """Whether qvm works on this system."""
  uname = os.uname()
  text = f"{uname.sysname} {uname.release} on {uname.machine}"
  try:
    host = this_host()
    check_host(host, GUESTS[0], "")
  except QvmError as error:
    return Check("fault", "host", f"{text}: {error}", error.hint)
  if host == Host("macos", "arm64") and not os.path.exists("/Library/Apple/usr/share/rosetta"):
    fix = "softwareupdate --install-rosetta, or --qemu with a QEMU of your own"
    return Check("fault", "host", f"{text}, without Rosetta, which QEMU needs", fix)
  return Check("ok", "host", text)


def check_python() -> Check:
  """The Python that runs qvm, and its TLS."""
  version = sys.version.split()[0]
  try:
    tls = ssl.OPENSSL_VERSION
  except ImportError:
    return Check("fault", "Python", f"{version} without ssl", "use a Python that has TLS")
  return Check("ok", "Python", f"{version}, {tls}, {sys.executable}")


def check_ssh() -> Check:
  """OpenSSH's client, which commands in the guest and `stop` need."""
  if not find_program("ssh"):
    fix = "install OpenSSH's client (Debian: apt-get install openssh-client)"
    text = "there is no ssh on PATH: no commands in guests, and stop cannot power them off"
    return Check("warning", "ssh", text, fix)
  code, words = ask_program([find_program("ssh"), "-V"])
  if code:
    return Check("warning", "ssh", f"it does not start: {words}", "install OpenSSH's client again")
  return Check("ok", "ssh", words)


def check_cache(cache: str) -> Check:
  """Whether the cache folder, or what will hold it, can be written and has room."""
  there = cache
  if os.path.lexists(cache) and not os.path.isdir(cache):
    return Check("fault", "cache", f"{cache} is not a folder", "move it out of the way")
  while not os.path.isdir(there) and os.path.dirname(there) != there:
    there = os.path.dirname(there)
  text = f"{cache} on {file_system(there, '/proc/mounts')}"
  if not os.access(there, os.W_OK | os.X_OK):
    fix = "QVM_CACHE_DIR can name another folder"
    return Check("fault", "cache", f"{text}: it cannot be written", fix)
  if there == cache:
    try:
      check_owner(cache, cache)
    except QvmError as error:
      return Check("fault", "cache", str(error), error.hint)
  free = free_space(there)
  text += f", {megabytes(tree_size(cache)) if there == cache else 'empty'}, {megabytes(free)} free"
  if free < FIRST_RUN_BYTES:
    fix = "qvm clean --all --dry-run shows what can go"
    return Check("warning", "cache", f"{text}; a first run takes {megabytes(FIRST_RUN_BYTES)}", fix)
  return Check("ok", "cache", text)


def file_system(path: str, mounts: str) -> str:
  """The kind of file system a path lies on, as Linux tells."""
  best, kind = "", "its file system"
  with contextlib.suppress(OSError), open(mounts) as file:
    for fields in (line.split() for line in file):
      point = fields[1].replace("\\040", " ") if len(fields) > 2 else ""
      inside = point and (os.path.realpath(path) + "/").startswith(point.rstrip("/") + "/")
      if inside and len(point) >= len(best):
        best, kind = point, fields[2]
  return kind


def check_qemu(cache: str) -> List[Check]:
  """The cached QEMUs: whether they start, and which accelerators they offer."""
  checks = []
  for cpu in QEMU_CPUS.values():
    program = qemu_program(cache, cpu)
    if not os.path.isfile(program):
      checks.append(Check("ok", "QEMU " + cpu, "not downloaded yet"))
      continue
    release = str(record_of(program).get("release") or "unknown release")
    code, words = ask_program([program, "-accel", "help"])
    if code:
      fix = "qvm clean --all removes it, the next run fetches it again"
      checks.append(Check("fault", "QEMU " + cpu, f"{release} does not start: {words}", fix))
    else:
      offers = words.partition(":")[2].split()
      checks.append(Check("ok", "QEMU " + cpu, f"{release}, accelerators: {' '.join(offers)}"))
  return checks


TRY_KVM = ["-accel", "kvm", "-cpu", "max", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
TRY_KVM_INPUT = '{"execute": "qmp_capabilities"}{"execute": "quit"}'


def check_accelerators(platform: str, kvm: str, qemu: str) -> List[Check]:
  """Whether guests of the host's own CPU can run at full speed."""
  if platform == "darwin":
    text = "the downloaded QEMU is built for Intel; on Apple Silicon it emulates"
    return [Check("ok", "HVF", text)]
  if not os.path.exists(kvm):
    fix = "switch on virtualisation in the firmware, or take a host that offers it to guests"
    return [Check("warning", "KVM", f"there is no {kvm}: guests are emulated, much slower", fix)]
  try:
    fd = os.open(kvm, os.O_RDWR)
  except OSError as error:
    text = f"{kvm} may not be used ({describe(error)}): guests are emulated, much slower"
    return [Check("warning", "KVM", text, KVM_FIX)]
  try:
    version = fcntl.ioctl(fd, 0xAE00)  # KVM_GET_API_VERSION, 12 since Linux 2.6.22
    os.close(fcntl.ioctl(fd, 0xAE01, 0))  # KVM_CREATE_VM
  except OSError as error:
    text = f"{kvm} is there but makes no machine: {describe(error)}"
    return [Check("warning", "KVM", text, TCG_FIX)]
  finally:
    os.close(fd)
  if not os.path.isfile(qemu):
    return [Check("ok", "KVM", f"{kvm} can be opened, API {version}; not tried without QEMU")]
  code, words = ask_program([qemu, *TRY_KVM], TRY_KVM_INPUT)
  if code:
    cause = explain(words) or [f"QEMU does not start with it: {words[-200:]}", TCG_FIX]
    return [Check("warning", "KVM", f"{kvm}: {cause[0]}", cause[1])]
  return [Check("ok", "KVM", f"{kvm} works, API {version}")]


def native_qemu(cache: str) -> str:
  """The path of the downloaded QEMU for the host's own CPU, whether or not it is there."""
  cpu = QEMU_CPUS.get(ARCHES.get(os.uname().machine.lower(), ""), "none")
  return qemu_program(cache, cpu)


def check_zstd() -> Check:
  """Whether bundles can be unpacked."""
  if not can_unzstd():
    return Check("warning", "zstd", "none: the newest images cannot be unpacked", ZSTD_HINT)
  return Check("ok", "zstd", (unzstd_command() or ["Python's own"])[0])


def check_network(net: Net) -> List[Check]:
  """The way to the release server and the quota of the API."""
  proxies = {
    name: proxy_name(url) for name, url in urllib.request.getproxies().items() if "://" in url
  }
  checks = [Check("ok", "proxy", ", ".join(f"{k}: {v}" for k, v in proxies.items()) or "none")]
  one = impatient(net)._replace(attempts=1, timeout=min(net.timeout, DOCTOR_SECONDS / 2))
  try:
    checks.append(
      Check("ok", "releases", f"{redacted(net.releases)}: {newest_tag(one, 'resources')}")
    )
  except QvmError as error:
    checks.append(Check("fault", "releases", str(error), error.hint))
  if net.api:
    checks.append(check_quota(one))
  return checks


def check_quota(net: Net) -> Check:
  """Whether GitHub's API still answers: it tells digests and older releases."""
  url = f"{net.api}/resources/releases?per_page=1"
  try:
    with open_url(net, url) as answer:
      left = answer.headers.get("x-ratelimit-remaining")
  except (QvmError, Transient) as error:
    hint = getattr(error, "hint", "") or "nothing need be done; GITHUB_TOKEN raises the quota"
    return Check("warning", "API", f"{error}; the release pages are read instead", hint)
  return Check(
    "ok", "API", f"{redacted(net.api)}" + (f", {left} requests left this hour" if left else "")
  )


def check_instances(cache: str) -> Check:
  """The instances that run."""
  try:
    rows = list_instances(cache)
  except OSError as error:
    return Check("fault", "instances", f"{cache}: {describe(error)}", "make the folder yours again")
  running = [f"{row.name} ({row.ssh})" for row in rows if row.state == "running"]
  return Check("ok", "instances", f"{len(rows)}, running: {', '.join(running) or 'none'}")


# ---- Completion and main ------------------------------------------------------------------------

COMPLETIONS = {
  "bash": """\
_qvm() {{
  local word words=("${{COMP_WORDS[@]:0:COMP_CWORD+1}}")
  if [[ -n $COMP_LINE ]]; then # bash parts words at = and : too
    read -ra words <<< "${{COMP_LINE:0:COMP_POINT}}"
    [[ ${{COMP_LINE:0:COMP_POINT}} == *" " ]] && words+=("")
  fi
  COMPREPLY=()
  while IFS= read -r word; do
    [[ $word == "${{words[-1]}}"* ]] && COMPREPLY+=("$word")
  done < <({program} completion words -- "${{words[@]:1:${{#words[@]}}-2}}" 2>/dev/null)
}}
complete -o default -F _qvm qvm qvm.pyz qvm.py
""",
  "zsh": """\
#compdef qvm qvm.pyz qvm.py
_qvm() {{
  local -a found
  found=("${{(@f)$({program} completion words -- "${{(@)words[2,CURRENT-1]}}" 2>/dev/null)}}")
  if [[ -n $found ]]; then compadd -a found
  elif (( $+functions[_files] )); then _files; fi
}}
if [[ $funcstack[1] == _qvm ]]; then _qvm "$@"; else compdef _qvm qvm qvm.pyz qvm.py; fi
""",
  "fish": """\
function __qvm_words
  set -l before (commandline -opc)
  {program} completion words -- $before[2..-1] 2>/dev/null
end
for name in qvm qvm.pyz qvm.py
  complete -c $name -f -a '(__qvm_words)'
end
""",
}


def cmd_completion(options: Options) -> int:
  """Print a shell's completion script, or for it the words that may come next."""
  shell = options.operands[0]
  if shell == "words":
    for word in next_words(options.operands[1:], cache_folder(os.environ)):
      emit(word)
    return 0
  program = [sys.executable, os.path.abspath(sys.argv[0])]
  text = COMPLETIONS[shell].format(program=" ".join(map(shlex.quote, program)))
  emit(text.rstrip("\n"))
  return 0


def next_words(before: Sequence[str], cache: str) -> List[str]:
  """The words that may follow those already typed."""
  if "--" in before:
    return []  # a command for the guest
  if before and before[-1] == "--platform":
    return ["x86-64", "arm64"]
  if before and before[-1] == "--sync-direction":
    return list(DIRECTIONS)
  if before and before[-1] == "--accel":
    return [*ACCELERATORS, "hvf:kvm:tcg"]
  valued = {flag for option in OPTIONS if option.metavar for flag in option.flags}
  if before and before[-1] in valued:
    return []
  plain = [
    w for i, w in enumerate(before) if w[:1] != "-" and (not i or before[i - 1] not in valued)
  ]
  if not plain:
    return list(COMMANDS)
  command, operands = plain[0], plain[1:]
  if command not in COMMANDS:
    return []
  form, words = COMMANDS[command], [f for o in known_options(command) for f in o.flags]
  if form.operands.startswith(("OS", "[OS")) and not operands:
    words += OS_NAMES
  elif "VERSION" in form.operands and len(operands) == 1:
    words += sorted({image.version for image in cached_images(cache, operands[0].lower())})
  elif form.operands.startswith("NAME"):
    names = instance_names(cache, ".qcow2")
    names += [files.name for files in checkpoints(cache) if command == "rm"]
    words += [name for name in names if name not in operands and re.match(NAME_RE, name)]
  elif command == "config" and not operands:
    words += ["print-path"]
  elif command == "completion" and not operands:
    words += COMPLETIONS
  return words


CALLS: Dict[str, Callable[[Options], int]] = {
  "run": cmd_run,
  "pull": cmd_pull,
  "search": cmd_search,
  "list": cmd_list,
  "ssh": cmd_ssh,
  "stop": cmd_stop,
  "rm": cmd_rm,
  "clean": cmd_clean,
  "doctor": cmd_doctor,
  "config": cmd_config,
  "completion": cmd_completion,
}


def call(options: Options) -> int:
  """Do what the command line says."""
  report.progress = options.progress
  if options.help:
    emit(help_text(options.command))
    return 0
  if options.version:
    emit("qvm " + __version__)
    return 0
  return CALLS[options.command](options)


def lies_in_cache(path: Any) -> bool:
  """Whether a path that something failed on is one of the cache."""
  with contextlib.suppress(QvmError):
    return isinstance(path, str) and (path + "/").startswith(cache_folder(os.environ) + "/")
  return False


def main(words: Optional[Sequence[str]] = None) -> int:
  """Run qvm and return its exit code; the only function that prints errors."""
  code = failed = EXIT_FAILED
  try:
    open_standard_streams()
    signals.install()
    words = sys.argv[1:] if words is None else words
    if words[:1] == [SERVE]:
      code = serve(words[1:])
    else:
      options = parse_command_line(words)
      code = failed = EXIT_OWN if options.guest_command or options.command == "ssh" else EXIT_FAILED
      code = call(options)
  except Interrupted as stop:
    code = 128 + stop.signum
  except QvmError as error:
    code = EXIT_USAGE if isinstance(error, UsageError) else failed
    say(str(error))
    if error.hint:
      say(error.hint)
  except BrokenPipeError:
    code = 128 + signal.SIGPIPE
  except OSError as error:
    path = error.filename2 or error.filename
    say(f"{path}: {describe(error)}" if path else describe(error))
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and lies_in_cache(path):
      say(f"is the cache yours, and can it be written? {OTHER_CACHE}")
  except Exception as error:
    if os.environ.get("QVM_DEBUG"):
      raise
    say(f"this is a bug in qvm {__version__}: {type(error).__name__}: {error}")
    say("QVM_DEBUG=1 shows where; please report it")
  signals.finish()
  if threading.active_count() > 1:  # such as a download that a signal or a failure has ended
    os._exit(code)  # Python 3.12 and 3.13 may crash when they end while a thread waits for data
  return code


if __name__ == "__main__":
  sys.exit(main())
