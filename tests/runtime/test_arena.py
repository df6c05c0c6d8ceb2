"""The arena's memory: pages that are there from their first use on, until they are given back."""

from __future__ import annotations

import mmap

import torch

from mebp_compile.measure.process import rss
from mebp_compile.runtime.arena import PagedArena, has_own_pages, mapped, with_own_pages

MB = 1 << 20


def test_pages_come_when_used_and_go_when_given_back() -> None:
    """RssAnon follows both; what was given back is empty, what was not is as it was."""
    before = rss().anon_bytes
    arena = PagedArena(64 * MB)
    arena.keep_pages_small()
    assert rss().anon_bytes - before < 2 * MB
    arena.bytes.fill_(7)
    assert abs(rss().anon_bytes - before - 64 * MB) < 4 * MB
    arena.decommit(16 * MB, 48 * MB)
    assert abs(rss().anon_bytes - before - 32 * MB) < 4 * MB
    assert bool((arena.bytes[: 16 * MB] == 7).all())
    assert bool((arena.bytes[48 * MB :] == 7).all())
    assert not bool(arena.bytes[16 * MB : 48 * MB].any())


def test_only_whole_pages_go() -> None:
    """A part of a page stays, whatever the page size of the machine that the plan was made on."""
    arena = PagedArena(4 * mmap.PAGESIZE)
    arena.bytes.fill_(7)
    arena.decommit(1, 2 * mmap.PAGESIZE - 1)
    assert bool((arena.bytes == 7).all())
    arena.decommit(1, 3 * mmap.PAGESIZE)
    kept = torch.tensor([True, False, False, True]).repeat_interleave(mmap.PAGESIZE)
    assert torch.equal(arena.bytes == 7, kept)


def test_an_arena_of_nothing() -> None:
    assert PagedArena(0).bytes.nbytes == 0


def test_views_outlive_the_arena() -> None:
    """The memory stays as long as a tensor in it."""
    view = PagedArena(MB).view(64, 8, torch.float32)
    view.fill_(3.0)
    assert view.tolist() == [3.0] * 8
    assert view.untyped_storage().nbytes() == 32


def test_tensors_with_pages_of_their_own() -> None:
    """Their memory goes back to the system with them, and is as much as they are large."""
    before = rss().anon_bytes
    tensors = [mapped((512, 513), torch.float32).fill_(7) for _ in range(32)]
    assert all(has_own_pages(tensor) for tensor in tensors)
    assert abs(rss().anon_bytes - before - 32 * 512 * 513 * 4) < MB
    del tensors
    assert rss().anon_bytes - before < MB


def test_a_copy_with_pages_of_its_own() -> None:
    """Values and strides are the tensor's; what is small, or has them, is itself."""
    tensor = torch.randn(600, 500).t()
    copy = with_own_pages(tensor)
    assert has_own_pages(copy)
    assert not has_own_pages(tensor)
    assert copy.stride() == tensor.stride()
    assert torch.equal(copy, tensor)
    assert with_own_pages(copy) is copy
    small = torch.ones(8)
    assert with_own_pages(small) is small
    assert not has_own_pages(small)
