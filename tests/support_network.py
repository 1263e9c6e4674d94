"""The network as the tests see it: proxies, certificates, and downloads that hang."""

import contextlib
import http.client
import http.server
import os
import select
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse

from support import DEADLINE, IMAGE, PULL, finished

import qvm as qvm_source


def check_works(qvm, result, image):
  """It worked, and left just what it should."""
  assert result.returncode == 0, result.stderr
  assert "Traceback" not in result.stderr and "sig=" not in result.stderr
  assert (qvm.cache / "base" / IMAGE).read_bytes() == image
  assert list(os.walk(str(qvm.cache / "downloads")))[1:] == []
  assert not [path for path in qvm.files() if ".tmp" in path or path.startswith("downloads/")]


def unfinished(qvm, name=IMAGE):
  """The part, the map and the note of a file that is being downloaded."""
  return [qvm.cache / "downloads" / name / each for each in ("part", "map", "note.json")]


def kept(qvm, name=IMAGE):
  """The bytes from which a download goes on: the blocks that its map marks at the beginning."""
  marks = unfinished(qvm, name)[1].read_bytes()
  return (len(marks) - len(marks.lstrip(b"\1"))) * qvm_source.BLOCK_BYTES


def ranges(server, name=IMAGE):
  """The Range headers of the requests for the asset, None where there was none."""
  return [each.headers.get("range") for each in server.requests(name, "cdn")]


def hangs(process, *faults):
  """Wait until the process hangs in each of the faults."""
  until = time.monotonic() + DEADLINE
  for fault in faults:
    while not fault.reached.wait(0.05):
      assert process.poll() is None, process.stderr.read()
      if time.monotonic() > until:
        process.kill()
        raise AssertionError("it does not get there")


def changed_meanwhile(qvm, server, other, place):
  """Pull an image that becomes another one when the connection ends at some place in it."""
  go = threading.Event()
  fault = server.fault(IMAGE, pause=go, pause_at=place, cut=place)
  process = qvm.start(*PULL)
  hangs(process, fault)
  server.replace_asset("freebsd-builder", "v0.16.0", IMAGE, other)
  go.set()
  return finished(process)


def certificate(folder, names):
  """A server's side of TLS with a certificate of its own making, and the file to trust it by."""
  key, cert = str(folder / "key.pem"), str(folder / "cert.pem")
  command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
  more = ["-keyout", key, "-out", cert, "-subj", "/CN=localhost"]
  more += ["-addext", f"subjectAltName={names}"]
  subprocess.run([*command.split(), *more], check=True, stderr=subprocess.DEVNULL)
  tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  tls.load_cert_chain(cert, key)
  return tls, cert


class ProxyHandler(http.server.BaseHTTPRequestHandler):
  """Hands requests on, and writes them down with the credentials that come along."""

  def log_message(self, format, *args):
    pass

  def do_GET(self):
    self.server.seen.append((self.path, self.headers.get("Proxy-Authorization")))
    if self.server.status:
      return self.send_error(self.server.status)
    parts = urllib.parse.urlsplit(self.path)
    connection = http.client.HTTPConnection(parts.netloc, timeout=DEADLINE)
    headers = {k: v for k, v in self.headers.items() if not k.lower().startswith("proxy-")}
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
    answer = connection.getresponse()
    self.send_response_only(answer.status, answer.reason)
    for name, value in answer.getheaders():
      self.send_header(name, value)
    self.end_headers()
    for data in iter(lambda: answer.read1(1 << 16), b""):  # as it comes
      self.wfile.write(data)
    connection.close()

  def do_CONNECT(self):
    self.server.seen.append((self.path, self.headers.get("Proxy-Authorization")))
    if self.server.status:
      return self.send_error(self.server.status)
    host, port = self.path.split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as far:
      self.send_response_only(200)
      self.end_headers()
      other = {self.connection: far, far: self.connection}
      while True:
        for end in select.select(list(other), [], [])[0]:
          data = end.recv(1 << 16)
          if not data:
            return
          other[end].sendall(data)


class Proxy(http.server.ThreadingHTTPServer):
  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), ProxyHandler)
    self.seen, self.status, self.port = [], 0, self.server_address[1]

  def handle_error(self, request, client_address):
    pass


@contextlib.contextmanager
def served(server):
  """A server that works in a thread of its own."""
  thread = threading.Thread(target=server.serve_forever, args=(0.05,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
