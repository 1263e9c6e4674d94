"""Small stand-ins for tools of the BSDs: printf of FreeBSD, stat of all three.

main("printf", arguments), main("stat", folder of the guest, arguments) -> exit code

They load little: one --sync starts them several times.
"""

import os
import stat
import sys

KINDS = {stat.S_IFDIR: "Directory", stat.S_IFREG: "Regular File", stat.S_IFLNK: "Symbolic Link",
         stat.S_IFIFO: "Fifo File", stat.S_IFSOCK: "Socket"}  # fmt: skip


def printf(words):
  """What %b prints ends where its argument says \\0 (and up to three octal zeros)."""
  os.execv("/usr/bin/printf", ["printf", words[0], *map(until_zero, words[1:])])


def until_zero(word):
  """What comes before the first octal zero."""
  place = word.find("\\0")
  while place >= 0:
    digits = word[place + 2 : place + 5]
    octal = digits[: len(digits) - len(digits.lstrip("01234567"))]
    if not octal.strip("0"):
      return word[:place]
    place = word.find("\\0", place + 2)
  return word


def show(letter, found, path, text):
  """One field of stat -f: as text with S, as a number else."""
  times = {"a": found.st_atime_ns, "m": found.st_mtime_ns, "c": found.st_ctime_ns,
           "B": found.st_ctime_ns}  # fmt: skip
  if letter in times:
    seconds, rest = divmod(times[letter], 10**9)
    return f"{seconds}.{rest:09}" if "F" in text else str(seconds)
  kind = stat.S_IFMT(found.st_mode)
  return {
    "N": path, "z": str(found.st_size), "i": str(found.st_ino), "d": str(found.st_dev),
    "u": str(found.st_uid), "g": str(found.st_gid), "l": str(found.st_nlink),
    "b": str(found.st_blocks), "k": str(found.st_blksize), "f": "0", "n": "\n", "%": "%",
    "p": oct(found.st_mode if "L" not in text else found.st_mode & 0o777)[2:]
    if "S" not in text else stat.filemode(found.st_mode),
    "T": KINDS.get(kind, "???") if "H" in text else "/@|="[("DLFS".find(KINDS.get(kind, "R")[0]))]
    if KINDS.get(kind, "R")[0] in "DLFS" else "",
    "Y": ("" if "S" not in text else " -> ") + os.readlink(path) if kind == stat.S_IFLNK else "",
  }[letter]  # fmt: skip


def filled(form, found, path):
  """The pieces of a format; a field is %, flags and a width, how it is shown, a part, a letter."""
  text, *fields = form.split("%")
  yield text
  fields = iter(fields)
  for field in fields:
    if not field:  # %%
      yield "%" + next(fields, "")
      continue
    rest = field.lstrip("-+ #0123456789.")
    for letters in ("DOUXFS", "HML"):
      rest = rest[1:] if rest[0] in letters else rest
    yield show(rest[0], found, path, field[: len(field) - len(rest)]) + rest[1:]


def bsd_stat(words):
  """stat [-FLnq] [-f format] [-t format] file ..."""
  follow, newline, form, code = False, "\n", "%d %i %p %l %u %g 0 %z %a %m %c %B %k %b 0 %N", 0
  while words and words[0].startswith("-") and words[0] != "-":
    word = words.pop(0)
    if word == "--":
      break
    for at, letter in enumerate(word[1:], 1):
      if letter in "ft":
        value = word[at + 1 :] or words.pop(0)
        form = value if letter == "f" else form
        break
      if letter not in "FLnq":
        sys.stderr.write(f"stat: illegal option -- {letter}\n")
        return 1
      follow, newline = follow or letter == "L", "" if letter == "n" else newline
  for path in words:
    try:
      found = os.stat(path) if follow else os.lstat(path)
    except OSError as error:
      sys.stderr.write(f"stat: {path}: {error.strerror}\n")
      code = 1
      continue

    sys.stdout.buffer.write(os.fsencode("".join(filled(form, found, path)) + newline))
  return code


def main(name, *rest):
  """Run the tool; the exit code."""
  return printf(list(rest[0])) if name == "printf" else bsd_stat(list(rest[-1]))
