"""Tiny guests made from literal bytes: each prints on the serial console and powers off.

The machine code is a table of (bytes, instruction), so that no assembler is needed to make the
guests, and a disassembler (`objdump -D -b binary -m i8086`) is enough to check them.
"""

import os
import struct
import subprocess
import tempfile

import fat
from fat import SECTOR, round_up

DISK_SIZE = 4 << 20

# The guests whose command line in the tables starts UEFI; the others start SeaBIOS.
EFI_GUESTS = (
  ("openbsd", "x86-64"),
  ("freebsd", "arm64"),
  ("openbsd", "arm64"),
  ("netbsd", "arm64"),
)
BIOS_GUESTS = (
  ("freebsd", "x86-64"),
  ("netbsd", "x86-64"),
  ("haiku", "x86-64"),
  ("omnios", "x86-64"),
  ("dragonflybsd", "x86-64"),
  ("midnightbsd", "x86-64"),
)


def guest_for(os_name: str, arch: str, message: str) -> bytes:
  """Return a disk that prints `message` and powers off when started by that guest's table."""
  if (os_name, arch) in EFI_GUESTS:
    return efi_disk(arch, message)
  if (os_name, arch) in BIOS_GUESTS:
    return boot_sector(message)
  raise ValueError(f"no table for {os_name} on {arch}")


def to_qcow2(raw_bytes: bytes, path: "str | os.PathLike[str]") -> None:
  """Write `raw_bytes` to `path` as a compressed qcow2 image, the way the builders publish it."""
  with tempfile.TemporaryDirectory() as folder:
    raw = os.path.join(folder, "disk.raw")
    with open(raw, "wb") as file:
      file.write(raw_bytes)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, os.fspath(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _code(*instructions: "tuple[str, str]") -> bytes:
  """Join a table of (hexadecimal bytes, what they mean)."""
  return b"".join(bytes.fromhex(octets) for octets, _ in instructions)


# --- Boot sectors: 16-bit code that the BIOS loads to 0x7C00, with the boot drive in DL ----------
#
# The pieces lie at fixed addresses, and code calls them through BP, so that no table depends on
# the length of another one.

_ORIGIN = 0x7C00
_PUT = 0x7C80
_PUTS = 0x7C90
_POWER_OFF = 0x7CA0
_PACKET = 0x7CC0
_TEXT = 0x7D00
# The disk signature and the partition table of an MBR begin here; both stay empty.
_CODE_END = 0x7DB8

# Interrupts stay off: SeaBIOS' timer reads COM1 and writes there, between our own bytes.
_START = _code(
  ("fa", "cli"),
  ("fc", "cld"),
  ("31 c0", "xor ax, ax"),
  ("8e d8", "mov ds, ax"),
  ("8e d0", "mov ss, ax"),
  ("bc 00 7c", "mov sp, 0x7c00"),
)

# Sends AL to COM1; changes AX and DX.
_PUT_CODE = _code(
  ("88 c4", "mov ah, al"),
  ("ba fd 03", "mov dx, 0x3fd"),
  ("ec", "wait: in al, dx"),
  ("a8 20", "test al, 0x20       ; may the next byte be written?"),
  ("74 fb", "jz wait"),
  ("88 e0", "mov al, ah"),
  ("b2 f8", "mov dl, 0xf8"),
  ("ee", "out dx, al"),
  ("c3", "ret"),
)

# Sends the bytes at SI up to a NUL; changes AX, DX, SI and BP.
_PUTS_CODE = _code(
  ("ac", "next: lodsb"),
  ("84 c0", "test al, al"),
  ("74 07", "jz end"),
  ("bd 80 7c", "mov bp, put"),
  ("ff d5", "call bp"),
  ("eb f4", "jmp next"),
  ("c3", "end: ret"),
)

# Waits until the last byte has left, then enters S5 through the ACPI port where SeaBIOS puts it.
_POWER_OFF_CODE = _code(
  ("ba fd 03", "mov dx, 0x3fd"),
  ("ec", "wait: in al, dx"),
  ("a8 40", "test al, 0x40       ; is nothing left to send?"),
  ("74 fb", "jz wait"),
  ("ba 04 06", "mov dx, 0x604"),
  ("b8 00 20", "mov ax, 0x2000"),
  ("ef", "out dx, ax"),
  ("f4", "halt: hlt"),
  ("eb fd", "jmp halt"),
)

_PRINT_TEXT = _code(
  ("be 00 7d", "mov si, text"),
  ("bd 90 7c", "mov bp, puts"),
  ("ff d5", "call bp"),
)

_THEN_POWER_OFF = _code(
  ("bd a0 7c", "mov bp, power_off"),
  ("ff e5", "jmp bp"),
)

_THEN_HANG = _code(
  ("f4", "halt: hlt"),
  ("eb fd", "jmp halt"),
)

_THEN_ECHO = _code(
  ("bd 80 7c", "mov bp, put"),
  ("ba fd 03", "loop: mov dx, 0x3fd"),
  ("ec", "wait: in al, dx"),
  ("a8 01", "test al, 0x01       ; has a byte arrived?"),
  ("74 fb", "jz wait"),
  ("b2 f8", "mov dl, 0xf8"),
  ("ec", "in al, dx"),
  ("3c 71", "cmp al, 'q'"),
  ("74 23", "je quit"),
  ("88 c1", "mov cl, al"),
  ("b0 3c", "mov al, '<'"),
  ("ff d5", "call bp"),
  ("88 c8", "mov al, cl"),
  ("c0 e8 04", "shr al, 4"),
  ("3c 0a", "cmp al, 10          ; these three make a digit of 0 to 15"),
  ("1c 69", "sbb al, 0x69"),
  ("2f", "das"),
  ("ff d5", "call bp"),
  ("88 c8", "mov al, cl"),
  ("24 0f", "and al, 0x0f"),
  ("3c 0a", "cmp al, 10"),
  ("1c 69", "sbb al, 0x69"),
  ("2f", "das"),
  ("ff d5", "call bp"),
  ("b0 3e", "mov al, '>'"),
  ("ff d5", "call bp"),
  ("eb ce", "jmp loop"),
  ("bd a0 7c", "quit: mov bp, power_off"),
  ("ff e5", "jmp bp"),
)

# The new count is on the disk before the old one is printed: who sees the line may kill QEMU.
_COUNT = _code(
  ("be c0 7c", "mov si, packet"),
  ("b4 42", "mov ah, 0x42        ; read"),
  ("cd 13", "int 0x13"),
  ("72 3a", "jc failed"),
  ("a0 00 7e", "mov al, [0x7e00]"),
  ("50", "push ax"),
  ("fe 06 00 7e", "inc byte [0x7e00]"),
  ("b8 00 43", "mov ax, 0x4300      ; write"),
  ("be c0 7c", "mov si, packet"),
  ("cd 13", "int 0x13"),
  ("72 28", "jc failed"),
  ("be 00 7d", "mov si, text"),
  ("bd 90 7c", "mov bp, puts"),
  ("ff d5", "call bp"),
  ("58", "pop ax"),
  ("d4 0a", "aam                 ; AH = AL / 10, AL = AL % 10"),
  ("05 30 30", "add ax, '00'"),
  ("88 c1", "mov cl, al"),
  ("88 e0", "mov al, ah"),
  ("bd 80 7c", "mov bp, put"),
  ("ff d5", "call bp"),
  ("88 c8", "mov al, cl"),
  ("ff d5", "call bp"),
  ("be 10 7d", "mov si, text + 0x10 ; the line's end"),
  ("bd 90 7c", "last: mov bp, puts"),
  ("ff d5", "call bp"),
  ("bd a0 7c", "mov bp, power_off"),
  ("ff e5", "jmp bp"),
  ("be 20 7d", "failed: mov si, text + 0x20"),
  ("eb f1", "jmp last"),
)


def boot_sector(message: str) -> bytes:
  """Return a disk that prints `message` (ASCII, up to 179 characters) and powers off."""
  return _bios_disk(_PRINT_TEXT + _THEN_POWER_OFF, _line(message))


def hang_disk() -> bytes:
  """Return a disk that prints `hanging` and then stands still until QEMU is ended."""
  return _bios_disk(_PRINT_TEXT + _THEN_HANG, _line("hanging"))


def echo_disk() -> bytes:
  """Return a disk that prints `ready`, then each byte it gets as `<XX>`; `q` powers it off.

  Bytes sent before `ready` are lost: SeaBIOS takes them for its own keyboard.
  """
  return _bios_disk(_PRINT_TEXT + _THEN_ECHO, _line("ready"))


def counting_disk() -> bytes:
  """Return a disk that prints how often it has been started before, from `boots: 00` to 99."""
  text = b"\r\nboots: ".ljust(16, b"\0") + b"\r\n".ljust(16, b"\0") + _line("disk error")
  # Size, 0, sectors, offset and segment of the buffer, first sector: what int 0x13 calls a packet.
  packet = struct.pack("<BBHHHQ", 16, 0, 1, 0x7E00, 0, 1)
  return _bios_disk(_COUNT, text, packet)


def _line(message: str) -> bytes:
  """Return `message` as a line of its own, NUL-terminated; SeaBIOS leaves its last line open."""
  return b"\r\n" + message.encode("ascii") + b"\r\n\0"


def _bios_disk(program: bytes, text: bytes, packet: bytes = b"") -> bytes:
  """Put the pieces at their addresses in the first sector of an otherwise empty disk."""
  sector = bytearray(SECTOR)
  _place(sector, _ORIGIN, _START + program, _PUT)
  _place(sector, _PUT, _PUT_CODE, _PUTS)
  _place(sector, _PUTS, _PUTS_CODE, _POWER_OFF)
  _place(sector, _POWER_OFF, _POWER_OFF_CODE, _PACKET)
  _place(sector, _PACKET, packet, _TEXT)
  _place(sector, _TEXT, text, _CODE_END)
  sector[510:] = b"\x55\xaa"
  return bytes(sector).ljust(DISK_SIZE, b"\0")


def _place(sector: bytearray, address: int, piece: bytes, end: int) -> None:
  """Copy `piece` to `address`, if it ends before `end`."""
  if address + len(piece) > end:
    raise ValueError(f"{len(piece)} bytes do not fit between {address:#x} and {end:#x}")
  sector[address - _ORIGIN : address - _ORIGIN + len(piece)] = piece


# --- EFI programs: one section at 0x1000 that holds the code and, 0x80 further, the message ------

_SECTION = 0x1000
_MESSAGE = 0x80

# RCX is the image handle, RDX the system table.
_X86_64_CODE = _code(
  ("48 83 ec 28", "sub rsp, 0x28          ; aligns the stack, leaves the callee its 32 bytes"),
  ("48 89 d3", "mov rbx, rdx"),
  ("48 8b 4b 40", "mov rcx, [rbx + 0x40]  ; ConOut"),
  ("48 8d 15 6e 00 00 00", "lea rdx, [message]"),
  ("ff 51 08", "call [rcx + 0x08]      ; OutputString"),
  ("48 8b 5b 58", "mov rbx, [rbx + 0x58]  ; RuntimeServices"),
  ("b9 02 00 00 00", "mov ecx, 2             ; EfiResetShutdown"),
  ("31 d2", "xor edx, edx"),
  ("45 31 c0", "xor r8d, r8d"),
  ("45 31 c9", "xor r9d, r9d"),
  ("ff 53 68", "call [rbx + 0x68]      ; ResetSystem"),
  ("eb fe", "jmp ."),
)

# X0 is the image handle, X1 the system table.
_ARM64_CODE = _code(
  ("f3 03 01 aa", "mov x19, x1"),
  ("60 22 40 f9", "ldr x0, [x19, #0x40]   ; ConOut"),
  ("c1 03 00 10", "adr x1, message"),
  ("08 04 40 f9", "ldr x8, [x0, #0x08]    ; OutputString"),
  ("00 01 3f d6", "blr x8"),
  ("73 2e 40 f9", "ldr x19, [x19, #0x58]  ; RuntimeServices"),
  ("40 00 80 52", "mov w0, #2             ; EfiResetShutdown"),
  ("01 00 80 d2", "mov x1, #0"),
  ("02 00 80 d2", "mov x2, #0"),
  ("03 00 80 d2", "mov x3, #0"),
  ("68 36 40 f9", "ldr x8, [x19, #0x68]   ; ResetSystem"),
  ("00 01 3f d6", "blr x8"),
  ("00 00 00 14", "b ."),
)

# For each CPU: the machine number of PE, the code, and where firmware looks for the program.
_EFI = {
  "x86-64": (0x8664, _X86_64_CODE, "BOOTX64.EFI"),
  "arm64": (0xAA64, _ARM64_CODE, "BOOTAA64.EFI"),
}


def efi_program(arch: str, message: str) -> bytes:
  """Return an EFI application that prints `message` and powers the machine off."""
  machine, code, _ = _EFI[arch]
  assert len(code) <= _MESSAGE
  section = code.ljust(_MESSAGE, b"\0") + (message + "\r\n\0").encode("utf-16-le")
  raw_size = round_up(len(section), SECTOR)
  headers = _dos_header() + _pe_headers(machine, len(section), raw_size)
  return headers.ljust(SECTOR, b"\0") + section.ljust(raw_size, b"\0")


def _dos_header() -> bytes:
  """Return the part that every PE file begins with; it only says where the rest is."""
  return b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40)


def _pe_headers(machine: int, size: int, raw_size: int) -> bytes:
  """Return the headers of a PE32+ EFI application with a single section."""
  # Characteristics 0x0022: executable, large addresses. Relocations are not declared as stripped,
  # or the firmware would insist on the image base, and there are none: the code is relative.
  coff = struct.pack("<4sHHIIIHH", b"PE\0\0", machine, 1, 0, 0, 0, 240, 0x0022)
  standard = struct.pack("<HBBIIIII", 0x20B, 0, 0, raw_size, 0, 0, _SECTION, _SECTION)
  # Image base, alignment in memory and in the file; then three versions of two numbers each, and
  # a reserved word.
  windows = struct.pack("<QII", 0, 0x1000, SECTOR) + struct.pack("<HHHHHHI", *[0] * 7)
  image_size = _SECTION + round_up(size, 0x1000)
  # Subsystem 10 is an EFI application. Stack and heap sizes mean nothing to firmware.
  windows += struct.pack("<IIIHH", image_size, SECTOR, 0, 10, 0)
  windows += struct.pack("<QQQQII", 0, 0, 0, 0, 0, 16) + bytes(16 * 8)
  # 0x60000020: code that may be read and executed.
  section = struct.pack("<8sIIII", b".text", size, _SECTION, raw_size, SECTOR)
  return coff + standard + windows + section + struct.pack("<IIHHI", 0, 0, 0, 0, 0x60000020)


# --- The FAT12 disk that carries an EFI program --------------------------------------------------

_CLUSTER = 4096
_FAT_SECTORS = 4
_ROOT_ENTRIES = 64


def efi_disk(arch: str, message: str) -> bytes:
  """Return a disk that UEFI starts from: `efi_program` on a FAT file system, not partitioned."""
  program = efi_program(arch, message)
  if len(program) > _CLUSTER:
    raise ValueError("the message is too long: the program has to fit into one cluster")
  # Three clusters, 2 to 4: folder EFI, folder BOOT, and the program, each the last of its chain.
  table = bytes.fromhex("f8 ff ff  ff ff ff  ff 0f").ljust(_FAT_SECTORS * SECTOR, b"\0")
  root = fat.entry("EFI", fat.DIRECTORY, 2)
  efi = fat.folder(2, 0) + fat.entry("BOOT", fat.DIRECTORY, 3)
  boot = fat.folder(3, 2) + fat.entry(_EFI[arch][2], fat.ARCHIVE, 4, len(program))
  first = fat.boot_sector(
    "FAT12",
    "QVM TESTS  ",
    sectors=DISK_SIZE // SECTOR,
    cluster=_CLUSTER,
    fat_sectors=_FAT_SECTORS,
    root_entries=_ROOT_ENTRIES,
    heads=16,
  )
  disk = first + table + table + root.ljust(_ROOT_ENTRIES * 32, b"\0")
  disk += b"".join(cluster.ljust(_CLUSTER, b"\0") for cluster in (efi, boot, program))
  return disk.ljust(DISK_SIZE, b"\0")
