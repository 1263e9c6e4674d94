"""Hosts as they are (faults H1 to H9), terminals and pipes (T1 to T4), each by its number.

Every case is a clear error before anything is downloaded or booted, or it works.
"""

import ctypes
import fcntl
import json
import os
import pty
import re
import shutil
import socket
import ssl
import subprocess
import sys
import termios
import threading
import time

import pytest
import ssh_guest
from darwin_host import DARWIN, Mac, put_program, qemu_text
from release_server import ReleaseServer
from support import (
  DEADLINE,
  PYTHON,
  end_processes,
  fill,
  free_port,
  obey_modes,
  processes_of,
  works,
)
from support_pythons import MODERN, since

GUEST = ("--platform", "x86-64", "freebsd", "15.1")
PULL = ("pull", *GUEST)
REAL_MAC = sys.platform == "darwin"
linux = pytest.mark.skipif(REAL_MAC, reason="needs a fault that only Linux can be given")
with_guest = pytest.mark.skipif(
  REAL_MAC or bool(ssh_guest.missing()), reason="the stand-in guest needs Linux and its sshd"
)
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


def own_lines(text):
  """What qvm itself says, without what QEMU and the guest do."""
  return "\n".join(line[5:] for line in text.splitlines() if line.startswith("qvm: "))


def plain_error(run, *fragments, code=1):
  """An error of a few lines that hold the fragments."""
  assert run.returncode == code, (run.stdout, run.stderr)
  assert "Traceback" not in run.stderr and "bug" not in run.stderr, run.stderr
  for fragment in fragments:
    assert re.search(fragment, own_lines(run.stderr)), run.stderr


def checks_of(run):
  return {check["name"]: check for check in json.loads(run.stdout)}


# --- H1: a user without an entry -----------------------------------------------------------------


def has_wrapper():
  try:
    ctypes.CDLL("libnss_wrapper.so")
    return True
  except OSError:
    return False


@pytest.fixture
def nobody(tmp_path):
  """Variables under which the current uid has no entry among the users."""
  if not has_wrapper():
    pytest.skip("no libnss_wrapper.so here")
  (tmp_path / "passwd").write_text(f"other:x:{os.getuid() + 1}:1::/:/bin/sh\n")
  (tmp_path / "group").write_text("other:x:1:\n")
  return {
    "LD_PRELOAD": "libnss_wrapper.so",
    "NSS_WRAPPER_PASSWD": str(tmp_path / "passwd"),
    "NSS_WRAPPER_GROUP": str(tmp_path / "group"),
  }


@linux
def test_h1_ssh_that_cannot_work_is_noticed_before_the_download(qvm, server, nobody):
  run = qvm("run", "--rm", *GUEST, "--", "true", env=nobody)
  plain_error(run, rf"(?i)uid {os.getuid()}|passwd", code=125)
  assert server.started == 0


@linux
def test_h1_doctor_says_why(offline, nobody):
  check = checks_of(offline("doctor", "--offline", "--json", env=nobody))["ssh"]
  assert check["state"] != "ok" and "again" not in check["fix"]
  assert re.search(r"(?i)passwd|uid", check["text"] + check["fix"])


@linux
def test_h1_what_needs_no_ssh_works(qvm, nobody):
  works(qvm(*PULL, env=nobody))
  qvm.play(stdout="it boots\n")
  assert works(qvm("run", "--rm", *GUEST, env=nobody)).stdout == "it boots\n"


# --- H2: the folder that variables name ----------------------------------------------------------


@pytest.mark.parametrize("name, below", [("QVM_CACHE_DIR", ""), ("XDG_CACHE_HOME", "/qvm")])
def test_h2_a_tilde_is_the_home_or_refused(offline, tmp_path, name, below):
  run = offline("config", "print-path", env={name: "~/x"}, cwd=str(tmp_path))
  if run.returncode:
    plain_error(run, name, "~", code=2)
  else:
    assert run.stdout == f"{offline.home}/x{below}\n"
  offline(*PULL, env={name: "~/x"}, cwd=str(tmp_path))
  assert not (tmp_path / "~").exists()


def test_h2_an_empty_home_is_none(offline):
  run = offline("config", "print-path", env={"HOME": ""})
  if run.returncode:
    plain_error(run, "HOME", code=run.returncode)
  else:
    assert not run.stdout.startswith(("//", "/.cache")) and run.stdout.startswith("/")


# --- H3: certificates ----------------------------------------------------------------------------

OPENSSL = """\
[ca]
default_ca = own
[own]
database = {0}/index
new_certs_dir = {0}
serial = {0}/serial
default_md = sha256
policy = any
x509_extensions = names
unique_subject = no
[any]
commonName = supplied
[names]
subjectAltName = DNS:localhost,IP:127.0.0.1
"""


def certificate(folder, start, end, usage="keyUsage=critical,keyCertSign"):
  """A server's side of TLS, certified by an authority from a day to a day; the authority's file."""
  config = folder / "config"
  config.write_text(OPENSSL.format(folder))
  (folder / "index").write_text("")
  (folder / "serial").write_text("01\n")

  def openssl(*words):
    subprocess.run(["openssl", *words], check=True, cwd=str(folder), stderr=subprocess.DEVNULL)

  new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
  openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority",
          "-addext", usage, "-days", "30")  # fmt: skip
  openssl(*new, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=localhost")
  sign = ["ca", "-batch", "-notext", "-config", "config", "-keyfile", "ca.key", "-cert", "ca.pem"]
  sign += ["-in", "request.pem", "-out", "cert.pem", "-startdate", start, "-enddate", end]
  openssl(*sign)
  tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  tls.load_cert_chain(str(folder / "cert.pem"), str(folder / "key.pem"))
  return tls, str(folder / "ca.pem")


@pytest.mark.parametrize("start, end, trusted, right, wrong", [
  pytest.param("20000101000000Z", "20000201000000Z", True, "clock", "Install Certificates",
               marks=since(3, 7)),
  pytest.param("20900101000000Z", "20900201000000Z", True, "clock", "Install Certificates",
               marks=since(3, 7)),
  pytest.param("20000101000000Z", "20900101000000Z", False, "ca-certificates",
               "Install Certificates", marks=linux),
], ids=["expired", "not yet valid", "unknown"])  # fmt: skip
def test_h3_the_hint_fits_the_fault(offline, tmp_path, start, end, trusted, right, wrong):
  tls, authority = certificate(tmp_path, start, end)
  with ReleaseServer(tls) as secure:
    env = {"QVM_RELEASES_URL": secure.url, "QVM_API_URL": secure.api_url}
    if trusted:
      env["SSL_CERT_FILE"] = authority
    run = offline(*PULL, env=env)
  plain_error(run, "certificate", right)
  assert wrong not in run.stderr


@pytest.mark.parametrize("python", [p for v, p in MODERN.items() if int(v[2:]) >= 13])
def test_h3_a_certificate_that_new_pythons_refuse(offline, tmp_path, python):
  """As of a company's proxy whose authority was made long ago."""
  tls, authority = certificate(tmp_path, "20000101000000Z", "20900101000000Z", "nsComment=old")
  with ReleaseServer(tls) as secure:
    env = {"QVM_RELEASES_URL": secure.url, "QVM_API_URL": secure.api_url}
    run = offline(*PULL, env={**env, "SSL_CERT_FILE": authority}, python=python)
  plain_error(run, "certificate", "Python 3.13 and newer refuse")


# --- H4: proxies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:{}", "socks5h://127.0.0.1:{}",
                                   "socks4://u:s3cret@127.0.0.1:{}"])  # fmt: skip
def test_h4_socks_is_not_spoken(qvm, server, proxy):
  run = qvm(*PULL, env={"http_proxy": proxy.format(free_port())})
  plain_error(run, "SOCKS|socks")
  assert "s3cret" not in run.stderr and server.started == 0
  assert "again" not in run.stderr and len(run.stderr.splitlines()) <= 2


@pytest.mark.parametrize("pattern, direct", [
  ("127.0.0.0/8", True),
  ("10.0.0.0/8, 127.0.0.0/30", True),
  ("10.0.0.0/8,192.168.0.0/16", False),
  ("127.0.0.1", True),
])  # fmt: skip
def test_h4_networks_in_no_proxy(qvm, server, pattern, direct):
  env = {"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": pattern + ",localhost"}
  run = qvm(*PULL, env=env)
  assert (run.returncode == 0) == direct, run.stderr


# --- H5 and H6: the cache ------------------------------------------------------------------------


@linux
@as_root
def test_h5_a_cache_that_sudo_made_is_explained(qvm, server):
  qvm.cache.mkdir(parents=True)
  qvm.cache.chmod(0o700)
  os.chown(str(qvm.cache), 12345, 12345)
  plain_error(qvm(*PULL, preexec_fn=obey_modes), "chown")
  run = qvm("list", preexec_fn=obey_modes)
  assert run.returncode == 1 and run.stdout == "", (run.stdout, run.stderr)
  assert str(qvm.cache) in run.stderr and server.started == 0


@linux
@as_root
def test_h5_a_folder_above_that_sudo_made_is_explained(qvm, server):
  above = qvm.cache.parent
  above.mkdir()
  os.chown(str(above), 12345, 12345)
  plain_error(qvm(*PULL, preexec_fn=obey_modes), "chown", str(above))
  assert server.started == 0


@linux
def test_h6_locks_that_let_everybody_in_are_noticed(tmp_path):
  mac = Mac(tmp_path)
  env = {"DARWIN_FLOCK": "no"}
  checks = checks_of(mac("doctor", "--offline", "--json", env=env))
  assert checks["cache"]["state"] != "ok" and "lock" in checks["cache"]["text"]
  assert checks_of(mac("doctor", "--offline", "--json"))["cache"]["state"] == "ok"


# --- H7 and H8: folders that are gone ------------------------------------------------------------


def in_a_deleted_folder(folder):
  """For preexec_fn: go into a folder and remove it."""

  def go():
    os.mkdir(str(folder))
    os.chdir(str(folder))
    os.rmdir(str(folder))

  return go


@pytest.mark.parametrize("words, name", [
  (PULL, "QVM_CACHE_DIR"),
  (("list",), "QVM_CACHE_DIR"),
  (("doctor", "--offline"), "QVM_CACHE_DIR"),
])  # fmt: skip
def test_h7_a_relative_cache_in_a_deleted_folder(offline, tmp_path, words, name):
  run = offline(*words, env={name: "cache"}, preexec_fn=in_a_deleted_folder(tmp_path / "gone"))
  assert run.returncode in (1, 2), run.stderr
  assert "Traceback" not in run.stderr and "bug" not in run.stderr, run.stderr
  assert re.search(r"current (folder|directory)", run.stderr + run.stdout), run.stderr


def test_h7_a_deleted_folder_to_synchronise(offline, tmp_path):
  words = ("run", "--rm", "--sync", ".", *GUEST, "--", "true")
  run = offline(*words, preexec_fn=in_a_deleted_folder(tmp_path / "gone"))
  assert run.returncode in (2, 125)
  assert re.search(r"current (folder|directory)", run.stderr), run.stderr
  assert "Traceback" not in run.stderr


def test_h7_a_deleted_folder_that_is_not_needed(qvm, tmp_path):
  works(qvm(*PULL, preexec_fn=in_a_deleted_folder(tmp_path / "gone")))
  works(qvm("list", preexec_fn=in_a_deleted_folder(tmp_path / "gone")))


@with_guest
@pytest.mark.parametrize("sync", [False, True])
def test_h8_no_folder_for_temporary_files(full, tmp_path, sync):
  """It is said before the boot, or the cache is used."""
  mac = machine_of(full, tmp_path)
  mac.env["SSH_GUEST"] = json.dumps({"folder": str(tmp_path / "guest")})
  (tmp_path / "project").mkdir()
  words = ("--sync", str(tmp_path / "project")) if sync else ()
  port = ("--ssh-port", str(free_port()))
  env = {"DARWIN_TMP": "no", "TMPDIR": "/nowhere", "PYTHONPATH": str(DARWIN)}
  env.update(DARWIN_CALLS=str(tmp_path / "calls"), DARWIN_MACHINE="intel", DARWIN_STARTED="1")
  command = ("--accel", "tcg", *port, *words, *GUEST, "--", "echo fine >made; echo fine")
  run = mac("run", "--rm", *command, env=env, cwd="/")
  if run.returncode == 0:
    assert run.stdout == "fine\n" and (tmp_path / "project/made").exists() == sync
  else:
    plain_error(run, "(?i)temporary|TMPDIR", code=125)
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    assert "qemu\t" not in calls


# --- H9: servers that talk a lot -----------------------------------------------------------------


@pytest.fixture
def talker():
  """A server whose status lines are long; returns its address."""
  server = socket.socket()
  server.bind(("127.0.0.1", 0))
  server.listen(20)
  server.settimeout(0.1)
  done = threading.Event()

  def serve():
    while not done.is_set():
      try:
        link = server.accept()[0]
      except OSError:
        continue
      with link:
        link.settimeout(5)
        link.recv(65536)
        link.sendall(b"HTTP/1.1 503 " + b"word " * 2000 + b"\r\nContent-Length: 0\r\n\r\n")

  thread = threading.Thread(target=serve)
  thread.start()
  yield f"http://127.0.0.1:{server.getsockname()[1]}"
  done.set()
  thread.join()
  server.close()


def test_h9_a_message_is_as_long_as_a_message(offline, talker):
  run = offline(*PULL, env={"QVM_RELEASES_URL": talker, "QVM_API_URL": talker + "/api"})
  plain_error(run, "503")
  assert len(run.stderr) < 5000


# --- T1 to T4: terminals and pipes ---------------------------------------------------------------


def machine_of(full, tmp_path):
  """qvm whose QEMU treats its streams as QEMU does; $MAC_QEMU and $SSH_GUEST say what it is."""
  program = full.cache / "qemu/x86_64/bin/qemu-system-x86_64"
  put_program(program, f"#!{sys.executable} -IS\n{qemu_text()}")
  (tmp_path / "tmp").mkdir()
  full.env.update(TMPDIR=str(tmp_path / "tmp"), MAC_QEMU=json.dumps({"terminal": True}))
  return full


def qemu_plays(qvm, **play):
  qvm.env["MAC_QEMU"] = json.dumps({"terminal": True, **play})


@pytest.fixture
def machine(full, tmp_path):
  qvm = machine_of(full, tmp_path)
  yield qvm
  end_processes(f"HOME={qvm.home}", environment=True)


def state_of(pid):
  """A letter for what a process does: T has been stopped."""
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0]
  except OSError:
    return ""


# Leads a session on a terminal and starts a command in another group than that in its foreground.
LEADER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], preexec_fn=os.setpgrp)
sys.exit(process.wait() & 255)
"""
RUN = ("run", "--rm", "--accel", "tcg", *GUEST)


def in_the_background(qvm, *words, typed=b""):
  """Run qvm in the background of a terminal; its exit code and what the terminal showed.

  A process that is stopped, or that still runs after a while, fails the test.
  """
  outside, inside = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, "-c", LEADER, *qvm.command(*words)],
    env=qvm.env,
    stdin=inside,
    stdout=inside,
    stderr=inside,
    start_new_session=True,
    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
  )
  os.close(inside)
  os.set_blocking(outside, False)
  shown, deadline = b"", time.monotonic() + DEADLINE
  try:
    if typed:
      os.write(outside, typed)
    while process.poll() is None:
      ours = processes_of(f"HOME={qvm.home}", environment=True)
      stopped = [pid for pid in ours if state_of(pid) == "T"]
      assert not stopped, (stopped, shown)
      assert time.monotonic() < deadline, shown
      shown += read_all(outside)
      time.sleep(0.02)
    return process.returncode, (shown + read_all(outside)).decode()
  finally:
    end_processes(f"HOME={qvm.home}", environment=True)
    process.wait()
    os.close(outside)


def read_all(fd):
  """What can be read from a terminal by now."""
  found = b""
  try:
    while True:
      found += os.read(fd, 1 << 16)
      if not found:
        return found
  except OSError:
    return found


@linux
def test_t1_in_the_background_of_a_terminal(machine):
  """As `timeout 15 qvm run` and `qvm run &` in a script."""
  qemu_plays(machine, stdout="it boots\n", exit=3)
  code, shown = in_the_background(machine, *RUN)
  assert code == 3 and "it boots" in shown, shown


@with_guest
@pytest.mark.parametrize("typed", [b"", b"\r"])
def test_t1_a_command_in_the_background_of_a_terminal(machine, tmp_path, typed):
  machine.env["SSH_GUEST"] = json.dumps({"folder": str(tmp_path / "guest")})
  words = (*RUN[:2], "--ssh-port", str(free_port()), *RUN[2:], "--", "echo fine; sleep 0.5; exit 4")
  code, shown = in_the_background(machine, *words, typed=typed)
  assert code == 4 and "fine" in shown, shown


@pytest.mark.parametrize("log", [False, True])
def test_t2_the_callers_pipes_stay_as_they_are(machine, tmp_path, fifo, log):
  """Also while QEMU runs, and when it is killed."""
  qemu_plays(machine, wait=str(fifo))
  pipes = [os.pipe() for _ in range(3)]
  streams = {"stdin": pipes[0][0], "stdout": pipes[1][1], "stderr": pipes[2][1]}
  words = ("--console-log", str(tmp_path / "log")) if log else ()
  process = machine.start(*RUN[:2], *words, *RUN[2:], **streams)
  try:
    with open(str(fifo), "w"):  # as soon as QEMU has done what it does to its streams
      during = [os.get_blocking(fd) for fd in streams.values()]
      process.terminate()
      process.wait(DEADLINE)
    after = [os.get_blocking(fd) for fd in streams.values()]
  finally:
    for fd in (fd for pair in pipes for fd in pair):
      os.close(fd)
  assert during == after == [True, True, True]


@with_guest
def test_t2_the_callers_pipes_during_a_command(machine, tmp_path):
  machine.env["SSH_GUEST"] = json.dumps({"folder": str(tmp_path / "guest")})
  pipes = [os.pipe() for _ in range(3)]
  streams = {"stdin": pipes[0][0], "stdout": pipes[1][1], "stderr": pipes[2][1]}
  words = (*RUN[:2], "--ssh-port", str(free_port()), *RUN[2:], "--", "echo up; cat; echo no >&2")
  process = machine.start(*words, **streams)
  try:
    with open(pipes[1][0], "rb", buffering=0, closefd=False) as out:
      assert out.read(3) == b"up\n"
      assert [os.get_blocking(fd) for fd in streams.values()] == [True, True, True]
      os.write(pipes[0][1], b"typed\0\xff")
      assert out.read(7) == b"typed\0\xff"
    os.close(pipes[0][1])
    assert process.wait(DEADLINE) == 0
    assert [os.get_blocking(fd) for fd in streams.values()] == [True, True, True]
    assert os.read(pipes[2][0], 1 << 16).endswith(b"no\n")
  finally:
    process.kill()
    process.wait()
    for fd in {fd for pair in pipes for fd in pair} - {pipes[0][1]}:
      os.close(fd)


@with_guest
def test_t2_a_reader_that_leaves_ends_the_command(machine, tmp_path):
  """As `qvm ssh vm -- yes | head -1`."""
  machine.env["SSH_GUEST"] = json.dumps({"folder": str(tmp_path / "guest")})
  words = (*RUN[:2], "--ssh-port", str(free_port()), *RUN[2:], "--", "yes")
  process = machine.start(*words)
  assert process.stdout.read(2) == "y\n"
  process.stdout.close()
  process.communicate(timeout=DEADLINE)
  assert process.returncode != 0


@linux
def test_t3_a_stdin_that_can_only_be_written(machine, tmp_path):
  """As nohup's. QEMU would find it ready for ever, and burn a core."""
  qemu_plays(machine, stdin=str(tmp_path / "read"))
  with open(os.devnull, "wb") as null:
    works(machine(*RUN, stdin=null))
  assert (tmp_path / "read").read_text() == "BlockingIOError"  # there is nothing to read


@pytest.mark.parametrize("words", [
  PULL, RUN, ("list",), ("doctor", "--offline"),
], ids=["pull", "run", "list", "doctor"])  # fmt: skip
def test_t4_python_has_nothing_to_warn_of(machine, words):
  is_silent(machine, *words)


@with_guest
def test_t4_nor_after_a_command(machine, tmp_path):
  machine.env["SSH_GUEST"] = json.dumps({"folder": str(tmp_path / "guest")})
  (tmp_path / "project").mkdir()
  more = ("--ssh-port", str(free_port()), "--sync", str(tmp_path / "project"))
  is_silent(machine, *RUN[:2], *more, *RUN[2:], "--", "true")


def is_silent(qvm, *words):
  for options in (("-W", "error"), ("-X", "dev", "-W", "error")):
    command = [PYTHON, *options, str(qvm.program), *words]
    run = subprocess.run(
      command,
      env=qvm.env,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=DEADLINE,
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_t4_a_first_pull_has_nothing_to_warn_of_either(qvm, image, tools_tar):
  with ReleaseServer() as server:
    fill(server, image, tools_tar)
    is_silent(qvm, *PULL)
  shutil.rmtree(str(qvm.cache))
