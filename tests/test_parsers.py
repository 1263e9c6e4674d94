"""Whatever comes from outside, in any form: what reads it answers, or says what is wrong with it.

Command lines, release data, archives and images have tests of this kind beside their others, in
test_command_line, test_releases, test_archives, test_bundles and test_image.
"""

import contextlib
import gzip
import json
import os
import re
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import FREEBSD, ROOT, Qvm, bad_words, fails, works
from support_pythons import VERSION, every_python

import qvm as qvm_source

RUN = ("run", "--rm", "freebsd", "15.1")
many = settings(max_examples=150, deadline=None, database=None)
odd_text = st.text(max_size=40) | st.sampled_from(
  ["", "\0", "\n", "\x1b[2J", "\ud800", "٣", "９", "ß"]
)
near = st.sampled_from(["0", "9", "6G", "4T", "2847", "127.0.0.1:22", "1:2", "15.1", "x86-64",
                        "kvm:tcg", ".", ":", "-", "=", "+", "1e5", "inf", "nan"])  # fmt: skip
words = odd_text | st.lists(near | odd_text, max_size=3).map("".join)
json_value = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | odd_text,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
  max_leaves=6,
)


# --- Words ------------------------------------------------------------------------------------

READERS = [option.read for option in qvm_source.OPTIONS if option.metavar]
READERS += [qvm_source.parse_version, qvm_source.find_os]


@many
@given(st.sampled_from([r for r in READERS if r not in (os.path.abspath, str)]), words)
def test_any_value_of_an_option(read, text):
  try:
    value = read(text)
  except qvm_source.UsageError as error:
    assert qvm_source.printable(str(error)).isprintable()
    return
  except ValueError:
    assert "\0" in text  # which no command line can hold
    return
  if read in (qvm_source.parse_name, qvm_source.parse_version):
    assert value == text and re.fullmatch(r"[!-~]{1,100}", text) and "/" not in text
  if read is qvm_source.parse_memory:
    assert re.fullmatch("[0-9]+[MGT]?", value)
  if read is qvm_source.parse_address:
    assert 0 < value.port < 65536 and re.fullmatch("[0-9]{1,3}([.][0-9]{1,3}){3}", value.host)


@many
@given(
  st.dictionaries(
    st.sampled_from([
      "QVM_RELEASES_URL", "QVM_API_URL", "GITHUB_TOKEN", "GH_TOKEN", "QVM_TIMEOUT",
      "QVM_RETRY_DELAY", "QVM_CACHE_DIR", "XDG_CACHE_HOME",
    ]),
    words | words.map("http://".__add__) | words.map("file:///".__add__),
  )
)  # fmt: skip
@example({"QVM_RELEASES_URL": "http://x\nHost: y"})
@example({"GITHUB_TOKEN": "a\nb"})
@example({"GITHUB_TOKEN": "a\r\nX-Header: b"})
@example({"QVM_TIMEOUT": "1\n"})
def test_any_environment(environ):
  assert os.path.isabs(qvm_source.cache_from(environ).root)
  try:
    net = qvm_source.net_from(environ)
  except qvm_source.UsageError as error:
    if "TOKEN" in str(error):
      token = (environ.get("GITHUB_TOKEN") or environ.get("GH_TOKEN")).strip()
      assert token not in str(error) and qvm_source.printable(token) not in str(error)
    return
  assert re.fullmatch("[!-~]+", net.releases) and re.fullmatch("[!-~]*", net.api + net.token)
  assert 0.1 <= net.timeout <= 3600 and 0 <= net.retry_delay <= 3600


CONTROL = "a\nb\x1b[31m\t c,d%s'\"\\"


@pytest.mark.parametrize("name", ["QVM_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_a_folder_with_control_characters(qvm, tmp_path, name):
  env = {name: str(tmp_path / CONTROL)}
  result = works(qvm("run", "--name", "vm", "freebsd", "15.1", env=env))
  assert re.fullmatch(r"(qvm: [^\x00-\x09\x0b-\x1f]+\n)+", result.stderr)
  for command in (("list",), ("doctor", "--offline"), ("rm", "vm")):
    result = qvm(*command, env=env)
    assert result.returncode == 0 and "\x1b" not in result.stdout + result.stderr
  result = qvm("--dry-run", *RUN, env=env)
  shell = ["sh", "-c", f'for word in {result.stdout.strip()}; do printf "%s\\0" "$word"; done']
  words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")
  assert any(CONTROL.replace(",", ",,") in word for word in words)


# --- Release pages ----------------------------------------------------------------------------

HEX = "ab" * 32
pieces = st.sampled_from([
  'href="/x/releases/download/v1/freebsd-15.1-x86-64.qcow2"', 'href="/releases/download/', '"',
  'href="/x/releases/download/v1/%2e%2e"', "<", "sha256:" + HEX, "sha256:" + HEX + "0", "%", "%00",
  "%ff", '/releases/tag/v1"', '/releases/tag/v2.0"', '/releases/tag/../x"', "/releases/tag/", "\n",
])  # fmt: skip
pages = st.lists(pieces | odd_text, max_size=12).map("".join)


@many
@given(pages, pages, pages)
def test_any_release_page(latest, feed, fragment):
  net = qvm_source.Net("http://h", "", "", 1.0, 0.0, 1, threading.Event())
  answers = {"releases/latest": latest, "releases.atom": feed}

  def answer(net, url):
    text = next((text for end, text in answers.items() if url.endswith(end)), fragment)
    return text.encode("utf-8", "surrogatepass")

  before, qvm_source.fetch_bytes = qvm_source.fetch_bytes, answer
  try:
    releases = qvm_source.page_releases(net, "freebsd-builder")
  except qvm_source.QvmError as error:
    assert qvm_source.printable(str(error)).isprintable()
    return
  finally:
    qvm_source.fetch_bytes = before
  for release in releases:
    assert re.match(qvm_source.TAG_RE, release.tag)
    assert all(re.fullmatch("([0-9a-f]{64})?", digest) for digest in release.assets.values())
  for image in qvm_source.images_in("freebsd", releases):
    assert "/" not in image.asset and re.match(qvm_source.VERSION_RE, image.version)


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
HUGE = {
  "deep lists": b"[" * 1_000_000,
  "deep objects": b'{"a":' * 200_000,
  "40 MB": b"[" + b"0," * 20_000_000,
  "long text": b'"' + b"x" * 50_000_000,
  "long number": b"9" * 5_000_000,
  "many assets": b'[{"tag_name": "v1", "assets": [' + b"{}," * 9_000_000,
  "assets": b'[{"tag_name": "v1", "assets": [' + b"{}," * 2_700_000 + b"{}]}]",
}


@pytest.mark.parametrize("body", HUGE.values(), ids=list(HUGE))
def test_huge_release_data_take_no_huge_memory(qvm, server, body):
  server.fault("freebsd-builder/releases", origin="api", times=None, body=body)
  result = qvm("search", "freebsd", code=LIMIT)
  assert result.returncode == 0 and re.fullmatch("(qvm: .+\n)*", result.stderr), result.stderr
  if body == HUGE["assets"] and VERSION > (3, 6):  # it is read, and no asset in it has a name
    assert (result.stdout.split(), result.stderr) == (["OS", "VERSION", "X86-64", "ARM64"], "")
  else:
    assert "15.1" in result.stdout
    assert "reading the release pages instead" in result.stderr


@every_python
def test_long_numbers_in_release_data_take_no_time(qvm, server, python):
  """Python before 3.10.7 has no limit of its own."""
  server.fault("freebsd-builder/releases", origin="api", times=None, body=HUGE["long number"])
  result = works(qvm("search", "freebsd", python=python))
  assert "15.1" in result.stdout and "reading the release pages instead" in result.stderr


# --- Archives ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_archive_of_a_million_members(tmp_path):
  """Gzip streams may follow one another: these are 100 of 10,000 headers each."""
  info = tarfile.TarInfo("./share/x")
  info.type = tarfile.DIRTYPE
  packed = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) * 10_000, 1)
  (tmp_path / "x.tar").mkdir()
  with open(tmp_path / "x.tar" / "part", "wb") as file:
    for _ in range(100):
      file.write(packed)
  code = LIMIT + "qvm.unpack_aside(*sys.argv[1:], ())"
  paths = [str(tmp_path / "x.tar" / "part"), str(tmp_path / "x.tmp")]
  result = Qvm(tmp_path, ROOT / "qvm.py")(*paths, code=code)
  assert (
    "qvm.RefusedError: x.tar is refused: its member './share/x' is one too many" in result.stderr
  )
  assert list(tmp_path.rglob("*")) == [tmp_path / "x.tar"]


@many
@given(st.binary(max_size=40), st.integers(0, 40))
def test_any_header_of_an_overlay(tmp_path_factory, content, place):
  path = tmp_path_factory.getbasetemp() / "overlay"
  path.write_bytes(b"QFI\xfb\0\0\0\3" + place.to_bytes(8, "big") + content)
  assert isinstance(qvm_source.backing_file(str(path)), (str, type(None)))


# --- Records ---------------------------------------------------------------------------------

fields = st.sampled_from([*qvm_source.Instance._fields, *qvm_source.DownloadNote._fields, "sha256",
                          "bytes", "release", "asset_sha256", "size", "time"])  # fmt: skip
records = st.dictionaries(fields, json_value, max_size=8)
sound = {"name": "vm", "os": "freebsd", "version": "15.1", "arch": "x86-64"}


@pytest.mark.slow
@many
@given(records, st.booleans())
@example({"ssh": "\ud800"}, True)
@example({"version": "\x1b[2J\n"}, True)
def test_any_record(tmp_path_factory, record, whole):
  cache = tmp_path_factory.mktemp("cache")
  for name in ("instances", "base", "downloads/x"):
    (cache / name).mkdir(parents=True)
  text = json.dumps({**(sound if whole else {}), **record})
  for name in ("instances/vm.json", "base/x.json", "base/x.json.new", "downloads/x/note.json"):
    (cache / name).write_text(text)
  for name in ("instances/vm.qcow2", "base/x.qcow2", "downloads/x/part"):
    (cache / name).write_bytes(b"12345")
  (cache / "downloads/x/map").write_bytes(b"\1")
  file = qvm_source.PartFile(str(cache / "downloads/x"), "x", str(record.get("url")))
  assert file.done == (0 if file.total is None else file.total) <= 5
  file.close()
  files = qvm_source.Cache(str(cache)).instance("vm")
  try:
    assert all(isinstance(text, str) for text in qvm_source.read_instance(files))
  except qvm_source.QvmError as error:
    assert str(files.record) in str(error)
  (row,) = qvm_source.list_instances(qvm_source.Cache(str(cache)))
  assert row.name == "vm" and row.state == "stopped"
  assert isinstance(qvm_source.record_of(str(cache / "base/x.qcow2")), qvm_source.AssetRecord)


EDITED = [
  b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"name": "../vm", "os": "freebsd"}',
  b'{"name": "vm", "os": "\\ud800", "version": "\\u001b[2J", "arch": "\\n", "ssh": "\\ud800"}',
  b'{"sha256": 5, "bytes": "x", "url": [], "release": {}}', b'{"bytes": ' + b"9" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("content", EDITED, ids=lambda content: repr(content[:20]))
def test_records_that_somebody_has_edited(full, content):
  works(full("run", "--name", "vm", "freebsd", "15.1"))
  places = ["instances/vm.json", f"base/{FREEBSD}.json", "bin/qemu-img.json"]
  for path in places:
    path = full.cache / path
    path.chmod(0o644)
    path.write_bytes(content)
  (full.cache / "downloads" / f"{FREEBSD}.qcow2").mkdir()
  (full.cache / "downloads" / f"{FREEBSD}.qcow2" / "note.json").write_bytes(content)
  for code, command in (
    (0, ("list",)),
    (0, ("list", "--json")),
    (0, ("doctor", "--offline")),
    (0, ("clean", "--dry-run")),
    (b"ud800" in content, ("run", "--name", "vm", "freebsd", "15.1")),  # else it is rebuilt
    (0, RUN),
    (1, ("stop", "vm")),
    (125, ("ssh", "vm")),
    (1, ("pull", "--verify", "freebsd", "15.1")),
    (0, ("rm", "vm")),
  ):
    result = full(*command)
    assert result.returncode == code, (command, result.stderr)
    assert not bad_words(result.stderr), result.stderr
    assert bool(result.stderr) >= bool(code)
    assert "\x1b" not in result.stderr + result.stdout
  assert not [path for path in full.files() if path.startswith("instances/vm")]


# --- Secrets ----------------------------------------------------------------------------------

TOKEN = "ghp_s3cretT0ken"


@pytest.mark.parametrize("name", ["GITHUB_TOKEN", "GH_TOKEN"])
def test_the_token_reaches_the_api_and_nothing_else(qvm, server, tmp_path, name):
  qvm.env[name] = TOKEN
  qvm.play(record=str(tmp_path / "record"))
  server.fault("releases/tags/v0.16.0", origin="api", status=503)
  moved = f"{server.github_url}/elsewhere"
  server.fault("resources/releases/tags", origin="api", times=None, redirect=moved)
  log = tmp_path / "console"
  said = [qvm("run", "--name", "vm", "--console-log", str(log), "freebsd", "15.1")]
  said += [qvm("search", "freebsd"), qvm("pull", "--verify", "freebsd", "15.1"), qvm("list")]
  said += [qvm("doctor"), qvm("--dry-run", *RUN), qvm("pull", "--refresh", "netbsd", "10.1")]
  server.fault("", origin=None, times=None, status=401)
  said += [qvm("search"), qvm("pull", "openbsd", "7.9")]
  assert not [each for each in said if TOKEN in each.stdout + each.stderr]
  for each in server.log:
    carried = TOKEN in str(each.headers) + each.target
    assert carried == (each.origin == "api"), each
  assert server.requests("/elsewhere", "github")
  assert TOKEN not in str(qvm.record(tmp_path / "record")["argv"])
  found = subprocess.run(["grep", "-rl", TOKEN, str(qvm.home), str(log)], stdout=subprocess.PIPE)
  assert found.stdout == b""


def test_folders_are_for_their_user_alone(qvm):
  works(qvm("run", "--name", "vm", "freebsd", "15.1", preexec_fn=lambda: os.umask(0)))
  for path in [qvm.cache, *qvm.cache.iterdir()]:
    assert path.stat().st_mode & 0o777 == 0o700, path


def test_nothing_is_hidden_in_an_error_of_the_environment(qvm):
  fails(qvm(*RUN, env={"GITHUB_TOKEN": "s3cret\x1b\nx"}), "GITHUB_TOKEN", code=2)
  result = qvm(*RUN, env={"GITHUB_TOKEN": "s3cret\x1b\nx"})
  assert "s3cret" not in result.stderr and not Path(qvm.cache).exists()


def test_a_message_waits_where_another_program_has_made_stderr_non_blocking(monkeypatch):
  output, stderr = os.pipe()
  saved, select, seen = os.dup(2), qvm_source.select.select, []
  os.set_blocking(stderr, False)
  with contextlib.suppress(BlockingIOError):
    while True:
      os.write(stderr, bytes(1 << 12))

  def drained(*sets):
    seen.append(os.read(output, 1 << 20))
    return select(*sets)

  monkeypatch.setattr(qvm_source.select, "select", drained)
  os.dup2(stderr, 2)
  try:
    qvm_source.say("what failed")
  finally:
    os.dup2(saved, 2)
  for fd in (saved, stderr):
    os.close(fd)
  assert len(seen) == 1 and os.read(output, 1 << 20) == b"qvm: what failed\n"
  os.close(output)
