"""Train the embedded models and write their weights into the package.

Run `python -m experiments.train_embedded digits_resnet digits_vit topics_llama`.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ptq.config import build, load_choice
from ptq.data.images import Digits
from ptq.models.embedded import DIGITS_PREPROCESSING, WEIGHTS_DIR


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images [images, 1, 8, 8] and labels [images] of a split of the digits, as the models see them."""
    items = list(Digits().dataset(split, DIGITS_PREPROCESSING))
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def moved_by_a_pixel(images: Tensor) -> Tensor:
    """Images moved at random by up to one pixel each way, over an empty background."""
    background = images.amin()
    padded = functional.pad(images, (1, 1, 1, 1), value=float(background))
    moved = torch.empty_like(images)
    dy, dx = torch.randint(0, 3, (2, len(images)))
    for shift_y in range(3):
        for shift_x in range(3):
            here = (dy == shift_y) & (dx == shift_x)
            moved[here] = padded[here, :, shift_y : shift_y + 8, shift_x : shift_x + 8]
    return moved


@torch.no_grad()
def top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images classified right, percent."""
    network.eval()
    return 100 * (network(images).argmax(dim=1) == labels).float().mean().item()


def train(name: str, epochs: int, learning_rate: float, weight_decay: float, seed: int) -> float:
    """Train model `name` of conf/model from scratch, write its weights; returns the test top-1 in percent."""
    torch.set_num_threads(1)  # these layers are too small to share out
    torch.set_flush_denormal(True)  # a vanishing loss fills the optimizer with denormals, which are slow
    torch.manual_seed(seed)
    network: nn.Module = build(load_choice("model", name), "model").network()
    images, labels = digits("train")
    batches = -(-len(labels) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * batches)
    for epoch in range(epochs):
        network.train()
        total = 0.0
        for batch in torch.randperm(len(labels)).split(64):
            loss = functional.cross_entropy(network(moved_by_a_pixel(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        if (epoch + 1) % 20 == 0:
            print(f"{name}: epoch {epoch + 1} of {epochs}, loss {total / len(labels):.4f}")
    accuracy = top1(network, *digits("test"))
    WEIGHTS_DIR.mkdir(exist_ok=True)
    save_file(network.state_dict(), WEIGHTS_DIR / f"{name}.safetensors")
    print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters, test top-1 {accuracy:.2f} %")
    return accuracy


def train_digits_resnet() -> float:
    """Train and write the embedded residual network; its test top-1 in percent."""
    return train("digits_resnet", epochs=40, learning_rate=1e-2, weight_decay=0.01, seed=2)


def train_digits_vit() -> float:
    """Train and write the embedded vision transformer; its test top-1 in percent."""
    return train("digits_vit", epochs=50, learning_rate=5e-3, weight_decay=0.01, seed=2)


def train_topics_llama() -> object:
    """Train and write the embedded language model."""
    from experiments import train_topics

    return train_topics.train(WEIGHTS_DIR / "topics_llama.safetensors")


TRAINERS = {
    "digits_resnet": train_digits_resnet,
    "digits_vit": train_digits_vit,
    "topics_llama": train_topics_llama,
}


def main() -> None:
    """Train the models named on the command line, all where none is."""
    parser = argparse.ArgumentParser(
        description="Train embedded models and write their weights into the package."
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(TRAINERS)}; default: all")
    models = parser.parse_args().models
    unknown = [name for name in models if name not in TRAINERS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; choose from {', '.join(TRAINERS)}")
    for name in models or TRAINERS:
        TRAINERS[name]()


if __name__ == "__main__":
    main()
