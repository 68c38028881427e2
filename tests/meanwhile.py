"""Another run that does its work in the middle of this one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def before_each(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, work: Callable[[], Any]) -> list[Any]:
    """Has ``work`` done right before each call of ``owner``'s function ``name``; gives its results as they come."""
    original = getattr(owner, name)
    results: list[Any] = []

    def with_work(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, original)
            results.append(work())
        return original(*args)

    monkeypatch.setattr(owner, name, with_work)
    return results
