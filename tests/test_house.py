"""The rules of the house that its syntax tree shows: DESIGN.md, "What keeps it liveable".

Each rule is a function from a syntax tree to what breaks it; samples show that each one can fail.
"""

import ast
import re
from typing import NamedTuple

import pytest
from support import ROOT

LONGEST = 60  # lines of a function
# What begins a section; its lines go on to the right margin.
SECTION_RE = re.compile(r"# -{4} (\S.*?) -+")

# Functions that may hold an import statement. Modules load lazily through module-level objects.
MAY_IMPORT = {"python_zstd"}  # which may be missing
# What ends the process of an image server whose qvm has gone before it was ready.
LIFE_LINE = "watch_pipe"

OPENERS = {"build_opener", "install_opener", "urlopen", "urlretrieve", "OpenerDirector"}
CONNECTIONS = {"HTTPConnection", "HTTPSConnection"}
WAYS = ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")
STARTERS = {
  "subprocess": {"run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"},
  "os": {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp"}
  | {f"{kind}{how}" for kind in ("exec", "spawn") for how in WAYS},
  "pty": {"fork", "spawn"},
}


class Tree(NamedTuple):
  """A program: its syntax tree and its lines."""

  body: ast.Module
  lines: list


class Use(NamedTuple):
  """A node of the tree, with the names of the functions and classes around it."""

  node: ast.AST
  around: tuple

  def __str__(self):
    return f"line {self.node.lineno}, in {'.'.join(self.around) or 'the module'}"

  @property
  def function(self):
    """The name of the innermost function or class."""
    return self.around[-1] if self.around else ""


def tree_of(text):
  """Parse a program."""
  return Tree(ast.parse(text), text.splitlines())


def is_def(node):
  """Whether a node is a function or class."""
  return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def annotations_of(node):
  """The annotations that hang directly on a node."""
  if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
    a = node.args
    args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [each for each in [*(arg.annotation for arg in args), node.returns] if each]
  return [node.annotation] if isinstance(node, ast.AnnAssign) else []


def uses(tree, annotations=True):
  """All nodes in order, with what is around them; annotations can be left out."""

  def walk(node, around):
    yield Use(node, around)
    inside = (*around, node.name) if is_def(node) else around
    skipped = [] if annotations else [id(each) for each in annotations_of(node)]
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.arguments) and not annotations:
        for value in filter(None, [*child.defaults, *child.kw_defaults]):
          yield from walk(value, inside)
      elif id(child) not in skipped:
        yield from walk(child, inside)

  for node in tree.body.body:
    yield from walk(node, ())


def called(use):
  """(module, name) of an attribute such as subprocess.Popen; ("", name) of a plain name."""
  node = use.node
  if isinstance(node, ast.Attribute):
    base = node.value
    return (base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "?"), node.attr)
  return ("", node.id) if isinstance(node, ast.Name) else ("", "")


# --- The rules -------------------------------------------------------------------------------


def bound_names(statement):
  """The names that a statement of the module binds, also in an if, try or with."""
  if is_def(statement):
    return {statement.name}
  found = set()
  for node in ast.walk(statement):
    if is_def(node):
      found.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      found.add(node.id)
    elif isinstance(node, ast.alias):
      found.add((node.asname or node.name).partition(".")[0])
  return found


def local_names(function):
  """The names that belong to a function: arguments, and what it binds without `global`."""
  found, shared = set(), set()
  a = function.args
  for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]:
    found.add(arg.arg)
  body = function.body if isinstance(function.body, list) else [function.body]
  todo = list(body)
  while todo:
    node = todo.pop()
    if isinstance(node, (ast.Global, ast.Nonlocal)):
      shared.update(node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      found.add(node.id)
    elif isinstance(node, ast.ExceptHandler) and node.name:
      found.add(node.name)
    elif isinstance(node, ast.alias):
      found.add((node.asname or node.name).partition(".")[0])
    if is_def(node):
      found.add(node.name)
    elif not isinstance(node, ast.Lambda):
      todo += ast.iter_child_nodes(node)
  return found - shared


def global_names(statement):
  """[(name, line)] that a statement of the module reads from the module, annotations included."""
  found = []

  def visit(node, known):
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
      if node.id not in known:
        found.append((node.id, node.lineno))
      return
    for annotation in annotations_of(node):
      if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        inner = ast.parse(annotation.value, mode="eval").body
        found.extend((n.id, node.lineno) for n in ast.walk(inner) if isinstance(n, ast.Name))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
      outside = [*getattr(node, "decorator_list", []), *annotations_of(node)]
      outside += filter(None, [*node.args.defaults, *node.args.kw_defaults])
      for child in outside:
        visit(child, known)
      inside = known | local_names(node)
      for child in node.body if isinstance(node.body, list) else [node.body]:
        visit(child, inside)
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
      targets = {
        n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)
      }
      for child in ast.iter_child_nodes(node):
        visit(child, known | targets)
    else:
      for child in ast.iter_child_nodes(node):
        visit(child, known)

  visit(statement, frozenset())
  return found


def uses_of_later_sections(tree):
  """A section uses only names of its own and of the sections above it."""
  starts = [(n, m.group(1)) for n, m in enumerate(map(SECTION_RE.fullmatch, tree.lines), 1) if m]
  titles = ["the head", *(title for _, title in starts)]

  def section(line):
    return sum(line > start for start, _ in starts)

  homes = {}
  for statement in tree.body.body:
    for name in bound_names(statement):
      homes.setdefault(name, section(statement.lineno))
  broken = []
  for statement in tree.body.body:
    here = section(statement.lineno)
    for name, line in global_names(statement):
      if homes.get(name, 0) > here:
        broken.append(f"line {line}: {titles[here]} uses {name} of {titles[homes[name]]}")
  return broken


def programs_started(tree):
  """Only `start` uses popen_type, and only that Popen, once; nothing else starts programs."""
  users = {"Popen": "popen_type", "popen_type": "start"}
  broken, popen = [], []
  for use in uses(tree, annotations=False):
    module, name = called(use)
    named = name == "Popen" and "Popen[" in tree.lines[use.node.lineno - 1]  # a type
    if name in users and not named:
      popen += [use] * (name == "Popen")
      if users[name] not in use.around:
        broken.append(f"{use}: {name}")
    if name in STARTERS.get(module, ()):
      broken.append(f"{use}: {module}.{name}")
    if isinstance(use.node, ast.ImportFrom) and use.node.module in STARTERS:
      bad = STARTERS[use.node.module] | {"Popen"}
      broken += [f"{use}: {each.name}" for each in use.node.names if each.name in bad]
  return broken if len(popen) == 1 else [*broken, f"Popen is used in {len(popen)} places"]


def addresses_opened(tree):
  """Only `open_url` builds openers; one more function may make connections of http.client."""
  broken, makers = [], set()
  for use in uses(tree, annotations=False):
    _, name = called(use)
    if name in OPENERS and use.function != "open_url":
      broken.append(f"{use}: {name}")
    if name in CONNECTIONS and use.function != "open_url":
      makers.add(use.around)
  if len(makers) > 1:
    broken += [f"connections are made in {'.'.join(maker)}" for maker in sorted(makers)]
  return broken


def ends_of_the_process(tree):
  """Only main ends the process, and the life-line's watcher of an image server."""
  allowed = {("sys", "exit"): (), ("os", "_exit"): ("main", LIFE_LINE)}
  broken = []
  for use in uses(tree):
    name = called(use)
    if name in allowed and use.function not in allowed[name]:
      broken.append(f"{use}: {'.'.join(name)}")
    if name[0] == "" and name[1] in ("exit", "quit", "SystemExit"):
      broken.append(f"{use}: {name[1]}")
  return broken


def long_functions(tree):
  """No function has more than LONGEST lines."""
  return [
    f"{use}.{use.node.name}: {lines} lines"
    for use in uses(tree)
    if isinstance(use.node, (ast.FunctionDef, ast.AsyncFunctionDef))
    for lines in [use.node.end_lineno - use.node.lineno + 1]
    if lines > LONGEST
  ]


def names_given_twice(tree):
  """No name of the module is given to two things: the second would count for both."""
  broken, known = [], set()
  for statement in tree.body.body:
    if not isinstance(statement, (ast.AugAssign, ast.Import, ast.ImportFrom)):
      names = bound_names(statement)
      broken += [f"line {statement.lineno}: {name}" for name in sorted(names & known)]
      known |= names
  return broken


def imports_in_functions(tree):
  """No function but those of a short list holds an import statement."""
  return [
    str(use)
    for use in uses(tree)
    if isinstance(use.node, (ast.Import, ast.ImportFrom))
    and use.around
    and use.function not in MAY_IMPORT
  ]


def without_docstrings(tree):
  """Every public function and class of the module says what it is for."""
  return [
    f"line {node.lineno}: {node.name}"
    for node in tree.body.body
    if is_def(node) and not node.name.startswith("_") and not ast.get_docstring(node)
  ]


def dictionaries_passed(tree):
  """No function takes or returns a Dict[str, Any], but those of a short list."""
  broken = []
  for use in uses(tree):
    if not isinstance(use.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      continue
    texts = [ast.unparse(each).replace("'", "") for each in annotations_of(use.node)]
    bad = [text for text in texts if re.search(r"(Dict|dict|Mapping)\[str, Any\]", text)]
    if bad:
      broken.append(f"{use}.{use.node.name}: {', '.join(bad)}")
  return broken


def rule_ids(value):
  """The name of a rule as a part of a test's name, and nothing of the others."""
  return getattr(value, "__name__", "")


# --- qvm.py ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program_tree():
  """The tree of qvm.py."""
  return tree_of((ROOT / "qvm.py").read_text())


@pytest.mark.parametrize("rule", [
  uses_of_later_sections,
  programs_started,
  addresses_opened,
  ends_of_the_process,
  long_functions,
  names_given_twice,
  imports_in_functions,
  without_docstrings,
  dictionaries_passed,
], ids=rule_ids)  # fmt: skip
def test_the_house_keeps_the_rule(program_tree, rule):
  broken = rule(program_tree)
  assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


def test_there_are_sections_and_a_start(program_tree):
  """The rules above would hold of an empty file, too."""
  titles = [line for line in program_tree.lines if SECTION_RE.fullmatch(line)]
  names = {node.name for node in program_tree.body.body if is_def(node)}
  assert len(titles) > 10
  assert {"start", "open_url", "main"} <= names


# --- Samples ---------------------------------------------------------------------------------


def program(*lines):
  """A program of lines; `--- X` begins a section."""
  return "".join(
    f"# ---- {line[4:]} ----\n" if line[:4] == "--- " else line + "\n" for line in lines
  )


START = ("def popen_type():", "  return subprocess.Popen", "def start(c):", "  popen_type()(c)")

# A rule, a program that breaks it, and how often.
BROKEN = [
  (uses_of_later_sections, program("--- A", "def f():", "  g()", "--- B", "def g(): pass"), 1),
  (uses_of_later_sections, program("--- A", "def f(x: C) -> 'C': 1", "--- B", "class C: 1"), 2),
  (
    uses_of_later_sections,
    program("--- A", "class D(C):", " x: C = C()", "--- B", "class C: 1"),
    3,
  ),
  (uses_of_later_sections, program("--- A", "f = lambda: [N for n in M]", "--- B", "N = M = 1"), 2),
  (uses_of_later_sections, program("f = N", "--- A", "--- B", "if x:", "  N = 1"), 1),
  (
    uses_of_later_sections,
    program("--- A", "def f(a):", " def g():", "  return N + a", "--- B", "N = a = 1"),
    1,
  ),
  (programs_started, program(*START, "def f():", "  subprocess.Popen([])"), 2),
  (programs_started, program(*START, "def f():", "  popen_type()([])"), 1),
  (programs_started, program(*START, "def f():", "  subprocess.run([])"), 1),
  (programs_started, program(*START, "g = subprocess.check_output"), 1),
  (programs_started, program(*START, "def f():", "  os.execv('', [])"), 1),
  (programs_started, program(*START, "from subprocess import call, Popen"), 2),
  (programs_started, program("def start(): pass"), 1),
  (addresses_opened, program("def f():", "  urllib.request.urlopen('')"), 1),
  (addresses_opened, program("def f():", "  urllib.request.build_opener()"), 1),
  (
    addresses_opened,
    program("def f():", "  HTTPConnection()", "def g():", "  http.client.HTTPSConnection()"),
    2,
  ),
  (ends_of_the_process, program("def f():", "  sys.exit(1)"), 1),
  (ends_of_the_process, program("def f():", "  os._exit(1)"), 1),
  (ends_of_the_process, program("def f():", "  raise SystemExit"), 1),
  (long_functions, program("def f():", *["  pass"] * LONGEST), 1),
  (
    imports_in_functions,
    program("def f():", "  import os", "class C:", " def g(self):", "  from os import path"),
    2,
  ),
  (names_given_twice, program("N = 1", "def f(): pass", "N = f = 2"), 2),
  (names_given_twice, program("def f(): pass", "def f(): pass"), 1),
  (without_docstrings, program("def f(): pass", "class C:", "  pass"), 2),
  (dictionaries_passed, program("def f(x: Dict[str, Any]) -> Optional[Dict[str, Any]]: 1"), 1),
  (dictionaries_passed, program("class C:", "  def f(self) -> 'List[Dict[str, Any]]': 1"), 1),
]

# A rule, and a program that keeps it though it looks like one that does not.
KEPT = [
  (uses_of_later_sections, program("--- A", "def f(N):", "  return N", "--- B", "N = f")),
  (
    uses_of_later_sections,
    program("--- A", "def f(x):", "  return x.N, [N for N in x]", "--- B", "N = f"),
  ),
  (
    uses_of_later_sections,
    program("--- A", "def f():", " N = 1", " def g():", "  return N", "--- B", "N = f"),
  ),
  (programs_started, program(*START, "def f(p: 'subprocess.Popen') -> subprocess.Popen: 1")),
  (programs_started, program(*START, "def f():", "  return self.run(subprocess.PIPE)")),
  (
    addresses_opened,
    program("def open_url():", "  build_opener()", "def f():", "  HTTPConnection(HTTPSConnection)"),
  ),
  (ends_of_the_process, program("def main():", "  os._exit(1)", "main()")),
  (long_functions, program("def f():", *["  pass"] * (LONGEST - 1))),
  (imports_in_functions, program("import os", "if x:", "  import re")),
  (names_given_twice, program("N = 1", "N += 1", "if N:", "  M = 1", "else:", "  M = 2")),
  (names_given_twice, program("N = 1", "def f(N):", "  M = N", "def g():", "  M = 2")),
  (without_docstrings, program("def _f(): pass", "class C:", "  'good'", "  def g(self): pass")),
  (dictionaries_passed, program("def f(x: Dict[str, str], **more: Any) -> None: pass")),
]


@pytest.mark.parametrize("rule, text, times", BROKEN, ids=rule_ids)
def test_what_breaks_a_rule_is_found(rule, text, times):
  assert len(rule(tree_of(text))) == times, rule(tree_of(text))


@pytest.mark.parametrize("rule, text", KEPT, ids=rule_ids)
def test_what_keeps_a_rule_is_left_alone(rule, text):
  assert rule(tree_of(text)) == []
