"""Random numbers: the words that `reference.random_words` defines, bit for bit.

`tl.philox` is Philox-4x32-10 with the seed's low and high half as key; the counter is
(block, stream, step low, step high). The tests hold its bits to the reference's.
"""

import triton
import triton.language as tl


@triton.jit
def words(rng_ptr, stream, blocks):
    """Return the four 32-bit words of each counter block.

    Args:
        rng_ptr: int64 [2], (seed, step), on the device: a replayed graph sees their new values.
        stream: second counter word.
        blocks: first counter word, an integer tile of any width, taken modulo 2^32.
    """
    seed, step = tl.load(rng_ptr), tl.load(rng_ptr + 1)
    c0 = blocks.to(tl.uint32)
    c1 = tl.full(c0.shape, 0, tl.uint32) + tl.cast(stream, tl.uint32)
    c2 = tl.full(c0.shape, 0, tl.uint32) + (step & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.full(c0.shape, 0, tl.uint32) + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def uniform(word, dtype: tl.constexpr):
    """Return the word's top 24 bits as a number in [0, 1), exact in float32."""
    return (word >> 8).to(tl.int32).to(dtype) * 5.9604644775390625e-08


@triton.jit
def in_order(w0, w1, w2, w3):
    """[..., n] four times to [..., 4n]: the words of a block side by side."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
