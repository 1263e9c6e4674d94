"""What the FAT file systems of the tests' disks have in common."""

import struct

SECTOR = 512
DIRECTORY = 0x10
ARCHIVE = 0x20


def round_up(number: int, step: int) -> int:
  """Return the smallest multiple of `step` that is not below `number`."""
  return -(-number // step) * step


def entry(name: str, attributes: int, cluster: int, size: int = 0) -> bytes:
  """Return a directory entry; `name` is an 8.3 name, `.` or `..`."""
  base, _, extension = (name, "", "") if name.startswith(".") else name.partition(".")
  packed = base.ljust(8).encode("ascii") + extension.ljust(3).encode("ascii")
  # The date is 1 January 1980: 0 would be no date at all.
  return struct.pack("<11sB10xHHHI", packed, attributes, 0, 0x0021, cluster, size)


def folder(cluster: int, parent: int) -> bytes:
  """Return the two entries that every folder but the root begins with."""
  return entry(".", DIRECTORY, cluster) + entry("..", DIRECTORY, parent)


def boot_sector(
  kind: str,
  label: str,
  *,
  sectors: int,
  cluster: int,
  fat_sectors: int,
  root_entries: int,
  heads: int,
  start: int = 0,
) -> bytes:
  """Return the first sector of a file system of `kind` FAT12 or FAT16.

  It has `sectors` and begins `start` sectors into the disk. `cluster` is in bytes.
  """
  few = sectors < 1 << 16 and not start
  numbers = struct.pack(
    "<HBHBHHBHHHII",
    SECTOR,
    cluster // SECTOR,
    1,  # reserved sectors
    2,  # copies of the FAT
    root_entries,
    sectors if few else 0,
    0xF8,  # a fixed disk
    fat_sectors,
    63,  # sectors of a track
    heads,
    start,
    0 if few else sectors,
  )
  names = struct.pack("<BBBI11s8s", 0x80, 0, 0x29, 0x716D, label.encode(), kind.ljust(8).encode())
  # It begins with a jump, as the specification wants, to an endless loop at 0x3E.
  sector = b"\xeb\x3c\x90" + b"qvmtests" + numbers + names + b"\xeb\xfe"
  return sector.ljust(510, b"\0") + b"\x55\xaa"
