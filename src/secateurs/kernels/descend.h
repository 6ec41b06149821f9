/*
 * Included by solve.c for each kind of vectors: VECTOR is one of WIDTH floats, COLUMNS times PARTS of them are sums in
 * registers, CODE the processor they are for, and IN(name) a function's name there. Everything is of so many rows
 * of the weight (IN(rows)), number by number of a column beside each other.
 */
#define EACH_PART UNROLL for (int part = 0; part < PARTS; part++)
#define EACH_COLUMN UNROLL for (int i = 0; i < COLUMNS; i++)

enum { IN(rows) = PARTS * WIDTH };

CODE INLINE VECTOR IN(load)(const float *from) {
    VECTOR out;
    memcpy(&out, from, sizeof out);
    return out;
}

CODE INLINE void IN(store)(float *to, VECTOR values) { memcpy(to, &values, sizeof values); }

/* Columns of `sums` less their products with `count` columns of y. */
CODE INLINE void IN(subtract)(float *sums, const float *gram, const float *y, int64_t count) {
    VECTOR left[COLUMNS][PARTS];
    EACH_COLUMN EACH_PART left[i][part] = IN(load)(sums + i * IN(rows) + part * WIDTH);
    for (int64_t k = 0; k < count; k++) {
        VECTOR column[PARTS];
        EACH_PART column[part] = IN(load)(y + k * IN(rows) + part * WIDTH);
        EACH_COLUMN EACH_PART left[i][part] -= gram[k * PANEL + i] * column[part];
    }
    EACH_COLUMN EACH_PART IN(store)(sums + i * IN(rows) + part * WIDTH, left[i][part]);
}

/* The same of a whole block, of all columns of y from one to another; a block of these at a time stays in the nearest
 * cache. */
CODE INLINE void IN(subtract_all)(float *sums, const float *gram, const float *y, int64_t first, int64_t count,
                                  int64_t from, int64_t to, int64_t d_in) {
    for (int64_t k = from; k < to; k += BLOCK)
        for (int64_t i = 0; i < count; i += COLUMNS)
            IN(subtract)(sums + i * IN(rows), at(gram, first + i, k, d_in), y + k * IN(rows), k + BLOCK < to ? BLOCK : to - k);
}

/* y of COLUMNS columns, from the sums that others have left, by those among them. */
CODE INLINE void IN(finish)(int upwards, const float *sums, const float *gram, const float *kept, float *y) {
    VECTOR left[COLUMNS][PARTS];
    EACH_COLUMN EACH_PART left[i][part] = IN(load)(sums + i * IN(rows) + part * WIDTH);
    UNROLL for (int turn = 0; turn < COLUMNS; turn++) {
        int i = upwards ? COLUMNS - 1 - turn : turn;
        EACH_PART {
            left[i][part] *= IN(load)(kept + i * IN(rows) + part * WIDTH);
            IN(store)(y + i * IN(rows) + part * WIDTH, left[i][part]);
        }
        UNROLL for (int j = 0; j < COLUMNS; j++)
            if (upwards ? j < i : j > i) EACH_PART left[j][part] -= gram[i * PANEL + j] * left[i][part];
    }
}

/* (1 + L) y = right - other, on what is kept; L is what the Gram has below its diagonal. Without a right side it is the
 * Gram's product with -other. */
CODE static void IN(downwards)(const float *gram, const float *kept, const float *right, const float *other, float *y,
                               int64_t d_in) {
    for (int64_t first = 0; first < d_in; first += BLOCK) {
        int64_t count = first + BLOCK < d_in ? BLOCK : d_in - first;
        float sums[BLOCK * IN(rows)] = {0};
        if (right)
            for (int64_t at = 0; at < count * IN(rows); at++) sums[at] = right[first * IN(rows) + at] - other[first * IN(rows) + at];
        else
            IN(subtract_all)(sums, gram, other, first, count, 0, d_in, d_in);
        IN(subtract_all)(sums, gram, y, first, count, 0, first, d_in);
        for (int64_t i = 0; i < count; i += COLUMNS) {
            int64_t here = first + i;
            IN(subtract)(sums + i * IN(rows), at(gram, here, first, d_in), y + first * IN(rows), i);
            IN(finish)(0, sums + i * IN(rows), at(gram, here, here, d_in), kept + here * IN(rows), y + here * IN(rows));
        }
    }
}

/* (1 + L)^T y = right, on what is kept. */
CODE static void IN(upwards)(const float *gram, const float *kept, const float *right, float *y, int64_t d_in) {
    for (int64_t end = d_in; end > 0; end -= BLOCK) {
        int64_t first = end > BLOCK ? end - BLOCK : 0, count = end - first;
        float sums[BLOCK * IN(rows)];
        memcpy(sums, right + first * IN(rows), count * IN(rows) * sizeof *sums);
        IN(subtract_all)(sums, gram, y, first, count, end, d_in, d_in);
        for (int64_t i = count - COLUMNS; i >= 0; i -= COLUMNS) {
            int64_t here = first + i, next = here + COLUMNS;
            IN(subtract)(sums + i * IN(rows), at(gram, here, next, d_in), y + next * IN(rows), end - next);
            IN(finish)(1, sums + i * IN(rows), at(gram, here, here, d_in), kept + here * IN(rows), y + here * IN(rows));
        }
    }
}

/* See kernels/solve.py. `room` is four times as large as `moved`. */
CODE static void IN(descend)(const float *gram, const float *kept, float *moved, float *room, int64_t steps,
                             float tolerance, int64_t d_in) {
    int64_t size = d_in * IN(rows);
    float *residual = room, *direction = residual + size, *y = direction + size, *z = y + size;
    VECTOR left[PARTS], enough[PARTS];
    IN(downwards)(gram, kept, NULL, moved, residual, d_in);
    memcpy(direction, residual, size * sizeof *direction);
    EACH_PART left[part] = (VECTOR){0};
    for (int64_t at = 0; at < size; at += IN(rows)) EACH_PART {
        VECTOR one = IN(load)(residual + at + part * WIDTH);
        left[part] += one * one;
    }
    EACH_PART enough[part] = left[part] * tolerance * tolerance;
    for (int64_t number = 0; number < steps; number++) {
        VECTOR curvature[PARTS], next[PARTS], step[PARTS], ratio[PARTS];
        IN(upwards)(gram, kept, direction, y, d_in);
        IN(downwards)(gram, kept, direction, y, z, d_in);
        EACH_PART curvature[part] = next[part] = step[part] = ratio[part] = (VECTOR){0};
        for (int64_t at = 0; at < size; at += IN(rows)) EACH_PART {
            int64_t here = at + part * WIDTH;
            curvature[part] += IN(load)(direction + here) * (IN(load)(y + here) + IN(load)(z + here));
        }
        for (int part = 0; part < PARTS; part++)
            for (int row = 0; row < WIDTH; row++)
                if (left[part][row] > enough[part][row] && curvature[part][row] > 0)
                    step[part][row] = left[part][row] / curvature[part][row];
        for (int64_t at = 0; at < size; at += IN(rows)) EACH_PART {
            int64_t here = at + part * WIDTH;
            VECTOR along = IN(load)(y + here), image = along + IN(load)(z + here);
            VECTOR one = IN(load)(residual + here) - step[part] * image;
            IN(store)(moved + here, IN(load)(moved + here) + step[part] * along);
            IN(store)(residual + here, one);
            next[part] += one * one;
        }
        for (int part = 0; part < PARTS; part++)
            for (int row = 0; row < WIDTH; row++) {
                int moving = step[part][row] > 0;
                ratio[part][row] = moving ? next[part][row] / left[part][row] : 0;
                left[part][row] = moving ? next[part][row] : 0;
            }
        for (int64_t at = 0; at < size; at += IN(rows)) EACH_PART {
            int64_t here = at + part * WIDTH;
            IN(store)(direction + here, IN(load)(residual + here) + ratio[part] * IN(load)(direction + here));
        }
    }
}

/* Some rows, at most IN(rows), there and back. `room` is for six times IN(rows) numbers of each input. */
CODE static void IN(descend_rows)(const float *gram, const int64_t *order, const uint8_t *kept, float *moved,
                                  float *room, int64_t rows, int64_t steps, float tolerance, int64_t d_in,
                                  int64_t inputs) {
    float *here = room, *flags = here + d_in * IN(rows), *rest = flags + d_in * IN(rows);
    memset(here, 0, 2 * d_in * IN(rows) * sizeof *here);
    for (int64_t k = 0; k < inputs; k++)
        for (int64_t row = 0; row < rows; row++) {
            here[k * IN(rows) + row] = moved[row * inputs + order[k]];
            flags[k * IN(rows) + row] = kept[row * inputs + order[k]];
        }
    IN(descend)(gram, flags, here, rest, steps, tolerance, d_in);
    for (int64_t k = 0; k < inputs; k++)
        for (int64_t row = 0; row < rows; row++) moved[row * inputs + order[k]] = here[k * IN(rows) + row];
}

#undef EACH_PART
#undef EACH_COLUMN
#undef VECTOR
#undef WIDTH
#undef CODE
#undef IN
