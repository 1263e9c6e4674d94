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
from typing import (
  IO,
  Any,
  Callable,
  Dict,
  Iterable,
  Iterator,
  List,
  NamedTuple,
  Optional,
  Sequence,
  Set,
  Tuple,
  TypeVar,
)

__version__ = "0.1.0"

# ---- Errors, messages and signals ---------------------------------------------------------------

EXIT_FAILED = 1
EXIT_USAGE = 2


class QvmError(Exception):
  """A failure that the user is told of: what failed, by name, and what to do about it."""

  code = EXIT_FAILED

  def __init__(self, message: str, hint: str = "") -> None:
    super().__init__(message)
    self.hint = hint


class UsageError(QvmError):
  """The command line or the environment asks for something that there is not."""

  code = EXIT_USAGE


class Interrupted(BaseException):
  """A signal asks qvm to end; clean-up runs while this passes through."""

  def __init__(self, signum: int) -> None:
    super().__init__(signum)
    self.signum = signum


def printable(text: str) -> str:
  """The text without the control characters that a server or a file name could hold."""
  return "".join(c if c.isprintable() else "?" for c in text)


class Reporter:
  """Lines on stderr: one per event, whole even when several threads and processes write them."""

  def __init__(self) -> None:
    self.progress = False
    self.lock = threading.Lock()
    self.drawn = False

  def say(self, text: str) -> None:
    """Write one `qvm: …` line; a closed stderr is no reason to fail."""
    with self.lock:
      self._write(f"qvm: {printable(text)}\n")
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
    with contextlib.suppress(OSError):
      os.write(2, (clear + text).encode("utf-8", "replace"))


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
  sys.stdout.flush()
  sys.stdout.buffer.write(os.fsencode(text) + b"\n")
  sys.stdout.buffer.flush()


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


class Guest(NamedTuple):
  """One OS on one CPU: its command line and what qvm must know of the image."""

  os: str
  arch: str  # as in the images' names: x86-64 or arm64
  title: str
  user: str  # who may log in over ssh
  console: bool  # whether the guest writes to its serial port
  table: str


GUESTS = (
  Guest("freebsd", "x86-64", "FreeBSD", "runner", True, FREEBSD_X86_64),
  Guest("freebsd", "arm64", "FreeBSD", "runner", True, FREEBSD_ARM64),
  Guest("openbsd", "x86-64", "OpenBSD", "runner", True, OPENBSD_X86_64),
  Guest("openbsd", "arm64", "OpenBSD", "runner", True, OPENBSD_ARM64),
  Guest("netbsd", "x86-64", "NetBSD", "runner", True, NETBSD_X86_64),
  Guest("netbsd", "arm64", "NetBSD", "runner", True, NETBSD_ARM64),
  Guest("haiku", "x86-64", "Haiku", "user", False, HAIKU_X86_64),
  Guest("omnios", "x86-64", "OmniOS", "runner", True, OMNIOS_X86_64),
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
SSH_PORT = 2847
VERSION = r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,49}\Z"


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
  dry_run: bool = False
  name: str = ""
  memory: str = "6G"
  cpus: str = "2"
  ssh: Address = Address()
  accel: str = "hvf:kvm:tcg"
  qemu: str = ""
  qemu_args: Tuple[str, ...] = ()
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
  if not re.match(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}\Z", text):
    raise UsageError(
      f"bad instance name '{text}'; allowed are up to 100 letters, digits and . _ + ~ -, "
      "a letter or digit first"
    )
  return text


def parse_version(text: str) -> str:
  """A version, which becomes part of file names and URLs."""
  if not re.match(VERSION, text):
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


def parse_program(text: str) -> str:
  """A program by its path or by its name on PATH, as an absolute path."""
  import shutil

  path = shutil.which(text)
  if not path:
    raise UsageError(f"--qemu: there is no program '{text}' that can be executed")
  return os.path.abspath(path)


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
    "OS [VERSION]", 1, 2,
    ("platform", "rm", "dry_run", "name", "memory", "cpus", "ssh", "accel", "qemu", "qemu_args",
     "progress"),
    "Boot a guest in this terminal, downloading first what is missing.",
    (
      "qvm run freebsd 15.1",
      "qvm run --rm --platform arm64 openbsd 7.9",
      "qvm run --name build -m 2G --cpus 4 --ssh-port 2222 omnios r151058",
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
  "rm": Command(
    "NAME...", 1, 1000, (),
    "Remove instances that do not run, with everything their guests wrote.",
    ("qvm rm freebsd-15.1-x86-64", "qvm rm build test"),
  ),
  "clean": Command(
    "", 0, 0, ("all", "dry_run"),
    "Delete what interrupted runs left; never an instance.",
    ("qvm clean", "qvm clean --all --dry-run"),
  ),
  "config": Command(
    "print-path", 1, 1, (),
    "Print the folder in which qvm keeps everything.",
    ("qvm config print-path", 'du -sh "$(qvm config print-path)"'),
  ),
}  # fmt: skip


def known_options(command: str) -> List[Option]:
  """The options that a command knows; without a command those that stand alone."""
  fields = EVERYWHERE + (COMMANDS[command].fields if command else ())
  return [option for option in OPTIONS if option.field in fields]


def parse_command_line(words: Sequence[str]) -> Options:
  """Read the arguments, options and operands in any order; UsageError for what is not allowed."""
  operands, given = split_words(words)
  fields = {option.field for option, _ in given}
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
  values: Dict[str, Any] = {}
  for option, text in given:
    value = option.read(text) if option.metavar else True
    values[option.field] = values.get(option.field, ()) + (value,) if option.many else value
  return Options(command, tuple(operands[1:]), **values)


def split_words(words: Sequence[str]) -> Tuple[List[str], List[Tuple[Option, str]]]:
  """Part the operands from the options with their values; what follows `--` is no option."""
  operands: List[str] = []
  given: List[Tuple[Option, str]] = []
  rest = list(words)
  while rest:
    word = rest.pop(0)
    if word == "--":
      return operands + rest, given
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
  return operands, given


def unknown_option(flag: str, command: str) -> UsageError:
  """The error for an option that the command does not know, with those that it knows."""
  import difflib

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
  if command == "rm":
    for name in operands:
      parse_name(name)
  if command == "config" and operands[0] != "print-path":
    raise UsageError(f"config knows only print-path, not '{operands[0]}'")


def find_os(text: str) -> str:
  """The name of an OS, in any case."""
  if text.lower() not in OS_NAMES:
    raise UsageError("no such OS: '{}'; there are {}".format(text, ", ".join(OS_NAMES)))
  return text.lower()


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


def own_qemu_img(own_qemu: str) -> str:
  """The qemu-img beside the user's own QEMU, else the one on PATH."""
  import shutil

  found = shutil.which("qemu-img", path=os.path.dirname(own_qemu)) or shutil.which("qemu-img")
  if not found:
    raise QvmError(
      f"there is no qemu-img beside {own_qemu} or on PATH",
      "install it (Debian: apt-get install qemu-utils) or leave --qemu out",
    )
  return os.path.abspath(found)


def make_plan(
  options: Options, host: Host, guest: Guest, version: str, cache: str, suffix: str
) -> Plan:
  """Name everything that a run needs; suffix makes the name of a --rm overlay its own."""
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
    qemu=options.qemu or os.path.join(tree, "bin", "qemu-system-" + cpu),
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


def cache_folder(environ: Dict[str, str]) -> str:
  """The folder qvm keeps everything in; a relative XDG_CACHE_HOME is ignored, as its spec says."""
  if environ.get("QVM_CACHE_DIR"):
    return os.path.abspath(environ["QVM_CACHE_DIR"])
  xdg = environ.get("XDG_CACHE_HOME", "")
  home = xdg if os.path.isabs(xdg) else os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(home, "qvm")


# ---- Files and programs -------------------------------------------------------------------------

CHUNK = 1 << 18  # bytes that are read or written at a time
PATIENCE = 10.0  # seconds that QEMU has to end after SIGTERM


def read_json(path: str) -> Dict[str, Any]:
  """The object in a JSON file; empty when there is none, or no sound one."""
  import json

  try:
    with open(path, "rb") as file:
      value = json.loads(file.read(1 << 20).decode("utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def write_text(path: str, text: str) -> None:
  """Write a file so that it is there whole or not at all."""
  with open(path + ".tmp", "w", encoding="utf-8") as file:
    file.write(text)
  os.replace(path + ".tmp", path)


def write_json(path: str, value: Dict[str, Any]) -> None:
  """Write a JSON file."""
  import json

  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def file_sha256(path: str) -> str:
  """The SHA-256 of a file, in hexadecimal."""
  digest = new_sha256()
  with open(path, "rb") as file:
    for chunk in iter(lambda: file.read(CHUNK), b""):
      digest.update(chunk)
  return str(digest.hexdigest())


def new_sha256() -> Any:
  """A fresh SHA-256."""
  import hashlib

  return hashlib.sha256()


def names_in(cache: str, folder: str) -> List[str]:
  """The names in one of the cache's folders, sorted; none when it is not there."""
  try:
    return sorted(os.listdir(os.path.join(cache, folder)))
  except FileNotFoundError:
    return []


def paths_in(cache: str, folder: str) -> List[str]:
  """The paths in one of the cache's folders."""
  return [os.path.join(cache, folder, name) for name in names_in(cache, folder)]


def tree_size(path: str) -> int:
  """The bytes that a file, or a folder with all in it, takes on the disk."""
  walk = [] if os.path.islink(path) else os.walk(path)
  inside = [os.path.join(folder, name) for folder, _, names in walk for name in names]
  return sum(os.lstat(p).st_blocks * 512 for p in [path, *inside])


def remove_file(path: str) -> None:
  """Remove a file if it is there."""
  with contextlib.suppress(FileNotFoundError):
    os.unlink(path)


def remove_tree(path: str) -> None:
  """Remove a folder if it is there, read-only parts included."""
  import shutil

  if os.path.islink(path) or os.path.isfile(path):
    return os.unlink(path)
  if os.path.isdir(path):
    shutil.rmtree(path)


def start(command: Sequence[str], keep: Sequence[int] = (), **streams: Any) -> Any:
  """Start a program; the only function that does. QvmError explains why it cannot run."""
  import subprocess

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


def run_program(command: Sequence[str]) -> None:
  """Run a helper such as qemu-img to its end; QvmError with its words when it fails."""
  import subprocess

  with signals.hold():
    process = start(
      command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = process.communicate()[0].decode("utf-8", "replace").strip()
  if process.returncode:
    raise QvmError(
      "{} failed ({}): {}".format(command[0], ending(process.returncode), " ".join(output.split()))
    )


def ending(code: int) -> str:
  """How a process ended, in words."""
  return f"signal {-code}" if code < 0 else f"exit code {code}"


def end_process(process: Any) -> None:
  """Make sure that a process has ended."""
  import subprocess

  if process.poll() is None:
    process.terminate()
    try:
      process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


# ---- Fetch --------------------------------------------------------------------------------------

ATTEMPTS = 5
LONGEST_WAIT = 60.0  # seconds that a Retry-After may ask for
HEADWAY = 1 << 20  # bytes after which an attempt counts as progress and the attempts start anew
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


def net_from(environ: Dict[str, str]) -> Net:
  """Read the addresses and times from the environment; UsageError for bad ones."""
  releases = environ.get("QVM_RELEASES_URL") or RELEASES_URL
  api = environ.get("QVM_API_URL") or (API_URL if releases == RELEASES_URL else "")
  for name, url in (("QVM_RELEASES_URL", releases), ("QVM_API_URL", api)):
    if url and not re.match(r"(https?://[^/\s]+|file:///)[!-~]*\Z", url):
      raise UsageError(f"{name}: '{url}' is not an http://, https:// or file:/// address")
  token = (environ.get("GITHUB_TOKEN") or environ.get("GH_TOKEN") or "").strip()
  if not re.match(r"[!-~]*\Z", token):
    raise UsageError("GITHUB_TOKEN or GH_TOKEN: the token has characters that no token has")
  return Net(
    releases.rstrip("/"),
    api.rstrip("/"),
    token,
    seconds_from(environ, "QVM_TIMEOUT", 30.0),
    seconds_from(environ, "QVM_RETRY_DELAY", 1.0),
    ATTEMPTS,
    threading.Event(),
  )


def seconds_from(environ: Dict[str, str], name: str, default: float) -> float:
  """A time in seconds from the environment, at most an hour."""
  text = environ.get(name) or str(default)
  if not re.match(r"[0-9]{1,4}(\.[0-9]{1,6})?\Z", text) or float(text) > 3600:
    raise UsageError(f"{name}: '{text}' is not a number of seconds from 0 to 3600")
  return float(text)


def quick(net: Net) -> Net:
  """For requests that there is an answer without: a short time, few attempts."""
  return net._replace(timeout=min(net.timeout, 10.0), attempts=2)


def short(url: str) -> str:
  """A URL fit for a message: no user, no password, no signed query."""
  return re.sub(r"(//)[^/@]*@", r"\1", url.split("?")[0].split("#")[0])


def redirect_handler(stop: str) -> Any:
  """urllib's redirect handler made careful: it never leaves https, drops what is not to be handed
  on, and does not fetch an address that contains stop, but returns the redirect itself."""
  import urllib.parse
  import urllib.request

  class Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 10
    max_repeats = 3
    inf_msg = "redirect loop: "

    def redirect_request(
      self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
      if stop and stop in newurl:
        return None
      fp.close()  # or else urllib reads the whole body, however long
      old, new = (urllib.parse.urlsplit(url).scheme.lower() for url in (req.full_url, newurl))
      if new != old and new != "https":
        raise QvmError(
          f"{short(req.full_url)} redirects from {old} to {short(newurl)}, which is not safe"
        )
      return urllib.request.Request(
        newurl,
        headers=req.headers,  # not the unredirected ones, which are for the first host only
        method=req.get_method(),
        origin_req_host=req.origin_req_host,
        unverifiable=True,
      )

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302

  return Redirects()


def open_url(net: Net, url: str, headers: Optional[Dict[str, str]] = None, stop: str = "") -> Any:
  """Ask for a URL and return the open answer; the only function that opens one.

  Raises Transient for what may pass (no connection, 5xx, 429, …), QvmError for what will not.
  With stop, a redirect to an address that contains it is returned instead of followed.
  """
  import urllib.error
  import urllib.request

  request = urllib.request.Request(url, headers=dict(headers or {}))
  request.add_header("User-Agent", "qvm/" + __version__)
  request.add_header("Accept-Encoding", "identity")
  if net.token and net.api and url.startswith(net.api + "/"):
    request.add_unredirected_header("Authorization", "Bearer " + net.token)
  try:
    opener = urllib.request.build_opener(redirect_handler(stop))
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
    raise QvmError(f"{short(url)}: the answer comes as {encoding}, which was not asked for")
  return answer


def http_failure(url: str, error: Any) -> Exception:
  """What an HTTP status that is no success means."""
  code, final = error.code, error.geturl() or url
  if 300 <= code < 400:
    return QvmError(f"{short(url)}: bad redirect: {error.msg}")
  message = f"{short(final)} answers {code} {error.msg}"
  if error.headers.get("x-ratelimit-remaining") == "0":
    return QvmError(f"{message}: the quota of GitHub's API is used up", QUOTA_HINT)
  expired = code == 403 and short(final) != short(url)  # a signed address: ask for a new one
  if code in RETRY_CODES or expired or code == 416:
    return Transient(message, retry_after(error.headers.get("Retry-After")), code)
  return NotFound(message) if code in (404, 410) else QvmError(message)


class NotFound(QvmError):
  """The server says that there is no such thing."""


def retry_after(text: Optional[str]) -> Optional[float]:
  """The seconds that a Retry-After header asks for (a number or an HTTP date), at most 60."""
  if not text:
    return None
  if re.match(r"[0-9]{1,9}\Z", text.strip()):
    return min(float(text), LONGEST_WAIT)
  import email.utils

  try:
    wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
  except (TypeError, ValueError, OverflowError, IndexError):
    return None
  return max(0.0, min(wait, LONGEST_WAIT))


def connection_failure(url: str, error: Exception) -> Exception:
  """What an exception from urllib means, with the fix where one is known."""
  import http.client
  import socket
  import ssl

  reason = getattr(error, "reason", None)
  cause = reason if isinstance(reason, Exception) else error
  if isinstance(cause, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(cause):
    return QvmError(
      f"{short(url)}: its certificate cannot be verified: {cause}",
      "python.org's Python on macOS: run 'Install Certificates.command' once; behind a company's "
      "proxy: set SSL_CERT_FILE to the file with its certificates",
    )
  if url.startswith("file:") and isinstance(cause, OSError):
    return NotFound(f"{short(url)}: {describe(cause)}")
  if isinstance(cause, socket.timeout):
    return Transient(f"{short(url)}: no answer in time")
  if isinstance(cause, (OSError, http.client.HTTPException)):
    return Transient(f"{short(url)}: {describe(cause)}")
  return QvmError(f"{short(url)}: {describe(cause)}")


def describe(error: BaseException) -> str:
  """An exception in words: what the system says, else its text, else its kind."""
  return getattr(error, "strerror", None) or str(error) or type(error).__name__


def proxy_hint(url: str) -> str:
  """Names the proxy that the request goes through, if there is one."""
  import urllib.parse
  import urllib.request

  parts = urllib.parse.urlsplit(url)
  proxy = urllib.request.getproxies().get(parts.scheme)
  if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
    return "is the network up? what has been downloaded is kept, try again"
  return f"the request goes through the proxy {short(proxy)} ({parts.scheme}_proxy)"


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
      if progress() >= reached + HEADWAY:
        left, reached = net.attempts, progress()
      left -= 1
      if not left:
        raise QvmError(
          f"{error} ({net.attempts} attempts)" if net.attempts > 1 else str(error), proxy_hint(url)
        )
      import random

      pause = error.wait
      if pause is None:
        pause = net.retry_delay * 2 ** (net.attempts - 1 - left) * random.uniform(0.75, 1.25)
      say(f"{error}; trying again in {pause:.1f} s")
      if net.cancelled.wait(pause):
        raise Cancelled()


class Transfer:
  """One file on its way to downloads/, where it and what a resume needs survive a kill -9.

  NAME.part holds the bytes so far, NAME.json the URL they come from, the validator (ETag or
  Last-Modified) of the object and its length.
  """

  running: "List[Transfer]" = []  # those that --progress shows

  def __init__(self, net: Net, url: str, name: str, folder: str) -> None:
    self.net, self.url, self.name = net, url, name
    self.part = os.path.join(folder, name + ".part")
    self.note = os.path.join(folder, name + ".json")
    self.validator = ""
    self.total: Optional[int] = None
    self.done = 0
    self.head = b""  # the first bytes, to see what kind of file it is
    self.resumed = 0
    self.announced = False
    self.started = time.monotonic()
    self.hash = new_sha256()
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
    with open(self.part, "rb") as part:
      for chunk in iter(lambda: part.read(CHUNK), b""):
        self.take(chunk)
        if self.net.cancelled.is_set():
          raise Cancelled()
    self.validator, self.total = validator, total
    self.resumed = self.done

  def reset(self) -> None:
    """Forget the bytes there are."""
    self.validator, self.total = "", None
    self.done, self.head, self.hash, self.resumed = 0, b"", new_sha256(), 0
    for path in (self.part, self.note):
      remove_file(path)

  def take(self, chunk: Any) -> None:
    """Count bytes that are in the part file."""
    self.hash.update(chunk)
    self.done += len(chunk)
    if len(self.head) < 512:
      self.head = (self.head + bytes(chunk[:512]))[:512]

  def complete(self) -> bool:
    return self.total is not None and self.done == self.total


def download(net: Net, url: str, name: str, folder: str) -> Transfer:
  """Fetch url to folder/NAME.part, resuming what is there; returns it complete and looked at."""
  transfer = Transfer(net, url, name, folder)
  Transfer.running.append(transfer)
  try:
    if not transfer.complete():
      with_retries(net, url, lambda: fetch_rest(transfer), lambda: transfer.done)
    check_kind(transfer)
  finally:
    Transfer.running.remove(transfer)
  fetched, seconds = transfer.done - transfer.resumed, time.monotonic() - transfer.started
  rate = megabytes(fetched / max(seconds, 0.001))
  say(f"downloaded {name}: {megabytes(fetched)} in {seconds:.1f} s ({rate}/s)")
  return transfer


def fetch_rest(transfer: Transfer) -> None:
  """One attempt: ask for the bytes that are missing and append them."""
  headers = {}
  if transfer.done and transfer.validator:
    headers = {"Range": f"bytes={transfer.done}-", "If-Range": transfer.validator}
  try:
    answer = open_url(transfer.net, transfer.url, headers)
  except Transient as error:
    if error.code == 416:
      transfer.reset()
    raise
  with answer:
    if answer.getcode() == 206:
      check_range(transfer, answer.headers)
    else:
      start_over(transfer, answer.headers)
    announce(transfer)
    with open(transfer.part, "ab") as part:
      copy_body(transfer, answer, part)
  if transfer.total is None:  # a chunked body, which tells its own end
    transfer.total = transfer.done
  if transfer.done != transfer.total:
    done, total = megabytes(transfer.done), megabytes(transfer.total)
    raise Transient(f"{short(transfer.url)}: the connection ended after {done} of {total}")


def announce(transfer: Transfer) -> None:
  """Say once that a download starts or goes on."""
  if transfer.announced:
    return
  transfer.announced = True
  size = megabytes(transfer.total) if transfer.total is not None else "unknown size"
  if transfer.done:
    size = f"going on at {megabytes(transfer.done)} of {size}"
  say(f"downloading {transfer.name} ({size}) from {short(transfer.url)}")


def check_range(transfer: Transfer, headers: Any) -> None:
  """A 206 must bring just the bytes asked for, of the same object; else all starts over."""
  match = re.match(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)\Z", headers.get("Content-Range") or "")
  etag = headers.get("ETag") or ""
  same = not etag or transfer.validator in (etag, headers.get("Last-Modified"))
  if (
    not match
    or [int(match.group(i)) for i in (1, 3)] != [transfer.done, transfer.total]
    or not same
  ):
    transfer.reset()
    raise Transient(f"{short(transfer.url)}: the server sends another part than asked for")


def start_over(transfer: Transfer, headers: Any) -> None:
  """A 200 brings the whole object: note what a resume needs before its first byte is written."""
  if transfer.done:
    say(f"{transfer.name} has changed or cannot be resumed; starting from the beginning")
  transfer.reset()
  length = headers.get("Content-Length") or ""
  chunked = (headers.get("Transfer-Encoding") or "").lower() == "chunked"
  if re.match(r"[0-9]{1,15}\Z", length) and not chunked:
    transfer.total = int(length)
  elif not chunked:
    raise QvmError(f"{short(transfer.url)}: the server does not say how long the file is")
  etag = headers.get("ETag") or ""
  strong = re.match(r'"[^"]*"\Z', etag)
  transfer.validator = etag if strong else (headers.get("Last-Modified") or "")
  write_json(
    transfer.note,
    {"url": transfer.url, "validator": transfer.validator, "total": transfer.total},
  )


def copy_body(transfer: Transfer, answer: Any, part: IO[bytes]) -> None:
  """Append the body to the part file, looking at its first bytes on the way."""
  import http.client
  import socket
  import ssl

  buffer = memoryview(bytearray(CHUNK))
  looked = len(transfer.head) >= 512
  while not transfer.net.cancelled.is_set():
    try:
      size = answer.readinto(buffer)
    except socket.timeout:
      raise Transient(f"{short(transfer.url)}: no more data for {transfer.net.timeout:g} s")
    except (ConnectionError, ssl.SSLError, http.client.HTTPException, ValueError) as error:
      raise Transient(f"{short(transfer.url)}: the connection broke: {describe(error)}")
    except OSError as error:
      raise Transient(f"{short(transfer.url)}: {describe(error)}")
    if not size:
      return
    part.write(buffer[:size])
    transfer.take(buffer[:size])
    if not looked and len(transfer.head) >= 512:
      looked = True
      part.flush()
      check_kind(transfer)
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
      f"{short(transfer.url)} {problem}",
      "does a proxy or a login page of this network stand in between?",
    )


def looks_like_html(head: bytes) -> bool:
  """Whether the first bytes of a file are those of a web page."""
  start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
  return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--"))


def megabytes(count: float) -> str:
  """A number of bytes for people, in units of 1000."""
  for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= size:
      return f"{count / size:.{0 if count >= 100 * size else 1}f} {unit}"
  return f"{count:.0f} B"


def draw_progress() -> None:
  """One line with how far each running download is."""
  texts = []
  for transfer in list(Transfer.running):
    share = f" {100 * transfer.done // transfer.total}%" if transfer.total else ""
    texts.append(f"{transfer.name}{share} {megabytes(transfer.done)}")
  if texts:
    report.draw(" | ".join(texts))


def in_parallel(net: Net, jobs: Sequence[Callable[[], None]]) -> None:
  """Run the jobs at the same time; the first failure is raised and ends the others.

  The threads are daemons, and the main thread only waits: a signal ends qvm at once, and what
  has been downloaded stays for the next run.
  """
  import queue

  results: queue.Queue[Optional[BaseException]] = queue.Queue()

  def work(job: Callable[[], None]) -> None:
    try:
      job()
    except BaseException as error:  # handed to the main thread, which raises it
      results.put(error)
    else:
      results.put(None)

  for job in jobs:
    threading.Thread(target=work, args=(job,), daemon=True).start()
  pause = 0.2 if os.isatty(2) else 5.0
  try:
    for _ in jobs:
      failure = next_result(results, pause)
      if failure:
        raise failure
  except BaseException:
    net.cancelled.set()
    raise


def next_result(results: Any, pause: float) -> Optional[BaseException]:
  """Wait for a job to end, showing the progress meanwhile if that was asked for."""
  import queue

  while True:
    try:
      return results.get(timeout=pause if report.progress else None)  # type: ignore[no-any-return]
    except queue.Empty:
      draw_progress()


# ---- Releases -----------------------------------------------------------------------------------

MOST_DATA = 32 << 20  # bytes of release data: 100 releases of the largest repository are 2 MB
MOST_PAGES = 10
TAG = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}\Z"
DIGEST = r"sha256:[0-9a-f]{64}\Z"


class Release(NamedTuple):
  """One release: its tag, and its assets by name with their SHA-256, empty where unknown."""

  tag: str
  assets: Dict[str, str]


def unquoted(text: str) -> str:
  """Text from a URL, without its percent signs."""
  from urllib.parse import unquote

  return unquote(text)


class Later:
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
    self.thread.join()
    if self.error:
      raise self.error
    return self.value


def fetch_bytes(net: Net, url: str, stop: str = "") -> Tuple[bytes, str]:
  """One attempt at a small answer: its body, and its Location where a redirect was asked for."""
  with open_url(net, url, stop=stop) as answer:
    location = answer.headers.get("Location") or ""
    if stop and stop in location:
      return b"", location
    try:
      body = answer.read(MOST_DATA + 1)
    except Exception as error:
      raise connection_failure(url, error)
  if len(body) > MOST_DATA:
    raise QvmError(f"{short(url)}: the answer is larger than any release data")
  return body, ""


def get(net: Net, url: str) -> str:
  """The text of a page, with retries."""
  return with_retries(net, url, lambda: fetch_bytes(net, url)[0], lambda: 0).decode(
    "utf-8", "replace"
  )


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
  if not re.match(TAG, tag):
    raise QvmError(f"{short(url)} names no newest release", f"does {repo} hold releases?")
  return tag


def asset_url(net: Net, repo: str, tag: str, name: str) -> str:
  """The address of a release's asset."""
  from urllib.parse import quote

  return f"{net.releases}/{repo}/releases/download/{quote(tag)}/{quote(name)}"


def api_release(data: Any) -> Optional[Release]:
  """A release from the API's JSON; None for drafts, prereleases and what is no release."""
  if not isinstance(data, dict) or data.get("draft") or data.get("prerelease"):
    return None
  tag, assets = data.get("tag_name"), data.get("assets")
  if not isinstance(tag, str) or not re.match(TAG, tag) or not isinstance(assets, list):
    return None
  found = {}
  for asset in assets:
    if isinstance(asset, dict) and isinstance(asset.get("name"), str):
      digest = asset.get("digest")
      sound = isinstance(digest, str) and re.match(DIGEST, digest)
      found[asset["name"]] = str(digest)[7:] if sound else ""
  return Release(tag, found)


def api_data(net: Net, path: str) -> Any:
  """One attempt at the API; QvmError says why there is no answer."""
  import json

  url = f"{net.api}/{path}"
  try:
    return json.loads(fetch_bytes(net, url)[0].decode("utf-8"))
  except (ValueError, RecursionError):
    raise QvmError(f"{short(url)}: the answer is no JSON")
  except Transient as error:
    raise QvmError(str(error))


def api_releases(net: Net, repo: str) -> List[Release]:
  """All releases of a repository from the API, the newest first."""
  releases: List[Release] = []
  for page in range(1, MOST_PAGES + 1):
    data = api_data(net, f"{repo}/releases?per_page=100&page={page}")
    if not isinstance(data, list):
      raise QvmError(f"{short(net.api)}/{repo}/releases: the answer is no list of releases")
    releases += [release for release in map(api_release, data) if release]
    if len(data) < 100:
      break
  return releases


def page_release(net: Net, repo: str, tag: str) -> Release:
  """A release from its page fragment, which shows the assets as links and often their digests."""
  from urllib.parse import quote

  text = get(net, f"{net.releases}/{repo}/releases/expanded_assets/{quote(tag)}")
  assets: Dict[str, str] = {}
  pieces = re.split(r'href="[^"]*/releases/download/[^"/]+/([^"/]+)"', text)
  for name, after in zip(pieces[1::2], pieces[2::2]):
    digest = re.search(r"\bsha256:([0-9a-f]{64})\b", after)
    assets[unquoted(name)] = digest.group(1) if digest else assets.get(unquoted(name), "")
  return Release(tag, assets)


def page_releases(net: Net, repo: str) -> List[Release]:
  """The newest releases from the pages, one request for each; a mirror may have just one.

  The feed tells nothing of prereleases: what is newer than the newest release is one.
  """
  newest = newest_tag(net, repo)
  tags = [newest]
  with contextlib.suppress(NotFound):
    feed = get(net, f"{net.releases}/{repo}/releases.atom")
    listed = [unquoted(tag) for tag in re.findall(r'/releases/tag/([^"<>/\s]+)"', feed)]
    listed = [tag for tag in dict.fromkeys(listed) if re.match(TAG, tag)]
    tags = listed[listed.index(newest) :] if newest in listed else [newest, *listed]
  releases = []
  for tag in tags:
    with contextlib.suppress(NotFound):
      releases.append(page_release(net, repo, tag))
  return releases


class Releases:
  """What is known of the releases in this run, each thing asked for once by all threads."""

  def __init__(self, net: Net) -> None:
    self.net = net
    self.lock = threading.Lock()
    self.asked: Dict[Tuple[str, ...], Later] = {}

  def once(self, key: Tuple[str, ...], function: Callable[[], T], wait: bool = True) -> T:
    """The result of the first call with that key; without wait only begin."""
    with self.lock:
      if key not in self.asked:
        self.asked[key] = Later(function)
      later = self.asked[key]
    return later.result() if wait else None  # type: ignore[return-value]

  def tag(self, repo: str) -> str:
    """The tag of the newest release."""
    return self.once((repo,), lambda: newest_tag(self.net, repo))

  def digest(self, repo: str, tag: str, name: str) -> str:
    """The SHA-256 of an asset, empty where no release data tell it."""
    return self.once((repo, tag), lambda: self.one(repo, tag)).assets.get(name, "")

  def one(self, repo: str, tag: str) -> Release:
    """A release's data from the API, else from its page, else empty: no download waits long."""
    net = quick(self.net)
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
        return api_releases(self.net, repo)
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
      if match and re.match(VERSION, match.group(1)):
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


# ---- Cache --------------------------------------------------------------------------------------

MOST_MEMBERS = 20000  # of a QEMU archive, which has some hundred
MOST_BYTES = 1 << 30
BAD_NAME_ERRORS = (
  errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
  errno.ENOTDIR,
)  # fmt: skip


def make_folders(cache: str) -> None:
  """Make the cache and its folders, for this user only."""
  os.makedirs(os.path.dirname(cache), exist_ok=True)
  for name in ("", "base", "bin", "qemu", "instances", "downloads", "ports"):
    with contextlib.suppress(FileExistsError):
      os.mkdir(os.path.join(cache, name), 0o700)


def try_lock(path: str, wait: Callable[[], bool]) -> Optional[int]:
  """A descriptor that holds the lock on a file, or None when another process holds it.

  The lock lasts until the last process that inherited the descriptor has ended. wait is asked
  when the lock is held elsewhere: whether to wait for it. A lock file may be unlinked by its
  holder, so what was locked must still be what the path names.
  """
  import fcntl

  while True:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
      try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if not wait():
          os.close(fd)
          return None
        fcntl.flock(fd, fcntl.LOCK_EX)
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


@contextlib.contextmanager
def artefact_lock(cache: str, name: str) -> Iterator[None]:
  """Hold the right to fetch one artefact, waiting for another qvm that fetches it."""
  path = os.path.join(cache, "downloads", name + ".lock")

  def wait() -> bool:
    say(f"waiting for another qvm that downloads {name}")
    return True

  fd = try_lock(path, wait)
  assert fd is not None  # wait says yes
  try:
    yield
  finally:
    drop_lock(fd, path)


def publish(source: str, target: str, mode: int) -> None:
  """Give a complete and checked file its place, on the disk before its name is."""
  with open(source, "rb") as file:
    os.fsync(file.fileno())
  os.chmod(source, mode)
  os.replace(source, target)


def safe_name(name: str) -> List[str]:
  """The parts of an archive member's name; ValueError when it could lead out of the tree."""
  parts = [part for part in name.split("/") if part not in ("", ".")]
  if name.startswith("/") or "\0" in name or any(len(os.fsencode(p)) > 255 for p in parts):
    raise ValueError("is not a plain path")
  if ".." in parts:
    raise ValueError("leads out of the archive")
  return parts


def check_link(parts: List[str], target: str) -> None:
  """A symbolic link may only climb within the tree, and only at the start of its target."""
  if target.startswith("/") or "\0" in target or len(target) > 1000:
    raise ValueError(f"is a link to {target[:100]}")
  words = [word for word in target.split("/") if word not in ("", ".")]
  climbs = 0
  while climbs < len(words) and words[climbs] == "..":
    climbs += 1
  if climbs >= len(parts) or ".." in words[climbs:]:
    raise ValueError(f"is a link out of the archive, to {target[:100]}")


def check_member(member: Any, files: Set[Tuple[str, ...]]) -> List[str]:
  """The parts of one member's name; ValueError when it is not a plain file, folder or link."""
  parts = safe_name(member.name)
  if member.mode & 0o4000 or (member.mode & 0o2000 and not member.isdir()):
    raise ValueError("has a set-uid or set-gid bit")
  if member.issym():
    check_link(parts, member.linkname)
  elif member.islnk():
    if tuple(safe_name(member.linkname)) not in files:
      raise ValueError("is a link to what is not in the archive")
  elif not member.isreg() and not member.isdir():
    raise ValueError("is a device or another special file")
  if not parts and not member.isdir():
    raise ValueError("has no name")
  return parts


def check_members(archive: Any) -> List[Tuple[Any, List[str]]]:
  """The members of a tar archive with the parts of their names; ValueError for a hostile one."""
  members: List[Tuple[Any, List[str]]] = []
  files: Set[Tuple[str, ...]] = set()
  folders: Set[Tuple[str, ...]] = set()
  size = 0
  for member in archive:
    size += member.size
    if len(members) >= MOST_MEMBERS or size > MOST_BYTES:
      raise ValueError("it holds more than any QEMU")
    try:
      parts = check_member(member, files)
    except ValueError as error:
      raise ValueError(f"its member '{member.name[:100]}' {error}")
    members.append((member, parts))
    if not member.isdir():
      files.add(tuple(parts))
    folders.update(tuple(parts[:n]) for n in range(len(parts) + member.isdir()))
  clash = files & folders  # something would be written through a link or over a file
  if clash:
    raise ValueError("'{}' is both a folder and something else".format("/".join(min(clash))))
  return members


def unpack(path: str, folder: str) -> None:
  """Unpack a tar archive into a new folder; a hostile one is refused before anything is written.

  Everything is written by hand, so that owners, times and modes in the archive do not matter,
  whatever the version of tarfile. Links come last: nothing is ever written through one.
  """
  import shutil
  import tarfile

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
          shutil.copyfileobj(source, file, CHUNK)  # type: ignore[arg-type]
        os.chmod(target, 0o755 if member.mode & 0o100 else 0o644)
    for member, parts in members:
      if member.issym():
        target = os.path.join(folder, *parts)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(member.linkname, target)


def unpack_aside(path: str, folder: str, names: Sequence[str]) -> str:
  """Unpack a downloaded archive into a new folder and return the file that has one of the names.

  It may lie in that folder or, in an archive with one top folder, in that one. An archive that
  is damaged, hostile or without that file is deleted, with an error.
  """
  import tarfile
  import zlib

  remove_tree(folder)
  try:
    unpack(path, folder)
    inside = os.listdir(folder)
    for top in [""] + (inside if len(inside) == 1 else []):
      for name in names:
        found = os.path.join(folder, top, name)
        if os.path.isfile(found):
          return found
    raise ValueError(f"it holds no {names[0]}")
  except (tarfile.TarError, ValueError, EOFError, zlib.error, OverflowError) as error:
    problem = str(error)
  except OSError as error:
    if error.errno not in BAD_NAME_ERRORS:
      remove_tree(folder)
      raise
    problem = describe(error)
  remove_tree(folder)
  remove_file(path)
  raise QvmError("{} is refused: {}".format(os.path.basename(path)[: -len(".part")], problem))


@contextlib.contextmanager
def gate(folder: str) -> Iterator[None]:
  """Let one process at a time look at or take the locks of instances.

  Whether an instance runs is told by trying its lock; without the gate, two that try at once
  would each believe that the other is a running QEMU. The lock is on the folder itself.
  """
  import fcntl

  fd = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
  finally:
    os.close(fd)


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
  if problem:
    raise QvmError(f"the image {path} is refused: {problem}")


def backing_file(path: str) -> str:
  """The name of the backing file that an overlay's header tells; empty when there is none."""
  try:
    with open(path, "rb") as file:
      head = file.read(20)
      file.seek(int.from_bytes(head[8:16], "big"))
      return os.fsdecode(file.read(min(int.from_bytes(head[16:20], "big"), 1023)))
  except (OSError, OverflowError, ValueError):
    return ""


def dependants(cache: str, base: str) -> List[str]:
  """The names of the instances whose overlays lie on a base image."""
  needed = os.path.join("..", "base", os.path.basename(base))
  disks = [path for path in paths_in(cache, "instances") if path.endswith(".qcow2")]
  mine = [path for path in disks if backing_file(path) == needed]
  return [os.path.basename(path)[: -len(".qcow2")] for path in mine]


def check_unused(plan: Plan) -> None:
  """Refuse to replace a base image on which instances depend."""
  names = dependants(plan.cache, plan.base)
  if names:
    raise QvmError(
      f"{plan.base} cannot be refreshed: these instances depend on it: {', '.join(names)}",
      "qvm rm deletes them, with all that their guests wrote",
    )


def fetch_asset(
  releases: Releases, repo: str, tag: str, name: str, folder: str
) -> Tuple[Transfer, Dict[str, Any]]:
  """Download an asset and check its digest where the release data name one.

  Returns it with its record. One that differs is fetched once more from the start.
  """
  url = asset_url(releases.net, repo, tag, name)
  expected = Later(lambda: releases.digest(repo, tag, name))
  for last in (False, True):
    transfer = download(releases.net, url, name, folder)
    digest, wanted = transfer.hash.hexdigest(), expected.result()
    if not wanted:
      say(f"no digest is known for {name}: only its length could be checked")
    if not wanted or digest == wanted:
      break
    transfer.reset()
    problem = f"{short(url)}: what arrives has not the digest that the release names"
    if last:
      raise QvmError(f"{problem} (sha256 {wanted}, not {digest})", "it has been deleted")
    say(f"{problem}; fetching it once more")
  record = {"release": tag, "url": url, "size": transfer.done, "asset_sha256": digest}
  record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
  return transfer, record


def downloads(plan: Plan) -> str:
  """Where unfinished files lie."""
  return os.path.join(plan.cache, "downloads")


def is_there(plan: Plan, releases: Releases, path: str, record: str, name: str) -> bool:
  """Whether a part of resources is cached, with --refresh also whether it is the newest."""
  if not os.path.isfile(path) or not plan.refresh:
    return os.path.isfile(path)
  url = asset_url(releases.net, "resources", releases.tag("resources"), name)
  newest = read_json(record).get("url") == url
  if newest:
    say(f"{name} is the newest")
  return newest


def fetch_resource(releases: Releases, name: str, folder: str) -> Tuple[Transfer, Dict[str, Any]]:
  """Download an asset of the newest release of QEMU."""
  return fetch_asset(releases, "resources", releases.tag("resources"), name, folder)


def tree_program(plan: Plan) -> str:
  """The downloaded QEMU's program, whether or not it is the one that runs."""
  return os.path.join(plan.tree, "bin", "qemu-system-" + QEMU_CPUS[plan.guest.arch])


def fetch_qemu(plan: Plan, releases: Releases) -> None:
  """Download QEMU for the guest's CPU and put its tree in place."""
  record_file = os.path.join(plan.tree, "release.json")
  with artefact_lock(plan.cache, plan.qemu_asset):
    if is_there(plan, releases, tree_program(plan), record_file, plan.qemu_asset):
      return
    transfer, record = fetch_resource(releases, plan.qemu_asset, downloads(plan))
    aside = plan.tree + ".tmp"
    program = unpack_aside(transfer.part, aside, ("bin/qemu",))
    root = os.path.dirname(os.path.dirname(program))
    if not os.path.isdir(os.path.join(root, "share", "qemu")):
      remove_tree(aside)
      raise QvmError(f"{plan.qemu_asset} is refused: it holds no share/qemu")
    os.chmod(program, 0o755)
    record["sha256"] = file_sha256(program)
    os.rename(program, os.path.join(root, "bin", os.path.basename(tree_program(plan))))
    write_json(os.path.join(root, "release.json"), record)
    put_tree(root, plan.tree)
    remove_tree(aside)
    transfer.reset()


def put_tree(root: str, link: str) -> None:
  """Make link, a symbolic link, lead to a new tree, so that it is replaced in one step.

  The tree before stays until the next one comes, for a QEMU that is just starting from it.
  """
  folder, name = os.path.split(link)
  before = os.readlink(link) if os.path.islink(link) else ""
  now = f".{name}-{os.urandom(4).hex()}"
  os.rename(root, os.path.join(folder, now))
  remove_file(link + ".new")
  os.symlink(now, link + ".new")
  if not os.path.islink(link):
    remove_tree(link)  # from a copy of the cache that followed links
  os.replace(link + ".new", link)
  for entry in os.listdir(folder):
    if entry.startswith(f".{name}-") and entry not in (now, before):
      remove_tree(os.path.join(folder, entry))


def fetch_qemu_img(plan: Plan, releases: Releases) -> None:
  """Download qemu-img."""
  record_file = plan.qemu_img + ".json"
  with artefact_lock(plan.cache, plan.tools_asset):
    if is_there(plan, releases, plan.qemu_img, record_file, plan.tools_asset):
      return
    transfer, record = fetch_resource(releases, plan.tools_asset, downloads(plan))
    aside = os.path.join(plan.cache, "bin", "resources.tmp")
    program = unpack_aside(transfer.part, aside, ("qemu-img", "bin/qemu-img"))
    record["sha256"] = file_sha256(program)
    write_json(record_file, record)
    publish(program, plan.qemu_img, 0o755)
    remove_tree(aside)
    transfer.reset()


# -- Images, as qcow2 or as bundles --


UNZSTD = (("zstd", "-dcq"), ("unzstd", "-cq"), ("zstdcat", "-q"),
          ("bsdtar", "-cf", "-", "--format=pax", "@-"))  # fmt: skip
MOST_DISK = 1 << 40  # bytes of a bundle's disk, holes included
ZSTD_HINT = "install zstd (Debian: apt-get install zstd, macOS: brew install zstd)"


def cached_images(cache: str, os_name: str) -> List[Image]:
  """The base images of an OS that are cached, the newest version first."""
  return images_in(os_name, [Release("", dict.fromkeys(names_in(cache, "base"), ""))])


def unzstd_command() -> List[str]:
  """A program that unpacks zstd from stdin to stdout; empty where there is none."""
  import shutil

  for name, *words in UNZSTD:
    path = shutil.which(name)
    if path:
      return [path, *words]
  return []


def can_unzstd() -> bool:
  """Whether bundles can be unpacked here: Python has zstd from 3.14 on."""
  import importlib.util

  with contextlib.suppress(ImportError):
    if importlib.util.find_spec("compression.zstd"):
      return True
  return bool(unzstd_command())


@contextlib.contextmanager
def unzstd(path: str) -> Iterator[Any]:
  """The unpacked bytes of a zstd file, as a stream; ValueError when the file is damaged."""
  try:
    from compression import zstd  # type: ignore[import-not-found,unused-ignore]
  except ImportError:
    zstd = None
  if zstd:
    try:
      with zstd.open(path) as stream:
        yield stream
    except zstd.ZstdError as error:
      raise ValueError(str(error))
    return
  import subprocess

  with open(path, "rb") as packed:
    process = start(
      unzstd_command(), stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
  try:
    yield process.stdout
    while process.stdout.read(CHUNK):  # so that the program sees and checks the end
      pass
    if process.wait():
      raise ValueError(f"it is damaged, says {unzstd_command()[0]}")
  finally:
    process.stdout.close()
    end_process(process)


def unpack_bundle(stream: Any, folder: str) -> None:
  """Unpack disk.img and kernel, and nothing else, from a tar stream into a new folder."""
  import tarfile

  os.mkdir(folder)
  with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as archive:
    for member in archive:
      name = "/".join(safe_name(member.name))
      if not name and member.isdir():
        continue
      path = os.path.join(folder, name)
      if name not in ("disk.img", "kernel") or not member.isreg() or os.path.lexists(path):
        raise ValueError(f"its member '{member.name[:100]}' is not expected")
      if member.size > MOST_DISK:
        raise ValueError("its disk is larger than any")
      write_sparse(archive, member, path)
  if not os.path.isfile(os.path.join(folder, "disk.img")):
    raise ValueError("it holds no disk.img")


def write_sparse(archive: Any, member: Any, path: str) -> None:
  """Write a member so that its holes, and what is zero throughout, take no space on the disk.

  A sparse member's pieces lie one behind the other in the stream, which is at the first.
  """
  zeros = bytes(CHUNK)
  pieces = member.sparse if member.issparse() else [(0, member.size)]
  with open(path, "wb") as file:
    for offset, size in pieces:
      while size > 0:
        chunk = archive.fileobj.read(min(size, CHUNK))
        if not chunk:
          raise ValueError("it is cut short")
        if chunk != zeros[: len(chunk)]:
          file.seek(offset)
          file.write(chunk)
        offset, size = offset + len(chunk), size - len(chunk)
    file.truncate(member.size)


def convert_bundle(plan: Plan, part: str) -> str:
  """Unpack a downloaded bundle and make a qcow2 of its disk; returns the qcow2's path.

  A kernel is put beside the base image, unused for now.
  """
  import tarfile

  aside = os.path.join(downloads(plan), plan.image_asset + ".tmp")
  remove_tree(aside)
  say(f"unpacking {os.path.basename(part)[: -len('.part')]}")
  try:
    with unzstd(part) as stream:
      unpack_bundle(stream, aside)
  except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
    remove_tree(aside)
    raise QvmError(f"{os.path.basename(part)[: -len('.part')]} is refused: {error}")
  except BaseException:
    remove_tree(aside)
    raise
  disk, result = os.path.join(aside, "disk.img"), os.path.join(aside, "disk.qcow2")
  run_program([plan.qemu_img, "convert", "-f", "raw", "-O", "qcow2", disk, result])
  os.unlink(disk)
  kernel = os.path.join(aside, "kernel")
  if os.path.exists(kernel):
    publish(kernel, kernel_path(plan.base), 0o444)
  return result


def kernel_path(base: str) -> str:
  """Where the kernel of a bundle is kept."""
  return base[: -len(".qcow2")] + ".kernel"


def candidates(plan: Plan, releases: Releases) -> Iterator[Tuple[str, str]]:
  """Releases and assets that may be the image, the best first, found out only as needed."""
  repo, qcow2 = plan.guest.os + "-builder", plan.image_asset
  bundle, unpackable = plan.bundle_asset, can_unzstd()
  newest = releases.tag(repo)
  yield newest, qcow2
  if unpackable:
    yield newest, bundle
  for release in releases.all(repo):
    if qcow2 in release.assets and release.tag != newest:
      yield release.tag, qcow2
    elif bundle in release.assets and not unpackable:
      say(f"{release.tag} has {bundle}, which takes zstd to unpack; looking for an older qcow2")
    elif bundle in release.assets and release.tag != newest:
      yield release.tag, bundle


def fetch_image(plan: Plan, releases: Releases, tools: Callable[[], None]) -> None:
  """Make the base image from the newest release that has it; tools waits for qemu-img."""
  repo = plan.guest.os + "-builder"
  with artefact_lock(plan.cache, plan.image_asset):
    there = os.path.isfile(plan.base)
    if there and not plan.refresh:
      return
    for tag, name in candidates(plan, releases):
      url = asset_url(releases.net, repo, tag, name)
      if there and read_json(record_path(plan.base)).get("url") == url:
        say(f"{name} of {tag} is the newest")
        return
      if there:
        if not asset_exists(releases.net, url):
          continue
        check_unused(plan)  # before the download; put_image looks again
      try:
        transfer, record = fetch_asset(releases, repo, tag, name, downloads(plan))
      except NotFound:
        continue
      if tag != releases.tag(repo):
        say(f"{name} comes from {tag}; the newest release, {releases.tag(repo)}, has none")
      put_image(plan, transfer, record, tools)
      return
    raise no_such_image(plan, releases)


def asset_exists(net: Net, url: str) -> bool:
  """Whether a URL can be fetched, asked by fetching its first byte."""
  try:
    with_retries(net, url, lambda: open_url(net, url, {"Range": "bytes=0-0"}).close(), lambda: 0)
  except NotFound:
    return False
  return True


def put_image(
  plan: Plan, transfer: Transfer, record: Dict[str, Any], tools: Callable[[], None]
) -> None:
  """Check a downloaded image, converted if it is a bundle, and make it the base image."""
  source = transfer.part
  try:
    if transfer.name == plan.bundle_asset:
      tools()
      source = convert_bundle(plan, transfer.part)
    check_image(source)
  except QvmError:
    transfer.reset()
    raise
  same = source == transfer.part
  record["sha256"] = record["asset_sha256"] if same else file_sha256(source)
  with gate(os.path.join(plan.cache, "instances")):
    if os.path.exists(plan.base):
      check_unused(plan)
    write_json(record_path(plan.base), record)
    publish(source, plan.base, 0o444)
  transfer.reset()
  remove_tree(os.path.join(downloads(plan), plan.image_asset + ".tmp"))


def no_such_image(plan: Plan, releases: Releases) -> QvmError:
  """The error for a version that no release has, with what there is instead."""
  import difflib

  guest = plan.guest
  images = images_in(guest.os, releases.all(guest.os + "-builder"))
  versions = [image.version for image in images if image.arch == guest.arch]
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


def record_path(base: str) -> str:
  """Where a base image's release, URL, size and digests are noted."""
  return base[: -len(".qcow2")] + ".json"


def fetch_missing(plan: Plan, net: Net) -> None:
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
  if plan.refresh or not os.path.isfile(plan.base):
    jobs.append(lambda: fetch_image(plan, releases, tools))
  if jobs:
    in_parallel(net, jobs)


# ---- Instances ----------------------------------------------------------------------------------


class Instance(NamedTuple):
  """What NAME.json says of an instance; ssh is where it listens while it runs."""

  name: str
  os: str
  version: str
  arch: str
  base_sha256: str = ""
  ssh: str = ""


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
  def mark(self) -> str:
    """An empty file that says: throw the instance away once it does not run."""
    return self.path(".ephemeral")


def instance_files(cache: str, name: str) -> Files:
  """The files of the instance of that name."""
  return Files(os.path.join(cache, "instances"), name)


def take_instance(files: Files) -> int:
  """Take an instance's lock; QvmError names the process that has it."""
  with gate(files.folder):
    fd = try_lock(files.lock, lambda: False)
    if fd is None:
      raise QvmError(
        f"the instance {files.name} is running already ({holder(files)})",
        "use another --name, or --rm, for a second machine",
      )
    note_holder(fd, "qvm", os.getpid())
    return fd


def note_holder(fd: int, program: str, pid: int) -> None:
  """Write into a lock file who holds it, for people; the lock itself decides."""
  os.ftruncate(fd, 0)
  os.pwrite(fd, f"{program} process {pid}\n".encode(), 0)


def holder(files: Files) -> str:
  """Who holds an instance's lock, as noted in it."""
  try:
    with open(files.lock, "rb") as file:
      return printable(file.read(100).decode("ascii", "replace").strip()) or "unknown process"
  except OSError:
    return "unknown process"


def is_locked(path: str) -> bool:
  """Whether a process holds the lock on a file; for an instance's lock within the gate only."""
  import fcntl

  try:
    fd = os.open(path, os.O_RDONLY)
  except FileNotFoundError:
    return False
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return False
  except BlockingIOError:
    return True
  finally:
    os.close(fd)


def read_instance(files: Files) -> Instance:
  """The record of an instance; QvmError when it is gone or damaged."""
  value = read_json(files.record)
  texts = {key: value.get(key, "") for key in Instance._fields}
  if not all(isinstance(text, str) for text in texts.values()) or texts["name"] != files.name:
    raise QvmError(
      f"the record of the instance {files.name} is missing or damaged: {files.record}",
      f"its disk is untouched; `qvm rm {files.name}` would delete it",
    )
  return Instance(**texts)


def remove_instance(files: Files) -> None:
  """Delete the files of an instance whose lock the caller holds; the --rm mark goes last."""
  with signals.hold():
    for suffix in (".qcow2", ".qcow2.tmp", ".json", ".json.tmp", ".console.log", ".ephemeral"):
      remove_file(files.path(suffix))


def sweep(cache: str) -> None:
  """Delete the --rm overlays whose qvm and QEMU were killed."""
  folder = os.path.join(cache, "instances")
  if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
    return
  for entry in os.listdir(folder):
    if not entry.endswith(".ephemeral"):
      continue
    files = Files(folder, entry[: -len(".ephemeral")])
    with gate(folder):
      fd = try_lock(files.lock, lambda: False)
    if fd is not None:
      if os.path.exists(files.mark):
        remove_instance(files)
      drop_lock(fd, files.lock)


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
  if not os.path.isfile(plan.base):
    raise QvmError(
      f"the instance {files.name} needs its base image {plan.base}, which is gone",
      f"put the file back; or give up what the guest wrote: qvm rm {files.name}",
    )
  digest = read_json(record_path(plan.base)).get("sha256")
  if mine.base_sha256 and digest and mine.base_sha256 != digest:
    raise QvmError(
      f"the instance {files.name} was made on another base image than {plan.base} now is",
      f"put the old file (sha256 {mine.base_sha256}) back; "
      f"or give up what the guest wrote: qvm rm {files.name}",
    )


def record_instance(plan: Plan, files: Files, ssh: str) -> None:
  """Note what the instance is and where it listens in this run."""
  if os.path.exists(files.disk):
    digest = read_instance(files).base_sha256
  else:
    digest = str(read_json(record_path(plan.base)).get("sha256") or "")
  guest = plan.guest
  instance = Instance(files.name, guest.os, plan.version, guest.arch, digest, ssh)
  write_json(files.record, dict(instance._asdict()))


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


def list_instances(cache: str) -> List[Row]:
  """All instances that have a disk, by name."""
  folder = os.path.join(cache, "instances")
  if not os.path.isdir(folder):
    return []
  rows = []
  with gate(folder):
    for entry in sorted(os.listdir(folder)):
      if not entry.endswith(".qcow2"):
        continue
      files = Files(folder, entry[: -len(".qcow2")])
      running = is_locked(files.lock)
      try:
        it = read_instance(files)
      except QvmError:
        it = Instance(files.name, "?", "?", "?")
      ssh = it.ssh if running else ""
      state = "running" if running else "stopped"
      size, ephemeral = tree_size(files.disk), os.path.exists(files.mark)
      rows.append(Row(files.name, it.os, it.version, it.arch, state, ssh, size, ephemeral))
  return rows


# ---- QEMU command -------------------------------------------------------------------------------

CPU_MASK = "amx-tile=off,amx-int8=off,amx-bf16=off,la57=off"


class Facts(NamedTuple):
  """What was found out before the start and decides on adjustments."""

  address: Address
  linaro: bool  # the unpacked QEMU has a real linaro_uefi.fd
  mask_cpu: bool  # KVM would show the guest CPU features that crash it


class Adjustment(NamedTuple):
  """One value of a table's option that is replaced by another."""

  option: str
  old: str
  new: str


def adjustments(options: Options, guest: Guest, facts: Facts) -> List[Adjustment]:
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


def qemu_command(plan: Plan, options: Options, facts: Facts) -> List[str]:
  """The command line that runs the guest.

  In QEMU's option strings a comma within a value is written twice; -bios takes a plain path.
  """
  rows = adjusted(table_rows(plan.guest.table), adjustments(options, plan.guest, facts))
  words = [plan.qemu]
  plain = {"SHARE": plan.share, "DISK": plan.disk}
  doubled = {key: path.replace(",", ",,") for key, path in plain.items()}
  for row in rows[1:]:
    words += [fill(word, plain if row[0] == "-bios" else doubled) for word in row]
  return words + list(options.qemu_args)


def fill(word: str, paths: Dict[str, str]) -> str:
  """A word of a table with the paths in place of SHARE and DISK."""
  return re.sub(r"\b(SHARE|DISK)\b", lambda match: paths[match.group()], word)


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
    with open(cpuinfo) as file:
      flags = next((line.split() for line in file if line.startswith("flags")), [])
  except OSError:
    return False
  return ("amx_tile" in flags or "la57" in flags) and os.access(kvm, os.R_OK | os.W_OK)


# ---- Console and processes ----------------------------------------------------------------------


@contextlib.contextmanager
def terminal_kept() -> Iterator[None]:
  """Give the terminal back as it was, also after a QEMU that was killed and left it raw."""
  import fcntl
  import termios

  before, flags = None, 0
  with contextlib.suppress(termios.error, OSError):
    if os.tcgetpgrp(0) == os.getpgrp():  # in the background it is not ours to change
      before, flags = termios.tcgetattr(0), fcntl.fcntl(0, fcntl.F_GETFL)
  try:
    yield
  finally:
    if before:
      with contextlib.suppress(termios.error, OSError):
        fcntl.fcntl(0, fcntl.F_SETFL, flags)
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def make_overlay(plan: Plan) -> None:
  """Make the instance's disk, an overlay on the base image, unless it is there."""
  if os.path.lexists(plan.disk):
    return
  backing = os.path.relpath(plan.base, os.path.dirname(plan.disk))
  aside = plan.disk + ".tmp"
  remove_file(aside)
  run_program([plan.qemu_img, "create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", aside])
  os.replace(aside, plan.disk)


def port_is_free(address: Address) -> bool:
  """Whether QEMU could listen there now."""
  import socket

  with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU's user network does
    try:
      probe.bind((address.host, address.port))
    except OSError as error:
      if error.errno == errno.EADDRNOTAVAIL:
        raise QvmError(f"{address.host} is not an address of this machine (--ssh-port)")
      if error.errno == errno.EACCES:
        raise QvmError(f"port {address.port} needs root; choose one above 1023")
      return False
  return True


def reserve_port(cache: str, wanted: Address, stack: contextlib.ExitStack) -> Tuple[Address, int]:
  """A free port, with the descriptor of a lock that keeps other qvms away from it."""
  for port in range(wanted.port, wanted.port + 1 if wanted.chosen else 65536):
    address = wanted._replace(port=port)
    path = os.path.join(cache, "ports", f"{port}.lock")
    fd = try_lock(path, lambda: False)
    if fd is None:
      continue
    if port_is_free(address):
      stack.callback(drop_lock, fd, path)
      return address, fd
    drop_lock(fd, path)
  raise QvmError(
    f"port {wanted.port} of {wanted.host} is taken (--ssh-port)",
    "choose another, or leave --ssh-port out to get a free one",
  )


# ---- Commands -----------------------------------------------------------------------------------


def this_host() -> Host:
  """The host qvm runs on."""
  uname = os.uname()
  return host_of(uname.sysname, uname.machine)


def plan_from(options: Options, net: Net) -> Plan:
  """The plan for this command on this host with this environment."""
  cache, host = cache_folder(dict(os.environ)), this_host()
  guest = find_guest(options.operands[0].lower(), options.platform or host.arch)
  version = "".join(options.operands[1:])
  if version.lower() in ("", "latest"):
    version = latest_version(options, net, guest, cache)
  return make_plan(options, host, guest, version, cache, os.urandom(3).hex())


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
    releases = Releases(quick(net) if fallback else net).all(guest.os + "-builder")
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


def facts_for(plan: Plan, options: Options, address: Address) -> Facts:
  """Look at what decides on adjustments."""
  mask = "kvm" in options.accel.split(":") and needs_cpu_mask("/proc/cpuinfo", "/dev/kvm")
  return Facts(address, has_linaro(plan.share), mask)


def cmd_run(options: Options) -> int:
  """Boot a guest in this terminal."""
  net = net_from(dict(os.environ))
  plan = plan_from(options, net)
  if options.dry_run:
    import shlex

    command = qemu_command(plan, options, facts_for(plan, options, options.ssh))
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
    chosen = options.ssh.chosen and reserve_port(plan.cache, options.ssh, stack)
    stack.enter_context(terminal_kept())
    process = None
    while not process:
      fetch_missing(plan, net)
      address, port_lock = chosen or reserve_port(plan.cache, options.ssh, stack)
      process = boot(plan, options, address, (lock, port_lock), stack)
    welcome(plan, address)
    process.wait()
  return int(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def boot(
  plan: Plan,
  options: Options,
  address: Address,
  locks: Tuple[int, int],
  stack: contextlib.ExitStack,
) -> Any:
  """Make the overlay and start QEMU, which the stack ends; None when `clean` was faster.

  QEMU inherits the locks, so that they last as long as it does, whatever becomes of qvm.
  """
  files = instance_files(plan.cache, plan.name)
  with gate(files.folder):
    if not all(os.path.isfile(path) for path in (plan.base, plan.qemu, plan.qemu_img)):
      return None
    check_image(plan.base)
    check_instance(plan, files)
    record_instance(plan, files, f"{address.host}:{address.port}")
    make_overlay(plan)
    with signals.hold():
      process = start(qemu_command(plan, options, facts_for(plan, options, address)), locks)
      stack.callback(end_process, process)
      note_holder(locks[0], "QEMU", process.pid)
  return process


def welcome(plan: Plan, address: Address) -> None:
  """Say how to get in, once QEMU has started."""
  if address.port != SSH_PORT and not address.chosen:
    say(f"port {SSH_PORT} is taken; this machine gets {address.port}")
  host = "127.0.0.1" if address.host == "0.0.0.0" else address.host
  say(f"ssh -p {address.port} {plan.guest.user}@{host}")
  if not plan.guest.console:
    say(f"{plan.guest.title} writes nothing to this terminal; once it is up, ssh gets in")


def cmd_pull(options: Options) -> int:
  """Download everything that `run` needs, or fill a mirror, or verify what is there."""
  net = net_from(dict(os.environ))
  plan = plan_from(options, net)
  if options.mirror:
    fill_mirror(plan, Releases(net), options.mirror)
    return 0
  make_folders(plan.cache)
  sweep(plan.cache)
  fetch_missing(plan, net)
  check_image(plan.base)
  say(f"{plan.guest.title} {plan.version} on {plan.guest.arch} is ready")
  return verify(plan, Releases(quick(net))) if options.verify else 0


def verify(plan: Plan, releases: Releases) -> int:
  """Compare what is cached with its record and its release; prints a line for each, 1 if bad."""
  things = [
    (plan.base, record_path(plan.base), plan.guest.os + "-builder"),
    (tree_program(plan), os.path.join(plan.tree, "release.json"), "resources"),
  ]
  if not plan.own_qemu:
    things.append((plan.qemu_img, plan.qemu_img + ".json", "resources"))
  verdicts = []
  for path, record_file, repo in things:
    verdicts.append(verdict(releases, path, read_json(record_file), repo))
    emit(f"{os.path.basename(path)}: {verdicts[-1]}")
  if all(text.startswith("ok") for text in verdicts):
    return 0
  say(f"delete what is damaged, below {plan.cache}, and pull it again")
  return EXIT_FAILED


def verdict(releases: Releases, path: str, record: Dict[str, Any], repo: str) -> str:
  """Whether a file is what its record and its release say."""
  if not isinstance(record.get("sha256"), str):
    return "unknown: no digest was noted when it came"
  if file_sha256(path) != record["sha256"]:
    return "DAMAGED: it has not the digest that was noted when it came"
  tag, name = str(record.get("release")), str(record.get("url")).rpartition("/")[2]
  digest = releases.digest(repo, tag, unquoted(name)) if re.match(TAG, tag) else ""
  if digest and digest != record.get("asset_sha256"):
    return f"DAMAGED: {tag} now names another digest"
  return (
    f"ok, as {tag} says" if digest else "ok, as noted when it came; the release cannot be asked"
  )


def fill_mirror(plan: Plan, releases: Releases, folder: str) -> None:
  """Download the release's files into a folder that can be QVM_RELEASES_URL for others."""
  for name in (plan.qemu_asset, plan.tools_asset):
    mirror_asset(releases, folder, "resources", releases.tag("resources"), name)
  repo = plan.guest.os + "-builder"
  for tag, name in candidates(plan, releases):
    with contextlib.suppress(NotFound):
      return mirror_asset(releases, folder, repo, tag, name)
  raise no_such_image(plan, releases)


def mirror_asset(releases: Releases, folder: str, repo: str, tag: str, name: str) -> None:
  """Put one asset into a mirror, and into the files that stand for its release's pages."""
  top = os.path.join(folder, repo, "releases")
  target = os.path.join(top, "download", tag, name)
  page = os.path.join(top, "expanded_assets", tag)
  if not os.path.isfile(target):
    for path in (target, page):
      os.makedirs(os.path.dirname(path), exist_ok=True)
    transfer, record = fetch_asset(releases, repo, tag, name, os.path.dirname(target))
    with open(page, "a") as file:
      file.write(f'<a href="/{repo}/releases/download/{tag}/{name}">{name}</a> ')
      file.write(f"sha256:{record['asset_sha256']}\n")
    publish(transfer.part, target, 0o644)
    transfer.reset()
  tags = sorted(os.listdir(os.path.join(top, "download")), key=version_key, reverse=True)
  feed = "".join(f'<link href="/{repo}/releases/tag/{tag}"/>\n' for tag in tags)
  for path, text in (("releases.atom", feed), ("releases/latest", releases.tag(repo) + "\n")):
    write_text(os.path.join(folder, repo, path), text)
  emit(target)


def cmd_search(options: Options) -> int:
  """Show the versions that can be had, or without a network those that are cached."""
  cache, net = cache_folder(dict(os.environ)), quick(net_from(dict(os.environ)))
  names = [word.lower() for word in options.operands] or list(OS_NAMES)
  releases = Releases(net)
  for name in names:  # all at the same time
    releases.once((name, "images"), images_of(releases, name), wait=False)
  rows: List[Dict[str, Any]] = []
  errors: Dict[str, QvmError] = {}
  for name in names:
    try:
      images = releases.once((name, "images"), images_of(releases, name))
    except QvmError as error:
      errors[name], images = error, []
    rows += search_rows(name, images, cached_images(cache, name))
  for name, problem in errors.items():
    say(f"only what is cached of {name} is shown: {problem}")
  if options.json:
    import json

    emit(json.dumps(rows, indent=2))
  else:
    show_search(rows)
  return EXIT_FAILED if errors and not rows else 0


def images_of(releases: Releases, name: str) -> Callable[[], List[Image]]:
  """A call that asks for the images of an OS."""
  return lambda: images_in(name, releases.all(name + "-builder"))


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


def show_table(table: Sequence[Sequence[str]]) -> None:
  """Print rows with their columns aligned."""
  widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
  for line in table:
    emit(printable("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()))


def cmd_list(options: Options) -> int:
  """Show the instances."""
  cache = cache_folder(dict(os.environ))
  sweep(cache)
  rows = list_instances(cache)
  if options.json:
    import json

    emit(json.dumps([row._asdict() for row in rows], indent=2))
    return 0
  table = [("NAME", "OS", "VERSION", "ARCH", "STATE", "SSH", "SIZE")]
  for row in rows:
    state = row.state + (" (--rm)" if row.ephemeral else "")
    cells = (row.name, row.os, row.version, row.arch, state, row.ssh or "-", megabytes(row.size))
    table.append(cells)
  show_table(table)
  return 0


def cmd_rm(options: Options) -> int:
  """Remove instances; all names are looked at before anything is removed."""
  cache = cache_folder(dict(os.environ))
  sweep(cache)
  with contextlib.ExitStack() as stack:
    chosen = []
    for name in dict.fromkeys(options.operands):
      files = instance_files(cache, name)
      if not os.path.lexists(files.disk):
        raise QvmError(f"there is no instance {name}; nothing is removed", "see qvm list")
      try:
        fd = take_instance(files)
      except QvmError as error:
        raise QvmError(f"{error}; nothing is removed", "end it first")
      stack.callback(drop_lock, fd, files.lock)
      chosen.append(files)
    for files in chosen:
      remove_instance(files)
      emit(files.name)
  return 0


def cmd_clean(options: Options) -> int:
  """Delete leftovers, with --all also what can be downloaded again; never an instance."""
  cache = cache_folder(dict(os.environ))
  folder = os.path.join(cache, "instances")
  total = 0
  if os.path.isdir(folder):
    with gate(folder):
      paths = leftovers(cache) + (unneeded(cache) if options.all else [])
      for path in paths:
        size = tree_size(path)
        total += size
        emit(f"{megabytes(size):>8}  {os.path.relpath(path, cache)}")
        if not options.dry_run:
          remove_tree(path)
  say(f"{'would free' if options.dry_run else 'freed'} {megabytes(total)}")
  return 0


def leftovers(cache: str) -> List[str]:
  """What killed runs left: unfinished downloads, --rm overlays, temporary files, unheld locks."""
  found = []
  for name in names_in(cache, "downloads"):
    artefact = re.sub(r"\.(part|lock|tmp|json|json\.tmp)\Z", "", name)
    if not is_locked(os.path.join(cache, "downloads", artefact + ".lock")):
      found.append(os.path.join(cache, "downloads", name))
  for name in names_in(cache, "instances"):
    stem = re.sub(r"\.(qcow2|json|lock|console\.log|ephemeral)(\.tmp)?\Z", "", name)
    files = instance_files(cache, stem)
    loose = name.endswith((".tmp", ".lock")) or os.path.exists(files.mark)
    if loose and not is_locked(files.lock):
      found.append(os.path.join(cache, "instances", name))
  found += [p for p in paths_in(cache, "ports") if not is_locked(p)]
  if not fetching(cache):
    trees = paths_in(cache, "qemu")
    used = {os.path.realpath(path) for path in trees if os.path.islink(path)}
    old = [p for p in trees if os.path.basename(p).startswith(".") and p not in used]
    temporary = [p for d in ("base", "bin", "qemu") for p in paths_in(cache, d)]
    found += old + [p for p in temporary if p.endswith((".tmp", ".new"))]
  return found


def unneeded(cache: str) -> List[str]:
  """Base images that no instance needs, and QEMU when nothing runs; all can be fetched again."""
  if fetching(cache):
    say("something is being downloaded: only leftovers go")
    return []
  bases = [path for path in paths_in(cache, "base") if path.endswith(".qcow2")]
  found = []
  for base in bases:
    if not dependants(cache, base):
      found += [p for p in (base, record_path(base), kernel_path(base)) if os.path.exists(p)]
  if any(is_locked(path) for path in paths_in(cache, "instances") if path.endswith(".lock")):
    say("an instance is running: QEMU stays")
    return found
  programs = paths_in(cache, "qemu") + paths_in(cache, "bin")
  return found + [path for path in programs if not path.endswith((".tmp", ".new"))]


def fetching(cache: str) -> bool:
  """Whether a qvm is downloading or unpacking something."""
  return any(is_locked(path) for path in paths_in(cache, "downloads") if path.endswith(".lock"))


def cmd_config(options: Options) -> int:
  """Print the cache folder."""
  emit(cache_folder(dict(os.environ)))
  return 0


CALLS: Dict[str, Callable[[Options], int]] = {
  "run": cmd_run,
  "pull": cmd_pull,
  "search": cmd_search,
  "list": cmd_list,
  "rm": cmd_rm,
  "clean": cmd_clean,
  "config": cmd_config,
}


def call(words: Sequence[str]) -> int:
  """Do what the command line says."""
  options = parse_command_line(words)
  report.progress = options.progress
  if options.help:
    emit(help_text(options.command))
    return 0
  if options.version:
    emit("qvm " + __version__)
    return 0
  return CALLS[options.command](options)


def main(words: Optional[Sequence[str]] = None) -> int:
  """Run qvm and return its exit code; the only function that prints errors."""
  try:
    signals.install()
    return call(sys.argv[1:] if words is None else words)
  except Interrupted as stop:
    return 128 + stop.signum
  except QvmError as error:
    say(str(error))
    if error.hint:
      say(error.hint)
    return error.code
  except BrokenPipeError:
    return 128 + signal.SIGPIPE
  except OSError as error:
    say("{}{}".format(error.filename + ": " if error.filename else "", describe(error)))
    return EXIT_FAILED
  except Exception as error:
    if os.environ.get("QVM_DEBUG"):
      raise
    say(f"this is a bug in qvm {__version__}: {type(error).__name__}: {error}")
    say("QVM_DEBUG=1 shows where; please report it")
    return EXIT_FAILED


if __name__ == "__main__":
  sys.exit(main())
