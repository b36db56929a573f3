/*
** crc.h: CRC-32 as zlib and IEEE 802.3 have it: reflected, polynomial 0xEDB88320, begun and ended with a complement.  Called by the containers that carry one.
*/
#ifndef AP_CRC_H
#define AP_CRC_H
#include <stdint.h>
uint32_t ap_crc32(uint32_t crc, const uint8_t *p, uint64_t n);           /* crc 0 to begin; the result of the bytes before, to go on */
#endif
