"""Prepared machines: a stand-in for QEMU that starts a real sshd, on real qcow2 overlays."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import (
  BASE,
  DEADLINE,
  FREEBSD,
  fails,
  free_port,
  heard,
  lines,
  obey_modes,
  on_full_disk,
  processes_of,
  rows,
  with_another,
  works,
)
from support_machines import RESTORED, SAVED, small_cache, ssh_guest_as_qemu

import qvm as qvm_source


@pytest.fixture
def prepare(guests, tmp_path):
  """Guests, and a way to write scripts; what they do is noted in a file of the host's."""
  guests.log = tmp_path / "ran"
  guests.scripts = tmp_path / "scripts"
  guests.scripts.mkdir()
  yield guests
  assert processes_of(guests.qvm.cache) == {}


def script(prepare, text="", name="setup.sh"):
  path = prepare.scripts / name
  path.write_text(text or f"echo {name} >>{prepare.log}\n")
  return str(path)


def with_scripts(*paths):
  return [word for path in paths for word in ("--prepare", path)]


def ran(prepare):
  """What the scripts have noted since the last question."""
  found = prepare.log.read_text().split() if prepare.log.exists() else []
  prepare.log.unlink() if found else None
  return found


def layer_names(prepare):
  names = os.listdir(prepare.qvm.cache / "layers")
  return sorted({name.rpartition(".")[0] for name in names})


def test_the_first_run_sets_up_and_the_next_starts_from_there(prepare):
  one = script(prepare, f"echo out; echo err >&2; echo ran >>{prepare.log}\n")
  first = works(prepare.run("echo command", options=with_scripts(one)))
  assert first.stdout == "command\n"
  assert "\nout\nerr\n" in first.stderr
  assert ran(prepare) == ["ran"]
  (name,) = layer_names(prepare)
  assert re.fullmatch(FREEBSD + "-prepared-[0-9a-f]{10}", name) and prepare.nothing_left()
  second = works(prepare.run("echo again", options=with_scripts(one)))
  assert second.stdout == "again\n" and len(lines(second.stderr)) == 1, second.stderr
  assert ran(prepare) == [] and prepare.nothing_left()


def path_of(prepare, name, end=".qcow2"):
  return prepare.qvm.cache / "layers" / (name + end)


def no_layer(prepare):
  """Nothing of a layer, nothing unfinished, no machine."""
  left = [name for name in prepare.qvm.files() if name.startswith(("layers/", "downloads/"))]
  assert left == [] and prepare.nothing_left()
  return True


def test_published_ports_and_a_second_disk_are_not_for_the_machine_that_sets_up(prepare):
  there = f"{prepare.qvm.cache}/instances/*-prepare-*"
  one = script(prepare, f"(cat {there}.json; ls {there}) >>{prepare.log}\n")
  ports = ("-p", f"{free_port()}:80")
  works(prepare.run("true", options=("--disk", "64M", *ports, *with_scripts(one)), rm=False))
  found = " ".join(ran(prepare))
  assert '"ports": "",' in found and '"publish": "",' in found
  assert ".data" not in found and (prepare.qvm.cache / f"instances/{FREEBSD}.data").exists()


@pytest.mark.parametrize("more", [(), ("--warm",)])
def test_the_machine_that_sets_up_has_a_network(prepare, more):
  """As with `docker run --network none`: the layer is the same as without."""
  there = f"{prepare.qvm.cache}/instances/*"
  one = script(prepare, f"cat {there}-prepare-*.json >>{prepare.log}\n")
  options = ("--no-network", *more, *with_scripts(one))
  run = works(prepare.run(f"cat {there}.json", options=options))
  assert '"words": "--no-network"' in run.stdout
  assert '"words":' in prepare.log.read_text() and "--no-network" not in prepare.log.read_text()


# --- Which layer -----------------------------------------------------------------------------


def test_scripts_that_begin_with_those_of_a_layer_go_on_from_it(prepare):
  a, b, c = (script(prepare, name=name) for name in "abc")
  works(prepare.run("true", options=with_scripts(a)))
  (first,) = layer_names(prepare)
  works(prepare.run("true", options=with_scripts(a, b, c)))
  assert ran(prepare) == ["a", "b", "c"]
  (second,) = set(layer_names(prepare)) - {first}
  assert qvm_source.backing_file(str(path_of(prepare, second))) == f"../layers/{first}.qcow2"
  works(prepare.run("true", options=with_scripts(a, b)))
  assert ran(prepare) == ["b"] and len(layer_names(prepare)) == 3
  works(prepare.run("true", options=with_scripts(b, a)))
  assert ran(prepare) == ["b", "a"] and len(layer_names(prepare)) == 4
  check = subprocess.run(
    ["qemu-img", "info", "--backing-chain", "--output=json", str(path_of(prepare, second))],
    stdout=subprocess.PIPE, check=True,
  )  # fmt: skip
  assert [image["format"] for image in json.loads(check.stdout)] == ["qcow2"] * 3
  assert all(
    image.get("backing-filename-format", "qcow2") == "qcow2" for image in json.loads(check.stdout)
  )


def test_contents_and_variables_count_and_names_do_not(prepare):
  one = script(prepare, f'echo "$A|${{CI-unset}}" >>{prepare.log}\n')
  works(prepare.run("true", options=with_scripts(one), env={"CI": "1"}))
  assert ran(prepare) == ["|unset"]
  same = script(prepare, Path(one).read_text(), name="other name.sh")
  works(prepare.run("true", options=with_scripts(same)))
  assert ran(prepare) == []
  for given in ("A=one", "A=two"):
    works(prepare.run("true", options=("-e", given, *with_scripts(one))))
    assert ran(prepare) == [given[2:] + "|unset"]
  works(prepare.run("true", options=("-e", "A", *with_scripts(one)), env={"A": "two"}))
  assert ran(prepare) == []
  Path(one).write_text(Path(one).read_text() + "\n")
  works(prepare.run("true", options=with_scripts(one)))
  assert ran(prepare) == ["|unset"]


def test_values_of_variables_are_not_stored(prepare):
  secret = "Kh7-secret-word"
  works(prepare.run("true", options=("-e", f"TOKEN={secret}", *with_scripts(script(prepare)))))
  for folder, _, names in os.walk(prepare.qvm.cache / "layers"):
    for name in names:
      assert secret.encode() not in Path(folder, name).read_bytes()
  assert secret not in works(prepare.qvm("list", "--json")).stdout


def test_a_script_of_any_name_and_any_bytes(prepare):
  names = ["it's $(touch hacked); `x`\n.sh", "-e", 'ü \\ ".sh']
  for number, name in enumerate(names):
    path = prepare.scripts / name
    long = b"# \xff\xfe'\"$`\\%s!\n" * 20000
    path.write_bytes(long + f"printf '<%s>' '{number}' '$HOME' >>{prepare.log}\n".encode())
    result = works(prepare.qvm(*prepare.words(f"--prepare={name}", command=["true"]),
                               cwd=str(prepare.scripts)))  # fmt: skip
    assert "hacked" not in os.listdir(prepare.scripts), result.stderr
  assert ran(prepare) == ["<0><$HOME><1><$HOME><2><$HOME>"]
  assert os.listdir(prepare.folder / "home" / "runner") == os.listdir(
    prepare.folder / "home" / "user"
  )


def test_a_script_has_no_input_and_stops_at_the_first_failure(prepare):
  one = script(
    prepare, f"cat >>{prepare.log}; echo end >>{prepare.log}; false; echo never >>{prepare.log}\n"
  )
  result = prepare.run("true", options=with_scripts(one), input="typed\n")
  assert result.returncode == 125 and ran(prepare) == ["end"] and no_layer(prepare)


# --- Packages --------------------------------------------------------------------------------


def package_manager(prepare, text):
  """Put a stand-in for FreeBSD's pkg into the guest."""
  path = prepare.folder / "bin" / "pkg"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    f'#!/bin/sh\necho "$ASSUME_ALWAYS_YES,$(IFS=,; echo "$*")" >>{prepare.log}\n{text}'
  )
  path.chmod(0o755)


def test_packages_come_first_and_make_the_same_kind_of_layer(prepare):
  package_manager(prepare, "echo installed; exit 0\n")
  one = script(prepare)
  options = (*with_scripts(one), "--install", " git  cmake", "--install", "g++")
  result = works(prepare.run("echo command", options=options))
  assert ran(prepare) == ["yes,install,-y,git,cmake,g++", "setup.sh"]
  assert result.stdout == "command\n" and "\ninstalled\n" in result.stderr
  works(prepare.run("true", options=("--install", "git cmake g++", *with_scripts(one))))
  assert ran(prepare) == []
  (row,) = rows(prepare.qvm).values()
  assert row["script"] == "--install 'git cmake g++'"


def test_an_unknown_package(prepare):
  package_manager(prepare, "echo 'pkg: No packages available to install matching' >&2; exit 70\n")
  result = prepare.run("true", options=("--install", "nothing"))
  assert result.returncode == 125 and len(ran(prepare)) == 1
  assert lines(result.stderr)[-2:] == [
    "--install 'nothing' failed (exit code 70); no layer is made",
    "pkg: No packages available to install matching",
  ]
  assert no_layer(prepare)


@pytest.mark.parametrize("times, code", [(1, 0), (2, 125)])
def test_a_network_failure_is_tried_once_more(prepare, times, code):
  tries = prepare.scripts / "tries"
  text = f"echo x >>{tries}; [ $(wc -l <{tries}) -gt {times} ] && exit 0\n"
  package_manager(prepare, text + "echo 'pkg: pkg.example: Name could not be resolved'; exit 3\n")
  result = prepare.run("true", options=("--install", "git"))
  assert result.returncode == code and len(ran(prepare)) == 2
  assert "because of the network; trying it once more" in result.stderr
  assert len(layer_names(prepare)) == (not code)


def test_every_guest_has_a_package_manager():
  assert set(qvm_source.INSTALL) == set(qvm_source.OS_NAMES)
  assert all(line.count("{}") == 1 for line in qvm_source.INSTALL.values())


# --- What goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("end, code", [("exit 3", 3), ("kill -9 $$", 137), ("exit 255", 255)])
def test_a_script_that_fails(prepare, end, code):
  result = prepare.run(
    "true",
    options=with_scripts(script(prepare, f"for n in 1 2 3 4 5; do echo line $n; done\n{end}\n")),
  )
  assert result.returncode == 125 and result.stdout == ""
  assert lines(result.stderr)[-2].endswith(f"setup.sh failed (exit code {code}); no layer is made")
  assert "line 4 / line 5" in lines(result.stderr)[-1] and "line 2" not in lines(result.stderr)[-1]
  assert no_layer(prepare)


def test_a_script_that_hangs(prepare):
  one = script(prepare, "echo begun; exec sleep 600\n")
  result = prepare.run("true", options=("--prepare-timeout", "1.5", *with_scripts(one)))
  assert result.returncode == 125 and "begun\n" in result.stderr
  assert "not done within 1.5 s" in result.stderr and "--prepare-timeout" in result.stderr
  assert no_layer(prepare)


def test_a_guest_that_never_answers(prepare):
  prepare.play(listen=False)
  result = prepare.run("true", options=("--boot-timeout", "0.5", *with_scripts(script(prepare))))
  assert result.returncode == 125 and "ssh has not answered within 0.5 s; no layer" in result.stderr
  assert no_layer(prepare)


# How a script finds the stand-in's process: in the guest's command to shut down.
PID = "$(sed -n 's/.*-USR1 \\([0-9]*\\) .*/\\1/p' {})"


def test_a_guest_that_dies_while_it_is_set_up(prepare):
  one = script(prepare, f"kill -9 {PID.format('$(command -v shutdown)')}; sleep 600\n")
  result = prepare.run("true", options=with_scripts(one))
  assert result.returncode == 125 and "has ended (signal 9)" in result.stderr
  assert no_layer(prepare)


OTHER_SHUTDOWNS = {
  "it refuses": "exit 1",
  "somebody pulls the plug": f"kill -9 {PID.format('$0.was')}; sleep 600",
}


@pytest.mark.parametrize("way", OTHER_SHUTDOWNS)
def test_without_a_clean_power_off_there_is_no_layer(prepare, way):
  text = "there=$(command -v shutdown); cp $there $there.was\ncat >$there <<'END'\n"
  text += f"#!/bin/sh\n{OTHER_SHUTDOWNS[way]}\nEND\n"
  result = prepare.run("true", options=with_scripts(script(prepare, text)))
  assert result.returncode == 125 and "has not powered itself off" in result.stderr
  assert no_layer(prepare)


def test_a_power_off_that_takes_too_long(prepare):
  text = "cat >$(command -v shutdown) <<'END'\n#!/bin/sh\nexit 0\nEND\n"
  options = ("--boot-timeout", "15", *with_scripts(script(prepare, text)))
  result = prepare.run("true", options=options)
  assert result.returncode == 125 and "asking " in result.stderr
  assert "has not powered itself off; no layer is made" in result.stderr
  assert no_layer(prepare)


def until_it_runs(prepare, process):
  """Wait until the script says that it runs."""
  patience = time.monotonic() + DEADLINE
  while not prepare.log.exists():
    assert process.poll() is None and time.monotonic() < patience
    time.sleep(0.01)
  prepare.log.unlink()


def waiting(prepare, name="setup.sh"):
  """A script that goes on once the file `go` is there."""
  go = prepare.scripts / "go"
  return script(prepare, f"echo x >>{prepare.log}\nuntil [ -e {go} ]; do sleep 0.05; done\n", name)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_is_set_up(prepare, number, code):
  process = prepare.start("true", options=with_scripts(waiting(prepare)))
  until_it_runs(prepare, process)
  process.send_signal(number)
  process.communicate(timeout=DEADLINE)
  assert process.returncode == code and no_layer(prepare)


@pytest.mark.parametrize("point", ["booting", "running", "powering off"])
def test_kill_9(prepare, point, fifo, tmp_path):
  one = waiting(prepare)
  if point == "booting":
    prepare.play(listen=False, record=str(fifo))
  elif point == "powering off":
    stuck = (
      f"cat >$(command -v shutdown) <<'END'\n#!/bin/sh\necho x >>{prepare.log}; sleep 600\nEND\n"
    )
    one = script(prepare, stuck)
  process = prepare.start("true", options=with_scripts(one))
  heard(fifo, process) if point == "booting" else until_it_runs(prepare, process)
  prepare.kill(process)
  assert layer_names(prepare) == []
  works(prepare.qvm("list"))
  for path in (tmp_path / "tmp").glob("qvm-ssh-*.log"):
    path.unlink()  # of the killed qvm's ssh
  assert no_layer(prepare)
  prepare.play()
  (prepare.scripts / "go").touch()
  works(
    prepare.run("true", options=with_scripts(script(prepare) if point == "powering off" else one))
  )
  assert len(layer_names(prepare)) == 1 and prepare.nothing_left()


def test_a_layer_without_a_record_is_a_leftover(prepare):
  """A kill between the two leaves that."""
  one = script(prepare)
  works(prepare.run("true", options=with_scripts(one)))
  (name,) = layer_names(prepare)
  path_of(prepare, name, ".json").unlink()
  assert name in works(prepare.qvm("clean")).stdout and layer_names(prepare) == []
  works(prepare.run("true", options=with_scripts(one)))
  path_of(prepare, name, ".json").unlink()
  works(prepare.run("true", options=with_scripts(one)))
  assert ran(prepare) == ["setup.sh"] * 3 and layer_names(prepare) == [name]


@pytest.mark.parametrize("damage", ["cut", "empty record", "no disk"])
def test_a_damaged_layer_is_made_anew(prepare, damage):
  one = script(prepare)
  works(prepare.run("true", options=with_scripts(one)))
  (name,) = layer_names(prepare)
  if damage == "cut":
    os.chmod(path_of(prepare, name), 0o600)
    os.truncate(path_of(prepare, name), 70000)
  elif damage == "no disk":
    path_of(prepare, name).unlink()
  else:
    path_of(prepare, name, ".json").write_text("")
  works(prepare.run("true", options=with_scripts(one)))
  assert ran(prepare) == ["setup.sh"] * 2


def test_two_at_once(prepare, tmp_path):
  options = with_scripts(waiting(prepare))
  first = prepare.start("echo 1", options=options)
  until_it_runs(prepare, first)
  others = []
  for number in (2, 3):
    prepare.play(folder=str(tmp_path / f"guest{number}"))
    others.append(prepare.start(f"echo {number}", options=options))
  said = [process.stderr.readline() for process in others]
  assert all("another qvm is making the layer" in line for line in said)
  (prepare.scripts / "go").touch()
  for number, process in enumerate([first, *others], 1):
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (0, f"{number}\n"), err
    assert "another qvm is making" not in err
  assert ran(prepare) == [] and len(layer_names(prepare)) == 1 and prepare.nothing_left()


def test_whoever_waits_for_one_that_fails_makes_it(prepare, tmp_path):
  options = with_scripts(waiting(prepare))
  first = prepare.start("echo 1", options=options)
  until_it_runs(prepare, first)
  prepare.play(folder=str(tmp_path / "second"))
  second = prepare.start("echo 2", options=options)
  assert "another qvm is making the layer" in second.stderr.readline()
  first.terminate()
  first.communicate(timeout=DEADLINE)
  (prepare.scripts / "go").touch()
  out, err = second.communicate(timeout=DEADLINE)
  assert (second.returncode, out) == (0, "2\n"), err
  assert ran(prepare) == ["x"] and len(layer_names(prepare)) == 1


# --- Kept instances --------------------------------------------------------------------------


def test_a_kept_instance_begins_on_the_layer_and_keeps_its_disk(prepare):
  one, two = with_scripts(script(prepare)), with_scripts(script(prepare, name="two"))
  works(prepare.run("true", options=("--name", "vm", *one), rm=False))
  (name,) = layer_names(prepare)
  disk = prepare.qvm.cache / "instances" / "vm.qcow2"
  assert qvm_source.backing_file(str(disk)) == f"../layers/{name}.qcow2"
  works(prepare.run("true", options=("--name", "vm"), rm=False))
  works(prepare.run("true", options=("--name", "vm", *one), rm=False))
  assert ran(prepare) == ["setup.sh"]
  for more in (two, (*one, *two), (*one, "-e", "A=1")):
    result = prepare.run("true", options=("--name", "vm", *more), rm=False)
    assert result.returncode == 125 and f"vm began on {name}, not with these" in result.stderr
    assert "qvm rm vm" in lines(result.stderr)[-1]
  result = prepare.run("true", options=("--name", "vm", "--rebuild", *one), rm=False)
  assert result.returncode == 125 and "cannot be made anew: these lie on" in result.stderr
  assert ran(prepare) == [] and layer_names(prepare) == [name]
  fails(prepare.qvm("rm", name), f"the layer {name} is needed", "vm")
  works(prepare.qvm("clean", "--all"))
  assert layer_names(prepare) == [name]
  assert (prepare.qvm.cache / "base" / f"{FREEBSD}.qcow2").exists()
  works(prepare.qvm("rm", "vm", name))
  assert layer_names(prepare) == []


def test_an_instance_with_the_name_of_a_layer_keeps_what_it_needs(prepare):
  one, two = with_scripts(script(prepare)), with_scripts(script(prepare, name="two"))
  works(prepare.run("true", options=one))
  (low,) = layer_names(prepare)
  works(prepare.run("true", options=two))
  (other,) = set(layer_names(prepare)) - {low}
  works(prepare.run("true", options=("--name", other, *one), rm=False))
  fails(prepare.qvm("rm", low), f"the layer {low} is needed", other)
  works(prepare.run("true", options=("--name", low, *one), rm=False))
  fails(prepare.qvm("rm", low, other), f"the layer {low} is needed", *sorted([low, other]))
  assert layer_names(prepare) == sorted([low, other])


def test_an_instance_on_the_plain_image_is_not_set_up(prepare):
  works(prepare.run("true", options=("--name", "vm"), rm=False))
  result = prepare.run("true", options=("--name", "vm", *with_scripts(script(prepare))), rm=False)
  assert result.returncode == 125 and "vm began on the plain image" in result.stderr
  assert ran(prepare) == [] and layer_names(prepare) == []
  works(prepare.qvm("pull", *with_scripts(script(prepare)), "freebsd", "15.1"))  # needs no instance


@pytest.mark.parametrize("lost", [(".json",), (".json", ".qcow2"), (".qcow2",)])
def test_a_layer_is_never_made_anew_below_an_instance(prepare, lost):
  one = with_scripts(script(prepare))
  works(prepare.run("true", options=("--name", "vm", *one), rm=False))
  (name,) = layer_names(prepare)
  for end in lost:
    path_of(prepare, name, end).rename(prepare.scripts / ("kept" + end))
  works(prepare.qvm("clean"))
  assert path_of(prepare, name).exists() == (".qcow2" not in lost)
  for options in (one, ("--name", "vm", *one)):
    result = prepare.run("true", options=options, rm="--name" not in options)
    assert result.returncode == 125 and "these lie on what was there, or may: vm" in result.stderr
  if ".qcow2" in lost:
    result = prepare.run("true", options=("--name", "vm"), rm=False)
    assert result.returncode == 125 and f"{name}.qcow2 is gone" in result.stderr
  for end in lost:
    (prepare.scripts / ("kept" + end)).rename(path_of(prepare, name, end))
  works(prepare.run("true", options=("--name", "vm", *one), rm=False))
  assert ran(prepare) == ["setup.sh"]


def test_a_layer_that_is_cut_off_below_an_instance(prepare):
  works(prepare.run("true", options=("--name", "vm", *with_scripts(script(prepare))), rm=False))
  (name,) = layer_names(prepare)
  os.chmod(path_of(prepare, name), 0o600)
  os.truncate(path_of(prepare, name), 70000)
  result = prepare.run("true", options=("--name", "vm"), rm=False)
  assert result.returncode == 125 and f"the layer {name} is damaged" in result.stderr


def test_a_machine_in_the_background(prepare):
  one = with_scripts(script(prepare))
  for _ in range(2):
    prepare.up("vm", *one)
    assert works(prepare.qvm("ssh", "vm", "--", "echo up")).stdout == "up\n"
    works(prepare.qvm("stop", "vm"))
  assert ran(prepare) == ["setup.sh"]
  works(prepare.qvm("rm", "vm"))


# --- Life ------------------------------------------------------------------------------------


def aged(prepare, name, days):
  then = time.time() - days * 86400
  os.utime(path_of(prepare, name, ".json"), (then, then))


def test_list_shows_what_there_is_to_know(prepare):
  one = script(prepare, f'#!/bin/sh\n\n# comment\n  echo "hello" >>{prepare.log}\n')
  works(prepare.run("true", options=("--name", "vm", *with_scripts(one)), rm=False))
  (name,) = layer_names(prepare)
  works(prepare.run("true", options=with_scripts(one, script(prepare, name="b"))))
  (upper,) = set(layer_names(prepare)) - {name}
  row = rows(prepare.qvm)[name]
  assert (row["state"], row["os"], row["version"], row["arch"]) == (
    "prepared",
    "freebsd",
    "15.1",
    "x86-64",
  )
  assert row["script"].startswith('echo "hello" >>') and row["size"] > 0
  assert sorted(row["needed_by"]) == sorted([upper, "vm"])
  moment = time.strftime("%Y-%m-%dT%H", time.gmtime())
  assert row["created"][:11] == row["used"][:11] == moment[:11] or time.gmtime().tm_hour == 0
  aged(prepare, name, 3)
  table = works(prepare.qvm("list")).stdout.splitlines()
  (line,) = [line for line in table if line.startswith(name) and "hello" in line]
  assert " 3 d " in line and f"vm,{upper}" in line
  assert rows(prepare.qvm)["vm"]["script"] == ""
  assert name in works(prepare.qvm("completion", "words", "--", "rm")).stdout.split()
  fails(prepare.qvm("rm", name), upper, "vm")
  fails(prepare.qvm("rm", name, "vm"), upper)
  assert set(layer_names(prepare)) == {name, upper} and "vm" in rows(prepare.qvm)
  works(prepare.qvm("rm", name, "vm", upper))
  assert layer_names(prepare) == []


def test_clean_drops_what_was_not_used_for_30_days(prepare):
  a, b, c = (script(prepare, name=name) for name in "abc")
  works(prepare.run("true", options=with_scripts(a)))
  (low,) = layer_names(prepare)
  works(prepare.run("true", options=with_scripts(a, b)))
  (high,) = set(layer_names(prepare)) - {low}
  works(prepare.run("true", options=with_scripts(c)))
  (other,) = set(layer_names(prepare)) - {low, high}
  aged(prepare, low, 31)
  aged(prepare, other, 29)
  works(prepare.qvm("clean"))
  assert len(layer_names(prepare)) == 3  # the one below is needed
  aged(prepare, high, 31)
  works(prepare.run("true", options=with_scripts(a, b)))  # which is a use
  works(prepare.qvm("clean"))
  assert len(layer_names(prepare)) == 3
  aged(prepare, high, 31)
  assert low in works(prepare.qvm("clean", "--dry-run")).stdout
  works(prepare.qvm("clean"))
  assert layer_names(prepare) == [other]
  works(prepare.qvm("clean", "--all"))
  assert layer_names(prepare) == []


def test_what_cannot_be_read_keeps_all_layers(prepare):
  works(prepare.run("true", options=with_scripts(script(prepare))))
  (name,) = layer_names(prepare)
  aged(prepare, name, 100)
  disk = prepare.qvm.cache / "instances" / "vm.qcow2"
  disk.write_bytes(b"QFI\xfb")
  for words in (("clean",), ("clean", "--all")):
    assert "the disk of vm cannot be read" in works(prepare.qvm(*words)).stderr
    assert layer_names(prepare) == [name]
  fails(prepare.qvm("rm", name), "is needed", "vm")
  path_of(prepare, name, ".json").unlink()
  works(prepare.qvm("clean"))
  assert layer_names(prepare) == [name]
  disk.unlink()
  works(prepare.qvm("clean"))
  assert layer_names(prepare) == []


def test_a_newer_image_makes_layers_stale(prepare, server, image):
  one = with_scripts(script(prepare))
  works(prepare.run("true", options=(*one, "--name", "vm"), rm=False))
  (name,) = layer_names(prepare)
  works(prepare.run("true", options=(*one, *with_scripts(script(prepare, name="b")))))
  assert ran(prepare) == ["setup.sh", "b"]
  server.add_release("freebsd-builder", "v0.17.0", {f"{FREEBSD}.qcow2": image + bytes(512)})
  fails(prepare.qvm("pull", "--refresh", "freebsd", "15.1"), "depend on it: vm")
  assert len(layer_names(prepare)) == 2
  works(prepare.qvm("rm", "vm"))
  works(prepare.qvm("pull", "--refresh", "freebsd", "15.1"))
  assert layer_names(prepare) == []
  ssh_guest_as_qemu(prepare.qvm.cache)  # --refresh has fetched QEMU, too
  works(prepare.run("true", options=one))
  assert ran(prepare) == ["setup.sh"] and layer_names(prepare) != [name]


def test_a_newer_image_leaves_the_layers_on_an_own_one_of_its_name(
  prepare, server, image, tmp_path
):
  own = tmp_path / "mine" / f"{FREEBSD}.qcow2"
  own.parent.mkdir()
  own.write_bytes(image)
  words = ("--image", str(own), *with_scripts(script(prepare)))
  works(prepare.run("true", options=words, guest=("freebsd",)))
  before = layer_names(prepare)
  server.add_release("freebsd-builder", "v0.17.0", {f"{FREEBSD}.qcow2": image + bytes(512)})
  works(prepare.qvm("pull", "--refresh", "freebsd", "15.1"))
  assert layer_names(prepare) == before != []


def test_another_image_leaves_the_layers_that_instances_need(prepare):
  works(prepare.run("true", options=("--name", "vm", *with_scripts(script(prepare))), rm=False))
  works(prepare.run("true", options=with_scripts(script(prepare, name="b"))))
  cache = qvm_source.Cache(str(prepare.qvm.cache))
  plan = qvm_source.make_plan(
    qvm_source.Options(operands=("freebsd", "15.1"), platform="x86-64"),
    qvm_source.Host("linux", "x86-64"), cache, "",
  )  # fmt: skip
  (needed,) = qvm_source.layers_under(cache, cache.instance("vm").disk)[0]
  assert len(layer_names(prepare)) == 2
  qvm_source.drop_layers(plan, qvm_source.AssetRecord(sha256="another"))
  assert layer_names(prepare) == [needed]


def test_an_image_is_not_replaced_while_a_guest_on_it_is_set_up(prepare, server, image):
  process = prepare.start("echo fine", options=with_scripts(waiting(prepare)))
  until_it_runs(prepare, process)
  server.add_release("freebsd-builder", "v0.17.0", {f"{FREEBSD}.qcow2": image + bytes(512)})
  fails(prepare.qvm("pull", "--refresh", "freebsd", "15.1"), "depend on it: ")
  works(prepare.qvm("clean", "--all"))
  ssh_guest_as_qemu(prepare.qvm.cache)
  (prepare.scripts / "go").touch()
  out, err = process.communicate(timeout=DEADLINE)
  assert (process.returncode, out) == (0, "fine\n"), err


def test_an_image_that_is_replaced_before_a_guest_on_it_is_set_up(prepare, server, image, tmp_path):
  """As while it waits for another qvm: the layer would have the name of the older image's."""
  server.add_release("freebsd-builder", "v0.17.0", {f"{FREEBSD}.qcow2": image + bytes(512)})
  qemu = prepare.qvm.cache / "qemu/x86_64/bin/qemu-system-x86_64"
  shutil.copy(qemu, tmp_path / "qemu")
  refresh = prepare.qvm.command("pull", "--refresh", "freebsd", "15.1")
  refresh = ["sh", "-c", f'"$@" && cp {tmp_path}/qemu {qemu}', "sh", *refresh]
  words = prepare.words(*with_scripts(script(prepare)), command=["true"])
  run = with_another(prepare.qvm, words, "SetUp.__init__", refresh, tmp_path)
  assert run.returncode == 125 and "replaced meanwhile" in run.stderr
  assert layer_names(prepare) == []


def test_rebuild(prepare):
  one = with_scripts(script(prepare))
  works(prepare.run("true", options=one))
  (name,) = layer_names(prepare)
  before = path_of(prepare, name).stat().st_ino
  works(prepare.run("true", options=(*one, "--rebuild")))
  assert ran(prepare) == ["setup.sh"] * 2 and layer_names(prepare) == [name]
  assert path_of(prepare, name).stat().st_ino != before
  both = (*one, *with_scripts(script(prepare, name="b")))
  works(prepare.run("true", options=both))
  assert ran(prepare) == ["b"]
  works(prepare.run("true", options=(*both, "--rebuild")))
  assert ran(prepare) == ["setup.sh", "b"]


def test_a_rebuild_that_fails_leaves_the_layer(prepare):
  flag = prepare.scripts / "fail"
  one = with_scripts(script(prepare, f"[ ! -e {flag} ]\n"))
  works(prepare.run("true", options=one))
  (name,) = layer_names(prepare)
  before = path_of(prepare, name).stat().st_ino
  flag.touch()
  assert prepare.run("true", options=(*one, "--rebuild")).returncode == 125
  works(prepare.run("true", options=one))
  assert path_of(prepare, name).stat().st_ino == before


def test_two_rebuilds_at_once(prepare, tmp_path):
  """Who waited for the other's takes that; to make it anew would take it from the other."""
  (prepare.scripts / "go").touch()
  options = ("--rebuild", *with_scripts(waiting(prepare)))
  works(prepare.run("true", options=options))
  assert ran(prepare) == ["x"]
  (prepare.scripts / "go").unlink()
  first = prepare.start("echo 1", options=options)
  until_it_runs(prepare, first)
  prepare.play(folder=str(tmp_path / "second"))
  second = prepare.start("echo 2", options=options)
  assert "another qvm is making the layer" in second.stderr.readline()
  (prepare.scripts / "go").touch()
  for number, process in enumerate([first, second], 1):
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (0, f"{number}\n"), err
  assert ran(prepare) == [] and prepare.nothing_left()


def test_pull_keeps_clean_out_while_it_sets_up(prepare):
  downloads = prepare.qvm.cache / "downloads"
  one = script(prepare, f"flock -n {downloads} true || echo locked >>{prepare.log}\n")
  works(prepare.qvm("pull", *with_scripts(one), "freebsd", "15.1"))
  assert ran(prepare) == ["locked"]


def test_pull_makes_it_and_a_moved_cache_keeps_it(prepare, tmp_path):
  package_manager(prepare, "exit 0\n")
  words = ("--install", "git", *with_scripts(script(prepare)))
  works(prepare.qvm("pull", *words, "-e", "A=1", "-m", "1G", "freebsd", "15.1"))
  assert len(ran(prepare)) == 2 and prepare.nothing_left()
  elsewhere = tmp_path / "else" / "where"
  elsewhere.parent.mkdir()
  elsewhere.parent.chmod(0o700)
  prepare.qvm.cache.rename(elsewhere)
  prepare.qvm.cache = elsewhere
  prepare.qvm.env["QVM_CACHE_DIR"] = str(elsewhere)
  prepare.qvm.env["QVM_RELEASES_URL"] = "http://127.0.0.1:9/nowhere"
  works(prepare.run("true", options=(*words, "-e", "A=1")))
  assert ran(prepare) == [] and prepare.nothing_left()


def linked(folder, tmp_path):
  """Put a folder elsewhere, so deep that relative paths lead astray, and a link in its place."""
  elsewhere = tmp_path / "a" / "b" / "elsewhere"
  elsewhere.parent.mkdir(parents=True)
  folder.mkdir(exist_ok=True)
  folder.rename(elsewhere)
  folder.symlink_to(elsewhere)


def chain(disk):
  """The files that a disk lies on, from itself on, as QEMU finds them; all must be there."""
  command = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", str(disk)]
  return [image["filename"] for image in json.loads(subprocess.check_output(command))]


@pytest.mark.parametrize("folder", ["instances", "layers", "base"])
def test_a_folder_of_the_cache_that_is_a_link(prepare, tmp_path, folder):
  linked(prepare.qvm.cache / folder, tmp_path)
  one = script(prepare)
  works(prepare.run("true", options=("--name", "vm", *with_scripts(one)), rm=False))
  (name,) = layer_names(prepare)
  works(prepare.run("true", options=with_scripts(one, script(prepare, name="b"))))
  assert len(layer_names(prepare)) == 2
  for each in layer_names(prepare):
    assert chain(path_of(prepare, each))
  works(prepare.qvm("clean", "--all"))
  assert layer_names(prepare) == [name]
  assert (prepare.qvm.cache / "base" / f"{FREEBSD}.qcow2").exists()
  works(prepare.qvm("rm", "vm"))
  assert ran(prepare) == ["setup.sh", "b"]


def test_modes_and_command_line(prepare, fifo):
  prepare.play(record=str(fifo))
  process = prepare.start("true", options=with_scripts(script(prepare)))
  argv = heard(fifo, process)["argv"]
  drive = next(word for word in argv if "id=drive0" in word and "file=" in word)
  assert "-prepare-" in drive and "discard=unmap" in drive
  argv = heard(fifo, process)["argv"]
  drive = next(word for word in argv if "id=drive0" in word and "file=" in word)
  assert "-rm-" in drive and "discard=ignore" in drive
  process.communicate(timeout=DEADLINE)
  (name,) = layer_names(prepare)
  modes = {end: path_of(prepare, name, end).stat().st_mode & 0o777 for end in (".qcow2", ".json")}
  assert modes == {".qcow2": 0o400, ".json": 0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_becomes_full(prepare):
  cache = prepare.qvm.cache
  size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) + (16 << 20)
  aside = cache.with_name("aside")
  cache.rename(aside)
  with small_cache(prepare.qvm.home, size) as disk:
    subprocess.run(["cp", "-a", f"{aside}/.", str(cache)], check=True)
    process = prepare.start("true", options=with_scripts(waiting(prepare)))
    until_it_runs(prepare, process)
    disk.fill()
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 125 and "the disk is full" in err, err
    disk.empty()
    assert no_layer(prepare)


# --- Warm ------------------------------------------------------------------------------------


@pytest.fixture
def warm(prepare, tmp_path):
  prepare.note = tmp_path / "orders"
  prepare.control = lambda **how: prepare.play(control={"note": str(prepare.note), **how})
  prepare.control()
  return prepare


def orders(warm):
  found = warm.note.read_text().split() if warm.note.exists() else []
  warm.note.unlink() if found else None
  return found


def test_the_checkpoint_is_made_in_the_boot_that_sets_up(warm):
  options = ("--warm", *with_scripts(script(warm)))
  first = works(warm.run("echo one", options=options))
  assert first.stdout == "one\n" and first.stderr.count("is booting") == 1
  assert orders(warm) == SAVED + RESTORED + RESTORED
  prepared, checkpoint = layer_names(warm)
  assert "-prepared-" in prepared and "-warm-" in checkpoint and warm.nothing_left()
  second = works(warm.run("echo two", options=options))
  assert second.stdout == "two\n" and orders(warm) == RESTORED
  works(warm.run("true", options=options[1:]))
  assert ran(warm) == ["setup.sh"]
  plain = works(warm.run("true", options=("--warm",)))  # another checkpoint: that of the image
  assert plain.stderr.count("is booting") == 1
  works(warm.run("true", options=(*options, "-m", "2G")))  # and another, of the prepared disk
  assert ran(warm) == [] and len(layer_names(warm)) == 4
  (third,) = [
    name for name, row in rows(warm.qvm).items() if prepared in row["needed_by"] or row["needed_by"]
  ]
  assert third == prepared
  fails(warm.qvm("rm", prepared), "is needed", "-warm-")
  works(warm.run("true", options=(*options, "--rebuild")))
  assert (
    ran(warm) == ["setup.sh"] and len(layer_names(warm)) == 3
  )  # what was of the old disk is gone
  works(warm.qvm("rm", *layer_names(warm)))


@pytest.mark.parametrize("folder", ["instances", "layers", "base"])
def test_a_checkpoint_where_a_folder_of_the_cache_is_a_link(warm, tmp_path, folder):
  linked(warm.qvm.cache / folder, tmp_path)
  for words in ((), with_scripts(script(warm)), with_scripts(script(warm))):
    works(warm.run("true", options=("--warm", *words)))
  assert len(layer_names(warm)) == 3
  for name in layer_names(warm):
    assert os.path.samefile(chain(path_of(warm, name))[-1], warm.qvm.cache / BASE)
  assert ran(warm) == ["setup.sh"] and warm.nothing_left()


def test_a_script_that_fails_makes_no_checkpoint(warm):
  result = warm.run(
    "true", options=("--warm", *with_scripts(script(warm, f"echo x >>{warm.log}; exit 4\n")))
  )
  assert result.returncode == 125 and "failed (exit code 4)" in result.stderr
  assert ran(warm) == ["x"] and no_layer(warm)


@pytest.mark.parametrize("way", [{"fail": "migrate"}, {"die": "migrate-incoming"}])
def test_without_a_checkpoint_there_is_a_layer_all_the_same(warm, way):
  warm.control(**way)
  options = ("--warm", *with_scripts(script(warm)))
  result = works(warm.run("echo fine", options=options))
  assert result.stdout == "fine\n" and ran(warm) == ["setup.sh"] * 2
  assert sum("-prepared-" in name for name in layer_names(warm)) == 1 and warm.nothing_left()
  works(warm.run("true", options=options))
  assert ran(warm) == []


@pytest.mark.parametrize("order", ["stop", "migrate", "migrate-incoming", "cont"])
def test_kill_9_while_the_checkpoint_is_made(warm, order):
  warm.control(hang=order)
  options = ("--warm", *with_scripts(script(warm)))
  process = warm.start("true", options=options)
  patience = time.monotonic() + DEADLINE
  while not warm.note.exists() or order not in warm.note.read_text().split():
    assert time.monotonic() < patience
    time.sleep(0.01)
  warm.kill(process)
  warm.control()
  works(warm.run("true", options=options))
  assert ran(warm) == ["setup.sh"] * 2 and len(layer_names(warm)) == 2 and warm.nothing_left()


@pytest.mark.parametrize("way", ["warm", "prepare"])
def test_a_layer_without_room_for_its_record(warm, way):
  options = ["--warm"] if way == "warm" else with_scripts(script(warm))
  run = on_full_disk(warm.qvm, warm.words(*options, command=["true"]), "layers")
  assert (run.returncode, "the disk is full" in run.stderr) == (
    125 if way == "prepare" else 0,
    True,
  )
  assert no_layer(warm)


def test_no_room_to_note_how_a_checkpoint_did(warm):
  """That it failed, or that it works after a failure, is no reason to end the run."""
  words = warm.words("--warm", command=["true"])
  warm.control(fail="cont")
  run = works(on_full_disk(warm.qvm, words, "layers", "record.problem"))
  assert "told to fail" in run.stderr
  works(warm.qvm(*words))
  warm.control()
  run = works(on_full_disk(warm.qvm, words, "layers", "not record.failures"))
  assert "resumes from the checkpoint" in run.stderr


# --- The command line ------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
  (("--prepare", "nothing.sh"), "'nothing.sh' cannot be read: No such file"),
  (("--prepare", "."), "cannot be read: Is a directory"),
  (("--prepare", ""), "--prepare needs a value"),
  (("--install", ""), "invalid package name ''"),
  (("--install", "git -y"), "invalid package name '-y'"),
  (("--install", "git;reboot"), "invalid package name 'git;reboot'"),
  (("--install", "$(id)"), "invalid package name '$(id)'"),
  (("--install", "git\x01"), "invalid package name"),
  (("--install", "it's"), "invalid package name"),
  (("--prepare-timeout", "9"), "--prepare-timeout needs --prepare"),
  (("--rebuild",), "--rebuild needs --prepare"),
  (("--install", "git", "--prepare-timeout", "soon"), "invalid number of seconds 'soon'"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["run", "pull"])
def test_bad_words_fail_before_anything_is_downloaded(offline, command, words, said):
  fails(offline(command, *words, "freebsd", "15.1"), said, code=2)
  assert not offline.cache.exists()


def test_what_goes_together(offline, tmp_path):
  (tmp_path / "s").write_text("")
  fails(offline("pull", "-m", "2G", "freebsd", "15.1"), "--memory needs --prepare", code=2)
  fails(offline("pull", "--mirror", "m", "--install", "git", "freebsd", "15.1"), "--mirror", code=2)
  fails(offline("run", "-e", "A=1", "freebsd", "15.1"), "--env needs a command", code=2)
  dry = ("run", "--dry-run", "--name", "x", "freebsd", "15.1")
  plain = works(offline(*dry)).stdout
  assert works(offline(*dry, "--prepare", str(tmp_path / "s"), "-e", "A=1")).stdout == plain
  assert not offline.cache.exists()


def test_a_script_that_may_not_be_read(offline, tmp_path):
  path = tmp_path / "secret.sh"
  path.write_text("")
  path.chmod(0)
  words = ("run", "--prepare", str(path), "freebsd", "15.1")
  fails(offline(*words, preexec_fn=obey_modes), "cannot be read: Permission denied", code=2)


def test_a_stream_is_downloaded_first(prepare, server):
  """A layer lies on a whole image; that is said, as it is not what was asked for."""
  (prepare.qvm.cache / "base" / f"{FREEBSD}.qcow2").unlink()
  result = works(prepare.run("true", options=("--stream", *with_scripts(script(prepare)))))
  assert "the image is downloaded first" in result.stderr and len(layer_names(prepare)) == 1


# --- Which disks a layer lies on -------------------------------------------------------------


def of_image(prepare, path, *words, **more):
  return works(
    prepare.run("true", options=("--image", str(path), *words), guest=("freebsd",), **more)
  )


@pytest.mark.parametrize("another", [True, False], ids=["another", "none"])
def test_a_layer_on_an_own_image_that_has_been_moved(prepare, tmp_path, image, another):
  """It was known by the size and the time of its image, and so taken for one on the moved file."""
  own, old = tmp_path / "disk.qcow2", tmp_path / "old.qcow2"
  own.write_bytes(image)
  words = with_scripts(script(prepare))
  of_image(prepare, own, *words)
  own.rename(old)
  if another:
    own.write_bytes(image[:-1] + b"\1")  # a new build in its place
  of_image(prepare, old, *words, "--name", "vm", rm=False)
  assert chain(prepare.qvm.cache / "instances/vm.qcow2")[-1] == str(old)


@pytest.mark.parametrize("way", ["prepare", "warm"])
def test_two_own_images_of_one_size_and_time(prepare, tmp_path, image, way):
  """As in the Nix store, and in many an archive that can be reproduced."""
  paths = [tmp_path / "a.qcow2", tmp_path / "b.qcow2"]
  for number, path in enumerate(paths):
    path.write_bytes(image[:-1] + bytes([number]))
    os.utime(path, (1, 1))
  prepare.play(control={})
  words = with_scripts(script(prepare)) if way == "prepare" else ("--warm",)
  for path in paths:
    of_image(prepare, path, *words)
  assert {chain(path_of(prepare, name))[-1] for name in layer_names(prepare)} == set(
    map(str, paths)
  )


@pytest.mark.parametrize("there", [True, False], ids=["there", "gone"])
def test_an_own_image_with_the_name_of_a_layer(prepare, tmp_path, there):
  """Such as an exported layer: the overlay went back to the cache's at the second start."""
  works(prepare.run("true", options=with_scripts(script(prepare))))
  (name,) = layer_names(prepare)
  own = tmp_path / f"{name}.qcow2"
  subprocess.run(["qemu-img", "convert", "-O", "qcow2", path_of(prepare, name), own], check=True)
  if not there:
    works(prepare.qvm("rm", name))
  for _ in range(2):
    of_image(prepare, own, "--name", "vm", rm=False)
    assert chain(prepare.qvm.cache / "instances/vm.qcow2")[1:] == [str(own)]


def test_a_layer_is_not_replaced_below_one_that_is_being_made(prepare, tmp_path):
  begun, go = tmp_path / "begun", tmp_path / "go"
  os.mkfifo(begun)
  os.mkfifo(go)
  first, home = script(prepare, name="a"), prepare.folder
  second = script(prepare, f"echo x >{begun}; cat {go}\n", name="b")
  works(prepare.run("true", options=with_scripts(first)))
  prepare.folder = home.parent / "guest1"
  prepare.play()
  maker = prepare.start("true", options=with_scripts(first, second))
  begun.read_text()
  prepare.folder = home.parent / "guest2"
  prepare.play()
  works(prepare.run("true", options=("--rebuild", *with_scripts(first))))
  go.write_text("go\n")
  _, errors = maker.communicate(timeout=DEADLINE)
  assert maker.returncode == 125 and "has been replaced meanwhile" in errors
  assert len(layer_names(prepare)) == 1


def test_a_layer_is_not_replaced_below_a_checkpoint_that_is_being_made(prepare, tmp_path):
  prepare.play(control={})
  first = script(prepare, name="a")
  works(prepare.run("true", options=with_scripts(first)))
  other = {
    "SSH_GUEST": json.dumps({"folder": str(prepare.folder.parent / "guest2"), "control": {}})
  }
  rebuild = prepare.qvm.command(*prepare.words("--rebuild", *with_scripts(first), command=["true"]))
  words = prepare.words("--warm", *with_scripts(first), command=["true"])
  run = works(
    with_another(prepare.qvm, words, "Checkpoint.wait_for_login", rebuild, tmp_path, other)
  )
  assert "no checkpoint is created: " in run.stderr and "replaced meanwhile" in run.stderr
  assert not [name for name in layer_names(prepare) if "-warm-" in name]


def test_a_layer_is_not_deleted_below_an_instance_that_begins_meanwhile(prepare, tmp_path):
  begin = prepare.words("--name", "vm", *with_scripts(script(prepare)), rm=False, command=["true"])
  works(prepare.qvm(*begin))
  (name,) = layer_names(prepare)
  run = with_another(prepare.qvm, ["rm", "vm", name], "Lock.remove", prepare.qvm.command(*begin),
                     tmp_path, prepare.qvm.env, "words[0].path.endswith('vm.lock')")  # fmt: skip
  assert run.returncode == 1 and "is needed: it stays" in run.stderr
  assert path_of(prepare, name).exists(), "the new vm lies on it"


@pytest.mark.parametrize("place", ["is_whole", "layer_base"])
def test_a_layer_that_is_deleted_while_it_is_looked_at(prepare, tmp_path, place):
  words = prepare.words(*with_scripts(script(prepare)), command=["true"])
  works(prepare.qvm(*words))
  (name,) = layer_names(prepare)
  rm = prepare.qvm.command("rm", name)
  test = f"found.key and sys._getframe(1).f_code.co_name == {place!r}"
  run = with_another(prepare.qvm, words, "layer_record", rm, tmp_path, {}, test)
  if place == "is_whole":
    works(run)
    assert layer_names(prepare) == [name]
  else:
    assert run.returncode == 125 and f"{name}.qcow2 is gone" in run.stderr
