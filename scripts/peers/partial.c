/* A part of a JPEG as RGB, by libjpeg-turbo's own partial decoding: to compare with the decoder of largebatch/data/native. */
#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <jpeglib.h>

typedef struct {
    struct jpeg_error_mgr manager;
    jmp_buf end;
} Errors;

static void end(j_common_ptr info) { longjmp(((Errors *)info->err)->end, 1); }

/* Decode the columns that hold ``box`` (top, left, height, width) of its rows. Returns the samples, to be freed, or NULL;
``columns`` gets their first column and their number. */
unsigned char *decode_part(const unsigned char *data, size_t bytes, const int box[4], int columns[2]) {
    struct jpeg_decompress_struct info;
    Errors errors;
    unsigned char *volatile rgb = NULL;
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = end;
    if (setjmp(errors.end)) {
        jpeg_destroy_decompress(&info);
        free(rgb);
        return NULL;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data, bytes);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    JDIMENSION first = (JDIMENSION)box[1], width = (JDIMENSION)box[3];
    jpeg_crop_scanline(&info, &first, &width);
    columns[0] = (int)first, columns[1] = (int)width;
    rgb = malloc((size_t)width * 3 * (size_t)box[2]);
    jpeg_skip_scanlines(&info, (JDIMENSION)box[0]);
    for (int row = 0; rgb && row < box[2];) {
        JSAMPROW to = rgb + (size_t)row * width * 3;
        row += (int)jpeg_read_scanlines(&info, &to, 1);
    }
    jpeg_destroy_decompress(&info);
    return rgb;
}

void free_part(unsigned char *rgb) { free(rgb); }
