"""`make demo` shows what it says, and leaves nothing."""

import subprocess
import sys
import tempfile
from pathlib import Path

import demo
import draw
import pytest
from support import ROOT, processes_of

real = pytest.mark.skipif(not demo.PACKAGES.exists(), reason="no guest's packages")


@real
def test_the_demo(tmp_path):
  result = subprocess.run(
    [sys.executable, str(ROOT / "tests" / "demo.py")],
    env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert result.returncode == 0, result.stdout
  shown = [line[2:] for line in result.stdout.splitlines() if line.startswith("$ ")]
  assert [line.split()[2] for line in shown] == ["pull", "run", "run", "run", "each"]
  assert result.stdout.count("resumes from the checkpoint") == 2
  assert [name for name in demo.GUESTS if f"{name}: guest" in result.stdout] == list(demo.GUESTS)
  assert list(tmp_path.iterdir()) == [] and processes_of(tmp_path) == {}


def test_the_picture_shows_each_screen_once():
  frames = [(0.0, "$ qvm each"), (0.2, "$ qvm each\na <b>"), (2.0, "all ok"), (2.1, "the end")]
  assert draw.thinned(frames) == [frames[0], *frames[2:]]
  text = draw.drawing(frames)
  assert text.count("<g id=") == 4 and "a &lt;b&gt;" in text
  assert text.count("@keyframes") == 4


def test_the_picture_is_there_and_of_this_program():
  text = (ROOT / ".github" / "each.svg").read_text()
  assert "qvm each" in text and str(Path(tempfile.gettempdir())) not in text
