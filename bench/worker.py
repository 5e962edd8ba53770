"""One revision's side of a comparison: times a benchmark whenever it is asked.

    python -m exactmoe.bench.worker PROFILE [SHARE]
    python -m exactmoe.bench.worker PROFILE --model MODEL.gguf

It reads names, a line each, and answers each with a line of JSON: {"name", "us", "equal", "digest"}, of a kernel with
the "method" of its clock, or {"name", "error"} for a benchmark it does not have. What a benchmark needs is made when it
is first asked for, and judged. After the name "renew", answered with {"name", "renewed"}, what it works on is made anew
when it is asked for again, in other memory. With a SHARE everything is slowed down by it, and the share that was
measured is in the answer as "planted". With a MODEL the names are those of its decode steps, and a time is that of a
token, of one run. It is never renewed."""

import json
import random
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from exactmoe.model.weights import Model

RENEW = "renew"


def serve(names: Iterable[str], answer: Callable[[str], dict[str, Any]], out: TextIO) -> None:
    """Answer every name with a line."""
    for line in names:
        name = line.strip()
        if name:
            out.write(json.dumps({"name": name, **answer(name)}) + "\n")
            out.flush()


def timer(profile: str, share: float | None = None) -> Callable[[str], dict[str, Any]]:
    """Answers for the benchmarks of this revision on this machine's CUDA device."""
    import torch

    from exactmoe.kernels.launch import resolve_device

    device = resolve_device("cuda")
    from exactmoe.bench.cases import benches
    from exactmoe.bench.clock import REPLAY_METHOD, enough, replay_us
    from exactmoe.bench.plant import Spins, planted, spins
    from exactmoe.bench.run import calls_of, judge
    from exactmoe.kernels.errors import InvalidInput

    table = benches(profile)
    # One at a time, or two revisions' weights fill the device.
    judged: dict[str, tuple[dict[str, Any], Any]] = {}
    ready: dict[str, tuple[Any, list[Callable[[], object]]]] = {}  # a graph, and what holds the memory it reads
    room: list[torch.Tensor] = []
    slow: dict[str, Spins] = {}  # found once: it takes seconds

    def answer(name: str) -> dict[str, Any]:
        if name == RENEW:
            ready.clear()
            room.clear()
            torch.cuda.empty_cache()
            return {"renewed": True}
        if name not in table:
            return {"error": f"this revision has no benchmark {name}"}
        if name not in judged:
            ready.clear()
            judged.clear()
            equal, digest = judge(table[name].case, device)
            judged[name] = {"equal": equal, "digest": digest}, table[name].case.on(device)
        said, args = judged[name]
        if name not in ready:
            # Something before it, or it would get the memory that it had.
            room[:] = [torch.empty(random.randrange(1, 64) << 21, dtype=torch.uint8, device=device)]
            work, graph = enough(list(calls_of(table[name], args)))
            if share is not None:
                try:
                    slow[name] = slow.get(name) or spins(work, share)
                except InvalidInput as error:
                    return {"error": str(error)}
                graph, said["planted"] = planted(work, slow[name])
            ready[name] = graph, work
        graph, work = ready[name]
        return {"us": replay_us(graph) / len(work) if said["equal"] else None, "method": REPLAY_METHOD, **said}

    return answer


def model_timer(profile: str, path: str) -> Callable[[str], dict[str, Any]]:
    """Answers for the decode steps of the model at `path` on this machine's CUDA device."""
    from exactmoe.kernels.launch import resolve_device

    device = resolve_device("cuda")
    from exactmoe.model.weights import load_model

    return of_steps(load_model(path, device, profile))


def of_steps(model: "Model") -> Callable[[str], dict[str, Any]]:
    """Answers for the decode steps of a model, judged as `exactmoe bench --model` does."""
    from exactmoe.bench.step import TOKENS, prepare, time_run
    from exactmoe.bench.whole import decode_rows, judge_decode

    table = decode_rows()
    ready: dict[str, tuple[dict[str, Any], Any]] = {}

    def answer(name: str) -> dict[str, Any]:
        if name == RENEW:
            return {"renewed": False}
        if name not in table:
            return {"error": f"this revision has no decode step {name}"}
        if name not in ready:
            ready.clear()  # a long context's cache fills the device
            sequence = prepare(model, table[name].tokens, TOKENS)
            equal, digest = judge_decode(model, sequence)
            ready[name] = {"equal": equal, "digest": digest}, sequence
        said, sequence = ready[name]
        return {"us": time_run(sequence) if said["equal"] else None, **said}

    return answer


def main(profile: str, *options: str) -> None:
    """Serve what the arguments of the command ask for."""
    model = options[:1] == ("--model",)
    serve(sys.stdin, model_timer(profile, *options[1:]) if model else timer(profile, *map(float, options)), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
