#include "jpeg.h"

#include <stdlib.h>
#include <string.h>

static const u8 natural[64 + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, /* the
    last 16 are for runs that lead out of a block, as libjpeg has them */
};

static int word(const u8 *at) { return at[0] << 8 | at[1]; }

/* ---- The header ---- */

static uint32_t entry(const Huffman *table, int symbol, int length) {
    int size = symbol & 15, run = symbol >> 4, places;
    if (table->dc)
        size = symbol, places = 1;
    else if (size)
        places = run + 1;
    else
        places = run == 15 ? 16 : 64; /* sixteen zeros, or the end of the block */
    return (uint32_t)(length + size) | (uint32_t)length << 8 | (uint32_t)size << 16 | (uint32_t)places << 24;
}

static int read_huffman(Jpeg *jpeg, const u8 *at, int bytes) {
    while (bytes > 0) {
        if (bytes < 17) return 0;
        int class = at[0] >> 4, number = at[0] & 15, total = 0;
        for (int length = 1; length <= 16; length++) total += at[length];
        if (class > 1 || number > 3 || total > 256 || bytes < 17 + total) return 0;
        Huffman *table = &jpeg->huffman[class][number];
        memset(table, 0, sizeof *table);
        memcpy(table->symbols, at + 17, (size_t)total);
        table->dc = class == 0;
        uint32_t code = 0;
        for (int length = 1, place = 0; length <= 16; length++, code <<= 1) {
            table->first[length] = place - (int32_t)code;
            if (code + at[length] >= 1u << length) return 0; /* no code is of ones alone */
            for (int i = 0; i < at[length]; i++, code++, place++) {
                int symbol = table->symbols[place];
                if (table->dc ? symbol > 11 : (symbol & 15) > 10) return 0; /* of 8-bit images; so 27 bits at most */
                if (length > LOOK) continue;
                uint32_t filled = entry(table, symbol, length);
                for (uint32_t low = code << (LOOK - length); low < (code + 1) << (LOOK - length); low++)
                    table->look[low] = filled;
            }
            table->limit[length] = code << (16 - length);
        }
        table->known = 1;
        at += 17 + total, bytes -= 17 + total;
    }
    return bytes == 0;
}

static int read_frame(Jpeg *jpeg, const u8 *at, int bytes) {
    if (bytes < 6 || at[0] != 8 || jpeg->components) return 0;
    jpeg->height = word(at + 1), jpeg->width = word(at + 3), jpeg->components = at[5];
    if ((jpeg->components != 1 && jpeg->components != 3) || bytes != 6 + 3 * jpeg->components) return 0;
    for (int i = 0; i < jpeg->components; i++) {
        const u8 *its = at + 6 + 3 * i;
        if (its[2] > 3) return 0;
        jpeg->component[i] = (Component){.id = its[0], .across = its[1] >> 4, .down = its[1] & 15, .table = its[2]};
    }
    Component *one = jpeg->component;
    if (jpeg->components == 1) { /* a scan of one component has no sampling, but what is written must be known */
        if (one->across < 1 || one->across > 4 || one->down < 1 || one->down > 4) return 0;
        one->across = one->down = 1;
    } else {
        for (int i = 1; i < 3; i++)
            if (one[i].across != 1 || one[i].down != 1) return 0;
        if (one->across < 1 || one->across > 2 || one->down < 1 || one->down > one->across) return 0;
    }
    return jpeg->width >= 8 && jpeg->height >= 8 && (int64_t)jpeg->width * jpeg->height <= 1 << 26;
}

static int read_scan(Jpeg *jpeg, const u8 *at, int bytes) {
    if (!jpeg->components || bytes != 4 + 2 * jpeg->components || at[0] != jpeg->components) return 0;
    for (int i = 0; i < jpeg->components; i++) {
        Component *its = &jpeg->component[i];
        if (at[1 + 2 * i] != its->id) return 0;
        its->dc = at[2 + 2 * i] >> 4, its->ac = at[2 + 2 * i] & 15;
        if (its->dc > 3 || its->ac > 3 || !jpeg->quantised[its->table]) return 0;
        if (!jpeg->huffman[0][its->dc].known || !jpeg->huffman[1][its->ac].known) return 0;
    }
    const u8 *last = at + 1 + 2 * jpeg->components;
    return last[0] == 0 && last[1] == 63 && last[2] == 0;
}

int read_header(Jpeg *jpeg, const u8 *data, size_t size) {
    int jfif = 0, transform = -1; /* of Adobe's marker */
    memset(jpeg, 0, sizeof *jpeg);
    if (size < 4 || word(data) != 0xffd8 || word(data + size - 2) != 0xffd9) return 0; /* or it was cut short */
    const u8 *at = data + 2;
    jpeg->end = data + size - 2;
    for (;;) {
        if (jpeg->end - at < 4 || at[0] != 0xff) return 0;
        int marker = at[1], bytes = word(at + 2) - 2;
        if (marker == 0xff) { /* a fill byte */
            at++;
            continue;
        }
        at += 4;
        if (bytes < 0 || bytes > jpeg->end - at) return 0;
        if (marker == 0xc0 || marker == 0xc1) {
            if (!read_frame(jpeg, at, bytes)) return 0;
        } else if (marker == 0xc4) {
            if (!read_huffman(jpeg, at, bytes)) return 0;
        } else if (marker == 0xdb) {
            for (int i = 0; i < bytes; i += 65) {
                if (at[i] > 3 || bytes - i < 65) return 0;
                for (int k = 0; k < 64; k++) jpeg->steps[at[i]][natural[k]] = at[i + 1 + k];
                jpeg->quantised[at[i]] = 1;
            }
        } else if (marker == 0xdd) {
            if (bytes != 2) return 0;
            jpeg->restart = word(at);
        } else if (marker == 0xda) {
            jpeg->scan = at + bytes;
            if (!read_scan(jpeg, at, bytes)) return 0;
            break;
        } else if (marker == 0xe0) {
            jfif |= bytes >= 14 && !memcmp(at, "JFIF", 5);
        } else if (marker == 0xee) {
            if (bytes >= 12 && !memcmp(at, "Adobe", 5)) transform = at[11];
        } else if (!((marker > 0xe0 && marker < 0xf0) || marker == 0xfe)) {
            return 0;
        }
        at += bytes;
    }
    if (jpeg->components == 1 || jfif) return 1;
    const Component *one = jpeg->component;
    return transform < 0 ? one[0].id == 1 && one[1].id == 2 && one[2].id == 3 : transform == 1;
}

/* ---- Entropy-coded bits ---- */

enum { BLOCK_BYTES = 64 * 31 / 8 + 32 }; /* more than a block can take */

typedef struct {
    const u8 *at;  /* where bits come from next */
    uint64_t next; /* bits that were taken from there, from the top */
    int count;
} Reader;

typedef struct {
    Reader reader;
    u8 *bytes, *stop;       /* a restart interval without its stuffing, and BLOCK_BYTES zeros behind its end */
    const u8 *source, *end; /* what follows it in the file */
    int32_t dc[3];          /* the last of each component */
} Bits;

/* Go to the next restart interval: its bytes, up to a marker. */
static void next_interval(Bits *bits) {
    u8 *to = bits->bytes;
    const u8 *from = bits->source, *end = bits->end;
    while (from < end) {
        const u8 *mark = memchr(from, 0xff, (size_t)(end - from));
        size_t run = (size_t)((mark ? mark : end) - from);
        memcpy(to, from, run);
        to += run, from += run;
        if (!mark || end - from < 2 || from[1]) break;
        *to++ = 0xff, from += 2;
    }
    memset(to, 0, BLOCK_BYTES);
    bits->source = from, bits->stop = to;
    bits->reader = (Reader){.at = bits->bytes};
    bits->dc[0] = bits->dc[1] = bits->dc[2] = 0;
}

/* Whether bits were taken from the zeros behind the interval. */
static inline int overrun(const Bits *bits) { return 8 * (bits->reader.at - bits->stop) > bits->reader.count; }

/* Whether the scan holds no markers but restarts up to the image's end: after others libjpeg may refuse the file. */
static int plain_scan(const Jpeg *jpeg) {
    for (const u8 *at = jpeg->scan; (at = memchr(at, 0xff, (size_t)(jpeg->end + 2 - at))); at++) {
        while (*at == 0xff && at < jpeg->end + 1) at++; /* fill bytes */
        if (*at == 0xd9) return 1;
        if (*at != 0 && (*at < 0xd0 || *at > 0xd7)) return 0;
    }
    return 0;
}

static int restart(Bits *bits, int number) {
    if (overrun(bits)) return 0;
    if (bits->end - bits->source < 2 || bits->source[0] != 0xff || bits->source[1] != 0xd0 + (number & 7)) return 0;
    bits->source += 2;
    next_interval(bits);
    return 1;
}

static inline void refill(Reader *reader) {
    uint64_t more;
    memcpy(&more, reader->at, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    more = __builtin_bswap64(more);
#endif
    reader->next |= more >> reader->count;
    reader->at += (63 - reader->count) >> 3;
    reader->count |= 56;
}

static uint32_t long_code(const Huffman *table, uint32_t next) {
    for (int length = LOOK + 1; length <= 16; length++)
        if (next < table->limit[length])
            return entry(table, table->symbols[(int32_t)(next >> (16 - length)) + table->first[length]], length);
    return 0;
}

/* Return the next symbol's entry, or 0 where there is no such code. 28 bits must be at hand. */
static inline uint32_t next_symbol(const Reader *reader, const Huffman *table) {
    uint32_t found = table->look[reader->next >> (64 - LOOK)];
    return __builtin_expect(!found, 0) ? long_code(table, (uint32_t)(reader->next >> 48)) : found;
}

/* Return the value whose bits follow a symbol's: negative where the first of them is 0. */
static inline int32_t value_of(const Reader *reader, uint32_t found) {
    int size = found >> 16 & 255;
    uint64_t rest = reader->next << (found >> 8 & 255);
    int32_t value = (int32_t)(rest >> 1 >> (63 - size)), negative = (int32_t)(~rest >> 63);
    return value - (negative << size) + negative;
}

static inline void take(Reader *reader, uint32_t found) {
    reader->next <<= found & 255;
    reader->count -= found & 255;
}

/* Read a block's coefficients, in natural order, or pass over them where ``block`` is NULL. */
static inline int read_block(Bits *bits, const Huffman *dc, const Huffman *ac, int32_t *last, int16_t *block) {
    if (overrun(bits)) return 0;
    Reader reader = bits->reader; /* a copy, which the compiler keeps in registers */
    refill(&reader);
    uint32_t found = next_symbol(&reader, dc);
    if (!found) return 0;
    *last = (int32_t)((uint32_t)*last + (uint32_t)value_of(&reader, found));
    take(&reader, found);
    if (block) block[0] = (int16_t)*last;
    /* Bits for two symbols at a time, without looking whether they are needed: that would be hard to predict. */
    for (unsigned k = 1, odd = 1; k < 64; odd ^= 1) {
        if (!odd) refill(&reader);
        found = next_symbol(&reader, ac);
        if (!found) return 0;
        k += found >> 24;
        if (block && (found >> 16 & 255)) block[natural[k - 1]] = (int16_t)value_of(&reader, found);
        take(&reader, found);
    }
    bits->reader = reader;
    return 1;
}

/* ---- Coefficients to samples: jidctint.c, two passes of eight columns at once ---- */

typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32))); /* damaged coefficients overflow: unsigned, that is defined */
typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef u8 u8x32 __attribute__((vector_size(32)));

#define TRANSPOSE_HALF(a, b, low, high)                   \
    low = SHUFFLE(u32x8, a, b, 0, 8, 1, 9, 4, 12, 5, 13); \
    high = SHUFFLE(u32x8, a, b, 2, 10, 3, 11, 6, 14, 7, 15)

static inline void transpose(u32x8 v[8]) {
    u32x8 a[8], b[8];
    for (int i = 0; i < 8; i += 2) { TRANSPOSE_HALF(v[i], v[i + 1], a[i], a[i + 1]); }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = SHUFFLE(u32x8, a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * j + 1] = SHUFFLE(u32x8, a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = SHUFFLE(u32x8, b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = SHUFFLE(u32x8, b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

static inline u32x8 scaled(u32x8 v, int shift) { return (u32x8)((i32x8)v >> shift); }

static inline void inverse_dct(u32x8 v[8], int shift) {
    u32x8 z1 = (v[2] + v[6]) * 4433u, even2 = z1 - v[6] * 15137u, even3 = z1 + v[2] * 6270u;
    u32x8 even0 = (v[0] + v[4]) << 13, even1 = (v[0] - v[4]) << 13;
    u32x8 s0 = even0 + even3, s3 = even0 - even3, s1 = even1 + even2, s2 = even1 - even2;
    u32x8 z3 = v[7] + v[3], z4 = v[5] + v[1], z5 = (z3 + z4) * 9633u;
    u32x8 y1 = (v[7] + v[1]) * 7373u, y2 = (v[5] + v[3]) * 20995u;
    z3 = z5 - z3 * 16069u, z4 = z5 - z4 * 3196u;
    u32x8 odd0 = v[7] * 2446u - y1 + z3, odd1 = v[5] * 16819u - y2 + z4;
    u32x8 odd2 = v[3] * 25172u - y2 + z3, odd3 = v[1] * 12299u - y1 + z4;
    uint32_t half = 1u << (shift - 1);
    s0 += half, s1 += half, s2 += half, s3 += half;
    v[0] = scaled(s0 + odd3, shift), v[7] = scaled(s0 - odd3, shift);
    v[1] = scaled(s1 + odd2, shift), v[6] = scaled(s1 - odd2, shift);
    v[2] = scaled(s2 + odd1, shift), v[5] = scaled(s2 - odd1, shift);
    v[3] = scaled(s3 + odd0, shift), v[4] = scaled(s3 - odd0, shift);
}

enum { SUMMED = 1 << 14, WRAPPED = 1 << 9 }; /* below: sums of two values fit 16 bits, and samples need no wrapping */

/* Return the values, or their complements where they are negative. */
static inline u32x8 magnitude(u32x8 v) { return v ^ scaled(v, 31); }

static inline int any(u32x8 v) {
    uint64_t parts[4];
    memcpy(parts, &v, sizeof parts);
    return (parts[0] | parts[1] | parts[2] | parts[3]) != 0;
}

static inline i32x8 clamped(i32x8 v) {
    i32x8 over = v > 255;
    return (v & ~(v >> 31) & ~over) | (over & 255);
}

/* Transform a block, or return 0: libjpeg-turbo computes with 16 bits where this does with 32, and its version in C wraps
samples where the others clamp them. Values of photographs are far below both limits, those of damaged files are not. */
static int samples(const int16_t *block, const int32_t *steps, u8 *to, size_t stride) {
    u32x8 v[8], large = {0};
    for (int i = 0; i < 8; i++) {
        i16x8 coefficients;
        u32x8 step;
        memcpy(&coefficients, block + 8 * i, 16);
        memcpy(&step, steps + 8 * i, 32);
        v[i] = (u32x8)__builtin_convertvector(coefficients, i32x8) * step;
        large |= magnitude(v[i]);
    }
    inverse_dct(v, 11);
    for (int i = 0; i < 8; i++) large |= magnitude(v[i]);
    transpose(v);
    inverse_dct(v, 18);
    for (int i = 0; i < 8; i++) large |= magnitude(v[i]) * (SUMMED / WRAPPED);
    transpose(v);
    if (any(large & ~(uint32_t)(SUMMED - 1))) return 0;
    for (int i = 0; i < 8; i++) {
        u8x32 row = (u8x32)clamped((i32x8)(v[i] + 128u));
        row = SHUFFLE(u8x32, row, row, 0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28,
                      0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        memcpy(to + (size_t)i * stride, &row, 8);
    }
    return 1;
}

/* ---- The part of the image that a crop needs ---- */

static int up(int value, int by) { return (value + by - 1) / by; }

static int make_planes(const Jpeg *jpeg, const int columns[2], const int rows[2], Plane planes[3]) {
    const Component *first = jpeg->component;
    for (int i = 0; i < jpeg->components; i++) {
        const Component *its = &jpeg->component[i];
        Plane *plane = &planes[i];
        plane->stride = 8 * (size_t)its->across * (size_t)(columns[1] - columns[0]);
        plane->left = 8 * its->across * columns[0], plane->top = 8 * its->down * rows[0];
        plane->width = up(jpeg->width * its->across, first->across);
        plane->height = up(jpeg->height * its->down, first->down);
        plane->samples = malloc(plane->stride * 8 * (size_t)its->down * (size_t)(rows[1] - rows[0]));
        if (!plane->samples) return 0;
    }
    return 1;
}

/* Read the blocks of one component in a minimum coded unit; (column, row) is its place in ``plane``, NULL if unwanted. */
static int read_unit(const Jpeg *jpeg, int i, Bits *bits, const Plane *plane, int column, int row) {
    const Component *its = &jpeg->component[i];
    const Huffman *dc = &jpeg->huffman[0][its->dc], *ac = &jpeg->huffman[1][its->ac];
    int16_t block[64] __attribute__((aligned(32)));
    for (int b = 0; b < its->across * its->down; b++) {
        if (!plane) {
            if (!read_block(bits, dc, ac, &bits->dc[i], NULL)) return 0;
            continue;
        }
        memset(block, 0, sizeof block);
        if (!read_block(bits, dc, ac, &bits->dc[i], block)) return 0;
        size_t x = (size_t)(column * its->across + b % its->across), y = (size_t)(row * its->down + b / its->across);
        u8 *to = plane->samples + 8 * (y * plane->stride + x);
        if (!samples(block, jpeg->steps[its->table], to, plane->stride)) return 0;
    }
    return 1;
}

int decode_part(const Jpeg *jpeg, const int box[4], Plane planes[3]) {
    int width = 8 * jpeg->component[0].across, height = 8 * jpeg->component[0].down; /* of a unit */
    int units = up(jpeg->width, width), last = up(jpeg->height, height);
    /* One sample of colour more on each side, which upsampling looks at. */
    int columns[2] = {(box[1] > 2 ? box[1] - 2 : 0) / width, up(box[1] + box[3] + 2, width)};
    int rows[2] = {(box[0] > 2 ? box[0] - 2 : 0) / height, up(box[0] + box[2] + 2, height)};
    if (columns[1] > units) columns[1] = units;
    if (rows[1] > last) rows[1] = last;
    u8 *bytes = malloc((size_t)(jpeg->end - jpeg->scan) + BLOCK_BYTES);
    int good = bytes && plain_scan(jpeg) && make_planes(jpeg, columns, rows, planes);
    Bits bits = {.bytes = bytes, .source = jpeg->scan, .end = jpeg->end};
    if (good) next_interval(&bits);
    for (int unit = 0, intervals = 0; good && unit < rows[1] * units; unit++) {
        if (jpeg->restart && unit && unit % jpeg->restart == 0) good = restart(&bits, intervals++);
        int row = unit / units - rows[0], column = unit % units - columns[0];
        int wanted = row >= 0 && column >= 0 && column < columns[1] - columns[0];
        for (int i = 0; good && i < jpeg->components; i++)
            good = read_unit(jpeg, i, &bits, wanted ? &planes[i] : NULL, column, row);
    }
    good = good && !overrun(&bits);
    free(bytes);
    return good;
}
