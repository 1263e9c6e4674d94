"""qvm on each kind of Mac: whole runs, and the faults M1 to M15 of macOS, each by its number.

The Macs are stand-ins (tests/darwin, darwin_host.py); on a real Mac the same tests choose another
kind of Mac, and those that need the stand-in guest, which is Linux's, are left out.
"""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import darwin_host
import pytest
import ssh_guest
from darwin_host import APPLE, INTEL, MACHINES, Mac, put_program
from release_server import ReleaseServer
from support import (
  DEADLINE,
  ROOT,
  Qvm,
  end_processes,
  fails,
  fill,
  free_port,
  tar_of,
  wait_for,
  works,
)
from support_pythons import MODERN, VERSION

GUEST = ("freebsd", "15.1")
X86 = ("--platform", "x86-64", *GUEST)
ARM = ("--platform", "arm64", *GUEST)
BUNDLE = "netbsd-11.0-x86-64"
PULL_BUNDLE = ("pull", "--platform", "x86-64", "netbsd", "11.0")
REAL_MAC = sys.platform == "darwin"
with_guest = pytest.mark.skipif(
  REAL_MAC or bool(ssh_guest.missing()), reason="the stand-in guest needs Linux and its sshd"
)
linux = pytest.mark.skipif(REAL_MAC, reason="the stand-in for what Linux has otherwise")


def own_lines(text):
  """What qvm itself says, without what QEMU and the guest do."""
  return "\n".join(line[5:] for line in text.splitlines() if line.startswith("qvm: "))


# --- Macs, and what they download ----------------------------------------------------------------


def serve_macs(server, image):
  """Fill a release server with what a Mac downloads: programs that are Intel's."""
  fill(server, image, tar_of({"qemu-img": darwin_host.qemu_img()}))
  for cpu in ("x86_64", "aarch64"):
    server.replace_asset("resources", "v2.0.0", f"qemu-system-{cpu}-macos.tar", QEMU_TAR)


QEMU_TAR = darwin_host.qemu_tar()


@pytest.fixture
def server(image):
  with ReleaseServer() as server:
    serve_macs(server, image)
    yield server


@pytest.fixture(scope="module")
def stock(tmp_path_factory, image):
  """A cache with all that both CPUs' guests need, not to be changed."""
  folder = tmp_path_factory.mktemp("stock")
  with ReleaseServer() as server:
    serve_macs(server, image)
    mac = Mac(folder, "silicon", server)
    works(mac("pull", *X86))
    works(mac("pull", *ARM))
  return mac.cache


@pytest.fixture
def new_mac(tmp_path, server):
  """Make a Mac of a kind with an empty home; nothing of it outlives the test."""
  made = []

  def make(machine="silicon"):
    made.append(Mac(tmp_path / f"mac{len(made)}", machine, server))
    return made[-1]

  yield make
  for mac in made:
    end_processes(mac.home)


@pytest.fixture
def mac_of(new_mac, stock):
  """Make a Mac of a kind that has downloaded everything."""

  def make(machine="silicon"):
    mac = new_mac(machine)
    shutil.copytree(str(stock), str(mac.cache), symlinks=True)
    return mac

  return make


def port():
  return ("--ssh-port", str(free_port()))


def guest_of(mac):
  """The words for a guest that this Mac can run today without --accel."""
  if mac.machine == "silicon-bare":
    return ("--qemu", str(mac.own_qemu("aarch64", APPLE)), *ARM)
  return X86 if mac.machine == "intel" else ARM


# --- Whole runs ----------------------------------------------------------------------------------


@with_guest
@pytest.mark.parametrize("machine", ["silicon", "silicon-bare", "vm", "intel"])
def test_a_machines_life(mac_of, machine):
  """In the background: start, list, ssh, restart with a folder, stop, rm, clean."""
  mac = mac_of(machine)
  mac.guest_plays()
  guest = guest_of(mac)
  started = works(mac("run", "-d", "--name", "vm", *port(), *guest))
  assert started.stdout.startswith("vm\nssh -p ")
  [row] = json.loads(works(mac("list", "--json")).stdout)
  assert (row["name"], row["state"]) == ("vm", "running")
  assert works(mac("ssh", "vm", "--", "echo up; exit 0")).stdout == "up\n"
  assert mac("ssh", "vm", "--", "exit 9").returncode == 9
  project = mac.home / "project"
  project.mkdir()
  (project / "given").write_text("given\n")
  works(mac("ssh", "vm", "--sync", str(project), "--", "cp given made"))
  assert (project / "made").read_text() == "given\n"
  works(mac("stop", "vm"))
  assert json.loads(works(mac("list", "--json")).stdout)[0]["state"] == "stopped"
  words = works(mac("completion", "words", "--", "rm")).stdout.split()
  assert "vm" in words
  works(mac("rm", "vm"))
  assert json.loads(works(mac("list", "--json")).stdout) == []
  works(mac("clean", "--all"))
  assert not list((mac.cache / "base").glob("*.qcow2"))
  assert mac.processes() == [] and os.listdir(mac.tmp) == []
  assert mac.accelerators() == ["hvf" if machine in ("silicon-bare", "intel") else "tcg"]


@with_guest
@pytest.mark.parametrize("machine", ["silicon", "intel"])
def test_a_command_and_warm_starts(mac_of, machine):
  mac = mac_of(machine)
  mac.guest_plays(control={"accelerator": "tcg"})
  words = ("run", "--rm", "--warm", *guest_of(mac), "--")
  made = mac(*words, "echo out; echo err >&2; exit 7")
  assert (made.returncode, made.stdout) == (7, "out\n"), made.stderr
  assert "is booting to create" in made.stderr
  again = works(mac(*words, "echo again"))
  assert again.stdout == "again\n" and "is booting" not in again.stderr
  assert mac.processes() == [] and os.listdir(mac.tmp) == []


@linux
@pytest.mark.parametrize("python", [min, max])
def test_from_nothing(new_mac, python):
  """Fetch and start with the oldest and the newest Python, on Apple Silicon."""
  versions = sorted(MODERN, key=lambda text: tuple(map(int, text.split("."))))
  mac = new_mac()
  mac.qemu_plays(stdout="it boots\n")
  path = MODERN[versions[0] if python is min else versions[-1]]
  result = works(mac("run", "--rm", *ARM, python=path))
  assert result.stdout == "it boots\n"
  works(mac("run", "--rm", *ARM, python=path, env={"QVM_RELEASES_URL": "http://127.0.0.1:9/no"}))
  assert mac.accelerators() == ["tcg", "tcg"]
  assert os.listdir(mac.tmp) == []


@linux
@pytest.mark.parametrize("machine", ["silicon", "intel"])
def test_a_guest_that_runs_while_its_image_comes(new_mac, server, tmp_path, image, machine):
  mac = new_mac(machine)
  guest = ARM if machine == "silicon" else X86
  works(mac("pull", *guest))
  shutil.rmtree(str(mac.cache / "base"))
  server.rate = 1e6
  (tmp_path / "image.qcow2").write_bytes(image)
  command = ["qemu-img", "convert", "-O", "raw", "image.qcow2", "expected"]
  subprocess.run(command, cwd=str(tmp_path), check=True)
  mac.qemu_plays(convert=str(tmp_path / "seen"))
  works(mac("run", "--stream", "--rm", *guest))
  assert (tmp_path / "seen").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("machine", MACHINES)
def test_doctor_and_completion(mac_of, machine):
  mac = mac_of(machine)
  result = mac("doctor", "--offline", "--json")
  checks = {check["name"]: check for check in json.loads(result.stdout)}
  bare = machine == "silicon-bare"
  assert result.returncode == int(bare), result.stdout
  assert checks["host"]["text"].startswith("macOS 15.6 on ")
  assert ("Rosetta" in checks["host"]["text"]) == bare
  assert checks["QEMU x86_64"]["state"] == ("fault" if bare else "ok"), checks["QEMU x86_64"]
  assert checks["ssh"]["state"] == checks["cache"]["state"] == "ok"
  for shell in ("bash", "zsh", "fish"):
    assert "completion words" in works(mac("completion", shell)).stdout
  assert "15.1" in works(mac("completion", "words", "--", "run", "freebsd")).stdout


def test_without_rosetta_the_downloaded_qemu_is_explained(mac_of):
  result = mac_of("silicon-bare")("run", "--rm", *X86)
  assert result.returncode == 1
  assert "Rosetta" in own_lines(result.stderr) and "--qemu" in own_lines(result.stderr)


# --- M1: the accelerator -------------------------------------------------------------------------

# machine, guest, the CPU that an own QEMU is built for, the accelerators that are right.
CHOICES = [
  ("silicon", X86, None, {"tcg"}),
  ("silicon", ARM, None, {"tcg"}),
  ("rosetta", X86, None, {"tcg"}),
  ("vm", X86, None, {"tcg"}),
  ("vm", ARM, None, {"tcg"}),
  ("runner", X86, None, {"tcg"}),
  ("runner", ARM, APPLE, {"tcg"}),
  ("intel", X86, None, {"hvf:tcg"}),
  ("intel-vm", X86, None, {"tcg"}),
  ("silicon", ARM, APPLE, {"hvf:tcg"}),
  ("rosetta", ARM, APPLE, {"hvf:tcg"}),
  ("silicon-bare", ARM, APPLE, {"hvf:tcg"}),
  ("silicon", ARM, INTEL, {"tcg"}),
  ("silicon", X86, APPLE, {"hvf:tcg", "tcg"}),
  ("vm", ARM, APPLE, {"tcg"}),
  ("intel", ARM, INTEL, {"hvf:tcg", "tcg"}),
]


def cpu_of(guest):
  return "x86_64" if guest == X86 else "aarch64"


@pytest.mark.parametrize("machine, guest, own, right", CHOICES)
def test_m1_the_accelerator_is_chosen_before_the_start(new_mac, machine, guest, own, right):
  mac = new_mac(machine)
  words = ("--qemu", str(mac.own_qemu(cpu_of(guest), own))) if own else ()
  shown = works(mac("run", "--dry-run", *words, *guest)).stdout
  assert re.search(r"[ ,]accel[ =]([a-z:]+)", shown).group(1) in right, shown


def test_m1_who_asks_for_an_accelerator_gets_it(new_mac):
  for machine in MACHINES:
    shown = works(new_mac(machine)("run", "--dry-run", "--accel", "hvf:tcg", *X86)).stdout
    assert "accel=hvf:tcg " in shown.replace(",", " ")


@pytest.mark.parametrize("machine, guest, own, used", [
  ("silicon", X86, None, "tcg"),
  ("rosetta", X86, None, "tcg"),
  ("vm", X86, None, "tcg"),
  ("runner", X86, None, "tcg"),
  ("intel-vm", X86, None, "tcg"),
  ("vm", ARM, APPLE, "tcg"),
  ("silicon", ARM, None, "tcg"),
  ("silicon", ARM, APPLE, "hvf"),
  ("silicon-bare", ARM, APPLE, "hvf"),
  ("intel", X86, None, "hvf"),
])  # fmt: skip
def test_m1_guests_boot(mac_of, machine, guest, own, used):
  mac = mac_of(machine)
  words = ("--qemu", str(mac.own_qemu(cpu_of(guest), own))) if own else ()
  result = mac("run", "--rm", *words, *guest)
  assert result.returncode == 0, result.stderr
  assert mac.accelerators() == [used]


@pytest.mark.parametrize("machine, how", [("silicon", None), ("runner", None), ("intel", "denied")])
def test_m1_hvf_that_was_asked_for_and_fails_is_explained(mac_of, machine, how):
  mac = mac_of(machine)
  mac.qemu_plays(hvf=how)
  result = mac("run", "--rm", "--accel", "hvf", *X86)
  assert result.returncode in (1, 134) and mac.accelerators() == []
  said = own_lines(result.stderr)
  assert "HVF" in said and "tcg" in said and "from outside" not in said


@pytest.mark.parametrize("name", ["SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGTRAP"])
def test_m1_a_crash_is_called_one(mac_of, name):
  mac, number = mac_of("intel"), getattr(signal, name)
  mac.qemu_plays(signal=number)
  result = mac("run", "--rm", "--accel", "tcg", *X86)
  assert result.returncode == 128 + number
  assert "crashed" in own_lines(result.stderr) and "from outside" not in result.stderr


def test_m1_an_end_from_outside_is_no_crash(mac_of):
  mac = mac_of("intel")
  mac.qemu_plays(signal=signal.SIGKILL)
  result = mac("run", "--rm", "--accel", "tcg", *X86)
  assert result.returncode == 128 + signal.SIGKILL
  assert "crashed" not in own_lines(result.stderr)


@pytest.mark.parametrize("machine", ["silicon", "vm", "intel", "intel-vm"])
def test_m1_doctor_tells_the_way_to_full_speed(mac_of, machine):
  checks = json.loads(mac_of(machine)("doctor", "--offline", "--json").stdout)
  text = " ".join(f"{check['text']} {check['fix']}" for check in checks)
  full_speed = "brew install qemu" in text and "qemu-system-aarch64" in text
  assert full_speed == (machine == "silicon")
  assert ("hv_support" in text) or ("HVF" in text and machine == "intel")
  hvf = next(check for check in checks if check["name"] == "HVF")
  assert "Intel; on Apple" not in hvf["text"] or not machine.startswith("intel")


def test_m1_a_qemu_of_the_macs_own_runs_arm64_at_full_speed(mac_of):
  mac = mac_of("silicon")
  own = str(put_program(mac.home / "own/qemu-system-aarch64", darwin_host.qemu(APPLE)))
  run = mac("doctor", "--offline", "--json", env={"QVM_QEMU_AARCH64": own})
  hvf = next(check for check in json.loads(run.stdout) if check["name"] == "HVF")
  assert hvf["state"] == "ok" and hvf["text"].endswith(f"at full speed ({own})")


def test_m1_hvf_that_fails_against_expectation_is_passed_over(mac_of):
  """QEMU aborts before the guest ran: once more with the next accelerator, said in one line."""
  mac = mac_of("intel")
  mac.qemu_plays(hvf="broken")
  result = mac("run", "--rm", *X86)
  assert result.returncode == 0, result.stderr
  assert len([line for line in own_lines(result.stderr).splitlines() if "tcg" in line]) == 1
  again = works(mac("run", "--rm", *X86))
  assert "HV_UNSUPPORTED" not in again.stderr and mac.accelerators() == ["tcg", "tcg"]


# --- M2: bundles ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
  """A bundle as NetBSD's: its disk has holes."""
  folder = tmp_path_factory.mktemp("bundle")
  with open(str(folder / "disk.img"), "wb") as file:
    file.write(b"boot" * 128)
    file.seek(3 << 20)
    file.write(b"data" * 5000)
    file.truncate(8 << 20)
  tar = tar_of({"disk.img": (folder / "disk.img").read_bytes(), "kernel": b"kernel"}, prefix="")
  packed = subprocess.run(["zstd", "-q", "-c"], input=tar, stdout=subprocess.PIPE, check=True)
  return folder / "disk.img", packed.stdout


@pytest.fixture
def bundled(server, bundle):
  server.repos["netbsd-builder"] = {}
  server.add_release("netbsd-builder", "v1.0.0", {f"{BUNDLE}.tar.zst": bundle[1]})
  return server


def homebrew(mac, name, text=""):
  """A program of that name in Homebrew's folder: the real one, or a script."""
  folder = mac.root / "opt/homebrew/bin"
  folder.mkdir(parents=True, exist_ok=True)
  if text:
    put_program(folder / name, text)
  else:
    (folder / name).unlink() if (folder / name).exists() else None
    (folder / name).symlink_to(shutil.which(name))
  if str(folder) not in mac.env["PATH"]:
    mac.env["PATH"] = f"{folder}:{mac.env['PATH']}"


def bundles_sent(server):
  assert server.wait_idle()
  return sum(each.sent for each in server.requests(f"{BUNDLE}.tar.zst", "cdn"))


def is_the_disk(mac, bundle):
  compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(bundle[0])]
  base = mac.cache / "base" / f"{BUNDLE}.qcow2"
  return subprocess.run([*compare, str(base)], stdout=subprocess.DEVNULL).returncode == 0


no_own_zstd = pytest.mark.skipif(VERSION >= (3, 14), reason="this Python knows zstd")


def test_m2_a_bundle_with_a_zstd(new_mac, bundled, bundle):
  mac = new_mac()
  homebrew(mac, "zstd")
  works(mac(*PULL_BUNDLE))
  assert is_the_disk(mac, bundle) and not mac.calls("bsdtar")


@no_own_zstd
def test_m2_a_bsdtar_without_zstd_is_none(new_mac, bundled, bundle):
  """Whether that is said before or after the download, the next pull goes on with it."""
  mac = new_mac()
  result = mac(*PULL_BUNDLE)
  assert result.returncode == 1 and "brew install zstd" in result.stderr
  assert "damaged" not in result.stderr
  assert all(call[1:] == ["--version"] for call in mac.calls("bsdtar"))
  homebrew(mac, "zstd")
  works(mac(*PULL_BUNDLE))
  assert is_the_disk(mac, bundle)
  assert bundles_sent(bundled) == len(bundle[1])
  checks = json.loads(mac("doctor", "--offline", "--json").stdout)
  assert next(check for check in checks if check["name"] == "zstd")["state"] == "ok"


@no_own_zstd
def test_m2_doctor_does_not_count_on_it(new_mac):
  checks = json.loads(new_mac()("doctor", "--offline", "--json").stdout)
  check = next(check for check in checks if check["name"] == "zstd")
  assert check["state"] == "warning" and "brew install zstd" in check["fix"]


@pytest.mark.skipif(not shutil.which("bsdtar"), reason="no bsdtar here")
@no_own_zstd
def test_m2_a_bsdtar_with_zstd_will_do(new_mac, bundled, bundle):
  mac = new_mac()
  homebrew(mac, "bsdtar")
  if "zstd" not in subprocess.check_output(["bsdtar", "--version"]).decode():
    pytest.skip("this bsdtar knows no zstd")
  works(mac(*PULL_BUNDLE))
  assert is_the_disk(mac, bundle)


@no_own_zstd
def test_m2_an_unpacker_that_fails_is_no_damaged_file(new_mac, bundled, bundle):
  mac = new_mac()
  homebrew(mac, "zstd", "#!/bin/sh\necho 'zstd: cannot allocate memory' >&2\nexit 1\n")
  result = mac(*PULL_BUNDLE)
  assert result.returncode == 1 and "cannot allocate memory" in result.stderr
  assert "damaged" not in result.stderr
  homebrew(mac, "zstd")
  works(mac(*PULL_BUNDLE))
  assert is_the_disk(mac, bundle) and bundles_sent(bundled) == len(bundle[1])


# --- M3 to M5: names -----------------------------------------------------------------------------


@pytest.fixture
def project(mac_of):
  """A Mac, a folder to synchronise, and how to run a script in it."""
  mac = mac_of("silicon")
  mac.guest_plays()
  folder = mac.home / "project"
  folder.mkdir()

  def run(script, *options, folder=str(folder), **more):
    return mac("run", "--rm", *port(), "--sync", folder, *options, *ARM, "--", script, **more)

  return mac, folder, run


@with_guest
def test_m3_the_repository_has_one_spelling(project):
  mac, folder, run = project
  (folder / ".git/hooks").mkdir(parents=True)
  (folder / ".git/hooks/pre-push").write_text("mine\n")
  script = "for d in .GIT .Git; do mkdir -p $d/hooks; echo theirs >$d/hooks/post-checkout; done; "
  result = works(run(script + "mkdir -p sub/.giT; echo theirs >sub/.giT/config; echo new >made"))
  assert os.listdir(folder / ".git/hooks") == ["pre-push"], result.stderr
  assert (folder / "made").read_text() == "new\n" and not (folder / "sub/.giT/config").exists()


@with_guest
@pytest.mark.parametrize("spelt", ["project", "PROJECT"])
def test_m3_a_cache_in_the_folder_stays_out(project, spelt):
  mac, folder, run = project
  cache = folder / ".qvm"
  mac.cache.rename(cache)
  before = (cache / "bin/qemu-img").read_bytes()
  mac.env["QVM_CACHE_DIR"] = str(cache)
  script = "ls -A; for d in .qvm .QVM; do mkdir -p $d/bin; echo theirs >$d/bin/qemu-img; done"
  result = run(script + "; echo new >made", folder=str(mac.home / spelt))
  assert result.returncode == 0, result.stderr
  assert (cache / "bin/qemu-img").read_bytes() == before
  assert ".qvm" not in result.stdout and (folder / "made").read_text() == "new\n"


@with_guest
def test_m3_a_file_that_gets_another_spelling_stays(project):
  mac, folder, run = project
  (folder / "Foo").write_text("foo\n")
  (folder / "Bar").write_text("bar\n")
  result = works(run("mv Foo foo; mv Bar bar; echo edited >>bar", "--sync-delete"))
  assert {path.name.lower(): path.read_text() for path in folder.iterdir()} == {
    "foo": "foo\n", "bar": "bar\nedited\n",
  }, result.stderr  # fmt: skip


@with_guest
def test_m3_what_gets_another_spelling_here_meanwhile_is_not_deleted(project):
  mac, folder, run = project
  (folder / "Foo").write_text("foo\n")
  (folder / "Old").write_text("old\n")
  here = shlex.quote(str(folder))  # the guest's shell can reach it: both are this machine
  works(run(f"rm Foo Old; mv {here}/Foo {here}/foo", "--sync-delete"))
  assert {path.name: path.read_text() for path in folder.iterdir()} == {"foo": "foo\n"}


@with_guest
def test_m3_what_is_excluded_is_not_overwritten_in_another_spelling(project):
  mac, folder, run = project
  (folder / "Keep").write_text("mine\n")
  result = run("echo theirs >keep; echo new >made", "--sync-exclude", "Keep")
  assert {path.name: path.read_text() for path in folder.iterdir()} == {
    "Keep": "mine\n", "made": "new\n",
  }, result.stderr  # fmt: skip
  assert "keep" in own_lines(result.stderr)


@with_guest
def test_m3_two_spellings_do_not_overwrite_each_other(project):
  """Whichever comes first is here; the other stays in the guest, and that is said."""
  mac, folder, _ = project
  works(mac("run", "-d", "--name", "vm", *port(), *ARM))
  pairs = (("Makefile", "makefile"), ("d/caf\u00e9", "d/cafe\u0301"))
  script = "mkdir -p work/project/d; cd work/project; "
  script += "".join(f"echo one >{one}; echo two >{two}; " for one, two in pairs)
  works(mac("ssh", "vm", "--", script))
  result = works(mac("ssh", "vm", "--sync", str(folder), "--sync-direction", "out", "--", "true"))
  found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
  assert len(found) == 2
  for one, two in pairs:
    [here] = {one, two} & set(found)
    assert found[here] == ("one\n" if here == one else "two\n")
    other = one if here == two else two
    assert any(other in line for line in own_lines(result.stderr).splitlines()), result.stderr


@with_guest
def test_m3_the_folder_of_results_by_another_spelling(project):
  mac, folder, _ = project
  words = ("each", "--sync", str(folder), "--sync-out", str(mac.home / "PROJECT"))
  fails(mac(*words, "freebsd-15.1-arm64", "--", "true"), "--sync-out", code=2)


@with_guest
def test_m3_a_pattern_finds_a_name_that_is_composed_otherwise(project):
  mac, folder, run = project
  (folder / "cafe\u0301").mkdir()
  (folder / "cafe\u0301/x").write_text("mine\n")
  result = works(run("ls; true", "--sync-exclude", "caf\u00e9"))
  assert result.stdout == ""


@with_guest
def test_m4_a_name_that_cannot_be_here_stays_there_and_the_rest_comes(project):
  mac, folder, run = project
  script = "mkdir d; for f in a \"$(printf '\\377')\" \"d/$(printf 'x\\303')\" z; do echo $f; done "
  script += ">/dev/null; echo x >\"$(printf '\\377')\"; echo x >\"d/$(printf 'x\\303')\"; "
  result = run(script + "echo 1 >a; echo 2 >z; echo 3 >d/e; exit 3")
  assert result.returncode == 3, result.stderr
  found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
  assert found == {"a", "z", "d/e"}
  assert len([line for line in own_lines(result.stderr).splitlines() if "stay" in line]) >= 1


@with_guest
def test_m5_a_python_without_dir_fd_is_refused_before_the_boot(project):
  mac, folder, run = project
  result = run("echo new >made", env={"DARWIN_DIR_FD": "no"})
  assert result.returncode == 125 and mac.calls("qemu") == []
  assert "Python" in own_lines(result.stderr) and "bug" not in result.stderr


@linux
def test_m5_a_python_without_dir_fd_is_refused_before_a_download(new_mac):
  """What comes is unpacked relative to folders, too."""
  mac = new_mac()
  result = mac("pull", *ARM, env={"DARWIN_DIR_FD": "no"})
  assert result.returncode == 1 and "Python 3.9 or newer" in result.stderr, result.stderr
  assert "downloading" not in result.stderr and "bug" not in result.stderr
  works(mac("pull", *ARM))
  works(mac("run", "--rm", *ARM, env={"DARWIN_DIR_FD": "no"}))


# --- M6: completion ------------------------------------------------------------------------------

# What bash 3.2, which every Mac has, does not know.
BASH_4 = {
  "an element from the end": r"\[-[0-9]+\]",
  "a slice from the end of an array": r"\[@\]:-|\[@\]: -",
  "changes of case": r"\$\{[^}]*(\^|,)",
  "associative arrays": r"(declare|local|typeset) -[a-zA-Z]*[Agn]",
  "mapfile": r"\b(mapfile|readarray|coproc|compopt)\b",
  "redirections": r"&>>|\|&|;&|;;&",
  "tests of variables": r"\[\[? *-[vR] ",
  "transformations": r"\$\{[^}]*@[QEPAa]\}",
  "a length cut off": r"\$\{[^}]*:[^}]*:-[0-9 ]",
}


def test_m6_bash_3_2_understands_the_completion(new_mac):
  script = works(new_mac()("completion", "bash")).stdout
  assert [what for what, pattern in BASH_4.items() if re.search(pattern, script)] == []


@pytest.mark.skipif(not REAL_MAC, reason="only a Mac has bash 3.2")
def test_m6_bash_of_this_mac_completes(new_mac, tmp_path):
  script = tmp_path / "completion"
  script.write_text(works(new_mac()("completion", "bash")).stdout)
  lines = 'source "$0"; COMP_WORDS=(qvm ru); COMP_CWORD=1; COMP_LINE="qvm ru"; COMP_POINT=6; _qvm; '
  run = subprocess.run(
    ["/bin/bash", "-c", lines + 'echo "${COMPREPLY[*]}"', str(script)],
    capture_output=True,
    text=True,
  )
  assert (run.stdout, run.stderr) == ("run\n", "")


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_m6_zsh_without_any_settings_takes_the_completion(new_mac, tmp_path):
  """As `source <(qvm completion zsh)` in an empty .zshrc, where compinit has not run."""
  script = tmp_path / "completion"
  script.write_text(works(new_mac()("completion", "zsh")).stdout)
  run = subprocess.run(
    ["zsh", "-f", "-c", 'source "$0"; print -r -- "$_comps[qvm]"', str(script)],
    env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert (run.stdout, run.stderr) == ("_qvm\n", "")


# --- M7 to M15 -----------------------------------------------------------------------------------


def test_m7_a_port_at_which_somebody_answers_is_taken(mac_of):
  mac = mac_of("intel")
  with socket.socket() as other:
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    other.bind(("0.0.0.0", 0))
    other.listen()
    number = str(other.getsockname()[1])
    result = mac("run", "--rm", "--accel", "tcg", "--ssh-port", number, *X86)
  assert result.returncode == 1 and mac.calls("qemu") == [], result.stderr
  assert number in own_lines(result.stderr) and "taken" in own_lines(result.stderr)


@linux
def test_m8_a_disk_is_flushed_before_it_is_converted(new_mac, bundled, bundle):
  mac = new_mac("intel")
  homebrew(mac, "zstd")
  works(mac(*PULL_BUNDLE))
  calls = mac.calls()
  at = next(n for n, call in enumerate(calls) if call[:2] == ["qemu-img", "convert"])
  raw = os.path.realpath(calls[at][-2])
  assert ["fsync", raw] in [[call[0], os.path.realpath(call[1])] for call in calls[:at] if call[1:]]


@linux
def test_m8_data_that_was_taken_for_a_hole_is_noticed(new_mac, bundled, bundle):
  mac = new_mac("intel")
  homebrew(mac, "zstd")
  mac.qemu_plays(lies=True)
  result = mac(*PULL_BUNDLE)
  assert result.returncode == 1 and "Content mismatch" in result.stderr, result.stderr
  assert not list((mac.cache / "base").glob("*"))
  mac.qemu_plays()
  works(mac(*PULL_BUNDLE))
  assert is_the_disk(mac, bundle)


DYLD = """\
dyld[4711]: Symbol not found: _strchrnul
  Referenced from: <4C4C44> /Users/me/.cache/qvm/qemu/x86_64/bin/qemu-system-x86_64
  Expected in:     <A54E37> /usr/lib/libSystem.B.dylib
"""


def test_m9_a_macos_that_is_too_old_is_named(mac_of):
  mac = mac_of("intel")
  mac.qemu_plays(stderr=DYLD, signal=signal.SIGABRT)
  result = mac("run", "--rm", "--accel", "tcg", *X86)
  assert result.returncode == 134
  assert re.search(r"macOS.*1[35]", own_lines(result.stderr), re.S), result.stderr


def certificate(folder):
  """A server's side of TLS with a certificate of its own making, and the file to trust it by."""
  key, cert = str(folder / "key.pem"), str(folder / "cert.pem")
  command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
  more = ["-keyout", key, "-out", cert, "-subj", "/CN=localhost"]
  more += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
  subprocess.run([*command.split(), *more], check=True, stderr=subprocess.DEVNULL)
  tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  tls.load_cert_chain(cert, key)
  return tls, cert


@linux
def test_m10_a_python_without_certificates_takes_the_systems(new_mac, tmp_path, image):
  mac = new_mac()
  tls, cert = certificate(tmp_path)
  (mac.root / "etc/ssl").mkdir(parents=True)
  shutil.copy(cert, str(mac.root / "etc/ssl/cert.pem"))
  with ReleaseServer(tls) as secure:
    serve_macs(secure, image)
    mac.env.update(QVM_RELEASES_URL=secure.url, QVM_API_URL=secure.api_url)
    works(mac("pull", *ARM, env={"DARWIN_CERTIFICATES": "no"}))


@linux
def test_m10_who_names_certificates_is_obeyed(new_mac, tmp_path, image):
  mac = new_mac()
  (tmp_path / "other").mkdir()
  tls, cert = certificate(tmp_path)
  (mac.root / "etc/ssl").mkdir(parents=True)
  shutil.copy(cert, str(mac.root / "etc/ssl/cert.pem"))
  env = {"DARWIN_CERTIFICATES": "no", "SSL_CERT_FILE": certificate(tmp_path / "other")[1]}
  with ReleaseServer(tls) as secure:
    serve_macs(secure, image)
    mac.env.update(QVM_RELEASES_URL=secure.url, QVM_API_URL=secure.api_url)
    assert mac("pull", *ARM, env=env).returncode == 1
    works(mac("pull", *ARM, env={**env, "SSL_CERT_FILE": cert}))


@linux
def test_the_macs_own_python_trusts_the_certificates_that_are_named(new_mac, tmp_path, image):
  """Its LibreSSL does not know SSL_CERT_FILE, of which qvm says that it helps."""
  mac = new_mac()
  (tmp_path / "other").mkdir()
  tls, cert = certificate(tmp_path)
  with ReleaseServer(tls) as secure:
    serve_macs(secure, image)
    mac.env.update(QVM_RELEASES_URL=secure.url, QVM_API_URL=secure.api_url)
    mac.env.update(DARWIN_CERTIFICATES="apple", QVM_RETRY_DELAY="0")
    for file in ("", str(tmp_path / "none"), certificate(tmp_path / "other")[1]):
      result = mac("pull", *ARM, env={"SSL_CERT_FILE": file})
      assert result.returncode == 1 and "set SSL_CERT_FILE" in result.stderr, result.stderr
    works(mac("pull", *ARM, env={"SSL_CERT_FILE": cert}))


@linux
def test_m11_qemu_may_open_more_files(mac_of):
  mac = mac_of("intel")
  works(mac("run", "--rm", "--accel", "tcg", *X86))
  [[_, _, _, limit, _]] = mac.calls("qemu")
  assert int(limit) == min(10240, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


@linux
def test_m12_two_names_that_are_one_here(mac_of):
  mac = mac_of("intel")
  works(mac("run", "--name", "web", *X86))
  before = {p.name: p.read_bytes() for p in (mac.cache / "instances").iterdir()}
  for words in (("run", "--name", "Web", *X86), ("rm", "Web")):
    result = mac(*words)
    said = own_lines(result.stderr)
    assert result.returncode == 1 and "damaged" not in said, result.stderr
    assert re.search(r"\bweb\b", said) and "Web" in said
    assert {p.name: p.read_bytes() for p in (mac.cache / "instances").iterdir()} == before
  assert [row["name"] for row in json.loads(works(mac("list", "--json")).stdout)] == ["web"]


def test_m13_time_machine_leaves_the_cache_alone(new_mac):
  mac = new_mac()
  works(mac("pull", *ARM))
  [call] = mac.calls("tmutil")
  assert call[1] == "addexclusion" and os.path.samefile(call[-1], str(mac.cache))
  works(mac("pull", *X86))
  assert len(mac.calls("tmutil")) == 1


@pytest.mark.parametrize("how", ["fails", "is not there"])
def test_m13_a_time_machine_that_does_not_answer_is_no_reason_to_fail(new_mac, how):
  mac = new_mac()
  (mac.root / "usr/bin/tmutil").unlink()
  if how == "fails":
    put_program(mac.root / "usr/bin/tmutil", "#!/bin/sh\necho no rights >&2\nexit 80\n")
  result = works(mac("pull", *ARM))
  assert "no rights" not in result.stderr or "Time Machine" in result.stderr


@with_guest
@pytest.mark.parametrize("detached", [False, True])
def test_m14_the_mac_stays_awake_for_as_long_as_qemu_runs(mac_of, detached):
  mac = mac_of("intel")
  mac.guest_plays()
  if detached:
    works(mac("run", "-d", "--name", "vm", *port(), *X86))
    works(mac("stop", "vm"))
  else:
    works(mac("run", "--rm", *port(), *X86, "--", "true"))
  wait_for(lambda: mac.calls("caffeinate"))  # for which nobody waits
  [[_, *words]] = mac.calls("caffeinate")
  pid = mac.calls("qemu")[0][4]
  assert "-i" in words and words[words.index("-w") + 1] == pid
  assert not awake(mac, pid)


def awake(mac, pid):
  """The caffeinates that still wait for that process; none once it has ended."""
  deadline = time.monotonic() + DEADLINE
  while time.monotonic() < deadline:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
      with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
        words = file.read().split(b"\0")
        if any(w.endswith(b"/caffeinate") for w in words) and pid.encode() in words:
          found.append(entry)
    if not found:
      return []
    time.sleep(0.02)
  return found


@with_guest
def test_m15_warm_starts_with_hvf_are_said_to_be_untried(mac_of):
  mac = mac_of("intel")
  mac.guest_plays(control={"accelerator": "hvf"})
  result = works(mac("run", "--rm", "--warm", *port(), *X86, "--", "echo fine"))
  assert result.stdout == "fine\n"
  assert re.search(r"HVF.*(untried|tried|tested)", own_lines(result.stderr)), result.stderr


# --- On this very Mac ----------------------------------------------------------------------------


def asks(*words):
  """What a program of this Mac answers."""
  run = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  return run.stdout.strip()


@pytest.fixture
def native(tmp_path, server):
  """qvm on this Mac as it is, without any stand-in but for the servers and QEMU."""
  home = tmp_path / "home"
  home.mkdir()
  return Qvm(home, ROOT / "qvm.py", server)


@pytest.mark.skipif(not REAL_MAC, reason="only on a Mac")
def test_this_mac_gets_the_accelerator_that_it_has(native):
  hvf = asks("sysctl", "-n", "kern.hv_support") == "1"
  apple = asks("sysctl", "-n", "hw.optional.arm64") == "1"
  shown = works(native("run", "--dry-run", *X86)).stdout
  expected = "hvf:tcg" if hvf and not apple else "tcg"
  assert re.search(r"[ ,]accel[ =]([a-z:]+)", shown).group(1) == expected
  checks = {c["name"]: c for c in json.loads(native("doctor", "--offline", "--json").stdout)}
  assert checks["cache"]["state"] == checks["ssh"]["state"] == "ok"


@pytest.mark.skipif(not REAL_MAC, reason="only on a Mac")
def test_this_macs_time_machine_leaves_the_cache_alone(native):
  native("pull", *X86)
  assert "[Excluded]" in asks("tmutil", "isexcluded", str(native.cache))


@linux
def test_a_mac_without_rosetta_downloads_nothing(new_mac):
  """It could not run what comes; `doctor` has the same fix, and says nothing of deleting."""
  mac = new_mac("silicon-bare")
  result = mac("run", "--rm", *ARM)
  assert result.returncode == 1 and "no Rosetta" in result.stderr, result.stderr
  assert "softwareupdate --install-rosetta" in result.stderr
  assert not (mac.cache / "downloads").exists()
  works(mac("run", "--dry-run", *ARM))


def test_a_version_in_another_spelling(new_mac):
  """The overlay named its base so, and `clean --all` deleted that under it."""
  mac = new_mac("intel")
  works(mac("pull", "--platform", "x86-64", "haiku", "r1beta5"))
  run = mac("run", "--platform", "x86-64", "haiku", "R1BETA5")
  assert run.returncode == 1
  assert "the names haiku-R1BETA5-x86-64 and haiku-r1beta5-x86-64 for one" in run.stderr


@linux
def test_the_finder_does_no_damage_to_qemu(mac_of):
  """It leaves a file in each folder that somebody looks into."""
  mac = mac_of()
  for folder in {path.parent for path in mac.cache.rglob("*")}:
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1\xff")
  result = works(mac("pull", "--verify", *ARM))
  assert "damaged" not in result.stderr and "downloading" not in result.stderr, result.stderr


DENIED = """
real = os.open
def denied(path, *words, **more):
  if path == {path!r}:
    raise PermissionError(1, "Operation not permitted", path)
  return real(path, *words, **more)
os.supports_dir_fd.add(denied)
os.open = denied
"""


@linux
def test_a_folder_of_the_users_that_the_terminal_may_not_read(mac_of):
  """Documents and Desktop are for programs to which the user has allowed that."""
  mac = mac_of()
  folder = mac.home / "Documents"
  folder.mkdir()
  words = ("run", "--rm", "--sync", str(folder), *ARM, "--", "true")
  result = mac(*words, code=DENIED.format(path=str(folder)))
  assert result.returncode == 125 and "Privacy & Security" in result.stderr, result.stderr
  code = "real = os.listdir\ndef listdir(path):\n  if isinstance(path, int):\n"
  code += "    raise PermissionError(1, 'Operation not permitted')\n  return real(path)\n"
  result = mac(*words, code=code + "os.listdir = listdir\n")
  assert result.returncode == 125 and "Privacy & Security" in result.stderr, result.stderr
