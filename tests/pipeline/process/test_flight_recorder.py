from __future__ import annotations

import time
from pathlib import Path

from pipeline.process.flight_recorder import MAX_DIGESTS, Executing, FlightRecorder, digest_of
from tests.fakes import VIT_0


def test_what_is_recorded_is_read_by_another_and_outlives_the_writer(tmp_path: Path) -> None:
    writer, reader = FlightRecorder(tmp_path, VIT_0), FlightRecorder(tmp_path, VIT_0)
    writer.record(["a", "b"])
    writer.move()
    writer.move()
    writer.close()
    assert reader.executing() == (digest_of("a"), digest_of("b"))
    assert reader.num_moves == 2
    assert reader.has_worked
    reader.clear()
    assert not reader.has_worked
    assert (reader.executing(), reader.num_moves) == ((), 0)
    reader.close()


def test_only_the_latest_record_counts(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, VIT_0)
    recorder.record(str(number) for number in range(MAX_DIGESTS + 5))
    assert len(recorder.executing()) == MAX_DIGESTS
    recorder.record(["last"])
    assert recorder.executing() == (digest_of("last"),)
    recorder.record([])
    assert recorder.executing() == ()


def test_a_request_executes_until_its_last_piece_ends(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, VIT_0)
    executing = Executing(recorder)
    for request_id in ("a", "b", "a"):
        executing.begin(request_id)
    executing.end("a")
    assert set(recorder.executing()) == {digest_of("a"), digest_of("b")}
    executing.end("a")
    executing.end("b")
    assert recorder.executing() == ()


def test_a_call_without_signs_of_life_is_announced(tmp_path: Path) -> None:
    writer, reader = FlightRecorder(tmp_path, VIT_0), FlightRecorder(tmp_path, VIT_0)
    assert reader.deadline == 0
    writer.expect(50.0)
    assert 40 < reader.deadline - time.monotonic() <= 50
    assert reader.num_moves == 0
    writer.record(["a"])
    assert reader.executing() == (digest_of("a"),)
    writer.expect(0)
    assert (reader.deadline, reader.num_moves) == (0, 1)
    writer.expect(50.0)
    writer.clear()
    assert reader.deadline == 0, "a successor has announced nothing"
