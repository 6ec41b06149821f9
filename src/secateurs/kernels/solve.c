/*
 * What solvers do between matrix products on a CPU, in float32: SparseGPT's columns, and a step of conjugate gradients.
 * A general library goes through whole matrices for each small operation of these; here a part of one stays in the
 * nearest cache until all is done to it.
 */
#include "floats.h"

#include <stdlib.h>

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

/* As secateurs_descend, of one row. */
INLINE void descend_row(const uint8_t *kept, const float *image, float *direction, float *solution, float *residual,
                        const float *inverse_energy, float *rz, float enough, int64_t d_in) {
    int64_t whole = d_in - d_in % LANES, j;
    floats sums = {0};
    for (j = 0; j < whole; j += LANES) sums += load(direction + j) * load(image + j) * flags(kept + j);
    float curvature = sum(sums);
    for (; j < d_in; j++) curvature += direction[j] * image[j] * kept[j];
    if (!(*rz > enough && curvature > 0)) {
        *rz = 0;
        return;
    }
    float step = *rz / curvature, next = 0;
    sums = (floats){0};
    for (j = 0; j < whole; j += LANES) {
        floats left = load(residual + j) - step * load(image + j) * flags(kept + j);
        store(residual + j, left);
        store(solution + j, load(solution + j) + step * load(direction + j));
        sums += left * left * load(inverse_energy + j);
    }
    for (; j < d_in; j++) {
        residual[j] -= step * image[j] * kept[j];
        solution[j] += step * direction[j];
        next += residual[j] * residual[j] * inverse_energy[j];
    }
    next += sum(sums);
    float ratio = next / *rz;
    for (j = 0; j < whole; j += LANES)
        store(direction + j, load(residual + j) * load(inverse_energy + j) + ratio * load(direction + j));
    for (; j < d_in; j++) direction[j] = residual[j] * inverse_energy[j] + ratio * direction[j];
    *rz = next;
}

BOTH(descend_row,
     (const uint8_t *kept, const float *image, float *direction, float *solution, float *residual,
      const float *inverse_energy, float *rz, float enough, int64_t d_in),
     (kept, image, direction, solution, residual, inverse_energy, rz, enough, d_in))

/* See kernels/solve.py. */
EXPORT void secateurs_descend(int level, int threads, const uint8_t *kept, const float *image, float *direction,
                              float *solution, float *residual, const float *inverse_energy, float *rz,
                              const float *enough, int64_t rows, int64_t d_in) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * d_in;
        AT_LEVEL(level, descend_row, kept + at, image + at, direction + at, solution + at, residual + at,
                 inverse_energy, rz + row, enough[row], d_in);
    }
}
