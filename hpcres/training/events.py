"""Scalars for TensorBoard, written without TensorBoard.

An event file of TensorBoard is a sequence of records. A record is length (8 bytes, little-endian), masked CRC-32C of
the length, the event, masked CRC-32C of the event. An event consists of a few protobuf fields: wall time (field 1),
step (2) and a summary (5). The summary holds values (1), each with a tag (1) and a number (2).
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path


def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        return value

    return tuple(map(entry, range(256)))


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """Return Castagnoli's checksum of `data` (RFC 3720, appendix B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    value = crc32c(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


class Events:
    """A new event file in a folder.

    TensorBoard shows all files of a folder as one run, and drops what an earlier file has after `resume_step`.

    Parameters
    ----------
    folder : Path
        Folder of the file; it is created if there is none.
    resume_step : int
        Step from which the run goes on, 0 for a new run.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._file = (folder / f"events.out.tfevents.{now:.6f}.{os.getpid()}").open("wb")
        self._write(now, _bytes_field(3, b"brain.Event:2"))
        if resume_step:  # a session log that says start
            self._write(now, b"\x10" + _varint(resume_step + 1) + _bytes_field(7, b"\x08\x01"))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a number for each tag in `values` at a step."""
        summary = b"".join(
            _bytes_field(1, _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._write(time.time(), b"\x10" + _varint(step) + _bytes_field(5, summary))

    def _write(self, seconds: float, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", seconds) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
