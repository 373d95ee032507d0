"""Exchange two folders in one step, where the operating system can."""

import ctypes
import os
import sys
from pathlib import Path

_AT_FDCWD = -100 if sys.platform.startswith("linux") else -2
_RENAME_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS


def exchange(first: Path, second: Path) -> bool:
    """Let two paths of one file system change places in one step; whoever looks sees the one state or the other.

    Args:
        first: A file or folder.
        second: Another.

    Returns:
        Whether it was done; False where the system or the file system cannot.
    """
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    if name is None:
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return function(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0
