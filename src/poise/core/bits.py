"""Dense packing of small codes: code i of a row occupies bits [i*b, (i+1)*b) of a little-endian stream,
each row padded to whole 32-bit words. This is also the layout of compressed-tensors' ``pack-quantized``.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def words(columns: int, bits: int) -> int:
    """32-bit words that hold a row of codes."""
    return -(-columns * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes below 2**bits, [rows, columns], into int32 words, [rows, words]."""
    rows, columns = codes.shape
    if bits == 8:
        packed = codes
    elif bits == 4:
        even = pad(codes, (0, 1)) if columns % 2 else codes
        packed = even[:, ::2] | (even[:, 1::2] << 4)
    else:
        eights = pad(codes, (0, -columns % 8)).view(rows, -(-columns // 8), 8).long()
        joined = (eights << torch.arange(0, 8 * bits, bits)).sum(-1, keepdim=True)
        packed = joined.view(torch.uint8)[..., :bits].reshape(rows, eights.shape[1] * bits).contiguous()
    length = 4 * words(columns, bits)
    if packed.shape[1] < length:
        packed = pad(packed, (0, length - packed.shape[1]))
    packed = packed[:, :length]
    return (
        packed.reshape(-1).view(torch.int32).view(rows, words(columns, bits))
    )  # flat: strides of 1-wide axes lie


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of ``pack_bits``: uint8 codes [rows, columns]."""
    rows = packed.shape[0]
    stream = packed.reshape(-1).view(torch.uint8).view(rows, 4 * packed.shape[1])
    if bits == 8:
        return stream[:, :columns].clone()
    if bits == 4:
        return (
            torch.stack((stream & 15, stream >> 4), dim=-1)
            .view(rows, 2 * stream.shape[1])[:, :columns]
            .contiguous()
        )
    padded = pad(stream, (0, -stream.shape[1] % bits))
    chunks = padded.view(rows, padded.shape[1] // bits, bits)
    joined = pad(chunks, (0, 8 - bits)).contiguous().view(torch.int64)
    codes: Tensor = (joined >> torch.arange(0, 8 * bits, bits)) & (2**bits - 1)
    return codes.to(torch.uint8).view(rows, 8 * chunks.shape[1])[:, :columns].contiguous()
