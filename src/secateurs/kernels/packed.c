/*
 * Matrix-vector products y[b][r] = scale[r] * sum_j W[r][j] * x[b][j] for a few vectors at a time, where reading W is
 * the cost. A pruned W is stored packed: a bitmap of 64 columns per word (bit j % 64 of word j / 64 says that column j
 * is kept), the kept weights alone, row after row in order of j, and the element of that buffer where each row starts.
 * A kernel expands eight to sixty-four weights in registers, zeros in place, and multiplies them like dense ones.
 *
 * Where no eight columns (8 i to 8 i + 7) keep more than four, as with 4:8 and 2:4, a matrix can be stored in halves
 * instead: four weights for each eight columns of a row, and three bits each that say which columns these are. Nothing
 * is counted or expanded: a kernel picks the four numbers of x that a row wants (of two rows in a shuffle, or four).
 * Blocks of eight rows follow each other, in them the groups of eight columns, in those the four pairs of rows: eight
 * weights, the second row's last, and three bytes of places in the same order. Rows of zeros fill up the last block.
 *
 * Weights are bfloat16 (taken as they are) or int8 (one float scale a row, applied to the finished sum). At one level
 * the packed and the dense kernel run the same tile code and differ only in how they fetch weights, so their results
 * are equal to the last bit. (Halves add in another order: four sums a row.)
 *
 * int4 is dense only: a bfloat16 scale for the 64 columns of a word, of which byte k holds columns k (low half) and
 * k + 32, as numbers from 0 that stand for those from -8. Vectors are rounded for it to int8 with a scale for each word,
 * so that the products of a word are sums of integers, which are exact.
 *
 * Each row and vector has its own accumulators, filled in order of j, so the result depends
 * on neither the batch size nor the tile a row falls in nor the number of threads. Hence a weight that a bitmap drops is
 * still multiplied, as a zero: skipping it would be a different sum wherever a sum can be -0.
 */
#include "packed.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#define ON_X86
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#define ON_ARM
#include <arm_neon.h>
#endif

enum { WORD = 64, HIGHEST_TILE = 8, WIDEST_TILE = 4 };
enum { GROUP = 8, KEPT = 4, PAIRS = HIGHEST_TILE / 2, PLACES = 3 }; /* halves: columns, kept of them; bytes of places */
enum level { PORTABLE, AVX2, AVX512, VBMI2, NEON, LEVELS };
/* A word of a vector for int4, eight times the sum of each four columns k to k + 3 and k + 32 to k + 35, and its scale. */
struct word_int8 {
    int8_t x[WORD];
    int32_t eights[8];
    float scale[8]; /* eight times the same, for eight lanes */
};

/* Where the next weights of one row come from. */
struct cursor {
    const uint8_t *weights, *bits;
};

/* A tile multiplies `height` rows from `row` on with `width` vectors. x is packed by pack_vectors, or round_vectors. */
typedef void tile_function(const struct matrix *m, int64_t row, const void *x, float *y);

INLINE int is_packed(enum format format) { return format == PACKED_BF16 || format == PACKED_INT8; }

INLINE int is_int8(enum format format) { return format == DENSE_INT8 || format == PACKED_INT8 || format == HALF_INT8; }

INLINE int is_half(enum format format) { return format == HALF_BF16 || format == HALF_INT8; }

INLINE int weight_size(enum format format) { return is_int8(format) ? 1 : 2; }

INLINE struct cursor row_cursor(enum format format, const struct matrix *m, int64_t row) {
    int64_t first = is_packed(format) ? m->starts[row] : row * m->columns;
    const uint64_t *bits = is_packed(format) ? m->bits + row * m->words : NULL;
    return (struct cursor){(const uint8_t *)m->weights + first * weight_size(format), (const uint8_t *)bits};
}

/* The last word of a dense row may end inside the next row or past the matrix: go on in a copy padded with zeros. */
INLINE void pad_tail(enum format format, const struct matrix *m, struct cursor *cursor, uint8_t tail[2 * WORD]) {
    memset(tail, 0, 2 * WORD);
    memcpy(tail, cursor->weights, (size_t)(m->columns % WORD * weight_size(format)));
    cursor->weights = tail;
}

INLINE int is_partial(enum format format, const struct matrix *m, int64_t word) {
    return !is_packed(format) && word == m->columns / WORD;
}

INLINE void store(enum format format, const struct matrix *m, float *y, int64_t row, float sum) {
    y[row] = is_int8(format) ? sum * m->scale[row] : sum;
}

/* Both rows of a pair of halves from `row` on; of a tile of one row that row alone, which may be the second. */
INLINE void store_pair(enum format format, const struct matrix *m, float *y, int64_t row, int height, float first,
                       float second) {
    if (height == 1) store(format, m, y, row, row % 2 ? second : first);
    else {
        store(format, m, y, row, first);
        store(format, m, y, row + 1, second);
    }
}

INLINE int64_t half_groups(const struct matrix *m) { return (m->columns + GROUP - 1) / GROUP; }

/* Weights and places of the pair that a row is in, for the first group; the next group is PAIRS pairs further. */
INLINE struct cursor half_cursor(enum format format, const struct matrix *m, int64_t row) {
    int64_t pair = row / HIGHEST_TILE * half_groups(m) * PAIRS + row % HIGHEST_TILE / 2;
    return (struct cursor){(const uint8_t *)m->weights + pair * GROUP * weight_size(format), m->places + pair * PLACES};
}

INLINE void next_group(enum format format, struct cursor *cursor) {
    cursor->weights += PAIRS * GROUP * weight_size(format);
    cursor->bits += PAIRS * PLACES;
}

/* Eight places of three bits, those of a pair's first row lowest. Reads a byte more, which means nothing. */
INLINE uint32_t places_at(const uint8_t *from) {
    uint32_t places;
    memcpy(&places, from, sizeof places);
    return places;
}

/* Portable: 64 weights are expanded to floats in memory; all formats then share one multiplication loop. */

enum { PORTABLE_LANES = 8 };

INLINE float from_bf16(const void *at) {
    uint16_t half;
    memcpy(&half, at, sizeof half);
    uint32_t pattern = (uint32_t)half << 16;
    float value;
    memcpy(&value, &pattern, sizeof value);
    return value;
}

INLINE float next_weight(enum format format, struct cursor *cursor) {
    float weight = is_int8(format) ? (float)*(const int8_t *)cursor->weights : from_bf16(cursor->weights);
    cursor->weights += weight_size(format);
    return weight;
}

static void portable_expand(enum format format, struct cursor *cursor, uint64_t kept, float weights[WORD]) {
    for (int j = 0; j < WORD; j++)
        weights[j] = is_packed(format) && !(kept >> j & 1) ? 0 : next_weight(format, cursor);
}

static void portable(const struct matrix *m, int64_t row, const void *vector, float *y) {
    const float *x = vector;
    struct cursor cursor = row_cursor(m->format, m, row);
    float weights[WORD], sums[PORTABLE_LANES] = {0};
    uint8_t tail[2 * WORD];
    for (int64_t word = 0; word < m->words; word++, x += WORD) {
        if (is_partial(m->format, m, word)) pad_tail(m->format, m, &cursor, tail);
        uint64_t kept = is_packed(m->format) ? m->bits[row * m->words + word] : 0;
        portable_expand(m->format, &cursor, kept, weights);
        for (int j = 0; j < WORD; j += PORTABLE_LANES)
            for (int lane = 0; lane < PORTABLE_LANES; lane++) sums[lane] += weights[j + lane] * x[j + lane];
    }
    float sum = 0;
    for (int lane = 0; lane < PORTABLE_LANES; lane++) sum += sums[lane];
    store(m->format, m, y, row, sum);
}

/* The k-th of the weights that a row keeps of a group, and where in the group it stands. */
INLINE float half_weight(enum format format, const struct cursor *cursor, int64_t row, int k, int *place) {
    int which = (int)(row % 2) * KEPT + k;
    struct cursor weight = {cursor->weights + which * weight_size(format), NULL};
    *place = places_at(cursor->bits) >> 3 * which & 7;
    return next_weight(format, &weight);
}

static void portable_half(const struct matrix *m, int64_t row, const void *vector, float *y) {
    const float *x = vector;
    struct cursor cursor = half_cursor(m->format, m, row);
    float sums[KEPT] = {0};
    for (int64_t group = 0; group < half_groups(m); group++, x += GROUP) {
        for (int k = 0, place; k < KEPT; k++) {
            float weight = half_weight(m->format, &cursor, row, k, &place);
            sums[k] += weight * x[place];
        }
        next_group(m->format, &cursor);
    }
    store(m->format, m, y, row, (sums[0] + sums[2]) + (sums[1] + sums[3]));
}

INLINE const uint8_t *int4_row(const struct matrix *m, int64_t row) {
    return (const uint8_t *)m->weights + row * m->words * (WORD / 2);
}

INLINE int int4_at(const uint8_t *word, int column) {
    return (column < WORD / 2 ? word[column] & 15 : word[column - WORD / 2] >> 4) - 8;
}

static void portable_int4(const struct matrix *m, int64_t row, const void *vector, float *y) {
    const struct word_int8 *x = vector;
    const uint8_t *weights = int4_row(m, row);
    float sum = 0;
    for (int64_t word = 0; word < m->words; word++, x++, weights += WORD / 2) {
        int32_t products = 0;
        for (int j = 0; j < WORD; j++) products += int4_at(weights, j) * x->x[j];
        sum += (float)products * (from_bf16(m->scales + row * m->words + word) * x->scale[0]);
    }
    y[row] = sum;
}

#if defined(ON_X86) || defined(ON_ARM)
/* Byte shuffles that spread the leading weights of a vector over the set bits of a byte; DROP yields a zero. */

enum { DROP = 0x80, BYTES = 256 };
#ifdef ON_ARM
static uint8_t spread_bf16[BYTES][16] __attribute__((aligned(64)));
static uint8_t counts[BYTES];
#else
static uint8_t spread_bf16[BYTES][32] __attribute__((aligned(64)));
#endif
static uint8_t spread_int8[BYTES + 1][8] __attribute__((aligned(64))); /* read 16 bytes at a time */

static void __attribute__((constructor)) fill_tables(void) {
    const int lane_size = sizeof spread_bf16[0] / 8; /* AVX2 fills the upper half of float lanes at once */
    memset(spread_bf16, DROP, sizeof spread_bf16);
    memset(spread_int8, DROP, sizeof spread_int8);
    for (int byte = 0; byte < BYTES; byte++) {
        uint8_t count = 0;
        for (int bit = 0; bit < 8; bit++) {
            if (!(byte >> bit & 1)) continue;
            uint8_t *lane_end = spread_bf16[byte] + (bit + 1) * lane_size;
            lane_end[-2] = (uint8_t)(2 * count);
            lane_end[-1] = (uint8_t)(2 * count + 1);
            spread_int8[byte][bit] = count++;
        }
#ifdef ON_ARM
        counts[byte] = count;
#endif
    }
}

INLINE void next_word(enum format format, struct cursor *cursor) {
    if (is_packed(format)) cursor->bits += WORD / 8;
    else cursor->weights += WORD * weight_size(format);
}

/*
 * Several rows at once are several streams, which hardware prefetchers follow badly: rows are short, and alike in their
 * low address bits. So while a tile is computed the memory behind it is asked for in address order, into the second
 * cache and far enough ahead for main memory. A prefetch past the end of the matrix does nothing.
 */
enum { LINE = 64, NEAREST = 32768 };
enum { NEAR_WEIGHTS = 4096, NEAR_PLACES = 1024 }; /* halves are read in one stream: less is enough */

struct ahead {
    const uint8_t *weights, *bits;
    int64_t step;
};

INLINE struct ahead look_ahead(enum format format, int height, const struct matrix *m, int64_t row) {
    struct cursor first = row_cursor(format, m, row);
    int64_t count = is_packed(format) ? m->starts[row + height] - m->starts[row] : height * m->columns;
    int64_t size = count * weight_size(format);
    if (is_packed(format)) first.bits += 2 * height * m->words * (WORD / 8);
    return (struct ahead){first.weights + (size < NEAREST ? NEAREST : size), first.bits, size / m->words};
}

INLINE void prefetch(enum format format, int height, struct ahead *ahead) {
    UNROLL for (int line = 0; line < height * weight_size(format); line++)
        __builtin_prefetch(ahead->weights + line * LINE, 0, 2);
    ahead->weights += ahead->step;
    if (!is_packed(format)) return;
    __builtin_prefetch(ahead->bits, 0, 2);
    ahead->bits += height * (WORD / 8);
}
#endif

#ifdef ON_X86
#define AVX2_CODE __attribute__((target("avx2,fma,popcnt")))

AVX2_CODE INLINE __m256 avx2_bf16(__m128i weights) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(weights), 16));
}

AVX2_CODE INLINE __m256 avx2_int8(__m128i weights) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(weights)); }

AVX2_CODE INLINE __m256 avx2_fetch(enum format format, struct cursor *cursor, int group) {
    const void *dense = cursor->weights + 8 * group * weight_size(format);
    if (format == DENSE_BF16) return avx2_bf16(_mm_loadu_si128(dense));
    if (format == DENSE_INT8) return avx2_int8(_mm_loadl_epi64(dense));
    uint64_t byte = cursor->bits[group];
    const void *kept = cursor->weights;
    cursor->weights += weight_size(format) * __builtin_popcountll(byte);
    if (format == PACKED_INT8) {
        __m128i spread = _mm_loadu_si128((const void *)spread_int8[byte]);
        return avx2_int8(_mm_shuffle_epi8(_mm_loadl_epi64(kept), spread));
    }
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(kept));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256((const void *)spread_bf16[byte])));
}

AVX2_CODE INLINE float avx2_sum(__m256 lanes) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

AVX2_CODE INLINE void avx2_int4(int height, int width, const struct matrix *m, int64_t row, const void *vectors,
                                float *y) {
    const struct word_int8 *x = vectors;
    const uint8_t *weights[HIGHEST_TILE];
    const uint16_t *scales[HIGHEST_TILE];
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i first[HIGHEST_TILE], second[HIGHEST_TILE];
    __m256 scale[HIGHEST_TILE], sums[HIGHEST_TILE][WIDEST_TILE];
    UNROLL for (int r = 0; r < height; r++) {
        weights[r] = int4_row(m, row + r);
        scales[r] = m->scales + (row + r) * m->words;
        UNROLL for (int b = 0; b < width; b++) sums[r][b] = _mm256_setzero_ps();
    }
    const uint8_t *ahead = weights[0] + NEAREST;
    for (int64_t word = 0; word < m->words; word++, x += width) {
        UNROLL for (int line = 0; line < (height + 1) / 2; line++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
        UNROLL for (int r = 0; r < height; r++) {
            __m256i both = _mm256_loadu_si256((const void *)(weights[r] + word * (WORD / 2)));
            first[r] = _mm256_and_si256(both, low);
            second[r] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            scale[r] = _mm256_set1_ps(from_bf16(scales[r] + word));
        }
        UNROLL for (int b = 0; b < width; b++) {
            __m256i start = _mm256_load_si256((const void *)x[b].x);
            __m256i end = _mm256_load_si256((const void *)(x[b].x + WORD / 2));
            __m256i eights = _mm256_load_si256((const void *)x[b].eights);
            __m256 per = _mm256_load_ps(x[b].scale);
            UNROLL for (int r = 0; r < height; r++) {
                __m256i pairs = _mm256_maddubs_epi16(first[r], start), others = _mm256_maddubs_epi16(second[r], end);
                __m256i fours = _mm256_madd_epi16(_mm256_add_epi16(pairs, others), ones);
                __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(fours, eights)), per);
                sums[r][b] = _mm256_fmadd_ps(product, scale[r], sums[r][b]);
            }
        }
    }
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int b = 0; b < width; b++) y[b * m->step + row + r] = avx2_sum(sums[r][b]);
}

AVX2_CODE INLINE float avx2_half_sum(__m128 lanes) {
    __m128 sum = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

AVX2_CODE INLINE void avx2_half(enum format format, int height, int width, const struct matrix *m, int64_t row,
                                const void *vectors, float *y) {
    const float *x = vectors;
    const int pairs = (height + 1) / 2, size = weight_size(format);
    const __m256i shifts = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
    struct cursor cursor = half_cursor(format, m, row);
    __m256 sums[PAIRS][WIDEST_TILE];
    UNROLL for (int p = 0; p < pairs; p++)
        UNROLL for (int b = 0; b < width; b++) sums[p][b] = _mm256_setzero_ps();
    for (int64_t group = 0; group < half_groups(m); group++, x += GROUP * width) {
        __builtin_prefetch(cursor.weights + NEAR_WEIGHTS, 0, 3);
        __builtin_prefetch(cursor.bits + NEAR_PLACES, 0, 3);
        UNROLL for (int p = 0; p < pairs; p++) {
            const void *from = cursor.weights + p * GROUP * size;
            __m256 weights = is_int8(format) ? avx2_int8(_mm_loadl_epi64(from)) : avx2_bf16(_mm_loadu_si128(from));
            __m256i places = _mm256_set1_epi32((int)places_at(cursor.bits + p * PLACES));
            places = _mm256_srlv_epi32(places, shifts); /* a shuffle looks at the lowest three bits */
            UNROLL for (int b = 0; b < width; b++) {
                __m256 chosen = _mm256_permutevar8x32_ps(_mm256_load_ps(x + GROUP * b), places);
                sums[p][b] = _mm256_fmadd_ps(weights, chosen, sums[p][b]);
            }
        }
        next_group(format, &cursor);
    }
    UNROLL for (int p = 0; p < pairs; p++)
        UNROLL for (int b = 0; b < width; b++)
            store_pair(format, m, y + b * m->step, row + 2 * p, height,
                       avx2_half_sum(_mm256_castps256_ps128(sums[p][b])),
                       avx2_half_sum(_mm256_extractf128_ps(sums[p][b], 1)));
}

AVX2_CODE INLINE void avx2(enum format format, int height, int width, const struct matrix *m, int64_t row,
                           const void *vectors, float *y) {
    if (format == DENSE_INT4) {
        avx2_int4(height, width, m, row, vectors, y);
        return;
    }
    if (is_half(format)) {
        avx2_half(format, height, width, m, row, vectors, y);
        return;
    }
    const float *x = vectors;
    struct cursor cursors[HIGHEST_TILE];
    struct ahead ahead = look_ahead(format, height, m, row);
    __m256 sums[HIGHEST_TILE][WIDEST_TILE];
    uint8_t tails[HIGHEST_TILE][2 * WORD];
    UNROLL for (int r = 0; r < height; r++) {
        cursors[r] = row_cursor(format, m, row + r);
        UNROLL for (int b = 0; b < width; b++) sums[r][b] = _mm256_setzero_ps();
    }
    for (int64_t word = 0; word < m->words; word++, x += WORD * width) {
        prefetch(format, height, &ahead);
        if (is_partial(format, m, word))
            UNROLL for (int r = 0; r < height; r++) pad_tail(format, m, &cursors[r], tails[r]);
        UNROLL for (int group = 0; group < 8; group++) {
            UNROLL for (int r = 0; r < height; r++) {
                __m256 weights = avx2_fetch(format, &cursors[r], group);
                UNROLL for (int b = 0; b < width; b++)
                    sums[r][b] = _mm256_fmadd_ps(weights, _mm256_load_ps(x + 8 * (group * width + b)), sums[r][b]);
            }
        }
        UNROLL for (int r = 0; r < height; r++) next_word(format, &cursors[r]);
    }
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int b = 0; b < width; b++) store(format, m, y + b * m->step, row + r, avx2_sum(sums[r][b]));
}

#define AVX512_CODE __attribute__((target("avx2,fma,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define VBMI2_CODE __attribute__((target("avx2,fma,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2")))

/* Sixteen weights in a row, each at the foot of a lane. */
AVX512_CODE INLINE __m512i avx512_lanes(enum format format, const uint8_t *from) {
    if (is_int8(format)) return _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from));
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from));
}

/* Sixteen bits as a mask: from memory, as to shift one takes the port that expands. */
AVX512_CODE INLINE __mmask16 avx512_mask(const uint8_t *from) {
    __mmask16 mask;
    __asm__("kmovw %1, %0" : "=Yk"(mask) : "m"(*(const uint8_t(*)[2])from));
    return mask;
}

AVX512_CODE INLINE __m512 avx512_floats(enum format format, __m512i lanes) {
    return is_int8(format) ? _mm512_cvtepi32_ps(lanes) : _mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16));
}

/* The weights of one word, as floats. */
AVX512_CODE INLINE void avx512_fetch(enum format format, struct cursor *cursor, __m512 weights[4]) {
    uint64_t kept = ~0ull;
    int before = 0; /* weights of the groups before this one */
    if (is_packed(format)) memcpy(&kept, cursor->bits, sizeof kept);
    UNROLL for (int group = 0; group < 4; group++) {
        __m512i lanes = avx512_lanes(format, cursor->weights + before * weight_size(format));
        if (is_packed(format)) lanes = _mm512_maskz_expand_epi32(avx512_mask(cursor->bits + 2 * group), lanes);
        weights[group] = avx512_floats(format, lanes);
        before = __builtin_popcountll(kept & ~0ull >> (48 - 16 * group));
    }
    if (is_packed(format)) cursor->weights += weight_size(format) * before;
}

/* The same where less than lanes can be expanded. A bf16 pair shares a lane: even and odd columns part, as x does. */
VBMI2_CODE INLINE void vbmi2_fetch(enum format format, struct cursor *cursor, __m512 weights[4]) {
    uint64_t kept = ~0ull;
    if (is_packed(format)) memcpy(&kept, cursor->bits, sizeof kept);
    const uint8_t *from = cursor->weights;
    if (is_int8(format)) {
        __m512i all = _mm512_loadu_si512(from);
        if (is_packed(format)) all = _mm512_maskz_expand_epi8(kept, all);
        weights[0] = avx512_floats(format, _mm512_cvtepi8_epi32(_mm512_castsi512_si128(all)));
        weights[1] = avx512_floats(format, _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(all, 1)));
        weights[2] = avx512_floats(format, _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(all, 2)));
        weights[3] = avx512_floats(format, _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(all, 3)));
    } else {
        UNROLL for (int half = 0; half < 2; half++) {
            __m512i pairs = _mm512_loadu_si512(from);
            if (is_packed(format)) pairs = _mm512_maskz_expand_epi16((__mmask32)(kept >> 32 * half), pairs);
            from += 2 * __builtin_popcountll((uint32_t)(kept >> 32 * half));
            weights[2 * half] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            weights[2 * half + 1] =
                _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
        }
    }
    if (is_packed(format)) cursor->weights += weight_size(format) * __builtin_popcountll(kept);
}

AVX512_CODE INLINE float avx512_sum(__m512 lanes) {
    return avx2_sum(_mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1)));
}

/* Four rows at a time; a tile of one row goes the way of AVX2, whose sums are the same. */
AVX512_CODE INLINE void avx512_half(enum format format, int height, int width, const struct matrix *m, int64_t row,
                                    const void *vectors, float *y) {
    const float *x = vectors;
    const int fours = height / 4, size = weight_size(format);
    const __m512i shifts = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21);
    struct cursor cursor = half_cursor(format, m, row);
    __m512 sums[PAIRS / 2][WIDEST_TILE];
    UNROLL for (int f = 0; f < fours; f++)
        UNROLL for (int b = 0; b < width; b++) sums[f][b] = _mm512_setzero_ps();
    for (int64_t group = 0; group < half_groups(m); group++, x += GROUP * width) {
        __builtin_prefetch(cursor.weights + NEAR_WEIGHTS, 0, 3);
        __builtin_prefetch(cursor.bits + NEAR_PLACES, 0, 3);
        UNROLL for (int f = 0; f < fours; f++) {
            __m512 weights = avx512_floats(format, avx512_lanes(format, cursor.weights + 2 * f * GROUP * size));
            const uint8_t *at = cursor.bits + 2 * f * PLACES;
            __m512i places = _mm512_set1_epi32((int)places_at(at));
            places = _mm512_mask_set1_epi32(places, 0xff00, (int)places_at(at + PLACES));
            places = _mm512_srlv_epi32(places, shifts); /* a shuffle looks at four bits: x stands there twice */
            UNROLL for (int b = 0; b < width; b++) {
                __m512 chosen = _mm512_permutexvar_ps(places, _mm512_broadcast_f32x8(_mm256_load_ps(x + GROUP * b)));
                sums[f][b] = _mm512_fmadd_ps(weights, chosen, sums[f][b]);
            }
        }
        next_group(format, &cursor);
    }
    UNROLL for (int f = 0; f < fours; f++)
        UNROLL for (int b = 0; b < width; b++) {
            float *to = y + b * m->step;
            store(format, m, to, row + 4 * f, avx2_half_sum(_mm512_castps512_ps128(sums[f][b])));
            store(format, m, to, row + 4 * f + 1, avx2_half_sum(_mm512_extractf32x4_ps(sums[f][b], 1)));
            store(format, m, to, row + 4 * f + 2, avx2_half_sum(_mm512_extractf32x4_ps(sums[f][b], 2)));
            store(format, m, to, row + 4 * f + 3, avx2_half_sum(_mm512_extractf32x4_ps(sums[f][b], 3)));
        }
}

/* A product of 64 numbers is one instruction (VNNI), which starts from what eight too much in each has to go. */
AVX512_CODE INLINE void avx512_int4(int height, int width, const struct matrix *m, int64_t row, const void *vectors,
                                    float *y) {
    const struct word_int8 *x = vectors;
    const uint8_t *weights[HIGHEST_TILE];
    const uint16_t *scales[HIGHEST_TILE];
    const __m512i shifts = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4), low = _mm512_set1_epi8(15);
    __m512i numbers[HIGHEST_TILE];
    __m512 scale[HIGHEST_TILE], sums[HIGHEST_TILE][WIDEST_TILE];
    UNROLL for (int r = 0; r < height; r++) {
        weights[r] = int4_row(m, row + r);
        scales[r] = m->scales + (row + r) * m->words;
        UNROLL for (int b = 0; b < width; b++) sums[r][b] = _mm512_setzero_ps();
    }
    const uint8_t *ahead = weights[0] + NEAREST;
    for (int64_t word = 0; word < m->words; word++, x += width) {
        UNROLL for (int line = 0; line < (height + 1) / 2; line++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
        UNROLL for (int r = 0; r < height; r++) {
            __m256i both = _mm256_loadu_si256((const void *)(weights[r] + word * (WORD / 2)));
            numbers[r] = _mm512_and_si512(_mm512_srlv_epi64(_mm512_broadcast_i64x4(both), shifts), low);
            scale[r] = _mm512_set1_ps(from_bf16(scales[r] + word));
        }
        UNROLL for (int b = 0; b < width; b++) {
            __m512i vector = _mm512_load_si512((const void *)x[b].x);
            __m256i eights = _mm256_load_si256((const void *)x[b].eights);
            __m512i start = _mm512_zextsi256_si512(_mm256_sub_epi32(_mm256_setzero_si256(), eights));
            __m512 per = _mm512_set1_ps(x[b].scale[0]);
            UNROLL for (int r = 0; r < height; r++) {
                __m512 product = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, numbers[r], vector));
                sums[r][b] = _mm512_fmadd_ps(_mm512_mul_ps(product, per), scale[r], sums[r][b]);
            }
        }
    }
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int b = 0; b < width; b++) y[b * m->step + row + r] = avx512_sum(sums[r][b]);
}

/* Dense and packed rows, by a level's own way to fetch weights. */
#define AVX512_ROWS(code, name, fetch)                                                                                 \
    code INLINE void name(enum format format, int height, int width, const struct matrix *m, int64_t row,              \
                          const void *vectors, float *y) {                                                             \
        const float *x = vectors;                                                                                      \
        struct cursor cursors[HIGHEST_TILE];                                                                           \
        struct ahead ahead = look_ahead(format, height, m, row);                                                       \
        __m512 sums[HIGHEST_TILE][WIDEST_TILE], weights[4];                                                            \
        uint8_t tails[HIGHEST_TILE][2 * WORD];                                                                         \
        UNROLL for (int r = 0; r < height; r++) {                                                                      \
            cursors[r] = row_cursor(format, m, row + r);                                                               \
            UNROLL for (int b = 0; b < width; b++) sums[r][b] = _mm512_setzero_ps();                                   \
        }                                                                                                              \
        for (int64_t word = 0; word < m->words; word++, x += WORD * width) {                                           \
            prefetch(format, height, &ahead);                                                                          \
            if (is_partial(format, m, word))                                                                           \
                UNROLL for (int r = 0; r < height; r++) pad_tail(format, m, &cursors[r], tails[r]);                    \
            UNROLL for (int r = 0; r < height; r++) {                                                                  \
                fetch(format, &cursors[r], weights);                                                                   \
                next_word(format, &cursors[r]);                                                                        \
                UNROLL for (int group = 0; group < 4; group++)                                                         \
                    UNROLL for (int b = 0; b < width; b++)                                                             \
                        sums[r][b] = _mm512_fmadd_ps(weights[group], _mm512_load_ps(x + 16 * (group * width + b)),     \
                                                     sums[r][b]);                                                      \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < height; r++)                                                                        \
            UNROLL for (int b = 0; b < width; b++)                                                                     \
                store(format, m, y + b * m->step, row + r, avx512_sum(sums[r][b]));                                    \
    }

AVX512_ROWS(AVX512_CODE, avx512_rows, avx512_fetch)
AVX512_ROWS(VBMI2_CODE, vbmi2, vbmi2_fetch)

AVX512_CODE INLINE void avx512(enum format format, int height, int width, const struct matrix *m, int64_t row,
                               const void *vectors, float *y) {
    if (format == DENSE_INT4) avx512_int4(height, width, m, row, vectors, y);
    else if (is_half(format) && height == 1) avx2_half(format, height, width, m, row, vectors, y);
    else if (is_half(format)) avx512_half(format, height, width, m, row, vectors, y);
    else avx512_rows(format, height, width, m, row, vectors, y);
}
#endif

#ifdef ON_ARM
#define NEON_CODE

INLINE void neon_bf16(uint16x8_t weights, float32x4_t out[2]) {
    out[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(weights), 16));
    out[1] = vreinterpretq_f32_u32(vshll_high_n_u16(weights, 16));
}

INLINE void neon_int8(int8x8_t weights, float32x4_t out[2]) {
    int16x8_t wide = vmovl_s8(weights);
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    out[1] = vcvtq_f32_s32(vmovl_high_s16(wide));
}

INLINE void neon_fetch(enum format format, struct cursor *cursor, int group, float32x4_t out[2]) {
    const uint8_t *from = cursor->weights;
    if (!is_packed(format)) {
        from += 8 * group * weight_size(format);
        if (is_int8(format)) neon_int8(vreinterpret_s8_u8(vld1_u8(from)), out);
        else neon_bf16(vreinterpretq_u16_u8(vld1q_u8(from)), out);
        return;
    }
    uint8_t byte = cursor->bits[group];
    uint8x16_t kept = vld1q_u8(from);
    cursor->weights += weight_size(format) * counts[byte];
    if (is_int8(format)) neon_int8(vreinterpret_s8_u8(vqtbl1_u8(kept, vld1_u8(spread_int8[byte]))), out);
    else neon_bf16(vreinterpretq_u16_u8(vqtbl1q_u8(kept, vld1q_u8(spread_bf16[byte]))), out);
}

INLINE void neon_int4(int height, int width, const struct matrix *m, int64_t row, const void *vectors, float *y) {
    const struct word_int8 *x = vectors;
    float32x4_t sums[HIGHEST_TILE][WIDEST_TILE];
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int b = 0; b < width; b++) sums[r][b] = vdupq_n_f32(0);
    for (int64_t word = 0; word < m->words; word++, x += width) {
        UNROLL for (int r = 0; r < height; r++) {
            const uint8_t *from = int4_row(m, row + r) + word * (WORD / 2);
            int8x16_t weights[4]; /* columns 0, 16, 32 and 48 on */
            UNROLL for (int half = 0; half < 2; half++) {
                uint8x16_t both = vld1q_u8(from + 16 * half);
                int8x16_t eight = vdupq_n_s8(8);
                weights[half] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), eight);
                weights[half + 2] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), eight);
            }
            float scale = from_bf16(m->scales + (row + r) * m->words + word);
            UNROLL for (int b = 0; b < width; b++) {
                int32x4_t fours = vdupq_n_s32(0);
                UNROLL for (int part = 0; part < 4; part++) {
                    int8x16_t vector = vld1q_s8(x[b].x + 16 * part);
                    fours = vpadalq_s16(fours, vmull_s8(vget_low_s8(weights[part]), vget_low_s8(vector)));
                    fours = vpadalq_s16(fours, vmull_high_s8(weights[part], vector));
                }
                sums[r][b] = vfmaq_n_f32(sums[r][b], vcvtq_f32_s32(fours), scale * x[b].scale[0]);
            }
        }
    }
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int b = 0; b < width; b++) y[b * m->step + row + r] = vaddvq_f32(sums[r][b]);
}

INLINE void neon_half(enum format format, int height, int width, const struct matrix *m, int64_t row,
                      const void *vectors, float *y) {
    const float *x = vectors;
    const int pairs = (height + 1) / 2, size = weight_size(format);
    const int32_t shifts[GROUP] = {0, -3, -6, -9, -12, -15, -18, -21};
    struct cursor cursor = half_cursor(format, m, row);
    float32x4_t sums[PAIRS][WIDEST_TILE][2], weights[2];
    UNROLL for (int p = 0; p < pairs; p++)
        UNROLL for (int b = 0; b < width; b++) sums[p][b][0] = sums[p][b][1] = vdupq_n_f32(0);
    for (int64_t group = 0; group < half_groups(m); group++, x += GROUP * width) {
        __builtin_prefetch(cursor.weights + NEAR_WEIGHTS, 0, 3);
        __builtin_prefetch(cursor.bits + NEAR_PLACES, 0, 3);
        UNROLL for (int p = 0; p < pairs; p++) {
            const uint8_t *from = cursor.weights + p * GROUP * size;
            if (is_int8(format)) neon_int8(vreinterpret_s8_u8(vld1_u8(from)), weights);
            else neon_bf16(vreinterpretq_u16_u8(vld1q_u8(from)), weights);
            uint32x4_t both = vdupq_n_u32(places_at(cursor.bits + p * PLACES));
            UNROLL for (int r = 0; r < 2; r++) {
                uint32x4_t places = vandq_u32(vshlq_u32(both, vld1q_s32(shifts + 4 * r)), vdupq_n_u32(7));
                places = vmlaq_n_u32(vdupq_n_u32(0x03020100), places, 0x04040404); /* the four bytes of a float */
                UNROLL for (int b = 0; b < width; b++) {
                    const uint8_t *vector = (const uint8_t *)(x + GROUP * b);
                    uint8x16x2_t all = {{vld1q_u8(vector), vld1q_u8(vector + 16)}};
                    uint8x16_t chosen = vqtbl2q_u8(all, vreinterpretq_u8_u32(places));
                    sums[p][b][r] = vfmaq_f32(sums[p][b][r], weights[r], vreinterpretq_f32_u8(chosen));
                }
            }
        }
        next_group(format, &cursor);
    }
    UNROLL for (int p = 0; p < pairs; p++)
        UNROLL for (int b = 0; b < width; b++)
            store_pair(format, m, y + b * m->step, row + 2 * p, height, vaddvq_f32(sums[p][b][0]),
                       vaddvq_f32(sums[p][b][1]));
}

INLINE void neon(enum format format, int height, int width, const struct matrix *m, int64_t row, const void *vectors,
                 float *y) {
    if (format == DENSE_INT4) {
        neon_int4(height, width, m, row, vectors, y);
        return;
    }
    if (is_half(format)) {
        neon_half(format, height, width, m, row, vectors, y);
        return;
    }
    const float *x = vectors;
    struct cursor cursors[HIGHEST_TILE];
    struct ahead ahead = look_ahead(format, height, m, row);
    float32x4_t sums[HIGHEST_TILE][WIDEST_TILE][2], weights[2];
    uint8_t tails[HIGHEST_TILE][2 * WORD];
    UNROLL for (int r = 0; r < height; r++) {
        cursors[r] = row_cursor(format, m, row + r);
        UNROLL for (int b = 0; b < width; b++) sums[r][b][0] = sums[r][b][1] = vdupq_n_f32(0);
    }
    for (int64_t word = 0; word < m->words; word++, x += WORD * width) {
        prefetch(format, height, &ahead);
        if (is_partial(format, m, word))
            UNROLL for (int r = 0; r < height; r++) pad_tail(format, m, &cursors[r], tails[r]);
        UNROLL for (int group = 0; group < 8; group++) {
            UNROLL for (int r = 0; r < height; r++) {
                neon_fetch(format, &cursors[r], group, weights);
                UNROLL for (int b = 0; b < width; b++) {
                    const float *from = x + 8 * (group * width + b);
                    sums[r][b][0] = vfmaq_f32(sums[r][b][0], weights[0], vld1q_f32(from));
                    sums[r][b][1] = vfmaq_f32(sums[r][b][1], weights[1], vld1q_f32(from + 4));
                }
            }
        }
        UNROLL for (int r = 0; r < height; r++) next_word(format, &cursors[r]);
    }
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int b = 0; b < width; b++)
            store(format, m, y + b * m->step, row + r, vaddvq_f32(vaddq_f32(sums[r][b][0], sums[r][b][1])));
}
#endif

/* The tiles of one format: for 1, 2 and 4 vectors, how many rows a tile takes, that tile, and one for leftover rows. */
struct tile {
    int height;
    tile_function *many, *one;
};

#define TILE(code, level, format, height, width)                                                                  \
    code static void level##_##format##_##height##x##width(const struct matrix *m, int64_t row, const void *x,    \
                                                            float *y) {                                           \
        level(format, height, width, m, row, x, y);                                                               \
    }
#define TILES(code, level, format, high, middle, low)                                                             \
    TILE(code, level, format, high, 1)                                                                            \
    TILE(code, level, format, middle, 2)                                                                          \
    TILE(code, level, format, low, 4)                                                                             \
    TILE(code, level, format, 1, 1)                                                                               \
    TILE(code, level, format, 1, 2)                                                                               \
    TILE(code, level, format, 1, 4)                                                                               \
    static const struct tile level##_##format[] = {                                                               \
        {high, level##_##format##_##high##x1, level##_##format##_1x1},                                            \
        {middle, level##_##format##_##middle##x2, level##_##format##_1x2},                                        \
        {low, level##_##format##_##low##x4, level##_##format##_1x4},                                              \
    };

#define ALL_FORMATS(level, with) \
    {level##_DENSE_BF16, level##_PACKED_BF16, level##_DENSE_INT8, level##_PACKED_INT8,                            \
     with##_DENSE_INT4,  with##_HALF_BF16,    with##_HALF_INT8}

struct kernels {
    int lanes, widest, bf16_stride; /* stride 2: even and odd columns of two lane groups part */
    const struct tile *tiles[FORMATS];
};

static const struct tile portable_tile = {1, portable, portable};
static const struct tile portable_int4_tile = {1, portable_int4, portable_int4};
static const struct tile portable_half_tile = {1, portable_half, portable_half};

#ifdef ON_X86
TILES(AVX2_CODE, avx2, DENSE_BF16, 2, 4, 2)
TILES(AVX2_CODE, avx2, PACKED_BF16, 4, 4, 2)
TILES(AVX2_CODE, avx2, DENSE_INT8, 4, 4, 2)
TILES(AVX2_CODE, avx2, PACKED_INT8, 4, 4, 2)
TILES(AVX2_CODE, avx2, DENSE_INT4, 4, 4, 2)
TILES(AVX2_CODE, avx2, HALF_BF16, 8, 8, 4)
TILES(AVX2_CODE, avx2, HALF_INT8, 8, 8, 4)
TILES(AVX512_CODE, avx512, DENSE_BF16, 4, 4, 4)
TILES(AVX512_CODE, avx512, PACKED_BF16, 2, 4, 4)
TILES(AVX512_CODE, avx512, DENSE_INT8, 4, 4, 4)
TILES(AVX512_CODE, avx512, PACKED_INT8, 4, 4, 4)
TILES(AVX512_CODE, avx512, DENSE_INT4, 4, 4, 4)
TILES(AVX512_CODE, avx512, HALF_BF16, 8, 8, 8)
TILES(AVX512_CODE, avx512, HALF_INT8, 8, 8, 8)
TILES(VBMI2_CODE, vbmi2, DENSE_BF16, 4, 4, 4)
TILES(VBMI2_CODE, vbmi2, PACKED_BF16, 4, 4, 4)
TILES(VBMI2_CODE, vbmi2, DENSE_INT8, 4, 4, 4)
TILES(VBMI2_CODE, vbmi2, PACKED_INT8, 4, 4, 4)
#endif
#ifdef ON_ARM
TILES(NEON_CODE, neon, DENSE_BF16, 4, 4, 2)
TILES(NEON_CODE, neon, PACKED_BF16, 4, 4, 2)
TILES(NEON_CODE, neon, DENSE_INT8, 4, 4, 2)
TILES(NEON_CODE, neon, PACKED_INT8, 4, 4, 2)
TILES(NEON_CODE, neon, DENSE_INT4, 4, 4, 2)
TILES(NEON_CODE, neon, HALF_BF16, 8, 4, 4)
TILES(NEON_CODE, neon, HALF_INT8, 8, 4, 4)
#endif

static const struct kernels kernels[LEVELS] = {
    [PORTABLE] = {PORTABLE_LANES, 1, 1,
                  {&portable_tile, &portable_tile, &portable_tile, &portable_tile, &portable_int4_tile,
                   &portable_half_tile, &portable_half_tile}},
#ifdef ON_X86
    [AVX2] = {8, 4, 1, ALL_FORMATS(avx2, avx2)},
    [AVX512] = {16, 4, 1, ALL_FORMATS(avx512, avx512)},
    [VBMI2] = {16, 4, 2, ALL_FORMATS(vbmi2, avx512)},
#endif
#ifdef ON_ARM
    [NEON] = {8, 4, 1, ALL_FORMATS(neon, neon)},
#endif
};

static int64_t block_width(const struct kernels *k, int64_t vectors) {
    int64_t width = 1;
    while (2 * width <= k->widest && 2 * width <= vectors) width *= 2;
    return width;
}

/* Order x as the tiles read it, lane groups of the vectors of a block in turn, and pad it with zeros to whole words. */
static void pack_vectors(const struct kernels *k, const struct matrix *m, const float *x, int64_t batch,
                         float *packed) {
    const int lanes = is_half(m->format) ? GROUP : k->lanes;
    const int64_t groups = m->words * WORD / lanes, stride = m->format == DENSE_BF16 || m->format == PACKED_BF16 ? k->bf16_stride : 1;
    for (int64_t done = 0, width; done < batch; done += width, packed += width * m->words * WORD) {
        width = block_width(k, batch - done);
        for (int64_t b = 0; b < width; b++, x += m->columns)
            for (int64_t group = 0; group < groups; group++) {
                float *to = packed + (group * width + b) * lanes;
                int64_t column = (group - group % stride) * lanes + group % stride;
                for (int lane = 0; lane < lanes; lane++, column += stride)
                    to[lane] = column < m->columns ? x[column] : 0;
            }
    }
}

INLINE int32_t float_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

#define TO_INTEGER 12582912.0f /* 3 * 2^22: after it is added, the lowest bits of a small float are its nearest integer */

/* Round x to int8 as the tiles for int4 read it, words of the vectors of a block in turn. */
static void round_vectors(const struct kernels *k, const struct matrix *m, const float *x, int64_t batch,
                          struct word_int8 *rounded) {
    for (int64_t done = 0, width; done < batch; done += width, rounded += width * m->words) {
        width = block_width(k, batch - done);
        for (int64_t b = 0; b < width; b++, x += m->columns)
            for (int64_t word = 0; word < m->words; word++) {
                const float *from = x + word * WORD;
                const int64_t left = m->columns - word * WORD, columns = left < WORD ? left : WORD;
                struct word_int8 *to = &rounded[word * width + b];
                int32_t highest = 0; /* floats without a sign are in the order of their bits, NaN last */
                for (int64_t j = 0; j < columns; j++) {
                    int32_t bits = float_bits(from[j]) & 0x7fffffff;
                    highest = bits > highest ? bits : highest;
                }
                float largest;
                memcpy(&largest, &highest, sizeof largest);
                memset(to, 0, sizeof *to);
                for (int lane = 0; lane < 8; lane++) to->scale[lane] = largest / 127;
                const float per = largest > 0 ? 127 / largest : 0;
                for (int64_t j = 0; j < columns; j++) to->x[j] = (int8_t)float_bits(from[j] * per + TO_INTEGER);
                for (int j = 0; j < WORD; j++) to->eights[j % (WORD / 2) / 4] += 8 * to->x[j];
            }
    }
}

/* Floats that a word of a vector takes. */
INLINE int64_t word_floats(enum format format) {
    return format == DENSE_INT4 ? (int64_t)(sizeof(struct word_int8) / sizeof(float)) : WORD;
}

static void multiply_rows(const struct kernels *k, const struct matrix *m, int64_t row, int64_t end, const float *x,
                          float *y, int64_t batch) {
    for (int64_t done = 0, width; done < batch; done += width) {
        width = block_width(k, batch - done);
        const struct tile tile = k->tiles[m->format][width / 2];
        const float *block = x + done * m->words * word_floats(m->format);
        int64_t r = row;
        for (; r + tile.height <= end; r += tile.height) tile.many(m, r, block, y + done * m->step);
        for (; r < end; r++) tile.one(m, r, block, y + done * m->step);
    }
}

static void multiply_block(const struct kernels *k, const struct matrix *m, int64_t block, const float *x, float *y,
                           int64_t batch) {
    const int64_t row = block * HIGHEST_TILE, left = m->rows - row;
    multiply_rows(k, m, row, row + (left < HIGHEST_TILE ? left : HIGHEST_TILE), x, y, batch);
}

static int64_t row_blocks(const struct matrix *m) { return (m->rows + HIGHEST_TILE - 1) / HIGHEST_TILE; }

/* Floats that the packed vectors take, to a whole number of cache lines. */
static int64_t packed_floats(const struct matrix *m, int64_t batch) {
    const int64_t line = WORD / sizeof(float);
    return (batch * m->words * word_floats(m->format) + line - 1) / line * line;
}

/* Packs x for each matrix in turn at `memory`, but for those that take it as the one before does. */
static void pack_for_all(const struct kernels *k, const struct matrix *all, int count, const float *x, int64_t batch,
                         float *memory, const float *packed[]) {
    for (int i = 0; i < count; i++) {
        packed[i] = i && all[i].format == all[i - 1].format ? packed[i - 1] : memory;
        if (packed[i] != memory) continue;
        if (all[i].format == DENSE_INT4) round_vectors(k, &all[i], x, batch, (void *)memory);
        else pack_vectors(k, &all[i], x, batch, memory);
        memory += packed_floats(&all[i], batch);
    }
}

void secateurs_multiply_all(int level, int threads, const struct matrix *const *matrices, int count, const float *x,
                            float *y, int64_t batch, int64_t step) {
    const struct kernels *k = &kernels[level > 0 && level < LEVELS && kernels[level].lanes ? level : PORTABLE];
    struct matrix all[MOST_MATRICES];
    const float *packed[MOST_MATRICES];
    float *to[MOST_MATRICES];
    int64_t floats = 0, rows = 0, products = 0;
    for (int i = 0; i < count; i++) {
        all[i] = *matrices[i];
        all[i].words = (all[i].columns + WORD - 1) / WORD;
        all[i].step = step;
        to[i] = y + rows;
        rows += all[i].rows;
        floats += packed_floats(&all[i], batch);
        products += batch * all[i].rows * all[i].columns;
    }
    void *memory = malloc((size_t)floats * sizeof(float) + WORD);
    if (!products || !memory) { /* NaN without memory: without an error code, be seen */
        for (int64_t b = 0; b < batch; b++) memset(y + b * step, memory ? 0 : 0xff, (size_t)rows * sizeof(float));
        free(memory);
        return;
    }
    pack_for_all(k, all, count, x, batch, (float *)(((uintptr_t)memory + WORD - 1) / WORD * WORD), packed);
    if (threads < 0) threads = products < ALONE_BELOW ? 1 : -threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    for (int i = 0; i < count; i++) {
        const int64_t blocks = row_blocks(&all[i]);
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
        for (int64_t block = 0; block < blocks; block++) multiply_block(k, &all[i], block, packed[i], to[i], batch);
    }
    free(memory);
}

EXPORT void secateurs_multiply(int level, int threads, const struct matrix *m, const float *x, float *y,
                               int64_t batch) {
    secateurs_multiply_all(level, threads, &m, 1, x, y, batch, m->rows);
}

/* The highest level this processor can run; the functions below take it or a lower one that it supports. */
EXPORT int secateurs_level(void) {
#ifdef ON_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return __builtin_cpu_supports("avx512vbmi2") ? VBMI2 : AVX512;
    if (avx2) return AVX2;
#endif
#ifdef ON_ARM
    return NEON;
#endif
    return PORTABLE;
}

EXPORT const char *secateurs_level_name(int level) {
    static const char *const names[LEVELS] = {"portable", "avx2", "avx512", "avx512vbmi2", "neon"};
    return level >= 0 && level < LEVELS ? names[level] : "unknown";
}

/* The weights themselves, for products with so many vectors that another library does them better. */
INLINE void expand_packed_row(enum format format, const struct matrix *m, int64_t row, float scale, float *weights) {
    struct cursor cursor = row_cursor(format, m, row);
    memset(weights, 0, (size_t)m->columns * sizeof(float));
    for (int64_t word = 0; word < m->words; word++, weights += WORD)
        for (uint64_t kept = m->bits[row * m->words + word]; kept; kept &= kept - 1)
            weights[__builtin_ctzll(kept)] = next_weight(format, &cursor) * scale;
}

INLINE void expand_half_row(enum format format, const struct matrix *m, int64_t row, float scale, float *weights) {
    struct cursor cursor = half_cursor(format, m, row);
    memset(weights, 0, (size_t)m->columns * sizeof(float));
    for (int64_t column = 0; column < m->columns; column += GROUP) {
        for (int k = 0, place; k < KEPT; k++) {
            float weight = half_weight(format, &cursor, row, k, &place) * scale;
            if (column + place < m->columns) weights[column + place] += weight;
        }
        next_group(format, &cursor);
    }
}

#ifdef ON_X86
AVX2_CODE INLINE void avx2_expand_packed_row(enum format format, const struct matrix *m, int64_t row, float scale,
                                             float *weights) {
    struct cursor cursor = row_cursor(format, m, row);
    for (int64_t column = 0; column < m->columns; column += WORD) {
        const int64_t left = m->columns - column;
        float last[WORD], *to = left < WORD ? last : weights + column;
        UNROLL for (int group = 0; group < 8; group++)
            _mm256_storeu_ps(to + 8 * group, _mm256_mul_ps(avx2_fetch(format, &cursor, group), _mm256_set1_ps(scale)));
        next_word(format, &cursor);
        if (left < WORD) memcpy(weights + column, last, (size_t)left * sizeof(float));
    }
}

/* Of a group, each of the four weights a row keeps is put where its place is one of the columns' numbers. */
AVX2_CODE INLINE void avx2_expand_half_row(enum format format, const struct matrix *m, int64_t row, float scale,
                                           float *weights) {
    struct cursor cursor = half_cursor(format, m, row);
    const int first = (int)(row % 2) * KEPT;
    const __m256i columns = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), lowest = _mm256_set1_epi32(GROUP - 1);
    for (int64_t column = 0; column < m->columns; column += GROUP, next_group(format, &cursor)) {
        __m256 all = _mm256_setzero_ps();
        UNROLL for (int k = 0; k < KEPT; k++) {
            struct cursor at = {cursor.weights + (first + k) * weight_size(format), NULL};
            __m256i place = _mm256_set1_epi32((int)(places_at(cursor.bits) >> 3 * (first + k)));
            __m256i here = _mm256_cmpeq_epi32(_mm256_and_si256(place, lowest), columns);
            __m256 weight = _mm256_set1_ps(next_weight(format, &at) * scale);
            all = _mm256_add_ps(all, _mm256_and_ps(weight, _mm256_castsi256_ps(here)));
        }
        const int64_t left = m->columns - column;
        if (left < GROUP) {
            float last[GROUP];
            _mm256_storeu_ps(last, all);
            memcpy(weights + column, last, (size_t)left * sizeof(float));
        } else _mm256_storeu_ps(weights + column, all);
    }
}
#endif

static void expand_int4_row(const struct matrix *m, int64_t row, float *weights) {
    const uint8_t *pairs = int4_row(m, row);
    for (int64_t word = 0; word < m->words; word++, pairs += WORD / 2, weights += WORD) {
        const float scale = from_bf16(m->scales + row * m->words + word);
        const int64_t left = m->columns - word * WORD;
        float all[WORD];
        for (int j = 0; j < WORD / 2; j++) { /* without branches, so that compilers take many at once */
            all[j] = (float)((pairs[j] & 15) - 8) * scale;
            all[WORD / 2 + j] = (float)((pairs[j] >> 4) - 8) * scale;
        }
        memcpy(weights, all, (size_t)(left < WORD ? left : WORD) * sizeof(float));
    }
}

static void expand_int8_row(const struct matrix *m, int64_t row, float *weights) {
    const int8_t *whole = (const int8_t *)m->weights + row * m->columns;
    for (int64_t j = 0; j < m->columns; j++) weights[j] = (float)whole[j] * m->scale[row];
}

typedef void expand_function(const struct matrix *m, int64_t row, float *weights);
#define EXPAND(code, name, format, by)                                                                                 \
    code static void name##_##format(const struct matrix *m, int64_t row, float *weights) {                            \
        by(format, m, row, is_int8(format) ? m->scale[row] : 1, weights);                                              \
    }
#define EXPANDERS(code, name)                                                                                          \
    EXPAND(code, name, PACKED_BF16, name##_packed_row)                                                                 \
    EXPAND(code, name, PACKED_INT8, name##_packed_row)                                                                 \
    EXPAND(code, name, HALF_BF16, name##_half_row)                                                                     \
    EXPAND(code, name, HALF_INT8, name##_half_row)                                                                     \
    static expand_function *const name##ers[FORMATS] = {                                                               \
        [PACKED_BF16] = name##_PACKED_BF16, [PACKED_INT8] = name##_PACKED_INT8, [DENSE_INT8] = expand_int8_row,        \
        [HALF_BF16] = name##_HALF_BF16,     [HALF_INT8] = name##_HALF_INT8,     [DENSE_INT4] = expand_int4_row,        \
    };

EXPANDERS(, expand)
#ifdef ON_X86
EXPANDERS(AVX2_CODE, avx2_expand)
#endif

/* Of any format but dense bfloat16. */
EXPORT void secateurs_expand(int level, int threads, const struct matrix *matrix, float *out) {
    struct matrix m = *matrix;
    m.words = (m.columns + WORD - 1) / WORD;
    expand_function *row_of = expanders[m.format];
    (void)level;
#ifdef ON_X86
    if (level >= AVX2) row_of = avx2_expanders[m.format];
#endif
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#else
    (void)threads;
#endif
    for (int64_t row = 0; row < m.rows; row++) row_of(&m, row, out + row * m.columns);
}
