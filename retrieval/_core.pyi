"""The C++ core (retrieval/csrc). Every call checks shapes, then releases the GIL; bad input raises `ValueError`."""

from torch import Tensor

def simd_level() -> str:
    """The instruction set in use: `scalar`, `avx2`, `avx512`, `avx512_bf16` or `neon`; RETRIEVAL_SIMD picks one."""

def set_simd_level(name: str) -> None:
    """Use another level; not while a search runs."""

def num_threads() -> int:
    """Threads a call works on, the caller's included."""

def wake() -> None:
    """A call comes within some hundred microseconds: sleeping threads get up and look out for it."""

def set_num_threads(num_threads: int) -> None:
    """Replace the pool; by default it has one thread per physical core."""

class Matrix:
    """Float32 rows for `Linear`, taken once for many calls; shares the tensor's memory."""

    def __init__(self, rows: Tensor) -> None:
        """rows float32 `[num_rows, num_columns]` on the CPU, columns dense."""

class Linear:
    """Product of a few rows with a matrix of weights, by all threads of the pool."""

    def __init__(
        self,
        weights: Tensor,
        bias: Tensor | None = None,
        norm: Tensor | None = None,
        epsilon: float = 0.0,
        is_gated: bool = False,
    ) -> None:
        """weights `[num_outputs, num_inputs]`, dense, bf16, fp16 or fp32, not copied; bias float32 `[num_outputs]`;
        norm float32 `[num_inputs]`: rows go through a root mean square norm first; is_gated: rows are `[gate, up]` of
        twice as many columns, and silu(gate) * up is multiplied."""

    def apply(self, rows: Matrix, out: Matrix, add: bool = False) -> None:
        """out `[num_rows, num_outputs]` becomes the product, or has it added. A row does not depend on the others."""

class LayerCodes:
    """RaBitQ codes of the keys of one segment and layer, all KV heads. Searches may run while keys are appended."""

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        bits: int = 2,
        seed: int = 0,
        key_stretch: Tensor | None = None,
        query_stretch: Tensor | None = None,
        shapes: list[tuple[int, int]] | None = None,
    ) -> None:
        """Stretches, float32 `[num_kv_heads, head_dim, head_dim]`, each the other's inverse transposed, are applied to
        keys and queries before they are rotated; of the stretched coordinates the first ones of each head are encoded
        as its shape (dims, bits) says, no larger than head_dim and bits are. See retrieval.balance."""

    def append(self, keys: Tensor) -> None:
        """keys `[num_kv_heads, num_new, head_dim]`, CPU, bf16, fp16 or fp32, dense rows. All are added or none."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def shapes(self) -> list[tuple[int, int]]: ...
    @property
    def num_keys(self) -> int:
        """Keys per head."""

    @property
    def nbytes(self) -> int: ...
    @staticmethod
    def most_bytes(num_kv_heads: int, head_dim: int, bits: int, num_keys: int, is_stretched: bool = False) -> int:
        """What `nbytes` is at most with that many keys."""

    def save(self) -> bytes: ...
    @staticmethod
    def load(data: bytes) -> LayerCodes: ...

class Graph:
    """The attention-aware graph over the keys of one head. Searches may run at once, but not beside build or insert."""

    def __init__(
        self,
        degree: int = 16,
        num_linked: int = 100,
        num_pivots: int = 16,
        extra_degree: int = 16,
        link_width: int = 32,
        num_voters: int = 64,
        start_share: int = 64,
    ) -> None: ...
    def build(self, keys: Tensor, queries: Tensor, lists: Tensor) -> None:
        """keys `[num_keys, head_dim]` bf16, fp16 or fp32; queries float32 `[num_lists, head_dim]`; lists int32
        `[num_lists, list_size]`: the best keys of each query, best first, -1 where there are none."""

    def insert(self, keys: Tensor) -> None:
        """Link the keys behind those held; `keys` holds all of them."""

    def search(
        self,
        keys: Tensor,
        queries: Tensor,
        width: int,
        limit: int,
        positions: Tensor,
        scores: Tensor,
        hints: list[list[int]] = ...,
    ) -> tuple[int, int]:
        """Best-first search with `width` keys in view; fills positions int64 and scores float32 `[num_queries, k]` as
        `search` does, positions below `limit` only. hints: per query, positions to begin with besides the entry
        points (the last step's hits). Returns the number of inner products with keys and with sampled queries."""

    @property
    def num_keys(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def most_bytes(self, num_keys: int, head_dim: int, num_samples: int, num_listed: int) -> int:
        """What `nbytes` is at most over so many keys, of which `num_samples` lists name `num_listed` in all."""

    def save(self) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes]: ...
    def restore(
        self,
        edges: bytes,
        samples: bytes,
        lists: bytes,
        groups: bytes,
        metric: bytes,
        norms: bytes,
        num_keys: int,
        head_dim: int,
    ) -> None: ...

class Budget:
    """How much of the searched parts is looked at, per query head."""

    def __init__(
        self,
        k: int = 0,
        beta: float = 10.0,
        deviations: float = 3.5,
        min_keys: int = 1,
        max_keys: int = 16384,
        rest: float = 0.003,
        rest_keys: int = 2048,
        exact_keys: int = 4096,
        reach: float = 6.0,
        reach_products: int = 1 << 23,
    ) -> None:
        """k: the k best keys; 0: every key whose logit is at most `beta` nats below the best one, at least
        `min_keys`. deviations: a key is ruled out when even that many standard deviations would not lift it.
        max_keys: rescored at most, per KV head and sequence. rest: a head whose unretrieved keys weigh more than this
        share takes about `rest_keys` drawn by estimated weight instead (0: never). exact_keys: where a sequence
        has fewer searched keys in all, they are attended exactly (with k = 0). reach: a run of 32 neighbours is not
        scanned when no key that many deviations above the run's mean would become the best one (with k = 0; 0: all are
        scanned). reach_products: where a KV head's searched keys, times the query heads that share it, times head_dim,
        are fewer, every run is scanned."""

    @property
    def k(self) -> int: ...
    @property
    def beta(self) -> float: ...
    @property
    def deviations(self) -> float: ...
    @property
    def min_keys(self) -> int: ...
    @property
    def max_keys(self) -> int: ...
    @property
    def rest(self) -> float: ...
    @property
    def rest_keys(self) -> int: ...
    @property
    def exact_keys(self) -> int: ...
    @property
    def reach(self) -> float: ...
    @property
    def reach_products(self) -> int: ...

class AttendStats:
    """Sums over sequences and query heads."""

    @property
    def num_visible(self) -> int:
        """Keys attended or searched."""

    @property
    def num_scored(self) -> int:
        """Exact inner products."""

    @property
    def num_retrieved(self) -> int:
        """Keys of searched parts whose value entered the output."""

    @property
    def num_drawn(self) -> int:
        """Keys drawn for heads that look widely, counted once for the heads that share a KV head."""

    @property
    def bytes_read(self) -> int:
        """Codes, keys and values."""

class Part:
    """Positions [begin, end) of one segment and layer; keeps its tensors and codes alive."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        begin: int,
        end: int,
        codes: LayerCodes | None = None,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> None:
        """keys, values `[num_kv_heads, capacity, head_dim]` of one dtype, rows dense, heads apart by any stride;
        int8 ones with scales float32 `[num_kv_heads, capacity]`. Without codes the part is attended exactly; with
        codes, of positions [0, codes.num_keys), it is searched, and what lies behind them is attended exactly."""

    @property
    def begin(self) -> int: ...
    @begin.setter
    def begin(self, position: int) -> None: ...
    @property
    def end(self) -> int: ...
    @end.setter
    def end(self, position: int) -> None: ...
    @property
    def codes(self) -> LayerCodes | None: ...

class DecodeRows:
    """A decode step's queries and results, taken once for many calls; shares the tensors' memory."""

    def __init__(self, queries: Tensor, out: Tensor, lse: Tensor) -> None:
        """queries `[num_seqs, num_q_heads, head_dim]` bf16, fp16 or fp32, dense in each sequence; out float32 of the
        same shape and lse float32 `[num_seqs, num_q_heads]`, contiguous; all on the CPU."""

    def attend(self, parts: list[list[Part]], scale: float, budget: Budget = ...) -> AttendStats:
        """As `attend_layer`, with what the tensors hold by now."""

def attend_layer(
    queries: Tensor,
    parts: list[list[Part]],
    scale: float,
    out: Tensor,
    lse: Tensor,
    budget: Budget = ...,
) -> AttendStats:
    """Attention of one layer for one token of each sequence, over the disjoint parts of each.

    queries `[num_seqs, num_q_heads, head_dim]` bf16, fp16 or fp32, dense in each sequence; fills out float32
    `[num_seqs, num_q_heads, head_dim]` and lse float32 `[num_seqs, num_q_heads]` (natural log, after
    scaling; no key: out 0, lse -inf). The result does not depend on the number of threads.
    """

def can_attend_chunk() -> bool:
    """Whether `attend_chunk` works here: AMX-BF16 and AVX-512-BF16, and the system's leave to use them."""

def attend_chunk(
    queries: Tensor,
    parts: list[Part],
    num_new: int,
    scale: float,
    out: Tensor,
    lse: Tensor | None = None,
    sliding_window: int | None = None,
) -> None:
    """Causal attention of the newest `num_new` positions over all positions, their own included.

    queries bf16 `[num_q_heads, num_new, head_dim]`, dimensions dense; parts bf16 without codes, covering all
    positions in order, the last ending with the chunk's own keys. Fills out, float32 or bf16, of the queries'
    shape, and lse float32 `[num_q_heads, num_new]`. With `sliding_window`, a query sees the last that many
    positions, itself included. Scores are float32, weights bf16 (relative error 0.0018, root mean square) and
    divided by the sum of the rounded ones; scores beyond 2^27 give NaN. The result does not depend on the number
    of threads. RuntimeError where `can_attend_chunk` says no.
    """

def search(
    queries: Tensor, part: Part, k: int, positions: Tensor, scores: Tensor, budget: Budget = ..., kv_head: int = 0
) -> AttendStats:
    """The best k keys of one KV head of a part for queries `[num_queries, head_dim]`.

    Fills positions int64 `[num_queries, k]`, padded with -1, and scores float32 `[num_queries, k]`, raw inner
    products, descending, padded with -inf.
    """
