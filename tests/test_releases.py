"""Which release and asset an image comes from, what its digest is for, and who sees the token."""

import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import time
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from release_server import ReleaseServer
from support import (
  BASE,
  DEAD,
  DEADLINE,
  FREEBSD,
  ROOT,
  SHORT_TIMEOUT,
  Qvm,
  fails,
  fill,
  rewrite,
  sha256,
  works,
)

import qvm as qvm_source

STEM = "netbsd-10.1-x86-64"
REPO = "netbsd-builder"


def record_of(qvm, stem=STEM):
  return json.loads((qvm.cache / "base" / f"{stem}.json").read_text())


def leftovers(qvm):
  return [name for name in qvm.files() if name.startswith("downloads/")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
  """A bundle, with the path of the disk in it."""
  folder = tmp_path_factory.mktemp("bundle")
  disk = folder / "disk.img"
  with disk.open("wb") as file:
    file.write(os.urandom(20000))
    file.truncate(4 << 20)
  pack = f"tar -C {folder} -S --format=oldgnu -cf - disk.img | zstd -q1 --long=27"
  return subprocess.run(pack, shell=True, check=True, stdout=subprocess.PIPE).stdout, disk


# --- The API up, away, and everything between ------------------------------------------------

STATES = {
  "up": {},
  "token": {"quota": 0, "env": {"GITHUB_TOKEN": "sesame"}},
  "out of quota": {"quota": 0},
  "too many requests": {"fault": {"status": 429, "headers": {"Retry-After": "50"}}},
  "bad token": {"fault": {"status": 401}, "env": {"GH_TOKEN": "sesame"}},
  "error 500": {"fault": {"status": 500}},
  "error 404": {"fault": {"status": 404}},
  "silent": {"fault": {"stall": "headers"}, "env": SHORT_TIMEOUT},
  "stalls": {"fault": {"stall": 30}, "env": SHORT_TIMEOUT},
  "cut": {"fault": {"cut": 30}},
  "hangs up": {"fault": {"cut": "connect"}},
  "gzip": {"fault": {"gzip": True}},
  "login page": {"fault": {"html": True}},
  "no UTF-8": {"fault": {"body": b'[{"tag_name": "\xff"}]'}},
  "too deep": {"fault": {"body": "[" * 200000}},
  "too large": {"fault": {"body": b" " * (33 << 20)}},
  "null": {"fault": {"body": "null"}},
  "a number": {"fault": {"body": "1" * 5000}},
  "an object": {"fault": {"body": '{"message": ["no"], "assets": {}}'}},
  "no releases": {"fault": {"body": '[1, null, "v1", [], {"tag_name": 1, "assets": 2}]'}},
  "redirect loop": {"fault": {"redirect": "/repos/loop"}},
  "gone": {"env": {"QVM_API_URL": DEAD}},
  "none": {"env": {"QVM_API_URL": ""}},
}
GOOD = ("up", "token")
MAIN = ("up", "out of quota", "silent", "gone")  # the others differ in how they are noticed
some_states = pytest.mark.parametrize("state", ("up", "token", "error 500", "no releases", "gone"))


def set_api(qvm, server, state):
  """Bring the API into one of the states."""
  kind = STATES[state]
  server.api_quota = kind.get("quota")
  if "fault" in kind:
    server.fault("", origin="api", times=None, **kind["fault"])
  qvm.env.update(kind.get("env", {}))


def publish(server, repo, releases, image, bundle=b""):
  """Make releases, the oldest first, from (tag, kinds of asset, flags); returns what qcow2 has."""
  server.repos[repo] = {}
  contents = {}
  for day, (tag, kinds, *flags) in enumerate(releases):
    contents[tag] = image + tag.encode()
    assets = {"netbsd-9.9-arm64.qcow2": image}
    if "qcow2" in kinds:
      assets[STEM + ".qcow2"] = contents[tag]
    if "bundle" in kinds:
      assets[STEM + ".tar.zst"] = bundle
    more = dict.fromkeys(flags, True)
    server.add_release(repo, tag, assets, published=f"2026-01-{day + 1:02}T00:00:00Z", **more)
  return contents


class Case(NamedTuple):
  """Releases, the oldest first, and the one that must be taken."""

  releases: tuple
  tag: str
  suffix: str


CASES = {
  "newest": Case((("v1", "qcow2"), ("v2", "bundle qcow2")), "v2", "qcow2"),
  "bundle": Case((("v1", "qcow2"), ("v2", "bundle")), "v2", "tar.zst"),
  "older": Case((("v9", "qcow2"), ("v10", "qcow2"), ("v11", "")), "v10", "qcow2"),
  "older bundle": Case((("v1", "qcow2"), ("v2", "bundle"), ("v3", "")), "v2", "tar.zst"),
  "both in older": Case((("v1", "qcow2"), ("v2", "bundle qcow2"), ("v3", "")), "v2", "qcow2"),
  "prerelease": Case(
    (("v1", "qcow2"), ("v2", ""), ("v3", "qcow2", "prerelease"), ("v4", "bundle", "prerelease")),
    "v1", "qcow2",
  ),
  "old prerelease": Case(
    (("v1", "qcow2"), ("v2.0.0-rc.1", "bundle qcow2", "prerelease"), ("v2", "")), "v1", "qcow2",
  ),
  "draft": Case(
    (("v1", "qcow2"), ("v2", "qcow2", "draft"), ("v3", ""), ("v4", "qcow2", "draft")),
    "v1", "qcow2",
  ),
}  # fmt: skip


PAIRS = [(state, case) for state in MAIN for case in CASES]
PAIRS += [(state, "older") for state in STATES if state not in MAIN]


@pytest.mark.parametrize("state, case", PAIRS)
def test_asset_and_release(no_image, server, image, bundle, tmp_path, state, case):
  packed, disk = bundle
  releases, tag, suffix = CASES[case]
  contents = publish(server, REPO, releases, image, packed)
  set_api(no_image, server, state)
  run = works(no_image("pull", "netbsd", "10.1", "--platform", "x86-64"))
  base = no_image.cache / "base" / f"{STEM}.qcow2"
  if suffix == "qcow2":
    assert base.read_bytes() == contents[tag]
  else:
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(disk), str(base)]
    subprocess.run(compare, check=True, stdout=subprocess.DEVNULL)
  record = record_of(no_image)
  assert record["release"] == tag
  assert record["url"] == f"{server.url}/{REPO}/releases/download/{tag}/{STEM}.{suffix}"
  newest = server.newest(REPO).tag
  said = [line for line in run.stderr.splitlines() if f" {tag};" in line and newest in line]
  assert len(said) == (tag != newest), run.stderr
  assert "no digest" not in run.stderr  # the pages have it where the API does not tell
  if case == "newest":  # the API is for the digest only, not for the choice
    assert all(path.endswith("/releases/tags/v2") for path in server.paths(origin="api"))
  if state in GOOD:
    assert not server.paths("expanded_assets"), "the API tells it all"
    assert not server.paths("releases.atom")
  assert leftovers(no_image) == []


@pytest.mark.parametrize("state", (*MAIN, "none", "login page", "an object", "too large"))
def test_wrong_content_is_refused(no_image, server, image, state):
  """The digest is known whatever the API does."""
  publish(server, REPO, [("v1", "qcow2")], image)
  set_api(no_image, server, state)
  server.fault(STEM, flip=200000, times=None)
  fails(no_image("pull", "netbsd", "10.1"), STEM, "digest")
  assert len(server.requests(STEM, "cdn")) == 2
  assert [name for name in no_image.files() if STEM in name] == []


@some_states
@pytest.mark.parametrize(
  "platform, wanted, near, there",
  [
    ("x86-64", "15.9", ["15.1", "15.0"], "15.1, 15.0, 14.4, 12.2"),
    ("arm64", "12.2", ["15.1"], "15.1, 15.0, 14.4"),
  ],
)
def test_version_that_is_nowhere(no_image, server, image, state, platform, wanted, near, there):
  server.add_release(
    "freebsd-builder",
    "v0.9.0",
    {"freebsd-12.2-x86-64.qcow2": image, "freebsd-14.4-arm64.qcow2": image},
    published="2020-01-01T00:00:00Z",
  )
  set_api(no_image, server, state)
  run = no_image("pull", "--platform", platform, "freebsd", wanted)
  fails(run, f"FreeBSD {wanted}", platform)
  message, everything = run.stderr.splitlines()[-2:]
  assert everything.endswith(there), run.stderr
  nearest = message.partition(platform)[2]
  assert platform == "arm64" or [v for v in ("15.1", "15.0") if v in nearest] == near, message
  assert [name for name in no_image.files() if "freebsd" in name] == []


@pytest.mark.parametrize(
  "os_name, wanted, near",
  [
    ("freebsd", "15.2", "15.1"),
    ("freebsd", "15.11", "15.1"),
    ("freebsd", "15.0-rc1", "15.0"),
    ("netbsd", "10.9", "10.1"),
    ("haiku", "r1beta6", "r1beta5"),
    ("omnios", "r151060", "r151058"),
    ("omnios", "151058", "r151058"),
  ],
)
def test_nearest_versions(no_image, os_name, wanted, near):
  run = no_image("pull", os_name, wanted, "--platform", "amd64")
  fails(run, wanted)
  assert near in run.stderr.splitlines()[-2].partition("x86-64")[2], run.stderr


def test_many_releases(no_image, server, image):
  """The one release that has it comes on the API's third page, behind drafts and prereleases."""
  flags = ((), ("draft",), ("prerelease",))
  releases = [("v1", "qcow2")]
  releases += [(f"v1.{n}", "qcow2" if n % 3 else "", *flags[n % 3]) for n in range(1, 320)]
  server.repos[REPO] = {}
  contents = image + b"v1"
  for n, (tag, kinds, *more) in enumerate(releases):
    assets = {STEM + ".qcow2": contents} if kinds else {"netbsd-9.9-x86-64.qcow2": image}
    published = f"2026-01-01T{n // 60:02}:{n % 60:02}:00Z"
    server.add_release(REPO, tag, assets, published=published, **dict.fromkeys(more, True))
  run = works(no_image("pull", "netbsd", "10.1"))
  assert record_of(no_image)["release"] == "v1"
  assert "v1;" in run.stderr
  pages = [request.query for request in server.requests(f"{REPO}/releases", "api")]
  pages = [query for query in pages if query]
  assert pages == [f"per_page=100&page={n}" for n in (1, 2, 3)]


def test_release_without_any_page(no_image, server, image):
  """A page that is broken does not hide the releases after it; one that is gone neither."""
  contents = publish(server, REPO, [("v1", "qcow2"), ("v2", ""), ("v3", "")], image)
  set_api(no_image, server, "gone")
  server.fault("expanded_assets/v2", origin="github", times=None, status=404)
  works(no_image("pull", "netbsd", "10.1"))
  assert (no_image.cache / "base" / f"{STEM}.qcow2").read_bytes() == contents["v1"]


def test_asset_that_is_listed_only(no_image, server, image):
  """The API names an asset that cannot be had: the next release is taken."""
  contents = publish(server, REPO, [("v1", "qcow2"), ("v2", "qcow2"), ("v3", "")], image)
  server.fault(f"download/v2/{STEM}", origin="github", times=None, status=404)
  works(no_image("pull", "netbsd", "10.1"))
  assert (no_image.cache / "base" / f"{STEM}.qcow2").read_bytes() == contents["v1"]


PAGES_OF = ("releases/latest", "releases.atom", "releases/expanded_assets")


@pytest.mark.parametrize("place", [2, 400, 900])
@pytest.mark.parametrize("page", PAGES_OF)
def test_a_page_that_is_cut_short_is_asked_for_again(no_image, server, image, page, place):
  """What a connection that ends lacks is not taken for what there is not."""
  publish_world(server, image)
  set_api(no_image, server, "none")
  more = {"status": 200, "body": "v2" + " " * 1000} if page == "releases/latest" else {}
  server.fault(f"netbsd-builder/{page}", origin="github", cut=place, **more)
  run = works(no_image("pull", "netbsd", "--platform", "x86-64"))
  assert bases(no_image) == ["base/netbsd-11.0-x86-64.qcow2"]
  assert "no digest" not in run.stderr and "trying again" in run.stderr


def test_a_pull_from_nothing_asks_the_api_for_two_releases(qvm, server):
  works(qvm("pull", "freebsd", "15.1"))
  paths = sorted(path.partition("actions/")[2] for path in server.paths(origin="api"))
  assert paths == ["freebsd-builder/releases/tags/v0.16.0", "resources/releases/tags/v2.0.0"]


@pytest.mark.parametrize("tag", ["..%2F..%2Fx", "v1%0d%0aX:%20y", "", "%20", "a" * 200, "v1/../v2"])
def test_hostile_newest_tag(no_image, server, tag):
  place = f"{server.url}/{REPO}/releases/tag/{tag}"
  server.fault("releases/latest", origin="github", times=None, redirect=place)
  fails(no_image("pull", "netbsd", "10.1"), "releases/latest")
  assert not server.requests(origin="cdn")


# --- Digests ---------------------------------------------------------------------------------

ASSETS = {
  f"{FREEBSD}.qcow2": f"base/{FREEBSD}.qcow2",
  "qemu-system-x86_64-linux.tar": "qemu/x86_64/bin/qemu-system-x86_64",
  "resources-linux.tar": "bin/qemu-img",
}
every_asset = pytest.mark.parametrize("name", ASSETS)


@every_asset
def test_wrong_once(qvm, server, name):
  server.fault(name, flip=3000)
  run = works(qvm("pull", "freebsd", "15.1"))
  assert len(server.requests(name, "cdn")) == 2
  assert sum("digest" in line and name in line for line in run.stderr.splitlines()) == 1
  assert not any("Range" in request.headers for request in server.requests(name, "cdn"))
  assert leftovers(qvm) == []
  assert works(qvm("pull", "--verify", "freebsd", "15.1")).stdout.count(": ok, matches v") == 3


@every_asset
def test_wrong_always(qvm, server, name):
  server.fault(name, flip=3000, times=None)
  fails(qvm("pull", "freebsd", "15.1"), name, "sha256")
  assert len(server.requests(name, "cdn")) == 2
  assert not (qvm.cache / ASSETS[name]).exists()
  assert not [path for path in leftovers(qvm) if name in path]
  server.clear_faults()
  works(qvm("pull", "freebsd", "15.1"))


def kill_at(qvm, server, name, size, *words):
  """Run, and kill -9 once half of what has come is known to be there; returns the part's path."""
  fault = server.fault(name, pause=threading.Event(), pause_at=size)
  process = qvm.start(*words)
  assert fault.reached.wait(DEADLINE), process.communicate()
  part = qvm.cache / "downloads" / name / "part"
  patience, known = time.monotonic() + DEADLINE, part.parent / "map"
  while not known.exists() or known.read_bytes().count(1) * qvm_source.BLOCK_BYTES < size // 2:
    assert time.monotonic() < patience, "nothing is written"  # some may wait in a buffer
    time.sleep(0.01)
  process.kill()
  process.communicate()
  server.clear_faults()
  assert server.wait_idle()
  server.clear_log()
  return part


def test_resumed_download_is_hashed_whole(no_image, server, image):
  part = kill_at(no_image, server, f"{FREEBSD}.qcow2", 300000, "pull", "freebsd", "15.1")
  size = (part.parent / "map").read_bytes().count(1) * qvm_source.BLOCK_BYTES
  assert 0 < size < len(image)
  works(no_image("pull", "freebsd", "15.1"))
  requests = server.requests(FREEBSD, "cdn")
  assert [(r.headers.get("range"), r.status) for r in requests] == [(f"bytes={size}-", 206)]
  assert record_of(no_image, FREEBSD)["asset_sha256"] == sha256(image)
  assert (no_image.cache / "base" / f"{FREEBSD}.qcow2").read_bytes() == image


@pytest.mark.parametrize("place", [200, 100000, -1])
def test_earlier_bytes_are_wrong(no_image, server, image, place):
  part = kill_at(no_image, server, f"{FREEBSD}.qcow2", 300000, "pull", "freebsd", "15.1")
  kept = (part.parent / "map").read_bytes().count(1) * qvm_source.BLOCK_BYTES
  content = bytearray(part.read_bytes()[:kept])
  content[place] ^= 1
  part.write_bytes(content)
  run = works(no_image("pull", "freebsd", "15.1"))
  assert [r.status for r in server.requests(FREEBSD, "cdn")] == [206, 200]
  assert "digest" in run.stderr
  assert (no_image.cache / "base" / f"{FREEBSD}.qcow2").read_bytes() == image


def test_newer_release_is_not_glued_to_the_old_part(no_image, server, image):
  kill_at(no_image, server, f"{FREEBSD}.qcow2", 300000, "pull", "freebsd", "15.1")
  newer = image[::-1] + b"newer"
  newer = image[:65536] + newer[65536:]
  server.add_release("freebsd-builder", "v1", {f"{FREEBSD}.qcow2": newer})
  works(no_image("pull", "freebsd", "15.1"))
  assert [request.status for request in server.requests(FREEBSD, "cdn")] == [200]
  assert (no_image.cache / "base" / f"{FREEBSD}.qcow2").read_bytes() == newer


@every_asset
@pytest.mark.parametrize("state", ["up", "gone", "none"])
def test_no_digest_is_said_once(qvm, server, image, tools_tar, state, name):
  repo, tag = ("resources", "v2.0.0") if "tar" in name else ("freebsd-builder", "v0.16.0")
  assets = {key: asset.blob.content for key, asset in server.repos[repo][tag].assets.items()}
  server.add_release(repo, tag, assets, digests=False)
  set_api(qvm, server, state)
  run = works(qvm("pull", "freebsd", "15.1"))
  said = [line for line in run.stderr.splitlines() if "no digest" in line]
  assert sum(name in line for line in said) == 1, run.stderr
  assert len(said) == (2 if repo == "resources" else 1), run.stderr


def test_digest_is_recorded(no_image, image, server):
  works(no_image("pull", "freebsd", "15.1"))
  record = record_of(no_image, FREEBSD)
  stamp, base = record.pop("time"), (no_image.cache / "base" / f"{FREEBSD}.qcow2").stat()
  assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp)
  assert record == {
    "release": "v0.16.0",
    "url": f"{server.url}/freebsd-builder/releases/download/v0.16.0/{FREEBSD}.qcow2",
    "validator": server.find("freebsd-builder", "v0.16.0").assets[f"{FREEBSD}.qcow2"].etag,
    "size": len(image),
    "asset_sha256": sha256(image),
    "format": 1,
    "sha256": sha256(image),
    "bytes": len(image),
    "mtime_ns": base.st_mtime_ns,
  }


# --- pull --verify ---------------------------------------------------------------------------


def test_the_digest_of_a_tree_stays_what_caches_have_noted(tmp_path):
  """A folder's files in order, then its folders; without the record."""
  files = {"z": b"1", "a/y": b"2", "a/b/x": b"3", "release.json": b"4", "a-": b"5"}
  for name, content in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
  noted = "".join(f"{name}\0{sha256(files[name])}" for name in ("a-", "z", "a/y", "a/b/x"))
  assert qvm_source.tree_sha256(str(tmp_path)) == sha256(noted.encode())


NOTE = f"base/{FREEBSD}.json"
PROGRAM = "qemu/x86_64/bin/qemu-system-x86_64"


def flip(qvm, path, place=-1):
  """Change one bit of a file in the cache."""
  path = qvm.cache / path
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.chmod(0o755)
  path.write_bytes(content)
  return bytes(content)


def edit(qvm, path, **fields):
  """Change fields of a record; None takes one out."""
  record = {**json.loads((qvm.cache / path).read_text()), **fields}
  record = {key: value for key, value in record.items() if value is not None}
  rewrite(qvm.cache / path, json.dumps(record))


def damage_and_note(qvm, path, note):
  """Damage a file, and note the digest it then has."""
  edit(qvm, note, sha256=sha256(flip(qvm, path)))


def away(qvm):
  qvm.env.update(QVM_RELEASES_URL=DEAD, QVM_API_URL=DEAD)


def replaced(qvm, server, image):
  server.replace_asset("freebsd-builder", "v0.16.0", f"{FREEBSD}.qcow2", image + b"other")


# Each: what is done to the cache, the network or the server, and which files are then not ok.
VERIFY = {
  "nothing": (lambda q, s, i: None, ""),
  "network away": (lambda q, s, i: away(q), ""),
  "API gone": (lambda q, s, i: set_api(q, s, "gone"), ""),
  "API garbage": (lambda q, s, i: set_api(q, s, "null"), ""),
  "image": (lambda q, s, i: flip(q, BASE), "image"),
  "image, network away": (lambda q, s, i: (away(q), flip(q, BASE)), "image"),
  "image longer": (lambda q, s, i: (q.cache / BASE).chmod(0o644) or
                   (q.cache / BASE).open("ab").write(b"x"), "image"),
  "qemu-img": (lambda q, s, i: flip(q, "bin/qemu-img"), "qemu-img"),
  "QEMU": (lambda q, s, i: flip(q, PROGRAM), "qemu"),
  "firmware": (lambda q, s, i: flip(q, "qemu/x86_64/share/qemu/bios-256k.bin"), "qemu"),
  "all three": (lambda q, s, i: [flip(q, p) for p in (BASE, PROGRAM, "bin/qemu-img")],
                "image qemu qemu-img"),
  "no digest noted": (lambda q, s, i: edit(q, NOTE, sha256=None), "image"),
  "no record": (lambda q, s, i: (q.cache / NOTE).unlink(), "image"),
  "no record of QEMU": (lambda q, s, i: (q.cache / "qemu/x86_64/release.json").unlink(), "qemu"),
  "record no JSON": (lambda q, s, i: rewrite(q.cache / NOTE, "{"), "image"),
  "record a list": (lambda q, s, i: rewrite(q.cache / NOTE, "[1]"), "image"),
  "record binary": (lambda q, s, i: rewrite(q.cache / NOTE, b"\xff\0"), "image"),
  "digest edited": (lambda q, s, i: edit(q, NOTE, sha256="0" * 64), "image"),
  "digest a number": (lambda q, s, i: edit(q, NOTE, sha256=1), "image"),
  "asset's digest edited": (lambda q, s, i: edit(q, NOTE, asset_sha256="0" * 64), "image"),
  "image and record": (lambda q, s, i: damage_and_note(q, BASE, NOTE), "image"),
  "release replaced": (replaced, "image"),
  "release replaced, API gone": (lambda q, s, i: (set_api(q, s, "gone"), replaced(q, s, i)),
                                 "image"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image, tools_tar):
  """A server and a home that pulled from it; the home is not to be changed."""
  home = tmp_path_factory.mktemp("whole")
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    works(Qvm(home, ROOT / "qvm.py", server)("pull", "freebsd", "15.1"))
    yield home, server


UNKNOWN = ("no digest noted", "digest a number")


@pytest.mark.parametrize("case", VERIFY)
def test_verify(whole, tmp_path, image, case):
  home, server = whole
  change, bad = VERIFY[case]
  home = shutil.copytree(home, tmp_path / "home", symlinks=True)
  qvm = Qvm(home, ROOT / "qvm.py", server)
  try:
    change(qvm, server, image)
    run = qvm("pull", "--verify", "freebsd", "15.1")
  finally:
    server.clear_faults()
    server.replace_asset("freebsd-builder", "v0.16.0", f"{FREEBSD}.qcow2", image)
  names = {"image": f"{FREEBSD}.qcow2", "qemu": "qemu-system-x86_64", "qemu-img": "qemu-img"}
  verdicts = {}
  for line in run.stdout.splitlines():
    name, _, verdict = line.partition(": ")
    verdicts.setdefault(name, []).append(verdict)
  assert set(verdicts) == set(names.values())
  for short, name in names.items():
    sound = verdicts[name][0].startswith("ok")
    assert sound == (short not in bad.split()) or f"{name} is damaged" in run.stderr, run.stdout
  unknown = "record" in case and case != "image and record" or case in UNKNOWN
  assert run.returncode == (unknown or case == "image, network away"), run.stderr
  if not run.returncode:  # what was bad has been fetched again, and looked at again
    assert ("downloaded again" in run.stderr) == bool(bad)
    assert all(each[-1].startswith("ok") for each in verdicts.values())
  elif unknown:
    assert "cannot be verified" in run.stderr
  if case == "network away":
    assert run.stdout.count("digest is unknown") == 3 and "ok, matches v" not in run.stdout
  elif not bad:
    assert run.stdout.count("ok, matches v") == 3


def test_verify_hostile_record(whole, tmp_path):
  """What a record names is no path to anywhere else."""
  home, server = whole
  qvm = Qvm(shutil.copytree(home, tmp_path / "home", symlinks=True), ROOT / "qvm.py", server)
  for release in ("../../../x", "", 5, None, ["v0.16.0"], "v1\nX-Y: z"):
    edit(qvm, NOTE, release=release)
    server.clear_log()
    run = qvm("pull", "--verify", "freebsd", "15.1")
    image, *others = run.stdout.splitlines()
    noted = "ok, matches the record; the release's digest is unknown"
    if run.returncode:  # a record that is not one
      assert "cannot be verified" in run.stderr and not isinstance(release, str)
      noted = "unknown: no digest was recorded at download"
    assert image == f"{FREEBSD}.qcow2: {noted}"
    assert [line.partition(": ")[2] for line in others] == ["ok, matches v2.0.0"] * 2
    assert not [path for path in server.paths() if ".." in path]


# --- The token -------------------------------------------------------------------------------


def shows_token(request):
  return any("s3same" in value for value in request.headers.values()) or "s3same" in request.target


@pytest.mark.parametrize("name", ["GITHUB_TOKEN", "GH_TOKEN"])
@pytest.mark.parametrize(
  "words",
  [
    ("pull", "freebsd", "15.1"),
    ("pull", "freebsd"),
    ("pull", "freebsd", "13.0"),
    ("pull", "--refresh", "freebsd", "15.1"),
    ("pull", "--verify", "freebsd", "15.1"),
    ("run", "netbsd", "latest"),
    ("search",),
  ],
)
def test_token_goes_to_the_api_only(qvm, server, image, words, name):
  publish(server, "freebsd-builder", [("v1", ""), ("v2", "")], image)
  old = {"freebsd-13.0-x86-64.qcow2": image, f"{FREEBSD}.qcow2": image}
  server.add_release("freebsd-builder", "v0", old, published="2020-01-01T00:00:00Z")
  run = works(qvm(*words, env={name: "s3same\n"}))
  by_origin = {origin: server.requests(origin=origin) for origin in ("github", "cdn", "api")}
  assert by_origin["api"]
  for request in by_origin["api"]:
    assert request.headers["authorization"] == "Bearer s3same"
  assert not [r for r in by_origin["github"] + by_origin["cdn"] if shows_token(r)]
  assert "s3same" not in run.stdout + run.stderr


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_token_does_not_follow_redirects(no_image, server, status):
  fault = {"origin": "api", "times": None, "status": status}
  server.fault("", redirect=f"{server.cdn_url}/elsewhere", **fault)
  works(no_image("pull", "freebsd", env={"GITHUB_TOKEN": "s3same"}))
  assert server.requests("elsewhere", "cdn"), "the redirect was not followed"
  assert [r for r in server.requests(origin="api") if shows_token(r)]
  assert not [r for r in server.requests() if shows_token(r) and r.origin != "api"]


@pytest.mark.parametrize("state", ("up", "too many requests", "gone"))
def test_token_is_not_in_messages(no_image, server, state):
  set_api(no_image, server, state)
  run = no_image("pull", "freebsd", "9.9", env={"GITHUB_TOKEN": "s3same"})
  fails(run, "9.9")
  assert "s3same" not in run.stderr
  assert not [r for r in server.requests() if shows_token(r) and r.origin != "api"]


@pytest.mark.parametrize("token", ["s3\nsame", "s3 same", "s3\x01same", "s3säme"])
def test_impossible_token(no_image, server, token):
  run = no_image("pull", "freebsd", "15.1", env={"GITHUB_TOKEN": token})
  fails(run, "GITHUB_TOKEN", code=2)
  assert "s3" not in run.stderr and server.started == 0


# --- The newest version ----------------------------------------------------------------------

WORLD = {
  "freebsd": (["15.2-rc1", "15.1", "9.9"], ["15.3-RC2", "9.9", "10.4"], "15.1", "10.4"),
  "netbsd": (["9.4", "10.0", "11.0"], ["9.4", "10.0"], "11.0", "10.0"),
  "openbsd": (["7.9", "7.10"], ["7.9", "6.10"], "7.10", "7.9"),
  "haiku": (["r1beta4", "r1beta6", "r1rc2", "r1beta5"], [], "r1beta6", None),
  "omnios": (["r151058", "r151056", "r151060-rc1"], [], "r151058", None),
}
SPELLINGS = ((), ("latest",), ("LATEST",), ("Latest",))


def publish_world(server, image):
  """The versions of each OS, spread over two releases, so that no release has them all."""
  for os_name, (x86_64, arm64, _, _) in WORLD.items():
    names = [f"{os_name}-{version}-x86-64.qcow2" for version in x86_64]
    names += [f"{os_name}-{version}-arm64.qcow2" for version in arm64]
    server.repos[f"{os_name}-builder"] = {}
    for tag, part in (("v1", names[::2]), ("v2", names[1::2])):
      published = f"2026-01-0{tag[1]}T00:00:00Z"
      assets = dict.fromkeys(part, image)
      server.add_release(f"{os_name}-builder", tag, assets, published=published)


def bases(qvm):
  return [name for name in qvm.files() if name.startswith("base/") and name.endswith("qcow2")]


NEWEST = [
  (os_name, arch, version)
  for os_name, (_, _, *versions) in WORLD.items()
  for arch, version in zip(("x86-64", "arm64"), versions)
  if version
]


@pytest.mark.parametrize("state", ["up", "gone"])
@pytest.mark.parametrize("os_name, arch, version", NEWEST)
def test_newest_version(no_image, server, image, os_name, arch, version, state):
  publish_world(server, image)
  set_api(no_image, server, state)
  run = works(no_image("pull", os_name, "--platform", arch))
  assert bases(no_image) == [f"base/{os_name}-{version}-{arch}.qcow2"]
  assert version in run.stderr


@pytest.mark.parametrize("words", SPELLINGS)
@pytest.mark.parametrize("command", ["run", "pull"])
def test_spellings_of_the_newest(no_image, server, image, command, words):
  publish_world(server, image)
  works(no_image(command, "netbsd", *words, "--platform", "amd64"))
  assert bases(no_image) == ["base/netbsd-11.0-x86-64.qcow2"]


def test_no_version_but_candidates(no_image, server, image):
  server.repos["haiku-builder"] = {}
  server.add_release("haiku-builder", "v1", {"haiku-r1rc2-x86-64.qcow2": image})
  fails(no_image("pull", "haiku"), "Haiku", "x86-64")
  works(no_image("pull", "haiku", "r1rc2"))


def cache_images(qvm, image, *stems):
  (qvm.cache / "base").mkdir()
  for stem in stems:
    (qvm.cache / "base" / f"{stem}.qcow2").write_bytes(image)


CACHED = ("netbsd-9.4-x86-64", "netbsd-10.0-x86-64", "netbsd-11.0-arm64", "netbsd-10.1-rc1-x86-64",
          "freebsd-15.1-x86-64")  # fmt: skip


@pytest.mark.parametrize(
  "kind", [{"status": 500}, {"status": 404}, {"cut": "connect"}, {"html": True}, {"stall": 0}, None]
)
def test_run_takes_the_cached_version_when_the_network_is_away(no_image, server, image, kind):
  cache_images(no_image, image, *CACHED)
  no_image.env["QVM_TIMEOUT"] = "0.1"
  if kind:
    server.fault("", origin=None, times=None, **kind)
  else:
    away(no_image)
  no_image.play(exit=7)
  run = no_image("run", "netbsd", "latest", "--platform", "x86-64")
  assert run.returncode == 7, run.stderr
  assert "10.0" in run.stderr
  instances = os.listdir(no_image.cache / "instances")
  assert sorted(instances) == ["netbsd-10.0-x86-64.json", "netbsd-10.0-x86-64.qcow2"]


@pytest.mark.parametrize("words", [(), ("15",)])
def test_run_takes_the_cached_version_of_a_named_release(no_image, server, image, words):
  """Its pages cannot be asked either: that it has no image for this CPU is not known."""
  named = ("--platform", "x86-64", "--release", "v0.16.0", "freebsd", *words)
  away(no_image)
  fails(no_image("pull", *named), DEAD)
  cache_images(no_image, image, "freebsd-15.1+v0.16.0-x86-64")
  no_image.play(exit=7)
  run = no_image("run", *named)
  assert run.returncode == 7, run.stderr
  assert "taking the newest cached version, 15.1" in run.stderr


@pytest.mark.parametrize("place", [f"{REPO}/releases/latest", "releases/expanded_assets"])
def test_what_can_be_done_without_is_not_waited_for(no_image, server, image, place):
  """Shared CI addresses are told to wait; each such minute would outlast this test."""
  publish_world(server, image)
  set_api(no_image, server, "gone")
  server.fault(place, origin="github", times=None, status=429, headers={"Retry-After": "60"})
  if "latest" in place:
    cache_images(no_image, image, *CACHED)
    run = works(no_image("run", "netbsd", "--platform", "x86-64"))
    assert "taking the newest cached version, 10.0" in run.stderr
  else:
    run = works(no_image("pull", "netbsd", "10.0", "--platform", "x86-64"))
    assert "no digest is known" in run.stderr


def test_what_the_cache_is_no_answer_for(no_image, image):
  cache_images(no_image, image, *CACHED)
  away(no_image)
  before = no_image.files()
  fails(no_image("pull", "netbsd", "--platform", "x86-64"))
  fails(no_image("run", "openbsd"))
  fails(no_image("run", "freebsd", "--platform", "arm64"))
  assert no_image.files() == before


def test_run_prefers_the_server_to_the_cache(no_image, server, image):
  cache_images(no_image, image, "netbsd-10.1-x86-64")
  works(no_image("run", "netbsd"))
  assert "instances/netbsd-11.0-x86-64.qcow2" in no_image.files()


@pytest.mark.parametrize("words", SPELLINGS)
def test_dry_run_asks_no_server(no_image, server, image, words):
  before = no_image.files()
  fails(no_image("run", "--dry-run", "netbsd", *words), "--dry-run", code=2)
  assert no_image.files() == before
  cache_images(no_image, image, *CACHED)
  before = no_image.files()
  run = works(no_image("--dry-run", "run", "netbsd", *words, "--platform", "x86-64"))
  assert "/netbsd-10.0-x86-64.qcow2" in run.stdout and run.stdout.count("\n") == 1
  assert no_image.files() == before
  fails(no_image("--dry-run", "run", "haiku", *words), code=2)
  assert server.started == 0


# --- Pure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "ordered",
  [
    "6.8 6.9 7.1 7.9 7.10",
    "9.2 9.4 10.0 10.1 11.0",
    "12.2 13.0 13.5 14.0 15.0-alpha1 15.0-beta2 15.0-rc1 15.0-rc2 15.0-rc10 15.0 15.0.1 15.1",
    "r1alpha4 r1beta1 r1beta4 r1beta5 r1beta6 r1beta10 r1rc1 r1rc2 r1 r1.1 r2",
    "r151054 r151056 r151058 r151058a r151060",
    "0.9 1 1.0 1.0.1 1.1 2",
    "v0.9.0 v0.10.0 v0.16.0 v1.0.0-rc.1 v1.0.0 v1.1.0 v2.0.0 v10.0.0",
  ],
)
def test_version_order(ordered):
  ordered = ordered.split()
  for order in (ordered, ordered[::-1], ordered[1::2] + ordered[::2]):
    assert sorted(order, key=qvm_source.version_key) == ordered
  keys = [qvm_source.version_key(version) for version in ordered]
  assert all(first < second for first, second in itertools.combinations(keys, 2))


VERSIONS = st.text("0123456789.-+~_rcbetalphRC", max_size=50) | st.text(max_size=60)
NUMBERS = st.lists(st.integers(0, 10**12), min_size=1, max_size=4)


@settings(deadline=None, database=None, max_examples=60)
@given(st.lists(VERSIONS, min_size=3, max_size=3))
@example(["9" * 50, "9" * 255, "²٣"])
def test_versions_have_a_total_order(versions):
  first, second, third = map(qvm_source.version_key, versions)
  assert (first < second) + (first == second) + (first > second) == 1
  assert not (first <= second <= third) or first <= third


@settings(deadline=None, database=None, max_examples=60)
@given(NUMBERS, NUMBERS, st.sampled_from(["-rc1", "-beta2", "rc", "beta9", "-alpha", ".rc.3"]))
def test_numbers_order_versions(first, second, early):
  texts = [".".join(map(str, numbers)) for numbers in (first, second)]
  keys = [qvm_source.version_key(text) for text in texts]
  assert (keys[0] < keys[1]) == (first < second)
  assert qvm_source.version_key(texts[0] + early) < keys[0]


@pytest.mark.parametrize(
  "version, candidate",
  [
    ("15.2-rc1", True), ("15.2-RC1", True), ("15.2rc1", True), ("15.2.rc.1", True),
    ("r1rc2", True), ("rc1", True), ("15.2-rc", True), ("r1beta5", False), ("15.1", False),
    ("r151058", False), ("arch1", False), ("src", False), ("r1", False), ("rcx", False),
  ],
)  # fmt: skip
def test_candidates(version, candidate):
  assert qvm_source.is_candidate(version) == candidate


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("v1"),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(["tag_name", "draft", "prerelease", "assets", "name", "digest", "x"]),
      inner,
      max_size=6,
    )
  ),
  max_leaves=20,
)
HEX = "0123456789abcdef" * 4


@settings(deadline=None, database=None, max_examples=60)
@given(JSON)
@example({"tag_name": "v1", "assets": [{"name": "a", "digest": "sha256:" + HEX}, 5, {"name": []}]})
def test_api_release_takes_any_json(data):
  release = qvm_source.api_release(data)
  if release is not None:
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", release.tag)
    for name, digest in release.assets.items():
      assert isinstance(name, str) and re.fullmatch("([0-9a-f]{64})?", digest)


def release_json(**more):
  return {"tag_name": "v1", "draft": False, "prerelease": False, "assets": [], **more}


@pytest.mark.parametrize(
  "data, tag",
  [
    (release_json(), "v1"),
    ({"tag_name": "v1", "assets": []}, "v1"),
    (release_json(draft=True), None),
    (release_json(prerelease=True), None),
    (release_json(tag_name="../x"), None),
    (release_json(tag_name="v1\n"), None),
    (release_json(tag_name="v1/x"), None),
    (release_json(tag_name="v1?x"), None),
    (release_json(tag_name="-v1"), None),
    (release_json(tag_name=""), None),
    (release_json(tag_name=["v1"]), None),
    (release_json(assets=None), None),
    (release_json(assets={"name": "x"}), None),
    ([release_json()], None),
    ("v1", None),
  ],
)
def test_api_release(data, tag):
  release = qvm_source.api_release(data)
  assert (release and release.tag) == tag


@pytest.mark.parametrize(
  "digest, known",
  [
    ("sha256:" + HEX, HEX),
    ("sha256:" + HEX + "\n", ""),
    ("sha256:" + HEX[1:], ""),
    ("sha512:" + HEX * 2, ""),
    (HEX, ""),
    (None, ""),
    (5, ""),
    (["sha256:" + HEX], ""),
  ],
)
def test_api_digests(digest, known):
  data = release_json(assets=[{"name": "a.qcow2", "digest": digest}])
  assert qvm_source.api_release(data).assets == {"a.qcow2": known}


LINK = '<a href="/o/r/releases/download/v1/{}" class="x">{}</a>'
OTHER = "f" * 64
PAGES = {
  "nothing": ("", {}),
  "no links": ("<html><body>sha256:" + HEX, {}),
  "a link": (LINK.format("a.qcow2", "a"), {"a.qcow2": ""}),
  "digest behind": (LINK.format("a", "a") + f"<i>sha256:{HEX}</i>", {"a": HEX}),
  "digest before": (f"sha256:{OTHER}" + LINK.format("a", "a"), {"a": ""}),
  "each its own": (
    LINK.format("a", "") + f"sha256:{HEX}" + LINK.format("b", "") + f"sha256:{OTHER}",
    {"a": HEX, "b": OTHER},
  ),
  "only the second": (
    LINK.format("a", "") + LINK.format("b", "") + f"sha256:{OTHER}",
    {"a": "", "b": OTHER},
  ),
  "cut digest": (LINK.format("a", "") + f"sha256:{HEX[:-1]}", {"a": ""}),
  "long digest": (LINK.format("a", "") + f"sha256:{HEX}0", {"a": ""}),
  "percent signs": (LINK.format("netbsd-10.1%2Bx.qcow2", ""), {"netbsd-10.1+x.qcow2": ""}),
  "absolute": ('href="https://x.example/o/r/releases/download/v1/a"', {"a": ""}),
  "source code": ('<a href="/o/r/archive/refs/tags/v1.zip">', {}),
  "unclosed": ('<a href="/o/r/releases/download/v1/a', {}),
  "no name": ('<a href="/o/r/releases/download/v1/">', {}),
}


def page_release(monkeypatch, text):
  monkeypatch.setattr(qvm_source, "get_page", lambda net, url: text)
  return qvm_source.page_release(qvm_source.net_from({}), "r", "v1")


@pytest.mark.parametrize("case", PAGES)
def test_page_release(monkeypatch, case):
  text, assets = PAGES[case]
  assert page_release(monkeypatch, text) == ("v1", assets)


@pytest.mark.parametrize(
  "name", ["../../x", "%2e%2e%2fx", "a%00b", "a%0ab", "&#46;&#46;/x", "..%5cx"]
)
def test_hostile_page(monkeypatch, name):
  """Whatever a page names, images_in lets only plain names through."""
  for text in (LINK.format(name, name), LINK.format(f"netbsd-{name}-x86-64.qcow2", "")):
    assert qvm_source.images_in("netbsd", [page_release(monkeypatch, text)]) == []


def test_long_pages_take_no_long_time(monkeypatch):
  """A page of unclosed links and one of slashes: a slow pattern would not come to its end."""
  for text in ('href="' * 200000, 'href="/releases/download/' + "/releases/download/a" * 50000):
    assert page_release(monkeypatch, text).assets == {}


@pytest.mark.parametrize(
  "name",
  [
    "freebsd-../../x-x86-64.qcow2", "freebsd-/etc/passwd-x86-64.qcow2", "freebsd--x86-64.qcow2",
    "freebsd-15.1-x86-64.qcow2\n", "freebsd-15.1\n-x86-64.qcow2", "freebsd-15.1-x86-64.qcow2.sig",
    "xfreebsd-15.1-x86-64.qcow2", "FREEBSD-15.1-x86-64.qcow2", "freebsd-15.1-riscv64.qcow2",
    "freebsd-15.1-x86-64.tar.xz", "freebsd-.5-x86-64.qcow2", "freebsd-٣-x86-64.qcow2",
    "freebsd-15.1 -x86-64.qcow2", "freebsd-" + "1" * 51 + "-x86-64.qcow2",
    "freebsd-\ud800-x86-64.qcow2", "openbsd-7.9-arm64.qcow2", "-x86-64.qcow2", "",
  ],
)  # fmt: skip
def test_images_in_hostile_names(name):
  release = qvm_source.Release("v1", {name: "", "freebsd-15.1-arm64.qcow2": ""})
  assert [image.version for image in qvm_source.images_in("freebsd", [release])] == ["15.1"]


def test_images_in_takes_the_newest_release():
  releases = [
    qvm_source.Release("v3", {"netbsd-11.0-x86-64.tar.zst": "", "netbsd-9.4-arm64.qcow2": ""}),
    qvm_source.Release("v2", {"netbsd-11.0-x86-64.qcow2": "", "netbsd-10.0-x86-64.tar.zst": "",
                          "netbsd-10.0-x86-64.qcow2": ""}),
    qvm_source.Release("v1", {"netbsd-10.0-x86-64.qcow2": "", "netbsd-9.4-arm64.qcow2": ""}),
  ]  # fmt: skip
  assert qvm_source.images_in("netbsd", releases) == [
    ("11.0", "x86-64", "v3", "netbsd-11.0-x86-64.tar.zst"),
    ("10.0", "x86-64", "v2", "netbsd-10.0-x86-64.qcow2"),
    ("9.4", "arm64", "v3", "netbsd-9.4-arm64.qcow2"),
  ]
