"""Measure the peak memory of the build, and its rate, as the data set grows.

    python benchmarks/build_memory.py [--count 2000] [--times 10] [--size 160x120] [--workers 1] [--repeats 3]

Builds from drawn scenes, and from the same scenes under ten names each, in turns. The scenes are small, because what
could grow with their number (listings, shuffles, side inputs, statistics, the manifest) does not depend on their size.
Peak memory is the largest sum of the resident sets of the command and its processes, sampled 20 times a second. Rates
are given without start-up, which is the time for one image. Prints a table, and as the last line JSON.
"""

import argparse
import json
import statistics
from pathlib import Path

from measure import (
    Run,
    add_common_flags,
    build,
    cached_scenes,
    circumstances,
    repeated_scenes,
    run,
    size_text,
    source_flags,
    spread,
    summary,
)

from collavo.cli import size_wh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="scenes to draw")
    parser.add_argument("--times", type=int, default=10, help="names of each scene in the larger data set")
    parser.add_argument("--size", type=size_wh, default="160x120")
    parser.add_argument("--workers", type=int, default=1, help="worker processes; 1 runs in one process")
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    add_common_flags(parser)
    parser.set_defaults(repeats=3)
    args = parser.parse_args()

    few, many = args.count, args.times * args.count
    folders = {count: cached_scenes(args.cache, count, args.size) for count in (1, few)}
    folders[many] = repeated_scenes(folders[few], args.times)
    mode = ["--direct_running_mode", "multi_processing", "--direct_num_workers", str(args.workers)]

    def measure(scenes: Path) -> Run:
        output = ["--output", str(args.cache / "out-memory")]
        return run(build(*source_flags(scenes), *output, *(mode if args.workers > 1 else [])), set(args.cores))

    runs: dict[int, list[Run]] = {count: [] for count in folders}
    measure(folders[1])
    for repeat in range(args.repeats):
        for count, scenes in folders.items():
            runs[count].append(measure(scenes))
            last = runs[count][-1]
            print(f"repeat {repeat + 1}: {count} images, {last.seconds:.1f} s, {last.peak_rss_mib:.0f} MiB", flush=True)

    startup = statistics.median(result.seconds for result in runs[1])
    rates = {count: [(count - 1) / (result.seconds - startup) for result in runs[count]] for count in (few, many)}
    peaks = {count: [result.peak_rss_mib for result in runs[count]] for count in folders}
    print(f"{'images':>8}{'peak MiB':>26}{'images/s':>26}")
    for count in (few, many):
        print(f"{count:>8}{spread(peaks[count]):>26}{spread(rates[count]):>26}")
    memory_ratio = statistics.median(peaks[many]) / statistics.median(peaks[few])
    rate_ratio = statistics.median(rates[many]) / statistics.median(rates[few])
    print(f"{many} against {few} images: {memory_ratio:.2f} times the memory, {rate_ratio:.2f} times the rate")
    result = {
        "benchmark": "build_memory",
        "size": size_text(args.size),
        "workers": args.workers,
        "repeats": args.repeats,
        "start-up s": round(startup, 2),
        "peak MiB": {str(count): summary(figures) for count, figures in peaks.items()},
        "images/s": {str(count): summary(figures) for count, figures in rates.items()},
        "memory ratio": round(memory_ratio, 3),
        "rate ratio": round(rate_ratio, 3),
    }
    print(json.dumps({**result, **circumstances()}))


if __name__ == "__main__":
    main()
