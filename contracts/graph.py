"""How the contracts depend on each other, as text and as Mermaid."""

from collections.abc import Mapping, Sequence


def text(graph: Mapping[str, Sequence[str]]) -> str:
    """One contract a line, each after those that it depends on where there is no cycle."""
    width = max(map(len, graph), default=0)
    return "\n".join(f"{name:{width}}{_arrow(graph[name])}".rstrip() for name in ordered(graph))


def mermaid(graph: Mapping[str, Sequence[str]]) -> str:
    """A Mermaid flowchart; an arrow points from a contract to one that it depends on."""
    lines = ["flowchart TD"]
    for name in ordered(graph):
        lines.append(f"    {name}")
        lines += [f"    {name} --> {other}" for other in graph[name]]
    return "\n".join(lines)


def ordered(graph: Mapping[str, Sequence[str]]) -> list[str]:
    """The contracts, dependencies first, by name among equals; those of a cycle come last, by name."""
    order: list[str] = []
    waiting = sorted(graph)
    while waiting:
        ready = [name for name in waiting if all(other in order or other not in graph for other in graph[name])]
        order += ready or waiting
        waiting = [name for name in waiting if name not in order]
    return order


def _arrow(depends: Sequence[str]) -> str:
    return f"  -> {', '.join(depends)}" if depends else ""
