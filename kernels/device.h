// What the kernels need of a GPU, without a CUDA toolkit: attributes, exactly rounded arithmetic, memory accesses and number
// formats.
//
// Invariant: every operation on floating-point numbers rounds to nearest even, once, and flushes nothing to zero. There is no
// plain + or * on them: the compiler and the driver would be free to contract those.
#pragma once

#define DEVICE static inline __attribute__((device, always_inline))
#define METHOD static inline __attribute__((device, always_inline))
#define KERNEL extern "C" __attribute__((global)) void
#define GLOBAL __attribute__((address_space(1)))

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u32 u32x4 __attribute__((ext_vector_type(4)));

DEVICE u32 thread_index() { return __nvvm_read_ptx_sreg_tid_x(); }
DEVICE u32 block_index() { return __nvvm_read_ptx_sreg_ctaid_x(); }
DEVICE u32 block_count() { return __nvvm_read_ptx_sreg_nctaid_x(); }
DEVICE u32 shuffle_down(u32 value, u32 distance) {
    return (u32)__nvvm_shfl_sync_down_i32(0xFFFFFFFF, (int)value, (int)distance, 31);
}

DEVICE float add(float a, float b) { return __nvvm_add_rn_f(a, b); }
DEVICE float mul(float a, float b) { return __nvvm_mul_rn_f(a, b); }
DEVICE float sub(float a, float b) { return __nvvm_add_rn_f(a, -b); }
DEVICE float div(float a, float b) { return __nvvm_div_rn_f(a, b); }
DEVICE float root(float a) { return __nvvm_sqrt_rn_f(a); }
DEVICE double add(double a, double b) { return __nvvm_add_rn_d(a, b); }
DEVICE double mul(double a, double b) { return __nvvm_mul_rn_d(a, b); }

DEVICE u32 bits_of(float value) { return __builtin_bit_cast(u32, value); }
DEVICE float float_of(u32 bits) { return __builtin_bit_cast(float, bits); }

// Addresses are plain numbers: they come from a table that the host wrote.
template <class T> DEVICE T load(u64 address) { return *(const T GLOBAL *)address; }
template <class T> DEVICE void store(u64 address, T value) { *(T GLOBAL *)address = value; }

// Elements that a thread takes at once where everything is aligned: one 16-byte access for a 16-bit format, two for f32.
const u32 WIDTH = 8;

// A number format: how one element, or WIDTH elements at a multiple of 16 bytes, become f32 and back.
struct F32 {
    static const u32 SIZE = 4;

    METHOD void read(u64 address, float (&out)[1]) { out[0] = load<float>(address); }
    METHOD void write(u64 address, const float (&in)[1]) { store<float>(address, in[0]); }

    METHOD void read(u64 address, float (&out)[WIDTH]) {
        u32x4 low = load<u32x4>(address), high = load<u32x4>(address + 16);
        for (u32 i = 0; i < 4; i++) {
            out[i] = float_of(low[i]);
            out[i + 4] = float_of(high[i]);
        }
    }

    METHOD void write(u64 address, const float (&in)[WIDTH]) {
        u32x4 low, high;
        for (u32 i = 0; i < 4; i++) {
            low[i] = bits_of(in[i]);
            high[i] = bits_of(in[i + 4]);
        }
        store<u32x4>(address, low);
        store<u32x4>(address + 16, high);
    }
};

// The 16-bit formats differ in the conversion of one element only.
template <class Format> struct Half {
    static const u32 SIZE = 2;

    METHOD void read(u64 address, float (&out)[1]) { out[0] = Format::decode(load<u16>(address)); }
    METHOD void write(u64 address, const float (&in)[1]) { store<u16>(address, (u16)Format::encode(in[0])); }

    METHOD void read(u64 address, float (&out)[WIDTH]) {
        u32x4 pairs = load<u32x4>(address);
        for (u32 i = 0; i < 4; i++) {
            out[2 * i] = Format::decode(pairs[i] & 0xFFFF);
            out[2 * i + 1] = Format::decode(pairs[i] >> 16);
        }
    }

    METHOD void write(u64 address, const float (&in)[WIDTH]) {
        u32x4 pairs;
        for (u32 i = 0; i < 4; i++) pairs[i] = Format::encode(in[2 * i]) | Format::encode(in[2 * i + 1]) << 16;
        store<u32x4>(address, pairs);
    }
};

// The upper half of an f32. Cards before compute capability 8 have no conversion for it.
struct Bf16 : Half<Bf16> {
    METHOD float decode(u32 bits) { return float_of(bits << 16); }

    // Adding 0x7FFF plus the last kept bit carries into the kept half exactly when rounding to nearest even goes up.
    METHOD u32 encode(float value) {
        u32 bits = bits_of(value);
        u32 rounded = bits + 0x7FFF + ((bits >> 16) & 1);
        return ((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : rounded) >> 16;
    }
};

struct F16 : Half<F16> {
    METHOD float decode(u32 bits) { return (float)__builtin_bit_cast(_Float16, (u16)bits); }
    METHOD u32 encode(float value) { return __builtin_bit_cast(u16, (_Float16)value); }
};
