"""A short part of `make torture`, always the same, and whether it would find anything at all."""

import shutil
import subprocess
import sys

import pytest
from support import ROOT
from torture import Violation, parts_of, play
from torture_containers import problem as no_container
from torture_hostile import problem as no_hostile_guest

tracing = pytest.mark.skipif(not shutil.which("strace"), reason="no strace")


def test_faults_of_the_network():
  counts = play("network", 1, range(40))
  assert counts["schedules"] == 40
  assert counts["sessions that worked"] > 8 and counts["sessions that failed cleanly"] > 3


def test_faults_of_the_network_and_fresh_processes():
  assert play("network", 2, range(5), fresh=True)["schedules"] == 5


def test_kill_9():
  counts = play("killing", 1, range(12))
  assert counts["points"] == 12
  assert sum(number for what, number in counts.items() if what.endswith(": killed")) > 2


@tracing
def test_signals_at_any_call_of_the_system():
  counts = play("signals", 1, range(14))
  assert counts["points"] == 14
  assert sum(number for what, number in counts.items() if what.endswith(": interrupted")) > 5


@tracing
def test_disks_that_fail():
  counts = play("disk", 1, range(9))
  assert counts["points"] == 9
  assert sum(number for what, number in counts.items() if what.endswith(": failed")) > 4


def test_kill_9_with_sync():
  counts = play("sync", 1, range(8))
  assert counts["points"] == 8 and counts["killed"] > 3
  assert sum(number for what, number in counts.items() if what.startswith("halfway")) == 4


def test_kill_9_while_streaming():
  assert play("streaming", 1, range(4))["points"] == 4


@pytest.mark.skipif(no_hostile_guest() != "", reason="no namespace of mounts")
def test_a_guest_that_attacks():
  counts = play("hostile", 1, range(5))
  assert counts["points"] == 5
  assert sum(number for what, number in counts.items() if what.startswith("attack")) > 3


def test_kill_9_while_a_machine_is_prepared():
  assert play("preparing", 1, range(2))["points"] == 2


@pytest.mark.skipif(no_container() != "", reason="no containers")
def test_two_containers_at_once():
  counts = play("containers", 1, range(2))
  assert counts["rounds"] == counts["machines that the other container left alone"] == 2


def test_everything_at_once():
  counts = play("crowd", 1, range(1))
  assert (counts["rounds"], counts["run: 0"]) == (1, 7)


# A check that qvm makes, what stands there instead, the part that must find out, and the number
# from which on it soon does.
MUTANTS = {
  "no digest": ("elif digest != expected:", "elif False:", "network", 27),
  "no length": ("if span.end == UNKNOWN:", "if True:", "network", 1),
  "no range": ("self.check_range(body, span)", "pass", "network", 55),
  "no plain text": ('"".join(c if c.isprintable() else "?" for c in text)', "text", "hostile", 3),
  "no container": ("if not noted.is_here():", "if False:", "containers", 0),
  "no mark": ('open(self.paths.mark, "w").close()', "pass", "killing", 10),
}


@pytest.mark.parametrize("check, instead, part, first", MUTANTS.values(), ids=list(MUTANTS))
def test_a_qvm_without_a_check_is_found(tmp_path, check, instead, part, first):
  left_out = {"hostile": no_hostile_guest, "containers": no_container}.get(part, str)()
  if left_out:
    pytest.skip(left_out)
  text = (ROOT / "qvm.py").read_text()
  assert text.count(check) == 1
  (tmp_path / "qvm.py").write_text(text.replace(check, instead))
  with pytest.raises(Violation):
    play(part, 1, range(first, 200), root=tmp_path)


@pytest.mark.parametrize("program", ["torture.py", "bench.py"])
def test_it_starts_by_hand(program):
  command = [sys.executable, str(ROOT / "tests" / program), "--help"]
  assert "usage: " + program in subprocess.run(command, check=True, stdout=-1).stdout.decode()


@pytest.mark.parametrize("words, parts", [
  ([], {"network": 1000, "killing": 200, "signals": 200, "disk": 120, "sync": 60, "streaming": 500,
        "power": 100, "preparing": 60, "hostile": 200, "crowd": 3, "containers": 20}),
  (["crowd", "network", "7"], {"crowd": 3, "network": 7}),
])  # fmt: skip
def test_parts(words, parts):
  assert parts_of(words) == parts
