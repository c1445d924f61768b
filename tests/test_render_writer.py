"""The threads that encode and write: a queue that stays short, errors that come back, and nothing that is lost."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from musicgen_fast.render.output import Files, Piece, Settings
from musicgen_fast.render.writer import Writer

from .test_render_output import piece


def test_a_writer_keeps_its_queue_short_and_tells_errors() -> None:
    gate, stored, most = threading.Event(), [], 0

    def store(one: Piece) -> None:
        gate.wait(10)
        if one.task.key == "bad":
            raise OSError(errno.ENOSPC, "full")
        stored.append(one.task.key)

    writer = Writer(store, threads=2, max_pieces=3)
    submitter = threading.Thread(target=lambda: [writer.submit(piece(k)) for k in ("a", "bad", "c", "d", "e", "f")])
    submitter.start()
    for _ in range(20):
        time.sleep(0.01)
        most = max(most, writer.waiting)
    assert most == 3 and submitter.is_alive() and not writer.drain(timeout=0.01)
    gate.set()
    submitter.join(10)
    writer.close()
    assert sorted(stored) == ["a", "c", "d", "e", "f"] and writer.waiting == 0
    (failure,) = writer.failures()
    assert failure.piece.task.key == "bad" and isinstance(failure.error, OSError) and writer.failures() == []
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(piece())


def test_a_writer_counts_bytes_and_lets_any_single_piece_in() -> None:
    gate = threading.Event()
    writer = Writer(lambda one: gate.wait(10) and None, max_pieces=100, max_bytes=1000)
    writer.submit(piece(seconds=1.0))  # 128 kB
    blocked = threading.Thread(target=writer.submit, args=(piece(seconds=0.001),))
    blocked.start()
    time.sleep(0.05)
    assert writer.waiting == 1
    gate.set()
    blocked.join(10)
    writer.close()
    assert not blocked.is_alive() and not writer.failed


def test_a_writer_that_is_stopped_drops_what_waits() -> None:
    gate, stored = threading.Event(), []

    def store(one: Piece) -> None:
        gate.wait(10)
        stored.append(one.task.key)

    writer = Writer(store)
    for key in "abc":
        writer.submit(piece(key))
    time.sleep(0.05)
    dropped = writer.stop()
    gate.set()
    writer.close()
    assert stored == ["a"] and [p.task.key for p in dropped] == ["b", "c"]
    with pytest.raises(ValueError, match="a thread and a place"):
        Writer(store, threads=0)


def test_several_threads_write_side_by_side(tmp_path: Path) -> None:
    files = Files(tmp_path, Settings("flac"))
    writer = Writer(lambda one: files.write(one) and None, threads=4)
    for n in range(24):
        writer.submit(piece(f"{n}", stem=f"{n % 3}/{n}"))
    writer.close()
    assert not writer.failures() and len(list(tmp_path.rglob("*.flac"))) == 24
    assert not list(tmp_path.rglob(".musicgen*"))
