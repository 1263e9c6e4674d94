"""Nothing that a user has is lost: what is unknown, damaged, gone, moved, or cut off by a power
failure (issue 17, D1 to D11)."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import (
  BASE,
  DEAD,
  FREEBSD,
  IMAGE,
  PULL,
  QEMU,
  TOOLS,
  digest,
  ended,
  fails,
  rows,
  sha256,
  state,
  wait_for,
  with_another,
  works,
)

import qvm as qvm_source

RUN = ("run", "freebsd", "15.1")
DISK = f"instances/{FREEBSD}.qcow2"
RECORD = f"instances/{FREEBSD}.json"


def write_into(disk):
  """Change a disk as a guest does."""
  command = ["qemu-io", "-f", "qcow2", "-c", "write -P 0x55 1M 64k", str(disk)]
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read_from(disk):
  """Whether the disk has what write_into wrote."""
  command = ["qemu-io", "-f", "qcow2", "-c", "read -P 0x55 1M 64k", str(disk)]
  return "Pattern verification failed" not in subprocess.check_output(command, text=True)


def replace(path, content):
  """Put other content where a file is, by hand."""
  path.unlink()
  path.write_bytes(content)


def changed(image):
  """Another image of the same length, which is sound."""
  return image[:-1] + bytes([image[-1] ^ 1])


@pytest.fixture
def kept(qvm):
  """qvm with an instance in which a guest has written, and a server."""
  works(qvm(*RUN))
  write_into(qvm.cache / DISK)
  return qvm


# --- Base images -----------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["none", "of the old file", "of qvm 0.1"])
def test_another_base_is_noticed_whatever_its_record_says(kept, image, record):
  path = kept.cache / f"base/{FREEBSD}.json"
  text = json.loads(path.read_text())
  replace(kept.cache / BASE, changed(image))
  path.unlink()
  if record != "none":
    path.write_text(json.dumps({**text, "mtime_ns": text["mtime_ns"] if "old" in record else 0}))
  before = digest(kept.cache / DISK)
  fails(kept(*RUN), *("is damaged", "--verify") if record != "none" else ("a different base",))
  assert digest(kept.cache / DISK) == before


def test_a_base_changed_within_a_second_is_noticed(kept, image):
  path = kept.cache / BASE
  times = json.loads(path.with_suffix(".json").read_text())["mtime_ns"]
  replace(path, changed(image))
  os.utime(path, ns=(times + 1, times + 1))
  fails(kept(*RUN), "is damaged", "--verify")


def test_a_base_from_an_archive_with_whole_seconds_is_not_hashed_again(kept, image):
  path = kept.cache / BASE
  seconds = json.loads(path.with_suffix(".json").read_text())["mtime_ns"] // 10**9
  replace(path, changed(image))  # an image that is read would be refused
  os.utime(path, (seconds, seconds))
  works(kept(*RUN))


def test_a_base_without_a_record_is_hashed_once(kept, image):
  path = kept.cache / f"base/{FREEBSD}.json"
  path.unlink()
  works(kept(*RUN))
  record = json.loads(path.read_text())
  assert (record["sha256"], record["bytes"]) == (sha256(image), len(image))
  before = path.stat().st_ino
  works(kept(*RUN))
  assert path.stat().st_ino == before
  assert json.loads((kept.cache / RECORD).read_text())["base_sha256"] == sha256(image)


@pytest.mark.parametrize("words", [RUN, PULL, (*RUN, "--rm"), (*RUN, "--name", "x")])
@pytest.mark.parametrize("noted", [True, False], ids=["release noted", "by its digest"])
def test_a_base_that_is_gone_comes_from_its_own_release(kept, server, image, words, noted):
  """A newer release is out, which has another image."""
  other = {IMAGE: changed(image)}
  server.add_release("freebsd-builder", "v99.0.0", other, published="2026-09-01T00:00:00Z")
  (kept.cache / BASE).unlink()
  (kept.cache / f"base/{FREEBSD}.json").unlink()
  if not noted:
    record = json.loads((kept.cache / RECORD).read_text())
    (kept.cache / RECORD).write_text(json.dumps({**record, "release": "", "asset_sha256": ""}))
  works(kept(*words))
  assert (kept.cache / BASE).read_bytes() == image
  works(kept(*RUN))
  assert read_from(kept.cache / DISK)


@pytest.mark.parametrize("record", ["without a release", "damaged"])
def test_a_base_that_is_gone_and_unknown_is_not_guessed(kept, server, image, record):
  server.remove_asset("freebsd-builder", "v0.16.0", IMAGE)
  server.add_release("freebsd-builder", "v99.0.0", {IMAGE: changed(image)})
  (kept.cache / BASE).unlink()
  text = json.loads((kept.cache / RECORD).read_text())
  text.update({"release": "", "asset_sha256": ""})
  (kept.cache / RECORD).write_text(json.dumps(text) if "without" in record else "")
  for words in (RUN, PULL):
    result = kept(*words)
    assert result.returncode == 1
    assert re.search(f"of a release that is not known, on which .*: {FREEBSD}\n", result.stderr)
    assert f"restore {kept.cache / BASE}" in result.stderr.splitlines()[-1]
  assert not (kept.cache / BASE).exists() and read_disk_header(kept.cache / DISK)


def read_disk_header(disk):
  return qvm_source.backing_file(str(disk)) == f"../{BASE}"


def test_a_replaced_asset_never_takes_the_place_of_a_base(kept, server, image):
  (kept.cache / BASE).unlink()
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, changed(image))
  for words in (PULL, RUN, (*RUN, "--rm")):
    result = kept(*words)
    assert result.returncode == 1
    assert f"replaced by another image: these instances depend on it: {FREEBSD}" in result.stderr
  assert not (kept.cache / BASE).exists()
  works(kept("rm", FREEBSD))
  works(kept(*PULL))
  assert (kept.cache / BASE).read_bytes() == changed(image)


def test_a_base_behind_a_link_that_leads_nowhere_is_not_replaced(kept):
  (kept.cache / BASE).unlink()
  (kept.cache / BASE).symlink_to("/not/mounted.qcow2")
  for words in (PULL, RUN, (*RUN, "--rm")):
    fails(kept(*words), "is a link to /not/mounted.qcow2, which is not there", "mounted?")
  assert os.readlink(kept.cache / BASE) == "/not/mounted.qcow2"


# --- Overlays that cannot be read --------------------------------------------------------------


@pytest.mark.parametrize("how", ["elsewhere", "empty", "zeros", "folder"])
@pytest.mark.parametrize("record", [True, False], ids=["record", "no record"])
def test_an_unreadable_overlay_keeps_what_it_may_need(kept, server, image, tmp_path, how, record):
  disk, away = kept.cache / DISK, tmp_path / "not mounted"
  disk.rename(away)
  if how == "elsewhere":
    disk.symlink_to(tmp_path / "volume" / "disk.qcow2")
  elif how == "folder":
    disk.mkdir()
  else:
    disk.write_bytes(b"" if how == "empty" else bytes(200_000))
  if not record:
    (kept.cache / RECORD).unlink()
  works(kept("clean", "--all"))
  assert (kept.cache / BASE).read_bytes() == image and os.path.lexists(disk)
  other = {IMAGE: changed(image)}
  server.add_release("freebsd-builder", "v99.0.0", other, published="2026-09-01T00:00:00Z")
  result = kept("pull", "--refresh", *PULL[1:])
  assert result.returncode == 1 and "cannot be refreshed" in result.stderr
  fails(kept(*RUN), "cannot be read, or is damaged" if record else "missing or damaged")
  shutil.rmtree(disk) if how == "folder" else disk.unlink()
  away.rename(disk)
  works(kept(*RUN))
  assert read_from(disk)


def test_another_systems_image_can_be_cleaned_beside_an_unreadable_overlay(kept):
  works(kept("pull", "--platform", "arm64", "openbsd", "7.9"))
  replace(kept.cache / DISK, b"")
  works(kept("clean", "--all"))
  assert sorted(os.listdir(kept.cache / "base")) == [f"{FREEBSD}.json", IMAGE]


def test_clean_all_keeps_what_an_unreadable_streamed_overlay_is_to_go_on_with(kept):
  """Its partial download is the only copy of what is on its way."""
  record = json.loads((kept.cache / RECORD).read_text())
  (kept.cache / RECORD).write_text(json.dumps({**record, "base_sha256": "", "validator": '"1"'}))
  replace(kept.cache / DISK, b"")
  shutil.rmtree(kept.cache / "base")
  (kept.cache / "base").mkdir()
  part = kept.cache / "downloads" / IMAGE / "part"
  part.parent.mkdir()
  part.write_bytes(b"half")
  works(kept("clean", "--all"))
  assert part.exists()


def test_clean_keeps_every_download_while_nobody_knows_which_is_needed(kept):
  """By a disk that cannot be read, and whose record is damaged."""
  replace(kept.cache / DISK, b"")
  replace(kept.cache / RECORD, b"{")
  for name in (IMAGE, "netbsd-11.0-x86-64.qcow2", qvm_source.SCRATCH + "0123456789ab"):
    (kept.cache / "downloads" / name).mkdir()
  works(kept("clean"))
  assert sorted(os.listdir(kept.cache / "downloads")) == [IMAGE, "netbsd-11.0-x86-64.qcow2"]


# --- Clean-up ----------------------------------------------------------------------------------


def test_clean_all_deletes_no_qemu_outside_of_the_cache(full, tmp_path):
  mine = tmp_path / "my qemu"
  tree = full.cache / "qemu" / "x86_64"
  shutil.move(str(tree.resolve()), str(mine))
  tree.unlink()
  tree.symlink_to(mine)
  (full.cache / "bin" / "qemu-img").rename(tmp_path / "my qemu-img")
  (full.cache / "bin" / "qemu-img").symlink_to(tmp_path / "my qemu-img")
  before = state(mine)
  works(full("clean", "--all"))
  assert state(mine) == before and (tmp_path / "my qemu-img").exists()
  assert not os.path.lexists(tree)


def test_a_kept_run_does_not_inherit_the_mark_of_a_killed_one(full, background, tmp_path):
  """The --rm run ends just before the kept one gets its name, after that has swept."""
  process, record = background(full, *RUN, "--rm", "--name", "vm")
  code = (
    "sweep = qvm.sweep\n"
    "def swept(cache):\n"
    "  sweep(cache)\n"
    f"  for pid in {process.pid}, {record['pid']}:\n"
    "    try: os.kill(pid, 9)\n"
    "    except ProcessLookupError: pass\n"
    "  while not qvm.wait_released(cache.instance('vm'), 9): pass\n"
    "qvm.sweep = swept\n"
  )
  works(full(*RUN, "--name", "vm", code=code, env={"STAND_IN": "{}"}))
  process.wait()
  works(full("list"))
  assert rows(full)["vm"]["ephemeral"] is False
  assert read_backing(full.cache / "instances/vm.qcow2") == f"../{BASE}"


def read_backing(disk):
  return qvm_source.backing_file(str(disk))


# --- Repair ------------------------------------------------------------------------------------

WAYS = {
  "cut": lambda content: content[:-512],
  "empty": lambda content: b"",
  "longer": lambda content: content + bytes(512),
  "not an image": lambda content: b"<html>" + content[6:],
}
THINGS = {
  "base": BASE,
  "QEMU": "qemu/x86_64/bin/qemu-system-x86_64",
  "firmware": "qemu/x86_64/share/qemu/bios-256k.bin",
  "qemu-img": "bin/qemu-img",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("thing", THINGS)
def test_pull_repairs_what_has_another_length(kept, server, thing, way):
  path = kept.cache / THINGS[thing]
  good, mode = path.read_bytes(), path.stat().st_mode
  if WAYS[way](good) != good and len(WAYS[way](good)) == len(good) and thing != "base":
    pytest.skip("only its digest tells")
  replace(path, WAYS[way](good))
  path.chmod(mode)
  server.clear_log()
  run = works(kept(*PULL))
  assert "damaged" in run.stderr or "is refused" in run.stderr
  assert "downloaded again" in run.stderr
  assert path.read_bytes() == good and path.stat().st_mode == mode
  name = {"base": IMAGE, "qemu-img": TOOLS}.get(thing, QEMU)
  asked = {each.path.rpartition("/")[2] for each in server.requests("", "cdn")}
  assert {word.split("?")[0] for word in asked} == {name}
  server.clear_log()
  works(kept(*RUN))
  assert (server.started, read_from(kept.cache / DISK)) == (0, True)


@pytest.mark.parametrize("thing", THINGS)
def test_pull_verify_repairs_what_has_another_digest(kept, thing):
  path = kept.cache / THINGS[thing]
  good, mode, times = path.read_bytes(), path.stat().st_mode, path.stat().st_mtime
  replace(path, changed(good))
  path.chmod(mode)
  os.utime(path, (times, times))
  assert "downloaded again" not in works(kept(*PULL)).stderr
  run = works(kept("pull", "--verify", *PULL[1:]))
  assert run.stdout.count("DAMAGED") == 1 and run.stdout.count(": ok") == 5
  assert path.read_bytes() == good


def test_a_damaged_base_is_not_replaced_by_another_one(kept, server, image):
  replace(kept.cache / BASE, image[:-512])
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, changed(image))
  result = kept(*PULL)
  assert result.returncode == 1 and "cannot be replaced by another image" in result.stderr
  assert (kept.cache / BASE).read_bytes() == image[:-512]
  fails(kept(*RUN), "damaged", "qvm pull --platform x86-64 freebsd 15.1", "downloads it again")


def test_a_damaged_base_stays_until_the_right_one_is_there(kept, server, image):
  replace(kept.cache / BASE, image[:-512])
  server.fault(IMAGE, times=None, status=404)
  assert kept(*PULL).returncode == 1
  assert (kept.cache / BASE).read_bytes() == image[:-512]


def test_a_refresh_while_a_base_is_hashed(qvm, server, image, tmp_path):
  """The digest of the old image is not noted for the new one."""
  works(qvm(*PULL))
  os.utime(qvm.cache / BASE, (1, 1))
  new = changed(image)
  server.add_release("freebsd-builder", "v0.17.0", {IMAGE: new}, published="2027-01-01T00:00:00Z")
  refresh = qvm.command(*PULL, "--refresh")
  works(with_another(qvm, RUN, "file_sha256", refresh, tmp_path))
  assert (qvm.cache / BASE).read_bytes() == new
  assert json.loads((qvm.cache / RECORD).read_text())["base_sha256"] == sha256(new)
  works(qvm(*RUN))


def test_a_waiting_record_is_not_taken_by_the_number_of_its_file(kept):
  """The file of a refresh that was cut off may be deleted; others then get its inode."""
  waiting = (kept.cache / BASE).with_suffix(".json.new")
  record = json.loads(waiting.with_suffix("").read_text())
  inode = (kept.cache / BASE).stat().st_ino
  waiting.write_text(json.dumps({**record, "sha256": "0" * 64, "inode": inode, "mtime_ns": 1}))
  works(kept(*RUN))


# --- Links and moves ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["instances", "base"])
def test_a_folder_moved_elsewhere_and_linked(kept, tmp_path, folder, image):
  shutil.move(str(kept.cache / folder), str(tmp_path / "big disk"))
  (kept.cache / folder).symlink_to(tmp_path / "big disk")
  works(kept(*RUN))
  assert read_from(kept.cache / DISK)
  works(kept(*RUN, "--name", "x"))
  works(kept(*RUN, "--rm"))
  for name in (FREEBSD, "x"):
    backing = read_backing(kept.cache / f"instances/{name}.qcow2")
    assert os.path.samefile(kept.cache / "instances" / backing, kept.cache / BASE)
  works(kept("clean", "--all"))
  assert (kept.cache / BASE).read_bytes() == image
  (kept.cache / folder).unlink()
  shutil.move(str(tmp_path / "big disk"), str(kept.cache / folder))
  works(kept(*PULL))
  works(kept(*RUN))
  assert read_backing(kept.cache / DISK) == f"../{BASE}" and read_from(kept.cache / DISK)


@pytest.mark.parametrize("folder", ["instances", "layers"])
def test_a_folder_moved_beside_another_image_of_that_name(kept, tmp_path, folder, image):
  """There ../base/NAME leads to that one, on which the guest's disk would be no good."""
  layer = f"layers/{FREEBSD}-prepared-0123456789"
  if folder == "layers":
    (kept.cache / layer).with_suffix(".json").write_text("{}")
    shutil.copy(kept.cache / DISK, kept.cache / f"{layer}.qcow2")
    command = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", f"../{layer}.qcow2"]
    subprocess.run([*command, str(kept.cache / DISK)], check=True)
  other = tmp_path / "big disk"
  for path in (BASE, f"{layer}.qcow2"):
    (other / path).parent.mkdir(parents=True)
    (other / path).write_bytes(changed(image))
  shutil.move(str(kept.cache / "instances"), str(other / "instances"))
  (kept.cache / "instances").symlink_to(other / "instances")
  works(kept(*RUN))
  right = f"{layer}.qcow2" if folder == "layers" else BASE
  backing = read_backing(kept.cache / DISK)
  assert os.path.samefile(kept.cache / "instances" / backing, kept.cache / right)


def other_file_system(folder):
  """Whether a folder is on another file system than temporary files."""
  return os.path.isdir(folder) and os.access(folder, os.W_OK) and (
    os.stat(folder).st_dev != os.stat("/tmp").st_dev)  # fmt: skip


@contextlib.contextmanager
def elsewhere(folder):
  """Have a folder of the cache on another file system, by a link."""
  there = Path(f"/dev/shm/qvm-test-{os.getpid()}-{folder.name}")
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  folder.parent.chmod(0o700)
  shutil.copytree(folder, there)
  try:
    shutil.rmtree(folder)
    folder.symlink_to(there)
    yield
  finally:
    shutil.rmtree(there)


two_file_systems = pytest.mark.skipif(
  not other_file_system("/dev/shm"), reason="there is no second file system"
)


@two_file_systems
@pytest.mark.parametrize(
  "folder", ["instances", "base", "layers", "qemu", "bin", "downloads", "ssh"]
)
def test_a_folder_on_another_file_system(qvm, folder, image):
  with elsewhere(qvm.cache / folder):
    for _ in range(2):
      works(qvm(*RUN))
      works(qvm(*RUN, "--rm"))
    works(qvm("run", "--rm", "openbsd", "7.9"))  # which wants a key
    write_into(qvm.cache / DISK)
    works(qvm(*PULL))
    works(qvm("pull", "--verify", *PULL[1:]))
    assert read_from(qvm.cache / DISK) and (qvm.cache / BASE).read_bytes() == image
    for path in (DISK, BASE, "bin/qemu-img"):
      (qvm.cache / (path + ".tmp")).write_bytes(b"half")
    works(qvm("clean"))
    assert not list(qvm.cache.glob("*/*.tmp"))


@two_file_systems
@pytest.mark.parametrize("step", [f" {BASE}.tmp$", f" {BASE}$", ".new base"])
def test_kill_9_of_a_refresh_with_base_on_another_file_system(full, server, image, kill_at, step):
  server.add_release("freebsd-builder", "v99.0.0", {IMAGE: image + bytes(1 << 16)})
  with elsewhere(full.cache / "base"):
    kill_at(full, step, *PULL, "--refresh")
    offline = {"QVM_RELEASES_URL": DEAD, "QVM_API_URL": DEAD}
    works(full(*RUN, "--rm", env=offline))
    works(full(*PULL, "--refresh"))
    assert (full.cache / BASE).stat().st_size == len(image) + (1 << 16)


@two_file_systems
def test_holes_stay_holes_on_the_way_to_another_file_system(tmp_path):
  (tmp_path / "cache").mkdir()
  with elsewhere(tmp_path / "cache" / "layers"), open(tmp_path / "memory", "wb") as file:
    file.truncate(64 << 20)
    os.fchmod(file.fileno(), 0o400)
    target = tmp_path / "cache/layers/memory"
    qvm_source.move(file.name, str(target), True)
    stat = target.stat()
  assert (stat.st_size, stat.st_mode & 0o777) == (64 << 20, 0o400)
  assert stat.st_blocks * 512 < 1 << 20


# --- Newer versions ----------------------------------------------------------------------------


def test_a_newer_version_says_that_there_is_another_instance(kept, server, image):
  newer = IMAGE.replace("15.1", "15.2")
  server.add_release("freebsd-builder", "v99.0.0", {newer: image}, published="2026-09-01T00:00:00Z")
  line = "15.2-x86-64 is a new instance, without what the guest of freebsd-15.1-x86-64 wrote"
  words = ("run", "--platform", "x86-64", "freebsd")
  assert line not in works(kept(*words, "--rm")).stderr
  assert line not in works(kept(*words, "--name", "other")).stderr
  assert line in works(kept(*words)).stderr
  assert line not in works(kept(*words)).stderr


# --- Console logs ------------------------------------------------------------------------------


def test_a_console_log_keeps_its_beginning_and_its_end(full, tmp_path):
  """With 60 MB of them; the file never gets larger than the two and what is about to be cut."""
  program = full.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  line = "{:09d} " + "x" * 89 + "\\n"
  program.write_text(
    f"#!{sys.executable} -IS\nimport os, signal\n"
    f"for start in range(0, 600000, 1000):\n"
    f"  os.write(1, ''.join('{line}'.format(i) for i in range(start, start + 1000)).encode())\n"
    f"open({str(tmp_path / 'written')!r}, 'w').close()\n"
    "signal.pause()\n"
  )
  log = full.cache / "instances" / "vm.console.log"
  with ended(full.start("run", "-d", "--name", "vm", *PULL[1:])):
    wait_for(lambda: log.exists() and log.stat().st_size > 0)
    most = 0
    while not (tmp_path / "written").exists():
      most = max(most, log.stat().st_size)
    wait_for(lambda: log.read_bytes().endswith(b"x\n") and b"000599999 " in log.read_bytes()[-200:])
    text = log.read_bytes()
  assert max(most, len(text)) < 22 << 20
  left = re.findall(rb"\n\[qvm left out (\d+) bytes\]\n", text)
  assert left and text.startswith(b"000000000 x")
  head, tail = text[: 1 << 20], text.rpartition(b" bytes]\n")[2]
  assert head == b"".join(b"%09d %s\n" % (i, b"x" * 89) for i in range(11000))[: 1 << 20]
  assert len(tail) >= 10 << 20 and len(head) + int(left[-1]) + len(tail) == 60_000_000
