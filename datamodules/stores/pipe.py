"""Files that a shell command gives: `pipe:COMMAND with {name}`, for stores that only a tool of its own can read."""

import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
from typing import BinaryIO

from datamodules.stores.address import URL, without_secrets
from datamodules.stores.transfer import Tries, restart

SILENCE = 300.0  # s without a byte after which the command is ended
TRIES = 3
CHUNK = 1 << 20  # bytes
SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)  # a run that is told to go by these makes its step, and reads for it
SAID = 500  # bytes of stderr that an error shows
SECRET = re.compile(r"(?i)(?:auth\w*|bearer|basic|token|secret|password|passwd|key|user|^-u)(?:$|[\s=:]+(.*))")


def piped(address: str) -> str:
    """What of it may be shown: the first word, unless that is a variable (TOKEN=... tool), as all may hold secrets."""
    first = (address.removeprefix("pipe:").split() or [""])[0]
    return f"pipe:{first} ..." if re.fullmatch(r"[\w./+-]*", first) else "pipe:..."


class Pipe:
    """Runs the command by `sh -c` for each file, the quoted name in place of {name}; its output is the file."""

    def __init__(self, address: str) -> None:
        """Raises ValueError when the command does not say where the name belongs."""
        self._command = address.removeprefix("pipe:")
        self.shown = piped(address)
        if "{name}" not in self._command:
            raise ValueError(
                f"{self.shown} has no {{name}}; expected a command such as pipe:my-tool cat folder/{{name}}"
            )

    def __repr__(self) -> str:
        return f"Pipe({self.shown!r})"

    def read(self, name: str) -> bytes:
        with tempfile.TemporaryFile() as file:
            self.copy(name, file, None)
            file.seek(0)
            return file.read()

    def copy(self, name: str, part: BinaryIO, size: int | None) -> None:
        tries = Tries(f"{self.shown} for {name}", self._clean, TRIES)
        while True:
            restart(part)
            problem = self._run(name, part, size)
            if problem is None:
                return
            tries.failed(problem)

    def _run(self, name: str, part: BinaryIO, size: int | None) -> str | None:
        """What went wrong, if anything."""
        command = ["sh", "-c", self._command.replace("{name}", shlex.quote(name))]
        with tempfile.TemporaryFile() as errors:
            # Read by this process: a command that wrote the file itself would go on when this process is killed.
            former = signal.pthread_sigmask(signal.SIG_BLOCK, SCHEDULERS)  # the command inherits it
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
            try:
                problem = _take(process, part, size)
            finally:
                _end(process)
            if problem is None and process.returncode == 0:
                return None
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - SAID))
            said = errors.read().decode(errors="replace").strip()
            return f"{problem or f'exit status {process.returncode}'}; stderr: {said or '(nothing)'}"

    def _clean(self, text: str) -> str:
        """What the command said, without the passwords and tokens that it was given."""
        for secret in sorted(_secrets(self._command), key=len, reverse=True):
            text = text.replace(secret, "***")
        return URL.sub(lambda match: without_secrets(match[0]), text)


def _secrets(command: str) -> set[str]:
    """Values in the command whose options or variables are named as secrets are: --token abc, KEY=abc, "Bearer abc"."""
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # quotes that are not closed
        words = command.split()
    found = [(SECRET.search(word), following) for word, following in zip(words, [*words[1:], ""], strict=True)]
    values = [named[1] or following for named, following in found if named]
    return {secret for value in values for secret in (value, *value.split()) if len(secret) >= 4}


def _take(process: subprocess.Popen[bytes], part: BinaryIO, size: int | None) -> str | None:
    """Writes the command's output into `part` until it ends; returns why it was not waited for, if so."""
    assert process.stdout is not None
    with process.stdout as output:
        ready = select.poll()  # select() knows no descriptor from 1024 on
        ready.register(output, select.POLLIN)
        while ready.poll(SILENCE * 1000):
            content = os.read(output.fileno(), CHUNK)
            part.write(content)
            if size is not None and part.tell() > size:
                return f"it gives more than the file's {size:,} bytes"
            if not content:
                return _ended(process)
    return f"nothing came for {SILENCE:g} s"


def _ended(process: subprocess.Popen[bytes]) -> str | None:
    try:
        process.wait(SILENCE)
    except subprocess.TimeoutExpired:
        return f"it closed its output and did not end in {SILENCE:g} s"
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
