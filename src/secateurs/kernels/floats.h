/*
 * Vectors of eight floats, the compiler's own: an AVX register, or two of SSE or NEON. On x86 what is inside BOTH is
 * compiled twice, and runs with AVX2 where the processor has it.
 */
#include "packed.h"

#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */
#ifndef __clang__
#pragma GCC optimize("fp-contract=fast") /* x * y + z in one; ISO C mode would not */
#endif

enum { LANES = 8 };
typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));

INLINE floats load(const float *from) {
    floats out;
    memcpy(&out, from, sizeof out);
    return out;
}

INLINE void store(float *to, floats values) { memcpy(to, &values, sizeof values); }

INLINE float sum(floats values) {
    return ((values[0] + values[4]) + (values[2] + values[6])) + ((values[1] + values[5]) + (values[3] + values[7]));
}

#ifdef __x86_64__
#define WITH_AVX2 __attribute__((target("avx2,fma")))
#define AT_LEVEL(level, name, ...) ((level) ? name##_avx2(__VA_ARGS__) : name##_plain(__VA_ARGS__))
#define BOTH(name, parameters, arguments) \
    static void name##_plain parameters { name arguments; } \
    WITH_AVX2 static void name##_avx2 parameters { name arguments; }
#else
#define AT_LEVEL(level, name, ...) ((void)(level), name(__VA_ARGS__))
#define BOTH(name, parameters, arguments)
#endif
