"""What a traced run is to save: which stages, of which layers, positions and experts, and where."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.model.stages import STAGES, WHOLE_MODEL, Key, keys

ALIASES = {"layer_output": "post_ffn_residual"}
"""Other names of stages."""

EXPERT_STAGES = tuple(stage.name for stage in STAGES if stage.name.startswith("moe_expert_"))
"""Stages with a row for every (position, rank), of which a selection of experts keeps some."""

_PER_LAYER = {stage.name: stage.per_layer for stage in STAGES}


@dataclass(frozen=True)
class SaveTensorPlan:
    """A selection; every part is in canonical order and free of repeats, None selects all.

    Raises InvalidInput for a name there is not, an empty selection, and numbers that are negative."""

    stages: tuple[str, ...]  # names of model.stages
    layers: tuple[int, ...]  # for the stages of layers; those of the whole model are saved whatever it holds
    positions: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None  # of the moe_expert_ stages; the others are saved whole
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        require(len(self.stages) > 0, f"no stage to save; stages: {_names()}")
        for name in self.stages:
            require(name in _PER_LAYER, f"unknown stage {name!r}; stages: {_names()}")
        needs_layers = any(_PER_LAYER[name] for name in self.stages)
        require(not needs_layers or len(self.layers) > 0, "no layer to save stages of")
        for what, numbers in (("layer", self.layers), ("position", self.positions), ("expert", self.experts)):
            require(numbers is None or what == "layer" or len(numbers) > 0, f"no {what} to save")
            bad = next((n for n in numbers or () if n < 0), None)
            require(bad is None, f"{what} {bad} is negative")
        in_order = [name for name in _PER_LAYER if name in self.stages]
        object.__setattr__(self, "stages", tuple(in_order))
        for field in ("layers", "positions", "experts"):
            numbers = getattr(self, field)
            if numbers is not None:
                object.__setattr__(self, field, tuple(sorted(set(numbers))))

    @classmethod
    def parse(
        cls,
        stages: str,
        layers: str = "all",
        positions: str | None = None,
        experts: str | None = None,
        *,
        n_layers: int,
        n_positions: int,
        n_experts: int,
        output_dir: Path | None = None,
    ) -> "SaveTensorPlan":
        """Read what a user wrote, for a model and prompt of these sizes.

        Stages: `all` or names between commas, in any case, with spaces. Layers, positions and experts: `all`, or
        numbers and ranges between commas, `0..4` without its end; positions also `last`. Raises InvalidInput that
        names the value."""
        return cls(
            parse_stages(stages),
            parse_numbers(layers, "layer", n_layers),
            None if positions is None else parse_numbers(positions, "position", n_positions),
            None if experts is None else parse_numbers(experts, "expert", n_experts),
            output_dir,
        )

    def wants(self, stage: str, layer: int) -> bool:
        """Whether to save `stage` of `layer`."""
        return stage in self.stages and (layer == WHOLE_MODEL or layer in self.layers)

    def selected(self) -> list[Key]:
        """Every (stage, layer) to save, in canonical order."""
        n_layers = max(self.layers, default=-1) + 1
        return [key for key in keys(n_layers) if self.wants(*key)]

    def to_dict(self) -> dict[str, object]:
        """The selection as JSON has it; null is all."""
        parts = {name: getattr(self, name) for name in ("stages", "layers", "positions", "experts")}
        return {name: None if part is None else list(part) for name, part in parts.items()}


def parse_stages(text: str) -> tuple[str, ...]:
    """Canonical names of the stages in `text`; raises InvalidInput that lists the names there are."""
    words = [word.strip().lower() for word in text.split(",")]
    if words == ["all"]:
        return tuple(_PER_LAYER)
    for word in words:
        require(word != "", f"stages {text!r} hold an empty name; stages: {_names()}")
        require(word != "all", f"stages {text!r}: 'all' stands alone")
    named = [ALIASES.get(word, word) for word in words]
    unknown = next((word for word in named if word not in _PER_LAYER), None)
    require(unknown is None, f"unknown stage {unknown!r}; stages: {_names()}")
    return tuple(dict.fromkeys(named))


def parse_numbers(text: str, what: str, count: int) -> tuple[int, ...]:
    """The numbers that `text` selects of 0..count-1, ascending; `what` is their name in errors."""
    require(count > 0, f"there is no {what} to select")
    if text.strip().lower() == "all":
        return tuple(range(count))
    special = {"last": count - 1} if what == "position" else {}
    return tuple(
        sorted({n for word in text.split(",") for n in _range(word.strip().lower(), text, what, count, special)})
    )


def _range(word: str, text: str, what: str, count: int, special: dict[str, int]) -> Iterator[int]:
    number: Callable[[str], int | None] = lambda s: special.get(s, int(s) if s.isascii() and s.isdigit() else None)  # noqa: E731
    first, dots, end = word.partition("..")
    low, high = number(first), number(end) if dots else None
    if low is None or (dots and high is None):
        words = (
            "a number, a range such as 0..4, 'last' or 'all'" if special else "a number, a range such as 0..4, or 'all'"
        )
        raise InvalidInput(f"{what}s {text!r}: {word!r} is not {words}")
    high = low + 1 if high is None else high
    require(low < high, f"{what}s {text!r}: the range {word} is empty; its end is not part of it")
    require(high <= count, f"{what}s {text!r}: {word} reaches {what} {high - 1}, the last is {count - 1}")
    yield from range(low, high)


def _names() -> str:
    return ", ".join(_PER_LAYER)
