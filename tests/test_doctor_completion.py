"""What doctor says of each state of a host, and the completions in real shells."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from support import DEADLINE, FREEBSD, ROOT, Qvm, end_processes, furnish, snapshot
from support_pythons import VERSION
from support_terminal import Terminal

import qvm as qvm_source

# A QEMU that answers `-accel help`, or does as $DOCTOR says.
PATIENT = f"""#!{sys.executable} -IS
import json, os, signal, sys, time

play = json.loads(os.environ.get("DOCTOR", "{{}}"))
sys.stdout.write(play.get("stdout", "Accelerators supported in QEMU binary:\\ntcg\\nkvm\\n"))
sys.stdout.flush()
sys.stderr.write(play.get("stderr", ""))
sys.stderr.flush()
if os.path.exists(play.get("after", "")):
  open(play["after"]).close()
  os.unlink(play["after"])
if play.get("hang"):
  signal.signal(signal.SIGTERM, lambda number, frame: os._exit(play.get("exit", 0)))
while play.get("hang"):
  signal.pause()
if play.get("signal"):
  os.kill(os.getpid(), play["signal"])
sys.exit(play.get("exit", 0))
"""


@pytest.fixture
def host(qvm, image):
  """A host on which all is well, with a release server and QEMU in the cache."""
  furnish(qvm.cache, PATIENT, image)
  tree = qvm.cache / "qemu" / "x86_64"
  (tree / "release.json").write_text('{"release": "v2.0.0"}')
  yield qvm
  end_processes(qvm.cache)


def checks_of(result):
  """The lines of --json by name."""
  return {check["name"]: check for check in json.loads(result.stdout)}


def doctor(qvm, *words, **more):
  """Run doctor --json; nothing goes wrong on the way."""
  result = qvm("doctor", "--json", *words, **more)
  assert "Traceback" not in result.stderr and "bug in qvm" not in result.stderr
  checks = checks_of(result)
  faults = [name for name, check in checks.items() if check["state"] == "fault"]
  assert result.returncode == (1 if faults else 0), (result.stdout, result.stderr)
  for check in checks.values():
    assert check["state"] in ("ok", "warning", "fault")
    assert check["state"] == "ok" or check["fix"], check
  return checks


def test_a_host_on_which_all_is_well(host, server):
  before = snapshot(host.home)
  result = host("doctor")
  assert result.returncode == 0, result.stdout
  assert "fault" not in result.stdout
  names = re.findall(r"(?m)^(?:ok|warning) +(.+?):", result.stdout)
  for name in ("host", "Python", "ssh", "cache", "QEMU x86_64", "zstd", "KVM", "instances"):
    assert name in names
  for name in ("proxy", "releases", "API"):
    assert name in names
  assert "v2.0.0" in result.stdout and "tcg kvm" in result.stdout
  assert str(host.cache) in result.stdout
  assert snapshot(host.home) == before
  assert server.paths("/download/") == []


def test_the_table_and_json_say_the_same(host):
  table = host("doctor", "--offline").stdout
  checks = checks_of(host("doctor", "--offline", "--json"))
  lines = re.findall(r"(?m)^(ok|warning|fault) +(.+?): +", table)
  assert lines == [(check["state"], check["name"]) for check in checks.values()]
  for check in checks.values():
    if "free" not in check["text"]:
      assert check["text"] in table
    assert check["fix"] in table


def test_an_empty_home_stays_empty(qvm, server):
  for words in ((), ("--json",), ("--offline",)):
    assert qvm("doctor", *words).returncode == 0
    assert list(qvm.home.iterdir()) == []
  assert server.paths("/download/") == []


def test_offline_asks_nobody(host, server, fifo):
  """Also not in the background: QEMU takes its time here."""
  host.env["DOCTOR"] = json.dumps({"after": str(fifo)})
  asked = server.fault("", origin=None, times=None, pause=threading.Event())
  process = host.start("doctor", "--offline", "--json")
  assert not asked.reached.wait(1)
  asked.pause.set()
  fifo.write_text("")
  out, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0, err
  server.wait_idle()
  assert server.started == 0
  names = [check["name"] for check in json.loads(out)]
  assert "releases" not in names and "API" not in names


# --- Programs --------------------------------------------------------------------------------


@pytest.fixture
def bare(host, tmp_path):
  """A PATH with nothing on it."""
  folder = tmp_path / "bare"
  folder.mkdir()
  host.env["PATH"] = str(folder)
  return folder


def test_no_ssh(host, bare):
  check = doctor(host, "--offline")["ssh"]
  assert check["state"] == "warning"
  assert "openssh" in check["fix"].lower()


def test_ssh_is_named(host):
  check = doctor(host, "--offline")["ssh"]
  assert check["state"] == "ok" and "OpenSSH" in check["text"]


def test_ssh_that_does_not_start(host, bare):
  (bare / "ssh").write_text("#!/nowhere/sh\n")
  (bare / "ssh").chmod(0o755)
  check = doctor(host, "--offline")["ssh"]
  assert check["state"] == "warning" and str(bare / "ssh") in check["text"]


def test_no_zstd(host, bare):
  check = doctor(host, "--offline")["zstd"]
  if VERSION >= (3, 14):
    assert check["state"] == "ok"
  else:
    assert check["state"] == "warning" and "install zstd" in check["fix"]


@pytest.mark.parametrize("name", ["zstd", "unzstd", "zstdcat", "bsdtar"])
def test_each_program_that_unpacks_zstd(host, bare, name):
  (bare / name).write_text("#!/bin/sh\necho libzstd/1.5\n")
  (bare / name).chmod(0o755)
  check = doctor(host, "--offline")["zstd"]
  assert check["state"] == "ok"
  assert check["text"] == str(bare / name)


def test_a_python_without_tls(monkeypatch):
  monkeypatch.setitem(sys.modules, "ssl", None)
  check = qvm_source.checked("Python", qvm_source.check_python)
  assert check.state == "fault" and check.fix


# --- QEMU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "what, text",
  [
    ({"exit": 1, "stdout": "", "stderr": "error while loading libz\n"}, "libz"),
    ({"signal": signal.SIGSEGV, "stdout": ""}, "signal 11"),
  ],
)
def test_qemu_that_does_not_start(host, what, text):
  host.env["DOCTOR"] = json.dumps(what)
  check = doctor(host, "--offline")["QEMU x86_64"]
  assert check["state"] == "fault"
  assert text in check["text"]
  assert "clean --all" in check["fix"]


@pytest.mark.parametrize("content", [b"\x7fELF nonsense", b"#!/nowhere/interpreter\n", b""])
def test_qemu_that_cannot_be_executed(host, content):
  qemu = host.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  qemu.write_bytes(content)
  assert doctor(host, "--offline")["QEMU x86_64"]["state"] == "fault"


def test_qemu_without_the_right_to_execute_it(host):
  (host.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64").chmod(0o644)
  assert doctor(host, "--offline")["QEMU x86_64"]["state"] == "fault"


def test_qemu_img(host):
  program = host.cache / "bin" / "qemu-img"
  assert doctor(host, "--offline")["qemu-img"]["state"] == "ok"
  program.write_bytes(b"#!/nowhere/interpreter\n")
  check = doctor(host, "--offline")["qemu-img"]
  assert (check["state"], "does not start" in check["text"]) == ("fault", True)
  program.unlink()
  assert doctor(host, "--offline")["qemu-img"]["text"] == "not downloaded yet"


def test_qemu_that_is_not_there(offline):
  checks = doctor(offline, "--offline")
  assert checks["QEMU x86_64"]["state"] == checks["QEMU aarch64"]["state"] == "ok"
  assert "not downloaded" in checks["QEMU x86_64"]["text"]


@pytest.fixture
def impatient(monkeypatch):
  """Questions to programs have half a second."""
  communicate = subprocess.Popen.communicate

  def brief(self, input=None, timeout=None):
    return communicate(self, input, timeout and min(timeout, 0.5))

  monkeypatch.setattr(subprocess.Popen, "communicate", brief)
  monkeypatch.setattr(qvm_source, "TERM_GRACE_SECONDS", 0.5)


@pytest.mark.parametrize("code", [0, 1])
def test_qemu_that_hangs(host, impatient, monkeypatch, code):
  """Real QEMU ends with 0 when it gets SIGTERM: that is no sign of health."""
  monkeypatch.setenv("DOCTOR", json.dumps({"hang": True, "exit": code, "stdout": ""}))
  (check,) = [
    it
    for it in qvm_source.check_qemu(qvm_source.Cache(str(host.cache)))
    if it.name == "QEMU x86_64"
  ]
  assert check.state == "fault"
  assert "no answer" in check.text


def test_a_kvm_question_that_hangs(host, impatient, monkeypatch, kvm):
  monkeypatch.setenv("DOCTOR", json.dumps({"hang": True, "exit": 0, "stdout": ""}))
  check = kvm_check(kvm, qemu_of(host))
  assert check.state == "warning"
  assert "--accel tcg" in check.fix


# --- KVM -------------------------------------------------------------------------------------


@pytest.fixture
def kvm(tmp_path, monkeypatch):
  """A file that passes for a /dev/kvm which makes machines."""
  path = tmp_path / "kvm"
  path.write_bytes(b"")

  def ioctl(fd, request, *more):
    return 12 if request == 0xAE00 else os.open(os.devnull, os.O_RDONLY)

  monkeypatch.setattr(fcntl, "ioctl", ioctl)
  return str(path)


def kvm_check(kvm, qemu):
  return qvm_source.checked("KVM", qvm_source.check_kvm, str(kvm), qemu)


def qemu_of(qvm):
  return str(qvm.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64")


def test_no_kvm(tmp_path):
  check = kvm_check(tmp_path / "kvm", "")
  assert check.state == "warning" and "emulated" in check.text and check.fix


def test_kvm_that_may_not_be_opened(tmp_path):
  check = kvm_check(tmp_path, "")  # a folder opens for nobody
  assert check.state == "warning" and "cannot open " in check.text
  assert "sudo usermod -aG kvm $USER" in check.fix and "chmod o+rw /dev/kvm" in check.fix


def test_kvm_that_makes_no_machine(tmp_path):
  (tmp_path / "kvm").write_bytes(b"")
  check = kvm_check(tmp_path / "kvm", "")
  assert check.state == "warning" and check.fix.startswith("runs fall back to emulation")


def test_kvm_with_which_qemu_fails(host, kvm, monkeypatch):
  monkeypatch.setenv("DOCTOR", json.dumps({"exit": 1, "stdout": "kvm run failed Bad address"}))
  check = kvm_check(kvm, qemu_of(host))
  assert check.state == "warning" and check.fix.startswith("runs fall back to emulation")


def test_kvm_is_not_tried_without_qemu(tmp_path, kvm):
  check = kvm_check(kvm, str(tmp_path / "none"))
  assert check.state == "ok"


def test_kvm_works(host, kvm):
  check = kvm_check(kvm, qemu_of(host))
  assert (check.state, check.fix) == ("ok", "")


@pytest.mark.parametrize(
  "what, text",
  [
    ({"stderr": "kvm.c:1: kvm_buf_set_msrs: Assertion `x' failed.\n", "signal": 6}, "nested"),
    ({"stderr": "failed to initialize kvm: Permission denied\n", "exit": 1}, "permission denied"),
    ({"stderr": "something new\n", "exit": 1}, "something new"),
    ({"signal": 9}, "does not start with it: signal 9"),
  ],
)
def test_kvm_broken(host, kvm, monkeypatch, what, text):
  monkeypatch.setenv("DOCTOR", json.dumps({"stdout": "", **what}))
  check = kvm_check(kvm, qemu_of(host))
  assert check.state == "warning"
  assert text in check.text
  assert check.fix


def test_hvf():
  check = qvm_source.checked("HVF", qvm_source.check_hvf, "")
  assert (check.name, check.state, check.fix) == ("HVF", "ok", "")
  assert "hv_support" in check.text and "emulated" in check.text


# --- The cache folder ------------------------------------------------------------------------

# Root may write everywhere; without these two capabilities it is as bound as any user.
BOUND = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


def as_bound(qvm, *words):
  """Run qvm as a user whom modes of folders stop."""
  command = [*(BOUND if os.geteuid() == 0 else []), *qvm.command(*words)]
  return subprocess.run(
    command, env=qvm.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE
  )


@pytest.mark.parametrize("folder, mode", [(".", 0o500), (".", 0o000), ("instances", 0o000)])
def test_a_cache_that_cannot_be_used(host, folder, mode):
  (host.cache / "instances").mkdir(mode=0o700)
  (host.cache / folder).chmod(mode)
  result = as_bound(host, "doctor", "--offline", "--json")
  (host.cache / folder).chmod(0o700)
  assert "Traceback" not in result.stderr and "bug in qvm" not in result.stderr
  assert result.returncode == 1
  checks = checks_of(result)  # all of them, whatever is wrong with one
  assert {"host", "Python", "ssh", "cache", "zstd", "instances"} <= set(checks)
  assert any(check["state"] == "fault" for check in checks.values())
  if folder == ".":
    assert checks["cache"]["state"] == "fault"
    assert "QVM_CACHE_DIR" in checks["cache"]["fix"]


def test_a_home_that_cannot_be_written(offline):
  offline.home.chmod(0o500)
  result = as_bound(offline, "doctor", "--offline", "--json")
  offline.home.chmod(0o700)
  assert checks_of(result)["cache"]["state"] == "fault"
  assert result.returncode == 1


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_cache_that_is_no_folder(offline, kind):
  path = offline.home / "cache"
  if kind == "file":
    path.write_text("")
  else:
    path.symlink_to("nowhere")
  offline.env["QVM_CACHE_DIR"] = str(path)
  runs = offline("run", "freebsd", "15.1")
  assert runs.returncode == 1  # it is no use to run
  check = doctor(offline, "--offline")["cache"]
  assert check["state"] == "fault", check


def test_a_cache_that_is_not_there_yet(offline):
  offline.env["QVM_CACHE_DIR"] = str(offline.home / "a" / "b" / "c")
  check = doctor(offline, "--offline")["cache"]
  assert check["state"] == "ok"
  assert str(offline.home / "a" / "b" / "c") in check["text"]


def test_little_space(tmp_path, monkeypatch):
  monkeypatch.setattr(qvm_source, "free_space", lambda folder: 10 << 20)
  check = qvm_source.checked("cache", qvm_source.check_cache, qvm_source.Cache(str(tmp_path)))
  assert check.state == "warning"
  assert "10.5 MB free" in check.text and "2.1 GB" in check.text
  assert "clean --all" in check.fix


@pytest.mark.parametrize(
  "path, kind",
  [
    ("/home/me/.cache/qvm", "ext4"),
    ("/mnt/my disk/qvm", "xfs"),
    ("/mnt/my", "btrfs"),
    ("/tmp/x", "tmpfs"),
    ("/tmpfoo", "btrfs"),
  ],
)
def test_file_system(tmp_path, path, kind):
  mounts = tmp_path / "mounts"
  mounts.write_text(
    "/dev/sda1 / btrfs rw 0 0\n/dev/sdb1 /home ext4 rw 0 0\n"
    "/dev/sdc1 /mnt/my\\040disk xfs rw 0 0\ntmpfs /tmp ramfs rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n\n"
  )
  assert qvm_source.file_system(path, str(mounts)) == kind


def test_file_system_where_nobody_tells(tmp_path):
  assert qvm_source.file_system("/x", str(tmp_path / "none"))


# --- Instances -------------------------------------------------------------------------------


def test_running_instances(host):
  folder = host.cache / "instances"
  folder.mkdir(mode=0o700)
  for name, ssh in (("web", "127.0.0.1:2900"), ("db", "127.0.0.1:2901")):
    (folder / f"{name}.qcow2").write_bytes(b"")
    record = {"name": name, "os": "freebsd", "version": "15.1", "arch": "x86-64", "ssh": ssh}
    (folder / f"{name}.json").write_text(json.dumps(record))
  layer = {**record, "name": f"{FREEBSD}-prepared-0123456789"}  # which is no instance
  (host.cache / "layers").mkdir(mode=0o700)
  (host.cache / f"layers/{layer['name']}.json").write_text(json.dumps(layer))
  with open(folder / "web.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    text = doctor(host, "--offline")["instances"]["text"]
  assert "web" in text and "127.0.0.1:2900" in text
  assert text.startswith("2") and "db" not in text
  assert "web" not in doctor(host, "--offline")["instances"]["text"]


@pytest.mark.parametrize("path", ["qemu/x86_64/release.json", "bin/qemu-img.json",
                                  "instances/web.json", "accelerators/a.json"])  # fmt: skip
def test_a_record_of_a_newer_qvm(host, path):
  """All checks are there, whatever is wrong with one."""
  (host.cache / path).parent.mkdir(mode=0o700, exist_ok=True)
  (host.cache / "instances").mkdir(mode=0o700, exist_ok=True)
  (host.cache / "instances/web.qcow2").write_bytes(b"")
  (host.cache / path).write_text('{"format": 99}')
  checks = doctor(host, "--offline")
  assert {"host", "Python", "ssh", "cache", "zstd", "instances"} <= set(checks)
  faults = [check["text"] for check in checks.values() if "has format 99" in check["text"]]
  assert bool(faults) == (path != "instances/web.json")


# --- The network -----------------------------------------------------------------------------


def test_a_release_server_that_is_down(offline):
  checks = doctor(offline)
  assert checks["releases"]["state"] == "fault"
  assert "127.0.0.1:9" in checks["releases"]["text"]


@pytest.mark.parametrize("origin", ["github", "api", None])
def test_a_server_that_hangs(host, server, origin):
  server.fault("", origin=origin, times=None, stall="headers")
  host.env["QVM_TIMEOUT"] = "1"
  checks = doctor(host)
  if origin == "api":
    assert checks["releases"]["state"] == "ok"
    assert checks["API"]["state"] == "warning"
  else:
    assert [it for it in checks.values() if it["state"] == "fault"]


def test_a_lookup_that_takes_minutes(host):
  """No time-out of a socket ends it, as that of a server which sends a byte now and then."""
  code = """
import time
qvm.DOCTOR_SECONDS = 0.1
qvm.newest_tag = lambda *about: time.sleep(600)
"""
  checks = doctor(host, code=code)
  assert checks["network"]["state"] == "fault" and "no answer" in checks["network"]["text"]
  assert {"host", "instances"} <= set(checks) and "releases" not in checks


def test_no_time_out_is_longer_than_doctor_waits(host, server):
  host.env["QVM_TIMEOUT"] = "600"
  server.fault("", origin="github", times=None, stall="headers")
  checks = doctor(host, code="qvm.DOCTOR_SECONDS = 1.0")
  assert [name for name, check in checks.items() if check["state"] == "fault"]


def test_a_system_that_is_not_supported(host):
  code = "os.uname = lambda: os.uname_result(('SunOS', 'x', '5.11', '11.4', 'sun4v'))"
  check = doctor(host, "--offline", code=code)["host"]
  assert check["state"] == "fault"
  assert check["text"] == "SunOS on sun4v is not supported" and "macOS" in check["fix"]


def test_a_quota_that_is_used_up(host, server):
  server.api_quota = 0
  check = doctor(host)["API"]
  assert check["state"] == "warning"
  assert "quota" in check["text"] and "GITHUB_TOKEN" in check["fix"]


def test_the_quota_that_is_left(host, server):
  server.api_quota = 42
  check = doctor(host)["API"]
  assert check["state"] == "ok" and "41" in check["text"]


def test_a_mirror_without_api(host, server):
  del host.env["QVM_API_URL"]
  checks = doctor(host)
  assert "API" not in checks
  assert checks["releases"]["state"] == "ok" and "v2.0.0" in checks["releases"]["text"]


def test_a_bad_address(host):
  host.env["QVM_RELEASES_URL"] = "ftp://nowhere"
  checks = doctor(host)
  faults = [check for check in checks.values() if check["state"] == "fault"]
  assert any("QVM_RELEASES_URL" in check["text"] for check in faults)


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy"])
def test_a_proxy_is_named_without_its_password(host, name):
  host.env[name] = "http://someone:s3cret@127.0.0.1:9"
  host.env["GITHUB_TOKEN"] = "t0ken"
  for words in ((), ("--json",)):
    result = host("doctor", *words)
    assert "127.0.0.1:9" in result.stdout
    for secret in ("someone", "s3cret", "t0ken"):
      assert secret not in result.stdout + result.stderr
  host.env[name] = "127.0.0.1:9"  # which urllib takes for the same
  assert "127.0.0.1:9" in checks_of(host("doctor", "--json"))["proxy"]["text"]
  if name == "http_proxy":  # the only one that the server here is asked through
    assert checks_of(result)["releases"]["state"] == "fault"
    assert result.returncode == 1


# --- The words of completion -----------------------------------------------------------------

OS_NAMES = list(qvm_source.OS_NAMES)
COMMANDS = list(qvm_source.COMMANDS)
NAMES = ["a.b_c+d~e-1", "build", "freebsd-15.1-x86-64"]


@pytest.fixture
def stocked(offline, image):
  """A cache with images and instances."""
  base, instances = offline.cache / "base", offline.cache / "instances"
  for folder in (base, instances):
    folder.mkdir(parents=True)
  for stem in (FREEBSD, "freebsd-14.4-x86-64", "freebsd-14.4-arm64", "openbsd-7.9-arm64"):
    (base / f"{stem}.qcow2").write_bytes(image)
    (base / f"{stem}.json").write_text("{}")
  (base / "freebsd-13.0-x86-64.qcow2.tmp").write_bytes(b"")
  for name in NAMES:
    (instances / f"{name}.qcow2").write_bytes(b"")
    (instances / f"{name}.json").write_text("{}")
  return offline


# The words before the cursor, and those that may follow, without options.
WORDS = [
  ([], COMMANDS),
  (["--dry-run"], COMMANDS),
  (["--platform", "arm64"], COMMANDS),
  (["run"], OS_NAMES),
  (["pull"], OS_NAMES),
  (["search"], OS_NAMES),
  (["each"], ["all", *OS_NAMES]),
  (["each", "-j", "2", "freebsd"], ["all", *[name for name in OS_NAMES if name != "freebsd"]]),
  (["each", "freebsd", "--"], []),
  (["--dry-run", "run"], OS_NAMES),
  (["run", "--rm"], OS_NAMES),
  (["run", "--platform"], ["x86-64", "arm64"]),
  (["run", "--platform", "arm64"], OS_NAMES),
  (["run", "--platform=arm64"], OS_NAMES),
  (["run", "-m"], []),
  (["run", "-m", "2G"], OS_NAMES),
  (["run", "-m2G"], OS_NAMES),
  (["run", "--name", "run"], OS_NAMES),
  (["run", "--qemu-arg", "-snapshot"], OS_NAMES),
  (["run", "freebsd"], ["14.4", "15.1"]),
  (["run", "FreeBSD"], ["14.4", "15.1"]),
  (["run", "--rm", "freebsd", "-m", "2G"], ["14.4", "15.1"]),
  (["pull", "openbsd"], ["7.9"]),
  (["run", "haiku"], []),
  (["run", "nosuch"], []),
  (["run", "freebsd", "15.1"], []),
  (["search", "freebsd"], []),
  (["stop"], NAMES),
  (["restart"], NAMES),
  (["logs"], NAMES),
  (["clone"], NAMES),
  (["clone", "build"], []),
  (["ssh", "build"], []),
  (["logs", "-f", "build"], []),
  (["rm"], NAMES),
  (["rm", "--force"], NAMES),
  (["rm", "build"], [NAMES[0], NAMES[2]]),
  (["config"], ["print-path"]),
  (["completion"], ["bash", "zsh", "fish"]),
  (["completion", "bash"], []),
  (["list"], []),
  (["doctor"], []),
  (["nosuch"], []),
]


@pytest.mark.parametrize("before, after", WORDS, ids=lambda value: " ".join(value) or "nothing")
def test_next_words(stocked, before, after):
  words = qvm_source.next_words(before, qvm_source.Cache(str(stocked.cache)))
  assert sorted(word for word in words if not word.startswith("-")) == sorted(after)
  assert len(words) == len(set(words))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_of_the_help(stocked, command):
  shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", options_help(command)))
  words = qvm_source.next_words([command], qvm_source.Cache(str(stocked.cache)))
  assert {word for word in words if word.startswith("-")} == shown


def options_help(command):
  """The left column of a command's help."""
  lines = qvm_source.help_text(command).partition("options:\n")[2].partition("\n\n")[0].splitlines()
  return "\n".join(line[:28] for line in lines if line[:3] == "  -")


def test_no_name_is_offered_that_may_not_be_typed(stocked):
  for name in ("with space", "$(touch pwned)", "-rf", "two\nlines", "`id`", "ü"):
    (stocked.cache / "instances" / f"{name}.qcow2").write_bytes(b"")
  words = qvm_source.next_words(["stop"], qvm_source.Cache(str(stocked.cache)))
  assert sorted(word for word in words if not word.startswith("--")) == ["-h", *NAMES]


def test_completion_changes_nothing(offline):
  for words in ((), ("run",), ("run", "freebsd"), ("run", "("), ("stop",)):
    result = offline("completion", "words", "--", *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout
  assert list(offline.home.iterdir()) == []


# --- In real shells --------------------------------------------------------------------------

# The line up to the cursor, and what is offered for its last word.
LINES = [
  ("qvm ", COMMANDS),
  ("qvm r", ["run", "restart", "rm"]),
  ("qvm run ", OS_NAMES),
  ("qvm run o", ["openbsd", "omnios"]),
  ("qvm run --rm --platform arm64 fr", ["freebsd"]),
  ("qvm run --platform a", ["arm64"]),
  ("qvm run --pl", ["--platform"]),
  ("qvm run freebsd ", ["14.4", "15.1"]),
  ("qvm run freebsd 15", ["15.1"]),
  ("qvm stop ", NAMES),
  ("qvm rm a", [NAMES[0]]),
  ("qvm rm build ", [NAMES[0], NAMES[2]]),
  ("qvm run -m 2G net", ["netbsd"]),
  ("qvm completion ", ["bash", "zsh", "fish"]),
  ("qvm ssh b", ["build"]),
  ("qvm ssh --sync . --sync-direction ", ["both", "in", "out"]),
  ("qvm run freebsd 15.1 -- st", []),
]
ODD = 'it\'s a "folder" with $HOME, `id` & {braces}'

# Each prints what is offered for every line of its input, and a line of its own after it.
SHELLS = {
  "bash": """\
source "$1"
while IFS= read -r line; do
  words=$line; [[ $line == *' ' ]] && words="$line ''"
  eval "COMP_WORDS=($words)"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  COMP_LINE=$line COMP_POINT=${#line}
  _qvm; printf '%s\\n' "${COMPREPLY[@]}" =====
done
""",
  "zsh": """\
compdef() { :; }
compadd() { print -rl -- ${(M)${(P)@[-1]}:#${words[CURRENT]}*} }
source "$1"
while IFS= read -r line; do
  words=(${=line}); [[ $line == *' ' ]] && words+=('')
  CURRENT=$#words; _qvm; print -r -- '====='
done
""",
  "fish": """\
source $argv[1]
while read -l line
  complete -C "$line"; echo =====
end
""",
}


def shell_command(shell, script):
  options = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
  assert shutil.which(shell), f"missing: apt-get install {shell}"
  return [shell, *options, str(script)]


@pytest.fixture
def complete(tmp_path):
  """Asks a shell what follows each line, with the script that qvm prints for it."""

  def ask(qvm, shell, lines, **more):
    script, driver = tmp_path / f"script.{shell}", tmp_path / f"driver.{shell}"
    made = qvm("completion", shell)
    assert made.returncode == 0, made.stderr
    script.write_text(made.stdout)
    driver.write_text(SHELLS[shell])
    result = subprocess.run(
      [*shell_command(shell, driver), str(script)],
      env=qvm.env,
      input="".join(line + "\n" for line in lines),
      capture_output=True,
      text=True,
      timeout=DEADLINE,
      **more,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    answers = result.stdout.split("=====\n")[:-1]
    return [[word for word in answer.splitlines() if word] for answer in answers]

  return ask


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(stocked, complete, tmp_path, shell):
  """In an empty folder: fish 4 also offers files that have the word within their names."""
  (tmp_path / "empty").mkdir()
  lines = [line for line, _ in LINES]
  answers = complete(stocked, shell, lines, cwd=str(tmp_path / "empty"))
  assert len(answers) == len(LINES)
  for (line, wanted), answer in zip(LINES, answers):
    words = [word.partition("\t")[0] for word in answer]
    if line.endswith(" "):
      words = [word for word in words if not word.startswith("-")]
    assert sorted(words) == sorted(wanted), line


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_offers_nothing_where_there_is_nothing(stocked, complete, tmp_path, shell):
  lines = ["qvm nosuch ", "qvm run --memory ", "qvm run freebsd 99", "qvm run --nosuch"]
  (tmp_path / "empty").mkdir()
  assert complete(stocked, shell, lines, cwd=str(tmp_path / "empty")) == [[]] * len(lines)


def test_fish_offers_files_where_there_are_no_words(stocked, complete, tmp_path):
  """As bash and zsh do, see TYPED."""
  (tmp_path / "logfile").touch()
  lines = ["qvm run --console-log logf", "qvm run freebsd 15.1 -- logf"]
  assert complete(stocked, "fish", lines, cwd=str(tmp_path)) == [["logfile"], ["logfile"]]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_program_in_an_odd_folder(stocked, complete, tmp_path, shell):
  folder = tmp_path / ODD
  folder.mkdir()
  shutil.copy(ROOT / "qvm.py", folder / "qvm.py")
  odd = Qvm(stocked.home, folder / "qvm.py")
  assert complete(odd, shell, ["qvm rm bu"]) == [["build"]]


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_of_a_file_name_is_executed(stocked, complete, tmp_path, shell):
  for name in ("$(touch pwned)", "`touch pwned`", "'; touch pwned; '", "*"):
    (stocked.cache / "instances" / f"{name}.qcow2").write_bytes(b"")
  complete(stocked, shell, ["qvm rm ", "qvm rm bu"], cwd=str(tmp_path))
  assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_broken_cache_does_not_disturb_the_prompt(offline, complete, tmp_path, shell):
  (tmp_path / "file").write_text("")
  offline.env["QVM_CACHE_DIR"] = str(tmp_path / "file")
  answers = complete(offline, shell, ["qvm ru", "qvm stop qqq", "qvm run freebsd 1"])
  assert answers == [["run"], [], []]


# How a person's shell begins; `qvm` shows the words that it gets.
STARTS = {
  "bash": """\
PS1='$ '
bind 'set bell-style none'
source {script}
qvm() {{ printf '<%s>' "$@"; echo; }}
""",
  "zsh": """\
PS1='$ '
unsetopt BEEP
autoload -Uz compinit && compinit -D -u
source {script}
qvm() {{ printf '<%s>' "$@"; echo }}
""",
}


@pytest.fixture
def interactive(tmp_path, stocked):
  """Starts a shell on a terminal of its own, with the completion loaded."""
  opened = []

  def start(shell):
    script, start = tmp_path / f"script.{shell}", tmp_path / f"start.{shell}"
    script.write_text(stocked("completion", shell).stdout)
    start.write_text(STARTS[shell].format(script=shlex.quote(str(script))))
    options = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[shell]
    env = {**stocked.env, "TERM": "vt100", "HISTFILE": "/dev/null"}
    terminal = Terminal([shell, *options], env, cwd=str(tmp_path))
    opened.append(terminal)
    terminal.type(f"source {shlex.quote(str(start))}; echo rea''dy\r".encode())
    terminal.until(b"ready")
    return terminal

  yield start
  for terminal in opened:
    terminal.close()


# What is typed, and the words that the program then gets.
TYPED = [
  ("qvm ru\tfreeb\t15\t\r", "<run><freebsd><15.1>"),
  ("qvm run --pl\tar\topen\t7\t\r", "<run><--platform><arm64><openbsd><7.9>"),
  ("qvm stop a.\t\r", "<stop><a.b_c+d~e-1>"),
  ("qvm rm --fo\tfreebsd-\t\r", "<rm><--force><freebsd-15.1-x86-64>"),
  ("qvm run --platform=arm64 freeb\t\r", "<run><--platform=arm64><freebsd>"),
  ("qvm run --ssh-port 127.0.0.1:2222 freeb\t\r", "<run><--ssh-port><127.0.0.1:2222><freebsd>"),
  ("qvm run -m \t5G\r", "<run><-m><5G>"),
  ("qvm run freebsd 99\t\r", "<run><freebsd><99>"),
  ("qvm run --console-log logf\t\r", "<run><--console-log><logfile>"),
]


@pytest.mark.parametrize("shell", STARTS)
@pytest.mark.parametrize("typed, words", TYPED, ids=[words for _, words in TYPED])
def test_typing_with_tabs(interactive, tmp_path, shell, typed, words):
  (tmp_path / "logfile").write_text("")
  terminal = interactive(shell)
  for piece in re.findall(r"[^\t\r]*[\t\r]", typed):
    terminal.type(piece.encode())
  terminal.until(b">\r\n")
  assert words.encode() in terminal.shown


def test_zsh_from_its_function_path(stocked, tmp_path, interactive):
  """As a file _qvm in a folder of $fpath, which zsh loads at the first TAB."""
  folder = tmp_path / "functions"
  folder.mkdir()
  (folder / "_qvm").write_text(stocked("completion", "zsh").stdout)
  (tmp_path / "start").write_text(
    f"PS1='$ '; fpath=({shlex.quote(str(folder))} $fpath)\n"
    "autoload -Uz compinit && compinit -D -u\n"
    "qvm() { printf '<%s>' \"$@\"; echo }\n"
  )
  terminal = Terminal(["zsh", "-f", "-i"], {**stocked.env, "TERM": "vt100"}, cwd=str(tmp_path))
  try:
    terminal.type(b"source ./start; echo rea''dy\r")
    terminal.until(b"ready")
    terminal.type(b"qvm rm bui\t")
    terminal.type(b"\r")
    terminal.until(b">\r\n")
    assert b"<rm><build>" in terminal.shown
  finally:
    terminal.close()


def test_scripts_are_plain_text(offline):
  for shell in SHELLS:
    result = offline("completion", shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("\n") and "\t" not in result.stdout
    assert offline.command()[-1] in result.stdout


def test_an_unknown_shell(offline):
  result = offline("completion", "tcsh")
  assert result.returncode == 2
  assert "bash" in result.stderr and "zsh" in result.stderr and "fish" in result.stderr
