"""A request is taken as it was meant, or refused with one sentence that says what is wrong where."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tasks.lifecycle.model_file import Tensor
from tasks.serving.requests import BadRequestError, array_of

FLOATS = Tensor(dtype="float32", shape=(-1, 2))
WHOLE = Tensor(dtype="int8", shape=(-1,))
TRUTHS = Tensor(dtype="bool", shape=(-1,))


@pytest.mark.parametrize(
    ("body", "expected", "made"),
    [
        ({"inputs": [[1, 2.5], [3, 4]]}, FLOATS, [[1, 2.5], [3, 4]]),
        ({"instances": [[1, 2]]}, FLOATS, [[1, 2]]),
        ({"inputs": [-128, 127]}, WHOLE, [-128, 127]),
        ({"inputs": [True, False]}, TRUTHS, [True, False]),
    ],
)
def test_arrays(body: object, expected: Tensor, made: object) -> None:
    array = array_of(json.dumps(body).encode(), expected)
    assert array.dtype == expected.dtype
    assert array.tolist() == made


@pytest.mark.parametrize(
    ("body", "expected", "sentence"),
    [
        (b"", FLOATS, "the body is empty"),
        (b"{", FLOATS, "the body is not JSON"),
        (b"\xff\xfe", FLOATS, "the body is not JSON"),
        (b'{"inputs": [[NaN, 1]]}', FLOATS, "JSON has no NaN"),
        (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", FLOATS, "the body is not JSON"),
        (b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}", FLOATS, "inputs[0]: expected 2 items, found 1"),
        (b"[[1, 2]]", FLOATS, "the body is an array: expected an object"),
        (b"{}", FLOATS, 'expected either "inputs" or "instances"'),
        (b'{"inputs": [[1, 2]], "instances": [[1, 2]]}', FLOATS, 'expected either "inputs" or "instances"'),
        (b'{"inputs": [[1, 2]], "params": {}}', FLOATS, "params: unknown field"),
        (b'{"dataframe_split": {}}', FLOATS, "dataframe_split: this model takes a float32 array of shape (batch, 2)"),
        (b'{"dataframe_records": []}', FLOATS, "dataframe_records: this model takes"),
        (
            b'{"inputs": {"x": [[1, 2]]}}',
            FLOATS,
            "inputs: expected a float32 array of shape (batch, 2), found an object",
        ),
        (b'{"inputs": []}', FLOATS, "inputs: the batch is empty"),
        (b'{"inputs": [1, 2]}', FLOATS, "inputs[0]: expected an array, found the number 1"),
        (b'{"inputs": [[1, 2], [3]]}', FLOATS, "inputs[1]: expected 2 items, found 1"),
        (b'{"inputs": [[1, 2, 3]]}', FLOATS, "inputs[0]: expected 2 items, found 3"),
        (b'{"inputs": [[1, [2]]]}', FLOATS, "inputs[0][1]: expected a number, found an array"),
        (b'{"inputs": [[1, "2"]]}', FLOATS, "inputs[0][1]: expected a number, found the text '2'"),
        (b'{"inputs": [[1, null]]}', FLOATS, "inputs[0][1]: expected a number, found null"),
        (b'{"inputs": [[true, false]]}', FLOATS, "inputs[0][0]: expected a number, found true"),
        (b'{"instances": [{"x": 1}]}', FLOATS, "instances[0]: expected an array, found an object"),
        (b'{"inputs": [[1, 2], [3, 1e39]]}', FLOATS, "inputs[1][1]: 1e+39 is too large for float32"),
        (b'{"inputs": [1, 2.5]}', WHOLE, "inputs[1]: expected a whole number, found the number 2.5"),
        (b'{"inputs": [1, 128]}', WHOLE, "inputs[1]: 128 is too large for int8"),
        (b'{"inputs": [1, 99999999999999999999999]}', WHOLE, "inputs"),
        (b'{"inputs": [0, 1]}', TRUTHS, "inputs[0]: expected true or false, found the number 0"),
    ],
)
def test_refusals(body: bytes, expected: Tensor, sentence: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        array_of(body, expected)
    message = str(caught.value)
    assert sentence in message
    assert len(message) < 300
    assert "\n" not in message


def test_other_sizes_may_vary_where_the_signature_says_so() -> None:
    varied = Tensor(dtype="int64", shape=(-1, -1))
    assert array_of(b'{"inputs": [[1, 2, 3]]}', varied).shape == (1, 3)
    with pytest.raises(BadRequestError, match="arrays of different lengths"):
        array_of(b'{"inputs": [[1, 2, 3], [1]]}', varied)
    assert array_of(b'{"inputs": [[9223372036854775807]]}', varied) == np.array(2**63 - 1)
