"""Stand-ins for the tar and pax of NetBSD and of OmniOS (illumos), as far as GUESTS.md goes.

FreeBSD's, OpenBSD's and Haiku's are in Debian; these two are not. What the table of GUESTS.md says
is done as it says; where it says nothing, as the sources do: bin/pax of NetBSD, usr/src/cmd/tar of
illumos. Tests often run as root: what the modes forbid is refused all the same.

  main("netbsd" or "omnios", "tar" or "pax", arguments) -> exit code
"""

import contextlib
import os
import stat
import sys

BLOCK, RECORD = 512, 10240
ZERO = bytes(BLOCK)
LARGEST = 0o77777777777  # of eleven octal digits: 8 GiB less a byte


class Failed(Exception):
  """It ends here, with this exit code; the text goes to stderr."""

  def __init__(self, text, code=1):
    super().__init__(text)
    self.text, self.code = text, code


class Program:
  """What both directions share: who it is, and the exit code so far."""

  def __init__(self, system, name):
    self.system, self.name, self.code = system, name, 0

  def say(self, text):
    sys.stderr.buffer.write(os.fsencode(f"{self.name}: {text}\n"))

  def fault(self, text, code=1):
    """An error after which it goes on."""
    self.say(text)
    self.code = max(self.code, code)


# --- what the modes allow, also to root ------------------------------------------------------


def allowed(path, bits):
  """May this user do what the bits (4 read, 2 write, 1 search) say? Root is told by the modes."""
  if os.geteuid() != 0:
    return os.access(path, bits)
  found = os.stat(path)
  shift = 6 if found.st_uid == 0 else 3 if found.st_gid == os.getegid() else 0
  return found.st_mode >> shift & bits == bits


def check_parent(path):
  """Raise PermissionError where the folder of the path takes no new entry."""
  folder = os.path.dirname(path) or b"."
  if os.path.isdir(folder) and not allowed(folder, 3):
    raise PermissionError(13, "Permission denied")


# --- headers ---------------------------------------------------------------------------------


def number(field):
  """A field of octal digits; base-256 is read as 0."""
  if field[:1] >= b"\x80":
    return 0
  with contextlib.suppress(ValueError):
    return int(field.strip(b" \0") or b"0", 8)
  return 0


def text(field):
  return field.split(b"\0")[0]


def valid(block):
  """Is the checksum right?"""
  total = sum(block[:148]) + sum(block[156:]) + 8 * 32
  return number(block[148:156]) == total


class Header:
  """What a header says, after those before it that belong to it."""

  def __init__(self, block, longer):
    self.kind = block[156:157]
    self.mode, self.size = number(block[100:108]) & 0o7777, number(block[124:136])
    self.time = number(block[136:148])
    self.target = longer.get("linkpath", text(block[157:257]))
    prefix = b"" if block[257:265] == b"ustar  \0" else text(block[345:500])
    self.short = text(block[:100])
    self.name = longer.get("path", prefix + b"/" * bool(prefix and self.short) + self.short)
    if "size" in longer:
      self.size = longer["size"]
    if "mtime" in longer:
      self.time = longer["mtime"]
    if self.kind in (b"0", b"\0", b"7") and self.name.endswith(b"/"):
      self.kind = b"5"


def header(name, kind, found, size=0, target=b"", prefix=b""):
  """The 512 bytes of a ustar header."""
  block = bytearray(BLOCK)

  def put(start, length, content):
    block[start : start + length] = content.ljust(length, b"\0")

  put(0, 100, name)
  put(100, 8, b"%07o" % (found.st_mode & 0o7777))
  put(108, 8, b"%07o" % min(found.st_uid, 0o7777777))
  put(116, 8, b"%07o" % min(found.st_gid, 0o7777777))
  put(124, 12, b"%011o" % size)
  put(136, 12, b"%011o" % max(0, int(found.st_mtime)))
  put(148, 8, b" " * 8)
  put(156, 1, kind)
  put(157, 100, target)
  put(257, 8, b"ustar\x0000")
  put(345, 155, prefix)
  put(148, 8, b"%06o\0 " % sum(block))
  return bytes(block)


# --- reading ---------------------------------------------------------------------------------


class Extract(Program):
  """Takes an archive from a stream and writes it below the current folder."""

  def __init__(self, system, name, stream, modes, listing=None):
    super().__init__(system, name)
    self.stream, self.modes, self.listing = stream, modes, listing
    self.folders = []  # (path, mode, time) to be set at the end
    mask = os.umask(0)
    os.umask(mask)
    self.mask = 0 if modes else mask

  def block(self):
    return self.stream.read(BLOCK)

  def data(self, size):
    """The content of a member, piece by piece."""
    left = size
    while left > 0:
      piece = self.stream.read(min(left + -left % BLOCK, 1 << 16))
      if not piece:
        raise Failed("unexpected end of the archive", 1 if self.system == "netbsd" else 2)
      yield piece[:left]
      left -= len(piece)

  def run(self):
    """Read all; returns the exit code."""
    block, longer, first = self.block(), {}, True
    while True:
      if len(block) < BLOCK or block == ZERO:
        if self.system == "netbsd" and first:
          raise Failed("End of archive volume 1 reached\ntar: Sorry, unable to determine archive "
                       "format.")  # fmt: skip
        if not block and not first:
          self.fault("unexpected end of the archive")
        break
      if not valid(block):
        block = self.lost(first)
        continue
      first = False
      member = Header(block, longer)
      if self.system == "netbsd" and not member.short:
        block = self.lost(first)
        continue
      longer = self.take(member, longer)
      block = self.block()
    for path, mode, time in reversed(self.folders):
      with contextlib.suppress(OSError):
        os.utime(path, (time, time))
        os.chmod(path, mode)
    return self.code

  def lost(self, first):
    """A block that is no header: the next that is one, or the end."""
    if self.system == "omnios":
      raise Failed("directory checksum error", 2)
    if first:
      raise Failed("Sorry, unable to determine archive format.")
    self.fault("Invalid header, starting valid header search.")
    block = self.block()
    while len(block) == BLOCK and block != ZERO and not (valid(block) and text(block[:100])):
      block = self.block()
    return block

  def take(self, member, longer):
    """Deal with one member; returns what it says of the next one."""
    if member.kind == b"L" or (member.kind == b"K" and self.system == "netbsd"):
      value = b"".join(self.data(member.size)).split(b"\0")[0]
      return {**longer, "path" if member.kind == b"L" else "linkpath": value}
    if member.kind == b"X" and self.system == "omnios":
      return self.records(b"".join(self.data(member.size)))
    if member.kind not in b"\x00 0 1 2 3 4 5 6 7".split(b" "):
      if self.system == "omnios":
        kind = member.kind.decode("latin-1")
        self.fault(f"{os.fsdecode(member.name)}: typeflag '{kind}' not recognized, converting to "
                   "regular file")  # fmt: skip
      member.kind = b"0"
    member.name = member.name.strip(b"/") if member.name != b"." else b"."
    if self.listing:
      self.listing.write(member.name + b"\n")
      for _ in self.data(member.size):
        pass
      return {}
    content = self.data(member.size if member.kind in (b"0", b"\0", b"7") else 0)
    try:
      self.put(member, content)
    except OSError as error:
      name = os.fsdecode(member.name)
      code = 13 if self.system == "omnios" and error.errno == 13 else 1
      if self.system == "omnios":
        self.fault(f"{name} - cannot create: {error.strerror}", code)
      else:
        self.fault(f"Unable to create {name}: {error.strerror}", code)
      for _ in content:
        pass
    return {}

  def records(self, content):
    """Those of an extended header: LENGTH KEY=VALUE and a newline each."""
    found = {}
    while content[:1].isdigit():
      length = int(content.split(b" ")[0])
      key, _, value = content[:length].partition(b" ")[2][:-1].partition(b"=")
      content = content[length:]
      if key in (b"path", b"linkpath"):
        found[key.decode()] = value
      elif key == b"size":
        found["size"] = int(value)
      elif key == b"mtime":
        found["mtime"] = float(value)
    return found

  def put(self, member, content):
    """Create one member; both go through links on the way to it."""
    path = member.name
    if path not in (b"", b".") and not os.path.isdir(os.path.dirname(path) or b"."):
      self.make_parents(os.path.dirname(path))
    if member.kind == b"5":
      self.put_folder(member, path)
    elif member.kind in (b"0", b"\0", b"7"):
      self.put_file(member, path, content)
    elif self.cleared(path):
      check_parent(path)
      if member.kind == b"2":
        os.symlink(member.target, path)
        os.utime(path, (member.time, member.time), follow_symlinks=False)
      elif member.kind == b"1":
        os.link(member.target, path, follow_symlinks=False)
      elif member.kind == b"6":
        os.mkfifo(path, member.mode & ~self.mask)

  def make_parents(self, folder):
    above = os.path.dirname(folder)
    if above and not os.path.isdir(above):
      self.make_parents(above)
    check_parent(folder)
    os.mkdir(folder)

  def put_folder(self, member, path):
    mode = member.mode & ~self.mask
    if path in (b"", b"."):
      path = b"."
    elif not os.path.isdir(path):  # a link to a folder passes for one
      check_parent(path)
      if self.system == "netbsd" and os.path.lexists(path):
        os.unlink(path)
      os.mkdir(path)
    elif self.system == "netbsd" and not self.modes:
      return
    if self.system == "omnios":
      os.chmod(path, mode)
      os.utime(path, (member.time, member.time))
    else:
      os.chmod(path, mode | 0o700)
      self.folders.append((path, mode, member.time))

  def put_file(self, member, path, content):
    if self.system == "netbsd":
      check_parent(path)
      if os.path.isdir(path) and not os.path.islink(path):
        for _ in content:  # its rename(2) fails, and nobody cares
          pass
        return
    elif not self.cleared(path):
      return
    check_parent(path)
    half = path[:200] + b".tar%d" % os.getpid()
    with open(half, "wb") as file:
      for piece in content:
        if piece.count(0) == len(piece):
          file.seek(len(piece), 1)
        else:
          file.write(piece)
      file.truncate()
    os.chmod(half, member.mode & ~self.mask & (0o7777 if self.modes else 0o777))
    os.utime(half, (member.time, member.time))
    os.rename(half, path)

  def cleared(self, path):
    """Remove what is in the place of a member that is no folder; False where that stays."""
    if os.path.lexists(path):
      check_parent(path)
      if os.path.isdir(path) and not os.path.islink(path):
        try:
          os.rmdir(path)
        except OSError:
          if self.system == "netbsd":
            return False
          raise
      else:
        os.unlink(path)
    return True


# --- writing ---------------------------------------------------------------------------------


class Create(Program):
  """Writes an archive of the given paths to a stream."""

  def __init__(self, system, name, stream, recursive, extended=False):
    super().__init__(system, name)
    self.stream, self.recursive, self.extended = stream, recursive, extended
    self.written, self.links = 0, {}

  def write(self, content):
    self.stream.write(content)
    self.written += len(content)

  def run(self, paths):
    for path in paths:
      self.add(path)
    self.write(bytes(2 * BLOCK))
    self.write(bytes(-self.written % RECORD))
    self.stream.flush()
    return self.code

  def add(self, path):
    shown = os.fsdecode(path)
    try:
      found = os.lstat(path)
    except OSError as error:
      return self.fault(f"Unable to access {shown}: {error.strerror}")
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFREG:
      self.add_file(path, shown, found)
    elif kind == stat.S_IFLNK:
      self.put_header(path, b"2", found, target=os.readlink(path))
    elif kind == stat.S_IFIFO:
      self.put_header(path, b"6", found)
    elif kind == stat.S_IFDIR:
      self.put_header(path.rstrip(b"/") + b"/", b"5", found)
      if self.recursive:
        self.add_entries(path, shown)
    else:
      self.say(f"{shown} skipped")
    return None

  def add_entries(self, path, shown):
    if not allowed(path, 5):
      return self.fault(f"Unable to read directory {shown}: Permission denied")
    for name in sorted(os.listdir(path)):
      self.add(os.path.join(path, name))
    return None

  def add_file(self, path, shown, found):
    first = self.links.setdefault((found.st_dev, found.st_ino), path)
    if found.st_nlink > 1 and first != path:
      return self.put_header(path, b"1", found, target=first)
    folder = os.path.dirname(path) or b"."
    try:
      if not (allowed(path, 4) and allowed(folder, 1)):
        raise PermissionError(13, "Permission denied")
      file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
      return self.fault(f"Unable to open {shown} to read: {error.strerror}")
    with file:
      if not self.put_header(path, b"0", found, found.st_size):
        return None
      left = found.st_size
      while left > 0:
        piece = file.read(min(left, 1 << 16))
        if not piece:  # it has shrunk
          self.fault(f"File size changed during archive {shown}")
          piece = bytes(min(left, 1 << 16))
        self.write(piece)
        left -= len(piece)
      self.write(bytes(-found.st_size % BLOCK))
    return None

  def split(self, name):
    """(prefix, name) that fit into a header, or None."""
    if len(name) <= 100:
      return b"", name
    for cut in range(min(155, len(name) - 2), 0, -1):
      if name[cut : cut + 1] == b"/" and 0 < len(name) - cut - 1 <= 100:
        return name[:cut], name[cut + 1 :]
    return None

  def put_header(self, name, kind, found, size=0, target=b""):
    """Write a header, and those before it that it needs; False where that cannot be."""
    shown, parts = os.fsdecode(name), self.split(name)
    more = {}
    if size > LARGEST:
      if not self.extended:
        self.fault(f"File is too large for ustar {shown}")
        return False
      more["size"], size = b"%d" % size, 0
    if parts is None:
      more["path"] = name
    if len(target) > 100:
      more["linkpath"] = target
    if self.system == "omnios" and more and not self.extended:
      self.fault(f"{'File' if parts is None else 'Link'} name too long for ustar {shown}")
      return False
    if self.system == "omnios":
      if more:
        content = b"".join(record(key, value) for key, value in sorted(more.items()))
        self.put_content(b"/tmp/PaxHeaders.1", b"X", found, content)
    else:
      for key, letter in (("linkpath", b"K"), ("path", b"L")):
        if key in more:
          self.put_content(b"././@LongLink", letter, found, more[key] + b"\0")
    prefix, short = parts or (b"", name[:100])
    self.write(header(short, kind, found, size, target[:100], prefix))
    return True

  def put_content(self, name, kind, found, content):
    self.write(header(name, kind, found, len(content)) + content + bytes(-len(content) % BLOCK))


def record(key, value):
  """One of an extended header."""
  rest = b" " + key.encode() + b"=" + value + b"\n"
  length = len(rest) + 1
  while len(b"%d" % length) + len(rest) != length:
    length += 1
  return b"%d" % length + rest


# --- command lines ---------------------------------------------------------------------------


def usage(name, text="usage"):
  raise Failed(f"{text}\nusage: {name} -[crtux]f archive [file ...]")


def lines_of(path):
  with open(0 if path == b"-" else path, "rb", closefd=path != b"-") as file:
    return [line for line in file.read().split(b"\n") if line]


def tar(system, arguments):
  """tar(1): letters, their values in order, options that begin with a dash on NetBSD."""
  words = [os.fsencode(word) for word in arguments]
  letters, values, names = [], {}, []
  with_value = b"fbCTIX" if system == "netbsd" else b"fbkX"
  known = b"cxtruvpomhlfbCTIXBHOPSeqwk" if system == "netbsd" else b"cxtruvpomhlfbkXBFeinqwDEP@/T"
  recursive, first, chosen = True, True, []
  while words and (first or words[0][:1] == b"-"):
    word = words.pop(0)
    if word == b"--":
      break
    if word.startswith(b"--"):
      if system == "netbsd" and word == b"--no-recursion":
        recursive = False
        continue
      usage("tar", f"unknown option -- {os.fsdecode(word[2:])}")
    if system == "omnios" and not first:
      words.insert(0, word)  # only the first word has letters; -C and -I stand among the names
      break
    first = False
    bundle = word.lstrip(b"-")
    for at in range(len(bundle)):
      letter = bundle[at : at + 1]
      if letter not in known:
        usage("tar", f"{os.fsdecode(letter)}: unknown function modifier")
      letters.append(letter)
      if letter in with_value:
        rest = bundle[at + 1 :]
        value = rest if rest and word[:1] == b"-" and system == "netbsd" else words.pop(0)
        values[letter] = value
        if letter in b"TI":
          names += lines_of(value)
        if rest and value is rest:
          break
  while words:
    word = words.pop(0)
    if word == b"-C" and words:
      chosen.append((names, words.pop(0)))
      names = []
    elif word == b"-I" and words:
      names += lines_of(words.pop(0))
    else:
      names.append(word)
  actions = [letter for letter in letters if letter in b"cxtru"]
  if len(actions) != 1:
    usage("tar", "specify one of [ctxru]")
  if b"C" in values:
    os.chdir(values[b"C"])
  archive = values.get(b"f", b"-")
  if actions[0] == b"c":
    with out(archive) as stream:
      work = Create(system, "tar", stream, recursive, b"E" in letters)
      if chosen:
        os.chdir(chosen[0][1])
      if not names:
        raise Failed("Missing filenames" if system == "omnios" else "", int(system == "omnios"))
      return work.run(names)
  if actions[0] not in b"xt":
    usage("tar", "not in this stand-in")
  if chosen:
    os.chdir(chosen[0][1])
  with open(0 if archive == b"-" else archive, "rb", closefd=archive != b"-") as stream:
    listing = sys.stdout.buffer if actions[0] == b"t" else None
    return Extract(system, "tar", stream, b"p" in letters, listing).run()


def pax(system, arguments):
  """pax(1): -r or -w; the names that it writes come as arguments or on stdin."""
  words, seen, values = [os.fsencode(word) for word in arguments], b"", {}
  while words and words[0][:1] == b"-" and words[0] != b"-":
    word = words.pop(0)
    if word == b"--":
      break
    if word.startswith(b"--"):
      usage("pax", f"unknown option -- {os.fsdecode(word)}")
    at = 1
    while at < len(word):
      letter = word[at : at + 1]
      at += 1
      if letter in b"fxbsopE":
        values[letter] = word[at:] or words.pop(0)
        break
      if letter not in b"rwdvnkuitHLPXDYZc0":
        usage("pax", f"unknown option -- {os.fsdecode(letter)}")
      if letter == b"0" and system == "omnios":
        usage("pax", "unknown option -- 0")
      seen += letter
  if values.get(b"x", b"ustar") not in (b"ustar", b"tar"):
    usage("pax", f"Unknown -x format: {os.fsdecode(values[b'x'])}")
  archive = values.get(b"f", b"-")
  if b"w" in seen:
    names = words
    if not names:
      between = b"\0" if b"0" in seen else b"\n"
      names = [name for name in sys.stdin.buffer.read().split(between) if name]
    with out(archive) as stream:
      return Create(system, "pax", stream, b"d" not in seen).run(names)
  with open(0 if archive == b"-" else archive, "rb", closefd=archive != b"-") as stream:
    listing = None if b"r" in seen else sys.stdout.buffer
    modes = any(letter in values.get(b"p", b"") for letter in b"ep")
    return Extract(system, "pax", stream, modes, listing).run()


def out(archive):
  return open(1 if archive == b"-" else archive, "wb", closefd=archive != b"-")


def main(system, name, arguments):
  """Run the program; the exit code."""
  try:
    return (tar if name == "tar" else pax)(system, arguments)
  except Failed as error:
    if error.text:
      sys.stderr.buffer.write(os.fsencode(f"{name}: {error.text}\n"))
    return error.code
  except BrokenPipeError:
    os.close(1)
    return 1
