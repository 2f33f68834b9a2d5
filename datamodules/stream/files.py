"""Files that are read at many places, by threads and forked processes alike."""

import os
import sys
from pathlib import Path


class OpenFile:
    """A file open for reading as long as someone refers to it; has no position that readers could share."""

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        """Fewer than `size` bytes where the file ends."""
        return os.pread(self._descriptor, size, offset)

    def expect(self, size: int, offset: int) -> None:
        """These bytes will be read soon: the system may fetch them from its disk meanwhile."""
        if sys.platform == "linux":
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
