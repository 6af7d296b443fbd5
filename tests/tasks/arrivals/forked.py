"""The parser's process, forked from one that has loaded its libraries: 5 ms in place of 350.

    python -m tests.tasks.arrivals.forked

reads a line `INPUT OUTPUT MEMORY SECONDS` for each process, and writes its exit code.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from tempfile import TemporaryDirectory
from typing import IO, Any

from tasks.arrivals.parser import main


@contextmanager
def parsers() -> Iterator[Any]:
    """Yield a function that does for the parser what `subprocess.run` does."""
    command = [sys.executable, "-m", "tests.tasks.arrivals.forked"]
    with (
        TemporaryDirectory() as folder,
        Popen(command, stdin=PIPE, stdout=PIPE, text=True, bufsize=1) as server,
    ):
        order, answer = server.stdin, server.stdout
        assert order
        assert answer
        files, result = Path(folder, "files"), Path(folder, "result")

        def run(
            arguments: list[str], stdin: IO[bytes], stdout: IO[bytes], **_: Any
        ) -> CompletedProcess[bytes]:
            files.write_bytes(stdin.read())
            print(files, result, *arguments[-2:], file=order)
            code = int(answer.readline())
            stdout.write(result.read_bytes())
            return CompletedProcess(arguments, code, stderr=b"its process wrote why")

        yield run


def _serve() -> None:
    for line in sys.stdin:
        files, result, memory, seconds = line.split()
        if not (child := os.fork()):
            with Path(files).open() as sys.stdin, Path(result).open("w") as sys.stdout:
                main(int(memory), int(seconds))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
