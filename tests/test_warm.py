"""Warm starts: a stand-in for QEMU with a control socket and a real sshd."""

import itertools
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from support import (
  DEADLINE,
  FREEBSD,
  ended,
  fails,
  heard,
  lines,
  processes_of,
  read_until,
  rows,
  with_another,
  works,
)
from support_machines import OPENBSD_GUEST, RESTORED, SAVED

import qvm as qvm_source


@pytest.fixture
def warm(guests, tmp_path):
  """Guests whose orders on the control socket are noted."""
  guests.note = tmp_path / "orders"
  guests.play()
  yield guests
  assert processes_of(guests.qvm.cache) == {}


def control(warm, **how):
  warm.play(control={"note": str(warm.note), **how})


def run(warm, *command, options=(), **more):
  return warm.run(*(command or ("true",)), options=("--warm", *options), **more)


def orders(warm):
  """The orders since the last question."""
  found = warm.note.read_text().split() if warm.note.exists() else []
  warm.note.unlink() if warm.note.exists() else None
  return found


def frozen(warm):
  """The names of the files of checkpoints, without the key."""
  names = os.listdir(warm.qvm.cache / "layers")
  return sorted(re.sub(r"-warm-[0-9a-f]{10}", "-warm-", name) for name in names)


WHOLE = [f"{FREEBSD}-warm-{end}" for end in (".json", ".memory", ".qcow2", ".state")]


# --- What works ------------------------------------------------------------------------------


def test_the_first_run_makes_a_checkpoint_and_the_next_starts_from_it(warm):
  control(warm)
  first = works(run(warm, "echo one"))
  assert orders(warm) == SAVED + RESTORED
  made, went_on = lines(first.stderr)
  assert "is booting to create the checkpoint freebsd-15.1-x86-64-warm-" in made
  assert "resumes from the checkpoint freebsd-15.1-x86-64-warm-" in went_on
  assert frozen(warm) == WHOLE and warm.nothing_left()
  second = works(run(warm, "echo two"))
  assert (first.stdout, second.stdout) == ("one\n", "two\n")
  assert orders(warm) == RESTORED
  assert len(lines(second.stderr)) == 1 and warm.nothing_left()


def test_exit_codes_and_streams_are_those_of_the_command(warm):
  works(run(warm))
  result = run(warm, "sh", "-c", "cat; echo err >&2; exit 7", stdin=None, input="typed")
  assert (result.returncode, result.stdout) == (7, "typed")
  assert result.stderr.endswith("err\n") and "clock" not in result.stderr


def test_the_guest_is_told_the_time_and_something_random_before_the_command(warm, monkeypatch):
  works(run(warm))
  assert re.fullmatch(r"-u \d{12}\.\d\d\n", (warm.folder / "dates").read_text())
  monkeypatch.setattr(qvm_source.os, "urandom", bytes)  # zeros, which end FreeBSD's %b
  script = qvm_source.refresh_script(qvm_source.find_guest("freebsd", "x86-64"))
  assert "\\0001" in script and "\\0000" not in script
  monkeypatch.undo()
  script = qvm_source.refresh_script(qvm_source.find_guest("freebsd", "x86-64"))
  assert "sudo date -u " in script and " | sudo sh -c 'cat >/dev/random'" in script
  other = qvm_source.refresh_script(qvm_source.find_guest("freebsd", "x86-64"))
  assert script.split("'")[1] != other.split("'")[1]
  assert script.split("'")[1].count("\\0") == 64


def test_nothing_of_the_machine_that_became_the_checkpoint_is_left(warm):
  """Under python -X dev: the keeper of its console has ended, to which the next one appends."""
  warm.qvm.env["PYTHONDEVMODE"] = "1"
  assert "Warning" not in works(run(warm)).stderr + works(run(warm)).stderr


@pytest.mark.parametrize("way", ["command", "sync", "detach"])
def test_a_clock_that_cannot_be_set_is_said(warm, tmp_path, way):
  works(run(warm))
  (warm.folder / "dates").unlink()
  (warm.folder / "dates").mkdir()  # its date writes there
  if way == "detach":
    words = warm.words("--warm", "-d", "--name", "vm")
    result = works(warm.qvm(*words))
    works(warm.qvm("stop", "vm"))
  else:
    result = works(run(warm, options=("--sync", str(tmp_path)) if way == "sync" else ()))
  assert "the clock of " in result.stderr


@pytest.mark.parametrize("guest, words", [
  ("freebsd", "sudo date -u 202611240102.03"),
  ("openbsd", "sudo date -u 202611240102.03"),
  ("netbsd", "sudo date -u 202611240102.03"),
  ("omnios", "sudo date -u 112401022026.03"),
  ("haiku", "date -u -s '2026-11-24 01:02:03'"),
])  # fmt: skip
def test_each_guest_has_its_own_date(monkeypatch, guest, words):
  moment = 1795482123.0  # 2026-11-24 01:02:03 UTC
  monkeypatch.setattr(qvm_source.time, "time", lambda: moment)
  assert words + " >/dev/null" in qvm_source.refresh_script(qvm_source.find_guest(guest, "x86-64"))


def test_a_folder_goes_there_and_comes_back(warm, tmp_path):
  folder = tmp_path / "project"
  folder.mkdir()
  (folder / "given").write_text("given")
  works(run(warm, "cp given made", options=("--sync", str(folder))))
  assert (folder / "made").read_text() == "given"


def test_in_the_background(warm):
  for step in ("made", "used"):
    control(warm)
    words = warm.words("--warm", "-d", "--name", step)
    started = works(warm.qvm(*words))
    assert started.stdout.startswith(f"{step}\nssh -p ")
    assert works(warm.qvm("ssh", step, "--", "echo up")).stdout == "up\n"
    works(warm.qvm("stop", step))
    assert orders(warm)[-len(RESTORED) :] == RESTORED
    assert warm.nothing_left()


def test_a_guest_that_wants_a_key(warm):
  warm.play(login="key")
  for _ in range(2):
    result = works(run(warm, "echo in", guest=OPENBSD_GUEST))
    assert result.stdout == "in\n"
  assert "is booting" not in result.stderr


def test_the_command_line_is_the_users_but_for_what_restoring_takes(warm, tmp_path, fifo):
  works(run(warm))
  dry = ("run", "--rm", "--name", "x", "--dry-run", "freebsd", "15.1")
  plain = warm.qvm(*dry).stdout.split()
  assert warm.qvm(*dry, "--warm").stdout.split() == plain
  warm.play(record=str(fifo))
  process = warm.start("cat", options=("--warm", "-m", "6G"), stdin=-1)
  argv = heard(fifo, process)["argv"]
  process.communicate("", timeout=DEADLINE)
  added = argv[len(plain) :]
  assert added[::2] == ["-object", "-chardev", "-mon", "-incoming"]
  assert argv[argv.index("-machine") + 1].endswith(",memory-backend=qvm-memory")
  assert ",share=off" in added[1] and ",size=6G," in added[1]
  before = [word for word in argv[1 : len(plain)] if "memory-backend" not in word]
  changed = [word for word in before if word not in plain]
  assert len(changed) == 2 and "hostfwd" in changed[0] and "file=" in changed[1]


def test_several_at_once(warm, tmp_path):
  works(run(warm))
  processes = []
  for number in range(3):
    warm.play(folder=str(tmp_path / f"guest{number}"))
    processes.append(warm.start(f"echo {number}", options=("--warm",)))
  for number, process in enumerate(processes):
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (0, f"{number}\n"), err
  assert frozen(warm) == WHOLE and warm.nothing_left()


def test_list_rm_and_clean(warm):
  works(run(warm))
  (row,) = rows(warm.qvm).values()
  name = row["name"]
  assert row["state"] == "checkpoint" and row["os"] == "freebsd" and row["version"] == "15.1"
  assert row["size"] > 0
  assert "checkpoint" in works(warm.qvm("list")).stdout
  assert name in works(warm.qvm("completion", "words", "--", "rm")).stdout.split()
  fails(warm.qvm("stop", name), f"no instance {name}")
  works(warm.qvm("clean"))
  assert frozen(warm) == WHOLE
  fails(warm.qvm("rm", "nobody"), "nobody")
  assert frozen(warm) == WHOLE
  assert works(warm.qvm("rm", name)).stdout == name + "\n"
  assert frozen(warm) == [] and rows(warm.qvm) == {}
  works(run(warm))
  works(warm.qvm("clean", "--all", "--dry-run"))
  assert frozen(warm) == WHOLE
  works(warm.qvm("clean", "--all"))
  assert frozen(warm) == []
  assert not (warm.qvm.cache / "base" / f"{FREEBSD}.qcow2").exists()


def test_clean_and_refresh_beside_a_running_machine(warm, fifo):
  works(run(warm))
  warm.play(record=str(fifo))
  process = warm.start("cat", options=("--warm",), stdin=-1)
  heard(fifo, process)
  works(warm.qvm("clean", "--all"))
  assert frozen(warm) == WHOLE
  assert (warm.qvm.cache / "base" / f"{FREEBSD}.qcow2").exists()
  name = next(row["name"] for row in rows(warm.qvm).values() if row["state"] == "checkpoint")
  works(warm.qvm("rm", name))  # by name it goes; the machine has its files open
  out, err = process.communicate("still there", timeout=DEADLINE)
  assert (process.returncode, out) == (0, "still there"), err
  assert warm.nothing_left()


def test_a_newer_image_drops_the_checkpoint(warm, server, image):
  works(run(warm))
  server.add_release("freebsd-builder", "v0.17.0", {f"{FREEBSD}.qcow2": image + bytes(512)})
  works(warm.qvm("pull", "--refresh", "freebsd", "15.1"))
  assert frozen(warm) == []


# --- What makes a new one --------------------------------------------------------------------


@pytest.mark.parametrize("options", [("-m", "2G"), ("--cpus", "1"), ("--accel", "tcg"),
                                     ("--qemu-arg=-no-acpi",)])  # fmt: skip
def test_other_options_make_another(warm, options):
  works(run(warm))
  assert "is booting to create" in works(run(warm, options=options)).stderr
  assert "is booting" not in works(run(warm, options=options)).stderr
  assert "is booting" not in works(run(warm)).stderr
  assert len(frozen(warm)) == 8


@pytest.mark.parametrize("what", ["base", "QEMU"])
def test_another_base_image_or_qemu_makes_another(warm, what):
  works(run(warm))
  tree = warm.qvm.cache / "qemu" / "x86_64" / "release.json"
  path = tree if what == "QEMU" else warm.qvm.cache / "base" / f"{FREEBSD}.json"
  record = json.loads(path.read_text())
  path.chmod(0o600)
  path.write_text(json.dumps({**record, "sha256": "0" * 64}))
  assert "is booting to create" in works(run(warm)).stderr


def test_the_hosts_cpu_and_kernel_count(tmp_path):
  one, other = tmp_path / "one", tmp_path / "other"
  one.write_text("processor : 0\nmodel name\t: A\ncpu MHz : 1\nflags : x y\n\nprocessor : 1\n")
  other.write_text("processor : 0\nmodel name\t: A\ncpu MHz : 2\nflags : x z\n\nprocessor : 1\n")
  words = qvm_source.host_cpu(str(one))
  assert words[-2:] == ["model name\t: A", "flags : x y"] and os.uname().release in words
  assert qvm_source.host_cpu(str(other)) != words


def test_another_accelerator_makes_another(warm):
  works(run(warm))
  control(warm, accelerator="kvm")
  result = works(run(warm, "echo fine"))
  assert "it was created with tcg, but QEMU now uses kvm" in result.stderr
  assert "is booting to create" in result.stderr and result.stdout == "fine\n"
  assert "is booting" not in works(run(warm)).stderr


# --- What goes wrong -------------------------------------------------------------------------


def checkpoint_file(warm, suffix):
  (path,) = (warm.qvm.cache / "layers").glob("*" + suffix)
  return path


def cut(path):
  os.truncate(path, path.stat().st_size - 1)


def alter(path):
  """Other bytes, with the size and the time of before."""
  before = path.stat()
  with open(path, "r+b") as file:
    file.write(b"other")
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("damage, suffix, words", [
  (cut, ".state", "its files have changed"),
  (cut, ".memory", "its files have changed"),
  (cut, ".qcow2", "its files have changed"),
  (os.unlink, ".memory", "No such file"),
  (alter, ".state", "load of migration failed"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_made_anew(warm, damage, suffix, words):
  works(run(warm))
  damage(checkpoint_file(warm, suffix))
  result = works(run(warm, "echo fine"))
  assert result.stdout == "fine\n" and "cannot be used: " in result.stderr
  assert words in result.stderr and "is booting to create" in result.stderr
  assert "is booting" not in works(run(warm)).stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 1}', '{"parts": 7, "key": []}'])
def test_a_record_that_is_none(warm, text):
  works(run(warm))
  checkpoint_file(warm, ".json").write_text(text)
  assert len(rows(warm.qvm)) == 1
  assert "is booting to create" in works(run(warm)).stderr


def test_an_error_without_words():
  """It is no answer to wait for longer."""
  ours, theirs = socket.socketpair()
  with ours, theirs:
    ours.settimeout(1)
    theirs.sendall(b'{"QMP": {}}\n{"return": {}}\n{"return": {}}\n{"error": {}}\n')
    control = qvm_source.Control(ours)
    with pytest.raises(qvm_source.QvmError, match="makes no sense"):
      control("stop")


SAVING = itertools.product(("fail", "die", "garble"), ("stop", "migrate", "query-migrate"))


@pytest.mark.parametrize("way, order", [*SAVING, ("broken", "query-migrate"), ("flood", "stop")])
def test_a_saving_that_fails_boots_as_always(warm, way, order):
  control(warm, **{way: order})
  result = works(run(warm, "echo fine"))
  assert result.stdout == "fine\n" and "no checkpoint is created: QEMU" in result.stderr
  words = {"broken": "told to break", "flood": "QEMU's answer is too long"}
  assert words.get(way, "") in result.stderr
  assert "timed out" not in result.stderr  # its end is seen at once
  assert frozen(warm) == [] and warm.nothing_left()


def test_a_qemu_that_does_not_answer(warm):
  control(warm, hang="stop")
  result = works(run(warm, "echo fine", code="qvm.RESUME_SECONDS = 0.5"))
  assert result.stdout == "fine\n" and "QEMU does not answer: time" in result.stderr
  assert frozen(warm) == [] and warm.nothing_left()


def test_no_room_for_the_state(warm):
  code = """
import errno
def on_full_disk(path, *more, **named):
  if str(path).endswith("state"):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
  return open(path, *more, **named)
qvm.open = on_full_disk
"""
  result = works(run(warm, "echo fine", code=code))
  assert result.stdout == "fine\n"
  assert re.search("no checkpoint is created: .*disk is full", result.stderr)
  assert frozen(warm) == [] and warm.nothing_left()


def test_a_state_that_takes_its_time(warm):
  control(warm, slow="query-migrate")
  works(run(warm))
  assert orders(warm).count("query-migrate") == 2 and frozen(warm) == WHOLE


def test_what_qemu_says_at_a_terminal(warm):
  """Its words do not go to a log then."""
  works(run(warm))
  warm.play(control={"die": "migrate-incoming"})
  words = warm.words("--warm")
  with ended(warm.qvm.start(*words)) as process:
    said = read_until(process.stderr, "create the checkpoint")
  assert "cannot be used: QEMU has ended qemu: it dies at migrate-incoming" in said


@pytest.mark.parametrize("way, order, words", [
  ("fail", "migrate-incoming", "told to fail"),
  ("shut", "migrate-incoming", "QEMU does not accept the device state"),
  ("garble", "cont", "QEMU's answer makes no sense"),
  ("die", "migrate-incoming", "qemu: it dies at migrate-incoming"),
  ("fail", "cont", "told to fail"),
  ("mute", True, "ssh has not answered"),
])  # fmt: skip
def test_where_not_even_a_fresh_one_works_none_is_made_again(warm, way, order, words):
  control(warm, **{way: order})
  for _ in range(3):
    result = works(run(warm, "echo fine", options=("--boot-timeout", "5")))
    assert result.stdout == "fine\n" and words in result.stderr.replace("\n", " ")
    assert "is booting to create" in result.stderr
    assert frozen(warm) == WHOLE[:1] and warm.nothing_left()
  orders(warm)
  control(warm)
  again = works(run(warm, "echo fine"))
  assert "no warm start: " in again.stderr and orders(warm) == []
  works(warm.qvm("rm", *rows(warm.qvm)))
  assert "is booting to create" in works(run(warm)).stderr


def test_a_slow_moment_is_forgotten(warm):
  """Only failures in a row count, so two of them, a success and two more are not enough."""
  for _ in range(2):
    control(warm, fail="cont")
    for _ in range(2):
      assert "told to fail" in works(run(warm)).stderr
    control(warm)
    assert "resumes from the checkpoint" in works(run(warm)).stderr
    (record,) = (warm.qvm.cache / "layers").glob("*.json")
    assert json.loads(record.read_text())["failures"] == 0
    assert "is booting to create" not in works(run(warm)).stderr
    for path in (warm.qvm.cache / "layers").glob("*.memory"):
      path.unlink()  # so that the next run makes another


@pytest.mark.parametrize("when, words", [
  ("made", "no checkpoint is created: the guest of vm has not answered within 5 s"),
  ("resumed", "still has the time of its checkpoint: the guest of vm has not answered within 5 s"),
])  # fmt: skip
def test_a_shell_that_hangs_does_not_hang_a_warm_start(warm, tmp_path, when, words):
  if when == "resumed":
    works(run(warm))
  shell = tmp_path / "shell"
  shell.write_text("#!/bin/sh\nexec sleep 1000\n")
  shell.chmod(0o755)
  warm.play(control={}, shell=str(shell))
  options = ("-d", "--warm", "--boot-timeout", "5", "--name", "vm")
  result = works(warm.qvm(*warm.words(*options)))
  assert words in result.stderr
  works(warm.qvm("stop", "--force", "vm"))


def test_a_machine_that_never_answers(warm):
  warm.play(listen=False)
  result = run(warm, options=("--boot-timeout", "0.5"))
  assert result.returncode == 125
  assert "ssh has not answered within 0.5 s; no checkpoint is created" in result.stderr
  assert frozen(warm) == [] and warm.nothing_left()


def test_a_machine_that_dies_while_it_boots(warm):
  warm.play(die={"after": "start", "exit": 3})
  result = run(warm)
  assert result.returncode == 125 and "no checkpoint is created: the machine " in result.stderr
  assert frozen(warm) == [] and warm.nothing_left()


def test_a_disk_without_room_for_the_memory(warm):
  result = works(run(warm, options=("-m", "4T")))
  assert "no checkpoint is created: it can need as much disk space " in result.stderr
  assert frozen(warm) == [] and "cannot" not in result.stderr


def test_beside_one_that_makes_the_checkpoint(warm, tmp_path):
  hang = {"hang": "stop", "note": str(warm.note)}
  warm.play(folder=str(tmp_path / "first"), control=hang)
  first = warm.start("true", options=("--warm",))
  await_order(warm, "stop")
  warm.play()
  second = works(run(warm, "echo fine"))
  assert second.stdout == "fine\n" and "another qvm is creating the checkpoint" in second.stderr
  first.terminate()
  assert first.wait(DEADLINE) == 143
  first.communicate()
  assert frozen(warm) == [] and warm.nothing_left()


def await_order(warm, order):
  """Wait until QEMU has got an order."""
  patience = time.monotonic() + DEADLINE
  while not warm.note.exists() or order not in warm.note.read_text().split():
    assert time.monotonic() < patience
    time.sleep(0.01)


@pytest.mark.parametrize("order", ["stop", "migrate", "quit", "migrate-incoming", "cont"])
def test_kill_9_while_saving_and_restoring(warm, order):
  control(warm, hang=order)
  process = warm.start("true", options=("--warm",))
  await_order(warm, order)
  warm.kill(process)  # `qvm stop` would end the orphaned QEMU, too
  control(warm)
  result = works(run(warm, "echo fine"))
  assert result.stdout == "fine\n" and frozen(warm) == WHOLE and warm.nothing_left()
  assert ("is booting to create" in result.stderr) == (order in ("stop", "migrate", "quit"))


def test_an_orphan_that_was_to_become_a_checkpoint_can_be_stopped(warm):
  control(warm, hang="stop")
  process = warm.start("true", options=("--warm",))
  await_order(warm, "stop")
  process.kill()
  process.communicate()
  (row,) = rows(warm.qvm).values()
  assert row["state"] == "running"
  works(warm.qvm("stop", "--force", row["name"]))
  assert frozen(warm) == [] and warm.nothing_left()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_boots(warm, fifo, number, code):
  warm.play(listen=False, record=str(fifo))
  process = warm.start("true", options=("--warm",))
  heard(fifo, process)
  process.send_signal(number)
  process.communicate(timeout=DEADLINE)
  assert process.returncode == code
  assert frozen(warm) == [] and warm.nothing_left()


# --- Beside another qvm ----------------------------------------------------------------------


def run_beside(warm, command, tmp_path):
  """A warm run; when it has first looked at its checkpoint, another qvm runs to its end."""
  words, other = warm.words("--warm", command=["true"]), warm.qvm.command(*command)
  return works(with_another(warm.qvm, words, "Checkpoint.problem", other, tmp_path))


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_needed(warm, tmp_path):
  works(run(warm))
  result = run_beside(warm, ("rm", *rows(warm.qvm)), tmp_path)
  assert "is gone" in result.stderr and "is booting to create the checkpoint" in result.stderr
  assert frozen(warm) == WHOLE and warm.nothing_left()


def test_a_checkpoint_that_is_made_meanwhile_is_used(warm, tmp_path):
  result = run_beside(warm, warm.words("--warm", command=["true"]), tmp_path)
  assert result.stderr.count("is booting to create the checkpoint") == 1
  assert frozen(warm) == WHOLE and warm.nothing_left()


# --- The command line ------------------------------------------------------------------------


def test_only_with_rm(offline):
  fails(offline("run", "--warm", "freebsd", "15.1"), "--warm needs --rm", code=2)


def test_modes_of_the_files(warm):
  works(run(warm))
  folder = Path(warm.qvm.cache / "layers")
  assert folder.stat().st_mode & 0o777 == 0o700
  assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
