#!/usr/bin/env python3
"""Check workflows, the action and the README's recipes against their public schemas.

check-jsonschema and kubernetes-validate bring the schemas with them: nothing is downloaded.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# What a recipe of the README contains, and who knows its schema.
RECIPES = {"runs-on:": "github-workflows", "script:": "gitlab-ci", "apiVersion:": "kubernetes"}


def check(schema, paths):
  """Whether files agree with a schema; the tool says what does not."""
  command = [BIN / "check-jsonschema", "--builtin-schema", "vendor." + schema]
  if schema == "kubernetes":
    command = [BIN / "kubernetes-validate", "--strict", "--quiet"]
  return subprocess.call([*command, *paths]) == 0


def main():
  """Check all; the exit code is 1 when something does not agree."""
  github = ROOT / ".github"
  good = [
    check("github-workflows", sorted(github.glob("workflows/*.yml"))),
    check("github-actions", sorted(github.glob("actions/*/action.yml"))),
  ]
  found = re.findall(r"(?ms)^```yaml\n(.*?)^```", (ROOT / "README.md").read_text())
  with tempfile.TemporaryDirectory() as folder:
    for number, text in enumerate(found):
      path = Path(folder, f"recipe{number}.yml")
      path.write_text(text)
      [schema] = [name for word, name in RECIPES.items() if word in text]
      good.append(check(schema, [path]))
  sys.exit(0 if all(good) and len(found) >= len(RECIPES) else 1)


if __name__ == "__main__":
  main()
