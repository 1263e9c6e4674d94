"""The recipes in the README do what they say: their commands run as they stand there."""

import os
import re
import shutil
import subprocess

import pytest
import yaml
from support import FREEBSD, ROOT, processes_of

README = (ROOT / "README.md").read_text()
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
      shutil.copy(base / (FREEBSD + suffix), base / (name + suffix))
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


def test_github_actions(guests, project, tmp_path):
  job = yaml.safe_load(block("yaml", "actions/cache"))["jobs"]["bsd"]
  output = tmp_path / "output"
  (tmp_path / "sudo").mkdir()
  (tmp_path / "sudo" / "sudo").write_text("#!/bin/sh\n")  # this machine stays as it is
  (tmp_path / "sudo" / "sudo").chmod(0o755)
  for row in job["strategy"]["matrix"]["include"]:
    values = {f"matrix.{key}": value for key, value in row.items()}
    values["github.token"] = "none"
    values["hashFiles('setup.sh')"] = "0123"

    def filled(text, values=values):
      return re.sub(r"\$\{\{ (\S+) \}\}", lambda match: values[match.group(1)], str(text))

    env = {name: filled(value) for name, value in job["env"].items()}
    env.update(GITHUB_OUTPUT=str(output), CI="true")
    env["PATH"] = f"{tmp_path / 'sudo'}:{guests.qvm.env['PATH']}"
    output.write_text("")
    for step in job["steps"]:
      if "run" in step:
        shell(guests, project, filled(step["run"]), **env)
      if step.get("id") == "newest":
        assert re.fullmatch(r"digest=[0-9a-f]{16}\n", output.read_text())
        values["steps.newest.outputs.digest"] = output.read_text()[7:-1]
      if "with" in step:
        assert os.path.expanduser(step["with"]["path"]).endswith("/.cache/qvm")
        assert re.fullmatch(r"qvm(-[\w.-]+)+", filled(step["with"]["key"]))
    assert made(project) == ["made", "tested"], row
  assert (tmp_path / "set-up").read_text() == "x\n" * len(job["strategy"]["matrix"]["include"])
  assert processes_of(guests.qvm.cache) == {}


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


def test_all_at_the_same_time(guests, project):
  script = block("sh", "failed")
  shell(guests, project, script)
  logs = sorted(path.name for path in project.glob("*.log"))
  assert logs == ["freebsd.log", "netbsd.log", "openbsd.log"]
  assert all("echo tested" in (project / name).read_text() for name in logs)
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
  lines = re.findall(r"(?m)^    (python3 qvm.pyz pull --mirror .*?) +#", README)
  assert len(lines) == 2
  mirror = tmp_path / "mirror"
  for line in lines:
    shell(guests, project, line.replace("/srv/qvm", str(mirror)))
  home = tmp_path / "other"
  home.mkdir()
  env = {"QVM_RELEASES_URL": f"file://{mirror}", "QVM_API_URL": "", "HOME": str(home)}
  shell(guests, project, "python3 qvm.pyz pull freebsd 15.1", **env)
  assert (home / ".cache/qvm/base/freebsd-15.1-x86-64.qcow2").exists()
