"""What people ask for: issue 20, point by point, with the stand-ins."""

import contextlib
import json
import os
import re
import select
import shlex
import socket
import subprocess
from pathlib import Path

import guests as guests_module
import linux_guest
import pytest
from release_server import ReleaseServer
from support import (
  BASE,
  DEAD,
  DEADLINE,
  FREEBSD,
  IMAGE,
  PULL,
  QEMU,
  ROOT,
  TOOLS,
  Qvm,
  digest,
  disk_of,
  end_processes,
  fails,
  forget_sizes,
  free_port,
  instance_names,
  rows,
  sha256,
  snapshot,
  stand_in_tar,
  state,
  with_another,
  works,
)
from support_terminal import Terminal, unread
from test_instances import image_info, write_into
from test_tables import argv_of

import qvm as qvm_source

RUN = ("run", "freebsd", "15.1")


# --- The beginning of a version --------------------------------------------------------------


@pytest.mark.parametrize(
  "beginning, newest",
  [
    ("15", "15.10"),
    ("1", ""),
    ("15.1", "15.1"),
    ("150", "150.2"),
    ("16", "16.0"),
    ("16.0-rc", "16.0-rc2"),
    ("r1", "r1beta6"),
    ("r15", ""),
    ("6.4", "6.4.2"),
    ("", "150.2"),
    ("99", ""),
  ],
)
def test_each_part_counts_whole(beginning, newest):
  versions = ["15.1", "15.10", "15.9", "150.2", "16.0", "16.0-rc2", "17.0-rc1", "6.4.2", "6.4.1"]
  if beginning.startswith("r"):
    versions = ["r1beta5", "r1beta6", "r1rc7", "r151058"]
  assert qvm_source.newest_of(versions, beginning) == newest


def bases(qvm):
  return [name for name in qvm.files() if name.startswith("base/") and name.endswith("qcow2")]


def test_a_beginning_is_the_newest_of_the_server(no_image, server, image):
  server.add_release("netbsd-builder", "v0.8.0", {"netbsd-10.2-x86-64.qcow2": image})
  run = works(no_image("pull", "netbsd", "10", "--platform", "x86-64"))
  assert bases(no_image) == ["base/netbsd-10.2-x86-64.qcow2"]
  assert "the newest NetBSD 10 for x86-64 is 10.2" in run.stderr


def test_a_whole_version_asks_no_list(full, server):
  before = server.started
  works(full(*RUN))
  assert server.started == before


def test_a_beginning_from_the_cache_when_the_network_is_away(offline, image):
  (offline.cache / "base").mkdir(parents=True)
  for stem in ("freebsd-14.4-x86-64", "freebsd-15.0-x86-64", "freebsd-15.1-arm64"):
    (offline.cache / "base" / f"{stem}.qcow2").write_bytes(image)
  run = works(offline("run", "--dry-run", "freebsd", "15", "--platform", "x86-64"))
  assert "/freebsd-15.0-x86-64.qcow2" in run.stdout
  run = offline("run", "freebsd", "15", "--platform", "x86-64")
  assert "taking the newest cached version, 15.0" in run.stderr


def test_no_such_beginning(no_image):
  run = no_image("pull", "freebsd", "99", "--platform", "x86-64")
  assert run.returncode == 1
  assert "no FreeBSD 99 for x86-64" in run.stderr and "15.1" in run.stderr.splitlines()[-1]


# --- A port of the guest on the host ---------------------------------------------------------


def parse(*words):
  return qvm_source.parse_command_line(words)


@pytest.mark.parametrize(
  "text, shown",
  [
    ("8080:80", "127.0.0.1:8080:80"),
    ("0:80", "127.0.0.1:0:80"),
    ("0.0.0.0:53:053/udp", "0.0.0.0:53:53/udp"),
    ("127.0.0.3:080:1/tcp", "127.0.0.3:80:1"),
  ],
)
def test_what_is_published(text, shown):
  for words in (("-p", text), ("-p" + text,), ("--publish=" + text,)):
    (forward,) = parse(*RUN, *words).publish
    assert str(forward) == shown and parse(*RUN, "-p", shown).publish == (forward,)


BAD_PORTS = ("", "80", ":80", "80:", "65536:1", "1:0", "1:65536", "1:2/sctp", "a:80", "1.2.3:1:2",
             "256.0.0.1:1:2", "::1:1:2", "localhost:1:2", "1:2:3:4", "-1:2", "1:2/")  # fmt: skip


@pytest.mark.parametrize("text", BAD_PORTS)
def test_what_cannot_be_published(offline, text):
  with pytest.raises(qvm_source.UsageError, match="invalid port to publish"):
    parse(*RUN, "--publish=" + text)


def test_bad_ports_end_before_anything_happens(offline):
  fails(offline(*RUN, "-p", "80"), "invalid port to publish '80'", code=2)
  fails(offline(*RUN, "-p", "8080:80", "-p", "0.0.0.0:8080:81"), "used twice", code=2)
  fails(offline(*RUN, "--ssh-port", "8080", "-p", "8080:81"), "used twice", code=2)
  assert not offline.cache.exists()
  parse(*RUN, "-p", "0:80", "-p", "0:81", "-p", "53:53", "-p", "53:53/udp")


def hostfwds(argv):
  """The ports that a QEMU is told to forward."""
  return re.findall(r"hostfwd=([^,]+)", argv[argv.index("-netdev") + 1])


def test_ports_are_published_listed_and_kept(used, background):
  first, second, ssh = free_port(), free_port(), free_port()
  port = ("--ssh-port", str(ssh))
  process, record = background(used, *RUN, *port, "-p", f"{first}:80", "-p", f"{second}:53/udp")
  wanted = [f"tcp:127.0.0.1:{first}-:80", f"udp:127.0.0.1:{second}-:53"]
  assert hostfwds(record["argv"]) == [*wanted, f"tcp:127.0.0.1:{ssh}-:22"]
  ports = [f"127.0.0.1:{first}:80", f"127.0.0.1:{second}:53/udp"]
  assert rows(used)[FREEBSD]["ports"] == ports
  assert " ".join(ports) in used("list").stdout
  process.terminate()
  process.wait()
  assert rows(used)[FREEBSD]["ports"] == []
  argv = used("run", "--dry-run", *RUN[1:]).stdout
  assert [f"hostfwd={each}" in argv for each in wanted] == [True, True], "they are kept"
  process, record = background(used, *RUN, *port)
  assert hostfwds(record["argv"])[:2] == wanted
  process.terminate()
  process.wait()
  process, record = background(used, *RUN, *port, "-p", "0:22")
  (free, _) = hostfwds(record["argv"])
  assert re.fullmatch(r"tcp:127\.0\.0\.1:[1-9][0-9]+-:22", free), "others are given in their place"
  process.terminate()
  assert re.search(r"publishes 127\.0\.0\.1:[1-9][0-9]+:22\n", process.communicate()[1])


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_taken_port_is_an_error_before_the_start(used, kind):
  with socket.socket(type=socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as taken:
    taken.bind(("127.0.0.1", 0))
    if kind == "tcp":
      taken.listen()
    port = taken.getsockname()[1]
    run = used(*RUN, "-p", f"{port}:80/{kind}", "--rm")
    fails(run, f"port {port}/{kind} on 127.0.0.1 is taken", "--publish")
  fails(used(*RUN, "-p", "192.0.2.1:1:80", "--rm"), "192.0.2.1 is not", "--publish")


def test_the_ssh_port_is_none_of_those_published(used, background):
  """2847 may be taken on this machine: then there is nothing to see."""
  with socket.socket() as probe:
    if probe.connect_ex(("127.0.0.1", 2847)) == 0:
      pytest.skip("port 2847 is taken")
  process, record = background(used, *RUN, "--rm", "-p", "2847:80")
  published, ssh = hostfwds(record["argv"])
  assert published == "tcp:127.0.0.1:2847-:80" and ":2847-" not in ssh


def test_a_published_port_is_no_other_machines_ssh_port(used, background):
  """From before QEMU has bound it, which this one never does."""
  port = str(free_port())
  background(used, *RUN, "-p", f"{port}:80")
  run = used(*RUN, "--name", "other", "--ssh-port", port)
  fails(run, f"port {port} on 127.0.0.1 is taken (--ssh-port)", "by which qvm locks it")


def test_a_port_that_the_instance_publishes_is_not_for_ssh(used):
  port = str(free_port())
  works(used(*RUN, "-p", f"{port}:80"))
  fails(used(*RUN, "--ssh-port", port), "is taken (--ssh-port): the machine publishes it")


def test_a_port_is_published_beside_its_udp_port(used, background):
  port = free_port()
  with socket.socket(type=socket.SOCK_DGRAM) as other:  # another program's
    other.bind(("127.0.0.1", port))
    works(used(*RUN, "-p", f"{port}:80"))
  background(used, *RUN, "-p", f"{port}:53", "-p", f"{port}:53/udp")
  with socket.socket(type=socket.SOCK_DGRAM) as qemus:
    qemus.bind(("127.0.0.1", port))


def test_a_port_that_qemu_cannot_bind_is_named(used):
  message = "Could not set up host forwarding rule 'tcp:127.0.0.1:8080-:80'"
  used.play(stderr=f"qemu: {message}\n", exit=1)
  run = used(*RUN)
  assert "qvm: QEMU failed: the port tcp:127.0.0.1:8080 is taken by another program" in run.stderr


def test_published_ports_go_with_checkpoints(guests, tmp_path):
  """The port is the host's matter: machines from one checkpoint publish different ones."""
  for number in range(2):
    port = free_port()
    guests.play(record=str(tmp_path / "record"))
    run = works(guests.run("true", options=("--warm", "-p", f"{port}:80")))
    assert f"tcp:127.0.0.1:{port}-:80" in hostfwds(guests.qvm.record(tmp_path / "record")["argv"])
    assert ("to create the checkpoint" in run.stderr) == (number == 0)


# --- restart, logs, clone --------------------------------------------------------------------


def test_restart_waits_for_another_boot(guests):
  guests.up("vm")
  before = guests.machine()
  run = works(guests.qvm("restart", "vm"))
  assert run.stdout == "vm\n" and "asking vm to reboot" in run.stderr
  assert (guests.folder / "reboots").read_text() == "-r now\n"
  assert (guests.folder / "boot").read_text() == "2\n", "the old boot is not taken for the new one"
  assert guests.machine() == before
  works(guests.qvm("stop", "vm"))
  fails(guests.qvm("restart", "vm"), "vm is not running")
  fails(guests.qvm("restart", "none"), "no instance none")


def test_a_guest_that_floods_when_asked_for_its_boot_takes_no_memory(guests, monkeypatch):
  guests.up("vm")
  guests.put_tool("sysctl", "exec head -c 1000000 /dev/zero")
  monkeypatch.setattr(qvm_source, "BOOT_ANSWER_SECONDS", 1.0)
  paths = qvm_source.Cache(str(guests.qvm.cache)).instance("vm")
  with pytest.raises(qvm_source.QvmError, match="guest of vm has not answered within 1 s"):
    qvm_source.boot_of(qvm_source.login_of(paths, 10.0))
  works(guests.qvm("stop", "vm"))


def test_all_names_are_looked_at_before_any_guest_reboots(guests):
  guests.up("other")
  works(guests.qvm("stop", "other"))
  guests.up("vm")
  fails(guests.qvm("restart", "vm", "other"), "other is not running; nothing was restarted")
  assert not (guests.folder / "reboots").exists()


def test_only_force_pulls_the_plug(guests):
  guests.play(ignore_shutdown=True)
  guests.up("vm", "-m", "512M", "--cpus", "3")
  before, port = guests.machine(), rows(guests.qvm)["vm"]["ssh"]
  run = guests.qvm("restart", "--boot-timeout", "2", "vm")
  fails_with = "vm has not rebooted within 2 s; it still runs"
  assert run.returncode == 1 and fails_with in run.stderr and "--force" in run.stderr
  assert guests.machine() == before
  guests.play()
  run = works(guests.qvm("restart", "--force", "--boot-timeout", "2", "vm"))
  assert guests.machine() != before and rows(guests.qvm)["vm"]["ssh"] == port
  words = Path("/proc", str(guests.machine()), "cmdline").read_text()
  assert "\0-m\x00512M\0" in words and "\0-smp\x003\0" in words, "as it was started"
  works(guests.qvm("stop", "vm"))


def change(guests, **commands):
  """Let commands of the running guest do something else."""
  for name, line in commands.items():
    guests.put_tool(name, line.format(folder=guests.folder, pid=guests.machine()))


@pytest.mark.parametrize(
  "shutdown, timeout, problems",
  [
    ("exit 1", 2, ["vm: sudo shutdown -r now failed", "vm has not rebooted within 2 s; it still"]),
    ("kill -USR1 {pid}", DEADLINE, ["the machine vm has ended instead of rebooting"]),
    ("echo DenyUsers runner >>{folder}/sshd_config", DEADLINE, ["cannot log in to vm as runner"]),
  ],
)
def test_a_guest_that_does_not_come_back(guests, shutdown, timeout, problems):
  guests.up("vm")
  change(guests, shutdown=shutdown)
  run = guests.qvm("restart", "--boot-timeout", str(timeout), "vm")
  assert (run.returncode, run.stdout) == (1, "")
  assert [problem in run.stderr for problem in problems] == [True] * len(problems), run.stderr


def test_a_guest_that_does_not_tell_its_boot(guests):
  guests.up("vm")
  change(guests, sysctl="exit")
  fails(guests.qvm("restart", "vm"), "the guest of vm does not tell its boot")
  assert not (guests.folder / "reboots").exists()


def test_a_guest_that_goes_down_while_it_is_asked(guests):
  guests.up("vm")
  change(guests, sysctl="cd {folder}; [ ! -e asked ] || exec mv asked boot; [ -e boot ]; echo $?")
  works(guests.qvm("restart", "vm"))
  assert (guests.folder / "boot").read_text() == "2\n"


def test_force_does_not_end_a_machine_that_is_thrown_away_then(guests):
  guests.play(ignore_shutdown=True)
  guests.up("vm", "--rm")
  before = guests.machine()
  run = guests.qvm("restart", "--force", "--boot-timeout", "2", "vm")
  assert run.returncode == 1 and "not that of a --rm machine" in run.stderr
  assert guests.machine() == before
  works(guests.qvm("stop", "--force", "vm"))


def test_the_patience_of_restart_is_for_what_it_starts_too(guests):
  guests.play(ignore_shutdown=True)
  guests.up("vm")
  guests.play(listen=False)
  run = works(guests.qvm("restart", "--force", "--boot-timeout", "2", "vm"))
  assert "ssh has not answered within 2 s; the machine keeps running" in run.stderr
  works(guests.qvm("stop", "--force", "vm"))


def test_logs(guests):
  guests.play(console="first line\n\x1b]0;title\x07")
  guests.up("vm")
  assert works(guests.qvm("logs", "vm")).stdout == "first line\n\x1b]0;title\x07", "as it is"
  follower = guests.qvm.start("logs", "-f", "vm")
  assert follower.stdout.readline() == "first line\n"
  works(guests.qvm("stop", "vm"))
  output, errors = follower.communicate(timeout=DEADLINE)
  assert (follower.returncode, errors) == (0, "") and output.endswith("guest powers off\n")
  works(guests.qvm("rm", "vm"))
  fails(guests.qvm("logs", "vm"), "no instance vm")


def test_a_log_that_is_cut_while_it_is_followed(guests):
  guests.play(console="long " * 100 + "first\n")
  guests.up("vm")
  log = guests.qvm.cache / "instances/vm.console.log"
  follower = guests.qvm.start("logs", "-f", "vm")
  assert follower.stdout.readline().endswith("first\n")
  os.truncate(log, 0)
  while not select.select([follower.stdout], [], [], 0.1)[0]:
    with open(log, "a") as file:
      file.write("next\n")
  works(guests.qvm("stop", "vm"))
  output, _ = follower.communicate(timeout=DEADLINE)
  assert output.startswith("next\n") and output.endswith("guest powers off\n")


@contextlib.contextmanager
def log_on_a_terminal(guests, folder, console, code=None):
  guests.play(console=console)
  guests.up("vm", "--console-log", str(folder / "log"))
  works(guests.qvm("stop", "vm"))
  command = guests.qvm.command("logs", "vm", code=code)
  with contextlib.closing(Terminal(command, guests.qvm.env)) as terminal:
    yield terminal


def test_a_terminal_gets_a_log_without_what_harms_it(guests, tmp_path):
  with log_on_a_terminal(guests, tmp_path, "safe\x1b]0;title\x07\n") as terminal:
    terminal.until(b"powers off")
    assert terminal.process.wait(DEADLINE) == 0
  assert "safe" in terminal.text and "title" not in terminal.text


def test_what_a_terminal_answers_to_a_log_is_not_typed_into_the_shell(guests, tmp_path):
  with log_on_a_terminal(guests, tmp_path, "where\x1b[6n hidden\x1b[?25l\n") as terminal:
    terminal.until(b"\x1b[6n")
    terminal.type(b"\x1b[24;1R")
    terminal.until(b"\x1b[c")
    terminal.type(b"\x1b[?62c")
    assert terminal.end() == 0 and terminal.state() == terminal.before
    assert unread(terminal.inside) == 0
  assert "\x1b[?25h" in terminal.text and "[24;1R" not in terminal.text


def test_a_terminal_that_is_gone_has_no_more_answers(guests, tmp_path):
  """Where SIGHUP is ignored, as below nohup."""
  code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nqvm.ANSWER_SECONDS = 1e6"
  with log_on_a_terminal(guests, tmp_path, "where\x1b[6n\n", code) as terminal:
    terminal.until(b"\x1b[c")
    terminal.hang_up()
    assert terminal.process.wait(DEADLINE) == 0


def test_a_clone_of_what_cannot_be_read_names_that(used):
  disk = used.cache / "instances/old.qcow2"
  works(used(*RUN, "--name", "old"))
  disk.unlink()
  disk.symlink_to("/not/mounted/old.qcow2")
  fails(used("clone", "old", "new"), f"{disk}: No such file")


def test_a_clone_has_all_that_the_guest_wrote(used):
  works(used(*RUN, "--name", "old"))
  write_into(used.cache / "instances/old.qcow2")
  (used.cache / "instances/old.sync-0123456789abcdef").write_text("x")
  (used.cache / "instances/old.known_hosts").write_text("qvm key\n")
  (used.cache / "instances/new.known_hosts").write_text("qvm other\n")
  assert works(used("clone", "old", "new")).stdout == "new\n"
  assert digest(used.cache / "instances/new.qcow2") == digest(used.cache / "instances/old.qcow2")
  names = [name for name in instance_names(used) if name.startswith("new")]
  assert names == ["new.json", "new.qcow2", "new.sync-0123456789abcdef"], (
    "no host key is taken over"
  )
  record = json.loads((used.cache / "instances/new.json").read_text())
  old = json.loads((used.cache / "instances/old.json").read_text())
  assert record == {**old, "name": "new", "ssh": "", "words": ""} and old["ssh"]
  works(used(*RUN, "--name", "new"))
  assert list((used.cache / "downloads").iterdir()) == []
  before = state(used.cache)
  for words in (("old", "new"), ("old", "old")):
    fails(used("clone", *words), "already an instance", words[1])
  fails(used("clone", "none", "x"), "no instance none")
  fails(used("clone", "old"), "missing argument", code=2)
  fails(used("clone", "old", "a/b"), "invalid instance name", code=2)
  assert state(used.cache) == before


def test_logs_of_a_clone_are_not_those_of_the_original(used, tmp_path):
  used.play(stdout="the original's\n")
  works(used(*RUN, "--console-log", str(tmp_path / "log")))
  works(used("clone", FREEBSD, "new"))
  fails(used("logs", "new"), "there is no ", "instances/new.console.log")


@pytest.mark.parametrize("kind", ["device", "fifo"])
def test_a_console_that_goes_where_nothing_stays(used, fifo, kind):
  """What a FIFO gets is its reader's; `qvm logs` took it, and waited for more without end."""
  path = str(fifo) if kind == "fifo" else "/dev/null"
  reader = os.open(fifo, os.O_RDWR)
  used.play(stdout="one\n")
  works(used(*RUN, "--console-log", path))
  fails(used("logs", FREEBSD), f"there is no file {path}")
  assert kind == "device" or os.read(reader, 100) == b"one\n"
  os.close(reader)


def test_a_machine_that_runs_is_not_cloned(used, background):
  background(used, *RUN)
  fails(used("clone", FREEBSD, "new"), "already running", f"stop it: qvm stop {FREEBSD}")
  assert not (used.cache / "instances/new.json").exists()


def test_clones_of_one_machine_at_once(used, tmp_path):
  """The second said that the machine ran, and to stop it; that would have ended the first."""
  works(used(*RUN))
  clone = shlex.join(used.command("clone", FREEBSD, "second"))
  run = shlex.join(used.command(*RUN))
  another = ["sh", "-c", f"{clone} && ! {run} && {clone}2 && ! {run}"]
  first = with_another(used, ["clone", FREEBSD, "first"], "copy_sparse", another, tmp_path)
  assert works(first).stdout == "first\n" and "second\nqvm" in first.stderr
  assert first.stderr.count(f"{FREEBSD} is already running (qvm process ") == 2
  names = {FREEBSD, "first", "second", "second2"}
  assert set(instance_names(used)) == {
    f"{name}.{end}" for name in names for end in ("qcow2", "json")
  }
  works(used(*RUN))


def test_kill_9_of_clone_leaves_nothing(used, kill_at):
  works(used(*RUN, "--disk", "64M"))
  (used.cache / f"instances/{FREEBSD}.sync-0123456789abcdef").write_text("x")
  kill_at(used, "os.rename .* instances/new.qcow2", "clone", FREEBSD, "new")
  works(used(*RUN, "--name", "new"))
  assert [it for it in instance_names(used) if it.startswith("new")] == ["new.json", "new.qcow2"]
  works(used("rm", "new"))
  works(used("clone", FREEBSD, "new"))
  works(used("list"))
  ends = ["data", "json", "qcow2", "sync-0123456789abcdef"]
  assert [it for it in instance_names(used) if it.startswith("new")] == [
    f"new.{end}" for end in ends
  ]


# --- A second disk ---------------------------------------------------------------------------


def second_disk(argv):
  """The device and the file of the second disk."""
  line = " ".join(argv)
  found = re.search(
    r"-device ([a-z-]+),drive=drive2 -drive if=none,file=(.+?),id=drive2,(.*)", line
  )
  return found and found.group(1, 2)


def test_a_second_disk_is_kept_and_deleted_with_its_instance(used, tmp_path):
  used.play(record=str(tmp_path / "record"))
  data = used.cache / f"instances/{FREEBSD}.data"
  works(used(*RUN))
  assert second_disk(used.record(tmp_path / "record")["argv"]) is None and not data.exists()
  works(used(*RUN, "--disk", "20g"))
  assert second_disk(used.record(tmp_path / "record")["argv"]) == ("virtio-blk-pci", str(data))
  assert image_info(data)["virtual-size"] == 20 << 30 and image_info(data)["format"] == "qcow2"
  write_into(data)
  before = digest(data)
  for words in ((), ("--disk", "20G"), ("--disk", "20480")):
    works(used(*RUN, *words))
    assert second_disk(used.record(tmp_path / "record")["argv"])[1] == str(data)
  fails(used(*RUN, "--disk", "30G"), "has a second disk already, of 20480M", "--name")
  works(used("clone", FREEBSD, "copy"))
  works(used("clean", "--all"))
  assert digest(data) == digest(used.cache / "instances/copy.data") == before
  works(used("rm", FREEBSD))
  assert not data.exists() and (used.cache / "instances/copy.data").exists()
  (used.cache / "instances/copy.qcow2").unlink()
  works(used("clean"))
  fails(used(*RUN, "--rm", "--name", "copy"), "copy already exists")
  assert digest(used.cache / "instances/copy.data") == before, "nobody said to delete it"


def test_the_second_disk_of_a_temporary_instance_goes_with_it(used):
  before = state(used.cache)
  works(used(*RUN, "--rm", "--disk", "64M"))
  assert state(used.cache) == before


def test_the_second_disk_is_on_the_bus_of_the_first(offline):
  for os_name, version, device in (
    ("openbsd", "7.9", "scsi-hd"),
    ("omnios", "1.0", "virtio-blk-pci"),
  ):
    words = ("run", "--dry-run", "--disk", "1G", "--platform", "x86-64", os_name, version)
    assert second_disk(works(offline(*words)).stdout.split())[0] == device


@pytest.mark.parametrize("size", ["", "0", "1K", "x", "5T", "-1", "1.5G"])
def test_bad_sizes_of_disks(size):
  with pytest.raises(qvm_source.UsageError, match="invalid disk size"):
    parse(*RUN, "--disk=" + size)


def test_a_checkpoint_has_no_second_disk():
  with pytest.raises(qvm_source.UsageError, match="--disk cannot be combined with --warm"):
    parse(*RUN, "--rm", "--warm", "--disk", "1G")


# --- An image of one's own -------------------------------------------------------------------

OWN = "instances/freebsd-image-x86-64"


@pytest.fixture(params=["qcow2", "raw"])
def own(request, tmp_path, image):
  """An image of one's own, beside a file that looks like a record of it."""
  path = tmp_path / "a, folder" / f"freebsd-15.1-x86-64.{request.param}"
  path.parent.mkdir()
  path.write_bytes(image if request.param == "qcow2" else bytes(1 << 20))
  (path.parent / "freebsd-15.1-x86-64.json").write_text("mine")
  return path


def test_an_own_image_is_booted_and_never_written(used, own, tmp_path):
  used.play(record=str(tmp_path / "record"))
  before, cached = snapshot(own.parent), digest(used.cache / BASE)
  words = ("run", "--platform", "x86-64", "freebsd", "--image", str(own))
  works(used(*words, "--rm"))
  for _ in range(2):
    works(used(*words))
    disk = disk_of(used.record(tmp_path / "record")["argv"])
    assert disk == str(used.cache / f"{OWN}.qcow2")
    info = image_info(disk)
    kind = own.suffix[1:]
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(own), kind)
    size = guests_module.DISK_SIZE if kind == "qcow2" else 1 << 20
    assert info["virtual-size"] == size
  assert disk in works(used(*words, "--dry-run")).stdout
  assert rows(used)["freebsd-image-x86-64"]["version"] == "image"
  works(used("clone", "freebsd-image-x86-64", "copy"))
  works(used(*words, "--name", "copy"))
  assert (snapshot(own.parent), digest(used.cache / BASE)) == (before, cached)
  os.utime(own, ns=(1, 1))
  problem = f"{own} has another size or time than when freebsd-image-x86-64 was created on it"
  fails(used(*words), problem, "touch -r")
  other = own.with_name("other")
  other.write_bytes(own.read_bytes())
  fails(used(*words[:-1], str(other)), f"was created on {own}, not on {other}")
  fails(used(*RUN, "--name", "copy"), "copy is freebsd image", f"add --image '{own}'")
  works(used("clean", "--all"))
  assert digest(used.cache / f"{OWN}.qcow2") == digest(used.cache / "instances/copy.qcow2")
  works(used("rm", "freebsd-image-x86-64", "copy"))


def test_a_cached_image_of_that_name_can_be_replaced(full, server, image, own):
  works(full("run", "--platform", "x86-64", "freebsd", "--image", str(own)))
  server.add_release("freebsd-builder", "v0.17.0", {IMAGE: image + bytes(1 << 16)})
  works(full(*PULL, "--refresh"))
  assert (full.cache / BASE).stat().st_size > len(image)


def test_unsafe_and_bad_own_images(offline, tmp_path, image):
  bad = tmp_path / "bad"
  words = ("run", "--platform", "x86-64", "freebsd", "--image", str(bad))
  fails(offline(*words), "--image: no such file", code=2)
  fails(offline(*words[:-1], str(tmp_path)), "--image: no such file", code=2)
  fails(offline(*words[:-1], ""), "--image needs a value", code=2)
  bad.write_bytes(image)
  fails(offline(*words, "15.1"), "--image takes the place of a VERSION", code=2)
  fails(offline(*words, "--release", "v1"), "--image and --release exclude each other", code=2)
  for content, problem in (
    (b"", "neither qcow2 nor a raw disk"),
    (b"<html>", "neither qcow2 nor a raw disk"),
    (
      image[:8] + (104).to_bytes(8, "big") + (4).to_bytes(4, "big") + image[20:],
      "names a backing file",
    ),
    (image[:50], "cut short"),
  ):
    bad.write_bytes(content)
    fails(offline(*words), f"the image {bad} is refused", problem, code=2)
  assert not offline.cache.exists()


def test_a_checkpoint_of_an_own_image(guests, tmp_path, image):
  path = tmp_path / "own.qcow2"
  path.write_bytes(image)
  words = (
    "run",
    "--rm",
    "--warm",
    "--platform",
    "x86-64",
    "freebsd",
    "--image",
    str(path),
    "--",
    "true",
  )
  assert "to create the checkpoint" in works(guests.qvm(*words)).stderr
  assert "to create the checkpoint" not in works(guests.qvm(*words)).stderr
  os.utime(path, ns=(1, 1))
  assert "to create the checkpoint" in works(guests.qvm(*words)).stderr


# --- Just this release -----------------------------------------------------------------------


@pytest.fixture
def two(qvm, server, image, tools_tar):
  """Two releases of the image and of QEMU; the newer ones differ."""
  newer = image + bytes(1 << 16)
  server.add_release("freebsd-builder", "v0.17.0", {IMAGE: newer, f"x{IMAGE}": newer})
  assets = {QEMU: stand_in_tar(new=b"new"), TOOLS: tools_tar}
  server.add_release("resources", "v2.1.0", assets)
  return qvm


OLD = ("--release", "v0.16.0", "--qemu-release", "v2.0.0")


def test_releases_lie_beside_each_other(two, server, image, tmp_path):
  works(two(*PULL, *OLD))
  assert bases(two) == ["base/freebsd-15.1+v0.16.0-x86-64.qcow2"]
  assert digest(two.cache / bases(two)[0]) == sha256(image)
  works(two(*PULL))
  asked = server.started
  two.play(record=str(tmp_path / "record"))
  works(two(*RUN))
  newer = two.record(tmp_path / "record")["argv"]
  works(two(*RUN, *OLD))
  older = two.record(tmp_path / "record")["argv"]
  assert newer[0].endswith("/qemu/x86_64/bin/qemu-system-x86_64")
  assert older[0].endswith("/qemu/x86_64+v2.0.0/bin/qemu-system-x86_64")
  assert "/qemu/x86_64+v2.0.0/share/qemu/bios" in older[older.index("-bios") + 1]
  assert (
    image_info(disk_of(older))["backing-filename"] == "../base/freebsd-15.1+v0.16.0-x86-64.qcow2"
  )
  assert image_info(disk_of(newer))["backing-filename"] == f"../{BASE}"
  works(two("run", "freebsd", "15.1+v0.16.0"))
  assert server.started == asked, "once everything is there nothing is asked for"
  assert rows(two)["freebsd-15.1+v0.16.0-x86-64"]["version"] == "15.1+v0.16.0"
  shown = json.loads(works(two("search", "freebsd", "--json")).stdout)
  assert {"15.1", "15.1+v0.16.0"} <= {row["version"] for row in shown if row["cached"]}
  works(two(*PULL, *OLD, "--verify"))
  for name in list(rows(two)):
    works(two("rm", name))
  works(two("clean", "--all"))
  assert [name for name in two.files() if name.startswith(("base", "qemu", "bin"))] == []


def test_qemus_lie_beside_each_other_whatever_their_tags(two, server, tools_tar):
  server.add_release("resources", "v2.0.0-rc1", {QEMU: stand_in_tar(), TOOLS: tools_tar})
  for tag in ("v2.0.0-rc1", "v2.0.0"):
    works(two(*PULL, "--qemu-release", tag))
  assert (two.cache / "qemu/x86_64+v2.0.0-rc1/bin/qemu-system-x86_64").exists()


def test_kill_9_while_a_qemu_of_its_release_is_swapped(two, kill_at):
  kill_at(two, "os.rename qemu/", *PULL, *OLD)
  assert ".new" not in works(two("list")).stdout
  works(two("clean"))
  assert os.listdir(two.cache / "qemu") == []


def test_a_beginning_within_a_release(two, server, image):
  server.add_release("freebsd-builder", "v0.15.0", {"freebsd-15.0-x86-64.qcow2": image})
  run = works(two("pull", "--platform", "x86-64", "--release", "v0.15.0", "freebsd", "15"))
  assert bases(two) == ["base/freebsd-15.0+v0.15.0-x86-64.qcow2"]
  assert "the newest FreeBSD 15 for x86-64 is 15.0" in run.stderr


def test_what_a_release_does_not_have(two, server):
  run = two(*PULL, "--release", "v0.1.0")
  assert run.returncode == 1 and f"the release v0.1.0 has no {IMAGE}" in run.stderr
  run = two(*PULL, "--qemu-release", "v0.1.0")
  fails(run, "/v0.1.0/", f"see {server.url}/resources/releases")
  for words in (("--release", "../x"), ("--qemu-release=",)):
    fails(two(*PULL, *words), "invalid release", code=2)
  fails(two(*PULL, *OLD, "--refresh"), "--refresh gets the newest", code=2)


def test_a_release_that_there_is_not_is_named(two, server):
  run = two("pull", "--platform", "x86-64", "--release", "v9", "freebsd")
  fails(run, "no image of FreeBSD for x86-64 in the release v9\n", f"see {server.url}/freebsd-bu")


def test_a_release_that_cannot_be_asked_for_is_no_empty_one(two):
  """Its newest version is then the newest that is cached of it, and for `pull` there is none."""
  words = ("--platform", "x86-64", "--release", "v0.16.0", "freebsd")
  works(two("pull", *words, "15.1"))
  away = {"QVM_RELEASES_URL": DEAD, "QVM_API_URL": DEAD}
  assert "taking the newest cached version, 15.1" in works(two("run", *words, env=away)).stderr
  run = two("pull", *words, env=away)
  assert run.returncode == 1 and "Connection refused" in run.stderr.splitlines()[-2], run.stderr


def test_the_release_in_a_version_is_that_of_the_option(two, server, image):
  for version in ("15.1+..", "15.1+", "15.1+a+b"):
    for words in (
      ("run", "--dry-run", "freebsd", version),
      ("each", f"freebsd-{version}", "--", "x"),
    ):
      fails(two(*words), "invalid release", code=2)
  fails(two(*PULL[:-1], "15.1+v0.16.0", "--refresh"), "--refresh gets the newest", code=2)
  run = two(*PULL[:-1], "15.1+v0.16.0", "--release", "v0.15.0")
  fails(run, "--release v0.15.0 and 15.1+v0.16.0 name two releases", code=2)
  server.add_release("freebsd-builder", "v0.15.0", {"freebsd-15.0-x86-64.qcow2": image})
  works(two(*PULL[:-1], "15+v0.15.0", "--release", "v0.15.0"))
  assert bases(two) == ["base/freebsd-15.0+v0.15.0-x86-64.qcow2"]


def test_streaming_just_this_release(two):
  run = works(two(*RUN, "--rm", "--stream", *OLD))
  assert "the guest runs while its image comes" in run.stderr


# --- DragonFly BSD and MidnightBSD -----------------------------------------------------------


def test_dragonfly_is_not_shown_what_crashes_it_on_amd():
  """Wherever KVM or HVF may run it: the host's CPU does not show it by a name that was checked."""
  words = ("dragonflybsd", "6.4.2", "--platform", "x86-64")
  usual = argv_of(*words, emulated=True)
  changed = ["max,stibp-always-on=off" if word == "max" else word for word in usual]
  assert argv_of(*words, emulated=False) == changed
  assert argv_of(*words, "--accel", "tcg", emulated=False)[5] == "max"
  masked = argv_of(*words, mask=True, emulated=False)[5]
  assert masked.startswith("max,stibp-always-on=off,amx-tile=off")


@pytest.mark.parametrize("os_name, version", [("dragonflybsd", "6"), ("midnightbsd", "4.0")])
def test_the_younger_bsds(no_image, os_name, version):
  works(no_image("pull", os_name, version, "--platform", "x86-64"))
  whole = {"6": "6.4.2", "4.0": "4.0.4"}[version]
  assert bases(no_image) == [f"base/{os_name}-{whole}-x86-64.qcow2"]
  fails(no_image("run", os_name, "--platform", "arm64"), "no arm64 image", code=2)


# --- A window --------------------------------------------------------------------------------


def with_displays(qvm, *names):
  """Let the cached QEMU tell that it has these displays."""
  program = qvm.cache / "qemu/x86_64/bin/qemu-system-x86_64"
  first, rest = program.read_text().split("\n", 1)
  told = f"""import sys
if sys.argv[1:] == ["-display", "help"]:
  print("Available display backend types:", *{["none", *names]!r}, sep="\\n")
  sys.exit()
"""
  program.write_text(f"{first}\n{told}{rest}")
  forget_sizes(qvm.cache)


def test_a_display_takes_the_place_of_the_terminal(used, tmp_path):
  with_displays(used, "egl-headless", "sdl", "gtk")
  usual = works(used("run", "--dry-run", *RUN[1:])).stdout.split()
  used.play(record=str(tmp_path / "record"))
  run = works(used(*RUN, "--display"))
  argv = used.record(tmp_path / "record")["argv"]
  assert "-nographic" not in argv and "-monitor" not in argv
  assert argv[argv.index("-display") + 1] == "gtk" and argv.count("-display") == 1
  assert {"qemu-xhci", "usb-tablet", "usb-kbd"} <= set(argv)
  added = ["gtk", "-device", "qemu-xhci", "-device", "usb-kbd", "-device", "usb-tablet"]
  left = [word for word in usual if word not in ("-nographic", "-display", "-monitor", "none")]
  assert sorted(word.split(",")[0] for word in argv if word != "-display") == sorted(
    word.split(",")[0] for word in left + added
  )
  assert "the guest has a window" in run.stderr
  arm = works(
    used("run", "--dry-run", "--display", "--platform", "arm64", "freebsd", "15.1")
  ).stdout
  assert "-device virtio-gpu-pci" in arm


def test_a_qemu_without_a_display(used):
  with_displays(used, "curses")
  fails(used(*RUN, "--rm", "--display"), "has no display built in", "--qemu qemu-system-x86_64")
  assert FREEBSD in rows(used)


# --- What is cached, and rm ------------------------------------------------------------------


def test_what_is_cached_and_how_large(full):
  size = (full.cache / BASE).stat().st_blocks * 512
  cell = qvm_source.megabytes(size)
  assert f"v0.16.0 (cached, {cell})" in works(full("search", "freebsd")).stdout
  shown = json.loads(works(full("search", "freebsd", "--json")).stdout)
  assert {row["size"] for row in shown if row["cached"]} == {size}
  assert {row["size"] for row in shown if not row["cached"]} == {0}
  table = works(full("list")).stdout.partition("\n\n")[2].splitlines()
  assert table[0].split() == ["CACHED", "RELEASE", "SIZE"]
  assert re.split("  +", table[1]) == [IMAGE, "v0.16.0", cell]
  assert table[2].startswith("qemu-system-x86_64  ") and " v2.0.0 " in table[2]


def test_an_image_of_a_newer_qvm_is_listed(used):
  (used.cache / BASE).with_suffix(".json").write_text('{"format": 2}')
  table = works(used("list")).stdout.partition("\n\n")[2].splitlines()
  assert table[1].split()[:2] == [IMAGE, "-"]


def test_a_layer_of_a_newer_qvm_is_listed_with_question_marks(used):
  (used.cache / "layers").mkdir(exist_ok=True)
  (used.cache / f"layers/{FREEBSD}-prepared-0123456789.qcow2").touch()
  (used.cache / f"layers/{FREEBSD}-prepared-0123456789.json").write_text('{"format": 2}')
  found = rows(used)
  assert found[FREEBSD]["os"] == "freebsd"
  assert found[f"{FREEBSD}-prepared-0123456789"]["os"] == "?"
  (line,) = re.findall(r"LAYER .*\n(.*)", used("list").stdout)
  assert line.split() == [f"{FREEBSD}-prepared-0123456789", "-", "now", "-", "-"]


def test_layers_that_lie_on_each_other(used):
  """Nobody knows on what, so nothing is deleted that it may be."""
  names = [f"{FREEBSD}-prepared-{digits}" for digits in ("0123456789", "9876543210")]
  (used.cache / "layers").mkdir(exist_ok=True)
  for name, below in zip(names, reversed(names)):
    words = ("-u", "-f", "qcow2", "-F", "qcow2", "-b", f"../layers/{below}.qcow2")
    disk = used.cache / f"layers/{name}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", *words, str(disk), "1M"], check=True)
    disk.with_suffix(".json").write_text("{}")
  before = used.files()
  assert [rows(used)[name]["needed_by"] for name in names] == [[name] for name in names[::-1]]
  works(used("clean"))
  assert used.files() == before


@pytest.mark.parametrize("gone", [BASE, "qemu/x86_64/share/qemu/uefi.fd"])
def test_what_vanishes_meanwhile_is_not_listed(full, monkeypatch, gone):
  lstat = os.lstat

  def after_the_look(path):
    if str(path).endswith(os.path.basename(gone)):
      (full.cache / gone).unlink()
    return lstat(path)

  monkeypatch.setattr(os, "lstat", after_the_look)
  found = qvm_source.cached_things(qvm_source.Cache(str(full.cache)))
  assert [name for name, *_ in found] == [IMAGE] * (gone != BASE) + ["qemu-system-x86_64"]


def test_rm_goes_on_after_an_unknown_name(used):
  works(used(*RUN, "--name", "other"))
  run = used("rm", "none", FREEBSD, "none", "nil", "other")
  assert (run.returncode, run.stdout) == (1, f"{FREEBSD}\nother\n")
  assert run.stderr == "qvm: there is no instance none\nqvm: there is no instance nil\n"
  assert rows(used) == {}
  fails(used("rm", "none"), "there is no instance none", "nothing was deleted")


# --- A real guest ----------------------------------------------------------------------------


@pytest.fixture
def linux(archives, tmp_path):
  """qvm with real QEMU and a Linux with an ssh server, in the place of FreeBSD."""
  image = tmp_path / "linux.qcow2"
  linux_guest.disk(str(ROOT / ".venv" / "linux"), "x86-64", "bios", "open", str(image))
  with ReleaseServer() as server:
    server.add_release("resources", "v2.0.0", archives)
    server.add_release("midnightbsd-builder", "v0.0.1", {"midnightbsd-1-x86-64.qcow2": image})
    (tmp_path / "home").mkdir()
    yield Qvm(tmp_path / "home", ROOT / "qvm.py", server)
  end_processes(tmp_path)


@pytest.mark.xdist_group("real_qemu")
def test_what_a_real_guest_sees(linux, tmp_path):
  """Its second disk, its published port and a reboot; a clone on its image has what it wrote."""
  own, port = tmp_path / "linux.qcow2", free_port()
  light = ("-m", "512M", "--cpus", "1", "--accel", "tcg", "--boot-timeout", "180")
  words = ("run", *light, "--platform", "x86-64", "--image", str(own), "midnightbsd")
  before = digest(own)
  up = linux("--name", "vm", "-d", "-p", f"{port}:22", "--disk", "100M", *words)
  works(up)
  with socket.create_connection(("127.0.0.1", port), 30) as link:
    assert link.recv(4) == b"SSH-"
  sizes = works(linux("ssh", "vm", "--", "cat /sys/block/vd*/size; echo kept >/mnt/kept")).stdout
  assert str((100 << 20) // 512) in sizes.split()
  boot = works(linux("ssh", "vm", "--", "cat /proc/sys/kernel/random/boot_id")).stdout
  works(linux("restart", "--boot-timeout", "180", "vm"))
  assert works(linux("ssh", "vm", "--", "cat /proc/sys/kernel/random/boot_id")).stdout != boot
  assert "linux guest powers off" in works(linux("logs", "vm")).stdout
  works(linux("stop", "vm"))
  works(linux("clone", "vm", "copy"))
  works(linux("rm", "vm"))
  run = linux("--name", "copy", *words, "--", "cat /mnt/kept; ls /sys/block")
  assert "kept" in works(run).stdout and "vdb" in run.stdout
  assert digest(own) == before


def test_a_clone_takes_no_place_that_is_taken_meanwhile(used, tmp_path):
  words, another = ["clone", FREEBSD, "new"], used.command(*RUN, "--name", "new")
  test = "words[0].endswith('new.qcow2')"
  run = with_another(used, words, "check_spelling", another, tmp_path, {}, test)
  assert run.returncode == 1 and "already an instance new" in run.stderr
  works(used(*RUN, "--name", "new"))


@pytest.mark.parametrize("words", [("clean", "--all"), (*PULL, "--refresh")])
def test_a_base_to_which_an_own_image_is_a_link_is_needed(full, server, image, tmp_path, words):
  newer = {IMAGE: image + bytes(1 << 16)}
  server.add_release("freebsd-builder", "v99.0.0", newer, published="2026-09-01T00:00:00Z")
  own = tmp_path / "mine.qcow2"
  own.symlink_to(full.cache / BASE)
  works(full("run", "--platform", "x86-64", "--name", "vm", "--image", str(own), "freebsd"))
  full(*words)
  assert own.read_bytes() == image
