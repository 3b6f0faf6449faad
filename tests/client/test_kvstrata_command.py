import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from kvstrata.client.kvstrata import app
from kvstrata.client.terminal import printable
from kvstrata.protos.errors import CapacityError, PromptTooLongError

LONG = " ".join(f"w{i}" for i in range(130))


@pytest.fixture
def run(gateway, monkeypatch):
    monkeypatch.setenv("KVSTRATA_ADDRESS", gateway.address)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *args, **kwargs: CliRunner().invoke(app, list(args), **kwargs)


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Another distribution that provides commands; those of ``heavy`` cannot be imported."""
    info = tmp_path / "plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvstrata.commands]\n"
        "demo = heavy:main\nup = heavy:main\nstore = heavy:main\ngateway = heavy:main\n"
        "broken = heavy:main\nabsent = light:nothing\ngreet = light:greet\ntree = light:tree\n"
        "fails = light:fails\ngenerate = heavy:main\n"
    )
    (tmp_path / "heavy.py").write_text("raise ImportError('no torch here')\n")
    (tmp_path / "light.py").write_text(
        "import typer\n"
        "from kvstrata.protos.errors import CapacityError\n"
        "tree = typer.Typer(add_completion=False)\n"
        "@tree.command()\n"
        "def leaf(): typer.echo('leaf')\n"
        "@tree.command()\n"
        "def root(): typer.echo('root')\n"
        "def greet(name: str, loud: bool = False):\n"
        "    '''Greet somebody.'''\n"
        "    typer.echo(name.upper() if loud else name)\n"
        "def fails(): raise CapacityError('full', 'wait')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield
    for name in ("heavy", "light"):
        sys.modules.pop(name, None)


def test_generate_streams_text_and_tells_the_cache_on_stderr(run):
    run("generate", LONG)
    result = run("generate", LONG)
    assert result.exit_code == 0
    assert result.stdout == LONG + "\n"
    assert result.stderr.startswith(
        "cache: 128 of 128 shareable tokens (100%) from redis, base+mid;"
    )
    assert "64 recomputed (corrupt)" in result.stderr
    assert result.stderr.count("\n") == 1


def test_generate_sends_images_each_with_its_place(run, gateway, tmp_path):
    (tmp_path / "clip").mkdir()
    paths = [tmp_path / "one.png", tmp_path / "clip" / "b.png", tmp_path / "clip" / "a.png"]
    for path in paths:
        path.write_bytes(path.name.encode())
    shown = ("--image", str(paths[0]), "--image", str(tmp_path / "clip"))
    refused = run("generate", "what?", *shown)
    assert refused.exit_code == 2
    assert "reads text alone" in refused.stderr
    gateway.placeholder = "<image>"
    assert run("generate", "what?", *shown).exit_code == 0
    assert run("generate", "is <image> in <image>?", *shown).exit_code == 0
    first, second = gateway.requests[-2:]
    assert first.text == "<image><image>\nwhat?"
    assert second.text == "is <image> in <image>?"
    assert first.visuals == second.visuals
    assert first.visuals[0].picture.file == b"one.png"
    assert [frame.file for frame in first.visuals[1].video.frames] == [b"a.png", b"b.png"]
    assert run("generate", "what?", "--image", str(tmp_path / "none.png")).exit_code == 2


def test_generate_json_is_one_object(run, gateway):
    gateway.delay_s = 0.02
    result = run("generate", "one two three", "--json")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found.keys() == {
        *("text", "token_ids", "finish_reason", "usage", "cache", "ttft_s", "tpot_s")
    }
    assert (found["text"], found["token_ids"]) == ("one two three", [1, 2, 3])
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 3}
    assert found["cache"]["stages"][0]["stage"] == "prefill"
    assert found["cache"]["cached_fraction"] == 0
    assert 0 < found["ttft_s"] < 5
    assert 0 < found["tpot_s"] < 5  # no lower bound: a late first reply shortens what follows


def test_one_token_has_no_time_per_token(run):
    found = json.loads(run("generate", "one", "--json").stdout)
    assert found["tpot_s"] is None


def test_every_option_reaches_the_server(run, gateway):
    options = "--preset small --max-tokens 7 --temperature 0.5 --seed 3 --top-p 0.25 --top-k 4"
    result = run("generate", "hi", *options.split(), "--stop", "a", "--stop", "b")
    assert result.exit_code == 0
    (request,) = gateway.requests
    sampling = request.sampling
    assert (request.preset, sampling.max_tokens, sampling.seed) == ("small", 7, 3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 4)
    assert list(sampling.stop) == ["a", "b"]


def test_chat_wraps_the_prompt_as_a_message(run, gateway):
    run("generate", "hi", "--chat")
    run("generate", "hi", "--system", "be kind")
    roles = [[m.role for m in request.messages.messages] for request in gateway.requests]
    assert roles == [["user"], ["system", "user"]]


def test_the_prompt_comes_from_stdin_or_a_file_as_it_is(run, gateway, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("wörter\n".encode())
    assert run("generate", "-", input="from stdin\n").exit_code == 0
    assert run("generate", "--file", str(path)).exit_code == 0
    assert [request.text for request in gateway.requests] == ["from stdin\n", "wörter\n"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give one prompt"),
        (["hi", "--file", __file__], "both a prompt and --file"),
        (["--file", "/no/such/file"], "does not exist"),
        ([""], "the prompt is empty"),
        (["a\udcff"], "lone surrogate"),
        (["hi", "--temperature", "nan"], "temperature is nan"),
        (["hi", "--max-tokens", "0"], "max_tokens is 0"),
        (["hi", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["hi", "--timeout", "0"], "timeout_s is 0"),
        (["hi", "--preset", "tiny"], "no preset 'tiny'"),
        (["hi", "--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_exits_2_and_says_what_is_wrong(run, args, words):
    result = run("generate", *args)
    assert result.exit_code == 2
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert words in error
    assert hint.startswith("hint: ")
    assert result.stdout == ""


def test_stdin_that_is_not_utf8_is_bad_input(run):
    result = run("generate", "-", input=b"ab\xff")
    assert result.exit_code == 2
    assert "not valid UTF-8 at byte 2" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(CapacityError("full", "wait"), 1), (PromptTooLongError("9000", "cut"), 2)]
)
def test_a_servers_error_prints_message_and_hint(run, gateway, error, code):
    gateway.error = error
    result = run("generate", "hi")
    assert result.exit_code == code
    assert result.stderr == f"error: {error.message}\nhint: {error.remedy}\n"


def test_help_lists_commands_of_other_rooms_without_importing_them(run, plugins):
    result = run("--help")
    assert result.exit_code == 0
    for name in ("generate", "demo", "up", "store", "gateway", "greet"):
        assert f" {name} " in result.stdout
    assert "Start the whole service" in result.stdout
    assert not {"heavy", "light"} & sys.modules.keys()


def test_a_function_and_a_typer_serve_as_commands(run, plugins):
    assert run("greet", "ann", "--loud").stdout == "ANN\n"
    assert "Greet somebody." in run("greet", "--help").stdout
    assert run("tree", "leaf").stdout == "leaf\n"
    assert run("greet").exit_code == 2


def test_errors_of_other_rooms_print_alike(run, plugins):
    result = run("fails")
    assert (result.exit_code, result.stderr) == (1, "error: full\nhint: wait\n")


def test_a_command_that_cannot_be_loaded_is_an_error(run, plugins):
    for name, why in (("broken", "no torch here"), ("absent", "nothing")):
        result = run(name)
        assert result.exit_code == 1
        assert why in result.stderr


def test_own_commands_win_over_entry_points(run, plugins):
    assert run("generate", "hi").exit_code == 0


def test_an_unknown_command_is_bad_input(run):
    for args in (("generat",), ("--wrong",)):
        result = run(*args)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: No such ")
        assert "hint: see kvstrata --help\n" in result.stderr


def test_version_is_the_packages(run):
    assert run("--version").stdout == f"kvstrata {version('kvstrata')}\n"


def test_control_characters_do_not_reach_a_terminal():
    assert printable("a\x1b[2J\tb\nä") == "a\ufffd[2J\tb\nä"


def command(*args, **env):
    code = "from kvstrata.client.kvstrata import main; main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *args],
        capture_output=True,
        timeout=240,
        env={**os.environ, **env},
    )


def test_the_process_prints_json_and_exits_0(gateway):
    done = command("generate", "grüße", "--json", KVSTRATA_ADDRESS=gateway.address)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["text"] == "grüße"


def test_the_process_reports_an_unreachable_server(no_server):
    done = command("generate", "hi", "--address", no_server)
    assert (done.returncode, done.stdout) == (1, b"")
    error, hint = done.stderr.decode().splitlines()
    assert error.startswith(f"error: {no_server}: ")
    assert hint == "hint: check the address and that the server runs"


def test_the_process_exits_2_on_bytes_that_are_no_text():
    done = command("generate", b"\xff\xfe")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_a_terminal_without_unicode_still_gets_its_answer(gateway):
    env = {"KVSTRATA_ADDRESS": gateway.address, "PYTHONIOENCODING": "ascii"}
    done = command("generate", "grüße", **env)
    assert (done.returncode, done.stdout) == (0, b"gr??e\n")


def test_an_interrupt_frees_the_server_and_prints_no_traceback(gateway):
    gateway.delay_s = 60
    code = "from kvstrata.client.kvstrata import main; main()"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, "generate", "one two", "--address", gateway.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.read(3) == b"one"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert gateway.freed.wait(5)


def test_a_closed_pipe_ends_quietly(gateway):
    gateway.delay_s = 0.05
    code = "from kvstrata.client.kvstrata import main; main()"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, "generate", LONG, "--address", gateway.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(2)
        process.stdout.close()
        stderr = process.stderr.read()
    assert (process.returncode, stderr) == (1, b"")
    assert gateway.freed.wait(5)


def test_generate_imports_nothing_heavy():
    code = (
        "import sys, kvstrata.client.kvstrata, kvstrata.client.kvctl\n"
        "heavy = {'torch', 'transformers', 'ray', 'numpy', 'redis', 'kvstrata.cluster'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, b"")
