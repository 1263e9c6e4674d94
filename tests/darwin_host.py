"""A Mac for the tests: its own root, programs that record their calls, QEMU, and qvm under it.

What Python sees there is tests/darwin/sitecustomize.py's; the kinds of machine are named there.
"""

import json
import shutil
import sys
import textwrap
from pathlib import Path

import ssh_guest
from support import ROOT, Qvm, processes_of, tar_of

DARWIN = Path(__file__).resolve().parent / "darwin"
INTEL, APPLE = "x86_64", "arm64"
MACHINES = ("silicon", "silicon-bare", "rosetta", "vm", "runner", "intel", "intel-vm")
WITHOUT_ROSETTA = ("silicon-bare", "intel", "intel-vm")

# Every stand-in adds a line to $DARWIN_CALLS: its name and arguments, with tabs between.
NOTE = """\
#!/bin/sh
if [ -n "$DARWIN_CALLS" ]; then
  ( IFS='\t'; printf '%s\\t%s\\n' "${0##*/}" "$*" >>"$DARWIN_CALLS" )
fi
"""

# As Apple's: -n prints values alone, -i is silent about a name that there is not.
SYSCTL = (
  NOTE
  + """\
values= ignore= code=0
while case $1 in -*) true;; *) false;; esac; do
  case $1 in *n*) values=1;; esac
  case $1 in *i*) ignore=1;; esac
  shift
done
apple= intel=
case ${DARWIN_MACHINE:-silicon} in intel*) intel=1;; *) apple=1;; esac
for name; do
  value=
  case $name in
    kern.hv_support) case $DARWIN_MACHINE in *vm) value=0;; runner) ;; *) value=1;; esac;;
    hw.optional.arm64) value=$apple;;
    sysctl.proc_translated)
      case $DARWIN_MACHINE in intel*) ;; rosetta) value=1;; *) value=0;; esac;;
    machdep.cpu.brand_string)
      value='Apple M2'
      case $DARWIN_MACHINE in
        vm|runner) value='Apple M1 (Virtual)';;
        intel*) value='Intel(R) Core(TM) i7-8700B CPU @ 3.20GHz';;
      esac;;
    machdep.cpu.features) [ -z "$intel" ] || value='FPU VME DE PSE TSC MSR PAE VMX';;
    hw.memsize) value=17179869184;;
    hw.pagesize|vm.pagesize) value=16384;;
    hw.ncpu|hw.logicalcpu|hw.physicalcpu) value=8;;
    kern.osproductversion) value=15.6;;
    kern.osrelease) value=24.6.0;;
    kern.maxfilesperproc) value=61440;;
    kern.bootsessionuuid) value=5A3E3BC1-9E0B-4A52-A7E9-3C1B5B8C1E11;;
  esac
  if [ -z "$value" ]; then
    [ -n "$ignore" ] || { echo "sysctl: unknown oid '$name'" >&2; code=1; }
  elif [ -n "$values" ]; then
    echo "$value"
  else
    echo "$name: $value"
  fi
done
exit $code
"""
)

SW_VERS = (
  NOTE
  + """\
case $1 in
  --productName|-productName) echo macOS;;
  --productVersion|-productVersion) echo 15.6;;
  --buildVersion|-buildVersion) echo 24G84;;
  *) printf 'ProductName:\\t\\tmacOS\\nProductVersion:\\t\\t15.6\\nBuildVersion:\\t\\t24G84\\n';;
esac
"""
)

TMUTIL = (
  NOTE
  + """\
case $1 in
  addexclusion|removeexclusion|isexcluded) ;;
  *) echo "Usage: tmutil help" >&2; exit 64;;
esac
"""
)

# macOS 15's, which knows no zstd: its libarchive looks for a program of that name.
BSDTAR = (
  NOTE
  + """\
case $1 in
  --version) echo 'bsdtar 3.5.3 - libarchive 3.7.4 zlib/1.2.12 liblzma/5.4.3 bz2lib/1.0.8 ';;
  *) cat >/dev/null
     echo "bsdtar: Error opening archive: Can't initialize filter; unable to run program" \\
       '"zstd -d -qq"' >&2
     exit 1;;
esac
"""
)

# With -w it lasts as long as that process, which need not be its parent's child.
CAFFEINATE = """\
import os, select, sys
if os.environ.get("DARWIN_CALLS"):
  with open(os.environ["DARWIN_CALLS"], "a") as file:
    file.write("\\t".join(["caffeinate"] + sys.argv[1:]) + "\\n")
words = sys.argv[1:]
while words and words[0].startswith("-"):
  word = words.pop(0)
  if word in ("-w", "-t"):
    value = int(words.pop(0))
    if word == "-w":
      try:
        if hasattr(os, "pidfd_open"):
          select.select([os.pidfd_open(value)], [], [])
        else:
          kind = select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT
          select.kqueue().control([select.kevent(value, *kind)], 1)
      except ProcessLookupError:
        pass
      sys.exit()
if words:
  os.execvp(words[0], words)
select.select([], [], [])
"""

# QEMU as far as a Mac matters, then the guest that $SSH_GUEST or $MAC_QEMU describes. $MAC_QEMU,
# JSON: {"stdout", "stderr", "exit", "signal"}, "hvf": "broken" or "denied" where it should work,
# "terminal": true sets the modes of a terminal on stdin, and makes streams non-blocking, as QEMU
# does, "stdin": a file that gets what can be read from stdin, "wait": a FIFO to wait for,
# "convert": a file that gets the content of the disk.
QEMU = """\
import json, os, resource, signal, sys
CPU = {cpu!r}
play = json.loads(os.environ.get("MAC_QEMU") or "{{}}")
name = os.path.basename(sys.argv[0])
machine = os.environ.get("DARWIN_MACHINE", "silicon")

def die(text, code=1):
  sys.stderr.write(name + ": " + text + "\\n")
  sys.stderr.flush()
  if code == "abort":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()
  sys.exit(code)

if "--version" in sys.argv or "-version" in sys.argv:
  print("QEMU emulator version 10.0.2")
  sys.exit()
with_hvf = {{"x86_64": "x86_64", "arm64": "aarch64"}}[CPU] == name.rpartition("-")[2]
if "help" in sys.argv:
  print("Accelerators supported in QEMU binary:\\n" + ("hvf\\n" if with_hvf else "") + "tcg")
  sys.exit()
asked = ["tcg"]
for option, value in zip(sys.argv, sys.argv[1:]):
  if option == "-accel":
    asked = [value.split(",")[0]]
  if option == "-machine":
    asked = [w[6:] for w in value.split(",") if w.startswith("accel=")][-1:] or asked
asked = asked[0].split(":")
native = "x86_64" if machine.startswith("intel") else "arm64"
works = CPU == native and not machine.endswith(("vm", "runner")) and play.get("hvf") is None
used = None
for accelerator in asked:
  if used:
    sys.stderr.write("%s: falling back to %s\\n" % (name, accelerator))
  used = accelerator
  if accelerator == "hvf" and with_hvf:
    if play.get("hvf") == "denied":
      die("-machine accel=hvf: Could not access HVF. Is the executable signed with "
          "com.apple.security.hypervisor entitlement?")
    if not works and machine == "runner":  # QEMU 8
      die("Error: HV_UNSUPPORTED", "abort")
    if not works:
      die("Error: ret = HV_UNSUPPORTED (0xfae9400f, at ../accel/hvf/hvf-accel-ops.c:339)", "abort")
    break
  if accelerator == "tcg":
    break
  sys.stderr.write("%s: invalid accelerator %s\\n" % (name, accelerator))
else:
  die("no accelerator found")
if os.environ.get("DARWIN_CALLS"):
  with open(os.environ["DARWIN_CALLS"], "a") as file:
    soft = str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    file.write("\\t".join(["qemu", name, used, soft, str(os.getpid())]) + "\\n")
if play.get("terminal"):
  for fd in (0, 1):
    if os.isatty(fd):
      import termios
      termios.tcsetattr(fd, termios.TCSANOW, termios.tcgetattr(fd))
    os.set_blocking(fd, False)
if play.get("stdin"):
  with open(play["stdin"], "w") as file:
    try:
      os.set_blocking(0, False)
      file.write(repr(os.read(0, 100)))
    except OSError as error:
      file.write(type(error).__name__)
if play.get("convert"):
  import subprocess
  drive = next(word for word in sys.argv if word.startswith("if=none,file="))
  disk = drive[len("if=none,file="):].rpartition(",id=")[0].replace(",,", ",")
  code = subprocess.call([{qemu_img!r}, "convert", "-O", "raw", disk, play["convert"]])
  if code:
    sys.exit(77)
if play.get("wait"):
  open(play["wait"]).read()
if os.environ.get("SSH_GUEST") and not play.get("plain"):
  {main}
for stream in ("stdout", "stderr"):
  getattr(sys, stream).write(play.get(stream, ""))
  getattr(sys, stream).flush()
if play.get("signal"):
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  os.kill(os.getpid(), play["signal"])
sys.exit(play.get("exit", 0))
"""

# qemu-img as Intel's program; "lies" takes the disk for a hole, as SEEK_DATA of APFS may.
QEMU_IMG = """\
import json, os, sys
if os.environ.get("DARWIN_CALLS"):
  with open(os.environ["DARWIN_CALLS"], "a") as file:
    file.write("\\t".join(["qemu-img"] + sys.argv[1:]) + "\\n")
if json.loads(os.environ.get("MAC_QEMU") or "{{}}").get("lies") and sys.argv[1] == "convert":
  size = str(os.path.getsize(sys.argv[-2]))
  os.execv({real!r}, [{real!r}, "create", "-q", "-f", "qcow2", sys.argv[-1], size])
os.execv({real!r}, [{real!r}] + sys.argv[1:])
"""


def macho(cpu, text):
  """A program of a Mac: a header of Mach-O for that CPU, and Python."""
  kind = {INTEL: b"\7\0\0\1", APPLE: b"\x0c\0\0\1"}[cpu]
  return (b"\xcf\xfa\xed\xfe" + kind).ljust(31) + b"\n" + textwrap.dedent(text).encode()


def qemu_text(cpu=INTEL):
  main = ssh_guest.MAIN.replace("\n", "\n  ")
  return QEMU.format(cpu=cpu, main=main, qemu_img=shutil.which("qemu-img"))


def qemu(cpu=INTEL):
  """A QEMU built for that CPU; what it emulates its name says."""
  return macho(cpu, qemu_text(cpu))


def qemu_tar(**files):
  """The archive of the downloaded QEMU, which is Intel's; files: more of share/qemu."""
  share = {"bios-256k.bin": b"bios", "uefi.fd": b"uefi", **files}
  return tar_of({"bin/qemu": qemu(), **{f"share/qemu/{k}": v for k, v in share.items()}})


def qemu_img():
  return macho(INTEL, QEMU_IMG.format(real=shutil.which("qemu-img")))


def put_program(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode() if isinstance(text, str) else text)
  path.chmod(0o755)
  return path


def furnish_root(root, machine="silicon"):
  """What a Mac of that kind has in /, as far as it matters; returns its PATH."""
  system = {"sysctl": "usr/sbin", "sw_vers": "usr/bin", "tmutil": "usr/bin", "bsdtar": "usr/bin"}
  texts = {"sysctl": SYSCTL, "sw_vers": SW_VERS, "tmutil": TMUTIL, "bsdtar": BSDTAR}
  for name, folder in system.items():
    put_program(root / folder / name, texts[name])
  (root / "usr/bin/tar").symlink_to("bsdtar")
  put_program(root / "usr/bin/caffeinate", f"#!{sys.executable} -IS\n{CAFFEINATE}")
  for name in ("ssh", "ssh-keygen", "sh", "cat", "env", "stty"):
    if shutil.which(name):
      (root / "usr/bin" / name).symlink_to(shutil.which(name))
  version = root / "System/Library/CoreServices/SystemVersion.plist"
  version.parent.mkdir(parents=True)
  version.write_text(
    '<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0"><dict>'
    "<key>ProductName</key><string>macOS</string>"
    "<key>ProductVersion</key><string>15.6</string></dict></plist>\n"
  )
  if machine not in WITHOUT_ROSETTA:
    (root / "Library/Apple/usr/share/rosetta").mkdir(parents=True)
  return ":".join(str(root / folder) for folder in ("usr/bin", "bin", "usr/sbin", "sbin"))


class Mac(Qvm):
  """Runs the program on a Mac of a kind, in folders that fold names."""

  def __init__(self, folder, machine="silicon", server=None):
    self.users = Path(folder) / "Users"
    home = self.users / "me"
    home.mkdir(parents=True, exist_ok=True)
    super().__init__(home, ROOT / "qvm.py", server)
    self.machine, self.root, self.calls_file = machine, Path(folder) / "mac", Path(folder) / "calls"
    self.guest, self.tmp = Path(folder) / "guest", Path(folder) / "tmp"
    self.tmp.mkdir()
    path = furnish_root(self.root, machine)
    self.env.update(PATH=path, PYTHONPATH=str(DARWIN), LC_ALL="C.UTF-8")
    self.env.update(TMPDIR=str(self.tmp), DARWIN_ROOT=str(self.root))
    self.env.update(DARWIN_FOLDS=str(folder), DARWIN_CALLS=str(self.calls_file))
    self.env.update(DARWIN_PYTHON=sys.executable)
    self.env.update(DARWIN_MACHINE="silicon" if machine == "silicon-bare" else machine)

  def qemu_plays(self, **play):
    """Say what the stand-in for QEMU does in the next runs."""
    self.env["MAC_QEMU"] = json.dumps(play)

  def calls(self, name=""):
    """The recorded calls so far, [[name, argument, ...]], of one program only if it is named."""
    lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
    calls = [line.split("\t") for line in lines]
    return [call for call in calls if name in ("", call[0])]

  def accelerators(self):
    """What each QEMU has used that has come so far."""
    return [call[2] for call in self.calls("qemu")]

  def guest_plays(self, **play):
    """Let QEMU boot a guest with a real sshd, which behaves so; its files are in self.guest."""
    self.env["SSH_GUEST"] = json.dumps({"folder": str(self.guest), **play})

  def processes(self):
    """What runs with the home on its command line: QEMU, and what serves it."""
    return list(processes_of(self.home))

  def own_qemu(self, arch, cpu):
    """A QEMU as Homebrew's, built for that CPU; on PATH from now on, as is its qemu-img."""
    folder = self.root / "opt/homebrew/bin"
    put_program(folder / "qemu-img", macho(cpu, QEMU_IMG.format(real=shutil.which("qemu-img"))))
    put_program(folder / f"qemu-system-{arch}", qemu(cpu))
    if str(folder) not in self.env["PATH"]:
      self.env["PATH"] = f"{folder}:{self.env['PATH']}"
    return folder / f"qemu-system-{arch}"
