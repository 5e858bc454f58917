"""How things are called in tables and figures: models, metrics, methods and their families."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MISSING = "–"

# Baselines first, then by paper; tables and legends keep this order.
KNOWN_METHODS = (
    "rtn",
    "hqq",
    "awq",
    "gptq",
    "comq",
    "decoupleq",
    "ptnq",
    "ptnq_affine",
    "adaround",
    "brecq",
    "qdrop",
    "autoround",
    "gradient_ptq",
    "qft",
    "watersic",
)

WORDS = {
    "babyllama105": "BabyLLaMA (105 characters)",
    "cct": "CCT",
    "cifar": "CIFAR",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "deit": "DeiT",
    "gpt2": "GPT-2",
    "imagenet": "ImageNet",
    "llama": "LLaMA",
    "mcunet": "MCUNet",
    "mobilenet": "MobileNet",
    "mobilenetv2": "MobileNetV2",
    "opt": "OPT",
    "resnet": "ResNet",
    "smollm": "SmolLM",
    "squeezenet1_1": "SqueezeNet 1.1",
    "stories260k": "Stories 260K",
    "tinyllama": "TinyLLaMA",
    "vgg": "VGG",
    "vit": "ViT",
}


def model_title(name: str) -> str:
    """`cifar10_resnet20` → `CIFAR-10 ResNet-20`; an unknown word keeps its letters behind a capital."""
    if name in WORDS:
        return WORDS[name]
    return " ".join(_word(word) for word in name.split("_") if word) or name


def _word(word: str) -> str:
    if word in WORDS:
        return WORDS[word]
    stem = word.rstrip("0123456789")
    if stem in WORDS and stem != word:
        return f"{WORDS[stem]}-{word[len(stem) :]}"
    return word[:1].upper() + word[1:]


def method_family(label: str) -> str:
    """The known method that a label varies (`comq_release (sweeps=5)` → `comq`), else its bare name."""
    name = re.split(r" \(| · ", label, maxsplit=1)[0]
    families = [known for known in KNOWN_METHODS if re.match(rf"{known}(?![a-z0-9])", name)]
    return max(families, key=len, default=name)


def method_order(label: str) -> tuple[int, str, bool, str]:
    """Sort key of a method label: known families first, in their order, the bare name before its variants."""
    family = method_family(label)
    position = KNOWN_METHODS.index(family) if family in KNOWN_METHODS else len(KNOWN_METHODS)
    return position, family, label != family, label


def short_labels(labels: Iterable[str]) -> dict[str, str]:
    """What figures call each label: `comq (grid=ptnq, sweeps=5)` → `comq · ptnq, sweeps=5`.

    A value that is a word says what it is without its key. Labels that would then read alike stay.
    """
    wanted = list(dict.fromkeys(labels))
    short = {label: _short(label) for label in wanted}
    return {label: text if list(short.values()).count(text) == 1 else label for label, text in short.items()}


def _short(label: str) -> str:
    parts = re.fullmatch(r"(?P<name>[^(]+) \((?P<keys>.*)\)(?P<rest>.*)", label)
    if not parts:
        return label
    keys = [
        re.sub(r"^\S+=(?=[a-z_]+[a-z]\w*$)(?!true$|false$|null$|unset$)", "", key)
        for key in parts["keys"].split(", ")
    ]
    return f"{parts['name']} · {', '.join(keys)}{parts['rest']}"


def format_percent(value: float) -> str:
    """Two decimals; a number that is not finite by its name."""
    return f"{value:.2f}"


def format_perplexity(value: float) -> str:
    """Two decimals below 100, a whole number below 1000, two digits and a power of ten from there."""
    if not math.isfinite(value) or value < 99.995:
        return f"{value:.2f}"
    if value < 999.5:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class Metric:
    """A number that a record reports, its words, its direction and how it is written."""

    name: str
    title: str
    higher_is_better: bool
    format: Callable[[float], str]

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", "top-1, %", True, format_percent),
        Metric("top5", "top-5, %", True, format_percent),
        Metric("perplexity", "perplexity", False, format_perplexity),
    )
}
