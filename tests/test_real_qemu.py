"""The real QEMU boots real, if tiny, guests with each of the eight tables."""

import os
import re
import signal
import subprocess
from pathlib import Path

import guests
import pytest
import real_qemu
from release_server import ReleaseServer
from support import DEADLINE, ROOT, Qvm, digest, ended, free_port, read_until, rows

import qvm as qvm_source

pytestmark = pytest.mark.xdist_group("real_qemu")  # one worker packs and unpacks for all

GUESTS = [(guest.os, guest.arch) for guest in qvm_source.GUESTS]
LIGHT = ("-m", "512M", "--cpus", "1", "--accel", "tcg")
MASK = "amx-tile=off,amx-int8=off,amx-bf16=off,la57=off"


def message(os_name, arch):
  return f"hello from {os_name} on {arch}"


@pytest.fixture(scope="module")
def releases(archives, tmp_path_factory):
  """A release server with the real QEMU and a guest for each table."""
  folder = tmp_path_factory.mktemp("images")
  disks = {f"{os}-1-{arch}": guests.guest_for(os, arch, message(os, arch)) for os, arch in GUESTS}
  disks["freebsd-count-x86-64"] = guests.counting_disk()
  disks["netbsd-hang-x86-64"] = guests.hang_disk()
  disks["omnios-echo-x86-64"] = guests.echo_disk()
  with ReleaseServer() as server:
    server.add_release("resources", "v2.0.0", archives)
    for stem, disk in disks.items():
      guests.to_qcow2(disk, folder / f"{stem}.qcow2")
    for os_name in qvm_source.OS_NAMES:
      images = {path.name: path for path in folder.glob(f"{os_name}-*")}
      server.add_release(f"{os_name}-builder", "v1.0.0", images)
    yield server


@pytest.fixture
def real(real_home, releases):
  return Qvm(real_home, ROOT / "qvm.py", releases)


def boot(qvm, *words):
  """Run a guest to its end; returns what it wrote on its console."""
  run = qvm("run", *words, *LIGHT, "--ssh-port", str(free_port()), timeout=120)
  assert run.returncode == 0, (run.stdout, run.stderr)
  return run.stdout


def listeners(port):
  """The IPv4 addresses at which a TCP port is listened on (state 0A), and those of IPv6."""
  found = []
  for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    with open(table) as file:
      for line in list(file)[1:]:
        address, state = line.split()[1], line.split()[3]
        host, _, number = address.rpartition(":")
        if state == "0A" and int(number, 16) == port:
          found.append(".".join(map(str, reversed(bytes.fromhex(host)))))
  return found


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_each_table_boots(real, guest):
  os_name, arch = guest
  text = boot(real, "--platform", arch, os_name, "1")
  assert message(*guest) in text.replace("\r", "")


def test_the_best_accelerator_that_works_by_itself(real):
  """Whatever KVM is here: it works, it is missing, or it opens and is broken underneath."""
  for _ in range(2):
    words = ("--rm", "--platform", "x86-64", "freebsd", "1", "-m", "512M")
    run = real("run", *words, "--ssh-port", str(free_port()), timeout=120)
    assert run.returncode == 0, run.stderr
    assert message("freebsd", "x86-64") in run.stdout
  failed = list((real.cache / "accelerators").glob("*"))
  assert ("doctor" in run.stderr) == bool(failed) and "Assertion" not in run.stderr


def test_openbsd_on_arm64_with_the_linaro_firmware(real, archives, tmp_path):
  """As with a release before v1.1.0: the table runs unchanged."""
  real_qemu.pack_qemu("arm64", tmp_path / "linaro.tar", linaro=True)
  image = tmp_path / "openbsd-1-arm64.qcow2"
  guests.to_qcow2(guests.guest_for("openbsd", "arm64", "with linaro"), image)
  tools = archives["resources-linux.tar"]
  with ReleaseServer() as server:
    assets = {"qemu-system-aarch64-linux.tar": tmp_path / "linaro.tar", tools.name: tools}
    server.add_release("resources", "v0.12.0", assets)
    server.add_release("openbsd-builder", "v0.14.0", {image.name: image})
    (tmp_path / "an, other").mkdir()
    qvm = Qvm(tmp_path / "an, other", ROOT / "qvm.py", server)
    assert "with linaro" in boot(qvm, "openbsd", "1", "--platform", "arm64")
    argv = qvm("--dry-run", "run", "openbsd", "1", "--platform", "arm64").stdout
  assert "/share/qemu/linaro_uefi.fd" in argv and "acpi=off" not in argv
  argv = real("--dry-run", "run", "openbsd", "1", "--platform", "arm64").stdout
  assert "/share/qemu/uefi.fd" in argv and "type=virt,acpi=off," in argv


def test_what_a_guest_writes_stays_in_its_overlay(real):
  def count(*words):
    return re.search(r"boots: (\d\d)", boot(real, "freebsd", "count", *words)).group(1)

  assert real("pull", "--platform", "x86-64", "freebsd", "count").returncode == 0
  base = real.cache / "base/freebsd-count-x86-64.qcow2"
  before = digest(base)
  assert count("--rm") == "00"
  assert [count() for _ in range(3)] == ["00", "01", "02"]
  assert count("--rm") == "00", "a throw-away disk begins with the base image"
  assert count("--name", "other") == "00"
  assert count() == "03"
  moved = real.home / "mo,ved"
  real.cache.rename(moved)
  try:
    real.env["QVM_CACHE_DIR"] = str(moved)
    assert count() == "04", "the cache can be moved"
  finally:
    moved.rename(real.cache)
    del real.env["QVM_CACHE_DIR"]
  assert digest(base) == before
  assert base.stat().st_mode & 0o777 == 0o444
  assert real("rm", "freebsd-count-x86-64", "other").returncode == 0
  assert count("--rm") == "00"
  info = ["qemu-img", "check", "-q", str(base)]
  subprocess.run(info, check=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.3"])
def test_qemu_listens_while_it_runs_and_just_there(real, host):
  port = free_port()
  assert listeners(port) == []
  words = ("run", "--rm", "netbsd", "hang", *LIGHT, "--ssh-port", f"{host}:{port}")
  with ended(real.start(*words)) as process:
    read_until(process.stdout, "hanging")
    assert listeners(port) == [host]
    running = [row["ssh"] for row in rows(real).values() if row["state"] == "running"]
    assert running == [f"{host}:{port}"]
    process.terminate()
    assert process.wait(DEADLINE) == 143
  assert listeners(port) == []
  assert not [row for row in rows(real).values() if row["ephemeral"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_the_real_qemu(real, number):
  """SIGKILL is sent to QEMU itself, the others to qvm."""
  words = ("run", "--rm", "netbsd", "hang", *LIGHT, "--ssh-port", str(free_port()))
  with ended(real.start(*words)) as process:
    read_until(process.stdout, "hanging")
    pid = process.pid
    if number == signal.SIGKILL:
      (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(pid, number)
    assert process.wait(DEADLINE) == 128 + number
  assert not [row for row in rows(real).values() if row["ephemeral"]]


def test_what_is_typed_reaches_the_guest(real):
  words = ("run", "--rm", "omnios", "echo", *LIGHT, "--ssh-port", str(free_port()))
  with ended(real.start(*words, stdin=subprocess.PIPE)) as process:
    read_until(process.stdout, "ready")
    process.stdin.write("Hiq")
    process.stdin.flush()
    assert "<48><69>" in read_until(process.stdout, "<69>")
    assert process.wait(DEADLINE) == 0


def test_the_zipapp_boots_too(real_home, releases, pyz):
  assert message("haiku", "x86-64") in boot(Qvm(real_home, pyz, releases), "--rm", "haiku", "1")


def test_a_qemu_of_the_users_own(real_home, releases):
  qvm = Qvm(real_home, ROOT / "qvm.py", releases)
  program = str(real_qemu.find_qemu().x86_64)
  text = boot(qvm, "--rm", "omnios", "1", "--qemu", program)
  assert message("omnios", "x86-64") in text


def test_what_qemu_refuses_is_seen(real):
  run = real("run", "--rm", "freebsd", "1", *LIGHT, "--qemu-arg", "-no-such-option")
  assert run.returncode == 1
  assert "-no-such-option: invalid option" in run.stderr
  assert not [row for row in rows(real).values() if row["ephemeral"]]


@pytest.mark.parametrize("os_name", ["freebsd", "openbsd"])
def test_qemu_knows_the_words_of_the_cpu_mask(real, os_name):
  """Whether KVM works here or not: the words are the same under TCG."""
  words = ("run", "--platform", "x86-64", os_name, "1", *LIGHT, "--rm")
  options = qvm_source.parse_command_line(words)
  plan = qvm_source.make_plan(
    options, qvm_source.Host("linux", "x86-64"), qvm_source.Cache(str(real.cache)), "abcdef"
  )
  argv = qvm_source.qemu_command(plan, options, qvm_source.HostFacts(False, True))
  cpu = argv[argv.index("-cpu") + 1]
  assert MASK in cpu
  program = str(real_qemu.find_qemu().x86_64)
  command = [program, "-cpu", cpu, "-accel", "tcg", "-display", "none", "-S", "-monitor", "stdio"]
  run = subprocess.run(command, input="quit\n", capture_output=True, text=True, timeout=DEADLINE)
  assert (run.returncode, "not found" in run.stderr) == (0, False), run.stderr
