/*
 * What solvers do between matrix products on a CPU, in float32: SparseGPT's columns, and conjugate gradients whose steps
 * begin with what solving for one weight after the other would do. A general library goes through whole matrices for
 * each small operation of these; here a part of one stays in the nearest cache until all is done to it.
 */
#include "floats.h"

#include <stdlib.h>

#ifdef _OPENMP
int omp_get_thread_num(void);
#else
#define omp_get_thread_num() 0
#endif

enum { ROWS = 4 * LANES }; /* of the weight, at a time */
typedef uint8_t bytes __attribute__((vector_size(LANES)));

/* Ones and zeros. */
INLINE floats flags(const uint8_t *from) {
    bytes out;
    memcpy(&out, from, sizeof out);
    return __builtin_convertvector(out, floats);
}

/* As secateurs_sweep, of ROWS rows, whose `width` columns are in `tile` meanwhile. */
INLINE void sweep_rows(float *tile, float *w, const uint8_t *pruned, const float *strength, const float *u,
                       float *errors, int64_t count, int64_t width, int64_t step) {
    for (int64_t j = 0; j < width; j++) memcpy(tile + j * ROWS, w + j * step, ROWS * sizeof *tile);
    for (int64_t i = 0; i < count; i++) {
        floats error[ROWS / LANES];
        UNROLL for (int part = 0; part < ROWS / LANES; part++) {
            error[part] = load(tile + i * ROWS + part * LANES) * (flags(pruned + i * step + part * LANES) * strength[i]);
            store(errors + i * step + part * LANES, error[part]);
        }
        for (int64_t j = i; j < width; j++)
            UNROLL for (int part = 0; part < ROWS / LANES; part++) {
                float *at = tile + j * ROWS + part * LANES;
                store(at, load(at) - u[i * width + j] * error[part]);
            }
    }
    for (int64_t j = 0; j < width; j++) memcpy(w + j * step, tile + j * ROWS, ROWS * sizeof *tile);
}

/* The same, of one row. */
static void sweep_row(float *w, const uint8_t *pruned, const float *strength, const float *u, float *errors,
                      int64_t count, int64_t width, int64_t step) {
    for (int64_t i = 0; i < count; i++) {
        float error = errors[i * step] = w[i * step] * (pruned[i * step] * strength[i]);
        for (int64_t j = i; j < width; j++) w[j * step] -= u[i * width + j] * error;
    }
}

BOTH(sweep_rows,
     (float *tile, float *w, const uint8_t *pruned, const float *strength, const float *u, float *errors,
      int64_t count, int64_t width, int64_t step),
     (tile, w, pruned, strength, u, errors, count, width, step))

/* See kernels/solve.py. Levels are those of secateurs_level. */
EXPORT void secateurs_sweep(int level, int threads, float *w, const uint8_t *pruned, const float *strength,
                            const float *u, float *errors, int64_t count, int64_t width, int64_t d_out) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *tile = malloc((size_t)width * ROWS * sizeof *tile);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < d_out; row += ROWS) {
            if (tile && row + ROWS <= d_out)
                AT_LEVEL(level, sweep_rows, tile, w + row, pruned + row, strength, u, errors + row, count,
                         width, d_out);
            else
                for (int64_t one = row; one < d_out && one < row + ROWS; one++)
                    sweep_row(w + one, pruned + one, strength, u, errors + one, count, width, d_out);
        }
        free(tile);
    }
}

enum {
    BLOCK = 64, /* columns at a time, in whole panels */
    PANEL = 8, /* of an ordered Gram: that many rows, number by number of a row beside each other */
};

/* Of an ordered Gram: a row and those after it in its panel, from column k on. */
INLINE const float *at(const float *gram, int64_t row, int64_t k, int64_t d_in) {
    return gram + (row / PANEL * d_in + k) * PANEL + row % PANEL;
}

#define PARTS 3
#define COLUMNS 4

typedef float narrow __attribute__((vector_size(16)));
#define VECTOR narrow
#define WIDTH 4
#define CODE
#define IN(name) plain_##name
#include "descend.h"

#ifdef __x86_64__
#define VECTOR floats
#define WIDTH LANES
#define CODE WITH_AVX2
#define IN(name) avx2_##name
#include "descend.h"

#undef COLUMNS
#define COLUMNS 8
typedef float wide __attribute__((vector_size(64)));
#define VECTOR wide
#define WIDTH 16
#define CODE __attribute__((target("avx2,fma,avx512f,avx512vl")))
#define IN(name) avx512_##name
#include "descend.h"
#endif

/* See kernels/solve.py: an ordered Gram in `count` panels, zeros where there are no inputs. */
EXPORT void secateurs_order(int threads, const float *gram, const int64_t *order, const float *inverse, float *panels,
                            int64_t inputs, int64_t count) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t panel = 0; panel < count; panel++)
        for (int64_t k = 0; k < count * PANEL; k++)
            for (int64_t i = 0; i < PANEL; i++) {
                int64_t row = panel * PANEL + i, there = row < inputs && k < inputs;
                panels[(panel * count * PANEL + k) * PANEL + i] =
                    there ? gram[order[row] * inputs + order[k]] * inverse[order[row]] * inverse[order[k]] : 0;
            }
}

typedef void descend_rows(const float *, const int64_t *, const uint8_t *, float *, float *, int64_t, int64_t, float,
                          int64_t, int64_t);

/* See kernels/solve.py. Levels are those of secateurs_level. */
EXPORT void secateurs_descend(int level, int threads, const float *gram, const int64_t *order, const uint8_t *kept,
                              float *moved, float *room, float tolerance, int64_t steps, int64_t rows,
                              int64_t inputs, int64_t count) {
    int64_t d_in = count * PANEL;
    descend_rows *some = plain_descend_rows;
    int64_t at_once = plain_rows;
#ifdef __x86_64__
    if (level >= 2) some = avx512_descend_rows, at_once = avx512_rows;
    else if (level == 1) some = avx2_descend_rows, at_once = avx2_rows;
#else
    (void)level;
#endif
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row += at_once)
        some(gram, order, kept + row * inputs, moved + row * inputs, room + omp_get_thread_num() * at_once * d_in * 6,
             rows - row < at_once ? rows - row : at_once, steps, tolerance, d_in, inputs);
}
