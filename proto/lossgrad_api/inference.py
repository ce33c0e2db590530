"""The messages of the Open Inference Protocol, in a descriptor pool of their own.

Every client of that protocol registers the same names in the process's default pool, which refuses a second file or
message of one name. So ours never go there: a process may hold this server, lossgrad's SDK and tritonclient at once.
`messages().ModelInferRequest` is a class as a generated module would have it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE: Final = "inference.GRPCInferenceService"

# What `protoc --descriptor_set_out` made of proto/inference/; written by proto/generate.py.
DESCRIPTOR_SET: Final = Path(__file__).with_name("inference.binpb")


def descriptor_files() -> descriptor_pb2.FileDescriptorSet:
    """Return the protocol's files, each after those that it imports."""
    return descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTOR_SET.read_bytes())


@cache
def pool() -> descriptor_pool.DescriptorPool:
    """Return the private pool that holds them."""
    private = descriptor_pool.DescriptorPool()
    for file in descriptor_files().file:
        private.Add(file)
    return private


@cache
def messages() -> Any:
    """Return the message classes by their names, those of the package's top level."""
    classes: dict[str, Any] = {}
    for file in descriptor_files().file:
        for name in pool().FindFileByName(file.name).message_types_by_name:
            classes[name] = message_factory.GetMessageClass(pool().FindMessageTypeByName(f"inference.{name}"))
    return SimpleNamespace(**classes)


def methods() -> tuple[str, ...]:
    """Return the names of the service's methods, in the order of the protocol's file."""
    service = pool().FindServiceByName(SERVICE)
    return tuple(method.name for method in service.methods)
