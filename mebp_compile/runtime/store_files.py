"""The files of a weight store, opened and found to be what its manifest says."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

from mebp_compile.errors import StoreError
from mebp_compile.quant.build import disk_errors
from mebp_compile.quant.manifest import MAX_MANIFEST_BYTES, DataFile, new_digest
from mebp_compile.quant.safetensors_file import read_bytes

VERIFY_CHUNK_BYTES = 256 << 10  # memory taken while a digest is checked
DAMAGED = "build the store again, or restore it from a copy"


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that were only read from: an error in closing them loses nothing."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def open_regular(folder_fd: int, name: str) -> int:
    """Open a regular file inside the store's folder, never through a link. Raises StoreError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder_fd)
    except OSError as error:
        raise StoreError(f"can't open {name} of the store: {error.strerror}", fix=DAMAGED) from error
    try:
        with disk_errors(f"looking at {name} of the store"):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StoreError(f"{name} of the store is not a regular file", fix=DAMAGED)
    except BaseException:
        close_all((fd,))
        raise
    return fd


def read_manifest(folder_fd: int) -> bytes:
    """The text of the store's manifest. Raises StoreError where it is missing or too large."""
    fd = open_regular(folder_fd, "manifest.json")
    try:
        with disk_errors("reading manifest.json of the store"):
            raw = read_bytes(fd, min(os.fstat(fd).st_size, MAX_MANIFEST_BYTES) + 1, 0)
    finally:
        close_all((fd,))
    if len(raw) > MAX_MANIFEST_BYTES:
        raise StoreError(f"manifest.json is larger than {MAX_MANIFEST_BYTES} bytes", fix=DAMAGED)
    return raw


def check_file(fd: int, file: DataFile) -> None:
    """Size and header are those of the manifest. Raises StoreError."""
    with disk_errors(f"looking at {file.name} of the store"):
        size_bytes = os.fstat(fd).st_size
    if size_bytes != file.size_bytes:
        raise StoreError(f"{file.name} has {size_bytes} bytes, the manifest says {file.size_bytes}", fix=DAMAGED)
    digest = new_digest()
    with disk_errors(f"reading the header of {file.name}"):
        for start in range(0, file.header_bytes, VERIFY_CHUNK_BYTES):
            digest.update(read_bytes(fd, min(VERIFY_CHUNK_BYTES, file.header_bytes - start), start))
    if digest.hexdigest() != file.header_digest:
        raise StoreError(f"the header of {file.name} is damaged: its digest does not match", fix=DAMAGED)
