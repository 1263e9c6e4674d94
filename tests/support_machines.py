"""Machines for the tests: real QEMU with tiny guests, guests that are a real sshd, small disks."""

import contextlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import guests
import pytest
import real_qemu
import ssh_guest
from darwin_host import put_program
from support import end_processes, forget_sizes, free_port, processes_of, works

FREEBSD_GUEST = ("freebsd", "15.1")
OPENBSD_GUEST = ("openbsd", "7.9")
# The orders on QEMU's control socket that make a checkpoint, and that go on from one.
SAVED = ["qmp_capabilities", "migrate-set-capabilities", "query-kvm", "x-query-jit", "stop",
         "getfd", "migrate", "query-migrate", "quit"]  # fmt: skip
RESTORED = ["qmp_capabilities", "migrate-set-capabilities", "query-kvm", "x-query-jit", "getfd",
            "migrate-incoming", "query-status", "cont"]  # fmt: skip
# What the guests of real_cache do, by their version of FreeBSD.
ECHO, HANG, FLOODING = "15.1", "15.0", "14.4"
FLOOD = b"\r\nflood\r\n" + 3 * b"".join(n.to_bytes(2, "big") for n in range(0x8000, 0x10000))


def flood_disk():
  """A disk that prints `flood`, then three times the numbers from 0x8000 on, as two bytes each."""
  code = guests._code(
    ("bd 80 7c", "mov bp, put"),
    ("b9 03 00", "mov cx, 3"),
    ("bb 00 80", "again: mov bx, 0x8000"),
    ("88 f8", "next: mov al, bh"),
    ("ff d5", "call bp"),
    ("88 d8", "mov al, bl"),
    ("ff d5", "call bp"),
    ("43", "inc bx"),
    ("75 f5", "jnz next"),
    ("49", "dec cx"),
    ("75 ef", "jnz again"),
  )
  program = guests._PRINT_TEXT + code + guests._THEN_POWER_OFF
  return guests._bios_disk(program, guests._line("flood"))


def make_real_cache(folder):
  cache = folder / "cache"
  for name in ("base", "bin", "qemu/x86_64"):
    (cache / name).mkdir(parents=True)
  real_qemu.pack_qemu("x86-64", folder / "qemu.tar")
  real_qemu.pack_resources(folder / "tools.tar")
  unpack(folder / "qemu.tar", cache / "qemu" / "x86_64")
  unpack(folder / "tools.tar", cache / "bin")
  program = cache / "qemu" / "x86_64" / "bin" / "qemu"
  program.rename(program.with_name("qemu-system-x86_64"))
  for version, disk in ((ECHO, guests.echo_disk()), (HANG, guests.hang_disk())):
    guests.to_qcow2(disk, cache / "base" / f"freebsd-{version}-x86-64.qcow2")
  guests.to_qcow2(flood_disk(), cache / "base" / f"freebsd-{FLOODING}-x86-64.qcow2")
  return cache


def ssh_guest_as_qemu(cache):
  """Put the stand-in that starts a real sshd in the place of QEMU."""
  program = cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  program.write_text(ssh_guest.program())
  forget_sizes(cache)


def unpack(tar, folder):
  with tarfile.open(tar) as archive:
    filtered = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    archive.extractall(folder, **filtered)  # as ours, also for root


class SmallDisk:
  """A file system of its own, in memory, that is mounted on a folder."""

  def __init__(self, folder):
    self.folder = folder
    self.root = [] if os.geteuid() == 0 else ["sudo", "-n"]

  def mount(self, size, *more):
    if self.root and not shutil.which("sudo"):
      pytest.skip("only root can mount a disk")
    owner = f"mode=700,uid={os.geteuid()},gid={os.getegid()}"
    options = ",".join([f"size={size}", owner, *more])
    command = [*self.root, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
    subprocess.run(command, check=True)

  def resize(self, size):
    command = [*self.root, "mount", "-o", f"remount,size={size}", str(self.folder)]
    subprocess.run(command, check=True)

  def free(self):
    stat = os.statvfs(self.folder)
    return stat.f_bavail * stat.f_frsize

  def fill(self, leave=0):
    """Write a file that leaves so many bytes free."""
    with open(self.folder / "filler", "wb") as file, contextlib.suppress(OSError):
      os.posix_fallocate(file.fileno(), 0, max(1, self.free() - leave))
    assert self.free() <= leave + 8192

  def empty(self):
    (self.folder / "filler").unlink()

  def unmount(self):
    subprocess.run([*self.root, "umount", "-l", str(self.folder)], check=True)


@contextlib.contextmanager
def small_cache(home, size):
  """The cache folder of a home, on a disk of its own."""
  folder = home / ".cache" / "qvm"
  folder.mkdir(parents=True, mode=0o700)
  disk = SmallDisk(folder)
  disk.mount(size)
  try:
    yield disk
  finally:
    disk.unmount()


def disk_was_full(result):
  """It failed for want of room, in a few words."""
  assert result.returncode == 1, result.stderr
  assert "disk is full" in result.stderr
  assert "Traceback" not in result.stderr and "bug in qvm" not in result.stderr
  return True


class Guests:
  """qvm with a QEMU that boots an sshd."""

  def __init__(self, qvm, folder):
    self.qvm, self.folder = qvm, folder
    self.play()

  def play(self, **play):
    """How the next guests behave; several at a time want folders of their own."""
    self.qvm.env["SSH_GUEST"] = json.dumps({"folder": str(self.folder), **play})

  def words(self, *words, guest=FREEBSD_GUEST, command=(), rm=True):
    port = ("--ssh-port", str(free_port())) if "--ssh-port" not in words else ()
    tail = ("--", *command) if command else ()
    return ["run", *(["--rm"] if rm else []), *port, *words, *guest, *tail]

  def run(self, *command, options=(), guest=FREEBSD_GUEST, rm=True, **more):
    """Run a command in a guest of its own."""
    return self.qvm(*self.words(*options, guest=guest, command=command, rm=rm), **more)

  def start(self, *command, options=(), **more):
    return self.qvm.start(*self.words(*options, command=command), **more)

  def kill(self, process):
    """Kill qvm, then the QEMU that it leaves."""
    process.kill()
    process.communicate()
    end_processes(self.qvm.cache)

  def up(self, name="vm", *words, guest=FREEBSD_GUEST):
    """Start a guest in the background."""
    port = str(free_port())
    works(self.qvm("run", "-d", "--name", name, "--ssh-port", port, *words, *guest))

  def put_tool(self, name, text):
    """Put a command of the test's in front of the guest's own."""
    put_program(self.folder / "bin" / name, f"#!/bin/sh\n{text}\n")

  def machine(self):
    """The process of the only QEMU."""
    pids = processes_of(self.qvm.cache)
    (pid,) = [p for p in pids if b"-nographic" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return pid

  def instances(self):
    return [name for name in self.qvm.files() if name.startswith("instances/")]

  def nothing_left(self):
    """No process, no overlay, no lock, and nothing in the folder for temporary files."""
    assert processes_of(self.qvm.cache) == {}
    assert self.instances() == []
    assert os.listdir(self.qvm.env["TMPDIR"]) == []
    return True
