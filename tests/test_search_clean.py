"""search, pull --refresh, clean and mirrors: what there is, what is newer, and what may go."""

import fcntl
import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from release_server import ReleaseServer
from support import (
  BASE,
  DEAD,
  DEADLINE,
  FREEBSD,
  PULL,
  ROOT,
  STAND_IN,
  Qvm,
  fails,
  fill,
  instance_names,
  rewrite,
  stand_in_tar,
  state,
  tar_of,
  with_another,
  works,
  written,
)

import qvm as qvm_source

NOTE = f"base/{FREEBSD}.json"
RUN = ("run", *PULL[1:])
REFRESH = ("pull", "--refresh", *PULL[1:])


def kill_both(process, record):
  """kill -9 for qvm and its QEMU; returns when both are gone."""
  process.kill()
  process.wait()
  os.kill(record["pid"], signal.SIGKILL)
  process.communicate()  # QEMU held the pipes too


def point(qvm, server):
  """Let records name this server instead of the one they came from: its port is another."""
  paths = [*(qvm.cache / "base").glob("*.json"), *(qvm.cache / "bin").glob("*.json")]
  for path in [*paths, *(qvm.cache / "qemu").glob("*/release.json")]:
    rewrite(path, re.sub(r"http://[^/]*", server.github_url, path.read_text()))


@pytest.fixture
def pulled(qvm, server, filled):
  """qvm with a release server, and FreeBSD 15.1 in its cache."""
  shutil.copytree(filled, qvm.home, dirs_exist_ok=True, symlinks=True)
  point(qvm, server)
  return qvm


def newer(server, image, tools_tar=None, tag="v2.17.0"):
  """Publish a newer image, with tools_tar also a newer QEMU; returns the image."""
  content = image + tag.encode()
  names = [f"freebsd-15.1-{arch}.qcow2" for arch in ("x86-64", "arm64")]
  published = "2026-09-01T00:00:00Z"
  server.add_release("freebsd-builder", tag, dict.fromkeys(names, content), published=published)
  if tools_tar:
    assets = {name: stand_in_tar(uefi_fd=tag.encode()) for name in QEMUS}
    assets.update(dict.fromkeys(("resources-linux.tar", "resources-macos.tar"), tools_tar))
    server.add_release("resources", tag, assets, published=published)
  return content


QEMUS = [f"qemu-system-{cpu}-{host}.tar" for cpu in ("x86_64", "aarch64")
         for host in ("linux", "macos")]  # fmt: skip
FIRMWARE = "qemu/x86_64/share/qemu/uefi.fd"


# --- search ----------------------------------------------------------------------------------

EVERYTHING = """
OS       VERSION  X86-64            ARM64
freebsd  15.1     v0.16.0 (cached)  v0.16.0
freebsd  15.0     v0.16.0           v0.16.0
freebsd  14.4     v0.16.0           v0.16.0
freebsd  12.2     v0.9.0            -
openbsd  7.9      v0.14.0           v0.14.0
openbsd  7.8      v0.14.0           v0.14.0
netbsd   11.0     v1.0.0            v0.7.0
netbsd   10.1     v0.7.0            v0.7.0
haiku    r1beta5  v0.2.0            -
omnios   r151058  v0.2.0            -
dragonflybsd  6.4.2  v0.0.1         -
midnightbsd   4.0.4  v0.0.1         -
""".lstrip()


@pytest.fixture
def world(pulled, server):
  """Releases of several ages, a bundle, a prerelease and a draft."""
  old, new = "2020-01-01T00:00:00Z", "2026-09-01T00:00:00Z"
  old_names = ("freebsd-12.2-x86-64.qcow2", f"{FREEBSD}.qcow2")
  server.add_release("freebsd-builder", "v0.9.0", dict.fromkeys(old_names, b""), published=old)
  bundle = {"netbsd-11.0-x86-64.tar.zst": b""}
  server.add_release("netbsd-builder", "v1.0.0", bundle, published=new)
  for tag, flag in (("v9-rc1", "prerelease"), ("v10", "draft")):
    assets = {"openbsd-8.0-x86-64.qcow2": b""}
    server.add_release("openbsd-builder", tag, assets, published=new, **{flag: True})
  return pulled


def api_is(qvm, server, kind):
  server.api_quota = 0 if kind == "out of quota" else None
  if kind == "gone":
    qvm.env["QVM_API_URL"] = DEAD


def table(text):
  """The lines of a table, however wide their columns are, and how large what is cached."""
  text = re.sub(r"\(cached, [0-9.]+ [kMG]?B\)", "(cached)", text)
  return [re.split(r"  +", line) for line in text.splitlines()]


@pytest.mark.parametrize("api", ["up", "out of quota", "gone"])
def test_search(world, server, api):
  api_is(world, server, api)
  run = works(world("search"))
  assert table(run.stdout) == table(EVERYTHING)
  assert api == "up" or "pages" in run.stderr
  assert not server.requests(origin="cdn")


@pytest.mark.parametrize("words", [("freebsd",), ("FreeBSD",), ("NETBSD",), ("haiku",)])
def test_search_one(world, server, words):
  run = works(world("search", *words))
  name = words[0].lower()
  assert table(run.stdout) == [row for row in table(EVERYTHING) if row[0] in ("OS", name)]
  assert {path.split("/")[-2] for path in server.paths(origin="api")} == {f"{name}-builder"}


@pytest.mark.parametrize("api", ["up", "gone"])
def test_search_json(world, server, api):
  api_is(world, server, api)
  rows = json.loads(works(world("search", "--json", "netbsd")).stdout)
  qcow2 = "netbsd-{}-{}.qcow2".format
  expected = [
    ("11.0", "x86-64", "v1.0.0", "netbsd-11.0-x86-64.tar.zst"),
    ("11.0", "arm64", "v0.7.0", qcow2("11.0", "arm64")),
    ("10.1", "x86-64", "v0.7.0", qcow2("10.1", "x86-64")),
    ("10.1", "arm64", "v0.7.0", qcow2("10.1", "arm64")),
  ]
  found = [(row["version"], row["arch"], row["release"], row["asset"]) for row in rows]
  assert sorted(found) == sorted(expected)
  assert [version for version, *_ in found] == ["11.0", "11.0", "10.1", "10.1"]
  assert {(row["os"], row["cached"]) for row in rows} == {("netbsd", False)}
  rows = json.loads(works(world("search", "--json")).stdout)
  cached = [(row["version"], row["arch"]) for row in rows if row["cached"]]
  assert cached == [("15.1", "x86-64")]
  assert list(dict.fromkeys(row["os"] for row in rows)) == list(qvm_source.OS_NAMES)


@pytest.mark.parametrize(
  "os_name, ordered",
  [
    ("netbsd", ["11.0", "10.1", "10.0", "9.4", "9.2"]),
    ("openbsd", ["7.10", "7.9", "7.1", "6.9"]),
    ("haiku", ["r1", "r1beta10", "r1beta6", "r1beta5", "r1beta4"]),
    ("omnios", ["r151058", "r151056", "r151054"]),
  ],
)
def test_search_order(qvm, server, os_name, ordered):
  server.repos[f"{os_name}-builder"] = {}
  for day, version in enumerate(sorted(ordered)):
    assets = {f"{os_name}-{version}-x86-64.qcow2": b""}
    published = f"2026-01-{day + 1:02}T00:00:00Z"
    server.add_release(f"{os_name}-builder", f"v{day}", assets, published=published)
  rows = table(works(qvm("search", os_name)).stdout)[1:]
  assert [row[1] for row in rows] == ordered


@pytest.mark.parametrize("words", [("plan9",), ("",), ("../freebsd",), ("freebsd", "netbsd")])
def test_search_bad_words(qvm, server, words):
  fails(qvm("search", *words), "search" if len(words) > 1 else "freebsd", code=2)
  assert server.started == 0


@pytest.mark.parametrize("origin, place", [("api", "releases"), ("github", "releases/latest")])
def test_all_are_asked_at_the_same_time(world, server, origin, place):
  api_is(world, server, "gone" if origin == "github" else "up")
  go = threading.Event()
  faults = [
    server.fault(f"{name}-builder/{place}", origin=origin, pause=go) for name in qvm_source.OS_NAMES
  ]
  process = world.start("search", env={"QVM_TIMEOUT": "20"})
  together = [fault.reached.wait(DEADLINE) for fault in faults]
  go.set()
  output, errors = process.communicate()
  assert all(together), errors
  assert (process.returncode, table(output)) == (0, table(EVERYTHING)), errors


def test_search_writes_nothing(qvm):
  works(qvm("search"))
  assert not qvm.cache.exists()


@pytest.mark.parametrize("words", [(), ("freebsd",)])
def test_search_without_a_network(offline, filled, words):
  shutil.copytree(filled, offline.home, dirs_exist_ok=True, symlinks=True)
  run = works(offline("search", *words))
  assert table(run.stdout) == [["OS", "VERSION", "X86-64", "ARM64"],
                               ["freebsd", "15.1", "(cached)", "-"]]  # fmt: skip
  for name in words or qvm_source.OS_NAMES:
    assert any("cached" in line and name in line for line in run.stderr.splitlines()), run.stderr
  assert "bug" not in run.stderr
  rows = json.loads(works(offline("search", "--json", *words)).stdout)
  assert rows == [
    {
      "os": "freebsd",
      "version": "15.1",
      "arch": "x86-64",
      "release": None,
      "asset": f"{FREEBSD}.qcow2",
      "cached": True,
      "size": (offline.cache / BASE).stat().st_blocks * 512,
    }
  ]


def test_search_without_a_network_and_a_cache(offline):
  run = offline("search", "netbsd")
  assert run.returncode == 1 and "netbsd" in run.stderr and "bug" not in run.stderr
  run = offline("search", "--json", "netbsd")
  assert (run.returncode, json.loads(run.stdout)) == (1, [])


def test_search_when_one_os_cannot_be_asked(world, server):
  server.fault("openbsd-builder", origin=None, times=None, status=403)
  run = works(world("search"))
  assert table(run.stdout) == [row for row in table(EVERYTHING) if row[0] != "openbsd"]
  said = [line for line in run.stderr.splitlines() if "cached" in line]
  assert len(said) == 1 and "openbsd" in said[0]


def test_search_shows_cached_images_that_no_release_has(world, image):
  (world.cache / "base" / "freebsd-9.0-arm64.qcow2").write_bytes(image)
  (world.cache / "base" / "notes.txt").write_text("mine")
  rows = table(works(world("search", "freebsd")).stdout)
  assert rows[-1] == ["freebsd", "9.0", "-", "(cached)"]
  assert len(rows) == 6


# --- pull --refresh --------------------------------------------------------------------------


def test_refresh_takes_the_newest(pulled, server, image, tools_tar):
  content = newer(server, image, tools_tar)
  server.clear_log()
  works(pulled(*PULL))
  assert server.started == 0, "without --refresh what is there is enough"
  works(pulled(*REFRESH))
  assert (pulled.cache / BASE).read_bytes() == content
  assert json.loads((pulled.cache / NOTE).read_text())["release"] == "v2.17.0"
  assert (pulled.cache / FIRMWARE).read_bytes() == b"v2.17.0"
  assert [name for name in pulled.files() if name.startswith("downloads/")] == []
  works(pulled(*RUN))
  assert works(pulled("pull", "--verify", *PULL[1:])).stdout.count(": ok, matches v2.17.0") == 3


@pytest.mark.parametrize("api", ["up", "gone"])
def test_refresh_of_the_newest_downloads_nothing(pulled, server, api):
  api_is(pulled, server, api)
  before = state(pulled.cache)
  run = works(pulled(*REFRESH))
  assert not [r for r in server.requests(origin="cdn") if r.status == 200 or r.sent > 1]
  assert "newest" in run.stderr
  assert state(pulled.cache) == before


def test_refresh_where_the_newest_release_lost_the_version(pulled, server, image):
  assets = {"freebsd-16.0-x86-64.qcow2": image}
  server.add_release("freebsd-builder", "v1", assets, published="2026-10-01T00:00:00Z")
  before = state(pulled.cache)
  works(pulled(*REFRESH))
  assert state(pulled.cache) == before


def test_refresh_without_a_network_changes_nothing(pulled, image):
  before = [state(pulled.cache / folder) for folder in ("base", "bin", "qemu")]
  fails(pulled(*REFRESH, env={"QVM_RELEASES_URL": DEAD, "QVM_API_URL": DEAD}))
  assert [state(pulled.cache / folder) for folder in ("base", "bin", "qemu")] == before
  works(pulled(*RUN, env={"QVM_RELEASES_URL": DEAD, "QVM_API_URL": DEAD}))


def test_refresh_is_refused_while_instances_need_the_image(pulled, server, image, background):
  process, record = background(pulled, *RUN, "--rm")
  (mortal,) = {path.stem for path in (pulled.cache / "instances").glob("*-rm-*.qcow2")}
  works(pulled(*RUN))
  works(pulled(*RUN, "--name", "build"))
  works(pulled("run", "--platform", "x86-64", "freebsd", "15.0", "--name", "other"))
  works(pulled(*REFRESH))
  newer(server, image)
  before = state(pulled.cache / "base")
  server.clear_log()
  run = pulled(*REFRESH)
  fails(run, FREEBSD, "build", mortal)
  assert "other" not in run.stderr
  assert not [r for r in server.requests(FREEBSD, "cdn") if r.sent > 1], "refused beforehand"
  assert state(pulled.cache / "base") == before
  works(pulled("rm", "build", FREEBSD))
  fails(pulled(*REFRESH), mortal)
  os.kill(record["pid"], signal.SIGTERM)
  process.communicate()
  works(pulled(*REFRESH))
  assert state(pulled.cache / "base") != before


def test_orphan_does_not_hinder_a_refresh(pulled, server, image, background):
  kill_both(*background(pulled, *RUN, "--rm"))
  content = newer(server, image)
  works(pulled(*REFRESH))
  assert (pulled.cache / BASE).read_bytes() == content


def test_instance_made_during_a_refresh_keeps_its_image(pulled, server, image):
  newer(server, image)
  fault = server.fault(FREEBSD, after=1, pause=threading.Event(), pause_at=300000)
  refresh = pulled.start(*REFRESH, env={"QVM_TIMEOUT": "30"})
  assert fault.reached.wait(DEADLINE), refresh.communicate()
  works(pulled(*RUN))
  fault.pause.set()
  errors = refresh.communicate()[1]
  assert refresh.returncode == 1 and FREEBSD in errors.splitlines()[-2], errors
  assert (pulled.cache / BASE).read_bytes() == image
  works(pulled(*RUN))
  works(pulled("pull", "--verify", *PULL[1:]))


# A QEMU that looks at the firmware beside it, as it would at its ROMs: all of one release.
LOOKING = STAND_IN.replace(
  "sys.exit(",
  """
share = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "..", "share", "qemu")
seen = {open(os.path.join(share, name)).read() for name in ("uefi.fd", "bios-256k.bin")}
assert len(seen) == 1, seen
sys.exit(""",
)


def test_qemu_is_replaced_while_others_start(pulled, server, tools_tar):
  def publish(tag):
    text = tag.encode()
    files = {"bin/qemu": LOOKING.encode()}
    files.update(dict.fromkeys(("share/qemu/uefi.fd", "share/qemu/bios-256k.bin"), text))
    assets = dict.fromkeys(QEMUS, tar_of(files))
    assets["resources-linux.tar"] = assets["resources-macos.tar"] = tools_tar
    server.add_release("resources", tag, assets, published=f"2026-09-{tag[1:]}T00:00:00Z")

  publish("v10")
  works(pulled(*REFRESH))
  ends, done, once = [], threading.Event(), threading.Semaphore(0)

  def loop():
    while not done.is_set():
      ends.append(pulled(*RUN, "--rm"))
      once.release()

  threads = [threading.Thread(target=loop) for _ in range(2)]
  for thread in threads:
    thread.start()
  try:
    for number in range(11, 15):
      publish(f"v{number}")
      works(pulled(*REFRESH))
      for _ in threads:
        assert once.acquire(timeout=DEADLINE)
  finally:
    done.set()
    for thread in threads:
      thread.join()
  assert [run.stderr for run in ends if run.returncode] == []
  assert len(ends) >= 8
  assert (pulled.cache / FIRMWARE).read_text() == "v14"


@pytest.mark.parametrize("place", ["base", "bin", "qemu"])
def test_refresh_is_killed_at_any_step(tmp_path, filled, server, image, stepped, place):
  """What was there still runs, no record lies, and the next refresh makes good."""
  tool = (filled / ".cache" / "qvm" / "bin" / "qemu-img").read_bytes() + b"# newer\n"
  content = newer(server, image, tar_of({"qemu-img": tool}))
  step = 0
  while True:
    step += 1
    qvm = Qvm(tmp_path / str(step), ROOT / "qvm.py", server)
    shutil.copytree(filled, qvm.home, symlinks=True)
    point(qvm, server)
    process = stepped(qvm, f" {place}/[^ ]*$", step, "kill", *REFRESH)
    where, errors = process.communicate()
    if not process.returncode:
      break
    assert process.returncode == -signal.SIGKILL, errors
    run = qvm(*RUN, "--rm", env={"QVM_RELEASES_URL": DEAD, "QVM_API_URL": DEAD})
    assert run.returncode == 0, (where, run.stderr)
    assert "DAMAGED" not in qvm("pull", "--verify", *PULL[1:]).stdout, where
    works(qvm(*REFRESH))
    found = [(qvm.cache / path).read_bytes() for path in (BASE, "bin/qemu-img", FIRMWARE)]
    assert found == [content, tool, b"v2.17.0"], where
    notes = [qvm.cache / path for path in (NOTE, "bin/qemu-img.json", "qemu/x86_64/release.json")]
    assert [json.loads(note.read_text())["release"] for note in notes] == ["v2.17.0"] * 3, where
    shutil.rmtree(qvm.home)
  assert step > 3


# --- What another qvm changes while this one looks at it ---------------------------------------


def test_an_image_that_is_cleaned_away_while_search_lists_it(pulled, tmp_path):
  clean_all = pulled.command("clean", "--all")
  run = works(with_another(pulled, ["search", "freebsd"], "cached_images", clean_all, tmp_path))
  assert run.stdout.startswith("OS ") and "cached" not in run.stdout


@pytest.mark.parametrize("path", [f"{FREEBSD}.qcow2", "qemu-img", "qemu-system-x86_64"])
def test_clean_all_takes_nothing_that_pull_looks_at(pulled, tmp_path, path):
  test = f"words[0].endswith({path!r})"
  clean_all = pulled.command("clean", "--all")
  works(with_another(pulled, PULL, "record_of", clean_all, tmp_path, {}, test))
  works(pulled(*RUN, env={"QVM_RELEASES_URL": DEAD, "QVM_API_URL": DEAD}))


def fewer(server, image):
  """Publish a newer image, qemu-img and QEMU; of the QEMU's files one has gone."""
  newer(server, image, tar_of({"qemu-img": b"#!/bin/sh\n"}))
  tar = tar_of({"bin/qemu": STAND_IN.encode(), "share/qemu/bios-256k.bin": b"newer"})
  for name in QEMUS:
    server.replace_asset("resources", "v2.17.0", name, tar)


# Where a pull is when another one has replaced what it looks at.
REPLACED = [
  ("record_of", f"words[0].endswith('{FREEBSD}.qcow2')"),
  ("record_of", "words[0].endswith('qemu-img')"),
  ("files_of_tree", "True"),
]


@pytest.mark.parametrize(("name", "test"), REPLACED)
def test_what_another_qvm_refreshes_is_not_taken_for_damaged(
  pulled, server, image, tmp_path, name, test
):
  fewer(server, image)
  refresh = pulled.command(*REFRESH)
  run = works(with_another(pulled, PULL, name, refresh, tmp_path, {}, test))
  assert "damaged" not in run.stderr


@pytest.mark.parametrize(("name", "test"), REPLACED)
def test_what_another_qvm_refreshes_while_it_is_verified(
  pulled, server, image, tmp_path, name, test
):
  fewer(server, image)
  refresh, words = pulled.command(*REFRESH), ["pull", "--verify", *PULL[1:]]
  test += " and sys._getframe(1).f_code.co_name in ('verdict', 'tree_sha256')"
  run = works(with_another(pulled, words, name, refresh, tmp_path, {}, test))
  assert "DAMAGED" not in run.stdout and run.stdout.count(": ok") == 3


# --- clean -----------------------------------------------------------------------------------


def cleaned(run):
  """The paths that clean names, and how much it says it frees."""
  works(run)
  paths = [line.split(None, 2)[2] for line in run.stdout.splitlines()]
  return paths, re.search(r"free[d]? ([0-9.]+ [kMG]?B)\n", run.stderr).group(1)


def clean(qvm, *words):
  """Dry first, which changes nothing and says the same; returns the paths that went."""
  before = state(qvm.cache)
  dry = qvm("clean", "--dry-run", *words)
  assert state(qvm.cache) == before, "a dry run changes nothing"
  wet = qvm("clean", *words)
  assert dry.stdout == wet.stdout
  assert cleaned(dry) == cleaned(wet)
  paths, _ = cleaned(wet)
  assert all(os.path.lexists(path) != (path[len(str(qvm.cache)) + 1 :] in paths)
             for path in before if path[len(str(qvm.cache)) + 1 :].count("/") == 1)  # fmt: skip
  return paths


def half(qvm, server, name, *words):
  """Kill -9 a qvm in the middle of a download."""
  fault = server.fault(name, pause=threading.Event(), pause_at=300000)
  process = qvm.start(*words)
  assert fault.reached.wait(DEADLINE), process.communicate()
  part = qvm.cache / "downloads" / name / "part"
  patience = time.monotonic() + DEADLINE
  while not part.exists() or not part.stat().st_size:
    assert time.monotonic() < patience, "nothing is written"
    time.sleep(0.01)
  process.kill()
  process.communicate()
  server.clear_faults()


def test_nothing_to_clean(qvm, pulled):
  before = state(pulled.cache)
  for words in ((), ("--dry-run",)):
    assert cleaned(pulled("clean", *words)) == ([], "0 B")
  assert state(pulled.cache) == before


def test_a_dry_run_makes_no_folder(pulled):
  (pulled.cache / "downloads").rmdir()
  works(pulled("clean", "--all", "--dry-run"))
  assert not (pulled.cache / "downloads").exists()


def test_clean_without_a_cache(offline):
  for words in ((), ("--all",), ("--dry-run",)):
    assert cleaned(offline("clean", *words)) == ([], "0 B")
  assert not offline.cache.exists()


def test_clean_leaves_what_another_qvm_has_just_begun_to_use(pulled):
  for name in ("a.qcow2", "b.qcow2"):
    (pulled.cache / "downloads" / name).mkdir()
    (pulled.cache / "downloads" / name / "part").write_bytes(b"x" * 1000)
  code = """
size = qvm.tree_size
def and_another(path):
  if path.endswith("a.qcow2"):
    qvm.another = qvm.Lock(path, folder=True).hold()
    keeps_others_out = qvm.Lock(os.path.dirname(path), folder=True).is_held()
    assert keeps_others_out
  return size(path)
qvm.tree_size = and_another
"""
  result = works(pulled("clean", code=code))
  assert "b.qcow2" in result.stdout and "a.qcow2" not in result.stdout
  assert [path.name for path in (pulled.cache / "downloads").iterdir()] == ["a.qcow2"]


def test_clean_unfinished_downloads(pulled, server):
  half(pulled, server, "freebsd-15.0-x86-64.qcow2", "pull", "freebsd", "15.0", "--platform", "x64")
  paths = clean(pulled)
  assert paths == ["downloads/freebsd-15.0-x86-64.qcow2"]
  assert os.listdir(pulled.cache / "downloads") == []
  works(pulled(*RUN, env={"QVM_RELEASES_URL": DEAD}))


def test_clean_says_what_it_frees(pulled):
  folder = pulled.cache / "downloads" / f"{FREEBSD}.qcow2"
  (folder / "unpacked").mkdir(parents=True)
  (folder / "part").write_bytes(os.urandom(5000000))
  with (folder / "unpacked" / "disk.img").open("wb") as file:
    file.write(os.urandom(1000000))
    file.truncate(100 << 20)
  size = subprocess.run(["du", "-s", "-B1", folder], capture_output=True, text=True)
  size = int(size.stdout.split()[0])
  paths, total = cleaned(pulled("clean", "--dry-run"))
  assert paths == [f"downloads/{FREEBSD}.qcow2"]
  assert total == qvm_source.megabytes(size)
  assert clean(pulled) == paths


BUNDLE = "netbsd-11.0-x86-64.tar.zst"
COMING = {
  f"{FREEBSD}.qcow2": PULL,
  "qemu-system-x86_64-linux.tar": PULL,
  "resources-linux.tar": PULL,
  BUNDLE: ("pull", "netbsd", "11.0", "--platform", "x86-64"),
}


@pytest.fixture(scope="module")
def large_bundle(tmp_path_factory):
  """A bundle that does not come in one piece."""
  folder = tmp_path_factory.mktemp("bundle")
  (folder / "disk.img").write_bytes(os.urandom(600000))
  pack = f"tar -C {folder} -S --format=oldgnu -cf - disk.img | zstd -q1"
  return subprocess.run(pack, shell=True, check=True, stdout=subprocess.PIPE).stdout


def enlarge(server, name, tar):
  """Serve a tar with so much behind its end that it does not come in one piece; returns it."""
  tar += bytes(600000)
  server.replace_asset("resources", "v2.0.0", name, tar)
  return tar


def with_bundle(server, content):
  """NetBSD as of today: a bundle and nothing else."""
  server.repos["netbsd-builder"] = {}
  server.add_release("netbsd-builder", "v1.0.0", {BUNDLE: content})


@pytest.mark.parametrize("words", [(), ("--all",)])
@pytest.mark.parametrize("name", COMING)
def test_clean_leaves_what_is_being_downloaded(
  qvm, server, tools_tar, large_bundle, name, words
):  # fmt: skip
  if name == BUNDLE:
    with_bundle(server, large_bundle)
  enlarge(server, "qemu-system-x86_64-linux.tar", stand_in_tar(big=bytes(600000)))
  enlarge(server, "resources-linux.tar", tools_tar)
  fault = server.fault(name, pause=threading.Event(), pause_at=300000)
  pull = qvm.start(*COMING[name], env={"QVM_TIMEOUT": "30"})
  assert fault.reached.wait(DEADLINE), pull.communicate()
  place = name.replace(".tar.zst", ".qcow2")  # a bundle comes where its image is made
  part = qvm.cache / "downloads" / place / "part"
  patience = time.monotonic() + DEADLINE
  while not part.exists() or not part.stat().st_size:
    assert time.monotonic() < patience, pull.communicate()
    time.sleep(0.01)
  try:
    works(qvm("clean", "--dry-run", *words))
    paths, _ = cleaned(qvm("clean", *words))
    assert not [path for path in paths if place in path], paths
  finally:
    fault.pause.set()
    errors = pull.communicate()[1]
  assert pull.returncode == 0, errors
  assert len(server.requests(name, "cdn")) == 1


def until_waiting(process, other=lambda: False):
  """Return when the other thing happens, or when the process waits for a lock or has ended."""
  patience = time.monotonic() + DEADLINE
  while not other() and process.poll() is None:
    with open("/proc/locks") as file:
      if any("->" in line and str(process.pid) in line.split() for line in file):
        return
    assert time.monotonic() < patience
    time.sleep(0.01)


def test_download_that_starts_while_clean_deletes(pulled, server, tmp_path, stepped):
  """What clean has found unused may be taken up again before it is deleted."""
  name, words = "freebsd-15.0-x86-64.qcow2", ("freebsd", "15.0", "--platform", "x86-64")
  half(pulled, server, name, "pull", *words)
  for end in ("reached", "go"):
    os.mkfifo(tmp_path / end)
  cleaner = stepped(pulled, "os.rmdir downloads/", 1, f"{tmp_path}/", "clean")
  os.close(written(tmp_path / "reached", cleaner))
  fault = server.fault(name, pause=threading.Event(), pause_at=1)
  pull = pulled.start("pull", *words, env={"QVM_TIMEOUT": "30"})
  until_waiting(pull, fault.reached.is_set)
  (tmp_path / "go").read_bytes()
  output = cleaner.communicate()
  fault.pause.set()
  errors = pull.communicate()[1]
  assert (cleaner.returncode, pull.returncode) == (0, 0), (output, errors)
  assert f"base/{name}" in pulled.files()


def test_clean_orphans(pulled, background):
  works(pulled(*RUN))
  alive, _ = background(pulled, *RUN, "--rm")
  (mine,) = {path.stem for path in (pulled.cache / "instances").glob("*-rm-*.qcow2")}
  half_dead, record = background(pulled, *RUN, "--rm", "--name", "half-dead")
  half_dead.kill()
  half_dead.wait()
  kill_both(*background(pulled, *RUN, "--rm", "--name", "dead"))
  paths = clean(pulled)
  assert {"instances/dead.qcow2", "instances/dead.json"} <= set(paths)
  assert not [path for path in paths if not path.startswith("instances/dead.")]
  left = sorted(path.stem for path in (pulled.cache / "instances").glob("*.qcow2"))
  assert left == sorted([FREEBSD, mine, "half-dead"]), "the QEMU of half-dead runs"
  assert alive.poll() is None
  os.kill(record["pid"], signal.SIGKILL)
  half_dead.communicate()
  assert "instances/half-dead.qcow2" in clean(pulled)
  works(pulled(*RUN))


def test_kill_9_of_clean_leaves_no_instance_of_an_orphan(used, kill_at):
  for name in ("qcow2", "ephemeral"):  # of a --rm run that was killed
    (used.cache / f"instances/a.{name}").touch()
  kill_at(used, "os.remove instances/a.qcow2", "clean")
  works(used("list"))
  assert not [name for name in os.listdir(used.cache / "instances") if name.startswith("a.")]


def test_clean_takes_a_download_that_only_an_orphan_needs(pulled):
  disk = pulled.cache / "instances" / "dead.qcow2"
  backing = f"nbd+unix:///{FREEBSD}?socket=/nowhere/nbd"
  options = ["-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing]
  subprocess.run(["qemu-img", "create", *options, disk, "1M"], check=True)
  record = {"name": "dead", "os": "freebsd", "version": "15.1", "arch": "x86-64"}
  disk.with_suffix(".json").write_text(json.dumps(record))
  part = pulled.cache / "downloads" / f"{FREEBSD}.qcow2"
  part.mkdir()
  assert clean(pulled) == []
  disk.with_suffix(".ephemeral").touch()
  clean(pulled)
  assert not part.exists() and not disk.exists()
  assert clean(pulled) == []


def test_clean_takes_what_there_is_beside_a_disk_that_is_gone(pulled):
  """But for a second disk, and a record that is another's."""
  works(pulled(*RUN, "--name", "vm", "--disk", "64M"))
  beside = ["vm.console.log", "vm.known_hosts", "vm.sync-0123456789abcdef"]
  for name in beside:
    (pulled.cache / "instances" / name).write_text("x")
  (pulled.cache / "instances/other.json").write_text("{}")
  before = instance_names(pulled)
  assert clean(pulled) == [] and instance_names(pulled) == before
  (pulled.cache / "instances/vm.qcow2").unlink()
  assert sorted(clean(pulled)) == sorted(f"instances/{name}" for name in [*beside, "vm.json"])
  assert instance_names(pulled) == ["other.json", "vm.data"]


def test_clean_of_a_cache_that_is_a_link(pulled, tmp_path):
  """What the cache has is known by either path."""
  link = tmp_path / "link"
  link.symlink_to(pulled.cache)
  (pulled.cache / "base/old-1.0-x86-64.json").write_text("{}")
  paths, _ = cleaned(pulled("clean", env={"QVM_CACHE_DIR": str(link)}))
  assert paths == ["base/old-1.0-x86-64.json"]


def test_clean_never_takes_an_instance(pulled):
  """Whatever its name looks like."""
  names = ["a.lock", "b.tmp", "c.json", "d.qcow2", "e.ephemeral", "f.part", "g.qcow2.tmp",
           "h.console.log", "i.new"]  # fmt: skip
  for name in names:
    works(pulled(*RUN, "--name", name))
  before = state(pulled.cache / "instances")
  works(pulled("clean"))
  works(pulled("clean", "--all"))
  assert state(pulled.cache / "instances") == before
  for name in names:
    works(pulled(*RUN, "--name", name))


def test_clean_old_qemu_trees(pulled, server, image, tools_tar):
  for tag in ("v3", "v4"):
    newer(server, image, tools_tar, tag)
    works(pulled(*REFRESH))
  trees = [path for path in (pulled.cache / "qemu").iterdir() if not path.is_symlink()]
  assert len(trees) == 2, "the one in use and the one before"
  paths = clean(pulled)
  assert len(paths) == 1 and paths[0].startswith("qemu/")
  assert (pulled.cache / FIRMWARE).read_bytes() == b"v4"
  works(pulled(*RUN, env={"QVM_RELEASES_URL": DEAD}))


def test_clean_temporary_folders(pulled):
  before, download = pulled.files(), f"downloads/{FREEBSD}.qcow2"
  for name in ("qemu/x86_64.tmp/bin", "bin/resources.tmp", f"{download}/unpacked"):
    (pulled.cache / name).mkdir(parents=True)
    (pulled.cache / name / "file").write_bytes(b"x")
  (pulled.cache / "base" / f"{FREEBSD}.json.tmp").write_bytes(b"x")
  (pulled.cache / "base" / f"{FREEBSD}.kernel").write_bytes(b"of an older qvm")
  (pulled.cache / "qemu" / "x86_64.new").symlink_to(".x86_64-gone")
  (pulled.cache / "instances" / "gone.qcow2.tmp").write_bytes(b"x")
  assert sorted(clean(pulled)) == [
    f"base/{FREEBSD}.json.tmp", f"base/{FREEBSD}.kernel", "bin/resources.tmp", download,
    "instances/gone.qcow2.tmp", "qemu/x86_64.new", "qemu/x86_64.tmp",
  ]  # fmt: skip
  assert pulled.files() == before


OLDER = [f"{FREEBSD}.qcow2.{end}" for end in ("part", "json", "map", "lock", "json.tmp")]
OLDER += [f"{BUNDLE}.part", f"{BUNDLE}.json", "qemu-system-x86_64-linux.tar.part"]


def older_downloads(qvm):
  """What an older qvm has left: flat files, and the folder where it has unpacked a bundle."""
  folder = qvm.cache / "downloads"
  for name in OLDER:
    (folder / name).write_bytes(b"older")
  (folder / f"{FREEBSD}.qcow2.tmp").mkdir()
  (folder / f"{FREEBSD}.qcow2.tmp" / "disk.img").write_bytes(b"older")
  return folder


def test_what_an_older_qvm_left_is_dropped(pulled):
  """The next run or pull does it, and says so once; nothing else in the folder is touched."""
  folder = older_downloads(pulled)
  (folder / "holiday.jpg").write_text("mine")
  runs = [works(pulled(*RUN, env={"QVM_RELEASES_URL": DEAD})) for _ in range(2)]
  assert [run.stderr.count("unfinished downloads of an older qvm") for run in runs] == [1, 0]
  assert os.listdir(folder) == ["holiday.jpg"]


def test_clean_drops_what_an_older_qvm_left(pulled):
  folder = older_downloads(pulled)
  assert len(clean(pulled)) == len(OLDER) + 1
  assert os.listdir(folder) == []


@pytest.mark.parametrize("held", ["its lock", "all downloads"])
def test_an_older_qvm_that_still_downloads_is_left_alone(pulled, held):
  folder = older_downloads(pulled)
  fd = os.open(folder / OLDER[3] if held == "its lock" else folder, os.O_RDONLY)
  fcntl.flock(fd, fcntl.LOCK_SH)
  works(pulled(*RUN, env={"QVM_RELEASES_URL": DEAD}))
  left = set(os.listdir(folder))
  os.close(fd)
  mine = {*(name for name in OLDER if name.startswith(FREEBSD)), f"{FREEBSD}.qcow2.tmp"}
  assert left == (mine if held == "its lock" else {*OLDER, f"{FREEBSD}.qcow2.tmp"})
  works(pulled(*RUN, env={"QVM_RELEASES_URL": DEAD}))
  assert os.listdir(folder) == []


def test_clean_all(pulled):
  """Images that no instance needs, and QEMU; an instance keeps its image and its disk."""
  works(pulled(*RUN))
  works(pulled("pull", "--platform", "x86-64", "freebsd", "15.0"))
  paths = clean(pulled, "--all")
  assert {"base/freebsd-15.0-x86-64.qcow2", "base/freebsd-15.0-x86-64.json"} <= set(paths)
  assert "bin/qemu-img" in paths and "qemu/x86_64" in paths
  instance = [f"instances/{FREEBSD}.{end}" for end in ("json", "qcow2")]
  assert pulled.files() == [NOTE, BASE, *instance]
  works(pulled(*RUN))
  works(pulled("rm", FREEBSD))
  clean(pulled, "--all")
  assert pulled.files() == []


def test_clean_all_knows_an_image_by_its_absolute_path(pulled):
  """As qemu-img rebase leaves it; an image of one's own has such a path, too."""
  works(pulled(*RUN))
  disk = pulled.cache / "instances" / f"{FREEBSD}.qcow2"
  command = ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", str(pulled.cache / BASE), str(disk)]
  subprocess.run(command, check=True)
  clean(pulled, "--all")
  assert {NOTE, BASE} <= set(pulled.files())


def test_clean_all_after_a_refresh(pulled, server, image, tools_tar):
  """The QEMU before the one in use is a leftover and unneeded, but goes once."""
  newer(server, image, tools_tar)
  works(pulled(*REFRESH))
  paths = clean(pulled, "--all")
  assert len(set(paths)) == len(paths)
  assert pulled.files() == []


def test_clean_all_while_something_runs(pulled, background):
  works(pulled("pull", "--platform", "x86-64", "freebsd", "15.0"))
  process, record = background(pulled, *RUN, "--rm")
  paths = clean(pulled, "--all")
  assert sorted(paths) == ["base/freebsd-15.0-x86-64.json", "base/freebsd-15.0-x86-64.qcow2"]
  kill_both(process, record)
  clean(pulled, "--all")
  assert pulled.files() == [], "an orphan needs no image"


def test_clean_all_takes_a_half_published_image(qvm, kill_at):
  kill_at(qvm, "os.rename .*base/.*qcow2$", *PULL)
  clean(qvm, "--all")
  assert qvm.files() == []


@pytest.mark.parametrize("path", [BASE, "bin/qemu-img"])
def test_clean_leaves_a_record_that_waits_for_its_place(pulled, server, image, kill_at, path):
  tool = (pulled.cache / "bin/qemu-img").read_bytes() + b"# newer\n"
  newer(server, image, tar_of({"qemu-img": tool}))
  note = NOTE if path == BASE else "bin/qemu-img.json"
  kill_at(pulled, f"os.rename {note}.new {note}", *REFRESH)
  clean(pulled)
  works(pulled(*PULL, env={"QVM_RELEASES_URL": DEAD, "QVM_API_URL": DEAD}))
  assert json.loads((pulled.cache / note).read_text())["release"] == "v2.17.0"


def test_clean_beside_an_instance_of_a_newer_qvm(pulled):
  record = pulled.cache / "instances/vm.json"
  record.write_text('{"format": 2}')
  works(pulled("clean"))
  assert record.exists()


@pytest.mark.parametrize("words", [(), ("--all",)])
def test_clean_leaves_what_is_not_qvms(pulled, words):
  """The folder may be one that holds other things too: QVM_CACHE_DIR=~ has ~/bin and more."""
  mine = ["bin/backup", "bin/notes.txt", "base/photo.jpg", "downloads/holiday.jpg",
          "downloads/thesis.pdf", "qemu/machine.xml", "instances/readme",
          "mine/x.part"]  # fmt: skip
  for name in mine:
    (pulled.cache / name).parent.mkdir(exist_ok=True)
    (pulled.cache / name).write_text("mine")
  works(pulled("clean", *words))
  assert [name for name in mine if not (pulled.cache / name).exists()] == []


# --- Mirrors ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled_mirror(tmp_path_factory, image, tools_tar, large_bundle):
  """A mirror, which names no server, that three `pull --mirror` have filled; not to be changed."""
  home = tmp_path_factory.mktemp("filled_mirror")
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    with_bundle(server, large_bundle)
    qvm = Qvm(home, ROOT / "qvm.py", server)
    for words in (PULL, ("pull", "freebsd", "15.0", "--platform", "x86-64"), COMING[BUNDLE]):
      works(qvm(*words, "--mirror", str(home / "mirror")))
    assert not qvm.cache.exists(), "a mirror is no cache"
  return home / "mirror"


@pytest.fixture
def mirror(tmp_path, filled_mirror):
  """A copy of the mirror, in a folder with an awkward name."""
  return shutil.copytree(filled_mirror, tmp_path / "a mirror, 100% ü#1")


@pytest.fixture
def plain_server():
  """Start `python3 -m http.server` in a folder; returns its address."""
  started = []

  def start(folder):
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    process = subprocess.Popen(
      [*command, "--directory", str(folder)],
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    started.append(process)
    return re.search(r"\((http://[^)]*?)/?\)", process.stdout.readline()).group(1)

  yield start
  for process in started:
    process.terminate()
    process.communicate()


class Ranges(http.server.SimpleHTTPRequestHandler):
  """As nginx does: ranges of files, and a real redirect for releases/latest."""

  def do_GET(self):
    path = Path(self.translate_path(self.path))
    self.server.log.append((self.path, self.headers.get("Range"), dict(self.headers)))
    if self.path.endswith("/releases/latest"):
      self.send_response(302)
      self.send_header("Location", f"{self.path[:-7]}/tag/{path.read_text().strip()}")
      self.send_header("Content-Length", "0")
      return self.end_headers()
    if not path.is_file():
      return self.send_error(404)
    content = path.read_bytes()
    modified = self.date_time_string(int(path.stat().st_mtime))
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    whole = not match or self.headers.get("If-Range", modified) != modified
    start = 0 if whole else int(match.group(1))
    self.send_response(200 if whole else 206)
    if not whole:
      self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    self.send_header("Last-Modified", modified)
    self.send_header("Content-Length", str(len(content) - start))
    self.end_headers()
    if self.server.pause and path.name.endswith(self.server.pause):
      self.wfile.write(content[start : start + 300000])
      self.wfile.flush()
      return self.server.reached.set() or self.server.go.wait(DEADLINE)
    self.wfile.write(content[start:])

  def log_message(self, *words):
    pass


@pytest.fixture
def ranges_server():
  """Start a server with Ranges in a folder; returns it, with its address as url."""
  started = []

  def start(folder, pause=""):
    handler = functools.partial(Ranges, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url, server.log, server.pause = f"http://127.0.0.1:{server.server_port}", [], pause
    server.reached, server.go = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    started.append(server)
    return server

  yield start
  for server in started:
    server.go.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(tmp_path):
  """qvm in another home, that knows no server yet; an https address would be an error."""
  home = tmp_path / "client"
  home.mkdir()
  client = Qvm(home, ROOT / "qvm.py")
  del client.env["QVM_API_URL"]
  client.env["https_proxy"] = "http://127.0.0.1:9"
  return client


KINDS = ("file", "plain", "plain/", "ranges")  # plain/: with a slash at the end


@pytest.fixture
def connect(client, mirror, plain_server, ranges_server):
  """Point the client at the mirror in one of four ways."""

  def connect(kind):
    if kind == "file":
      url = "file://" + quote(str(mirror))
    else:
      url = ranges_server(mirror).url if kind == "ranges" else plain_server(mirror)
    client.env["QVM_RELEASES_URL"] = url + ("/" if kind.endswith("/") else "")
    return client

  return connect


@pytest.mark.parametrize("kind", KINDS)
def test_mirror(connect, mirror, server, image, kind):
  client = connect(kind)
  server.clear_log()
  run = works(client("run", "freebsd", "--platform", "x86-64"))
  assert (client.cache / BASE).read_bytes() == image
  assert "no digest" not in run.stderr
  run = works(client(*COMING[BUNDLE], "--verify"))
  assert run.stdout.count(": ok, matches v") == 3
  assert table(works(client("search", "freebsd")).stdout)[1:] == [
    ["freebsd", "15.1", "v0.16.0 (cached)", "-"],
    ["freebsd", "15.0", "v0.16.0", "-"],
  ]
  fails(client("pull", "freebsd", "9.9", "--platform", "x86-64"), "9.9", "15.1, 15.0")
  fails(client("pull", "openbsd", "--platform", "x86-64"))
  assert works(client(*REFRESH)).stderr.count("newest") == 3
  assert server.started == 0


@pytest.mark.parametrize("kind", ["file", "plain"])
def test_mirror_that_is_damaged(connect, mirror, kind):
  """The digests that the mirror got hold for who gets it from the mirror."""
  client = connect(kind)
  (target,) = mirror.rglob(f"{FREEBSD}.qcow2")
  content = bytearray(target.read_bytes())
  content[200000] ^= 1
  target.write_bytes(content)
  fails(client(*PULL), FREEBSD, "sha256")
  assert not (client.cache / BASE).exists()


@pytest.mark.parametrize("kind", ["file", "plain", "ranges"])
def test_mirror_made_by_hand(connect, mirror, image, kind):
  """Assets and a file `latest` are enough; what only the lists tell is then not known."""
  for repo in mirror.iterdir():
    (repo / "releases.atom").unlink()
    shutil.rmtree(repo / "releases" / "expanded_assets")
    latest = repo / "releases" / "latest"
    latest.write_text(latest.read_text().strip() + ("\r\n" if kind == "plain" else ""))
  client = connect(kind)
  run = works(client(*PULL))
  assert (client.cache / BASE).read_bytes() == image
  assert sum("no digest" in line for line in run.stderr.splitlines()) == 3
  works(client(*COMING[BUNDLE]))
  fails(client("pull", "freebsd", "9.9", "--platform", "x86-64"), "FreeBSD 9.9")
  fails(client("pull", "freebsd", "--platform", "x86-64"), "FreeBSD")
  works(client("run", "freebsd", "15.1", "--platform", "x86-64"))


def test_mirror_that_resumes(client, mirror, ranges_server, image):
  server = ranges_server(mirror, f"{FREEBSD}.qcow2")
  client.env["QVM_RELEASES_URL"] = server.url
  process = client.start(*PULL)
  assert server.reached.wait(DEADLINE), process.communicate()
  part = client.cache / "downloads" / f"{FREEBSD}.qcow2" / "part"
  patience = time.monotonic() + DEADLINE
  while not part.exists() or not part.stat().st_size:
    assert time.monotonic() < patience, process.communicate()
    time.sleep(0.01)
  process.kill()
  process.communicate()
  server.pause = ""
  server.log.clear()
  size = (part.parent / "map").read_bytes().count(1) * qvm_source.BLOCK_BYTES
  works(client(*PULL))
  asked = [(span, path) for path, span, _ in server.log if path.endswith(f"{FREEBSD}.qcow2")]
  assert [span for span, _ in asked] == [f"bytes={size}-" if size else None]
  assert (client.cache / BASE).read_bytes() == image


def test_no_token_for_a_mirror(client, mirror, ranges_server):
  server = ranges_server(mirror)
  client.env.update(QVM_RELEASES_URL=server.url, GITHUB_TOKEN="s3same", GH_TOKEN="s3same")
  works(client("pull", "freebsd", "--platform", "x86-64"))
  works(client("search", "freebsd"))
  assert server.log
  assert "s3same" not in json.dumps(server.log)


def test_layout_of_a_mirror(mirror):
  files = sorted(str(path.relative_to(mirror)) for path in mirror.rglob("*") if path.is_file())
  for repo, tag, names in (
    ("resources", "v2.0.0", ["qemu-system-x86_64-linux.tar", "resources-linux.tar"]),
    ("freebsd-builder", "v0.16.0", ["freebsd-15.0-x86-64.qcow2", f"{FREEBSD}.qcow2"]),
    ("netbsd-builder", "v1.0.0", [BUNDLE]),
  ):
    top = f"{repo}/releases"
    assets = [name for name in files if name.startswith(f"{top}/download/")]
    assert assets == [f"{top}/download/{tag}/{name}" for name in names]
    assert (mirror / top / "latest").read_text() == tag + "\n"
  assert not [name for name in files if name.endswith(("part", ".tmp", ".json"))]
  assert all(path.stat().st_mode & 0o444 == 0o444 for path in mirror.rglob("*"))


def test_mirror_again(qvm, server, mirror, image, client):
  """A second time nothing is fetched; a newer release comes beside the old one."""
  before = state(mirror)
  server.clear_log()
  run = works(qvm(*PULL, "--mirror", str(mirror)))
  assert not server.requests(origin="cdn") and state(mirror) == before
  (target,) = mirror.rglob(f"{FREEBSD}.qcow2")
  assert str(target) in run.stdout.splitlines()
  content = newer(server, image)
  works(qvm(*PULL, "--mirror", str(mirror)))
  client.env["QVM_RELEASES_URL"] = "file://" + quote(str(mirror))
  works(client(*PULL))
  assert (client.cache / BASE).read_bytes() == content
  works(client("pull", "freebsd", "15.0", "--platform", "x86-64"))
  assert target.read_bytes() == image


def test_mirror_of_an_older_release(qvm, server, image, tmp_path, client):
  """Where the newest release has not the version, the mirror has that which has it."""
  server.add_release(
    "freebsd-builder", "v1", {"freebsd-16.0-x86-64.qcow2": image}, published="2026-10-01T00:00:00Z"
  )
  works(qvm(*PULL, "--mirror", str(tmp_path / "mirror")))
  client.env["QVM_RELEASES_URL"] = f"file://{tmp_path}/mirror"
  for words in (PULL, ("pull", "freebsd", "--platform", "x86-64")):
    run = works(client(*words))
    assert "no digest" not in run.stderr
  assert bool([name for name in client.files() if name == BASE])


def test_mirror_of_a_release_that_was_asked_for(qvm, server, image, tools_tar, tmp_path, client):
  """Its newest is the newest that it has."""
  newer(server, image, tools_tar)
  only = ("--release", "v0.16.0", "--qemu-release", "v2.0.0")
  works(qvm(*PULL, *only, "--mirror", str(tmp_path / "mirror")))
  client.env["QVM_RELEASES_URL"] = f"file://{tmp_path}/mirror"
  works(client(*PULL))
  assert (client.cache / BASE).read_bytes() == image


def test_mirror_of_a_mirror(client, mirror, tmp_path):
  client.env["QVM_RELEASES_URL"] = "file://" + quote(str(mirror))
  works(client(*PULL, "--mirror", str(tmp_path / "second")))
  shutil.rmtree(mirror)
  client.env["QVM_RELEASES_URL"] = f"file://{tmp_path}/second"
  run = works(client(*PULL))
  assert "no digest" not in run.stderr


def test_mirror_gets_nothing_wrong(qvm, server, tmp_path):
  server.fault(FREEBSD, flip=200000, times=None)
  run = qvm(*PULL, "--mirror", str(tmp_path / "m"))
  assert run.returncode == 1 and FREEBSD in run.stderr.splitlines()[-2], run.stderr
  assert not list((tmp_path / "m").rglob("*.qcow2*"))


def test_killed_mirror_goes_on(qvm, server, tmp_path, image):
  fault = server.fault(FREEBSD, pause=threading.Event(), pause_at=300000)
  process = qvm.start(*PULL, "--mirror", str(tmp_path / "m"))
  assert fault.reached.wait(DEADLINE), process.communicate()
  process.kill()
  process.communicate()
  server.clear_faults()
  assert not list((tmp_path / "m").rglob(f"{FREEBSD}.qcow2"))
  works(qvm(*PULL, "--mirror", str(tmp_path / "m")))
  (target,) = (tmp_path / "m").rglob(f"{FREEBSD}.qcow2")
  assert target.read_bytes() == image
  assert not list((tmp_path / "m").rglob("*.download"))


def test_two_fill_a_mirror(qvm, server, tmp_path, tools_tar):
  """Both want QEMU and qemu-img; they do not write into each other's files."""
  words = ("--platform", "x86-64", "--mirror", str(tmp_path / "m"))
  tools_tar = enlarge(server, "resources-linux.tar", tools_tar)
  fault = server.fault("resources-linux.tar", pause=threading.Event(), pause_at=300000)
  first = qvm.start("pull", "freebsd", "15.1", *words, env={"QVM_TIMEOUT": "30"})
  assert fault.reached.wait(DEADLINE), first.communicate()
  second = qvm.start("pull", "freebsd", "15.0", *words)
  until_waiting(second)
  fault.pause.set()
  outputs = [process.communicate() for process in (first, second)]
  assert (first.returncode, second.returncode) == (0, 0), outputs
  (target,) = (tmp_path / "m").rglob("resources-linux.tar")
  assert target.read_bytes() == tools_tar
  names = {path.name for path in (tmp_path / "m").rglob("*.qcow2")}
  assert names == {"freebsd-15.0-x86-64.qcow2", f"{FREEBSD}.qcow2"}


def test_mirror_that_is_no_folder(qvm, server, tmp_path):
  (tmp_path / "file").write_text("mine")
  fails(qvm(*PULL, "--mirror", str(tmp_path / "file")), str(tmp_path / "file"), code=2)
  assert (tmp_path / "file").read_text() == "mine"


BAD_URLS = ["ftp://x.example/releases", "http://a b/c", "http://", "https:///x", "x.example",
            "/srv", "file:relative", "file://host/x", "http://x\ny", "javascript:1",
            "http://x/ä"]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_bad_address(offline, url):
  for name in ("QVM_RELEASES_URL", "QVM_API_URL"):
    with pytest.raises(qvm_source.UsageError, match=name):
      qvm_source.net_from({name: url})
  fails(offline(*PULL, env={"QVM_RELEASES_URL": url}), "QVM_RELEASES_URL", code=2)
  assert not offline.cache.exists()


def test_unknown_file_mirror(client, tmp_path):
  client.env["QVM_RELEASES_URL"] = f"file://{tmp_path}/nowhere"
  fails(client(*PULL), f"{tmp_path}/nowhere")


@pytest.mark.parametrize(
  "given, releases, api",
  [
    ({}, qvm_source.RELEASES_URL, qvm_source.API_URL),
    ({"QVM_RELEASES_URL": ""}, qvm_source.RELEASES_URL, qvm_source.API_URL),
    (
      {"QVM_RELEASES_URL": qvm_source.RELEASES_URL + "/"},
      qvm_source.RELEASES_URL,
      qvm_source.API_URL,
    ),
    ({"QVM_RELEASES_URL": "http://x/y/"}, "http://x/y", ""),
    ({"QVM_RELEASES_URL": "http://x//"}, "http://x", ""),
    ({"QVM_RELEASES_URL": "file:///srv/m/"}, "file:///srv/m", ""),
    ({"QVM_RELEASES_URL": "http://x", "QVM_API_URL": "http://y/z/"}, "http://x", "http://y/z"),
  ],
)
def test_addresses(given, releases, api):
  net = qvm_source.net_from(given)
  assert (net.releases, net.api) == (releases, api)


# --- Beside runs that end --------------------------------------------------------------------


def test_list_while_a_run_ends(offline, monkeypatch):
  """Between the names and the sizes a --rm run may delete its files."""
  qvm_source.make_folders(qvm_source.Cache(str(offline.cache)))
  folder = offline.cache / "instances"
  for name in ("ends", "stays"):
    (folder / f"{name}.qcow2").write_bytes(b"disk")
  size = qvm_source.tree_size

  def ends(path):
    if path.endswith("ends.qcow2"):
      os.unlink(path)
    return size(path)

  monkeypatch.setattr(qvm_source, "tree_size", ends)
  assert [row.name for row in qvm_source.list_instances(qvm_source.Cache(str(offline.cache)))] == [
    "stays"
  ]


def test_clean_while_a_run_ends(offline, monkeypatch, capfd):
  qvm_source.make_folders(qvm_source.Cache(str(offline.cache)))
  folder = offline.cache / "instances"
  for name in ("ends.lock", "stays.lock"):
    (folder / name).write_bytes(b"")
  size = qvm_source.tree_size

  def ends(path):
    if path.endswith("ends.lock"):
      os.unlink(path)
    return size(path)

  monkeypatch.setattr(qvm_source, "tree_size", ends)
  qvm_source.clean(qvm_source.Cache(str(offline.cache)), qvm_source.Options(command="clean"))
  out = capfd.readouterr().out
  assert "stays.lock" in out and "ends.lock" not in out
  assert not list(folder.glob("*.lock"))


def test_clean_all_leaves_what_no_release_has(full, image):
  own = full.cache / "base/mine.qcow2"
  own.write_bytes(image)
  works(full("clean", "--all"))
  assert own.exists()
