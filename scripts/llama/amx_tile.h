/* Force-included where GCC 12 builds for AMX: its _tile_loadconfig declares 8 bytes of the 64-byte tile configuration
 * as read, so the optimizer drops the stores that fill the rest and ldtilecfg faults. The macro declares all of them.
 * Nothing changes where AMX is off. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
