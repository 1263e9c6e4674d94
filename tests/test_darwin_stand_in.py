"""The stand-in for Darwin: what the tests of Macs rely on, with every Python.

On a real Mac the stand-in leaves the file system, the sockets and the modules alone, so that there
these tests show whether a Mac is as the stand-in says.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from darwin_host import APPLE, DARWIN, INTEL, MACHINES, Mac, macho, put_program, qemu
from support import DEADLINE
from support_pythons import MODERN, every_python

REAL_MAC = sys.platform == "darwin"
linux = pytest.mark.skipif(REAL_MAC, reason="the stand-in for what Linux has otherwise")

# Runs a test's lines; `tried` says what a call does, an error as its kind, errno and path.
PROBE = """
import json, os, sys
def tried(function, *args, **more):
  try:
    return function(*args, **more)
  except Exception as error:
    found = getattr(error, "filename", None)
    name = found if isinstance(found, (str, type(None))) else repr(found)
    return [type(error).__name__, getattr(error, "errno", None) and os.strerror(error.errno), name]
def write(path, text, **more):
  with open(path, "w", **more) as file:
    file.write(text)
def read(path):
  with open(path) as file:
    return file.read()
"""
NOT_THERE = "No such file or directory"


def under(mac, lines, python=sys.executable, **more):
  """What lines that print JSON print under the stand-in."""
  run = subprocess.run(
    [python, "-c", PROBE + lines],
    env={**mac.env, **more.pop("env", {})},
    cwd=str(mac.home),
    capture_output=True,
    timeout=DEADLINE,
    **more,
  )
  assert run.returncode == 0 and run.stderr == b"", run.stderr.decode()
  return json.loads(run.stdout.decode())


@pytest.fixture
def mac(tmp_path):
  return Mac(tmp_path)


# --- The system --------------------------------------------------------------------------------


@every_python
def test_python_and_its_modules_load(mac, python):
  """All that qvm may load does, also what asks a Mac for more than it says of itself."""
  names = "argparse base64 ctypes getpass hashlib http.client ipaddress json locale logging "
  names += "multiprocessing pathlib platform pwd random secrets select selectors shlex shutil ssl "
  names += "subprocess sysconfig tarfile tempfile termios threading tty unicodedata urllib.request "
  names += "uuid zipfile"
  lines = f"""
import importlib, warnings
warnings.simplefilter("error", ResourceWarning)
for name in {names.split()!r}: importlib.import_module(name)
import platform, selectors, shutil, urllib.request
print(json.dumps([sys.platform, platform.system(), platform.mac_ver()[0],
                  urllib.request.getproxies(), shutil.rmtree.avoids_symlink_attacks,
                  selectors.DefaultSelector is selectors.PollSelector]))
"""
  env = {"DARWIN_PROXIES": '{"https": "http://proxy:3128"}'}
  seen = under(mac, lines, python, env=env)
  assert seen == ["darwin", "Darwin", "15.6", {"https": "http://proxy:3128"}, True, not REAL_MAC]


@pytest.mark.parametrize("machine, cpu, kernel", [
  ("silicon", "arm64", "ARM64_T6000"),
  ("silicon-bare", "arm64", "ARM64_T6000"),
  ("rosetta", "x86_64", "ARM64_T6000"),
  ("vm", "arm64", "ARM64_VMAPPLE"),
  ("runner", "arm64", "ARM64_VMAPPLE"),
  ("intel", "x86_64", "X86_64"),
  ("intel-vm", "x86_64", "X86_64"),
])  # fmt: skip
def test_uname_of_each_machine(tmp_path, machine, cpu, kernel):
  mac = Mac(tmp_path, machine)
  lines = "import platform; u = os.uname(); print(json.dumps([*u, platform.machine(), u.machine]))"
  seen = under(mac, lines)
  assert (seen[0], seen[4:]) == ("Darwin", [cpu, cpu, cpu])
  assert seen[3].endswith("RELEASE_" + kernel)
  rosetta = mac.root / "Library/Apple/usr/share/rosetta"
  lines = "print(json.dumps(os.path.exists('/Library/Apple/usr/share/rosetta')))"
  assert (
    under(mac, lines) == rosetta.exists() == (machine in ("silicon", "rosetta", "vm", "runner"))
  )


@linux
@every_python
def test_there_is_no_proc(mac, python):
  lines = """
import glob, io, pathlib
path = "/proc/self/status"
print(json.dumps([
  tried(open, path), tried(io.open, path, "rb"), tried(os.open, path, os.O_RDONLY),
  tried(os.listdir, "/proc"), tried(os.scandir, b"/proc/self"), tried(os.readlink, "/proc/self"),
  tried(os.stat, "/proc/../proc/cpuinfo"), tried(os.lstat, "/dev/kvm"),
  tried(open, "/etc/os-release"),
  os.path.exists("/proc"), os.path.isdir("/sys"), os.path.lexists("/proc/self"),
  os.access("/proc/meminfo", os.R_OK), pathlib.Path("/proc").exists(), glob.glob("/proc/*"),
  list(os.walk("/proc")), os.path.exists("/dev/null"), os.path.isdir("/usr/bin"),
]))
"""
  seen = under(mac, lines, python)
  assert [(kind, number) for kind, number, _ in seen[:9]] == [("FileNotFoundError", NOT_THERE)] * 9
  assert seen[2][2] == "/proc/self/status"
  assert seen[9:] == [False, False, False, False, False, [], [], True, True]


@every_python
def test_there_is_nothing_of_linux_in_the_modules(mac, python):
  gone = {
    "os": "posix_fallocate posix_fadvise memfd_create pidfd_open sched_getaffinity setxattr "
    "getxattr pipe2 eventfd copy_file_range splice getrandom fdatasync O_TMPFILE O_PATH O_DIRECT "
    "O_NOATIME MFD_CLOEXEC",
    "socket": "SOCK_CLOEXEC SOCK_NONBLOCK AF_NETLINK AF_VSOCK SO_PEERCRED SO_BINDTODEVICE "
    "MSG_NOSIGNAL TCP_USER_TIMEOUT TCP_CORK",
    "select": "epoll EPOLLIN EPOLL_CLOEXEC",
    "selectors": "EpollSelector",
    "fcntl": "F_SETPIPE_SZ F_OFD_SETLK F_ADD_SEALS",
    "resource": "prlimit",
    "signal": "sigtimedwait SIGRTMIN SIGPWR",
    "time": "CLOCK_BOOTTIME",
  }
  here = {
    "os": "O_CLOEXEC O_NOFOLLOW O_DIRECTORY pread sendfile statvfs fsync posix_spawn",
    "socket": "AF_UNIX SO_REUSEPORT socketpair",
    "select": "poll",
    "fcntl": "F_FULLFSYNC flock lockf",
  }
  lines = f"""
import importlib
def named(table):
  return [m + "." + n for m, names in table.items() for n in names.split()
          if hasattr(importlib.import_module(m), n)]
print(json.dumps([named({gone!r}), named({here!r})]))
"""
  found, kept = under(mac, lines, python)
  kept += ["os.posix_spawn"] if MODERN.get("3.6") == python or MODERN.get("3.7") == python else []
  assert found == []
  assert set(kept) == {f"{m}.{n}" for m, names in here.items() for n in names.split()}


@linux
@every_python
def test_open_files_are_few_and_who_raises_the_limit_keeps_it(mac, python):
  lines = """
import resource, subprocess
def soft(): return resource.getrlimit(resource.RLIMIT_NOFILE)
seen = [soft(), tried(resource.setrlimit, resource.RLIMIT_NOFILE, (resource.RLIM_INFINITY,) * 2),
        tried(resource.setrlimit, resource.RLIMIT_NOFILE, (10241, soft()[1]))]
child = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
for limit in (256, 1000):
  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, soft()[1]))
  seen.append(int(subprocess.check_output([sys.executable, "-c", child])))
print(json.dumps(seen))
"""
  start, endless, more, *children = under(mac, lines, python)
  assert start == [256, 2**63 - 1] and children == [256, 1000]
  assert endless[0] == more[0] == "ValueError"


@every_python
def test_paths_of_sockets_are_short(mac, python):
  folder = mac.home / "s"
  folder.mkdir()
  fits = str(folder) + "/" + "x" * (103 - len(str(folder)) - 1)
  if len(fits) != 103:
    pytest.skip("the temporary folder has a long path")
  lines = f"""
import socket
fits, seen = {fits!r}, []
for path in (fits, fits + "y", "\\0abstract", {str(mac.users / "ME/S/z")!r}):
  with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
    seen.append([tried(server.bind, path), tried(server.listen), tried(client.connect, path)])
    if len(path) > 103: seen[-1][1] = None
print(json.dumps([seen, sorted(os.listdir({str(folder)!r}))]))
"""
  (good, long, abstract, folded), names = under(mac, lines, python)
  assert good == [None, None, None] and folded == [None, None, None]
  assert long[0] == long[2] == ["OSError", None, None]
  assert abstract[0][0] == abstract[2][0] == "FileNotFoundError"
  assert names == sorted([os.path.basename(fits), "z"])


def test_an_address_is_free_beside_a_listener_on_all(mac):
  """XNU's SO_REUSEADDR, by which a probe does not see who listens on *:PORT."""
  lines = """
import socket
def bind(address, reuse, port):
  with socket.socket() as link:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    return tried(link.bind, (address, port))
seen = []
for address in ("", "127.0.0.1"):
  with socket.socket() as server:
    server.bind((address, 0))
    server.listen()
    port = server.getsockname()[1]
    seen.append([bind("127.0.0.1", 1, port), bind("127.0.0.1", 0, port), bind("", 1, port)])
print(json.dumps(seen))
"""
  everywhere, one = under(mac, lines)
  used = ["OSError", "Address already in use", None]
  assert everywhere == [None, used, used] and one[:2] == [used, used]


# --- Names that fold ---------------------------------------------------------------------------


@every_python
def test_names_fold_and_keep_their_first_spelling(mac, python):
  lines = """
import io, shutil
nfc, nfd = "\\u00e9", "e\\u0301"
write("Makefile", "one")
write("makefile", "two")
write("caf" + nfd, "nfd")
os.mkdir("Src")
write("src/Main.c", "main")
os.symlink("Src", "Link")
fd = os.open("SRC", os.O_RDONLY | os.O_DIRECTORY)
seen = {
  "names": sorted(os.listdir(".")),
  "content": [read("MAKEFILE"), read("caf" + nfc), read("sRC/mAIN.C"), read("link/MAIN.C")],
  "taken": [tried(os.mkdir, "SRC"), tried(open, "makeFILE", "x"), tried(os.symlink, "x", "LINK"),
            tried(os.open, "Makefile", os.O_CREAT | os.O_EXCL | os.O_WRONLY),
            tried(os.mkdir, "main.C", dir_fd=fd)],
  "same": [os.path.samefile("src", "SRC"), os.readlink("lINK"), os.path.exists(b"SRC/main.c"),
           os.stat("main.c", dir_fd=fd).st_size, os.lstat("MAIN.c", dir_fd=fd).st_size,
           [e.name for e in os.scandir("SRC")], os.access("MAIN.C", os.R_OK, dir_fd=fd)],
  "missing": [tried(os.stat, "None"), tried(os.stat, "NONE", dir_fd=fd), tried(read, "src/NONE")],
}
os.rename("Main.C", "New", src_dir_fd=fd, dst_dir_fd=fd)
os.rename("new", "NEW", src_dir_fd=fd, dst_dir_fd=fd)
os.rename("MAKEFILE", "MakeFile")
os.replace("caf" + nfc, "caf" + nfc)
write("tmp", "three")
os.rename("tmp", "MAKEfile")
seen["renamed"] = [sorted(os.listdir(".")), os.listdir("src"), read("makefile")]
os.unlink("new", dir_fd=fd)
os.close(fd)
os.rmdir("SRC")
os.remove("MAKEFILE")
seen["gone"] = sorted(os.listdir("."))
print(json.dumps(seen))
"""
  seen = under(mac, lines, python)
  assert seen["names"] == ["Link", "Makefile", "Src", "cafe\u0301"]
  assert seen["content"] == ["two", "nfd", "main", "main"]
  assert {kind for kind, *_ in seen["taken"]} == {"FileExistsError"}
  assert seen["same"] == [True, "Src", True, 4, 4, ["Main.c"], True]
  assert {kind for kind, *_ in seen["missing"]} == {"FileNotFoundError"}
  assert [name for *_, name in seen["missing"]] == ["None", "NONE", "src/NONE"]
  names = ["Link", "MakeFile", "Src", "caf\u00e9"]
  assert seen["renamed"] == [names, ["NEW"], "three"]
  assert seen["gone"] == ["Link", "caf\u00e9"]


@every_python
def test_names_that_are_no_text_are_refused(mac, python):
  lines = r"""
fd = os.open(".", os.O_RDONLY)
print(json.dumps([tried(open, b"\xff", "w"), tried(os.mkdir, "a\udcffb"), tried(os.stat, "\udcc3"),
                  tried(os.open, "\udcff", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd),
                  tried(os.symlink, "x", "\udcff"), tried(os.rename, "a", b"\xfe"),
                  os.listdir(".")]))
"""
  *refused, names = under(mac, lines, python)
  assert {number for _, number, _ in refused[:5]} == {os.strerror(errno.EILSEQ)} and names == []
  assert refused[5][0] in ("OSError", "FileNotFoundError")


@linux
def test_only_the_chosen_folder_folds(mac, tmp_path_factory):
  outside = str(tmp_path_factory.mktemp("outside"))
  lines = f"""
os.chdir({outside!r})
write("a", "1"); write("A", "2"); open(b"\\xff", "w").close()
print(json.dumps([len(os.listdir(".")), tried(read, {str(mac.users).upper()!r}),
                  os.path.isdir({str(mac.users.parent / "USERS/ME")!r})]))
"""
  count, upper, folded = under(mac, lines)
  assert (count, folded) == (3, True)
  assert upper[0] == "FileNotFoundError"


def test_a_path_is_not_longer_than_1024(mac):
  lines = "print(json.dumps([tried(os.stat, 'x/' * n) for n in (500, 512)]))"
  short, long = under(mac, lines)
  assert (short[1], long[1]) == (NOT_THERE, os.strerror(errno.ENAMETOOLONG))


@every_python
def test_a_python_without_dir_fd(mac, python):
  lines = """
import shutil
print(json.dumps([tried(os.open, "x", 0, dir_fd=3), tried(os.rename, "x", "y", src_dir_fd=3),
                  os.open in os.supports_dir_fd, tried(os.stat, ".", dir_fd=None) is not None,
                  shutil.rmtree.avoids_symlink_attacks]))
"""
  seen = under(mac, lines, python, env={"DARWIN_DIR_FD": "no"})
  assert [seen[0][0], seen[1][0]] == ["NotImplementedError"] * 2
  assert seen[2:] == [False, True, False]


def test_locks_that_let_everybody_in(mac):
  lines = """
import fcntl
a, b = open("f", "w"), open("f", "w")
fcntl.flock(a, fcntl.LOCK_EX | fcntl.LOCK_NB)
print(json.dumps(tried(fcntl.flock, b, fcntl.LOCK_EX | fcntl.LOCK_NB)))
a.close(); b.close()
"""
  assert under(mac, lines)[0] == "BlockingIOError"
  if not REAL_MAC:
    assert under(mac, lines, env={"DARWIN_FLOCK": "no"}) is None


def test_no_place_for_temporary_files(mac):
  lines = """
import tempfile
os.chdir("/")
print(json.dumps([tried(tempfile.gettempdir), tried(write, os.environ["HOME"] + "/x", "fine")]))
"""
  env = {"DARWIN_TMP": "no", "TMPDIR": "/nowhere"}
  failed, fine = under(mac, lines, env=env)
  assert failed[0] == "FileNotFoundError" and fine is None


@linux
def test_fsync_is_noted(mac):
  lines = """
import fcntl
with open("File", "w") as file:
  os.fsync(file)
  os.fsync(file.fileno())
  fcntl.fcntl(file, fcntl.F_FULLFSYNC)
print("null")
"""
  under(mac, lines)
  assert mac.calls() == [["fsync", str(mac.home / "File")]] * 3


# --- Programs ----------------------------------------------------------------------------------

ASK = """
import subprocess
def ask(*words, **more):
  streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
  run = subprocess.Popen(words, **streams, **more)
  out = run.communicate()[0].decode()
  return [run.returncode, out]
"""
FACTS = ("kern.hv_support", "hw.optional.arm64", "sysctl.proc_translated",
         "machdep.cpu.brand_string")  # fmt: skip


@pytest.mark.parametrize("machine, facts", [
  ("silicon", ["1", "1", "0", "Apple M2"]),
  ("silicon-bare", ["1", "1", "0", "Apple M2"]),
  ("rosetta", ["1", "1", "1", "Apple M2"]),
  ("vm", ["0", "1", "0", "Apple M1 (Virtual)"]),
  ("runner", [None, "1", "0", "Apple M1 (Virtual)"]),
  ("intel", ["1", None, None, "Intel(R) Core(TM) i7-8700B CPU @ 3.20GHz"]),
  ("intel-vm", ["0", None, None, "Intel(R) Core(TM) i7-8700B CPU @ 3.20GHz"]),
])  # fmt: skip
def test_sysctl_tells_what_the_machine_has(tmp_path, machine, facts):
  mac = Mac(tmp_path, machine)
  lines = ASK + f"print(json.dumps([ask('/usr/sbin/sysctl', '-n', f) for f in {FACTS!r}]))"
  expected = [
    [0, value + "\n"] if value else [1, f"sysctl: unknown oid '{name}'\n"]
    for name, value in zip(FACTS, facts)
  ]
  assert under(mac, lines) == expected
  assert mac.calls() == [["sysctl", "-n", name] for name in FACTS]
  lines = ASK + "print(json.dumps(ask('sysctl', '-in', 'kern.nothing', 'kern.hv_support')))"
  assert under(mac, lines) == [0, facts[0] + "\n" if facts[0] else ""]


@every_python
def test_programs_of_a_mac_start_and_record_their_calls(mac, python):
  lines = (
    ASK
    + """
print(json.dumps([ask("sw_vers", "-productVersion"), ask("/usr/bin/sw_vers", "-productVersion"),
  ask("/usr/bin/tmutil", "addexclusion", "-p", "/a b"), ask(b"tmutil", b"nonsense")[0],
  ask("whatever", "--version", executable="/usr/bin/bsdtar"),
  ask("bsdtar", "-cf", "-", "@-"), subprocess.call("tmutil isexcluded x", shell=True)]))
"""
  )
  versions, again, excluded, nonsense, bsdtar, failed, shell = under(mac, lines, python)
  assert versions == again == [0, "15.6\n"] and excluded == [0, ""] and nonsense == 64
  assert bsdtar[0] == 0 and "libarchive" in bsdtar[1] and "zstd" not in bsdtar[1]
  assert failed[0] == 1 and "zstd -d -qq" in failed[1] and shell == 0
  assert mac.calls("tmutil") == [
    ["tmutil", "addexclusion", "-p", "/a b"], ["tmutil", "nonsense"], ["tmutil", "isexcluded", "x"],
  ]  # fmt: skip
  assert mac.calls("sw_vers") == [["sw_vers", "-productVersion"]] * 2


@linux
def test_caffeinate_lasts_as_long_as_the_process(mac):
  lines = """
import subprocess
sleep = subprocess.Popen(["/bin/sh", "-c", "read x"], stdin=subprocess.PIPE)
awake = subprocess.Popen(["/usr/bin/caffeinate", "-i", "-w", str(sleep.pid)])
first = awake.poll()
sleep.communicate(b"x\\n")
print(json.dumps([first, awake.wait(30), sleep.pid]))
"""
  first, code, pid = under(mac, lines)
  assert (first, code) == (None, 0)
  assert mac.calls("caffeinate") == [["caffeinate", "-i", "-w", str(pid)]]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("cpu", [INTEL, APPLE])
def test_a_program_starts_where_its_cpu_is(tmp_path, machine, cpu):
  mac = Mac(tmp_path, machine)
  program = put_program(mac.home / "a program", macho(cpu, "import sys; print(sys.argv)"))
  lines = ASK + f"print(json.dumps(tried(ask, {str(program)!r}, 'a b', '-x')))"
  seen = under(mac, lines)
  if machine.startswith("intel") == (cpu == INTEL) or (
    cpu == INTEL and machine in ("silicon", "rosetta", "vm", "runner")
  ):
    assert seen == [0, f"{[str(program), 'a b', '-x']}\n"]
  else:
    assert seen == ["OSError", os.strerror(86), str(program)]


WORKING = [("intel", INTEL, "x86_64"), ("silicon", APPLE, "aarch64"), ("rosetta", APPLE, "aarch64")]
WITHOUT = [("silicon", APPLE, "x86_64"), ("silicon", INTEL, "aarch64"), ("vm", APPLE, "x86_64"),
           ("intel-vm", INTEL, "aarch64")]  # fmt: skip
ABORTS = [("silicon", INTEL, "x86_64"), ("rosetta", INTEL, "x86_64"), ("vm", APPLE, "aarch64"),
          ("vm", INTEL, "x86_64"), ("intel-vm", INTEL, "x86_64"),
          ("runner", INTEL, "x86_64")]  # fmt: skip


@pytest.mark.parametrize("machine, cpu, arch", [*WORKING, *WITHOUT, *ABORTS])
def test_hvf_works_is_passed_over_or_kills(tmp_path, machine, cpu, arch):
  """Once it is compiled in, which it is for guests of QEMU's own CPU, there is no way back."""
  mac = Mac(tmp_path, machine)
  program = put_program(mac.home / f"qemu-system-{arch}", qemu(cpu))
  asked = [(str(program), "-machine", f"type=q35,accel={a}") for a in ("hvf:kvm:tcg", "tcg")]
  lines = ASK + f"print(json.dumps([ask(*words) for words in {asked!r}]))"
  (code, words), (tcg_code, tcg_words) = under(mac, lines)
  assert (tcg_code, tcg_words) == (0, "")
  if (machine, cpu, arch) in ABORTS:
    assert code == -6 and "HV_UNSUPPORTED" in words and mac.accelerators() == ["tcg"]
    return
  assert code == 0
  used = "hvf" if (machine, cpu, arch) in WORKING else "tcg"
  assert mac.accelerators() == [used, "tcg"]
  assert ("falling back to tcg" in words) == (used == "tcg")


def test_hvf_that_fails_all_the_same(tmp_path):
  mac = Mac(tmp_path, "intel")
  program = put_program(mac.home / "qemu-system-x86_64", qemu())
  lines = ASK + f"print(json.dumps(ask({str(program)!r}, '-accel', 'hvf', '-accel', 'tcg')))"
  for how, code, words in (("broken", -6, "HV_UNSUPPORTED"), ("denied", 1, "access HVF")):
    mac.qemu_plays(hvf=how)
    found = under(mac, lines.replace("'hvf', '-accel', 'tcg'", "'hvf'"))
    assert found[0] == code and words in found[1]


def test_a_python_that_asks_for_no_site_sees_the_real_system(mac):
  command = [sys.executable, "-IS", "-c", "import sys; print(sys.platform)"]
  run = subprocess.run(command, env=mac.env, stdout=subprocess.PIPE, check=True)
  assert run.stdout.decode() == sys.platform + "\n"
  assert Path(DARWIN, "sitecustomize.py").exists()
