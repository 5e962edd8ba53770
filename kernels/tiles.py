"""Every block size the shipped kernels use, as data. Sizes change speed, never bits.

The interpreter pays per program, not per element, so it gets few large tiles."""

from typing import NamedTuple

import triton

from exactmoe.kernels.launch import interpreting


class MatmulTile(NamedTuple):
    """One program computes `cols` output features for `rows` activation rows."""

    rows: int
    cols: int
    warps: int


class AttentionTile(NamedTuple):
    """One program takes `queries` tokens of a kv head against `keys` keys at a time, of one of `split` parts."""

    queries: int
    keys: int
    split: int
    warps: int


class DecodeAttentionTile(NamedTuple):
    """One program takes every `parts`-th tile of `keys` keys of a kv head, for at most `heads` of its queries."""

    keys: int
    parts: int
    heads: int
    warps: int


class MatvecTile(NamedTuple):
    """One program computes `tiles` times `rows` output features, at most eight times, `ahead` blocks in flight; of a
    single matrix at most `programs` run, and go round."""

    rows: int
    tiles: int
    warps: int
    ahead: int
    programs: int = 1 << 20


_MATMUL_INTERPRET = (MatmulTile(16, 1024, 4), MatmulTile(64, 512, 4), MatmulTile(256, 512, 4))
_MATMUL_CUDA = (MatmulTile(16, 64, 4), MatmulTile(64, 64, 4))


def matmul(rows: int) -> MatmulTile:
    """Tile for a matmul over `rows` activation rows: the smallest that holds them, else the largest."""
    table = _MATMUL_INTERPRET if interpreting() else _MATMUL_CUDA
    return next((tile for tile in table if rows <= tile.rows), table[-1])


def grouped_matmul(rows: int, experts: int) -> MatmulTile:
    """Tile for `rows` routed rows spread over `experts`: sized to the mean load, so few tile rows stand empty."""
    return matmul(triton.cdiv(rows, experts))


def attention(tokens: int, heads_per_group: int, keys: int) -> AttentionTile:
    """Tile for `tokens` queries against `keys` keys; a dot needs at least 16 query rows."""
    if interpreting():
        return AttentionTile(max(triton.next_power_of_2(tokens), 1), 256, 1, 4)
    queries = max(1, 16 // heads_per_group) if tokens <= 16 else max(1, 32 // heads_per_group)
    split = 1 if tokens > 16 else min(16, triton.cdiv(keys, 256))
    return AttentionTile(queries, 32, split, 4)


def rows_of_blocks(blocks: int) -> int:
    """Blocks of 256 elements an elementwise program takes."""
    return min(triton.next_power_of_2(blocks), 1024) if interpreting() else 4


def norm_rows(rows: int) -> int:
    """Rows a norm program takes."""
    return min(triton.next_power_of_2(rows), 256) if interpreting() else 1


def heads(rows: int) -> int:
    """Head rows a program of the per-head kernels takes."""
    return min(triton.next_power_of_2(rows), 1024) if interpreting() else 4


def router(tokens: int, experts: int) -> tuple[int, int]:
    """(tokens, experts) a router-logit program takes; both at least 16, as a dot needs."""
    if interpreting():
        return max(16, min(triton.next_power_of_2(tokens), 256)), max(16, triton.next_power_of_2(experts))
    return 16, 16


def dispatch(rows: int) -> int:
    """Routed rows a dispatch program scans at a time."""
    return int(min(max(triton.next_power_of_2(rows), 16), 1024))


def elementwise(elements: int) -> int:
    """Elements an elementwise program takes."""
    return min(triton.next_power_of_2(elements), 1 << 18) if interpreting() else 1024


def route(tokens: int, experts: int) -> int:
    """Tokens a route program takes."""
    return max(1, min(triton.next_power_of_2(tokens), (1 << 20) // experts)) if interpreting() else 1


def digest(tokens: int, width: int) -> tuple[int, int]:
    """(tokens, elements of each) a digest program takes at a time."""
    if interpreting():
        return min(triton.next_power_of_2(tokens), 64), min(triton.next_power_of_2(width), 1 << 15)
    return 1, 1024


def _interpreted(rows: int) -> MatvecTile:
    return MatvecTile(max(4, min(triton.next_power_of_2(rows) // 2, 2048)), 2, 4, 1)


def matvec(rows: int, blocks: int) -> MatvecTile:
    """Tile for `rows` output features of `blocks` blocks each, for one token."""
    if interpreting():
        return _interpreted(rows)
    if rows > 1 << 16:  # the output of the model: a program goes round
        return MatvecTile(4, 4, 4, 8, 4 * 132)
    # Eight warps with a row each at a time, and one wave of programs: each norms the whole of x.
    return MatvecTile(8, max(1, min(8, rows // (8 * 128))), 8, 16)


def decode_router(experts: int) -> tuple[int, int]:
    """(experts whose logits one program computes, warps), for one token."""
    return (experts, 4) if interpreting() else (2, 8)


def experts_up(rows: int) -> MatvecTile:
    """Tile for `rows` rows of the gate and as many of the up matrix of each expert, for one token."""
    if interpreting():
        return _interpreted(rows)
    return MatvecTile(8, 6, 8, 12)


def experts_down(rows: int) -> MatvecTile:
    """Tile for `rows` rows of the down matrix, each of all chosen experts, for one token."""
    if interpreting():
        return _interpreted(rows)
    return MatvecTile(4, 4, 8, 12)


def decode_attention(keys: int, groups: int, per: int, width: int, most: int) -> DecodeAttentionTile:
    """Tile for one token over `most` of the `keys` of `groups` kv heads of `width` with `per` queries each, if not more
    than a tile has; at most 128 keys, or sums leave f32."""
    tile = max(16, min(triton.next_power_of_2(min(keys, most)), 128, 16384 // width))
    parts = triton.cdiv(keys, tile)
    one = most <= tile
    # A dot takes at least eight columns: two slices of four heads.
    heads = 4 if one or per <= 4 else 8
    if interpreting():
        return DecodeAttentionTile(tile, min(parts, 3), heads, 4)
    spread = max(1, 132 // (groups * triton.cdiv(per, heads)))  # in one launch all but the first fetch ahead
    return DecodeAttentionTile(tile, spread if one else min(parts, spread), heads, 8)


def argmax(columns: int) -> int:
    """Logits a program of the first of argmax's two launches compares."""
    return int(min(triton.next_power_of_2(columns), 1 << 18 if interpreting() else 1024))
