"""The release server answers as UPSTREAM.md says, and breaks as it is told to."""

import functools
import gzip
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urljoin, urlsplit
from xml.etree import ElementTree

import pytest
import release_server
from release_server import ReleaseServer
from support import DEADLINE, ended

BODY = bytes(range(256)) * 1000
SIZE = len(BODY)
NAME = "freebsd-15.1 & <x>+1-x86-64.qcow2"
QUOTED = "freebsd-15.1%20%26%20%3Cx%3E%2B1-x86-64.qcow2"
ATOM = "{http://www.w3.org/2005/Atom}"


class Reply(NamedTuple):
  status: int
  headers: Any
  body: bytes


@pytest.fixture
def server() -> Iterator[ReleaseServer]:
  with ReleaseServer() as started:
    started.add_release("b", "v1", {NAME: BODY, "two.tar": b"2"})
    yield started


def get(url: str, headers: Mapping[str, str] = {}, method: str = "GET") -> Reply:
  """One request on a connection of its own, following no redirect."""
  parts = urlsplit(url)
  connection = http.client.HTTPConnection(parts.netloc, timeout=DEADLINE)
  try:
    query = f"?{parts.query}" if parts.query else ""
    connection.request(method, parts.path + query, headers=dict(headers))
    response = connection.getresponse()
    return Reply(response.status, response.headers, response.read())
  finally:
    connection.close()


def signed(server: ReleaseServer, name: str = QUOTED, tag: str = "v1") -> str:
  """A signed address of the asset."""
  reply = get(f"{server.url}/b/releases/download/{tag}/{name}")
  assert reply.status == 302
  return str(reply.headers["Location"])


def cdn(server: ReleaseServer, headers: Mapping[str, str] = {}, method: str = "GET") -> Reply:
  """The asset, from a newly signed address."""
  return get(signed(server), headers, method)


# --- github ----------------------------------------------------------------------------------


def test_github_pages(server: ReleaseServer) -> None:
  server.add_release("b", "v3-rc", {}, published="2026-09-01T00:00:00Z", prerelease=True)
  server.add_release("b", "v4", {"d": b""}, published="2026-10-01T00:00:00Z", draft=True)
  server.add_release("b", "v2", {}, published="2026-08-01T00:00:00Z")
  server.add_release("b", "v0", {}, published="2025-08-01T00:00:00Z")
  server.add_release("drafts", "v1", {}, draft=True)
  latest = get(f"{server.url}/b/releases/latest")
  assert (latest.status, latest.body) == (302, b"")
  assert latest.headers["Location"] == f"{server.url}/b/releases/tag/v2"
  for method in "GET", "HEAD":
    for path, status in [
      ("b/releases/latest", 302),
      ("drafts/releases/latest", 404),
      ("none/releases/latest", 404),
      ("b/releases/tag/v3-rc", 200),
      ("b/releases/tag/v4", 404),
      ("b/releases/download/v1/two.tar", 302),
      ("b/releases/download/v1/three.tar", 404),
      ("b/releases/download/v4/d", 404),
      ("b/releases/expanded_assets/v9", 404),
      ("b/releases.atom", 200),
      ("none/releases.atom", 404),
      ("b", 404),
    ]:
      reply = get(f"{server.url}/{path}", method=method)
      assert reply.status == status, path
      if status == 404:
        assert reply.headers["Content-Type"].startswith("text/html")
        assert bool(reply.body) == (method == "GET")
  assert get(f"{server.url}/b/releases/latest", method="POST").status == 405


def test_signed_address(server: ReleaseServer) -> None:
  addresses = [signed(server), signed(server)]
  parts = [urlsplit(address) for address in addresses]
  assert parts[0].hostname != urlsplit(server.url).hostname
  assert addresses[0].startswith(server.cdn_url)
  assert parts[0].path == parts[1].path and QUOTED in parts[0].path
  query = parse_qs(parts[0].query, strict_parsing=True)
  assert query["rscd"] == [f"attachment; filename={NAME}"] and "se" in query
  assert query["sig"] != parse_qs(parts[1].query)["sig"]
  assert 500 < len(parts[0].query) < 1000
  assert get(addresses[0]).body == BODY
  with urllib.request.urlopen(
    f"{server.url}/b/releases/download/v1/{QUOTED}", timeout=DEADLINE
  ) as reply:
    assert reply.read() == BODY


def test_signatures_end(server: ReleaseServer) -> None:
  url = signed(server)
  for bad in url.partition("?")[0], url.replace(QUOTED, "two.tar"), url.replace("sig=", "sig=x"):
    reply = get(bad)
    assert reply.status == 403 and b"<Code>AuthenticationFailed" in reply.body
    assert reply.headers["Content-Type"] == "application/xml"
  server.signed_uses = 2
  assert [get(url).status for _ in range(3)] == [200, 200, 403]
  server.signed_uses = None
  server.expire_signatures()
  assert get(url).status == 403
  server.signed_seconds = -1
  assert cdn(server).status == 403
  server.signed_seconds = 9
  url = signed(server)
  server.remove_asset("b", "v1", NAME)
  assert get(url).status == 404
  assert get(f"{server.url}/b/releases/download/v1/{QUOTED}").status == 404


def test_expanded_assets(server: ReleaseServer) -> None:
  server.add_release("b", "v1/x", {"a": b"x" * 1536}, digests=False)
  text = get(f"{server.url}/b/releases/expanded_assets/v1").body.decode()
  base = "/cross-platform-actions/b"
  assert re.findall('href="([^"]+)"', text) == [
    f"{base}/releases/download/v1/{QUOTED}",
    f"{base}/releases/download/v1/two.tar",
    f"{base}/archive/refs/tags/v1.zip",
    f"{base}/archive/refs/tags/v1.tar.gz",
  ]
  assert "freebsd-15.1 &amp; &lt;x&gt;+1" in text and ">250 KB<" in text and ">1 Bytes<" in text
  assert f">sha256:{hashlib.sha256(BODY).hexdigest()}<" in text
  text = get(f"{server.url}/b/releases/expanded_assets/v1%2Fx").body.decode()
  link = re.findall('href="([^"]+)"', text)[0]
  assert "sha256" not in text and "1.5 KB" in text
  assert len(get(get(urljoin(server.url, link)).headers["Location"]).body) == 1536


def test_feed(server: ReleaseServer) -> None:
  for day in range(1, 13):
    published = f"2026-08-{day:02}T00:00:00Z"
    draft, prerelease = day == 12, day == 11
    server.add_release("b", f"w{day}", {}, published=published, draft=draft, prerelease=prerelease)
  root = ElementTree.fromstring(get(f"{server.url}/b/releases.atom").body)
  entries = root.findall(f"{ATOM}entry")
  assert [entry.findtext(f"{ATOM}title") for entry in entries] == [
    f"w{day}" for day in range(11, 1, -1)
  ]
  number = release_server.repository_id("b")
  assert entries[0].findtext(f"{ATOM}id") == f"tag:github.com,2008:Repository/{number}/w11"
  link = entries[0].find(f"{ATOM}link")
  assert link is not None
  href = f"{server.url}/b/releases/tag/w11"
  assert link.attrib == {"rel": "alternate", "type": "text/html", "href": href}


# --- api -------------------------------------------------------------------------------------


def test_api_data(server: ReleaseServer) -> None:
  server.add_release("b", "v2", {"old": b"o"}, digests=False, published="2026-08-01T00:00:00Z")
  server.add_release("b", "v3", {}, prerelease=True, published="2026-08-02T00:00:00Z")
  server.add_release("b", "v4", {}, draft=True)
  data = json.loads(get(f"{server.api_url}/b/releases").body)
  assert [(each["tag_name"], each["prerelease"], each["draft"]) for each in data] == [
    ("v3", True, False),
    ("v2", False, False),
    ("v1", False, False),
  ]
  assert data[1]["assets"][0]["digest"] is None
  asset = json.loads(get(f"{server.api_url}/b/releases/tags/v1").body)["assets"][0]
  assert asset["name"] == NAME and asset["size"] == SIZE and asset["state"] == "uploaded"
  assert asset["digest"] == f"sha256:{hashlib.sha256(BODY).hexdigest()}"
  assert get(get(asset["browser_download_url"]).headers["Location"]).body == BODY
  latest = json.loads(get(f"{server.api_url}/b/releases/latest").body)
  assert (latest["tag_name"], latest["published_at"]) == ("v2", "2026-08-01T00:00:00Z")
  for path in "b/releases/tags/v4", "b/releases/tags/v9", "none/releases", "none/releases/latest":
    reply = get(f"{server.api_url}/{path}")
    assert (reply.status, json.loads(reply.body)["message"]) == (404, "Not Found")


def test_api_pages(server: ReleaseServer) -> None:
  for number in range(2, 6):
    server.add_release("b", f"v{number}", {})
  url, seen, rels = f"{server.api_url}/b/releases?per_page=2", [], []
  while url:
    reply = get(url)
    seen.append([each["tag_name"] for each in json.loads(reply.body)])
    links = {rel: to for to, rel in re.findall('<(.+?)>; rel="(.+?)"', reply.headers["Link"])}
    rels.append(list(links))
    url = links.get("next", "")
  assert seen == [["v5", "v4"], ["v3", "v2"], ["v1"]]
  assert rels == [["next", "last"], ["prev", "next", "last", "first"], ["prev", "first"]]
  assert get(f"{server.api_url}/b/releases?per_page=100").headers["Link"] is None
  assert get(f"{server.api_url}/b/releases?page=9&per_page=x").body == b"[]"


def test_api_quota(server: ReleaseServer) -> None:
  url, token = f"{server.api_url}/b/releases", {"Authorization": "Bearer t"}
  server.api_quota = 1
  rows = [({}, 200, "0"), ({}, 403, "0"), (token, 200, "4999"), ({}, 403, "0")]
  for headers, status, left in rows:
    reply = get(url, headers)
    assert (reply.status, reply.headers["x-ratelimit-remaining"]) == (status, left)
    assert int(reply.headers["x-ratelimit-reset"]) > time.time()
    if status == 403:
      assert json.loads(reply.body)["message"].startswith("API rate limit exceeded for 127.0.0.1")
  server.api_quota = None
  assert get(url).headers["x-ratelimit-limit"] == "60"


# --- cdn -------------------------------------------------------------------------------------


def test_ranges(server: ReleaseServer) -> None:
  full = cdn(server)
  etag, modified = full.headers["ETag"], full.headers["Last-Modified"]
  assert re.fullmatch('"0x[0-9A-F]+"', etag) and modified == "Fri, 31 Jul 2026 00:00:00 GMT"
  assert full.headers["Accept-Ranges"] == "bytes"
  assert full.headers["Content-Type"] == "application/octet-stream"
  assert full.headers["Content-Disposition"] == f"attachment; filename={QUOTED}"
  rows: list[tuple[str, str | None, slice | None]] = [
    ("bytes=10-", None, slice(10, None)),
    ("bytes=10-19", None, slice(10, 20)),
    ("bytes=0-0", None, slice(0, 1)),
    (f"bytes=7-{SIZE * 2}", None, slice(7, None)),
    ("bytes=-5", None, slice(SIZE - 5, None)),
    (f"bytes=-{SIZE * 2}", None, slice(0, None)),
    ("bytes=10-", etag, slice(10, None)),
    ("bytes=10-", modified, slice(10, None)),
    ("bytes=10-", '"other"', None),
    ("bytes=10-", f"W/{etag}", None),
    ("bytes=9-3", None, None),
    ("bytes=0-1,5-6", None, None),
    ("bytes=-", None, None),
    ("lines=1-2", None, None),
  ]
  for text, condition, part in rows:
    headers = {"Range": text} | ({"If-Range": condition} if condition else {})
    reply = cdn(server, headers)
    assert reply.body == (BODY[part] if part else BODY), text
    assert reply.status == (206 if part else 200), text
    if part:
      start, stop, _ = part.indices(SIZE)
      assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
  for text in f"bytes={SIZE}-", "bytes=-0":
    reply = cdn(server, {"Range": text})
    assert (reply.status, reply.headers["Content-Range"]) == (416, f"bytes */{SIZE}")
  head = cdn(server, {"Range": "bytes=1-"}, "HEAD")
  assert (head.status, head.headers["Content-Length"], head.body) == (200, str(SIZE), b"")


def test_replaced_asset(server: ReleaseServer) -> None:
  old = cdn(server)
  server.replace_asset("b", "v1", NAME, b"new")
  for validator in "ETag", "Last-Modified":
    reply = cdn(server, {"Range": "bytes=1-", "If-Range": old.headers[validator]})
    assert (reply.status, reply.body) == (200, b"new")
  assert cdn(server, {"Range": "bytes=1-"}).body == b"ew"


def test_file_is_streamed(server: ReleaseServer, tmp_path: Path) -> None:
  file = tmp_path / "disk"
  with file.open("wb") as disk:
    disk.truncate(20 << 30)
    disk.seek(10 << 30)
    disk.write(b"middle")
  server.add_release("b", "big", {"disk": file}, digests=False)
  reply = get(signed(server, "disk", "big"), {"Range": f"bytes={10 << 30}-{(10 << 30) + 5}"})
  assert reply.body == b"middle"
  assert reply.headers["Content-Range"].endswith(f"/{20 << 30}")


def test_keep_alive_and_rate(server: ReleaseServer) -> None:
  parts = urlsplit(server.url)
  connection = http.client.HTTPConnection(parts.netloc, timeout=DEADLINE)
  connection.connect()
  first = connection.sock
  for path in "latest", "tag/v1", "latest", "download/v1/no":
    connection.request("GET", f"{parts.path}/b/releases/{path}")
    connection.getresponse().read()
  assert connection.sock is first
  connection.close()
  server.rate, server.latency = SIZE / 0.2, 0.1
  url, began = signed(server), time.monotonic()
  assert get(url).body == BODY
  assert 0.28 < time.monotonic() - began < 2


# --- The log ---------------------------------------------------------------------------------


def test_log(server: ReleaseServer) -> None:
  headers = {"X-Mine": "1", "Range": "bytes=5-9"}
  cdn(server, headers)
  first, second = server.log
  assert first[:3] == ("github", "GET", f"/cross-platform-actions/b/releases/download/v1/{NAME}")
  assert first.target.endswith(QUOTED) and (first.status, first.sent, first.query) == (302, 0, "")
  assert second.origin == "cdn" and NAME in second.path and "sig=" in second.query
  assert (second.status, second.sent, second.headers["x-mine"]) == (206, 5, "1")
  assert server.requests(NAME, "cdn") == server.requests(origin="cdn") == [second]
  assert server.paths() == [first.path, second.path] and server.started == 2
  server.clear_log()
  assert (server.paths("b"), server.started) == ([], 0)


def test_log_has_what_the_client_has(server: ReleaseServer) -> None:
  """No wait is needed between the end of an answer and a look at the log."""
  url = signed(server)
  for count in range(100):
    get(url)
    assert len(server.log) == count + 2


def test_client_that_leaves_before_it_is_accepted(server: ReleaseServer) -> None:
  url = urlsplit(signed(server))
  server.clear_log()
  with server.lock:  # nothing is accepted meanwhile
    for _ in range(5):
      with socket.create_connection((str(url.hostname), url.port or 0)) as client:
        client.sendall(f"HEAD {url.path}?{url.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert server.wait_idle(0)
  assert server.wait_closed()
  assert len(server.log) == 5


def test_client_that_leaves(server: ReleaseServer, capfd: pytest.CaptureFixture[str]) -> None:
  server.rate = 100_000
  url = urlsplit(signed(server))
  with socket.create_connection((str(url.hostname), url.port or 0)) as client:
    client.sendall(f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert len(client.recv(5000, socket.MSG_WAITALL)) == 5000
    assert (server.started, len(server.log)) == (2, 1)
  assert server.wait_idle()
  assert server.log[1].status == 200 and 0 < server.log[1].sent < SIZE
  socket.create_connection((str(url.hostname), url.port or 0)).close()
  assert capfd.readouterr().err == ""


# --- Faults ----------------------------------------------------------------------------------


def test_which_requests_a_fault_takes(server: ReleaseServer) -> None:
  fault = server.fault("15.1 & <x>", status=503, after=1, times=2)
  server.fault("two", status=500, times=None)
  later = server.fault("", status=429)
  anywhere = server.fault("tag/v1", origin=None, status=502)
  assert [cdn(server).status for _ in range(5)] == [429, 503, 503, 200, 200]
  assert [get(signed(server, "two.tar")).status for _ in range(3)] == [500, 500, 500]
  assert get(f"{server.url}/b/releases/tag/v1").status == 502
  assert (fault.hits, later.hits, anywhere.hits) == (2, 1, 1)
  server.clear_faults()
  assert get(signed(server, "two.tar")).status == 200
  with pytest.raises(TypeError):
    server.fault("", nonsense=1)


def test_what_happens_meanwhile(server: ReleaseServer) -> None:
  replace = functools.partial(server.replace_asset, "b", "v1", NAME, b"new")
  server.fault(NAME, meanwhile=replace)
  before, after = cdn(server), cdn(server)
  assert (before.body, after.body) == (BODY, b"new")
  assert before.headers["ETag"] != after.headers["ETag"]


def check(reply: Reply, status: int, body: bytes | None, **headers: str | None) -> None:
  """Compare a reply: any body when it is None; a header of None must not be there."""
  assert (reply.status, reply.body) == (status, reply.body if body is None else body)
  assert {name: reply.headers[name.replace("_", "-")] for name in headers} == headers


def test_other_answers(server: ReleaseServer) -> None:
  part = {"Range": "bytes=10-19"}
  etag = cdn(server).headers["ETag"]
  flipped = BODY[:300] + bytes([BODY[300] ^ 1]) + BODY[301:]
  same = BODY[10:20]
  length, text = str(SIZE), "text/html; charset=utf-8"
  rows: list[tuple[dict[str, Any], dict[str, str], int, bytes | None, dict[str, str | None]]] = [
    ({"status": 503, "headers": {"Retry-After": "1"}, "body": "no"}, {}, 503, b"no",
     {"Retry_After": "1"}),
    ({"body": b"other"}, {}, 200, b"other", {"ETag": None}),
    ({"redirect": "/elsewhere"}, {}, 302, b"", {"Location": "/elsewhere"}),
    ({"redirect": "file:///etc", "status": 307}, {}, 307, b"", {"Location": "file:///etc"}),
    ({"content_range": "bytes 5-9/10"}, part, 206, same, {"Content_Range": "bytes 5-9/10"}),
    ({"content_range": ""}, part, 206, same, {"Content_Range": None}),
    ({"ignore_range": True}, part, 200, BODY, {"Accept_Ranges": "bytes"}),
    ({"no_ranges": True}, part, 200, BODY, {"Accept_Ranges": None, "ETag": etag}),
    ({"etag": '"e"'}, part, 206, same, {"ETag": '"e"'}),
    ({"etag": '"e"'}, {**part, "If-Range": etag}, 200, BODY, {"ETag": '"e"'}),
    ({"etag": '"e"', "ignore_if_range": True}, {**part, "If-Range": etag}, 206, same,
     {"ETag": '"e"'}),
    ({"weak_etag": True}, {**part, "If-Range": f"W/{etag}"}, 200, BODY, {"ETag": f"W/{etag}"}),
    ({"no_validator": True}, {}, 200, BODY, {"ETag": None, "Last_Modified": None}),
    ({"flip": 300}, {}, 200, flipped, {"ETag": etag, "Content_Length": length}),
    ({"flip": 300}, {"Range": "bytes=299-301"}, 206, flipped[299:302], {}),
    ({"truncate": 9}, {}, 200, BODY[:-9], {"Content_Length": str(SIZE - 9), "ETag": etag}),
    ({"truncate": 9}, {"Range": f"bytes={SIZE - 9}-"}, 416, None,
     {"Content_Range": f"bytes */{SIZE - 9}"}),
    ({"no_length": True}, part, 206, same, {"Content_Length": None, "Connection": "close"}),
    ({"chunked": True}, {}, 200, BODY, {"Content_Length": None, "Transfer_Encoding": "chunked"}),
    ({"content_length": 5}, {}, 200, BODY[:5], {"Content_Length": "5"}),
    ({"gzip": True}, part, 200, None, {"Content_Encoding": "gzip"}),
    ({"html": True}, part, 200, None, {"Content_Type": text, "Content_Encoding": None}),
  ]  # fmt: skip
  for kind, request, status, body, headers in rows:
    server.fault(NAME, **kind)
    reply = cdn(server, request)
    check(reply, status, body, **headers)
    assert cdn(server).body == BODY, kind


def test_gzip_and_portal(server: ReleaseServer) -> None:
  server.fault(NAME, gzip=True)
  reply = cdn(server)
  assert gzip.decompress(reply.body) == BODY
  assert int(reply.headers["Content-Length"]) == len(reply.body) < SIZE
  server.fault("latest", origin="github", html=True)
  assert b"Wi-Fi" in get(f"{server.url}/b/releases/latest").body


def test_cuts(server: ReleaseServer) -> None:
  rows: list[tuple[dict[str, Any], int | None]] = [
    ({"cut": 0}, 0),
    ({"cut": 1000}, 1000),
    ({"cut": 1000, "chunked": True}, 1000),
    ({"cut": 100_000}, 100_000),
    ({"content_length": lambda size: size + 7}, SIZE),
  ]
  for kind, sent in rows:
    server.fault(NAME, **kind)
    with pytest.raises(http.client.IncompleteRead) as caught:
      cdn(server)
    assert len(caught.value.partial) == sent
    assert server.log[-1].sent == sent
  server.fault(NAME, cut=1000)
  with pytest.raises(http.client.IncompleteRead) as caught:
    cdn(server, {"Range": "bytes=50-"})
  assert caught.value.partial == BODY[50:1050]
  server.fault(NAME, cut="connect")
  with pytest.raises(http.client.RemoteDisconnected):
    cdn(server)
  assert server.log[-1].status == 0
  server.fault(NAME, cut="headers")
  assert cdn(server).headers["Content-Length"] is None
  for place in "connect", 1000:
    server.fault(NAME, cut=place, reset=True)
    with pytest.raises(ConnectionResetError):
      cdn(server)


@pytest.mark.parametrize("stall", [0, 1000, "headers"])
def test_stall(server: ReleaseServer, stall: int | str) -> None:
  fault = server.fault(NAME, stall=stall)
  url = urlsplit(signed(server))
  connection = http.client.HTTPConnection(url.netloc, timeout=0.1)
  connection.request("GET", f"{url.path}?{url.query}")
  assert fault.reached.wait(DEADLINE)
  with pytest.raises(TimeoutError):
    connection.getresponse().read()
  connection.close()
  assert server.wait_idle()
  sent = stall if isinstance(stall, int) else 0
  assert (server.log[-1].status, server.log[-1].sent) == (0 if stall == "headers" else 200, sent)


@pytest.mark.parametrize("place", [None, 1000])
def test_pause(server: ReleaseServer, place: int | None) -> None:
  event, replies = threading.Event(), []
  fault = server.fault(NAME, pause=event, pause_at=place)
  client = threading.Thread(target=lambda: replies.append(cdn(server)))
  client.start()
  assert fault.reached.wait(DEADLINE)
  assert (server.started, len(server.log), replies) == (2, 1, [])
  event.set()
  client.join(DEADLINE)
  assert replies[0].body == BODY and server.log[-1].sent == SIZE


# --- Start and end ---------------------------------------------------------------------------


def open_files() -> int | None:
  """How many descriptors are open, where the system tells."""
  return len(os.listdir("/dev/fd")) if sys.platform in ("linux", "darwin") else None


def test_close_is_prompt_and_complete(capfd: pytest.CaptureFixture[str]) -> None:
  before = threading.active_count(), open_files()
  server = ReleaseServer()
  server.add_release("b", "v1", {NAME: BODY * 100})
  clients = []
  for kind in {"stall": 5}, {"stall": "headers"}, {"pause": threading.Event()}, {}, None:
    if kind:
      server.fault(NAME, **kind)
    url = urlsplit(signed(server))
    clients.append(socket.create_connection((str(url.hostname), url.port or 0)))
    if kind is not None:  # the next but last does not read, the last one sends nothing
      request = f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: x\r\n\r\n"
      clients[-1].sendall(request.encode())
  while server.started < 9:
    time.sleep(0.001)
  began = time.monotonic()
  server.close()
  server.close()
  assert time.monotonic() - began < 0.5
  assert len(server.log) == 9
  for client in clients:
    client.close()
  assert (threading.active_count(), open_files()) == before
  assert capfd.readouterr().err == ""


def test_tls(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
  key, cert = tmp_path / "key", tmp_path / "cert"
  subprocess.run(
    f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key}"
    f" -out {cert} -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1".split(),
    check=True,
    capture_output=True,
  )
  tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  tls.load_cert_chain(cert, key)
  trusting = ssl.create_default_context(cafile=str(cert))
  capfd.readouterr()
  with ReleaseServer(tls) as server:
    assert server.url.startswith("https:") and server.cdn_url.startswith("https://localhost")
    server.add_release("b", "v1", {NAME: BODY})
    url = f"{server.url}/b/releases/download/v1/{QUOTED}"
    fine: list[dict[str, Any]] = [{}, {"no_length": True}, {"chunked": True}]
    for kind in fine:
      server.fault(NAME, **kind)
      with urllib.request.urlopen(url, timeout=DEADLINE, context=trusting) as reply:
        assert reply.read() == BODY
    for place in 10, 0:
      server.fault(NAME, cut=place)
      with pytest.raises(http.client.IncompleteRead):
        urllib.request.urlopen(url, timeout=DEADLINE, context=trusting).read()
    server.fault(NAME, cut="connect", reset=True)
    with pytest.raises(OSError):
      urllib.request.urlopen(url, timeout=DEADLINE, context=trusting).read()
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
      urllib.request.urlopen(url, timeout=DEADLINE)
    silent = socket.create_connection(("127.0.0.1", urlsplit(url).port or 0))
    stalled = server.fault(NAME, stall=10)
    reply = urllib.request.urlopen(url, timeout=DEADLINE, context=trusting)
    assert reply.read(10) == BODY[:10] and stalled.reached.wait(DEADLINE)
    began = time.monotonic()
  assert time.monotonic() - began < 0.5
  silent.close()
  reply.close()
  assert capfd.readouterr().err == ""


def test_by_hand(tmp_path: Path) -> None:
  for tag in "v9", "v10":
    (tmp_path / "b" / tag).mkdir(parents=True)
    (tmp_path / "b" / tag / "a.tar").write_bytes(tag.encode())
  command = [sys.executable, release_server.__file__, str(tmp_path), "--latency", "0.01"]
  with ended(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
    lines = [process.stdout.readline().strip() for _ in range(2)]
    names = dict(line.removeprefix("export ").split("=") for line in lines)
    latest = get(f"{names['QVM_RELEASES_URL']}/b/releases/latest")
    assert latest.headers["Location"].endswith("/tag/v10")
    data = json.loads(get(f"{names['QVM_API_URL']}/b/releases").body)
    assert [each["tag_name"] for each in data] == ["v10", "v9"]
    with urllib.request.urlopen(data[1]["assets"][0]["browser_download_url"]) as reply:
      assert reply.read() == b"v9"
    process.send_signal(2)
    assert process.wait(DEADLINE) == 0
