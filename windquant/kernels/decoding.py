"""What all kernels share: from packed bytes to levels, on tiles [16, columns, groups] of a weight.

A *group* is 16 rows of one column and twice as many whole bytes as a weight has bits: 2 at 1 bit, 3 at 1.5, 7 at 3.5.
Triton deals a tile out to the threads from the last dimension on, so that a thread holds whole groups: the 16 rows lie
in its registers and every shift and mask below is a constant of the compiled kernel. With 32 groups a warp, sums over
columns need no other thread either.

Codes of k bits become floats without a conversion: put into the top of the mantissa of 1.0, a code c reads 1 + c / 2^k.
The `ONE` that it carries along is taken off once per chunk, by the sum of the activations, not once per weight.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from windquant.errors import WindquantError
from windquant.quantizers import Treatment, actions
from windquant.quantizers.scalar import Scalar
from windquant.quantizers.skip import Skip
from windquant.quantizers.trellis import Trellis


class Kind(NamedTuple):
    """What the kernels have to know about an action."""

    even: int  # bits at even and at odd rows; 0 stands for ternary codes
    odd: int
    trellis: bool
    scale: bool
    offset: bool
    middle: float  # the code that stands for 0

    @classmethod
    def of(cls, entry: Treatment) -> "Kind":
        if not isinstance(entry, Skip | Scalar | Trellis):
            raise WindquantError(f'{entry.name}: the kernels cannot decode it; load with device_map="cpu"')
        even, odd = (16, 16) if isinstance(entry, Skip) else entry.pattern
        middle = entry.middle if isinstance(entry, Scalar) else 0.0
        return cls(even, odd, isinstance(entry, Trellis), entry.has_scale, entry.has_offset, middle)


GROUP = tl.constexpr(16)
#: Of the actions by number (docs/format.md), and of the protected columns behind them. Triton keeps compiled kernels
#: under a hash that these values are part of: with other actions it compiles anew.
KINDS = tl.constexpr((*map(Kind.of, actions().values()), Kind(8, 8, False, False, False, 128.0)))
ACTIONS = tl.constexpr(len(KINDS.value))
PROTECTED = tl.constexpr(len(KINDS.value) - 1)
MANTISSA_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0


@triton.constexpr_function
def unsigned(size):
    """The type of numbers of so many bytes."""
    return {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}[size]


@triton.jit
def load_bytes(base, left, columns, COUNT: tl.constexpr, ALIGN: tl.constexpr):
    """COUNT (at most 8) bytes from every address on as a little-endian number, uint64; 0 from `left` bytes on."""
    STEP: tl.constexpr = min(ALIGN, COUNT & -COUNT)
    pointers = base.to(tl.pointer_type(unsigned(STEP)), bitcast=True)
    result = tl.load(pointers, mask=columns & (left > 0), other=0).to(tl.uint64)
    for place in tl.static_range(1, COUNT // STEP):
        piece = tl.load(pointers + place, mask=columns & (left > place * STEP), other=0)
        result |= piece.to(tl.uint64) << (8 * STEP * place)
    return result


@triton.constexpr_function
def even_bits(ACTION):
    """Bits of the code at an even row; of every code where all are alike."""
    return KINDS.value[ACTION].even


@triton.constexpr_function
def pair_bits(ACTION):
    """Bits that two rows take together; a group has as many bytes, since it is eight pairs."""
    return KINDS.value[ACTION].even + KINDS.value[ACTION].odd


@triton.jit
def stride_of(rows, ACTION: tl.constexpr):
    """Bytes of one column of `rows` codes (`storage.stream_bytes`)."""
    if is_ternary(ACTION):
        return (rows + 4) // 5
    else:
        EVEN: tl.constexpr = even_bits(ACTION)
        return ((rows + 1) // 2 * EVEN + rows // 2 * (pair_bits(ACTION) - EVEN) + 7) // 8


@triton.jit
def ends(slot, ACTION: tl.constexpr):
    """The bit of a group behind the code of every row of it."""
    EVEN: tl.constexpr = even_bits(ACTION)
    PAIR: tl.constexpr = pair_bits(ACTION)
    return slot // 2 * PAIR + EVEN + (slot & 1) * (PAIR - EVEN)


@triton.jit
def begun(group, tile, ACTION: tl.constexpr, WINDOW: tl.constexpr):
    """Bits of the stream, begun at a multiple of `tile` rows, up to every row: int32 [16, groups], at most WINDOW."""
    row = group[None, :] * GROUP + tl.arange(0, GROUP)[:, None]
    return tl.minimum(ends(row % tile, ACTION), WINDOW)  # tiles are even: a row has the parity of its place


@triton.jit
def seam(group, rows, tile, ACTION: tl.constexpr, WINDOW: tl.constexpr):
    """The bit of a column at which the stream ends that begins in a group, or less than WINDOW bits before it.

    int32 [groups]; 0 where there is none, or where it is no ring: it has an odd number of rows, or fewer bits.
    """
    PAIR: tl.constexpr = pair_bits(ACTION)
    since = tl.minimum(group * GROUP + GROUP - 1, rows - 1) // tile * tile
    until = tl.minimum(since + tile, rows)
    length = until - since
    near = ends(tl.maximum(group * GROUP - since, 0), ACTION) < WINDOW
    ring = (length % 2 == 0) & (length // 2 * PAIR >= WINDOW)
    return tl.where(near & ring, until // 2 * PAIR, 0)


@triton.jit
def byte_of(low, high, slot):
    """Byte `slot` of the 16 in two uint64, int32."""
    return ((tl.where(slot < 8, low, high) >> (8 * (slot % 8)).to(tl.uint64)) & 255).to(tl.int32)


@triton.jit
def in_mantissa(code, one, BITS: tl.constexpr):
    """Codes of BITS bits as 1 + code / 2^BITS, exactly. one: the bits of 1.0, int32.

    Where it counts, `one` is an argument of the kernel: with a constant, `and` and `or` would not fit one instruction.
    """
    return ((code << (23 - BITS)) | one).to(tl.float32, bitcast=True)


@triton.jit
def factors(slot, ACTION: tl.constexpr):
    """What `levels` has divided the codes of every row of a group by, float32 [16]."""
    if is_ternary(ACTION):
        return tl.full(slot.shape, 4.0, tl.float32)
    elif not has_one(ACTION):
        return tl.full(slot.shape, 1.0, tl.float32)
    elif even_bits(ACTION) == 8:
        return tl.full(slot.shape, 256.0, tl.float32)
    elif straddles(ACTION):
        return tl.full(slot.shape, 1 << even_bits(ACTION), tl.float32)
    else:
        BITS: tl.constexpr = even_bits(ACTION)
        exponent = 8 - (BITS * slot) % 8  # 23 - the lowest bit of the code in the mantissa
        return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.constexpr_function
def is_trellis(ACTION):
    """Whether the action is a trellis, and so rotated and without an offset."""
    return KINDS.value[ACTION].trellis


@triton.constexpr_function
def is_ternary(ACTION):
    """Whether five codes share a byte."""
    return KINDS.value[ACTION].even == 0


@triton.constexpr_function
def straddles(ACTION):
    """Whether scalar codes begin in one byte and end in the next: those of 3 bits."""
    return 8 % KINDS.value[ACTION].even != 0


@triton.constexpr_function
def has_scale(ACTION):
    """Whether every row of a chunk has a scale."""
    return KINDS.value[ACTION].scale


@triton.constexpr_function
def has_offset(ACTION):
    """Whether every row of a chunk has an offset."""
    return KINDS.value[ACTION].offset


@triton.constexpr_function
def has_one(ACTION):
    """Whether the floats of `levels` carry a 1 along."""
    return not KINDS.value[ACTION].trellis and KINDS.value[ACTION].even < 16


@triton.constexpr_function
def middle(ACTION):
    """The code that stands for 0."""
    return KINDS.value[ACTION].middle


@triton.jit
def levels(
    base, columns, group, stride, bits, close, table, one,
    ACTION: tl.constexpr, ALIGN: tl.constexpr, WINDOW: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """The rows of every group, float32 [16, columns, groups]: the code divided by `factors`, plus 1 where `has_one`.

    base: uint8 pointers [columns] at the beginning of a column; columns: which of them count, bool (others read as 0);
    group: int [groups]; stride: bytes of a column; bits: `begun` [16, groups]; close: `seam` [groups]; table: float32
    [2^WINDOW]; STORED: dtype of skipped weights.
    """
    slot = tl.arange(0, GROUP)[:, None, None]
    keep = columns[:, None] & (group[None, :] >= 0)
    if is_ternary(ACTION):
        row = group[None, :] * GROUP + tl.arange(0, GROUP)[:, None]
        inside = columns[None, :, None] & (row // 5 < stride)[:, None, :]
        byte = tl.load(base[None, :, None] + (row // 5)[:, None, :], mask=inside, other=0).to(tl.int32)
        place = row % 5
        # The digit is the first one behind the point of byte / 3^(place + 1) in base 3.
        inverse = tl.where(  # 2^16 / 3^(place + 1), rounded up
            place == 0, 21846, tl.where(place == 1, 7282, tl.where(place == 2, 2428, tl.where(place == 3, 810, 270)))
        )
        fraction = (byte * inverse[:, None, :]) & 0xFFFF
        return in_mantissa((fraction * 3) >> 16, one, 2)
    elif even_bits(ACTION) == 16:  # skipped weights
        start = 32 * group[None, :]
        address = base[:, None] + start
        first = load_bytes(address, stride - start, keep, 8, ALIGN)[None]
        second = load_bytes(address + 8, stride - start - 8, keep, 8, ALIGN)[None]
        third = load_bytes(address + 16, stride - start - 16, keep, 8, ALIGN)[None]
        fourth = load_bytes(address + 24, stride - start - 24, keep, 8, ALIGN)[None]
        word = tl.where(slot < 4, first, tl.where(slot < 8, second, tl.where(slot < 12, third, fourth)))
        bits = (word >> (16 * (slot % 4)).to(tl.uint64)).to(tl.uint16)
        return bits.to(STORED, bitcast=True).to(tl.float32)
    elif even_bits(ACTION) == 8:
        start = 16 * group[None, :]
        address = base[:, None] + start
        low = load_bytes(address, stride - start, keep, 8, ALIGN)[None]
        high = load_bytes(address + 8, stride - start - 8, keep, 8, ALIGN)[None]
        code = byte_of(low, high, slot)
        return in_mantissa(code ^ 128 if ACTION == PROTECTED else code, one, 8)
    else:
        PAIR: tl.constexpr = pair_bits(ACTION)
        start = PAIR * group[None, :]  # 8 pairs of rows: as many bytes as a pair has bits
        address = base[:, None] + start
        stream = load_bytes(address, stride - start, keep, PAIR, ALIGN)[None]
        if is_trellis(ACTION):  # a state is the last WINDOW bits of the stream
            even: tl.constexpr = ALIGN if PAIR % 2 == 0 else 1  # a group of 3, 5 or 7 bytes may begin anywhere
            earlier = load_bytes(address - 2, stride - start + 2, keep & (group[None, :] > 0), 2, even)[None]
            end = ends(slot, ACTION)
            recent = (stream << 16) | earlier
            near = recent >> (end + 14 - WINDOW).to(tl.uint64)  # four times the state: its address in the table
            far = stream >> tl.maximum(end - 2 - WINDOW, 0).to(tl.uint64)
            own = (((1 << WINDOW) - (1 << (WINDOW - bits))) * 4).to(tl.uint32)
            place = tl.where(end <= 48, near, far).to(tl.uint32) & own[:, None, :]
            start = (close - WINDOW)[None, :]  # before a stream's beginning come the bits of its end
            final = load_bytes(base[:, None] + start // 8, stride - start // 8, columns[:, None] & (start >= 0), 3, 1)
            final = (final >> (start % 8).to(tl.uint64)).to(tl.uint32) & ((1 << WINDOW) - 1)
            place |= (final[None] >> bits[:, None, :].to(tl.uint32)) << 2
            bytewise = table.to(tl.pointer_type(tl.uint8), bitcast=True) + place
            return tl.load(bytewise.to(tl.pointer_type(tl.float32), bitcast=True))
        elif straddles(ACTION):
            SIZE: tl.constexpr = even_bits(ACTION)
            return in_mantissa((stream >> (SIZE * slot).to(tl.uint64)).to(tl.int32) & ((1 << SIZE) - 1), one, SIZE)
        else:
            # Eight bits at a time go to the top of the mantissa; each code is left where it lies among them.
            BITS: tl.constexpr = even_bits(ACTION)
            byte = BITS * slot // 8
            half = tl.where(byte < 4, stream, stream >> 32).to(tl.int32)
            place = 8 * (byte % 4)
            eight = tl.where(place < 15, half << tl.maximum(15 - place, 0), half >> tl.maximum(place - 15, 0))
            mask = ((1 << BITS) - 1) << (15 + BITS * slot % 8)
            return ((eight & mask) | one).to(tl.float32, bitcast=True)


@triton.jit
def row_logs(row_scales, grid, group, rows, ALIGN: tl.constexpr):
    """base + row / 16 of the scales' logarithms, float32 [16, groups]."""
    slot = tl.arange(0, GROUP)[:, None]
    start = 16 * group
    keep = start < rows
    low = load_bytes(row_scales + start, rows - start, keep, 8, ALIGN)[None]
    high = load_bytes(row_scales + start + 8, rows - start - 8, keep, 8, ALIGN)[None]
    return tl.load(grid).to(tl.float32) + byte_of(low, high, slot).to(tl.float32) / 16


@triton.jit
def chunk_scale(scales, share, grid, logs, group, rows, ALIGN: tl.constexpr):
    """Scale of every row for one chunk, float32 [16, groups]. scales: pointer to its 4-bit codes; share: its share."""
    slot = tl.arange(0, GROUP)[:, None]
    start = 8 * group
    size = (rows + 1) // 2
    packed = load_bytes(scales + start, size - start, start < size, 8, ALIGN)[None]
    code = (packed >> (4 * slot).to(tl.uint64)).to(tl.int32) & 15
    step = tl.load(grid + 1).to(tl.float32)
    return tl.exp2(logs + share + step * (in_mantissa(code, MANTISSA_ONE, 4) * 16 - 23.5))


@triton.jit
def chunk_offset(offsets, group, rows, ACTION: tl.constexpr, ALIGN: tl.constexpr):
    """Offset of every row for one chunk in units of its scale, float32 [16, groups]."""
    slot = tl.arange(0, GROUP)[:, None]
    start = 16 * group
    low = load_bytes(offsets + start, rows - start, start < rows, 8, ALIGN)[None]
    high = load_bytes(offsets + start + 8, rows - start - 8, start < rows, 8, ALIGN)[None]
    signed = in_mantissa(byte_of(low, high, slot) ^ 128, MANTISSA_ONE, 8) * 256 - 384
    return signed * ((1 << even_bits(ACTION)) / 256.0)
