"""What a guest sends to the user's terminal: all of it but what could harm the user there."""

import contextlib
import re
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import end_processes, furnish, processes_of
from support_terminal import Terminal

import qvm as qvm_source

# Each is left out as a whole; what stands between them is shown.
HARM = {
  "enq": b"\x05",
  "title, bel": b"\x1b]0;rm -rf ~\x07",
  "title, st": b"\x1b]2;rm -rf ~\x1b\\",
  "icon": b"\x1b]1;x\x07",
  "no number": b"\x1b];x\x07",
  "zeros": b"\x1b]0002;x\x07",
  "clipboard": b"\x1b]52;c;cm0gLXJmIH4K\x07",
  "clipboard, zeros": b"\x1b]052;c;cm0gLXJmIH4K\x1b\\",
  "clipboard, in UTF-8": b"\xc2\x9d52;c;cm0gLXJmIH4K\xc2\x9c",
  "clipboard with lines": b"\x1b]52;c;cm0g\nLXJmIH4K\x07",
  "iTerm2's": b"\x1b]1337;Copy=:eA==\x07",
  "kitty's": b"\x1b]5522;type=write\x1b\\",
  "Sun's title": b"\x1b]lrm -rf ~\x1b\\",
  "screen's title": b"\x1bkrm -rf ~\x1b\\",
  "cancelled": b"\x1b]0;abc\x18",
  "with UTF-8": "\x1b]0;Grüße \u201d\u2026\x07".encode(),
}
# None of it is changed.
PLAIN = (
  *(
    b"",
    b"text\r\n",
    "Grüße \u201c52;\u201d \u00a0".encode(),
    bytes(range(6, 256)),
    b"\x00\x04\x06",
  ),
  *(b"\x1b[31m", b"\x1b[?1049h", b"\x1b[6n", b"\x1b]8;;http://x/\x1b\\link", b"\x1b]4;1;#fff\x07"),
  *(b"\x1b]10;?\x07", b"\x1b]104\x07", b"\x1b]133;A\x07", b"\x1b]520;x\x07", b"\x1b]3;x\x07"),
  *(b"\x1bP$qm\x1b\\", b"\x1bc", b"\x1b(B", b"\x1b\x1b", b"\xc2\xa052;c;x", b"]52;c;x", b"\xc2 "),
)


def shown(chunks):
  screen = qvm_source.Screen()
  return b"".join([*map(screen.show, chunks), screen.rest()])


@pytest.mark.parametrize("name", HARM)
def test_harm_is_left_out_wherever_it_is_cut(name):
  data = b"before" + HARM[name] + b"after"
  assert shown([data]) == b"beforeafter"
  assert shown([data[n : n + 1] for n in range(len(data))]) == b"beforeafter"
  for cut in range(len(data)):
    assert shown([data[:cut], data[cut:]]) == b"beforeafter"


@pytest.mark.parametrize("data", PLAIN, ids=repr)
def test_all_else_is_shown_byte_for_byte(data):
  data = b"a" + data + b"b"
  for cut in range(len(data)):
    assert shown([data[:cut], data[cut:]]) == data


# What begins harm must not run into what follows it.
separate = st.sampled_from([piece + b"." for piece in PLAIN if b"\x1b]" not in piece[-2:]])
pieces = st.lists(st.one_of(separate, st.sampled_from(list(HARM.values()))), max_size=8)


@given(pieces, st.lists(st.integers(1, 7), max_size=60))
@example([HARM["clipboard"], b"\x1b.", b"\x05"], [1] * 30)
def test_any_mixture_cut_anywhere(parts, cuts):
  data, chunks = b"".join(parts), []
  for cut in cuts:
    chunks.append(data[:cut])
    data = data[cut:]
  harm = set(HARM.values())
  assert shown([*chunks, data]) == b"".join(part for part in parts if part not in harm)


def test_an_endless_title_is_shown_to_nobody_and_kept_by_nobody():
  screen = qvm_source.Screen()
  assert screen.show(b"a\x1b]52;c;") == b"a"
  for _ in range(100):
    assert screen.show(b"QUJD" * 1000) == b""
    assert len(screen.held) <= 1
  assert screen.show(b"\x1b[31mred") == b"\x1b[31mred"  # another sequence ends it, as in xterm
  assert shown([b"a\x1bkname\r\nlogin: "]) == b"a\r\nlogin: "


def test_a_beginning_that_nothing_follows_is_shown_at_the_end():
  for data in (b"a\x1b", b"a\x1b]", b"a\x1b]5", b"a\xc2", b"a\x1b]000"):
    screen = qvm_source.Screen()
    assert screen.show(data) == b"a"
    assert screen.rest() == data[1:]
  assert shown([b"a\x1b]52;c;x"]) == b"a"


@pytest.mark.parametrize("asks, answers, due", [
  (b"", b"", 0),
  (b"\x1b[6n", b"", 1),
  (b"\x1b[c\x1b[>c\x1b[5n", b"\x1b[?62;c", 2),
  (b"\x1b]11;?\x1b\\", b"\x1b]11;rgb:0/0/0\x1b\\", 0),
  (b"\x1b[?2026$p\x1b[?u\x1b[>0q\x1bP+q544e\x1b\\\x1b[18t", b"", 5),
  (b"\x1b[31m\x1b[2J\x1b[1;5H\x1b[?25l\x1b]8;;x\x07", b"", 0),
  (b"", b"\x1b[A\x1b[1;5R", 0),
])  # fmt: skip
def test_answers_that_are_due(asks, answers, due):
  for size in (1, 3, 1000):
    screen = qvm_source.Screen()
    for start in range(0, len(asks), size):
      screen.show(asks[start : start + size])
    screen.show(b".")
    screen.typed(answers)
    assert screen.asked == due


# --- The whole program ----------------------------------------------------------------------

GUEST = f"""#!{sys.executable} -IS
import os
os.write(1, bytes.fromhex(os.environ["SHOWN"]))
os.read(0, 1)
"""


@pytest.fixture
def on_terminal(offline, image):
  """Runs a guest that shows something, until a key, on a terminal; a shell comes afterwards."""
  furnish(offline.cache, GUEST, image)
  with contextlib.ExitStack() as stack:

    def start(text, after="true"):
      offline.env["SHOWN"] = text.hex()
      words = offline.command("run", "--rm", "--console-log", "log", "freebsd", "15.1")
      shell = ["sh", "-c", f'"$@"; code=$?; {after}; exit $code', "sh", *words]
      terminal = Terminal(shell, offline.env, cwd=str(offline.home))
      stack.callback(end_processes, offline.cache)
      stack.callback(terminal.close)
      return terminal

    yield start
  assert processes_of(offline.cache) == {}


def test_the_terminal_gets_no_harm_and_the_log_everything(on_terminal, offline):
  text = b"<start>" + b"|".join(HARM.values()) + b"<end>"
  terminal = on_terminal(text)
  terminal.until(b"<end>")
  terminal.type(b"x")
  assert terminal.end() == 0
  assert b"<start>" + b"|" * (len(HARM) - 1) + b"<end>" in terminal.shown
  assert (offline.home / "log").read_bytes() == text


@pytest.mark.parametrize("due", [1, 3])
def test_late_answers_do_not_reach_the_shell(on_terminal, due):
  """The terminal answers only once the guest has ended; what is typed later is the shell's."""
  terminal = on_terminal(
    b"\x1b[6n" * due + b"<asked>", "printf '<shell>'; read line; echo \"[$line]\""
  )
  terminal.until(b"<asked>")
  terminal.type(b"x")
  terminal.until(b"\x1b[c")  # qvm's own question, after which nothing of the guest's comes
  terminal.type(b"\x1b[12;40R" * due + b"\x1b[?62;22c")
  terminal.until(b"<shell>")
  terminal.type(b"ls\r")
  assert terminal.end() == 0
  assert re.search(rb"\[ls\]", terminal.shown), bytes(terminal.shown)


def test_a_terminal_that_never_answers_is_not_waited_for_long(on_terminal):
  terminal = on_terminal(b"\x1b[6n<asked>")
  terminal.until(b"<asked>")
  terminal.type(b"x")
  assert terminal.end() == 0
  assert terminal.state() == terminal.before


def test_no_question_without_one_of_the_guests(on_terminal):
  terminal = on_terminal(b"\x1b[31m<red>")
  terminal.until(b"<red>")
  terminal.type(b"x")
  assert terminal.end() == 0
  assert b"\x1b[c" not in terminal.shown
