"""Commands in real guests: a Linux with an ssh server on real QEMU, by the tables of the BSDs."""

import json
import os
import re
import shutil
import socket
import subprocess
import time

import linux_guest
import pytest
from release_server import ReleaseServer
from support import ROOT, Qvm, end_processes, free_port, processes_of, tree, works
from support_machines import SmallDisk
from support_terminal import Terminal

pytestmark = pytest.mark.xdist_group("real_qemu")  # one worker packs and unpacks for all

PACKAGES = ROOT / ".venv" / "linux"
LIGHT = ("-m", "512M", "--cpus", "1", "--accel", "tcg", "--boot-timeout", "180")
# The release decides whether a key disk is attached, the guest whether it lets in without.
IMAGES = {
  ("freebsd", "x86-64"): ("v1.0.0", "bios", "open"),
  ("freebsd", "arm64"): ("v0.13.0", "efi", "key-mbr"),
  ("openbsd", "x86-64"): ("v1.0.0", "efi", "key"),
  ("openbsd", "arm64"): ("v1.0.0", "efi", "key"),
  ("netbsd", "x86-64"): ("v1.0.0", "bios", "open"),
  ("haiku", "x86-64"): ("v1.0.0", "bios", "open"),
}
E1000 = ("openbsd", "x86-64"), ("haiku", "x86-64")


@pytest.fixture(scope="module")
def server(archives, tmp_path_factory):
  """A release server with the real QEMU, and Linux in the place of the images."""
  folder = tmp_path_factory.mktemp("linux")
  releases = {}
  for (os_name, arch), (tag, firmware, login) in IMAGES.items():
    kernel = "e1000" if (os_name, arch) in E1000 else "cloud"
    path = folder / f"{arch}-{firmware}-{login}-{kernel}.qcow2"
    if not path.exists():
      linux_guest.disk(str(PACKAGES), arch, firmware, login, str(path), kernel)
    releases.setdefault((os_name, tag), {})[f"{os_name}-1-{arch}.qcow2"] = path
  with ReleaseServer() as server:
    server.add_release("resources", "v2.0.0", archives)
    for (os_name, tag), images in releases.items():
      server.add_release(f"{os_name}-builder", tag, images)
    yield server
  shutil.rmtree(folder)


@pytest.fixture
def linux(real_home, server):
  yield Qvm(real_home, ROOT / "qvm.py", server)
  left = processes_of(real_home)
  end_processes(real_home)  # also after a test that has failed
  assert left == {}


def run(os_name, arch, *command, options=()):
  port = ("--ssh-port", str(free_port()))
  return ["run", *port, *LIGHT, *options, "--platform", arch, os_name, "1", "--", *command]


MACHINES = {"x86-64": "x86_64", "arm64": "aarch64"}
ONCE = [
  pytest.param("freebsd", "x86-64", id="virtio-blk"),
  pytest.param("haiku", "x86-64", id="virtio-scsi and e1000"),
  pytest.param("freebsd", "arm64", id="arm64 virtio-blk with a key in a partition"),
  pytest.param("openbsd", "arm64", id="arm64 virtio-scsi with a key"),
]


@pytest.mark.parametrize("os_name, arch", ONCE)
def test_a_command_in_a_machine_that_is_thrown_away(linux, tmp_path, os_name, arch):
  folder = tmp_path / "a folder"
  (folder / "sub").mkdir(parents=True)
  (folder / "sub/given").write_text("given\n")
  (folder / "sub/given").chmod(0o751)
  (folder / "link").symlink_to("sub/given")
  before = tree(folder)
  script = 'uname -m; echo $USER; printf "<%s>" "$@" >&2; cat; cp sub/given made; rm link; exit 42'
  words = ["sh", "-c", script, "sh", "a  b", "$HOME", "it's\n", "", "é"]
  result = linux(
    *run(os_name, arch, *words, options=("--rm", "--sync", str(folder), "--sync-delete")),
    input="typed\n",
  )
  assert result.returncode == 42, result.stderr
  user = "user" if os_name == "haiku" else "runner"
  assert result.stdout == f"{MACHINES[arch]}\n{user}\ntyped\n"
  assert result.stderr.endswith("<a  b><$HOME><it's\n><><é>"), result.stderr
  del before["link"]
  made = before["sub/given"]
  assert tree(folder) == {**before, "made": made}
  assert not any(name.startswith("instances/") for name in linux.files())


def test_a_machine_for_several_steps(linux, tmp_path):
  """run --detach, ssh and stop, with e1000, UEFI and the key disk."""
  words = ("run", "-d", "--name", "vm", *LIGHT, "--ssh-port", str(free_port()))
  works(linux(*words, "--platform", "x86-64", "openbsd", "1"))
  assert json.loads(linux("list", "--json").stdout)[0]["state"] == "running"
  assert linux("ssh", "vm", "--", "echo one >/tmp/step; exit 5").returncode == 5
  assert works(linux("ssh", "vm", "--", "cat", "/tmp/step")).stdout == "one\n"
  assert linux("ssh", "vm", "--", "kill -9 $$").returncode == 137
  data = bytes(range(256)) * 4096
  (tmp_path / "data").write_bytes(data)
  with open(tmp_path / "data", "rb") as file:
    command = linux.command("ssh", "vm", "--", "cat")
    out = subprocess.run(command, env=linux.env, stdin=file, stdout=subprocess.PIPE, check=True)
  assert out.stdout == data
  stopped = works(linux("stop", "vm", timeout=120))
  assert "vm has powered off" in stopped.stderr
  works(linux("rm", "vm"))


def warm(os_name, arch, *command, options=()):
  return run(os_name, arch, *command, options=("--rm", "--warm", *options))


def test_each_of_two_guests_without_a_network(linux, tmp_path):
  """A folder in, one out, a failure, and what the machines leave.

  Each reaches itself, and nothing else; ssh works all the same.
  """
  work = tmp_path / "work"
  work.mkdir()
  (work / "given").write_text("given\n")
  with socket.create_server(("127.0.0.1", 0)) as listener:
    script = "cat given; nc -w 5 127.0.0.1 22 </dev/null | head -c 8; echo; "
    script += f"nc -w 5 10.0.2.2 {listener.getsockname()[1]} </dev/null || echo none; "
    script += "echo $USER >made; [ $USER = runner ] || exit 3"
    words = ["each", "-j", "2", *LIGHT, "--no-network", "--sync", str(work)]
    words += ["--sync-out", str(tmp_path / "out")]
    guests = ("freebsd-1-x86-64", "haiku-x86-64")
    result = linux(*words, *guests, "--", script, timeout=300)
    assert result.returncode == 1, (result.stdout, result.stderr)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
      listener.accept()
  for guest, end in zip(guests, (r"ok +", r"exit 3 +")):
    for line in ("given", "SSH-2.0-", "none"):
      assert f"{guest}: {line}\n" in result.stdout
    assert re.search(rf"(?m)^{guest} +{end}[0-9.]+$", result.stdout), result.stdout
    user = "user" if guest.startswith("haiku") else "runner"
    assert tree(tmp_path / "out" / guest)["made"][2] == f"{user}\n".encode()
  assert list(tree(work)) == ["given"]
  assert not any(name.startswith("instances/") for name in linux.files())


def test_warm_starts(linux):
  """Each has its own copy of the world, and the time of the host."""
  note = "ls /tmp/mine; echo mine >/tmp/mine; md5sum </tmp/seed; date -u +%s"
  first = works(linux(*warm("freebsd", "x86-64", note)))
  assert "is booting to create the checkpoint" in first.stderr
  (row,) = json.loads(linux("list", "--json").stdout)
  assert row["state"] == "checkpoint" and 0 < row["size"] < 400e6
  others = [linux.start(*warm("freebsd", "x86-64", note)) for _ in range(2)]
  texts = [first.stdout]
  for process in others:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "is booting" not in err, err
    assert "clock" not in err
    texts.append(out)
  assert len({text.split()[0] for text in texts}) == 3
  assert abs(int(texts[-1].split()[-1]) - time.time()) < 30
  folder = linux.cache / "layers"
  state = folder / (row["name"] + ".state")
  data = state.read_bytes()
  stat = state.stat()
  state.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
  os.utime(state, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  damaged = works(linux(*warm("freebsd", "x86-64", "echo fine")))
  assert damaged.stdout == "fine\n" and "cannot be used: " in damaged.stderr
  works(linux("clean", "--all"))
  assert list(folder.iterdir()) == []


def test_a_warm_start_on_arm64_with_a_key_in_a_terminal(linux):
  works(linux(*warm("openbsd", "arm64", "true")))
  port = str(free_port())
  words = (
    "run",
    "--rm",
    "--warm",
    *LIGHT,
    "--ssh-port",
    port,
    "--platform",
    "arm64",
    "openbsd",
    "1",
  )
  terminal = Terminal(linux.command(*words), linux.env)
  try:
    terminal.until(b"guest# ")
    terminal.type(b"echo $((6 * 7))\r")
    terminal.until(b"42")
    terminal.type(b"\x01x")
    assert terminal.end() == 0
  finally:
    terminal.close()
  assert b" is booting" not in terminal.shown
  works(linux("clean", "--all"))


def test_a_guest_that_is_kept_and_boots_while_its_image_comes(tmp_path, server, real_home):
  """It powers itself off, and what it wrote is there after the re-base; the base is the asset."""
  base = real_home / ".cache" / "qvm" / "base"
  name = "netbsd-1-x86-64"
  linux = Qvm(real_home, ROOT / "qvm.py", server)
  for path in base.glob(name + "*") if base.exists() else ():
    path.unlink()
  server.clear_log()
  server.rate = 3e6
  try:
    sync = ("--stream", "--sync", str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "in").write_text("carried\n")
    words = run("netbsd", "x86-64", "cat in >out; echo kept >/mnt/kept; exit 3", options=sync)
    first = linux(*words)
  finally:
    server.rate = None
  assert first.returncode == 3, first.stderr
  assert "the guest runs while its image comes" in first.stderr
  assert "asking " in first.stderr and "SIGTERM" not in first.stderr
  log = linux.cache / "instances" / (name + ".console.log")
  assert "linux guest powers off" in log.read_text()
  assert (tmp_path / "work" / "out").read_text() == "carried\n"
  second = linux(*run("netbsd", "x86-64", "cat", "/mnt/kept"))
  assert (second.returncode, second.stdout) == (0, "kept\n"), second.stderr
  asset = server.find("netbsd-builder", "v1.0.0").assets[name + ".qcow2"].blob.content
  assert (base / (name + ".qcow2")).read_bytes() == asset.read_bytes()
  works(linux("rm", name))


# --- Prepared machines -----------------------------------------------------------------------


def prepared(linux):
  """The names of the prepared disks, whose qcow2 and backing files are sound."""
  folder = linux.cache / "layers"
  names = sorted(path.name for path in folder.glob("*-prepared-*.qcow2"))
  for name in names:
    subprocess.run(["qemu-img", "check", "-q", str(folder / name)], check=True)
  return names


def test_a_machine_is_set_up_once(linux, tmp_path):
  """What the scripts wrote is there later, takes no more than that, and the disk is sound."""
  (tmp_path / "one.sh").write_text(
    "echo one says >&2; dd if=/dev/urandom of=/mnt/data bs=1M count=20\n"
    "md5sum </mnt/data >/mnt/sum; dd if=/dev/zero of=/mnt/gone bs=1M count=460; sync\n"
    "rm /mnt/gone; fstrim /mnt\n"
  )
  (tmp_path / "two.sh").write_text("cat /mnt/sum; echo $WORD >/mnt/word\n")
  pull = ("pull", *LIGHT, "--platform", "x86-64")
  one = ("--install", "hello", "--prepare", str(tmp_path / "one.sh"), "-e", "WORD=kept")
  line = "hello; md5sum </mnt/data | cmp - /mnt/sum && cat /mnt/word 2>/dev/null; ls /mnt/gone"
  first = works(linux(*pull, *one, "freebsd", "1"))
  assert "one says\n" in first.stderr and "installed hello\n" in first.stderr, first.stderr
  (name,) = prepared(linux)
  stat = (linux.cache / "layers" / name).stat()
  assert 20 << 20 < stat.st_blocks * 512 < 26 << 20
  both = (*one, "--prepare", str(tmp_path / "two.sh"))
  second = linux(*run("freebsd", "x86-64", line, options=("--rm", *both)))
  assert second.stdout == "this is hello\nkept\n", second.stderr
  assert "installed" not in second.stderr and len(prepared(linux)) == 2
  (upper,) = set(prepared(linux)) - {name}
  assert (linux.cache / "layers" / upper).stat().st_blocks * 512 < 2 << 20
  works(linux("clean", "--all"))
  assert prepared(linux) == []


def test_a_warm_start_of_a_prepared_machine(linux):
  """The checkpoint and the prepared disk come of one boot."""
  install = ("--install", "hello")
  first = works(linux(*warm("freebsd", "x86-64", "hello", options=install)))
  assert first.stdout == "this is hello\n" and first.stderr.count("its console goes to") == 1
  for _ in range(2):
    note = "hello; ls /mnt/mine; echo >/mnt/mine"
    again = works(linux(*warm("freebsd", "x86-64", note, options=install), timeout=120))
    assert again.stdout == "this is hello\n" and "is booting" not in again.stderr
  (name,) = prepared(linux)
  cold = linux(*run("freebsd", "x86-64", "hello", options=("--rm", *install)))
  assert cold.stdout == "this is hello\n" and "installed" not in cold.stderr
  unknown = linux(*warm("freebsd", "x86-64", "true", options=("--install", "no-such")))
  assert unknown.returncode == 125
  assert "No packages available to install matching 'no-such'" in unknown.stderr.splitlines()[-1]
  assert prepared(linux) == [name] and len(list((linux.cache / "layers").iterdir())) == 6
  works(linux("clean", "--all"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_full_while_a_machine_is_set_up(linux, tmp_path):
  """QEMU pauses the guest, which would otherwise hang for as long as the scripts may take."""
  works(linux("clean", "--all"))
  works(linux("pull", "--platform", "x86-64", "freebsd", "1"))
  disk = SmallDisk(linux.cache / "instances")
  disk.mount("24m")
  try:
    (tmp_path / "much.sh").write_text("dd if=/dev/urandom of=/mnt/much bs=1M count=40; sync\n")
    words = run(
      "freebsd", "x86-64", "true", options=("--rm", "--prepare", str(tmp_path / "much.sh"))
    )
    result = linux(*words)
    assert result.returncode == 125 and "the disk is full" in result.stderr.splitlines()[-1]
    assert os.listdir(linux.cache / "instances") == [] and prepared(linux) == []
  finally:
    disk.unmount()
