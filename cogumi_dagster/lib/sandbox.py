"""Runs model-written Python in bubblewrap, and brings back plain values.

The program and the inputs go in; expected values never do. What comes back is untrusted data: a program
that forges its own results must already know the right values. Nothing is compared inside, so an object
whose ``__eq__`` is always true gains nothing.

The box: no network, no environment, no process or file of the host but the interpreter and the shared
libraries (read only), a small tmpfs as the only place to write, an unprivileged uid, and limits on CPU time,
wall time, memory, processes, file size and output, and no system call whose memory these do not bind. It fails
closed: where bubblewrap cannot run, programs are not run at all.
"""

import json
import os
import platform
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Literal

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.sandbox_filter import as_pipe, system_calls
from cogumi_dagster.lib.sandbox_values import Opaque, Outcome, compare, parse_outcomes, same

__all__ = ["Opaque", "Outcome", "Sandbox", "SandboxResult", "compare", "same", "sandbox_available"]

Status = Literal["ok", "error", "timeout", "died", "overflow"]

JOB_BYTES = 60_000
"""A job must fit the 64 KiB pipe that carries it in, so that writing it can never block."""
OUTPUT_BYTES = 1_000_000
SCRATCH_BYTES = 8 << 20
PROCESSES = 4
"""Room for bubblewrap's own two and no farm of the program's."""
NOBODY = 65534

_MEND = "install bubblewrap (Debian: apt-get install bubblewrap) and allow unprivileged user namespaces"


@dataclass(frozen=True)
class SandboxResult:
    """What a run brought back. ``status`` is of the program; each expression has its own outcome."""

    status: Status
    reason: str
    outcomes: tuple[Outcome, ...]
    """One for each expression, in order."""
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """A box with its limits. Raises CogumiError on use where bubblewrap cannot run."""

    seconds: float = 5.0
    """Wall time of a run."""
    memory_mb: int = 512
    """Address space of each process."""

    def evaluate(self, source: str, expressions: Sequence[str]) -> SandboxResult:
        """Run ``source``, then evaluate each expression in its namespace.

        Raises:
            CogumiError: there is no usable sandbox here. Nothing that the program does raises.
        """
        usable, reason = sandbox_available()
        if not usable:
            raise CogumiError(reason, _MEND)
        interpreter = _interpreter()
        assert interpreter is not None
        return self._run(interpreter, source, expressions)

    def _run(self, interpreter: Path, source: str, expressions: Sequence[str]) -> SandboxResult:
        job = json.dumps({"source": source, "expressions": list(expressions)}).encode()
        if len(job) > JOB_BYTES:
            return _failed("error", f"the program is longer than {JOB_BYTES} bytes", len(expressions), 0.0)
        job_read, filtered = as_pipe(job), as_pipe(system_calls() or b"")
        out_read, out_write = os.pipe()
        started = time.monotonic()
        with os.fdopen(out_read, "rb", buffering=0) as results:
            try:
                process = subprocess.Popen(
                    [*self._command(interpreter, filtered), str(out_write)],
                    stdin=job_read, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    pass_fds=(out_write, filtered), env={}, cwd="/", bufsize=0,
                )  # fmt: skip
            finally:
                for descriptor in (job_read, filtered, out_write):
                    os.close(descriptor)
            with process:
                try:
                    end, out, err = _collect(results, process, started + self.seconds)
                    if end == "ok":
                        _let_end(process)  # killed early, bubblewrap leaves its child to init
                finally:
                    process.kill()
        outcomes = parse_outcomes(out, len(expressions))
        seconds = time.monotonic() - started
        if outcomes is None:
            note = err.decode("utf-8", "replace").strip()[-300:]
            why = {"timeout": f"no result after {self.seconds:g} s", "overflow": "too much output"}
            return _failed(end if end != "ok" else "died", why.get(end, note or "it ended"), len(expressions), seconds)
        program, *values = outcomes
        if program.error:
            return SandboxResult("error", program.error, tuple(values), seconds)
        reason = {"timeout": f"stopped after {self.seconds:g} s", "overflow": "too much output"}.get(end, "")
        return SandboxResult(end, reason, tuple(values), seconds)

    def _command(self, interpreter: Path, filtered: int) -> list[str]:
        """From the outside in: drop root, enter empty namespaces, set the limits, start the driver."""
        bubblewrap, prlimit = _tool("bwrap"), _tool("prlimit")
        become_nobody = (
            [_tool("setpriv"), "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--inh-caps=-all"]
            if os.geteuid() == 0
            else []
        )  # RLIMIT_NPROC does not bind uid 0, and root in a user namespace is still root's uid
        box = [
            bubblewrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
            "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox", "--uid", str(NOBODY), "--gid", str(NOBODY),
            *_mounts(interpreter, prlimit), "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp",
            "--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(filtered),
        ]  # fmt: skip
        memory, cpu = self.memory_mb << 20, max(1, round(self.seconds))
        limits = [
            prlimit, f"--as={memory}", f"--cpu={cpu}", f"--nproc={PROCESSES}", f"--fsize={SCRATCH_BYTES}",
            "--nofile=64", "--core=0", "--stack=16777216",
        ]  # fmt: skip
        return [*become_nobody, *box, "--", *limits, str(interpreter), "-I", "-S", "-B", "-c", _driver()]


def sandbox_available() -> tuple[bool, str]:
    """Whether programs can be run safely here (found out by running one), and if not why, with the mend."""
    if not sys.platform.startswith("linux"):
        return False, f"bubblewrap needs Linux; {_MEND} there"
    missing = [tool for tool in ("bwrap", "prlimit", "setpriv") if shutil.which(tool) is None]
    if missing:
        return False, f"not installed: {', '.join(missing)}; {_MEND}"
    if system_calls() is None:
        return False, f"no filter of system calls is known for {platform.machine()}; run it on x86_64 or aarch64"
    if _interpreter() is None:
        return False, f"bubblewrap does not work here: {_probe_note()}; {_MEND}"
    return True, "bubblewrap runs"


def _probe(interpreter: Path) -> SandboxResult:
    return Sandbox(seconds=20.0)._run(interpreter, "import sys", ["6 * 7", "sys.version_info[:2] >= (3, 10)"])


@cache
def _interpreter() -> Path | None:
    """The first Python 3.10+ that works inside: this one, unless it lies where nobody may read."""
    for candidate in _candidates():
        if [outcome.value for outcome in _probe(candidate).outcomes] == [42, True]:
            return candidate
    return None


def _candidates() -> list[Path]:
    own = Path(os.path.realpath(sys.executable))
    paths = [own, Path("/usr/bin/python3"), Path("/usr/local/bin/python3")]
    return list(dict.fromkeys(Path(os.path.realpath(path)) for path in paths if path.exists()))


@cache
def _probe_note() -> str:
    return _probe(_candidates()[0]).reason.splitlines()[-1] if _candidates() else "no interpreter"


def _mounts(interpreter: Path, prlimit: str) -> list[str]:
    """The interpreter, its standard library and the shared libraries; no shell, no /proc, no /dev, no /etc, and of
    installed packages nothing: a benchmark's answers are in one."""
    system, own = Path("/usr/lib"), interpreter.parent.parent / "lib"
    wanted = [*_shared(Path("/lib")), *_shared(system), Path("/lib64"), Path("/usr/lib64")]
    # An interpreter of its own prefix brings shared libraries along; beside the system's lies the whole system.
    wanted += [module.parent for module in own.glob("python3*/os.py")] if own == system else [own]
    wanted.append(interpreter)
    mounts: list[str] = []
    for path in dict.fromkeys([*wanted, Path(prlimit)]):
        if path.is_symlink() and path.parent == Path("/"):
            mounts += ["--symlink", os.readlink(path), str(path)]
        else:
            mounts += ["--ro-bind-try", str(path), str(path)]
    installed = (
        packages
        for path in wanted
        if not path.is_symlink()
        for below in ("", "python3*/")
        for kind in ("site", "dist")
        for packages in path.glob(f"{below}{kind}-packages")
    )
    for packages in dict.fromkeys(installed):
        mounts += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    return mounts


def _shared(root: Path) -> list[Path]:
    """Where shared libraries lie: on Debian in a folder that is named for the machine."""
    machines = [] if root.is_symlink() else [path for path in root.glob("*-linux-*") if path.is_dir()]
    return machines or [root]


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise CogumiError(f"{name} is not installed", _MEND)
    return os.path.realpath(found)


@cache
def _driver() -> str:
    """The program that runs inside. It is text, so that nothing of this package is mounted."""
    return files("cogumi_dagster.lib").joinpath("sandbox_driver.py").read_text(encoding="utf-8")


def _collect(results: Any, process: "subprocess.Popen[bytes]", deadline: float) -> tuple[Status, bytes, bytes]:
    """Read results and the last of stderr until both end, the deadline passes or the results overflow."""
    out, err = bytearray(), bytearray()
    errors: IO[bytes] | None = process.stderr
    assert errors is not None
    with selectors.DefaultSelector() as ready:
        ready.register(results, selectors.EVENT_READ)
        ready.register(errors, selectors.EVENT_READ)
        while ready.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout", bytes(out), bytes(err)
            for key, _ in ready.select(left):
                chunk = os.read(key.fd, 65_536)
                if not chunk:
                    ready.unregister(key.fileobj)
                elif key.fileobj is results:
                    out += chunk
                    if len(out) > OUTPUT_BYTES:
                        return "overflow", b"", bytes(err)
                else:
                    err = (err + chunk)[-4096:]
    return "ok", bytes(out), bytes(err)


def _let_end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)


def _failed(status: Status, reason: str, count: int, seconds: float) -> SandboxResult:
    return SandboxResult(status, reason, (Outcome(False, None, reason),) * count, seconds)
