/* What packed.c multiplies with, as Python fills it in (kernels/__init__.py). */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

enum format { DENSE_BF16, PACKED_BF16, DENSE_INT8, PACKED_INT8, DENSE_INT4, HALF_BF16, HALF_INT8, FORMATS };

struct matrix {
    int64_t format, rows, columns;
    int64_t words, step; /* of 64 columns; floats from the results of one vector to the next's; by packed.c */
    const void *weights; /* dense: all of them; packed: the kept ones */
    const uint64_t *bits;
    const int64_t *starts;
    const float *scale;
    const uint16_t *scales; /* int4: of every word */
    const uint8_t *places; /* halves: columns of the kept weights in their group */
};

enum { MOST_MATRICES = 3, ALONE_BELOW = 1 << 17 }; /* products: a second thread takes longer to wake than these take */

/*
 * Products of `batch` vectors x with matrices of the same columns, one after the other in each row of y, whose rows are
 * `step` floats apart. Less than no threads are at most as many: one where there is little to do.
 */
void secateurs_multiply_all(int level, int threads, const struct matrix *const *matrices, int count, const float *x,
                            float *y, int64_t batch, int64_t step);
