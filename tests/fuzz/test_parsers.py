"""No parser of what is stored or sent does anything with odd bytes but refuse them by name, or read what they mean."""

from __future__ import annotations

import logging
import resource
import signal
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from tests.faults.evidence import keep_row
from tests.fuzz.mutations import mutants
from tests.fuzz.parser import Parser
from tests.fuzz.parsers import PARSERS

LONGEST_SECONDS = 10
"""For one input; most take microseconds."""
FEW, MANY = 300, 1_000_000
GREETING = "an agent's greeting"
"""Of somebody who does not know the secret: none is good."""
each_parser = pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)


@each_parser
def test_a_valid_input_is_read(parser: Parser) -> None:
    if parser.name != GREETING:
        for seed in parser.seeds[:2]:
            parser.parse(wrapped(parser, seed))


@each_parser
def test_an_odd_input_is_refused_by_name_or_read_as_what_it_means(parser: Parser) -> None:
    fuzz(parser, count=FEW, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(12 * 3600)
@each_parser
def test_a_million_odd_inputs(parser: Parser) -> None:
    seed = 1000 + PARSERS.index(parser)
    began = time.process_time()
    outcomes = fuzz(parser, count=MANY, seed=seed)
    seconds = round(time.process_time() - began, 1)
    row = {"parser": parser.name, "seed": seed, "inputs": MANY, **outcomes, "cpu_seconds": seconds}
    keep_row("fuzzed-parsers", row, key="parser")


def wrapped(parser: Parser, data: bytes) -> bytes:
    return parser.wrap(data) if parser.wrap is not None else data


def fuzz(parser: Parser, *, count: int, seed: int) -> Counter[str]:
    """How many inputs were read, and how many refused."""
    is_known = parser.proves and parser.name != GREETING
    meant = [repr(parser.parse(one)) for one in parser.seeds] if is_known else []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter(read=0, refused=0)
    number, data = 0, b""

    def where() -> str:
        return f"input {number} of {parser.name!r}, seed {seed}: {data[:300]!r}"

    made = mutants(parser.seeds, seed=seed + zlib.crc32(parser.name.encode()), count=count, words=parser.words)
    with one_at_most(LONGEST_SECONDS, lambda: number, where), warnings.catch_warnings(), without_logs():
        warnings.simplefilter("ignore")
        for mutant in made:
            number, data = number + 1, wrapped(parser, mutant)
            try:
                value = parser.parse(data)
            except parser.errors:
                outcomes["refused"] += 1
            except Exception as error:  # what a parser may not raise
                raise AssertionError(f"{where()} raised {error!r}") from error
            else:
                assert not meant or repr(value) in meant, f"{where()} was read as {value!r}"
                outcomes["read"] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < parser.most_kilobytes, f"{parser.name!r} took {grown} KiB"
    assert outcomes["refused"] > count / 20 or not parser.refuses
    return outcomes


@contextmanager
def without_logs() -> Iterator[None]:
    """pytest would keep a million of them."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def one_at_most(seconds: int, number: Callable[[], int], where: Callable[[], str]) -> Iterator[None]:
    """Fails if the same input is at work at two looks, each so many seconds of CPU after the other."""
    last = -1

    def look(signal_number: int, frame: FrameType | None) -> None:
        nonlocal last
        if number() == last:
            pytest.fail(f"{where()} took {seconds} s")
        last = number()

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
