"""Words in every order, bad input, help, and the folder that qvm keeps everything in."""

import itertools
import os
import pwd
import re
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEADLINE

import qvm as qvm_source

OS_NAMES = (*("freebsd", "openbsd", "netbsd", "haiku", "omnios", "dragonflybsd", "midnightbsd"),)
CPU_NAMES = ("x86-64", "x86_64", "amd64", "x64", "arm64", "aarch64")
FREEBSD = ("freebsd", "15.1")


def parse(*words):
  return qvm_source.parse_command_line(words)


def raw(qvm, *words, env=None, **more):
  """Run with any environment, in bytes."""
  more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
  env = qvm.env if env is None else env
  return subprocess.run(
    qvm.command(*words), env=env, stdin=subprocess.DEVNULL, timeout=DEADLINE, **more
  )


# --- Orders and spellings --------------------------------------------------------------------


def interleaved(first, second):
  """All sequences in which both keep their own order."""
  for places in itertools.combinations(range(len(first) + len(second)), len(second)):
    rest, other = iter(first), iter(second)
    yield [next(other if i in places else rest) for i in range(len(first) + len(second))]


def test_options_stand_anywhere():
  operands = [["run"], ["freebsd"], ["15.1"]]
  given = [["--rm"], ["--platform", "arm64"], ["-m2G"]]
  expected = parse("run", *FREEBSD, "--rm", "--platform", "arm64", "-m", "2G")
  assert (expected.rm, expected.platform, expected.memory) == (True, "arm64", "2G")
  orders = [
    [word for group in order for word in group]
    for options in itertools.permutations(given)
    for order in interleaved(operands, options)
  ]
  assert len(orders) == 120
  for words in orders:
    assert parse(*words) == expected, words


SPELLINGS = (
  ("memory", "2G", ("-m2G",), ("-m", "2G"), ("--memory=2G",), ("--memory", "2G"), ("-m", "2g")),
  ("memory", "512M", ("-m512M",), ("--memory", "512m"), ("-m", "8G", "-m", "512M")),
  ("memory", "2048", ("-m", "2048"), ("--memory=2048",)),
  ("cpus", "4", ("--cpus=4",), ("--cpus", "04"), ("--cpus", "1", "--cpus", "4")),
  ("name", "build", ("--name=build",), ("--name", "build")),
  ("platform", "arm64", ("--platform=arm64",), ("--platform", "AArch64")),
  ("accel", "kvm:tcg", ("--accel=kvm:tcg",), ("--accel", "KVM:TCG")),
  ("ssh", ("127.0.0.1", 22, True), ("--ssh-port=22",), ("--ssh-port", "127.0.0.1:22")),
  ("ssh", ("0.0.0.0", 2222, True), ("--ssh-port", "0.0.0.0:2222"),),
  ("ssh", ("127.0.0.1", 2847, False), ()),
  ("qemu_args", ("-a", "b=c"), ("--qemu-arg", "-a", "--qemu-arg=b=c"),
   ("--qemu-arg=-a", "--qemu-arg", "b=c")),
  ("qemu_args", ("--", ""), ("--qemu-arg", "--", "--qemu-arg", "")),
  ("guest_command", (), (), ("--",), ("--rm", "--")),
)  # fmt: skip


@pytest.mark.parametrize("field, value, spellings", [(s[0], s[1], s[2:]) for s in SPELLINGS])
def test_spellings_of_values(field, value, spellings):
  for words in spellings:
    assert getattr(parse("run", *words, *FREEBSD), field) == value, words


COMMAND_LINES = (
  (("run", "freebsd", "--", "ls"), ("freebsd",), ("ls",)),
  (("run", "freebsd", "15.1", "--rm", "--", "ls", "-l", "--rm"), ("freebsd", "15.1"),
   ("ls", "-l", "--rm")),
  (("run", "freebsd", "15.1", "--", ""), ("freebsd", "15.1"), ("",)),
  (("run", "freebsd", "15.1", "--", "--"), ("freebsd", "15.1"), ("--",)),
  (("run", "freebsd", "15.1", "--", "a", "--", "-d", "b c"), ("freebsd", "15.1"),
   ("a", "--", "-d", "b c")),
  (("run", "--", "freebsd", "15.1"), ("freebsd", "15.1"), ()),
  (("ssh", "build"), ("build",), ()),
  (("ssh", "build", "--", "-x"), ("build",), ("-x",)),
  (("ssh", "--", "build"), ("build",), ()),
)  # fmt: skip


@pytest.mark.parametrize("words, operands, command", COMMAND_LINES)
def test_what_follows_two_dashes_is_for_the_guest(words, operands, command):
  options = parse(*words)
  assert (options.operands, options.guest_command, options.rm) == (
    operands,
    command,
    "--rm" in words[:5],
  )


TO_A_COMMAND = (
  ("env", ("A=b c", "D", "E="), ("-e", "A=b c", "--env=D", "-eE=")),
  ("sync", ".", ("--sync", ".")),
  ("sync_direction", "out", ("--sync", ".", "--sync-direction=out")),
  ("sync_exclude", ("*.o", "a/b"), ("--sync", ".", "--sync-exclude", "*.o", "--sync-exclude=a/b")),
  ("sync_delete", True, ("--sync-delete", "--sync", ".")),
)


@pytest.mark.parametrize("field, value, words", TO_A_COMMAND)
@pytest.mark.parametrize("command", [("run", "freebsd", "15.1"), ("ssh", "build")])
def test_options_that_go_with_a_command(command, field, value, words):
  assert getattr(parse(*command, *words, "--", "true"), field) == value
  if command[0] == "ssh":
    assert getattr(parse(*command, *words), field) == value
  else:
    with pytest.raises(qvm_source.UsageError, match="needs a command"):
      parse(*command, *words)


@pytest.mark.parametrize("name", CPU_NAMES)
def test_cpu_names_in_any_case(name):
  arch = "x86-64" if name.startswith(("x", "a")) and "64" in name else ""
  arch = "arm64" if name in ("arm64", "aarch64") else arch
  for text in (name, name.upper(), name.title(), name.swapcase()):
    assert parse("run", *FREEBSD, "--platform", text).platform == arch


@pytest.mark.parametrize(
  "words, program, disk",
  [
    (("--dry-run", "run", "freebsd", "13.2"), "x86_64", "freebsd-13.2-x86-64"),
    (("run", "freebsd", "--rm", "15.1", "--dry-run"), "x86_64", "freebsd-15.1-x86-64-rm-"),
    (("--platform", "AMD64", "--dry-run", "run", "FreeBSD", "15.1"), "x86_64", "freebsd-15.1-x86"),
    (("run", "oPenBSD", "7.9", "--dry-run", "--platform=ARM64"), "aarch64", "openbsd-7.9-arm64."),
    (("run", "NETBSD", "--dry-run", "10.1"), "x86_64", "netbsd-10.1-x86-64."),
    (("run", "--dry-run", "Haiku", "r1beta5"), "x86_64", "haiku-r1beta5-x86-64."),
    (("--dry-run", "run", "OmniOS", "r151058"), "x86_64", "omnios-r151058-x86-64."),
    (("run", "--name", "b", "--dry-run", "--", "freebsd", "15.1"), "x86_64", "/b.qcow2"),
  ],
)
def test_words_in_any_order_run(offline, words, program, disk):
  env = {} if program == "aarch64" else {"QVM_CACHE_DIR": str(offline.cache)}
  words = words if "--platform" in " ".join(words) else ("--platform", "x64", *words)
  run = offline(*words, env=env)
  assert (run.returncode, run.stderr) == (0, "")
  argv = shlex.split(run.stdout)
  assert argv[0].endswith(f"/qemu-system-{program}")
  assert disk in next(word for word in argv if "id=drive0" in word)


# --- Bad input -------------------------------------------------------------------------------

HOSTILE = (
  "../x", "..", ".", "a/b", "/etc/passwd", "", " ", "15 1", "15.1\n", "\n", "a\nb", "\x1b[31m",
  "15.1%2f", "%2e%2e", "a,b", "a:b", "a;b", "$x", "é", "\udcff", "~", "~root", ".hidden", "x" * 101,
)  # fmt: skip
RUN = ("run", *FREEBSD)
BAD = [
  (("pull", "--refresh", "--qemu-release", "v1.0.0", "freebsd", "15.1"), ["--qemu-release"]),
  (
    (),
    ["run, each, pull, search, list, ssh, stop, restart, logs, clone, rm, clean, doctor"],
  ),
  (
    ("",),
    ["run, each, pull, search, list, ssh, stop, restart, logs, clone, rm, clean, doctor"],
  ),
  (
    ("frobnicate",),
    [
      "'frobnicate'",
      "run, each, pull, search, list, ssh, stop, restart, logs, clone, rm, clean, doctor",
    ],
  ),
  (("--rm",), ["--help"]),
  (("--dry-run", "15.1"), ["run, each, pull"]),
  (("run",), ["qvm run OS [VERSION]", *OS_NAMES]),
  (("pull",), ["qvm pull OS [VERSION]"]),
  ((*RUN, "extra"), ["'extra'", "qvm run OS [VERSION]"]),
  (("run", "plan9", "4"), ["'plan9'", *OS_NAMES]),
  (("pull", "plan9", "4"), ["'plan9'", *OS_NAMES]),
  (("run", "", "15.1"), [*OS_NAMES]),
  (("run", "free\nbsd", "15.1"), ["did you mean freebsd?"]),
  (("run", "haiku", "r1beta5", "--platform", "arm64"), ["Haiku", "arm64", "x86-64"]),
  (("pull", "haiku", "r1beta5", "--platform", "arm64"), ["Haiku", "arm64", "x86-64"]),
  (("run", "omnios", "r151058", "--platform", "arm64"), ["OmniOS", "arm64", "x86-64"]),
  (("run", "haiku", "r1beta5", "--dry-run", "--platform", "arm64"), ["Haiku", "x86-64"]),
  ((*RUN, "--platform", "riscv64"), ["'riscv64'", "x86-64", "arm64"]),
  ((*RUN, "--platform", ""), ["x86-64", "arm64"]),
  ((*RUN, "--bogus"), ["--bogus", "--ssh-port", "--rm"]),
  ((*RUN, "-x"), ["-x", "--ssh-port"]),
  (("run", "freebsd", "-x"), ["-x", "--ssh-port"]),
  ((*RUN, "--platfrom", "arm64"), ["--platfrom", "did you mean --platform?"]),
  ((*RUN, "--plat", "arm64"), ["--plat"]),
  ((*RUN, "--json"), ["qvm run", "--json"]),
  (("--bogus",), ["--bogus", "--help", "--version"]),
  (("list", "--rm"), ["qvm list", "--rm", "--json"]),
  (("list", "freebsd"), ["'freebsd'", "qvm list"]),
  (("rm", "--rm", "x"), ["qvm rm", "--force"]),
  (("rm",), ["qvm rm NAME..."]),
  (("config",), ["print-path"]),
  (("config", "get"), ["print-path", "'get'"]),
  (("config", "print-path", "x"), ["'x'", "print-path"]),
  ((*RUN, "--name"), ["--name NAME"]),
  ((*RUN, "-m"), ["-m SIZE"]),
  ((*RUN, "--rm=yes"), ["--rm", "no value"]),
  ((*RUN, "--rm="), ["--rm", "no value"]),
  (("-hx",), ["-h", "no value"]),
]
BAD += [(("run", "--", "freebsd", word), ["version", "letters"]) for word in (*HOSTILE, "-x")]
BAD += [((*RUN, "--name=" + word), ["name", "letters"]) for word in (*HOSTILE, "-x")]
BAD += [
  (("run", "freebsd", "15.1", "--"), ["no command after"]),
  (("ssh", "build", "--"), ["no command after"]),
  (("ssh",), ["missing argument", "qvm ssh NAME"]),
  (("ssh", "a", "b"), ["'b'", "unexpected argument"]),
  (("ssh", "../a", "--", "ls"), ["name", "letters"]),
  (("run", "-d", "freebsd", "--", "ls"), ["--detach", "qvm ssh"]),
  (("each",), ["missing argument", "qvm each GUEST..."]),
  (("each", "freebsd"), ["needs a command"]),
  (("each", "freebsd", "--"), ["no command after"]),
  (("each", "--", "uname", "-a"), ["no guests before --", "qvm each GUEST..."]),
  (("each", "plan9", "--", "true"), ["'plan9'", "freebsd, openbsd"]),
  (("each", "freebsd", "-15", "--", "true"), ["-1"]),
  (("each", "freebsd-", "--", "true"), ["freebsd-", "OS[-VERSION][-ARCH]"]),
  (("each", "haiku-arm64", "--", "true"), ["Haiku", "x86-64"]),
  (("each", "freebsd-15/1", "--", "true"), ["version", "letters"]),
  (("each", "freebsd-..-arm64", "--", "true"), ["version", "letters"]),
  (("each", "-j", "0", "all", "--", "true"), ["'0'", "1 to 999"]),
  (("each", "--sync-out", "out", "all", "--", "true"), ["--sync-out", "--sync DIR"]),
  (("each", "--rm", "all", "--", "true"), ["--rm", "--fail-fast"]),
  (("each", "--junit", "/no/such/x", "all", "--", "true"), ["--junit", "/no/such/x"]),
  ((*RUN, "--console-log", "/no/such/x"), ["--console-log", "/no/such/x"]),
  (("run", "freebds"), ["unknown OS 'freebds'; did you mean freebsd?"]),
  (("run", "--platform", "ARM65", "freebsd"), ["unknown CPU 'ARM65'; did you mean arm64?"]),
  (("each", "netbds-11", "--", "true"), ["unknown OS 'netbds'; did you mean netbsd?"]),
  (("completion", "fsh"), ["unknown shell 'fsh'; did you mean fish?"]),
  (("each", "--sync", "/no/such", "all", "--", "true"), ["--sync", "no such folder"]),
  (("each", "--env", "1=2", "all", "--", "true"), ["'1=2'"]),
  (("ssh", "a", "--sync-delete"), ["--sync-delete", "--sync DIR"]),
  (("ssh", "a", "--sync-exclude", "x"), ["--sync-exclude", "--sync DIR"]),
  (("ssh", "a", "--sync", "/"), ["root folder"]),
  (("ssh", "a", "--sync", "/dev/null"), ["no such folder: '/dev/null'"]),
  (("ssh", "a", "--sync", "/no/such"), ["no such folder: '/no/such'"]),
  (("ssh", "a", "--sync", ".", "--sync-direction", "up"), ["'up'", "both, in, out"]),
  (("ssh", "a", "--sync", ".", "--sync-direction", "in", "--sync-delete"), ["no effect"]),
  *(
    (("ssh", "a", "-e", word), ["invalid variable", "NAME=VALUE"])
    for word in ("", "=", "1A", "A-B=c")
  ),
  (("list", "-e", "A=b"), ["unknown option -e for qvm list", "-"]),
  (("rm", "-f", "x"), ["unknown option -f for qvm rm; choose from --force"]),
  (("exec", "-it", "x", "sh"), ["unknown command 'exec'; choose from run, each"]),
  (("help", "--bogus"), ["unknown option --bogus without a command"]),
  ((*RUN, "uname", "-a"), ["unexpected argument 'uname'", "[-- COMMAND [ARG...]]"]),
  (("ssh", "x", "make", "-j4"), ["unexpected argument 'make'", "[-- COMMAND [ARG...]]"]),
  (("completion", "bash", "zsh"), ["unexpected argument 'zsh'"]),
  (("ssh", "words", "make"), ["unexpected argument 'make'"]),
  (("each", "freebsd", "15.1", "--", "true"), ["'15.1' names no OS", "freebsd-15.1"]),
  (("pull", "--mirror", "m", "--verify", "freebsd", "15.1"), ["--mirror", "--verify"]),
  (("pull", "--mirror", "m", "--qemu", "sh", "freebsd", "15.1"), ["--mirror", "--qemu"]),
  (("pull", "freebsd", "-e", "A=b"), ["--env needs --prepare SCRIPT"]),
]
BAD += [(("rm", "--", "good", word), ["name", "letters"]) for word in ("../x", "", "-x", "a/b")]
BAD += [
  ((*RUN, "-m", word), ["memory", "64M", "4T"])
  for word in ("", "0", "63M", "-1", "5T", "5000G", "1K", "6GB", "6 G", "1e3", "1.5G", "G", "٦G")
  + ("9" * 30, "1G,slots=2", "0x100")
]
BAD += [
  ((*RUN, "--cpus", word), ["1", "255"])
  for word in ("", "0", "-1", "256", "two", "1.5", "1,maxcpus=4", "٢", "9999999", "+1")
]
BAD += [
  ((*RUN, "--ssh-port", word), ["1", "65535", "2847"])
  for word in ("", "0", "-1", "65536", "x", "22:", ":22", "127.0.0.1:", "127.0.0.1", "::1:22")
  + ("[::1]:22", "localhost:22", "256.0.0.1:22", "1.2.3:22", "1.2.3.4.5:22", "1.2.3.4:22:33")
  + ("22,hostfwd=tcp::1-:2", "127.0.0.1:22-:23", "22\n", "٢٢", "+22", "1.2.3.4,5:22", "1e3")
]
BAD += [
  ((*RUN, "--accel", word), ["hvf", "kvm", "tcg"])
  for word in ("", "xen", "kvm,tcg", "kvm:", ":", "kvm:kvm", "tcg,thread=multi", "kvm tcg", "kvm\n")
]
BAD += [
  ((*RUN, "--qemu", word), ["--qemu", "program"])
  for word in ("/no/such", "no-such-program", "/etc/passwd", "/", ".", "/dev/null")
]
BAD += [
  ((*RUN, option, "", "--", "true"), [option, "needs a value"])
  for option in ("--qemu", "--sync", "--console-log")
]
BAD += [
  ((*RUN[:2], "x" * 5000), ["version"]),
  ((*RUN, "--name", "x" * 5000), ["name"]),
]


@pytest.mark.parametrize("words, fragments", BAD, ids=[ascii(" ".join(b[0]))[:50] for b in BAD])
def test_bad_words_are_refused_before_anything_happens(qvm, server, words, fragments):
  run = raw(qvm, *words)
  assert (run.returncode, run.stdout) == (2, b""), run.stderr
  text = run.stderr.decode()
  assert re.fullmatch("qvm: [ -\uffff]+\n", text) and text[:-1].isprintable(), text
  for fragment in fragments:
    assert fragment in text
  assert (server.started, list(qvm.home.iterdir())) == (0, [])


@pytest.mark.parametrize(
  "words", [("x" * 5000,), (*RUN[:2], "x" * 5000), (*RUN, "--name", "x" * 5000)], ids=len
)
def test_a_very_long_word_is_not_repeated_whole(words):
  with pytest.raises(qvm_source.UsageError) as caught:
    parse(*words)
  assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
  "name, value",
  [
    ("QVM_RELEASES_URL", "ftp://example.org"),
    ("QVM_RELEASES_URL", "https://"),
    ("QVM_RELEASES_URL", "example.org/x"),
    ("QVM_RELEASES_URL", "https://example.org/a b"),
    ("QVM_RELEASES_URL", "https://example.org/\n"),
    ("QVM_TIMEOUT", "soon"),
    ("QVM_TIMEOUT", "-1"),
    ("QVM_TIMEOUT", "nan"),
    ("QVM_RETRY_DELAY", "inf"),
    ("QVM_RETRY_DELAY", "3601"),
  ],
)
def test_bad_environment_is_refused_before_anything_happens(qvm, server, name, value):
  run = qvm("run", *FREEBSD, env={name: value})
  assert (run.returncode, run.stdout) == (2, "")
  assert re.fullmatch(f"qvm: {name}: .+\n", run.stderr), run.stderr
  assert (server.started, list(qvm.home.iterdir())) == (0, [])


WORDS = st.one_of(
  st.sampled_from(sorted(qvm_source.COMMANDS)),
  st.sampled_from(OS_NAMES + CPU_NAMES),
  st.sampled_from(sorted(flag for option in qvm_source.OPTIONS for flag in option.flags)),
  st.sampled_from(["15.1", "2G", "4", "0.0.0.0:22", "kvm:tcg", "print-path", "x", "--", "-", ""]),
  st.sampled_from(HOSTILE + (sys.executable, "/usr/bin/env")),
  st.builds(
    "{}{}{}".format,
    st.sampled_from(sorted(flag for option in qvm_source.OPTIONS for flag in option.flags)),
    st.sampled_from(["=", ""]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
  ),
  # What argv can hold: no NUL; bytes that are no UTF-8 come as lone surrogates.
  st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
  st.text(st.sampled_from("\udc80\udcff-=/a"), max_size=4),
)
ANY_WORDS = st.one_of(
  st.lists(WORDS, max_size=8),
  st.builds(lambda more: ["run", *FREEBSD, *more], st.lists(WORDS, max_size=4)),
)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, database=None)
@given(ANY_WORDS)
def test_any_words_are_options_or_a_usage_error(words):
  try:
    options = parse(*words)
  except qvm_source.UsageError as error:
    assert qvm_source.printable(str(error)) and not error.hint
    return
  assert isinstance(options, qvm_source.Options)
  if options.help or options.version:
    return
  if options.command in ("run", "pull") and len(options.operands) == 2:
    try:
      plan = qvm_source.make_plan(
        options, qvm_source.Host("linux", "x86-64"), qvm_source.Cache("/c"), "abcdef"
      )
    except qvm_source.QvmError:
      return
    for path, folder in ((plan.paths.disk, "/c/instances"), (plan.base, "/c/base")):
      assert os.path.dirname(os.path.normpath(path)) == folder
      assert re.fullmatch(r"[\w.+~-]+\.qcow2", os.path.basename(path), re.ASCII)


# --- Help and version ------------------------------------------------------------------------

COMMANDS = (
  *("run", "each", "pull", "search", "list", "ssh", "stop", "restart", "logs", "clone"),
  *("rm", "clean", "doctor", "config", "completion"),
)
SHARED = ("--help", "-h", "--version")
IN_GUEST = ("-e", "--env", "--sync", "--sync-direction", "--sync-exclude", "--sync-delete")
SET_UP = ("--prepare", "--install", "--prepare-timeout", "--rebuild")
KNOWN = {
  "": SHARED,
  "run": SHARED + ("--platform", "--rm", "--dry-run", "--name", "-m", "--memory", "--cpus")
  + ("--ssh-port", "--accel", "--qemu", "--qemu-arg", "--progress", "-d", "--detach")
  + ("--warm", "--stream", "--boot-timeout", "--boot-attempts", "--console-log", "--no-network")
  + ("-p", "--publish", "--disk", "--image", "--release", "--qemu-release")
  + ("--display",) + SET_UP + IN_GUEST,
  "each": SHARED + ("-j", "--jobs", "--fail-fast", "--logs", "--json", "--junit", "-m", "--memory")
  + ("--cpus", "--accel", "--qemu", "--qemu-arg", "--warm", "--stream", "--boot-timeout")
  + ("--boot-attempts", "--no-network", "-e", "--env", "--sync", "--sync-exclude", "--sync-out")
  + ("--install", "--prepare", "--prepare-timeout"),
  "ssh": SHARED + ("--boot-timeout",) + IN_GUEST,
  "pull": SHARED + ("--platform", "--qemu", "--progress", "--refresh", "--verify", "--mirror")
  + ("--release", "--qemu-release") + SET_UP
  + ("-e", "--env", "-m", "--memory", "--cpus", "--accel", "--boot-timeout"),
  "search": SHARED + ("--json",),
  "list": SHARED + ("--json",),
  "stop": SHARED + ("--force", "--boot-timeout"),
  "restart": SHARED + ("--force", "--boot-timeout"),
  "logs": SHARED + ("-f", "--follow"),
  "clone": SHARED,
  "rm": SHARED + ("--force",),
  "clean": SHARED + ("--all", "--dry-run"),
  "doctor": SHARED + ("--offline", "--json"),
  "config": SHARED,
  "completion": SHARED,
}  # fmt: skip


def test_the_lists_in_this_file_are_whole():
  assert tuple(qvm_source.COMMANDS) == COMMANDS
  assert qvm_source.OS_NAMES == OS_NAMES
  assert tuple(qvm_source.ARCHES) == CPU_NAMES


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_tells_the_options_that_there_are(offline, command):
  run = offline(*filter(None, [command]), "--help")
  assert (run.returncode, run.stderr) == (0, "")
  assert run.stdout.startswith(f"usage: qvm {command or 'COMMAND'} ")
  options, _, examples = run.stdout.partition("\nexamples:\n")
  options = options.partition("\noptions:\n")[2].partition("\nenvironment:\n")[0]
  flags = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", options)
  listed = [f for f in flags if any(f in known for known in KNOWN.values())]
  assert sorted(listed) == sorted(KNOWN[command])
  assert examples.strip()
  assert max(map(len, run.stdout.splitlines())) <= 100
  assert list(offline.home.iterdir()) == []


def examples_of(text):
  """The command lines of qvm in the help, in words."""
  for line in text.partition("\nexamples:\n")[2].splitlines():
    inner = re.search(r"\$\((.*)\)", line)
    words = shlex.split(inner.group(1) if inner else line.partition(" | ")[0])
    assert words[0] == "qvm", line
    yield words[1:]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_examples_in_the_help_parse(offline, command):
  examples = list(examples_of(offline(*filter(None, [command]), "--help").stdout))
  assert examples
  for words in examples:
    options = parse(*words)
    assert options.command == (command or "run")


def test_examples_of_run_plan_something(offline, image, tmp_path):
  (tmp_path / "out.qcow2").write_bytes(image)
  for words in examples_of(offline("run", "--help").stdout):
    more = [] if "--platform" in words else ["--platform", "x64"]
    run = offline("--dry-run", *words, *more, cwd=tmp_path)
    assert (run.returncode, run.stderr, run.stdout.count("\n")) == (0, "", 1)


@pytest.mark.parametrize(
  "words",
  [("-h",), ("--help", "run"), ("run", "-h"), ("run", "freebsd", "--help"), ("-h", *RUN)]
  + [("run", "plan9", "--help"), ("rm", "--help", "x"), ("--version", "--help")],
)
def test_help_anywhere(offline, words):
  run = offline(*words)
  assert (run.returncode, run.stderr) == (0, "")
  command = next((word for word in words if word in COMMANDS), "")
  assert run.stdout == offline(*filter(None, [command]), "--help").stdout


@pytest.mark.parametrize("words", [("--version",), ("run", "--version"), ("--version", "list")])
def test_version(offline, words):
  run = offline(*words)
  assert (run.returncode, run.stderr) == (0, "")
  assert run.stdout == f"qvm {qvm_source.__version__}\n"
  assert re.fullmatch(r"\d+\.\d+\.\d+", qvm_source.__version__)


@pytest.mark.parametrize("words", [("run", "--help"), ("--help",), ("config", "print-path")])
def test_output_in_a_locale_without_utf8(offline, words):
  env = {**offline.env, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  run = raw(offline, *words, env=env)
  assert (run.returncode, run.stderr) == (0, b"")
  assert run.stdout == raw(offline, *words).stdout


PRINTING = [("config", "print-path"), ("list",), ("run", "--help")]


@pytest.mark.parametrize("words", PRINTING)
def test_stdout_on_a_full_disk(offline, words):
  with open("/dev/full", "wb") as full:
    run = raw(offline, *words, stdout=full)
  assert (run.returncode, run.stderr) == (1, b"qvm: the disk is full: No space left on device\n")


@pytest.mark.parametrize("words", PRINTING)
def test_stdout_that_nobody_reads(offline, words):
  reader, writer = os.pipe()
  os.close(reader)
  run = raw(offline, *words, stdout=writer)
  os.close(writer)
  assert (run.returncode, run.stderr) == (141, b"")


@pytest.mark.parametrize("words", PRINTING)
def test_stdout_that_is_closed(offline, words):
  run = raw(offline, *words, preexec_fn=lambda: os.close(1))
  assert (run.returncode, run.stderr) == (0, b"")


# --- Where everything is ---------------------------------------------------------------------

HOME_OF_USER = pwd.getpwuid(os.getuid()).pw_dir


@pytest.mark.parametrize(
  "env, expected",
  [
    ({}, "HERE/home/.cache/qvm"),
    ({"HOME": None}, HOME_OF_USER + "/.cache/qvm"),
    ({"HOME": "/a b/c,d"}, "/a b/c,d/.cache/qvm"),
    ({"XDG_CACHE_HOME": "/x"}, "/x/qvm"),
    ({"XDG_CACHE_HOME": "/x/"}, "/x/qvm"),
    ({"XDG_CACHE_HOME": ""}, "HERE/home/.cache/qvm"),
    ({"XDG_CACHE_HOME": "x"}, "HERE/home/.cache/qvm"),
    ({"XDG_CACHE_HOME": "./x"}, "HERE/home/.cache/qvm"),
    ({"XDG_CACHE_HOME": "~/x"}, "HERE/home/x/qvm"),
    ({"XDG_CACHE_HOME": "/x", "HOME": None}, "/x/qvm"),
    ({"QVM_CACHE_DIR": "/q"}, "/q"),
    ({"QVM_CACHE_DIR": "/q/", "XDG_CACHE_HOME": "/x"}, "/q"),
    ({"QVM_CACHE_DIR": "", "XDG_CACHE_HOME": "/x"}, "/x/qvm"),
    ({"QVM_CACHE_DIR": "/q", "HOME": None}, "/q"),
    ({"QVM_CACHE_DIR": "q"}, "HERE/q"),
    ({"QVM_CACHE_DIR": b"/\xff\xe9"}, b"/\xff\xe9"),
    ({"QVM_CACHE_DIR": "/ü $x 'y'"}, "/ü $x 'y'"),
  ],
)
def test_print_path(offline, tmp_path, env, expected):
  env = {k: v for k, v in {**offline.env, **env}.items() if v is not None}
  run = raw(offline, "config", "print-path", env=env, cwd=tmp_path)
  expected = os.fsencode(expected).replace(b"HERE", os.fsencode(tmp_path))
  assert (run.returncode, run.stdout, run.stderr) == (0, expected + b"\n", b"")
  assert os.listdir(tmp_path) == ["home"] and os.listdir(offline.home) == []


@pytest.mark.parametrize("home, path", [("x", "HERE/x"), ("./x", "HERE/x")])
def test_the_path_is_absolute_whatever_home_is(offline, tmp_path, home, path):
  run = raw(offline, "config", "print-path", env={**offline.env, "HOME": home}, cwd=tmp_path)
  expected = os.path.join(path.replace("HERE", str(tmp_path)), ".cache/qvm\n").encode()
  assert (run.returncode, run.stdout, run.stderr) == (0, expected, b"")


def no_home(run):
  """The error of a user without a home folder."""
  assert (run.returncode, run.stdout) == (1, ""), run
  assert re.fullmatch("qvm: .*no home folder\nqvm: .*QVM_CACHE_DIR.*\n", run.stderr), run
  return True


def test_a_home_that_names_no_folder(offline, tmp_path):
  assert no_home(offline("config", "print-path", env={"HOME": "~"}, cwd=tmp_path))


def test_a_user_without_a_home_is_told(offline, tmp_path):
  """As in a container that is started with an arbitrary uid: no passwd entry, no HOME."""
  code = "os.getuid = lambda: 4000000"
  del offline.env["HOME"]
  assert no_home(offline("config", "print-path", code=code, cwd=tmp_path))
  run = offline("config", "print-path", code=code, env={"QVM_CACHE_DIR": "/q"})
  assert (run.returncode, run.stdout) == (0, "/q\n")


@pytest.mark.parametrize("words, command", [(["help"], ""), (["help", "run"], "run")])
def test_help_is_a_command_too(offline, words, command):
  run = offline(*words)
  assert (run.returncode, run.stdout) == (0, qvm_source.help_text(command) + "\n")


@pytest.mark.parametrize("words, fragments", [
  (["runn", "freebsd"], ["'runn'; did you mean run?"]),
  (["help", "nosuch"], ["'nosuch'"]),
  (["each", "freebsd-sparc", "--", "true"], ["'sparc' in 'freebsd-sparc'"]),
  (["each", "--logs", __file__, "freebsd-15.1", "--", "true"], ["--logs: not a folder"]),
  (["pull", "--mirror", __file__, "freebsd", "15.1"], ["--mirror: not a folder"]),
  (["each", "--sync", ".", "--sync-out", __file__, "freebsd", "--", "x"], ["-out: not a folder"]),
])  # fmt: skip
def test_what_a_newcomer_mistypes(offline, words, fragments):
  run = offline(*words)
  assert run.returncode == 2 and all(text in run.stderr for text in fragments), run.stderr
  assert run.stderr.count("\n") <= 2 and list(offline.home.iterdir()) == []


def test_the_help_of_run_says_how_to_leave():
  assert "Ctrl-A x ends the machine" in qvm_source.help_text("run")
