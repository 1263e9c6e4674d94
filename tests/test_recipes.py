"""The recipes in the README do what they say: their commands run as they stand there."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from support import FREEBSD, ROOT, processes_of, rewrite

import qvm as qvm_source

README = (ROOT / "README.md").read_text()
ACTION = ROOT / ".github" / "actions" / "run"
MAKEFILE = """
all:
\techo made >made
test: all
\techo tested >tested
"""
GUESTS = ("openbsd-7.9-x86-64", "netbsd-10.1-x86-64", "freebsd-15.1-arm64")


def blocks(language):
  return re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)


def block(language, word):
  (found,) = [text for text in blocks(language) if word in text]
  return found


@pytest.fixture
def project(guests, server, pyz, tmp_path):
  """A folder as a CI job checks it out, and a cache that has all guests."""
  base = guests.qvm.cache / "base"
  for name in GUESTS:
    for suffix in (".qcow2", ".json"):
      rewrite(base / (name + suffix), (base / (FREEBSD + suffix)).read_bytes())
  cpus = guests.qvm.cache / "qemu"
  shutil.copytree(cpus / "x86_64", cpus / "aarch64")
  program = cpus / "aarch64" / "bin" / "qemu-system-x86_64"
  program.rename(program.with_name("qemu-system-aarch64"))
  folder = tmp_path / "project"
  folder.mkdir()
  (folder / "Makefile").write_text(MAKEFILE)
  (folder / "setup.sh").write_text(f"echo x >>{tmp_path / 'set-up'}\n")
  shutil.copy(pyz, folder / "qvm.pyz")
  # Its guests take turns, as they have one folder; the tests of several at once are elsewhere.
  return folder


def shell(guests, folder, script, **env):
  """Run a step of a job, as its runner does."""
  result = subprocess.run(
    ["bash", "-e", "-o", "pipefail", "-c", script],
    cwd=str(folder),
    env={**guests.qvm.env, **env},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, (script, result.stdout, result.stderr)
  return result


def made(folder):
  """What the guest has made is here; removed again."""
  names = [name for name in ("made", "tested") if (folder / name).exists()]
  for name in names:
    (folder / name).unlink()
  return names


INSTALLERS = ("pkg", "pkg_add", "pkgin")


def filled(text, values):
  """A text with the values of its expressions in their places, as GitHub fills it in."""
  return re.sub(r"\$\{\{ (\S+) \}\}", lambda match: values[match.group(1)], str(text))


def test_github_actions(guests, project, server, image, tmp_path):
  """The README's job, by the steps of the action that it uses."""
  for guest in GUESTS[:2]:
    server.add_release(guest.split("-")[0] + "-builder", "v1.0.0", {guest + ".qcow2": image})
  (guests.folder / "bin").mkdir(parents=True)
  for name in INSTALLERS:
    (guests.folder / "bin" / name).write_text(f"#!/bin/sh\necho $* >>{tmp_path / 'installed'}\n")
    (guests.folder / "bin" / name).chmod(0o755)
  job = yaml.safe_load(block("yaml", "runs-on:"))["jobs"]["bsd"]
  (step,) = [step for step in job["steps"] if "/.github/actions/run@" in step["uses"]]
  # There is no v0: the release workflow takes no other tags than those of whole versions.
  assert step["uses"].endswith("/run@vX.Y.Z") and "The tag `vX.Y.Z` of" in README
  for guest in job["strategy"]["matrix"]["guest"]:
    given = {name: filled(text, {"matrix.guest": guest}) for name, text in step["with"].items()}
    assert run_action(guests, project, tmp_path, given) == ["made", "tested"]
  assert len((tmp_path / "installed").read_text().splitlines()) == len(INSTALLERS)
  assert processes_of(guests.qvm.cache) == {}


def run_action(guests, project, tmp_path, given):
  """Run the steps of the action in a project; returns what it has made there."""
  action = yaml.safe_load((ACTION / "action.yml").read_text())
  assert set(given) <= set(action["inputs"])
  values = {f"inputs.{name}": it.get("default", "") for name, it in action["inputs"].items()}
  values.update({f"inputs.{name}": text for name, text in given.items()})
  values["github.token"] = "none"
  output, tools = tmp_path / "output", tmp_path / "tools"
  tools.mkdir(exist_ok=True)
  (tools / "sudo").write_text("#!/bin/sh\n")  # this machine stays as it is
  (tools / "sudo").chmod(0o755)
  runner = {"GITHUB_OUTPUT": str(output), "RUNNER_TEMP": str(tmp_path), "CI": "true"}
  runner.update(GITHUB_ACTION_PATH=str(ACTION), RUNNER_OS="Linux", RUNNER_ARCH="X64")
  runner["PATH"] = f"{tools}:{guests.qvm.env['PATH']}"
  for step in action["runs"]["steps"]:
    if "run" in step:
      output.write_text("")
      env = {name: filled(text, values) for name, text in step.get("env", {}).items()}
      shell(guests, project, step["run"], **runner, **env)
      told = (line.partition("=") for line in output.read_text().splitlines())
      values.update({f"steps.{step.get('id')}.outputs.{name}": text for name, _, text in told})
    else:
      assert os.path.expanduser(step["with"]["path"]).endswith("/.cache/qvm")
      key = filled(step["with"]["key"], values)
      assert re.fullmatch(r"qvm-Linux-X64-[a-z]+-[0-9a-f]{16}-[0-9a-f]{16}", key)
  return made(project)


def test_the_packages_of_the_action_may_stand_on_lines_of_their_own(guests, project, tmp_path):
  (guests.folder / "bin").mkdir(parents=True)
  (guests.folder / "bin" / "pkg").write_text(f"#!/bin/sh\necho $* >{tmp_path / 'installed'}\n")
  (guests.folder / "bin" / "pkg").chmod(0o755)
  given = {"guest": "freebsd", "version": "15.1", "cpu": "x86-64", "install": "git\ncmake\n"}
  assert run_action(guests, project, tmp_path, {**given, "run": "make\nmake test\n"}) == [
    "made",
    "tested",
  ]
  assert "git cmake" in (tmp_path / "installed").read_text()


def test_the_action_with_all_it_can_be_given(guests, project, tmp_path):
  (project / "part").mkdir()
  (project / "setup.sh").write_text(f"echo x >>{tmp_path / 'set-up'}\n")
  given = {"guest": "freebsd", "version": "15.1", "cpu": "x86-64", "prepare": "setup.sh"}
  assert run_action(guests, project, tmp_path, {**given, "sync": "part", "run": "echo >x"}) == []
  assert (project / "part" / "x").read_text() == "\n"
  assert (tmp_path / "set-up").read_text() == "x\n"


def test_gitlab(guests, project):
  job = yaml.safe_load(block("yaml", "CI_PROJECT_DIR"))["bsd"]
  assert job["cache"]["paths"] == [".qvm"]
  guests.qvm.cache.rename(project / ".qvm")  # as restored from the job's cache
  variables = {
    name: value.replace("$CI_PROJECT_DIR", str(project)) for name, value in job["variables"].items()
  }
  (row,) = job["parallel"]["matrix"]
  for guest in row["GUEST"]:
    for line in job["script"]:
      shell(guests, project, line, GUEST=guest, **variables)
    assert made(project) == ["made", "tested"], guest
    work = guests.folder / "home" / "runner" / "work" / "project"
    assert sorted(os.listdir(work)) == ["Makefile", "made", "qvm.pyz", "setup.sh", "tested"]


def test_all_at_the_same_time(guests, project, server, image):
  for guest in GUESTS[:2]:
    server.add_release(guest.split("-")[0] + "-builder", "v1.0.0", {guest + ".qcow2": image})
  script = block("sh", "--junit")
  shell(guests, project, script)
  assert 'tests="3" failures="0"' in (project / "results.xml").read_text()
  assert made(project) == []


def test_several_steps(guests, project):
  for line in block("sh", "--detach").splitlines():
    shell(guests, project, line)
  assert made(project) == ["made", "tested"]
  assert guests.instances() == []


def test_kubernetes(guests, project, tmp_path):
  job = yaml.safe_load(block("yaml", "batch/v1"))
  assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
  (container,) = job["spec"]["template"]["spec"]["containers"]
  (script,) = container["args"]
  (volume,) = container["volumeMounts"]
  script = script.replace(volume["mountPath"] + "/qvm.pyz", str(project / "qvm.pyz"))
  subprocess.run(
    "git init -q && git add Makefile && git -c user.name=x -c user.email=x@y commit -qm x",
    shell=True, cwd=str(project), check=True,
  )  # fmt: skip
  names = {item["name"] for item in container["env"]}
  assert names == {"QVM_RELEASES_URL", "REPOSITORY"}
  for index in range(3):
    clone = tmp_path / f"clone{index}"
    result = subprocess.run(
      [*container["command"], script.replace("/tmp/project", str(clone))],
      env={**guests.qvm.env, "REPOSITORY": f"file://{project}", "JOB_COMPLETION_INDEX": str(index)},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert made(clone) == ["made", "tested"]


def test_the_mirror(guests, project, server, tmp_path):
  """pull --mirror as it stands there, and a run from what it has made."""
  lines = re.findall(r"(?m)^    (python3 qvm.pyz pull --mirror [^#\n]*[^#\n ])", README)
  assert len(lines) == 2
  mirror = tmp_path / "mirror"
  for line in lines:
    shell(guests, project, line.replace("/srv/qvm", str(mirror)))
  home = tmp_path / "other"
  home.mkdir()
  env = {"QVM_RELEASES_URL": f"file://{mirror}", "QVM_API_URL": "", "HOME": str(home)}
  shell(guests, project, "python3 qvm.pyz pull freebsd 15.1", **env)
  assert (home / ".cache/qvm/base/freebsd-15.1-x86-64.qcow2").exists()


def commands():
  """The words of each call of qvm in the README's examples, without comments."""
  fenced = re.findall(r"(?ms)^```sh\n(.*?)^```", README)
  indented = re.findall(r"(?m)^    (.*qvm(?:\.pyz)? .*)$", re.sub(r"(?ms)^```.*?^```", "", README))
  for line in "\n".join([*fenced, *indented]).splitlines():
    words = shlex.split(line, comments=True)
    for name in ("qvm", "qvm.pyz"):
      if name in words:
        yield words[words.index(name) + 1 :]


def test_every_command_in_the_readme_is_one():
  found = list(commands())
  assert len(found) > 25
  for words in found:
    qvm_source.parse_command_line(words)
  shown = {words[0] for words in found}
  assert set(qvm_source.COMMANDS) - shown <= {"search", "config", "completion"}


def test_everyday_commands(guests, project):
  """All that the README shows of a machine in the background, one after the other."""
  every = block("sh", "--name web").splitlines()
  first = next(line for line in every if "--name web" in line)
  lines = [line for line in every if not re.match("qvm (run|pull|doctor)", line)]
  (project / "bin").mkdir()
  (project / "bin" / "qvm").write_text(f'#!/bin/sh\nexec python3 {project}/qvm.pyz "$@"\n')
  (project / "bin" / "qvm").chmod(0o755)
  path = f"{project / 'bin'}:{guests.qvm.env['PATH']}"
  for line in [first, *lines]:
    shell(
      guests, project, line.replace("8080", "0").replace("doctor", "doctor --offline"), PATH=path
    )
  assert guests.instances() == []
