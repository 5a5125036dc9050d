# SPDX-License-Identifier: Apache-2.0
"""Proof that the other end of a connection belongs to this session, and that what arrives is what it sent, in order.

Both ends know the session's token, and neither ever sends it. Each sends a nonce, and the HMAC (RFC 2104, SHA-256) of
its part, the caller's rank and both nonces under the token; the host, which anybody can call, proves itself first.
Every frame then carries a keyed BLAKE2b (RFC 7693) of its number and its bytes, under a key for this connection and
direction. So a neighbor on the network that can call, answer, repeat or insert learns nothing that helps it, and what
it sends ends the connection. Frames are not secret.

    caller: ``layerwise 1 <rank, 8 digits> <nonce>``    host: ``<nonce> <proof>``
    caller: ``<proof>``                                  host: ``<proof>``

Each is one line of ASCII; nonces have 32 hexadecimal digits, proofs 64.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import socket
from dataclasses import dataclass

MAC_BYTES = 16

_CALL = re.compile(rb"layerwise 1 ([0-9]{8}) ([0-9a-f]{32})\n", re.ASCII)
_ANSWER = re.compile(rb"([0-9a-f]{32}) ([0-9a-f]{64})\n", re.ASCII)
CALL_BYTES, ANSWER_BYTES, PROOF_BYTES = 54, 98, 65


@dataclass(frozen=True)
class Keys:
    """Of one connection, as one of its ends uses them."""

    sending: bytes
    receiving: bytes


@dataclass
class Line:
    """One connection. Without `keys` its frames carry no proof: nobody else can reach a socket that was inherited."""

    sock: socket.socket
    keys: Keys | None = None

    def close(self) -> None:
        self.sock.close()


class Seals:
    """The MACs of the frames of one direction, one after the other."""

    def __init__(self, key: bytes) -> None:
        self._key, self._number = key, 0

    def next(self, body: bytes | memoryview) -> bytes:
        seal = hashlib.blake2b(self._number.to_bytes(8, "big"), key=self._key, digest_size=MAC_BYTES)
        seal.update(body)
        self._number += 1
        return seal.digest()


class Caller:
    """The end that connects."""

    def __init__(self, token: str, rank: int) -> None:
        self._token, self._rank, self._nonce, self._theirs = token, rank, secrets.token_hex(16), ""

    def call(self) -> bytes:
        return f"layerwise 1 {self._rank:08d} {self._nonce}\n".encode()

    def prove(self, answer: bytes) -> bytes | None:
        """What to say to the host's answer; None if the host is not of this session."""
        found = _ANSWER.fullmatch(answer)
        if found is None:
            return None
        self._theirs = found[1].decode()
        return _line(self._proof("caller")) if _is(found[2], self._proof("host")) else None

    def is_welcome(self, last: bytes) -> bool:
        return _is(last.rstrip(b"\n"), self._proof("welcome"))

    def keys(self) -> Keys:
        return Keys(sending=_key(self._proof("up")), receiving=_key(self._proof("down")))

    def _proof(self, part: str) -> str:
        return _proof(self._token, part, self._rank, self._nonce, self._theirs)


class Host:
    """The end that was called, with the `call` that it got. Raises ValueError if that is none."""

    def __init__(self, token: str, call: bytes) -> None:
        found = _CALL.fullmatch(call)
        if found is None:
            raise ValueError("not a call from a rank")
        self.rank = int(found[1])
        self._token, self._theirs, self._nonce = token, found[2].decode(), secrets.token_hex(16)

    def answer(self) -> bytes:
        return f"{self._nonce} {self._proof('host')}\n".encode()

    def welcome(self, proof: bytes) -> bytes | None:
        """What to say to the caller's proof; None if it is not of this session."""
        return _line(self._proof("welcome")) if _is(proof.rstrip(b"\n"), self._proof("caller")) else None

    def keys(self) -> Keys:
        return Keys(sending=_key(self._proof("down")), receiving=_key(self._proof("up")))

    def _proof(self, part: str) -> str:
        return _proof(self._token, part, self.rank, self._theirs, self._nonce)


def _proof(token: str, part: str, rank: int, callers: str, hosts: str) -> str:
    return hmac.new(token.encode(), f"{part} {rank} {callers} {hosts}".encode(), hashlib.sha256).hexdigest()


def _is(given: bytes, proof: str) -> bool:
    return hmac.compare_digest(given, proof.encode())


def _line(proof: str) -> bytes:
    return f"{proof}\n".encode()


def _key(proof: str) -> bytes:
    return bytes.fromhex(proof)
