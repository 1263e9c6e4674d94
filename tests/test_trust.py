"""What is believed of servers: addresses that anybody on the way can change, and older releases."""

import json
import types

import pytest
from support import FREEBSD, PULL, fails, works

import qvm as qvm_source


@pytest.mark.parametrize("url, open_", [
  ("https://example.org/x", False), ("file:///srv/qvm", False), ("http://localhost", False),
  ("http://127.0.0.1:8000/x", False), ("http://[::1]:80", False), ("http://127.1.2.3", False),
  ("http://example.org", True), ("http://10.0.2.2:80/", True), ("http://localhost.evil.org", True),
  ("http://127.0.0.1.evil.org/", True), ("http://[::2]/", True),
])  # fmt: skip
def test_addresses_that_are_open(url, open_):
  assert qvm_source.is_open(url) is open_


@pytest.mark.parametrize("name", ["GITHUB_TOKEN", "GH_TOKEN"])
def test_a_token_goes_nowhere_in_the_clear(offline, name):
  env = {"QVM_API_URL": "http://api.example.org/x", name: "s3same"}
  result = offline(*PULL, env=env)
  fails(result, "QVM_API_URL: http://api.example.org/x is not https", "TOKEN", code=2)
  assert "s3same" not in result.stderr
  env["QVM_API_URL"] = "http://127.0.0.1:9/x"
  assert offline(*PULL, env=env).returncode == 1


@pytest.mark.parametrize("url, repo, digest, refused", [
  ("http://mirror.example.org", "resources", "", True),
  ("http://mirror.example.org", "resources", "aa", False),
  ("http://mirror.example.org", "freebsd-builder", "", False),
  ("http://127.0.0.1:8000", "resources", "", False),
  ("https://mirror.example.org", "resources", "", False),
])  # fmt: skip
def test_programs_over_http_want_a_digest(monkeypatch, url, repo, digest, refused):
  hash_ = types.SimpleNamespace(hexdigest=lambda: "aa")
  file = types.SimpleNamespace(hash=hash_, note=qvm_source.DownloadNote(url, "", 1))
  result = types.SimpleNamespace(name="x.tar", url=url, file=file, resumed=0)
  monkeypatch.setattr(qvm_source, "download", lambda *words: result)
  net = qvm_source.net_from({"QVM_RELEASES_URL": url})
  releases = types.SimpleNamespace(net=net, digest=lambda asset: digest)
  asset = qvm_source.Asset(repo, "v1", "x.tar")
  if refused:
    with pytest.raises(qvm_source.QvmError, match="http and without a digest"):
      qvm_source.fetch_asset(releases, asset, "/nowhere")
  else:
    assert qvm_source.fetch_asset(releases, asset, "/nowhere") is result


def test_an_open_mirror_is_told(offline):
  """It is asked through a proxy that is not there: this is about what is said before."""
  env = {"QVM_RELEASES_URL": "http://mirror.example.org/x", "QVM_API_URL": ""}
  env.update(http_proxy="http://127.0.0.1:9", no_proxy="")
  result = offline(*PULL, env=env)
  assert result.returncode == 1
  assert result.stderr.count("http://mirror.example.org/x is not https") == 1


def records(qvm):
  tree = (qvm.cache / "qemu" / "x86_64").resolve()
  return [qvm.cache / "base" / f"{FREEBSD}.json", tree / "release.json",
          qvm.cache / "bin" / "qemu-img.json"]  # fmt: skip


def pretend(qvm, release):
  """Let what is cached be of another release."""
  for path in records(qvm):
    record = json.loads(path.read_text())
    record.update(release=release, url=f"https://elsewhere/{release}/x")
    path.chmod(0o644)
    path.write_text(json.dumps(record))


def test_a_refresh_never_goes_back(full):
  """An older release can bring back faults that are known by now."""
  pretend(full, "v99.0.0")
  before = {path: path.read_bytes() for path in records(full)}
  result = works(full(*PULL, "--refresh"))
  assert result.stderr.count("older than v99.0.0 here, which is kept") == 3
  assert {path: path.read_bytes() for path in records(full)} == before


def test_a_refresh_goes_forward(full):
  pretend(full, "v0.0.1")
  result = works(full(*PULL, "--refresh"))
  assert "is kept" not in result.stderr
  assert all(json.loads(path.read_text())["release"] != "v0.0.1" for path in records(full))
