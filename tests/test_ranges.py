"""Several connections for one file: what they leave at any moment, and servers that mind."""

import json
import os
import random
import shutil
import threading
import types
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import HOST, IMAGE, PULL, ROOT, Qvm, sha256, wait_for
from support_network import changed_meanwhile, check_works, ranges

import qvm as qvm_source

BLOCK = qvm_source.BLOCK_BYTES
URL = "http://x/y"
EAGER = {
  "PARALLEL_MIN_BYTES = 32 << 20": "PARALLEL_MIN_BYTES = 1 << 20",
  "SLOW_AFTER_SECONDS = 1.0": "SLOW_AFTER_SECONDS = 0.0",
}


@pytest.fixture(scope="module")
def big(image):
  """An image of 6 MB of which no two parts are the same, and whose last block is not whole."""
  return image + random.Random(1).randbytes(6_000_001 - len(image))


@pytest.fixture
def eager(full, server, big, tmp_path):
  """A qvm that soon thinks a connection slow, without an image; 8 MB/s each."""
  text = (ROOT / "qvm.py").read_text()
  for old, new in EAGER.items():
    assert text.count(old) == 1
    text = text.replace(old, new)
  (tmp_path / "qvm.py").write_text(text)
  shutil.rmtree(str(full.cache / "base"))
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, big)
  server.rate = 8e6
  return Qvm(full.home, tmp_path / "qvm.py", server)


def asked(server):
  """The first bytes of the ranges that were asked for."""
  return [int(text[6:].split("-")[0]) if text else 0 for text in ranges(server)]


def quiet(result):
  return not any(word in result.stderr for word in ("trying again", "changed", "another part"))


def test_a_slow_connection_gets_help(eager, server, big):
  result = eager(*PULL)
  check_works(eager, result, big)
  assert server.wait_idle()
  assert len(asked(server)) >= 4 and quiet(result)
  assert all(start % BLOCK == 0 for start in asked(server))
  for each in server.requests(IMAGE, "cdn")[1:]:
    assert "range" not in each.headers or each.headers["if-range"].startswith('"0x8DE')


@pytest.mark.parametrize("name", [f"qemu-system-x86_64-{HOST}.tar", IMAGE])
def test_a_fast_or_a_small_file_is_fetched_by_one(full, server, big, name):
  shutil.rmtree(str(full.cache / "base"))
  shutil.rmtree(str(full.cache / "qemu"))
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, big)
  assert full(*PULL).returncode == 0
  assert ranges(server, name) == [None]


@pytest.mark.parametrize(
  "fault",
  [
    {"status": 429},
    {"status": 503},
    {"status": 403},
    {"status": 404},
    {"status": 416},
    {"cut": "connect"},
    {"cut": 0},
    {"ignore_range": True},
    {"content_range": "bytes 0-9/10"},
    {"etag": '"other"', "ignore_if_range": True},
    {"html": True},
    {"gzip": True},
  ],
  ids=str,
)
def test_a_server_that_minds_others(eager, server, big, fault):
  """The first connection goes on, and nothing is said."""
  server.rate = 4e6  # it should not be the first one that asks once more
  server.fault(IMAGE, after=1, times=3, **fault)
  result = eager(*PULL)
  check_works(eager, result, big)
  assert quiet(result), result.stderr


@pytest.mark.parametrize("more", [{"no_ranges": True}, {"weak_etag": True}, {"no_validator": True}])
def test_a_server_without_ranges(eager, server, big, more):
  server.fault(IMAGE, times=None, **more)
  check_works(eager, eager(*PULL), big)
  assert ranges(server) == [None]


def test_others_that_break_later(eager, server, big):
  server.fault(IMAGE, after=1, times=2, cut=300_000)
  server.fault(IMAGE, after=1, times=1, cut=300_001, reset=True)
  result = eager(*PULL)
  check_works(eager, result, big)
  assert quiet(result)


def test_the_first_one_breaks(eager, server, big):
  server.fault(IMAGE, times=1, cut=1_000_000)
  check_works(eager, eager(*PULL), big)


def test_one_that_stalls_holds_nobody_up(eager, server, big):
  server.fault(IMAGE, after=1, times=1, stall=100_000)
  check_works(eager, eager(*PULL, env={"QVM_TIMEOUT": "3600"}), big)


def test_an_object_that_changes_meanwhile(eager, server, big):
  """Neither file nor digest is ever made of two objects."""
  other = big[:512] + big[:511:-1]
  result = changed_meanwhile(eager, server, other, 500_000)
  check_works(eager, result, other)


def paths(qvm):
  """The part, the note and the map."""
  return [qvm.cache / "downloads" / IMAGE / name for name in ("part", "note.json", "map")]


def killed_midway(qvm, server, big, count=30):
  """Kill -9 once so many blocks are there; returns the blocks that the map marks."""
  part, _, marks = paths(qvm)
  process = qvm.start(*PULL)
  wait_for(lambda: marks.exists() and marks.read_bytes().count(1) >= count)
  process.kill()
  process.communicate()
  assert server.wait_closed()  # else a request that is still to be read comes into the next log
  server.clear_log()
  found = [n for n, mark in enumerate(marks.read_bytes()) if mark]
  content = part.read_bytes()
  for n in found:
    assert content[n * BLOCK : (n + 1) * BLOCK] == big[n * BLOCK : (n + 1) * BLOCK]
  return found


def test_kill_9_marks_nothing_that_is_missing(eager, server, big):
  server.rate = 1e6
  for count in (20, 40):
    there = killed_midway(eager, server, big, count)
    assert there != list(range(len(there)))
  server.rate = 8e6
  result = eager(*PULL)
  check_works(eager, result, big)
  assert "going on at" in result.stderr
  assert server.wait_idle()
  missing = len(big) - len(there) * BLOCK
  sent = sum(each.sent for each in server.requests(IMAGE, "cdn"))
  assert missing <= sent < missing + 16 * BLOCK  # some is under way when a connection is cut short


@pytest.mark.parametrize("damage", ["short", "long", "odd", "gone", "part cut", "part gone"])
def test_a_map_that_does_not_fit(eager, full, server, big, damage):
  killed_midway(eager, server, big)
  part, _, marks = paths(eager)
  data = marks.read_bytes()
  if damage == "gone":
    marks.unlink()
  elif damage == "part cut":
    os.truncate(str(part), BLOCK)
  elif damage == "part gone":
    part.unlink()
  else:
    marks.write_bytes({"short": data[:-1], "long": data + b"\1", "odd": data[:40] + b"\3"}[damage])
  server.rate = None
  check_works(full, full(*PULL), big)
  assert ranges(server) == [None]


def test_a_map_that_lies(eager, server, big):
  """The digest finds out."""
  killed_midway(eager, server, big)
  part, _, marks = paths(eager)
  os.truncate(part, len(big))
  marks.write_bytes(b"\1" * len(marks.read_bytes()))
  server.rate = None
  result = eager(*PULL)
  check_works(eager, result, big)
  assert "digest" in result.stderr


@pytest.mark.parametrize("change", ["block", "validator", "total"])
def test_a_note_of_another_kind_counts_for_nothing(eager, full, server, big, change):
  """Such as that of a qvm with other blocks, or one that a kill has left without a map."""
  killed_midway(eager, server, big)
  _, note, _ = paths(eager)
  value = json.loads(note.read_text())
  value[change] = {"block": BLOCK * 2, "validator": "", "total": None}[change]
  note.write_text(json.dumps(value))
  server.rate = None
  check_works(full, full(*PULL), big)
  assert ranges(server) == [None]


def test_clean_takes_it_all(eager, server, big):
  killed_midway(eager, server, big)
  result = eager("clean")
  assert result.returncode == 0 and f"downloads/{IMAGE}\n" in result.stdout
  assert os.listdir(str(eager.cache / "downloads")) == []


# --- The book-keeping -------------------------------------------------------------------------


def make(folder, total, done=0):
  """A file on its way whose object is known, with its beginning already there."""
  file = qvm_source.PartFile(str(folder), "name", URL)
  file.create(qvm_source.DownloadNote(URL, '"v"', total))
  content = random.Random(total).randbytes(total)
  if done:
    span = file.claim()
    file.write(span, content[:done])
    file.release(span)
  return file, content


@pytest.mark.slow
@given(
  st.integers(1, 12 * BLOCK),
  st.floats(0, 1),
  st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3 * BLOCK)), max_size=60),
)
@example(8 * BLOCK, 0.0, [(0, 0), (0, 0), (3, 1)])  # a block is begun in the middle of a gap
@settings(deadline=None, database=None, max_examples=150)
def test_any_order(tmp_path_factory, total, share, steps):
  """Spans that come and go: what is marked is there, the count is right, and so is the hash."""
  folder = tmp_path_factory.mktemp("any")
  part, content = make(folder, total, int(total * share) if share < 1 else 0)
  spans = []
  for which, count in steps:
    if which == 0 or not spans:
      span = part.claim() or part.steal(split=True)
      spans += [span] if span else []
    elif which == 1:
      part.release(spans.pop(count % len(spans)))
    else:
      span = spans[which % len(spans)]
      part.write(span, content[span.position : span.position + count])
    check(part, content)
  for span in spans:
    part.release(span)
  check(part, content)
  again = qvm_source.PartFile(str(folder), "name", URL)
  check(again, content)
  for each in (again, part):
    span = each.claim()
    while span:
      each.write(span, content[span.position : span.end])
      each.release(span)
      span = each.claim()
    each.hash_all(threading.Event())
    assert each.complete() and each.hashed == total
    each.close()
  assert again.hash.hexdigest() == part.hash.hexdigest() == sha256(content)
  assert Path(part.part).read_bytes() == content
  shutil.rmtree(str(folder))


def check(file, content):
  """What the map says is so, and every byte is counted once."""
  data = Path(file.part).read_bytes()
  marked = [n for n, state in enumerate(file.blocks) if state == qvm_source.THERE]
  marks = Path(file.map).read_bytes()
  assert marked == [n for n, mark in enumerate(marks) if mark == 1] and set(marks) <= {0, 1}
  for n in marked:
    assert data[n * BLOCK : (n + 1) * BLOCK] == content[n * BLOCK : (n + 1) * BLOCK]
  ends = [*file.begun.values(), *(span.position for span in file.spans if span.left)]
  for end in ends:
    assert data[end // BLOCK * BLOCK : end] == content[end // BLOCK * BLOCK : end]
  whole = sum(min(BLOCK, len(content) - n * BLOCK) for n in marked)
  assert file.done == whole + sum(end % BLOCK for end in ends)
  assert data[: file.hashed] == content[: file.hashed]


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=9))
@settings(deadline=None, database=None, max_examples=50)
def test_a_body_of_unknown_length(tmp_path_factory, sizes):
  folder = tmp_path_factory.mktemp("any")
  file = qvm_source.PartFile(str(folder), "name", URL)
  file.create(qvm_source.DownloadNote(URL, '"v"', None))
  content = random.Random(1).randbytes(sum(sizes))
  span = file.claim(lead=True)
  for size in sizes:
    file.write(span, content[span.position : span.position + size])
    assert file.done == span.position and not file.complete()
  again = qvm_source.PartFile(str(folder), "name", URL)
  assert again.done == 0 and again.total is None, "it could not be told from a part"
  file.set_total(span.position)
  file.hash_all(threading.Event())
  assert file.complete() and file.hash.hexdigest() == sha256(content)
  file.close(remove=True)
  assert os.listdir(str(folder)) == []


def test_what_is_cancelled_is_not_written(tmp_path):
  file, content = make(tmp_path, 4 * BLOCK)
  span = file.claim()
  file.close()
  with pytest.raises(qvm_source.Cancelled):
    file.write(span, content)
  assert os.path.getsize(file.part) == 0


def test_a_whole_file_that_is_cancelled_or_cut_while_it_is_hashed(tmp_path):
  make(tmp_path, 4 * BLOCK, 4 * BLOCK)[0].close()
  file, cancelled = qvm_source.PartFile(str(tmp_path), "name", URL), threading.Event()
  cancelled.set()
  with pytest.raises(qvm_source.Cancelled):
    file.hash_all(cancelled)
  os.truncate(file.part, BLOCK)
  with pytest.raises(qvm_source.QvmError, match="/part became shorter while it was read"):
    file.hash_all(threading.Event())


@pytest.mark.parametrize("address", ["file:///x", "http://user:secret@127.0.0.1/x"])
def test_addresses_that_only_urllib_understands(address):
  connections = qvm_source.Connections(qvm_source.net_from({}), URL)
  assert connections.open_address(address, {}, 1) is None


def test_a_connection_that_has_been_idle_for_long_is_closed(monkeypatch):
  monkeypatch.setattr(qvm_source, "IDLE_SECONDS", 0.0)
  closed = []
  link = types.SimpleNamespace(sock="open", close=lambda: closed.append("link"))
  body = types.SimpleNamespace(close=lambda: closed.append("body"))
  connections = qvm_source.Connections(qvm_source.net_from({}), URL)
  connections.keep((body, link), complete=True)
  assert closed == ["body"] and connections.take_idle() is None and closed == ["body", "link"]


def test_a_helper_that_comes_while_the_file_starts_over(tmp_path):
  """Only the lead fetches what has no length yet; a helper would hold all there could ever be."""
  file, content = make(tmp_path, 4 * BLOCK, BLOCK)
  file.discard()
  helper = file.claim() or file.steal(split=True)
  file.create(qvm_source.DownloadNote(URL, '"w"', 4 * BLOCK))
  if helper:
    file.release(helper)
  assert helper is None
  check(file, content)


def test_a_body_of_unknown_length_is_not_shared(tmp_path):
  file, content = make(tmp_path, 4 * BLOCK)
  file.discard()
  file.create(qvm_source.DownloadNote(URL, '"w"', None))
  span = file.claim(lead=True)
  assert file.steal(split=True) is None and span.end == qvm_source.UNKNOWN


class Ending(qvm_source.Span):
  """A span that another thread releases as soon as somebody looks at it, if that may happen."""

  @property
  def left(self):
    def release():
      if self.file.lock.acquire(False):
        self.file.lock.release()
        self.file.release(self)

    thread = threading.Thread(target=release)
    thread.start()
    thread.join()
    return self.end - self.position


def test_the_lead_waits_for_who_comes_behind_one_that_ends(tmp_path):
  """What another connection still fetches is not over because a third one has just ended."""
  net = qvm_source.net_from({})
  asset = qvm_source.Asset("repo", "v1", "name")
  lead = qvm_source.Download(net, asset, str(tmp_path))
  lead.file.create(qvm_source.DownloadNote(URL, '"v"', 2 * BLOCK))
  file, first, second = lead.file, lead.file.claim_blocks(0, 1), lead.file.claim_blocks(1, 2)
  file.write(first, bytes(BLOCK))
  file.spans[0] = Ending(BLOCK, BLOCK)
  file.spans[0].file = file
  net.cancelled.set()  # it would wait
  with pytest.raises(qvm_source.Cancelled):
    lead.next_span()
  assert second in file.spans


def test_one_that_is_closed_before_it_hashes_has_not_failed(tmp_path):
  """As when a machine ends while its image comes: its log blamed a bad file descriptor."""
  file, content = make(tmp_path, 4 * BLOCK)
  span, hashing = file.claim(), file.hashing

  class Closing:
    def acquire(self, wait):
      file.hashing = hashing
      file.close()
      return hashing.acquire(wait)

    release = staticmethod(hashing.release)

  file.hashing = Closing()
  with pytest.raises(qvm_source.Cancelled):
    file.write(span, content)
  assert hashing.acquire(False)


def test_what_is_stolen_goes_on_where_it_was(tmp_path, monkeypatch):
  monkeypatch.setattr(qvm_source, "STALL_SECONDS", -1)  # everything has been silent for so long
  file, content = make(tmp_path, 4 * BLOCK)
  old = file.claim()
  file.write(old, content[:100])
  span = file.steal(split=False)
  assert (span.position, span.end) == (100, 4 * BLOCK)
  file.write(old, content[100:])
  check(file, content)
  file.release(old)
  file.write(span, content[100:])
  check(file, content)
  assert file.complete()
