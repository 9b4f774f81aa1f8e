// The table that the host writes for a launch: segments, then the addresses of their contributions.
//
// Invariant: field for field `Segment` of src/optim/gpu/table.rs, 128 bytes.
#pragma once

#include "device.h"

// Threads of a block, and elements of a tile: what a block takes at a time.
const u32 THREADS = 256;
const u32 TILE = THREADS * WIDTH;

// A run of elements that share their constants. Addresses are those of the run's own first element; each is a multiple of the
// element's size and of nothing more.
struct alignas(16) Segment {
    u64 contributions;  // where the addresses of the contributions are, in bytes from the table's start
    u64 sums;
    u64 master, first, second;  // of a norm, `first` is where its tiles' sums are, one f64 each
    u64 wire;
    u64 result;
    u32 elements;
    u32 first_tile;  // tiles of all segments before this one
    u32 count;       // contributions
    u32 wire_format;
    float mean, scale, clip;
    float rate, decay, momentum;
    float shrink, beta1, alpha1, beta2, alpha2, step_size, root_scale, epsilon;
};
static_assert(sizeof(Segment) == 128, "the host's table has segments of 128 bytes");

enum WireFormat : u32 { WIRE_NONE = 0, WIRE_F32 = 1, WIRE_BF16 = 2, WIRE_F16 = 3 };

DEVICE Segment load_segment(u64 address) {
    struct Words {
        u32x4 of[sizeof(Segment) / 16];
    } words;
    for (u32 i = 0; i < sizeof(Segment) / 16; i++) words.of[i] = load<u32x4>(address + i * 16);
    return __builtin_bit_cast(Segment, words);
}

// The segment to which a tile belongs: the last one that begins at or before it.
DEVICE u32 find_segment(u64 table, u32 segments, u32 tile) {
    u32 low = 0, high = segments;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        u32 first_tile = load<u32>(table + middle * (u64)sizeof(Segment) + __builtin_offsetof(Segment, first_tile));
        if (first_tile <= tile) low = middle;
        else high = middle;
    }
    return low;
}

// Calls `work(segment, at, width)` for every element of every segment: WIDTH at a time where all of the segment's arrays are
// aligned after the same number of elements, one at a time in the head, the tail, and where they are not.
template <class Work> DEVICE void for_each_element(u64 table, u32 segments, u32 tiles) {
    for (u32 tile = block_index(); tile < tiles; tile += block_count()) {
        u32 index = find_segment(table, segments, tile);
        Segment segment = load_segment(table + index * (u64)sizeof(Segment));
        u32 own = tile - segment.first_tile;

        // Elements before the first whose address in the leading array is a multiple of 32 bytes; all arrays of a chunk that
        // starts on such a boundary are then aligned.
        u32 head = (u32)(0 - (Work::leading(segment) >> 2)) % WIDTH;
        head = head < segment.elements ? head : segment.elements;
        bool aligned = (Work::alignment(table, segment, head) & 15) == 0;
        u32 middle = aligned ? (segment.elements - head) / WIDTH * WIDTH : 0;

        u64 at = (u64)own * TILE + thread_index() * WIDTH;
        if (at < middle) Work::template run<WIDTH>(table, segment, head + at);

        // The elements one by one: at most 14 where the middle is not empty, else a tile of them.
        u32 single = own * TILE + thread_index(), end = (own + 1) * TILE;
        u32 left = segment.elements - middle;
        for (end = end < left ? end : left; single < end; single += THREADS)
            Work::template run<1>(table, segment, single < head ? single : single + middle);
    }
}
