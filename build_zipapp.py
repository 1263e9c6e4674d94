#!/usr/bin/env python3
"""Pack qvm.py as qvm.pyz, one executable file; two builds are the same to the byte.

usage: build_zipapp.py [OUTPUT]

An OUTPUT that ends in .1 is the manual page, made of the tables that --help shows.

The members have fixed dates, modes and order and are stored, not deflated: what zlib makes of
them differs between its versions, and Python starts a little sooner without it.
"""

import hashlib
import io
import os
import sys
import zipfile
from typing import TYPE_CHECKING, Mapping

if TYPE_CHECKING:
  import qvm

SHEBANG = b"#!/usr/bin/env python3\n"

# Python 2.7 and 3.5 must be able to parse this, to say what they lack. `import qvm` would compile
# it at each start, in most versions of zipimport even twice, which takes longer than all the rest.
MAIN = """\
import sys

if sys.version_info < (3, 6):
  sys.exit("qvm: needs Python 3.6 or newer, and this is %d.%d" % sys.version_info[:2])

import marshal
import os
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of what is still being loaded

SOURCE = "@DIGEST@"


def code_path():
  # Where qvm.py keeps the compiled code: in its cache, below a name that no other code has.
  cache = os.environ.get("QVM_CACHE_DIR")
  if not cache:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = os.path.join(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "qvm")
  python = (sys.implementation.name, sys.hexversion, sys.flags.optimize, SOURCE)
  return os.path.join(os.path.abspath(cache), "code", "%s-%x-%d-%s" % python)


def opened(name, flags, above, owners):
  # The descriptor of what is in a folder, if nobody but these owners can have changed it.
  fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=above)
  stat = os.fstat(fd)
  if stat.st_uid in owners and not stat.st_mode & 0o022:
    return fd
  os.close(fd)
  raise OSError(name)


def kept_code(path):
  # The code that an earlier start has kept, if nobody else can have written it: marshal executes
  # what it is given. Only the cache itself may be a link; each step starts from the folder before.
  folder, name = os.path.split(path)
  cache, code = os.path.split(folder)
  fds = []
  try:
    owners = (0, os.getuid())
    fds.append(opened(cache, os.O_DIRECTORY, None, owners))
    fds.append(opened(code, os.O_DIRECTORY | os.O_NOFOLLOW, fds[0], owners))
    fds.append(opened(name, os.O_NOFOLLOW | os.O_NONBLOCK, fds[1], owners[1:]))
    with open(fds.pop(), "rb") as file:
      return marshal.loads(file.read())  # load() reads in many small pieces, seven times slower
  except (OSError, EOFError, ValueError, TypeError):
    return None
  finally:
    for fd in fds:
      os.close(fd)


def main():
  path = code_path()
  code = kept_code(path)
  if not code:
    name = os.path.join(os.path.dirname(__file__), "qvm.py")
    code = compile(__loader__.get_data(name), name, "exec", dont_inherit=True)
  module = type(sys)("qvm")
  module.__file__ = code.co_filename
  sys.modules["qvm"] = module
  exec(code, module.__dict__)
  module.packed_code = (path, code)
  module.main()


main()
"""


def build(source: str) -> bytes:
  """The bytes of the zipapp made of the file source."""
  with open(source, "rb") as file:
    program = file.read()
  main = MAIN.replace("@DIGEST@", hashlib.sha256(program).hexdigest()[:16])
  members = [("__main__.py", main.encode()), ("qvm.py", program)]
  packed = io.BytesIO()
  packed.write(SHEBANG)
  with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
    for name, content in members:
      info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
      info.create_system = 3  # Unix, also when this runs elsewhere
      info.external_attr = 0o100644 << 16
      archive.writestr(info, content)
  return packed.getvalue()


def roff(text: str) -> str:
  """Text as man(7) wants it: no line is taken for a request, no hyphen for a dash."""
  escaped = text.replace("\\", "\\e").replace("-", "\\-")
  return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in escaped.split("\n"))


def option_entry(option: "qvm.Option", own_help: Mapping[str, str]) -> str:
  """The manual page's entry for an option."""
  flags = ", ".join(f"\\fB{roff(flag)}\\fR" for flag in option.flags)
  metavar = f" \\fI{roff(option.metavar)}\\fR" if option.metavar else ""
  return f".TP\n{flags}{metavar}\n{roff(own_help.get(option.field, option.help))}\n"


def manual() -> str:
  """The manual page, in roff."""
  import qvm  # the zipapp is made without running what it holds

  page = f'.TH QVM 1 "" "qvm {qvm.__version__}" "User Commands"\n'
  page += ".SH NAME\nqvm \\- run BSDs, Haiku and OmniOS in QEMU\n"
  page += ".SH SYNOPSIS\n.B qvm\n\\fICOMMAND\\fR [\\fIOPTIONS\\fR] ...\n.SH DESCRIPTION\n"
  page += (
    "qvm downloads QEMU, qemu-img and a pre-built image into one cache folder, creates a qcow2\n"
  )
  page += (
    "overlay on top of the image, which it never changes, and boots the overlay.\n.SH COMMANDS\n"
  )
  for name, form in qvm.COMMANDS.items():
    page += f".SS {roff(f'qvm {name} [OPTIONS] {form.operands}'.strip())}\n"
    page += "\n".join(roff(line) if line else ".PP" for line in qvm.about(name)) + "\n"
    for option in qvm.known_options(name):
      if option.field not in qvm.EVERYWHERE:
        page += option_entry(option, form.option_help)
    page += ".PP\nExamples:\n.PP\n.nf\n.RS\n" + roff("\n".join(form.examples)) + "\n.RE\n.fi\n"
  page += ".SH ENVIRONMENT\n"
  for names, text in qvm.ENVIRONMENT:
    page += f".TP\n\\fB{roff(names)}\\fR\n{roff(text)}\n"
  return page


def main() -> None:
  """Write the zipapp or the manual page, whole or not at all."""
  here = os.path.dirname(os.path.abspath(__file__))
  output = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "qvm.pyz")
  page = output.endswith(".1")
  packed = manual().encode() if page else build(os.path.join(here, "qvm.py"))
  with open(output + ".tmp", "wb") as file:
    file.write(packed)
  os.chmod(output + ".tmp", 0o644 if page else 0o755)
  os.replace(output + ".tmp", output)


if __name__ == "__main__":
  main()
