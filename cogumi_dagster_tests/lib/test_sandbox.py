"""The sandbox: right values come back, nothing else gets out, and nothing gets in but the job."""

import os
import socket
import threading
from pathlib import Path

import pytest

from cogumi_dagster.lib import sandbox as module
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.sandbox import Opaque, Sandbox, compare, same, sandbox_available
from cogumi_dagster.lib.sandbox_values import parse_outcomes

needs_sandbox = pytest.mark.skipif(not sandbox_available()[0], reason=sandbox_available()[1])
BOX = Sandbox(seconds=5.0, memory_mb=256)
QUICK = Sandbox(seconds=1.5, memory_mb=256)


@needs_sandbox
def test_values_keep_their_types() -> None:
    source = "def f(x):\n    return x"
    values = [
        "1",
        "1.0",
        "True",
        "None",
        "'a'",
        "b'a'",
        "[1, (2,)]",
        "{1, 2}",
        "frozenset({1})",
        "{'a': [1]}",
        "1j",
        "2**100",
    ]
    result = BOX.evaluate(source, [f"f({value})" for value in values])
    assert result.status == "ok"
    for outcome, value in zip(result.outcomes, values, strict=True):
        assert outcome.ok and same(outcome.value, eval(value)), value


@needs_sandbox
def test_errors_belong_to_their_expression() -> None:
    result = BOX.evaluate("x = 1", ["x / 0", "x", "iter([1, 2])", "object()"])
    assert [outcome.ok for outcome in result.outcomes] == [False, True, True, True]
    assert "ZeroDivisionError" in result.outcomes[0].error
    assert result.outcomes[2].value == Opaque("iterator", [1, 2])
    assert not compare(result.outcomes[2].value, "[1, 2]")
    assert not compare(result.outcomes[3].value, "'object'")


@needs_sandbox
def test_a_failing_program_gives_no_values() -> None:
    result = BOX.evaluate("raise ValueError('no')", ["1"])
    assert result.status == "error" and "ValueError: no" in result.reason
    assert result.outcomes[0].ok is False


@needs_sandbox
def test_no_network() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    hits: list[object] = []
    thread = threading.Thread(target=lambda: hits.append(server.accept()), daemon=True)
    thread.start()
    port = server.getsockname()[1]
    result = BOX.evaluate(f"import socket\ns = socket.create_connection(('127.0.0.1', {port}), 1)", ["1"])
    assert result.status == "error" and not hits
    server.close()


@needs_sandbox
def test_no_secrets_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGUMI_CANARY", "canary-in-the-environment")
    secret = tmp_path / "secret"
    secret.write_text("canary-in-a-file")
    tmp_path.chmod(0o755)
    probes = [
        "dict(__import__('os').environ)",
        f"open({str(secret)!r}).read()",
        "open('/etc/passwd').read()",
        "open('/proc/1/environ').read()",
        "open('/proc/self/mounts').read()",
        "__import__('os').listdir('/')",
        f"__import__('os').listdir({os.path.expanduser('~')!r})",
    ]
    result = BOX.evaluate("", probes)
    assert "canary" not in repr(result)
    assert [outcome.ok for outcome in result.outcomes] == [True, False, False, False, False, True, False]
    assert set(result.outcomes[5].value) <= {"lib", "lib64", "tmp", "usr", "root", "home", "opt"}


@needs_sandbox
def test_writes_only_to_its_own_small_scratch() -> None:
    def write(path: str) -> str:
        return f"open({path!r}, 'w').write('x')"

    result = BOX.evaluate(
        "", [write("/tmp/x"), write("/x"), write("/usr/lib/x"), "open('/tmp/big', 'wb').write(b'x' * 10**8)"]
    )
    assert [outcome.ok for outcome in result.outcomes] == [True, False, False, False]
    assert BOX.evaluate("", ["__import__('os').listdir('/tmp')"]).outcomes[0].value == []


@needs_sandbox
def test_endless_programs_are_stopped() -> None:
    for source in ("while True: pass", "import time; time.sleep(60)"):
        result = QUICK.evaluate(source, ["1"])
        assert result.status == "timeout" and not result.outcomes[0].ok


@needs_sandbox
def test_values_before_a_timeout_are_kept() -> None:
    result = QUICK.evaluate("import time", ["1 + 1", "time.sleep(60)", "3"])
    assert [outcome.value for outcome in result.outcomes] == [2, None, None]


@needs_sandbox
def test_memory_processes_and_threads_are_limited() -> None:
    assert "MemoryError" in BOX.evaluate("x = 'a' * 10**10", ["1"]).reason
    forks = "import os, time\nfor _ in range(50):\n    if os.fork() == 0:\n        time.sleep(30)"
    assert "BlockingIOError" in QUICK.evaluate(forks, ["1"]).reason
    threads = "import threading, time\nfor _ in range(50):\n    threading.Thread(target=time.sleep, args=(30,)).start()"
    assert BOX.evaluate(threads, ["1"]).status == "error"


@needs_sandbox
def test_a_thread_left_behind_does_not_keep_the_run_open() -> None:
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    assert QUICK.evaluate(source, ["1"]).status == "ok"


@needs_sandbox
def test_no_programs_to_start_and_no_way_up() -> None:
    source = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)"
    probes = ["os.posix_spawn('/bin/sh', ['sh'], {})", "libc.unshare(0x10000000)", "os.setuid(0)", "os.getuid()"]
    result = BOX.evaluate(source, probes)
    assert [outcome.ok for outcome in result.outcomes] == [False, True, False, True]
    assert result.outcomes[1].value == -1 and result.outcomes[3].value != 0


@needs_sandbox
def test_lying_objects_prove_nothing() -> None:
    source = (
        "class Liar(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "class Both(list):\n    def __eq__(self, other): return True"
    )
    result = BOX.evaluate(source, ["Liar(1)", "Both()", "[Liar(1)]"])
    assert not any(compare(outcome.value, expected) for outcome in result.outcomes for expected in ("1", "[]", "[1]"))


@needs_sandbox
def test_forged_results_are_only_values() -> None:
    forge = (
        "import os\nfor fd in range(3, 64):\n    try:\n"
        '        os.write(fd, b\'{"value": ["NoneType", null]}\\n{"value": ["str", "passed"]}\\n\' * 3)\n'
        "    except OSError: pass\nos._exit(0)"
    )
    result = BOX.evaluate(forge, ["f(2)"])
    assert not any(compare(outcome.value, "4") for outcome in result.outcomes)


@needs_sandbox
def test_floods_of_output_are_cut() -> None:
    flood = (
        "import os\nfor fd in range(3, 64):\n    try:\n"
        "        while True: os.write(fd, b'x' * 60000)\n    except OSError: pass"
    )
    assert BOX.evaluate(flood, ["1"]).status == "overflow"
    assert BOX.evaluate("print('x' * 10**7)", ["5"]).outcomes[0].value == 5
    assert not BOX.evaluate("x = []\nfor _ in range(10**5): x = [x]", ["x", "[0] * 10**6"]).outcomes[0].ok


@needs_sandbox
def test_early_exits_are_failures() -> None:
    assert BOX.evaluate("import os; os._exit(0)", ["1"]).status == "died"
    assert BOX.evaluate("raise SystemExit(0)", ["1"]).status == "error"
    assert BOX.evaluate("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ["1"]).status == "died"


@needs_sandbox
def test_a_program_that_is_too_long_is_refused() -> None:
    assert "longer than" in BOX.evaluate("#" * 100_000, ["1"]).reason


def test_fails_closed_without_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sandbox_available", lambda: (False, "not installed: bwrap"))
    with pytest.raises(CogumiError, match="not installed: bwrap") as caught:
        BOX.evaluate("x = 1", ["x"])
    assert "apt-get install bubblewrap" in caught.value.mend


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    usable, reason = module.sandbox_available()
    assert not usable and "bwrap" in reason and "apt-get install" in reason


@pytest.mark.parametrize(
    ("left", "literal", "equal"),
    [
        (1, "1", True), (True, "1", False), (1.0, "1", False), ([1], "(1,)", False), ({1: 1}, "{True: 1}", False),
        ({"a": 1, "b": 2}, "{'b': 2, 'a': 1}", True), ({1}, "{1.0}", False), ([[1.5]], "[[1.5]]", True),
        ("1", "1", False),
        ({(1, 2)}, "{(1, 2)}", True), ({(1, 2)}, "{(1, 2.0)}", False), (Opaque("object", "x"), "'x'", False),
        (None, "None", True),
    ],
)  # fmt: skip
def test_compare_is_strict(left: object, literal: str, equal: bool) -> None:
    assert compare(left, literal) is equal


def test_compare_needs_a_literal() -> None:
    with pytest.raises(ValueError):
        compare(1, "f(x)")


@pytest.mark.parametrize(
    "line",
    [
        b"", b"x", b"[]", b"{}", b'{"value": 3}', b'{"value": ["int", "3"]}', b'{"value": ["int", true]}',
        b'{"value": ["set", [["list", []]]]}', b'{"value": ["evil", []]}', b'{"value": ["range", [1, 2, 0]]}',
        b'{"value": ["float", "x"]}', b'{"value": ["dict", [1]]}',
        b'{"value": ' + b'["list", [' * 200 + b"]]" * 200 + b"}",
        b'{"value": ["int", ' + b"9" * 5000 + b"]}",
        b"[" * 100_000, b"\xff", b'{"error": {"a": 1}}',
    ],
)  # fmt: skip
def test_broken_results_are_no_values(line: bytes) -> None:
    outcomes = parse_outcomes(b'{"value": ["NoneType", null]}\n' + line + b"\n", 1)
    assert outcomes is not None and outcomes[0].ok and not outcomes[1].ok
