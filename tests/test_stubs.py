"""The committed stubs are what the .proto files generate."""

import subprocess
import sys
from pathlib import Path

from tests.test_rooms import ROOT

PROTOS = ROOT / "protos"


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path):
    sources = sorted(path.name for path in PROTOS.glob("*.proto"))
    with_service = [name for name in sources if "\nservice " in (PROTOS / name).read_text()]
    protoc = [sys.executable, "-P", "-m", "grpc_tools.protoc", f"-Ikvstrata/protos={PROTOS}"]
    for outputs, names in (
        (["--python_out=.", "--pyi_out=."], sources),
        (["--grpc_python_out=."], with_service),
    ):
        files = [f"kvstrata/protos/{name}" for name in names]
        done = subprocess.run(
            [*protoc, *outputs, *files], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    generated = {p.name: p.read_bytes() for p in (tmp_path / "kvstrata" / "protos").iterdir()}
    committed = {p.name: p.read_bytes() for p in PROTOS.glob("*_pb2*.py*")}
    assert sorted(generated) == sorted(committed)
    stale = [name for name in generated if generated[name] != committed[name]]
    assert stale == [], "run `make proto`"
