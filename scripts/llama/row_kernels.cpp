// Products of quantized weights with many rows at once, for x86 CPUs with AVX-512 VNNI: Q8_0, Q4_0, Q4_K, Q5_K, Q6_K.
//
// Compiled into upstream's CPU library as one more of its buffer types for weights, beside its own sources, which stay
// untouched. A program that does not call smelt_use_row_kernels gets upstream's kernels and nothing else.
//
// Sixteen outputs make a group: a 512-bit register holds four successive weights of each, as bytes without sign, and
// one instruction multiplies them with four values of an activation row and adds (vpdpbusd). The row's values come from
// memory, spread over the register as they are read, so that weights unpacked once serve up to twelve rows. What the
// shift to unsigned weights adds to a sum is known from the row alone, and the sum begins with its negative.
//
// Rows are rounded as upstream rounds them for the same weights, and sums within a block are exact, so that results
// differ from upstream's by the order of additions alone.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "simd-mappings.h"
#include "traits.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

extern "C" __attribute__((visibility("default"))) bool smelt_use_row_kernels(bool is_wanted);

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace {

constexpr int OUTPUTS = 16;             // a group: 32-bit lanes of a register
constexpr int ROWS_MAX = 12;            // of a tile: two sums each, and room for the rest in 32 registers
constexpr int VECTOR = 64;              // bytes of a register
constexpr int64_t CHUNK_BYTES = 256 * 1024; // of weights that stay in the second-level cache while tiles pass over them

inline __m512i load(const uint8_t * from) { return _mm512_loadu_si512(from); }
inline __m512 halves(const uint8_t * from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) from)); }

inline __m512 unsigned_bytes(const uint8_t * from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) from)));
}

inline __m512 signed_bytes(const uint8_t * from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) from)));
}

// Every 16 bits moved by LEFT to the left, or to the right where it is negative.
template <int LEFT> inline __m512i moved(__m512i bits) {
    if constexpr (LEFT > 0) {
        return _mm512_slli_epi16(bits, LEFT);
    } else if constexpr (LEFT < 0) {
        return _mm512_srli_epi16(bits, -LEFT);
    }
    return bits;
}

// `low` where MASK has a one, else `high`.
template <int MASK> inline __m512i joined(__m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(MASK), low, high, 0xca);
}

inline void round_values(const float * values, block_q8_0 & to) {
    ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float(values, &to, QK8_0);
}

// As upstream's reference for Q8_K, which has no vectors: the value furthest from zero becomes -127.
inline void round_values(const float * values, block_q8_K & to) {
    __m512 furthest = _mm512_setzero_ps();
    for (int i = 0; i < QK_K; i += 16) {
        furthest = _mm512_max_ps(furthest, _mm512_abs_ps(_mm512_loadu_ps(values + i)));
    }
    const float distance = _mm512_reduce_max_ps(furthest);
    if (distance == 0) {
        memset(&to, 0, sizeof(to));
        return;
    }
    float extreme = 0;
    for (int i = 0; i < QK_K && extreme == 0; i += 16) {
        const __m512 some = _mm512_loadu_ps(values + i);
        const unsigned found = _mm512_cmpeq_ps_mask(_mm512_abs_ps(some), _mm512_set1_ps(distance));
        extreme = found ? values[i + __builtin_ctz(found)] : 0;
    }
    const float scale = -127.0f / extreme;
    for (int i = 0; i < QK_K; i += 16) {
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(scale)));
        rounded = _mm512_min_epi32(rounded, _mm512_set1_epi32(127));
        _mm_storeu_si128((__m128i *) (to.qs + i), _mm512_cvtepi32_epi8(rounded));
        to.bsums[i / 16] = (int16_t) _mm512_reduce_add_epi32(rounded);
    }
    to.d = 1 / scale;
}

// A tile's rows, one block of values: words of four rounded values, row beside row, then each row's factor, then what a
// format wants of the sums of its values. All entries have four bytes.
template <class Format> constexpr int RECORD = Format::VALUES / 4 + 1 + Format::SUMS;

template <int ROWS> inline void multiply(__m512i (&sums)[ROWS], __m512i weights, const int32_t * words) {
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        // As _mm512_dpbusd_epi32 with _mm512_set1_epi32, which GCC does not join into one instruction.
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums[row]) : "v"(weights), "m"(words[row]));
    }
}

// Layout of 16 outputs in each format: all blocks' codes first, then all blocks' scales.

// Q8_0 and Q4_0: one scale for 32 values, which are stored with a shift, or are shifted here, to be without sign.
template <class Block_> struct WithShift {
    using Block = Block_;
    using Rounded = block_q8_0;
    static constexpr bool IS_NIBBLES = sizeof(Block) == sizeof(block_q4_0);
    static constexpr int VALUES = 32, SUMS = 1, SHIFT = IS_NIBBLES ? 8 : 128;
    static constexpr int CODES = (IS_NIBBLES ? 16 : 32) * OUTPUTS, SCALES = 2 * OUTPUTS;

    static void pack(const Block & block, int output, uint8_t * codes, uint8_t * scales) {
        for (int word = 0; word < CODES / VECTOR; word++) {
            uint32_t four;
            memcpy(&four, block.qs + word * 4, 4);
            four ^= IS_NIBBLES ? 0 : 0x80808080;
            memcpy(codes + word * VECTOR + output * 4, &four, 4);
        }
        memcpy(scales + 2 * output, &block.d, 2);
    }

    static void sums(const Rounded & rounded, int, int32_t * to) {
        int sum = 0;
        for (int i = 0; i < 32; i++) {
            sum += rounded.qs[i];
        }
        to[0] = -SHIFT * sum;
    }

    static float factor(const Rounded & rounded) { return GGML_CPU_FP16_TO_FP32(rounded.d); }

    template <int ROWS>
    static inline void add(__m512 (&totals)[ROWS], const uint8_t * codes, const uint8_t * scales,
                           const int32_t * record) {
        const float * factors = (const float *) (record + 8 * ROWS);
        const int32_t * starts = record + 9 * ROWS;
        __m512i sums[ROWS];
        for (int row = 0; row < ROWS; row++) {
            sums[row] = _mm512_set1_epi32(starts[row]);
        }
        add_steps(sums, codes, record, std::make_integer_sequence<int, 8>());
        const __m512 scale = halves(scales);
        for (int row = 0; row < ROWS; row++) {
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(factors[row]));
            totals[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row]), both, totals[row]);
        }
    }

    template <int ROWS, int... STEPS>
    static inline void add_steps(__m512i (&sums)[ROWS], const uint8_t * codes, const int32_t * record,
                                 std::integer_sequence<int, STEPS...>) {
        (multiply<ROWS>(sums, weights<STEPS>(codes), record + STEPS * ROWS), ...);
    }

    // Four values of each output; of nibbles the low ones are the block's first half.
    template <int STEP> static inline __m512i weights(const uint8_t * codes) {
        if constexpr (IS_NIBBLES) {
            return _mm512_and_si512(moved<-4 * (STEP / 4)>(load(codes + STEP % 4 * VECTOR)), _mm512_set1_epi8(15));
        }
        return load(codes + STEP * VECTOR);
    }
};

// Scales and minima of Q4_K and Q5_K: eight of six bits each in twelve bytes.
inline void six_bits(const uint8_t * packed, int index, uint8_t & scale, uint8_t & minimum) {
    if (index < 4) {
        scale = packed[index] & 63;
        minimum = packed[index + 4] & 63;
    } else {
        scale = (packed[index + 4] & 15) | (packed[index - 4] >> 6 << 4);
        minimum = (packed[index + 4] >> 4) | (packed[index] >> 6 << 4);
    }
}

template <class Block_> struct WithMinima {
    using Block = Block_;
    using Rounded = block_q8_K;
    static constexpr bool HAS_FIFTH = sizeof(Block) == sizeof(block_q5_K);
    static constexpr int VALUES = 256, SUMS = 8, FIFTH = 128 * OUTPUTS;
    static constexpr int CODES = (HAS_FIFTH ? 160 : 128) * OUTPUTS, SCALES = 20 * OUTPUTS;

    static void pack(const Block & block, int output, uint8_t * codes, uint8_t * scales) {
        for (int word = 0; word < 32; word++) {
            memcpy(codes + word * VECTOR + output * 4, block.qs + word * 4, 4);
        }
        if constexpr (HAS_FIFTH) {
            for (int word = 0; word < 8; word++) {
                memcpy(codes + FIFTH + word * VECTOR + output * 4, block.qh + word * 4, 4);
            }
        }
        memcpy(scales + 2 * output, &block.d, 2);
        memcpy(scales + 2 * OUTPUTS + 2 * output, &block.dmin, 2);
        for (int part = 0; part < 8; part++) {
            uint8_t * at = scales + (4 + part) * OUTPUTS + output;
            six_bits(block.scales, part, at[0], at[8 * OUTPUTS]);
        }
    }

    static void sums(const Rounded & rounded, int rows, int32_t * to) {
        for (int part = 0; part < 8; part++) {
            const float sum = rounded.bsums[2 * part] + rounded.bsums[2 * part + 1];
            memcpy(to + part * rows, &sum, 4);
        }
    }

    static float factor(const Rounded & rounded) { return rounded.d; }

    template <int ROWS>
    static inline void add(__m512 (&totals)[ROWS], const uint8_t * codes, const uint8_t * scales,
                           const int32_t * record) {
        const float * factors = (const float *) (record + 64 * ROWS);
        __m512 block[ROWS] = {};
        add_parts(block, codes, scales, record, std::make_integer_sequence<int, 8>());
        for (int row = 0; row < ROWS; row++) {
            totals[row] = _mm512_fmadd_ps(block[row], _mm512_set1_ps(factors[row]), totals[row]);
        }
    }

    template <int ROWS, int... PARTS>
    static inline void add_parts(__m512 (&block)[ROWS], const uint8_t * codes, const uint8_t * scales,
                                 const int32_t * record, std::integer_sequence<int, PARTS...>) {
        (add_part<PARTS>(block, codes, scales, record), ...);
    }

    // 32 values: even parts are the low nibbles of their codes, odd ones the high nibbles.
    template <int PART, int ROWS>
    static inline void add_part(__m512 (&block)[ROWS], const uint8_t * codes, const uint8_t * scales,
                                const int32_t * record) {
        const float * row_sums = (const float *) (record + (65 + PART) * ROWS);
        __m512i sums[ROWS] = {};
#pragma GCC unroll 8
        for (int step = 0; step < 8; step++) {
            __m512i weights = moved<-4 * (PART % 2)>(load(codes + (PART / 2 * 8 + step) * VECTOR));
            if constexpr (HAS_FIFTH) {
                const __m512i fifth = moved<4 - PART>(load(codes + FIFTH + step * VECTOR));
                weights = joined<15>(weights, _mm512_and_si512(fifth, _mm512_set1_epi8(16)));
            } else {
                weights = _mm512_and_si512(weights, _mm512_set1_epi8(15));
            }
            multiply<ROWS>(sums, weights, record + (PART * 8 + step) * ROWS);
        }
        const uint8_t * minima = scales + 2 * OUTPUTS;
        const __m512 scale = _mm512_mul_ps(halves(scales), unsigned_bytes(scales + (4 + PART) * OUTPUTS));
        const __m512 minimum = _mm512_mul_ps(halves(minima), unsigned_bytes(scales + (12 + PART) * OUTPUTS));
        for (int row = 0; row < ROWS; row++) {
            block[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row]), scale, block[row]);
            block[row] = _mm512_fnmadd_ps(minimum, _mm512_set1_ps(row_sums[row]), block[row]);
        }
    }
};

struct Q6_K {
    using Block = block_q6_K;
    using Rounded = block_q8_K;
    static constexpr int VALUES = 256, SUMS = 16, HIGH = 128 * OUTPUTS, CODES = 192 * OUTPUTS, SCALES = 20 * OUTPUTS;

    static void pack(const Block & block, int output, uint8_t * codes, uint8_t * scales) {
        for (int word = 0; word < 32; word++) {
            memcpy(codes + word * VECTOR + output * 4, block.ql + word * 4, 4);
        }
        for (int word = 0; word < 16; word++) {
            memcpy(codes + HIGH + word * VECTOR + output * 4, block.qh + word * 4, 4);
        }
        memcpy(scales + 2 * output, &block.d, 2);
        for (int part = 0; part < 16; part++) {
            memcpy(scales + (4 + part) * OUTPUTS + output, block.scales + part, 1);
        }
    }

    static void sums(const Rounded & rounded, int rows, int32_t * to) {
        for (int part = 0; part < 16; part++) {
            to[part * rows] = -32 * rounded.bsums[part];
        }
    }

    static float factor(const Rounded & rounded) { return rounded.d; }

    template <int ROWS>
    static inline void add(__m512 (&totals)[ROWS], const uint8_t * codes, const uint8_t * scales,
                           const int32_t * record) {
        const float * factors = (const float *) (record + 64 * ROWS);
        const __m512 scale = halves(scales);
        __m512 block[ROWS] = {};
        for (int half = 0; half < 2; half++) {
            for (int first = 0; first < 8; first += 4) {
                add_quarter<0>(block, codes, scales, scale, record, half, first);
                add_quarter<1>(block, codes, scales, scale, record, half, first);
                add_quarter<2>(block, codes, scales, scale, record, half, first);
                add_quarter<3>(block, codes, scales, scale, record, half, first);
            }
        }
        for (int row = 0; row < ROWS; row++) {
            totals[row] = _mm512_fmadd_ps(block[row], _mm512_set1_ps(factors[row]), totals[row]);
        }
    }

    // 16 values of a quarter of half a block: the low bits of the four quarters lie in two stretches, as either nibble.
    template <int QUARTER, int ROWS>
    static inline void add_quarter(__m512 (&block)[ROWS], const uint8_t * codes, const uint8_t * scales, __m512 scale,
                                   const int32_t * record, int half, int first) {
        const int part = half * 8 + QUARTER * 2 + first / 4;
        const int32_t * words = record + ((half * 4 + QUARTER) * 8 + first) * ROWS;
        const int32_t * starts = record + (65 + part) * ROWS;
        __m512i sums[ROWS];
        for (int row = 0; row < ROWS; row++) {
            sums[row] = _mm512_set1_epi32(starts[row]);
        }
#pragma GCC unroll 4
        for (int step = 0; step < 4; step++) {
            const __m512i low = load(codes + (half * 16 + QUARTER % 2 * 8 + first + step) * VECTOR);
            const __m512i high = load(codes + HIGH + (half * 8 + first + step) * VECTOR);
            const __m512i above = _mm512_and_si512(moved<4 - 2 * QUARTER>(high), _mm512_set1_epi8(48));
            multiply<ROWS>(sums, joined<15>(moved<-4 * (QUARTER / 2)>(low), above), words + step * ROWS);
        }
        const __m512 part_scale = _mm512_mul_ps(scale, signed_bytes(scales + (4 + part) * OUTPUTS));
        for (int row = 0; row < ROWS; row++) {
            block[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row]), part_scale, block[row]);
        }
    }
};

// Rows of a product, wherever its tensors hold them.
struct Rows {
    const ggml_tensor * tensor;
    int64_t count() const { return ggml_nrows(tensor); }
    float * at(int64_t row) const {
        const int64_t plane = row / tensor->ne[1];
        const int64_t offset = row % tensor->ne[1] * tensor->nb[1] + plane % tensor->ne[2] * tensor->nb[2] +
                               plane / tensor->ne[2] * tensor->nb[3];
        return (float *) ((char *) tensor->data + offset);
    }
};

// Rows in tiles of nearly equal height.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t rows) : rows(rows), count((rows + ROWS_MAX - 1) / ROWS_MAX) {}
    int64_t first(int64_t tile) const { return rows * tile / count; }
    int height(int64_t tile) const { return (int) (first(tile + 1) - first(tile)); }
};

class Packed : public ggml::cpu::tensor_traits {
  public:
    virtual size_t bytes(int64_t values, int64_t outputs) const = 0;
    virtual void pack(ggml_tensor * tensor, const void * data) const = 0;
};

template <class Format> class PackedAs final : public Packed {
    using Product = void (*)(const uint8_t *, const int32_t *, int64_t, float * const *);

    static int64_t group_bytes(int64_t values) { return values / Format::VALUES * (Format::CODES + Format::SCALES); }

    size_t bytes(int64_t values, int64_t outputs) const override { return outputs / OUTPUTS * group_bytes(values); }

    void pack(ggml_tensor * tensor, const void * data) const override {
        const int64_t blocks = tensor->ne[0] / Format::VALUES, outputs = tensor->ne[1];
        for (int64_t output = 0; output < outputs; output++) {
            uint8_t * codes = (uint8_t *) tensor->data + output / OUTPUTS * group_bytes(tensor->ne[0]);
            uint8_t * scales = codes + blocks * Format::CODES;
            for (int64_t i = 0; i < blocks; i++) {
                const auto & block = ((const typename Format::Block *) data)[output * blocks + i];
                Format::pack(block, output % OUTPUTS, codes + i * Format::CODES, scales + i * Format::SCALES);
            }
        }
    }

    // 16 outputs of ROWS rows, each to where `outputs` says.
    template <int ROWS>
    static void product(const uint8_t * codes, const int32_t * records, int64_t blocks, float * const * outputs) {
        __m512 totals[ROWS] = {};
        const uint8_t * scales = codes + blocks * Format::CODES;
        for (int64_t i = 0; i < blocks; i++) {
            Format::template add<ROWS>(totals, codes + i * Format::CODES, scales + i * Format::SCALES,
                                       records + i * RECORD<Format> * ROWS);
        }
        for (int row = 0; row < ROWS; row++) {
            _mm512_storeu_ps(outputs[row], totals[row]);
        }
    }

    template <int... I> static constexpr std::array<Product, sizeof...(I)> products(std::integer_sequence<int, I...>) {
        return { product<I + 1>... };
    }

    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        size = ggml_nrows(op->src[1]) * (op->src[1]->ne[0] / Format::VALUES) * RECORD<Format> * 4;
        return true;
    }

    static void round_block(const float * values, int rows, int32_t * record) {
        typename Format::Rounded rounded;
        round_values(values, rounded);
        constexpr int WORDS = Format::VALUES / 4;
        for (int word = 0; word < WORDS; word++) {
            memcpy(record + word * rows, rounded.qs + word * 4, 4);
        }
        const float factor = Format::factor(rounded);
        memcpy(record + WORDS * rows, &factor, 4);
        Format::sums(rounded, rows, record + (WORDS + 1) * rows);
    }

    // This thread's share of a tile's blocks.
    static void round_tile(const ggml_compute_params * params, const Rows & from, const Tiles & tiles, int64_t tile,
                           int64_t blocks, int32_t * records) {
        const int height = tiles.height(tile);
        for (int64_t item = params->ith; item < blocks * height; item += params->nth) {
            const int64_t row = item / blocks, block = item % blocks;
            const float * values = from.at(tiles.first(tile) + row) + block * Format::VALUES;
            round_block(values, height, records + block * RECORD<Format> * height + row);
        }
    }

    static void multiply_groups(ggml_tensor * op, const Tiles & tiles, const int32_t * records, int64_t first,
                                int64_t last) {
        static constexpr auto PRODUCTS = products(std::make_integer_sequence<int, ROWS_MAX>());
        const int64_t values = op->src[0]->ne[0], blocks = values / Format::VALUES;
        const Rows to{ op };
        for (int64_t tile = 0; tile < tiles.count; tile++) {
            const int height = tiles.height(tile);
            for (int64_t group = first; group < last; group++) {
                float * outputs[ROWS_MAX];
                for (int row = 0; row < height; row++) {
                    outputs[row] = to.at(tiles.first(tile) + row) + group * OUTPUTS;
                }
                const uint8_t * codes = (const uint8_t *) op->src[0]->data + group * group_bytes(values);
                PRODUCTS[height - 1](codes, records + tiles.first(tile) * blocks * RECORD<Format>, blocks, outputs);
            }
        }
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const Rows from{ op->src[1] };
        const Tiles tiles(from.count());
        const int64_t blocks = op->src[0]->ne[0] / Format::VALUES, groups = op->src[0]->ne[1] / OUTPUTS;
        int32_t * records = (int32_t *) params->wdata;
        for (int64_t tile = 0; tile < tiles.count; tile++) {
            round_tile(params, from, tiles, tile, blocks, records + tiles.first(tile) * blocks * RECORD<Format>);
        }
        const int64_t fit = CHUNK_BYTES / group_bytes(op->src[0]->ne[0]), share = groups / (4 * params->nth);
        const int64_t chunk = std::max<int64_t>(1, std::min(fit, share));
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
        int64_t first = params->ith * chunk;
        while (first < groups) {
            multiply_groups(op, tiles, records, first, std::min(first + chunk, groups));
            first = ggml_threadpool_chunk_add(params->threadpool, 1) * chunk;
        }
        return true;
    }
};

Packed * packed_as(const ggml_tensor * tensor) {
    static PackedAs<WithShift<block_q8_0>> q8_0;
    static PackedAs<WithShift<block_q4_0>> q4_0;
    static PackedAs<WithMinima<block_q4_K>> q4_k;
    static PackedAs<WithMinima<block_q5_K>> q5_k;
    static PackedAs<Q6_K> q6_k;
    if (ggml_n_dims(tensor) != 2 || tensor->ne[1] % OUTPUTS) {
        return nullptr;
    }
    switch (tensor->type) {
        case GGML_TYPE_Q8_0: return &q8_0;
        case GGML_TYPE_Q4_0: return &q4_0;
        case GGML_TYPE_Q4_K: return &q4_k;
        case GGML_TYPE_Q5_K: return &q5_k;
        case GGML_TYPE_Q6_K: return &q6_k;
        default: return nullptr;
    }
}

bool is_used = false;

ggml_backend_buffer_type_t buffer_type();

class BufferType : public ggml::cpu::extra_buffer_type {
    bool is_ours(const ggml_tensor * op) const {
        return op->op == GGML_OP_MUL_MAT && op->src[0]->buffer && op->src[0]->buffer->buft == buffer_type();
    }

    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * rows = op->src[1];
        return is_used && is_ours(op) && packed_as(op->src[0]) && rows->type == GGML_TYPE_F32 &&
               rows->nb[0] == sizeof(float) && (!rows->buffer || ggml_backend_buft_is_host(rows->buffer->buft));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        return is_ours(op) ? (ggml::cpu::tensor_traits *) op->src[0]->extra : nullptr;
    }
};

ggml_status init_tensor(ggml_backend_buffer_t, ggml_tensor * tensor) {
    tensor->extra = (ggml::cpu::tensor_traits *) packed_as(tensor);
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    packed_as(tensor)->pack(tensor, data);
}

const char * name(ggml_backend_buffer_type_t) { return "CPU_ROWS"; }

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft = type;
        buffer->iface.init_tensor = init_tensor;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = nullptr;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

size_t alignment(ggml_backend_buffer_type_t) { return VECTOR; }

size_t allocated_bytes(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    const Packed * packed = packed_as(tensor);
    return packed ? packed->bytes(tensor->ne[0], tensor->ne[1]) : ggml_nbytes(tensor);
}

ggml_backend_buffer_type_t buffer_type() {
    static ggml_backend_buffer_type type = {
        { name, allocate, alignment, nullptr, allocated_bytes, nullptr },
        ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        new BufferType(),
    };
    return &type;
}

}  // namespace

// Whether models loaded from now on use these kernels: as wanted, unless this build's CPU has none, or a model was
// loaded before the first call, since upstream reads its list of buffer types once. AMX, where it works, stays first.
bool smelt_use_row_kernels(bool is_wanted) {
    auto & types = ggml_backend_cpu_get_extra_buffer_types();
    if (std::find(types.begin(), types.end(), buffer_type()) == types.end()) {
        const bool has_amx = !types.empty() && !strcmp(ggml_backend_buft_name(types[0]), "AMX");
        types.insert(types.begin() + has_amx, buffer_type());
    }
    const auto read = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts");
    bool is_known = false;
    for (auto * known = read(buffer_type()->device); *known; known++) {
        is_known |= *known == buffer_type();
    }
    return is_used = is_wanted && is_known;
}

#else

bool smelt_use_row_kernels(bool) { return false; }

#endif
