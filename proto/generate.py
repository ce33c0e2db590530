"""Writes the generated code beside the .proto files: `python proto/generate.py [--check]`. Never edit its output.

It wants grpcio-tools 1.76.0 exactly: stubs of that release load with protobuf 6.31.1 to 7.x and grpcio 1.76 up, those
of a newer one refuse every older runtime, tritonclient's among them. Because that release wants an older protobuf than
the one beside it in a development environment, it is put into an environment of its own (.venv-proto) at first use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

GRPCIO_TOOLS = "grpcio-tools==1.76.0"
COMMON_PROTOS = "googleapis-common-protos==1.70.0"  # google/rpc/status.proto, for the import path only
SETUPTOOLS = "setuptools<81"  # grpcio-tools 1.76.0 imports pkg_resources

PROTO_ROOT = Path(__file__).resolve().parent
ENVIRONMENT = PROTO_ROOT.parent / ".venv-proto"
SOURCES = sorted(PROTO_ROOT.glob("lossgrad_api/v1/*.proto"))
# The Open Inference Protocol gets no modules: they would register names that other clients of it register too.
INFERENCE_SOURCES = sorted(PROTO_ROOT.glob("inference/*.proto"))
INFERENCE_SET = Path("lossgrad_api/inference.binpb")


def tools_python() -> Path:
    """Return the Python that has grpcio-tools, after making its environment if there is none."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / GRPCIO_TOOLS
    if not done.exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", GRPCIO_TOOLS, COMMON_PROTOS, SETUPTOOLS],
            check=True,
        )
        done.touch()
    return python


def generate(destination: Path) -> list[Path]:
    """Write the generated code of every .proto under `destination`; return the files' paths relative to it."""
    kinds = ("python", "pyi", "grpc_python")
    _protoc(*(f"--{kind}_out={destination}" for kind in kinds), *map(str, SOURCES))
    for stub in destination.glob("lossgrad_api/v1/tensor_pb2_grpc.py"):
        stub.unlink()  # tensor.proto has no service; the file would be empty
    (destination / INFERENCE_SET).parent.mkdir(parents=True, exist_ok=True)
    _protoc(f"--descriptor_set_out={destination / INFERENCE_SET}", *map(str, INFERENCE_SOURCES))
    return sorted(path.relative_to(destination) for path in _generated(destination))


def _protoc(*arguments: str) -> None:
    program = (
        "import sys, pathlib, grpc_tools, google.rpc\n"
        "from grpc_tools import protoc\n"
        "roots = [pathlib.Path(grpc_tools.__file__).parent / '_proto', "
        "pathlib.Path(list(google.rpc.__path__)[0]).parents[1]]\n"
        "sys.exit(protoc.main(['protoc', *(f'-I{root}' for root in roots), *sys.argv[1:]]))\n"
    )
    subprocess.run([tools_python(), "-c", program, f"-I{PROTO_ROOT}", *arguments], check=True)


def _generated(root: Path) -> list[Path]:
    return [*root.glob("lossgrad_api/v1/*_pb2*"), *root.glob(str(INFERENCE_SET))]


def stale_files() -> list[str]:
    """Return the committed generated files that differ from what would be generated now, or should not be there."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        committed = {path.relative_to(PROTO_ROOT) for path in _generated(PROTO_ROOT)}
        stale = {
            path
            for path in fresh
            if path not in committed or (PROTO_ROOT / path).read_bytes() != (Path(scratch) / path).read_bytes()
        }
        return sorted(str(path) for path in stale | (committed - set(fresh)))


def main() -> int:
    """Generate, or with --check tell what is stale."""
    parser = argparse.ArgumentParser(description="Write the code generated from the .proto files.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail and list the files that are stale")
    if parser.parse_args().check:
        stale = stale_files()
        print("\n".join(f"stale: {name}; run python proto/generate.py" for name in stale) or "generated code is fresh")
        return 1 if stale else 0
    for path in generate(PROTO_ROOT):
        print(f"wrote proto/{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
