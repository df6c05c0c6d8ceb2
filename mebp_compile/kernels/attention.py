"""Attention in blocks of 64 queries by 64 keys: `mebp::attention(q, k, v, causal, scale)` = (out, sums), with scores S = scale q k^T,

    sums = log sum exp S        out = exp(S - sums) v

and, with W = exp(S - sums), D = grad v^T and the rows' dots = sum(grad out), `mebp::attention_backward`:

    d v = W^T grad        G = scale W (D - dots)        d q = G k        d k = G^T q

where the heads of queries that share a head of keys are added up. The blocks are FlashAttention's (Dao et al., arXiv 2205.14135, algorithm 1);
blocks above the diagonal are left out of a causal product. It takes the place of torch's kernel for the CPU, and has its results and what it saves.
Tier "reassociate": everything is fp32 and rounded once, where torch's kernel rounds weights and slopes to bf16. The bits do not depend on the
number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_compile import shared_library
from mebp_compile.kernels.fused import DTYPES

SIZE_MULTIPLE, MOST_SIZE, BLOCK = 16, 256, 64  # numbers of a head; queries and keys of a block, as in attention.c
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_FORWARD = "Tensor q, Tensor k, Tensor v, bool causal, float scale"
_BACKWARD = "Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, bool causal, float scale"
_LIBRARY.define(f"attention({_FORWARD}) -> (Tensor, Tensor)")
_LIBRARY.define(f"attention.out({_FORWARD}, *, Tensor(a!) out, Tensor(b!) sums) -> (Tensor(a!), Tensor(b!))")
_LIBRARY.define(f"attention_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"attention_backward.out({_BACKWARD}, *, Tensor(a!) to_q, Tensor(b!) to_k, Tensor(c!) to_v) -> (Tensor(a!), Tensor(b!), Tensor(c!))"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library beside this file, or None (said once through `logging`) where it was not built or can't be loaded."""
    stem = Path(__file__).resolve().parent / "_attention"
    return shared_library.load(stem, _declare, "the attention kernel", "passes leave torch's attention as it is")


def _declare(lib: ctypes.CDLL) -> None:
    arguments = [*[_POINTER] * 4, ctypes.c_float, *[_INT] * 5]
    lib.mebp_attention.argtypes, lib.mebp_attention.restype = arguments, None
    lib.mebp_attention_is_fast.argtypes, lib.mebp_attention_is_fast.restype = [], _INT


def is_fast() -> bool:
    """Whether the kernel is there, on a processor whose registers its tiles are made for."""
    return library() is not None and bool(library().mebp_attention_is_fast())  # type: ignore[union-attr]


def takes(*heads: Tensor) -> bool:
    """Whether the kernel can work on these: on the CPU, of one dtype, bf16 or fp32, the numbers of a token adjacent, not more than MOST_SIZE."""
    first = heads[0]
    same = all(part.dtype == first.dtype and part.shape[-1] == first.shape[-1] and part.stride(-1) == 1 for part in heads)
    size = first.shape[-1]
    return same and first.dtype in DTYPES and first.device.type == "cpu" and size % SIZE_MULTIPLE == 0 and 0 < size <= MOST_SIZE


# --- the ops ---


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, like q; sums, fp32 [batch, heads, tokens]). q: [batch, heads, tokens, size], k, v: [batch, groups, sources, size], where groups
    divides heads. causal: query i sees the keys up to i."""
    out, sums = _shapes(q)
    return attention_out(q, k, v, causal, scale, out=out, sums=sums)


def attention_out(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, *, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The same into two tensors of any strides in which the numbers of a token are adjacent."""
    if library() is None or not takes(q, k, v, out):
        return forward_in_torch(q, k, v, causal, scale, out, sums)
    _run((q, k, v, out, sums), causal, scale)
    return out, sums


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, tokens outermost in memory but for the batch. grad: of `out`, like it."""
    to_q, to_k, to_v = _gradient_shapes(q, k, v)
    return attention_backward_out(grad, q, k, v, out, sums, causal, scale, to_q=to_q, to_k=to_k, to_v=to_v)


def attention_backward_out(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool, scale: float, *, to_q: Tensor, to_k: Tensor,
    to_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same into three tensors of any strides in which the numbers of a token are adjacent."""
    if library() is None or not takes(grad, q, k, v, out, to_q, to_k, to_v):
        return backward_in_torch(grad, q, k, v, sums, causal, scale, (to_q, to_k, to_v))
    _run((q, k, v, out, sums, grad, to_q, to_k, to_v), causal, scale)
    return to_q, to_k, to_v


def _run(heads: tuple[Tensor, ...], causal: bool, scale: float) -> None:
    """Forward with five tensors, backward with nine."""
    q, k = heads[:2]
    batch, groups, sources, size = k.shape
    threads, backward = torch.get_num_threads(), len(heads) > 5
    one_walk = backward and batch * groups % threads == 0
    turned = -(-sources // BLOCK) * BLOCK * size  # numbers of a head, in whole blocks
    room = q.new_empty(turned * (batch * groups * (1 + backward) + 2 * threads * one_walk), dtype=torch.float32)
    pointers = (_POINTER * len(heads))(*(part.data_ptr() for part in heads))
    distances = (ctypes.c_int64 * (3 * len(heads)))(*(step for part in heads for step in part.stride()[:3]))
    sizes = (ctypes.c_int64 * 6)(batch, q.shape[1], groups, q.shape[2], sources, size)
    flags = (causal, backward, one_walk, q.dtype == torch.bfloat16, threads)
    library().mebp_attention(pointers, distances, sizes, room.data_ptr(), scale, *flags)  # type: ignore[union-attr]


# --- the twins of the C kernel ---


def forward_in_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, scale)
    sums.copy_(torch.logsumexp(scores, -1))
    return out.copy_(torch.softmax(scores, -1) @ _for_heads(v, q)), sums


def backward_in_torch(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, causal: bool, scale: float, to: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    weights, wide = torch.exp(_scores(q, k, causal, scale) - sums.unsqueeze(-1)), grad.float()
    pulled = wide @ _for_heads(v, q).mT
    slopes = weights * (pulled - (weights * pulled).sum(-1, keepdim=True)) * scale
    to[0].copy_(slopes @ _for_heads(k, q))
    to[1].copy_(_of_groups(slopes.mT @ q.float(), k))
    to[2].copy_(_of_groups(weights.mT @ wide, v))
    return to


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q.float() @ _for_heads(k, q).mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores.masked_fill_(hidden, float("-inf"))
    return scores


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    """What each head of queries reads."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)


def _of_groups(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the heads that share a head of keys."""
    return x.unflatten(1, (like.shape[1], -1)).sum(2)


# --- geometry, as torch's kernel has it ---


def _shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _size = q.shape
    return torch.empty_like(q), q.new_empty((batch, tokens, heads), dtype=torch.float32).transpose(1, 2)


def _gradient_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    to_q, to_k, to_v = (torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device) for x in (q, k, v))
    return to_q, to_k, to_v


_LIBRARY.impl("attention", attention, "CPU")
_LIBRARY.impl("attention", _shapes, "Meta")
_LIBRARY.impl("attention.out", attention_out, "CPU")
_LIBRARY.impl("attention_backward", attention_backward, "CPU")
_LIBRARY.impl("attention_backward", lambda grad, q, k, v, *_: _gradient_shapes(q, k, v), "Meta")
_LIBRARY.impl("attention_backward.out", attention_backward_out, "CPU")
