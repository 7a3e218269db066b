"""Arrays in npz files: written whole or not at all, and read only where they are what they say.

Ours are not compressed. Compressed ones are read too, but none that swells: a file of 4 MB can claim to hold 4 GB.
"""

from __future__ import annotations

import math
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.storage.durable import writing
from harness.storage.strict_json import Unreadable

if TYPE_CHECKING:
    import numpy as np

MAX_SWELL, FREE_BYTES = 20, 2**20
"""A file may hold so many times its own size and FREE_BYTES besides."""
CHECKED_BYTES = 2**26
"""Of files up to this size `flaw`, which a driver asks for every trial, compares checksums; of larger ones `load` alone."""


def save(path: Path, **arrays: Any) -> None:
    """Write arrays as one npz, durably."""
    import numpy as np

    with writing(path) as file:
        np.savez(file, **arrays)


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz. Raises FileNotFoundError, or Unreadable with the reason; never more memory than the file is worth."""
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(path, archive)
            for member in archive.infolist():
                _check_header(archive, member)
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (FileNotFoundError, Unreadable):
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for damaged bytes
        raise Unreadable(_said(error)) from None


def flaw(path: Path) -> str:
    """Why a file cannot be read as an npz; '' where nothing speaks against it. Looks at a file that stays as it is only once."""
    try:
        found = path.stat()
    except OSError as error:
        return error.strerror or str(error)
    return _flaw(path, (found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=4096)
def _flaw(path: Path, stamp: tuple[int, ...]) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(path, archive)
            odd = archive.testzip() if stamp[0] <= CHECKED_BYTES else None
            return f"the checksum of {odd} is wrong" if odd else ""
    except Unreadable as error:
        return str(error)
    except Exception as error:  # as in `load`
        return _said(error)


def _said(error: Exception) -> str:
    return f"not an npz that can be read ({type(error).__name__}: {' '.join(str(error).split())[:160]})"


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    members, size = archive.infolist(), path.stat().st_size
    if not members:
        raise Unreadable("an npz without arrays")
    if sum(member.file_size for member in members) > MAX_SWELL * size + FREE_BYTES:
        raise Unreadable(f"an npz that claims to hold more than {MAX_SWELL} times its size")


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Unreadable unless the array that a member announces is as long as the member."""
    from numpy.lib import format as npy

    with archive.open(member) as file:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(file))
        if read is None:
            raise Unreadable(f"{member.filename[:80]!r} is of an unknown version")
        shape, _, kind = read(file)
        if math.prod(shape) * kind.itemsize != member.file_size - file.tell():
            raise Unreadable(f"{member.filename[:80]!r} announces another size than it has")
