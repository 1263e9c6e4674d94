"""The stand-in guests' tools behave as the table in GUESTS.md says, row by row."""

import os
import stat
import subprocess
import tarfile

import guest_tools
import pytest

pytestmark = pytest.mark.skipif(
  guest_tools.missing() != [], reason=f"not there: {guest_tools.missing()}"
)
END = bytes(1024)
OF_PAX = ("openbsd", "netbsd")


@pytest.fixture(scope="module", params=list(guest_tools.SYSTEMS))
def box(request, tmp_path_factory):
  return guest_tools.Toolbox(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def work(box, tmp_path):
  """A folder of the test's own, in which it runs lines."""

  class Work:
    family = box.name.split("-")[0]
    path = tmp_path

    def run(self, line, data=b"", code=0):
      result = box.run("exec /bin/sh -c " + quoted(line), data, cwd=str(tmp_path))
      self.stderr = result.stderr
      assert code is None or result.returncode == code, result
      self.code = result.returncode
      return result.stdout

    def extract(self, *members, code=0, end=END):
      self.run("exec tar -xpf -", b"".join(members) + end, code)

    def mode(self, name):
      return stat.S_IMODE(os.lstat(tmp_path / name).st_mode)

    def names(self):
      found = []
      for above, folders, files in os.walk(tmp_path):
        found += [os.path.relpath(os.path.join(above, name), tmp_path) for name in folders + files]
      return sorted(found)

  return Work()


def quoted(line):
  return "'" + line.replace("'", "'\\''") + "'"


def header(name, form=tarfile.GNU_FORMAT, **more):
  info = tarfile.TarInfo(name)
  info.mode, info.mtime = 0o644, 1600000000
  for key, value in more.items():
    setattr(info, key, value)
  return info.tobuf(form, "utf-8", "surrogateescape")


def file(name, data=b"x", **more):
  return header(name, size=len(data), **more) + data + bytes(-len(data) % 512)


def folder(name, mode=0o755, **more):
  return header(name, type=tarfile.DIRTYPE, mode=mode, **more)


def link(name, target, **more):
  return header(name, type=tarfile.SYMTYPE, linkname=target, mode=0o777, **more)


def checked(block):
  """A header whose bytes were changed, with the right checksum."""
  block = bytearray(block)
  block[148:156] = b" " * 8
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block)


# --- shells ----------------------------------------------------------------------------------


def test_the_shells(box):
  probe = b'echo "${KSH_VERSION-} ${BASH_VERSION-} ${.sh.version-}"'
  family = box.name.split("-")[0]
  if box.name == "freebsd-csh":
    assert b"csh" in box.run("echo $shell:t").stdout
  elif family == "omnios":
    assert b"93u+m" in box.run(probe.decode()).stdout
  else:
    said = box.run('echo "${KSH_VERSION-}|${BASH_VERSION-}"').stdout
    known = {"openbsd": b"MIRBSD", "haiku": b"|5"}.get(family, b"|\n")
    assert known in said, said
  name = {"freebsd-csh": "csh"}.get(box.name, "sh")
  assert os.path.basename(box.run("echo $SHELL").stdout.decode().strip()) == name


def test_bin_sh_is_the_systems(work):
  said = work.run(
    "(eval 'echo ${.sh.version}') 2>/dev/null; echo \"|${KSH_VERSION-}|${BASH_VERSION-}\"",
    code=None,
  )
  known = {"omnios": b"93u+m", "openbsd": b"MIRBSD", "haiku": b"|5"}.get(work.family, b"||\n")
  assert known in said, said


def test_no_other_tools(work):
  tools = work.run("for t in find tar sort comm pax gfind gtar busybox python3 rsync perl stat xz; "
                   "do command -v $t >/dev/null && echo $t; done; :").decode().split()  # fmt: skip
  more = {"freebsd": {"stat"}, "openbsd": {"stat", "pax"}, "netbsd": {"stat", "pax"},
          "omnios": {"pax", "gfind", "gtar"}, "haiku": {"stat"}}[work.family]  # fmt: skip
  assert set(tools) == {"find", "tar", "sort", "comm"} | more


@pytest.mark.parametrize("number", [9, 15])
def test_exit_code_after_a_signal(work, number):
  said = int(work.run(f"/bin/sh -c 'kill -{number} $$'; echo $?"))
  assert said == number + (256 if work.family == "omnios" else 128)


def test_modes_are_obeyed(work):
  """Also when root runs the tests."""
  if work.family == "haiku":
    pytest.skip("all are root")
  work.run("mkdir c; echo x >c/f; chmod 000 c/f; chmod 555 c; ! cat c/f && ! echo x >c/g")
  assert work.names() == ["c", "c/f"]


def test_printf_with_a_zero(work):
  said = work.run("printf '%b' 'a\\0000b' 'c'; printf '%s' '\\0000'")
  assert said == (b"ac" if work.family == "freebsd" else b"a\0bc") + b"\\0000"


def test_kill_of_a_group(work):
  """Also with an IFS that does not split."""
  work.run("IFS=; kill -0 -- -1 && kill -s 0 -- -1 && kill -0 $$; trap : TERM; kill -- $$; kill $$")
  complaints = work.stderr.count(b"illegal process id: --")
  assert complaints == (3 if work.family == "netbsd" else 0), work.stderr


def test_date(work):
  right = {"omnios": "-u 112603142026.05", "haiku": '-u -s "2026-11-26 03:14:05"'}
  work.run("date " + right.get(work.family, "-u 202611260314.05"))
  wrong = {"omnios": "-u 202611260314.05", "haiku": "-u 202611260314.05"}
  work.run("date " + wrong.get(work.family, "-u 112603142026.05"), code=1)
  assert len(work.run("date +%s")) == 11


@pytest.mark.parametrize("line", ["sort -z", "touch --date=2000-01-01 a", "date -d 2000-01-01",
                                  "find . -printf x", "stat -c %s .", "comm -z a a", "rm --force a",
                                  "find", "touch -d @0 a"])  # fmt: skip
def test_what_only_gnu_has(work, line):
  """A script that takes it for granted must not pass."""
  granted = line == "sort -z" and work.family in ("freebsd", "openbsd")
  (work.path / "a").write_bytes(b"")
  work.run(f"exec {line} </dev/null", code=None)
  assert (work.code == 0) == (granted or work.family == "haiku"), (work.code, work.stderr)


# --- tar: reading ----------------------------------------------------------------------------


def test_long_options_of_tar(work):
  work.run("exec tar --create --file=- .", code=None)
  assert (work.code == 0) == (work.family in ("freebsd", "haiku"))


def test_no_recursion(work):
  (work.path / "d").mkdir()
  (work.path / "d/f").write_text("x")
  data = work.run("exec tar --no-recursion -cf - d", code=None)
  if work.family in ("openbsd", "omnios"):
    assert work.code != 0
    data = work.run("echo d | exec pax -w -d")
  listing = work.run("exec tar -tf -", data).decode().split()
  assert [name.rstrip("/") for name in listing] == ["d"]


def test_a_size_in_base_256(work):
  """A sparse file of 1 kB, as GNU tar and Python write sizes from 8 GiB on."""
  block = bytearray(header("big"))
  block[124:136] = b"\x80" + (1024).to_bytes(11, "big")
  work.extract(checked(block), bytes(1024), file("after"))
  if work.family in ("freebsd", "haiku"):
    assert work.names() == ["after", "big"]
    assert (work.path / "big").stat().st_size == 1024
  else:
    assert work.names() == ["big"] and (work.path / "big").stat().st_size == 0


def test_long_names_and_links(work):
  name, target = "n" * 150, "t" * 150
  work.extract(file(name), file("d/" + name), link("k", target), file("z"),
               code=1 if work.family == "omnios" else 0)  # fmt: skip
  assert {name, "d/" + name, "k", "z"} <= set(work.names())
  assert os.readlink(work.path / "k") == target[: 100 if work.family == "omnios" else 150]
  assert (b"typeflag 'K' not recognized" in work.stderr) == (work.family == "omnios")


@pytest.mark.parametrize("length", [120, 250])
def test_long_names_of_folders(work, length):
  name = "/".join(["d" * (length // 2)] * 2)
  work.extract(folder(name), file(name + "/" + "f" * 120))
  assert name + "/" + "f" * 120 in work.names()


def test_pax_headers(work):
  form = tarfile.PAX_FORMAT
  code = 1 if work.family == "omnios" else 0
  work.extract(header("n" * 150, form), link("k", "t" * 150, form=form), file("z"), code=code)
  names = work.names()
  assert "z" in names
  if work.family in ("netbsd", "omnios"):  # taken for files, and what they say is lost
    assert "n" * 150 not in names and [name for name in names if "PaxHeader" in name]
    assert len(os.readlink(work.path / "k")) == 100
  else:
    assert "n" * 150 in names and os.readlink(work.path / "k") == "t" * 150


def test_solaris_headers(work):
  if work.family != "omnios":
    pytest.skip("illumos' own")
  content = b"160 linkpath=" + b"t" * 146 + b"\n"
  work.extract(
    header("X", type=b"X", size=160), content + bytes(512 - 160), link("k", "cut"), file("z")
  )
  assert os.readlink(work.path / "k") == "t" * 146 and work.names() == ["k", "z"]


def test_an_empty_name_field(work):
  """Python puts the whole name of such a folder into the prefix."""
  name = "a" * 120
  data = folder(name, form=tarfile.USTAR_FORMAT)
  assert data[:1] == b"\0"
  netbsd = work.family == "netbsd"
  work.extract(file("a"), data, file("z"), code=int(netbsd))
  assert set(work.names()) == {"a", "z"} | (set() if netbsd else {name})
  assert (b"Invalid header" in work.stderr) == netbsd


def test_an_empty_archive(work):
  work.extract(code=int(work.family in OF_PAX))
  assert (b"unable to determine archive format" in work.stderr) == (work.family in OF_PAX)
  assert work.names() == []


def test_a_closed_folder(work):
  omnios = work.family == "omnios"
  work.extract(folder("c", 0o555), file("c/f"), folder("c/e", 0o500), file("c/e/g"),
               code=13 if omnios else 0)  # fmt: skip
  assert work.names() == (["c"] if omnios else ["c", "c/e", "c/e/g", "c/f"])
  assert work.mode("c") == 0o555
  assert omnios or work.mode("c/e") == 0o500


def test_a_folder_said_twice(work):
  """Open to be filled, then closed: the last one counts, the first one for pax."""
  work.extract(folder("c"), file("c/f"), folder("c", 0o555))
  assert work.mode("c") == (0o755 if work.family in OF_PAX else 0o555)
  assert work.names() == ["c", "c/f"]


def test_a_folder_where_a_file_comes(work):
  (work.path / "n").mkdir()
  (work.path / "n/in").write_text("x")
  netbsd = work.family == "netbsd"
  work.extract(file("n"), file("z"), code=None)
  assert work.names() == ["n", "n/in", "z"]
  assert (work.code, bool(work.stderr)) == ((0, False) if netbsd else (work.code, True))
  assert netbsd or work.code in (1, 2)


def test_a_folder_where_a_link_comes(work):
  (work.path / "n").mkdir()
  (work.path / "n/in").write_text("x")
  netbsd = work.family == "netbsd"
  work.extract(link("n", "q"), file("z"), code=None)
  assert work.names() == ["n", "n/in", "z"]
  assert (work.code == 0) == netbsd


def test_a_file_where_a_folder_comes(work):
  """The table has an error for all but NetBSD; Debian's bsdtar, paxtar and GNU tar replace it."""
  (work.path / "n").write_text("old")
  omnios = work.family == "omnios"
  work.extract(folder("n"), file("n/in"), file("z"), code=1 if omnios else None)
  assert work.names() == (["n", "z"] if omnios else ["n", "n/in", "z"])


def test_a_link_where_a_folder_comes(work):
  (work.path / "other").mkdir()
  (work.path / "n").symlink_to("other")
  work.extract(folder("n"), folder("n/s"), file("n/s/f"), file("n/f"))
  through = work.family in ("netbsd", "omnios", "haiku")
  if work.family == "haiku":  # GNU tar replaces the link, unless --keep-directory-symlink
    through = os.path.islink(work.path / "n")
  assert os.path.exists(work.path / "other/s/f") == through
  assert os.path.exists(work.path / "n/s/f")


def test_a_link_where_a_file_comes(work):
  (work.path / "other").write_text("old")
  (work.path / "n").symlink_to("other")
  work.extract(file("n", b"new"))
  assert (work.path / "other").read_text() == "old" and (work.path / "n").read_text() == "new"
  assert not (work.path / "n").is_symlink()


def test_what_was_written_by_hand_is_read(work):
  """The plain case, with a check of content, mode and time."""
  work.extract(folder("d", 0o750), file("d/f", b"text" * 1000, mode=0o640), link("d/l", "f"))
  assert (work.path / "d/f").read_bytes() == b"text" * 1000
  assert (work.mode("d"), work.mode("d/f")) == (0o750, 0o640)
  assert os.readlink(work.path / "d/l") == "f"
  assert (work.path / "d/f").stat().st_mtime == 1600000000


# --- tar: writing ----------------------------------------------------------------------------


def written(work, names, code):
  """What is in the archive of the names: through tar and, where there is one, pax."""
  found = []
  lines = ["exec tar -cf - " + " ".join(names)]
  if os.path.lexists(os.path.join(str(work.path), "pax-too")) and work.family in (
    "openbsd",
    "omnios",
  ):
    lines.append("printf '%s\\n' " + " ".join(names) + " | exec pax -w -d")
  for line in lines:
    data = work.run(line, code=code)
    result = subprocess.run(["bsdtar", "-tf", "-"], input=data, capture_output=True, check=True)
    found.append(result.stdout.decode().split())
  assert all(one == found[0] for one in found)
  return found[0]


@pytest.mark.parametrize("case", ["name", "path", "target"])
def test_long_names_are_written(work, case):
  (work.path / "pax-too").write_text("")
  long = {"name": "n" * 150, "path": "/".join(["p" * 90] * 3), "target": "k"}[case]
  if case == "target":
    (work.path / long).symlink_to("t" * 150)
  else:
    os.makedirs(os.path.dirname(work.path / long), exist_ok=True)
    (work.path / long).write_text("x")
  can = work.family not in ("openbsd", "omnios")
  assert written(work, [long, "pax-too"], 0 if can else 1) == [long] * can + ["pax-too"]
  assert can or b"too long" in work.stderr


def test_names_that_fit_into_the_prefix(work):
  (work.path / "pax-too").write_text("")
  name = "p" * 90 + "/" + "q" * 90
  os.makedirs(os.path.dirname(work.path / name))
  (work.path / name).write_text("x")
  assert written(work, [name], 0) == [name]


def test_8_gib_are_written(work):
  with open(work.path / "big", "wb") as big:
    big.truncate(8 << 30)
  (work.path / "z").write_text("x")
  if work.family in ("freebsd", "haiku"):
    data = work.run("tar -cf - big 2>err | head -c 4096; cat err >&2")
    assert b"big" in data and work.stderr == b""
  else:
    assert written(work, ["big", "z"], 1) == ["z"]
    assert b"too large" in work.stderr


def test_what_cannot_be_read_does_not_take_the_rest_with_it(work):
  (work.path / "a").write_text("x")
  (work.path / "a").chmod(0)
  (work.path / "z").write_text("x")
  assert "z" in written(work, ["a", "gone", "z"], None)
  assert work.code != 0 and b"gone" in work.stderr
  assert (b"ermission denied" in work.stderr) == (work.family != "haiku")


# --- find ------------------------------------------------------------------------------------


def newer(work, program="find"):
  line = f"exec {program} . -name f -cnewer mark -print"
  return work.run(line, code=None).decode().split()


def test_cnewer(work):
  """The mark's status changes last, while its content is old."""
  (work.path / "mark").write_text("")
  (work.path / "f").write_text("x")
  os.utime(work.path / "mark", (1600000000, 1600000000))
  if work.family == "omnios":
    assert newer(work) == [] and work.code == 1 and b"bad option -cnewer" in work.stderr
    assert newer(work, "gfind") == ["./f"]
  else:
    assert newer(work) == ([] if work.family in OF_PAX else ["./f"])


def test_the_guests_clock(box, work):
  """One that goes back makes what is changed then look old; one that goes forward, new."""
  find = "gfind" if work.family == "omnios" else "find"
  try:
    (work.path / "mark").write_text("")
    box.set_clock(-10)
    (work.path / "f").write_text("x")
    assert newer(work, find) == []
    assert work.run(f"exec {find} . -name f -newer mark") == b""
    box.set_clock(3600)
    (work.path / "f").chmod(0o600)
    assert newer(work, find) == ["./f"]
    (work.path / "f").write_text("y")
    assert work.run(f"exec {find} . -name f -newer mark") == b"./f\n"
    assert work.run(f"exec {find} f mark -newer mark") == b"f\n"
    assert sorted(work.run(f"exec {find} .").split()) == [b".", b"./f", b"./mark"]
  finally:
    os.remove(os.path.join(box.folder, "clock"))


def test_find_does_what_scripts_ask(work):
  for path in ("a/b", "a/c", "x y"):
    (work.path / path).mkdir(parents=True)
    (work.path / path / "f").write_text("x")
  said = work.run("find . -path './a/c' -prune -o -type f -print" if work.family != "omnios" else
                  "find . -name c -prune -o -type f -print")  # fmt: skip
  assert sorted(said.decode().splitlines()) == ["./a/b/f", "./x y/f"]
  said = work.run("find . -type f -exec sh -c 'for f; do echo \"<$f>\"; done' sh {} +")
  assert len(said.splitlines()) == 3
  assert work.run("find . -depth ! -type d -exec rm {} \\; ; find . -type f -print") == b""
