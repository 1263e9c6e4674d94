"""A pseudo-terminal, with a program in its foreground."""

import array
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

from support import DEADLINE


def unread(file):
  """How many bytes of a pipe or a terminal there are to read."""
  count = array.array("i", [0])
  fcntl.ioctl(file, termios.FIONREAD, count)
  return count[0]


class Terminal:
  """A pseudo-terminal with a program in its foreground; `shown` is all that it has been sent."""

  def __init__(self, command=None, env=None, columns=None, **streams):
    """Open a terminal, and start the command on it if there is one."""
    self.outside, self.inside = pty.openpty()
    self.unusual()
    if columns is not None:
      fcntl.ioctl(self.inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    self.before = self.state()
    self.shown = bytearray()
    self.process = None
    os.set_blocking(self.outside, False)
    if command:
      self.start(command, env, **streams)

  def start(self, command, env, **streams):
    """Start a program; streams that are not given are the terminal."""
    streams = {"stdin": self.inside, "stdout": self.inside, "stderr": self.inside, **streams}
    self.process = subprocess.Popen(
      command,
      env=env,
      start_new_session=True,
      preexec_fn=lambda: fcntl.ioctl(self.inside, termios.TIOCSCTTY, 0),
      **streams,
    )
    return self.process

  def unusual(self):
    """Settings that are nobody's defaults, so that `stty sane` would not pass for a restore."""
    settings = termios.tcgetattr(self.inside)
    settings[0] |= termios.IXANY
    settings[3] &= ~termios.ECHOK
    settings[6][termios.VERASE] = b"\x08"
    settings[6][termios.VINTR] = b"\x03"
    termios.tcsetattr(self.inside, termios.TCSANOW, settings)

  def state(self):
    """All that a terminal's user can see of its settings, and the flags of its descriptor."""
    text = subprocess.run(["stty", "-a"], stdin=self.inside, stdout=subprocess.PIPE, check=True)
    flags = fcntl.fcntl(self.inside, fcntl.F_GETFL)
    return text.stdout, termios.tcgetattr(self.inside), flags

  @property
  def text(self):
    """What it has been sent, as text in plain lines."""
    return self.shown.decode().replace("\r\n", "\n")

  def pump(self, done, data=b""):
    """Read, and type data meanwhile, until done()."""
    deadline = time.monotonic() + DEADLINE
    left = memoryview(data)
    while True:
      writers = [self.outside] if left else []
      ready, free, _ = select.select([self.outside], writers, [], 0.1)
      if ready:
        self.shown += os.read(self.outside, 1 << 16)
      if free:
        left = left[os.write(self.outside, left[:1024]) :]
      if not left and done():
        return
      assert time.monotonic() < deadline, self.shown[-3000:]

  def until(self, text, count=1):
    """Read until the bytes have been shown so often."""
    self.pump(lambda: self.shown.count(text) >= count)

  def until_match(self, pattern):
    """Read until a pattern is found in the text."""
    self.pump(lambda: re.search(pattern, self.text))

  def type(self, data):
    """Type all of the data."""
    self.pump(lambda: True, data)

  def drain(self):
    """Read what is still on its way: a mark of our own comes after it."""
    mark = left = b"\x00drained\x00"
    fd = os.open(os.ttyname(self.inside), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    while left:
      with contextlib.suppress(BlockingIOError):
        left = left[os.write(fd, left) :]
      self.pump(lambda: True)
    os.close(fd)
    self.until(mark)
    self.shown = self.shown.replace(mark, b"")

  def end(self):
    """Wait until the program has ended and all is read; returns its exit code."""
    self.pump(lambda: self.process.poll() is not None)
    self.drain()
    return self.process.returncode

  def hang_up(self):
    """Take the outer end away, as a closed window or a lost connection does."""
    os.close(self.outside)
    self.outside = -1

  def close(self):
    """End the program if it still runs, and the terminal."""
    if self.process:
      if self.process.poll() is None:
        self.process.kill()
      self.process.wait()
      for stream in (self.process.stdout, self.process.stderr):
        if stream:
          stream.close()
    for fd in (self.outside, self.inside):
      if fd >= 0:
        os.close(fd)

  def guest_got(self):
    """The bytes that the echoing guest says it got."""
    return bytes(int(octet, 16) for octet in re.findall(rb"<([0-9A-F]{2})>", self.shown))
