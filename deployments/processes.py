"""Start, find and end the background processes of one owner.

There are no pid files. A process that is started here carries its owner's folder in its
environment, and its children inherit it, so the process table itself is the record. It is never
stale, and it also lists orphans, such as a flow run whose worker was killed (Prefect starts each
flow run in a session of its own).
"""

import fcntl
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

GRACE = 15.0  # seconds from SIGTERM to SIGKILL

_OWNER = "MNIST_STACK"
_NAME = "MNIST_STACK_SERVICE"

# The processes may outlive this program. Popen warns when an object is dropped while its process
# still runs, so every object stays referenced here.
_launched: list[subprocess.Popen[bytes]] = []


def launch(
    name: str, command: list[str], *, owner: Path, variables: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, out of reach of the terminal's Ctrl-C.

    `variables` is the whole environment. Output goes to `log`; an earlier log is kept as
    `.previous.log`.
    """
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**variables, _OWNER: str(owner), _NAME: name},
            cwd=owner,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _launched.append(process)
    return process


def find(owner: Path) -> dict[psutil.Process, str]:
    """Return every live process of an owner, oldest first, with the name given to `launch`.

    Descendants are included: they have inherited owner and name.
    """
    found = {}
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            if variables.get(_OWNER) == str(owner) and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = variables[_NAME]
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile, or another user's
            continue
    return dict(sorted(found.items(), key=lambda item: item[0].create_time()))


def runs(process: psutil.Process, command: list[str]) -> bool:
    """Return True if a process runs exactly this command; its children run others."""
    try:
        # Without the first word: an interpreter may put its real path there.
        return process.cmdline()[1:] == command[1:]
    except psutil.NoSuchProcess:
        return False


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and its descendants."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Terminate processes and wait; kill and return those that outlive the grace period."""
    processes = list(processes)
    _send(processes, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(processes, timeout=GRACE)
    _send(stubborn, signal.SIGKILL)
    psutil.wait_procs(stubborn)
    reap()
    return stubborn


def reap() -> None:
    """Collect the exit codes of launched processes; a dead one is a zombie until then."""
    for process in _launched:
        process.poll()


def port_holder(host: str, port: int) -> str | None:
    """Return a description of the program that holds a port; None if the port is free."""
    with socket.socket() as probe:
        # With this option a port whose last connections are in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return _listener(port) or f"another user's program ({error.strerror})"
    return None


def tail(log: Path, lines: int = 20) -> str:
    """Return the last lines of a log under its path."""
    end_of_log = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"The end of {log}:", *end_of_log])


def last_error(log: Path) -> str:
    """Return the last line of a log that reports an error, with the log's path."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\b(ERROR|CRITICAL)\b", line)]
    return f"The last error in {log}: {errors[-1].strip()}" if errors else f"{log} has no error"


@contextmanager
def one_at_a_time(owner: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on the processes of an owner; report by `say` if it has to wait.

    The system releases the lock when the holder ends, however that happens.
    """
    with (owner / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another command on {owner} to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _listener(port: int) -> str | None:
    """Return name and pid of the program that listens on a port, if this user may see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.laddr[1:] == (port,) and connection.pid is not None:
                return f"{psutil.Process(connection.pid).name()}, pid {connection.pid}"
    except (psutil.AccessDenied, psutil.NoSuchProcess):  # macOS lets only root see connections
        return None
    return None
