// The shapes of tiles for AMX.
#pragma once

struct alignas(64) TileShapes {
    unsigned char palette, start, reserved[14];
    unsigned short columns[16];  // bytes
    unsigned char rows[16];
};

// Eight tiles of 16 rows of 64 bytes. A constant, since gcc 12 drops stores of which only `_tile_loadconfig` reads.
constexpr TileShapes WHOLE_TILES{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
