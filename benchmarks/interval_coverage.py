"""How often a 95 % interval of the interquartile mean holds the truth, as Markdown.

    python -m benchmarks.interval_coverage      # about 14 minutes on one core

Scores are simulated so that the truth is known: a latent normal value, of a seed effect, an
instance effect and noise, becomes a uniform one and then a score of the wanted distribution. Its
interquartile mean is an integral over quantiles. Zeros, as from divergence, are the lowest
latent values: with a seed effect they gather in bad seeds. Candidates:

- percentile: the plain interval.
- expanded: more extreme percentiles, after Hesterberg (2015), n the fewer of seeds and instances.
- BCa: corrected for bias and acceleration, after Efron (1987).
- bootstrap-t: with the standard error of a trimmed mean (Tukey and McLaughlin 1963), for
  independent units only.
- Satterthwaite: widened, by Student's quantile at Satterthwaite's degrees of freedom.
- used: `agents.resampling.widened`.

Behind each share stands its Monte-Carlo standard error in units of the last digit; `width` is the
mean width of the interval in use over that of the percentile interval.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import stats

from agents.benchmark.statistics import (
    aggregate_iqm,
    iqm_difference,
    optimality_gap,
    probability_of_improvement,
)
from agents.resampling import crossed, draw_counts, leave_one_out, weighted_iqm, widened
from agents.statistics import interquartile_mean
from benchmarks.timing import write_json

MEAN, SPREAD, LEAD = 0.6, 0.1, 0.05  # of normal scores; LEAD is the better agent's
LEVELS = (0.25, 0.5, 0.55, 0.6)  # mean scores of four kinds of instance
UNITS = (5, 10, 20, 40, 80)
SEEDS, INSTANCES = (3, 5, 10, 20), (10, 20, 40)
EFFECTS = {"weak": (0.1, 0.3), "strong": (0.5, 0.2)}  # variance shares of seeds and instances
BOUNDS = (0.0, 1.0)
NORMAL = float(stats.norm.ppf(0.975))
Ends = dict[str, tuple[float, float]]
Quantiles = Callable[[np.ndarray], np.ndarray]


def normal(u: np.ndarray) -> np.ndarray:
    """Symmetric."""
    return np.asarray(np.clip(MEAN + SPREAD * stats.norm.ppf(u), 0, 1))


def skewed(u: np.ndarray) -> np.ndarray:
    """Beta(5, 1): gathered at 1, with a long way down."""
    return np.asarray(u ** (1 / 5))


def with_zeros(share: float) -> Quantiles:
    """Normal, but for a share of zeros."""

    def quantiles(u: np.ndarray) -> np.ndarray:
        rest = np.clip((u - share) / (1 - share), 1e-12, 1 - 1e-12)
        return np.where(u < share, 0.0, normal(rest))

    return quantiles


SHAPES: dict[str, Quantiles] = {
    "normal": normal,
    "skewed": skewed,
    "10 % zeros": with_zeros(0.1),
    "25 % zeros": with_zeros(0.25),
}


def true_iqm(quantiles: Quantiles) -> float:
    """Mean of the quantiles from 1/4 to 3/4."""
    points = 100_000
    return float(quantiles(0.25 + (np.arange(points) + 0.5) / (2 * points)).mean())


def latent(
    shape: tuple[int, int], effects: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """Standard normal values, (S, I), of which seeds and instances have these variance shares."""
    by_seed = generator.normal(size=(shape[0], 1)) * np.sqrt(effects[0])
    by_instance = generator.normal(size=(1, shape[1])) * np.sqrt(effects[1])
    return np.asarray(
        by_seed + by_instance + generator.normal(size=shape) * np.sqrt(1 - sum(effects))
    )


def candidates(units: np.ndarray, resamples: int, generator: np.random.Generator) -> Ends:
    """Ends of every candidate's interval for the IQM of units (S, I), from the same resamples."""
    flat = np.sort(units, axis=None) if min(units.shape) == 1 else units.reshape(-1)
    counts = draw_counts(units.shape, resamples, generator)
    value = interquartile_mean(flat)
    draws = weighted_iqm(flat, crossed(*counts))
    without = leave_one_out(lambda *kept: weighted_iqm(flat, crossed(*kept)), units.shape)
    low, high = np.quantile(draws, [0.025, 0.975])
    ends = {"percentile": (low, high)}

    n = min(size for size in units.shape if size > 1)
    level = stats.norm.cdf(-stats.t.ppf(0.975, n - 1) * np.sqrt(n / (n - 1)))
    ends["expanded"] = tuple(np.quantile(draws, [level, 1 - level]))
    ends["BCa"] = tuple(np.quantile(draws, _bca_levels(float(value), draws, without)))
    if min(units.shape) == 1:
        weights = counts[int(units.shape[0] == 1)]
        errors = np.maximum(_trimmed_errors(flat, weights), 1e-9)
        error = _trimmed_errors(flat, np.ones((1, flat.size), dtype=int))[0]
        pivots = np.quantile((draws - value) / errors, [0.975, 0.025])
        ends["bootstrap-t"] = (value - pivots[0] * error, value - pivots[1] * error)
    sizes = np.array([len(deleted) for deleted in without])
    variances = (sizes - 1) * [np.var(deleted) for deleted in without]
    if variances.any():
        freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
        factor = stats.t.ppf(0.975, freedom) / NORMAL * np.sqrt(1 + 1 / freedom)
    else:
        factor = 1.0
    ends["Satterthwaite"] = (value - factor * (value - low), value + factor * (high - value))
    ends["used"] = widened(value, draws, without, BOUNDS)
    return {name: (float(lower), float(upper)) for name, (lower, upper) in ends.items()}


def _bca_levels(value: float, draws: np.ndarray, without: Sequence[np.ndarray]) -> np.ndarray:
    """Levels of the percentiles that BCa takes."""
    below = np.mean(draws < value) + np.mean(draws == value) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / len(draws), 1 - 1 / len(draws)))
    gaps = np.concatenate([deleted.mean() - deleted for deleted in without])
    squares = (gaps**2).sum()
    acceleration = (gaps**3).sum() / (6 * squares**1.5) if squares > 0 else 0.0
    shifted = bias + np.array([-NORMAL, NORMAL])
    return np.asarray(stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))


def _trimmed_errors(ordered: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Standard error of each resample's IQM, from its winsorised variance."""
    n = ordered.size
    cut = int(n * 0.25)
    upto = np.cumsum(weights, axis=1)
    lowest = ordered[(upto <= cut).sum(axis=1)]
    highest = ordered[(upto < n - cut).sum(axis=1)]
    drawn = np.clip(ordered, lowest[:, None], highest[:, None])
    mean = (weights * drawn).sum(axis=1, keepdims=True) / n
    variance = (weights * (drawn - mean) ** 2).sum(axis=1) / (n - 1)
    return np.asarray(np.sqrt(variance * n) / (n - 2 * cut))


def coverage(
    quantiles: Quantiles,
    shape: tuple[int, int],
    effects: tuple[float, float],
    repeats: int,
    resamples: int,
    generator: np.random.Generator,
) -> tuple[dict[str, float], float]:
    """Share of simulated benchmarks whose interval holds the truth, and the relative width."""
    truth = true_iqm(quantiles)
    held: dict[str, int] = {}
    widths = np.zeros(2)
    for _ in range(repeats):
        uniform = stats.norm.cdf(latent(shape, effects, generator))
        found = candidates(quantiles(uniform), resamples, generator)
        for name, (low, high) in found.items():
            held[name] = held.get(name, 0) + (low <= truth <= high)
        widths += [found[name][1] - found[name][0] for name in ("used", "percentile")]
    return {name: count / repeats for name, count in held.items()}, float(widths[0] / widths[1])


def others(seeds: int, repeats: int, generator: np.random.Generator) -> Iterator[tuple[str, float]]:
    """Coverage of the other statistics' intervals, two normal agents on 20 instances."""
    of_seed, of_instance = EFFECTS["strong"]
    chance = stats.norm.cdf(LEAD / SPREAD / np.sqrt(2 * (1 - of_instance)))
    truths = {"IQM": MEAN, "difference": LEAD, "improvement": chance, "gap": 1 - MEAN}
    held = dict.fromkeys(truths, 0)
    for _ in range(repeats):
        common = generator.normal(size=(1, 20)) * np.sqrt(of_instance)
        own = np.sqrt(1 - of_instance)
        left, right = (
            common + own * latent((seeds, 20), (of_seed / own**2, 0.0), generator) for _ in "xy"
        )
        ours = np.clip(MEAN + LEAD + SPREAD * left, 0, 1)
        theirs = np.clip(MEAN + SPREAD * right, 0, 1)
        found = {
            "IQM": aggregate_iqm(theirs, generator),
            "difference": iqm_difference(ours, theirs, generator),
            "improvement": probability_of_improvement(ours, theirs, generator),
            "gap": optimality_gap(theirs, generator),
        }
        for name, interval in found.items():
            held[name] += interval.low <= truths[name] <= interval.high
    yield from ((name, count / repeats) for name, count in held.items())


def of_kinds(
    shape: tuple[int, int], repeats: int, generator: np.random.Generator
) -> tuple[dict[str, float], float]:
    """Coverage where instances are of the kinds of `LEVELS`, (seeds, instances of each kind).

    Returns:
        By how resamples are drawn, and the width with as many of each kind over that without.
    """
    seeds, each = shape
    levels = np.repeat(LEVELS, each)
    normal_scores = stats.norm.ppf((np.arange(25_000) + 0.5) / 25_000) * SPREAD
    everything = np.clip(np.add.outer(LEVELS, normal_scores), 0, 1)
    truth = interquartile_mean(everything.reshape(-1))
    strata = np.repeat(np.arange(len(LEVELS)), each)
    held, widths = np.zeros(2), np.zeros(2)
    for _ in range(repeats):
        values = latent((seeds, len(levels)), EFFECTS["strong"], generator)
        scores = np.clip(levels + SPREAD * values, 0, 1)
        for place, of in enumerate((None, strata)):
            found = aggregate_iqm(scores, generator, of)
            held[place] += found.low <= truth <= found.high
            widths[place] += found.high - found.low
    shares = dict(zip(("all alike", "as many of each kind"), held / repeats, strict=True))
    return shares, float(widths[1] / widths[0])


def cell(share: float, repeats: int) -> str:
    """Per cent with the standard error of the last digit in brackets, as in 94.8(5)."""
    error = np.sqrt(share * (1 - share) / repeats)
    return f"{100 * share:.1f}({1000 * error:.0f})"


def main() -> None:
    """Print tables: independent units, seeds x instances, other statistics, several kinds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000, help="of independent units")
    parser.add_argument("--crossed-repeats", type=int, default=400, help="of seeds x instances")
    parser.add_argument("--resamples", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    began = time.process_time()
    raw: dict[str, dict[str, float]] = {}
    repeats = arguments.repeats
    names = ["percentile", "expanded", "BCa", "bootstrap-t", "Satterthwaite", "used"]
    print(f"Independent units, {repeats} repeats, coverage in per cent\n")
    _print_row(["scores", "units", *names, "width"], heading=True)
    for label, quantiles in SHAPES.items():
        for n in UNITS:
            found, width = coverage(
                quantiles, (n, 1), (0.0, 0.0), repeats, arguments.resamples, generator
            )
            _print_row([label, n, *(cell(found[name], repeats) for name in names), f"{width:.2f}"])
            raw[f"{label}, {n}"] = found
    repeats = arguments.crossed_repeats
    names.remove("bootstrap-t")
    print(f"\nSeeds x instances, {repeats} repeats, coverage in per cent\n")
    _print_row(["scores", "seed effect", "seeds", "instances", *names, "width"], heading=True)
    for label, quantiles in SHAPES.items():
        for strength, effects in EFFECTS.items():
            if strength == "weak" and quantiles is not normal:
                continue  # strong is the harder one
            for shape in ((s, i) for s in SEEDS for i in INSTANCES):
                found, width = coverage(
                    quantiles, shape, effects, repeats, arguments.resamples, generator
                )
                shares = [cell(found[name], repeats) for name in names]
                _print_row([label, strength, *shape, *shares, f"{width:.2f}"])
                raw[f"{label}, {strength}, {shape[0]} x {shape[1]}"] = found
    print(
        f"\nOther statistics, normal scores, strong seed effect, 20 instances, {repeats} repeats\n"
    )
    for index, seeds in enumerate(SEEDS):
        shares_of = dict(others(seeds, repeats, generator))
        if index == 0:
            _print_row(["seeds", *shares_of], heading=True)
        _print_row([seeds, *(cell(share, repeats) for share in shares_of.values())])
        raw[f"others, {seeds}"] = shares_of
    generator = np.random.default_rng(arguments.seed)  # whatever the tables before have drawn
    print(f"\nInstances of {len(LEVELS)} kinds, strong seed effect, {repeats} repeats\n")
    for index, (seeds, each) in enumerate((s, i) for s in SEEDS for i in (5, 10)):
        shares_of, width = of_kinds((seeds, each), repeats, generator)
        if index == 0:
            _print_row(["seeds", "instances of each kind", *shares_of, "width"], heading=True)
        shares = [cell(share, repeats) for share in shares_of.values()]
        _print_row([seeds, each, *shares, f"{width:.2f}"])
        raw[f"kinds, {seeds} x {each}"] = shares_of
    print(f"\n{time.process_time() - began:.0f} s of processor time")
    write_json(arguments.out, {"coverage": raw, "arguments": vars(arguments)})


def _print_row(cells: Sequence[object], heading: bool = False) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if heading:
        print("|---" * len(cells) + "|")


if __name__ == "__main__":
    main()
