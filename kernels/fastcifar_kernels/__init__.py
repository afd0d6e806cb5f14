"""Triton kernels for dynamic convolution: usable from any PyTorch model, each with its plain-torch reference beside it.

    weighted_sum             k feature maps, summed with coefficients of each sample
    bn_relu_weighted_sum     the same with BatchNorm and ReLU on each map first, nothing written in between
    aggregate_weights        k sets of filters, summed with coefficients of each sample
    scaled_copies            one feature map, scaled with each of k coefficients of its sample
    batch_statistics         the mean and variance that BatchNorm needs, in one pass

and, for plain convnets,

    bn_gelu                  BatchNorm without a scale, then GELU, where channels are the last axis
    crop_flip                bytes to images of a batch: picked, shifted, mirrored and normalised in one pass
    bn_relu_pool             BatchNorm, leaky ReLU, dropout and max pooling of one feature map, in one pass on a CPU
    conv_matmul              a 3x3 convolution as matrix products, for many filters on small maps on a CPU

and, on x86 processors, for images that lie in groups of 32,

    conv_blocked             a 3x3 convolution, with 2x2 max pooling before anything is written: on the matrix unit of
                             recent Xeons (AMX), or in vectors with Winograd's fewer multiplications
    patches_gelu             a frozen 2x2 convolution of colour images with GELU: where the groups come from

All but batch_statistics and crop_flip are differentiable, and all work under torch.compile(fullgraph=True) and autocast
and give the same bits every time. CUDA tensors take the Triton kernels; CPU tensors take parallel numba loops, but for
crop_flip, which is plain torch there, or, under TRITON_INTERPRET=1, the Triton kernels in Triton's interpreter. The
last four have no Triton kernel: beyond the CPU, the last two beyond x86, they are plain torch.
`python -m fastcifar_kernels.verify` compares them all with float64.

Names carry shapes: N samples, K experts (the k parallel maps), C channels of each, H rows, W columns, P = H * W pixels;
for filters O output channels, I input channels; G groups of M = 32 images, R rows of channels.
"""

from fastcifar_kernels.aggregate_weights import aggregate_weights
from fastcifar_kernels.batch_statistics import batch_statistics
from fastcifar_kernels.bn_gelu import bn_gelu
from fastcifar_kernels.bn_relu_pool import bn_relu_pool
from fastcifar_kernels.bn_relu_weighted_sum import bn_relu_weighted_sum
from fastcifar_kernels.conv_blocked import conv_blocked
from fastcifar_kernels.conv_matmul import conv_matmul
from fastcifar_kernels.crop_flip import crop_flip
from fastcifar_kernels.patches_gelu import patches_gelu
from fastcifar_kernels.scaled_copies import scaled_copies
from fastcifar_kernels.weighted_sum import weighted_sum

__all__ = [
    "aggregate_weights",
    "batch_statistics",
    "bn_gelu",
    "bn_relu_pool",
    "bn_relu_weighted_sum",
    "conv_blocked",
    "conv_matmul",
    "crop_flip",
    "patches_gelu",
    "scaled_copies",
    "weighted_sum",
]
