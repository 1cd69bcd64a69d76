/* Block rotations, their gradients and Cayley-Neumann cores, float32, in one pass over memory.
 *
 * Everything below is one register tile, `madd`: HIGH rows by one or two vectors of accumulators.
 * The reduction always runs in the same order, whatever the tile, the number of rows and the number
 * of threads, so the same input gives the same bits. Sizes that no tile fits, and the last rows, go
 * through padded copies; what padding holds never reaches a result, be it inf or NaN.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
#define HIGH 8
#elif defined(__AVX__)
#define BYTES 32
#define HIGH 4
#else
#define BYTES 16
#define HIGH 4
#endif

#define LANES ((int64_t)(BYTES / sizeof(float)))
#define TILE 24    /* rows at a time that stay in the first-level cache, a multiple of HIGH; */
#define NEAR 65536 /* fewer where their operands are more floats than this: twice as many, those
                      after them as well, stay in the second-level cache beside the cores */
#define TASKS 64   /* rows are cut where there are fewer blocks than this, */
#define LEAST 256  /* but never into runs of fewer rows than this */
#define HELD 65536 /* floats of cores that stay in the second-level cache */
#define MOST 8     /* rotations of one tensor */
#define FACTORS 4  /* of a product that is rotated */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(BYTES)));
typedef float unaligned __attribute__((vector_size(BYTES), aligned(4), may_alias));

INLINE vec load(const float *from) { return *(const unaligned *)from; }
INLINE void store(float *to, vec value) { *(unaligned *)to = value; }
INLINE int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- threads ---- */

/* GOMP_parallel of the OpenMP that PyTorch runs: one pool of threads, not two that spin. */
typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

/* A matrix, or what is broadcast to one: a step of 0 reads the same number again. */
typedef struct {
    const float *at;
    int64_t down, along; /* `along` is 1 or 0 */
} factor;

typedef struct job {
    void (*task)(const struct job *, int64_t index, float *scratch);
    int64_t tasks, room; /* room: floats of scratch for each thread */
    int64_t next, joined;
    float *scratch;
    /* the operands of a rotation */
    const float *source[MOST], *x, *core[MOST];
    float *out[MOST], *gram[MOST], *part;
    int64_t count, rows, n, b, splits, group, tall;
    int transposed, divides;
    factor by[FACTORS]; /* what x is multiplied by where it stands */
    int64_t factors;
    int normed; /* x is normed by these: the gradient goes on to x itself */
    /* or x is a gate, whose activation is multiplied by `up` unless that is null */
    int activation;
    const float *up;
    float *up_out;
    const struct packed *weight;
    /* and of cores, n blocks in each tensor: addresses */
    const int64_t *theta, *made, *grad;
    int64_t order;
} job;

static void work(void *shared) {
    job *all = shared;
    float *mine = all->scratch + all->room * __atomic_fetch_add(&all->joined, 1, __ATOMIC_RELAXED);
    for (;;) {
        int64_t index = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
        if (index >= all->tasks) return;
        all->task(all, index, mine);
    }
}

/* Runs every task; 1 where there was no memory. */
static int run(job *all, parallel fork, int64_t threads) {
    threads = fork ? least(threads, all->tasks) : 1;
    if (threads < 1) return 0;
    all->next = all->joined = 0;
    all->room = padded(all->room);
    all->scratch = aligned_alloc(BYTES, (size_t)(threads * all->room) * sizeof(float));
    if (!all->scratch) return 1;
    if (threads > 1)
        fork(work, all, (unsigned)threads, 0);
    else
        work(all);
    free(all->scratch);
    return 0;
}

/* ---- the register tile ---- */

/* Memory that will be needed soon, of two operands. */
typedef struct {
    const float *x, *y;
} soon;

/* acc += a·b, a's entry (i, k) at a[i·down + k·along], b's rows `step` apart. On the way it asks for
 * what is needed soon, a line a step: all at once would wait for each other, and rows this far
 * apart the processor does not foresee. */
INLINE void madd(vec acc[HIGH][2], int wide, const float *a, int64_t down, int64_t along,
                 const float *b, int64_t step, int64_t depth, soon next) {
    for (int64_t k = 0; k < depth; k++) {
        if (next.x) __builtin_prefetch((k & 1 ? next.y : next.x) + k / 2 * LANES, 0, 2);
        vec b0 = load(b + k * step), b1 = wide > 1 ? load(b + k * step + LANES) : b0;
#pragma GCC unroll 16
        for (int i = 0; i < HIGH; i++) {
            float entry = a[i * down + k * along];
            acc[i][0] += entry * b0;
            if (wide > 1) acc[i][1] += entry * b1;
        }
    }
}

/* One tile of out = from + a·b; nothing is added where `from` is null. */
INLINE void tile(int wide, float *out, int64_t out_step, const float *from, int64_t from_step,
                 const float *a, int64_t down, int64_t along, const float *b, int64_t step,
                 int64_t depth, soon next) {
    vec acc[HIGH][2];
#pragma GCC unroll 16
    for (int i = 0; i < HIGH; i++)
        for (int v = 0; v < wide; v++)
            acc[i][v] = from ? load(from + i * from_step + v * LANES) : (vec){0};
    madd(acc, wide, a, down, along, b, step, depth, next);
#pragma GCC unroll 16
    for (int i = 0; i < HIGH; i++)
        for (int v = 0; v < wide; v++) store(out + i * out_step + v * LANES, acc[i][v]);
}

/* out = from + a·b, HIGH × wide; out's and from's rows `step` apart. */
INLINE void product(float *out, const float *from, int64_t step, int64_t wide, const float *a,
                    int64_t down, int64_t along, const float *b, int64_t b_step, int64_t depth,
                    soon next) {
    for (int64_t j = 0; j < wide; j += 2 * LANES, next = (soon){0}) {
        const float *begin = from ? from + j : NULL;
        if (wide - j > LANES)
            tile(2, out + j, step, begin, step, a, down, along, b + j, b_step, depth, next);
        else
            tile(1, out + j, step, begin, step, a, down, along, b + j, b_step, depth, next);
    }
}

/* ---- squares turned over ---- */

/* The numbers of two vectors in turn, of their first halves and of their second. */
#if BYTES == 64
#define FIRST(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define SECOND(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif BYTES == 32
#define FIRST(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define SECOND(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define FIRST(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define SECOND(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(BYTES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* A square as wide as a vector, turned over its diagonal. */
INLINE void flip(vec row[LANES]) {
    for (int64_t round = 1; round < LANES; round *= 2) {
        vec was[LANES];
        memcpy(was, row, sizeof was);
#pragma GCC unroll 8
        for (int64_t i = 0; i < LANES / 2; i++) {
            row[2 * i] = FIRST(was[i], was[i + LANES / 2]);
            row[2 * i + 1] = SECOND(was[i], was[i + LANES / 2]);
        }
    }
}

/* ---- rotations ---- */

/* Some rows of a block: `at` the first, `step` apart. */
typedef struct {
    const float *at;
    int64_t step;
} rows_of;

/* The rows after those at work, line after line: `width` floats of each, `step` apart. */
typedef struct {
    soon first;
    int64_t width, step, done;
} walk;

INLINE soon take(walk *ahead, int64_t steps) {
    int64_t row = ahead->done / ahead->width, column = ahead->done % ahead->width;
    ahead->done += (steps + 1) / 2 * LANES;
    row = row * ahead->step + column;
    return (soon){ahead->first.x + row, ahead->first.y + row};
}

INLINE void turn_tile(int wide, float *out, int64_t out_step, const rows_of *source,
                      float *const *core, int64_t count, int64_t row, int64_t column, int64_t b,
                      walk *ahead) {
    vec acc[HIGH][2] = {0};
    for (int64_t s = 0; s < count; s++)
        madd(acc, wide, source[s].at + row * source[s].step, source[s].step, 1,
             core[s] + column * b, wide * LANES, b,
             column + s ? (soon){0} : take(ahead, b));
    /* What is turned is added last: the product is small beside it, and keeps its digits. */
    for (int64_t s = 0; s < count; s++)
#pragma GCC unroll 16
        for (int i = 0; i < HIGH; i++)
            for (int v = 0; v < wide; v++)
                acc[i][v] += load(source[s].at + (row + i) * source[s].step + column + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < HIGH; i++)
        for (int v = 0; v < wide; v++)
            store(out + (row + i) * out_step + column + v * LANES, acc[i][v]);
}

/* out = Σ source + source·core, of `high` rows; the cores packed. */
static void turn(float *out, int64_t out_step, const rows_of *source, float *const *core,
                 int64_t count, int64_t high, int64_t b, walk *ahead) {
    int64_t wide = padded(b);
    for (int64_t column = 0; column < wide; column += 2 * LANES)
        for (int64_t row = 0; row < high; row += HIGH)
            if (wide - column > LANES)
                turn_tile(2, out, out_step, source, core, count, row, column, b, ahead);
            else
                turn_tile(1, out, out_step, source, core, count, row, column, b, ahead);
}

/* gram += xᵀ·y over `high` rows. */
static void add_gram(float *gram, rows_of x, rows_of y, int64_t high, int64_t b, walk *ahead) {
    int64_t wide = padded(b);
    for (int64_t i = 0; i < wide; i += HIGH)
        product(gram + i * wide, gram + i * wide, wide, wide, x.at + i, 1, x.step, y.at, y.step,
                high, take(ahead, high));
}

/* The core's columns in panels as wide as a tile, zeros where it has none. */
static void pack(float *to, const float *core, int64_t down, int64_t along, int64_t b) {
    int64_t all = padded(b);
    for (int64_t column = 0; column < all; column += 2 * LANES) {
        int64_t wide = least(2 * LANES, all - column), there = least(wide, b - column);
        if (down == 1 && all == b) { /* its rows, in squares */
            for (int64_t i = 0; i < b; i += LANES, to += LANES * wide)
                for (int64_t j = 0; j < wide; j += LANES) {
                    vec row[LANES];
                    for (int64_t k = 0; k < LANES; k++)
                        row[k] = load(core + (column + j + k) * along + i);
                    flip(row);
                    for (int64_t k = 0; k < LANES; k++) store(to + k * wide + j, row[k]);
                }
            continue;
        }
        for (int64_t i = 0; i < b; i++, to += wide) {
            for (int64_t j = 0; j < there; j++) to[j] = core[i * down + (column + j) * along];
            for (int64_t j = there; j < wide; j++) to[j] = 0;
        }
    }
}

INLINE void copy_rows(float *to, int64_t to_step, const float *from, int64_t from_step,
                      int64_t high, int64_t b) {
    for (int64_t row = 0; row < high; row++, to += to_step, from += from_step) {
        if (b < LANES) {
            memcpy(to, from, (size_t)b * sizeof(float));
            continue;
        }
        for (int64_t j = 0; j + LANES < b; j += LANES) store(to + j, load(from + j));
        store(to + b - LANES, load(from + b - LANES));
    }
}

/* Rows as tiles want them: next to each other, padded. With zeros, for what memory happens to hold
 * may be denormal, and slow. */
static rows_of staged(rows_of rows, int64_t high, int64_t b, float *copy) {
    int64_t wide = padded(b);
    if (wide > b || high % HIGH) memset(copy, 0, (size_t)(TILE * wide) * sizeof(float));
    copy_rows(copy, wide, rows.at, rows.step, high, b);
    return (rows_of){copy, wide};
}

/* The rows that an operand's own are multiplied by, factor after factor, made where they are used. */
static rows_of multiplied(const job *all, rows_of rows, int64_t row, int64_t column, int64_t high,
                          float *copy) {
    int64_t wide = padded(all->b), below = row + 2 * all->tall <= all->rows ? all->tall : 0;
    if (high % HIGH) memset(copy, 0, (size_t)(TILE * wide) * sizeof(float));
    for (int64_t i = 0; i < high; i++)
        for (int64_t j = 0; j < all->b; j += LANES) {
            vec value = load(rows.at + i * rows.step + j);
            for (int64_t f = 0; f < all->factors; f++) {
                const factor *by = all->by + f;
                const float *at = by->at + (row + i) * by->down + (column + j) * by->along;
                value *= by->along ? load(at) : *at - (vec){0};
                if (by->along && by->down) __builtin_prefetch(at + below * by->down, 0, 2);
            }
            store(copy + i * wide + j, value);
        }
    return (rows_of){copy, wide};
}

/* ---- activations ---- */

typedef int32_t ints __attribute__((vector_size(BYTES)));
enum { NONE, SILU, GELU, GELU_TANH };

INLINE vec pick(ints where, vec a, vec b) {
    return (vec)(((ints)a & where) | ((ints)b & ~where));
}

/* eˣ to 1e-7 of itself: 2ⁿ by the exponent's bits, the rest by a polynomial. Beyond where both are
 * numbers, that of the last one there. */
INLINE vec exponential(vec x) {
    const vec zero = {0}, most = zero + 88.0f, round = zero + 12582912.0f; /* 1.5·2²³ */
    x = pick(x > most, most, pick(x < -most + 1, -most + 1, x));
    vec n = x * 1.44269504f + round;
    ints bits = (ints)n << 23;
    n -= round;
    x -= n * 0.693359375f;
    x += n * 2.12194440e-4f;
    vec p = x * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1;
    return (vec)((ints)p + bits);
}

INLINE vec logistic(vec x) { return 1 / (1 + exponential(-x)); }

/* (1 + erf(x/√2)) / 2 to 1e-7: Abramowitz and Stegun, 7.1.26; `bell` is e^(−x²/2). */
INLINE vec normal(vec x, vec bell) {
    vec size = pick(x < 0, -x, x) * 0.70710678f, t = 1 / (1 + 0.3275911f * size);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec tail = 0.5f * p * t * bell;
    return pick(x < 0, tail, 1 - tail);
}

/* An activation and its slope. */
INLINE vec activate(int activation, vec x, vec *slope) {
    if (activation == SILU) {
        vec share = logistic(x), value = x * share;
        *slope = share + (value - value * share);
        return value;
    }
    if (activation == GELU) {
        vec bell = exponential(-0.5f * x * x), share = normal(x, bell);
        *slope = share + x * 0.39894228f * bell;
        return x * share;
    }
    /* (1 + tanh z) / 2 is the logistic function of 2z. */
    vec share = logistic(1.59576912f * x * (1 + 0.044715f * x * x));
    *slope = share * (1 + x * (1 - share) * (1.59576912f * (1 + 0.134145f * x * x)));
    return x * share;
}

/* What a gated layer feeds its last one, made where it is used; after it in `copy`, by what its
 * gradient is multiplied for those of up and of the gate. */
static rows_of gated(const job *all, int64_t place, int64_t step, int64_t high, float *copy) {
    int64_t b = all->b, size = TILE * b, below = place + all->tall * step;
    below = below + high * step <= all->rows * step ? all->tall * step : 0;
    if (high % HIGH) memset(copy, 0, (size_t)(3 * size) * sizeof(float));
    for (int64_t i = 0; i < high; i++, place += step, copy += b)
        for (int64_t j = 0; j < b; j += LANES) {
            vec slope, value = activate(all->activation, load(all->x + place + j), &slope);
            store(copy + size + j, value);
            if (all->up) {
                vec up = load(all->up + place + j);
                __builtin_prefetch(all->up + place + below + j, 0, 2);
                value *= up;
                slope *= up;
            }
            store(copy + j, value);
            store(copy + 2 * size + j, slope);
        }
    return (rows_of){copy - high * b, b};
}

/* The product's gradient, `high` rows, to those of its two factors. */
static void ungate(const job *all, int64_t place, int64_t step, int64_t high, const float *grad,
                   const float *copy) {
    int64_t b = all->b, size = TILE * b;
    for (int64_t i = 0; i < high; i++, place += step, grad += b, copy += b)
        for (int64_t j = 0; j < b; j += LANES) {
            vec own = load(grad + j);
            store(all->out[0] + place + j, own * load(copy + 2 * size + j));
            if (all->up) store(all->up_out + place + j, own * load(copy + size + j));
        }
}

/* ---- the norm before a rotation ---- */

/* y = x·rstd·weight of a row: from y's gradient in `out` to x's, through rstd = (mean x² + ε)^−½. */
static void unnorm(const job *all, int64_t row, int64_t high) {
    int64_t width = all->n * all->b;
    const float *weight = all->factors > 1 ? all->by[1].at : NULL;
    for (int64_t i = row; i < row + high; i++) {
        const float *x = all->x + i * width;
        float *out = all->out[0] + i * width, rstd = all->by[0].at[i], share = 0;
        vec sum = {0}, more = {0};
        for (int64_t j = 0; j < width; j += LANES) {
            vec own = load(out + j);
            if (weight) own *= load(weight + j);
            if (j / LANES % 2)
                more += own * load(x + j);
            else
                sum += own * load(x + j);
        }
        sum += more;
        for (int64_t k = 0; k < LANES; k++) share += sum[k];
        share *= rstd * rstd / (float)width;
        for (int64_t j = 0; j < width; j += LANES) {
            vec own = load(out + j);
            if (weight) own *= load(weight + j);
            store(out + j, (own - load(x + j) * share) * rstd);
        }
    }
}

static void unnorm_task(const job *all, int64_t index, float *scratch) {
    int64_t row = index * TILE;
    (void)scratch;
    unnorm(all, row, least(TILE, all->rows - row));
}

/* A run of rows of some neighbouring blocks. */
typedef struct {
    int64_t run, first, blocks, begin, end;
} patch;

static patch patch_of(const job *all, int64_t index) {
    int64_t groups = (all->n + all->group - 1) / all->group;
    int64_t high = (all->rows + all->splits - 1) / all->splits;
    high = (high + HIGH - 1) / HIGH * HIGH;
    patch own = {.run = index / groups, .first = index % groups * all->group};
    own.blocks = least(all->group, all->n - own.first);
    own.begin = least(all->rows, own.run * high);
    own.end = least(all->rows, own.begin + high);
    return own;
}

/* The rows after these of a patch, of two operands; the same ones again after the last. */
INLINE walk after(const job *all, const patch *own, int64_t row, const float *x, const float *y) {
    int64_t step = all->n * all->b, next = row + all->tall < own->end ? row + all->tall : row;
    int64_t place = next * step + own->first * all->b;
    return (walk){{x + place, y + place}, own->blocks * all->b, step, 0};
}

/* A patch, turned by each core. */
static void forward_task(const job *all, int64_t index, float *scratch) {
    int64_t b = all->b, wide = padded(b), step = all->n * b, size = b * wide;
    patch own = patch_of(all, index);
    int64_t down = all->transposed ? 1 : b, along = all->transposed ? b : 1;
    float *core = scratch, *copy = core + all->count * all->group * size;
    float *out_copy = copy + 3 * TILE * wide;
    for (int64_t s = 0; s < all->count; s++)
        for (int64_t block = 0; block < own.blocks; block++)
            pack(core + (s * all->group + block) * size,
                 all->core[s] + (own.first + block) * b * b, down, along, b);
    for (int64_t row = own.begin; row < own.end; row += all->tall) {
        walk ahead[MOST];
        for (int64_t s = 0; s < all->count; s++)
            ahead[s] = after(all, &own, row, all->x, all->out[s]);
        for (int64_t block = 0; block < own.blocks; block++) {
            int64_t high = least(all->tall, own.end - row);
            int64_t whole = (high + HIGH - 1) / HIGH * HIGH;
            int64_t place = row * step + (own.first + block) * b;
            int fits = wide == b && whole == high;
            rows_of source = {all->x + place, step};
            if (all->activation)
                source = gated(all, place, step, high, copy);
            else if (!fits)
                source = staged(source, high, b, copy);
            for (int64_t s = 0; s < all->count; s++) {
                float *by = core + (s * all->group + block) * size, *out = all->out[s] + place;
                if (fits) {
                    turn(out, step, &source, &by, 1, high, b, ahead + s);
                } else {
                    turn(out_copy, wide, &source, &by, 1, whole, b, ahead + s);
                    copy_rows(out, step, out_copy, wide, high, b);
                }
            }
        }
    }
}

/* The gradient of a patch of x, and its share of those of the cores. */
static void backward_task(const job *all, int64_t index, float *scratch) {
    int64_t b = all->b, wide = padded(b), step = all->n * b, count = all->count;
    int64_t size = b * wide, square = wide * wide;
    patch own = patch_of(all, index);
    float *core = scratch, *gram = core + count * all->group * size;
    float *copy = gram + count * all->group * square, *out_copy = copy + (count + 3) * TILE * wide;
    if (all->out[0])
        for (int64_t block = 0; block < own.blocks; block++)
            for (int64_t s = 0; s < count; s++)
                pack(core + (block * count + s) * size,
                     all->core[s] + (own.first + block) * b * b, 1, b, b);
    if (all->part) memset(gram, 0, (size_t)(count * own.blocks * square) * sizeof(float));
    for (int64_t row = own.begin; row < own.end; row += all->tall) {
        const float *read = all->part ? all->out[0] : all->source[0]; /* a Gram asks for it else */
        walk ahead[MOST], out_ahead = after(all, &own, row, all->out[0], read);
        for (int64_t s = 0; s < count; s++)
            ahead[s] = after(all, &own, row, all->x, all->source[s]);
        for (int64_t block = 0; block < own.blocks; block++) {
            int64_t high = least(all->tall, own.end - row);
            int64_t whole = (high + HIGH - 1) / HIGH * HIGH;
            int64_t place = row * step + (own.first + block) * b;
            int fits = wide == b && whole == high;
            rows_of source[MOST];
            float *by[MOST];
            for (int64_t s = 0; s < count; s++) {
                source[s] = (rows_of){all->source[s] + place, step};
                if (!fits) source[s] = staged(source[s], high, b, copy + s * TILE * wide);
                by[s] = core + (block * count + s) * size;
            }
            if (all->part || all->activation) {
                rows_of x = {all->x + place, step};
                float *x_copy = copy + count * TILE * wide;
                if (all->activation)
                    x = gated(all, place, step, high, x_copy);
                else if (all->factors)
                    x = multiplied(all, x, row, (own.first + block) * b, high, x_copy);
                else if (!fits)
                    x = staged(x, high, b, x_copy);
                for (int64_t s = 0; all->part && s < count; s++)
                    add_gram(gram + (block * count + s) * square, x, source[s], high, b,
                             ahead + s);
            }
            if (!all->out[0]) continue;
            if (all->activation) {
                turn(out_copy, b, source, by, count, whole, b, &out_ahead);
                ungate(all, place, step, high, out_copy, copy + count * TILE * wide);
            } else if (fits) {
                turn(all->out[0] + place, step, source, by, count, high, b, &out_ahead);
            } else {
                turn(out_copy, wide, source, by, count, whole, b, &out_ahead);
                copy_rows(all->out[0] + place, step, out_copy, wide, high, b);
            }
        }
        if (all->normed && own.blocks == all->n)
            unnorm(all, row, least(all->tall, own.end - row));
    }
    if (!all->part) return;
    for (int64_t block = 0; block < own.blocks; block++)
        for (int64_t s = 0; s < count; s++) {
            int64_t number = own.first + block;
            float *to = all->gram[s] + number * b * b;
            if (all->splits > 1)
                to = all->part + ((own.run * all->n + number) * count + s) * b * b;
            copy_rows(to, b, gram + (block * count + s) * square, wide, b, b);
        }
}

/* m·(I + C)⁻ᵀ, which is m·R·(RᵀR)⁻¹ of R = I + C: RᵀR is positive definite, and for a rotation
 * nearly the identity, so elimination needs no pivots. */
static void divide(float *m, const float *core, int64_t b, float *scratch) {
    int64_t wide = padded(b), size = wide * wide;
    float *c = scratch, *square = c + size, *given = square + size, *value = given + size;
    float *share = value + size;
    memset(scratch, 0, (size_t)(3 * size) * sizeof(float));
    copy_rows(c, wide, core, b, b, b);
    copy_rows(given, wide, m, b, b, b);
    for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++)
            square[i * wide + j] = (i == j) + c[i * wide + j] + c[j * wide + i];
    for (int64_t i = 0; i < wide; i += HIGH) {
        float *own = square + i * wide;
        product(own, own, wide, wide, c + i, 1, wide, c, wide, b, (soon){0});
        own = given + i * wide;
        product(value + i * wide, own, wide, wide, own, wide, 1, c, wide, b, (soon){0});
    }
    for (int64_t k = 0; k < b; k++) { /* columns of both, until the square is the identity */
        float inverse = 1 / square[k * wide + k];
        for (int64_t j = 0; j < wide; j++) share[j] = square[k * wide + j] * inverse;
        share[k] = 1 - inverse;
        for (int64_t i = 0; i < b; i++) {
            float entry = value[i * wide + k];
            for (int64_t j = 0; j < wide; j += LANES)
                store(value + i * wide + j, load(value + i * wide + j) - entry * load(share + j));
        }
        for (int64_t i = k + 1; i < b; i++) {
            float entry = square[i * wide + k];
            for (int64_t j = 0; j < wide; j += LANES)
                store(square + i * wide + j, load(square + i * wide + j) - entry * load(share + j));
        }
    }
    copy_rows(m, b, value, wide, b, b);
}

/* The runs' shares of one block's core gradients, added in order; then divided where that is asked. */
static void sum_task(const job *all, int64_t block, float *scratch) {
    int64_t entries = all->b * all->b;
    for (int64_t s = 0; s < all->count; s++) {
        float *to = all->gram[s] + block * entries;
        if (all->splits > 1) {
            const float *share = all->part + (block * all->count + s) * entries;
            int64_t next = all->n * all->count * entries;
            memcpy(to, share, (size_t)entries * sizeof(float));
            for (int64_t run = 1; run < all->splits; run++) {
                share += next;
                for (int64_t i = 0; i < entries; i++) to[i] += share[i];
            }
        }
        if (all->divides) divide(to, all->core[s] + block * entries, all->b, scratch);
    }
}

static int64_t splits(int64_t rows, int64_t n) {
    int64_t wanted = n ? (TASKS + n - 1) / n : 1, most = rows / LEAST;
    wanted = least(wanted, most);
    return wanted > 1 ? wanted : 1;
}

/* Blocks that one thread takes together, so that its rows are long, and how many of those it takes
 * at a time, of this many operands; no result depends on either. */
static void share(job *all, int64_t operands, int64_t threads) {
    int64_t fair = (all->n * all->splits + threads - 1) / threads;
    int64_t most = HELD / (all->b * padded(all->b) * all->count);
    all->group = least(all->n, least(fair, most));
    if (all->group < 1) all->group = 1;
    all->tasks = (all->n + all->group - 1) / all->group * all->splits;
    all->tall = least(TILE, NEAR / (operands * all->group * all->b)) / HIGH * HIGH;
    if (all->tall < HIGH) all->tall = HIGH;
}

static int forward(job all, parallel fork, int64_t threads) {
    all.task = forward_task;
    all.splits = splits(all.rows, all.n);
    share(&all, 1 + all.count + (all.up != NULL), threads);
    all.room = (all.count * all.group * all.b + 4 * TILE) * padded(all.b);
    return run(&all, fork, threads);
}

/* The rows of a norm that no task had the whole of. */
static int unnorm_rest(job all, parallel fork, int64_t threads) {
    if (!all.normed || all.group == all.n) return 0;
    all.task = unnorm_task;
    all.tasks = (all.rows + TILE - 1) / TILE;
    all.room = 1;
    return run(&all, fork, threads);
}

static int backward(job all, int grams, parallel fork, int64_t threads) {
    int64_t wide = padded(all.b), operands = all.count + grams + (all.out[0] != NULL);
    for (int64_t f = 0; f < all.factors; f++) operands += all.by[f].down && all.by[f].along;
    operands += 2 * (all.up != NULL);
    all.task = backward_task;
    all.splits = splits(all.rows, all.n);
    share(&all, operands, threads);
    all.room = (all.count * all.group * (all.b + wide) + (all.count + 4) * TILE) * wide;
    all.part = grams ? all.gram[0] : NULL;
    if (!grams || (all.splits == 1 && !all.divides)) {
        int failed = run(&all, fork, threads);
        return failed || unnorm_rest(all, fork, threads);
    }
    float *parts = NULL;
    if (all.splits > 1) {
        parts = malloc((size_t)(all.splits * all.n * all.count * all.b * all.b) * sizeof(float));
        if (!parts) return 1;
        all.part = parts;
    }
    int failed = run(&all, fork, threads);
    all.task = sum_task;
    all.tasks = all.n;
    all.room = all.divides ? (4 * wide + 1) * wide : 0;
    failed = failed || run(&all, fork, threads);
    free(parts);
    return failed || unnorm_rest(all, fork, threads);
}

/* Every function that Python calls takes one array of numbers, sizes and addresses in the order that
 * its comment gives: so many arguments would cost more than a small rotation. It gives back 0, or 1
 * where there was no memory. */
INLINE void *at(int64_t address) { return (void *)(intptr_t)address; }

/* count, rows, n, b, x, core[count], out[count]: out[s] = x + x·blockdiag(core[s]). All contiguous:
 * x and out (rows, n·b), cores (n, b, b). */
int oftfx_rotate(const int64_t *given, parallel fork, int64_t threads) {
    job all = {.count = given[0], .rows = given[1], .n = given[2], .b = given[3],
               .x = at(given[4])};
    given += 5;
    for (int64_t s = 0; s < all.count; s++) {
        all.core[s] = at(given[s]);
        all.out[s] = at(given[all.count + s]);
    }
    return forward(all, fork, threads);
}

/* count, rows, n, b, x, out, grams, grad[count], core[count], gram[count], normed, factors, and of
 * each by, down, along: out = Σ grad[s] + grad[s]·blockdiag(core[s])ᵀ unless it is null, and
 * gram[s] = xᵀ·grad[s] of each block if grams. x is multiplied by the factors first, whose rows are
 * `down` apart; b is then a multiple of 16. Where it is normed by them, one number a row, of its own
 * mean square, and perhaps one a column, out is its gradient before that. */
int oftfx_rotate_grad(const int64_t *given, parallel fork, int64_t threads) {
    job all = {.count = given[0], .rows = given[1], .n = given[2], .b = given[3],
               .x = at(given[4])};
    int grams = given[6] != 0;
    all.out[0] = at(given[5]);
    given += 7;
    for (int64_t s = 0; s < all.count; s++) {
        all.source[s] = at(given[s]);
        all.core[s] = at(given[all.count + s]);
        all.gram[s] = at(given[2 * all.count + s]);
    }
    given += 3 * all.count;
    all.normed = (int)*given++;
    all.factors = *given++;
    for (int64_t f = 0; f < all.factors; f++, given += 3)
        all.by[f] = (factor){at(given[0]), given[1], given[2]};
    return backward(all, grams, fork, threads);
}

/* rows, n, b, activation, gate, up, core, out: out = x + x·blockdiag(core) of
 * x = activation(gate)·up, where up is null for 1; b a multiple of 16. */
int oftfx_glu_rotate(const int64_t *given, parallel fork, int64_t threads) {
    job all = {.count = 1, .rows = given[0], .n = given[1], .b = given[2],
               .activation = (int)given[3], .x = at(given[4]), .up = at(given[5])};
    all.core[0] = at(given[6]);
    all.out[0] = at(given[7]);
    return forward(all, fork, threads);
}

/* rows, n, b, activation, gate, up, core, grad, out, up_out, gram: x = activation(gate)·up was turned
 * by core, grad is what came back; out and up_out are the gradients of gate and up, both null where
 * only gram is wanted, which is null where it is not. up is null for 1. b is a multiple of 16. */
int oftfx_glu_rotate_grad(const int64_t *given, parallel fork, int64_t threads) {
    job all = {.count = 1, .rows = given[0], .n = given[1], .b = given[2],
               .activation = (int)given[3], .x = at(given[4]), .up = at(given[5]),
               .up_out = at(given[9])};
    all.core[0] = at(given[6]);
    all.source[0] = at(given[7]);
    all.out[0] = at(given[8]);
    all.gram[0] = at(given[10]);
    return backward(all, all.gram[0] != NULL, fork, threads);
}

/* rows, n, b, w, core, out: out = w + w·blockdiag(core)ᵀ, a weight (rows, n·b), folded. */
int oftfx_fold(const int64_t *given, parallel fork, int64_t threads) {
    job all = {.count = 1, .rows = given[0], .n = given[1], .b = given[2], .x = at(given[3]),
               .transposed = 1};
    all.core[0] = at(given[4]);
    all.out[0] = at(given[5]);
    return forward(all, fork, threads);
}

/* rows, n, b, grad, x, core, out: the core's gradient behind a folded weight, of each block,
 * xᵀ·grad·(I + core)⁻ᵀ, grad that of x. */
int oftfx_fold_grad(const int64_t *given, parallel fork, int64_t threads) {
    job all = {.count = 1, .rows = given[0], .n = given[1], .b = given[2], .x = at(given[4]),
               .divides = 1};
    all.source[0] = at(given[3]);
    all.core[0] = at(given[5]);
    all.gram[0] = at(given[6]);
    return backward(all, 1, fork, threads);
}

/* ---- 4-bit weights, as oftfx/ops/packed.py describes them ---- */

typedef float pair __attribute__((vector_size(8)));
typedef struct packed {
    const uint8_t *data;
    const void *absmax;
    const float *nested_absmax, *nested_code, *offset;
    int64_t block_size, nested_block_size;
    pair value[256]; /* the two numbers of a byte */
} packed;

INLINE float scale_of(const packed *weight, int64_t block) {
    if (!weight->nested_absmax) return ((const float *)weight->absmax)[block];
    float level = weight->nested_code[((const uint8_t *)weight->absmax)[block]];
    /* Rounded before the addition, as bitsandbytes does. */
    volatile float scaled = level * weight->nested_absmax[block / weight->nested_block_size];
    return scaled + *weight->offset;
}

/* `count` numbers of the weight from number `begin` on, both even. */
static void unpack_numbers(float *to, const packed *weight, int64_t begin, int64_t count) {
    for (int64_t end = begin + count; begin < end;) {
        int64_t block = begin / weight->block_size;
        int64_t run = least(end, (block + 1) * weight->block_size) - begin;
        float scale = scale_of(weight, block);
        const uint8_t *from = weight->data + begin / 2;
        for (int64_t i = 0; i < run / 2; i++) {
            pair both = weight->value[from[i]] * scale;
            memcpy(to + 2 * i, &both, sizeof both);
        }
        to += run;
        begin += run;
    }
}

/* A run of rows of the weight. */
static void dequantise_task(const job *all, int64_t index, float *scratch) {
    int64_t begin = index * TILE, high = least(TILE, all->rows - begin), wide = all->n * all->b;
    (void)scratch;
    unpack_numbers(all->out[0] + begin * wide, all->weight, begin * wide, high * wide);
}

/* A patch of the weight, turned by the transposed core before it leaves the cache. */
static void dequantise_fold_task(const job *all, int64_t index, float *scratch) {
    int64_t b = all->b, wide = padded(b), step = all->n * b;
    patch own = patch_of(all, index);
    int64_t width = own.blocks * b;
    float *core = scratch, *rows = core + all->group * b * wide, *out_copy = rows + TILE * width;
    for (int64_t block = 0; block < own.blocks; block++)
        pack(core + block * b * wide, all->core[0] + (own.first + block) * b * b, 1, b, b);
    for (int64_t row = own.begin; row < own.end; row += all->tall) {
        int64_t high = least(all->tall, own.end - row);
        int64_t whole = (high + HIGH - 1) / HIGH * HIGH;
        float *out = all->out[0] + row * step + own.first * b;
        walk ahead = after(all, &own, row, all->out[0], all->out[0]);
        for (int64_t i = 0; i < high; i++)
            unpack_numbers(rows + i * width, all->weight, (row + i) * step + own.first * b, width);
        memset(rows + high * width, 0, (size_t)((whole - high) * width) * sizeof(float));
        for (int64_t block = 0; block < own.blocks; block++) {
            rows_of source = {rows + block * b, width};
            float *by = core + block * b * wide;
            if (whole == high) {
                turn(out + block * b, step, &source, &by, 1, high, b, &ahead);
            } else {
                turn(out_copy, wide, &source, &by, 1, whole, b, &ahead);
                copy_rows(out + block * b, step, out_copy, wide, high, b);
            }
        }
    }
}

/* rows, n, b, core, out, and what oftfx/ops/packed.py names data, absmax, code, nested_absmax,
 * nested_code, offset, block_size, nested_block_size: out = W, (rows, n·b), or
 * W·blockdiag(I + core)ᵀ where core is not null; b then a multiple of 16, and n·b even in either
 * case. The scales are bytes where nested_absmax is not null. */
int oftfx_dequantise(const int64_t *given, parallel fork, int64_t threads) {
    const float *core = at(given[3]), *code = at(given[7]);
    packed weight = {at(given[5]), at(given[6]), at(given[8]), at(given[9]), at(given[10]),
                     given[11], given[12], {{0}}};
    for (int byte = 0; byte < 256; byte++)
        weight.value[byte] = (pair){code[byte >> 4], code[byte & 15]};
    job all = {.task = dequantise_task, .count = 1, .rows = given[0], .n = given[1], .b = given[2],
               .weight = &weight};
    all.tasks = (all.rows + TILE - 1) / TILE;
    all.out[0] = at(given[4]);
    if (core) {
        all.core[0] = core;
        all.task = dequantise_fold_task;
        all.splits = splits(all.rows, all.n);
        share(&all, 2, threads);
        all.room = all.group * all.b * (padded(all.b) + TILE) + TILE * padded(all.b);
    }
    return run(&all, fork, threads);
}

/* ---- cores: the series of oftfx/rotations/cayley.py ---- */

/* Their gradient goes back through Horner's rule step by step. The fewer products of `neumann_grad`
 * need more matrices turned over and held: of 32 columns, k = 4, 16 ms for a model in place of 14. */

/* m += sign·mᵀ, padding included. */
static void add_flipped(float *m, float sign, int64_t wide) {
    for (int64_t i = 0; i < wide; i += LANES)
        for (int64_t j = i; j < wide; j += LANES) {
            float *above = m + i * wide + j, *below = m + j * wide + i;
            vec a[LANES], b[LANES];
#pragma GCC unroll 16
            for (int64_t k = 0; k < LANES; k++) a[k] = load(above + k * wide);
#pragma GCC unroll 16
            for (int64_t k = 0; k < LANES; k++) b[k] = load(below + k * wide);
            flip(b);
#pragma GCC unroll 16
            for (int64_t k = 0; k < LANES; k++) store(above + k * wide, a[k] + sign * b[k]);
            if (i == j) continue;
            flip(a);
#pragma GCC unroll 16
            for (int64_t k = 0; k < LANES; k++)
                store(below + k * wide, load(below + k * wide) + sign * a[k]);
        }
}

/* Q = U − Uᵀ, its upper triangle times `sign`, padded with zeros. */
static void unpack(float *q, const float *theta, float sign, int64_t b) {
    int64_t wide = padded(b);
    memset(q, 0, (size_t)(wide * wide) * sizeof(float));
    for (int64_t i = 0; i < b; theta += b - 1 - i, i++)
        for (int64_t j = i + 1; j < b; j++) q[i * wide + j] = sign * theta[j - i - 1];
    add_flipped(q, -1, wide);
}

/* From one matrix of scratch space to the next: their same entries would otherwise compete for the
 * same places in the cache. */
INLINE int64_t apart(int64_t b) { return padded(b) * padded(b) + LANES; }

static void multiply(float *out, const float *from, const float *a, const float *b, int64_t size) {
    int64_t wide = padded(size);
    for (int64_t i = 0; i < wide * wide; i += HIGH * wide)
        product(out + i, from ? from + i : NULL, wide, wide, a + i, wide, 1, b, wide, size,
                (soon){0});
}

/* Q² and 2Q + 2Q², and Horner's values one after the other from `value` on, order/2 or one. */
static void horner(const float *q, float *square, float *full, float *value, int64_t count,
                   int64_t order, int64_t b) {
    multiply(square, NULL, q, q, b);
    for (int64_t i = 0; i < padded(b) * padded(b); i++) {
        full[i] = 2 * (q[i] + square[i]);
        value[i] = order % 2 ? 2 * q[i] + square[i] : q[i];
    }
    for (int64_t step = 1; step < count; step++, value += apart(b))
        multiply(value + apart(b), full, square, value, b);
}

static void cayley_task(const job *all, int64_t index, float *scratch) {
    int64_t b = all->b, next = apart(b), half = all->order / 2;
    float *q = scratch, *square = q + next, *full = square + next, *value = full + next;
    int64_t tensor = index / all->n, block = index % all->n;
    unpack(q, (float *)at(all->theta[tensor]) + block * (b * (b - 1) / 2), 1, b);
    horner(q, square, full, value, half + 1, all->order, b);
    copy_rows((float *)at(all->made[tensor]) + block * b * b, b, value + half * next, padded(b), b,
              b);
}

static void cayley_grad_task(const job *all, int64_t index, float *scratch) {
    int64_t b = all->b, wide = padded(b), size = wide * wide, next = apart(b);
    int64_t half = all->order / 2;
    float *q = scratch, *square = q + next, *full = square + next, *grad = full + next;
    float *full_grad = grad + next, *square_grad = full_grad + next, *spare = square_grad + next;
    float *value = spare + next;
    int64_t tensor = index / all->n, block = index % all->n;
    /* Every value is a polynomial in Q, and Qᵀ = −Q: the transposed ones that are wanted are the
     * values of −Q. */
    unpack(q, (float *)at(all->theta[tensor]) + block * (b * (b - 1) / 2), -1, b);
    horner(q, square, full, value, half, all->order, b);
    memset(grad, 0, (size_t)(3 * next) * sizeof(float)); /* and the two after it */
    copy_rows(grad, wide, (float *)at(all->grad[tensor]) + block * b * b, b, b, b);
    for (int64_t step = half - 1; step >= 0; step--) {
        for (int64_t i = 0; i < size; i++) full_grad[i] += grad[i];
        multiply(square_grad, square_grad, grad, value + step * next, b);
        multiply(spare, NULL, square, grad, b);
        float *swap = grad;
        grad = spare;
        spare = swap;
    }
    for (int64_t i = 0; i < size; i++) {
        square_grad[i] += 2 * full_grad[i];
        if (all->order % 2) {
            square_grad[i] += grad[i];
            grad[i] *= 2;
        }
        grad[i] += 2 * full_grad[i];
    }
    add_flipped(square_grad, 1, wide);
    multiply(full_grad, grad, square_grad, q, b); /* q is −Q */
    add_flipped(full_grad, -1, wide);
    float *to = (float *)at(all->made[tensor]) + block * (b * (b - 1) / 2);
    for (int64_t i = 0; i < b; to += b - 1 - i, i++)
        memcpy(to, full_grad + i * wide + i + 1, (size_t)(b - 1 - i) * sizeof(float));
}

/* count, n, b, order, theta[count], core[count]: each core (n, b, b) from theta (n, b(b−1)/2). */
int oftfx_cayley(const int64_t *given, parallel fork, int64_t threads) {
    job all = {.task = cayley_task, .n = given[1], .b = given[2], .order = given[3]};
    all.tasks = given[0] * all.n;
    all.theta = given + 4;
    all.made = all.theta + given[0];
    all.room = (4 + all.order / 2) * apart(all.b);
    return run(&all, fork, threads);
}

/* count, n, b, order, theta[count], out[count], grad[count]: the gradients (n, b, b) of the cores to
 * those of theta. */
int oftfx_cayley_grad(const int64_t *given, parallel fork, int64_t threads) {
    job all = {.task = cayley_grad_task, .n = given[1], .b = given[2], .order = given[3]};
    all.tasks = given[0] * all.n;
    all.theta = given + 4;
    all.made = all.theta + given[0];
    all.grad = all.made + given[0];
    all.room = (8 + all.order / 2) * apart(all.b);
    return run(&all, fork, threads);
}
