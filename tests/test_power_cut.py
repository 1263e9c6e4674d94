"""After a power cut at any moment everything starts, and what was said to be kept is there."""

import sys

import pytest
from support_power import ACTIONS, Cuts
from support_pythons import since


@pytest.fixture(scope="module")
def cuts(tmp_path_factory, tools_tar):
  return Cuts(tmp_path_factory.mktemp("power"), tools_tar)


@since(3, 8)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("action", ACTIONS)
def test_a_power_cut_at_any_moment(cuts, action):
  """`make torture` does 100 of each."""
  lost = [cuts.one(number, action) for number in range(4)]
  assert any(map(sum, lost))
