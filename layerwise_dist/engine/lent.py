"""What one engine lends another for a single checkpoint: the same objects, which the other neither hooks nor ends."""

from __future__ import annotations

from typing import Any


class Lent:
    """`thing`, but for what would hook the training or let go of it."""

    roots: tuple[Any, ...] = ()  # of a framework: nothing is trained meanwhile

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)

    def forward_modules(self) -> list[Any]:
        return []

    def gradient_ready_params(self) -> list[Any]:
        return []

    def watch(self, events: Any) -> None:
        pass

    def detach(self) -> None:
        pass

    def close(self, **_: Any) -> bool:
        return False
