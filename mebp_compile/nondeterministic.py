"""Ops whose kernels on accelerators may give other bits each time, because threads add in the order in which they come. Torch-free.

A second run of one would not be the recompute of what the first one gave, so no schedule runs one again. What the user's own step gives has
that freedom too; `torch.use_deterministic_algorithms(True)` takes it away where torch has another kernel. The names are those that torch's
documentation of that function lists for CUDA, with the backward of its attention kernels, and of convolutions (cuDNN).
"""

from __future__ import annotations

NONDETERMINISTIC = frozenset(
    {
        "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "_ctc_loss_backward", "_efficient_attention_backward",
        "_embedding_bag_dense_backward", "_flash_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_flash_attention_backward", "adaptive_max_pool2d_backward",
        "avg_pool3d_backward", "bincount", "convolution_backward", "cumsum", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward",
        "grid_sampler_2d_backward", "grid_sampler_3d_backward", "histc", "index_add", "index_add_", "index_copy", "index_copy_", "index_put",
        "index_put_", "_index_put_impl_", "kthvalue", "max_pool3d_with_indices_backward", "max_unpool2d", "max_unpool3d", "median",
        "nll_loss2d_backward", "nll_loss2d_forward", "put", "put_", "reflection_pad1d_backward", "reflection_pad2d_backward",
        "reflection_pad3d_backward", "replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward", "resize_",
        "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "upsample_bicubic2d_backward",
        "upsample_bilinear2d_backward", "upsample_linear1d_backward", "upsample_nearest1d_backward", "upsample_nearest2d_backward",
        "upsample_nearest3d_backward", "upsample_trilinear3d_backward",
    }
)  # fmt: skip


def same_again(target: str, device: str) -> bool:
    """Whether an op ("aten.mm.default") gives the same bits each time on a device; "" is the CPU, whose kernels do."""
    return not device or NONDETERMINISTIC.isdisjoint(target.split(".")[1:2])
