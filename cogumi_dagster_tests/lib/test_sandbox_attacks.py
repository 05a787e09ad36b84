"""Programs that want to pass without solving: each knows where a careless judge keeps what it needs.

Every one defines a wrong ``f``. The expected value is a secret number that stays outside; none may learn it, pass with
it, reach the host, or keep the box open.
"""

# ruff: noqa: E501 - programs are easier to read in one piece

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cogumi_dagster.lib.sandbox import Sandbox, _mounts, compare, sandbox_available

needs_sandbox = pytest.mark.skipif(not sandbox_available()[0], reason=sandbox_available()[1])
BOX = Sandbox(seconds=3.0, memory_mb=256)
WRONG = "def f(x):\n    return None\n"

SEGMENTS = """import ctypes
C = ctypes.CDLL(None)
C.shmat.restype = ctypes.c_void_p
def segments(number):
    made = [name for name in (C.shmget(n + 1, 64 << 20, 0o1600) for n in range(number)) if name >= 0]
    for name in made:
        place = C.shmat(name, None, 0)
        ctypes.memset(place, 1, 64 << 20)
        C.shmdt(ctypes.c_void_p(place))
    return len(made)
"""
"""Memory that stays after it was let go of, so that no limit on addresses counts it."""
ATTACKS = {
    "equal to everything": "class A:\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\ndef f(x): return A()",
    "an int that is equal to everything": "class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\n"
    "def f(x): return A(0)",
    "frames": "import sys\ndef f(x):\n    frame, seen = sys._getframe(), []\n    while frame:\n"
    "        seen.append(repr(frame.f_locals)[:2000])\n        frame = frame.f_back\n    return seen",
    "garbage collector": "import gc\ndef f(x): return [o for o in gc.get_objects() if isinstance(o, (str, int))][:500]",
    "numbers of all frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame.f_back: frame = frame.f_back\n"
    "    return [v for v in frame.f_globals.values() if isinstance(v, int)]",
    "the driver's module": "import sys\nfor module in list(sys.modules.values()):\n    for name in list(vars(module)):\n"
    "        if name in ('same', 'compare', 'encode', 'dumps'):\n            setattr(module, name, lambda *a, **k: True)\n" + WRONG,
    "builtins": "import builtins\nbuiltins.eval = lambda *a: 1\nbuiltins.type = lambda *a: int\nbuiltins.isinstance = lambda *a: True\n"
    + WRONG,
    "json": "import json\njson.dumps = lambda *a, **k: '{\"value\": [\"bool\", true]}'\n" + WRONG,
    "every file descriptor, read": "import os\ndef f(x):\n    seen = []\n    for fd in range(64):\n        try:\n"
    "            os.set_blocking(fd, False)\n            os.lseek(fd, 0, 0)\n        except OSError: pass\n"
    "        try: seen.append(os.read(fd, 60000).decode('latin1'))\n        except OSError: pass\n    return seen",
    "every file descriptor, written": "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"value\": [\"bool\", true]}\\n')\n"
    "    except OSError: pass\n" + WRONG,
    "its own memory": "def f(x): return open('/proc/self/mem', 'rb').read(100)",
    "its command line": "def f(x): return open('/proc/self/cmdline').read()",
    "the parent's environment": "import os\ndef f(x): return open(f'/proc/{os.getppid()}/environ').read()",
    "the host's processes": "import os\ndef f(x): return [open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()]",
    "a signal to the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + WRONG,
    "a signal to all": "import os, signal\nos.kill(-1, signal.SIGKILL)\n" + WRONG,
    "an exit handler": "import atexit, os\natexit.register(lambda: os.write(1, b'{\"value\": [\"bool\", true]}\\n'))\n" + WRONG,
    "an exit in the middle": "import os\ndef f(x): os._exit(0)",
    "a fork that answers too": "import os\nos.fork()\n" + WRONG,
    "a fork bomb": "import os\nwhile True: os.fork()",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "memory": "x = [bytearray(10**7) for _ in range(10**4)]",
    "shared memory": "open('/dev/shm/x', 'wb').write(b'x' * 10**9)",
    "shared segments": f"{SEGMENTS}segments(10**4)",
    "memory files": "import os\nfiles = [os.memfd_create(str(n)) for n in range(50)]\n"
    "for file in files: os.write(file, b'x' * 8 * 10**6)",
    "the disk": "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 10**6)",
    "a thousand files": "for n in range(10**5): open(f'/tmp/{n}', 'w').write('x')",
    "a gigabyte of output": "import os\nfor _ in range(10**4): os.write(1, b'x' * 10**5)",
    "a gigabyte of errors": "import os\nfor _ in range(10**4): os.write(2, b'x' * 10**5)",
    "ctypes": "import ctypes\nctypes.string_at(0)",
    "mount": "import ctypes\nl = ctypes.CDLL(None)\ndef f(x): return l.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
    "ptrace": "import ctypes, os\nl = ctypes.CDLL(None)\ndef f(x): return l.ptrace(16, os.getppid(), 0, 0)",
    "a new network": "import socket\ndef f(x): return socket.create_connection(('1.1.1.1', 53), 1)",
    "a program": "import subprocess\ndef f(x): return subprocess.run(['cat', '/etc/passwd'], capture_output=True).stdout",
    "a number too long to print": "def f(x): return 10**(10**6)",
    "a list that holds itself": "a = []\na.append(a)\ndef f(x): return a",
    "a string with a lie in it": "def f(x): return '{\"value\": [\"int\", 1]}'",
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_learns_nothing_and_passes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.randbelow(10**12) + 10**12
    monkeypatch.setenv("COGUMI_SECRET", str(secret))
    result = BOX.evaluate(ATTACKS[name], ["f(2)"])
    (outcome,) = result.outcomes
    assert not compare(outcome.value, str(secret))
    assert not any(compare(outcome.value, literal) for literal in ("4", "[4]", "'4'"))
    assert str(secret) not in repr(result), "the expected value came in"
    assert "root:" not in repr(result), "a file of the host was read"
    assert result.seconds < 30


@needs_sandbox
def test_the_box_holds_after_an_attack() -> None:
    for name in ("a fork bomb", "the disk", "a signal to all", "memory"):
        BOX.evaluate(ATTACKS[name], ["1"])
    assert BOX.evaluate("def f(x): return x * x", ["f(2)"]).outcomes[0].value == 4


@needs_sandbox
def test_no_memory_that_no_limit_counts() -> None:
    calls = ["segments(2)", "C.msgget(1, 0o1600)", "C.memfd_create(b'x', 0)", "C.getppid() >= 0"]
    outcomes = BOX.evaluate(SEGMENTS, calls).outcomes
    assert [outcome.value for outcome in outcomes] == [0, -1, -1, True]


@needs_sandbox
def test_installed_packages_are_not_in_the_box(tmp_path: Path) -> None:
    """One of them is a benchmark with its tests and solutions."""
    program = (
        "import os\n"
        "def f(x):\n"
        "    installed = [folder for folder, _, _ in os.walk('/') if folder.endswith('-packages')]\n"
        "    return [name for folder in installed for name in os.listdir(folder)]"
    )
    assert BOX.evaluate(program, ["f(2)"]).outcomes[0].value == []
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    mounts = _mounts(tmp_path / "bin" / "python3.11", "/usr/bin/prlimit")
    assert mounts[-4:] == ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    assert mounts.index(str(tmp_path / "lib")) < mounts.index(str(packages)), "hidden after it is mounted"
    assert "/usr/lib" not in _mounts(Path("/usr/bin/python3.11"), "/usr/bin/prlimit") or not list(
        Path("/usr/lib").glob("*-linux-*")
    )


BY_A_USER = (
    "its own memory", "the parent's environment", "the host's processes", "a signal to the parent", "a signal to all",
    "a fork bomb", "threads", "memory", "shared memory", "the disk", "mount", "ptrace", "a new network", "a program",
)  # fmt: skip
"""Attacks on what root and an ordinary user may do differently."""


@needs_sandbox
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_the_same_box() -> None:
    """The box is not root's privilege: run by uid 65534, or refused with the reason where the system forbids that."""
    program = (
        "import json, os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from cogumi_dagster.lib.sandbox import Sandbox, compare, sandbox_available\n"
        "usable, reason = sandbox_available()\n"
        "if not usable: sys.exit(f'refused: {reason}')\n"
        "box, attacks, secret = Sandbox(seconds=3.0, memory_mb=256), json.load(sys.stdin), os.environ['COGUMI_SECRET']\n"
        "print(box.evaluate('import os', ['6 * 7', 'os.listdir(\"/etc\")']).outcomes[0].value)\n"
        "for name, text in attacks.items():\n"
        "    result = box.evaluate(text, ['f(2)'])\n"
        "    told = [word for word in (secret, 'root:') if word in repr(result)]\n"
        "    print(json.dumps([name, compare(result.outcomes[0].value, secret), told]))\n"
        "print(box.evaluate('def f(x): return x * x', ['f(2)']).outcomes[0].value)"
    )
    python = shutil.which("python3.11", path="/usr/bin") or sys.executable  # one that every user may read
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2],
        input=json.dumps({name: ATTACKS[name] for name in BY_A_USER}),
        env=os.environ | {"COGUMI_SECRET": str(secrets.randbelow(10**12) + 10**12)},
    )  # fmt: skip
    if done.returncode:
        known = ("refused: ", "PermissionError", "ModuleNotFoundError")
        assert any(name in done.stderr for name in known), done.stderr
        pytest.skip(f"not as another user here: {done.stderr.strip().splitlines()[-1]}")
    first, *said, last = done.stdout.splitlines()
    assert (first, last) == ("42", "4"), done.stdout
    assert [json.loads(line) for line in said] == [[name, False, []] for name in BY_A_USER]
