"""Programs that nobody has read, run where they can do little harm.

Linux only. A program runs as an ordinary user in namespaces of its own: without a
network, without other processes to signal, with every file system read-only but a small
one in memory that is its folder and vanishes with it, and with the standard library
only. Time, memory of each process, number of processes, size and number of files are
limited. Where the kernel does not permit that, nothing runs.

What this does not contain: a program may read what any user may read (or, unless it is
started by root, what its user may read), can hold some memory beside that of its
processes, could pretend that it passed, and may use a flaw of the kernel. For programs
that mean harm use a virtual machine.
"""

import contextlib
import ctypes
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

__all__ = ["Limits", "require_containment", "run_contained"]

_PASSED, _FAILED, _REFUSED, _TIMED_OUT = 0, 1, 97, 124
_FIRST_USER = 200_000  # above those of people and of services
# CLONE_NEWNS, IPC, PID, NET; and CLONE_NEWUSER.
_NAMESPACES, _NEW_USER = 0x20000 | 0x8000000 | 0x20000000 | 0x40000000, 0x10000000
_READ_ONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
_BOUND, _PRIVATE = 0x4000 | 0x1000, 0x4000 | 1 << 18
_MOUNT_SETATTR, _HERE, _RECURSIVE = 442, -100, 0x8000
_PARENT_DEATH, _NO_NEW_PRIVILEGES = 1, 38
# Other processes, and the sockets of services.
_HIDDEN = ("/proc", "/run")
_RESULT = 3  # a file descriptor


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0  # on the clock
    memory: int = 2**29  # bytes of address space of a process
    processes: int = 4  # threads among them
    folder: int = 2**24  # bytes of all files
    file: int = 2**23  # bytes of a file
    open_files: int = 32


def require_containment(limits: Limits = Limits()) -> None:
    """Runs an empty program.

    Raises:
      InputError: if programs cannot be contained here.
    """
    if (outcome := run_contained("", limits)) != "passed":
        raise _refusal(f"an empty program {outcome}")


def run_contained(program: str, limits: Limits = Limits()) -> str:
    """Runs a Python program: "passed", "failed" or "timed out".

    Args:
      program: its source. It passes if it comes to its end without an exception; one
        that exits before, whatever the code, has failed.
      limits: what it may use.

    Raises:
      InputError: if programs cannot be contained here.
    """
    if sys.platform != "linux":
        raise _refusal(f"they are on Linux only, and this is {sys.platform}")
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for part in ("python", "work"):
            (Path(folder) / part).mkdir()
        source = f"{program}\n__import__('os').write({_RESULT}, b'{word}')\n"
        task = {
            "folder": folder,
            "source": source,
            "word": word,
            "limits": asdict(limits),
        }
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        try:
            _, reason = launcher.communicate(
                json.dumps(task).encode(), limits.seconds + 60
            )
        except subprocess.TimeoutExpired:
            reason = b""
        finally:
            # The first process of the namespace dies with its parent, and all others
            # with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            code = launcher.wait()
    # A program may exit with any code, but cannot write to standard error.
    if code == _REFUSED and reason:
        raise _refusal(reason.decode(errors="replace").strip())
    if code == _PASSED:
        return "passed"
    return "timed out" if code in (_TIMED_OUT, -signal.SIGKILL) else "failed"


def _refusal(reason: str) -> Exception:
    """Returns the error of a machine on which programs cannot be contained."""
    from sparse_jax.errors import InputError

    return InputError(
        f"`allow_code_execution` must be used where programs can be contained: {reason}"
        ". Permit user namespaces, or evaluate the samples in a virtual machine."
    )


def _main() -> NoReturn:
    """Contains the program that standard input states, and exits with its outcome."""
    task = json.load(sys.stdin)
    limits = Limits(**task["limits"])
    try:
        user = _enter_namespaces()
        first = os.fork()
        if first:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)
        _call("prctl", _PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
        folder = Path(task["folder"])
        _hide_files(folder, limits)
        path = folder / "work" / "program.py"
        path.write_text(task["source"], encoding="utf-8")
        # Read to the length of the word only: a program may write without end.
        written, result = os.pipe()
        os.set_blocking(written, False)
        worker = os.fork()
        if not worker:
            _run(path, user, limits, result)
    except OSError as error:
        _refuse(error)
    # The first process of a namespace takes all others with it.
    end = time.monotonic() + limits.seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == worker:
            code = os.waitstatus_to_exitcode(status)
            if code == _PASSED and _read(written) != task["word"].encode():
                code = _FAILED
            os._exit(code if code in (_PASSED, _REFUSED) else _FAILED)
        time.sleep(0 if ended else 0.005)
    os._exit(_TIMED_OUT)


def _read(pipe: int) -> bytes:
    """Returns the beginning of what a program wrote as its result."""
    try:
        return os.read(pipe, 64)
    except BlockingIOError:
        return b""


def _enter_namespaces() -> int | None:
    """Leaves the namespaces of the machine; returns the user to become, if any."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _call("unshare", _NAMESPACES)
        # A user of its own, for whom no other process counts.
        return _FIRST_USER + os.getpid()
    _call("unshare", _NAMESPACES | _NEW_USER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return None


def _hide_files(folder: Path, limits: Limits) -> None:
    """Makes everything read-only but an empty folder in memory."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    _call("mount", None, b"/", None, _PRIVATE, None)
    # Python may be in the home of a user, which others cannot enter.
    python, work = bytes(folder / "python"), bytes(folder / "work")
    _call("mount", sys.base_prefix.encode(), python, None, _BOUND, None)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", _MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, attributes, size)
    empty = _READ_ONLY | _NOSUID | _NODEV | _NOEXEC
    for hidden in filter(os.path.isdir, _HIDDEN):
        _call("mount", b"none", hidden.encode(), b"tmpfs", empty, b"size=4k")
    options = f"size={limits.folder},nr_inodes=1024,mode=0777".encode()
    _call("mount", b"none", work, b"tmpfs", _NOSUID | _NODEV, options)


def _run(path: Path, user: int | None, limits: Limits, result: int) -> NoReturn:
    """Becomes the program."""
    errors = os.dup(2)
    try:
        os.setsid()
        os.chdir(path.parent)
        seconds = int(limits.seconds) + 1
        for kind, most in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, limits.memory),
            (resource.RLIMIT_FSIZE, limits.file),
            (resource.RLIMIT_NOFILE, limits.open_files),
            (resource.RLIMIT_NPROC, limits.processes),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (most, most))
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for target, source in ((_RESULT, result), (0, nothing), (1, nothing)):
            os.dup2(source, target)
        os.set_inheritable(_RESULT, True)  # which is not so if it was there
        os.dup2(nothing, 2)
        home = {"HOME": str(path.parent), "TMPDIR": str(path.parent)}
        prefix = path.parent.parent / "python"
        python = str(prefix / "bin" / f"python3.{sys.version_info.minor}")
        where = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(prefix / "lib")}
        os.execve(python, [python, "-I", "-B", str(path)], {**where, **home})
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(errors, 2)
        _refuse(error)


def _call(name: str, *arguments: object) -> None:
    """Calls a function of the C library, and raises what it reports."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _refuse(error: OSError) -> NoReturn:
    """Ends with the reason why nothing runs."""
    os.write(2, f"{error.strerror}".encode())
    os._exit(_REFUSED)


if __name__ == "__main__":
    _main()
