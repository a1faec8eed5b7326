"""A process that computes: `python -m tasks.serving.replica FD FRONT`. It dies with its front.

One thread reads requests and checks them, one loads programs, and the main one computes, batch by batch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import orjson

from tasks.serving.batching import Request, Waiting
from tasks.serving.frames import Frame, packed, receive
from tasks.serving.program import Program, load, prepare
from tasks.serving.published import Signature
from tasks.serving.requests import BadRequestError, array_of
from training.documents import parse
from training.errors import DamagedError
from training.processes import die_with


def main() -> None:
    descriptor, front = map(int, sys.argv[1:])
    die_with(front)
    threading.excepthook = end_with_it
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a terminal or service manager tells all, but the front drains first
        signal.signal(number, signal.SIG_IGN)
    prepare()
    Replica(socket.socket(fileno=descriptor)).run()


def end_with_it(told: threading.ExceptHookArgs) -> None:
    """A replica that has lost a thread would be silent; one that has ended is replaced."""
    threading.__excepthook__(told)
    os._exit(1)


class Replica:
    """Answers its front until that closes the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._programs: dict[str, Program] = {}
        self._waiting = Waiting()
        self._loads: SimpleQueue[Frame] = SimpleQueue()
        self._one_writes = threading.Lock()

    def run(self) -> None:
        threading.Thread(target=self._read, name="read", daemon=True).start()
        threading.Thread(target=self._load_all, name="load", daemon=True).start()
        while True:
            self._compute(self._waiting.take())

    def _read(self) -> None:
        stream = self._connection.makefile("rb")
        while (frame := receive(stream)) is not None:
            if frame.head["do"] == "predict":
                self._check(frame)
            else:
                self._loads.put(frame)
        os._exit(0)

    def _load_all(self) -> None:
        """In order: a version that was dropped while it was loaded is dropped afterwards."""
        while True:
            frame = self._loads.get()
            if frame.head["do"] == "load":
                self._load(frame)
            else:
                self._programs.pop(frame.head["identity"], None)

    def _load(self, frame: Frame) -> None:
        told = frame.head
        try:
            program = load(
                Path(told["path"]).read_bytes(),
                version=told["version"],
                sha256=told["sha256"],
                signature=parse(Signature, told["signature"]),
            )
        except (DamagedError, OSError) as error:  # the front closes a file that nobody wants any more
            self._answer(frame.number, {"refused": str(error)})
            return
        self._programs[told["identity"]] = program
        self._answer(frame.number, {"ready": True})

    def _check(self, frame: Frame) -> None:
        program = self._programs[frame.head["identity"]]
        try:
            inputs = array_of(frame.body, program.signature.inputs)
        except BadRequestError as error:
            self._fail(frame.number, 400, str(error))
            return
        self._waiting.put(Request(frame.number, program, inputs))

    def _compute(self, batch: list[Request]) -> None:
        program = batch[0].program
        inputs = batch[0].inputs if len(batch) == 1 else np.concatenate([request.inputs for request in batch])
        try:
            outputs = program.run(inputs)
        except Exception as error:  # a model may raise whatever it likes for one row: then that request fails alone
            if len(batch) > 1:
                for request in batch:
                    self._compute([request])
                return
            first_line = next(iter(str(error).splitlines()), "")
            self._fail(batch[0].number, 500, f"version {program.version} raised {type(error).__name__}: {first_line}")
            return
        start = 0
        for request in batch:
            self._give(request, outputs[start : start + request.num_rows], len(inputs))
            start += request.num_rows

    def _give(self, request: Request, outputs: np.ndarray[Any, Any], batch_rows: int) -> None:
        version = request.program.version
        if outputs.dtype.kind == "f" and not np.isfinite(outputs).all():
            row = int(np.argwhere(~np.isfinite(outputs))[0][0])
            self._fail(request.number, 500, f"version {version} gave no finite number for row {row}")
            return
        body = orjson.dumps(
            {"predictions": np.ascontiguousarray(outputs), "model_version": version}, option=orjson.OPT_SERIALIZE_NUMPY
        )
        self._answer(request.number, {"status": 200, "rows": request.num_rows, "batch_rows": batch_rows}, body)

    def _fail(self, number: int, status: int, message: str) -> None:
        code = "BAD_REQUEST" if status == 400 else "INTERNAL_ERROR"
        self._answer(number, {"status": status}, orjson.dumps({"error_code": code, "message": message}))

    def _answer(self, number: int, head: dict[str, Any], body: bytes = b"") -> None:
        with self._one_writes, contextlib.suppress(BrokenPipeError):  # the front has gone, and so will this process
            self._connection.sendall(packed(number, head, body))


if __name__ == "__main__":
    main()
