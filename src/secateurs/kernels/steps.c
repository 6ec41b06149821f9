/*
 * What a decoder block does between its products with one token of each of a few rows, in float32: each step in one
 * pass. Small steps cost little arithmetic and, one by one through a general library, as much time as the products.
 *
 * Vectors of eight floats are the compiler's own (an AVX register, or two of SSE or NEON). On x86 every step is
 * compiled twice, and runs with AVX2 where the processor has it.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */

enum { LANES = 8 };
typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));

INLINE floats load(const float *from) {
    floats out;
    memcpy(&out, from, sizeof out);
    return out;
}

INLINE void store(float *to, floats values) { memcpy(to, &values, sizeof values); }

INLINE floats all(float value) { return (floats){} + value; }

INLINE floats load_first(const float *from, int64_t count) {
    floats out = {0};
    memcpy(&out, from, (size_t)count * sizeof *from);
    return out;
}

INLINE void store_first(float *to, floats values, int64_t count) { memcpy(to, &values, (size_t)count * sizeof *to); }

INLINE float sum(const floats values) {
    return ((values[0] + values[4]) + (values[2] + values[6])) + ((values[1] + values[5]) + (values[3] + values[7]));
}

INLINE floats choose(ints where, floats yes, floats no) { return (floats)((where & (ints)yes) | (~where & (ints)no)); }

INLINE float dot(const float *a, const float *b, int64_t count) {
    floats sums = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums += load(a + i) * load(b + i);
    if (i < count) sums += load_first(a + i, count - i) * load_first(b + i, count - i);
    return sum(sums);
}

/* e^x within 2 units in the last place: 2^n times a polynomial on half an octave to either side. 0 far below, NaN stays. */
INLINE floats exponential(floats x) {
    const float to_integer = 12582912; /* 3 * 2^22: after it is added, the lowest bits are the nearest integer */
    floats inside = choose(x < -87, all(-87), choose(x > 88, all(88), x));
    floats moved = inside * 1.44269504f + to_integer, n = moved - to_integer;
    floats rest = inside - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first with few bits */
    floats p = all(1.0f / 5040);
    p = p * rest + 1.0f / 720;
    p = p * rest + 1.0f / 120;
    p = p * rest + 1.0f / 24;
    p = p * rest + 1.0f / 6;
    p = p * rest + 0.5f;
    p = p * rest + 1;
    p = p * rest + 1;
    p = (floats)((ints)p + ((ints)moved << 23));
    return choose(x != x, x, choose(x < -87, all(0), p));
}

/* rows of x are divided by their root mean square and multiplied with a weight. */
INLINE void normed_row(const float *x, const float *weight, float eps, int64_t width, float *y) {
    const floats scale = all(1 / __builtin_sqrtf(dot(x, x, width) / (float)width + eps));
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < width; i++) y[i] = x[i] * scale[0] * weight[i];
}

INLINE void normed(const float *x, const float *weight, float eps, float *y, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++) normed_row(x + row * width, weight, eps, width, y + row * width);
}

/*
 * Heads [rows, queries + keys + values, width], in place: a bias is added to all; queries and keys are normed if there
 * are weights for it, and turned: half of a head is real parts, the other imaginary ones, of numbers to be multiplied
 * with cos + i sin [rows or 1, width].
 */
INLINE void turned(float *heads, const float *bias, const float *query_norm, const float *key_norm, float eps,
                   const float *cosine, const float *sine, int64_t angle_step, int64_t rows, int64_t queries,
                   int64_t keys, int64_t width) {
    const int64_t count = queries + 2 * keys, half = width / 2;
    for (int64_t row = 0; row < rows; row++, cosine += angle_step, sine += angle_step) {
        float *head = heads + row * count * width;
        if (bias)
            for (int64_t i = 0; i < count * width; i++) head[i] += bias[i];
        for (int64_t h = 0; h < queries + keys; h++, head += width) {
            if (query_norm) normed_row(head, h < queries ? query_norm : key_norm, eps, width, head);
            for (int64_t i = 0; i < half; i++) {
                const float real = head[i], imaginary = head[i + half];
                head[i] = real * cosine[i] - imaginary * sine[i];
                head[i + half] = imaginary * cosine[i + half] + real * sine[i + half];
            }
        }
    }
}

/* What the heads of one group, which share keys and values, see of them: weighted by the softmax of their products. */
INLINE void attended(const float *queries, const float *keys, int64_t key_step, const float *values, int64_t value_step,
                     const uint8_t *seen, const float *added, float scale, float *scores, float *out, int64_t heads,
                     int64_t tokens, int64_t width) {
    const int64_t padded = (tokens + LANES - 1) / LANES * LANES;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            float score = dot(queries + h * width, keys + t * key_step, width) * scale;
            if (added) score += added[t];
            scores[h * padded + t] = seen && !seen[t] ? -__builtin_inff() : score;
        }
    for (int64_t h = 0; h < heads; h++) {
        float *weights = scores + h * padded;
        float highest = weights[0];
        for (int64_t t = 1; t < tokens; t++) highest = weights[t] > highest ? weights[t] : highest;
        for (int64_t t = tokens; t < padded; t++) weights[t] = -__builtin_inff();
        floats total = {0};
        for (int64_t t = 0; t < padded; t += LANES) {
            floats weight = exponential(load(weights + t) - highest);
            store(weights + t, weight);
            total += weight;
        }
        const float whole = sum(total);
        float *to = out + h * width;
        memset(to, 0, (size_t)width * sizeof *to);
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) {
            const float *from = values + t * value_step;
            const float a = weights[t], b = weights[t + 1], c = weights[t + 2], d = weights[t + 3];
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES)
                store(to + i, load(to + i) + (a * load(from + i) + b * load(from + value_step + i)) +
                                  (c * load(from + 2 * value_step + i) + d * load(from + 3 * value_step + i)));
            for (; i < width; i++)
                to[i] += (a * from[i] + b * from[value_step + i]) +
                         (c * from[2 * value_step + i] + d * from[3 * value_step + i]);
        }
        for (; t < tokens; t++)
            for (int64_t i = 0; i < width; i++) to[i] += weights[t] * values[t * value_step + i];
        for (int64_t i = 0; i < width; i++) to[i] /= whole;
    }
}

/* silu(gate) * up of rows [gate, up], of `width` numbers each. */
INLINE void gated(const float *both, float *y, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++, both += 2 * width, y += width)
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t left = width - i < LANES ? width - i : LANES;
            floats gate = load_first(both + i, left), up = load_first(both + width + i, left);
            store_first(y + i, gate / (1 + exponential(-gate)) * up, left);
        }
}

#ifdef __x86_64__
#define WITH_AVX2 __attribute__((target("avx2,fma")))
#define AT_LEVEL(level, name, ...) \
    if (level) name##_avx2(__VA_ARGS__); \
    else name##_plain(__VA_ARGS__)
#define BOTH(name, parameters, arguments) \
    static void name##_plain parameters { name arguments; } \
    WITH_AVX2 static void name##_avx2 parameters { name arguments; }
#else
#define AT_LEVEL(level, name, ...) \
    (void)(level); \
    name(__VA_ARGS__)
#define BOTH(name, parameters, arguments)
#endif

BOTH(normed, (const float *x, const float *weight, float eps, float *y, int64_t rows, int64_t width),
     (x, weight, eps, y, rows, width))

BOTH(turned,
     (float *heads, const float *bias, const float *query_norm, const float *key_norm, float eps, const float *cosine,
      const float *sine, int64_t angle_step, int64_t rows, int64_t queries, int64_t keys, int64_t width),
     (heads, bias, query_norm, key_norm, eps, cosine, sine, angle_step, rows, queries, keys, width))

BOTH(attended,
     (const float *queries, const float *keys, int64_t key_step, const float *values, int64_t value_step,
      const uint8_t *seen, const float *added, float scale, float *scores, float *out, int64_t heads, int64_t tokens,
      int64_t width),
     (queries, keys, key_step, values, value_step, seen, added, scale, scores, out, heads, tokens, width))

BOTH(gated, (const float *both, float *y, int64_t rows, int64_t width), (both, y, rows, width))

/* Level 0 is plain code, another what secateurs_level found. */
EXPORT void secateurs_normed(int level, const float *x, const float *weight, float eps, float *y, int64_t rows,
                             int64_t width) {
    AT_LEVEL(level, normed, x, weight, eps, y, rows, width);
}

EXPORT void secateurs_turned(int level, float *heads, const float *bias, const float *query_norm,
                             const float *key_norm, float eps, const float *cosine, const float *sine,
                             int64_t angle_step, int64_t rows, int64_t queries, int64_t keys, int64_t width) {
    AT_LEVEL(level, turned, heads, bias, query_norm, key_norm, eps, cosine, sine, angle_step, rows, queries, keys,
             width);
}

/*
 * Attention of one token a row. queries [rows, kv_heads * heads, width] are query_step floats apart from row to row,
 * keys and values [rows, kv_heads, tokens, width] as their steps say; out [rows, kv_heads * heads, width] is dense.
 * Tokens are seen where the bytes of `seen` are not zero, and `added` goes to their scores; either may be NULL, and has
 * mask_step elements from row to row.
 */
EXPORT void secateurs_attended(int level, int threads, const float *queries, int64_t query_step, const float *keys,
                               int64_t key_row, int64_t key_head, int64_t key_token, const float *values,
                               int64_t value_row, int64_t value_head, int64_t value_token, const uint8_t *seen,
                               const float *added, int64_t mask_step, float scale, float *out, int64_t rows,
                               int64_t kv_heads, int64_t heads, int64_t tokens, int64_t width) {
    const int64_t size = heads * ((tokens + LANES - 1) / LANES * LANES);
    float *scores = malloc((size_t)(rows * kv_heads * size) * sizeof *scores);
    if (!scores) {
        memset(out, 0xff, (size_t)(rows * kv_heads * heads * width) * sizeof *out); /* NaN, to be seen */
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#else
    (void)threads;
#endif
    for (int64_t which = 0; which < rows * kv_heads; which++) {
        const int64_t row = which / kv_heads, head = which % kv_heads;
        AT_LEVEL(level, attended, queries + row * query_step + head * heads * width,
                 keys + row * key_row + head * key_head, key_token, values + row * value_row + head * value_head,
                 value_token, seen ? seen + row * mask_step : NULL, added ? added + row * mask_step : NULL, scale,
                 scores + which * size, out + which * heads * width, heads, tokens, width);
    }
    free(scores);
}

EXPORT void secateurs_gated(int level, const float *both, float *y, int64_t rows, int64_t width) {
    AT_LEVEL(level, gated, both, y, rows, width);
}
