"""Packs the QEMU of Debian or Ubuntu in the shape of the archives that qvm downloads."""

import os
import platform
import tarfile
from pathlib import Path
from typing import NamedTuple

# The archives are named after the CPU as QEMU calls it, the images as the organisation does.
_CPUS = {"x86-64": "x86_64", "arm64": "aarch64"}

# QEMU looks for its modules in this folder, beside the one that its program lies in.
_MODULES = f"lib/{platform.machine()}-linux-gnu/qemu"
# Some builds have TCG for x86 as a module; for the other CPUs it is always built in.
_TCG = f"{_MODULES}/accel-tcg-x86_64.so"
_ROMS = "usr/lib/ipxe/qemu" if os.path.isdir("/usr/lib/ipxe/qemu") else "usr/share/qemu"
_ARM_FIRMWARE = "usr/share/qemu-efi-aarch64/QEMU_EFI.fd"

# What an archive holds, and which installed file that is.
_X86_64_FILES = {
  "bin/qemu": "usr/bin/qemu-system-x86_64",
  **({_TCG: f"usr/{_TCG}"} if os.path.isfile(f"/usr/{_TCG}") else {}),
  "share/qemu/bios-256k.bin": "usr/share/seabios/bios-256k.bin",
  "share/qemu/efi-e1000.rom": f"{_ROMS}/efi-e1000.rom",
  "share/qemu/efi-virtio.rom": f"{_ROMS}/efi-virtio.rom",
  "share/qemu/kvmvapic.bin": "usr/share/qemu/kvmvapic.bin",
  "share/qemu/uefi.fd": "usr/share/ovmf/OVMF.fd",
  "share/qemu/vgabios-stdvga.bin": "usr/share/seabios/vgabios-stdvga.bin",
}
_AARCH64_FILES = {
  "bin/qemu": "usr/bin/qemu-system-aarch64",
  "share/qemu/efi-virtio.rom": f"{_ROMS}/efi-virtio.rom",
  "share/qemu/uefi.fd": _ARM_FIRMWARE,
}
_LINARO_FILES = {"share/qemu/linaro_uefi.fd": _ARM_FIRMWARE}
_RESOURCES_FILES = {"qemu-img": "usr/bin/qemu-img"}

# Which package to install when a file whose path contains the word is missing. First match wins.
_PACKAGES = {
  "x86_64": "qemu-system-x86",
  "qemu-system-aarch64": "qemu-system-arm",
  "qemu-img": "qemu-utils",
  "QEMU_EFI": "qemu-efi-aarch64",
  "OVMF": "ovmf",
  "seabios": "seabios",
  "qemu/efi-": "ipxe-qemu",
  "kvmvapic": "qemu-system-data",
}

# 1 January 2026: with fixed owners and dates, the same QEMU always makes the same archive.
_TIME = 1767225600


class Qemu(NamedTuple):
  """The programs of the installed QEMU."""

  x86_64: Path
  aarch64: Path
  img: Path


def find_qemu() -> Qemu:
  """Return the installed QEMU, or raise RuntimeError that says what to install."""
  wanted = [*_X86_64_FILES.values(), *_AARCH64_FILES.values(), *_RESOURCES_FILES.values()]
  missing = [file for file in dict.fromkeys(wanted) if not os.path.isfile("/" + file)]
  if missing:
    names = ", ".join("/" + file for file in missing)
    packages = " ".join(sorted({_package_of(file) for file in missing}))
    raise RuntimeError(f"missing: {names}; install with: apt-get install {packages}")
  tables = (_X86_64_FILES["bin/qemu"], _AARCH64_FILES["bin/qemu"], _RESOURCES_FILES["qemu-img"])
  return Qemu(*(Path("/", file) for file in tables))


def pack_qemu(
  arch: str, path: "str | os.PathLike[str]", *, linaro: bool = False, prefix: str = "./"
) -> None:
  """Write the archive `qemu-system-<cpu>-linux.tar` to `path`.

  `arch` is `x86-64` or `arm64`, or `x86_64` or `aarch64` as in the archive's name. `linaro` adds
  `linaro_uefi.fd`, which only releases before v1.1.0 have. `prefix` is what every member's name
  begins with: `./`, or one folder and a slash.
  """
  files = {"x86_64": _X86_64_FILES, "aarch64": _AARCH64_FILES}[_CPUS.get(arch, arch)]
  if linaro:
    files = {**files, **_LINARO_FILES}
  _pack(files, path, prefix)


def pack_resources(path: "str | os.PathLike[str]") -> None:
  """Write the archive `resources-linux.tar`, with qemu-img at its root, to `path`."""
  _pack(_RESOURCES_FILES, path, "./")


def _package_of(file: str) -> str:
  """Return the package that holds an installed file."""
  return next(package for word, package in _PACKAGES.items() if word in file)


def _pack(files: "dict[str, str]", path: "str | os.PathLike[str]", prefix: str) -> None:
  """Write a tar of `files` to `path`, with the members that `tar -C DIR -c .` would write."""
  with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
    for name in sorted(_with_folders(files)):
      # tarfile itself adds the slash that ends a folder's name.
      member = tarfile.TarInfo(prefix + name if name else prefix.rstrip("/"))
      member.mtime = _TIME
      # Nobody who unpacks the archive need have the user that packed it.
      member.uid = member.gid = 1001
      member.uname = member.gname = "runner"
      if name in files:
        _add_file(archive, member, "/" + files[name])
      else:
        member.type = tarfile.DIRTYPE
        member.mode = 0o755
        archive.addfile(member)


def _with_folders(files: "dict[str, str]") -> "set[str]":
  """Return the names in `files` and those of all folders above them; the root is empty."""
  folders = {str(folder) for name in files for folder in Path(name).parents}
  return {"" if folder == "." else folder for folder in folders} | set(files)


def _add_file(archive: tarfile.TarFile, member: tarfile.TarInfo, source: str) -> None:
  """Add the contents of `source`, executable if that is."""
  with open(source, "rb") as file:
    member.size = os.fstat(file.fileno()).st_size
    member.mode = 0o755 if os.access(source, os.X_OK) else 0o644
    archive.addfile(member, file)
