"""The pruned search equals pairwise distances by broadcasting, whatever the data's shape makes of its bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_ad.scoring.localize import search


def naive(queries, gallery):
    return (queries.float()[:, None] - gallery.float()[None]).square().sum(2).min(1).values.sqrt()


PRECISIONS = [torch.float32, torch.bfloat16]


def found(queries, gallery, energy=0.96, parts=1, precision=None):
    basis = search.fit_basis(gallery, energy)
    packed = [
        search.pack(search.Rows(g, search.bounds(g, basis)), basis, precision) for g in gallery.tensor_split(parts)
    ]
    return search.nearest(queries, packed, basis)


def data(name, channels=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gallery = torch.randn(3000, channels, generator=generator)
    queries = torch.randn(257, channels, generator=generator)
    if name == "low rank":
        mixing = torch.randn(channels, channels, generator=generator) * torch.logspace(0, -3, channels)[:, None]
        gallery, queries = gallery @ mixing, queries @ mixing
    elif name == "far from the origin":
        gallery, queries = gallery + 40, queries + 40
    elif name == "copies":
        queries[::2] = gallery[:129]
    elif name == "constant":
        gallery[:], queries[:] = 1.5, 2.0
    elif name == "few values":
        gallery, queries = gallery.round(), queries.round()
    elif name == "large":
        gallery, queries = gallery * 3e3, queries * 3e3
    elif name == "outside the basis":
        gallery[:, channels // 2 :] *= 1e-3
        queries[:, : channels // 2] *= 1e-3
    return queries.half(), gallery.half()


NAMES = ["plain", "low rank", "far from the origin", "copies", "constant", "few values", "large", "outside the basis"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("energy", [0.3, 0.96, 1.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_to_broadcasting(name, energy, precision):
    queries, gallery = data(name)
    torch.testing.assert_close(
        found(queries, gallery, energy, precision=precision), naive(queries, gallery), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("energy", [0.3, 0.96])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_distance_lies_below_its_bound(name, energy, precision, monkeypatch):
    """What the search leaves out it may leave out: bounds of whole blocks against their rows' true distances, in float64."""
    seen = []
    monkeypatch.setattr(search, "_search", lambda queries, low, blocks, best, basis: seen.append((low, best)))
    queries, gallery = data(name)
    found(queries, gallery, energy, precision=precision)
    ((low, _),) = seen
    true = torch.cdist(gallery.double(), queries.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    blocks = len(gallery) // search.BLOCK
    nearest = true[: blocks * search.BLOCK].view(blocks, search.BLOCK, -1).amin(1)
    assert bool((low.flatten(0, 1)[:blocks].double() <= nearest).all())


@pytest.mark.parametrize("name", NAMES)
def test_equal_where_every_query_is_hard(name, monkeypatch):
    monkeypatch.setattr(search, "_HARD", 10**9)
    monkeypatch.setattr(search, "_WORTH", 0)
    calls = []
    full_width = search._search_full_width
    monkeypatch.setattr(search, "_search_full_width", lambda *a: (calls.append(len(a[2])), full_width(*a)))
    queries, gallery = data(name)
    torch.testing.assert_close(found(queries, gallery, 0.3), naive(queries, gallery), rtol=1e-6, atol=0)
    if name == "plain":
        assert sum(calls) > 100  # the path was taken


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 70),
    st.integers(1, 200),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 5),
    st.sampled_from(PRECISIONS),
)
def test_any_size_and_any_number_of_parts(queries, rows, channels, parts, seed, precision):
    generator = torch.Generator().manual_seed(seed)
    q, g = (
        torch.randn(queries, channels, generator=generator).half(),
        torch.randn(rows, channels, generator=generator).half(),
    )
    torch.testing.assert_close(found(q, g, parts=min(parts, rows), precision=precision), naive(q, g), rtol=1e-6, atol=0)


def test_blocks_of_queries_and_bounds_change_nothing(monkeypatch):
    queries, gallery = data("low rank")
    whole = found(queries, gallery)
    for name, value in (("QUERIES", 50), ("_BOUNDS", 2000), ("_PRODUCT", 1000), ("_PAIRS", 1000)):
        monkeypatch.setattr(search, name, value)
    assert torch.equal(found(queries, gallery), whole)
    assert torch.equal(found(queries, gallery, parts=3), whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bounds_leave_little_to_compute(precision, monkeypatch):
    """Where most variance lies in few directions, as in feature maps, nearly all blocks are ruled out."""
    computed = []
    compute = search._compute
    monkeypatch.setattr(search, "_compute", lambda *a: (computed.append(len(a[2])), compute(*a)))
    rng = np.random.default_rng(0)
    scale = np.logspace(0, -1.5, 32)
    gallery = torch.from_numpy(rng.normal(size=(8000, 32)) * scale).half()
    queries = torch.from_numpy(rng.normal(size=(200, 32)) * scale).half()
    found(queries, gallery, precision=precision)
    assert sum(computed) < 0.1 * 200 * 8000 / search.BLOCK
