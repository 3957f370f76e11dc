// How the products of many rows are cut, and which cut serves a shape that no one has measured. An
// index of these tables is what the ops take as `tile`; the result does not depend on it. The
// library tells their names (`TileName` of gemm.h): no one else lists them.
#ifndef CUSTOM_OPS_TILE_SIZES_H_
#define CUSTOM_OPS_TILE_SIZES_H_

#include <cstdint>

namespace kogpt {

// What a block multiplies at a time, and how: `kPingpong` has two groups of warps with a part each,
// of which one multiplies while the other finishes; else both work on halves of one part.
enum class TileShape {
  k64x256Pingpong,
  k128x128Pingpong,  // in clusters of two
  k128x256,          // in clusters of two
};

struct GemmTile {
  TileShape shape;  // rows x outputs; with 16-bit activations outputs x rows
  int swizzle;      // parts taken side by side before the next ones: what blocks find in L2
};

inline constexpr GemmTile kInt8Tiles[] = {
    {TileShape::k64x256Pingpong, 1},  {TileShape::k64x256Pingpong, 4},
    {TileShape::k64x256Pingpong, 8},  {TileShape::k128x128Pingpong, 1},
    {TileShape::k128x128Pingpong, 2}, {TileShape::k128x256, 1},
    {TileShape::k128x256, 8},
};
inline constexpr int kNumInt8Tiles = sizeof(kInt8Tiles) / sizeof(GemmTile);

inline constexpr GemmTile kMixedTiles[] = {
    {TileShape::k64x256Pingpong, 1}, {TileShape::k64x256Pingpong, 8}, {TileShape::k128x256, 1},
    {TileShape::k128x256, 2},        {TileShape::k128x256, 8},
};
inline constexpr int kNumMixedTiles = sizeof(kMixedTiles) / sizeof(GemmTile);

// Before Hopper there is one.
inline constexpr int kNumPortableTiles = 1;

// The fastest on an H100 for a layer's two products at about these rows, below 512 on an H200
// (docs/performance-notes.md).
inline constexpr int ChooseInt8Tile(int64_t rows, int64_t k_dim) {
  if (rows <= 128 && k_dim <= 8192) return 0;
  if (rows <= 512) return 3;
  if (rows <= 1024) return 4;
  if (rows <= 4096) return k_dim > 8192 ? 3 : 5;
  return 2;
}

inline constexpr int ChooseMixedTile(int64_t rows, int64_t k_dim) {
  if (rows <= 1024) return 0;
  return rows > 4096 && k_dim > 8192 ? 4 : 2;
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_TILE_SIZES_H_
