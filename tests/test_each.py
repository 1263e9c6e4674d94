"""One command in several guests at once, `qvm each`: stand-ins for QEMU start a real sshd each."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest
import ssh_guest
from hypothesis import example, given
from hypothesis import strategies as st
from support import (
  DEADLINE,
  FREEBSD,
  contents,
  end_processes,
  ended,
  fails,
  forget_sizes,
  obey_modes,
  parent_of,
  processes_of,
  wait_for,
)
from support_terminal import Terminal

import qvm as qvm_source

# Before the stand-in: its guest is the one that the instance is named after, and does as
# $EACH_GUESTS says of that.
WHICH = """
import json, os, re, sys
plays = json.loads(os.environ["EACH_GUESTS"])
name = re.search(r"([^/]+)-each-[0-9a-f]{6}[.]qcow2", " ".join(sys.argv)).group(1)
play = {"folder": os.path.join(plays["folder"], name), **plays.get(name, {})}
os.environ["SSH_GUEST"] = json.dumps(play)
"""


class Each:
  """qvm with stand-ins for several guests."""

  def __init__(self, qvm, folder):
    self.qvm, self.folder = qvm, folder
    self.play({})

  def play(self, plays):
    """How the guests behave, by name."""
    self.qvm.env["EACH_GUESTS"] = json.dumps({"folder": str(self.folder), **plays})

  def have(self, *stems):
    """Put images into the cache."""
    for stem in stems:
      for suffix in (".qcow2", ".json"):
        base = self.qvm.cache / "base"
        if not (base / (stem + suffix)).exists():
          shutil.copy(base / (FREEBSD + suffix), base / (stem + suffix))

  def __call__(self, *words, **more):
    return self.qvm("each", "-j", "30", *words, **more)

  def start(self, *words, **more):
    return self.qvm.start("each", "-j", "30", *words, **more)

  def logs(self):
    """The logs of the newest run, by guest."""
    run = sorted((self.qvm.cache / "each").iterdir())[-1]
    return {path.stem: path.read_bytes() for path in run.iterdir()}

  def nothing_left(self):
    """No process, no overlay, no lock, no temporary file."""
    assert processes_of(self.qvm.cache) == {}
    assert list((self.qvm.cache / "instances").iterdir()) == []
    assert os.listdir(self.qvm.env["TMPDIR"]) == []
    return True


@pytest.fixture
def each(full, tmp_path):
  program = full.cache / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  program.write_text(ssh_guest.program(WHICH))
  forget_sizes(full.cache)
  (tmp_path / "tmp").mkdir()
  full.env["TMPDIR"] = str(tmp_path / "tmp")
  found = Each(full, tmp_path / "guests")
  found.have("freebsd-15.0-x86-64", "openbsd-7.9-x86-64", "netbsd-10.1-x86-64")
  yield found
  end_processes(full.cache)


THREE = ("freebsd-15.1", "freebsd-15.0", "netbsd-10.1")


def table(text):
  """The rows of the table at the end: {guest: result}."""
  rows = text.rpartition("GUEST ")[2].splitlines()[1:]
  return {row.split()[0]: re.split("  +", row)[1] for row in rows}


# --- results --------------------------------------------------------------------------------------


def test_all_run_and_are_well(each):
  result = each(*THREE, "--", "echo", "in the guest")
  assert result.returncode == 0, result.stderr
  assert table(result.stdout) == dict.fromkeys(THREE, "ok")
  lines = result.stdout.partition("GUEST ")[0].splitlines()
  for guest in THREE:
    assert lines.count(f"{guest}: in the guest") == 1
    assert b"\nin the guest\n" in each.logs()[guest]
  assert each.nothing_left()


def test_each_result_is_told(each):
  each.play({"netbsd-10.1": {"die": {"exit": 3}, "console": "no root device\n"}})
  script = "case $HOME in *15.1*) kill -9 $$;; *15.0*) seq 100; exit 2;; esac"
  result = each(*THREE, "openbsd-7.9", "--", script)
  assert result.returncode == 1, result.stderr
  results = {"freebsd-15.1": "signal 9", "freebsd-15.0": "exit 2", "netbsd-10.1": "not run"}
  assert table(result.stdout) == {**results, "openbsd-7.9": "ok"}
  ending = result.stdout.partition("--- the last lines of freebsd-15.0:\n")[2].splitlines()
  assert ending[:41] == [*map(str, range(61, 101)), "--- the last lines of netbsd-10.1:"]
  assert "| no root device" in result.stdout.rpartition("---")[2]
  assert re.search(r"netbsd-10.1 .*ended before ssh answered \(exit code 3\)\n", result.stdout)
  assert f"the logs are in {each.qvm.cache}/each/" in result.stderr
  assert each.nothing_left()


@pytest.mark.parametrize("play", [{"listen": False}, {"banner": False}, {"login": "refuse"}])
def test_a_guest_that_lets_nobody_in(each, play):
  each.play({"netbsd-10.1": play})
  result = each("--boot-timeout", "2", "netbsd-10.1", "--", "true")
  assert result.returncode == 125, result.stdout
  assert table(result.stdout) == {"netbsd-10.1": "not run"}
  assert re.search(r"ssh has not answered within 2 s|cannot log in", result.stdout)
  assert each.nothing_left()


def test_a_command_that_ends_with_125_has_run(each):
  result = each("netbsd-10.1", "--", "exit 125")
  assert (result.returncode, table(result.stdout)) == (1, {"netbsd-10.1": "exit 125"})


def test_twenty_at_once(each):
  names = [f"freebsd-3.{n}" for n in range(10)] + [f"netbsd-3.{n}" for n in range(10)]
  each.have(*(f"{name}-x86-64" for name in names))
  result = each(*names, "--", 'echo "$SSH_CONNECTION"')
  assert result.returncode == 0, result.stdout
  assert table(result.stdout) == dict.fromkeys(names, "ok")
  ports = re.findall(r"(?m)^[\w.-]+: \S+ \d+ \S+ (\d+)$", result.stdout)
  assert len(ports) == 20
  assert sorted(each.logs()) == sorted(names)
  assert each.nothing_left()


@pytest.mark.parametrize("program", ["qvm.pyz"], indirect=True)
def test_the_packed_program_starts_itself(each, program):
  each.qvm.program = program
  result = each(*THREE[:2], "--", "true")
  assert result.returncode == 0, result.stderr


def test_one_after_the_other(each, tmp_path):
  steps = tmp_path / "steps"
  script = (
    f"echo begin >>{steps}; i=0; while [ $i -lt 9999 ]; do i=$((i+1)); done; echo end >>{steps}"
  )
  result = each("-j", "1", *THREE, "--", script)
  assert result.returncode == 0
  assert steps.read_text().split() == ["begin", "end"] * 3


def test_json_and_junit_whatever_the_output_is(each, tmp_path):
  each.play({"netbsd-10.1": {"die": {"exit": 1}, "console": "]]> \x01 <&\"' \x1b[31m \xff\n"}})
  report = tmp_path / "report.xml"
  script = (
    "case $HOME in *15.0*) exit 0;; esac; printf '\\377\\0\\001 <a>&]]>\"\\033[31mred\\n'; exit 7"
  )
  result = each("--json", "--junit", str(report), *THREE, "--", script)
  assert result.returncode == 1
  rows = {row["guest"]: row for row in json.loads(result.stdout)}
  assert [(name, row["result"], row["code"]) for name, row in rows.items()] == [
    ("freebsd-15.1", "exit 7", 7), ("freebsd-15.0", "ok", 0), ("netbsd-10.1", "not run", None)
  ]  # fmt: skip
  assert rows["freebsd-15.1"]["output"][-1] == '\ufffd?? <a>&]]>"red'
  assert rows["freebsd-15.0"]["output"] == [] and rows["freebsd-15.0"]["reason"] == ""
  assert Path(rows["freebsd-15.1"]["log"]).read_bytes().endswith(b'\xff\0\1 <a>&]]>"\x1b[31mred\n')
  assert 'freebsd-15.1: \ufffd?? <a>&]]>"red\n' in result.stderr
  suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
  assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
  found = {case.get("name"): case[0] if len(case) else None for case in suite}
  assert found["freebsd-15.0"] is None
  assert found["freebsd-15.1"].tag == "failure" and found["freebsd-15.1"].get("message") == "exit 7"
  assert found["freebsd-15.1"].text.endswith('\ufffd?? <a>&]]>"red')
  assert found["netbsd-10.1"].tag == "error" and "ssh answered" in found["netbsd-10.1"].get(
    "message"
  )
  assert "]]> ? <&" in found["netbsd-10.1"].text


@pytest.mark.parametrize("script, codes", [("exit 0", (0, 125)), ("exit 7", (7, 1))])
def test_junit_on_a_full_disk_costs_no_result(each, script, codes):
  result = each("--json", "--junit", "/dev/full", "netbsd-10.1", "--", script)
  assert (json.loads(result.stdout)[0]["code"], result.returncode) == codes
  logs, problem = result.stderr.splitlines()[-2:]
  assert "the logs are in" in logs
  assert problem == "qvm: --junit: /dev/full: the disk is full: No space left on device"


@pytest.mark.parametrize("option, path", [
  ("--logs", ""), ("--logs", "a/b"), ("--junit", "x"), ("--junit", "there")
])  # fmt: skip
def test_results_that_cannot_be_written_are_refused_at_once(each, tmp_path, option, path):
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "there").touch()
  for name in (folder / "there", folder):
    name.chmod(0o555)
  words = (option, str(folder / path), "netbsd-10.1", "--", "true")
  fails(each(*words, preexec_fn=obey_modes), f"{option}: no file can be written", code=2)


def test_a_log_that_cannot_be_written_is_told(each, tmp_path):
  (tmp_path / "netbsd-10.1.log").mkdir()
  result = each("--json", "--logs", str(tmp_path), "netbsd-10.1", "--", "true")
  assert result.returncode == 125
  problem = f"{tmp_path}/netbsd-10.1.log: Is a directory"
  assert json.loads(result.stdout)[0]["reason"] == problem
  assert result.stderr == f"qvm: {problem}\n"
  assert each.nothing_left()


def test_the_first_failure_ends_the_others(each, tmp_path):
  up = tmp_path / "up"
  script = f"case $HOME in *15.1*) until [ -e {up} ]; do sleep 0.1; done; exit 4;; esac; "
  script += f"case $HOME in *openbsd*) exit 0;; esac; : >{up}; sleep 600"
  result = each("-j", "2", "--fail-fast", "openbsd-7.9", *THREE, "--", script)
  assert result.returncode == 1
  results = {"openbsd-7.9": "ok", THREE[0]: "exit 4", THREE[1]: "not run", THREE[2]: "not run"}
  assert table(result.stdout) == results
  assert result.stdout.count("--fail-fast: freebsd-15.1 has failed") == 2
  assert list(each.logs()) != [] and THREE[2] not in each.logs(), "it was not to be started"
  assert each.nothing_left()


# --- The end --------------------------------------------------------------------------------------


def running(each, process, count=3):
  """Wait until the command runs in so many guests."""
  marks = [each.folder.parent / f"up-{n}" for n in range(count)]
  wait_for(
    lambda: process.poll() is not None or len(list(each.folder.parent.glob("up-*"))) >= count
  )
  assert process.poll() is None, (process.communicate(), marks)


def sleeping(each):
  """A command that says that it runs, and then sleeps."""
  return f': >{each.folder.parent}/up-$(basename "$(dirname "$(dirname $HOME)")"); sleep 600'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_machines(each, number):
  each.play({"netbsd-10.1": {"ignore_term": True}})
  with ended(each.start(*THREE, "--", "trap '' TERM HUP INT; " + sleeping(each))) as process:
    running(each, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=DEADLINE)
  assert process.returncode == 128 + number, errors
  assert table(output) == dict.fromkeys(THREE, "not run")
  assert each.nothing_left()


def child_for(guest, each, process):
  """The qvm that an `each` has started for a guest, and the name of its machine."""
  (disk,) = (each.qvm.cache / "instances").glob(guest + "-each-*.qcow2")
  (child,) = [pid for pid in processes_of(disk.stem) if parent_of(pid) == process.pid]
  return child, disk.stem


def test_a_child_that_does_not_listen(each):
  """It is killed, and then its machine, which ignores SIGTERM as well."""
  each.play({"netbsd-10.1": {"ignore_term": True}})
  with ended(each.start(*THREE, "--", sleeping(each))) as process:
    running(each, process)
    os.kill(child_for("netbsd-10.1", each, process)[0], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
  assert process.returncode == 130
  shutil.rmtree(each.qvm.env["TMPDIR"])  # it could not take its ssh's log away
  os.mkdir(each.qvm.env["TMPDIR"])
  assert each.nothing_left()


def test_a_signal_while_they_boot(each):
  each.play(dict.fromkeys(THREE, {"listen": False}))
  with ended(each.start(*THREE, "--", "true")) as process:
    wait_for(lambda: len(processes_of(each.qvm.cache / "qemu")) == 3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
  assert process.returncode == 130
  assert each.nothing_left()


def test_nothing_outlives_a_parent_that_was_killed(each):
  """No process of its own is left to end them: each child sees it."""
  each.play({"netbsd-10.1": {"ignore_term": True}})
  with ended(each.start(*THREE, "--", "trap '' TERM HUP INT; " + sleeping(each))) as process:
    running(each, process)
    process.kill()
    process.wait()
    wait_for(lambda: processes_of(each.qvm.cache) == {})
  wait_for(lambda: list((each.qvm.cache / "instances").iterdir()) == [])
  assert each.nothing_left()


def test_a_child_that_was_killed(each):
  go = each.folder.parent / "go"
  script = f"{sleeping(each).partition('; ')[0]}; until [ -e {go} ]; do sleep 0.1; done"
  with ended(each.start(*THREE, "--", script)) as process:
    running(each, process)
    child, name = child_for("netbsd-10.1", each, process)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: processes_of(name) == {})
    go.touch()
    output, errors = process.communicate(timeout=DEADLINE)
  assert process.returncode == 125, errors
  assert table(output) == {"freebsd-15.1": "ok", "freebsd-15.0": "ok", "netbsd-10.1": "not run"}
  assert "its qvm has ended (signal 9)" in output
  shutil.rmtree(each.qvm.env["TMPDIR"])  # it could not take its ssh's log away
  os.mkdir(each.qvm.env["TMPDIR"])
  assert each.nothing_left()


def test_a_reader_that_goes_away(each):
  with ended(each.start(*THREE, "--", "while echo line; do :; done")) as process:
    assert process.stdout.readline()
    process.stdout.close()
    process.wait(DEADLINE)
  assert process.returncode == 128 + signal.SIGPIPE
  assert each.nothing_left()


# --- Output ---------------------------------------------------------------------------------------


def test_lines_come_whole_and_in_order(each):
  """Also a long one, and a last one without an end."""
  script = "for i in $(seq 3000); do echo out $i; echo err $i >&2; done; "
  script += "printf %070000d 1; echo; printf end"
  result = each(*THREE, "--", script)
  assert result.returncode == 0
  for guest in THREE:
    mine = [
      line.partition(": ")[2] for line in result.stdout.splitlines() if line.startswith(guest + ":")
    ]
    assert [line for line in mine if line.startswith("out")] == [f"out {n}" for n in range(1, 3001)]
    assert [line for line in mine if line.startswith("err")] == [f"err {n}" for n in range(1, 3001)]
    # In two pieces, with lines of stderr between them.
    assert "".join(line for line in mine if not line.strip("01")) == "0" * 69999 + "1"
    assert mine[-1] == "end"


HOSTILE = "\\033]0;title\\007\\033[2J\\033[31mred\\033[0m \\005\\233\\b\\010 50%%\\r100%%\\n"


def test_nothing_raw_reaches_a_pipe(each):
  result = each("netbsd-10.1", "--", f"printf '{HOSTILE}'; exit 1")
  assert re.search("(?m)^netbsd-10.1: 100%$", result.stdout)
  assert (
    result.stdout.replace("\n", "").isprintable() and result.stderr.replace("\n", "").isprintable()
  )


def test_a_flood(each):
  """100 MB: the terminal gets a line now and then, the log keeps both ends."""
  script = (
    f"echo first; printf '{HOSTILE}'; yes '{HOSTILE}' | head -c 100000000; echo; echo last; exit 3"
  )
  terminal = Terminal(each.qvm.command("each", "netbsd-10.1", "--", script), each.qvm.env)
  try:
    assert terminal.end() == 1
  finally:
    terminal.close()
  shown = terminal.shown
  assert b"netbsd-10.1  running" in shown and len(shown) < 1 << 20
  left = re.sub(rb"\x1b\[(K|A|\?7[hl]|H\x1b\[2J)", b"", bytes(shown)).decode()
  assert re.sub(r"[\r\n]", "", left).isprintable()
  log = each.logs()["netbsd-10.1"]
  assert len(log) < 30 << 20
  assert b"first\n" in log[:5000] and log.endswith(b"last\n") and b"[qvm left out " in log


# The terminal goes while a guest runs, and SIGHUP is ignored, as below nohup. The guest goes on
# once somebody has asked for the size of what is no terminal any more.
GONE = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
size = qvm.terminal_size
def terminal_size():
  found = size()
  if not os.isatty(2) and os.path.exists({go!r}):
    open({go!r}, "w").close()
    os.unlink({go!r})
  return found
qvm.terminal_size = terminal_size
"""


def test_a_terminal_that_is_gone(each, tmp_path):
  os.mkfifo(tmp_path / "go")
  code = GONE.format(go=str(tmp_path / "go"))
  words = ("each", "--json", "netbsd-10.1", "--", f"cat {tmp_path}/go; exit 3")
  with open(tmp_path / "out", "w") as out:
    terminal = Terminal(each.qvm.command(*words, code=code), each.qvm.env, stdout=out)
  try:
    terminal.until(b"running")
    terminal.hang_up()
    assert terminal.process.wait(DEADLINE) == 1
  finally:
    terminal.close()
  (result,) = json.loads((tmp_path / "out").read_text())
  assert result["code"] == 3


class Tmux:
  """A terminal of a given size in which commands run, and whose window can be resized."""

  def __init__(self, folder, env, columns, rows):
    self.env = {**env, "TMUX_TMPDIR": str(folder), "PS1": "$ ", "TERM": "screen"}
    self("new-session", "-d", "-x", str(columns), "-y", str(rows), "sh")

  def __call__(self, *words):
    command = ["tmux", "-f", "/dev/null", "-L", "each", *words]
    return subprocess.run(
      command, env=self.env, stdout=subprocess.PIPE, check=True, text=True, timeout=DEADLINE
    ).stdout

  def resize(self, columns, rows):
    self("resize-window", "-x", str(columns), "-y", str(rows))

  def run(self, command):
    self("send-keys", "-l", f"clear; {shlex.join(command)}")
    self("send-keys", "Enter")

  def screen(self):
    return self("capture-pane", "-p").splitlines()

  def until(self, condition):
    until = time.monotonic() + DEADLINE
    while not condition(self.screen()):
      assert time.monotonic() < until, "\n".join(self.screen())
      time.sleep(0.05)


@pytest.mark.parametrize("columns, rows", [(80, 24), (200, 50)])
def test_a_line_for_each_guest(each, tmp_path, columns, rows):
  """Twenty guests, a window that changes its size, and one too small for all."""
  names = [f"freebsd-3.{n}" for n in range(20)]
  each.have(*(f"{name}-x86-64" for name in names))
  terminal = Tmux(tmp_path, {**each.qvm.env}, columns, rows)
  script = f"echo 'a \\033[31m漢字 line'; echo {'long ' * 60}; cat {tmp_path}/go; exit 2"
  os.mkfifo(tmp_path / "go")

  def alone(lines):
    """Whether each guest has its line, and only one."""
    found = [line.split()[0] for line in lines if line.startswith("freebsd-3.")]
    return found == names and sum(" running " in line for line in lines) == 20

  def counted(lines):
    found = [line for line in lines if line.strip()]
    return len(found) == 9 and found[-1].startswith("and 12 more: 12 running")

  try:
    terminal.run(each.qvm.command("each", "-j", "20", *names, "--", script))
    terminal.until(alone)
    assert any(f" s: {'long ' * 5}" in line for line in terminal.screen())
    for size in ((60, 22), (120, 40), (columns, rows)):
      terminal.resize(*size)
      terminal.until(alone)
    terminal.resize(columns, 10)
    terminal.until(counted)
    terminal.resize(columns, rows)
    terminal.until(alone)
    fds = [os.open(tmp_path / "go", os.O_RDWR)]
    terminal("send-keys", "C-c")
    terminal.until(lambda lines: any("the logs are in" in line for line in lines))
    os.close(fds[0])
    results = [line.split()[:3] for line in terminal.screen() if line.startswith("freebsd-3.")]
    assert results[-20:] == [[name, "not", "run"] for name in names]
  finally:
    terminal("kill-server")
  wait_for(lambda: processes_of(each.qvm.cache) == {})


# --- Folders --------------------------------------------------------------------------------------


def folder_with_files(path):
  (path / "src").mkdir(parents=True)
  (path / "src/main.c").write_text("int main;\n")
  return path


def test_sync_only_goes_in(each, tmp_path):
  work = folder_with_files(tmp_path / "work")
  result = each(
    "--sync", str(work), *THREE, "--", "echo changed >src/main.c; echo new >made; ls src"
  )
  assert result.returncode == 0, result.stdout
  assert contents(work) == {"src": None, "src/main.c": b"int main;\n"}


def test_sync_out_has_a_folder_for_each(each, tmp_path):
  """It lies in the folder itself, and what is there does not go to the guests."""
  work = folder_with_files(tmp_path / "work")
  (work / "untouched").touch()
  assert "what the command made or changed" in qvm_source.help_text("each")
  words = ("--sync", str(work), "--sync-out", str(work / "out"), *THREE[:2], "--")
  for turn in "one", "two":
    result = each(
      *words, f'[ ! -e out ] && echo "{turn} $HOME" >src/main.c && mkdir -p new && echo n >new/n'
    )
    assert result.returncode == 0, result.stdout
    assert (work / "src/main.c").read_text() == "int main;\n"
    for guest in THREE[:2]:
      found = contents(work / "out" / guest)
      assert found.pop("src/main.c").decode().startswith(turn + " ")
      assert found == {"src": None, "new": None, "new/n": b"n\n"}
      assert guest in (work / "out" / guest / "src/main.c").read_text()


def test_a_reason_names_the_path_as_errors_do(each, tmp_path):
  work, out = folder_with_files(tmp_path / "work"), tmp_path / "out"
  out.mkdir()
  (out / "netbsd-10.1").touch()
  words = ("--sync", str(work), "--sync-out", str(out), "netbsd-10.1")
  result = each("--json", *words, "--", "true")
  assert json.loads(result.stdout)[0]["reason"] == f"{out}/netbsd-10.1: File exists"


@pytest.mark.parametrize("work", ["work", "link"])
@pytest.mark.parametrize("out", ["out", ".out", "out[1]", "..out/in it"])
def test_what_has_come_back_does_not_go_to_the_guests(tmp_path, work, out):
  (tmp_path / "work" / out).mkdir(parents=True)
  (tmp_path / "work" / out / "result").touch()
  (tmp_path / "link").symlink_to("work")  # as /tmp is one on macOS
  words = ("--sync", str(tmp_path / work), "--sync-out", str(tmp_path / "work" / out))
  options = qvm_source.parse_command_line(["each", *words, "freebsd", "--", "x"])
  given = qvm_source.handed_on(qvm_source.resolve(options))
  child = qvm_source.parse_command_line(["run", "--rm", *given, "freebsd", "--", "x"])
  folder, excludes = qvm_source.Folder(words[1]), qvm_source.Excludes(child.sync_exclude)
  assert not [path for path in qvm_source.walk_folder(folder, excludes) if "result" in path]


def test_what_comes_back_goes_to_another_folder(offline, tmp_path):
  (tmp_path / "link").symlink_to(tmp_path)
  words = ("each", "--sync", str(tmp_path), "--sync-out", str(tmp_path / "link"), "freebsd")
  fails(offline(*words, "--", "x"), "--sync-out: ", "--sync", code=2)


def test_the_logs_of_a_run_stay_when_the_clock_has_gone_back(tmp_path):
  for n in range(10):
    (tmp_path / "each" / f"20991231-0000{n:02}-abcdef").mkdir(parents=True)
  with qvm_source.logs_folder(qvm_source.Cache(str(tmp_path)), "") as folder:
    pass
  assert os.path.isdir(folder)


def test_logs_of_the_last_ten_runs(each, tmp_path):
  (each.qvm.cache / "each" / "mine").mkdir(parents=True)
  for n in range(12):
    folder = each.qvm.cache / "each" / f"20200101-0000{n:02}-abcdef"
    folder.mkdir()
    (folder / "x.log").touch()
  assert each("netbsd-10.1", "--", "true").returncode == 0
  names = sorted(path.name for path in (each.qvm.cache / "each").iterdir())
  assert names[0] == "20200101-000003-abcdef" and len(names) == 11 and names[-1] == "mine"
  own = tmp_path / "a" / "logs"
  assert each("--logs", str(own), "netbsd-10.1", "--", "echo mine").returncode == 0
  assert (own / "netbsd-10.1.log").read_text().endswith("mine\n")
  assert each.qvm("clean", "--all").returncode == 0
  assert [path.name for path in (each.qvm.cache / "each").iterdir()] == ["mine"]


def test_an_image_is_downloaded_once(each, server):
  for path in each.qvm.cache.glob("base/*"):
    path.unlink()
  server.clear_log()
  result = each("freebsd", "freebsd-15", "freebsd-15.1", "freebsd-15.1-x86-64", "--", "true")
  assert result.returncode == 0, result.stdout
  assert table(result.stdout) == dict.fromkeys(
    ("freebsd", "freebsd-15", "freebsd-15.1", "freebsd-15.1-x86-64"), "ok"
  )
  assert len(server.requests(f"{FREEBSD}.qcow2", "cdn")) == 1


def test_all_is_every_os_of_this_host(each):
  for name in qvm_source.OS_NAMES:
    each.have(f"{name}-9.9-x86-64")
  env = {"QVM_RELEASES_URL": "http://127.0.0.1:9/x", "QVM_API_URL": "http://127.0.0.1:9/x"}
  for path in each.qvm.cache.glob("base/*"):
    if "-9.9-" not in path.name:
      path.unlink()
  result = each("all", "--", "true", env=env)
  assert result.returncode == 0, result.stdout
  assert table(result.stdout) == dict.fromkeys(qvm_source.OS_NAMES, "ok")


# --- Functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, parts", [
  ("freebsd", ("freebsd", "", "")),
  ("FreeBSD-14", ("freebsd", "14", "")),
  ("openbsd-7.9-arm64", ("openbsd", "7.9", "arm64")),
  ("freebsd-x86-64", ("freebsd", "", "x86-64")),
  ("freebsd-AMD64", ("freebsd", "", "x86-64")),
  ("haiku-r1beta5", ("haiku", "r1beta5", "")),
  ("netbsd-10.0-RC1-aarch64", ("netbsd", "10.0-RC1", "arm64")),
  ("ALL", ("all", "", "")),
])  # fmt: skip
def test_the_parts_of_a_guests_name(text, parts):
  assert qvm_source.parse_guest(text) == parts


def test_options_are_handed_on():
  words = (
    *("-m2G", "--qemu", "/x"),
    "--cpus",
    "4",
    "--accel",
    "tcg",
    "--qemu-arg=-x",
    "--qemu-arg",
    "a=b c",
    "--warm",
  )
  words += (
    "--boot-timeout",
    "0.5",
    "--boot-attempts=3",
    "--no-network",
    "--stream",
    "-eA=b =",
    "-e",
    "C",
  )
  words += ("--sync", "/a/b", "--sync-exclude", "*.o")
  words += ("--install", "git", "--prepare", "a.sh", "--prepare-timeout", "9")
  options = qvm_source.parse_command_line(["each", *words, "all", "--", "x"])
  given = qvm_source.handed_on(options)
  child = qvm_source.parse_command_line(["run", "--rm", *given, "freebsd", "--", "x"])
  assert child.sync_direction == "in"
  for field in qvm_source.HANDED_ON:
    assert getattr(child, field) == getattr(options, field) != getattr(qvm_source.Options(), field)


@pytest.mark.parametrize("free, memory, jobs", [
  (0, "6G", 1), (13 << 30, "6G", 2), (None, "6G", 7), (1 << 40, "6G", 7), (3 << 30, "512M", 6),
])  # fmt: skip
def test_as_many_as_the_host_carries(monkeypatch, free, memory, jobs):
  monkeypatch.setattr(qvm_source, "available_memory", lambda path: free)
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
  assert qvm_source.machines_at_once(qvm_source.Options(memory=memory)) == jobs


@given(st.binary(max_size=300))
@example(b"\x1b]0;never ends")
@example(b"\x1b[31mred\x1b[0m")
def test_a_plain_line_is_printable(data):
  assert qvm_source.plain(data).isprintable()


@pytest.mark.parametrize("line, text", [
  (b"as it is", "as it is"), (b"a\tb", "a       b"), (b"\x1b[1;31mred\x1b[m\x1b(B", "red"),
  (b"10%\r20%\r\n"[:-1], "20%"), (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "link"),
  (b"\xff\x9b1m", "\ufffd\ufffd1m"), ("漢字".encode(), "漢字"), (b"\x07\x00", "??"),
])  # fmt: skip
def test_a_line_as_a_terminal_would_leave_it(line, text):
  assert qvm_source.plain(line) == text


def test_a_child_that_does_not_end_in_an_orderly_way(offline):
  """Once its parent is gone it has some seconds."""
  code = """
import time
qvm.STOP_SECONDS = 0.1
def hang(options):
  with qvm.signals.hold():
    time.sleep(600)
qvm.CALLS["list"] = hang
"""
  life, parents = os.pipe()
  words = (qvm_source.CHILD, f"-1,{life},", "list")
  with ended(offline.start(*words, code=code, pass_fds=(life,))) as process:
    os.close(life)
    os.close(parents)
    assert process.wait(DEADLINE) == 143


@pytest.mark.parametrize("phase, text, ended, line", [
  ("downloading", "40 %", False, "downloading 40 %"),
  ("waiting", "", False, "waiting "),
  ("running", "ok 7", False, "running 12 s: ok 7"),
  ("failed", "ok 7", True, "failed 3 s: exit code 2"),
])  # fmt: skip
def test_what_a_line_says(monkeypatch, phase, text, ended, line):
  monkeypatch.setattr(qvm_source.time, "monotonic", lambda: 112.0)
  child = object.__new__(qvm_source.Child)
  child.phase, child.text, child.reason, child.ended = phase, text, "exit code 2", ended
  child.since, child.seconds = 100.0, 3.0
  assert child.state() == line


def test_a_child_tells_of_its_download(monkeypatch):
  reading, writing = os.pipe()
  monkeypatch.setattr(qvm_source.report, "phases", writing)
  progress = qvm_source.Progress()

  class File:
    def __init__(self, done, total):
      self.name, self.done, self.total = "name", done, total

  with progress.including(File(30, 100)), progress.including(File(10, None)):
    progress.show()
  with progress.including(File(1, None)):
    progress.show()
  progress.show()
  os.close(writing)
  with open(reading, "rb") as file:
    assert file.read() == b"downloading 40 %\ndownloading \n"
