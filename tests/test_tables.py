"""The eight command lines, token by token, and every way in which what runs differs from them."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from support import fails, free_port, obey_modes, snapshot

import qvm as qvm_source

# As given by the user, in the words of ARGV.md; SHARE, DISK and the rest are filled in below.
TABLES = {
  ("freebsd", "x86-64"): """
    qemu-system-x86_64 -nographic -machine type=q35,accel=hvf:kvm:tcg -cpu max -smp 2 -m 6G
    -device virtio-net,netdev=user.0,addr=0x03 -netdev user,id=user.0,hostfwd=tcp::2847-:22
    -display none -monitor none -boot strict=off -bios SHARE/bios-256k.bin -device
    virtio-blk-pci,drive=drive0,bootindex=0 -drive
    if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  ("freebsd", "arm64"): """
    qemu-system-aarch64 -nographic -machine type=virt,accel=hvf:kvm:tcg -cpu cortex-a57 -smp 2 -m
    6G -device virtio-net,netdev=user.0,addr=0x03 -netdev user,id=user.0,hostfwd=tcp::2847-:22
    -display none -monitor none -boot strict=off -bios SHARE/uefi.fd -device
    virtio-blk-pci,drive=drive0,bootindex=0 -drive
    if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  ("openbsd", "x86-64"): """
    qemu-system-x86_64 -nographic -machine type=q35,accel=hvf:kvm:tcg -cpu max,-pdpe1gb -smp 2 -m
    6G -device e1000,netdev=user.0,addr=0x03 -netdev user,id=user.0,hostfwd=tcp::2847-:22 -display
    none -monitor none -boot strict=off -drive
    if=pflash,format=raw,unit=0,file=SHARE/uefi.fd,readonly=on -device virtio-scsi-pci -device
    scsi-hd,drive=drive0,bootindex=0 -drive
    if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  ("openbsd", "arm64"): """
    qemu-system-aarch64 -nographic -machine type=virt,accel=hvf:kvm:tcg -cpu cortex-a57 -smp 2 -m
    6G -device virtio-net,netdev=user.0,addr=0x03 -netdev user,id=user.0,hostfwd=tcp::2847-:22
    -display none -monitor none -boot strict=off -bios SHARE/linaro_uefi.fd -device
    virtio-scsi-pci -device scsi-hd,drive=drive0,bootindex=0 -drive
    if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  ("netbsd", "x86-64"): """
    qemu-system-x86_64 -nographic -machine type=q35,accel=hvf:kvm:tcg -cpu max -smp 2 -m 6G
    -device virtio-net,netdev=user.0,addr=0x03 -netdev
    user,id=user.0,hostfwd=tcp::2847-:22,ipv6=off -display none -monitor none -boot strict=off
    -bios SHARE/bios-256k.bin -device virtio-scsi-pci -device scsi-hd,drive=drive0,bootindex=0
    -drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  ("netbsd", "arm64"): """
    qemu-system-aarch64 -nographic -machine type=virt,accel=hvf:kvm:tcg -cpu cortex-a57 -smp 2 -m
    6G -device virtio-net,netdev=user.0,addr=0x03 -netdev
    user,id=user.0,hostfwd=tcp::2847-:22,ipv6=off -display none -monitor none -boot strict=off
    -bios SHARE/uefi.fd -device virtio-scsi-pci -device scsi-hd,drive=drive0,bootindex=0 -drive
    if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  ("haiku", "x86-64"): """
    qemu-system-x86_64 -nographic -machine type=q35,accel=hvf:kvm:tcg -cpu max -smp 2 -m 6G
    -device e1000,netdev=user.0,addr=0x03 -netdev user,id=user.0,hostfwd=tcp::2847-:22,ipv6=off
    -display none -monitor none -boot strict=off -bios SHARE/bios-256k.bin -device virtio-scsi-pci
    -device scsi-hd,drive=drive0,bootindex=0 -drive
    if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  ("omnios", "x86-64"): """
    qemu-system-x86_64 -nographic -machine type=q35,accel=hvf:kvm:tcg -cpu max -smp 2 -m 6G
    -device virtio-net,netdev=user.0,addr=0x03 -netdev user,id=user.0,hostfwd=tcp::2847-:22
    -display none -monitor none -boot strict=off -bios SHARE/bios-256k.bin -device
    virtio-blk,drive=drive0,bootindex=0,addr=0x02 -drive
    if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  # By UPSTREAM.md, not by the user.
  ("dragonflybsd", "x86-64"): """
    qemu-system-x86_64 -nographic -machine type=q35,accel=hvf:kvm:tcg -cpu max -smp 2 -m 6G
    -device virtio-net,netdev=user.0,addr=0x03 -netdev
    user,id=user.0,hostfwd=tcp::2847-:22,ipv6=off -display none -monitor none -boot strict=off
    -bios SHARE/bios-256k.bin -device virtio-scsi-pci -device scsi-hd,drive=drive0,bootindex=0
    -drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
  ("midnightbsd", "x86-64"): """
    qemu-system-x86_64 -nographic -machine type=q35,accel=hvf:kvm:tcg -cpu max -smp 2 -m 6G
    -device virtio-net,netdev=user.0,addr=0x03 -netdev
    user,id=user.0,hostfwd=tcp::2847-:22,ipv6=off -display none -monitor none -boot strict=off
    -bios SHARE/bios-256k.bin -device virtio-blk-pci,drive=drive0,bootindex=0
    -drive if=none,file=DISK,id=drive0,cache=unsafe,discard=ignore,format=qcow2
  """,
}
VERSION = {
  "freebsd": "15.1",
  "openbsd": "7.9",
  "netbsd": "10.1",
  "haiku": "r1beta5",
  "omnios": "r151058",
  "dragonflybsd": "6.4.2",
  "midnightbsd": "4.0.4",
}
GUESTS = list(TABLES)
X86_64 = [guest for guest in GUESTS if guest[1] == "x86-64"]
MASKED = {"amx-tile=off", "amx-int8=off", "amx-bf16=off", "la57=off"}
FIRMWARE = bytes(2 << 20)


def guest_words(guest):
  return ("--platform", guest[1], guest[0], VERSION[guest[0]])


def filled(guest, cache, name=""):
  """The literal command line of a guest as it runs with nothing chosen, in tokens."""
  os_name, arch = guest
  cpu = {"x86-64": "x86_64", "arm64": "aarch64"}[arch]
  tree = f"{cache}/qemu/{cpu}"
  stem = name or f"{os_name}-{VERSION[os_name]}-{arch}"
  line = TABLES[guest].replace("tcp::2847", "tcp:127.0.0.1:2847")
  line = line.replace("qemu-system-", f"{tree}/bin/qemu-system-")
  line = line.replace("SHARE", f"{tree}/share/qemu")
  return line.replace("DISK", f"{cache}/instances/{stem}.qcow2").split()


def without_linaro(argv):
  """What becomes of the command line for OpenBSD on arm64 when there is no Linaro firmware."""
  return [
    word.replace("linaro_uefi.fd", "uefi.fd").replace("type=virt,", "type=virt,acpi=off,")
    for word in argv
  ]


def argv_of(*words, linaro=True, mask=False, cache="/c", emulated=True):
  """The command line that follows from a command line, made without a look at this host."""
  options = qvm_source.parse_command_line(("run", *words))
  plan = qvm_source.make_plan(
    options, qvm_source.Host("linux", "x86-64"), qvm_source.Cache(cache), "abcdef"
  )
  accel = options.accel or "hvf:kvm:tcg"
  facts = qvm_source.HostFacts(linaro, mask, accel=accel, emulated=emulated)
  return qvm_source.qemu_command(plan, options, facts)


def dry(qvm, *words, **more):
  """The command line that --dry-run prints; TCG, or this host's CPU could have a say."""
  run = qvm("--dry-run", "run", "--accel", "tcg", *words, **more)
  assert (run.returncode, run.stderr) == (0, ""), run.stderr
  assert run.stdout.count("\n") == 1 and run.stdout.endswith("\n")
  return shlex.split(run.stdout)


def tcg(argv):
  return [word.replace("accel=hvf:kvm:tcg", "accel=tcg") for word in argv]


def put(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


# --- The tables ------------------------------------------------------------------------------


def test_there_are_no_others():
  assert [(guest.os, guest.arch) for guest in qvm_source.GUESTS] == GUESTS


@pytest.mark.parametrize("guest", qvm_source.GUESTS, ids=lambda g: f"{g.os}-{g.arch}")
def test_tables_stand_in_the_source_as_given(guest):
  assert guest.table.split() == TABLES[guest.os, guest.arch].split()
  for row in guest.table.strip().splitlines()[1:]:
    assert len(row.split()) in (1, 2) and row.startswith("-"), "an option and its value on a line"


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_each_guest_runs_with_its_table(guest):
  assert argv_of(*guest_words(guest)) == filled(guest, "/c")


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_versions_of_one_os_use_the_same_table(guest):
  version = VERSION[guest[0]]
  older = argv_of("--platform", guest[1], guest[0], "1.0")
  assert [word.replace("-1.0-", f"-{version}-") for word in older] == filled(guest, "/c")


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_dry_run_prints_the_table(qvm, server, guest):
  put(qvm.cache / "qemu/aarch64/share/qemu/linaro_uefi.fd", FIRMWARE)
  before = snapshot(qvm.home)
  assert dry(qvm, *guest_words(guest)) == tcg(filled(guest, qvm.cache))
  assert (server.started, snapshot(qvm.home)) == (0, before)


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_qemu_gets_what_dry_run_prints(qvm, tmp_path, guest):
  port = ("--ssh-port", f"0.0.0.0:{free_port()}")
  words = (*guest_words(guest), *port, "--qemu-arg", "a b", "-m", "64M")
  before = dry(qvm, *words)
  qvm.play(record=str(tmp_path / "record"))
  run = qvm("run", "--accel", "tcg", *words)
  assert run.returncode == 0, run.stderr
  assert qvm.record(tmp_path / "record")["argv"] == before == dry(qvm, *words)


# --- Adjustments -----------------------------------------------------------------------------

# Words of a command line, and the tokens that differ because of them.
ADJUSTMENTS = [
  (("-m", "512M"), {"6G": "512M"}),
  (("-m", "8g"), {"6G": "8G"}),
  (("-m", "2048"), {"6G": "2048"}),
  (("-m", "6G"), {}),
  (("--cpus", "4"), {"2": "4"}),
  (("--cpus", "255"), {"2": "255"}),
  (("--accel", "tcg"), {"accel=hvf:kvm:tcg": "accel=tcg"}),
  (("--accel", "tcg:kvm"), {"accel=hvf:kvm:tcg": "accel=tcg:kvm"}),
  (("--ssh-port", "2222"), {"hostfwd=tcp:127.0.0.1:2847-:22": "hostfwd=tcp:127.0.0.1:2222-:22"}),
  (("--ssh-port", "2847"), {}),
  (
    ("--ssh-port", "0.0.0.0:2222"),
    {"hostfwd=tcp:127.0.0.1:2847-:22": "hostfwd=tcp:0.0.0.0:2222-:22"},
  ),
  (
    ("--ssh-port", "127.9.8.7:65535"),
    {"hostfwd=tcp:127.0.0.1:2847-:22": "hostfwd=tcp:127.9.8.7:65535-:22"},
  ),
  (("--no-network",), {"id=user.0": "id=user.0,restrict=on"}),
]


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
@pytest.mark.parametrize("words, changes", ADJUSTMENTS, ids=[" ".join(a[0]) for a in ADJUSTMENTS])
def test_one_adjustment_changes_one_value(guest, words, changes):
  expected = []
  for word in filled(guest, "/c"):
    parts = [changes.get(part, part) for part in word.split(",")]
    expected.append(",".join(parts))
  assert argv_of(*guest_words(guest), *words) == expected
  assert (expected != filled(guest, "/c")) == bool(changes)


def test_adjustments_together():
  words = ("-m", "1G", "--cpus", "1", "--accel", "kvm", "--ssh-port", "9", "--qemu-arg=-s", "--rm")
  changes = {
    "6G": "1G",
    "2": "1",
    "type=virt,accel=hvf:kvm:tcg": "type=virt,acpi=off,accel=kvm",
    "user,id=user.0,hostfwd=tcp:127.0.0.1:2847-:22": "user,id=user.0,hostfwd=tcp:127.0.0.1:9-:22",
  }
  argv = filled(("openbsd", "arm64"), "/c", "openbsd-7.9-arm64-rm-abcdef")
  argv = [changes.get(word, word).replace("linaro_uefi.fd", "uefi.fd") for word in argv]
  words = (*words, *guest_words(("openbsd", "arm64")))
  assert argv_of(*words, linaro=False) == [*argv, "-s"]


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_linaro_firmware_matters_to_openbsd_on_arm64_only(guest):
  expected = filled(guest, "/c")
  if guest == ("openbsd", "arm64"):
    expected = without_linaro(expected)
    assert expected != filled(guest, "/c")
  assert argv_of(*guest_words(guest), linaro=False) == expected


HTML = b"<!DOCTYPE html>\n<html><head><title>Linaro</title></head>"


@pytest.mark.parametrize(
  "content, real",
  [
    (FIRMWARE, True),
    (b"\0" * 100 + HTML + FIRMWARE, True),
    (HTML, False),
    (HTML + b" " * len(FIRMWARE), False),
    (b"\xef\xbb\xbf\r\n  " + HTML.lower() + bytes(len(FIRMWARE)), False),
    (b"<html>" + bytes(len(FIRMWARE)), False),
    (b"", False),
    (bytes(1000), False),
    (None, False),
  ],
  ids=["real", "html-within", "html", "big-html", "bom", "tag", "empty", "runt", "absent"],
)
def test_linaro_firmware_is_looked_at(offline, content, real):
  share = offline.cache / "qemu/aarch64/share/qemu"
  put(share / "uefi.fd", FIRMWARE)
  if content is not None:
    put(share / "linaro_uefi.fd", content)
  expected = tcg(filled(("openbsd", "arm64"), offline.cache))
  argv = dry(offline, *guest_words(("openbsd", "arm64")))
  assert argv == (expected if real else without_linaro(expected))


def test_dry_run_with_nothing_unpacked_assumes_a_release_of_today(offline):
  expected = without_linaro(tcg(filled(("openbsd", "arm64"), offline.cache)))
  assert dry(offline, *guest_words(("openbsd", "arm64"))) == expected
  assert "-bios" in expected and expected[expected.index("-bios") + 1].endswith("/qemu/uefi.fd")
  assert "type=virt,acpi=off,accel=tcg" in expected


@pytest.mark.parametrize("name", ["folder", "broken link"])
def test_linaro_firmware_that_is_no_file(offline, name):
  path = offline.cache / "qemu/aarch64/share/qemu/linaro_uefi.fd"
  path.parent.mkdir(parents=True)
  path.mkdir() if name == "folder" else path.symlink_to("nowhere")
  expected = without_linaro(tcg(filled(("openbsd", "arm64"), offline.cache)))
  assert dry(offline, *guest_words(("openbsd", "arm64"))) == expected


# --- CPU features that crash guests ----------------------------------------------------------


def cpuinfo_of(flags):
  """What Linux says of a machine with two CPUs."""
  cpu = f"processor\t: 0\nmodel name\t: Xeon(R)\nflags\t\t: fpu {flags} sse2\nbugs\t\t: x\n"
  return cpu + "\n" + cpu.replace(": 0", ": 1") + "\n"


ARM_CPUINFO = "processor\t: 0\nFeatures\t: fp asimd la57 amx_tile\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
  "cpuinfo, kvm, masked",
  [
    (cpuinfo_of("amx_tile"), True, True),
    (cpuinfo_of("la57"), True, True),
    (cpuinfo_of("amx_bf16 avx512_fp16 amx_tile amx_int8 la57"), True, True),
    (cpuinfo_of("avx512f"), True, False),
    (cpuinfo_of("la57x xla57 amx_tile2 amx-tile"), True, False),
    (cpuinfo_of("amx_tile"), False, False),
    (cpuinfo_of("la57"), False, False),
    (ARM_CPUINFO, True, False),
    ("", True, False),
    (None, True, False),
  ],
)
def test_whether_the_cpu_needs_a_mask(tmp_path, cpuinfo, kvm, masked):
  if cpuinfo is not None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
  if kvm:
    (tmp_path / "kvm").touch(0o666)
  assert qvm_source.needs_cpu_mask(str(tmp_path / "cpuinfo"), str(tmp_path / "kvm")) is masked


def test_a_model_name_that_is_no_utf8(tmp_path):
  (tmp_path / "cpuinfo").write_bytes(b"model name\t: \xae\xff\nflags\t\t: fpu la57\n")
  (tmp_path / "kvm").touch(0o666)
  assert qvm_source.needs_cpu_mask(str(tmp_path / "cpuinfo"), str(tmp_path / "kvm")) is True


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_the_mask_is_for_x86_64_guests(guest):
  plain, masked = (argv_of(*guest_words(guest), mask=mask) for mask in (False, True))
  if guest not in X86_64:
    assert masked == plain
    return
  place = plain.index("-cpu") + 1
  assert masked[:place] + masked[place + 1 :] == plain[:place] + plain[place + 1 :]
  before, after = plain[place].split(","), masked[place].split(",")
  assert after[0] == "max" and len(after) == len(set(after))
  assert set(after) == set(before) | MASKED


@pytest.mark.parametrize(
  "accel, masked",
  [("hvf:kvm:tcg", True), ("kvm", True), ("tcg:kvm", True), ("tcg", False), ("hvf:tcg", False)],
)
@pytest.mark.parametrize("needed", [True, False])
def test_no_mask_where_kvm_is_not_tried(offline, accel, masked, needed):
  code = f"qvm.needs_cpu_mask = lambda *a: {needed}"
  words = ["run", "--dry-run", *guest_words(("netbsd", "x86-64")), "--accel", accel]
  run = offline(*words, code=code)
  assert (run.returncode, run.stderr) == (0, "")
  argv = shlex.split(run.stdout)
  cpu = argv[argv.index("-cpu") + 1].split(",")
  assert set(cpu) == {"max"} | (MASKED if masked and needed else set())


def test_dry_run_looks_at_this_host(offline):
  run = offline("--dry-run", "run", *guest_words(("netbsd", "x86-64")))
  argv = shlex.split(run.stdout)
  cpu = argv[argv.index("-cpu") + 1].split(",")
  flags = Path("/proc/cpuinfo").read_text().split()
  needed = ("la57" in flags or "amx_tile" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)
  assert set(cpu) == {"max"} | (MASKED if needed else set())
  assert argv[argv.index("-machine") + 1] == "type=q35,accel=hvf:kvm:tcg"


# --- Paths and arguments ---------------------------------------------------------------------

AWKWARD = (
  "a b", "a,b", ",a,,b,", "it's \"q\"", "$HOME", "SHARE", "DISK/SHARE", r"\1\g<0>", "a=b", "é ü",
  "file=x,if=none", "-x", "*", "a:b", "2847", "tcp::2847-", "linaro_uefi.fd", "type=virt,", "#",
)  # fmt: skip


def options_of(value):
  """A value as QEMU reads it: words parted by commas, a doubled comma is one within a word."""
  marked = value.replace(",,", "\0")
  return [word.replace("\0", ",") for word in marked.split(",")]


@pytest.mark.parametrize("folder", AWKWARD)
@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_awkward_paths(guest, folder):
  cache = f"/x/{folder}/y"
  argv = argv_of(*guest_words(guest), cache=cache)
  plain = argv_of(*guest_words(guest))
  assert len(argv) == len(plain)
  assert argv[0] == plain[0].replace("/c/", cache + "/", 1)
  for previous, word, before in zip(plain, argv[1:], plain[1:]):
    if previous == "-bios":
      assert word == before.replace("/c/", cache + "/")
    elif previous == "-drive":
      expected = [part.replace("=/c/", f"={cache}/") for part in options_of(before)]
      assert options_of(word) == expected and cache in "".join(expected)
    else:
      assert word == before


@pytest.mark.parametrize("guest", [("openbsd", "x86-64"), ("netbsd", "arm64")], ids="-".join)
def test_a_comma_is_doubled_just_where_qemu_wants_it(guest):
  argv = argv_of(*guest_words(guest), cache="/a, b")
  firmware = "/a,, b/qemu/x86_64/share/qemu/uefi.fd"
  if guest == ("openbsd", "x86-64"):
    assert f"if=pflash,format=raw,unit=0,file={firmware},readonly=on" in argv
  else:
    assert "/a, b/qemu/aarch64/share/qemu/uefi.fd" in argv
  stem = f"{guest[0]}-{VERSION[guest[0]]}-{guest[1]}"
  disk = f"/a,, b/instances/{stem}.qcow2"
  assert f"if=none,file={disk},id=drive0,cache=unsafe,discard=ignore,format=qcow2" in argv
  assert argv[0].startswith("/a, b/")


@pytest.mark.parametrize("folder", ["a b", 'it\'s, "q" $x `y` \\z', "é*?[!", "a;b|c&d>e#f"])
def test_dry_run_can_be_pasted_into_a_shell(offline, tmp_path, folder):
  cache = tmp_path / folder
  argv = dry(offline, *guest_words(GUESTS[0]), env={"QVM_CACHE_DIR": str(cache)})
  run = offline("--dry-run", "run", *guest_words(GUESTS[0]), "--accel", "tcg",
                env={"QVM_CACHE_DIR": str(cache)})  # fmt: skip
  line = run.stdout.replace(shlex.quote(argv[0]), "printf '%s\\0'", 1)
  shell = subprocess.run(["sh", "-c", line], capture_output=True, check=True)
  assert shell.stdout.decode().split("\0")[:-1] == argv[1:]
  assert not cache.exists()


def test_dry_run_with_a_path_that_is_no_utf8(offline, tmp_path):
  env = {**offline.env, "QVM_CACHE_DIR": os.fsencode(tmp_path) + b"/\xff\xe9"}
  run = subprocess.run(
    offline.command("--dry-run", "run", *guest_words(GUESTS[0])), env=env, capture_output=True
  )
  assert (run.returncode, run.stderr) == (0, b"")
  assert b"/\xff\xe9/instances/" in run.stdout and run.stdout.count(b"\n") == 1


@pytest.mark.parametrize("guest", GUESTS, ids="-".join)
def test_more_arguments_come_last_and_stay_as_they_are(guest):
  more = ["-device", "x,y=SHARE/DISK", "-m", "3G", "", "a b", "--", "-smp", "-cpu max", "6G"]
  words = [f"--qemu-arg={word}" for word in more]
  assert argv_of(*words, *guest_words(guest)) == [*filled(guest, "/c"), *more]


def test_own_qemu_runs_with_the_downloaded_firmware(offline, tmp_path):
  program = tmp_path / "own, qemu"
  program.write_text("#!/bin/sh\n")
  program.chmod(0o755)
  argv = dry(offline, *guest_words(GUESTS[2]), "--qemu", str(program))
  assert argv == [str(program), *tcg(filled(GUESTS[2], offline.cache))[1:]]


# --- A dry run changes nothing ---------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--rm",), ("--name", "x"), ("--rm", "--name", "x")])
@pytest.mark.parametrize("home", ["empty", "absent", "used"])
def test_dry_run_asks_nobody_and_touches_nothing(qvm, server, tmp_path, home, more):
  if home == "absent":
    qvm.home.rmdir()
  if home == "used":
    put(qvm.cache / "instances/w.qcow2", b"mine")
    put(qvm.cache / "instances/y.ephemeral", b"")
    put(qvm.cache / "downloads/z.part", b"z")
  before = snapshot(tmp_path)
  argv = dry(qvm, *guest_words(GUESTS[0]), *more, cwd=tmp_path)
  assert ("/instances/x.qcow2" in " ".join(argv)) == ("x" in more)
  assert (server.started, snapshot(tmp_path)) == (0, before)
  assert qvm.home.exists() == (home != "absent")


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "/proc/self/none"])
def test_dry_run_in_a_home_that_cannot_be_written(offline, home):
  argv = dry(offline, *guest_words(GUESTS[0]), env={"HOME": home})
  assert argv == tcg(filled(GUESTS[0], f"{home}/.cache/qvm"))


def test_dry_run_in_a_home_that_is_read_only(qvm, server):
  qvm.home.chmod(0o500)
  argv = dry(qvm, *guest_words(GUESTS[0]), preexec_fn=obey_modes)
  assert argv == tcg(filled(GUESTS[0], qvm.cache))
  assert server.started == 0
  run = qvm("pull", *guest_words(GUESTS[0]), preexec_fn=obey_modes)
  fails(run, f"cannot create {qvm.home}/.cache: Permission denied", "QVM_CACHE_DIR")
  assert server.started == 0


def test_dry_runs_with_rm_have_names_of_their_own(offline):
  names = {dry(offline, *guest_words(GUESTS[0]), "--rm")[-1] for _ in range(3)}
  assert len(names) == 3
