#!/usr/bin/env python3
"""What qvm costs, as ratios in one run: `make bench`, or bench.py PART... for some of it.

Every figure is a median with its spread (the quartiles), of runs that take turns with those of
what they are compared with, so that a busy machine is busy for both.
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import linux_guest
import real_qemu
import ssh_guest
from guests import boot_sector, to_qcow2
from release_server import ReleaseServer
from support import ROOT, Qvm, default_signals, fill, free_port, tar_of, works

MB = 1 << 20
ENDING_QEMU = "#!/bin/sh\nexit 0\n"


class Bench:
  """A home with everything in it, and a table of results."""

  def __init__(self, folder):
    self.folder = Path(folder)
    self.pyz = self.folder / "qvm.pyz"
    subprocess.run([sys.executable, str(ROOT / "build_zipapp.py"), str(self.pyz)], check=True)
    to_qcow2(boot_sector("hello"), self.folder / "image.qcow2")
    self.image = (self.folder / "image.qcow2").read_bytes()
    self.tools = tar_of({"qemu-img": Path(shutil.which("qemu-img")).read_bytes()})

  def server(self):
    """A release server that has the usual releases."""
    server = ReleaseServer()
    fill(server, self.image, self.tools)
    return server

  def home(self, name, qemu=ENDING_QEMU):
    """qvm in a home of its own with FreeBSD 15.1 in its cache, and a QEMU of our choice."""
    home = self.folder / name
    home.mkdir()
    with self.server() as server:
      works(Qvm(home, self.pyz, server)("pull", "freebsd", "15.1"))
    qvm = Qvm(home, self.pyz)
    program = qvm.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
    program.write_text(qemu)
    return qvm


def timed(call):
  """The wall time of a call in seconds, and the CPU time of the processes it has waited for."""
  before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
  call()
  wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return wall, cpu


def turns(calls, count):
  """Call each of {name: call} in turn, count times; returns {name: [(wall, cpu), ...]}."""
  for call in calls.values():
    call()  # what is slow only once, such as the disk's cache, does not count
  found = {name: [] for name in calls}
  for _ in range(count):
    for name, call in calls.items():
      found[name].append(timed(call))
  return found


def middle(values):
  """The median and the quartiles."""
  low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
  return median, low, high


def show(title, results, base, unit="ms"):
  """Print the medians with their spread, and the ratio to the base."""
  factor, digits = {"ms": (1000, 1), "s": (1, 2)}[unit]
  print(f"\n{title}")
  reference = middle([wall for wall, _ in results[base]])[0]
  for name, runs in results.items():
    median, low, high = middle([wall for wall, _ in runs])
    cpu = middle([cpu for _, cpu in runs])[0]
    ratio = f"{median / reference:6.2f}" if name != base else "  1   "
    spread = f"({low * factor:.{digits}f} to {high * factor:.{digits}f})"
    walls = f"{median * factor:9.{digits}f} {spread} {unit}"
    print(f"  {name:<34}{walls:<34} cpu {cpu * factor:8.{digits}f} {unit}  ratio {ratio}")
  sys.stdout.flush()


def run(command, **more):
  """Run a command that must succeed, without its output."""
  more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **more}
  subprocess.run(command, check=True, stderr=subprocess.DEVNULL, **more)


# --- The start of a cached run ---------------------------------------------------------------

SHELL = """\
set -e
cache=$1
disk=$cache/instances/sh-$$.qcow2
trap 'rm -f "$disk"' EXIT
"$cache/bin/qemu-img" create -q -f qcow2 -b ../base/freebsd-15.1-x86-64.qcow2 -F qcow2 "$disk"
"$cache/qemu/x86_64/bin/qemu-system-x86_64" -nographic -drive "file=$disk"
"""


def bench_start(bench, count):
  """Until QEMU has been executed and has ended, which it does at once."""
  qvm = bench.home("start")
  script = bench.folder / "start.sh"
  script.write_text(SHELL)
  overlay = ["create", "-q", "-f", "qcow2", "-b", str(bench.folder / "image.qcow2"), "-F", "qcow2"]
  qemu_img, scratch = str(qvm.cache / "bin" / "qemu-img"), str(bench.folder / "scratch.qcow2")

  def python_and_qemu_img():
    run([sys.executable, "-c", "pass"])
    run([qemu_img, *overlay, scratch])

  words = ("run", "--rm", "freebsd", "15.1")
  calls = {
    "shell script": lambda: run(["sh", str(script), str(qvm.cache)]),
    "python -c pass, qemu-img create": python_and_qemu_img,
    "qvm.pyz run --rm": lambda: run(qvm.command(*words), env=qvm.env),
    "qvm.py run --rm": lambda: run([sys.executable, str(ROOT / "qvm.py"), *words], env=qvm.env),
  }
  show("start of a cached run --rm", turns(calls, count), "shell script")


# --- Downloads -------------------------------------------------------------------------------


def fresh(bench, server, name="fresh"):
  """qvm with an empty home; the former is removed."""
  home = bench.folder / name
  shutil.rmtree(home, ignore_errors=True)
  home.mkdir()
  return Qvm(home, bench.pyz, server)


@contextlib.contextmanager
def slow_server(bench, image, latency):
  """A server that gives 20 MB/s to each connection; and what curl fetches of it: the image."""
  with bench.server() as server:
    server.replace_asset("freebsd-builder", "v0.16.0", "freebsd-15.1-x86-64.qcow2", image)
    server.rate, server.latency = 20e6, latency
    url = f"{server.url}/freebsd-builder/releases/download/v0.16.0/freebsd-15.1-x86-64.qcow2"
    yield server, lambda: run(["curl", "-sLo", str(bench.folder / "got"), url])


def bench_first(bench, count):
  """A first run on a line of 20 MB/s for each connection, 50 ms away."""
  big = bench.folder / "big.qcow2"
  shutil.copy(bench.folder / "image.qcow2", big)
  os.truncate(big, 100 * MB)
  with slow_server(bench, big, 0.05) as (server, curl):

    def first_run():
      qvm = fresh(bench, server)
      run(qvm.command("run", "--rm", "freebsd", "15.1"), env=qvm.env)

    calls = {"curl of the image alone": curl, "qvm.pyz run --rm, empty cache": first_run}
    show("first run, 100 MB at 20 MB/s", turns(calls, count), "curl of the image alone", "s")


def bench_pull(bench, count):
  """A large image over loopback, with its digest checked."""
  big = bench.folder / "big.qcow2"
  shutil.copy(bench.folder / "image.qcow2", big)
  with open(big, "r+b") as file:
    file.seek(1 << 31)
    file.write(b"end")
  with bench.server() as server:
    server.replace_asset("freebsd-builder", "v0.16.0", "freebsd-15.1-x86-64.qcow2", big)
    url = f"{server.url}/freebsd-builder/releases/download/v0.16.0/freebsd-15.1-x86-64.qcow2"
    got, peak = str(bench.folder / "got"), []

    def pull():
      qvm = fresh(bench, server)
      time_of = bench.folder / "time"
      run(["/usr/bin/time", "-f", "%M", "-o", str(time_of),
           *qvm.command("pull", "freebsd", "15.1")], env=qvm.env)  # fmt: skip
      peak.append(int(time_of.read_text()))

    calls = {
      "curl, then sha256sum": lambda: run(["sh", "-c", f"curl -sLo {got} {url}; sha256sum {got}"]),
      "qvm.pyz pull": pull,
    }
    results = turns(calls, count)
    show("pull of 2 GB over loopback", results, "curl, then sha256sum", "s")
    print(f"  peak memory of qvm: {max(peak) / 1024:.0f} MiB")


def bench_ranges(bench, count):
  """A large image from a server that gives 20 MB/s to each connection, 20 ms away."""
  big = bench.folder / "ranges.qcow2"
  shutil.copy(bench.folder / "image.qcow2", big)
  with open(big, "ab") as file:
    for _ in range(256):
      file.write(os.urandom(MB))
  with slow_server(bench, big, 0.02) as (server, curl):

    def pull():
      qvm = fresh(bench, server)
      run(qvm.command("pull", "freebsd", "15.1"), env=qvm.env)

    calls = {"curl, one connection": curl, "qvm.pyz pull": pull}
    show("256 MB at 20 MB/s a connection", turns(calls, count), "curl, one connection", "s")


# --- Many instances, many releases -----------------------------------------------------------


def bench_growth(bench, count):
  """1 and 1,000 instances; 100 releases."""
  few, many = bench.home("one"), bench.home("thousand")
  works(few("run", "--name", "vm", "freebsd", "15.1"))
  works(many("run", "--name", "vm", "freebsd", "15.1"))
  folder = many.cache / "instances"
  record = json.loads((folder / "vm.json").read_text())
  for n in range(999):
    shutil.copy(folder / "vm.qcow2", folder / f"vm{n}.qcow2")
    (folder / f"vm{n}.json").write_text(json.dumps({**record, "name": f"vm{n}"}))
  for words in (("list",), ("run", "--rm", "freebsd", "15.1"), ("clean",)):
    calls = {
      f"{words[0]}, 1 instance": lambda words=words: run(few.command(*words), env=few.env),
      f"{words[0]}, 1,000": lambda words=words: run(many.command(*words), env=many.env),
    }
    show(" ".join(words), turns(calls, count), f"{words[0]}, 1 instance")
  with bench.server() as one, bench.server() as hundred:
    for n in range(100):
      names = [f"freebsd-{n}.{m}-{arch}.qcow2" for m in range(4) for arch in ("x86-64", "arm64")]
      hundred.add_release("freebsd-builder", f"v1.{n}.0", dict.fromkeys(names, bench.image))
    homes = {
      "search, 1 release": fresh(bench, one, "s1"),
      "search, 100": fresh(bench, hundred, "s2"),
    }
    calls = {
      name: lambda qvm=qvm: run(qvm.command("search", "freebsd"), env=qvm.env)
      for name, qvm in homes.items()
    }
    show("search freebsd", turns(calls, count), "search, 1 release")


# --- --sync ----------------------------------------------------------------------------------


def bench_sync(bench, count):
  """10,000 small files, and a file of 1 GB, into a guest whose disk is memory if possible."""
  memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(bench.folder)
  qvm = bench.home("sync", ssh_guest.program())
  many, big = bench.folder / "many", bench.folder / "large"
  for n in range(100):
    (many / f"d{n}").mkdir(parents=True)
    for m in range(100):
      (many / f"d{n}" / f"f{m}.c").write_text(f"int x{n}_{m};\n" * (m % 40 + 1))
  big.mkdir()
  with open(big / "file", "wb") as file:
    for _ in range(1024):
      file.write(os.urandom(MB))
  with tempfile.TemporaryDirectory(dir=memory) as guest:
    qvm.env["SSH_GUEST"] = json.dumps({"folder": guest})
    port = str(free_port())
    works(qvm("run", "-d", "--name", "vm", "--ssh-port", port, "freebsd", "15.1"))
    ssh = ["ssh", "-F", "/dev/null", "-p", port, "-o", "StrictHostKeyChecking=no", "-o"]
    ssh += ["UserKnownHostsFile=/dev/null", "runner@127.0.0.1"]
    try:
      for folder, title in ((many, "10,000 files"), (big, "1 GB")):
        bench_sync_of(qvm, ssh, Path(guest) / "home" / "runner", folder, title, count)
    finally:
      works(qvm("stop", "vm"))


def bench_sync_of(qvm, ssh, home, folder, title, count):
  """One folder into the guest, and all of it out again."""
  into = f"mkdir -p ~/work/{folder.name} && cd ~/work/{folder.name} && tar -xpf -"
  calls = {
    "tar c | ssh tar x": lambda: run(
      f"tar -C {folder} -cf - . | {' '.join(ssh)} '{into}'", shell=True
    ),
    "qvm ssh --sync, in": lambda: run(
      qvm.command("ssh", "--sync", str(folder), "--sync-direction", "in", "vm", "--", "true"),
      env=qvm.env,
    ),
  }
  show(f"--sync of {title} into the guest",
       turns_from_nothing(calls, count, home / "work"), "tar c | ssh tar x", "s")  # fmt: skip
  bench_unchanged(qvm, ssh, folder, title, count)
  out = ["ssh", "--sync", str(folder), "--sync-direction", "out", "vm", "--", "true"]
  calls = {
    "ssh tar c | tar x": lambda: run(
      f"{' '.join(ssh)} 'tar -C work/{folder.name} -cf - .' | tar -C {folder} -xpf -",
      shell=True,
    ),
    "qvm ssh --sync, out, all": lambda: (forget(qvm), run(qvm.command(*out), env=qvm.env)),
  }
  show(f"--sync of {title} out of the guest",
       turns_from_nothing(calls, count, folder), "ssh tar c | tar x", "s")  # fmt: skip


def forget(qvm):
  """Remove what is remembered of both sides, by which what is gone here was deleted here."""
  for path in (qvm.cache / "instances").glob("vm.sync*"):
    path.unlink()


def bench_unchanged(qvm, ssh, folder, title, count):
  """The same once more, there and back, when nothing has changed."""
  both = qvm.command("ssh", "--sync", str(folder), "vm", "--", "true")
  run(both, env=qvm.env)
  calls = {"qvm ssh --sync": lambda: run(both, env=qvm.env)}
  if shutil.which("rsync"):
    rsync = ["rsync", "-a", "-e", " ".join(ssh[:-1])]
    there = f"{ssh[-1]}:work/{folder.name}/"
    calls["rsync -a, there and back"] = lambda: (
      run([*rsync, f"{folder}/", there]), run([*rsync, there, f"{folder}/"]),
    )  # fmt: skip
  show(f"--sync of {title} that have not changed", turns(calls, count), list(calls)[-1], "s")


def turns_from_nothing(calls, count, folder):
  """As turns(), each time with an empty folder where the copies go."""
  found = {name: [] for name in calls}
  for _ in range(count):
    for name, call in calls.items():
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir(parents=True)
      found[name].append(timed(call))
  return found


# --- Warm starts -----------------------------------------------------------------------------


def bench_warm(bench, count):
  """A finished `-- true`, cold and from a checkpoint, of a Linux on the real QEMU."""

  folder = bench.folder / "warm"
  folder.mkdir()
  for cpu in ("x86_64", "aarch64"):
    real_qemu.pack_qemu(cpu, folder / f"qemu-system-{cpu}-linux.tar")
  real_qemu.pack_resources(folder / "resources-linux.tar")
  archives = {path.name: path for path in folder.iterdir()}
  home = bench.folder / "warm-home"
  home.mkdir()
  with ReleaseServer() as server:
    qvm = Qvm(home, bench.pyz, server)
    server.add_release("resources", "v2.0.0", archives)
    for arch, firmware in (("x86-64", "bios"), ("arm64", "efi")):
      path = folder / f"freebsd-1-{arch}.qcow2"
      linux_guest.disk(str(ROOT / ".venv" / "linux"), arch, firmware, "open", str(path))
      server.add_release("freebsd-builder", f"v1.{len(arch)}.0", {path.name: path})
      words = ("--accel", "tcg", "--platform", arch, "freebsd", "1", "--", "true")
      cold = qvm.command("run", "--rm", *words)
      warm = qvm.command("run", "--rm", "--warm", *words)
      calls = {
        "warm": functools.partial(run, warm, env=qvm.env),
        "cold": functools.partial(run, cold, env=qvm.env),
      }
      show(f"run --rm -- true on {arch}, -m 6G", turns(calls, count), "warm", "s")


def bench_each(bench, count):
  """Four guests at once, of which each only sleeps, against a shell loop and against one guest."""
  folder, home = bench.folder / "each", bench.folder / "each-home"
  folder.mkdir()
  home.mkdir()
  real_qemu.pack_qemu("x86_64", folder / "qemu-system-x86_64-linux.tar")
  real_qemu.pack_resources(folder / "resources-linux.tar")
  archives = {path.name: path for path in folder.iterdir()}
  image = folder / "image"
  linux_guest.disk(str(ROOT / ".venv" / "linux"), "x86-64", "bios", "open", str(image))
  with ReleaseServer() as server:
    qvm = Qvm(home, bench.pyz, server)
    server.add_release("resources", "v2.0.0", archives)
    versions = ("1", "2", "3", "4")
    images = {f"netbsd-{version}.0-x86-64.qcow2": image for version in versions}
    server.add_release("netbsd-builder", "v1.0.0", images)
    light = ("--warm", "--accel", "tcg", "-m", "512M", "--cpus", "1")
    names = [f"netbsd-{version}.0-x86-64" for version in versions]

    def one_by_one(command):
      for version in versions:
        words = ("run", "--rm", *light, "--platform", "x86-64", "netbsd", f"{version}.0")
        run(qvm.command(*words, "--", *command), env=qvm.env)

    def each(guests, command):
      run(qvm.command("each", "-j", "4", *light, *guests, "--", *command), env=qvm.env)

    for command in (("true",), ("sleep", "2")):
      calls = {
        "each of four": functools.partial(each, names, command),
        "each of one": functools.partial(each, names[:1], command),
        "a loop over four": functools.partial(one_by_one, command),
      }
      show(f"each … -- {' '.join(command)}, warm", turns(calls, count), "a loop over four", "s")


# --- Prepared machines -----------------------------------------------------------------------

# Stands for the installation of packages: 100 MB that the guest has to make and to write.
INSTALLING = "dd if=/dev/urandom of=/mnt/packages bs=1M count=100 && sync"


def bench_prepare(bench, count):
  """What is set up once against what is installed at each run; ten layers against one."""
  folder, home = bench.folder / "prepare", bench.folder / "prepare-home"
  folder.mkdir()
  home.mkdir()
  real_qemu.pack_qemu("x86_64", folder / "qemu.tar")
  linux_guest.disk(str(ROOT / ".venv" / "linux"), "x86-64", "bios", "open", str(folder / "disk"))
  with ReleaseServer() as server:
    names = {
      "qemu-system-x86_64-linux.tar": folder / "qemu.tar",
      "resources-linux.tar": bench.tools,
    }
    server.add_release("resources", "v2.0.0", names)
    server.add_release("freebsd-builder", "v1.0.0", {"freebsd-1-x86-64.qcow2": folder / "disk"})
    works(Qvm(home, bench.pyz, server)("pull", "--platform", "x86-64", "freebsd", "1"))
  qvm = Qvm(home, bench.pyz)
  guest = ("--accel", "tcg", "-m", "1G", "--platform", "x86-64", "freebsd", "1")
  scripts = [folder / f"{number}.sh" for number in range(10)]
  for script in scripts:
    script.write_text(f"true {script.name}\n")
  (folder / "install.sh").write_text(INSTALLING)

  def call(*options, command="true"):
    return lambda: run(qvm.command("run", "--rm", *options, *guest, "--", command), env=qvm.env)

  install = ("--prepare", str(folder / "install.sh"))
  calls = {
    "installing at each run": call(command=INSTALLING),
    "--prepare": call(*install),
    "--prepare --warm": call("--warm", *install),
  }
  show("a command that wants 100 MB installed", turns(calls, count), "installing at each run", "s")
  bench_layers(bench, qvm, scripts, guest, count)


def bench_layers(bench, qvm, scripts, guest, count):
  """Starts on the image, on one layer and on ten; those are made in a guest that is an sshd."""
  program = qvm.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  real = program.read_bytes()

  def become(content):
    program.unlink()
    program.write_bytes(content)
    program.chmod(0o755)

  rows = [
    [word for script in scripts[:some] for word in ("--prepare", str(script))] for some in range(11)
  ]
  become(ssh_guest.program().encode())
  env = {**qvm.env, "SSH_GUEST": json.dumps({"folder": str(bench.folder / "guest")})}
  for options in rows[1:]:
    run(qvm.command("run", "--rm", *options, *guest, "--", "true"), env=env)
  names = {0: "the image", 1: "one layer", 10: "ten layers in a row"}
  become(ENDING_QEMU.encode())
  calls = {
    name: functools.partial(run, qvm.command("run", "--rm", *rows[some], *guest), env=qvm.env)
    for some, name in names.items()
  }
  show("run --rm until QEMU has run", turns(calls, 5 * count), "one layer")
  become(real)
  calls = {
    name: functools.partial(
      run, qvm.command("run", "--rm", *rows[some], *guest, "--", "true"), env=qvm.env
    )
    for some, name in names.items()
  }
  show("run --rm -- true", turns(calls, count), "one layer", "s")


# --- Streaming -------------------------------------------------------------------------------

FILLER = 400 * MB  # so that the image is as large as those that qvm is for
READS = 120  # of 512 KiB each, all over the image: what it reads of it is some 18 %, as a boot does
SCATTER = (
  f"i=0; while [ $i -lt {READS} ]; do"
  f" dd if=/dev/sda of=/dev/null bs=512k count=1 skip=$((50 + i * 101 % {READS} * 6)) || exit 9;"
  " i=$((i + 1)); done 2>/dev/null"
)
LINUX = ("--rm", "--accel", "tcg", "-m", "512M", "--cpus", "1", "netbsd", "1", "--", SCATTER)


def bench_stream(bench, count):
  """Until a command has run in a Linux whose image still comes, and once it has all come."""
  folder = bench.folder / "stream"
  folder.mkdir()
  linux_guest.disk(str(ROOT / ".venv" / "linux"), "x86-64", "bios", "open", str(folder / "small"))
  run(["qemu-img", "convert", "-O", "raw", str(folder / "small"), str(folder / "raw")])
  with open(folder / "raw", "ab") as file:
    for _ in range(FILLER // MB):
      file.write(os.urandom(MB))
  image = folder / "netbsd-1-x86-64.qcow2"
  run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", str(folder / "raw"), str(image)])
  qemu = folder / "qemu.tar"
  real_qemu.pack_qemu("x86_64", qemu)
  with ReleaseServer() as server:
    names = {"qemu-system-x86_64-linux.tar": qemu, "resources-linux.tar": bench.tools}
    server.add_release("resources", "v2.0.0", names)
    server.add_release("netbsd-builder", "v1.0.0", {image.name: image})
    qvm = fresh(bench, server)
    run(qvm.command("pull", "netbsd", "1"), env=qvm.env)
    bench_lines(qvm, server, image, count)
    bench_streamed_cpu(qvm, server, image, count)
  bench_reads(folder, image, count)


def without_image(qvm, image):
  """Take the image, and what has come of it, out of the cache."""
  for path in [*qvm.cache.glob("base/*"), *qvm.cache.glob(f"downloads/{image.name}*")]:
    path.unlink()


def bench_lines(qvm, server, image, count):
  """Lines of 20, 50 and 200 Mbit/s with 50 ms there and back: four times for the first answer."""
  server.setup, server.latency = 0.15, 0.05
  for rate in (20, 50, 200):
    server.line, fetched = rate * 1e6 / 8, []

    def one(*options):
      without_image(qvm, image)
      server.clear_log()
      run(qvm.command("run", *options, *LINUX), env=qvm.env)
      server.wait_idle()
      fetched.append(sum(each.sent for each in server.requests(image.name, "cdn")))  # noqa: B023

    found = {"download, then boot": [], "run --stream": []}
    for _ in range(count):
      found["download, then boot"].append(timed(one))
      found["run --stream"].append(timed(lambda: one("--stream")))  # noqa: B023
    show(f"a command in a guest, {image.stat().st_size / 1e6:.0f} MB at {rate} Mbit/s",
         found, "download, then boot", "s")  # fmt: skip
    print(f"  fetched until it had ended: {statistics.median(fetched[1::2]) / 1e6:.0f} MB")
  server.line, server.setup, server.latency = None, 0, 0


def bench_streamed_cpu(qvm, server, image, count):
  """The CPU time of fetching all of an image, streamed or not, with a QEMU that only waits."""
  program = qvm.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  saved = program.with_name("saved")
  program.rename(saved)
  base = qvm.cache / "base" / image.name
  script = f"#!/bin/sh\nwhile [ ! -e '{base}' ]; do sleep 1; done\n"
  program.write_text(script)
  program.chmod(0o755)

  def stream():
    without_image(qvm, image)
    run(qvm.command("run", "--stream", "--rm", "netbsd", "1"), env=qvm.env)

  def download():
    without_image(qvm, image)
    run(qvm.command("run", "--rm", "netbsd", "1"), env=qvm.env)

  server.line = 25e6
  calls = {"run --rm": download, "run --rm --stream": stream}
  show("all of the image at 200 Mbit/s, no guest", turns(calls, count), "run --rm", "s")
  server.line = None
  program.unlink()
  saved.rename(program)


def bench_reads(folder, image, count):
  """Reading the whole disk, of a local image and through a server that has all of it."""
  script = folder / "whole.py"
  script.write_text(
    "import os, socket, sys, threading\n"
    f"sys.path.insert(0, {str(ROOT)!r})\nimport qvm\n"
    "server = object.__new__(qvm.Server)\n"
    "server.whole, server.fd = True, os.open(sys.argv[1], os.O_RDONLY)\n"
    "server.size = os.fstat(server.fd).st_size\n"
    "print(server.listen(), flush=True)\nsys.stdin.read()\nserver.close()\n"
  )
  pipe = subprocess.PIPE
  command = [sys.executable, str(script), str(image)]
  with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
    url = f"nbd+unix:///?socket={process.stdout.readline().strip()}"
    for name, backing in (("local", str(image)), ("served", url)):
      run(["qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", backing, str(folder / name)])
    calls = {
      name: lambda name=name: run(
        [
          "qemu-img",
          "convert",
          "-O",
          "raw",
          "-t",
          "unsafe",
          str(folder / name),
          str(folder / "out"),
        ]
      )
      for name in ("local", "served")
    }
    show("reading all of the image's disk", turns(calls, count), "local", "s")
    process.stdin.close()


PARTS = {
  "start": (bench_start, 25),
  "first": (bench_first, 3),
  "pull": (bench_pull, 5),
  "ranges": (bench_ranges, 3),
  "stream": (bench_stream, 3),
  "growth": (bench_growth, 15),
  "sync": (bench_sync, 5),
  "warm": (bench_warm, 5),
  "each": (bench_each, 5),
  "prepare": (bench_prepare, 3),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
  parser.add_argument("--count", type=int, help="runs of each")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="qvm-bench-") as folder:
    bench = Bench(folder)
    for name in options.parts or PARTS:
      call, count = PARTS[name]
      call(bench, options.count or count)


if __name__ == "__main__":
  default_signals()
  main()
