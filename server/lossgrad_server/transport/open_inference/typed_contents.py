"""Typed contents of an input as the tensor's bytes. Where the wire already has them as such, they are not copied."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from lossgrad_api.wire import Buffer
from lossgrad_server.errors import InvalidRequest, Reason
from lossgrad_server.jobs import DataType
from lossgrad_server.transport.open_inference.codec import BOOL_CONTENTS, FP32_CONTENTS, FP64_CONTENTS
from lossgrad_server.transport.open_inference.models import DATA_TYPE_NAMES
from lossgrad_server.transport.open_inference.planning import InputPlan

# For each data type: the field that holds it, struct's letter for an element, and the tag of the field when packed as
# the tensor's own bytes.
_FIELDS: Final = {
    DataType.FLOAT32: ("fp32_contents", "f", FP32_CONTENTS),
    DataType.FLOAT64: ("fp64_contents", "d", FP64_CONTENTS),
    DataType.INT64: ("int64_contents", "q", None),
    DataType.INT32: ("int_contents", "i", None),
    DataType.INT16: ("int_contents", "h", None),
    DataType.INT8: ("int_contents", "b", None),
    DataType.UINT8: ("uint_contents", "B", None),
    DataType.BOOL: ("bool_contents", "?", BOOL_CONTENTS),
}


def elements_of(input: InputPlan, contents: Any, packed: Sequence[tuple[int, memoryview]]) -> Buffer:
    """Return an input's elements as bytes.

    `contents` is its InferTensorContents without the packed fields that are bytes already, which are `packed`: (tag,
    bytes). Raises RequestError where they are not of the input's type, or do not fit it.
    """
    field = _FIELDS.get(input.tensor.data_type)
    if field is None:
        raise _refusal(input, f"{DATA_TYPE_NAMES[input.tensor.data_type]} has no typed contents")
    name, letter, packed_tag = field
    others = [tag for tag, _ in packed if tag != packed_tag] or [
        set_field.name for set_field, _ in contents.ListFields() if set_field.name != name
    ]
    if others:
        raise _refusal(input, f"{DATA_TYPE_NAMES[input.tensor.data_type]} goes into {name}, and another field is set")
    values = getattr(contents, name)
    if not packed:
        try:
            return struct.pack(f"<{len(values)}{letter}", *values)
        except struct.error:
            raise _refusal(input, f"an element of {name} is out of the range of its type") from None
    if values:
        raise _refusal(input, f"{name} comes packed and unpacked")
    if packed_tag == BOOL_CONTENTS and not all(bytes(chunk).isascii() for _, chunk in packed):
        raise _refusal(input, f"{name} has a number that is not 0 or 1")
    return packed[0][1] if len(packed) == 1 else b"".join(chunk for _, chunk in packed)


def _refusal(input: InputPlan, fault: str) -> InvalidRequest:
    return InvalidRequest(
        f"input {input.name}: {fault}; send its elements in raw_input_contents",
        reason=Reason.DATA_LENGTH_MISMATCH,
        field=f"inputs[{input.index}].contents",
    )
