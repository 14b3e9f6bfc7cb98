// The step of many tensors at once, in few passes over memory. What it computes is defined by ../update.py,
// ../vertex_codec.py and ../../ops/pairwise_sum.py, to the bit; compile.py compiles this file, cpu.py fills in the
// tasks and checks that it has the same fields; the codes of kinds, types and rescale rules stand in interface.py.
//
// A tensor is cut into rows of 8,192 entries, which the threads share; a row into blocks of 64, one word of a bitmap
// each. Several tensors make a wave, small enough for its momentum to stay in the processor's cache. Of a wave
//
//   A  reads g, reads and writes m; counts |m| >= high, and lists the candidates low <= |m| < high    12 bytes an entry
//   S  marks those of the candidates that are missing to K; where the bracket [low, high) missed, a sample tells where
//      to look in another pass over m (in the cache), and where it misled, a radix search finds the K-th
//   P  reads θ (and m again, from the cache); sums; writes bitmap and signs                             4 bytes
//
// and apply_update() then updates all tensors                                                                   8 bytes
//
// The bracket is where the K-th magnitude was a step ago, as wide as it lately moved. It decides how fast the K-th
// magnitude is found, never what it is.

#include <omp.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 64, ROW = 8192, BLOCKS = ROW / BLOCK, LANES = 16;
constexpr int64_t STATS = 24;        // bytes: γ, gap, effective learning rate
constexpr int64_t WAVE = 320;         // rows: 10 MB of float32 momentum
constexpr int64_t AHEAD = 4096;       // bytes: the processor's own prefetching ends at a page, and then waits
constexpr float WIDEST = 0.1f;        // of a bracket, to either side, relative to the K-th magnitude
constexpr int64_t CANDIDATES = 2048;  // of one row; more of them are a miss
constexpr int RANGES = 64;            // of magnitude, within a bracket
constexpr int64_t SAMPLES = 32;       // magnitudes kept of a row
constexpr int64_t MOST_SAMPLES = 8192;  // of them looked at
constexpr int BITS[] = {11, 10, 10};    // of a magnitude's 31, from the top: the levels of the radix search
constexpr int SHIFTS[] = {20, 10, 0};
constexpr int BINS = 2048;

enum Kind : int32_t { MASK = 0, INDICES = 1, UNCONSTRAINED = 2 };
enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Rescale : int32_t { GRADIENT = 0, FAST_GRADIENT = 1, DIAMETER = 2, NONE = 3 };

}  // namespace

extern "C" {

struct Task {
    void* theta;
    const void* gradient;  // null: this tensor has none, and stays
    float* m;
    uint8_t* slot;
    int64_t n, support;  // entries, and the most of them that the vertex has
    double diameter, lr, momentum, weight_decay;
    float radius;
    int32_t kind, type, rescale, first;  // first: m ← g
    // How the K-th magnitude moves; kept from step to step.
    float threshold, drift;
    // Set and used within a step.
    int32_t missed, sampled;    // the bracket did, and a sample has to say where to look
    int64_t row;                // the first in the scratch memory
    int32_t low, high, shift;   // the bracket, as bit patterns, cut into ranges of 2^shift
    int32_t range, bound;       // that with the K-th magnitude, and where the next one begins
    int64_t wanted;             // of its entries
};

struct Scratch {  // as many rows as the longest wave
    uint64_t* marks;       // [rows][BLOCKS] bitmap of the vertex
    uint64_t* candidates;  // [rows][CANDIDATES] magnitude and index
    int32_t* ranges;       // [rows][RANGES] how many of them are in each
    int32_t* samples;      // [rows][SAMPLES] some magnitudes of every row
    int64_t* counts;       // [rows][2] nonzeros and candidates, then the row's first nonzero
    double* sums;          // [rows][3] ‖m‖², ‖θ − v‖², ⟨m, θ − v⟩
    int64_t* histogram;    // [threads + 1][BINS]
};
}

namespace {

// ------------------------------------------------------------------------------------------------------- 16 entries

// Vectors of 16, which the compiler maps to whatever registers there are. Only what has no operator is written by hand.
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using EightDoubles = double __attribute__((vector_size(64)));

float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// Magnitudes are compared as integers: the bit patterns of |x| are ordered as |x| is.
int32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }
Ints magnitude(Floats x) { return Ints(x) & 0x7fffffff; }

// The lanes' sign bits.
uint64_t signs(Ints lanes) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask(__m512i(lanes));
#elif defined(__AVX__)
    __m256 halves[2];
    std::memcpy(halves, &lanes, 64);
    return uint64_t(uint32_t(_mm256_movemask_ps(halves[0]) | _mm256_movemask_ps(halves[1]) << 8));
#else
    uint64_t word = 0;
    for (int i = 0; i < 16; i++) word |= uint64_t(lanes[i] < 0) << i;
    return word;
#endif
}

// A bit for each lane with magnitude >= bound; a difference of magnitudes does not overflow.
uint64_t at_least(Ints magnitudes, int32_t bound) { return signs((bound - 1) - magnitudes); }

// The low 16 bits of a word → lanes of ones and zeros.
Ints lanes_of(uint64_t word) {
#if defined(__AVX512DQ__)
    return Ints(_mm512_movm_epi32(__mmask16(word)));
#else
    const Ints bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (bit & int32_t(word & 0xffff)) == bit;
#endif
}

// The bits of `word` at the places that `mask` has, moved together; and the inverse.
uint64_t pack(uint64_t word, uint64_t mask) {
#ifdef __BMI2__
    return _pext_u64(word, mask);
#else
    uint64_t packed = 0;
    for (int i = 0; mask; mask &= mask - 1, i++) packed |= uint64_t((word & mask & -mask) != 0) << i;
    return packed;
#endif
}

uint64_t unpack(uint64_t packed, uint64_t mask) {
#ifdef __BMI2__
    return _pdep_u64(packed, mask);
#else
    uint64_t word = 0;
    for (; mask; mask &= mask - 1, packed >>= 1) word |= packed & 1 ? mask & -mask : 0;
    return word;
#endif
}

int64_t count(uint64_t word) { return __builtin_popcountll(word); }

// Parameters and gradients of any type, as float32.
struct Bfloat16 {
    uint16_t bits;
};
using Float16 = _Float16;

Floats load(const float* x) {
    Floats v;
    std::memcpy(&v, x, 64);
    return v;
}

Floats load(const Bfloat16* x) {
    using Shorts = uint16_t __attribute__((vector_size(32)));
    Shorts bits;
    std::memcpy(&bits, x, 32);
    return Floats(__builtin_convertvector(bits, Ints) << 16);
}

Floats load(const Float16* x) {
    Floats v;
    for (int i = 0; i < 16; i++) v[i] = float(x[i]);
    return v;
}

void store(float* x, Floats v) { std::memcpy(x, &v, 64); }

void store(Bfloat16* x, Floats v) {  // to the nearest, ties to even
    const Ints bits = Ints(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = Ints(v != v);
    for (int i = 0; i < 16; i++) x[i].bits = uint16_t(nan[i] ? 0x7fc0 : rounded[i]);
}

void store(Float16* x, Floats v) {
    for (int i = 0; i < 16; i++) x[i] = Float16(v[i]);
}

// A block of 64 entries; a tensor's last may have fewer, and is worked on in a copy padded with zeros.
template <class T>
struct Block {
    T* memory;
    T* entries;
    int64_t length;
    std::remove_const_t<T> padded[BLOCK];

    Block(T* memory, int64_t length) : memory(memory), entries(memory), length(length) {
        for (int line = 0; line < int(sizeof padded) / 64; line++)
            __builtin_prefetch((const char*)memory + AHEAD + 64 * line);
        if (length == BLOCK) return;
        std::memset((void*)padded, 0, sizeof padded);
        std::memcpy((void*)padded, memory, length * sizeof(T));
        entries = padded;
    }
    Floats operator[](int part) const { return load(entries + 16 * part); }
    void set(int part, Floats v) { store(entries + 16 * part, v); }
    void finish() const {
        if (length < BLOCK) std::memcpy((void*)memory, entries, length * sizeof(T));
    }
};

struct Doubles {
    EightDoubles low, high;
};

Doubles operator+(Doubles x, Doubles y) { return {x.low + y.low, x.high + y.high}; }

Doubles wide(Floats x) {
#ifdef __AVX512F__
    const __m512 all = __m512(x);
    return {EightDoubles(_mm512_cvtps_pd(_mm512_castps512_ps256(all))),
            EightDoubles(_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1)))};
#else
    using EightFloats = float __attribute__((vector_size(32)));
    EightFloats half[2];
    std::memcpy(half, &x, 64);
    return {__builtin_convertvector(half[0], EightDoubles), __builtin_convertvector(half[1], EightDoubles)};
#endif
}

// x·y + z. Fused or not makes no difference where x and y come from float32.
Doubles multiply_add(Doubles x, Doubles y, Doubles z) {
#ifdef __AVX512F__
    return {EightDoubles(_mm512_fmadd_pd(__m512d(x.low), __m512d(y.low), __m512d(z.low))),
            EightDoubles(_mm512_fmadd_pd(__m512d(x.high), __m512d(y.high), __m512d(z.high)))};
#else
    return {x.low * y.low + z.low, x.high * y.high + z.high};
#endif
}

Doubles product_sum(const Doubles* x, const Doubles* y) {  // of four vectors
    const Doubles zero{};
    return multiply_add(x[1], y[1], multiply_add(x[0], y[0], zero)) +
           multiply_add(x[3], y[3], multiply_add(x[2], y[2], zero));
}

// A sum in the order of pairwise_sum.py: adjacent vectors of 16 lanes are added, then adjacent sums, and so on; at last
// the lanes likewise. Products of two float32 are exact in float64, so nothing else is rounded.
struct RowSum {
    Doubles lanes[BLOCKS + 1];

    double total(int64_t blocks) {
        while (blocks > 1) {
            lanes[blocks] = Doubles{};
            blocks = (blocks + 1) / 2;
            for (int64_t b = 0; b < blocks; b++) lanes[b] = lanes[2 * b] + lanes[2 * b + 1];
        }
        double sums[LANES];
        std::memcpy(sums, lanes, sizeof sums);
        for (int width = LANES / 2; width; width /= 2)
            for (int l = 0; l < width; l++) sums[l] = sums[2 * l] + sums[2 * l + 1];
        return sums[0];
    }
};

double tree_sum(double* x, int64_t n, int64_t stride) {  // adjacent pairs again; x is overwritten
    for (; n > 1; n = (n + 1) / 2)
        for (int64_t i = 0; i < (n + 1) / 2; i++)
            x[i * stride] = x[2 * i * stride] + (2 * i + 1 < n ? x[(2 * i + 1) * stride] : 0.0);
    return x[0];
}

int64_t rows_of(const Task& t) { return (t.n + ROW - 1) / ROW; }
int64_t blocks_of(const Task& t, int64_t row) { return (std::min(ROW, t.n - row * ROW) + BLOCK - 1) / BLOCK; }
int64_t aligned(int64_t bytes) { return (bytes + 7) / 8 * 8; }

uint64_t* signs_of(const Task& t) { return (uint64_t*)(t.slot + STATS + aligned((t.n + 7) / 8)); }
// The bitmap is made in the slot itself where that holds one.
uint64_t* marks_of(const Task& t, const Scratch& s, int64_t row) {
    return t.kind == MASK ? (uint64_t*)(t.slot + STATS) + row * BLOCKS : s.marks + (t.row + row) * BLOCKS;
}

// Greater: of larger magnitude or, at the same, of lower index.
uint64_t candidate(int32_t magnitude, int64_t index) {
    return uint64_t(magnitude) << 32 | (0xffffffff - uint32_t(index));
}
int32_t magnitude_of(uint64_t candidate) { return int32_t(candidate >> 32); }
int64_t index_of(uint64_t candidate) { return 0xffffffff - uint32_t(candidate); }

// Writes the numbers of a word's bits and returns how many there are. A loop over the bits would mispredict its end at
// nearly every block, so four are written whether they are there or not.
int64_t list(uint64_t word, int32_t begin, int32_t* out) {
    const int64_t number = count(word);
    for (int i = 0; i < 4; i++, word &= word - 1) out[i] = begin + (word ? __builtin_ctzll(word) : 0);
    for (int64_t i = 4; i < number; i++, word &= word - 1) out[i] = begin + __builtin_ctzll(word);
    return number;
}

// -------------------------------------------------------------------------------------------- A: momentum, candidates

void set_bracket(Task& t, int32_t low, int32_t high) {
    t.low = low, t.high = high;
    for (t.shift = 0; (high - low) >> t.shift >= RANGES;) t.shift++;
}

// Where the K-th magnitude is looked for at first: about where it was, three times as wide as it lately moved. Nowhere,
// if that is so wide that a sample will do better.
void bracket_by_last(Task& t) {
    const float width = std::max(3 * t.drift, 0.01f), kth = t.threshold;
    if (kth > 0 && (width < WIDEST || rows_of(t) == 1))
        set_bracket(t, std::max(1, bits_of(kth * (1 - width))), bits_of(kth * (1 + width)));
    else
        set_bracket(t, INT32_MAX, INT32_MAX);
}

// And where, if it is not there: between two order statistics of the sample that the rows have taken, three standard
// deviations to either side.
void bracket_by_sample(Task& t, const Scratch& s) {
    const int64_t rows = rows_of(t), size = std::min((rows - 1) * SAMPLES, MOST_SAMPLES);  // the last row may be short
    int32_t sample[MOST_SAMPLES];
    const int64_t every = (rows - 1) * SAMPLES / size;
    for (int64_t i = 0; i < size; i++) sample[i] = s.samples[t.row * SAMPLES + i * every];
    const double rank = double(t.support) / double(t.n) * double(size), deviation = 3 * std::sqrt(rank) + 1;
    int32_t low = 1, high = INT32_MAX;
    int64_t greatest = size;  // of the sample, once they are together at the front
    if (rank + deviation < double(size)) {
        greatest = int64_t(rank + deviation);
        std::nth_element(sample, sample + greatest, sample + size, std::greater<>());
        low = sample[greatest];
    }
    if (rank > deviation) {
        const auto above = int64_t(rank - deviation);
        std::nth_element(sample, sample + above, sample + greatest, std::greater<>());
        high = sample[above];
    }
    set_bracket(t, std::max(1, low), std::max(high, std::max(1, low)));
}

// Counts what is above the bracket and lists what is inside, block by block.
struct Marker {
    const Task& t;
    const int32_t low, high;
    int32_t listed[ROW + 4];
    int64_t above = 0, waiting = 0;

    explicit Marker(const Task& t) : t(t), low(t.low), high(t.high) {}

    void add(int64_t block, const Floats* directions) {
        uint64_t over = 0, between = 0;
        for (int i = 0; i < 4; i++) {
            over |= at_least(magnitude(directions[i]), high) << (16 * i);
            between |= at_least(magnitude(directions[i]), low) << (16 * i);
        }
        above += count(over);
        waiting += list(between & ~over, int32_t(block * BLOCK), listed + waiting);
    }
    void finish(const Scratch& s, int64_t row) const {
        std::fill_n(marks_of(t, s, row), blocks_of(t, row), 0);
        s.counts[2 * (t.row + row)] = above;
        s.counts[2 * (t.row + row) + 1] = waiting;
        int32_t* ranges = s.ranges + (t.row + row) * RANGES;
        uint64_t* candidates = s.candidates + (t.row + row) * CANDIDATES;
        std::fill_n(ranges, RANGES, 0);
        for (int64_t i = 0; i < std::min(waiting, CANDIDATES); i++) {
            const int32_t key = magnitude(t.m[row * ROW + listed[i]]);
            candidates[i] = candidate(key, row * ROW + listed[i]);
            ranges[(key - t.low) >> t.shift]++;
        }
    }
};

template <class T>
void momentum_row(Task& t, const Scratch& s, int64_t row) {
    const float rho = float(t.momentum), fresh = float(1 - t.momentum);
    const bool first = t.first;
    Marker marker(t);
    RowSum squares;
    const int64_t blocks = blocks_of(t, row);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = row * ROW + b * BLOCK, length = std::min(BLOCK, t.n - begin);
        const Block<const T> g((const T*)t.gradient + begin, length);
        Block<float> m(t.m + begin, length);
        Floats directions[4];
        Doubles precise[4];
        for (int i = 0; i < 4; i++) {
            directions[i] = first ? g[i] : rho * m[i] + fresh * g[i];
            m.set(i, directions[i]);
            precise[i] = wide(directions[i]);
        }
        m.finish();
        squares.lanes[b] = product_sum(precise, precise);
        marker.add(b, directions);
    }
    marker.finish(s, row);
    s.sums[3 * (t.row + row)] = squares.total(blocks);
    if (blocks == BLOCKS)
        for (int64_t i = 0; i < SAMPLES; i++) {  // one of every 256, at places that follow no period
            const uint64_t hash = uint64_t(row * SAMPLES + i) * 0x9e3779b97f4a7c15;
            const int64_t place = i * (ROW / SAMPLES) + int64_t(hash >> 56);
            s.samples[(t.row + row) * SAMPLES + i] = magnitude(t.m[row * ROW + place]);
        }
}

void mark_row(const Task& t, const Scratch& s, int64_t row) {
    Marker marker(t);
    for (int64_t b = 0; b < blocks_of(t, row); b++) {
        const int64_t begin = row * ROW + b * BLOCK;
        const Block<const float> m(t.m + begin, std::min(BLOCK, t.n - begin));
        const Floats directions[4] = {m[0], m[1], m[2], m[3]};
        marker.add(b, directions);
    }
    marker.finish(s, row);
}

// ----------------------------------------------------------------------------------------------- S: the K-th magnitude

void mark(const Task& t, const Scratch& s, int64_t index) {
    marks_of(t, s, 0)[index / BLOCK] |= uint64_t(1) << (index % BLOCK);
    s.counts[2 * (t.row + index / ROW)]++;
}

void found(Task& t, int32_t kth) {
    const float before = t.threshold, moved = before > 0 ? std::fabs(std::log(float_of(kth) / before)) : 1;
    t.threshold = float_of(kth);
    t.drift = moved < 1 ? 0.9f * t.drift + 0.1f * moved : 0.02f;
}

// Marks the `wanted` greatest of the candidates.
void take(Task& t, const Scratch& s, uint64_t* candidates, int64_t number, int64_t wanted) {
    if (wanted == 0) return;
    std::nth_element(candidates, candidates + wanted - 1, candidates + number, std::greater<>());
    for (int64_t i = 0; i < wanted; i++) mark(t, s, index_of(candidates[i]));
    found(t, magnitude_of(candidates[wanted - 1]));
}

// All nonzeros of a tensor of one row.
void select_plainly(Task& t, const Scratch& s) {
    uint64_t nonzeros[ROW];
    int64_t number = 0;
    for (int64_t i = 0; i < t.n; i++)
        if (magnitude(t.m[i])) nonzeros[number++] = candidate(magnitude(t.m[i]), i);
    std::fill_n(marks_of(t, s, 0), blocks_of(t, 0), 0);
    s.counts[2 * t.row] = 0;
    t.bound = INT32_MAX;
    take(t, s, nonzeros, number, std::min(t.support, number));
}

// Whether the bracket has the K-th magnitude, and then the range that has it.
bool finds_range(Task& t, const Scratch& s) {
    int64_t above = 0, waiting = 0;
    int32_t ranges[RANGES] = {};
    for (int64_t row = t.row; row < t.row + rows_of(t); row++) {
        if (s.counts[2 * row + 1] > CANDIDATES) return false;
        above += s.counts[2 * row];
        waiting += s.counts[2 * row + 1];
        for (int range = 0; range < RANGES; range++) ranges[range] += s.ranges[row * RANGES + range];
    }
    t.wanted = t.support - above;
    if (t.low == 1) t.wanted = std::min(t.wanted, waiting);  // all nonzeros
    t.range = RANGES - 1;
    if (t.wanted < 0 || t.wanted > waiting) return false;
    for (; t.range > 0 && ranges[t.range] < t.wanted; t.range--) t.wanted -= ranges[t.range];
    t.bound = int32_t(std::min(int64_t(t.high), t.low + (int64_t(t.range + 1) << t.shift)));
    return true;
}

// Counts the row's candidates above the range as entries of the vertex; those in the range come to the front.
void keep_range(const Task& t, const Scratch& s, int64_t row) {
    uint64_t* candidates = s.candidates + (t.row + row) * CANDIDATES;
    const int64_t number = s.counts[2 * (t.row + row) + 1];
    for (int range = t.range + 1; range < RANGES; range++)
        s.counts[2 * (t.row + row)] += s.ranges[(t.row + row) * RANGES + range];
    int64_t left = 0;
    for (int64_t i = 0; i < number; i++) {
        const uint64_t here = candidates[i];
        candidates[left] = here;
        left += (magnitude_of(here) - t.low) >> t.shift == t.range;
    }
    s.counts[2 * (t.row + row) + 1] = left;
}

void mark_range(Task& t, const Scratch& s) {
    uint64_t* candidates = s.candidates + t.row * CANDIDATES;
    int64_t number = s.counts[2 * t.row + 1];
    for (int64_t row = t.row + 1; row < t.row + rows_of(t); row++) {  // one after the other
        std::copy_n(s.candidates + row * CANDIDATES, s.counts[2 * row + 1], candidates + number);
        number += s.counts[2 * row + 1];
    }
    take(t, s, candidates, number, t.wanted);
}

// Magnitudes whose upper bits are `prefix`, counted by their next ones.
void histogram_row(const Task& t, int64_t row, int level, int32_t prefix, int64_t* bins) {
    const int above = SHIFTS[level] + BITS[level], mask = (1 << BITS[level]) - 1;
    const int64_t end = std::min(t.n, (row + 1) * ROW);
    for (int64_t i = row * ROW; i < end; i++) {
        const int32_t key = magnitude(t.m[i]);
        if (level == 0)
            bins[key >> SHIFTS[0]]++;
        else if (key >> above == prefix)
            bins[(key >> SHIFTS[level]) & mask]++;
    }
}

// How many lie above the K-th magnitude, and how many at it.
void count_above(const Task& t, const Scratch& s, int64_t row, int32_t kth) {
    int64_t above = 0, at = 0;
    const int64_t end = std::min(t.n, (row + 1) * ROW);
    for (int64_t i = row * ROW; i < end; i++) {
        above += magnitude(t.m[i]) > kth;
        at += magnitude(t.m[i]) == kth;
    }
    std::fill_n(marks_of(t, s, row), blocks_of(t, row), 0);
    s.counts[2 * (t.row + row)] = above;
    s.counts[2 * (t.row + row) + 1] = at;
}

// The first entries at the K-th magnitude, as many as are still wanted.
void mark_ties(const Task& t, const Scratch& s, int32_t kth, int64_t left_over) {
    for (int64_t row = 0; row < rows_of(t) && left_over > 0; row++) {
        if (s.counts[2 * (t.row + row) + 1] == 0) continue;
        const int64_t end = std::min(t.n, (row + 1) * ROW);
        for (int64_t i = row * ROW; i < end && left_over > 0; i++)
            if (magnitude(t.m[i]) == kth) mark(t, s, i), left_over--;
    }
}

// Where the bracket missed: an exact radix search by all threads. To be called by all of them.
void search(Task& t, Scratch& s) {
    const int64_t rows = rows_of(t);
    int64_t* mine = s.histogram + (omp_get_thread_num() + 1) * BINS;
    int64_t left_over = t.support;  // for what lies at or below the prefix
    int32_t prefix = 0;
    for (int level = 0; level < 3; level++) {
        std::fill_n(mine, BINS, 0);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) histogram_row(t, row, level, prefix, mine);
        // Every thread adds and looks for itself; the barrier keeps the others from clearing theirs too early.
        int bin = (1 << BITS[level]) - 1;
        for (;; bin--) {
            int64_t here = 0;
            for (int thread = 1; thread <= omp_get_num_threads(); thread++) here += s.histogram[thread * BINS + bin];
            if (here >= left_over || bin == 0) break;
            left_over -= here;
        }
        prefix = prefix << BITS[level] | bin;
#pragma omp barrier
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) count_above(t, s, row, prefix);
#pragma omp single
    {
        t.bound = prefix + 1;
        if (prefix > 0) mark_ties(t, s, prefix, left_over);
        found(t, prefix);
    }
}

// ------------------------------------------------------------------------------------------- P: sums, bitmap and signs

// Bits written one after the other into words that begin and end among the neighbours' bits.
struct BitWriter {
    uint64_t* word;
    uint64_t pending = 0;
    int filled;
    bool shared = true;  // the first and the last word may hold bits of other rows

    BitWriter(uint64_t* words, int64_t at) : word(words + at / 64), filled(int(at % 64)) {}
    void write(uint64_t bits, int64_t length) {
        pending |= bits << filled;
        if (filled + length >= 64) {
            flush();
            word++;
            pending = filled ? bits >> (64 - filled) : 0;
            filled = int(filled + length - 64);
            shared = false;
        } else {
            filled += int(length);
        }
    }
    void flush() { shared ? void(__atomic_fetch_or(word, pending, __ATOMIC_RELAXED)) : void(*word = pending); }
    void finish() {
        shared = true;
        if (filled) flush();
    }
};

template <class T>
void products_row(const Task& t, const Scratch& s, int64_t row) {
    uint64_t* marks = marks_of(t, s, row);
    const int64_t blocks = blocks_of(t, row), first = s.counts[2 * (t.row + row)];
    const int32_t bound = t.bound;
    BitWriter written(signs_of(t), first);
    int32_t* indices = (int32_t*)(t.slot + STATS) + first;
    RowSum distance, gap;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = row * ROW + b * BLOCK, length = std::min(BLOCK, t.n - begin);
        const Block<const T> theta((const T*)t.theta + begin, length);
        const Block<float> m(t.m + begin, length);
        uint64_t marked = marks[b], below = 0;
        for (int i = 0; i < 4; i++) marked |= at_least(magnitude(m[i]), bound) << (16 * i);
        marks[b] = marked;
        Doubles directions[4], differences[4];
        for (int i = 0; i < 4; i++) {
            const Ints magnitudes = lanes_of(marked >> (16 * i)) & bits_of(t.radius);
            const Ints sign = Ints(m[i]) & int32_t(0x80000000);
            const Floats away = theta[i] + Floats(magnitudes | sign);  // θ − v, v = −radius·sign(m)
            below |= signs(Ints(m[i])) << (16 * i);
            differences[i] = wide(away);
            directions[i] = wide(m[i]);
        }
        distance.lanes[b] = product_sum(differences, differences);
        gap.lanes[b] = product_sum(directions, differences);
        const uint64_t negative = ~below & marked;  // entries of v, against the momentum's
        if (t.kind == MASK)
            written.write(pack(negative, marked), count(marked));
        else
            for (; marked; marked &= marked - 1) {
                const int i = __builtin_ctzll(marked);
                *indices++ = int32_t(negative >> i & 1 ? -2 - (begin + i) : begin + i);
            }
    }
    if (t.kind == MASK) written.finish();
    s.sums[3 * (t.row + row) + 1] = distance.total(blocks);
    s.sums[3 * (t.row + row) + 2] = gap.total(blocks);
}

// Each row's first nonzero; and what the slot has space for beyond the last one.
void lay_out(const Task& t, const Scratch& s) {
    int64_t before = 0;
    for (int64_t row = 0; row < rows_of(t); row++) {
        const int64_t here = s.counts[2 * (t.row + row)];
        s.counts[2 * (t.row + row)] = before;
        before += here;
    }
    if (t.kind == MASK)
        std::memset(signs_of(t), 0, aligned((t.support + 7) / 8));
    else
        std::fill((int32_t*)(t.slot + STATS) + before, (int32_t*)(t.slot + STATS) + t.support, -1);
}

void write_stats(const Task& t, double squared, double distance_squared, double gap) {
    const double norm = std::sqrt(squared), distance = std::sqrt(distance_squared);
    double factor = 1;
    switch (t.rescale) {
        case GRADIENT: factor = norm / distance; break;
        case FAST_GRADIENT: factor = 2 * norm / t.diameter; break;
        case DIAMETER: factor = 1 / t.diameter; break;
    }
    double gamma = std::min(std::max(t.lr * factor, 0.0), 1.0), effective = gamma * distance / norm;
    if (norm == 0 || t.lr == 0) gamma = effective = 0;  // at θ = v, 0 · ∞ is no number
    if (!std::isfinite(norm)) gamma = std::nan("");
    double* stats = (double*)t.slot;
    stats[0] = gamma, stats[1] = gap, stats[2] = effective;
}

void stats_of_rows(const Task& t, const Scratch& s) {
    const int64_t rows = rows_of(t);
    double* sums = s.sums + 3 * t.row;
    const double squared = tree_sum(sums, rows, 3), distance = tree_sum(sums + 1, rows, 3);
    write_stats(t, squared, distance, tree_sum(sums + 2, rows, 3));
}

// ---------------------------------------------------------------------------------------------- unconstrained tensors

// Its momentum is what travels.
template <class T>
void sgd_row(Task& t, const Scratch& s, int64_t row) {
    const float rho = float(t.momentum), decay = float(t.weight_decay);
    float* out = (float*)(t.slot + STATS);
    uint64_t infinite = 0;
    for (int64_t b = 0; b < blocks_of(t, row); b++) {
        const int64_t begin = row * ROW + b * BLOCK, length = std::min(BLOCK, t.n - begin);
        const Block<const T> g((const T*)t.gradient + begin, length), theta((const T*)t.theta + begin, length);
        Block<float> m(t.m + begin, length);
        for (int i = 0; i < 4; i++) {
            const Floats decayed = decay ? g[i] + decay * theta[i] : g[i];
            const Floats direction = t.first ? decayed : rho * m[i] + decayed;
            m.set(i, direction);
            infinite |= at_least(magnitude(direction), 0x7f800000);
        }
        m.finish();
        std::copy_n(m.entries, length, out + begin);
    }
    s.sums[3 * (t.row + row)] = infinite ? std::nan("") : 0.0;
}

void sgd_stats(const Task& t, const Scratch& s) {
    double poison = 0;
    for (int64_t row = 0; row < rows_of(t); row++) poison += s.sums[3 * (t.row + row)];
    double* stats = (double*)t.slot;
    stats[0] = t.lr + poison, stats[1] = poison, stats[2] = t.lr;
}

void stay(const Task& t) {  // a step of length 0, to a vertex that any rank can decode
    std::memset(t.slot, 0, STATS);
    const int64_t mask = aligned((t.n + 7) / 8);
    switch (t.kind) {
        case MASK: std::memset(t.slot + STATS, 0, mask + aligned((t.support + 7) / 8)); break;
        case INDICES: std::memset(t.slot + STATS, 0xff, 4 * t.support); break;
        default: std::memset(t.slot + STATS, 0, 4 * t.n);
    }
}

// --------------------------------------------------------------------------------------------------------- the update

// Of one entry of a list of indices: −2 − i for a negative one; −1, of which there may be some at the end, has none.
int64_t index_stored(int32_t stored) { return stored >= 0 ? stored : stored == -1 ? INT64_MAX : int64_t(-2) - stored; }

template <class T>
void move_row(const Task& t, const Scratch& s, int64_t row) {
    const double gamma = *(const double*)t.slot;
    const float keep = float(1 - gamma), shift = t.radius * float(gamma), lr = float(gamma);
    const uint64_t* marks = (const uint64_t*)(t.slot + STATS) + row * BLOCKS;
    const uint64_t* written = signs_of(t);
    const float* direction = (const float*)(t.slot + STATS);
    int64_t at = t.kind == MASK ? s.counts[2 * (t.row + row)] : 0;
    const int32_t *next = (const int32_t*)(t.slot + STATS), *end = next + t.support;
    if (t.kind == INDICES)
        next = std::partition_point(next, end, [&](int32_t stored) { return index_stored(stored) < row * ROW; });
    for (int64_t b = 0; b < blocks_of(t, row); b++) {
        const int64_t begin = row * ROW + b * BLOCK, length = std::min(BLOCK, t.n - begin);
        Block<T> theta((T*)t.theta + begin, length);
        if (t.kind == UNCONSTRAINED) {
            const Block<const float> m(direction + begin, length);
            for (int i = 0; i < 4; i++) theta.set(i, theta[i] - m[i] * lr);
        } else if (t.kind == MASK) {
            const uint64_t marked = marks[b];
            const int64_t here = count(marked);
            uint64_t packed = written[at / 64] >> (at % 64);
            if (at % 64 + here > 64) packed |= written[at / 64 + 1] << (64 - at % 64);
            const uint64_t negative = unpack(packed, marked);
            at += here;
            for (int i = 0; i < 4; i++) {
                const Ints in = lanes_of(marked >> (16 * i)), up = lanes_of((marked & ~negative) >> (16 * i));
                // −0 where the vertex is 0, for x + (−0) is x, also for x = −0.
                const Ints step = (in & bits_of(shift)) | (~up & int32_t(0x80000000));
                theta.set(i, keep * theta[i] + Floats(step));
            }
        } else {
            alignas(64) float moved[BLOCK];
            for (int i = 0; i < 4; i++) store(moved + 16 * i, keep * theta[i]);
            for (; next < end && index_stored(*next) < begin + length; next++)
                moved[index_stored(*next) - begin] += *next < 0 ? -shift : shift;
            for (int i = 0; i < 4; i++) theta.set(i, load(moved + 16 * i));
        }
        theta.finish();
    }
}

void count_row(const Task& t, const Scratch& s, int64_t row) {
    const uint64_t* marks = (const uint64_t*)(t.slot + STATS) + row * BLOCKS;
    int64_t here = 0;
    for (int64_t b = 0; b < blocks_of(t, row); b++) here += count(marks[b]);
    s.counts[2 * (t.row + row)] = here;
}

template <class F>
void of_type(const Task& t, F&& f) {
    switch (t.type) {
        case FLOAT32: f(float()); break;
        case BFLOAT16: f(Bfloat16()); break;
        default: f(Float16());
    }
}

// The task that has a row of the scratch memory.
Task& task_of(Task* tasks, int64_t begin, int64_t end, int64_t row) {
    const auto before = [](int64_t row, const Task& t) { return row < t.row; };
    return *(std::upper_bound(tasks + begin, tasks + end, row, before) - 1);
}

// Runs f(task, row) for all rows of a range of tasks that follow each other in the scratch memory.
template <class F>
void over_rows(Task* tasks, int64_t begin, int64_t end, int64_t rows, F&& f) {
    // Static, so that a thread meets the same rows in every phase, in its own cache.
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        Task& t = task_of(tasks, begin, end, i);
        f(t, i - t.row);
    }
}

// Rows of tasks[begin ... end), which are laid out one after the other.
int64_t lay_rows(Task* tasks, int64_t begin, int64_t end) {
    int64_t rows = 0;
    for (int64_t i = begin; i < end; i++) {
        tasks[i].row = rows;
        rows += rows_of(tasks[i]);
        bracket_by_last(tasks[i]);
    }
    return rows;
}

}  // namespace

extern "C" {

// Where each field of a task lies, and the size of a task.
void task_fields(int64_t* offsets) {
    const size_t fields[] = {
        offsetof(Task, theta),     offsetof(Task, gradient),  offsetof(Task, m),        offsetof(Task, slot),
        offsetof(Task, n),         offsetof(Task, support),   offsetof(Task, diameter), offsetof(Task, lr),
        offsetof(Task, momentum),  offsetof(Task, weight_decay), offsetof(Task, radius), offsetof(Task, kind),
        offsetof(Task, type),      offsetof(Task, rescale),   offsetof(Task, first),    offsetof(Task, threshold),
        offsetof(Task, drift),     offsetof(Task, missed),    offsetof(Task, sampled),  offsetof(Task, row),
        offsetof(Task, low),       offsetof(Task, high),      offsetof(Task, shift),    offsetof(Task, range),
        offsetof(Task, bound),     offsetof(Task, wanted),    sizeof(Task)};
    std::copy(std::begin(fields), std::end(fields), offsets);
}

// The owner's part, for whole tensors: momentum, vertex, statistics; written into the slots.
void compute_vertices(Task* tasks, int64_t number, Scratch* scratch, int32_t threads) {
    Scratch& s = *scratch;
#pragma omp parallel num_threads(threads)
    for (int64_t begin = 0, end; begin < number; begin = end) {
        int64_t total = 0;
        for (end = begin; end < number && (end == begin || total + rows_of(tasks[end]) <= WAVE); end++)
            total += rows_of(tasks[end]);
#pragma omp barrier
#pragma omp single
        lay_rows(tasks, begin, end);
        over_rows(tasks, begin, end, total, [&](Task& t, int64_t row) {
            if (t.gradient == nullptr) return;
            of_type(t, [&](auto type) {
                if (t.kind == UNCONSTRAINED)
                    sgd_row<decltype(type)>(t, s, row);
                else
                    momentum_row<decltype(type)>(t, s, row);
            });
        });
        const auto selects = [](const Task& t) { return t.gradient && t.kind != UNCONSTRAINED; };
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = begin; i < end; i++) {
            Task& t = tasks[i];
            t.missed = selects(t) && !finds_range(t, s);
            t.sampled = t.missed && rows_of(t) > 1;
            if (t.sampled) bracket_by_sample(t, s);
            if (t.missed && !t.sampled) select_plainly(t, s);
        }
        over_rows(tasks, begin, end, total, [&](Task& t, int64_t row) {
            if (t.sampled) mark_row(t, s, row);
        });
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = begin; i < end; i++)
            if (tasks[i].sampled) tasks[i].missed = !finds_range(tasks[i], s);
        over_rows(tasks, begin, end, total, [&](Task& t, int64_t row) {
            if (selects(t) && !t.missed) keep_range(t, s, row);
        });
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = begin; i < end; i++)
            if (selects(tasks[i]) && !tasks[i].missed) mark_range(tasks[i], s);
        for (int64_t i = begin; i < end; i++)
            if (selects(tasks[i]) && tasks[i].missed && rows_of(tasks[i]) > 1) search(tasks[i], s);
#pragma omp for schedule(static)
        for (int64_t i = begin; i < end; i++)
            if (tasks[i].gradient == nullptr)
                stay(tasks[i]);
            else if (tasks[i].kind != UNCONSTRAINED)
                lay_out(tasks[i], s);
        over_rows(tasks, begin, end, total, [&](Task& t, int64_t row) {
            if (t.gradient == nullptr || t.kind == UNCONSTRAINED) return;
            of_type(t, [&](auto type) { products_row<decltype(type)>(t, s, row); });
        });
#pragma omp for schedule(static)
        for (int64_t i = begin; i < end; i++)
            if (tasks[i].gradient) tasks[i].kind == UNCONSTRAINED ? sgd_stats(tasks[i], s) : stats_of_rows(tasks[i], s);
    }
}

// Every rank's part: θ ← (1 − γ)·θ + γ·v, or θ − lr·m, from the slots alone.
void apply_update(Task* tasks, int64_t number, Scratch* scratch, int32_t threads) {
    Scratch& s = *scratch;
    const int64_t rows = lay_rows(tasks, 0, number);
#pragma omp parallel num_threads(threads)
    {
        over_rows(tasks, 0, number, rows, [&](Task& t, int64_t row) {
            if (t.kind == MASK) count_row(t, s, row);
        });
#pragma omp for schedule(static)
        for (int64_t i = 0; i < number; i++) {
            int64_t before = 0;
            for (int64_t row = 0; tasks[i].kind == MASK && row < rows_of(tasks[i]); row++) {
                int64_t& here = s.counts[2 * (tasks[i].row + row)];
                std::swap(here, before);
                before += here;
            }
        }
        over_rows(tasks, 0, number, rows, [&](Task& t, int64_t row) {
            of_type(t, [&](auto type) { move_row<decltype(type)>(t, s, row); });
        });
    }
}
}
