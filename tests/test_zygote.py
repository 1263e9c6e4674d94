"""A forked qvm is what a new Python's would be."""

import json
import os
import signal

import pytest
from support import PYTHON, ROOT, Qvm, works
from support_zygote import Forked, Zygote

# All that a process can see of how it was started, but its number; of descriptors, what it has been
# given: a new Python may have some of its own.
SEEN = """
import io, json, signal, stat, threading
streams = []
for stream in (sys.stdin, sys.stdout, sys.stderr):
  streams.append([stream.fileno(), stream.encoding, stream.errors, stream.line_buffering,
                  stream.newlines, stream.isatty(), stat.S_IFMT(os.fstat(stream.fileno()).st_mode)])
signals = {number: str(signal.getsignal(number)) for number in range(1, signal.SIGRTMIN)}
print(json.dumps({
  "argv": sys.argv, "path": sys.path[:2], "executable": sys.executable, "name": __name__,
  "environment": dict(os.environ), "folder": os.getcwd(), "parent": os.getppid(),
  "group": os.getpgid(0) == os.getpid(), "session": os.getsid(0) == os.getpid(),
  "streams": streams, "typed": sys.stdin.read(), "umask": os.umask(0o22),
  "signals": signals, "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
  "threads": [threading.current_thread() is threading.main_thread(), threading.active_count()],
  "fds": sorted(os.listdir("/proc/self/fd"))}))
sys.exit(3)
"""

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux only")


@pytest.fixture
def ways(offline):
  """qvm as it is forked, and as a new Python runs it."""
  fresh = Qvm(offline.home, ROOT / "qvm.py")
  fresh.zygote = None
  return offline, fresh


@pytest.mark.parametrize("more", [{}, {"start_new_session": True}, {"cwd": "/"}])
def test_it_sees_the_same(ways, more):
  reader, writer = os.pipe()
  env, seen = {"A": "é\udcff", "PWD": "/"}, []
  for qvm in ways:
    run = qvm("a b", "\udcff", "", code=SEEN, env=env, input="x\n", pass_fds=(writer,), **more)
    assert (run.returncode, run.stderr) == (3, "")
    seen.append(json.loads(run.stdout))
  os.close(reader)
  os.close(writer)
  assert seen[0] == seen[1]
  assert seen[0]["parent"] == os.getpid()


@pytest.mark.parametrize("words", [["--version"], ["run", "plan9"], ["config", "print-path"]])
def test_it_says_the_same(ways, words):
  results = [(run.returncode, run.stdout, run.stderr) for run in (qvm(*words) for qvm in ways)]
  assert results[0] == results[1]


def test_how_it_ends(ways):
  for qvm in ways:
    process = qvm.start("x", code="import signal\nprint('up', flush=True)\nsignal.pause()")
    assert process.stdout.readline() == "up\n"
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGKILL


def test_an_error_is_shown(ways):
  for qvm in ways:
    run = qvm(code="raise ValueError('x')")
    assert run.returncode == 1
    assert run.stderr.startswith("Traceback") and run.stderr.endswith("ValueError: x\n")


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"PYTHONUTF8": "1"}, {"TZ": "Asia/Tokyo"}])
def test_what_python_reads_when_it_starts(ways, env):
  """Such a qvm is a new Python's."""
  code = "print(sys.flags, sys.stdout.encoding, sys.stderr.errors, __import__('time').tzname)"
  forked, fresh = (works(qvm(code=code + "\nsys.exit()", env=env)).stdout for qvm in ways)
  assert forked == fresh


def test_it_is_the_program_that_is_there_to_test(offline):
  """Not one that was loaded from elsewhere; and a program of another name is not forked."""
  with offline.start("list") as process:
    process.communicate()
  assert isinstance(process, Forked) == bool(offline.zygote)
  other = Qvm(offline.home, offline.home / "qvm.py")
  other.program.write_text("print('other')")
  assert other("list").stdout == "other\n"


def test_a_program_that_cannot_be_loaded(tmp_path):
  (tmp_path / "qvm.py").write_text("1 / 0")
  zygote = Zygote(PYTHON, tmp_path / "qvm.py")
  with pytest.raises(RuntimeError, match="cannot be loaded"):
    zygote.fork({})
  zygote.close()
