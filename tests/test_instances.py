"""Instances from their first run to their removal, with the stand-in QEMU and the real qemu-img."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time

import guests
import pytest
from release_server import ReleaseServer
from support import (
  BASE,
  DEADLINE,
  FREEBSD,
  IMAGE,
  PULL,
  digest,
  disk_of,
  ended,
  fails,
  fill,
  free_port,
  heard,
  instance_names,
  obey_modes,
  rows,
  stand_in_tar,
  state,
  tar_of,
  with_another,
  works,
)

RUN = ("run", "freebsd", "15.1")

DISK = f"instances/{FREEBSD}.qcow2"


def image_info(disk):
  command = ["qemu-img", "info", "-U", "--output=json", str(disk)]
  return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def write_into(disk):
  """Change a disk as a guest does."""
  command = ["qemu-io", "-f", "qcow2", "-c", "write -P 0x55 1M 64k", str(disk)]
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_an_overlay_without_a_record_stops_no_download_of_an_image(no_image):
  (no_image.cache / "instances").mkdir(mode=0o700, exist_ok=True)
  (no_image.cache / "instances" / "unknown.qcow2").write_bytes(b"unreadable")
  works(no_image(*PULL))


# --- Overlays --------------------------------------------------------------------------------


def test_the_disk_is_an_overlay_with_a_relative_base(qvm, image):
  assert qvm(*RUN).returncode == 0
  info = image_info(qvm.cache / DISK)
  assert info["format"] == "qcow2"
  assert info["backing-filename"] == f"../{BASE}"
  assert info["backing-filename-format"] == "qcow2"
  assert os.path.samefile(info["full-backing-filename"], qvm.cache / BASE)
  assert info["virtual-size"] == guests.DISK_SIZE == image_info(qvm.cache / BASE)["virtual-size"]
  assert (qvm.cache / BASE).read_bytes() == image


def test_an_instance_is_made_once_and_used_again(used, tmp_path):
  disk = used.cache / DISK
  write_into(disk)
  before, number = digest(disk), disk.stat().st_ino
  used.play(record=str(tmp_path / "record"))
  assert used(*RUN).returncode == 0
  assert disk_of(used.record(tmp_path / "record")["argv"]) == str(disk)
  assert (digest(disk), disk.stat().st_ino) == (before, number)


@pytest.mark.parametrize("play", [{"exit": 3}, {"signal": 9}])
def test_an_instance_stays_when_qemu_fails(used, play):
  write_into(used.cache / DISK)
  before = state(used.cache)
  used.play(**play)
  assert used(*RUN).returncode == play.get("exit", 137)
  assert {k: v for k, v in state(used.cache).items() if not k.endswith(f"{FREEBSD}.json")} == {
    k: v for k, v in before.items() if not k.endswith(f"{FREEBSD}.json")
  }


def test_what_is_left_of_an_instance_without_a_disk_publishes_nothing(used):
  record = {
    "name": "web",
    "os": "netbsd",
    "version": "1",
    "arch": "x86-64",
    "publish": "0.0.0.0:80:80",
  }
  (used.cache / "instances/web.json").write_text(json.dumps(record))
  assert "0.0.0.0" not in works(used(*RUN, "--name", "web", "--dry-run")).stdout


def test_names_make_instances_of_their_own(used, tmp_path):
  before = digest(used.cache / DISK)
  used.play(record=str(tmp_path / "record"))
  for name in ("build", "a.b", "A_1~2+3-4", "x.qcow2", "x", "0" * 100):
    assert used(*RUN, "--name", name).returncode == 0
    disk = used.cache / f"instances/{name}.qcow2"
    assert disk_of(used.record(tmp_path / "record")["argv"]) == str(disk)
    assert image_info(disk)["backing-filename"] == f"../{BASE}"
  assert digest(used.cache / DISK) == before
  assert sorted(rows(used)) == sorted(
    [FREEBSD, "build", "a.b", "A_1~2+3-4", "x.qcow2", "x", "0" * 100]
  )


def test_a_half_made_overlay_is_made_anew(used):
  (used.cache / f"instances/{FREEBSD}.json").unlink()
  (used.cache / DISK).unlink()
  half = used.cache / "downloads/tmp-0123456789ab"
  half.mkdir()
  (half / "disk.qcow2").write_bytes(b"half")
  assert used(*RUN).returncode == 0
  assert not half.exists()
  assert image_info(used.cache / DISK)["backing-filename"] == f"../{BASE}"
  assert instance_names(used) == [f"{FREEBSD}.json", f"{FREEBSD}.qcow2"]


@pytest.mark.parametrize("rm", [(), ("--rm",)])
def test_a_qemu_img_that_fails_is_quoted(qvm, server, rm):
  say = "echo 'No space left\non device' >&2"
  write = 'for word; do case $word in /*.qcow2) touch "$word" ;; esac; done'
  script = f"#!/bin/sh\n{say}\n{write}\nexit 3\n".encode()
  tools = tar_of({"qemu-img": script})
  server.replace_asset("resources", "v2.0.0", "resources-linux.tar", tools)
  run = qvm(*RUN, *rm)
  errors = [line for line in run.stderr.splitlines() if "download" not in line]
  assert (run.returncode, len(errors)) == (1, 1), run.stderr
  assert errors[0].endswith("/bin/qemu-img failed (exit code 3): No space left on device")
  assert not [name for name in instance_names(qvm) if name.endswith((".qcow2", ".lock"))]
  assert rows(qvm) == {}


def test_the_cache_can_be_moved(used, tmp_path, background):
  write_into(used.cache / DISK)
  before = digest(used.cache / DISK)
  moved = tmp_path / "else, where"
  used.cache.rename(moved)
  used.env["QVM_CACHE_DIR"] = str(moved)
  _, record = background(used, *RUN)
  assert record["argv"][0].startswith(str(moved))
  info = image_info(moved / DISK)
  assert os.path.samefile(info["full-backing-filename"], moved / BASE)
  assert digest(moved / DISK) == before
  subprocess.run(["qemu-img", "check", "-q", "-U", str(moved / DISK)], check=True)


def test_a_cache_behind_a_symbolic_link(used, tmp_path):
  used.cache.rename(tmp_path / "real")
  used.cache.symlink_to(tmp_path / "real")
  used.play(record=str(tmp_path / "record"))
  assert used(*RUN, "--name", "x").returncode == 0
  assert disk_of(used.record(tmp_path / "record")["argv"]) == str(used.cache / "instances/x.qcow2")
  assert os.path.samefile(
    image_info(used.cache / "instances/x.qcow2")["full-backing-filename"], used.cache / BASE
  )


# --- Throw-away instances --------------------------------------------------------------------


def test_rm_has_a_disk_of_its_own(used, background):
  write_into(used.cache / DISK)
  before = state(used.cache)
  process, record = background(used, *RUN, "--rm")
  disk = disk_of(record["argv"])
  assert re.fullmatch(rf"{used.cache}/instances/{FREEBSD}-rm-[0-9a-f]+\.qcow2", disk)
  assert image_info(disk)["backing-filename"] == f"../{BASE}"
  write_into(disk)
  process.terminate()
  assert process.wait(DEADLINE) == 143
  assert state(used.cache) == before


@pytest.mark.parametrize("name", [(), ("--name", "x")])
@pytest.mark.parametrize("play", [{}, {"exit": 7}, {"signal": 15}, {"signal": 9}])
def test_rm_leaves_nothing_however_qemu_ends(used, play, name):
  before = state(used.cache)
  used.play(**play)
  expected = 128 + play["signal"] if "signal" in play else play.get("exit", 0)
  assert used(*RUN, "--rm", *name).returncode == expected
  assert state(used.cache) == before


def test_rm_leaves_nothing_when_qemu_cannot_start(used):
  before = state(used.cache)
  program = used.cache / "qemu/x86_64/bin/qemu-system-x86_64"
  program.chmod(0o644)
  fails(used(*RUN, "--rm"), str(program))
  assert state(used.cache) == before


def test_rm_leaves_nothing_when_the_download_fails(qvm, server):
  server.remove_asset("freebsd-builder", "v0.16.0", f"{FREEBSD}.qcow2")
  assert qvm(*RUN, "--rm").returncode == 1
  assert instance_names(qvm) == []


def test_rm_with_the_name_of_an_instance_is_refused(used):
  assert used(*RUN, "--name", "x").returncode == 0
  before = state(used.cache)
  for name in ("x", FREEBSD):
    fails(used(*RUN, "--rm", "--name", name), f"{name} already", "--rm", "another --name")
  assert state(used.cache) == before


# --- Running instances -----------------------------------------------------------------------


def test_a_second_run_is_refused_by_name(used, background):
  process, record = background(used, *RUN)
  before = state(used.cache)
  running = f"{FREEBSD} is already running (QEMU process {record['pid']})"
  fails(used(*RUN), running, "--name", "--rm")
  fails(used(*RUN, "--rm", "--name", FREEBSD), running)
  fails(used("rm", FREEBSD), running, "nothing was deleted")
  assert state(used.cache) == before
  assert used(*RUN, "--rm").returncode == 0
  assert used(*RUN, "--name", "other").returncode == 0
  assert process.poll() is None
  os.kill(record["pid"], signal.SIGTERM)
  assert process.wait(DEADLINE) == 143
  assert used(*RUN).returncode == 0


def test_a_second_run_is_refused_during_the_download_too(qvm, server):
  fault = server.fault("freebsd-15.1", stall="headers")
  with ended(qvm.start(*RUN)) as process:
    assert fault.reached.wait(DEADLINE)
    fails(qvm(*RUN), f"{FREEBSD} is already running (qvm process {process.pid})")
    fails(qvm("rm", FREEBSD), f"no instance {FREEBSD}")
    assert rows(qvm) == {}
    process.kill()
    process.wait()
  assert qvm(*RUN).returncode == 0


def test_an_instance_runs_as_long_as_its_qemu(used, background):
  """Also after its qvm was killed: the lock is the QEMU's too."""
  process, record = background(used, *RUN)
  process.kill()
  process.wait()
  running = f"already running (QEMU process {record['pid']})"
  fails(used(*RUN), running)
  fails(used("rm", FREEBSD), running)
  assert rows(used)[FREEBSD]["state"] == "running"
  end_qemu(record["pid"], used.cache / f"instances/{FREEBSD}.lock")
  assert rows(used)[FREEBSD]["state"] == "stopped"
  assert used(*RUN).returncode == 0
  assert instance_names(used) == [f"{FREEBSD}.json", f"{FREEBSD}.qcow2"]


def end_qemu(pid, lock):
  """Kill a QEMU whose qvm is gone, and wait until its lock is."""
  with open(lock) as file:
    os.kill(pid, signal.SIGKILL)
    fcntl.flock(file, fcntl.LOCK_EX)


def test_of_many_runs_at_once_one_wins(qvm, tmp_path):
  assert qvm("pull", "freebsd", "15.1").returncode == 0
  fifo = tmp_path / "fifo"
  os.mkfifo(fifo)
  qvm.play(record=str(fifo), exit=5)  # the one that wins waits here for its reader
  runs = [qvm.start(*RUN) for _ in range(6)]
  patience = time.monotonic() + DEADLINE
  while sum(run.poll() is None for run in runs) > 1 and time.monotonic() < patience:
    time.sleep(0.01)
  winners = [run for run in runs if run.poll() is None]
  try:
    assert len(winners) == 1
    assert disk_of(heard(fifo, winners[0])["argv"]) == str(qvm.cache / DISK)
    assert winners[0].wait(DEADLINE) == 5
  finally:
    for run in winners:
      run.kill()
  outputs = [(run.communicate()[1], run) for run in runs]
  for stderr, run in outputs:
    assert run in winners or (run.returncode == 1 and "is already running" in stderr), stderr


OTHER = [
  (("run", "openbsd", "7.9"), "openbsd 7.9 on x86-64"),
  (("run", "freebsd", "15.0"), "freebsd 15.0 on x86-64"),
  (("run", "freebsd", "15.1", "--platform", "arm64"), "freebsd 15.1 on arm64"),
]


@pytest.mark.parametrize("words, wanted", OTHER, ids=[other[1] for other in OTHER])
def test_a_name_of_something_else_is_refused(used, words, wanted):
  before = state(used.cache)
  for more in ((), ("--dry-run",)):
    found = used(*words, "--name", FREEBSD, *more)
    fails(found, f"is freebsd 15.1 on x86-64, not {wanted}", "--name")
  assert state(used.cache) == before


def test_a_dry_run_tells_what_rm_would_delete(used):
  before = state(used.cache)
  fails(used(*RUN, "--dry-run", "--rm", "--name", FREEBSD), "--rm would delete it")
  assert state(used.cache) == before


def test_a_dry_run_repairs_no_record(used):
  (used.cache / f"instances/{FREEBSD}.json").write_text("damaged")
  before = state(used.cache)
  works(used(*RUN, "--dry-run"))
  assert state(used.cache) == before


# --- Base images -----------------------------------------------------------------------------


def test_an_instance_whose_base_is_replaced_by_hand_is_refused_and_kept(qvm, image):
  assert qvm(*RUN).returncode == 0
  write_into(qvm.cache / DISK)
  other = image + bytes(512)
  (qvm.cache / BASE).unlink()
  (qvm.cache / BASE).write_bytes(other)
  (qvm.cache / f"base/{FREEBSD}.json").unlink()
  works(qvm(*RUN, "--name", "x"))  # which hashes it
  before = state(qvm.cache)
  old = hashlib.sha256(image).hexdigest()
  fails(qvm(*RUN), "on a different base image", old, f"qvm rm {FREEBSD}")
  assert state(qvm.cache) == before
  assert qvm("rm", FREEBSD).returncode == 0
  assert qvm(*RUN).returncode == 0


def test_a_base_of_another_size_than_its_record_is_refused(used, image):
  """As when a file was copied over it by hand: the overlay would show a mix of both."""
  base = used.cache / BASE
  base.chmod(0o644)
  base.write_bytes(image + bytes(65536))
  before = digest(used.cache / DISK)
  fails(used(*RUN), str(base))
  assert digest(used.cache / DISK) == before


def test_a_base_is_never_written(used, image):
  for words in (RUN, (*RUN, "--rm"), (*RUN, "--name", "x"), ("rm", "x"), ("pull", *RUN[1:])):
    assert used(*words).returncode == 0
  assert (used.cache / BASE).read_bytes() == image
  assert stat.S_IMODE((used.cache / BASE).stat().st_mode) == 0o444


# --- list ------------------------------------------------------------------------------------


def test_list_of_nothing(offline):
  header = "NAME  OS  VERSION  ARCH  STATE  SSH  PORTS  SIZE\n"
  run = offline("list")
  assert (run.returncode, run.stdout, run.stderr) == (0, header, "")
  run = offline("list", "--json")
  assert (run.returncode, json.loads(run.stdout), run.stderr) == (0, [], "")
  assert list(offline.home.iterdir()) == []


def test_list_shows_stopped_and_running_ones(qvm, background):
  assert qvm(*RUN).returncode == 0
  port, other = free_port(), free_port()
  words = ("run", "openbsd", "7.9", "--platform", "arm64", "--name", "bsd")
  background(qvm, *words, "--ssh-port", str(port))
  background(qvm, "run", "haiku", "r1beta5", "--rm", "--ssh-port", f"0.0.0.0:{other}")
  run = qvm("list")
  assert (run.returncode, run.stderr) == (0, "")
  header, *lines = run.stdout.partition("\n\n")[0].splitlines()
  assert header.split() == ["NAME", "OS", "VERSION", "ARCH", "STATE", "SSH", "PORTS", "SIZE"]
  table = [re.split(r"  +", line) for line in lines]
  assert [row[1:6] for row in table] == [
    ["openbsd", "7.9", "arm64", "running", f"127.0.0.1:{port}"],
    ["freebsd", "15.1", "x86-64", "stopped", "-"],
    ["haiku", "r1beta5", "x86-64", "running (--rm)", f"0.0.0.0:{other}"],
  ]
  assert [row[0] for row in table[:2]] == ["bsd", FREEBSD]
  assert all(re.fullmatch(r"[0-9.]+ [kM]?B", row[7]) for row in table)
  columns = [header.index(word) for word in header.split()]
  for line in lines:
    assert all(line[at - 1 : at] in (" ", "") and line[at] != " " for at in columns)


def test_list_as_json(used, background):
  port = free_port()
  background(used, *RUN, "--rm", "--name", "x", "--ssh-port", str(port))
  table = rows(used)
  assert list(table) == [FREEBSD, "x"]
  size = (used.cache / DISK).stat().st_blocks * 512
  assert table[FREEBSD] == {
    "name": FREEBSD, "os": "freebsd", "version": "15.1", "arch": "x86-64", "state": "stopped",
    "ssh": "", "ports": [], "size": size, "ephemeral": False, "base": 100,
    "created": "", "used": "", "script": "", "needed_by": [],
  }  # fmt: skip
  assert table["x"] == {
    **table[FREEBSD], "name": "x", "state": "running", "ssh": f"127.0.0.1:{port}",
    "size": table["x"]["size"], "ephemeral": True,
  }  # fmt: skip


def test_list_changes_nothing(used, background):
  _, record = background(used, *RUN)
  before = state(used.cache)
  for _ in range(2):
    assert used("list").returncode == 0
  assert state(used.cache) == before
  assert record["pid"]


def test_a_cache_that_is_read_only(used):
  folder = used.cache / "instances"
  folder.chmod(0o500)
  for words in (("list",), ("list", "--json"), ("--dry-run", *RUN)):
    run = used(*words, preexec_fn=obey_modes)
    assert (run.returncode, run.stderr) == (0, "") and FREEBSD in run.stdout
  fails(used(*RUN, preexec_fn=obey_modes), f"{folder}/{FREEBSD}.lock", "Permission denied")
  fails(used("rm", FREEBSD, preexec_fn=obey_modes), "Permission denied")


# --- Damaged records -------------------------------------------------------------------------

SOUND = {
  "name": FREEBSD, "os": "freebsd", "version": "15.1", "arch": "x86-64", "base_sha256": "",
  "ssh": "127.0.0.1:2847",
}  # fmt: skip


def sound(**changes):
  record = {**SOUND, **changes}
  return json.dumps({k: v for k, v in record.items() if v is not ...}).encode()


DAMAGED = {
  "absent": None,
  "empty": b"",
  "cut": sound()[:-10],
  "not json": b"name = freebsd\n",
  "binary": bytes(range(256)),
  "zeros": bytes(4096),
  "list": b"[]",
  "list of records": b"[" + sound() + b"]",
  "null": b"null",
  "number": b"1",
  "string": b'"x"',
  "empty object": b"{}",
  "deep": b"[" * 200000,
  "deep object": b'{"name":' * 200000,
  "big number": b'{"name": ' + b"1" * 10000 + b"}",
  "huge": sound(ssh="x" * (3 << 20)),
  "huge blank": b" " * (3 << 20) + sound(),
  "utf-16": sound().decode().encode("utf-16"),
  "latin-1": sound(ssh="").replace(b'"ssh": ""', b'"ssh": "\xe9"'),
  "two records": sound() + sound(),
  "name of another": sound(name="other"),
  "name a number": sound(name=1),
  "name missing": sound(name=...),
  "name a path": sound(name=f"../instances/{FREEBSD}"),
  "os missing": sound(os=...),
  "os a list": sound(os=["freebsd"]),
  "os null": sound(os=None),
  "version missing": sound(version=...),
  "version a number": sound(version=15.1),
  "arch missing": sound(arch=...),
  "arch true": sound(arch=True),
  "digest a number": sound(base_sha256=0),
  "ssh a number": sound(ssh=2847),
  "ssh an object": sound(ssh={"host": "x"}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_rebuilt_from_the_disk(used, content):
  record = used.cache / f"instances/{FREEBSD}.json"
  whole = json.loads(record.read_text())
  record.unlink()
  if content is not None:
    record.write_bytes(content)
  before = state(used.cache)
  run = used("list")
  instances = run.stdout.partition("\n\n")[0]
  assert (run.returncode, run.stderr, instances.count("\n")) == (0, "", 1)
  assert FREEBSD in run.stdout and "stopped" in run.stdout
  row = rows(used)[FREEBSD]
  assert (row["os"], row["version"], row["arch"]) == ("freebsd", "15.1", "x86-64")
  assert state(used.cache) == before
  run = works(used(*RUN))
  assert "missing or damaged; it has been rebuilt from its disk" in run.stderr
  assert {**json.loads(record.read_text()), "ssh": ""} == {**whole, "ssh": ""}
  assert "rebuilt" not in works(used(*RUN)).stderr
  assert used("rm", FREEBSD).returncode == 0
  assert instance_names(used) == []


@pytest.mark.parametrize(
  "changes", [{"version": "\x1b[31m\n\udcff15"}, {"os": "x\r\n"}, {"arch": "é\u202e"}]
)
def test_a_record_cannot_write_on_the_terminal(used, changes):
  (used.cache / f"instances/{FREEBSD}.json").write_bytes(sound(**changes))
  run = used("list")
  instances = run.stdout.partition("\n\n")[0]
  assert (run.returncode, run.stderr, instances.count("\n")) == (0, "", 1)
  assert run.stdout.replace("\n", "").isprintable()
  fails(used(*RUN))
  assert used(*RUN).stderr.replace("\n", "").isprintable()


def test_a_record_of_a_later_qvm_is_good(used):
  record = used.cache / f"instances/{FREEBSD}.json"
  record.write_bytes(sound(later=[1, {"x": None}]))
  assert used(*RUN).returncode == 0
  assert rows(used)[FREEBSD]["version"] == "15.1"


@pytest.mark.parametrize(
  "content, code",
  [
    (b"", 0),
    (b"[]", 0),
    (b"x", 0),
    (b"[" * 200000, 0),
    (b'{"sha256": 5}', 0),
    (None, 0),
    (b'{"sha256": "5"}', 1),
  ],
)
def test_a_damaged_record_of_the_base_is_no_catastrophe(used, content, code):
  """Only another digest makes it another base."""
  record = used.cache / f"base/{FREEBSD}.json"
  record.unlink()
  if content is not None:
    record.write_bytes(content)
  disk = digest(used.cache / DISK)
  run = used(*RUN)
  if code:
    fails(run, f"{FREEBSD}.qcow2 is damaged", "downloads it again")
  else:
    works(run)
  assert digest(used.cache / DISK) == disk
  works(used(*RUN, "--rm"))


def test_strange_files_among_the_instances(used):
  folder = used.cache / "instances"
  (folder / "folder.qcow2").mkdir()
  (folder / "line\nbreak.qcow2").touch()
  (folder / "dangling.qcow2").symlink_to("nowhere")
  (folder / ".qcow2").touch()
  (folder / "notes.txt").write_text("x")
  os.mkdir(os.fsencode(folder) + b"/\xff.qcow2")
  run = used("list")
  assert (run.returncode, run.stderr) == (0, ""), run.stderr
  assert run.stdout.partition("\n\n")[0].count("\n") == 1 + 5
  run = used("list", "--json")
  assert (run.returncode, run.stderr) == (0, "")
  assert len(json.loads(run.stdout)) == 6
  fails(used("rm", "folder"), "folder.qcow2")
  assert used("rm", "dangling").returncode == 0
  assert used(*RUN).returncode == 0


# --- rm --------------------------------------------------------------------------------------


@pytest.fixture
def several(used):
  """Instances with names that begin alike."""
  for name in ("a", "a.b", "a-b", "ab"):
    assert used(*RUN, "--name", name).returncode == 0
  return used


def files_of(*names):
  return sorted(f"{name}{suffix}" for name in names for suffix in (".json", ".qcow2"))


@pytest.mark.parametrize(
  "names, removed",
  [(["a"], ["a"]), (["ab", "a"], ["ab", "a"]), (["a", "a", "a"], ["a"])]
  + [(["a", "a.b", "a-b", "ab", FREEBSD], ["a", "a.b", "a-b", "ab", FREEBSD])],
)
def test_rm_removes_those_that_are_named(several, names, removed):
  base = digest(several.cache / BASE)
  run = several("rm", *names)
  assert (run.returncode, run.stdout.split(), run.stderr) == (0, removed, "")
  left = {"a", "a.b", "a-b", "ab", FREEBSD} - set(removed)
  assert instance_names(several) == files_of(*left)
  assert set(rows(several)) == left
  assert digest(several.cache / BASE) == base


@pytest.mark.parametrize(
  "names", [["none"], ["a", "none"], ["none", "a"], ["a", "A"], ["a", "a.json"]]
)
def test_rm_of_an_unknown_one_removes_the_others(several, names):
  before = set(rows(several))
  unknown = next(name for name in names if name != "a")
  run = several("rm", *names)
  assert run.returncode == 1 and f"qvm: there is no instance {unknown}" in run.stderr
  assert set(rows(several)) == before - set(names)


@pytest.mark.parametrize("names", [["a"], ["ab", "a"], ["a", "ab"]])
def test_rm_of_a_running_one_removes_none(several, background, names):
  process, record = background(several, *RUN, "--name", "a")
  before = state(several.cache)
  running = f"a is already running (QEMU process {record['pid']})"
  fails(several("rm", *names), running, "nothing", "stop it: qvm stop a; or")
  assert state(several.cache) == before
  assert process.poll() is None


def test_kill_9_of_rm_can_be_made_good(used, kill_at):
  """A second disk without the first would be the next instance's of that name."""
  works(used(*RUN, "--name", "vm", "--disk", "64M"))
  kill_at(used, "os.remove instances/vm.data", "rm", "vm")
  works(used("rm", "vm"))
  assert not [name for name in instance_names(used) if name.startswith("vm.")]


def test_rm_without_a_cache(offline):
  fails(offline("rm", "x"), "no instance x")
  assert list(offline.home.iterdir()) == []


def test_an_instance_begins_anew_after_rm(used):
  write_into(used.cache / DISK)
  before = digest(used.cache / DISK)
  assert used("rm", FREEBSD).stdout == f"{FREEBSD}\n"
  assert used(*RUN).returncode == 0
  assert digest(used.cache / DISK) != before


# --- What a kill -9 leaves behind ------------------------------------------------------------

NEXT = [
  (*RUN,), (*RUN, "--rm"), ("list",), ("list", "--json"), ("pull", *RUN[1:]), ("rm", FREEBSD),
]  # fmt: skip


@pytest.mark.parametrize("words", NEXT, ids=" ".join)
def test_a_throw_away_disk_outlives_qvm_but_not_its_qemu(used, background, words):
  process, record = background(used, *RUN, "--rm")
  disk = disk_of(record["argv"])
  name = os.path.basename(disk)[: -len(".qcow2")]
  process.kill()
  process.wait()
  assert used(*words).returncode == 0
  assert os.path.exists(disk) and rows(used)[name]["state"] == "running"
  fails(used("rm", name), f"QEMU process {record['pid']}")
  assert used("--dry-run", *RUN).returncode == 0
  end_qemu(record["pid"], f"{used.cache}/instances/{name}.lock")
  if words[0] == "rm":
    assert used(*RUN).returncode == 0  # it would be the next command, so bring the left-over back
    for suffix in (".qcow2", ".ephemeral"):
      (used.cache / f"instances/{name}{suffix}").touch()
  before = {path for path in instance_names(used) if path.startswith(name)}
  assert {f"{name}.qcow2", f"{name}.ephemeral"} <= before
  assert used("--dry-run", *RUN).returncode == 0
  assert used("config", "print-path").returncode == 0
  assert {path for path in instance_names(used) if path.startswith(name)} == before
  assert used(*words).returncode == 0
  assert not [path for path in instance_names(used) if path.startswith(name)]


def test_a_throw_away_name_is_free_again_after_a_kill(used, background):
  process, record = background(used, *RUN, "--rm", "--name", "x")
  process.kill()
  process.wait()
  end_qemu(record["pid"], used.cache / "instances/x.lock")
  assert used(*RUN, "--name", "x").returncode == 0
  assert rows(used)["x"]["ephemeral"] is False
  assert used("list").returncode == 0
  assert "x" in rows(used)


def test_a_run_that_was_killed_while_it_downloaded_leaves_no_instance(qvm, server):
  fault = server.fault("freebsd-15.1", stall="headers")
  with ended(qvm.start(*RUN, "--rm")) as process:
    assert fault.reached.wait(DEADLINE)
    process.kill()
    process.wait()
  assert any(name.endswith(".ephemeral") for name in instance_names(qvm))
  assert rows(qvm) == {}
  assert instance_names(qvm) == []


def test_a_lock_of_a_run_that_was_killed_goes_one_that_is_held_stays(used, background):
  """Before a --rm run has marked its disk, or while a disk that stays ran."""
  background(used, *RUN, "--name", "x")
  (used.cache / "instances" / "y.lock").write_text("qvm process 1\n")
  works(used("list"))
  assert [name for name in instance_names(used) if name.endswith(".lock")] == ["x.lock"]


# --- Modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes(qvm, mask):
  assert qvm(*RUN, preexec_fn=lambda: os.umask(mask)).returncode == 0
  modes = {
    path.relative_to(qvm.home).as_posix(): stat.S_IMODE(path.stat().st_mode)
    for path in [*qvm.home.rglob("*"), *(qvm.cache / "qemu/x86_64").rglob("*")]
  }
  assert modes[".cache/qvm"] == 0o700
  assert modes[f".cache/qvm/{BASE}"] == 0o444
  assert modes[".cache/qvm/bin/qemu-img"] == 0o755
  assert modes[".cache/qvm/qemu/x86_64/bin/qemu-system-x86_64"] == 0o755
  assert modes[f".cache/qvm/{DISK}"] & 0o600 == 0o600


def test_the_cache_is_private_wherever_it_is(qvm, tmp_path):
  env = {"QVM_CACHE_DIR": str(tmp_path / "new/parents/q")}
  assert qvm("pull", *RUN[1:], env=env, preexec_fn=lambda: os.umask(0)).returncode == 0
  assert stat.S_IMODE((tmp_path / "new/parents/q").stat().st_mode) == 0o700


def test_a_cache_that_is_a_file(offline, tmp_path):
  (tmp_path / "file").write_text("mine")
  for words in (RUN, ("pull", *RUN[1:])):
    fails(offline(*words, env={"QVM_CACHE_DIR": str(tmp_path / "file")}), str(tmp_path / "file"))
  fails(offline(*RUN, env={"QVM_CACHE_DIR": "/proc/self/none/x"}), "/proc/self/none")
  assert (tmp_path / "file").read_text() == "mine"


def test_a_tree_of_the_other_cpu_is_fetched_on_its_own(used, image, tools_tar):
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    server.replace_asset(
      "resources", "v2.0.0", "qemu-system-aarch64-linux.tar", stand_in_tar(uefi_fd=b"arm")
    )
    used.env.update(QVM_RELEASES_URL=server.url, QVM_API_URL=server.api_url)
    assert used(*RUN, "--platform", "arm64").returncode == 0
  share = "share/qemu/uefi.fd"
  assert (used.cache / "qemu/x86_64" / share).read_bytes() == b"uefi"
  assert (used.cache / "qemu/aarch64" / share).read_bytes() == b"arm"


def test_an_overlay_that_the_user_has_rebased_stays_there(used, tmp_path):
  """Onto a file of the same name elsewhere: what the guest then writes fits only that."""
  other = tmp_path / f"{FREEBSD}.qcow2"
  shutil.copyfile(used.cache / BASE, other)
  disk = used.cache / f"instances/{FREEBSD}.qcow2"
  words = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(other), "-F", "qcow2", str(disk)]
  subprocess.run(words, check=True)
  works(used("run", "freebsd", "15.1"))
  assert image_info(disk)["backing-filename"] == str(other)


def test_an_image_that_is_replaced_while_its_first_instance_starts(full, server, image, tmp_path):
  newer = {IMAGE: image + bytes(1 << 16)}
  server.add_release("freebsd-builder", "v99.0.0", newer, published="2026-09-01T00:00:00Z")
  refresh = full.command(*PULL, "--refresh")
  works(with_another(full, ["run", "freebsd", "15.1"], "fetch_base", refresh, tmp_path))
  works(full("run", "freebsd", "15.1"))


# Another qvm deletes the instance just when this one looks for the spelling of its name.
DELETED_MEANWHILE = """
names = qvm.names_in
def names_in(folder):
  if folder.endswith("/instances"):
    for name in names(folder):
      os.unlink(os.path.join(folder, name))
  return names(folder)
qvm.names_in = names_in
"""


def test_an_instance_that_is_deleted_while_its_spelling_is_checked(used):
  fails(used("stop", FREEBSD, code=DELETED_MEANWHILE), f"{FREEBSD} is not running")


@pytest.mark.parametrize("words", [f"clone {FREEBSD} new", f"ssh {FREEBSD}", f"restart {FREEBSD}"])
def test_an_instance_that_is_deleted_meanwhile_has_no_damaged_record(used, tmp_path, words):
  run = with_another(used, words.split(), "existing", used.command("rm", FREEBSD), tmp_path)
  assert run.returncode and f"there is no instance {FREEBSD} any more" in run.stderr
  assert "damaged" not in run.stderr


def test_an_instance_that_is_deleted_while_pull_asks_what_it_needs(full, tmp_path):
  """Its record, which is gone, does not count as that of an image that is no more."""
  works(full("run", "freebsd", "15.1"))
  (full.cache / BASE).unlink()
  rm = full.command("rm", FREEBSD)
  works(with_another(full, PULL, "overlays", rm, tmp_path))
