"""QEMU that fails, memory and disks that are too small: what qvm makes of it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import guests
import pytest
from release_server import ReleaseServer
from support import (
  DEADLINE,
  FREEBSD,
  ROOT,
  STAND_IN,
  Qvm,
  end_processes,
  fill,
  free_port,
  furnish,
  processes_of,
  stand_in_tar,
  wait_for,
  works,
)
from support_machines import SmallDisk, disk_was_full, small_cache

import qvm as qvm_source

RUN = ("run", "--rm", "freebsd", "15.1")
ME = "qemu-system-x86_64: "
# What a Linux without a usable /dev/kvm says with the default accelerators, and runs on.
NO_HVF = ME + "invalid accelerator hvf\n"
DENIED = (
  "Could not access KVM kernel module: Permission denied\n"
  f"{ME}failed to initialize kvm: Permission denied\n"
)
FELL_BACK = f"{NO_HVF}{DENIED}{ME}falling back to tcg\n"
WITH_KVM = f"{NO_HVF}{ME}falling back to KVM\n"
SLOWER, GROUP, CHMOD = "slower", "sudo usermod -aG kvm $USER", "sudo chmod o+rw /dev/kvm"

# What QEMU's words are to be explained with: its last words, its end, and what qvm names.
CAUSES = {
  "KVM broken": (
    "error: failed to set MSR 0x10a to 0x69\n"
    f"{ME}../target/i386/kvm/kvm.c:3183: kvm_buf_set_msrs: Assertion "
    "`ret == cpu->kvm_msr_buf->nmsrs' failed.\n",
    {"signal": signal.SIGABRT},
    ["KVM", "--accel tcg"],
  ),
  "KVM broken elsewhere": (
    f"{ME}../accel/kvm/kvm-all.c:2655: kvm_init: Assertion `TARGET_PAGE_SIZE <= 1' failed.\n",
    {"signal": signal.SIGABRT},
    ["KVM", "--accel tcg"],
  ),
  "KVM denied": (DENIED, {"exit": 1}, ["/dev/kvm", GROUP, CHMOD]),
  "KVM missing": (
    "Could not access KVM kernel module: No such file or directory\n"
    f"{ME}failed to initialize kvm: No such file or directory\n",
    {"exit": 1},
    ["--accel tcg"],
  ),
  "KVM busy": (
    "ioctl(KVM_CREATE_VM) failed: 16 Device or resource busy\n"
    f"{ME}failed to initialize kvm: Device or resource busy\n",
    {"exit": 1},
    ["--accel tcg"],
  ),
  "no accelerator": (f"{ME}invalid accelerator kvm\n", {"exit": 1}, ["--accel tcg"]),
  "memory": (
    f"{ME}cannot set up guest memory 'pc.ram': Cannot allocate memory\n",
    {"exit": 1},
    ["memory", "-m 2G"],
  ),
  "port": (
    f"{ME}-netdev user,id=user.0,hostfwd=tcp:127.0.0.1:2847-:22: "
    "Could not set up host forwarding rule 'tcp:127.0.0.1:2847-:22'\n",
    {"exit": 1},
    ["port", "--ssh-port"],
  ),
  "image locked": (
    f'{ME}-device virtio-blk-pci,drive=drive0,bootindex=0: Failed to get "write" lock\n'
    "Is another process using the image [/home/x/.cache/qvm/instances/vm.qcow2]?\n",
    {"exit": 1},
    ["another QEMU", "--name"],
  ),
  "base locked": (
    f'{ME}-drive if=none,file=x: Failed to get shared "write" lock\n'
    "Is another process using the image [x]?\n",
    {"exit": 1},
    ["another QEMU"],
  ),
  "disk full": (
    f"{ME}Could not write qcow2 header: No space left on device\n",
    {"exit": 1},
    ["disk is full", "qvm clean"],
  ),
  "quota": (f"{ME}Could not write: Disk quota exceeded\n", {"exit": 1}, ["disk is full"]),
  "rom": (
    f'{ME}-device virtio-net,netdev=user.0: failed to find romfile "efi-virtio.rom"\n',
    {"exit": 1},
    ["firmware", "qvm clean --all"],
  ),
  "amx": (
    f"{ME}can't apply global max-x86_64-cpu.amx-tile=off: Property 'max-x86_64-cpu.amx-tile' not "
    "found\n",
    {"exit": 1},
    ["QEMU is too old", "7.1", "--accel tcg"],
  ),
  "bios": ("qemu: could not load PC BIOS '/x/bios'\n", {"exit": 1}, ["firmware", "clean --all"]),
  "uefi": (
    f"{ME}-drive if=pflash,file=x: Could not open '/x/qemu/x86_64/share/qemu/uefi.fd': No such "
    "file or directory\n",
    {"exit": 1},
    ["firmware", "clean --all"],
  ),
}


@pytest.fixture
def stand_in(offline, image):
  """qvm with the stand-in as its QEMU, and no server."""
  furnish(offline.cache, STAND_IN, image)
  yield offline
  end_processes(offline.cache)


def said(result):
  """The lines that are qvm's own, not QEMU's."""
  return [line for line in result.stderr.splitlines() if line.startswith("qvm: ")]


@pytest.mark.parametrize("cause", CAUSES)
def test_causes(stand_in, cause):
  words, end, named = CAUSES[cause]
  stand_in.play(stderr=words, **end)
  result = stand_in(*RUN)
  assert result.returncode == (128 + end["signal"] if "signal" in end else end["exit"])
  assert words in result.stderr  # QEMU's own, as they are
  after = "\n".join(said(result))
  for text in named:
    assert text in after
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize("before", [WITH_KVM, FELL_BACK], ids=["with KVM", "fell back"])
@pytest.mark.parametrize("cause", [it for it in CAUSES if "KVM" not in it and "accel" not in it])
def test_what_came_before_is_not_the_cause(cause, before):
  """With the default accelerators QEMU grumbles at each start, and goes on."""
  words, _, named = CAUSES[cause]
  explained = "\n".join(qvm_source.explain(before + words))
  for text in named:
    assert text in explained


HARMLESS = {
  "nothing": "",
  "unknown words": f"{ME}-nonsense: invalid option\n",
  "with KVM": WITH_KVM,
  "fell back": FELL_BACK,
  "a signal": f"{FELL_BACK}{ME}terminating on signal 15 from pid 1 (x)\n",
}


def test_a_fault_of_our_own_is_called_so(offline):
  code = "def broken(options): raise KeyError('not there')\nqvm.CALLS['list'] = broken"
  result = offline("list", code=code)
  assert (result.returncode, result.stdout) == (1, "")
  bug, report = result.stderr.splitlines()
  assert re.search(r"bug in qvm [0-9.]+: KeyError: 'not there'", bug) and "QVM_DEBUG=1" in report
  result = offline("list", code=code, env={"QVM_DEBUG": "1"})
  assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize("words", HARMLESS)
def test_no_cause_is_made_up(words):
  """QEMU ran, and ended for another reason, such as a kill."""
  assert qvm_source.explain(HARMLESS[words]) == []


def test_a_killed_qemu_under_tcg(stand_in):
  stand_in.play(stderr=FELL_BACK, signal=signal.SIGKILL)
  result = stand_in(*RUN)
  assert result.returncode == 137
  assert not any("QEMU failed: " in line for line in said(result))
  assert result.stderr.count(GROUP) == 1


def test_no_cause_of_a_good_end(stand_in):
  for _, (words, _, _) in sorted(CAUSES.items())[:3]:
    stand_in.play(stderr=words, exit=0)
    result = stand_in(*RUN)
    assert result.returncode == 0
    assert not any("QEMU failed: " in line for line in said(result))


def test_many_words(stand_in):
  """The cause stands at the end of much that was said before."""
  words = "qemu: warning: something\n" * 4000 + CAUSES["port"][0]
  stand_in.play(stderr=words, exit=1)
  result = stand_in(*RUN)
  assert words in result.stderr
  assert "--ssh-port" in "\n".join(said(result))


def test_words_that_are_no_text(offline, image):
  furnish(offline.cache, "#!/bin/sh\nprintf 'bad \\377\\376 words\\n' >&2\nexit 1\n", image)
  process = offline.start(*RUN)
  with process.stderr.buffer as stream:
    words = stream.read()
  process.stdout.close()
  assert process.wait(DEADLINE) == 1
  assert b"bad \xff\xfe words\n" in words


def test_falling_back_is_said_while_it_runs(stand_in):
  stand_in.play(stderr=FELL_BACK, wait=True)
  process = stand_in.start(*RUN)
  lines = []
  while not any(CHMOD in line for line in lines) or ME + "falling back to tcg\n" not in lines:
    lines.append(process.stderr.readline())
    assert lines[-1], lines
  process.terminate()
  _, rest = process.communicate(timeout=DEADLINE)
  text = "".join(lines) + rest
  assert process.returncode == 143
  assert text.count(SLOWER) == text.count(GROUP) == 1
  assert FELL_BACK in re.sub(r"(?m)^qvm: .*\n", "", text)


def test_falling_back_is_said_once_however_it_comes(capfd):
  text = (FELL_BACK + ME + "warning: more\n").encode()
  for cut in range(0, len(text), 7):
    relay = qvm_source.Relay(SimpleNamespace(stdin=None), None, None, lambda: False)
    for piece in (text[:cut], text[cut:], text[:cut]):
      relay.complain(piece)
    captured = capfd.readouterr().err
    assert captured.count(SLOWER) == 1, cut


def test_falling_back_for_other_reasons_is_not_about_permissions():
  assert qvm_source.fell_back(WITH_KVM) == []
  missing = CAUSES["KVM missing"][0] + f"{ME}falling back to tcg\n"
  assert not any(GROUP in line for line in qvm_source.fell_back(missing))
  assert qvm_source.fell_back(FELL_BACK)


# --- Real words of real QEMU -----------------------------------------------------------------


@pytest.fixture
def real(tmp_path, real_cache):
  home = tmp_path / "home"
  home.mkdir()
  qvm = Qvm(home, ROOT / "qvm.py")
  qvm.env["QVM_CACHE_DIR"] = str(real_cache)
  qvm.cache = real_cache
  yield qvm
  end_processes(real_cache)


def wait_for_line(process, stream, text):
  """Read a stream up to the line with that text; False when it ends before, or takes too long."""
  watch = threading.Timer(DEADLINE, process.terminate)
  watch.start()
  found = any(text in line for line in iter(stream.readline, ""))
  watch.cancel()
  return found


def real_run(*more, accel="tcg"):
  run = ["run", "--rm", "--accel", accel, "-m", "256M", "--ssh-port", str(free_port())]
  return [*run, *(f"--qemu-arg={word}" for word in more), "freebsd", "15.0"]


def test_real_words_for_an_accelerator(real):
  result = real(*real_run(accel="hvf"))
  assert result.returncode == 1
  assert "--accel tcg" in "\n".join(said(result))


def test_real_words_for_a_port(real):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    forward = f"user,id=x,hostfwd=tcp:127.0.0.1:{taken.getsockname()[1]}-:22"
    result = real(*real_run("-netdev", forward))
  assert result.returncode == 1
  assert "--ssh-port" in "\n".join(said(result))


@pytest.mark.parametrize(
  "words", [("-device", "virtio-net,romfile=none.rom"), ("-bios", "/nowhere/bios")]
)
def test_real_words_for_firmware(real, words):
  result = real(*real_run(*words))
  assert result.returncode == 1
  assert "clean --all" in "\n".join(said(result))


def test_real_words_for_an_image_in_use(real, real_cache):
  process = real.start(*real_run(), "--name", "locked")
  assert wait_for_line(process, process.stdout, "hanging")
  disk = real_cache / "instances" / "locked.qcow2"
  result = real(*real_run("-drive", f"if=none,id=x,file={disk}", "-device", "virtio-blk,drive=x"))
  process.terminate()
  process.communicate(timeout=DEADLINE)
  assert result.returncode == 1
  assert "another QEMU uses this disk" in result.stderr


# --- Memory ----------------------------------------------------------------------------------

GIB = 1 << 30


@pytest.mark.parametrize(
  "memory, available, warned",
  [
    ("6G", 8 * GIB, False),
    ("6G", 6 * GIB, False),
    ("6G", 6 * GIB - 1, True),
    ("6144", 6 * GIB, False),
    ("6144", 6 * GIB - 1, True),
    ("512M", GIB // 2, False),
    ("512M", GIB // 2 - 1, True),
    ("4T", 4096 * GIB - 1, True),
    ("4T", 4096 * GIB, False),
    ("6G", 0, True),
    ("6G", None, False),
  ],
)
def test_memory_warning(memory, available, warned):
  text = qvm_source.memory_warning(memory, available)
  assert bool(text) == warned
  assert not warned or "-m" in text


def test_memory_warning_names_both():
  text = qvm_source.memory_warning("6G", 2 * GIB)
  assert "6.4 GB" in text and "2.1 GB" in text


@pytest.mark.parametrize(
  "text, available",
  [
    ("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:     2048 kB\nBuffers: 1 kB\n", 2 << 20),
    ("MemAvailable: 0 kB\n", 0),
  ],
)
def test_available_memory(tmp_path, text, available):
  (tmp_path / "meminfo").write_text(text)
  assert qvm_source.available_memory(str(tmp_path / "meminfo")) == available


@pytest.mark.parametrize("text", [None, "", "MemFree: 10 kB\n", "MemAvailable:\n", "\0\n"])
def test_available_memory_where_nobody_tells(tmp_path, text):
  if text is not None:
    (tmp_path / "meminfo").write_text(text)
  all_there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  assert qvm_source.available_memory(str(tmp_path / "meminfo")) == all_there_is


@pytest.mark.parametrize("words", ["raise ValueError('unrecognized name')", "raise OSError()"])
def test_a_system_that_tells_of_no_memory_gets_no_warning(stand_in, words):
  """As macOS with Python before 3.13."""
  code = f"""
def sysconf(name):
  {words}
os.sysconf, memory = sysconf, qvm.available_memory
qvm.available_memory = lambda path: memory("/nowhere")
"""
  assert "of memory" not in works(stand_in(*RUN, "-m", "4T", code=code)).stderr


def test_too_much_memory_is_said_and_tried(stand_in):
  stand_in.play(stdout="it runs\n", exit=3)
  result = stand_in(*RUN, "-m", "4T")
  assert (result.returncode, result.stdout) == (3, "it runs\n")
  (line,) = [line for line in said(result) if "memory" in line]
  assert "4398 GB" in line
  assert "-m" in line


def test_little_memory_is_not_mentioned(stand_in):
  result = stand_in(*RUN, "-m", "64M")
  assert result.returncode == 0
  assert not any("memory" in line for line in said(result))


# --- Disks without room ----------------------------------------------------------------------

MB = 1000 * 1000


@pytest.fixture
def disk(tmp_path):
  """The cache folder of the fixtures below, on a disk of 8 MB."""
  with small_cache(tmp_path / "home", 8 * MB) as disk:
    yield disk


@pytest.fixture
def full_server(image, tools_tar):
  """A release server whose FreeBSD 15.1 and whose QEMU take 5 MB each."""
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    big = image + os.urandom(5 * MB - len(image))
    server.replace_asset("freebsd-builder", "v0.16.0", f"{FREEBSD}.qcow2", big)
    qemu = stand_in_tar(filler=os.urandom(5 * MB))
    server.replace_asset("resources", "v2.0.0", "qemu-system-x86_64-linux.tar", qemu)
    yield server


@pytest.fixture
def small(tmp_path, full_server, disk, image):
  """qvm on the small disk; all but the image of FreeBSD 15.1 is there, and 15.0 as well."""
  qvm = Qvm(tmp_path / "home", ROOT / "qvm.py", full_server)
  furnish(qvm.cache, STAND_IN, image)
  (qvm.cache / "base" / f"{FREEBSD}.qcow2").rename(qvm.cache / "base" / BEFORE)
  yield qvm
  end_processes(qvm.cache)


BEFORE = "freebsd-15.0-x86-64.qcow2"
PULL = ("pull", "freebsd", "15.1")


def missing(result):
  """The bytes that qvm says are missing."""
  match = re.search(r"(?m)([0-9.]+) ?(B|kB|MB|GB) (more|are missing|missing)", result.stderr)
  assert match, result.stderr
  return float(match.group(1)) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[match.group(2)]


def still_good(qvm, image):
  """What was there before can still be used."""
  assert (qvm.cache / "base" / BEFORE).read_bytes() == image
  qvm.play(exit=9)
  assert qvm("run", "--rm", "freebsd", "15.0").returncode == 9


def test_a_download_that_has_no_room_is_refused_before(small, disk, full_server, image):
  disk.fill(leave=3 * MB)
  result = small(*PULL)
  assert disk_was_full(result)
  assert abs(missing(result) - 2 * MB) < 0.2 * MB
  assert f"{FREEBSD}.qcow2" in result.stderr
  assert "qvm clean" in result.stderr
  still_good(small, image)
  assert not (small.cache / "base" / f"{FREEBSD}.qcow2").exists()
  disk.empty()
  assert small(*PULL).returncode == 0
  assert (small.cache / "base" / f"{FREEBSD}.qcow2").stat().st_size == 5 * MB


def test_only_the_rest_of_a_download_needs_room(small, disk, full_server):
  stalled = full_server.fault(f"{FREEBSD}.qcow2", pause=threading.Event(), pause_at=4 * MB)
  process = small.start(*PULL)
  assert stalled.reached.wait(DEADLINE)
  part = small.cache / "downloads" / f"{FREEBSD}.qcow2" / "part"
  wait_for_size(part, 3 * MB)
  process.terminate()
  process.communicate(timeout=DEADLINE)
  stalled.pause.set()
  there = (part.parent / "map").read_bytes().count(1) * qvm_source.BLOCK_BYTES
  assert there > 3 * MB - (1 << 18)
  disk.fill(leave=5 * MB - there + 100_000)
  result = small(*PULL)
  assert result.returncode == 0, result.stderr


def wait_for_size(path, size):
  deadline = time.monotonic() + DEADLINE
  while not path.exists() or path.stat().st_size < size:
    assert time.monotonic() < deadline, path
    time.sleep(0.01)


def test_downloads_that_have_room_only_one_by_one(small, disk, full_server):
  qemu = small.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  qemu.unlink()
  disk.fill(leave=7 * MB)
  result = small(*PULL)
  assert disk_was_full(result)
  assert missing(result) < 4 * MB
  assert not qemu.exists()


def test_a_disk_that_fills_up_while_a_download_runs(small, disk, full_server, image):
  stalled = full_server.fault(f"{FREEBSD}.qcow2", pause=threading.Event(), pause_at=2 * MB)
  process = small.start(*PULL)
  assert stalled.reached.wait(DEADLINE)
  wait_for_size(small.cache / "downloads" / f"{FREEBSD}.qcow2" / "part", 1 * MB)
  disk.fill(leave=1 * MB)
  stalled.pause.set()
  _, err = process.communicate(timeout=DEADLINE)
  result = subprocess.CompletedProcess([], process.returncode, "", err)
  assert disk_was_full(result)
  assert 1 * MB < missing(result) < 4 * MB
  assert disk.free() < 200_000
  disk.empty()
  still_good(small, image)
  full_server.clear_log()
  result = small(*PULL)
  assert result.returncode == 0, result.stderr
  (request,) = [it for it in full_server.requests(f"{FREEBSD}.qcow2", "cdn") if it.status]
  assert request.status == 206  # it goes on where it stopped
  content = (small.cache / "base" / f"{FREEBSD}.qcow2").read_bytes()
  assert len(content) == 5 * MB and content.startswith(image)


def test_a_disk_that_is_full_to_the_brim(small, disk, full_server, image):
  """Not even the note of the download can be written."""
  disk.fill()
  result = small(*PULL)
  assert disk_was_full(result)
  assert 4 * MB < missing(result) < 6 * MB
  disk.empty()
  still_good(small, image)
  assert small(*PULL).returncode == 0


def test_an_archive_that_has_no_room_to_be_unpacked(small, disk, full_server, image):
  """There is room for the archive, but not for what is in it."""
  qemu = small.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  qemu.unlink()
  disk.fill(leave=6 * MB)
  result = small("pull", "freebsd", "15.0")
  assert disk_was_full(result)
  assert 3 * MB < missing(result) < 5 * MB
  assert not qemu.exists()
  assert not [name for name in small.files() if "unpacked" in name]
  assert (small.cache / "base" / BEFORE).read_bytes() == image
  part = small.cache / "downloads" / "qemu-system-x86_64-linux.tar" / "part"
  assert part.stat().st_size > 5 * MB


@pytest.mark.parametrize("leave", [0, 8192, 60000])
def test_an_overlay_that_has_no_room(small, disk, image, leave):
  small("pull", "freebsd", "15.0")
  disk.fill(leave=leave)
  result = small("run", "--name", "vm", "freebsd", "15.0")
  assert result.returncode == 1
  assert "No space left" in result.stderr
  assert "Traceback" not in result.stderr and "bug in qvm" not in result.stderr
  assert processes_of(small.cache) == {}
  disk.empty()
  still_good(small, image)
  small.play(exit=7)
  assert small("run", "--name", "vm", "freebsd", "15.0").returncode == 7
  assert small("rm", "vm").returncode == 0
  assert not [name for name in small.files() if name.startswith("instances/")]


def test_detach_on_a_full_disk(small, disk):
  small("pull", "freebsd", "15.0")
  disk.fill()
  result = small("run", "--detach", "--boot-timeout", "0", "freebsd", "15.0")
  assert result.returncode == 1
  assert "Traceback" not in result.stderr and "bug in qvm" not in result.stderr
  assert processes_of(small.cache) == {}


def test_other_commands_on_a_full_disk(small, disk):
  small("pull", "freebsd", "15.0")
  small.play()
  assert small("run", "--name", "vm", "freebsd", "15.0").returncode == 0
  disk.fill()
  for words in (("list",), ("search", "freebsd"), ("clean", "--dry-run"), ("rm", "vm")):
    result = small(*words)
    assert result.returncode == 0, (words, result.stderr)


# --- A disk that fills up while the guest writes ---------------------------------------------


def test_disk_is_full(disk):
  """One write of Linux's, of 1.25 MiB, that does not fit leaves nearly as much free."""
  disk.resize("64m")
  for leave, full in ((12 * MB, False), (5 * MB // 4, True), (0, True)):
    disk.fill(leave)
    assert qvm_source.disk_is_full(str(disk.folder)) == full
    disk.empty()
  assert not qvm_source.disk_is_full(str(disk.folder / "nowhere"))


def test_a_full_disk_is_said_once_while_nothing_comes(capfd):
  asked = threading.Event()

  def full():
    asked.set()
    return True

  source, sink = os.pipe()
  process = subprocess.Popen(["cat"], stdin=source, stdout=subprocess.PIPE, bufsize=0)
  os.close(source)
  relay = qvm_source.Relay(process, None, None, full)
  thread = threading.Thread(target=relay.run)
  thread.start()
  assert asked.wait(DEADLINE)
  with contextlib.suppress(OSError):
    os.write(sink, b"goes on\n")
  os.close(sink)
  thread.join(DEADLINE)
  process.stdout.close()
  assert process.wait() == 0
  out, err = capfd.readouterr()
  assert out == "goes on\n"
  assert err.count("disk is full") == 1


def test_a_guest_that_fills_the_disk(real, real_cache, tmp_path):
  """Only instances/ lies on the small disk; QEMU stops the guest at a write without room."""
  cache = tmp_path / "cache"
  for name in ("qemu", "bin"):
    (cache / name).mkdir(parents=True)
    (cache / name).rmdir()
    (cache / name).symlink_to(real_cache / name)
  (cache / "base").mkdir()
  base = cache / "base" / f"{FREEBSD}.qcow2"
  guests.to_qcow2(guests.counting_disk(), base)
  (cache / "instances").mkdir(mode=0o700)
  small = SmallDisk(cache / "instances")
  real.env["QVM_CACHE_DIR"] = str(cache)
  run = ["run", "--name", "vm", "--accel", "tcg", "-m", "256M", "--ssh-port", str(free_port())]
  run += ["freebsd", "15.1"]
  small.mount(16 * MB)
  try:
    process = real.start(*run[:-2], "--qemu-arg=-S", *run[-2:])  # the CPU stands still
    wait_for(lambda: any("-nographic" in words for words in processes_of(cache).values()))
    process.terminate()  # the overlay is made, and empty
    process.communicate(timeout=DEADLINE)
    small.fill(leave=24 << 10)
    process = real.start(*run)
    assert wait_for_line(process, process.stderr, "disk is full")
    small.empty()
    process.terminate()
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 143
    assert "boots:" not in out and "disk error" not in out
    assert "disk is full" not in err
    result = real(*run)
    assert result.returncode == 0 and "boots: 00" in result.stdout
  finally:
    end_processes(cache)
    small.unmount()
