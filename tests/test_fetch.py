"""`qvm pull` and `run` against a release server that breaks in every way; the cache after it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from release_server import ReleaseServer
from support import (
  BASE,
  DEAD,
  DEADLINE,
  FREEBSD,
  IMAGE,
  PULL,
  QEMU,
  SHORT_TIMEOUT,
  TOOLS,
  check_failed,
  fails,
  fill,
  finished,
  free_port,
  lines_until,
  obey_modes,
  wait_for,
)
from support_network import (
  certificate,
  changed_meanwhile,
  check_works,
  hangs,
  kept,
  ranges,
  unfinished,
)
from support_pythons import every_python

import qvm as qvm_source

ALL = (IMAGE, QEMU, TOOLS)
RUN = ("run", "--platform", "x86-64", "--rm", "freebsd", "15.1")
LATEST = "freebsd-builder/releases/latest"
LAST = -1  # as the place of a cut: all but the last byte


# --- Helpers ---------------------------------------------------------------------------------


def check_outcome(qvm, result, image, expected):
  """A clear error without any file; expected None = it must work."""
  if expected is None:
    check_works(qvm, result, image)
  else:
    check_failed(result, expected)
    assert not [path for path in qvm.files() if path.startswith(("base/", "instances/"))]


def altered(content):
  """Another image of the same length, with a sound header."""
  return content[:512] + content[:511:-1]


@pytest.fixture(scope="module")
def big(image):
  """An image of 3 MiB of which no two parts are the same."""
  return image + random.Random(1).randbytes((3 << 20) - len(image))


@pytest.fixture
def big_server(server, big):
  """The release server with the big image."""
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, big)
  return server


# --- When all is well ------------------------------------------------------------------------


def for_files(server):
  """The requests for tags and files, without those that only tell digests."""
  return [r for r in server.log if r.origin != "api" and "/expanded_assets/" not in r.path]


@pytest.mark.parametrize("words", [PULL, RUN], ids=["pull", "run"])
def test_each_file_is_asked_for_once_and_told_of_twice(qvm, server, image, words):
  result = qvm(*words, env={"GITHUB_TOKEN": "s3cret", "GH_TOKEN": "s3cret"})
  check_works(qvm, result, image)
  # Two newest releases; three assets, each by way of its signed address; no page of a tag.
  assert len(server.requests("/releases/latest", "github")) == 2
  assert [len(server.requests(name, "cdn")) for name in ALL] == [1, 1, 1]
  assert len(for_files(server)) == 8
  assert not [each for each in for_files(server) if "authorization" in each.headers]
  lines = [line for line in result.stderr.splitlines() if "port 2847 is taken" not in line]
  for name in ALL:
    about = [line for line in lines if f" {name}" in line]
    assert len(about) == 2, result.stderr
    assert re.match(rf"qvm: downloading {name} \([0-9.]+ [kM]?B\) from http://\S+\Z", about[0])
    done = rf"qvm: downloaded {name}: [0-9.]+ [kM]?B in [0-9.]+ s \([0-9.]+ [kMG]?B/s\)\Z"
    assert re.match(done, about[1])
  assert f"({round(len(image) / 1000)} kB)" in next(line for line in lines if IMAGE in line)
  assert len(lines) == 7, result.stderr
  assert "\r" not in result.stderr and "\033" not in result.stderr


def test_base_file_and_its_record(qvm, server, image):
  assert qvm(*PULL).returncode == 0
  record = json.loads((qvm.cache / "base" / f"{FREEBSD}.json").read_text())
  assert (record["release"], record["size"]) == ("v0.16.0", len(image))
  assert record["sha256"] == hashlib.sha256(image).hexdigest()
  assert record["url"] == f"{server.url}/freebsd-builder/releases/download/v0.16.0/{IMAGE}"
  assert re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z", record["time"])


@pytest.mark.parametrize("name", [IMAGE, FREEBSD + ".json"])
def test_base_files_are_read_only(full, name):
  assert (full.cache / "base" / name).stat().st_mode & 0o777 == 0o444


def test_cache_is_private(full, filled):
  assert (filled / ".cache" / "qvm").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("words", [PULL, RUN], ids=["pull", "run"])
def test_found_means_no_request(full, server, words):
  assert full(*words).returncode == 0
  assert server.started == 0
  server.close()
  proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
  result = full(*words, env={"QVM_RELEASES_URL": DEAD, **proxies})
  assert result.returncode == 0, result.stderr


PATHS = {
  IMAGE: f"base/{IMAGE}",
  TOOLS: "bin/qemu-img",
  QEMU: "qemu/x86_64/bin/qemu-system-x86_64",
}


@pytest.mark.parametrize("asset", ALL)
def test_only_what_is_missing_is_fetched(full, server, asset):
  before = full.files()
  (full.cache / PATHS[asset]).unlink()
  assert full(*PULL).returncode == 0
  assert [len(server.requests(name, "cdn")) for name in ALL] == [name == asset for name in ALL]
  assert len(for_files(server)) == 3
  assert full.files() == before


def test_the_three_files_come_at_the_same_time(qvm, server, image):
  go = threading.Event()
  faults = [server.fault(name, pause=go, pause_at=100) for name in ALL]
  process = qvm.start(*PULL)
  hangs(process, *faults)  # all three hang together: none waits for another one's end
  go.set()
  check_works(qvm, finished(process), image)


@pytest.mark.parametrize("many", [2, 6, 20])
def test_many_at_once_fetch_each_file_once(qvm, server, image, many):
  go = threading.Event()
  server.fault(IMAGE, pause=go, pause_at=100)
  every = [qvm.start(*(RUN if number % 2 else PULL)) for number in range(many)]
  before = ["".join(lines_until(process.stderr, IMAGE)) for process in every]
  assert sum("waiting for another qvm" in text for text in before) >= many - 1
  go.set()
  results = [finished(process) for process in every]
  for result in results:
    check_works(qvm, result, image)
  assert [len(server.requests(name, "cdn")) for name in ALL] == [1, 1, 1]
  assert [path for path in qvm.files() if path.startswith("instances/")] == []


def test_the_next_one_takes_over_when_the_first_is_killed(no_image, big_server, big):
  fault = big_server.fault(IMAGE, pause=threading.Event(), pause_at=2 << 20)
  first = no_image.start(*PULL)
  hangs(first, fault)
  second = no_image.start(*PULL)
  lines_until(second.stderr, f"another qvm that downloads {IMAGE}")
  first.kill()
  finished(first)
  result = finished(second)
  check_works(no_image, result, big)
  assert f"downloading {IMAGE} (going on at" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_waiting_one_can_be_ended(qvm, server, image, number):
  go = threading.Event()
  fault = server.fault(IMAGE, pause=go, pause_at=100)
  first = qvm.start(*PULL)
  hangs(first, fault)
  second = qvm.start(*RUN)
  before = lines_until(second.stderr, f"another qvm that downloads {IMAGE}")
  second.send_signal(number)
  result = finished(second, "".join(before))
  assert result.returncode == 128 + number
  assert all(line.startswith("qvm: ") for line in result.stderr.splitlines())
  go.set()
  check_works(qvm, finished(first), image)


AFTER_A_REBOOT = "qvm.boot_id = lambda: 'another'"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_that_was_ended_is_resumed_after_a_reboot(no_image, server, image, number):
  """Its connection hangs, so nothing but the end itself puts away what there is."""
  fault = server.fault(IMAGE, times=1, pause=threading.Event(), pause_at=200_000)
  process = no_image.start(*PULL)
  hangs(process, fault)
  wait_for(lambda: has_a_block(no_image))
  process.send_signal(number)
  assert finished(process).returncode == 128 + number
  check_goes_on_after_a_reboot(no_image, image)


# The thread that downloads is late: it has left its work, and not put away what there is.
LATE = """
import threading
end, close, late = qvm.Progress.close, qvm.PartFile.close, threading.Event()
def end_late(self):
  threading.current_thread().ends = True
  qvm.say("ending")
  late.wait()
  end(self)
def close_late(self, **more):
  if qvm.signals.caught and not hasattr(threading.current_thread(), "ends"):
    late.set()
    threading.Event().wait()
  close(self, **more)
qvm.Progress.close, qvm.PartFile.close = end_late, close_late
"""


def test_one_that_was_ended_while_data_came_is_resumed_after_a_reboot(no_image, big_server, big):
  go = threading.Event()
  fault = big_server.fault(IMAGE, times=1, pause=go, pause_at=200_000)
  process = no_image.start(*PULL, code=LATE)
  hangs(process, fault)
  wait_for(lambda: has_a_block(no_image))
  process.send_signal(signal.SIGTERM)
  before = lines_until(process.stderr, "ending")
  go.set()
  assert finished(process, "".join(before)).returncode == 128 + signal.SIGTERM
  check_goes_on_after_a_reboot(no_image, big)


def has_a_block(qvm):
  """Whether a block of the image has come."""
  return any(1 in path.read_bytes() for path in (qvm.cache / "downloads").glob(f"{IMAGE}/map"))


def check_goes_on_after_a_reboot(qvm, image):
  again = qvm(*PULL, code=AFTER_A_REBOOT)
  check_works(qvm, again, image)
  assert f"downloading {IMAGE} (going on at" in again.stderr


def test_one_that_was_killed_just_before_its_end(no_image, image, kill_at):
  """Nobody but root could go on with it: it was read-only already."""
  kill_at(no_image, f"os.rename .*/part {BASE}$", *PULL)
  check_works(no_image, no_image(*PULL, preexec_fn=obey_modes), image)


def test_what_was_installed_before_a_kill_is_not_left_over(no_image, server, image):
  """Another qvm waits for the lock of one that has installed QEMU, and not removed the archive."""
  program = no_image.cache / "bin" / "qemu-img"
  folder = no_image.cache / "downloads" / TOOLS
  folder.mkdir()
  lock = os.open(str(folder), os.O_RDONLY)
  fcntl.flock(lock, fcntl.LOCK_EX)
  there = program.read_bytes()
  program.unlink()
  process = no_image.start(*PULL)
  before = lines_until(process.stderr, f"another qvm that downloads {TOOLS}")
  (folder / "part").write_bytes(b"the archive")
  program.write_bytes(there)
  program.chmod(0o755)
  os.close(lock)
  check_works(no_image, finished(process, "".join(before)), image)
  assert server.requests(TOOLS) == []


def test_a_record_that_another_qvm_has_put_in_place(tmp_path, monkeypatch):
  """Who looks at an image between its own rename and its record's ends the publishing."""
  cache = qvm_source.Cache(str(tmp_path))
  qvm_source.make_folders(cache)
  source, target = tmp_path / "part", cache.base("freebsd-15.1-x86-64")
  source.write_bytes(b"image")
  move_into_place, seen = qvm_source.move_into_place, []

  def moved(*words):
    move_into_place(*words)
    seen.append(qvm_source.record_of(target))

  monkeypatch.setattr(qvm_source, "move_into_place", moved)
  record = qvm_source.AssetRecord(release="v1")
  qvm_source.publish_with_record(cache, str(source), target, record, 0o444)
  assert seen == [qvm_source.record_of(target)] and seen[0].release == "v1"
  assert sorted(os.listdir(cache.path("base"))) == [
    "freebsd-15.1-x86-64.json", "freebsd-15.1-x86-64.qcow2",
  ]  # fmt: skip


def test_a_copy_that_does_not_fit_leaves_nothing_beside_its_target(tmp_path, monkeypatch):
  """Where a folder of the cache is a link to another, full disk."""

  def another_disk(source, target):
    raise OSError(errno.EXDEV, "another disk")

  def full(source, target):
    Path(target).write_bytes(b"some")
    raise OSError(errno.ENOSPC, "full")

  monkeypatch.setattr(qvm_source.os, "replace", another_disk)
  monkeypatch.setattr(qvm_source, "copy_sparse", full)
  (tmp_path / "part").write_bytes(b"something")
  with pytest.raises(OSError, match="full"):
    qvm_source.move_into_place(str(tmp_path / "part"), str(tmp_path / "base"), 0o444)
  assert os.listdir(tmp_path) == ["part"]


def test_two_cpus_at_once(qvm, server, image):
  go = threading.Event()
  faults = [server.fault(f"qemu-system-{cpu}", pause=go) for cpu in ("x86_64", "aarch64")]
  every = [qvm.start("pull", "--platform", cpu, "freebsd", "15.1") for cpu in ("x86-64", "arm64")]
  for process, fault in zip(every, faults):
    hangs(process, fault)
  go.set()
  assert [process.wait(DEADLINE) for process in every] == [0, 0]
  assert len(server.requests(TOOLS, "cdn")) == 1
  trees = [name for name in os.listdir(str(qvm.cache / "qemu")) if name[0] != "."]
  assert sorted(trees) == ["aarch64", "x86_64"]
  assert os.listdir(str(qvm.cache / "downloads")) == []


MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def test_streamed_to_disk(no_image, server, image, tmp_path):
  size = 300_000_000
  (tmp_path / "big").write_bytes(image)
  os.truncate(str(tmp_path / "big"), size)
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, tmp_path / "big")
  server.fault(IMAGE, cut=200_000_000)
  result = subprocess.run(
    [sys.executable, "-c", MEASURE, *no_image.command(*PULL)],
    env=no_image.env,
    stdout=subprocess.PIPE,
    timeout=DEADLINE,
  )
  assert result.returncode == 0
  peak = int(result.stdout) * (1 if sys.platform == "darwin" else 1024)
  assert peak < 100_000_000
  base = no_image.cache / "base" / IMAGE
  assert base.stat().st_size == size
  record = json.loads((no_image.cache / "base" / f"{FREEBSD}.json").read_text())
  digest = hashlib.sha256()
  with (tmp_path / "big").open("rb") as file:
    for chunk in iter(lambda: file.read(1 << 20), b""):
      digest.update(chunk)
  assert record["sha256"] == digest.hexdigest()
  base.unlink()


# --- Faults of the host that serves the assets -------------------------------------------------

# What goes wrong, one request after the other, and the error; None: the same run still works.
FAULTS = {
  "cut before the first byte": ([{"cut": 0}], None),
  "cut after the first byte": ([{"cut": 1}], None),
  "cut in the middle": ([{"cut": 100_000}], None),
  "cut before the last byte": ([{"cut": LAST}], None),
  "cut again and again": ([{"cut": 1}, {"cut": 0}, {"cut": 1000}, {"cut": 70_000}], None),
  "cut in the headers": ([{"cut": "headers"}], None),
  "cut at connect": ([{"cut": "connect"}], None),
  "cut at connect of the resume": ([{"cut": 1000}, {"cut": "connect"}], None),
  "reset at connect": ([{"cut": "connect", "reset": True}], None),
  "reset in the headers": ([{"cut": "headers", "reset": True}], None),
  "reset in the body": ([{"cut": 100_000, "reset": True}], None),
  "stall before the headers": ([{"stall": "headers"}], None),
  "stall before the body": ([{"stall": 0}], None),
  "stall in the body": ([{"stall": 100_000}], None),
  "stall before the last byte": ([{"stall": LAST}], None),
  "408": ([{"status": 408}], None),
  "429": ([{"status": 429}], None),
  "500": ([{"status": 500}], None),
  "502": ([{"status": 502}], None),
  "503": ([{"status": 503}], None),
  "504": ([{"status": 504}], None),
  "four errors": ([{"status": 500}, {"cut": 0}, {"status": 503}, {"cut": "connect"}], None),
  "503 for the resume": ([{"cut": 1000}, {"status": 503}], None),
  "403 from the signed address": ([{"status": 403}], None),
  "403 for the resume": ([{"cut": 1000}, {"status": 403}], None),
  "400": ([{"status": 400}], "400"),
  "404": ([{"status": 404}], None),
  "404 each time": (
    [{"status": 404, "times": None}],
    "a release names FreeBSD 15.1 for x86-64, but the server has it not",
  ),
  "too long a Content-Length": ([{"content_length": lambda size: size + 1}], None),
  "far too long a Content-Length": ([{"content_length": 10**15}], None),
  "too short a Content-Length": ([{"content_length": lambda size: size - 100_000}], None),
  "no Content-Length": ([{"no_length": True}], None),
  "no Content-Length, and cut": ([{"no_length": True, "cut": 100_000}], None),
  "empty": ([{"body": b""}], "qcow2|empty"),
  "a tiny qcow2": ([{"body": b"QFI\xfb"}], None),
  "text": ([{"body": "Moved. Bye."}], "not a qcow2"),
  "an object that lacks its end": ([{"truncate": 100_000}], None),
  "chunked": ([{"chunked": True}], None),
  "chunked, and cut": ([{"chunked": True, "cut": 100_000}], None),
  "chunked, and cut before the end": ([{"chunked": True, "cut": LAST}], None),
  "gzip": ([{"gzip": True}], "gzip"),
  "HTML": ([{"html": True}], "HTML page"),
  "HTML for the resume": ([{"cut": 100_000}, {"html": True}], "HTML page"),
  "another ETag in the resume": ([{"cut": 1000, "etag": '"other"'}], None),
  "no validator": ([{"cut": 1000, "no_validator": True}], None),
  "weak ETag": ([{"cut": 1000, "weak_etag": True}, {"weak_etag": True}], None),
  "no ranges": ([{"cut": 1000, "no_ranges": True}, {"no_ranges": True}], None),
  "Range ignored": ([{"cut": 1000}, {"ignore_range": True}], None),
  "If-Range ignored": ([{"cut": 1000}, {"ignore_if_range": True, "etag": '"other"'}], None),
  "416 at once": ([{"status": 416}], None),
  "416 for the resume": ([{"cut": 1000}, {"status": 416}], None),
  "no Content-Range": ([{"cut": 1000}, {"content_range": ""}], None),
  "garbage for a Content-Range": ([{"cut": 1000}, {"content_range": "bytes"}], None),
  "too early a Content-Range": ([{"cut": 1000}, {"content_range": "bytes 0-9/328192"}], None),
  "too late a Content-Range": ([{"cut": 1000}, {"content_range": "bytes 1001-9/328192"}], None),
  "another length in the Content-Range": (
    [{"cut": 1000}, {"content_range": "bytes 1000-2000/2001"}],
    None,
  ),
  "no length in the Content-Range": ([{"cut": 1000}, {"content_range": "bytes 1000-9/*"}], None),
  "a Content-Range of many digits": (
    [{"cut": 1000}, {"content_range": f"bytes 1000-9/{'9' * 5000}"}],
    None,
  ),
  "206 unasked": ([{"status": 206, "headers": {"Content-Range": "bytes 5-9/10"}}], None),
  "Retry-After of 0": ([{"status": 503, "headers": {"Retry-After": "0"}}], None),
  "Retry-After in the past": (
    [{"status": 503, "headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}}],
    None,
  ),
  "garbage for a Retry-After": ([{"status": 429, "headers": {"Retry-After": "soon"}}], None),
  "Content-Encoding: identity": ([{"headers": {"Content-Encoding": "identity"}}], None),
}


@pytest.mark.parametrize("faults, expected", FAULTS.values(), ids=list(FAULTS))
def test_fault(no_image, server, image, faults, expected):
  for fault in faults:
    places = {key: len(image) - 1 for key in ("cut", "stall") if fault.get(key) == LAST}
    server.fault(IMAGE, **{**fault, **places})
  stalls = any("stall" in fault for fault in faults)
  result = no_image(*RUN, env=SHORT_TIMEOUT if stalls else {})
  check_outcome(no_image, result, image, expected)
  if result.returncode:
    server.clear_faults()
    check_works(no_image, no_image(*PULL), image)


ASSET = (IMAGE, "cdn")
ADDRESS = (f"releases/download/v0.16.0/{IMAGE}", "github")
TAG = (LATEST, "github")
ANYWHERE = ({"cut": "connect"}, {"cut": "headers"}, {"stall": "headers"}, {"status": 503})
FOREVER = [(place, fault) for place in (ASSET, ADDRESS, TAG) for fault in ANYWHERE]
FOREVER += [(ASSET, {"status": status}) for status in (403, 429, 500)]
FOREVER += [(ASSET, fault) for fault in ({"cut": 1000}, {"cut": 0}, {"stall": 0})]
FOREVER += [(ASSET, {"cut": "connect", "reset": True})]


@pytest.mark.parametrize("place, fault", FOREVER, ids=str)
def test_five_attempts(no_image, server, image, place, fault):
  server.fault(place[0], origin=place[1], times=None, **fault)
  result = no_image(*PULL, env=SHORT_TIMEOUT if "stall" in fault else {})
  check_outcome(no_image, result, image, r"http://(127\.0\.0\.1|localhost):.*\(5 attempts\)\n")
  assert server.wait_idle()
  seen = len(server.requests(*place))  # on a busy machine the way there may take too long, too
  assert seen == 5 or ("stall" in fault and 0 < seen < 5)
  again = [line for line in result.stderr.splitlines() if "trying again in" in line]
  name = place[0].rpartition("/")[2]  # else may be slow, too
  assert len([line for line in again if name in line]) == 4, again


@pytest.mark.parametrize(
  "status, times, match",
  [
    (404, 1, LATEST),
    (403, 1, LATEST),
    (403, 1, f"download/v0.16.0/{IMAGE}"),
    (401, 1, LATEST),
    (451, 1, f"download/v0.16.0/{IMAGE}"),
  ],
)
def test_no_second_attempt(no_image, server, image, status, times, match):
  server.fault(match, origin="github", times=None, status=status)
  result = no_image(*PULL)
  check_outcome(no_image, result, image, match)
  assert server.wait_idle()
  assert len(server.requests(match, "github")) == 1
  assert "trying again" not in result.stderr


def test_an_image_that_the_release_has_not(no_image, server):
  result = no_image("run", "--platform", "x86-64", "freebsd", "9.9")
  check_failed(result, "there is no FreeBSD 9.9 for x86-64\n.*15.1, 15.0, 14.4")
  assert len(server.requests("9.9", "github")) == 2, "the qcow2 and the bundle, each once"
  assert "trying again" not in result.stderr
  assert no_image.files() == [
    path for path in no_image.files() if path.startswith(("bin/", "qemu/"))
  ]


def test_each_attempt_gets_a_new_signed_address(no_image, server, image):
  server.signed_uses = 1
  for place in (1000, 2000, 0):
    server.fault(IMAGE, cut=place)
  check_works(no_image, no_image(*PULL), image)
  assert ranges(server) == [None, "bytes=1000-", "bytes=3000-", "bytes=3000-"]
  assert len({each.query for each in server.requests(IMAGE, "cdn")}) == 4


def test_a_failure_ends_what_else_is_under_way(qvm, server):
  hanging = [server.fault(name, pause=threading.Event(), pause_at=100) for name in (IMAGE, QEMU)]
  go = threading.Event()
  server.fault(TOOLS, pause=go, status=404)
  process = qvm.start(*PULL, env={"QVM_TIMEOUT": "3600"})
  hangs(process, *hanging)
  go.set()
  check_failed(finished(process), TOOLS)
  assert qvm.files() == [path for path in qvm.files() if path.startswith("downloads/")]


# --- Pauses ----------------------------------------------------------------------------------


class Clock:
  """An event that never comes, and writes down how long it was waited for."""

  def __init__(self):
    self.pauses = []

  def wait(self, seconds):
    self.pauses.append(seconds)
    return False

  def is_set(self):
    return False


def pauses(waits, headway=0):
  """The pauses after attempts that all fail, each asking for one of the waits."""
  clock, done, left = Clock(), [0], list(waits)

  def attempt():
    done[0] += headway
    if not left:
      return True
    raise qvm_source.Transient("broken", left.pop(0))

  net = qvm_source.Net("http://x", "", "", 1.0, 1.0, qvm_source.ATTEMPTS, clock)
  with contextlib.suppress(qvm_source.QvmError):
    assert qvm_source.with_retries(net, "http://x/y", attempt, lambda: done[0])
  return clock.pauses


def test_pauses_grow_and_are_jittered():
  several = [pauses([None] * 9) for _ in range(20)]
  assert all(len(each) == 4 and sorted(each) == each for each in several)
  for place, pause in enumerate((1, 2, 4, 8)):
    values = {each[place] for each in several}
    assert len(values) > 10
    assert all(pause / 2 <= value <= pause * 1.5 for value in values)


def test_pauses_are_as_long_as_the_server_says():
  assert pauses([0.0, 7.0, 60.0]) == [0.0, 7.0, 60.0]


def test_headway_gives_new_attempts():
  assert len(pauses([None] * 30, headway=qvm_source.PROGRESS_BYTES)) == 30
  assert len(pauses([None] * 30, headway=100)) == 4


@pytest.mark.parametrize(
  "text, seconds",
  [
    ("0", 0),
    ("7", 7),
    (" 7 ", 7),
    ("60", 60),
    ("61", 60),
    ("999999999", 60),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ("Wed, 21 Oct 2115 07:28:00 GMT", 60),
    ("", None),
    ("-1", None),
    ("1.5", None),
    ("soon", None),
    ("Wed, 99 Oct 2015 07:28:00 GMT", None),
  ],
)
def test_retry_after(text, seconds):
  assert qvm_source.retry_after(text) == seconds


@given(st.text(st.characters(max_codepoint=255)))
@settings(deadline=None, database=None)
def test_any_retry_after(text):
  assert qvm_source.retry_after(text) is None or 0 <= qvm_source.retry_after(text) <= 60


def test_retry_after_is_obeyed(no_image, server, image):
  for status in (429, 503):
    server.fault(IMAGE, status=status, headers={"Retry-After": "0"})
    server.fault(LATEST, origin="github", status=status, headers={"Retry-After": "0"})
  result = no_image(*PULL, env={"QVM_RETRY_DELAY": "3600"})  # which would outlast this test
  check_works(no_image, result, image)
  assert result.stderr.count("trying again in 0.0 s") == 4


def test_retry_after_is_at_most_a_minute(no_image, server):
  server.fault(IMAGE, status=503, headers={"Retry-After": "86400"})
  process = no_image.start(*PULL)
  lines = lines_until(process.stderr, "trying again")
  process.terminate()
  assert process.wait(DEADLINE) == 128 + signal.SIGTERM
  assert "trying again in 60.0 s" in lines[-1]


# --- Resuming --------------------------------------------------------------------------------


def test_resume_within_a_run(qvm, server, image):
  for name in ALL:
    server.fault(name, cut=5000)
  result = qvm(*PULL)
  check_works(qvm, result, image)
  for name in ALL:
    assert ranges(server, name) == [None, "bytes=5000-"]
    first, second = server.requests(name, "cdn")
    assert second.headers["if-range"].startswith('"0x8DE')
    assert result.stderr.count(f"downloading {name}") == 1
    assert result.stderr.count(f"downloaded {name}") == 1
  record = json.loads((qvm.cache / "base" / f"{FREEBSD}.json").read_text())
  assert record["sha256"] == hashlib.sha256(image).hexdigest()


def test_a_login_page_in_the_middle_costs_nothing_of_what_has_come(no_image, big_server, big):
  there = broken_off(no_image, big_server, signal.SIGKILL)
  big_server.fault(IMAGE, html=True)
  fails(no_image(*PULL), "HTML page")
  assert kept(no_image) == there
  check_works(no_image, no_image(*PULL), big)
  assert ranges(big_server) == [f"bytes={there}-"] * 2


NO_LENGTH = ({"cut": "headers"}, {"ignore_range": True, "no_length": True})


@pytest.mark.parametrize("fault", NO_LENGTH, ids=str)
def test_an_answer_of_unknown_length_costs_nothing_of_what_has_come(
  no_image, big_server, big, fault
):
  """As when the connection ends in the headers."""
  there = broken_off(no_image, big_server, signal.SIGKILL)
  big_server.fault(IMAGE, **fault)
  check_works(no_image, no_image(*PULL), big)
  assert ranges(big_server) == [f"bytes={there}-"] * 2


def test_nothing_is_kept_that_cannot_be_resumed(no_image, server, image):
  """A part of unknown length would only take space: the next run starts anew."""
  server.fault(IMAGE, times=None, chunked=True, cut=200_000)
  check_failed(no_image(*PULL), "5 attempts")
  assert not unfinished(no_image)[0].exists()
  server.clear_faults()
  check_works(no_image, no_image(*PULL), image)


def test_what_came_before_a_stall_is_kept(no_image, server, image):
  server.fault(IMAGE, stall=100_000)
  server.fault(IMAGE, status=503)
  check_works(no_image, no_image(*PULL, env=SHORT_TIMEOUT), image)
  first, second, third = sorted(ranges(server), key=bool)  # a stalled one is noted when it ends
  assert first is None and second and second == third


def test_a_bad_line_gets_there_step_by_step(no_image, server, image):
  server.fault(IMAGE, times=None, cut=30_000)
  results = [no_image(*PULL) for _ in range(3)]
  assert [result.returncode for result in results] == [1, 1, 0]
  check_failed(results[0], r"connection ended after 150 kB of 328 kB \(5 attempts\)")
  check_works(no_image, results[2], image)
  first, second = [
    2 * qvm_source.BLOCK_BYTES,
    4 * qvm_source.BLOCK_BYTES,
  ]  # what 150 and 281 kB make
  starts = [0, 30_000, 60_000, 90_000, 120_000, *range(first, first + 150_000, 30_000)]
  starts += [second, second + 30_000, second + 60_000]
  assert ranges(server)[1:] == [f"bytes={start}-" for start in starts[1:]]


def test_headway_makes_more_than_five_attempts(no_image, server, big):
  large = big * 5
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, large)
  server.fault(IMAGE, times=9, cut=1_200_000)
  check_works(no_image, no_image(*PULL), large)
  assert len(ranges(server)) == 10


def test_changed_between_two_attempts(no_image, server, image):
  other = altered(image)
  result = changed_meanwhile(no_image, server, other, 1000)
  check_works(no_image, result, other)
  assert ranges(server)[:2] == [None, "bytes=1000-"]
  assert f"{IMAGE} has changed" in result.stderr


# How a host that does not know If-Range answers for another object of the same size.
CARELESS = {
  "with its ETag": {},
  "with a weak ETag": {"weak_etag": True},
  "without any validator": {"no_validator": True},
}


@pytest.mark.parametrize("more", CARELESS.values(), ids=list(CARELESS))
def test_changed_and_if_range_ignored(no_image, server, image, more):
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, altered(image))
  go = threading.Event()
  fault = server.fault(IMAGE, pause=go, pause_at=1000, cut=1000)
  server.fault(IMAGE, ignore_if_range=True, **more)
  process = no_image.start(*PULL)
  hangs(process, fault)
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, image)
  go.set()
  check_works(no_image, finished(process), image)


def broken_off(qvm, server, number):
  """End qvm with a signal in the middle of the image; returns the bytes that it leaves."""
  fault = server.fault(IMAGE, pause=threading.Event(), pause_at=1_000_000)
  process = qvm.start(*RUN)
  hangs(process, fault)
  blocks = unfinished(qvm)[1]  # what has been written counts once it is marked there
  wait_for(lambda: blocks.exists() and kept(qvm) > 600_000)
  process.send_signal(number)
  result = finished(process)
  killed = number == signal.SIGKILL
  assert (result.returncode, result.stdout) == (-number if killed else 128 + number, "")
  assert all(line.startswith("qvm: ") for line in result.stderr.splitlines()), result.stderr
  assert "a bug in qvm" not in result.stderr
  assert killed or not [path for path in qvm.files() if path.startswith("instances/")]
  assert not (qvm.cache / "base" / IMAGE).exists()
  assert server.wait_idle()
  server.clear_faults()
  server.clear_log()
  return kept(qvm)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_resume_in_the_next_run(no_image, big_server, big, number):
  there = broken_off(no_image, big_server, number)
  assert 500_000 < there <= 1_000_000
  result = no_image(*PULL)
  check_works(no_image, result, big)
  assert not [path for path in no_image.files() if path.startswith("instances/")]
  assert ranges(big_server) == [f"bytes={there}-"]
  assert big_server.requests(IMAGE, "cdn")[0].sent == len(big) - there
  assert re.search(rf"downloading {IMAGE} \(going on at [0-9.]+ [kM]B of 3\.1 MB\)", result.stderr)
  record = json.loads((no_image.cache / "base" / f"{FREEBSD}.json").read_text())
  assert record["sha256"] == hashlib.sha256(big).hexdigest()


def test_no_resume_of_another_object(no_image, big_server, big):
  there = broken_off(no_image, big_server, signal.SIGKILL)
  other = altered(big)
  big_server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, other)
  result = no_image(*PULL)
  check_works(no_image, result, other)
  assert ranges(big_server) == [f"bytes={there}-"]
  assert "has changed" in result.stderr


def test_no_resume_of_another_release(no_image, big_server, big, image):
  broken_off(no_image, big_server, signal.SIGKILL)
  big_server.add_release("freebsd-builder", "v0.17.0", {IMAGE: image})
  check_works(no_image, no_image(*PULL), image)
  assert ranges(big_server) == [None]


# What else may have happened to the two files of an unfinished download.
DAMAGE = {
  "no note": (b"", None),
  "note is garbage": (b"\xff\0{", None),
  "note is no object": (b"[1, 2]", None),
  "note is empty": (b"{}", None),
  "note of another kind": (b'{"url": 1, "validator": [], "total": "x"}', None),
  "note with a wrong length": (b'{"total": 600000}', "update"),
  "note with no length": (b'{"total": null}', "update"),
  "note with a negative length": (b'{"total": -5}', "update"),
  "note with no validator": (b'{"validator": ""}', "update"),
  "note is deep": (b"[" * 100_000, None),
}


@pytest.mark.parametrize("content, how", DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_note(no_image, big_server, big, content, how):
  broken_off(no_image, big_server, signal.SIGKILL)
  note = unfinished(no_image)[2]
  if how:
    content = json.dumps({**json.loads(note.read_text()), **json.loads(content)}).encode()
  note.write_bytes(content)
  check_works(no_image, no_image(*PULL), big)


@pytest.mark.parametrize("size", [0, 1, 1_000_000, LAST, 3 << 20, (3 << 20) + 1, 9 << 20])
def test_part_of_any_length(no_image, big_server, big, size):
  """It goes on from what the map marks, if the part can hold that."""
  there = broken_off(no_image, big_server, signal.SIGKILL)
  size = len(big) - 1 if size == LAST else size
  unfinished(no_image)[0].write_bytes((big + big + big)[:size])
  result = no_image(*PULL)
  check_works(no_image, result, big)
  assert ranges(big_server) == [f"bytes={there}-" if there <= size <= len(big) else None]
  assert result.stderr.count(f"downloaded {IMAGE}") == 1


def test_all_of_it_is_there(no_image, big_server, big):
  broken_off(no_image, big_server, signal.SIGKILL)
  part, marks, _ = unfinished(no_image)
  part.write_bytes(big)
  marks.write_bytes(b"\1" * len(marks.read_bytes()))
  check_works(no_image, no_image(*PULL), big)
  assert big_server.requests(IMAGE) == []


def test_disk_full(no_image, server, image):
  limit = len(image) // 2
  result = no_image(
    *PULL, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
  )
  check_failed(result, f"{IMAGE}.*too large")
  assert not (no_image.cache / "base" / IMAGE).exists()
  server.clear_log()
  there = kept(no_image)
  assert limit - 5 * qvm_source.BLOCK_BYTES < there <= limit
  check_works(no_image, no_image(*PULL), image)
  assert ranges(server) == [f"bytes={there}-" if there else None]


# --- What a release is called ----------------------------------------------------------------

# A redirect of releases/latest, {} being the address above the repositories, and what comes of it.
REDIRECTS = {
  "to itself": ("{}/freebsd-builder/releases/latest", 302, "loop"),
  "to the list, as without any release": (
    "{}/freebsd-builder/releases",
    302,
    "freebsd-builder/releases",
  ),
  "to a page": (
    "{}/freebsd-builder/releases/expanded_assets/v0.16.0",
    302,
    "releases/latest names no release",
  ),
  "with no tag": ("{}/freebsd-builder/releases/tag/", 302, "releases/latest names no"),
  "with a tag only in the query": (
    "{}/resources/releases?a=/releases/tag/v1",
    302,
    "releases/latest names no",
  ),
  "with a tag that climbs": ("{}/x/releases/tag/..%2F..%2Fv1", 302, "releases/latest names no"),
  "with a tag of two parts": ("{}/x/releases/tag/a/b", 302, "releases/latest names no"),
  "with control characters": ("{}/x/releases/tag/%1b[31mv1", 302, "releases/latest names no"),
  "to file": ("file:///etc/passwd", 302, "releases/latest"),
  "to ftp": ("ftp://127.0.0.1/x", 302, "releases/latest"),
  "to a bad address": ("http://[::1/x", 302, "releases/latest"),
  "to a bad port": ("http://127.0.0.1:x/", 302, "releases/latest"),
  "to nowhere": ("", 302, "releases/latest"),
  "302": ("{}/freebsd-builder/releases/tag/v0.16.0", 302, None),
  "301": ("{}/freebsd-builder/releases/tag/v0.16.0", 301, None),
  "303": ("{}/freebsd-builder/releases/tag/v0.16.0", 303, None),
  "307": ("{}/freebsd-builder/releases/tag/v0.16.0", 307, None),
  "308": ("{}/freebsd-builder/releases/tag/v0.16.0", 308, None),
  "relative": ("/cross-platform-actions/freebsd-builder/releases/tag/v0.16.0", 302, None),
  "encoded": ("{}/freebsd-builder/releases/tag/v0%2E16%2E0", 302, None),
  "with more behind it": ("{}/freebsd-builder/releases/tag/v0.16.0?from=x#top", 302, None),
  "another owner's": ("http://127.0.0.1:9/x/freebsd/releases/tag/v0.16.0", 302, None),
  "moved": ("{}/renamed/releases/latest", 301, None),
  "moved, 308": ("{}/renamed/releases/latest", 308, None),
}


@pytest.mark.parametrize("location, status, expected", REDIRECTS.values(), ids=list(REDIRECTS))
def test_redirect_of_latest(no_image, server, image, location, status, expected):
  server.add_release("renamed", "v0.16.0", {})
  location = location.format(server.url)
  server.fault(LATEST, origin="github", times=None, status=status, redirect=location)
  result = no_image(*PULL)
  check_outcome(no_image, result, image, expected)
  assert server.paths("/releases/tag/") == []  # read, not followed


def test_redirects_in_a_circle(no_image, server, image):
  addresses = [f"{server.url}/circle{number}" for number in (1, 2, 3)]
  server.fault(LATEST, origin="github", times=None, redirect=addresses[0])
  for number, address in enumerate(addresses):
    fault = {"origin": "github", "times": None, "redirect": addresses[number - 2]}
    server.fault(address.rpartition("/")[2], **fault)
  check_outcome(no_image, no_image(*PULL), image, "loop")
  assert server.started < 40


def test_the_asset_is_in_a_redirect_loop(no_image, server, image):
  address = f"/freebsd-builder/releases/download/v0.16.0/{IMAGE}"
  server.fault(address, origin="github", times=None, redirect=server.url + address)
  check_outcome(no_image, no_image(*PULL), image, "loop")


@pytest.mark.parametrize("tag", ["v1", "1.0", "v0.16.0-rc1+5", "2026_08_13", "v" * 100])
def test_tags_of_many_kinds(no_image, server, image, tag):
  server.add_release("freebsd-builder", tag, {IMAGE: image}, published="2026-12-01T00:00:00Z")
  check_works(no_image, no_image(*PULL), image)
  assert json.loads((no_image.cache / "base" / f"{FREEBSD}.json").read_text())["release"] == tag


def test_prereleases_and_drafts_are_skipped(no_image, server, image):
  for tag, kind in (("v9-rc", {"prerelease": True}), ("v9", {"draft": True})):
    date = "2026-12-01T00:00:00Z"
    server.add_release("freebsd-builder", tag, {IMAGE: b"x"}, published=date, **kind)
  check_works(no_image, no_image(*PULL), image)


@pytest.mark.parametrize("way", ["page", "redirect"])
def test_a_login_page_everywhere(no_image, server, way):
  """The page of a captive portal answers everything: this is no matter of releases."""
  if way == "redirect":
    server.fault("/login", origin=None, times=None, html=True)
    server.fault("", origin=None, times=None, redirect=server.github_url + "/login?back=x")
  server.fault("", origin=None, times=None, html=True)
  result = no_image(*PULL)
  check_failed(result, "HTML page")
  assert not [path for path in no_image.files() if path.startswith(("base/", "downloads/"))]


def test_html_is_refused_at_its_first_bytes(no_image, server, image):
  server.fault(IMAGE, body=b"\n<!DOCTYPE html>" + bytes(60_000_000))
  check_outcome(no_image, no_image(*PULL), image, f"{IMAGE} is an HTML page")
  assert server.wait_idle()
  assert server.requests(IMAGE, "cdn")[0].sent < 30_000_000


@pytest.mark.parametrize("name", ALL)
def test_html_instead_of_a_file(full, server, image, name):
  (full.cache / PATHS[name]).unlink()
  server.fault(name, html=True)
  result = full(*PULL)
  check_failed(result, f"{name} is an HTML page instead of the file\n.*login page")
  check_works(full, full(*PULL), image)


# --- https -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trust(tmp_path_factory):
  return certificate(tmp_path_factory.mktemp("tls"), "DNS:localhost,IP:127.0.0.1")


@pytest.fixture
def secure(no_image, trust, image, tools_tar):
  """A release server with https; no_image asks it and trusts it."""
  with ReleaseServer(trust[0]) as server:
    fill(server, image, tools_tar)
    no_image.env.update(QVM_RELEASES_URL=server.url, QVM_API_URL=server.api_url)
    no_image.env.update(SSL_CERT_FILE=trust[1])
    yield server


def test_https(no_image, secure, image):
  secure.fault(IMAGE, cut=100_000)
  secure.fault(IMAGE, cut="connect", reset=True)
  check_works(no_image, no_image(*PULL), image)
  assert ranges(secure)[-1] == "bytes=100000-"


def test_stall_with_https(no_image, secure, image):
  secure.fault(IMAGE, stall=100_000)
  check_works(no_image, no_image(*PULL, env=SHORT_TIMEOUT), image)


@pytest.mark.parametrize("path", ["/etc/hostname", "/nonexistent", ""])
def test_unknown_authority(no_image, secure, image, path):
  result = no_image(*PULL, env={"SSL_CERT_FILE": path})
  check_outcome(no_image, result, image, f"{LATEST}.*certificate(?s:.*)SSL_CERT_FILE")
  assert "trying again" not in result.stderr
  assert secure.log == []


def test_certificate_of_another_host(no_image, tmp_path, image):
  tls, cert = certificate(tmp_path, "DNS:example.org")
  with ReleaseServer(tls) as server:
    env = {"QVM_RELEASES_URL": server.url, "SSL_CERT_FILE": cert}
    result = no_image(*PULL, env=env)
  check_outcome(no_image, result, image, "127.0.0.1.*certificate")
  assert "trying again" not in result.stderr


def test_http_behind_https(no_image, server, image):
  """A server that does not speak TLS: an error that names the address."""
  url = server.url.replace("http:", "https:")
  check_outcome(
    no_image, no_image(*PULL, env={"QVM_RELEASES_URL": url}), image, f"{LATEST}.*5 attempts"
  )


@pytest.mark.parametrize(
  "match, target",
  [
    (LATEST, "/freebsd-builder/releases/latest"),
    (LATEST, "/freebsd-builder/releases/tag/v0.16.0"),
    (f"download/v0.16.0/{IMAGE}", f"/freebsd-builder/releases/download/v0.16.0/{IMAGE}"),
  ],
  ids=["latest", "tag", "asset"],
)
def test_never_from_https_to_http(no_image, secure, server, image, match, target):
  secure.fault(match, origin="github", times=None, redirect=server.url + target)
  result = no_image(*PULL)
  check_outcome(no_image, result, image, f"https://.*{match}.*http:")
  assert server.started == 0
  assert "trying again" not in result.stderr


def test_from_http_to_https(no_image, secure, server, image):
  path = f"/freebsd-builder/releases/download/v0.16.0/{IMAGE}"
  server.fault(path, origin="github", redirect=secure.url + path)
  check_works(no_image, no_image(*PULL, env={"QVM_RELEASES_URL": server.url}), image)
  assert server.requests(IMAGE, "cdn") == []


# --- Proxies ---------------------------------------------------------------------------------


LOGIN = "Basic dXNlcjpzM2NyZXQ="  # user:s3cret


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_dead_proxy(no_image, server, image, name):
  port = free_port()
  result = no_image(*PULL, env={name: f"http://127.0.0.1:{port}"})
  check_outcome(no_image, result, image, rf"(?is){LATEST}.*proxy.*127\.0\.0\.1:{port}.*{name}")
  assert server.started == 0


# Spellings of user `user` and a password that holds s3cret, before @host:port.
CREDENTIALS = [
  "http://user:s3cret",
  "user:s3cret",
  "http://us%40er:s3cret",
  "http://user:s3cret@s3cret",
  "http://user:x@s3cret",
  "http://user:x#s3cret",
  "http://user:x?s3cret",
  "http://user:s3cret#x",
  "http://user:s3cret?x",
  "http://user:s3cret/x",
  "http://user:x/s3cret",
  "http:/user:s3cret",
  "//user:s3cret",
  "http://s3cret",
]


@pytest.mark.parametrize("start", CREDENTIALS)
def test_credentials_of_a_dead_proxy_are_never_printed(no_image, secure, server, start):
  port = free_port()
  both = (("http", server.url), ("https", secure.url))
  for scheme, url in both if start in CREDENTIALS[:3] else both[:1]:
    env = {"QVM_RELEASES_URL": url, f"{scheme}_proxy": f"{start}@127.0.0.1:{port}"}
    result = no_image(*PULL, env=env)
    check_failed(result, "(?is)proxy")
    assert "s3c" not in result.stderr
  assert server.started == secure.started == 0


@every_python
@pytest.mark.parametrize("address", ["http://user:s3cret", "user:s3cret/", "http://user:s3cret/x@"])
def test_a_proxy_whose_host_is_missing_shows_no_password(no_image, python, address):
  """What stands for its port is the password; http.client quotes that."""
  env = {"QVM_RELEASES_URL": "http://127.0.0.1:9", "http_proxy": address}
  result = no_image(*PULL, env=env, python=python)
  fails(result, "proxy")
  assert "s3c" not in result.stderr


def test_credentials_in_the_address_are_never_printed(no_image, server):
  for url in (server.url, "http://127.0.0.1/nowhere"):
    url = url.replace("//", "//user:s3cret@")
    result = no_image(*PULL, env={"QVM_RELEASES_URL": url})
    fails(result, "QVM_RELEASES_URL", "is no http://HOST", code=2)
    assert "s3cret" not in result.stderr
    texts = [path.read_text() for path in no_image.cache.rglob("*.json")]
    assert not [text for text in texts if "s3cret" in text]


def test_working_proxy(no_image, server, proxy, image):
  server.fault(IMAGE, cut=1000)
  result = no_image(*PULL, env={"http_proxy": f"http://user:s3cret@127.0.0.1:{proxy.port}"})
  check_works(no_image, result, image)
  assert "s3cret" not in result.stderr
  assert len(proxy.seen) == server.started and len(for_files(server)) == 5
  assert {login for _, login in proxy.seen} == {LOGIN}
  assert not [each for each in server.log if "proxy-authorization" in each.headers]


def test_working_proxy_for_https(no_image, secure, proxy, image):
  result = no_image(*PULL, env={"https_proxy": f"http://user:s3cret@127.0.0.1:{proxy.port}"})
  check_works(no_image, result, image)
  assert len(proxy.seen) == secure.started and len(for_files(secure)) == 3
  assert {login for _, login in proxy.seen} == {LOGIN}
  assert not [each for each in secure.log if "proxy-authorization" in each.headers]


def test_no_proxy(no_image, server, image):
  env = {"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": "127.0.0.1,localhost"}
  check_works(no_image, no_image(*PULL, env=env), image)


@pytest.mark.parametrize("form", ["{0}:{1}", "127.0.0.0/8", "{0}"])
def test_a_proxy_that_is_not_used_is_not_blamed(no_image, server, form):
  server.fault("", origin=None, times=None, status=403)
  address = form.format("127.0.0.1", server.url.split("/")[2].rpartition(":")[2])
  proxy = f"http://127.0.0.1:{free_port()}"
  result = no_image(*PULL, env={"http_proxy": proxy, "no_proxy": address})
  fails(result, "403")
  assert "proxy" not in result.stderr


def test_credentials_of_a_proxy_stay_with_it(no_image, server, proxy, image):
  """The host of the assets is asked directly: it gets no password of the proxy."""
  env = {"http_proxy": f"http://user:s3cret@127.0.0.1:{proxy.port}", "no_proxy": "localhost"}
  check_works(no_image, no_image(*PULL, env=env), image)
  assert len([url for url, _ in proxy.seen if "/releases/tags/" not in url]) == 2
  assert not [each for each in server.log if "proxy-authorization" in each.headers]


@pytest.mark.parametrize("status", [403, 407, 502])
def test_proxy_that_refuses(no_image, secure, server, proxy, status):
  proxy.status = status
  for scheme, url in (("http", server.url), ("https", secure.url)):
    address = f"http://user:s3cret@127.0.0.1:{proxy.port}"
    result = no_image(*PULL, env={"QVM_RELEASES_URL": url, f"{scheme}_proxy": address})
    check_failed(result, rf"127\.0\.0\.1:{proxy.port}")
    assert str(status) in result.stderr and "s3cret" not in result.stderr


# --- No server at all ------------------------------------------------------------------------


def test_host_that_does_not_answer(no_image):
  """Its queue of connections is full, so that a new one is neither taken nor refused."""
  with contextlib.ExitStack() as stack:
    full = stack.enter_context(socket.socket())
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    for _ in range(4):
      other = stack.enter_context(socket.socket())
      other.setblocking(False)
      other.connect_ex(full.getsockname())
    url = f"http://127.0.0.1:{full.getsockname()[1]}/x"
    result = no_image(*PULL, env={"QVM_RELEASES_URL": url, "QVM_TIMEOUT": "0.2"})
  check_failed(result, f"{url}/{LATEST}.*in time.*5 attempts")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no namespaces of mounts")
def test_ipv6_that_hangs_where_ipv4_works(no_image, server, image, tmp_path):
  """A name with both addresses; connections to the first one are neither taken nor refused.

  No time-out has to pass before the other one gets its turn.
  """
  url = urllib.parse.urlsplit(server.url)
  (tmp_path / "hosts").write_text("::1 both.test\n127.0.0.1 both.test localhost\n")
  before = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-ec"]
  before += [f"mount --bind {shlex.quote(str(tmp_path / 'hosts'))} /etc/hosts", "sh"]
  if subprocess.run(before, capture_output=True).returncode:
    pytest.skip("no namespaces of mounts")
  before[-2] += '; exec "$@"'
  with contextlib.ExitStack() as stack:
    full = stack.enter_context(socket.socket(socket.AF_INET6))
    full.bind(("::1", url.port))
    full.listen(0)
    for _ in range(4):
      other = stack.enter_context(socket.socket(socket.AF_INET6))
      other.setblocking(False)
      other.connect_ex(full.getsockname())
    address = f"http://both.test:{url.port}"
    env = {**no_image.env, "QVM_RELEASES_URL": address + url.path, "QVM_TIMEOUT": "600"}
    command = [*before, *no_image.command(*PULL)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE)
  check_works(no_image, result, image)
  assert "trying again" not in result.stderr


NOWHERE = {
  "no route": (socket.AF_INET6, ("2001:db8::1", 9, 0, 0)),
  "no such family": (socket.AF_APPLETALK, ("127.0.0.1", 9)),
  "refused": (socket.AF_INET, ("127.0.0.2", 9)),
}


@pytest.mark.parametrize("kinds", [["no route"], ["no such family"], ["refused"], list(NOWHERE)])
@pytest.mark.parametrize("works", [True, False])
def test_addresses_that_fail_at_once(monkeypatch, kinds, works):
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    places = [NOWHERE[kind] for kind in kinds]
    places += [(socket.AF_INET, listener.getsockname())] * works
    found = [(family, socket.SOCK_STREAM, 0, "", place) for family, place in places]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    if works:
      with qvm_source.connect(("name", 9), 600) as link:
        assert link.getpeername() == listener.getsockname() and link.gettimeout() == 600
    else:
      with pytest.raises(OSError) as caught:
        qvm_source.connect(("name", 9), 600)
      assert caught.value.errno and not isinstance(caught.value, socket.timeout)


def test_families_take_turns_and_the_silent_come_last(monkeypatch):
  """An address that lets its time pass is tried last from then on."""
  tried = []

  class Link:
    """A connection that a silent address neither takes nor refuses."""

    def __init__(self, family, kind, protocol):
      self.timeout = None

    def __enter__(self):
      return self

    def __exit__(self, *error):
      pass

    def settimeout(self, seconds):
      self.timeout = seconds

    def connect(self, address):
      tried.append((address[0], self.timeout))
      if address[0] != "v4 b":
        raise socket.timeout("timed out")

  places = [(socket.AF_INET6, "v6 a"), (socket.AF_INET6, "v6 b"), (socket.AF_INET, "v4 a"),
            (socket.AF_INET, "v4 b")]  # fmt: skip
  found = [(family, socket.SOCK_STREAM, 0, "", (name, 9)) for family, name in places]
  monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
  monkeypatch.setattr(socket, "socket", Link)
  monkeypatch.setattr(qvm_source, "silent_addresses", set())
  assert qvm_source.connect(("name", 9), 30.0).timeout == 30.0
  short = qvm_source.FAMILY_SECONDS
  assert tried == [("v6 a", short), ("v4 a", short), ("v6 b", short), ("v4 b", 30.0)]
  assert qvm_source.connect(("name", 9), 30.0) and tried[4:] == [("v4 b", short)]


def test_host_that_speaks_something_else(no_image):
  """Such as an ssh server: an error that names the address, and says what is wrong."""
  with socket.socket() as other:
    other.bind(("127.0.0.1", 0))
    other.listen(9)

    def serve():
      with contextlib.suppress(OSError):
        while True:
          connection = other.accept()[0]
          connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\x1b[31m")
          connection.close()

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{other.getsockname()[1]}/x"
    result = no_image(*PULL, env={"QVM_RELEASES_URL": url})
    other.shutdown(socket.SHUT_RDWR)
  check_failed(result, f"{url}/{LATEST}.*5 attempts")
  assert "\033" not in result.stderr


def test_address_with_a_slash_at_its_end(no_image, server, image):
  check_works(no_image, no_image(*PULL, env={"QVM_RELEASES_URL": server.url + "/"}), image)
  assert not [path for path in server.paths() if "//" in path]


def test_server_off(no_image, server):
  server.close()
  result = no_image(*PULL)
  check_failed(result, r"(?s)http://127\.0\.0\.1:[0-9]+/.*releases/latest.*5 attempts.*try again")
  assert not [path for path in no_image.files() if path.startswith(("base/", "downloads/"))]


@pytest.mark.parametrize("url", ["http://[::1/x", "http://[x/y", "http://a:b/c"])
def test_bad_address(offline, url):
  result = offline(*PULL, env={"QVM_RELEASES_URL": url})
  fails(result, f"QVM_RELEASES_URL: '{url}' is no http://HOST", code=2)


def test_an_address_with_a_port_that_there_is_not(offline):
  result = offline(*PULL, env={"QVM_RELEASES_URL": "http://127.0.0.1:99999/x"})
  check_failed(result, "http://127.0.0.1:99999/x/.*releases/latest")


@pytest.mark.parametrize(
  "name, value",
  [
    ("QVM_RELEASES_URL", "example.org/x"),
    ("QVM_RELEASES_URL", "ftp://example.org/x"),
    ("QVM_RELEASES_URL", "http://"),
    ("QVM_RELEASES_URL", "http://x/a b"),
    ("QVM_TIMEOUT", "0"),
    ("QVM_TIMEOUT", "-1"),
    ("QVM_TIMEOUT", "nan"),
    ("QVM_TIMEOUT", "soon"),
    ("QVM_RETRY_DELAY", "-1"),
    ("QVM_RETRY_DELAY", "inf"),
    ("QVM_RETRY_DELAY", "1e3"),
  ],
)
def test_bad_environment(offline, name, value):
  result = offline(*PULL, env={name: value})
  assert (result.returncode, result.stdout) == (2, "")
  assert name in result.stderr and result.stderr.count("\n") <= 2
  assert not offline.cache.exists()


@pytest.mark.parametrize("place", ["", "downloads", "base", "qemu", "bin"])
def test_a_file_where_a_folder_should_be(full, place):
  """What is in the way is named, and it is not taken for a fault of the download."""
  if place == "downloads":
    shutil.rmtree(str(full.cache / "base"))
  shutil.rmtree(str(full.cache / place))
  (full.cache / place).write_text("")
  result = full(*PULL)
  check_failed(result, re.escape(str(full.cache / place)))
  assert "refused" not in result.stderr


# --- Progress --------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [0, 30, 200])
def test_progress_on_a_terminal(qvm, server, errors_shown, columns):
  go = threading.Event()
  for name in ALL:
    server.fault(name, pause=go, pause_at=5000)
  qvm.env["QVM_TIMEOUT"] = "600"
  terminal = errors_shown(qvm, *PULL, "--progress", columns=columns)
  terminal.until_match("[0-9]%.*\r.*[0-9]%" if columns != 30 else "\r.*\r")
  go.set()
  assert terminal.end() == 0
  # Each line that was drawn is cleared before the next one, and none is left at the end.
  drawn = [part for line in terminal.text.split("\n") for part in line.split("\r\033[K")]
  plain = [part for part in drawn if part.startswith("qvm: ")]
  bars = [part for part in drawn if part and not part.startswith("qvm: ")]
  assert "\033" not in "".join(drawn) and "\r" not in "".join(drawn)
  assert len(plain) == 7 and bars
  assert all(len(bar) < (columns or 80) for bar in bars)
  assert terminal.text.endswith("is ready\n")


def test_no_progress_on_a_terminal_unless_asked_for(qvm, server, errors_shown):
  server.latency = 0.3  # as long as it takes to draw a bar
  terminal = errors_shown(qvm, *PULL)
  assert terminal.end() == 0
  assert "\r" not in terminal.text and "\033" not in terminal.text and "%" not in terminal.text
  assert len(terminal.text.splitlines()) == 7


def test_progress_without_a_terminal(no_image, server, image):
  go = threading.Event()
  server.fault(IMAGE, pause=go, pause_at=300_000)
  process = no_image.start(*PULL, "--progress", env={"QVM_TIMEOUT": "600"})  # a line comes in 5 s
  lines = lines_until(process.stderr, "%")
  go.set()
  lines += list(process.stderr)
  assert process.wait(DEADLINE) == 0
  assert all(line.startswith("qvm: ") for line in lines)
  assert [line for line in lines if re.match(rf"qvm: {IMAGE} [0-9]+% [0-9]+ kB\n", line)]
  assert "\r" not in "".join(lines) and "\033" not in "".join(lines)


@pytest.mark.parametrize("words", [PULL, (*PULL, "--progress")], ids=["plain", "progress"])
def test_closed_stderr(no_image, server, image, words):
  result = no_image(*words, preexec_fn=lambda: os.close(2))
  assert result.returncode == 0
  assert (no_image.cache / "base" / IMAGE).read_bytes() == image
