"""How large vLLM's KV cache is made on a CPU where the recipe does not say."""

BLOCK_SIZE_CPU = 32
"""Tokens of a cache block: the CPU kernel's smallest, since prefixes are shared in whole blocks."""

CPU_CACHE_BYTES = 4 * 2**30
"""Most that a KV cache takes on a CPU unless the recipe says otherwise; vLLM's own rule is nearly all the memory."""

UNBOUNDED = 2048
"""Tokens that are reckoned with where nothing bounds the context."""


def cpu_cache_bytes(token_bytes: int, *, longest: int | None, rows: int) -> int:
    """Bytes of a cache that holds `rows` sequences of `longest` tokens, within CPU_CACHE_BYTES.

    `token_bytes`: keys and values of one token in all layers.
    """
    blocks = -(-(longest or UNBOUNDED) // BLOCK_SIZE_CPU) + 1
    return min(CPU_CACHE_BYTES, rows * blocks * BLOCK_SIZE_CPU * token_bytes)
