#!/usr/bin/env python3
"""A login shell for the tests' guests that attacks the host through what --sync reads.

It lets an honest /bin/sh do what qvm asks for, and changes what that sends back: the lists of
names, the tar stream, all that follows, the exit code. plan.json beside it says how:

  seed      of all that is random; session.count beside it tells one session from the next
  attacks   names from LISTS, TARS and STREAMS below; none: it is honest
  late      whether it is honest while the folder comes, so that its command runs
  code      with what a command ends, whatever it did; null: as it did
  host      a folder of the host's that it tries to reach
  protect   folders of the host's that are only to be read here: the guest's own tools must not
            follow its lies to where a real guest's could not get

sent beside it gets each list as it was sent. As root alone, for `protect` takes mounts.
"""

import ctypes
import itertools
import json
import os
import random
import signal
import subprocess
import sys

# A guest that says nothing may be slow, and qvm waits for it: what waits for qvm in turn, because
# of its own lies, ends after this time.
SILENCE_SECONDS = 20
NEW_MOUNTS, PRIVATE, BIND, READ_ONLY = 0x20000, 0x44000, 0x5000, 0x1021


def escaped():
  """What a terminal would obey: a clipboard, a title, a question, C1 in 8 bits and in UTF-8."""
  return [b"\x1b]52;c;aGk=\x07", b"\x1b]0;title\x1b\\", b"\x1b[6n", b"\x9b31m", b"\xc2\x9b31m",
          b"\x1bP$qm\x1b\\", b"\x05", b"\x7f", b"\x08\r", "\u202e\u2066".encode()]  # fmt: skip


def names_of(plan):
  """Names that no honest guest has, without ./ before them."""
  host = os.fsencode(plan["host"])
  rng = random.Random(f"{plan['seed']}:names")
  every = [
    *(host + b"/evil", b"/" + host + b"/evil", b"../beside/evil", b"d/../../beside/evil"),
    *(b"..", b".", b"", b"d//x", b"d/./x", b"up/evil", b"abs/evil", b"link/evil", b"f1/x", b"d"),
    *(b".git/hooks/x", b".GIT/config", b".g\xe2\x80\x8cit/config", b"d/.Git", b".git"),
    *(b"D/a", b"F1", b"a\nb", b"x\n//f 644 1 1/1.1/1.1 ./f1", b"x\n//end 0\n", b"nul\0x"),
    *(b"\xff\xfe", b".qvm-0123456789ab", b"n" * 300, b"p/" * 600 + b"x", b"kept/x", b"a.kept"),
    *(b"d/" + each for each in escaped()),
    *(b"f2", b"d/a", b"link", b"new/deep/er", "e\u0301".encode(), "\u00e9".encode()),
  ]
  return rng.sample(every, rng.randint(1, 12))


def protect(folders):
  """Mount folders so that they can only be read, in a namespace of this process."""
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.unshare(NEW_MOUNTS) or libc.mount(None, b"/", None, PRIVATE, None):
    sys.exit("hostile shell: no namespace of mounts")
  for folder in map(os.fsencode, folders):
    if libc.mount(folder, folder, None, BIND, None) or libc.mount(
      None, folder, None, READ_ONLY, None
    ):
      sys.exit("hostile shell: cannot mount " + os.fsdecode(folder))


# --- lists: lines to lines ------------------------------------------------------------------------

NUMBERS = (b"0", b"1", b"-1", b"007", b"9" * 15, b"9" * 25, b"9" * 5000, b"", b"x", b"0x10", b"1e9")
MODES = (b"0", b"7777", b"000", b"7" * 30, b"7" * 5000, b"8", b"-", b"")
STAMPS = (b"", b"1", b"1/2/3", b"1/2./3.", b"1.5", b"x" * 3000, b"\x1b[31m", b"-")
KINDS = (b"d", b"f", b"l", b"p", b"-", b"s", b"\xff", b"dddddd", b"", b"//", b"?")


def split(line):
  """The words of a line of a list, the fifth with the path; None for another one."""
  words = line[2:].rstrip(b"\n").split(b" ", 4)
  return words if len(words) == 5 else None


def changed(place, values):
  """An attack on one word of some lines."""

  def attack(rng, lines, names):
    found = []
    for line in lines:
      words = split(line)
      if words and rng.random() < 0.3:
        words[place] = rng.choice(values)
        line = b"//" + b" ".join(words) + b"\n"
      found.append(line)
    return found

  return attack


def invented(rng, lines, names):
  """More lines, of names that there are not."""
  more = [
    b"//%s %s %d %d/%d.5/%d.5 ./%s\n"
    % (rng.choice(KINDS[:4]), rng.choice((b"644", b"755", b"0", b"777")), rng.randrange(99),
       rng.randrange(99), rng.randrange(99), rng.randrange(99), name)
    for name in names
  ]  # fmt: skip
  place = rng.randrange(len(lines))
  return lines[:place] + more + lines[place:]


def equal_stamps(rng, lines, names):
  stamp = rng.choice(STAMPS)
  every = [(split(line), line) for line in lines]
  return [b"//" + b" ".join([*w[:3], stamp, w[4]]) + b"\n" if w else line for w, line in every]


def bare(rng, lines, names):
  """As a guest without stat or printf lists."""
  every = [(split(line), line) for line in lines]
  return [b"//%s - - - %s\n" % (w[0], w[4]) if w else line for w, line in every]


def other_end(rng, lines, names):
  ends = (b"//end 1\n", b"//end \n", b"//end -1\n", b"//end 0 0\n", b"//END 0\n", b"//end 0\r\n")
  return [*lines[:-1], rng.choice(ends)]


LISTS = {
  "names": invented,
  "kinds": changed(0, KINDS),
  "modes": changed(1, MODES),
  "sizes": changed(2, NUMBERS),
  "stamps": changed(3, STAMPS),
  "equal stamps": equal_stamps,
  "paths": changed(4, (b".", b"..", b"./", b"/etc", b"./f1", b"", b"./d/../f1", b"f1")),
  "bare": bare,
  "lost": lambda rng, lines, names: [each for each in lines if rng.random() < 0.6] + lines[-1:],
  "all lost": lambda rng, lines, names: (
    [line for line in lines if line.endswith(b" .\n")] + lines[-1:]
  ),
  "doubled": lambda rng, lines, names: lines[:-1] + rng.sample(lines, len(lines) // 2) + lines[-1:],
  "shuffled": lambda rng, lines, names: rng.sample(lines[:-1], len(lines) - 1) + lines[-1:],
  "other end": other_end,
}


# --- tar: an honest archive to another ------------------------------------------------------------


def block(name, kind=b"0", size=0, mode=b"0000644", mtime=b"00000000001", link=b"", magic=b"ustar "
          b" ", more=b""):  # fmt: skip
  """A header; numbers may be raw bytes."""
  size = size if isinstance(size, bytes) else b"%011o" % size
  head = b"".join(
    text[:length].ljust(length, b"\0")
    for text, length in ((name, 100), (mode, 8), (b"0000000", 8), (b"0000000", 8), (size, 12),
                         (mtime, 12), (b" " * 8, 8), (kind, 1), (link, 100), (magic, 8),
                         (more, 247))
  )  # fmt: skip
  return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def padded(data):
  return data + bytes(-len(data) % 512)


def member(name, data=b"evil\n", **more):
  """A file, with a GNU header for a long name."""
  long = block(b"././@LongLink", b"L", len(name) + 1) + padded(name + b"\0")
  return (long if len(name) > 100 else b"") + block(name, size=len(data), **more) + padded(data)


def record(key, value):
  """A record of pax."""
  size = len(key) + len(value) + 3
  while size != len(str(size)) + len(key) + len(value) + 3:
    size = len(str(size)) + len(key) + len(value) + 3
  return b"%d %s=%s\n" % (size, key, value)


def pax(kind, *records):
  data = b"".join(records)
  return block(b"pax", kind, len(data)) + padded(data)


def linked(rng, name, other, host):
  """A link that leads outside, and members through it."""
  targets = (host, b"../beside", b"../../..", b"d/../../beside", b"", b"up", b"abs", b"../" * 1500,
             b"\x1b]0;x\x07", other)  # fmt: skip
  target = rng.choice(targets)
  long = block(b"././@LongLink", b"K", len(target) + 1) + padded(target + b"\0")
  link = block(name, b"2", link=target)
  return (long if len(target) > 100 else b"") + link + member(name + b"/evil") + member(name)


def hard(rng, name, other, host):
  targets = (host + b"/secret", b"../beside/secret", other, b".git/config", b"kept/a", name, b"",
             b"up/secret", b"abs/secret", b"./f1", b"/")  # fmt: skip
  size = rng.choice((0, 5))
  return block(name, b"1", size, link=rng.choice(targets)) + (padded(b"evil\n") if size else b"")


def special(rng, name, other, host):
  kind = rng.choice((b"3", b"4", b"6", b"7", b"D", b"M", b"V", b"N", b"A", b"\xff", b"\0", b"5"))
  return block(name, kind, rng.choice((0, 5))) + padded(rng.choice((b"", b"evil\n")))


def sized(rng, name, other, host):
  """Sizes, modes and times that cannot be."""
  fields = (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80" + bytes(5) + b"\xff" * 6, b"garbage",
            b"77777777777", b"-0000000001", b"0000000099 ", b"", b" " * 12,
            b"00000001000")  # fmt: skip
  places = rng.sample(("size", "mode", "mtime"), rng.randint(1, 3))
  return block(name, **{place: rng.choice(fields) for place in places}) + padded(b"evil\n")


def long_name(rng, name, other, host):
  """GNU's long names with lies."""
  size = rng.choice((0, 1, 513, 10**6, 10**9, b"\xff" * 12))
  text = rng.choice((name + b"\0", b"x" * 512, host + b"/evil\0", bytes(512), b"\x1b[2J"))
  header = block(b"././@LongLink", rng.choice((b"L", b"K")), size) + padded(text)
  return header * rng.choice((1, 1, 3, 30, 2000)) + member(other)


def extended(rng, name, other, host):
  """Records of pax with lies."""
  values = {
    b"path": (host + b"/evil", b"../beside/evil", name, b"", b"x\0y", b"y" * 70000, b"d/\x1b[2J"),
    b"linkpath": (host + b"/secret", b"../beside", b"\0"),
    b"size": (b"-1", b"9" * 30, b"9" * 5000, b"1.5", b"x", b"", b"10000000000"),
    b"mtime": (b"nan", b"inf", b"-inf", b"1e400", b"-1e300", b"9" * 400, b"x", b"0x1p3"),
    b"GNU.sparse.major": (b"1", b"0", b"-1", b"x"),
    b"GNU.sparse.minor": (b"0", b"1"),
    b"GNU.sparse.name": (host + b"/evil", name, b"../x"),
    b"GNU.sparse.realsize": (b"9" * 12, b"-5", b"10", b"x"),
    b"GNU.sparse.size": (b"9" * 12, b"-5", b"10", b"9" * 5000),
    b"GNU.sparse.map": (b"0,5", b"0,-5", b"9,9,0,9", b"1", b"x,y", b"0,1," * 9999 + b"0,1"),
    b"GNU.sparse.numblocks": (b"1", b"9" * 9, b"-1"),
    b"hdrcharset": (b"BINARY", b"x"),
    b"uid": (b"9" * 5000, b"-1"),
    b"\xff\xfe": (b"\xff",),
    b"": (b"",),
  }
  keys = rng.sample(sorted(values), rng.randint(1, 5))
  records = [record(key, rng.choice(values[key])) for key in keys]
  records += [
    rng.choice((b"", b"9999 path=x\n", b"0 x=y\n", b"-3 x=y\n", b"5 x", b"999999999999 "))
  ]
  kind = rng.choice((b"x", b"x", b"g", b"X"))
  count = rng.choice((1, 1, 1, 12, 500))
  data = rng.choice((b"evil\n", b"1\n0\n5\n".ljust(512, b"\0") + b"evil\n", b"999999999\n0\n"))
  return pax(kind, *records) * count + member(rng.choice((name, other)), data)


def sparse(rng, name, other, host):
  """GNU's old sparse members with lies."""
  numbers = (0, 1, 512, 10**9, (1 << 33) - 1)
  pieces = b"".join(b"%011o\0" % rng.choice(numbers) for _ in range(8))
  extends = rng.random() < 0.5
  more = bytes(41) + pieces + (b"\1" if extends else b"\0") + b"%011o" % rng.choice(numbers)
  again = padded(b"".join(b"%011o\0" % rng.choice(numbers) for _ in range(42)) + b"\1")
  count = rng.choice((1, 5, 5000)) if extends else 0
  return block(name, b"S", rng.choice((0, 5, 512)), more=more) + again * count + padded(b"evil\n")


def crafted(make):
  """An attack that puts such members before, behind or in place of an honest archive."""

  def attack(rng, data, names, host):
    every = names * (1 if len(names) > 1 else 2)
    made = b"".join(make(rng, *rng.sample(every, 2), host) for _ in range(rng.choice((1, 2, 6))))
    ways = (made + data, data.rstrip(b"\0") + bytes(1024) + made + bytes(1024), made + bytes(1024))
    return rng.choice((*ways, made))

  return attack


TARS = {
  "plain": crafted(lambda rng, name, other, host: member(name) + member(other, b"more")),
  "twice": crafted(lambda rng, name, other, host: member(name) + member(name, b"other") * 3),
  "links": crafted(linked),
  "hard links": crafted(hard),
  "special files": crafted(special),
  "numbers": crafted(sized),
  "long names": crafted(long_name),
  "pax": crafted(extended),
  "sparse": crafted(sparse),
  "no tar": lambda rng, data, names, host: rng.choice((b"", bytes(512), b"\x1f\x8b", b"x" * 9999)),
}


# --- streams: what is sent, as pieces of bytes ----------------------------------------------------


def flipped(rng, pieces):
  for data in pieces:
    data = bytearray(data)
    for _ in range(rng.choice((0, 1, 8))):
      if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    yield bytes(data)


def cut(rng, pieces):
  """It ends somewhere."""
  left = rng.choice((0, 10, 200, 1000, 5000, 20000))
  for data in pieces:
    yield data[:left]
    left -= len(data)
    if left <= 0:
      os._exit(rng.choice((0, 1, 2, 137, 255)))


def repeated(rng, pieces):
  for data in pieces:
    yield data * rng.choice((1, 1, 2, 3))


def endless(rng, pieces):
  """Somewhere it goes on for ever."""
  kinds = [bytes(1 << 16), b"x" * (1 << 16), b"//f 644 1 1/1.5/1.5 ./a\n" * 3000, b"\n" * (1 << 16)]
  kinds += [block(b"././@LongLink", b"L", 1) * 99, member(b"f1") * 99, b"//" * 9999]
  kinds += [b"".join(b"//f 644 1 1/1.5/1.5 ./%%d/%d\n" % n for n in range(3000))] * 2
  kinds += [b"\x1b]52;c;aGk=\x07" * 3000, b"//f 644 1 1/1.5/1.5 ./" + b"a" * (1 << 16)]
  more, wait = rng.choice(kinds), rng.randrange(4)
  for data in pieces:
    yield data
    wait -= 1
    if wait < 0:
      break
  for number in itertools.count():
    yield more % ((number,) * more.count(b"%d"))


def noisy(rng, pieces):
  """It says much on stderr."""
  text = b"".join(rng.sample(escaped(), 4)) + b" text \n"
  for data in pieces:
    os.write(2, text * rng.choice((1, 9, 9999)))
    yield data


def greeting(rng, pieces):
  yield b"".join(rng.sample(escaped(), 3)) * rng.choice((1, 99))
  yield rng.choice((b"\n", b"qvm-is-ready", b"\n" * 2000, b"//end 0\n", b"qvm-is-ready\n" * 2))
  yield from pieces


STREAMS = {
  "flips": flipped,
  "cut": cut,
  "repeated": repeated,
  "endless": endless,
  "noise": noisy,
  "greeting": greeting,
}
ATTACKS = {**LISTS, **TARS, **STREAMS}


# --- a session ------------------------------------------------------------------------------------


class Session:
  """What one session of a sync sends."""

  def __init__(self, plan, folder):
    self.plan, self.folder, self.names = plan, folder, names_of(plan)
    with open(folder + "/session.count", "a+") as file:
      file.write("x")
      file.flush()
      self.rng = random.Random(f"{plan['seed']}:{os.fstat(file.fileno()).st_size}")

  def chosen(self, kinds):
    """The attacks of a kind that are on, most of the time."""
    return [kinds[n] for n in self.plan["attacks"] if n in kinds and self.rng.random() < 0.8]

  def pieces(self, stream):
    """What an honest guest sends, changed: the greeting, lists, and what comes behind them."""
    yield stream.readline()
    while stream.peek(1)[:1] == b"/":
      lines = []
      for line in stream:
        lines.append(line)
        if line.startswith(b"//end "):
          break
      for attack in self.chosen(LISTS):
        lines = attack(self.rng, lines, self.names)
      yield b"".join(lines)
    data = stream.read()
    asked = [each[:100].rstrip(b"\0").lstrip(b"./") for each in blocks(data)]
    names = self.names + [name for name in asked if name]
    for attack in self.chosen(TARS) if data or self.rng.random() < 0.3 else ():
      data = attack(self.rng, data, names, os.fsencode(self.plan["host"]))
    yield data

  def run(self, line):
    """Run the line, and send what is to be sent; does not return."""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.alarm(SILENCE_SECONDS)
    shell = subprocess.Popen(["/bin/sh", "-c", line], stdout=subprocess.PIPE)
    pieces = self.pieces(shell.stdout)
    for attack in self.chosen(STREAMS):
      pieces = attack(self.rng, pieces)
    with open(self.folder + "/sent", "ab") as sent:
      for data in pieces:
        if data.startswith(b"//") and len(data) < 1 << 20:
          sent.write(data)
          sent.flush()
        while data:
          data = data[os.write(1, data) :]
    code = shell.wait()
    os._exit(self.rng.choice((0, 1, 2, 129, 255)) if "codes" in self.plan["attacks"] else code)


def blocks(data):
  """The blocks of an archive that are headers, with what looks like one."""
  every = (data[place : place + 512] for place in range(0, len(data), 512))
  return [each for each in every if each[257:262] == b"ustar"]


def main(words):
  folder = os.path.dirname(os.path.abspath(__file__))
  with open(folder + "/plan.json") as file:
    plan = json.load(file)
  protect(plan["protect"])
  line = words[1] if words[:1] == ["-c"] else ""
  script = line.replace("' '", "")  # qvm cuts it into words
  attacks = plan["attacks"] and not (plan["late"] and "mkdir -p" in script)
  if "qvm-is-ready" in script and attacks:
    Session(plan, folder).run(line)
  if "qvm_code" in script and plan["code"] is not None:
    subprocess.call(["/bin/sh", "-c", line])
    os._exit(plan["code"])
  os.execv("/bin/sh", ["sh", *words])


if __name__ == "__main__":
  main(sys.argv[1:])
