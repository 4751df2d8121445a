/* A part of a baseline JPEG as planes of samples, with libjpeg's arithmetic.

What is not the customary JPEG (progressive, CMYK, 12 bits, other sampling), and what is damaged where it is read, is
refused: functions return 0. The bytes come from strangers: every offset into them is checked against their end. */
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;

/* Pick elements of two vectors of one kind. Clang has only the first spelling, GCC before 12 only the second. */
#ifdef __clang__
#define SHUFFLE(kind, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(kind, a, b, ...) __builtin_shuffle(a, b, (kind){__VA_ARGS__})
#endif

enum { LOOK = 10 }; /* bits that are looked up at once */

typedef struct {
    uint32_t look[1 << LOOK]; /* total bits | bits of the code << 8 | of the value << 16 | places << 24; 0: longer */
    uint32_t limit[17];       /* of each length, the first 16-bit word above its codes */
    int32_t first[17];        /* of each length, what leads from a code to the place of its symbol */
    u8 symbols[256];
    u8 known, dc;
} Huffman;

typedef struct {
    int id, across, down; /* blocks of 8×8 in a minimum coded unit */
    int table, dc, ac;    /* quantisation and Huffman tables */
} Component;

typedef struct {
    int width, height, components, restart;
    Component component[3]; /* Y, Cb and Cr, or Y alone */
    u8 quantised[4];
    int32_t steps[4][64]; /* quantisation, row by row */
    Huffman huffman[2][4];
    const u8 *scan, *end;
} Jpeg;

/* The decoded part of a component: (left, top) is its first sample, (width, height) the whole component's size. */
typedef struct {
    u8 *samples;
    size_t stride;
    int left, top, width, height;
} Plane;

int read_header(Jpeg *jpeg, const u8 *data, size_t size);

/* Decode what touches ``box`` (top, left, height, width). The samples are to be freed, whatever is returned. */
int decode_part(const Jpeg *jpeg, const int box[4], Plane planes[3]);
