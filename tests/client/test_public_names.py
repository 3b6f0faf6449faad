import ast
import sys
from pathlib import Path

import kvstrata.client

ALLOWED = {"google", "grpc", "grpc_health", "kvstrata", "rich", "typer"} | sys.stdlib_module_names


def test_all_is_sorted_short_and_importable():
    names = kvstrata.client.__all__
    assert names == sorted(names)
    assert len(names) <= 10
    assert all(hasattr(kvstrata.client, name) for name in names)


def test_the_room_imports_only_what_it_may():
    for path in Path(kvstrata.client.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            for module in modules:
                assert module.split(".")[0] in ALLOWED, (path.name, module)
                if module.startswith("kvstrata."):
                    assert module.split(".")[1] in ("client", "protos"), (path.name, module)
