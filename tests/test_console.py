"""The console on a real pseudo-terminal, with real QEMU and with a stand-in."""

import array
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
import types
from pathlib import Path

import pytest
from support import (
  DEADLINE,
  FREEBSD,
  PYTHON,
  ROOT,
  Qvm,
  end_processes,
  fails,
  finished,
  free_port,
  furnish,
  parent_of,
  processes_of,
  qemu_pid,
  wait_for,
  written,
)
from support_machines import ECHO, FLOOD, FLOODING, HANG
from support_pythons import every_python
from support_terminal import Terminal, unread

import qvm as qvm_source

# As $PLAY says: prints each piece and waits for a key after it; or writes a flood while it reads
# what is typed; then ends or waits. It tells through FIFOs what it has come to.
PLAYER = f"""#!{sys.executable} -IS
import array, hashlib, json, os, select, signal, sys

play = json.loads(os.environ["PLAY"])
if play.get("fds"):
  with open(play["fds"], "w") as file:
    json.dump([os.readlink("/proc/self/fd/%d" % fd) for fd in (0, 1)], file)
for piece in play.get("pieces", ()):
  os.write(1, piece.encode("latin-1"))
  os.read(0, 1)
if "flood" in play:
  left = memoryview(array.array("I", range(play["flood"] // 4)).tobytes())
  wanted, typed, blocked = play.get("typed", 0), hashlib.sha256(), play.get("blocked")
  os.set_blocking(1, False)
  while left or wanted:
    ready, free, _ = select.select([0] if wanted else [], [1] if left else [], [], 0.3)
    if ready:
      data = os.read(0, 65536)
      wanted -= len(data)
      typed.update(data)
    if free:
      left = left[os.write(1, left[:65536]) :]
    if blocked and not free and not ready:
      open(blocked, "w").close()
      blocked = None
  os.set_blocking(1, True)
  os.write(1, b"typed " + typed.hexdigest().encode())
while play.get("endless"):
  os.write(1, b"endless ")
while play.get("wait"):
  signal.pause()
sys.exit(play.get("exit", 0))
"""


def on_screen(data):
  """What a terminal gets of it; test_screen.py has what that is."""
  return qvm_source.Screen().show(data)


def flood_bytes(size):
  """What PLAYER writes as a flood: all numbers from 0, so that each byte has its place."""
  return array.array("I", range(size // 4)).tobytes()


@pytest.fixture
def opened():
  """Makes terminals, and ends them with whatever still runs in their caches."""
  with contextlib.ExitStack() as stack:

    def make(qvm, *words, shell=(), **streams):
      terminal = Terminal([*shell, *qvm.command(*words)], qvm.env, **streams)
      stack.callback(end_processes, qvm.cache)
      stack.callback(terminal.close)
      return terminal

    yield make


class Real:
  """Runs real QEMU under a name of its own, on a port of its own."""

  def __init__(self, qvm, name, opened):
    self.qvm, self.name, self.opened = qvm, name, opened

  def words(self, version, *more):
    words = ["run", "--rm", "--name", self.name, "--accel", "tcg", "-m", "256M"]
    return [*words, "--ssh-port", str(free_port()), *more, "freebsd", version]

  def terminal(self, version, *more, **streams):
    return self.opened(self.qvm, *self.words(version, *more), **streams)

  def pid(self):
    return qemu_pid(self.qvm, self.name)

  def left(self):
    """What is left of the machine: its files, and its process."""
    names = sorted(os.listdir(self.qvm.cache / "instances"))
    mine = [name for name in names if name.startswith(self.name + ".")]
    return mine + list(processes_of(self.qvm.cache / "instances" / self.name))


@pytest.fixture
def real(tmp_path, real_cache, opened):
  """Real QEMU."""
  home = tmp_path / "home"
  home.mkdir()
  qvm = Qvm(home, ROOT / "qvm.py")
  qvm.env["QVM_CACHE_DIR"] = str(real_cache)
  qvm.cache = real_cache
  return Real(qvm, f"vm-{os.urandom(4).hex()}", opened)


RUN = ("run", "--rm", "--name", "vm", "freebsd", "15.1")


@pytest.fixture
def player(offline, image):
  """qvm with PLAYER as its QEMU, and no server."""
  furnish(offline.cache, PLAYER, image)
  offline.env["PLAY"] = "{}"
  return offline


def play(qvm, **what):
  qvm.env["PLAY"] = json.dumps(what)


# --- Keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "typed, sent, commands",
  [
    (b"", b"", ""),
    (b"ls\r", b"ls\r", ""),
    (b"\x03\x1a\x1c\x04\x13\x11", b"\x03\x1a\x1c\x04\x13\x11", ""),
    (b"\x01", b"", ""),
    (b"\x01\x01", b"\x01", ""),
    (b"\x01\x01\x01\x01", b"\x01\x01", ""),
    (b"\x01\x01x", b"\x01x", ""),
    (b"a\x01hb", b"ab", "h"),
    (b"\x01h\x01?\x01H", b"", "hhh"),
    (b"a\x01x", b"a", "x"),
    (b"a\x01Xlost", b"a", "x"),
    (b"\x01h\x01xlost\x01h", b"", "hx"),
    (b"x\x01\x01h", b"x\x01h", ""),
    (b"\xff\x01\x01\x00\x80", b"\xff\x01\x00\x80", ""),
  ],
)
def test_keys(typed, sent, commands):
  for cut in range(len(typed) + 1):
    keyboard = qvm_source.Keyboard()
    first = keyboard.feed(typed[:cut])
    second = (b"", "") if "x" in first[1] else keyboard.feed(typed[cut:])
    assert (first[0] + second[0], first[1] + second[1]) == (sent, commands), cut


def test_another_key_after_ctrl_a_is_no_command():
  for byte in set(range(256)) - set(b"\x01xXhH?"):
    assert qvm_source.Keyboard().feed(bytes([1, byte, 97])) == (b"a", ""), byte


def test_every_byte_reaches_the_guest(real):
  terminal = real.terminal(ECHO)
  terminal.until(b"ready\r\n")
  every = bytes(byte for byte in range(256) if byte != ord("q"))
  for start in range(0, len(every), 50):  # several reads
    terminal.type(every[start : start + 50].replace(b"\x01", b"\x01\x01"))
    terminal.pump(lambda stop=start + 50: len(terminal.guest_got()) >= min(stop, len(every)))
  terminal.type(b"q")
  assert terminal.end() == 0
  assert terminal.guest_got() == every
  assert terminal.state() == terminal.before
  assert real.left() == []


def test_ctrl_a_in_writes_of_their_own(real):
  terminal = real.terminal(ECHO)
  terminal.until(b"ready\r\n")
  terminal.type(b"a\x01")
  terminal.until(b"<61>")  # so the Ctrl-A behind it has been read as well
  terminal.type(b"\x01b\x01")
  terminal.until(b"<62>")
  assert terminal.guest_got() == b"a\x01b"
  assert terminal.shown.count(b"pulling the plug") == 0
  terminal.type(b"h")
  terminal.until(b"every other key")
  terminal.type(b"\x01nc\x01")
  terminal.until(b"<63>")
  assert terminal.guest_got() == b"a\x01bc"
  pid = real.pid()
  terminal.type(b"x")
  assert terminal.end() == 0
  assert terminal.guest_got()[-1:] == b"c"
  assert not Path("/proc", str(pid)).exists()
  assert terminal.state() == terminal.before


def test_the_help_names_each_key_on_lines_of_their_own(real):
  terminal = real.terminal(ECHO)
  terminal.until(b"ready\r\n")
  terminal.type(b"\x01h")
  terminal.until(b"every other key")
  terminal.type(b"q")
  terminal.end()
  lines = terminal.shown[terminal.shown.index(b"ready") :].split(b"\r\n")
  shown = [line for line in lines if line.startswith(b"qvm: Ctrl-A")]
  assert [line.split()[2] for line in shown] == [b"x", b"h", b"Ctrl-A"]
  assert b"\n" not in b"".join(lines)  # on a raw terminal that would make stairs


# Starts a command in the background of its terminal, and brings it to the foreground once it reads
# a line, as a shell does for `COMMAND &` and `fg`.
SHELL = """
import os, signal, subprocess, sys
process = subprocess.Popen(sys.argv[1:], preexec_fn=os.setpgrp)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
sys.stdin.readline()
os.tcsetpgrp(0, process.pid)
sys.exit(process.wait() & 255)
"""


def test_keys_reach_a_guest_that_comes_to_the_foreground(player, opened):
  play(player, pieces=["in the background", "one key", "two keys"], exit=5)
  terminal = opened(player, *RUN, shell=(sys.executable, "-c", SHELL))
  terminal.until(b"in the background")
  assert terminal.shown.count(b"Ctrl-A") == 0
  terminal.type(b"fg\n")
  terminal.until(b"all other keys go to the guest\r\n")
  terminal.type(b"a")
  terminal.until(b"one key")
  terminal.type(b"\x01h")
  terminal.until(b"every other key")
  terminal.type(b"b")
  terminal.until(b"two keys")
  terminal.type(b"\x03")
  assert terminal.end() == 5
  assert terminal.state() == terminal.before


def test_a_terminal_of_another_session_is_not_read(player):
  """As below setsid: its shell reads it, too."""
  play(player, exit=5)
  with contextlib.closing(Terminal()) as terminal:
    terminal.type(b"for the shell\n")
    result = player(*RUN, stdin=terminal.inside, start_new_session=True)
    assert result.returncode == 5 and unread(terminal.inside) == len(b"for the shell\n")
    assert terminal.state() == terminal.before


def test_what_qemu_leaves_behind_does_not_keep_qvm(offline, image):
  """A process of its own that has its output, as one that it has started."""
  furnish(offline.cache, "#!/bin/sh\nsleep 1000 &\necho ends\nexit 5\n", image)
  try:
    result = offline(*RUN)
    assert (result.returncode, result.stdout) == (5, "ends\n")
  finally:
    end_processes(f"HOME={offline.home}", environment=True)


# As a shell that controls jobs: when the job has stopped it takes its terminal back, as it was.
STOPPER = """
import os, signal, subprocess, sys, termios
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
modes = termios.tcgetattr(0)
process = subprocess.Popen(sys.argv[1:], preexec_fn=os.setpgrp)
os.tcsetpgrp(0, process.pid)
os.killpg(process.pid, signal.SIGCONT)  # it may have been stopped already
assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
os.tcsetpgrp(0, os.getpgrp())
termios.tcsetattr(0, termios.TCSADRAIN, modes)
os.write(2, b"stopped")
sys.stdin.readline()
os.tcsetpgrp(0, process.pid)
os.killpg(process.pid, signal.SIGCONT)
sys.exit(process.wait() & 255)
"""


@pytest.mark.parametrize("ours", ["terminal", "stdin"])
def test_keys_reach_a_guest_that_was_stopped(player, opened, tmp_path, ours):
  play(player, pieces=["first", "second", "third"], exit=5)
  with open(tmp_path / "out", "w+b") as out:
    streams = {} if ours == "terminal" else {"stdout": out}
    terminal = opened(player, *RUN, shell=(sys.executable, "-c", STOPPER), **streams)

    def has_shown(text):
      terminal.pump(lambda: text in terminal.shown + (tmp_path / "out").read_bytes())

    has_shown(b"first")
    if ours == "stdin":
      terminal.type(b"\x1a")
    else:
      os.killpg(os.getpgid(qemu_pid(player, "vm")), signal.SIGTSTP)
    terminal.until(b"stopped")
    terminal.type(b"fg\n")
    terminal.pump(lambda: not termios.tcgetattr(terminal.inside)[3] & termios.ICANON)
    terminal.type(b"a")
    has_shown(b"second")
    terminal.type(b"b")
    has_shown(b"third")
    terminal.type(b"c")
    assert terminal.end() == 5
  assert terminal.state() == terminal.before


def test_start_line(player, opened):
  play(player, pieces=["Hello from within"])
  terminal = opened(player, *RUN)
  terminal.until(b"Hello")
  terminal.type(b" ")
  terminal.end()
  head = terminal.shown.partition(b"Hello")[0]
  assert terminal.shown.count(b"Ctrl-A") == head.count(b"Ctrl-A") == 2
  assert re.search(rb"qvm: [^\n]*Ctrl-A x [^\n]*Ctrl-A h [^\n]*\r\n", head)


def test_no_start_line_without_a_terminal(player):
  play(player, exit=3)
  result = player(*RUN)
  assert result.returncode == 3
  assert "Ctrl-A" not in result.stderr


def test_typed_ahead(player, opened):
  play(player, flood=0, typed=5)
  terminal = opened(player, *RUN)
  terminal.type(b"early")
  assert terminal.end() == 0
  assert hashlib.sha256(b"early").hexdigest().encode() in terminal.shown


def test_keys_that_somebody_else_has_read(monkeypatch):
  """On a non-blocking stdin, what select has seen there may be gone: that is not its end."""

  def read(fd, size):
    raise BlockingIOError

  process = types.SimpleNamespace(stdin=None, stdout=None, stderr=None)
  relay = qvm_source.Relay(process, None, None, bool)
  relay.reading = True
  with monkeypatch.context() as patch:
    patch.setattr(qvm_source.os, "read", read)
    relay.read_keys()
  assert relay.reading


# --- Ends ------------------------------------------------------------------------------------

# What ends the machine, and the exit code.
ENDS = {
  "power-off": (lambda terminal, pid: terminal.type(b"q"), 0),
  "ctrl-a x": (lambda terminal, pid: terminal.type(b"\x01x"), 0),
  "QEMU killed": (lambda terminal, pid: os.kill(pid, signal.SIGKILL), 137),
  "QEMU terminated": (lambda terminal, pid: os.kill(pid, signal.SIGTERM), 0),
  "QEMU aborts": (lambda terminal, pid: os.kill(pid, signal.SIGABRT), 134),
  "TERM": (lambda terminal, pid: terminal.process.terminate(), 143),
  "HUP": (lambda terminal, pid: terminal.process.send_signal(signal.SIGHUP), 129),
  "INT": (lambda terminal, pid: terminal.process.send_signal(signal.SIGINT), 130),
  "INT to all": (lambda terminal, pid: os.killpg(terminal.process.pid, signal.SIGINT), 130),
  "TERM twice": (lambda terminal, pid: [terminal.process.terminate() for _ in range(2)], 143),
}


@pytest.mark.parametrize("way", ENDS)
def test_the_terminal_after_the_end(real, way):
  end, code = ENDS[way]
  terminal = real.terminal(ECHO)
  terminal.until(b"ready\r\n")
  pid = real.pid()
  terminal.type(b"z")
  terminal.until(b"<7A>")
  assert terminal.state() != terminal.before  # raw by now
  end(terminal, pid)
  assert terminal.end() == code
  assert (b"other than qvm killed QEMU (signal" in terminal.shown) == (way == "QEMU killed")
  assert (b"QEMU has crashed" in terminal.shown) == (way == "QEMU aborts")
  assert terminal.state() == terminal.before
  # SeaBIOS has switched line wrap off and hidden nothing.
  tail = terminal.shown[terminal.shown.rindex(b"<7A>") :]
  assert re.findall(rb"\x1b\[\?[0-9;]+[hl]", tail) == [b"\x1b[?7h"]
  assert real.left() == []


def test_after_qemu_that_does_not_start(real):
  terminal = real.terminal(ECHO, "--qemu-arg=-nonsense")
  assert terminal.end() == 1
  assert terminal.state() == terminal.before
  assert b"-nonsense: invalid option" in terminal.shown
  assert b"\x1b[?" not in terminal.shown
  assert real.left() == []


def test_after_qemu_that_cannot_be_executed(player, opened):
  (player.cache / "qemu/x86_64/bin/qemu-system-x86_64").write_bytes(b"\x7fELF nonsense")
  terminal = opened(player, *RUN)
  assert terminal.end() == 1
  assert terminal.state() == terminal.before
  assert b"cannot execute" in terminal.shown
  assert b"\x1b[" not in terminal.shown
  assert os.listdir(player.cache / "instances") == []


def test_the_terminal_is_closed(real):
  terminal = real.terminal(HANG)
  terminal.until(b"hanging")
  terminal.hang_up()  # the kernel sends SIGHUP
  assert terminal.process.wait(DEADLINE) == 129
  assert real.left() == []


@pytest.mark.parametrize(
  "end, code",
  [
    (lambda terminal: terminal.type(b"\x03"), 130),
    (lambda terminal: terminal.process.terminate(), 143),
    (lambda terminal: terminal.process.send_signal(signal.SIGHUP), 129),
    (lambda terminal: terminal.process.kill(), -9),
  ],
  ids=["ctrl-c", "TERM", "HUP", "KILL"],
)
def test_a_signal_during_a_download(qvm, server, opened, end, code):
  stalled = server.fault(f"{FREEBSD}.qcow2", pause=threading.Event(), pause_at=100)
  terminal = opened(qvm, *RUN)
  assert stalled.reached.wait(DEADLINE)
  terminal.until(f"downloading {FREEBSD}".encode())
  end(terminal)
  assert terminal.end() == code
  assert terminal.state() == terminal.before
  assert b"\x1b[" not in terminal.shown
  stalled.pause.set()


def test_a_reader_that_is_stuck_does_not_keep_qvm_alive(player, opened, fifo):
  play(player, flood=4 << 20, blocked=str(fifo), wait=True)
  terminal = opened(player, *RUN)
  fifo.read_text()  # nobody reads: the terminal is full, and so is the pipe behind it
  terminal.process.terminate()
  assert terminal.process.wait(DEADLINE) == 143
  assert processes_of(player.cache) == {}
  terminal.drain()
  assert terminal.state() == terminal.before


def test_ctrl_a_x_while_the_guest_floods(player, opened):
  play(player, endless=True)
  terminal = opened(player, *RUN)
  terminal.until(b"endless ", 50000)
  terminal.type(b"\x01x")
  assert terminal.end() == 143
  assert terminal.state() == terminal.before
  assert processes_of(player.cache) == {}


def test_qvm_killed_qemu_lives_on_and_stop_ends_it(real):
  # When a session's leader ends, the kernel hangs up on all: as everywhere, that is a shell.
  terminal = real.terminal(ECHO, shell=["sh", "-c", '"$@"; echo "ended: $?"; read line', "sh"])
  terminal.until(b"ready\r\n")
  pid = real.pid()
  os.kill(parent_of(pid), signal.SIGKILL)
  terminal.until(b"ended: 137")
  rows = json.loads(real.qvm("list", "--json").stdout)
  (row,) = [row for row in rows if row["name"] == real.name]
  assert (row["state"], row["ephemeral"]) == ("running", True)
  assert Path("/proc", str(pid)).exists()
  result = real.qvm("stop", "--force", real.name)
  assert result.returncode == 0, result.stderr
  assert pid not in processes_of(real.qvm.cache)
  assert real.left() == []


# --- What the guest has changed on the screen ------------------------------------------------

# What the guest writes, and the modes that are to be set back in the end.
CHANGES = [
  ("plain text", []),
  ("\x1b[31mred\x1b[2;5H", []),
  ("\x1b[?1049h\x1b[?25l", ["?1049l", "?25h"]),
  ("\x1b[?25l text \x1b[?25h", []),
  ("\x1b[?25h\x1b[?25l", ["?25h"]),
  ("\x1b[?1049h\x1b[?25l\x1b[?25h\x1b[?1049l", []),
  ("\x1b[?1000;1006h", ["?1000l", "?1006l"]),
  ("\x1b[?1000;1006h\x1b[?1006l", ["?1000l"]),
  ("\x1b[?1h\x1b=", ["?1l"]),
  ("\x1b[?2004h$ ", ["?2004l"]),
  ("\x1b[?7l", ["?7h"]),
  ("\x1b[?47h\x1b[?1047h", ["?47l", "?1047l"]),
  ("\x1b[?1004h", ["?1004l"]),
  ("\x1b[?12h\x1b[?4242h", []),
  ("\x1b\x1b[?25l", ["?25h"]),
  ("\x1b]0;a title\x07\x1b[?25l", ["?25h"]),
]


def modes_in(text):
  return sorted(re.findall(r"\x1b\[(\?[0-9]+[hl])", text))


@pytest.mark.parametrize("text, undone", CHANGES)
def test_modes_undone(text, undone):
  data = text.encode("latin-1")
  for first in range(len(data) + 1):
    for second in range(first, len(data) + 1):
      modes = qvm_source.Modes()
      for piece in (data[:first], data[first:second], data[second:]):
        modes.watch(piece)
      assert modes_in(modes.undo().decode()) == sorted(undone), (first, second)


def test_modes_byte_by_byte_through_much_text():
  modes = qvm_source.Modes()
  for byte in b"x" * 5000 + b"\x1b[?1049;25h" + b"\x1b[?2" + b"5l" + b"y" * 5000:
    modes.watch(bytes([byte]))
  assert modes_in(modes.undo().decode()) == ["?1049l", "?25h"]


CUT = ["\x1b[?10", "49h\x1b[", "?25l\x1b", "[?1000h full screen"]


@pytest.mark.parametrize("end", ["exit", "ctrl-a x", "TERM", "KILL"])
def test_screen_modes_cut_between_writes(player, opened, end):
  play(player, pieces=CUT, wait=end != "exit")
  terminal = opened(player, *RUN)
  for piece in CUT:
    terminal.until(piece.encode().rstrip(b"\x1b"))  # what an ESC begins is not yet known
    terminal.type(b" ")
  if end == "ctrl-a x":
    terminal.type(b"\x01x")
  elif end == "TERM":
    terminal.process.terminate()
  elif end == "KILL":
    os.kill(qemu_pid(player, "vm"), signal.SIGKILL)
  assert terminal.end() == {"exit": 0, "KILL": 137}.get(end, 143)
  tail = terminal.shown.partition(b" full screen")[2].decode()
  assert modes_in(tail) == ["?1000l", "?1049l", "?25h"]
  assert terminal.state() == terminal.before


def test_only_what_was_changed_is_undone(player, opened):
  play(player, pieces=["\x1b[?1049h\x1b[?25l", "\x1b[?1049l", "done"])
  terminal = opened(player, *RUN)
  for piece in (b"\x1b[?25l", b"\x1b[?1049l", b"done"):
    terminal.until(piece)
    terminal.type(b" ")
  assert terminal.end() == 0
  assert modes_in(terminal.shown.partition(b"done")[2].decode()) == ["?25h"]


def test_modes_are_undone_where_only_stdout_is_a_terminal(player, opened):
  play(player, pieces=["\x1b[?25lhidden"])
  terminal = opened(player, *RUN, stdin=subprocess.PIPE)
  terminal.until(b"hidden")
  terminal.process.stdin.write(b" ")
  terminal.process.stdin.close()
  assert terminal.end() == 0
  assert modes_in(terminal.shown.partition(b"hidden")[2].decode()) == ["?25h"]


class Tmux:
  """A tmux server with one window in which a shell runs."""

  def __init__(self, folder, env):
    self.env = {**env, "TMUX_TMPDIR": str(folder), "PS1": "$ "}
    self("new-session", "-d", "-x", "100", "-y", "30", "sh")

  def __call__(self, *words):
    command = ["tmux", "-f", "/dev/null", "-L", "test", *words]
    result = subprocess.run(
      command, env=self.env, stdout=subprocess.PIPE, check=True, text=True, timeout=DEADLINE
    )
    return result.stdout

  def screen(self, *words):
    return self("capture-pane", "-p", *words)

  def until(self, text):
    deadline = time.monotonic() + DEADLINE
    while text not in self.screen():
      assert time.monotonic() < deadline, self.screen()
      time.sleep(0.05)

  def run(self, *lines):
    for line in lines:
      self("send-keys", "-l", line)
      self("send-keys", "Enter")


@pytest.fixture
def tmux(tmp_path, player):
  server = Tmux(tmp_path, player.env)
  yield server
  server("kill-server")
  end_processes(player.cache)


@pytest.mark.parametrize("end", ["KILL", "ctrl-a x"])
def test_the_screen_after_the_end(tmp_path, player, tmux, end):
  play(player, pieces=["\x1b[?1049h\x1b[H\x1b[2J\x1b[?25l\x1b[?1000h\x1b[?7l\x1b[44mfull screen"])
  command = shlex.join(["env", "PLAY=" + player.env["PLAY"], *player.command(*RUN)])
  lines = ["echo earlier line", "stty -a > before", command, "stty -a > after"]
  (tmp_path / "script").write_text("\n".join([*lines, "echo the end; tmux wait-for -S done"]))
  tmux.run(f"cd {shlex.quote(str(tmp_path))}; clear; . ./script")
  tmux.until("full screen")
  assert "earlier line" not in tmux.screen()
  if end == "KILL":
    os.kill(qemu_pid(player, "vm"), signal.SIGKILL)
  else:
    tmux("send-keys", "C-a", "x")
  tmux("wait-for", "done")
  tmux.until("the end")
  assert "full screen" not in tmux.screen()
  assert re.search(r"earlier line\n(.*\n)+the end\n", tmux.screen())
  flags = "#{alternate_on} #{cursor_flag} #{mouse_any_flag} #{wrap_flag}"
  assert tmux("display-message", "-p", flags).strip() == "0 1 0 1"
  shown = tmux.screen("-e")
  assert "\x1b[44m" not in shown[shown.index("earlier") :]
  assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text()


# --- Every byte, in order --------------------------------------------------------------------

SIZE = 20 << 20
TYPED = bytes(byte for byte in range(256) if byte != 1) * 4112  # 1 MiB


def test_twenty_megabytes_out_and_one_in(player, opened):
  play(player, pieces=["BEGIN"], flood=SIZE, typed=len(TYPED))
  terminal = opened(player, *RUN)
  terminal.until(b"BEGIN")
  terminal.type(b" " + TYPED)
  assert terminal.end() == 0
  got = terminal.shown.partition(b"BEGIN")[2]
  want = b"typed " + hashlib.sha256(TYPED).hexdigest().encode()
  shown = on_screen(flood_bytes(SIZE))
  assert got[: len(shown)] == shown
  assert got[len(shown) :].startswith(want)


def test_a_slow_reader_loses_nothing(player, opened, fifo, tmp_path):
  size, log = 1 << 20, tmp_path / "log"
  play(player, pieces=["BEGIN"], flood=size, blocked=str(fifo))
  terminal = opened(player, *RUN, "--console-log", str(log))
  terminal.until(b"BEGIN")
  terminal.type(b" ")
  fifo.read_text()  # all between the guest and us is full
  assert terminal.end() == 0
  shown = on_screen(flood_bytes(size))
  assert terminal.shown.partition(b"BEGIN")[2][: len(shown)] == shown
  assert log.read_bytes()[:-70] == b"BEGIN" + flood_bytes(size)


def test_a_guest_that_floods(real, tmp_path):
  terminal = real.terminal(FLOODING, "--console-log", str(tmp_path / "log"))
  assert terminal.end() == 0
  assert on_screen(FLOOD) in terminal.shown
  assert FLOOD in (tmp_path / "log").read_bytes()


@pytest.mark.parametrize("logged", [False, True])
def test_a_guest_that_floods_a_pipe(real, tmp_path, logged):
  log = tmp_path / "log"
  words = real.words(FLOODING, *(("--console-log", str(log)) if logged else ()))
  result = subprocess.run(
    real.qvm.command(*words),
    env=real.qvm.env,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    timeout=DEADLINE,
  )
  assert result.returncode == 0
  assert FLOOD in result.stdout
  if logged:
    assert log.read_bytes() == result.stdout


def cpu_ticks(pid):
  """What a process has used of the CPU, also once it has ended."""
  with contextlib.suppress(FileNotFoundError, ProcessLookupError):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) if fields[0] != "Z" else float("inf")
  return float("inf")


def test_nothing_is_lost_while_nobody_reads(real):
  """QEMU drops what its guest writes into a full pipe, once its input has ended."""
  reader, writer = os.pipe()
  process = real.qvm.start(*real.words(FLOODING), stdin=subprocess.DEVNULL, stdout=writer)
  os.close(writer)
  qemu = real.pid()
  with open(f"/proc/{qemu}/fd/1", "rb") as pipe:
    fcntl.fcntl(pipe, F_SETPIPE_SZ, 4096)
    wait_for(lambda: unread(pipe) == 4096)
    before = cpu_ticks(qemu)
    wait_for(lambda: cpu_ticks(qemu) > before + 10)  # the guest looks again and again for room
  with open(reader, "rb") as output:
    assert FLOOD in output.read()
  assert process.wait(DEADLINE) == 0


F_SETPIPE_SZ = 1031  # Linux; Python knows it from 3.10 on


def test_a_paste_into_a_guest_that_reads_nothing(real):
  terminal = real.terminal(HANG)
  terminal.until(b"hanging")
  terminal.type(b"all work and no play " * 15000)
  terminal.type(b"\x01x")
  assert terminal.end() == 0
  assert terminal.state() == terminal.before
  assert real.left() == []


# --- Not a terminal --------------------------------------------------------------------------


def test_qemu_gets_pipes_of_its_own(player, tmp_path):
  """It makes its streams non-blocking, and with them those of whoever shares them."""
  play(player, fds=str(tmp_path / "fds"))
  inputs, outputs = os.pipe(), os.pipe()
  links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (inputs[0], outputs[1])]
  assert player(*RUN, stdin=inputs[0], stdout=outputs[1]).returncode == 0
  for fd in inputs + outputs:
    os.close(fd)
  given = json.loads((tmp_path / "fds").read_text())
  assert all(link.startswith("pipe:") for link in given) and not set(given) & set(links)


def test_input_through_a_pipe(real):
  process = real.qvm.start(*real.words(ECHO), stdin=subprocess.PIPE)
  for line in process.stdout:
    if line == "ready\n":  # text mode: \r\n
      break
  out, err = process.communicate("\x01x\x03\x1aq", timeout=DEADLINE)
  assert (process.returncode, out) == (0, "<01><78><03><1A>"), err
  assert real.left() == []


@pytest.mark.parametrize("logged", [False, True])
def test_ctrl_c_without_a_terminal(real, tmp_path, logged):
  words = real.words(HANG, *(("--console-log", str(tmp_path / "log")) if logged else ()))
  process = real.qvm.start(*words, start_new_session=True)
  for line in process.stdout:
    if line == "hanging\n":
      break
  os.killpg(process.pid, signal.SIGINT)
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 130
  assert "Traceback" not in err
  assert real.left() == []


@pytest.mark.parametrize("end, code", [("ctrl-c", 130), ("KILL", 137)])
def test_only_stdin_is_a_terminal(real, end, code):
  terminal = real.terminal(HANG, stdout=subprocess.PIPE)
  with os.fdopen(os.dup(terminal.process.stdout.fileno()), "rb") as lines:
    for line in lines:
      if line == b"hanging\r\n":
        break
  if end == "KILL":
    os.kill(real.pid(), signal.SIGKILL)
  else:
    terminal.type(b"\x03")
  assert terminal.end() == code
  assert terminal.state() == terminal.before
  assert real.left() == []


def test_only_stdout_is_a_terminal(real):
  terminal = real.terminal(HANG, stdin=subprocess.DEVNULL)
  terminal.until(b"hanging")
  terminal.type(b"\x03")
  assert terminal.end() == 130
  assert terminal.state() == terminal.before  # QEMU makes its stdout non-blocking
  assert real.left() == []


def test_a_pipe_still_blocks_afterwards(real):
  reader, writer = os.pipe()
  process = real.qvm.start(*real.words(ECHO, "-m", "64M", "--qemu-arg=-nonsense"), stdout=writer)
  assert process.communicate(timeout=DEADLINE) and process.returncode == 1
  process = real.qvm.start(*real.words(FLOODING), stdout=writer)
  with open(reader, "rb", closefd=False) as lines:
    while b"flood" not in lines.readline():
      pass
    process.terminate()
    process.communicate(timeout=DEADLINE)
  assert os.get_blocking(writer)  # whoever writes there next, as in (qvm run; make) | tee
  os.close(reader)
  os.close(writer)


@pytest.mark.parametrize("logged", [False, True])
def test_head(real, tmp_path, logged):
  log = tmp_path / "log"
  words = real.words(FLOODING, *(("--console-log", str(log)) if logged else ()))
  line = shlex.join(real.qvm.command(*words)) + ' | head -1; echo "${PIPESTATUS[@]}" >&2'
  result = subprocess.run(
    ["bash", "-c", line],
    env=real.qvm.env,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    timeout=DEADLINE,
  )
  assert result.stdout.count(b"\n") == 1
  assert b"Traceback" not in result.stderr and b"bug in qvm" not in result.stderr
  assert result.stderr.split(b"\n")[-2] == b"0 0"
  if logged:
    assert FLOOD in log.read_bytes()
  assert real.left() == []


# --- --console-log ---------------------------------------------------------------------------


def test_console_log_on_a_terminal_is_appended_to(player, opened, tmp_path):
  log = tmp_path / "my log"
  log.write_bytes(b"before\n")
  pieces = ["first \xff\x00\r\n", "\x1b[?25l", "last"]
  play(player, pieces=pieces)
  for _ in range(2):
    terminal = opened(player, *RUN, "--console-log", str(log))
    for piece in pieces:
      terminal.until(piece.encode("latin-1"))
      terminal.type(b" ")
    assert terminal.end() == 0
  assert log.read_bytes() == b"before\n" + 2 * "".join(pieces).encode("latin-1")


def test_console_log_in_a_pipe(player, tmp_path):
  log = tmp_path / "log"
  play(player, flood=1 << 20, exit=4)
  process = player.start(*RUN, "--console-log", "log", cwd=str(tmp_path), stdout=subprocess.PIPE)
  with process.stdout.buffer as stream:
    shown = stream.read()
  assert process.wait(DEADLINE) == 4
  process.stderr.close()
  assert shown.startswith(flood_bytes(1 << 20))
  assert log.read_bytes() == shown


@every_python
def test_console_log_in_a_fifo(player, fifo, python):
  play(player, flood=100)
  process = player.start(*RUN, "--console-log", str(fifo), python=python)
  with open(written(fifo, process), "rb") as log:
    assert log.read().startswith(flood_bytes(100))
  assert finished(process).returncode == 0


@pytest.mark.parametrize("path", ["missing/log", ".", "file/log"])
def test_a_bad_console_log_is_told_before_anything_is_downloaded(qvm, server, tmp_path, path):
  (tmp_path / "file").write_text("")
  for more in ((), ("--detach",)):
    result = qvm(*RUN, "--console-log", path, *more, cwd=str(tmp_path))
    fails(result, f"--console-log: no file can be written at '{path}'", code=2)
    assert server.started == 0
    assert qvm.files() == []


def test_a_console_log_that_fails_does_not_end_the_machine(player):
  play(player, flood=1 << 20, exit=5)
  result = player(*RUN, "--console-log", "/dev/full", stdout=subprocess.DEVNULL)
  assert result.returncode == 5, result.stderr
  assert result.stderr.count("/dev/full") == 1


def test_a_dry_run_makes_no_console_log(player, tmp_path):
  result = player("run", "--dry-run", "freebsd", "15.1", "--console-log", str(tmp_path / "log"))
  assert result.returncode == 0
  assert not (tmp_path / "log").exists()


# --- The last lines --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text, lines",
  [
    (b"", []),
    (b"one\r\ntwo\r\n\r\n", ["one", "two"]),
    (b"no end", ["no end"]),
    (b"\x1bc\x1b[?7l\x1b[2J\x1b[0mBooting\r\n", ["Booting"]),
    (b"\x1b[1;33mWarning\x1b[0m\r\n", ["Warning"]),
    (b"bad \xff byte\x07\n", ["bad \ufffd byte?"]),
    (b"".join(b"%d\n" % n for n in range(100)), [str(n) for n in range(80, 100)]),
  ],
)
def test_last_lines(tmp_path, text, lines):
  path = tmp_path / "log"
  path.write_bytes(text)
  assert qvm_source.last_lines(str(path)) == lines


def test_last_lines_of_a_long_log(tmp_path):
  path = tmp_path / "log"
  path.write_bytes(b"".join(b"%06d\n" % n for n in range(1 << 18)))
  assert qvm_source.last_lines(str(path)) == [f"{n:06d}" for n in range((1 << 18) - 20, 1 << 18)]


def test_last_lines_of_no_log(tmp_path):
  assert qvm_source.last_lines(str(tmp_path / "none")) == []


def test_last_lines_of_what_has_no_end():
  """With a bound to its memory, a reader of all fails rather than to take the machine's."""
  code = "import qvm, resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)); "
  code += "print(qvm.last_lines('/dev/zero'))"
  words = {"cwd": Qvm.compiled.parent, "stdout": subprocess.PIPE, "text": True}
  assert subprocess.run([PYTHON, "-c", code], **words).stdout == "[]\n"
