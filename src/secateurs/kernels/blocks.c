/*
 * All blocks of a decoder with one token of each of a few rows, in float32, in one call. Between the products lies
 * little arithmetic, which takes as long as they do when it is done in fifty small steps a block by a general library.
 */
#include "floats.h"

#include <stdlib.h>

INLINE floats spread(float value) { return (floats){} + value; }

INLINE floats load_first(const float *from, int64_t count) {
    floats out = {0};
    memcpy(&out, from, (size_t)count * sizeof *from);
    return out;
}

INLINE void store_first(float *to, floats values, int64_t count) { memcpy(to, &values, (size_t)count * sizeof *to); }

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* The sums of eight vectors, in their order: halves of two are added into one, three times. */
INLINE floats eight_sums(const floats v[LANES]) {
    floats two[4], four[2];
    UNROLL for (int i = 0; i < 4; i++)
        two[i] = PICK(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
                 PICK(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    UNROLL for (int i = 0; i < 2; i++)
        four[i] = PICK(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                  PICK(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return PICK(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) + PICK(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

INLINE floats choose(ints where, floats yes, floats no) { return (floats)((where & (ints)yes) | (~where & (ints)no)); }

INLINE float dot(const float *a, const float *b, int64_t count) {
    floats sums = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums += load(a + i) * load(b + i);
    if (i < count) sums += load_first(a + i, count - i) * load_first(b + i, count - i);
    return sum(sums);
}

/* e^x within 2 units in the last place: 2^n times a polynomial on half an octave. Far below it is 0, of NaN NaN */
INLINE floats exponential(floats x) {
    const float to_integer = 12582912; /* 3 * 2^22: after it is added, the lowest bits are the nearest integer */
    floats inside = choose(x < -87, spread(-87), choose(x > 88, spread(88), x));
    floats moved = inside * 1.44269504f + to_integer, n = moved - to_integer;
    floats rest = inside - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first with few bits */
    floats p = spread(1.0f / 5040);
    p = p * rest + 1.0f / 720;
    p = p * rest + 1.0f / 120;
    p = p * rest + 1.0f / 24;
    p = p * rest + 1.0f / 6;
    p = p * rest + 0.5f;
    p = p * rest + 1;
    p = p * rest + 1;
    p = (floats)((ints)p + ((ints)moved << 23));
    return choose(x != x, x, choose(x < -87, spread(0), p));
}

/* x over its root mean square, times a weight. */
INLINE void normed_row(const float *x, const float *weight, float eps, int64_t width, float *y) {
    const floats scale = spread(1 / __builtin_sqrtf(dot(x, x, width) / (float)width + eps));
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < width; i++) y[i] = x[i] * scale[0] * weight[i];
}

INLINE void normed(const float *x, const float *weight, float eps, float *y, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++) normed_row(x + row * width, weight, eps, width, y + row * width);
}

/*
 * Heads [rows, queries + keys + values, width], in place: queries and keys are normed if there are weights for it, and
 * turned: half of a head is real parts, the other imaginary ones, of numbers to be multiplied with cos + i sin [rows or
 * 1, width].
 */
INLINE void turned(float *heads, const float *query_norm, const float *key_norm, float eps, const float *cosine,
                   const float *sine, int64_t angle_step, int64_t rows, int64_t queries, int64_t keys,
                   int64_t width) {
    const int64_t count = queries + 2 * keys, half = width / 2;
    for (int64_t row = 0; row < rows; row++, cosine += angle_step, sine += angle_step) {
        float *head = heads + row * count * width;
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

/*
 * Attention reads keys and values once, a part of them at a time that the first cache holds. Its tiles are a few heads
 * and tokens with eight sums between them: 4 heads and 2 tokens, 2 and 4, or 1 and 8, so that any number of heads is
 * some tiles. Scores lie as tiles make them: those of a token's heads together, token after token.
 */
enum { PART = 64 };

struct group {
    const float *queries, *keys, *values;
    int64_t key_step, value_step; /* floats from token to token */
    const uint8_t *seen;          /* may be NULL */
    float scale, *out;
    int64_t tokens, width;
};

/* Scores of all tokens of a part with the first `heads` queries; -infinity of those that are not seen or not there. */
INLINE void score(int heads, const struct group *g, const float *queries, int64_t from, float *scores) {
    const int together = LANES / heads;
    const int64_t end = from + PART < g->tokens ? from + PART : g->tokens;
    for (int64_t t = from; t < end; t += together) {
        const float *keys[LANES];
        floats sums[LANES];
        UNROLL for (int k = 0; k < together; k++)
            keys[k] = g->keys + (t + k < g->tokens ? t + k : g->tokens - 1) * g->key_step;
        UNROLL for (int k = 0; k < LANES; k++) sums[k] = spread(0);
        int64_t i = 0;
        for (; i + LANES <= g->width; i += LANES)
            UNROLL for (int k = 0; k < together; k++) {
                const floats key = load(keys[k] + i);
                UNROLL for (int h = 0; h < heads; h++) sums[k * heads + h] += key * load(queries + h * g->width + i);
            }
        if (i < g->width)
            UNROLL for (int k = 0; k < together; k++) {
                const floats key = load_first(keys[k] + i, g->width - i);
                UNROLL for (int h = 0; h < heads; h++)
                    sums[k * heads + h] += key * load_first(queries + h * g->width + i, g->width - i);
            }
        store(scores + t * heads, eight_sums(sums) * g->scale);
        if (!g->seen && t + together <= g->tokens) continue;
        UNROLL for (int k = 0; k < together; k++)
            if (t + k >= g->tokens || (g->seen && !g->seen[t + k]))
                UNROLL for (int h = 0; h < heads; h++) scores[(t + k) * heads + h] = -__builtin_inff();
    }
}

/* Scores become weights; of each head their sum is 1, or 0 where nothing is seen. */
INLINE void soften(int heads, int64_t tokens, float *scores) {
    const int64_t count = (tokens * heads + LANES - 1) / LANES * LANES;
    floats highest = load(scores), total = {0};
    for (int64_t i = LANES; i < count; i += LANES) {
        const floats score = load(scores + i);
        highest = choose(score > highest, score, highest);
    }
    for (int lane = heads; lane < LANES; lane++)
        if (highest[lane] > highest[lane % heads]) highest[lane % heads] = highest[lane];
    for (int lane = heads; lane < LANES; lane++) highest[lane] = highest[lane % heads];
    highest = choose(highest == -__builtin_inff(), spread(0), highest); /* nothing is seen: all weights are 0 */
    for (int64_t i = 0; i < count; i += LANES) {
        const floats weight = exponential(load(scores + i) - highest);
        store(scores + i, weight);
        total += weight;
    }
    for (int lane = heads; lane < LANES; lane++) total[lane % heads] += total[lane];
    for (int lane = heads; lane < LANES; lane++) total[lane] = total[lane % heads];
    total = choose(total == 0, spread(1), total);
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, load(scores + i) / total);
}

/* Adds a part's weighted values to some columns of the first `heads` results: whole vectors, or the first of one. */
INLINE void mix_columns(int heads, int vectors, int64_t left, const struct group *g, const float *values,
                        const float *weights, int64_t tokens, float *out) {
    floats sums[LANES];
    const int whole = left >= LANES * vectors;
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++) {
            const float *from = out + h * g->width + v * LANES;
            sums[h * vectors + v] = whole ? load(from) : load_first(from, left);
        }
    for (int64_t t = 0; t < tokens; t++, values += g->value_step, weights += heads)
        UNROLL for (int v = 0; v < vectors; v++) {
            const floats value = whole ? load(values + v * LANES) : load_first(values, left);
            UNROLL for (int h = 0; h < heads; h++) sums[h * vectors + v] += value * weights[h];
        }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++) {
            float *to = out + h * g->width + v * LANES;
            if (whole) store(to, sums[h * vectors + v]);
            else store_first(to, sums[h * vectors + v], left);
        }
}

INLINE void mix(int heads, const struct group *g, int64_t from, const float *scores, float *out) {
    const int vectors = LANES / heads;
    const int64_t tokens = from + PART < g->tokens ? PART : g->tokens - from;
    const float *values = g->values + from * g->value_step, *weights = scores + from * heads;
    int64_t i = 0, left = g->width;
    for (; left >= LANES * vectors; i += LANES * vectors, left -= LANES * vectors)
        mix_columns(heads, vectors, left, g, values + i, weights, tokens, out + i);
    for (; left > 0; i += LANES, left -= LANES)
        mix_columns(heads, 1, left, g, values + i, weights, tokens, out + i);
}

/* What the heads of a group, which share keys and values, see: values weighted by the softmax of their scores. */
INLINE void attended(const struct group *g, int64_t heads, float *scores) {
    const int64_t padded = (g->tokens + LANES - 1) / LANES * LANES;
#define BY_HEADS(step)                                                       \
    for (int64_t h = 0; h < heads; h += heads - h >= 4 ? 4 : heads - h >= 2 ? 2 : 1) { \
        float *of = scores + h * padded;                                     \
        if (heads - h >= 4) step(4);                                         \
        else if (heads - h >= 2) step(2);                                    \
        else step(1);                                                        \
    }
#define SCORE(count) score(count, g, g->queries + h * g->width, from, of)
#define SOFTEN(count) soften(count, g->tokens, of)
#define MIX(count) mix(count, g, from, of, g->out + h * g->width)
    for (int64_t from = 0; from < g->tokens; from += PART) BY_HEADS(SCORE)
    BY_HEADS(SOFTEN)
    memset(g->out, 0, (size_t)(heads * g->width) * sizeof *g->out);
    for (int64_t from = 0; from < g->tokens; from += PART) BY_HEADS(MIX)
}

INLINE floats silu(floats x) { return choose(x < -88, spread(0), x / (1 + exponential(-x))); }

/* silu(gate) * up of rows [gate, up], of `width` numbers each. */
INLINE void gated(const float *both, float *y, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++, both += 2 * width, y += width) {
        const float *up = both + width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(y + i, silu(load(both + i)) * load(up + i));
        const int64_t left = width - i;
        if (left) store_first(y + i, silu(load_first(both + i, left)) * load_first(up + i, left), left);
    }
}

BOTH(normed, (const float *x, const float *weight, float eps, float *y, int64_t rows, int64_t width),
     (x, weight, eps, y, rows, width))

BOTH(turned,
     (float *heads, const float *query_norm, const float *key_norm, float eps, const float *cosine, const float *sine,
      int64_t angle_step, int64_t rows, int64_t queries, int64_t keys, int64_t width),
     (heads, query_norm, key_norm, eps, cosine, sine, angle_step, rows, queries, keys, width))

BOTH(attended, (const struct group *g, int64_t heads, float *scores), (g, heads, scores))

BOTH(gated, (const float *both, float *y, int64_t rows, int64_t width), (both, y, rows, width))

/* Adds rows [rows, width], or one for all of them, or nothing, to numbers whose rows are `step` apart. */
static void add(float *to, int64_t step, const float *added, int64_t added_step, int64_t rows, int64_t width) {
    if (!added) return;
    for (int64_t row = 0; row < rows; row++, to += step, added += added_step)
        for (int64_t i = 0; i < width; i++) to[i] += added[i];
}

/* A decoder block, as Python fills it in (kernels/blocks.py). Biases and norms of heads may be NULL. */
struct block {
    const struct matrix *queries, *keys, *values, *output, *gate, *up, *down;
    const float *query_bias, *key_bias, *value_bias, *output_bias, *gate_bias, *up_bias, *down_bias;
    const float *norm, *mlp_norm, *query_norm, *key_norm;
    float *stored_keys, *stored_values; /* [rows, key heads, tokens, width]: the last token's are written */
    int64_t key_row, key_head, key_token, value_row, value_head, value_token; /* floats from one to the next */
    int64_t tokens, window; /* of which the last are seen; 0: all */
    float norm_eps, mlp_eps, head_eps, scale;
};

/* What all blocks share: a token of each row. */
struct step {
    int level, threads;
    int64_t rows, width; /* of a head */
    const float *cosine, *sine;
    int64_t angle_row;
    const uint8_t *seen; /* [rows, masked]: of which tokens, the last of them last; or NULL, all */
    int64_t masked;
};

/* Heads of queries, keys and values of normed x; the keys and values are stored. */
static void before_attention(const struct step *s, const struct block *b, const float *x, float *normed_x,
                             float *heads) {
    const struct matrix *const layers[] = {b->queries, b->keys, b->values};
    const float *const biases[] = {b->query_bias, b->key_bias, b->value_bias};
    const int64_t step = b->queries->rows + b->keys->rows + b->values->rows;
    AT_LEVEL(s->level, normed, x, b->norm, b->norm_eps, normed_x, s->rows, b->queries->columns);
    secateurs_multiply_all(s->level, s->threads, layers, 3, normed_x, heads, s->rows, step);
    float *to = heads;
    for (int i = 0; i < 3; to += layers[i++]->rows) add(to, step, biases[i], 0, s->rows, layers[i]->rows);
    const int64_t queries = b->queries->rows / s->width, keys = b->keys->rows / s->width;
    AT_LEVEL(s->level, turned, heads, b->query_norm, b->key_norm, b->head_eps, s->cosine, s->sine, s->angle_row,
             s->rows, queries, keys, s->width);
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t head = 0; head < keys; head++) {
            const float *key = heads + row * step + (queries + head) * s->width, *value = key + keys * s->width;
            float *key_to = b->stored_keys + row * b->key_row + head * b->key_head + (b->tokens - 1) * b->key_token;
            float *value_to =
                b->stored_values + row * b->value_row + head * b->value_head + (b->tokens - 1) * b->value_token;
            memcpy(key_to, key, (size_t)s->width * sizeof *key);
            memcpy(value_to, value, (size_t)s->width * sizeof *value);
        }
}

static int64_t seen_tokens(const struct block *b) {
    return b->window && b->window < b->tokens ? b->window : b->tokens;
}

/* Of one head. */
static int64_t score_floats(const struct block *b) { return (seen_tokens(b) + LANES - 1) / LANES * LANES; }

/*
 * out [rows, heads, width] of heads as before_attention leaves them. Groups of heads, which share keys, are computed
 * side by side; where there are fewer of them than threads, parts of a group, which then read the same keys.
 */
static void attention(const struct step *s, const struct block *b, const float *queries, float *scores, float *out) {
    enum { ALONE_BELOW = 1 << 14 }; /* products: a second thread takes longer to wake than these take */
    const int64_t width = s->width, kv_heads = b->keys->rows / width, heads = b->queries->rows / width / kv_heads;
    const int64_t tokens = seen_tokens(b), unseen = b->tokens - tokens, groups = s->rows * kv_heads;
    const int64_t step = b->queries->rows + b->keys->rows + b->values->rows;
    int threads = s->threads < 0 ? -s->threads : s->threads;
    if (groups * heads * tokens * width < ALONE_BELOW) threads = 1;
    const int64_t tiles = (heads + 3) / 4, wanted = (threads + groups - 1) / groups;
    const int64_t parts = wanted < tiles ? wanted : tiles, each = ((tiles + parts - 1) / parts) * 4;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
    for (int64_t which = 0; which < groups * parts; which++) {
        const int64_t group_of = which / parts, row = group_of / kv_heads, head = group_of % kv_heads;
        const int64_t first = which % parts * each, count = heads - first < each ? heads - first : each;
        if (count <= 0) continue;
        const struct group group = {
            .queries = queries + row * step + (head * heads + first) * width,
            .keys = b->stored_keys + row * b->key_row + head * b->key_head + unseen * b->key_token,
            .values = b->stored_values + row * b->value_row + head * b->value_head + unseen * b->value_token,
            .key_step = b->key_token,
            .value_step = b->value_token,
            .seen = s->seen ? s->seen + (row + 1) * s->masked - tokens : NULL,
            .scale = b->scale,
            .out = out + (group_of * heads + first) * width,
            .tokens = tokens,
            .width = width,
        };
        AT_LEVEL(s->level, attended, &group, count, scores + (group_of * heads + first) * score_floats(b));
    }
}

/* x += the output layer of what was attended to; then += a gated MLP of that, normed. */
static void after_attention(const struct step *s, const struct block *b, const float *seen, float *products,
                            float *normed_x, float *gates, float *inside, float *x) {
    const struct matrix *const both[] = {b->gate, b->up};
    const int64_t rows = s->rows, width = b->output->rows, inner = b->gate->rows;
    secateurs_multiply_all(s->level, s->threads, &b->output, 1, seen, products, rows, width);
    add(products, width, b->output_bias, 0, rows, width);
    add(x, width, products, width, rows, width);
    AT_LEVEL(s->level, normed, x, b->mlp_norm, b->mlp_eps, normed_x, rows, width);
    secateurs_multiply_all(s->level, s->threads, both, 2, normed_x, gates, rows, 2 * inner);
    add(gates, 2 * inner, b->gate_bias, 0, rows, inner);
    add(gates + inner, 2 * inner, b->up_bias, 0, rows, inner);
    AT_LEVEL(s->level, gated, gates, inside, rows, inner);
    secateurs_multiply_all(s->level, s->threads, &b->down, 1, inside, products, rows, width);
    add(products, width, b->down_bias, 0, rows, width);
    add(x, width, products, width, rows, width);
}

/*
 * x [rows, stream] goes through all blocks, in place. Level 0 is plain code, another what secateurs_level found; less
 * than no threads are at most as many.
 */
EXPORT void secateurs_blocks(int level, int threads, const struct block *blocks, int64_t count, float *x, int64_t rows,
                             int64_t width, const float *cosine, const float *sine, int64_t angle_row,
                             const uint8_t *seen, int64_t masked) {
    const struct step step = {level, threads, rows, width, cosine, sine, angle_row, seen, masked};
    for (const struct block *b = blocks; b < blocks + count; b++) {
        const int64_t stream = b->output->rows, queries = b->queries->rows, inner = b->gate->rows;
        const int64_t heads = queries + b->keys->rows + b->values->rows, scored = queries / width * score_floats(b);
        float *scratch = malloc((size_t)(rows * (2 * stream + heads + queries + 3 * inner + scored)) * sizeof *x);
        if (!scratch) {
            memset(x, 0xff, (size_t)(rows * stream) * sizeof *x); /* NaN, to be seen */
            return;
        }
        float *normed_x = scratch, *products = normed_x + rows * stream, *projected = products + rows * stream;
        float *attended_to = projected + rows * heads, *gates = attended_to + rows * queries;
        float *inside = gates + 2 * rows * inner, *scores = inside + rows * inner;
        before_attention(&step, b, x, normed_x, projected);
        attention(&step, b, projected, scores, attended_to);
        after_attention(&step, b, attended_to, products, normed_x, gates, inside, x);
        free(scratch);
    }
}
