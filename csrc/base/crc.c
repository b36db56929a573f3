/*
** crc.c: eight bytes a step, by eight tables of 256.  The tables (8 KiB, some microseconds) are made on the stack by each call: no global state, and nothing
** beside the time that reading a file takes.
*/
#include <string.h>
#include "crc.h"

/* t[0] is the remainder of each byte; t[k] that of the byte followed by k zero bytes. */
static void crc_tables(uint32_t t[8][256]) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++) c = c >> 1 ^ (c & 1 ? 0xEDB88320u : 0);
        t[0][i] = c;
    }
    for (int k = 1; k < 8; k++)
        for (int i = 0; i < 256; i++) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 255];
}

uint32_t ap_crc32(uint32_t crc, const uint8_t *p, uint64_t n) {
    uint32_t t[8][256];
    crc_tables(t);
    crc = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t a, b;
        memcpy(&a, p, 4);
        memcpy(&b, p + 4, 4);
        a ^= crc;
        crc = t[7][a & 255] ^ t[6][a >> 8 & 255] ^ t[5][a >> 16 & 255] ^ t[4][a >> 24] ^ t[3][b & 255] ^ t[2][b >> 8 & 255] ^ t[1][b >> 16 & 255] ^ t[0][b >> 24];
    }
    for (; n; n--, p++) crc = crc >> 8 ^ t[0][(crc ^ *p) & 255];
    return ~crc;
}
