#!/usr/bin/env bash
# The build on Prism, Beam's own portable runner, with its workers in a pool of their own, as a cluster has them.
#
# Needs Go, which compiles the runner within a minute or two; on a machine of your own nothing else:
#
#   bash examples/prism.sh                                              40 drawn scenes
#   bash examples/prism.sh --images photos --segmenter transformers     your sources, and any flag of the build
#
# Run as a whole on drawn scenes. docs/runners.md tells how the same job goes to other runners.
set -euo pipefail

OUT=${OUT:-prism}
JOB_PORT=${JOB_PORT:-8073}
POOL_PORT=${POOL_PORT:-50000}
PATH=${GOBIN:-$(go env GOPATH)/bin}:$PATH

# 1. Get the runner, of the version of Beam.
beam=$(python -c 'from importlib.metadata import version; print(version("apache-beam"))')
command -v prism >/dev/null || go install "github.com/apache/beam/sdks/v2/go/cmd/prism@v$beam"

# 2. Start it, and a pool that starts workers as it asks for them. Both end with this script.
mkdir -p "$OUT"
prism -job_port "$JOB_PORT" -serve_http=false 2>"$OUT/prism.log" &
python -m apache_beam.runners.worker.worker_pool_main --service_port "$POOL_PORT" 2>"$OUT/workers.log" &
trap 'kill $(jobs -p); wait' EXIT
for port in "$JOB_PORT" "$POOL_PORT"; do
    until (: </dev/tcp/localhost/"$port") 2>/dev/null; do sleep 0.2; done
done

# 3. Build.
if [ $# -eq 0 ]; then
    python -m collavo.scenes --output "$OUT/scenes" --count 40 --size 160x120 --overwrite
    set -- --coco_panoptic "$OUT/scenes/panoptic.json" --coco_images "$OUT/scenes/images"
fi
python pipelines/build_crayon.py --runner PortableRunner --job_endpoint "localhost:$JOB_PORT" \
    --environment_type EXTERNAL --environment_config "localhost:$POOL_PORT" "$@" --output "$OUT/data" --overwrite

# 4. Look at some rows.
python -c 'import itertools, sys, collavo
for row in itertools.islice(collavo.read_rows(collavo.find_files(sys.argv[1:])), 5):
    print(row.image_id, row.split, *row.size_wh, len(row.segments), "segments,", len(row.instructions), "instructions")' "$OUT/data"
