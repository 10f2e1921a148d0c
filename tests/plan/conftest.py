import pytest

from plan.kinds import KINDS
from tests.plan.fake_kind import Fake


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets experiments name the fake kind."""
    monkeypatch.setitem(KINDS, "fake", Fake)
