"""The tables of bench/README.md, each from a file in bench/results: `python -m bench.plot --readme` writes them."""

import itertools
import json
import re

from bench.tables import RESULTS, cosine, share, table

BLOCK = re.compile(r"<!-- ([\w-]+): by python -m bench\.plot --readme -->.*?<!-- end -->", re.DOTALL)
TARGET = 0.99
CLIPS = {  # what the clips show that are measured at several sizes or stand for a kind of footage
    "degirum_Traffic": "motorway",
    "degirum_aerial_crossing_pedestrians_bikes_cropped": "drone",
    "intel_bottle-detection": "indoor table, hands placing bottles",
    "intel_one-by-one-person-detection": "indoor surveillance",
    "sam2_05_default_juggle": "juggler, tripod",
    "udacity_solidWhiteRight": "dashcam",
}
LLM_THRESHOLD = 0.9
GATES = ("refreshed", "previous", "ema", "dual")


def load(name):
    return json.loads(RESULTS.joinpath(f"{name}.json").read_text())


def of(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def values(rows, name):
    """What a column holds, each once, in the order of the rows."""
    return list(dict.fromkeys(row[name] for row in rows))


def clip():
    """Speed-ups of a clip in one call; in brackets, those of a clip without a name."""
    rows = load("clip")["rows"]
    lengths = values(rows, "frames")
    body = []
    for model, dtype, skipped in itertools.product(*(values(rows, name) for name in ("model", "dtype", "skipped"))):
        found = {row["frames"]: row for row in of(rows, model=model, dtype=dtype, skipped=skipped)}
        cells = [f"{found[length]['going_on_speedup']:.1f}x" for length in lengths]
        with_key_frame = [found[length].get("with_key_frame_speedup") for length in lengths]
        cells = [
            cell if speed is None else f"{cell} ({speed:.1f}x)"
            for cell, speed in zip(cells, with_key_frame, strict=True)
        ]
        body.append([model, dtype, f"{skipped:.0%}", *cells])
    return table(["model", "dtype", "skipped", *(f"T = {length}" for length in lengths)], body)


def peers():
    """How many times as fast as each method NeuroFlow's E is, at `TARGET`, by clip and size."""
    columns, names = {}, []
    for size in (224, 448):
        rows = load(f"studies/peers-{size}")["rows"]
        for name in values(rows, "clip"):
            own = [row for row in of(rows, clip=name) if row["target"] in (None, TARGET)]
            ours = next(row["speed"] for row in own if row["peer"] == "NeuroFlow E")
            title = CLIPS[name.removesuffix(".mp4")].partition(",")[0]
            columns[f"{title}, {size} px"] = {row["peer"]: (ours, row) for row in own}
            names += [row["peer"] for row in own if row["peer"] not in (*names, "NeuroFlow E")]

    def cell(ours, row):
        return f"{row['ours_is'] or ours:.1f}" + ("" if row["reached"] else " (short of it)")

    body = [[name, *(cell(*column[name]) for column in columns.values())] for name in names]
    return table(["method", *columns], body)


def clips():
    """The default settings on every real clip."""
    rows = of(load("studies/clips-224")["rows"], asked=None)
    body = [
        [
            row["clip"] + (f" ({CLIPS[row['clip']]})" if row["clip"] in CLIPS else ""),
            f"{row['key_frames']} of {row['frames']}",
            share(row["skipped"]),
            cosine(row["cosine_mean"]),
            cosine(row["cosine_p5"]),
            f"{row['speed']:.2f}x",
        ]
        for row in sorted(rows, key=lambda row: -row["skipped"])
    ]
    return table(["clip", "key frames", "patches skipped", "mean cosine", "5th percentile", "speed"], body)


def motion():
    """F1 of each method as a motion mask, alone and with the patches around."""
    best = {}
    for row in load("studies/highway")["rows"]:
        key = row["method"], row["signal"], row["around"]
        if key not in best or row["f1_chosen_on"] > best[key]["f1_chosen_on"]:
            best[key] = row
    found = {}
    for (method, signal, around), row in best.items():
        name = f"gate, {signal} against {method}" if method in GATES else method
        found.setdefault(name, {})[around] = row["f1"]
    body = [
        [name, f"{scores[False]:.3f}", f"{scores[True]:.3f}"]
        for name, scores in sorted(found.items(), key=lambda each: -max(each[1].values()))
    ]
    return table(["method", "alone", "with those around"], body)


def distill():
    """Each architecture before and after distillation, at 90 % skipped."""
    body = []
    for arch in "CBE":
        result = load(f"studies/distill-{arch}")
        scenes, outside = result["settings"]["outside scenes"], result["settings"]["outside"]
        own = {row["system"]: row for row in of(result["rows"], group="all", asked=0.9)}
        cells = [f"{own[system]['cosine_mean']:.3f}" for system in own]
        cells += [share(own[system]["top1"]) for system in own]
        cells += [share(outside[system][0] / scenes) for system in own]
        body.append([arch, *cells])
    return table(
        ["", "cosine to dense", "distilled", "top-1", "distilled", "top-1 under moving cameras", "distilled"], body
    )


def llm():
    """What the bypass costs by pair of layers and text, at `LLM_THRESHOLD`."""
    body = []
    for row in of(load("studies/llm")["rows"]["small"], threshold=LLM_THRESHOLD):
        pair = f"{row['gate_layer']}>{','.join(map(str, row['cache_layers']))}"
        pair += ", MLP" if row["target"] == "mlp" else ""
        for text, found in row["texts"].items():
            perplexity = [f"{found[name]:.3f}" for name in ("dense_perplexity", "perplexity")]
            body.append([pair, text, share(found["rate"]), *perplexity, share(found["drift"])])
    return table(["gate>cached", "text", "repeated", "perplexity, dense", "bypassed", "drift"], body)


TABLES = {each.__name__: each for each in (clip, peers, clips, motion, distill, llm)}


def with_tables(readme, tables):
    """The README's text with each of `tables` {name: Markdown} in the block of its name.

    Raises:
        ValueError: the text does not have one block for each of them.
    """
    names = [block[1] for block in BLOCK.finditer(readme)]
    if sorted(names) != sorted(tables):
        raise ValueError(
            f"bench/README.md needs the blocks {', '.join(sorted(tables))}, once each; it has {', '.join(names)}"
        )

    def filled(block):
        return f"<!-- {block[1]}: by python -m bench.plot --readme -->\n\n{tables[block[1]]}\n\n<!-- end -->"

    return BLOCK.sub(filled, readme)
