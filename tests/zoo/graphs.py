"""torch_geometric: message passing on graphs."""

from __future__ import annotations

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from zoo.case import Cases, keywords, randint, randn

CASES = Cases()
NODES, FEATURES, EDGES = 9, 5, 20


def edges() -> Tensor:
    return randint(NODES, 2, EDGES)


GRAPH = keywords(x=lambda: randn(NODES, FEATURES), edge_index=edges)
WITH_EDGES = keywords(x=lambda: randn(NODES, FEATURES), edge_index=edges, edge_attr=lambda: randn(EDGES, 3))
BATCH = keywords(
    x=lambda: randn(NODES, FEATURES), edge_index=edges, batch=lambda: torch.tensor([0] * 4 + [1] * 5)
)


@CASES(GRAPH)
def gcn(k: int) -> nn.Module:
    return pyg.GCN(FEATURES, 8 * k, 2, out_channels=3, dropout=0.1)


@CASES(GRAPH)
def sage(k: int) -> nn.Module:
    return pyg.GraphSAGE(FEATURES, 8 * k, 2, out_channels=3, norm="batch")


@CASES(GRAPH)
def gin(k: int) -> nn.Module:
    return pyg.GIN(FEATURES, 8 * k, 2, out_channels=3, train_eps=True, jk="cat")


@CASES(GRAPH)
def gat(k: int) -> nn.Module:
    return pyg.GAT(FEATURES, 16 * k, 2, out_channels=3, heads=2 * k)


@CASES(GRAPH)
def gat_v2(k: int) -> nn.Module:
    return pyg.GAT(FEATURES, 16 * k, 2, out_channels=3, heads=2 * k, v2=True)


@CASES(
    GRAPH, r"convs\.0\.(pre_nns.*:0|post_nns.*:1)|convs\.1\.(post_nns.*:0|lin\.weight:1)"
)  # a size of data, twice over
def pna(k: int) -> nn.Module:
    return pyg.PNA(
        FEATURES,
        8 * k,
        2,
        out_channels=3,
        aggregators=["mean", "max"],
        scalers=["identity", "amplification"],
        deg=torch.tensor([1, 3, 3, 2]),
    )


class Wrapped(nn.Module):
    """Layers of one kind, ReLU in between, and a readout."""

    def __init__(self, layers: list[nn.Module], head: nn.Module, enter: nn.Module | None = None):
        super().__init__()
        self.enter, self.layers, self.head = enter, nn.ModuleList(layers), head

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None = None, batch: Tensor | None = None
    ) -> Tensor:
        if self.enter is not None:
            x = self.enter(x)
        for layer in self.layers:
            x = layer(x, edge_index).relu() if edge_attr is None else layer(x, edge_index, edge_attr).relu()
        if batch is not None:
            x = pyg.global_mean_pool(x, batch, size=2)
        return self.head(x)


@CASES(WITH_EDGES)
def transformer_conv(k: int) -> nn.Module:
    return Wrapped(
        [
            pyg.TransformerConv(FEATURES, 8, heads=2 * k, edge_dim=3),
            pyg.TransformerConv(16 * k, 8, heads=2 * k, edge_dim=3, beta=True),
        ],
        nn.Linear(16 * k, 3),
    )


@CASES(WITH_EDGES)
def gine(k: int) -> nn.Module:
    def mlp() -> nn.Module:
        return nn.Sequential(
            nn.Linear(8 * k, 8 * k), nn.BatchNorm1d(8 * k), nn.ReLU(), nn.Linear(8 * k, 8 * k)
        )

    return Wrapped(
        [pyg.GINEConv(mlp(), edge_dim=3), pyg.GINEConv(mlp(), edge_dim=3)],
        nn.Linear(8 * k, 3),
        nn.Linear(FEATURES, 8 * k),
    )


@CASES(BATCH)
def graph_conv_pool(k: int) -> nn.Module:
    return Wrapped([pyg.GraphConv(FEATURES, 8 * k), pyg.GraphConv(8 * k, 8 * k)], nn.Linear(8 * k, 3))


@CASES(GRAPH)
def cheb(k: int) -> nn.Module:
    return Wrapped([pyg.ChebConv(FEATURES, 8 * k, 3), pyg.ChebConv(8 * k, 8 * k, 3)], nn.Linear(8 * k, 3))


@CASES(GRAPH)
def gated_graph(k: int) -> nn.Module:
    return Wrapped([pyg.GatedGraphConv(8 * k, 2)], nn.Linear(8 * k, 3), nn.Linear(FEATURES, 8 * k))


@CASES(GRAPH)
def edge_conv(k: int) -> nn.Module:
    return Wrapped(
        [
            pyg.EdgeConv(nn.Sequential(nn.Linear(2 * FEATURES, 8 * k), nn.ReLU(), nn.Linear(8 * k, 8 * k))),
            pyg.EdgeConv(nn.Linear(16 * k, 8 * k)),
        ],
        nn.Linear(8 * k, 3),
    )


@CASES(GRAPH)
def appnp(k: int) -> nn.Module:
    layers = [pyg.APPNP(3, 0.1), pyg.SGConv(8 * k, 8 * k, 2), pyg.TAGConv(8 * k, 8 * k, 2)]
    return Wrapped(layers, nn.Linear(8 * k, 3), nn.Linear(FEATURES, 8 * k))


@CASES(keywords(x=lambda: randn(NODES, FEATURES), edge_index=edges, edge_type=lambda: randint(4, EDGES)))
def rgcn(k: int) -> nn.Module:
    class Relational(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = pyg.RGCNConv(FEATURES, 8 * k, 4, num_bases=2)
            self.b = pyg.RGCNConv(8 * k, 3, 4)

        def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor) -> Tensor:
            return self.b(self.a(x, edge_index, edge_type).relu(), edge_index, edge_type)

    return Relational()


@CASES(keywords(x=lambda: randn(NODES, FEATURES), edge_index=edges, user=lambda: randint(NODES, 4)))
def lightgcn_like(k: int) -> nn.Module:
    class Recommend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(NODES, 8 * k)
            self.conv = pyg.LGConv()

        def forward(self, x: Tensor, edge_index: Tensor, user: Tensor) -> Tensor:
            h = self.table.weight
            h = (h + self.conv(h, edge_index)) / 2
            return h[user] @ h.t() + x.mean()

    return Recommend()


@CASES(GRAPH, r"comb_lin\.(weight|bias):0")  # heads x bases, both fixed
def eg_conv(k: int) -> nn.Module:
    layers: list[nn.Module] = [pyg.EGConv(8 * k, 8 * k, num_heads=2, num_bases=4) for _ in range(2)]
    return Wrapped(layers, nn.Linear(8 * k, 3), nn.Linear(FEATURES, 8 * k))


@CASES(GRAPH)
def residual_gated(k: int) -> nn.Module:
    layers: list[nn.Module] = [pyg.ResGatedGraphConv(8 * k, 8 * k) for _ in range(2)]
    return Wrapped(layers, nn.Linear(8 * k, 3), nn.Linear(FEATURES, 8 * k))


@CASES(GRAPH)
def tag_conv(k: int) -> nn.Module:
    layers: list[nn.Module] = [pyg.TAGConv(8 * k, 8 * k, K=2), pyg.ARMAConv(8 * k, 8 * k, num_stacks=2)]
    return Wrapped(layers, nn.Linear(8 * k, 3), nn.Linear(FEATURES, 8 * k))
