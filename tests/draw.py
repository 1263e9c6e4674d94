#!/usr/bin/env python3
"""Draws .github/each.svg: what a terminal recorded of a real `qvm each`, as an SVG that moves.

usage: draw.py [OUTPUT]

The guests are those of `make demo`: a small Linux in the place of each system.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path

from demo import publish
from release_server import ReleaseServer
from support import ROOT, Qvm, default_signals, end_processes

COLUMNS, ROWS = 84, 14
WIDTH, HEIGHT = 8.4, 19  # of a character, in pixels
SCRIPT = """#!/bin/sh
for it in parser network storage; do echo "test $it"; sleep 2; done
echo "3 tests passed"
"""
COMMAND = "qvm each --sync . freebsd netbsd haiku -- ./run-tests"
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" \
font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">
<style>
text {{ fill: #d8dee9; white-space: pre }}
g {{ visibility: hidden; animation: {length:.1f}s steps(1) infinite }}
g:last-of-type {{ visibility: visible }}
@media (prefers-reduced-motion) {{ g {{ animation: none !important }} }}
{rules}
</style>
<rect width="100%" height="100%" rx="8" fill="#20242c"/>
"""


def record(env, folder):
  """The screens of the run: [(seconds since the first, text)], each another than the one before."""
  tmux = ["tmux", "-L", f"qvm-draw-{folder.name}"]
  size = ["-x", str(COLUMNS), "-y", str(ROWS)]
  shell = ["env", "-i", *(f"{name}={value}" for name, value in env.items()), "sh"]
  subprocess.run([*tmux, "-f", "/dev/null", "new-session", "-d", *size, *shell],
                 check=True, cwd=str(folder))  # fmt: skip
  try:
    for line in ("clear", COMMAND):
      subprocess.run([*tmux, "send-keys", "-l", line], check=True)
      time.sleep(0.5)  # a viewer reads the command before it starts
      subprocess.run([*tmux, "send-keys", "Enter"], check=True)
    frames, began = [], time.monotonic()
    while not frames or "the logs are in" not in frames[-1][1]:
      text = subprocess.check_output([*tmux, "capture-pane", "-p"]).decode()
      if not frames or text != frames[-1][1]:
        frames.append((time.monotonic() - began, text))
      time.sleep(0.25)
    return frames
  finally:
    subprocess.run([*tmux, "kill-server"], check=True)


def drawing(frames):
  """The SVG of the frames; the last one stays for some seconds."""
  length = frames[-1][0] + 6
  ends = [start for start, _ in frames[1:]] + [length]
  rules, groups = [], []
  for number, ((start, text), end) in enumerate(zip(frames, ends)):
    first, last = 100 * start / length, 100 * end / length
    shown = f"0%, {last:.2f}% {{ visibility: hidden }} {first:.2f}% {{ visibility: visible }}"
    rules.append(f"@keyframes f{number} {{ {shown} }} #f{number} {{ animation-name: f{number} }}")
    lines = [
      f'<text x="16" y="{28 + HEIGHT * row}">{escape(line)}</text>'
      for row, line in enumerate(text.rstrip().split("\n"))
      if line.strip()
    ]
    groups.append(f'<g id="f{number}">\n' + "\n".join(lines) + "\n</g>\n")
  head = HEAD.format(
    width=32 + WIDTH * COLUMNS, height=28 + HEIGHT * ROWS, length=length, rules="\n".join(rules)
  )
  return head + "".join(groups) + "</svg>\n"


def thinned(frames):
  """At most two frames a second, and always the last one."""
  kept = frames[:1]
  for frame in frames[1:]:
    if frame[0] >= kept[-1][0] + 0.5:
      kept.append(frame)
  return kept if kept[-1] == frames[-1] else [*kept, frames[-1]]


def main():
  default_signals()
  output = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".github" / "each.svg")
  folder = Path(tempfile.mkdtemp(prefix="qvm-draw-"))
  try:
    with ReleaseServer() as server:
      publish(server, folder)
      server.rate = 8e6
      (folder / "project").mkdir()
      (folder / "project" / "run-tests").write_text(SCRIPT)
      (folder / "project" / "run-tests").chmod(0o755)
      (folder / "bin").mkdir()
      qvm = folder / "bin" / "qvm"
      qvm.write_text(f'#!/bin/sh\nword=$1 && shift && set -- "$word" -m 512M "$@"\n'
                     f'exec {sys.executable} -B {ROOT / "qvm.py"} "$@"\n')  # fmt: skip
      qvm.chmod(0o755)
      env = Qvm(folder, ROOT / "qvm.py", server).env
      env.update(PATH=f"{folder / 'bin'}:{env['PATH']}", PS1="$ ", TERM="screen-256color")
      frames = thinned(record(env, folder / "project"))
    text = drawing(frames).replace(str(folder), "~")
    output.write_text(text)
  finally:
    end_processes(folder)
    shutil.rmtree(str(folder))


if __name__ == "__main__":
  main()
