/* A crop of a JPEG, resized, flipped and written where it is wanted: the pixels that Pillow gives, bit for bit.

Only the blocks that the crop touches are transformed, and below it nothing is read. Colours are interpolated and turned
into RGB as libjpeg does it ("fancy" upsampling); resizing is Pillow's antialiased bilinear filter, in fixed point. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "jpeg.h"

/* ---- Planes to RGB ---- */

/* Interpolate the row of colour that belongs to row ``y`` of the image. ``to`` gets ``count`` samples from the plane's
left edge on; ``sums`` has room for as many and one before. What lies outside of the component repeats its edge. */
static void upsample(const Plane *plane, int y, const Component *sampling, int16_t *sums, u8 *to, int count) {
    int near = y / sampling->down, other = sampling->down == 1 ? near : y % 2 ? near + 1 : near - 1;
    if (other < 0) other = 0;
    if (other > plane->height - 1) other = plane->height - 1;
    const u8 *a = plane->samples + (size_t)(near - plane->top) * plane->stride;
    const u8 *b = plane->samples + (size_t)(other - plane->top) * plane->stride;
    if (sampling->across == 1) {
        memcpy(to, a, (size_t)count);
        return;
    }
    int last = plane->width - plane->left < count / 2 ? plane->width - plane->left : count / 2;
    int once = sampling->down == 1, even = once ? 1 : 8, odd = once ? 2 : 7, shift = once ? 2 : 4;
    for (int x = 0; x < last; x++) sums[x] = (int16_t)(once ? a[x] : 3 * a[x] + b[x]);
    sums[-1] = sums[0], sums[last] = sums[last - 1];
    for (int x = 0; x < last; x++) {
        to[2 * x] = (u8)((3 * sums[x] + sums[x - 1] + even) >> shift);
        to[2 * x + 1] = (u8)((3 * sums[x] + sums[x + 1] + odd) >> shift);
    }
}

static inline uint32_t clamp(int32_t value) { return (uint32_t)(value < 0 ? 0 : value > 255 ? 255 : value); }

static void to_rgb(const u8 *y, const u8 *cb, const u8 *cr, uint32_t *to, int count) {
    for (int x = 0; x < count; x++) { /* factors of ITU-R BT.601, times 2^16 */
        int32_t blue = cb[x] - 128, red = cr[x] - 128;
        uint32_t r = clamp(y[x] + ((91881 * red + 32768) >> 16));
        uint32_t g = clamp(y[x] + ((-22554 * blue - 46802 * red + 32768) >> 16));
        uint32_t b = clamp(y[x] + ((116130 * blue + 32768) >> 16));
        to[x] = r | g << 8 | b << 16;
    }
}

static void grey_to_rgb(const u8 *y, uint32_t *to, int count) {
    for (int x = 0; x < count; x++) to[x] = y[x] * 0x010101u;
}

/* ---- Resizing: Pillow's Resample.c ---- */

enum { PRECISION = 22, STRONGEST = 4096 }; /* bits of a weight; the largest scale, at which sums still fit */

typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef u8 u8x16 __attribute__((vector_size(16)));

typedef struct {
    int taps, pairs;  /* inputs of every output pixel, some of them with a weight of 0; two by two */
    int *first;       /* input of each output pixel */
    int32_t *weights; /* 2 * pairs of each output pixel, each four times: for every channel */
} Filter;

static void span(int i, int in, double scale, int *first, int *end) {
    double reach = scale < 1.0 ? 1.0 : scale, center = (i + 0.5) * scale;
    *first = (int)(center - reach + 0.5), *end = (int)(center + reach + 0.5);
    if (*first < 0) *first = 0;
    if (*end > in) *end = in;
}

static void output_pixel(Filter *filter, int i, int in, double scale, double *weights) {
    double stretch = 1.0 / (scale < 1.0 ? 1.0 : scale), center = (i + 0.5) * scale, sum = 0.0;
    int first, end;
    span(i, in, scale, &first, &end);
    for (int x = first; x < end; x++) {
        double away = fabs((x - center + 0.5) * stretch);
        sum += weights[x - first] = away < 1.0 ? 1.0 - away : 0.0;
    }
    int from = filter->first[i] = first < in - filter->taps ? first : in - filter->taps;
    int32_t *to = filter->weights + 8 * (ptrdiff_t)i * filter->pairs + 4 * (first - from);
    for (int x = 0; x < 4 * (end - first); x++) to[x] = (int32_t)(0.5 + weights[x / 4] / sum * (1 << PRECISION));
}

static int make_filter(Filter *filter, int in, int out) {
    double scale = (double)in / out;
    if (scale > STRONGEST) return 0;
    for (int i = 0, first, end; i < out; i++) {
        span(i, in, scale, &first, &end);
        if (filter->taps < end - first) filter->taps = end - first;
    }
    filter->pairs = (filter->taps + 1) / 2;
    filter->first = malloc(sizeof(int) * (size_t)out);
    filter->weights = calloc((size_t)out * (size_t)filter->pairs, 8 * sizeof(int32_t));
    double *weights = malloc(sizeof(double) * (size_t)filter->taps);
    int good = filter->first && filter->weights && weights;
    for (int i = 0; good && i < out; i++) output_pixel(filter, i, in, scale, weights);
    free(weights);
    return good;
}

/* ``from`` has room for a pixel more than there are: the last pair may read it. */
static void resize_row(const Filter *filter, const u8 *from, u8 *to, int out) {
    const int32_t *weights = filter->weights;
    for (int i = 0; i < out; i++) {
        const u8 *at = from + 4 * (ptrdiff_t)filter->first[i];
        i32x8 sums = {0};
        for (int pair = 0; pair < filter->pairs; pair++, at += 8, weights += 8) {
            u8x16 pixels = {0}, zero = {0};
            i32x8 weight;
            memcpy(&pixels, at, 8), memcpy(&weight, weights, 32);
            pixels = SHUFFLE(u8x16, pixels, zero, 0, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5, 16, 6, 16, 7, 16);
            sums += __builtin_convertvector((i16x8)pixels, i32x8) * weight;
        }
        i32x4 halves[2], sum;
        memcpy(halves, &sums, sizeof halves);
        sum = halves[0] + halves[1];
        /* Weights are positive and add up to 1: it stays below 256. */
        u8x16 bytes = (u8x16)((sum + (1 << (PRECISION - 1))) >> PRECISION);
        bytes = SHUFFLE(u8x16, bytes, bytes, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
        memcpy(to + 4 * i, &bytes, 4);
    }
}

static void resize_column(const Filter *filter, int i, const u8 *rows, int32_t *sums, u8 *to, int width) {
    for (int x = 0; x < 4 * width; x++) sums[x] = 1 << (PRECISION - 1);
    for (int y = 0; y < filter->taps; y++) {
        const u8 *row = rows + (size_t)(filter->first[i] + y) * 4 * (size_t)width;
        int32_t weight = filter->weights[8 * (ptrdiff_t)i * filter->pairs + 4 * y];
        for (int x = 0; x < 4 * width; x++) sums[x] += row[x] * weight;
    }
    for (int x = 0; x < 4 * width; x++) to[x] = (u8)(sums[x] >> PRECISION);
}

/* ---- What is called ---- */

/* Write an image's width and height to ``size``. Return 0 where it is not for this decoder. */
int jpeg_size(const u8 *data, size_t bytes, int size[2]) {
    Jpeg *jpeg = malloc(sizeof *jpeg);
    int good = jpeg && read_header(jpeg, data, bytes);
    if (good) size[0] = jpeg->width, size[1] = jpeg->height;
    free(jpeg);
    return good;
}

typedef struct {
    Filter across, down;
    u8 *cb, *cr, *rgb, *rows, *line;
    int16_t *colours;
    int32_t *sums;
} Scratch;

/* Resize the crop and write it out, row by row. Pillow resizes columns first where that saves the more work. */
static void write_crop(const Jpeg *jpeg, const Plane planes[3], Scratch *its, const int box[4], int height, int width,
                       u8 *out, const ptrdiff_t strides[3]) {
    int count = (int)planes[0].stride, down_first = box[2] > height && box[2] - height > 2 * (box[3] - width);
    int kept = down_first ? box[3] : width;
    for (int y = 0; y < box[2]; y++) {
        const u8 *light = planes[0].samples + (size_t)(box[0] + y - planes[0].top) * planes[0].stride;
        if (jpeg->components == 1) {
            grey_to_rgb(light, (uint32_t *)its->rgb, count);
        } else {
            upsample(&planes[1], box[0] + y, jpeg->component, its->colours + 1, its->cb, count);
            upsample(&planes[2], box[0] + y, jpeg->component, its->colours + 1, its->cr, count);
            to_rgb(light, its->cb, its->cr, (uint32_t *)its->rgb, count);
        }
        const u8 *crop = its->rgb + 4 * (box[1] - planes[0].left);
        u8 *row = its->rows + (size_t)y * 4 * (size_t)kept;
        if (down_first)
            memcpy(row, crop, 4 * (size_t)kept);
        else
            resize_row(&its->across, crop, row, width);
    }
    for (int y = 0; y < height; y++) {
        resize_column(&its->down, y, its->rows, its->sums, its->line, kept);
        const u8 *line = its->line;
        if (down_first) resize_row(&its->across, its->line, its->rgb, width), line = its->rgb;
        u8 *to = out + y * strides[1];
        for (int x = 0; x < width; x++, to += strides[0], line += 4)
            to[0] = line[0], to[strides[2]] = line[1], to[2 * strides[2]] = line[2];
    }
}

/* Decode the crop ``box`` (top, left, height, width), resize it to height × width, and write channel c of pixel (x, y) to
out[x * strides[0] + y * strides[1] + c * strides[2]]. Return 0, with nothing written, where it is not for this decoder. */
int jpeg_crop(const u8 *data, size_t bytes, const int box[4], int height, int width, u8 *out,
              const ptrdiff_t strides[3]) {
    Jpeg *jpeg = malloc(sizeof *jpeg);
    Plane planes[3] = {{0}};
    Scratch its = {0};
    int good = jpeg && read_header(jpeg, data, bytes);
    good = good && box[0] >= 0 && box[1] >= 0 && box[2] > 0 && box[3] > 0 && height > 0 && width > 0;
    good = good && box[2] <= jpeg->height - box[0] && box[3] <= jpeg->width - box[1];
    good = good && decode_part(jpeg, box, planes);
    good = good && make_filter(&its.across, box[3], width) && make_filter(&its.down, box[2], height);
    if (good) {
        size_t count = planes[0].stride, widest = (count > (size_t)width ? count : (size_t)width) + 1;
        its.cb = malloc(count), its.cr = malloc(count), its.rgb = malloc(4 * widest), its.line = malloc(4 * widest);
        its.colours = malloc(sizeof(int16_t) * (count + 2)), its.sums = malloc(4 * sizeof(int32_t) * widest);
        its.rows = malloc(4 * widest * (size_t)box[2]);
        good = its.cb && its.cr && its.rgb && its.line && its.colours && its.sums && its.rows;
    }
    if (good) write_crop(jpeg, planes, &its, box, height, width, out, strides);
    for (int i = 0; i < 3; i++) free(planes[i].samples);
    free(its.across.first), free(its.across.weights), free(its.down.first), free(its.down.weights);
    free(its.cb), free(its.cr), free(its.rgb), free(its.line), free(its.colours), free(its.sums), free(its.rows);
    free(jpeg);
    return good;
}
