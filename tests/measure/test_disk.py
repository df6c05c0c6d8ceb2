"""Kinds of file system, nameless scratch files, and the disk's speed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mebp_compile.errors import DiskError
from mebp_compile.measure import disk
from mebp_compile.measure.disk import filesystem_type, measure_disk, open_scratch, refuse_memory_disk, scratch_file

MOUNTS = """/dev/a / ext4 rw 0 0
tmpfs /ram tmpfs rw 0 0
/dev/b /ram/disk xfs rw 0 0
/dev/c /with\\040space btrfs rw 0 0
/dev/d /twice ext4 rw 0 0
tmpfs /twice ramfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home", "ext4"),
        ("/ram", "tmpfs"),
        ("/ramshackle", "ext4"),
        ("/ram/a/b", "tmpfs"),
        ("/ram/disk/a", "xfs"),
        ("/with space/a", "btrfs"),
        ("/twice", "ramfs"),
    ],
)
def test_filesystem_type_is_of_the_innermost_mount(monkeypatch: pytest.MonkeyPatch, path: str, kind: str) -> None:
    """The longest mount point that holds the path decides, the last of equal ones, and names are unescaped."""
    monkeypatch.setattr(Path, "read_text", lambda self: MOUNTS)
    assert filesystem_type(Path(path)) == kind


def test_memory_disks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tmpfs and ramfs are refused with a fix; a disk, and a system without /proc/mounts, are not."""
    for kind in ("tmpfs", "ramfs"):
        monkeypatch.setattr(disk, "filesystem_type", lambda path, kind=kind: kind)
        with pytest.raises(DiskError, match=f"on {kind}, which is memory"):
            refuse_memory_disk(tmp_path)
        with pytest.raises(DiskError, match="which is memory"):
            measure_disk(tmp_path, 1 << 20)
    for kind in ("ext4", "unknown"):
        monkeypatch.setattr(disk, "filesystem_type", lambda path, kind=kind: kind)
        refuse_memory_disk(tmp_path)


def test_no_mount_table_means_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc/mounts can't be read the type is unknown."""

    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert filesystem_type(Path("/")) == "unknown"


def test_scratch_file_has_its_size_and_no_name(tmp_path: Path) -> None:
    """The file is as large as asked, its blocks are reserved, the folder stays empty, and the exit closes it."""
    with scratch_file(tmp_path, 1_000_000) as fd:
        assert os.fstat(fd).st_size == 1_000_000
        assert os.fstat(fd).st_blocks * 512 >= 1_000_000
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_scratch_file_without_o_tmpfile_or_fallocate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the file system has neither, the file is unlinked after opening and filled with zeros."""
    real_open = os.open

    def without_tmpfile(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real_open(path, flags, *rest, **more)

    def without_fallocate(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "open", without_tmpfile)
    monkeypatch.setattr(os, "posix_fallocate", without_fallocate)
    with scratch_file(tmp_path, 3_000_001) as fd:
        assert os.listdir(tmp_path) == []
        assert os.pread(fd, 4_000_000, 0) == bytes(3_000_001)


def test_too_small_a_disk_is_named_with_both_sizes(tmp_path: Path) -> None:
    """Too little free space is refused before anything is written, with needed and available bytes."""
    space = os.statvfs(tmp_path)
    needed = 2 * space.f_bavail * space.f_frsize + 1
    with pytest.raises(DiskError, match=rf"disk full: {needed} bytes .* \d+ are available"):
        open_scratch(tmp_path, needed)


@pytest.mark.parametrize(("code", "text"), [(errno.ENOSPC, "disk full: 4096"), (errno.EIO, "EIO")])
def test_failing_reservation_closes_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, text: str
) -> None:
    """A disk that fills up or fails while blocks are reserved is a DiskError, and no descriptor stays open."""

    def fail(fd: int, offset: int, size: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    open_before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match=text):
        open_scratch(tmp_path, 4096)
    assert set(os.listdir("/proc/self/fd")) == open_before


def test_unusable_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that is missing, no folder, or not writable is a DiskError that says what to name instead."""
    (tmp_path / "file").touch()
    for bad in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(DiskError, match="name an existing folder"):
            open_scratch(bad, 10)

    def forbid(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", forbid)
    with pytest.raises(DiskError, match="Permission denied"):
        open_scratch(tmp_path, 10)


@pytest.mark.parametrize("size_bytes", [1, 5_000_000, 9 << 20])
def test_speeds_are_positive(tmp_path: Path, size_bytes: int) -> None:
    """All figures are positive, also for sizes that are no whole number of blocks, and nothing is left in the
    folder.
    """
    speed = measure_disk(tmp_path, size_bytes, allow_tmpfs=True)
    figures = (speed.read_bytes_per_us, speed.write_bytes_per_us, speed.cached_read_bytes_per_us, speed.cached_latency_us)
    assert min(*figures, speed.cached_write_bytes_per_us, speed.latency_us) > 0
    assert speed.filesystem == filesystem_type(tmp_path)
    assert os.listdir(tmp_path) == []
