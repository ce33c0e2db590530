"""The protocol's descriptors: equal to those that tritonclient ships, and in nobody's way."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import model_config_pb2, service_pb2

from lossgrad_api import inference

THEIRS = (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR)


def all_messages(descriptor: Any, prefix: str = "") -> dict[str, Any]:
    """Return a file's or a message's messages, nested ones too, by their names below the package."""
    own = getattr(descriptor, "message_types_by_name", None) or getattr(descriptor, "nested_types_by_name", {})
    found: dict[str, Any] = {}
    for name, message in own.items():
        found[prefix + name] = message
        found |= all_messages(message, f"{prefix}{name}.")
    return found


OURS = {
    name: message
    for file in inference.descriptor_files().file
    for name, message in all_messages(inference.pool().FindFileByName(file.name)).items()
}
THEIR_MESSAGES = {name: message for file in THEIRS for name, message in all_messages(file).items()}


def wire_form(field: FieldDescriptor) -> tuple[Any, ...]:
    """Return what decides about a field's bytes."""
    kind = field.message_type or field.enum_type
    return field.name, field.number, field.type, field.is_repeated, kind.full_name if kind else None


@pytest.mark.parametrize("name", OURS)
def test_every_field_has_tritons_name_number_and_type(name: str) -> None:
    theirs = {wire_form(field) for field in THEIR_MESSAGES[name].fields}
    for field in OURS[name].fields:
        assert wire_form(field) in theirs


def test_only_model_configurations_leave_fields_out() -> None:
    """A request's field that we did not know would be ignored in silence."""
    partial = {name for name, ours in OURS.items() if len(ours.fields) != len(THEIR_MESSAGES[name].fields)}
    assert partial == {"ModelConfig", "ModelInput", "ModelOutput", "ModelInstanceGroup"}


def test_the_enumerations_have_tritons_numbers() -> None:
    ours = inference.pool().FindEnumTypeByName("inference.DataType")
    theirs = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"]
    assert {value.name: value.number for value in ours.values} == {v.name: v.number for v in theirs.values}
    kinds = THEIR_MESSAGES["ModelInstanceGroup"].enum_types_by_name["Kind"].values
    ours = OURS["ModelInstanceGroup"].enum_types_by_name["Kind"]
    assert {value.name: value.number for value in ours.values} == {v.name: v.number for v in kinds}


def test_the_service_has_tritons_twenty_methods() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    ours = inference.pool().FindServiceByName(inference.SERVICE)
    assert len(ours.methods) == 20
    for method in ours.methods:
        their = theirs.methods_by_name[method.name]
        assert method.input_type.full_name == their.input_type.full_name
        assert method.output_type.full_name == their.output_type.full_name
        assert (method.client_streaming, method.server_streaming) == (their.client_streaming, their.server_streaming)


def test_nothing_of_ours_is_in_the_default_pool() -> None:
    default: Any = descriptor_pool.Default()
    ours = inference.pool().FindMessageTypeByName("inference.ModelInferRequest")
    theirs = default.FindMessageTypeByName("inference.ModelInferRequest")
    assert theirs is THEIR_MESSAGES["ModelInferRequest"]
    assert ours is not theirs


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_load_in_one_process_in_either_order(first: str) -> None:
    ours = "from lossgrad_api import inference; inference.messages()"
    theirs = "import tritonclient.grpc"
    program = "\n".join([ours, theirs] if first == "ours" else [theirs, ours])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
