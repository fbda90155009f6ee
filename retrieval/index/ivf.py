"""Kind `ivf`: keys in clusters, the clusters nearest the query scanned exactly (faiss)."""

from __future__ import annotations

from typing import Any

import faiss
import torch
from torch import Tensor

from retrieval.index.faiss_index import FaissIndex
from retrieval.index.library import Floats, as_floats

NUM_ITERATIONS = 10
ID_BYTES = 8
HALF_TYPES = {torch.float16: faiss.ScalarQuantizer.QT_fp16, torch.bfloat16: faiss.ScalarQuantizer.QT_bf16}


class IvfIndex(FaissIndex):
    """Inverted lists over k-means clusters.

    Deviation from faiss's inner-product IVF: keys are clustered and assigned by Euclidean distance, and
    only probed by inner product. Keys of a model share a large mean; assigned by inner product most of
    them would fall to the few clusters that point along it.
    """

    kind = "ivf"

    def __init__(
        self, keys: Tensor, queries: Tensor, num_lists: int | None = None, num_probes: int | None = None
    ) -> None:
        """num_lists: clusters, 2 √num_keys if not given; num_probes: clusters scanned, an eighth if not given."""
        super().__init__(keys, queries, num_lists=num_lists, num_probes=num_probes)

    def _create(self, vectors: Floats) -> Any:
        num_lists = self._options["num_lists"] or usual_num_lists(len(vectors))
        head_dim = vectors.shape[1]
        means = faiss.Kmeans(head_dim, num_lists, niter=NUM_ITERATIONS, seed=1, min_points_per_centroid=1)
        means.train(vectors)
        assert means.centroids is not None
        lists = faiss.IndexFlatIP(head_dim)
        lists.add(means.centroids)
        structure = empty_lists(lists, num_lists, self._keys.dtype)
        self._append(structure, vectors)
        return structure

    def _append(self, structure: Any, vectors: Floats) -> None:
        centroids = structure.quantizer.reconstruct_n(0, structure.nlist)
        _, nearest = faiss.knn(vectors, centroids, 1)
        structure.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(nearest))

    def _find(self, structure: Any, queries: Tensor, k: int, limit: int) -> tuple[Tensor, Tensor]:
        selector = faiss.IDSelectorRange(0, limit) if limit < self.num_keys else None
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe, parameters.sel = self._num_probes(structure), selector
        scores, positions = structure.search(as_floats(queries), k, params=parameters)
        found = torch.from_numpy(positions)
        return found, torch.from_numpy(scores).masked_fill(found < 0, -torch.inf)

    def _num_probes(self, structure: Any) -> int:
        return int(self._options["num_probes"] or max(1, structure.nlist // 8))

    def _count_found(self, k: int, num_visible: int) -> int:
        # A long list is probed more often than a short one: mean length weighted by length.
        lists = self._structure.invlists
        lengths = torch.tensor([lists.list_size(i) for i in range(self._structure.nlist)], dtype=torch.float64)
        share = float(lengths.square().sum() / lengths.sum().square()) * self._num_probes(self._structure)
        return int(min(1.0, share) * num_visible)

    @property
    def nbytes(self) -> int:
        """The copy of the keys with their ids, and the centroids."""
        if self._structure is None:
            return 0
        return self.most_bytes(self.num_keys, self.head_dim, self._keys.element_size(), int(self._structure.nlist))

    @classmethod
    def most_bytes(
        cls, num_keys: int, head_dim: int, element_size: int, num_lists: int | None = None, **options: Any
    ) -> int:
        """See `KeyIndex.most_bytes`."""
        num_lists = num_lists or usual_num_lists(num_keys)
        return num_keys * (element_size * head_dim + ID_BYTES) + num_lists * 4 * head_dim


def usual_num_lists(num_keys: int) -> int:
    """Clusters where the options do not say."""
    return int(2 * num_keys**0.5)


def empty_lists(quantizer: Any, num_lists: int, dtype: torch.dtype) -> Any:
    """Lists that keep keys exactly as they are: in 2 bytes for half types, which also scans faster than 4."""
    metric = faiss.METRIC_INNER_PRODUCT
    if dtype not in HALF_TYPES:
        return faiss.IndexIVFFlat(quantizer, quantizer.d, num_lists, metric)
    structure = faiss.IndexIVFScalarQuantizer(quantizer, quantizer.d, num_lists, HALF_TYPES[dtype], metric, False)
    structure.is_trained = True  # a half type has nothing to learn
    return structure
