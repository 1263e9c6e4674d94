#!/usr/bin/env python3
"""Faults at random, from a seed: `make torture`, or torture.py [--seed N] PART [COUNT] ...

  network [1000]   schedules of faults of the release server; no wrong byte is ever published
  killing [200]    kill -9 all over a first run, a cached one and a refresh, alone or with six more
  signals [200]    a signal that qvm catches, at one call of the system in such a run
  disk    [120]    one call of the system fails as on a full, broken or read-only disk
  sync    [60]     kill -9 of a run with --sync and a command, or of its ssh or the guest's tar
  streaming [500]  kill -9 of qvm, of what serves the image, and of QEMU while `run --stream` runs,
                   or faults of the server
  power   [100]    the power fails in a first run, a kept one, a refresh and a stream
  preparing [60]   kill -9 of qvm, its QEMU or both while a machine is prepared, by one or by two
  hostile [200]    a guest that attacks: what it sends for --sync, its ssh, its console
  crowd   [3]      rounds of 20 processes that do everything at once in one cache
  containers [20]  rounds of two containers that do so, and kill -9 (as root, with unshare)

qvm runs as a forked child of a process that has imported it, unless it says "fresh": then it is
`python qvm.py` as a user starts it. Either way it is a process of its own, with its own locks.
--only K repeats one of the schedules or points. The first violation ends it with code 1.
"""

import argparse
import contextlib
import errno
import functools
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from release_server import ReleaseServer
from support import (
  IMAGE,
  QEMU,
  ROOT,
  TOOLS,
  Qvm,
  default_signals,
  end_processes,
  free_port,
  tar_of,
)
from support_network import Proxy, certificate, served
from support_power import ACTIONS as POWERED
from support_power import Cuts
from support_torture import (
  BUNDLED,
  GUEST,
  MAKERS,
  PATIENCE,
  PUBLISHED,
  PULL,
  RECORDS,
  REFRESH,
  REPOS,
  RESUMABLE,
  RUN,
  Asset,
  Forks,
  Violation,
  bad_words,
  check_complete,
  check_locks,
  check_published,
  check_tidy,
  check_words,
  children_of,
  demand,
  everything,
  guest_home,
  kind_of,
  make_image,
  make_qemu,
  make_tools,
  ours,
  played,
  progress,
  publish,
  published,
  violations,
)
from torture_containers import containers
from torture_hostile import hostile
from torture_preparing import preparing

# --- Network ---------------------------------------------------------------------------------

LAST = object()
RETRY_AFTER = ("0", "soon", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "0.5", "9" * 30)
REDIRECTS = (
  "{self}",
  "ftp://127.0.0.1/x",
  "file:///etc/passwd",
  "http://127.0.0.1:9/x",
  "https://127.0.0.1:9/x",
  "http://intern.invalid/x",
  "//",
  "http://[",
  "javascript:alert(1)",
  "/nowhere",
)
RANGES = ("", "bytes", "bytes 0-9/10", "bytes {next}-9/{size}", "bytes 1000-2000/2001", "bytes */9")
STATUSES = (403, 408, 425, 429, 500, 502, 503, 504)
FINAL = (400, 401, 404, 410, 416, 451, 507)
BODIES = ("", "Moved. Bye.", "[]", "{}", '{"tag_name": "v9", "assets": 3}', "<?xml?>", "\0" * 999)


def any_place(rng, size):
  """A place in a body: its ends more often than anywhere else."""
  return rng.choice([0, 1, 511, size // 2, size - 1, rng.randrange(size)])


def anywhere_fault(rng):
  """A fault that any request can meet."""
  status = rng.choice(STATUSES + FINAL)
  kinds = [
    {"cut": rng.choice(["connect", "headers", 0, 1]), "reset": rng.random() < 0.3},
    {"stall": rng.choice(["headers", 0])},
    {"status": rng.choice(STATUSES)},
    {"status": status, "headers": {"Retry-After": rng.choice(RETRY_AFTER)}},
    {"redirect": rng.choice(REDIRECTS), "status": rng.choice([301, 302, 303, 307, 308])},
    {"html": True},
    {"gzip": True},
    {"body": rng.choice(BODIES)},
    {"content_length": rng.choice([0, 1, 10**15])},
    {"no_length": True},
    {"chunked": True},
  ]
  return rng.choice(kinds)


def asset_fault(rng, size):
  """Faults of the host that serves an asset, one request after the other."""
  place = any_place(rng, size)
  content_range = rng.choice(RANGES).format(next=place + 1, size=size)
  kinds = [
    [{"cut": place, "reset": rng.random() < 0.3}],
    [{"stall": place}],
    [{"chunked": True, "cut": place}],
    [{"content_length": rng.choice([size + 1, size - 1, size - place])}],
    [{"no_length": True, "cut": place}],
    [{"flip": place}],
    [{"truncate": size - place}],
    [{"weak_etag": True, "cut": place}],
    [{"no_validator": True, "cut": place}],
    [{"cut": place}, {"flip": any_place(rng, size)}],
    [{"cut": place}, {"etag": '"other"'}],
    [{"cut": place}, {"ignore_if_range": True, "etag": '"other"'}],
    [{"cut": place}, {"ignore_range": True, "cut": any_place(rng, size)}],
    [{"cut": place}, {"no_ranges": True}],
    [{"cut": place}, {"content_range": content_range}],
    [{"cut": place}, {"other_range": rng.randrange(size)}],
    [{"cut": place}, {"gzip": True}],
    [{"cut": place}, {"status": 206, "headers": {"Content-Range": content_range}}],
    [{"cut": place}, anywhere_fault(rng)],
    [{"cut": place, "change": True}],
    [{"cut": place, "change": True}, {"ignore_if_range": True}],
    [{"stall": place, "change": True}, {"cut": any_place(rng, size)}],
    [{"etag": '"same"', "cut": place, "change": True}, {"etag": '"same"'}],
    [anywhere_fault(rng)],
  ]
  return rng.choice(kinds)


def fault_of(rng, assets):
  """One or two faults that belong together: (what of an address, origin, kind)."""
  image, *others = assets
  name = rng.choice([image, image, *others])
  repo, tag = REPOS[name]
  if rng.random() < 0.65:
    return [(name, "cdn", kind) for kind in asset_fault(rng, len(assets[name].content))]
  place = rng.choice([
    (f"{repo}/releases/latest", "github"),
    (f"releases/download/{tag}/{name}", "github"),
    (f"{repo}/releases/tags/{tag}", "api"),
    (f"{repo}/releases/expanded_assets/{tag}", "github"),
    (repo, rng.choice(["github", "api", "cdn"])),
  ])  # fmt: skip
  return [(*place, anywhere_fault(rng))]


class Session(NamedTuple):
  """One run of qvm and the faults that it meets."""

  words: tuple
  faults: list  # (match, origin, times, after, kind)
  env: dict
  obstacle: str  # what stands before any server; empty: nothing


class Schedule(NamedTuple):
  """What happens to one cache."""

  digests: bool
  start: tuple  # the names of the assets that are there from the start; () = an empty cache
  sessions: list
  secure: bool = False  # https
  mirror: str = ""  # a way to reach a mirror that is made in the end; empty: none is


OBSTACLES = (
  *("closed proxy", "proxy 403", "proxy 407", "proxy 502"),
  *("unknown authority", "wrong name", "expired"),
)
MIRRORS = ("file", "http")


def make_session(rng, assets):
  """A session of 1 to 4 faults."""
  faults, count = [], rng.randint(1, 4)
  while len(faults) < count:
    for match, origin, kind in fault_of(rng, assets):
      times, after = rng.choice([1, 1, 1, 2, 4, None]), rng.choice([0, 0, 0, 1])
      faults.append((match, origin, times, after, kind))
  env = {"QVM_TIMEOUT": "0.15"} if any("stall" in fault[4] for fault in faults) else {}
  obstacle = rng.choice(OBSTACLES) if rng.random() < 0.08 else ""
  return Session(rng.choice([PULL] * 6 + [RUN, REFRESH]), faults[:4], env, obstacle)


def make_schedule(rng, assets):
  """One to three sessions, on an empty or half-filled cache."""
  start = tuple(name for name in assets if rng.random() < 0.5) if rng.random() < 0.4 else ()
  sessions = [make_session(rng, assets) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
  mirror = rng.choice(MIRRORS) if rng.random() < 0.1 else ""
  return Schedule(rng.random() < 0.6, start, sessions, rng.random() < 0.2, mirror)


LIES = ("flip", "truncate", "content_length", "no_length", "body", "chunked")


def deceived(schedule, results):
  """The assets that no digest could keep from being published as a lying server sent them."""
  said = {name: f"no digest is known for {name}" for name in lied_about(schedule)}
  return {name for name, text in said.items() if any(text in each.stderr for each in results)}


def lied_about(schedule):
  """The assets of which a server sends other bytes than it should, and does not tell."""
  kinds = [fault for session in schedule.sessions for fault in session.faults]
  found = set()
  for name in REPOS:
    mine = [kind for match, *_, kind in kinds if name in match or match == REPOS[name][0]]
    lies = any(lie in kind for kind in mine for lie in LIES)
    lies |= any(kind.get("etag") == '"same"' or "ignore_if_range" in kind for kind in mine)
    if lies:
      found.add(name)
  return found


class Network:
  """Schedules of faults, all against one release server."""

  def __init__(self, folder, forks, fresh=False):
    self.folder, self.forks, self.fresh = Path(folder), forks, fresh
    self.counts, self.versions = Counter(), {}
    self.open = contextlib.ExitStack()
    self.trusts = {}  # the files by which to trust the servers with https
    self.servers = {"http": self.open.enter_context(ReleaseServer())}
    self.serve_tls("https", certificate)
    self.serve_tls("wrong name", lambda folder, _: certificate(folder, "DNS:example.org"))
    self.serve_tls("expired", expired_certificate)
    self.server = self.servers["http"]
    self.proxy = self.open.enter_context(served(Proxy()))

  def serve_tls(self, name, make):
    """Start one more server, with a certificate of its own."""
    folder = self.folder / name
    folder.mkdir()
    tls, self.trusts[name] = make(folder, "DNS:localhost,IP:127.0.0.1")
    self.servers[name] = self.open.enter_context(ReleaseServer(tls))

  def close(self):
    """End the servers."""
    self.open.close()

  def behind(self, obstacle):
    """The environment in which nothing but the obstacle can be reached."""
    if "proxy" in obstacle:
      self.proxy.status = int(obstacle.split()[1]) if obstacle[-1].isdigit() else 0
      url = f"http://127.0.0.1:{self.proxy.port if self.proxy.status else 9}"
      return {"http_proxy": url, "https_proxy": url}
    name = obstacle if obstacle in self.servers else "https"
    trust = self.trusts["expired" if obstacle == "unknown authority" else name]
    server = self.servers[name]
    urls = {"QVM_RELEASES_URL": server.url, "QVM_API_URL": server.api_url}
    return {**urls, "SSL_CERT_FILE": trust}

  def change(self, name, rng):
    """Replace an asset on the server, under the same name."""
    asset = {**MAKERS, **BUNDLED}[name](rng)
    self.versions[name].append(asset)
    self.server.replace_asset(*REPOS[name], name, asset.content)

  def set_faults(self, session, rng):
    """Tell the server what to do wrong."""
    for match, origin, times, after, kind in session.faults:
      kind = dict(kind)
      if kind.pop("change", False):
        made = random.Random(rng.getrandbits(64))
        kind["meanwhile"] = once(functools.partial(self.change, match, made))
      if kind.get("redirect") == "{self}":
        kind["redirect"] = f"{self.server.github_url}/loop"
        self.server.fault("/loop", origin="github", times=None, redirect="/loop")
      self.server.fault(match, origin=origin, times=times, after=after, **kind)

  def one(self, seed):
    """Play one schedule and check everything after each of its sessions."""
    rng = random.Random(seed)
    makers = BUNDLED if rng.random() < 0.15 else MAKERS
    self.counts["schedules with a bundle"] += makers is BUNDLED
    assets = {name: make(rng) for name, make in makers.items()}
    schedule = make_schedule(rng, assets)
    self.server = self.servers["https" if schedule.secure else "http"]
    self.versions = {name: [asset] for name, asset in assets.items()}
    self.server.clear_faults()
    publish(self.server, assets, digests=schedule.digests)
    home = self.folder / "home"
    home.mkdir()
    qvm = Qvm(home, self.forks.program, self.server)
    qvm.env.update(QVM_RETRY_DELAY="0.001", QVM_TIMEOUT="10")
    qvm.env.update({"SSL_CERT_FILE": self.trusts["https"]} if schedule.secure else {})
    results = []
    try:
      self.play(qvm, schedule, rng, results)
    except Violation as violation:
      texts = [f"--- {' '.join(r.words)}: {r.code}\n{r.stdout}{r.stderr}" for r in results]
      raise Violation("\n".join([f"seed {seed}: {violation}", show(schedule), *texts]))
    finally:
      self.forks.settled()
      shutil.rmtree(home)

  def run(self, qvm, *words, results, **more):
    """Run qvm and keep its words."""
    results.append(self.forks.run(qvm, *words, fresh=self.fresh, **more))
    return results[-1]

  def play(self, qvm, schedule, rng, results):
    """The sessions with their faults, then one without."""
    if schedule.start:
      check_words(self.run(qvm, *PULL, results=results), (0,))
      for name in set(self.versions) - set(schedule.start):
        remove(qvm, self.versions[name][0].files)
    for session in schedule.sessions:
      self.set_faults(session, rng)
      before = published(qvm)
      env = {**session.env, **(self.behind(session.obstacle) if session.obstacle else {})}
      result = self.run(qvm, *session.words, env=env, results=results)
      self.server.clear_faults()
      self.after(qvm, schedule, result, results)
      if session.obstacle:
        self.counts[f"{session.obstacle}: {result.code}"] += 1
        demand(published(qvm) == before, f"something came past {session.obstacle}")
        known = re.search("proxy|certificate", result.stderr)
        demand(result.code == 0 or known, f"{session.obstacle} is not said", *result)
    changed = any(len(versions) > 1 for versions in self.versions.values())
    loose = deceived(schedule, results)
    words = PULL if changed or loose else ("pull", "--verify", *GUEST)
    check_words(self.run(qvm, *words, results=results), (0,))
    check_complete(qvm, self.versions, deceived(schedule, results))
    check_tidy(qvm, self.counts, self.forks)
    if schedule.mirror and not loose:
      self.mirror(qvm, schedule, rng, results)
    for name in loose:
      try:
        check_published(qvm, {name: self.versions[name]})
      except Violation:
        self.counts["published wrong, as no digest was known: " + name] += 1

  def mirror(self, qvm, schedule, rng, results):
    """Make a mirror in spite of faults, damage one of its files, and fetch all from it."""
    place, words = qvm.home / "mirror", ("pull", "--mirror", str(qvm.home / "mirror"), *GUEST)
    self.set_faults(schedule.sessions[0], rng)
    result = self.run(qvm, *words, env=schedule.sessions[0].env, results=results)
    self.server.clear_faults()
    check_words(result)
    if result.code:
      check_words(self.run(qvm, *words, results=results), (0,))
    if deceived(schedule, results):
      return
    latest = {name: versions[-1:] for name, versions in self.versions.items()}
    assets = {name: next(place.rglob(name)) for name in latest}
    for name, path in assets.items():
      known = [asset.content for asset in self.versions[name]]
      demand(path.read_bytes() in known, f"the mirror has a wrong {name}")
    shutil.rmtree(qvm.cache)
    with contextlib.ExitStack() as stack:
      url = f"file://{place}"
      if schedule.mirror == "http":
        url = stack.enter_context(served(Folder(place))).url
      env = {"QVM_RELEASES_URL": url, "QVM_API_URL": ""}
      path = rng.choice(list(assets.values()))
      good = path.read_bytes()
      path.write_bytes(damaged(rng, good))
      result = self.run(qvm, *PULL, env=env, results=results)
      demand(result.code == 1, f"a damaged {path.name} is taken from a mirror")
      check_words(result)
      check_published(qvm, self.versions)
      path.write_bytes(good)
      check_words(self.run(qvm, *PULL, env=env, results=results), (0,))
      check_complete(qvm, self.versions)
    self.counts[f"mirrors, by {schedule.mirror}"] += 1

  def after(self, qvm, schedule, result, results):
    """Check what a session with faults leaves."""
    check_words(result)
    for name in re.findall(r"/([^/ ]+): what arrives has not the digest", result.stderr):
      honest = len(self.versions[name]) == 1 and name not in lied_about(schedule)
      demand(not honest, f"the digest alone tells that {name} is put together wrongly")
    loose = deceived(schedule, results)
    check_published(qvm, self.versions, loose)
    if result.code == 0:
      self.counts["sessions that worked"] += 1
      check_complete(qvm, self.versions, loose)
    else:
      self.counts["sessions that failed cleanly"] += 1
    locks = check_locks(qvm)
    for name in everything(qvm):
      if not re.fullmatch(f"{PUBLISHED}|{RECORDS}|{RESUMABLE}", name):
        failed_before = any(each.code for each in results)
        demand(failed_before, f"success leaves {name}")
        self.counts[f"left by a failure: {kind_of(name)}"] += result.code != 0
    there = set(qvm.files()) - set(locks)
    parts = [name for name in there if name.endswith("/part")]
    bare = [name for name in parts if name[: -len("part")] + "note.json" not in there]
    demand(not bare, f"parts without notes: {bare}")
    odd = [name for name in there if name.startswith("instances/")]
    demand(not odd, f"left: {odd}")


def expired_certificate(folder, names):
  """As certificate() makes it, but of the year 2020 alone."""
  tls, cert = certificate(folder, names)
  (folder / "index").touch()
  (folder / "config").write_text(
    f"[ca]\ndefault_ca = me\n[me]\ndatabase = {folder}/index\nnew_certs_dir = {folder}\n"
    f"rand_serial = yes\ndefault_md = sha256\npolicy = any\n[any]\ncommonName = optional\n"
    f"[names]\nsubjectAltName = {names}\n"
  )
  request = str(folder / "request.pem")
  key = str(folder / "key.pem")
  command = ["openssl", "req", "-new", "-key", key, "-subj", "/CN=localhost", "-out", request]
  subprocess.run(command, check=True)
  command = "openssl ca -selfsign -batch -notext -extensions names"
  command += " -startdate 20200101000000Z -enddate 20210101000000Z"
  more = ["-config", str(folder / "config"), "-keyfile", key, "-in", request, "-out", cert]
  subprocess.run([*command.split(), *more], check=True, stderr=subprocess.DEVNULL)
  tls.load_cert_chain(cert, key)
  return tls, cert


class Quiet(http.server.SimpleHTTPRequestHandler):
  """A plain file server, without its log."""

  def log_message(self, format, *args):
    pass


class Folder(http.server.ThreadingHTTPServer):
  """What `python3 -m http.server` serves in a folder."""

  daemon_threads = True

  def __init__(self, folder):
    super().__init__(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    self.url = f"http://127.0.0.1:{self.server_address[1]}"

  def handle_error(self, request, client_address):
    pass


def damaged(rng, content):
  """The content of a file that a disk, a copy or a proxy has spoilt."""
  place = rng.randrange(len(content))
  return rng.choice([
    b"",
    content[:place],
    content + b"\0",
    content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
    b"<html>" + content[6:],
  ])  # fmt: skip


def once(call):
  """A call that is made the first time only."""
  left = [call]
  return lambda: left and left.pop()()


def remove(qvm, files):
  """Take what an asset became out of the cache."""
  for name in files:
    if name.startswith("qemu/"):
      link = qvm.cache / "qemu" / "x86_64"
      if link.is_symlink():
        shutil.rmtree(link.resolve())
        link.unlink()
    else:
      (qvm.cache / name).unlink()
      (qvm.cache / re.sub(r"(\.qcow2)?$", ".json", name, count=1)).unlink()


def show(schedule):
  """A schedule for people."""
  lines = [f"digests {schedule.digests}, at the start {', '.join(schedule.start) or 'nothing'}"]
  lines += [f"https {schedule.secure}, mirror {schedule.mirror or 'none'}"]
  for session in schedule.sessions:
    lines.append(f"{' '.join(session.words)} {session.env or ''} {session.obstacle}")
    lines += [f"  {fault}" for fault in session.faults]
  return "\n".join(lines)


def network(folder, forks, seed, numbers, fresh=False):
  """Play schedules; returns what was counted."""
  part = Network(folder, forks, fresh)
  with contextlib.closing(part):
    return played(part, seed, numbers, "schedules")


# --- Killing ---------------------------------------------------------------------------------

# The calls of the system that change files, start programs or take locks.
CALLS = (
  "rename,unlink,unlinkat,rmdir,mkdir,symlink,chmod,ftruncate,flock,fsync,write,pwrite64,"
  "clone,clone3,vfork,execve"
)
ACTIONS = {"first run": RUN, "cached run": RUN, "refresh": REFRESH}  # what is killed
OTHERS = (RUN, PULL, ("list",), RUN, ("run", *GUEST, "--rm", "--name", "b"), PULL)


class Killing:
  """A server, a cache with everything in it, and how long runs take."""

  STRUCK = CALLS

  def __init__(self, folder, forks, seed):
    self.folder, self.forks, self.counts = Path(folder), forks, Counter()
    rng = random.Random(f"{seed}:killing")
    self.server = ReleaseServer()
    self.old = {IMAGE: make_image(rng), QEMU: make_qemu(rng, "0.02"), TOOLS: make_tools(rng)}
    publish(self.server, self.old)
    self.filled = self.home("filled", "first run")
    check_words(forks.run(self.filled, *PULL), (0,))
    self.new = {IMAGE: make_image(rng), QEMU: make_qemu(rng, "0.02"), TOOLS: make_tools(rng)}
    publish(self.server, self.new, tag="v99.0.0", published="2026-09-01T00:00:00Z")
    self.server.rate = 2e6  # so that downloads are a good part of a first run
    self.seconds = {action: self.measure(action) for action in ACTIONS}
    self.calls = {action: self.traced(action) for action in ACTIONS}

  def versions(self, action):
    """What may be in the cache: nothing ever changes an old image but a refresh."""
    named = {"first run": [self.new], "cached run": [self.old], "refresh": [self.old, self.new]}
    return {name: [assets[name] for assets in named[action]] for name in MAKERS}

  def home(self, name, action):
    """qvm in a home of its own, empty or with everything in its cache."""
    home = self.folder / name
    home.mkdir()
    qvm = Qvm(home, self.forks.program, self.server)
    if action != "first run":
      shutil.copytree(self.filled.cache, qvm.cache, symlinks=True)
    return qvm

  @contextlib.contextmanager
  def temporary(self, action):
    """A home that goes away again, when nothing runs there any more."""
    qvm = self.home("home", action)
    try:
      yield qvm
    finally:
      self.forks.settled()
      shutil.rmtree(qvm.home)

  def measure(self, action):
    """The seconds that a run takes, the middle of five."""
    seconds = []
    for _ in range(5):
      with self.temporary(action) as qvm:
        began = time.monotonic()
        check_words(self.forks.run(qvm, *ACTIONS[action]), (0,))
        seconds.append(time.monotonic() - began)
    return sorted(seconds)[2]

  def traced(self, action):
    """The calls that a run makes: (name, which of these it is in its thread); () without strace."""
    if not shutil.which("strace"):
      return ()
    with self.temporary(action) as qvm:
      log = self.folder / "strace"
      before = (shutil.which("strace"), "-f", "-o", str(log), "-e", f"trace={self.STRUCK}")
      if self.forks.run(qvm, *ACTIONS[action], before=before).code:
        return ()  # it may not trace here
    lines = re.findall(r"^([0-9]+) +([a-z0-9]+)\(", log.read_text(), re.MULTILINE)
    helpers = {pid for pid, call in lines if call == "execve"} - {lines[0][0]}
    seen = Counter()
    for line in lines:
      seen[line] += line[0] not in helpers
    return [(call, n + 1) for (_, call), many in seen.items() for n in range(many)]

  def one(self, seed, kind):
    """Kill a qvm at one point, and check that all is well afterwards."""
    rng = random.Random(seed)
    action, way = list(ACTIONS)[kind % 3], ("delay", "calls", "crowd")[kind // 3 % 3]
    if way == "calls" and not self.calls[action]:
      way = "delay"
    what = f"{action}, {way}"
    said = [f"seed {seed}: {what}"]
    try:
      with self.temporary(action) as qvm:
        killed = self.strike(qvm, rng, action, way, said)
        self.afterwards(qvm, rng, action, said)
    except Violation as violation:
      raise Violation("\n".join([*said, str(violation)]))
    self.count(what, killed)

  def count(self, what, struck):
    """Note how a point ended."""
    self.counts[f"{what}: {'killed' if struck else 'only a helper, or nothing'}"] += 1

  def strike(self, qvm, rng, action, way, said):
    """Start what there is to start, and kill one of it; whether that was still running."""
    if way == "calls":
      call, number = self.one_call(rng, self.calls[action])
      said.append(f"at the {call} number {number}")
      child = self.start_with(qvm, action, f"{call}:signal=SIGKILL:when={number}")
      return child.wait().code == -signal.SIGKILL
    others = [self.forks.start(qvm, *words) for words in OTHERS] if way == "crowd" else []
    delay = rng.uniform(0, 1.1) * self.seconds[action] * (2 if others else 1)
    said.append(f"after {delay:.4f} s")
    child = self.forks.start(qvm, *ACTIONS[action])
    time.sleep(delay)
    child.kill()
    killed = child.wait().code == -signal.SIGKILL
    for other in others:
      check_words(other.wait(), (0,))
    return killed

  def one_call(self, rng, calls):
    """One of these calls of the system: each name is as likely as another."""
    call = rng.choice(sorted({call for call, _ in calls}))
    return call, rng.choice([number for each, number in calls if each == call])

  def start_with(self, qvm, action, inject, *more):
    """Start an action in which strace injects something."""
    before = (shutil.which("strace"), "-f", "-o", os.devnull, "-e", f"trace={self.STRUCK}")
    before += (*more, "-e", "inject=" + inject)
    return self.forks.start(qvm, *ACTIONS[action], before=before)

  def afterwards(self, qvm, rng, action, said):
    """What must be true after a kill."""
    if rng.random() < 0.5:
      self.forks.settled()
    else:
      said.append("the next command comes while a helper may still run")
      check_words(self.forks.run(qvm, "list"), (0,))
      self.forks.settled()
    versions = self.versions(action)
    check_published(qvm, versions)
    check_words(self.forks.run(qvm, "list"), (0,))
    overlays = [name for name in qvm.files() if re.match(r"instances/.*(qcow2|ephemeral)$", name)]
    demand(not overlays, f"the next command leaves {overlays}")
    check_locks(qvm)
    check_words(self.forks.run(qvm, *RUN), (0,))
    check_complete(qvm, versions)
    check_words(self.forks.run(qvm, "pull", "--verify", *GUEST), (0,))
    if action == "refresh":
      check_words(self.forks.run(qvm, *REFRESH), (0,))
      check_complete(qvm, self.versions("first run"))
    check_tidy(qvm, self.counts, self.forks)


def killing(folder, forks, seed, numbers):
  """Kill qvm at many points; returns what was counted."""
  return strikes(Killing(folder, forks, seed), seed, numbers)


def strikes(part, seed, numbers):
  """Play the points of a part."""
  try:
    for number in numbers:
      part.one(f"{seed}:{number}", number)
      part.counts["points"] += 1
      progress(number)
    check_published(part.filled, part.versions("cached run"))
  finally:
    part.server.close()
  for action in ACTIONS:
    calls = len(part.calls[action])
    print(f"  {action}: {part.seconds[action]:.3f} s, {calls} calls that change something")
  return part.counts


# --- Disks that fail -------------------------------------------------------------------------

WRITING = {  # which of the traced calls fail on a disk, with what
  "rename": ("ENOSPC", "EROFS", "EIO", "EDQUOT"),
  "mkdir": ("ENOSPC", "EROFS", "EDQUOT"),
  "symlink": ("ENOSPC", "EROFS", "EIO"),
  "ftruncate": ("ENOSPC", "EIO"),
  "fsync": ("ENOSPC", "EIO", "EDQUOT"),
  "write": ("ENOSPC", "EIO", "EDQUOT"),
  "pwrite64": ("ENOSPC", "EIO", "EDQUOT"),
  "chmod": ("EROFS", "EIO"),
  "unlink": ("EROFS", "EIO"),
}


class Failing(Killing):
  """As there, but a call fails instead; all the later ones too, for where there is no way out."""

  def strike(self, qvm, rng, action, way, said):
    calls = [each for each in self.calls[action] if each[0] in WRITING]
    call, number = self.one_call(rng, calls)
    error = rng.choice(WRITING[call])
    once_only = call in ("write", "unlink")  # or else its own words fail, and all clean-up
    said.append(f"{error} at the {call} number {number}{'' if once_only else ' and on'}")
    inject = f"{call}:error={error}:when={number}{'' if once_only else '+'}"
    # qemu-img's threads wake one another by writes, which no disk can fail.
    more = ("-b", "execve") if call == "write" else ()
    result = self.start_with(qvm, action, inject, *more).wait()
    said.append(result.stderr)
    if call != "write" or result.stderr:  # it may have been the error's own words
      check_words(result)
    if result.code:
      full = error in ("ENOSPC", "EDQUOT") and "disk is full" in result.stderr
      words = os.strerror(getattr(errno, error))
      demand(full or call == "write" or words in result.stderr, f"'{words}' is not said")
      self.counts["full disks that are called so"] += full
      locks = check_locks(qvm)
      left = set(qvm.files()) - set(locks)
      odd = [name for name in left if re.match(r"instances/.*qcow2$", name)]
      demand(call in ("unlink", "rename") or not odd, f"left: {odd}")
    return result.code == 1

  def count(self, what, struck):
    self.counts[f"{what.split(',')[0]}: {'failed' if struck else 'worked all the same'}"] += 1


def failing(folder, forks, seed, numbers):
  """Let calls fail in many runs; returns what was counted."""
  return strikes(Failing(folder, forks, seed), seed, numbers)


# --- Signals -----------------------------------------------------------------------------------


class Interrupting(Killing):
  """As there, by a signal that qvm catches: it ends soon, and cleans up before it does."""

  STRUCK = CALLS + ",openat,wait4,futex,select"

  def strike(self, qvm, rng, action, way, said):
    call, number = self.one_call(rng, self.calls[action])
    signum = rng.choice([signal.SIGTERM, signal.SIGHUP])
    said.append(f"{signum.name} at the {call} number {number}")
    result = self.start_with(qvm, action, f"{call}:signal={signum.name}:when={number}").wait()
    said.append(result.stderr)
    if result.code == -signum:  # before qvm could catch it, or when it was done
      return False
    if result.code != 128 + signum:  # a helper may have got it
      check_words(result)
      return False
    demand(not bad_words(result.stderr), "it says more than a user should see")
    left = [name for name in qvm.files() if name.startswith("instances/")]
    demand(not left, f"it leaves {left}")
    return True

  def count(self, what, struck):
    self.counts[f"{what.split(',')[0]}: {'interrupted' if struck else 'not'}"] += 1


def interrupting(folder, forks, seed, numbers):
  """Interrupt many runs; returns what was counted."""
  return strikes(Interrupting(folder, forks, seed), seed, numbers)


# --- Killing with --sync ---------------------------------------------------------------------

# What the guest does: to all files the same, however often; new ones, and one that goes.
CHANGE = """\
for f in f*; do tr a-m n-z <"$f" >t && cat t >"$f" && rm t; done
rm -f gone; mkdir -p new/deep; cat f* >new/deep/sum; ln -sf ../f1 new/link"""
LANDING = "rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,write,fchmod,utimensat,symlinkat"
UPPER, LOWER = b"abcdefghijklm", b"nopqrstuvwxyz"
# A guest's tar that ends, or lets others end, after so many bytes of what it reads or writes.
HALFWAY = """#!/bin/sh
[ "$1" = {way} ] && mkdir "{reached}.once" || exec /bin/tar "$@"
part() {{ head -c {bytes}; : >"{reached}"; {then}; }}
case $1 in -cf) /bin/tar "$@" | part ;; *) part | /bin/tar "$@" ;; esac
"""


class Syncing:
  """A cache whose QEMU is a stand-in with a real sshd, and a folder that goes there and back."""

  def __init__(self, folder, forks, seed):
    self.folder, self.forks, self.counts = Path(folder), forks, Counter()
    rng = random.Random(f"{seed}:sync")
    assets = {name: make(rng) for name, make in MAKERS.items()}
    self.qvm = guest_home(folder, forks, assets)
    self.project = self.folder / "project"
    sizes = [0, 1, 1000, 70_000, 400_000] + [rng.randrange(5000) for _ in range(20)]
    letters = (UPPER + LOWER).decode()
    self.old = {f"f{n}": "".join(rng.choices(letters, k=k)).encode() for n, k in enumerate(sizes)}
    self.old["gone"] = b"gone"
    table = bytes.maketrans(UPPER, LOWER)
    self.new = {name: data.translate(table) for name, data in self.old.items() if name != "gone"}
    self.new["new/deep/sum"] = b"".join(self.new[name] for name in sorted(self.new))
    self.new["new/link"] = b"../f1"
    self.words = ("run", "--rm", "--sync", str(self.project), "--sync-delete")
    self.words += ("--ssh-port", str(free_port()), *GUEST, "--", CHANGE)
    self.refill()
    began = time.monotonic()
    check_words(self.go().wait(), (0,))
    self.seconds = time.monotonic() - began
    self.settle()
    demand(self.there() == self.new, "a run that nobody kills brings something else")
    self.calls = self.traced()

  def refill(self):
    """Put the folder back to what it was."""
    shutil.rmtree(self.project, ignore_errors=True)
    self.project.mkdir()
    for name, data in self.old.items():
      (self.project / name).write_bytes(data)

  def there(self):
    """{path: content} of the folder; what a killed qvm had in hand has a name of its own."""
    files = [path for path in self.project.rglob("*") if not path.is_dir()]
    aside = [path for path in files if re.fullmatch(r"\.qvm-[0-9a-f]{12}", path.name)]
    self.counts["left aside in the folder"] += len(aside)
    named = {path: str(path.relative_to(self.project)) for path in files if path not in aside}
    return {
      name: os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
      for path, name in named.items()
    }

  def go(self, before=(), guest=None):
    """Start the run, in a guest of its own."""
    guest = guest or tempfile.mkdtemp(dir=self.folder, prefix="guest")
    return self.forks.start(
      self.qvm, *self.words, env={"SSH_GUEST": json.dumps({"folder": guest})}, before=before
    )

  def settle(self):
    """End the machine that a killed qvm has left, and all else."""
    listed = self.forks.run(self.qvm, "list", "--json")
    check_words(listed, (0,))
    for row in json.loads(listed.stdout):
      demand(row["state"] == "running", f"an overlay is left: {row}")
      check_words(self.forks.run(self.qvm, "stop", "--force", row["name"]), (0,))
      self.counts["machines that were ended with stop"] += 1
    self.forks.settled()
    check_words(self.forks.run(self.qvm, "list"), (0,))
    left = [name for name in self.qvm.files() if re.match(r"instances/.*(?<!\.lock)$", name)]
    demand(not left, f"left: {left}")
    for name in check_locks(self.qvm):  # a qvm that was killed as it was about to delete it
      (self.qvm.cache / name).unlink()
      self.counts["free locks left"] += 1
    for guest in self.folder.glob("guest*"):
      shutil.rmtree(guest, ignore_errors=True)

  def traced(self):
    """The calls of qvm itself that change something: {name: how many}; {} without strace."""
    if not shutil.which("strace"):
      return {}
    self.refill()
    log = self.folder / "strace"
    before = (shutil.which("strace"), "-o", str(log), "-e", f"trace={LANDING}")
    code = self.go(before).wait().code
    self.settle()
    found = Counter(re.findall(r"^([a-z0-9]+)\(", log.read_text(), re.MULTILINE))
    return {} if code else dict(found)

  def halfway(self, victim, way, size):
    """End qvm, its ssh or the guest's tar while a stream is on its way; returns qvm's exit code."""
    guest = Path(tempfile.mkdtemp(dir=self.folder, prefix="guest"))
    reached, program = guest / "reached", guest / "bin" / "tar"
    program.parent.mkdir()
    then = "kill -9 $$" if victim == "tar" else "exec sleep 600"  # until its guest ends
    program.write_text(HALFWAY.format(way=way, reached=reached, bytes=size, then=then))
    program.chmod(0o755)
    child, until = self.go(guest=str(guest)), time.monotonic() + PATIENCE
    while child.poll() is None and not reached.exists():
      demand(time.monotonic() < until, "nothing comes that far")
      time.sleep(0.002)
    if victim == "qvm":
      child.kill()
    for pid in children_of(child.pid, "ssh") if victim == "ssh" else ():
      os.kill(pid, signal.SIGKILL)
    result = child.wait()
    demand(reached.exists(), f"the stream never came: {result}")
    if victim != "qvm":
      demand(result.code in (0, 125), result)
      demand(not list(self.project.rglob(".qvm-*")), f"half a file is left: {result}")
    demand(way == "-cf" or self.there() == self.old, "the command has not run")
    return result.code

  def one(self, seed, number):
    """Kill a run, look at the folder, and run it again."""
    rng = random.Random(seed)
    self.refill()
    if number % 4 > 1:
      victim, way = rng.choice(("qvm", "ssh", "tar")), rng.choice(("-xpf", "-cf"))
      size = rng.randrange(sum(map(len, self.old.values())))
      said = f"seed {seed}: {victim} after {size} bytes of tar {way}"
      killed = self.halfway(victim, way, size) != 0
      self.counts[f"halfway {'back' if way == '-cf' else 'there'}: {victim}"] += 1
    elif number % 4 and self.calls:
      call = rng.choice(sorted(self.calls))
      when = rng.randint(1, self.calls[call])
      said = f"seed {seed}: at the {call} number {when}"
      inject = f"inject={call}:signal=SIGKILL:when={when}"
      before = (shutil.which("strace"), "-o", os.devnull, "-e", f"trace={LANDING}", "-e", inject)
      killed = self.go(before).wait().code == -signal.SIGKILL
    else:
      delay = rng.uniform(0, 1.1) * self.seconds
      said = f"seed {seed}: after {delay:.4f} s"
      child = self.go()
      time.sleep(delay)
      child.kill()
      killed = child.wait().code == -signal.SIGKILL
    self.counts["killed" if killed else "not killed"] += 1
    try:
      self.settle()
      lost = self.new.keys() & self.old.keys() - self.there().keys()
      demand(not lost, f"{sorted(lost)} is lost")
      for name, data in self.there().items():
        known = [files[name] for files in (self.old, self.new) if name in files]
        demand(data in known, f"{name} is neither old nor new: {len(data)} bytes")
      check_words(self.go().wait(), (0,))
      self.settle()
      wrong = {name for name in self.new if self.there().get(name) != self.new[name]}
      demand(not wrong, f"the next run does not bring {sorted(wrong)}")
    except Violation as violation:
      raise Violation(f"{said}\n{violation}")


def syncing(folder, forks, seed, numbers):
  """Kill runs that carry a folder there and back; returns what was counted."""
  part = Syncing(folder, forks, seed)
  for number in numbers:
    part.one(f"{seed}:{number}", number)
    part.counts["points"] += 1
    progress(number)
  print(f"  a run: {part.seconds:.3f} s, {sum(part.calls.values())} calls that change something")
  return part.counts


# --- Streaming -------------------------------------------------------------------------------

STREAM = ("run", "--stream", "--name", "a", *GUEST)
# It writes to its disk, says so, reads all of it, and stays a little.
STREAMED_QEMU = b"""#!/bin/sh
for word; do
  case $word in if=none,file=*) disk=${word#if=none,file=} disk=${disk%%,id=*} ;; esac
done
qemu-io -f qcow2 -c 'write -P 7 64k 4k' "$disk" >/dev/null && echo >>"$HOME/wrote"
qemu-io -r -f qcow2 -c 'read 0 1M' "$disk" >/dev/null
exec sleep 0.2
"""


class Streaming:
  """A server with an image of 1 MB, and a cache with all but that."""

  def __init__(self, folder, forks, seed):
    self.folder, self.forks, self.counts = Path(folder), forks, Counter()
    rng = random.Random(f"{seed}:streaming")
    (self.folder / "raw").write_bytes(rng.randbytes(1 << 20))
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "image"]
    subprocess.run(command, cwd=folder, check=True)
    content = (self.folder / "image").read_bytes()
    qemu = {"bin/qemu": STREAMED_QEMU, "share/qemu/uefi.fd": b""}
    named = {f"qemu/x86_64/{name.replace('qemu', 'qemu-system-x86_64', 1)}" if "bin" in name
             else f"qemu/x86_64/{name}": data for name, data in qemu.items()}  # fmt: skip
    self.assets = {
      IMAGE: Asset(content, {f"base/{IMAGE}": content}),
      QEMU: Asset(tar_of(qemu), named),
      TOOLS: make_tools(rng),
    }
    self.server = ReleaseServer()
    publish(self.server, self.assets)
    self.filled = Qvm(self.folder, forks.program, self.server)
    check_words(forks.run(self.filled, *PULL), (0,))
    shutil.rmtree(self.filled.cache / "base")
    self.filled.env["QVM_TIMEOUT"] = "0.5"
    self.server.rate = 2e6
    began = time.monotonic()
    with self.home() as qvm:
      check_words(forks.run(qvm, *STREAM), (0,))
    self.seconds = time.monotonic() - began

  @contextlib.contextmanager
  def home(self):
    """qvm in a home of its own, which goes away again with all that runs there."""
    qvm = Qvm(self.folder / "home", self.forks.program, self.server)
    qvm.env["QVM_TIMEOUT"] = "0.5"
    shutil.copytree(self.filled.cache, qvm.cache, symlinks=True)
    try:
      yield qvm
    finally:
      self.server.clear_faults()
      end_processes(f"HOME={qvm.home}", environment=True)
      self.forks.settled()
      shutil.rmtree(qvm.home)

  def one(self, seed):
    """Kill at one point, and check that the next run makes all of it good."""
    rng = random.Random(seed)
    who = rng.choice(["qvm", "server", "QEMU", "qvm and server", "all", *["nothing"] * 5])
    rm = rng.random() < 0.3
    said = [f"seed {seed}: kill {who}, {'--rm' if rm else 'a'}"]
    with self.home() as qvm:
      try:
        words = ("run", "--stream", "--rm", *GUEST) if rm else STREAM
        for _ in range(rng.randrange(1, 3)):
          said += self.faults(rng) if who == "nothing" else []
          child = self.forks.start(qvm, *words)
          time.sleep(rng.uniform(0, 1.1) * self.seconds)
          struck = who != "nothing" and self.strike(qvm, child, who)
          said += [child.wait().stderr]
          self.gone(qvm)
        self.server.clear_faults()
        self.afterwards(qvm, rng, rm, said)
      except Violation as violation:
        raise Violation("\n".join([*said, str(violation)]))
    ended = "failed by faults" if who == "nothing" else "had ended"
    self.counts[f"{who}: {'killed' if struck else ended}"] += 1

  def faults(self, rng):
    """Faults of every kind while it comes, some for good; returns what they are."""
    kinds = [{"change": True}]
    while any("change" in kind or kind.get("etag") == '"same"' for kind in kinds):
      kinds = asset_fault(rng, len(self.assets[IMAGE].content))
    after = rng.randrange(6)
    for kind in kinds:
      self.server.fault(IMAGE, times=rng.choice([1, 1, 3, None]), after=after, **kind)
    return [f"{after} requests, then {kind}" for kind in kinds]

  def strike(self, qvm, child, who):
    """Kill some of the processes; whether there was one."""
    there = ours(qvm)
    serving = [pid for pid, words in there.items() if "--serve" in words]
    machine = [pid for pid, words in there.items() if "bin/qemu-system" in words]
    chosen = {"server": serving, "QEMU": machine, "all": list(there)}.get(who, [])
    if "qvm" in who:
      chosen = [child.pid] + (serving if "server" in who else [])
    for pid in chosen:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return bool(chosen)

  def gone(self, qvm):
    """Wait until nothing runs in that home: what serves ends with its machine."""
    until = time.monotonic() + PATIENCE
    while ours(qvm):
      demand(time.monotonic() < until, "processes are left", ours(qvm))
      time.sleep(0.01)

  def afterwards(self, qvm, rng, rm, said):
    """What must be true after a kill."""
    versions = {name: [asset] for name, asset in self.assets.items()}
    check_published(qvm, versions)
    disk = qvm.cache / "instances" / "a.qcow2"
    wrote = (qvm.home / "wrote").exists() and disk.exists()
    check_words(self.forks.run(qvm, "list"), (0,))
    check_locks(qvm)
    words = rng.choice([STREAM, RUN, ("run", "--name", "a", *GUEST)])
    said.append(" ".join(words))
    lies = any(lie in text for text in said for lie in LIES)
    for codes in [(0, 1), (0,)] if lies else [(0,)]:  # a lie that is kept is found in the end
      result = self.forks.run(qvm, *words)
      said.append(result.stderr)
      check_words(result, codes)
      self.gone(qvm)
    check_words(self.forks.run(qvm, "run", "--name", "a", *GUEST), (0,))
    check_complete(qvm, versions)
    check_words(self.forks.run(qvm, "pull", "--verify", *GUEST), (0,))
    demand(b"../base/" + IMAGE.encode() in disk.read_bytes()[:4096], "not put on its base")
    if wrote and not rm and not lies:
      command = ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 64k 4k", str(disk)]
      demand(b"verification failed" not in subprocess.check_output(command), "data are lost")
    check_words(self.forks.run(qvm, "rm", "a"), (0,))
    check_tidy(qvm, self.counts, self.forks)


def streaming(folder, forks, seed, numbers):
  """Kill at many points while an image is streamed; returns what was counted."""
  part = Streaming(folder, forks, seed)
  with contextlib.closing(part.server):
    return played(part, seed, numbers, "points")


# --- Crowd -----------------------------------------------------------------------------------

CROWD = (
  *[RUN] * 6,
  *[PULL] * 3,
  *[REFRESH] * 3,
  *[("clean", "--all")] * 3,
  ("run", "--name", "a", *GUEST),
  ("rm", "a"),
  ("rm", "a"),
  ("list",),
  ("list",),
)
# What a command may say when it fails because of what the others do.
HONEST = (
  r"there is no instance a; nothing was deleted",
  r"the instance a is already running \(.*\)(; nothing was deleted)?",
  r"/\S*\.qcow2 cannot be refreshed: these instances depend on it: \S+(, \S+)*",
  r"/\S* loses files as soon as they are there",
)


def crowd(folder, forks, seed, numbers):
  """Rounds of 20 fresh processes in one cache, which is empty at first."""
  rng, counts = random.Random(f"{seed}:crowd"), Counter()
  assets = {IMAGE: make_image(rng), QEMU: make_qemu(rng, "0.3"), TOOLS: make_tools(rng)}
  versions = {name: [asset] for name, asset in assets.items()}
  home = Path(folder) / "home"
  home.mkdir()
  with ReleaseServer() as server:
    publish(server, assets)
    qvm = Qvm(home, forks.program, server)
    qvm.env["QVM_TIMEOUT"] = "30"
    for number in numbers:
      if number:
        new_release(server, rng, versions, f"v9.{number}")
      crowd_round(qvm, forks, rng, versions, counts)
      counts["rounds"] += 1
  shutil.rmtree(home)
  return counts


def new_release(server, rng, versions, tag):
  """Publish a newer image, which `pull --refresh` is to find."""
  versions[IMAGE].append(make_image(rng))
  assets = {IMAGE: versions[IMAGE][-1].content}
  server.add_release(REPOS[IMAGE][0], tag, assets, published="2026-09-01T00:00:00Z")


def crowd_round(qvm, forks, rng, versions, counts):
  """Everything at once, then the checks."""
  children = []
  for words in rng.sample(CROWD, len(CROWD)):
    children.append(forks.start(qvm, *words, fresh=True))
    time.sleep(rng.choice([0, 0, 0.02, 0.1]))
  for child in children:
    result = child.wait()
    check_words(result)
    counts[f"{result.words[0]}: {result.code}"] += 1
    errors = [line[len("qvm: ") :] for line in result.stderr.splitlines()[-2:]]
    honest = any(re.fullmatch(text, line) for text in HONEST for line in errors)
    demand(result.code == 0 or honest, "not an honest error:", *result)
  forks.settled()
  check_locks(qvm)
  check_published(qvm, versions)
  check_words(forks.run(qvm, *RUN, fresh=True), (0,))
  check_complete(qvm, versions)
  listed = forks.run(qvm, "list", "--json")
  names = [row["name"] for row in json.loads(listed.stdout)]
  demand(set(names) <= {"a"}, f"instances are left: {names}")
  check_tidy(qvm, counts, forks)
  if names:
    check_words(forks.run(qvm, "run", "--name", "a", *GUEST, fresh=True), (0,))
    check_words(forks.run(qvm, "rm", "a"), (0,))


def power(folder, forks, seed, numbers):
  """Cut the power at a point of each action; returns what was counted."""
  cuts, counts = Cuts(folder, make_tools(random.Random(seed)).content, seed), Counter()
  for number in numbers:
    for action in POWERED:
      with violations(f"{action}, point {number}"):
        lost = cuts.one(number, action)
      counts[f"{action}: points"] += 1
      counts[f"{action}: lost something"] += any(lost)
    progress(number)
  return counts


# --- By hand ---------------------------------------------------------------------------------

PARTS = {
  "network": (network, 1000),
  "killing": (killing, 200),
  "signals": (interrupting, 200),
  "disk": (failing, 120),
  "sync": (syncing, 60),
  "streaming": (streaming, 500),
  "power": (power, 100),
  "preparing": (preparing, 60),
  "hostile": (hostile, 200),
  "crowd": (crowd, 3),
  "containers": (containers, 20),
}


def play(name, seed, numbers, root=ROOT, **more):
  """Play a part in a temporary folder, with the qvm.py in root; returns what was counted."""
  with tempfile.TemporaryDirectory(prefix="torture-") as folder:
    forks = Forks(folder, root)
    try:
      return PARTS[name][0](folder, forks, seed, numbers, **more)
    finally:
      forks.close()


def parts_of(words):
  """{part: count} from the command line; all of them when none is named."""
  parts = {}
  for word in words:
    if word in PARTS:
      parts[word] = PARTS[word][1]
    elif parts and word.isdecimal():
      parts[list(parts)[-1]] = int(word)
    else:
      sys.exit(f"torture: '{word}' is neither {', '.join(PARTS)} nor a count after one of them")
  return parts or {name: count for name, (_, count) in PARTS.items()}


def main():
  """Play the parts that are named; 1 after the first violation."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
  parser.add_argument("--only", type=int, metavar="K", help="only the schedule or point K")
  parser.add_argument("--fresh", action="store_true", help="network with fresh interpreters")
  parser.add_argument("parts", nargs="*", metavar="PART [COUNT]")
  options = parser.parse_args()
  for name, count in parts_of(options.parts).items():
    numbers = range(count) if options.only is None else [options.only]
    print(f"{name}, seed {options.seed}, {len(numbers)} times", flush=True)
    more = {"fresh": True} if name == "network" and options.fresh else {}
    began = time.monotonic()
    try:
      counts = play(name, options.seed, numbers, **more)
    except Violation as violation:
      text = str(violation).encode("utf-8", "backslashreplace").decode()
      print(f"VIOLATION in {name}, seed {options.seed}\n{text}", flush=True)
      return 1
    for what, number in sorted(counts.items()):
      print(f"  {number:6} {what}")
    print(f"  {time.monotonic() - began:6.1f} s", flush=True)
  return 0


if __name__ == "__main__":
  default_signals()
  sys.exit(main())
