"""Small stateless modules of the kinds that are served beside language models, and inputs for them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_IDS = 50


class ImageClassifier(nn.Module):
    """A convnet with batch norms: image [B, 3, 32, 32] -> class scores [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(16, 10)
        norm = self.body[1]
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.dropout(self.body(image).flatten(1), training=self.training))


class DetectorHead(nn.Module):
    """Two scales, anchors, the five best boxes: image [B, 3, 32, 32] -> boxes [B, 5, 4], scores [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.up, self.head = nn.Upsample(scale_factor=2), nn.Conv2d(16, 3 * 6, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        fine = F.silu(self.down(image))
        found = self.head(torch.cat((fine, self.up(F.silu(self.deep(fine)))), dim=1))
        batch, _, height, width = found.shape
        found = found.view(batch, 3, 6, height * width).permute(0, 1, 3, 2).reshape(batch, -1, 6)
        scores, index = found[..., 4:].softmax(-1)[..., 1].topk(5, dim=1)
        boxes = found[..., :4].sigmoid().gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return {"boxes": boxes, "scores": scores}


class Recommender(nn.Module):
    """DLRM: dense [B, 4] and three bags of two ids each, [B, 3, 2] -> the chance of a click [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(NUM_IDS, 8, mode=mode) for mode in ("sum", "mean", "max"))
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.top = nn.Sequential(nn.Linear(8 + 6, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        x = self.bottom(dense)
        every = torch.stack([x, *(table(categories[:, i]) for i, table in enumerate(self.tables))], dim=1)
        first, second = torch.tril_indices(4, 4, -1, device=dense.device)
        pairs = torch.bmm(every, every.transpose(1, 2))[:, first, second]
        return self.top(torch.cat((x, pairs), dim=1)).sigmoid().squeeze(1)


class AudioClassifier(nn.Module):
    """Spectrum, convolution, a GRU both ways: samples [B, 800] -> class scores [B, 4]."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.conv, self.gru = nn.Conv1d(33, 16, 5, padding=2), nn.GRU(16, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 4)

    def forward(self, samples: Tensor) -> Tensor:
        spectrum = torch.stft(samples, 64, 32, window=self.window, return_complex=True).abs()
        states, _ = self.gru(F.relu(self.conv(torch.log1p(spectrum))).transpose(1, 2))
        return self.head(states.mean(1))


STATELESS: dict[str, type[nn.Module]] = {
    "image classifier": ImageClassifier,
    "detector head": DetectorHead,
    "recommender": Recommender,
    "audio classifier": AudioClassifier,
}


def inputs_for(module: nn.Module, batch: int) -> dict[str, Any]:
    """Random inputs of that batch."""
    if isinstance(module, Recommender):
        return {"dense": torch.randn(batch, 4), "categories": torch.randint(0, NUM_IDS, (batch, 3, 2))}
    if isinstance(module, AudioClassifier):
        return {"samples": torch.randn(batch, 800)}
    return {"image": torch.randn(batch, 3, 32, 32)}
