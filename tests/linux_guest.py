"""Makes bootable disks with a small Linux guest that behaves like the images that qvm downloads.

GRUB starts a Debian kernel with an initramfs that holds busybox and dropbear; everything comes
from the folder that `linux_packages` fills. The guest answers ssh on port 22 for the users `runner`
and `user`, has a root shell on its serial port, and keeps what is written to /mnt.

  python3 linux_guest.py PACKAGES ARCH FIRMWARE LOGIN OUT.qcow2
"""

import glob
import lzma
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile

import fat
from fat import SECTOR, round_up

# The partition begins where every tool puts it; below lie the MBR and GRUB.
_PARTITION = 2048
_PARTITION_SECTORS = 508 * 2048

LOGINS = ("open", "key", "key-mbr")

# Debian's kernels for x86-64, by how their names end: the one for clouds is packed with lz4, of
# which an emulated guest unpacks in half a second what takes it three with xz.
_KERNELS = {"cloud": "-cloud-*", "e1000": "[0-9]-amd64"}

# For each CPU: the folder that holds its packages, the serial console, and kernel parameters that
# make it start faster in an emulator.
_ARCHES = {
  "x86-64": ("amd64", "ttyS0", "tsc=reliable no_timer_check"),
  "arm64": ("arm64", "ttyAMA0", ""),
}

# For each CPU and firmware: GRUB's platform, its modules, and where the firmware looks for it.
_GRUBS = {
  ("x86-64", "bios"): ("i386-pc", "biosdisk part_msdos fat linux", ""),
  ("x86-64", "efi"): ("x86_64-efi", "part_msdos fat linux", "EFI/BOOT/BOOTX64.EFI"),
  ("arm64", "efi"): ("arm64-efi", "part_msdos fat linux", "EFI/BOOT/BOOTAA64.EFI"),
}

_PARAMETERS = (
  "quiet mitigations=off nokaslr audit=0 apparmor=0 selinux=0 nowatchdog random.trust_cpu=on"
)

# The modules that the guest loads for each device that it finds, each after those it needs. Not
# every kernel has all of them: some are built in, and the kernel for arm64 has no e1000.
_MODULES = {
  "modules": ("virtio_pci", "vfat", "nls_cp437", "nls_ascii", "nls_iso8859-1"),
  "blk": ("virtio_blk",),
  "scsi": ("virtio_scsi", "sd_mod"),
  "net": ("virtio_net", "af_packet"),
  "e1000": ("e1000", "af_packet"),
  "rng": ("virtio_rng",),
}


def disk(
  packages: str, arch: str, firmware: str, login: str, path: str, kernel: str = "cloud"
) -> None:
  """Write a compressed qcow2 image of the guest to `path`.

  `arch` is `x86-64` or `arm64`, `firmware` is `bios` or `efi`. `login` says who may log in:
  `open` anyone, with an empty password; `key` the keys in the file KEYS of the FAT file system on
  the second drive; `key-mbr` the same, on the first partition of that drive. `kernel` is `cloud`,
  or `e1000` for x86-64 without a virtio network.
  """
  if (arch, firmware) not in _GRUBS or login not in LOGINS:
    raise ValueError(f"no guest for {arch}, {firmware}, {login}")
  folder, console, parameters = _ARCHES[arch]
  root = os.path.join(packages, folder)
  image = _one(os.path.join(root, f"boot/vmlinuz-*{_KERNELS[kernel]}"))
  modules = os.path.join(root, "**/lib/modules", os.path.basename(image)[len("vmlinuz-") :])
  files = {"VMLINUZ": _kernel(image, firmware), "INITRD": _initramfs(root, login, modules)}
  grub = _grub(packages, arch, firmware, f"console={console} {_PARAMETERS} {parameters}")
  program = _GRUBS[arch, firmware][2]
  if program:
    files[program] = grub
    start = _mbr(b"")
  else:
    start = _mbr(_read(os.path.join(root, "usr/lib/grub/i386-pc/boot.img"))) + grub
  if len(start) > _PARTITION * SECTOR:
    raise ValueError("GRUB does not fit before the partition")
  _write(start.ljust(_PARTITION * SECTOR, b"\0") + _fat(files), path)


def _write(start: bytes, path: str) -> None:
  """Write a disk that begins with `start` to `path`."""
  with tempfile.TemporaryDirectory() as folder:
    raw = os.path.join(folder, "disk.raw")
    with open(raw, "wb") as file:
      file.write(start)
      file.truncate((_PARTITION + _PARTITION_SECTORS) * SECTOR)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, os.fspath(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _read(path: str) -> bytes:
  """Return the contents of a file."""
  with open(path, "rb") as file:
    return file.read()


def _one(pattern: str) -> str:
  """Return the only file that matches `pattern`."""
  found = glob.glob(pattern)
  if len(found) != 1:
    raise FileNotFoundError(f"{pattern}: {len(found)} files; run linux_packages")
  return found[0]


# --- GRUB and the kernel -------------------------------------------------------------------------


def _kernel(path: str, firmware: str) -> bytes:
  """Return the kernel; a BIOS's GRUB need not move it.

  GRUB loads it at 1 MB and moves it, byte by byte and with all the room that it wants to unpack
  itself, to the address that it prefers: 2 of the 7 s until an emulated guest is up.
  """
  kernel = bytearray(_read(path))
  if firmware == "bios":
    struct.pack_into("<Q", kernel, 0x258, 1 << 20)  # pref_address in Linux's x86/boot.rst
  return bytes(kernel)


def _grub(packages: str, arch: str, firmware: str, parameters: str) -> bytes:
  """Return GRUB with a built-in configuration that starts the kernel without waiting."""
  platform, modules, _ = _GRUBS[arch, firmware]
  # GRUB takes the drive it was loaded from; the firmware also tells the partition, a BIOS does not.
  prefix = "(,msdos1)/" if firmware == "bios" else "/"
  modules_folder = os.path.join(packages, _ARCHES[arch][0], "usr/lib/grub", platform)
  with tempfile.TemporaryDirectory() as folder:
    config = os.path.join(folder, "grub.cfg")
    image = os.path.join(folder, "grub.img")
    with open(config, "w", encoding="ascii") as file:
      file.write(f"linux /VMLINUZ {parameters}\ninitrd /INITRD\nboot\n")
    command = [*_grub_mkimage(packages), "-d", modules_folder, "-O", platform, "-p", prefix]
    command += ["-c", config, "-o", image, *modules.split()]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return _read(image)


def _grub_mkimage(packages: str) -> "list[str]":
  """Return the command that runs the unpacked grub-mkimage with its own libraries."""
  root = os.path.abspath(os.path.join(packages, "program"))
  loader = _one(os.path.join(root, "lib/*-linux-gnu*/ld-linux-*.so.?"))
  libraries = [os.path.dirname(loader), *glob.glob(os.path.join(root, "usr/lib/*-linux-gnu*"))]
  program = os.path.join(root, "usr/bin/grub-mkimage")
  return [loader, "--library-path", ":".join(libraries), program]


def _mbr(code: bytes) -> bytes:
  """Return an MBR with `code` and one FAT partition, which may be booted."""
  # Type 0xEF is an EFI system partition; no BIOS and no Linux minds it.
  entry = struct.pack(
    "<B3sB3sII", 0x80, b"\xfe" * 3, 0xEF, b"\xfe" * 3, _PARTITION, _PARTITION_SECTORS
  )
  return (
    code[:440].ljust(440, b"\0")
    + struct.pack("<IH", 0x716D, 0)
    + entry.ljust(64, b"\0")
    + (b"\x55\xaa")
  )


# --- The FAT16 file system -----------------------------------------------------------------------

# With 32 KB, GRUB takes longer to read the kernel through the BIOS.
_CLUSTER = 8192
_ROOT_ENTRIES = 512


class _Clusters:
  """The data area of a FAT file system that is filled from its beginning."""

  def __init__(self) -> None:
    """Begin with the two entries that stand for no cluster."""
    self.fat = [0xFFF8, 0xFFFF]
    self.data = []  # type: list[bytes]

  def add(self, data: bytes) -> int:
    """Store `data` and return its first cluster."""
    first = len(self.fat)
    count = -(-len(data) // _CLUSTER)
    self.fat += [*range(first + 1, first + count), 0xFFFF]
    self.data.append(data.ljust(count * _CLUSTER, b"\0"))
    return first


def _fat(files: "dict[str, bytes]") -> bytes:
  """Return the beginning, up to its last used cluster, of a file system with these files."""
  fat_sectors = -(-(_PARTITION_SECTORS * SECTOR // _CLUSTER + 2) * 2 // SECTOR)
  clusters = _Clusters()
  root = _fat_folder(clusters, files, "")
  table = struct.pack(f"<{len(clusters.fat)}H", *clusters.fat).ljust(fat_sectors * SECTOR, b"\0")
  root = root.ljust(_ROOT_ENTRIES * 32, b"\0")
  first = fat.boot_sector(
    "FAT16",
    "QVM GUEST  ",
    sectors=_PARTITION_SECTORS,
    cluster=_CLUSTER,
    fat_sectors=fat_sectors,
    root_entries=_ROOT_ENTRIES,
    heads=255,
    start=_PARTITION,
  )
  return first + table + table + root + b"".join(clusters.data)


def _fat_folder(clusters: _Clusters, files: "dict[str, bytes]", prefix: str) -> bytes:
  """Return the entries of the folder `prefix`, which holds no more than one cluster of them."""
  entries = b""
  names = {path[len(prefix) :].split("/")[0] for path in files if path.startswith(prefix)}
  for name in sorted(names):
    if prefix + name in files:
      data = files[prefix + name]
      entries += fat.entry(name, fat.ARCHIVE, clusters.add(data), len(data))
    else:
      inner = _fat_folder(clusters, files, f"{prefix}{name}/")
      entries += fat.entry(name, fat.DIRECTORY, _add_folder(clusters, inner))
  return entries


def _add_folder(clusters: _Clusters, entries: bytes) -> int:
  """Store a folder and return its cluster."""
  # Nothing that reads these disks follows "..", so it leads to the root folder everywhere.
  own = len(clusters.fat)
  return clusters.add(fat.folder(own, 0) + entries)


# --- The initramfs -------------------------------------------------------------------------------


def _initramfs(root: str, login: str, modules: str) -> bytes:
  """Return the guest's root file system as a cpio archive."""
  archive = _Cpio()
  for folder in ("", "dev", "proc", "sys", "tmp", "mnt", "run", "var", "var/log", "usr", "bin"):
    archive.add(folder or ".", stat.S_IFDIR | 0o755)
  for folder in ("root", "home", "home/runner", "home/user"):
    archive.add(folder, stat.S_IFDIR | 0o755)
  for folder in ("etc", "etc/dropbear", "sbin", "usr/bin", "usr/sbin", "lib"):
    archive.add(folder, stat.S_IFDIR | 0o755)
  archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
  archive.add("bin/busybox", stat.S_IFREG | 0o755, _read(os.path.join(root, "bin/busybox")))
  archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
  archive.add("bin/printf", stat.S_IFLNK | 0o777, b"busybox")  # which find runs: POSIX has it
  _add_dropbear(archive, root)
  _add_settings(archive, login, _add_modules(archive, modules))
  return archive.bytes()


class _Cpio:
  """A cpio archive in the only format that the kernel reads."""

  def __init__(self) -> None:
    """Begin with nothing."""
    self._parts = []  # type: list[bytes]
    self._inode = 0

  def add(
    self, name: str, mode: int, data: bytes = b"", device: "tuple[int, int]" = (0, 0)
  ) -> None:
    """Add a file, folder, link or device that belongs to root."""
    self._inode += 1
    raw_name = name.encode("ascii") + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    numbers = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(raw_name), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers) + raw_name
    self._parts += [
      header.ljust(round_up(len(header), 4), b"\0"),
      data.ljust(round_up(len(data), 4), b"\0"),
    ]

  def bytes(self) -> bytes:
    """Return the archive."""
    self.add("TRAILER!!!", 0)
    return b"".join(self._parts)


def _add_dropbear(archive: _Cpio, root: str) -> None:
  """Add the ssh server with the libraries that it needs."""
  libraries = {}  # type: dict[str, str]
  for program in ("usr/sbin/dropbear", "usr/bin/dropbearkey"):
    path = os.path.join(root, program)
    archive.add(program, stat.S_IFREG | 0o755, _read(path))
    _find_libraries(root, path, libraries)
  loader = _one(os.path.join(root, "lib/*-linux-gnu*/ld-linux-*.so.?"))
  libraries[os.path.basename(loader)] = loader
  for name, path in libraries.items():
    archive.add("lib/" + name, stat.S_IFREG | 0o755, _read(path))
  # The x86-64 loader is looked for in this folder.
  archive.add("lib64", stat.S_IFLNK | 0o777, b"lib")


def _find_libraries(root: str, path: str, found: "dict[str, str]") -> None:
  """Add to `found` the libraries that the program or library `path` needs, and theirs."""
  for name in sorted(set(re.findall(rb"\0(lib[\w.+-]+\.so[.\d]*)(?=\0)", _read(path)))):
    library = name.decode("ascii")
    places = glob.glob(os.path.join(root, f"lib/*-linux-gnu*/{library}"))
    places += glob.glob(os.path.join(root, f"usr/lib/*-linux-gnu*/{library}"))
    if places and library not in found:
      found[library] = os.path.realpath(places[0])
      _find_libraries(root, places[0], found)


def _add_modules(archive: _Cpio, folder: str) -> "dict[str, list[str]]":
  """Add the kernel modules; return their names for each device, ordered for loading."""
  found = {}
  for path in glob.glob(os.path.join(folder, "**/*.ko*"), recursive=True):
    found[_module_name(path)] = path
  archive.add("lib/modules", stat.S_IFDIR | 0o755)
  contents = {}  # type: dict[str, bytes]
  groups = {}
  for group, modules in _MODULES.items():
    order = {}  # type: dict[str, bytes]
    for module in modules:
      _find_modules(found, module.replace("-", "_"), order)
    groups[group] = list(order)
    contents.update(order)
  for name, data in contents.items():
    archive.add(f"lib/modules/{name}.ko", stat.S_IFREG | 0o644, data)
  return groups


def _module_name(path: str) -> str:
  """Return the name by which other modules call the module in this file."""
  return os.path.basename(path).split(".")[0].replace("-", "_")


def _find_modules(found: "dict[str, str]", name: str, order: "dict[str, bytes]") -> None:
  """Add to `order` the modules that `name` needs, then itself; a built-in one has no file."""
  if name in order or name not in found:
    return
  data = _unpacked(found[name])
  needs = re.search(rb"\0depends=([^\0]*)\0", data)
  for need in needs.group(1).decode("ascii").split(",") if needs else ():
    _find_modules(found, need.replace("-", "_"), order)
  order[name] = data


# A signed module ends with this. Without, it is loaded just as well, and sooner.
_SIGNED = b"~Module signature appended~\n"


def _unpacked(path: str) -> bytes:
  """Return the contents of a module that may be compressed, without its signature."""
  data = _read(path)
  if path.endswith(".xz"):
    data = lzma.decompress(data)
  if data.endswith(_SIGNED):
    # What follows the module is the signature, then 12 bytes that end with its length.
    end = len(data) - len(_SIGNED)
    data = data[: end - 12 - int.from_bytes(data[end - 4 : end], "big")]
  return data


def _add_settings(archive: _Cpio, login: str, modules: "dict[str, list[str]]") -> None:
  """Add what makes this guest of the programs: the scripts and the users."""
  password = "" if login == "open" else "*"
  keys = {"open": "", "key": "?", "key-mbr": "?1"}[login]
  users = ("root", "/root"), ("runner", "/home/runner"), ("user", "/home/user")
  passwd = "".join(f"{user}:{password}:0:0:{user}:{home}:/bin/sh\n" for user, home in users)
  settings = f"login='{login}'\nkeys='{keys}'\n"
  settings += "".join(f"{group}='{' '.join(names)}'\n" for group, names in modules.items())
  for name, mode, text in (
    ("init", 0o755, _INIT),
    ("usr/sbin/shutdown", 0o755, _SHUTDOWN),
    ("usr/bin/sudo", 0o755, _SUDO),
    ("usr/bin/pkg", 0o755, _PKG),
    ("etc/settings", 0o644, settings),
    ("etc/passwd", 0o644, passwd),
    ("etc/group", 0o644, "root:x:0:\n"),
    ("etc/shells", 0o644, "/bin/sh\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost guest\n"),
    ("etc/resolv.conf", 0o644, "nameserver 10.0.2.3\n"),
  ):
    archive.add(name, stat.S_IFREG | mode, text.encode("ascii"))


_INIT = r"""#!/bin/sh
# busybox finds its own programs through /proc/self/exe: links are needed only by other programs.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=vt100
. /etc/settings
busybox mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts -o mode=620,ptmxmode=666 pts /dev/pts
mount -t tmpfs tmp /tmp
hostname guest

load_modules() { # those of the devices that are there
  devices=$(cat /sys/bus/pci/devices/*/device)
  for device in $devices; do
    case $device in
      0x1001 | 0x1042) modules="$modules $blk" ;;
      0x1004 | 0x1048) modules="$modules $scsi" ;;
      0x1000 | 0x1041) modules="$net $modules" ;;
      0x1005 | 0x1044) modules="$modules $rng" ;;
      0x100e) modules="$e1000 $modules" ;;
    esac
  done
  for module in $modules; do
    [ -d /sys/module/$module ] || insmod /lib/modules/$module.ko
  done
}

network() { # e1000 has a link half a second after its module, or else two after it is set up
  case $modules in
    *e1000*) sleep 0.3 ;;
  esac
  ip link set lo up
  ip address add 10.0.2.15/24 dev eth0
  ip link set eth0 up
  ip route add default via 10.0.2.2
  tenths=50
  until read -r carrier </sys/class/net/eth0/carrier && [ "$carrier" = 1 ]; do
    [ $tenths -gt 0 ] || return
    tenths=$((tenths - 1))
    sleep 0.1
  done
  # QEMU forwards nothing to a guest whose Ethernet address it has not seen.
  ping -c 1 -W 1 10.0.2.2 >/dev/null
}

host_key() { # made in the first boot, as by the real images
  if ! cp /mnt/hostkey /etc/dropbear/key 2>/dev/null; then
    dropbearkey -t ed25519 -f /etc/dropbear/key >/dev/null 2>&1
    cp /etc/dropbear/key /mnt/new && sync && mv /mnt/new /mnt/hostkey && sync
  fi
}

wait_for() { # wait_for GLOB SECONDS: until a device is there
  tenths=$(($2 * 10))
  while :; do
    for device in $1; do
      [ ! -b "$device" ] || return 0
    done
    [ $tenths -gt 0 ] || return 1
    tenths=$((tenths - 1))
    sleep 0.1
  done
}

mount_disk() { # the drive that holds the kernel, which may be named second
  wait_for '/dev/[sv]d[ab]1' 20
  for device in /dev/[sv]d[ab]1; do
    mount -t vfat -o rw "$device" /mnt 2>/dev/null || continue
    [ ! -f /mnt/vmlinuz ] || return 0
    umount /mnt
  done
  echo 'linux guest: no disk' >/dev/console
}

read_keys() { # from the other drive
  case $device in
    *a1) other=b ;;
    *) other=a ;;
  esac
  keys="/dev/[sv]d$other${keys#?}"
  wait_for "$keys" 5 && mkdir -p /tmp/keys && mount -t vfat -o ro $device /tmp/keys || return
  for home in /root /home/runner /home/user; do
    mkdir -p -m 700 "$home/.ssh"
    cat /tmp/keys/keys >>"$home/.ssh/authorized_keys"
    chmod 600 "$home/.ssh/authorized_keys"
  done
  umount /tmp/keys
}

load_modules
mount_disk
host_key
[ -z "$keys" ] || read_keys
[ ! -d /mnt/packages ] || cp /mnt/packages/* /usr/bin/
network
if [ "$login" = open ]; then
  dropbear -B -r /etc/dropbear/key
else
  dropbear -s -r /etc/dropbear/key
fi
busybox --install -s
read -r console </sys/class/tty/console/active
echo 'linux guest ready' >/dev/console
# A shell started by this one in the background would ignore Ctrl-C. The second line is what
# `poweroff` and `reboot` of busybox ask for.
cat >/etc/inittab <<END
$console::respawn:/bin/sh -i
::shutdown:/usr/sbin/shutdown now
END
export PS1='guest# '
exec busybox init
"""

# Root it is already; date(1) of the BSDs takes the year in front of the month.
_SUDO = """#!/bin/sh
case "$1 $2 $3" in
  'date -u 20'*) exec date -u -s "$3" ;;
  'sh -c cat >/dev/random') exec tee /tmp/seed >/dev/random ;;
esac
exec "$@"
"""

# As FreeBSD's, for packages that are a program of that name, which says so. Those whose names begin
# with `no-` are not to be had. What is installed is there again after the next boot.
_PKG = r"""#!/bin/sh
[ "$ASSUME_ALWAYS_YES $1 $2" = 'yes install -y' ] || exit 64
shift 2
mkdir -p /mnt/packages
for name; do
  case $name in
    no-*) echo "pkg: No packages available to install matching '$name'" >&2; exit 70 ;;
  esac
  printf '#!/bin/sh\necho "this is %s"\n' "$name" >"/mnt/packages/$name" || exit 1
  cp "/mnt/packages/$name" /usr/bin/ && chmod 755 "/usr/bin/$name"
  echo "installed $name"
done
"""

# The answer reaches whoever asked through ssh before the machine is gone.
_SHUTDOWN = r"""#!/bin/sh
(
  sleep 0.3
  echo 'linux guest powers off' >/dev/console
  sync
  umount /mnt || mount -o remount,ro /mnt
  case "$*" in *-r*) reboot -f ;; *) poweroff -f ;; esac
) </dev/null >/dev/null 2>&1 &
[ $PPID != 1 ] || wait
"""


if __name__ == "__main__":
  if len(sys.argv) != 6:
    sys.exit(__doc__)
  disk(*sys.argv[1:])
