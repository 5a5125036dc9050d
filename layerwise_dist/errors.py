# SPDX-License-Identifier: Apache-2.0
"""Every error that this package raises on purpose, so that a script can tell them apart.

All of them are `LayerwiseError`; those that have a standard Python meaning inherit from that class too.
A message says what was expected, what was found and where; nothing is raised without one. Names and texts in it may
come from a file, so that it passes `shown` before anybody sees it.
"""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 4000


def shown(text: str, limit: int = _LONGEST) -> str:
    """The text as a terminal may be given it: control characters, marks that turn the writing around and halves of
    characters are escaped, line ends stay, and of more than `limit` characters the rest is counted.
    """
    more = f"... ({len(text) - limit} more characters)" if len(text) > limit else ""
    text = text[:limit]
    if not text.isprintable():
        text = "".join(each if each == "\n" or each.isprintable() else _escaped(each) for each in text)
    return text + more


def named(names: Iterable[object], most: int) -> str:
    """The first `most` of them with commas between, and how many more there are."""
    every = [str(name) for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class LayerwiseError(Exception):
    """The base of all errors of layerwise_dist."""

    def __str__(self) -> str:
        return shown(super().__str__())


class ConfigError(LayerwiseError, ValueError):
    """A configuration key that is unknown, has the wrong type, or makes an impossible combination."""


class UnsupportedError(LayerwiseError, TypeError):
    """A model, optimizer or wrapper that this version cannot capture exactly; the message says what works."""


class StateError(LayerwiseError, TypeError):
    """Something in `state=` can be written neither as a tensor nor as typed JSON, or does not accept what was saved of
    it.

    Attributes:
        path: where it is, such as ``state['scheduler']['lr_lambdas'][0]``.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self._message = path, message

    def __reduce__(self) -> tuple[type[StateError], tuple[str, str]]:
        return type(self), (self.path, self._message)  # between ranks, errors travel as pickles of their arguments


class BoundaryError(LayerwiseError, RuntimeError):
    """The end of an iteration is unclear, or a call came too early."""


class OwnerError(LayerwiseError, RuntimeError):
    """Another live job writes in this checkpoint directory, or has taken it over."""


class DirectoryError(LayerwiseError, OSError):
    """The checkpoint directory is unusable: not writable, not a directory, or not the mount that rank 0 sees."""


class DamageError(LayerwiseError):
    """Bytes on disk are not what was committed: cut, flipped, or of another checkpoint.

    The message names file, tensor and block.
    """


class MismatchError(LayerwiseError):
    """A sound checkpoint that is not of this model, optimizer or world size. Nothing was loaded."""


class NotFoundError(LayerwiseError, LookupError):
    """The checkpoint that was asked for does not exist in this directory's lineage."""


class CommitError(LayerwiseError, RuntimeError):
    """Checkpoints could not be committed, on this rank or another one; the message names rank, step and cause."""


class DeadlineError(LayerwiseError, TimeoutError):
    """A wait reached its deadline; the message says for whom it waited and how long (seconds)."""
