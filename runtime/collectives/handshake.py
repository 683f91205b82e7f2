"""Both ends of a fresh connection prove that they know the shared secret, then the caller says what it wants.

    caller    ->  MAGIC, nonce
    listener  ->  nonce, HMAC(secret, "listener", both nonces)
    caller    ->  HMAC(secret, "caller", both nonces, hello), length of hello, hello
    listener  ->  one byte

A hello is a JSON object; nothing that arrives is ever unpickled. Later bytes are not protected: use a network
that only the cluster can write to.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
from typing import Any

from meshtape.runtime.errors import CommError

_MAGIC = b"meshtap1"
_NONCE = 32
_LENGTH = struct.Struct("<I")
_LONGEST_HELLO = 64 * 1024


def call(sock: socket.socket, secret: bytes, hello: dict[str, Any], whom: str) -> None:
    """The caller's side. Raises CommError naming `whom` if the listener does not know the secret."""
    ours = os.urandom(_NONCE)
    sock.sendall(_MAGIC + ours)
    theirs, proof = _read(sock, _NONCE, whom), _read(sock, hashlib.sha256().digest_size, whom)
    if not hmac.compare_digest(proof, _prove(secret, b"listener", ours, theirs)):
        raise CommError(f"{whom} does not know this session's secret; give all ranks the same one")
    text = json.dumps(hello).encode()
    sock.sendall(_prove(secret, b"caller", ours, theirs, text) + _LENGTH.pack(len(text)) + text)
    _read(sock, 1, whom)


def answer(sock: socket.socket, secret: bytes, whom: str) -> dict[str, Any]:
    """The listener's side: the caller's hello. Raises CommError naming `whom` if it may not come in."""
    if _read(sock, len(_MAGIC), whom) != _MAGIC:
        raise CommError(f"{whom} does not speak this protocol")
    theirs, ours = _read(sock, _NONCE, whom), os.urandom(_NONCE)
    sock.sendall(ours + _prove(secret, b"listener", theirs, ours))
    proof = _read(sock, hashlib.sha256().digest_size, whom)
    (length,) = _LENGTH.unpack(_read(sock, _LENGTH.size, whom))
    if length > _LONGEST_HELLO:
        raise CommError(f"{whom} sent a hello of {length} bytes")
    text = _read(sock, length, whom)
    if not hmac.compare_digest(proof, _prove(secret, b"caller", theirs, ours, text)):
        raise CommError(f"{whom} does not know this session's secret; give all ranks the same one")
    hello: dict[str, Any] = json.loads(text)
    sock.sendall(b"\1")
    return hello


def _prove(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(parts), "sha256")


def _read(sock: socket.socket, count: int, whom: str) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise CommError(f"{whom} ended the connection during the handshake; give all ranks the same "
                            "secret")
        data += more
    return data
