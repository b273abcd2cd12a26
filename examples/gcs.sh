#!/usr/bin/env bash
# Pictures and rows in Google Cloud Storage: a server on this machine stands for it. Needs Go, which compiles it.
#
#   bash examples/gcs.sh
#
# For a bucket of your own leave out step 1 and the variable, and name it in place of `anonymous@crayon` and `crayon`; then
# the SDK's usual credentials count.
set -euo pipefail

OUT=${OUT:-gcs}
PORT=${PORT:-4443}
export CLOUD_STORAGE_EMULATOR_ENDPOINT=http://localhost:$PORT
PATH=${GOBIN:-$(go env GOPATH)/bin}:$PATH

# 1. Get the server, and start it; it ends with this script. A folder in its folder is a bucket.
command -v fake-gcs-server >/dev/null || go install github.com/fsouza/fake-gcs-server@latest
rm -rf "$OUT/store" && mkdir -p "$OUT/store/crayon"
fake-gcs-server -scheme http -port "$PORT" -filesystem-root "$OUT/store" -public-host "localhost:$PORT" \
    >"$OUT/server.log" 2>&1 &
trap 'kill $(jobs -p); wait' EXIT
until (: </dev/tcp/localhost/"$PORT") 2>/dev/null; do sleep 0.2; done

# 2. Draw scenes and put them into the store.
python -m collavo.scenes --output "$OUT/scenes" --count 40 --size 160x120 --overwrite
python -c 'import sys, pyarrow.fs; pyarrow.fs.copy_files(*sys.argv[1:])' "$OUT/scenes" gs://anonymous@crayon/scenes

# 3. Build.
python pipelines/build_crayon.py --coco_panoptic gs://crayon/scenes/panoptic.json \
    --coco_images gs://crayon/scenes/images --llava_json gs://crayon/scenes/dialogues.json \
    --image_root gs://crayon/scenes --segmenter annotations --output gs://crayon/data

# 4. Look at some rows.
python -c 'import itertools, sys, collavo
for row in itertools.islice(collavo.read_rows(collavo.find_files(sys.argv[1:])), 5):
    print(row.image_id, row.split, *row.size_wh, len(row.segments), "segments,", len(row.instructions), "instructions")' gs://crayon/data
