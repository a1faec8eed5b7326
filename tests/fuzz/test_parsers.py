"""No parser of what is stored or sent does anything with odd bytes but refuse them by name, or read what they mean."""

from __future__ import annotations

import resource
import signal
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from tests.faults.evidence import write_evidence
from tests.fuzz.mutations import mutants
from tests.fuzz.parsers import Parser, parsers

LONGEST_SECONDS = 10
"""For one input; most take microseconds."""
MOST_KILOBYTES = 400 << 10
"""That a parser may add to this process at its highest."""
FEW, MANY = 300, 1_000_000
PARSERS = parsers()


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_valid_input_is_read(parser: Parser) -> None:
    if parser.name != "an agent's greeting":  # which proves nothing
        for seed in parser.seeds[:2]:
            parser.parse(seed)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_an_odd_input_is_refused_by_name_or_read_as_what_it_means(parser: Parser) -> None:
    fuzz(parser, count=FEW, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(12 * 3600)
def test_a_million_odd_inputs_each() -> None:
    rows = []
    for number, parser in enumerate(PARSERS):
        began = time.monotonic()
        outcomes = fuzz(parser, count=MANY, seed=1000 + number)
        seconds = round(time.monotonic() - began, 1)
        rows.append({"parser": parser.name, "seed": 1000 + number, "inputs": MANY, **outcomes, "seconds": seconds})
    write_evidence("fuzzed-parsers", rows=rows)


def fuzz(parser: Parser, *, count: int, seed: int) -> Counter[str]:
    """How many inputs were read, and how many refused."""
    meant = (
        [repr(parser.parse(one)) for one in parser.seeds] if parser.proves and parser.errors[0] is not OSError else []
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter(read=0, refused=0)
    for number, data in enumerate(mutants(parser.seeds, seed=seed + zlib.crc32(parser.name.encode()), count=count)):
        where = f"input {number} of {parser.name!r}, seed {seed}: {data[:300]!r}"
        try:
            with at_most(LONGEST_SECONDS, where), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = parser.parse(data)
        except parser.errors:
            outcomes["refused"] += 1
        except Exception as error:  # what a parser may not raise
            raise AssertionError(f"{where} raised {error!r}") from error
        else:
            assert not meant or repr(value) in meant, f"{where} was read as {value!r}"
            outcomes["read"] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_KILOBYTES, f"{parser.name!r} took {grown} KiB"
    assert outcomes["refused"] > count / 20 or not parser.refuses
    return outcomes


@contextmanager
def at_most(seconds: int, where: str) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{where} took {seconds} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
