"""The whole flow once, with both forms of the program."""

import pytest
from support import FREEBSD, Qvm

pytestmark = pytest.mark.smoke


def test_run_from_nothing(tmp_path, program, server):
  qvm = Qvm(tmp_path, program, server)
  qvm.play(record=str(tmp_path / "record"), stdout="the console\n", exit=7)
  first = qvm("run", "freebsd", "15.1")
  assert (first.returncode, first.stdout) == (7, "the console\n"), first.stderr
  assert qvm.files() == [
    f"base/{FREEBSD}.json",
    f"base/{FREEBSD}.qcow2",
    "bin/qemu-img",
    "bin/qemu-img.json",
    f"instances/{FREEBSD}.json",
    f"instances/{FREEBSD}.qcow2",
    "qemu/x86_64/bin/qemu-system-x86_64",
    "qemu/x86_64/release.json",
    "qemu/x86_64/share/qemu/bios-256k.bin",
    "qemu/x86_64/share/qemu/uefi.fd",
  ]
  server.clear_log()
  assert qvm("run", "--rm", "freebsd", "15.1").returncode == 7
  assert server.started == 0
