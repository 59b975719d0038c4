"""A recommender, compiled: named tensors in, named tensors out, any batch of the profile.

python examples/recommender.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from tritium import OptimizationProfile, build

NUM_ITEMS, TABLES, SIZE = 1000, 4, 16


class Recommender(nn.Module):
    """DLRM: numbers and categories of a person and an item -> the chance of a click."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(NUM_ITEMS, SIZE, mode="sum") for _ in range(TABLES))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, SIZE))
        self.top = nn.Sequential(nn.Linear(SIZE + (TABLES + 1) ** 2, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: Tensor, categories: Tensor) -> dict[str, Tensor]:
        x = self.bottom(dense)
        every = torch.stack([x, *(table(categories[:, i]) for i, table in enumerate(self.tables))], dim=1)
        products = torch.bmm(every, every.transpose(1, 2)).flatten(1)
        return {"click": self.top(torch.cat((x, products), dim=1)).sigmoid().squeeze(1)}


def batch_of(size: int) -> dict[str, Tensor]:
    """Random people and items: 13 numbers, and three ids for each of the tables."""
    return {"dense": torch.randn(size, 13), "categories": torch.randint(0, NUM_ITEMS, (size, TABLES, 3))}


def main() -> None:
    torch.manual_seed(0)
    module = Recommender().eval()
    with tempfile.TemporaryDirectory() as folder:
        engine = build(
            module,
            example_inputs=batch_of(2),
            profile=OptimizationProfile(min=1, opt=64, max=256),
            output_dir=Path(folder) / "engine",
        )
        print("takes dense, categories; gives click; batches of 1 to 256")
        for size in (1, 7, 256):
            inputs = batch_of(size)
            click = engine.run(**inputs)["click"]
            difference = float((click - module(**inputs)["click"].detach()).abs().max())
            print(f"batch of {size}: best item {int(click.argmax())}, equal to torch within {difference:.1e}")


if __name__ == "__main__":
    main()
