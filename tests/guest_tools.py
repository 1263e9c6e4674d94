"""A stand-in guest whose sessions have the tools of one BSD, OmniOS or Haiku, and no others.

`furnish(folder, system)` makes a folder of tools and a login shell for it. Whoever is let in
through that shell (ssh_guest's sshd does, or a test calls it as `SHELL -c LINE`)

  - has a PATH with these tools only, which behave as the table in GUESTS.md says;
  - finds the system's shell also as /bin/sh, by a mount of its own;
  - is told by the modes what it may read and write, also as root (but on Haiku).

Real are FreeBSD's tar (bsdtar), OpenBSD's tar and pax (paxtar), its ksh (mksh), OmniOS's sh
(ksh93), FreeBSD 13's csh (tcsh), all of Haiku's (GNU, bash). FreeBSD's and NetBSD's sh are ash's
heirs as dash is; where their builtins differ (FreeBSD's printf, NetBSD's kill), a function in front
of each script for -c does as they do. The others are stand-ins: guest_tar.py, guest_find.py,
guest_small.py.

The fixture `bsd_guest` gives running guests with a real sshd.

Needs Linux, Debian's libarchive-tools, pax, mksh, ksh93u+m, tcsh, and for the mount root or user
namespaces, in which whoever is let in is root.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ssh_guest
from support import DEADLINE


class System:
  """What is known of an operating system: how qvm names it, its shells, who logs in."""

  def __init__(self, guest, kernel, sh, login=None, home="home/runner"):
    self.guest, self.kernel, self.home = guest, kernel, home
    self.sh, self.login = sh, login or sh


SYSTEMS = {
  "freebsd": System(("freebsd", "15.1"), "FreeBSD", "sh"),
  "freebsd-csh": System(("freebsd", "15.1"), "FreeBSD", "sh", "csh"),  # as up to FreeBSD 13
  "openbsd": System(("openbsd", "7.9"), "OpenBSD", "ksh"),
  "netbsd": System(("netbsd", "11.0"), "NetBSD", "sh"),
  "omnios": System(("omnios", "r151058"), "SunOS", "ksh93"),
  "haiku": System(("haiku", "r1beta5"), "Haiku", "bash", home="home/user"),
}
PACKAGES = {"bsdtar": "libarchive-tools", "paxtar": "pax", "mksh": "mksh", "ksh93": "ksh93u+m",
            "csh": "tcsh", "dash": "dash", "bash": "bash", "setpriv": "util-linux"}  # fmt: skip

# Tools of POSIX, which all have. They take no long options, and options only before operands.
PLAIN = """awk basename cat chgrp chmod chown cksum cmp comm cp cut dd df diff dirname du egrep
fgrep file fold grep head id join ln ls mkdir mkfifo mktemp mv nl od paste readlink rm
rmdir sed sort split tail tee touch tr tsort uniq uudecode uuencode wc xargs"""
FREE = """clear echo env expr false getconf gzip gunzip hostname kill logname nice nohup ps pwd
sleep stty sync test [ time true tty yes"""
# What of Debian's must not be taken for granted: the letters are GNU's, or another's, alone.
REFUSED = {
  "comm": "z", "cut": "z", "head": "z", "tail": "z", "wc": "L", "sort": "z", "touch": "", "rm": "",
  "ls": "ZNQ", "grep": "PzZ", "uniq": "z", "paste": "z", "join": "z", "sed": "zs", "cp": "uatT",
  "mv": "tT", "ln": "rtT", "readlink": "ezm", "xargs": "ad", "id": "zZ", "tee": "p", "dd": "",
}  # fmt: skip
# Of these some systems have what others lack.
GRANTED = {"freebsd": {"sort": "z", "cp": "a"}, "openbsd": {"sort": "z"}, "netbsd": {"cp": "a"},
           "omnios": {}}  # fmt: skip

WRAPPER = """\
#!{dash}
n=0
for a do
  case $a in
    --) break ;;
    --*) echo "{name}: illegal option -- ${{a#--}}" >&2; exit 1 ;;
    {refused}
    -*) ;;
    *) [ {name} = xargs ] && break; [ {name} = find ] && break ;;
  esac
done
POSIXLY_CORRECT=1; export POSIXLY_CORRECT
exec {program} "$@"
"""
# A builtin cannot be replaced in dash, but a function comes before it, in what -c is given.
SH = """\
#!{dash}
case $1 in
  -c|-[a-z]c|-[a-z][a-z]c)
    o=$1 c=$2
    shift 2
    exec {dash} "$o" '{prelude}
'"$c" "$@" ;;
esac
exec {dash} "$@"
"""
# dash's kill knows no --; NetBSD's says so and does it, FreeBSD's is content with it.
KILL = """kill() {{ for q_a do [ "$q_a" != -- ] || q_s=TERM; done; [ "${{q_s-}}" ] || {{
command kill "$@"; return; }}; {complaint}case $1 in -s) q_s=$2;; --) ;; -*) q_s=${{1#-}};; esac
while [ "$1" != -- ]; do shift; done; shift; set -- -$q_s "$@"; q_s=; command kill "$@"; }}"""
PRELUDES = {  # FreeBSD's %b ends at a \\0
  "FreeBSD": KILL.replace("{complaint}", "")
  + """
printf() {{ case $1 in *%b*) case "$*" in *"\\\\0"*) {tools}/printf "$@"; return;; esac;; esac
command printf "$@"; }}""",
  "NetBSD": KILL.replace("{complaint}", 'echo "kill: illegal process id: --" >&2; '),
}
# The login shell. What it mounts goes with the session; what it drops does not come back.
LOGIN = """\
#!{dash}
PATH={path}; export PATH
SHELL={shown}; export SHELL
unset POSIXLY_CORRECT LANGUAGE
{mount} {setpriv} {shell} "$@"
"""
UNSHARE = ["/usr/bin/unshare", "--mount"] + (["--map-root-user"] if os.geteuid() else [])
MOUNT = """exec {unshare} {dash} -c '/bin/mount --bind "$0" "$1" || exit 99
shift
exec "$@"' {sh} {place}"""
SETPRIV = """/usr/bin/setpriv --bounding-set=-dac_override,-dac_read_search,-fowner \
--inh-caps=-all --ambient-caps=-all"""
UNAME = """\
#!{dash}
case $1 in
  ""|-s) echo {kernel} ;;
  -m|-p) echo amd64 ;;
  -r|-v) echo 1.0 ;;
  -n) hostname ;;
  -a) echo {kernel} guest 1.0 amd64 ;;
  *) echo "uname: illegal option $1" >&2; exit 1 ;;
esac
"""
# What sets the clock is noted, and the clock left alone; guest_tools.Guest.set_clock is for that.
DATE = """\
#!{dash}
u=
[ "$1" != -u ] || {{ u=-u; shift; }}
case $1 in
  ""|+*) exec /bin/date $u "$@" ;;
{set}
  *) echo "date: illegal time format" >&2; exit 1 ;;
esac
case $v in *[!0-9.]*|"") echo "date: illegal time format" >&2; exit 1 ;; esac
echo "$u $*" >>{folder}/dates
"""
BSD_DATE = """  [12][0-9]*.[0-9][0-9])
    [ ${#1} = 15 ] && [ "$1" \\> 19 ] && [ "$1" \\< 21 ] && v=$1 || v=no ;;
  -r) [ $# -ge 2 ] || exit 1; t=$2; shift 2; exec /bin/date $u -d "@$t" "$@" ;;"""
OMNIOS_DATE = """  [0-9]*.[0-9][0-9]) [ ${#1} = 15 ] || { echo "date: bad conversion" >&2; exit 1; }
    case $1 in 0[1-9]*|1[0-2]*) v=$1 ;; *) echo "date: bad conversion" >&2; exit 1 ;; esac ;;"""
HAIKU_DATE = """  -s) v=$2 ; v=$(printf %s "$v" | /usr/bin/tr -d " :TZ@-") ;;
  -[drR]*|--*) exec /bin/date $u "$@" ;;"""
TOUCH_CHECK = '-d) case "$*" in *@*) echo "touch: bad time" >&2; exit 1 ;; esac ;;'


def missing():
  """The Debian packages that are wanted, and a word where nothing can be mounted."""
  wanted = [package for name, package in PACKAGES.items() if not shutil.which(name)]
  mounts = subprocess.run([*UNSHARE, "true"], stderr=subprocess.DEVNULL).returncode == 0
  return wanted + ssh_guest.missing() + ([] if mounts else ["(root or user namespaces)"])


def write(path, text, mode=0o755):
  with open(path, "w") as file:
    file.write(text)
  os.chmod(path, mode)


def link(tools, name, program=None):
  """Put a program of Debian's into the folder; nothing when it is not installed."""
  found = shutil.which(program or name)
  if found and not os.path.lexists(os.path.join(tools, name)):
    os.symlink(found, os.path.join(tools, name))


def furnish(folder, name):
  """Make a system's tools in `folder`/tools and its login shell; returns the shell's path.

  To be called before ssh_guest furnishes the same folder, whose sudo, whoami and shutdown are used.
  """
  system, folder = SYSTEMS[name], os.path.abspath(str(folder))
  family = name.split("-")[0]
  tools, real = os.path.join(folder, "tools"), os.path.join(folder, "real")
  for path in (tools, real):
    os.makedirs(path, exist_ok=True)
  dash = os.path.join(real, "dash")
  shutil.copy(shutil.which("dash"), dash)  # /bin/sh is another one there
  words = {"dash": dash, "tools": tools, "folder": folder, "kernel": system.kernel}
  for tool in FREE.split():
    link(tools, tool)
  if family == "haiku":
    put_gnu(tools, words)
  else:
    put_plain(tools, family, words)
    put_special(tools, family, words)
  write(os.path.join(tools, "uname"), UNAME.format(**words))
  kinds = {"omnios": OMNIOS_DATE, "haiku": HAIKU_DATE}
  write(os.path.join(tools, "date"),
        DATE.format(set=kinds.get(family, BSD_DATE), **words))  # fmt: skip
  return put_shells(folder, system, words)


def put_gnu(tools, words):
  """Haiku's: GNU's, as Debian has them."""
  stand_in(tools, "find", "guest_find", "gnu", words["folder"])
  for tool in PLAIN.split() + ["tar", "printf", "stat", "seq", "sha256sum", "bash"]:
    link(tools, tool)


def put_plain(tools, family, words):
  for tool in PLAIN.split():
    program = shutil.which(tool)
    if not program:
      continue
    letters = "".join(
      letter for letter in REFUSED.get(tool, "") if letter not in GRANTED[family].get(tool, "")
    )
    refused = TOUCH_CHECK if tool == "touch" else ""
    if letters:
      refused = f'-*[{letters}]*) echo "{tool}: illegal option $a" >&2; exit 1 ;;'
    text = WRAPPER.format(name=tool, program=program, refused=refused, **words)
    write(os.path.join(tools, tool), text)


def stand_in(tools, name, module, *arguments):
  """A tool that is a Python module of ours."""
  words = ", ".join(map(repr, arguments))
  text = f"import {module}\nsys.exit({module}.main({words}, sys.argv[1:]))\n"
  write(os.path.join(tools, name), f"#!{sys.executable} -IS\n{ssh_guest.IMPORT}{text}")


def put_special(tools, family, words):
  stand_in(tools, "find", "guest_find", family, words["folder"])
  if family == "freebsd":
    link(tools, "tar", "bsdtar")
    link(tools, "bsdtar")
    stand_in(tools, "printf", "guest_small", "printf")
  elif family == "openbsd":
    link(tools, "tar", "paxtar")
    link(tools, "pax", "pax")
  else:
    stand_in(tools, "tar", "guest_tar", family, "tar")
    stand_in(tools, "pax", "guest_tar", family, "pax")
  if family == "omnios":
    stand_in(tools, "gfind", "guest_find", "gnu", words["folder"])
    link(tools, "gtar", "tar")
  else:
    stand_in(tools, "stat", "guest_small", "stat", words["folder"])
    link(tools, "bash")
  link(tools, "printf")


def put_shells(folder, system, words):
  """The system's sh, which is also to be /bin/sh, and the login shell, which arranges all that."""
  tools = words["tools"]
  programs = {"ksh": "mksh", "ksh93": "ksh93", "bash": "bash", "csh": "tcsh"}
  sh = shutil.which(programs.get(system.sh, "dash"))
  if system.sh == "sh":
    sh = words["dash"]
    if system.kernel in PRELUDES:
      sh = os.path.join(folder, "real", "sh")
      write(sh, SH.format(prelude=PRELUDES[system.kernel].format(**words), **words))
  elif os.path.realpath(sh) == os.path.realpath("/bin/sh"):
    copied = os.path.join(folder, "real", system.sh)
    shutil.copy(sh, copied)
    sh = copied
  os.symlink(sh, os.path.join(tools, "sh"))
  if system.sh.startswith("ksh"):
    os.symlink(sh, os.path.join(tools, "ksh"))
  login = os.path.join(tools, "sh")
  if system.login == "csh":
    login = os.path.join(tools, "csh")
    os.symlink(shutil.which("tcsh"), login)
  mount = MOUNT.format(unshare=" ".join(UNSHARE), sh=sh, place=os.path.realpath("/bin/sh"), **words)
  path = ":".join((tools, os.path.join(folder, "bin")))
  shell = os.path.join(folder, "real", "login")
  # Haiku's only user is root, whom no mode keeps out; GNU tar counts on that.
  setpriv = "" if system.kernel == "Haiku" else SETPRIV
  write(shell, LOGIN.format(path=path, shown=login, mount=mount, setpriv=setpriv, shell=login,
                            **words))  # fmt: skip
  return shell


class Toolbox:
  """A system's tools without sshd: runs lines in a folder as a session would."""

  def __init__(self, folder, name):
    self.folder, self.name, self.system = str(folder), name, SYSTEMS[name]
    self.shell = furnish(self.folder, name)
    self.work = os.path.join(self.folder, "work")
    os.makedirs(self.work, exist_ok=True)

  def run(self, line, data=b"", cwd=None, **more):
    """Run a line in the login shell; stdout and stderr are bytes."""
    env = {"HOME": self.folder, "LC_ALL": "C"}
    command = [self.shell, "-c", line]
    return subprocess.run(
      command,
      input=data,
      capture_output=True,
      env=env,
      cwd=cwd or self.work,
      timeout=DEADLINE,
      **more,
    )

  def set_clock(self, seconds):
    set_clock(self.folder, seconds)


def set_clock(folder, seconds):
  """From now on the guest's clock differs from the real one by so much, as find tells of it."""
  path = os.path.join(str(folder), "clock")
  with open(path, "a") as file:
    stamp = before = os.stat(path).st_mtime_ns
    while stamp == before:  # what has been changed before is in an earlier tick
      os.utime(path)
      stamp = os.stat(path).st_mtime_ns
    file.write(f"{stamp} {round(seconds * 1e9)}\n")


# --- a guest with a real sshd ----------------------------------------------------------------


class Guest:
  """A stand-in guest of one system that runs as the instance `vm` of a qvm, and stays.

  qvm: conftest's Qvm, of whose cache put_bases has made use. Options and commands go to it as they
  are; what comes back is what subprocess.run returns.
  """

  def __init__(self, qvm, folder, name):
    self.qvm, self.folder, self.name, self.system = qvm, Path(str(folder)), name, SYSTEMS[name]
    self.family = name.split("-")[0]
    self.home = self.folder / self.system.home
    self.env = self.play(self.folder)
    self.runs = 0

  def play(self, folder):
    """The environment in which qvm's QEMU is this guest, with its files in a folder."""
    shell = furnish(folder, self.name)
    return {"SSH_GUEST": json.dumps({"folder": str(folder), "shell": shell})}

  def there(self, project, *more):
    """Where a synced folder is in the guest, as a path here."""
    return self.home.joinpath("work", os.path.basename(str(project)), *more)

  def up(self, port, name="vm"):
    words = ("run", "-d", "--name", name, "--ssh-port", str(port), *self.system.guest)
    result = self.qvm(*words, env=self.env)
    assert result.returncode == 0, result.stderr

  def sync(self, project, *command, options=(), name="vm", **more):
    """qvm ssh --sync PROJECT; a command of one word is a line for the login shell."""
    tail = ("--", *command) if command else ()
    return self.qvm("ssh", "--sync", str(project), *options, name, *tail, **more)

  def ssh(self, *command, name="vm", **more):
    return self.qvm("ssh", name, "--", *command, **more)

  def run(self, port, project, *command, options=(), **more):
    """qvm run --rm --sync PROJECT, in a guest of its own; its folder is self.last."""
    self.runs += 1
    self.last = self.folder.parent / f"{self.name}-run{self.runs}"
    words = ("run", "--rm", "--ssh-port", str(port), "--sync", str(project), *options)
    return self.qvm(*words, *self.system.guest, "--", *command, env=self.play(self.last), **more)

  def set_clock(self, seconds):
    set_clock(self.folder, seconds)

  def clock_as_it_was(self):
    with contextlib.suppress(FileNotFoundError):
      os.remove(str(self.folder / "clock"))

  @contextlib.contextmanager
  def tool(self, name, script):
    """Another tool while it lasts: a script for dash; in it, {real} is the one that was there."""
    tool, kept = self.folder / "tools" / name, self.folder / "real" / ("old-" + name)
    os.rename(str(tool), str(kept))
    dash = self.folder / "real" / "dash"
    write(str(tool), f"#!{dash}\n" + script.replace("{real}", str(kept)))
    try:
      yield
    finally:
      os.replace(str(kept), str(tool))


def put_bases(cache):
  """Give a filled cache the base images of all systems, copies of FreeBSD's, and this QEMU."""
  base = Path(str(cache)) / "base"
  for system in SYSTEMS.values():
    for suffix in (".qcow2", ".json"):
      target = base / ("-".join(system.guest) + "-x86-64" + suffix)
      if not target.exists():
        shutil.copy(str(base / ("freebsd-15.1-x86-64" + suffix)), str(target))
  program = Path(str(cache)) / "qemu" / "x86_64" / "bin" / "qemu-system-x86_64"
  program.write_text(ssh_guest.program())


def systems():
  """All systems as parameters, each on one worker, so that each has one guest."""
  return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SYSTEMS]


@pytest.fixture(scope="module")
def bsd_guest(filled, tmp_path_factory):
  """bsd_guest(SYSTEM): the running Guest of that system, one for a module."""
  from support import ROOT, Qvm, end_processes, free_port

  found = {}

  def guest(name):
    if name not in found:
      top = tmp_path_factory.mktemp(name)
      shutil.copytree(str(filled), str(top / "home"))
      (top / "tmp").mkdir()
      qvm = Qvm(top / "home", ROOT / "qvm.py")
      qvm.env.update(TMPDIR=str(top / "tmp"))
      put_bases(qvm.cache)
      found[name] = Guest(qvm, top / "guest", name)
      found[name].up(free_port())
    return found[name]

  yield guest
  for one in found.values():
    end_processes(one.qvm.cache)
    ssh_guest.wait_until_gone(one.folder)
