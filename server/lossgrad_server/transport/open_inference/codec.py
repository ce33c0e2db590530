"""ModelInferRequest and ModelInferResponse, bytes <-> values, without copying tensor data.

A request's tensors are views of its bytes: `raw_input_contents`, and typed contents too where their bytes are already a
tensor's (packed FP32 and FP64, and BOOL). All else is a header, bounded before protobuf parses it. A response is a list
of parts whose join is its only copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from lossgrad_api.inference import messages
from lossgrad_api.wire import Buffer, CodecError, HeaderTooLarge, read_length, read_tag, skip, varint

# All of a request that is no tensor's bytes, and every other message of the service.
MAX_HEADER_BYTES: Final = 64 * 1024

# Tags: field number * 8 + wire type.
_ID: Final = 3 << 3 | 2
_INPUTS: Final = 5 << 3 | 2
_RAW_INPUT_CONTENTS: Final = 7 << 3 | 2
_CONTENTS: Final = 5 << 3 | 2  # of an input
BOOL_CONTENTS: Final = 1 << 3 | 2  # of contents: packed
FP32_CONTENTS: Final = 6 << 3 | 2
FP64_CONTENTS: Final = 7 << 3 | 2
_PACKED: Final = frozenset((BOOL_CONTENTS, FP32_CONTENTS, FP64_CONTENTS))
_RAW_OUTPUT_CONTENTS: Final = bytes((6 << 3 | 2,))

_Value = TypeVar("_Value")


class Span(NamedTuple):
    """Where some bytes of a message are."""

    begin: int
    behind: int


@dataclass(slots=True)
class InferRequestView:
    """A ModelInferRequest taken apart.

    `header` holds the bytes of a ModelInferRequest without the tensors' data. `raw` are the entries of
    raw_input_contents. `typed` gives, for each input that has any, its packed contents: (tag, where) in their order.
    `pieces` are the bytes that are neither tensor data nor the id.
    """

    data: bytes
    header: bytes = b""
    id: Span = field(default_factory=lambda: Span(0, 0))
    raw: list[Span] = field(default_factory=list)
    typed: dict[int, list[tuple[int, Span]]] = field(default_factory=dict)
    pieces: list[Span] = field(default_factory=list)
    has_two_ids: bool = False

    def parse(self) -> Any:
        """Return the header as a ModelInferRequest. Raises CodecError."""
        return parse("ModelInferRequest", self.header)


def parse(name: str, data: bytes) -> Any:
    """Return a message of the protocol. Raises CodecError; do not give it more than a header's bytes."""
    if len(data) > MAX_HEADER_BYTES:
        raise HeaderTooLarge(f"the {name} has {len(data)} bytes; at most {MAX_HEADER_BYTES} are taken")
    try:
        return getattr(messages(), name).FromString(data)
    except DecodeError:
        raise CodecError(f"the bytes are not an inference.{name}") from None


def split_infer_request(data: bytes) -> InferRequestView:
    """Take a ModelInferRequest apart without copying tensor data. Raises CodecError."""
    return _Walk(data).run()


class _Walk:
    """One walk over the fields of a ModelInferRequest."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._view = InferRequestView(data)
        self._kept = 0  # the bytes up to here are in `pieces`
        self._limit = MAX_HEADER_BYTES  # of the position; grows with every byte of tensor data

    def run(self) -> InferRequestView:
        data, view, end = self._data, self._view, len(self._data)
        header: list[bytes] = []
        position = input_count = 0
        while position < end:
            begin = position
            tag, position = read_tag(data, position, end)
            if tag == _RAW_INPUT_CONTENTS:
                view.raw.append(self._cut(position, end))
                position = self._kept
            elif tag == _INPUTS:
                position, input_end = read_length(data, position, end)
                body = self._input(position, input_end, input_count)
                header += (b"\x2a", varint(len(body)), body)
                position = input_end
                input_count += 1
            else:
                if tag == _ID:
                    view.has_two_ids = view.id != Span(0, 0)
                    start, behind = read_length(data, position, end)
                    self._leave_out(start, behind)
                    view.id = Span(start, behind)
                position = skip(data, tag, position, end)
                header.append(data[begin:position])
            self._check(position)
        view.pieces.append(Span(self._kept, end))
        view.header = b"".join(header)
        return view

    def _input(self, position: int, end: int, index: int) -> bytes:
        """Return the input `data[position:end]` as bytes without packed contents, which are noted in `typed`."""
        data = self._data
        parts: list[bytes] = []
        while position < end:
            begin = position
            tag, position = read_tag(data, position, end)
            if tag == _CONTENTS:
                position, contents_end = read_length(data, position, end)
                body = self._contents(position, contents_end, index)
                parts += (b"\x2a", varint(len(body)), body)
                position = contents_end
            else:
                position = skip(data, tag, position, end)
                parts.append(data[begin:position])
            self._check(position)
        return b"".join(parts)

    def _contents(self, position: int, end: int, index: int) -> bytes:
        data = self._data
        parts: list[bytes] = []
        while position < end:
            begin = position
            tag, position = read_tag(data, position, end)
            if tag in _PACKED:
                self._view.typed.setdefault(index, []).append((tag, self._cut(position, end)))
                position = self._kept
            else:
                position = skip(data, tag, position, end)
                parts.append(data[begin:position])
            self._check(position)
        return b"".join(parts)

    def _cut(self, position: int, end: int) -> Span:
        """Leave out the tensor data whose length stands at `position`."""
        begin, behind = read_length(self._data, position, end)
        self._leave_out(begin, behind)
        self._limit += behind - begin
        return Span(begin, behind)

    def _leave_out(self, begin: int, behind: int) -> None:
        self._view.pieces.append(Span(self._kept, begin))
        self._kept = behind

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise HeaderTooLarge(
                f"all that is not tensor data takes at least {MAX_HEADER_BYTES + position - self._limit} bytes, at most "
                f"{MAX_HEADER_BYTES} are taken; send tensor elements in raw_input_contents"
            )


class KnownInferRequests(Generic[_Value]):
    """Remembers a value for a request, and finds it again for one that differs in its id and elements' values only.

    The same idea as request_codec.KnownRequests: all other bytes are compared, and are in the same places.
    """

    _MAX_LENGTHS: Final = 4096
    _MAX_OF_ONE_LENGTH: Final = 4
    _MAX_HEADER_BYTES: Final = 2048

    def __init__(self) -> None:
        # By length: (the header's pieces with their offsets, the id's span, the spans of the operands' data, the value).
        self._known: dict[int, list[tuple[list[tuple[int, bytes]], Span, list[Span], _Value]]] = {}

    def remember(self, view: InferRequestView, operands: list[Span], value: _Value) -> None:
        """Remember `value` for requests like `view`; `operands` says where the data of each operand is."""
        data = view.data
        if view.has_two_ids or sum(behind - begin for begin, behind in view.pieces) > self._MAX_HEADER_BYTES:
            return
        if len(self._known) >= self._MAX_LENGTHS:  # rare enough that starting over is the simplest bound
            self._known.clear()
        alike = self._known.setdefault(len(data), [])
        del alike[self._MAX_OF_ONE_LENGTH - 1 :]
        pieces = [(begin, data[begin:behind]) for begin, behind in view.pieces if begin < behind]
        alike.insert(0, (pieces, view.id, operands, value))

    def find(self, data: bytes) -> tuple[_Value, bytes, tuple[memoryview, ...]] | None:
        """Return the value, the id and views of the operands' data; or None."""
        for pieces, (begin, behind), operands, value in self._known.get(len(data), ()):
            for offset, piece in pieces:
                if not data.startswith(piece, offset):
                    break
            else:
                view = memoryview(data)
                return value, data[begin:behind], tuple([view[begin:behind] for begin, behind in operands])
        return None


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """All of a ModelInferResponse that does not change from answer to answer.

    `before_id` are its fields before the id, `behind_id` those from there to the raw contents, `raw_heads` the tag and
    length of each raw_output_contents: one for each output, of length 0 for an output in shared memory.
    """

    before_id: bytes
    behind_id: bytes
    raw_heads: tuple[bytes, ...]

    def parts(self, request_id: bytes, raw_outputs: list[Buffer]) -> list[Buffer]:
        """Return the message as parts to join."""
        head = self.before_id
        if request_id:
            head += b"\x1a" + varint(len(request_id)) + request_id
        parts: list[Buffer] = [head + self.behind_id]
        for raw_head, raw in zip(self.raw_heads, raw_outputs, strict=True):
            parts.append(raw_head)
            parts.append(raw)
        return parts


def response_form(
    model_name: str, model_version: str, outputs: list[tuple[str, str, tuple[int, ...]]], raw_bytes: list[int]
) -> ResponseForm:
    """Return the form of the responses with these outputs (name, data type, shape), of so many raw bytes each."""
    response = messages().ModelInferResponse
    before = response(model_name=model_name, model_version=model_version)
    behind = response(
        outputs=[{"name": name, "datatype": data_type, "shape": shape} for name, data_type, shape in outputs]
    )
    return ResponseForm(
        before.SerializeToString(),
        behind.SerializeToString(),
        tuple(_RAW_OUTPUT_CONTENTS + varint(size) for size in raw_bytes),
    )


# The field `parameters` of a ModelInferResponse that says that the request has no further response.
FINAL_FLAG: Final = b"\x22" + varint(27) + b"\x0a\x15triton_final_response\x12\x02\x08\x01"


def stream_response_parts(parts: Sequence[Buffer]) -> list[Buffer]:
    """Return a ModelStreamInferResponse around the parts of a ModelInferResponse."""
    return [b"\x12" + varint(sum(map(len, parts))), *parts]


def stream_error(message: str, model_name: str, request_id: str) -> bytes:
    """Return a ModelStreamInferResponse that tells of a request's failure."""
    response: bytes = (
        messages()
        .ModelStreamInferResponse(error_message=message, infer_response={"model_name": model_name, "id": request_id})
        .SerializeToString()
    )
    return response
