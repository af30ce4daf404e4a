/* The runtime, and what tests need to see inside it: the conversions of numbers of 16 bits. */
#include "optforge.c"

#define API __attribute__((visibility("default")))
API void convert(int row, int column, int set, uint16_t *stored, uint16_t *low, float *wide, size_t n,
                 const uint64_t *key);
API void draws(uint32_t *to, size_t n, const uint64_t *key);
API uint64_t split_faults(int set, uint64_t first, uint64_t stride);
API void convert_blocks(int row, int without_sign, int set, uint8_t *codes, float *scales, float *wide, size_t n);
API uint64_t block_faults(int without_sign, int set, uint32_t first, uint32_t stride);

/* Row 0 loads, 1 stores to nearest, 2 at random; key is the seed, t, the stream, the array and the element. */
void convert(int row, int column, int set, uint16_t *stored, uint16_t *low, float *wide, size_t n,
             const uint64_t *key) {
    const optforge_draw draw = optforge_drawing(key[0], key[1], key[2], (size_t)key[3], key[4]);
    optforge_converts[row][column][set](stored, low, wide, n, &draw);
}

/* The random bits of n elements. */
void draws(uint32_t *to, size_t n, const uint64_t *key) {
    const optforge_draw draw = optforge_drawing(key[0], key[1], key[2], (size_t)key[3], key[4]);
    for (size_t i = 0; i < n; i++)
        to[i] = optforge_random(&draw, OPTFORGE_TURN * (uint32_t)i);
}

/* Counts floats that are not what they were after they have been split and joined: of every stride-th pattern of
 * 32 bits from the first on. A NaN is one in p too, and leaves nothing. */
uint64_t split_faults(int set, uint64_t first, uint64_t stride) {
    enum { BLOCK = 1024 };
    uint32_t before[BLOCK], after[BLOCK];
    uint16_t stored[BLOCK], low[BLOCK];
    float wide[BLOCK];
    uint64_t faults = 0, pattern = first;
    while (pattern >> 32 == 0) {
        size_t n = 0;
        for (; n < BLOCK && pattern >> 32 == 0; pattern += stride)
            before[n++] = (uint32_t)pattern;
        memcpy(wide, before, sizeof wide);
        optforge_converts[1][2][set](stored, low, wide, n, NULL);
        memset(wide, 0, sizeof wide);
        optforge_converts[0][2][set](stored, low, wide, n, NULL);
        memcpy(after, wide, sizeof after);
        for (size_t i = 0; i < n; i++) {
            const int nan = (before[i] & 0x7fffffffu) > 0x7f800000u;
            const uint32_t quiet = (before[i] & 0x80000000u) | 0x7fc00000u;
            faults += after[i] != (nan ? quiet : before[i]);
            faults += nan && (stored[i] != quiet >> 16 || low[i] != 0);
        }
    }
    return faults;
}

/* Loads or stores state of 8 bits. */
void convert_blocks(int row, int without_sign, int set, uint8_t *codes, float *scales, float *wide, size_t n) {
    optforge_map maps[2];
    optforge_fill_map(maps, 1), optforge_fill_map(maps + 1, 0);
    optforge_converts[row][3 + without_sign][set](codes, scales, wide, n, maps);
}

/* Counts the floats from 0 to 1, and those from -1 to 0 where there is a sign, whose code is not that of the nearest
 * number: of every stride-th from pattern `first` on. They ascend, and so do the codes. */
uint64_t block_faults(int without_sign, int set, uint32_t first, uint32_t stride) {
    const uint32_t one = 0x3f800000u;
    uint64_t faults = 0;
    optforge_map maps[2];
    const float *number = maps[without_sign].number;
    optforge_fill_map(maps, 1), optforge_fill_map(maps + 1, 0);
    for (int side = 0; side < 2 - without_sign; side++) {
        const uint32_t sign = side ? 0x80000000u : 0u;
        int code = without_sign ? 0 : 127;
        for (uint64_t pattern = first; pattern <= one;) {
            float wide[OPTFORGE_BLOCK] = {1.0f}, scale;
            double x[OPTFORGE_BLOCK];
            uint8_t codes[OPTFORGE_BLOCK];
            size_t n = 1;
            for (; n < OPTFORGE_BLOCK && pattern <= one; pattern += stride, n++)
                x[n] = (double)(wide[n] = optforge_float((uint32_t)pattern | sign));
            optforge_converts[1][3 + without_sign][set](codes, &scale, wide, n, maps);
            for (size_t i = 1; i < n; i++) {
                while (code < 255 && x[i] > ((double)number[code] + (double)number[code + 1]) / 2)
                    code++;
                while (code > 0 && x[i] <= ((double)number[code - 1] + (double)number[code]) / 2)
                    code--;
                faults += codes[i] != code;
            }
        }
    }
    return faults;
}
