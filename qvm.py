#!/usr/bin/env python3
"""qvm runs the BSDs, Haiku and OmniOS in QEMU, on any macOS or Linux with Python.

It downloads QEMU, qemu-img and a pre-built image into one cache folder, creates a qcow2 overlay on
top of the image, which it never changes, and boots the overlay in the terminal.

Contents; every section uses only the sections above it:

  Errors and output         reporter, signals, sizes and URLs for people
  Guests                    the literal command lines, and the facts of each image
  Command line              options and commands as tables, the parser, help
  Plan                      what a run needs, by name and path; the cache's paths; records
  Files, locks, programs    Lock, records on disk, unfinished files; the only start of programs
  HTTP                      the only opener of URLs: redirects, retries, proxies
  Download                  one file on its way, by up to four connections
  Releases                  newest tag, assets and digests, the choice of image
  Unpack                    untrusted archives and streams onto the disk
  Store                     QEMU, qemu-img and base images in the cache
  Instances                 overlays: what they lie on, their records, their list
  QEMU command              a table, its adjustments, the command line
  Console                   the relay between QEMU and the terminal
  Ssh                       key disk, login, commands in the guest
  Sync                      a folder to the guest and back
  Image server              a base image served while it is downloaded (NBD)
  Machine                   an instance while a command deals with it
  Layers                    checkpoints of booted guests, and prepared disks
  Commands, Each, Doctor, Completion and main

How it stays right:

Locks between processes are flocks, which end with the last process that has the descriptor, and
are taken in this order: instances/NAME.lock (qvm, then its QEMU, for as long as either lives);
downloads/ (shared by whoever fetches or starts something, alone by `clean --all`); downloads/NAME
(whoever makes that unfinished thing; an image's may wait for qemu-img's, and who makes a layer then
takes the lock of a new instance of its own, and a checkpoint's); instances/
(instances_lock, for moments only: every look at an instance's lock, and every change of what
instances lie on). The lock of an ssh port, or a published TCP port, is the UDP port of the same
number.

Publishing: everything unfinished is made in downloads/ under a lock; what lies there unlocked is a
leftover. A file is flushed, then renamed to its place; a base image's record waits beside it until
both are there. QEMU's tree is swapped by a symbolic link.

Threads: the main thread gets the signals, prints errors and chooses the exit code. The others are
daemons that fetch, or feed, read or await a program; the result of each is raised where it is
awaited.

Who outlives whom: a detached QEMU outlives qvm and keeps the instance's lock and port. An image
server outlives qvm too; it ends when nobody holds the other end of its pipe, which QEMU has. So
does the keeper of a console log, which flushes the disk of a detached machine in the end. An
orphaned qemu-img keeps the instance's lock until it has ended. Nothing outlives `qvm each`: its
children end themselves and their machines once nobody holds the other end of their pipes.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of what is still being loaded

import contextlib
import errno
import functools
import operator
import os
import re
import sys
import threading
import time
from stat import S_ISDIR, S_ISLNK, S_ISREG, S_ISSOCK, S_ISVTX
from types import FrameType

__version__ = "0.2.0"
TYPE_CHECKING = False  # mypy takes it for true

if TYPE_CHECKING:
  import array
  import bz2
  import calendar
  import difflib
  import email.utils
  import fcntl
  import fnmatch
  import grp
  import gzip
  import hashlib
  import http.client
  import ipaddress
  import itertools
  import json
  import lzma
  import marshal
  import platform
  import pwd
  import random
  import resource
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
  import xml.etree.ElementTree
  import zlib
  from typing import (
    IO,
    Any,
    Callable,
    Dict,
    Generic,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
    Union,
  )

  Process = subprocess.Popen[bytes]
  Headers = http.client.HTTPMessage
  Request = urllib.request.Request
  Response = http.client.HTTPResponse
else:

  class Unread:
    """Stands for all of typing, which nothing reads: that takes 3 ms, or 6 %, of a cached start."""

    def __getitem__(self, key):
      return object

    def __call__(self, *values, **named):
      return self

  IO = Any = Callable = Dict = Generic = Iterable = Iterator = List = Mapping = Unread()
  NoReturn = Optional = Sequence = Set = Tuple = Type = TypeVar = Union = IO

  class NamedTuple(tuple):
    """typing's takes 0.1 ms more for each class: 3 ms, or 6 %, of a cached start."""

    __slots__ = ()

    def __init_subclass__(cls):
      cls._fields = tuple(cls.__annotations__)
      cls._defaults = {name: cls.__dict__[name] for name in cls._fields if name in cls.__dict__}
      for number, name in enumerate(cls._fields):
        setattr(cls, name, property(operator.itemgetter(number)))

    def __new__(cls, *values, **named):
      if named or len(values) < len(cls._fields):
        named = {**cls._defaults, **dict(zip(cls._fields, values)), **named}
        values = [named.pop(name) for name in cls._fields]
        if named:
          raise TypeError(f"{cls.__name__} has no {', '.join(named)}")
      return tuple.__new__(cls, values)

    def _asdict(self):
      return dict(zip(self._fields, self))

    def _replace(self, **named):
      return type(self)(**{**self._asdict(), **named})

    def __repr__(self):
      values = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
      return f"{type(self).__name__}({values})"

  class Lazy:
    """Imports modules on first use: a cached start needs few of them."""

    def __init__(self, *names):
      self.__dict__["_names"] = names

    def __getattr__(self, attribute):
      for name in self._names:
        module = __import__(name)  # importing a.b returns a, with b loaded
      globals()[module.__name__] = module
      return getattr(module, attribute)

  for _name in (
    *("array", "bz2", "calendar", "difflib", "fcntl", "fnmatch", "grp", "gzip", "hashlib"),
    *("ipaddress", "itertools", "json", "lzma", "marshal", "pwd", "platform", "random"),
    *("resource", "select"),
    *("shlex", "shutil", "socket", "ssl", "struct", "subprocess", "tarfile", "tempfile"),
    *("termios", "tty", "unicodedata", "zlib"),
  ):
    globals()[_name] = Lazy(_name)
  email, http = Lazy("email.utils"), Lazy("http.client")
  urllib = Lazy("urllib.error", "urllib.parse", "urllib.request")
  xml = Lazy("xml.etree.ElementTree")


# ---- Errors and output --------------------------------------------------------------------------

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_OWN = 125  # qvm itself failed, where any other code comes from a command in the guest


class QvmError(Exception):
  """A failure to report to the user: what failed, by name, and what to do about it."""

  def __init__(self, message: str, hint: str = "") -> None:
    super().__init__(message)
    self.hint = hint


class UsageError(QvmError):
  """An invalid command line or environment variable."""

  def __init__(self, message: str, hint: str = "") -> None:
    super().__init__(re.sub(r"\S{300,}", lambda word: word.group()[:300] + "...", message), hint)


class RefusedError(QvmError):
  """A damaged or hostile file: downloading it again may help, keeping it does not."""


class BadImageError(QvmError):
  """An image on which guests have run is not the one that its release names, or is unsafe."""


class Interrupted(BaseException):
  """A signal asked qvm to stop; clean-up runs as this propagates."""

  def __init__(self, signum: int) -> None:
    super().__init__(signum)
    self.signum = signum


def describe(error: BaseException) -> str:
  """An exception as text without passwords: the system's message, else its own, else its type."""
  text = getattr(error, "strerror", None) or str(error) or type(error).__name__
  if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
    text = f"the disk is full: {text}"
  is_denied = isinstance(error, PermissionError) and error.errno == errno.EPERM
  if is_denied and sys.platform == "darwin":  # not an SSLError, whose errno may be 1, too
    text += " (does your terminal have access? see System Settings, Privacy & Security)"
  return re.sub(r"\S*@", "", brief(str(text)))


def describe_at(error: BaseException) -> str:
  """The same with the path, if there is one, on which it failed."""
  path = getattr(error, "filename2", None) or getattr(error, "filename", None)
  return f"{path}: {describe(error)}" if path else describe(error)


def brief(text: str) -> str:
  """A text that may be a server's, cut after a word if it is longer than a message."""
  return text if len(text) < 400 else text[:400].rpartition(" ")[0] + " ..."


def redacted(url: str) -> str:
  """A URL fit for a message: no user, password or signed query."""
  return re.sub(r"(//)[^/@]*@", r"\1", url.split("?")[0].split("#")[0])


def ending(code: int) -> str:
  """How a process ended, from its return code."""
  return f"signal {-code}" if code < 0 else f"exit code {code}"


def megabytes(count: float) -> str:
  """A byte count for people, in units of 1000."""
  for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= size:
      return f"{count / size:.{0 if count >= 100 * size else 1}f} {unit}"
  return f"{count:.0f} B"


def utc(seconds: float) -> str:
  """A time as records have it."""
  return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def age(stamp: str) -> str:
  """How long ago a time from utc() was, for people; `-` if there is none."""
  with contextlib.suppress(ValueError):
    seconds = time.time() - calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ"))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
      if seconds >= size:
        return f"{seconds / size:.0f} {unit}"
    return "now"
  return "-"


def printable(text: str) -> str:
  """The text with `?` for control characters, which a server or a file name could contain."""
  return "".join(c if c.isprintable() else "?" for c in text)


class Reporter:
  """Writes one line per event to stderr; concurrent threads and processes never mix theirs."""

  def __init__(self) -> None:
    self.progress = False
    self.newline = "\n"  # "\r\n" while the terminal is raw
    self.log = -1  # the descriptor of a file that gets the lines once stderr is closed
    self.phases = -1  # the descriptor to which a child of `qvm each` tells what it does
    self.lock = threading.Lock()
    self.drawn = 0  # lines
    self.resized = False  # whether the terminal has been, since they were drawn

  def say(self, text: str) -> None:
    """Write one `qvm: …` line; a closed stderr is not an error."""
    with self.lock:
      self._write(f"qvm: {printable(text)}{self.newline}")
      self.drawn = 0

  def draw(self, *lines: str) -> None:
    """Show progress: on a terminal in place, elsewhere as lines of their own."""
    with self.lock:
      if os.isatty(2):
        columns, _ = terminal_size()
        text = "\r\n".join(printable(line)[: columns - 1] for line in lines)
        # Without wrap the terminal cuts what is wider than it looks.
        self._write(text if len(lines) == 1 else f"\033[?7l{text}\033[?7h")
        self.drawn = len(lines)
      else:
        self._write("".join(f"qvm: {printable(line)}\n" for line in lines))

  def erase(self) -> None:
    """Take away what draw() has shown in place."""
    with self.lock:
      if self.drawn:
        self._write("")
        self.drawn = 0

  def phase(self, name: str, text: str = "") -> None:
    """Tell the `qvm each` that has started this qvm, if one has, what it does."""
    if self.phases >= 0:
      with self.lock, contextlib.suppress(OSError):
        write_all(self.phases, f"{name} {printable(text)[:1000]}\n".encode("utf-8", "replace"))

  def _write(self, text: str) -> None:
    clear = "\r" + "\033[K\033[A" * (self.drawn - 1) + "\033[K" if self.drawn else ""
    if self.drawn > 1 and self.resized:  # they may be anywhere now
      clear, self.resized = "\033[H\033[2J", False
    data = (clear + text).encode("utf-8", "replace")
    try:
      write_all(2, data)
    except OSError:
      with contextlib.suppress(OSError):
        os.write(self.log, b"\n" + data)  # the guest may have left its line unfinished


def terminal_size() -> Tuple[int, int]:
  """The columns and rows of the terminal on stderr; 80 and 24 if unknown."""
  try:
    columns, rows = os.get_terminal_size(2)
    return columns or 80, rows or 24
  except OSError:
    return 80, 24


report = Reporter()
say = report.say


def say_error(error: QvmError) -> None:
  """Write what failed, and on a line of its own what to do."""
  say(str(error))
  if error.hint:
    say(error.hint)


def emit(text: str) -> None:
  """Write one line of results to stdout; file names keep their bytes."""
  try:
    data = os.fsencode(text)
  except UnicodeEncodeError:  # help text in a locale without UTF-8
    data = text.encode("utf-8", "surrogateescape")
  write_all(1, data + b"\n")


def emit_json(value: object) -> None:
  """Write one JSON value to stdout."""
  emit(json.dumps(value, indent=2))


def show_table(table: Sequence[Sequence[str]]) -> None:
  """Print rows with their columns aligned."""
  widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
  for line in table:
    emit(printable("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()))


def write_all(fd: int, data: bytes) -> None:
  """Write all bytes, even if another process has made the descriptor non-blocking."""
  view = memoryview(data)
  while view:
    try:
      view = view[os.write(fd, view) :]
    except BlockingIOError:
      select.select([], [fd], [])


def open_standard_streams() -> None:
  """Open /dev/null for closed standard streams, so that no other file gets their numbers."""
  for fd in (0, 1, 2):
    try:
      os.fstat(fd)
    except OSError:
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open() returns the lowest


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
  """Raises Interrupted for the first of STOP_SIGNALS and ignores later ones."""

  def __init__(self) -> None:
    self.held = False
    self.caught = 0
    self.hurried = False  # whether qvm has seconds to end, and lets nothing else take its time

  def install(self) -> None:
    """Install the handlers; a signal that was ignored at the start (nohup) stays ignored."""
    for number in STOP_SIGNALS:
      if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, self.handle)
    sys.unraisablehook = self.unraisable  # Python 3.8 and newer call it

  def handle(self, number: int, frame: Optional[FrameType]) -> None:
    if not self.caught:
      self.caught = number
      if not self.held:
        raise Interrupted(number)

  def unraisable(self, what: Any) -> None:
    """Send ourselves a signal once more whose exception Python has dropped, as in a finalizer."""
    if what.exc_type is Interrupted:
      number, self.caught = self.caught, 0
      words = (number, sys._getframe())
      threading.Thread(target=self.send_again, args=words, daemon=True).start()
    else:
      sys.__unraisablehook__(what)

  def send_again(self, number: int, hook: FrameType) -> None:
    """Send ourselves a signal once the main thread is not in that call any more, which drops it."""
    frame: Optional[FrameType] = hook
    while frame:
      time.sleep(0.01)
      frame = sys._current_frames().get(threading.main_thread().ident or 0)
      while frame and frame is not hook:
        frame = frame.f_back
    os.kill(os.getpid(), number)

  def again(self) -> None:
    """Forget the caught signal, which has been handled, and catch the next one."""
    self.caught = 0

  def finish(self) -> None:
    """Ignore further signals: the work is done."""
    self.caught = self.caught or -1

  def grace(self, seconds: float) -> float:
    """For how long to wait for the end of what is given this time."""
    return min(seconds, 1.0) if self.hurried else seconds

  @contextlib.contextmanager
  def hold(self) -> Iterator[None]:
    """Delay signals until the block ends; only the main thread ever gets one."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    caught, held = self.caught, self.held
    self.held = True
    try:
      yield
    finally:
      self.held = held
    if self.caught and not caught and not held:
      raise Interrupted(self.caught)


signals = Signals()


# ---- Guests -------------------------------------------------------------------------------------
# Each table is one complete QEMU command line, as the user gave it; tables share nothing. SHARE is
# the share/qemu folder of that guest CPU's QEMU, DISK the overlay.

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
DRAGONFLYBSD_X86_64 = """
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
MIDNIGHTBSD_X86_64 = """
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
-device virtio-blk-pci,drive=drive0,bootindex=0
-drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
"""
# The second drive of the user's original command lines, on the bus of drive0. KEYS is its file.
KEYS_VIRTIO = """
-device virtio-blk-pci,drive=drive1,bootindex=1
-drive if=none,file=KEYS,id=drive1,cache=unsafe,discard=ignore,format=raw
"""
KEYS_SCSI = """
-device scsi-hd,drive=drive1,bootindex=1
-drive if=none,file=KEYS,id=drive1,cache=unsafe,discard=ignore,format=raw
"""
# The disk of --disk, in the same way. DATA is its file.
DATA_VIRTIO = """
-device virtio-blk-pci,drive=drive2
-drive if=none,file=DATA,id=drive2,cache=unsafe,discard=ignore,format=qcow2
"""
DATA_SCSI = """
-device scsi-hd,drive=drive2
-drive if=none,file=DATA,id=drive2,cache=unsafe,discard=ignore,format=qcow2
"""


class KeyDisk(NamedTuple):
  """The drive from which an image reads the ssh key that may log in."""

  table: str
  start: int  # byte offset of its FAT file system; above 0, in the first partition of an MBR
  until: str  # the first image release that needs no key; empty: every release needs one


class GuestTar(NamedTuple):
  """What the guest's tar reads, and writes."""

  large_files: bool  # of 8 GiB or more, as GNU's base-256 sizes
  long_links: bool  # GNU's header K, for targets over 100 bytes; else Solaris' X


BSDTAR = GNU_TAR = GuestTar(True, True)
PAX = GuestTar(False, True)  # also as tar, in OpenBSD and NetBSD
ILLUMOS_TAR = GuestTar(False, False)


class Guest(NamedTuple):
  """One OS on one CPU: its command line, and what qvm must know about its image."""

  os: str
  arch: str  # as in image names: x86-64 or arm64
  title: str
  user: str  # the ssh user
  console: bool  # whether the guest writes to its serial port
  power_off: str  # the command, run as that user, that shuts the guest down cleanly
  set_clock: str  # the command, run as that user, that sets the clock: a strftime(3) format, UTC
  key_disk: Optional[KeyDisk]
  table: str
  tar: GuestTar


# From the images' release notes. Without the key OpenBSD wants a password, which qvm never types;
# FreeBSD and NetBSD let `runner` in without either since these releases.
FREEBSD_KEYS = KeyDisk(KEYS_VIRTIO, 1 << 20, "v0.14.0")
OPENBSD_KEYS = KeyDisk(KEYS_SCSI, 0, "")
NETBSD_KEYS = KeyDisk(KEYS_SCSI, 0, "v1.0.0")
HALT = "sudo shutdown -p now"
HALT_OMNIOS = "sudo shutdown -i5 -g0 -y"
DATE = "sudo date -u %Y%m%d%H%M.%S"  # date(1) of the BSDs
DATE_HAIKU = "date -u -s '%Y-%m-%d %H:%M:%S'"  # GNU's
DATE_OMNIOS = "sudo date -u %m%d%H%M%Y.%S"
GUESTS = (
  Guest("freebsd", "x86-64", "FreeBSD", "runner", True, HALT, DATE, FREEBSD_KEYS,
        FREEBSD_X86_64, BSDTAR),
  Guest("freebsd", "arm64", "FreeBSD", "runner", True, HALT, DATE, FREEBSD_KEYS,
        FREEBSD_ARM64, BSDTAR),
  Guest("openbsd", "x86-64", "OpenBSD", "runner", True, HALT, DATE, OPENBSD_KEYS,
        OPENBSD_X86_64, PAX),
  Guest("openbsd", "arm64", "OpenBSD", "runner", True, HALT, DATE, OPENBSD_KEYS,
        OPENBSD_ARM64, PAX),
  Guest("netbsd", "x86-64", "NetBSD", "runner", True, HALT, DATE, NETBSD_KEYS,
        NETBSD_X86_64, PAX),
  Guest("netbsd", "arm64", "NetBSD", "runner", True, HALT, DATE, NETBSD_KEYS,
        NETBSD_ARM64, PAX),
  Guest("haiku", "x86-64", "Haiku", "user", False, "shutdown -q", DATE_HAIKU, None,
        HAIKU_X86_64, GNU_TAR),
  Guest("omnios", "x86-64", "OmniOS", "runner", True, HALT_OMNIOS, DATE_OMNIOS, None,
        OMNIOS_X86_64, ILLUMOS_TAR),
  Guest("dragonflybsd", "x86-64", "DragonFly BSD", "runner", True, HALT, DATE, None,
        DRAGONFLYBSD_X86_64, BSDTAR),
  Guest("midnightbsd", "x86-64", "MidnightBSD", "runner", True, HALT, DATE, None,
        MIDNIGHTBSD_X86_64, BSDTAR),
)  # fmt: skip
OS_NAMES = tuple(dict.fromkeys(guest.os for guest in GUESTS))
# By OS, the line that installs packages as the image's user; 4 of OmniOS is: nothing to do.
INSTALL = {
  "freebsd": "sudo env ASSUME_ALWAYS_YES=yes pkg install -y {}",
  "openbsd": "sudo pkg_add -I {}",
  "netbsd": "sudo pkgin -y install {}",
  "haiku": "pkgman install -y {}",
  "omnios": "sudo pkg install {} || [ $? -eq 4 ]",
  "dragonflybsd": "sudo pkg install -y {}",
  "midnightbsd": "sudo mport install {}",
}
ARCHES = {"x86-64": "x86-64", "x86_64": "x86-64", "amd64": "x86-64", "x64": "x86-64",
          "arm64": "arm64", "aarch64": "arm64"}  # fmt: skip
QEMU_CPUS = {"x86-64": "x86_64", "arm64": "aarch64"}  # as in QEMU's program names


def unknown(what: str, text: str, known: Iterable[str]) -> UsageError:
  """The error for a word that is none of those known: the one that was meant, or all of them."""
  words = {word.lstrip("-"): word for word in known}
  near = difflib.get_close_matches(text.lower().lstrip("-"), list(words), 1, 0.7)  # a typing error
  way_out = f"did you mean {words[near[0]]}?" if near else f"choose from {', '.join(known)}"
  return UsageError(f"unknown {what}; {way_out}")


def find_guest(os_name: str, arch: str) -> Guest:
  """The guest for an OS and a CPU; UsageError lists the known ones."""
  mine = [guest for guest in GUESTS if guest.os == os_name]
  if not mine:
    raise unknown(f"OS '{os_name}'", os_name, OS_NAMES)
  for guest in mine:
    if guest.arch == arch:
      return guest
  arches = ", ".join(guest.arch for guest in mine)
  raise UsageError(f"{mine[0].title} has no {arch} image, only {arches} (--platform)")


# ---- Command line -------------------------------------------------------------------------------

ACCELERATORS = ("hvf", "kvm", "tcg")
TABLE_ACCEL = "hvf:kvm:tcg"  # as in the tables
DIRECTIONS = ("both", "in", "out")
SSH_PORT = 2847
NAME_RE = r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}\Z"
VERSION_RE = r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,49}\Z"


class Address(NamedTuple):
  """The host address and port of the guest's ssh; unless chosen, qvm may take a higher port."""

  host: str = "127.0.0.1"
  port: int = SSH_PORT
  chosen: bool = False

  def __str__(self) -> str:
    return f"{self.host}:{self.port}"


class Forward(NamedTuple):
  """A port of the guest on the host: --publish; port 0 is a free one, chosen at the start."""

  host: str
  port: int
  guest: int
  kind: str  # tcp or udp

  def __str__(self) -> str:
    return f"{self.host}:{self.port}:{self.guest}" + "/udp" * (self.kind == "udp")


class Options(NamedTuple):
  """The parsed and checked command line."""

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
  publish: Tuple[Forward, ...] = ()
  disk: str = ""  # the size of a second disk
  image: str = ""  # the path of an image of the user's own
  release: str = ""  # the tag of the only release that the image may come from
  qemu_release: str = ""  # and that of QEMU's
  display: bool = False
  accel: str = ""  # empty: what works on this host, see accelerators_for
  qemu: str = ""
  qemu_args: Tuple[str, ...] = ()
  detach: bool = False
  stream: bool = False
  boot_timeout: Optional[float] = None  # seconds; see Machine.patience
  boot_attempts: int = 1
  console_log: str = ""
  no_network: bool = False
  guest_command: Tuple[str, ...] = ()
  prepare: Tuple[str, ...] = ()
  scripts: Tuple[bytes, ...] = ()  # what is in them, from resolve()
  install: Tuple[str, ...] = ()
  prepare_timeout: float = 3600.0
  rebuild: bool = False
  env: Tuple[str, ...] = ()
  sync: str = ""
  sync_direction: str = "both"
  sync_exclude: Tuple[str, ...] = ()
  sync_delete: bool = False
  sync_out: str = ""
  jobs: int = 0  # 0: as many as this host carries
  logs: str = ""
  junit: str = ""
  fail_fast: bool = False
  follow: bool = False
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

  @property
  def sets_up(self) -> bool:
    """Whether the guest is to be set up before it is used."""
    return bool(self.prepare or self.install)


def parse_arch(text: str) -> str:
  """A CPU by any of its usual names."""
  arch = ARCHES.get(text.lower())
  if not arch:
    raise unknown(f"CPU '{text}'", text, ARCHES)
  return arch


def matching(text: str, pattern: str, what: str, use: str) -> str:
  """A word that matches a pattern; UsageError says what to use in its place."""
  if not re.match(pattern, text):
    raise UsageError(f"invalid {what} '{text}': use {use}")
  return text


def parse_name(text: str) -> str:
  """An instance's name, which becomes part of file names."""
  use = "up to 100 letters, digits and . _ + ~ -, starting with a letter or digit"
  return matching(text, NAME_RE, "instance name", use)


PINNED_RE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}\Z"  # a tag in file names


def parse_tag(text: str) -> str:
  """The tag of a release."""
  return matching(text, PINNED_RE, "release", "its tag, as in v0.14.0")


def parse_version(text: str) -> str:
  """A version, which becomes part of file names and URLs."""
  use = "up to 50 letters, digits and . _ + ~ -, as in 15.1"
  matching(text, VERSION_RE, "version", use)
  for tag in text.split("+", 1)[1:]:  # as `search` shows what is cached of just one release
    parse_tag(tag)
  return text


def memory_bytes(memory: str) -> int:
  """A value of -m in bytes; a number without a suffix is in MiB."""
  return int(memory.rstrip("MGT")) << {"M": 20, "G": 30, "T": 40}.get(memory[-1], 20)


def parse_memory(text: str, what: str = "memory") -> str:
  """A size for QEMU's -m: an integer, in MiB or with the suffix M, G or T."""
  size = text.upper()
  if not re.match(r"[0-9]{1,9}[MGT]?\Z", size) or not 64 << 20 <= memory_bytes(size) <= 4 << 40:
    raise UsageError(f"invalid {what} size '{text}': use 64M to 4T, as in 512M or 6G")
  return size


def parse_address(text: str) -> Address:
  """[ADDRESS:]PORT, with an IPv4 address of this host."""
  match = re.match(r"(?:((?:[0-9]{1,3}\.){3}[0-9]{1,3}):)?([0-9]{1,5})\Z", text)
  host, port = (match.group(1) or Address().host, int(match.group(2))) if match else ("0", 0)
  numbers = [*map(int, host.split("."))]
  if not 1 <= port <= 65535 or max(numbers) > 255:
    raise UsageError(
      f"invalid ssh port '{text}': use a port from 1 to 65535, or ADDRESS:PORT with an IPv4 "
      "address of this host, as in 2847 or 0.0.0.0:2847"
    )
  return Address(".".join(map(str, numbers)), port, True)


def parse_forward(text: str) -> Forward:
  """[ADDRESS:]HOST:GUEST[/udp]: a port of this host, 0 for a free one, and one of the guest."""
  match = re.match(r"(?:([0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?\Z", text)
  host, port, guest, kind = match.groups() if match else ("", "", "", "")
  try:
    address = parse_address(f"{host or Address().host}:{int(port or 0) or 1}")
    parse_address(guest)
  except UsageError:
    raise UsageError(
      f"invalid port to publish '{text}': use [ADDRESS:]HOST:GUEST[/udp] with an IPv4 address of "
      "this host and ports up to 65535, as in 8080:80; HOST 0 is a free one"
    )
  return Forward(address.host, int(port), int(guest), kind or "tcp")


def parse_accel(text: str) -> str:
  """Accelerators in the order in which QEMU tries them."""
  names = text.lower().split(":")
  if not all(name in ACCELERATORS for name in names) or len(set(names)) < len(names):
    raise UsageError(
      f"invalid accelerator '{text}': use hvf, kvm or tcg, or several separated by ':'"
    )
  return ":".join(names)


def parse_seconds(text: str) -> float:
  """A time in seconds, at most a day."""
  if not re.match(r"[0-9]{1,5}(\.[0-9]{1,3})?\Z", text) or float(text) > 86400:
    raise UsageError(f"invalid number of seconds '{text}': use 0 to 86400")
  return float(text)


def parse_count(text: str, what: str, most: int) -> int:
  """A number of CPUs, of machines that may run, or of times that one may be booted."""
  if not re.match(r"[0-9]{1,3}\Z", text) or not 1 <= int(text) <= most:
    raise UsageError(f"invalid number of {what} '{text}': use 1 to {most}")
  return int(text)


def parse_variable(text: str) -> str:
  """An environment variable as NAME or NAME=VALUE."""
  use = "NAME or NAME=VALUE, starting with a letter or _"
  return matching(text, r"[A-Za-z_][A-Za-z0-9_]*(=|\Z)", "variable", use)


def parse_packages(text: str) -> str:
  """Names of packages, separated by spaces; none can be taken for an option, or for shell."""
  use = "names as the guest's package manager has them, separated by spaces, as in "
  use += "--install 'git cmake'"
  for name in text.split() or [text]:
    matching(name, r"[A-Za-z0-9][A-Za-z0-9._+:@/,%=~-]{0,199}\Z", "package name", use)
  return " ".join(text.split())


def parse_direction(text: str) -> str:
  """The direction in which files are copied."""
  if text not in DIRECTIONS:
    raise unknown(f"direction '{text}'", text, DIRECTIONS)
  return text


class Option(NamedTuple):
  """One option: its spellings, the field of Options it sets, and how its value is parsed."""

  flags: Tuple[str, ...]
  field: str
  metavar: str  # empty: the option takes no value
  read: Callable[[str], Any]
  help: str  # a Command's option_help can replace it
  many: bool = False  # whether it may be repeated


OPTIONS = (
  Option(("--platform",), "platform", "ARCH", parse_arch,
         "CPU of the guest: x86-64 or arm64 (default: the host's)"),
  Option(("--rm",), "rm", "", bool, "run a temporary instance, deleted when the run ends"),
  Option(("--warm",), "warm", "", bool,
         "start the temporary instance from a checkpoint of a booted\n"
         "guest, which the first such run creates"),
  Option(("--dry-run",), "dry_run", "", bool,
         "print the QEMU command; download and change nothing"),
  Option(("--name",), "name", "NAME", parse_name,
         "name of the instance (default: OS-VERSION-ARCH)"),
  Option(("-m", "--memory"), "memory", "SIZE", parse_memory, "memory of the guest (default: 6G)"),
  Option(("--cpus",), "cpus", "N", lambda text: str(parse_count(text, "CPUs", 255)),
         "number of virtual CPUs (default: 2)"),
  Option(("--ssh-port",), "ssh", "[ADDRESS:]PORT", parse_address,
         "host address and port for the guest's ssh\n"
         "(default: 127.0.0.1:2847 or the next free port)"),
  Option(("-p", "--publish"), "publish", "HOST:GUEST", parse_forward,
         "a port of the guest on this host; [ADDRESS:]HOST:GUEST[/udp],\n"
         "HOST 0 is a free one; may be repeated; kept with the instance", True),
  Option(("--disk",), "disk", "SIZE", lambda text: parse_memory(text, "disk"),
         "give the instance a second, blank disk of this size,\nkept and deleted with it"),
  Option(("--image",), "image", "FILE", str,
         "boot an image of your own, qcow2 or raw, as that OS;\nFILE is never written"),
  Option(("--release",), "release", "TAG", parse_tag,
         "use the image of just this release, kept beside others"),
  Option(("--qemu-release",), "qemu_release", "TAG", parse_tag,
         "use the QEMU of just this release, kept beside others"),
  Option(("--display",), "display", "", bool, "show the guest's screen in a window"),
  Option(("--accel",), "accel", "LIST", parse_accel,
         "accelerators to try, in this order, and no others\n"
         "(default: the fastest that works here)"),
  Option(("--qemu",), "qemu", "PATH", str,
         "use this qemu-system-* and the qemu-img next to it or on PATH"),
  Option(("--qemu-arg",), "qemu_args", "ARG", str,
         "extra argument for QEMU; may be repeated", True),
  Option(("-d", "--detach"), "detach", "", bool,
         "run in the background and return once ssh answers;\nsee qvm list and qvm stop"),
  Option(("--stream",), "stream", "", bool,
         "boot while the image is downloading: the guest runs before\n"
         "the image's digest is checked"),
  Option(("--boot-timeout",), "boot_timeout", "SECONDS", parse_seconds,
         "how long to wait for ssh (default: 600, emulated 1800)"),
  Option(("--boot-attempts",), "boot_attempts", "N", lambda text: parse_count(text, "attempts", 10),
         "how often to boot a guest whose ssh does not answer\n(default: 1)"),
  Option(("--console-log",), "console_log", "FILE", str,
         "append the guest's console output to FILE"),
  Option(("--no-network",), "no_network", "", bool,
         "let the guest reach nothing, not even this host, except while it\n"
         "is set up; its ssh stays"),
  Option(("-e", "--env"), "env", "NAME[=VALUE]", parse_variable,
         "set a variable for the command, without VALUE to its value\n"
         "here; may be repeated; CI, if set, is always passed on", True),
  Option(("--prepare",), "prepare", "SCRIPT", str,
         "set the guest up with SCRIPT first, for a /bin/sh that ends at\n"
         "the first failure, and keep its disk as a layer for later runs\n"
         "with the same scripts, packages and variables; may be repeated", True),
  Option(("--install",), "install", "'PKG...'", parse_packages,
         "the same with the guest's package manager, before any SCRIPT", True),
  Option(("--prepare-timeout",), "prepare_timeout", "SECONDS", parse_seconds,
         "how long setting up may take (default: 3600)"),
  Option(("--rebuild",), "rebuild", "", bool, "make the layer anew, from the base image"),
  Option(("--sync",), "sync", "DIR", str,
         "copy DIR to ~/work in the guest, run the command there,\nand copy its changes back"),
  Option(("--sync-direction",), "sync_direction", "WAY", parse_direction,
         "both (default), in (only to the guest) or out (only from it)"),
  Option(("--sync-exclude",), "sync_exclude", "PATTERN", str,
         "skip files with this name or, if it has a /, this path;\nmay be repeated; "
         ".git is always skipped", True),
  Option(("--sync-delete",), "sync_delete", "", bool,
         "delete in DIR what the command deleted in the guest"),
  Option(("--sync-out",), "sync_out", "DIR", str,
         "bring what the command made or changed to DIR/GUEST/;\nother files there stay"),
  Option(("-j", "--jobs"), "jobs", "N", lambda text: parse_count(text, "machines", 999),
         "machines at once (default: as many as there are cores, and\nas free memory carries)"),
  Option(("--fail-fast",), "fail_fast", "", bool, "end the others once one has failed"),
  Option(("--logs",), "logs", "DIR", str,
         "write the logs to DIR/GUEST.log (default: below the cache,\nfor the last ten runs)"),
  Option(("--junit",), "junit", "FILE", str, "write the results to FILE as JUnit's XML"),
  Option(("-f", "--follow"), "follow", "", bool, "go on until the machine ends"),
  Option(("--force",), "force", "", bool, "end QEMU at once, without shutting the guest down"),
  Option(("--offline",), "offline", "", bool, "skip the network checks"),
  Option(("--progress",), "progress", "", bool, "show download progress"),
  Option(("--refresh",), "refresh", "", bool,
         "replace cached files with the newest release,\nunless an instance needs the old image"),
  Option(("--verify",), "verify", "", bool,
         "compare cached files with the digests recorded at download\nand with the release's"),
  Option(("--mirror",), "mirror", "DIR", str,
         "download the release's files into DIR, laid out as a mirror\nfor QVM_RELEASES_URL"),
  Option(("--all",), "all", "", bool, "also delete layers and images that nothing needs, and QEMU"),
  Option(("--json",), "json", "", bool, "print JSON instead of a table"),
  Option(("-h", "--help"), "help", "", bool, "show this help"),
  Option(("--version",), "version", "", bool, "show the version of qvm"),
)  # fmt: skip
EVERYWHERE = ("help", "version")
IN_GUEST = ("env", "sync", "sync_direction", "sync_exclude", "sync_delete")
SET_UP_ONLY = ("env", "memory", "cpus", "accel", "boot_timeout")  # options of `pull` for that
SET_UP = ("install", "prepare", "prepare_timeout", "rebuild")
# What `each` hands on to the `run` of each guest.
HANDED_ON = (
  "memory", "cpus", "accel", "qemu", "qemu_args", "boot_timeout", "boot_attempts", "warm", "stream",
  "no_network", "install", "prepare", "prepare_timeout", "env", "sync", "sync_exclude",
)  # fmt: skip


class Command(NamedTuple):
  """One command: its operands, the options it accepts, and its help."""

  operands: str
  least: int  # operands
  most: int
  fields: Tuple[str, ...]
  summary: str
  examples: Tuple[str, ...]
  option_help: Mapping[str, str] = {}  # by field, where an option means something else here


COMMANDS = {
  "run": Command(
    "OS [VERSION] [-- COMMAND [ARG...]]", 1, 2,
    ("platform", "rm", "warm", "dry_run", "name", "memory", "cpus", "ssh", "publish", "disk",
     "image", "release", "qemu_release", "accel", "qemu", "qemu_args", "detach", "stream",
     "boot_timeout", "boot_attempts", "console_log", "no_network", "display", *SET_UP, *IN_GUEST,
     "progress"),
    "Boot a guest in this terminal or run one command in it, downloading what is missing.",
    (
      "qvm run freebsd 15.1",
      "qvm run --rm freebsd 15.1 -- uname -a",
      "qvm run --rm --sync . freebsd 15.1 -- 'make && make test'",
      "qvm run --rm --warm freebsd 15.1 -- make test",
      "qvm run --rm --install 'git cmake' freebsd 15.1 -- cmake --version",
      "qvm run --rm --platform arm64 openbsd 7.9",
      "qvm run --name build -m 2G --cpus 4 --ssh-port 2222 omnios r151058",
      "qvm run --detach --name web --publish 8080:80 freebsd 15.1",
      "qvm run --image ./out.qcow2 freebsd",
      "qvm run --dry-run netbsd 10.1",
    ),
  ),
  "each": Command(
    "GUEST... -- COMMAND [ARG...]", 1, 1000,
    ("jobs", "fail_fast", *HANDED_ON, "sync_out", "logs", "json", "junit"),
    "Run one command in several guests at once, each a temporary machine of its own.",
    (
      "qvm each --sync . freebsd-14 freebsd-15 openbsd-7.9-arm64 -- 'make && make test'",
      "qvm each -j 2 --fail-fast --junit results.xml all -- uname -a",
    ),
    {"sync": "copy DIR to ~/work in each guest, and run the command there"},
  ),
  "pull": Command(
    "OS [VERSION]", 1, 2,
    ("platform", "release", "qemu_release", "refresh", "verify", "mirror", "qemu", *SET_UP,
     *SET_UP_ONLY, "progress"),
    "Download everything that `run` needs, so that `run` works offline.",
    (
      "qvm pull freebsd 15.1",
      "qvm pull --platform arm64 openbsd latest",
      "qvm pull --refresh netbsd 10.1",
      "qvm pull --verify freebsd 15.1",
      "qvm pull --install 'git cmake' freebsd 15.1",
      "qvm pull --mirror /srv/qvm freebsd 15.1",
      "qvm pull --release v0.14.0 --qemu-release v2.0.0 freebsd 15.1",
    ),
    {"env": "set a variable for the scripts, without VALUE to its value\nhere; may be repeated"},
  ),
  "search": Command(
    "[OS]", 0, 1, ("json",),
    "List the available versions by CPU, with the release that each comes from.",
    ("qvm search", "qvm search --json openbsd"),
  ),
  "list": Command(
    "", 0, 0, ("json",),
    "List the instances with their state, address and size, the layers, and what is cached.",
    ("qvm list", "qvm list --json"),
  ),
  "ssh": Command(
    "NAME [-- COMMAND [ARG...]]", 1, 1, ("boot_timeout", *IN_GUEST),
    "Run a command in a running instance, or open a shell.",
    ("qvm ssh build", "qvm ssh build -- uname -a", "qvm ssh --sync . build -- make"),
    {"boot_timeout": "how long to wait for ssh (default: 600)"},
  ),
  "stop": Command(
    "NAME...", 1, 1000, ("force", "boot_timeout"),
    "Power off instances: over ssh, else with SIGTERM, else with SIGKILL.",
    ("qvm stop freebsd-15.1-x86-64", "qvm stop --force build test"),
    {"boot_timeout": "how long to try to log in before SIGTERM (default: 600)"},
  ),
  "restart": Command(
    "NAME...", 1, 1000, ("force", "boot_timeout"),
    "Reboot the guests of running instances and wait until ssh answers again.",
    ("qvm restart web", "qvm restart --force web"),
    {"force": "end QEMU of a guest that does not reboot, and start it again",
     "boot_timeout": "how long to wait for ssh (default: 600)"},
  ),
  "logs": Command(
    "NAME", 1, 1, ("follow",),
    "Print the console of an instance that runs, or ran, in the background.",
    ("qvm logs web", "qvm logs -f web"),
  ),
  "clone": Command(
    "NAME NEW", 2, 2, (),
    "Copy a stopped instance, with all that its guest wrote, to a new one.",
    ("qvm clone build build2",),
  ),
  "rm": Command(
    "NAME...", 1, 1000, ("force",),
    "Delete instances, with everything their guests wrote, and layers.",
    ("qvm rm freebsd-15.1-x86-64", "qvm rm --force build test"),
    {"force": "delete running instances too, without shutting their guests down"},
  ),
  "clean": Command(
    "", 0, 0, ("all", "dry_run"),
    "Delete what interrupted runs left, and layers unused for 30 days; never an instance.",
    ("qvm clean", "qvm clean --all --dry-run"),
    {"dry_run": "print what would be deleted; delete nothing"},
  ),
  "doctor": Command(
    "", 0, 0, ("offline", "json"),
    "Report what this host can and cannot do, with a fix for each problem.",
    ("qvm doctor", "qvm doctor --offline --json"),
  ),
  "config": Command(
    "print-path", 1, 1, (),
    "Print the path of the folder in which qvm keeps everything.",
    ("qvm config print-path", 'du -sh "$(qvm config print-path)"'),
  ),
  "completion": Command(
    "bash|zsh|fish", 1, 1, (),
    "Print a shell's completion script.",
    ('eval "$(qvm completion bash)"', "qvm completion fish | source"),
  ),
}  # fmt: skip


def known_options(command: str) -> List[Option]:
  """The options that a command accepts; for an empty name, those that need no command."""
  fields = EVERYWHERE + (COMMANDS[command].fields if command else ())
  return [option for option in OPTIONS if option.field in fields]


def parse_command_line(words: Sequence[str]) -> Options:
  """Parse the arguments; options and operands may come in any order."""
  operands, given, rest = split_words(words)
  fields = {option.field for option, _ in given}
  form = COMMANDS.get(operands[0]) if operands else None
  for_guest = form and "COMMAND" in form.operands and len(operands) > form.least
  if operands == ["each"] and rest[1:]:
    raise UsageError("no guests before --; usage: qvm each " + COMMANDS["each"].operands)
  if not for_guest:
    operands += rest[1:]
  elif rest == ["--"]:
    raise UsageError("no command after --")
  command = operands[0] if operands else ""
  if command == "help" and len(operands) <= 2:  # what many type first
    return parse_command_line([*operands[1:], "--help"])
  if command and command not in COMMANDS:
    raise unknown(f"command '{command}'", command, COMMANDS)
  if not command and not fields & set(EVERYWHERE):
    raise UsageError(f"no command given; choose from {', '.join(COMMANDS)} (see qvm --help)")
  known = [option.field for option in known_options(command)]
  for option, _ in given:
    if option.field not in known:
      raise unknown_option(option.flags[0], operands)
  if not fields & set(EVERYWHERE):
    check_operands(command, operands[1:])
  values: Dict[str, Any] = {"guest_command": tuple(rest[1:]) if for_guest else ()}
  for option, text in given:
    value = option.read(text) if option.metavar else True
    values[option.field] = values.get(option.field, ()) + (value,) if option.many else value
  if command in ("run", "pull") and "+" in "".join(operands[2:]):
    whole = operands[2]
    operands[2], _, tag = whole.partition("+")
    if values.setdefault("release", tag) != tag:
      raise UsageError(f"--release {values['release']} and {whole} name two releases")
  options = Options(command, tuple(operands[1:]), **values)
  check_together(options, fields)
  return options


# The options for which a machine has to be started again to change them.
STARTED_WITH = (
  "memory", "cpus", "accel", "qemu", "qemu_args", "qemu_release", "console_log", "no_network",
  "image", "display",
)  # fmt: skip


def words_of(options: Options, fields: Sequence[str]) -> List[str]:
  """The words of the command line that give the options of these fields, unless by default."""
  words: List[str] = []
  usual = Options()
  for option in [each for each in OPTIONS if each.field in fields]:
    value, default = (getattr(it, option.field) for it in (options, usual))
    values = () if value == default else value if option.many else (value,)
    words += [option.flags[-1] + f"={each}" * bool(option.metavar) for each in values]
  return words


def check_together(options: Options, fields: Set[str]) -> None:
  """Refuse options that need, or exclude, another option or a command."""
  if options.detach and options.guest_command:
    raise UsageError(
      "--detach cannot be combined with a command; use qvm ssh NAME -- COMMAND once it runs"
    )
  taken = [(options.ssh.port, "tcp")] if options.ssh.chosen else []
  for forward in options.publish:
    if (forward.port, forward.kind) in taken:
      raise UsageError(f"--publish {forward}: port {forward.port} is used twice")
    taken += [(forward.port, forward.kind)] if forward.port else []
  if options.warm and not options.rm and options.command == "run":
    raise UsageError("--warm needs --rm: an instance started from a checkpoint is temporary")
  if options.image and len(options.operands) > 1:
    raise UsageError("--image takes the place of a VERSION: qvm run --image FILE OS")
  if options.image and options.release:
    raise UsageError("--image and --release exclude each other")
  if options.refresh and (options.release or options.qemu_release):
    raise UsageError("--refresh gets the newest release: it excludes --release and --qemu-release")
  if options.warm and options.disk:
    raise UsageError("--disk cannot be combined with --warm: a checkpoint has no second disk")
  for_set_up = SET_UP + (SET_UP_ONLY if options.command == "pull" else ())
  bare_run = options.command == "run" and not options.guest_command
  for option in [each for each in OPTIONS if each.field in fields]:
    flag = option.flags[-1]
    if option.field in for_set_up and not options.sets_up:
      raise UsageError(f"{flag} needs --prepare SCRIPT or --install 'PKG...'")
    for_scripts = option.field == "env" and options.sets_up
    if bare_run and option.field in IN_GUEST and not for_scripts:
      raise UsageError(f"{flag} needs a command: qvm run {flag} … OS VERSION -- COMMAND")
    if option.field.startswith("sync_") and not options.sync:
      raise UsageError(f"{flag} needs --sync DIR")
  if options.command == "each" and not options.guest_command and not fields & set(EVERYWHERE):
    raise UsageError("each needs a command: qvm each GUEST... -- COMMAND")
  if options.mirror and (options.sets_up or options.verify or options.qemu):
    raise UsageError("--mirror only fills DIR: it excludes --prepare, --install, --verify, --qemu")
  if options.sync_delete and options.sync_direction == "in":
    raise UsageError("--sync-delete has no effect with --sync-direction in")


def split_words(words: Sequence[str]) -> Tuple[List[str], List[Tuple[Option, str]], List[str]]:
  """Split the arguments into operands, options with values, and everything from the first `--`."""
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
      raise unknown_option(flag, operands)
    if not option.metavar and (equals or value):
      raise UsageError(f"{flag} takes no value (in '{word}')")
    if option.metavar and not equals and not value:
      if not rest:
        raise UsageError(f"{flag} needs a value: {flag} {option.metavar}")
      value = rest.pop(0)
    if option.metavar in ("PATH", "FILE", "DIR", "SCRIPT") and not value:
      raise UsageError(f"{flag} needs a value: {flag} {option.metavar}")
    given.append((option._replace(flags=(flag,)), value))  # the one that was typed
  return operands, given, rest


def unknown_option(flag: str, operands: Sequence[str]) -> UsageError:
  """The error for an option that the command does not accept, or for what is wrong before it."""
  command = operands[0] if operands and operands[0] != "help" else ""
  if command and command not in COMMANDS:
    return unknown(f"command '{command}'", command, COMMANDS)
  if command and len(operands) > COMMANDS[command].most + 1:
    check_operands(command, operands[1:])  # what is missing is a `--` before them
  where = "for qvm " + command if command else "without a command"
  flags = [f for option in known_options(command) for f in option.flags]
  return unknown(f"option {flag} {where}", flag, flags)


def check_operands(command: str, operands: Sequence[str]) -> None:
  """Check the number and the form of the operands after the command."""
  form = COMMANDS[command]
  usage = f"qvm {command} {form.operands}"
  if len(operands) < form.least:
    names = f" (OS: {', '.join(OS_NAMES)})" if "OS" in form.operands else ""
    raise UsageError(f"missing argument; usage: {usage}{names}")
  words = command == "completion" and operands[:1] == ["words"]  # which are to be completed
  if len(operands) > form.most and not words:
    raise UsageError(f"unexpected argument '{operands[form.most]}'; usage: {usage.strip()}")
  if command in ("run", "pull", "search") and operands:
    find_os(operands[0])
    for version in operands[1:]:
      parse_version(version)
  if form.operands.startswith("NAME"):
    for name in operands:
      parse_name(name)
  for name in operands if command == "each" else ():
    parse_guest(name)
  if command == "config" and operands[0] != "print-path":
    raise UsageError(f"unknown argument '{operands[0]}'; qvm config has only print-path")
  if command == "completion" and operands[0] not in ("bash", "zsh", "fish", "words"):
    raise unknown(f"shell '{operands[0]}'", operands[0], ("bash", "zsh", "fish"))


def find_os(text: str) -> str:
  """The name of an OS, which may be written in any case."""
  if text.lower() not in OS_NAMES:
    raise unknown(f"OS '{text}'", text, OS_NAMES)
  return text.lower()


ALL = "all"


def parse_guest(text: str) -> Tuple[str, str, str]:
  """OS[-VERSION][-ARCH], as in the images' names, or `all`; what is left out is empty."""
  arches = "|".join(map(re.escape, ARCHES))
  match = re.match(rf"([^-]*)(?:-(.+?))??(?:-({arches}))?\Z", text, re.IGNORECASE)
  if not match:
    raise UsageError(f"invalid guest '{text}': use OS[-VERSION][-ARCH], as in openbsd-7.9-arm64")
  os_name, version, arch = (part or "" for part in match.groups())
  if version and not re.search(r"[0-9]", parse_version(version)) and version.lower() != "latest":
    raise UsageError(f"'{version}' in '{text}' is neither a version nor one of x86-64 and arm64")
  if text.lower() == ALL:
    return ALL, "", ""
  if re.match(r"r?[0-9.]+\Z", text):
    raise UsageError(f"'{text}' names no OS: use OS-VERSION, as in freebsd-15.1")
  if arch:
    arch = find_guest(find_os(os_name), parse_arch(arch)).arch
  return find_os(os_name), parse_version(version) if version else "", arch


EACH_HELP = [
  "GUEST is OS[-VERSION][-ARCH], as in freebsd, freebsd-15 or openbsd-7.9-arm64, or `all`: the",
  "newest of every OS for this host's CPU.",
  "OS is one of {}.".format(", ".join(OS_NAMES)),
  "",
  "Each guest runs COMMAND as `qvm run --rm` does, without input. A terminal shows what each does;",
  "elsewhere each line of output has the guest's name before it. The exit code is 0 if all went",
  "well, 1 if a command failed, 125 if a machine could not be run, and 130 after Ctrl-C.",
]

ENVIRONMENT = (
  ("QVM_CACHE_DIR", "the folder of everything (default: $XDG_CACHE_HOME/qvm or ~/.cache/qvm)"),
  ("QVM_RELEASES_URL", "a mirror to download from (default: GitHub)"),
  ("QVM_API_URL", "the API of that mirror; without it a mirror is asked for none"),
  ("QVM_QEMU_X86_64, QVM_QEMU_AARCH64", "as --qemu, for all guests of that CPU"),
  ("GITHUB_TOKEN, GH_TOKEN", "sent to the API's address only; raises its quota"),
  ("https_proxy, no_proxy, SSL_CERT_FILE", "as everywhere"),
  ("QVM_TIMEOUT", "seconds for a connection and for the next bytes to come (default: 30)"),
  ("QVM_RETRY_DELAY", "seconds before the first of four retries (default: 1)"),
  ("QVM_DEBUG", "1: show the traceback of a bug"),
)

CONSOLE_HELP = [
  "",
  "Without a command this terminal is the guest's console: every key goes to the guest, but",
  "Ctrl-A x ends the machine at once, and Ctrl-A h shows help. The exit code is QEMU's, 128+N",
  "after signal N, 1 if qvm failed, and 2 for a wrong command line.",
]
COMMAND_HELP = [
  "",
  "qvm passes COMMAND and its ARGs to the guest unchanged, whatever characters they contain. A",
  "single word is run by the guest user's shell: -- 'cd /tmp && make'. Stdin, stdout, stderr and",
  "the exit code are passed through; 125 means that qvm itself failed. On a terminal the command",
  "gets a terminal too, and Enter ~. disconnects. Otherwise the first Ctrl-C interrupts the",
  "command and the second one ends qvm; with `run` that ends the machine too.",
]


def about(command: str) -> List[str]:
  """What --help and the manual page say of a command, but for its options and examples."""
  form, lines = COMMANDS[command], [COMMANDS[command].summary]
  if "OS" in form.operands:
    lines += ["OS is one of {}.".format(", ".join(OS_NAMES))]
  if "VERSION" in form.operands:
    lines += [
      "VERSION defaults to `latest`, the newest version for that CPU; 15 is the newest 15.x."
    ]
  if command == "run":
    lines += CONSOLE_HELP
  if "COMMAND" in form.operands:
    lines += EACH_HELP if "GUEST" in form.operands else COMMAND_HELP
  return lines


def help_text(command: str) -> str:
  """The output of --help, for one command or, for an empty name, for all."""
  if command:
    usage = f"usage: qvm {command} [OPTIONS] {COMMANDS[command].operands}".rstrip()
    lines = [usage, "", *about(command)]
  else:
    titles = list(dict.fromkeys(guest.title for guest in GUESTS))
    lines = ["usage: qvm COMMAND [OPTIONS] ...", ""]
    lines += ["Run {} and {} in QEMU.".format(", ".join(titles[:-1]), titles[-1])]
    lines += ["", "commands:"]
    lines += [f"  {name:<10} {form.summary}" for name, form in COMMANDS.items()]
  lines += ["", "options:"]
  own_help = COMMANDS[command].option_help if command else {}
  for option in known_options(command):
    left = "{} {}".format(", ".join(option.flags), option.metavar)
    for text in own_help.get(option.field, option.help).split("\n"):
      lines.append(f"  {left:<26} {text}")
      left = ""
  examples = COMMANDS[command].examples if command else (
    "qvm run freebsd 15.1", "qvm run --rm netbsd 10.1", "qvm run --help")  # fmt: skip
  if not command:
    lines += ["", "environment:"]
    for names, text in ENVIRONMENT:
      lines += [f"  {names}", f"      {text}"]
  return "\n".join(lines + ["", "examples:"] + ["  " + example for example in examples])


# ---- Plan ---------------------------------------------------------------------------------------

RELEASES_URL = "https://github.com/cross-platform-actions"
API_URL = "https://api.github.com/repos/cross-platform-actions"


class Host(NamedTuple):
  """The machine qvm runs on."""

  system: str  # as in the names of the QEMU archives: linux or macos
  arch: str


class InstancePaths:
  """The paths of one instance's files, which are all in one folder and named after it."""

  # All of them. The mark is removed last, so that a killed removal is repeated; the second disk
  # before the first, by which `rm` knows an instance.
  SUFFIXES = (
    ".data", ".qcow2", ".json", ".console.log", ".known_hosts", ".known_hosts.old", ".keys",
    ".ephemeral",
  )  # fmt: skip

  def __init__(self, cache: "Cache", name: str) -> None:
    self.cache, self.name = cache, name
    self.stem = os.path.join(cache.instances, name)
    self.disk = self.stem + ".qcow2"
    self.data = self.stem + ".data"  # the second disk, qcow2, of an instance that has one
    self.record = self.stem + ".json"
    self.lock = self.stem + ".lock"
    self.console = self.stem + ".console.log"
    self.known_hosts = self.stem + ".known_hosts"  # of this guest, kept apart from the user's
    self.key_disk = self.stem + ".keys"  # from which some guests take the key that may log in
    self.mark = self.stem + ".ephemeral"  # empty; says: delete this once it does not run


class LayerPaths:
  """The paths of one layer: a frozen disk, and for a checkpoint the memory and device state."""

  def __init__(self, folder: str, name: str) -> None:
    self.name = name
    self.record = os.path.join(folder, name + ".json")
    self.disk = os.path.join(folder, name + ".qcow2")
    self.memory = os.path.join(folder, name + ".memory")
    self.state = os.path.join(folder, name + ".state")

  @property
  def parts(self) -> Tuple[str, ...]:
    """The files of a checkpoint, but for its record."""
    return self.disk, self.memory, self.state


class AssetRecord(NamedTuple):
  """What NAME.json beside a cached file says about it; empty where unknown."""

  release: str = ""  # the tag
  url: str = ""
  validator: str = ""  # ETag or Last-Modified of the download
  size: int = 0  # bytes of the asset
  asset_sha256: str = ""
  sha256: str = ""  # of the file or tree made from the asset
  bytes: int = 0  # the file's length, or that of all files of a tree
  mtime_ns: int = 0  # the file's: a file with another one is hashed again
  time: str = ""  # of the download, in UTC


class Instance(NamedTuple):
  """What NAME.json says about an instance; ssh is where it listens while it runs.

  release is where its base image can be had again. While that is incomplete, the validator
  identifies it. A problem means that the instance must not be started, and says why.
  """

  name: str = ""
  os: str = ""
  version: str = ""
  arch: str = ""
  base_sha256: str = ""
  ssh: str = ""
  release: str = ""
  validator: str = ""
  asset_sha256: str = ""  # of the asset that the base image was made of
  problem: str = ""
  publish: str = ""  # the ports that its runs publish, as given
  ports: str = ""  # those that this run publishes
  words: str = ""  # the options that this run was started with, each ended by a zero byte
  image: str = ""  # the path of the user's own base image, identified by the validator


class LayerRecord(NamedTuple):
  """What NAME.json says about a layer; a problem means there is none, and says why."""

  name: str = ""
  os: str = ""
  version: str = ""
  arch: str = ""
  base_sha256: str = ""
  key: str = ""  # a digest of everything it depends on
  accelerator: str = ""  # the one in use when it was created
  parts: str = ""  # size and modification time of each file
  problem: str = ""
  failures: int = 0  # in a row, to go on from a checkpoint just made
  layer: str = ""  # of a checkpoint: the prepared disk of which it is, if any
  bytes: int = 0  # of a prepared disk: its length
  script: str = ""  # the first that set it up, as the list shows it
  time: str = ""  # when it was made, in UTC; its last use is the time of the record's file


LAYER_RE = r"(.+-(?:prepared|warm)-[0-9a-f]{10})\.qcow2\Z"


def pinned_name(name: str, tag: str) -> str:
  """The name of something of just this release, beside the newest; so are versions named, too."""
  return f"{name}+{tag}" if tag else name


class Cache:
  """The cache folder, where qvm keeps everything, and the paths in it."""

  def __init__(self, root: str) -> None:
    self.root = root
    self.instances = self.path("instances")
    self.downloads = self.path("downloads")  # everything unfinished; unlocked it is a leftover
    self.qemu_img = self.path("bin", "qemu-img")
    self.ssh_key = self.path("ssh", "id_ed25519")  # for images that want one; beside it .pub

  def path(self, *names: str) -> str:
    return os.path.join(self.root, *names)

  def base(self, stem: str) -> str:
    return self.path("base", stem + ".qcow2")

  def qemu_tree(self, cpu: str, tag: str = "") -> str:
    """The downloaded QEMU for a guest CPU, which is spelled as in QEMU_CPUS' values.

    With a tag, that of --qemu-release.
    """
    return self.path("qemu", pinned_name(cpu, tag))

  def qemu_program(self, cpu: str, tag: str = "") -> str:
    return os.path.join(self.qemu_tree(cpu, tag), "bin", "qemu-system-" + cpu)

  def instance(self, name: str) -> InstancePaths:
    return InstancePaths(self, name)

  def layer(self, name: str) -> LayerPaths:
    return LayerPaths(self.path("layers"), name)


class Plan(NamedTuple):
  """Everything a run or a pull uses, by name and path."""

  guest: Guest
  version: str
  paths: InstancePaths
  ephemeral: bool
  cache: Cache
  qemu: str  # the program that will run
  share: str  # the firmware of the downloaded QEMU
  qemu_img: str
  base: str
  image_asset: str
  bundle_asset: str
  qemu_asset: str
  tools_asset: str
  own_qemu: bool  # --qemu: qemu-img is the user's own too
  own_image: bool  # --image: the base is a file of the user's own
  release: str  # the only one that the image may come from; empty: any
  qemu_release: str  # the same for QEMU and qemu-img
  refresh: bool  # replace cached files with the newest release
  damaged: Tuple[str, ...] = ()  # cached files to download again

  @property
  def name(self) -> str:
    return self.paths.name

  @property
  def tree_program(self) -> str:
    """The downloaded QEMU's program, even if --qemu names another one to run."""
    return self.cache.qemu_program(QEMU_CPUS[self.guest.arch], self.qemu_release)


def check_host(host: Host, guest: Guest, own_qemu: str) -> None:
  """Refuse a host for which no QEMU can be downloaded, unless the user names one.

  One whose name shows that it emulates another CPU is refused, too.
  """
  cpu = QEMU_CPUS[guest.arch]
  if os.path.basename(own_qemu) in [f"qemu-system-{it}" for it in QEMU_CPUS.values() if it != cpu]:
    raise UsageError(f"--qemu {own_qemu}: {guest.arch} guests need qemu-system-{cpu}")
  if not own_qemu and host == Host("linux", "arm64"):
    raise QvmError(
      "no QEMU can be downloaded for Linux on arm64",
      "install QEMU (Debian: apt-get install qemu-system-{} qemu-utils) and add "
      "--qemu /usr/bin/qemu-system-{}".format({"x86_64": "x86", "aarch64": "arm"}[cpu], cpu),
    )


def image_repo(os_name: str) -> str:
  """The repository whose releases contain the images of an OS."""
  return os_name + "-builder"


def make_plan(options: Options, host: Host, cache: Cache, suffix: str) -> Plan:
  """Name everything that a run needs; suffix makes the name of a --rm instance unique."""
  guest = find_guest(options.operands[0].lower(), options.platform or host.arch)
  named, tag, pin = parse_version(options.operands[1]), options.release, options.qemu_release
  version = pinned_name(named, tag)
  check_host(host, guest, options.qemu)
  stem = f"{guest.os}-{version}-{guest.arch}"
  asset = f"{guest.os}-{named}-{guest.arch}"
  name = options.name or (stem + "-rm-" + suffix if options.rm else stem)
  cpu = QEMU_CPUS[guest.arch]
  return Plan(
    guest=guest,
    version=version,
    paths=cache.instance(name),
    ephemeral=options.rm,
    cache=cache,
    qemu=options.qemu or cache.qemu_program(cpu, pin),
    share=os.path.join(cache.qemu_tree(cpu, pin), "share", "qemu"),
    qemu_img=pinned_name(cache.qemu_img, pin),
    base=options.image or cache.base(stem),
    image_asset=asset + ".qcow2",
    bundle_asset=asset + ".tar.zst",
    qemu_asset=f"qemu-system-{cpu}-{host.system}.tar",
    tools_asset=f"resources-{host.system}.tar",
    own_qemu=bool(options.qemu),
    own_image=bool(options.image),
    release=tag,
    qemu_release=pin,
    refresh=options.refresh,
  )


# ---- Files, locks, programs ---------------------------------------------------------------------

# For one read or write: more would save few system calls and cost memory in each thread.
CHUNK_BYTES = 1 << 18
# From SIGTERM to SIGKILL. QEMU normally exits at once, so only a hung one makes anyone wait.
TERM_GRACE_SECONDS = 10.0
# The longest uninterrupted wait for a thread: a signal that arrives just before the wait does not
# end it. Under load, 2 of 8 such signals were lost in one endless wait.
POLL_SECONDS = 0.5
# Of the messages of QEMU, ssh and others: they explain a failure in a few lines at the end.
TAIL_BYTES = 8192
OTHER_CACHE = "set QVM_CACHE_DIR to another folder"
FORMAT = 1  # of records; those of qvm 0.1 have no format field
MAX_RECORD_BYTES = 1 << 20  # records are below 1 kB; this bounds a damaged one
SCRATCH = "tmp-"  # prefix of the folders for unfinished files in downloads/
COPIED = ".tmp"  # suffix of a file on its way to another file system
R = TypeVar("R", bound=NamedTuple)
T = TypeVar("T")
Handle = Union[int, IO[bytes], None]


def absolute(path: str, name: str) -> str:
  """A path of the user's, without ~ and relative parts; name is the option or variable."""
  try:
    return os.path.abspath(os.path.expanduser(path))
  except FileNotFoundError:
    raise UsageError(f"{name}: '{path}' is relative, and the current folder has been deleted")


def cache_from(environ: Mapping[str, str]) -> Cache:
  """The cache that the environment names; the XDG spec says to ignore a relative XDG_CACHE_HOME."""
  if environ.get("QVM_CACHE_DIR"):
    return Cache(absolute(environ["QVM_CACHE_DIR"], "QVM_CACHE_DIR"))
  xdg, home = environ.get("XDG_CACHE_HOME", ""), environ.get("HOME", "")
  with contextlib.suppress(KeyError):
    home = home or pwd.getpwuid(os.getuid()).pw_dir
  if xdg.startswith("~/"):  # from a file that no shell reads
    xdg = absolute(xdg, "XDG_CACHE_HOME")
  if not os.path.isabs(xdg) and home in ("", "~"):
    raise QvmError("this user has no home folder", "set QVM_CACHE_DIR to a folder for qvm")
  folder = xdg if os.path.isabs(xdg) else home + "/.cache"
  return Cache(absolute(os.path.join(folder, "qvm"), "HOME"))


def parse_json(data: bytes) -> Any:
  """A value from JSON in UTF-8; ValueError or RecursionError when it is none."""
  return json.loads(data.decode("utf-8"), parse_int=short_int)


def short_int(text: str) -> int:
  """A number of a sensible length: before 3.10.7 Python takes minutes for a million digits."""
  if len(text) > 30:
    raise ValueError("a number without end")
  return int(text)


def sound_record(empty: R, path: str) -> R:
  """Read a record with the fields and types of `empty` from a JSON file.

  A missing field keeps its value from `empty`. A file that is missing or damaged, as by a field of
  another type, gives `empty`; QvmError if its format is newer than FORMAT.
  """
  try:
    with open(path, "rb") as file:
      value = parse_json(file.read(MAX_RECORD_BYTES))
  except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
    return empty
  if not isinstance(value, dict):
    return empty
  check_format(path, value.get("format", FORMAT), FORMAT)
  record = empty._replace(**{name: value.get(name, it) for name, it in empty._asdict().items()})
  return record if [*map(type, record)] == [*map(type, empty)] else empty


def known_record(empty: R, path: str) -> R:
  """The same, but `empty` also for a record that may not be read, or is a newer qvm's."""
  with contextlib.suppress(QvmError, OSError):
    return sound_record(empty, path)
  return empty


def check_format(path: str, number: object, known: int) -> None:
  """Refuse a record of a newer qvm."""
  if not isinstance(number, int) or number > known:
    raise QvmError(
      f"the record {path} has format {number}, which this qvm does not know",
      f"a newer qvm wrote it: update qvm, or {OTHER_CACHE}",
    )


def write_record(
  cache: Cache, path: str, record: NamedTuple, mode: int = 0o644, keep: bool = False
) -> None:
  """Write a record as JSON, with its format; the file is complete or absent at any time.

  With keep it is on the disk when this returns.
  """
  with unfinished(cache) as folder:
    replace_by_record(path, record, mode, os.path.join(folder, "record"), keep)


def replace_by_record(path: str, record: NamedTuple, mode: int, aside: str, keep: bool) -> None:
  """Write a record aside, and then give it its place in one step."""
  text = json.dumps({**record._asdict(), "format": FORMAT}, indent=2, sort_keys=True)
  with open(aside, "w", encoding="utf-8") as file:
    file.write(text + "\n")
  os.chmod(aside, mode)
  move(aside, path, keep)


@contextlib.contextmanager
def unfinished(cache: Cache, name: str = "", waits: Callable[[], object] = bool) -> Iterator[str]:
  """A folder in downloads/ for unfinished files, locked while it exists, removed at the end.

  With a name it is the only one of that name, see Lock.hold(). Whatever is unlocked in downloads/
  is a leftover of a killed qvm.
  """
  name = SCRATCH + (name or os.urandom(6).hex())
  with Lock(os.path.join(cache.downloads, name), folder=True) as lock:
    lock.hold(waits=waits)
    try:
      yield lock.path
    finally:
      remove_tree(lock.path)


def remove_unlocked(path: str) -> bool:
  """Remove a folder unless its lock is held; returns whether it is gone."""
  with Lock(path, folder=True) as lock:
    if lock.try_():
      remove_tree(path)
    return lock.fd >= 0


def file_sha256(path: str) -> str:
  """The SHA-256 of a file, in hexadecimal."""
  digest = hashlib.sha256()
  with open(path, "rb") as file:
    for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
      digest.update(chunk)
  return digest.hexdigest()


def files_of_tree(root: str) -> List[str]:
  """The paths of a QEMU's files, in the order of their digest; none of its record or the Finder."""
  found = []
  for folder, folders, names in os.walk(root):
    folders.sort()
    own = sorted({*names} - {"release.json", ".DS_Store"})
    found += [os.path.join(folder, name) for name in own]
  return found


def tree_sha256(root: str) -> str:
  """One SHA-256 for the names and contents of all files of a tree."""
  digest = hashlib.sha256()
  for path in files_of_tree(root):
    digest.update(os.fsencode(os.path.relpath(path, root)) + b"\0")
    digest.update(file_sha256(path).encode() if os.path.isfile(path) else b"")
  return digest.hexdigest()


def tree_bytes(root: str) -> int:
  """The bytes in all files of a tree."""
  there = filter(os.path.lexists, files_of_tree(root))  # of one that is just being replaced not all
  return sum(os.lstat(path).st_size for path in there)


def hashed(name: str) -> str:
  """A short name derived from one of any length."""
  return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def temporary_folder(cache: Cache) -> str:
  """The folder for temporary files; in a container without one that of unfinished files."""
  try:
    with signals.hold():  # Python tries the folder by a file, once
      return tempfile.gettempdir()
  except FileNotFoundError:
    return cache.downloads


def names_in(folder: str) -> List[str]:
  """The sorted names in a folder; none if it does not exist."""
  try:
    return sorted(os.listdir(folder))
  except (FileNotFoundError, NotADirectoryError):
    return []


def check_mounted(path: str) -> None:
  """Refuse a link to what is not there: nobody knows what is at its end."""
  if os.path.islink(path) and not os.path.exists(path):
    raise QvmError(
      f"{path} is a link to {os.readlink(path)}, which is not there",
      "is its disk mounted? or delete the link",
    )


def paths_in(folder: str) -> List[str]:
  """The sorted paths in a folder; none if it does not exist."""
  return [os.path.join(folder, name) for name in names_in(folder)]


def stems_in(folder: str, suffix: str) -> List[str]:
  """The names of the files in a folder with this suffix, without it, sorted by file name."""
  return [name[: -len(suffix)] for name in names_in(folder) if name.endswith(suffix)]


def check_spelling(path: str) -> None:
  """Refuse a qcow2's name that this disk takes for another's, as macOS does with web and Web."""
  folder, name = os.path.split(path)
  # There may be none, or another qvm has just removed it.
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    here, stem = os.lstat(path), name[: -len(".qcow2")]
    every = stems_in(folder, ".qcow2")
    if stem in every:
      return
    found = [it for it in every if os.path.samestat(os.lstat(f"{folder}/{it}.qcow2"), here)]
    if found:
      raise QvmError(
        f"this disk takes the names {stem} and {', '.join(found)} for one",
        "use that spelling, or another name",
      )


def instances(cache: Cache, suffix: str = ".qcow2") -> List[InstancePaths]:
  """The instances that have a disk, even if it cannot be read, or another of their files."""
  return [cache.instance(name) for name in stems_in(cache.instances, suffix)]


def layers(cache: Cache) -> List[LayerPaths]:
  """All layers; files without a record are leftovers."""
  return [cache.layer(name) for name in stems_in(cache.path("layers"), ".json")]


def layer_record(layer: LayerPaths) -> LayerRecord:
  """What is noted about a layer; an empty record if there is none, or if it is damaged."""
  return sound_record(LayerRecord(), layer.record)


def tree_size(path: str) -> int:
  """The bytes on disk of a file, or of a folder with its contents."""
  total = os.lstat(path).st_blocks
  for folder, _, names in [] if os.path.islink(path) else os.walk(path):
    for name in names:
      with contextlib.suppress(FileNotFoundError):  # it has just been deleted
        total += os.lstat(os.path.join(folder, name)).st_blocks
  return total * 512


def free_space(folder: str) -> int:
  """The bytes available on a folder's file system."""
  stat = os.statvfs(folder)
  return stat.f_bavail * stat.f_frsize


def write_failure(path: str, wanted: int, error: OSError) -> QvmError:
  """The error for a failed write to a file or folder that needs `wanted` bytes in all."""
  if error.errno not in (errno.ENOSPC, errno.EDQUOT):
    return QvmError(f"{error.filename or path}: {describe(error)}")
  there = tree_size(path) if os.path.lexists(path) else 0
  return disk_full(path, wanted - there - free_space(os.path.dirname(path)))


def disk_full(path: str, missing: int) -> QvmError:
  """The error for a full disk, with the number of bytes that are missing."""
  return QvmError(
    f"the disk is full: {path} needs {megabytes(max(missing, 1))} more",
    "free some space (qvm clean --all --dry-run lists what can be deleted) and try again: "
    "downloaded data is kept",
  )


def disk_is_full(path: str) -> bool:
  """Whether a guest's write there may fail; QEMU then pauses the guest silently (werror=enospc)."""
  with contextlib.suppress(OSError):
    return free_space(path) < GUEST_WRITE_BYTES
  return False


# A write that does not fit leaves free what there was: Linux writes up to 1.25 MiB at once, and
# QEMU's virtio-blk makes one write of up to four of those.
GUEST_WRITE_BYTES = 8 << 20


def remove_file(path: str) -> None:
  """Remove a file if it exists."""
  with contextlib.suppress(FileNotFoundError):
    os.unlink(path)


def remove_tree(path: str) -> None:
  """Remove a folder or file if it exists."""
  if os.path.islink(path) or os.path.isfile(path):
    return remove_file(path)
  if os.path.isdir(path):
    with contextlib.suppress(OSError):
      return os.rmdir(path)  # mostly it is empty; shutil takes 3 ms to load
    try:
      shutil.rmtree(path)
    except OSError as error:  # it names only the last component of the path
      raise OSError(error.errno, error.strerror, path)


def flush(path: str) -> None:
  """Have a file or folder written from the system's memory to the disk; OSError if that fails."""
  fd = os.open(path, os.O_RDONLY)
  try:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync(2) leaves it in the disk's memory
    if full is not None:
      with contextlib.suppress(OSError):  # not every file system has it
        fcntl.fcntl(fd, full)
        return
    os.fsync(fd)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot be told
      raise OSError(error.errno, error.strerror, path)
  finally:
    os.close(fd)


def flush_tree(root: str) -> None:
  """flush() for a folder and everything in it."""
  for folder, _, names in os.walk(root):
    for path in [*(os.path.join(folder, name) for name in names), folder]:
      if not os.path.islink(path):
        flush(path)


def copy_sparse(source: str, target: str) -> None:
  """Copy a file; blocks of zeros become holes."""
  with open(source, "rb") as file, open(target, "wb") as copy:
    for block in iter(lambda: file.read(1 << 16), b""):
      if block.strip(b"\0"):
        copy.write(block)
      else:
        copy.seek(len(block), os.SEEK_CUR)
    copy.truncate()


def move(source: str, target: str, keep: bool) -> None:
  """Rename a file; with keep its contents are on the disk before its name, and then the name is.

  A folder of the cache may be a link to another file system: then through a copy beside the target.
  """
  if keep:
    flush(source)
  try:
    os.replace(source, target)
  except OSError as error:
    if error.errno != errno.EXDEV:
      raise
    remove_file(target + COPIED)  # a killed qvm's may be read-only
    with contextlib.ExitStack() as unless_moved:
      unless_moved.callback(remove_file, target + COPIED)  # as where the disk is full
      copy_sparse(source, target + COPIED)
      shutil.copystat(source, target + COPIED)
      flush(target + COPIED)
      os.replace(target + COPIED, target)
      unless_moved.pop_all()
    os.unlink(source)
  if keep:
    flush(os.path.dirname(target))


def move_into_place(source: str, target: str, mode: int) -> None:
  """Publish a file: its name never appears before its contents, even after a power failure."""
  os.chmod(source, mode)
  move(source, target, True)


FOLDERS = (
  "base", "bin", "qemu", "instances", "layers", "downloads", "ssh", "code", "accelerators",
)  # fmt: skip


def make_folders(cache: Cache) -> None:
  """Create the cache and its folders, accessible to this user only; check_folders() comes first."""
  path = cache.root
  try:
    if make_folder(path) and sys.platform == "darwin":
      ask_program(["/usr/bin/tmutil", "addexclusion", path])  # Time Machine backs up ~/.cache
    for path in map(cache.path, FOLDERS):
      make_folder(path)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise QvmError(f"cannot create {error.filename or path}: {describe(error)}", owner_fix(path))
  if not locks_work(cache.root):
    say(f"{cache.root}: locks do not work on its file system: run one qvm at a time, {NFS_FIX}")
  adopt_older(cache)
  keep_code()


def make_folder(path: str) -> bool:
  """Create a folder, with those above it, for this user only; False if something is there."""
  if not os.path.isdir(os.path.dirname(path)):
    make_folder(os.path.dirname(path))
  with contextlib.suppress(FileExistsError):
    os.mkdir(path, 0o700)  # which no umask widens
    return True
  return False


def nearest(path: str) -> str:
  """The path, or what there is above it."""
  while not os.path.exists(path) and os.path.dirname(path) != path:
    path = os.path.dirname(path)
  return path


NFS_FIX = f"or {OTHER_CACHE}, on a local disk"


def owner_fix(path: str) -> str:
  """What to do about a folder of the cache that cannot be made: such as one made with sudo."""
  path = nearest(path)
  with contextlib.suppress(OSError):
    if os.stat(path).st_uid != os.getuid() and not os.access(path, os.W_OK):
      return f"if it is to be yours: sudo chown -R $(id -u) {path}; or {OTHER_CACHE}"
  return OTHER_CACHE


def locks_work(folder: str) -> bool:
  """Whether flock keeps others out: some network file systems let everybody in."""
  fds = [os.open(folder, os.O_RDONLY) for _ in range(2)]
  try:
    for fd in fds:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return False
  except OSError:  # locked by us or by another qvm; what knows no locks at all is another matter
    return True
  finally:
    for fd in fds:
      os.close(fd)


def older_downloads(cache: Cache) -> List[str]:
  """The flat files that qvm 0.1 left in downloads/, but for those that one works on."""
  found = []
  for path in paths_in(cache.downloads):
    stem = re.match(r"(.+\.(?:qcow2|tar|tar\.zst))\.(?:part|json|map|lock|tmp|json\.tmp)\Z", path)
    if stem and not Lock(re.sub(r"\.tar\.zst\Z", ".qcow2", stem.group(1)) + ".lock").is_held():
      found.append(path)
  return found


def adopt_older(cache: Cache) -> None:
  """Rename what qvm 0.1 called warm/, and remove its unfinished downloads: none can be resumed."""
  with contextlib.suppress(OSError):  # there is no warm/, or layers/ has contents
    os.rename(cache.path("warm"), cache.path("layers"))
  if older_downloads(cache):
    with Lock(cache.downloads, folder=True) as idle:
      if idle.try_():  # a qvm 0.1 at work has it too
        for path in older_downloads(cache):
          remove_tree(path)
        say(f"removed the unfinished downloads of an older qvm in {cache.downloads}")


def check_folders(cache: Cache) -> None:
  """Refuse a cache that others can change or replace, or that is not all there.

  It is the one check for all commands: qvm executes what is in the cache, and believes its records.
  """
  for path in (cache.root, *map(cache.path, FOLDERS)):
    if os.path.lexists(path) and not os.path.isdir(path):  # another qvm may make it meanwhile
      check_mounted(path)
      raise QvmError(f"{path} exists but is not a folder", OTHER_CACHE)
  for end in dict.fromkeys((cache.root, os.path.realpath(cache.root))):
    check_above(end)
  if not os.path.isdir(cache.root):
    return
  root = os.stat(cache.root)
  if root.st_uid not in (0, os.getuid()):  # root can change everything anyway
    raise foreign(cache.root, root.st_uid)
  # Folders in it may be another's: they come from a copy made by root.
  inside = map(cache.path, FOLDERS) if root.st_mode & 0o011 else ()  # else only its owner gets in
  for path in (cache.root, *inside):
    if os.path.isdir(path) and os.stat(path).st_mode & 0o022:
      raise QvmError(
        f"{path} is writable by other users, and qvm executes what is in it",
        f"chmod go-w {path}; or {OTHER_CACHE}",
      )


def check_above(path: str) -> None:
  """Refuse a path where others can rename what it leads through, as ssh does.

  In a folder with the sticky bit, such as /tmp, they cannot, but could have come first. Below a
  folder that only this user can enter nothing is looked at.
  """
  mine, shared = (0, os.getuid()), False
  names = path.split("/")
  for count in range(1, len(names)):
    above = "/".join(names[:count]) or "/"
    try:
      stat = os.stat(above)
    except OSError:
      return  # what is not there is made for this user only
    if not S_ISDIR(stat.st_mode):
      return
    if shared and stat.st_uid not in mine:
      raise foreign(above, stat.st_uid)
    shared = others_can_write(stat)
    if shared and not stat.st_mode & S_ISVTX:
      raise QvmError(
        f"{above} is writable by other users, who could replace what is in it",
        f"chmod go-w {above}; or {OTHER_CACHE}",
      )
    if stat.st_uid in mine and not stat.st_mode & 0o011:
      return


def others_can_write(stat: os.stat_result) -> bool:
  """Whether a folder's mode lets others than root and this user write.

  Where each user has a group of their own, the umask often lets that group write.
  """
  if stat.st_mode & 0o022 != 0o020 or not stat.st_gid:
    return bool(stat.st_mode & 0o002)
  try:
    group, user = grp.getgrgid(stat.st_gid), pwd.getpwuid(os.getuid())
  except KeyError:
    return True
  return group.gr_name != user.pw_name or bool(set(group.gr_mem) - {user.pw_name})


def foreign(path: str, uid: int) -> QvmError:
  """The error for a folder of another user."""
  return QvmError(
    f"{path} belongs to another user (uid {uid}), and qvm executes what is in it",
    f"if you trust it: sudo chown -R $(id -u) {path}; or {OTHER_CACHE}",
  )


packed_code: Tuple[str, Any] = ("", None)  # set by qvm.pyz: a path for its compiled code, the code


def keep_code() -> None:
  """Save the compiled code of qvm.pyz: compiling takes 90 ms at each start without it."""
  path, code = packed_code
  if path and not os.path.exists(path):
    with contextlib.suppress(OSError):  # the next start is slower, and that is all
      with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(marshal.dumps(code))
      os.replace(file.name, path)


@functools.lru_cache(None)
def boot_id() -> str:
  """What tells this boot of the host from others; empty if the system does not say."""
  with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
    return file.read().strip()
  code, output = ask_program(["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"])
  return "" if code else output


class Lock:
  """An flock on a file or folder, held until the last process that has its descriptor ends.

  A holder may delete the file or folder, so a new lock counts only if the path still names it.
  """

  def __init__(self, path: str, folder: bool = False) -> None:
    self.path, self.folder = path, folder
    self.fd = -1  # while it is not held

  def try_(self, shared: bool = False) -> bool:
    """Take the lock unless another process holds it; returns whether it was taken."""
    return self._take(shared, fcntl.LOCK_NB)

  def hold(self, shared: bool = False, waits: Callable[[], object] = bool) -> "Lock":
    """Take the lock; if another process holds it, call waits() and then wait."""
    if not self.try_(shared):
      waits()
      self._take(shared, 0)
    return self

  def is_held(self) -> bool:
    """Whether another process holds it; ask about instances only under instances_lock."""
    try:
      fd = os.open(self.path, os.O_RDONLY)
    except FileNotFoundError:
      return False
    try:
      return not self._flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
      os.close(fd)

  def release(self) -> None:
    """Release the lock if this process holds it."""
    if self.fd >= 0:
      os.close(self.fd)
    self.fd = -1

  def remove(self) -> None:
    """Delete the lock's file, unless others share the lock, then release the lock."""
    with signals.hold():
      if self._flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
        remove_file(self.path)
      self.release()

  def __enter__(self) -> "Lock":
    return self

  def __exit__(self, *error: object) -> None:
    self.release()

  def _open(self) -> int:
    while self.folder:
      with contextlib.suppress(FileExistsError):
        os.mkdir(self.path, 0o700)
      with contextlib.suppress(FileNotFoundError):  # a holder has just removed it
        return os.open(self.path, os.O_RDONLY)
      check_mounted(self.path)
    return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

  def _flock(self, fd: int, how: int) -> bool:
    try:
      fcntl.flock(fd, how)
    except BlockingIOError:
      return False
    except OSError as error:
      raise QvmError(
        f"cannot lock {self.path}: {describe(error)}",
        f"its file system does not support flock; {OTHER_CACHE}, on a local disk",
      )
    return True

  def _take(self, shared: bool, flag: int) -> bool:
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | flag
    while True:
      self.fd = self._open()
      with contextlib.ExitStack() as unless_taken:
        unless_taken.callback(self.release)
        if not self._flock(self.fd, how):
          return False
        with contextlib.suppress(FileNotFoundError):  # the holder has deleted it
          if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
            unless_taken.pop_all()
            return True


def instances_lock(cache: Cache) -> Lock:
  """Serialises every look at instance locks, and every change to what instances depend on.

  qvm tries an instance's lock to learn whether it runs; two processes that try at the same time
  would each take the other for a running QEMU.
  """
  return Lock(cache.instances, folder=True).hold()


def downloads_lock(downloads: str) -> Lock:
  """Held by whoever fetches or starts something, shared with others: it keeps `clean` out."""
  waits = functools.partial(say, "waiting for another qvm that cleans up")
  return Lock(downloads, folder=True).hold(shared=True, waits=waits)


def own_qemu_img(own_qemu: str) -> str:
  """The qemu-img next to the user's own QEMU, else the one on PATH."""
  found = find_program("qemu-img", os.path.dirname(own_qemu)) or find_program("qemu-img")
  if not found:
    raise QvmError(
      f"no qemu-img found next to {own_qemu} or on PATH",
      "install it (Debian: apt-get install qemu-utils) or omit --qemu",
    )
  return found


def find_program(name: str, folder: Optional[str] = None) -> str:
  """The absolute path of a program on PATH or in a folder; empty if not found."""
  path = shutil.which(name, path=folder)
  return os.path.abspath(path) if path else ""


def read_script(path: str) -> bytes:
  """What is in a file of --prepare; UsageError if that cannot be read."""
  try:
    with open(absolute(path, "--prepare"), "rb") as file:
      return file.read()
  except OSError as error:
    raise UsageError(f"--prepare: '{path}' cannot be read: {describe(error)}")


def resolve(options: Options) -> Options:
  """The options with absolute paths; UsageError if a program or folder does not exist."""
  names = ("sync", "sync_out", "console_log", "mirror", "logs", "junit", "image")
  flags = {name: "--" + name.replace("_", "-") for name in names if getattr(options, name)}
  paths: Dict[str, Any] = {name: absolute(getattr(options, name), flags[name]) for name in flags}
  for name in ("mirror", "logs", "sync_out"):
    if name in paths and os.path.exists(paths[name]) and not os.path.isdir(paths[name]):
      raise UsageError(f"{flags[name]}: not a folder: '{getattr(options, name)}'")
  if options.logs and not os.access(nearest(paths["logs"]), os.W_OK | os.X_OK):
    raise UsageError(f"--logs: no file can be written in '{options.logs}'")
  for name in ("console_log", "junit"):
    path = paths.get(name, os.devnull)
    there = path if os.path.exists(path) else os.path.join(os.path.dirname(path), "")
    if os.path.isdir(path) or not os.access(there, os.W_OK):
      raise UsageError(f"{flags[name]}: no file can be written at '{getattr(options, name)}'")
  if options.image and not os.path.isfile(paths["image"]):
    raise UsageError(f"--image: no such file: '{options.image}'")
  if options.sync and not os.path.isdir(paths["sync"]):
    raise UsageError(f"--sync: no such folder: '{options.sync}'")
  if options.sync and not os.path.basename(paths["sync"]):
    raise UsageError("--sync: the root folder cannot be copied; choose a folder below it")
  out = paths.get("sync_out", "")  # on macOS perhaps in another spelling
  if os.path.exists(out) and os.path.samefile(out, paths["sync"]):
    raise UsageError("--sync-out: what comes back needs another folder than that of --sync")
  paths["scripts"] = tuple(map(read_script, options.prepare))
  name, program = "--qemu", options.qemu
  if not program and {"qemu", "platform"} <= set(COMMANDS[options.command].fields):
    name = "QVM_QEMU_" + QEMU_CPUS[options.platform or this_host().arch].upper()
    program = os.environ.get(name, "")
  if program:
    paths["qemu"] = find_program(os.path.expanduser(program))
    if not paths["qemu"]:
      raise UsageError(f"{name}: no such executable program: '{program}'")
  return options._replace(**paths)


class Spawn(NamedTuple):
  """How to start a program, in Popen's names.

  A stream is a file, a descriptor, PIPE, DEVNULL, or None for ours.
  """

  stdin: Handle = None
  stdout: Handle = None
  stderr: Handle = None
  pass_fds: Tuple[int, ...] = ()  # more descriptors to pass on
  start_new_session: bool = False  # no key and no hang-up of our terminal reaches it
  cwd: Optional[str] = None
  env: Optional[Mapping[str, str]] = None
  preexec_fn: Optional[Callable[[], None]] = None  # called in the process, before the program


def start(command: Sequence[str], spawn: Spawn) -> "Process":
  """Start a program; the only function that does. QvmError explains why it cannot run."""
  try:
    # It asks for no text, so all streams have bytes.
    return popen_type()(list(command), **spawn._asdict())  # type: ignore[return-value]
  except OSError as error:
    raise cannot_run(command[0], error)


@functools.lru_cache(None)
def popen_type() -> Type["Process"]:
  """Popen that keeps its head when a signal's handler raises an exception while it waits.

  Popen polls with a lock that it acquires outside a `try`: left locked, it waits for ever from then
  on. And an exit code that the system has told, but Popen has not noted yet, becomes 0.
  """

  class Patient(subprocess.Popen):  # type: ignore[type-arg]
    def poll(self) -> Optional[int]:
      with signals.hold():
        return super().poll()

    def wait(self, timeout: Optional[float] = None) -> int:
      if timeout is None:  # no signal comes to a thread of its own
        return super().wait() if signals.held else Future(super().wait).result()
      deadline, pause = time.monotonic() + timeout, 0.0005
      while True:
        code = self.poll()
        if code is not None:
          return code
        left = deadline - time.monotonic()
        if left <= 0:
          raise subprocess.TimeoutExpired(self.args, timeout)
        pause = min(2 * pause, left, 0.05)
        time.sleep(pause)

  return Patient


def allow_many_files() -> None:
  """Raise the limit of open files, for QEMU: macOS gives 256, too few for its user network."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = 10240 if hard == resource.RLIM_INFINITY else min(hard, 10240)  # XNU's OPEN_MAX
  if soft != resource.RLIM_INFINITY and soft < wanted:
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def silent() -> Spawn:
  """For a program without input whose output is discarded."""
  return Spawn(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)


ROSETTA_FIX = (
  "install Rosetta (softwareupdate --install-rosetta) or use your own QEMU, such as Homebrew's, "
  "with --qemu"
)


def cannot_run(program: str, error: OSError) -> QvmError:
  """The error for a program that the system cannot execute."""
  EBADARCH = 86  # macOS: "Bad CPU type in executable"
  hint = ""
  if error.errno == EBADARCH or (sys.platform == "darwin" and error.errno == errno.ENOEXEC):
    hint = "the downloaded QEMU is built for Intel: " + ROSETTA_FIX
  elif error.errno == errno.ENOEXEC:
    hint = (
      "if it is damaged, qvm pull downloads it again; if it is built for another CPU, use a QEMU "
      "built for this machine with --qemu"
    )
  elif error.errno == errno.EACCES:
    hint = "is its file system mounted noexec? set QVM_CACHE_DIR to a folder on another one"
  elif error.errno == errno.ENOENT and os.path.exists(program):
    hint = "its loader or interpreter is missing on this system"
  return QvmError(f"cannot execute {program}: {describe(error)}", hint)


def run_program(command: Sequence[str], fds: Tuple[int, ...] = ()) -> None:
  """Run a helper such as qemu-img to completion; QvmError with its output if it fails."""
  with signals.hold():
    spawn = Spawn(subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT, fds)
    process = start(command, spawn)
    output = process.communicate()[0].decode("utf-8", "replace").strip()
  if process.returncode:
    raise QvmError(
      "{} failed ({}): {}".format(command[0], ending(process.returncode), " ".join(output.split()))
    )


def end_process(process: "Process") -> None:
  """End a process that is still running: SIGTERM, then SIGKILL."""
  if process.poll() is None:
    process.terminate()
    try:
      process.wait(signals.grace(TERM_GRACE_SECONDS))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def ask_program(command: Sequence[str], text: str = "") -> Tuple[int, str]:
  """The exit code and the output of a program that should answer within 10 seconds."""
  try:
    process = start(command, Spawn(subprocess.PIPE, subprocess.PIPE, subprocess.STDOUT))
  except QvmError as error:
    return 127, f"{error}; {error.hint}"
  try:
    output = process.communicate(text.encode(), timeout=10)[0].decode("utf-8", "replace")
  except subprocess.TimeoutExpired:
    return 124, "no answer within 10 s"
  finally:
    end_process(process)
  return process.returncode, " ".join(output.split()) or ending(process.returncode)


def this_host() -> Host:
  """The host that qvm runs on; QvmError if it is not supported."""
  uname, systems = os.uname(), {"Linux": "linux", "Darwin": "macos"}
  # Under Rosetta only the kernel's version tells the machine.
  apple = uname.sysname == "Darwin" and "RELEASE_ARM64" in uname.version
  machine = "arm64" if apple else uname.machine
  if uname.sysname not in systems or machine.lower() not in ARCHES:
    problem = f"{uname.sysname} on {machine} is not supported"
    raise QvmError(problem, "qvm runs on Linux and macOS, on x86-64 and arm64")
  return Host(systems[uname.sysname], ARCHES[machine.lower()])


def lacks_rosetta(host: Host) -> bool:
  """Whether this is Apple Silicon that cannot run the downloaded QEMU, which is built for Intel."""
  return host == Host("macos", "arm64") and not os.path.exists("/Library/Apple/usr/share/rosetta")


def available_memory(meminfo: str) -> Optional[int]:
  """The bytes of memory that are available, else of all memory; None if the system says neither."""
  with contextlib.suppress(OSError, ValueError, IndexError):
    with open(meminfo) as file:
      line = next((line for line in file if line.startswith("MemAvailable:")), "")
    return int(line.split()[1]) << 10
  with contextlib.suppress(OSError, ValueError):
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return None


class Future(Generic[T]):
  """A call in a thread of its own; result() waits for it and raises its error."""

  def __init__(self, function: Callable[[], T]) -> None:
    self.function = function
    self.value: Optional[T] = None
    self.error: Optional[BaseException] = None
    self.thread = threading.Thread(target=self.work, daemon=True)
    self.thread.start()

  def work(self) -> None:
    try:
      self.value = self.function()
    except BaseException as error:  # raised by result(), in the thread that wants it
      self.error = error

  def result(self) -> T:
    while self.thread.is_alive():
      self.thread.join(POLL_SECONDS)
    if self.error:
      raise self.error
    return self.value  # type: ignore[return-value] # T may itself be optional


# ---- HTTP ---------------------------------------------------------------------------------------

ATTEMPTS = 5  # in a row without progress; the pauses add up to 15 s, as long as a router restarts
PROGRESS_BYTES = 1 << 20  # an attempt that brings so many bytes is progress: the count starts anew
MAX_RETRY_AFTER_SECONDS = 60.0  # of a Retry-After: a server that names more may not mean it
MAX_RELEASE_DATA_BYTES = 8 << 20  # 100 releases of the largest repository are 2 MB
FAMILY_SECONDS = 3.0  # for an address while others are left: its first packet may be lost twice
URL_RE = (
  r"(https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[!-~]*)?|file://(/[!-~]*)?)\Z"
)
TAG_MARK = "/releases/tag/"  # in the address of a release's page
QUOTA_HINT = "GITHUB_TOKEN raises it from 60 to 5,000 requests an hour"
RETRY_CODES = (408, 425, 429, 500, 502, 503, 504)
NO_SUCH_RANGE = 416


class Net(NamedTuple):
  """How to reach the release server."""

  releases: str  # the address above the repositories, without a slash at the end
  api: str  # the same of GitHub's API; empty: there is none, as with a mirror
  token: str  # for the API only
  timeout: float  # seconds for a connection, and for the next bytes to arrive
  retry_delay: float  # seconds before the first retry
  attempts: int  # in a row without progress
  cancelled: threading.Event  # set when nobody wants the result any more
  patience: float = MAX_RETRY_AFTER_SECONDS  # with a server that asks for a pause


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


class ReleasePage(QvmError):
  """A redirect to the page of a release, which is not followed: it tells the release's tag."""

  def __init__(self, message: str, tag: str = "") -> None:
    super().__init__(message)
    self.tag = tag


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
  if token and api and is_open(api):
    raise UsageError(
      f"QVM_API_URL: {redacted(api)} is not https: GITHUB_TOKEN would go there for all to read"
    )
  return Net(
    releases,
    api.rstrip("/"),
    token,
    seconds_from(environ, "QVM_TIMEOUT", 30.0, 0.1),
    seconds_from(environ, "QVM_RETRY_DELAY", 1.0, 0.0),
    ATTEMPTS,
    threading.Event(),
  )


def is_open(url: str) -> bool:
  """Whether what goes to and comes from a URL can be read and changed on its way."""
  loopback = r"http://(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?(/|\Z)"
  return url.startswith("http:") and not re.match(loopback, url)


def seconds_from(environ: Mapping[str, str], name: str, default: float, least: float) -> float:
  """A time in seconds from the environment, at most an hour."""
  text = environ.get(name)
  if not text:
    return default
  if not re.match(r"[0-9]{1,4}(\.[0-9]{1,6})?\Z", text) or not least <= float(text) <= 3600:
    raise UsageError(f"{name}: '{text}' is not a number of seconds from {least:g} to 3600")
  return float(text)


def impatient(net: Net) -> Net:
  """For requests that qvm can do without: a short time, few attempts."""
  return net._replace(timeout=min(net.timeout, 10.0), attempts=2, patience=10.0)


def handlers() -> "List[urllib.request.BaseHandler]":
  """What urllib does in its own way otherwise: redirects, proxies, and connections by connect().

  A redirect never leaves https, and strips proxy credentials. A proxy is not used for networks in
  no_proxy.
  """

  class Redirects(urllib.request.HTTPRedirectHandler):
    max_repeats = 3
    inf_msg = "redirect loop: "

    def redirect_request(
      self, req: "Request", fp: IO[bytes], code: int, msg: str, headers: "Headers", newurl: str
    ) -> "Optional[Request]":
      old, new = (urllib.parse.urlsplit(url).scheme.lower() for url in (req.full_url, newurl))
      if new != old and new != "https":
        raise QvmError(
          f"{redacted(req.full_url)} redirects from {old} to {redacted(newurl)}, which is not safe"
        )
      fp.close()  # or else urllib reads the whole body, however long
      if TAG_MARK in newurl:
        page = redacted(newurl)
        tag = urllib.parse.unquote(page.rpartition(TAG_MARK)[2])
        raise ReleasePage(f"{redacted(req.full_url)} redirects to {page}", tag)
      kept = {k: v for k, v in req.headers.items() if k.lower() != "proxy-authorization"}
      return urllib.request.Request(newurl, None, kept, req.origin_req_host, True, req.get_method())

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302

  class Proxies(urllib.request.ProxyHandler):
    def proxy_open(self, req: Any, proxy: str, type: str) -> Any:
      if not proxy_for(req.full_url):
        return None
      if proxy.lower().startswith("socks"):
        raise QvmError(
          f"the proxy {proxy_name(proxy)} is a SOCKS proxy, which qvm cannot use",
          f"set {type}_proxy to an HTTP proxy, or unset it",
        )
      return super().proxy_open(req, proxy, type)

  def do_open(handler: Any, kind: Any, request: Any, **more: Any) -> Any:
    return urllib.request.AbstractHTTPHandler.do_open(handler, with_connect(kind), request, **more)

  kinds = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
  connecting = [type(kind.__name__, (kind,), {"do_open": do_open})() for kind in kinds]
  return [Redirects(), Proxies(), *connecting]


silent_addresses: Set[Any] = set()  # those that let FAMILY_SECONDS pass: they are tried last


def connect(
  host_port: Tuple[str, int], timeout: float, source: Optional[Tuple[str, int]] = None
) -> "socket.socket":
  """A connection to the first of a host's addresses that answers, IPv6 and IPv4 in turn.

  As in RFC 8305, but one after the other. socket.create_connection gives each address the whole
  time, so that an IPv6 that leads nowhere uses it up before IPv4 gets its turn.
  """
  found = socket.getaddrinfo(*host_port, 0, socket.SOCK_STREAM)
  families = [info[0] for info in found]

  def turn(place: int) -> Tuple[bool, int]:  # as many others of its family have theirs before
    return found[place][4] in silent_addresses, families[:place].count(families[place])

  turns = [found[place] for place in sorted(range(len(found)), key=turn)]
  error: OSError = socket.timeout("timed out")
  while turns:
    family, kind, protocol, _, address = turns.pop(0)
    try:
      with contextlib.ExitStack() as unless_connected:
        link = unless_connected.enter_context(socket.socket(family, kind, protocol))
        link.settimeout(min(timeout, FAMILY_SECONDS) if turns else timeout)
        link.connect(address)
        link.settimeout(timeout)
        unless_connected.pop_all()
        return link
    except OSError as failure:  # such as no route to any IPv6
      error = failure
      if isinstance(failure, socket.timeout):
        silent_addresses.add(address)
  raise error


def with_connect(kind: "Type[http.client.HTTPConnection]") -> Callable[..., Any]:
  """What makes connections of a kind that use connect()."""

  def make(*args: Any, **more: Any) -> http.client.HTTPConnection:
    link: Any = kind(*args, **more)
    link._create_connection = connect  # where http.client of Python 3.6 to 3.14 looks for it
    if hasattr(link, "_context") and "LibreSSL" in ssl.OPENSSL_VERSION:  # as in macOS' own Python
      names = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # of which it knows nothing
      with contextlib.suppress(OSError, TypeError):  # no such file; none is named
        link._context.load_verify_locations(*(os.environ.get(name) or None for name in names))
    return link  # type: ignore[no-any-return]

  return make


def proxy_for(url: str) -> str:
  """The address of the proxy for a URL; empty when there is none, or no_proxy names the host."""
  parts = urllib.parse.urlsplit(url)
  proxy, host = urllib.request.getproxies().get(parts.scheme, ""), parts.hostname or ""
  if not proxy or any(map(urllib.request.proxy_bypass, (host, parts.netloc.split("@")[-1]))):
    return ""
  networks = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
  for network in [word.strip() for word in networks.split(",") if "/" in word]:
    with contextlib.suppress(ValueError):  # the host is a name, or the network none
      if ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False):
        return ""
  return str(proxy)


def trust_system() -> None:
  """On macOS, trust the system's certificates if Python comes with none, as python.org's does."""
  system = "/etc/ssl/cert.pem"
  if sys.platform != "darwin" or {"SSL_CERT_FILE", "SSL_CERT_DIR"} & set(os.environ):
    return
  paths = ssl.get_default_verify_paths()
  if not paths.cafile and not (paths.capath and names_in(paths.capath)) and os.path.isfile(system):
    os.environ["SSL_CERT_FILE"] = system  # where OpenSSL looks, in every context


def open_url(net: Net, url: str, headers: Optional[Dict[str, str]] = None) -> "Response":
  """Request a URL and return the open response; only Connections.open_address goes another way.

  Raises Transient for what may pass (no connection, 5xx, 429, …), QvmError for what will not.
  """
  trust_system()
  request = urllib.request.Request(url, headers=dict(headers or {}))
  request.add_header("User-Agent", "qvm/" + __version__)
  request.add_header("Accept-Encoding", "identity")
  if net.token and net.api and url.startswith(net.api + "/"):
    request.add_unredirected_header("Authorization", "Bearer " + net.token)
  response: Response  # of a file:/// URL it is another class with the same methods
  try:
    response = urllib.request.build_opener(*handlers()).open(request, timeout=net.timeout)
  except urllib.error.HTTPError as error:
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
  return response


def http_failure(url: str, error: "urllib.error.HTTPError") -> Exception:
  """What an HTTP status that is no success means."""
  code, final = error.code, error.geturl() or url
  if 300 <= code < 400:
    if "location" not in error.headers:  # the connection may have ended before it came
      return Transient(f"{redacted(url)}: a redirect that leads nowhere")
    return QvmError(f"{redacted(url)}: bad redirect: {error.msg}")
  message = f"{redacted(final)} answers {code} {brief(error.msg)}"
  if error.headers.get("x-ratelimit-remaining") == "0":
    return QvmError(f"{message}: the quota of GitHub's API is used up", QUOTA_HINT)
  expired = code == 403 and redacted(final) != redacted(url)  # a signed address: ask for a new one
  if code in RETRY_CODES or expired or code == NO_SUCH_RANGE:
    return Transient(message, retry_after(error.headers.get("Retry-After", "")), code)
  return NotFound(message) if code in (404, 410) else QvmError(message, proxy_used(url))


def retry_after(text: str) -> Optional[float]:
  """The seconds that a Retry-After header asks for (a number or an HTTP date), at most 60."""
  if re.match(r"[0-9]{1,9}\Z", text.strip()):
    return min(float(text), MAX_RETRY_AFTER_SECONDS)
  with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):
    wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    return max(0.0, min(wait, MAX_RETRY_AFTER_SECONDS))
  return None


# What OpenSSL says of certificates that RFC 5280 does not allow (its X509_V_FLAG_X509_STRICT).
STRICT_RE = r"key usage extension|(Authority|Subject) Key Identifier|not marked critical"


def certificate_fix(problem: str) -> str:
  """What to do about a certificate that cannot be verified, from OpenSSL's words."""
  if "expired" in problem or "not yet valid" in problem:
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return f"is the clock of this machine right? it says {now} UTC"
  if re.search(STRICT_RE, problem):
    return "Python 3.13 and newer refuse such a certificate, as some proxies make: use an older one"
  fix = "install the package ca-certificates"
  if sys.platform == "darwin":
    fix = "python.org's Python: run 'Install Certificates.command' once"
  return f"{fix}; behind a company's proxy: set SSL_CERT_FILE to the file with its certificates"


def connection_failure(url: str, error: Exception) -> Exception:
  """What an exception from urllib or http.client means, with the fix where one is known."""
  reason = getattr(error, "reason", None)
  cause = reason if isinstance(reason, Exception) else error
  if isinstance(cause, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(cause):
    problem = f"{redacted(url)}: its certificate cannot be verified: {cause}"
    return QvmError(problem, certificate_fix(str(cause)))
  if url.startswith("file:") and isinstance(cause, OSError):
    return NotFound(f"{redacted(url)}: {describe(cause)}")
  if isinstance(cause, http.client.InvalidURL):  # its text may be the password of a proxy
    return QvmError(f"{redacted(url)} leads to an address that is not valid", proxy_used(url))
  if isinstance(cause, socket.timeout):
    return Transient(f"{redacted(url)}: no answer in time")
  kind = Transient if isinstance(cause, (OSError, http.client.HTTPException)) else QvmError
  return kind(f"{redacted(url)}: {describe(cause)}")


def proxy_used(url: str) -> str:
  """Names the proxy that a request goes through; empty when there is none."""
  proxy, name = proxy_for(url), urllib.parse.urlsplit(url).scheme + "_proxy"
  if not proxy:
    return ""
  given = name in os.environ or name.upper() in os.environ  # else it is in macOS' settings
  origin = name if given else "System Settings"
  return f"the request goes through the proxy {proxy_name(proxy)} ({origin})"


def proxy_name(proxy: str) -> str:
  """Host and port of a proxy, never what may be a password."""
  match = re.match(r"(.*@|[a-z0-9]*:?//)?([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(:[0-9]+)?/*\Z", proxy)
  return f"{match.group(2)}{match.group(3) or ''}" if match else "(an address that is not one)"


def with_retries(net: Net, url: str, attempt: Callable[[], T], done: Callable[[], int] = int) -> T:
  """Call attempt until it raises no Transient; net.attempts in a row without progress fail.

  done tells how many bytes there are. The pauses double each time and are spread at random,
  so that a fleet of runners does not come back all at once.
  """
  left, reached = net.attempts, done()
  while True:
    try:
      return attempt()
    except Transient as error:
      if done() >= reached + PROGRESS_BYTES:
        left, reached = net.attempts, done()
      left -= 1
      if not left or (error.wait or 0.0) > net.patience:
        made = net.attempts - left
        raise QvmError(
          f"{error} ({made} attempts)" if made > 1 else str(error),
          proxy_used(url) or "is the network up? what has been downloaded is kept, try again",
        )
      pause = error.wait
      if pause is None:
        pause = net.retry_delay * 2 ** (net.attempts - 1 - left) * random.uniform(0.75, 1.25)
      say(f"{error}; trying again in {pause:.1f} s")
      if net.cancelled.wait(pause):
        raise Cancelled()


def fetch_bytes(net: Net, url: str) -> bytes:
  """One attempt at a small answer: its body."""
  with open_url(net, url) as response:
    try:
      body = response.read(MAX_RELEASE_DATA_BYTES + 1)
    except Exception as error:
      raise connection_failure(url, error)
  if len(body) > MAX_RELEASE_DATA_BYTES:
    raise QvmError(f"{redacted(url)}: the answer is larger than any release data")
  if getattr(response, "length", None):  # read() takes what there is; a file has no such field
    raise Transient(f"{redacted(url)}: the connection ended before the answer did")
  return body


def get_page(net: Net, url: str) -> str:
  """The text of a page, with retries."""
  return with_retries(net, url, lambda: fetch_bytes(net, url)).decode("utf-8", "replace")


def check_exists(net: Net, url: str) -> None:
  """NotFound unless a URL can be fetched, asked by fetching its first byte."""
  with_retries(net, url, lambda: open_url(net, url, {"Range": "bytes=0-0"}).close())


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
# Locks between threads, in order: PartFile.hashing, PartFile.lock, Connections.lock. close() and
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
STRONG_ETAG_RE = r'"[^"]*"\Z'  # an ETag that stands for the very bytes


class DownloadNote(NamedTuple):
  """What a resume needs: where the bytes come from, and of which object they are."""

  url: str
  validator: str  # a strong ETag, else Last-Modified; empty: no resume
  total: Optional[int]  # bytes; None: not known
  block: int = BLOCK_BYTES
  boot: str = ""  # of the host, if not all that the map tells is surely on the disk


def read_note(folder: str) -> Optional[DownloadNote]:
  """The note of an unfinished file; None when there is none, or no sound one of this format."""
  note = sound_record(DownloadNote("", "", -1, 0), os.path.join(folder, "note.json"))
  sound = note.block == BLOCK_BYTES and note.total is not None and note.total >= 0
  return note if sound else None


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
    self.boot = boot_id() or os.urandom(8).hex()  # unknown: only what was flushed counts
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
    if note.boot not in ("", self.boot):
      return say(f"the host went down while {self.name} was downloaded; starting anew")
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
    self.blocks = bytearray(states)
    self.write_note(note._replace(boot=self.boot), keep=True)
    surplus = -total % BLOCK_BYTES if states.endswith(b"\1") else 0
    self.done = states.count(THERE) * BLOCK_BYTES - surplus
    self.open_files()

  def create(self, note: DownloadNote) -> None:
    """Begin an object; discard() has removed what there was of another."""
    self.write_note(note._replace(boot=self.boot), keep=False)
    with self.lock:
      self.blocks = bytearray(count_blocks(note.total or 0))
      self.open_files()
      write_at(self.map_fd, self.blocks, 0)

  def write_note(self, note: DownloadNote, keep: bool) -> None:
    """Note what a resume needs."""
    path = os.path.join(self.folder, "note.json")
    replace_by_record(path, note, 0o600, path + ".tmp", keep)
    self.note = note

  def open_files(self) -> None:
    """Open the part and the map."""
    with contextlib.suppress(FileNotFoundError):  # a killed qvm was about to publish it, read-only
      os.chmod(self.part, 0o600)
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
      if remove or (self.note.url and self.total is None):  # it could not be resumed
        for path in (self.part, self.map, os.path.join(self.folder, "note.json")):
          remove_file(path)
      elif self.note.boot and self.done and self.hashed != self.total:
        with contextlib.suppress(OSError):  # then a resume after a reboot starts anew
          for path in (self.part, self.map):
            flush(path)
          self.write_note(self.note._replace(boot=""), keep=True)
      if forget:
        self.forget()

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

  def claim(self, lead: bool = False) -> Optional[Span]:
    """The first gap that nobody fills; for the lead all of an object of unknown length."""
    with self.lock:
      if lead and self.total is None:
        self.spans.append(Span(0, UNKNOWN))
        return self.spans[-1]
      first = self.blocks.find(MISSING)
      return self.claim_blocks(first, len(self.blocks)) if first >= 0 else None

  def claim_blocks(self, first: int, last: int) -> Optional[Span]:
    """The gap that begins with a block, up to last or a block begun; None where there is none."""
    with self.lock:
      last = min([last, *(block for block in self.begun if block > first)])
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
      spans = self.spans if self.blocks else []  # what has no length is the lead's
      old = max(spans, key=lambda span: span.left, default=None)
      silent = time.monotonic() - STALL_SECONDS
      stalled = [span for span in spans if span.left and span.moved < silent]
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
      if self.part_fd < 0:  # closed since the caller wrote to it
        raise Cancelled()
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
    if report.phases >= 0 and self.files:
      total = sum(file.total or 0 for file in list(self.files))
      there = sum(file.done for file in list(self.files))
      report.phase("downloading", f"{min(100, 100 * there // total)} %" if total else "")
    pause = 0.2 if os.isatty(2) else 5.0  # on a terminal it moves, a log it must not fill
    if not report.progress or not self.files or time.monotonic() < self.shown + pause:
      return
    self.shown = time.monotonic()
    texts = []
    for file in list(self.files):
      done, size = file.done, file.total
      share = f" {100 * done // size}%" if size else ""
      texts.append(f"{file.name}{share} {megabytes(done)}")
    report.draw(" | ".join(texts))

  def close(self) -> None:
    """Let no download of this process write any more, and put on the disk what there is."""
    for file in list(self.files):
      if isinstance(file, PartFile):
        file.close()


progress = Progress()


# An open answer, and its connection if that may be used again, which urllib's may not.
OpenBody = Tuple["Response", "Optional[http.client.HTTPConnection]"]


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


class Asset(NamedTuple):
  """A file of a release."""

  repo: str
  tag: str
  name: str

  def url(self, net: Net) -> str:
    tag, name = map(urllib.parse.quote, (self.tag, self.name))
    return f"{net.releases}/{self.repo}/releases/download/{tag}/{name}"


class NoStream(QvmError):
  """Why a file must be downloaded before it can be read."""


class Download:
  """An asset on its way into a folder of its own, over one to four connections.

  With streamed, others read of it meanwhile: it must stay one object, of which ranges can be had.
  """

  def __init__(self, net: Net, asset: Asset, folder: str, streamed: bool = False) -> None:
    self.net, self.asset, self.streamed = net, asset, streamed
    self.name, self.url = asset.name, asset.url(net)
    self.file = PartFile(folder, self.name, self.url)
    self.connections = Connections(net, self.url)
    self.resumed, self.started = self.file.done, time.monotonic()
    self.vouched = False  # whether it has the digest that its release names
    self.accepted = False  # whether an answer has been: readers depend on its object from then on
    self.helpers: List[threading.Thread] = []
    self.error: Optional[BaseException] = None  # after which no reader gets anything
    self.failures = 0  # how often those who waited have been given up
    self.down = False  # whether that has been said, and nothing has come since
    self.urgent: List[Tuple[int, int]] = []  # blocks that connections for readers fetch
    self.readahead: Dict[int, int] = {}  # where such a connection stopped: the blocks it brought

  def fetch(self) -> None:
    """Fetch what is missing, hash it, and look at its first bytes: the lead's whole work."""
    if not self.file.complete():
      with_retries(self.net, self.url, self.fetch_rest, lambda: self.file.done)
    self.file.hash_all(self.net.cancelled)
    self.check_kind(os.pread(self.file.part_fd, HEAD_BYTES, 0))

  def fetch_rest(self) -> None:
    """One attempt: fetch the gaps in their order, and what others turn out not to fetch."""
    span = self.file.claim(lead=True)
    while span:
      self.fetch_span(span, lead=True)
      span = self.next_span()

  def next_span(self) -> Optional[Span]:
    """What is left to fetch, if need be once the others are done; None when there is nothing."""
    with self.file.lock:  # one that ends meanwhile leaves a gap, or hides another
      while True:
        span = self.file.claim() or self.file.steal(split=not self.streamed)
        if span or not any(each.left for each in self.file.spans):
          return span
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
      headers = {} if restart and not self.file.done else self.range_headers(start, end)
      opened = self.connections.open(headers, end - start)
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
      if restart and error.code == NO_SUCH_RANGE:
        self.file.discard()
      raise
    finally:
      self.file.release(span)

  def range_headers(self, start: int, end: int) -> Dict[str, str]:
    """What asks for a range, if it can be had of the same object; else for all of it."""
    if not self.file.note.validator or end == UNKNOWN:
      return {}
    last = "" if end == self.file.total else end - 1
    return {"Range": f"bytes={start}-{last}", "If-Range": self.file.note.validator}

  def accept(self, body: "Response", span: Span, restart: bool) -> Span:
    """Look at an answer's headers; returns the span that its body is."""
    if body.getcode() != 206 and restart:
      span = self.start_over(body)
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

  def start_over(self, body: "Response") -> Span:
    """A 200 brings the whole object: forget what there was; returns what to fetch."""
    length = body.headers.get("Content-Length") or ""
    chunked = (body.headers.get("Transfer-Encoding") or "").lower() == "chunked"
    sized = re.match(r"[0-9]{1,15}\Z", length) and not chunked
    if not sized and not chunked:  # the connection may have ended before it did
      raise Transient(f"{redacted(self.url)}: the server does not say how long the file is")
    self.check_kind(self.read_chunk(body.peek, HEAD_BYTES), keep=True)
    if self.file.done:
      say(f"{self.name} has changed or cannot be resumed; starting from the beginning")
    self.file.discard()
    self.resumed = 0
    etag, total = body.headers.get("ETag") or "", int(length) if sized else None
    strong = re.match(STRONG_ETAG_RE, etag)
    self.check_space(0, total or 0)
    validator = etag if strong else body.headers.get("Last-Modified") or ""
    self.file.create(DownloadNote(self.url, validator, total))
    return self.file.claim(lead=True) or Span(0, 0)

  def check_range(self, body: "Response", span: Span) -> None:
    """Transient unless an answer is just the bytes asked for, of the same object."""
    etag, validator = body.headers.get("ETag") or "", self.file.note.validator
    given = body.headers.get("Content-Range") or ""
    place = re.match(r"bytes ([0-9]{1,15})-[0-9]+/([0-9]{1,15})\Z", given)
    fits = place and [int(text) for text in place.groups()] == [span.position, self.file.total]
    same = validator in (etag, body.headers.get("Last-Modified"))
    if body.getcode() != 206 or not fits or not same:
      changed = etag and etag != validator  # or a node has another ETag
      problem = "has another file now" if changed else "sends another part than asked for"
      raise Transient(
        f"{redacted(self.url)}: the server {problem}",
        code=NO_SUCH_RANGE if self.read_chunk(body.peek, 1) else 0,  # it may end in its headers
      )

  def gives_ranges(self, headers: "Headers") -> bool:
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

  def copy_body(self, body: "Response", span: Span, lead: bool) -> None:
    """Write a body to the part."""
    began, start = time.monotonic(), span.position
    while not self.net.cancelled.is_set():
      chunk = self.read_chunk(body.read1, min(CHUNK_BYTES, span.left))
      if not chunk:
        if span.end == UNKNOWN:
          span.end = span.position
          self.file.set_total(span.end)
        return
      self.file.yield_to_urgent(span)
      self.file.write(span, chunk)
      seconds = time.monotonic() - began
      if lead and seconds > SLOW_AFTER_SECONDS and span.position - start < SLOW_RATE * seconds:
        self.add_helpers(body.headers)
    raise Cancelled()

  def read_chunk(self, read: Callable[[int], bytes], most: int) -> bytes:
    """The next bytes of a body, as many as there are: a time-out loses none of them."""
    try:
      return read(most) if most else b""
    except socket.timeout:
      raise Transient(f"{redacted(self.url)}: no more data for {self.net.timeout:g} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
      raise Transient(f"{redacted(self.url)}: the connection broke: {describe(error)}")

  def check_kind(self, head: bytes, keep: bool = False) -> None:
    """Refuse what is visibly not the file asked for; with keep a web page, and what came stays."""
    problem = ""
    if looks_like_html(head):
      problem = "is an HTML page instead of the file"
    elif self.name.endswith(".qcow2") and head[:4] != b"QFI\xfb" and not keep:
      problem = "is not a qcow2 image"
    if problem:
      if not keep:
        self.file.discard()
      raise QvmError(
        f"{redacted(self.url)} {problem}",
        "does a proxy or a login page of this network stand in between?",
      )

  # Helpers.

  def add_helpers(self, headers: "Headers") -> None:
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
      for span in iter(lambda: self.file.claim() or self.file.steal(split=True), None):
        start = span.position
        try:
          self.fetch_span(span, lead=False)
        except Transient:
          if span.position == start:
            return

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


def download(net: Net, asset: Asset, folder: str) -> Download:
  """Fetch an asset into a folder, resuming what is there; returns it complete and looked at."""
  result = Download(net, asset, folder)
  with progress.including(result.file):  # until its bytes are put away: a signal waits for that
    try:
      result.fetch()
    finally:
      result.file.close()
  fetched, seconds = result.file.done - result.resumed, time.monotonic() - result.started
  rate = megabytes(fetched / max(seconds, 0.001))
  say(f"downloaded {asset.name}: {megabytes(fetched)} in {seconds:.1f} s ({rate}/s)")
  return result


@contextlib.contextmanager
def download_lock(downloads: str, name: str) -> Iterator[str]:
  """Hold downloads/NAME, where one file is made, waiting for a qvm that has it; gives its path.

  The lock on the folder tells whether somebody works there. An empty one is removed in the end.
  """
  folder = os.path.join(downloads, name)
  with contextlib.ExitStack() as waiting, downloads_lock(downloads):

    def waits() -> None:
      say(f"waiting for another qvm that downloads {name}")
      waiting.enter_context(progress.including(OtherDownload(folder, name)))

    with Lock(folder, folder=True).hold(waits=waits):
      waiting.close()
      try:
        yield folder
      finally:
        with contextlib.suppress(OSError):
          os.rmdir(folder)


# ---- Releases -----------------------------------------------------------------------------------

MAX_PAGES = 10  # of 100 releases each: limits what a server whose list never ends can cost
TAG_RE = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}\Z"


class Release(NamedTuple):
  """One release: its tag, and the SHA-256 of each asset by name, empty if unknown."""

  tag: str
  assets: Dict[str, str]


def newest_tag(net: Net, repo: str) -> str:
  """The tag of a repository's newest release, read from the redirect of releases/latest.

  GitHub redirects to …/releases/tag/TAG, without an API quota, and skips prereleases. On a plain
  file server releases/latest is a file that contains the tag.
  """
  url, body = f"{net.releases}/{repo}/releases/latest", b""
  try:
    body = with_retries(net, url, lambda: fetch_bytes(net, url))
    tag = body[:200].decode("ascii", "replace").strip()
  except ReleasePage as page:
    tag = page.tag
  if not re.match(TAG_RE, tag):
    kind = ": it is an HTML page" if looks_like_html(body) else ""
    raise QvmError(
      f"{redacted(url)} names no release{kind}",
      f"does {repo} have releases? does this network first want a login in a browser?",
    )
  return tag


def releases_hint(net: Net, repo: str) -> str:
  """Where a user can look at what releases there are."""
  return f"see {net.releases}/{repo}/releases"


def api_release(data: Any) -> Optional[Release]:
  """A release from the API's JSON; None for drafts, prereleases and anything else."""
  if not isinstance(data, dict) or data.get("draft") or data.get("prerelease"):
    return None
  tag, assets = data.get("tag_name"), data.get("assets")
  if not isinstance(tag, str) or not re.match(TAG_RE, tag) or not isinstance(assets, list):
    return None
  found = {}
  for asset in assets:
    if isinstance(asset, dict) and isinstance(asset.get("name"), str):
      digest = asset.get("digest")
      sound = isinstance(digest, str) and re.match(r"sha256:[0-9a-f]{64}\Z", digest)
      found[asset["name"]] = str(digest)[7:] if sound else ""
  return Release(tag, found)


def api_data(net: Net, path: str) -> Any:
  """The API's answer, from a single attempt; QvmError says why there is none."""
  url = f"{net.api}/{path}"
  try:
    return parse_json(fetch_bytes(net, url))
  except (ValueError, RecursionError, MemoryError):
    raise QvmError(f"{redacted(url)}: the answer is not JSON")
  except Transient as error:
    raise QvmError(str(error))


def api_releases(net: Net, repo: str) -> List[Release]:
  """All releases of a repository from the API, newest first."""
  releases: List[Release] = []
  for page in range(1, MAX_PAGES + 1):
    data = api_data(net, f"{repo}/releases?per_page=100&page={page}")
    if not isinstance(data, list):
      raise QvmError(f"{redacted(net.api)}/{repo}/releases: the answer is not a list of releases")
    releases += [release for release in map(api_release, data) if release]
    if len(data) < 100:
      break
  return releases


def page_release(net: Net, repo: str, tag: str) -> Release:
  """A release from its page fragment, which links the assets and often shows their digests."""
  text = get_page(net, f"{net.releases}/{repo}/releases/expanded_assets/{urllib.parse.quote(tag)}")
  assets: Dict[str, str] = {}
  pieces = re.split(r'href="[^"]*/releases/download/[^"/]+/([^"/]+)"', text)
  for name, after in zip(map(urllib.parse.unquote, pieces[1::2]), pieces[2::2]):
    digest = re.search(r"\bsha256:([0-9a-f]{64})\b", after)
    assets[name] = digest.group(1) if digest else assets.get(name, "")
  return Release(tag, assets)


def page_releases(net: Net, repo: str) -> List[Release]:
  """The newest releases from the web pages, with one request each; a mirror may have only one.

  The feed does not mark prereleases. qvm skips what is newer than the newest release or is named
  like a prerelease.
  """
  newest = newest_tag(net, repo)
  tags = [newest]
  with contextlib.suppress(NotFound):
    feed = get_page(net, f"{net.releases}/{repo}/releases.atom")
    found = map(urllib.parse.unquote, re.findall(r'/releases/tag/([^"<>/\s]+)"', feed))
    listed = [tag for tag in dict.fromkeys(found) if re.match(TAG_RE, tag)]
    tags = listed[listed.index(newest) :] if newest in listed else [newest, *listed]
  releases = []
  for tag in tags:
    if tag != newest and re.search(r"[0-9][-._]?(alpha|beta|rc|pre)", tag.lower()):
      continue
    with contextlib.suppress(NotFound):
      releases.append(page_release(net, repo, tag))
  return releases


def tagged_release(net: Net, repo: str, tag: str) -> Release:
  """A release's data from the API, else from its page; empty if neither has such a release."""
  if net.api:
    with contextlib.suppress(QvmError):
      release = api_release(api_data(net, f"{repo}/releases/tags/{tag}"))
      if release:
        return release
  with contextlib.suppress(NotFound):
    return page_release(net, repo, tag)
  return Release(tag, {})


class Releases:
  """What this run has learned about releases; threads share it, so each request is made once."""

  def __init__(self, net: Net) -> None:
    self.net = net
    self.lock = threading.Lock()
    self.asked: Dict[Tuple[str, ...], Future[Any]] = {}

  def once(self, key: Tuple[str, ...], function: Callable[[], T]) -> T:
    """The result of the first call with this key."""
    with self.lock:
      if key not in self.asked:
        self.asked[key] = Future(function)
      later = self.asked[key]
    return later.result()  # type: ignore[no-any-return]

  def tag(self, repo: str) -> str:
    """The tag of the newest release."""
    return self.once((repo,), lambda: newest_tag(self.net, repo))

  def digest(self, asset: Asset) -> str:
    """The SHA-256 of an asset; empty if no release data includes it, or none can be had soon."""
    repo, tag, name = asset
    with contextlib.suppress(QvmError):
      release = self.once((repo, tag), lambda: tagged_release(impatient(self.net), repo, tag))
      return release.assets.get(name, "")
    return ""

  def forget(self, asset: Asset) -> None:
    """Request the data of an asset's release again when it is next needed."""
    with self.lock:
      self.asked.pop((asset.repo, asset.tag), None)

  def all(self, repo: str) -> List[Release]:
    """All releases, newest first, as far as the API or else the pages list them."""
    return self.once((repo, "", "all"), lambda: self.listed(repo))

  def listed(self, repo: str) -> List[Release]:
    """Request what all() returns."""
    if self.net.api:
      try:
        releases = api_releases(self.net, repo)
        if releases:
          return releases
      except QvmError as error:
        say(f"{error}; reading the release pages instead")
    return page_releases(self.net, repo)


class Image(NamedTuple):
  """An available image: the newest release that has it, and the asset's name there."""

  version: str
  arch: str
  release: str
  asset: str


def images_in(os_name: str, releases: Sequence[Release]) -> List[Image]:
  """The images of an OS, newest version first, each from the newest release that has it."""
  found: Dict[Tuple[str, str], Image] = {}
  pattern = re.compile(re.escape(os_name) + r"-(.+)-(x86-64|arm64)\.(qcow2|tar\.zst)\Z")
  for release in releases:
    for name in sorted(release.assets):  # .qcow2 before .tar.zst
      match = pattern.match(name)
      if match and re.match(VERSION_RE, match.group(1)):
        version, arch = match.group(1), match.group(2)
        found.setdefault((version, arch), Image(version, arch, release.tag, name))
  return sorted(found.values(), key=lambda image: version_key(image.version), reverse=True)


def version_key(version: str) -> List[Tuple[int, int, str]]:
  """Sorts versions: 9.4 < 10.0, r1beta4 < r1beta6 < r1, r151056 < r151058, 15.0-rc1 < 15.0."""
  key = []
  for number, word in re.findall(r"([0-9]+)|([a-z]+)", version.lower()):
    early = word in ("alpha", "beta", "rc", "pre")
    key.append((2, int(number), "") if number else (0 if early else 3, 0, word))
  return [*key, (1, 0, "")]


def is_candidate(version: str) -> bool:
  """Whether a version is a release candidate; `latest` never selects one."""
  return bool(re.search(r"(^|[^a-z])rc[0-9]*($|[^a-z])", version.lower()))


def newest_of(versions: Sequence[str], beginning: str = "") -> str:
  """The newest version with this beginning, of which each part counts whole: 15 does not begin 150.

  A version that is exactly so comes first. Empty if there is none.
  """
  if beginning in versions:
    return beginning
  parts = version_key(beginning)[:-1]
  found = [each for each in versions if version_key(each)[: len(parts)] == parts]
  found = [each for each in found if is_candidate(beginning) or not is_candidate(each)]
  return max(found, key=version_key) if found else ""


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


def safe_path(name: str) -> str:
  """An archive member's name without "." parts; ValueError when it could lead out of the tree."""
  if name.startswith("/") or "\0" in name or len(os.fsencode(name)) > MAX_PATH_BYTES:
    raise ValueError("is not a plain path")
  parts = [part for part in name.split("/") if part not in ("", ".")]
  if any(len(os.fsencode(part)) > 255 for part in parts):
    raise ValueError("has too long a name")
  if ".." in parts:
    raise ValueError("leads out of its folder")
  return "/".join(parts)


def check_link(path: str, target: str) -> None:
  """A symbolic link may only climb within the tree, and only at the start of its target."""
  if not target or target.startswith("/") or "\0" in target or len(target) > MAX_PATH_BYTES:
    raise ValueError(f"is a link to {target[:100]}")
  words = [word for word in target.split("/") if word not in ("", ".")]
  climbs = len(list(itertools.takewhile(lambda word: word == "..", words)))
  if climbs > path.count("/") or ".." in words[climbs:]:
    raise ValueError(f"is a link out of its folder, to {target[:100]}")


BLOCK = 512  # of a tar
EXTENDED = (b"L", b"K", b"x", b"g", b"X")  # headers that another one follows


class Tape:
  """An untrusted tar stream as tarfile reads it, forwards only, which can be looked at ahead."""

  def __init__(self, stream: IO[bytes]) -> None:
    self.stream, self.position = stream, 0
    self.allowed = 0  # how far tarfile may read
    self.buffer, self.start = b"", 0  # bytes of the stream, and where the next one is in them

  def peek(self, start: int, size: int) -> bytes:
    """Bytes that are still to be read, from so many on; fewer at the end of the stream."""
    while self.start + start + size > len(self.buffer):
      more = self.stream.read(CHUNK_BYTES)
      self.buffer, self.start = self.buffer[self.start :] + more, 0
      if not more:
        break
    return self.buffer[self.start + start : self.start + start + size]

  def read(self, size: int) -> bytes:
    """Read; ValueError where that is more than tarfile has a reason to."""
    data = self.peek(0, size)
    self.start, self.position = self.start + len(data), self.position + len(data)
    if self.position > self.allowed:
      raise ValueError("it has headers without end")
    return data

  def tell(self) -> int:
    return self.position

  def seek(self, position: int) -> None:
    """Skip what comes before a position; ValueError if that is not to be."""
    if not 0 <= position - self.position <= MAX_DISK_BYTES + BLOCK:
      raise ValueError("it has a member of an impossible size")
    self.allowed = position
    while self.position < position:
      if not self.read(min(CHUNK_BYTES, position - self.position)):
        raise ValueError("it is cut short")

  def at_member(self, several: bool) -> bool:
    """Whether a member comes next; ValueError where it is cut short, or has too many headers.

    tarfile takes a cut header for the end of an archive, and follows headers that announce further
    ones until the stack or the memory is used up.
    """
    ended = several and not self.position
    block = self.peek(0, BLOCK)
    while block == bytes(BLOCK) and several:
      ended, block = bool(self.read(BLOCK)), self.peek(0, BLOCK)
    if block == bytes(BLOCK) or (ended and not block):
      return False
    if len(block) < BLOCK:
      raise ValueError("it is cut short")
    place = 0
    for _ in range(MAX_HEADERS + 1):
      block = self.peek(place, BLOCK)
      if block[156:157] not in EXTENDED:
        return True
      size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
      if not 0 <= size <= MAX_HEADER_BYTES:
        raise ValueError(f"it has a header of {size} bytes")
      if block[156:157] not in b"LK":
        check_pax(self.peek(place + BLOCK, size))
      place += BLOCK + size + -size % BLOCK
    raise ValueError("it has headers without end")


def check_pax(data: bytes) -> None:
  """ValueError for what is no pax header, or one for which tarfile's patterns take hours."""
  place, record = 0, re.compile(rb"([0-9]{1,7}) [^=\n]{1,2000}=")
  while place < len(data) and data[place]:  # tarfile takes zeros for the end
    match = record.match(data, place)
    end = place + int(match.group(1)) if match else 0
    if not match or end <= match.end() or data[end - 1 : end] != b"\n":
      raise ValueError("it has a damaged header")
    place = end
  if re.search(rb"[0-9]{1000}", data):  # a name has 255 at most
    raise ValueError("it has a header with a number without end")


def tar_members(
  stream: IO[bytes], headers: int, several: bool = False
) -> Iterator[Tuple[Tape, "tarfile.TarInfo"]]:
  """The members of an untrusted tar stream, or of several one behind the other.

  Each comes with the tape, which is at its content. ValueError when the stream is damaged, cut
  short, or has more than so many bytes of headers for one member.
  """
  tape: Any = Tape(stream)
  while True:
    tape.allowed = tape.position + headers + CHUNK_BYTES
    try:
      if not tape.at_member(several):
        return
      # One archive for each member: it would keep all, and nothing of it is needed for the next.
      archive = tarfile.TarFile(fileobj=tape, encoding="utf-8", errors="surrogateescape")
      member = next(iter(archive), None)  # next() itself would go back where there is none
    except (tarfile.TarError, LookupError, OverflowError, RecursionError, MemoryError) as error:
      raise ValueError(f"it is no tar stream, or damaged: {describe(error)}")
    if member is None:  # which tarfile takes for the end
      raise ValueError("it is no tar stream, or damaged")
    member.name, member.linkname = from_utf8(member.name), from_utf8(member.linkname)
    if not 0 <= member.size <= MAX_DISK_BYTES:
      raise ValueError(f"it has a member of {member.size} bytes")
    tape.allowed = tape.position + member.size
    yield tape, member
    tape.seek(archive.offset)


def pieces_of(member: "tarfile.TarInfo") -> List[Tuple[int, int]]:
  """The (offset, size) of what a member has between its holes; ValueError when they overlap."""
  sparse: Any = member.sparse if member.issparse() else [(0, member.size)]
  pieces, end = [(offset, size) for offset, size in sparse if size], 0  # tarfile adds (0, 0)
  for offset, size in pieces:
    if size < 0 or offset < end or offset + size > member.size:
      raise ValueError("has pieces out of place")
    end = offset + size
  return pieces


def check_dir_fd() -> None:
  """Refuse a Python that cannot do what Folder does, such as python.org's 3.8 for macOS."""
  if os.open not in os.supports_dir_fd:
    raise QvmError(
      "this takes a Python that opens files relative to a folder, and this one cannot",
      "take Python 3.9 or newer, from python.org, or your system's",
    )


class Folder:
  """A folder, opened once; what is below it is reached step by step and through no link.

  Paths are relative to it and plain, as safe_path() returns them.
  """

  def __init__(self, path: str) -> None:
    self.path = path
    self.root = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    self.inner, self.inner_path = os.dup(self.root), ""

  def close(self) -> None:
    os.close(self.inner)
    os.close(self.root)

  def enter(self, path: str) -> int:
    """A descriptor of a folder below, good until the next call; OSError where there is none."""
    if path == self.inner_path:
      return self.inner
    is_deeper = f"{path}/".startswith(f"{self.inner_path}/")
    fd = os.dup(self.inner if is_deeper else self.root)
    try:
      for name in path[len(self.inner_path) if is_deeper else 0 :].split("/"):
        if name:
          flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
          above, fd = fd, os.open(name, flags, dir_fd=fd)
          os.close(above)
      fd, self.inner, self.inner_path = self.inner, fd, path
    finally:
      os.close(fd)
    return self.inner

  def at(self, path: str) -> Tuple[int, str]:
    """A descriptor of the folder that something is in, as enter() gives it, and its name there."""
    return self.enter(os.path.dirname(path)), os.path.basename(path)

  def do(self, function: Callable[..., T], path: str, *words: object, **more: object) -> T:
    """Call a function of os for something below, by its name and the folder that it is in."""
    fd, name = self.at(path)
    return function(name, *words, dir_fd=fd, **more)

  def stat(self, path: str) -> os.stat_result:
    """What lstat says of something below."""
    return self.do(os.stat, path, follow_symlinks=False)

  def rename(self, old: str, new: str) -> None:
    """Rename something within its folder."""
    fd, name = self.at(new)
    os.rename(os.path.basename(old), name, src_dir_fd=fd, dst_dir_fd=fd)

  def make(self, path: str) -> int:
    """As enter(), but folders that are missing are made."""
    with contextlib.suppress(FileNotFoundError):
      return self.enter(path)
    for each in [*reversed([*folders_above(path)]), path]:
      with contextlib.suppress(FileExistsError):
        self.do(os.mkdir, each, 0o755)
    return self.enter(path)

  def open_file(self, path: str) -> IO[bytes]:
    """A plain file below, for reading; OSError or ValueError when there is none."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO would let us wait for ever
    fd = self.do(os.open, path, flags)
    if S_ISREG(os.fstat(fd).st_mode):
      return os.fdopen(fd, "rb", 0)
    os.close(fd)
    raise ValueError("is no file")

  def new_file(self, path: str) -> IO[bytes]:
    """A file that is new below, for writing; only its owner may open it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.fdopen(self.do(os.open, path, flags, 0o600), "w+b")

  def link(self, path: str, target: str) -> None:
    """Make a symbolic link below; ValueError when it leads out."""
    check_link(path, target)
    fd, name = self.at(path)
    os.symlink(target, name, dir_fd=fd)

  def write_member(self, tape: Tape, member: "tarfile.TarInfo", file: IO[bytes]) -> None:
    """Write a file of an archive, or a copy of the one that a hard link leads to.

    Its holes, and what is zero throughout, take no space on the disk. The pieces of a sparse member
    lie one behind the other in the stream, which is at the first.
    """
    if member.islnk():
      with self.open_file(safe_path(member.linkname)) as source:
        return shutil.copyfileobj(source, file, CHUNK_BYTES)
    zeros = bytes(CHUNK_BYTES)
    for offset, size in pieces_of(member):
      while size > 0:
        chunk = tape.read(min(size, CHUNK_BYTES))
        if not chunk:
          raise ValueError("is cut short")
        if chunk != zeros[: len(chunk)]:
          file.seek(offset)
          file.write(chunk)
        offset, size = offset + len(chunk), size - len(chunk)
    file.truncate(member.size)


def folders_above(path: str) -> Iterator[str]:
  """The paths of the folders that something is in, the innermost first; also of no plain path."""
  above = os.path.dirname(path)
  while above and above != path:
    yield above
    path, above = above, os.path.dirname(above)


def unpack(stream: IO[bytes], path: str, limits: Limits, expected: Sequence[str] = ()) -> None:
  """Unpack a tar stream into a new folder, or refuse it whole with a ValueError.

  Then the caller throws the folder away. Expected names, if given, are all that it may hold.
  Section Sync has a Receiver, which leaves out what it refuses.
  """
  os.mkdir(path, 0o755)
  with contextlib.closing(Folder(path)) as folder:
    size = 0
    for number, (tape, member) in enumerate(tar_members(stream, limits.headers)):
      try:
        size += size_of(folder, member)
        if number >= limits.members or size > limits.size:
          raise ValueError("is one too many for an honest archive")
        unpack_member(folder, tape, member, expected)
      except ValueError as error:
        raise ValueError(f"its member '{member.name[:100]}' {error}")
      except OSError as error:
        if error.errno not in BAD_NAME_ERRORS:
          raise
        raise ValueError(f"its member '{member.name[:100]}' finds no place: {describe(error)}")


def size_of(folder: Folder, member: "tarfile.TarInfo") -> int:
  """The bytes of a member, holes included, or of the file that a hard link leads to."""
  if not member.islnk():
    return member.size
  try:
    return folder.stat(safe_path(member.linkname)).st_size
  except OSError:
    raise ValueError(f"is a link to {member.linkname[:100]}, which has not come")


def unpack_member(
  folder: Folder, tape: Tape, member: "tarfile.TarInfo", expected: Sequence[str]
) -> None:
  """Give a member its place; ValueError when it is not a plain file, folder or link."""
  path = safe_path(member.name)
  if member.mode & 0o4000 or (member.mode & 0o2000 and not member.isdir()):
    raise ValueError("has a set-uid or set-gid bit")
  if expected and path and not (member.isreg() and path in expected):
    raise ValueError("is not expected")
  if not path and not member.isdir():
    raise ValueError("has no name")
  folder.make(path if member.isdir() else os.path.dirname(path))
  if member.issym():
    folder.link(path, member.linkname)
  elif member.islnk() or member.isreg():
    with folder.new_file(path) as file:
      folder.write_member(tape, member, file)
      os.fchmod(file.fileno(), 0o755 if member.mode & 0o100 else 0o644)
  elif not member.isdir():
    raise ValueError("is a device or another special file")


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
    with open_packed(path) as stream:
      unpack(stream, folder, QEMU_LIMITS)
    return find_unpacked(folder, names)
  except (zlib.error, lzma.LZMAError, ValueError, EOFError) as error:
    problem = str(error).split("\n")[0].rstrip(":") or "it is damaged"
  except OSError as error:
    if error.errno is not None:
      raise write_failure(folder, os.path.getsize(path), error)  # a plain tar is no smaller
    problem = describe(error)  # of a damaged gzip or bzip2 file
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


def unpack_bundle(path: str, folder: str, name: str) -> None:
  """Unpack disk.img and kernel, and nothing else, from a bundle into a new folder.

  ValueError when the bundle is damaged or hostile.
  """
  zstd = python_zstd()
  if not zstd:
    return unpack_by_program(path, folder, name)
  try:
    with zstd.open(path) as stream:
      unpack_disk(stream, folder)
  except zstd.ZstdError as error:
    raise ValueError(str(error))


class UnpackerError(QvmError):
  """A program that unpacks has failed."""


def unpack_by_program(path: str, folder: str, name: str) -> None:
  """As unpack_bundle(), by a program; UnpackerError with its words when that fails.

  Such a failure does not say whether the bundle is damaged or the program at fault.
  """
  with open(path, "rb") as packed, tempfile.TemporaryFile() as words:
    command = unzstd_command()
    process = start(command, Spawn(packed, subprocess.PIPE, words))
    assert process.stdout
    try:
      try:
        unpack_disk(process.stdout, folder)
      finally:
        ended = not process.stdout.read(1)  # else it is ended because of what it has unpacked
        process.stdout.close()
        if ended and process.wait():
          words.seek(0)
          text = " ".join(words.read(TAIL_BYTES).decode("utf-8", "replace").split())
          raise UnpackerError(
            f"{command[0]} cannot unpack {name} ({ending(process.returncode)}): {text}",
            "the download is kept, should the program be at fault; qvm clean deletes it",
          )
    finally:
      end_process(process)


def unpack_disk(stream: IO[bytes], folder: str) -> None:
  """Unpack the tar stream of a bundle, and look at all that follows: the checksum comes last."""
  unpack(stream, folder, BUNDLE_LIMITS, ("disk.img", "kernel"))
  if all(stream.read(CHUNK_BYTES) for _ in range(MAX_REST_BYTES // CHUNK_BYTES)):
    raise ValueError("it does not end")
  if not os.path.isfile(os.path.join(folder, "disk.img")):
    raise ValueError("it holds no disk.img")


# ---- Store --------------------------------------------------------------------------------------


def tree_of(path: str) -> str:
  """The tree of a QEMU that a cached file, its program, stands for; empty for any other file."""
  program = os.path.basename(path).startswith("qemu-system-")
  return os.path.dirname(os.path.dirname(path)) if program else ""


def record_path(path: str) -> str:
  """Where the record of a cached file is; that of a QEMU's program stands for its whole tree."""
  if tree_of(path):
    return os.path.join(tree_of(path), "release.json")
  return (path[: -len(".qcow2")] if path.endswith(".qcow2") else path) + ".json"


def publish_with_record(
  cache: Cache, source: str, target: str, record: AssetRecord, mode: int
) -> None:
  """Publish a file with its record, so that a kill at any moment leaves them matching.

  Until the file has its place, its record waits beside the old one and tells by size and time which
  of the two files it is meant for; record_of takes the one that fits.
  """
  waiting, stat = record_path(target) + ".new", os.stat(source)
  record = record._replace(mtime_ns=stat.st_mtime_ns, bytes=stat.st_size)
  write_record(cache, waiting, record, 0o444, keep=True)
  move_into_place(source, target, mode)
  with contextlib.suppress(FileNotFoundError):  # another qvm's record_of() was faster
    move(waiting, record_path(target), True)


def record_of(path: str) -> AssetRecord:
  """The record of a cached file; an empty one when there is none."""
  waiting = record_path(path) + ".new"
  new = sound_record(AssetRecord(), waiting)
  stat = os.stat(path) if new.bytes and os.path.exists(path) else None
  if stat and (new.bytes, new.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
    with contextlib.suppress(OSError):
      os.replace(waiting, record_path(path))  # what the killed qvm was about to do
    return new
  return sound_record(AssetRecord(), record_path(path))


def cached_images(cache: Cache, os_name: str) -> List[Image]:
  """The base images of an OS that are cached, the newest version first."""
  return images_in(os_name, [Release("", dict.fromkeys(names_in(cache.path("base")), ""))])


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


def image_format(path: str) -> str:
  """The format of a user's own image: whatever is no qcow2 is a raw disk."""
  with open(path, "rb") as file:
    return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


def virtual_size(path: str) -> int:
  """The size in bytes of the disk in an image, from the header if it is a qcow2."""
  with open(path, "rb") as file:
    head = file.read(32)
  return int.from_bytes(head[24:], "big") if head[:4] == b"QFI\xfb" else os.path.getsize(path)


def backing_file(path: str) -> Optional[str]:
  """The name of the backing file in an overlay's header; empty: it has none, None: unknown.

  An overlay of which this is unknown may need any base image and layer.
  """
  try:
    with open(path, "rb") as file:
      head = file.read(20)
      file.seek(int.from_bytes(head[8:16], "big"))
      name, length = file.read(1023), int.from_bytes(head[16:20], "big")
  except (OSError, OverflowError, ValueError):
    return None
  sound = head[:4] == b"QFI\xfb" and len(head) == 20 and length <= len(name)
  return os.fsdecode(name[:length]) if sound else None


STREAMED = "nbd+unix:"  # the backing of an overlay that was begun while its base image came


def is_served(backing: Optional[str]) -> bool:
  """Whether a backing is a base image that is incomplete, at the socket of its server."""
  return bool(backing) and str(backing).startswith(STREAMED)


def is_streamed(disk: str) -> bool:
  """Whether an overlay lies on a base image that was incomplete when it was last used."""
  return is_served(backing_file(disk))


def socket_of(disk: str) -> str:
  """The path of the socket at which an overlay's base image was served; empty if it was not."""
  backing = backing_file(disk) or ""
  return backing.partition("socket=")[2] if is_served(backing) else ""


def drop_socket(path: str) -> None:
  """Remove the socket and the folder of a server that was killed and left them."""
  if re.search(r"/qvm-[a-z0-9_]{8}/nbd\Z", path):
    with contextlib.suppress(OSError):
      os.unlink(path)
      os.rmdir(os.path.dirname(path))


def drop_dead_sockets(folder: str) -> None:
  """Remove what servers that were killed before there was an overlay left among temporary files."""
  for path in [os.path.join(path, "nbd") for path in paths_in(folder)]:
    with contextlib.suppress(OSError):
      info = os.lstat(path)
      mine = S_ISSOCK(info.st_mode) and info.st_uid == os.getuid()
      if mine and time.time() > info.st_mtime + 60:  # a younger one may not listen yet
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
          probe.settimeout(1)
          if probe.connect_ex(path) == errno.ECONNREFUSED:
            drop_socket(path)


def known_instance(paths: InstancePaths) -> Instance:
  """The record of an instance; empty but for the name if it cannot be read, for any reason."""
  return known_record(Instance(), paths.record)._replace(name=paths.name)


def is_another(folder: str, backing: str, ours: str) -> bool:
  """Whether an overlay's backing, as seen from its folder, is a file, but not ours, in the cache.

  The name that qvm itself writes is ours, whatever is there once the folder has been moved.
  """
  if backing == os.path.join("..", *ours.split("/")[-2:]):
    return False
  path = os.path.join(folder, backing)
  return os.path.exists(path) and not (os.path.exists(ours) and os.path.samefile(path, ours))


def layers_under(cache: Cache, disk: str) -> Tuple[List[str], Optional[str]]:
  """The names of the layers under an overlay, from the top down, and what the last one lies on.

  That is as backing_file() tells it.
  """
  names: List[str] = []
  backing = backing_file(disk)
  while backing:
    match = re.match(LAYER_RE, os.path.basename(backing))
    layer = cache.layer(match.group(1)) if match else None
    if not layer or is_another(os.path.dirname(disk), backing, layer.disk):
      break
    if layer.name in names:
      return names, None  # a circle
    names.append(layer.name)
    disk, backing = layer.disk, backing_file(layer.disk)
  return names, backing


class Overlay(NamedTuple):
  """The disk of an instance or a layer, and what it lies on; None: unknown, it may be anything."""

  name: str
  disk: str
  layers: List[str]  # the names of those under it, from the top down
  backing: Optional[str]  # what the last of them lies on, as backing_file() tells it
  base: Optional[str]  # the file name of the base image that an instance needs; empty: none


def base_name(cache: Cache, backing: str) -> str:
  """The file name of the base image that a backing is; empty: it is an image of the user's own."""
  if not os.path.isabs(backing):
    return os.path.basename(backing)
  folder, name = os.path.split(os.path.realpath(backing))  # a user's own may be a link to it
  return name if folder == os.path.realpath(cache.path("base")) else ""


def overlay_of(paths: InstancePaths) -> Overlay:
  """The disk of an instance."""
  names, backing = layers_under(paths.cache, paths.disk)
  base: Optional[str]
  if backing is None or is_served(backing):
    mine = known_instance(paths)
    recorded = f"{mine.os}-{mine.version}-{mine.arch}.qcow2" if mine.arch else None
    base = "" if mine.image else recorded
  else:
    base = base_name(paths.cache, backing)
  return Overlay(paths.name, paths.disk, names, backing, base)


def overlays(cache: Cache, ephemeral: bool = True) -> List[Overlay]:
  """The disks of all instances, then of all layers, even those that cannot be read.

  Those of --rm machines can be left out: they run, and have the files of their layers open.
  """
  found = [overlay_of(it) for it in instances(cache) if ephemeral or not os.path.exists(it.mark)]
  found += [Overlay(it.name, it.disk, *layers_under(cache, it.disk), "") for it in layers(cache)]
  return [it for it in found if os.path.lexists(it.disk)]  # the others have just ended


def users_of(layer: LayerPaths, every: Iterable[Overlay], but: Sequence[str] = ()) -> List[str]:
  """The names of the overlays that need a layer, or may, but for those of these disks."""
  others = [it for it in every if it.disk not in (layer.disk, *but)]
  return [it.name for it in others if layer.name in it.layers or it.backing is None]


def dependants(plan: Plan) -> List[Instance]:
  """The instances that need the base image, or may: unknown counts as needed while it is there.

  They lie on it, or on a layer on it, or will lie on it once it is complete.
  """
  names = (os.path.basename(plan.base), *[None] * (not is_missing(plan, plan.base)))
  mine = [it for it in overlays(plan.cache) if it.base in names]
  records = [(known_instance(plan.cache.instance(it.name)), it.disk) for it in mine]
  return [record for record, disk in records if os.path.lexists(disk)]  # the others have just ended


def fits(instance: Instance, record: AssetRecord) -> bool:
  """Whether an overlay can be on a base image: it was created on the same contents."""
  if not instance.base_sha256:  # it was begun while the image was incomplete
    return bool(instance.validator) and instance.validator == record.validator
  same_asset = bool(instance.asset_sha256) and instance.asset_sha256 == record.asset_sha256
  return same_asset or instance.base_sha256 == record.sha256


def check_unneeded(plan: Plan, verb: str, image: Optional[AssetRecord] = None) -> None:
  """Refuse to replace the base image, by another one or by this, if instances need it."""
  names = [
    each.name for each in dependants(plan) if not image or not (each.problem or fits(each, image))
  ]
  if names:
    raise QvmError(
      f"{plan.base} cannot be {verb}: these instances depend on it: {', '.join(names)}",
      "qvm rm deletes them, with all that their guests wrote",
    )


def pinned_release(plan: Plan, releases: Releases) -> str:
  """The release from which a base image must come that instances depend on; empty: any.

  Their records name it, or the digest of the image. QvmError if it cannot be found out.
  """
  mine = [each for each in dependants(plan) if not each.problem]
  tags = [each.release for each in mine if re.match(TAG_RE, each.release)]
  digests = {each.base_sha256 for each in mine if each.base_sha256}
  if digests and not tags:
    every = releases.all(image_repo(plan.guest.os))
    tags = [each.tag for each in every if each.assets.get(plan.image_asset) in digests]
  if mine and not tags:
    raise gone_image(plan, "a release that is not known")
  return tags[0] if tags else ""


def condemn(plan: Plan, problem: str, validator: str, but: str = "") -> None:
  """Let the instances not be started any more that have run on an object which is no good."""
  names = []
  with instances_lock(plan.cache):
    for record in dependants(plan):
      paths = plan.cache.instance(record.name)
      mine = record.validator == validator and is_streamed(paths.disk)
      if mine and record.name != but and not os.path.exists(paths.mark):
        record = record._replace(problem=problem[:1000])
        write_record(plan.cache, paths.record, record, keep=True)
        names.append(record.name)
  if names:
    say(f"what was downloaded of {plan.image_asset} is no good, and these instances have run on "
        f"it; they are kept, but not started any more: {', '.join(names)}")  # fmt: skip


def layer_files(layer: LayerPaths) -> List[str]:
  """The files that there are of a layer, its record first."""
  return [path for path in (layer.record, *layer.parts) if os.path.exists(path)]


def remove_layer(layer: LayerPaths) -> None:
  """Delete a layer under instances_lock, its record first; machines that run from it go on."""
  for path in layer_files(layer):
    remove_file(path)


def drop_layers(plan: Plan, new: AssetRecord) -> None:
  """Remove the layers on another base image than the one that is about to take its place."""
  every, name = overlays(plan.cache), os.path.basename(plan.base)
  mine = [it.disk for it in every if base_name(plan.cache, it.backing or "") == name]
  digests = (new.sha256, new.asset_sha256)
  old = [it for it in layers(plan.cache) if layer_record(it).base_sha256 not in digests]
  old = [it for it in old if it.disk in mine]
  for layer in old:
    if not users_of(layer, every, [each.disk for each in old]):
      remove_layer(layer)


def fetch_asset(
  releases: Releases, asset: Asset, folder: str, plan: Optional[Plan] = None
) -> Download:
  """Download an asset into a folder and check its digest; one that differs is fetched once more.

  plan is an image's: instances may have run on what was there of one that differs.
  """
  for last in (False, True):
    expected = Future(lambda: releases.digest(asset))
    result = download(releases.net, asset, folder)
    validator = result.file.note.validator
    try:
      wanted = expected.result()
      if not wanted and asset.repo == "resources" and is_open(releases.net.releases):
        raise QvmError(
          f"{redacted(result.url)} comes over http and without a digest, and qvm would execute it",
          "qvm pull --mirror makes a mirror with digests; or use an https address",
        )
      check_digest(result, wanted)
      break
    except RefusedError as problem:
      if result.resumed and plan:
        condemn(plan, str(problem), validator)
      if last:
        raise
      say(f"{problem}; fetching it once more")
      releases.forget(asset)
  return result


def check_digest(download: Download, expected: str) -> None:
  """Discard a download that lacks the SHA-256 that its release names; empty: it names none."""
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
  download.vouched = bool(expected)


def asset_record(download: Download, digest: str) -> AssetRecord:
  """The record of a complete asset; digest: of what was made of it, empty for the asset itself."""
  asset_digest = download.file.hash.hexdigest()
  return AssetRecord(
    release=download.asset.tag,
    url=download.url,
    validator=download.file.note.validator,
    size=download.file.done,
    asset_sha256=asset_digest,
    sha256=digest or asset_digest,
    time=utc(time.time()),
  )


@contextlib.contextmanager
def installing(download: Download) -> Iterator[str]:
  """Give a folder's path, to unpack a download there; both are gone once it is installed.

  A download that turns out to be damaged or hostile is given up.
  """
  aside = os.path.join(download.file.folder, "unpacked")
  try:
    yield aside
    download.file.close(remove=True)
  except RefusedError:
    download.file.discard()
    raise
  finally:
    remove_tree(aside)


def resources_asset(plan: Plan, releases: Releases, name: str) -> Asset:
  """An asset of the release that QEMU and qemu-img come from."""
  return Asset("resources", plan.qemu_release or releases.tag("resources"), name)


def is_newest(path: str, net: Net, asset: Asset) -> bool:
  """Whether a cached file is this asset, the server's newest, or a newer one; says so.

  A newer one is kept: whoever can offer an older release could bring back its faults.
  """
  record, (_, tag, name) = record_of(path), asset
  if record.url == asset.url(net):
    say(f"{name} of {tag} is the newest")
    return True
  newer = re.match(TAG_RE, record.release) and version_key(record.release) > version_key(tag)
  if newer:
    say(f"the server's newest {name} is {tag}, older than {record.release} here, which is kept")
  return bool(newer)


def is_missing(plan: Plan, path: str) -> bool:
  """Whether a cached file must be downloaded; QvmError if it may be somewhere else."""
  check_mounted(path)
  return path in plan.damaged or not os.path.isfile(path)


Install = Callable[[Plan, Download], None]


def fetch_resource(plan: Plan, releases: Releases, path: str, name: str, install: Install) -> None:
  """Download an asset of the release of QEMU and install it, if `path` is missing or older."""
  with download_lock(plan.cache.downloads, pinned_name(name, plan.qemu_release)) as folder:
    there = not is_missing(plan, path)
    if not there or plan.refresh:
      asset = resources_asset(plan, releases, name)
      if not there or not is_newest(path, releases.net, asset):
        try:
          return install(plan, fetch_asset(releases, asset, folder))
        except NotFound as error:
          raise QvmError(str(error), releases_hint(releases.net, "resources"))
    remove_tree(folder)  # what a qvm has left that was killed once it had installed it


def install_qemu(plan: Plan, download: Download) -> None:
  """Put the tree of a downloaded QEMU in place."""
  with installing(download) as aside:
    program = unpack_aside(download.file.part, aside, ("bin/qemu",))
    root = os.path.dirname(os.path.dirname(program))
    named = os.path.join(root, "bin", os.path.basename(plan.tree_program))
    note = os.path.join(root, "release.json")
    # Some archives may have the program under both names.
    taken = os.path.lexists(note) or (os.path.lexists(named) and not os.path.isfile(named))
    if taken or not os.path.isdir(os.path.join(root, "share", "qemu")):
      raise RefusedError(f"{plan.qemu_asset} is refused: it is not laid out as a QEMU")
    if not os.path.isfile(named):
      os.rename(program, named)
    os.chmod(named, 0o755)
    record = asset_record(download, tree_sha256(root))
    write_record(plan.cache, note, record._replace(bytes=tree_bytes(root)))
    swap_tree(plan.cache, root, tree_of(plan.tree_program))


def swap_tree(cache: Cache, root: str, link: str) -> None:
  """Make link, a symbolic link, lead to a new tree, so that it is replaced in one step.

  The tree before stays until the next one comes, for a QEMU that is just starting from it.
  """
  folder, name = os.path.split(link)
  before = os.readlink(link) if os.path.islink(link) else ""
  now, aside = (f".{name}-{os.urandom(4).hex()}" for _ in range(2))  # no tag has such a name
  with contextlib.ExitStack() as unless_made:
    unless_made.callback(remove_tree, os.path.join(folder, now))
    try:
      shutil.move(root, os.path.join(folder, now))
    except shutil.Error as each:  # all that went wrong with a copy to another file system
      raise QvmError(f"{link} cannot be copied there: {each.args[0][0][2]}", OTHER_CACHE)
    flush_tree(os.path.join(folder, now))
    try:
      os.symlink(now, os.path.join(folder, aside))
    except OSError as error:
      raise QvmError(f"{link} cannot be made, a symbolic link: {describe(error)}", OTHER_CACHE)
    unless_made.pop_all()
  with instances_lock(cache):
    if not os.path.islink(link):
      remove_tree(link)  # from a copy of the cache that followed links
    os.replace(os.path.join(folder, aside), link)
    flush(folder)
    for entry in os.listdir(folder):
      # The tag of another release may begin with this one's.
      mine = re.fullmatch(re.escape(f".{name}-") + "[0-9a-f]{8}", entry)
      if mine and entry not in (now, before):
        remove_tree(os.path.join(folder, entry))


def install_qemu_img(plan: Plan, download: Download) -> None:
  """Put a downloaded qemu-img in place."""
  with installing(download) as aside:
    unpacked = unpack_aside(download.file.part, aside, ("qemu-img", "bin/qemu-img"))
    program = os.path.realpath(unpacked)
    record = asset_record(download, file_sha256(program))
    with instances_lock(plan.cache):
      publish_with_record(plan.cache, program, plan.qemu_img, record, 0o755)


def convert_bundle(plan: Plan, download: Download, aside: str) -> str:
  """Unpack a downloaded bundle and make a qcow2 of its disk; returns the qcow2's path."""
  name, part = plan.bundle_asset, download.file.part
  remove_tree(aside)
  say(f"unpacking {name}")
  try:
    unpack_bundle(part, aside, name)
  except (ValueError, EOFError) as error:
    raise RefusedError(f"{name} is refused: {error}")
  except UnpackerError as error:
    if download.vouched:
      raise
    raise RefusedError(str(error), "no digest says that the download is sound: it is thrown away")
  except OSError as error:
    raise write_failure(aside, os.path.getsize(part), error)
  disk, result = os.path.join(aside, "disk.img"), os.path.join(aside, "disk.qcow2")
  flush(disk)  # APFS takes for holes what it has not written yet (QEMU's bug 1776920)
  run_program([plan.qemu_img, "convert", "-f", "raw", "-O", "qcow2", disk, result])
  if sys.platform == "darwin":  # by now the disk has told the truth, if it had not before
    run_program([plan.qemu_img, "compare", "-f", "raw", "-F", "qcow2", disk, result])
  os.unlink(disk)
  return result


def candidates(plan: Plan, releases: Releases, pinned: str) -> Iterator[Asset]:
  """The assets that may be the image, the best first, found out only as needed.

  pinned is the only release that will do, empty where any will.
  """
  repo, qcow2 = image_repo(plan.guest.os), plan.image_asset
  bundle, unpackable = plan.bundle_asset, can_unzstd()
  newest = pinned or releases.tag(repo)
  yield Asset(repo, newest, qcow2)
  if unpackable:
    yield Asset(repo, newest, bundle)
  for release in [] if pinned else releases.all(repo):
    if qcow2 in release.assets:  # the newest too: its first 404 may have been a passing one
      yield Asset(repo, release.tag, qcow2)
    elif bundle in release.assets and not unpackable:
      say(f"{release.tag} has {bundle}, which takes zstd to unpack; looking for an older qcow2")
    elif bundle in release.assets and release.tag != newest:
      yield Asset(repo, release.tag, bundle)


def find_image(plan: Plan, releases: Releases, pinned: str, use: Callable[[Asset], None]) -> None:
  """Call use() for each of the candidates until it raises no NotFound."""
  for asset in candidates(plan, releases, pinned):
    with contextlib.suppress(NotFound):
      return use(asset)
  if plan.release:
    hint = releases_hint(releases.net, image_repo(plan.guest.os))
    raise QvmError(f"the release {plan.release} has no {plan.image_asset}", hint)
  raise gone_image(plan, pinned) if pinned else no_such_image(plan, releases)


def fetch_image(plan: Plan, releases: Releases, tools: Callable[[], None]) -> None:
  """Make the base image from the newest release that has it; tools waits for qemu-img."""

  def use(asset: Asset) -> None:
    if there:
      if is_newest(plan.base, releases.net, asset):
        return remove_tree(folder)
      check_exists(releases.net, asset.url(releases.net))
      check_unneeded(plan, "refreshed")  # before the download; install_image looks again
    download = fetch_asset(releases, asset, folder, plan)
    newest = pinned or releases.tag(asset.repo)
    if asset.tag != newest:
      say(f"{asset.name} comes from {asset.tag}; the newest release, {newest}, has none")
    if asset.name == plan.bundle_asset:
      tools()
    install_image(plan, download)

  with download_lock(plan.cache.downloads, os.path.basename(plan.base)) as folder:
    there = not is_missing(plan, plan.base)
    if there and not plan.refresh:
      return remove_tree(folder)
    pinned = plan.release or ("" if there else pinned_release(plan, releases))
    find_image(plan, releases, pinned, use)


def gone_image(plan: Plan, tag: str) -> QvmError:
  """The error for overlays on an image that the server no longer has."""
  names = ", ".join(each.name for each in dependants(plan))
  return QvmError(
    f"{plan.image_asset} of {tag}, on which these instances were created, can no longer be "
    f"downloaded: {names}",
    f"restore {plan.base}; qvm rm deletes the instances, with all that their guests wrote",
  )


def install_image(plan: Plan, download: Download) -> None:
  """Check a complete image, converted if it is a bundle, and make it the base image."""
  with installing(download) as aside:
    source, digest = download.file.part, ""
    if download.name == plan.bundle_asset:
      source = convert_bundle(plan, download, aside)
      digest = file_sha256(source)
    check_image(source)
    record = asset_record(download, digest)
    with instances_lock(plan.cache):
      check_unneeded(plan, "replaced by another image", record)
      drop_layers(plan, record)
      publish_with_record(plan.cache, source, plan.base, record, 0o444)


def images_of(releases: Releases, os_name: str) -> List[Image]:
  """The images of an OS that its releases have."""
  return images_in(os_name, releases.all(image_repo(os_name)))


def no_such_image(plan: Plan, releases: Releases) -> QvmError:
  """The error for a version that no release has, with what there is instead."""
  guest = plan.guest
  images = images_of(releases, guest.os)
  versions = [image.version for image in images if image.arch == guest.arch]
  if plan.version in versions and can_unzstd():
    return QvmError(
      f"a release names {guest.title} {plan.version} for {guest.arch}, but the server has it not",
      releases_hint(releases.net, image_repo(guest.os)),
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


# For a slow disk to get what a download that ends has brought. Without that it is resumed as well,
# unless the host goes down.
FLUSH_SECONDS = 3.0


def in_parallel(net: Net, jobs: Sequence[Callable[[], None]]) -> None:
  """Run the jobs at the same time; the first failure is raised and ends the others.

  The threads are daemons, and the main thread only waits: a signal ends qvm at once, and what
  has been downloaded stays for the next run.
  """
  futures = [Future(job) for job in jobs]
  left = list(futures)
  try:
    while left:
      left[0].thread.join(0.2)  # so often is the progress drawn
      for future in [each for each in left if not each.thread.is_alive()]:
        left.remove(future)
        future.result()
      progress.show()
  except BaseException as error:
    net.cancelled.set()
    Future(progress.close).thread.join(FLUSH_SECONDS)
    if isinstance(error, Exception):  # no signal: let the others put away what they have in hand
      until = time.monotonic() + 1
      for future in futures:
        future.thread.join(max(0.0, until - time.monotonic()))
    raise


def fetch_missing(plan: Plan, net: Net, image: bool = True) -> None:
  """Download at the same time whatever the plan needs and the cache has not; else ask nothing."""
  releases = Releases(net)
  jobs: List[Callable[[], None]] = []
  fetch = functools.partial(fetch_resource, plan, releases)

  def needs(path: str) -> bool:
    return plan.refresh or is_missing(plan, path)

  def tools() -> None:
    if not plan.own_qemu:
      job = functools.partial(fetch, plan.qemu_img, plan.tools_asset, install_qemu_img)
      releases.once(("", "qemu-img"), job)

  if needs(plan.tree_program):
    jobs.append(functools.partial(fetch, plan.tree_program, plan.qemu_asset, install_qemu))
  if not plan.own_qemu and needs(plan.qemu_img):
    jobs.append(tools)
  if image and needs(plan.base):
    jobs.append(lambda: fetch_image(plan, releases, tools))
  if jobs and is_open(net.releases):
    say(f"{redacted(net.releases)} is not https: whoever is on the way can change what comes")
  if jobs:
    check_dir_fd()  # to unpack
    in_parallel(net, jobs)


def wrong_size(path: str) -> str:
  """How a cached file's length, or that of a QEMU's tree, differs from when it came; or empty."""
  record, size = record_of(path), os.path.getsize(path)
  found = tree_bytes(tree_of(path)) if tree_of(path) else size
  if size and record.bytes in (0, found):
    return ""
  if record_of(path) != record:
    return wrong_size(path)  # another qvm has just replaced it
  return f"it has {found} bytes instead of {record.bytes}"


def check_base(plan: Plan) -> None:
  """Refuse a base image that is unsafe, or not as long as it was when it came.

  A user's own may be raw.
  """
  if plan.own_image and image_format(plan.base) == "qcow2":
    return check_image(plan.base)
  if plan.own_image:
    if os.path.getsize(plan.base) % 512 or not os.path.getsize(plan.base):
      raise RefusedError(f"the image {plan.base} is refused: it is neither qcow2 nor a raw disk")
    return
  try:
    check_image(plan.base)
    problem = wrong_size(plan.base)
    if problem:
      raise RefusedError(f"the base image {plan.base} is damaged: {problem}")
  except RefusedError as error:
    raise RefusedError(str(error), f"{pull_line(plan)} downloads it again")


def image_record(plan: Plan) -> AssetRecord:
  """The record of the base image; that of a user's own tells by size and time what it is."""
  if not plan.own_image:
    return record_of(plan.base)
  stat = os.stat(plan.base)
  return AssetRecord(validator=f"{stat.st_size} bytes, {stat.st_mtime_ns} ns")


def base_record(plan: Plan) -> AssetRecord:
  """The record of the base image, whose digest is that of the file.

  A file without one, or that has been changed since, is hashed, and that is noted. RefusedError if
  its digest is another one than the record's.
  """
  record, mtime_ns = image_record(plan), os.stat(plan.base).st_mtime_ns
  if plan.own_image:
    return record
  whole_seconds = record.mtime_ns // 10**9 * 10**9  # what many an archive keeps of a cache
  if record.sha256 and mtime_ns in (record.mtime_ns, whole_seconds):
    return record
  digest = file_sha256(plan.base)
  if record_of(plan.base) != record or os.stat(plan.base).st_mtime_ns != mtime_ns:
    return base_record(plan)  # another qvm has just replaced it
  if record.sha256 not in ("", digest):
    raise RefusedError(
      f"the base image {plan.base} is damaged: its digest is not the one recorded at download",
      f"{pull_line(plan)} --verify downloads it again",
    )
  record = record._replace(sha256=digest, bytes=os.path.getsize(plan.base), mtime_ns=mtime_ns)
  with contextlib.suppress(OSError):  # it is then hashed each time
    write_record(plan.cache, record_path(plan.base), record, 0o444, keep=True)
  return record


def pull_line(plan: Plan) -> str:
  """The command that downloads what a plan needs."""
  return f"qvm pull --platform {plan.guest.arch} {plan.guest.os} {plan.version}"


def damaged_files(plan: Plan) -> Tuple[str, ...]:
  """The cached files that their sizes, and an image's header, show to be damaged; says which."""
  programs = [plan.tree_program] + [plan.qemu_img] * (not plan.own_qemu)
  found = [path for path in programs if os.path.isfile(path) and wrong_size(path)]
  for path in found:
    say(f"{path} is damaged: it is not as long as it was; it is downloaded again")
  try:
    if os.path.isfile(plan.base):
      check_base(plan)
  except RefusedError as error:
    say(f"{error}; it is downloaded again")
    found.append(plan.base)
  return tuple(found)


def plan_from(options: Options, net: Net) -> Plan:
  """The plan for this command on this host with this environment."""
  cache, host = cache_from(os.environ), this_host()
  guest = find_guest(options.operands[0].lower(), options.platform or host.arch)
  if options.command == "run" and not (options.dry_run or options.qemu) and lacks_rosetta(host):
    raise QvmError("QEMU for macOS is built for Intel, and this Mac has no Rosetta", ROSETTA_FIX)
  version = "image" if options.image else chosen_version(options, net, guest, cache)
  options = options._replace(operands=(guest.os, version))
  plan = make_plan(options, host, cache, os.urandom(3).hex())
  if not plan.own_image:
    check_spelling(plan.base)
  else:
    try:
      check_base(plan)
    except RefusedError as error:
      raise UsageError(f"--image: {error}")
  return plan._replace(qemu_img=own_qemu_img(options.qemu)) if options.qemu else plan


# A VERSION with fewer numbers and words is a beginning; about others no server is asked.
# As in r1beta5, 6.4.2 and 4.0.4; all others have 2, as in 15.1 and r151058.
VERSION_PARTS = {"haiku": 4, "dragonflybsd": 3, "midnightbsd": 3}


def chosen_version(options: Options, net: Net, guest: Guest, cache: Cache) -> str:
  """The version that was named, or the newest one with that beginning.

  `run` takes the newest cached when no server can be asked.
  """
  wanted = "".join(options.operands[1:])
  wanted = "" if wanted.lower() == "latest" else wanted
  if wanted and len(version_key(wanted)[:-1]) >= VERSION_PARTS.get(guest.os, 2):
    return wanted
  mine = [it.version for it in cached_images(cache, guest.os) if it.arch == guest.arch]
  cached = [name for name, _, tag in (it.partition("+") for it in mine) if tag == options.release]
  if wanted in cached:
    return wanted
  newest = newest_of(cached, wanted)
  if options.dry_run:
    if not newest and not wanted:
      raise UsageError("--dry-run asks no server: name the version, as in freebsd 15.1")
    return newest or wanted
  fallback = newest if options.command == "run" else ""
  check_host(this_host(), guest, options.qemu)  # before any request
  try:
    soon, repo, tag = impatient(net) if fallback else net, image_repo(guest.os), options.release
    releases = [tagged_release(soon, repo, tag)] if tag else Releases(soon).all(repo)
  except QvmError as error:
    if not fallback:
      raise
    say(f"{error}; taking the newest cached version, {fallback}")
    return fallback
  known = [image.version for image in images_in(guest.os, releases) if image.arch == guest.arch]
  found = newest_of(known, wanted) or fallback
  if not found and not wanted:
    where = f"the release {options.release}" if options.release else "any release"
    problem = f"there is no image of {guest.title} for {guest.arch} in {where}"
    raise QvmError(problem, releases_hint(net, repo))
  if found and found != wanted:
    say(f"the newest {guest.title}{' ' * bool(wanted)}{wanted} for {guest.arch} is {found}")
  return found or wanted  # what there is not, the download explains


# ---- Instances ----------------------------------------------------------------------------------


class Holder(NamedTuple):
  """The process that holds an instance's lock, as noted in the lock's file; empty: unknown."""

  program: str = ""  # qvm or QEMU
  pid: int = 0
  started: str = ""  # in clock ticks since the host booted, from /proc
  place: str = ""  # as from this_place()
  host: str = ""  # its name, for messages

  def __str__(self) -> str:
    return f"{self.program} process {self.pid}" if self.pid else "unknown process"

  def is_here(self) -> bool:
    """Whether its process and its address mean the same here; unknown counts as yes."""
    here = this_place()
    return not (self.place and here) or self.place == here


def note_holder(lock: Lock, program: str) -> None:
  """Note this process as a lock's holder, for messages and `stop`; only the flock itself counts."""
  pid = os.getpid()
  note = (f"{program} process {pid}", start_time(pid), this_place(), os.uname().nodename)
  with contextlib.suppress(OSError):  # a full disk must not stop `rm` from freeing space
    os.ftruncate(lock.fd, 0)
    os.pwrite(lock.fd, ("\n".join(note) + "\n").encode(), 0)


def holder(paths: InstancePaths) -> Holder:
  """The holder of an instance's lock, as noted in the file."""
  try:
    with open(paths.lock, "rb") as file:
      lines = file.read(1000).decode("ascii", "replace").split("\n")
  except OSError:
    return Holder()
  match = re.match(r"(qvm|QEMU) process ([0-9]{1,10})\Z", lines[0])
  return Holder(match.group(1), int(match.group(2)), *lines[1:4]) if match else Holder()


def start_time(pid: int) -> str:
  """When a process started, in clock ticks since boot, as proc(5) says; empty if unknown."""
  try:
    with open(f"/proc/{pid}/stat", "rb") as file:
      return file.read().rpartition(b")")[2].split()[19].decode("ascii")
  except (OSError, IndexError):
    return ""


def this_place() -> str:
  """What tells this container and host from others: process ids and loopback are theirs alone."""
  with contextlib.suppress(OSError):  # there is no /proc on macOS
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net")]
    return " ".join([boot_id(), *spaces])
  return ""


def check_here(paths: InstancePaths) -> None:
  """Refuse to reach or end a machine from another container or host that shares the cache."""
  noted = holder(paths)
  if not noted.is_here():
    raise QvmError(
      f"the instance {paths.name} runs in another container or on another host ({noted.host})",
      "use qvm there: its address and its process mean something else here",
    )


def take_instance(
  paths: InstancePaths,
  stack: contextlib.ExitStack,
  undone: str = "",
  hint: str = "",
  shared: bool = False,
) -> Lock:
  """Take an instance's lock until the stack ends; QvmError names the process that holds it."""
  lock = Lock(paths.lock)
  check_spelling(paths.disk)
  with instances_lock(paths.cache), signals.hold():
    if not lock.try_(shared):
      problem = f"the instance {paths.name} is already running ({holder(paths)})"
      hint = hint or "use another --name, or --rm, for a second machine"
      raise QvmError(problem + undone, hint)
    stack.callback(lock.remove)
    note_holder(lock, "qvm")
  return lock


def is_running(paths: InstancePaths) -> bool:
  """Whether a qvm or a QEMU holds the instance's lock."""
  with instances_lock(paths.cache):
    return Lock(paths.lock).is_held()


def wait_released(paths: InstancePaths, seconds: float) -> bool:
  """Wait until the instance's lock is free; False if it is still held after this time."""
  deadline = time.monotonic() + seconds
  while is_running(paths):
    if time.monotonic() >= deadline:
      return False
    time.sleep(0.1)
  return True


def read_instance(paths: InstancePaths) -> Instance:
  """The record of an instance; QvmError if it is missing or damaged and cannot be rebuilt."""
  record = sound_record(Instance(), paths.record)
  if record.name == paths.name and all((record.os, record.version, record.arch)):
    return record
  base = overlay_of(paths).base or ""
  oses = "|".join(OS_NAMES)
  match = re.match(rf"({oses})-(.+)-(x86-64|arm64)\.qcow2\Z", base)
  if not match and not os.path.lexists(paths.disk):
    raise QvmError(f"there is no instance {paths.name} any more", "see qvm list")
  if not match:
    raise QvmError(
      f"the record of the instance {paths.name} is missing or damaged: {paths.record}",
      f"its disk is untouched; `qvm rm {paths.name}` would delete it",
    )
  return Instance(paths.name, *match.groups())


SYNC_SUFFIX_RE = r"\.sync-[0-9a-f]{16}"


def sync_records(paths: InstancePaths) -> List[str]:
  """The paths of an instance's records of folders: section Sync."""
  mine = re.escape(paths.stem) + SYNC_SUFFIX_RE + r"\Z"
  return [path for path in paths_in(paths.cache.instances) if re.match(mine, path)]


def remove_instance(paths: InstancePaths, keep_log: bool = False) -> None:
  """Delete the files of an instance whose lock the caller holds; the --rm mark goes last.

  keep_log keeps the console log, where only that explains why the instance is gone.
  """
  with signals.hold():
    drop_socket(socket_of(paths.disk))
    for path in (*sync_records(paths), *(paths.stem + suffix for suffix in paths.SUFFIXES)):
      if path != paths.console or not keep_log:
        remove_file(path)


def sweep(cache: Cache) -> None:
  """Delete --rm instances and locks whose qvm and QEMU were killed, and unfinished files."""
  if not os.access(cache.instances, os.W_OK):
    return
  found = {it.name: it for end in (".ephemeral", ".lock") for it in instances(cache, end)}
  for paths in found.values():  # a machine that runs has both
    lock = Lock(paths.lock)
    with instances_lock(cache), signals.hold():
      if lock.try_():
        if os.path.exists(paths.mark):
          remove_instance(paths)
        lock.remove()
  for path in scratch_folders(cache):
    remove_unlocked(path)


def scratch_folders(cache: Cache) -> List[str]:
  """The folders of unfinished files, without downloads, which can be resumed."""
  return [path for path in paths_in(cache.downloads) if os.path.basename(path).startswith(SCRATCH)]


def planned_instance(plan: Plan) -> Optional[Instance]:
  """The instance, if there is one; QvmError if it cannot be run as planned, by what its files say.

  It writes nothing, and does not look at what is in the cached image.
  """
  paths = plan.paths
  if not os.path.lexists(paths.disk):
    return None
  instance = read_instance(paths)
  if backing_file(paths.disk) is None:
    raise QvmError(
      f"the disk of the instance {paths.name} cannot be read, or is damaged: {paths.disk}",
      "is it on a disk that is not mounted, or another user's? nothing has been changed",
    )
  if instance.problem:
    raise QvmError(
      f"the instance {paths.name} is not started: {instance.problem}",
      f"qvm rm {paths.name} deletes it, with all that its guest wrote",
    )
  wanted = (plan.guest.os, plan.version, plan.guest.arch)
  if (instance.os, instance.version, instance.arch) != wanted:
    raise QvmError(
      f"the instance {paths.name} is {instance.os} {instance.version} on {instance.arch}, "
      f"not {plan.guest.os} {plan.version} on {plan.guest.arch}",
      f"to start it, add --image {shlex.quote(instance.image)} and name no version; "
      * bool(instance.image and not plan.own_image)
      + "choose another --name for a new one",
    )
  here = plan.own_image and (plan.base, image_record(plan).validator)
  if here and here != (instance.image, instance.validator):
    changed = f"{instance.image} has another size or time than when {paths.name} was created on it"
    raise QvmError(
      changed if instance.image == plan.base
      else f"the instance {paths.name} was created on {instance.image}, not on {plan.base}",
      "restore it (cp -p and touch -r keep the time; contents are not compared), or choose another "
      f"--name; qvm rm {paths.name} deletes what its guest wrote",
    )  # fmt: skip
  return instance


def check_instance(plan: Plan) -> Optional[Instance]:
  """Refuse to run an existing instance as another OS, or on another base image; returns it.

  A missing or damaged record is rebuilt from the name of the disk's base image.
  """
  paths, instance = plan.paths, planned_instance(plan)
  if not instance:
    return None
  if instance != sound_record(Instance(), paths.record):
    write_record(paths.cache, paths.record, instance, keep=True)
    say(f"the record of the instance {paths.name} was missing or damaged; "
        "it has been rebuilt from its disk")  # fmt: skip
  if plan.own_image or is_missing(plan, plan.base):
    return instance  # in the second case it is downloaded, and then compared
  known = instance.base_sha256 or is_streamed(paths.disk)  # else the record had to be rebuilt
  if known and not fits(instance, base_record(plan)):
    raise other_base(paths, plan.base, instance)
  return instance


def check_disks(plan: Plan, size: str) -> None:
  """Refuse to run an instance that exists with --rm, or with another size of its second disk."""
  path = plan.paths.data
  if plan.ephemeral and any(map(os.path.lexists, (plan.paths.disk, path))):
    raise QvmError(
      f"the instance {plan.name} already exists, and --rm would delete it",
      "choose another --name, or omit --name",
    )
  if size and os.path.exists(path) and virtual_size(path) != memory_bytes(size):
    raise QvmError(
      f"the instance {plan.name} has a second disk already, of {virtual_size(path) >> 20}M",
      "omit --disk: it stays as it is; or choose another --name",
    )


def other_base(paths: InstancePaths, new: str, instance: Instance) -> QvmError:
  """The error for an overlay that belongs to another base image."""
  old = f"sha256 {instance.base_sha256}" if instance.base_sha256 else instance.release
  return QvmError(
    f"the instance {paths.name} was created on a different base image than {new}",
    f"restore the old file ({old}), or delete the instance with its data: qvm rm {paths.name}",
  )


class Base(NamedTuple):
  """What a machine's overlay is based on, and what QEMU needs to use it.

  cached_base and streamed_base make one, prepared_base and Checkpoint adapt it, so that
  Machine.start needs no flags.
  """

  backing: str  # as the overlay names it
  image: AssetRecord  # of which sha256, asset_sha256, release and validator identify it
  needs: Tuple[str, ...] = ()  # files that must exist when the overlay is created
  fds: Tuple[int, ...] = ()  # descriptors for QEMU
  adjust: Callable[[List[str]], List[str]] = list  # changes QEMU's usual command line
  layer: str = ""  # the name of the prepared disk that it is, if any


def cached_base(plan: Plan) -> Base:
  """The base image in the cache, of which the digest is known if the instance is to stay."""
  image = image_record(plan) if plan.ephemeral else base_record(plan)
  backing = plan.base if plan.own_image else backing_name(plan, plan.base)
  return Base(backing, image, (plan.base,))


def layer_base(plan: Plan, base: Base, name: str) -> Base:
  """A prepared disk on a base image; that it is used now is noted."""
  layer = plan.cache.layer(name)
  with contextlib.suppress(OSError):  # not in a cache that can only be read
    os.utime(layer.record)
  every = [layer, *map(plan.cache.layer, layers_under(plan.cache, layer.disk)[0])]
  for it in every:
    with contextlib.suppress(FileNotFoundError):  # which Machine.start() tells
      size = os.path.getsize(it.disk)  # read before the record, which another qvm removes first
      if layer_record(it).bytes not in (0, size):
        raise RefusedError(f"the layer {it.name} is damaged: it is not as long as it was")
  needs = (*base.needs, *(it.disk for it in every))
  return base._replace(backing=backing_name(plan, layer.disk), needs=needs, layer=name)


def record_instance(plan: Plan, run: Instance, base: Base) -> None:
  """Write the record of an instance: what it is, and what `run` says of this run."""
  guest, image = plan.guest, base.image
  record = run._replace(
    name=plan.name,
    os=guest.os,
    version=plan.version,
    arch=guest.arch,
    base_sha256=image.sha256,
    release=image.release,
    asset_sha256=image.asset_sha256,
    image=plan.base if plan.own_image else "",
    validator=image.validator if plan.own_image or is_served(base.backing) else "",
  )
  if sound_record(Instance(), plan.paths.record) != record:
    write_record(plan.cache, plan.paths.record, record, keep=not plan.ephemeral)


def backing_name(plan: Plan, path: str, disk: str = "") -> str:
  """The path by which an overlay, the instance's or `disk`, names its base.

  It is relative, so that the cache can be moved. The system follows a link that instances/ is
  before it goes up from there.
  """
  folder = os.path.dirname(disk or plan.paths.disk)
  plain = os.path.relpath(path, folder)
  with contextlib.suppress(OSError):
    if os.path.samefile(os.path.join(folder, plain), path):
      return plain
  real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
  return os.path.relpath(real, os.path.realpath(folder))


def make_overlay(plan: Plan, backing: str, lock: Lock) -> None:
  """Create the instance's disk, an overlay on `backing`, if it does not exist.

  An overlay that was created while its base image was downloading, or whose folder has been moved,
  is rebased onto `backing`.
  """
  kind = image_format(backing) if os.path.isabs(backing) else "qcow2"
  disk, options = plan.paths.disk, ["-q", "-f", "qcow2", "-b", backing, "-F", kind]
  if os.path.lexists(disk):
    before = backing_file(disk) or ""
    moved = os.path.basename(before) == os.path.basename(backing)
    ours = os.path.join(plan.cache.instances, backing)
    moved = moved and not is_another(plan.cache.instances, before, ours)
    if before != backing and (is_served(before) or moved):
      drop_socket(socket_of(disk))
      run_program([plan.qemu_img, "rebase", "-u", *options, disk], (lock.fd,))
    return
  # The host keys of a guest that is no more, and what was noted of its folders.
  for path in (plan.paths.known_hosts, *sync_records(plan.paths)):
    remove_file(path)
  if not is_served(backing):  # a relative name does not resolve aside: qemu-img finds no size
    size = virtual_size(os.path.join(plan.cache.instances, backing))
    options += ["-u", "-o", f"size={size}"]
  create_disk(plan, disk, options, lock)


def make_data_disk(plan: Plan, size: str, lock: Lock) -> None:
  """Create the instance's second disk, if that is asked for and does not exist; never change it."""
  if size and not os.path.lexists(plan.paths.data):
    options = ["-q", "-f", "qcow2", "-o", f"size={memory_bytes(size)}"]
    create_disk(plan, plan.paths.data, options, lock)


def create_disk(plan: Plan, path: str, options: Sequence[str], lock: Lock) -> None:
  """Have qemu-img make a disk, which is there once it is complete."""
  with unfinished(plan.cache) as folder:
    aside = os.path.join(folder, "disk.qcow2")
    # An orphaned qemu-img keeps the lock.
    run_program([plan.qemu_img, "create", *options, aside], (lock.fd,))
    move(aside, path, not plan.ephemeral)


class Row(NamedTuple):
  """One line of `qvm list`."""

  name: str
  os: str
  version: str
  arch: str
  state: str
  ssh: str
  ports: List[str]  # ADDRESS:HOST:GUEST[/udp]
  size: int  # bytes on disk
  ephemeral: bool
  base: int  # per cent of the base image that have been downloaded
  created: str = ""  # of a layer, as are these; in UTC
  used: str = ""
  script: str = ""
  needed_by: Sequence[str] = ()


def list_instances(cache: Cache) -> List[Row]:
  """All instances that have a disk, by name; then the layers."""
  if not os.path.isdir(cache.instances):
    return []
  rows = []
  with instances_lock(cache):
    for paths in instances(cache):
      with contextlib.suppress(FileNotFoundError):  # a --rm run has just ended
        rows.append(instance_row(paths))
    known = layers(cache)
    every = overlays(cache, ephemeral=False) if known else []
    rows += [layer_row(layer, users_of(layer, every)) for layer in known]
  return rows


def layer_row(layer: LayerPaths, users: Sequence[str]) -> Row:
  """A layer's line of `qvm list`, with question marks if its record is damaged."""
  record = known_record(LayerRecord(), layer.record)
  size = sum(map(tree_size, layer_files(layer)))
  kind = (record.os or "?", record.version or "?", record.arch or "?")
  state = "checkpoint" if re.search("-warm-[0-9a-f]+$", layer.name) else "prepared"
  used = utc(os.stat(layer.record).st_mtime)
  return Row(
    layer.name, *kind, state, "", [], size, False, 100, record.time, used, record.script, users
  )


def instance_row(paths: InstancePaths) -> Row:
  """An instance's line of `qvm list`, with question marks if its record is damaged."""
  running, noted = Lock(paths.lock).is_held(), holder(paths)
  try:
    record = read_instance(paths)
  except QvmError:
    record = Instance(paths.name, "?", "?", "?")
  listens = running and noted.program != "qvm" and noted.is_here()
  return Row(
    name=paths.name,
    os=record.os,
    version=record.version,
    arch=record.arch,
    state="running" if running else "stopped",
    ssh=record.ssh if listens else "",
    ports=record.ports.split() if listens else [],
    size=tree_size(paths.disk) + (tree_size(paths.data) if os.path.lexists(paths.data) else 0),
    ephemeral=os.path.exists(paths.mark),
    base=base_share(paths),
  )


def base_share(paths: InstancePaths) -> int:
  """How much of an overlay's base image is there, in per cent."""
  name, cache = overlay_of(paths).base, paths.cache
  if not name or not is_streamed(paths.disk) or os.path.isfile(cache.path("base", name)):
    return 100
  other = OtherDownload(os.path.join(cache.downloads, name), name)
  done, total = other.done, other.total
  return min(100, 100 * done // total) if total else 0


# ---- QEMU command -------------------------------------------------------------------------------

DISPLAYS = ("cocoa", "gtk", "sdl")  # the first of them that QEMU has
# In the place of -nographic and of what else keeps the guest from having a screen; "virt" has no
# keyboard and no graphics of its own.
DISPLAY = """
-display DISPLAY
-device qemu-xhci
-device usb-kbd
-device usb-tablet
"""
CPU_MASK = "amx-tile=off,amx-int8=off,amx-bf16=off,la57=off"  # see needs_cpu_mask


class HostFacts(NamedTuple):
  """The facts about this host and run that decide on adjustments."""

  linaro: bool  # the unpacked QEMU includes a real linaro_uefi.fd
  mask_cpu: bool  # KVM would show the guest CPU features that crash it
  data: str = ""  # the second disk; empty: there is none
  display: str = ""  # the kind of window, as in DISPLAYS; empty: none
  key_disk: str = ""  # the disk with the key that may log in; empty: none is needed
  accel: str = TABLE_ACCEL
  emulated: bool = False  # neither KVM nor HVF can run this guest here
  host_cpu: bool = False  # KVM runs no CPU but the host's own, as on arm64


class Adjustment(NamedTuple):
  """A replacement in the value of one option of a table."""

  option: str
  old: str
  new: str


def adjustments(options: Options, guest: Guest, facts: HostFacts) -> List[Adjustment]:
  """All differences between the table and the command that runs; README.md says why."""
  published = [f"hostfwd={it.kind}:{it.host}:{it.port}-:{it.guest}," for it in options.publish]
  hostfwd = "".join(published) + f"hostfwd=tcp:{options.ssh}-"
  changes = [
    Adjustment("-netdev", "hostfwd=tcp::2847-", hostfwd),
    Adjustment("-machine", "accel=" + TABLE_ACCEL, "accel=" + facts.accel),
    Adjustment("-m", "6G", options.memory),
    Adjustment("-smp", "2", options.cpus),
  ]
  if options.no_network:
    changes.append(Adjustment("-netdev", "id=user.0,", "id=user.0,restrict=on,"))
  if "linaro_uefi.fd" in guest.table and not facts.linaro:
    changes.append(Adjustment("-bios", "linaro_uefi.fd", "uefi.fd"))
    changes.append(Adjustment("-machine", "type=virt,", "type=virt,acpi=off,"))
  if guest.arch == "x86-64" and facts.mask_cpu:
    changes.append(Adjustment("-cpu", "max", "max," + CPU_MASK))
  if guest.os == "dragonflybsd" and not facts.emulated and facts.accel != "tcg":
    changes.append(Adjustment("-cpu", "max", "max,stibp-always-on=off"))  # it gets a #GP on AMD
  if guest.arch == "arm64" and facts.host_cpu:
    changes.append(Adjustment("-cpu", "cortex-a57", "host"))
  return changes


def table_rows(table: str) -> List[List[str]]:
  """A table as rows: the program, then each option with its value."""
  return [line.split() for line in table.strip().splitlines()]


def adjusted(rows: List[List[str]], changes: Iterable[Adjustment]) -> List[List[str]]:
  """The rows with the changes made; each change must match exactly one row."""
  result = [list(row) for row in rows]
  for change in changes:
    matches = [row for row in result if row[0] == change.option and change.old in row[-1]]
    assert len(matches) == 1, f"{change} matches {len(matches)} rows"
    matches[0][-1] = matches[0][-1].replace(change.old, change.new, 1)
  return result


def qemu_command(plan: Plan, options: Options, facts: HostFacts) -> List[str]:
  """The command line that runs the guest.

  In QEMU's option strings a comma within a value is doubled; -bios takes a plain path.
  """
  rows = adjusted(table_rows(plan.guest.table), adjustments(options, plan.guest, facts))
  if facts.key_disk and plan.guest.key_disk:
    rows += table_rows(plan.guest.key_disk.table)
  if facts.data:
    rows += table_rows(DATA_SCSI if "scsi-hd" in plan.guest.table else DATA_VIRTIO)
  if facts.display:
    rows = [row for row in rows if row[0] not in ("-nographic", "-display", "-monitor")]
    rows += table_rows(DISPLAY.replace("DISPLAY", facts.display))
    rows += [["-device", "virtio-gpu-pci"]] * (plan.guest.arch == "arm64")
  argv = [plan.qemu]
  plain = {"SHARE": plan.share, "DISK": plan.paths.disk, "KEYS": facts.key_disk}
  plain["DATA"] = facts.data
  doubled = {key: path.replace(",", ",,") for key, path in plain.items()}
  for row in rows[1:]:
    argv += [fill(word, plain if row[0] == "-bios" else doubled) for word in row]
  return argv + list(options.qemu_args)


def fill(word: str, paths: Dict[str, str]) -> str:
  """A word of a table with paths in place of SHARE, DISK, KEYS and DATA."""
  return re.sub(r"\b(SHARE|DISK|KEYS|DATA)\b", lambda match: paths[match.group()], word)


def wants_key(guest: Guest, release: str) -> bool:
  """Whether logging in to an image of this release needs a key; unknown counts as newest."""
  keys = guest.key_disk
  return bool(
    keys and (not keys.until or release and version_key(release) < version_key(keys.until))
  )


# ---- Console ------------------------------------------------------------------------------------

KEY_HELP = (
  "Ctrl-A x ends the machine at once, like pulling the plug",
  "Ctrl-A h shows this help",
  "Ctrl-A Ctrl-A sends Ctrl-A; every other key goes to the guest",
)
# Private terminal modes (xterm's ctlseqs) that a guest may leave changed, to the user's surprise.
MODES_ON = (7, 25)  # line wrap, cursor
MODES_OFF = (1, 47, 1000, 1002, 1003, 1004, 1006, 1047, 1049, 2004)  # keys, screens, mouse, paste
DISK_FULL = (
  "the disk is full, or nearly: QEMU pauses a guest whose write does not fit; free some space and "
  "start it again"
)


@contextlib.contextmanager
def terminal_kept() -> Iterator[None]:
  """Restore the terminal at the end, even if a killed QEMU left it in raw mode."""
  before = None
  with contextlib.suppress(termios.error, OSError):
    if os.tcgetpgrp(0) == os.getpgrp():  # a background process must not change it
      before = termios.tcgetattr(0)
  try:
    yield
  finally:
    report.newline = "\n"
    if before:
      with contextlib.suppress(termios.error, OSError):
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def may_read_stdin() -> bool:
  """Whether reading stdin cannot stop qvm: a terminal is its foreground process group's to read."""
  try:
    return not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp()
  except OSError:
    return False


def is_interactive() -> bool:
  """Whether qvm runs in the foreground of a terminal, for input and output."""
  return os.isatty(0) and os.isatty(1) and may_read_stdin()


class Keyboard:
  """Splits typed bytes into input for the guest and commands, which follow Ctrl-A."""

  def __init__(self) -> None:
    self.prefix = False

  def feed(self, typed: bytes) -> Tuple[bytes, str]:
    """The bytes for the guest and the command letters; nothing after x counts."""
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
  """Tracks which modes of the terminal the guest has changed, to undo the changes."""

  def __init__(self) -> None:
    self.rest = b""  # the start of an escape sequence whose end has not been read yet
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
    """The bytes that reset the changed modes and the colours."""
    on = b"".join(
      b"\x1b[?%d%s" % (n, b"h" if n in MODES_ON else b"l") for n in sorted(self.changed)
    )
    return on + b"\x1b[0m"


# What a guest may not do to the user's terminal (xterm's ctlseqs, and screen's ESC k): set titles
# and the clipboard, and make it type its answerback (ENQ). In UTF-8, C2 9D and 9C are OSC and ST.
HARM_RE = rb"\x05|\x1b[k]|(?:\x1b\]|\xc2\x9d)(?:[lLI]|0*(?:[012]?|52|5522|1337);)"
HARM_BEGINS_RE = rb"(?:\x1b|\xc2|(?:\x1b\]|\xc2\x9d)[0-9]{0,4000})\Z"
HARM_ENDS_RE = rb"\x07|\x18|\x1a|\x1b\\|\xc2\x9c|\x1b(?=[^\\])"
TITLE_ENDS_RE = HARM_ENDS_RE + rb"|[\r\n]"  # of ESC k, which most terminals do not know
# Questions that a terminal answers as if the user had typed, and the answers.
QUERY_RE = (
  rb"\x1b(?:\[[>=?]?[0-9;]*[cn]|\[[?0-9;]*\$p|\[[12][0-9]t|\[\?u|\[>[0-9]*q|\][0-9;]+;\?|P[+$]q)"
)
ANSWER_RE = rb"\x1b(?:\[[?>=]?[0-9;]*[cnRtuy]|[P\]])"
ANSWER_SECONDS = 1.0  # for late answers


class Screen:
  """Passes a guest's output on to the user's terminal without what could harm the user.

  Everything else stays as it is, byte for byte. It also counts the answers that are due.
  """

  def __init__(self) -> None:
    self.modes = Modes()
    self.held = b""  # the beginning of what may become harmful
    self.dropping = b""  # the pattern that ends a harmful string of which the rest is to come
    self.asked = 0
    self.tail = b""  # the beginning of what may become a question

  def show(self, chunk: bytes) -> bytes:
    """The part of a chunk that may be shown now."""
    self.modes.watch(chunk)
    data, shown, place = self.held + chunk, bytearray(), 0
    self.held = b""
    while place < len(data):
      if self.dropping:
        end = re.compile(self.dropping).search(data, place)
        if not end:
          self.held = data[-1:] if data[-1:] in (b"\x1b", b"\xc2") else b""
          break
        self.dropping = b""
        place = end.start() if end.group() in (b"\x1b", b"\r", b"\n") else end.end()
        continue
      harm = re.compile(HARM_RE).search(data, place)
      stop = harm.start() if harm else len(data)
      shown += data[place:stop]
      place = harm.end() if harm else stop
      if harm and harm.group() != b"\x05":
        self.dropping = TITLE_ENDS_RE if harm.group() == b"\x1bk" else HARM_ENDS_RE
    begin = re.compile(HARM_BEGINS_RE).search(shown, max(0, len(shown) - 4010))
    if begin and not self.dropping:
      self.held = bytes(shown[begin.start() :])
      del shown[begin.start() :]
    self.count(bytes(shown))
    return bytes(shown)

  def count(self, shown: bytes) -> None:
    """Count the questions to the terminal."""
    end, text = 0, self.tail + shown
    for match in re.finditer(QUERY_RE, text):
      self.asked, end = self.asked + 1, match.end()
    start = text.rfind(b"\x1b", max(end, len(text) - 40))
    self.tail = text[start:] if start >= 0 else b""

  def typed(self, data: bytes) -> None:
    """Count the terminal's answers."""
    self.asked = max(0, self.asked - len(re.findall(ANSWER_RE, data)))

  def rest(self) -> bytes:
    """What is held back when nothing can follow any more."""
    held, self.held = b"" if self.dropping else self.held, b""
    return held

  def leave(self) -> None:
    """Give the terminal, which is raw if it is our stdin, too, back as it was."""
    with contextlib.suppress(OSError):
      write_all(1, self.modes.undo())
    if self.asked and is_interactive():
      self.swallow_answers()

  def swallow_answers(self) -> None:
    """Read the answers that are still to come, which the user's shell would take for typed words.

    Terminals answer in order: one more question, for device attributes, shows where they end.
    """
    typed, deadline = b"", time.monotonic() + ANSWER_SECONDS
    with contextlib.suppress(OSError, termios.error):
      write_all(1, b"\x1b[c")
      while self.asked or not re.search(rb"\x1b\[\?[0-9;]*c", typed):
        if not select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0]:
          break
        data = os.read(0, CHUNK_BYTES)
        if not data:
          break
        self.typed(data)
        typed += data
      termios.tcflush(0, termios.TCIFLUSH)


KVM_DENIED = "permission denied for /dev/kvm"
KVM_FIX = "sudo usermod -aG kvm $USER, then log in again; on a CI runner: sudo chmod o+rw /dev/kvm"
TCG_FIX = "add --accel tcg, which is slower"
QEMU_FIX = "delete QEMU with qvm clean --all; the next run downloads it again"
# A message of QEMU, its meaning, and what to do about it.
STUCK_RE = r"KVM: entry failed|kvm run failed|KVM internal error"  # QEMU then only waits
HVF_RE = r"HV_[A-Z]{3,}|access HVF|/hvf/\S+: Assertion"
KVM_RE = STUCK_RE + r"|kvm_\w+: Assertion|/kvm/\S+: .*Assertion|'host' CPU type can only be used"
KVM_RE += r"|kvm_init_vcpu|initialize kvm: (?!No such|Permission)"
CAUSES = (
  (KVM_RE, "KVM exists but does not work (nested virtualisation?)", TCG_FIX),
  (HVF_RE, "HVF does not work here (a virtual machine, or a QEMU for another CPU?)", TCG_FIX),
  (r"dyld.*Symbol not found|Symbol not found: _", "this macOS is too old for the downloaded QEMU",
   "update macOS: QEMU needs 13, its newer releases 15.4; or use your own QEMU with --qemu"),
  (r"initialize kvm: Permission denied", KVM_DENIED, KVM_FIX),
  (r"set up host forwarding rule '?(\w+:[0-9.]*:\d+)", r"the port \1 is taken by another program",
   "choose another with --ssh-port or --publish"),
  (r'Failed to get (shared )?"[^"]+" lock', "another QEMU uses this disk",
   "stop that one first, or use another --name"),
  (r"cannot set up guest memory|Cannot allocate memory", "there is not enough memory",
   "give the guest less, for example -m 2G"),
  (r"No space left on device|Disk quota exceeded", "the disk is full",
   "free some space (qvm clean --all --dry-run lists what can be deleted), then run it again"),
  (r"invalid accelerator|accelerator .* not found|failed to initialize", "no accelerator works",
   "add --accel tcg, which works everywhere"),
  (r"failed to find romfile|could not load PC BIOS|Could not open .*share/qemu",
   "QEMU's firmware is incomplete", QEMU_FIX),
  (r"Property '\S+\.amx-\w+' not found", "this QEMU is too old for the CPU of this machine",
   "use QEMU 7.1 or newer with --qemu, or add --accel tcg"),
)  # fmt: skip
FELL_BACK_RE = r"initialize kvm: Permission denied(.|\n)*falling back to tcg"


def explain(output: str) -> List[str]:
  """The cause of QEMU's failure and the fix, from its output; empty if unknown."""
  output = re.split(r"falling back to \w+", output)[-1]  # QEMU went on after what precedes it
  for pattern, cause, fix in CAUSES:
    match = re.search(pattern, output, re.IGNORECASE)
    if match:
      return [f"QEMU failed: {match.expand(cause)}", fix]
  return []


CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGSEGV, signal.SIGTRAP)


def why_ended(output: str, code: int) -> List[str]:
  """Why QEMU ended with this return code, and the fix; empty if that is unknown or it is well."""
  causes = explain(output) if code else []
  if code < 0 and not causes:
    crash = -code in CRASHES
    causes = [
      f"QEMU has crashed ({ending(code)})" if crash
      else f"something other than qvm killed QEMU ({ending(code)})"
    ]  # fmt: skip
  return causes


def fell_back(output: str) -> List[str]:
  """What to report when QEMU runs, but could not use the host's KVM."""
  if not re.search(FELL_BACK_RE, output):
    return []
  return [f"{KVM_DENIED}: the guest is emulated, which is much slower", KVM_FIX]


class Relay:
  """Passes bytes between QEMU's pipes, our terminal and the console log until QEMU ends."""

  interactive = False  # whether the terminal is raw, and qvm's own keys are obeyed

  def __init__(
    self,
    process: "Process",
    take_terminal: Optional[Callable[[], None]],
    log: Optional[IO[bytes]],
    full: Callable[[], bool],
  ) -> None:
    self.process, self.take_terminal, self.log, self.full = process, take_terminal, log, full
    self.keys = process.stdin.fileno() if process.stdin else -1
    self.keyboard, self.screen = Keyboard(), Screen()
    self.on_terminal = os.isatty(1)
    self.pending = b""  # typed, but not yet accepted by QEMU
    self.reading = bool(process.stdin)  # whether there may be more to read from our stdin
    self.words = b""  # the end of QEMU's own messages
    self.stuck = False  # whether QEMU was ended because it would have waited for ever
    self.stdout_lost = False
    self.fell_back: List[str] = []

  def run(self) -> None:
    """Relay until QEMU has ended and all its output has been passed on."""
    out, err = self.process.stdout, self.process.stderr
    sources = {stream.fileno(): stream for stream in (out, err) if stream}
    if self.keys >= 0:
      os.set_blocking(self.keys, False)
    told = False
    while sources:
      ended = self.process.poll() is not None
      if self.take_terminal and os.isatty(0) and may_read_stdin():  # also when `fg` comes later
        self.take_terminal()
        self.take_terminal = None
      writers = [self.keys] if self.pending else []
      more = self.reading and len(self.pending) < CHUNK_BYTES and may_read_stdin()
      readers = [*sources, 0] if more else list(sources)
      ready, free, _ = select.select(readers, writers, [], 0 if ended else 1.0)
      if free:
        self.type(b"")
      if 0 in ready:
        self.read_keys()
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
    self.print(self.screen.rest())

  def read_keys(self) -> None:
    """Handle typed bytes, or the end of the input."""
    try:
      data = os.read(0, CHUNK_BYTES)
    except BlockingIOError:  # another process has read it
      return
    except OSError:  # such as nohup's stdin, which can only be written
      data = b""
    self.screen.typed(data)
    self.reading = bool(data)
    sent, commands = self.keyboard.feed(data) if self.interactive else (data, "")
    self.type(sent)
    for command in commands:
      if command == "x":
        say("ending the machine")
        end_process(self.process)
      else:
        for line in KEY_HELP:
          say(line)

  def type(self, data: bytes) -> None:
    """Write typed bytes to QEMU as far as it accepts them; the rest waits.

    The pipe stays open at the end of the input: without it QEMU drops what its guest writes while
    our pipe for that is full.
    """
    self.pending += data
    try:
      while self.pending:
        self.pending = self.pending[os.write(self.keys, self.pending) :]
    except BlockingIOError:
      pass
    except OSError:
      self.pending = b""  # QEMU has ended

  def show(self, chunk: bytes) -> None:
    """Pass the guest's output on to our stdout and the log."""
    if self.log:
      try:
        write_all(self.log.fileno(), chunk)
      except OSError as error:
        say(f"{self.log.name}: {describe(error)}; the console is no longer logged")
        self.log = None
    self.print(self.screen.show(chunk) if self.on_terminal else chunk)

  def print(self, shown: bytes) -> None:
    """Write to our stdout for as long as it takes anything."""
    if not self.stdout_lost:
      try:
        write_all(1, shown)
      except OSError:
        self.stdout_lost = True  # the machine keeps running, as it would without qvm

  def complain(self, chunk: bytes) -> None:
    """Pass on QEMU's own messages and keep the last of them."""
    self.words = (self.words + chunk)[-TAIL_BYTES:]
    if not self.fell_back:
      self.fell_back = fell_back(self.words.decode("utf-8", "replace"))
      for line in self.fell_back:
        say(line)
    with contextlib.suppress(OSError):
      write_all(2, chunk.replace(b"\n", b"\r\n") if report.newline == "\r\n" else chunk)
    if not self.stuck and re.search(STUCK_RE, self.words.decode("utf-8", "replace")):
      self.stuck = True
      end_process(self.process)


def go_raw(signals: bool) -> None:
  """Make the terminal raw: every key reaches the guest, including Ctrl-C, Ctrl-Z and Ctrl-S.

  With signals, for a terminal on stdin only, those keys and the output stay as they are.
  """
  before = termios.tcgetattr(0)
  tty.setraw(0, termios.TCSADRAIN)
  if signals:
    now = termios.tcgetattr(0)
    now[1], now[3] = before[1], now[3] | termios.ISIG
    termios.tcsetattr(0, termios.TCSADRAIN, now)
  else:
    report.newline = "\r\n"


ESCAPE_RE = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_k][^\x07\x1b]*(?:\x07|\x1b\\|\Z)|[ -/]*[0-~])"


def plain(line: bytes) -> str:
  """A line of output as a terminal would leave it, without any control character."""
  text = line.decode("utf-8", "replace")
  if not text.isprintable():  # which is quickly seen
    text = re.sub(ESCAPE_RE, "", text).rstrip("\r").rpartition("\r")[2]
    text = printable(text.expandtabs())
  return text


def last_lines(path: str, count: int = 20, start: int = 0) -> List[str]:
  """The last lines of a console log, skipping its first `start` bytes and control characters."""
  try:
    with open(path if os.path.isfile(path) else os.devnull, "rb") as file:  # others have no end
      file.seek(max(start, os.path.getsize(path) - 65536))
      data = file.read(65536)
  except OSError:
    return []
  return [line for line in map(plain, data.split(b"\n")) if line.strip()][-count:]


def show_console(lines: Iterable[str]) -> None:
  """Show lines of a guest's console."""
  for line in lines:
    say("| " + line)


# ---- Ssh ----------------------------------------------------------------------------------------

# Time for a guest to power itself off. More only delays SIGTERM for a guest that hangs; less would
# cut off a slow emulated guest while it writes to its disk.
POWER_OFF_SECONDS = 120.0
# Time for a guest to install the key once ssh answers: OpenBSD's rc.local may still be copying it.
KEY_LOGIN_SECONDS = 60.0
# Before the next login, the last one repeated. OpenSSH 9.8 and newer add 5 s of penalty for each
# login that fails, and refuse their source from 15 s on: at this pace it never has more than 14.
LOGIN_PAUSES = (1.0, 2.0, 4.0, 5.0)
# For QEMU to listen. Once it does, only the guest decides whether a connection is accepted.
REFUSED_SECONDS = 30.0
QUIET_SECONDS = 3.0  # of failed logins before they are reported
# For one look at whether ssh answers while a guest boots. QEMU's libslirp goes on trying to reach
# the guest for connections that we have closed; each that gets through later costs 1 s of penalty.
PROBE_SECONDS = 5.0

SSH_FIX = "install the OpenSSH client (Debian: apt-get install openssh-client)"


class Login(NamedTuple):
  """A running instance, and where to log in to it."""

  paths: InstancePaths
  guest: Guest
  address: Address
  patience: float  # seconds in which a login that fails is tried again
  ended: Callable[[float], bool]  # whether the machine ends within so many seconds


class LoginError(QvmError):
  """The login failed, so the command has not started."""


class HostKeyError(LoginError):
  """Something else than the instance's guest answers at its address, or it has new host keys."""


def reachable(address: Address) -> str:
  """The host name at which this machine reaches a forwarded port."""
  return "127.0.0.1" if address.host == "0.0.0.0" else address.host


def ssh_line(guest: Guest, address: Address) -> str:
  """The command with which the user can log in."""
  return f"ssh -p {address.port} {guest.user}@{reachable(address)}"


def has_banner(address: Address, timeout: float) -> bool:
  """Whether an ssh server answers; QEMU accepts connections long before the guest does."""
  try:
    with socket.create_connection((reachable(address), address.port), timeout) as link:
      return link.makefile("rb").read(4) == b"SSH-"
  except OSError:
    return False


def wait_for_ssh(address: Address, seconds: float, ended: Callable[[float], bool]) -> bool:
  """Wait for an ssh banner; False on timeout, or when ended(pause) says that QEMU has ended.

  Only for a guest that boots or resumes. Once it is up a connection without a login would count
  against qvm: OpenSSH 9.8 and newer refuse a source after 15 of them in a row.
  """
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if has_banner(address, max(0.1, min(PROBE_SECONDS, deadline - time.monotonic()))):
      return True
    if ended(0.3):
      return False
  return False


def program_for_ssh(name: str) -> str:
  """The path of a program of the OpenSSH client."""
  program = find_program(name)
  if not program:
    raise LoginError(f"no {name} found on PATH", SSH_FIX)
  if not is_known_user():
    raise LoginError(f"{name} cannot run: {NO_USER}", NO_USER_FIX)
  return program


NO_USER = f"the user with uid {os.getuid()} has no entry in /etc/passwd"
NO_USER_FIX = 'add one: echo "qvm:x:$(id -u):$(id -g)::/tmp:/bin/sh" >>/etc/passwd'


def is_known_user() -> bool:
  """Whether this user has a passwd entry, without which OpenSSH's programs end at once."""
  try:
    return bool(pwd.getpwuid(os.getuid()))
  except KeyError:
    return False


SECTOR = 512
FAT_SECTORS = 8192  # 4 MiB: FAT12 with clusters of 8 sectors
FAT_LAYOUT = (  # Microsoft's FAT specification, section 3: what follows the jump and the name
  "<HBHBHHBHHHIIBBBI11s8s",
  SECTOR,
  8,  # sectors per cluster
  1,  # reserved sectors, before the first FAT
  2,  # copies of the FAT
  512,  # entries in the root folder
  FAT_SECTORS,
  0xF8,  # medium: a fixed disk
  4,  # sectors per FAT
  63,  # sectors per track
  255,  # heads
)


def key_disk(public: bytes, start: int) -> bytes:
  """A disk with the file KEYS on a FAT file system, without the zeros at its end.

  start is the byte offset of the MBR's first partition; at 0 the file system fills the whole disk.
  """
  hidden = start // SECTOR
  layout = (*FAT_LAYOUT, hidden, 0, 0x80, 0, 0x29, 0x71766D, b"NO NAME    ", b"FAT12   ")
  boot = b"\xeb\x3c\x90qvm     " + struct.pack(*layout)
  fat = bytes.fromhex("f8ffff ff0f").ljust(4 * SECTOR, b"\0")  # the chain is cluster 2 alone
  # A plain file of 1 January 1980, in cluster 2.
  entry = struct.pack("<11sB10xHHHI", b"KEYS       ", 0x20, 0, 0x21, 2, len(public))
  system = sealed(boot + b"\xeb\xfe") + fat + fat + entry.ljust(512 * 32, b"\0") + public
  if not start:
    return system
  # Inactive, type 1 (FAT12), with block numbers only.
  row = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 1, b"\xfe\xff\xff", hidden, FAT_SECTORS)
  return sealed(bytes(446) + row).ljust(start, b"\0") + system


def sealed(sector: bytes) -> bytes:
  """A sector with the signature that ends boot sectors and MBRs."""
  return sector.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def make_key(cache: Cache) -> None:
  """Create qvm's ssh key if it does not exist; the caller holds instances_lock.

  The public half is there only beside the private one that it fits.
  """
  path = cache.ssh_key
  if not all(os.path.isfile(it) and os.path.getsize(it) for it in (path, path + ".pub")):
    with unfinished(cache) as folder:
      aside = os.path.join(folder, "key")
      program = program_for_ssh("ssh-keygen")
      run_program([program, "-q", "-t", "ed25519", "-N", "", "-C", "qvm", "-f", aside])
      remove_file(path + ".pub")
      move(aside, path, True)
      move(aside + ".pub", path + ".pub", True)
  os.chmod(path, 0o600)  # a copied cache may have another mode, which ssh refuses


def public_key(cache: Cache) -> bytes:
  """The public key that make_key created."""
  with open(cache.ssh_key + ".pub", "rb") as file:
    return file.read(4096)


def write_key_disk(paths: InstancePaths, layout: KeyDisk) -> None:
  """Write the disk that gives qvm's public key to a guest; QEMU must not be running."""
  make_key(paths.cache)
  with open(paths.key_disk, "wb") as file:
    file.write(key_disk(public_key(paths.cache), layout.start))
    file.truncate(layout.start + FAT_SECTORS * SECTOR)


def ssh_command(login: Login, log: str) -> List[str]:
  """The ssh command for an instance, ignoring the user's configuration, keys and known hosts.

  ssh writes its messages to `log`, and LOGGED_IN once it has logged in (LocalCommand). Start it in
  the cache folder: relative paths need no quoting, which differs between versions.
  """
  options = {
    "BatchMode": "yes",  # never ask for a password
    "ConnectTimeout": f"{max(1.0, min(30.0, login.patience)):.0f}",
    "GlobalKnownHostsFile": "/dev/null",
    "HostKeyAlias": HOST_ALIAS,  # whatever port it has in this run
    "IdentitiesOnly": "yes",  # the server would hang up on an agent with many keys
    "IdentityFile": os.path.join("ssh", "id_ed25519"),
    # It may come late, when an interrupted qvm has deleted the log.
    "LocalCommand": "test -e {0} && echo {1} >>{0}".format(
      shlex.quote(log).replace("%", "%%"), LOGGED_IN
    ),
    "LogLevel": "ERROR",
    "PermitLocalCommand": "yes",
    "ServerAliveCountMax": "6",  # 6 * 30 s: a guest silent for three minutes is lost
    "ServerAliveInterval": "30",
    "StrictHostKeyChecking": "yes" if knows_host_key(login.paths) else "no",
    "UserKnownHostsFile": os.path.join("instances", os.path.basename(login.paths.known_hosts)),
  }
  argv = [program_for_ssh("ssh"), "-F", "/dev/null", "-E", log, "-p", str(login.address.port)]
  for name, value in options.items():
    argv += ["-o", f"{name}={value}"]
  return [*argv, f"{login.guest.user}@{reachable(login.address)}"]


def knows_host_key(paths: InstancePaths) -> bool:
  """Whether an earlier login has noted the guest's host key, which must then be the same.

  This is OpenSSH's accept-new, which releases before 7.6 do not know.
  """
  with contextlib.suppress(OSError), open(paths.known_hosts, "rb") as file:
    return any(line.startswith(HOST_ALIAS.encode() + b" ") for line in file)
  return False


KEY_HINT = "if its image needs a key: only machines started with --detach or a command get qvm's"
LOGGED_IN = "qvm-has-logged-in"
HOST_ALIAS = "qvm"
# What ssh says of a login that will not succeed later either, and of a connection that has ended.
FINAL_RE = r"no matching|command-line|No user exists"
LOST_RE = r"Timeout, server|closed by|[Rr]eset by peer|Broken pipe|disconnect|ssh_dispatch_run"


def in_guest(
  login: Login,
  line: str,
  use: Callable[["Process"], None],
  patience: float = 0.0,
  spawn: Optional[Spawn] = None,
) -> int:
  """Run a line in the user's shell in the guest; returns its exit code.

  use(process) feeds or reads the process; it returns when ssh has nothing left. A login that fails
  is retried for login.patience seconds, one that the guest denies for `patience`; then LoginError
  is raised. A lost connection raises QvmError. Without spawn the line gets no input and its output
  is discarded.
  """
  began, failures, said = time.monotonic(), 0, False
  while True:
    code, logged_in, messages = ssh_once(login, line, use, spawn or silent())
    if logged_in:
      break
    waited, failures = time.monotonic() - began, failures + 1
    if code < 0 or waited >= retry_seconds(login, messages, patience):
      raise login_failure(login, messages or ending(code))
    if waited > QUIET_SECONDS and not said:
      said = True
      left = login.patience - waited
      say(
        f"{login.paths.name} lets nobody log in yet ({messages}); qvm tries for {left:.0f} s more"
      )
    pause = LOGIN_PAUSES[min(failures, len(LOGIN_PAUSES)) - 1] * random.uniform(1.0, 1.25)
    if login.ended(0.3 if "Connection refused" in messages else pause):
      raise QvmError(f"the instance {login.paths.name} has ended before a login ({messages})")
  if code < 0 or code == 255 and re.search(LOST_RE, messages):
    raise lost(login, messages or ending(code))
  return code


def retry_seconds(login: Login, messages: str, patience: float) -> float:
  """For how long a login that failed with these messages is worth a retry."""
  if "Permission denied" in messages:
    return patience
  if re.search(FINAL_RE, messages) or "Host key verification failed" in messages:
    return 0.0
  return min(login.patience, REFUSED_SECONDS if "Connection refused" in messages else 1e9)


def login_failure(login: Login, messages: str) -> LoginError:
  """The error for a login that failed for good."""
  paths = login.paths
  if "Host key verification failed" in messages:
    return HostKeyError(
      f"{paths.name} has another host key than at the last login: is it another machine?",
      f"if its guest has made new ones: rm {shlex.quote(paths.known_hosts)}",
    )
  who = f"{login.guest.user} at {reachable(login.address)}:{login.address.port}"
  keyless = login.guest.key_disk and not os.path.exists(paths.key_disk)
  denied = keyless and "Permission denied" in messages
  return LoginError(
    f"cannot log in to {paths.name} as {who}: {messages}", KEY_HINT if denied else ""
  )


def lost(login: Login, why: str) -> QvmError:
  """The error for a connection that ended before the command did."""
  return QvmError(f"the connection to {login.paths.name} was lost: {why}")


def ssh_once(
  login: Login, line: str, use: Callable[["Process"], None], spawn: Spawn
) -> Tuple[int, bool, str]:
  """Run ssh to completion; returns its exit code, whether it logged in, and its messages.

  The command in the guest gets a terminal if ssh inherits ours.
  """
  with contextlib.ExitStack() as stack:
    with signals.hold():
      folder = temporary_folder(login.paths.cache)
      log = stack.enter_context(
        tempfile.NamedTemporaryFile(prefix="qvm-ssh-", suffix=".log", dir=folder)
      )
      command = ssh_command(login, log.name)
      command[1:1] = ["-t" if spawn.stdin is None and is_interactive() else "-T"]
      env = {**os.environ, "SHELL": "/bin/sh"}
      # Only qvm is to get the terminal's Ctrl-C, and OpenSSH 9.6 unblocks a blocked SIGINT.
      own = spawn.stdin is not None
      spawn = spawn._replace(env=env, cwd=login.paths.cache.root, start_new_session=own)
      process = start([*command, line], spawn)
      stack.callback(close_streams, process)
      stack.callback(end_process, process)
    use(process)
    process.wait()
    words = log.read(TAIL_BYTES).decode("utf-8", "replace").split()
  code = process.returncode
  logged_in = LOGGED_IN in words or 0 <= code < 255  # a full disk has no room for its line
  return code, logged_in, printable(" ".join(w for w in words if w != LOGGED_IN))


def pass_on(source: int, target: int, ours: IO[bytes], stop: Optional[IO[bytes]] = None) -> str:
  """Copy bytes until one side has ended, then close our end of the pipe; `stop` ends it early.

  With `stop` the source is stdin, which is left alone while another process group may read it.
  Returns why stdout, if that is the target, has not got all, unless its reader has gone.
  """
  problem = ""
  try:
    while True:
      if stop:
        readers = [stop.fileno(), *([source] if may_read_stdin() else [])]
        ready = select.select(readers, [], [], POLL_SECONDS)[0]
        if stop.fileno() in ready:
          break
        if not ready:
          continue
      try:
        data = os.read(source, CHUNK_BYTES)
      except BlockingIOError:  # another process has read it
        continue
      if not data:
        break
      write_all(target, data)
  except OSError as error:  # EPIPE; EBADF for nohup's stdin, which can only be written
    problem = describe(error) if target == 1 and error.errno != errno.EPIPE else ""
  for end in filter(None, (ours, stop)):
    end.close()
  return problem


class RelayedStreams:
  """Pipes for ssh in place of our standard streams, which threads fill and empty.

  ssh makes its streams non-blocking, and with them those of every other process that has them; a
  terminal it leaves as it is, and gets. What a failed login has not read waits for the next one.
  """

  problem = ""  # why stdout has not got all

  def __init__(self, terminal: bool) -> None:
    self.theirs: List[IO[bytes]] = []  # closed once ssh has ended
    self.outputs: List[Future[str]] = []
    stdin = self.input() if not terminal else None
    stdout = self.output(1) if not terminal else None
    stderr = self.output(2) if not terminal or not os.isatty(2) else None
    self.spawn = Spawn(stdin, stdout, stderr)

  def pipe(self) -> Tuple[IO[bytes], IO[bytes]]:
    source, sink = os.pipe()
    return open(source, "rb", buffering=0), open(sink, "wb", buffering=0)

  def input(self) -> Handle:
    if not may_read_stdin():
      return subprocess.DEVNULL
    (theirs, ours), (stop, stopper) = self.pipe(), self.pipe()
    self.theirs += [theirs, stopper]
    Future(lambda: pass_on(0, ours.fileno(), ours, stop))
    return theirs

  def output(self, fd: int) -> IO[bytes]:
    ours, theirs = self.pipe()
    self.theirs.append(theirs)
    self.outputs.append(Future(lambda: pass_on(ours.fileno(), fd, ours)))
    return theirs

  def __enter__(self) -> "RelayedStreams":
    return self

  def __exit__(self, kind: Optional[Type[BaseException]], *error: object) -> None:
    for end in self.theirs:
      end.close()
    for output in self.outputs if kind is not Interrupted else ():
      self.problem += output.result()


def wait_up_to(login: Login, seconds: float) -> Callable[["Process"], None]:
  """A function that waits this long for ssh to end, then raises QvmError."""

  def wait(process: "Process") -> None:
    try:
      process.wait(seconds)
    except subprocess.TimeoutExpired:
      raise QvmError(f"the guest of {login.paths.name} has not answered within {seconds:g} s")

  return wait


def close_streams(process: "Process") -> None:
  """Close our ends of a process's pipes; unread data is lost."""
  for stream in (process.stdin, process.stdout, process.stderr):
    if stream:
      with contextlib.suppress(OSError):
        stream.close()


def shell_line(script: str) -> str:
  """A script for /bin/sh as a line that every login shell, even csh or fish, passes on unchanged.

  All but plain characters become octal escapes for POSIX's `printf %b`, so that nothing needs
  quoting.
  """
  data = os.fsencode(script)
  pieces = []
  for start in range(0, len(data), 180):  # each byte becomes up to 5; csh allows 1,024 in a word
    piece = data[start : start + 180]
    plain = re.sub(rb"[^A-Za-z0-9 _./:=@+,-]", lambda match: b"\\0%03o" % match.group()[0], piece)
    pieces.append(f"'{plain.decode('ascii')}'")
  return """exec /bin/sh -c 'eval "$(printf %b "$@")"' sh """ + " ".join(pieces)


def command_script(
  command: Sequence[str], env: Mapping[str, str], folder: str, pid_file: str, first: str = ""
) -> str:
  """The script that runs a command in the guest and ends with its exit code.

  The shell stays alive, even when the command is interrupted, to turn signal N into exit code
  128+N, which ssh cannot. While the command runs, pid_file, if named, has its process group. The
  script `first` runs before the command.
  """
  line = " ".join(map(shlex.quote, command))
  lines = ["trap : INT QUIT TERM HUP", *filter(None, [first])]
  if folder:
    lines += [f"cd {folder} || exit"]
  if pid_file:
    lines += [f"{{ echo $$ >{pid_file}; }} 2>/dev/null"]
  for name, value in env.items():
    lines += [f"{name}={shlex.quote(value)}; export {name}"]
  if not command:
    line = '"${SHELL:-/bin/sh}"'
  elif len(command) == 1:
    line = '"${SHELL:-/bin/sh}" -c ' + line
  lines += [line, "qvm_code=$?"]
  lines += ["[ $qvm_code -le 256 ] || qvm_code=$((qvm_code - 128))"]  # ksh93 has 256+N
  if pid_file:
    lines += [f"rm -f {pid_file}"]
  return "\n".join([*lines, "exit $qvm_code"])


def guest_environment(given: Sequence[str], environ: Mapping[str, str]) -> Dict[str, str]:
  """The variables for a command in the guest: those given, and CI if it is set here."""
  variables = {name: environ[name] for name in ("CI",) if name in environ}
  for text in given:
    name, equals, value = text.partition("=")
    if equals:
      variables[name] = value
    elif name in environ:
      variables[name] = environ[name]
  return variables


def refresh_script(guest: Guest) -> str:
  """The script that gives a guest from a checkpoint the time and a random seed of its own."""
  seed = "".join(f"\\0{byte or 1:03o}" for byte in os.urandom(64))  # FreeBSD's %b ends at a zero
  root = "sudo " if guest.set_clock.startswith("sudo ") else ""
  clock = time.strftime(guest.set_clock, time.gmtime(time.time() + 0.5))
  problem = "qvm: cannot set the clock of the guest"
  lines = [
    f"printf %b '{seed}' | {root}sh -c 'cat >/dev/random' 2>/dev/null",
    f"{clock} >/dev/null 2>&1 || {{ echo '{problem}' >&2; false; }}",
  ]
  return "\n".join(lines)


def refresh_guest(login: Login) -> None:
  """Give a guest from a checkpoint the time and a random seed; report a failure and go on."""
  try:
    line = shell_line(refresh_script(login.guest))
    code = in_guest(login, line, wait_up_to(login, login.patience))
    problem = ending(code) if code else ""
  except QvmError as error:
    problem = str(error)
  if problem:
    say(f"the clock of {login.paths.name} still has the time of its checkpoint: {problem}")


def noted_address(instance: Instance, paths: InstancePaths) -> Address:
  """Where a running instance listens; QvmError if QEMU has not started or the record is damaged."""
  check_here(paths)
  if holder(paths).program == "qvm":
    raise QvmError("its QEMU has not started yet")
  try:
    return parse_address(instance.ssh)
  except UsageError:
    raise QvmError(f"its record is damaged: {paths.record}")


def login_of(paths: InstancePaths, patience: float) -> Login:
  """How to log in to a running instance; LoginError if its record does not say."""
  try:
    instance = read_instance(paths)
    guest = find_guest(instance.os, instance.arch)
    address = noted_address(instance, paths)
  except QvmError as error:
    raise LoginError(str(error), error.hint)
  return Login(paths, guest, address, patience, lambda pause: wait_released(paths, pause))


def power_off(paths: InstancePaths, find_login: Callable[[], Login]) -> bool:
  """Ask the guest over ssh to power itself off; returns whether it accepted.

  HostKeyError is raised: then a guest that has new keys would be cut off while ssh answers.
  """
  try:
    login = find_login()
    say(f"asking {paths.name} to power off")
    code = in_guest(login, login.guest.power_off, wait_up_to(login, 60))
  except HostKeyError:
    raise
  except LoginError as error:
    say(f"cannot ask {paths.name} to power off: {error}")
    return False
  except QvmError:
    return True  # ssh can hang when the guest goes down, or end before the command does
  if code not in (0, 255):
    say(f"{paths.name} does not power off: {login.guest.power_off} failed (exit code {code})")
  return code in (0, 255)


REBOOTS = {HALT: "sudo shutdown -r now", HALT_OMNIOS: "sudo shutdown -i6 -g0 -y"}
HAIKU_REBOOT = "shutdown -r -q"
# What tells this boot of a guest from others: a random id or the time of the boot. Haiku has
# neither; its /dev is made at each boot. Linux is the tests' guest.
BOOT_SCRIPT = """PATH=$PATH:/sbin:/usr/sbin
sysctl -n kern.boot_id 2>/dev/null || sysctl -n kern.boottime 2>/dev/null ||
kstat -p unix:0:system_misc:boot_time 2>/dev/null ||
cat /proc/sys/kernel/random/boot_id 2>/dev/null || stat -c %Z /dev
"""
# A connection to a guest that goes down is not closed: ssh would wait for three minutes.
BOOT_ANSWER_SECONDS = 30.0


def boot_of(login: Login) -> str:
  """What tells a guest's boot from others; QvmError if it cannot be asked."""
  output: List[bytes] = []

  def read(process: Any) -> None:
    wait_up_to(login, BOOT_ANSWER_SECONDS)(process)
    # An answer fits into the pipe; a flood fills it, and takes no memory.
    output.append(os.read(process.stdout.fileno(), TAIL_BYTES))

  spawn = silent()._replace(stdout=subprocess.PIPE)
  patience = KEY_LOGIN_SECONDS if os.path.exists(login.paths.key_disk) else 0.0
  code = in_guest(login, shell_line(BOOT_SCRIPT), read, patience, spawn)
  text = output[-1].decode("utf-8", "replace").strip()
  if code or not text:
    raise QvmError(f"the guest of {login.paths.name} does not tell its boot")
  return text


def reboot(login: Login) -> None:
  """Reboot a guest over ssh and wait for a login to its new boot; QvmError if none comes."""
  before, deadline = boot_of(login), time.monotonic() + login.patience
  line = REBOOTS.get(login.guest.power_off, HAIKU_REBOOT)
  say(f"asking {login.paths.name} to reboot")
  with contextlib.suppress(QvmError):  # it may cut the connection
    if in_guest(login, line, wait_up_to(login, 60)) not in (0, 255):
      say(f"{login.paths.name}: {line} failed")
  while time.monotonic() < deadline:
    try:
      if boot_of(login._replace(patience=max(1.0, deadline - time.monotonic()))) != before:
        return
    except LoginError:
      raise
    except QvmError:  # the guest goes down while it is asked
      pass
    if login.ended(LOGIN_PAUSES[0]):
      raise QvmError(f"the machine {login.paths.name} has ended instead of rebooting")
  raise QvmError(f"{login.paths.name} has not rebooted within {login.patience:g} s; it still runs")


def stop_instance(paths: InstancePaths, force: bool, patience: float = 0.0) -> None:
  """End a running machine and report how: by its own power-off, else SIGTERM, else SIGKILL."""
  check_here(paths)
  if not force and power_off(paths, lambda: login_of(paths, patience)):
    if wait_released(paths, POWER_OFF_SECONDS):
      return say(f"{paths.name} has powered off")
    say(f"{paths.name} has not powered off within {POWER_OFF_SECONDS:g} s")
  for number, seconds in (
    (signal.SIGTERM, signals.grace(TERM_GRACE_SECONDS + 2)),
    (signal.SIGKILL, TERM_GRACE_SECONDS),
  ):
    noted = holder(paths)
    another = noted.started and start_time(noted.pid) not in ("", noted.started)
    if not noted.pid or another or wait_released(paths, 0):
      break
    say(f"{paths.name}: sending {number.name} to {noted}")
    with contextlib.suppress(ProcessLookupError):
      os.kill(noted.pid, number)
    if wait_released(paths, seconds):
      return
  if not wait_released(paths, 0):
    raise QvmError(
      f"the instance {paths.name} cannot be stopped ({holder(paths)})",
      f"pgrep -fl {shlex.quote(paths.disk)} shows its QEMU, if it runs here, and kill ends that",
    )


def run_line(login: Login, options: Options, patience: float, first: str, folder: str = "") -> int:
  """Run the command, with our stdin, stdout and stderr; a first signal is handed on to it.

  At a terminal Ctrl-C gets there by itself, as any other key does, and a hang-up with it.
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
      if terminal or not line or signals.hurried:
        raise
      signals.again()
      problem = hand_on(login, pid_file, stop.signum)
      if problem == KILLED or problem and process.poll() is None:
        raise stop
      try:
        process.wait(None if stop.signum == signal.SIGINT else TERM_GRACE_SECONDS)
      except subprocess.TimeoutExpired:
        raise stop

  with RelayedStreams(terminal) as streams:
    code = in_guest(login, line, wait, patience, streams.spawn)
  # A command may end with 255 itself. Else the connection is lost, and it gets a terminal's SIGHUP.
  has_file = line and not terminal  # else ssh has said on the terminal what happened
  if code == 255 and (
    login.ended(1.0) or has_file and hand_on(login, pid_file, signal.SIGHUP) != 1
  ):
    raise lost(login, "no answer any more")
  if streams.problem:
    say(f"stdout: {streams.problem}")
    return code or EXIT_OWN
  return code


# OpenSSH's server makes each command the leader of a process group. The file names it while the
# command runs, and may not be there yet.
HAND_ON = """
tries=0
exec 2>/dev/null
until read leader <{file}; do
  tries=$((tries + 1))
  [ $tries -lt 3 ] || exit 1
  sleep 1
done
kill -s {name} -- -$leader || exit
"""
THEN_KILL = """
tries=0
while [ -e {file} ]; do
  tries=$((tries + 1))
  if [ $tries -gt {seconds} ]; then
    rm -f {file}
    kill -s KILL -- -$leader
    exit {killed}
  fi
  sleep 1
done
"""
KILLED = 9


def hand_on(login: Login, pid_file: str, number: int) -> int:
  """Give a signal to a command in the guest: 0, or KILLED; 1 if there is no command, 2 no answer.

  Whoever sends SIGTERM expects an end: what is still there TERM_GRACE_SECONDS later is killed.
  """
  script = HAND_ON.format(file=pid_file, name=signal.Signals(number).name[3:])
  if number == signal.SIGTERM:
    script += THEN_KILL.format(file=pid_file, seconds=round(TERM_GRACE_SECONDS), killed=KILLED)
  elif number == signal.SIGHUP:
    script += f"rm -f {pid_file}"  # its shell may be killed with it
  try:
    login = login._replace(patience=TERM_GRACE_SECONDS)
    return in_guest(login, shell_line(script), wait_up_to(login, 3 * TERM_GRACE_SECONDS))
  except QvmError:
    return 2


# ---- Sync ---------------------------------------------------------------------------------------
# How a folder goes to ~/work in the guest, and how what has changed there comes back.
#
# Lists decide, not clocks. The guest lists its copy by its own find and stat: kind, mode, size,
# inode and both times of each path. Two such lines are only ever compared for being equal. Where
# the tools tell no fractions of a second, equal means nothing, and everything goes and comes.
#
# In: the guest lists; qvm answers with lines of shell, which remove what is in the way or was
# deleted here, and with a tar stream of what is not as the record says; the guest lists again. That
# list must account for every name, else the command does not run.
#
# Out: the guest lists; qvm asks by name for what is not as it was last seen, and its tar sends
# that. Folders are made from the list. What was asked for and has not come is said. Only when all
# has come is anything deleted: what was seen there, is as it was here, and is gone there.
#
# The record, a file of the instance, has for each path its line in the guest's list when both sides
# were the same, and how the file was here. It saves work and is never trusted: each line must still
# be what the guest lists, each file here what lstat says. Losing it costs time, no data.
#
# The guest is not trusted either: what comes is written as section Unpack says. And a file here is
# known by its inode: names that differ only in case or normalisation may be one file to this disk.

MAX_LIST_BYTES = 128 << 20  # of a guest's list
LINE_COST_BYTES = 32  # so that empty lines without end are soon too many
MAX_NAMES = 1000000  # in a list; so many take 400 MB of memory
MAX_IGNORED_BYTES = 64 << 20  # of what a guest still sends when all has been read that counts
MAX_GUEST_PATH_BYTES = 1023  # of a path in the guest, from ./ on; all five have PATH_MAX 1024
MAX_OCTAL_SIZE = (1 << 33) - 1  # what eleven octal digits hold
RESERVE_BYTES = 16 << 20  # of the disk, which a guest's files do not get
MAX_SAID = 50  # names of one kind that are said
LINE_BYTES = 30000  # of names in one command of the guest's: its limit is 256 KB or more
# What HFS+ leaves out of account in names, as git's utf8.c has it.
IGNORED_CHARS = dict.fromkeys(
  [*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF]
)


class FileStamp(NamedTuple):
  """How a file is here; one whose stamp is another one has been changed."""

  mode: int
  inode: int
  size: int
  mtime_ns: int
  ctime_ns: int


def stamp_of(stat: os.stat_result) -> FileStamp:
  """What lstat says of a file, as far as it shows changes; a folder has only mode and inode."""
  changes = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
  return FileStamp(stat.st_mode, stat.st_ino, *((0, 0, 0) if S_ISDIR(stat.st_mode) else changes))


COARSE_NS = 2 * 10**9  # what FAT and HFS+ count times in: two seconds, and one


def stamp_to_save(here: FileStamp, since: float) -> FileStamp:
  """A file's stamp for the record; since is a time of time.time() before it was taken.

  If a later change may leave the stamp as it is, another one, so that the file is sent once more.
  """
  times = (here.mtime_ns, here.ctime_ns)
  coarse = max(times) > since * 10**9 - COARSE_NS and not any(ns % 10**9 for ns in times)
  return here._replace(ctime_ns=0) if coarse else here


class Entry(NamedTuple):
  """A line of the guest's list."""

  kind: str  # d, f, l, or another letter for what is not synchronised
  mode: int = -1  # where the guest does not tell
  size: int = -1
  stamp: str = ""  # what is equal only while nothing has changed; empty where nothing tells


class Listing(NamedTuple):
  """What the guest lists, by path; complete unless its find says otherwise or a line is no line."""

  entries: Dict[str, Entry]
  complete: bool


class Known(NamedTuple):
  """How a path was when both sides were the same; here is None for what was only in the guest."""

  there: str
  here: Optional[FileStamp]


class SyncRecord(NamedTuple):
  """What an instance has of a folder: its name in ~/work, and how each path was."""

  folder: str
  name: str
  known: Dict[str, Known]


def is_as_known(entry: Optional[Entry], known: Optional[Known]) -> bool:
  """Whether the guest still has a path as it was when both sides were the same."""
  return bool(entry and known and entry.stamp and entry.stamp == known.there)


@functools.lru_cache(maxsize=1 << 16)
def fold(name: str) -> str:
  """What is the same for all names that some file system takes for one."""
  text = unicodedata.normalize("NFD", in_utf8(name).translate(IGNORED_CHARS)).casefold()
  return unicodedata.normalize("NFD", text)


def is_git(path: str) -> bool:
  """Whether a part of a path is .git in some spelling."""
  return any(fold(part) == ".git" for part in path.split("/"))


class Excludes:
  """What stays where it is: .git, half files of a killed qvm, and what the patterns name."""

  def __init__(self, patterns: Sequence[str]) -> None:
    texts = [unicodedata.normalize("NFD", in_utf8(text)).rstrip("/") for text in patterns]
    names = [fnmatch.translate(text) for text in texts if "/" not in text]
    paths = [fnmatch.translate(text.lstrip("/")) for text in texts if "/" in text]
    self.names = re.compile("|".join([r"\.git\Z", r"\.qvm-[0-9a-f]{12}\Z", *names]))
    self.paths = re.compile("|".join(paths)) if paths else None

  def has_itself(self, path: str) -> bool:
    """Whether a path is left out, but for the folders above it."""
    path = unicodedata.normalize("NFD", in_utf8(path))
    return bool(self.names.match(os.path.basename(path)) or (self.paths and self.paths.match(path)))

  def has(self, path: str) -> bool:
    """Whether a path, or a folder above it, is left out."""
    return any(map(self.has_itself, (path, *folders_above(path))))


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
  check_dir_fd()
  return Folder(path)


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
  cache, waiting = cache_inode(), [""]
  found: Dict[str, os.stat_result] = {}
  while waiting:
    above = waiting.pop()
    try:
      inside = dict(entries_of(folder, above, excludes))
    except (FileNotFoundError, NotADirectoryError):
      continue  # it has just vanished
    except OSError as error:
      raise unreadable(folder, above, error)
    inside = {path: it for path, it in inside.items() if (it.st_dev, it.st_ino) != cache}
    found.update(inside)
    waiting += reversed([path for path, stat in inside.items() if S_ISDIR(stat.st_mode)])
  return found


def entries_of(
  folder: Folder, above: str, excludes: Excludes
) -> Iterator[Tuple[str, os.stat_result]]:
  """The paths directly in one of the folders below, with what lstat says of each."""
  fd = folder.enter(above)
  for name in sorted(os.listdir(fd)):
    path = os.path.join(above, name)
    if excludes.has_itself(path) or is_git(name):
      continue
    with contextlib.suppress(FileNotFoundError):
      stat = os.stat(name, dir_fd=fd, follow_symlinks=False)
      for_all = stat.st_mode & 0o444 == 0o444 or not S_ISREG(stat.st_mode)
      if not for_all and not os.access(name, os.R_OK, dir_fd=fd):
        raise unreadable(folder, path, PermissionError(errno.EACCES, "Permission denied"))
      yield path, stat


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
    stat = os.stat(cache_from(os.environ).root)
    return stat.st_dev, stat.st_ino
  return -1, -1


def kind_of(stat: os.stat_result) -> str:
  """The letter that a file's kind has in the guest's list."""
  return "d" if S_ISDIR(stat.st_mode) else "l" if S_ISLNK(stat.st_mode) else "f"


def is_listed(stat: os.stat_result, entry: Entry) -> bool:
  """Whether the guest's list has a file of the kind and size that one here has."""
  is_sized = S_ISREG(stat.st_mode) and entry.size != -1
  return entry.kind == kind_of(stat) and (not is_sized or entry.size == stat.st_size)


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
    *) r=0 # busybox drops an -exec within brackets
      for k in d f l; do find "$@" -type $k -exec printf "//$k - - - %s\n" {} + || r=$?; done
      (exit $r) ;;
  esac
  echo "//end $?"
}
"""
# An empty line ends the lines that qvm sends; where there are no files to send, none comes. That a
# tar sends nothing is no failure where it may read nothing of what it is asked for.
SYNC = """
%s
cd %s || exit
n='
'
send= code=0 quoted=
case $(tar --version </dev/null 2>/dev/null) in *GNU*) quoted=--no-unquote ;; esac
t() {
  tar -cf - $quoted "$@" </dev/null && return
  c=$?
  for f do [ ! -r "$f" ] && [ ! -h "$f" ] || code=$c; done
}
all() { list . ! -name . \\( %s \\) -prune -o; }
finish() { :; }
echo qvm-is-ready
all
while IFS= read -r line && [ "$line" ]; do eval "$line"; done
[ ! "$send" ] || { tar -xpf - && cat >/dev/null; } || exit
all
finish
"""
# On the way in: folders that cannot be listed are opened, but for those that are excluded.
OPEN = """mkdir -p {0} && cd {0} &&
find . ! -name . \\( {1} \\) -prune -o -type d ! -perm -500 -exec chmod u+rwx {{}} \\;"""
# On the way out: the rest is lines that call t with names.
ASK = 'eval "$(cat)"; exit $code'


def sync_script(first: str, folder: str, patterns: Sequence[str]) -> str:
  """The script for a folder, quoted for sh; first is what it does before all: {0} is the folder.

  Only patterns of which the guest's find says what fnmatch says are for it; all hold here.
  """
  names = [text.rstrip("/") for text in (".git", *patterns)]
  plain = [text for text in names if text and not re.search(r"[/\[\\?]", text)]
  excluded = " -o ".join("-name " + shlex.quote(text) for text in plain)
  return LIST + SYNC % (first.format(folder, excluded), folder, excluded)


def guest_lines(command: str, paths: Iterable[str]) -> List[str]:
  """Lines of shell for the guest: a command for paths, as many at a time as one command takes."""
  lines: List[str] = []
  left = 0
  for path in paths:
    word = " " + shlex.quote("./" + path).replace("\n", "'\"$n\"'")
    if left <= 0:
      lines.append(command)
      left = LINE_BYTES
    lines[-1] += word
    left -= len(word)
  return lines


# A line of the list; the kind is as find or ls has it. No path has // in it, but some a newline.
LINE_RE = r"(?s)//(\S)\S* (?:([0-7]+) ([0-9]{1,19}) (\S+)|- - -) \.(?:/(.*))?\n"


def list_lines(stream: IO[bytes]) -> Iterator[bytes]:
  """The lines of the guest's next list up to //end, or fewer; RefusedError if it has no end."""
  line, size = bytearray(), 0
  for piece in iter(functools.partial(stream.readline, 1 << 16), b""):
    size += len(piece) + LINE_COST_BYTES
    if size > MAX_LIST_BYTES:
      raise RefusedError("the guest's list of names is longer than any")
    if line.endswith(b"\n") and piece.startswith(b"//"):
      yield bytes(line)
      line.clear()
    line += piece
    if line.startswith(b"//end "):
      break
  yield bytes(line)


def read_list(stream: IO[bytes]) -> Optional[Listing]:
  """The guest's next list; None when it ends before its end."""
  entries: Dict[str, Entry] = {}
  line, complete, parse = b"", True, re.compile(LINE_RE).fullmatch  # looked up once, not by line
  for line in list_lines(stream):
    match = parse(os.fsdecode(line))
    if match:
      letter, octal, length, times, path = match.groups()
      kind, mode = "f" if letter == "-" else letter, int(octal or "0", 8) & 0o777
      stamp = f"d{mode:o}" if kind == "d" else times
      entries[path or ""] = Entry(kind, mode, int(length), stamp) if octal else Entry(kind)
    if len(entries) > MAX_NAMES:
      raise RefusedError(f"the guest's list has more than {MAX_NAMES} names")
    complete = complete and (bool(match) or line.strip() == b"//end 0")
  told = [entry.stamp for entry in entries.values() if entry.kind != "d" and entry.stamp]
  if told and all(re.search(r"\.0*\Z", stamp) for stamp in told):  # whole seconds
    entries.update((path, entry._replace(stamp="")) for path, entry in [*entries.items()])
  is_there = entries.pop("", None)
  return Listing(entries, complete) if is_there and line.startswith(b"//end ") else None


def last_words(fd: int) -> str:
  """Read a descriptor to its end and close it; returns the last of it, on one line."""
  kept = b""
  with os.fdopen(fd, "rb", 0) as stream:
    for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""):
      kept = (kept + chunk)[-TAIL_BYTES:]
  return " ".join(kept.decode("utf-8", "replace").split())


def tar_header(path: str, stat: os.stat_result, target: str, tar: GuestTar) -> bytes:
  """The headers of a file in a tar stream, as the guest's tar reads them.

  Names over 100 bytes go in GNU's header L, targets in its K or, for illumos, in Solaris' X. The
  prefix of ustar is not used: the tar of NetBSD wants something left for the name.
  """
  name, link = os.fsencode(path), os.fsencode(target)
  member, before = tarfile.TarInfo(), b""
  member.mode, member.size = stat.st_mode & 0o777, 0 if target else stat.st_size
  member.mtime = min(max(0, int(stat.st_mtime)), MAX_OCTAL_SIZE)
  member.type = tarfile.SYMTYPE if target else tarfile.REGTYPE
  if S_ISDIR(stat.st_mode):  # opened, so that it can be filled; finish() in the guest closes it
    name, member.type = name + b"/", tarfile.DIRTYPE
    member.mode, member.size = member.mode | 0o700, 0
  if len(link) > 100 and not tar.long_links:
    records = pax_record(b"path", name) + pax_record(b"linkpath", link)
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = b"X", len(records)
    before = extended.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK)
    name, link = name[:100], link[:100]
  member.name, member.linkname = in_utf8(os.fsdecode(name)), in_utf8(os.fsdecode(link))
  if before or max(len(name), len(link)) > 100 or member.size > MAX_OCTAL_SIZE:
    return before + member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
  return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def pax_record(key: bytes, value: bytes) -> bytes:
  """One record of an extended header, which begins with its own length."""
  size = len(key) + len(value) + 4  # with one digit of the length
  while size < len(str(size)) + len(key) + len(value) + 3:
    size += 1
  return b"%d %s=%s\n" % (size, key, value)


SYNC_FORMAT = 1


def read_sync_record(path: str) -> Optional[SyncRecord]:
  """A record; None where there is none, or no sound one."""
  try:
    with open(path, "rb") as file:
      number, folder, name, rows = parse_json(file.read())
    if isinstance(number, int):
      check_format(path, number, SYNC_FORMAT)
    known = {
      str(path): Known(str(row[0]), FileStamp(*map(int, row[1:])) if row[1:] else None)
      for path, row in rows.items()
    }
    return SyncRecord(str(folder), str(name), known) if number == SYNC_FORMAT else None
  except QvmError:
    raise
  except Exception:  # json and what is in it can fail in many ways, down to RecursionError
    return None


def new_sync_record(paths: InstancePaths, folder: str, name: str) -> SyncRecord:
  """The record of a folder that this instance has never had, under a name of its own there."""
  for record in map(read_sync_record, sync_records(paths)):
    others = record.folder if record and record.name == name else folder
    if others != folder and os.path.isdir(others):
      own = os.fsdecode(os.fsencode(name)[:240]) + "-" + hashed(folder)[:8]
      say(f"~/work/{name} in {paths.name} is {others}: {folder} goes to ~/work/{own}")
      return SyncRecord(folder, own, {})
  return SyncRecord(folder, name, {})


class Sync:
  """A folder and its copy in a guest, from before a command until what it has changed is here."""

  def __init__(self, login: Login, options: Options) -> None:
    self.login, self.options, self.tar = login, options, login.guest.tar
    self.folder = opened_folder(options.sync)
    self.excludes = Excludes(options.sync_exclude)
    path, name = os.path.realpath(options.sync), os.path.basename(options.sync)
    self.path = login.paths.stem + ".sync-" + hashed(os.path.join(path, name))
    record = read_sync_record(self.path)
    self.record = record or new_sync_record(login.paths, path, name)
    self.copy = '"$HOME"/work/' + shlex.quote(self.record.name)  # for the guest's sh
    self.known = self.record.known
    self.saved = record and dict(self.known)  # what the record has
    self.began = time.time()
    self.list: Optional[Listing] = None  # the guest's newest
    self.found: Dict[str, os.stat_result] = {}  # what is here,
    self.mine: Dict[str, os.stat_result] = {}  # and of that, what the guest gets
    self.before: Dict[str, Optional[Entry]] = {}  # how the guest had what it gets anew
    self.code: Optional[int] = None  # the command's
    target = opened_folder(options.sync_out) if options.sync_out else self.folder
    is_first = not os.path.lexists(self.path)  # else a damaged record: what is here may be newer
    self.receiver = Receiver(target, self.excludes, self.known, is_first)
    self.outcome: Optional[Tuple[int, str]] = None  # of the session that has brought what changed

  def run(self, patience: float) -> int:
    """Copy the folder to the guest, run the command, and bring what has changed; its exit code."""
    way = self.options.sync_direction
    if way != "out":
      self.send(patience)
      patience = 0.0
    if self.code is None:
      self.code = self.command(patience)
    if way != "in":
      try:
        self.fetch()
      except QvmError as error:
        hint = f"the command itself ended with exit code {self.code}"
        if not os.path.exists(self.login.paths.mark):
          hint += "; use --sync-direction out next, or what is here replaces what is in the guest"
        raise QvmError(str(error), hint)
    return self.code

  def command(self, patience: float) -> int:
    """Run the command in the folder's copy."""
    return run_line(self.login, self.options, patience, "", self.copy)

  def session(
    self, first: str, use: Callable[[IO[bytes], IO[bytes]], None], patience: float
  ) -> Tuple[int, str]:
    """Run the script in the guest; returns its exit code and its last words.

    use() gets its stdin and stdout.
    """
    said: List[Future[str]] = []

    def talk(process: "Process") -> None:
      assert process.stdin and process.stdout and process.stderr
      fd = os.dup(process.stderr.fileno())  # the stream is closed once ssh has ended
      said.append(Future(lambda: last_words(fd)))
      lines = (process.stdout.readline(1000) for _ in range(1000))  # the user's shell may greet
      with contextlib.suppress(BrokenPipeError):  # the guest says why
        if b"qvm-is-ready\n" in lines:
          use(process.stdin, process.stdout)
        process.stdin.close()
      left = MAX_IGNORED_BYTES
      for chunk in iter(functools.partial(process.stdout.read, CHUNK_BYTES), b""):
        left -= len(chunk)
        if left < 0:
          raise RefusedError(self.receiver.cut or "the guest does not stop sending")

    pipe = subprocess.PIPE
    script = sync_script(first, self.copy, self.options.sync_exclude)
    self.list = None
    code = in_guest(self.login, shell_line(script), talk, patience, Spawn(pipe, pipe, pipe))
    return code, said[-1].result()

  def save(self) -> None:
    """Keep the record, unless the instance is gone; where it cannot be, the next sync is longer."""
    paths, (folder, name, known) = self.login.paths, self.record
    if known != self.saved and os.path.lexists(paths.disk):
      rows = {
        path: [there, *(stamp_to_save(here, self.began) if here else ())]
        for path, (there, here) in known.items()
      }
      with contextlib.suppress(OSError), unfinished(paths.cache) as scratch:
        aside = os.path.join(scratch, "record")
        with open(aside, "w", encoding="ascii") as file:
          file.write(json.dumps([SYNC_FORMAT, folder, name, rows], separators=(",", ":")))
        move(aside, self.path, False)
        self.saved = dict(known)

  # In

  def send(self, patience: float) -> None:
    """Make the guest's copy what the folder is; QvmError unless all has arrived.

    If it is that already, the command runs while the session waits, which then brings the changes.
    """
    walk = Future(lambda: walk_folder(self.folder, self.excludes))  # while ssh logs in

    def feed(stdin: IO[bytes], stdout: IO[bytes]) -> None:
      self.found = walk.result()
      self.mine = self.sendable()
      self.list = read_list(stdout)
      if not self.list:
        return
      before = self.list.entries
      lines, changed = self.plan_in(before)
      if lines:
        self.list, self.before = None, {path: before.get(path) for path in changed}
        stdin.write(os.fsencode("\n".join([*lines, "", ""])))
        self.write_files(changed, stdin)
        stdin.close()
        self.list = read_list(stdout)
      elif self.options.sync_direction == "both":
        self.remember()
        self.list = None  # this session may end before the command does: then it brings nothing
        self.code = self.command(0.0)
        stdin.write(b"all\n")
        stdin.flush()
        self.receive(stdin, stdout)

    try:
      code, words = self.session(OPEN, feed, patience)
    except QvmError:
      if self.code is None:
        raise
      return  # lost while the command ran: there will be another session
    if self.code is not None:
      self.outcome = (code, words) if self.list and code != 255 else None  # ssh's, when it is lost
      return
    self.account(code, words)
    self.remember()
    self.save()

  def sendable(self) -> Dict[str, os.stat_result]:
    """What the guest can take of what is here; the rest is said."""
    mine: Dict[str, os.stat_result] = {}
    stays: Dict[str, List[str]] = {}
    for path, stat in self.found.items():
      above = os.path.dirname(path)
      if not above or above in mine:
        problem = self.why_not(path, stat)
        if problem:
          stays.setdefault(problem, []).append(os.path.join(self.folder.path, path))
        else:
          mine[path] = stat
    for problem, paths in stays.items():
      say_each(paths, f"{problem}: it stays here")
    return mine

  def why_not(self, path: str, stat: os.stat_result) -> str:
    """Why the guest cannot take what is here; empty if it can."""
    if not (S_ISREG(stat.st_mode) or S_ISDIR(stat.st_mode) or S_ISLNK(stat.st_mode)):
      return "is no file, folder or link"
    if len(os.fsencode("./" + path)) > MAX_GUEST_PATH_BYTES:
      return "has too long a path for the guest"
    if S_ISREG(stat.st_mode) and stat.st_size > MAX_OCTAL_SIZE and not self.tar.large_files:
      return "has 8 GiB or more, too much for the guest's tar"
    return ""

  def plan_in(self, before: Dict[str, Entry]) -> Tuple[List[str], List[str]]:
    """Lines of shell for the guest, and the paths that it is to be sent then."""
    changed, in_way, gone = [], [], []
    for path, stat in self.mine.items():
      known, entry = self.known.get(path), before.get(path)
      if known and is_as_known(entry, known) and known.here == stamp_of(stat):
        continue
      changed.append(path)
      if entry and (entry.kind == "l" or entry.kind != kind_of(stat)):
        in_way.append(path)
        if entry.kind == "d":
          say(f"{shown(path)} was a folder in the guest: it is replaced, with all in it")
    for path, known in self.known.items():  # deleted here, and there as it was
      is_gone = known.here and path not in self.found and not self.excludes.has(path)
      if is_gone and is_as_known(before.get(path), known):
        gone.append(path)
    if not changed and not gone:
      return [], []
    folders = {path: entry.mode for path, entry in before.items() if entry.kind == "d"}
    opening, closing = self.folder_lines(folders)
    lines = [
      *opening,
      *guest_lines("rm -rf", in_way),
      *guest_lines("rm -f", (path for path in gone if path not in folders)),
      *guest_lines("2>/dev/null rmdir", sorted(folders.keys() & gone, reverse=True)),
      f"finish() {{ {'; '.join([*closing, ':'])}; }}",
      *(["send=1"] if changed else []),
    ]
    return lines, changed

  def folder_lines(self, there: Dict[str, int]) -> Tuple[List[str], List[str]]:
    """Lines that open the closed folders of the guest, and lines that give all their modes.

    there: the modes before; -1 where the guest does not tell.
    """
    modes = {path: mode for path, mode in there.items() if path not in self.mine}
    mine = ((p, stat.st_mode) for p, stat in self.mine.items() if S_ISDIR(stat.st_mode))
    modes.update((path, mode & 0o777) for path, mode in mine)
    opened = sorted(p for p in there if there[p] & modes.get(p, -1) & 0o700 != 0o700)
    closed = sorted((p for p in modes if modes[p] & 0o700 != 0o700), reverse=True)
    closing = []
    for mode, paths in itertools.groupby(closed, modes.__getitem__):  # the innermost first
      closing += guest_lines(f"2>/dev/null chmod {mode:o}", paths)
    return guest_lines("chmod u+rwx", opened), closing

  def write_files(self, changed: Sequence[str], out: IO[bytes]) -> None:
    """Write files as a tar stream; what vanishes or shrinks meanwhile is said."""
    vanished, short = [], []
    for path in changed:
      try:
        if not self.write_file(path, out):
          short.append(path)
      except BrokenPipeError:
        raise
      except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
          raise unreadable(self.folder, path, error)
        vanished.append(path)
    if changed:
      out.write(bytes(1024))
      out.flush()
    say_each(vanished, "has vanished, or become something else, while the folder was read")
    say_each(short, "became shorter while the folder was read: the guest has not all of it")
    for path in vanished + short:
      del self.mine[path]

  def write_file(self, path: str, out: IO[bytes]) -> bool:
    """Write a file to a tar stream, filled up with zeros if it has become shorter; else True."""
    stat = self.mine[path]
    if not S_ISREG(stat.st_mode):
      target = self.folder.do(os.readlink, path) if S_ISLNK(stat.st_mode) else ""
      out.write(tar_header(path, stat, target, self.tar))
      return True
    with self.folder.open_file(path) as file:
      now = self.mine[path] = os.fstat(file.fileno())
      if self.why_not(path, now):
        raise ValueError("has grown too large")
      out.write(tar_header(path, now, "", self.tar))
      left, is_whole = now.st_size, now.st_size >= stat.st_size
      while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        is_whole = is_whole and bool(chunk)
        left -= out.write(chunk or bytes(min(left, CHUNK_BYTES)))
    out.write(bytes(-now.st_size % BLOCK))
    return is_whole

  def account(self, code: int, words: str) -> None:
    """QvmError unless the guest lists all that it was to get."""
    problem = f"{self.options.sync} cannot be copied to {self.login.paths.name}"
    if code or not self.list:
      raise QvmError(f"{problem} ({ending(code)}): {words}")
    missing = []
    for path, stat in self.mine.items():
      entry = self.list.entries.get(path)
      if not entry or (path in self.before and not is_listed(stat, entry)):
        missing.append(path)
      elif entry.stamp and entry.kind != "d" and entry == self.before.get(path):
        missing.append(path)  # its tar has not written it
    if missing:
      names = ", ".join(map(shown, missing[:10])) + (", ..." if missing[10:] else "")
      raise QvmError(f"{problem}: {len(missing)} of {len(self.mine)} are not there: {names}", words)

  def remember(self) -> None:
    """Note how both sides are, now that they are the same.

    What is in the guest alone and was there before need not come, nor what has vanished or become
    shorter here while it was sent; the rest of that still will, and what something else has changed
    there meanwhile.
    """
    known = {}
    for path, entry in (self.list.entries if self.list else {}).items():
      before, stat = self.known.get(path), self.mine.get(path)
      if stat and path in self.before:
        there = f"d{stat.st_mode & 0o777:o}" if entry.kind == "d" and entry.stamp else entry.stamp
        known[path] = Known(there, stamp_of(stat))
      elif self.receiver.take_all or (not stat and path in self.before):
        known[path] = Known(entry.stamp, None)
      elif before and (stat or not before.here):
        known[path] = before
    self.known.clear()
    self.known.update(known)
    self.receiver.take_all = False

  # Out

  def fetch(self) -> None:
    """Bring what has changed in the guest; what cannot come is said.

    QvmError when nothing can be said to have come, or something cannot be written here.
    """
    try:
      self.judge(*(self.outcome or self.session("", self.receive, 0.0)))
    finally:
      self.receiver.finish()
      self.save()

  def receive(self, stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Ask for what has changed, once the guest lists what it has, and take it."""
    self.receiver.take_all |= bool(self.options.sync_out)  # that folder was never the same
    self.list = read_list(stdout)
    if self.list:
      asked = self.receiver.expect(self.list, self.tar.large_files)
      stdin.write(os.fsencode("\n".join([ASK, *guest_lines("t", asked), ""])))
      stdin.close()
      self.receiver.take(stdout)

  def judge(self, code: int, words: str) -> None:
    """Say what has not come, delete what may be, and raise what is an error."""
    target = self.receiver.folder.path
    problem = f"what changed in {self.login.paths.name} cannot be brought to {target}"
    receiver = self.receiver
    missing = [it for it in receiver.asked if it in receiver.present and it not in receiver.done]
    if not self.list or receiver.cut or (missing and receiver.is_empty and code):
      say_each(missing[:10], "stays in the guest")
      raise QvmError(f"{problem} ({ending(code)}): {receiver.cut} {words}".replace("  ", " "))
    say_each(missing, "stays in the guest: its tar has not sent it")
    if not self.list.complete:
      say("not all could be looked at in the guest")
    if words and (missing or not self.list.complete):
      say(f"{self.login.paths.name} says: {words[-1000:]}")
    if receiver.failed:
      raise QvmError(f"{problem}: {receiver.failed[0]}")
    if self.options.sync_delete and receiver.gone():
      if missing or receiver.held or code or not self.list.complete:
        say("nothing is deleted here, as not all has come")
      else:
        receiver.delete()


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
    self.present: Dict[str, Entry] = {}  # all that there is in the guest,
    self.asked: Dict[str, None] = {}  # what its tar is to send; also what may be there
    self.done: Set[str] = set()  # what has been dealt with,
    self.landed: Set[str] = set()  # of that, what is the same on both sides now,
    self.held: Set[str] = set()  # what stays in the guest,
    self.failed: List[str] = []  # and what could not be written here
    self.cut, self.is_empty = "", True  # what was wrong with the stream; whether there was none
    self.ready = {""}  # folders that are there, in this spelling
    self.modes: Dict[str, int] = {}  # of folders, to be set when all is in them
    self.waiting: Dict[str, str] = {}  # by the path of a folder, what was made aside for its place
    self.names: Tuple[str, Set[str]] = ("", set())  # of the folder that was looked at last
    self.cache = cache_inode()

  def expect(self, there: Listing, large_files: bool) -> Iterable[str]:
    """Make the folders that are new in the guest; returns the files that its tar is to send."""
    self.present, self.asked, self.done = there.entries, {}, set()
    large, git, folders = [], [], []
    for path, entry in self.present.items():
      if entry.kind not in "dfl" or is_as_known(entry, self.known.get(path)):
        continue
      if self.excludes.has(path):
        continue
      if is_git(path):
        git += [path] if is_git(os.path.basename(path)) else []
      elif entry.kind == "f" and entry.size > MAX_OCTAL_SIZE and not large_files:
        large.append(path)
      elif entry.kind == "d":
        folders.append(path)
      else:
        self.asked[path] = None
    say_each(git, "stays in the guest: some file systems take it for .git")
    say_each(large, "stays in the guest: it has 8 GiB or more, too much for its tar")
    self.held.update(git, large)
    for path in sorted(folders):
      self.attempt(path, self.put_folder)
    if not there.complete:  # what is not listed may be there
      self.asked.update((path, None) for path, here in self.gone().items()
                        if not S_ISDIR(here.mode))  # fmt: skip
    return self.asked

  def gone(self) -> Dict[str, FileStamp]:
    """What was the same on both sides and is not in the guest any more, as it was here."""
    return {
      path: known.here
      for path, known in self.known.items()
      if known.here and path not in self.present and not self.excludes.has(path)
    }

  def take(self, stream: IO[bytes]) -> None:
    """Unpack all that comes and was asked for, until the stream ends or is no honest tar's."""
    self.cut, self.is_empty = "", not stream.peek(1)  # type: ignore[attr-defined]
    try:
      for tape, member in tar_members(stream, MAX_HEADER_BYTES, True):
        with contextlib.suppress(ValueError):  # such a name was not asked for
          path = safe_path(member.name)
          if path in self.asked:
            self.attempt(path, functools.partial(self.put, tape, member))
    except ValueError as error:
      self.cut = f"what the guest sends is refused: {error}"

  def attempt(self, path: str, put: Callable[[str], Optional[os.stat_result]]) -> None:
    """Put something into its place; what goes wrong with it alone is said."""
    where, reason = shown(os.path.join(self.folder.path, path)), ""
    try:
      if safe_path(path) != path or not path:
        raise ValueError("is not a plain path")
      here = put(path)
      if here:
        self.note(path, here)
    except Kept:
      pass
    except ValueError as error:
      reason = f"it {error}"
    except OSError as error:
      if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise QvmError(f"{where}: {describe(error)}")
      if error.errno in BAD_NAME_ERRORS:
        reason = describe(error)
      else:
        self.failed.append(f"{where}: {describe(error)}")
        say(self.failed[-1])
    if reason:
      self.held.add(path)
      say(f"{shown(path)} stays in the guest: {reason}")
    self.done.add(path)

  def note(self, path: str, here: os.stat_result) -> None:
    """Note that both sides are the same now, unless what has come is not what the guest lists."""
    self.landed.add(path)
    entry = self.present.get(path)
    if entry:
      self.known[path] = Known(entry.stamp if is_listed(here, entry) else "", stamp_of(here))

  def keep(self, path: str, reason: str) -> None:
    """Leave what is here as it is, and say why, once."""
    self.known.pop(path, None)
    if path not in self.held:
      say(f"{shown(os.path.join(self.folder.path, path))} {reason}")
    self.held.add(path)
    raise Kept

  def check_unchanged(self, path: str, there: os.stat_result) -> None:
    """Kept, which is said, unless what is here is as it was when both sides were the same.

    The time of the status change is left out: links and renames elsewhere change it.
    """
    known = self.known.get(path)
    if not self.take_all and not (known and known.here and known.here[:4] == stamp_of(there)[:4]):
      self.keep(path, "has changed here and in the guest: it stays as it is")

  # Folders

  def make(self, path: str) -> int:
    """A descriptor of a folder for what comes; it and those above are made where they are not.

    Kept where something of ours is in the way.
    """
    steps = itertools.takewhile(lambda each: each not in self.ready, (path, *folders_above(path)))
    for each in reversed(list(steps)):
      there = self.there(each)
      if there and (there.st_dev, there.st_ino) == self.cache:
        raise ValueError("is qvm's cache here")
      if there and S_ISDIR(there.st_mode):
        self.open_up(each)
      else:
        if there:
          self.check_unchanged(each, there)
          self.folder.do(os.unlink, each)
        self.folder.do(os.mkdir, each, 0o755)
      self.ready.add(each)
    return self.folder.enter(path)

  def open_up(self, path: str) -> None:
    """Open a closed folder until all is in it."""
    fd = self.folder.enter(path)
    mode = os.fstat(fd).st_mode & 0o777
    if path and mode & 0o700 != 0o700:
      os.fchmod(fd, mode | 0o700)
      self.modes[path] = mode

  def put_folder(self, path: str) -> os.stat_result:
    """Make a folder that is new in the guest, or give one its new mode once all is in it."""
    mode = self.present[path].mode
    if mode & 0o500 != 0o500:
      raise ValueError(f"is closed there (mode {mode:o}), and so is what it holds")
    fd = self.make(path)
    if mode >= 0:
      self.modes[path] = mode
    return os.fstat(fd)

  # Names

  def there(self, path: str) -> Optional[os.stat_result]:
    """What has that name here, in that spelling: if need be, it is renamed to it."""
    try:
      there = self.folder.stat(path)
    except FileNotFoundError:
      return None
    spelled = self.spelled(path, there)
    if spelled == path:
      return there
    self.respell(spelled, path, there)
    return self.folder.stat(path)  # with the time of this change

  def spelled(self, path: str, there: os.stat_result) -> str:
    """How the name of a file is spelled on this disk, which may take several names for one."""
    fd, name = self.folder.at(path)
    above = os.path.dirname(path)
    if self.names[0] != above or name not in self.names[1]:
      self.names = above, set(os.listdir(fd))
    for other in () if name in self.names[1] else self.names[1]:
      if fold(other) == fold(name):
        with contextlib.suppress(FileNotFoundError):
          if os.path.samestat(os.stat(other, dir_fd=fd, follow_symlinks=False), there):
            return os.path.join(above, other)
    return path

  def respell(self, old: str, new: str, there: os.stat_result) -> None:
    """Rename what is here in another spelling, if the guest has it only in the new one."""
    if old in self.present or self.excludes.has(old) or is_git(old):
      raise ValueError(f"is the same file as {shown(old)} to this disk")
    if not S_ISDIR(there.st_mode):
      self.check_unchanged(old, there)
    self.folder.rename(old, new)
    for path in [p for p in self.known if p == old or p.startswith(old + "/")]:
      self.known[new + path[len(old) :]] = self.known.pop(path)

  # Files and links

  def put(self, tape: Tape, member: "tarfile.TarInfo", path: str) -> Optional[os.stat_result]:
    """Give a file or link that has come its place; returns what is there then, if it is that."""
    self.make(os.path.dirname(path))
    if member.issym():
      return self.put_link(path, member.linkname)
    if not member.isreg() and not member.islnk():
      raise ValueError("is no file or link")
    if member.islnk() and safe_path(member.linkname) not in self.landed:
      raise ValueError(f"is a link to {shown(member.linkname)}, which has not come")
    pieces = pieces_of(member) if member.isreg() else [(0, size_of(self.folder, member))]
    size = sum(size for _, size in pieces)  # holes take no space
    left = free_space(self.folder.path) - RESERVE_BYTES
    if size > left:
      raise disk_full(os.path.join(self.folder.path, path), size - max(left, 0))
    return self.put_file(tape, member, path)

  def put_file(self, tape: Tape, member: "tarfile.TarInfo", path: str) -> Optional[os.stat_result]:
    """Write a file aside; it takes its place when whole, and only if it brings anything new."""
    mode = member.mode & 0o777
    with self.aside(path) as aside:
      with self.folder.new_file(aside) as file:
        self.folder.write_member(tape, member, file)
        file.flush()
        if self.is_same(path, mode, file):
          return self.there(path)
        os.fchmod(file.fileno(), mode)
        try:
          os.utime(file.fileno(), (member.mtime, member.mtime))
        except (OverflowError, ValueError):
          raise ValueError("has an impossible time")
      return self.replace(path, aside)

  def put_link(self, path: str, target: str) -> Optional[os.stat_result]:
    """Make a symbolic link, where there is none with that target."""
    with contextlib.suppress(OSError):
      if self.folder.do(os.readlink, path) == target:
        return self.there(path)
    with self.aside(path) as aside:
      self.folder.link(aside, target)
      return self.replace(path, aside)

  @contextlib.contextmanager
  def aside(self, path: str) -> Iterator[str]:
    """A path beside another, for what is not whole; deleted afterwards, unless it has to wait."""
    aside = os.path.join(os.path.dirname(path), ".qvm-" + os.urandom(6).hex())
    try:
      yield aside
    finally:
      if self.waiting.get(path) != aside:
        with contextlib.suppress(FileNotFoundError):
          self.folder.do(os.unlink, aside)

  def is_same(self, path: str, mode: int, new: IO[bytes]) -> bool:
    """Whether a file is here already with that mode and content."""
    with contextlib.suppress(OSError, ValueError), self.folder.open_file(path) as file:
      there, size = os.fstat(file.fileno()), os.fstat(new.fileno()).st_size
      if (there.st_mode & 0o7777, there.st_size) == (mode, size):
        new.seek(0)
        chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
        return all(chunk == new.read(len(chunk)) for chunk in chunks)
    return False

  def replace(self, path: str, aside: str) -> Optional[os.stat_result]:
    """Rename what was made aside to its name, if what has that now is as it was.

    A folder with files must wait until delete() has emptied it, and may.
    """
    there = self.there(path)
    if there:
      self.check_unchanged(path, there)
    if there and S_ISDIR(there.st_mode):
      try:
        self.folder.do(os.rmdir, path)
      except OSError:
        older, self.waiting[path] = self.waiting.get(path), aside
        if older:
          self.folder.do(os.unlink, older)
        return None
    self.folder.rename(aside, path)
    return self.folder.stat(path)

  # At the end

  def delete(self) -> None:
    """Delete what was the same on both sides, is so here, and is not in the guest any more."""
    for path, here in sorted(self.gone().items(), reverse=True):
      try:
        self.delete_one(path, here)
        self.known.pop(path, None)
      except (Kept, FileNotFoundError, NotADirectoryError):
        pass
      except OSError as error:
        say(f"{shown(os.path.join(self.folder.path, path))} stays here: {describe(error)}")

  def delete_one(self, path: str, here: FileStamp) -> None:
    """Delete a file or an empty folder that is as it was."""
    self.open_up(os.path.dirname(path))
    there = self.folder.stat(path)
    if self.spelled(path, there) != path:
      return  # it is there by another name
    is_folder = S_ISDIR(there.st_mode) and here.inode == there.st_ino
    if not is_folder:
      self.check_unchanged(path, there)
      return self.folder.do(os.unlink, path)
    try:
      self.folder.do(os.rmdir, path)
    except OSError as error:
      self.keep(path, f"{FOLDER_STAYS} ({describe(error)})")

  def finish(self) -> None:
    """Put what has waited into its place, and set the modes of folders."""
    for path, aside in self.waiting.items():
      try:
        self.folder.do(os.rmdir, path)
        self.folder.rename(aside, path)
        self.note(path, self.folder.stat(path))
      except OSError as error:
        say(f"{shown(os.path.join(self.folder.path, path))} {FOLDER_STAYS} ({describe(error)})")
        with contextlib.suppress(OSError):
          self.folder.do(os.unlink, aside)
    for path in sorted(self.modes, reverse=True):
      with contextlib.suppress(OSError):
        fd = self.folder.enter(path)
        os.fchmod(fd, self.modes[path])
        if path in self.landed:
          self.note(path, os.fstat(fd))


FOLDER_STAYS = "is a folder here, but not in the guest: it stays"


def run_command(login: Login, options: Options, patience: float, resumed: bool = False) -> int:
  """Run the command of `run` or `ssh` in the guest, or a shell; returns its exit code.

  The folder of --sync goes there before and comes back afterwards, however the command ends. A
  guest resumed from a checkpoint gets the time before all.
  """
  if not options.sync:
    return run_line(login, options, patience, refresh_script(login.guest) if resumed else "")
  if resumed:  # the time must be right before files get their times
    refresh_guest(login)
  return Sync(login, options).run(patience)


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
  socket: str = ""  # the path of the socket at which it is served
  release: str = ""
  validator: str = ""
  digest: str = ""  # empty: not known yet


class Stream:
  """A running server of an image, as qvm sees it."""

  def __init__(self, process: "Process", life: int) -> None:
    self.process, self.life = process, life
    self.socket = ""  # its path
    self.answer = ServerAnswer(error="the server of the image has ended")  # unless it says more
    self.answered = threading.Event()
    self.reader = threading.Thread(target=self.read_answers, daemon=True)
    self.reader.start()

  def read_answers(self) -> None:
    """Pass on what the server says, and keep its last answer."""
    assert self.process.stdout
    for line in self.process.stdout:
      text = line.decode("utf-8", "replace").rstrip("\n")
      if text.startswith("{"):
        self.answer = ServerAnswer(**json.loads(text))
        self.answered.set()
      elif text:
        say(re.sub(r"\Aqvm: ", "", text))
    self.answered.set()

  def first_answer(self) -> ServerAnswer:
    """What the server answers; QvmError if it is an error, or if the server has ended."""
    while not self.answered.wait(POLL_SECONDS):
      pass
    if self.answer.error:
      raise QvmError(self.answer.error, self.answer.hint)
    return self.answer

  def release(self) -> None:
    """From now on the server lives as long as QEMU."""
    if self.life >= 0:
      os.close(self.life)
      self.life = -1

  def finish(self) -> None:
    """Wait for the server to end, which it does once QEMU has."""
    self.release()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(signals.grace(POWER_OFF_SECONDS))  # it may be checking a whole image
    end_process(self.process)
    self.reader.join(TERM_GRACE_SECONDS)
    if self.process.stdout:
      self.process.stdout.close()

  def raise_server_error(self, kind: object, error: Optional[BaseException], trace: object) -> None:
    """Exit callback: if the server failed, raise its error, because it explains QEMU's."""
    self.finish()
    if self.answer.error and (error is None or isinstance(error, QvmError)):
      raise QvmError(self.answer.error, self.answer.hint)
    if self.process.returncode and not self.answer.error:
      say(f"the server of the image was ended from outside ({ending(self.process.returncode)})")
      drop_socket(self.socket)


def own_program() -> List[str]:
  """What starts another qvm like this one."""
  return [sys.executable, os.path.abspath(sys.argv[0] if packed_code[0] else __file__)]


def streamed_base(
  plan: Plan, options: Options, fds: Tuple[int, int], stack: contextlib.ExitStack
) -> Optional[Base]:
  """The missing image, served while it is downloaded; None when it cannot be, or is there now.

  fds are those of the instance's lock and of the console log, or -1.
  """
  ours, life = os.pipe()
  command = [*own_program(), SERVE, f"{fds[0]},{ours},{fds[1]}", "run", "--stream"]
  command += ["--platform", plan.guest.arch, "--name", plan.name]
  command += ["--rm"] * plan.ephemeral + ["--progress"] * options.progress
  command += [f"--qemu-release={plan.qemu_release}"] * bool(plan.qemu_release)
  command += ["--qemu", options.qemu] * bool(options.qemu) + [plan.guest.os, plan.version]
  with signals.hold():
    try:
      kept = tuple(fd for fd in (*fds, ours) if fd >= 0)
      streams = (subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT)
      process = start(command, Spawn(*streams, pass_fds=kept, start_new_session=True))
    finally:
      os.close(ours)
    stream = Stream(process, life)
    stack.push(stream.raise_server_error)
  answer = stream.first_answer()
  if answer.reason:
    say(f"{answer.reason}: it is downloaded first")
  if not answer.socket:
    stream.finish()
    return None
  stream.socket = answer.socket
  image = AssetRecord(sha256=answer.digest, release=answer.release, validator=answer.validator)
  name = os.path.basename(plan.base)[: -len(".qcow2")]
  backing = f"{STREAMED}///{name}?socket={answer.socket}"
  return Base(backing, image, fds=(life,))


def serve(words: Sequence[str]) -> int:
  """The whole life of an image's server; everything that goes wrong is an answer."""
  lock, life, log = map(int, words[0].split(","))
  options = parse_command_line(words[1:])
  report.progress, report.log = options.progress, log
  try:
    net = net_from(os.environ)
    Server(plan_from(resolve(options), net), net, (lock, life)).run()
  except NoStream as reason:
    send_answer(ServerAnswer(reason=str(reason)))
  except (QvmError, OSError, Cancelled) as error:
    report_failure(error)
    return EXIT_FAILED
  return 0


def send_answer(answer: ServerAnswer) -> None:
  """Send an answer to qvm."""
  write_all(1, json.dumps(answer._asdict()).encode() + b"\n")


def report_failure(error: BaseException) -> None:
  """Tell qvm of a failure; once qvm has left, the console log."""
  try:
    send_answer(ServerAnswer(error=describe(error), hint=getattr(error, "hint", "")))
  except OSError:
    say(describe(error))


class Server:
  """Hands out an image that is being downloaded, and makes it the base image in the end."""

  def __init__(self, plan: Plan, net: Net, fds: Tuple[int, int]) -> None:
    self.plan, self.net, self.paths = plan, net, plan.paths
    self.lock = Lock(plan.paths.lock)
    self.lock.fd, self.life = fds  # inherited
    self.releases = Releases(net)
    self.fresh = not os.path.lexists(self.paths.disk)
    self.ready = False  # whether QEMU may have been started
    self.gone = threading.Event()  # set when QEMU and qvm have ended
    self.folder = self.validator = ""
    self.fd, self.size = -1, 0  # of the image
    threading.Thread(target=self.watch_pipe, daemon=True).start()

  def watch_pipe(self) -> None:
    """Notice that nobody holds the other end of the pipe any more."""
    os.read(self.life, 1)
    if not self.ready:
      os._exit(0)  # as its qvm wanted
    self.gone.set()

  def run(self) -> None:
    """Serve until QEMU has ended, then see to its overlay."""
    with contextlib.ExitStack() as serving:
      if self.bring_image(serving):
        self.gone.wait()
        self.rebase_overlay()

  def bring_image(self, serving: contextlib.ExitStack) -> bool:
    """Download the image while the guest runs, if it is not there; False when that is all."""
    with contextlib.ExitStack() as stack:
      lock = download_lock(self.plan.cache.downloads, os.path.basename(self.plan.base))
      self.folder = stack.enter_context(lock)
      if os.path.isfile(self.plan.base):
        send_answer(ServerAnswer())
        return False
      pinned = self.plan.release or pinned_release(self.plan, self.releases)
      find_image(self.plan, self.releases, pinned, self.begin)
      stack.callback(self.download.file.close)  # before another qvm may write
      stack.callback(self.net.cancelled.set)
      self.check_header()
      self.validator = self.download.file.note.validator
      self.digest.thread.join(DIGEST_SECONDS)
      served = (
        self.listen(serving),
        self.download.asset.tag,
        self.validator,
        self.digest.value or "",
      )
      say("the guest runs while its image comes; the digest is checked when all of it is there")
      with self.download.file.lock:
        if self.download.error:
          raise self.download.error
        self.ready = True
      send_answer(ServerAnswer("", "", "", *served))
      return self.wait_until_complete()

  def begin(self, asset: Asset) -> None:
    """Start to fetch the image, and wait for its beginning; NotFound if it is not there."""
    if asset.name != self.plan.image_asset:
      check_exists(self.net, asset.url(self.net))
      raise NoStream(f"{asset.name} of {asset.tag} is a bundle")
    self.download = Download(self.net, asset, self.folder, streamed=True)
    self.filler = threading.Thread(target=self.fill, daemon=True)
    self.filler.start()
    self.digest = Future(lambda: self.releases.digest(asset))
    file = self.download.file
    with file.lock:
      while not ((self.download.accepted or file.complete()) and file.first_missing(0, 0) < 0):
        if self.download.error:
          raise self.download.error
        file.lock.wait(POLL_SECONDS)
      self.size, self.fd = file.total or 0, os.open(file.part, os.O_RDONLY)

  def fill(self) -> None:
    """Fetch all of the image, for as long as there is a guest.

    Before it runs a failure ends the run; later each is like a line that is down.
    """
    while not self.gone.is_set():
      try:
        with progress.including(self.download.file):
          return self.download.fetch()
      except Cancelled:
        return
      except Exception as error:
        with self.download.file.lock:
          if not self.ready:  # the main thread raises it
            return self.download.abort(error)
        self.download.fail(error)
      self.gone.wait(RETRY_LATER_SECONDS)

  def check_header(self) -> None:
    """Refuse an image that is not safe, before QEMU sees it."""
    part = self.download.file.part
    self.download.check_kind(os.pread(self.fd, HEAD_BYTES, 0))
    os.truncate(part, self.size)  # its length is looked at, too
    try:
      check_image(part)
    except RefusedError:
      self.download.file.discard()
      raise

  def wait_until_complete(self) -> bool:
    """Make the image the base image once all of it is there; False when it is no good.

    Whatever else fails is tried again while the guest runs, then by the next run.
    """
    said = ""
    while True:
      ended = self.gone.is_set()
      try:
        if self.download.file.complete():
          self.publish()
          return True
      except BadImageError as error:
        self.download.abort(error)
        self.end_machine(error)
        return False
      except (QvmError, OSError) as error:
        if describe(error) != said:
          said = describe(error)
          say(f"{said}; {self.plan.image_asset} is kept as it is")
        self.gone.wait(RETRY_LATER_SECONDS)
      if ended:
        return True
      self.filler.join(POLL_SECONDS)
      progress.show()

  def publish(self) -> None:
    """Check the image, and make it the base image; its file stays open.

    Only here is BadImageError raised, and only that throws away what a guest has written.
    """
    if os.path.isfile(self.plan.base):
      return  # the attempt before has failed after that
    self.filler.join()
    self.download.file.hash_all(self.net.cancelled)
    digest = self.digest.result()
    try:
      check_digest(self.download, digest)
      install_image(self.plan, self.download)
    except RefusedError as error:
      hint = "what its guest wrote in this run is gone" if self.fresh else error.hint
      raise BadImageError(f"{error}: the machine is ended", hint)
    name = self.plan.image_asset
    say(f"{name} is there, and has the digest {digest[:16]}…" if digest else f"{name} is there")

  def end_machine(self, error: BadImageError) -> None:
    """End the machine, discard what was made in this run, and condemn what earlier ones made."""
    condemn(self.plan, str(error), self.validator, self.plan.name if self.fresh else "")
    report_failure(error)
    number: int = signal.SIGTERM
    while not self.gone.wait(POLL_SECONDS):
      if holder(self.paths).program == "QEMU":
        with contextlib.suppress(ProcessLookupError):
          os.kill(holder(self.paths).pid, number)
        number = 0 if self.gone.wait(TERM_GRACE_SECONDS) else signal.SIGKILL
    if self.fresh:
      remove_instance(self.paths, report.log >= 0)

  def rebase_overlay(self) -> None:
    """QEMU has ended: put a persistent overlay on the base image, if that is there."""
    if self.plan.ephemeral or not is_streamed(self.paths.disk):
      return
    if not os.path.isfile(self.plan.base):
      share = base_share(self.paths)
      say(f"{share}% of the image of {self.paths.name} are there; the next run fetches the rest")
      return
    before = read_instance(self.paths)
    with instances_lock(self.plan.cache):
      check_instance(self.plan)
      make_overlay(self.plan, backing_name(self.plan, self.plan.base), self.lock)
      record_instance(self.plan, before, cached_base(self.plan))

  def listen(self, stack: contextlib.ExitStack) -> str:
    """Open the socket, whose path must be short (104 bytes on macOS) and plain."""
    folder = temporary_folder(self.plan.cache)
    folder = folder if re.match(r"[A-Za-z0-9_./-]{1,60}\Z", folder) else "/tmp"
    drop_dead_sockets(folder)
    with signals.hold():
      folder = tempfile.mkdtemp(prefix="qvm-", dir=folder)
      stack.callback(remove_tree, folder)
    path = os.path.join(folder, "nbd")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)

    def accept() -> None:
      while True:
        threading.Thread(target=Export(self, listener.accept()[0]).run, daemon=True).start()

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
      # macOS has 8 KiB, and refuses to set it once the client has left.
      self.link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
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
        threading.Thread(target=self.answer_read, args=(handle, start, count), daemon=True).start()
    else:
      self.send(handle, 0 if kind == NBD_FLUSH else errno.EINVAL)
    return True

  def answer_read(self, handle: bytes, start: int, count: int) -> None:
    """Answer a read."""
    data = None
    with contextlib.suppress(OSError):  # the client waits for an answer
      data = self.server.read(start, count)
    self.send(handle, errno.EIO if data is None else 0, data or b"")

  def send(self, handle: bytes, error: int, data: bytes = b"") -> None:
    """Send the answer to a request."""
    head = struct.pack(">II8s", NBD_REPLY_MAGIC, error, handle)
    with self.sending, contextlib.suppress(OSError):
      self.link.sendall(head + data)


# ---- Machine ------------------------------------------------------------------------------------


def memory_warning(memory: str, available: Optional[int]) -> str:
  """A warning if a guest's memory exceeds the bytes available on the host, else empty."""
  wanted = memory_bytes(memory)
  if available is None or wanted <= available:
    return ""
  return (
    f"the guest gets {megabytes(wanted)} of memory, but only {megabytes(available)} are free: "
    "if it is killed or slow, give it less with -m"
  )


def bind(kind: int, address: Address, flag: str = "--ssh-port") -> Optional["socket.socket"]:
  """A socket of this kind bound to an address of option `flag`; None if the port is taken."""
  taken = socket.socket(socket.AF_INET, kind)
  try:
    if kind == socket.SOCK_STREAM:
      taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU's user network does
    taken.bind((address.host, address.port))
  except OSError as error:
    taken.close()
    if error.errno == errno.EADDRNOTAVAIL:
      raise QvmError(f"{address.host} is not an address of this machine ({flag})")
    if error.errno == errno.EACCES:
      raise QvmError(f"port {address.port} needs root ({flag}); choose one above 1023")
    return None
  return taken


def free_port(kind: int, address: Address, flag: str = "--ssh-port") -> int:
  """An address's port, or in place of 0 a free one, which QEMU binds soon after; 0: it is taken."""
  probe = bind(kind, address, flag)
  if not probe:
    return 0
  # macOS lets QEMU bind one address of a port that is taken: a connection tells. The probe stays
  # open for that, as one to a port that nobody has can be one to itself. create_connection() would
  # load the codec for names, which takes 2 ms.
  with probe, socket.socket() as link:
    if address.port and kind == socket.SOCK_STREAM:
      link.settimeout(1.0)
      if link.connect_ex((reachable(address), address.port)) == 0:
        return 0
    return int(probe.getsockname()[1])


def free_forward(forward: Forward) -> Forward:
  """The same, with a port in place of 0; QvmError if it is taken."""
  kind = socket.SOCK_STREAM if forward.kind == "tcp" else socket.SOCK_DGRAM
  port = free_port(kind, Address(forward.host, forward.port), "--publish")
  if not port:
    raise QvmError(
      f"port {forward.port}/{forward.kind} on {forward.host} is taken (--publish {forward})",
      "choose another, or 0 for a free one",
    )
  return forward._replace(port=port)


def reserve_port(
  wanted: Address, stack: contextlib.ExitStack, others: Sequence[int] = ()
) -> Tuple[Address, int]:
  """Find a free port; returns it with the descriptor of a lock that keeps every other qvm off it.

  It is none of `others`, which this machine publishes.
  The lock is the UDP port of the same number, to which nothing is ever sent. The kernel gives it to
  one process, whatever its cache or user, and frees it when QEMU has ended.
  """
  why = ""
  for port in range(wanted.port, wanted.port + 1 if wanted.chosen else 65536):
    if port in others:
      why = "the machine publishes it"
      continue
    address, why = wanted._replace(port=port), "something uses its UDP port, by which qvm locks it"
    lock = bind(socket.SOCK_DGRAM, address)
    if lock and free_port(socket.SOCK_STREAM, address):
      fd = lock.detach()
      stack.callback(os.close, fd)
      return address, fd
    if lock:
      why = "something uses its TCP port"
      lock.close()
  raise QvmError(
    f"port {wanted.port} on {wanted.host} is taken (--ssh-port): {why}",
    "choose another, or omit --ssh-port to get a free one",
  )


def lock_forwards(forwards: Sequence[Forward], stack: contextlib.ExitStack) -> Iterator[int]:
  """Lock the published TCP ports as reserve_port() locks ssh's: QEMU may bind them much later.

  A UDP port that is published, too, or that another program has, is no lock: then there is none.
  """
  udp = [forward.port for forward in forwards if forward.kind == "udp"]
  for host, port in [(it.host, it.port) for it in forwards if it.port not in udp]:
    lock = bind(socket.SOCK_DGRAM, Address(host, port), "--publish")
    if lock:
      fd = lock.detach()
      stack.callback(os.close, fd)
      yield fd


def has_linaro(share: str) -> bool:
  """Whether there is a real Linaro firmware: release v1.1.0 has an HTML page in its place."""
  path = os.path.join(share, "linaro_uefi.fd")
  try:
    with open(path, "rb") as file:
      return os.path.getsize(path) >= 1 << 19 and not looks_like_html(file.read(512))
  except OSError:
    return False


def needs_cpu_mask(cpuinfo: str, kvm: str) -> bool:
  """Whether KVM on this CPU exposes AMX or LA57, which crash older BSD kernels."""
  try:
    with open(cpuinfo, errors="replace") as file:
      flags = next((line.split() for line in file if line.startswith("flags")), [])
  except OSError:
    return False
  return ("amx_tile" in flags or "la57" in flags) and os.access(kvm, os.R_OK | os.W_OK)


class FailedAccelerator(NamedTuple):
  """What a record in accelerators/ says: on this host, with this kernel and QEMU, tcg it is."""

  accelerator: str = ""  # kvm or hvf; empty: nothing is known to fail
  qemu: str = ""  # the program
  problem: str = ""  # its words
  time: str = ""  # in UTC


def host_cpu(cpuinfo: str) -> List[str]:
  """Lines that distinguish this host's CPU and kernel from others."""
  uname = os.uname()
  kernel = [uname.sysname, uname.release, uname.machine]
  try:
    with open(cpuinfo, errors="replace") as file:
      lines = file.read(1 << 16).split("\n\n")[0].split("\n")
  except OSError:
    return [*kernel, ask_program(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"])[1]]
  return kernel + [line for line in lines if re.match(r"model name|flags|Features|CPU p", line)]


def accelerator_path(cache: Cache, qemu: str) -> str:
  """The path of the record about a QEMU's accelerators, on this host with this kernel."""
  try:
    stat = os.stat(qemu)
  except OSError:
    return ""
  words = [os.path.basename(qemu), f"{stat.st_size} {int(stat.st_mtime)}"]
  return cache.path("accelerators", hashed("\n".join(host_cpu("/proc/cpuinfo") + words)) + ".json")


def failed_accelerator(cache: Cache, qemu: str) -> FailedAccelerator:
  """What an earlier run has found out about a QEMU's accelerators."""
  known = names_in(cache.path("accelerators"))  # mostly none, and then nothing else is read
  return sound_record(FailedAccelerator(), accelerator_path(cache, qemu) if known else "")


def is_intel_program(path: str) -> bool:
  """Whether a Mach-O header says Intel (mach/machine.h); so does that of the QEMU to download."""
  try:
    with open(path, "rb") as file:
      return file.read(8) == bytes.fromhex("cffaedfe07000001")
  except OSError:
    return True


def has_hvf() -> bool:
  """Whether this Mac has HVF; most virtual machines and everything under Rosetta have none."""
  return ask_program(["/usr/sbin/sysctl", "-n", "kern.hv_support"]) == (0, "1")


# Starts QEMU as far as its accelerator and a CPU; with QMP it ends by itself.
TRY = ["-cpu", "max", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio", "-accel"]
TRY_INPUT = '{"execute": "qmp_capabilities"}{"execute": "quit"}'


def try_accelerator(qemu: str, accelerator: str) -> Tuple[int, str]:
  """The exit code and the output of a QEMU that starts with an accelerator, without a guest."""
  machine = ["-machine", "virt"] if "aarch64" in os.path.basename(qemu) else []
  return ask_program([qemu, *machine, *TRY, accelerator], TRY_INPUT)


def accelerators_for(plan: Plan, options: Options) -> str:
  """The accelerators to try: those given, else those that can work on this host.

  QEMU passes over an accelerator that it cannot initialise, but not over HVF (it aborts), nor over
  a KVM that fails later.
  """
  if options.accel:
    return options.accel
  if failed_accelerator(plan.cache, plan.qemu).accelerator:
    return "tcg"
  if sys.platform == "darwin":
    native = this_host().arch == "x86-64" or not is_intel_program(plan.qemu)
    return "hvf:tcg" if native and has_hvf() else "tcg"
  return TABLE_ACCEL


def is_emulated(guest: Guest, accel: str) -> bool:
  """Whether neither KVM nor HVF can run a guest here: it then takes 10 to 20 times as long."""
  names = accel.partition("tcg")[0]
  kvm = "kvm" in names and os.access("/dev/kvm", os.R_OK | os.W_OK)
  fast = "hvf" in names if sys.platform == "darwin" else kvm
  return not fast or guest.arch != this_host().arch


def kept_options(instance: Optional[Instance], options: Options) -> Options:
  """The options, with what an instance keeps of earlier runs where nothing else is given."""
  with contextlib.suppress(UsageError):
    if instance and not options.publish:
      return options._replace(publish=tuple(map(parse_forward, instance.publish.split())))
  return options


def display_of(plan: Plan) -> str:
  """The kind of window that the QEMU to run can show; QvmError if it can show none."""
  if not os.path.isfile(plan.qemu):
    return DISPLAYS[0 if sys.platform == "darwin" else 1]  # a guess, for --dry-run
  shown = ask_program([plan.qemu, "-display", "help"])[1].partition("types:")[2].split()
  found = [name for name in DISPLAYS if name in shown]
  if not found:
    raise QvmError(
      f"{plan.qemu} has no display built in",
      "install a QEMU that has one (Debian: qemu-system-gui) and name it: --qemu qemu-system-"
      + QEMU_CPUS[plan.guest.arch],
    )
  return found[0]


def host_facts(plan: Plan, options: Options, release: str) -> HostFacts:
  """Collect what decides on adjustments; release is the base image's, empty if unknown."""
  accel = accelerators_for(plan, options)
  log_in = options.detach or options.guest_command or options.warm
  emulated = is_emulated(plan.guest, accel)
  return HostFacts(
    display=display_of(plan) if options.display else "",
    data=plan.paths.data if options.disk or os.path.lexists(plan.paths.data) else "",
    linaro=has_linaro(plan.share),
    mask_cpu="kvm" in accel.split(":") and needs_cpu_mask("/proc/cpuinfo", "/dev/kvm"),
    key_disk=plan.paths.key_disk if log_in and wants_key(plan.guest, release) else "",
    accel=accel,
    emulated=emulated,
    host_cpu=not emulated and this_host() == Host("linux", "arm64"),
  )


class StartAgain(QvmError):
  """The machine did not come up and is to be started once more; the message has been said."""


BOOT_SECONDS = 600.0  # a guest that has not booted by then hangs; most take less than 60
EMULATED_BOOT_SECONDS = 1800.0  # the slowest, OpenBSD on a loaded machine, has taken 20 minutes
# An accelerator fails within a second of QEMU's start; more is for a machine under load.
EARLY_SECONDS = 60.0


class BootWatch:
  """Shows how a boot goes on: at a terminal each second in place, elsewhere each half minute."""

  def __init__(self, name: str, last_line: Callable[[], str]) -> None:
    self.name, self.last_line = name, last_line
    self.began = time.monotonic()
    self.pause = 1.0 if os.isatty(2) else 30.0
    self.next = self.pause

  def tick(self) -> None:
    """Show the seconds and the console's last line, if it is time."""
    seconds = time.monotonic() - self.began
    if report.phases >= 0:
      report.phase("booting", self.last_line())
    if seconds >= self.next:
      self.next = seconds - seconds % self.pause + self.pause
      line = self.last_line()
      report.draw(f"{self.name} is booting, {seconds:.0f} s{': ' if line else ''}{line}")


def file_stamp(path: str) -> Tuple[int, int]:
  """What changes when a file is written, or removed."""
  try:
    stat = os.stat(path)
  except FileNotFoundError:
    return 0, 0
  return stat.st_size, stat.st_mtime_ns


Stamps = Dict[str, Tuple[int, int]]  # by path, as file_stamp() has them


def stamps_below(base: Base) -> Stamps:
  """The stamps of the files that a base is made of."""
  return {path: file_stamp(path) for path in base.needs}


class Machine:
  """An instance while a command uses it: its lock, port, console log and QEMU.

  Entering the context takes the instance's lock; leaving it ends QEMU and releases everything,
  unless leave_running() has let the machine go.
  """

  keeper: Optional["Process"] = None  # what writes the console log, if that is not QEMU itself
  process: "Process"  # from start() on, as are these
  facts: HostFacts
  untouched: Tuple[int, int]  # the disk's stamp before QEMU started
  log_start: int  # the offset in the console log at which this run begins
  began: float

  def __init__(self, plan: Plan, options: Options) -> None:
    self.plan, self.options, self.paths = plan, options, plan.paths
    self.asked = options  # as given, or kept with the instance; self.options has what is used
    self.port_locks: List[int] = []
    self.log: Optional[IO[bytes]] = None
    self.resumed = False  # whether it was started from a checkpoint
    self.starts = 0
    self.greeted = False
    self.attempts = options.boot_attempts  # left
    self.stack = contextlib.ExitStack()

  def __enter__(self) -> "Machine":
    with contextlib.ExitStack() as stack:
      self.lock = take_instance(self.paths, stack)
      if os.path.exists(self.paths.mark):  # of a --rm run that was killed since the last sweep
        remove_instance(self.paths)
      check_disks(self.plan, self.options.disk)
      self.asked = self.options = kept_options(check_instance(self.plan), self.options)
      if self.plan.ephemeral:
        stack.callback(remove_instance, self.paths)
        open(self.paths.mark, "w").close()
      if self.options.ssh.chosen or self.options.publish:
        self.reserve_port(stack)
      self.open_log(stack)
      warning = memory_warning(self.options.memory, available_memory("/proc/meminfo"))
      if warning:
        say(warning)
      stack.enter_context(terminal_kept())
      self.stack = stack.pop_all()
    return self

  def __exit__(self, *error: Any) -> None:
    self.stack.__exit__(*error)

  @property
  def login(self) -> Login:
    return Login(self.paths, self.plan.guest, self.options.ssh, self.patience, self.has_ended)

  @property
  def patience(self) -> float:
    """For how many seconds to wait for ssh."""
    if self.options.boot_timeout is not None:
      return self.options.boot_timeout
    return EMULATED_BOOT_SECONDS if self.facts.emulated else BOOT_SECONDS

  @property
  def more_time(self) -> str:
    """What to do about a guest that has not booted in time."""
    slow = "; KVM or HVF may itself be emulated here: --accel tcg can be faster"
    return "--boot-timeout allows more time" + slow * (not self.facts.emulated)

  @property
  def console(self) -> str:
    """The file for the console of a machine in the background."""
    return self.options.console_log or self.paths.console

  def reserve_port(self, stack: contextlib.ExitStack) -> None:
    """Reserve the ssh port and those to publish, unless that has already been done."""
    if not self.port_locks:
      others = [forward.port for forward in self.options.publish]
      address, lock = reserve_port(self.options.ssh, stack, others)
      forwards = tuple(map(free_forward, self.options.publish))
      self.options = self.options._replace(ssh=address, publish=forwards)
      self.port_locks = [lock, *lock_forwards(forwards, stack)]

  def open_log(self, stack: contextlib.ExitStack) -> None:
    """Open the console log if the user asked for one or the console is not shown."""
    if self.options.console_log:
      self.log = open(self.options.console_log, "wb", 0, opener=appending)  # noqa: SIM115
    elif self.options.detach or self.options.guest_command:
      stack.callback(self.remove_stray_log)
      self.log = new_console_log(self.paths)
    if self.log:
      stack.callback(self.log.close)

  def remove_stray_log(self) -> None:
    """Remove the console log of a run that created no disk."""
    if not os.path.lexists(self.paths.disk):
      remove_file(self.paths.console)

  def spawn(self) -> Spawn:
    """How to start QEMU: it makes its streams non-blocking, so it never gets the caller's own."""
    if self.options.detach or self.options.guest_command:
      return in_background(self.log)
    pipe = subprocess.PIPE
    return Spawn(pipe, pipe, pipe)

  def start(self, base: Base, spawn: Optional[Spawn] = None) -> None:
    """Create the overlay on a base and start QEMU; QvmError if a file they need is gone."""
    self.reserve_port(self.stack)
    plan, options = self.plan, self.options
    with instances_lock(plan.cache):
      for path in (*base.needs, plan.qemu, plan.qemu_img):
        if not os.path.isfile(path):
          raise QvmError(f"{path} is gone", "was it deleted? run this command again")
      check_instance(plan)
      base = base_now(plan, base)
      asked, ports = (" ".join(map(str, it.publish)) for it in (self.asked, options))
      words = "\0".join(words_of(self.asked, STARTED_WITH))
      run = Instance(ssh=str(options.ssh), publish=asked, ports=ports, words=words)
      record_instance(plan, run, base)
      make_overlay(plan, base.backing, self.lock)
      make_data_disk(plan, options.disk, self.lock)
      self.facts = facts = host_facts(plan, options, base.image.release)
      if facts.key_disk and plan.guest.key_disk:
        write_key_disk(self.paths, plan.guest.key_disk)
      self.log_start = os.fstat(self.log.fileno()).st_size if self.log else 0
      self.untouched, self.began = file_stamp(self.paths.disk), time.monotonic()
      self.starts += 1
      with signals.hold():
        command = base.adjust(qemu_command(plan, options, facts))
        fds = (self.lock.fd, *self.port_locks, *base.fds)
        # Noted by QEMU's own process: qvm may be killed at any moment after it has started that.
        note = functools.partial(note_holder, self.lock, "QEMU")
        spawn = (spawn or self.spawn())._replace(pass_fds=fds, preexec_fn=note)
        self.stack.callback(flush_disk, self.paths)
        allow_many_files()
        self.process = self.start_qemu(command, spawn)
        self.stack.callback(end_process, self.process)
        self.stack.callback(close_streams, self.process)
    self.tell_of_emulation()
    self.keep_awake()

  def start_qemu(self, command: Sequence[str], spawn: Spawn) -> "Process":
    """Start QEMU; if its console goes to a file, with a keeper for that and for its disk."""
    if not spawn.start_new_session:
      return start(command, spawn)
    self.console_written()  # of an earlier start
    with open(self.paths.disk, "rb") as disk:
      fds = (disk.fileno(),) if self.options.detach and not self.plan.ephemeral else ()
      self.keeper = start_keeper(spawn.stdout, not self.options.console_log, fds)
    spawn = spawn._replace(stdout=self.keeper.stdin, stderr=self.keeper.stdin)
    self.stack.callback(self.console_written)
    with self.keeper.stdin:  # type: ignore[union-attr] # it is a pipe
      return start(command, spawn)

  def console_written(self) -> None:
    """Once QEMU has ended: wait until all that it wrote is in the console log."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # then another process has its pipe
      if self.keeper:
        self.keeper.wait(signals.grace(TERM_GRACE_SECONDS))

  def has_ended(self, seconds: float = 0.0) -> bool:
    """Whether QEMU has ended, after waiting up to this long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(seconds)
    return self.process.returncode is not None

  def last_words(self, count: int = 20) -> List[str]:
    """This run's last lines in the console log."""
    if self.has_ended():
      self.console_written()
    return last_lines(self.console, count, self.log_start)

  def tell_of_emulation(self) -> None:
    """Say once that a guest of the host's own CPU is emulated, unless the user has asked for it."""
    if self.options.accel or self.starts > 1:
      return
    name = failed_accelerator(self.plan.cache, self.plan.qemu).accelerator.upper()
    mac = sys.platform == "darwin" and self.plan.guest.arch == this_host().arch
    if name:
      say(f"{name} has failed here before: the guest is emulated; qvm doctor tries {name} again")
    elif mac and self.facts.emulated:
      say("the guest is emulated, which is much slower; qvm doctor says why")

  def keep_awake(self) -> None:
    """On macOS, prevent idle sleep for as long as QEMU runs and nobody watches its console."""
    if sys.platform == "darwin" and (self.options.detach or self.options.guest_command):
      with contextlib.suppress(QvmError):
        spawn = silent()._replace(start_new_session=True)
        awake = start(["/usr/bin/caffeinate", "-i", "-w", str(self.process.pid)], spawn)
        awake.returncode = 0  # it ends with QEMU; nobody waits for it

  def pass_over_accelerator(self, words: str) -> None:
    """Raise StartAgain if QEMU has ended through an accelerator before the guest wrote anything."""
    process, accel = self.process, self.facts.accel
    after = re.split(r"falling back to \w+", words)[-1]
    known = re.search(f"{KVM_RE}|{HVF_RE}", after)
    early = time.monotonic() - self.began < EARLY_SECONDS
    early = early and file_stamp(self.paths.disk) == self.untouched
    failed = known or process.returncode == -signal.SIGABRT
    if self.options.accel or accel == "tcg" or not early or not failed:
      return
    name = "hvf" if "hvf" in accel and sys.platform == "darwin" else "kvm"
    self.options = self.options._replace(accel="tcg")
    # A guest can print that, too, or bring KVM to it: QEMU without a guest tells.
    if known and try_accelerator(self.plan.qemu, name)[0]:
      problem = " ".join(printable(after[known.start() :][:300]).split())
      record = FailedAccelerator(name, self.plan.qemu, problem, utc(time.time()))
      with contextlib.suppress(OSError):  # a full disk: the next run finds out again
        write_record(self.plan.cache, accelerator_path(self.plan.cache, self.plan.qemu), record)
    raise self.start_again(f"{name.upper()} does not work here: starting with tcg, which is slower")

  def start_again(self, reason: str) -> StartAgain:
    """Say why the machine is started again, and end its QEMU."""
    report.erase()
    say(reason)
    end_process(self.process)
    close_streams(self.process)
    return StartAgain(reason)

  def wait_for_ssh(self) -> bool:
    """Wait until ssh answers; False on timeout, QvmError if the machine ends."""
    watch = BootWatch(self.plan.name, lambda: "".join(self.last_words(1)))
    report.phase("booting")

    def ended(pause: float) -> bool:
      watch.tick()
      if not self.has_ended(pause) and re.search(STUCK_RE, "\n".join(self.last_words(40))):
        end_process(self.process)
      return self.has_ended()

    answers = wait_for_ssh(self.options.ssh, self.patience, ended)
    report.erase()
    if self.has_ended():
      words = "\n".join(self.last_words(40))
      self.pass_over_accelerator(words)
      show_console(self.last_words())
      code = self.process.returncode
      raise QvmError(
        f"the machine {self.plan.name} ended before ssh answered ({ending(code)})",
        ": ".join(why_ended(words, code)),
      )
    for line in fell_back("\n".join(self.last_words())):
      say(line)
    self.attempts -= not answers
    if not answers and self.attempts > 0:
      show_console(self.last_words())
      again = self.start_again(
        f"ssh has not answered within {self.patience:g} s: booting {self.plan.name} again"
      )
      if self.plan.ephemeral:
        remove_file(self.paths.disk)
      raise again
    return answers

  def log_in(self) -> float:
    """For how many seconds to retry logins: the guest may still be installing the key."""
    left = max(0.0, self.began + self.patience - time.monotonic())
    return min(left, KEY_LOGIN_SECONDS) if os.path.exists(self.paths.key_disk) else 0.0

  def relay_console(self) -> int:
    """Relay the console until QEMU ends; returns its exit code, or 128+N after signal N."""
    self.greet()
    process, folder = self.process, self.plan.cache.instances

    def take_terminal() -> None:
      self.stack.enter_context(terminal_kept())
      relay.interactive = is_interactive()
      go_raw(signals=not relay.interactive)
      if relay.interactive:
        say("Ctrl-A x ends the machine, Ctrl-A h shows help; all other keys go to the guest")
        relay.pending += b"\r" * self.resumed  # makes the guest show its prompt again

    take = None if self.facts.display else take_terminal  # a window has the keys
    relay = Relay(process, take, self.log, lambda: disk_is_full(folder))
    # While qvm was stopped, the shell had the terminal.
    signal.signal(signal.SIGCONT, lambda *_: setattr(relay, "take_terminal", take))
    try:
      relay.run()
      process.wait()
    finally:
      if relay.on_terminal:
        relay.screen.leave()
    words, code = relay.words.decode("utf-8", "replace"), process.returncode
    if relay.stuck and not code:
      code = EXIT_FAILED
    if code:
      self.pass_over_accelerator(words)
    for line in why_ended(words, code):
      say(line)
    return code if code >= 0 else 128 - code

  def greet(self) -> None:
    """Say how to log in, once QEMU has started for the first time."""
    if self.greeted:
      return
    self.greeted = True
    guest, address = self.plan.guest, self.options.ssh
    if address.port != SSH_PORT and not address.chosen:
      say(f"port {SSH_PORT} is taken; this machine uses {address.port}")
    say(ssh_line(guest, address))
    self.tell_ports()
    if self.facts.display:
      say("the guest has a window; Ctrl-C here, or closing it, ends the machine at once")
    elif not guest.console:
      say(f"{guest.title} writes nothing to this terminal; log in with ssh once it is up")

  def tell_ports(self) -> None:
    """Say where the guest's ports are that were to be on a free one."""
    for forward in [each for each in self.options.publish if each not in self.asked.publish]:
      say(f"{self.plan.name} publishes {forward}")

  def leave_running(self) -> int:
    """Wait until ssh answers, then let the machine go; QvmError if it ends before that."""
    verb = "is running" if self.resumed else "is booting"
    say(f"{self.plan.name} {verb} in the background; its console goes to {self.console}")
    self.tell_ports()
    answers = self.wait_for_ssh()
    self.stack.pop_all()  # QEMU holds the locks now, as does the server of its base image
    for process in filter(None, (self.process, self.keeper)):
      process.returncode = 0  # so that nothing complains that nobody waits for it
    if self.log:
      self.log.close()
    if not answers:
      say(f"ssh has not answered within {self.patience:g} s; the machine keeps running")
    line = ssh_line(self.plan.guest, self.options.ssh)
    try:
      emit(self.plan.name)
      emit(line)
    except OSError as error:  # it runs as asked; an error code would hide that
      say(f"{self.plan.name} runs in the background ({line}), but stdout: {describe(error)}")
    return 0

  def run_command(self) -> int:
    """Run the command once ssh answers, then power off a persistent instance; its exit code."""
    if not self.resumed and not self.greeted:
      self.greeted = True
      say(f"{self.plan.name} is booting; its console goes to {self.console}")
    if not self.wait_for_ssh():
      problem = f"ssh has not answered within {self.patience:g} s; ending the machine"
      raise self.explained(QvmError(problem, self.more_time))
    report.phase("running")
    login, failure = self.login, None
    try:
      code = run_command(login, self.options, self.log_in(), self.resumed)
    except LoginError as error:
      raise self.explained(error)
    except QvmError as error:  # results that cannot come are still in the guest
      failure, login = self.explained(error), login._replace(patience=10.0)
    stays = not self.plan.ephemeral and not self.has_ended()
    asked = stays and power_off(self.paths, lambda: login)
    if asked and not self.has_ended(POWER_OFF_SECONDS):
      say(f"{self.plan.name} has not powered off within {POWER_OFF_SECONDS:g} s; ending it")
    if failure:
      raise failure
    return code

  def explained(self, error: QvmError) -> QvmError:
    """The error for a failed command, with its cause; shows the console's last lines."""
    ended = self.has_ended(1.0)  # the connection can be lost just before QEMU ends
    lines = self.last_words()
    show_console(lines)
    if not ended:
      return QvmError(str(error), DISK_FULL) if disk_is_full(self.plan.cache.instances) else error
    problem = f"the machine {self.plan.name} has ended ({ending(self.process.returncode)}): {error}"
    return QvmError(problem, ": ".join(why_ended("\n".join(lines), self.process.returncode)))


def flush_disk(paths: InstancePaths) -> None:
  """Once its QEMU has ended: have what the guest wrote on the disk, if the instance is kept.

  QEMU itself leaves it to the system (cache=unsafe).
  """
  if not os.path.exists(paths.mark):
    for path in (paths.disk, paths.data):
      with contextlib.suppress(FileNotFoundError):
        flush(path)


def base_now(plan: Plan, base: Base) -> Base:
  """The base, whose image may just have been replaced; an unsafe or another one is refused."""
  if not is_served(base.backing):
    check_base(plan)
    return base._replace(image=cached_base(plan).image)
  if os.path.lexists(plan.paths.disk):
    instance, image = read_instance(plan.paths), base.image
    same = instance.base_sha256 and instance.base_sha256 == image.sha256
    if not same and instance.validator != image.validator:
      raise other_base(plan.paths, "the server has now", instance)
  return base


def in_background(log: Optional[IO[bytes]]) -> Spawn:
  """How to start a QEMU whose console goes to a file, if any."""
  return Spawn(subprocess.DEVNULL, log, log, start_new_session=True)


def appending(path: str, flags: int) -> int:
  """Open a file for writing at its end; mode "a" of Python 3.6 cannot open a FIFO or a terminal."""
  return os.open(path, flags & ~os.O_TRUNC | os.O_APPEND, 0o666)


def new_console_log(paths: InstancePaths) -> IO[bytes]:
  """A new console log; several processes append to it."""
  remove_file(paths.console)
  return open(paths.console, "ab+", buffering=0)


# Passes a console on to its log until QEMU has ended, and flushes its disk then: KEEPER BOUND [FD].
# With BOUND not empty the log keeps its beginning, and at least as many bytes of its end; one of
# the user's is left alone. A process of its own, because QEMU outlives qvm.
KEEPER = """
import fcntl, os, sys
head, tail, left, mark = 1 << 20, 10 << 20, 0, b""
data = os.read(0, 1 << 16)
while data:
  try:
    while data:
      data = data[os.write(1, data) :]
    size = os.fstat(1).st_size
    if sys.argv[1] and size > head + 2 * tail:
      end = os.pread(1, tail, size - tail)
      left += size - head - len(mark) - len(end)
      mark = b"\\n[qvm left out %d bytes]\\n" % left
      os.ftruncate(1, head)
      os.write(1, mark)
      data = end
      continue
  except OSError:
    pass  # a full disk: this much is lost
  data = os.read(0, 1 << 16)
for disk in map(int, sys.argv[2:]):
  os.fsync(disk)
  if hasattr(fcntl, "F_FULLFSYNC"):
    fcntl.fcntl(disk, fcntl.F_FULLFSYNC)
"""


def start_keeper(log: Handle, bound: bool = True, fds: Tuple[int, ...] = ()) -> "Process":
  """Start a KEEPER, which writes to a log what comes in at its stdin."""
  command = [sys.executable, "-I", "-S", "-c", KEEPER, "bound" if bound else "", *map(str, fds)]
  return start(command, Spawn(subprocess.PIPE, log, subprocess.DEVNULL, fds, True))


def print_command(plan: Plan, options: Options) -> int:
  """Print the QEMU command that `run` would execute, unless the instance is another one."""
  check_disks(plan, options.disk)
  options = kept_options(planned_instance(plan), options)
  facts = host_facts(plan, options, image_record(plan).release)
  emit(" ".join(map(shlex.quote, qemu_command(plan, options, facts))))
  return 0


# ---- Layers -------------------------------------------------------------------------------------
# A checkpoint is the state of a guest's memory, devices and disk just after it has booted. QEMU
# calls this VM templating: the memory is in a file, which is shared while the guest boots, and
# private to each machine that starts from it later. Nothing is copied; machines share the pages
# that none of them has changed.

# Time for QEMU to answer, and for ssh after a resume, which normally takes 0.6 s. More would only
# delay the normal boot that follows a failure.
RESUME_SECONDS = 15.0
MAX_FAILURES = 3  # in a row, to go on from a new checkpoint; one may be a slow moment of the host
MAX_ANSWER_BYTES = 1 << 20  # answers have a few kB; this limits the memory for a broken QEMU's


class Reply(NamedTuple):
  """The parts of QEMU's answer to a command that qvm uses."""

  enabled: bool = False
  status: str = ""
  problem: str = ""  # why a migration failed


class Control:
  """QEMU's control socket (QMP); every failure raises QvmError."""

  def __init__(self, link: "socket.socket") -> None:
    self.link, self.rest = link, b""
    self.read()  # the greeting
    self("qmp_capabilities")
    ignore = {"capability": "x-ignore-shared", "state": True}  # the memory is in its file already
    self("migrate-set-capabilities", capabilities=[ignore])

  def __call__(self, command: str, fds: Sequence[int] = (), **arguments: object) -> Reply:
    """Execute a command, passing on fds, and return its result."""
    text = json.dumps({"execute": command, "arguments": arguments}).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
      self.link.sendmsg([text], rights)
    except OSError as error:
      raise QvmError(f"QEMU does not answer: {describe(error)}")
    while True:
      try:
        answer = parse_json(self.read())
        failed = f"{command}: {answer['error']['desc']}" if "error" in answer else ""
      except (ValueError, RecursionError, LookupError, TypeError):
        raise QvmError("QEMU's answer makes no sense")
      if failed:
        raise QvmError(f"QEMU: {failed}")
      if "return" in answer:  # else it is an event
        result = answer["return"] if isinstance(answer["return"], dict) else {}
        status, problem = (str(result.get(key) or "") for key in ("status", "error-desc"))
        return Reply(bool(result.get("enabled")), status, problem)

  def read(self) -> bytes:
    """QEMU's next message, which is one line of JSON."""
    while b"\n" not in self.rest:
      try:
        chunk = self.link.recv(CHUNK_BYTES)
      except OSError as error:
        raise QvmError(f"QEMU does not answer: {describe(error)}")
      self.rest += chunk
      if not chunk or len(self.rest) > MAX_ANSWER_BYTES:
        raise QvmError("QEMU has ended" if not chunk else "QEMU's answer is too long")
    line, _, self.rest = self.rest.partition(b"\n")
    return line

  def accelerator(self) -> str:
    """The accelerator in use."""
    if self("query-kvm").enabled:
      return "kvm"
    try:
      self("x-query-jit")
    except QvmError:
      return "hvf"
    return "tcg"

  @contextlib.contextmanager
  def stream(self, command: str) -> Iterator["socket.socket"]:
    """Our end of a socket over which the command makes QEMU send or receive the device state."""
    ours, theirs = socket.socketpair()
    with ours:
      with theirs:
        self("getfd", [theirs.fileno()], fdname="qvm-state")
      ours.settimeout(RESUME_SECONDS)
      self(command, uri="fd:qvm-state")
      yield ours

  def save(self, path: str) -> None:
    """Stop the guest and write its device state to a file."""
    self("stop")
    try:
      with self.stream("migrate") as link, open(path, "wb") as file:
        for chunk in iter(lambda: link.recv(CHUNK_BYTES), b""):
          file.write(chunk)
    except OSError as error:
      raise write_failure(path, 0, error)
    self.wait_status("query-migrate", ("setup", "active", "device", "pre-switchover"), "completed")

  def load(self, path: str) -> None:
    """Load the device state from a file and let the guest continue."""
    with open(path, "rb") as file:
      content = file.read()
    try:
      with self.stream("migrate-incoming") as link:
        link.sendall(content)
    except OSError as error:
      raise QvmError(f"QEMU does not accept the device state: {describe(error)}")
    self.wait_status("query-status", ("inmigrate",), "paused")
    self("cont")

  def wait_status(self, query: str, passing: Sequence[str], good: str) -> None:
    """Poll until the status is not in `passing`; QvmError unless it is then `good`."""
    deadline = time.monotonic() + RESUME_SECONDS
    reply = self(query)
    while reply.status in passing and time.monotonic() < deadline:
      time.sleep(0.005)
      reply = self(query)
    if reply.status != good:
      raise QvmError(f"QEMU: {query}: {reply.problem or f'its status is {reply.status}'}")


def checkpoint_key(plan: Plan, options: Options, facts: HostFacts, layer: str) -> str:
  """A digest of what a checkpoint depends on: base image or layer, command line, QEMU and host.

  Paths, address and ports may differ. The accelerator in use is known only once QEMU runs.
  """
  named = plan._replace(qemu="QEMU", share="SHARE", paths=Cache("").instance("DISK"))
  options = options._replace(ssh=Address(), publish=())
  facts = facts._replace(key_disk="KEYS" if facts.key_disk else "")
  tree = record_of(plan.tree_program).sha256
  own = file_sha256(plan.qemu) if plan.own_qemu or not tree else ""
  public = public_key(plan.cache) if facts.key_disk else b""
  base, digest = base_record(plan), hashlib.sha256()
  for text in (
    *qemu_command(named, options, facts),
    *(base.sha256 or base.validator, tree, own, os.fsdecode(public)),
    *host_cpu("/proc/cpuinfo"),
    *filter(None, [layer, plan.base * plan.own_image]),
  ):
    digest.update(os.fsencode(text) + b"\0")
  return str(digest.hexdigest())


def template_command(command: Sequence[str], memory: str, share: str, control: int) -> List[str]:
  """QEMU's command line with the guest's memory in a file, and with a control socket.

  See QEMU's docs/system/vm-templating.rst. share is "on" for the guest that fills the file, and
  "off" for those that start from it.
  """
  argv = list(command)
  argv[argv.index("-machine") + 1] += ",memory-backend=qvm-memory"
  size, path = argv[argv.index("-m") + 1], memory.replace(",", ",,")
  backend = f"memory-backend-file,id=qvm-memory,size={size},mem-path={path},share={share}"
  return [
    *(*argv, "-object", backend, "-chardev", f"socket,id=qvm-control,fd={control}"),
    *("-mon", "chardev=qvm-control,mode=control"),
  ]


class BootError(QvmError):
  """A guest does not answer, or a script of --prepare fails: booting it again would not help."""


class Checkpoint:
  """The state of a guest's memory, devices and disk just after it has booted, kept as a layer.

  set_up() does more in the guest before that.
  """

  def __init__(self, machine: Machine, base: Base, set_up: Callable[[], object] = bool) -> None:
    plan, options = machine.plan, machine.options
    self.machine, self.plan, self.base, self.set_up = machine, plan, base, set_up
    facts = host_facts(plan, options, base.image.release)
    if facts.key_disk:
      with instances_lock(plan.cache):
        make_key(plan.cache)
    self.key = checkpoint_key(plan, options, facts, base.layer)
    self.name = f"{plan.guest.os}-{plan.version}-{plan.guest.arch}-warm-{self.key[:10]}"
    self.layer = plan.cache.layer(self.name)
    record = self.record
    self.failures = record.failures if record.key == self.key else 0

  @property
  def record(self) -> LayerRecord:
    return layer_record(self.layer)

  def problem(self) -> str:
    """Why the checkpoint cannot be used; empty if it can."""
    record = self.record
    if record.key != self.key:
      return "there is none yet"
    if record.problem:
      return record.problem
    try:
      sound = record.parts == layer_parts(self.layer)
    except OSError as error:
      return f"{error.filename}: {describe(error)}"
    return "" if sound else "its files have changed"

  def write_record(self, accelerator: str = "", parts: str = "", problem: str = "") -> None:
    """Write the record, which completes the checkpoint."""
    plan = self.plan
    kind = (self.name, plan.guest.os, plan.version, plan.guest.arch)
    record = LayerRecord(*kind, image_record(plan).sha256, self.key, accelerator, parts, problem)
    record = record._replace(failures=self.failures, layer=self.base.layer, time=utc(time.time()))
    write_record(plan.cache, self.layer.record, record, 0o600)

  def make(self) -> bool:
    """Boot the machine in the background and freeze it; if that fails, say so and return False."""
    machine, cache = self.machine, self.plan.cache
    free, wanted = free_space(cache.downloads), memory_bytes(machine.options.memory)
    if free < wanted:
      say(
        f"no checkpoint is created: it can need as much disk space as the guest has memory, "
        f"{megabytes(wanted)} (-m), and only {megabytes(free)} are free"
      )
      return False
    with Lock(os.path.join(cache.downloads, SCRATCH + self.name), folder=True) as lock:
      with instances_lock(cache):
        if not lock.try_():
          say(f"another qvm is creating the checkpoint {self.name}; this run boots normally")
          return False
        # By another qvm, just now; whoever has something to set up must do that.
        made = self.set_up is bool and not self.problem()
        if not made:
          remove_layer(self.layer)
      try:
        return made or self.boot_and_freeze(lock)
      finally:
        remove_tree(lock.path)
        remove_file(machine.paths.disk)

  def boot_and_freeze(self, lock: Lock) -> bool:
    """Boot the guest with its memory in the locked folder, then freeze it, as make() does."""
    machine, made, below = self.machine, LayerPaths(lock.path, self.name), stamps_below(self.base)
    with contextlib.ExitStack() as stack:
      log = machine.log or stack.enter_context(new_console_log(machine.paths))
      say(f"{machine.plan.name} is booting to create the checkpoint {self.name}; "
          f"its console goes to {log.name}")  # fmt: skip
      ours = stack.enter_context(self.start(made.memory, "on", (lock.fd,), in_background(log)))
      try:
        self.wait_for_login()
        self.set_up()
        self.freeze(Control(ours), made, below)
      except (BootError, StartAgain):
        raise
      except QvmError as error:
        say(f"no checkpoint is created: {error}")
        return False
      finally:
        end_process(machine.process)
    return True

  def start(
    self, memory: str, share: str, fds: Tuple[int, ...], spawn: Optional[Spawn] = None
  ) -> "socket.socket":
    """Start QEMU with its memory in a file; returns our end of its control socket."""
    ours, theirs = socket.socketpair()  # nobody else can connect to a pair
    ours.settimeout(RESUME_SECONDS)

    def adjust(command: List[str]) -> List[str]:
      argv = template_command(self.base.adjust(command), memory, share, theirs.fileno())
      return argv if share == "on" else [*argv, "-incoming", "defer"]  # until migrate-incoming

    base = self.base._replace(adjust=adjust, fds=(theirs.fileno(), *fds))
    if share == "off":
      backing = backing_name(self.plan, self.layer.disk)
      needs = (*base.needs, self.layer.disk, self.layer.record)
      base = base._replace(backing=backing, needs=needs)
    try:
      with theirs:
        self.machine.start(base, spawn)
    except BaseException:
      ours.close()
      raise
    return ours

  def wait_for_login(self) -> None:
    """Wait until the guest accepts a login."""
    machine = self.machine
    if not machine.wait_for_ssh():
      raise BootError(
        f"ssh has not answered within {machine.patience:g} s; no checkpoint is created",
        f"{machine.more_time}; without --warm qvm does not wait for ssh",
      )
    if find_program("ssh"):
      answered = wait_up_to(machine.login, machine.patience)
      in_guest(machine.login, "true", answered, machine.log_in())

  def freeze(self, control: Control, made: LayerPaths, below: Stamps) -> None:
    """Save the state of a guest that has just booted, end its QEMU and publish the layer."""
    machine, accelerator = self.machine, control.accelerator()
    if accelerator == "hvf":
      say("HVF and --warm have not been tested together: if a guest goes wrong, omit --warm")
    control.save(made.state)
    with contextlib.suppress(QvmError):  # QEMU may end before it answers
      control("quit")
    end_process(machine.process)
    rebase_for(self.layer, self.plan, self.base)
    with publishing(self.plan.cache, self.layer, below):
      move(machine.paths.disk, made.disk, False)
      for source, target in zip(made.parts, self.layer.parts):
        move_into_place(source, target, 0o600)
      self.write_record(accelerator=accelerator, parts=layer_parts(self.layer))

  def resume(self, fresh: bool) -> bool:
    """Start the machine from the checkpoint; if that fails, say so, delete it and return False.

    If it fails although the checkpoint is fresh, a record counts that for later runs.
    """
    machine = self.machine
    try:
      ours = self.start(self.layer.memory, "off", ())
    except QvmError as error:  # it was deleted just now; anything else stops a normal boot, too
      say(f"the checkpoint {self.name} cannot be used: {error}")
      remove_file(machine.paths.disk)  # it may lie on the checkpoint's
      return False
    with ours:
      try:
        self.go_on(Control(ours))
      except QvmError as error:
        problem = self.failed(error)
      else:
        machine.resumed = True
        say(f"{machine.plan.name} resumes from the checkpoint {self.name}")
        self.has_worked()
        return True
    say(f"the checkpoint {self.name} cannot be used: {problem}")
    remove_file(machine.paths.disk)
    with instances_lock(self.plan.cache):
      remove_layer(self.layer)
      if fresh:
        self.failures += 1
        with contextlib.suppress(OSError):  # a full disk: then it does not count
          self.write_record(problem=problem)
    return False

  def has_worked(self) -> None:
    """Note that it is used, and forget earlier failures: only so many in a row count."""
    with contextlib.suppress(OSError):
      os.utime(self.layer.record)
      if self.failures:
        with instances_lock(self.plan.cache):
          record = self.record
          if record.key == self.key:
            cleared = record._replace(failures=0)
            write_record(self.plan.cache, self.layer.record, cleared, 0o600)

  def go_on(self, control: Control) -> None:
    """Load the state; QvmError if ssh does not answer in time."""
    machine, made = self.machine, self.record.accelerator
    if control.accelerator() != made:
      raise QvmError(f"it was created with {made}, but QEMU now uses {control.accelerator()}")
    control.load(self.layer.state)
    seconds = min(RESUME_SECONDS, machine.patience)
    if not wait_for_ssh(
      machine.options.ssh, seconds, lambda pause: machine.has_ended(min(pause, 0.02))
    ):
      raise QvmError(f"ssh has not answered within {seconds:g} s")

  def failed(self, error: QvmError) -> str:
    """End QEMU; returns why the machine did not resume, with QEMU's last output."""
    process = self.machine.process
    end_process(process)
    if process.stderr:
      output = [process.stderr.read(TAIL_BYTES).decode("utf-8", "replace")]
    else:
      output = self.machine.last_words(3)
    return " ".join(" ".join([str(error), *output]).split())


def rebase_for(layer: LayerPaths, plan: Plan, base: Base) -> None:
  """Let an instance's disk name its base as seen from where a layer's disk is."""
  below, beside = (
    os.path.realpath(os.path.join(folder, base.backing))
    for folder in (plan.cache.instances, os.path.dirname(layer.disk))
  )
  if below != beside:  # a folder of the cache is a link
    backing = ["-b", backing_name(plan, below, layer.disk), "-F", "qcow2"]
    command = [plan.qemu_img, "rebase", "-q", "-u", "-f", "qcow2", *backing, plan.paths.disk]
    run_program(command)


@contextlib.contextmanager
def publishing(cache: Cache, layer: LayerPaths, below: Stamps) -> Iterator[None]:
  """Give a layer its files under instances_lock, its record last; all of them or none.

  QvmError if what it lies on, which had these stamps before the work, has been replaced meanwhile.
  """
  with instances_lock(cache):
    for path, before in below.items():
      if file_stamp(path) != before:
        raise QvmError(f"{path} has been replaced meanwhile", "run this command again")
    try:
      yield
    except OSError as error:
      remove_layer(layer)
      raise QvmError(f"the layer {layer.name} cannot be written: {describe(error)}")


def layer_parts(layer: LayerPaths) -> str:
  """The size and modification time of each file of a checkpoint, which show if it has changed."""
  stats = [os.stat(path) for path in layer.parts]
  return " ".join(f"{stat.st_size}:{int(stat.st_mtime)}" for stat in stats)


def start_warm(machine: Machine, base: Base) -> bool:
  """Start a machine from its checkpoint, creating that first if there is none.

  If that is not possible, say why and return False: the machine then boots normally.
  """
  if is_served(base.backing):
    say("no warm start while the image is downloading; the next run creates the checkpoint")
    return False
  machine.reserve_port(machine.stack)
  checkpoint = Checkpoint(machine, base)
  problem = checkpoint.problem()
  if problem and os.path.exists(checkpoint.layer.record):
    name = checkpoint.name
    if checkpoint.failures >= MAX_FAILURES:
      say(f"no warm start: {problem} (after qvm rm {name} the next run tries again)")
      return False
    say(f"the checkpoint {name} cannot be used: {problem}")
  if not problem and checkpoint.resume(fresh=False):
    return True
  return checkpoint.make() and checkpoint.resume(fresh=True)


# A prepared disk is a layer like a checkpoint's, without the memory: the overlay of a machine that
# has run the scripts of --install and --prepare and has powered itself off.

# What package managers say when a server could not be reached; once more may then help.
NETWORK_RE = r"(?i)resolv|time[d ]*out|unreachable|refused|reset by peer|network|temporar"
SCRIPT_LINES = 3  # of the output of a script that has failed, in the message
# Runs a script that comes on stdin, once all of it is there; the script's own stdin is empty.
RUN_STEP = 'cat >"$0" && /bin/sh -e "$0" </dev/null; code=$?; rm -f "$0"; exit $code'


class Step(NamedTuple):
  """A script that sets a guest up."""

  title: str
  text: bytes
  again: bool  # whether to run it once more if it fails because of the network


class SetUp:
  """What --install and --prepare ask for, and the layers on which it is kept."""

  checkpoint = ""  # the name of the one that has been made in the same boot

  def __init__(self, plan: Plan, options: Options, base: Base) -> None:
    self.plan, self.options, self.base = plan, options, base
    self.below = stamps_below(base)  # before its digest
    packages = " ".join(options.install)
    install = INSTALL[plan.guest.os].format(packages).encode()
    self.steps = [Step(f"--install '{packages}'", install, True)] if packages else []
    self.steps += [Step(*each, False) for each in zip(options.prepare, options.scripts)]
    given = {text.partition("=")[0] for text in options.env}
    env = guest_environment(options.env, os.environ)
    self.env = {name: value for name, value in sorted(env.items()) if name in given}
    record = base_record(plan)
    self.digest = record.asset_sha256 or record.sha256 or f"{record.validator} {plan.base}"
    self.stem = f"{plan.guest.os}-{plan.version}-{plan.guest.arch}"

  def key(self, count: int) -> str:
    """A digest of what the layer with the first `count` steps depends on."""
    digest, values = hashlib.sha256(), [f"{name}={value}" for name, value in self.env.items()]
    texts = [os.fsencode(text) for text in (self.digest, *values)]
    for text in (*texts, *(step.text for step in self.steps[:count])):
      digest.update(b"%d %s" % (len(text), text))
    return str(digest.hexdigest())

  def layer(self, count: int) -> LayerPaths:
    return self.plan.cache.layer(f"{self.stem}-prepared-{self.key(count)[:10]}")

  def is_whole(self, count: int) -> bool:
    """Whether there is a layer with the first `count` steps, and all that is below it."""
    cache, layer = self.plan.cache, self.layer(count)
    names, below = layers_under(cache, layer.disk)
    if layer_record(layer).key != self.key(count) or not below:
      return False
    every = [layer, *map(cache.layer, names)]  # which another qvm may just delete
    return all(layer_record(it).bytes == file_stamp(it.disk)[0] > 0 for it in every)

  def ready_base(self) -> Base:
    """The prepared disk, which is made first if there is none; whoever comes meanwhile waits."""
    layer, count = self.layer(len(self.steps)), len(self.steps)
    before = file_stamp(layer.disk)
    if self.options.rebuild or not self.is_whole(count):
      text = f"another qvm is making the layer {layer.name}: waiting for it"
      waits = functools.partial(say, text)
      with unfinished(self.plan.cache, layer.name, waits):
        anew = self.options.rebuild and file_stamp(layer.disk) == before  # no other has made it
        if anew or not self.is_whole(count):
          self.make(layer)
    return layer_base(self.plan, self.base, layer.name)

  def make(self, layer: LayerPaths) -> None:
    """Make the layer, on the one with most of the first steps, in a machine of its own."""
    with instances_lock(self.plan.cache):
      self.old(layer)  # before the work
    counts = [] if self.options.rebuild else range(len(self.steps) - 1, 0, -1)
    done = next(filter(self.is_whole, counts), 0)
    name = f"{self.stem}-prepare-{os.urandom(3).hex()}"
    plan = self.plan._replace(paths=self.plan.cache.instance(name), ephemeral=True)
    base = layer_base(plan, self.base, self.layer(done).name) if done else self.base
    below = {**stamps_below(base), **self.below}
    base = base._replace(layer=layer.name, adjust=with_discard)
    options = self.options._replace(rm=True, detach=True, guest_command=())
    # The rest is for the user's machine; a checkpoint of one with a network would not be of that.
    warm = options.warm and not options.no_network
    options = options._replace(ssh=Address(), publish=(), disk="", no_network=False, warm=warm)
    with Machine(plan, options) as machine:
      while True:
        with contextlib.suppress(StartAgain):
          if not options.warm or not self.boot_warm(machine, base, done):
            self.boot(machine, base, done)
          return self.freeze(machine, base, layer, below)

  def old(self, layer: LayerPaths) -> List[LayerPaths]:
    """What a layer made anew replaces: its older checkpoints, and the layer of its name.

    The caller holds instances_lock. QvmError if anything else needs it.
    """
    cache = self.plan.cache
    mine = [it for it in layers(cache) if layer_record(it).layer == layer.name]
    users = users_of(layer, overlays(cache, ephemeral=False), [each.disk for each in mine])
    if users:
      raise QvmError(
        f"the layer {layer.name} cannot be made anew: these lie on what was there, or may: "
        f"{', '.join(users)}",
        "qvm rm deletes them, with all that their guests wrote",
      )
    return [*(it for it in mine if it.name != self.checkpoint), layer]

  def boot(self, machine: Machine, base: Base, done: int) -> None:
    """Boot the machine and set its guest up."""
    machine.start(base)
    say(f"{machine.plan.name} is booting to be set up; its console goes to {machine.console}")
    if not machine.wait_for_ssh():
      raise QvmError(
        f"ssh has not answered within {machine.patience:g} s; no layer is made",
        machine.more_time,
      )
    self.run(machine, machine.log_in(), done)

  def boot_warm(self, machine: Machine, base: Base, done: int) -> bool:
    """The same, in the boot of which the checkpoint is made; then the guest goes on from that.

    The disk of the checkpoint is as it was while the guest ran, so the layer is made of a copy.
    """
    checkpoint = Checkpoint(machine, base, lambda: self.run(machine, 0.0, done))
    if checkpoint.failures >= MAX_FAILURES or not checkpoint.make():
      return False
    self.checkpoint = checkpoint.name
    copy_sparse(checkpoint.layer.disk, machine.paths.disk)
    make_overlay(machine.plan, base.backing, machine.lock)  # names its base from here again
    return checkpoint.resume(fresh=True)

  def run(self, machine: Machine, patience: float, done: int) -> None:
    """Run the steps that are not done yet; BootError if one fails."""
    until = time.monotonic() + self.options.prepare_timeout
    for step in self.steps[done:]:
      say(f"{machine.plan.name} runs {step.title}")
      report.phase("preparing", step.title)
      try:
        code, words = self.run_step(machine, step, patience, until)
        if code and step.again and re.search(NETWORK_RE, words):
          say(f"{step.title} failed because of the network; trying it once more")
          code, words = self.run_step(machine, step, patience, until)
      except QvmError as error:
        error = machine.explained(error)
        raise BootError(f"{step.title}: {error}; no layer is made", error.hint)
      if code:
        raise BootError(f"{step.title} failed (exit code {code}); no layer is made", words)

  def run_step(
    self, machine: Machine, step: Step, patience: float, until: float
  ) -> Tuple[int, str]:
    """Run a step, its output going to stderr; returns its exit code and its last lines."""
    said = bytearray()

    def show(stream: IO[bytes]) -> None:
      for data in iter(lambda: os.read(stream.fileno(), CHUNK_BYTES), b""):
        said[:] = (bytes(said) + data)[-TAIL_BYTES:]
        with contextlib.suppress(OSError):
          write_all(2, data)

    def use(process: Any) -> None:
      shown = Future(lambda: show(process.stdout))
      with contextlib.suppress(OSError):  # a login that fails reads nothing
        write_all(process.stdin.fileno(), step.text)
      process.stdin.close()
      while process.poll() is None:
        if time.monotonic() >= until:
          raise QvmError(
            f"not done within {self.options.prepare_timeout:g} s",
            "--prepare-timeout allows more time; what it leaves running must not keep its output",
          )
        if disk_is_full(self.plan.cache.instances):
          raise QvmError("it cannot go on", DISK_FULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
      shown.result()

    command = ("/bin/sh", "-c", RUN_STEP, "./.qvm-" + os.urandom(6).hex())
    line = shell_line(command_script(command, self.env, "", ""))
    spawn = Spawn(subprocess.PIPE, subprocess.PIPE, subprocess.STDOUT)
    code = in_guest(machine.login, line, use, patience, spawn)
    if code == 255 and machine.has_ended(1.0):
      raise lost(machine.login, "no answer any more")
    lines = said.decode("utf-8", "replace").split("\n")
    last = [each.strip() for each in lines if each.strip()][-SCRIPT_LINES:]
    return code, brief(" / ".join(last))

  def freeze(self, machine: Machine, base: Base, layer: LayerPaths, below: Stamps) -> None:
    """Power the guest off and make a layer of its disk.

    As all has to be done again if that fails, it may take as long as a boot.
    """
    plan, disk = machine.plan, machine.paths.disk
    waits = power_off(machine.paths, lambda: machine.login)
    until = time.monotonic() + machine.patience
    while waits and not machine.has_ended(POLL_SECONDS):
      waits = time.monotonic() < until and not disk_is_full(plan.cache.instances)
    if not waits or machine.process.returncode:
      raise QvmError(
        f"{plan.name} has not powered itself off; no layer is made",
        DISK_FULL if disk_is_full(plan.cache.instances) else "its disk may not be sound",
      )
    rebase_for(layer, plan, base)
    flush(disk)  # before the lock: that takes a while
    title = self.steps[0].title if self.steps[0].again else first_line(self.steps[0].text)
    record = LayerRecord(layer.name, plan.guest.os, plan.version, plan.guest.arch, self.digest)
    record = record._replace(
      key=self.key(len(self.steps)),
      bytes=os.path.getsize(disk),
      script=title,
      time=utc(time.time()),
    )
    with publishing(plan.cache, layer, below):
      for each in self.old(layer):
        remove_layer(each)
      move_into_place(disk, layer.disk, 0o400)
      write_record(plan.cache, layer.record, record, 0o600, keep=True)
    say(f"the layer {layer.name} is made: {megabytes(tree_size(layer.disk))}")


def with_discard(command: List[str]) -> List[str]:
  """QEMU's command line, with the blocks that the guest discards taken from the overlay."""
  drive = "id=drive0,cache=unsafe,discard="
  return [word.replace(drive + "ignore", drive + "unmap") for word in command]


def first_line(text: bytes) -> str:
  """The first line of a script that does something, for the list."""
  lines = [line.strip() for line in text.decode("utf-8", "replace").split("\n")]
  return printable(next((line for line in lines if line and line[0] != "#"), "")[:60])


def prepared_base(plan: Plan, options: Options, base: Base) -> Base:
  """The base as --install and --prepare have it set up; an instance that is there keeps its own."""
  below = layers_under(plan.cache, plan.paths.disk)[0][:1]
  if not options.sets_up:
    return layer_base(plan, base, below[0]) if below else base
  set_up = SetUp(plan, options, base)
  if os.path.lexists(plan.paths.disk) and below != [set_up.layer(len(set_up.steps)).name]:
    raise QvmError(
      f"the instance {plan.name} began on {below[0] if below else 'the plain image'}, not with "
      "these scripts, packages and -e",
      f"omit --prepare and --install, or choose another --name, or delete it: qvm rm {plan.name}",
    )
  return set_up.ready_base()


# ---- Commands -----------------------------------------------------------------------------------


def cmd_run(options: Options) -> int:
  """Boot a guest: in this terminal, in the background, or for one command."""
  net = net_from(os.environ)
  plan = plan_from(options, net)
  if options.guest_command or options.sets_up:
    program_for_ssh("ssh")  # before anything is downloaded
  if options.dry_run:
    return print_command(plan, options)
  make_folders(plan.cache)
  check_sync(options)
  sweep(plan.cache)
  for line in other_instances(plan, options):
    say(line)
  with Machine(plan, options) as machine, downloads_lock(plan.cache.downloads) as keep:
    base = prepared_base(plan, options, fetch_base(machine, net))
    while True:
      with contextlib.suppress(StartAgain):
        return run_machine(machine, base, keep)


def run_machine(machine: Machine, base: Base, keep: Lock) -> int:
  """Start the machine and do with it what the user asked for; StartAgain if it did not come up."""
  options = machine.options
  if not options.warm or not start_warm(machine, base):
    machine.start(base)
  keep.release()  # what was fetched is now in use, which protects it from `clean --all`
  if options.guest_command:
    return machine.run_command()
  if machine.resumed and find_program("ssh"):
    refresh_guest(machine.login)
  return machine.leave_running() if options.detach else machine.relay_console()


def other_instances(plan: Plan, options: Options) -> List[str]:
  """What to say when a newer version, which the user did not name, makes another instance."""
  named = options.name or plan.own_image or plan.release or plan.version in options.operands
  if named or plan.ephemeral or os.path.lexists(plan.paths.disk):
    return []
  return [
    f"{plan.name} is a new instance, without what the guest of {it.name} wrote: that starts with "
    f"qvm run {it.os} {it.version}"
    for it in map(known_instance, instances(plan.cache))
    if (it.os, it.arch, it.image) == (plan.guest.os, plan.guest.arch, "")
    and it.name == f"{it.os}-{it.version}-{it.arch}"
  ]


def fetch_base(machine: Machine, net: Net) -> Base:
  """Download what is missing; with --stream the image follows while the guest runs, if it can."""
  plan, options = machine.plan, machine.options
  whole = os.path.lexists(plan.paths.disk) and not is_streamed(plan.paths.disk)
  missing = options.stream and not plan.own_image and is_missing(plan, plan.base)
  if missing and options.sets_up:
    say("the image is downloaded first, as a guest is to be set up on it")
  stream = missing and not whole and not options.sets_up
  fetch_missing(plan, net, image=not stream and not plan.own_image)
  base = None
  if stream:
    log = machine.log.fileno() if machine.log and options.detach else -1
    base = streamed_base(plan, options, (machine.lock.fd, log), machine.stack)
    if not base:
      fetch_missing(plan, net)
  return base or cached_base(plan)


def login_seconds(options: Options) -> float:
  """For how many seconds to try to log in to a machine that runs already."""
  return BOOT_SECONDS if options.boot_timeout is None else options.boot_timeout


def cmd_ssh(options: Options) -> int:
  """Run a command in a running instance, or open a shell."""
  [paths] = running(cache_from(os.environ), options.operands, "run")
  login = login_of(paths, login_seconds(options))
  with terminal_kept():
    return run_command(login, options, KEY_LOGIN_SECONDS if os.path.exists(paths.key_disk) else 0.0)


def cmd_pull(options: Options) -> int:
  """Download everything that `run` needs, or fill a mirror, or verify cached files."""
  net = net_from(os.environ)
  plan = plan_from(options, net)
  if options.sets_up:
    program_for_ssh("ssh")  # before anything is downloaded
  if options.mirror:
    fill_mirror(plan, Releases(net), options.mirror)
    return 0
  make_folders(plan.cache)
  sweep(plan.cache)
  with downloads_lock(plan.cache.downloads):  # until all has been looked at, which takes a while
    plan = plan._replace(damaged=damaged_files(plan))
    fetch_missing(plan, net)
    bad = verify(plan, Releases(impatient(net))) if options.verify else ()
    damaged = tuple(path for path in bad if record_of(path).sha256)
    if damaged:
      say(f"what is damaged is downloaded again: {', '.join(map(os.path.basename, damaged))}")
      fetch_missing(plan._replace(damaged=damaged, refresh=False), net)
      bad = verify(plan, Releases(impatient(net)))
    if bad:
      say(f"these cannot be verified; delete them and pull again: {', '.join(bad)}")
      return EXIT_FAILED
    if options.sets_up:
      SetUp(plan, options, cached_base(plan)).ready_base()
  say(f"{plan.guest.title} {plan.version} on {plan.guest.arch} is ready")
  return 0


def verify(plan: Plan, releases: Releases) -> Tuple[str, ...]:
  """Check cached files against their records and releases; prints a line for each.

  Returns the paths of those that are damaged or unknown.
  """
  bad = []
  for path in (plan.base, plan.tree_program, *[plan.qemu_img] * (not plan.own_qemu)):
    repo = image_repo(plan.guest.os) if path == plan.base else "resources"
    text = verdict(releases, path, repo)
    emit(f"{os.path.basename(path)}: {text}")
    bad += [] if text.startswith("ok") else [path]
  return tuple(bad)


def verdict(releases: Releases, path: str, repo: str) -> str:
  """Whether a file, or the tree of a QEMU, matches its record and its release."""
  record = record_of(path)
  if not record.sha256:
    return "unknown: no digest was recorded at download"
  digest = tree_sha256(tree_of(path)) if tree_of(path) else file_sha256(path)
  if record_of(path) != record:
    return verdict(releases, path, repo)  # another qvm has just replaced it
  if digest != record.sha256:
    return "DAMAGED: its digest is not the one recorded at download"
  tag, name = record.release, urllib.parse.unquote(record.url.rpartition("/")[2])
  if name.endswith(".qcow2") and record.asset_sha256 != digest:
    return "DAMAGED: its record contradicts itself"
  named = releases.digest(Asset(repo, tag, name)) if re.match(TAG_RE, tag) else ""
  if named and named != record.asset_sha256:
    return f"DAMAGED: {tag} names another digest"
  return (
    f"ok, matches {tag}" if named else "ok, matches the record; the release's digest is unknown"
  )


def fill_mirror(plan: Plan, releases: Releases, folder: str) -> None:
  """Download the release's files into a folder that can be QVM_RELEASES_URL for others."""
  for name in (plan.qemu_asset, plan.tools_asset):
    mirror_asset(releases, folder, resources_asset(plan, releases, name))
  find_image(plan, releases, plan.release, functools.partial(mirror_asset, releases, folder))


def mirror_asset(releases: Releases, folder: str, asset: Asset) -> None:
  """Put one asset into a mirror, and into the files that stand for its release's pages."""
  repo, tag, name = asset
  top = os.path.join(folder, repo, "releases")
  target = os.path.join(top, "download", tag, name)
  page = os.path.join(top, "expanded_assets", tag)
  for path in (target, page):
    os.makedirs(os.path.dirname(path), exist_ok=True)
  with download_lock(os.path.dirname(target), name + ".download") as place:
    if not os.path.isfile(target):
      download = fetch_asset(releases, asset, place)
      line = f'<a href="/{repo}/releases/download/{tag}/{name}">{name}</a>'
      with open(page, "a") as file:
        file.write(f"{line} sha256:{download.file.hash.hexdigest()}\n")
      move_into_place(download.file.part, target, 0o644)
      download.file.close(remove=True)
  with download_lock(folder, repo + ".download") as place:
    tags = sorted(os.listdir(os.path.join(top, "download")), key=version_key, reverse=True)
    feed = "".join(f'<link href="/{repo}/releases/tag/{each}"/>\n' for each in tags)
    for path, text in (("releases.atom", feed), ("releases/latest", tags[0] + "\n")):
      with open(os.path.join(place, "page"), "w", encoding="utf-8") as file:
        file.write(text)
      move_into_place(file.name, os.path.join(folder, repo, path), 0o644)
  emit(target)


def cmd_search(options: Options) -> int:
  """List the available versions, or without a network the cached ones."""
  cache, net = cache_from(os.environ), impatient(net_from(os.environ))
  names = [word.lower() for word in options.operands] or list(OS_NAMES)
  releases = Releases(net)
  # All at the same time.
  asked = {name: Future(functools.partial(images_of, releases, name)) for name in names}
  rows: List[SearchRow] = []
  failed = False
  for name in names:
    images: List[Image] = []
    try:
      images = asked[name].result()
    except QvmError as error:
      failed = True
      say(f"showing only cached images of {name}: {error}")
    rows += search_rows(cache, name, images)
  if options.json:
    emit_json([row._asdict() for row in rows])
  else:
    show_search(rows)
  return EXIT_FAILED if failed and not rows else 0


class SearchRow(NamedTuple):
  """One image as `qvm search --json` shows it."""

  os: str
  version: str
  arch: str
  release: Optional[str]
  asset: str
  cached: bool
  size: int  # bytes on disk, if it is cached


def search_rows(cache: Cache, name: str, images: List[Image]) -> List[SearchRow]:
  """The images of an OS, the newest version first."""
  sizes: Dict[Tuple[str, str], int] = {}
  every = {(image.version, image.arch): image for image in images}
  for it in cached_images(cache, name):
    with contextlib.suppress(FileNotFoundError):  # it has just been deleted
      sizes[it.version, it.arch] = tree_size(cache.path("base", it.asset))
      every.setdefault((it.version, it.arch), it)
  rows = []
  for version, arch, release, asset in every.values():
    size = sizes.get((version, arch))
    rows.append(SearchRow(name, version, arch, release or None, asset, size is not None, size or 0))
  return sorted(rows, key=lambda row: version_key(row.version), reverse=True)


def show_search(rows: List[SearchRow]) -> None:
  """Print the versions as a table with a column for each CPU."""
  cells: Dict[Tuple[str, str], Dict[str, str]] = {}
  for row in rows:
    here = f"(cached, {megabytes(row.size)})" if row.cached else ""
    text = " ".join(filter(None, [row.release, here]))
    cells.setdefault((row.os, row.version), {})[row.arch] = text
  table = [("OS", "VERSION", "X86-64", "ARM64")]
  for (name, version), arches in cells.items():
    table.append((name, version, arches.get("x86-64", "-"), arches.get("arm64", "-")))
  show_table(table)


def cmd_list(options: Options) -> int:
  """List the instances and the layers."""
  cache = cache_from(os.environ)
  sweep(cache)
  rows = list_instances(cache)
  if options.json:
    emit_json([row._asdict() for row in rows])
    return 0
  table = [("NAME", "OS", "VERSION", "ARCH", "STATE", "SSH", "PORTS", "SIZE")]
  shown = [("LAYER", "AGE", "USED", "NEEDED BY", "SCRIPT")]
  for row in rows:
    state = row.state + (" (--rm)" if row.ephemeral else "")
    state += f" (base {row.base}%)" if row.base < 100 else ""
    where = (state, row.ssh or "-", " ".join(row.ports) or "-")
    table.append((row.name, row.os, row.version, row.arch, *where, megabytes(row.size)))
    if row.used:
      needed = ",".join(row.needed_by) or "-"
      shown.append((row.name, age(row.created), age(row.used), needed, row.script or "-"))
  show_table(table)
  for more in (shown, [("CACHED", "RELEASE", "SIZE"), *cached_things(cache)]):
    if more[1:]:
      emit("")
      show_table(more)
  return 0


def cached_things(cache: Cache) -> List[Tuple[str, ...]]:
  """The base images and QEMUs that are cached: name, release and size on disk."""
  images = [(it.asset, cache.path("base", it.asset)) for os_name in OS_NAMES
            for it in cached_images(cache, os_name)]  # fmt: skip
  found = [(name, path, record_path(path)) for name, path in images]
  for link in filter(os.path.isdir, qemu_links(cache)):
    name = "qemu-system-" + os.path.basename(link)
    found.append((name, os.path.realpath(link), os.path.join(link, "release.json")))
  rows: List[Tuple[str, ...]] = []
  for name, path, record in found:
    with contextlib.suppress(FileNotFoundError):  # it has just been deleted
      release = known_record(AssetRecord(), record).release or "-"
      rows.append((name, release, megabytes(tree_size(path))))
  return rows


def existing(cache: Cache, names: Sequence[str], what: str) -> List[InstancePaths]:
  """The instances of these names, each once; QvmError if one is missing."""
  chosen = [cache.instance(name) for name in dict.fromkeys(names)]
  for paths in chosen:
    if not os.path.lexists(paths.disk):
      lines = [line for line in last_lines(paths.console) if line.startswith("qvm: ")]
      hint = f"the end of {paths.console}: {lines[-1]}" if lines else "see qvm list"
      raise QvmError(f"there is no instance {paths.name}; nothing was {what}", hint)
    check_spelling(paths.disk)
  return chosen


def running(cache: Cache, names: Sequence[str], what: str) -> List[InstancePaths]:
  """As existing(), but QvmError also if one does not run."""
  chosen = existing(cache, names, what)
  for paths in chosen:
    if not is_running(paths):
      hint = "see qvm list"
      if what != "stopped":
        hint = " ".join(["start it: qvm", *map(shlex.quote, run_words(paths))])
      raise QvmError(f"the instance {paths.name} is not running; nothing was {what}", hint)
  return chosen


def with_each(chosen: Sequence[InstancePaths], act: Callable[[InstancePaths], object]) -> int:
  """Do something with each instance; one with which it fails, which is said, holds up no other."""
  code = 0
  for paths in chosen:
    try:
      act(paths)
    except QvmError as error:
      code = EXIT_FAILED
      say_error(error)
  return code


def cmd_stop(options: Options) -> int:
  """Power off running instances; all names are checked before any instance is stopped."""
  cache = cache_from(os.environ)

  def stop(paths: InstancePaths) -> None:
    stop_instance(paths, options.force, login_seconds(options))
    flush_disk(paths)
    emit(paths.name)

  code = with_each(running(cache, options.operands, "stopped"), stop)
  sweep(cache)
  return code


def run_words(paths: InstancePaths) -> List[str]:
  """The words that start an instance in the background as before; on any port if it is off."""
  it = read_instance(paths)
  words = ["run", "--detach", "--name", it.name, "--platform", it.arch]
  words += [
    *filter(None, it.words.split("\0")),
    *["--ssh-port", it.ssh] * bool(it.ssh and is_running(paths)),
  ]
  return [*words, it.os, *[it.version] * (not it.image)]


def cmd_restart(options: Options) -> int:
  """Reboot guests, one after the other; with --force those that do not reboot are started anew."""

  def restart(paths: InstancePaths) -> None:
    try:
      reboot(login_of(paths, login_seconds(options)))
    except QvmError as error:
      if not options.force or os.path.exists(paths.mark):
        hint = error.hint or "--force ends QEMU, but not that of a --rm machine"
        raise QvmError(str(error), hint)
      say(str(error))
      again = resolve(parse_command_line(run_words(paths)))
      again = again._replace(boot_timeout=options.boot_timeout)
      if is_running(paths):
        stop_instance(paths, True)
      cmd_run(again)
    else:
      emit(paths.name)

  return with_each(running(cache_from(os.environ), options.operands, "restarted"), restart)


def cmd_logs(options: Options) -> int:
  """Print an instance's console log; with --follow until its machine ends."""
  [paths] = existing(cache_from(os.environ), options.operands, "shown")
  screen, place = Screen(), 0
  own = re.search(r"--console-log=([^\0]+)", sound_record(Instance(), paths.record).words)
  path = own.group(1) if own else paths.console
  if not os.path.isfile(path):
    raise QvmError(f"there is no file {path}", "only runs with --detach or a command write it")
  running, on_terminal, raw = True, os.isatty(1), is_interactive()
  with terminal_kept(), open(path, "rb") as file:
    if raw:
      go_raw(signals=True)
    try:
      while running:
        running = options.follow and is_running(paths)  # before the last look
        if os.fstat(file.fileno()).st_size < place:
          place = file.seek(0, os.SEEK_END)  # the log was cut to keep it within bounds
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
          write_all(1, screen.show(chunk) if on_terminal else chunk)
        place = file.tell()
        time.sleep(0.2 if running else 0)
    finally:
      if on_terminal:
        screen.leave()
  return 0


def cmd_clone(options: Options) -> int:
  """Copy a stopped instance: its disks and its record, which gets the new name."""
  cache = cache_from(os.environ)
  [paths] = existing(cache, options.operands[:1], "cloned")
  new = cache.instance(options.operands[1])
  sweep(cache)
  with contextlib.ExitStack() as stack:
    for each in (paths, new):
      hint = f"stop it: qvm stop {each.name}"
      take_instance(each, stack, "; nothing was cloned", hint, shared=each is paths)
      if any(map(os.path.lexists, (new.disk, new.data, cache.layer(new.name).record))):
        raise QvmError(f"there is already an instance {new.name}", "choose another name")
    record = read_instance(paths)._replace(name=new.name, ssh="", ports="", words="")
    folder = stack.enter_context(unfinished(cache))
    sources = [*sync_records(paths), paths.data, paths.disk]
    ends = [path[len(paths.stem) :] for path in sources if os.path.lexists(path)]
    for end in ends:
      aside = os.path.join(folder, new.name + end)
      try:
        copy_sparse(paths.stem + end, aside)
      except OSError as error:
        raise write_failure(aside, tree_size(paths.stem + end), error)
    with instances_lock(cache), signals.hold():
      remove_instance(new)  # what there is of it without a disk
      open(new.mark, "w").close()  # until it is whole, the next qvm deletes it
      write_record(cache, new.record, record, keep=True)
      for end in ends:
        move_into_place(os.path.join(folder, new.name + end), new.stem + end, 0o644)
      remove_file(new.mark)
      flush(cache.instances)  # else a power failure would bring the mark back
  emit(new.name)
  return 0


def cmd_rm(options: Options) -> int:
  """Delete instances and layers, but nothing if one of them runs; pass over unknown names."""
  cache = cache_from(os.environ)
  sweep(cache)
  frozen = {layer.name: layer for layer in layers(cache)}
  names = [name for name in options.operands if name not in frozen]
  unknown = [name for name in names if not os.path.lexists(cache.instance(name).disk)]
  if len(options.operands) > 1:
    for name in dict.fromkeys(unknown):
      say(f"there is no instance {name}")
    names = [name for name in names if name not in unknown]
  chosen = existing(cache, names, "deleted")
  dropped = [frozen[name] for name in dict.fromkeys(options.operands) if name in frozen]
  but = [layer.disk for layer in dropped]
  check_unused(cache, dropped, but + [paths.disk for paths in chosen])  # before any is deleted
  for paths in chosen if options.force else []:
    if is_running(paths):
      stop_instance(paths, True)
  with contextlib.ExitStack() as stack:
    for paths in chosen:
      hint = f"stop it: qvm stop {paths.name}; or use qvm rm --force"
      take_instance(paths, stack, "; nothing was deleted", hint)
    for paths in chosen:
      remove_instance(paths)
      emit(paths.name)
  with instances_lock(cache):
    check_unused(cache, dropped, but)
    for layer in dropped:
      remove_layer(layer)  # machines that run from it have its files open
      emit(layer.name)
  return EXIT_FAILED if unknown else 0


def check_unused(cache: Cache, dropped: Sequence[LayerPaths], but: Sequence[str]) -> None:
  """Refuse to delete layers that anything needs but these disks, which are deleted with them."""
  every = overlays(cache, ephemeral=False) if dropped else []
  for layer in dropped:
    users = users_of(layer, every, but)
    if users:
      raise QvmError(
        f"the layer {layer.name} is needed: it stays",
        f"these lie on it, or may: {', '.join(users)}",
      )


def cmd_clean(options: Options) -> int:
  """Delete leftovers, with --all also what can be downloaded again; never an instance."""
  cache = cache_from(os.environ)
  total = clean(cache, options) if os.path.isdir(cache.instances) else 0
  say(f"{'would free' if options.dry_run else 'freed'} {megabytes(total)}")
  return 0


def clean(cache: Cache, options: Options) -> int:
  """Delete what `clean` may delete, or with --dry-run only list it; returns its bytes."""
  total = 0
  with Lock(cache.downloads, folder=True) as idle, instances_lock(cache):
    # Whether nothing is being downloaded.
    alone = not idle.is_held() if options.dry_run else idle.try_()
    marked = instances(cache, ".ephemeral")
    orphans = {it.disk: it.name for it in marked if not Lock(it.lock).is_held()}
    every = [it for it in overlays(cache) if it.disk not in orphans]
    paths = unfinished_downloads(cache, every)
    paths += instance_leftovers(cache, list(orphans.values()))
    if alone:
      paths += strays(cache, every) + unused_layers(cache, every, options.all)
      paths += unneeded(cache, every) if options.all else []
    elif options.all:
      say("a download is in progress: images and QEMU are kept")
    for path in dict.fromkeys(paths):
      try:
        size = tree_size(path)
      except FileNotFoundError:  # not there at all, or a run has just ended and deleted its lock
        continue
      if not options.dry_run:
        if os.path.dirname(path) == cache.downloads and os.path.isdir(path):
          if not remove_unlocked(path):
            continue  # another process has just begun to use it
        else:
          remove_tree(path)
      total += size
      emit(f"{megabytes(size):>8}  {os.path.relpath(path, cache.root)}")
  return total


# What qvm may have left, by folder. The cache may be a folder that holds other things, too.
LEFTOVER_RES = {
  "base": r".+-(x86-64|arm64)\.(json(\.new)?(\.tmp)?|qcow2\.tmp|kernel)",
  "bin": r"resources\.tmp|qemu-img(\+.+)?(\.json\..+|\.tmp)",
  "qemu": r"(x86_64|aarch64)(\+.+)?\.(tmp|new)|\.(x86_64|aarch64)(\+.+)?-[0-9a-f]{8}",
  "layers": r".+-(warm|prepared)-[0-9a-f]{10}\.((qcow2|memory|state)(\.tmp)?|json\.tmp)",
  "downloads": SCRATCH + r".+|.+\.(qcow2|tar(\+.+)?)",
  "each": r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}",
}


def named_leftovers(cache: Cache, folder: str) -> List[str]:
  """The paths in one of the cache's folders whose names are those of leftovers."""
  names = filter(re.compile(LEFTOVER_RES[folder]).fullmatch, names_in(cache.path(folder)))
  return [cache.path(folder, name) for name in names]


def unfinished_downloads(cache: Cache, every: Sequence[Overlay]) -> List[str]:
  """Whatever in downloads/ nobody has locked, except what streamed overlays lie on."""
  kept = [it.base for it in every if it.backing is None or is_served(it.backing)]
  paths = named_leftovers(cache, "downloads") if None not in kept else scratch_folders(cache)
  paths += older_downloads(cache)
  return [p for p in paths if os.path.basename(p) not in kept and not Lock(p).is_held()]


def instance_leftovers(cache: Cache, orphans: Sequence[str]) -> List[str]:
  """The files of orphans, locks that nobody holds, and what there is beside a disk without one."""
  own = map(re.escape, (".lock", *InstancePaths.SUFFIXES))
  ends = "|".join([*own, SYNC_SUFFIX_RE, r"(?:\.qcow2|\.json)?\.tmp"])
  pattern, found = re.compile(f"(.*?)({ends})", re.DOTALL), []
  for match in filter(None, map(pattern.fullmatch, names_in(cache.instances))):
    name, end = match.groups()
    paths, path = cache.instance(name), cache.path("instances", name + end)
    if Lock(paths.lock).is_held():
      continue
    useless = end.endswith((".lock", ".tmp")) or name in orphans
    kept = end == ".data" or end == ".json" and known_record(Instance(), path).name != name
    if useless or not (kept or os.path.lexists(paths.disk)):
      found.append(path)
  return sorted(found, key=lambda path: path.endswith(".ephemeral"))  # as remove_instance


def strays(cache: Cache, every: Sequence[Overlay]) -> List[str]:
  """What belongs to no image, layer, QEMU or qvm that is there: of former use, or cut off."""
  bases = map(cache.base, stems_in(cache.path("base"), ".qcow2"))
  cached = [*bases, *paths_in(cache.path("bin"))]
  used = {record_path(path) + end for path in cached for end in ("", ".new")}
  used.update(path for layer in layers(cache) for path in layer_files(layer))
  # A disk whose record is lost may be needed all the same.
  disks = map(cache.layer, stems_in(cache.path("layers"), ".qcow2"))
  used.update(layer.disk for layer in disks if users_of(layer, every))
  used.update(map(os.path.realpath, qemu_links(cache)))
  found = [path for path in paths_in(cache.path("code")) if path != packed_code[0]]
  for folder in ("base", "bin", "qemu", "layers"):
    paths = named_leftovers(cache, folder)
    found += [path for path in paths if path not in used and os.path.realpath(path) not in used]
  return found


UNUSED_SECONDS = 30 * 86400.0


def unused_layers(cache: Cache, every: Sequence[Overlay], young: bool) -> List[str]:
  """The files of layers that nothing needs and that were not used for 30 days, or of young, too."""
  before = time.time() - UNUSED_SECONDS
  old = [each for each in layers(cache) if young or os.stat(each.record).st_mtime < before]
  disks = [each.disk for each in old]
  users = [it for it in every if it.disk not in disks]
  unknown = [it.name for it in users if it.backing is None]
  if old and unknown:
    say(f"the disk of {unknown[0]} cannot be read: what it may need is kept")
  # The record goes first.
  return [path for each in old if not users_of(each, users) for path in layer_files(each)]


def unneeded(cache: Cache, every: Sequence[Overlay]) -> List[str]:
  """Base images that no instance needs, QEMU if nothing is running, and the logs of `each`.

  All but the logs can be downloaded again.
  """
  found = [path for path in named_leftovers(cache, "each") if not Lock(path).is_held()]
  needed = {it.base for it in every}
  images = (image.asset for name in OS_NAMES for image in cached_images(cache, name))
  for base in (cache.path("base", image) for image in images):
    if not needed & {os.path.basename(base), None}:  # None: unknown
      found += [base, record_path(base), record_path(base) + ".new"]
  if any(Lock(path).is_held() for path in paths_in(cache.instances) if path.endswith(".lock")):
    say("an instance is running: QEMU is kept")
    return found
  programs = [*qemu_links(cache), *named_leftovers(cache, "qemu")]
  bin_re = re.escape(cache.qemu_img) + r"(\+.*|\.json)?\Z"
  programs += [path for path in paths_in(cache.path("bin")) if re.match(bin_re, path)]
  return found + programs + paths_in(cache.path("accelerators"))


def qemu_links(cache: Cache) -> List[str]:
  """The links to QEMU's trees: the newest for each CPU, then those of --qemu-release."""
  cpus = QEMU_CPUS.values()
  pinned = [p for p in paths_in(cache.path("qemu")) if os.path.basename(p).split("+")[0] in cpus]
  return list(dict.fromkeys([*map(cache.qemu_tree, cpus), *pinned]))


def cmd_config(options: Options) -> int:
  """Print the path of the cache folder."""
  emit(cache_from(os.environ).root)
  return 0


# ---- Each ---------------------------------------------------------------------------------------
# `each` starts a qvm for each guest: `qvm --child PHASES,LIFE,DIR run --rm …`. The numbers are
# descriptors of two pipes. Into the first the child writes what it does, as Reporter.phase has it.
# The other end of the second only the parent holds: once that is closed, whatever has become of
# the parent, the child ends its machine and itself. DIR is where --sync-out brings what changed.

CHILD = "--child"
STOP_SECONDS = 3.0  # until a child that was to end is killed; it may need two for its programs
OUTPUT_LINE_BYTES = 1 << 16  # a longer line of output is broken
TAIL_LINES = 40
KEPT_RUNS = 10  # whose logs the cache holds


def join_parent(word: str, options: Options) -> Options:
  """In a child of `each`: the options with --sync-out; from now on it ends with the parent."""
  phases, life, folder = word.split(",", 2)
  report.phases = int(phases)
  threading.Thread(target=watch_pipe, args=(int(life),), daemon=True).start()
  if folder:
    os.makedirs(folder, exist_ok=True)
  return options._replace(sync_out=folder)


def watch_pipe(life: int) -> None:
  """Once nobody holds the other end of the pipe: end this qvm in an orderly way, else at once."""
  os.read(life, 1)
  signals.hurried = True
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(STOP_SECONDS)
  os._exit(128 + signal.SIGTERM)


class Child:
  """A guest of `each`: the qvm that runs it, what that does, and how it has ended."""

  process: "Process"  # from start() on, as are these
  keeper: "Process"  # of its log
  tells: int  # what it does, to be read
  life: int
  rest: Dict[int, bytes]  # of each descriptor to be read: the beginning of a line

  def __init__(self, guest: str, words: List[str], paths: InstancePaths, log: str) -> None:
    self.guest, self.words, self.paths, self.log = guest, words, paths, log
    self.phase, self.text = "waiting", ""  # what it does, and more about that
    self.result, self.reason = "not run", ""  # ok, exit N, signal N; why it was not run
    self.code: Optional[int] = None  # the command's
    self.began = self.since = self.stopped = self.seconds = 0.0
    self.running = self.ended = False
    self.output: List[str] = []  # the last lines
    self.news: List[bytes] = []  # whole lines that have not been shown

  def start(self, folder: str) -> None:
    """Start the qvm; in one pipe for output and errors they would cut each other's lines."""
    pipes = [os.pipe() for _ in range(4)]
    (output, mine), (errors, other), (self.tells, told), (life, self.life) = pipes
    command = [*own_program(), CHILD, f"{told},{life},{folder}", "run", "--rm"]
    spawn = Spawn(subprocess.DEVNULL, mine, other, (told, life), True)
    with open(self.log, "wb"), open(self.log, "ab+") as log:
      self.keeper = start_keeper(log)
    self.process = start([*command, "--name", self.paths.name, *self.words], spawn)
    for fd in (mine, other, told, life):
      os.close(fd)
    self.rest = {output: b"", errors: b"", self.tells: b""}
    self.phase, self.running = "starting", True
    self.began = self.since = time.monotonic()

  def stop(self, reason: str) -> None:
    """Have the machine and its qvm end at once; one that waits is not started any more."""
    self.reason = self.reason or reason * (not self.ended)
    if self.running and not self.stopped:
      self.stopped = time.monotonic()
      os.close(self.life)

  def take_output(self, data: bytes) -> None:
    """Log whole lines of output, and keep the last ones."""
    with contextlib.suppress(OSError):
      write_all(self.keeper.stdin.fileno(), data)  # type: ignore[union-attr] # it is a pipe
    lines = data.split(b"\n")[: -1 if data[-1:] in (b"", b"\n") else None]
    self.news += lines
    newest = [plain(line)[:1000] for line in lines[-TAIL_LINES:]]
    self.output = [*self.output, *newest][-TAIL_LINES:]
    if self.phase not in ("downloading", "booting"):  # of which it tells
      self.text = next(filter(str.strip, reversed(newest)), self.text)

  def take_phases(self, data: bytes) -> None:
    """Take in what the child tells of itself."""
    for line in data.splitlines():
      name, _, text = line.decode("utf-8", "replace").partition(" ")
      if name == "exit":
        self.code = code = int(text)
        self.result = f"exit {code}" if not 128 < code <= 192 else f"signal {code - 128}"
        self.result = self.result if code else "ok"
      elif name == "error":
        self.reason = self.reason or text
      else:
        self.since = self.since if name == self.phase else time.monotonic()
        self.phase, self.text = name, text

  def read(self, ready: Sequence[int]) -> None:
    """Take what there is to read, and the end of the child."""
    for fd in [fd for fd in self.rest if fd in ready]:
      chunk = os.read(fd, CHUNK_BYTES)
      data = self.rest[fd] + chunk
      end = data.rfind(b"\n") + 1
      end = end if chunk and len(data) - end < OUTPUT_LINE_BYTES else len(data)
      self.rest[fd] = data[end:]
      (self.take_phases if fd == self.tells else self.take_output)(data[:end])
      if not chunk:
        os.close(fd)
        del self.rest[fd]
    if self.stopped and time.monotonic() > self.stopped + STOP_SECONDS:
      self.process.kill()
    if not self.rest and self.process.poll() is not None:
      self.finish(self.process.returncode)

  def finish(self, code: int) -> None:
    """The child has ended: see to it that nothing of its machine stays."""
    self.stop(f"its qvm has ended ({ending(code)})")
    close_streams(self.keeper)
    self.keeper.wait()
    if code < 0:
      signals.hurried = True
      with contextlib.suppress(QvmError):
        stop_instance(self.paths, force=True)
      sweep(self.paths.cache)
    self.reason = self.reason if self.code is None else ""
    self.output = self.output if self.code != 0 else []
    self.running, self.ended, self.phase = False, True, self.result
    self.seconds = round(time.monotonic() - self.began, 1)

  def state(self) -> str:
    """What it does, or how it has ended, in a line."""
    seconds = self.seconds if self.ended else time.monotonic() - self.since
    text = self.reason if self.ended else self.text
    if self.phase in ("waiting", "downloading"):
      return f"{self.phase} {text}"
    return f"{self.phase} {seconds:.0f} s" + (f": {text}" if text else "")


class Team:
  """All guests of an `each`: starts them, shows what they do, and ends them."""

  def __init__(self, children: List[Child], options: Options) -> None:
    self.children, self.options = children, options
    self.jobs = options.jobs or machines_at_once(options)
    self.out = 2 if options.json else 1
    self.live = os.isatty(2) and (options.json or os.isatty(1)) and os.environ.get("TERM") != "dumb"
    self.ending, self.shown = False, 0.0
    signal.signal(signal.SIGWINCH, lambda *_: setattr(report, "resized", True))

  def run(self) -> None:
    """Run all; however that ends, no machine and no qvm stays."""
    try:
      self.loop()
    except BaseException as error:
      self.end("was interrupted" if isinstance(error, Interrupted) else describe_at(error))
      signals.again()  # a second Ctrl-C does not wait for what is ending
      self.loop()
      raise
    finally:
      report.erase()

  def end(self, reason: str) -> None:
    """End all that run, and start no more."""
    self.ending = True
    for child in self.children:
      child.stop(reason)

  def loop(self) -> None:
    """Go on until none runs, and none is to be started."""
    while True:
      running = [child for child in self.children if child.running]
      waiting = [child for child in self.children if not child.began and not self.ending]
      if waiting and len(running) < self.jobs:
        folder = self.options.sync_out
        with signals.hold():
          waiting[0].start(folder and os.path.join(folder, waiting[0].guest))
        continue
      if not running:
        return
      ready = select.select([fd for child in running for fd in child.rest], [], [], 0.2)[0]
      for child in running:
        child.read(ready)
        self.show(child)
        if child.ended and child.code != 0 and self.options.fail_fast:
          self.end(f"--fail-fast: {child.guest} has failed")

  def show(self, child: Child) -> None:
    """On a terminal show what all do; elsewhere the output of one, with its name before it."""
    lines, child.news = child.news, []
    if self.live and time.monotonic() >= self.shown + 0.2:
      self.shown = time.monotonic()
      report.draw(*self.lines(terminal_size()[1] - 1))
    elif lines and not self.live and not self.ending:
      text = "".join(f"{child.guest}: {plain(line)}\n" for line in lines)
      write_all(self.out, text.encode("utf-8", "replace"))

  def lines(self, rows: int) -> List[str]:
    """A line for each guest; where there is no room for all, the last one counts the others."""
    shown, width = self.children, max(len(child.guest) for child in self.children)
    if len(shown) > rows:  # those that run come first, then those that have failed
      shown = sorted(shown, key=lambda child: (not child.running, not child.ended, child.code == 0))
      shown = shown[: max(0, rows - 1)]
    lines = [f"{child.guest.ljust(width)}  {child.state()}" for child in shown]
    phases = [child.phase for child in self.children if child not in shown]
    if phases:
      counts = [f"{phases.count(name)} {name}" for name in dict.fromkeys(phases)]
      lines.append(f"and {len(phases)} more: {', '.join(counts)}")
    return lines


def machines_at_once(options: Options) -> int:
  """As many as the host has cores, and free memory for them, but at least one."""
  cores, free = os.cpu_count() or 1, available_memory("/proc/meminfo")
  if sys.platform == "linux":
    cores = len(os.sched_getaffinity(0))
  return max(1, cores if free is None else min(cores, free // memory_bytes(options.memory)))


def handed_on(options: Options) -> List[str]:
  """The words that give the `run` of a guest the options of `each`."""
  words = ["--sync-direction=" + ("both" if options.sync_out else "in")] if options.sync else []
  words += words_of(options, HANDED_ON)
  if options.sync_out:
    inside = os.path.relpath(*map(os.path.realpath, (options.sync_out, options.sync)))
    pattern = re.sub(r"([*?[])", r"[\1]", inside)
    words += [] if inside.split("/")[0] == ".." else [f"--sync-exclude=/{pattern}"]
  return words


def chosen_guests(options: Options) -> Dict[str, List[str]]:
  """The words that name each guest for `run`, by its name for us; UsageError if there is none."""
  host, found = this_host(), {}
  for os_name, version, arch in map(parse_guest, options.operands):
    names = [g.os for g in GUESTS if g.arch == host.arch] if os_name == ALL else [os_name]
    for guest in [find_guest(name, arch or host.arch) for name in names]:
      check_host(host, guest, options.qemu)
      words = [f"--platform={guest.arch}", guest.os, version or "latest"]
      found["-".join(filter(None, (guest.os, version, arch)))] = words
  return found


@contextlib.contextmanager
def logs_folder(cache: Cache, wanted: str) -> Iterator[str]:
  """The folder for the logs; one below the cache takes the place of the oldest run's."""
  if wanted:
    os.makedirs(wanted, exist_ok=True)
    yield wanted
    return
  os.makedirs(cache.path("each"), 0o700, exist_ok=True)
  name = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + os.urandom(3).hex()
  with Lock(cache.path("each", name), folder=True).hold() as lock:
    yield lock.path
  for path in {*sorted(named_leftovers(cache, "each"))[:-KEPT_RUNS]} - {lock.path}:
    remove_unlocked(path)


def junit(rows: Sequence[Child]) -> bytes:
  """The results as JUnit's XML; printable text has no character that XML forbids."""
  tree, failed = xml.etree.ElementTree, sum(bool(row.code) for row in rows)
  counts = {"tests": len(rows), "failures": failed, "errors": sum(r.code is None for r in rows)}
  suites = tree.Element("testsuites")
  about = {"name": "qvm each", **{name: str(count) for name, count in counts.items()}}
  suite = tree.SubElement(suites, "testsuite", about)
  for row in rows:
    about = {"classname": "qvm", "name": row.guest, "time": str(row.seconds)}
    case = tree.SubElement(suite, "testcase", about)
    if row.code != 0:
      kind, text = ("error", row.reason) if row.code is None else ("failure", row.result)
      tree.SubElement(case, kind, {"message": printable(text)}).text = "\n".join(row.output)
  return bytes(tree.tostring(suites, "utf-8"))


def write_junit(rows: Sequence[Child], path: str) -> str:
  """Write the results to a file, if one is wanted; why that failed, for the table comes first."""
  try:
    if path:
      with open(path, "wb") as file:
        file.write(junit(rows))
  except OSError as error:
    return f"--junit: {path}: {describe(error)}"
  return ""


def show_results(rows: Sequence[Child], options: Options) -> None:
  """Print the last lines of what failed, and the table; or all of it as JSON."""
  if options.json:
    fields = ("guest", "result", "code", "seconds", "reason", "log", "output")
    return emit_json([{name: getattr(row, name) for name in fields} for row in rows])
  for row in [row for row in rows if row.output]:
    emit("\n".join([f"--- the last lines of {row.guest}:", *row.output]))
  table = [["GUEST", "RESULT", "SECONDS", "REASON"]]
  show_table(table + [[row.guest, row.result, f"{row.seconds:.1f}", row.reason] for row in rows])


def cmd_each(options: Options) -> int:
  """Run one command in several guests at once, each a temporary machine of its own."""
  cache, guests = cache_from(os.environ), chosen_guests(options)
  program_for_ssh("ssh")
  make_folders(cache)
  check_sync(options)
  with logs_folder(cache, options.logs) as folder:
    children = []
    for guest, names in guests.items():
      paths = cache.instance(f"{guest}-each-{os.urandom(3).hex()}")
      words = [*handed_on(options), *names, "--", *options.guest_command]
      children.append(Child(guest, words, paths, os.path.join(folder, guest + ".log")))
    try:
      Team(children, options).run()
    finally:
      problem = write_junit(children, options.junit)
      show_results(children, options)
      if any(child.began for child in children):
        say(f"the logs are in {folder}")
      if problem:
        say(problem)
  codes = [child.code for child in children]
  return EXIT_FAILED if any(codes) else EXIT_OWN if None in codes or problem else 0


# ---- Doctor -------------------------------------------------------------------------------------


class Check(NamedTuple):
  """One line of `qvm doctor`: what was checked, the result, and the fix."""

  state: str  # ok, warning or fault
  name: str
  text: str
  fix: str = ""


class Warned(QvmError):
  """What a check finds that is no fault: qvm can do without."""


FIRST_RUN_BYTES = 2 << 30  # a first run's QEMU and image, and some of what the guest writes
DOCTOR_SECONDS = 8.0  # for all network checks: enough for two slow requests, short for a user


def cmd_doctor(options: Options) -> int:
  """Report what this host can and cannot do, with fixes; downloads nothing."""
  cache = cache_from(os.environ)
  network = None if options.offline else Future(lambda: check_network(net_from(os.environ)))
  folders = checked("cache", check_folders, cache)
  usable = folders.state == "ok"  # else no command uses it, and nothing in it is run
  qemu = ""  # the downloaded one for the host's own CPU
  with contextlib.suppress(QvmError):
    qemu = cache.qemu_program(QEMU_CPUS[this_host().arch]) if usable else ""
  is_mac = sys.platform == "darwin"
  checks = [
    checked("host", check_system),
    checked("Python", check_python),
    checked("ssh", check_ssh),
    checked("cache", check_cache, cache) if usable else folders,
    checked("zstd", check_zstd),
    *(check_qemu(cache) if usable else []),
    checked("HVF", check_hvf, qemu) if is_mac else checked("KVM", check_kvm, "/dev/kvm", qemu),
  ]
  if usable:
    folder = cache.path("accelerators")
    known = paths_in(folder) if os.access(folder, os.R_OK | os.X_OK) else []
    tried = [checked("remembered", check_failed, cache, path) for path in known]
    checks += [check for check in tried if check.text]
    checks.append(checked("instances", check_instances, cache))
  checks += within(network, DOCTOR_SECONDS) if network else [Check("ok", "network", "skipped")]
  if options.json:
    emit_json([check._asdict() for check in checks])
  else:
    for check in checks:
      emit(printable(f"{check.state:<8} {check.name + ':':<13} {check.text}"))
      if check.fix:
        emit(printable(f"{'':<22} → {check.fix}"))
  return EXIT_FAILED if any(check.state == "fault" for check in checks) else 0


def checked(name: str, check: Callable[..., Optional[str]], *about: object) -> Check:
  """The result of a check, which returns what is well, if anything, and raises what is not."""
  try:
    return Check("ok", name, check(*about) or "")
  except Warned as error:
    return Check("warning", name, str(error), error.hint)
  except QvmError as error:
    return Check("fault", name, str(error), error.hint)


def within(later: "Future[List[Check]]", seconds: float) -> List[Check]:
  """The result of the network checks, or a fault if they take longer."""
  later.thread.join(seconds)
  if later.thread.is_alive():
    fix = "is a proxy needed? set https_proxy"
    return [Check("fault", "network", f"no answer within {seconds:g} s", fix)]
  try:
    return later.result()
  except QvmError as error:
    return [Check("fault", "network", str(error), error.hint or "correct it, or unset it")]


def check_system() -> str:
  """Whether qvm supports this system."""
  uname = os.uname()
  version = platform.mac_ver()[0]
  system = f"macOS {version}" if version else f"{uname.sysname} {uname.release}"
  text = f"{system} on {uname.machine}"
  host = this_host()
  check_host(host, GUESTS[0], "")
  if lacks_rosetta(host):
    raise QvmError(f"{text}, without Rosetta, which QEMU needs", ROSETTA_FIX)
  return text


def check_python() -> str:
  """The Python that runs qvm, and its TLS."""
  version = sys.version.split()[0]
  try:
    return f"{version}, {ssl.OPENSSL_VERSION}, {sys.executable}"
  except ImportError:
    raise QvmError(f"{version} without ssl", "use a Python with TLS support")


def check_ssh() -> str:
  """The OpenSSH client, which commands in the guest and `stop` need."""
  program = find_program("ssh")
  if not program:
    raise Warned(
      "no ssh found on PATH: qvm cannot run commands in guests or power them off", SSH_FIX
    )
  if not is_known_user():
    raise Warned(f"ssh cannot run: {NO_USER}", NO_USER_FIX)
  code, output = ask_program([program, "-V"])
  if code:
    raise Warned(f"ssh does not start: {output}", "reinstall the OpenSSH client")
  return output


def check_cache(cache: Cache) -> str:
  """Whether the cache folder, or where it will be created, is writable and has space."""
  root, there = cache.root, nearest(cache.root)
  text = f"{root} on {file_system(there, '/proc/mounts')}"
  if not os.access(there, os.W_OK | os.X_OK):
    raise QvmError(f"{text}: not writable", OTHER_CACHE)
  if not locks_work(there):
    raise Warned(f"{text}: its locks let everybody in", NFS_FIX)
  free = free_space(there)
  text += f", {megabytes(tree_size(root)) if there == root else 'empty'}, {megabytes(free)} free"
  if free < FIRST_RUN_BYTES:
    text += f"; a first run needs {megabytes(FIRST_RUN_BYTES)}"
    raise Warned(text, "qvm clean --all --dry-run lists what can be deleted")
  return text


def file_system(path: str, mounts: str) -> str:
  """The type of the file system that holds a path; Linux only."""
  best, kind = "", "its file system"
  with contextlib.suppress(OSError), open(mounts) as file:
    for fields in (line.split() for line in file):
      point = fields[1].replace("\\040", " ") if len(fields) > 2 else ""
      inside = point and (os.path.realpath(path) + "/").startswith(point.rstrip("/") + "/")
      if inside and len(point) >= len(best):
        best, kind = point, fields[2]
  return kind


def check_qemu(cache: Cache) -> List[Check]:
  """The cached programs: whether they start, and which accelerators the QEMUs offer."""
  programs = [(cpu, cache.qemu_program(cpu)) for cpu in QEMU_CPUS.values()]
  checks = [checked("QEMU " + cpu, check_program, path, "-accel", "help") for cpu, path in programs]
  return [*checks, checked("qemu-img", check_program, cache.qemu_img, "--version")]


def check_program(*words: str) -> str:
  """Whether a cached program starts, and which accelerators it offers if it is asked."""
  if not os.path.isfile(words[0]):
    return "not downloaded yet"
  release = record_of(words[0]).release or "unknown release"
  code, output = ask_program(words)
  if code:
    fix = ROSETTA_FIX if "Bad CPU type" in output else QEMU_FIX
    raise QvmError(f"{release} does not start: {output}", fix)
  offers = f", accelerators: {' '.join(output.partition(':')[2].split())}"
  return release + offers * (words[-1] == "help")


FULL_SPEED = (
  "arm64 guests at full speed: brew install qemu, and --qemu qemu-system-aarch64, or once for all "
  "export QVM_QEMU_AARCH64=qemu-system-aarch64"
)
FALLS_BACK = "runs fall back to emulation, which is much slower; --accel tcg goes there at once"


def check_kvm(kvm: str, qemu: str) -> str:
  """Whether Linux runs guests of its own CPU at full speed; qemu is the one for that CPU."""
  emulated = "guests are emulated, which is much slower"
  if not os.path.exists(kvm):
    fix = "enable virtualisation in the firmware, or nested virtualisation if this is a guest"
    raise Warned(f"there is no {kvm}: {emulated}", fix)
  try:
    fd = os.open(kvm, os.O_RDWR)
  except OSError as error:
    raise Warned(f"cannot open {kvm} ({describe(error)}): {emulated}", KVM_FIX)
  try:
    version = fcntl.ioctl(fd, 0xAE00)  # KVM_GET_API_VERSION, 12 since Linux 2.6.22
    os.close(fcntl.ioctl(fd, 0xAE01, 0))  # KVM_CREATE_VM
  except OSError as error:
    raise Warned(f"{kvm} cannot create a virtual machine: {describe(error)}", FALLS_BACK)
  finally:
    os.close(fd)
  if not os.path.isfile(qemu):
    return f"{kvm} can be opened, API {version}; not tried without QEMU"
  code, output = try_accelerator(qemu, "kvm")
  if code:
    cause = explain(output) or [f"QEMU does not start with it: {output[-200:]}", TCG_FIX]
    raise Warned(f"{kvm}: {cause[0]}", FALLS_BACK if re.search(KVM_RE, output) else cause[1])
  return f"{kvm} works, API {version}"


def check_hvf(qemu: str) -> str:
  """What macOS' own accelerator is good for here; qemu is the one for this Mac's CPU."""
  if not has_hvf():
    return "kern.hv_support is not 1, as in most virtual machines: guests are emulated"
  if this_host().arch == "x86-64":
    return "kern.hv_support is 1: x86-64 guests run at full speed"
  own = find_program(os.environ.get("QVM_QEMU_AARCH64", ""))
  if is_intel_program(own or qemu):
    text = "kern.hv_support is 1, but the downloaded QEMU is built for Intel: guests are emulated"
    raise Warned(text, FULL_SPEED)
  return f"kern.hv_support is 1: arm64 guests run at full speed ({own or qemu})"


def check_failed(cache: Cache, path: str) -> str:
  """Try an accelerator again that has failed here, and forget it if it starts now."""
  failed = sound_record(FailedAccelerator(), path)
  if accelerator_path(cache, failed.qemu) != path:
    return ""  # of another host, kernel or QEMU
  text = (
    f"{failed.accelerator.upper()} failed on {failed.time} with {failed.qemu} ({failed.problem})"
  )
  if try_accelerator(failed.qemu, failed.accelerator)[0]:
    raise Warned(text, f"it still does; --accel {failed.accelerator} tries it all the same")
  remove_file(path)
  return f"{text}; it starts now: the next run uses it again"


def check_zstd() -> str:
  """Whether bundles can be unpacked."""
  if not can_unzstd():
    raise Warned("none: the newest images cannot be unpacked", ZSTD_HINT)
  return (unzstd_command() or ["Python's own"])[0]


def check_network(net: Net) -> List[Check]:
  """The proxies, the release server, and the quota of the API."""
  known = urllib.request.getproxies().items()
  proxies = {name: proxy_name(url) for name, url in known if name != "no"}
  checks = [Check("ok", "proxy", ", ".join(f"{k}: {v}" for k, v in proxies.items()) or "none")]
  one = impatient(net)._replace(attempts=1, timeout=min(net.timeout, DOCTOR_SECONDS / 2))
  checks.append(checked("releases", check_releases, one))
  return [*checks, checked("API", check_quota, one)] if net.api else checks


def check_releases(net: Net) -> str:
  """Whether the release server answers."""
  return f"{redacted(net.releases)}: {newest_tag(net, 'resources')}"


def check_quota(net: Net) -> str:
  """Whether GitHub's API, which has digests and older releases, still answers."""
  url = f"{net.api}/resources/releases?per_page=1"
  try:
    with open_url(net, url) as answer:
      left = answer.headers.get("x-ratelimit-remaining")
  except (QvmError, Transient) as error:
    hint = getattr(error, "hint", "") or "no action needed; GITHUB_TOKEN raises the quota"
    raise Warned(f"{error}; qvm reads the release pages instead", hint)
  return redacted(net.api) + (f", {left} requests left this hour" if left else "")


def check_instances(cache: Cache) -> str:
  """The number of instances, and those that are running."""
  try:
    rows = [row for row in list_instances(cache) if row.state in ("running", "stopped")]
  except OSError as error:
    raise QvmError(f"{cache.root}: {describe(error)}", "restore your ownership of the folder")
  running = [f"{row.name} ({row.ssh})" for row in rows if row.state == "running"]
  return f"{len(rows)}, running: {', '.join(running) or 'none'}"


# ---- Completion and main ------------------------------------------------------------------------

COMPLETIONS = {
  "bash": """\
_qvm() {{
  local word words=("${{COMP_WORDS[@]:0:COMP_CWORD+1}}")
  if [[ -n $COMP_LINE ]]; then # bash also splits words at = and :
    read -ra words <<< "${{COMP_LINE:0:COMP_POINT}}"
    [[ ${{COMP_LINE:0:COMP_POINT}} == *" " ]] && words+=("")
  fi
  local last=$((${{#words[@]}} - 1)) # the bash of macOS, 3.2, counts from the start only
  local before=$((last > 0 ? last - 1 : 0))
  COMPREPLY=()
  while IFS= read -r word; do
    [[ $word == "${{words[last]}}"* ]] && COMPREPLY+=("$word")
  done < <({program} completion words -- "${{words[@]:1:before}}" 2>/dev/null)
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
if [[ $funcstack[1] == _qvm ]]; then _qvm "$@"; else
  (( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit -i }}
  compdef _qvm qvm qvm.pyz qvm.py
fi
""",
  "fish": """\
function __qvm_words
  set -l before (commandline -opc)
  set -l words ({program} completion words -- $before[2..-1] 2>/dev/null)
  test -n "$words"; and printf '%s\\n' $words; or __fish_complete_path (commandline -ct)
end
for name in qvm qvm.pyz qvm.py
  complete -c $name -f -a '(__qvm_words)'
end
""",
}


def cmd_completion(options: Options) -> int:
  """Print a shell's completion script or, for that script, the words that can come next."""
  shell = options.operands[0]
  if shell == "words":
    for word in next_words(options.operands[1:], cache_from(os.environ)):
      emit(word)
    return 0
  program = [sys.executable, os.path.abspath(sys.argv[0])]
  text = COMPLETIONS[shell].format(program=" ".join(map(shlex.quote, program)))
  emit(text.rstrip("\n"))
  return 0


def next_words(before: Sequence[str], cache: Cache) -> List[str]:
  """The words that can follow those already typed."""
  if "--" in before:
    return []  # a command for the guest
  values = {"--platform": ["x86-64", "arm64"], "--sync-direction": list(DIRECTIONS)}
  values["--accel"] = [*ACCELERATORS, "hvf:kvm:tcg"]
  if before and before[-1] in values:
    return values[before[-1]]
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
  elif form.operands.startswith("NAME") and len(operands) < form.most:
    names = stems_in(cache.instances, ".qcow2")
    names += [files.name for files in layers(cache) if command == "rm"]
    names = [] if command == "clone" and operands else names  # NEW is for the user to invent
    words += [name for name in names if name not in operands and re.match(NAME_RE, name)]
  elif form.operands.startswith("GUEST"):
    words += [name for name in (ALL, *OS_NAMES) if name not in operands]
  elif command == "config" and not operands:
    words += ["print-path"]
  elif command == "completion" and not operands:
    words += COMPLETIONS
  return words


CALLS: Dict[str, Callable[[Options], int]] = {
  "run": cmd_run,
  "each": cmd_each,
  "pull": cmd_pull,
  "search": cmd_search,
  "list": cmd_list,
  "ssh": cmd_ssh,
  "stop": cmd_stop,
  "restart": cmd_restart,
  "logs": cmd_logs,
  "clone": cmd_clone,
  "rm": cmd_rm,
  "clean": cmd_clean,
  "doctor": cmd_doctor,
  "config": cmd_config,
  "completion": cmd_completion,
}


# Commands that read nothing of the cache but names, or check it themselves.
OWN_CHECKS = ("completion", "config", "doctor")


def call(options: Options) -> int:
  """Execute the parsed command line."""
  report.progress = options.progress
  if options.help:
    emit(help_text(options.command))
    return 0
  if options.version:
    emit("qvm " + __version__)
    return 0
  if options.command not in OWN_CHECKS:
    check_folders(cache_from(os.environ))
  return CALLS[options.command](resolve(options))


def lies_in_cache(path: object) -> bool:
  """Whether a path that something failed on is one of the cache."""
  with contextlib.suppress(QvmError):
    return isinstance(path, str) and (path + "/").startswith(cache_from(os.environ).root + "/")
  return False


def outcome(words: Optional[Sequence[str]]) -> int:
  """Run qvm and return its exit code; the only function that prints errors."""
  code = failed = EXIT_FAILED
  try:
    open_standard_streams()
    signals.install()
    words = sys.argv[1:] if words is None else words
    if words[:1] == [SERVE]:
      code = serve(words[1:])
    else:
      join = words[:1] == [CHILD]
      options = parse_command_line(words[2:] if join else words)
      if join:
        options = join_parent(words[1], options)
      guests = options.guest_command or options.command == "ssh" or options.sets_up
      code = failed = EXIT_OWN if guests else EXIT_FAILED
      code = call(options)
      report.phase("exit", str(code))
  except QvmError as error:
    code = EXIT_USAGE if isinstance(error, UsageError) else failed
    say_error(error)
    report.phase("error", "; ".join(filter(None, (str(error), error.hint))))
  except BrokenPipeError:
    code = 128 + signal.SIGPIPE
  except OSError as error:
    path = error.filename2 or error.filename
    say(describe_at(error))
    report.phase("error", describe_at(error))
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and lies_in_cache(path):
      say(f"do you own the cache, and is it writable? if not, {OTHER_CACHE}")
  except Exception as error:
    if os.environ.get("QVM_DEBUG"):
      raise
    say(f"this is a bug in qvm {__version__}: {type(error).__name__}: {error}")
    say("please report it, with the traceback that QVM_DEBUG=1 shows")
  return code


def main(words: Optional[Sequence[str]] = None) -> NoReturn:
  """Run qvm with these words, or those of the command line, and end the process.

  Nothing is buffered. Python would take 8 ms to put away what ends anyway, and 3.12 and 3.13 can
  crash while a thread waits for data, such as one of a download that a signal has ended.
  """
  try:
    code = outcome(words)
    signals.finish()
  except Interrupted as stop:  # also while an error is being printed
    code = 128 + stop.signum
  os._exit(code)


if __name__ == "__main__":
  main()
