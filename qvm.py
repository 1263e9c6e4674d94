#!/usr/bin/env python3
"""qvm runs FreeBSD, OpenBSD, NetBSD, Haiku and OmniOS in QEMU, on any macOS or Linux with Python.

It downloads QEMU, qemu-img and a pre-built image, keeps them in one folder, makes a qcow2 overlay
on the untouched image and boots it in the terminal. The file is read from top to bottom: every
section uses only those above it.
"""

import contextlib
import errno
import functools
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
  TypeVar,
)

__version__ = "0.1.0"

if TYPE_CHECKING:
  import array
  import bz2
  import difflib
  import email.utils
  import fcntl
  import fnmatch
  import gzip
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
  import unicodedata
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
    *("array", "bz2", "difflib", "fcntl", "fnmatch", "gzip", "hashlib", "json", "lzma"),
    *(
      "marshal",
      "queue",
      "random",
      "select",
      "shlex",
      "shutil",
      "socket",
      "ssl",
      "struct",
      "subprocess",
    ),
    *("tarfile", "tempfile", "termios", "tty", "unicodedata", "zlib"),
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


class GuestTar(NamedTuple):
  """What the guest's tar reads, and writes."""

  large_files: bool  # of 8 GiB or more, as GNU's base-256 sizes
  long_links: bool  # GNU's header K, for targets over 100 bytes; else Solaris' X


BSDTAR = GNU_TAR = GuestTar(True, True)
PAX = GuestTar(False, True)  # also as tar, in OpenBSD and NetBSD
ILLUMOS_TAR = GuestTar(False, False)


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
  tar: GuestTar


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
  Guest(
    "freebsd", "x86-64", "FreeBSD", "runner", True, HALT, DATE, FREEBSD_KEYS, FREEBSD_X86_64, BSDTAR
  ),
  Guest(
    "freebsd", "arm64", "FreeBSD", "runner", True, HALT, DATE, FREEBSD_KEYS, FREEBSD_ARM64, BSDTAR
  ),
  Guest(
    "openbsd", "x86-64", "OpenBSD", "runner", True, HALT, DATE, OPENBSD_KEYS, OPENBSD_X86_64, PAX
  ),
  Guest(
    "openbsd", "arm64", "OpenBSD", "runner", True, HALT, DATE, OPENBSD_KEYS, OPENBSD_ARM64, PAX
  ),
  Guest("netbsd", "x86-64", "NetBSD", "runner", True, HALT, DATE, NETBSD_KEYS, NETBSD_X86_64, PAX),
  Guest("netbsd", "arm64", "NetBSD", "runner", True, HALT, DATE, NETBSD_KEYS, NETBSD_ARM64, PAX),
  Guest(
    "haiku",
    "x86-64",
    "Haiku",
    "user",
    False,
    "shutdown -q",
    DATE_HAIKU,
    None,
    HAIKU_X86_64,
    GNU_TAR,
  ),
  Guest(
    "omnios",
    "x86-64",
    "OmniOS",
    "runner",
    True,
    HALT_OMNIOS,
    DATE_OMNIOS,
    None,
    OMNIOS_X86_64,
    ILLUMOS_TAR,
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


def kernel_path(base: str) -> str:
  """Where the kernel of a bundle is kept."""
  return base[: -len(".qcow2")] + ".kernel"


# ---- Files, locks, programs ---------------------------------------------------------------------

CHUNK_BYTES = 1 << 18  # bytes that are read or written at a time
TAIL_BYTES = 8192  # bytes of a program's last words that are kept
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
  keep_code()


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


def try_lock(path: str, wait: Callable[[], bool]) -> Optional[int]:
  """A descriptor that holds the lock on a file, or None when another process holds it.

  The lock lasts until the last process that inherited the descriptor has ended. wait is asked
  when the lock is held elsewhere: whether to wait for it. A lock file may be unlinked by its
  holder, so what was locked must still be what the path names.
  """
  while True:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
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

  def __init__(self, function: Callable[[], Any]) -> None:
    self.function = function
    self.value: Any = None
    self.error: Optional[BaseException] = None
    self.thread = threading.Thread(target=self.work, daemon=True)
    self.thread.start()

  def work(self) -> None:
    try:
      self.value = self.function()
    except BaseException as error:  # raised by result(), in the thread that wants it
      self.error = error

  def result(self) -> Any:
    while self.thread.is_alive():
      self.thread.join(POLL_SECONDS)
    if self.error:
      raise self.error
    return self.value


# ---- HTTP ---------------------------------------------------------------------------------------

ATTEMPTS = 5
MAX_RETRY_AFTER_SECONDS = 60.0  # seconds that a Retry-After may ask for
PROGRESS_BYTES = (
  1 << 20
)  # bytes after which an attempt counts as progress and the attempts start anew
URL_RE = (
  r"(https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[!-~]*)?|file://(/[!-~]*)?)\Z"
)
QUOTA_HINT = "GITHUB_TOKEN raises it from 60 to 5,000 requests an hour"
RETRY_CODES = (408, 425, 429, 500, 502, 503, 504)
T = TypeVar("T")


class Net(NamedTuple):
  """How to reach the release server."""

  releases: str  # the address above the repositories, without a slash at the end
  api: str  # the same of GitHub's API; empty: there is none, as with a mirror
  token: str  # for the API only
  timeout: float  # seconds for a connection, and for the next bytes to come
  retry_delay: float  # seconds before the first retry
  attempts: int  # in a row without headway
  cancelled: threading.Event  # set when the result is wanted no more


class Transient(Exception):
  """A failed attempt that another may mend; wait is what the server asks for, in seconds."""

  def __init__(self, message: str, wait: Optional[float] = None, code: int = 0) -> None:
    super().__init__(message)
    self.wait = wait
    self.code = code  # the HTTP status, if there was one


class Cancelled(Exception):
  """Another download failed, so this one has stopped."""


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
  """For requests that there is an answer without: a short time, few attempts."""
  return net._replace(timeout=min(net.timeout, 10.0), attempts=2)


def redirect_handler(stop: str) -> Any:
  """urllib's redirect handler made careful: it never leaves https, drops what is not to be handed
  on, and does not fetch an address that contains stop, but returns the redirect itself."""

  class Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 10
    max_repeats = 3
    inf_msg = "redirect loop: "

    def redirect_request(
      self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
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


HEAD_START_SECONDS = (
  0.3  # seconds that an address of a host has before the next one is tried beside it
)


def connect(host_port: Tuple[str, int], timeout: float, source: Any = None) -> Any:
  """A connection to whichever of a host's addresses answers first, as in RFC 8305.

  socket.create_connection gives each the whole time, so that an IPv6 that leads nowhere takes
  all patience before IPv4 gets its turn.
  """
  found = socket.getaddrinfo(*host_port, 0, socket.SOCK_STREAM)
  other = [info for info in found if info[0] != found[0][0]]
  left = found[:1] + other[:1] + [info for info in found[1:] if info not in other[:1]]
  error: OSError = socket.timeout("timed out")
  tried: List[Any] = []
  until = time.monotonic() + timeout
  try:
    while (left or tried) and time.monotonic() < until:
      if left:
        try:
          tried.append(begin_connection(*left.pop(0)))
        except OSError as failure:  # such as no route to any IPv6
          error = failure
          continue
      pause = (
        min(HEAD_START_SECONDS, until - time.monotonic()) if left else until - time.monotonic()
      )
      for link in select.select([], tried, [], max(0.0, pause))[1]:
        number = link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        tried.remove(link)
        if not number:
          link.settimeout(timeout)
          return link
        link.close()
        error = OSError(number, os.strerror(number))
  finally:
    for link in tried:
      link.close()
  raise error


def begin_connection(family: Any, kind: Any, protocol: int, _: str, address: Any) -> Any:
  """A socket that is being connected; OSError where that fails at once."""
  link = socket.socket(family, kind, protocol)
  link.setblocking(False)
  number = link.connect_ex(address)
  if number in (0, errno.EINPROGRESS):
    return link
  link.close()
  raise OSError(number, os.strerror(number))


def with_connect(kind: Any) -> Any:
  """A kind of http.client's connections that connects so."""

  def make(*args: Any, **more: Any) -> Any:
    link = kind(*args, **more)
    link._create_connection = connect  # where http.client of Python 3.6 to 3.14 looks for it
    return link

  return make


def connection_handlers() -> List[Any]:
  """What lets urllib connect so."""

  class Plain(urllib.request.HTTPHandler):
    def do_open(self, http_class: Any, req: Any, **more: Any) -> Any:
      return super().do_open(with_connect(http_class), req, **more)

  class Secure(urllib.request.HTTPSHandler):
    def do_open(self, http_class: Any, req: Any, **more: Any) -> Any:
      return super().do_open(with_connect(http_class), req, **more)

  return [Plain(), Secure()]


def open_url(net: Net, url: str, headers: Optional[Dict[str, str]] = None, stop: str = "") -> Any:
  """Ask for a URL and return the open answer; all but later ranges of a file goes this way.

  Raises Transient for what may pass (no connection, 5xx, 429, …), QvmError for what will not.
  With stop, a redirect to an address that contains it is returned instead of followed.
  """
  request = urllib.request.Request(url, headers=dict(headers or {}))
  request.add_header("User-Agent", "qvm/" + __version__)
  request.add_header("Accept-Encoding", "identity")
  if net.token and net.api and url.startswith(net.api + "/"):
    request.add_unredirected_header("Authorization", "Bearer " + net.token)
  try:
    opener = urllib.request.build_opener(redirect_handler(stop), *connection_handlers())
    answer = opener.open(request, timeout=net.timeout)
  except urllib.error.HTTPError as error:
    if 300 <= error.code < 400 and stop and stop in error.headers.get("Location", ""):
      return error
    error.close()
    raise http_failure(url, error)
  except QvmError:
    raise
  except Exception as error:
    raise connection_failure(url, error)
  encoding = answer.headers.get("Content-Encoding") or "identity"
  if encoding.lower() != "identity":
    answer.close()
    raise QvmError(f"{redacted(url)}: the answer comes as {encoding}, which was not asked for")
  return answer


def http_failure(url: str, error: Any) -> Exception:
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
  if code in RETRY_CODES or expired or code == 416:
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
  """What an exception from urllib means, with the fix where one is known."""
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
  """Call attempt until it raises no Transient; so many in a row without headway are an error.

  progress tells the bytes there are; pauses double each time and are spread at random, so that
  a fleet of runners does not come back all at once.
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


MAX_RELEASE_DATA_BYTES = (
  8 << 20
)  # bytes of release data: 100 releases of the largest repository are 2 MB


def fetch_bytes(net: Net, url: str, stop: str = "") -> Tuple[bytes, str]:
  """One attempt at a small answer: its body, and its Location where a redirect was asked for."""
  with open_url(net, url, stop=stop) as answer:
    location = answer.headers.get("Location") or ""
    if stop and stop in location:
      return b"", location
    try:
      body = answer.read(MAX_RELEASE_DATA_BYTES + 1)
    except Exception as error:
      raise connection_failure(url, error)
  if len(body) > MAX_RELEASE_DATA_BYTES:
    raise QvmError(f"{redacted(url)}: the answer is larger than any release data")
  return body, ""


def get_page(net: Net, url: str) -> str:
  """The text of a page, with retries."""
  return with_retries(net, url, lambda: fetch_bytes(net, url)[0], lambda: 0).decode(
    "utf-8", "replace"
  )


def asset_exists(net: Net, url: str) -> bool:
  """Whether a URL can be fetched, asked by fetching its first byte."""
  try:
    with_retries(net, url, lambda: open_url(net, url, {"Range": "bytes=0-0"}).close(), lambda: 0)
  except NotFound:
    return False
  return True


def looks_like_html(head: bytes) -> bool:
  """Whether the first bytes of a file are those of a web page."""
  start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
  return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--"))


# ---- Download -----------------------------------------------------------------------------------

BLOCK_BYTES = 1 << 16  # bytes for which the map of an unfinished file has one byte
UNKNOWN = 1 << 62  # the end of a file whose length is not known
CONNECTIONS = 4  # that fetch one file at the same time, where one is slow
SLOW_RATE = 50e6  # bytes a second, below which others join a connection after SLOW_AFTER seconds
SLOW_AFTER_SECONDS = 1.0
PARALLEL_MIN_BYTES = 32 << 20  # bytes that must be missing for it
STALL_SECONDS = 5.0  # seconds after which an idle connection takes over what another fetches
HASH_STEP_BYTES = 8 << 20  # bytes that are hashed at a time while others wait for their data


class Span:
  """The bytes that one connection fetches, from position, which moves, to end."""

  def __init__(self, position: int, end: int) -> None:
    self.position, self.end = position, end
    self.wanted = 0  # the position up to which somebody waits for it
    self.void = False  # whatever comes for it now is not wanted any more
    self.moved = time.monotonic()


def part_files(name: str, folder: str) -> Tuple[str, str, str]:
  """The paths of an unfinished file: its bytes, its note, and its map."""
  path = os.path.join(folder, name)
  return path + ".part", path + ".json", path + ".map"


class Transfer:
  """One file on its way to downloads/, where it and what a resume needs survive a kill -9.

  NAME.part holds the bytes so far, NAME.json the URL they come from, the validator (ETag or
  Last-Modified) of the object and its length. They are the file's beginning; where the note says
  so, they are what NAME.map marks instead, block by block, each after it has been written.
  """

  running: List[Any] = []  # those that --progress shows, also those of others that are awaited
  abandoned = False  # whether threads may still be at work although their result is not wanted

  def __init__(self, net: Net, url: str, name: str, folder: str) -> None:
    self.net, self.url, self.name = net, url, name
    self.part, self.note, self.map = part_files(name, folder)
    self.validator = ""
    self.total: Optional[int] = None
    self.done = 0  # bytes that are there
    self.hashed = 0  # bytes at the beginning that are there and in the hash; never written again
    self.head = b""  # the first bytes, to see what kind of file it is
    self.resumed = 0
    self.announced = False
    self.started = time.monotonic()
    self.hash = new_sha256()
    self.lock = threading.Condition()  # for what follows, and for what is in the files
    self.hashing = threading.Lock()  # to be taken before the other one
    self.spans: List[Span] = []
    self.blocks = bytearray()  # 1: there, 2: on its way, 0: neither; empty while there is no map
    self.file = self.map_file = -1
    self.helpers: List[threading.Thread] = []
    self.address = ""  # where the last answer came from: the signed address, good for a while
    self.kept: List[Tuple[Any, float]] = []  # connections to there that are idle, and since when
    self.load()

  def load(self) -> None:
    """Go on where an earlier run stopped, when it fetched from the same URL."""
    note = read_json(self.note)
    size = os.path.getsize(self.part) if os.path.exists(self.part) else 0
    total, validator = note.get("total"), note.get("validator")
    if not size or note.get("url") != self.url or not isinstance(validator, str) or not validator:
      return self.reset()
    if not isinstance(total, int) or size > total:
      return self.reset()
    self.validator, self.total, self.done = validator, total, size
    self.file = os.open(self.part, os.O_RDWR)
    if note.get("blocks") == BLOCK_BYTES and not self.load_map():
      return self.reset()
    self.resumed = self.done

  def load_map(self) -> bool:
    """Read which blocks are there; False when the map does not fit."""
    try:
      self.map_file = os.open(self.map, os.O_RDWR)
    except FileNotFoundError:
      return False
    data, total = os.pread(self.map_file, 1 << 30, 0), self.total or 0
    self.blocks = bytearray(data)
    missing = -total % BLOCK_BYTES if data.endswith(b"\1") else 0
    self.done = data.count(1) * BLOCK_BYTES - missing
    end = min((data.rfind(1) + 1) * BLOCK_BYTES, total)
    fits = len(data) == -(-total // BLOCK_BYTES) and end <= os.fstat(self.file).st_size
    return fits and not data.strip(b"\0\1")

  def reset(self) -> None:
    """Forget the bytes there are."""
    self.close()
    self.validator, self.total = "", None
    self.done, self.head, self.hash, self.resumed = 0, b"", new_sha256(), 0
    self.hashed, self.blocks = 0, bytearray()
    for path in (self.part, self.note, self.map):
      remove_file(path)

  def close(self) -> None:
    """Write no more, whatever still comes."""
    with self.hashing, self.lock:
      for span in self.spans:
        span.void = True
      self.spans = []
      for fd in (self.file, self.map_file):
        if fd >= 0:
          os.close(fd)
      self.file = self.map_file = -1
      while self.kept:
        self.kept.pop()[0].close()

  def save_note(self) -> None:
    """Note what a resume needs."""
    note = {"url": self.url, "validator": self.validator, "total": self.total}
    write_json(self.note, {**note, "blocks": BLOCK_BYTES} if self.blocks else note)

  def use_map(self) -> None:
    """From now on the blocks may come in any order."""
    if self.blocks:
      return
    total = self.total or 0
    with self.lock:
      self.open_part()
      if not self.spans:
        self.done = (
          max(self.done // BLOCK_BYTES * BLOCK_BYTES, self.hashed) if self.done < total else total
        )
      there = self.done // BLOCK_BYTES if self.done < total else -(-total // BLOCK_BYTES)
      self.blocks = bytearray(b"\1" * there).ljust(-(-total // BLOCK_BYTES), b"\0")
      self.map_file = os.open(self.map, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
      write_at(self.map_file, self.blocks, 0)
      if self.spans:
        self.blocks[there:] = b"\2" * (len(self.blocks) - there)
      self.save_note()  # only now is the part more than a beginning
      os.ftruncate(self.file, total)

  def open_part(self) -> None:
    """Open the part; what a resume needs has been noted."""
    if self.file < 0:
      self.file = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)

  def claim(self, helper: bool = False) -> Optional[Span]:
    """The first gap that nobody fills, else half of the largest that somebody does."""
    with self.lock:
      if self.blocks:
        span = self.first_gap() or self.half()
      elif helper or self.complete():
        span = None
      else:
        span = Span(self.done, UNKNOWN if self.total is None else self.total)
      if span:
        self.spans.append(span)
      return span

  def first_gap(self, start: int = 0, most: int = UNKNOWN) -> Optional[Span]:
    """The first gap from a block on, of at most so many blocks; it counts as on its way."""
    first = self.blocks.find(0, start)
    if first < 0:
      return None
    ends = [self.blocks.find(state, first) for state in (1, 2)]
    last = min([end for end in ends if end >= 0] + [len(self.blocks), first + most])
    self.blocks[first:last] = b"\2" * (last - first)
    return Span(max(first * BLOCK_BYTES, self.hashed), min(last * BLOCK_BYTES, self.total or 0))

  def half(self) -> Optional[Span]:
    """The second half of the largest span, which is cut."""
    largest = max(self.spans, key=lambda span: span.end - span.position, default=None)
    if not largest or largest.end - largest.position < 8 * BLOCK_BYTES:
      return None
    middle = (largest.position + largest.end) // 2 // BLOCK_BYTES * BLOCK_BYTES
    span, largest.end = Span(middle, largest.end), middle
    return span

  def steal_stalled(self) -> Optional[Span]:
    """What a connection was to fetch of which nothing has been heard for a while."""
    with self.lock:
      for old in self.spans:
        if time.monotonic() > old.moved + STALL_SECONDS:
          old.void = True
          span = Span(old.position, old.end)
          self.spans[self.spans.index(old)] = span
          return span
      self.lock.wait(0.1)
    return None

  def release(self, span: Span) -> None:
    """A connection fetches no more of its span; what is left of it is a gap."""
    with self.lock:
      if span.void:
        return
      span.void = True
      self.spans.remove(span)
      if self.blocks and span.position < span.end:
        first, last = span.position // BLOCK_BYTES, -(-span.end // BLOCK_BYTES)
        self.blocks[first:last] = bytes(last - first)
        self.done -= span.position - max(first * BLOCK_BYTES, min(self.hashed, span.position))
      self.lock.notify_all()

  def yield_to_urgent(self, span: Span) -> None:
    """Let spans that somebody waits for come first; not for long, or the server hangs up."""
    until = time.monotonic() + STALL_SECONDS
    with self.lock:
      while span.position >= span.wanted and time.monotonic() < until:
        now = time.monotonic()
        if not any(it.position < it.wanted and now < it.moved + 1 for it in self.spans):
          return
        self.lock.wait(POLL_SECONDS)

  def write(self, span: Span, chunk: bytes) -> None:
    """Take in the next bytes of a span."""
    with self.lock:
      if span.void:
        raise Cancelled()
      before = span.position
      chunk = chunk[: span.end - before]
      write_at(self.file, chunk, before)
      span.position, span.moved = before + len(chunk), time.monotonic()
      self.done += len(chunk)
      if self.blocks:
        first, last = before // BLOCK_BYTES, span.position // BLOCK_BYTES
        last = len(self.blocks) if span.position == self.total else last
        self.blocks[first:last] = b"\1" * (last - first)
        write_at(self.map_file, self.blocks[first:last], first)
        self.lock.notify_all()
    if self.hashing.acquire(False):  # else whoever has it gets there
      try:
        if self.hashed == before and not span.void:
          self.take(chunk)
        elif not span.void:
          self.catch_up(HASH_STEP_BYTES)
      finally:
        self.hashing.release()

  def take(self, chunk: bytes) -> None:
    """Hash the bytes that come next."""
    self.hash.update(chunk)
    self.hashed += len(chunk)
    if len(self.head) < 512:
      self.head = (self.head + chunk[:512])[:512]

  def catch_up(self, most: int) -> None:
    """Hash what has come before its turn, read back from the file."""
    end = self.done
    if self.blocks:
      ends = [self.blocks.find(state, self.hashed // BLOCK_BYTES) for state in (0, 2)]
      end = min([at * BLOCK_BYTES for at in ends if at >= 0] + [self.total or 0])
    end = min(end, self.hashed + most)
    while self.hashed < end:
      chunk = os.pread(self.file, min(CHUNK_BYTES, end - self.hashed), self.hashed)
      if not chunk:
        raise QvmError(f"{self.part} became shorter while it was read")
      self.take(chunk)

  def hash_all(self) -> None:
    """Hash all that is there from the beginning on."""
    before = -1
    while self.hashed > before:
      if self.net.cancelled.is_set():
        raise Cancelled()
      before = self.hashed
      with self.hashing:
        self.catch_up(HASH_STEP_BYTES)

  def complete(self) -> bool:
    return self.total is not None and self.done == self.total


class OtherDownload:
  """A download of another qvm, as far as its files tell; it may begin, end or go meanwhile."""

  def __init__(self, name: str, folder: str) -> None:
    self.name = name
    self.part, self.note, self.map = part_files(name, folder)

  @property
  def total(self) -> Optional[int]:
    total = read_json(self.note).get("total")
    return total if isinstance(total, int) else None

  @property
  def done(self) -> int:
    with contextlib.suppress(OSError), open(self.map, "rb") as file:
      return min(file.read().count(1) * BLOCK_BYTES, self.total or 0)
    with contextlib.suppress(OSError):
      return os.path.getsize(self.part)
    return 0


def write_at(fd: int, data: Any, position: int) -> None:
  """Write all bytes at a place in a file."""
  view = memoryview(data)
  while view:
    count = os.pwrite(fd, view, position)
    view, position = view[count:], position + count


def download(net: Net, url: str, name: str, folder: str) -> Transfer:
  """Fetch url to folder/NAME.part, resuming what is there; returns it complete and looked at."""
  transfer = Transfer(net, url, name, folder)
  Transfer.running.append(transfer)
  try:
    transfer.hash_all()
    if not transfer.complete():
      with_retries(net, url, lambda: fetch_rest(transfer), lambda: transfer.done)
    transfer.hash_all()
    check_kind(transfer)
  finally:
    Transfer.running.remove(transfer)
    transfer.close()
    if any(helper.is_alive() for helper in transfer.helpers):
      Transfer.abandoned = True
  fetched, seconds = transfer.done - transfer.resumed, time.monotonic() - transfer.started
  rate = megabytes(fetched / max(seconds, 0.001))
  say(f"downloaded {name}: {megabytes(fetched)} in {seconds:.1f} s ({rate}/s)")
  return transfer


def fetch_rest(transfer: Transfer) -> None:
  """One attempt: ask for the bytes that are missing, gap by gap."""
  span = transfer.claim()
  while span and fetch_span(transfer, span):
    span = next_span(transfer)
  if transfer.total is None:  # a chunked body, which tells its own end
    transfer.total = transfer.done
  if transfer.done != transfer.total:
    done, total = megabytes(transfer.done), megabytes(transfer.total)
    raise Transient(f"{redacted(transfer.url)}: the connection ended after {done} of {total}")


def next_span(transfer: Transfer) -> Optional[Span]:
  """What is left to fetch, if need be once the others are done; None when there is nothing."""
  while True:
    busy = bool(transfer.spans)  # asked first: what they do not fetch after all is claimed then
    span = transfer.claim() or (transfer.steal_stalled() if busy else None)
    if span or not busy:
      return span
    if transfer.net.cancelled.is_set():
      raise Cancelled()


def fetch_span(transfer: Transfer, span: Span, helper: bool = False) -> bool:
  """Ask for a span, and write what comes; whether all of it did. A helper starts nothing over."""
  try:
    with open_span(transfer, span, helper) as answer:
      transfer.address = answer.geturl()
      try:
        if answer.getcode() == 206:
          check_range(transfer, span, answer.headers, helper)
        elif helper:
          raise no_range(transfer, answer.headers)
        else:
          start_over(transfer, answer.headers)
          span = transfer.claim() or span
        check_space(transfer)
        announce(transfer)
        transfer.open_part()
        copy_body(transfer, answer, span, helper)
      except OSError as error:
        raise write_failure(transfer.part, transfer.total or transfer.done, error)
      finally:
        keep(transfer, answer, span.position)
    return span.position == span.end
  finally:
    transfer.release(span)


def open_span(transfer: Transfer, span: Span, helper: bool) -> Any:
  """Ask for the bytes of a span, if nothing is there for the whole file."""
  headers, end = {}, span.end
  if transfer.done and transfer.validator:
    last = "" if end in (UNKNOWN, transfer.total) else end - 1
    headers = {"Range": f"bytes={span.position}-{last}", "If-Range": transfer.validator}
  if helper and transfer.address:
    with contextlib.suppress(QvmError):
      if proxy_used(transfer.address):
        return open_url(transfer.net, transfer.address, headers)
      answer = open_kept(transfer, headers, end - span.position)
      if answer:
        answer.end = end
        return answer
    transfer.address = ""  # it has expired
  try:
    return open_url(transfer.net, transfer.url, headers)
  except Transient as error:
    if error.code == 416 and not helper:
      transfer.reset()
    raise


def open_kept(transfer: Transfer, headers: Dict[str, str], count: int) -> Any:
  """Ask for a range where the last answer came from; None unless so many bytes are what comes.

  It saves the redirects, and where an earlier connection is idle the round trips of a new one.
  """
  parts = urllib.parse.urlsplit(transfer.address)
  if parts.scheme not in ("http", "https") or "@" in parts.netloc:
    return None
  path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
  https = parts.scheme == "https"
  while True:
    link = take_idle(transfer)
    new = not link
    if new:
      kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
      link = with_connect(kind)(parts.netloc, timeout=transfer.net.timeout)
    try:
      link.request("GET", path, headers={**headers, "User-Agent": "qvm/" + __version__})
      answer = link.getresponse()
    except Exception as error:
      link.close()
      if new:
        raise connection_failure(transfer.address, error)
      continue  # the server has closed it meanwhile
    length, coding = map(answer.getheader, ("Content-Length", "Content-Encoding"))
    if answer.status == 206 and length == str(count) and not coding:
      answer.url, answer.link = transfer.address, link
      return answer
    link.close()
    return None


IDLE_SECONDS = 10.0  # seconds after which a connection is not used again: it may be dead by then


def take_idle(transfer: Transfer) -> Any:
  """A connection that is idle; None when there is none."""
  with transfer.lock:
    while transfer.kept:
      link, since = transfer.kept.pop()
      if time.monotonic() < since + IDLE_SECONDS:
        return link
      link.close()
  return None


def keep(transfer: Transfer, answer: Any, position: int) -> None:
  """Keep the connection of an answer that has been read to its end; close any other."""
  link = getattr(answer, "link", None)
  answer.close()
  with transfer.lock:
    if link and position == answer.end and link.sock and transfer.file >= 0:
      transfer.kept.append((link, time.monotonic()))
    elif link:
      link.close()


def add_connections(transfer: Transfer) -> None:
  """Let more connections fetch the rest."""
  transfer.use_map()
  for _ in range(CONNECTIONS - 1):
    helper = threading.Thread(target=helper_loop, args=(transfer,), daemon=True)
    transfer.helpers.append(helper)
    helper.start()


def helper_loop(transfer: Transfer) -> None:
  """Fetch gaps beside the first connection until there are none, or the server wants no more."""
  with contextlib.suppress(QvmError, Transient, Cancelled, OSError):
    span = transfer.claim(helper=True)
    while span:
      start = span.position
      try:
        fetch_span(transfer, span, helper=True)
      except Transient:
        if span.position == start:
          return
      span = transfer.claim(helper=True)


def is_slow(transfer: Transfer, headers: Any, seconds: float, count: int) -> bool:
  """Whether several connections may bring a file sooner than the one that has brought so much."""
  return (
    seconds >= SLOW_AFTER_SECONDS
    and count < SLOW_RATE * seconds
    and not transfer.helpers
    and transfer.total is not None
    and transfer.total - transfer.done >= PARALLEL_MIN_BYTES
    and gives_ranges(transfer, headers)
  )


def gives_ranges(transfer: Transfer, headers: Any) -> bool:
  """Whether the server lets parts of just this object be fetched."""
  ranges = (headers.get("Accept-Ranges") or "").lower() == "bytes" or headers.get("Content-Range")
  return bool(ranges) and bool(re.match(STRONG_ETAG_RE, transfer.validator))


def check_space(transfer: Transfer) -> None:
  """Refuse a download for which there is no room, counting those that go on beside it."""
  running = [it for it in list(Transfer.running) if it.total is not None]
  wanted = sum((it.total or 0) - it.done for it in running)
  free = free_space(os.path.dirname(transfer.part))
  if wanted > free:
    raise disk_full(transfer.part, wanted - free)


def announce(transfer: Transfer) -> None:
  """Say once that a download starts or goes on."""
  if transfer.announced:
    return
  transfer.announced = True
  size = megabytes(transfer.total) if transfer.total is not None else "unknown size"
  if transfer.done:
    size = f"going on at {megabytes(transfer.done)} of {size}"
  say(f"downloading {transfer.name} ({size}) from {redacted(transfer.url)}")


def check_range(transfer: Transfer, span: Span, headers: Any, helper: bool) -> None:
  """A 206 must bring just the bytes asked for, of the same object; else all starts over."""
  match = re.match(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)\Z", headers.get("Content-Range") or "")
  etag = headers.get("ETag") or ""
  same = transfer.validator in (etag, headers.get("Last-Modified"))
  if (
    not match
    or [int(match.group(i)) for i in (1, 3)] != [span.position, transfer.total]
    or not same
  ):
    problem = no_range(transfer, headers)
    if not helper:
      transfer.reset()
    raise problem


CHANGED = 412  # as the code of a Transient: the object is another one than before


def no_range(transfer: Transfer, headers: Any) -> Transient:
  """The error for an answer that is not the range that was asked for."""
  etag = headers.get("ETag")
  code = CHANGED if etag and etag != transfer.validator else 0
  return Transient(
    f"{redacted(transfer.url)}: the server sends another part than asked for", code=code
  )


STRONG_ETAG_RE = r'"[^"]*"\Z'  # an ETag that stands for the very bytes


def start_over(transfer: Transfer, headers: Any) -> None:
  """A 200 brings the whole object: note what a resume needs before its first byte is written."""
  if transfer.done:
    say(f"{transfer.name} has changed or cannot be resumed; starting from the beginning")
  transfer.reset()
  length = headers.get("Content-Length") or ""
  chunked = (headers.get("Transfer-Encoding") or "").lower() == "chunked"
  if re.match(r"[0-9]{1,15}\Z", length) and not chunked:
    transfer.total = int(length)
  elif not chunked:  # the connection may have ended before it did
    raise Transient(f"{redacted(transfer.url)}: the server does not say how long the file is")
  etag = headers.get("ETag") or ""
  transfer.validator = (
    etag if re.match(STRONG_ETAG_RE, etag) else (headers.get("Last-Modified") or "")
  )
  transfer.save_note()


def copy_body(transfer: Transfer, answer: Any, span: Span, helper: bool) -> None:
  """Write the body to the part file, looking at its first bytes on the way."""
  looked = len(transfer.head) >= 512
  began, start = time.monotonic(), span.position
  while not transfer.net.cancelled.is_set():
    wanted = min(CHUNK_BYTES, span.end - span.position)
    try:
      chunk = answer.read1(wanted) if wanted else b""  # what is there: a time-out loses none of it
    except socket.timeout:
      raise Transient(f"{redacted(transfer.url)}: no more data for {transfer.net.timeout:g} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
      raise Transient(f"{redacted(transfer.url)}: the connection broke: {describe(error)}")
    if not chunk:
      return
    transfer.yield_to_urgent(span)
    transfer.write(span, chunk)
    if not looked and len(transfer.head) >= 512:
      looked = True
      check_kind(transfer)
    seconds, count = time.monotonic() - began, span.position - start
    if not helper and is_slow(transfer, answer.headers, seconds, count):
      add_connections(transfer)
  raise Cancelled()


def check_kind(transfer: Transfer) -> None:
  """Refuse what is visibly not the file asked for, before more of it comes."""
  problem = ""
  if looks_like_html(transfer.head):
    problem = "is an HTML page instead of the file"
  elif transfer.name.endswith(".qcow2") and transfer.head[:4] != b"QFI\xfb":
    problem = "is not a qcow2 image"
  if problem:
    transfer.reset()
    raise QvmError(
      f"{redacted(transfer.url)} {problem}",
      "does a proxy or a login page of this network stand in between?",
    )


def draw_progress() -> None:
  """One line with how far each running download is."""
  texts = []
  for transfer in list(Transfer.running):
    done, total = transfer.done, transfer.total
    share = f" {100 * done // total}%" if total else ""
    texts.append(f"{transfer.name}{share} {megabytes(done)}")
  if texts:
    report.draw(" | ".join(texts))


def in_parallel(net: Net, jobs: Sequence[Callable[[], None]]) -> None:
  """Run the jobs at the same time; the first failure is raised and ends the others.

  The threads are daemons, and the main thread only waits: a signal ends qvm at once, and what
  has been downloaded stays for the next run.
  """
  results: queue.Queue[Optional[BaseException]] = queue.Queue()

  def work(job: Callable[[], None]) -> None:
    try:
      job()
    except BaseException as error:  # handed to the main thread, which raises it
      results.put(error)
    else:
      results.put(None)

  threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
  for thread in threads:
    thread.start()
  pause = 0.2 if os.isatty(2) else 5.0
  try:
    for _ in jobs:
      failure = next_result(results, pause)
      if failure:
        raise failure
  except BaseException as error:
    net.cancelled.set()
    Transfer.abandoned = True
    if isinstance(error, Exception):  # no signal: let the others put away what they have in hand
      until = time.monotonic() + 1
      for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    raise


def next_result(results: Any, pause: float) -> Optional[BaseException]:
  """Wait for a job to end, showing the progress meanwhile if that was asked for."""
  shown = time.monotonic()
  while True:
    try:
      return results.get(timeout=min(pause, POLL_SECONDS))  # type: ignore[no-any-return]
    except queue.Empty:
      if report.progress and time.monotonic() >= shown + pause:
        shown = time.monotonic()
        draw_progress()


@contextlib.contextmanager
def download_lock(folder: str, name: str) -> Iterator[None]:
  """Hold the right to fetch one artefact into a folder, waiting for a qvm that fetches it.

  Beside it goes a shared lock on the folder: `clean` takes that alone.
  """
  path, other = os.path.join(folder, name + ".lock"), OtherDownload(name, folder)

  def wait() -> bool:
    say(f"waiting for another qvm that downloads {name}")
    Transfer.running.append(other)
    return True

  shared = os.open(folder, os.O_RDONLY)
  try:
    try:
      lock_file(shared, folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      say("waiting for another qvm that cleans up")
      lock_file(shared, folder, fcntl.LOCK_SH)
    try:
      fd = try_lock(path, wait)
    finally:
      while other in Transfer.running:
        Transfer.running.remove(other)
    assert fd is not None  # wait says yes
    try:
      yield
    finally:
      drop_lock(fd, path)
  finally:
    os.close(shared)


@contextlib.contextmanager
def reset_if_refused(transfer: Transfer) -> Iterator[None]:
  """Forget a download that turns out to be damaged or hostile."""
  try:
    yield
  except RefusedError:
    transfer.reset()
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
# Tar streams are not trusted, wherever they come from: QEMU's archives, bundles, and guests. Each
# step down goes through a descriptor of the folder above and follows no link, so nothing is ever
# written outside. Owners and times in an archive do not matter, nor does the version of tarfile,
# which only reads headers, and no more of them than an honest archive has.

MAX_PATH_BYTES = 4095  # what Linux lets a path have; no system of ours allows more
MAX_DISK_BYTES = 1 << 40  # bytes of a bundle's disk, holes included
MAX_HEADER_BYTES = 1 << 20  # of one member; names and a map of holes take some kilobytes
MAX_HEADERS = 8  # of one member: honest tars write at most three before the real one
MAX_REST_BYTES = 1 << 30  # what may come behind the end of an archive: padding
BAD_NAME_ERRORS = (
  errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
  errno.ENOTDIR,
)  # fmt: skip


class Limits(NamedTuple):
  """How much an honest archive has at most."""

  members: int
  size: int  # bytes of all members, holes included
  headers: int  # bytes of the headers of one member


QEMU_LIMITS = Limits(20000, 1 << 30, MAX_HEADER_BYTES)  # a QEMU has some hundred members
BUNDLE_LIMITS = Limits(3, MAX_DISK_BYTES, 16 << 20)  # 24 bytes for each piece of a disk


def in_utf8(name: str) -> str:
  """A name of this system as tarfile has it: its bytes read as UTF-8, whatever the locale."""
  return os.fsencode(name).decode("utf-8", "surrogateescape")


def from_utf8(name: str) -> str:
  """The reverse of in_utf8."""
  return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def safe_name(name: str) -> List[str]:
  """The parts of an archive member's name; ValueError when it could lead out of the tree."""
  if name.startswith("/") or "\0" in name or len(os.fsencode(name)) > MAX_PATH_BYTES:
    raise ValueError("is not a plain path")
  parts = [part for part in name.split("/") if part not in ("", ".")]
  if any(len(os.fsencode(part)) > 255 for part in parts):
    raise ValueError("has too long a name")
  if ".." in parts:
    raise ValueError("leads out of its folder")
  return parts


def check_link(parts: Sequence[str], target: str) -> None:
  """A symbolic link may only climb within the tree, and only at the start of its target."""
  if not target or target.startswith("/") or "\0" in target or len(target) > MAX_PATH_BYTES:
    raise ValueError(f"is a link to {target[:100]}")
  words = [word for word in target.split("/") if word not in ("", ".")]
  climbs = 0
  while climbs < len(words) and words[climbs] == "..":
    climbs += 1
  if climbs >= len(parts) or ".." in words[climbs:]:
    raise ValueError(f"is a link out of its folder, to {target[:100]}")


class Meter:
  """A stream that ends with a ValueError where more is read than tarfile has a reason to."""

  def __init__(self, stream: IO[bytes], allowed: int) -> None:
    self.stream, self.position, self.allowed = stream, 0, allowed

  def read(self, size: int) -> bytes:
    data = self.stream.read(size)
    self.position += len(data)
    if self.position > self.allowed:
      raise ValueError("it has headers without end")
    return data


def header_class(several: bool) -> Any:
  """A TarInfo that looks at each header before tarfile believes it; for one stream.

  tarfile takes a damaged or cut header for the end of an archive, and follows headers that
  announce further ones until the stack or the memory is used up.
  """

  class Header(tarfile.TarInfo):
    chain = 0
    ended = several  # whether the last block was one of zeros, as at an archive's end

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
      if len(buf) not in (0, 512) or (not buf and not (several and cls.ended)):
        raise ValueError("it is cut short")
      cls.ended = buf.count(0) == len(buf)
      try:
        member = super().frombuf(buf, encoding, errors)
      except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
        raise ValueError(f"it is no tar stream, or damaged: {error}")
      more = not member.isreg() and not member.isdev() and not member.isdir()
      cls.chain = cls.chain + 1 if more and member.type not in b"12" else 0
      if not 0 <= member.size <= MAX_DISK_BYTES or (more and member.size > MAX_HEADER_BYTES):
        raise ValueError(f"it has a header of {member.size} bytes")
      if cls.chain > MAX_HEADERS:
        raise ValueError("it has headers without end")
      return member

  return Header


def tar_members(
  stream: IO[bytes], headers: int, several: bool = False
) -> Iterator[Tuple["tarfile.TarFile", "tarfile.TarInfo"]]:
  """The members of an untrusted tar stream, or of several one behind the other.

  Each comes with its archive, whose fileobj is at the content. ValueError or TarError when the
  stream is damaged, cut short, or has more than so many bytes of headers for one member.
  """
  meter: Any = Meter(stream, headers + CHUNK_BYTES)
  archive: Any
  with tarfile.open(
    fileobj=meter, mode="r|", bufsize=CHUNK_BYTES, ignore_zeros=several,
    tarinfo=header_class(several), encoding="utf-8", errors="surrogateescape",
  ) as archive:  # fmt: skip
    while True:
      try:
        member = archive.next()
      except (LookupError, OverflowError, RecursionError, MemoryError):
        raise ValueError("it is damaged")  # which tarfile has not foreseen
      if member is None:
        return
      archive.members = []  # it would grow with each
      archive.pax_headers.clear()  # so would these
      member.name, member.linkname = from_utf8(member.name), from_utf8(member.linkname)
      meter.allowed = archive.offset + headers + CHUNK_BYTES
      if not 0 <= member.size <= MAX_DISK_BYTES:
        raise ValueError(f"it has a member of {member.size} bytes")
      yield archive, member


def pieces_of(member: "tarfile.TarInfo") -> List[Tuple[int, int]]:
  """The (offset, size) of what a member has between its holes; ValueError when they overlap."""
  sparse: Any = member.sparse if member.issparse() else [(0, member.size)]
  pieces, end = [(offset, size) for offset, size in sparse if size], 0  # tarfile adds (0, 0)
  for offset, size in pieces:
    if size < 0 or offset < end or offset + size > member.size:
      raise ValueError("has pieces out of place")
    end = offset + size
  return pieces


def write_member(archive: "tarfile.TarFile", member: "tarfile.TarInfo", file: IO[bytes]) -> None:
  """Write a member so that its holes, and what is zero throughout, take no space on the disk.

  The pieces of a sparse member lie one behind the other in the stream, which is at the first.
  """
  zeros = bytes(CHUNK_BYTES)
  for offset, size in pieces_of(member):
    while size > 0:
      chunk = archive.fileobj.read(min(size, CHUNK_BYTES))
      if not chunk:
        raise ValueError("is cut short")
      if chunk != zeros[: len(chunk)]:
        file.seek(offset)
        file.write(chunk)
      offset, size = offset + len(chunk), size - len(chunk)
  file.truncate(member.size)


class Folder:
  """A folder, opened once; what is below it is reached step by step and through no link."""

  def __init__(self, path: str) -> None:
    self.path = path
    self.root = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    self.inner, self.inner_parts = os.dup(self.root), ()  # type: int, Tuple[str, ...]

  def __enter__(self: "AnyFolder") -> "AnyFolder":
    return self

  def __exit__(self, *error: Any) -> None:
    os.close(self.inner)
    os.close(self.root)

  def enter(self, parts: Sequence[str]) -> int:
    """A descriptor of a folder below, good until the next call; OSError where there is none."""
    parts, known = tuple(parts), len(self.inner_parts)
    if parts[:known] != self.inner_parts:
      known = 0
    fd = os.dup(self.inner if known else self.root)
    try:
      for name in parts[known:]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        inner = os.open(name, flags, dir_fd=fd)
        os.close(fd)
        fd = inner
      fd, self.inner, self.inner_parts = self.inner, fd, parts
    finally:
      os.close(fd)
    return self.inner

  def make(self, parts: Sequence[str]) -> int:
    """As enter(), but a folder that is missing is made."""
    with contextlib.suppress(FileNotFoundError):
      return self.enter(parts)
    for number, name in enumerate(parts):
      with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=self.enter(parts[:number]))
    return self.enter(parts)

  def open_file(self, parts: Sequence[str]) -> IO[bytes]:
    """A plain file below, for reading; OSError or ValueError when there is none."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO would let us wait for ever
    fd = os.open(parts[-1], flags, dir_fd=self.enter(parts[:-1]))
    if S_ISREG(os.fstat(fd).st_mode):
      return os.fdopen(fd, "rb", 0)
    os.close(fd)
    raise ValueError("is no file")


AnyFolder = TypeVar("AnyFolder", bound=Folder)


class Unpacker(Folder):
  """A new folder into which an archive is unpacked, or refused whole with a ValueError.

  Then the caller throws the folder away. Section Sync has one that leaves out what it refuses.
  """

  def __init__(self, path: str, limits: Limits, expected: Sequence[str] = ()) -> None:
    os.mkdir(path, 0o755)
    super().__init__(path)
    self.limits, self.expected, self.size = limits, expected, 0

  def unpack(self, stream: IO[bytes]) -> None:
    """Unpack all of a tar stream; expected names, if given, are all that it may hold."""
    for number, (archive, member) in enumerate(tar_members(stream, self.limits.headers)):
      self.size += member.size
      if number >= self.limits.members or self.size > self.limits.size:
        raise ValueError("it holds more than an honest one")
      try:
        self.put(archive, member)
      except ValueError as error:
        raise ValueError(f"its member '{member.name[:100]}' {error}")
      except OSError as error:
        if error.errno not in BAD_NAME_ERRORS:
          raise
        raise ValueError(f"its member '{member.name[:100]}' finds no place: {describe(error)}")

  def put(self, archive: "tarfile.TarFile", member: "tarfile.TarInfo") -> None:
    """Give one member its place; ValueError when it is not a plain file, folder or link."""
    parts = safe_name(member.name)
    if member.mode & 0o4000 or (member.mode & 0o2000 and not member.isdir()):
      raise ValueError("has a set-uid or set-gid bit")
    if self.expected and parts and not (member.isreg() and "/".join(parts) in self.expected):
      raise ValueError("is not expected")
    if member.isdir():
      self.make(parts)
    elif not parts:
      raise ValueError("has no name")
    elif member.issym():
      check_link(parts, member.linkname)
      os.symlink(member.linkname, parts[-1], dir_fd=self.make(parts[:-1]))
    elif member.islnk() or member.isreg():
      self.put_file(archive, member, parts)
    else:
      raise ValueError("is a device or another special file")

  def put_file(
    self, archive: "tarfile.TarFile", member: "tarfile.TarInfo", parts: Sequence[str]
  ) -> None:
    """Write a file, or a copy of the file that a hard link leads to."""
    source = None
    if member.islnk():
      source = self.open_linked(member.linkname)
      self.size += os.fstat(source.fileno()).st_size
      if self.size > self.limits.size:
        raise ValueError("is one copy too many")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    fd = os.open(parts[-1], flags, 0o600, dir_fd=self.make(parts[:-1]))
    with os.fdopen(fd, "wb") as file:
      if source:
        with source:
          shutil.copyfileobj(source, file, CHUNK_BYTES)
      else:
        write_member(archive, member, file)
      os.fchmod(fd, 0o755 if member.mode & 0o100 else 0o644)

  def open_linked(self, name: str) -> IO[bytes]:
    """The file that a hard link leads to, which has come before it; ValueError without."""
    parts = safe_name(name)
    try:
      return self.open_file(parts)
    except (OSError, IndexError):
      raise ValueError(f"is a link to {name[:100]}, which is no file that has come")


def open_packed(path: str) -> IO[bytes]:
  """The unpacked bytes of a file that gzip, bzip2, xz or nothing has packed, as a stream."""
  with open(path, "rb") as file:
    start = file.read(6)
  for magic, module in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\0", lzma)):
    if start.startswith(magic):
      return module.open(path)  # type: ignore[no-any-return]
  return open(path, "rb")


def unpack_aside(path: str, folder: str, names: Sequence[str]) -> str:
  """Unpack a downloaded archive into a new folder and return the file that has one of the names.

  It may lie in that folder or, in an archive with one top folder, in that one. RefusedError
  when the archive is damaged, hostile or without that file; then nothing is left of it.
  """
  remove_tree(folder)
  try:
    with open_packed(path) as stream, Unpacker(folder, QEMU_LIMITS) as unpacker:
      unpacker.unpack(stream)
    return find_unpacked(folder, names)
  except (tarfile.TarError, zlib.error, lzma.LZMAError, ValueError, EOFError) as error:
    problem = str(error).split("\n")[0].rstrip(":") or "it is damaged"
  except OSError as error:
    if error.errno is not None:
      failure = write_failure(folder, os.path.getsize(path), error)  # a plain tar is no smaller
      remove_tree(folder)
      raise failure
    problem = describe(error)  # of a damaged gzip or bzip2 file
  remove_tree(folder)
  remove_file(path)
  raise RefusedError(f"{os.path.basename(path)[: -len('.part')]} is refused: {problem}")


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
    path = find_program(name)  # macOS has a bsdtar that knows no zstd
    if path and (name != "bsdtar" or "zstd" in ask_program([path, "--version"])[1]):
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


def unpack_bundle(path: str, folder: str) -> None:
  """Unpack disk.img and kernel, and nothing else, from a bundle into a new folder.

  ValueError or TarError when the bundle is damaged or hostile.
  """
  zstd = python_zstd()
  if not zstd:
    return unpack_by_program(path, folder)
  try:
    with zstd.open(path) as stream:
      unpack_disk(stream, folder)
  except zstd.ZstdError as error:
    raise ValueError(str(error))


def unpack_by_program(path: str, folder: str) -> None:
  """As unpack_bundle(), by a program; QvmError with its words when that fails.

  Such a failure does not say whether the bundle is damaged or the program at fault.
  """
  with open(path, "rb") as packed, tempfile.TemporaryFile() as words:
    command = unzstd_command()
    process = start(command, stdin=packed, stdout=subprocess.PIPE, stderr=words)
    try:
      try:
        unpack_disk(process.stdout, folder)
      finally:
        ended = not process.stdout.read(1)  # else it is ended because of what it has unpacked
        process.stdout.close()
        if ended and process.wait():
          words.seek(0)
          text = " ".join(words.read(TAIL_BYTES).decode("utf-8", "replace").split())
          raise QvmError(
            f"{command[0]} cannot unpack {os.path.basename(path)} ({ending(process.returncode)}): "
            f"{text}",
            "the download is kept, should the program be at fault; qvm clean deletes it",
          )
    finally:
      end_process(process)


def unpack_disk(stream: IO[bytes], folder: str) -> None:
  """Unpack the tar stream of a bundle, and look at all that follows: the checksum comes last."""
  with Unpacker(folder, BUNDLE_LIMITS, ("disk.img", "kernel")) as unpacker:
    unpacker.unpack(stream)
  for _ in range(MAX_REST_BYTES // CHUNK_BYTES):
    if not stream.read(CHUNK_BYTES):
      break
  else:
    raise ValueError("it does not end")
  if not os.path.isfile(os.path.join(folder, "disk.img")):
    raise ValueError("it holds no disk.img")


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


def fetch_asset(
  releases: Releases, repo: str, tag: str, name: str, folder: str
) -> Tuple[Transfer, Dict[str, Any]]:
  """Download an asset and check its digest where the release data name one.

  Returns it with its record. One that differs is fetched once more from the start.
  """
  url = asset_url(releases.net, repo, tag, name)
  for last in (False, True):
    expected = Future(lambda: releases.digest(repo, tag, name))
    transfer = download(releases.net, url, name, folder)
    digest, wanted = transfer.hash.hexdigest(), expected.result()
    if not wanted:
      say(f"no digest is known for {name}: only its length could be checked")
    if not wanted or digest == wanted:
      break
    transfer.reset()
    problem = f"{redacted(url)}: what arrives has not the digest that the release names"
    if last:
      raise QvmError(f"{problem} (sha256 {wanted}, not {digest})", "it has been deleted")
    say(f"{problem}; fetching it once more")
    releases.forget(repo, tag)
  return transfer, asset_record(transfer, tag, digest)


def asset_record(transfer: Transfer, tag: str, digest: str) -> Dict[str, Any]:
  """The record of an asset that has come whole."""
  return {
    "release": tag,
    "url": transfer.url,
    "validator": transfer.validator,
    "size": transfer.done,
    "asset_sha256": digest,
    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
  }


def is_there(plan: Plan, releases: Releases, path: str, name: str) -> bool:
  """Whether a part of resources is cached, with --refresh also whether it is the newest."""
  if not os.path.isfile(path) or not plan.refresh:
    return os.path.isfile(path)
  url = asset_url(releases.net, "resources", releases.tag("resources"), name)
  newest = record_of(path).get("url") == url
  if newest:
    say(f"{name} is the newest")
  return newest


def fetch_resource(releases: Releases, name: str, folder: str) -> Tuple[Transfer, Dict[str, Any]]:
  """Download an asset of the newest release of QEMU."""
  return fetch_asset(releases, "resources", releases.tag("resources"), name, folder)


def fetch_qemu(plan: Plan, releases: Releases) -> None:
  """Download QEMU for the guest's CPU and put its tree in place."""
  with download_lock(downloads_dir(plan), plan.qemu_asset):
    if is_there(plan, releases, tree_program(plan), plan.qemu_asset):
      return
    transfer, record = fetch_resource(releases, plan.qemu_asset, downloads_dir(plan))
    aside = plan.tree + ".tmp"
    with reset_if_refused(transfer):
      program = unpack_aside(transfer.part, aside, ("bin/qemu",))
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
    record["sha256"] = tree_sha256(root)
    write_json(os.path.join(root, "release.json"), record)
    with instances_lock(instances_dir(plan.cache)):
      swap_tree(root, plan.tree)
    remove_tree(aside)
    transfer.reset()


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
  with download_lock(downloads_dir(plan), plan.tools_asset):
    if is_there(plan, releases, plan.qemu_img, plan.tools_asset):
      return
    transfer, record = fetch_resource(releases, plan.tools_asset, downloads_dir(plan))
    aside = os.path.join(plan.cache, "bin", "resources.tmp")
    with reset_if_refused(transfer):
      program = os.path.realpath(unpack_aside(transfer.part, aside, ("qemu-img", "bin/qemu-img")))
    record["sha256"] = file_sha256(program)
    with instances_lock(instances_dir(plan.cache)):
      publish_with_record(program, plan.qemu_img, record, 0o755)
    remove_tree(aside)
    transfer.reset()


def convert_bundle(plan: Plan, part: str, aside: str) -> str:
  """Unpack a downloaded bundle and make a qcow2 of its disk; returns the qcow2's path."""
  name = os.path.basename(part)[: -len(".part")]
  remove_tree(aside)
  say(f"unpacking {name}")
  try:
    unpack_bundle(part, aside)
  except (tarfile.TarError, ValueError, EOFError) as error:
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


def fetch_image(plan: Plan, releases: Releases, tools: Callable[[], None]) -> None:
  """Make the base image from the newest release that has it; tools waits for qemu-img."""
  repo = image_repo(plan.guest.os)
  with download_lock(downloads_dir(plan), plan.image_asset):
    there = os.path.isfile(plan.base)
    if there and not plan.refresh:
      return
    pinned = pinned_release(plan)
    for tag, name in [(pinned, plan.image_asset)] if pinned else candidates(plan, releases):
      url = asset_url(releases.net, repo, tag, name)
      if there and record_of(plan.base).get("url") == url:
        say(f"{name} of {tag} is the newest")
        return
      if there:
        if not asset_exists(releases.net, url):
          continue
        check_unused(plan)  # before the download; put_image looks again
      try:
        transfer, record = fetch_asset(releases, repo, tag, name, downloads_dir(plan))
      except NotFound:
        continue
      if tag != (pinned or releases.tag(repo)):
        say(f"{name} comes from {tag}; the newest release, {releases.tag(repo)}, has none")
      install_image(plan, transfer, record, tools)
      return
    raise gone_image(plan, pinned) if pinned else no_such_image(plan, releases)


def gone_image(plan: Plan, tag: str) -> QvmError:
  """The error for overlays that were begun on an image that the server has no more."""
  names = ", ".join(dependants(plan.cache, plan.base))
  return QvmError(
    f"{plan.image_asset} of {tag}, which these instances were begun on, cannot be had any more: "
    f"{names}",
    "qvm rm gives them up, with all that their guests wrote",
  )


def install_image(
  plan: Plan, transfer: Transfer, record: Dict[str, Any], tools: Callable[[], None]
) -> None:
  """Check a downloaded image, converted if it is a bundle, and make it the base image."""
  source, aside = transfer.part, os.path.join(downloads_dir(plan), plan.image_asset + ".tmp")
  record["sha256"] = record["asset_sha256"]
  try:
    with reset_if_refused(transfer):
      if transfer.name == plan.bundle_asset:
        tools()
        source = convert_bundle(plan, transfer.part, aside)
        record["sha256"] = file_sha256(source)
      check_image(source)
    record["bytes"] = os.path.getsize(source)
    with instances_lock(instances_dir(plan.cache)):
      if os.path.exists(plan.base):
        check_unused(plan)
      drop_checkpoints(plan, str(record["sha256"]))
      publish_with_record(source, plan.base, record, 0o444)
      put_kernel(os.path.join(aside, "kernel"), kernel_path(plan.base))
  finally:
    remove_tree(aside)
  transfer.reset()


def put_kernel(source: str, target: str) -> None:
  """Keep a bundle's kernel beside the base image, unused for now; without one there is none."""
  if os.path.exists(source):
    move_into_place(source, target, 0o444)
  else:
    remove_file(target)


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


SYNC_SUFFIX_RE = r"\.sync-[0-9a-f]{16}"  # what an instance has of a folder: section Sync


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
    for name in names_in(files.folder, ""):
      if re.match(re.escape(files.name) + SYNC_SUFFIX_RE + r"(\.tmp)?\Z", name):
        remove_file(os.path.join(files.folder, name))


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
  other = OtherDownload(name, os.path.join(cache, "downloads"))
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
  lines = ["trap : INT QUIT TERM HUP", *filter(None, [first])]
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
  lines += ["[ $qvm_code -le 256 ] || qvm_code=$((qvm_code - 128))"]  # ksh93 has 256+N
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
# How a folder goes to ~/work in the guest, and how what has changed there comes back.
#
# Lists decide, not clocks. The guest lists its copy by its own find and stat: kind, mode, size,
# inode and both times of each path. Two such lines are only ever compared for being equal. Where
# the tools tell no fractions of a second, equal means nothing, and everything goes and comes.
#
# In, one session: the guest lists; qvm answers with lines of shell, which remove what is in the way
# or was deleted here, and with a tar stream of what is not as the record says; the guest lists
# again. That list must account for every name, else the command does not run.
#
# Out, one session: the guest lists; qvm asks by name for what is not as it was last seen, and its
# tar sends that. Folders are made from the list. What was asked for and has not come is said. Only
# when all has come is anything deleted: what was seen there, is as it was here, and is gone there.
#
# The record, a file of the instance, has for each path its line in the guest's list when both sides
# were the same, and how the file was here. It saves work and is never trusted: each line must still
# be what the guest lists, each file here what lstat says. Losing it costs time, no data. Paths
# without a file here were in the guest before, and need not come.
#
# The guest is not trusted either: what comes is written as section Unpack says. And a file here is
# known by its inode: names that differ only in case or normalisation may be one file to this disk.

READY = "qvm-is-ready"  # the line after which a script reads or writes its stream
MAX_LIST_BYTES = 128 << 20  # of a guest's list: some million names
MAX_GUEST_PATH_BYTES = 1023  # of a path below ./ in the guest; all five have PATH_MAX 1024
MAX_OCTAL_SIZE = (1 << 33) - 1  # what eleven octal digits hold
RESERVE_BYTES = 16 << 20  # of the disk, which a guest's files do not get
MAX_SAID = 50  # names of one kind that are said
LINE_BYTES = 30000  # of names in one command of the guest's: its limit is 256 KB or more
# What HFS+ leaves out of account in names, as git's utf8.c has it.
IGNORED_CHARS = dict.fromkeys(
  [*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF]
)
OWN_FILE_RE = r"\.qvm-[0-9a-f]{12}\Z"  # half files that a killed qvm has left


class FileStamp(NamedTuple):
  """How a file is; one whose stamp is another one has been changed. Folders: mode, inode."""

  mode: int
  inode: int
  size: int
  mtime_ns: int
  ctime_ns: int


def stamp_of(stat: os.stat_result) -> FileStamp:
  """What lstat(2) says of a file, as far as it shows changes."""
  if S_ISDIR(stat.st_mode):
    return FileStamp(stat.st_mode, stat.st_ino, 0, 0, 0)
  return FileStamp(stat.st_mode, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class Known(NamedTuple):
  """How a path was when both sides were the same; here is None for what was only in the guest."""

  there: str
  here: Optional[FileStamp]


class Entry(NamedTuple):
  """A line of the guest's list."""

  kind: str  # d, f, l, or another letter for what is not synchronised
  mode: int  # -1 where the guest does not tell
  size: int
  stamp: str  # what is equal only while nothing has changed; empty where nothing tells


class Listing(NamedTuple):
  """What the guest lists, by path; complete unless its find says otherwise."""

  entries: Dict[str, Entry]
  complete: bool


@functools.lru_cache(maxsize=1 << 16)
def fold(name: str) -> str:
  """What is the same for all names that some file system takes for one."""
  text = unicodedata.normalize("NFD", in_utf8(name).translate(IGNORED_CHARS)).casefold()
  return unicodedata.normalize("NFD", text)


class Excludes:
  """What stays where it is: .git, what qvm has left, and what the patterns name."""

  def __init__(self, patterns: Sequence[str]) -> None:
    texts = [unicodedata.normalize("NFD", in_utf8(text)).rstrip("/") for text in patterns]
    names = [fnmatch.translate(text) for text in texts if "/" not in text]
    paths = [fnmatch.translate(text.lstrip("/")) for text in texts if "/" in text]
    self.names = re.compile("|".join([r"\.git\Z", OWN_FILE_RE, *names]))
    self.paths = re.compile("|".join(paths)) if paths else None

  def has_itself(self, path: str, name: str) -> bool:
    """Whether a path, whose last part that is, is left out for its own sake."""
    if self.names.match(unicodedata.normalize("NFD", in_utf8(name))):
      return True
    return bool(self.paths and self.paths.match(unicodedata.normalize("NFD", in_utf8(path))))

  def has(self, path: str) -> bool:
    """Whether a path, or a folder above it, is left out."""
    parts = unicodedata.normalize("NFD", in_utf8(path)).split("/")
    return any(map(self.names.match, parts)) or bool(
      self.paths and any(self.paths.match("/".join(parts[:n])) for n in range(1, len(parts) + 1))
    )


def is_git(path: str) -> bool:
  """Whether a part of a path is .git in some spelling."""
  return any(fold(part) == ".git" for part in path.split("/"))


def shown(path: str) -> str:
  """A path for a message."""
  return path if len(path) <= 240 else f"{path[:200]}…{path[-40:]}"


def say_each(paths: Sequence[str], problem: str) -> None:
  """Say something of each path, if there are not too many."""
  for path in paths[:MAX_SAID]:
    say(f"{shown(path)} {problem}")
  if len(paths) > MAX_SAID:
    say(f"and {len(paths) - MAX_SAID} more: each {problem}")


@functools.lru_cache(maxsize=None)
def opened_folder(path: str) -> Folder:
  """The folder of --sync, opened once: another one that is put in its place later is not taken."""
  if os.open not in os.supports_dir_fd:
    raise QvmError(
      "--sync needs a Python that opens files relative to a folder, and this one cannot",
      "take Python 3.9 or newer, from python.org, or your system's",
    )
  try:
    return Folder(path)
  except OSError as error:
    raise QvmError(f"{path}: {describe(error)}")


def check_sync(options: Options) -> None:
  """Look at all that is to be sent, before anything boots for it."""
  if options.sync:
    folder = opened_folder(options.sync)
    if options.sync_direction != "out":
      walk_folder(folder, Excludes(options.sync_exclude))


def walk_folder(folder: Folder, excludes: Excludes) -> Dict[str, os.stat_result]:
  """What lstat says of all below a folder, by path, folders before what is in them.

  qvm's own cache is left out, known by its inode. QvmError for what may not be read.
  """
  cache, found = cache_inode(), {}
  waiting: List[Tuple[str, ...]] = [()]
  while waiting:
    parts = waiting.pop()
    try:
      fd = folder.enter(parts)
      names, inner = sorted(os.listdir(fd)), []
    except (FileNotFoundError, NotADirectoryError):
      continue  # it has just vanished
    except OSError as error:
      raise unreadable(folder, "/".join(parts), error)
    for name in names:
      path = "/".join((*parts, name))
      with contextlib.suppress(FileNotFoundError):
        stat = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if excludes.has_itself(path, name) or is_git(name) or (stat.st_dev, stat.st_ino) == cache:
          continue
        found[path] = stat
        if S_ISDIR(stat.st_mode):
          inner.append((*parts, name))
        elif S_ISREG(stat.st_mode) and not may_read(fd, name, stat):
          raise unreadable(folder, path, PermissionError(errno.EACCES, "Permission denied"))
    waiting += reversed(inner)
  return found


def may_read(fd: int, name: str, stat: os.stat_result) -> bool:
  """Whether a file may be read; asked only where its mode does not let everybody."""
  return stat.st_mode & 0o444 == 0o444 or os.access(name, os.R_OK, dir_fd=fd)


def unreadable(folder: Folder, path: str, error: OSError) -> QvmError:
  """The error for what cannot be read here, with the way out."""
  where = os.path.join(folder.path, path).rstrip("/")
  return QvmError(
    f"{shown(where)} cannot be read: {describe(error)}",
    f"--sync-exclude {shlex.quote('/' + path)} leaves it out" if path else "",
  )


def cache_inode() -> Tuple[int, int]:
  """The device and inode of qvm's cache."""
  with contextlib.suppress(OSError):
    stat = os.stat(cache_folder(os.environ))
    return stat.st_dev, stat.st_ino
  return -1, -1


# The guest's list: each line begins with //, which no path has in it, and the last has find's exit
# code. stat is that of the BSDs, -printf is GNU's; without either, names and kinds must do.
LIST = r"""
LC_ALL=C; export LC_ALL
how=
[ "$(stat -f %HT . 2>/dev/null)" != Directory ] || how=stat
for each in find gfind; do
  case $how,$($each . -prune -printf '%y %C@' 2>/dev/null) in ,d\ *.*) how=$each ;; esac
done
list() {
  case $how in
    stat) find "$@" -exec stat -f '//%Sp %Lp %z %i/%Fm/%Fc %N' {} + ;;
    *find) $how "$@" -printf '//%y %m %s %i/%T@/%C@ %p\n' ;;
    *) find "$@" \( -type d -exec printf '//d - - - %s\n' {} + \
         -o -type f -exec printf '//f - - - %s\n' {} + \
         -o -type l -exec printf '//l - - - %s\n' {} + \) ;;
  esac
  echo "//end $?"
}
"""
# An empty line ends the lines that qvm sends; where there are no files to send, none comes. That a
# tar sends nothing is no failure where it may read nothing of what it is asked for.
SYNC = """
FIRST
cd FOLDER || exit
n='
'
send= code=0 quoted=
case $(tar --version </dev/null 2>/dev/null) in *GNU*) quoted=--no-unquote ;; esac
t() {
  tar -cf - $quoted "$@" </dev/null && return
  c=$?
  for f do [ ! -r "$f" ] && [ ! -h "$f" ] || code=$c; done
}
all() { list . PRUNE; }
finish() { :; }
echo READY
all
while IFS= read -r line && [ "$line" ]; do eval "$line"; done
[ ! "$send" ] || tar -xpf - || exit
all
finish
"""
# Folders that cannot be listed are opened.
OPEN = "mkdir -p FOLDER && cd FOLDER && find . -type d ! -perm -500 -exec chmod u+rwx {} \\;"
ASK = 'eval "$(cat)"; exit $code'  # the rest is lines that call t with names


def sync_script(first: str, name: str, patterns: Sequence[str]) -> str:
  """The script for the folder of that name in ~/work; first is what it does before all.

  Only patterns of which the guest's find says what fnmatch says are for it; all hold here.
  """
  names = [text.rstrip("/") for text in (".git", *patterns)]
  plain = [text for text in names if text and not re.search(r"[/\[\\?]", text)]
  prune = " -o ".join("-name " + shlex.quote(text) for text in plain)
  words = {
    "FOLDER": guest_folder(name),
    "READY": READY,
    "PRUNE": f"! -name . \\( {prune} \\) -prune -o",
  }
  script = SYNC.replace("FIRST", first, 1)
  return LIST + re.sub("FOLDER|READY|PRUNE", lambda match: words[match.group()], script)


def guest_folder(name: str) -> str:
  """Where a folder lies in the guest, quoted for sh."""
  return '"$HOME"/work/' + shlex.quote(name)


def guest_words(paths: Iterable[str]) -> Iterator[str]:
  """Paths as arguments for the guest's sh, on one line, as many at a time as one command takes."""
  words, size = [], 0
  for path in paths:
    word = shlex.quote("./" + path).replace("\n", "'\"$n\"'")
    words.append(word)
    size += len(word)
    if size > LINE_BYTES:
      yield " ".join(words)
      words, size = [], 0
  if words:
    yield " ".join(words)


def is_ready(stream: IO[bytes]) -> bool:
  """Read up to where a script begins: what the user's shell prints at its start comes before."""
  for _ in range(1000):
    line = stream.readline(1000)
    if not line or line == READY.encode() + b"\n":
      return bool(line)
  return False


def read_list(stream: IO[bytes]) -> Optional[Listing]:
  """The guest's next list; None when it ends before its end."""
  entries: Dict[str, Entry] = {}
  size, text = 0, b""
  for line in iter(lambda: stream.readline(1 << 16), b""):
    size += len(line)
    if size > MAX_LIST_BYTES:
      raise RefusedError("the guest's list of names is longer than any")
    if line.startswith(b"//"):
      add_entry(entries, text)
      text = line
      if line.startswith(b"//end "):
        told = [entry.stamp for entry in entries.values() if entry.kind != "d" and entry.stamp]
        if told and all(re.search(r"\.0*\Z", stamp) for stamp in told):
          entries = {path: entry._replace(stamp="") for path, entry in entries.items()}
        whole = line.strip() == b"//end 0"
        return Listing(entries, whole) if entries.pop("", None) else None
    elif len(text) <= 2 * MAX_PATH_BYTES:  # a name with a newline
      text += line
  return None


ENTRY_RE = rb"//(\S)\S* (?:([0-7]+) ([0-9]+) (\S+)|- - -) \.(?:/(.*))?\n\Z"


def add_entry(entries: Dict[str, Entry], text: bytes) -> None:
  """Add a line of the list, "//KIND MODE SIZE STAMP ./PATH"; the kind may be as ls(1) has it."""
  match = re.match(ENTRY_RE, text, re.DOTALL)
  if match:
    letter, octal, size, times, path = match.groups()
    kind = "f" if letter == b"-" else letter.decode("latin-1")
    entry = Entry(kind, -1, -1, "")
    if octal:
      mode = int(octal, 8) & 0o777
      entry = Entry(kind, mode, int(size), f"d{mode:o}" if kind == "d" else times.decode("latin-1"))
    entries[os.fsdecode(path or b"")] = entry


class Tail:
  """Reads a stream to its end in a thread of its own and keeps the last of it."""

  def __init__(self, stream: IO[bytes]) -> None:
    self.stream, self.kept = stream, b""
    self.reading = Future(self.read)

  def read(self) -> None:
    with self.stream:
      for chunk in iter(lambda: os.read(self.stream.fileno(), 65536), b""):
        self.kept = (self.kept + chunk)[-TAIL_BYTES:]

  def words(self) -> str:
    """What was said last, on one line; once the program has ended."""
    self.reading.result()
    return " ".join(self.kept.decode("utf-8", "replace").split())


def tar_block(
  name: bytes, kind: bytes, mode: int, size: int, mtime: int = 0, target: bytes = b"",
  magic: bytes = b"ustar\x0000",
) -> bytes:  # fmt: skip
  """A header as POSIX's ustar has it; a size that does not fit is in base 256, as GNU's."""
  length = b"%011o\0" % size if size <= MAX_OCTAL_SIZE else b"\x80" + size.to_bytes(11, "big")
  zero = b"0000000\0"
  block = struct.pack(
    "100s8s8s8s12s12s8ss100s8s32s32s8s8s155s12x", name, b"%07o\0" % mode, zero, zero, length,
    b"%011o\0" % mtime, b" " * 8, kind, target, magic, b"", b"", zero, zero, b"",
  )  # fmt: skip
  return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
  return data + bytes(-len(data) % 512)


def tar_header(path: str, stat: os.stat_result, target: str, tar: GuestTar) -> bytes:
  """The headers of a file in a tar stream, as the guest's tar reads them.

  Names over 100 bytes go in GNU's header L, targets in its K or, for illumos, in Solaris' X. The
  prefix of ustar is not used: the tar of NetBSD wants something left for the name.
  """
  name, link, mode = os.fsencode(path), os.fsencode(target), stat.st_mode & 0o777
  kind, size = (b"2" if target else b"0"), 0 if target else stat.st_size
  if S_ISDIR(stat.st_mode):  # opened, so that it can be filled; finish() in the guest closes it
    name, kind, mode, size = name + b"/", b"5", mode | 0o700, 0
  magic, more = b"ustar  \0", []
  if len(link) > 100 and not tar.long_links:
    records = pax_record(b"path", name) + pax_record(b"linkpath", link)
    more.append(tar_block(b"pax", b"X", 0o644, len(records)) + padded(records))
  else:
    for letter, value in ((b"K", link), (b"L", name)):
      if len(value) > 100:
        block = tar_block(b"././@LongLink", letter, 0, len(value) + 1, magic=magic)
        more.append(block + padded(value + b"\0"))
  if not more and size <= MAX_OCTAL_SIZE:
    magic = b"ustar\x0000"
  mtime = min(max(0, int(stat.st_mtime)), MAX_OCTAL_SIZE)
  return b"".join(more) + tar_block(name[:100], kind, mode, size, mtime, link[:100], magic)


def pax_record(key: bytes, value: bytes) -> bytes:
  """One record of an extended header, which begins with its own length."""
  size = len(key) + len(value) + 4  # with one digit of the length
  while size < len(str(size)) + len(key) + len(value) + 3:
    size += 1
  return b"%d %s=%s\n" % (size, key, value)


class SyncRecord(NamedTuple):
  """What an instance has of a folder: its name in ~/work, and how each path was."""

  folder: str
  name: str
  known: Dict[str, Known]


SYNC_FORMAT = 1


def read_sync_record(path: str) -> Optional[SyncRecord]:
  """A record; None where there is none, or no sound one."""
  try:
    with open(path, "rb") as file:
      number, folder, name, rows = json.loads(file.read().decode("ascii"))
    known = {
      str(path): Known(str(row[0]), FileStamp(*map(int, row[1:])) if row[1:] else None)
      for path, row in rows.items()
    }
    return SyncRecord(str(folder), str(name), known) if number == SYNC_FORMAT else None
  except (OSError, ValueError, TypeError, AttributeError, LookupError):
    return None


def write_sync_record(path: str, record: SyncRecord) -> None:
  """Keep a record; where that cannot be, the next sync takes longer."""
  rows = {name: [there, *(here or ())] for name, (there, here) in record.known.items()}
  with contextlib.suppress(OSError):
    write_text(path, json.dumps([SYNC_FORMAT, *record[:2], rows], separators=(",", ":")))


def new_sync_record(files: Files, folder: str, name: str) -> SyncRecord:
  """The record of a folder that this instance has never had, under a name of its own there."""
  for other in names_in(files.folder, ""):
    if re.match(re.escape(files.name) + SYNC_SUFFIX_RE + r"\Z", other):
      record = read_sync_record(os.path.join(files.folder, other))
      if (
        record and record.name == name and record.folder != folder and os.path.isdir(record.folder)
      ):
        own = os.fsdecode(os.fsencode(name)[:240]) + "-" + hashed(folder)[:8]
        say(f"~/work/{name} in {files.name} is {record.folder}: {folder} goes to ~/work/{own}")
        return SyncRecord(folder, own, {})
  return SyncRecord(folder, name, {})


class Sync:
  """A folder and its copy in a guest, from before a command until what it has changed is here."""

  def __init__(self, login: Login, options: Options) -> None:
    self.login, self.options = login, options
    self.folder = opened_folder(options.sync)
    self.excludes = Excludes(options.sync_exclude)
    path, name = os.path.realpath(options.sync), os.path.basename(options.sync)
    self.path = login.files.path(".sync-" + hashed(os.path.join(path, name)))
    known = read_sync_record(self.path)
    self.is_new = known is None
    self.record = known or new_sync_record(login.files, path, name)
    self.known = self.record.known
    self.list: Optional[Listing] = None  # the guest's newest
    self.found: Dict[str, os.stat_result] = {}  # what is here,
    self.mine: Dict[str, os.stat_result] = {}  # and of that, what the guest gets
    self.short: Set[str] = set()  # what became shorter while it was read
    self.asked: List[str] = []  # of the guest's tar
    self.code: Optional[int] = None  # the command's
    self.receiver = Receiver(self.folder, self.excludes, self.known, self.is_new)
    self.outcome: Optional[Tuple[int, str]] = None  # of the session that has brought what changed

  def run(self, command: Callable[[float], int], patience: float) -> int:
    """Copy the folder to the guest, run the command, and bring what has changed.

    command gets the patience that is left for a login. Returns its exit code.
    """
    way = self.options.sync_direction
    if way != "out":
      self.send(patience, command if way == "both" else None)
      patience = 0.0
    if self.code is None:
      self.code = command(patience)
    if way != "in":
      try:
        self.fetch()
      except QvmError as error:
        raise QvmError(str(error), f"the command itself ended with exit code {self.code}")
    return self.code

  def session(self, first: str, use: Callable[[Any], None], patience: float) -> Tuple[int, str]:
    """Run the script in the guest; returns its exit code and its last words."""
    tails: List[Tail] = []

    def talk(process: Any) -> None:
      tails.append(Tail(process.stderr))
      with contextlib.suppress(BrokenPipeError):  # the guest says why
        if is_ready(process.stdout):
          use(process)
        process.stdin.close()
      while process.stdout.read(CHUNK_BYTES):
        pass

    script = sync_script(first, self.record.name, self.options.sync_exclude)
    pipe, self.list = subprocess.PIPE, None
    streams: Dict[str, Any] = {
      "stdin": pipe,
      "stdout": pipe,
      "stderr": pipe,
      "bufsize": CHUNK_BYTES,
    }
    code = in_guest(self.login, shell_line(script), talk, patience, **streams)
    return code, tails[-1].words()

  def save(self) -> None:
    if os.path.lexists(self.login.files.disk):  # else the instance is gone
      write_sync_record(self.path, self.record._replace(known=self.known))

  # In

  def send(self, patience: float, command: Optional[Callable[[float], int]]) -> None:
    """Make the guest's copy what the folder is; QvmError unless all has arrived.

    If it is that already, the command runs while the session waits, which then brings the changes.
    """
    walk = Future(lambda: walk_folder(self.folder, self.excludes))  # while ssh logs in
    work: List[str] = []

    def feed(process: Any) -> None:
      self.found = walk.result()
      self.mine = self.sendable()
      before = self.list = read_list(process.stdout)
      if before:
        lines, changed = self.plan_in(before.entries)
        work[:] = [*lines, *changed]
        if work:
          send = ["send=1"] if changed else []
          process.stdin.write(os.fsencode("\n".join([*lines, *send, "", ""])))
          self.write_files(changed, process.stdin)
          process.stdin.close()
          self.list = read_list(process.stdout)
        elif command:
          if self.is_new:
            self.remember()
          self.code = command(0.0)
          process.stdin.write(b"all\n")
          process.stdin.flush()
          self.receive(process)
        else:
          process.stdin.write(b"exit\n")

    try:
      code, words = self.session(OPEN, feed, patience)
    except QvmError:
      if self.code is None:
        raise
      return  # lost while the command ran: there will be another session
    if self.code is not None:
      self.outcome = (code, words) if self.list else None
      return
    self.account(code, words)
    if work or self.is_new:
      self.remember()
      self.save()

  def sendable(self) -> Dict[str, os.stat_result]:
    """What the guest can take of what is here; the rest is said."""
    large, special, long, mine = [], [], [], {}
    for path, stat in self.found.items():
      above = path.rpartition("/")[0]
      if above and above not in mine:
        continue
      if not (S_ISREG(stat.st_mode) or S_ISDIR(stat.st_mode) or S_ISLNK(stat.st_mode)):
        special.append(os.path.join(self.folder.path, path))
      elif len(os.fsencode(path)) > MAX_GUEST_PATH_BYTES - len("./"):
        long.append(os.path.join(self.folder.path, path))
      elif stat.st_size > MAX_OCTAL_SIZE and S_ISREG(stat.st_mode) and not self.tar.large_files:
        large.append(os.path.join(self.folder.path, path))
      else:
        mine[path] = stat
    say_each(special, "is no file, folder or link: it stays here")
    say_each(long, "has too long a path for the guest: it stays here")
    say_each(large, "has 8 GiB or more, too much for the guest's tar: it stays here")
    return mine

  @property
  def tar(self) -> GuestTar:
    return self.login.guest.tar

  def plan_in(self, before: Dict[str, Entry]) -> Tuple[List[str], List[str]]:
    """Lines of shell for the guest, and the paths that it is to be sent then."""
    changed = [path for path, stat in self.mine.items() if not self.is_there(path, stat, before)]
    in_way: Dict[str, None] = {}
    for path in changed:
      entry = before.get(path)
      if entry and (entry.kind == "l" or entry.kind != kind_of(self.mine[path])):
        if not any(above in in_way for above in folders_above(path)):
          in_way[path] = None
        if entry.kind == "d":
          say(f"{shown(path)} was a folder in the guest: it is replaced, with all in it")
    gone = self.gone_here(before)
    touched = {above for path in (*changed, *gone) for above in folders_above(path)}
    closed = sorted(path for path in touched if path in before and is_closed(before[path]))
    modes = {path: before[path].mode for path in closed}
    for path in {*closed, *changed}.intersection(self.mine):
      if S_ISDIR(self.mine[path].st_mode):
        modes[path] = self.mine[path].st_mode & 0o777
    lines = [f"chmod u+rwx {words}" for words in guest_words(closed)]
    if any(entry.mode < 0 for entry in before.values()):
      lines.append("find . -type d ! -perm -700 -exec chmod u+rwx {} \\;")
    lines += [f"rm -rf {words}" for words in guest_words(in_way)]
    lines += [f"rm -f {words}" for words in guest_words(p for p in gone if before[p].kind != "d")]
    folders = sorted((path for path in gone if before[path].kind == "d"), reverse=True)
    lines += [f"rmdir {words} 2>/dev/null" for words in guest_words(folders)]
    return (lines + closing_lines(modes) if lines or changed else []), changed

  def is_there(self, path: str, stat: os.stat_result, before: Dict[str, Entry]) -> bool:
    """Whether the guest still has what the record says it got, and the file here is still that."""
    known, entry = self.known.get(path), before.get(path)
    return bool(
      known and entry and entry.stamp and entry.stamp == known.there
      and known.here == stamp_of(stat)
    )  # fmt: skip

  def gone_here(self, before: Dict[str, Entry]) -> List[str]:
    """What has been deleted here since it was the same, and is as it was in the guest."""
    return [
      path
      for path, known in self.known.items()
      if known.here and path not in self.found and not self.excludes.has(path)
      and path in before and before[path].stamp and before[path].stamp == known.there
    ]  # fmt: skip

  def write_files(self, changed: Sequence[str], out: IO[bytes]) -> None:
    """Write files as a tar stream; what vanishes or shrinks meanwhile is said."""
    vanished = []
    for path in changed:
      try:
        self.write_file(path, out)
      except BrokenPipeError:
        raise
      except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
          raise unreadable(self.folder, path, error)
        vanished.append(path)
        self.mine.pop(path, None)
    if changed:
      out.write(bytes(1024))
      out.flush()
    say_each(vanished, "has vanished, or become something else, while the folder was read")
    say_each(
      sorted(self.short), "became shorter while the folder was read: the guest has not all of it"
    )

  def write_file(self, path: str, out: IO[bytes]) -> None:
    """Write a file to a tar stream, as many bytes of it as its header announces."""
    parts, stat = path.split("/"), self.mine[path]
    if not S_ISREG(stat.st_mode):
      fd = self.folder.enter(parts[:-1])
      target = os.readlink(parts[-1], dir_fd=fd) if S_ISLNK(stat.st_mode) else ""
      out.write(tar_header(path, stat, target, self.tar))
      return
    with self.folder.open_file(parts) as file:
      before, stat = stat.st_size, os.fstat(file.fileno())
      self.mine[path] = stat
      if stat.st_size > MAX_OCTAL_SIZE and not self.tar.large_files:
        raise ValueError("has grown too large")
      out.write(tar_header(path, stat, "", self.tar))
      left = stat.st_size
      if left < before:
        self.short.add(path)
      while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        if not chunk:
          self.short.add(path)
          chunk = bytes(min(left, CHUNK_BYTES))
        out.write(chunk)
        left -= len(chunk)
      out.write(bytes(-stat.st_size % 512))

  def account(self, code: int, words: str) -> None:
    """QvmError unless the guest lists all that it was to get."""
    there = self.list.entries if self.list else {}
    missing = []
    for path, stat in self.mine.items():
      entry, size = there.get(path), stat.st_size if S_ISREG(stat.st_mode) else -1
      if not entry or entry.kind != kind_of(stat) or (size >= 0 and entry.size not in (-1, size)):
        missing.append(path)
    if code or missing or not self.list:
      names = ", ".join(map(shown, missing[:10])) + (", ..." if missing[10:] else "")
      problem = f"{self.options.sync} cannot be copied to {self.login.files.name}"
      if missing and self.list and not code:
        raise QvmError(
          f"{problem}: {len(missing)} of {len(self.mine)} are not there: {names}", words
        )
      raise QvmError(f"{problem} ({ending(code)}): {words}")

  def remember(self) -> None:
    """Note how both sides are, now that they are the same.

    What is in the guest alone and was there before need not come; the rest of that still will.
    """
    known = {}
    for path, entry in (self.list.entries if self.list else {}).items():
      if path in self.mine:
        stat = self.mine[path]
        there = f"d{stat.st_mode & 0o777:o}" if entry.kind == "d" and entry.stamp else entry.stamp
        known[path] = Known(there, None if path in self.short else stamp_of(stat))
      elif self.is_new:
        known[path] = Known(entry.stamp, None)
      elif path in self.known and not self.known[path].here:
        known[path] = self.known[path]
    self.known, self.is_new = known, False

  # Out

  def fetch(self) -> None:
    """Bring what has changed in the guest; what cannot come is said.

    QvmError when nothing can be said to have come, or something cannot be written here.
    """
    try:
      self.judge(*(self.outcome or self.session("", self.receive, 0.0)))
    finally:
      self.receiver.finish()
      if self.receiver.changed or self.receiver.gone:
        self.save()

  def receive(self, process: Any) -> None:
    """Ask for what has changed, once the guest lists what it has, and take it."""
    self.receiver.known, self.receiver.take_all = self.known, self.is_new
    self.list = read_list(process.stdout)
    if self.list:
      self.asked = self.ask(self.list)
      lines = [ASK, *(f"t {words}" for words in guest_words(self.asked)), ""]
      process.stdin.write(os.fsencode("\n".join(lines)))
      process.stdin.close()
      self.receiver.take(process.stdout)

  def ask(self, there: Listing) -> List[str]:
    """What the guest's tar is to send; the folders that are new are made."""
    changed, large, git = {}, [], []
    for path, entry in there.entries.items():
      known = self.known.get(path)
      if entry.kind not in "dfl" or (known and entry.stamp and known.there == entry.stamp):
        continue
      if self.excludes.has(path):
        continue
      if is_git(path):
        git += [path] if fold(path.rpartition("/")[2]) == ".git" else []
      elif entry.size > MAX_OCTAL_SIZE and entry.kind == "f" and not self.tar.large_files:
        large.append(path)
      else:
        changed[path] = entry
    say_each(git, "stays in the guest: some file systems take it for .git")
    say_each(large, "stays in the guest: it has 8 GiB or more, too much for its tar")
    self.receiver.held += large
    self.receiver.expect(changed, there.entries)
    unlisted = []
    if not there.complete:  # what is not listed may be there, and is asked for
      unlisted = [p for p, known in self.known.items() if known.here and p not in there.entries
                  and not S_ISDIR(known.here.mode) and not self.excludes.has(p)]  # fmt: skip
      self.receiver.unlisted = set(unlisted)
    return [path for path, entry in changed.items() if entry.kind != "d"] + unlisted

  def judge(self, code: int, words: str) -> None:
    """Say what has not come, delete what may be, and raise what is an error."""
    problem = f"what changed in {self.login.files.name} cannot be brought to {self.options.sync}"
    receiver = self.receiver
    if receiver.error:
      raise receiver.error
    wanted = (path for path in self.asked if path not in receiver.unlisted)
    missing = [path for path in wanted if path not in receiver.done]
    if not self.list or receiver.cut or (missing and receiver.is_empty and code):
      say_each(missing[:10], "stays in the guest")
      raise QvmError(f"{problem} ({ending(code)}): {receiver.cut or ''} {words}".replace("  ", " "))
    say_each(missing, "stays in the guest: its tar has not sent it")
    if not self.list.complete:
      say("not all could be looked at in the guest")
    if words and (missing or not self.list.complete):
      say(f"{self.login.files.name} says: {words[-1000:]}")
    if receiver.failed:
      raise QvmError(f"{problem}: {receiver.failed[0]}")
    if self.options.sync_delete:
      gone = [path for path, known in self.known.items() if known.here
              and path not in self.list.entries and not self.excludes.has(path)]  # fmt: skip
      if gone and (missing or receiver.held or code or not self.list.complete):
        say("nothing is deleted here, as not all has come")
      else:
        receiver.delete(gone)
        receiver.gone = gone


def kind_of(stat: os.stat_result) -> str:
  """The letter that a file's kind has in the guest's list."""
  return "d" if S_ISDIR(stat.st_mode) else "l" if S_ISLNK(stat.st_mode) else "f"


def is_closed(entry: Entry) -> bool:
  """Whether its owner may not fill a folder."""
  return entry.kind == "d" and entry.mode >= 0 and entry.mode & 0o700 != 0o700


def folders_above(path: str) -> Iterator[str]:
  """The paths of the folders that a path is in, the innermost first."""
  above = path.rpartition("/")[0]
  while above:
    yield above
    above = above.rpartition("/")[0]


def closing_lines(modes: Dict[str, int]) -> List[str]:
  """The line that gives folders in the guest their modes once they are filled, innermost first."""
  by_depth: Dict[Tuple[int, int], List[str]] = {}
  for path, mode in modes.items():
    if mode & 0o700 != 0o700:
      by_depth.setdefault((-path.count("/"), mode), []).append(path)
  commands = [
    f"chmod {mode:o} {words}"
    for (_, mode), paths in sorted(by_depth.items())
    for words in guest_words(paths)
  ]
  return ["finish() { " + "; ".join(commands) + "; }"] if commands else []


class Kept(Exception):
  """What is here stays as it is, which has been said."""


class Receiver:
  """Puts what a guest sends into the folder, but for what has no place there.

  What was changed here since it was the same stays as it is, unless take_all says otherwise.
  """

  def __init__(
    self, folder: Folder, excludes: Excludes, known: Dict[str, Known], take_all: bool
  ) -> None:
    self.folder, self.excludes, self.known, self.take_all = folder, excludes, known, take_all
    self.error: Optional[QvmError] = None  # why nothing more can be written
    self.changed: Dict[str, Entry] = {}  # what is to come,
    self.present: Dict[str, Entry] = {}  # of all that there is
    self.unlisted: Set[str] = set()
    self.gone: List[str] = []  # what was deleted here
    self.done: Set[str] = set()
    self.landed: Set[str] = set()
    self.held: List[str] = []  # what stays in the guest
    self.failed: List[str] = []  # what could not be written here
    self.cut, self.is_empty = "", True
    self.ready: Set[Tuple[str, ...]] = {()}  # folders that are there, in this spelling
    self.modes: Dict[str, int] = {}  # of folders, to be set when all is in them
    self.waiting: Dict[str, str] = {}  # files beside a folder that is in their place
    self.names: Tuple[Tuple[str, ...], Set[str]] = ((), set())
    self.cache = cache_inode()

  def expect(self, changed: Dict[str, Entry], present: Dict[str, Entry]) -> None:
    """What is to come of all that the guest has; makes the folders."""
    self.changed, self.present = changed, present
    for path in sorted(path for path, entry in changed.items() if entry.kind == "d"):
      self.attempt(path, self.put_folder)

  def take(self, stream: IO[bytes]) -> None:
    """Unpack all that comes and was asked for, until the stream ends or is no honest tar's."""
    self.is_empty = not stream.peek(1)  # type: ignore[attr-defined]
    try:
      for archive, member in () if self.is_empty else tar_members(stream, MAX_HEADER_BYTES, True):
        try:
          path = "/".join(safe_name(member.name))
        except ValueError:
          continue  # such a name was not asked for
        if self.error:
          break
        if path and (path in self.changed or path in self.unlisted):
          self.attempt(path, functools.partial(self.put, archive, member))
    except (tarfile.TarError, ValueError) as error:
      self.cut = f"what the guest sends is refused: {error}"

  def attempt(self, path: str, put: Callable[[Tuple[str, ...]], Optional[os.stat_result]]) -> None:
    """Put something into its place; what goes wrong with it alone is said."""
    try:
      parts = tuple(safe_name(path))
      if "/".join(parts) != path or not parts:
        raise ValueError("is not a plain path")
      stat = put(parts)
      if stat:
        self.note(path, stat)
    except Kept:
      pass
    except QvmError as error:
      self.error = error
    except ValueError as error:
      self.hold(path, f"it {error}")
    except OSError as error:
      where = os.path.join(self.folder.path, path)
      if error.errno in (errno.ENOSPC, errno.EDQUOT):
        self.error = QvmError(f"{where}: {describe(error)}")
      elif error.errno in BAD_NAME_ERRORS:
        self.hold(path, describe(error))
      else:
        self.failed.append(f"{where}: {describe(error)}")
        say(self.failed[-1])
    self.done.add(path)

  def note(self, path: str, here: os.stat_result) -> None:
    """Note that both sides are the same now."""
    self.landed.add(path)
    if path in self.changed:
      self.known[path] = Known(self.changed[path].stamp, stamp_of(here))

  def hold(self, path: str, reason: str) -> None:
    self.held.append(path)
    say(f"{shown(path)} stays in the guest: {reason}")

  def put(self, archive: Any, member: Any, parts: Tuple[str, ...]) -> Optional[os.stat_result]:
    """Give a file or link that has come its place; returns what is there then, if it is that."""
    self.enter(parts[:-1])
    if member.issym():
      return self.put_link(parts, member.linkname)
    if member.islnk():
      source = "/".join(safe_name(member.linkname))
      if source not in self.landed:
        raise ValueError(f"is a link to {shown(source)}, which has not come")
      with self.folder.open_file(source.split("/")) as file:
        copy = functools.partial(shutil.copyfileobj, file, length=CHUNK_BYTES)
        return self.put_file(parts, member, os.fstat(file.fileno()).st_size, copy)
    if not member.isreg():
      raise ValueError("is no file or link")
    size = sum(size for _, size in pieces_of(member))
    return self.put_file(parts, member, size, functools.partial(write_member, archive, member))

  def enter(self, parts: Tuple[str, ...]) -> int:
    """A descriptor of a folder for what comes; it and those above are made where they are not."""
    number = len(parts)
    while parts[:number] not in self.ready:
      number -= 1
    for end in range(number + 1, len(parts) + 1):
      self.make_folder(parts[:end])
      self.ready.add(parts[:end])
    return self.folder.enter(parts)

  def make_folder(self, parts: Tuple[str, ...]) -> None:
    """See to it that there is a folder in that spelling; Kept where something of ours is."""
    path = "/".join(parts)
    there = self.there(parts)
    if there and (there.st_dev, there.st_ino) == self.cache:
      raise ValueError("is qvm's cache here")
    if there and not S_ISDIR(there.st_mode):
      self.check_unchanged(path, there)
      os.unlink(parts[-1], dir_fd=self.folder.enter(parts[:-1]))
      there = None
    if not there:
      os.mkdir(parts[-1], 0o755, dir_fd=self.folder.enter(parts[:-1]))
      self.add_name(parts)
    else:
      self.open_up(parts)

  def open_up(self, parts: Tuple[str, ...]) -> int:
    """Open a closed folder until all is in it; returns a descriptor of it."""
    fd = self.folder.enter(parts)
    mode = os.fstat(fd).st_mode & 0o777
    if parts and mode & 0o700 != 0o700:
      os.fchmod(fd, mode | 0o700)
      self.modes["/".join(parts)] = mode
    return fd

  def put_folder(self, parts: Tuple[str, ...]) -> os.stat_result:
    """Make a folder that is new in the guest, or give one its new mode."""
    fd, path = self.enter(parts), "/".join(parts)
    mode = self.changed[path].mode
    if mode >= 0 and mode & 0o500 != 0o500:
      raise ValueError(f"is closed there (mode {mode:o}), and so is what it holds")
    if mode >= 0 and mode & 0o700 != 0o700:
      self.modes[path] = mode  # once all is in it
    elif mode >= 0:
      self.modes.pop(path, None)
      os.fchmod(fd, mode)
    return os.fstat(fd)

  def there(self, parts: Tuple[str, ...]) -> Optional[os.stat_result]:
    """What has that name here, in that spelling: if need be, it is renamed to it."""
    fd = self.folder.enter(parts[:-1])
    try:
      there = os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
      return None
    name = self.spelling(fd, parts, there)
    if name != parts[-1]:
      self.respell(fd, parts, name, there)
    return there

  def spelling(self, fd: int, parts: Tuple[str, ...], there: os.stat_result) -> str:
    """How the name of a file is spelled on this disk, which may take several names for one."""
    if self.names[0] != parts[:-1] or not self.names[1]:
      self.names = parts[:-1], set(os.listdir(fd))
    if parts[-1] in self.names[1]:
      return parts[-1]
    for name in self.names[1]:
      if fold(name) == fold(parts[-1]):
        with contextlib.suppress(FileNotFoundError):
          if os.path.samestat(os.stat(name, dir_fd=fd, follow_symlinks=False), there):
            return name
    return parts[-1]

  def respell(self, fd: int, parts: Tuple[str, ...], name: str, there: os.stat_result) -> None:
    """Rename what is here in another spelling, if the guest has it only in the new one."""
    old, new = "/".join((*parts[:-1], name)), "/".join(parts)
    if old in self.present or self.excludes.has(old) or is_git(name):
      raise ValueError(f"is the same file as {shown(old)} to this disk")
    if not S_ISDIR(there.st_mode):
      self.check_unchanged(old, there)
    os.rename(name, parts[-1], src_dir_fd=fd, dst_dir_fd=fd)
    self.names[1].discard(name)
    self.add_name(parts)
    for path in [p for p in self.known if p == old or p.startswith(old + "/")]:
      self.known[new + path[len(old) :]] = self.known.pop(path)
    if new in self.known and not S_ISDIR(there.st_mode):
      renamed = stamp_of(os.stat(parts[-1], dir_fd=fd, follow_symlinks=False))
      self.known[new] = self.known[new]._replace(here=renamed)

  def add_name(self, parts: Tuple[str, ...]) -> None:
    if self.names[0] == parts[:-1] and self.names[1]:
      self.names[1].add(parts[-1])

  def check_unchanged(self, path: str, there: os.stat_result) -> None:
    """Kept, which is said, unless what is here is as it was when both sides were the same."""
    known = self.known.get(path)
    if not self.take_all and not (known and known.here and known.here[:4] == stamp_of(there)[:4]):
      self.keep(path, "has changed here and in the guest: it stays as it is")

  def keep(self, path: str, reason: str) -> None:
    self.known.pop(path, None)
    say(f"{shown(os.path.join(self.folder.path, path))} {reason}")
    raise Kept

  def put_link(self, parts: Tuple[str, ...], target: str) -> Optional[os.stat_result]:
    fd = self.folder.enter(parts[:-1])
    with contextlib.suppress(OSError):
      if os.readlink(parts[-1], dir_fd=fd) == target:
        return self.there(parts)
    check_link(parts, target)
    aside = new_name()
    os.symlink(target, aside, dir_fd=fd)
    return self.replace(parts, aside)

  def put_file(
    self, parts: Tuple[str, ...], member: Any, size: int, write: Callable[[IO[bytes]], Any]
  ) -> Optional[os.stat_result]:
    """Write a file aside; it takes its place when whole, and only if it brings anything new."""
    left = free_space(self.folder.path) - RESERVE_BYTES
    if size > left:
      raise disk_full(os.path.join(self.folder.path, *parts), size - max(left, 0))
    aside, fd = new_name(), self.folder.enter(parts[:-1])
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
      with os.fdopen(os.open(aside, flags, 0o600, dir_fd=fd), "w+b") as file:
        write(file)
        file.flush()
        if self.is_same(parts, member.mode & 0o777, file):
          return self.there(parts)
        os.fchmod(file.fileno(), member.mode & 0o777)
        try:
          os.utime(file.fileno(), (member.mtime, member.mtime))
        except (OverflowError, ValueError):
          raise ValueError("has an impossible time")
      return self.replace(parts, aside)
    finally:
      if "/".join(parts) not in self.waiting:
        with contextlib.suppress(FileNotFoundError):
          os.unlink(aside, dir_fd=self.folder.enter(parts[:-1]))

  def is_same(self, parts: Tuple[str, ...], mode: int, new: IO[bytes]) -> bool:
    """Whether a file is here already with that mode and content."""
    with contextlib.suppress(OSError, ValueError), self.folder.open_file(parts) as file:
      there, size = os.fstat(file.fileno()), os.fstat(new.fileno()).st_size
      if (there.st_mode & 0o7777, there.st_size) == (mode, size):
        new.seek(0)
        chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
        return all(chunk == new.read(len(chunk)) for chunk in chunks)
    return False

  def replace(self, parts: Tuple[str, ...], aside: str) -> Optional[os.stat_result]:
    """Rename what was made aside to its name, if what has that now is as it was.

    A folder with files must wait until delete() has emptied it, and may.
    """
    path = "/".join(parts)
    try:
      there = self.there(parts)
      if there:
        self.check_unchanged(path, there)
      fd = self.folder.enter(parts[:-1])
      if there and S_ISDIR(there.st_mode):
        try:
          os.rmdir(parts[-1], dir_fd=fd)
        except OSError:
          self.waiting[path] = aside
          return None
      os.rename(aside, parts[-1], src_dir_fd=fd, dst_dir_fd=fd)
      self.add_name(parts)
      return os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(aside, dir_fd=self.folder.enter(parts[:-1]))
      raise

  def delete(self, gone: Sequence[str]) -> None:
    """Delete what was the same on both sides, is so here, and is not in the guest any more."""
    for path in sorted(gone, reverse=True):
      try:
        self.delete_one(path, tuple(path.split("/")))
        self.known.pop(path, None)
      except (Kept, FileNotFoundError, NotADirectoryError):
        pass
      except OSError as error:
        say(f"{shown(os.path.join(self.folder.path, path))} stays here: {describe(error)}")

  def delete_one(self, path: str, parts: Tuple[str, ...]) -> None:
    fd, known = self.open_up(parts[:-1]), self.known[path].here
    there = os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
    if self.spelling(fd, parts, there) != parts[-1]:
      return  # it is there by another name
    if not (S_ISDIR(there.st_mode) and known and known.inode == there.st_ino):
      self.check_unchanged(path, there)
      return os.unlink(parts[-1], dir_fd=fd)
    try:
      os.rmdir(parts[-1], dir_fd=fd)
    except OSError as error:
      self.keep(path, f"is a folder here, but not in the guest: it stays ({describe(error)})")

  def finish(self) -> None:
    """Put what has waited into its place, set the modes of folders, note what both sides have."""
    for path, aside in self.waiting.items():
      parts = tuple(path.split("/"))
      fd = self.folder.enter(parts[:-1])
      try:
        os.rmdir(parts[-1], dir_fd=fd)
        os.rename(aside, parts[-1], src_dir_fd=fd, dst_dir_fd=fd)
        self.note(path, os.stat(parts[-1], dir_fd=fd, follow_symlinks=False))
      except OSError as error:
        os.unlink(aside, dir_fd=fd)
        where = shown(os.path.join(self.folder.path, path))
        say(f"{where} is a folder here, but not in the guest: it stays ({describe(error)})")
    for path in sorted(self.modes, reverse=True):
      with contextlib.suppress(OSError):
        fd = self.folder.enter(path.split("/"))
        os.fchmod(fd, self.modes[path])
        if path in self.landed:
          self.note(path, os.fstat(fd))


def new_name() -> str:
  """A name that nothing has, for what is not whole."""
  return ".qvm-" + os.urandom(6).hex()


def run_command(login: Login, options: Options, patience: float, first: str = "") -> int:
  """Run the command of `run` or `ssh` in the guest, or a shell; returns its exit code.

  The folder of --sync goes there before and comes back afterwards, however the command ends. The
  script first, if any, runs before all.
  """
  if not options.sync:
    return run_line(login, options, patience, first)
  if first:  # the time must be right before files get their times
    in_guest(login, shell_line(first), wait_for, patience, **NO_STREAMS)
  sync = Sync(login, options)
  folder = guest_folder(sync.record.name)
  return sync.run(lambda patience: run_line(login, options, patience, "", folder), patience)


def run_line(
  login: Login, options: Options, patience: float, first: str = "", folder: str = ""
) -> int:
  """Run the command, with our stdin, stdout and stderr; a first signal is handed on to it.

  At a terminal Ctrl-C gets there by itself, as any other key does.
  """
  terminal = is_interactive()
  env = guest_environment(options.env, os.environ)
  pid_file = "" if terminal else '"$HOME"/.qvm-' + os.urandom(6).hex()
  line = ""
  if options.guest_command or env or folder:
    line = shell_line(command_script(options.guest_command, env, folder, pid_file, first))

  def wait(process: Any) -> None:
    try:
      process.wait()
    except Interrupted as stop:
      if terminal or not line:
        raise
      signals.again()
      try:
        name = signal.Signals(stop.signum).name[len("SIG") :]
        interrupt = shell_line(INTERRUPT.format(pid_file, name))
        in_guest(login, interrupt, lambda process: process.wait(30), **NO_STREAMS)
      except LoginError:
        raise stop  # the command has not begun
      except (QvmError, subprocess.TimeoutExpired):
        pass
      try:
        process.wait(None if stop.signum == signal.SIGINT else TERM_GRACE_SECONDS)
      except subprocess.TimeoutExpired:
        raise stop

  code = in_guest(login, line, wait, patience, terminal)
  if code == 255 and not has_banner(login.address, 10.0):
    raise QvmError(f"the connection to {login.files.name} was lost: no answer any more")
  return code


# OpenSSH's server makes each command the leader of a process group.
INTERRUPT = "read leader <{0} && rm -f {0} && kill -{1} -$leader"


# ---- Image server -------------------------------------------------------------------------------
# With --stream QEMU's overlay lies on a server of qvm's own, which hands out the base image while
# it comes. It is a process of its own, `qvm --serve ORDER`, so that it lives as long as QEMU does,
# whatever becomes of qvm: it ends when nobody holds the other end of its pipe any more. What it
# says goes to qvm as lines, its answers among them as JSON.

SERVE = "--serve"
JOIN_BLOCKS = 8  # blocks ahead of a connection for which a reader waits rather than opening another
READAHEAD_BLOCKS = (
  4  # blocks that a reader's first request brings; each next in a row twice as many
)
MAX_READAHEAD_BLOCKS = 64
READERS = 3  # connections for what is waited for, beside the one that fills up
RETRY_LATER_SECONDS = 10.0  # seconds after which a line that was given up is tried again
MAX_READ_BYTES = 32 << 20  # bytes of one read, as NBD has it


class Order(NamedTuple):
  """What the server of an image must know, beside the environment."""

  operands: Tuple[str, ...]
  platform: str
  name: str
  rm: bool
  qemu: str
  progress: bool
  lock: int  # descriptors: of the instance's lock, of the pipe that tells that all have ended,
  life: int
  log: int  # and of the console log, which gets its lines once qvm has left, or -1


class NoStream(Exception):
  """Why an image must be downloaded first."""


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

  def __init__(self, process: Any, life: int) -> None:
    self.process, self.life = process, life
    self.source = Source("", "", "", "")
    self.answers: Any = queue.Queue()
    self.told = False  # whether a failure of its has been raised
    self.reader = threading.Thread(target=self.listen, daemon=True)
    self.reader.start()

  def listen(self) -> None:
    """Pass on what the server says, and keep its answers."""
    for line in self.process.stdout:
      text = line.decode("utf-8", "replace").rstrip("\n")
      if text.startswith("{"):
        self.answers.put(json.loads(text))
      elif text:
        say(re.sub(r"\Aqvm: ", "", text))
    self.answers.put({"end": "the server of the image has ended"})

  def answer(self) -> Dict[str, Any]:
    """The next answer; QvmError if it is an error."""
    while True:
      with contextlib.suppress(queue.Empty):
        answer: Dict[str, Any] = self.answers.get(timeout=POLL_SECONDS)
        problem = answer.get("error") or answer.get("end")
        if problem:
          self.told = True
          raise QvmError(problem, answer.get("hint", ""))
        return answer

  def let_go(self) -> None:
    """From now on the server lives as long as QEMU."""
    if self.life >= 0:
      os.close(self.life)
      self.life = -1

  def finish(self) -> None:
    """Wait for the server to end, which it does once QEMU has."""
    self.let_go()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(POWER_OFF_SECONDS)  # it may be checking a whole image
    end_process(self.process)
    self.reader.join(TERM_GRACE_SECONDS)
    self.process.stdout.close()

  def judge(self, kind: Any, error: Any, trace: Any) -> None:
    """Once QEMU has ended: raise what the server has failed with, which explains all else."""
    self.finish()
    failed = any("error" in answer for answer in list(self.answers.queue))
    if failed and (error is None or isinstance(error, QvmError)):
      self.answer()
    if self.process.returncode and not failed and not self.told:
      say(f"the server of the image was ended from outside ({ending(self.process.returncode)})")
      drop_socket(self.source.socket)


def start_stream(
  plan: Plan, options: Options, lock: int, log: int, stack: contextlib.ExitStack
) -> Optional[Stream]:
  """Start to serve the image that is missing; None when it cannot be, or is there now."""
  ours, life = os.pipe()
  operands, platform = (plan.guest.os, plan.version), plan.guest.arch
  names = (operands, platform, plan.name, plan.ephemeral, options.qemu, options.progress)
  order = Order(*names, lock, ours, log)
  program = os.path.abspath(sys.argv[0] if packed_code[0] else __file__)
  command = [sys.executable, program, SERVE, json.dumps(order._asdict())]
  pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
  with signals.hold():
    try:
      fds = (lock, ours, log) if log >= 0 else (lock, ours)
      process = start(command, fds, start_new_session=True, **pipe)
    finally:
      os.close(ours)
    stream = Stream(process, life)
    stack.push(stream.judge)
  answer = stream.answer()
  if "reason" in answer:
    say(f"{answer['reason']}: it is downloaded first")
  if "source" not in answer:
    stream.finish()
    return None
  stream.source = Source(*answer["source"])
  return stream


def serve(text: str) -> int:
  """The whole life of an image's server; everything that goes wrong is an answer."""
  Transfer.abandoned = True  # its threads end with it
  order = Order(**json.loads(text))
  report.progress, report.log = order.progress, order.log
  options = Options("run", tuple(order.operands), order.platform, order.rm, name=order.name)
  options = options._replace(qemu=order.qemu)
  server = None
  try:
    net = net_from(os.environ)
    plan = make_plan(options, this_host(), cache_folder(os.environ), "")
    server = Server(plan, net, order)
    server.run()
  except NoStream as reason:
    answer({"reason": str(reason)})
  except (QvmError, OSError, Cancelled) as error:
    fail_with(error, getattr(error, "hint", ""))
    return EXIT_FAILED
  finally:
    if server:
      server.close()
  return 0


def answer(value: Dict[str, Any]) -> None:
  """Hand an answer to qvm."""
  write_all(1, json.dumps(value).encode() + b"\n")


def fail_with(error: BaseException, hint: str) -> None:
  """Tell qvm of a failure; once that has left, the console log."""
  try:
    answer({"error": describe(error), "hint": hint})
  except OSError:
    say(describe(error))


class Server:
  """Fetches an image, hands out what QEMU reads of it, and makes it the base image once whole."""

  def __init__(self, plan: Plan, net: Net, order: Order) -> None:
    self.plan, self.net, self.order = plan, net, order
    self.files = instance_files(plan.cache, plan.name)
    self.releases = Releases(net)
    self.fresh = not os.path.lexists(self.files.disk)
    self.ready = False  # whether QEMU may have been started
    self.gone = threading.Event()  # set when QEMU and qvm have ended
    self.whole = False
    self.error: Optional[BaseException] = None  # what ends the machine
    self.failures = 0  # how often the line has been given up
    self.orders: List[Tuple[int, int]] = []  # blocks that readers' connections are to bring
    self.ahead: Dict[int, int] = {}  # where a connection stopped: how many blocks it brought
    self.folder = ""
    self.fd, self.size = -1, 0
    self.tag = ""
    self.first: Optional[Tuple[Any, Span]] = None
    threading.Thread(target=self.watch, daemon=True).start()

  def watch(self) -> None:
    """Notice that nobody holds the other end of the pipe any more."""
    os.read(self.order.life, 1)
    if not self.ready:
      os._exit(EXIT_FAILED)
    self.gone.set()

  def run(self) -> None:
    """Serve until QEMU has ended, then see to its overlay."""
    with contextlib.ExitStack() as stack:
      stack.enter_context(download_lock(downloads_dir(self.plan), self.plan.image_asset))
      if os.path.isfile(self.plan.base):
        return answer({})
      self.transfer = self.find()
      self.digest = Future(lambda: self.releases.digest(*self.asset()))
      filler = threading.Thread(target=self.fill, daemon=True)
      filler.start()
      self.prove()
      source = Source(self.listen(), self.tag, self.transfer.validator, self.known_digest())
      say("the guest runs while its image comes; the digest is checked when all of it is there")
      self.ready = True
      answer({"source": source})
      while filler.is_alive() and not self.gone.is_set() and not self.error:
        filler.join(POLL_SECONDS)
        self.progress()
      if self.transfer.complete():
        filler.join()
      if self.error:
        return self.give_up()
    self.gone.wait()
    self.settle()

  def progress(self) -> None:
    """Show how much is there, now and then, if that was asked for."""
    if report.progress and time.monotonic() > self.transfer.started + 5:
      self.transfer.started = time.monotonic()
      draw_progress()

  def asset(self) -> Tuple[str, str, str]:
    """The repository, the release and the name of the image."""
    return image_repo(self.plan.guest.os), self.tag, self.plan.image_asset

  def known_digest(self) -> str:
    """The digest that the release names, if it has told it by now."""
    self.digest.thread.join(2.0)
    return str(self.digest.value or "")

  def find(self) -> Transfer:
    """Begin to fetch the image from the release that has it; NoStream if it cannot be streamed."""
    plan, net = self.plan, self.net
    repo, pinned = image_repo(plan.guest.os), pinned_release(plan)
    for tag, name in [(pinned, plan.image_asset)] if pinned else candidates(plan, self.releases):
      url = asset_url(net, repo, tag, name)
      if name != plan.image_asset:
        if asset_exists(net, url):
          raise NoStream(f"{name} of {tag} is a bundle")
        continue
      self.tag = tag
      transfer = Transfer(net, url, name, downloads_dir(plan))
      Transfer.running[:] = [transfer]
      with contextlib.suppress(NotFound):
        if not transfer.complete():
          with_retries(net, url, lambda it=transfer: self.begin(it), lambda: 0)  # type: ignore[misc]
        if transfer.complete() and not transfer.blocks:
          transfer.use_map()
        self.size, self.fd = transfer.total or 0, os.open(transfer.part, os.O_RDONLY)
        return transfer
    raise gone_image(plan, pinned) if pinned else no_such_image(plan, self.releases)

  def begin(self, transfer: Transfer) -> None:
    """One attempt: ask for what is missing first, and see whether ranges can be had."""
    if transfer.done and not re.match(STRONG_ETAG_RE, transfer.validator):
      raise NoStream(f"the server's {transfer.name} has no strong validator")
    if transfer.done:
      transfer.use_map()
    span, request = transfer.claim() or Span(0, 0), None
    try:
      request = open_span(transfer, span, False)
      if request.getcode() == 206:
        check_range(transfer, span, request.headers, False)
      else:
        start_over(transfer, request.headers)
      if transfer.total is None or not gives_ranges(transfer, request.headers):
        transfer.reset()
        raise NoStream(f"the server gives no ranges of {transfer.name}")
      transfer.address = request.geturl()
      check_space(transfer)
      announce(transfer)
      transfer.use_map()
      span = transfer.claim() or span if span.void else span
    except BaseException:
      transfer.release(span)
      if request:
        request.close()
      raise
    self.first = request, span

  def prove(self) -> None:
    """Wait for the header, and refuse an image that is not safe."""
    transfer = self.transfer
    with transfer.lock:
      while transfer.blocks[:1] != b"\1" and not self.error:
        transfer.lock.wait(POLL_SECONDS)
    if self.error:
      raise self.error
    transfer.head = os.pread(self.fd, 512, 0)
    check_kind(transfer)
    with reset_if_refused(transfer):
      check_image(transfer.part)

  # Filling up.

  def fill(self) -> None:
    """Fetch all of the image, then check and publish it."""
    try:
      while not self.transfer.complete() and not self.gone.is_set():
        try:
          with_retries(self.net, self.transfer.url, self.fill_once, lambda: self.transfer.done)
        except (RefusedError, NotFound):
          raise
        except QvmError as error:
          if not self.ready:
            raise
          self.fail(error)
          self.gone.wait(RETRY_LATER_SECONDS)
      if self.transfer.complete():
        self.move_into_place()
    except BaseException as error:  # raised by run()
      with self.transfer.lock:
        self.error = error
        self.transfer.lock.notify_all()

  def fill_once(self) -> None:
    """One attempt: fetch the gaps in their order."""
    transfer = self.transfer
    if self.first:
      (request, span), self.first = self.first, None
      try:
        with request, contextlib.suppress(Cancelled):
          copy_body(transfer, request, span, True)
      except OSError as error:
        raise write_failure(transfer.part, transfer.total or 0, error)
      finally:
        transfer.release(span)
    while not transfer.complete() and not self.gone.is_set():
      with transfer.lock:
        gap = transfer.first_gap()
        if gap:
          transfer.spans.append(gap)
        else:
          transfer.lock.wait(POLL_SECONDS)
      if gap:
        self.fetch(gap)
      transfer.hash_all()

  def fetch(self, span: Span) -> None:
    """Fetch a span; Transient when only a part of it comes."""
    try:
      whole = fetch_span(self.transfer, span, helper=True)
    except Transient as error:
      if error.code == CHANGED:
        url = redacted(self.transfer.url)
        raise RefusedError(f"{url}: the image has changed while it was streamed")
      raise
    except Cancelled:
      if self.net.cancelled.is_set():
        raise
      return  # another has taken it over
    if not whole:
      raise Transient(f"{redacted(self.transfer.url)}: the connection ended too soon")

  def fail(self, error: QvmError) -> None:
    """Let those who wait have an I/O error; said once, until something comes again."""
    with self.transfer.lock:
      if not self.failures:
        say(f"{error}: the guest gets an I/O error")
      self.failures += 1
      self.transfer.lock.notify_all()

  def move_into_place(self) -> None:
    """Check the image that is whole, and make it the base image; its file stays open."""
    transfer, plan = self.transfer, self.plan
    transfer.hash_all()
    digest, wanted = transfer.hash.hexdigest(), self.digest.result()
    if wanted and digest != wanted:
      problem = f"{redacted(transfer.url)}: what came has not the digest that the release names"
      transfer.reset()
      raise RefusedError(f"{problem} (sha256 {wanted}, not {digest}): the machine is ended")
    if not wanted:
      say(f"no digest is known for {transfer.name}: only its length could be checked")
    record = asset_record(transfer, self.tag, digest)
    record.update(sha256=digest, bytes=transfer.done)
    with instances_lock(instances_dir(plan.cache)):
      drop_checkpoints(plan, digest)
      publish_with_record(transfer.part, plan.base, record, 0o444)
      put_kernel("", kernel_path(plan.base))
    say(f"{transfer.name} is there, and has the digest {digest[:16]}…" if wanted else
        f"{transfer.name} is there")  # fmt: skip
    with transfer.lock:
      self.whole = True
      transfer.lock.notify_all()
    transfer.reset()

  # The end.

  def give_up(self) -> None:
    """End the machine, and discard what was made in this run of an image that is no good."""
    error = self.error or Cancelled()
    hint = getattr(error, "hint", "") or "what its guest wrote in this run is gone" * self.fresh
    fail_with(error, hint)
    number: int = signal.SIGTERM
    while not self.gone.wait(POLL_SECONDS):
      if holder(self.files).startswith("QEMU"):
        with contextlib.suppress(ProcessLookupError):
          os.kill(holder_pid(self.files), number)
        number = 0 if self.gone.wait(TERM_GRACE_SECONDS) else signal.SIGKILL
    if self.fresh:
      remove_instance(self.files, report.log >= 0)

  def settle(self) -> None:
    """QEMU has ended: put a persistent overlay on the base image, if that is there."""
    if self.order.rm or not is_streamed(self.files.disk):
      return
    if not self.whole:
      share = base_share(self.plan.cache, self.files.disk)
      say(f"{share}% of the image of {self.files.name} are there; the next run fetches the rest")
      return
    ssh = read_instance(self.files).ssh
    with instances_lock(self.files.folder):
      check_instance(self.plan, self.files)
      make_overlay(self.plan, backing_name(self.plan, self.plan.base), (self.order.lock,))
      record_instance(self.plan, self.files, ssh)

  def close(self) -> None:
    """Leave no socket."""
    if self.folder:
      remove_tree(self.folder)

  # Handing out.

  def listen(self) -> str:
    """Open the socket, whose path must be short (104 bytes on macOS) and plain."""
    folder = tempfile.gettempdir()
    folder = folder if re.match(r"[A-Za-z0-9_./-]{1,60}\Z", folder) else "/tmp"
    drop_dead_sockets(folder)
    self.folder = tempfile.mkdtemp(prefix="qvm-", dir=folder)
    path = os.path.join(self.folder, "nbd")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)

    def accept() -> None:
      while True:
        link = listener.accept()[0]
        threading.Thread(target=Export(self, link).run, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return path

  def there(self, first: int, last: int) -> int:
    """The first of these blocks that is missing, or -1; within the transfer's lock."""
    blocks = self.transfer.blocks
    missing = [blocks.find(state, first, last + 1) for state in (0, 2)]
    if self.whole or not blocks:
      return -1 if self.whole else first
    return min([at for at in missing if at >= 0], default=-1)

  def read(self, start: int, count: int) -> Optional[bytes]:
    """Bytes of the image, once they have come; None when they do not."""
    first, last = start // BLOCK_BYTES, max(start, start + count - 1) // BLOCK_BYTES
    if not self.whole:
      with self.transfer.lock:
        failures = self.failures
        missing = self.there(first, last)
        while missing >= 0:
          if self.error or self.failures > failures:
            return None
          self.demand(missing, last)
          self.transfer.lock.wait(POLL_SECONDS)
          missing = self.there(first, last)
    data = os.pread(self.fd, count, start)
    return data if len(data) == count else None

  def at_once(self, start: int, count: int) -> bool:
    """Whether bytes are there."""
    if self.whole:
      return True
    with self.transfer.lock:
      return self.there(start // BLOCK_BYTES, max(start, start + count - 1) // BLOCK_BYTES) < 0

  def demand(self, block: int, last: int) -> None:
    """See to it that missing blocks come soon; within the transfer's lock."""
    transfer = self.transfer
    busy = len(self.orders) >= READERS  # then the next that is done looks again
    if busy or any(low <= block < high for low, high in self.orders):
      return
    for span in transfer.spans:
      if span.position // BLOCK_BYTES <= block and block * BLOCK_BYTES < span.end:
        if time.monotonic() > span.moved + STALL_SECONDS:
          transfer.release(span)
          break
        if block * BLOCK_BYTES < span.position + JOIN_BLOCKS * BLOCK_BYTES:
          span.wanted = max(span.wanted, min((block + 1) * BLOCK_BYTES, span.end))
          return
        transfer.blocks[block : -(-span.end // BLOCK_BYTES)] = bytes(
          -(-span.end // BLOCK_BYTES) - block
        )
        span.end = block * BLOCK_BYTES
    count = max(self.ahead.pop(block, READAHEAD_BLOCKS // 2) * 2, last - block + 1)
    order = (block, block + min(count, MAX_READAHEAD_BLOCKS))
    self.orders.append(order)
    threading.Thread(target=self.bring, args=(order, last), daemon=True).start()

  def bring(self, order: Tuple[int, int], last: int) -> None:
    """Fetch the blocks of an order with a connection of its own."""
    transfer, (block, end) = self.transfer, order

    def attempt() -> None:
      with transfer.lock:
        free = transfer.blocks[block : block + 1] == b"\0"
        span = transfer.first_gap(block, end - block) if free else None
        if not span:
          return
        span.wanted = min((last + 1) * BLOCK_BYTES, span.end)
        transfer.spans.append(span)
      self.fetch(span)
      self.failures = 0

    try:
      with_retries(self.net, transfer.url, attempt, lambda: transfer.done)
    except RefusedError as error:
      self.error = error
    except (QvmError, OSError) as error:
      self.fail(QvmError(describe(error)))
    except Cancelled:
      pass
    finally:
      with transfer.lock:
        self.ahead[end] = end - block
        self.orders.remove(order)
        transfer.lock.notify_all()


# NBD's protocol, as doc/proto.md of NetworkBlockDevice/nbd tells it; all numbers are big-endian.
NBD_OPTIONS = {"name": 1, "abort": 2, "list": 3, "info": 6, "go": 7}
NBD_FLAGS = 0x0107  # has flags, read-only, flush; several connections see the same
NBD_ACK, NBD_SERVER, NBD_INFO, NBD_UNSUPPORTED, NBD_INVALID = 1, 2, 3, 0x80000001, 0x80000003
NBD_READ, NBD_WRITE, NBD_END, NBD_FLUSH = 0, 1, 2, 3


class Export:
  """One connection of an NBD client: a read-only export of the image's bytes."""

  def __init__(self, server: Server, link: Any) -> None:
    self.server, self.link = server, link
    self.stream = link.makefile("rb")
    self.sending = threading.Lock()

  def run(self) -> None:
    """Serve until the client leaves, or says what no client says."""
    try:
      if self.agree():
        while self.request():
          pass
    except (OSError, EOFError):
      pass
    finally:
      self.stream.close()
      self.link.close()

  def take(self, layout: str) -> Tuple[Any, ...]:
    """Read numbers."""
    return struct.unpack(">" + layout, self.take_bytes(struct.calcsize(">" + layout)))

  def take_bytes(self, count: int) -> bytes:
    """Read just so many bytes."""
    data: bytes = self.stream.read(count)
    if len(data) < count:
      raise EOFError
    return data

  def agree(self) -> bool:
    """The handshake; whether the client goes on to read."""
    self.link.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    (client,) = self.take("I")
    while True:
      magic, option, length = self.take("8sII")
      if magic != b"IHAVEOPT" or length > 4096 + 64:
        return False
      data = self.take_bytes(length)
      if option == NBD_OPTIONS["name"]:
        padding = b"" if client & 2 else bytes(124)
        self.link.sendall(struct.pack(">QH", self.server.size, NBD_FLAGS) + padding)
        return True
      if not self.option(option, data):
        return bool(option == NBD_OPTIONS["go"])

  def option(self, option: int, data: bytes) -> bool:
    """Answer one option; whether others may follow."""
    if option == NBD_OPTIONS["abort"]:
      self.reply(option, NBD_ACK)
      return False
    if option == NBD_OPTIONS["list"]:
      self.reply(option, NBD_SERVER, struct.pack(">I", 0))
      self.reply(option, NBD_ACK)
    elif option in (NBD_OPTIONS["info"], NBD_OPTIONS["go"]):
      if len(data) < 6 or int.from_bytes(data[:4], "big") > len(data) - 6:
        self.reply(option, NBD_INVALID)
        return True
      self.reply(option, NBD_INFO, struct.pack(">HQH", 0, self.server.size, NBD_FLAGS))
      self.reply(option, NBD_INFO, struct.pack(">HIII", 3, 1, BLOCK_BYTES, MAX_READ_BYTES))
      self.reply(option, NBD_ACK)
      return bool(option == NBD_OPTIONS["info"])
    else:
      self.reply(option, NBD_UNSUPPORTED)
    return True

  def reply(self, option: int, kind: int, data: bytes = b"") -> None:
    """Send the answer to an option."""
    self.link.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

  def request(self) -> bool:
    """Answer one request; what has yet to come holds up no other. False at the end."""
    magic, _, kind, handle, start, count = self.take("IHH8sQI")
    if magic != 0x25609513 or kind == NBD_END:
      return False
    if kind == NBD_READ and start + count <= self.server.size and count <= MAX_READ_BYTES:
      if self.server.at_once(start, count):
        self.read(handle, start, count)
      else:
        threading.Thread(target=self.read, args=(handle, start, count), daemon=True).start()
    elif kind == NBD_FLUSH:
      self.send(handle, 0)
    elif kind == NBD_WRITE:
      return False  # no client writes to what is read-only, and its data would have to be read
    else:
      self.send(handle, errno.EINVAL)
    return True

  def read(self, handle: bytes, start: int, count: int) -> None:
    """Answer a read."""
    data = self.server.read(start, count)
    self.send(handle, errno.EIO if data is None else 0, data or b"")

  def send(self, handle: bytes, error: int, data: bytes = b"") -> None:
    """Send the answer to a request."""
    head = struct.pack(">II8s", 0x67446698, error, handle)
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
        launch.stream.let_go()
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
  check_sync(options)
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
  for tag, name in candidates(plan, releases):
    with contextlib.suppress(NotFound):
      return mirror_asset(releases, folder, repo, tag, name)
  raise no_such_image(plan, releases)


def mirror_asset(releases: Releases, folder: str, repo: str, tag: str, name: str) -> None:
  """Put one asset into a mirror, and into the files that stand for its release's pages."""
  top = os.path.join(folder, repo, "releases")
  target = os.path.join(top, "download", tag, name)
  page = os.path.join(top, "expanded_assets", tag)
  for path in (target, page):
    os.makedirs(os.path.dirname(path), exist_ok=True)
  with download_lock(os.path.dirname(target), name):
    if not os.path.isfile(target):
      transfer, record = fetch_asset(releases, repo, tag, name, os.path.dirname(target))
      line = f'<a href="/{repo}/releases/download/{tag}/{name}">{name}</a>'
      with open(page, "a") as file:
        file.write(f"{line} sha256:{record['asset_sha256']}\n")
      move_into_place(transfer.part, target, 0o644)
      transfer.reset()
  with download_lock(folder, repo):
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
    paths = unfinished(cache, alone) + instance_leftovers(cache, orphans)
    paths += unfinished_checkpoints(cache)
    if alone:
      paths += temporaries(cache) + (unneeded(cache, orphans) if options.all else [])
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


def unfinished(cache: str, alone: bool) -> List[str]:
  """Downloads that nobody goes on with; while somebody downloads, just those of other files."""
  found = []
  disks = [path for path in paths_in(cache, "instances") if path.endswith(".qcow2")]
  begun = {os.path.basename(base_of(disk)) for disk in disks if is_streamed(disk)}
  for path in paths_in(cache, "downloads"):
    stem, suffix = os.path.splitext(re.sub(r"\.tmp\Z", "", path))
    stem = re.sub(r"\.tar\.zst\Z", ".qcow2", stem if suffix != ".qcow2" else stem + suffix)
    known = re.search(r"\.(qcow2|tar)\Z", stem) and suffix in (
      ".part",
      ".json",
      ".map",
      ".lock",
      ".qcow2",
    )
    if os.path.basename(stem) in begun and suffix in (".part", ".json", ".map"):
      continue  # overlays lie on what has come
    if known and (alone or not is_locked(stem + ".lock")):
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


INSTANCE_FILE = (
  r"(.+?)\.(qcow2|json|lock|console\.log|known_hosts|keys|ephemeral|sync-[0-9a-f]{16})"
  r"(\.tmp|\.old)?\Z"
)


def temporaries(cache: str) -> List[str]:
  """What publishing left when it was killed, records without a file, and what is of former use."""
  found = [path for path in paths_in(cache, "code") if path != packed_code[0]]
  for path in paths_in(cache, "base"):
    base = re.sub(r"\.(json|kernel|qcow2)(\.new)?(\.tmp)?\Z", ".qcow2", path)
    if base != path and not os.path.exists(base) or re.search(r"\.json(\.new)?\.tmp\Z", path):
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
      beside = (base, record_path(base), record_path(base) + ".new", kernel_path(base))
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
      code = serve(words[1])
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
  if Transfer.abandoned:
    os._exit(code)  # Python 3.12 and 3.13 may crash when they end while a thread waits for data
  return code


if __name__ == "__main__":
  sys.exit(main())
