// The optimizer on a GPU: the fused step, its two halves, the wire copy alone, the squared norm and the count of non-finite
// values. Every kernel takes a table of segments, so that one launch does a chunk or a batch of chunks.
//
// Invariant: bit for bit what src/optim/oracle.rs and src/optim/norm.rs give, whatever the grid; that an element is NaN is
// defined, its payload is not.

#include "rules.h"

// The sum of the contributions in rank order; 0 if there are none.
template <class Gradient, u32 N> DEVICE void sum(u64 table, const Segment &segment, u64 at, float (&g)[N]) {
    u64 addresses = table + segment.contributions;
    for (u32 i = 0; i < N; i++) g[i] = 0;
    if (segment.count == 0) return;
    Gradient::read(load<u64>(addresses) + at * Gradient::SIZE, g);
#pragma unroll 4
    for (u32 c = 1; c < segment.count; c++) {
        float next[N];
        Gradient::read(load<u64>(addresses + c * 8ull) + at * Gradient::SIZE, next);
        for (u32 i = 0; i < N; i++) g[i] = add(g[i], next[i]);
    }
}

// All low bits of the contributions' addresses `head` elements on.
template <class Gradient> DEVICE u64 contributions_alignment(u64 table, const Segment &segment, u32 head) {
    u64 bits = 0;
    for (u32 c = 0; c < segment.count; c++)
        bits |= load<u64>(table + segment.contributions + c * 8ull) + head * Gradient::SIZE;
    return bits;
}

DEVICE u64 wire_alignment(const Segment &segment, u32 head) {
    if (segment.wire_format == WIRE_NONE) return 0;
    return segment.wire + head * (segment.wire_format == WIRE_F32 ? 4 : 2);
}

template <u32 N> DEVICE void write_wire(const Segment &segment, u64 at, const float (&p)[N]) {
    if (segment.wire_format == WIRE_F32) F32::write(segment.wire + at * 4, p);
    else if (segment.wire_format == WIRE_BF16) Bf16::write(segment.wire + at * 2, p);
    else if (segment.wire_format == WIRE_F16) F16::write(segment.wire + at * 2, p);
}

// Mean, scale, clip per value (two comparisons that are false for NaN) and coupled weight decay. A factor of 1 and a limit of
// infinity change nothing; a decay of 0 would (-0 + 0 is 0), so it is left out.
DEVICE float prepare(const Segment &segment, float g, float p) {
    g = mul(mul(g, segment.mean), segment.scale);
    float below = g > segment.clip ? segment.clip : g;
    g = below < -segment.clip ? -segment.clip : below;
    return segment.decay == 0 ? g : add(g, mul(segment.decay, p));
}

// From contributions to new parameters and their wire copy. With the accumulator as its one contribution it is the second half
// of a step in two.
template <class Rule, class Gradient> struct Update {
    METHOD u64 leading(const Segment &segment) { return segment.master; }

    METHOD u64 alignment(u64 table, const Segment &segment, u32 head) {
        u64 bits = segment.master + head * 4;
        if (Rule::SLOTS > 0) bits |= segment.first + head * 4;
        if (Rule::SLOTS > 1) bits |= segment.second + head * 4;
        return bits | wire_alignment(segment, head) | contributions_alignment<Gradient>(table, segment, head);
    }

    template <u32 N> METHOD void run(u64 table, const Segment &segment, u64 at) {
        float g[N], p[N], a[N], b[N];
        F32::read(segment.master + at * 4, p);
        if (Rule::SLOTS > 0) F32::read(segment.first + at * 4, a);
        if (Rule::SLOTS > 1) F32::read(segment.second + at * 4, b);
        sum<Gradient>(table, segment, at, g);
        for (u32 i = 0; i < N; i++) Rule::update(segment, prepare(segment, g[i], p[i]), p[i], a[i], b[i]);
        F32::write(segment.master + at * 4, p);
        if (Rule::SLOTS > 0) F32::write(segment.first + at * 4, a);
        if (Rule::SLOTS > 1) F32::write(segment.second + at * 4, b);
        write_wire(segment, at, p);
    }
};

// From contributions to the accumulator.
template <class Gradient> struct Reduce {
    METHOD u64 leading(const Segment &segment) { return segment.sums; }

    METHOD u64 alignment(u64 table, const Segment &segment, u32 head) {
        return (segment.sums + head * 4) | contributions_alignment<Gradient>(table, segment, head);
    }

    template <u32 N> METHOD void run(u64 table, const Segment &segment, u64 at) {
        float g[N];
        sum<Gradient>(table, segment, at, g);
        F32::write(segment.sums + at * 4, g);
    }
};

// The wire copy of parameters that have not changed.
struct Encode {
    METHOD u64 leading(const Segment &segment) { return segment.master; }

    METHOD u64 alignment(u64, const Segment &segment, u32 head) {
        return (segment.master + head * 4) | wire_alignment(segment, head);
    }

    template <u32 N> METHOD void run(u64, const Segment &segment, u64 at) {
        float p[N];
        F32::read(segment.master + at * 4, p);
        write_wire(segment, at, p);
    }
};

#define PARAMETERS u64 table, u32 segments, u32 tiles
// Blocks that are to fit on a multiprocessor at once, which bounds the registers of a thread: as many as measured best on an
// H100.
#define BOUNDS_AT(blocks) __attribute__((launch_bounds(THREADS, blocks)))
#define BOUNDS BOUNDS_AT(4)
#define UPDATE(rule, Rule, format, Format)                                                                                    \
    KERNEL BOUNDS_AT(Rule::BLOCKS<Format>) gradwire_##rule##_##format(PARAMETERS) {                                           \
        for_each_element<Update<Rule, Format>>(table, segments, tiles);                                                       \
    }
#define FOR_EACH_RULE(format, Format)                                                                                         \
    UPDATE(sgd, Sgd, format, Format)                                                                                          \
    UPDATE(momentum, Momentum, format, Format)                                                                                \
    UPDATE(nesterov, Nesterov, format, Format)                                                                                \
    UPDATE(adam, Adam, format, Format)                                                                                        \
    UPDATE(adagrad, Adagrad, format, Format)                                                                                  \
    KERNEL BOUNDS gradwire_reduce_##format(PARAMETERS) { for_each_element<Reduce<Format>>(table, segments, tiles); }

FOR_EACH_RULE(f32, F32)
FOR_EACH_RULE(bf16, Bf16)
FOR_EACH_RULE(f16, F16)

KERNEL BOUNDS gradwire_encode(PARAMETERS) { for_each_element<Encode>(table, segments, tiles); }

// Adds the number of infinities and NaN in each accumulator to the u64 at its `result`.
KERNEL BOUNDS gradwire_count_nonfinite(PARAMETERS) {
    for (u32 tile = block_index(); tile < tiles; tile += block_count()) {
        u64 place = table + find_segment(table, segments, tile) * (u64)sizeof(Segment);
        u64 sums = load<u64>(place + __builtin_offsetof(Segment, sums));
        u32 own = tile - load<u32>(place + __builtin_offsetof(Segment, first_tile));
        u32 elements = load<u32>(place + __builtin_offsetof(Segment, elements));
        u32 count = 0;
        for (u32 i = 0; i < WIDTH; i++) {
            u64 at = (u64)own * TILE + i * THREADS + thread_index();
            if (at < elements) count += (load<u32>(sums + at * 4) & 0x7F800000) == 0x7F800000;
        }
        for (u32 distance = 16; distance > 0; distance /= 2) count += shuffle_down(count, distance);
        if (thread_index() % 32 == 0 && count > 0) {
            u64 result = load<u64>(place + __builtin_offsetof(Segment, result));
            __nvvm_atom_add_gen_ll((long long *)result, count);
        }
    }
}

// The order of src/optim/norm.rs, a warp's threads being its lanes: the upper half of the lanes onto the lower, until there is
// one.
DEVICE double fold(double lane) {
    for (u32 width = 16; width > 0; width /= 2) {
        u64 bits = __builtin_bit_cast(u64, lane);
        u64 low = shuffle_down((u32)bits, width), high = shuffle_down((u32)(bits >> 32), width);
        lane = add(lane, __builtin_bit_cast(double, high << 32 | low));
    }
    return lane;
}

// Writes the sum of the squares of each tile of an accumulator, as f64, to the tile's place at `first`. A warp takes a tile.
KERNEL BOUNDS gradwire_norm(PARAMETERS) {
    u32 thread = thread_index() % 32, warps = THREADS / 32;
    for (u32 tile = block_index() * warps + thread_index() / 32; tile < tiles; tile += block_count() * warps) {
        u64 place = table + find_segment(table, segments, tile) * (u64)sizeof(Segment);
        u64 sums = load<u64>(place + __builtin_offsetof(Segment, sums));
        u32 own = tile - load<u32>(place + __builtin_offsetof(Segment, first_tile));
        u32 elements = load<u32>(place + __builtin_offsetof(Segment, elements));
        double lane = 0;
#pragma unroll 16
        for (u32 i = 0; i < TILE / 32; i++) {
            u64 at = (u64)own * TILE + i * 32 + thread;
            // A zero added to a sum of squares changes no bit of it.
            double value = at < elements ? load<float>(sums + at * 4) : 0;
            lane = add(lane, mul(value, value));
        }
        lane = fold(lane);
        if (thread == 0) store<double>(load<u64>(place + __builtin_offsetof(Segment, first)) + own * 8ull, lane);
    }
}

// Writes the sum of each segment's partial sums to its `result`. The first warp of a block takes a segment.
KERNEL BOUNDS gradwire_fold(PARAMETERS) {
    (void)tiles;
    if (thread_index() >= 32) return;
    for (u32 index = block_index(); index < segments; index += block_count()) {
        u64 place = table + index * (u64)sizeof(Segment);
        u64 partials = load<u64>(place + __builtin_offsetof(Segment, first));
        u32 own = (load<u32>(place + __builtin_offsetof(Segment, elements)) + TILE - 1) / TILE;
        double lane = 0;
        for (u32 tile = thread_index(); tile < own; tile += 32) lane = add(lane, load<double>(partials + tile * 8ull));
        lane = fold(lane);
        if (thread_index() == 0) store<double>(load<u64>(place + __builtin_offsetof(Segment, result)), lane);
    }
}
