"""Packing: by hand, against compressed-tensors' own packer, and back."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from poise.core.bits import pack_bits, unpack_bits, words


def test_four_bit_codes_fill_words_from_the_low_end():
    packed = pack_bits(torch.arange(8, dtype=torch.uint8).view(1, 8), 4)
    assert packed.tolist() == [[0x76543210]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 96, 100])
def test_round_trip_and_the_consumers_layout(bits, columns):
    codes = torch.randint(
        2**bits, (5, columns), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8
    )
    packed = pack_bits(codes, bits)
    assert packed.shape == (5, words(columns, bits))
    assert torch.equal(unpack_bits(packed, bits, columns), codes)
    theirs = pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits)
    padding_agrees = columns % 32 == 0 or bits in (1, 2, 4, 8)
    if padding_agrees:
        assert torch.equal(packed, theirs)
    else:
        used = columns * bits // 32
        assert torch.equal(packed[:, :used], theirs[:, :used])
