#!/usr/bin/env python3
"""`make demo`: qvm in front of you, without GitHub.

The release server of the tests, on loopback, stands for GitHub. Where qvm would download a BSD it
gets a small Linux made of Debian's packages; on macOS, for which there are none, a boot sector that
prints a line and powers off. QEMU is this machine's own. Nothing is left over.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import guests
import linux_guest
import real_qemu
from release_server import ReleaseServer
from support import ROOT, Qvm, default_signals, end_processes, tar_of

PACKAGES = ROOT / ".venv" / "linux"
GUESTS = ("freebsd", "netbsd", "omnios")  # whose images start with a BIOS, and have virtio
SMALL = "-m 512M"
LINES = (
  "pull freebsd",
  f"run --rm {SMALL} freebsd -- uname -a",
  f"run --rm --warm {SMALL} freebsd -- uptime",
  f"run --rm --warm {SMALL} freebsd -- uptime",
  f"each {SMALL} {' '.join(GUESTS)} -- 'uname -n; uptime'",
)
ON_A_MAC = ("pull freebsd", f"run --rm {SMALL} freebsd")


def publish(server, folder):
  """Make releases of this machine's QEMU and of the guests."""
  image = folder / "image.qcow2"
  if sys.platform == "darwin":
    guests.to_qcow2(guests.boot_sector("Hello from a boot sector."), image)
    archives = homebrew_archives()
  else:
    linux_guest.disk(str(PACKAGES), "x86-64", "bios", "open", str(image))
    archives = {name: folder / name for name in
                ("qemu-system-x86_64-linux.tar", "resources-linux.tar")}  # fmt: skip
    real_qemu.pack_qemu("x86-64", archives["qemu-system-x86_64-linux.tar"])
    real_qemu.pack_resources(archives["resources-linux.tar"])
  server.add_release("resources", "v2.0.0", archives)
  for name in GUESTS:
    server.add_release(f"{name}-builder", "v1.0.0", {f"{name}-1.0-x86-64.qcow2": image})


def homebrew_archives():
  """The archives that a Mac downloads, made of Homebrew's QEMU."""
  program = Path(shutil.which("qemu-system-x86_64")).resolve()
  share = program.parent.parent / "share" / "qemu"
  firmware = [path for end in ("bin", "rom") for path in share.glob(f"*.{end}")]
  files = {f"share/qemu/{path.name}": path.read_bytes() for path in firmware}
  return {
    "qemu-system-x86_64-macos.tar": tar_of({"bin/qemu": program.read_bytes(), **files}),
    "resources-macos.tar": tar_of({"qemu-img": Path(shutil.which("qemu-img")).read_bytes()}),
  }


def show(qvm, line):
  """Show a command, then run it as a user does."""
  line = line.replace(" ", " --platform x86-64 ", 1) if not line.startswith("each") else line
  print(f"\n$ python3 qvm.pyz {line}", flush=True)
  code = subprocess.call(qvm.command(*shlex.split(line)), env=qvm.env)
  if code:
    sys.exit(f"demo: that ended with code {code}")


def main():
  default_signals()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  folder = Path(tempfile.mkdtemp(prefix="qvm-demo-"))
  print(
    "Every guest here is one small Linux, made of Debian's packages, that goes by a BSD's name."
  )
  print("Making it takes some seconds.", flush=True)
  try:
    with ReleaseServer() as server:
      publish(server, folder)
      packed = folder / "qvm.pyz"
      subprocess.run([sys.executable, str(ROOT / "build_zipapp.py"), str(packed)], check=True)
      qvm = Qvm(folder, packed, server)
      for line in ON_A_MAC if sys.platform == "darwin" else LINES:
        show(qvm, line)
  finally:
    end_processes(folder)
    shutil.rmtree(str(folder))
  print("\nWith GitHub in reach the same commands download FreeBSD, NetBSD and Haiku.")


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    sys.exit(130)
