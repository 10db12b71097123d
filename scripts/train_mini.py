"""Train the parts between the towers of `mini`: image head, text head, low-rank updates of the text tower.

    python scripts/train_mini.py --data DIR --cache DIR [--out FILE] [--seed 0]

DIR holds Flickr8k as WebDataset shards (`flickr8k/train-*.tar`, `flickr8k/val-*.tar`). Only the training
split trains; the script prints recall on the validation split, and `benchmarks/model/encoder_mini.py` the
rest. The image tower is frozen and its features are cached, so a second run starts at once.

An image's vector has two halves. The first is trained with open_clip's contrastive loss; texts live there.
The second keeps the tower's own view: the leading principal components of its features, a little whitened;
texts are zero there. So an image ranks texts by the first half alone, and the cosine of two images also
counts what no caption of 6,000 photographs named. Both are one linear map of the tower's features:
open_clip's `timm_proj: linear`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tagstore.encoding.torchvision_shim import prepare_torchvision

prepare_torchvision()

from open_clip import ClipLoss  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tagstore.encoding import mini  # noqa: E402
from tagstore.encoding.encoder import Encoder, load_encoder  # noqa: E402
from tagstore.encoding.images import decode  # noqa: E402
from tagstore.readers import read  # noqa: E402
from tagstore.types import Pair  # noqa: E402

TEXT_HALF = 256  # dimensions in which images and texts meet
KEPT_HALF = 256  # dimensions that keep the tower's own view
KEPT_LENGTH = 1.5  # mean length of the kept half, relative to the other
WHITENING = 0.25  # components are divided by their variance to this power


@dataclass(frozen=True)
class Split:
    """Photographs of one split as features `[N, F]`, those of their mirror images, and their captions."""

    features: Tensor
    mirrored: Tensor
    captions: list[list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="holds flickr8k/train-*.tar and flickr8k/val-*.tar"
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="where the tower's features are kept between runs"
    )
    parser.add_argument("--out", type=Path, default=mini.WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--head-epochs",
        type=int,
        default=60,
        help="with the text tower frozen: a caption of each photograph an epoch",
    )
    parser.add_argument("--text-epochs", type=int, default=20, help="with low-rank updates of the text tower")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the updates")
    options = parser.parse_args()

    encoder = load_encoder("mini", device="cpu")
    train, val = (load_split(options.data, options.cache, name, encoder) for name in ("train", "val"))
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model = Joint(encoder, train, options.rank)
    start = time.perf_counter()
    train_heads(model, train, epochs=options.head_epochs)
    print(f"heads: {recall(model, val)} [{time.perf_counter() - start:.0f} s]", flush=True)
    if options.text_epochs:
        train_text_tower(model, train, val, epochs=options.text_epochs, lr=options.lr)
    save_file(model.trained(train), options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s")


# data


def load_split(data: Path, cache: Path, name: str, encoder: Encoder) -> Split:
    """A split from the cache, or through the frozen tower once."""
    arrays, captions = cache / f"{name}.npz", cache / f"{name}.json"
    if not (arrays.exists() and captions.exists()):
        cache.mkdir(parents=True, exist_ok=True)
        pairs = [pair for pair in read(str(data / "flickr8k" / f"{name}-*.tar")) if isinstance(pair, Pair)]
        with ThreadPoolExecutor() as pool:
            images = np.stack(list(pool.map(lambda pair: encoder.prepare(decode(pair.image)), pairs)))
        np.savez(arrays, features=pooled(encoder, images), mirrored=pooled(encoder, images[:, :, ::-1]))
        captions.write_text(json.dumps([pair.captions for pair in pairs]))
    found = np.load(arrays, allow_pickle=False)
    return Split(
        torch.from_numpy(found["features"]),
        torch.from_numpy(found["mirrored"]),
        json.loads(captions.read_text()),
    )


def pooled(encoder: Encoder, images: np.ndarray) -> np.ndarray:
    """The tower's features before the head, `[N, F]`: the mean over the grid."""
    return np.concatenate(
        [encoder.encode_grid(images[i : i + 64])[0].mean(axis=1) for i in range(0, len(images), 64)]
    )


# model


class LowRank(nn.Module):
    """A frozen linear layer plus `up @ down`, zero at the start (Hu et al., LoRA, arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.down.T) @ self.up.T


class Joint(nn.Module):
    """The trained half: centred features and pooled token states into one space."""

    def __init__(self, encoder: Encoder, train: Split, rank: int) -> None:
        super().__init__()
        untrained, _ = mini.build({})
        self.tower = untrained.text.transformer.requires_grad_(False)
        self.updates: dict[str, LowRank] = {}
        for name, module in list(self.tower.encoder.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                self.updates[f"text.transformer.encoder.{name}.weight"] = layer = LowRank(module, rank)
                setattr(self.tower.encoder.get_submodule(parent), child, layer)
        self.tokenizer = encoder._tokenizer
        self.mean, self.scale = train.features.mean(0), train.features.std(0).mean()
        self.image_head = nn.Linear(train.features.shape[1], TEXT_HALF)
        self.text_head = nn.Linear(self.tower.config.hidden_size, TEXT_HALF, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))

    def image(self, features: Tensor, drop: float = 0.0) -> Tensor:
        return F.normalize(self.image_head(F.dropout((features - self.mean) / self.scale, drop)), dim=-1)

    def text(self, states: Tensor, drop: float = 0.0) -> Tensor:
        return F.normalize(self.text_head(F.dropout(states, drop)), dim=-1)

    def states(self, tokens: Tensor, rows: int = 128) -> Tensor:
        """Mean token states `[N, 384]`, of texts of similar length together, to save padding."""
        lengths = (tokens != 0).sum(1)
        order = lengths.argsort()
        parts = []
        for part in order.split(rows):
            ids = tokens[part, : lengths[part].max()]
            mask = (ids != 0).long()
            found = self.tower(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            parts.append((found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(parts)[order.argsort()]

    def groups(self, decay: float) -> list[dict[str, Any]]:
        heads = [*self.image_head.parameters(), *self.text_head.parameters()]
        return [{"params": heads, "weight_decay": decay}, {"params": [self.logit_scale], "weight_decay": 0.0}]

    @torch.inference_mode()
    def trained(self, train: Split) -> dict[str, Tensor]:
        """The tensors of mini.safetensors: both halves as one map, the text head zero in the kept half."""
        centred = train.features - self.mean
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        variance, directions = variance.flip(0)[:KEPT_HALF], directions.flip(1)[:, :KEPT_HALF]
        # an eigenvector's sign is arbitrary: fix it, so that a run repeats
        directions = directions * directions.sum(0).sign()
        kept = (directions * (variance / variance[0]) ** -WHITENING).T
        shared = self.image_head.weight / self.scale
        shared_length = (centred @ shared.T + self.image_head.bias).norm(dim=1).mean()
        kept_length = (centred @ kept.T).norm(dim=1).mean()
        weight = torch.cat([shared / shared_length, KEPT_LENGTH * kept / kept_length])
        bias = torch.cat([self.image_head.bias / shared_length, torch.zeros(KEPT_HALF)]) - weight @ self.mean
        found = {
            "visual.head.proj.weight": 16
            * weight,  # a vector is normalised: 16 only keeps small values exact in fp16
            "visual.head.proj.bias": 16 * bias,
            "text.proj.weight": F.pad(self.text_head.weight, (0, 0, 0, KEPT_HALF)),
            "logit_scale": self.logit_scale.detach(),
        }
        for name, layer in self.updates.items():
            if not layer.up.any():  # heads only: --text-epochs 0
                continue
            found |= {name + mini.UP: layer.up.detach(), name + mini.DOWN: layer.down.detach()}
        return {name: tensor.half().contiguous() for name, tensor in found.items()}


# training


def train_heads(model: Joint, train: Split, *, epochs: int, batch: int = 1000, lr: float = 1e-3) -> None:
    """Train both heads on cached states of the untouched text tower.

    Half of the features are dropped, because 6,000 photographs are few.
    """
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        states = torch.stack(
            [model.states(model.tokenizer(list(row))) for row in zip(*train.captions, strict=True)], dim=1
        )
    states = states.clone()
    optimiser = torch.optim.AdamW(model.groups(0.5), lr=lr)
    _run(model, train, optimiser, epochs, batch, lambda rows, choice: model.text(states[rows, choice], 0.1))


def train_text_tower(
    model: Joint, train: Split, val: Split, *, epochs: int, lr: float, batch: int = 500
) -> None:
    """Train the updates, and the heads at a third of the rate."""
    tokens = torch.stack([model.tokenizer(list(row)) for row in zip(*train.captions, strict=True)], dim=1)
    updates = [p for layer in model.updates.values() for p in (layer.up, layer.down)]
    groups = [{**group, "lr": lr / 3} for group in model.groups(0.5)]
    optimiser = torch.optim.AdamW([*groups, {"params": updates, "weight_decay": 0.05}], lr=lr)

    def encode(rows: Tensor, choice: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states = model.states(tokens[rows, choice])
        return model.text(states, 0.1)

    _run(model, train, optimiser, epochs, batch, encode, report=lambda: str(recall(model, val)))


def _run(
    model: Joint, train: Split, optimiser: Any, epochs: int, batch: int, encode: Any, report: Any = None
) -> None:
    loss_of = ClipLoss()
    count, start = len(train.features), time.perf_counter()
    steps = epochs * -(-count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, [g["lr"] for g in optimiser.param_groups], total_steps=steps, pct_start=0.1
    )
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(count).split(batch):
            mirror = torch.rand(len(rows), 1) < 0.5
            images = model.image(torch.where(mirror, train.mirrored[rows], train.features[rows]), drop=0.5)
            texts = encode(rows, torch.randint(len(train.captions[0]), (len(rows),)))
            loss = loss_of(images, texts, model.logit_scale.exp().clamp(max=100))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        if report and (epoch % 4 == 3 or epoch == epochs - 1):
            print(
                f"epoch {epoch + 1}: loss {loss.item():.3f}, {report()} "
                f"[{time.perf_counter() - start:.0f} s]",
                flush=True,
            )


@torch.inference_mode()
def recall(model: Joint, split: Split, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, list[float]]:
    """Recall@k in percent, text to image and image to text, in the half where texts live.

    A whole vector finds images for a text a little worse: the other half stretches some images more than
    others.
    """
    model.eval()
    captions = [caption for row in split.captions for caption in row]
    with torch.autocast("cpu", torch.bfloat16):
        states = model.states(model.tokenizer(captions))
    scores = model.image(split.features) @ model.text(states).T  # [N, 5 N]
    own = torch.arange(len(split.captions)).repeat_interleave(len(split.captions[0]))
    place = (scores > scores[own, torch.arange(len(own))]).sum(0)
    best = torch.stack([place_in(scores, own, i) for i in range(len(scores))])
    return {
        name: [round(100 * (p < k).float().mean().item(), 1) for k in at]
        for name, p in (("t2i", place), ("i2t", best))
    }


def place_in(scores: Tensor, own: Tensor, image: int) -> Tensor:
    """How many captions of other photographs an image puts above the best of its own."""
    return (scores[image] > scores[image, own == image].max()).sum()


if __name__ == "__main__":
    main()
