"""Stand-ins for find(1) of FreeBSD, OpenBSD, NetBSD and OmniOS: GNU find with the right face.

"gnu" is GNU find as it is, for Haiku and as OmniOS' gfind, but with the guest's clock.

Each knows the primaries that the system's find knows, wants a path, and -cnewer compares with what
GUESTS.md says: on FreeBSD with FILE's mtime, on OpenBSD and NetBSD with its ctime; illumos has no
-cnewer at all, and its -newer counts whole seconds.

The guest's clock may have been set since (guest_tools.Guest.set_clock): nothing can set a ctime, so
that -newer and its kin then see each time as that clock would have said it.

  main(system, folder of the guest, arguments) -> does not return
"""

import os
import sys

FIND = "/usr/bin/find"
NONE = """! ( ) -a -o -depth -print -prune -xdev -follow -ls -nouser -nogroup"""
ONE = """-atime -ctime -mtime -group -inum -links -name -newer -perm -size -type -user -fstype"""
BSD_NONE = NONE + """ -and -or -not -print0 -delete -empty -d -x -mount"""
BSD_ONE = (
  ONE
  + """ -amin -cmin -mmin -anewer -cnewer -iname -path -maxdepth -mindepth -regex -iregex -ipath"""
)
PRIMARIES = {  # without a value, with one
  "freebsd": (
    BSD_NONE + " -false -true -readable -writable -executable -quit",
    BSD_ONE
    + " -mnewer -newercm -newermm -newercc -newermc -newermt -newerct -samefile -wholename -lname",
  ),
  "openbsd": (BSD_NONE, BSD_ONE),
  "netbsd": (BSD_NONE + " -false -true", BSD_ONE),
  "omnios": (NONE + " -mount -local", ONE + " -amin -cmin -mmin"),
}
# What is compared: of the file, and of FILE.
NEWER = {
  "freebsd": {"-newer": "mm", "-mnewer": "mm", "-cnewer": "cm", "-anewer": "am"},
  "openbsd": {"-newer": "mm", "-cnewer": "cc", "-anewer": "aa"},
  "netbsd": {"-newer": "mm", "-cnewer": "cc", "-anewer": "aa"},
  "omnios": {"-newer": "mm"},
  "gnu": {"-newer": "mm", "-cnewer": "cm", "-anewer": "am", "-newercc": "cc", "-newercm": "cm"},
}
COMMANDS = ("-exec", "-ok", "-execdir")
ACTIONS = (*COMMANDS, "-print", "-print0", "-ls", "-delete", "-printf", "-quit")
GNU_NAMES = {"-d": "-depth", "-x": "-xdev", "-local": "-true", "-mnewer": "-newer"}


def usage(text):
  """As all of them: what is wrong, how it is used, exit code 1."""
  sys.stderr.write(f"find: {text}\nfind: [-H | -L] path-list predicate-list\n")
  raise SystemExit(1)


def segments(folder):
  """The settings of the guest's clock: (when, in the real clock's ns, what has been added then)."""
  try:
    with open(os.path.join(folder, "clock")) as file:
      return [tuple(map(int, line.split())) for line in file]
  except FileNotFoundError:
    return []


def as_told(time, clock):
  """A time in ns as the guest's clock would have said it."""
  added = 0
  for since, value in clock:
    if time >= since:
      added = value
  return time + added


def time_of(found, letter):
  return {"m": found.st_mtime_ns, "c": found.st_ctime_ns, "a": found.st_atime_ns}[letter]


def compare(folder, letters, reference, path):
  """For -exec: is this file newer? Exit code 0 or 1."""
  clock = segments(folder)
  there = as_told(time_of(os.stat(reference), letters[1]), clock)
  return int(as_told(time_of(os.lstat(path), letters[0]), clock) <= there)


def translated(system, folder, words):
  """GNU find's arguments."""
  options = ("-H", "-L") if system == "omnios" else ("-H", "-L", "-P", "-d", "-x", "-X")
  found, late = [], []
  while words and words[0] in options:
    word = words.pop(0)
    (late if word in GNU_NAMES else found).append(GNU_NAMES.get(word, word))
  paths = []
  while words and words[0] not in ("!", "(") and not words[0].startswith("-"):
    paths.append(words.pop(0))
  if not paths:
    usage("insufficient number of arguments")
  return found + paths + late + expression(system, folder, words)


def expression(system, folder, words):
  """What comes after the paths."""
  none, one = (set(names.split()) for names in PRIMARIES[system])
  found, clock = [], segments(folder)
  silent = clock and not set(words) & set(ACTIONS)  # -exec, which is put in, prints nothing
  while words:
    word = words.pop(0)
    if word in COMMANDS and not (system == "omnios" and word == "-execdir"):
      found.append(word)
      while words:
        found.append(words.pop(0))
        if found[-1] == ";" or (found[-1] == "+" and found[-2] == "{}"):
          break
      else:
        usage("incomplete statement")
    elif word in none:
      found.append(GNU_NAMES.get(word, word))
    elif word in one:
      if not words:
        usage("incomplete statement")
      found += with_value(system, folder, clock, word, words.pop(0))
    else:
      usage(f"bad option {word}")
  return ["(", *found, ")", "-print"] if silent and found else found


def with_value(system, folder, clock, word, value):
  letters = NEWER[system].get(word)
  if not letters:
    return [word, value]
  try:
    there = os.stat(value)
  except OSError:
    usage(f"cannot access {value}")
  if clock:
    code = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--compare", folder, letters]
    return ["-exec", *code, value, "{}", ";"]
  if system == "omnios":
    return ["-newermt", f"@{int(there.st_mtime)}.999999999"]
  return ["-newer" + letters, value]


def with_clock(folder, words):
  """GNU find's own arguments, with what looks at the clock replaced where that has been set."""
  clock, found = segments(folder), []
  silent = clock and not set(words) & set(ACTIONS)
  if silent:
    words = list(words)
    start = next((n for n, word in enumerate(words) if word[:1] in "-(!" and n), len(words))
    found, words = words[:start] + ["("], words[start:] + [")", "-print"]
    if words[0] == ")":
      found, words = found[:-1], words[1:]
  while words:
    word = words.pop(0)
    if clock and words and word in NEWER["gnu"]:
      found += with_value("gnu", folder, clock, word, words.pop(0))
    else:
      found.append(word)
  return found


def main(system, folder, arguments):
  words = list(arguments)
  change = with_clock(folder, words) if system == "gnu" else translated(system, folder, words)
  command = [FIND, *change]
  os.execv(FIND, command)


if __name__ == "__main__":
  sys.exit(compare(*sys.argv[2:]))
