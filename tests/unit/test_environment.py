"""The environment fingerprint: what differs is named."""

from __future__ import annotations

import pytest

from training.environment import fingerprint, require_same
from training.errors import UserError


def test_the_same_environment_passes() -> None:
    here = fingerprint()
    assert set(here) == {"torch", "instruction_set", "threads", "device"}
    require_same(dict(reversed(here.items())), here)


@pytest.mark.parametrize("name", ["torch", "instruction_set", "threads", "device"])
def test_what_differs_is_named_with_both_values_and_nothing_else(name: str) -> None:
    here = fingerprint()
    with pytest.raises(UserError) as caught:
        require_same({**here, name: "other"}, here)
    message = str(caught.value)
    assert f"{name}: the run has other, this machine {here[name]}" in message
    assert all(f"{other}: the run" not in message for other in here if other != name)
    assert "--fresh" in message


def test_an_entry_that_only_one_side_has_differs() -> None:
    here = fingerprint()
    with pytest.raises(UserError, match=f"torch: the run has None, this machine {here['torch'][:4]}"):
        require_same({name: value for name, value in here.items() if name != "torch"}, here)
    with pytest.raises(UserError, match="cudnn: the run has 9, this machine None"):
        require_same({**here, "cudnn": "9"}, here)
