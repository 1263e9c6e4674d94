#!/usr/bin/env python3
"""Pack qvm.py as qvm.pyz, one executable file; two builds are the same to the byte.

usage: build_zipapp.py [OUTPUT]

The members have fixed dates, modes and order and are stored, not deflated: what zlib makes of
them differs between its versions, and Python starts a little sooner without it.
"""

import io
import os
import sys
import zipfile

SHEBANG = b"#!/usr/bin/env python3\n"

# Python 2.7 and 3.5 must be able to parse this, to say what they lack.
MAIN = """\
import sys

if sys.version_info < (3, 6):
  sys.exit("qvm: needs Python 3.6 or newer, and this is %d.%d" % sys.version_info[:2])

import qvm

sys.exit(qvm.main())
"""


def build(source: str) -> bytes:
  """The bytes of the zipapp made of the file source."""
  with open(source, "rb") as file:
    members = [("__main__.py", MAIN.encode()), ("qvm.py", file.read())]
  packed = io.BytesIO()
  packed.write(SHEBANG)
  with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
    for name, content in members:
      info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
      info.create_system = 3  # Unix, also when this runs elsewhere
      info.external_attr = 0o100644 << 16
      archive.writestr(info, content)
  return packed.getvalue()


def main() -> None:
  """Write the zipapp, whole or not at all."""
  here = os.path.dirname(os.path.abspath(__file__))
  output = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "qvm.pyz")
  packed = build(os.path.join(here, "qvm.py"))
  with open(output + ".tmp", "wb") as file:
    file.write(packed)
  os.chmod(output + ".tmp", 0o755)
  os.replace(output + ".tmp", output)


if __name__ == "__main__":
  main()
