"""The committed protobuf code is what the .proto generates."""

import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).parent.parent / "protos"
GENERATED = ("tagstore_pb2.py", "tagstore_pb2.pyi", "tagstore_pb2_grpc.py")


def test_generated_code_is_up_to_date(tmp_path: Path):
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        str(PROTOS),
        *out,
        "tagstore_proto/v1/tagstore.proto",
    ]
    subprocess.run(command, check=True, cwd=PROTOS)
    for name in GENERATED:
        ours, fresh = (root / "tagstore_proto" / "v1" / name for root in (PROTOS, tmp_path))
        assert ours.read_text() == fresh.read_text(), f"{name} is out of date: run `make proto`"
