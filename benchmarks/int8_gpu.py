"""Time integer products in both directions of a frozen layer beside bfloat16 products, on a GPU.

    python benchmarks/int8_gpu.py

For W (out, in) of BERT-base's shapes, "bfloat16" computes x Wᵀ and, for the gradient g, g W. "int8" rounds the rows of
x and g to integers, each with a scale t = max |x| / 127, multiplies them by the integers of W with `torch._int_mm`, and
multiplies by both scales. For g it has a copy of W with one scale per column. "int8, fused" does the same through
torch.compile, in fewer passes over memory. "int8, products only" neither rounds nor scales.

The ways take turns, first launched kernel by kernel, then as CUDA graphs, without gaps. Print how many times as fast
as bfloat16 each way is: the median of the rounds with its quartiles.
"""

import statistics

import torch
from contenders import RESULTS, about, ratio, save

SHAPES = [(768, 768), (3072, 768), (768, 3072)]  # (out, in)
ROUNDS, SETS = 15, 16  # each turn goes through 16 sets of tensors, more than the GPU's cache holds


def round_rows(x):
    """Return X, int8 (rows, n), and t, float32 (rows, 1), with x ≈ t · X."""
    t = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)  # (rows, 1)
    return (x / t).round().to(torch.int8), t


def multiply(x, codes, scale):
    """Return x Wᵀ, bfloat16 (rows, out), for int8 codes (out, in) with one scale per row."""
    X, t = round_rows(x)
    return (torch._int_mm(X, codes.T) * t * scale.T).to(x.dtype)


def make_set(rows, out, width):
    x, g, W = (torch.randn(shape, device="cuda").bfloat16() for shape in ((rows, width), (rows, out), (out, width)))
    return x, g, W, round_rows(x)[0], round_rows(g)[0], round_rows(W), round_rows(W.T.contiguous())


def make_ways(first_set, fused):
    """Return {name: a function of a set that computes both directions}. Check the rounded ones on the first set."""
    ways = {
        "bfloat16": lambda x, g, W, X, G, Q, P: (x @ W.T, g @ W),
        "int8": lambda x, g, W, X, G, Q, P: (multiply(x, *Q), multiply(g, *P)),
        "int8, fused": lambda x, g, W, X, G, Q, P: (fused(x, *Q), fused(g, *P)),
        "int8, products only": lambda x, g, W, X, G, Q, P: (torch._int_mm(X, Q[0].T), torch._int_mm(G, P[0].T)),
    }
    for name in ("int8", "int8, fused"):
        for found, exact in zip(ways[name](*first_set), ways["bfloat16"](*first_set), strict=True):
            assert (found.float() - exact.float()).norm() < 0.03 * exact.float().norm(), name
    return ways


def through(way, sets):
    return lambda: [way(*tensors) for tensors in sets]


def measure(calls):
    """Return {name: [sets per second, by round]}, without two warm-up rounds."""
    rates = {name: [] for name in calls}
    for i in range(ROUNDS + 2):
        for name in list(calls) if i % 2 else reversed(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            rates[name].append(1000 * SETS / start.elapsed_time(end))
    return {name: values[2:] for name, values in rates.items()}


results = []
for (out, width), rows in ((shape, rows) for shape in SHAPES for rows in (512, 2048, 8192)):
    torch.compiler.reset()
    sets, fused = [make_set(rows, out, width) for _ in range(SETS)], torch.compile(multiply, dynamic=False)
    calls = {name: through(way, sets) for name, way in make_ways(sets[0], fused).items()}
    rates = {"kernel by kernel": measure(calls)}
    graphs = {name: torch.cuda.CUDAGraph() for name in calls}
    for name, graph in graphs.items():
        with torch.cuda.graph(graph):
            calls[name]()
    rates["as a graph"] = measure({name: graph.replay for name, graph in graphs.items()})
    for launched, found in rates.items():
        times = {name: round(1000 / statistics.median(values), 5) for name, values in found.items()}
        ratios = {name: [round(r, 3) for r in ratio(found, name, "bfloat16")] for name in list(calls)[1:]}
        line = "; ".join("{} {:.2f} ({:.2f} to {:.2f})".format(name, *r) for name, r in ratios.items())
        print(f"{out} x {width}, {rows} rows, {launched}: {times['bfloat16']:.4f} ms; {line}", flush=True)
        results.append({"out": out, "in": width, "rows": rows, "launched": launched, "milliseconds": times})
        results[-1]["times as fast as bfloat16"] = ratios
save(RESULTS / "int8-gpu.json", {"part": "int8 products on a GPU", "rounds": ROUNDS, "found": results} | about())
