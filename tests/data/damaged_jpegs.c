/* Crops of JPEGs with bytes changed at random, cut short and put together: memory errors end it (-fsanitize).
   damaged_jpegs SEED TIMES FILE… */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "jpeg.h"

int jpeg_size(const u8 *data, size_t bytes, int size[2]);
int jpeg_crop(const u8 *data, size_t bytes, const int box[4], int height, int width, u8 *out,
              const ptrdiff_t strides[3]);

static uint64_t state;

static unsigned chance(unsigned below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(state >> 33) % below;
}

int main(int count, char **words) {
    int read = 0, times = atoi(words[2]);
    state = strtoull(words[1], NULL, 10);
    static u8 out[3 * 24 * 40], whole[1 << 17];
    for (int number = 0; number < times; number++) {
        FILE *file = fopen(words[3 + number % (count - 3)], "rb");
        size_t bytes = fread(whole, 1, sizeof whole, file);
        fclose(file);
        unsigned head = chance(2) ? 700 : (unsigned)bytes;
        for (unsigned i = chance(6); i > 0; i--) whole[chance(head < bytes ? head : (unsigned)bytes)] = (u8)chance(256);
        if (chance(4) == 0) {
            bytes = 4 + chance((unsigned)bytes - 4);
            whole[bytes - 2] = 0xff, whole[bytes - 1] = 0xd9;
        }
        u8 *data = malloc(bytes); /* its end is watched */
        memcpy(data, whole, bytes);
        int size[2] = {100, 100};
        jpeg_size(data, bytes, size);
        if (size[0] <= 4000 && size[1] <= 4000) {
            int height = 1 + (int)chance((unsigned)size[1]), width = 1 + (int)chance((unsigned)size[0]);
            int box[4] = {(int)chance((unsigned)(size[1] - height + 1)), (int)chance((unsigned)(size[0] - width + 1)),
                          height, width};
            ptrdiff_t strides[3] = {1, 40, 24 * 40};
            read += jpeg_crop(data, bytes, box, 24, 40, out, strides);
        }
        free(data);
    }
    printf("%d of %d\n", read, times);
}
