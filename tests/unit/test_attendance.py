"""Whether a process leaves its group or ends is decided once, whoever is first."""

from __future__ import annotations

import threading

from training.cluster.attendance import Attendance
from training.control import Call, Seat
from training.runs.record import Record

CALL = Call(
    seat=Seat(rank=0, local_rank=0, world_size=1, token=3),
    record=Record(key="k", token=3),
    store_address="127.0.0.1",
    store_port=1,
)


def test_a_process_begins_in_no_group_and_need_not_end() -> None:
    attendance = Attendance()
    assert not attendance.is_in
    assert not attendance.must_end(0)


def test_a_call_is_taken_with_its_socket() -> None:
    attendance = Attendance()
    attendance.call(CALL, 7)
    assert attendance.is_in
    assert attendance.next_call() == (CALL, 7)
    attendance.leave()
    assert not attendance.is_in


def test_who_leaves_in_time_need_not_end() -> None:
    attendance = Attendance()
    attendance.call(CALL, None)
    leaving = threading.Thread(target=attendance.leave)
    leaving.start()
    assert not attendance.must_end(120)
    leaving.join(120)
    attendance.call(CALL, None)
    assert attendance.is_in, "and may be called again"


def test_who_must_end_does_not_leave_any_more() -> None:
    attendance = Attendance()
    attendance.call(CALL, None)
    assert attendance.must_end(0)
    leaving = threading.Thread(target=attendance.leave, daemon=True)
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive(), "its agent would count on it"
