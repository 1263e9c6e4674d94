"""A stand-in for GitHub's release downloads on loopback, with faults on request and a log.

Three origins, each with its own port: "github" (pages and redirects), "cdn" (the other host that
serves the assets, under signed addresses) and "api". By hand, for a folder REPO/TAG/NAME:
  python3 tests/release_server.py DIR [--rate BYTES] [--latency SECONDS]
"""

import argparse
import base64
import contextlib
import dataclasses
import email.utils
import functools
import gzip
import hashlib
import html
import io
import json
import os
import re
import secrets
import select
import selectors
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlencode

OWNER = "cross-platform-actions"
CDN_HOST = "localhost"  # another name for 127.0.0.1: assets come from a different host than pages
CDN_FOLDER = "/github-production-release-asset"
CHUNK = 1 << 16
STAMP = "%Y-%m-%dT%H:%M:%SZ"
HTML = "text/html; charset=utf-8"
XML = "application/xml"
JSON = "application/json; charset=utf-8"


# --- Objects ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Blob:
  """The bytes of an answer, in memory or in a file, with one bit flipped on request."""

  content: bytes | Path
  size: int
  flip: int | None = None

  def chunks(self, start: int, stop: int, step: int = CHUNK) -> Iterator[bytes]:
    """Yield the bytes from start to stop (exclusive), at most step at a time."""
    with self._open() as file:
      file.seek(start)
      while start < stop:
        data = file.read(min(step, stop - start))
        if not data:
          return
        yield self._flipped(data, start)
        start += len(data)

  def _open(self) -> BinaryIO:
    return self.content.open("rb") if isinstance(self.content, Path) else io.BytesIO(self.content)

  def _flipped(self, data: bytes, start: int) -> bytes:
    if self.flip is None or not start <= self.flip < start + len(data):
      return data
    place = self.flip - start
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def blob_of(content: bytes | Path) -> Blob:
  """A blob of the whole content; the size of a file is taken now."""
  return Blob(content, content.stat().st_size if isinstance(content, Path) else len(content))


@dataclasses.dataclass
class Asset:
  """One file of a release; a replaced one gets a new object, thus a new ETag and time."""

  name: str
  blob: Blob
  modified: datetime
  etag: str = dataclasses.field(default_factory=lambda: f'"0x8DE{secrets.token_hex(6).upper()}"')

  @functools.cached_property
  def digest(self) -> str:
    """The content's digest as the API writes it, computed when first asked for."""
    digest = hashlib.sha256()
    for chunk in self.blob.chunks(0, self.blob.size):
      digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


@dataclasses.dataclass
class Release:
  """One release of a repository; number grows with each one added."""

  number: int
  tag: str
  published: str
  prerelease: bool
  draft: bool
  digests: bool
  assets: dict[str, Asset]


@dataclasses.dataclass
class Signature:
  """What a signed address is good for; expires in the seconds of time.monotonic()."""

  path: str
  expires: float
  uses: int = 0


class Request(NamedTuple):
  """One logged request: path is decoded, target and query are as sent, status 0 = no answer."""

  origin: str
  method: str
  path: str
  headers: dict[str, str]
  status: int
  sent: int  # bytes of the body handed to the socket
  query: str
  target: str


class Answer(NamedTuple):
  """A status, headers other than the framing, and the span of the blob to send."""

  status: int
  headers: dict[str, str]
  blob: Blob
  start: int
  stop: int


def whole(status: int, headers: Mapping[str, str], blob: Blob) -> Answer:
  """An answer that sends all of the blob."""
  return Answer(status, dict(headers), blob, 0, blob.size)


def text_answer(status: int, kind: str, text: str, headers: Mapping[str, str] = {}) -> Answer:
  """An answer whose body is a text of the given Content-Type."""
  return whole(status, {"Content-Type": kind, **headers}, blob_of(text.encode()))


def redirect(location: str, status: int = 302) -> Answer:
  """A redirect with an empty body, as GitHub sends it."""
  return whole(status, {"Content-Type": HTML, "Location": location}, blob_of(b""))


# --- Faults ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Fault:
  """What to do wrong to the requests whose decoded path contains match.

  Several kinds can be combined. A request meets the first fault, in the order of their making,
  that matches and is not used up.
  """

  match: str
  origin: str | None = "cdn"  # None = any
  times: int | None = 1  # None = always
  after: int = 0  # let this many matching requests through first

  # Another answer than the right one.
  status: int | None = None
  headers: Mapping[str, str] = dataclasses.field(default_factory=dict)  # added to any answer
  body: bytes | str | None = None
  redirect: str | None = None  # a Location; 302 unless status says otherwise
  html: bool = False  # the 200 page of a captive portal

  # A line that breaks or hangs.
  cut: int | str | None = None  # after N bytes of the body, in the "headers", at "connect"
  reset: bool = False  # cut with an RST: bytes under way may be lost, a plain cut loses none
  stall: int | str | None = None  # after N bytes of the body, or before the "headers"
  pause: threading.Event | None = None  # wait for it before answering
  pause_at: int | None = None  # with pause: wait after N bytes of the body instead
  meanwhile: Callable[[], object] | None = None  # called between finding the answer and sending it

  # Wrong headers and framing.
  content_length: int | Callable[[int], int] | None = None
  content_range: str | None = None  # "" leaves it out
  no_length: bool = False  # the end of the connection ends the body
  chunked: bool = False
  gzip: bool = False
  surplus: bytes = b""  # behind the body

  # Another object, or a host that cannot resume (cdn only).
  flip: int | None = None
  truncate: int = 0
  etag: str | None = None
  weak_etag: bool = False
  no_validator: bool = False
  ignore_range: bool = False
  ignore_if_range: bool = False
  other_range: int | None = None  # send what begins there instead, and say so
  no_ranges: bool = False

  hits: int = dataclasses.field(default=0, init=False)
  seen: int = dataclasses.field(default=0, init=False)
  # Set when a request hangs here in a pause or stall.
  reached: threading.Event = dataclasses.field(default_factory=threading.Event, init=False)

  def takes(self, origin: str, path: str) -> bool:
    """Count a matching request, and tell whether this fault is for it."""
    if self.origin not in (None, origin) or self.match not in path or self.hits == self.times:
      return False
    self.seen += 1
    if self.seen <= self.after:
      return False
    self.hits += 1
    return True

  def answer(self) -> Answer | None:
    """The answer that replaces the right one, if this fault has one."""
    if self.redirect is not None:
      return redirect(self.redirect, self.status or 302)
    if self.html:
      return text_answer(200, HTML, page("Log in", "<h1>Welcome to the airport's Wi-Fi</h1>"))
    if self.status is None and self.body is None:
      return None
    status = self.status or 200
    body = page("Error", f"<h1>{status}</h1>") if self.body is None else self.body
    return whole(
      status, {"Content-Type": HTML}, blob_of(body.encode() if isinstance(body, str) else body)
    )

  def length(self, size: int) -> int:
    """The Content-Length to send for a body of that size."""
    if callable(self.content_length):
      return self.content_length(size)
    return size if self.content_length is None else self.content_length

  def validators(self, asset: Asset) -> dict[str, str]:
    """The ETag and Last-Modified headers to send for the asset."""
    if self.no_validator:
      return {}
    etag = self.etag or asset.etag
    modified = email.utils.format_datetime(asset.modified, usegmt=True)
    return {"ETag": f"W/{etag}" if self.weak_etag else etag, "Last-Modified": modified}


def parse_range(text: str, size: int) -> tuple[int, int] | None:
  """The span (stop exclusive) that a Range header asks for; empty = 416, None = not understood."""
  match = re.fullmatch(r"bytes=(\d*)-(\d*)", text.strip())
  if not match or not any(match.groups()):
    return None
  first, last = match.groups()
  if not first:
    return max(0, size - int(last)), size
  if last and int(last) < int(first):
    return None
  return int(first), min(int(last) + 1, size) if last else size


# --- Pages -----------------------------------------------------------------------------------


def page(title: str, body: str) -> str:
  """A page of HTML."""
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
    f"<title>{html.escape(title)}</title></head>\n<body>{body}</body>\n</html>\n"
  )


def release_path(repo: str, *parts: str) -> str:
  """The path of a page below a repository's releases, percent-encoded."""
  return "/".join([f"/{OWNER}/{repo}/releases", *(quote(part, safe="") for part in parts)])


def size_text(size: float) -> str:
  """A size as GitHub writes it: 12 Bytes, 1.5 KB, 268 MB."""
  units = ["Bytes", "KB", "MB", "GB"]
  while size >= 1024 and len(units) > 1:
    size /= 1024
    del units[0]
  return f"{float(f'{size:.3g}'):g} {units[0]}"


def asset_row(repo: str, release: Release, asset: Asset) -> str:
  """One row of the list of assets, as expanded_assets has it."""
  href = html.escape(release_path(repo, "download", release.tag, asset.name))
  name = html.escape(asset.name)
  digest = ""
  if release.digests:
    digest = (
      f'      <span class="Truncate-text">{asset.digest}</span>\n'
      f'      <clipboard-copy value="{asset.digest}" aria-label="Copy"></clipboard-copy>\n'
    )
  return (
    f'    <li data-view-component="true" class="Box-row d-flex flex-column flex-md-row">\n'
    f'      <a href="{href}" rel="nofollow" data-turbo="false" class="Truncate">\n'
    f'        <span class="Truncate-text text-bold">{name}</span>\n'
    f'        <span class="Truncate-text"></span>\n'
    f"      </a>\n{digest}"
    f'      <span style="white-space: nowrap;" class="color-fg-muted">'
    f"{size_text(asset.blob.size)}</span>\n"
    f'      <relative-time datetime="{asset.modified.strftime(STAMP)}" class="no-wrap">'
    f"</relative-time>\n    </li>\n"
  )


def assets_fragment(repo: str, release: Release) -> str:
  """The HTML fragment of expanded_assets: the assets, then the two source archives."""
  rows = "".join(asset_row(repo, release, asset) for asset in release.assets.values())
  tag = quote(release.tag, safe="")
  for suffix in ("zip", "tar.gz"):
    rows += (
      f'    <li data-view-component="true" class="Box-row d-flex flex-column flex-md-row">\n'
      f'      <a href="/{OWNER}/{repo}/archive/refs/tags/{tag}.{suffix}" rel="nofollow">'
      f'<span class="Truncate-text text-bold">Source code</span> ({suffix})</a>\n    </li>\n'
    )
  return f'<div class="Box Box--condensed mt-3">\n  <ul>\n{rows}  </ul>\n</div>\n'


def repository_id(repo: str) -> int:
  """A number for the repository that stays the same."""
  return zlib.crc32(repo.encode())


def feed_entry(base: str, repo: str, release: Release) -> str:
  """One entry of the Atom feed."""
  tag = html.escape(release.tag)
  link = html.escape(f"{base}{release_path(repo, 'tag', release.tag)}")
  return (
    f"  <entry>\n"
    f"    <id>tag:github.com,2008:Repository/{repository_id(repo)}/{tag}</id>\n"
    f"    <updated>{release.published}</updated>\n"
    f'    <link rel="alternate" type="text/html" href="{link}"/>\n'
    f"    <title>{tag}</title>\n"
    f'    <content type="html">&lt;p&gt;Notes of {tag}&lt;/p&gt;</content>\n'
    f"    <author><name>github-actions[bot]</name></author>\n"
    f"  </entry>\n"
  )


def feed(base: str, repo: str, releases: list[Release]) -> str:
  """The Atom feed of the newest ten releases."""
  link = f"{base}{release_path(repo)}"
  updated = releases[0].published if releases else "2026-01-01T00:00:00Z"
  return (
    f'<?xml version="1.0" encoding="UTF-8"?>\n'
    f'<feed xmlns="http://www.w3.org/2005/Atom" xml:lang="en-US">\n'
    f"  <id>tag:github.com,2008:{link}</id>\n"
    f'  <link type="text/html" rel="alternate" href="{link}"/>\n'
    f'  <link type="application/atom+xml" rel="self" href="{link}.atom"/>\n'
    f"  <title>Release notes from {html.escape(repo)}</title>\n"
    f"  <updated>{updated}</updated>\n"
    f"{''.join(feed_entry(base, repo, release) for release in releases[:10])}</feed>\n"
  )


def asset_data(base: str, repo: str, release: Release, asset: Asset) -> dict[str, Any]:
  """An asset as the API describes it."""
  return {
    "name": asset.name,
    "label": "",
    "content_type": "application/octet-stream",
    "state": "uploaded",
    "size": asset.blob.size,
    "digest": asset.digest if release.digests else None,
    "download_count": 0,
    "created_at": release.published,
    "updated_at": asset.modified.strftime(STAMP),
    "browser_download_url": base + release_path(repo, "download", release.tag, asset.name),
  }


def release_data(base: str, repo: str, release: Release) -> dict[str, Any]:
  """A release as the API describes it."""
  return {
    "id": release.number,
    "html_url": base + release_path(repo, "tag", release.tag),
    "tag_name": release.tag,
    "name": release.tag,
    "draft": release.draft,
    "prerelease": release.prerelease,
    "immutable": True,
    "created_at": release.published,
    "published_at": release.published,
    "assets": [asset_data(base, repo, release, asset) for asset in release.assets.values()],
    "body": "",
  }


def query_number(query: Mapping[str, list[str]], name: str, default: int) -> int:
  """A number of at least 1 from a query string."""
  text = query.get(name, [""])[0]
  return max(1, int(text)) if text.isdecimal() else default


def link_header(address: str, per_page: int, number: int, last: int) -> dict[str, str]:
  """The Link header of one page of a list; none when there is only one page."""
  pages = [("prev", number - 1)] if number > 1 else []
  pages += [("next", number + 1), ("last", last)] if number < last else []
  pages += [("first", 1)] if number > 1 else []
  links = [f'<{address}?per_page={per_page}&page={at}>; rel="{rel}"' for rel, at in pages]
  return {"Link": ", ".join(links)} if links else {}


def signed_query(name: str, signature: str, lifetime: float) -> str:
  """A query string as long, and as awkward, as that of GitHub's signed addresses."""
  now = datetime.now(timezone.utc)
  attachment = f"attachment; filename={name}"
  fields = {
    "sp": "r",
    "sv": "2018-11-09",
    "sr": "b",
    "spr": "https",
    "se": (now + timedelta(seconds=lifetime)).strftime(STAMP),
    "rscd": attachment,
    "rsct": "application/octet-stream",
    "skoid": str(uuid.uuid4()),
    "sktid": str(uuid.uuid4()),
    "skt": now.strftime(STAMP),
    "sks": "b",
    "skv": "2018-11-09",
    "sig": signature,
    "jwt": secrets.token_urlsafe(90),
    "response-content-disposition": attachment,
    "response-content-type": "application/octet-stream",
  }
  return urlencode(fields, quote_via=quote, safe="")


def not_found() -> Answer:
  """GitHub's page for an address that does not exist."""
  return text_answer(404, HTML, page("Page not found", "<h1>404</h1><p>Page not found</p>"))


def cdn_error(status: int, code: str, headers: Mapping[str, str] = {}) -> Answer:
  """An error of the host that serves the assets."""
  text = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code></Error>'
  return text_answer(status, XML, text, headers)


def api_error(status: int, message: str) -> Answer:
  """An error of the API."""
  data = {"message": message, "documentation_url": "https://docs.github.com/rest"}
  return text_answer(status, JSON, json.dumps({**data, "status": str(status)}))


# --- One request -----------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
  """Answers the requests of one connection, one after the other."""

  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: "Origin"
  fault: Fault
  status: int
  sent: int
  recorded: bool

  def log_message(self, format: str, *args: Any) -> None:
    """Keep quiet: the log is ReleaseServer.log."""

  def handle(self) -> None:
    """Answer the requests of a connection."""
    owner = self.server.owner
    with owner.lock:
      owner.accepted += 1
    self.sleep(owner.setup)
    super().handle()

  def do_GET(self) -> None:
    """Answer one request, and log it however it ends."""
    self.target, _, self.query = self.path.partition("?")
    self.fault = self.server.owner.begin(self.server.name, unquote(self.target))
    self.status, self.sent, self.recorded = 0, 0, False
    try:
      self.respond()
    finally:
      self.record()
      self.close_connection |= self.server.owner.hang_up

  do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

  def respond(self) -> None:
    """Find the answer, the right one or the fault's, and send it."""
    self.sleep(self.server.owner.latency)
    if self.fault.pause and self.fault.pause_at is None:
      self.hang(self.fault.pause)
    if self.fault.cut == "connect":
      self.drop()
    if self.fault.stall == "headers":
      self.hang(threading.Event())
    answer = self.fault.answer() or self.route()
    if self.fault.gzip and answer.status == 200:
      packed = gzip.compress(b"".join(answer.blob.chunks(0, answer.blob.size)))
      answer = whole(200, {**answer.headers, "Content-Encoding": "gzip"}, blob_of(packed))
    if self.fault.meanwhile:
      self.fault.meanwhile()
    self.send(answer)

  def record(self) -> None:
    """Log the request, once."""
    if not self.recorded:
      self.recorded = True
      headers = {name.lower(): value for name, value in self.headers.items()}
      name, path = self.server.name, unquote(self.target)
      self.server.owner.finish(
        Request(name, self.command, path, headers, self.status, self.sent, self.query, self.target)
      )

  # Waiting and breaking.

  def sleep(self, seconds: float) -> None:
    """Wait as a slow line does."""
    if seconds > 0 and self.server.owner.stopping.wait(seconds):
      raise ConnectionAbortedError("the server stops")

  def hang(self, event: threading.Event) -> None:
    """Wait for the event; a client that leaves or a server that stops breaks the request."""
    self.fault.reached.set()
    while not event.wait(0.01):
      if select.select([self.connection], [], [], 0)[0]:
        raise ConnectionAbortedError("the connection ended")

  def drop(self) -> NoReturn:
    """End the connection here."""
    self.record()
    if self.fault.reset:
      linger = struct.pack("ii", 1, 0)
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
      os.close(self.connection.detach())
    raise ConnectionAbortedError("cut by a fault")

  # Sending.

  def send(self, answer: Answer) -> None:
    """Send the answer, with what the fault does to its framing."""
    self.status = answer.status
    self.close_connection |= self.fault.no_length
    head = self.head(answer)
    if self.fault.cut == "headers":
      self.wfile.write(head[: len(head) // 2])
      self.drop()
    if self.command == "HEAD" or not answer.stop - answer.start:
      self.record()
    self.wfile.write(head)
    if self.command != "HEAD":
      self.send_body(answer)
    self.close_connection |= self.fault.content_length is not None

  def head(self, answer: Answer) -> bytes:
    """The status line and the headers, the framing last."""
    phrase = self.responses.get(answer.status, ("Unknown", ""))[0]
    headers = {"Date": self.date_time_string(), "Server": "release-server"}
    headers.update(answer.headers)
    headers.update(self.fault.headers)
    if self.close_connection:
      headers["Connection"] = "close"
    if self.fault.chunked:
      headers["Transfer-Encoding"] = "chunked"
    elif not self.fault.no_length:
      headers["Content-Length"] = str(self.fault.length(answer.stop - answer.start))
    lines = [f"HTTP/1.1 {answer.status} {phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")

  def send_body(self, answer: Answer) -> None:
    """Send the body, up to where the fault pauses, stalls or cuts it."""
    fault, start, stop = self.fault, answer.start, answer.stop
    began = time.monotonic()
    if fault.pause and fault.pause_at is not None:
      middle = min(start + fault.pause_at, stop)
      self.send_span(answer, start, middle, began)
      self.hang(fault.pause)
      start = middle
    limit = fault.stall if fault.cut is None else fault.cut
    if isinstance(limit, int):
      self.send_span(answer, start, min(answer.start + limit, stop), began)
      if fault.cut is None:
        self.hang(threading.Event())
      self.drop()
    self.send_span(answer, start, stop, began)
    if fault.chunked:
      self.record()
      self.wfile.write(b"0\r\n\r\n")
    self.wfile.write(fault.surplus)

  def send_span(self, answer: Answer, start: int, stop: int, began: float) -> None:
    """Send a part of the body at the server's rate; the log knows of its last byte beforehand."""
    rate = self.server.owner.rate
    step = CHUNK if rate is None else max(1, min(CHUNK, int(rate / 20)))
    for chunk in answer.blob.chunks(start, stop, step):
      self.sleep(self.server.owner.turn(len(chunk)))
      if rate is not None:
        self.sleep(began + (self.sent + len(chunk)) / rate - time.monotonic())
      if self.fault.chunked:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.sent += len(chunk)
        continue
      last = self.sent + len(chunk) == answer.stop - answer.start
      if last:
        self.sent += len(chunk)
        self.record()
      self.wfile.write(chunk)
      if not last:
        self.sent += len(chunk)

  # The three origins.

  def route(self) -> Answer:
    """The right answer to the request."""
    if self.command not in ("GET", "HEAD"):
      self.close_connection = True
      return text_answer(405, HTML, page("Error", "<h1>405</h1>"), {"Allow": "GET, HEAD"})
    if self.server.name == "api":
      return self.api_answer()
    return self.routed() or not_found()

  def routed(self) -> Answer | None:
    """The answer of the first route whose pattern the path matches."""
    for pattern, method in ROUTES[self.server.name]:
      match = re.fullmatch(pattern, self.target)
      if match:
        return method(self, *(unquote(group) for group in match.groups()))
    return None

  def github_latest(self, repo: str) -> Answer | None:
    """Redirect to the page of the newest release."""
    owner = self.server.owner
    release = owner.newest(repo)
    path = release and release_path(repo, "tag", release.tag)
    return redirect(owner.github_url + path) if path else None

  def github_page(self, repo: str, tag: str) -> Answer | None:
    """The page of one release."""
    if not self.server.owner.find(repo, tag):
      return None
    source = html.escape(release_path(repo, "expanded_assets", tag))
    body = f"<h1>{html.escape(tag)}</h1>\n<include-fragment src='{source}'></include-fragment>"
    return text_answer(200, HTML, page(f"Release {tag} · {OWNER}/{repo}", body))

  def github_download(self, repo: str, tag: str, name: str) -> Answer | None:
    """Redirect to a newly signed address on the other host."""
    owner = self.server.owner
    release = owner.find(repo, tag)
    return redirect(owner.sign(repo, tag, name)) if release and name in release.assets else None

  def github_assets(self, repo: str, tag: str) -> Answer | None:
    """The list of assets of one release."""
    release = self.server.owner.find(repo, tag)
    return text_answer(200, HTML, assets_fragment(repo, release)) if release else None

  def github_feed(self, repo: str) -> Answer | None:
    """The feed of the newest releases, prereleases too."""
    owner = self.server.owner
    if repo not in owner.repos:
      return None
    text = feed(owner.github_url, repo, owner.listed(repo))
    return text_answer(200, "application/atom+xml; charset=utf-8", text)

  def cdn_object(self, repo: str, tag: str, name: str) -> Answer:
    """An asset, or the range of it that the request asks for."""
    owner, fault = self.server.owner, self.fault
    if not owner.admit(self.target, parse_qs(self.query).get("sig", [""])[0]):
      return cdn_error(403, "AuthenticationFailed")
    release = owner.find(repo, tag)
    if not release or name not in release.assets:
      return cdn_error(404, "BlobNotFound")
    asset = release.assets[name]
    size = max(0, asset.blob.size - fault.truncate)
    blob = dataclasses.replace(asset.blob, size=size, flip=fault.flip)
    validators = fault.validators(asset)
    headers = {
      "Content-Type": "application/octet-stream",
      "Content-Disposition": f"attachment; filename={quote(name)}",
      **validators,
    }
    if not fault.no_ranges:
      headers["Accept-Ranges"] = "bytes"
    span = self.wanted_span(size, validators)
    if span is None:
      return whole(200, headers, blob)
    if span[0] >= span[1]:
      return cdn_error(416, "InvalidRange", {"Content-Range": f"bytes */{size}"})
    if fault.other_range is not None:
      span = (fault.other_range, size)
    content_range = f"bytes {span[0]}-{span[1] - 1}/{size}"
    if fault.content_range is not None:
      content_range = fault.content_range
    if content_range:
      headers["Content-Range"] = content_range
    return Answer(206, headers, blob, *span)

  def wanted_span(self, size: int, validators: Mapping[str, str]) -> tuple[int, int] | None:
    """The range to send, after If-Range; None = the whole."""
    fault, condition = self.fault, self.headers.get("If-Range")
    if self.command == "HEAD" or fault.ignore_range or fault.no_ranges or fault.gzip:
      return None
    strong = condition in validators.values() and not str(condition).startswith("W/")
    if condition is not None and not strong and not fault.ignore_if_range:
      return None
    return parse_range(self.headers.get("Range", ""), size)

  def api_answer(self) -> Answer:
    """An answer of the API, with what is left of the quota."""
    allowed, limits = self.server.owner.spend("Authorization" in self.headers)
    if allowed:
      answer = self.routed() or api_error(404, "Not Found")
    else:
      answer = api_error(
        403,
        "API rate limit exceeded for 127.0.0.1. (But here's the good news: Authenticated requests"
        " get a higher rate limit. Check out the documentation for more details.)",
      )
    answer.headers.update(limits)
    return answer

  def api_release(self, repo: str, tag: str) -> Answer | None:
    """The data of one release."""
    return self.api_data(repo, self.server.owner.find(repo, tag))

  def api_latest(self, repo: str) -> Answer | None:
    """The data of the newest release."""
    return self.api_data(repo, self.server.owner.newest(repo))

  def api_data(self, repo: str, release: Release | None) -> Answer | None:
    """The data of the release, if there is one."""
    if release is None:
      return None
    data = release_data(self.server.owner.github_url, repo, release)
    return text_answer(200, JSON, json.dumps(data))

  def api_list(self, repo: str) -> Answer | None:
    """One page of the list of releases; the Link header names the repository by its number."""
    owner, query = self.server.owner, parse_qs(self.query)
    repo = owner.repository(repo)
    if repo not in owner.repos:
      return None
    per_page = min(100, query_number(query, "per_page", 30))
    number = query_number(query, "page", 1)
    releases = owner.listed(repo)
    part = releases[(number - 1) * per_page : number * per_page]
    data = [release_data(owner.github_url, repo, release) for release in part]
    address = f"{owner.api_root}/repositories/{repository_id(repo)}/releases"
    links = link_header(address, per_page, number, -(-len(releases) // per_page))
    return text_answer(200, JSON, json.dumps(data), links)


PAGES = f"/{OWNER}/([^/]+)/releases"
DATA = f"/repos/{OWNER}/([^/]+)/releases"
ROUTES: dict[str, list[tuple[str, Callable[..., Answer | None]]]] = {
  "github": [
    (f"{PAGES}/latest", Handler.github_latest),
    (f"{PAGES}/tag/(.+)", Handler.github_page),
    (f"{PAGES}/download/(.+)/([^/]+)", Handler.github_download),
    (f"{PAGES}/expanded_assets/(.+)", Handler.github_assets),
    (f"{PAGES}[.]atom", Handler.github_feed),
  ],
  "cdn": [(f"{CDN_FOLDER}/([^/]+)/([^/]+)/([^/]+)", Handler.cdn_object)],
  "api": [
    (DATA, Handler.api_list),
    ("/repositories/([0-9]+)/releases", Handler.api_list),
    (f"{DATA}/latest", Handler.api_latest),
    (f"{DATA}/tags/(.+)", Handler.api_release),
  ],
}


# --- The server ------------------------------------------------------------------------------


class Origin(socketserver.ThreadingMixIn, socketserver.TCPServer):
  """One listening socket; its connections' threads are known to the owner."""

  allow_reuse_address = True
  request_queue_size = 128
  timeout = 0  # handle_request() is called when a connection waits

  def __init__(self, owner: "ReleaseServer", name: str, tls: ssl.SSLContext | None) -> None:
    self.owner, self.name = owner, name
    super().__init__(("127.0.0.1", 0), Handler)
    if tls:
      # The handshake is left to the connection's own thread: a client may refuse it or hang.
      self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

  @property
  def port(self) -> int:
    """The port it listens on."""
    return int(self.server_address[1])

  def process_request(self, request: Any, client_address: Any) -> None:
    """Serve the connection in a thread of its own."""
    arguments = (request, client_address)
    name = f"release-server-{self.name}"
    thread = threading.Thread(target=self.serve, args=arguments, name=name, daemon=True)
    with self.owner.lock:
      self.owner.connections[thread] = request
      self.owner.lock.notify_all()
    thread.start()

  def serve(self, request: Any, client_address: Any) -> None:
    """Serve the connection, then forget it."""
    try:
      self.process_request_thread(request, client_address)
    finally:
      with self.owner.lock:
        del self.owner.connections[threading.current_thread()]
        self.owner.lock.notify_all()

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Say nothing about broken connections; anything else is a bug of this file."""
    error = sys.exc_info()[1]
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
      super().handle_error(request, client_address)


class ReleaseServer:
  """The three origins, their releases, faults and log; it serves from its making to close()."""

  def __init__(self, tls: ssl.SSLContext | None = None) -> None:
    self.rate: float | None = None  # bytes a second and connection
    self.line: float | None = None  # bytes a second of all connections together
    self.latency: float = 0  # seconds before each answer
    self.setup: float = 0  # seconds before the first answer of a connection, as TCP and TLS take
    self.hang_up = False  # whether a connection ends after one answer, without a word of it
    self.accepted = 0  # connections
    self.api_quota: int | None = None  # requests left without an Authorization header
    self.signed_uses: int | None = None  # requests that one signed address serves
    self.signed_seconds: float = 300  # how long a signed address is good from its making
    self.log: list[Request] = []
    self.started = 0
    self.repos: dict[str, dict[str, Release]] = {}
    self.lock = threading.Condition()
    self.stopping = threading.Event()
    self.connections: dict[threading.Thread, socket.socket] = {}
    self._active = 0
    self._added = 0
    self._line_free = 0.0  # when the line has sent what it has been given
    self._faults: list[Fault] = []
    self._signatures: dict[str, Signature] = {}
    self._origins = [Origin(self, name, tls) for name in ROUTES]
    scheme = "https" if tls else "http"
    github, cdn, api = (origin.port for origin in self._origins)
    self.github_url = f"{scheme}://127.0.0.1:{github}"
    self.cdn_url = f"{scheme}://{CDN_HOST}:{cdn}"
    self.api_root = f"{scheme}://127.0.0.1:{api}"
    self.url = f"{self.github_url}/{OWNER}"
    self.api_url = f"{self.api_root}/repos/{OWNER}"
    self._wake, self._woken = socket.socketpair()
    self._acceptor = threading.Thread(target=self._accept, name="release-server", daemon=True)
    self._acceptor.start()

  def __enter__(self) -> "ReleaseServer":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _accept(self) -> None:
    """Start a thread for each connection until close() wakes this one."""
    with selectors.DefaultSelector() as selector:
      selector.register(self._woken, selectors.EVENT_READ)
      for origin in self._origins:
        selector.register(origin, selectors.EVENT_READ, origin)
      while not self.stopping.is_set():
        for key, _ in selector.select():
          if key.data:
            key.data.handle_request()

  def close(self) -> None:
    """Break what is under way, and end every thread and socket; may be called again."""
    self.stopping.set()
    with contextlib.suppress(OSError):
      self._wake.send(b"x")
    self._acceptor.join()
    for origin in self._origins:
      origin.server_close()
    with self.lock:
      connections = list(self.connections.items())
    for _, connection in connections:
      with contextlib.suppress(OSError):
        # Not SSLSocket's own shutdown, which takes the TLS layer from under the other thread.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    for thread, _ in connections:
      thread.join()
    self._wake.close()
    self._woken.close()

  # Releases.

  def add_release(
    self,
    repo: str,
    tag: str,
    assets: Mapping[str, bytes | Path],
    *,
    published: str = "2026-07-31T00:00:00Z",
    prerelease: bool = False,
    draft: bool = False,
    digests: bool = True,
  ) -> None:
    """Publish a release, in place of one of the same tag; files are read as they are sent."""
    modified = datetime.strptime(published, STAMP).replace(tzinfo=timezone.utc)
    made = {name: Asset(name, blob_of(content), modified) for name, content in assets.items()}
    with self.lock:
      self._added += 1
      release = Release(self._added, tag, published, prerelease, draft, digests, made)
      self.repos.setdefault(repo, {})[tag] = release

  def remove_asset(self, repo: str, tag: str, name: str) -> None:
    """Take an asset away: 404 from now on."""
    with self.lock:
      del self.repos[repo][tag].assets[name]

  def replace_asset(self, repo: str, tag: str, name: str, content: bytes | Path) -> None:
    """Give an asset another content, ETag and time."""
    with self.lock:
      assets = self.repos[repo][tag].assets
      modified = assets[name].modified + timedelta(seconds=1)
      assets[name] = Asset(name, blob_of(content), modified)

  def find(self, repo: str, tag: str) -> Release | None:
    """The published release of that tag."""
    release = self.repos.get(repo, {}).get(tag)
    return None if release is None or release.draft else release

  def listed(self, repo: str) -> list[Release]:
    """The published releases, prereleases too, newest first."""
    with self.lock:
      releases = [each for each in self.repos.get(repo, {}).values() if not each.draft]
    return sorted(releases, key=lambda each: (each.published, each.number), reverse=True)

  def newest(self, repo: str) -> Release | None:
    """The release that releases/latest names."""
    return next((each for each in self.listed(repo) if not each.prerelease), None)

  def repository(self, name: str) -> str:
    """The name of a repository given by name or number."""
    with self.lock:
      return next((repo for repo in self.repos if str(repository_id(repo)) == name), name)

  # Signed addresses and the API's quota.

  def sign(self, repo: str, tag: str, name: str) -> str:
    """A new signed address of the asset."""
    path = "/".join([CDN_FOLDER, *(quote(part, safe="") for part in (repo, tag, name))])
    signature = base64.b64encode(secrets.token_bytes(32)).decode()
    with self.lock:
      self._signatures[signature] = Signature(path, time.monotonic() + self.signed_seconds)
    return f"{self.cdn_url}{path}?{signed_query(name, signature, self.signed_seconds)}"

  def admit(self, path: str, signature: str) -> bool:
    """Count a use of the signed address, and tell whether it is still good."""
    with self.lock:
      known = self._signatures.get(signature)
      if known is None or unquote(known.path) != unquote(path) or known.expires < time.monotonic():
        return False
      known.uses += 1
      return self.signed_uses is None or known.uses <= self.signed_uses

  def turn(self, count: int) -> float:
    """Take the line for that many bytes; returns the seconds until they are through."""
    if self.line is None:
      return 0
    with self.lock:
      self._line_free = max(self._line_free, time.monotonic()) + count / self.line
      return self._line_free - time.monotonic()

  def expire_signatures(self) -> None:
    """End all signed addresses given out so far."""
    with self.lock:
      self._signatures.clear()

  def spend(self, authorized: bool) -> tuple[bool, dict[str, str]]:
    """Take one API request from the quota: whether it is allowed, and the headers that say so."""
    limit, left, allowed = 60, 59, True
    with self.lock:
      if authorized:
        limit, left = 5000, 4999
      elif self.api_quota is not None:
        allowed = self.api_quota > 0
        self.api_quota = left = max(0, self.api_quota - 1)
    reset = str(int(time.time()) + 3600)
    numbers = {"limit": str(limit), "remaining": str(left), "reset": reset, "resource": "core"}
    return allowed, {f"x-ratelimit-{name}": value for name, value in numbers.items()}

  # Faults and the log.

  def fault(
    self,
    match: str,
    *,
    origin: str | None = "cdn",
    times: int | None = 1,
    after: int = 0,
    **kind: Any,
  ) -> Fault:
    """Add a fault; class Fault tells the kinds."""
    fault = Fault(match, origin, times, after, **kind)
    with self.lock:
      self._faults.append(fault)
    return fault

  def clear_faults(self) -> None:
    """Answer right again, except the requests that a fault already has."""
    with self.lock:
      self._faults.clear()

  def begin(self, origin: str, path: str) -> Fault:
    """Count a request, and choose its fault; one that does nothing when there is none."""
    with self.lock:
      self.started += 1
      self._active += 1
      return next((fault for fault in self._faults if fault.takes(origin, path)), Fault(""))

  def finish(self, request: Request) -> None:
    """Log a request that is done or broken."""
    with self.lock:
      self.log.append(request)
      self._active -= 1
      self.lock.notify_all()

  def wait_idle(self, timeout: float = 5) -> bool:
    """Wait until each request begun is in the log: those of killed clients come a little later."""
    with self.lock:
      return self.lock.wait_for(lambda: not self._active, timeout)

  def wait_closed(self, timeout: float = 5) -> bool:
    """Wait until all connections are over: those of killed clients, also the ones not yet accepted.

    Connections are accepted in their order: before one of our own come all earlier ones.
    """
    with contextlib.ExitStack() as stack, self.lock:
      for origin in self._origins:
        last = stack.enter_context(socket.create_connection(("127.0.0.1", origin.port)))
        if not self.lock.wait_for(functools.partial(self._is_accepted, last), timeout):
          return False
      stack.close()
      return self.lock.wait_for(lambda: not self.connections, timeout)

  def _is_accepted(self, client: socket.socket) -> bool:
    """Whether the other end of this connection is there."""
    with contextlib.suppress(OSError):
      return client.getsockname() in [each.getpeername() for each in self.connections.values()]
    return False

  def clear_log(self) -> None:
    """Forget the requests so far."""
    with self.lock:
      self.log.clear()
      self.started = 0

  def requests(self, substring: str = "", origin: str | None = None) -> list[Request]:
    """The logged requests whose path contains the substring."""
    with self.lock:
      found = [each for each in self.log if origin in (None, each.origin)]
    return [each for each in found if substring in each.path]

  def paths(self, substring: str = "", origin: str | None = None) -> list[str]:
    """The paths of the logged requests."""
    return [each.path for each in self.requests(substring, origin)]


# --- By hand ---------------------------------------------------------------------------------


def version_key(tag: str) -> tuple[list[int], str]:
  """Sorts tags by their numbers, so that v10 comes after v9."""
  return [int(number) for number in re.findall(r"\d+", tag)], tag


def add_folder(server: ReleaseServer, folder: Path) -> None:
  """Publish the files of a folder REPO/TAG/NAME, the higher version as the newer one."""
  for repo in sorted(path for path in folder.iterdir() if path.is_dir()):
    tags = [path for path in repo.iterdir() if path.is_dir()]
    for day, tag in enumerate(sorted(tags, key=lambda path: version_key(path.name))):
      published = (datetime(2026, 1, 1) + timedelta(days=day)).strftime(STAMP)
      assets = {path.name: path for path in sorted(tag.iterdir()) if path.is_file()}
      server.add_release(repo.name, tag.name, assets, published=published)


def main() -> None:
  """Serve a folder until Ctrl-C."""
  parser = argparse.ArgumentParser(description="Serve DIR/REPO/TAG/NAME as GitHub does.")
  parser.add_argument("folder", metavar="DIR", type=Path)
  parser.add_argument("--rate", type=float, help="bytes a second and connection")
  parser.add_argument("--latency", type=float, default=0, help="seconds before each answer")
  options = parser.parse_args()
  with ReleaseServer() as server, contextlib.suppress(KeyboardInterrupt):
    server.rate, server.latency = options.rate, options.latency
    add_folder(server, options.folder)
    print(f"export QVM_RELEASES_URL={server.url}")
    print(f"export QVM_API_URL={server.api_url}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
  main()
