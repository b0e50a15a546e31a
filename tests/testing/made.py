"""Components for the conformance kit's own tests."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from kvfleet.plugin.component import Component
from kvfleet.testing.conformance import ConformanceError, check_component


def breaches(component: Component | type, **sample: Any) -> tuple[str, ...]:
    """What the kit finds."""
    with pytest.raises(ConformanceError) as caught:
        check_component(component, **sample)
    return caught.value.breaches


def stage(verb: str, run: Any) -> type:
    """A component whose verb is `run`."""

    @attrs.define
    class Made:
        """Made for a test."""

        calls: int = attrs.field(init=False, default=0)

    setattr(Made, verb, run)
    return Made
