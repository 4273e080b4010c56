/*
Files that are written whole. loopmdm.c includes this if it is there; its own functions of the same
names are shorter.

A file is written under another name, to the disk, and then renamed. So whatever happens in between,
a full disk or a kill, the old or the new file is there and whole.
*/
#pragma once

static void check_regular(const char *path) { // rename() would put a file where a link was
    struct stat info;
    if (!lstat(path, &info) && !S_ISREG(info.st_mode))
        die(FAILED, "cannot write %s: it is a folder, device, pipe or link", path);
}

static FILE *file_begin(const char *path) {
    check_regular(path);
    char *temporary = concat(path, ".tmp");
    // One may be left from a program that was killed. If it were a link, another file would change.
    FILE *file = unlink(temporary) && errno != ENOENT ? NULL : fopen(temporary, "wbx");
    int error = errno;
    free(temporary);
    errno = error;
    return file; // if NULL, file_end() says why
}

static void file_end(FILE *file, const char *path, int ok) {
    ok = ok && !fflush(file) && !fsync(fileno(file));
    int error = ok ? 0 : max_int(1, errno);
    if (file) fclose(file);
    char *temporary = concat(path, ".tmp");
    if (ok && rename(temporary, path)) error = errno;
    if (error) unlink(temporary);
    free(temporary);
    if (error) die(FAILED, "cannot write %s: %s; what was there stays", path, strerror(error));
}

// As in loopmdm.c, by 8 bytes at a time (Kounavis and Berry 2005): the lookups of one round do not
// wait for each other.
static uint32_t crc32(uint32_t crc, const void *data, size_t n) {
    uint32_t table[8][256]; // [k][i]: what byte i becomes when 1 + k bytes are divided
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t x = i;
        for (int k = 0; k < 64; k++) { // a bit is one step of the division
            x = x >> 1 ^ (x & 1 ? 0xedb88320u : 0);
            table[k / 8][i] = x;
        }
    }

    const unsigned char *p = (const unsigned char *)data;
    for (crc = ~crc; n >= 8; n -= 8, p += 8) {
        uint32_t next = 0;
        for (int k = 0; k < 8; k++) next ^= table[7 - k][p[k] ^ (k < 4 ? crc >> 8 * k & 255 : 0)];
        crc = next;
    }
    for (; n > 0; n--) crc = table[0][(crc ^ *p++) & 255] ^ crc >> 8;
    return ~crc;
}

// As in loopmdm.c. It copies 4 MiB at a time: no second model needs to fit into memory.
static void checkpoint_save(const char *path, const int *header, const float *const *parts,
                            int num_parts, size_t n) {
    const size_t piece = 1 << 20;
    float *copy = (float *)allocate(piece, sizeof(float), "a checkpoint");
    int first[HEADER_INTS];
    memcpy(first, header, sizeof first);
    uint32_t crc = crc32(0, first, sizeof first); // taken while its own place is zero
    FILE *file = file_begin(path);
    int ok = file && fwrite(first, 4, HEADER_INTS, file) == HEADER_INTS;
    for (size_t i = 0; ok && i < num_parts * n;) {
        size_t at = i % n, size = n - at < piece ? n - at : piece;
        read_memory(copy, parts[i / n] + at, 4 * size);
        crc = crc32(crc, copy, 4 * size);
        ok = fwrite(copy, 4, size, file) == size;
        i += size;
    }
    first[AT_CRC] = (int)crc;
    ok = ok && !fseek(file, 0, SEEK_SET) && fwrite(first, 4, HEADER_INTS, file) == HEADER_INTS;
    file_end(file, path, ok);
    free(copy);
}
