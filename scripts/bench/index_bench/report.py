"""How results are shown: figures per contestant, a table, plots, and where they were made."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from scripts.bench.index_bench.measure import Result

Figures = dict[str, Any]

COLUMNS = (  # key, title, format
    ("recall", "recall@100", "{:.3f}"),
    ("mass_mean", "mass", "{:.4f}"),
    ("mass_p1", "mass p1", "{:.3f}"),
    ("mass_worst", "mass worst", "{:.3f}"),
    ("error_mean", "out err", "{:.4f}"),
    ("error_worst", "err worst", "{:.3f}"),
    ("share_scored", "scored", "{:.2%}"),
    ("retrieved_per_query", "retrieved", "{:.0f}"),
    ("kilobytes_read_per_query", "KB/query", "{:.0f}"),
    ("us_per_query", "µs/query", "{:.1f}"),
    ("layer_us_p50", "µs/layer", "{:.0f}"),
    ("layer_us_p99", "p99", "{:.0f}"),
    ("layer_cpu_us", "CPU µs", "{:.0f}"),
    ("times_flat", "× flat", "{:.1f}"),
    ("times_sdpa", "× sdpa", "{:.1f}"),
    ("times_ivf", "× ivf=", "{:.1f}"),
    ("times_faiss_rabitq", "× faiss", "{:.1f}"),
    ("build_seconds_per_layer", "build s", "{:.2f}"),
    ("bytes_of_kv", "bytes/KV", "{:.1%}"),
)


def figures(result: Result, num_q_heads: int, kv_bytes: int) -> Figures:
    """One contestant's row; None where it has no such figure."""
    found: Figures = {"name": result.name}
    if result.recall:
        found["recall"] = float(torch.cat(result.recall).mean())
    if result.mass:
        mass, cost = torch.cat(result.mass), result.cost
        found |= {
            "mass_mean": float(mass.mean()), "mass_p1": float(mass.quantile(0.01)), "mass_worst": float(mass.min()),
            "share_scored": cost.num_scored / max(1, result.num_visible),
            "retrieved_per_query": cost.num_retrieved / max(1, cost.num_queries),
            "kilobytes_read_per_query": cost.bytes_read / max(1, cost.num_queries) / 1024,
        }  # fmt: skip
    error = torch.cat(result.error)
    times = torch.tensor(result.step_seconds, dtype=torch.float64) * 1e6
    p50, p99 = float(times.quantile(0.5)), float(times.quantile(0.99))
    found |= {
        "num_queries": len(error), "error_mean": float(error.mean()), "error_worst": float(error.max()),
        "layer_us_p50": p50, "layer_us_p99": p99,
        "layer_cpu_us": sum(result.cpu_seconds) / max(1, len(result.cpu_seconds)) * 1e6,
        "us_per_query": p50 / num_q_heads,
        "build_seconds_per_layer": sum(result.build_seconds) / len(result.build_seconds),
        "bytes_of_kv": sum(result.nbytes) / len(result.nbytes) / kv_bytes,
    }  # fmt: skip
    return found


def add_ratios(rows: list[Figures]) -> None:
    """How many times faster than `flat` of the same path, than `sdpa`, and than the fastest `ivf` of no less mean
    mass (the best ivf there is where none reaches it) a layer's step is. The core's rows are held against the core's
    own exact scan where that ran."""
    by_name = {row["name"]: row for row in rows}
    ivfs = [row for row in rows if row["name"].startswith("ivf")]
    for row in rows:
        is_core = row["name"].startswith("core") and "core:bits=0" in by_name
        for key, base in (
            ("times_flat", "core:bits=0" if is_core else "flat"),
            ("times_sdpa", "sdpa"),
            ("times_faiss_rabitq", "faiss_rabitq"),
        ):
            if base in by_name:
                row[key] = by_name[base]["layer_us_p50"] / row["layer_us_p50"]
        if ivfs and "mass_mean" in row:
            equal = [ivf for ivf in ivfs if ivf["mass_mean"] >= row["mass_mean"]]
            rival = min(equal, key=_time) if equal else max(ivfs, key=lambda ivf: float(ivf["mass_mean"]))
            row["times_ivf"] = rival["layer_us_p50"] / row["layer_us_p50"]


def relations(rows: list[Figures]) -> list[str]:
    """In words what the whole-layer call, `core`, is against its rivals, and `roar` against its claim."""
    by_name, lines = {row["name"]: row for row in rows}, [""]
    for name in ("core", "rabitq"):
        row = by_name.get(name)
        if row is None:
            continue
        rivals = {
            "times_flat": "exact scan of the same path and threads", "times_ivf": "ivf at no less mean mass",
            "times_sdpa": "torch's SDPA over all keys", "times_faiss_rabitq": "faiss's IndexRaBitQFastScan",
        }  # fmt: skip
        shown = [f"{row[key]:.1f} × {rival}" for key, rival in rivals.items() if key in row]
        lines.append(
            f"{name}: mass mean {row['mass_mean']:.4f}, worst {row['mass_worst']:.3f}, output error mean "
            f"{row['error_mean']:.4f}; speed " + ", ".join(shown)
        )
    if "roar" in by_name:
        row = by_name["roar"]
        lines.append(
            f"roar: recall@100 {row['recall']:.3f} at {row['share_scored']:.2%} of the keys scored, worst captured "
            f"mass {row['mass_worst']:.3f}"
        )
    return lines


def _time(row: Figures) -> float:
    return float(row["layer_us_p50"])


def table(title: str, rows: list[Figures]) -> str:
    """A Markdown table with its title."""
    lines = [f"\n## {title}\n", "| kind | " + " | ".join(name for _, name, _ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for row in rows:
        cells = [form.format(row[key]) if key in row else "–" for key, _, form in COLUMNS]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(tables: dict[str, list[Figures]], folder: Path) -> list[Path]:
    """Time against lost mass, and recall against keys scored, one panel per set. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(2, len(tables), figsize=(7 * len(tables), 10), squeeze=False)
    for column, (name, rows) in enumerate(tables.items()):
        shown = [row for row in rows if "mass_mean" in row]
        above, below = axes[0][column], axes[1][column]
        for row in shown:
            label = row["name"]
            lost = [max(1e-6, 1 - row[key]) for key in ("mass_mean", "mass_worst")]
            line = above.plot([row["layer_us_p50"]] * 2, lost, "-", alpha=0.6)[0]
            above.plot(row["layer_us_p50"], lost[0], "o", color=line.get_color(), label=label)
            above.plot(row["layer_us_p50"], lost[1], "v", color=line.get_color())
            if "recall" in row:
                below.plot(max(1e-5, row["share_scored"]), row["recall"], "o", color=line.get_color(), label=label)
        above.set(
            title=f"{name}: softmax mass lost (dot: mean, triangle: worst query)",
            xlabel="µs per layer",
            xscale="log",
            yscale="log",
        )
        below.set(title=f"{name}: recall@100", xlabel="share of keys scored exactly", xscale="log")
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    path = folder / "index.png"
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return [path]


def commit() -> str:
    """The checkout's commit, with a plus sign if it has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if dirty else "")


def hardware(num_threads: int) -> Figures:
    """Processor, cores, memory, threads used and the versions that matter."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [x.partition(":")[2].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    found: Figures = {
        "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": num_threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": os.getloadavg()[0], "torch": torch.__version__,
    }  # fmt: skip
    try:
        from retrieval import _core
    except ImportError:
        return found
    return found | {"simd": _core.simd_level()}
