"""The best accelerator that works: passed over when it fails, remembered, and shown by doctor.

The QEMU of these tests is a stand-in that fails with KVM as $PICKY says; on Macs see test_mac.py.
"""

import json
import os
import re
import shlex
import signal
import sys
import types

import pytest
import ssh_guest
from support import (
  STAND_IN,
  end_processes,
  free_port,
  on_full_disk,
  processes_of,
  works,
)
from support_machines import Guests

import qvm as qvm_source

GUEST = ("--platform", "x86-64", "freebsd", "15.1")
RUN = ("run", "--rm", *GUEST)
ASSERTION = "kvm.c:3183: kvm_buf_set_msrs: Assertion `ret == cpu->kvm_msr_buf->nmsrs' failed.\n"

# $PICKY, JSON: "log" gets a line for each start, its accelerators; with kvm among them, QEMU says
# "words" and ends by "signal" or with "exit", or "waits"; "writes": the guest has written before.
# "hangs": so many starts, with whatever accelerator, hang. "guests": it fails with a guest only.
PICKY = r"""
import json, os, re, resource, signal, sys
picky = json.loads(os.environ.get("PICKY") or "{}")
words = " ".join(sys.argv)
asked = (re.findall(r"[ ,-]accel[ =]([a-z:]+)", words) or [""])[0]
if "--keep" not in sys.argv[1:2]:
  with open(picky["log"] + ".tries" * ("-qmp" in sys.argv), "a") as file:
    file.write(asked + "\n")
  with open(picky["log"]) as file:
    starts = len(file.readlines())
  if starts <= picky.get("hangs", 0):
    while True:
      signal.pause()
  tried = "-qmp" in sys.argv  # without a guest
  if "kvm" in asked and not picky.get("good") and not (tried and picky.get("guests")):
    if picky.get("writes"):
      disk = re.search(r"if=none,file=(\S+?),id=drive0", words).group(1)
      with open(disk, "ab") as file:
        file.write(b"x")
    sys.stderr.write(picky.get("words", ""))
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0)) # as QEMU's own ends
    while picky.get("waits") and not tried:
      signal.pause()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if picky.get("signal"):
      os.kill(os.getpid(), picky["signal"])
    sys.exit(picky.get("exit", int(tried)))
  if tried:
    sys.exit(0)
"""


class Picky:
  """qvm with a QEMU that is picky about its accelerator."""

  def __init__(self, qvm, folder, text=STAND_IN):
    self.qvm, self.log = qvm, folder / "starts"
    self.program = qvm.cache / "qemu/x86_64/bin/qemu-system-x86_64"
    head, _, rest = text.partition("\n")
    self.program.write_text(f"{head}\n{PICKY}\n{rest}")
    self.fails(words=ASSERTION, signal=signal.SIGABRT)

  def fails(self, **how):
    self.qvm.env["PICKY"] = json.dumps({"log": str(self.log), **how})

  def starts(self):
    """The accelerators of all starts so far."""
    return self.log.read_text().splitlines() if self.log.exists() else []

  def remembered(self):
    folder = self.qvm.cache / "accelerators"
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]

  def doctor(self):
    run = self.qvm("doctor", "--offline", "--json")
    return [check for check in json.loads(run.stdout) if check["name"] == "remembered"]


@pytest.fixture
def picky(full, tmp_path):
  full.play(stdout="it boots\n")
  yield Picky(full, tmp_path)
  end_processes(full.cache)


@pytest.fixture
def machines(full, tmp_path):
  """The same with an sshd for a guest."""
  picky = Picky(full, tmp_path, ssh_guest.program())
  (tmp_path / "tmp").mkdir()
  full.env["TMPDIR"] = str(tmp_path / "tmp")
  picky.guests = Guests(full, tmp_path / "guest")
  yield picky
  end_processes(full.cache)


def own(result):
  return [line[5:] for line in result.stderr.splitlines() if line.startswith("qvm: ")]


TABLE = "hvf:kvm:tcg"
# What QEMU says and how it ends when KVM is broken, and whether that is worth remembering.
FAILURES = {
  "assertion": ({"words": ASSERTION, "signal": signal.SIGABRT}, True),
  "in another file": (
    {"words": "../accel/kvm/kvm-all.c:2: kvm_x: Assertion `0' failed.\n", "signal": signal.SIGABRT},
    True,
  ),
  "no vCPU": ({"words": "qemu: kvm_init_vcpu failed: Invalid argument\n", "exit": 1}, True),
  "host CPU": (
    {"words": "The 'host' CPU type can only be used with KVM or HVF\n", "exit": 1},
    True,
  ),
  "paused": ({"words": "KVM: entry failed, hardware error 0x7\n", "waits": True}, True),
  "run failed": ({"words": "error: kvm run failed Bad address\n", "waits": True}, True),
  "no words": ({"signal": signal.SIGABRT}, False),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_accelerator_that_fails_is_passed_over(picky, failure):
  how, known = FAILURES[failure]
  picky.fails(**how)
  first = works(picky.qvm(*RUN))
  assert first.stdout == "it boots\n" and picky.starts() == [TABLE, "tcg"]
  [line] = [line for line in own(first) if "tcg" in line]
  assert "KVM" in line
  assert len([line for line in own(first) if line.startswith("ssh -p")]) == 1
  again = works(picky.qvm(*RUN))
  assert picky.starts()[2:] == (["tcg"] if known else [TABLE, "tcg"])
  assert any("doctor" in line for line in own(again)) == known
  assert len(picky.remembered()) == known
  assert list((picky.qvm.cache / "instances").iterdir()) == []


def test_what_a_guest_prints_or_does_is_not_remembered(picky):
  """A guest can say that too, and make KVM give up; QEMU without a guest tells."""
  picky.fails(words="error: kvm run failed Bad address\n", waits=True, guests=True)
  works(picky.qvm(*RUN))
  assert picky.starts() == [TABLE, "tcg"] and picky.remembered() == []


def test_no_room_to_remember_it(picky):
  first = works(on_full_disk(picky.qvm, RUN, "accelerators"))
  assert first.stdout == "it boots\n" and picky.starts() == [TABLE, "tcg"]
  assert picky.remembered() == []


def test_dry_run_shows_what_is_remembered(picky):
  def shown():
    return re.search(r"accel=(\S+)", works(picky.qvm("run", "--dry-run", *GUEST)).stdout).group(1)

  assert shown() == TABLE
  works(picky.qvm(*RUN))
  assert shown() == "tcg"
  picky.qvm.cache.rename(picky.qvm.home / "moved")
  picky.qvm.env["QVM_CACHE_DIR"] = str(picky.qvm.home / "moved")
  assert shown() == "tcg"


@pytest.mark.parametrize("accel", ["kvm", "kvm:tcg", TABLE])
def test_who_asks_for_an_accelerator_gets_it(picky, accel):
  result = picky.qvm(*RUN, "--accel", accel)
  assert result.returncode == 134 and picky.starts() == [accel]
  assert any("--accel tcg" in line for line in own(result)) and picky.remembered() == []
  works(picky.qvm(*RUN))
  assert picky.qvm(*RUN, "--accel", accel).returncode == 134, "also once that is known to fail"
  assert picky.starts()[3:] == [accel]


@pytest.mark.parametrize("how", [
  {"words": ASSERTION, "signal": signal.SIGABRT, "writes": True},
  {"words": "cannot set up guest memory 'pc.ram': Cannot allocate memory\n", "exit": 1},
  {"signal": signal.SIGSEGV},
  {"signal": signal.SIGKILL},
  {"exit": 3},
], ids=["after a write", "memory", "SIGSEGV", "SIGKILL", "exit"])  # fmt: skip
def test_what_is_no_failure_of_an_accelerator_ends_the_run(picky, how):
  picky.fails(**how)
  result = picky.qvm(*RUN)
  assert result.returncode == (128 + how["signal"] if "signal" in how else how["exit"])
  assert picky.starts() == [TABLE] and picky.remembered() == []


def test_another_qemu_is_tried_again(picky):
  works(picky.qvm(*RUN))
  os.utime(picky.program, (1, 1))
  works(picky.qvm(*RUN))
  assert picky.starts() == [TABLE, "tcg", TABLE, "tcg"]


def test_what_is_remembered_of_a_qemu_that_is_gone(picky):
  works(picky.qvm(*RUN))
  [about] = picky.remembered()
  picky.program.unlink()
  assert picky.doctor() == [] and picky.remembered() == [about]


def test_doctor_shows_what_still_fails_and_forgets_what_does_not(picky):
  assert picky.doctor() == []
  works(picky.qvm(*RUN))
  for _ in range(2):
    [check] = picky.doctor()
    assert check["state"] == "warning" and "kvm_buf_set_msrs" in check["text"]
  picky.fails(good=True)
  [check] = picky.doctor()
  assert check["state"] == "ok" and "next run" in check["text"]
  assert picky.doctor() == [] and picky.remembered() == []
  before = len(picky.starts())
  works(picky.qvm(*RUN))
  assert picky.starts()[before:] == [TABLE]


@pytest.mark.parametrize("failure", ["assertion", "paused"])
def test_a_command_in_the_guest(machines, failure):
  machines.fails(**FAILURES[failure][0])
  result = machines.guests.run("echo out; exit 7")
  assert (result.returncode, result.stdout) == (7, "out\n"), result.stderr
  assert machines.starts() == [TABLE, "tcg"]
  assert len([line for line in own(result) if "is booting" in line]) == 1
  assert machines.guests.nothing_left()


def test_a_machine_in_the_background_keeps_its_disk(machines):
  machines.guests.up("vm")
  assert machines.starts() == [TABLE, "tcg"]
  record = json.loads((machines.qvm.cache / "instances/vm.json").read_text())
  assert "--accel" not in record["words"], "restart would then ask for it"
  assert works(machines.qvm("ssh", "vm", "--", "echo up")).stdout == "up\n"
  works(machines.qvm("stop", "vm"))
  machines.fails(words=ASSERTION, signal=signal.SIGABRT, good=True)
  works(machines.qvm("run", "-d", "--name", "vm", "--ssh-port", str(free_port()), *GUEST))
  works(machines.qvm("stop", "vm"))
  assert machines.starts()[2:] == ["tcg"]


def test_a_warm_start(machines):
  result = machines.guests.run("echo fine", options=("--warm",))
  assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr
  assert machines.starts() == [TABLE, "tcg", "tcg"]  # the last one resumes
  again = machines.guests.run("echo again", options=("--warm",))
  assert again.stdout == "again\n" and "is booting" not in again.stderr
  assert machines.guests.nothing_left()


def test_a_guest_that_runs_while_its_image_comes(no_image, server, tmp_path):
  picky = Picky(no_image, tmp_path)
  no_image.play(stdout="it boots\n")
  server.rate = 1e6
  result = works(no_image("run", "--stream", *GUEST))
  assert result.stdout == "it boots\n" and picky.starts() == [TABLE, "tcg"]
  assert "digest is checked" in result.stderr
  works(no_image("run", *GUEST))
  assert processes_of(no_image.cache) == {}


# --- A QEMU once for all, and Linux on arm64 -----------------------------------------------------


def test_a_qemu_once_for_all(picky, tmp_path):
  folder = tmp_path / "own"
  folder.mkdir()
  for name, source in (("qemu-system-x86_64", picky.program), ("qemu-img", None)):
    text = source.read_text() if source else (picky.qvm.cache / "bin/qemu-img").read_text()
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  env = {"QVM_QEMU_X86_64": str(folder / "qemu-system-x86_64")}
  shown = works(picky.qvm("run", "--dry-run", *GUEST, env=env)).stdout
  assert shlex.split(shown)[0] == env["QVM_QEMU_X86_64"]
  named = {"QVM_QEMU_X86_64": "qemu-system-x86_64", "PATH": f"{folder}:{os.environ['PATH']}"}
  assert shlex.split(works(picky.qvm("run", "--dry-run", *GUEST, env=named)).stdout)[0] == str(
    folder / "qemu-system-x86_64"
  )
  given = works(picky.qvm("run", "--dry-run", "--qemu", sys.executable, *GUEST, env=env)).stdout
  assert shlex.split(given)[0] == sys.executable
  arm = works(
    picky.qvm("run", "--dry-run", "--platform", "arm64", "freebsd", "15.1", env=env)
  ).stdout
  assert shlex.split(arm)[0].startswith(str(picky.qvm.cache))
  works(picky.qvm(*RUN, env=env))
  assert picky.remembered()[0]["qemu"] == env["QVM_QEMU_X86_64"]
  result = picky.qvm("run", "--dry-run", *GUEST, env={"QVM_QEMU_X86_64": "/no/qemu"})
  assert result.returncode == 2 and "QVM_QEMU_X86_64" in result.stderr
  works(picky.qvm("list", env={"QVM_QEMU_X86_64": "/no/qemu"}))


# The host has KVM, or not, and that CPU.
HOST = """
kvm = {kvm}
real, uname = os.access, os.uname()
os.access = lambda path, mode, **more: kvm if path == "/dev/kvm" else real(path, mode, **more)
os.uname = lambda: os.uname_result((uname[0], uname[1], uname[2], uname[3], "{machine}"))
"""


@pytest.mark.parametrize("guest, kvm, accel, cpu", [
  (("freebsd", "15.1"), True, (), "host"),
  (("openbsd", "7.9"), True, (), "host"),
  (("netbsd", "10.1"), True, ("--accel", "kvm"), "host"),
  (("freebsd", "15.1"), False, (), "cortex-a57"),
  (("freebsd", "15.1"), True, ("--accel", "tcg"), "cortex-a57"),
  (("freebsd", "15.1"), True, ("--accel", "tcg:kvm"), "cortex-a57"),
  (("--platform", "x86-64", "freebsd", "15.1"), True, (), "max"),
])  # fmt: skip
def test_on_arm64_kvm_runs_the_hosts_own_cpu_only(offline, guest, kvm, accel, cpu):
  code = HOST.format(kvm=kvm, machine="aarch64")
  words = ["run", "--dry-run", "--qemu", sys.executable, *accel, *guest]
  run = offline(*words, code=code)
  assert run.returncode == 0, run.stderr
  argv = shlex.split(run.stdout)
  assert argv[argv.index("-cpu") + 1].split(",")[0] == cpu


# --- Patience ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, emulated, seconds", [
  (None, True, 1800), (None, False, 600), (5.0, True, 5), (0.0, False, 0),
])  # fmt: skip
def test_an_emulated_guest_has_more_time(given, emulated, seconds):
  machine = types.SimpleNamespace(
    options=qvm_source.Options(boot_timeout=given),
    facts=qvm_source.HostFacts(False, False, emulated=emulated),
  )
  assert qvm_source.Machine.patience.fget(machine) == seconds


@pytest.mark.parametrize("accel, told", [("kvm:tcg", True), ("tcg", False)])
@pytest.mark.parametrize("options", [(), ("--warm",), ("--install", "git")], ids=str)
def test_a_kvm_that_is_slow_is_named(picky, accel, told, options):
  """A KVM that is emulated itself starts each QEMU, but no guest boots with it in time."""
  picky.fails(good=True, hangs=9)
  words = ("run", "--rm", "--accel", accel, "--boot-timeout", "0", *options, *GUEST, "--", "true")
  failed = picky.qvm(*words, code=HOST.format(kvm=True, machine="x86_64"))
  assert failed.returncode == 125 and "--boot-timeout allows more time" in failed.stderr
  assert ("--accel tcg can be faster" in failed.stderr) == told


@pytest.mark.parametrize("terminal, shown", [(False, [30, 60, 95]), (True, [1, 2, 3])])
def test_a_wait_is_shown(monkeypatch, terminal, shown):
  """At a terminal each second, elsewhere each half minute, whenever it is asked."""
  clock, drawn = [1000.0], []
  monkeypatch.setattr(qvm_source, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
  monkeypatch.setattr(qvm_source.os, "isatty", lambda fd: terminal)
  monkeypatch.setattr(qvm_source.report, "draw", drawn.append)
  watch = qvm_source.BootWatch("vm", lambda: "Mounting root")
  for now in [0, 0.5, 1, 1.2, 2.1, 3, *range(4, 90)] if terminal else [0, 29, 30, 31, 60, 95]:
    clock[0] = 1000.0 + now
    watch.tick()
  seconds = [int(re.search(r"(\d+) s", text).group(1)) for text in drawn]
  assert seconds[:3] == shown and all("vm" in text and "Mounting root" in text for text in drawn)


@pytest.mark.parametrize("detached", [False, True])
def test_a_boot_that_hangs_is_tried_once_more(machines, detached):
  machines.fails(good=True, hangs=1)
  words = ("--boot-timeout", "2", "--boot-attempts", "2")
  if detached:
    machines.guests.up("vm", *words)
    works(machines.qvm("stop", "vm"))
  else:
    result = machines.guests.run("echo fine", options=words)
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr
    assert any("again" in line for line in own(result))
  assert len(machines.starts()) == 2


@pytest.mark.parametrize("attempts", [None, "1", "2"])
def test_a_boot_that_hangs_for_good(machines, attempts):
  machines.fails(good=True, hangs=9)
  words = ("--boot-attempts", attempts) if attempts else ()
  result = machines.guests.run("true", options=("--boot-timeout", "0.5", *words))
  assert result.returncode == 125 and "has not answered" in result.stderr
  assert len(machines.starts()) == int(attempts or 1)
  assert machines.guests.nothing_left()


@pytest.mark.parametrize("value", ["0", "11", "x", ""])
def test_attempts_that_make_no_sense(offline, value):
  run = offline("run", "--boot-attempts", value, *GUEST)
  assert run.returncode == 2 and "attempts" in run.stderr
