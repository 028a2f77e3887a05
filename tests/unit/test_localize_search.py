# SPDX-License-Identifier: Apache-2.0
"""The search equals pairwise distances by broadcasting, whatever the data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_ad.scoring.localize import search


def naive(queries, gallery):
    return (queries.float()[:, None] - gallery.float()[None]).square().sum(2).min(1).values.sqrt()


def found(queries, gallery, parts=1):
    packed = [search.pack(rows.numpy()) for rows in gallery.tensor_split(parts)]
    return torch.from_numpy(search.nearest(queries.numpy(), packed))


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
    return queries.half(), gallery.half()


NAMES = ["plain", "low rank", "far from the origin", "copies", "constant", "few values", "large"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [1, 3])
def test_equal_to_broadcasting(name, parts):
    queries, gallery = data(name)
    torch.testing.assert_close(found(queries, gallery, parts), naive(queries, gallery), rtol=1e-6, atol=0)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_size(queries, rows, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, channels, generator=generator).half()
    g = torch.randn(rows, channels, generator=generator).half()
    torch.testing.assert_close(found(q, g), naive(q, g), rtol=1e-5, atol=1e-6)


def test_a_copy_is_at_no_distance():
    _, gallery = data("far from the origin")
    assert found(gallery[:50], gallery).max() == 0


def test_small_parts_change_nothing(monkeypatch):
    queries, gallery = data("low rank")
    whole = found(queries, gallery)
    monkeypatch.setattr(search, "_PAIRS", 1000)
    assert torch.equal(found(queries, gallery), whole)
    assert torch.equal(found(queries, gallery, parts=3), whole)
