"""The zipapp: the same bytes wherever it is built, and the same program with every Python."""

import json
import marshal
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest
from support import DEADLINE, FREEBSD, ROOT, Qvm, ended, fails, free_port, obey_modes, works
from support_pythons import OUTDATED, every_python, own_python

import qvm as qvm_source

RUN = ("run", "freebsd", "15.1")


def build(folder, python=sys.executable, output="qvm.pyz", mask=0o022, cwd=None, **env):
  """Build in a copy of the project; returns the path of the zipapp."""
  folder.mkdir(parents=True)
  for name in ("qvm.py", "build_zipapp.py"):
    shutil.copyfile(ROOT / name, folder / name)
  command = [python, str(folder / "build_zipapp.py"), *([str(folder / output)] if output else [])]
  subprocess.run(
    command, env={**os.environ, **env}, cwd=cwd, check=True, preexec_fn=lambda: os.umask(mask)
  )
  return folder / (output or "qvm.pyz")


# --- Building --------------------------------------------------------------------------------


def test_builds_are_the_same_to_the_byte(tmp_path):
  expected = build(tmp_path / "first").read_bytes()
  for number, how in enumerate(
    [
      {"TZ": "Asia/Kathmandu"},
      {"TZ": "America/St_Johns", "SOURCE_DATE_EPOCH": "1"},
      {"SOURCE_DATE_EPOCH": "4102444800"},
      {"mask": 0o077},
      {"mask": 0},
      {"cwd": "/"},
      {"output": ""},
      {"output": "other name.zip"},
      {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
      {"PYTHONHASHSEED": "7", "PYTHONOPTIMIZE": "2"},
    ]
  ):
    pyz = build(tmp_path / str(number), **how)
    assert pyz.read_bytes() == expected, how
    assert stat.S_IMODE(pyz.stat().st_mode) == 0o755, how


@pytest.mark.parametrize("when", [0, 1, 315532800, 4102444800])
def test_the_date_and_mode_of_the_source_do_not_matter(tmp_path, when):
  expected = build(tmp_path / "first").read_bytes()
  folder = tmp_path / "second"
  build(folder)
  os.utime(folder / "qvm.py", (when, when))
  (folder / "qvm.py").chmod(0o700)
  subprocess.run([sys.executable, "build_zipapp.py"], cwd=folder, check=True)
  assert (folder / "qvm.pyz").read_bytes() == expected
  assert sorted(os.listdir(folder)) == ["build_zipapp.py", "qvm.py", "qvm.pyz"]


@every_python
def test_each_python_builds_the_same(tmp_path, pyz, python):
  assert build(tmp_path / "built", python=python).read_bytes() == pyz.read_bytes()


def test_another_source_makes_another_zipapp(tmp_path, pyz):
  folder = tmp_path / "built"
  build(folder)
  with open(folder / "qvm.py", "a") as file:
    file.write("# more\n")
  subprocess.run([sys.executable, "build_zipapp.py"], cwd=folder, check=True)
  assert (folder / "qvm.pyz").read_bytes() != pyz.read_bytes()


def test_what_is_in_it(pyz):
  assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
  with zipfile.ZipFile(pyz) as archive:
    assert archive.testzip() is None
    assert archive.namelist() == ["__main__.py", "qvm.py"]
    assert archive.read("qvm.py") == (ROOT / "qvm.py").read_bytes()


def test_a_build_that_fails_leaves_the_old_one(tmp_path):
  pyz = build(tmp_path / "built")
  before = pyz.read_bytes()
  (tmp_path / "built/qvm.py").unlink()
  command = [sys.executable, str(tmp_path / "built/build_zipapp.py")]
  assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0
  assert pyz.read_bytes() == before
  assert sorted(os.listdir(tmp_path / "built")) == ["build_zipapp.py", "qvm.pyz"]


# --- Running ---------------------------------------------------------------------------------


@pytest.fixture
def path_with_python(tmp_path):
  """A PATH on which python3 is the interpreter of the tests."""
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin/python3").symlink_to(sys.executable)
  return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


@pytest.mark.parametrize("form", ["itself", "link", "link to a link", "on PATH", "renamed"])
def test_it_can_be_executed(offline, pyz, tmp_path, path_with_python, form):
  names = {"itself": pyz, "on PATH": "qvm"}
  (tmp_path / "bin/qvm").symlink_to(pyz)
  (tmp_path / "link").symlink_to("bin/qvm")
  shutil.copy(pyz, tmp_path / "a b")
  names.update({"link": tmp_path / "bin/qvm", "link to a link": tmp_path / "link"})
  command = str(names.get(form, tmp_path / "a b"))
  env = {**offline.env, "PATH": path_with_python}
  command = shutil.which(command, path=path_with_python) if form == "on PATH" else command
  run = subprocess.run(
    [command, "config", "print-path"], env=env, capture_output=True, text=True, cwd="/"
  )
  assert (run.returncode, run.stdout, run.stderr) == (0, f"{offline.cache}\n", "")


@every_python
def test_it_writes_nothing_beside_itself(offline, pyz, tmp_path, python):
  folder = tmp_path / "read only"
  folder.mkdir()
  shutil.copy(pyz, folder / "qvm.pyz")
  folder.chmod(0o555)
  offline.program = folder / "qvm.pyz"
  del offline.env["PYTHONDONTWRITEBYTECODE"]
  before = folder.stat().st_mtime_ns
  for words in (["list"], ["--version"], ["--dry-run", *RUN]):
    run = offline(*words, python=python, preexec_fn=obey_modes, cwd=folder)
    assert (run.returncode, run.stderr) == (0, "")
  assert os.listdir(folder) == ["qvm.pyz"] and folder.stat().st_mtime_ns == before
  assert list(offline.home.iterdir()) == []


def test_the_exit_code_of_main_is_the_programs(offline, pyz):
  offline.program = pyz
  fails(offline("run", "plan9", "4"), "plan9", code=2)
  fails(offline("rm", "x"), "no instance x")
  assert offline("--version").stdout == f"qvm {qvm_source.__version__}\n"


@pytest.mark.parametrize("python", OUTDATED.values(), ids=OUTDATED)
@pytest.mark.parametrize("words", [(), ("--help",), RUN])
def test_a_python_that_is_too_old_is_told(offline, pyz, python, words):
  offline.program = pyz
  run = offline(*words, python=python)
  version = next(version for version, path in OUTDATED.items() if path == python)
  expected = f"qvm: needs Python 3.6 or newer, and this is {version}\n"
  assert (run.returncode, run.stdout, run.stderr) == (1, "", expected)
  assert list(offline.home.iterdir()) == []


@every_python
def test_the_whole_flow_with_each_python(tmp_path, pyz, server, python):
  (tmp_path / "home").mkdir()
  qvm = Qvm(tmp_path / "home", pyz, server)
  port = str(free_port())
  qvm.play(record=str(tmp_path / "record"), stdout="the console\n", exit=7)
  run = qvm(*RUN, "--ssh-port", port, python=python)
  assert (run.returncode, run.stdout) == (7, "the console\n"), run.stderr
  assert run.stderr.splitlines()[-1] == f"qvm: ssh -p {port} runner@127.0.0.1"
  argv = qvm.record(tmp_path / "record")["argv"]
  dry = qvm("--dry-run", *RUN, "--ssh-port", port, python=python)
  assert shlex.split(dry.stdout) == argv
  server.clear_log()
  assert qvm(*RUN, "--rm", python=python).returncode == 7
  assert server.started == 0
  run = qvm("list", "--json", python=python)
  assert [row["name"] for row in json.loads(run.stdout)] == [FREEBSD]
  run = qvm("list", python=python)
  assert (run.returncode, run.stdout.count("\n"), run.stderr) == (0, 6, "")
  run = qvm("rm", FREEBSD, python=python)
  assert (run.returncode, run.stdout, run.stderr) == (0, f"{FREEBSD}\n", "")
  assert not [path for path in qvm.files() if path.startswith("instances/")]


@every_python
def test_a_stopped_download_with_each_python(tmp_path, pyz, server, python):
  """Threads that wait for the network must not keep, or break, the end of the process."""
  (tmp_path / "home").mkdir()
  fault = server.fault("releases/latest", origin="github", times=None, stall="headers")
  qvm = Qvm(tmp_path / "home", pyz, server)
  with ended(qvm.start(*RUN, "--rm", env={"QVM_TIMEOUT": "3600"}, python=python)) as process:
    assert fault.reached.wait(DEADLINE)
    process.terminate()
    assert process.wait(DEADLINE) == 143
    assert process.stderr.read() == ""
  assert not qvm.files() or {path.split("/")[0] for path in qvm.files()} <= {"downloads"}


@every_python
def test_bad_words_and_help_with_each_python(offline, pyz, python):
  offline.program = pyz
  plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  fails(offline("run", "plan9", "4", python=python), "plan9", "freebsd", code=2)
  for env in ({}, plain):
    run = offline("run", "--help", python=python, env=env)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--ssh-port" in run.stdout


# --- Its compiled code -----------------------------------------------------------------------


def kept(qvm):
  """The files in which the compiled code is kept."""
  return sorted((qvm.cache / "code").glob("*"))


@pytest.fixture
def packed(full, pyz):
  """The zipapp with everything in its cache but its code."""
  full.program = pyz
  for path in kept(full):
    path.unlink()
  return full


@every_python
def test_the_code_is_kept_for_the_next_start(packed, python):
  assert packed("run", "--rm", "freebsd", "15.1", python=python).returncode == 0
  (path,) = kept(packed)
  assert path.stat().st_mode & 0o777 == 0o600
  before = path.read_bytes()
  code = "import marshal, sys; exec(marshal.load(open(sys.argv[1], 'rb')), {'__name__': 'x'})"
  subprocess.run([python, "-c", code, str(path)], check=True)
  assert packed("run", "--rm", "freebsd", "15.1", python=python).returncode == 0
  assert kept(packed) == [path] and path.read_bytes() == before


@own_python
def test_the_kept_code_is_what_runs(packed):
  works(packed("run", "--rm", "freebsd", "15.1"))
  (path,) = kept(packed)
  code = "import os\ndef main(): os.write(1, b'kept\\n'); os._exit(5)"
  path.write_bytes(marshal.dumps(compile(code, "x", "exec")))
  result = packed("list")
  assert (result.returncode, result.stdout) == (5, "kept\n")
  path.chmod(0o660)  # others may have written it
  assert packed("list").returncode == 0
  path.chmod(0o600)
  works(packed("list", env={"QVM_CACHE_DIR": str(packed.home / "elsewhere")}))


@pytest.mark.parametrize(
  "content", [b"", b"nonsense", b"\xe3", None], ids=["", "text", "cut", "dir"]
)
def test_kept_code_that_is_damaged(packed, content):
  works(packed("run", "--rm", "freebsd", "15.1"))
  (path,) = kept(packed)
  if content is None:
    path.unlink()
    path.mkdir()
  else:
    path.write_bytes(content)
  works(packed("run", "--rm", "freebsd", "15.1"))


def test_another_version_has_code_of_its_own(packed, tmp_path):
  works(packed("run", "--rm", "freebsd", "15.1"))
  folder = tmp_path / "other"
  folder.mkdir()
  for name in ("qvm.py", "build_zipapp.py"):
    shutil.copyfile(ROOT / name, folder / name)
  text = (folder / "qvm.py").read_text()
  (folder / "qvm.py").write_text(text.replace('__version__ = "', '__version__ = "9'))
  subprocess.run([sys.executable, str(folder / "build_zipapp.py")], check=True)
  first = kept(packed)
  packed.program = folder / "qvm.pyz"
  assert packed("--version").stdout.startswith("qvm 9")
  works(packed("run", "--rm", "freebsd", "15.1"))
  assert len(kept(packed)) == 2
  works(packed("clean"))
  assert len(kept(packed)) == 1 and kept(packed) != first


@pytest.mark.parametrize("words", [("list",), ("run", "--dry-run", "freebsd", "15.1"), ("--help",)])
def test_commands_that_change_nothing_keep_no_code(packed, words):
  works(packed(*words))
  assert kept(packed) == []


def hostile(path):
  """Code that would be executed if it were taken."""
  path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
  path.write_bytes(marshal.dumps(compile("def main(): print('hostile', flush=True)", "x", "exec")))
  path.chmod(0o600)


@pytest.mark.parametrize(
  "way", ["file", "dangling", "folder", "writable folder", "writable cache", "fifo"]
)
def test_kept_code_that_others_may_have_put_there(packed, tmp_path, way):
  """Through a link, or a folder in which others can write, it is never unmarshalled."""
  works(packed("run", "--rm", "freebsd", "15.1"))
  (path,) = kept(packed)
  elsewhere = tmp_path / "elsewhere"
  hostile(elsewhere / path.name)
  if way in ("file", "dangling"):
    path.unlink()
    path.symlink_to(elsewhere / (path.name if way == "file" else "nothing"))
  elif way == "folder":
    shutil.rmtree(path.parent)
    path.parent.symlink_to(elsewhere)
  elif way == "fifo":
    path.unlink()
    os.mkfifo(path)
  else:
    hostile(path)
    (path.parent if "folder" in way else packed.cache).chmod(0o777)
  result = packed("list")
  assert "hostile" not in result.stdout + result.stderr
  assert result.stdout.startswith("NAME") or result.returncode == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", ["file", "folder", "cache"])
def test_kept_code_of_another_user(packed, whose):
  works(packed("run", "--rm", "freebsd", "15.1"))
  (path,) = kept(packed)
  hostile(path)
  os.chown({"file": path, "folder": path.parent, "cache": packed.cache}[whose], 12345, -1)
  assert "hostile" not in packed("list").stdout


@own_python
def test_kept_code_in_a_cache_behind_a_link(packed, tmp_path):
  """The cache itself may be a link: its owner counts."""
  works(packed("run", "--rm", "freebsd", "15.1"))
  (path,) = kept(packed)
  hostile(path)
  packed.cache.rename(tmp_path / "real")
  packed.cache.symlink_to(tmp_path / "real")
  assert packed("list").stdout == "hostile\n"


def test_the_manual_page_has_what_help_shows(tmp_path):
  page = tmp_path / "qvm.1"
  subprocess.run([sys.executable, "-B", str(ROOT / "build_zipapp.py"), str(page)], check=True)
  text = page.read_text()
  assert page.stat().st_mode & 0o777 == 0o644
  for name, command in qvm_source.COMMANDS.items():
    assert f"\n.SS qvm {name}" in text
    assert all(example.replace("-", "\\-") in text for example in command.examples)
  for option in qvm_source.OPTIONS:
    shown = option.field in qvm_source.EVERYWHERE or option.flags[-1].replace("-", "\\-") in text
    assert shown, option
  assert not re.search(r"(?m)^['.](?!SH|SS|TH|TP|PP|nf|fi|RS|RE|B )", text)


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff")
def test_groff_has_nothing_to_say_about_the_manual_page(tmp_path):
  page = tmp_path / "qvm.1"
  subprocess.run([sys.executable, "-B", str(ROOT / "build_zipapp.py"), str(page)], check=True)
  run = subprocess.run(
    ["groff", "-man", "-ww", "-Kutf8", "-Tutf8", str(page)], stdout=-1, stderr=-1
  )
  assert (run.returncode, run.stderr) == (0, b"")
