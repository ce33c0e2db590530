"""The contract: generated code is fresh, the protos pass buf's rules, and numbers once given keep their meaning."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import google.rpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.rpc import code_pb2

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from lossgrad_server import errors, jobs

ROOT = Path(__file__).parents[1]
SERVICE = pb.DESCRIPTOR.services_by_name["LossService"]

# Every number that was ever given. The package changes only by addition: add to this, change nothing in it.
NUMBERS = """
    Tensor: data_type=1 shape=2 data=3 shared_memory=4
    SharedMemory: region=1 offset=2 byte_count=3
    LossSpec: smooth_l1=1 huber=2 l1=3 mse=4 reduction=5 include_gradient=6 denominator=7 gradient_scale=8 include_total=9
    SmoothL1Loss: beta=1
    HuberLoss: delta=1
    ComputeLossRequest: specs=1 allow_broadcast=2 idempotency_key=3 mask=4 weight=5 target=6 input=7 outputs=8
    ComputeLossResponse: stats=1 results=2 idempotency_key=3 padding=15
    LossResult: scalar=1 tensor=2 element_count=3 weight_sum=4 nonfinite_count=5 target_gradient=6 input_gradient=7 total=8
    ComputeStats: queue_ns=1 pack_ns=2 compute_ns=3 unpack_ns=4 batch_request_count=5 batch_element_count=6 device=7
    StreamComputeLossRequest: requests=1
    StreamComputeLossResponse: responses=1
    TaggedRequest: tag=1 timeout_ns=2 request=3 traceparent=4 tracestate=5
    TaggedResponse: tag=1 response=2 error=3
    AccumulateLossRequest: config=1 slice=2
    AccumulateLossResponse: slice=1 snapshot=2 total=3 padding=15
    AccumulationConfig: specs=1 element_count=2 resume_from=3 snapshot_every_slices=4 allow_broadcast=5
    Slice: sequence=1 group=2 mask=3 weight=4 target=5 input=6
    SliceResult: sequence=1 results=2
    Accumulation: last_sequence=1 groups=2 specs=3 element_count=4
    GroupState: group=1 states=2
    LossState: partial_sums=1 element_count=2 weight_sum=3 min=4 max=5 nonfinite_count=6 weight_partial_sums=7
    GetServerInfoResponse: server_version=1 torch_version=2 device=3 data_types=4 limits=5 determinism=6 shared_memory=7
    SharedMemoryInfo: socket=1 max_region_bytes=2
    ServerLimits: max_message_bytes=1 max_queued_requests=2 max_queued_bytes=3 max_stream_requests=4 max_groups=5
"""


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lossgrad_generate", ROOT / "proto/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def message(name: str) -> Descriptor:
    for file in (pb.DESCRIPTOR, tensor_pb2.DESCRIPTOR):
        if name in file.message_types_by_name:
            return file.message_types_by_name[name]
    raise AssertionError(f"there is no message {name}")


# ---- Generated code ----


def test_the_generated_code_is_what_the_protos_give(generate: ModuleType) -> None:
    assert generate.stale_files() == [], "run python proto/generate.py"


def test_a_stale_missing_or_stray_file_is_told(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("lossgrad_api/v1")

    def generated(destination: Path) -> list[Path]:
        shutil.copytree(ROOT / "proto" / folder, destination / folder)
        (destination / folder / "tensor_pb2.py").write_text("changed")
        (destination / folder / "loss_service_pb2.pyi").unlink()
        (destination / folder / "new_pb2.py").write_text("new")
        (destination / "lossgrad_api/inference.binpb").write_text("changed")
        return sorted(path.relative_to(destination) for path in generate._generated(destination))

    monkeypatch.setattr(generate, "generate", generated)
    assert generate.stale_files() == [
        "lossgrad_api/inference.binpb",
        *(str(folder / name) for name in ("loss_service_pb2.pyi", "new_pb2.py", "tensor_pb2.py")),
    ]


def test_the_generated_code_loads_with_the_oldest_runtimes_that_we_declare() -> None:
    """Generated code refuses runtimes older than its generator."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = dict(line.split(",")[0].split(">=") for line in dependencies)
    for file in (ROOT / "proto/lossgrad_api/v1").glob("*_pb2.py"):
        match = re.search(r"# Protobuf Python Version: ([0-9.]+)", file.read_text())
        assert match is not None
        generated, oldest = ([int(part) for part in version.split(".")] for version in (match[1], floors["protobuf"]))
        assert generated <= oldest
    stub = (ROOT / "proto/lossgrad_api/v1/loss_service_pb2_grpc.py").read_text()
    match = re.search(r"GRPC_GENERATED_VERSION = '([0-9.]+)'", stub)
    assert match is not None
    assert match[1].removesuffix(".0") == floors["grpcio"]


def test_the_messages_load_without_grpc_numpy_or_torch() -> None:
    program = (
        "import sys; from lossgrad_api import codec; "
        "assert not {'grpc', 'numpy', 'torch', 'lossgrad', 'lossgrad_server'} & set(sys.modules), sorted(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "proto")}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr


# ---- buf's rules ----


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Return a buf workspace of our protos, with google.rpc's from the installed package: nothing is fetched."""
    shutil.copytree(ROOT / "proto/lossgrad_api", tmp_path / "ours/lossgrad_api", ignore=shutil.ignore_patterns("*.py*"))
    (tmp_path / "theirs/google/rpc").mkdir(parents=True)
    common = Path(next(iter(google.rpc.__path__)))
    shutil.copy(common / "status.proto", tmp_path / "theirs/google/rpc")
    (tmp_path / "buf.yaml").write_text(
        "version: v2\nmodules:\n"
        "  - path: ours\n    lint:\n      use: [STANDARD, COMMENTS]\n"
        "  - path: theirs\n    lint:\n      use: []\n"
    )
    return tmp_path


def lint(workspace: Path) -> subprocess.CompletedProcess[str]:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed")
    environment = {"PATH": os.environ["PATH"], "BUF_CACHE_DIR": str(workspace / "cache")}
    return subprocess.run(
        [buf, "lint", "ours"], cwd=workspace, capture_output=True, text=True, check=False, env=environment, timeout=60
    )


def test_the_protos_pass_the_rules_standard_and_comments(workspace: Path) -> None:
    result = lint(workspace)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_rules_see_a_field_without_a_comment(workspace: Path) -> None:
    proto = workspace / "ours/lossgrad_api/v1/tensor.proto"
    text = proto.read_text()
    proto.write_text(text.replace("  bytes data = 3;", "\n  bytes data = 3;\n  bytes Other = 99;"))
    result = lint(workspace)
    assert result.returncode != 0
    assert 'Field "Other" should have a non-empty comment' in result.stdout
    assert '"Other" should be lower_snake_case' in result.stdout


# ---- What the descriptors say ----


def test_every_method_is_free_of_side_effects_so_that_every_call_may_be_retried() -> None:
    assert {method.name for method in SERVICE.methods} >= {
        "ComputeLoss",
        "StreamComputeLoss",
        "AccumulateLoss",
        "GetServerInfo",
    }
    for method in SERVICE.methods:
        level = method.GetOptions().idempotency_level
        assert method.GetOptions().IdempotencyLevel.Name(level) == "NO_SIDE_EFFECTS", method.name


def test_the_codec_names_the_methods_as_the_service_does() -> None:
    names = {f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods}
    assert {codec.COMPUTE_LOSS, codec.STREAM_COMPUTE_LOSS, codec.ACCUMULATE_LOSS, codec.GET_SERVER_INFO} == names
    assert SERVICE.full_name == codec.SERVICE


@pytest.mark.parametrize("line", NUMBERS.split("\n")[1:-1], ids=lambda line: line.split(":")[0].strip())
def test_field_numbers_keep_their_meaning(line: str) -> None:
    name, _, fields = line.strip().partition(": ")
    descriptor = message(name)
    for pair in fields.split():
        field, number = pair.split("=")
        assert descriptor.fields_by_number[int(number)].name == field


def test_every_message_is_in_the_list_of_numbers() -> None:
    listed = {line.split(":")[0].strip(): line.count("=") for line in NUMBERS.split("\n")[1:-1]}
    for file in (pb.DESCRIPTOR, tensor_pb2.DESCRIPTOR):
        for name, descriptor in file.message_types_by_name.items():
            assert listed.get(name, 0) == len(descriptor.fields), name


def test_tensors_come_last_in_every_message_so_that_its_header_ends_early() -> None:
    # Places in shared memory stand instead of tensors' bytes, and take 36 of their own.
    for name in ("ComputeLossRequest", "Slice", "LossResult", "Tensor"):
        fields = sorted(message(name).fields, key=lambda field: field.number)
        fields = [field for field in fields if field.full_name != "lossgrad_api.v1.LossResult.total"]  # came later
        is_tensor = [
            field.message_type is message("Tensor") or field.name == "data"
            for field in fields
            if field.containing_oneof is None and field.message_type is not message("SharedMemory")
        ]
        assert is_tensor == sorted(is_tensor), name
        assert is_tensor[-1], name


def test_a_shape_has_fixed_width_because_packed_varints_cost_seventeen_times_their_size() -> None:
    shape = message("Tensor").fields_by_name["shape"]
    assert shape.type == FieldDescriptor.TYPE_FIXED64
    assert shape.is_repeated


def test_parameters_whose_zero_means_something_can_be_told_from_unset_ones() -> None:
    for name, field in (
        ("SmoothL1Loss", "beta"),
        ("HuberLoss", "delta"),
        ("LossSpec", "denominator"),
        ("LossSpec", "gradient_scale"),
    ):
        assert message(name).fields_by_name[field].has_presence, f"{name}.{field}"


# ---- The server's own numbers are the contract's ----


def test_the_servers_enums_repeat_the_contracts_numbers() -> None:
    data_types = {value.name: value.number for value in tensor_pb2.DataType.DESCRIPTOR.values if value.number}
    assert {f"DATA_TYPE_{member.name}": member.value for member in jobs.DataType} == data_types
    reductions = {value.name: value.number for value in pb.Reduction.DESCRIPTOR.values if value.number}
    assert {f"REDUCTION_{member.name}": member.value for member in jobs.Reduction} == reductions
    functions = {field.name: field.number for field in message("LossSpec").oneofs_by_name["function"].fields}
    assert {member.name.lower(): member.value for member in jobs.LossKind} == functions
    result = message("LossResult").fields_by_name
    assert result["tensor"].number == jobs.Role.LOSS
    assert result["target_gradient"].number == jobs.Role.TARGET_GRADIENT
    assert result["input_gradient"].number == jobs.Role.INPUT_GRADIENT


def test_codes_are_the_canonical_ones() -> None:
    assert {member.name: member.value for member in errors.Code}.items() <= dict(code_pb2.Code.items()).items()
